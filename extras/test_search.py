"""Search is exact, and an index survives what happens to folders, disks and processes."""
import copy
import errno
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import fields, replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import train
import video_colbert
from extras import page, search, video_index
from extras.figures import draw_hits, interactions, printable
from extras.search import find_hits, main
from extras.video_index import VideoIndex, find_videos, fingerprint
from test_video_colbert import unit, write_clip
from video_colbert import Config, InputError, VideoColBERT, VideoError, frame_times, sample_frames

CPU = torch.device("cpu")

class Killed(Exception):
    pass

QUERIES = ["a dog", "a red square moves left", "something"]

def naive(Q, V, mask):
    """Equations 3 and 4, all similarities at once."""
    best = torch.einsum("amd,bnd->abmn", Q, V).amax(-1)  # (A, B, M)
    return (best * mask[:, None]).sum(-1) / mask.sum(-1)[:, None]

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
    return [video.path for video in index.videos]

def array(folder):
    """The file of an index's vectors."""
    return Path(folder) / json.loads((Path(folder) / "index.json").read_text())["vectors"]

def test_the_best_frame_is_chosen_by_the_tokens_that_count(tmp_path, clips, tiny, monkeypatch):
    monkeypatch.setattr(tiny, "config", replace(tiny.config, query_augmentation=False))
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    ids, mask = tiny.tokenize(["a small dog"])
    with torch.no_grad():
        Q = tiny.encode_query(ids)
    # Pads that prefer the frame that the words like least.
    def words_against_pads(ids):
        words = Q[mask].sum(dim=0)
        return torch.where(mask[..., None], Q, -words / words.norm())
    monkeypatch.setattr(tiny, "encode_query", words_against_pads)
    (hits,) = find_hits(index, tiny, ["a small dog"], 12)
    hits.append(search.hit_of_video(tiny, "a small dog", hits[0]["path"],
                                    sample_frames(hits[0]["path"], 6, 48)))
    for hit in hits:
        with torch.no_grad():
            F, V = tiny.encode_video(sample_frames(hit["path"], 6, 48)[None])
        near = (F[0] + V[0, :6]) @ Q[mask].sum(dim=0)
        assert hit["frame"] == near.argmax()

def test_search_is_the_brute_force_ranking(tmp_path, clips, tiny):
    """Scores are exact for the stored vectors and near those of float32; F + V is the score; the
    best frame and its time are right; broken files and links in circles do no harm."""
    index, problems = VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=5)
    assert "link.mp4: No such file" in problems[0] and "broken.mp4: " in problems[1]
    paths = [str(clips / name) for name in names(index)]
    assert len(problems) == 2 and len(set(paths)) == 12
    with torch.no_grad():
        F, V = tiny.encode_video(torch.stack([sample_frames(p, 6, 48) for p in paths]))
        ids, mask = tiny.tokenize(QUERIES)
        Q = tiny.encode_query(ids)
    want = naive(Q, F, mask) + naive(Q, V, mask)
    stored = np.fromfile(array(tmp_path / "index"), np.float16).reshape(12, 14, 64)
    stored = torch.from_numpy(stored).double()
    exact = naive(Q.double(), stored[:, :6], mask) + naive(Q.double(), stored[:, 6:], mask)
    for q, hits in enumerate(find_hits(VideoIndex.load(tmp_path / "index"), tiny, QUERIES, 12)):
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

def test_times_are_those_of_other_frames_if_a_reader_takes_others(tmp_path, tiny, monkeypatch):
    """One frame each second from the start of 20 seconds, instead of the middles of six equal
    parts. A hit's time is the part of the video to which its frame is nearest."""
    write_clip(tmp_path / "a.mp4", 20, rate=1)
    def each_second(num_frames, start, end):
        return np.minimum(start + np.arange(num_frames) + 0.5, end)
    for module in (video_colbert, search, page):
        monkeypatch.setattr(module, "sample_seconds", each_second)
    index, _ = VideoIndex.build(tmp_path, tiny, tmp_path / "index")
    (hit,), = find_hits(index, tiny, ["a dog"])
    n = hit["frame"]
    assert 0 < n < 5 and (hit["start"], hit["end"]) == (n, n + 1)
    frames = sample_frames(hit["path"], 6, 48)
    other = search.hit_of_video(tiny, "a dog", hit["path"], frames)
    assert (other["start"], other["end"], other["frame"]) == (n, n + 1, n)
    assert page.look(tiny, "a dog", hit, 0).clocks == [f"00:0{i}.5" for i in range(6)]
    # The first and the last part reach to the ends.
    monkeypatch.setattr(search, "sample_seconds", lambda *args: np.array([1.0, 3.0, 4.0]))
    assert [search.part_of_frame(n, 3, 9.0) for n in range(3)] == [(0, 2), (2, 3.5), (3.5, 9)]
    monkeypatch.setattr(search, "sample_seconds", lambda *args: np.array([1.0]))
    assert search.part_of_frame(0, 1, 9.0) == (0, 9)

