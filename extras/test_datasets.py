"""Each converter's file is what a person would write by hand, and train.py trains on it."""
import json
import os
import pickle
import runpy
import shutil
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest

import train
from extras.datasets import main
from extras.test_core import Evil, mutate
from test_video_colbert import SMALL, write_clip
from video_colbert import InputError

@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """The bytes of a video of three frames."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mkv", 3).read_bytes()

def write(root, files):
    """Write {name: bytes, text, or anything that is to be JSON} below a folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            text = content if isinstance(content, str) else json.dumps(content)
            content = text.encode()
        path.write_bytes(content)

def convert(dataset, root, *flags):
    """Run the converter -> the clips in its file."""
    main([dataset, str(root), *flags])
    return clips_in(root / "clips.jsonl")

def clips_in(path):
    return list(map(json.loads, path.read_text().splitlines()))

def load(path):
    """The splits of a file as train.py reads it."""
    return train.load_clips(train.Settings(data=str(path)))

def msrvtt_captions(video):
    return [f"caption {i} of {video}" for i in range(3)]

def sentences(*videos, name="sentences", field="video_id"):
    """Captions of MSR-VTT, in CLIP4Clip's layout or with other names for the same."""
    texts = [(video, text) for video in videos for text in msrvtt_captions(video)]
    return {name: [{field: video, "caption": text, "id": 1} for video, text in texts]}

def ten(video):
    return [f"{video} {i}" for i in range(10)]

def vatex_records(*videos):
    return [{"videoID": video, "enCap": ten(video), "chCap": ["no"]} for video in videos]

def didemo_records(*pairs):
    return [{"video": video, "description": text, "times": [[4, 4]], "annotation_id": 1}
            for video, text in pairs]

def activitynet_record(*sentences):
    return {"duration": 82.73, "timestamps": [[0, 1]] * len(sentences), "sentences": sentences}

VIDEO_IDS = [f"video{i}" for i in range(5)]
MSRVTT_TEST = {"csv/MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\r\n"
               'ret0,msr1,video1,"the query, of 1"\r\nret1,msr4,video4,query 4\r\n'}
MSRVTT_9K = {"csv/MSRVTT_train.9k.csv": "video_id\nvideo0\nvideo3\n"}
FROZEN = {"annotation/MSR_VTT.json": sentences(*VIDEO_IDS, name="annotations", field="image_id")}
CLIP4CLIP = {"msrvtt_data/MSRVTT_data.json": sentences(*VIDEO_IDS)}
CHALLENGE = {"train_val_videodatainfo.json": sentences(*VIDEO_IDS[:3]),
             "test_videodatainfo.json": sentences(*VIDEO_IDS[3:])}
MSRVTT = {**CHALLENGE, **MSRVTT_TEST, **MSRVTT_9K}
MSVD = {"train_list.txt": "-4wsuPCjDBc_5_15\r\nb_1_2\r\n", "val_list.txt": "v_3_4\n",
        "test_list.txt": "t_5_6\n\n", "raw-captions.pkl": pickle.dumps({
            "-4wsuPCjDBc_5_15": [["a", "man"], ["a", "dog", "runs"]], "b_1_2": [["b"], "as text"],
            "v_3_4": [["val"]], "t_5_6": [["t", "one"], ["t", "two"]], "unused": 5}, protocol=2)}
VATEX = {"vatex_training_v1.0.json": vatex_records("Ptf_2VRj-V0_000122_000132", "b"),
         "vatex_validation_v1.0.json": vatex_records("c", "d"), "test_list.txt": "d\n"}
DIDEMO = {"train_data.json": didemo_records(("26292851@N04_42_26.m4v", "one "), ("x@N_1.mov", "é"),
                                            ("26292851@N04_42_26.m4v", "two")),
          "test_data.json": didemo_records(("y@N_3.avi", "the"), ("y@N_3.avi", "query"))}
