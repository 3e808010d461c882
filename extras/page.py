"""Hits as a web page: each video's player at its moment, and what the words see in it.

    python -m extras.search search INDEX "a red square" --html hits.html
    python -m extras.search explain "a red square" VIDEO --model RUN --html why.html

The page needs no server and has no scripts. It holds its pictures; the videos stay where
they are. Their addresses are relative to the page, so that both can be moved together.

A player starts where its hit does. In an index of segments a hit is a part of a video,
and the player stops at its end. In an index of whole videos it is the best frame's share
of the video, often only a second: the player starts there and plays on.
"""
import base64
import io
import os
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import torch
from PIL import Image

from extras.figures import (
    check_folder, clock, hit_frames, interactions, printable, span)
from extras.video_index import video_seconds
from train import atomic_write
from video_colbert import InputError, VideoError, frame_times, sample_seconds

SIDE = 96  # pixels of a frame, at most

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1b1b; --quiet: #5c5c5c;
  --line: #d5d5d5; --red: #c4161c; --green: #0a7d28; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --text: #ececec; --quiet: #a3a7ad; --line: #3a3e45;
    --red: #ff6b6b; --green: #4cc46c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1180px;
  font: 16px/1.4 system-ui, sans-serif; background: var(--page); color: var(--text); }
h1 { margin: 0 0 8px; font-size: 24px; }
h1, h2 { overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 16px; }
p { margin: 0 0 8px; }
a { color: inherit; }
.quiet { color: var(--quiet); font-size: 14px; max-width: 60em; }
article { display: flex; flex-wrap: wrap; gap: 8px 20px; padding: 16px 0;
  border-top: 1px solid var(--line); }
