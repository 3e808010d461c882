"""Draw a run's loss, and MMS_F and MMS_V of its true pairs, over the steps.

    python -m extras.curves runs/shapes curves.png
"""
import argparse

from PIL import Image, ImageDraw, ImageFont

from extras.figures import check_picture, save_picture
from train import read_log, run_main
from video_colbert import InputError

WIDTH, HEIGHT, MARGIN = 420, 260, 44  # of a panel, in pixels
CURVES = {"loss": "#333333", "MMS_F": "#0a7d28", "MMS_V": "#c4161c"}
PANELS = (["loss"], ["MMS_F", "MMS_V"])

def read_steps(run):
    """The lines of a run's log that are steps."""
    steps = [line for line in read_log(run) if "loss" in line]
    if len(steps) < 2:
        raise InputError(f"{run}/log.jsonl is missing or has less than two steps")
    return steps

def smooth(values, width):
    """The mean of each value and those before it, `width` in all."""
    means = []
    for i in range(len(values)):
        window = values[max(0, i + 1 - width):i + 1]
        means.append(sum(window) / len(window))
    return means

def draw_panel(steps, names):
    """Curves of a few numbers of the log in one picture -> PIL image."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    curves = {name: smooth([step[name] for step in steps], 10) for name in names}
    low = min(0.0, min(min(values) for values in curves.values()))
    high = max(max(values) for values in curves.values())
    left, right, top, bottom = MARGIN, WIDTH - 12, 30, HEIGHT - 34

    draw.rectangle((left, top, right, bottom), outline="#999999")
    draw.text((left - 4, top), f"{high:.2f}", "black", font, "rt")
    draw.text((left - 4, bottom), f"{low:.2f}", "black", font, "rb")
    draw.text((left, bottom + 6), "0", "black", font)
    draw.text((right, bottom + 6), f"step {steps[-1]['step'] + 1}", "black", font, "ra")

    x = left
    for name, values in curves.items():
        draw.text((x, 8), name, CURVES[name], font)
        x += 70
        points = []
        for i, value in enumerate(values):
            across = left + (right - left) * i / (len(values) - 1)
            points.append((across, bottom - (bottom - top) * (value - low) / (high - low or 1)))
        draw.line(points, CURVES[name], 2)
    return image

def draw_curves(run):
    """The panels side by side -> PIL image. Each point is the mean of ten steps."""
    steps = read_steps(run)
    image = Image.new("RGB", (WIDTH * len(PANELS), HEIGHT), "white")
    for i, names in enumerate(PANELS):
        image.paste(draw_panel(steps, names), (i * WIDTH, 0))
    return image

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("picture", help="file to write")
    args = parser.parse_args()
    check_picture(args.picture)
    save_picture(draw_curves(args.run), args.picture)
    print(args.picture)

if __name__ == "__main__":
    run_main(main, "extras.curves")
