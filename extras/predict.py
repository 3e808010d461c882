"""What a training step should take on a card that is not at hand.

    python -m extras.predict    the main experiment; `python -m extras.bench` prints the same
                                for its own settings, beside what it measures

The work is counted: one step on fake tensors, which have shapes and no numbers. The rates
are assumed. An eager kernel takes the longer of its arithmetic and its traffic, because a
GPU overlaps the two within a kernel; kernels run one after another, so a step is their sum.
The copy of the pixels comes on top, for it waits in the same queue. Where the host needs
longer to start the kernels than the GPU to run them, as with small batches, that time counts.
"""
import argparse
import copy
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import train
from extras.memory import layer_norms_in_float32, random_batch
from train import Clip, epoch_examples, parse_settings, run_main
from video_colbert import VideoColBERT

# ---- Assumed
class Card(NamedTuple):
    flops: float  # FLOP/s of dense bf16 (T4: fp16) matrix products, from the data sheet
    share: float  # of it, which large products reach
    memory: float  # bytes/s, from the data sheet
    bus: float  # bytes/s from the host over PCIe, from the data sheet
    fits: int  # --micro-batch of the main experiment, 0 for none; from the README's table

# H100, H200 and A100 (80 GB) are those with SXM. A T4 slows down to stay within 70 W.
CARDS = {"H100": Card(989e12, 0.7, 3350e9, 64e9, 0),
         "H200": Card(989e12, 0.7, 4800e9, 64e9, 0),
         "A100": Card(312e12, 0.8, 2039e9, 32e9, 0),
         "A5000": Card(111e12, 0.8, 768e9, 32e9, 64),
         "T4": Card(65e12, 0.4, 320e9, 16e9, 32)}
BYTES_SHARE = 0.85  # of `memory` and `bus`, which copies reach
LAUNCH = 27e-6  # seconds that Python, autograd and the driver took per kernel beside an H200
# What --compile leaves of the bytes of kernels without matrix products: Inductor's own count
# for a block of the encoder, forward and backward. Of launches it is assumed to be as much.
FUSED = 0.35

# ---- Counted
class Kernel(NamedTuple):
    flop: int  # of matrix products, convolutions and attention; others have 0
    bytes: int  # read and written

aten = torch.ops.aten
# The CPU's attention is another operation than CUDA's, with the same arithmetic.
FLOP_FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu:
        flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward]}

class KernelCounter(TorchDispatchMode):
    """Notes each operation that starts a kernel. Some start more than one (attention's
    backward, lists of many tensors), so launches are a little more."""
    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if starts_kernel(func):
            formula = FLOP_FORMULAS.get(func._overloadpacket)
            flop = formula(*args, **kwargs, out_val=out) if formula else 0
            self.kernels.append(Kernel(flop, traffic(func, args, kwargs, out)))
        return out

def starts_kernel(func):
    """Views and questions, such as which device a tensor is on, start none."""
    is_view = any(result.alias_info and not result.alias_info.is_write
                  for result in func._schema.returns)
    return func.namespace == "aten" and not is_view and func != aten._unsafe_view.default

def traffic(func, args, kwargs, out):
    """Bytes of all inputs, which are read, and of what is written."""
    written = out
    if func._schema.is_mutable:
        written = [value for argument, value in zip(func._schema.arguments, args)
                   if argument.alias_info and argument.alias_info.is_write]
    tensors = tree_leaves((args, kwargs, written))
    return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))

def count_step(s):
    """-> the kernels of an eager training step in bf16 with settings `s`, and the size of
    its pixels in bytes."""
    s = replace(s, pretrained=None, precision="bf16")
    model, fakes, counter = VideoColBERT(s), FakeTensorMode(), KernelCounter()
    with FakeCopyMode(fakes):
        model = copy.deepcopy(model)
    model.norms_checked = True  # fake tensors have no norms

    # Clipping takes all gradients at once on a GPU, but fake ones one by one.
    at_once = mock.patch("torch.nn.utils.clip_grad._has_foreach_support", return_value=True)
    with fakes, layer_norms_in_float32(), at_once:
        cpu = torch.device("cpu")
        optimizer, batch = train.make_optimizer(model, s), random_batch(s, model, cpu)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        # The first step makes Adam's moments.
        train.training_step(model, optimizer, scaler, s, *batch)
        with counter:
            train.training_step(model, optimizer, scaler, s, *batch)
    return counter.kernels, batch[2].nbytes

# ---- Predicted
def step_seconds(card, kernels, pixels, compiled=False):
    device, host = 0.0, 0.0
    for flop, size in kernels:
        left = FUSED if compiled and not flop else 1
        arithmetic = flop / (card.share * card.flops)
        device += max(arithmetic, left * size / (BYTES_SHARE * card.memory))
        host += left * LAUNCH
    return max(device, host) + pixels / (BYTES_SHARE * card.bus)

def msrvtt_steps(s):
    """Steps of an epoch of MSR-VTT: 9,000 videos with 20 captions each."""
    clips = [Clip("", ["a caption"] * 20)] * 9000
    return len(epoch_examples(clips, s, 0)) // s.batch_size

def budget(s, kernels, pixels):
    """One line: the work of a step with settings `s`."""
    flop = sum(kernel.flop for kernel in kernels)
    size = sum(kernel.bytes for kernel in kernels)
    fusible = sum(kernel.bytes for kernel in kernels if not kernel.flop)
    name = f"--micro-batch {s.micro_batch}" if s.micro_batch else "at once"
    return (f"{s.batch_size} videos x {s.num_frames} frames, {s.backbone}, {name}: "
            f"{flop / 1e12:.1f} TFLOP, {size / 1e9:.0f} GB ({fusible / 1e9:.0f} GB by kernels "
            f"without matrix products), {len(kernels):,} kernels, {pixels / 1e6:.0f} MB of pixels")

def predictions(s, micro_batches):
    """Markdown: the work of a step with settings `s` and each of the micro-batches of
    {card: micro-batch}, and a table of what follows from it."""
    work = {}
    for micro_batch in sorted(set(micro_batches.values())):
        work[micro_batch] = count_step(replace(s, micro_batch=micro_batch))
    epoch = msrvtt_steps(s)
    run = s.epochs * epoch
    lines = ["Computed, not measured, for bf16:", ""]
    for micro_batch, counts in work.items():
        lines.append("- " + budget(replace(s, micro_batch=micro_batch), *counts))
    lines += [f"- MSR-VTT: {epoch:,} steps an epoch, {run:,} in {s.epochs} epochs", "",
              "| card, --micro-batch | step, eager / compiled | epoch | run |",
              "| --- | --- | --- | --- |"]
    for name, micro_batch in micro_batches.items():
        eager = step_seconds(CARDS[name], *work[micro_batch])
        compiled = step_seconds(CARDS[name], *work[micro_batch], compiled=True)
        lines.append(f"| {name}, {micro_batch or 'none'} "
                     f"| {1000 * eager:.0f} / {1000 * compiled:.0f} ms "
                     f"| {epoch * eager / 60:.1f} / {epoch * compiled / 60:.1f} min "
                     f"| {run * eager / 3600:.2f} / {run * compiled / 3600:.2f} h |")
    return lines

def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    fits = {name: card.fits for name, card in CARDS.items()}
    print(*predictions(parse_settings(["--data", "msrvtt"]), fits), sep="\n")

if __name__ == "__main__":
    run_main(main, "extras.predict")
