"""The benchmark measures every part, and compares like with like."""
import re

import av
import pytest
import torch

from extras import bench, cost
from test_video_colbert import write_clip
from video_colbert import frame_times, mean_max_sim, sample_frames

CPU = torch.device("cpu")

def test_the_benchmark_measures_every_part_without_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scores, median_seconds = bench.bench_scores, bench.median_seconds
    def one_turn(*args, repeat=1):
        return median_seconds(*args, repeat=1)
    monkeypatch.setattr(bench, "median_seconds", one_turn)
    monkeypatch.setattr(bench, "bench_scores", lambda device: scores(device, ((9, 20),)))
    bench.main(["--backbone", "tiny", "--batch-size", "2", "--num-frames", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    for part in ("MeanMaxSim of 9 queries", "of one plain product", "transposed form", "backward",
                 "peak memory", "synthetic", "decode", "cache", "JPEG", "image encoder",
                 "text encoder", "temporal transformer", "loss", "optimizer", "pairs/s", "TFLOP/s",
                 "all but the two encoders", "query against 1000 videos", "batch of 2 clips",
                 "from the cache", "no copy", "Computed, not measured", "| H100, none |"):
        assert part in out, part
    assert "of decord's time" not in out  # pictures of 48 pixels are not for decord

@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_parts_queries_and_table_11_are_measured_in_the_precision_of_the_step(
        monkeypatch, precision, dtype):
    """Each call that is timed, by the precision of a matrix product in the encoders."""
    s = bench.parse_settings(["--backbone", "tiny", "--batch-size", "2", "--num-frames", "2",
                              "--precision", precision, "--workers", "1"])
    model, dtypes = bench.VideoColBERT(s), set()
    def once(device, *calls, repeat=1):
        for call in calls:
            call()
        return [1.0] * len(calls)
    def noted(module, inputs, output):
        if isinstance(module, torch.nn.Linear):
            dtypes.add(output.dtype)
    monkeypatch.setattr(bench, "median_seconds", once)
    monkeypatch.setattr(cost, "median_seconds", once)
    hook = torch.nn.modules.module.register_module_forward_hook(noted)
    try:
        for measure in (lambda: bench.bench_step(s, model, CPU),
                        lambda: bench.bench_query(s, model, CPU),
                        lambda: cost.cost_table(s, CPU)):
            dtypes.clear()
            measure()
            assert dtypes == {dtype}
    finally:
        hook.remove()

@pytest.mark.parametrize("grad", [True, False])
def test_the_form_before_gives_the_same_scores_and_gradients(monkeypatch, grad):
    """Also in pieces of a few queries."""
    Q, V = bench.unit_vectors(CPU, 700, 32, 8), bench.unit_vectors(CPU, 40, 14, 8)
    Q.requires_grad_(grad), V.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        ours, before = mean_max_sim(Q, V), bench.transposed_mean_max_sim(Q, V)
    assert torch.allclose(ours, before, atol=1e-6)
    if grad:
        weight = torch.randn_like(ours)
        ours = torch.autograd.grad((ours * weight).sum(), (Q, V))
        before = torch.autograd.grad((before * weight).sum(), (Q, V))
        for a, b in zip(ours, before):
            assert torch.allclose(a, b, atol=1e-5)

def test_decord_and_we_read_the_same_frames(tmp_path):
    pytest.importorskip("decord")
    clips, _ = bench.some_clips(bench.parse_settings(["--data", "msrvtt"]), tmp_path, 1)
    ours = sample_frames(clips[0].path, 4, 64).permute(0, 2, 3, 1).float()
    theirs = torch.from_numpy(bench.decord_frames(clips[0].path, 4, 64)).float()
    assert (ours - theirs).abs().mean() < 5
    assert (ours[:-1] - theirs[1:]).abs().mean() > 5

def test_decoding_is_measured_on_the_part_that_a_clip_is(tmp_path, monkeypatch):
    """As it is read for the cache, and by decord."""
    write_clip(tmp_path / "a.mp4", 20, rate=5)
    clip = bench.Clip(str(tmp_path / "a.mp4"), ["a"], 1.0, 3.0)
    monkeypatch.setattr(bench, "some_clips", lambda *args: ([clip], "some"))
    asked, sample = [], bench.sample_frames
    def noted(*args):
        asked.append(args[3:])
        return sample(*args)
    monkeypatch.setattr(bench, "sample_frames", noted)
    by_decord, decord_frames = set(), bench.decord_frames
    def noted_by_decord(*args):
        by_decord.add(args[3:])
        return decord_frames(*args)
    monkeypatch.setattr(bench, "decord_frames", noted_by_decord)
    s = bench.parse_settings(["--backbone", "tiny", "--batch-size", "1", "--num-frames", "4"])
    bench.bench_clips(s, 64, CPU)
    assert set(asked) == {(1.0, 3.0)}
    if bench.decord:
        assert by_decord == {(1.0, 3.0)}
        ours = sample(clip.path, 4, 64, 1.0, 3.0).permute(0, 2, 3, 1).float()
        theirs = decord_frames(clip.path, 4, 64, 1.0, 3.0)
        assert (ours - torch.from_numpy(theirs).float()).abs().mean() < 5
        ours = sample(clip.path, 4, 64, 1.0, 99.0).permute(0, 2, 3, 1).float()
        theirs = decord_frames(clip.path, 4, 64, 1.0, 99.0)  # the end is the video's
        assert (ours - torch.from_numpy(theirs).float()).abs().mean() < 5

@pytest.mark.parametrize("compiles", [False, True])
def test_the_lines_of_a_step_have_the_times_that_were_measured(monkeypatch, compiles):
    """Six parts take 1 to 6 s, a step 10 s, and a step with micro-batches 25 s. With --compile,
    the last is not measured, because other shapes would have to be compiled first."""
    counts, compiled = [], []
    def measured(device, *calls, repeat):
        counts.append(len(calls))
        return [1, 2, 3, 4, 5, 6, 10, 25][:len(calls)]
    monkeypatch.setattr(bench, "median_seconds", measured)
    def compile_module(module):
        compiled.append(module)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    flags = ["--backbone", "tiny", "--batch-size", "8", "--num-frames", "2"]
    s = bench.parse_settings(["--data", "msrvtt", *flags, *["--compile"] * compiles])
    text = "\n".join(bench.bench_step(s, bench.VideoColBERT(s), CPU))
    assert "tiny: 10000.0 ms, 0.8 pairs/s" in text
    assert re.search(r"\n  loss +5000\.0 ms +50\.0%\n", text)
    assert "all but the two encoders 180.0%" in text
    assert "would take 312.50 h" in text  # 112,500 steps of 8 pairs
    assert ("--micro-batch 2: 2.50 of the time" in text) == (not compiles)
    assert ("the first step took" in text) == compiles
    assert counts == [8 - compiles] and len(compiled) == 3 * compiles

def test_calls_take_turns_and_the_first_turn_does_not_count(monkeypatch):
    """A clock that only the calls advance: the median of 1, 2, 3 seconds, and of 10, 20, 30."""
    now, turns = [0], []
    def advance(name, durations):
        turns.append(name)
        now[0] += next(durations)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    a, b = iter([0, 3, 1, 2]), iter([0, 10, 30, 20])
    medians = bench.median_seconds(CPU, lambda: advance("a", a), lambda: advance("b", b), repeat=3)
    assert medians == [2, 20] and turns == ["a", "b"] * 4

def test_a_long_video_is_as_long_as_it_should_be_and_both_ways_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.write_long_video, "__defaults__", ((64, 48),))
    bench.write_long_video(tmp_path / "a.mp4", 3)
    ticks, end, tick, _ = frame_times(tmp_path / "a.mp4")
    assert len(ticks) == 3 * 60 * 25 and end * tick == pytest.approx(180)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) >= 18
    frames = sample_frames(tmp_path / "a.mp4", 6, 32).float()
    assert (frames[:2] - frames[2:4]).abs().mean() < 1            # the same minute again
    line, = bench.bench_long_video(2)
    pattern = r"12 frames of 2 minutes of .*: \d+\.\d+ s .* is \d\.\d+ of the \d+\.\d+ s "
    assert re.match(pattern, line)
