"""Work is counted right, and the predictions follow from it and are those of RESULTS.md."""
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from extras import predict
from extras.predict import CARDS, Card, Kernel, KernelCounter, step_seconds
from train import parse_settings

FOLDER = Path(__file__).parent
TINY = ["--data", "msrvtt", "--backbone", "tiny", "--batch-size", "4", "--num-frames", "3"]

def test_a_linear_layers_work_is_that_counted_by_hand():
    """5 rows from 3 to 4 numbers, twice in float32. Forward: one product, which reads bias, input
    and weight and writes the output. Backward: a product for the weight, one for the input, and
    the bias's sum. Transposing is no kernel."""
    layer, x = nn.Linear(3, 4), torch.randn(5, 3, requires_grad=True)
    gradient = torch.randn(5, 4)
    with KernelCounter() as counter:
        layer(x).backward(gradient)
    rows, product = 4 * 5, 2 * 5 * 3 * 4
    forward = Kernel(product, 4 * 4 + rows * 3 + 4 * 3 * 4 + rows * 4)
    backward_weight = Kernel(product, rows * 4 + rows * 3 + 4 * 3 * 4)
    backward_input = Kernel(product, rows * 4 + 4 * 3 * 4 + rows * 3)
    backward_bias = Kernel(0, rows * 4 + 4 * 4)
    assert counter.kernels[0] == forward
    assert sorted(counter.kernels[1:]) == sorted([backward_weight, backward_input, backward_bias])

def test_what_is_changed_in_place_is_read_and_written():
    """Fused AdamW reads parameter, gradient, two moments and the number of the step, and may write
    the first four (torch says so; it writes a gradient only if it scales it)."""
    x = torch.zeros(10)
    with KernelCounter() as counter:
        x.add_(torch.ones(1)).view(2, 5)
        torch._foreach_mul_([x, x], 2.0)
    assert counter.kernels == [Kernel(0, 4), Kernel(0, 4 * (10 + 1 + 10)), Kernel(0, 4 * 2 * 20)]
    batch, weight = torch.zeros(2, 3, 4), torch.zeros(4, 5)
    with KernelCounter() as counter:
        batch @ weight  # two views and a product
    assert counter.kernels == [Kernel(2 * 6 * 4 * 5, 4 * (6 * 4 + 4 * 5 + 6 * 5))]
    p = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.AdamW([p], fused=True)
    p.grad = torch.ones(1000)
    optimizer.step()
    with KernelCounter() as counter:
        optimizer.step()
    adam = max(kernel.bytes for kernel in counter.kernels)
    assert adam == 4 * (4 + 4) * 1000 + 4

def test_attention_on_a_cpu_counts_as_on_a_gpu():
    """Forward: two products of 2 x 3 heads, 5 x 5 x 8. Backward: five."""
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    with KernelCounter() as counter:
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    product = 2 * (2 * 3) * 5 * 5 * 8
    assert [kernel.flop for kernel in counter.kernels if kernel.flop] == [2 * product, 5 * product]

def test_a_step_has_the_flop_of_torchs_counter_and_of_attention():
    """A real step of the tiny model, on the CPU. With micro-batches the encoders run forward
    twice: 4/3 of their arithmetic."""
    s = replace(parse_settings(TINY), precision="bf16")
    kernels, pixels = predict.count_step(s)
    model = predict.VideoColBERT(replace(s, pretrained=None))
    batch = predict.random_batch(s, model, torch.device("cpu"))
    optimizer = predict.train.make_optimizer(model, s)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with FlopCounterMode(display=False) as real, KernelCounter() as counter:
        predict.train.training_step(model, optimizer, scaler, s, *batch)
    flop = sum(kernel.flop for kernel in kernels)
    assert sum(kernel.flop for kernel in counter.kernels) == flop
    # Before torch 2.15, its counter knows nothing of the CPU's attention.
    if predict.FLOP_FORMULAS.keys() == flop_registry.keys():
        assert flop == real.get_total_flops()
    else:
        assert real.get_total_flops() < flop < 1.1 * real.get_total_flops()
    assert pixels == batch[2].nbytes == 4 * 3 * 3 * 48 * 48
    in_parts, _ = predict.count_step(replace(s, micro_batch=2))
    assert sum(kernel.flop for kernel in in_parts) == pytest.approx(4 / 3 * flop, rel=0.02)
    assert len(in_parts) > 2 * len(kernels)

def test_a_made_up_cards_step_is_that_of_the_hand(monkeypatch):
    """100 FLOP/s of which half are reached, 10 and 5 bytes/s of which 0.5 are. Kernels: 200 FLOP
    take 4 s and 10 bytes 2 s, so 4; 50 FLOP take 1 s, 30 bytes 6, so 6; 60 bytes alone 12,
    compiled 3. Pixels: 5 bytes in 2 s."""
    monkeypatch.setattr(predict, "BYTES_SHARE", 0.5)
    monkeypatch.setattr(predict, "FUSED", 0.25)
    card, kernels = Card(100, 0.5, 10, 5, 0), [(200, 10), (50, 30), (0, 60)]
    assert step_seconds(card, kernels, 5) == pytest.approx(4 + 6 + 12 + 2)
    assert step_seconds(card, kernels, 5, compiled=True) == pytest.approx(4 + 6 + 3 + 2)
    # A host that needs 10 s a kernel is slower than the card: 3 kernels, compiled 2.25.
    monkeypatch.setattr(predict, "LAUNCH", 10)
    assert step_seconds(card, kernels, 5) == pytest.approx(30 + 2)
    assert step_seconds(card, kernels, 5, compiled=True) == pytest.approx(22.5 + 2)

def test_an_epoch_of_msrvtt_has_1406_steps():
    """180,000 captions, 128 a step; the last 32 are left out."""
    s = parse_settings(["--data", "msrvtt"])
    assert predict.msrvtt_steps(s) == 1406 == 180_000 // 128 and s.epochs == 5

def test_the_micro_batches_are_those_of_the_readme():
    readme = (FOLDER.parent / "README.md").read_text()
    for name, memory in (("T4", "16"), ("A5000", "24"), ("H100", "80")):
        cell = re.search(rf"\| {memory} GB \| (\w+) \|", readme)[1]
        assert cell == str(CARDS[name].fits or "all")

def test_results_md_has_the_predictions_of_todays_code():
    """Those of a step at once are counted again, which takes some ten seconds. For the rows with
    micro-batches, epoch and run must follow from the step."""
    results = (FOLDER / "RESULTS.md").read_text()
    s = parse_settings(["--data", "msrvtt"])
    at_once = {name: 0 for name, card in CARDS.items() if card.fits == 0}
    lines = predict.predictions(s, at_once)
    assert len(lines) == 2 + 2 + 3 + len(at_once)
    for line in lines:
        assert line in results, line
    for name, card in CARDS.items():
        row = re.search(rf"\| {name}, {card.fits or 'none'} \|.*\|", results)[0]
        step, step_compiled, epoch, epoch_compiled, run, run_compiled = map(
            float, re.findall(r"[\d.]+(?= /| ms| min| h)", row))
        assert epoch == pytest.approx(1406 * step / 60_000, abs=0.06, rel=0.005)
        assert epoch_compiled == pytest.approx(1406 * step_compiled / 60_000, abs=0.06, rel=0.005)
        assert run == pytest.approx(7030 * step / 3.6e6, abs=0.006, rel=0.005)
        assert run_compiled == pytest.approx(7030 * step_compiled / 3.6e6, abs=0.006, rel=0.005)