ACTIVITYNET = {"train.json": {"v_QOlSCBRmfWY": activitynet_record("A man.", " He runs. "),
                              "v_b": activitynet_record("B.")},
               "val_1.json": {"v_c": activitynet_record("C.", "D."),
                              "v_e": activitynet_record("E.")}, "val_ids.json": ["v_c"]}

# {dataset: its annotation, its videos, the lines that a person would write}
DATASETS = {
    "msrvtt": (MSRVTT, ["video0.mp4", "video1.mp4", "video3.webm", "video4.mp4"], f"""
{{"video": "videos/video0.mp4", "captions": {
    json.dumps(msrvtt_captions("video0"))}, "split": "train"}}
{{"video": "videos/video3.webm", "captions": {
    json.dumps(msrvtt_captions("video3"))}, "split": "train"}}
{{"video": "videos/video1.mp4", "captions": ["the query, of 1"], "split": "test"}}
{{"video": "videos/video4.mp4", "captions": ["query 4"], "split": "test"}}
"""),
    "msvd": (MSVD, ["-4wsuPCjDBc_5_15.avi", "b_1_2.avi", "v_3_4.avi", "t_5_6.AVI"], """
{"video": "videos/-4wsuPCjDBc_5_15.avi", "captions": ["a man", "a dog runs"], "split": "train"}
{"video": "videos/b_1_2.avi", "captions": ["b", "as text"], "split": "train"}
{"video": "videos/v_3_4.avi", "captions": ["val"], "split": "val"}
{"video": "videos/t_5_6.AVI", "captions": ["t one", "t two"], "split": "test"}
"""),
    "vatex": (VATEX, ["Ptf_2VRj-V0_000122_000132.mp4", "b.mkv", "d.mp4"], f"""
{{"video": "videos/Ptf_2VRj-V0_000122_000132.mp4", "captions": {
    json.dumps(ten("Ptf_2VRj-V0_000122_000132"))}, "split": "train"}}
{{"video": "videos/b.mkv", "captions": {json.dumps(ten("b"))}, "split": "train"}}
{{"video": "videos/d.mp4", "captions": {json.dumps(ten("d"))}, "split": "test"}}
"""),
    "didemo": (DIDEMO, ["26292851@N04_42_26.mp4", "x@N_1.mov", "x@N_1.mp4", "y@N_3.avi.mp4"], """
{"video": "videos/26292851@N04_42_26.mp4", "captions": ["one two"], "split": "train", "end": 30}
{"video": "videos/x@N_1.mov", "captions": ["é"], "split": "train", "end": 30}
{"video": "videos/y@N_3.avi.mp4", "captions": ["the query"], "split": "test", "end": 30}
"""),
    "activitynet": (ACTIVITYNET, ["v_QOlSCBRmfWY.mp4", "b.mkv", "c.webm"], """
{"video": "videos/v_QOlSCBRmfWY.mp4", "captions": ["A man. He runs."], "split": "train"}
{"video": "videos/b.mkv", "captions": ["B."], "split": "train"}
{"video": "videos/c.webm", "captions": ["C. D."], "split": "test"}
""")}

def write_dataset(root, dataset, video, *missing):
    annotation, names, _ = DATASETS[dataset]
    write(root, annotation)
    write(root, {f"videos/{name}": video for name in names if name not in missing})

