"""The benchmark measures every part; saved activations are counted right."""
import torch
from torch import nn

from extras import bench

def test_the_benchmark_measures_every_part_without_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scores, median_seconds = bench.bench_scores, bench.median_seconds
    def one_turn(*args, repeat=1):
        return median_seconds(*args, repeat=1)
    monkeypatch.setattr(bench, "median_seconds", one_turn)
    monkeypatch.setattr(bench, "bench_scores", lambda device: scores(device, 50, 50))
    bench.main(["--backbone", "tiny", "--batch-size", "2", "--num-frames", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    for part in ("MeanMaxSim", "einsum", "decode", "cache", "JPEG", "image encoder", "text encoder",
                 "temporal transformer", "loss", "optimiser", "pairs/s", "TFLOP/s", "synthetic"):
        assert part in out, part

def test_saved_bytes_count_each_storage_once_and_no_parameters():
    """A linear layer saves its input, 5 x 3 numbers of four bytes, and a ReLU its output, 5 x 4,
    which it shares with the second linear layer."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    assert bench.saved_bytes(lambda: model(x), model) == 4 * (5 * 3 + 5 * 4)

def test_memory_is_told_for_each_backbone(monkeypatch):
    monkeypatch.setattr(bench, "PAPER_BACKBONES", ("tiny",))
    lines = bench.bench_memory(torch.device("cpu"))
    assert len(lines) == 2 and "12 frames" in lines[0] and lines[0].endswith("fits 16, 24, 80 GB")
