"""Search your own videos by a sentence.

    python -m extras.search index FOLDER --model runs/shapes --out INDEX [--segment 10]
    python -m extras.search search INDEX "a red square moves left" -k 5 --sheet hits.png
    python -m extras.search explain "a red square" VIDEO --model runs/shapes --out why.png

`index` encodes every video below a folder; run again, it encodes only what is new or has changed.
`search` prints rank, score with its F and V parts, path and the time of the best frame. With
--segment, videos are indexed in overlapping parts of that many seconds, and `search` prints the
time of the part, or of neighbours joined. `explain` draws which frame each word picks. --model is
a run's folder, or an open_clip name for a model that was never trained on video. Search is exact;
to_lancedb and to_qdrant export an index to engines.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import warnings
from pathlib import Path

import av
import filelock
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from train import autocast, pick_device, prefetch, run_main
from video_colbert import (Config, InputError, VideoColBERT, draw_interactions, frame_times,
                           frames_at, interactions, mean_max_sim, mms_fv, sample_frames,
                           sample_times, write_file)

VIDEO_ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".flv",
                 ".wmv", ".ts")

SAVE_EVERY = 256                                                  # videos
PIECE = 32                                     # segments of a video that are decoded in one pass
# Overlapping segments are joined if they lose at most this share of the best one's lead over the
# median segment: any segment that shows a little of the moment has a good frame for each token.
MERGE = 0.05
# What an index depends on beside the weights.
VECTOR_SETTINGS = ("backbone", "num_frames", "num_tokens", "pad_token", "query_augmentation",
                   "temporal_layers", "visual_expansion", "interaction")

def as_multivector(x, y):
    """The two-level score as one MaxSim, for any late-interaction engine: F and V of videos, or Q
    and Q again of queries.

    x (..., N, d), y (..., K, d), unit vectors -> (..., N + K, d + 2), unit vectors. Two coordinates
    are appended: (a, 0) to frame vectors and to one copy of the query, (0, a) to temporal vectors
    and to the other copy; everything is divided by sqrt(1 + a^2). With a^2 = 2, a match of one kind
    scores (2 + cos) / 3 >= 1/3 and a match of two kinds cos / 3 <= 1/3, so a copy only ever matches
    its own kind, and MMS_FV = 3 / M MaxSim - 4. Leave out query vectors whose mask is False.
    """
    a = 2 ** 0.5
    x = torch.cat([x, x.new_tensor([a, 0]).expand(*x.shape[:-1], 2)], -1)     # (..., N, d + 2)
    y = torch.cat([y, y.new_tensor([0, a]).expand(*y.shape[:-1], 2)], -1)     # (..., K, d + 2)
    return torch.cat([x, y], -2) / 3 ** 0.5

# ---- What there is to index ----------------------------------------------------------------------
def fingerprint(model):
    """A hash of everything that decides a model's vectors."""
    settings = [getattr(model.config, name) for name in VECTOR_SETTINGS]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, p in sorted(model.state_dict().items()):
        if not name.startswith("logit_"):
            digest.update(name.encode() + p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

def video_files(root):
    """The path of every video below a folder, by its ending, in order. Links are followed once."""
    visited = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in visited:                   # a link back to where we were
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith(VIDEO_ENDINGS):
                yield os.path.join(folder, file)

def find_videos(root):
    """The videos below a folder -> {relative path: [size, time]}, [what is wrong with others]."""
    found, problems = {}, []
    for path in video_files(root):
        try:
            status = os.stat(path)
            found[os.path.relpath(path, root)] = [status.st_size, status.st_mtime_ns]
        except OSError as error:                                  # a link to nowhere
            problems.append(f"{path}: {error.strerror}")
    return found, problems

def read_times(path):
    """frame_times(path). Raises InputError if there are no frames."""
    times = frame_times(path)
    sample_times(path, times, 1)
    return times

def read_segments(path, times, parts, num_frames, size):
    """The frames of a video's parts, [(start, end)] in seconds, uint8 (parts, N, 3, S, S). They are
    decoded in one pass, though parts may overlap."""
    wanted = np.stack([sample_times(path, times, num_frames, *part) for part in parts])
    ticks, which = np.unique(wanted, return_inverse=True)
    pixels = np.stack(list(frames_at(path, ticks, times[3], size)))
    return torch.from_numpy(pixels[which.reshape(wanted.shape)].transpose(0, 1, 4, 2, 3))

def attempt(function, path, *args):
    """function(path, *args), or what is wrong with the video as a string."""
    try:
        return function(path, *args)
    except InputError as error:
        return str(error)
    except (av.FFmpegError, OSError) as error:
        return f"{path}: {error.strerror or error}"

def locked(folder):
    """Make a folder and keep other processes out of it: `with locked(folder): ...`. Raises
    InputError if the folder cannot be made, or if another process is at work on it."""
    try:
        os.makedirs(folder, exist_ok=True)
        return filelock.FileLock(f"{folder}/lock").acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"another process is at work on {folder}; try again later") from None
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from None