@pytest.mark.parametrize("dataset", DATASETS)
def test_the_file_is_what_a_person_would_write_and_trains(tmp_path, monkeypatch, video, dataset):
    """Word lists become captions, sentences a paragraph in the order of the file; English only; a
    leading dash is no option; a copy under another ending stands for its original, which goes
    first; names are with or without v_; a test video of MSR-VTT has the one query of its list."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", dataset, video)
    main([dataset, "data"])
    text = (tmp_path / "data/clips.jsonl").read_text()
    assert text == DATASETS[dataset][2].lstrip("\n")
    train.main([*SMALL, "--data", "data/clips.jsonl", "--pretrained", "none", "--epochs", "1",
                "--batch-size", "2", "--out", "run"])
    record = train.read_result("run")
    tested = [clip for clip in clips_in(Path("data/clips.jsonl")) if clip["split"] == "test"]
    assert record["gallery"] == len(tested) and record["missing"] == 0
    assert record["evaluation"][0]["queries"] == sum(len(clip["captions"]) for clip in tested)

@pytest.mark.parametrize("layout", [CLIP4CLIP, FROZEN, CHALLENGE])
@pytest.mark.parametrize("train_list, trained", [
    (MSRVTT_9K, ["video0", "video3"]), ({}, ["video0", "video2", "video3"])])
def test_all_copies_of_msrvtt_give_the_same_file(tmp_path, video, layout, train_list, trained):
    """Without the list of 9k videos, all that are not tested are trained on."""
    write(tmp_path, {**layout, **MSRVTT_TEST, **train_list})
    write(tmp_path, {f"MSRVTT/videos/all/{name}.mp4": video for name in VIDEO_IDS})
    clips = convert("msrvtt", tmp_path)
    captions = {clip["video"]: clip["captions"] for clip in clips if clip["split"] == "train"}
    assert captions == {f"MSRVTT/videos/all/{name}.mp4": msrvtt_captions(name) for name in trained}
    assert clips[len(trained):] == [
        {"video": f"MSRVTT/videos/all/{name}.mp4", "captions": [query], "split": "test"}
        for name, query in (("video1", "the query, of 1"), ("video4", "query 4"))]

def test_clip4clips_copy_is_the_same_with_and_without_conversion(tmp_path, video):
    write(tmp_path, {**CLIP4CLIP, **MSRVTT_TEST, **MSRVTT_9K})
    write(tmp_path, {f"videos/{name}.mp4": video for name in VIDEO_IDS})
    convert("msrvtt", tmp_path)
    settings = train.Settings(data="msrvtt", root=str(tmp_path))
    assert load(tmp_path / "clips.jsonl") == train.load_clips(settings)

@pytest.mark.parametrize("dataset, flags", [
    ("msrvtt", ""), ("msvd", ""), ("vatex", ""), ("didemo", " --num-frames 64 --num-tokens 64"),
    ("activitynet", " --num-frames 64 --num-tokens 64")])
def test_the_summary_ends_in_the_command_with_the_papers_frames_and_tokens(
        tmp_path, capsys, video, dataset, flags):
    write_dataset(tmp_path / "a folder", dataset, video)
    clips = convert(dataset, tmp_path / "a folder")
    printed = capsys.readouterr().out.splitlines()
    file = tmp_path / "a folder/clips.jsonl"
    assert printed[-1] == f"python train.py --data '{file}'{flags}"
    captions = {split: [len(clip["captions"]) for clip in clips if clip["split"] == split]
                for split in ("train", "val", "test")}
    assert printed[:-2] == [f"{split}: {len(n)} videos, {sum(n)} captions"
                            for split, n in captions.items() if n]
    settings = train.parse_settings(["--data", str(file), *flags.split()])
    assert (settings.num_frames, settings.num_tokens) == ((64, 64) if flags else (12, 32))

@pytest.mark.parametrize("dataset, lists, want", [
    ("vatex", {"train_list.txt": "b\n", "val_list.txt": "c\n"},
     "b.mkv train, c.mp4 val, d.mp4 test"),
    ("vatex", {"train_list.txt": "c\nb\n"}, "c.mp4 train, b.mkv train, d.mp4 test"),
    ("activitynet", {"train_ids.json": ["v_b"], "val_ids.json": ["v_e", "v_c"]},
     "b.mkv train, v_e.mp4 test, c.mp4 test"),
    ("didemo", {"train_data.json": didemo_records(("c.mp4", "one")),
                "val_data.json": didemo_records(("v_e.mp4", "two"))},
     "c.mp4 train, v_e.mp4 val, y@N_3.avi.mp4 test"),
    ("msvd", {"train_list.txt": "b_1_2\n", "val_list.txt": ""}, "b_1_2.avi train, t_5_6.AVI test"),
])
def test_lists_of_ids_choose_the_videos_of_each_split(tmp_path, video, dataset, lists, want):
    write_dataset(tmp_path, dataset, video)
    write(tmp_path, {"c.mp4": video, "v_e.mp4": video, **lists})
    clips = convert(dataset, tmp_path)
    names = [f"{Path(clip['video']).name} {clip['split']}" for clip in clips]
    assert ", ".join(names) == want

def test_a_copy_under_another_name_is_found_and_another_video_is_not(tmp_path, video):
    """`v_a` and `a` are one video, and so are `d.mov` and `d.mp4`; `c.1` and `c` are not."""
    names = ["a", "v_b", "d.mov", "c.1", "v_e.avi"]
    write(tmp_path, {"train.json": {name: activitynet_record("one") for name in names[:3]},
                     "val_1.json": {name: activitynet_record("one") for name in names[3:]}})
    write(tmp_path, {name: video for name in ("v_a.mkv", "b.mp4", "c.mp4", "d.mp4", "v_e.mp4")})
    assert [clip["video"] for clip in convert("activitynet", tmp_path)] == [
        "v_a.mkv", "b.mp4", "d.mp4", "c.1.mp4", "v_e.mp4"]

def test_missing_training_and_validation_videos_are_left_out_and_named(tmp_path, capsys, video):
    write_dataset(tmp_path, "vatex", video)
    write(tmp_path, {"val_list.txt": "c\n"})
    more = [f"m{i:02}" for i in range(30)]
    write(tmp_path, {"vatex_training_v1.0.json": vatex_records("b", *more)})
    clips = convert("vatex", tmp_path)
    assert [clip["video"] for clip in clips] == ["videos/b.mkv", "videos/d.mp4"]
    assert capsys.readouterr().out.splitlines() == [
        "train: 1 videos, 10 captions", "  30 more missing and left out:",
        *(f"    {name}.mp4" for name in more[:20]), "    ... and 10 more",
        "val: 0 videos, 0 captions", "  1 more missing and left out:", "    c.mp4",
        "test: 1 videos, 10 captions", f"wrote {tmp_path}/clips.jsonl; to train on it:",
        f"python train.py --data {tmp_path}/clips.jsonl"]

def test_missing_test_videos_stay_and_are_counted_by_train(tmp_path, monkeypatch, capsys, video):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", "activitynet", video)
    write(tmp_path / "data", {"val_ids.json": ["v_c", "v_e"]})
    clips = convert("activitynet", tmp_path / "data")
    assert [clip["video"] for clip in clips][2:] == ["videos/c.webm", "v_e.mp4"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:4] == [
        "test: 2 videos, 2 captions",
        "  1 of them missing and kept in the file; a result without them is not comparable:",
        "    v_e.mp4"]
    command = printed[-1].split()
    assert command[-1] == "--allow-missing"
    flags = [*SMALL, "--data", "data/clips.jsonl", "--epochs", "1", "--batch-size", "2"]
    with pytest.raises(InputError, match="1 of 2 test clips cannot be read; --allow-missing"):
        train.main(flags)
    train.main([*flags, "--out", "run", command[-1]])
    assert train.read_result("run")["missing"] == 1 and "v_e.mp4" in capsys.readouterr().err

def test_paths_are_relative_below_the_files_folder_and_absolute_elsewhere(tmp_path, monkeypatch,
                                                                          video):
    write_dataset(tmp_path / "data", "vatex", video, "d.mp4")      # the test video is missing
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for out, prefix, test in (
            ("data/clips.jsonl", "", "d.mp4"), ("clips.jsonl", "data/", "data/d.mp4"),
            ("data/videos/../clips.jsonl", "", "d.mp4"),
            ("other/clips.jsonl", f"{tmp_path}/data/", f"{tmp_path}/data/d.mp4")):
        main(["vatex", "data", "--out", out])
        clips = clips_in(Path(out))
        assert [clip["video"] for clip in clips][1:] == [f"{prefix}videos/b.mkv", test]
        assert os.path.exists(load(out)["train"][0].path)

@pytest.mark.parametrize("content, message", [
    (pickle.dumps({"a": Evil()}), "it asks for .*system"), (b"garbage", "."), (b"", "."),
    (b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.", "it asks for a b.c"),
    (pickle.dumps([1, 2]), r"expected a dict, got \[1, 2\]"),
    (pickle.dumps({"a": 5}), ""), (pickle.dumps({"a": "text"}), ""),
    (pickle.dumps({"a": [5]}), ""), (pickle.dumps({"a": [["a", 5]]}), "")])
def test_a_pickle_of_captions_executes_nothing(tmp_path, monkeypatch, content, message):
    """And captions that are none are one line, with the list that asks for them."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"train_list.txt": "a\n", "test_list.txt": "a\n", "a.avi": b"",
                     "raw-captions.pkl": content})
    where = "raw-captions.pkl holds no captions: " if message else "train_list.txt: expected .*cap"
    with pytest.raises(InputError, match=where + message) as error:
        main(["msvd", "."])
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()

