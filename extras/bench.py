"""Speed and memory on this machine, without weights or downloads.

    python -m extras.bench               the paper's sizes; on a CPU add --batch-size 4
    python -m extras.bench --memory      what training each of the paper's backbones takes
    python -m extras.bench --long-video  12 frames of an hour of 720p, against decoding it all

The first takes train.py's flags, too. Its clips are those of --data if they are there, else
synthetic. Calls that are compared take turns, so that a busy machine is equally busy for all
of them: trust the ratios. With `pip install decord`, decoding is compared with it. Beside a
step's time stands what it should take on some cards (extras/predict.py).
"""
import argparse
import io
import math
import tempfile
import time
from dataclasses import replace

import av
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

import train
from extras.long_videos import seek_frames
from extras.memory import bench_memory, extra_megabytes, random_batch
from extras.predict import CARDS, predictions
from extras.shapes import draw_clip
from train import (
    Clip, autocast, cached_frames, load_frames, parse_settings, pick_device, run_main)
from video_colbert import (
    InputError, VideoColBERT, frame_times, frames_at, mean_max_sim, mms_fv, sample_frames,
    sample_seconds, sample_times)

try:
    import decord
except ImportError:
    decord = None

CPU = torch.device("cpu")

def median_seconds(device, *calls, repeat=5):
    """Median time of each call. They take turns; the first turn warms up."""
    times = [[] for _ in calls]
    for turn in range(repeat + 1):
        for call, record in zip(calls, times):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            record.append(time.perf_counter() - start)
    return [sorted(record[1:])[repeat // 2] for record in times]

def unit_vectors(device, *shape):
    return normalize(torch.randn(*shape, device=device), dim=-1)

# ---- Speed
def plain_product(Q, V):
    """The arithmetic of MeanMaxSim's similarities, as one matrix product."""
    return Q.flatten(0, 1) @ V.flatten(0, 1).T

def transposed_mean_max_sim(Q, V):
    """MeanMaxSim as it was here before (commit 3cf674f): frames come first, because reducing
    that axis is faster, and without gradients it goes through the queries in pieces."""
    A, M, d = Q.shape
    B, N, _ = V.shape
    frames = V.transpose(0, 1).flatten(0, 1)  # (N B, d)
    size = A if torch.is_grad_enabled() else max(1, 2 ** 23 // (M * N * B))
    pieces = []
    for q in Q.split(size):
        sim = q.flatten(0, 1) @ frames.T  # (a M, N B)
        best = sim.view(len(q) * M, N, B).amax(dim=1)  # (a M, B)
        weight = torch.full((len(q), 1, M), 1 / M, device=q.device)
        pieces.append((weight @ best.view(len(q), M, B)).squeeze(1))  # (a, B)
    return torch.cat(pieces)

def bench_scores(device, sizes=((128, 128), (32, 1000))):
    """MeanMaxSim on a training batch and on a part of an evaluation, against a plain product
    and the form before."""
    lines = []
    for A, B in sizes:
        Q = unit_vectors(device, A, 32, 512).requires_grad_()
        V = unit_vectors(device, B, 14, 512).requires_grad_()
        lines.append(f"MeanMaxSim of {A} queries x 32 tokens and {B} videos x 14 frames, d = 512")

        def forward(form):
            with torch.no_grad():
                form(Q, V)

        def both(form):
            torch.autograd.grad(form(Q, V).sum(), (Q, V))

        for name, measured in (("forward", forward), ("forward and backward", both)):
            mean_max_sim(Q[:2], V)  # now BLAS has its buffers
            peak = extra_megabytes(device, lambda: measured(mean_max_sim))
            ours, plain, before = median_seconds(
                device, lambda: measured(mean_max_sim), lambda: measured(plain_product),
                lambda: measured(transposed_mean_max_sim), repeat=9)
            lines.append(f"  {name}: {ours / plain:.2f} of one plain product "
                         f"({1000 * plain:.1f} ms), {ours / before:.2f} of the transposed "
                         f"form; peak memory {peak:.0f} MB")
    return lines

def some_clips(s, folder, count=32):
    """-> clips of --data, or synthetic ones that are written to `folder`; their name."""
    try:
        return train.load_clips(s)["train"][:count], s.data
    except InputError:
        clips = [Clip(f"{folder}/{i}.mp4", ["a caption"]) for i in range(count)]
    for i, clip in enumerate(clips):
        draw_clip(clip.path, "red", "square", "blue", "grows", np.random.default_rng(i))
    return clips, "synthetic"

def decord_frames(path, num_frames, size, start=0.0, end=None):
    """Our frames, as decord reads them, if their rate is constant."""
    reader = decord.VideoReader(path, width=size, height=size, num_threads=1)
    rate = reader.get_avg_fps()
    length = len(reader) / rate  # in seconds
    middles = sample_seconds(num_frames, start, min(end or length, length))
    return reader.get_batch((middles * rate).astype(int)).asnumpy()

def to_jpegs(frames):
    """uint8 (N, 3, size, size) -> N files in memory."""
    files = [io.BytesIO() for _ in frames]
    for frame, file in zip(frames, files):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
    return files

def bench_clips(s, size, device):
    """Decoding against reading from the cache, as JPEG, or with decord; clip by clip in
    turn, in one thread. Then a whole batch, from the cache and to the device."""
    N, times, jpeg_bytes = s.num_frames, [], 0
    with tempfile.TemporaryDirectory() as folder:
        clips, source = some_clips(s, folder)
        for clip in clips:
            part = clip.start, clip.end
            jpegs = to_jpegs(sample_frames(clip.path, N, size, *part))
            jpeg_bytes += sum(len(file.getvalue()) for file in jpegs)
            calls = [lambda: sample_frames(clip.path, N, size, *part),
                     lambda: cached_frames(clip, N, size, folder),
                     lambda: [np.asarray(Image.open(file)) for file in jpegs]]
            if decord and size % 32 == 0:  # it fails on other sizes
                calls.append(lambda: decord_frames(clip.path, N, size, *part))
            times.append(median_seconds(CPU, *calls, repeat=3))
        batch_line = bench_loader(clips, replace(s, cache=folder), size, device)

    decode, cache, jpeg, *other = np.mean(times, axis=0)
    megabytes, jpeg_megabytes = N * 3 * size ** 2 / 1e6, jpeg_bytes / len(clips) / 1e6
    line = (f"{source} clips, {N} frames of {size} pixels, one thread: decode "
            f"{1000 * decode:.2f} ms, cache {decode / cache:.0f} times faster "
            f"({megabytes:.2f} MB), JPEG in memory {decode / jpeg:.0f} times "
            f"({jpeg_megabytes:.2f} MB)")
    if other:
        line += f"; decode {decode / other[0]:.2f} of decord's time"
    return [line, batch_line]

def bench_loader(clips, s, size, device):
    """A batch of clips that are in the cache, again and again the same if they are few."""
    batch = [clips[i % len(clips)] for i in range(s.batch_size)]
    frames = load_frames(batch, s, size)
    load, = median_seconds(CPU, lambda: load_frames(batch, s, size))
    line = (f"batch of {len(batch)} clips, {frames.nbytes / 1e6:.0f} MB: {1000 * load:.1f} ms "
            "from the cache in one of --workers threads; ")
    if device.type == "cpu":
        return line + "no copy, the step is on the CPU"
    copy, = median_seconds(device, lambda: frames.to(device, non_blocking=True))
    return line + f"{1000 * copy:.1f} ms to the device, {frames.nbytes / copy / 1e9:.1f} GB/s"

def bench_step(s, model, device):
    """Where the time of a training step goes."""
    batch = random_batch(s, model, device)
    ids, mask, frames, positives = batch
    A, backbone = len(ids), model.backbone
    optimizer = train.make_optimizer(model, s)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the weights stay as they are
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def scale_pixels():
        return frames.flatten(0, 1).float().sub_(model.mean).div_(model.std)

    def backward(module, *inputs):
        with autocast(device, s.precision):
            out = module(*inputs)
        out.sum().backward()

    def only_loss():
        q, f, v = [x.detach().requires_grad_() for x in (Q, F, V)]
        model.compute_loss(q, mask, f, v, positives)[0].backward()

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)
        optimizer.step()

    def step(micro_batch=s.micro_batch):
        settings = replace(s, micro_batch=micro_batch)
        train.training_step(model, optimizer, scaler, settings, *batch)

    with torch.no_grad(), autocast(device, s.precision):
        images, Q = scale_pixels(), model.encode_query(ids)
        F, V = model.encode_video(frames)
    with FlopCounterMode(display=False) as counter:
        with autocast(device, s.precision):
            loss = model(ids, mask, frames, positives)[0]
        loss.backward()
    if s.compile:
        for module in (backbone.visual, backbone.text.transformer, model.temporal):
            module.compile()

    start = time.perf_counter()
    peak = extra_megabytes(device, step)
    first = time.perf_counter() - start
    quarter = math.ceil(s.batch_size / 4)
    parts = {"image encoder": lambda: backward(backbone.visual, images),
             "text encoder": lambda: backward(model.encode_query, ids),
             "pixels": scale_pixels,
             "temporal transformer": lambda: backward(model.temporal, F),
             "loss": only_loss,
             "clipping and optimizer": update}
    calls = [*parts.values(), step]
    if not s.compile:  # a micro-batch has other shapes, which would be compiled too
        calls.append(lambda: step(quarter))
    repeat = 9 if device.type == "cuda" else 3
    seconds = median_seconds(device, *calls, repeat=repeat)
    whole = seconds[len(parts)]

    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    flops = counter.get_total_flops() / whole
    line = (f"step of {s.batch_size} videos x {s.num_frames} frames, {A} captions, "
            f"{s.backbone}: {1000 * whole:.1f} ms, {A / whole:.1f} pairs/s, "
            f"{flops / 1e12:.2f} TFLOP/s")
    for name, card in CARDS.items():
        line += f" ({100 * flops / card.flops:.0f}% of {name}'s peak)" if name in gpu else ""
    lines = [f"{line}, {peak:.0f} MB"]
    for name, part in zip(parts, seconds):
        lines.append(f"  {name:24}{1000 * part:10.1f} ms {100 * part / whole:6.1f}%")
    if not s.compile:
        lines.append(f"  with --micro-batch {quarter}: {seconds[-1] / whole:.2f} of the time")
    rest = sum(seconds[2:len(parts)])
    lines.append(f"  all but the two encoders {100 * rest / whole:.1f}%")
    if s.compile:
        lines.append(f"  the first step took {first:.1f} s, compiling included")
    lines.append("  900,000 pairs, five epochs of MSR-VTT, would take "
                 f"{900_000 * whole / A / 3600:.2f} h")
    return lines

@torch.no_grad()
def bench_query(s, model, device, gallery=1000):
    """How long a user waits for the ten best of a gallery, and how much of it is encoding."""
    N, E = s.num_frames, s.visual_expansion
    F = unit_vectors(device, gallery, N, model.width)
    V = unit_vectors(device, gallery, N + E, model.width)
    ids = torch.randint(2, 30000, (1, model.num_tokens), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def encode():
        with autocast(device, s.precision):
            return model.encode_query(ids)

    def answer():
        scores = mms_fv(*model.similarities(encode(), mask, F, V))
        return scores.topk(min(10, gallery)).indices.tolist()

    model.eval()
    encoder, whole = median_seconds(device, encode, answer, repeat=9)
    return [f"query against {gallery} videos: {1000 * whole:.1f} ms, of which the text encoder "
            f"{1000 * encoder:.1f} ms"]

# ---- Long videos
def write_long_video(path, minutes, size=(1280, 720)):
    """A minute of moving noise in H.264, again and again."""
    noise = np.random.default_rng(0).integers(0, 256, (110, 180, 3), dtype=np.uint8)
    noise = noise.repeat(8, axis=0).repeat(8, axis=1)
    options, minute = {"preset": "fast", "crf": "28"}, io.BytesIO()
    with av.open(minute, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for i in range(60 * 25):
            picture = noise[i // 3 % 150:, i % 150:][:size[1], :size[0]]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    # The packets of the minute, copied with later and later times.
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
    """Seeking to 12 frames, and decoding all between the first and the last of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/long.mp4"
        write_long_video(path, minutes)
        times = frame_times(path)
        wanted = sample_times(path, times, 12)
        demux, seek, decode = median_seconds(
            CPU, lambda: frame_times(path), lambda: seek_frames(path, times, wanted, 224),
            lambda: frames_at(path, times, wanted, 224), repeat=1)
    return [f"12 frames of {minutes} minutes of 720p H.264: {demux:.2f} s to read the frames' "
            f"times, and {seek:.2f} s to seek to the frames, which is {seek / decode:.3f} of the "
            f"{decode:.2f} s that decoding all between them takes"]

# ---- Command line
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    stops = parser.add_mutually_exclusive_group()
    stops.add_argument("--memory", action="store_true", help="what training takes, and stop")
    stops.add_argument("--long-video", action="store_true", help="12 frames of an hour, and stop")
    args, argv = parser.parse_known_args(argv)
    s = parse_settings(["--data", "msrvtt", *argv])
    main_experiment = parse_settings(["--data", "msrvtt", "--device", s.device])
    if (args.memory or args.long_video) and s != main_experiment:
        parser.error("--memory and --long-video take no other flags but --device")
    device = pick_device(s.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.memory:
        print(*bench_memory(device), sep="\n")
    elif args.long_video:
        print(*bench_long_video(), sep="\n")
    else:
        print(*bench_scores(device), sep="\n")
        model = VideoColBERT(replace(s, pretrained=None)).to(device)
        print(*bench_clips(s, model.image_size, device), *bench_step(s, model, device),
              *predictions(s, dict.fromkeys(CARDS, s.micro_batch)),
              *bench_query(s, model, device), sep="\n")

if __name__ == "__main__":
    run_main(main, "extras.bench")
