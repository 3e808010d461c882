"""What training takes in memory: `python -m extras.bench --memory`."""
import ctypes
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

import train
from train import parse_settings
from video_colbert import VideoColBERT

PAPER_BACKBONES = ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-B-16-SigLIP")
CARDS = (16, 24, 80)  # GB
FREE = 0.85  # share of a card; CUDA, buffers and the allocator's rounding take the rest

# ---- Measured
def resident_megabytes(name):
    """VmRSS, resident memory now, or VmHWM, its peak (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024

def extra_megabytes(device, call):
    """Peak memory of a call above what was held before; NaN where it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    if not os.path.exists("/proc/self/clear_refs"):
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held any more
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_megabytes("VmRSS")
    call()
    return resident_megabytes("VmHWM") - before

def random_batch(s, model, device):
    """What a training step takes: ids, mask, frames, positives."""
    B, A, size = s.batch_size, s.batch_size * s.captions_per_video, model.image_size
    frames = torch.randint(0, 256, (B, s.num_frames, 3, size, size), dtype=torch.uint8)
    ids = torch.randint(2, 30000, (A, model.num_tokens), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    owner = torch.arange(A, device=device) // s.captions_per_video  # (A,)
    positives = owner[:, None] == torch.arange(B, device=device)  # (A, B)
    return ids, mask, frames.to(device), positives

# ---- Computed: what autograd saves
def saved_bytes(call, model):
    """Bytes that autograd saves for the backward pass of a call, each storage once, without
    the model's parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = call()  # keeps the graph alive
    return sum(storages.values())

def layer_norms_in_float32():
    """A context in which layer norms are as under CUDA's autocast, also under the CPU's."""
    layer_norm = torch.nn.functional.layer_norm
    return mock.patch("torch.nn.functional.layer_norm",
                      lambda x, *args: layer_norm(x.float(), *args))

def bytes_per_item(function, model, make_inputs):
    """What autograd saves for each further item of a batch, and once for all of them.

    Counted on the CPU with the types of a GPU. What two items save beyond one grows with
    the batch; the rest is mostly bf16 copies of the weights."""
    with torch.autocast("cpu", torch.bfloat16), layer_norms_in_float32():
        one = saved_bytes(lambda: function(*make_inputs(1)), model)
        two = saved_bytes(lambda: function(*make_inputs(2)), model)
    return two - one, 2 * one - two

def activation_bytes(model, num_frames):
    """-> bytes saved per video by encode_video, per caption by encode_query, once by both.
    A video is `num_frames` images and one call of the temporal transformer."""
    size, M = model.image_size, model.num_tokens
    per_frame, once_image = bytes_per_item(
        model.backbone.visual, model, lambda count: [torch.zeros(count, 3, size, size)])
    per_video, once_temporal = bytes_per_item(
        model.temporal, model, lambda count: [torch.zeros(count, num_frames, model.width)])
    per_caption, once_text = bytes_per_item(
        model.encode_query, model,
        lambda count: [torch.ones(count, M, dtype=torch.int64)])
    once = once_image + once_temporal + once_text
    return num_frames * per_frame + per_video, per_caption, once

def measured_peak(s, device):
    """Peak memory in bytes of training, the model included; NaN if it does not fit."""
    def steps():
        model = VideoColBERT(s).to(device)
        optimizer, batch = train.make_optimizer(model, s), random_batch(s, model, device)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        for _ in range(2):  # Adam's moments exist from the second step on
            train.training_step(model, optimizer, scaler, s, *batch)

    try:
        return 2 ** 20 * extra_megabytes(device, steps)
    except torch.OutOfMemoryError:
        return math.nan

def bench_memory(device, batch=128, micro_batches=(128, 32, 8)):
    """What a training step on `batch` videos and captions takes, for each of the paper's
    backbones and several values of --micro-batch; on a GPU also what it took."""
    lines = [f"a step on {batch} videos, one caption each: activations of a micro-batch, "
             "weights, gradients, Adam's moments, pixels"]
    for backbone in PAPER_BACKBONES:
        for num_frames, num_tokens in ((12, 32), (64, 64)):
            s = replace(parse_settings(["--data", "msrvtt", "--backbone", backbone]),
                        pretrained="none", batch_size=batch, num_frames=num_frames,
                        num_tokens=num_tokens)
            lines += memory_lines(s, device, micro_batches)
    return lines

def memory_lines(s, device, micro_batches):
    model = VideoColBERT(s)
    per_video, per_caption, once = activation_bytes(model, s.num_frames)
    per_pair = per_video + per_caption
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pixels = s.batch_size * s.num_frames * 3 * model.image_size ** 2
    fixed = 4 * weights + 12 * trained + once + pixels  # 12: gradient and two moments
    del model

    lines = [f"{s.backbone}, {s.num_frames} frames: activations {per_video / 1e6:.0f} MB per "
             f"video, {per_caption / 1e6:.1f} MB per caption"]
    for size in micro_batches:
        need = (fixed + size * per_pair) / 1e9
        line = f"  --micro-batch {size:3}: {need:6.1f} GB"
        if device.type == "cuda":
            peak = measured_peak(replace(s, micro_batch=size), device)
            line += f" (measured: {peak / 1e9:.1f})"  # nan if it does not fit
        fits = " ".join(str(card) for card in CARDS if need < FREE * card)
        line += f"; fits a card of {fits} GB" if fits else "; fits none of the cards"
        lines.append(line)
    for card in CARDS:
        room = (FREE * card * 1e9 - fixed) / per_pair
        most = largest_power_of_two(min(room, s.batch_size))
        lines.append(f"  {card} GB: --micro-batch {most}")
    return lines

def largest_power_of_two(x):
    """That is at most x, 0 if x is below 1."""
    return 2 ** math.floor(math.log2(x)) if x >= 1 else 0