def test_videos_are_found_by_their_ending_in_order_and_links_are_followed_once(tmp_path):
    numbered = [f"{i}/{i}.ts" for i in range(8)]
    for name in ("root/z/2.MP4", "root/z/1.mkv", "root/b/3.avi", "root/b/notes.txt", "away/4.webm",
                 *(f"root/{name}" for name in reversed(numbered))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    root = tmp_path / "root"
    for name, target in (("m", tmp_path / "away"), ("n", tmp_path / "away"), ("y", root)):
        (root / name).symlink_to(target)
    found, problems = find_videos(root)
    assert list(found) == [*numbered, "b/3.avi", "m/4.webm", "z/1.mkv", "z/2.MP4"]
    assert not problems

@pytest.mark.parametrize("name", ["a.MTS", "b.m2ts", "c.vob", "d.ogv", "e.wmv", "f.ts"])
def test_videos_of_cameras_and_discs_are_found(tmp_path, name):
    (tmp_path / name).touch()
    assert list(find_videos(tmp_path)[0]) == [name]

def test_hidden_files_and_folders_are_left_out(tmp_path):
    """As a Mac writes them on other drives. A hidden folder is indexed if it is asked for."""
    for name in (".Trashes/a.mp4", "._b.mp4", "b.mp4", "c/.hidden/d/e.mp4", "c/f.mp4"):
        write_clip(tmp_path / name, 2)
    assert list(find_videos(tmp_path)[0]) == ["b.mp4", "c/f.mp4"]
    assert list(find_videos(tmp_path / "c/.hidden")[0]) == ["d/e.mp4"]

def test_a_copy_of_an_array_is_not_deleted(tmp_path, clips, tiny):
    VideoIndex.build(clips, tiny, tmp_path / "index")
    (array,) = (tmp_path / "index").glob("vectors-*.f16")
    array.with_name("vectors-backup.f16").write_bytes(b"copy")
    write_clip(clips / "new.mp4", 5)
    VideoIndex.build(clips, tiny, tmp_path / "index")
    names = {path.name for path in (tmp_path / "index").glob("vectors-*")}
    assert "vectors-backup.f16" in names and len(names) == 2

def test_an_index_of_other_frames_can_be_searched_but_not_updated(
        tmp_path, clips, tiny, monkeypatch):
    """As when an older sample_frames took other frames; nothing of it is lost."""
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    monkeypatch.setattr(video_colbert, "SOURCE", video_colbert.SOURCE.replace("+ 0.5", "+ 0"))
    with pytest.raises(InputError, match="another version of this program made it"):
        VideoIndex.build(clips, tiny, tmp_path / "index")
    again = VideoIndex.load(tmp_path / "index")
    assert again.videos == index.videos and torch.equal(again.vectors, index.vectors)

def test_a_video_is_demuxed_once(tmp_path, clips, tiny, monkeypatch):
    calls, frame_times = [], video_colbert.frame_times
    def counted(path):
        calls.append(path)
        return frame_times(path)
    monkeypatch.setattr(video_index, "frame_times", counted)
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
    files = {"index.json", array(tmp_path / "index").name}
    assert set(os.listdir(tmp_path / "index")) - {"lock"} == files

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
    """What was saved is served and not encoded again, and the end is that of an undisturbed
    build, though the array goes on after the last saved list."""
    whole, _ = VideoIndex.build(clips, tiny, tmp_path / "whole", batch_size=1)
    encode, calls = tiny.encode_video, itertools.count()
    def copy_index(frames):                                       # what a kill -9 here would leave
        if next(calls) == 3:
            shutil.copytree(tmp_path / "killed", tmp_path / "index")
        return encode(frames)
    with monkeypatch.context() as patch:
        patch.setattr(video_index, "SAVE_EVERY", -1)  # after each video
        patch.setattr(tiny, "encode_video", copy_index)
        VideoIndex.build(clips, tiny, tmp_path / "killed", batch_size=1)
    with open(array(tmp_path / "index"), "ab") as file:
        file.write(b"what came after the last save")
    index = VideoIndex.load(tmp_path / "index")
    assert len(index.videos) == len(find_hits(index, tiny, ["a dog"], 12)[0]) == 3
    before = sum(encoded)
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert sum(encoded) - before == 9 and index.videos == whole.videos
    assert torch.equal(index.vectors, whole.vectors)

def test_while_an_index_is_updated_what_was_complete_is_served(tmp_path, clips, tiny, monkeypatch):
    """With other videos gone, too, and from an array that is mapped but removed."""
    VideoIndex.build(clips, tiny, tmp_path / "index")
    open_before = VideoIndex.load(tmp_path / "index")
    want, = find_hits(open_before, tiny, ["a dog"], 12)
    (clips / "0.mp4").unlink()
    for i in range(3):
        write_clip(clips / f"new{i}.mp4", 3)
    encode, counts = tiny.encode_video, []
    def searches(frames):
        index = VideoIndex.load(tmp_path / "index")
        counts.append(len(find_hits(index, tiny, ["a dog"], 99)[0]))
        return encode(frames)
    monkeypatch.setattr(tiny, "encode_video", searches)
    VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert counts == [11, 11, 11]
    assert find_hits(open_before, tiny, ["a dog"], 12)[0] == want

def test_an_array_that_is_replaced_while_an_index_is_opened_is_found(tmp_path, clips, tiny,
                                                                     monkeypatch):
    """Between the reading of the list and that of the array, an update removes the array."""
    VideoIndex.build(clips, tiny, tmp_path / "index")
    loads, calls = json.loads, itertools.count()
    def updated(text):
        meta = loads(text)
        if next(calls) == 0:
            (clips / "0.mp4").unlink()
            VideoIndex.build(clips, tiny, tmp_path / "index")
        return meta
    monkeypatch.setattr(json, "loads", updated)
    assert len(VideoIndex.load(tmp_path / "index").videos) == 11

def test_an_update_that_is_killed_anywhere_leaves_what_was_complete(tmp_path, clips, tiny,
                                                                    monkeypatch):
    """kill -9 in a child process, before each call that changes the disk, while videos are
    dropped and added: the index opens, is searched, and an update completes it."""
    VideoIndex.build(clips, tiny, tmp_path / "before")
    kept = set(names(VideoIndex.load(tmp_path / "before"))) - {"0.mp4"}
    (clips / "0.mp4").unlink()
    for i in range(3):
        write_clip(clips / f"new{i}.mp4", 3)
    monkeypatch.setattr(video_index, "SAVE_EVERY", -1)  # after each video

    def update(kill_at):
        calls = itertools.count()
        def patched(function):
            def call(*args, **kwargs):
                if next(calls) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        for place, name in ((video_index, "open"), (os, "fsync"), (os, "replace"),
                            (Path, "unlink")):
            function = open if name == "open" else getattr(place, name)
            monkeypatch.setattr(place, name, patched(function), raising=False)
        VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)

    counts, status = [], signal.SIGKILL
    while status == signal.SIGKILL:
        shutil.rmtree(tmp_path / "index", ignore_errors=True)
        shutil.copytree(tmp_path / "before", tmp_path / "index")
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # a fork has none of its parent's threads
            update(len(counts))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        index = VideoIndex.load(tmp_path / "index")
        assert kept <= set(names(index))
        counts.append(len(find_hits(index, tiny, ["a dog"], 99)[0]))
        assert counts[-1] == len(index.videos)
    assert status == 0 and len(counts) > 15
    assert counts[0] == 12 and set(counts) == {11, 12, 13, 14} and counts[-1] == 14
    assert len(os.listdir(tmp_path / "index")) == 3