def test_plain_containers_are_read_from_a_pickle(tmp_path, video):
    write_dataset(tmp_path, "msvd", video)
    captions = defaultdict(list, {"b_1_2": [("one", "b")], "t_5_6": ["t"]})
    for content in (captions, OrderedDict(captions)):
        write(tmp_path, {"raw-captions.pkl": pickle.dumps(content), "val_list.txt": "",
                         "train_list.txt": "b_1_2"})
        assert [clip["captions"] for clip in convert("msvd", tmp_path)] == [["one b"], ["t"]]

@pytest.mark.parametrize("dataset, file", [
    ("msrvtt", "MSRVTT_JSFUSION_test.csv"),
    ("msvd", "raw-captions.pkl"), ("msvd", "train_list.txt"), ("msvd", "test_list.txt"),
    ("vatex", "vatex_training_v1.0.json"), ("vatex", "vatex_validation_v1.0.json"),
    ("vatex", "test_list.txt"), ("didemo", "train_data.json"), ("didemo", "test_data.json"),
    ("activitynet", "train.json"), ("activitynet", "val_1.json")])
def test_a_missing_annotation_is_named_with_the_folder(tmp_path, video, dataset, file):
    write_dataset(tmp_path, dataset, video)
    next(tmp_path.rglob(file)).unlink()
    origin = ": it is in CLIP4Clip's msrvtt_data.zip" if dataset == "msrvtt" else "$"
    with pytest.raises(InputError, match=f"^no {file} in {tmp_path}{origin}"):
        main([dataset, str(tmp_path)])
    assert not (tmp_path / "clips.jsonl").exists()

