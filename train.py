"""Train and evaluate Video-ColBERT.

    python train.py                                      synthetic clips, minutes on two CPU cores
    python train.py --data msrvtt --root /data/MSRVTT    the paper's main experiment, on a GPU
    torchrun --nproc-per-node=4 train.py --data msrvtt   the same batch shared by four GPUs
    python train.py --data clips.jsonl                   your own clips
    python train.py --resume runs/msrvtt                 resumes a run, to the very same weights
"""
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from video_colbert import (Config, InputError, VideoColBERT, mms_fv, read_settings,
                           result_rows, results_table, retrieval_metrics, sample_frames, write_file)

# ---- Settings: the command line. Defaults are the paper's or, where illegible, DRL's recipe. -----
@dataclass
class Settings(Config):
    data: str = "shapes"            # shapes (has defaults of its own), msrvtt or FILE.jsonl
    root: str = ""                  # folder of the dataset; default data/NAME
    out: str = ""                   # folder of the run, must be new; default runs/NAME
    cache: str = "data/cache"       # folder of decoded frames, safe to delete
    epochs: int = 5                 # passes over all captions (Table 10 is illegible; DRL's)
    batch_size: int = 128           # videos per step, over all processes together (DRL's)
    captions_per_video: int = 1     # captions per video in a batch; the video is encoded once
    micro_batch: int = 0            # videos encoded at a time, per process, to save memory; 0: all
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16, else fp16; CPU: fp32
    lr_pretrained: float = 1e-7     # learning rate of the pre-trained encoders (5.2, Table 9)
    lr: float = 1e-4                # learning rate of everything new (section 5.2, Table 9)
    weight_decay: float = 0.01      # of matrices, not of biases and norms (Table 9; CLIP4Clip)
    warmup: float = 0.1             # share of the steps with a rising learning rate (Table 9)
    max_grad_norm: float = 1.0      # gradients are clipped to this norm (Table 9)
    seed: int = 0                   # seed of the weights and of the order of the clips
    device: str = "auto"            # auto (cuda, mps or cpu), or any device that torch knows
    workers: int = 4                # threads that read batches ahead, one batch each
    compile: bool = False           # torch.compile the encoders; for long runs on a GPU
    checkpoint_every: int = 500     # steps between checkpoints; each epoch also ends with one
    eval_every: int = 0             # log the test set's R@1 every so many epochs; 0 is never
    resume: str = ""                # resume the run in this folder, with its settings
    eval_only: str = ""             # evaluate the model of this run, on --data if it is given
    allow_missing: bool = False     # evaluate without the test clips that cannot be read

PRESETS = {                                            # later ones win, and shapes implies tiny
    "infonce": dict(learn_scale=True, logit_scale=4.6052),        # section 4.3; CLIP's own scale
    "shapes": dict(backbone="tiny", num_frames=6, num_tokens=12, epochs=45, batch_size=64,
                   captions_per_video=2),
    "tiny": dict(lr_pretrained=1e-3, lr=2e-3, freeze=False, learn_scale=True, logit_scale=3.0,
                 logit_bias=-10.0)}                               # trained from scratch

NEUTRAL = {"root", "out", "cache", "device", "micro_batch", "workers", "checkpoint_every",
           "eval_every", "resume", "allow_missing"}               # may change when a run resumes

def parse_settings(argv):
    """Command line -> Settings. What is typed wins over PRESETS, and these over the defaults. With
    --resume or --eval-only the settings of that run replace both."""
    parse = functools.partial(tyro.cli, Settings, args=argv, description=__doc__.partition("\n")[0])
    s = parse(default=Settings())
    run, default = s.resume or s.eval_only, Settings()
    if s.resume and (s.out or s.eval_only):
        raise InputError("--resume takes neither --out nor --eval-only")
    if run:
        saved = replace(read_settings(Settings, f"{run}/settings.json"), out="", resume="")
        s = parse(default=saved)
        if s.data != saved.data:
            s = parse(default=replace(saved, data=s.data, root=""))
        for name in {f.name for f in fields(Config if s.eval_only else Settings)} - NEUTRAL:
            if getattr(s, name) != getattr(saved, name):
                raise InputError(f"{run} was started with {name} {getattr(saved, name)}: keep that")
        s.epochs = 0 if s.eval_only else s.epochs
    for name in ("loss", "data", "backbone") if not run else ():
        default = replace(default, **PRESETS.get(getattr(s, name), {}))
        s = parse(default=default)
    least = dict(batch_size=WORLD, captions_per_video=1, checkpoint_every=1, workers=1)  # else 0
    for name in {f.name for f in fields(Settings)} - {f.name for f in fields(Config)}:
        value = getattr(s, name)
        if type(value) in (int, float) and not least.get(name, 0) <= value < 2 ** 63:  # NaN too
            raise InputError(f"--{name.replace('_', '-')} cannot be {value}")
    if s.out and os.path.exists(s.out):
        raise InputError(f"--out {s.out} exists already: give a new folder, or --resume {s.out}")
    return s

