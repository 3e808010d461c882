"""Harder cases for the core: odd files, damaged input, figures, several processes, kills."""
import faulthandler
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import av
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch

import train
import video_colbert
from test_video_colbert import (SMALL, contents, frame_numbers, records, run_until, write_clip,
                                write_json_lines)
from video_colbert import (Config, InputError, VideoColBERT, draw_interactions, mms_fv,
                           reciprocal_rank_fusion, result_rows, retrieval_metrics, sample_frames,
                           video_to_text)

# ---- The model and its figure --------------------------------------------------------------------
def test_frames_are_normalised_as_the_weights_want_and_a_saved_model_remembers(
        monkeypatch, tmp_path, tiny):
    """`laion2b_s32b_b82k` of ViT-L-14 was trained with 0.5 where ViT-L-14 has CLIP's mean."""
    monkeypatch.setattr(open_clip, "CustomTextCLIP", lambda **config: torch.nn.Identity())
    monkeypatch.setattr(open_clip, "download_pretrained", lambda source: "file")
    monkeypatch.setattr(open_clip, "load_checkpoint", lambda model, file: None)
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
    (dict(backbone="ViT-B-32"), "differ in QuickGELU, .*use the name with -quickgelu"),
    (dict(pretrained="laion"), "cannot load 'laion' into ViT-B-32-quickgelu.*a tag: .*openai"),
    (dict(backbone="coca_ViT-B-32"), "'coca_ViT-B-32' is not supported"),
    (dict(backbone="RN101-quickgelu"), "'RN101-quickgelu' is not supported"),
    (dict(backbone="convnext_tiny"), "'convnext_tiny' is not supported"),
    (dict(backbone="tiny", num_tokens=100), "num_tokens must be 3 to 77, not 100"),
    (dict(backbone="tiny", num_frames=0), "num_frames and temporal_layers must be 1 or more"),
    (dict(backbone="tiny", interaction="sum"), "interaction must be mms or mp, not sum"),
    (dict(backbone="tiny", loss="hinge"), "loss must be sigmoid or infonce, not hinge"),
])
def test_a_setting_that_no_model_can_have_is_named_in_one_line(config, message):
    with pytest.raises(InputError, match=message) as error:
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
    model = VideoColBERT(Config(backbone="ViT-B-16-SigLIP", pretrained=None,
                                query_augmentation=False, pad_token=31))
    model.tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=64,
                                                      clean="canonicalize")
    ids, mask = model.tokenize(["A dog!", "dog " * 100])
    assert ids[0].tolist() == [2, 3] + [1] * 62 and mask[0].sum() == 3
    assert ids[1].tolist() == [3] * 63 + [1] and mask[1].all()

@pytest.mark.parametrize("name, content, message", [
    ("config.json", None, "No such file"), ("config.json", b"{", "config.json does not hold"),
    ("config.json", b'{"nonsense": 1}', "nonsense"),
    ("model.safetensors", b"x" * 100, "holds no model"),
    ("config.json", b'{"backbone": "tiny", "num_frames": 9}', "frame_positions")])
