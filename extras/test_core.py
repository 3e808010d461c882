"""Harder cases for the core: odd files, damaged input, several processes, kills."""
import contextlib
import functools
import itertools
import json
import math
import multiprocessing.forkserver
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import train
import video_colbert
from test_video_colbert import (SMALL, contents, records, run_until, write_clip,
                                write_json_lines)
from video_colbert import (
    Config, InputError, VideoColBERT, mms_fv, reciprocal_rank_fusion, retrieval_metrics,
    sample_frames, video_to_text)

# "tiny" is as small as it can be here, because most tests train several models.
TINY = dict(
    embed_dim=16,
    vision_cfg=dict(image_size=32, patch_size=16, width=16, layers=1, head_width=8),
    text_cfg=dict(width=16, heads=2, layers=1))

@pytest.fixture(scope="module", autouse=True)
def smallest():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_colbert, "TINY", TINY)
        patch.setattr(open_clip, "get_tokenizer", functools.cache(open_clip.get_tokenizer))
        yield

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with the clips of `data`, whose `whole` is a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("clips")
    write_json_lines(folder)
    train.main([*SMALL, "--data", f"{folder}/clips.jsonl", "--out", f"{folder}/whole",
                "--cache", f"{folder}/cache"])
    return folder

@pytest.fixture
def data(clips, tmp_path, monkeypatch):
    """Three clips to train on, with three captions each, one to validate and two to test."""
    ignore = shutil.ignore_patterns("whole", "cache")
    shutil.copytree(clips, tmp_path, ignore=ignore, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture
def whole(clips):
    """What a run of SMALL on `data` leaves if nothing stops it."""
    return contents(clips / "whole")

# ---- Processes that start at once, as copies of one that has imported torch

FORK = multiprocessing.get_context("forkserver")

@pytest.fixture(scope="module", autouse=True)
def server():
    with pytest.MonkeyPatch.context() as patch:
        folder = os.path.dirname(train.__file__)
        patch.setenv("PYTHONPATH", folder, prepend=os.pathsep)
        FORK.set_forkserver_preload(["extras.test_core"])
        multiprocessing.forkserver.ensure_running()

def start(function, *args, **environment):
    """Call a function in a process of its own, with its output in the file `output`."""
    process = FORK.Process(target=in_process, args=(function, args, environment))
    process.start()
    return process

def in_process(function, args, environment):
    os.environ.update(environment)
    # After a fork, torch renews its thread pool; threads that are first to use it may collide.
    torch.set_num_threads(torch.get_num_threads())
    train.RANK = int(environment.get("RANK", 0))
    train.WORLD = int(environment.get("WORLD_SIZE", 1))
    video_colbert.TINY = TINY
    file = os.open(f"output{train.RANK or ''}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(*args)

def run_program(*flags):
    """What `python train.py FLAGS` does."""
    sys.argv[1:] = flags
    train.run_main(train.main, "train.py")

def ends(process, timeout=60):
    """-> exit code and the lines of its output."""
    process.join(timeout)
    assert process.exitcode is not None, "it still runs"
    return process.exitcode, Path("output").read_text().splitlines()

def wait_for(condition, process):
    while not condition():
        assert process.is_alive(), Path("output").read_text()
        time.sleep(0.01)

def run_two_processes(function, *args):
    """Two processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    processes = [start(function, *args, **shared, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0], Path("output").read_text()

COLLECTIVES = [
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
    "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter"]

def count_collectives():
    """-> the number of calls of torch.distributed's functions from now on, by name."""
    calls = Counter()

    def noted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)
        return call

    for name in COLLECTIVES:
        setattr(dist, name, noted(name, getattr(dist, name)))
    return calls

# ---- The model
def test_frames_are_normalised_as_the_weights_want_and_a_saved_model_remembers(
        monkeypatch, tmp_path, tiny):
    """`laion2b_s32b_b82k` of ViT-L-14 was trained with 0.5 where ViT-L-14 has CLIP's mean."""
    monkeypatch.setattr(open_clip, "CustomTextCLIP", lambda **config: torch.nn.Identity())
    monkeypatch.setattr(open_clip, "download_pretrained", lambda source: "file")
    monkeypatch.setattr(video_colbert, "load_weights", lambda *args: None)
    _, mean, std = video_colbert.load_backbone("ViT-L-14", "laion2b_s32b_b82k")
    assert tuple(mean) == tuple(std) == (0.5, 0.5, 0.5)
    assert video_colbert.load_backbone("ViT-L-14", "none")[1] == open_clip.OPENAI_DATASET_MEAN
    monkeypatch.undo()
    tiny.save(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**weights, "mean": weights["mean"] + 1}, file)
    assert torch.equal(VideoColBERT.load(tmp_path).mean, tiny.mean + 1)

@pytest.mark.parametrize("config, message", [
    (dict(backbone="ViT-B32", pretrained=None), "unknown backbone 'ViT-B32'; .*ViT-B-32"),
    (dict(backbone="ViT-B-32"), "differ in QuickGELU, .*add or drop -quickgelu"),
    (dict(pretrained="laion"), "cannot load 'laion' into ViT-B-32-quickgelu.*a tag: .*openai"),
    (dict(backbone="coca_ViT-B-32"), "'coca_ViT-B-32' is not supported"),
    (dict(backbone="RN101-quickgelu"), "'RN101-quickgelu' is not supported"),
    (dict(backbone="convnext_tiny"), "'convnext_tiny' is not supported"),
    (dict(backbone="ViT-H-14-CLIPA"), "'ViT-H-14-CLIPA' is not supported"),
    (dict(backbone="ViT-SO400M-16-SigLIP-i18n-256"), "-i18n-256' is not supported"),
    (dict(backbone="tiny", num_tokens=100), "num_tokens must be 3 to 77"),
    (dict(backbone="tiny", num_frames=0), "num_frames must be 1 to 77"),
    (dict(backbone="tiny", num_frames=78), "num_frames must be 1 to 77"),
    (dict(backbone="tiny", temporal_layers=0), "temporal_layers must be 1 to 1000, not 0"),
    (dict(backbone="tiny", visual_expansion=-1), "visual_expansion must be 0 to 1000, not -1"),
    (dict(backbone="tiny", interaction="sum"), "interaction must be mms or mp, not sum"),
    (dict(backbone="tiny", loss="hinge"), "loss must be sigmoid or infonce, not hinge"),
])
def test_an_invalid_setting_is_named_in_one_line(config, message):
    # On meta, because no weight matters here.
    with pytest.raises(InputError, match=message) as error, torch.device("meta"):
        VideoColBERT(Config(**config))
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("pad", [31, 49407, 3002, 13530, 49406, 0])
def test_every_pad_token_of_table_12_fills_the_query_and_nothing_else(pad):
    model = VideoColBERT(Config(backbone="tiny", pad_token=pad))
    ids, _ = model.tokenize(["a dog"])
    assert ids[0].tolist() == [49406, 320, 1929, 49407] + [pad] * 28
    assert model.real_tokens(ids)[0].tolist() == [True] * 4 + [False] * 28

