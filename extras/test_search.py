"""Search is exact, survives what happens to folders and processes, and engines agree with it."""
import copy
import itertools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import train
import video_colbert
from extras import search
from extras.search import VideoIndex, as_multivector, draw_hits, fingerprint, main
from test_video_colbert import Killed, naive, unit, write_clip
from video_colbert import (Config, InputError, VideoColBERT, frame_times, interactions,
                           mean_max_sim, mms_fv, read_settings, sample_frames)

CPU = torch.device("cpu")

QUERIES = ["a dog", "a red square moves left", "something"]

@pytest.fixture
def clips(tmp_path):
    """A folder with 12 clips of one colour each, in two folders, and what is no clip."""
    root = tmp_path / "clips"
    for i in range(12):
        picture = np.full((32, 48, 3), np.random.default_rng(i).integers(0, 256, 3), np.uint8)
        write_clip(root / (f"below/{i} 🐕.mkv" if i % 3 else f"{i}.mp4"), 20, picture=picture)
    (root / "broken.mp4").write_bytes(b"x")
    (root / "link.mp4").symlink_to("nowhere")
    (root / "again").symlink_to(root)                             # a circle
    (root / "notes.txt").write_text("x")
    return root

@pytest.fixture
def encoded(monkeypatch, tiny):
    """A list that gets the number of videos of each call of encode_video."""
    counts, encode = [], tiny.encode_video
    def counted(frames):
        counts.append(len(frames))
        return encode(frames)
    monkeypatch.setattr(tiny, "encode_video", counted)
    return counts

def names(index):
    return [path for path, *_ in index.videos]

def test_search_is_the_brute_force_ranking(tmp_path, clips, tiny):
    """Scores are exact for the stored vectors and near those of float32; F + V is the score; the
    best frame and its time are right; broken files and links in circles do no harm."""
    index, problems = VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=5)
    assert "link.mp4: No such file" in problems[0] and "broken.mp4: " in problems[1]
    paths = [str(clips / name) for name in names(index)]
    assert len(problems) == 2 and len(set(paths)) == 12
    with torch.no_grad():
        F, V = tiny.encode_video(torch.stack([sample_frames(p, 6, 64) for p in paths]))
        ids, mask = tiny.tokenize(QUERIES)
        Q = tiny.encode_query(ids, mask)
    want = naive(Q, F, mask) + naive(Q, V, mask)
    stored = np.fromfile(tmp_path / "index/vectors-0.f16", np.float16).reshape(12, 14, 64)
    stored = torch.from_numpy(stored).double()
    exact = naive(Q.double(), stored[:, :6], mask) + naive(Q.double(), stored[:, 6:], mask)
    for q, hits in enumerate(VideoIndex.load(tmp_path / "index").search(tiny, QUERIES, 12)):
        scores = torch.tensor([hit["score"] for hit in hits])
        columns = [paths.index(hit["path"]) for hit in hits]
        assert sorted(columns) == list(range(12)) and (scores[:-1] >= scores[1:]).all()
        assert (scores - want[q, columns]).abs().max() < 2e-3
        assert (scores - exact[q, columns]).abs().max() < 1e-5
        for hit, b in zip(hits, columns):
            assert hit["F"] + hit["V"] == pytest.approx(hit["score"], abs=1e-6)
            n = ((Q[q] @ F[b].T).sum(0) + (Q[q] @ V[b, :6].T).sum(0)).argmax().item()
            span = n, round(n / 3, 2), round((n + 1) / 3, 2)      # 2 seconds in 6 parts
            assert (hit["frame"], hit["start"], hit["end"]) == span

