"""Frames of video files: odd, damaged and mutated ones, and seeking against linear decoding."""
import faulthandler
import os
import re
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter

import video_colbert
from extras.long_videos import sample_long_video, seek_frames
from extras.test_core import mutate
from test_video_colbert import frame_numbers, write_clip
from video_colbert import VideoError, frame_times, frames_at, sample_frames, sample_times

# ---- Containers, times and display matrices
@pytest.mark.parametrize("name, codec", [
    ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mpg", "mpeg1video"), ("a.ts", "libx264"),
    ("a.h264", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mov", "mpeg4"), ("a.3gp", "mpeg4")])
def test_sample_frames_reads_the_containers_of_the_datasets(tmp_path, name, codec):
    path = write_clip(tmp_path / name, codec=codec, rate=25)
    assert frame_numbers(path, 5) == [2, 6, 10, 14, 18]

def test_sample_frames_samples_a_variable_frame_rate_in_time(tmp_path):
    """Frame 2 is on screen from 0.2 to 1.2 of 2.0 seconds, so those segments see it."""
    times = [0, 1, 2, 12, 13, 14, 15, 16, 17, 18, 19]
    path = write_clip(tmp_path / "a.mkv", 11, times=times)
    assert frame_numbers(path, 10) == [1, 2, 2, 2, 2, 2, 4, 6, 8, 10]

def set_display_matrix(path, a, b, c, d):
    content = path.read_bytes()
    at = content.index(b"tkhd") + 4 + 40  # where a track's matrix is
    numbers = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    matrix = b"".join(x.to_bytes(4, "big", signed=True) for x in numbers)
    path.write_bytes(content[:at] + matrix + content[at + 36:])

@pytest.mark.parametrize("matrix, quarter", [
    ((1, 0, 0, 1), (0, 0)), ((0, 1, -1, 0), (0, 1)), ((-1, 0, 0, -1), (1, 1)),
    ((0, -1, 1, 0), (1, 0)), ((-1, 0, 0, 1), (0, 1)), ((1, 0, 0, -1), (1, 0)),
    ((0, 1, 1, 0), (0, 0)), ((0, -1, -1, 0), (1, 1))])
def test_sample_frames_turns_and_mirrors_the_frames_as_the_file_says(tmp_path, matrix, quarter):
    """A white quarter, top left, lands where a player shows it: turned clockwise by 0, 90, 180
    and 270 degrees, mirrored sideways, upside down and along the diagonals."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32] = 255
    path = write_clip(tmp_path / "a.mp4", 3, (64, 64), picture=picture)
    set_display_matrix(path, *matrix)
    frame = sample_frames(path, 1, 64)[0].float().mean(0)
    brightness = frame.view(2, 32, 2, 32).mean((1, 3))
    assert divmod(brightness.argmax().item(), 2) == quarter

def test_a_display_matrix_of_zeros_turns_nothing(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :16] = 255
    path = write_clip(tmp_path / "a.mp4", 3, (64, 64), picture=picture)
    upright = sample_frames(path, 1, 64)
    set_display_matrix(path, 0, 0, 0, 0)
    assert torch.equal(sample_frames(path, 1, 64), upright)

@pytest.mark.parametrize("size", [(98, 34), (33, 65), (176, 144), (2, 2)])
def test_sample_frames_takes_odd_sizes_without_keeping_the_aspect_ratio(tmp_path, size):
    codec = "libx264" if size[0] % 2 == 0 else "ffv1"
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    picture[:, size[0] // 2:, 0] = 255  # the right half is red
    path = write_clip(tmp_path / "a.mkv", 4, size, codec, picture=picture)
    halves = sample_frames(path, 2, 32).float().mean(0).unflatten(-1, (2, 16)).mean((1, 3)).T
    if size != (2, 2):  # two pixels share one colour
        assert halves[1, 0] > 150 and halves[0, 0] < 60 and halves[1, 1:].max() < 60

def test_odd_arguments_mean_what_they_say_or_are_refused(tmp_path):
    path = write_clip(tmp_path / "a.mp4")
    whole = sample_frames(path, 4, 16)
    for end in (int("9" * 400), float("inf"), 2.0):
        assert torch.equal(sample_frames(path, 4, 16, 0.0, end), whole)
    for num_frames in (0, -1):
        with pytest.raises(VideoError, match=f"a.mp4: cannot take {num_frames} frames between"):
            sample_frames(path, num_frames, 16)
    for span in ((-5.0,), (-5.0, 1.0), (2.0,), (float("nan"),), (float("inf"),),
                 (int("9" * 400),), (1.0, 1.0), (1.0, 0.5), (0.0, float("nan"))):
        with pytest.raises(VideoError, match="a.mp4: cannot take 4 frames between"):
            sample_frames(path, 4, 16, *span)

# ---- Seeking: the pixels of decoding from the beginning, and fewer frames decoded
X264 = "keyint=24:bframes=3:scenecut=0"
X265 = "keyint=24:bframes=4:log-level=none"
OPEN = ":open-gop=1"
FORMATS = {  # name: codec, options
    "closed.mp4": ("libx264", {"x264-params": X264}),
    "open.mp4": ("libx264", {"x264-params": X264 + OPEN}),
    "open.mkv": ("libx264", {"x264-params": X264 + OPEN}),
    "variable.mkv": ("libx264", {"x264-params": X264}),
    "rotated.mp4": ("libx264", {"x264-params": X264}),
    "cut.mp4": ("libx264", {"x264-params": X264}),  # an edit list hides the first frames
    "pyramid.mp4": ("libx264", {"x264-params": "keyint=50:bframes=8:b-pyramid=normal:ref=4"}),
    "refresh.mp4": ("libx264", {"x264-params": "keyint=24:intra-refresh=1:bframes=0"}),
    "closed.ts": ("libx264", {"x264-params": X264}),
    "hevc.mp4": ("libx265", {"x265-params": X265 + OPEN}),
    "hevc.mkv": ("libx265", {"x265-params": X265 + OPEN}),
    "hevc.ts": ("libx265", {"x265-params": X265 + ":open-gop=0"}),
    "layers.mp4": ("libx265", {"x265-params": "keyint=24:temporal-layers=3:log-level=none"}),
    "vp8.webm": ("libvpx", {"g": "24", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9.webm": ("libvpx-vp9", {"g": "24", "deadline": "realtime", "cpu-used": "8"}),
    "av1.mp4": ("libsvtav1", {"g": "24", "preset": "10"}),
    "open.flv": ("libx264", {"x264-params": X264 + OPEN}),
    "mpeg4.mkv": ("mpeg4", {"g": "24", "bf": "2"}),
    "mpeg2.ts": ("mpeg2video", {"g": "24", "bf": "2"}),
    # Without exact times of each packet.
    "variable.avi": ("mpeg4", {}),
    "variable-open.avi": ("libx264", {"x264-params": X264 + OPEN}),
    "variable.wmv": ("wmv2", {}),
    "variable.gif": ("gif", {}),
    "mpeg4.avi": ("mpeg4", {"g": "24", "bf": "2"}),
    "open.avi": ("libx264", {"x264-params": X264 + OPEN}),
    "open.asf": ("libx264", {"x264-params": X264 + OPEN}),
    "mpeg2.asf": ("mpeg2video", {"g": "12", "bf": "2"}),
    "mpeg1.mpg": ("mpeg1video", {"g": "24", "bf": "2"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
    "wmv2.wmv": ("wmv2", {"g": "24"}),
    "raw.h264": ("libx264", {"x264-params": X264})}

def variable_waits(count):
    """How many frames of 25 a second pass between the frames of "variable" clips."""
    return np.random.default_rng(1).integers(1, 9, count)

def write_moving_clip(path, count=144):
    """Noise that moves, so that all frames differ and none can be guessed, 25 a second."""
    codec, options = FORMATS[path.name]
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    noise = noise.repeat(6, 0).repeat(6, 1)  # (240, 360, 3)
    waits = np.ones(count, int)
    if "variable" in path.name:
        waits = variable_waits(count)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        if codec == "gif":
            stream.pix_fmt = "rgb8"
        for k, pts in enumerate(np.cumsum(waits) - waits[0]):
            part = noise[k % 150:k % 150 + 64, k % 200:k % 200 + 96]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(part), "rgb24")
            frame.pts = int(pts)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if "rotated" in path.name:
        set_display_matrix(path, 0, 1, -1, 0)
    if "cut" in path.name:
        cut(path)
    return path

def cut(path):
    """From 2.4 seconds on, as `ffmpeg -ss 2.4 -c copy`: the packets from the keyframe at 1.92
    seconds on, and an edit list that hides the first 12 frames."""
    whole = path.rename(path.with_name("whole.mp4"))
    with av.open(str(whole)) as source, av.open(str(path), "w") as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        tick = stream.time_base
        for packet in source.demux(stream):
            if packet.size and packet.dts * tick >= 1.92 - 0.08 - 1e-9:
                packet.pts -= round(2.4 / tick)
                packet.dts -= round(2.4 / tick)
                packet.stream = copy
                container.mux(packet)

def decode_linearly(path, size=24):
    """All frames of a file in order, uint8 (size, size, 3)."""
    scaler = VideoReformatter()
    with av.open(str(path)) as container:
        return [video_colbert.upright_pixels(frame, size, scaler)
                for frame in container.decode(video=0)]

@pytest.mark.parametrize("name", FORMATS)
def test_seeking_gives_the_pixels_of_decoding_from_the_beginning(tmp_path, name):
    """Frame k is the k-th that comes out when everything is decoded; for whole videos and
    parts, as frames of a short video and, sought one by one, of a long one."""
    path = write_moving_clip(tmp_path / name)
    linear = decode_linearly(path)
    ticks, last, tick, _ = times = frame_times(path)
    seconds = (last - ticks[0]) * tick
    assert len(ticks) == len(linear)
    assert seconds == pytest.approx(len(ticks) / 25, abs=0.05) or "variable" in name

    rng = np.random.default_rng(0)
    spans = [(0.0, None)]
    for _ in range(5):
        start = rng.uniform(0, 0.95) * seconds
        spans.append((start, start + rng.uniform(0.05, 1) * seconds))
    for i, (start, end) in enumerate(spans):
        wanted = sample_times(path, times, [12, 1, 3, 40][i % 4], start, end)
        # Of two frames with one time, as MPEG streams may have, the later one is seen.
        want = np.stack([linear[k - 1] for k in np.searchsorted(ticks, wanted, "right")])
        long = times
        if times.pts_are_reliable:
            # As many ticks as an hour has.
            long = times._replace(times=np.repeat(ticks, 100_000 // len(ticks)))
        for got in (frames_at(path, times, wanted, 24), seek_frames(path, long, wanted, 24)):
            assert np.array_equal(got.permute(0, 2, 3, 1), want)

@pytest.mark.parametrize("name", [name for name in FORMATS if "variable" in name])
def test_frames_appear_when_the_file_says_in_every_format(tmp_path, name):
    """Also in AVI, WMV and GIF, where frames are not numbered at a constant rate. AVI stores
    times of decoding, which differ by the frames that are held back."""
    timing = frame_times(write_moving_clip(tmp_path / name))
    waits = variable_waits(144)
    seconds = (timing.times - timing.times[0]) * timing.tick
    error = 4 * 8 / 25 if name == "variable-open.avi" else 0.002
    assert seconds == pytest.approx((np.cumsum(waits) - waits[0]) / 25, abs=error)

@pytest.mark.parametrize("name", ["raw.h264", "mpeg2.mpg"])
def test_frames_without_usable_times_are_numbered_at_the_frame_rate(tmp_path, name):
    """No times at all, and two files joined into one, whose times start again."""
    path = write_moving_clip(tmp_path / name, 50)
    count = 50
    if name == "mpeg2.mpg":
        path.write_bytes(2 * path.read_bytes())
        count = len(decode_linearly(path))
        assert count > 90
    timing = frame_times(path)
    seconds = (timing.times - timing.times[0]) * timing.tick
    assert seconds == pytest.approx(np.arange(count) / 25)

@pytest.mark.parametrize("movflags", ["faststart", "frag_keyframe+empty_moov"])
@pytest.mark.parametrize("has_sound", [False, True])
def test_a_part_of_an_mp4_is_refused(tmp_path, movflags, has_sound):
    """As a download that was interrupted leaves it, with its index at the beginning. The part
    may end in a packet of sound. A part that ends between the packets of a fragment is not
    noticed, so here a fragment ends within one."""
    whole, path = write_moving_clip(tmp_path / "closed.mp4"), tmp_path / "a.mp4"
    with av.open(str(whole)) as source, av.open(
            str(path), "w", options={"movflags": movflags}) as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        if has_sound:
            sound = container.add_stream("aac", rate=16000)
            noise = np.random.default_rng(0).uniform(-1, 1, (90, 1, 1024)).astype(np.float32)
            for part in noise:
                frame = av.AudioFrame.from_ndarray(part, "fltp", "mono")
                frame.sample_rate = 16000
                container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                container.mux(packet)
    assert torch.equal(sample_frames(path, 4, 16), sample_frames(whole, 4, 16))
    content = path.read_bytes()
    sizes = np.linspace(0.4, 0.95, 12) * len(content)
    if "frag" in movflags:
        starts = [match.start() for match in re.finditer(b"moof", content)]
        sizes = np.array(starts[1:]) - 14  # the 4 bytes before "moof" belong to it
    assert len(sizes) > 4
    for size in sizes:
        path.write_bytes(content[:int(size)])
        with pytest.raises(VideoError, match="a.mp4: only a part of the file is there"):
            sample_frames(path, 4, 16)

def test_a_part_before_the_first_frame_that_can_be_decoded_gives_that_one(tmp_path):
    """The file was cut between keyframes, so its first 14 frames cannot be decoded."""
    whole, path = write_moving_clip(tmp_path / "closed.mp4"), tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        for packet in list(source.demux(stream))[10:]:
            if packet.size:
                packet.stream = copy
                container.mux(packet)
    (first,) = sample_frames(path, 1, 24, 0.0, 0.2)
    assert np.array_equal(first.permute(1, 2, 0), decode_linearly(path)[0])
    assert np.array_equal(decode_linearly(path)[0], decode_linearly(whole)[24])

@pytest.fixture
def decoded(monkeypatch):
    """The times of all frames that are decoded."""
    decoded, decode = [], video_colbert.decode
    def noted(path, start=None):
        for frame in decode(path, start):
            decoded.append(frame.pts)
            yield frame
    monkeypatch.setattr(video_colbert, "decode", noted)
    return decoded

def test_a_part_is_decoded_from_the_keyframe_before_it(tmp_path, decoded):
    """Frame 100 with a keyframe every 24 costs frames 96 to 101, besides the keyframe that is
    looked at first; frames 98, 103 and 108 cost 96 to 109."""
    path = write_moving_clip(tmp_path / "closed.mp4")
    ticks = list(frame_times(path).times)
    sample_frames(path, 1, 16, start=4.01, end=4.02)
    assert decoded == [ticks[96], *ticks[96:102]]
    decoded.clear()
    sample_frames(path, 3, 16, start=3.84, end=4.44)  # in the middle of 0.2 seconds each
    assert decoded == [ticks[96], *ticks[96:110]]

def test_a_few_frames_of_a_long_video_are_sought(tmp_path, decoded):
    """Three of 2,400 frames cost at most the 48 of two groups of pictures each, and are equal."""
    path = write_moving_clip(tmp_path / "open.mp4", 2400)
    linear = decode_linearly(path)
    times = frame_times(path)
    wanted = sample_times(path, times, 3)
    got = seek_frames(path, times, wanted, 24).permute(0, 2, 3, 1)
    assert len(decoded) <= 3 * (1 + 2 * 24)
    want = [linear[k] for k in np.searchsorted(times[0], wanted)]
    assert np.array_equal(got, np.stack(want))
    assert torch.equal(sample_long_video(path, 3, 24), sample_frames(path, 3, 24))

def test_neighbouring_frames_of_a_long_video_are_decoded_in_one_go(tmp_path, decoded):
    """Three frames of 0.6 seconds cost 14 frames, not three times as many."""
    path = write_moving_clip(tmp_path / "closed.mp4", 1600)
    times = frame_times(path)
    seek_frames(path, times, sample_times(path, times, 3, start=3.84, end=4.44), 16)
    ticks = list(times[0])
    assert decoded == [ticks[96], *ticks[96:110]]

def test_a_long_video_without_seeking_is_decoded_in_one_go(tmp_path, decoded):
    path = write_moving_clip(tmp_path / "mpeg4.avi", 1600)
    timing = frame_times(path)
    decoded.clear()
    seek_frames(path, timing, sample_times(path, timing, 3), 16)
    assert len(decoded) <= 1600

def test_a_late_part_of_a_transport_stream_is_not_decoded_from_the_beginning(tmp_path, decoded):
    """Some seconds before it are enough."""
    path = write_moving_clip(tmp_path / "closed.ts", 1500)
    sample_frames(path, 3, 16, start=55.0, end=57.0)
    assert len(decoded) < 400

def test_files_that_were_joined_are_one_video(tmp_path):
    """Their times start again in the middle, but the frames of both halves are seen."""
    one = write_moving_clip(tmp_path / "closed.ts")
    two = tmp_path / "two.ts"
    two.write_bytes(2 * one.read_bytes())
    linear, timing = decode_linearly(two), frame_times(two)
    assert len(timing.times) == len(linear) > 1.9 * 144
    seconds = (timing.end - timing.times[0]) * timing.tick
    assert seconds == pytest.approx(len(linear) / 25)
    want = np.stack([linear[int((i + 0.5) * len(linear) / 4)] for i in range(4)])
    assert np.array_equal(sample_frames(two, 4, 24).permute(0, 2, 3, 1), want)

def test_a_time_without_a_frame_shows_the_frame_before(tmp_path, monkeypatch):
    """Not every packet gives one, such as the pictures that MPEG-4 drops."""
    path = write_moving_clip(tmp_path / "closed.mp4", 10)
    linear, ticks = decode_linearly(path), list(frame_times(path).times)
    decode = video_colbert.decode
    def with_losses(path, start=None):
        for frame in decode(path, start):
            if ticks.index(frame.pts) not in (0, 3, 4, 8, 9):
                yield frame
    monkeypatch.setattr(video_colbert, "decode", with_losses)
    got = sample_frames(path, 10, 24).permute(0, 2, 3, 1)
    want = [linear[k] for k in (1, 1, 2, 2, 2, 5, 6, 7, 7, 7)]
    assert np.array_equal(got, np.stack(want))

def test_a_stream_that_begins_between_keyframes_shows_the_first_frame_that_there_is(tmp_path):
    """As a recording of television does: no frame before the next keyframe can be decoded."""
    path = write_moving_clip(tmp_path / "closed.ts")
    with av.open(str(path)) as container:
        at = [packet.pos for packet in container.demux(video=0)]
    content = path.read_bytes()
    path.write_bytes(content[:at[0]] + content[at[10]:])

    scaler = VideoReformatter()
    with av.open(str(path)) as container:
        shown = [(frame.pts, video_colbert.upright_pixels(frame, 24, scaler))
                 for frame in container.decode(video=0)]
    wanted = sample_times(path, frame_times(path), 40)
    assert wanted[0] < shown[0][0]
    got = sample_frames(path, 40, 24).permute(0, 2, 3, 1)
    for frame, time in zip(got, wanted):
        before = [pixels for pts, pixels in shown if pts <= time]
        assert np.array_equal(frame, before[-1] if before else shown[0][1])

# ---- What is no video
def encode_grey(container, stream, count):
    """Frame k has brightness 6 k + 8."""
    for k in range(count):
        grey = np.full((32, 32, 3), 6 * k + 8, np.uint8)
        frame = av.VideoFrame.from_ndarray(grey, "rgb24").reformat(format=stream.pix_fmt)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))

def write_sound(path, codec="aac", cover=None, frames=0):
    """Silence; with a picture as its cover, codec and pixel format; with a video."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream(codec, rate=16000)
        if frames:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        if cover:
            picture = container.add_stream(cover[0], rate=1)
            picture.width, picture.height, picture.pix_fmt = 32, 32, cover[1]
            picture.disposition = av.stream.Disposition.attached_pic.value  # av 17 wants a number
            encode_grey(container, picture, 1)
        if frames:
            encode_grey(container, stream, frames)
        for _ in range(30):
            silence = np.zeros((1, sound.codec_context.frame_size or 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, "fltp", "mono")
            frame.sample_rate = 16000
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))

def test_a_title_that_is_not_utf_8_is_no_obstacle(tmp_path):
    """As old cameras and editors write it."""
    path = write_clip(tmp_path / "a.mp4", 20)
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mp4"), "w") as target:
        target.metadata["title"] = "cafe XY"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    content = (tmp_path / "b.mp4").read_bytes()
    assert content.count(b"cafe XY") == 1
    (tmp_path / "b.mp4").write_bytes(content.replace(b"cafe XY", b"caf\xe9 \xff\xfe"))
    assert frame_numbers(tmp_path / "b.mp4", 4) == frame_numbers(path, 4)

@pytest.mark.parametrize("name, codec, cover", [
    ("a.mp3", "libmp3lame", ("mjpeg", "yuvj420p")), ("a.mp4", "aac", ("png", "rgb24"))])
def test_music_with_a_cover_is_no_video(tmp_path, name, codec, cover):
    write_sound(tmp_path / name, codec, cover)
    with av.open(str(tmp_path / name)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(VideoError, match=f"{name}: no video stream"):
        sample_frames(tmp_path / name, 4, 16)

def test_a_video_with_a_cover_shows_the_video(tmp_path):
    write_sound(tmp_path / "a.mp4", cover=("png", "rgb24"), frames=20)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(container.streams.video) == 2
    assert frame_numbers(tmp_path / "a.mp4", 4) == [2, 7, 12, 17]

@pytest.mark.parametrize("make, message", [
    (write_sound, "no video stream"), (Path.mkdir, "Is a directory"),
    (lambda p: p, "No such file"),
    (lambda p: p.symlink_to("nowhere"), "No such file"),
    (lambda p: p.write_bytes(b""), "Invalid data"),
    (lambda p: p.write_bytes(b"hello"), "Invalid data"),
    (lambda p: os.truncate(write_clip(p), 300), "Invalid data")])
def test_what_is_no_video_is_named_in_one_line(tmp_path, make, message):
    make(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=rf"a\.mp4: .*{message}") as error:
        sample_frames(tmp_path / "a.mp4", 4, 16)
    assert "\n" not in str(error.value)

def test_a_mistake_in_the_code_is_not_reported_as_a_broken_video(tmp_path, monkeypatch):
    def mistaken(frame, *args):
        return frame.no_such_method()
    monkeypatch.setattr(video_colbert, "upright_pixels", mistaken)
    with pytest.raises(AttributeError, match="no_such_method"):
        sample_frames(write_clip(tmp_path / "a.mp4"), 4, 16)

def test_300_mutated_videos_give_frames_or_one_clear_error(tmp_path):
    """Never a hang, a crash, another exception or a wrong shape. Both outcomes are frequent, so
    the faults are neither harmless nor fatal."""
    kinds = [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"),
             ("a.webm", "libvpx-vp9"), ("a.ts", "libx264"), ("a.mpg", "mpeg1video")]
    clips = [write_clip(tmp_path / name, 12, codec=codec, rate=25).read_bytes()
             for name, codec in kinds]
    outcomes = []
    faulthandler.dump_traceback_later(120, exit=True)
    for i in range(int(os.environ.get("MUTATIONS", 300))):
        path = tmp_path / f"m{kinds[i % 6][0]}"
        path.write_bytes(mutate(clips[i % 6], np.random.default_rng(i)))
        try:
            frames = sample_frames(path, 4, 16, 0.1 * (i % 3))
            assert frames.shape == (4, 3, 16, 16) and frames.dtype == torch.uint8
            outcomes.append("frames")
        except VideoError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            outcomes.append("error")
    faulthandler.cancel_dump_traceback_later()
    assert min(outcomes.count("frames"), outcomes.count("error")) > 50

def test_a_claimed_size_of_100000_pixels_allocates_nothing(tmp_path):
    path = tmp_path / "a.mkv"
    content = write_clip(path, 3, codec="rawvideo").read_bytes()
    for w, h in ((100_000, 100_000), (20_000, 20_000)):
        size = b"\xb0\x83" + w.to_bytes(3, "big") + b"\xba\x83" + h.to_bytes(3, "big")
        claim = content.replace(b"\xb0\x81\x30\xba\x81\x20", size)
        assert claim != content
        path.write_bytes(claim)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(VideoError, match="a.mkv: "):
            sample_frames(path, 4, 16)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB

@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads on Linux")
def test_16_workers_start_few_threads_of_their_own(tmp_path):
    """Codecs and scaling use the thread that calls them: 16 workers are at most 24 threads."""
    paths = [write_clip(tmp_path / f"{i}.mp4", 20, (320, 240)) for i in range(32)]
    # New threads are counted, because those of earlier tests may end meanwhile.
    before = set(os.listdir("/proc/self/task"))
    counts = []
    with ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(sample_frames, path, 12, 224) for path in paths * 2]
        while not all(job.done() for job in jobs):
            counts.append(len(set(os.listdir("/proc/self/task")) - before))
            time.sleep(0.001)
    assert 2 <= max(counts) <= 24
    assert all(job.result().shape == (12, 3, 224, 224) for job in jobs)
