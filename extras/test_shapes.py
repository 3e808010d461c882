"""The synthetic clips: every test caption tells one video, and motion is seen only in order."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import train
from extras.shapes import MOTIONS, choose_clips, draw_clip, kind, write_shapes
from video_colbert import sample_frames

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, galleries=1)
    return root

def test_every_test_caption_tells_one_video(root):
    """240 test clips with one query each, half on appearance and half on motion, each true of one
    clip alone; the opposite of each motion is in the gallery; no test clip is trained on."""
    clips = choose_clips(1)
    said = [(f"a {c} {s} in a {f} frame", f"a {c} {s} {m}") for c, s, f, m in clips]
    data = train.load_clips(train.Settings(data=str(root / "clips.jsonl")))
    queries = [clip.captions[0] for clip in data["test"]]
    assert len(queries) == len(set(queries)) == 240 and len(data["train"]) == len(clips) - 240
    assert [kind(query) for query in queries].count("motion") == 120
    for i, query in enumerate(queries):
        assert [j for j in range(240) if query in said[j]] == [i]
    assert [list(captions) for captions in said[240:]] == [clip.captions for clip in data["train"]]
    assert not set(clips[:240]) & set(clips[240:])
    motions = {captions[1] for captions in said[:240]}
    for _, _, _, motion in clips[:240]:
        axis, sign = MOTIONS[motion]
        opposite, = [name for name, value in MOTIONS.items() if value == (axis, -sign)]
        for text in motions:
            assert not text.endswith(motion) or text.replace(motion, opposite) in motions

@pytest.mark.parametrize("motion, opposite", [
    ("moves left", "moves right"), ("grows", "shrinks"), ("turns left", "turns right"),
    ("appears before a ball", "appears after a ball")])
def test_opposite_motions_show_the_same_frames_in_opposite_order(tmp_path, motion, opposite):
    """So no set of frames tells them apart: any advantage is the temporal level's."""
    frames = []
    for name, what in (("a.mp4", motion), ("b.mp4", opposite)):
        draw_clip(tmp_path / name, "red", "bar", "blue", what, np.random.default_rng(3))
        frames.append(sample_frames(tmp_path / name, 8, 64).float())
    a, b = frames
    assert (a - b.flip(0)).abs().mean() < 2 and (a - b).abs().mean() > 5

def test_the_same_bytes_are_written_every_time_and_only_once(root, tmp_path):
    """Also by several threads, whose number x264 must not see; a second call changes nothing."""
    write_shapes(tmp_path, galleries=1)
    files = sorted(path.relative_to(root) for path in root.glob("**/*") if path.name != "lock")
    assert len(files) > 400
    for file in files:
        if (root / file).is_file():
            assert (root / file).read_bytes() == (tmp_path / file).read_bytes(), file
    line = json.dumps({"video": "videos/video0.mp4", "captions": ["x"], "split": "test"})
    (tmp_path / "clips.jsonl").write_text(line)
    write_shapes(tmp_path, galleries=1)
    assert (tmp_path / "clips.jsonl").read_text() == line

def test_two_processes_write_the_clips_once(tmp_path):
    """The second waits for the first and uses what it wrote."""
    code = f"from extras.shapes import write_shapes; write_shapes({str(tmp_path)!r}, galleries=0)"
    command = [sys.executable, "-c", code]
    folder = os.path.dirname(train.__file__)
    both = [subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sum("writing" in error for error in errors) == 1
    assert len(train.load_clips(train.Settings(data=str(tmp_path / "clips.jsonl")))["test"]) == 240

def test_a_folder_that_was_copied_without_its_lock_is_ours(root, tmp_path):
    shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns("lock"))
    before = sorted((tmp_path / "copy").glob("**/*"))
    write_shapes(tmp_path / "copy", galleries=1)
    # Nothing is written, not even a lock: the folder may be read-only.
    assert sorted((tmp_path / "copy").glob("**/*")) == before

# Python's import lock stays locked if Ctrl-C comes while the main thread imports something.
# Threads that import something then wait for ever.
LOCKED = """import _imp, runpy
_imp.acquire_lock()
runpy.run_module("extras.shapes", run_name="__main__")"""

@pytest.mark.parametrize("program, written", [
    (["-m", "extras.shapes"], "new/videos/*"), (["-c", LOCKED], "new/videos")])
def test_ctrl_c_ends_without_a_traceback(tmp_path, program, written):
    command = [sys.executable, *program, str(tmp_path / "new")]
    folder = os.path.dirname(train.__file__)
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(written)):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)  # until all threads have begun
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == 130