# ---- Several processes (torchrun): each encodes its slice of a batch, all see the whole loss. ----
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def rank_slice(items, rank=RANK):
    """The part of a list that a process, by default this one, works on."""
    return items[len(items) * rank // WORLD:len(items) * (rank + 1) // WORLD]

def gather_lists(part):
    """All processes' lists, joined in order of rank."""
    parts = [part] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, part)
    return sum(parts, [])

def gather_features(x):
    """All processes' rows in order of rank. Only its own have gradients, for sum_gradients."""
    if WORLD == 1:
        return x
    sizes = gather_lists([len(x)])
    parts = [x.new_zeros(max(sizes), *x.shape[1:]) for _ in sizes]  # collectives want equal shapes
    dist.all_gather(parts, torch.cat([x.detach(), x.new_zeros(max(sizes) - len(x), *x.shape[1:])]))
    return torch.cat([x if r == RANK else parts[r][:size] for r, size in enumerate(sizes)])

def sum_gradients(model):
    """Add up all processes' gradients. Those of the loss's scale and bias are equal: averaged."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    flat = torch.cat([(g / WORLD if "logit_" in name else g).flatten() for name, g in named])
    dist.all_reduce(flat)
    torch.nn.utils.vector_to_parameters(flat, [grad for _, grad in named])

# ---- Clips ---------------------------------------------------------------------------------------
class Clip(NamedTuple):
    path: str
    captions: list                                                # of str
    start: float = 0.0                                            # seconds
    end: float | None = None                                 # seconds; None is the end of the video

MSRVTT_GET = """
  curl -L -C - -O https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip
  curl -L -C - -O https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msrvtt_data.zip
  unzip MSRVTT.zip && unzip msrvtt_data.zip"""

def find_files(root, pattern):
    """Files in or below a folder whose name matches, sorted. Links to folders are followed."""
    return sorted(glob.glob(f"{glob.escape(str(root))}/**/{pattern}", recursive=True))

def read_file(path, parse):
    """What `parse`, a library's function, makes of an open text file. Raises InputError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return parse(file)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None

def get_field(record, name):
    """record[name] of JSON that may be anything, or None."""
    return record.get(name) if isinstance(record, dict) else None

def validate_clips(pairs):
    """Pairs of a clip and its file (and line) -> the clips. InputError if one makes no sense."""
    def is_text(x):                                               # not blank, and valid Unicode
        return isinstance(x, str) and x.strip() and x.encode(errors="replace").decode() == x
    seen = set()
    for clip, source in pairs:
        captions = clip.captions if isinstance(clip.captions, list) else []
        start, end = clip.start, np.inf if clip.end is None else clip.end
        numbers, key = {type(start), type(end)} <= {int, float}, str((clip.path, start, end))
        for expected, is_met in (
                ("the path of a video", is_text(clip.path) and "\0" not in clip.path),
                ("a list of captions that are not blank", captions and all(map(is_text, captions))),
                ("0 <= start < end in seconds", numbers and 0 <= start < end and start < 1e9),
                ("each clip only once", key not in seen)):
            if not is_met:
                raise InputError(f"{source}: expected {expected}, got {str(clip)[:200]}")
        seen.add(key)
    return [clip for clip, _ in pairs]

