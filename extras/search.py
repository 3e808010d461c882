"""Search your own videos by a sentence.

    python -m extras.search index FOLDER --model runs/shapes --out INDEX
    python -m extras.search search INDEX "a red square moves left" -k 5 --sheet hits.png
    python -m extras.search explain "a red square" VIDEO --model runs/shapes --out why.png

`index` encodes every video below a folder; run again, it encodes only what is new or has changed.
`search` prints rank, score with its F and V parts, path and the time of the best frame. `explain`
draws which frame each word picks. --model is a run's folder, or an open_clip name for a model that
was never trained on video. Search is exact; to_lancedb and to_qdrant export an index to engines.
"""
import argparse
import functools
import hashlib
import json
import math
import os
from pathlib import Path

import av
import filelock
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from train import autocast, pick_device, prefetch, run_main
from video_colbert import (Config, InputError, VideoColBERT, draw_interactions, frame_times,
                           interactions, mean_max_sim, mms_fv, sample_frames, write_file)

VIDEO_ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".flv",
                 ".wmv", ".ts")

SAVE_EVERY = 256                                                  # videos
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

def read_video(path, num_frames, size):
    """A video's frames and its length in seconds, or what is wrong with it as a string."""
    try:
        times = frame_times(path)                                 # demux once
        ticks, end, tick, _ = times
        return sample_frames(path, num_frames, size, times=times), (end - ticks[0]) * tick
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
def array_shape(meta):
    """Of the array that belongs to an index's list: videos, vectors per video, d."""
    return len(meta["videos"]), 2 * meta["num_frames"] + meta["visual_expansion"], meta["width"]