def test_an_index_does_not_lose_everything_to_a_drive_that_is_not_mounted(tmp_path, clips, tiny,
                                                                          encoded):
    """Removing the index says that it may."""
    VideoIndex.build(clips, tiny, tmp_path / "index")
    clips.rename(tmp_path / "elsewhere")
    clips.mkdir()
    write_clip(clips / "new.mp4", 3)
    with pytest.raises(InputError, match="index has 12 videos of .*clips, and .*clips has none of "
                                         "them, .* Is a drive not mounted.*remove the index first"):
        VideoIndex.build(clips, tiny, tmp_path / "index")
    assert len(VideoIndex.load(tmp_path / "index").videos) == 12 == sum(encoded)
    shutil.rmtree(tmp_path / "index")
    assert len(VideoIndex.build(clips, tiny, tmp_path / "index")[0].videos) == 1

@pytest.mark.parametrize("where", ["below", "", "below/1 🐕.mkv"])
def test_what_cannot_be_listed_or_examined_is_named_and_stays(tmp_path, clips, tiny, monkeypatch,
                                                              encoded, where):
    """A folder, the folder itself, a file. (The tests may run as root, who can do all.)"""
    VideoIndex.build(clips, tiny, tmp_path / "index")
    bad = os.path.join(clips, where).rstrip("/")
    (clips / "0.mp4").unlink()
    def fails(function):
        def call(path, *args, **kwargs):
            if str(path) == bad:
                raise PermissionError(errno.EACCES, "Permission denied", bad)
            return function(path, *args, **kwargs)
        return call
    name = "stat" if where.endswith("mkv") else "scandir"
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails(getattr(os, name)))
        index, problems = VideoIndex.build(clips, tiny, tmp_path / "index")
    assert problems[0] == f"{bad}: Permission denied" or f"{bad}: Permission denied" in problems
    # Nobody knows whether 0.mp4 is in a folder that cannot be listed.
    assert len(index.videos) == (12 if where == "" else 11) and sum(encoded) == 12

