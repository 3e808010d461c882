"""Figures: which frame each word picks (Figure 4), bars (Figure 3), and the hits of a search."""
import itertools
import re
from pathlib import Path
from textwrap import fill

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.func import functional_call
from torch.nn.functional import normalize

from extras.long_videos import sample_long_video
from train import atomic_write, user_errors
from video_colbert import InputError, VideoError

GREEN, RED = "#0a7d28", "#c4161c"

# ---- Figure 4: which frame does each word pick, before and after the temporal transformer?
@torch.no_grad()
def interactions(model, query, frames):
    """query str, uint8 frames (N, 3, S, S) -> its W words, similarities (W, N) before and
    after. As in the paper's figure there is neither query nor visual expansion."""
    images = (frames.to(model.device).float() - model.mean) / model.std
    f = model.backbone.visual(images)[None]  # (1, N, d)
    no_expansion = {"visual_expansion": model.temporal.visual_expansion[:0]}
    v = functional_call(model.temporal, no_expansion, f)  # (1, N, d)
    F, V = normalize(f[0].float(), dim=-1), normalize(v[0].float(), dim=-1)

    words, W = embed_words(model, query)
    return words, W @ F.T, W @ V.T

def embed_words(model, query):
    """query str -> its words, their embeddings (W, d). Of a long query the end is cut off."""
    ids, _ = model.tokenize([query])
    real = model.real_tokens(ids)
    Q = model.encode_query(ids.to(model.device))[0]  # (M, d)
    special = count_tokens(model, "")  # start and end; SigLIP has only an end
    Q = Q[special - 1:int(real.sum()) - 1]  # (T, d), the tokens of the words

    # A word is the mean of its tokens.
    words, vectors, first = [], [], 0
    for word in query.split():
        length = count_tokens(model, word) - special
        if length and first < len(Q):
            words.append(word)
            vectors.append(Q[first:first + length].mean(dim=0))
        first += length
    return words, torch.stack(vectors) if vectors else Q[:0]

def load_font(size):
    """DejaVu Sans, which knows many alphabets, or if that is missing, Pillow's font."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)

def count_tokens(model, text):
    """The number of a text's tokens, with start and end, without pads."""
    ids, _ = model.tokenize([text])
    return int(model.real_tokens(ids).sum())

def draw_interactions(rows, side=96):
    """rows of (title, words, frames (N, 3, S, S), before (W, N), after (W, N)) -> PIL image.

    A row shows at most 12 frames, those that most words pick: above a frame in green the
    words that pick it before the temporal transformer, below it in red those after."""
    columns = max(min(12, len(frames)) for _, _, frames, _, _ in rows)
    width = 8 + side * max(5, columns)
    strips = [draw_row(*row, width, side) for row in rows]

    image = Image.new("RGB", (width, sum(strip.height for strip in strips)))
    y = 0
    for strip in strips:
        image.paste(strip, (0, y))
        y += strip.height
    return image

