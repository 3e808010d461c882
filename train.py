"""Train, evaluate and look at Video-ColBERT.

    python train.py                                        embedded data: moving shapes, minutes on two CPU cores
    python train.py --data msrvtt --root /data/MSRVTT      the paper's main experiment, on a GPU
    python train.py --help                                 every setting, with the table of the paper it comes from

A run writes its folder, runs/NAME: settings.json, log.jsonl (a line a step, then the evaluation), the model
(config.json and model.safetensors, VideoColBERT.load reads it) and interactions.png (the paper's Figure 4).
"""
import argparse
import csv
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
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
    batch_size: int = 128                   # videos a step (likewise)
    captions_per_video: int = 1             # captions of each video in a batch; the video is encoded once for all of them
    lr_pretrained: float = 1e-7             # learning rate of the pre-trained encoders (section 5.2, Table 9)
    lr: float = 1e-4                        # learning rate of the temporal layers and all else that is new (likewise)
    weight_decay: float = 0.01              # Table 9
    warmup: float = 0.1                     # share of the steps with a rising learning rate, then it falls (Table 9)
    max_grad_norm: float = 1.0              # Table 9
    seed: int = 0                           # of weights, order and everything random
    device: str = "auto"                    # auto (cuda, mps or cpu) or any device torch knows
    workers: int = -1                       # processes that decode and load; -1: one a core
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
    preset = PRESETS.get(typed.get("data", Settings.data), {})
    preset = {**preset, **PRESETS.get(typed.get("backbone", preset.get("backbone")), {})}
    return Settings(**{**preset, **typed})


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
    loader = DataLoader(Clips(videos, [(i, []) for i in range(len(videos))], s, size), batch_size=None, num_workers=s.workers)
    broken = {i: frames for i, _, frames in tqdm(loader, f"reading {what}", unit="video") if isinstance(frames, str)}
    return [video for i, video in enumerate(videos) if i not in broken], list(broken.values())


def load_data(s, size):
    """-> training videos, test videos: lists of (video path, [captions]) whose frames are in the cache; number of test videos lost."""
    if s.data not in ("shapes", "msrvtt"):
        raise ValueError(f"--data must be shapes or msrvtt, not {s.data}")
    root = Path(s.root or f"data/{s.data}")
    if s.data == "shapes" and not root.exists():
        write_shapes(root)
    train, test = load_msrvtt(root)
    train_read, broken = decode_once(train, "training videos", s, size)
    for line in broken[:20]:
        print(f"left out of training: {line}")
    if len(broken) > 0.01 * len(train):
        raise ValueError(f"{len(broken)} of {len(train)} training videos cannot be read, above: more than 1 in 100 is no accident")
    test_read, broken = decode_once(test, "test videos", s, size)
    if broken and not s.allow_missing:
        raise ValueError(f"{len(broken)} of {len(test)} test videos cannot be read, and a smaller gallery flatters every number "
                         f"(--allow-missing evaluates without them): {'; '.join(broken[:5])}{'; ...' if len(broken) > 5 else ''}")
    return train_read, test_read, len(broken)


def collate(clips):
    """[(index, captions, frames)] -> captions list of A str, positives bool (A, B), frames (B, N, 3, S, S), lines about lost clips.

    The same video twice in a batch is a positive, and so is a video that has the very same caption.
    """
    lost = [frames for *_, frames in clips if isinstance(frames, str)]
    clips = [clip for clip in clips if not isinstance(clip[2], str)]
    captions = [caption for _, chosen, _ in clips for caption in chosen]
    owner = [index for index, chosen, _ in clips for _ in chosen]
    positives = [[index == other or caption in chosen for other, chosen, _ in clips] for index, caption in zip(owner, captions)]
    return captions, torch.tensor(positives), torch.stack([frames for *_, frames in clips]), lost


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
                             betas=(0.9, 0.98), eps=1e-6)


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