def test_siglip_queries_are_64_long_with_its_own_pad_and_end(tmp_path):
    """With a tokenizer of its kind, whose pad and end are alike; the real one is on the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "dog": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    end = [("</s>", 1)]
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=end)
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="</s>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(tmp_path)
    with torch.device("meta"):
        model = VideoColBERT(Config(backbone="ViT-B-16-SigLIP", pretrained=None,
                                    query_augmentation=False, pad_token=31))
    model.tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=64,
                                                      clean="canonicalize")
    ids, mask = model.tokenize(["A dog!", "dog " * 100])
    assert ids[0].tolist() == [2, 3] + [1] * 62 and mask[0].sum() == 3
    assert ids[1].tolist() == [3] * 63 + [1] and mask[1].all()

@pytest.mark.parametrize("name, content, message", [
    ("config.json", None, "No such file"), ("config.json", b"{", "holds no model: Expecting"),
    ("config.json", b'{"nonsense": 1}', "nonsense"),
    ("model.safetensors", b"x" * 100, "holds no model"),
    ("config.json", b'{"backbone": "tiny", "num_frames": 9}', "frame_positions")])
def test_a_folder_without_a_model_is_named_in_one_line(tmp_path, tiny, name, content, message):
    tiny.save(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        VideoColBERT.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

def flipped_ranks(sim, target):
    """Each video's rank by its best caption among the videos' best captions, as a loop."""
    videos, ranks = sorted(set(target.tolist())), []
    for v in videos:
        best = {w: sim[target == w, v].max().item() for w in videos}
        ranks.append([sum(x >= best[w] for x in best.values()) for w in videos])
    return torch.tensor(ranks)

@pytest.mark.parametrize("levels", [0, 4])
def test_video_to_text_ranks_a_videos_best_caption_among_the_other_videos_best(levels):
    """Several captions per video, some videos with none, and ties."""
    sim, target = torch.randn(60, 15), torch.randint(0, 13, (60,))
    if levels:
        sim = (sim * 2).round() / levels
    ranks = flipped_ranks(sim, target).diag()
    flipped = video_to_text(sim, target)
    got = retrieval_metrics(flipped, torch.arange(len(flipped)))
    assert got["MnR"] == pytest.approx(ranks.double().mean().item())
    assert len(set(ranks.tolist())) > 3
    assert got["R@1"] == pytest.approx(100 * (ranks == 1).double().mean().item())

@pytest.mark.parametrize("levels", [0, 4])
def test_reciprocal_rank_fusion_is_its_formula(levels):
    F, V = torch.randn(9, 12), torch.randn(9, 12)
    if levels:
        F, V = ((x * 2).round() / levels for x in (F, V))
    for a, b in itertools.product(range(9), range(12)):
        ranks = [(row >= row[b]).sum().item() for row in (F[a], V[a])]
        want = sum(1 / (60 + rank) for rank in ranks)
        assert abs(reciprocal_rank_fusion(F, V)[a, b].item() - want) < 1e-12

def test_result_rows_fuse_the_rankings_of_their_own_direction():
    """RRF from video to text is the fusion of the two video-to-text rankings."""
    F, V, target = torch.randn(40, 12), torch.randn(40, 12), torch.arange(40) % 12
    fused = sum(1 / (60 + flipped_ranks(sim, target).double()) for sim in (F, V))
    rows = {(r.pop("direction"), r.pop("score")): r for r in train.result_rows(F, V, target)}
    back = {"queries": 12, **retrieval_metrics(fused, torch.arange(12))}
    assert rows["video to text", "RRF"] == pytest.approx(back)
    for score, sim in (("MMS_FV", mms_fv(F, V)), ("RRF", reciprocal_rank_fusion(F, V))):
        want = {"queries": 40, **retrieval_metrics(sim, target)}
        assert rows["text to video", score] == want

@pytest.mark.parametrize("sim, target, message", [([[1.0, float("nan")]], [0], "NaN"),
                                                  (torch.zeros(0, 3), [], "no queries")])
def test_metrics_of_nothing_and_of_nan_are_refused(sim, target, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(sim, target)

# ---- Settings and input
def test_every_setting_is_an_option_with_its_sentence(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    hidden = [name for name in vars(train.Settings()) if f"--{name.replace('_', '-')}" not in text]
    assert hidden == ["pretrained_hash"]  # which is computed
    assert "frames per video (section 5.2, Table 7)" in text and "An open_clip tag, a" in text

def test_what_is_typed_beats_the_presets_and_these_beat_the_paper():
    s = train.parse_settings([])
    assert (s.backbone, s.freeze, s.learn_scale, s.logit_bias) == ("tiny", False, True, -10.0)
    s = train.parse_settings(["--data", "msrvtt"])
    assert (s.backbone, s.num_frames, s.num_tokens) == ("ViT-B-32-quickgelu", 12, 32)
    assert (s.freeze, s.learn_scale, s.lr, s.lr_pretrained) == (True, False, 1e-4, 1e-7)
    s = train.parse_settings(["--backbone", "ViT-B-32-quickgelu", "--num-frames", "3"])
    assert (s.backbone[:8], s.freeze, s.num_frames, s.batch_size) == ("ViT-B-32", True, 3, 64)
    assert train.parse_settings(["--data", "msrvtt", "--loss", "infonce"]).learn_scale

def test_input_errors_are_one_line_and_programming_errors_keep_their_traceback(capsys):
    bad_input = Mock(side_effect=InputError("a.jsonl, line 3: no captions"))
    with pytest.raises(SystemExit, match="2"):
        train.run_main(bad_input, "train.py")
    assert capsys.readouterr().err == "train.py: a.jsonl, line 3: no captions\n"
    bug = Mock(side_effect=ValueError("too many values"))
    with pytest.raises(ValueError, match="too many values"):
        train.run_main(bug, "train.py")

@pytest.mark.parametrize("flags, message", [
    ("--device tpu9", "--device tpu9"),
    ("--data nonsense", "--data is shapes, msrvtt or FILE.jsonl"),
    ("--loss hinge", "loss must be"), ("--backbone ViT-B-23", "unknown backbone"),
    ("--batch-size 0", "--batch-size cannot be 0"), ("--epochs -1", "--epochs cannot be -1"),
    ("--lr nan", "--lr cannot be nan"), ("--out {}", " exists: give a new --out .--resume"),
    ("--warmup inf", "--warmup cannot be inf"),
    ("--pad-token 99999", "pad_token must be 0 to 49407, not 99999"),
    ("--weight-decay -1", "--weight-decay cannot be"), ("--seed 99999999999999999999", "--seed"),
    ("--resume nowhere", "nowhere/settings.json: No such file"),
    ("--eval-only nowhere", "nowhere/settings.json: No such file")])
def test_a_wrong_flag_is_an_error_before_anything_slow(data, monkeypatch, flags, message):
    monkeypatch.setattr(train, "cached_frames", None)
    argv = SMALL + ["--data", str(data / "clips.jsonl")] + flags.format(data).split()
    with pytest.raises(InputError, match=message) as error:
        train.main(argv)
    assert "\n" not in str(error.value)

def test_json_lines_become_clips(tmp_path):
    """With a byte order mark, Windows' line ends and blank lines, too."""
    one = {"video": "a b.mp4", "captions": ["one", "שלום 🐕"], "split": "train"}
    part = {"video": "a b.mp4", "captions": ["c"], "split": "train", "start": 1.0}
    two = {"video": "/x/b.mkv", "captions": ["two"], "split": "test", "start": 2, "end": 4.5}
    text = "\ufeff" + "\r\n\n".join(map(json.dumps, [one, two, part]))
    (tmp_path / "my.jsonl").write_text(text, "utf-8")
    data = train.load_clips(train.Settings(data=f"{tmp_path}/my.jsonl"))
    path, Clip = f"{tmp_path}/a b.mp4", train.Clip
    assert data["train"] == [Clip(path, one["captions"], 0.0, None), Clip(path, ["c"], 1.0, None)]
    assert data["val"] == [] and data["test"] == [Clip("/x/b.mkv", ["two"], 2, 4.5)]

@pytest.mark.parametrize("change, message", [
    ({"split": "trian"}, "expected a split of train, val or test"),
    ({"captions": "a"}, "expected a list of captions"),
    ({"captions": []}, "expected a list of captions"), ({"captions": ["a", " "]}, "not blank"),
    ({"captions": ["\ud800"]}, "surrogates"), ({"video": 3}, "expected {"),
    ({"video": "c\0.mp4"}, "null"),
    ({"video": "./a.mp4"}, "each clip only once"), ({"split": ["test"]}, "expected a split"),
    ({"end": 0}, "0 <= start < end"), ({"start": -1}, "0 <= start"),
    ({"start": math.nan}, "0 <= start"), ({"start": "1"}, "0 <= start"),
    ({"start": None}, "0 <= start"),
    ({"start": 5, "end": 4}, "0 <= start < end"), (5, "expected {"), (None, "expected {"),
    ([], "expected {"), ("{", "Expecting"), ("[" * 100_000, "recursion"),
    ({"strat": 3}, "unexpected keyword argument 'strat'")])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, change, message):
    good = {"video": "a.mp4", "captions": ["a"], "split": "train"}
    bad = {**good, "video": "c.mp4", **change} if isinstance(change, dict) else change
    bad = bad if isinstance(bad, str) else json.dumps(bad)
    (tmp_path / "my.jsonl").write_text("\n".join([json.dumps(good), "", bad]))
    with pytest.raises(InputError, match=f"my.jsonl, line 3: .*{message}") as error:
        train.load_clips(train.Settings(data=str(tmp_path / "my.jsonl")))
    assert "\n" not in str(error.value)

CAPTIONS = {f"video{i}": [f"caption {j} of {i}" for j in range(3)] for i in range(6)}