header { flex: 1 0 100%; min-width: 0; }
video { flex: 1 1 260px; min-width: 0; max-width: 420px; height: 240px;
  background: #000; }
.missing { flex: 1; margin: 0; padding: 16px; border: 1px dashed var(--red);
  overflow-wrap: anywhere; }
.scroll { max-width: 100%; overflow-x: auto; scroll-padding-left: 160px; }
table { border-spacing: 2px; font-size: 12px; font-variant-numeric: tabular-nums; }
th, td { padding: 0 2px; min-width: 52px; text-align: center; font-weight: normal; }
th:first-child { position: sticky; left: 0; max-width: 80px; background: var(--page);
  text-align: right; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
img { display: block; width: 52px; height: 52px; margin: 0 auto 2px; }
thead th { vertical-align: bottom; }
.best { color: var(--red); font-weight: bold; scroll-initial-target: nearest; }
.best img { outline: 4px solid var(--red); outline-offset: -1px; }
.pick { font-weight: bold; outline: 2px solid var(--text); outline-offset: -2px; }
tbody th[colspan] { position: static; max-width: none; padding-top: 4px;
  text-align: left; overflow: visible; }
tbody span { position: sticky; left: 2px; }
.F th[colspan] { color: var(--green); }
.V th[colspan] { color: var(--red); }
.F td { background: rgba(10, 125, 40, var(--heat)); }
.V td { background: rgba(220, 50, 50, var(--heat)); }
"""

LEGEND = """F compares words with single frames, before the temporal transformer; V
compares them with frames that have seen the others, after it. A score is the sum of
both. The best frame is framed in red. Below the frames, the stronger the colour, the
more similar are word and frame, on one scale for the whole page; the frame that a word
picks is outlined. As in the paper's Figure 4, these numbers are of words and frames
alone; the scores count the query's other tokens and the expansion tokens too. If a
player stays empty, the video has moved or the browser cannot play its format; its name
is a link to it."""

def check_page(path):
    """Raises InputError if a page cannot be saved under this name."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path}: a page's name ends in .html")
    check_folder(path)

def write_page(path, query, hits, model, segment=0):
    """Write the page of a query's hits; where a video cannot be read, it says so.
    `segment` is the index's, in seconds."""
    looks = [look(model, query, hit, segment) for hit in hits]
    # Colours mean the same on the whole page.
    values = torch.cat([torch.stack(seen.sims).flatten() for seen in looks]).tolist()
    low, high = min(values, default=0.0), max(values, default=1.0)

    articles = []
    for rank, (hit, seen) in enumerate(zip(hits, looks), 1):
        articles.append(draw_hit(rank, hit, seen, path, segment, low, high))
    title = safe(query)
    page = f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
<h1 dir="auto">{title}</h1>
{"".join(articles)}<p class="quiet">{LEGEND}</p>
</html>
"""
    with atomic_write(Path(path)) as file:
        file.write(page.encode())

# ---- What the words see in a hit
class Look(NamedTuple):
    words: list  # W strings
    sims: list  # similarities of words to frames (W, N), before and after
    pictures: list  # addresses of the N frames
    clocks: list  # their times, to read
    first: float = 0.0  # where the file's clock is at its first frame, in seconds
    problem: str = ""  # why there are no frames

def look(model, query, hit, segment):
    """Read the frames of a hit and compare them with the words of the query."""
    try:
        frames = hit_frames(hit, model.config.num_frames, model.image_size, segment)
        timing = frame_times(hit["path"])
    except VideoError as error:
        # The reason alone, without the path on this machine.
        reason = str(error).removeprefix(f"{hit['path']}: ")
        return Look([], [torch.zeros(0, 0)] * 2, [], [], problem=reason)
    words, before, after = interactions(model, query, frames)
    pictures = [picture_address(frame) for frame in frames]
    clocks = frame_clocks(hit, len(frames), timing, segment)
    first = timing.times[0] * timing.tick
    return Look(words, [before.cpu(), after.cpu()], pictures, clocks, first)

def picture_address(frame):
    """A frame uint8 (3, S, S) -> an address that holds it as a small JPEG."""
    picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
    picture.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()

def frame_clocks(hit, N, timing, segment):
    """The time of each of a hit's N frames, to read."""
    part = (hit["start"], hit["end"]) if segment else (0.0, video_seconds(timing))
    digits = 0 if part[1] - part[0] >= 5 * N else 1
    return [clock(time, digits) for time in sample_seconds(N, *part)]

# ---- Text, addresses and HTML
def safe(text):
    """Text from outside as HTML."""
    return escape(printable(text))

def draw_hit(rank, hit, seen, page, segment, low, high):
    """One hit -> HTML."""
    path = os.path.relpath(hit["path"], os.path.dirname(os.path.abspath(page)))
    # Bytes that are no text stay the same bytes.
    address = quote(os.fsencode(path))
    # Search counts from the first frame, a player from the file's zero.
    moment = f"{seen.first + hit['start']:.2f}"
    if segment:
        moment += f",{seen.first + hit['end']:.2f}"

    media = (f'<video controls playsinline preload="metadata" '
             f'src="{address}#t={moment}"></video>')
    if seen.problem:
        media = f'<p class="missing">missing or unreadable: {safe(seen.problem)}</p>'
    return f"""<article>
<header><h2>{rank}. <a href="{address}"><bdi>{safe(path)}</bdi></a></h2>
{span(hit, segment)}: score&nbsp;<b>{hit['score']:.3f}</b>
= F&nbsp;{hit['F']:.3f} + V&nbsp;{hit['V']:.3f}</header>
{media}
{draw_table(hit, seen, low, high)}</article>
"""

def draw_table(hit, seen, low, high):
    """The frames of a hit in one row, and below them their similarities to the words."""
    N = len(seen.pictures)
    if not N:
        return ""
    cells = []
    for n, time in enumerate(seen.clocks):
        best = ' class="best"' if n == hit["frame"] else ""
        picture = f'<img src="{seen.pictures[n]}" alt="frame {n + 1}">'
        cells.append(f"<th{best}>{picture}{time}</th>")
    rows = [f"<thead><tr><th></th>{''.join(cells)}</tr></thead>"]

    for level, side, sim in zip("FV", ("before", "after"), seen.sims):
        title = f"<span>{side} the temporal transformer ({level})</span>"
        rows.append(f'<tbody class="{level}"><tr><th colspan="{N + 1}">{title}</th></tr>')
        for word, row in zip(seen.words, sim):
            cells = draw_cells(row, low, high)
            rows.append(f"<tr><th>{safe(word)}</th>{cells}</tr>")
        rows.append("</tbody>")
    lines = "\n".join(rows)
    return f'<div class="scroll"><table>\n{lines}\n</table></div>\n'

def draw_cells(row, low, high):
    """A word's similarities to the frames (N,); the frame that it picks is outlined."""
    cells = []
    for n, value in enumerate(row.tolist()):
        heat = 0.75 * (value - low) / max(high - low, 1e-6)
        pick = ' class="pick"' if n == row.argmax() else ""
        cells.append(f'<td{pick} style="--heat:{heat:.2f}">{value:z.2f}</td>')
    return "".join(cells)
