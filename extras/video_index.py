"""An index of many videos: a folder that holds their list and an array of their vectors.

    index, skipped = VideoIndex.build("videos", model, "INDEX")
    index = VideoIndex.load("INDEX")

extras/search.py searches in it and is its command line; extras/export.py exports it to engines.
"""
import contextlib
import hashlib
import itertools
import json
import math
import os
import sys
import time
import uuid
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from extras.datasets import VIDEO_ENDINGS
from extras.long_videos import seek_frames
from train import (
    atomic_write, autocast, frames_version, locked, prefetch, user_errors)
from video_colbert import (
    InputError, Timing, VideoError, frame_times, mean_max_sim, sample_times)

SAVE_EVERY = 60  # seconds
PIECE = 32  # segments of a video that are decoded in one pass

# Beside the weights, these settings decide a model's vectors.
VECTOR_SETTINGS = ("backbone", "num_frames", "num_tokens", "pad_token", "query_augmentation",
                   "temporal_layers", "visual_expansion", "interaction")

def fingerprint(model):
    """A hash of everything that decides a model's vectors."""
    settings = [getattr(model.config, name) for name in VECTOR_SETTINGS]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, weight in sorted(model.state_dict().items()):
        if not name.startswith("logit_"):
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

# ---- The videos of a folder
class Video(NamedTuple):
    path: str  # below the folder
    size: int
    mtime_ns: int
    seconds: float = 0.0

def find_videos(root):
    """-> {path below the folder: Video}, in order, and {full path: problem} of folders
    that cannot be listed and videos that cannot be examined.

    Links are followed once. Hidden files and folders (.Trashes, ._a.mp4) are left out."""
    found, errors, visited = {}, [], set()
    for folder, folders, files in os.walk(root, onerror=errors.append, followlinks=True):
        # A link may lead back to where we were.
        place = os.path.realpath(folder)
        if place in visited:
            folders.clear()
            continue
        visited.add(place)

        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(folder, name)
            # A link to a folder that is away, as on a drive, is among the files. It is named.
            is_broken = os.path.islink(path) and not os.path.exists(path)
            is_video = name.lower().endswith(VIDEO_ENDINGS)
            if name.startswith(".") or not (is_video or is_broken):
                continue
            try:
                status = os.stat(path)
            except OSError as error:
                errors.append(error)
                continue
            path = os.path.relpath(path, root)
            found[path] = Video(path, status.st_size, status.st_mtime_ns)
    problems = {e.filename: f"{e.filename}: {e.strerror}" for e in errors}
    return found, problems

# ---- Segments: overlapping parts of long videos
def segment_count(meta, seconds):
    """How many segments an index has of a video: one that reaches the end, and one every
    stride before it; one of the whole video if it is no longer than a segment."""
    if not meta["segment"] or seconds <= meta["segment"]:
        return 1
    return 1 + math.ceil((seconds - meta["segment"]) / meta["stride"])

def segment_span(meta, seconds, i):
    """Start and end in seconds of a video's i-th segment."""
    if segment_count(meta, seconds) == 1:
        return 0.0, seconds
    start = min(i * meta["stride"], seconds - meta["segment"])
    return start, start + meta["segment"]

class Piece(NamedTuple):
    """Segments of a video that are decoded in one pass."""
    video: Video
    path: str  # on disk
    timing: Timing
    spans: list  # of (start, end) in seconds

def video_seconds(timing):
    """The length of a video, from its frame_times."""
    ticks = timing.end - timing.times[0]
    return max(0.001, round(ticks * timing.tick, 3))