def load_msrvtt(root):
    """9k training and 1k-A test clips (section 5.1) from files anywhere below a folder."""
    find = functools.partial(find_files, root)
    videos = {Path(path).stem: path for path in find("*.mp4")}
    annotations = (find("MSRVTT_data.json")[:1] or find("MSR_VTT.json")[:1]  # CLIP4Clip, Frozen in
                   or find("*_videodatainfo.json"))               # Time, the official challenge
    test_csv, train_csv = find("MSRVTT_JSFUSION_test.csv"), find("MSRVTT_train.9k.csv")
    for what, found in (("videos", videos), ("captions", annotations), ("test split", test_csv)):
        if not found:
            raise InputError(f"no {what} of MSR-VTT in {root}: use --root or run there{MSRVTT_GET}")
    captions = {}
    for file in annotations:
        content = read_file(file, json.load)
        sentences = get_field(content, "sentences") or get_field(content, "annotations")
        if not isinstance(sentences, list):
            raise InputError(f"{file}: expected a list of sentences or annotations")
        for sentence in sentences:
            video = get_field(sentence, "video_id") or get_field(sentence, "image_id")
            captions.setdefault(str(video), []).append(get_field(sentence, "caption"))
    def clips(file, names, texts):
        paths = [videos.get(name) or name and f"{root}/{name}.mp4" for name in names]
        return validate_clips([(Clip(*pair), file) for pair in zip(paths, texts)])
    rows = read_file(test_csv[0], lambda file: list(csv.DictReader(file)))
    tested = [row.get("video_id") for row in rows]
    test = clips(test_csv[0], tested, [[row.get("sentence")] for row in rows])
    names = [name for name in captions if name not in set(tested)]  # all but the test
    if train_csv:
        rows = read_file(train_csv[0], lambda file: list(csv.DictReader(file)))
        names = [row.get("video_id") for row in rows]
    train = clips((train_csv or annotations)[0], names, [captions.get(name) for name in names])
    return {"train": train, "val": [], "test": test}

def load_json_lines(path):
    """Lines {"video": path, "captions": [...], "split": "train", "val" or "test"}, and "start" and
    "end" in seconds for a part of a video. Paths are absolute or relative to the file."""
    clips = {"train": [], "val": [], "test": []}
    for number, line in enumerate(read_file(path, list), 1):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: {error}") from None
        video, split = get_field(record, "video"), get_field(record, "split")
        if split not in list(clips):
            raise InputError(f"{source}: expected a split of train, val or test")
        if isinstance(video, str):
            video = os.path.normpath(os.path.join(os.path.dirname(path), video))
        clip = Clip(video, record.get("captions"), record.get("start", 0.0), record.get("end"))
        clips[split].append((clip, source))
    return {split: validate_clips(pairs) for split, pairs in clips.items()}

def load_clips(s):
    """--data and --root -> {"train": [clips], "val": ..., "test": ...}, without opening a video."""
    root, file = s.root or f"data/{s.data}", s.data
    if s.data == "msrvtt":
        return load_msrvtt(root)
    if s.data == "shapes":
        from extras.shapes import write_shapes
        file = f"{root}/clips.jsonl"
        write_shapes(root)                                        # unless they are there
    if not file.endswith(".jsonl"):
        raise InputError(f"--data is shapes, msrvtt or a file that ends in .jsonl, not {file}")
    return load_json_lines(file)

def data_hash(data):
    """A hash of the captions, the clips, and which video files exist."""
    clips = [(os.path.basename(clip.path), *clip[1:], os.path.exists(clip.path))
             for split in ("train", "val", "test") for clip in data[split]]
    return hashlib.sha256(json.dumps(clips).encode()).hexdigest()

# ---- Frames and batches: each clip is decoded once, into a file of the cache ---------------------
CACHE_VERSION = 1                                   # raise it when sample_frames gives other pixels

def cached_frames(clip, num_frames, size, cache, read=True):
    """sample_frames of a clip through the cache; without `read`, only the pixels' checksum."""
    try:
        with open(clip.path, "rb") as video:
            status, head = os.fstat(video.fileno()), zlib.crc32(video.read(2 ** 16))
    except OSError as error:
        raise InputError(f"{clip.path}: {error.strerror}") from None
    key = [CACHE_VERSION, os.path.abspath(clip.path), status.st_size, status.st_mtime_ns, head,
           clip.start, clip.end, num_frames, size]
    file = Path(cache, hashlib.sha1(json.dumps(key).encode()).hexdigest())
    length = num_frames * 3 * size ** 2
    if file.exists() and file.stat().st_size == length + 4:
        if not read:
            return np.fromfile(file, np.uint8, offset=length).tobytes()
        pixels, checksum = np.split(np.fromfile(file, np.uint8), [length])
        if checksum.tobytes() == zlib.crc32(pixels).to_bytes(4, "big"):
            return torch.from_numpy(pixels).view(num_frames, 3, size, size)
    frames = sample_frames(clip.path, num_frames, size, clip.start, clip.end)
    checksum = zlib.crc32(frames.numpy()).to_bytes(4, "big")
    write_file(file, frames.numpy(), checksum)
    return frames if read else checksum