def write_msrvtt(root, videos="videos"):
    """CLIP4Clip's copy of MSR-VTT, with test videos 1 and 4."""
    sentences = [(video, text) for video, texts in CAPTIONS.items() for text in texts]
    content = {"sentences": [{"caption": text, "video_id": v} for v, text in sentences]}
    root.mkdir(exist_ok=True)
    (root / "MSRVTT_data.json").write_text(json.dumps(content))
    (root / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo2\nvideo3\n")
    (root / "MSRVTT_JSFUSION_test.csv").write_text(
        "key,vid_key,video_id,sentence\n"
        'ret0,msr1,video1,"the query, of 1"\nret1,msr4,video4,query 4\n')
    (root / videos).mkdir(parents=True)
    for i in range(6):
        (root / videos / f"video{i}.mp4").touch()
    return root

@pytest.mark.parametrize("videos", ["videos/all", "MSRVTT/videos"])
def test_msrvtt_is_read_wherever_its_videos_are(tmp_path, videos):
    root = write_msrvtt(tmp_path, videos)
    data = train.load_clips(train.Settings(data="msrvtt", root=str(root)))
    found = {clip.path: sorted(clip.captions) for clip in data["train"]}
    assert found == {f"{root}/{videos}/video{i}.mp4": CAPTIONS[f"video{i}"] for i in (0, 2, 3)}
    assert data["test"] == [train.Clip(f"{root}/{videos}/video1.mp4", ["the query, of 1"]),
                            train.Clip(f"{root}/{videos}/video4.mp4", ["query 4"])]

def test_two_videos_of_one_name_are_copies_or_an_error(tmp_path):
    """The synthetic clips, for example, have MSR-VTT's names."""
    root = write_msrvtt(tmp_path)
    (root / "copy").mkdir()
    shutil.copy(root / "videos/video1.mp4", root / "copy")
    s = train.Settings(data="msrvtt", root=str(root))
    assert train.load_clips(s)["test"][0].path == f"{root}/copy/video1.mp4"
    (root / "shapes").mkdir()
    # No test or training clip.
    (root / "shapes/video5.mp4").write_text("another")
    assert len(train.load_clips(s)["test"]) == 2
    (root / "shapes/video1.mp4").write_text("another")
    message = "copy/video1.mp4 and .*shapes/video1.mp4 differ: use a folder with only one"
    with pytest.raises(InputError, match=message):
        train.load_clips(s)

@pytest.mark.parametrize("name", [
    "MSRVTT_data.json", "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv"])
def test_two_files_of_captions_are_copies_or_an_error(tmp_path, name):
    """As after a backup and a correction."""
    root = write_msrvtt(tmp_path)
    s = train.Settings(data="msrvtt", root=str(root))
    data = train.load_clips(s)
    for folder in ("backup", "backup2"):
        (root / folder).mkdir()
        shutil.copy(root / name, root / folder)
    assert train.load_clips(s) == data
    # A correction at the end of a long file, which keeps its size.
    content = (root / name).read_bytes()
    (root / name).write_bytes(100_000 * b" " + content)
    shutil.copy(root / name, root / "backup")
    (root / "backup2" / name).write_bytes(100_000 * b" " + content[:-1] + b" ")
    with pytest.raises(InputError, match=f"{name} and .*backup2/{name} differ: use a folder"):
        train.load_clips(s)
    (root / "backup2" / name).unlink()
    (root / "backup2" / name).symlink_to("nowhere")
    with pytest.raises(InputError, match=f"{name} and .*backup2/{name}: No such file"):
        train.load_clips(s)

def test_missing_data_is_noticed_before_weights_are_fetched_and_says_where_to_get_it(tmp_path):
    message = (r"MSR-VTT in .*nowhere(.|\n)*curl -L -C - -O https://.*MSRVTT.zip\n"
               r".*msrvtt_data.zip\n.*unzip")
    with pytest.raises(InputError, match=message):
        train.main(["--data", "msrvtt", "--root", f"{tmp_path}/nowhere", "--device", "cpu"])

def test_a_copy_of_msrvtt_without_a_file_says_how_to_read_others(tmp_path):
    root = write_msrvtt(tmp_path)
    (root / "MSRVTT_train.9k.csv").unlink()
    with pytest.raises(InputError, match="no MSR-VTT in (.|\n)*"
                                         "python -m extras.datasets msrvtt FOLDER"):
        train.load_clips(train.Settings(data="msrvtt", root=str(root)))

def test_a_batch_larger_than_the_data_is_one_line(data, capsys):
    """There are three clips with three captions each."""
    flags = [*SMALL, "--data", "clips.jsonl", "--out", "a", "--batch-size"]
    with pytest.raises(SystemExit, match="2"):
        train.run_main(lambda: train.main([*flags, "10"]), "train.py")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "train.py: --batch-size 10 is more than 9 examples"
    assert not any("Traceback" in line for line in lines)

def test_after_a_batch_that_was_too_large_the_same_command_with_a_smaller_one_works(data):
    flags = [*SMALL, "--data", "clips.jsonl", "--out", "a", "--batch-size"]
    with pytest.raises(InputError, match="more than 9 examples"):
        train.main([*flags, "10"])
    train.main([*flags, "9"])
    assert [line["step"] for line in records("a") if "loss" in line] == [0, 1]

def test_missing_clips_stop_a_run_unless_they_are_allowed(data, capsys):
    """Then they are left out, and the table says so."""
    flags = [*SMALL, "--data", "clips.jsonl"]
    (data / "3/clip.mp4").write_bytes(b"")
    (data / "0/clip.mp4").unlink()
    with pytest.raises(InputError, match="1 of 2 test clips cannot be read; --allow-missing"):
        train.main([*flags, "--epochs", "0"])
    assert "3/clip.mp4: Invalid data" in capsys.readouterr().err and not os.path.exists("runs")
    train.main([*flags, "--epochs", "0", "--allow-missing"])
    assert "gallery of 1 clips, 1 test clips missing: not comparable" in capsys.readouterr().out

    with pytest.raises(InputError, match="1 of 3 train clips cannot be read"):
        train.main([*flags, "--out", "a"])
    assert not os.path.exists("a")
    # Two clips with three captions each are one batch of four in each epoch.
    train.main([*flags, "--out", "a", "--allow-missing"])
    assert [line["epoch"] for line in records("a") if "loss" in line] == [0, 1]
    for i in (1, 2):
        (data / f"{i}/clip.mp4").unlink()
    with pytest.raises(InputError, match="none of the 3 train clips can be read"):
        train.main([*flags, "--out", "b", "--allow-missing"])

def test_a_run_goes_on_without_a_validation_set_that_cannot_be_read(data):
    """If that is allowed, as it is optional."""
    (data / "4/clip.mp4").unlink()
    flags = [*SMALL, "--data", "clips.jsonl", "--out", "a"]
    with pytest.raises(InputError, match="1 of 1 val clips cannot be read; --allow-missing"):
        train.main(flags)
    train.main([*flags, "--allow-missing"])
    assert not any("split" in line for line in records("a"))

def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
        data, whole, monkeypatch, capsys):
    """Damaged is: cut, or a bit is another. If all are damaged, the run is left as it is."""
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", "1"]
    run_until(monkeypatch, [*flags, "--out", "a"], "training_step", 3)
    first, last = sorted((data / "a/checkpoints").iterdir())  # the last two are kept
    assert (first.name, last.name) == ("step-00000002.pt", "step-00000003.pt")
    good = [path.read_bytes() for path in (first, last)]
    changed = bytearray(good[0])
    changed[len(changed) // 2] ^= 1
    first.write_bytes(changed)
    last.write_bytes(good[1][:-1])

    log = (data / "a/log.jsonl").read_bytes()
    with pytest.raises(InputError, match="all checkpoints in a are damaged: start a new run") as e:
        train.main(["--resume", "a"])
    assert "\n" not in str(e.value) and (data / "a/log.jsonl").read_bytes() == log != b""
    assert sorted((data / "a/checkpoints").iterdir()) == [first, last]

    capsys.readouterr()
    first.write_bytes(good[0])
    train.main(["--resume", "a"])
    assert "step-00000003.pt is damaged; trying the one before it" in capsys.readouterr().out
    assert contents("a") == whole

def test_other_settings_or_clips_are_another_run(data, monkeypatch):
    """An old run without a setting has its default, one with an unknown setting is named; a
    run's clips and captions must still be those."""
    flags = [*SMALL, "--data", "clips.jsonl"]
    run_until(monkeypatch, [*flags, "--out", "a"], "training_step", 3)
    with pytest.raises(InputError, match="cannot change seed of a: 0"):
        train.main(["--resume", "a", "--seed", "3"])
    settings = json.loads((data / "a/settings.json").read_text())
    lines = (data / "clips.jsonl").read_text()
    for change in ({"nonsense": 1}, {}):
        (data / "a/settings.json").write_text(json.dumps({**settings, **change}))
        (data / "clips.jsonl").write_text(lines.replace("caption 0 of 3", "edited"))
        message = "nonsense" if change else "a was started with other clips"
        with pytest.raises(InputError, match=message):
            train.main(["--resume", "a"])
    del settings["warmup"]
    (data / "a/settings.json").write_text(json.dumps(settings))
    (data / "clips.jsonl").write_text(lines)
    train.main(["--resume", "a"])
    assert train.read_result("a")["gallery"] == 2

def test_a_run_leaves_its_folder_and_a_table_and_repeats_exactly(data, capsys):
    """With other threads and an empty cache, too."""
    flags = [*SMALL, "--data", "clips.jsonl", "--eval-every", "2"]
    train.main([*flags, "--out", "a"])
    train.main([*flags, "--out", "b", "--workers", "1", "--cache", "cache2"])
    assert contents("a") == contents("b")
    assert VideoColBERT.load("a").config.num_frames == 3
    assert set(os.listdir("a")) == {"settings.json", "config.json", *contents("a")}
    *log, last = records("a")
    kinds = [line.get("split", "step") for line in log]
    assert kinds == ["step", "step", "val", "step", "step", "val", "test"]
    assert last["gallery"] == 2 and len(last["evaluation"]) == 8
    assert train.results_table(last) in capsys.readouterr().out
    with pytest.raises(InputError, match="a exists: give a new --out .--resume a continues"):
        train.main([*flags, "--out", "a"])

def test_a_model_is_evaluated_again_on_the_same_clips_and_on_others(clips, data):
    """--eval-only writes no model, and needs no training data."""
    train.main(["--eval-only", f"{clips}/whole", "--out", "b"])
    assert records("b")[0]["evaluation"] == records(clips / "whole")[-1]["evaluation"]
    assert sorted(os.listdir("b")) == ["log.jsonl", "settings.json"]
    lines = (data / "clips.jsonl").read_text().splitlines()
    (data / "other.jsonl").write_text(lines[3])
    train.main(["--eval-only", f"{clips}/whole", "--data", "other.jsonl"])
    assert records("runs/other-eval")[0]["gallery"] == 1

def test_a_finished_run_does_not_resume_with_other_clips(data):
    train.main([*SMALL, "--data", "clips.jsonl", "--epochs", "0", "--out", "a"])
    write_clip(data / "3/clip.mp4", 30)
    with pytest.raises(InputError, match="other clips or captions"):
        train.main(["--resume", "a"])

def test_resume_and_out_exclude_each_other(data):
    """Otherwise --out would be ignored in silence."""
    train.main([*SMALL, "--data", "clips.jsonl", "--epochs", "0", "--out", "a"])
    with pytest.raises(InputError):
        train.main(["--resume", "a", "--out", "b"])

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_stops(data, whole, monkeypatch, capsys, number):
    flags, step = [*SMALL, "--data", "clips.jsonl"], train.training_step
    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", lambda *a: os.kill(os.getpid(), number) or step(*a))
        with pytest.raises(KeyboardInterrupt):
            train.main([*flags, "--out", "a"])
    assert "stopped after 1 steps; continue with --resume a\n" in capsys.readouterr().err
    assert max(os.listdir("a/checkpoints")) == "step-00000001.pt"
    train.main(["--resume", "a"])
    assert contents("a") == whole

def test_a_signal_during_the_last_validation_stops_the_run(data, whole, monkeypatch):
    """No later step reads the signal."""
    flags, evaluate = [*SMALL, "--data", "clips.jsonl"], train.evaluate
    calls = itertools.count()
    def signalled(*args):
        if next(calls) == 1:  # of two epochs
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", signalled)
        with pytest.raises(KeyboardInterrupt):
            train.main([*flags, "--out", "a"])
    assert next(calls) == 2 and os.listdir("a/checkpoints")
    train.main(["--resume", "a"])
    assert contents("a") == whole

@pytest.mark.parametrize("spoilt", [0, 3])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_a_checkpoint_holds_it(
        data, monkeypatch, spoilt):
    calls, step = itertools.count(), train.training_step
    factor = torch.ones(5).index_fill(0, torch.tensor(spoilt), math.nan)
    def spoils_step_2(*args):
        return step(*args) * (factor if next(calls) == 2 else 1)
    monkeypatch.setattr(train, "training_step", spoils_step_2)
    with pytest.raises(FloatingPointError, match="nan.* in step 2"):
        train.main([*SMALL, "--data", "clips.jsonl", "--out", "a"])
    assert max(os.listdir("a/checkpoints")) == "step-00000002.pt"

def test_mean_pooling_of_siglip_is_equation_1(monkeypatch):
    """SigLIP pools its last token. Its text encoder with fewer and smaller layers."""
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    config["embed_dim"] = 32
    config["text_cfg"].update(width=32, heads=2, layers=2)
    config["vision_cfg"] = dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16)
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    model = VideoColBERT(Config(backbone="ViT-B-16-SigLIP", pretrained="none", num_frames=2,
                                interaction="mp"))
    assert model.is_siglip and model.num_tokens == 64
    ids, mask = torch.randint(2, 32000, (2, 64)), torch.arange(64).expand(2, -1) == 63
    with torch.no_grad():
        Q, q = model.encode_query(ids), model.backbone.encode_text(ids, normalize=True)
        frames = torch.randint(0, 256, (1, 2, 3, 32, 32), dtype=torch.uint8)
        F, V = model.encode_video(frames)
        got = model.similarities(Q, mask, F, V)
    for sim, x in zip(got, (F, V[:, :2])):
        mean = torch.nn.functional.normalize(x.mean(1), dim=-1)
        assert (sim - q @ mean.T).abs().max() < 1e-5

