"""Each converter's file is what a person would write by hand, and train.py runs on it."""
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

import train
from extras.datasets import main
from extras.test_core import Evil, mutate
from test_video_colbert import SMALL, write_clip
from video_colbert import InputError

def write(root, **files):
    """Files by name, with __ for a dot; what is not a string or bytes is written as JSON."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = root / name.replace("__", ".")
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))

def write_videos(root, *names):
    """One clip, copied under many names."""
    clip = write_clip(root / "clip.mkv", 3).read_bytes()
    (root / "clip.mkv").unlink()
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(clip)

def lines_of(root):
    return [json.loads(line) for line in (root / "clips.jsonl").read_text().splitlines()]

def line(video, split, *captions, **times):
    return {"video": video, "captions": list(captions), "split": split, **times}

def write_msvd(root):
    captions = {"-4wsuPCjDBc_5_15": [["a", "man"], ["a", "dog", "runs"]], "b_1_2": [["b"]],
                "v_3_4": [["val"]], "t_5_6": [["t", "one"], ["t", "two"]], "unused": [["x"]]}
    write(root, train_list__txt="-4wsuPCjDBc_5_15\r\nb_1_2\r\n", val_list__txt="v_3_4\n",
          test_list__txt="t_5_6\n\n", **{"raw-captions__pkl": pickle.dumps(captions, protocol=2)})
    write_videos(root, "YouTubeClips/-4wsuPCjDBc_5_15.avi", "YouTubeClips/b_1_2.avi",
                 "YouTubeClips/v_3_4.avi", "YouTubeClips/t_5_6.AVI")
    return [line("YouTubeClips/-4wsuPCjDBc_5_15.avi", "train", "a man", "a dog runs"),
            line("YouTubeClips/b_1_2.avi", "train", "b"),
            line("YouTubeClips/v_3_4.avi", "val", "val"),
            line("YouTubeClips/t_5_6.AVI", "test", "t one", "t two")]

def vatex_record(video):
    return {"videoID": video, "enCap": [f"{video} {i}" for i in range(10)], "chCap": ["no"]}

def write_vatex(root):
    a, b, d = "Ptf_2VRj-V0_000122_000132", "b", "d"
    write(root, vatex_training_v1__0__json=[vatex_record(a), vatex_record(b)], test_list__txt="d\n",
          vatex_validation_v1__0__json=[vatex_record("c"), vatex_record(d)])
    write_videos(root, f"videos/{a}.mp4", "videos/b.mkv", "videos/d.mp4")
    return [line(f"videos/{a}.mp4", "train", *vatex_record(a)["enCap"]),
            line("videos/b.mkv", "train", *vatex_record(b)["enCap"]),
            line("videos/d.mp4", "test", *vatex_record(d)["enCap"])]

def write_didemo(root):
    """A copy with another ending stands for its original; the original goes first."""
    a, b, c = "26292851@N04_4253489686_265c3c8051.m4v", "x@N_1_2.mov", "y@N_3_4.avi"
    def moments(*pairs):
        return [{"video": v, "description": text, "times": [[0, 0]]} for v, text in pairs]
    write(root, train_data__json=moments((a, "one "), (b, "other"), (a, "two")),
          test_data__json=moments((c, "the"), (c, "query")))
    write_videos(root, f"videos/{Path(a).stem}.mp4", f"videos/{b}", f"videos/{Path(b).stem}.mp4",
                 f"videos/{c}.mp4")
    return [line(f"videos/{Path(a).stem}.mp4", "train", "one two", end=30.0),
            line(f"videos/{b}", "train", "other", end=30.0),
            line(f"videos/{c}.mp4", "test", "the query", end=30.0)]

def write_activitynet(root):
    def record(*sentences):
        return {"duration": 82.73, "timestamps": [[0, 1]], "sentences": list(sentences)}
    write(root, train__json={"v_QOlSCBRmfWY": record("A man.", " He runs. "), "v_b": record("B.")},
          val_1__json={"v_c": record("C.", "D."), "v_e": record("E.")}, val_ids__json=["v_c"])
    write_videos(root, "videos/v_QOlSCBRmfWY.mp4", "videos/b.mkv", "videos/c.webm")
    return [line("videos/v_QOlSCBRmfWY.mp4", "train", "A man. He runs."),
            line("videos/b.mkv", "train", "B."), line("videos/c.webm", "test", "C. D.")]

WRITERS = {"msvd": write_msvd, "vatex": write_vatex, "didemo": write_didemo,
           "activitynet": write_activitynet}

@pytest.mark.parametrize("name", WRITERS)
def test_a_converted_file_is_as_written_by_hand_and_trains(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    want = WRITERS[name](tmp_path / "data")
    main([name, "data"])
    assert lines_of(tmp_path / "data") == want
    frames = {"didemo": " --num-frames 64 --num-tokens 64",
              "activitynet": " --num-frames 64 --num-tokens 64"}.get(name, "")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"python train.py --data data/clips.jsonl{frames}"
    captions = sum(len(clip["captions"]) for clip in want[:2])
    assert f"train: 2 videos, {captions} captions" in printed[0]
    train.main([*SMALL, "--data", "data/clips.jsonl", "--epochs", "1", "--out", "run"])
    assert train.finished("run")["gallery"] == 1

def test_the_lists_of_vatex_choose_its_videos(tmp_path):
    write_vatex(tmp_path)
    write(tmp_path, train_list__txt="b\n", val_list__txt="c\n")
    write_videos(tmp_path, "videos/c.mp4")
    main(["vatex", str(tmp_path)])
    assert [(clip["video"], clip["split"]) for clip in lines_of(tmp_path)] == [
        ("videos/b.mkv", "train"), ("videos/c.mp4", "val"), ("videos/d.mp4", "test")]

def test_missing_training_videos_are_left_out_and_missing_test_videos_named(tmp_path, capsys):
    """And the file may be elsewhere, with absolute paths."""
    write_vatex(tmp_path / "data")
    (tmp_path / "data/videos/b.mkv").unlink()
    (tmp_path / "data/videos/d.mp4").unlink()
    main(["vatex", str(tmp_path / "data"), "--out", str(tmp_path / "clips.jsonl")])
    out = capsys.readouterr().out
    assert "train: 2 videos, 20 captions, 1 videos missing\n  missing: b.mp4" in out
    assert "missing: d.mp4" in out and out.strip().endswith("clips.jsonl --allow-missing")
    assert [clip["split"] for clip in lines_of(tmp_path)] == ["train", "test"]
    (tmp_path / "elsewhere").mkdir()
    main(["vatex", str(tmp_path / "data"), "--out", str(tmp_path / "elsewhere/clips.jsonl")])
    assert os.path.isabs(lines_of(tmp_path / "elsewhere")[0]["video"])

@pytest.mark.parametrize("content, message", [
    (pickle.dumps({"a": Evil()}), "it asks for .*system"), (b"garbage", "raw-captions.pkl: "),
    (pickle.dumps([1, 2]), "expected a dictionary"), (pickle.dumps({"a": 5}), "not blank, got")])
def test_a_pickle_of_captions_executes_nothing(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, train_list__txt="a\n", test_list__txt="a\n", **{"raw-captions__pkl": content})
    write_videos(tmp_path, "a.avi")
    with pytest.raises(InputError, match=message) as error:
        main(["msvd", "."])
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()

@pytest.mark.parametrize("name, message", [("vatex", "no vatex_training_v1.0.json in "),
                                           ("msvd", "no raw-captions.pkl in ")])
def test_a_folder_without_annotation_or_videos_is_named(tmp_path, name, message):
    with pytest.raises(InputError, match="no videos in "):
        main([name, str(tmp_path)])
    write_videos(tmp_path, "a.mp4")
    with pytest.raises(InputError, match=message):
        main([name, str(tmp_path)])
    with pytest.raises(InputError, match="no folder .*nowhere"):
        main([name, str(tmp_path / "nowhere")])

@pytest.mark.parametrize("name", WRITERS)
def test_mutated_annotations_give_a_valid_file_or_one_clear_error(tmp_path, name):
    WRITERS[name](tmp_path)
    good = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    errors = 0
    for i in range(50):
        chosen = sorted(good)[i % len(good)]
        for file, content in good.items():
            changed = mutate(content, np.random.default_rng(i)) if file == chosen else content
            (tmp_path / file).write_bytes(changed)
        try:
            main([name, str(tmp_path)])
            train.load_json_lines(str(tmp_path / "clips.jsonl"))
        except InputError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), error
            errors += 1
    assert errors > 10