def draw_row(title, words, frames, before, after, width, side):
    """One row of the figure -> PIL image of this width."""
    labels_before = frame_labels(words, before)
    labels_after = frame_labels(words, after)
    # The frames that most words pick, in the order of the video.
    picks = [len(b) + len(a) for b, a in zip(labels_before, labels_after)]
    ranked = sorted(range(len(frames)), key=lambda n: -picks[n])
    shown = sorted(ranked[:12])

    title = fill(title, width // 10)
    most = max(len(labels) for labels in labels_before + labels_after)
    label_height = 10 + 16 * most
    top = 34 + 21 * title.count("\n") + label_height  # of the frames
    image = Image.new("RGB", (width, top + side + label_height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), title, "black", load_font(17))

    font = load_font(12)
    for column, n in enumerate(shown):
        x = 8 + column * side
        picture = Image.fromarray(frames[n].permute(1, 2, 0).cpu().numpy())
        image.paste(picture.resize((side - 4, side - 4)), (x, top + 2))
        center = x + side // 2 - 2
        draw.text((center, top), "\n".join(labels_before[n]), GREEN, font, "md")
        draw.text((center, top + side), "\n".join(labels_after[n]), RED, font, "ma")
    return image

def frame_labels(words, sim):
    """Words and their similarities (W, N) -> for each frame a list of "word similarity"
    of the words that pick it."""
    labels = [[] for _ in range(sim.shape[1])]
    for word, row in zip(words, sim):
        n = int(row.argmax())
        labels[n].append(f"{word[:10]} {row[n]:.2f}")
    return labels

# ---- Figure 3: bars
def draw_bars(title, bars):
    """bars of (name, value, number of queries) -> PIL image. Below the line is better."""
    image = Image.new("RGB", (80 + 120 * len(bars), 400), "white")
    draw, font, zero = ImageDraw.Draw(image), load_font(14), 190
    middle = image.width // 2

    def write(x, y, text):
        draw.text((x, y), text, "black", font, "ma", align="center")

    write(middle, 12, title)
    highest = max(abs(value) for _, value, _ in bars) or 1
    for i, (name, value, count) in enumerate(bars):
        x, y = 70 + 120 * i, zero - 120 * value / highest
        color = RED if value > 0 else GREEN
        draw.rectangle((x, min(y, zero), x + 70, max(y, zero)), color)
        label = f"{value:+.3f}" if count else "none"
        write(x + 35, y - 18 if value > 0 else y + 4, label)
        write(x + 35, 345, f"{name}\n{count} queries")
    draw.line((50, zero, image.width - 30, zero), "black")
    write(middle, 380, "length of the query in tokens; below the line is better")
    return image

# ---- The hits of a search
def printable(text):
    """The name of a file on one line: newlines, and bytes that are no text, are replaced."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", "\ufffd", text)

def span(hit, segment):
    """The time of a hit to read: mm:ss of a segment, or the seconds of the best frame."""
    start, end = hit["start"], hit["end"]
    if not segment:
        return f"{start:.1f} to {end:.1f} s"
    digits = 0 if segment >= 5 else 1
    return f"{clock(start, digits)} to {clock(end, digits)}"

def clock(seconds, digits):
    """01:07, or with one digit 01:07.5."""
    minutes, rest = divmod(round(seconds, digits), 60)
    width = 3 + digits if digits else 2
    return f"{int(minutes):02}:{rest:0{width}.{digits}f}"

def hit_frames(hit, num_frames, size, segment):
    """The frames of a hit, uint8 (num_frames, 3, size, size): in an index of segments those
    of its part of the video, else those of the whole video. Raises VideoError."""
    part = (hit["start"], hit["end"]) if segment else ()
    return sample_long_video(hit["path"], num_frames, size, *part)

def draw_hits(query, hits, num_frames, segment=0, side=96):
    """A contact sheet -> PIL image: for each hit a strip of at most 12 frames, the best one in
    red. A video that cannot be read is a grey strip. `segment` is the index's, in seconds."""
    step = -(-num_frames // 12)
    columns = -(-num_frames // step)
    height = side + 34  # of a hit
    image = Image.new("RGB", (max(500, columns * side + 16), 40 + len(hits) * height), "white")
    draw = ImageDraw.Draw(image)
    font = load_font(14)
    draw.text((8, 8), printable(query), "black", load_font(18))

    for rank, hit in enumerate(hits):
        top = 40 + rank * height
        name = printable(Path(hit["path"]).name)
        title = f"{rank + 1}   {hit['score']:.3f}   {name}   {span(hit, segment)}"
        draw.text((8, top), title, "black", font)
        top += 20  # of the frames
        try:
            frames = hit_frames(hit, num_frames, side - 8, segment)
        except VideoError:
            draw.rectangle((8, top, 8 + columns * side, top + side), "#c8c8c8")
            draw.text((20, top + 40), f"{name} is missing or cannot be read", "black", font)
            continue

        # Of more than 12 frames every second or third, with the best one among them.
        for column, n in enumerate(range(hit["frame"] % step, num_frames, step)):
            x = 8 + column * side
            if n == hit["frame"]:
                draw.rectangle((x, top, x + side - 1, top + side - 1), RED)
            picture = Image.fromarray(frames[n].permute(1, 2, 0).numpy())
            image.paste(picture, (x + 4, top + 4))
    return image

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

def check_picture(path):
    """Raises InputError if a picture cannot be saved under this name."""
    if Path(path).suffix.lower() not in PICTURES:
        raise InputError(f"{path}: a picture's name ends in .png, .jpg or .webp")
    check_folder(path)

def save_picture(image, path):
    kind = PICTURES[Path(path).suffix.lower()]
    # Pillow raises ValueError if a picture is too large for WebP.
    with user_errors(path, ValueError), atomic_write(Path(path)) as file:
        image.save(file, kind)

def keep(content, path):
    """Write bytes to `path`, or to path-2, path-3 ... where other content is there already
    -> the path."""
    name = path
    for number in itertools.count(2):
        if not name.exists() or name.read_bytes() == content:
            break
        name = path.with_stem(f"{path.stem}-{number}")
    with atomic_write(name) as file:
        file.write(content)
    return name

def check_folder(path):
    """Raises InputError if there is no folder to save a file in."""
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"{path}: no such folder")
