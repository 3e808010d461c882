"""Synthetic clips: a coloured shape in a coloured frame, doing something. `python train.py` trains
on them when it is given no other data.

Half of the captions ("a red square in a blue frame") can be answered from any one frame, the other
half ("a red square moves left") only from the order of the frames: every clip's opposite, which
shows the same frames backwards, is in the gallery too.

    python -m extras.shapes FOLDER        writes FOLDER/clips.jsonl and FOLDER/videos
"""
import argparse
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import filelock
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

SHAPES = {"square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
          "triangle": [(0, -1.2), (1.2, 0.9), (-1.2, 0.9)],
          "bar": [(-1.6, -0.4), (1.6, -0.4), (1.6, 0.4), (-1.6, 0.4)],
          "cross": [(-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
                    (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)]}
COLORS = {"red": (225, 30, 30), "green": (30, 170, 50), "blue": (40, 70, 235),
          "yellow": (245, 225, 40), "pink": (250, 130, 200), "cyan": (40, 215, 225)}
FRAMES = {**COLORS, "white": (250, 250, 250), "grey": (120, 120, 120), "brown": (120, 70, 20),
          "purple": (120, 20, 170)}
MOTIONS = {"moves left": ("x", -1), "moves right": ("x", 1), "moves up": ("y", -1),
           "moves down": ("y", 1), "grows": ("size", 1), "shrinks": ("size", -1),
           "turns left": ("angle", -1), "turns right": ("angle", 1),
           "appears before a ball": ("order", 1), "appears after a ball": ("order", -1)}


def draw_clip(path, color, shape, frame, motion, rng, size=96, length=24):
    """Write one H.264 file. A motion and its opposite show the same frames in opposite order."""
    x, y, ball_x, ball_y = size * rng.uniform(0.46, 0.54, 4)
    radius, angle = size * rng.uniform(0.2, 0.24), rng.uniform(-0.2, 0.2)
    kind, sign = MOTIONS[motion]
    # x264's macroblock tree is the one part of it whose result varies from run to run.
    options = {"crf": "18", "preset": "ultrafast", "threads": "1", "x264-params": "mbtree=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options=options)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for t in sign * np.linspace(-1, 1, length):
            image = Image.new("RGB", (size, size))
            draw = ImageDraw.Draw(image)
            draw.rectangle((0, 0, size, size), None, FRAMES[frame], 12)
            if kind == "order" and t > 0:
                draw.circle((ball_x, ball_y), 0.2 * size, (255, 255, 255), (0, 0, 0), 3)
            else:
                center_x = x + 0.32 * size * t * (kind == "x")
                center_y = y + 0.32 * size * t * (kind == "y")
                r = radius * (1 + 0.5 * t * (kind == "size"))
                a = angle + 1.3 * t * (kind == "angle")
                corners = [(center_x + r * (u * math.cos(a) - v * math.sin(a)),
                            center_y + r * (u * math.sin(a) + v * math.cos(a)))
                           for u, v in SHAPES[shape]]
                draw.polygon(corners, COLORS[color])
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))


def choose_clips(galleries):
    """-> (color, shape, frame, motion) of the 240 test clips and then of `galleries` times 240
    training clips, less those that the test has.

    In a gallery every colour and shape has each motion once and each frame once, so that its 240
    captions of appearance are distinct, and so are its 240 captions of motion.
    """
    rng, clips = np.random.default_rng(0), []
    for gallery in range(galleries + 1):
        for color in COLORS:
            for shape in SHAPES:
                for motion, frame in zip(MOTIONS, rng.permutation(list(FRAMES))):
                    if gallery == 0 or (color, shape, frame, motion) not in clips[:240]:
                        clips.append((color, shape, frame, motion))
    return clips


def write_shapes(root, galleries=6):
    """Write root/videos and root/clips.jsonl, which comes last, unless it is there already. A
    process that comes second waits for the first. Raises ValueError for a folder with other
    files in it: they may have the names of ours."""
    root, clips = Path(root), choose_clips(galleries)
    if (root / "clips.jsonl").exists():
        return  # without a lock, which a folder that is read-only does not allow
    root.mkdir(parents=True, exist_ok=True)
    # The lock is the first file of ours.
    names = {path.name for path in root.iterdir()}
    if names and "lock" not in names:
        raise ValueError(
            "holds other files than the synthetic clips; train.py --data trains on your own")
    with filelock.FileLock(root / "lock"):
        if (root / "clips.jsonl").exists():
            return
        (root / "videos").mkdir(exist_ok=True)
        lines, pool = [], ThreadPoolExecutor(8)  # x264 runs without Python's lock
        try:
            jobs = []
            for i, (color, shape, frame, motion) in enumerate(clips):
                captions = [f"a {color} {shape} in a {frame} frame", f"a {color} {shape} {motion}"]
                if i < 240:
                    captions = [captions[(i + i // 10) % 2]]      # a test clip has one query
                lines.append({"video": f"videos/video{i}.mp4", "captions": captions,
                              "split": "test" if i < 240 else "train"})
                jobs.append(pool.submit(draw_clip, root / lines[i]["video"], color, shape, frame,
                                        motion, np.random.default_rng(i)))
            for job in tqdm(jobs, f"writing {root}", unit="clip"):
                job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        (root / "clips.part").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (root / "clips.part").replace(root / "clips.jsonl")


def kind(caption):
    """What a caption is about: "motion" or "appearance"."""
    return "appearance" if " in a " in caption else "motion"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    try:
        write_shapes(folder)
    except KeyboardInterrupt:
        os._exit(130)  # without waiting for threads
    except (OSError, ValueError) as error:
        parser.error(f"{folder}: {error}")