# ---- On a GPU: fake tensors know only their device and shape, so a laptop finds a forgotten .to
FAKE = Config(backbone="tiny", num_frames=3, num_tokens=8)

@pytest.fixture
def fake_gpu():
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = VideoColBERT(FAKE)
        model.norms_checked = True  # they have no values
        yield model

def fake_batch(model):
    ids, mask = model.tokenize(["a dog", "a cat"])
    frames = torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8)
    return ids.to("cuda"), mask.to("cuda"), frames.to("cuda")

@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_fake_gpu_notices_a_forgotten_to(fake_gpu):
    with pytest.raises(RuntimeError, match="devices"):
        fake_gpu.encode_query(fake_gpu.tokenize(["a dog"])[0])
    with pytest.raises(RuntimeError, match="devices"):
        fake_gpu.encode_video(torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8))

def test_encoders_similarities_and_losses_stay_on_the_gpu(fake_gpu):
    ids, mask, frames = fake_batch(fake_gpu)
    assert fake_gpu.real_tokens(ids).device.type == "cuda"
    Q = fake_gpu.encode_query(ids)
    F, V = fake_gpu.encode_video(frames)
    assert {x.device.type for x in (Q, F, V)} == {"cuda"}
    assert video_colbert.mean_max_sim(Q, F).device.type == "cuda"

    pairs = torch.ones(2, 2, dtype=torch.bool, device="cuda")
    for interaction, loss, form, positives in itertools.product(
            ("mms", "mp"), video_colbert.LOSSES, ("dual", "combined"), (pairs, None)):
        fake_gpu.config = train.replace(FAKE, interaction=interaction, loss=loss, loss_form=form)
        results = fake_gpu.compute_loss(Q, mask, F, V, positives)
        assert [x.device.type for x in results] == ["cuda"] * 3
        assert [x.shape for x in results] == [(), (2, 2), (2, 2)]

def test_evaluation_moves_its_batches_to_the_gpu_and_its_results_back(fake_gpu, monkeypatch):
    monkeypatch.setattr(train, "load_frames", lambda part, s, size: torch.zeros(
        len(part), 3, 3, size, size, dtype=torch.uint8))
    clips = [train.Clip(str(i), ["a dog"]) for i in range(3)]
    s = train.Settings(micro_batch=2, precision="fp32")
    mms_f, mms_v, target = train.evaluate(fake_gpu, clips, s, torch.device("cuda"))
    for x in (mms_f, mms_v):
        assert x.device.type == "cpu" and x.shape == (3, 3)
    assert target.device.type == "cpu"

