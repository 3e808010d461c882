"""Train, evaluate and look at Video-ColBERT.

    python train.py                                        embedded data: moving shapes, minutes on two CPU cores
    python train.py --data msrvtt --root /data/MSRVTT      the paper's main experiment, on a GPU
    torchrun --nproc-per-node=4 train.py --data msrvtt     the same on four, with the same global batch
    python train.py --data msrvtt --download               fetches MSR-VTT first
    python train.py --table 3 --seeds 3                    a table of the paper: trains, goes on with or reuses what it needs
    python train.py --resume runs/msrvtt                   goes on where a run was killed, to the very same weights
    python train.py --bench --batch-size 4                 how fast every part is on this machine, here on a CPU
    python train.py --help                                 every setting, with the table of the paper it comes from

A run writes its folder, runs/NAME: settings.json, log.jsonl (a line a step, then the evaluation), the model
(config.json and model.safetensors, VideoColBERT.load reads it), queries.jsonl (each query's rank) and interactions.png
(the paper's Figure 4); while it runs, checkpoints/.
"""
import argparse
import csv
import dataclasses
import errno
import hashlib
import http.client
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from video_colbert import (VIDEO_ENDINGS, Config, VideoColBERT, VideoIndex, draw_interactions, frame_times, interactions, mean_max_sim,
                           reciprocal_rank_fusion, retrieval_metrics, run_main, sample_frames, video_files, video_to_text, write_whole)

try:
    import fcntl
except ImportError:                                                         # Windows
    fcntl = None


# ---------------------------------------------------------------------------------------------------------------------
# Settings: the dataclass is the command line. Its defaults are the paper's, or DRL's public recipe where it is illegible.

@dataclass
class Settings(Config):
    data: str = "shapes"                    # shapes (embedded), msrvtt, msvd, vatex, didemo, activitynet or your own FILE.jsonl
    root: str = ""                          # the dataset's folder; default data/NAME
    clip_seconds: float = 0.0               # sample only a video's first seconds, 0 for all of it (DiDeMo's captions cover 30)
    out: str = ""                           # the run's folder, must be new; default runs/NAME
    cache: str = "data/cache"               # folder of decoded frames, safe to delete
    epochs: int = 5                         # passes over all pairs of video and caption (Table 10 is illegible, DRL's)
    batch_size: int = 128                   # videos a step, over all GPUs together (likewise)
    captions_per_video: int = 1             # captions of each video in a batch; the video is encoded once for all of them
    lr_pretrained: float = 1e-7             # learning rate of the pre-trained encoders (section 5.2, Table 9)
    lr: float = 1e-4                        # learning rate of the temporal layers and all else that is new (likewise)
    weight_decay: float = 0.01              # Table 9
    warmup: float = 0.1                     # share of the steps with a rising learning rate, then it falls (Table 9)
    max_grad_norm: float = 1.0              # Table 9
    seed: int = 0                           # of weights, order and everything random
    device: str = "auto"                    # auto (cuda, mps or cpu) or any device torch knows
    workers: int = -1                       # processes that decode and load; -1: one a core
    compile: bool = False                   # torch.compile the encoders: minutes at the start, for long runs on a GPU
    checkpoint_every: int = 500             # steps between checkpoints, beside one at the end of each epoch
    resume: str = ""                        # go on with this run's folder, with its own settings
    eval_only: str = ""                     # evaluate this run's model instead of training, on --data if typed
    download: bool = False                  # fetch --data msrvtt into --root and unpack it, then stop
    table: int = 0                          # make a table of the paper: 1 to 8, 11 or 12
    figure: int = 0                         # make a figure of the paper: 3 or 4
    seeds: int = 1                          # runs of each row, with seeds from --seed on: mean and standard deviation
    bench: bool = False                     # measure instead of training: --backbone, --num-frames, --batch-size and --device count
    allow_missing: bool = False             # evaluate without the test videos that are missing or unreadable


PRESETS = {                                                                 # the later in this list win
    "infonce": dict(learn_scale=True, logit_scale=4.6052),                  # section 4.3: learned; CLIP's own log 100 to begin with
    "didemo": dict(num_frames=64, num_tokens=64, clip_seconds=30.0),        # section 5.2
    "activitynet": dict(num_frames=64, num_tokens=64),
    "shapes": dict(backbone="tiny", num_frames=6, num_tokens=12, epochs=45, batch_size=64, captions_per_video=2),
    "tiny": dict(lr_pretrained=1e-3, lr=2e-3, freeze=False, learn_scale=True, logit_scale=3.0, logit_bias=-10.0),
}
# These say nothing of a run's result, and may differ when it is resumed or reused.
FREE = {"out", "cache", "device", "workers", "checkpoint_every", "resume", "download", "table", "figure", "seeds", "bench"}


def parse_settings(argv):
    """Command line -> Settings: what is typed, else the presets of loss, dataset and backbone, else the paper's.

    With --resume or --eval-only the run's own settings stand in for presets and paper.
    """
    source = inspect.getsource(Config) + inspect.getsource(Settings)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Settings):
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(
            type=field.type if isinstance(field.type, type) else lambda text: None if text.lower() == "none" else text)
        parser.add_argument("--" + field.name.replace("_", "-"), **kind,
                            help=f"{comments[field.name]} [{field.default}]".replace("%", "%%"))
    typed = vars(parser.parse_args(argv))
    if typed.get("bench") or typed.get("table") == 11:
        typed.setdefault("data", "msrvtt")                                  # the paper's sizes, not the embedded data's
    if run := typed.get("resume") or typed.get("eval_only"):
        saved = read_settings(run)
        fixed = saved.keys() - FREE if "resume" in typed else {f.name for f in dataclasses.fields(Config)} - {"num_frames"}
        if other := [f"--{name.replace('_', '-')} {saved[name]}" for name in fixed & typed.keys() if typed[name] != saved[name]]:
            raise ValueError(f"{run} was begun with {', '.join(sorted(other))}: leave the setting out, or begin a new run")
        if "data" in typed:                                                 # --eval-only, elsewhere
            saved.update(root="", clip_seconds=PRESETS.get(typed["data"], {}).get("clip_seconds", 0.0))
        return Settings(**{**saved, **typed})
    names = {typed.get(name, PRESETS.get(typed.get("data", Settings.data), {}).get(name, default))
             for name, default in (("loss", Settings.loss), ("data", Settings.data), ("backbone", Settings.backbone))}
    preset = {name: value for key, values in PRESETS.items() if key in names for name, value in values.items()}
    return Settings(**{**preset, **typed})


def read_settings(run):
    """A run's folder -> its settings, a dict; ValueError where there are none."""
    saved = read(Path(run) / "settings.json", json.load)
    if not isinstance(saved, dict) or saved.keys() != asdict(Settings()).keys():
        raise ValueError(f"{run}/settings.json is not of this version of train.py")
    return saved


def config_of(s):
    return Config(**{f.name: getattr(s, f.name) for f in dataclasses.fields(Config)})


def read(path, parse):
    """What `parse` makes of a text file; ValueError names the file, and the place where the parser knows it."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return parse(file)
    except KeyError as error:
        raise ValueError(f"{path}: no {error} where there should be one") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Many processes (torchrun): each encodes its share of a batch, all see the loss of the whole batch

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def any_process(flag):
    """Is it true in any of the processes?"""
    flags = torch.tensor([bool(flag)], dtype=torch.int32)                   # on the CPU: nothing waits for the device
    if WORLD > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def share(items, rank=None):
    """A process's part of a list, by default this one's; the parts in order of rank make the list."""
    rank = RANK if rank is None else rank
    return items[len(items) * rank // WORLD:len(items) * (rank + 1) // WORLD]


def gather_lists(part):
    """The lists of all processes, joined in order of rank: what `share` took apart."""
    parts = [part] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, part)
    return [x for part in parts for x in part]


def gather_features(x, sizes):
    """(sizes[RANK], ...) -> (sum(sizes), ...), in order of rank. Gradients flow to this process's own rows alone.

    Every process has the loss of the whole batch, so summing the parameters' gradients over processes completes them.
    """
    if WORLD == 1:
        return x
    parts = [x.new_zeros(max(sizes), *x.shape[1:]) for _ in sizes]          # all alike, as collectives want them
    own = torch.cat([x.detach(), x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
    dist.all_gather(parts, own)
    return torch.cat([x if rank == RANK else part[:n] for rank, (part, n) in enumerate(zip(parts, sizes))])


def sum_gradients(model):
    """Add up the gradients of all processes; those of the loss's own scale and bias are whole in each, so they are averaged."""
    if WORLD == 1:
        return
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() / (WORLD if name.startswith("logit_") else 1) for name, grad in named])
    dist.all_reduce(flat)
    for (_, grad), total in zip(named, flat.split([grad.numel() for _, grad in named])):
        grad.copy_(total.view_as(grad))


# ---------------------------------------------------------------------------------------------------------------------
# Data. A split is a list of (video path, [captions]).

# --- shapes: short clips, one coloured polygon each. Some captions can be told from any frame, others only from the order.