def plan_pieces(video, meta, problems):
    """The pieces of a video: none if it cannot be read, and why goes into `problems`."""
    path = os.path.join(meta["root"], video.path)
    try:
        timing = frame_times(path)
    except VideoError as error:
        problems[path] = str(error)
        return []
    seconds = video_seconds(timing)
    count = segment_count(meta, seconds)
    frames = len(timing.times)
    # A video of slides may have fewer frames than segments, but not one for most of it.
    longest = np.diff([*timing.times, timing.end]).max()
    if count > frames and longest > (timing.end - timing.times[0]) / 2:
        problems[path] = (f"{path}: {count} segments of {frames} frames; its times "
                          "are wrong, or --segment or --stride is too short")
        return []

    video = video._replace(seconds=seconds)
    spans = [segment_span(meta, seconds, i) for i in range(count)]
    if count == 1:
        spans = [(0.0, None)]  # to its end, without rounding
    # Without seeking, each piece is decoded from the video's beginning, so there are fewer,
    # but not so few that their frames fill the memory.
    size = PIECE if timing.pts_are_reliable else 4 * PIECE
    return [Piece(video, path, timing, spans[i:i + size]) for i in range(0, count, size)]

def read_piece(piece, model, problems):
    """-> the video, and a list of its segments' frames, uint8 (N, 3, S, S). The list is
    empty if they cannot be read, and why goes into `problems`."""
    num_frames, size = model.config.num_frames, model.image_size
    try:
        wanted = [sample_times(piece.path, piece.timing, num_frames, start, end)
                  for start, end in piece.spans]
        # A frame that is in several segments is decoded once.
        ticks, which = np.unique(wanted, return_inverse=True)
        frames = seek_frames(piece.path, piece.timing, ticks, size)
    except VideoError as error:
        problems[piece.path] = str(error)
        return piece.video, []
    which = which.reshape(len(piece.spans), num_frames)
    return piece.video, [frames[row] for row in which]

# ---- The index
def array_shape(meta):
    """Of the array that belongs to an index's list: segments, vectors per segment, d."""
    rows = sum(segment_count(meta, video.seconds) for video in meta["videos"])
    return rows, 2 * meta["num_frames"] + meta["visual_expansion"], meta["width"]

@contextlib.contextmanager
def changing(folder):
    """Make a folder and keep other processes from changing it. Disk errors become
    InputErrors."""
    with user_errors(folder, OSError):
        os.makedirs(folder, exist_ok=True)
        with locked(folder):
            yield