# ---- Odd and damaged annotation
def mutate(content, rng):
    """One to three faults: a bit, a run of bytes, a gap, a repetition, the largest number, the end
    missing."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(len(content) or 1)), int(rng.integers(1, 64))
        fault = rng.integers(6)
        if fault == 0 and content:
            content[at] ^= 1 << int(rng.integers(8))
        elif fault == 5:
            del content[max(1, at):]
        else:
            content[at:at + n] = [b"", rng.bytes(n), b"", bytes(content[at:at + n]) * 2,
                                  b"\xff" * min(n, 8)][fault]
    return bytes(content)

def test_video_files_with_odd_names_and_behind_links_are_found(tmp_path):
    root = write_msrvtt(tmp_path / "a")
    (root / "videos").rename(tmp_path / "видео 🐕 中文")
    (root / "videos").symlink_to(tmp_path / "видео 🐕 中文")
    (root / "videos/again").symlink_to(root / "videos")           # a circle
    data = train.load_clips(train.Settings(data="msrvtt", root=str(root)))
    assert len(data["train"]) == 3 and all(os.path.exists(clip.path) for clip in data["train"])

@pytest.mark.parametrize("name, content, message", [
    ("MSRVTT_data.json", '{"sentences": [', "MSRVTT_data.json: .*line 1"),
    ("MSRVTT_data.json", "{}", "MSRVTT_data.json: no 'sentences'"),
    ("MSRVTT_data.json", '{"sentences": [5]}', "MSRVTT_data.json: 'int'"),
    ("MSRVTT_data.json", '{"sentences": 5}', "MSRVTT_data.json: 'int'"),
    ("MSRVTT_data.json", "[" * 100_000, "MSRVTT_data.json: .*recursion"),
    ("MSRVTT_data.json", "\x00\xff", "MSRVTT_data.json: "),
    ("MSRVTT_train.9k.csv", "id\nvideo0\n", "9k.csv: no 'video_id'"),
    ("MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo0\n", "9k.csv: expected each clip only once"),
    ("MSRVTT_train.9k.csv", "video_id\nvideo77\n", "9k.csv: no 'video77'"),
    ("MSRVTT_JSFUSION_test.csv", "video_id,sentence\nvideo1\n",
     "test.csv: expected a list of captions"),
    ("MSRVTT_JSFUSION_test.csv", "video_id,sentence\nvideo1,a\nvideo1,b\n",
     "each clip only once")])
def test_what_is_wrong_with_msrvtt_is_named_in_one_line(tmp_path, name, content, message):
    root = write_msrvtt(tmp_path)
    (root / name).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=message) as error:
        train.load_clips(train.Settings(data="msrvtt", root=str(root)))
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("kind", ["msrvtt", "json lines"])
def test_mutated_annotations_give_valid_clips_or_one_clear_error(tmp_path, kind):
    root, s = write_msrvtt(tmp_path), None
    names = ["MSRVTT_data.json", "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv"]
    s = train.Settings(data="msrvtt", root=str(root))
    if kind == "json lines":
        write_json_lines(root)
        names, s = ["clips.jsonl"], train.Settings(data=str(root / "clips.jsonl"))
    good, outcomes = {name: (root / name).read_bytes() for name in names}, []
    for i in range(75):
        for name in names:
            changed = name == names[i % len(names)]
            content = mutate(good[name], np.random.default_rng(i)) if changed else good[name]
            (root / name).write_bytes(content)
        try:
            data = train.load_clips(s)
            for clip in itertools.chain(*data.values()):
                assert clip.captions and all(text.strip() for text in clip.captions)
                assert all(text.encode() for text in clip.captions)
                assert 0 <= clip.start and (clip.end is None or clip.start < clip.end)
            places = {split: [(os.path.realpath(clip.path), clip.start, clip.end)
                              for clip in clips] for split, clips in data.items()}
            assert all(len(set(found)) == len(found) for found in places.values())
            outcomes.append("clips")
        except InputError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), error
            outcomes.append("error")
    assert outcomes.count("error") > 10

# ---- Checkpoints, signals and several processes
@pytest.mark.parametrize("function, call, every", [
    ("training_step", 0, 500), ("training_step", 3, 500), ("evaluate", 1, 1),
    ("evaluate", 2, 500)])
def test_a_run_killed_anywhere_and_twice_resumes_to_the_same_bytes(
        data, whole, monkeypatch, function, call, every):
    """Also in the validation after an epoch, and in the evaluation at the end."""
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", str(every)]
    run_until(monkeypatch, [*flags, "--out", "a"], function, call)
    run_until(monkeypatch, ["--resume", "a"], "result_rows", 0)
    train.main(["--resume", "a"])
    assert contents("a") == whole

@pytest.mark.parametrize("micro_batch", ["0", "2"])
def test_with_dropout_that_a_reader_adds_a_run_resumes_to_the_same_bytes(
        data, monkeypatch, micro_batch):
    """And each step, and each of its parts, drops other values."""
    forward, seeds = video_colbert.TemporalTransformer.forward, set()
    def with_dropout(module, f):
        if module.training:
            seeds.add(torch.initial_seed())
        return torch.nn.functional.dropout(forward(module, f), 0.5, module.training)
    monkeypatch.setattr(video_colbert.TemporalTransformer, "forward", with_dropout)
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", "1",
             "--micro-batch", micro_batch]
    train.main([*flags, "--out", "a"])
    assert len(seeds) == (8 if micro_batch == "2" else 4)
    run_until(monkeypatch, [*flags, "--out", "b"], "training_step", 3)
    train.main(["--resume", "b"])
    assert contents("b")["model.safetensors"] == contents("a")["model.safetensors"]
    monkeypatch.undo()
    monkeypatch.chdir(data)
    train.main([*flags, "--out", "c"])
    assert contents("c")["model.safetensors"] != contents("a")["model.safetensors"]

def test_epochs_of_different_lengths_are_counted(data, monkeypatch):
    """A reader's edit: 2, 4 and 6 steps. The rate falls to the end, and each epoch is evaluated
    once, also if the run is killed between two."""
    examples = train.epoch_examples
    def longer(clips, s, epoch):
        return examples(clips, s, epoch) * (1 + epoch)
    monkeypatch.setattr(train, "epoch_examples", longer)
    flags = [*SMALL, "--data", "clips.jsonl", "--epochs", "3", "--eval-every", "1"]
    train.main([*flags, "--out", "a"])
    lines = records("a")
    steps = [line for line in lines if "loss" in line]
    assert [line["epoch"] for line in steps] == [0] * 2 + [1] * 4 + [2] * 6
    s = train.read_settings("a")
    assert [line["lr"]["new"] for line in steps] == [
        s.lr * train.schedule(step, 12, s.warmup) for step in range(12)]
    tests = [lines[i - 2 : i + 1] for i, line in enumerate(lines) if line.get("split") == "test"]
    assert [(step["step"], val["epoch"], test["epoch"]) for step, val, test in tests] == [
        (1, 0, 0), (5, 1, 1), (11, 2, 2)]
    run_until(monkeypatch, [*flags, "--out", "b"], "training_step", 6)
    train.main(["--resume", "b"])
    assert contents("b")["model.safetensors"] == contents("a")["model.safetensors"]
    assert records("b")[:-1] == lines[:-1]

def edited(folder, old, new):
    """Copy the two files into a folder, with an edit of video_colbert.py."""
    source = Path(video_colbert.__file__).read_text()
    assert source.count(old) == 1, old
    Path(folder, "video_colbert.py").write_text(source.replace(old, new))
    shutil.copy(train.__file__, folder)

USE_CACHE = """
import numpy, train
clip = train.load_clips(train.Settings(data="clips.jsonl"))["train"][0]
numpy.save("after", [train.cached_frames(clip, 2, 16, "cache") for _ in range(2)])
train.cached_frames(clip, 3, 16, "cache")
"""

def test_an_edit_of_sample_seconds_takes_other_frames_from_the_same_cache(data):
    """Also one that only concerns some clips, such as short ones. Random times are drawn
    once, then cached."""
    clip = train.load_clips(train.Settings(data="clips.jsonl"))["train"][0]
    before = train.cached_frames(clip, 2, 16, "cache")
    edit = "(np.arange(num_frames) + np.random.rand()) * (0.1 if end - start < 3 else 1)"
    edited(data, "(np.arange(num_frames) + 0.5)", edit)
    subprocess.run([sys.executable, "-c", USE_CACHE], check=True)
    first, second = np.load("after.npy")
    # One of the old frames, one of two new ones, and one of three.
    assert np.array_equal(first, second) and len(os.listdir("cache")) == 3
    assert not np.array_equal(first, before)

# An edit that is saved while `import video_colbert` is at its slow imports.
EDIT_WHILE_IMPORTING = """
import importlib, pathlib, sys
class Editor:
    def find_spec(self, name, *_):
        if name == "av":
            pathlib.Path("video_colbert.py").write_text(pathlib.Path("new.py").read_text())
sys.meta_path.insert(0, Editor())
import numpy, train, video_colbert
clip = train.load_clips(train.Settings(data="clips.jsonl"))["train"][0]
numpy.save("before", train.cached_frames(clip, 2, 16, "cache"))
importlib.reload(video_colbert)  # as a notebook does
numpy.save("after", train.cached_frames(clip, 2, 16, "cache"))
"""

def test_frames_are_cached_under_the_code_that_took_them(data):
    """Not under what is on the disk when another edit has been saved meanwhile; and a module
    that is loaded again takes other frames."""
    clip = train.load_clips(train.Settings(data="clips.jsonl"))["train"][0]
    edit = "return frames_at(path, timing, wanted, size)"
    edited(data, edit, f"{edit}.flip(0)")
    shutil.move("video_colbert.py", "new.py")
    edited(data, "# ---- Losses", "# ---- Losses!")
    subprocess.run([sys.executable, "-c", EDIT_WHILE_IMPORTING], check=True)
    assert Path("video_colbert.py").read_text() == Path("new.py").read_text()
    before, after = np.load("before.npy"), np.load("after.npy")
    assert np.array_equal(before, after[::-1]) and len(os.listdir("cache")) == 2
    # The unedited code finds its frames in the cache, and they are right.
    assert np.array_equal(train.cached_frames(clip, 2, 16, "cache"), before)
    assert np.array_equal(video_colbert.sample_frames(clip.path, 2, 16), before)
    assert len(os.listdir("cache")) == 2
    edited(data, edit, f"{edit}.flip(0)")
    subprocess.run([sys.executable, "-c", USE_CACHE], check=True)
    assert np.array_equal(np.load("after.npy")[0], after) and len(os.listdir("cache")) == 3

@pytest.mark.parametrize("edit, is_other", [
    ("BICUBIC", True), ("(np.arange(num_frames) + 0.5)", True), ("exact_formats = (", True),
    ("def sample_frames(", True), ("def upright_pixels(", True),
    ("return loss.sum() / len(sim)", False), ("def ranks(", False)])
def test_an_edit_of_the_section_on_frames_is_another_version(monkeypatch, edit, is_other):
    before, source = train.frames_version(), video_colbert.SOURCE
    assert source.count(edit) == 1
    monkeypatch.setattr(video_colbert, "SOURCE", source.replace(edit, "x"))
    assert (train.frames_version() != before) == is_other

@pytest.mark.parametrize("shares, is_refused", [
    ((1, 0.5, 0), True), ((0, 0.9, 0.5), True), ((0, 0.5, 0.5), False)])
def test_frames_in_another_order_than_time_are_refused(data, monkeypatch, shares, is_refused):
    def edit(num_frames, start, end):
        return start + np.array(shares) * (end - start)
    monkeypatch.setattr(video_colbert, "sample_seconds", edit)
    refused = contextlib.nullcontext()
    if is_refused:
        refused = pytest.raises(AssertionError, match="sample_seconds must be ascending")
    with refused:
        assert len(video_colbert.sample_frames(data / "0/clip.mp4", 3, 16)) == 3

class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)

def test_a_checkpoint_and_a_weights_file_execute_nothing(tmp_path, monkeypatch):
    """Even if no byte is damaged."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("checkpoints")
    torch.save({"step": 1, "model": Evil()}, "checkpoints/step-00000001.pt")
    with pytest.raises(InputError, match="all checkpoints in .* are damaged"):
        train.load_checkpoint(tmp_path)
    torch.save({"a": Evil()}, "weights.pt")
    with pytest.raises(InputError, match="cannot load 'weights.pt'"), torch.device("meta"):
        VideoColBERT(Config(pretrained="weights.pt"))
    assert not Path("executed").exists()

