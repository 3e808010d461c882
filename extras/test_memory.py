"""Saved activations are counted right, and what fits a card follows from them."""
import math
import re

import pytest
import torch
from torch import nn

from extras import memory
from train import parse_settings
from video_colbert import VideoColBERT

CPU = torch.device("cpu")

def test_saved_bytes_count_each_storage_once_and_no_parameters():
    """A linear layer saves its input, 5 x 3 numbers of four bytes, and a ReLU its output, 5 x 4,
    which it shares with the second linear layer."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    assert memory.saved_bytes(lambda: model(x), model) == 4 * (5 * 3 + 5 * 4)

def test_bytes_per_item_tell_the_batch_from_the_weights():
    """Per row, in bf16: the input, 3 numbers, and the ReLU's output, 4. Once: the copies of two
    weights, and no bias. A layer norm before it saves 3 numbers, mean and deviation in float32."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    def rows(count):
        return [torch.randn(count, 3)]
    assert memory.bytes_per_item(model, model, rows) == (2 * (3 + 4), 2 * 4 * 2)
    model = nn.Sequential(nn.LayerNorm(3), *model)
    per_row, _ = memory.bytes_per_item(
        model, model, lambda count: [torch.randn(count, 3, dtype=torch.bfloat16)])
    assert per_row == 4 * (3 + 2) + 2 * (3 + 4)

@pytest.mark.parametrize("num_frames", [4, 12])
def test_a_videos_activations_are_those_of_the_whole_encoder(num_frames):
    """Frames and temporal transformer, counted apart, are what encode_video saves for one more
    video: to a tenth, for a tiny model's normalised outputs are not nothing."""
    model = VideoColBERT(parse_settings(["--backbone", "tiny", "--num-frames", "12"]))
    per_video, per_caption, _ = memory.activation_bytes(model, num_frames)
    whole, _ = memory.bytes_per_item(model.encode_video, model, lambda count: [
        torch.zeros(count, num_frames, 3, 48, 48, dtype=torch.uint8)])
    assert 0.9 * whole < per_video <= whole and per_caption > 0

def test_memory_is_told_for_each_backbone_and_number_of_videos(monkeypatch):
    monkeypatch.setattr(memory, "PAPER_BACKBONES", ("tiny",))
    monkeypatch.setattr(memory, "CARDS", (0.05, 0.2, 5))
    lines = memory.bench_memory(CPU, batch=16, micro_batches=(16, 4))
    assert len(lines) == 1 + 2 * (1 + 2 + 3)
    assert lines[1].startswith("tiny, 12 frames") and lines[7].startswith("tiny, 64 frames")
    assert re.match(r"  --micro-batch  16: +\d+\.\d GB; fits a card of .*5 GB", lines[2])

def test_the_cards_that_a_step_fits_follow_from_its_bytes(monkeypatch):
    """Weights and gradients are 1 GB, activations 0.1 GB per video and caption: a micro-batch of 8
    takes a little more than 1.8 GB, one of 128 a little more than 13.8."""
    class Model:
        image_size = 1
        def parameters(self):
            return [torch.empty(62_500_000, device="meta", requires_grad=True)]
    monkeypatch.setattr(memory, "PAPER_BACKBONES", ("ViT-B-32-quickgelu",))
    monkeypatch.setattr(memory, "VideoColBERT", lambda s: Model())
    monkeypatch.setattr(memory, "activation_bytes", lambda model, frames: (99e6, 1e6, 0))
    lines = memory.bench_memory(CPU)
    assert lines[2:5] == ["  --micro-batch 128:   13.8 GB; fits a card of 24 80 GB",
                          "  --micro-batch  32:    4.2 GB; fits a card of 16 24 80 GB",
                          "  --micro-batch   8:    1.8 GB; fits a card of 16 24 80 GB"]
    assert lines[5:8] == ["  16 GB: --micro-batch 64", "  24 GB: --micro-batch 128",
                          "  80 GB: --micro-batch 128"]
    monkeypatch.setattr(memory, "activation_bytes", lambda model, frames: (150e6, 10e6, 0))
    assert memory.bench_memory(CPU)[5] == "  16 GB: --micro-batch 64"  # 12.6 GB / 0.16 GB is 78
    assert memory.bench_memory(CPU)[2] == "  --micro-batch 128:   21.5 GB; fits a card of 80 GB"
    monkeypatch.setattr(memory, "activation_bytes", lambda model, frames: (900e6, 0, 0))
    lines = memory.bench_memory(CPU)
    assert lines[2] == "  --micro-batch 128:  116.2 GB; fits none of the cards"
    assert lines[5:8] == ["  16 GB: --micro-batch 8", "  24 GB: --micro-batch 16",
                          "  80 GB: --micro-batch 64"]

def test_the_measured_peak_is_of_two_training_steps(monkeypatch):
    """Each passes twice over micro-batches of 2, 2 and 1 videos. What does not fit on the GPU is
    NaN, not an error."""
    encode_video, sizes = VideoColBERT.encode_video, []
    def note_and_encode(model, frames):
        sizes.append(len(frames))
        return encode_video(model, frames)
    def run_and_say_one_megabyte(device, call):
        call()
        return 1.0
    s = parse_settings(["--backbone", "tiny", "--data", "msrvtt", "--batch-size", "5",
                        "--micro-batch", "2"])
    with monkeypatch.context() as patch:
        patch.setattr(VideoColBERT, "encode_video", note_and_encode)
        patch.setattr(memory, "extra_megabytes", run_and_say_one_megabyte)
        assert memory.measured_peak(s, CPU) == 2 ** 20 and sizes == [2, 2, 1] * 4
    def does_not_fit(device, call):
        raise torch.cuda.OutOfMemoryError
    monkeypatch.setattr(memory, "extra_megabytes", does_not_fit)
    assert math.isnan(memory.measured_peak(s, CPU))
