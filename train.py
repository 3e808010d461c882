"""Train and evaluate Video-ColBERT.

    python train.py                                     synthetic clips, minutes on a CPU
    python train.py --data msrvtt --root FOLDER         the paper's main experiment
    torchrun --nproc-per-node=4 train.py --data msrvtt  a batch shared by four GPUs
    python train.py --data clips.jsonl                  your own clips
    python train.py --resume runs/msrvtt                continue a run that was stopped
"""
import argparse
import contextlib
import csv
import errno
import filecmp
import glob
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm
from tqdm.utils import ObjectWrapper

import video_colbert
from video_colbert import (
    Config, InputError, VideoColBERT, VideoError, mms_fv, reciprocal_rank_fusion,
    retrieval_metrics, video_to_text)

# The number of this process, and how many there are (torchrun).
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# ---- Settings: the paper's or, where our scan of its Table 10 is illegible, DRL's
@dataclass
class Settings(Config):
    data: str = "shapes"  # shapes (using a small preset), msrvtt or FILE.jsonl
    root: str = ""  # folder of shapes or msrvtt; default data/NAME
    out: str = ""  # folder of the run, must be new; default runs/NAME
    cache: str = "data/cache"  # folder of decoded frames, safe to delete
    epochs: int = 5  # passes over all captions (DRL's)
    batch_size: int = 128  # videos in a batch, over all processes (DRL's)
    captions_per_video: int = 1  # captions that come with each video of a batch
    micro_batch: int = 0  # videos encoded at a time, to save memory; 0 is all
    # auto is bf16 or fp16 on a CUDA GPU, else fp32
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    lr_pretrained: float = 1e-7  # learning rate of the pre-trained encoders (Table 9)
    lr: float = 1e-4  # learning rate of the temporal transformer (Table 9)
    weight_decay: float = 0.01  # AdamW's (Table 9: 0.01); biases and norms have none
    warmup: float = 0.1  # share of the steps in which the rate rises (Table 9)
    max_grad_norm: float = 1.0  # clips gradients to this norm; 0: no clipping (Table 9)
    seed: int = 0  # of the weights and of the order of the clips
    device: str = "auto"  # auto (cuda, mps or cpu), or any device that torch knows
    workers: int = 4  # threads that read batches ahead
    compile: bool = False  # torch.compile the encoders; for long runs on a GPU
    checkpoint_every: int = 2000  # steps; each epoch also ends with a checkpoint
    # evaluate on the test set after every so many epochs; 0 is only at the end
    eval_every: int = 0
    resume: str = ""  # continue the run in this folder, with its settings
    eval_only: str = ""  # evaluate the model of this run, on --data if it is given
    allow_missing: bool = False  # leave out clips that cannot be read
    # Not a flag: the hash of --pretrained if that is a file, which may be replaced later
    pretrained_hash: tyro.conf.Suppress[str] = ""

# What --resume and --eval-only may change. A resumed run may find its data in another
# place, but the clips must be the same.
MAY_CHANGE = {"data", "root", "out", "cache", "device", "micro_batch", "workers",
              "checkpoint_every", "eval_every", "resume", "eval_only", "allow_missing"}

def default_settings(data="", backbone="", loss=""):
    """The paper's settings, and what differs for these data, backbone and loss."""
    s = Settings()
    s = replace(s, data=data or s.data, loss=loss or s.loss)
    if s.data == "shapes":
        s = replace(s, backbone="tiny", num_frames=6, num_tokens=12, epochs=30,
                    batch_size=64, captions_per_video=2)
    if backbone:
        s = replace(s, backbone=backbone)
    if s.backbone == "tiny":
        # Trained from scratch: the loss finds its scale and bias from here.
        s = replace(s, lr_pretrained=1e-3, lr=2e-3, freeze=False, learn_scale=True,
                    logit_scale=3.0, logit_bias=-10.0)
    elif s.loss == "infonce":
        # CLIP's own scale, learned (section 4.3).
        s = replace(s, learn_scale=True, logit_scale=4.6052)
    return s

def parse_settings(argv):
    """Command line -> Settings. Flags that are not given have the values of the run to
    resume or to evaluate, or else of default_settings."""
    # First only the flags on which the defaults depend; below, tyro reads all.
    preparser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--data", "--backbone", "--loss", "--resume"):
        preparser.add_argument(flag, default="")
    preparser.add_argument("--eval-only", "--eval_only", default="")  # tyro takes both
    typed, _ = preparser.parse_known_args(argv)
    if typed.resume and typed.eval_only:
        raise InputError("--resume and --eval-only exclude each other")

    folder = typed.resume or typed.eval_only  # of the run whose settings are the defaults
    if folder:
        saved = read_settings(folder)
        default = saved
        if typed.data and typed.data != saved.data:
            default = replace(saved, root="")  # the old root belongs to the old data
    else:
        default = default_settings(typed.data, typed.backbone, typed.loss)
    # For "--freeze False", tyro's own message does not name --no-freeze.
    values = [arg.split("=")[-1] for arg in argv]
    if "True" in values or "False" in values:
        raise InputError("do not write True or False, but --freeze or --no-freeze")
    s = tyro.cli(Settings, args=argv, default=default, description=__doc__.splitlines()[0])
    check_settings(s)
    if folder:
        refuse_changes(s, as_saved(saved), folder)
    elif os.path.isfile(s.pretrained or ""):
        s = replace(s, pretrained_hash=file_hash(s.pretrained))
    return s

def as_saved(s):
    """The settings as settings.json gives them back: a tuple becomes a list."""
    return json.loads(json.dumps(asdict(s)))

def refuse_changes(s, saved, folder):
    """Raise InputError if `s` differs from `saved`, a dictionary of a run's settings."""
    new = as_saved(s)
    for name in saved.keys() - MAY_CHANGE:
        if name == "precision" and s.eval_only:
            continue  # an evaluation may use another
        if new.get(name) != saved[name]:
            raise InputError(f"cannot change {name} of {folder}: {saved[name]}")