def test_videos_are_found_by_their_ending_in_order_and_links_are_followed_once(tmp_path):
    numbered = [f"{i}/{i}.ts" for i in range(8)]
    for name in ("root/z/2.MP4", "root/z/1.mkv", "root/b/3.avi", "root/b/notes.txt", "away/4.webm",
                 *(f"root/{name}" for name in reversed(numbered))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    root = tmp_path / "root"
    for name, target in (("m", tmp_path / "away"), ("n", tmp_path / "away"), ("y", root)):
        (root / name).symlink_to(target)
    found = [os.path.relpath(path, root) for path in search.video_files(root)]
    assert found == [*numbered, "b/3.avi", "m/4.webm", "z/1.mkv", "z/2.MP4"]

def test_a_video_is_demuxed_once(tmp_path, clips, tiny, monkeypatch):
    calls, frame_times = [], video_colbert.frame_times
    def counted(path):
        calls.append(path)
        return frame_times(path)
    monkeypatch.setattr(search, "frame_times", counted)
    monkeypatch.setattr(video_colbert, "frame_times", counted)
    VideoIndex.build(clips, tiny, tmp_path / "index")
    assert len(calls) == len(set(calls)) == 13                    # 12 and the broken one

def test_an_index_is_brought_up_to_date_by_what_changed_alone(tmp_path, clips, tiny, encoded):
    def build(folder="index"):
        return VideoIndex.build(clips, tiny, tmp_path / folder, batch_size=1)[0]
    build(), build()
    assert sum(encoded) == 12
    write_clip(clips / "new.mp4", 5)
    assert len(build().videos) == 13 == sum(encoded)
    (clips / "0.mp4").unlink()
    write_clip(clips / "3.mp4", 7)
    index = build()
    assert sum(encoded) == 14 and "0.mp4" not in names(index) and len(index.videos) == 12
    fresh = build("fresh")
    order = [names(fresh).index(name) for name in names(index)]
    assert torch.equal(index.vectors, fresh.vectors[order])
    assert set(os.listdir(tmp_path / "index")) - {"lock"} == {"index.json", "vectors-1.f16"}

@pytest.mark.parametrize("size, mtime", [(0, 1), (1, 0)])
def test_a_file_of_another_size_or_time_is_encoded_again(tmp_path, clips, tiny, encoded, size,
                                                         mtime):
    VideoIndex.build(clips, tiny, tmp_path / "index")
    status = os.stat(clips / "3.mp4")
    with open(clips / "3.mp4", "ab") as file:
        file.write(bytes(size))
    os.utime(clips / "3.mp4", ns=(0, status.st_mtime_ns + mtime))
    VideoIndex.build(clips, tiny, tmp_path / "index")
    assert sum(encoded) == 13

def test_a_killed_build_continues(tmp_path, clips, tiny, monkeypatch, encoded):
    """What was saved is not encoded again, and the end is that of an undisturbed build. Only a
    build accepts an array that goes on after the last saved list."""
    whole, _ = VideoIndex.build(clips, tiny, tmp_path / "whole", batch_size=1)
    encode, calls = tiny.encode_video, itertools.count()
    def copy_index(frames):                                       # what a kill -9 here would leave
        if next(calls) == 3:
            shutil.copytree(tmp_path / "killed", tmp_path / "index")
        return encode(frames)
    with monkeypatch.context() as patch:
        patch.setattr(search, "SAVE_EVERY", 1)
        patch.setattr(tiny, "encode_video", copy_index)
        VideoIndex.build(clips, tiny, tmp_path / "killed", batch_size=1)
    assert len(VideoIndex.load(tmp_path / "index").videos) == 3
    with open(tmp_path / "index/vectors-0.f16", "ab") as file:
        file.write(b"what came after the last save")
    with pytest.raises(InputError, match="its build was killed: run index again"):
        VideoIndex.load(tmp_path / "index")
    before = sum(encoded)
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert sum(encoded) - before == 9 and index.videos == whole.videos
    assert torch.equal(index.vectors, whole.vectors)

def test_a_long_build_saves_on_the_way(tmp_path, clips, tiny, monkeypatch):
    """With SAVE_EVERY 5 and batches of 2, after 5 videos and 10, and at both ends."""
    saved, write_file = [], search.write_file
    def counted(path, content):
        saved.append(len(json.loads(content)["videos"]))
        write_file(path, content)
    monkeypatch.setattr(search, "SAVE_EVERY", 5)
    monkeypatch.setattr(search, "write_file", counted)
    VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=2)
    assert saved == [0, 5, 10, 12]

@pytest.mark.parametrize("stop, message", [
    (KeyboardInterrupt, "^stopped with 4 videos in .*index; the same command continues$"),
    (Killed, "")])
@pytest.mark.parametrize("where, call", [("autocast", 4), ("open", 5)])
def test_ctrl_c_and_errors_keep_what_is_encoded(tmp_path, clips, tiny, monkeypatch, encoded, stop,
                                                message, where, call):
    """At the start of a batch, and when a video's vectors are written but its name is not listed:
    the array is opened once before the first video and then for each."""
    calls, function = itertools.count(), {"autocast": search.autocast, "open": open}[where]
    def stopped(*args):
        if next(calls) == call:
            if where == "open":
                function(*args).write(b"vectors")
            raise stop
        return function(*args)
    with monkeypatch.context() as patch, pytest.raises(stop) as error:
        patch.setattr(search, where, stopped, raising=False)
        VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert re.search(message, str(error.value))
    assert len(VideoIndex.load(tmp_path / "index").videos) == 4
    before = sum(encoded)
    VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert sum(encoded) - before == 8

def test_two_processes_do_not_build_one_index(tmp_path, clips, tiny, monkeypatch):
    """The second leaves with one line and code 2, and the first is not disturbed."""
    tiny.save(tmp_path / "model")
    encode, results = tiny.encode_video, []
    def second_process(frames):
        command = [sys.executable, "-m", "extras.search", "index", str(clips), "--device", "cpu",
                   "--model", str(tmp_path / "model"), "--out", str(tmp_path / "index")]
        results.append(subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True,
                                      text=True, timeout=100))
        return encode(frames)
    monkeypatch.setattr(tiny, "encode_video", second_process)
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    result, = results
    assert result.returncode == 2 and len(index.videos) == 12
    assert result.stderr == (f"extras.search: another process is at work on {tmp_path}/index; try "
                             "again later\n")

ARRAY_SIZE = 12 * (6 + 8) * 64 * 2

@pytest.mark.parametrize("name, size", [("vectors-0.f16", ARRAY_SIZE - 1), ("vectors-0.f16", None),
                                        ("vectors-0.f16", ARRAY_SIZE + 1), ("index.json", 100),
                                        ("index.json", 0), ("index.json", None)])