def test_without_captions_of_msrvtt_all_names_are_told(tmp_path, video):
    write_dataset(tmp_path, "msrvtt", video)
    for name in CHALLENGE:
        (tmp_path / name).unlink()
    message = rf"^no MSRVTT_data.json, MSR_VTT.json or \*_videodatainfo.json in {tmp_path}$"
    with pytest.raises(InputError, match=message):
        main(["msrvtt", str(tmp_path)])

@pytest.mark.parametrize("dataset", DATASETS)
def test_a_folder_without_videos_is_named(tmp_path, dataset):
    write(tmp_path, DATASETS[dataset][0])
    with pytest.raises(InputError, match=rf"^no videos \(.mp4 .*\) in {tmp_path}$"):
        main([dataset, str(tmp_path)])
    with pytest.raises(InputError, match=f"^no folder {tmp_path}/nowhere$"):
        main([dataset, f"{tmp_path}/nowhere"])

TEST_CSV, TRAIN_CSV = *MSRVTT_TEST, *MSRVTT_9K

@pytest.mark.parametrize("dataset, files, flags, message", [
    ("msrvtt", {"test_videodatainfo.json": {}}, "",
     "test_videodatainfo.json: expected a list of sentences or annotations"),
    ("msrvtt", {"test_videodatainfo.json": {"sentences": [5]}}, "",
     "test_videodatainfo.json: expected a video_id, got 5"),
    ("msrvtt", {"test_videodatainfo.json": []}, "", r"test_videodatainfo.json: expected a dict"),
    ("msrvtt", {"test_videodatainfo.json": '{"sentences": ['}, "", "videodatainfo.json: .*line 1"),
    ("msrvtt", {"test_videodatainfo.json": b"\x00\xff"}, "", "test_videodatainfo.json: "),
    ("msrvtt", {TRAIN_CSV: "id\nvideo0\n"}, "", "9k.csv: expected the name of a video"),
    ("msrvtt", {TRAIN_CSV: "video_id\nvideo0\nvideo0\n"}, "", "9k.csv: .* each clip only once"),
    ("msrvtt", {TRAIN_CSV: "video_id\nvideo77\n"}, "", "9k.csv: expected a list.*video77"),
    ("msrvtt", {TEST_CSV: "video_id,sentence\nvideo1\n"}, "", "test.csv: expected a list of cap"),
    ("msrvtt", {TEST_CSV: "video_id,sentence\nvideo1,a\nvideo1,b\n"}, "", "each clip only once"),
    ("vatex", {"test_list.txt": "d\0\n"}, "", "test_list.txt: expected a list of captions"),
    ("activitynet", {"val_1.json": {"v_\0": activitynet_record("C.")}, "val_ids.json": ["v_\0"]},
     "", "val_ids.json: .*null"),
    ("activitynet", {"val_1.json": {"v_c": activitynet_record("\ud800")}}, "",
     "val_ids.json: .*surrogates"),
    ("vatex", {"vatex_training_v1.0.json": vatex_records("b", "b")}, "",
     "training_v1.0.json: expected each videoID only once"),
    ("vatex", {"vatex_training_v1.0.json": [{"videoID": 5, "enCap": ["a"]}]}, "",
     "training_v1.0.json: expected a videoID, got {'videoID': 5"),
    ("vatex", {"vatex_training_v1.0.json": {}}, "", "training_v1.0.json: expected a list, got {}"),
    ("vatex", {"vatex_training_v1.0.json": vatex_records("m", "n")}, "",
     "training_v1.0.json: none of its 2 videos is in "),
    ("vatex", {"test_list.txt": "\n"}, "", "test_list.txt: none of its 0 videos is in "),
    ("vatex", {"test_list.txt": "d\nd\n"}, "", "test_list.txt: expected each clip only once"),
    ("vatex", {"test_list.txt": "z\n"}, "",
     "test_list.txt: expected a list of captions that are not blank, got .'z', None"),
    ("didemo", {"train_data.json": didemo_records(("x@N_1.mov", 5))}, "",
     "train_data.json: expected a list of captions that are not blank"),
    ("didemo", {"train_data.json": ["x"]}, "", "train_data.json: expected a video, got 'x'"),
    ("activitynet", {"train.json": []}, "", r"train.json: expected a dict, got \[\]"),
    ("activitynet", {"train.json": {"v_b": {"sentences": "B."}}, "train_ids.json": [["v_b"]]}, "",
     "train_ids.json: expected a list of captions"),
    ("activitynet", {"train.json": {"v_b": {"sentences": ["B.", 5]}}}, "",
     "train.json: expected a list of captions that are not blank"),
    ("activitynet", {}, "--out /dev/null/clips.jsonl", "^/dev/null/clips.jsonl: File exists"),
    ("activitynet", {}, "--out clips.json", "^--out clips.json: .* ends in .jsonl"),
])
def test_what_makes_no_sense_is_one_line(tmp_path, monkeypatch, video, dataset, files, flags,
                                         message):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path, dataset, video)
    write(tmp_path, files)
    with pytest.raises(InputError, match=message) as error:
        main([dataset, ".", *flags.split()])
    assert "\n" not in str(error.value) and not (tmp_path / "clips.jsonl").exists()