def check_settings(s):
    """Raise InputError for settings that make no sense, NaN and infinity among them."""
    # VideoColBERT checks the rest.
    at_least = dict(
        epochs=0, batch_size=1, captions_per_video=1, micro_batch=0, workers=1,
        lr_pretrained=0, lr=0, weight_decay=0, warmup=0, max_grad_norm=0, seed=0,
        checkpoint_every=1, eval_every=0, lambda_frame=0, lambda_video=0,
        logit_scale=-100, logit_bias=-1e6)
    for name, lowest in at_least.items():
        value = getattr(s, name)
        # NaN and infinity fail this, too, and seeds that are too large for torch.
        if not lowest <= value < 2 ** 63:
            raise InputError(f"--{name.replace('_', '-')} cannot be {value}")
    if s.warmup > 1:
        raise InputError(f"--warmup is a share of the steps, 0 to 1, not {s.warmup}")
    if s.batch_size % WORLD and not s.eval_only:
        raise InputError(f"--batch-size must be a multiple of {WORLD} processes")
    if s.resume and s.out:
        raise InputError("--resume takes no --out: a run stays in its folder")

def read_settings(run):
    """The settings of a run. Those that are missing, in older runs, get the default."""
    with user_errors(f"{run}/settings.json"):
        settings = json.loads(Path(run, "settings.json").read_text())
        return replace(Settings(**settings), out="")  # a new command has its own --out

# Errors that malformed JSON, CSV or settings raise.
BAD_DATA = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)

@contextlib.contextmanager
def user_errors(source, kinds=BAD_DATA):
    """Errors of files and data become an InputError of one line that names `source`."""
    try:
        yield
    except InputError:
        raise  # an InputError is a ValueError, but already clear
    except kinds as error:
        reason = getattr(error, "strerror", None) or error  # without the file's name
        if isinstance(error, LookupError):
            reason = f"no {error}"  # such as: no 'video'
        raise InputError(f"{source}: {reason}") from None

# ---- Clips
@dataclass(frozen=True)
class Clip:
    path: str
    captions: list  # of strings
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None is the end of the video

    def __post_init__(self):
        captions = self.captions
        is_list = isinstance(captions, list) and len(captions) > 0
        if not is_list or not all(isinstance(x, str) and x.strip() for x in captions):
            raise ValueError("expected a list of captions that are not blank")
        # JSON can hold half a character, such as \ud83d. No tokenizer takes it, and
        # encode() raises a ValueError.
        " ".join(captions).encode()
        end = math.inf if self.end is None else self.end
        are_numbers = all(type(x) in (int, float) for x in (self.start, end))
        if not are_numbers or not 0 <= self.start < end:
            raise ValueError("expected 0 <= start < end in seconds")

def load_clips(s):
    """-> {"train": [clips], "val": ..., "test": ...}, without opening a video."""
    root = s.root or f"data/{s.data}"
    if s.data == "shapes":
        from extras.shapes import write_shapes  # only these data need extras/
        with user_errors(root):
            write_shapes(root)  # with a lock: other processes wait
        records = json_records(f"{root}/clips.jsonl")
    elif s.data == "msrvtt":
        records = msrvtt_records(root)
    elif s.data.endswith(".jsonl"):
        records = json_records(s.data)
    else:
        raise InputError(f"--data is shapes, msrvtt or FILE.jsonl, not {s.data}")

    data = {"train": [], "val": [], "test": []}
    seen = {"train": set(), "val": set(), "test": set()}
    for source, record in records:
        with user_errors(source):
            split = record.pop("split")
            if split not in ("train", "val", "test"):
                raise ValueError("expected a split of train, val or test")
            clip = Clip(record.pop("video"), **record)  # TypeError for unknown keys
            key = (os.path.realpath(clip.path), clip.start, clip.end)
            if key in seen[split]:
                raise ValueError("expected each clip only once")
            seen[split].add(key)
            data[split].append(clip)
    shared = seen["train"] & seen["test"]
    if shared and RANK == 0:
        print(f"{len(shared)} test clips are training clips, too")
    return data

def json_records(path):
    """Lines {"video": path, "captions": [...], "split": "train", "val" or "test"}, and
    optionally "start" and "end" in seconds. Paths are absolute or relative to the file."""
    lines = read_file(path, list)  # list(file) is its lines
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        with user_errors(source):
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("video"), str):
                raise ValueError('expected {"video": path, ...}')
            record["video"] = os.path.join(os.path.dirname(path), record["video"])
        yield source, record

MSRVTT_HELP = """
  curl -L -C - -O https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip
  curl -L -C - -O https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msrvtt_data.zip
  unzip MSRVTT.zip && unzip msrvtt_data.zip
For another layout of these files: python -m extras.datasets msrvtt FOLDER"""

def msrvtt_records(root):
    """9k training and 1k-A test clips (section 5.1) of CLIP4Clip's copy, as records like
    those of JSON lines. The three files and the videos may be anywhere below `root`."""
    annotation = find_files(root, "MSRVTT_data.json")
    train_rows = find_files(root, "MSRVTT_train.9k.csv")
    test_rows = find_files(root, "MSRVTT_JSFUSION_test.csv")
    videos = {}
    for path in find_files(root, "*.mp4"):
        videos.setdefault(Path(path).stem, []).append(path)
    if not (annotation and train_rows and test_rows and videos):
        raise InputError(f"no MSR-VTT in {root}: use --root FOLDER{MSRVTT_HELP}")

    captions = {}
    content = read_file(first_copy(annotation), json.load)
    with user_errors(annotation[0]):
        for sentence in content["sentences"]:
            captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    for files, split in ((train_rows, "train"), (test_rows, "test")):
        file = first_copy(files)
        for row in read_file(file, read_rows):
            with user_errors(file):
                video = row["video_id"]
                texts = captions[video] if split == "train" else [row["sentence"]]
            paths = videos.get(video, [video])  # a missing one counts as unreadable
            yield file, dict(video=first_copy(paths), captions=texts, split=split)