class VideoIndex:
    """F and V of many videos in a folder: index.json, and a mapped float16 array
    (B, N + N + E, d) with a row for every video, or for each of its segments.

    The rows are in the order of meta["videos"]. The array grows at its end, and index.json
    is replaced afterwards: at any time, also when a build is killed, it lists complete
    videos. What the array has beyond them is ignored; the next build cuts it off."""

    def __init__(self, folder, meta, device="cpu"):
        self.folder, self.meta, self.model = Path(folder), meta, None
        self.videos = meta["videos"]
        counts = [segment_count(meta, video.seconds) for video in self.videos]
        self.first_row = np.cumsum([0, *counts])  # of each video, and the end

        shape = array_shape(meta)
        self.vectors = torch.empty(shape, dtype=torch.float16, device="meta")
        if self.videos:
            # Mapped for reading, so that it may exceed the memory.
            path = self.folder / meta["vectors"]
            array = np.memmap(path, np.float16, "r", shape=shape)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, of read-only arrays
                self.vectors = torch.from_numpy(array).to(device)

    @classmethod
    def load(cls, folder, device="cpu"):
        """Open an index; on a GPU it is copied there. Raises InputError if there is none,
        or if its array is shorter than its list."""
        # An update may remove an array that was listed just now, and lists another.
        for _ in range(2):
            try:
                meta = json.loads(Path(folder, "index.json").read_text())
                meta = {"segment": 0, "stride": 0, **meta}  # older indexes have none
                meta["videos"] = [Video(*row) for row in meta["videos"]]
                return cls(folder, meta, device)
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder} is not a complete index: {reason}")

    def save(self):
        """Cut off what the array has beyond the list, and replace the list."""
        with open(self.folder / self.meta["vectors"], "ab") as file:
            file.truncate(2 * math.prod(array_shape(self.meta)))
            os.fsync(file.fileno())
        with atomic_write(self.folder / "index.json") as file:
            file.write(json.dumps(self.meta).encode())
        # Arrays of earlier lists. Copies with other names are the user's.
        digits = 32 * "[0-9a-f]"
        for path in self.folder.glob(f"vectors-{digits}.f16"):
            if path.name != self.meta["vectors"]:
                path.unlink()
        self.saved_at = time.monotonic()

    @classmethod
    def build(cls, root, model, folder, name="", batch_size=16, workers=4, segment=0,
              stride=0):
        """Index every video below `root`, or bring the index in `folder` up to date ->
        the index, [why some videos and folders were skipped].

        `name` is where search finds the model. `segment` and `stride` are in seconds; 0 are
        whole videos, and a stride of half a segment. New and changed files are encoded,
        those that are gone are dropped, those that were skipped stay. Raises InputError for
        an index of another model or of other videos, and while a process changes it."""
        root, c = os.path.abspath(root), model.config
        if not os.path.isdir(root):
            raise InputError(f"no folder {root}")
        if c.interaction != "mms":
            raise InputError("an index holds token-wise vectors; a model with "
                             f"interaction {c.interaction} has none")
        stride = stride or segment / 2
        if not (0 <= segment < math.inf and 0 <= stride <= segment):
            raise InputError(f"--segment {segment} --stride {stride}: expected seconds, "
                             "the stride at most the segment")
        meta = dict(root=root, model=str(name), fingerprint=fingerprint(model),
                    width=model.width, num_frames=c.num_frames,
                    visual_expansion=c.visual_expansion, segment=segment, stride=stride,
                    vectors=f"vectors-{uuid.uuid4().hex}.f16", videos=[],
                    frames=frames_version())

        with changing(folder):
            found, problems = find_videos(root)
            if os.path.exists(f"{folder}/index.json"):
                cls.load(folder).copy_unchanged(meta, found, problems)
            index = cls(folder, meta)
            index.save()
            known = {video.path for video in index.videos}
            new = [video for video in found.values() if video.path not in known]
            index.add(new, model, batch_size, workers, problems)
            return cls(folder, meta), list(problems.values())

    def copy_unchanged(self, meta, found, skipped):
        """Put this index's videos that are still the same into the `meta` of a build. If
        others are gone or have changed, copy the rest of the array."""
        if self.meta["fingerprint"] != meta["fingerprint"]:
            change = "the model's weights or settings have changed since"
            if self.meta["model"] != meta["model"]:
                made_by = self.meta["model"] or "a model without a name"
                change = f"it was made by {made_by}, not {meta['model'] or 'this one'}"
            raise InputError(f"{self.folder} cannot be updated, {change}: index into "
                             "another folder")
        # Today's code may take other frames than those that were indexed.
        if self.meta.get("frames") != meta["frames"]:
            raise InputError(f"{self.folder} can be searched, but not updated, because another "
                             "version of this program made it: index into another folder")
        for name in ("segment", "stride"):
            if self.meta[name] != meta[name]:
                raise InputError(f"cannot change --{name} of {self.folder}: "
                                 f"{self.meta[name]}")

        keep = set()
        for i, video in enumerate(self.videos):
            is_same = found.get(video.path) == video._replace(seconds=0.0)
            path = Path(meta["root"], video.path)
            was_skipped = any(str(place) in skipped for place in (path, *path.parents))
            if is_same or was_skipped:
                keep.add(i)
        is_other_root = self.meta["root"] != meta["root"]
        are_gone = not any(video.path in found for video in self.videos)
        if self.videos and not keep and (is_other_root or are_gone):
            raise InputError(f"{self.folder} has {len(self.videos)} videos of "
                             f"{self.meta['root']}, and {meta['root']} has none of them, or "
                             "all with another size or time (cp -a keeps times). Is a drive "
                             "not mounted? To drop them all, remove the index first")

        left = [video.path for i, video in enumerate(self.videos)
                if i not in keep and os.path.exists(f"{self.meta['root']}/{video.path}")]
        if left and not os.path.samefile(self.meta["root"], meta["root"]):
            raise InputError(f"{self.folder} has {len(left)} videos of {self.meta['root']} "
                             f"that {meta['root']} lacks, or has with another size or time, "
                             f"the first is {left[0]!r}: index into another folder")

        gone = [video.path for i, video in enumerate(self.videos)
                if i not in keep and video.path not in found]
        if gone:
            print(f"{len(gone)} videos are no longer there and leave the index, the first is "
                  f"{gone[0]!r}", file=sys.stderr)
        meta["model"] = meta["model"] or self.meta["model"]
        meta["videos"] = [self.videos[i] for i in sorted(keep)]
        if len(keep) == len(self.videos):
            meta["vectors"] = self.meta["vectors"]
            return
        with open(self.folder / meta["vectors"], "wb") as file:
            for i in sorted(keep):
                rows = self.vectors[self.first_row[i]:self.first_row[i + 1]]
                file.write(rows.numpy().tobytes())

    def add(self, videos, model, batch_size, workers, problems):
        """Encode videos; why some cannot be read goes into `problems`. Whatever happens on
        the way, videos that were encoded are saved."""
        plan = partial(plan_pieces, meta=self.meta, problems=problems)
        read = partial(read_piece, model=model, problems=problems)
        pieces = itertools.chain.from_iterable(prefetch(plan, videos, workers))
        bar = tqdm(total=len(videos), desc="indexing", unit="video")
        rows, encoded = [], {}  # segments to encode, vectors of incomplete videos
        try:
            for video, segments in prefetch(read, pieces, workers):
                rows += [(video, frames) for frames in segments]
                while len(rows) >= batch_size:
                    bar.update(self.encode(rows[:batch_size], encoded, model))
                    rows = rows[batch_size:]
            if rows:
                bar.update(self.encode(rows, encoded, model))
        except KeyboardInterrupt:
            print(f"stopped with {len(self.videos)} videos in {self.folder}; the same "
                  "command continues", file=sys.stderr)
            raise
        finally:
            self.save()

    @torch.no_grad()
    def encode(self, rows, encoded, model):
        """Encode segments, rows of (video, frames). A video all of whose segments are now
        in `encoded` joins the index -> the number of these videos."""
        frames = torch.stack([frames for _, frames in rows])  # (b, N, 3, S, S)
        with autocast(model.device):
            F, V = model.encode_video(frames.to(model.device))
        vectors = torch.cat([F, V], dim=1).half().cpu().numpy()  # (b, N + N + E, d)

        before = len(self.videos)
        for (video, _), row in zip(rows, vectors):
            segments = encoded.setdefault(video.path, [])
            segments.append(row)
            if len(segments) == segment_count(self.meta, video.seconds):
                with open(self.folder / self.meta["vectors"], "ab") as file:
                    file.write(np.stack(encoded.pop(video.path)).tobytes())
                self.videos.append(video)
                if time.monotonic() - self.saved_at > SAVE_EVERY:
                    self.save()
        return len(self.videos) - before

    @torch.no_grad()
    def scores(self, Q, mask):
        """Q (A, M, d), mask (A, M) -> MMS_F, MMS_V (A, B), exact for the vectors as stored."""
        A, M, _ = Q.shape
        B, frames, _ = self.vectors.shape
        N = self.meta["num_frames"]
        F, V = Q.new_empty(A, B), Q.new_empty(A, B)

        # At most 256 MB of similarities of tokens to frames at a time.
        videos = 1024
        queries = max(1, 2 ** 26 // (M * videos * frames))
        for b in range(0, B, videos):
            vectors = self.vectors[b:b + videos].float()
            for a in range(0, A, queries):
                q, m = Q[a:a + queries], mask[a:a + queries]
                F[a:a + queries, b:b + videos] = mean_max_sim(q, vectors[:, :N], m)
                V[a:a + queries, b:b + videos] = mean_max_sim(q, vectors[:, N:], m)
        return F, V

    def segment(self, row):
        """Of a row of the array: path on disk, start and end in seconds."""
        i = int(np.searchsorted(self.first_row, row, side="right")) - 1
        video = self.videos[i]
        start, end = segment_span(self.meta, video.seconds, int(row - self.first_row[i]))
        return os.path.join(self.meta["root"], video.path), start, end