SHAPES = {"square": [(-1, -1), (1, -1), (1, 1), (-1, 1)], "triangle": [(0, -1.2), (1.2, 0.9), (-1.2, 0.9)],
          "bar": [(-1.6, -0.4), (1.6, -0.4), (1.6, 0.4), (-1.6, 0.4)],
          "cross": [(-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
                    (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)]}
COLORS = {"red": (225, 30, 30), "green": (30, 170, 50), "blue": (40, 70, 235),
          "yellow": (245, 225, 40), "pink": (250, 130, 200), "cyan": (40, 215, 225)}
BORDERS = {**COLORS, "white": (250, 250, 250), "grey": (120, 120, 120), "brown": (120, 70, 20), "purple": (120, 20, 170)}
MOTIONS = {"moves left": ("x", -1), "moves right": ("x", 1), "moves up": ("y", -1), "moves down": ("y", 1),
           "grows": ("size", 1), "shrinks": ("size", -1), "turns left": ("angle", -1), "turns right": ("angle", 1),
           "appears before a ball": ("order", 1), "appears after a ball": ("order", -1)}


def draw_clip(path, color, shape, border, motion, rng, size=96, length=24):
    """Write one H.264 file. A motion and its opposite show the same frames in the opposite order."""
    x, y, ball_x, ball_y = size * rng.uniform(0.46, 0.54, 4)
    radius, angle = size * rng.uniform(0.2, 0.24), rng.uniform(-0.2, 0.2)
    kind, sign = MOTIONS[motion]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "18", "preset": "veryfast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for t in sign * np.linspace(-1, 1, length):
            image = Image.new("RGB", (size, size))
            draw = ImageDraw.Draw(image)
            draw.rectangle((0, 0, size, size), None, BORDERS[border], 12)
            if kind == "order" and t > 0:
                draw.circle((ball_x, ball_y), 0.2 * size, (255, 255, 255), (0, 0, 0), 3)
            else:
                cx, cy = x + 0.32 * size * t * (kind == "x"), y + 0.32 * size * t * (kind == "y")
                r, a = radius * (1 + 0.5 * t * (kind == "size")), angle + 1.3 * t * (kind == "angle")
                draw.polygon([(cx + r * (u * math.cos(a) - v * math.sin(a)), cy + r * (u * math.sin(a) + v * math.cos(a)))
                              for u, v in SHAPES[shape]], COLORS[color])
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))


def write_shapes(root, galleries=6):
    """Write the embedded dataset in MSR-VTT's layout: `galleries` times 240 clips to train on, less those of the test.

    In a gallery every colour and shape meets each motion once and each border once, so that its 240 captions of
    appearance are distinct, and its 240 of motion. A test clip is asked for by one of the two.
    """
    rng, part = np.random.default_rng(0), Path(f"{root}.part")
    (part / "videos").mkdir(parents=True, exist_ok=True)
    clips = []                                                              # (color, shape, border, motion)
    for gallery in range(galleries + 1):
        for color in COLORS:
            for shape in SHAPES:
                for motion, b in zip(MOTIONS, rng.permutation(list(BORDERS))):
                    if gallery == 0 or (color, shape, b, motion) not in clips[:240]:
                        clips.append((color, shape, b, motion))
    names = [f"video{i}" for i in range(len(clips))]
    captions = [(f"a {c} {s} in a {b} frame", f"a {c} {s} {m}") for c, s, b, m in clips]
    with ThreadPoolExecutor(os.cpu_count()) as pool:                        # the encoder runs outside Python's lock
        jobs = [pool.submit(draw_clip, part / "videos" / f"{name}.mp4", *clip, np.random.default_rng(i))
                for i, (name, clip) in enumerate(zip(names, clips))]
        for job in tqdm(jobs, f"writing {root}", unit="video"):
            job.result()
    (part / "MSRVTT_data.json").write_text(json.dumps({
        "videos": [{"video_id": name} for name in names],
        "sentences": [{"caption": text, "video_id": name, "sen_id": 2 * i + j}
                      for i, name in enumerate(names) for j, text in enumerate(captions[i])]}))
    (part / "MSRVTT_train.9k.csv").write_text("\n".join(["video_id", *names[240:]]) + "\n")
    (part / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(["key,vid_key,video_id,sentence", *(
        f"ret{i},msr{i},{names[i]},{captions[i][(i + i // 10) % 2]}" for i in range(240))]) + "\n")
    part.rename(root)


def shapes_kind(caption):
    """What a query of the embedded data is about: its motion, or its appearance."""
    return "appearance" if " in a " in caption else "motion"


# --- the datasets, in the layouts in which they lie on disks. Every loader: folder -> train, test

SOURCES = {"MSRVTT.zip": "https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip",             # videos
           "msrvtt_data.zip": "https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msrvtt_data.zip"}           # splits, captions


class Missing(ValueError):
    """A file of a dataset that is not there."""


def find(root, *names):
    """The first of these files in root or up to two folders below."""
    if not Path(root).is_dir():
        raise Missing(f"no folder {root}, and --root names none")
    for name in names:
        for depth in ("", "*/", "*/*/"):
            for path in sorted(Path(root).glob(depth + name)):
                return path
    raise Missing(f"no {' or '.join(names)} in {root}")


def text(value):
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:50]!r} where a text should be")
    return value


def videos_below(root):
    """The function from a video's id, with or without an ending, to its path. Copies often changed their ending."""
    names, stems = {}, {}
    for file in map(Path, video_files(root)):
        names.setdefault(file.name, file)
        stems.setdefault(file.stem, file)
    if not names:
        raise Missing(f"no videos in {root}")

    def path(*ids):
        for v in ids:
            stem, ending = os.path.splitext(v)
            for table, key in ((names, v), (stems, v), (stems, stem if ending.lower() in VIDEO_ENDINGS else v)):
                if key in table:
                    return table[key]
        return Path(root, ids[0] if ending.lower() in VIDEO_ENDINGS else f"{ids[0]}.mp4")           # named when it is read
    return path


def check(split, source):
    """The one form that every loader ends in, [(video path, [captions])], or ValueError for what cannot be meant."""
    seen = set()
    for path, captions in split:
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
            raise ValueError(f"{source}: {path.name} has no captions, or an empty one")
        try:
            "".join([*captions, path.name]).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{source}: {path.name!r} or a caption of it is not valid Unicode text") from None
        if "\0" in path.name:
            raise ValueError(f"{source}: {path.name!r} is not a name that a file can have")
        if path in seen:
            raise ValueError(f"{source}: {path.name} is there twice")
        seen.add(path)
    if not split:
        raise ValueError(f"{source}: no videos in it")
    return split


def choose(ids, captions, path, source):
    """[ids] in their order and {id: [captions]} -> checked split."""
    if unknown := [v for v in ids if v not in captions]:
        raise ValueError(f"no captions for {len(unknown)} videos of {source}, {unknown[0]} first")
    return check([(path(v), captions[v]) for v in ids], source)


def ids_in(file):
    return [line.strip() for line in file if line.strip()]


def columns(*names):
    """A parser of CSV files -> tuples of these columns."""
    def parse(file):
        rows = csv.DictReader(file)
        out = []
        for row in rows:
            if None in (values := tuple(row[name] for name in names)):
                raise ValueError(f"line {rows.line_num} is too short")
            out.append(values)
        return out
    return parse


def together(pairs):
    """(video, caption) pairs -> {video: [captions]}, in order."""
    out = {}
    for video, caption in pairs:
        out.setdefault(video, []).append(caption)
    return out


def load_msrvtt(root):
    """9k training and 1k-A test videos, captions of CLIP4Clip, of the official challenge or of Frozen in Time."""
    def sentences(file):
        data = json.load(file)
        if "sentences" in data:
            return [(text(s["video_id"]), s["caption"]) for s in data["sentences"]]
        return [(text(s["image_id"]), s["caption"]) for s in data["annotations"]]       # Frozen in Time's

    annotation = [find(root, "MSRVTT_data.json", "MSR_VTT.json", "train_val_videodatainfo.json")]
    if annotation[0].name == "train_val_videodatainfo.json":
        annotation.append(find(root, "test_videodatainfo.json"))
    captions = together(pair for path in annotation for pair in read(path, sentences))
    test_csv, path = find(root, "MSRVTT_JSFUSION_test.csv"), videos_below(root)
    test = read(test_csv, columns("video_id", "sentence"))
    try:
        source = find(root, "MSRVTT_train.9k.csv")
        train = [video for video, in read(source, columns("video_id"))]
    except Missing:                                                         # 9k is all that 1k-A is not
        source, tested = annotation[0], {video for video, _ in test}
        train = [video for video in captions if video not in tested]
    return choose(train, captions, path, source), check([(path(video), [query]) for video, query in test], test_csv)


class PlainUnpickler(pickle.Unpickler):
    """Containers and strings alone: a pickle can name any function, and have it called."""
    plain = {("builtins", "list"), ("builtins", "dict"), ("collections", "OrderedDict"), ("collections", "defaultdict")}

    def find_class(self, module, name):
        if (module, name) in self.plain:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no captions need")