def read_rows(file):
    return list(csv.DictReader(file))

def find_files(root, pattern):
    """Files in or below a folder whose name matches, sorted. Links are followed."""
    return sorted(glob.glob(f"{glob.escape(str(root))}/**/{pattern}", recursive=True))

def first_copy(paths):
    """The first of several files of one name. Raises InputError if they differ, as when
    another dataset uses the same names."""
    for path in paths[1:]:
        with user_errors(f"{paths[0]} and {path}", OSError):
            is_copy = filecmp.cmp(paths[0], path)
        if not is_copy:
            raise InputError(
                f"{paths[0]} and {path} differ: use a folder with only one of them")
    return paths[0]

def read_file(path, parse):
    """-> parse(file) for a text file. Raises InputError."""
    with user_errors(path), open(path, encoding="utf-8-sig", newline="") as file:
        return parse(file)

def file_id(path):
    """A file's size and the checksum of its first 64 KB; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size, zlib.crc32(file.read(2 ** 16))
    except OSError:
        return None

def file_hash(path):
    """A hash of a whole file. Raises InputError if it cannot be read."""
    with user_errors(path, OSError), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()

def data_hash(data):
    """A hash of captions, clips and video files, by which a run recognizes its data. Of
    a path only the file name counts, so that data may move."""
    clips = [(split, os.path.basename(clip.path), file_id(clip.path), clip.captions,
              clip.start, clip.end)
             for split in data for clip in data[split]]
    return hashlib.sha256(json.dumps(clips).encode()).hexdigest()

# ---- Frames: each clip is decoded once, into a file of the cache
def frames_version():
    """A hash of the section of video_colbert.py that takes frames. After an edit there,
    frames that are in the cache are decoded again."""
    source = video_colbert.SOURCE
    section = source[source.index("# ---- Frames"):source.index("# ---- Metrics")]
    return hashlib.sha1(section.encode()).hexdigest()

def cached_frames(clip, num_frames, size, cache):
    """sample_frames of a clip through the cache: uint8 (N, 3, size, size)."""
    key = [frames_version(), os.path.abspath(clip.path), file_id(clip.path), clip.start,
           clip.end, num_frames, size]
    with contextlib.suppress(OSError):
        # Also the modification time, because file_id reads only the first 64 KB.
        key.append(os.stat(clip.path).st_mtime_ns)
    path = Path(cache, hashlib.sha1(json.dumps(key).encode()).hexdigest())

    # From the cache. A file that is missing or truncated is written again below.
    with contextlib.suppress(OSError, ValueError):
        pixels = np.fromfile(path, np.uint8).reshape(num_frames, 3, size, size)
        return torch.from_numpy(pixels)
    # By its module's name, because the module may be reloaded in a notebook.
    frames = video_colbert.sample_frames(
        clip.path, num_frames, size, clip.start, clip.end)
    with atomic_write(path) as file:
        file.write(frames.numpy())
    return frames

def load_frames(clips, s, size):
    """-> uint8 (B, N, 3, size, size), in pinned memory if there is a GPU."""
    frames = torch.empty(len(clips), s.num_frames, 3, size, size, dtype=torch.uint8,
                         pin_memory=torch.cuda.is_available())
    for row, clip in zip(frames, clips):
        row.copy_(cached_frames(clip, s.num_frames, size, s.cache))
    return frames

def fill_cache(clips, split, s, size):
    """Decode what the cache lacks -> the clips of a split that can be read."""
    mine = rank_slice(clips)
    fill = partial(cache_clip, s=s, size=size)
    threads = max(s.workers, torch.get_num_threads())  # more, because nothing trains yet
    results = prefetch(fill, mine, threads)
    bar = tqdm(results, desc=split, total=len(mine), disable=RANK > 0)
    found = gather_lists(list(bar))
    readable = [clip for clip, is_found in zip(clips, found) if is_found]

    missing = len(clips) - len(readable)
    if missing and not s.allow_missing:
        raise InputError(f"{missing} of {len(clips)} {split} clips cannot be read; "
                         "--allow-missing leaves such clips out of a new run")
    if clips and not readable and split != "val":
        raise InputError(f"none of the {missing} {split} clips can be read")
    return readable

def cache_clip(clip, s, size):
    """Put a clip's frames into the cache -> False if its video cannot be read."""
    try:
        cached_frames(clip, s.num_frames, size, s.cache)
        return True
    except VideoError as error:
        tqdm.write(f"cannot read {error}", file=sys.stderr)
        return False

def prefetch(function, items, threads):
    """Yield function(item) for each item in order, computed ahead by threads."""
    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

# ---- Batches
def epoch_examples(clips, s, epoch):
    """A list of (index of a clip, indices of k of its captions) in random order; k is
    captions_per_video. Each caption is used once, except that a clip's last example may
    repeat its first ones."""
    rng = np.random.default_rng([s.seed, epoch])
    k = s.captions_per_video
    examples = []
    for v, clip in enumerate(clips):
        order = rng.permutation(len(clip.captions)).tolist()
        for i in range(0, len(order), k):
            chosen = [order[j % len(order)] for j in range(i, i + k)]
            examples.append((v, chosen))
    return [examples[i] for i in rng.permutation(len(examples))]

def batches(clips, s):
    """All batches of a run, without an epoch's last one if it is incomplete."""
    for epoch in range(s.epochs):
        examples = epoch_examples(clips, s, epoch)
        for i in range(0, len(examples) - s.batch_size + 1, s.batch_size):
            yield examples[i:i + s.batch_size]