def test_a_linked_folder_that_is_away_keeps_its_videos(tmp_path, clips, tiny, encoded):
    """As on one of two drives that is not mounted; a broken link to other files is no harm."""
    drive = tmp_path / "drive"
    (clips / "below").rename(drive)
    (clips / "linked").symlink_to(drive)
    (clips / "notes.md").symlink_to(tmp_path / "nowhere")
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    paths = names(index)
    assert any(path.startswith("linked/") for path in paths)
    count = sum(encoded)
    drive.rename(tmp_path / "away")
    index, problems = VideoIndex.build(clips, tiny, tmp_path / "index")
    assert f"{clips}/linked: No such file or directory" in problems
    assert sorted(names(index)) == sorted(paths)
    (tmp_path / "away").rename(drive)
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    assert sorted(names(index)) == sorted(paths) and sum(encoded) == count

def test_a_long_build_saves_on_the_way(tmp_path, clips, tiny, monkeypatch):
    """At both ends, and after each minute, if a video takes 13 seconds. A build that is killed
    loses no more."""
    saved, save = [], VideoIndex.save
    def counted(self):
        save(self)
        saved.append(len(json.loads((tmp_path / "index/index.json").read_text())["videos"]))
    clock = types.SimpleNamespace(monotonic=itertools.count(0, 13).__next__)
    monkeypatch.setattr(video_index, "time", clock)
    monkeypatch.setattr(VideoIndex, "save", counted)
    VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=2)
    assert saved == [0, 5, 10, 12]

@pytest.mark.parametrize("stop, message", [
    (KeyboardInterrupt, "stopped with 4 videos in .*index; the same command continues\n"),
    (Killed, "")])
@pytest.mark.parametrize("where, call", [("autocast", 4), ("open", 5)])
def test_ctrl_c_and_errors_keep_what_is_encoded(tmp_path, clips, tiny, monkeypatch, capsys,
                                                encoded, stop, message, where, call):
    """At the start of a batch, and when a video's vectors are written but its name is not listed:
    the array is opened once before the first video and then for each."""
    calls, function = itertools.count(), {"autocast": video_index.autocast, "open": open}[where]
    def stopped(*args):
        if next(calls) == call:
            if where == "open":
                function(*args).write(b"vectors")
            raise stop
        return function(*args)
    with monkeypatch.context() as patch, pytest.raises(stop):
        patch.setattr(video_index, where, stopped, raising=False)
        VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert re.search(message, capsys.readouterr().err)
    assert len(VideoIndex.load(tmp_path / "index").videos) == 4
    before = sum(encoded)
    VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert sum(encoded) - before == 8

def test_two_builds_of_one_index_do_not_meet(tmp_path, clips, tiny, monkeypatch):
    """The second is told, and the first is not disturbed."""
    encode, messages = tiny.encode_video, []
    def second_build(frames):
        with pytest.raises(InputError) as error:
            VideoIndex.build(clips, tiny, tmp_path / "index")
        messages.append(str(error.value))
        return encode(frames)
    monkeypatch.setattr(tiny, "encode_video", second_build)
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    assert len(index.videos) == 12
    assert messages == [f"another process is at work on {tmp_path}/index, and has locked "
                        f"{tmp_path}/index/lock; try later"]

@pytest.mark.parametrize("name, size", [
    ("array", 12 * (6 + 8) * 64 * 2 - 1), ("array", 0), ("array", None), ("index.json", 100),
    ("index.json", 0), ("index.json", None)])
def test_a_damaged_index_is_refused_with_its_name(tmp_path, clips, tiny, name, size):
    """Too short or gone. A build repairs nothing."""
    VideoIndex.build(clips, tiny, tmp_path / "index")
    path = array(tmp_path / "index") if name == "array" else tmp_path / "index" / name
    path.unlink() if size is None else os.truncate(path, size)
    with pytest.raises(InputError, match="index is not a complete index: ") as error:
        VideoIndex.load(tmp_path / "index")
    assert "\n" not in str(error.value)
    if size is not None:
        with pytest.raises(InputError, match="index is not a complete index: "):
            VideoIndex.build(clips, tiny, tmp_path / "index")