def test_a_damaged_index_is_refused_with_its_name(tmp_path, clips, tiny, name, size):
    """Too short, too long, or gone. A build repairs only what an earlier build may have left."""
    VideoIndex.build(clips, tiny, tmp_path / "index")
    path = tmp_path / "index" / name
    path.unlink() if size is None else os.truncate(path, size)
    with pytest.raises(InputError, match="index is not a complete index: ") as error:
        VideoIndex.load(tmp_path / "index")
    assert "\n" not in str(error.value)
    if name == "vectors-0.f16" and size != ARRAY_SIZE + 1:
        with pytest.raises(InputError, match="index is not a complete index: "):
            VideoIndex.build(clips, tiny, tmp_path / "index")

def test_index_json_of_something_else_is_refused(tmp_path):
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(InputError, match="is not a complete index: "):
        VideoIndex.load(tmp_path)

def test_an_index_belongs_to_its_model_and_its_videos(tmp_path, clips, tiny):
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index", name="mine")
    torch.manual_seed(1)
    other = VideoColBERT(Config(backbone="tiny", num_frames=6)).eval()
    with pytest.raises(InputError, match=r"made by another model \(mine\), or its weights"):
        index.search(other, ["a dog"], 1)
    for name, message in (("mine", "the model's weights or settings have changed since"),
                          ("other", "it was made by mine, not other")):
        with pytest.raises(InputError, match=f"{message}: index into a new folder"):
            VideoIndex.build(clips, other, tmp_path / "index", name=name)
    with pytest.raises(InputError, match="has none of the videos in .*below"):
        VideoIndex.build(clips / "below", tiny, tmp_path / "index")
    with pytest.raises(InputError, match="notes.txt: File exists"):
        VideoIndex.build(clips, tiny, clips / "notes.txt")
    with pytest.raises(InputError, match="no folder .*nowhere"):
        VideoIndex.build(tmp_path / "nowhere", tiny, tmp_path / "other")
    with pytest.raises(InputError, match="interaction mp has none"):
        pooled = VideoColBERT(Config(backbone="tiny", interaction="mp"))
        VideoIndex.build(clips, pooled, tmp_path / "other")

def test_a_folder_that_moved_is_not_encoded_again(tmp_path, clips, tiny, encoded):
    """If its files still have their names, sizes and times; else it is another folder."""
    VideoIndex.build(clips, tiny, tmp_path / "index", name="mine")
    clips.rename(tmp_path / "moved")
    index, _ = VideoIndex.build(tmp_path / "moved", tiny, tmp_path / "index")
    assert sum(encoded) == 12 and index.meta["root"] == str(tmp_path / "moved")
    assert index.meta["model"] == "mine"                          # also if the name is not repeated
    assert os.path.exists(index.search(tiny, ["a dog"], 1)[0][0]["path"])
    (tmp_path / "moved").rename(tmp_path / "other")
    for path, *_ in index.videos:
        os.utime(tmp_path / "other" / path, ns=(0, 0))
    with pytest.raises(InputError, match="is an index of .*moved and has none of the videos in .*"
                                         "other: index into a new folder"):
        VideoIndex.build(tmp_path / "other", tiny, tmp_path / "index")

def test_a_fingerprint_changes_with_what_changes_vectors_alone(tiny):
    """Settings of Q, F and V, every weight, mean and std; not the settings or scale of the loss."""
    model, settings, changes = copy.deepcopy(tiny), tiny.config, set()
    for field in fields(Config):
        model.config = replace(settings, **{field.name: "another"})
        if fingerprint(model) != fingerprint(tiny):
            changes.add(field.name)
    assert changes == {
        "backbone", "num_frames", "num_tokens", "pad_token", "query_augmentation",
        "temporal_layers", "visual_expansion", "interaction"}
    model.config = settings
    for name in ("logit_scale", "logit_bias", "mean", "std", "clip.text.positional_embedding",
                 "temporal.visual_expansion"):
        value = model.state_dict()[name]                          # shares the model's memory
        value += 1
        assert (fingerprint(model) == fingerprint(tiny)) == name.startswith("logit_")
        value.copy_(tiny.state_dict()[name])

def test_few_videos_give_few_hits_and_none_an_error(tmp_path, clips, tiny):
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    assert len(index.search(tiny, ["a dog"], 99)[0]) == 12
    for k in (0, -1):
        with pytest.raises(InputError, match="k must be at least 1"):
            index.search(tiny, ["a dog"], k)
    for query in ("", " "):
        with pytest.raises(InputError, match="the query is empty"):
            index.search(tiny, ["a dog", query])
    (tmp_path / "none").mkdir()
    index, _ = VideoIndex.build(tmp_path / "none", tiny, tmp_path / "empty")
    with pytest.raises(InputError, match="empty is empty"):
        index.search(tiny, ["a dog"])

def test_scores_do_not_depend_on_the_pieces_that_they_are_computed_in(tmp_path):
    meta = dict(num_frames=3, visual_expansion=1, width=8, videos=[])
    index, Q, mask = VideoIndex(tmp_path, meta), unit(4, 5, 8), torch.rand(4, 5) < 0.6
    mask[:, 0] = True
    for B in (0, 1024, 2500):
        index.vectors = unit(B, 7, 8).half()
        F, V = index.vectors[:, :3].float(), index.vectors[:, 3:].float()
        for level, want in zip(index.scores(Q, mask), (naive(Q, F, mask), naive(Q, V, mask))):
            assert level.shape == (4, B) and ((level - want).abs() < 1e-6).all()