def load_batch(batch, clips, s, model):
    """-> ids, mask and frames of this process's part, positives of the whole batch."""
    mine = rank_slice(batch)
    captions = [clips[v].captions[c] for v, chosen in mine for c in chosen]
    ids, mask = model.tokenize(captions)
    frames = load_frames([clips[v] for v, _ in mine], s, model.image_size)
    return ids, mask, frames, positive_pairs(clips, batch)

def positive_pairs(clips, batch):
    """Which captions of a batch describe which of its videos -> bool (A, B). A text
    describes every video that has it among its captions, chosen or not."""
    texts = [clips[v].captions[c] for v, chosen in batch for c in chosen]  # A
    captions_of_videos = [set(clips[v].captions) for v, _ in batch]  # B
    rows = []
    for text in texts:
        rows.append([text in captions for captions in captions_of_videos])
    return torch.tensor(rows)

# ---- Optimizer (section 5.2, Table 9)
def make_optimizer(model, s):
    """AdamW (the paper says Adam with weight decay), in groups of pre-trained
    parameters, new ones, and the loss's scale and bias. Parameters of fewer than two
    dimensions, such as biases and norms, do not decay."""
    # The tiny model's scale and bias start far from their final values. Others start at
    # pre-trained values.
    loss_lr = 10 * s.lr if s.backbone == "tiny" else s.lr_pretrained
    peak_lr = dict(pretrained=s.lr_pretrained, new=s.lr, scale=loss_lr)
    groups = {}
    for name, p in model.named_parameters():
        kind = "pretrained" if name.startswith("backbone.") else "new"
        if name.startswith("logit_"):
            kind = "scale"
        decay = s.weight_decay if p.ndim > 1 else 0.0
        if p.requires_grad:
            groups.setdefault((kind, decay), []).append(p)
    options = [dict(params=params, name=kind, peak_lr=peak_lr[kind], weight_decay=decay)
               for (kind, decay), params in groups.items()]
    return torch.optim.AdamW(options, betas=(0.9, 0.98), eps=1e-6, fused=True)

def schedule(step, steps, warmup):
    """Fraction of the peak learning rate: a linear rise in `warmup` of the steps, then a
    linear fall to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return (steps - step) / (steps - rise)

# ---- Several processes (torchrun)
# Each encodes its share of a batch, gathers all embeddings, and computes the whole loss.
# Gradients flow back only through its own embeddings, so those of all processes are
# added up. (DDP would average.)
def rank_slice(items):
    """The part of a list that this process works on."""
    return items[len(items) * RANK // WORLD:len(items) * (RANK + 1) // WORLD]

def gather_lists(part):
    """All processes' lists, joined in order of rank."""
    if WORLD == 1:
        return part
    parts = [None] * WORLD
    dist.all_gather_object(parts, part)
    return sum(parts, [])

def any_process(flag):
    flag = torch.tensor(int(flag))
    if WORLD > 1:
        dist.all_reduce(flag)
    return flag.item() > 0