def test_a_folder_without_a_model_is_named_in_one_line(tmp_path, tiny, name, content, message):
    tiny.save(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        VideoColBERT.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

@pytest.mark.parametrize("name, codec", [
    ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mpg", "mpeg1video"), ("a.ts", "libx264"),
    ("a.h264", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mov", "mpeg4"), ("a.3gp", "mpeg4")])
def test_sample_frames_reads_the_containers_of_the_datasets(tmp_path, name, codec):
    path = write_clip(tmp_path / name, codec=codec, rate=25)
    assert frame_numbers(path, 5) == [2, 6, 10, 14, 18]

def test_sample_frames_samples_a_variable_frame_rate_in_time(tmp_path):
    """Frame 2 is on screen from 0.2 to 1.2 of 2.0 seconds, so those segments see it."""
    times = [0, 1, 2, 12, 13, 14, 15, 16, 17, 18, 19]
    path = write_clip(tmp_path / "a.mkv", 11, times=times)
    assert frame_numbers(path, 10) == [1, 2, 2, 2, 2, 2, 4, 6, 8, 10]

@pytest.mark.parametrize("matrix, quarter", [
    ((1, 0, 0, 1), (0, 0)), ((0, 1, -1, 0), (0, 1)), ((-1, 0, 0, -1), (1, 1)),
    ((0, -1, 1, 0), (1, 0)), ((-1, 0, 0, 1), (0, 1)), ((1, 0, 0, -1), (1, 0))])
def test_sample_frames_turns_and_mirrors_the_frames_as_the_file_says(tmp_path, matrix, quarter):
    """A white quarter, top left, lands where a player shows it: turned clockwise by 0, 90, 180 and
    270 degrees, mirrored sideways and upside down."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32] = 255
    content = write_clip(tmp_path / "a.mp4", 3, (64, 64), picture=picture).read_bytes()
    at = content.index(b"tkhd") + 4 + 40                             # where a track's matrix is
    a, b, c, d = (x << 16 for x in matrix)
    values = b"".join(x.to_bytes(4, "big", signed=True) for x in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    (tmp_path / "b.mp4").write_bytes(content[:at] + values + content[at + 36:])
    frame = sample_frames(tmp_path / "b.mp4", 1, 64)[0].float().mean(0)
    brightness = frame.view(2, 32, 2, 32).mean((1, 3))
    assert divmod(brightness.argmax().item(), 2) == quarter

# ---- Seeking: the same pixels as decoding from the beginning, and fewer frames decoded -----------
X264, X265 = "keyint=24:bframes=3:scenecut=0", "keyint=24:bframes=4:log-level=none"
FORMATS = {                                            # name: codec, options, seeks exactly
    "closed.mp4": ("libx264", {"x264-params": X264}, True),
    "open.mp4": ("libx264", {"x264-params": X264 + ":open-gop=1"}, True),
    "open.mkv": ("libx264", {"x264-params": X264 + ":open-gop=1"}, True),
    "variable.mkv": ("libx264", {"x264-params": X264}, True),
    "rotated.mp4": ("libx264", {"x264-params": X264}, True),
    "refresh.mp4": ("libx264", {"x264-params": "keyint=24:intra-refresh=1:bframes=0"}, False),
    "closed.ts": ("libx264", {"x264-params": X264}, True),
    "hevc.mp4": ("libx265", {"x265-params": X265 + ":open-gop=1"}, True),
    "hevc.mkv": ("libx265", {"x265-params": X265 + ":open-gop=1"}, True),
    "hevc.ts": ("libx265", {"x265-params": X265 + ":open-gop=0"}, True),
    "vp9.webm": ("libvpx-vp9", {"g": "24", "deadline": "realtime", "cpu-used": "8"}, True),
    "open.flv": ("libx264", {"x264-params": X264 + ":open-gop=1"}, True),
    "mpeg4.avi": ("mpeg4", {"g": "24", "bf": "2"}, False),
    "open.avi": ("libx264", {"x264-params": X264 + ":open-gop=1"}, False),
    "open.asf": ("libx264", {"x264-params": X264 + ":open-gop=1"}, False),
    "mpeg2.asf": ("mpeg2video", {"g": "12", "bf": "2"}, False),
    "mpeg1.mpg": ("mpeg1video", {"g": "24", "bf": "2"}, False),
    "mpeg2.mpg": ("mpeg2video", {"g": "12", "bf": "2"}, False),
    "wmv2.wmv": ("wmv2", {"g": "24"}, False),
    "mpeg2.ts": ("mpeg2video", {"g": "24", "bf": "2"}, True),
    "raw.h264": ("libx264", {"x264-params": X264}, False)}        # no times

def write_moving_clip(path, codec, options, count=240, rate=25):
    """Noise that moves, so that all frames differ and none can be guessed."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    noise = noise.repeat(6, 0).repeat(6, 1)                       # (240, 360, 3)
    waits = np.random.default_rng(1).integers(1, 9, count) if "variable" in path.name else \
        np.ones(count, int)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        (stream.width, stream.height), stream.pix_fmt = (96, 64), "yuv420p"
        for k, pts in enumerate(np.cumsum(waits) - 1):
            part = noise[k % 150:k % 150 + 64, k % 200:k % 200 + 96]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(part), "rgb24")
            frame.pts = int(pts)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if "rotated" in path.name:                                    # by 90 degrees
        content = path.read_bytes()
        at = content.index(b"tkhd") + 4 + 40
        matrix = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
        values = b"".join(x.to_bytes(4, "big", signed=True) for x in matrix)
        path.write_bytes(content[:at] + values + content[at + 36:])

@pytest.mark.parametrize("name", FORMATS)
def test_seeking_gives_the_pixels_of_decoding_from_the_beginning(tmp_path, monkeypatch, name):
    """Bit for bit, for whole videos and parts, in the formats that seek exactly and in others."""
    path, (codec, options, seeks) = tmp_path / name, FORMATS[name]
    write_moving_clip(path, codec, options)
    ticks, last, tick, keys = times = video_colbert.frame_times(path)
    seconds, rng, calls = (last - ticks[0]) * tick, np.random.default_rng(0), []
    frames_at, frames_from = video_colbert.frames_at, video_colbert.frames_from
    def noted(name, function):
        def call(*args):
            calls.append(name)
            return function(*args)
        return call
    for i in range(24):
        start = 0.0 if i % 4 == 0 else rng.uniform(0, 0.95) * seconds
        end = None if i % 3 == 0 else start + rng.uniform(0.05, 1) * seconds
        wanted = video_colbert.sample_times(path, times, [1, 3, 12, 40][i % 4], start, end)
        want = list(frames_at(path, wanted, keys and [], 24))
        monkeypatch.setattr(video_colbert, "frames_at", noted("again", frames_at))
        monkeypatch.setattr(video_colbert, "frames_from", noted("seek", frames_from))
        got = list(frames_at(path, wanted, keys, 24))
        monkeypatch.undo()
        assert len(got) == len(wanted) and all(map(np.array_equal, got, want))
    assert ("seek" in calls and "again" not in calls) == seeks

def test_seeking_decodes_only_from_the_keyframe_before_each_frame_on(tmp_path, monkeypatch):
    """Frame 100 of 240 with a keyframe every 24 costs frames 96 to 101, not 0 to 101, and frames
    100, 105 and 110 cost 96 to 111, not 96 three times."""
    write_moving_clip(tmp_path / "a.mp4", "libx264", FORMATS["closed.mp4"][1])
    frames_from, decoded = video_colbert.frames_from, []
    def noted(*args):
        for pts, frame in frames_from(*args):
            decoded.append(pts)
            yield pts, frame
    monkeypatch.setattr(video_colbert, "frames_from", noted)
    sample_frames(tmp_path / "a.mp4", 1, 16, start=4.01, end=4.02)
    ticks = video_colbert.frame_times(tmp_path / "a.mp4")[0]
    assert decoded == ticks[96:102]
    decoded.clear()
    sample_frames(tmp_path / "a.mp4", 3, 16, start=3.92, end=4.52)  # in the middle of 0.2 seconds
    assert decoded == ticks[96:112]

@pytest.mark.parametrize("content, message", [
    (b"", "Invalid data"), (b"hello", "Invalid data"), (None, "No such file")])
def test_a_file_without_frames_is_named_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.mp4: .*{message}") as error:
        sample_frames(tmp_path / "a.mp4", 4, 16)
    assert "\n" not in str(error.value)

def flipped_ranks(sim, target):
    """Each video's rank by its best caption among the videos' best captions, as a loop."""
    videos, ranks = sorted(set(target.tolist())), []
    for v in videos:
        best = {w: max(sim[a, v].item() for a in range(len(sim)) if target[a] == w) for w in videos}
        ranks.append([sum(x >= best[w] for x in best.values()) for w in videos])
    return torch.tensor(ranks)

@pytest.mark.parametrize("levels", [0, 4])
def test_video_to_text_ranks_a_videos_best_caption_among_the_other_videos_best(levels):
    """Several captions per video, some videos with none, and ties."""
    sim, target = torch.randn(60, 15), torch.randint(0, 13, (60,))
    if levels:
        sim = (sim * 2).round() / levels
    ranks = flipped_ranks(sim, target).diag()
    got = retrieval_metrics(*video_to_text(sim, target))
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
    rows = {(r.pop("direction"), r.pop("score")): r for r in result_rows(F, V, target)}
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

def ink(image, channel):
    """Where a picture, right of its margin, is of one colour: (points, 2)."""
    strip = np.asarray(image)[:, 8:].astype(int)
    others = np.delete(strip, channel, axis=-1).max(-1)
    return np.argwhere(strip[..., channel] > others + 60)

def test_the_figure_puts_each_word_above_and_below_the_frame_it_picks():
    picks = torch.eye(4)[1:2], torch.eye(4)[3:4]
    image = draw_interactions([("", ["dog"], torch.zeros(4, 3, 64, 64, dtype=torch.uint8), *picks)])
    green, red = ink(image, 1), ink(image, 0)
    assert set(green[:, 1] // 96) == {1} and set(red[:, 1] // 96) == {3}
    assert green[:, 0].max() < red[:, 0].min()
    words = ["dog"] * 6                                           # all are drawn, to the last line
    image = draw_interactions([("", words, torch.zeros(4, 3, 64, 64, dtype=torch.uint8),
                                *(sim.repeat(6, 1) for sim in picks))])
    for channel in (1, 0):
        rows = np.unique(ink(image, channel)[:, 0])
        assert 0 < rows.min() and rows.max() < image.height - 2
        assert np.count_nonzero(np.diff(rows) > 2) == 5

def test_the_figure_wraps_its_title_and_shows_at_most_12_frames_those_that_words_picked():
    """Of 64 black frames the two that are picked are white; the last word of the title is drawn."""
    frames = torch.zeros(64, 3, 64, 64, dtype=torch.uint8)
    frames[[20, 50]] = 255
    sims = torch.eye(64)[20:21], torch.eye(64)[50:51]
    short = draw_interactions([("words", ["dog"], frames, *sims)])
    long = draw_interactions([("many words " * 40, ["dog"], frames, *sims)])
    assert long.width == short.width < 1300 and long.height > short.height + 60
    for image in (short, long):
        row = np.asarray(image)[-60 - 25]                         # through the strip of frames
        whites = (row[8:].min(1) > 250).reshape(-1, 96)[:, 10:80].all(1)
        assert whites.sum() == 2

@pytest.mark.parametrize("flags, message", [
    ("--device tpu9", "--device tpu9"), ("--data nonsense", "--data is shapes, msrvtt or a file"),
    ("--loss hinge", "loss must be"), ("--backbone ViT-B-23", "unknown backbone"),
    ("--batch-size 0", "--batch-size cannot be 0"), ("--epochs -1", "--epochs cannot be -1"),
    ("--lr nan", "--lr cannot be nan"), ("--out {}", "--out .* exists already"),
    ("--warmup inf", "--warmup cannot be inf"), ("--pad-token 99999", "pad_token cannot be 99999"),
    ("--weight-decay -1", "--weight-decay cannot be"), ("--seed 99999999999999999999", "--seed"),
    ("--resume x --out y", "--resume takes neither"),
    ("--resume nowhere", "nowhere/settings.json does not hold settings: .*No such file"),
    ("--eval-only nowhere", "nowhere/settings.json")])
def test_a_wrong_flag_is_an_error_before_anything_slow(data, monkeypatch, flags, message):
    monkeypatch.setattr(train, "cached_frames", None)
    argv = SMALL + ["--data", str(data / "clips.jsonl")] + flags.format(data).split()
    with pytest.raises(InputError, match=message) as error:
        train.main(argv)
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("change, message", [
    ({"split": "trian"}, "expected a split"), ({"captions": "a"}, "expected a list of captions"),
    ({"captions": []}, "expected a list of captions"), ({"captions": ["a", " "]}, "not blank"),
    ({"captions": ["\ud800"]}, "not blank"), ({"video": 3}, "expected the path of a video"),
    ({"video": "c\0.mp4"}, "expected the path"), ({"video": "./a.mp4"}, "each clip only once"),
    ({"end": 0}, "0 <= start < end"), ({"start": -1}, "0 <= start"),
    ({"start": math.nan}, "0 <= start"),
    ({"start": "1"}, "0 <= start"), ({"start": 5, "end": 4}, "0 <= start < end"), (5, "a split"),
    (None, "a split"), ([], "a split"), ("{", "Expecting")])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, change, message):
    good = {"video": "a.mp4", "captions": ["a"], "split": "train"}
    bad = {**good, "video": "c.mp4", **change} if isinstance(change, dict) else change
    bad = bad if bad == "{" else json.dumps(bad)
    (tmp_path / "my.jsonl").write_text("\n".join([json.dumps(good), "", bad]))
    with pytest.raises(InputError, match=f"my.jsonl, line 3: .*{message}") as error:
        train.load_json_lines(str(tmp_path / "my.jsonl"))
    assert "\n" not in str(error.value)

CAPTIONS = {f"video{i}": [f"caption {j} of {i}" for j in range(3)] for i in range(6)}

def write_msrvtt(root, layout, videos, train_csv=True):
    """MSR-VTT with test videos 1 and 4, in one of the layouts in which it is found."""
    sentences = [(video, text) for video, texts in CAPTIONS.items() for text in texts]
    files = {"clip4clip": ["MSRVTT_data.json"], "frozen": ["annotation/MSR_VTT.json"], "official": [
        "train_val_videodatainfo.json", "test_videodatainfo.json"]}[layout]
    for k, name in enumerate(files):
        part = sentences[k::len(files)]
        content = {"sentences": [{"caption": text, "video_id": v} for v, text in part]}
        if layout == "frozen":
            content = {"annotations": [{"caption": text, "image_id": v} for v, text in part]}
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    if train_csv:
        (root / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo2\nvideo3\n")
    (root / "MSRVTT_JSFUSION_test.csv").write_text(
        "key,vid_key,video_id,sentence\n"
        'ret0,msr1,video1,"the query, of 1"\nret1,msr4,video4,query 4\n')
    for i in range(6):
        (root / videos).mkdir(parents=True, exist_ok=True)
        (root / videos / f"video{i}.mp4").touch()
    return root

@pytest.mark.parametrize("layout, videos, train_csv", [
    ("clip4clip", "videos/all", True), ("clip4clip", "MSRVTT/videos", False),
    ("official", "MSRVTT_Videos", True), ("frozen", "videos", True)])
def test_msrvtt_is_read_in_every_layout(tmp_path, layout, videos, train_csv):
    """Without the 9k list, all that is not tested is trained on."""
    root = write_msrvtt(tmp_path, layout, videos, train_csv)
    data = train.load_clips(train.Settings(data="msrvtt", root=str(root)))
    names = [0, 2, 3] if train_csv else [0, 2, 3, 5]
    found = {clip.path: sorted(clip.captions) for clip in data["train"]}
    assert found == {f"{root}/{videos}/video{i}.mp4": CAPTIONS[f"video{i}"] for i in names}
    assert data["test"] == [(f"{root}/{videos}/video1.mp4", ["the query, of 1"], 0.0, None),
                            (f"{root}/{videos}/video4.mp4", ["query 4"], 0.0, None)]

def test_a_batch_larger_than_the_data_is_reduced_and_the_setting_stays(data, capsys):
    train.main([*SMALL, "--data", "clips.jsonl", "--out", "a", "--batch-size", "400"])
    assert "--batch-size 400 is reduced to 9, the number of examples" in capsys.readouterr().out
    assert json.loads(open("a/settings.json").read())["batch_size"] == 400
    assert len(records("a")) == 5

def test_missing_clips_stop_a_run_unless_they_are_few_or_allowed(data, capsys):
    """A test clip needs --allow-missing, and the table says so; nothing allows a training clip."""
    flags = [*SMALL, "--data", "clips.jsonl", "--epochs", "0"]
    (data / "3/clip.mp4").write_bytes(b"")
    with pytest.raises(InputError, match="1 of 2 test clips cannot be read, see --allow-missing"):
        train.main(flags)
    assert "3/clip.mp4: Invalid data" in capsys.readouterr().out and not os.path.exists("runs")
    train.main([*flags, "--allow-missing"])
    assert "gallery of 1 clips, 1 test clips missing: not comparable" in capsys.readouterr().out
    (data / "0/clip.mp4").unlink()
    with pytest.raises(InputError, match="1 of 3 train clips cannot be read"):
        train.main([*flags, "--epochs", "1", "--allow-missing"])

def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(data, monkeypatch, capsys):
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", "1"]
    train.main([*flags, "--out", "whole"])
    run_until(monkeypatch, [*flags, "--out", "a"], "training_step", 3)
    first, last = sorted((data / "a/checkpoints").iterdir())      # the last two are kept
    last.write_bytes(last.read_bytes()[:-1])
    train.main(["--resume", "a"])
    assert "step-00000003.pt is damaged; trying the one before it" in capsys.readouterr().out
    assert contents("a") == contents("whole")

def test_other_settings_or_clips_are_another_run(data, monkeypatch):
    """An old run without a setting has its default, one with an unknown setting is named; a run's
    clips and captions must still be those, finished or not."""
    flags = [*SMALL, "--data", "clips.jsonl"]
    run_until(monkeypatch, [*flags, "--out", "a"], "training_step", 3)
    with pytest.raises(InputError, match="a was started with seed 0"):
        train.main(["--resume", "a", "--seed", "3"])
    settings, lines = json.loads(open("a/settings.json").read()), (data / "clips.jsonl").read_text()
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
    (data / "3/clip.mp4").unlink()
    with pytest.raises(InputError, match="a was run on other clips or captions"):
        train.main(["--resume", "a"])

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_stops(data, monkeypatch, number):
    flags, step = [*SMALL, "--data", "clips.jsonl"], train.training_step
    train.main([*flags, "--out", "whole"])
    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", lambda *a: os.kill(os.getpid(), number) or step(*a))
        with pytest.raises(KeyboardInterrupt, match="stopped after step 0; resume with --resume a"):
            train.main([*flags, "--out", "a"])
    assert os.listdir("a/checkpoints") == ["step-00000001.pt"]
    train.main(["--resume", "a"])
    assert contents("a") == contents("whole")

def test_a_signal_during_the_last_validation_stops_the_run(data, monkeypatch):
    """The last checkpoint is there already; no later step reads the signal."""
    flags, evaluate = [*SMALL, "--data", "clips.jsonl"], train.evaluate
    train.main([*flags, "--out", "whole"])
    calls = itertools.count()
    def signalled(*args):
        if next(calls) == 1:                                      # of two epochs
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", signalled)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 3; resume with --resume a"):
            train.main([*flags, "--out", "a"])
    train.main(["--resume", "a"])
    assert contents("a") == contents("whole")

@pytest.mark.parametrize("spoilt", [0, 3])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_a_checkpoint_holds_it(
        data, monkeypatch, spoilt):
    calls, step = itertools.count(), train.training_step
    factor = torch.ones(5).index_fill(0, torch.tensor(spoilt), math.nan)
    def spoils_step_2(*args):
        return step(*args) * (factor if next(calls) == 2 else 1)
    monkeypatch.setattr(train, "training_step", spoils_step_2)
    with pytest.raises(InputError, match="nan.* in step 2; videos: ./clip.mp4.*step-00000002.pt"):
        train.main([*SMALL, "--data", "clips.jsonl", "--out", "a"])
    assert os.listdir("a/checkpoints") == ["step-00000002.pt"]

def test_mean_pooling_of_siglip_is_equation_1():
    """SigLIP pools its last token."""
    model = VideoColBERT(Config(backbone="ViT-B-16-SigLIP", pretrained="none", num_frames=2,
                                interaction="mp"))
    ids, mask = torch.randint(2, 32000, (2, 64)), torch.arange(64).expand(2, -1) == 63
    with torch.no_grad():
        Q, q = model.encode_query(ids, mask), model.clip.encode_text(ids, normalize=True)
        F, V = model.encode_video(torch.zeros(1, 2, 3, 224, 224, dtype=torch.uint8))
        got = model.similarities(Q, mask, F, V)
    for sim, x in zip(got, (F, V[:, :2])):
        mean = torch.nn.functional.normalize(x.mean(1), dim=-1)
        assert (sim - q @ mean.T).abs().max() < 1e-5

# ---- Odd and damaged video files -----------------------------------------------------------------
@pytest.mark.parametrize("size", [(98, 34), (33, 65), (176, 144), (2, 2)])
def test_sample_frames_takes_odd_sizes_without_keeping_the_aspect_ratio(tmp_path, size):
    codec = "libx264" if size[0] % 2 == 0 else "ffv1"
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    picture[:, size[0] // 2:, 0] = 255                            # the right half is red
    path = write_clip(tmp_path / "a.mkv", 4, size, codec, picture=picture)
    halves = sample_frames(path, 2, 32).float().mean(0).unflatten(-1, (2, 16)).mean((1, 3)).T
    if size != (2, 2):                                            # two pixels share one colour
        assert halves[1, 0] > 150 and halves[0, 0] < 60 and halves[1, 1:].max() < 60

def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

@pytest.mark.parametrize("make, message", [
    (write_sound, "no video stream"), (Path.mkdir, "Is a directory"),
    (lambda p: p.symlink_to("nowhere"), "No such file"),
    (lambda p: p.write_bytes(write_clip(p.with_name("b.mp4")).read_bytes()[:300]), "Invalid data")])
def test_what_is_no_video_is_named_in_one_line(tmp_path, make, message):
    make(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=rf"a\.mp4: .*{message}") as error:
        sample_frames(tmp_path / "a.mp4", 4, 16)
    assert "\n" not in str(error.value)

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

def test_300_mutated_videos_give_frames_or_one_clear_error(tmp_path):
    """Never a hang, a crash, another exception or a wrong shape. Both outcomes are frequent, so the
    faults are neither harmless nor fatal."""
    kinds = [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"),
             ("a.webm", "libvpx-vp9"), ("a.ts", "libx264"), ("a.mpg", "mpeg1video")]
    clips = [write_clip(tmp_path / name, 12, codec=codec, rate=25).read_bytes()
             for name, codec in kinds]
    outcomes = []
    faulthandler.dump_traceback_later(120, exit=True)
    for i in range(int(os.environ.get("MUTATIONS", 300))):
        path = tmp_path / f"m{kinds[i % 6][0]}"
        path.write_bytes(mutate(clips[i % 6], np.random.default_rng(i)))
        try:
            frames = sample_frames(path, 4, 16)
            assert frames.shape == (4, 3, 16, 16) and frames.dtype == torch.uint8
            outcomes.append("frames")
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            outcomes.append("error")
    faulthandler.cancel_dump_traceback_later()
    assert min(outcomes.count("frames"), outcomes.count("error")) > 50

def test_a_claimed_size_of_100000_pixels_allocates_nothing(tmp_path):
    path = tmp_path / "a.mkv"
    content = write_clip(path, 3, codec="rawvideo").read_bytes()
    for w, h in ((100_000, 100_000), (20_000, 20_000)):
        size = b"\xb0\x83" + w.to_bytes(3, "big") + b"\xba\x83" + h.to_bytes(3, "big")
        claim = content.replace(b"\xb0\x81\x30\xba\x81\x20", size)
        assert claim != content
        path.write_bytes(claim)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(InputError, match="a.mkv: "):
            sample_frames(path, 4, 16)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000       # kB

# ---- Odd and damaged annotation ------------------------------------------------------------------
def test_video_files_with_odd_names_and_behind_links_are_found(tmp_path):
    root = write_msrvtt(tmp_path / "a", "clip4clip", "videos")
    (root / "videos").rename(tmp_path / "видео 🐕 中文")
    (root / "videos").symlink_to(tmp_path / "видео 🐕 中文")
    (root / "videos/again").symlink_to(root / "videos")           # a circle
    data = train.load_clips(train.Settings(data="msrvtt", root=str(root)))
    assert len(data["train"]) == 3 and all(os.path.exists(clip.path) for clip in data["train"])

@pytest.mark.parametrize("name, content, message", [
    ("MSRVTT_data.json", '{"sentences": [', "MSRVTT_data.json: .*line 1"),
    ("MSRVTT_data.json", "{}", "MSRVTT_data.json: expected a list of sentences or annotations"),
    ("MSRVTT_data.json", '{"sentences": [5]}', "train.9k.csv: expected a list of captions"),
    ("MSRVTT_data.json", '{"sentences": 5}', "MSRVTT_data.json: expected a list"),
    ("MSRVTT_data.json", "[" * 100_000, "MSRVTT_data.json: "),
    ("MSRVTT_data.json", "\x00\xff", "MSRVTT_data.json: "),
    ("MSRVTT_train.9k.csv", "id\nvideo0\n", "train.9k.csv: expected the path of a video"),
    ("MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo0\n", "9k.csv: expected each clip only once"),
    ("MSRVTT_train.9k.csv", "video_id\nvideo77\n", "expected a list of captions.*video77"),
    ("MSRVTT_JSFUSION_test.csv", "video_id,sentence\nvideo1\n",
     "test.csv: expected a list of captions"),
    ("MSRVTT_JSFUSION_test.csv", "video_id,sentence\nvideo1,a\nvideo1,b\n", "each clip only once")])
def test_what_is_wrong_with_msrvtt_is_named_in_one_line(tmp_path, name, content, message):
    root = write_msrvtt(tmp_path, "clip4clip", "videos")
    (root / name).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=message) as error:
        train.load_clips(train.Settings(data="msrvtt", root=str(root)))
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("kind", ["msrvtt", "json lines"])
def test_mutated_annotations_give_valid_clips_or_one_clear_error(tmp_path, kind):
    root, s = write_msrvtt(tmp_path, "clip4clip", "videos"), None
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
            for clips in train.load_clips(s).values():
                assert train.validate_clips([(clip, "") for clip in clips]) == clips
                assert all(text.encode() for clip in clips for text in clip.captions)
            outcomes.append("clips")
        except InputError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), error
            outcomes.append("error")
    assert outcomes.count("error") > 10

# ---- Checkpoints, signals and several processes --------------------------------------------------
@pytest.mark.parametrize("function, call, every", [
    ("training_step", 0, 500), ("training_step", 3, 500), ("evaluate", 1, 1), ("evaluate", 2, 500)])
def test_a_run_killed_anywhere_and_twice_resumes_to_the_same_bytes(
        data, monkeypatch, function, call, every):
    """Also in the validation after an epoch, and in the evaluation at the end."""
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", str(every)]
    train.main([*flags, "--out", "whole"])
    run_until(monkeypatch, [*flags, "--out", "a"], function, call)
    run_until(monkeypatch, ["--resume", "a"], "result_rows", 0)
    train.main(["--resume", "a"])
    assert contents("a") == contents("whole")

class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)

def test_a_checkpoint_and_a_weights_file_execute_nothing(tmp_path, monkeypatch):
    """Even with the right checksum."""
    monkeypatch.chdir(tmp_path)
    content = io.BytesIO()
    torch.save({"step": 1, "model": Evil()}, content)
    checksum = train.hashlib.sha256(content.getvalue()).hexdigest().encode()
    Path("step-00000001.pt").write_bytes(checksum + b"\n" + content.getvalue())
    with pytest.raises(pickle.UnpicklingError):
        train.load_checkpoint(tmp_path)
    torch.save({"a": Evil()}, "weights.pt")
    with pytest.raises(InputError, match="cannot load 'weights.pt'"):
        VideoColBERT(Config(pretrained="weights.pt"))
    assert not Path("executed").exists()

def test_a_full_disk_at_a_checkpoint_is_one_line_and_leaves_the_one_before(data, monkeypatch):
    flags, calls, fsync = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", "1"], [], os.fsync
    train.main([*flags, "--out", "whole"])
    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:                                       # settings, step 1, step 2
            raise OSError(28, "No space left on device")
        fsync(descriptor)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"a/checkpoints/step-00000002.pt: No space left on "
                                             r"device; last good checkpoint: .*step-00000001.pt"):
            train.main([*flags, "--out", "a"])
    assert os.listdir("a/checkpoints") == ["step-00000001.pt"]
    train.main(["--resume", "a"])
    assert contents("a") == contents("whole")

