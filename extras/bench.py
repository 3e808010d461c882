"""Speed and memory on this machine, without weights or downloads.

    python -m extras.bench                    the paper's sizes; on a CPU add --batch-size 4
    python -m extras.bench --memory           what training each of the paper's backbones takes
    python -m extras.bench --long-video       12 frames of an hour of 720p, against decoding it all

Other flags are train.py's. Clips are those of --data if they are there, else synthetic. Calls that
are compared take turns, so that a busy machine is busy for all of them: trust the ratios.
"""
import argparse
import io
import math
import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import av
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

import train
from extras.shapes import draw_clip
from train import Clip, autocast, cached_frames, parse_settings, pick_device, run_main
from video_colbert import (InputError, VideoColBERT, frame_times, frames_at, mean_max_sim, mms_fv,
                           sample_frames, sample_times)

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}     # dense bf16, from data sheets
PAPER_BACKBONES = ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-B-16-SigLIP")
CARDS = (16, 24, 80)                                              # GB
FREE = 0.9      # share of a card; the rest is for CUDA, buffers, and what the allocator rounds up

# ---- Measuring -----------------------------------------------------------------------------------
def median_seconds(device, *calls, repeat=5):
    """Median time of each call. They take turns; the first turn warms up and does not count."""
    times = [[] for _ in calls]
    for turn in range(repeat + 1):
        for call, record in zip(calls, times):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            record.append(time.perf_counter() - start)
    return [sorted(record[1:])[repeat // 2] for record in times]

def resident_megabytes(name):
    """VmRSS, resident memory now, or VmHWM, its peak (Linux)."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def extra_megabytes(device, call):
    """Peak memory of a call above what was held before; NaN where it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    if not os.path.exists("/proc/self/clear_refs"):
        return math.nan
    Path("/proc/self/clear_refs").write_text("5")                 # the peak is now what is held now
    before = resident_megabytes("VmRSS")
    call()
    return resident_megabytes("VmHWM") - before

def unit_vectors(device, *shape):
    return normalize(torch.randn(*shape, device=device), dim=-1)

def random_batch(s, model, device):
    """What a training step takes: ids, mask, frames, positives."""
    B, A, size = s.batch_size, s.batch_size * s.captions_per_video, model.image_size
    frames = torch.randint(0, 256, (B, s.num_frames, 3, size, size), dtype=torch.uint8,
                           device=device)
    ids = torch.randint(2, 30000, (A, model.num_tokens), device=device)
    video = torch.arange(A, device=device)[:, None] // s.captions_per_video
    return (ids, torch.ones_like(ids, dtype=torch.bool), frames,
            video == torch.arange(B, device=device))

# ---- Speed ---------------------------------------------------------------------------------------
def bench_scores(device, forward_size=1000, both_size=128):
    """MeanMaxSim against one plain matrix product of the same arithmetic, and against einsum."""
    Q, V = unit_vectors(device, forward_size, 32, 512), unit_vectors(device, forward_size, 14, 512)
    with torch.no_grad():
        mean_max_sim(Q[:20], V)                                   # now BLAS has its own buffers
        forward = extra_megabytes(device, lambda: mean_max_sim(Q, V))
    Q = Q[:both_size].clone().requires_grad_()
    V = V[:both_size].clone().requires_grad_()
    both = extra_megabytes(device, lambda: mean_max_sim(Q, V).sum().backward())
    Q, V = unit_vectors(device, 200, 32, 512), unit_vectors(device, 1000, 12, 512)
    with torch.no_grad():
        plain, einsum, ours = median_seconds(
            device, lambda: Q.flatten(0, 1) @ V.flatten(0, 1).T,
            lambda: torch.einsum("amd,bnd->abmn", Q, V).amax(-1).mean(-1),
            lambda: mean_max_sim(Q, V), repeat=9)
    return [f"MeanMaxSim of 200 queries x 32 tokens and 1000 videos x 12 frames, d = 512: "
            f"{ours / plain:.2f} of one plain product ({1000 * plain:.1f} ms); einsum "
            f"{einsum / plain:.2f}",
            f"  peak memory: forward at {forward_size} x {forward_size} {forward:.0f} MB, with "
            f"backward at {both_size} x {both_size} {both:.0f} MB"]

def bench_clips(s, size):
    """Decoding a clip against reading it from the cache, or as JPEG, in one thread."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            clips, source = train.load_clips(s)["train"][:32], s.data
        except InputError:
            clips, source = [Clip(f"{folder}/{i}.mp4", []) for i in range(32)], "synthetic"
            for i, clip in enumerate(clips):
                draw_clip(clip.path, "red", "square", "blue", "grows", np.random.default_rng(i))
        jpegs = []
        for clip in clips:
            for frame in sample_frames(clip.path, s.num_frames, size):
                jpegs.append(io.BytesIO())
                Image.fromarray(frame.permute(1, 2, 0).numpy()).save(jpegs[-1], "JPEG", quality=95)
        decode, cache, jpeg = median_seconds(
            torch.device("cpu"),
            lambda: [sample_frames(clip.path, s.num_frames, size) for clip in clips],
            lambda: [cached_frames(clip, s.num_frames, size, folder) for clip in clips],
            lambda: [np.asarray(Image.open(file)) for file in jpegs], repeat=3)
    raw = s.num_frames * 3 * size ** 2 / 1e6
    small = sum(len(file.getvalue()) for file in jpegs) / len(clips) / 1e6
    return [f"{source} clips, {s.num_frames} frames of {size} pixels, one thread: decode "
            f"{1000 * decode / len(clips):.2f} ms, cache {decode / cache:.0f} times faster "
            f"({raw:.2f} MB), JPEG in memory {decode / jpeg:.0f} times ({small:.2f} MB)"]

def bench_step(s, model, device):
    """Where the time of a training step goes."""
    batch, optimizer = random_batch(s, model, device), train.make_optimizer(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    (ids, mask, frames, positives), A = batch, len(batch[0])
    for group in optimizer.param_groups:
        group["lr"] = 0.0                                         # the weights stay as they are

    def normalise():
        return frames.flatten(0, 1).float().sub_(model.mean).div_(model.std)

    with torch.no_grad(), autocast(device):
        Q, (F, V), images = model.encode_query(ids, mask), model.encode_video(frames), normalise()

    def backward(module, *inputs):
        with autocast(device):
            out = module(*inputs)
        out.sum().backward()

    def only_loss():
        features = [x.detach().requires_grad_() for x in (Q, F, V)]
        model.loss(features[0], mask, *features[1:], positives)[0].backward()

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)
        optimizer.step()

    def step(micro_batch=s.micro_batch):
        train.training_step(model, optimizer, scaler, replace(s, micro_batch=micro_batch), *batch)

    quarter = -(-s.batch_size // 4)

    with FlopCounterMode(display=False) as counter:
        with autocast(device):
            loss = model(ids, mask, frames, positives)[0]
        loss.backward()
    if s.compile:
        for module in (model.clip.visual, model.clip.text.transformer, model.temporal):
            module.compile()
    peak = extra_megabytes(device, step)
    image, text, pixels, temporal, loss, optimise, in_quarters, whole = median_seconds(
        device, lambda: backward(model.clip.visual, images),
        lambda: backward(model.encode_query, ids, mask), normalise,
        lambda: backward(model.temporal, F), only_loss, update, lambda: step(quarter), step,
        repeat=9 if device.type == "cuda" else 3)
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    flops, top = counter.get_total_flops() / whole, [v for k, v in PEAK_FLOPS.items() if k in card]
    lines = [f"step of {s.batch_size} videos x {s.num_frames} frames, {A} captions, {s.backbone}: "
             f"{1000 * whole:.1f} ms, {A / whole:.1f} pairs/s, {flops / 1e12:.2f} TFLOP/s"
             + "".join(f" ({100 * flops / x:.0f}% of peak)" for x in top) + f", {peak:.0f} MB"]
    for name, part in (("image encoder", image), ("text encoder", text), ("pixels", pixels),
                       ("temporal transformer", temporal), ("loss", loss),
                       ("clipping and optimiser", optimise)):
        lines.append(f"  {name:24}{1000 * part:10.1f} ms {100 * part / whole:6.1f}%")
    rest = pixels + temporal + loss + optimise
    lines.append(f"  with --micro-batch {quarter}: {in_quarters / whole:.2f} of the time")
    return lines + [f"  all but the two encoders {100 * rest / whole:.1f}%; 900,000 pairs, five "
                    f"epochs of MSR-VTT, would take {900_000 * whole / A / 3600:.1f} h"]

@torch.no_grad()
def bench_query(s, model, device, gallery=1000):
    """How long a user waits for the ten best of a gallery, and how much of it is the encoder's."""
    N, E = s.num_frames, s.visual_expansion
    F = unit_vectors(device, gallery, N, model.width)
    V = unit_vectors(device, gallery, N + E, model.width)
    ids = torch.randint(2, 30000, (1, model.num_tokens), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def encode():
        with autocast(device):
            return model.encode_query(ids, mask)

    def answer():
        scores = mms_fv(*model.similarities(encode(), mask, F, V))
        return scores.topk(min(10, gallery)).indices.tolist()

    model.eval()
    encoder, whole = median_seconds(device, encode, answer, repeat=9)
    return [f"query against {gallery} videos: {1000 * whole:.1f} ms, of which the text encoder "
            f"{1000 * encoder:.1f} ms"]

# ---- Long videos ---------------------------------------------------------------------------------
def write_long_video(path, minutes, size=(1280, 720)):
    """A minute of moving noise in H.264, again and again."""
    noise = np.random.default_rng(0).integers(0, 256, (110, 180, 3), dtype=np.uint8)
    noise, minute = noise.repeat(8, 0).repeat(8, 1), io.BytesIO()
    with av.open(minute, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "fast", "crf": "28"})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for i in range(60 * 25):
            picture = noise[i // 3 % 150:, i % 150:][:size[1], :size[0]]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    minute.seek(0)
    with av.open(minute) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        length = sum(packet.duration for packet in packets)
        for shift in range(0, minutes * length, length):
            for original in packets:
                packet = av.Packet(bytes(original))
                packet.stream, packet.time_base = stream, original.time_base
                packet.pts, packet.dts = original.pts + shift, original.dts + shift
                packet.duration, packet.is_keyframe = original.duration, original.is_keyframe
                container.mux(packet)

def bench_long_video(minutes=60):
    """Seeking to 12 frames, and decoding from the beginning as far as the last of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/long.mp4"
        write_long_video(path, minutes)
        times = frame_times(path)
        wanted = sample_times(path, times, 12)
        demux, seek, decode = median_seconds(
            torch.device("cpu"), lambda: frame_times(path),
            lambda: sample_frames(path, 12, 224),
            lambda: list(frames_at(path, wanted, [], 224)), repeat=1)
    return [f"12 frames of {minutes} minutes of 720p H.264 with {len(times[3])} keyframes: "
            f"{seek:.2f} s, of which {demux:.2f} s to find the keyframes; decoding from the "
            f"beginning takes {decode:.2f} s, so {seek / decode:.3f} of it"]

# ---- Memory --------------------------------------------------------------------------------------
def saved_bytes(call, model):
    """Bytes that autograd saves for the backward pass of a call, each storage once, without the
    model's parameters."""
    parameters, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = call()                                              # keeps the graph alive
    return sum(storages.values())

def bytes_per_item(function, model, make_inputs):
    """What autograd saves for each further item of a batch, and once for all of them.

    Counted on the CPU with the types of a GPU: under bf16 autocast, and layer norms in float32,
    which CUDA's autocast does and the CPU's does not. What two items save beyond what one saves
    grows with the batch; the rest is mostly bf16 copies of the weights.
    """
    layer_norm = torch.nn.functional.layer_norm

    def layer_norm_as_on_cuda(x, *args):
        return layer_norm(x.float(), *args)

    with torch.autocast("cpu", torch.bfloat16), \
            mock.patch("torch.nn.functional.layer_norm", layer_norm_as_on_cuda):
        one, two = (saved_bytes(lambda: function(*make_inputs(count)), model) for count in (1, 2))
    return two - one, 2 * one - two

def activation_bytes(model, num_frames):
    """-> bytes saved per video by encode_video, per caption by encode_query, once by both. A video
    is `num_frames` times the image encoder on a frame and once the temporal transformer."""
    size, M = model.image_size, model.num_tokens
    per_frame, once_image = bytes_per_item(
        model.clip.visual, model, lambda count: [torch.zeros(count, 3, size, size)])
    per_video, once_temporal = bytes_per_item(
        model.temporal, model, lambda count: [torch.zeros(count, num_frames, model.width)])
    per_caption, once_text = bytes_per_item(
        model.encode_query, model,
        lambda count: [torch.ones(count, M, dtype=torch.int64), torch.ones(count, M)])
    return num_frames * per_frame + per_video, per_caption, once_image + once_temporal + once_text

def measured_peak(s, device):
    """Peak memory in bytes of training from a model without weights on, NaN if it does not fit."""
    def steps():
        model = VideoColBERT(s).to(device)
        optimizer, batch = train.make_optimizer(model, s), random_batch(s, model, device)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        for _ in range(2):                             # Adam's moments exist from the second on
            train.training_step(model, optimizer, scaler, s, *batch)
    try:
        return 2 ** 20 * extra_megabytes(device, steps)
    except torch.OutOfMemoryError:
        return math.nan

def bench_memory(device, batch=128, micro_batches=(128, 32, 8)):
    """What a training step on `batch` videos and captions takes for each of the paper's backbones
    with so many videos in a --micro-batch; on a GPU also what it took."""
    lines = [f"a step on {batch} videos, one caption each: activations of a micro-batch, weights, "
             "gradients, Adam's moments, pixels"]
    for backbone in PAPER_BACKBONES:
        for num_frames, num_tokens in ((12, 32), (64, 64)):
            s = parse_settings(["--data", "msrvtt", "--backbone", backbone, "--pretrained", "none",
                                "--batch-size", str(batch), "--num-frames", str(num_frames),
                                "--num-tokens", str(num_tokens)])
            model = VideoColBERT(s)
            per_video, per_caption, once = activation_bytes(model, num_frames)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            weights = sum(p.numel() for p in model.parameters())
            pixels = batch * num_frames * 3 * model.image_size ** 2
            fixed = 4 * weights + 12 * trained + once + pixels    # 12: gradient and two moments
            del model
            lines.append(f"{backbone}, {num_frames} frames: activations {per_video / 1e6:.0f} MB "
                         f"per video, {per_caption / 1e6:.1f} MB per caption")
            for size in micro_batches:
                need = (fixed + size * (per_video + per_caption)) / 1e9
                fits = " ".join(str(card) for card in CARDS if need < FREE * card)
                peak = measured_peak(replace(s, micro_batch=size), device) / 1e9 \
                    if device.type == "cuda" else math.nan
                measured = "" if math.isnan(peak) else f" (measured: {peak:.1f})"
                lines.append(f"  --micro-batch {size:3}: {need:6.1f} GB{measured}; "
                             + (f"fits a card of {fits} GB" if fits else "fits none of the cards"))
            for card in CARDS:
                room = (FREE * card * 1e9 - fixed) / (per_video + per_caption)
                lines.append(f"  {card} GB: --micro-batch {largest_power_of_two(min(room, batch))}")
    return lines

def largest_power_of_two(x):
    """That is at most x, 0 if x is below 1."""
    return 2 ** math.floor(math.log2(x)) if x >= 1 else 0

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="what training takes, and stop")
    parser.add_argument("--long-video", action="store_true", help="12 frames of an hour, and stop")
    args, argv = parser.parse_known_args(argv)
    s = parse_settings(["--data", "msrvtt", *argv])
    device = pick_device(s.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.memory:
        print(*bench_memory(device), sep="\n")
        return
    if args.long_video:
        print(*bench_long_video(), sep="\n")
        return
    print(*bench_scores(device), sep="\n")                        # first, while no memory was freed
    model = VideoColBERT(replace(s, pretrained=None)).to(device)
    print(*bench_clips(s, model.image_size), *bench_step(s, model, device),
          *bench_query(s, model, device), sep="\n")

if __name__ == "__main__":
    run_main(main, "extras.bench")