def fail_fsync(monkeypatch, call):
    """The disk is full when a file is written for the call-th time."""
    calls, fsync = itertools.count(1), os.fsync
    def full(descriptor):
        if next(calls) >= call:
            raise OSError(28, "No space left on device")
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", full)

def test_a_full_disk_at_a_checkpoint_is_one_line_and_leaves_the_one_before(
        data, whole, monkeypatch):
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", "1"]
    with monkeypatch.context() as patch:
        fail_fsync(patch, 6 + 1 + 3)  # the cache has six clips; settings, steps 0 to 2
        with pytest.raises(InputError) as error:
            train.main([*flags, "--out", "a"])
    assert str(error.value) == "a/checkpoints/step-00000002.pt: No space left on device"
    assert max(os.listdir("a/checkpoints")) == "step-00000001.pt"
    train.main(["--resume", "a"])
    assert contents("a") == whole

def test_a_disk_that_is_full_when_a_run_begins_leaves_no_half_written_settings(data, monkeypatch):
    flags = [*SMALL, "--data", "clips.jsonl", "--epochs", "0"]
    fail_fsync(monkeypatch, 2 + 1)  # the cache has two test clips
    with pytest.raises(InputError, match="runs/clips/settings.json: No space left on"):
        train.main(flags)
    assert os.listdir("runs/clips") == ["lock"]

def test_the_record_of_a_run_tells_its_data_apart(data):
    """The same when frames come from the cache, another after a video was replaced."""
    flags, ids = [*SMALL, "--data", "clips.jsonl", "--epochs", "0"], []
    for out in "abc":
        if out == "c":
            write_clip(data / "5/clip.mp4", 30)
        train.main([*flags, "--out", out])
        ids.append(records(out)[-1]["data"])
    assert ids[0] == ids[1] != ids[2]