def test_a_disk_that_is_full_when_a_run_begins_leaves_no_half_written_settings(data, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")
    train.fill_cache(train.load_clips(train.Settings(data="clips.jsonl")),
                     train.parse_settings([*SMALL, "--data", "clips.jsonl"]), 64)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="runs/clips/settings.json: No space left on"):
        train.main([*SMALL, "--data", "clips.jsonl"])
    assert os.listdir("runs/clips") == []

def test_the_record_of_a_run_tells_its_pixels_apart(data):
    """The same from the decoder and from the cache, another after a video was replaced."""
    flags, pixels = [*SMALL, "--data", "clips.jsonl", "--epochs", "0"], []
    for out in "abc":
        if out == "c":
            write_clip(data / "5/clip.mp4", 30)
        train.main([*flags, "--out", out])
        pixels.append(records(out)[-1]["pixels"])
    assert pixels[0] == pixels[1] != pixels[2]

def test_evaluation_does_not_depend_on_the_order_of_the_gallery(data):
    """Bit by bit, although other clips then share a batch."""
    s = train.parse_settings([*SMALL, "--data", "clips.jsonl"])
    torch.manual_seed(0)
    model, clips = VideoColBERT(s), []
    for i in range(64):
        path = write_clip(data / f"gallery/{i}.mp4", 1 + i % 40)
        clips.append(train.Clip(str(path), [f"caption {i}"]))
    order = torch.randperm(64)
    F, V, _ = train.evaluate(model, clips, s, model.device)
    F2, V2, _ = train.evaluate(model, [clips[i] for i in order], s, model.device)
    for sim, permuted in ((F, F2), (V, V2)):
        assert torch.equal(sim[order][:, order], permuted)