def train(model, videos, s, device, log):
    per_epoch = len(epoch_items(videos, s, 0)) // s.batch_size
    if per_epoch == 0:
        raise ValueError(f"--batch-size {s.batch_size} is more than the {len(epoch_items(videos, s, 0))} examples to train on")
    steps = s.epochs * per_epoch
    optimizer = make_optimizer(model, s)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps, s.warmup))
    cuda = device.type == "cuda"
    model.train()
    with tqdm(total=steps * s.batch_size, desc="training", unit="video", mininterval=1) as bar:
        for step in range(steps):
            epoch, i = divmod(step, per_epoch)
            if i == 0:
                batches = iter(DataLoader(Clips(videos, epoch_items(videos, s, epoch), s, model.image_size), s.batch_size, drop_last=True,
                                          collate_fn=collate, num_workers=s.workers if cuda else 0, pin_memory=cuda))
            captions, positives, frames, lost = next(batches)
            for line in lost:
                bar.write(f"left out of a batch: {line}")
            ids, mask = model.tokenize(captions)                            # (A, M)
            ids, mask, positives, frames = (x.to(device, non_blocking=True) for x in (ids, mask, positives, frames))
            with autocast(device):
                loss, sim_F, sim_V = model(ids, mask, frames, positives)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)
            lr = {g["name"]: g["lr"] for g in optimizer.param_groups}
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            loss, F, V = (x.item() for x in (loss, sim_F[positives].mean(), sim_V[positives].mean()))
            log(step=step, epoch=epoch, loss=loss, MMS_F=F, MMS_V=V, lr=lr)
            bar.set_postfix(loss=f"{loss:.3f}", MMS_F=f"{F:.3f}", MMS_V=f"{V:.3f}", lr=f"{lr['pretrained']:.1e}/{lr['new']:.1e}", refresh=False)
            bar.update(s.batch_size)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation (section 5.3, Table 3) and Figure 4

@torch.no_grad()
def evaluate(model, videos, s, device):
    """Every caption of the videos against every video -> {"MMS_F": (A, B), "MMS_V", "MMS_FV"}, target (A,), captions (A)."""
    model.eval()
    items = [(v, range(len(captions))) for v, (_, captions) in enumerate(videos)]
    loader = DataLoader(Clips(videos, items, s, model.image_size), 32, collate_fn=list, num_workers=s.workers if device.type == "cuda" else 0)
    captions, target, encoded = [], [], []
    for clips in tqdm(loader, "evaluating", unit="batch"):
        for index, chosen, frames in clips:
            if isinstance(frames, str):
                raise ValueError(frames)
            captions += chosen
            target += [index] * len(chosen)
        ids, mask = (x.to(device) for x in model.tokenize([caption for _, chosen, _ in clips for caption in chosen]))
        with autocast(device):
            encoded.append((model.encode_query(ids, mask), mask, *model.encode_video(torch.stack([f for *_, f in clips]).to(device))))
    Q, mask, F, V = map(torch.cat, zip(*encoded))
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


def main(argv=None):
    s = parse_settings(argv)
    torch.manual_seed(s.seed)
    try:
        device = torch.device(s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else
                              "mps" if torch.backends.mps.is_available() else "cpu")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {s.device}: {str(error).splitlines()[0]}") from None
    s.workers = os.cpu_count() if s.workers < 0 else s.workers
    if s.out and Path(s.out).exists():
        raise ValueError(f"--out {s.out} exists already; name a new folder")
    model = VideoColBERT(Config(**{f.name: getattr(s, f.name) for f in dataclasses.fields(Config)})).to(device)
    train_videos, test_videos, lost = load_data(s, model.image_size)
    free = (Path("runs") / (s.data + suffix) for suffix in itertools.chain([""], map("-{}".format, itertools.count(2))))
    out = Path(s.out) if s.out else next(path for path in free if not path.exists())
    out.mkdir(parents=True)
    (out / "settings.json").write_text(json.dumps(asdict(s), indent=2))
    with open(out / "log.jsonl", "w", buffering=1) as file:                 # a line is on disk when its step is over
        def log(**record):
            file.write(json.dumps(record) + "\n")
        train(model, train_videos, s, device, log)
        model.save(out)
        sims, target, captions = evaluate(model, test_videos, s, device)
        rows, text = results_table(sims, target, [shapes_kind(c) if s.data == "shapes" else "all" for c in captions])
        log(evaluation=rows, gallery=len(test_videos), lost=lost)
    draw_examples(model, test_videos, s, sims, target, captions).save(out / "interactions.png")
    print(f"{len(captions)} queries against a gallery of {len(test_videos)} videos"
          f"{f', {lost} test videos missing: not comparable' if lost else ''}\n{text}\n{out}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
