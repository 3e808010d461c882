"""What an hour of hard use found (and must not find again): lost work and unclear errors."""
import dataclasses
import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import train
import video_colbert
from extras import figures, search
from test_video_colbert import (SMALL, contents, pixels, records, run_until, write_clip,
                                write_json_lines)
from video_colbert import InputError, VideoColBERT, VideoError, sample_frames

FLAGS = [*SMALL, "--data", "clips.jsonl"]

def clips_of(path):
    return train.load_clips(train.Settings(data=str(path)))

def write_lines(path, *records):
    path.write_text("\n".join(map(json.dumps, records)))

def test_a_path_with_dots_through_a_linked_folder_is_the_file_that_the_system_opens(tmp_path):
    write_clip(tmp_path / "real/clip.mp4", 5)
    write_clip(tmp_path / "clip.mp4", 9)
    (tmp_path / "real/lists").mkdir()
    (tmp_path / "link").symlink_to("real/lists")
    lines = tmp_path / "link/clips.jsonl"
    write_lines(lines, {"video": "../clip.mp4", "captions": ["a"], "split": "test"})
    path = clips_of(lines)["test"][0].path
    assert os.path.samefile(path, tmp_path / "real/clip.mp4")
    assert not os.path.samefile(path, tmp_path / "clip.mp4")

@pytest.mark.parametrize("one, two", [
    ({"start": 0}, {}), ({"start": 3}, {"start": 3.0}), ({"end": 5}, {"end": 5.0}),
    ({}, {"video": "./a.mp4"}), ({}, {"video": "absolute"}), ({}, {"video": "link.mp4"})])
def test_one_clip_is_one_clip_however_it_is_written(tmp_path, one, two):
    write_clip(tmp_path / "a.mp4", 3)
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    clip = {"video": "a.mp4", "captions": ["a"], "split": "test"}
    second = {**clip, **two}
    if second["video"] == "absolute":
        second["video"] = str(tmp_path / "a.mp4")
    write_lines(tmp_path / "clips.jsonl", {**clip, **one}, second)
    with pytest.raises(InputError, match="line 2: expected each clip only once"):
        clips_of(tmp_path / "clips.jsonl")

def test_parts_of_a_video_are_clips_of_their_own(tmp_path):
    clip = {"video": "a.mp4", "captions": ["a"], "split": "test"}
    write_lines(tmp_path / "clips.jsonl", clip, {**clip, "start": 1}, {**clip, "end": 2},
                {**clip, "split": "train"})
    assert len(clips_of(tmp_path / "clips.jsonl")["test"]) == 3

def test_a_second_process_on_a_run_says_that_another_is_at_work(data, monkeypatch):
    """And disturbs it in nothing; after the first has been killed the run is free again."""
    train.main([*FLAGS, "--out", "whole"])
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "training_step", 2)
    code = (f"import sys; sys.path.insert(0, {os.path.dirname(train.__file__)!r})\n"
            "import filelock, time; lock = filelock.FileLock('a/lock'); lock.acquire()\n"
            "print('locked', flush=True); time.sleep(600)")
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    before = Path("a/log.jsonl").read_bytes()
    with pytest.raises(InputError, match="another process is at work on a, and has locked a/lock; "
                                         "try later"):
        train.main(["--resume", "a"])
    assert Path("a/log.jsonl").read_bytes() == before
    other.kill()
    other.wait()
    train.main(["--resume", "a"])
    assert contents("a") == contents("whole") and not Path("a/lock").exists()