def test_after_damage_the_newest_checkpoints_are_kept(data, monkeypatch):
    """Not those with the highest step, which may be the damaged ones."""
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", "1"]
    run_until(monkeypatch, [*flags, "--out", "a"], "training_step", 3)
    for path in data.glob("a/checkpoints/*.pt"):
        path.write_bytes(b"damaged")
        os.utime(path, (0, 0))
    run_until(monkeypatch, ["--resume", "a"], "training_step", 2)
    assert sorted(os.listdir("a/checkpoints")) == ["step-00000001.pt", "step-00000002.pt"]

def test_a_cache_that_cannot_be_written_is_named_and_no_clip_is_blamed(data, capsys):
    (data / "file").touch()
    flags = [*SMALL, "--data", "clips.jsonl", "--allow-missing"]
    with pytest.raises(InputError, match="file/.*: (File exists|Not a directory)"):
        train.main([*flags, "--cache", str(data / "file")])
    assert capsys.readouterr().out == ""

def test_a_cut_cache_file_is_written_again(data):
    flags = [*SMALL, "--data", "clips.jsonl", "--epochs", "0"]
    train.main([*flags, "--out", "a"])
    for path in data.glob("data/cache/*"):
        os.truncate(path, 100)
    train.main([*flags, "--out", "b"])
    assert records("a")[-1]["evaluation"] == records("b")[-1]["evaluation"]