class VideoIndex:
    """F and V of many videos in a folder: index.json, and a mapped fp16 array (B, N + N + E, d).

    meta["videos"][i] is [path below root, size, mtime_ns, seconds] of row i. The array grows at its
    end, and index.json is replaced afterwards, so that a killed build leaves a complete index,
    followed by rows that the next build drops.
    """

    def __init__(self, folder, meta, device="cpu"):
        self.folder, self.meta, self.videos, self.model = Path(folder), meta, meta["videos"], None
        shape = array_shape(meta)
        self.vectors = torch.empty(shape, dtype=torch.float16)
        if self.videos:                                           # mapped, not read
            self.vectors = torch.from_file(str(self.folder / meta["vectors"]), shared=False,
                                           size=math.prod(shape), dtype=torch.float16).view(shape)
        self.vectors = self.vectors.to(device)

    @classmethod
    def load(cls, folder, device="cpu", unfinished=False):
        """Open an index; on a GPU it is copied there. Raises InputError if there is none, or if its
        array is shorter or longer than its list (an `unfinished` one may be longer)."""
        try:
            meta = json.loads((Path(folder) / "index.json").read_text())
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
    def build(cls, root, model, folder, name="", batch_size=16, workers=4):
        """Index every video below `root`, or bring the index in `folder` up to date -> the index,
        [what is wrong with each video that cannot be read]. `name` is where search finds the model.

        New and changed files are encoded, deleted ones dropped. Raises InputError for an index of
        another model or other videos, and while another process works on it.
        """
        root, c = os.path.abspath(root), model.config
        if not os.path.isdir(root):
            raise InputError(f"no folder {root}")
        if c.interaction != "mms":
            raise InputError("an index holds token-wise vectors; a model with interaction "
                             f"{c.interaction} has none")
        meta = dict(root=root, model=str(name), fingerprint=fingerprint(model), width=model.width,
                    num_frames=c.num_frames, visual_expansion=c.visual_expansion,
                    vectors="vectors-0.f16", videos=[])
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
        if self.videos and not keep and self.meta["root"] != meta["root"]:
            raise InputError(f"{self.folder} is an index of {self.meta['root']} and has none of "
                             f"the videos in {meta['root']}: index into a new folder")
        array = self.meta["vectors"]
        if len(keep) < len(self.videos):
            number = int(array.removeprefix("vectors-").removesuffix(".f16"))
            array = f"vectors-{number + 1}.f16"
            with open(self.folder / array, "wb") as file:
                for i in range(0, len(keep), 1024):
                    file.write(self.vectors[keep[i:i + 1024]].numpy().tobytes())
        return {**meta, "model": meta["model"] or self.meta["model"], "vectors": array,
                "videos": [self.videos[i] for i in keep]}

    def add(self, new, model, batch_size, workers):
        """Encode videos, a list of [path, size, mtime_ns] -> [what is wrong with each video that
        cannot be read]. Whatever happens on the way, those that were encoded are saved."""
        read = functools.partial(read_video, num_frames=model.config.num_frames,
                                 size=model.image_size)
        paths = [os.path.join(self.meta["root"], path) for path, *_ in new]
        bar = tqdm(prefetch(read, paths, workers), "indexing", len(paths), unit="video")
        batch, problems = [], []
        try:
            for file, video in zip(new, bar):
                if isinstance(video, str):
                    problems.append(video)
                else:
                    batch.append((file, *video))
                if len(batch) == batch_size:
                    self.append(batch, model)
                    batch = []
            self.append(batch, model)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped with {len(self.videos)} videos in {self.folder}; the "
                                    "same command continues") from None
        finally:
            self.save()
        return problems

    @torch.no_grad()
    def append(self, batch, model):
        """Encode a list of ([path, size, mtime_ns], frames, seconds) and append it to the index."""
        if not batch:
            return
        frames = torch.stack([frames for _, frames, _ in batch]).to(model.device)
        with autocast(model.device):
            F, V = model.encode_video(frames)
        with open(self.folder / self.meta["vectors"], "ab") as file:
            file.write(torch.cat([F, V], 1).half().cpu().numpy().tobytes())
        self.videos += [[*file, round(seconds, 3)] for file, _, seconds in batch]
        if len(self.videos) % SAVE_EVERY < len(batch):
            self.save()

    @torch.no_grad()
    def scores(self, Q, mask):
        """Q (A, M, d), mask (A, M) -> MMS_F, MMS_V (A, B), exact for the vectors as stored."""
        N, mms_f, mms_v = self.meta["num_frames"], [], []
        for vectors in self.vectors.split(1024):                  # in float32, a piece at a time
            mms_f.append(mean_max_sim(Q, vectors[:, :N].float(), mask))
            mms_v.append(mean_max_sim(Q, vectors[:, N:].float(), mask))
        return torch.cat(mms_f, 1), torch.cat(mms_v, 1)

    @torch.no_grad()
    def search(self, model, queries, k=10):
        """[A strings] -> for each its k best videos (fewer if the index has fewer), dictionaries of
        path, score, F, V, and the best frame with its start and end in seconds.

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
        best, N, results = mms_fv(F, V).topk(min(k, len(self.videos))), self.meta["num_frames"], []
        for a, (scores, rows) in enumerate(zip(*best)):           # (k,), (k,)
            near = self.vectors[rows].float() @ Q[a].sum(0)       # (k, N + N + E), masked are 0
            frames = (near[:, :N] + near[:, N:2 * N]).argmax(1).tolist()
            hits = []
            for score, row, frame in zip(scores.tolist(), rows.tolist(), frames):
                path, _, _, seconds = self.videos[row]
                hits.append(dict(
                    path=os.path.join(self.meta["root"], path), score=score, F=F[a, row].item(),
                    V=V[a, row].item(), start=round(frame / N * seconds, 2),
                    end=round((frame + 1) / N * seconds, 2), frame=frame))
            results.append(hits)
        return results

    def multivectors(self, size=256):
        """The index for an engine, in batches: row numbers, their meta["videos"], and vectors of
        as_multivector, (b, N + N + E, d + 2)."""
        N = self.meta["num_frames"]
        for i in range(0, len(self.videos), size):
            x, videos = self.vectors[i:i + size].float(), self.videos[i:i + size]
            rows = range(i, i + len(videos))
            yield rows, videos, as_multivector(x[:, :N], x[:, N:]).cpu().numpy()

    def to_lancedb(self, uri, table="videos"):
        """Write a LanceDB table (folder or object storage) of path, seconds and vector -> table."""
        import lancedb                                            # optional, see requirements.txt
        import pyarrow
        vector = pyarrow.list_(pyarrow.list_(pyarrow.float32(), self.meta["width"] + 2))
        schema = pyarrow.schema([("path", pyarrow.string()), ("seconds", pyarrow.float64()),
                                 ("vector", vector)])

        def batches():
            for _, videos, vectors in self.multivectors():
                yield pyarrow.RecordBatch.from_pydict({
                    "path": [video[0] for video in videos],
                    "seconds": [video[3] for video in videos],
                    "vector": [list(x) for x in vectors]}, schema)
        return lancedb.connect(uri).create_table(table, batches(), schema=schema)

    def to_qdrant(self, client, collection="videos"):
        """Write a Qdrant collection of multivectors, with path and seconds in the payload."""
        from qdrant_client import models                          # optional, see requirements.txt
        maxsim = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        parameters = models.VectorParams(size=self.meta["width"] + 2, multivector_config=maxsim,
                                         distance=models.Distance.COSINE)
        client.create_collection(collection, vectors_config=parameters)
        for rows, videos, vectors in self.multivectors():
            client.upsert(collection, [
                models.PointStruct(id=row, vector=x.tolist(),
                                   payload={"path": video[0], "seconds": video[3]})
                for row, video, x in zip(rows, videos, vectors)])

# ---- Pictures and the command line ---------------------------------------------------------------
def draw_hits(query, hits, num_frames, side=96):
    """A contact sheet -> PIL image: for each hit a strip of at most 12 frames, the best one framed
    in red. A video that is gone or cannot be read is a grey strip."""
    step = -(-num_frames // 12)
    columns = -(-num_frames // step)
    image = Image.new("RGB", (max(500, columns * side + 16), 40 + len(hits) * (side + 34)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    draw.text((8, 8), query, "black", ImageFont.load_default(18))
    for rank, hit in enumerate(hits):
        y, name = 40 + rank * (side + 34), Path(hit["path"]).name
        draw.text((8, y), f"{rank + 1}   {hit['score']:.3f}   {name}   {hit['start']:.1f} to "
                          f"{hit['end']:.1f} s", "black", font)
        try:
            frames = sample_frames(hit["path"], num_frames, side - 8)
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
                                       workers=os.cpu_count())
    for problem in problems:
        print(f"skipped: {problem}")
    print(f"{len(index.videos)} videos in {args.out}")

def search_command(args, device):
    if args.sheet:
        check_picture(args.sheet)
    index = VideoIndex.load(args.index, device)
    name = args.model or index.meta["model"]
    if not name:
        raise InputError(f"{args.index} does not say which model made it: use --model")
    hits, = index.search(open_model(name, device), [args.query], args.k)
    lines = [f"{rank}  {hit['score']:.3f} (F {hit['F']:.3f}, V {hit['V']:.3f})  {hit['path']}  "
             f"{hit['start']:.1f} to {hit['end']:.1f} s" for rank, hit in enumerate(hits, 1)]
    print(json.dumps(hits) if args.json else "\n".join(lines), flush=True)
    if args.sheet:
        draw_hits(args.query, hits, index.meta["num_frames"]).save(args.sheet)

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