def test_a_video_that_is_replaced_during_the_run_stops_it(data):
    evaluate = train.evaluate
    def replaces(*args):
        write_clip(data / "0/clip.mp4", 29)
        return evaluate(*args)
    old = (data / "0/clip.mp4").read_bytes()
    train.main([*FLAGS, "--out", "whole"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", replaces)
        with pytest.raises(InputError, match="0/clip.mp4 has changed during the run.*--resume a"):
            train.main([*FLAGS, "--out", "a"])
    assert not train.read_result("a")
    # The training is not lost: the model is there, and gets its results with the old file.
    model, whole = (VideoColBERT.load(folder).state_dict() for folder in ("a", "whole"))
    assert all(torch.equal(model[name], whole[name]) for name in whole)
    (data / "0/clip.mp4").write_bytes(old)
    train.main(["--resume", "a"])
    assert train.read_result("a") == train.read_result("whole")

def test_a_model_that_cannot_be_saved_leaves_the_one_that_is_there(tmp_path, monkeypatch, tiny):
    tiny.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = VideoColBERT(dataclasses.replace(tiny.config, loss="infonce"))
    files = ["config.json", "model.safetensors"]
    def full_disk(number):
        if files.pop(0) == "model.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        other.save(tmp_path)
    assert all(path.read_bytes() == before[path] for path in before)

def test_a_log_that_cannot_be_read_is_not_taken_for_a_damaged_one(data, monkeypatch):
    train.main([*FLAGS, "--out", "a"])
    def no_permission(path, *args, **options):
        if str(path).endswith("log.jsonl"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, *args, **options)
    monkeypatch.setattr(train, "open", no_permission, raising=False)
    for flags in (["--resume", "a"], ["--eval-only", "a", "--out", "b"]):
        with pytest.raises(InputError, match="a/log.jsonl: Permission denied"):
            train.main(flags)

def test_a_new_run_whose_folder_is_a_file_is_refused_before_anything_is_read(data):
    Path("a").touch()
    shutil.rmtree("0")
    with pytest.raises(InputError, match="a exists: give a new --out"):
        train.main([*FLAGS, "--out", "a"])

def test_tables_and_figures_that_were_made_earlier_are_kept(tmp_path):
    names = [figures.keep(content, tmp_path / "table.md").name
             for content in (b"one", b"two", b"one", b"three", b"two")]
    assert names == ["table.md", "table-2.md", "table.md", "table-3.md", "table-2.md"]
    assert (tmp_path / "table-2.md").read_bytes() == b"two"

def test_a_picture_that_cannot_be_written_leaves_the_one_that_is_there(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    figures.save_picture(Image.new("RGB", (8, 8), "red"), path)
    before = path.read_bytes()
    def no_sync(file):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", no_sync)
    with pytest.raises(InputError, match="a.png: No space left"):
        figures.save_picture(Image.new("RGB", (8, 8), "blue"), path)
    assert path.read_bytes() == before

def test_explain_does_not_write_its_picture_over_what_it_explains(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    write_clip(tmp_path / "clip.mp4").rename("explain.png")
    before = Path("explain.png").read_bytes()
    for flags in ([], ["--out", "./explain.png"]):
        with pytest.raises(InputError, match="explain.png is the video itself"):
            search.main(["explain", "a dog", "explain.png", "--model", "model", *flags])
    assert Path("explain.png").read_bytes() == before

def test_metrics_need_a_target_for_each_query():
    with pytest.raises(AssertionError, match="10 queries, but 3 targets"):
        video_colbert.retrieval_metrics(torch.rand(10, 5), torch.tensor([0, 1, 2]))

def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Even if they have the same process and thread id, as in two containers."""
    path = tmp_path / "file"
    with train.atomic_write(path) as first, train.atomic_write(path) as second:
        assert first.name != second.name
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_disk_that_is_full_when_the_log_is_written_is_one_line(tmp_path):
    """Also when the log is closed."""
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(InputError, match="log.jsonl: No space left on device"):
        with train.open_log(tmp_path) as log:
            os.dup2(full, log.fileno())
            train.write_line(log, {})
    os.close(full)

def test_a_line_of_which_only_a_part_fits_on_the_disk_is_noticed():
    log = Mock()
    log.name, log.write.return_value = "a/log.jsonl", 5
    with pytest.raises(InputError, match="a/log.jsonl: the disk is full"):
        train.write_line(log, {"loss": 1.0})

@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_the_default_run_on_a_full_disk_or_in_a_read_only_folder_is_one_line(
        tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    def fails(*args, **kwargs):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(Path, "mkdir", fails)
    with pytest.raises(InputError, match=f"data/shapes: {os.strerror(number)}"):
        train.main(["--device", "cpu"])

def test_a_cache_file_that_cannot_be_read_is_decoded_again(tmp_path, monkeypatch):
    path, load = write_clip(tmp_path / "a.mp4"), train.np.fromfile
    def frames():
        return train.cached_frames(train.Clip(str(path), ["a"]), 4, 16, tmp_path / "cache")
    first = frames()
    def not_allowed(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(train.np, "fromfile", not_allowed)
    assert torch.equal(frames(), first)
    monkeypatch.setattr(train.np, "fromfile", load)
    assert torch.equal(frames(), first)

def test_huge_numbers_and_empty_batches_are_documented_errors(tmp_path, tiny):
    path = write_clip(tmp_path / "a.mp4")
    line = {"video": "a.mp4", "captions": ["a"], "split": "test", "end": int("9" * 400)}
    write_lines(tmp_path / "clips.jsonl", line)
    clip, = clips_of(tmp_path / "clips.jsonl")["test"]
    frames = train.cached_frames(clip, 3, 16, tmp_path / "cache")
    assert torch.equal(frames, sample_frames(path, 3, 16))
    with pytest.raises(InputError, match="a.mp4: cannot take 0 frames"):
        sample_frames(path, 0, 64)
    with pytest.raises(ValueError, match="frames must be uint8"):
        tiny.encode_video(torch.zeros(0, 6, 3, tiny.image_size, tiny.image_size).byte())
    with pytest.raises(InputError, match="--device meta"):
        train.main([*SMALL, "--data", str(tmp_path / "clips.jsonl"), "--device", "meta"])

@pytest.mark.parametrize("frames", [
    pixels(1, 6).float(), pixels(1, 7), pixels(1, 6)[..., :32], pixels(6)])
def test_frames_of_a_wrong_kind_are_refused(tiny, frames):
    message = r"frames must be uint8 \(B, 1 to 6, 3, 48, 48\), not "
    with pytest.raises(ValueError, match=message):
        tiny.encode_video(frames)

def test_a_run_resumes_on_a_file_of_the_same_clips_elsewhere_and_on_no_other(data, monkeypatch):
    train.main([*FLAGS, "--out", "whole"])
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "training_step", 2)
    os.mkdir("moved")
    for name in [*"012345", "clips.jsonl"]:
        shutil.move(name, f"moved/{name}")
    with pytest.raises(InputError, match="clips.jsonl: No such file"):
        train.main(["--resume", "a"])
    write_json_lines(data / "other", "train train train test")
    with pytest.raises(InputError, match="a was started with other clips or captions"):
        train.main(["--resume", "a", "--data", "other/clips.jsonl"])
    train.main(["--resume", "a", "--data", "moved/clips.jsonl"])
    assert contents("a") == contents("whole")

def test_a_run_that_is_not_finished_cannot_be_evaluated_but_resumed(data, monkeypatch):
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "training_step", 2)
    with pytest.raises(InputError, match="a is not finished: use --resume a"):
        train.main(["--eval-only", "a"])

@pytest.mark.parametrize("flags, message", [
    ("--warmup 3", "--warmup is a share of the steps"), ("--lambda-frame nan", "--lambda-frame"),
    ("--pretrained a.pt", "tiny backbone has no pretrained weights"),
    ("--freeze False", "not write True or False, but --freeze or --no-freeze"),
    ("--freeze=False", "not write True or False, but --freeze or --no-freeze"),
    ("--logit-scale -inf", "--logit-scale cannot be -inf"),
    ("--resume a --eval-only b", "--resume and --eval-only exclude each other")])
def test_settings_that_make_no_sense_are_named(data, flags, message):
    with pytest.raises(InputError, match=message):
        train.main([*FLAGS, *flags.split()])

def test_a_max_grad_norm_of_0_is_no_clipping(data):
    train.main([*FLAGS, "--epochs", "1", "--max-grad-norm", "0", "--out", "zero"])
    train.main([*FLAGS, "--epochs", "1", "--max-grad-norm", "1e9", "--out", "large"])
    assert contents("zero") == contents("large")

def test_evaluation_encodes_few_captions_at_a_time(data, monkeypatch):
    """However many a clip has."""
    sizes, encode_query = [], VideoColBERT.encode_query
    def noted(model, ids):
        sizes.append(len(ids))
        return encode_query(model, ids)
    monkeypatch.setattr(VideoColBERT, "encode_query", noted)
    lines = [json.loads(line) for line in open("clips.jsonl")]
    lines[3]["captions"] = [f"caption {i}" for i in range(300)]
    write_lines(data / "clips.jsonl", *lines)
    train.main([*FLAGS, "--epochs", "0"])
    assert sum(sizes) == 301 and max(sizes) == 32

def test_the_best_epoch_on_the_test_set_is_reported_and_selects_nothing(data, capsys):
    train.main([*FLAGS, "--out", "a", "--eval-every", "1"])
    table = capsys.readouterr().out
    train.main([*FLAGS, "--out", "b"])
    tests = [line for line in records("a") if line.get("split") == "test"]
    assert [line["epoch"] for line in tests] == [0, 1]
    assert {"R@1", "R@5", "R@10", "nDCG@10", "MdR", "MnR"} < tests[0].keys()
    best = max(tests, key=lambda line: line["R@1"])
    assert records("a")[-1]["best"] == best
    assert (f"which CLIP4Clip, DRL and UATVR report: epoch {best['epoch']}, "
            f"MMS_FV R@1 {best['R@1']:.4g} R@5 {best['R@5']:.4g} R@10 {best['R@10']:.4g} "
            f"nDCG@10 {best['nDCG@10']:.4g}\n") in table
    assert contents("a")["model.safetensors"] == contents("b")["model.safetensors"]
    assert "best epoch" not in capsys.readouterr().out

@pytest.mark.parametrize("flags, score", [
    (["--lambda-video", "0"], "MMS_F"), (["--lambda-frame", "0"], "MMS_V"),
    (["--lambda-video", "0", "--loss-form", "combined"], "MMS_FV"),
    (["--lambda-frame", "0", "--loss-form", "combined"], "MMS_FV"),
    (["--lambda-video", "0", "--interaction", "mp"], "MP_F")])
def test_epochs_are_compared_by_the_score_that_is_trained(data, capsys, flags, score):
    """The log's lines have that row's numbers of the table, and say which it is."""
    train.main([*FLAGS, *flags, "--epochs", "1", "--eval-every", "1", "--out", "a"])
    logged, = [line for line in records("a") if line.get("split") == "test"]
    row, *_ = [row for row in records("a")[-1]["evaluation"] if row["score"] == score]
    assert logged == dict(epoch=0, split="test", score=score, **{
        name: row[name] for name in ("R@1", "R@5", "R@10", "nDCG@10", "MdR", "MnR")})
    assert f"report: epoch 0, {score} R@1 {row['R@1']:.4g} " in capsys.readouterr().out

def test_the_best_epoch_of_an_older_log_has_no_name(data, capsys):
    train.main([*FLAGS, "--interaction", "mp", "--epochs", "1", "--eval-every", "1", "--out", "a"])
    lines = records("a")
    del lines[-1]["best"]["score"]
    write_lines(data / "a" / "log.jsonl", *lines)
    capsys.readouterr()
    train.main(["--resume", "a"])
    assert "report: epoch 0, MP_FV R@1 " in capsys.readouterr().out

def test_a_second_start_on_a_folder_changes_nothing_of_the_first(data, monkeypatch):
    """It found the folder free, and decoded while the first one began."""
    fill_cache = train.fill_cache
    def another_begins(*args):
        if not os.path.exists("a/settings.json"):
            os.makedirs("a", exist_ok=True)
            Path("a/settings.json").write_text("the first one's")
        return fill_cache(*args)
    monkeypatch.setattr(train, "fill_cache", another_begins)
    with pytest.raises(InputError, match="a exists: give a new --out"):
        train.main([*FLAGS, "--out", "a"])
    assert Path("a/settings.json").read_text() == "the first one's"

def test_a_checkpoint_damaged_anywhere_falls_back(data, monkeypatch, capsys):
    """Also in the directory of the zip file, at its end."""
    run_until(monkeypatch, [*FLAGS, "--out", "a", "--checkpoint-every", "1"], "training_step", 3)
    first, last = sorted(Path("a/checkpoints").iterdir())
    good = last.read_bytes()
    for at in range(len(good) - 3000, len(good), 150):
        damaged = bytearray(good)
        damaged[at] ^= 255
        last.write_bytes(damaged)
        assert train.load_checkpoint("a")["step"] in (2, 3)
    assert f"{last} is damaged" in capsys.readouterr().out

def test_evaluation_only_reads_test_clips_alone_in_either_spelling(data, monkeypatch):
    train.main([*FLAGS, "--epochs", "0", "--out", "a"])
    os.unlink("0/clip.mp4")
    for flag in ("--eval-only", "--eval_only"):
        train.main([flag, "a", "--data", "clips.jsonl", "--out", flag[2:], "--cache", "new"])
        assert records(flag[2:])[-1]["gallery"] == 2
    assert len([path for path in Path("new").iterdir() if path.is_file()]) == 2

def test_training_clips_that_are_left_out_are_counted_in_the_table(data, capsys):
    os.unlink("0/clip.mp4")
    train.main([*FLAGS, "--allow-missing", "--out", "a"])
    assert "gallery of 2 clips, 1 training clips missing" in capsys.readouterr().out

def test_an_evaluation_that_was_stopped_is_resumed(data, monkeypatch):
    train.main([*FLAGS, "--epochs", "0", "--out", "a"])
    run_until(monkeypatch, ["--eval-only", "a", "--out", "b"], "result_rows", 0)
    train.main(["--resume", "b"])
    assert records("b")[-1]["evaluation"] == records("a")[-1]["evaluation"]

def test_resume_with_the_same_data_keeps_their_folder(data, monkeypatch):
    (data / "elsewhere").mkdir()
    run_until(monkeypatch, [*FLAGS, "--root", "elsewhere", "--out", "a"], "training_step", 1)
    assert train.parse_settings(["--resume", "a", "--data", "clips.jsonl"]).root == "elsewhere"

def test_a_flag_may_have_the_word_true_in_its_value(data):
    assert train.parse_settings([*FLAGS, "--root", "My True Crime"]).root == "My True Crime"

def test_a_fixed_scale_is_not_clamped_with_infonce(data):
    train.main([*FLAGS, "--loss", "infonce", "--no-learn-scale", "--logit-scale", "4.77",
                "--epochs", "1", "--out", "a"])
    assert VideoColBERT.load("a").logit_scale.item() == pytest.approx(4.77)

# ---- Found in a second hour
def test_a_folder_with_other_files_gets_no_synthetic_clips(data):
    """`--root FOLDER` without `--data msrvtt` would overwrite videos of the same names."""
    write_clip(data / "mine/videos/video0.mp4", 5)
    before = (data / "mine/videos/video0.mp4").read_bytes()
    with pytest.raises(InputError, match="mine: holds other files than the synthetic clips"):
        train.main(["--root", "mine", "--epochs", "0"])
    assert os.listdir("mine") == ["videos"] and os.listdir("mine/videos") == ["video0.mp4"]
    assert (data / "mine/videos/video0.mp4").read_bytes() == before

@pytest.mark.parametrize("left", [0, 100])
def test_a_log_that_is_cut_off_loses_only_its_lines(data, monkeypatch, left):
    """As after a power cut, which may leave the checkpoint and not the log."""
    train.main([*FLAGS, "--out", "whole"])
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "training_step", 3)
    os.truncate("a/log.jsonl", left)
    train.main(["--resume", "a"])
    assert contents("a")["model.safetensors"] == contents("whole")["model.safetensors"]
    assert b"\0" not in Path("a/log.jsonl").read_bytes()
    assert train.read_result("a")["evaluation"] == train.read_result("whole")["evaluation"]

def test_a_finished_model_is_never_trained_over(data):
    train.main([*FLAGS, "--out", "a"])
    model = Path("a/model.safetensors").read_bytes()
    with open("a/log.jsonl", "a") as log:
        log.write("\n")
    train.main(["--resume", "a"])  # a blank line changes nothing
    os.unlink("a/log.jsonl")
    with pytest.raises(InputError, match="^a has a log or a model, but no checkpoints: "):
        train.main(["--resume", "a"])
    assert Path("a/model.safetensors").read_bytes() == model

def test_a_run_that_another_process_ends_meanwhile_is_not_trained_again(data, monkeypatch):
    """It ends while this one decodes, after it has found checkpoints."""
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "training_step", 3)
    fill_cache = train.fill_cache
    def another_ends(*args):
        monkeypatch.setattr(train, "fill_cache", fill_cache)
        train.main(["--resume", "a"])
        return fill_cache(*args)
    monkeypatch.setattr(train, "fill_cache", another_ends)
    with pytest.raises(InputError, match="^a has ended meanwhile: use --resume again"):
        train.main(["--resume", "a"])
    assert train.read_result("a")

def test_copies_that_a_user_keeps_beside_checkpoints_stay_and_are_not_loaded(data, monkeypatch):
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "training_step", 3)
    checkpoint = max(Path("a/checkpoints").iterdir())
    for name in ("epoch5.pt", "step-00000002-keep.pt"):
        shutil.copy(checkpoint, f"a/checkpoints/{name}")
    torch.save({"mine": 1}, "a/checkpoints/weights.pt")
    train.main(["--resume", "a"])
    assert sorted(os.listdir("a/checkpoints")) == [
        "epoch5.pt", "step-00000002-keep.pt", "weights.pt"]

def test_a_missing_clip_that_comes_back_does_not_undo_a_run(data, monkeypatch):
    os.rename("0/clip.mp4", "away")
    evaluate = train.evaluate
    def comes_back(*args):
        if os.path.exists("away"):
            os.rename("away", "0/clip.mp4")
        return evaluate(*args)
    monkeypatch.setattr(train, "evaluate", comes_back)
    train.main([*FLAGS, "--allow-missing", "--out", "a"])
    assert train.read_result("a")["missing_train"] == 1

def test_a_run_resumes_without_the_file_of_its_pretrained_weights(data, monkeypatch):
    """The checkpoint has the weights; the saved model still names the file."""
    calls, load = [], video_colbert.load_backbone
    def counted(name, pretrained):
        calls.append(pretrained)
        return load(name, "none")
    monkeypatch.setattr(video_colbert, "load_backbone", counted)
    flags = [*FLAGS, "--pretrained", "w.pt"]
    Path("w.pt").write_text("weights")
    train.main([*flags, "--out", "whole"])
    run_until(monkeypatch, [*flags, "--out", "a"], "training_step", 3)
    run_until(monkeypatch, [*flags, "--epochs", "0", "--out", "b"], "result_rows", 0)
    assert calls == ["w.pt", "w.pt", "w.pt"]
    Path("w.pt").write_text("others")
    with pytest.raises(InputError, match="w.pt has changed since b began: start a new run"):
        train.main(["--resume", "b"])
    train.main(["--resume", "a"])
    assert calls[3:] == ["none"] and contents("a") == contents("whole")
    assert json.loads(Path("a/config.json").read_text())["pretrained"] == "w.pt"

def test_settings_that_were_edited_by_hand_are_noticed(data, monkeypatch):
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "training_step", 3)
    settings = json.loads(Path("a/settings.json").read_text())
    Path("a/settings.json").write_text(json.dumps({**settings, "lr": 0.5}))
    with pytest.raises(InputError, match=f"cannot change lr of a: {settings['lr']}"):
        train.main(["--resume", "a"])

def test_an_evaluation_refuses_settings_that_it_would_not_use(data):
    train.main([*FLAGS, "--epochs", "0", "--out", "a"])
    with pytest.raises(InputError, match="cannot change seed of a: 0"):
        train.main(["--eval-only", "a", "--seed", "9"])

def test_test_clips_that_are_trained_on_are_told(tmp_path, capsys):
    clip = {"video": "a.mp4", "captions": ["a"]}
    write_lines(tmp_path / "clips.jsonl", {**clip, "split": "train"}, {**clip, "split": "test"},
                {**clip, "split": "test", "start": 1})
    clips_of(tmp_path / "clips.jsonl")
    assert capsys.readouterr().out == "1 test clips are training clips, too\n"

def test_of_two_files_of_a_video_the_first_path_counts(tmp_path):
    for folder in ("videos", "videos_low"):
        write_clip(tmp_path / folder / "video1.mp4", 3)
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(
        {"sentences": [{"video_id": "video1", "caption": "a"}]}))
    (tmp_path / "MSRVTT_train.9k.csv").write_text("video_id\nvideo1\n")
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text("video_id,sentence\nvideo1,a\n")
    clip, = train.load_clips(train.Settings(data="msrvtt", root=str(tmp_path)))["train"]
    assert clip.path == f"{tmp_path}/videos/video1.mp4"

def test_a_name_with_a_colon_is_a_file(data):
    write_clip(data / "2024-01-01T10:00:00.mp4", 5)
    assert sample_frames("2024-01-01T10:00:00.mp4", 2, 16).shape == (2, 3, 16, 16)

def test_an_evaluation_may_have_another_precision_and_a_resumed_run_may_not(data, monkeypatch):
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "result_rows", 0)
    with pytest.raises(InputError, match="cannot change precision of a"):
        train.main(["--resume", "a", "--precision", "bf16"])
    train.main(["--resume", "a"])
    train.main(["--eval-only", "a", "--precision", "bf16", "--out", "b"])
    assert train.read_settings("b").precision == "bf16"

@pytest.mark.parametrize("flags, fewer", [
    (["--batch-size", "128"], 16), (["--batch-size", "4"], 2), (["--micro-batch", "3"], 1),
    (["--batch-size", "4", "--micro-batch", "64"], 2)])
def test_memory_that_runs_out_in_an_evaluation_names_fewer_videos(
        data, monkeypatch, flags, fewer):
    """It takes 32 at a time, or a micro-batch if that is smaller."""
    def too_many(*args):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(train, "evaluate", too_many)
    with pytest.raises(InputError, match=f"^out of memory on cpu: .* --micro-batch {fewer}$"):
        train.main([*FLAGS, "--epochs", "0", "--out", "a", *flags])
    s = train.Settings(micro_batch=fewer)
    assert train.eval_batch_size(s) == fewer

def test_a_kill_in_the_evaluation_after_an_epoch_loses_no_step(data, monkeypatch):
    """As torchrun does half a minute after Ctrl-C; and the resumed run evaluates again."""
    flags = [*FLAGS, "--eval-every", "1"]
    train.main([*flags, "--out", "whole"])
    run_until(monkeypatch, [*flags, "--out", "a"], "evaluate", 0)
    epoch = [line for line in records("a") if "loss" in line]
    assert max(os.listdir("a/checkpoints")) == f"step-{len(epoch):08d}.pt"
    assert epoch and not any("split" in line for line in records("a"))
    train.main(["--resume", "a"])
    assert contents("a") == contents("whole")

def test_what_a_killed_checkpoint_left_is_removed_with_the_checkpoints(data, monkeypatch):
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "result_rows", 0)
    os.mkdir("a/checkpoints/part-abc")
    Path("a/checkpoints/part-abc/part").touch()
    train.main(["--resume", "a"])
    assert not Path("a/checkpoints").exists()

def test_a_closed_terminal_saves_a_checkpoint(data, monkeypatch):
    # Under nohup, SIGHUP is ignored.
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    step = train.training_step
    monkeypatch.setattr(train, "training_step",
                        lambda *a: os.kill(os.getpid(), signal.SIGHUP) or step(*a))
    with pytest.raises(KeyboardInterrupt):
        train.main([*FLAGS, "--out", "a"])
    assert max(os.listdir("a/checkpoints")) == "step-00000001.pt"

def test_a_video_that_is_replaced_while_others_are_decoded_stops_the_run(data, monkeypatch):
    fill_cache = train.fill_cache
    def replaces(clips, split, *args):
        readable = fill_cache(clips, split, *args)
        if split == "train":
            write_clip(data / "0/clip.mp4", 29)
        return readable
    monkeypatch.setattr(train, "fill_cache", replaces)
    with pytest.raises(InputError, match="0/clip.mp4 has changed during the run"):
        train.main([*FLAGS, "--out", "a"])

def test_a_result_is_not_written_onto_a_line_that_was_cut_off(data, monkeypatch):
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "result_rows", 0)
    os.truncate("a/log.jsonl", 100)
    train.main(["--resume", "a"])
    assert len(train.read_result("a")["evaluation"]) == 8
    run_until(monkeypatch, ["--eval-only", "a", "--out", "b"], "result_rows", 0)
    Path("b/log.jsonl").write_bytes(b'{"evaluation": [{"sc\xff')
    train.main(["--resume", "b"])
    assert train.read_result("b")["evaluation"] == train.read_result("a")["evaluation"]

def test_a_checkpoint_of_an_older_run_resumes(data, monkeypatch):
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "training_step", 3)
    path = max(Path("a/checkpoints").iterdir())
    content = torch.load(path, weights_only=True)
    del content["settings"]
    torch.save(content, path)
    train.main(["--resume", "a"])
    assert train.read_result("a")

def test_a_folder_that_a_user_keeps_beside_checkpoints_stays(data, monkeypatch):
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "training_step", 3)
    shutil.copytree("a/checkpoints", "keep")
    shutil.move("keep", "a/checkpoints/keep")
    train.main(["--resume", "a"])
    assert max(os.listdir("a/checkpoints/keep")) == "step-00000002.pt"

def test_linked_checkpoints_are_no_error(data, monkeypatch):
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "training_step", 3)
    shutil.move("a/checkpoints", "scratch")
    os.symlink("../scratch", "a/checkpoints")
    train.main(["--resume", "a"])
    assert train.read_result("a") and not os.listdir("scratch")

def test_an_evaluation_may_have_its_own_precision(data):
    train.main([*FLAGS, "--epochs", "0", "--out", "a"])
    train.main(["--eval-only", "a", "--precision", "bf16", "--out", "b"])
    assert train.read_result("b")

def test_a_path_with_dots_opens_what_the_system_opens(tmp_path):
    white = np.full((32, 32, 3), 255, np.uint8)
    write_clip(tmp_path / "disk/a.mp4", 3, (32, 32), picture=white)
    write_clip(tmp_path / "home/a.mp4", 3, (32, 32), picture=0 * white)
    (tmp_path / "disk/sub").mkdir()
    (tmp_path / "home/link").symlink_to(tmp_path / "disk/sub")
    assert sample_frames(tmp_path / "home/link/../a.mp4", 1, 16).float().mean() > 200

def test_a_reader_may_add_a_tuple_and_a_negative_number_to_the_settings(data, monkeypatch):
    """In one line each; runs resume, which compare their settings with those in JSON."""
    extended = dataclasses.make_dataclass(
        "Settings", [("betas", tuple[float, float], (0.9, 0.98)), ("margin", float, -0.1)],
        bases=(train.Settings,))
    monkeypatch.setattr(train, "Settings", extended)
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "training_step", 3)
    train.main(["--resume", "a"])
    assert train.read_result("a")

def test_a_reader_of_the_output_who_leaves_is_no_error(data):
    train.main([*FLAGS, "--epochs", "0", "--out", "a"])
    code = f"import sys; sys.path.insert(0, {os.path.dirname(train.__file__)!r}); import train\n"
    code += "train.run_main(lambda: train.main(['--resume', 'a']), 'train.py')"
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (process.returncode, process.stderr) == (0, b"")

# ---- Found in a tenth hour
@pytest.mark.parametrize("name", ["bench", "curves", "datasets", "predict", "reproduce", "search",
                                  "shapes"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_each_program_explains_itself(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_module(f"extras.{name}", run_name="__main__")
    assert capsys.readouterr().out.startswith("usage: ")

@pytest.mark.parametrize("command, message", [
    ("bench --memory --num-frames 64", "--memory and --long-video take no other flags"),
    ("bench --long-video --device cpu --seed 1", "--memory and --long-video take no other flags"),
    ("bench --long-video --memory", "not allowed with argument"),
    ("shapes notes.txt", "File exists"),
    ("predict --num-frames 64", "unrecognized arguments: --num-frames 64"),
    ("shapes .", ".: holds other files than the synthetic clips")])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_a_command_that_cannot_be_followed_is_refused(
        command, message, tmp_path, monkeypatch, capsys):
    """It was followed in part, or ended in a traceback."""
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").touch()
    name, *flags = command.split()
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_module(f"extras.{name}", run_name="__main__")
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir() == ["notes.txt"]

# ---- Found in an eleventh hour
def test_the_last_epoch_can_be_the_best_one(data):
    """Also if their number is not a multiple of --eval-every."""
    train.main([*FLAGS, "--epochs", "3", "--eval-every", "2", "--out", "a"])
    tests = [line for line in records("a") if line.get("split") == "test"]
    assert [line["epoch"] for line in tests] == [1, 2]
    result = train.read_result("a")
    row = result["evaluation"][2]
    assert row["score"] == "MMS_FV" and row["R@1"] == tests[-1]["R@1"] <= result["best"]["R@1"]

def test_a_run_whose_checkpoints_are_away_is_not_started_again(data, monkeypatch):
    """As after `rsync --exclude '*.pt'`, also before its first epoch has ended."""
    run_until(monkeypatch, [*FLAGS, "--out", "a"], "training_step", 1)
    shutil.move("a/checkpoints", "away")
    before = Path("a/log.jsonl").read_bytes()
    with pytest.raises(InputError, match="^a has a log or a model, but no checkpoints: "):
        train.main(["--resume", "a"])
    assert before and Path("a/log.jsonl").read_bytes() == before
    shutil.move("away", "a/checkpoints")
    train.main(["--resume", "a"])
    assert train.read_result("a")

@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_signals_have_their_old_handlers_after_a_run_that_stops(data, monkeypatch, error):
    """A program that calls train.main can be stopped afterwards."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    during = []
    def fails(*args):
        during.extend(signal.getsignal(number) for number in numbers)
        raise error
    monkeypatch.setattr(train, "training_step", fails)
    with pytest.raises(error):
        train.main([*FLAGS, "--out", "a"])
    assert [signal.getsignal(number) for number in numbers] == before
    assert not set(during) & set(before)

def test_missing_validation_clips_are_counted(data, capsys):
    os.unlink("4/clip.mp4")
    train.main([*FLAGS, "--allow-missing", "--out", "a"])
    assert ", 1 validation clips missing\n" in capsys.readouterr().out

def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch):
    """And a handler that was not set from Python, which is None, becomes the default one."""
    old = {signal.SIGINT: None, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_IGN}
    calls = []
    def set_handler(number, handler):
        calls.append((number, handler))
        return old[number]
    monkeypatch.setattr(signal, "getsignal", old.get)
    monkeypatch.setattr(signal, "signal", set_handler)
    with train.signal_handler(print):
        assert calls == [(signal.SIGINT, print), (signal.SIGTERM, print)]
    assert calls[2:] == [(signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_DFL)]

def test_the_table_of_a_result_that_counts_no_validation_clips_is_printed(data):
    """As of runs before it was counted."""
    train.main([*FLAGS, "--epochs", "0", "--out", "a"])
    result = train.read_result("a")
    table = train.results_table(result)
    del result["missing_val"]
    assert train.results_table(result) == table

@pytest.mark.parametrize("length", [1, 100_000])
def test_a_full_disk_below_the_output_is_one_line(length):
    """Of a short output Python notices it when it ends."""
    code = f"import train; train.run_main(lambda: print('x' * {length}), 'train.py')"
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, "-c", code], stdout=full, text=True,
                                 stderr=subprocess.PIPE, cwd=Path(train.__file__).parent)
    assert process.stderr == "train.py: cannot print: No space left on device\n"
    assert process.returncode == 2

def test_other_errors_of_the_system_keep_their_traceback():
    with pytest.raises(OSError, match="Input/output error"):
        train.run_main(Mock(side_effect=OSError(errno.EIO, "Input/output error")), "train.py")

@pytest.mark.parametrize("name, value", [("loss", "infonce"), ("data", "msrvtt")])
def test_a_default_that_a_reader_edits_is_the_default(monkeypatch, name, value):
    monkeypatch.setattr(train.Settings.__init__, "__defaults__", tuple(
        value if field.name == name else field.default
        for field in dataclasses.fields(train.Settings)))
    assert getattr(train.parse_settings(["--backbone", "tiny"]), name) == value
    assert getattr(train.parse_settings(["--loss", "sigmoid", "--data", "shapes"]), name) != value

# ---- Found in a fifteenth hour
def test_a_run_resumes_only_with_the_clips_that_it_could_read(data, monkeypatch):
    """A video whose damage is neither in its size nor in its first 64 KB may be replaced by a
    good copy: that would be another training set, with other steps. A test clip may be."""
    damaged = {"0/clip.mp4", "3/clip.mp4"}  # of training and of test
    def some_are_damaged(path, *args):
        if path in damaged:
            raise VideoError(f"{path}: damaged")
        return sample_frames(path, *args)
    flags = [*FLAGS, "--allow-missing", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(video_colbert, "sample_frames", some_are_damaged)
        for name in ("a", "b"):
            run_until(monkeypatch, [*flags, name], "training_step", 1)
        damaged.remove("3/clip.mp4")
        train.main(["--resume", "b"])
        result = train.read_result("b")
        assert (result["missing_train"], result["missing"]) == (1, 0)
    with pytest.raises(InputError, match="a was started with 2 training clips that could be "
                                         "read, now there are 3"):
        train.main(["--resume", "a"])
    # A checkpoint of an older version does not say how many could be read.
    path = train.checkpoint_paths("a")[-1]
    content = torch.load(path)
    del content["train_clips"]
    torch.save(content, path)
    train.main(["--resume", "a"])

def test_a_table_says_whose_model_it_is_of_and_on_which_clips(data, capsys):
    """The folder of an evaluation is called after its clips only."""
    train.main([*FLAGS, "--epochs", "0"])
    out = capsys.readouterr().out
    assert out.startswith("runs/clips on clips.jsonl:\ngallery of 2 clips\n")
    assert out.endswith("\nruns/clips\n")
    for name in ("a", "b"):
        train.main([*FLAGS, "--epochs", "0", "--seed", str(ord(name)), "--out", name])
    assert capsys.readouterr().out.count("b on clips.jsonl:\ngallery of 2 clips\n") == 1
    train.main(["--eval-only", "a"])
    with pytest.raises(InputError, match="runs/clips-eval continues a run"):
        train.main(["--eval-only", "b"])
    capsys.readouterr()
    train.main(["--resume", "runs/clips-eval"])
    assert capsys.readouterr().out.startswith("a on clips.jsonl:\ngallery of 2 clips\n")