def gather_rows(x):
    """All processes' rows in order of rank. Gradients flow only to this process's own rows."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.detach())
    parts[RANK] = x
    return torch.cat(parts)

def sum_gradients(model):
    """Add up the gradients of all processes."""
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in named.items():
        if name.startswith("logit_"):
            gradient.div_(WORLD)  # each process has all of it, not a share
    # One message instead of one for each parameter.
    flat = torch.cat([gradient.flatten() for gradient in named.values()])
    dist.all_reduce(flat)
    sizes = [gradient.numel() for gradient in named.values()]
    for gradient, total in zip(named.values(), flat.split(sizes)):
        gradient.copy_(total.view_as(gradient))

# ---- Training step
def training_step(model, optimizer, scaler, s, ids, mask, frames, positives):
    """One step -> (5,): loss, mean MMS_F and MMS_V of the true pairs, gradient norm,
    fp16's scale. `positives` (A, B) covers the whole batch, all else this process's part."""
    model.train()
    backward = backward_at_once
    if 0 < s.micro_batch < len(frames):
        backward = backward_in_parts
    loss, mms_f, mms_v = backward(model, scaler, s, ids, mask, frames, positives)
    if WORLD > 1:
        sum_gradients(model)

    scaler.unscale_(optimizer)
    max_norm = s.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    # fp16's scale, otherwise 1. get_scale() would wait for the GPU.
    grad_scale = scaler.scale(torch.ones_like(norm))
    scaler.step(optimizer)  # skipped in fp16 if a gradient overflows
    scaler.update()
    optimizer.zero_grad()
    if s.loss == "infonce" and s.learn_scale:
        model.logit_scale.data.clamp_(max=math.log(100))  # as CLIP does

    # Means over the true pairs. Indexing by `positives` would wait for the GPU.
    weight = positives / positives.sum()
    true_f, true_v = (mms_f * weight).sum(), (mms_v * weight).sum()
    return torch.stack([loss, true_f, true_v, norm, grad_scale]).detach()

def backward_at_once(model, scaler, s, ids, mask, frames, positives):
    """Gradients of a batch that fits into memory -> loss, MMS_F, MMS_V."""
    Q, F, V = encode(model, s, ids, frames)
    loss, mms_f, mms_v = whole_loss(model, Q, mask, F, V, positives)
    scaler.scale(loss).backward()
    return loss, mms_f, mms_v

def backward_in_parts(model, scaler, s, ids, mask, frames, positives):
    """The same with the activations of a few videos at a time: GradCache (Gao et al.
    2021)."""
    count = math.ceil(len(frames) / s.micro_batch)
    # A part's captions need not belong to its videos: here they are only encoded.
    parts = list(zip(ids.tensor_split(count), frames.tensor_split(count)))
    # If a reader adds dropout, both passes over a part must drop the same values. So
    # each part sets a seed.
    seed = torch.initial_seed() + 1

    # 1. Embed all parts without keeping activations.
    Q, F, V = [], [], []
    for i, part in enumerate(parts):
        torch.manual_seed(seed + i)
        with torch.no_grad():
            q, f, v = encode(model, s, *part)
        Q.append(q.requires_grad_())
        F.append(f.requires_grad_())
        V.append(v.requires_grad_())

    # 2. The loss of the whole batch gives the gradient of each embedding.
    loss, mms_f, mms_v = whole_loss(
        model, torch.cat(Q), mask, torch.cat(F), torch.cat(V), positives)
    scaler.scale(loss).backward()

    # 3. Embed each part again, and pass these gradients on to the parameters.
    for i, part in enumerate(parts):
        torch.manual_seed(seed + i)
        embeddings = encode(model, s, *part)
        torch.autograd.backward(embeddings, (Q[i].grad, F[i].grad, V[i].grad))
    return loss, mms_f, mms_v

def whole_loss(model, Q, mask, F, V, positives):
    """compute_loss with the embeddings of all processes."""
    Q, mask, F, V = gather_rows(Q), gather_rows(mask), gather_rows(F), gather_rows(V)
    return model.compute_loss(Q, mask, F, V, positives)

def encode(model, s, ids, frames):
    with autocast(frames.device, s.precision):
        Q = model.encode_query(ids)
        F, V = model.encode_video(frames)
    return Q, F, V

def pick_dtype(device, precision):
    """The dtype of the encoders. auto is bf16 on CUDA GPUs that have it, fp16 on other CUDA
    GPUs, and fp32 elsewhere."""
    if precision == "auto" and device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp16"
    dtypes = dict(bf16=torch.bfloat16, fp16=torch.float16)
    return dtypes.get(precision, torch.float32)  # also auto without CUDA

def autocast(device, precision="auto"):
    dtype = pick_dtype(device, precision)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def make_scaler(device, precision):
    """Scales the loss up in fp16, where small gradients would vanish; else does nothing."""
    is_fp16 = pick_dtype(device, precision) == torch.float16
    return torch.amp.GradScaler(device.type, growth_interval=200, enabled=is_fp16)

# ---- Training loop
def train(model, data, s, device, out, data_id):
    """Train `model` in place on data["train"], from the last checkpoint in `out` if there
    is one. Each step is a line of out/log.jsonl. On a signal, save and stop."""
    clips = data["train"]
    # All epochs are as long as the first, unless a reader edits epoch_examples.
    lengths = [len(epoch_examples(clips, s, epoch)) // s.batch_size
               for epoch in range(s.epochs)]
    ends = list(itertools.accumulate(lengths))  # the number of steps after each epoch
    steps = ends[-1]

    optimizer = make_optimizer(model, s)
    scaler = make_scaler(device, s.precision)
    state = dict(model=model, optimizer=optimizer, scaler=scaler)
    # `data_id` is of all clips, also of those that --allow-missing has left out.
    trained_on = dict(data=data_id, train_clips=len(clips))
    first, log_end = restore(out, state, trained_on, s)
    # Only the first process logs. The log is cut back to the checkpoint.
    log = open(os.devnull, "ab") if RANK > 0 else open_log(out, log_end)

    load = partial(load_batch, clips=clips, s=s, model=model)
    todo = itertools.islice(batches(clips, s), first, None)
    bar = tqdm(desc=f"training on {device_name(device)}", initial=first, total=steps,
               disable=RANK > 0)
    unread = []  # steps whose numbers are still on the GPU
    stops = False
    # A signal only asks to stop, so that no step is cut short.
    stop_signal = threading.Event()
    with log, bar, signal_handler(lambda number, frame: stop_signal.set()):
        if first == 0 and RANK == 0:
            # From now on, a log without checkpoints means that they were lost.
            save_checkpoint(out, 0, 0, state, trained_on, s)

        for step, inputs in enumerate(prefetch(load, todo, s.workers), first):
            epoch = sum(end <= step for end in ends)  # how many have ended
            # Evaluate the previous epoch only now that its checkpoint is saved: a run
            # that is killed here starts again at this line. The final epoch is evaluated
            # after the loop. Other processes wait in training_step.
            if step in ends and RANK == 0:
                log_evaluations(log, epoch - 1, model, data, s, device)

            inputs = [x.to(device, non_blocking=True) for x in inputs]
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step, steps, s.warmup)
            # If a reader adds dropout, its values depend only on seed, step and process, so
            # that a run resumes exactly.
            rng = np.random.default_rng([s.seed, step, RANK])
            torch.manual_seed(int(rng.integers(2 ** 62)))
            numbers = training_step(model, optimizer, scaler, s, *inputs)
            bar.update()

            # Two groups, with and without weight decay, share a name and a rate.
            lr = {group["name"]: group["lr"] for group in optimizer.param_groups}
            unread.append((dict(step=step, epoch=epoch, lr=lr), numbers))
            stops = any_process(stop_signal.is_set())
            saves = stops or step + 1 in ends or (step + 1) % s.checkpoint_every == 0
            # Reading the numbers after each step would make the CPU wait for the GPU.
            if saves or device.type == "cpu" or len(unread) == 50:
                write_log(log, bar, unread)
                unread = []

            if saves and RANK == 0:
                save_checkpoint(out, step + 1, log.tell(), state, trained_on, s)
            if stops:
                break
        if not stops and RANK == 0:
            log_evaluations(log, s.epochs - 1, model, data, s, device)
        # Ask again: a signal may have come in the last evaluation.
        stops = any_process(stop_signal.is_set())

    if stops:
        if RANK == 0:
            note = f"stopped after {bar.n} steps; continue with --resume {out}"
            print(note, file=sys.stderr)
        raise KeyboardInterrupt  # run_main makes it exit code 130

def log_evaluations(log, epoch, model, data, s, device):
    """After an epoch: evaluate on the validation set. Every --eval-every epochs, and after
    the last one, also on the test set."""
    is_last = epoch + 1 == s.epochs
    for split, every in (("val", 1), ("test", s.eval_every)):
        if data[split] and every and (is_last or (epoch + 1) % every == 0):
            mms_f, mms_v, target = evaluate(model, data[split], s, device)
            score, sim = trained_score(mms_f, mms_v, s)
            metrics = retrieval_metrics(sim, target)
            write_line(log, dict(epoch=epoch, split=split, score=score, **metrics))

def trained_score(mms_f, mms_v, s):
    """The score that the loss trains: its name in the table, and its values (A, B)."""
    name = s.interaction.upper()
    if s.loss_form == "dual" and s.lambda_video == 0:
        return f"{name}_F", mms_f
    if s.loss_form == "dual" and s.lambda_frame == 0:
        return f"{name}_V", mms_v
    return f"{name}_FV", mms_fv(mms_f, mms_v)

def write_log(log, bar, unread):
    """Log the steps since the last call. Raises FloatingPointError if one has failed."""
    for line, numbers in unread:
        loss, true_f, true_v, norm, grad_scale = numbers.tolist()
        line.update(loss=loss, MMS_F=true_f, MMS_V=true_v, grad_norm=norm)
        # In fp16, a step whose gradients overflow is skipped, and the scale is halved.
        # That is normal while the scale is above 1. Any other infinity or NaN is a failure.
        overflowed = grad_scale > 1 and not math.isfinite(norm)
        if overflowed:
            line.update(grad_norm=None, loss_scale=grad_scale)
        elif not math.isfinite(loss + norm):
            step = line["step"]
            raise FloatingPointError(f"loss {loss}, gradient norm {norm} in step {step}")
        bar.set_postfix(loss=f"{loss:.3f}", MMS_F=f"{true_f:.3f}", MMS_V=f"{true_v:.3f}")
        write_line(log, line)

def open_log(out, end=None):
    """Open a run's log to append to it, without what comes after `end` bytes, and
    without a last line that was cut off."""
    path = out / "log.jsonl"
    with user_errors(path, OSError):
        content = path.read_bytes()[:end] if path.exists() else b""
        log = open(path, "ab", buffering=0)  # if the disk is full, write_line notices it
        log.truncate(content.rfind(b"\n") + 1)  # 0 if no line is complete
    return log

def write_line(log, record):
    with user_errors(log.name, OSError):
        line = f"{json.dumps(record)}\n".encode()
        if log.write(line) < len(line):
            raise InputError(f"{log.name}: the disk is full")

# ---- Checkpoints
def checkpoint_paths(out):
    """Sorted by step. Copies with other names belong to the user: they are left alone."""
    digits = 8 * "[0-9]"
    return sorted(Path(out, "checkpoints").glob(f"step-{digits}.pt"))

def save_checkpoint(out, step, log_end, state, trained_on, s):
    """Write out/checkpoints/step-N.pt after N steps, and keep the one before it."""
    content = {name: part.state_dict() for name, part in state.items()}
    content |= trained_on
    content |= dict(step=step, log_end=log_end, settings=json.dumps(asdict(s)))
    path = out / "checkpoints" / f"step-{step:08d}.pt"
    # In memory first, because torch.save's error for a full disk is unclear.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
    older = [other for other in checkpoint_paths(out) if other < path]
    for other in older[:-1]:  # keep one, in case this one is damaged
        other.unlink()

def load_checkpoint(out):
    """The last checkpoint that is not damaged, or None if there is none."""
    paths = checkpoint_paths(out)
    for path in reversed(paths):
        try:
            # It is a zip file, which has a checksum of each tensor.
            if zipfile.ZipFile(path).testzip():
                raise ValueError("a checksum is wrong")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            # Damage shows in many ways.
            print(f"{path} is damaged; trying the one before it")
    if paths:
        raise InputError(f"all checkpoints in {out} are damaged: start a new run")

def restore(out, state, trained_on, s):
    """Load the last checkpoint -> its step and the log's length, or 0, 0 without one."""
    content = load_checkpoint(out)
    if content is None:
        if read_result(out):
            raise InputError(f"{out} has ended meanwhile: use --resume again")
        # The first checkpoint is saved before the first line of the log. Never train
        # over what a run has left.
        if read_log(out) or (out / "model.safetensors").exists():
            raise InputError(f"{out} has a log or a model, but no checkpoints: put "
                             "them back, or start a new run")
        return 0, 0
    if content["data"] != trained_on["data"]:
        raise InputError(f"{out} was started with other clips or captions, "
                         "or a video is gone or has changed")
    # Checkpoints of older versions do not count the clips.
    count = trained_on["train_clips"]
    old_count = content.get("train_clips", count)
    if old_count != count:
        raise InputError(f"{out} was started with {old_count} training clips that could "
                         f"be read, now there are {count}: start a new run")
    # settings.json may have been edited. Checkpoints of older versions have no settings.
    refuse_changes(s, json.loads(content.get("settings", "{}")), out)
    for name, part in state.items():
        if content[name]:  # without fp16, the scaler's state is empty
            part.load_state_dict(content[name])
    return content["step"], content["log_end"]