# ---- The index -----------------------------------------------------------------------------------
def segment_count(meta, seconds):
    """How many segments an index has of a video: one that reaches the end, and one every stride
    before it; one of the whole video if it is no longer than a segment."""
    if not meta["segment"] or seconds <= meta["segment"]:
        return 1
    return 1 + math.ceil((seconds - meta["segment"]) / meta["stride"])

def segment_span(meta, seconds, i):
    """Start and end in seconds of a video's i-th segment."""
    if segment_count(meta, seconds) == 1:
        return 0.0, seconds
    start = min(i * meta["stride"], seconds - meta["segment"])
    return start, start + meta["segment"]

def array_shape(meta):
    """Of the array that belongs to an index's list: segments, vectors per segment, d."""
    rows = sum(segment_count(meta, seconds) for *_, seconds in meta["videos"])
    return rows, 2 * meta["num_frames"] + meta["visual_expansion"], meta["width"]

class VideoIndex:
    """F and V of many videos in a folder: index.json, and a mapped fp16 array (B, N + N + E, d) of
    a row for every video, or for each of its segments.

    meta["videos"][i] is [path below root, size, mtime_ns, seconds], and the rows follow in the same
    order. The array grows at its end, and index.json is replaced afterwards, so that a killed build
    leaves a complete index, followed by rows that the next build drops.
    """

    def __init__(self, folder, meta, device="cpu"):
        self.folder, self.meta, self.videos, self.model = Path(folder), meta, meta["videos"], None
        counts = [segment_count(meta, seconds) for *_, seconds in self.videos]
        self.first_row = np.cumsum([0, *counts])                  # of each video, and of none
        self.vectors = torch.empty(array_shape(meta), dtype=torch.float16, device="meta")
        if self.videos:                    # mapped for reading, so that it may exceed the memory
            array = np.memmap(self.folder / meta["vectors"], np.float16, "r", 0, array_shape(meta))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                  # PyTorch's, of read-only arrays
                self.vectors = torch.from_numpy(array).to(device)

    @classmethod
    def load(cls, folder, device="cpu", unfinished=False):
        """Open an index; on a GPU it is copied there. Raises InputError if there is none, or if its
        array is shorter or longer than its list (an `unfinished` one may be longer)."""
        try:
            meta = json.loads((Path(folder) / "index.json").read_text())
            meta = {"segment": 0, "stride": 0, **meta}            # older indexes have none
            expected = 2 * math.prod(array_shape(meta))
            actual = (Path(folder) / meta["vectors"]).stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{folder} is not a complete index: {reason}") from None
        if actual < expected or actual > expected and not unfinished:
            advice = "remove the folder and" if actual < expected else \
                "it is being built, or its build was killed:"
            raise InputError(f"{folder} is not a complete index: {meta['vectors']} has {actual} "
                             f"bytes, not {expected}; {advice} run index again")
        return cls(folder, meta, device)

    def save(self):
        """Cut off what the array has beyond the list, replace index.json, remove an older array."""
        with open(self.folder / self.meta["vectors"], "ab") as file:
            file.truncate(2 * math.prod(array_shape(self.meta)))
            os.fsync(file.fileno())
        write_file(self.folder / "index.json", json.dumps(self.meta).encode())
        for path in self.folder.glob("vectors-*.f16"):
            if path.name != self.meta["vectors"]:
                path.unlink()

    @classmethod
    def build(cls, root, model, folder, name="", batch_size=16, workers=4, segment=0, stride=0):
        """Index every video below `root`, or bring the index in `folder` up to date -> the index,
        [what is wrong with each video that cannot be read]. `name` is where search finds the model.
        `segment` and `stride` are as in segments(), 0 is whole videos; stride is half by default.

        New and changed files are encoded, deleted ones dropped. Raises InputError for an index of
        another model or other videos, and while another process works on it.
        """
        root, c = os.path.abspath(root), model.config
        if not os.path.isdir(root):
            raise InputError(f"no folder {root}")
        if c.interaction != "mms":
            raise InputError("an index holds token-wise vectors; a model with interaction "
                             f"{c.interaction} has none")
        stride = stride or segment / 2
        if not (0 <= segment < math.inf and 0 <= stride <= segment):
            raise InputError(f"--segment {segment} --stride {stride}: expected seconds, the stride "
                             "at most the segment")
        meta = dict(root=root, model=str(name), fingerprint=fingerprint(model), width=model.width,
                    num_frames=c.num_frames, visual_expansion=c.visual_expansion, segment=segment,
                    stride=stride, vectors="vectors-0.f16", videos=[])
        with locked(folder):
            found, problems = find_videos(root)
            if os.path.exists(f"{folder}/index.json"):
                meta = cls.load(folder, unfinished=True).update(meta, found)
            index = cls(folder, meta)
            index.save()
            known = {path for path, *_ in index.videos}
            new = [[path, *status] for path, status in found.items() if path not in known]
            problems += index.add(new, model, batch_size, workers)
            return cls(folder, meta), problems

    def update(self, meta, found):
        """The `meta` of a build that has no videos yet, with this index's videos that are still the
        same. If others are gone or changed, the rest is copied to a new array."""
        keep = [i for i, (path, *status, _) in enumerate(self.videos) if found.get(path) == status]
        if self.meta["fingerprint"] != meta["fingerprint"]:
            change = "the model's weights or settings have changed since"
            if self.meta["model"] != meta["model"]:
                made_by = self.meta["model"] or "a model without a name"
                change = f"it was made by {made_by}, not {meta['model'] or 'this one'}"
            raise InputError(f"{self.folder} cannot be updated, {change}: index into a new folder")
        for name in ("segment", "stride"):
            if self.meta[name] != meta[name]:
                raise InputError(f"{self.folder} was made with --{name} {self.meta[name]}: keep "
                                 "that, or index into a new folder")
        if self.videos and not keep and self.meta["root"] != meta["root"]:
            raise InputError(f"{self.folder} is an index of {self.meta['root']} and has none of "
                             f"the videos in {meta['root']}: index into a new folder")
        array = self.meta["vectors"]
        if len(keep) < len(self.videos):
            number = int(array.removeprefix("vectors-").removesuffix(".f16"))
            array = f"vectors-{number + 1}.f16"
            with open(self.folder / array, "wb") as file:
                for i in keep:
                    rows = self.vectors[self.first_row[i]:self.first_row[i + 1]]
                    file.write(rows.numpy().tobytes())
        return {**meta, "model": meta["model"] or self.meta["model"], "vectors": array,
                "videos": [self.videos[i] for i in keep]}

    def pieces(self, new, workers):
        """([path, size, mtime_ns], seconds, path on disk, frame_times, at most PIECE segments) of
        every video in order; without segments, frame_times is what is wrong with the video."""
        paths = [os.path.join(self.meta["root"], path) for path, *_ in new]
        all_times = prefetch(functools.partial(attempt, read_times), paths, workers)
        for file, path, times in zip(new, paths, all_times):
            if isinstance(times, str):
                yield file, 0.0, path, times, []
                continue
            ticks, end, tick, _ = times
            seconds = max(0.001, round((end - ticks[0]) * tick, 3))
            count = segment_count(self.meta, seconds)
            if count > len(ticks):
                problem = (f"{path}: {count} segments of {len(ticks)} frames; its times are wrong, "
                           "or --segment or --stride is too short")
                yield file, 0.0, path, problem, []
                continue
            parts = [segment_span(self.meta, seconds, i) for i in range(count)]
            if count == 1:
                parts = [(0.0, None)]                             # to its end, without rounding
            size = PIECE if times[3] else 16 * PIECE     # without seeking each begins at the start
            for i in range(0, count, size):
                yield file, seconds, path, times, parts[i:i + size]

    def add(self, new, model, batch_size, workers):
        """Encode videos, a list of [path, size, mtime_ns] -> [what is wrong with each video that
        cannot be read]. Whatever happens on the way, videos that were encoded are saved."""
        def read(piece):
            file, seconds, path, times, parts = piece
            if not parts:
                return file, seconds, times
            return file, seconds, attempt(read_segments, path, times, parts,
                                          model.config.num_frames, model.image_size)

        rows, encoded, problems = [], {}, {}            # encoded: vectors of incomplete videos
        bar = tqdm(total=len(new), desc="indexing", unit="video")
        try:
            for file, seconds, frames in prefetch(read, self.pieces(new, workers), workers):
                if isinstance(frames, str) and file[0] not in problems:
                    problems[file[0]] = frames                    # its vectors stay incomplete
                    bar.update()
                elif file[0] not in problems:
                    rows += [(file, seconds, x) for x in frames]
                while len(rows) >= batch_size:
                    bar.update(self.append(rows[:batch_size], encoded, model))
                    rows = rows[batch_size:]
            bar.update(self.append(rows, encoded, model))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped with {len(self.videos)} videos in {self.folder}; the "
                                    "same command continues") from None
        finally:
            self.save()
        return list(problems.values())

    @torch.no_grad()
    def append(self, rows, encoded, model):
        """Encode rows of ([path, size, mtime_ns], seconds, frames). A video all of whose segments
        are now in `encoded` joins the index -> the number of these videos."""
        if not rows:
            return 0
        before, frames = len(self.videos), torch.stack([x for *_, x in rows])
        with autocast(model.device):
            F, V = model.encode_video(frames.to(model.device))
        for (file, seconds, _), x in zip(rows, torch.cat([F, V], 1).half().cpu().numpy()):
            vectors = encoded.setdefault(file[0], [])
            vectors.append(x)
            if len(vectors) == segment_count(self.meta, seconds):
                with open(self.folder / self.meta["vectors"], "ab") as array:
                    array.write(np.stack(encoded.pop(file[0])).tobytes())
                self.videos.append([*file, seconds])
                if len(self.videos) % SAVE_EVERY == 0:
                    self.save()
        return len(self.videos) - before

    @torch.no_grad()
    def scores(self, Q, mask):
        """Q (A, M, d), mask (A, M) -> MMS_F, MMS_V (A, B), exact for the vectors as stored."""
        N, mms_f, mms_v = self.meta["num_frames"], [], []
        for vectors in self.vectors.split(1024):                  # in float32, a piece at a time
            mms_f.append(mean_max_sim(Q, vectors[:, :N].float(), mask))
            mms_v.append(mean_max_sim(Q, vectors[:, N:].float(), mask))
        return torch.cat(mms_f, 1), torch.cat(mms_v, 1)

    def segment(self, row):
        """Of a row of the array: path on disk, start and end in seconds."""
        video = int(np.searchsorted(self.first_row, row, side="right")) - 1
        path, _, _, seconds = self.videos[video]
        start, end = segment_span(self.meta, seconds, int(row - self.first_row[video]))
        return os.path.join(self.meta["root"], path), start, end

    @torch.no_grad()
    def search(self, model, queries, k=10):
        """[A strings] -> for each its k best videos (fewer if the index has fewer), dictionaries of
        path, score, F, V, and the best frame with its start and end in seconds.

        In an index of segments, hits are parts of videos. Segments of a video that overlap are one
        hit: the best of them, joined by those that score nearly as high (see MERGE).
        The best frame is the one nearest to the query's tokens on average, over both levels. Raises
        InputError for another model than the index's, a blank query and an empty index.
        """
        if model is not self.model and fingerprint(model) != self.meta["fingerprint"]:
            raise InputError(f"{self.folder} was made by another model "
                             f"({self.meta['model'] or 'unnamed'}), or its weights have changed")
        self.model = model                                        # hash the weights only once
        if not self.videos:
            raise InputError(f"{self.folder} is empty: it has no videos")
        if k < 1 or not all(query.strip() for query in queries):
            raise InputError("k must be at least 1" if k < 1 else "the query is empty")
        ids, mask = model.tokenize(queries)
        Q = model.encode_query(ids.to(model.device), mask.to(model.device)).to(self.vectors.device)
        F, V = self.scores(Q, mask.to(Q.device))                  # (A, B)
        total, N, results = mms_fv(F, V), self.meta["num_frames"], []
        segment = self.meta["segment"]
        for a, (scores, rows) in enumerate(zip(*total.sort(dim=1, descending=True))):
            hits, typical, lowest = [], scores.median().item(), math.inf
            for score, row in zip(scores.tolist(), rows.tolist()):
                if len(hits) == k and (not segment or score < lowest):
                    break
                path, start, end = self.segment(row)
                overlapped = [hit for hit in hits if path == hit["path"] and start < hit["end"]
                              and hit["start"] < end]
                if overlapped:
                    hit = overlapped[0]
                    lead = hit["score"] - typical
                    if len(overlapped) == 1 and score >= hit["score"] - MERGE * lead:
                        hit.update(start=min(start, hit["start"]), end=max(end, hit["end"]))
                elif len(hits) < k:
                    near = self.vectors[row].float() @ Q[a].sum(0)  # (N + N + E,), masked are 0
                    n = (near[:N] + near[N:2 * N]).argmax().item()
                    lowest = min(lowest, score - MERGE * (score - typical))  # that can join a hit
                    hits.append(dict(path=path, score=score, F=F[a, row].item(),
                                     V=V[a, row].item(), start=start, end=end,
                                     best=(start + n / N * (end - start),
                                           start + (n + 1) / N * (end - start))))
            for hit in hits:
                first, last = hit.pop("best")                     # of the best frame, in seconds
                middle = ((first + last) / 2 - hit["start"]) / (hit["end"] - hit["start"])
                hit["frame"] = int(middle * N)                    # of N frames of the hit
                if not segment:
                    hit.update(start=first, end=last)
                hit.update(start=round(hit["start"], 2), end=round(hit["end"], 2))
            results.append(hits)
        return results

    def multivectors(self, size=256):
        """The index for an engine, in batches: row numbers, the path below the root, start and end
        in seconds of each, and vectors of as_multivector, (b, N + N + E, d + 2)."""
        N = self.meta["num_frames"]
        for i in range(0, len(self.vectors), size):
            x = self.vectors[i:i + size].float()
            rows, parts = range(i, i + len(x)), []
            for path, start, end in map(self.segment, rows):
                parts.append((os.path.relpath(path, self.meta["root"]), start, end))
            yield rows, parts, as_multivector(x[:, :N], x[:, N:]).cpu().numpy()

    def to_lancedb(self, uri, table="videos", partitions=0):
        """Write a LanceDB table (folder or object storage) of path, start, end, vector -> table.
        With `partitions` (256 for 20,000 videos) its vector index is built: search it with
        .distance_type("cosine").nprobes(16).refine_factor(10), as RESULTS.md does."""
        import lancedb                                            # optional, see requirements.txt
        import pyarrow
        vector = pyarrow.list_(pyarrow.list_(pyarrow.float32(), self.meta["width"] + 2))
        schema = pyarrow.schema([("path", pyarrow.string()), ("start", pyarrow.float64()),
                                 ("end", pyarrow.float64()), ("vector", vector)])

        def batches():
            for _, parts, vectors in self.multivectors():
                columns = [*zip(*parts), [list(x) for x in vectors]]
                yield pyarrow.RecordBatch.from_pydict(dict(zip(schema.names, columns)), schema)
        table = lancedb.connect(uri).create_table(table, batches(), schema=schema)
        if partitions:
            table.create_index("vector", config=lancedb.index.IvfFlat(
                distance_type="cosine", num_partitions=partitions))
        return table

    def to_qdrant(self, client, collection="videos"):
        """Write a Qdrant collection of multivectors, with path, start and end in the payload."""
        from qdrant_client import models                          # optional, see requirements.txt
        maxsim = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        parameters = models.VectorParams(size=self.meta["width"] + 2, multivector_config=maxsim,
                                         distance=models.Distance.COSINE)
        client.create_collection(collection, vectors_config=parameters)
        for rows, parts, vectors in self.multivectors(32):        # a server takes 32 MB at a time
            client.upsert(collection, [
                models.PointStruct(id=row, vector=x.tolist(),
                                   payload=dict(zip(("path", "start", "end"), part)))
                for row, part, x in zip(rows, parts, vectors)])