def test_replaced_training_pixels_are_another_run(data, monkeypatch):
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", "1"]
    run_until(monkeypatch, [*flags, "--out", "a"], "training_step", 2)
    write_clip(data / "0/clip.mp4", 30)
    with pytest.raises(InputError, match="a was started with other clips or captions"):
        train.main(["--resume", "a"])

def test_two_runs_that_begin_at_once_get_folders_of_their_own(data):
    folders = [train.new_folder(train.Settings()) for _ in range(3)]
    assert folders == [Path("runs/shapes"), Path("runs/shapes-2"), Path("runs/shapes-3")]

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
    code = ("import resource, train; step, peaks = train.training_step, []\n"
            "def counted(*args):\n"
            "    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
            "    return step(*args)\n"
            "train.training_step = counted\n"
            f"train.main({[*SMALL, '--data', 'clips.jsonl', '--epochs', '50']})\n"
            "print(peaks[99] - peaks[50])")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(train.__file__)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 20_000                  # kB

def test_ctrl_c_while_decoding_is_one_line_and_waits_for_no_thread(data):
    """One clip is decoded and kept; another would take a minute more."""
    code = ("import sys, time, train; sample = train.sample_frames\n"
            "def slow(path, *args):\n"
            "    time.sleep(60 if path.startswith('1') else 0)\n"
            "    return sample(path, *args)\n"
            "train.sample_frames, sys.argv[1:] = slow, "
            f"{[*SMALL, '--data', 'clips.jsonl']}\n"
            "train.run_main(train.main, 'train.py')")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(train.__file__)}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True,
                               env=environment)
    while not list(data.glob("data/cache/*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    last = process.communicate(timeout=30)[1].splitlines()[-1]
    assert process.returncode == 130 and "train.py: stopped" in last
    assert not list(data.glob("runs/*"))

def test_ctrl_c_while_the_synthetic_clips_are_written_is_one_line(tmp_path):
    process = subprocess.Popen([sys.executable, train.__file__], stderr=subprocess.PIPE, text=True,
                               cwd=tmp_path)
    while len(list(tmp_path.glob("data/shapes/videos/*"))) < 5:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    last = process.communicate(timeout=30)[1].splitlines()[-1]
    assert process.returncode == 130 and "train.py: stopped: run again" in last
    assert not (tmp_path / "data/shapes/clips.jsonl").exists()

def test_ctrl_c_while_evaluating_is_one_line(data):
    code = ("import sys, time, train; train.evaluate = lambda *args: time.sleep(60)\n"
            f"sys.argv[1:] = {[*SMALL, '--data', 'clips.jsonl', '--epochs', '0']}\n"
            "train.run_main(train.main, 'train.py')")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(train.__file__)}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True,
                               env=environment)
    while not os.path.exists("runs/clips/settings.json"):
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    last = process.communicate(timeout=30)[1].splitlines()[-1]
    assert process.returncode == 130 and "train.py: stopped: " in last and "--resume" in last

