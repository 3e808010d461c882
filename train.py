"""Train, evaluate and look at Video-ColBERT.

    python train.py                                        embedded data: moving shapes, minutes on two CPU cores
    python train.py --data msrvtt --root /data/MSRVTT      the paper's main experiment, on a GPU
    torchrun --nproc-per-node=4 train.py --data msrvtt     the same on four, with the same global batch
    python train.py --bench --batch-size 4                 how fast every part is on this machine, here on a CPU
    python train.py --help                                 every setting, with the table of the paper it comes from

A run writes its folder, runs/NAME: settings.json, log.jsonl (a line a step, then the evaluation), the model
(config.json and model.safetensors, VideoColBERT.load reads it) and interactions.png (the paper's Figure 4).
"""
import argparse
import csv
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
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
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from video_colbert import Config, VideoColBERT, draw_interactions, interactions, mean_max_sim, retrieval_metrics, sample_frames


# ---------------------------------------------------------------------------------------------------------------------
# Settings: the dataclass is the command line. Its defaults are the paper's, or DRL's public recipe where it is illegible.

@dataclass
class Settings(Config):
    data: str = "shapes"                    # shapes (embedded) or msrvtt
    root: str = ""                          # the dataset's folder; default data/NAME
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
    bench: bool = False                     # measure instead of training: --backbone, --num-frames, --batch-size and --device count
    allow_missing: bool = False             # evaluate without the test videos that are missing or unreadable


PRESETS = {
    "shapes": dict(backbone="tiny", num_frames=6, num_tokens=12, epochs=45, batch_size=64, captions_per_video=2),
    "tiny": dict(lr_pretrained=1e-3, lr=2e-3, freeze=False, learn_scale=True, logit_scale=3.0, logit_bias=-10.0),
}


def parse_settings(argv):
    """Command line -> Settings: what is typed, else the backbone's and the dataset's presets, else the paper's."""
    source = inspect.getsource(Config) + inspect.getsource(Settings)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Settings):
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(
            type=field.type if isinstance(field.type, type) else lambda text: None if text.lower() == "none" else text)
        parser.add_argument("--" + field.name.replace("_", "-"), **kind,
                            help=f"{comments[field.name]} [{field.default}]".replace("%", "%%"))
    typed = vars(parser.parse_args(argv))
    if typed.get("bench"):
        typed.setdefault("data", "msrvtt")                                  # the paper's sizes, not the embedded data's
    preset = PRESETS.get(typed.get("data", Settings.data), {})
    preset = {**preset, **PRESETS.get(typed.get("backbone", preset.get("backbone")), {})}
    return Settings(**{**preset, **typed})


# ---------------------------------------------------------------------------------------------------------------------
# Many processes (torchrun): each encodes its share of a batch, all see the loss of the whole batch

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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
    clips, split = [], {}                                                   # clips: (color, shape, border, motion)
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


# --- MSR-VTT, 9k training and 1k-A test videos

MSRVTT = {"videos": "https://www.robots.ox.ac.uk/~maxbain/frozen-in-time/data/MSRVTT.zip",
          "annotation": "https://github.com/ArrowLuo/CLIP4Clip/releases/download/v0.0/msrvtt_data.zip"}