def test_an_error_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["extras.datasets", "msvd", "nowhere"])
    monkeypatch.delitem(sys.modules, "extras.datasets")
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_module("extras.datasets", run_name="__main__")
    assert capsys.readouterr() == ("", "extras.datasets: no folder nowhere\n")

@pytest.mark.parametrize("dataset", DATASETS)
def test_50_mutated_annotations_give_a_valid_file_or_one_clear_error(tmp_path, video, dataset):
    annotation, _, want = DATASETS[dataset]
    write_dataset(tmp_path, dataset, video)
    content = {file: (tmp_path / file).read_bytes() for file in sorted(annotation)}
    outcomes = []
    for i in range(50):
        file = list(content)[i % len(content)]
        write(tmp_path, {**content, file: mutate(content[file], np.random.default_rng(i))})
        (tmp_path / "clips.jsonl").unlink(missing_ok=True)
        try:
            main([dataset, str(tmp_path)])
            data = load(tmp_path / "clips.jsonl")
            assert data["train"] and data["test"]
            outcomes.append("file")
        except InputError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), error
            outcomes.append("error")
    assert outcomes.count("error") > 10 and "file" in outcomes

def test_a_file_that_a_user_has_edited_is_not_overwritten(tmp_path, video, capsys):
    write_dataset(tmp_path, "msvd", video)
    main(["msvd", str(tmp_path)])
    main(["msvd", str(tmp_path)])  # the same lines
    with open(tmp_path / "clips.jsonl", "a") as file:
        file.write("{}\n")
    edited = (tmp_path / "clips.jsonl").read_bytes()
    with pytest.raises(InputError, match="clips.jsonl is there, with other lines: remove it, or"):
        main(["msvd", str(tmp_path)])
    assert (tmp_path / "clips.jsonl").read_bytes() == edited