def test_a_large_index_opens_without_being_read(tmp_path):
    """More on paper than this machine has, a sparse file: opening it adds next to nothing."""
    videos = [[f"{i}.mp4", 1, 1, 1.0] for i in range(100_000)]
    meta = dict(root="/", model="", fingerprint="", num_frames=400, visual_expansion=0, width=1024,
                vectors="vectors-0.f16", videos=videos)
    (tmp_path / "index.json").write_text(json.dumps(meta))
    with open(tmp_path / "vectors-0.f16", "wb") as file:
        file.truncate(2 * 100_000 * 800 * 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = VideoIndex.load(tmp_path)
    assert index.vectors.shape == (100_000, 800, 1024) and index.vectors[99_999].float().sum() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000           # kB

# ---- Moments of long videos ----------------------------------------------------------------------
META = {"segment": 10.0, "stride": 4.0}

@pytest.mark.parametrize("seconds, starts", [
    (3.0, [0]), (10.0, [0]), (10.5, [0, 0.5]), (14.0, [0, 4]), (17.0, [0, 4, 7]),
    (18.0, [0, 4, 8])])
def test_segments_cover_a_video_to_its_end(seconds, starts):
    count = search.segment_count(META, seconds)
    spans = [search.segment_span(META, seconds, i) for i in range(count)]
    assert spans == [(start, min(start + 10.0, seconds)) for start in starts]

def write_long_video(path, pictures, seconds=2, rate=10):
    """A video that shows each picture (H, W, 3), or list of pictures, one after the other."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": "24"})
        stream.height, stream.width = np.asarray(pictures[0]).shape[-3:-1]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            shown = [picture] * seconds * rate if np.ndim(picture) == 3 else picture
            for frame in shown:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    return path

def random_pictures(count):
    return list(np.random.default_rng(0).integers(0, 256, (count, 32, 48, 3), dtype=np.uint8))

def test_each_segment_is_encoded_as_the_part_of_the_video_that_it_is(tmp_path, tiny, monkeypatch):
    """In pieces of 4 segments, next to a short video, with batches that span both."""
    (tmp_path / "clips").mkdir()
    write_long_video(tmp_path / "clips/long.mp4", random_pictures(12))
    write_long_video(tmp_path / "clips/short.mp4", random_pictures(2))
    monkeypatch.setattr(search, "PIECE", 4)
    index, problems = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index", batch_size=3,
                                       segment=5.0, stride=2.0)
    spans = [(0, 5), (2, 7), (4, 9), (6, 11), (8, 13), (10, 15), (12, 17), (14, 19), (16, 21),
             (18, 23), (19, 24)]
    rows = [("long.mp4", start, end) for start, end in spans] + [("short.mp4", 0, 4)]
    assert not problems and len(index.vectors) == 12 and len(index.videos) == 2
    for row, (name, start, end) in enumerate(rows):
        path = str(tmp_path / "clips" / name)
        assert index.segment(row) == (path, start, end)
        with torch.no_grad():
            F, V = tiny.encode_video(sample_frames(path, 6, 64, start, end)[None])
        assert (index.vectors[row] - torch.cat([F, V], 1)[0]).abs().max() < 1e-3

def test_a_video_that_breaks_off_leaves_no_segment_behind(tmp_path, tiny, monkeypatch):
    """Its first piece can be decoded, its third cannot; the videos around it are complete."""
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_long_video(tmp_path / "clips" / name, random_pictures(12))
    read = search.read_segments
    def breaks_off(path, times, parts, *args):
        if path.endswith("b.mp4") and parts[0][0] > 12:
            raise InputError(f"{path}: broken")
        return read(path, times, parts, *args)
    monkeypatch.setattr(search, "PIECE", 3)
    monkeypatch.setattr(search, "read_segments", breaks_off)
    flags = dict(batch_size=4, segment=4.0, stride=2.0)
    index, problems = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index", **flags)
    assert problems == [f"{tmp_path}/clips/b.mp4: broken"]
    assert names(index) == ["a.mp4", "c.mp4"] and len(index.vectors) == 22
    assert torch.equal(index.vectors[:11], index.vectors[11:])
    monkeypatch.setattr(search, "read_segments", read)
    (tmp_path / "clips/a.mp4").unlink()
    index, problems = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index", **flags)
    assert not problems and names(index) == ["c.mp4", "b.mp4"] and len(index.vectors) == 22
    assert torch.equal(index.vectors[:11], index.vectors[11:])

def test_the_segment_of_an_index_cannot_change(tmp_path, clips, tiny):
    VideoIndex.build(clips, tiny, tmp_path / "index", segment=1.0)
    for segment, stride in ((0, 0), (2.0, 0.5), (1.0, 0.25)):
        with pytest.raises(InputError, match="was made with --(segment 1.0|stride 0.5): keep that"):
            VideoIndex.build(clips, tiny, tmp_path / "index", segment=segment, stride=stride)
    for segment, stride in ((-1.0, 0), (math.nan, 0), (math.inf, 0), (1.0, 2.0), (1.0, -1.0),
                            (0, 1)):
        with pytest.raises(InputError, match="expected seconds, the stride at most the segment"):
            VideoIndex.build(clips, tiny, tmp_path / "new", segment=segment, stride=stride)

def test_overlapping_segments_are_one_hit(tmp_path, tiny, monkeypatch):
    """Against a walk over all segments from best to worst, first without joining any."""
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_long_video(tmp_path / "clips" / name, random_pictures(20))
    index, _ = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index", segment=3.0,
                                stride=0.5)
    sim, want = torch.rand(1, len(index.vectors)), []
    monkeypatch.setattr(index, "scores", lambda Q, mask: (sim, sim))
    monkeypatch.setattr(search, "MERGE", -1.0)
    for row in sim[0].argsort(descending=True).tolist():
        path, start, end = index.segment(row)
        if all(path != p or end <= s or start >= e for p, s, e in want):
            want.append((path, start, end))
    for k in (1, 3, 8):
        hits, = index.search(tiny, ["a dog"], k)
        assert [(hit["path"], hit["start"], hit["end"]) for hit in hits] == want[:k]
    monkeypatch.setattr(search, "MERGE", 1.0)
    hits, = index.search(tiny, ["a dog"], 8)
    assert any(hit["end"] - hit["start"] > 3 for hit in hits)
    for a, b in itertools.combinations(hits, 2):
        assert a["path"] != b["path"] or a["end"] <= b["start"] or b["end"] <= a["start"]

def test_a_moment_longer_than_a_segment_is_joined_from_its_segments(tmp_path, tiny, monkeypatch):
    """Segments 4 to 7 score 0.9 or a little less, those around them less than MERGE allows."""
    (tmp_path / "clips").mkdir()
    write_long_video(tmp_path / "clips/a.mp4", random_pictures(20))
    index, _ = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index", segment=4.0)
    sim = torch.full((1, len(index.vectors)), 0.1)
    sim[0, 3:9] = torch.tensor([0.8, 0.89, 0.9, 0.89, 0.88, 0.8])
    monkeypatch.setattr(index, "scores", lambda Q, mask: (sim, sim))
    hit = index.search(tiny, ["a dog"], 1)[0][0]
    assert (hit["start"], hit["end"], hit["score"]) == (8.0, 18.0, pytest.approx(1.8))

def test_a_moment_and_the_number_of_hits_do_not_depend_on_k(tmp_path, tiny, monkeypatch):
    """A long video of which all fits nearly as well, and 30 others: the best hit is joined from
    many segments, and there are k hits nevertheless."""
    (tmp_path / "clips").mkdir()
    write_long_video(tmp_path / "clips/a.mp4", random_pictures(40))
    for i in range(30):
        write_long_video(tmp_path / f"clips/b{i}.mp4", random_pictures(1))
    index, _ = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index", segment=4.0,
                                stride=1.0)
    sim = torch.cat([0.9 + 0.01 * torch.rand(77), 0.3 * torch.rand(30)])[None]
    monkeypatch.setattr(index, "first_row", np.cumsum([0, 77, *[1] * 30]))
    monkeypatch.setattr(index, "scores", lambda Q, mask: (sim - 0.8, sim - 0.8))
    best = [index.search(tiny, ["a dog"], k)[0] for k in (1, 5, 20)]
    assert [len(hits) for hits in best] == [1, 5, 20]
    assert len({(hits[0]["start"], hits[0]["end"]) for hits in best}) == 1

def test_a_video_of_one_frame_is_found(tmp_path, tiny):
    write_clip(tmp_path / "clips/a.mp4", 1)
    ticks, _, tick, keys = frame_times(tmp_path / "clips/a.mp4")
    def no_length(path):
        return ticks, ticks[0] + 1, 1e-5, keys
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "frame_times", no_length)
        index, problems = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index")
    assert not problems and index.search(tiny, ["a dog"])[0][0]["path"].endswith("a.mp4")

def test_a_video_with_more_segments_than_frames_is_a_problem(tmp_path, tiny):
    write_clip(tmp_path / "clips/a.mkv", 20, times=[*range(19), 100_000])
    index, problems = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index", segment=10.0)
    assert not index.videos and "segments of 20 frames; its times are wrong" in problems[0]

def overfitted(tmp_path):
    """A model that knows 12 clips of random pictures, and the clips."""
    clips, s = [], train.parse_settings([
        "--num-frames", "4", "--num-tokens", "8", "--epochs", "30", "--batch-size", "12",
        "--captions-per-video", "1", "--cache", f"{tmp_path}/cache"])
    pictures = iter(random_pictures(48))
    for i in range(12):
        path = write_long_video(tmp_path / f"{i}.mp4", [next(pictures) for _ in range(4)], 1)
        clips.append(train.Clip(str(path), [f"video {'abcdefghijkl'[i]}"] * 5))
    model = VideoColBERT(s)
    train.train(model, {"train": clips, "val": [], "test": []}, s, CPU, tmp_path, "data")
    return model.eval(), clips

def test_the_query_of_a_clip_finds_its_moment_in_a_long_video(tmp_path):
    """Of clips in a row, four of five spans with an intersection over union above 0.5. With
    RUN=runs/shapes, on 40 of that run's test clips."""
    if "RUN" in os.environ:
        model = VideoColBERT.load(os.environ["RUN"])
        s = read_settings(train.Settings, f"{os.environ['RUN']}/settings.json")
        clips = train.load_clips(s)["test"][:40]
    else:
        model, clips = overfitted(tmp_path)
    pictures, seconds = [], []
    for clip in clips:
        ticks, end, tick, _ = frame_times(clip.path)
        seconds.append(round((end - ticks[0]) * tick, 1))
        frames = sample_frames(clip.path, round(10 * seconds[-1]), 96)
        pictures.append(list(frames.permute(0, 2, 3, 1).numpy()))
    (tmp_path / "videos").mkdir()
    write_long_video(tmp_path / "videos/long.mp4", pictures)
    index, _ = VideoIndex.build(tmp_path / "videos", model, tmp_path / "index",
                                segment=float(np.median(seconds)))
    overlaps, starts = [], np.cumsum([0, *seconds])
    for (hit, *_), start, end in zip(index.search(model, [clip.captions[0] for clip in clips]),
                                     starts, starts[1:]):
        shared = max(0, min(hit["end"], end) - max(hit["start"], start))
        overlaps.append(shared / (hit["end"] - hit["start"] + end - start - shared))
    found = sum(overlap > 0.5 for overlap in overlaps)
    print(f"{found} of {len(clips)} moments, mean IoU {np.mean(overlaps):.2f}")
    assert found >= 0.8 * len(clips)

def test_a_moment_is_printed_as_minutes_and_seconds_and_drawn(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()
    write_long_video(tmp_path / "clips/long.mp4", random_pictures(50))
    tiny.save("model")
    main(["index", "clips", "--model", "model", "--out", "index", "--device", "cpu",
          "--segment", "10"])
    assert capsys.readouterr().out == "1 videos, 19 segments in index\n"
    main(["search", "index", "a dog", "-k", "2", "--json", "--device", "cpu"])
    hits = json.loads(capsys.readouterr().out)
    main(["search", "index", "a dog", "-k", "2", "--sheet", "sheet.png", "--device", "cpu"])
    for hit, line in zip(hits, capsys.readouterr().out.splitlines(), strict=True):
        assert hit["start"] % 5 == 0 and hit["end"] - hit["start"] == 10
        start, end = int(hit["start"]), int(hit["end"])
        assert line.endswith(f"{start // 60:02}:{start % 60:02} to {end // 60:02}:{end % 60:02}")
    frame = sample_frames("clips/long.mp4", 6, 88, hits[1]["start"], hits[1]["end"])[0]
    strip = np.asarray(Image.open("sheet.png"))[40 + 130 + 24:40 + 130 + 24 + 88, 12:12 + 88]
    assert np.abs(strip.astype(int) - frame.permute(1, 2, 0).numpy()).mean() < 1

def test_an_index_made_before_there_were_segments_opens_and_is_brought_up_to_date(
        tmp_path, clips, tiny, encoded):
    VideoIndex.build(clips, tiny, tmp_path / "index")
    meta = json.loads((tmp_path / "index/index.json").read_text())
    (tmp_path / "index/index.json").write_text(json.dumps(
        {name: value for name, value in meta.items() if name not in ("segment", "stride")}))
    before = sum(encoded)
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    assert len(index.videos) == 12 and sum(encoded) == before
    assert len(VideoIndex.load(tmp_path / "index").search(tiny, ["a dog"], 3)[0]) == 3

# ---- Engines -------------------------------------------------------------------------------------
@pytest.mark.parametrize("M, N, E", [(32, 12, 2), (5, 1, 0), (1, 4, 3)])
def test_as_multivector_makes_the_two_level_score_one_maxsim(M, N, E):
    """3 / M MaxSim - 4 = MMS_FV, also where every match of the wrong kind is perfect."""
    Q, F, V = (unit(n, m, 16, dtype=torch.float64) for n, m in ((4, M), (6, N), (6, N + E)))
    F[0], V[0] = Q[0, 0], -Q[0, 0]
    q, v = as_multivector(Q, Q), as_multivector(F, V)
    assert q.shape == (4, 2 * M, 18) and v.shape == (6, 2 * N + E, 18)
    assert (q.norm(dim=-1) - 1).abs().max() < 1e-12
    maxsim = torch.einsum("amd,bnd->abmn", q, v).amax(-1).sum(-1)
    want = mms_fv(mean_max_sim(Q, F), mean_max_sim(Q, V))
    assert (3 / M * maxsim - 4 - want).abs().max() < 1e-12

def engine_queries(tmp_path, monkeypatch, clips, tiny):
    """An index, to be exported in three batches, and for each query its multivector, its number of
    tokens and our ten hits."""
    monkeypatch.setattr(VideoIndex.multivectors, "__defaults__", (5,))
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    cases = []
    for query, hits in zip(QUERIES, index.search(tiny, QUERIES, 10)):
        ids, mask = tiny.tokenize([query])
        with torch.no_grad():
            Q = tiny.encode_query(ids, mask)[mask]                # (M, d)
        cases.append((as_multivector(Q, Q).tolist(), len(Q), hits))
    return index, cases

def assert_same_hits(index, paths, maxsims, M, hits):
    want = [os.path.relpath(hit["path"], index.meta["root"]) for hit in hits]
    assert paths == want
    scores = [3 / M * maxsim - 4 for maxsim in maxsims]
    assert scores == pytest.approx([hit["score"] for hit in hits], abs=1e-4)

def test_lancedb_ranks_by_the_two_level_score(tmp_path, monkeypatch, clips, tiny):
    """Its distance is the sum over the query's vectors of 1 - best cosine."""
    pytest.importorskip("lancedb")
    index, cases = engine_queries(tmp_path, monkeypatch, clips, tiny)
    table = index.to_lancedb(str(tmp_path / "lance"))
    for vectors, M, hits in cases:
        found = table.search(vectors).distance_type("cosine").limit(10).to_list()
        maxsims = [2 * M - row["_distance"] for row in found]
        assert_same_hits(index, [row["path"] for row in found], maxsims, M, hits)

def synthetic_index(folder, count, d=64, N=12, E=2):
    """An index of videos whose frames are alike, about 100 to a topic, and 50 queries of 12 tokens
    near the frames of one video each -> the index, Q (50, 12, d)."""
    topics = unit(max(1, count // 100), d)
    videos = topics[torch.randint(len(topics), (count,))] + 0.7 * unit(count, d)
    F = normalize(normalize(videos, dim=-1)[:, None] + 0.6 * unit(count, N, d), dim=-1)
    V = normalize(F.mean(1, keepdim=True) + 0.6 * unit(count, N + E, d), dim=-1)
    meta = dict(root="/", model="", fingerprint="", num_frames=N, visual_expansion=E, width=d,
                vectors="vectors-0.f16", videos=[[f"{i}.mp4", 1, 1, 1.0] for i in range(count)])
    folder.mkdir()
    (folder / "vectors-0.f16").write_bytes(torch.cat([F, V], 1).half().numpy().tobytes())
    (folder / "index.json").write_text(json.dumps(meta))
    frames = F[torch.randint(count, (50,))][:, torch.randint(N, (12,))]
    return VideoIndex.load(folder), normalize(frames + 0.8 * unit(50, 12, d), dim=-1)

def index_of_a_run(folder, run):
    """An index of all videos in the folder of a run's clips, and Q of 50 of its captions."""
    model, s = VideoColBERT.load(run), read_settings(train.Settings, f"{run}/settings.json")
    clips = train.load_clips(s)["train"]
    root = os.path.commonpath([os.path.dirname(clip.path) for clip in clips])
    index, _ = VideoIndex.build(root, model, folder)
    ids, mask = model.tokenize([clip.captions[0] for clip in clips[:50]])
    assert mask.all()
    with torch.no_grad():
        return index, model.encode_query(ids, mask)

def test_the_vector_index_of_lancedb_finds_the_exact_ten(tmp_path):
    """Nearly, of 1,000 synthetic videos or VIDEOS of them, or of all videos of RUN's clips."""
    pytest.importorskip("lancedb")
    if "RUN" in os.environ:
        index, Q = index_of_a_run(tmp_path / "index", os.environ["RUN"])
    else:
        index, Q = synthetic_index(tmp_path / "index", int(os.environ.get("VIDEOS", 1000)))
    started = time.perf_counter()
    want = mms_fv(*index.scores(Q, torch.ones(Q.shape[:2]))).topk(10).indices.tolist()
    milliseconds = [1000 * (time.perf_counter() - started) / len(Q)]
    table = index.to_lancedb(str(tmp_path / "lance"), partitions=16 if len(index.videos) < 5000
                             else 256)
    rows, recall = {video[0]: i for i, video in enumerate(index.videos)}, []
    for settings in (dict(nprobes=16, refine_factor=10), dict(bypass_vector_index=())):
        found, started = [], time.perf_counter()
        for q in as_multivector(Q, Q).numpy():
            search = table.search(q).distance_type("cosine").limit(10)
            for name, value in settings.items():
                search = getattr(search, name)(*[value] if value else [])
            found.append([rows[row["path"]] for row in search.to_list()])
        milliseconds.append(1000 * (time.perf_counter() - started) / len(Q))
        recall.append(np.mean([len({*a} & {*b}) / 10 for a, b in zip(want, found)]))
    ours, with_index, without = milliseconds
    print(f"{len(index.videos)} videos, recall@10 of its vector index {recall[0]:.3f}; a query "
          f"takes {ours:.1f} ms here, {with_index:.1f} with it, {without:.1f} without")
    assert recall[0] >= 0.95 and recall[1] >= 0.99

def test_qdrant_ranks_by_the_two_level_score(tmp_path, monkeypatch, clips, tiny):
    qdrant_client = pytest.importorskip("qdrant_client")
    index, cases = engine_queries(tmp_path, monkeypatch, clips, tiny)
    client = qdrant_client.QdrantClient(":memory:")
    index.to_qdrant(client)
    for vectors, M, hits in cases:
        found = client.query_points("videos", query=vectors, limit=10).points
        paths = [point.payload["path"] for point in found]
        assert_same_hits(index, paths, [point.score for point in found], M, hits)

# ---- Command line --------------------------------------------------------------------------------
def test_index_search_and_explain_from_the_command_line(tmp_path, monkeypatch, capsys, clips, tiny):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    main(["index", "clips", "--model", "model", "--out", "index", "--device", "cpu"])
    out = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in out] == ["skipped: ", "skipped: ", "12 videos"]
    main(["search", "index", "a dog", "-k", "3", "--json", "--device", "cpu"])
    hits = json.loads(capsys.readouterr().out)
    assert hits == VideoIndex.load("index").search(tiny, ["a dog"], 3)[0]

    main(["search", "index", "a dog", "-k", "3", "--sheet", "sheet.png", "--device", "cpu"])
    for hit, line in zip(hits, capsys.readouterr().out.splitlines(), strict=True):
        assert hit["path"] in line and f"{hit['score']:.3f}" in line
    assert Image.open("sheet.png").height > 300
    os.rename("model", "moved")
    main(["search", "index", "a dog", "-k", "3", "--json", "--model", "moved", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out) == hits

    path = hits[0]["path"]
    main(["explain", "a small dog", path, "--model", "moved", "--out", "why.png"])
    words, before, after = interactions(tiny, "a small dog", sample_frames(path, 6, 64))
    for word, f, v, line in zip(words, before, after, capsys.readouterr().out.splitlines()):
        assert line.split()[0] == word and f"frame {f.argmax() + 1}, {f.max():.3f}" in line
        assert line.endswith(f"frame {v.argmax() + 1}, {v.max():.3f}")
    assert Image.open("why.png").width > 500

def test_a_model_that_was_never_trained_is_the_same_each_time(tmp_path, monkeypatch, capsys, clips):
    """Else no search would accept the index that it made."""
    monkeypatch.chdir(tmp_path)
    main(["index", "clips", "--model", "tiny", "--out", "index", "--device", "cpu"])
    torch.manual_seed(1)
    main(["search", "index", "a dog", "-k", "1", "--device", "cpu"])
    assert "clips/" in capsys.readouterr().out.splitlines()[-1]

def test_a_hit_that_is_gone_or_damaged_is_a_grey_strip_with_its_name(tmp_path, clips, tiny):
    """The others keep their frames, the best one framed in red."""
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    hits, = index.search(tiny, ["a dog"], 3)
    os.unlink(hits[0]["path"])
    Path(hits[1]["path"]).write_bytes(b"x")
    pixels = np.asarray(draw_hits("a dog", hits, 6))
    strips = [pixels[40 + 130 * i + 20:][:96, 8:8 + 6 * 96] for i in range(3)]
    for strip in strips[:2]:
        assert (strip[20] == 200).all() and (strip[30:60] == 0).any()       # grey, black letters
    red = (strips[2] == (196, 22, 28)).all(-1)
    left = 96 * hits[2]["frame"]
    assert red[1].nonzero()[0].tolist() == list(range(left, left + 96))
    frame = sample_frames(hits[2]["path"], 6, 88)[0]
    assert (strips[2][4:92, 4:92] == frame.permute(1, 2, 0).numpy()).all()

def test_hits_are_printed_before_their_sheet_is_drawn(tmp_path, monkeypatch, capsys, clips, tiny):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    VideoIndex.build(clips, tiny, "index", "model")
    def draws_nothing(*args):
        raise Killed
    monkeypatch.setattr(search, "draw_hits", draws_nothing)
    with pytest.raises(Killed):
        main(["search", "index", "a dog", "--sheet", "sheet.png", "--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()) == 5

@pytest.mark.parametrize("ending", ["png", "jpg", "gif"])
def test_a_still_picture_can_be_explained(tmp_path, monkeypatch, capsys, tiny, ending):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    Image.new("RGB", (50, 40), "red").save(f"a.{ending}")
    main(["explain", "a dog", f"a.{ending}", "--model", "model", "--device", "cpu"])
    assert capsys.readouterr().out.endswith("explain.png\n")
    columns = np.asarray(Image.open("explain.png"), int)[:, 80:70 + 6 * 96:96]  # one of each frame
    assert ((np.abs(columns - (255, 0, 0)) < 5).all(-1).sum(0) == 92).all()

@pytest.mark.parametrize("command, message", [
    ("search nowhere x", "nowhere is not a complete index"),
    ("search unnamed x", "unnamed does not say which model made it: use --model"),
    ("search index x --sheet hits.xyz", "hits.xyz: a picture's name ends in"),
    ("search index x --sheet hits.psd", "hits.psd: a picture's name ends in"),
    ("search index x --sheet no/hits.png", "no/hits.png: no such folder"),
    ("explain x a.png --model model --out no/why.png", "no/why.png: no such folder"),
    ("explain x nothing.mp4 --model model", "nothing.mp4: No such file"),
    ("explain . a.mp4 --model nothing", "unknown backbone 'nothing'"),
    ("index . --model ViT-B-23 --out i", "unknown backbone 'ViT-B-23'")])
def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch, capsys, tiny, command, message):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    VideoIndex.build(tmp_path, tiny, "unnamed")
    with pytest.raises(InputError, match=message):
        main([*command.split(), "--device", "cpu"])
    assert capsys.readouterr().out == ""

@pytest.mark.parametrize("query", ["", " "])
def test_explain_needs_a_word(tmp_path, monkeypatch, tiny, query):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    write_clip(tmp_path / "a.mp4")
    with pytest.raises(InputError, match="the query is empty"):
        main(["explain", query, "a.mp4", "--model", "model", "--device", "cpu"])
    assert not os.path.exists("explain.png")