def load_msrvtt(root):
    """Folder in any of the three layouts -> train, test: lists of (video path, [captions]). ValueError names what is missing."""
    def find(*names):                                                       # in root or up to two folders below
        return [path for name in names for depth in ("", "*/", "*/*/") for path in sorted(Path(root).glob(depth + name))][:1]

    def read(path, parse):
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                return parse(file)
        except KeyError as error:
            raise ValueError(f"{path}: no {error} where there should be one") from None
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"{path}: {error}") from None

    def sentences(file):
        data = json.load(file)
        if "sentences" in data:                                             # CLIP4Clip's and the official challenge's
            return [(s["video_id"], s["caption"]) for s in data["sentences"]]
        return [(s["image_id"], s["caption"]) for s in data["annotations"]]             # Frozen in Time's

    if not Path(root).is_dir():
        raise ValueError(f"no folder {root}: unpack {MSRVTT['videos']} and {MSRVTT['annotation']} into it, or give --root")
    annotation = find("MSRVTT_data.json", "MSR_VTT.json") or find("train_val_videodatainfo.json") + find("test_videodatainfo.json")
    if not annotation:
        raise ValueError(f"no MSRVTT_data.json, MSR_VTT.json or train_val_videodatainfo.json (captions) in {root}: unpack {MSRVTT['annotation']}")
    test_csv, train_csv = find("MSRVTT_JSFUSION_test.csv"), find("MSRVTT_train.9k.csv")
    if not test_csv:
        raise ValueError(f"no MSRVTT_JSFUSION_test.csv (the 1k-A test queries) in {root}: unpack {MSRVTT['annotation']}")
    folders = [f for below in ("", "*/") for name in ("videos/all", "videos", "MSRVTT_Videos") for f in Path(root).glob(below + name)]
    folders = [f for f in folders if any(f.glob("*.mp4"))]
    if not folders:
        raise ValueError(f"no videos in {root} (videos/all, videos or MSRVTT_Videos): unpack {MSRVTT['videos']}")

    captions, test = {}, {}
    for path in annotation:
        for video, caption in read(path, sentences):
            captions.setdefault(video, []).append(caption)
    for video, query in read(test_csv[0], lambda file: [(row["video_id"], row["sentence"]) for row in csv.DictReader(file)]):
        test.setdefault(video, []).append(query)
    if train_csv:
        train = read(train_csv[0], lambda file: [row["video_id"] for row in csv.DictReader(file)])
    else:                                                                   # 9k is all that 1k-A is not
        train = [video for video in captions if video not in test]
    unknown = [video for video in train if video not in captions]
    if unknown:
        raise ValueError(f"{annotation[0]}: no captions for {len(unknown)} videos of {train_csv[0]}, {unknown[0]} first")
    return ([(folders[0] / f"{video}.mp4", captions[video]) for video in train],
            [(folders[0] / f"{video}.mp4", queries) for video, queries in test.items()])


# ---------------------------------------------------------------------------------------------------------------------
# Frames: every video is decoded once, into a file of the cache

SAMPLER = hashlib.sha1(inspect.getsource(sample_frames).encode()).hexdigest()


def cached_frames(path, num_frames, size, cache):
    """sample_frames through the cache. A file there counts only if its header is right to the last bit.

    The header holds the video file's path, size and times, the settings, a hash of the sampler's code and a checksum of
    the pixels, so a change of any decodes anew.
    """
    path = os.path.abspath(path)
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    name = hashlib.sha1(os.fsencode(path) + f" {num_frames} {size}".encode()).hexdigest()
    file = Path(cache) / name[:2] / f"{name[2:]}.frames"

    def header(pixels):
        return json.dumps([path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, num_frames, size, SAMPLER, zlib.crc32(pixels)]).encode()

    if file.exists():
        head, _, pixels = file.read_bytes().partition(b"\n")
        if head == header(pixels):
            return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(num_frames, 3, size, size)
    frames = sample_frames(path, num_frames, size)
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(header(frames.numpy()) + b"\n" + frames.numpy().tobytes())
        os.replace(part, file)                                              # whole or not at all
    except OSError as error:
        raise ValueError(f"--cache {cache}: {error.strerror}") from None
    return frames


class Clips(torch.utils.data.Dataset):
    """Items are (index of a video, [indices of its captions]) -> (index, captions, frames uint8 (N, 3, S, S) or an error)."""

    def __init__(self, videos, items, s, size):
        self.videos, self.items, self.settings = videos, items, (s.num_frames, size, s.cache)

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
    if s.data not in ("shapes", "msrvtt"):
        raise ValueError(f"--data must be shapes or msrvtt, not {s.data}")
    root = Path(s.root or f"data/{s.data}")
    if s.data == "shapes" and not root.exists() and RANK == 0:
        write_shapes(root)
    gather_lists([])                                                        # the others wait until it is there
    train, test = load_msrvtt(root)
    train_read, broken = decode_once(train, "training videos", s, size)
    for line in broken[:20] if RANK == 0 else []:
        print(f"left out of training: {line}")
    if len(broken) > 0.01 * len(train):
        raise ValueError(f"{len(broken)} of {len(train)} training videos cannot be read, above: more than 1 in 100 is no accident")
    test_read, broken = decode_once(test, "test videos", s, size)
    if broken and not s.allow_missing:
        raise ValueError(f"{len(broken)} of {len(test)} test videos cannot be read, and a smaller gallery flatters every number "
                         f"(--allow-missing evaluates without them): {'; '.join(broken[:5])}{'; ...' if len(broken) > 5 else ''}")
    return train_read, test_read, len(broken)