def load_frames(clips, s, size):                                  # uint8 (B, N, 3, S, S)
    return torch.stack([cached_frames(clip, s.num_frames, size, s.cache) for clip in clips])

def prefetch(function, items, threads):
    """function(item) for each item in order, computed ahead in threads, at most one item each."""
    pool, waiting = ThreadPoolExecutor(threads), []
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

def fill_cache(data, s, size):
    """Decode what the cache lacks -> the clips of `data` that can be read, the number of test clips
    that cannot, {split: checksum of pixels}. Raises InputError if too many cannot be read."""
    def check(clip):
        try:
            return cached_frames(clip, s.num_frames, size, s.cache, read=False)
        except InputError as error:
            if not str(error).startswith(clip.path):              # not its fault: a full disk, say
                raise
            return str(error)
    readable, pixels = {"train": [], "val": [], "test": []}, {}
    cores = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    for split in readable if s.epochs else ("test",):
        clips, mine = data[split], rank_slice(data[split])
        bar = tqdm(prefetch(check, mine, cores), split, len(mine), disable=RANK or not mine)
        found = gather_lists(list(bar))
        readable[split] = [clip for clip, x in zip(clips, found) if isinstance(x, bytes)]
        pixels[split] = zlib.crc32(b"".join(x for x in found if isinstance(x, bytes)))
        problems = [x for x in found if isinstance(x, str)]
        if RANK == 0 and problems:
            print(f"{split} clips that cannot be read:", *problems, sep="\n  ", flush=True)
        allowed = len(clips) * (s.allow_missing if split == "test" else 0.01)
        if len(problems) > allowed or split != "val" and not readable[split]:
            raise InputError(f"{len(problems)} of {len(clips)} {split} clips cannot be read, see "
                             "--allow-missing, which is for test clips")
    return readable, len(problems), pixels                    # the problems of test, the last split

def epoch_examples(clips, s, epoch):
    """(index of a clip, [indices of its captions]) in random order; each caption is there once."""
    rng, k, examples = np.random.default_rng([s.seed, epoch]), s.captions_per_video, []
    for v, clip in enumerate(clips):
        order = rng.permutation(len(clip.captions)).tolist()
        examples += [(v, order[i:i + k]) for i in range(0, len(order), k)]
    return [examples[i] for i in rng.permutation(len(examples))]

def batches(clips, s):
    """All batches of a run in order, without an epoch's last one if it is incomplete."""
    for epoch in range(s.epochs):
        examples = epoch_examples(clips, s, epoch)
        for i in range(0, len(examples) - s.batch_size + 1, s.batch_size):
            yield examples[i:i + s.batch_size]

def positive_pairs(clips, batch):
    """Which of a batch's A captions belong to which of its B videos -> bool (A, B): those of the
    same video, and those that are the very same text as one of its captions."""
    videos = np.array([v for v, _ in batch])                      # (B,)
    owner = np.repeat(videos, [len(chosen) for _, chosen in batch])  # (A,)
    text = np.array([clips[v].captions[c] for v, chosen in batch for c in chosen])  # (A,)
    same_text = (text[:, None] == text).astype(np.float32)        # (A, A)
    return torch.from_numpy(same_text @ (owner[:, None] == videos) > 0)