def test_ctrl_c_under_torchrun_saves_and_our_last_line_says_how_to_resume(data):
    """What torchrun prints after it is its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", train.__file__]
    flags = [*SMALL, "--data", "clips.jsonl", "--epochs", "100000", "--out", "a"]
    process = subprocess.Popen([*torchrun, *flags], stderr=subprocess.PIPE, text=True)
    while not list(data.glob("a/checkpoints/*.pt")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    lines = process.communicate(timeout=90)[1].splitlines()
    ours = [line for line in lines if "train.py: " in line]
    assert process.returncode != 0
    assert re.search(r"train.py: stopped after step \d+; resume with --resume a$", ours[-1])

def test_a_signal_to_the_process_saves_a_checkpoint_and_prints_one_line(data):
    process = subprocess.Popen(
        [sys.executable, train.__file__, *SMALL, "--data", "clips.jsonl", "--epochs", "100000",
         "--out", "a"], stderr=subprocess.PIPE, text=True)
    while not list(data.glob("a/checkpoints/*.pt")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    last = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 130
    assert re.search(r"train.py: stopped after step \d+; resume with --resume a", last)

def run_two_processes(*flags, program=train.__file__):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", program]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(train.__file__)}
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr

def test_two_processes_end_with_the_parameters_of_one(data):
    """The same global batch of 5 clips, which two processes cannot halve, with two captions of some
    clips and one of others; the losses, the results and the validation are the same too."""
    flags = [*SMALL, "--data", "clips.jsonl", "--captions-per-video", "2", "--batch-size", "5"]
    train.main([*flags, "--out", "one"])
    run_two_processes(*flags, "--out", "two")
    one, two = (safetensors.torch.load_file(f"{out}/model.safetensors") for out in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    torch.manual_seed(0)
    start = VideoColBERT(VideoColBERT.load("one").config).state_dict()
    assert max((one[name] - start[name]).abs().max().item() for name in one) > 1e-3
    for line, other in zip(records("one"), records("two"), strict=True):
        if "loss" in line:
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        elif "evaluation" not in line:
            assert line == other

@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_processes_slices_make_up_the_list(world, monkeypatch):
    monkeypatch.setattr(train, "WORLD", world)
    parts = [train.rank_slice(list(range(11)), rank) for rank in range(world)]
    assert sum(parts, []) == list(range(11)) and max(map(len, parts)) - min(map(len, parts)) <= 1

def test_a_killed_decoding_continues_and_gives_the_same_cache(tmp_path):
    write_json_lines(tmp_path, " ".join(["train"] * 58 + ["test"] * 2))
    def start(cache):
        code = ("import train; s = train.parse_settings(['--data', 'clips.jsonl', '--cache', "
                f"'{cache}', '--num-frames', '6']); train.fill_cache(train.load_clips(s), s, 64)")
        environment = {**os.environ, "PYTHONPATH": os.path.dirname(train.__file__)}
        return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL,
                                cwd=tmp_path, env=environment)
    def files(cache):
        return {file.name: file.read_bytes() for file in (tmp_path / cache).glob("*")
                if not file.name.endswith(".part")}
    process = start("killed")
    while len(files("killed")) < 5:
        time.sleep(0.001)
    process.kill()
    process.wait()
    before = files("killed")
    assert start("whole").wait() == 0 and 5 <= len(before) < len(files("whole")) == 60
    assert start("killed").wait() == 0 and files("killed") == files("whole")

# ---- Micro-batches, precision, memory ------------------------------------------------------------
class GradientRecorder:
    """In place of the optimiser: keeps the gradients that a step would be made with."""
    def __init__(self, model):
        self.model = model
    def step(self):
        self.gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
    def zero_grad(self):
        self.model.zero_grad()

def gradients(micro_batch, k, loss="sigmoid", loss_form="dual"):
    """Of a training step on 8 videos with 1 to k captions each, by the parameter's name."""
    s = train.Settings(backbone="tiny", num_frames=3, num_tokens=8, freeze=False, learn_scale=True,
                       logit_scale=2.0, loss=loss, loss_form=loss_form, max_grad_norm=1e9,
                       micro_batch=micro_batch, captions_per_video=k)
    torch.manual_seed(0)
    model, frames = VideoColBERT(s), torch.randint(0, 256, (8, 3, 3, 64, 64), dtype=torch.uint8)
    ids = [torch.randint(1, 400, (1 + i % k, 8)) for i in range(8)]
    owner = torch.arange(8).repeat_interleave(torch.tensor([len(x) for x in ids]))
    mine = train.rank_slice(range(8), train.RANK)
    my_ids, recorder = torch.cat([ids[i] for i in mine]), GradientRecorder(model)
    train.training_step(model, recorder, torch.amp.GradScaler("cpu", enabled=False), s, my_ids,
                        my_ids < 350, frames[list(mine)], owner[:, None] == torch.arange(8))
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