def positive_pairs(videos, items):
    """[(index of a video, [indices of captions])] -> bool (A, B): is the caption true of the video?

    The same video twice in a batch is a positive, and so is a video that has the very same caption.
    """
    texts = [{videos[v][1][c] for c in chosen} for v, chosen in items]
    return torch.tensor([[v == other or videos[v][1][c] in theirs for (other, _), theirs in zip(items, texts)]
                         for v, chosen in items for c in chosen])


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
    return torch.optim.AdamW([dict(params=groups[g], lr=lr[g], weight_decay=decay[g], name=g) for g in groups if groups[g]],
                             betas=(0.9, 0.98), eps=1e-6, fused=model.mean.device.type in ("cuda", "cpu"))


def schedule(step, steps, warmup):
    """Factor of the learning rate in step 0 .. steps - 1: a linear rise over the share `warmup`, then a linear fall to 0."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)


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
    """One step on this process's part of a batch -> loss and the true pairs' mean MMS_F and MMS_V, (3,) on the device.

    `positives` (A, B) is the whole batch's; `sizes` holds the number of queries of every process.
    """
    with autocast(frames.device):
        Q, (F, V) = model.encode_query(ids, mask), model.encode_video(frames)
    videos = [len(frames)] * WORLD
    loss, sim_F, sim_V = model.loss(gather_features(Q, sizes), gather_features(mask, sizes), gather_features(F, videos),
                                    gather_features(V, videos), positives)
    loss.backward()
    sum_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    weights = positives / positives.sum()                                   # indexing by a mask would wait for the device
    return torch.stack([loss.detach(), (sim_F.detach() * weights).sum(), (sim_V.detach() * weights).sum()])


def train(model, videos, s, device, log):
    per_epoch = len(epoch_items(videos, s, 0)) // s.batch_size
    if per_epoch == 0:
        raise ValueError(f"--batch-size {s.batch_size} is more than the {len(epoch_items(videos, s, 0))} examples to train on")
    if s.batch_size % WORLD:
        raise ValueError(f"--batch-size {s.batch_size} cannot be shared evenly among {WORLD} processes")
    steps, cuda = s.epochs * per_epoch, device.type == "cuda"
    optimizer = make_optimizer(model, s)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps, s.warmup))
    model.train()
    pending = deque()                                                       # steps whose numbers are still on their way here

    def report():
        step, lr, numbers, arrived = pending.popleft()
        if arrived:
            arrived.synchronize()
        loss, F, V = numbers.tolist()
        log(step=step, epoch=step // per_epoch, loss=loss, MMS_F=F, MMS_V=V, lr=lr)
        bar.set_postfix(loss=f"{loss:.3f}", MMS_F=f"{F:.3f}", MMS_V=f"{V:.3f}", lr=f"{lr['pretrained']:.1e}/{lr['new']:.1e}", refresh=False)

    with tqdm(total=steps * s.batch_size, desc="training", unit="video", mininterval=1, disable=RANK > 0) as bar:
        for step in range(steps):
            epoch, i = divmod(step, per_epoch)
            if i == 0:
                items = epoch_items(videos, s, epoch)
                batches = [items[k * s.batch_size:(k + 1) * s.batch_size] for k in range(per_epoch)]
                mine = [item for batch in batches for item in share(batch)]
                loader = iter(DataLoader(Clips(videos, mine, s, model.image_size), s.batch_size // WORLD, collate_fn=collate,
                                         num_workers=s.workers if cuda else 0, pin_memory=cuda))
            captions, frames = next(loader)
            if isinstance(frames, str):                                     # it was readable when the run began
                raise ValueError(frames)
            positives = positive_pairs(videos, batches[i])
            sizes = [sum(len(chosen) for _, chosen in share(batches[i], rank)) for rank in range(WORLD)]
            ids, mask = model.tokenize(captions)                            # (A / WORLD, M)
            batch = [(x.pin_memory() if cuda else x).to(device, non_blocking=True) for x in (ids, mask, frames, positives)]
            numbers = training_step(model, optimizer, s, *batch, sizes).to("cpu", non_blocking=cuda)
            pending.append((step, {g["name"]: g["lr"] for g in optimizer.param_groups}, numbers,
                            torch.cuda.current_stream().record_event() if cuda else None))
            scheduler.step()
            if len(pending) > 2:                                            # reading at once would make the device wait for us
                report()
            bar.update(s.batch_size)
        while pending:
            report()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation (section 5.3, Table 3) and Figure 4

@torch.no_grad()
def evaluate(model, videos, s, device):
    """Every caption of the videos against every video -> {"MMS_F": (A, B), "MMS_V", "MMS_FV"}, target (A,), captions (A)."""
    model.eval()
    items = share([(v, range(len(captions))) for v, (_, captions) in enumerate(videos)])
    loader = DataLoader(Clips(videos, items, s, model.image_size), 32, collate_fn=list, num_workers=s.workers if device.type == "cuda" else 0)
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
    Q, mask, F, V = (torch.cat(parts).to(device) for parts in zip(*gather_lists(encoded)))
    sim = {"MMS_F": mean_max_sim(Q, F, mask).cpu(), "MMS_V": mean_max_sim(Q, V, mask).cpu()}
    return {**sim, "MMS_FV": sim["MMS_F"] + sim["MMS_V"]}, torch.tensor(target), captions


def results_table(sims, target, kinds):
    """Similarities (A, B) by score, target (A,) and the kind of each query -> rows, text of the table."""
    rows = []
    for kind in dict.fromkeys(["all", *sorted(kinds)]):
        chosen = torch.tensor([kind in ("all", k) for k in kinds])
        for score, sim in sims.items():
            rows.append(dict(queries=kind, number=int(chosen.sum()), score=score, **retrieval_metrics(sim[chosen], target[chosen])))
    names = list(rows[0])[3:]
    lines = [f"{'queries':18}{'score':8}" + "".join(f"{name:>8}" for name in names)]
    for row in rows:
        values = "".join(f"{row[n]:8.3f}" if n.startswith("nDCG") else f"{row[n]:8.1f}" for n in names)
        lines.append(f"{row['queries'] + ' (' + str(row['number']) + ')':18}{row['score']:8}{values}")
    return rows, "\n".join(lines)


def draw_examples(model, videos, s, sims, target, captions, number=4):
    """Figure 4 for a few queries, evenly spread over the test set."""
    rows = []
    for i in (k * len(captions) // number + k for k in range(min(number, len(captions)))):
        path, _ = videos[target[i]]
        frames = cached_frames(path, s.num_frames, model.image_size, s.cache)
        rank = int((sims["MMS_FV"][i] >= sims["MMS_FV"][i, target[i]]).sum())
        words, before, after = interactions(model, captions[i], frames)
        rows.append((f"{captions[i]}   ({path.stem}, rank {rank} of {len(videos)})", words, frames, before, after))
    return draw_interactions(rows)


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
            paths = [path for path, _ in load_msrvtt(root)[0][:32]]
        else:
            paths = [Path(folder) / f"{i}.mp4" for i in range(32)]
            for i, path in enumerate(paths):
                draw_clip(path, "red", "square", "blue", "moves left", np.random.default_rng(i))
        pictures = [[io.BytesIO() for _ in range(s.num_frames)] for _ in paths]
        for path, files in zip(paths, pictures):                            # the alternative: frames kept as JPEG
            for frame, file in zip(sample_frames(path, s.num_frames, size), files):
                Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
        calls = (lambda path, files: sample_frames(path, s.num_frames, size), lambda path, files: cached_frames(path, s.num_frames, size, folder),
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
    images = (frames.flatten(0, 1) - model.mean) / model.std
    step = lambda: training_step(model, optimizer, s, ids, mask, frames, positives, [A])
    with FlopCounterMode(display=False) as counter:
        with autocast(device):
            loss = model(ids, mask, frames, positives)[0]
        loss.backward()
    flops = counter.get_total_flops()
    peak = extra_megabytes(device, step)
    image, text, video, loss, update, whole = seconds(
        device, lambda: backward(lambda: model.clip.visual(images)), lambda: backward(lambda: model.encode_query(ids, mask)),
        lambda: backward(lambda: model.encode_video(frames)), only_loss, only_optimizer, step, repeat=9 if cuda else 3)
    name = torch.cuda.get_device_name() if cuda else "CPU"
    top = next((flop for card, flop in PEAK.items() if card in name), None)
    parts = [("image encoder", image), ("pixels, temporal layers", max(0.0, video - image)), ("text encoder", text), ("loss", loss),
             ("clip and optimiser", update)]
    return [f"step of {B} videos x {s.num_frames} frames, {A} captions of {M} tokens, {s.backbone}, "
            f"{'bf16' if cuda else 'fp32'}, forward and backward:",
            *(f"  {part:24}{1000 * t:10.1f} ms {100 * t / whole:6.1f}%" for part, t in parts),
            f"  {'whole step':24}{1000 * whole:10.1f} ms, {A / whole:.1f} pairs/s, {flops / whole / 1e12:.2f} TFLOP/s"
            f"{f', {100 * flops / whole / top:.0f}% of peak' if top else ''}, extra peak memory {peak:.0f} MB",
            f"  the two encoders: {100 * (image + text) / whole:.1f}% of the step; five epochs of 180,000 pairs: {900000 * whole / A / 60:.1f} min"]


def bench_scores(device):
    """MeanMaxSim against one plain matrix product of the same arithmetic, and einsum, and what it holds."""
    Q, V = unit_vectors(device, 200, 32, 512), unit_vectors(device, 1000, 12, 512)
    with torch.no_grad():
        plain, einsum, ours = seconds(device, lambda: Q.flatten(0, 1) @ V.flatten(0, 1).T,
                                      lambda: torch.einsum("amd,bnd->abmn", Q, V).amax(-1).mean(-1), lambda: mean_max_sim(Q, V), repeat=9)
        Q, V = unit_vectors(device, 1000, 32, 512), unit_vectors(device, 1000, 14, 512)
        forward = extra_megabytes(device, lambda: mean_max_sim(Q, V))
    Q, V = Q[:512].clone().requires_grad_(), V[:512].clone().requires_grad_()
    both = extra_megabytes(device, lambda: mean_max_sim(Q, V).sum().backward())
    return ["MeanMaxSim, 200 queries of 32 tokens x 1000 videos of 12 frames, d = 512, time over a plain product's:",
            f"  plain 1.00 ({1000 * plain:.1f} ms), einsum {einsum / plain:.2f}, mean_max_sim {ours / plain:.2f}",
            f"  extra peak memory: forward at 1000 x 1000 {forward:.0f} MB; forward and backward at 512 x 512 {both:.0f} MB (M = 32, N = 14)"]


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

    images = (frames.flatten(0, 1) - model.mean) / model.std
    still, both, *latency = seconds(device, lambda: index(lambda: model.clip.visual(images)), lambda: index(lambda: model.encode_video(frames)),
                                    lambda: query(F), lambda: query(V), lambda: query(F, V), repeat=21 if device.type == "cuda" else 5)
    rows = zip(("MMS_F", "MMS_V", "MMS_FV"), (still, both, both), latency)
    return [f"as the paper's Table 11: indexing (ms a video, {B} at a time), query latency (ms, {gallery} videos)",
            *(f"  {name:8}{1000 * t / B:8.2f}{1000 * wait:8.2f}" for name, t, wait in rows)]


def bench(s, device):
    """The project's benchmark -> text."""
    model = VideoColBERT(Config(**{**{f.name: getattr(s, f.name) for f in dataclasses.fields(Config)}, "pretrained": None})).to(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    return "\n".join([f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}", *bench_scores(device),
                      *bench_clips(s, model.image_size), *bench_step(s, model, device), *bench_search(s, model, device)])


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