def test_a_full_disk_is_one_line_and_keeps_what_is_encoded(tmp_path, clips, tiny, encoded):
    """No file may exceed 10,000 bytes, those of five videos and a part of the sixth."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(InputError, match="^.*index: File too large$"):
            VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(VideoIndex.load(tmp_path / "index").videos) == 5
    VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert len(VideoIndex.load(tmp_path / "index").videos) == 12

@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_disk_that_stays_full_is_one_line_and_leaves_the_index_as_it_was(
        tmp_path, clips, tiny, monkeypatch, call):
    """From the given fsync on nothing can be written: at the beginning of an update, then while
    the new list is written, then at its end."""
    VideoIndex.build(clips, tiny, tmp_path / "index")
    (clips / "0.mp4").unlink()
    write_clip(clips / "new.mp4", 3)
    calls, fsync = itertools.count(), os.fsync
    def full(file):
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="index.*: No space left on device$"):
            VideoIndex.build(clips, tiny, tmp_path / "index")
    assert len(VideoIndex.load(tmp_path / "index").videos) == (11 if call == 2 else 12)
    assert len(VideoIndex.build(clips, tiny, tmp_path / "index")[0].videos) == 12

def test_index_json_of_something_else_is_refused(tmp_path):
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(InputError, match="is not a complete index: "):
        VideoIndex.load(tmp_path)

def test_an_index_belongs_to_its_model_and_its_videos(tmp_path, clips, tiny):
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index", name="mine")
    torch.manual_seed(1)
    other = VideoColBERT(Config(backbone="tiny", num_frames=6)).eval()
    with pytest.raises(InputError, match=r"made by another model \(mine\), or its weights"):
        find_hits(index, other, ["a dog"], 1)
    for name, message in (("mine", "the model's weights or settings have changed since"),
                          ("other", "it was made by mine, not other")):
        with pytest.raises(InputError, match=f"{message}: index into another folder"):
            VideoIndex.build(clips, other, tmp_path / "index", name=name)
    with pytest.raises(InputError, match="12 videos of .*, and .*below has none of them"):
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
    assert index.meta["model"] == "mine"  # also if the name is not repeated
    assert os.path.exists(find_hits(index, tiny, ["a dog"], 1)[0][0]["path"])
    (tmp_path / "moved").rename(tmp_path / "other")
    for name in names(index):
        os.utime(tmp_path / "other" / name, ns=(0, 0))
    with pytest.raises(InputError, match="12 videos of .*moved, and .*other has none of them, "
                                         "or all with another size or time"):
        VideoIndex.build(tmp_path / "other", tiny, tmp_path / "index")

def test_another_folder_with_a_few_of_the_same_videos_does_not_replace_the_others(
        tmp_path, clips, tiny):
    """Their vectors would be lost, although they are still where they were."""
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    (tmp_path / "few").mkdir()
    shutil.copy2(clips / "0.mp4", tmp_path / "few")
    message = f"11 videos of {clips} that {tmp_path}/few lacks, .*, the first is .*: index into"
    with pytest.raises(InputError, match=message):
        VideoIndex.build(tmp_path / "few", tiny, tmp_path / "index")
    assert names(VideoIndex.load(tmp_path / "index")) == names(index)
    # A link to the folder is the folder itself.
    (tmp_path / "link").symlink_to(clips)
    os.utime(clips / "0.mp4", ns=(0, 0))
    VideoIndex.build(tmp_path / "link", tiny, tmp_path / "index")
    shutil.copy2(clips / "0.mp4", tmp_path / "few")
    # A copy of all of them is as good as the folder itself, and so is one that replaced it.
    shutil.copytree(clips, tmp_path / "copy", symlinks=True)
    VideoIndex.build(tmp_path / "copy", tiny, tmp_path / "index")
    shutil.rmtree(tmp_path / "copy")
    index, _ = VideoIndex.build(tmp_path / "few", tiny, tmp_path / "index")
    assert names(index) == ["0.mp4"]

def test_a_fingerprint_changes_with_what_changes_vectors_alone(tiny):
    """Settings of Q, F and V, every weight, mean and std; nothing of the loss."""
    model, settings, changes = copy.deepcopy(tiny), tiny.config, set()
    for field in fields(Config):
        model.config = replace(settings, **{field.name: "another"})
        if fingerprint(model) != fingerprint(tiny):
            changes.add(field.name)
    assert changes == {
        "backbone", "num_frames", "num_tokens", "pad_token", "query_augmentation",
        "temporal_layers", "visual_expansion", "interaction"}
    model.config = settings
    for name in ("logit_scale", "logit_bias", "mean", "std", "backbone.text.positional_embedding",
                 "temporal.visual_expansion"):
        value = model.state_dict()[name]                          # shares the model's memory
        value += 1
        assert (fingerprint(model) == fingerprint(tiny)) == name.startswith("logit_")
        value.copy_(tiny.state_dict()[name])

def test_few_videos_give_few_hits_and_none_an_error(tmp_path, clips, tiny):
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    assert len(find_hits(index, tiny, ["a dog"], 99)[0]) == 12
    for k in (0, -1):
        with pytest.raises(InputError, match="k must be at least 1"):
            find_hits(index, tiny, ["a dog"], k)
    for query in ("", " "):
        with pytest.raises(InputError, match="the query is empty"):
            find_hits(index, tiny, ["a dog", query])
    (tmp_path / "none").mkdir()
    index, _ = VideoIndex.build(tmp_path / "none", tiny, tmp_path / "empty")
    with pytest.raises(InputError, match="empty is empty"):
        find_hits(index, tiny, ["a dog"])

@pytest.mark.parametrize("A, M", [(4, 5), (400, 50)])
def test_scores_do_not_depend_on_the_pieces_that_they_are_computed_in(tmp_path, monkeypatch, A, M):
    """No piece has more than 2^26 similarities of tokens to frames, 256 MB."""
    meta = dict(num_frames=3, visual_expansion=1, width=8, videos=[])
    index, Q, mask = VideoIndex(tmp_path, meta), unit(A, M, 8), torch.rand(A, M) < 0.6
    mask[:, 0] = True
    sizes, function = [], video_index.mean_max_sim
    def counted(q, v, m):
        sizes.append(q.shape[0] * q.shape[1] * v.shape[0] * v.shape[1])
        return function(q, v, m)
    monkeypatch.setattr(video_index, "mean_max_sim", counted)
    for B in (0, 1024, 2500) if A == 4 else (1100,):
        index.vectors = unit(B, 7, 8).half()
        F, V = index.vectors[:, :3].float(), index.vectors[:, 3:].float()
        got = index.scores(Q, mask)
        rows = torch.arange(0, A, 1 + A // 20)
        for level, videos in zip(got, (F, V)):
            assert level.shape == (A, B)
            assert ((level[rows] - naive(Q[rows], videos, mask[rows])).abs() < 1e-6).all()
    assert max(sizes) <= 2 ** 26
    assert A == 4 or len(sizes) > 2 * 2  # pieces of videos, levels

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

# ---- Moments of long videos
META = {"segment": 10.0, "stride": 4.0}

@pytest.mark.parametrize("seconds, starts", [
    (3.0, [0]), (10.0, [0]), (10.5, [0, 0.5]), (14.0, [0, 4]), (17.0, [0, 4, 7]),
    (18.0, [0, 4, 8])])
def test_segments_cover_a_video_to_its_end(seconds, starts):
    count = video_index.segment_count(META, seconds)
    spans = [video_index.segment_span(META, seconds, i) for i in range(count)]
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
    monkeypatch.setattr(video_index, "PIECE", 4)
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
            F, V = tiny.encode_video(sample_frames(path, 6, 48, start, end)[None])
        assert (index.vectors[row] - torch.cat([F, V], 1)[0]).abs().max() < 1e-3

def test_a_video_that_breaks_off_leaves_no_segment_behind(tmp_path, tiny, monkeypatch):
    """Its first piece can be decoded, its third cannot; the videos around it are complete."""
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_long_video(tmp_path / "clips" / name, random_pictures(12))
    read = video_index.seek_frames
    def breaks_off(path, times, wanted, size):
        if path.endswith("b.mp4") and wanted[0] * times[2] > 12:
            raise VideoError(f"{path}: broken")
        return read(path, times, wanted, size)
    monkeypatch.setattr(video_index, "PIECE", 3)
    monkeypatch.setattr(video_index, "seek_frames", breaks_off)
    flags = dict(batch_size=4, segment=4.0, stride=2.0)
    index, problems = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index", **flags)
    assert problems == [f"{tmp_path}/clips/b.mp4: broken"]
    assert names(index) == ["a.mp4", "c.mp4"] and len(index.vectors) == 22
    assert torch.equal(index.vectors[:11], index.vectors[11:])
    monkeypatch.setattr(video_index, "seek_frames", read)
    (tmp_path / "clips/a.mp4").unlink()
    index, problems = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index", **flags)
    assert not problems and names(index) == ["c.mp4", "b.mp4"] and len(index.vectors) == 22
    assert torch.equal(index.vectors[:11], index.vectors[11:])

def test_the_segment_of_an_index_cannot_change(tmp_path, clips, tiny):
    VideoIndex.build(clips, tiny, tmp_path / "index", segment=1.0)
    for segment, stride in ((0, 0), (2.0, 0.5), (1.0, 0.25)):
        message = "cannot change --(segment of .*: 1.0|stride of .*: 0.5)"
        with pytest.raises(InputError, match=message):
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
        hits, = find_hits(index, tiny, ["a dog"], k)
        assert [(hit["path"], hit["start"], hit["end"]) for hit in hits] == want[:k]
    monkeypatch.setattr(search, "MERGE", 1.0)
    hits, = find_hits(index, tiny, ["a dog"], 8)
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
    hit = find_hits(index, tiny, ["a dog"], 1)[0][0]
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
    best = [find_hits(index, tiny, ["a dog"], k)[0] for k in (1, 5, 20)]
    assert [len(hits) for hits in best] == [1, 5, 20]
    assert len({(hits[0]["start"], hits[0]["end"]) for hits in best}) == 1

def test_a_video_of_one_frame_is_found(tmp_path, tiny):
    write_clip(tmp_path / "clips/a.mp4", 1)
    timing = frame_times(tmp_path / "clips/a.mp4")
    def no_length(path):
        return timing._replace(end=timing.times[0] + 1, tick=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_index, "frame_times", no_length)
        index, problems = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index")
    assert not problems and find_hits(index, tiny, ["a dog"])[0][0]["path"].endswith("a.mp4")

def test_a_video_with_one_frame_for_most_of_its_segments_is_a_problem(tmp_path, tiny):
    write_clip(tmp_path / "clips/a.mkv", 20, times=[*range(19), 100_000])
    index, problems = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index", segment=10.0)
    assert not index.videos and "segments of 20 frames; its times are wrong" in problems[0]

def test_a_recording_of_slides_with_few_frames_has_its_segments(tmp_path, tiny):
    """5 minutes with a frame for each new slide, as screen recorders write them."""
    write_clip(tmp_path / "clips/a.mp4", 8, times=[0, 300, 750, 1200, 1500, 2100, 2700, 3000])
    index, problems = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index", segment=10.0)
    assert not problems and 55 < index.first_row[1] < 65

def overfitted(tmp_path, monkeypatch):
    """A model that knows 8 clips of random pictures, and the clips."""
    clips, s = [], train.parse_settings([
        "--num-frames", "2", "--num-tokens", "4", "--epochs", "60", "--batch-size", "8",
        "--captions-per-video", "1", "--cache", f"{tmp_path}/cache"])
    pictures = iter(random_pictures(16))
    for i in range(8):
        path = write_long_video(tmp_path / f"{i}.mp4", [next(pictures) for _ in range(2)], 2)
        clips.append(train.Clip(str(path), [f"video {'abcdefgh'[i]}"]))
    model = VideoColBERT(s)
    monkeypatch.setattr(train, "save_checkpoint", lambda *args: None)
    train.train(model, {"train": clips, "val": [], "test": []}, s, CPU, tmp_path, "data")
    return model.eval(), clips

def test_the_query_of_a_clip_finds_its_moment_in_a_long_video(tmp_path, monkeypatch):
    """Of clips in a row, four of five spans with an intersection over union above 0.5. With
    RUN=runs/shapes, on 40 of that run's test clips."""
    if "RUN" in os.environ:
        model = VideoColBERT.load(os.environ["RUN"])
        s = train.read_settings(os.environ["RUN"])
        clips = train.load_clips(s)["test"][:40]
    else:
        model, clips = overfitted(tmp_path, monkeypatch)
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
    for (hit, *_), start, end in zip(find_hits(index, model, [clip.captions[0] for clip in clips]),
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
    assert len(find_hits(VideoIndex.load(tmp_path / "index"), tiny, ["a dog"], 3)[0]) == 3

# ---- Command line
def test_index_search_and_explain_from_the_command_line(tmp_path, monkeypatch, capsys, clips,
                                                        tiny):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    main(["index", "clips", "--model", "model", "--out", "index", "--device", "cpu"])
    out = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in out] == ["skipped: ", "skipped: ", "12 videos"]
    main(["search", "index", "a dog", "-k", "3", "--json", "--device", "cpu"])
    hits = json.loads(capsys.readouterr().out)
    assert hits == find_hits(VideoIndex.load("index"), tiny, ["a dog"], 3)[0]

    main(["search", "index", "a dog", "-k", "3", "--sheet", "sheet.png", "--device", "cpu"])
    for hit, line in zip(hits, capsys.readouterr().out.splitlines(), strict=True):
        assert hit["path"] in line and f"{hit['score']:.3f}" in line
    assert Image.open("sheet.png").height > 300
    os.rename("model", "moved")
    main(["search", "index", "a dog", "-k", "3", "--json", "--model", "moved", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out) == hits

    path = hits[0]["path"]
    main(["explain", "a small dog", path, "--model", "moved", "--out", "why.png"])
    words, before, after = interactions(tiny, "a small dog", sample_frames(path, 6, 48))
    for word, f, v, line in zip(words, before, after, capsys.readouterr().out.splitlines()):
        assert line.split()[0] == word and f"frame {f.argmax() + 1}, {f.max():.3f}" in line
        assert line.endswith(f"frame {v.argmax() + 1}, {v.max():.3f}")
    assert Image.open("why.png").width > 500

def test_a_model_that_was_never_trained_is_the_same_each_time(tmp_path, monkeypatch, capsys,
                                                              clips):
    """Else no search would accept the index that it made."""
    monkeypatch.chdir(tmp_path)
    main(["index", "clips", "--model", "tiny", "--out", "index", "--device", "cpu"])
    torch.manual_seed(1)
    main(["search", "index", "a dog", "-k", "1", "--device", "cpu"])
    assert "clips/" in capsys.readouterr().out.splitlines()[-1]

def test_a_hit_that_is_gone_or_damaged_is_a_grey_strip_with_its_name(tmp_path, clips, tiny):
    """The others keep their frames, the best one framed in red."""
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    hits, = find_hits(index, tiny, ["a dog"], 3)
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

def test_names_that_are_no_text_or_several_lines_are_found_and_printed_on_one(
        tmp_path, monkeypatch, capsys, tiny):
    """Bytes that are not UTF-8, newlines and what moves the cursor are printed as a
    replacement; JSON has the name itself."""
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    written = {os.fsencode("clips/") + name for name in (
        b"caf\xe9.mp4", b"two\nlines.mp4", b"\x1b[2J\r.mp4", "ключ　🐕‍🦺.mp4".encode())}
    for i, name in enumerate(sorted(written)):
        write_clip(tmp_path / "a.mp4", 3 + i)
        Path("clips").mkdir(exist_ok=True)
        os.rename("a.mp4", name)
    Path(os.fsdecode(b"clips/broken\n\xff.mp4")).write_bytes(b"x")

    main(["index", "clips", "--model", "model", "--out", "index", "--device", "cpu"])
    skipped, summary = capsys.readouterr().out.splitlines()
    assert "broken\ufffd\ufffd.mp4: Invalid data" in skipped and summary == "4 videos in index"
    main(["search", "index", "a dog", "--json", "--device", "cpu"])
    paths = [hit["path"] for hit in json.loads(capsys.readouterr().out)]
    assert {os.fsencode(os.path.relpath(path)) for path in paths} == written
    main(["search", "index", "a dog", "--sheet", "hits.png", "--device", "cpu"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) == 4 and "\x1b" not in out
    for path, line in zip(paths, lines):
        assert printable(path) in line
    for name in ("caf\ufffd.mp4", "two\ufffdlines.mp4",
                 "\ufffd[2J\ufffd.mp4", "ключ　🐕‍🦺.mp4"):
        assert f"/{name}  " in out
    grey = (np.asarray(Image.open("hits.png")) == 200).all(-1).mean()
    assert grey < 0.01                                            # all strips have frames
    for path in paths:
        main(["explain", "a dog", path, "--model", "model", "--device", "cpu"])

def test_a_reader_who_leaves_is_no_error(tmp_path, clips, tiny):
    """As in `search ... | head -1`; the sheet is drawn nevertheless."""
    tiny.save(tmp_path / "model")
    VideoIndex.build(clips, tiny, tmp_path / "index", tmp_path / "model")
    here = Path(__file__).parents[1]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "extras.search", "search", tmp_path / "index", "a", "--sheet",
               tmp_path / "hits.png", "--device", "cpu"]
    done = subprocess.run(command, cwd=here, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "hits.png").exists()

def test_a_model_that_is_not_where_it_was_is_named_with_the_way_out(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    write_clip(tmp_path / "clips/a.mp4")
    main(["index", "clips", "--model", "model", "--out", "index", "--device", "cpu"])
    os.rename("model", "moved")
    with pytest.raises(InputError, match=f"^{tmp_path}/model: no such folder; index was made by "
                                         f"{tmp_path}/model: use --model$"):
        main(["search", "index", "a dog", "--device", "cpu"])
    Path("weights.pt").touch()
    for typed, problem in (("weights.pt", "weights.pt is a file, but --model.*"),
                           ("./mvoed", "./mvoed: no such folder"),
                           ("mvoed", "unknown backbone 'mvoed'.*"),
                           ("clips", "clips holds no model.*")):
        message = f"^{problem}; index was made by {tmp_path}/model: use"
        with pytest.raises(InputError, match=message):
            main(["search", "index", "a dog", "--model", typed, "--device", "cpu"])
    with pytest.raises(InputError, match="^runs/mvoed: no such folder$"):
        main(["index", "clips", "--model", "runs/mvoed", "--out", "index", "--device", "cpu"])

@pytest.mark.parametrize("command, message", [
    ("search nowhere x", "nowhere is not a complete index"),
    ("search unnamed x", "unnamed does not say which model made it: use --model"),
    ("search index x --sheet hits.xyz", "hits.xyz: a picture's name ends in"),
    ("search index x --sheet hits.gif", "hits.gif: a picture's name ends in"),
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