def msrvtt_with_copies(root, video):
    """The challenge's copy, twice, and each video twice."""
    test = "video_id,sentence\nvideo9,a query\n"
    files = {"train_val_videodatainfo.json": sentences("video1"),
             "test_videodatainfo.json": sentences("video9"), "MSRVTT_JSFUSION_test.csv": test,
             "videos/video1.mp4": video, "videos/video9.mp4": video}
    write(root / "a", files)
    shutil.copytree(root / "a", root / "b")

def test_copies_of_files_are_one_file(tmp_path, video):
    msrvtt_with_copies(tmp_path, video)
    lines = convert("msrvtt", tmp_path)
    assert [line["captions"] for line in lines] == [msrvtt_captions("video1"), ["a query"]]

def test_a_video_that_was_re_encoded_beside_the_original_is_no_error(tmp_path, video):
    msrvtt_with_copies(tmp_path, video)
    (tmp_path / "b/videos/video1.mkv").write_text("the original")
    assert convert("msrvtt", tmp_path)[0]["video"] == "a/videos/video1.mp4"

@pytest.mark.parametrize("name", ["train_val_videodatainfo.json", "MSRVTT_JSFUSION_test.csv",
                                  "videos/video1.mp4", "videos/video9.mp4"])
def test_files_of_one_name_that_differ_are_refused(tmp_path, video, name):
    """The synthetic clips, for example, have MSR-VTT's names."""
    msrvtt_with_copies(tmp_path, video)
    (tmp_path / "b/videos/video5.mp4").write_text("another, which is not used")
    with open(tmp_path / "b" / name, "a") as file:
        file.write("\n")
    message = f"^{tmp_path}/a/{name} and {tmp_path}/b/{name} differ: use a folder with only one"
    with pytest.raises(InputError, match=message):
        convert("msrvtt", tmp_path)
    assert not (tmp_path / "clips.jsonl").exists()