@contextlib.contextmanager
def atomic_write(path):
    """Open a file that gets its name when it is complete, and make its folder."""
    with user_errors(path, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a temporary folder, so that an error leaves no part of a file.
        with tempfile.TemporaryDirectory(prefix="part-", dir=path.parent) as folder:
            with open(f"{folder}/part", "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{folder}/part", path)

# ---- Evaluation (section 5.3, Table 3)
def eval_batch_size(s):
    """Videos, or queries, that are evaluated at a time."""
    return min(s.micro_batch or 32, 32)

# Batches of evaluation differ in shape, and each shape would be compiled.
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def evaluate(model, clips, s, device):
    """Every caption against every clip -> MMS_F (A, B), MMS_V (A, B), target (A,)."""
    model.eval()
    size = eval_batch_size(s)
    parts = [clips[i:i + size] for i in range(0, len(clips), size)]
    load = partial(load_frames, s=s, size=model.image_size)
    F, V = [], []
    for frames in tqdm(prefetch(load, parts, s.workers), "evaluating", len(parts)):
        with autocast(device, s.precision):
            f, v = model.encode_video(frames.to(device))
        F.append(f)
        V.append(v)
    F, V = torch.cat(F), torch.cat(V)

    # A few queries at a time, because each token is compared with each frame.
    captions = [caption for clip in clips for caption in clip.captions]
    mms_f, mms_v = [], []
    for i in range(0, len(captions), size):
        ids, mask = model.tokenize(captions[i:i + size])
        ids, mask = ids.to(device), mask.to(device)
        with autocast(device, s.precision):
            Q = model.encode_query(ids)
        some_f, some_v = model.similarities(Q, mask, F, V)
        mms_f.append(some_f.cpu())
        mms_v.append(some_v.cpu())
    counts = torch.tensor([len(clip.captions) for clip in clips])
    target = torch.arange(len(clips)).repeat_interleave(counts)
    return torch.cat(mms_f), torch.cat(mms_v), target

def result_rows(mms_f, mms_v, target, interaction="mms"):
    """Metrics of Table 3's scores, text to video and video to text -> a list of dicts."""
    sims = [mms_f, mms_v, mms_fv(mms_f, mms_v)]
    to_text = [video_to_text(sim, target) for sim in sims]  # best caption by each score
    diagonal = torch.arange(len(to_text[0]))  # the true pairs
    return (score_rows("text to video", sims, target, interaction)
            + score_rows("video to text", to_text, diagonal, interaction))

def score_rows(direction, sims, target, interaction):
    name = interaction.upper()
    mms_f, mms_v, both = sims
    scores = {f"{name}_F": mms_f, f"{name}_V": mms_v, f"{name}_FV": both,
              "RRF": reciprocal_rank_fusion(mms_f, mms_v)}
    rows = []
    for score, sim in scores.items():
        row = dict(score=score, direction=direction, queries=len(sim))
        rows.append(row | retrieval_metrics(sim, target))
    return rows

def results_table(result):
    """A run's result as text."""
    lines = [f"gallery of {result['gallery']} clips"]
    if result["missing"]:
        lines[0] += f", {result['missing']} test clips missing: not comparable"
    if result["missing_train"]:
        lines[0] += f", {result['missing_train']} training clips missing"
    if result.get("missing_val"):  # older results do not count them
        lines[0] += f", {result['missing_val']} validation clips missing"
    lines.append("".join(f"{name:>14}" for name in result["evaluation"][0]))
    for row in result["evaluation"]:
        cells = [f"{x:.3f}" if isinstance(x, float) else x for x in row.values()]
        lines.append("".join(f"{cell:>14}" for cell in cells))

    best = result["best"]
    if best:
        # Older logs do not name the score: it was the sum.
        score = best.get("score", result["evaluation"][2]["score"])
        names = ("R@1", "R@5", "R@10", "nDCG@10")
        metrics = " ".join(f"{name} {best[name]:.4g}" for name in names)
        lines.append("best epoch on the test set, which CLIP4Clip, DRL and UATVR report: "
                     f"epoch {best['epoch']}, {score} {metrics}")
    return "\n".join(lines)

# ---- A run
def run(s, device):
    """Train and evaluate as the settings say -> the folder of the run."""
    # Read the data first: a mistake there should not cost a download of weights.
    out = run_folder(s)
    if not s.resume:
        check_is_new(out)
    data = load_clips(s)
    data_id = data_hash(data)
    trains = s.epochs > 0 and not s.eval_only
    splits = ["train", "val", "test"] if trains else ["test"]
    for split in splits:
        if split != "val" and not data[split]:
            raise InputError(f"{s.data} has no {split} clips")
    result = read_result(out)
    if result:  # the run to resume has ended
        if result["data"] != data_id:
            raise InputError(f"{out} was run on other clips or captions, or a video has changed")
        return out

    torch.manual_seed(s.seed)
    model = make_model(s, out)
    # A video may be replaced during a run that takes days. That is noticed at the end.
    old_ids = {clip.path: file_id(clip.path) for split in splits for clip in data[split]}
    readable = {split: fill_cache(data[split], split, s, model.image_size)
                for split in splits}
    if trains:
        examples = len(epoch_examples(readable["train"], s, 0))
        if examples < s.batch_size:
            raise InputError(f"--batch-size {s.batch_size} is more than {examples} examples")

    with claimed_folder(s, out):
        scores_and_target = train_and_evaluate(model, readable, s, device, out, data_id)
        if RANK == 0:
            if not s.eval_only:
                with user_errors(out, OSError):
                    model.save(out)
            # `data_id` was computed at the start: it must still describe the videos.
            for clip in itertools.chain(*readable.values()):
                if file_id(clip.path) != old_ids[clip.path]:
                    raise InputError(
                        f"{clip.path} has changed during the run, so there are no results: "
                        f"put the old file back and use --resume {out}")
            missing = {split: len(data[split]) - len(readable[split]) for split in splits}
            result = dict(
                evaluation=result_rows(*scores_and_target, s.interaction),
                best=best_epoch(out),
                gallery=len(readable["test"]), missing=missing["test"],
                missing_train=missing.get("train", 0),
                missing_val=missing.get("val", 0), data=data_id,
                machine=f"{WORLD} x {device_name(device)}, torch {torch.__version__}")
            with open_log(out) as log:
                write_line(log, result)
                os.fsync(log.fileno())  # before the checkpoints are gone
            remove_checkpoints(out)
    return out

@contextlib.contextmanager
def claimed_folder(s, out):
    """Make the folder of the run, and keep other runs out of it. Only the first process
    writes there."""
    if RANK > 0:
        yield
        return
    with user_errors(out, OSError):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if not s.resume:
            check_is_new(out)  # another run may have begun here meanwhile
            with atomic_write(out / "settings.json") as file:
                file.write(json.dumps(asdict(s), indent=2).encode())
        yield
    (out / "lock").unlink(missing_ok=True)  # filelock does not delete it

def make_model(s, out):
    """The model to train or to evaluate, on the CPU."""
    if s.eval_only:
        return VideoColBERT.load(s.eval_only)
    if not checkpoint_paths(out):
        # A run that was stopped before its first checkpoint reads its weights again.
        if s.pretrained_hash and file_hash(s.pretrained) != s.pretrained_hash:
            raise InputError(f"{s.pretrained} has changed since {out} began: "
                             "start a new run")
        return VideoColBERT(s)
    # The checkpoint holds all weights. The file they once came from may have moved.
    model = VideoColBERT(replace(s, pretrained="none"))
    model.config = s
    return model

def remove_checkpoints(out):
    for path in checkpoint_paths(out):
        path.unlink()
    folder = out / "checkpoints"
    # If a run is killed, atomic_write leaves such folders.
    for part in folder.glob("part-*"):
        shutil.rmtree(part, ignore_errors=True)
    # If the user made copies there, the folder stays.
    with contextlib.suppress(OSError):
        folder.rmdir()

def train_and_evaluate(model, data, s, device, out, data_id):
    """-> what `evaluate` returns for the test clips, in the first process."""
    try:
        model.to(device)
        if s.compile:
            # module.compile() keeps the names of parameters. encode_query calls
            # text.transformer, not text.
            visual, text = model.backbone.visual, model.backbone.text
            for module in (visual, text.transformer, model.temporal):
                module.compile()
        if "train" in data:  # not with --eval-only or --epochs 0
            train(model, data, s, device, out, data_id)
        if RANK == 0:
            return evaluate(model, data["test"], s, device)
    except torch.OutOfMemoryError:
        # Half of a batch of training or of evaluation, whichever is smaller.
        videos = min(s.batch_size // WORLD, eval_batch_size(s))
        raise InputError(f"out of memory on {device}: use --resume {out} "
                         f"--micro-batch {max(1, videos // 2)}") from None

def run_folder(s):
    """The folder of a new run or evaluation, or of the run to resume."""
    if s.resume:
        return Path(s.resume)
    if s.eval_only and not read_result(s.eval_only):
        raise InputError(f"{s.eval_only} is not finished: use --resume {s.eval_only}")
    suffix = "-eval" if s.eval_only else ""
    return Path(s.out or f"runs/{Path(s.data).stem}{suffix}")

def check_is_new(out):
    """Raise InputError if the folder holds anything but the lock of a run."""
    if out.is_file() or any(path.name != "lock" for path in out.glob("*")):
        raise InputError(f"{out} exists: give a new --out "
                         f"(--resume {out} continues a run)")

def read_log(out):
    """The complete lines of a run's log; none if it has not begun."""
    path, lines = Path(out, "log.jsonl"), []
    if not path.exists():
        return lines
    with user_errors(path, OSError), open(path, errors="replace") as log:
        for line in log:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines

def best_epoch(out):
    """The log's line with the best R@1 on the test set; None without --eval-every."""
    tests = [line for line in read_log(out) if line.get("split") == "test"]
    return max(tests, key=lambda line: line["R@1"], default=None)

def read_result(out):
    """The last line of a run's log; None if the run is not finished."""
    lines = read_log(out)
    return lines[-1] if lines and "evaluation" in lines[-1] else None

@contextlib.contextmanager
def locked(folder):
    """Keep other processes out of a folder. InputError if one is at work on it."""
    lock = filelock.FileLock(f"{folder}/lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"another process is at work on {folder}, and has locked "
                         f"{lock.lock_file}; try later") from None
    except OSError as error:
        raise InputError(f"cannot lock {lock.lock_file}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()

def device_name(device):
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device.type

def pick_device(name):
    """auto picks a GPU if there is one. Each process takes its own."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        x = torch.zeros(1, device=name)
        x.item()  # fails on the meta device
        return x.device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None

def main(argv=None):
    s = parse_settings(sys.argv[1:] if argv is None else argv)
    device = pick_device(s.device)
    if WORLD > 1:
        # Flags and lists are gathered on the CPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # One process may decode for hours while the others wait.
        dist.init_process_group(backend, timeout=timedelta(days=1))
    out = run(s, device)
    if RANK == 0:
        title = f"{s.eval_only or out} on {s.data}:"  # whose model, and which clips
        print(title, results_table(read_result(out)), out, sep="\n")
    if WORLD > 1:
        dist.destroy_process_group()

@contextlib.contextmanager
def signal_handler(handler):
    """Within the block, `handler` takes the signals that stop a program. Afterwards the
    old handlers are back."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    # SIGHUP comes when the terminal closes. Windows has none; under nohup it is ignored.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    old = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number in numbers:
            # None is a handler that was not set from Python.
            signal.signal(number, old[number] or signal.SIG_DFL)

class SteadyStream(ObjectWrapper):
    """A stream to which a failed write does no harm, for messages and progress bars.
    Ctrl-C also ends the `tee` of `2>&1 | tee FILE`, and a disk may be full."""

    def write(self, text):
        with contextlib.suppress(OSError):
            self._wrapped.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self._wrapped.flush()

def run_main(program, name):
    """Bad input, or a full disk, prints one line and exits with code 2. A stop exits with
    code 130. A bug shows its traceback."""
    sys.stderr = SteadyStream(sys.stderr)
    try:
        with signal_handler(signal.default_int_handler):
            program()
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(0)  # the reader of the output, such as `head`, has left
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        # It is the output's, because files are checked where they are written.
        print(f"{name}: cannot print: {error.strerror}", file=sys.stderr)
        os._exit(2)  # without trying again to print
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        os._exit(130)  # without waiting for threads

if __name__ == "__main__":
    run_main(main, "train.py")