@pytest.mark.parametrize("k", [1, 3])
def test_micro_batches_in_two_processes_give_the_gradients_of_the_whole_batch(tmp_path, k):
    (tmp_path / "run.py").write_text(
        "import torch, train\n"
        "from extras.test_core import gradients\n"
        "torch.distributed.init_process_group('gloo')\n"
        f"found = [gradients(n, {k}) for n in (0, 1, 3)]\n"
        f"torch.save(found, f'{tmp_path}/{{train.RANK}}.pt')\n"
        "torch.distributed.destroy_process_group()\n")
    run_two_processes(program=f"{tmp_path}/run.py")
    whole = gradients(0, k)
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            assert_equal_gradients(found, whole)

def test_no_part_of_a_micro_batched_step_holds_more_than_its_videos(monkeypatch):
    """The encoders see at most N videos and N k captions at a time, in both passes."""
    sizes = {"encode_video": [], "encode_query": []}
    for name in sizes:
        def noted(model, x, *args, name=name, encode=getattr(VideoColBERT, name)):
            sizes[name].append(len(x))
            return encode(model, x, *args)
        monkeypatch.setattr(VideoColBERT, name, noted)
    gradients(3, 3)
    assert sizes == {"encode_video": [3, 3, 2] * 2, "encode_query": [5, 5, 5] * 2}