# ---- Optimiser (section 5.2, Table 9) ------------------------------------------------------------
def make_optimizer(model, s):
    """Adam with decoupled weight decay, in groups of pre-trained and new parameters and of the
    loss's scale and bias. One-dimensional parameters do not decay, as in CLIP4Clip."""
    lr = dict(pretrained=s.lr_pretrained, new=s.lr, scale=10 * s.lr)  # scale, bias have far to go
    groups = {}
    for name, p in model.named_parameters():
        kind = "scale" if "logit_" in name else "pretrained" if name.startswith("clip.") else "new"
        decay = s.weight_decay if p.ndim > 1 else 0.0
        group = dict(params=[], name=kind, peak_lr=lr[kind], weight_decay=decay)
        if p.requires_grad:
            groups.setdefault((kind, decay), group)["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.98), eps=1e-6, fused=True)

def schedule(step, steps, warmup):
    """Factor of the learning rate: a linear rise over the share `warmup`, then a linear fall."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)

# ---- Training ------------------------------------------------------------------------------------
def autocast(device, precision="auto"):
    """Precision of the encoders. auto: bf16 on GPUs that have it, fp16 on others, else fp32."""
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp16" if device.type == "cuda" else "fp32"
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")

def encode(model, s, ids, mask, frames):                          # Q, F, V
    with autocast(frames.device, s.precision):
        return model.encode_query(ids, mask), *model.encode_video(frames)

def training_step(model, optimizer, scaler, s, ids, mask, frames, positives):
    """One step on this process's queries and videos -> (5,): loss, mean MMS_F and MMS_V of the true
    pairs, gradient norm, scale of fp16. `positives` (A, B) is the whole batch's.
    --micro-batch is GradCache (Gao et al. 2021), a whole batch's gradient with the activations of a
    few videos: embed part by part without gradient, let the loss give the embeddings' gradients,
    then embed each part again and pass these on to the parameters."""
    count = len(frames.split(s.micro_batch)) if s.micro_batch else 1
    parts = list(zip(*(x.tensor_split(count) for x in (ids, mask, frames))))
    model.train(count == 1)                      # no dropout: it would differ in the second pass
    with torch.set_grad_enabled(count == 1):
        Q, F, V = (torch.cat(x) for x in zip(*(encode(model, s, *part) for part in parts)))
    cached = [x.requires_grad_() for x in (Q, F, V)] if count > 1 else []
    Q, mask, F, V = (gather_features(x) for x in (Q, mask, F, V))
    loss, sim_F, sim_V = model.loss(Q, mask, F, V, positives)
    scaler.scale(loss).backward()
    if count > 1:
        for part, *grads in zip(parts, *(x.grad.tensor_split(count) for x in cached)):
            torch.autograd.backward(encode(model, s, *part), grads)
    if WORLD > 1:
        sum_gradients(model)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)
    scale = scaler.scale(torch.ones_like(norm))
    scaler.step(optimizer)                              # leaves out a step that overflows in fp16
    scaler.update()
    optimizer.zero_grad()
    share = positives / positives.sum()                  # indexing by a mask would wait for the GPU
    return torch.stack([loss, (sim_F * share).sum(), (sim_V * share).sum(), norm, scale]).detach()

def train(model, data, s, device, out, data_id):
    """Train `model` in place on data["train"], from the last checkpoint in `out` if there is one. A
    line per step goes to out/log.jsonl. Ctrl-C and SIGTERM save a checkpoint and stop."""
    clips, cuda, optimizer = data["train"], device.type == "cuda", make_optimizer(model, s)
    fp16 = autocast(device, s.precision).fast_dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    parts, skipped = dict(model=model, optimizer=optimizer, scaler=scaler), []
    examples = len(epoch_examples(clips, s, 0))
    if examples < s.batch_size and RANK == 0:
        print(f"--batch-size {s.batch_size} is reduced to {examples}, the number of examples")
    s = replace(s, batch_size=min(s.batch_size, examples))
    per_epoch = examples // s.batch_size
    steps, first = s.epochs * per_epoch, 0
    log = open(os.devnull if RANK else out / "log.jsonl", "a", buffering=1)
    state = load_checkpoint(out / "checkpoints")
    if state:
        if state["data"] != data_id:
            raise InputError(f"{out} was started with other clips or captions: start a new run")
        for name, part in parts.items():
            part.load_state_dict(state.get(name) or part.state_dict())  # only fp16 has a scaler
        skipped += state.get("skipped", [])
        torch.set_rng_state(state["rng"])
        first = state["step"]
    if RANK == 0:
        log.truncate(state["log"] if state else 0)                # later steps run again
    def load(batch):
        mine = rank_slice(batch)
        captions = [clips[v].captions[c] for v, chosen in mine for c in chosen]
        return batch, captions, load_frames([clips[v] for v, _ in mine], s, model.image_size)
    signals, unread = [], []                      # unread: steps whose numbers are still on the GPU
    loaded = prefetch(load, itertools.islice(batches(clips, s), first, None), s.workers)
    bar = tqdm(total=steps, initial=first, desc="training", unit="step", disable=RANK > 0)
    handle_signals(lambda number, frame: signals.append(number))  # no step is cut short
    with log, bar:
        for step, (batch, captions, frames) in enumerate(loaded, first):
            tensors = (*model.tokenize(captions), frames, positive_pairs(clips, batch))
            tensors = [(x.pin_memory() if cuda else x).to(device, non_blocking=True)
                       for x in tensors]
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step, steps, s.warmup)
            numbers = training_step(model, optimizer, scaler, s, *tensors)
            lr = {group["name"]: group["lr"] for group in optimizer.param_groups}
            epoch, ends_epoch = step // per_epoch, (step + 1) % per_epoch == 0
            unread.append((dict(step=step, epoch=epoch, lr=lr), batch, numbers))
            bar.update()
            stops = any(gather_lists(signals))
            saves = stops or ends_epoch or (step + 1) % s.checkpoint_every == 0
            if saves or not cuda or len(unread) == 10:           # reading at each step stalls a GPU
                write_log(log, bar, clips, unread, skipped)
            for split, every in (("val", 1), ("test", s.eval_every)):  # only logged
                if ends_epoch and data[split] and every and (epoch + 1) % every == 0:
                    sim_F, sim_V, target = evaluate(model, data[split], s, device)
                    recall = retrieval_metrics(mms_fv(sim_F, sim_V), target)["R@1"]
                    log.write(json.dumps({"epoch": epoch, f"{split} R@1": recall}) + "\n")
            if saves and RANK == 0:
                save_checkpoint(out / "checkpoints", dict(
                    step=step + 1, log=log.tell(), data=data_id, rng=torch.get_rng_state(),
                    skipped=skipped, **{name: part.state_dict() for name, part in parts.items()}))
            if stops or step + 1 == steps and any(gather_lists(signals)):  # in evaluate
                raise KeyboardInterrupt(f"stopped after step {step}; resume with --resume {out}")
    handle_signals(signal.default_int_handler)

def write_log(log, bar, clips, unread, skipped):
    """Log the steps since the last call, also those that fp16 skipped. InputError for NaN."""
    for line, batch, numbers in unread:
        loss, mms_f, mms_v, norm, scale = numbers.tolist()
        if not np.isfinite(loss) or scale <= 1 and not np.isfinite(norm):
            raise InputError(f"loss {loss}, gradient norm {norm} in step {line['step']}; videos: "
                             + ", ".join(clips[v].path for v, _ in batch))
        line.update(loss=loss, MMS_F=mms_f, MMS_V=mms_v, grad_norm=norm)
        if not np.isfinite(norm):
            skipped.append(line["step"])
            line.update(grad_norm=None, loss_scale=scale, skipped=len(skipped))
        bar.set_postfix(loss=f"{loss:.3f}", MMS_F=f"{mms_f:.3f}", MMS_V=f"{mms_v:.3f}")
        log.write(json.dumps(line) + "\n")
    unread.clear()

def save_checkpoint(folder, state):
    """Write folder/step-N.pt, with its checksum in the first line, and keep the last two."""
    data = io.BytesIO()
    torch.save(state, data)
    checksum = hashlib.sha256(data.getbuffer()).hexdigest().encode()
    write_file(folder / f"step-{state['step']:08d}.pt", checksum, b"\n", data.getbuffer())
    for old in sorted(folder.glob("*.pt"), key=os.path.getmtime)[:-2]:  # steps may mislead
        old.unlink()

def load_checkpoint(folder):
    """The last checkpoint that is not damaged, or None."""
    for path in sorted(folder.glob("*.pt"), reverse=True):
        checksum, _, data = path.read_bytes().partition(b"\n")
        if checksum == hashlib.sha256(data).hexdigest().encode():
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        print(f"{path} is damaged; trying the one before it")

# ---- Evaluation (section 5.3, Table 3) -----------------------------------------------------------
@torch.no_grad()
def evaluate(model, clips, s, device):
    """Every caption against every clip -> MMS_F (A, B), MMS_V (A, B), target (A,), on the CPU."""
    model.eval()
    mine, size, encoded = rank_slice(clips), s.micro_batch or 32, []
    chunks = [mine[i:i + size] for i in range(0, len(mine), size)]
    load = functools.partial(load_frames, s=s, size=model.image_size)
    bar = tqdm(prefetch(load, chunks, s.workers), "evaluating", len(chunks), disable=RANK > 0)
    for chunk, frames in zip(chunks, bar):
        ids, mask = model.tokenize([caption for clip in chunk for caption in clip.captions])
        Q, F, V = encode(model, s, ids.to(device), mask.to(device), frames.to(device))
        encoded.append([x.cpu() for x in (Q, mask, F, V)])
    Q, mask, F, V = (torch.cat(parts).to(device) for parts in zip(*gather_lists(encoded)))
    sim_F, sim_V = model.similarities(Q, mask, F, V)
    captions = torch.tensor([len(clip.captions) for clip in clips])
    return sim_F.cpu(), sim_V.cpu(), torch.arange(len(clips)).repeat_interleave(captions)

# ---- A run ---------------------------------------------------------------------------------------
def finished(out):
    """The evaluation, the last record of a run's log, or None if the run is not finished."""
    try:
        record = json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None
    return record if "evaluation" in record else None

def new_folder(s):
    """Make the folder of a new run, --out or the first free of runs/NAME, runs/NAME-2, ..."""
    name = f"runs/{Path(s.data).stem}{'-eval' * bool(s.eval_only)}"
    for number in itertools.count(1):
        out = Path(s.out or (name if number == 1 else f"{name}-{number}"))
        try:
            out.mkdir(parents=True)
            write_file(out / "settings.json", json.dumps(asdict(s), indent=2).encode())
            return out
        except OSError as error:
            if s.out or not isinstance(error, FileExistsError):
                raise InputError(f"{out}: {error.strerror}") from None

def run(s, device):
    """Train and evaluate as the settings say -> the folder of the run."""
    data = load_clips(s)                                          # before any weights are fetched
    data_id = data_hash(data)
    for split in ("train", "test") if s.epochs else ("test",):
        if not data[split]:
            raise InputError(f"{s.data} has no {split} clips")
    if record := s.resume and finished(s.resume):
        if record["data"] != data_id:
            raise InputError(f"{s.resume} was run on other clips or captions: start a new run")
        return Path(s.resume)
    torch.manual_seed(s.seed)
    model = (VideoColBERT.load(s.eval_only) if s.eval_only else VideoColBERT(s)).to(device)
    if s.compile:
        for module in (model.clip.visual, model.clip.text.transformer, model.temporal):
            module.compile()                     # in place, so that the parameters keep their names
    data, missing, pixels = fill_cache(data, s, model.image_size)
    out = Path(gather_lists([s.resume or str(new_folder(s))] if RANK == 0 else [])[0])
    try:
        if s.epochs:
            train(model, data, s, device, out, f"{data_id} {pixels['train']}")
        rows = result_rows(*evaluate(model, data["test"], s, device), model.config.interaction)
    except (InputError, torch.OutOfMemoryError) as error:
        if not isinstance(error, InputError):
            total, now = torch.cuda.mem_get_info(device)[1], s.micro_batch or s.batch_size // WORLD
            error = (f"{device} has {total / 2 ** 30:.0f} GiB, too little for {now} of a batch of "
                     f"{s.batch_size} videos: use --resume {out} --micro-batch {now // 8 or 1}")
        last = max(out.glob("checkpoints/*.pt"), default="none")
        raise InputError(f"{error}; last good checkpoint: {last}") from None
    if RANK == 0:
        if not s.eval_only:
            model.save(out)
        commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' describe --always --dirty")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        machine = f"{WORLD} x {name}, torch {torch.__version__}, commit {commit}"
        record = dict(evaluation=rows, gallery=len(data["test"]), missing=missing, data=data_id,
                      pixels=pixels, machine=machine)
        with open(out / "log.jsonl", "a" if s.epochs else "w") as log:
            log.write(json.dumps(record) + "\n")
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return out

def pick_device(name):
    """auto is a GPU if there is one. Of several processes on a machine each takes its own."""
    name = str(torch.accelerator.current_accelerator(True) or "cpu") if name == "auto" else name
    try:
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).partition(chr(10))[0]}") from None

def main(argv=None):
    s = parse_settings(sys.argv[1:] if argv is None else argv)
    device = pick_device(s.device)
    if WORLD > 1:                           # one process may decode for hours while the others wait
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))
    out = run(s, device)
    if RANK == 0:
        print(results_table(finished(out)), out, sep="\n")
    if WORLD > 1:
        dist.destroy_process_group()

def handle_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)

def run_main(main, name):
    """Bad input gives one line and exit code 2, being stopped 130; a bug gives its traceback."""
    handle_signals(signal.default_int_handler)
    try:
        main()
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"{name}: {str(error) or 'stopped: run again, or --resume'}", file=sys.stderr)
        os._exit(130)                                             # without waiting for threads

if __name__ == "__main__":
    run_main(main, "train.py")