# ---- Pictures and the command line ---------------------------------------------------------------
def span(hit, segment):
    """The time of a hit to read: mm:ss of a segment, or the seconds of the best frame."""
    start, end = hit["start"], hit["end"]
    if not segment:
        return f"{start:.1f} to {end:.1f} s"
    width, digits = (2, 0) if segment >= 5 else (4, 1)            # 01:07, or 01:07.5
    start, end = round(start, digits), round(end, digits)
    return (f"{int(start // 60):02}:{start % 60:0{width}.{digits}f} to "
            f"{int(end // 60):02}:{end % 60:0{width}.{digits}f}")

def draw_hits(query, hits, num_frames, segment=0, side=96):
    """A contact sheet -> PIL image: for each hit a strip of at most 12 frames, the best one framed
    in red. A video that is gone or cannot be read is a grey strip. `segment` is the index's."""
    step = -(-num_frames // 12)
    columns = -(-num_frames // step)
    image = Image.new("RGB", (max(500, columns * side + 16), 40 + len(hits) * (side + 34)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    draw.text((8, 8), query, "black", ImageFont.load_default(18))
    for rank, hit in enumerate(hits):
        y, name = 40 + rank * (side + 34), Path(hit["path"]).name
        title = f"{rank + 1}   {hit['score']:.3f}   {name}   {span(hit, segment)}"
        draw.text((8, y), title, "black", font)
        try:
            part = (hit["start"], hit["end"]) if segment else ()
            frames = sample_frames(hit["path"], num_frames, side - 8, *part)
        except InputError:
            draw.rectangle((8, y + 20, 8 + columns * side, y + 20 + side), "#c8c8c8")
            draw.text((20, y + 60), f"{name} is missing or cannot be read", "black", font)
            continue
        for column, n in enumerate(range(hit["frame"] % step, num_frames, step)):
            x = 8 + column * side
            if n == hit["frame"]:
                draw.rectangle((x, y + 20, x + side - 1, y + 20 + side - 1), "#c4161c")
            image.paste(Image.fromarray(frames[n].permute(1, 2, 0).numpy()), (x + 4, y + 24))
    return image

def check_picture(path):
    """Raises InputError if a picture cannot be saved under this name."""
    if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE:
        raise InputError(f"{path}: a picture's name ends in .png or .jpg")
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"{path}: no such folder")

def open_model(name, device):
    """A run's folder, or an open_clip name for a model that was never trained on video."""
    torch.manual_seed(0)                                          # new parts are always the same
    model = VideoColBERT.load(name) if Path(name).is_dir() else VideoColBERT(Config(backbone=name))
    return model.to(device).eval()

def index_command(args, device):
    name = os.path.abspath(args.model) if Path(args.model).is_dir() else args.model
    index, problems = VideoIndex.build(args.folder, open_model(args.model, device), args.out, name,
                                       workers=min(8, os.cpu_count()), segment=args.segment,
                                       stride=args.stride)
    for problem in problems:
        print(f"skipped: {problem}")
    rows = f", {len(index.vectors)} segments" if args.segment else ""
    print(f"{len(index.videos)} videos{rows} in {args.out}")

def search_command(args, device):
    if args.sheet:
        check_picture(args.sheet)
    index = VideoIndex.load(args.index, device)
    name = args.model or index.meta["model"]
    if not name:
        raise InputError(f"{args.index} does not say which model made it: use --model")
    hits, = index.search(open_model(name, device), [args.query], args.k)
    segment = index.meta["segment"]
    lines = [f"{rank}  {hit['score']:.3f} (F {hit['F']:.3f}, V {hit['V']:.3f})  {hit['path']}  "
             + span(hit, segment) for rank, hit in enumerate(hits, 1)]
    print(json.dumps(hits) if args.json else "\n".join(lines), flush=True)
    if args.sheet:
        draw_hits(args.query, hits, index.meta["num_frames"], segment).save(args.sheet)

def explain_command(args, device):
    check_picture(args.out)
    model = open_model(args.model, device)
    frames = sample_frames(args.video, model.config.num_frames, model.image_size)
    words, before, after = interactions(model, args.query, frames)
    if not words:
        raise InputError("the query is empty")
    for word, f, v in zip(words, before, after):
        print(f"{word:20} before: frame {f.argmax() + 1}, {f.max():.3f}   "
              f"after: frame {v.argmax() + 1}, {v.max():.3f}")
    title = f"{args.query}   ({Path(args.video).name})"
    draw_interactions([(title, words, frames, before.cpu(), after.cpu())]).save(args.out)
    print(args.out)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    index = commands.add_parser("index", help="index a folder, or bring an index up to date")
    index.add_argument("folder")
    index.add_argument("--out", required=True, help="the folder of the index")
    index.add_argument("--segment", type=float, default=0.0,
                       help="index longer videos in parts of so many seconds; 0 is whole videos")
    index.add_argument("--stride", type=float, default=0.0,
                       help="seconds from one part to the next; default half a segment")
    search = commands.add_parser("search", help="find videos by a sentence")
    search.add_argument("index")
    search.add_argument("query")
    search.add_argument("-k", type=int, default=5, help="number of hits")
    search.add_argument("--sheet", help="draw the hits into this picture")
    search.add_argument("--json", action="store_true", help="print the hits as JSON")
    explain = commands.add_parser("explain", help="draw which frame each word picks in a video")
    explain.add_argument("query")
    explain.add_argument("video")
    explain.add_argument("--out", default="explain.png", help="the picture")
    for command, function in ((index, index_command), (search, search_command),
                              (explain, explain_command)):
        command.add_argument("--model", required=command is not search,
                             help="a run's folder, or an open_clip name")
        command.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
        command.set_defaults(function=function)
    args = parser.parse_args(argv)
    args.function(args, pick_device(args.device))

if __name__ == "__main__":
    run_main(main, "extras.search")