@pytest.fixture
def dropout(monkeypatch):
    """A temporal transformer with dropout, as a reader may write it."""
    forward = video_colbert.TemporalTransformer.forward
    def with_dropout(module, f):
        return torch.nn.functional.dropout(forward(module, f), 0.5, module.training)
    monkeypatch.setattr(video_colbert.TemporalTransformer, "forward", with_dropout)

def test_micro_batches_switch_dropout_off_for_it_would_differ_between_the_passes(
        dropout, monkeypatch):
    by_parts, with_dropout = gradients(3, 1), gradients(0, 1)
    monkeypatch.undo()
    assert_equal_gradients(by_parts, gradients(0, 1))
    with pytest.raises(AssertionError):
        assert_equal_gradients(with_dropout, by_parts)

def test_a_run_with_dropout_resumes_to_the_same_bytes(data, dropout, monkeypatch):
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", "1"]
    train.main([*flags, "--out", "whole"])
    run_until(monkeypatch, [*flags, "--out", "a"], "training_step", 3)
    torch.manual_seed(99)
    train.main(["--resume", "a"])
    assert contents("a") == contents("whole")

def test_a_batch_has_a_video_for_each_process(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 3)
    assert train.parse_settings(["--batch-size", "3"]).batch_size == 3
    with pytest.raises(InputError, match="--batch-size cannot be 2"):
        train.parse_settings(["--batch-size", "2"])

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
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 24 * 2 ** 30))
    with pytest.raises(SystemExit, match="2"):
        train.run_main(lambda: train.main(flags), "train.py")
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train.py: cpu has 24 GiB, too little for 4 of a batch of 4 videos: use --resume a "
        "--micro-batch 1; last good checkpoint: a/checkpoints/step-00000001.pt")
    train.main(["--resume", "a", "--micro-batch", "1"])
    assert len(records("a")) == 4 + 2 + 1

@pytest.mark.parametrize("native, dtype", [(False, torch.float16), (True, torch.bfloat16)])
def test_auto_precision_is_bf16_on_gpus_that_have_it_fp16_on_others(monkeypatch, native, dtype):
    """PyTorch counts emulation as support unless it is told not to: a T4 would get bf16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or native)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                           # there is no GPU here
        assert train.autocast(torch.device("cuda")).fast_dtype == dtype
    for device in ("cpu", "mps"):
        with train.autocast(torch.device(device)):
            assert not torch.is_autocast_enabled(device)
    with train.autocast(torch.device("cpu"), "bf16"):
        assert torch.is_autocast_enabled("cpu")

class Overflows(torch.autograd.Function):
    """The identity, whose gradient is infinite if it exceeds a limit, as fp16's does."""
    limit = 8000.0
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

def test_fp16_skips_steps_that_overflow_and_resumes_to_the_same_bytes(data, monkeypatch, overflows):
    """Until the scale has been halved five times no parameter moves; the log counts these steps."""
    flags = [*SMALL, "--data", "clips.jsonl", "--precision", "fp16", "--checkpoint-every", "1",
             "--epochs", "4"]
    train.main([*flags, "--out", "whole"])
    log = [line for line in records("whole") if "loss" in line]
    assert [line.get("skipped") for line in log] == [1, 2, 3, 4, 5, None, None, None]
    assert [line["loss_scale"] for line in log[:5]] == [65536 / 2 ** i for i in range(5)]
    assert [line["grad_norm"] is None for line in log] == [True] * 5 + [False] * 3
    run_until(monkeypatch, [*flags, "--out", "a"], "training_step", 5)
    state = train.load_checkpoint(Path("a/checkpoints"))
    assert state["scaler"]["scale"] == 2048 and state["skipped"] == [0, 1, 2, 3, 4]
    torch.manual_seed(0)
    start = VideoColBERT(train.parse_settings(flags)).state_dict()
    assert all(torch.equal(state["model"][name], start[name]) for name in start)
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
    with pytest.raises(InputError, match=r"gradient norm (nan|inf) in step 16; .*step-00000016.pt"):
        train.main([*SMALL, "--data", "clips.jsonl", "--precision", "fp16", "--epochs", "20"])

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
    seen, loss, conv = [], VideoColBERT.loss, torch.nn.Conv2d.forward
    def note_loss(model, *args):
        out = loss(model, *args)
        seen.extend(x.dtype for x in (args[0], args[2], args[3], *out))
        return out
    def note_conv(module, x):
        out = conv(module, x)
        halves.add(out.dtype)
        return out
    halves = set()
    monkeypatch.setattr(VideoColBERT, "loss", note_loss)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", note_conv)
    train.main([*SMALL, "--data", "clips.jsonl", "--epochs", "1", "--precision", precision])
    assert set(seen) == {torch.float32}
    assert halves == {torch.bfloat16 if precision == "bf16" else torch.float16}