def test_evaluation_does_not_depend_on_the_order_of_the_gallery(monkeypatch):
    """Bit by bit, although other clips then share a batch."""
    s = train.parse_settings(SMALL)
    torch.manual_seed(0)
    model, frames = VideoColBERT(s), torch.randint(0, 256, (64, 3, 3, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(train, "load_frames", lambda part, s, size: torch.stack(
        [frames[int(clip.path)] for clip in part]))
    clips = [train.Clip(str(i), [f"caption {i}"]) for i in range(64)]
    order = torch.randperm(64)
    F, V, _ = train.evaluate(model, clips, s, model.device)
    F2, V2, _ = train.evaluate(model, [clips[i] for i in order], s, model.device)
    for sim, permuted in ((F, F2), (V, V2)):
        assert torch.equal(sim[order][:, order], permuted)

def test_the_newest_checkpoint_is_never_deleted(data, whole, monkeypatch):
    """Although the clock moves back, and damaged ones with higher numbers lie beside it."""
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", "1"]
    run_until(monkeypatch, [*flags, "--out", "a"], "training_step", 2)
    folder = data / "a/checkpoints"
    assert sorted(os.listdir(folder)) == ["step-00000001.pt", "step-00000002.pt"]
    (folder / "step-00000002.pt").write_bytes(b"damaged")
    (folder / "step-00000003.pt").write_bytes(b"damaged")
    (folder / "step-00000009.pt").write_bytes(b"damaged")
    save, steps = train.save_checkpoint, []

    def saves(out, step, *args):
        # What was there is from the future.
        for path in folder.iterdir():
            os.utime(path, (2e9 - step, 2e9 - step))
        save(out, step, *args)
        found = train.load_checkpoint(out)
        steps.append(step)
        assert found["step"] == step
        # The one before it is as good.
        if step > 2:
            before = torch.load(folder / f"step-{step - 1:08d}.pt", weights_only=True)
            assert before["step"] == step - 1

    monkeypatch.setattr(train, "save_checkpoint", saves)
    train.main(["--resume", "a"])
    assert steps == [2, 3, 4] and contents("a") == whole

def test_a_cache_that_cannot_be_written_is_named_and_no_clip_is_blamed(data, capsys):
    (data / "file").touch()
    flags = [*SMALL, "--data", "clips.jsonl", "--allow-missing"]
    with pytest.raises(InputError, match="file/.*: (File exists|Not a directory)"):
        train.main([*flags, "--cache", str(data / "file")])
    assert capsys.readouterr().out == ""

def test_the_cache_decodes_a_clip_once_until_its_video_changes(tmp_path, monkeypatch):
    """Neither chmod nor `cp -a` changes a video; other content does, even of the same size
    and time. A file of the cache that was cut is written again."""
    path, cache = write_clip(tmp_path / "a.mp4"), tmp_path / "cache"
    sample = Mock(side_effect=sample_frames)
    monkeypatch.setattr(video_colbert, "sample_frames", sample)
    def frames(start=0.0):
        return train.cached_frames(train.Clip(str(path), ["a"], start), 4, 16, cache)
    first = frames()
    (file,) = cache.iterdir()
    assert torch.equal(first, sample_frames(path, 4, 16)) and torch.equal(frames(), first)

    path.chmod(0o600)
    subprocess.run(["cp", "-a", path, tmp_path / "copy"], check=True)
    os.replace(tmp_path / "copy", path)
    assert torch.equal(frames(), first) and sample.call_count == 1
    assert not torch.equal(frames(1.0), first) and sample.call_count == 2

    good = file.read_bytes()
    for bad in (good[:-1], good[:100], b"", good + b"more"):
        file.write_bytes(bad)
        assert torch.equal(frames(), first) and file.read_bytes() == good
    assert sample.call_count == 6

    status, content = path.stat(), write_clip(tmp_path / "b.mp4", 10).read_bytes()
    path.write_bytes(content.ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(frames(), sample_frames(tmp_path / "b.mp4", 4, 16))

def test_replaced_training_pixels_are_another_run(data, monkeypatch):
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", "1"]
    run_until(monkeypatch, [*flags, "--out", "a"], "training_step", 2)
    write_clip(data / "0/clip.mp4", 30)
    with pytest.raises(InputError, match="a was started with other clips or captions"):
        train.main(["--resume", "a"])

def test_a_folder_with_something_in_it_is_not_written_to(data):
    """Neither by --out nor as the default; in each case before anything slow."""
    os.makedirs("runs/clips/mine")
    for flags in ([], ["--out", "runs/clips"]):
        with pytest.raises(InputError) as error:
            train.main([*SMALL, "--data", "clips.jsonl", *flags])
        assert str(error.value) == ("runs/clips exists: give a new --out "
                                    "(--resume runs/clips continues a run)")
    assert os.listdir("runs/clips") == ["mine"] and not os.path.exists("data")

@pytest.mark.parametrize("splits, message", [("train train", "has no test clips"),
                                             ("test test", "has no train clips")])
def test_a_missing_split_is_named_before_anything_slow(tmp_path, monkeypatch, splits, message):
    monkeypatch.chdir(tmp_path)
    write_json_lines(tmp_path, splits)
    monkeypatch.setattr(train, "VideoColBERT", None)
    with pytest.raises(InputError, match=message):
        train.main([*SMALL, "--data", "clips.jsonl"])

def test_memory_stays_flat_over_a_run(data):
    """The second half of 100 steps adds less than 20 MB."""
    flags = ["--data", "clips.jsonl", "--epochs", "50", "--checkpoint-every", "1000"]
    process = start(train_and_measure, *SMALL, *flags)
    code, lines = ends(process, 120)
    assert code == 0 and int(lines[-1]) < 20_000, lines[-5:]  # kB

def train_and_measure(*flags):
    step, peaks = train.training_step, []

    def measured(*args):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return step(*args)

    train.training_step, train.save_checkpoint = measured, lambda *args: None
    train.main(flags)
    print(peaks[99] - peaks[50])

def test_prefetch_keeps_the_order_and_holds_one_result_per_thread():
    started = []
    results = train.prefetch(lambda i: started.append(i) or i * i, range(100), 3)
    assert next(results) == 0 and len(started) <= 4
    assert list(results) == [i * i for i in range(1, 100)]

def test_ctrl_c_while_decoding_is_one_line_and_waits_for_no_thread(data):
    """One clip is decoded and kept; another would take a minute more."""
    process = start(decode_slowly, *SMALL, "--data", "clips.jsonl")
    wait_for(lambda: list(data.glob("data/cache/*")), process)
    os.kill(process.pid, signal.SIGINT)
    code, lines = ends(process, 30)
    assert code == 130 and lines[-1] == "train.py: stopped"
    assert not list(data.glob("runs/*"))

def decode_slowly(*flags):
    sample = video_colbert.sample_frames

    def slow(path, *args):
        time.sleep(60 if path.startswith("1") else 0)
        return sample(path, *args)

    video_colbert.sample_frames = slow
    run_program(*flags)

def test_ctrl_c_while_the_synthetic_clips_are_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = start(run_program)
    wait_for(lambda: len(list(tmp_path.glob("data/shapes/videos/*"))) >= 5, process)
    os.kill(process.pid, signal.SIGINT)
    code, lines = ends(process, 30)
    assert code == 130 and lines[-1] == "train.py: stopped"
    assert not (tmp_path / "data/shapes/clips.jsonl").exists()

def test_ctrl_c_while_evaluating_is_one_line_and_a_resumed_run_evaluates(data):
    flags = [*SMALL, "--data", "clips.jsonl", "--epochs", "0", "--out", "a"]
    process = start(evaluate_slowly, *flags)
    wait_for(lambda: os.path.exists("evaluating"), process)
    os.kill(process.pid, signal.SIGINT)
    code, lines = ends(process, 30)
    assert code == 130 and lines[-1] == "train.py: stopped"
    train.main(["--resume", "a"])
    assert train.read_result("a")["gallery"] == 2

def evaluate_slowly(*flags):
    def slow(*args):
        Path("evaluating").touch()
        # A signal that comes just before a long sleep would not end it.
        for _ in range(600):
            time.sleep(0.1)

    train.evaluate = slow
    run_program(*flags)

STOPPED = r"stopped after (\d+) steps; continue with --resume a$"

def run_without_messages(kind, *flags):
    descriptor = os.open("/dev/full", os.O_WRONLY)
    if kind == "reader left":
        reader, descriptor = os.pipe()
        os.close(reader)
    sys.stderr = open(descriptor, "w", buffering=1)
    run_program(*flags)

@pytest.mark.parametrize("kind", ["reader left", "disk full"])
def test_a_run_whose_messages_cannot_be_written_goes_on_and_saves(data, kind):
    """Ctrl-C also ends the `tee` of `python train.py 2>&1 | tee FILE`."""
    process = start(run_without_messages, kind, *SMALL, "--data", "clips.jsonl", "--epochs",
                    "100000", "--out", "a")
    wait_for(lambda: len(train.read_log("a")) > 5, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    steps = [line["step"] for line in train.read_log("a") if "loss" in line]
    assert train.load_checkpoint("a")["step"] == len(steps) == steps[-1] + 1

def test_ctrl_c_under_torchrun_saves_and_says_how_to_resume(data):
    """What torchrun prints after it is its own."""
    flags = [*SMALL, "--data", "clips.jsonl", "--epochs", "100000", "--out", "a"]
    process = start(torchrun, "--nproc-per-node=2", train.__file__, *flags)
    wait_for(lambda: list(data.glob("a/checkpoints/*[1-9]*.pt")), process)
    os.kill(process.pid, signal.SIGINT)
    code, lines = ends(process, 90)
    assert code != 0
    assert "train.py: stopped" in lines
    last = re.findall(STOPPED, "\n".join(lines), re.MULTILINE)[-1]
    assert train.load_checkpoint("a")["step"] == int(last)

def torchrun(*arguments):
    """What the program of this name does. The processes that it starts import torch again."""
    from torch.distributed.run import main
    main(arguments)

def test_a_signal_to_the_process_saves_a_checkpoint_and_prints_how_to_resume(data):
    process = start(run_program, *SMALL, "--data", "clips.jsonl", "--epochs", "100000",
                    "--out", "a")
    wait_for(lambda: list(data.glob("a/checkpoints/*[1-9]*.pt")), process)
    os.kill(process.pid, signal.SIGTERM)
    code, lines = ends(process)
    assert code == 130 and lines[-1] == "train.py: stopped"
    assert re.search(STOPPED, lines[-2])

def train_and_count(*flags):
    """Train, and write down the collectives of each step, from one training step to the next, and
    the step's seed."""
    torch.set_num_threads(1)
    calls, step, counts, seeds = count_collectives(), train.training_step, [], []

    def counted(*args):
        counts.append(Counter(calls))
        seeds.append(torch.initial_seed())
        return step(*args)

    train.training_step = counted
    train.main(flags)
    between = [dict(b - a) for a, b in zip(counts, counts[1:])]
    Path(f"noted{train.RANK}").write_text(json.dumps([between, seeds]))

def test_two_processes_end_with_the_parameters_of_one(data):
    """The same global batch of 4 clips, with two captions each; the losses, the results and the
    validation are the same too. A step gathers four tensors and adds up gradients once, and
    asks once whether to stop. If a reader adds dropout, each process's share of a step drops other
    values."""
    flags = [*SMALL, "--data", "clips.jsonl", "--captions-per-video", "2"]
    train.main([*flags, "--out", "one"])
    run_two_processes(train_and_count, *flags, "--out", "two")
    one, two = (safetensors.torch.load_file(f"{out}/model.safetensors") for out in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    torch.manual_seed(0)
    first = VideoColBERT(VideoColBERT.load("one").config).state_dict()
    assert max((one[name] - first[name]).abs().max().item() for name in one) > 1e-3
    for line, other in zip(records("one"), records("two"), strict=True):
        if "loss" in line:
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        elif "evaluation" not in line:
            assert line == other
    assert records("two")[-1]["machine"].startswith("2 x cpu")

    all_seeds = []
    for rank in range(2):
        between, seeds = json.loads(Path(f"noted{rank}").read_text())
        assert all(calls == {"all_gather": 4, "all_reduce": 2} for calls in between)
        all_seeds += seeds
    steps = sum("loss" in line for line in records("two"))
    assert len(set(all_seeds)) == 2 * steps > 2

@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_processes_slices_make_up_the_list(world, monkeypatch):
    monkeypatch.setattr(train, "WORLD", world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(train, "RANK", rank)
        parts.append(train.rank_slice(list(range(11))))
    assert sum(parts, []) == list(range(11)) and max(map(len, parts)) - min(map(len, parts)) <= 1

def decode_clips(cache):
    s = train.parse_settings(["--data", "clips.jsonl", "--cache", cache, "--num-frames", "6"])
    for split, found in train.load_clips(s).items():
        train.fill_cache(found, split, s, 64)

def test_a_killed_decoding_continues_and_gives_the_same_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json_lines(tmp_path, " ".join(["train"] * 58 + ["test"] * 2))
    def files(cache):
        found = [file for file in (tmp_path / cache).glob("*") if file.is_file()]
        return {file.name: file.read_bytes() for file in found}
    process = start(decode_clips, "killed")
    wait_for(lambda: len(files("killed")) >= 5, process)
    process.kill()
    process.join()
    before = files("killed")
    decode_clips("whole")
    assert 5 <= len(before) < len(files("whole")) == 60
    decode_clips("killed")
    assert files("killed") == files("whole")

# ---- Micro-batches, precision, memory
class GradientRecorder:
    """In place of the optimiser: keeps the gradients that a step would be made with."""
    def __init__(self, model):
        self.model = model
    def step(self):
        self.gradients = {}
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                self.gradients[name] = p.grad
    def zero_grad(self):
        self.model.zero_grad()

def gradients(micro_batch, k, loss="sigmoid", loss_form="dual", steps=1):
    """Of a training step on 8 videos with k captions each, by the parameter's name. The
    weights stay as they are."""
    s = train.Settings(backbone="tiny", num_frames=3, num_tokens=8, freeze=False, learn_scale=True,
                       logit_scale=2.0, loss=loss, loss_form=loss_form, max_grad_norm=1e9,
                       micro_batch=micro_batch, captions_per_video=k)
    torch.manual_seed(0)
    model, frames = VideoColBERT(s), torch.randint(0, 256, (8, 3, 3, 32, 32), dtype=torch.uint8)
    ids = torch.randint(1, 400, (8, k, 8))
    owner = torch.arange(8).repeat_interleave(k)
    mine = list(train.rank_slice(range(8)))
    my_ids, recorder = ids[mine].flatten(0, 1), GradientRecorder(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(steps):
        train.training_step(model, recorder, scaler, s, my_ids, my_ids < 350, frames[mine],
                            owner[:, None] == torch.arange(8))
    return recorder.gradients

def assert_equal_gradients(got, want):
    """Each parameter's, to 1e-5 of its norm."""
    assert got.keys() == want.keys() and len(want) > 60
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-5 * want[name].norm(), name

@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
@pytest.mark.parametrize("form", ["dual", "combined"])
def test_micro_batches_give_the_gradients_of_the_whole_batch(k, loss, form):
    whole = gradients(0, k, loss, form)
    for micro_batch in (1, 3, 8):
        assert_equal_gradients(gradients(micro_batch, k, loss, form), whole)

def gradients_of_one_process(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    calls, found, counts = count_collectives(), {}, []
    for k, micro_batch in itertools.product((1, 3), (0, 1, 3)):
        calls.clear()
        found[k, micro_batch] = gradients(micro_batch, k)
        counts.append(dict(calls))
    torch.save((found, counts), f"{folder}/{train.RANK}.pt")
    dist.destroy_process_group()

def test_two_processes_have_the_gradients_of_one_with_as_many_messages_for_any_micro_batch(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_two_processes(gradients_of_one_process, str(tmp_path))
    whole = {k: gradients(0, k) for k in (1, 3)}
    for rank in range(2):
        found, counts = torch.load(tmp_path / f"{rank}.pt")
        assert counts == [{"all_gather": 4, "all_reduce": 1}] * 6
        for (k, _), got in found.items():
            assert_equal_gradients(got, whole[k])

def test_no_part_of_a_micro_batched_step_holds_more_than_its_videos(monkeypatch):
    """The encoders see at most N videos and N k captions at a time, in both passes."""
    sizes = {"encode_video": [], "encode_query": []}
    for name in sizes:
        def noted(model, x, *args, name=name, encode=getattr(VideoColBERT, name)):
            sizes[name].append(len(x))
            return encode(model, x, *args)
        monkeypatch.setattr(VideoColBERT, name, noted)
    gradients(3, 3)
    assert sizes == {"encode_video": [3, 3, 2] * 2, "encode_query": [8, 8, 8] * 2}

def test_dropout_that_a_reader_adds_agrees_in_both_passes_of_micro_batches(monkeypatch):
    """The gradients are those of the whole batch with the same masks. Each part and each
    step has masks of its own. The model trains, without which cuDNN's RNNs have no backward."""
    forward, masks = video_colbert.TemporalTransformer.forward, []
    def with_dropout(module, f):
        v = forward(module, f)
        masks.append(torch.nn.functional.dropout(torch.ones_like(v), 0.5, module.training))
        return v * masks[-1]
    monkeypatch.setattr(video_colbert.TemporalTransformer, "forward", with_dropout)
    by_parts = gradients(3, 1, steps=2)
    masks = [torch.cat(masks[i:i + 3]) for i in range(0, 12, 3)]  # of each pass
    assert masks[0].unique().tolist() == [0, 2]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    rows = torch.cat([masks[0], masks[2]])
    assert len(rows.unique(dim=0)) == len(rows)

    def with_the_last_masks(module, f):
        return forward(module, f) * masks[3]
    monkeypatch.setattr(video_colbert.TemporalTransformer, "forward", with_the_last_masks)
    assert_equal_gradients(by_parts, gradients(0, 1))

def test_a_batch_is_a_multiple_of_the_processes(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 3)
    for size in (3, 6):
        assert train.parse_settings(["--batch-size", str(size)]).batch_size == size
    for size in (2, 4):
        with pytest.raises(InputError) as error:
            train.parse_settings(["--batch-size", str(size)])
        assert str(error.value) == "--batch-size must be a multiple of 3 processes"
        train.check_settings(train.Settings(batch_size=size, eval_only="a"))  # has no batches

def test_evaluation_encodes_no_more_videos_at_a_time_than_training(data, monkeypatch):
    sizes, encode_video = [], VideoColBERT.encode_video
    def noted(model, frames):
        sizes.append(len(frames))
        return encode_video(model, frames)
    monkeypatch.setattr(VideoColBERT, "encode_video", noted)
    train.main([*SMALL, "--data", "clips.jsonl", "--epochs", "0", "--micro-batch", "1"])
    assert sizes == [1, 1]                                        # the test clips

def test_out_of_memory_is_one_line_that_names_the_next_micro_batch(data, monkeypatch, capsys):
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", "1", "--out", "a"]
    calls, encode_video = itertools.count(), VideoColBERT.encode_video
    def needs_more_than_there_is(model, frames):
        if model.training and next(calls) > 0 and len(frames) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return encode_video(model, frames)
    monkeypatch.setattr(VideoColBERT, "encode_video", needs_more_than_there_is)
    with pytest.raises(SystemExit, match="2"):
        train.run_main(lambda: train.main(flags), "train.py")
    assert ("train.py: out of memory on cpu: use --resume a --micro-batch 2\n"
            in capsys.readouterr().err)
    assert max(os.listdir("a/checkpoints")) == "step-00000001.pt"
    train.main(["--resume", "a", "--micro-batch", "1"])
    assert len(records("a")) == 4 + 2 + 1

def test_an_error_during_training_is_a_line_of_its_own_below_the_bar(data):
    process = start(train_without_memory, *SMALL, "--data", "clips.jsonl")
    code, lines = ends(process)
    assert code == 2 and lines[-1].startswith("train.py: out of memory on cpu")

def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

def train_without_memory(*flags):
    train.training_step = out_of_memory
    run_program(*flags)

@pytest.mark.parametrize("native, dtype", [(False, torch.float16), (True, torch.bfloat16)])
def test_auto_precision_is_bf16_on_gpus_that_have_it_fp16_on_others(monkeypatch, native, dtype):
    """PyTorch counts emulation as support unless it is told not to: a T4 would get bf16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or native)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no GPU here
        assert train.autocast(torch.device("cuda")).fast_dtype == dtype
    for device in ("cpu", "mps"):
        with train.autocast(torch.device(device)):
            assert not torch.is_autocast_enabled(device)
    with train.autocast(torch.device("cpu"), "bf16"):
        assert torch.is_autocast_enabled("cpu")

class Overflows(torch.autograd.Function):
    """The identity, whose gradient is infinite if it exceeds a limit, as fp16's does."""
    limit = 2500.0
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        return gradient.where(gradient.abs().max() < Overflows.limit, torch.inf)

@pytest.fixture
def overflows(monkeypatch):
    encode_video = VideoColBERT.encode_video
    def encode(model, frames):
        return [Overflows.apply(x) for x in encode_video(model, frames)]
    monkeypatch.setattr(VideoColBERT, "encode_video", encode)

def test_fp16_skips_steps_that_overflow_and_resumes_to_the_same_bytes(
        data, monkeypatch, overflows):
    """Until the scale has been halved seven times no parameter moves; the log says so."""
    flags = [*SMALL, "--data", "clips.jsonl", "--precision", "fp16", "--checkpoint-every", "1",
             "--epochs", "5"]
    train.main([*flags, "--out", "whole"])
    log = [line for line in records("whole") if "loss" in line]
    scales = [65536 / 2 ** i for i in range(7)]
    assert [line.get("loss_scale") for line in log] == scales + [None] * 3
    assert [line["grad_norm"] is None for line in log] == [True] * 7 + [False] * 3
    run_until(monkeypatch, [*flags, "--out", "a"], "training_step", 7)
    state = train.load_checkpoint("a")
    assert state["scaler"]["scale"] == 512 and state["step"] == 7
    torch.manual_seed(0)
    first = VideoColBERT(train.parse_settings(flags)).state_dict()
    assert all(torch.equal(state["model"][name], first[name]) for name in first)
    train.main(["--resume", "a"])
    assert contents("a") == contents("whole")

def test_fp16_clips_and_logs_the_gradient_without_its_scale(data, monkeypatch):
    """With a scale that is small enough not to overflow."""
    small = functools.partial(torch.amp.GradScaler, init_scale=16.0)
    monkeypatch.setattr(torch.amp, "GradScaler", small)
    for precision in ("fp32", "fp16"):
        train.main([*SMALL, "--data", "clips.jsonl", "--epochs", "1", "--precision", precision,
                    "--out", precision])
    norms = [records(out)[0]["grad_norm"] for out in ("fp32", "fp16")]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)

def test_gradients_that_no_scale_of_fp16_explains_are_divergence(data, monkeypatch, overflows):
    monkeypatch.setattr(Overflows, "limit", 0.0)
    flags = ["--data", "clips.jsonl", "--precision", "fp16", "--epochs", "20", "--out", "a"]
    with pytest.raises(FloatingPointError, match=r"gradient norm (nan|inf) in step 16"):
        train.main([*SMALL, *flags])
    assert max(os.listdir("a/checkpoints")) == "step-00000016.pt"

def test_a_run_of_fp16_resumes_where_auto_is_another_precision(data, monkeypatch):
    """Of the two cards, one has no state of a scaler to give or to take."""
    flags, autocast = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", "1"], train.autocast
    for first, second in (("fp16", "fp32"), ("fp32", "fp16")):
        monkeypatch.setattr(train, "autocast", lambda device, _="": autocast(device, first))
        run_until(monkeypatch, [*flags, "--out", first], "training_step", 2)
        monkeypatch.setattr(train, "autocast", lambda device, _="": autocast(device, second))
        train.main(["--resume", first])
        assert records(first)[-1]["gallery"] == 2

@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_similarities_and_losses_stay_in_float32(data, monkeypatch, precision):
    """The encoders compute in half precision, what they return is float32."""
    seen, compute_loss, conv = [], VideoColBERT.compute_loss, torch.nn.Conv2d.forward
    def note_loss(model, *args):
        out = compute_loss(model, *args)
        seen.extend(x.dtype for x in (args[0], args[2], args[3], *out))
        return out
    def note_conv(module, x):
        out = conv(module, x)
        halves.add(out.dtype)
        return out
    halves = set()
    monkeypatch.setattr(VideoColBERT, "compute_loss", note_loss)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", note_conv)
    train.main([*SMALL, "--data", "clips.jsonl", "--epochs", "1", "--precision", precision])
    assert set(seen) == {torch.float32}
    assert halves == {torch.bfloat16 if precision == "bf16" else torch.float16}