def main(argv=None):
    s = parse_settings(argv)
    device = pick_device(s.device)
    torch.manual_seed(s.seed)
    s.workers = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if s.workers < 0 else s.workers
    if s.bench:
        return print(bench(s, device))
    if s.out and Path(s.out).exists():
        raise ValueError(f"--out {s.out} exists already; name a new folder")
    if WORLD > 1:                                                           # one may decode for hours while the others wait
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    model = VideoColBERT(Config(**{f.name: getattr(s, f.name) for f in dataclasses.fields(Config)})).to(device)
    train_videos, test_videos, lost = load_data(s, model.image_size)
    free = (Path("runs") / (s.data + suffix) for suffix in itertools.chain([""], map("-{}".format, itertools.count(2))))
    out = Path(s.out) if s.out else next(path for path in free if not path.exists())
    file = open(os.devnull, "w")
    if RANK == 0:
        out.mkdir(parents=True)
        (out / "settings.json").write_text(json.dumps(asdict(s), indent=2))
        file = open(out / "log.jsonl", "w", buffering=1)                    # a line is on disk when its step is over
    with file:
        def log(**record):
            file.write(json.dumps(record) + "\n")
        train(model, train_videos, s, device, log)
        if RANK == 0:
            model.save(out)
        sims, target, captions = evaluate(model, test_videos, s, device)
        rows, text = results_table(sims, target, [shapes_kind(c) if s.data == "shapes" else "all" for c in captions])
        log(evaluation=rows, gallery=len(test_videos), lost=lost)
    if RANK == 0:
        draw_examples(model, test_videos, s, sims, target, captions).save(out / "interactions.png")
        print(f"{len(captions)} queries against a gallery of {len(test_videos)} videos"
              f"{f', {lost} test videos missing: not comparable' if lost else ''}\n{text}\n{out}")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