def load_msvd(root):
    """1,200 training and 670 test videos of about 40 captions, each a query. The 100 for validation are left out."""
    source = find(root, "raw-captions.pkl")
    try:
        with open(source, "rb") as file:
            captions = PlainUnpickler(file, encoding="utf-8").load()
        captions = {v: [c if isinstance(c, str) else " ".join(c) for c in texts] for v, texts in captions.items()}
    except Exception as error:                                              # a pickle can fail in any way
        raise ValueError(f"{source}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    path, lists = videos_below(root), [find(root, f"{part}_list.txt") for part in ("train", "test")]
    return tuple(choose(read(ids, ids_in), captions, path, ids) for ids in lists)


def load_vatex(root):
    """English captions, ten a video. The 3,000 validation videos are halved by lists (HGR): 1,500 are the test."""
    parse = lambda file: [(text(v["videoID"]), v["enCap"]) for v in json.load(file)]
    annotation = [find(root, f"vatex_{part}_v1.0.json") for part in ("training", "validation")]
    train, val = (read(path, parse) for path in annotation)
    for path, part in zip(annotation, (train, val)):
        if len(dict(part)) < len(part):
            raise ValueError(f"{path}: a videoID is there twice")
    path, test = videos_below(root), find(root, "test_list.txt")
    try:
        listed = find(root, "train_list.txt")
    except Missing:
        return check([(path(v), c) for v, c in train], annotation[0]), choose(read(test, ids_in), dict(val), path, test)
    captions = {**dict(train), **dict(val)}
    return choose(read(listed, ids_in), captions, path, listed), choose(read(test, ids_in), captions, path, test)


def load_didemo(root):
    """All descriptions of a video, in the file's order, are one paragraph: its only caption and query."""
    path = videos_below(root)

    def split(source):
        sentences = together(read(source, lambda file: [(text(d["video"]), text(d["description"]).strip()) for d in json.load(file)]))
        return check([(path(v), [" ".join(texts)]) for v, texts in sentences.items()], source)
    return split(find(root, "train_data.json")), split(find(root, "test_data.json"))


def load_activitynet(root):
    """All sentences of a video are one paragraph. The test is val_1. Files are named with or without v_."""
    path = videos_below(root)

    def split(part, ids):
        source = find(root, part)
        texts = read(source, lambda file: {v: [" ".join(text(s).strip() for s in a["sentences"])] for v, a in json.load(file).items()})
        try:
            source = find(root, ids)
            chosen = read(source, lambda file: [text(v) for v in json.load(file)])
        except Missing:
            chosen = list(texts)
        return choose(chosen, texts, lambda v: path(v, v.removeprefix("v_"), f"v_{v}"), source)
    return split("train.json", "train_ids.json"), split("val_1.json", "val_ids.json")


def load_manifest(file):
    """Your own videos: JSON lines {"video": path below the file's folder, "captions": [...], "split": "train" or "test"}."""
    folder, splits = Path(file).parent, {"train": [], "test": [], "val": []}

    def parse(lines):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                clip = json.loads(line)
                name, texts, split = clip["video"], clip["captions"], clip["split"]
                if split not in splits:
                    raise ValueError(f"split is {split!r}, not train, val or test")
            except KeyError as error:
                raise ValueError(f"line {number}: no {error}") from None
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(name, str) or os.path.isabs(name) or os.path.normpath(name).startswith(".."):
                raise ValueError(f"line {number}: {name!r} leaves the file's folder; videos lie below it")
            check([(folder / name, texts)], f"line {number}")
            splits[split].append((folder / os.path.normpath(name), texts))
    read(file, parse)
    for split in ("train", "test"):
        check(splits[split], f"{file}, split {split!r}")
    return splits["train"], splits["test"]


LOADERS = {"shapes": load_msrvtt, "msrvtt": load_msrvtt, "msvd": load_msvd, "vatex": load_vatex, "didemo": load_didemo,
           "activitynet": load_activitynet}


def load_dataset(s):
    """-> train, test: lists of (video path, [captions]), from the annotation alone."""
    if s.data.endswith(".jsonl"):
        return load_manifest(s.data)
    if s.data not in LOADERS:
        raise ValueError(f"--data must be {', '.join(LOADERS)} or a file that ends in .jsonl, not {s.data}")
    root = Path(s.root or f"data/{s.data}")
    if s.data == "shapes" and not root.exists() and RANK == 0:
        write_shapes(root)
    gather_lists([])                                                        # the others wait until it is there
    try:
        return LOADERS[s.data](root)
    except Missing as error:
        hint = f": unpack {' and '.join(SOURCES.values())} into it, or let --download do it" if s.data == "msrvtt" else ""
        raise ValueError(f"{error}{hint}") from None


# --- MSR-VTT's download

def fetch(url, file):
    """Download url to file, going on where a broken attempt stopped; whole or not at all. ValueError says what went wrong."""
    part, failures = Path(f"{file}.part"), 0
    while failures < 5:
        have, total, whole, error = part.stat().st_size if part.exists() else 0, 0, False, "the server breaks off"
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as answer:
                total = int(answer.headers.get("Content-Length") or 0)
                if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    raise ValueError("the server sends another part than was asked for")
                have = have if answer.status == 206 else 0                  # no ranges here: from the beginning
                total += have
                with open(part, "ab" if have else "wb") as out, \
                        tqdm(total=total or None, initial=have, desc=Path(file).name, unit="B", unit_scale=True) as bar:
                    while data := answer.read(2 ** 20):
                        out.write(data)
                        bar.update(len(data))
            whole = not total or part.stat().st_size == total               # without a length its end is all there is
        except urllib.error.HTTPError as problem:
            whole = problem.code == 416 and problem.headers.get("Content-Range") == f"bytes */{have}"        # it was all here
            if problem.code == 416 and not whole:                           # longer than what is there: not its beginning
                part.unlink()
            elif problem.code < 500 and not whole:
                raise ValueError(f"{url}: {problem}") from None
            error = problem
        except ValueError as problem:
            part.unlink(missing_ok=True)
            error = problem
        except (OSError, http.client.HTTPException) as problem:
            if getattr(problem, "errno", None) == errno.ENOSPC:
                raise ValueError(f"{part}: {problem.strerror}") from None
            error = problem
        if whole:
            return os.replace(part, file)
        now = part.stat().st_size if part.exists() else 0
        if total and now > total:
            part.unlink()
        failures = 0 if now > have else failures + 1
        time.sleep(failures)
    raise ValueError(f"{url}: {error}; what arrived is kept, the same command goes on with it")


def unpack(file, root):
    """Unpack a zip below root, each file whole or not at all; ValueError for a damaged archive and for paths that leave root."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir()]
            for e in entries:
                if os.path.isabs(e.filename) or ".." in re.split(r"[/\\]", e.filename) or ":" in e.filename:
                    raise ValueError(f"{file}: {e.filename!r} would leave the folder; nothing was unpacked")
                if not (Path(root) / e.filename).resolve().is_relative_to(Path(root).resolve()):
                    raise ValueError(f"{file}: {e.filename!r} would leave the folder through a link; nothing was unpacked")
            for e in tqdm(entries, f"unpacking {Path(file).name}", unit="file"):
                target = Path(root) / e.filename
                if target.exists() and target.stat().st_size == e.file_size:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(target.name + ".part")
                with archive.open(e) as source, open(part, "wb") as out:    # reading checks the CRC
                    shutil.copyfileobj(source, out)
                os.replace(part, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        Path(file).unlink()
        raise ValueError(f"{file}: what arrived is no whole archive ({error}) and was removed: fetch it again") from None


def download(s):
    """MSR-VTT's videos and annotation -> the folder they lie in."""
    if s.data != "msrvtt":
        raise ValueError(f"--download knows --data msrvtt, not {s.data}: the others' videos come from their own pages")
    root = Path(s.root or f"data/{s.data}")
    root.mkdir(parents=True, exist_ok=True)

    def whole():
        return all(path.exists() for split in load_msrvtt(root) for path, _ in split)
    try:
        if whole():
            return root
    except Missing:
        pass
    for name, url in SOURCES.items():
        if not (root / name).exists():
            fetch(url, root / name)
        unpack(root / name, root)
    if not whole():
        raise ValueError(f"{root}: the archives do not hold all videos of the annotation")
    for name in SOURCES:                                                    # 6 GB that are there twice
        (root / name).unlink()
    return root


# ---------------------------------------------------------------------------------------------------------------------
# Frames: every video is decoded once, into a file of the cache

SAMPLER = hashlib.sha1((inspect.getsource(sample_frames) + inspect.getsource(frame_times)).encode()).hexdigest()


def cached_frames(path, num_frames, size, seconds, cache):
    """sample_frames through the cache. A file there counts only if its header is right to the last bit.

    The header holds the video file's path, size and times, the settings, a hash of the sampler's code and a checksum of
    the pixels, so a change of any decodes anew.
    """
    path = os.path.abspath(path)
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    name = hashlib.sha1(os.fsencode(path) + f" {num_frames} {size} {seconds}".encode()).hexdigest()
    file = Path(cache) / name[:2] / f"{name[2:]}.frames"

    def header(pixels):
        return json.dumps([path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, num_frames, size, seconds, SAMPLER,
                           zlib.crc32(pixels)]).encode()

    if file.exists():
        head, _, pixels = file.read_bytes().partition(b"\n")
        if head == header(pixels):
            return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(num_frames, 3, size, size)
    frames = sample_frames(path, num_frames, size, seconds)
    part = file.with_suffix(".part")                                        # what a kill leaves is written over
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(header(frames.numpy()) + b"\n" + frames.numpy().tobytes())
        os.replace(part, file)                                              # whole or not at all
    except FileNotFoundError:                                               # another process was first; the checksum guards both
        pass
    except OSError as error:
        raise ValueError(f"--cache {cache}: {error.strerror}") from None
    return frames


class Clips(torch.utils.data.Dataset):
    """Items are (index of a video, [indices of its captions]) -> (index, captions, frames uint8 (N, 3, S, S) or an error)."""

    def __init__(self, videos, items, s, size):
        self.videos, self.items, self.settings = videos, items, (s.num_frames, size, s.clip_seconds, s.cache)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        index, chosen = self.items[i]
        path, captions = self.videos[index]
        try:
            return index, [captions[c] for c in chosen], cached_frames(path, *self.settings)
        except ValueError as error:
            return index, [], str(error)


def decode_once(videos, what, s, size):
    """Fill the cache for a split, in parallel -> the videos that can be read, [a line about each that cannot]."""
    loader = DataLoader(Clips(videos, share([(i, []) for i in range(len(videos))]), s, size), batch_size=None, num_workers=s.workers)
    bar = tqdm(loader, f"reading {what}", unit="video", disable=RANK > 0)
    broken = dict(gather_lists([(i, frames) for i, _, frames in bar if isinstance(frames, str)]))
    return [video for i, video in enumerate(videos) if i not in broken], list(broken.values())


def load_data(s, size):
    """-> training videos, test videos: lists of (video path, [captions]) whose frames are in the cache; number of test videos lost."""
    train, test = load_dataset(s)
    trains = s.epochs > 0 and not s.eval_only
    if trains:
        check_batches(train, s)                                             # before any decoding
    train_read, broken = decode_once(train, "training videos", s, size) if trains else ([], [])
    for line in broken if RANK == 0 else []:
        print(f"left out of training: {line}")
    if len(broken) > 0.01 * len(train):
        raise ValueError(f"{len(broken)} of {len(train)} training videos cannot be read, above: more than 1 in 100 is no accident")
    test_read, broken = decode_once(test, "test videos", s, size)
    if broken and not s.allow_missing:
        raise ValueError(f"{len(broken)} of {len(test)} test videos cannot be read, and a smaller gallery flatters every number "
                         f"(--allow-missing evaluates without them): {'; '.join(broken[:5])}{'; ...' if len(broken) > 5 else ''}")
    if not test_read:
        raise ValueError("no test video can be read")
    return train_read, test_read, len(broken)


def check_batches(videos, s):
    """-> steps an epoch; ValueError where the batches cannot be made."""
    examples = sum(math.ceil(len(captions) / s.captions_per_video) for _, captions in videos)
    if s.batch_size > examples:
        raise ValueError(f"--batch-size {s.batch_size} is more than the {examples} examples to train on")
    if s.batch_size % WORLD:
        raise ValueError(f"--batch-size {s.batch_size} cannot be shared evenly among {WORLD} processes")
    return examples // s.batch_size


def positive_pairs(videos, items):
    """[(index of a video, [indices of captions])] -> bool (A, B): is the caption true of the video?

    The same video twice in a batch is a positive, and so is a video that has the very same caption.
    """
    place = np.repeat(np.arange(len(items)), [len(chosen) for _, chosen in items])      # (A,), each caption's column
    texts = np.unique([videos[v][1][c] for v, chosen in items for c in chosen], return_inverse=True)[1]     # (A,), a number each
    has = np.zeros((texts.max() + 1, len(items)), bool)                     # (texts, B)
    has[texts, place] = True
    same = np.array([v for v, _ in items])
    return torch.from_numpy(has[texts] | (same[place][:, None] == same))    # (A, B)


def collate(clips):
    """[(index, captions, frames)] -> captions, a list of A str, and frames (B, N, 3, S, S), or a line about a clip that broke."""
    for *_, frames in clips:
        if isinstance(frames, str):
            return [], frames
    return [caption for _, chosen, _ in clips for caption in chosen], torch.stack([frames for *_, frames in clips])


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser (section 5.2, Table 9)

def make_optimizer(model, s):
    """Adam with decoupled weight decay in three groups: pre-trained, new, and the loss's scale and bias without decay."""
    groups = {"pretrained": [], "new": [], "scale": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups["pretrained" if name.startswith("clip.") else "scale" if name.startswith("logit_") else "new"].append(p)
    lr = {"pretrained": s.lr_pretrained, "new": s.lr, "scale": 10 * s.lr}      # two numbers, far to go when trained from scratch
    decay = {"pretrained": s.weight_decay, "new": s.weight_decay, "scale": 0.0}
    return torch.optim.AdamW([dict(params=groups[g], lr=lr[g], peak_lr=lr[g], weight_decay=decay[g], name=g) for g in groups if groups[g]],
                             betas=(0.9, 0.98), eps=1e-6, fused=model.mean.device.type in ("cuda", "cpu"))


def schedule(step, steps, warmup):
    """Factor of the learning rate in step 0 .. steps - 1: a linear rise over the share `warmup`, then a linear fall to 0."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: all that a run is, written whole or not at all. What is read back cannot execute anything.

def save_checkpoint(folder, state):
    """Write folder/step-N.pt, its checksum in the first line, and keep the last two."""
    data = io.BytesIO()
    torch.save(state, data)
    try:
        folder.mkdir(exist_ok=True)
        head = hashlib.sha256(data.getbuffer()).hexdigest().encode() + b"\n"
        write_whole(folder / f"step-{state['step']:08d}.pt", head, data.getbuffer())
    except OSError as error:
        last = max(folder.glob("step-*.pt"), default="none")
        raise ValueError(f"the checkpoint of step {state['step']} cannot be written ({error.strerror}); "
                         f"the last good one is {last}") from None
    for old in sorted(folder.glob("step-*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(folder):
    """The last whole checkpoint, or None. A damaged one is named."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        head, _, data = path.read_bytes().partition(b"\n")
        if head == hashlib.sha256(data).hexdigest().encode():
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        print(f"{path} is damaged, the one before it is taken")


# ---------------------------------------------------------------------------------------------------------------------
# Loop

def autocast(device):
    """bf16 on CUDA; on a CPU it is emulated and slow, on MPS it saves nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def epoch_items(videos, s, epoch):
    """Every caption once, in an order of this epoch's own -> [(index of a video, [indices of up to k of its captions])]."""
    rng, items = np.random.default_rng([s.seed, epoch]), []
    for v, (_, captions) in enumerate(videos):
        order = rng.permutation(len(captions)).tolist()
        items += [(v, order[i:i + s.captions_per_video]) for i in range(0, len(order), s.captions_per_video)]
    return [items[i] for i in rng.permutation(len(items))]


def training_step(model, optimizer, s, ids, mask, frames, positives, sizes):
    """One step on this process's part of a batch -> loss, the true pairs' mean MMS_F and MMS_V, gradient norm, (4,) on the device.

    `positives` (A, B) is the whole batch's; `sizes` holds the number of queries of every process.
    """
    with autocast(frames.device):
        Q, (F, V) = model.encode_query(ids, mask), model.encode_video(frames)
    videos = [len(frames)] * WORLD
    loss, sim_F, sim_V = model.loss(gather_features(Q, sizes), gather_features(mask, sizes), gather_features(F, videos),
                                    gather_features(V, videos), positives)
    loss.backward()
    sum_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    weights = positives / positives.sum()                                   # indexing by a mask would wait for the device
    return torch.stack([loss.detach(), (sim_F.detach() * weights).sum(), (sim_V.detach() * weights).sum(), norm])


def train(model, videos, s, device, out):
    """Train `model` in place, from the last checkpoint in `out` on if it holds one; a line a step goes to out/log.jsonl.

    SIGTERM and Ctrl-C write a checkpoint and raise KeyboardInterrupt. A loss or gradient that is not finite raises ValueError.
    """
    per_epoch, cuda, first, size = check_batches(videos, s), device.type == "cuda", 0, 0
    steps, optimizer, checkpoints = s.epochs * per_epoch, make_optimizer(model, s), out / "checkpoints"
    data = hashlib.sha256(json.dumps([[path.name, captions] for path, captions in videos]).encode()).hexdigest()
    if state := load_checkpoint(checkpoints):
        if state["data"] != data:
            raise ValueError(f"{out} was begun with other training videos or captions than can be read now")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        first, size = state["step"], state["log"]
    model.train()
    pending, signals = deque(), []                                          # steps whose numbers are on their way; what came to stop us
    log = open(os.devnull if RANK else out / "log.jsonl", "a", buffering=1)             # a line is on disk when its step is over
    if RANK == 0:
        log.truncate(size)                                                  # what was done after the checkpoint is done again
    bar = tqdm(total=steps * s.batch_size, initial=first * s.batch_size, desc="training", unit="video", mininterval=1, disable=RANK > 0)

    def report():
        step, lr, batch, numbers, arrived = pending.popleft()
        if arrived:
            arrived.synchronize()
        loss, F, V, norm = numbers.tolist()
        if not math.isfinite(loss + norm):                                  # a bad gradient would spoil the next checkpoint
            names = ", ".join(videos[v][0].name for v, _ in batch)
            raise ValueError(f"the loss of step {step} is {loss}, its gradient's norm {norm}; last good checkpoint: "
                             f"{max(checkpoints.glob('step-*.pt'), default='none')}; videos of that step: {names}")
        log.write(json.dumps(dict(step=step, epoch=step // per_epoch, loss=loss, MMS_F=F, MMS_V=V, grad_norm=norm, lr=lr)) + "\n")
        bar.set_postfix(loss=f"{loss:.3f}", MMS_F=f"{F:.3f}", MMS_V=f"{V:.3f}", lr=f"{lr['pretrained']:.1e}/{lr['new']:.1e}", refresh=False)

    before = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for step in range(first, steps):
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == first:
                items = epoch_items(videos, s, epoch)
                batches = [items[k * s.batch_size:(k + 1) * s.batch_size] for k in range(per_epoch)]
                mine = [item for batch in batches[i:] for item in share(batch)]
                loader = iter(DataLoader(Clips(videos, mine, s, model.image_size), s.batch_size // WORLD, collate_fn=collate,
                                         num_workers=s.workers if cuda else 0, pin_memory=cuda))
            captions, frames = next(loader)
            if isinstance(frames, str):                                     # it was readable when the run began
                raise ValueError(frames)
            sizes = [sum(len(chosen) for _, chosen in share(batches[i], rank)) for rank in range(WORLD)]
            ids, mask = model.tokenize(captions)                            # (A / WORLD, M)
            batch = [(x.pin_memory() if cuda else x).to(device, non_blocking=True)
                     for x in (ids, mask, frames, positive_pairs(videos, batches[i]))]
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step, steps, s.warmup)
            numbers = training_step(model, optimizer, s, *batch, sizes).to("cpu", non_blocking=cuda)
            pending.append((step, {g["name"]: g["lr"] for g in optimizer.param_groups}, batches[i], numbers,
                            torch.cuda.current_stream().record_event() if cuda else None))
            if len(pending) > 2:                                            # reading at once would make the device wait for us
                report()
            bar.update(s.batch_size)
            stop = any_process(signals)
            if stop or (step + 1) % s.checkpoint_every == 0 or i == per_epoch - 1:
                while pending:                                              # none is written that a bad loss has spoilt
                    report()
                if RANK == 0:
                    save_checkpoint(checkpoints, dict(step=step + 1, log=log.tell(), data=data, rng=torch.get_rng_state(),
                                                      model=model.state_dict(), optimizer=optimizer.state_dict()))
            if stop:
                raise KeyboardInterrupt(f"stopped after step {step}; go on with --resume {out}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        bar.close()
        log.close()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation (section 5.3, Table 3) and Figure 4

@torch.no_grad()
def evaluate(model, videos, s, device):
    """Every caption of the videos against every video -> {score: (A, B)}, target (A,), captions (A)."""
    model.eval()
    items = share([(v, range(len(captions))) for v, (_, captions) in enumerate(videos)])
    loader = DataLoader(Clips(videos, items, s, model.image_size), 32, collate_fn=list,
                        num_workers=s.workers if device.type == "cuda" else 0)
    captions, target, encoded = [], [], []
    for clips in tqdm(loader, "evaluating", unit="batch", disable=RANK > 0):
        for index, chosen, frames in clips:
            if isinstance(frames, str):
                raise ValueError(frames)
            captions += chosen
            target += [index] * len(chosen)
        ids, mask = (x.to(device) for x in model.tokenize([caption for _, chosen, _ in clips for caption in chosen]))
        with autocast(device):
            Q, (F, V) = model.encode_query(ids, mask), model.encode_video(torch.stack([f for *_, f in clips]).to(device))
        encoded.append([x.cpu() for x in (Q, mask, F, V)])
    captions, target = gather_lists(captions), gather_lists(target)
    sim_F, sim_V = (x.cpu() for x in model.similarities(*(torch.cat(parts).to(device) for parts in zip(*gather_lists(encoded)))))
    name = model.config.interaction.upper()
    return {f"{name}_F": sim_F, f"{name}_V": sim_V, f"{name}_FV": sim_F + sim_V,
            "RRF": reciprocal_rank_fusion(sim_F, sim_V)}, torch.tensor(target), captions


def results(sims, target, kinds):
    """{score: (A, B)}, target (A,) and the kind of each query -> rows, one of each score for all queries, each kind, and video to text."""
    rows = []
    for kind in dict.fromkeys(["all", *sorted(kinds)]):
        chosen = torch.tensor([kind in ("all", k) for k in kinds])
        rows += [dict(queries=kind, number=int(chosen.sum()), score=score, **retrieval_metrics(sim[chosen], target[chosen]))
                 for score, sim in sims.items()]
    back = {score: video_to_text(sim, target) for score, sim in sims.items()}
    return rows + [dict(queries="video to text", number=len(other[1]), score=score, **retrieval_metrics(*other))
                   for score, other in back.items()]


def results_table(record):
    """A run's last record -> the table to print."""
    names = list(record["evaluation"][0])[3:]
    lines = [f"{record['evaluation'][0]['number']} queries against a gallery of {record['gallery']} videos"
             f"{', %d test videos missing: not comparable' % record['lost'] if record['lost'] else ''}",
             f"{'queries':22}{'score':8}" + "".join(f"{name:>8}" for name in names)]
    for row in record["evaluation"]:
        values = "".join(f"{row[n]:8.3f}" if n.startswith("nDCG") else f"{row[n]:8.1f}" for n in names)
        lines.append(f"{row['queries'] + ' (' + str(row['number']) + ')':22}{row['score']:8}{values}")
    return "\n".join(lines)


def draw_examples(model, videos, s, queries, number=4):
    """Figure 4 for a few queries, evenly spread over the test set. `queries` are the lines of queries.jsonl."""
    rows, path = [], {path.name: path for path, _ in videos}
    for i in sorted({min(k * len(queries) // number + k, len(queries) - 1) for k in range(number)}):    # + k: both kinds of shapes' queries
        q = queries[i]
        frames = cached_frames(path[q["video"]], s.num_frames, model.image_size, s.clip_seconds, s.cache)
        words, before, after = interactions(model, q["query"], frames)
        rows.append((f"{q['query']}   ({q['video']}, rank {list(q['rank'].values())[2]} of {len(videos)})", words, frames, before, after))
    return draw_interactions(rows)


# ---------------------------------------------------------------------------------------------------------------------
# A run: its folder holds all there is to know of it, and log.jsonl ends in the evaluation once it is finished

CODE = hashlib.sha1(b"".join((Path(__file__).parent / name).read_bytes() for name in ("video_colbert.py", "train.py"))).hexdigest()[:10]


def hardware(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    return f"{WORLD} x {name}, torch {torch.__version__}, Python {sys.version.split()[0]}"


def finished(folder):
    """The last record of a run's log if it is the evaluation, else None."""
    try:
        record = json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None
    return record if "evaluation" in record else None


def find_run(s):
    """A folder in runs/ that was begun with these settings, a finished one before others, or None."""
    same = lambda saved: all(saved.get(name) == value for name, value in asdict(s).items() if name not in FREE)
    found = [path.parent for path in sorted(Path("runs").glob("*/settings.json")) if same(read(path, json.load))]
    return max(found, key=lambda folder: finished(folder) is not None, default=None)


def compile_encoders(model):
    """In place, so that the parameters keep their names."""
    for module in (model.clip.visual, model.clip.text.transformer, *model.temporal):
        module.compile()


def begin(s):
    """The run's folder, s.resume or a new one, claimed for as long as this process lives."""
    if s.resume:
        out = Path(s.resume)
    else:
        name = Path(s.data).stem + ("-eval" if s.eval_only else "")
        free = (Path("runs", name + suffix) for suffix in itertools.chain([""], map("-{}".format, itertools.count(2))))
        for out in [Path(s.out)] if s.out else free:
            try:
                out.mkdir(parents=True)
                break
            except FileExistsError:
                if s.out:
                    raise ValueError(f"--out {s.out} exists already; name a new folder, or go on with --resume {s.out}") from None
        (out / "settings.json").write_text(json.dumps({**asdict(s), "out": "", "resume": ""}, indent=2))
    if fcntl:
        global claimed                                                      # an open file is a claim, until this process dies
        claimed = open(out / "settings.json")
        try:
            fcntl.flock(claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is at work on {out}") from None
    return out


def run(s, device):
    """Train and evaluate as the settings say -> the run's folder."""
    if s.resume and finished(s.resume):
        return Path(s.resume)
    if s.out and Path(s.out).exists():                                      # before the slow work, and again when it is made
        raise ValueError(f"--out {s.out} exists already; name a new folder, or go on with --resume {s.out}")
    s.workers = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if s.workers < 0 else s.workers
    torch.manual_seed(s.seed)
    model = (VideoColBERT.load(s.eval_only) if s.eval_only else VideoColBERT(config_of(s))).to(device)
    if s.compile:
        compile_encoders(model)
    train_videos, test_videos, lost = load_data(s, model.image_size)
    out = Path(gather_lists([str(begin(s)) if RANK == 0 else ""])[0])
    if train_videos:
        train(model, train_videos, s, device, out)
    sims, target, captions = evaluate(model, test_videos, s, device)
    if RANK > 0:
        return out
    if not s.eval_only:
        model.save(out)
    rows = results(sims, target, [shapes_kind(c) if s.data == "shapes" else "all" for c in captions])
    ranks = {score: (sim >= sim.gather(1, target[:, None])).sum(1).tolist() for score, sim in sims.items()}
    tokens = model.real_tokens(model.tokenize(captions)[0]).sum(1).tolist()
    queries = [dict(query=c, video=test_videos[v][0].name, tokens=n, rank=dict(zip(ranks, r)))
               for c, v, n, r in zip(captions, target.tolist(), tokens, zip(*ranks.values()))]
    (out / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    draw_examples(model, test_videos, s, queries).save(out / "interactions.png")
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(dict(evaluation=rows, gallery=len(test_videos), lost=lost, hardware=hardware(device), code=CODE)) + "\n")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The paper's tables and figures. A row is what would be typed for it.

MAIN, SIGLIP = (48.1, 74.9, 83.9, .652), ["--backbone", "ViT-B-16-SigLIP"]
TABLES = {                                                                  # title, [(row, flags, score, the paper's on MSR-VTT)]
    0: ("One run's scores", [(score, [], score, None) for score in ("MMS_F", "MMS_V", "MMS_FV", "RRF")]),
    3: ("Table 3: interaction", [
        ("MP on frames", ["--interaction", "mp", "--lambda-video", "0"], "MP_F", (42.1, 69.6, 79.3, .601)),
        ("MP on video", ["--interaction", "mp", "--lambda-frame", "0"], "MP_V", (43.4, 70.4, 80.1, .610)),
        ("MMS_F", ["--lambda-video", "0"], "MMS_F", (44.3, 71.5, 82.4, .626)),
        ("MMS_V", ["--lambda-frame", "0"], "MMS_V", (47.0, 74.1, 82.4, .643)),
        ("MMS_FV", [], "MMS_FV", MAIN),
        ("RRF", [], "RRF", (46.8, 74.6, 83.8, .646))]),
    4: ("Table 4: loss", [
        ("combined InfoNCE", ["--loss", "infonce", "--loss-form", "combined"], "MMS_FV", (45.1, 71.4, 81.4, .625)),
        ("combined sigmoid", ["--loss-form", "combined"], "MMS_FV", (47.1, 73.1, 83.9, .647)),
        ("dual InfoNCE", ["--loss", "infonce"], "MMS_FV", (45.3, 73.0, 83.8, .640)),
        ("dual sigmoid", [], "MMS_FV", MAIN),
        ("CLIP4Clip meanP (MP on frames, InfoNCE; Table 1)", ["--loss", "infonce", "--interaction", "mp", "--lambda-video", "0"], "MP_F",
         (43.1, 70.4, 80.8, None)),
        ("CLIP4Clip seqTransf (MP on video, InfoNCE; Table 1)", ["--loss", "infonce", "--interaction", "mp", "--lambda-frame", "0"], "MP_V",
         (44.5, 71.4, 81.6, None))]),
    5: ("Table 5: query augmentation", [
        ("off", ["--no-query-augmentation"], "MMS_FV", (45.3, 72.5, 82.0, .631)), ("on", [], "MMS_FV", MAIN),
        ("SigLIP, off", [*SIGLIP, "--no-query-augmentation"], "MMS_FV", (51.0, 75.9, 85.1, .675)),
        ("SigLIP, on", SIGLIP, "MMS_FV", (51.5, 76.3, 85.5, .677))]),
    7: ("Table 7: frames", [(f"{n} frames", ["--num-frames", str(n)], "MMS_FV", paper) for n, paper in (
        (4, (45.2, 70.7, 80.7, .622)), (12, MAIN), (20, (48.4, 74.8, 83.4, .652)))]),
    8: ("Table 8: temporal layers", [(f"{n} layers", ["--temporal-layers", str(n)], "MMS_FV", paper) for n, paper in (
        (2, (47.0, 74.0, 82.3, .642)), (4, MAIN), (8, (48.5, 74.1, 82.6, .650)))]),
    12: ("Table 12: pad token", [(f"pad {n}", ["--pad-token", str(n)], "MMS_FV", (r1, None, None, None)) for n, r1 in (
        (31, 46.0), (49407, 46.0), (3002, 47.8), (13530, 47.9), (49406, 48.0), (0, 48.1))]),
}
PAPER = {"ViT-B-32-quickgelu": {"msrvtt": MAIN, "msvd": (46.0, 75.0, 84.0, .645), "vatex": (61.8, 90.8, 95.7, .794),
                                "didemo": (48.2, 75.1, 83.7, .654), "activitynet": (45.5, 74.6, 85.5, .645)},
         "ViT-B-16-quickgelu": {"msrvtt": (51.0, 77.1, 85.5, .677), "msvd": (50.2, 79.6, 87.8, .683), "vatex": (66.8, 92.9, 96.8, .826),
                                "didemo": (51.9, 78.3, 85.6, .682), "activitynet": (50.6, 78.0, 87.9, .685)},
         "ViT-B-16-SigLIP": {"msrvtt": (51.5, 76.3, 85.5, .677), "msvd": (55.2, 82.9, 89.4, .724), "vatex": (68.0, 93.4, 96.9, .833),
                             "didemo": (51.7, 76.1, 84.8, .675), "activitynet": (45.8, 76.3, 86.7, .656)}}               # Tables 1 and 2
COST = {"MMS_F": (8.90, 11.1), "MMS_V": (9.64, 11.1), "MMS_FV": (9.64, 11.2)}           # Table 11: ms a video, ms a query, on an A5000
METRICS = ("R@1", "R@5", "R@10", "nDCG@10")


def markdown(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows))


def quote(paper):
    """The paper's numbers as a cell."""
    return " / ".join("–" if x is None else f"{x:.3f}" if x < 1 else f"{x:.1f}" for x in paper)


def runs_of(argv, flags, seeds, device):
    """The folders of the finished runs that these flags and seeds mean: found in runs/, gone on with, or made now."""
    out = []
    for k in range(seeds):
        s = parse_settings([*argv, *flags])
        s = dataclasses.replace(s, seed=s.seed + k, out="", table=0, figure=0, seeds=1)
        found = gather_lists([str(find_run(s) or "") if RANK == 0 else ""])[0]
        out.append(run(dataclasses.replace(s, resume=found), device))
        gather_lists([])                                                    # the others wait until the first has written it all
    return out


def trained_table(number, argv, s, device):
    """Tables 3, 4, 5, 7, 8, 12, and 0, the scores of one setting over several seeds -> Markdown."""
    title, rows = TABLES[number]
    shown, records, paper = [], [], s.data == "msrvtt"
    for name, flags, score, numbers in rows:
        if flags[:2] == SIGLIP and s.backbone not in PAPER:                 # beside a toy it would say nothing
            continue
        records = [finished(folder) for folder in runs_of(argv, flags, s.seeds, device)]
        cells, kinds = [], dict.fromkeys(row["queries"] for row in records[0]["evaluation"])
        for kind, metric in [*(("all", metric) for metric in METRICS), *((kind, "R@1") for kind in kinds if kind != "all")]:
            values = [row[metric] for r in records for row in r["evaluation"] if (row["queries"], row["score"]) == (kind, score)]
            digits = 3 if metric.startswith("nDCG") else 1
            cells.append(f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""))
        shown.append([name, f"`{' '.join(flags)}`" if flags else "", *cells] + ([quote(numbers)] if paper and numbers else []))
    header = ["", "flags", *METRICS, *(f"{kind} R@1" for kind in kinds if kind != "all")]
    if paper and number:
        header.append("the paper's, MSR-VTT: R@1 / R@5 / R@10 / nDCG")
    made = sorted({f"{r['hardware']}, code {r['code']}" for r in records})
    seeds = f"seeds {s.seed} to {s.seed + s.seeds - 1} (mean ± standard deviation)" if s.seeds > 1 else f"seed {s.seed}"
    return (f"{title}. {s.data}, {s.backbone}, {records[0]['evaluation'][0]['number']} queries, {records[0]['gallery']} videos, "
            f"{s.epochs} epochs, {seeds}; {'; '.join(made)}\n\n{markdown(header, shown)}")


def runs_table(number):
    """Tables 1 and 2: the runs that there are of each dataset and backbone, beside the paper's -> Markdown."""
    rows, header = [], ["dataset", "backbone", "run", "settings beside the default", *METRICS, "the paper's: R@1 / R@5 / R@10 / nDCG"]
    runs = [(path.parent, read(path, json.load), finished(path.parent)) for path in sorted(Path("runs").glob("*/settings.json"))]
    for data in ("msrvtt", "msvd", "vatex") if number == 1 else ("didemo", "activitynet"):
        backbones = dict.fromkeys([*PAPER, *(s["backbone"] for _, s, record in runs if record and s["data"] == data)])
        for backbone in backbones:
            default, paper = asdict(parse_settings(["--data", data, "--backbone", backbone])), PAPER.get(backbone, {}).get(data)
            here = [run for run in runs if run[2] and [run[1][k] for k in ("data", "backbone", "interaction")] == [data, backbone, "mms"]]
            for folder, s, record in here or [(None, None, None)]:
                row = next((r for r in record["evaluation"] if (r["queries"], r["score"]) == ("all", "MMS_FV")), None) if record else None
                changes = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in s.items() if k not in FREE and v != default.get(k)) if s else ""
                lost = f"; {record['lost']} test videos missing" if record and record["lost"] else ""
                rows.append([data, backbone, folder or "no run", changes + lost,
                             *((f"{row[m]:.3f}" if m.startswith("nDCG") else f"{row[m]:.1f}") if row else "" for m in METRICS),
                             quote(paper) if paper else ""])
    return f"Table {number}: the runs in runs/, MMS_FV, one a line\n\n{markdown(header, rows)}"


def augmentation(argv, s, device):
    """Two runs, without and with query augmentation -> (query, its words' tokens, rank before, rank after) each (Figure 3, Table 6)."""
    before, after = ([json.loads(line) for line in (runs_of(argv, flags, 1, device)[0] / "queries.jsonl").read_text().splitlines()]
                     for flags in (["--no-query-augmentation"], ["--query-augmentation"]))
    special = 2 if "SigLIP" not in s.backbone else 1                        # start and end, or end alone
    return [(a["query"], a["tokens"] - special, b["rank"]["MMS_FV"], a["rank"]["MMS_FV"]) for b, a in zip(before, after)]


def queries_table(argv, s, device, number=5):
    """Table 6: the queries below 20 tokens that query augmentation moves most, ranks capped at 100 -> Markdown."""
    moved = [(q, min(b, 100), min(a, 100)) for q, n, b, a in augmentation(argv, s, device) if n < 20]
    moved.sort(key=lambda row: row[2] - row[1])
    rows = moved[:number] + moved[len(moved) - min(number, max(0, len(moved) - number)):]
    return (f"Table 6: the queries that query augmentation improves and degrades most. {s.data}, {s.backbone}, seed {s.seed}\n\n" +
            markdown(["query", "rank before", "after", "change"], [[q.replace("|", "\\|"), b, a, f"{a - b:+d}"] for q, b, a in rows]))


def draw_augmentation(argv, s, device):
    """Figure 3: the mean change in rank by the length of the query -> PIL image."""
    bins, moved = ("<5", "5-10", "10-20", "20+"), [[], [], [], []]
    for _, n, before, after in augmentation(argv, s, device):
        moved[sum(n >= edge for edge in (5, 10, 20))].append(after - before)
    means = [sum(m) / len(m) if m else 0.0 for m in moved]
    image, font = Image.new("RGB", (560, 400), "white"), ImageFont.load_default(14)
    draw, scale = ImageDraw.Draw(image), 120 / (max(map(abs, means)) or 1)
    draw.text((280, 12), f"{s.data}, {s.backbone}: mean change in rank by query augmentation", "black", font, anchor="ma")
    for i, (name, mean, m) in enumerate(zip(bins, means, moved)):
        x, y = 70 + 120 * i, 190 - mean * scale
        draw.rectangle((x, min(y, 190), x + 70, max(y, 190)), "#c4161c" if mean > 0 else "#0a7d28")
        draw.text((x + 35, y + (-18 if mean > 0 else 4)), f"{mean:+.3f}" if m else "none", "black", font, anchor="ma")
        draw.text((x + 35, 345), f"{name}\n{len(m)} queries", "black", font, anchor="ma", align="center")
    draw.line((50, 190, 530, 190), "black")
    draw.text((280, 380), "length of the query in tokens; below the line is better", "black", font, anchor="ma")
    return image


def reproduce(argv, s, device):
    """--table, --figure and --seeds: print what is asked for and keep it in runs/."""
    name = f"{'table' if s.table else 'figure' if s.figure else 'seeds'}-{s.table or s.figure or s.seeds}-{Path(s.data).stem}"
    if s.figure:
        image = draw_augmentation(argv, s, device) if s.figure == 3 else Image.open(runs_of(argv, [], 1, device)[0] / "interactions.png")
        if RANK == 0:
            image.save(f"runs/{name}.png")
            print(f"runs/{name}.png")
        return
    out = (runs_table(s.table) if s.table in (1, 2) else queries_table(argv, s, device) if s.table == 6 else
           cost_table(s, device) if s.table == 11 else trained_table(s.table, argv, s, device))
    if RANK == 0:
        Path("runs").mkdir(exist_ok=True)
        Path(f"runs/{name}.md").write_text(out + "\n")
        print(f"{out}\n\nruns/{name}.md")


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark: every figure from this machine and this call, random weights and pixels, no downloads

PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}                     # dense bf16 FLOP/s, of the makers' data sheets


def seconds(device, *calls, repeat=5):
    """Median time of each call; they take turns, so that a busy machine is busy for all."""
    times = [[] for _ in calls]
    for turn in range(repeat + 1):                                          # the first turn warms up
        for call, record in zip(calls, times):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            record.append(time.perf_counter() - start)
    return [sorted(record[1:])[repeat // 2] for record in times]


def extra_megabytes(device, call):
    """Peak memory while `call` runs, above what was held before (CUDA's allocator, or Linux's count of resident pages)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    if not Path("/proc/self/clear_refs").exists():
        return math.nan
    Path("/proc/self/clear_refs").write_text("5")                           # the peak is now what is held now
    read = lambda name: int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def unit_vectors(device, *shape):
    return torch.nn.functional.normalize(torch.randn(*shape, device=device), dim=-1)


def bench_clips(s, size):
    """ms a clip to decode, and to read from the cache, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(s.root or f"data/{s.data}")
        if root.exists():
            paths = [path for path, _ in load_dataset(s)[0][:32]]
        else:
            paths = [Path(folder) / f"{i}.mp4" for i in range(32)]
            for i, path in enumerate(paths):
                draw_clip(path, "red", "square", "blue", "moves left", np.random.default_rng(i))
        pictures = [[io.BytesIO() for _ in range(s.num_frames)] for _ in paths]
        for path, files in zip(paths, pictures):                            # the alternative: frames kept as JPEG
            for frame, file in zip(sample_frames(path, s.num_frames, size), files):
                Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
        calls = (lambda path, files: sample_frames(path, s.num_frames, size),
                 lambda path, files: cached_frames(path, s.num_frames, size, 0.0, folder),
                 lambda path, files: np.stack([np.asarray(Image.open(file)) for file in files]))
        decode, cache, jpeg = (1000 * x / len(paths) for x in seconds(torch.device("cpu"), *(
            lambda call=call: [call(*clip) for clip in zip(paths, pictures)] for call in calls), repeat=3))
    raw, small = s.num_frames * 3 * size ** 2 / 1e6, sum(file.tell() for files in pictures for file in files) / len(paths) / 1e6
    return [f"clips of {root if root.exists() else 'the embedded kind'}, {s.num_frames} frames of {size} pixels, one process:",
            f"  decode {decode:.2f} ms a clip, cache {cache:.3f} ms ({decode / cache:.0f}x, {raw:.2f} MB), "
            f"JPEG in memory {jpeg:.3f} ms ({decode / jpeg:.0f}x, {small:.2f} MB)"]


def bench_step(s, model, device):
    """Where a training step's time goes."""
    B, M, cuda = s.batch_size, model.num_tokens, device.type == "cuda"
    frames = torch.randint(0, 256, (B, s.num_frames, 3, model.image_size, model.image_size), dtype=torch.uint8, device=device)
    A = B * s.captions_per_video
    ids, mask = torch.randint(2, 30000, (A, M), device=device), torch.ones(A, M, dtype=torch.bool, device=device)
    positives = torch.arange(A, device=device)[:, None] // s.captions_per_video == torch.arange(B, device=device)
    optimizer = make_optimizer(model, s)
    features = []                                                           # Q, F, V for the loss by itself

    def backward(encode):
        with autocast(device):
            out = encode()
        sum(x.sum() for x in (out if isinstance(out, tuple) else (out,))).backward()
        return out

    def only_loss():
        Q, F, V = (x.detach().requires_grad_() for x in features)
        model.loss(Q, mask, F, V, positives)[0].backward()

    def only_optimizer():
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)
        optimizer.step()

    with torch.no_grad(), autocast(device):
        features += [model.encode_query(ids, mask), *model.encode_video(frames)]
    pixels = lambda: frames.flatten(0, 1).float().sub_(model.mean).div_(model.std)
    images, f = pixels(), features[1].clone()
    step = lambda: training_step(model, optimizer, s, ids, mask, frames, positives, [A])
    with FlopCounterMode(display=False) as counter:
        with autocast(device):
            loss = model(ids, mask, frames, positives)[0]
        loss.backward()
    flops = counter.get_total_flops()
    if s.compile:
        compile_encoders(model)
    peak = extra_megabytes(device, step)
    image, text, normalised, temporal, loss, update, whole = seconds(
        device, lambda: backward(lambda: model.clip.visual(images)), lambda: backward(lambda: model.encode_query(ids, mask)), pixels,
        lambda: backward(lambda: model.contextualize(f)), only_loss, only_optimizer, step, repeat=9 if cuda else 3)
    name = torch.cuda.get_device_name() if cuda else "CPU"
    top = next((flop for card, flop in PEAK.items() if card in name), None)
    parts = [("image encoder", image), ("text encoder", text), ("pixels", normalised), ("temporal layers", temporal), ("loss", loss),
             ("clip and optimiser", update)]
    rest = normalised + temporal + loss + update
    return [f"step of {B} videos x {s.num_frames} frames, {A} captions of {M} tokens, {s.backbone}, "
            f"{'bf16' if cuda else 'fp32'}, forward and backward:",
            *(f"  {part:24}{1000 * t:10.1f} ms {100 * t / whole:6.1f}%" for part, t in parts),
            f"  {'whole step':24}{1000 * whole:10.1f} ms, {A / whole:.1f} pairs/s, {flops / whole / 1e12:.2f} TFLOP/s"
            f"{f', {100 * flops / whole / top:.0f}% of peak' if top else ''}, extra peak memory {peak:.0f} MB",
            f"  all but the two encoders: {100 * rest / whole:.1f}% of the step; five epochs of 180,000 pairs: {900000 * whole / A / 60:.1f} min"]


def bench_scores(device, forward_size=1000, both_size=512):
    """MeanMaxSim against one plain matrix product of the same arithmetic, and einsum, and what it holds."""
    Q, V = unit_vectors(device, forward_size, 32, 512), unit_vectors(device, forward_size, 14, 512)
    with torch.no_grad():                                                   # memory first, while none is left over from others
        forward = extra_megabytes(device, lambda: mean_max_sim(Q, V))
    Q, V = Q[:both_size].clone().requires_grad_(), V[:both_size].clone().requires_grad_()
    both = extra_megabytes(device, lambda: mean_max_sim(Q, V).sum().backward())
    Q, V = unit_vectors(device, 200, 32, 512), unit_vectors(device, 1000, 12, 512)
    with torch.no_grad():
        plain, einsum, ours = seconds(device, lambda: Q.flatten(0, 1) @ V.flatten(0, 1).T,
                                      lambda: torch.einsum("amd,bnd->abmn", Q, V).amax(-1).mean(-1), lambda: mean_max_sim(Q, V), repeat=9)
    return ["MeanMaxSim, 200 queries of 32 tokens x 1000 videos of 12 frames, d = 512, time over a plain product's:",
            f"  plain 1.00 ({1000 * plain:.1f} ms), einsum {einsum / plain:.2f}, mean_max_sim {ours / plain:.2f}",
            f"  extra peak memory: forward at {forward_size} x {forward_size} {forward:.0f} MB; "
            f"forward and backward at {both_size} x {both_size} {both:.0f} MB (M = 32, N = 14)"]


@torch.no_grad()
def bench_search(s, model, device, gallery=1000):
    """The paper's Table 11: indexing a video, and one query against 1,000 videos."""
    model.eval()
    B = min(s.batch_size, 8)
    frames = torch.randint(0, 256, (B, s.num_frames, 3, model.image_size, model.image_size), dtype=torch.uint8, device=device)
    ids, mask = torch.randint(2, 30000, (1, model.num_tokens), device=device), torch.ones(1, model.num_tokens, dtype=torch.bool, device=device)
    d = model.frame_positions.shape[1]
    F, V = unit_vectors(device, gallery, s.num_frames, d), unit_vectors(device, gallery, s.num_frames + s.visual_expansion, d)

    def index(encode):
        with autocast(device):
            encode()

    def query(*levels):
        with autocast(device):
            Q = model.encode_query(ids, mask)
        sum(mean_max_sim(Q, level, mask) for level in levels).topk(10)

    images = frames.flatten(0, 1).float().sub_(model.mean).div_(model.std)
    still, both, *latency = seconds(device, lambda: index(lambda: model.clip.visual(images)), lambda: index(lambda: model.encode_video(frames)),
                                    lambda: query(F), lambda: query(V), lambda: query(F, V), repeat=21 if device.type == "cuda" else 5)
    return B, {name: (1000 * t / B, 1000 * wait) for name, t, wait in zip(("MMS_F", "MMS_V", "MMS_FV"), (still, both, both), latency)}


def bench_index(device, videos=100_000, N=12, E=2, d=512, M=32):
    """Exact search in a memory-mapped index of synthetic videos."""
    with tempfile.TemporaryDirectory() as folder:
        block = torch.cat([unit_vectors("cpu", 1000, N, d), unit_vectors("cpu", 1000, N + E, d)], 1).half().numpy().tobytes()
        with open(Path(folder) / "vectors-0.f16", "wb") as file:
            for _ in range(videos // 1000):
                file.write(block)
        (Path(folder) / "index.json").write_text(json.dumps(dict(
            root="/videos", model="", fingerprint="", num_frames=N, visual_expansion=E, width=d, vectors="vectors-0.f16",
            videos=[[f"folder{i // 1000}/video{i}.mp4", 10 ** 6, 10 ** 18 + i, 10.0] for i in range(videos)])))
        start = time.perf_counter()
        index = VideoIndex.load(folder)
        opened, held = time.perf_counter() - start, extra_megabytes(torch.device("cpu"), lambda: VideoIndex.load(folder))
        Q, mask = unit_vectors(device, 1, M, d), torch.ones(1, M, dtype=torch.bool, device=device)
        index.vectors = index.vectors.to(device)
        plain, ours = seconds(device, lambda: [Q[0] @ x.float().flatten(0, 1).T for x in index.vectors.split(1024)],
                              lambda: index.scores(Q, mask), repeat=3)
        bytes_a_video = index.vectors[0].numel() * 2
    return [f"an index of {videos} videos (N = {N}, E = {E}, d = {d}: {bytes_a_video} bytes a video): "
            f"opens in {opened:.2f} s, holding {held:.0f} MB",
            f"  one query of {M} tokens, exact: {1000 * ours:.0f} ms, {ours / plain:.2f} times one plain product of the same vectors"]


def untrained(s, device):
    return VideoColBERT(dataclasses.replace(config_of(s), pretrained=None)).to(device)


def cost_table(s, device):
    """Table 11, with random weights and pixels -> Markdown."""
    B, costs = bench_search(s, untrained(s, device), device)
    return (f"Table 11: cost. {s.backbone}, {s.num_frames} frames, {B} videos at a time, queries against 1,000 videos; "
            f"{hardware(device)}\n\n" + markdown(
        ["", "indexing, ms a video", "query, ms", "the paper's, on an A5000: indexing / query"],
        [[name, f"{index:.2f}", f"{query:.2f}", f"{COST[name][0]:.2f} / {COST[name][1]:.1f}"] for name, (index, query) in costs.items()]))


def bench(s, device):
    """The project's benchmark -> text."""
    scores, model = bench_scores(device), untrained(s, device)             # first: memory freed by others would hide what it takes
    step = bench_step(s, model, device)
    B, costs = bench_search(s, model, device)
    return "\n".join([hardware(device), *scores, *bench_clips(s, model.image_size), *step,
                      f"as the paper's Table 11: indexing (ms a video, {B} at a time), query latency (ms, 1000 videos)",
                      *(f"  {name:8}{index:8.2f}{query:8.2f}" for name, (index, query) in costs.items()), *bench_index(device)])


# ---------------------------------------------------------------------------------------------------------------------

def pick_device(name):
    """auto is a GPU if there is one; of several processes on a machine each takes its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_settings(s):
    """ValueError for what no run could do, before anything slow."""
    least = dict(epochs=0, batch_size=1, captions_per_video=1, checkpoint_every=1, seeds=1, workers=-1, clip_seconds=0, warmup=0, seed=0,
                 lr=0, lr_pretrained=0, weight_decay=0)
    for name, value in least.items():
        if not getattr(s, name) >= value:                                   # also true of NaN
            raise ValueError(f"--{name.replace('_', '-')} must be at least {value}, not {getattr(s, name)}")
    if not s.max_grad_norm > 0 or not s.warmup <= 1:
        raise ValueError(f"--max-grad-norm must be above 0 and --warmup at most 1, not {s.max_grad_norm} and {s.warmup}")
    if s.table not in (0, 1, 2, 6, 11, *TABLES) or s.figure not in (0, 3, 4):
        raise ValueError(f"--table is 1 to 8, 11 or 12 and --figure 3 or 4, not {s.table} and {s.figure}")
    if s.out and (s.table or s.figure or s.seeds > 1):
        raise ValueError(f"--out {s.out} names one run, and --table, --figure and --seeds make several, in runs/")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    s = parse_settings(argv)
    check_settings(s)
    if s.download:
        return print(f"python train.py --data msrvtt --root {download(s)}")
    device = pick_device(s.device)
    if s.bench:
        return print(bench(s, device))
    if WORLD > 1:                                                           # one may decode for hours while the others wait
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    if s.table or s.figure or s.seeds > 1:
        reproduce(argv, s, device)
    else:
        out = run(s, device)
        if RANK == 0:
            print(f"{results_table(finished(out))}\n{out}")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main, "train.py")
