"""Search your own videos by a sentence.

    python -m extras.search index FOLDER --model runs/shapes --out INDEX [--segment 10]
    python -m extras.search search INDEX "a red square moves left" -k 5 --sheet hits.png
    python -m extras.search search INDEX "a red square moves left" --html hits.html
    python -m extras.search explain "a red square" VIDEO --model runs/shapes --out why.png

`index` encodes every video below a folder; run again, it encodes only what is new or changed.
`search` prints rank, score with its F and V parts, path and the time of the best frame. With
--segment, videos are indexed in overlapping parts of that many seconds, and `search` prints the
time of the part, or of neighbours joined. `explain` draws which frame each word picks. --html
writes a page with players (extras/page.py).

--model is a run's folder, or an open_clip name for a model that was never trained on video. To
use a file of weights, make a folder of it first, in Python:

    from video_colbert import Config, VideoColBERT
    VideoColBERT(Config(backbone="ViT-B-32-quickgelu", pretrained="FILE")).save("FOLDER")

The score is F + V, also if only one of them was trained (--lambda-video 0). Search is exact;
extras/export.py exports an index to engines.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from extras.figures import (
    check_picture, draw_hits, draw_interactions, interactions, printable, save_picture, span)
from extras.long_videos import sample_long_video
from extras.page import check_page, write_page
from extras.video_index import VideoIndex, fingerprint, video_seconds
from train import pick_device, run_main
from video_colbert import (
    Config, InputError, VideoColBERT, frame_times, mms_fv, sample_seconds)

# A segment is joined to an overlapping hit if it loses at most this share of the hit's lead
# over the median: all segments that show a little of the moment have some good frames.
MERGE = 0.05

# ---- Search
@torch.no_grad()
def find_hits(index, model, queries, k=10):
    """[A strings] -> for each the k best videos of an index (fewer if it has fewer):
    dictionaries of path, score, F, V, and the best frame with its start and end in seconds.
    In an index of segments, hits are parts of videos.

    Raises InputError for another model than the index's, a blank query and an empty index."""
    # The weights are hashed only once.
    if model is not index.model and fingerprint(model) != index.meta["fingerprint"]:
        made_by = index.meta["model"] or "unnamed"
        raise InputError(f"{index.folder} was made by another model ({made_by}), or its "
                         "weights have changed")
    index.model = model
    if not index.videos:
        raise InputError(f"{index.folder} is empty: it has no videos")
    if k < 1:
        raise InputError("k must be at least 1")
    if not all(query.strip() for query in queries):
        raise InputError("the query is empty")

    ids, mask = model.tokenize(queries)
    Q = model.encode_query(ids.to(model.device))
    Q, mask = Q.to(index.vectors.device), mask.to(index.vectors.device)
    F, V = index.scores(Q, mask)  # (A, B)
    return [best_hits(index, Q[a][mask[a]], F[a], V[a], k) for a in range(len(Q))]

def best_hits(index, Q, F, V, k):
    """The k best hits of one query by its scores F, V (B,). Q (M, d) are its tokens that
    count.

    Segments of a video that overlap are one hit: the best of them, joined by those that
    score nearly as high (see MERGE)."""
    N = index.meta["num_frames"]
    total = mms_fv(F, V)
    typical = total.median().item()
    scores, rows = total.sort(descending=True)
    hits = []
    for score, row in zip(scores.tolist(), rows.tolist()):
        # There are enough, and nothing that follows can be joined to one.
        if len(hits) == k and score < min(hit["least"] for hit in hits):
            break
        path, start, end = index.segment(row)
        overlapped = [hit for hit in hits if hit["path"] == path
                      and start < hit["end"] and hit["start"] < end]
        if not overlapped and len(hits) < k:
            n = best_frame(index.vectors[row], Q, N)
            best = sample_seconds(N, start, end)[n].item()
            least = score - MERGE * (score - typical)
            hits.append(dict(path=path, score=score, F=F[row].item(), V=V[row].item(),
                             start=start, end=end, best=best, least=least))
        elif len(overlapped) == 1 and score >= overlapped[0]["least"]:
            hit = overlapped[0]
            hit["start"] = min(start, hit["start"])
            hit["end"] = max(end, hit["end"])

    for hit in hits:
        del hit["least"]
        times = sample_seconds(N, hit["start"], hit["end"])
        n = int(np.abs(times - hit.pop("best")).argmin())  # of N frames of the hit
        start, end = hit["start"], hit["end"]
        if not index.meta["segment"]:
            start, end = part_of_frame(n, N, end)
        hit.update(start=round(start, 2), end=round(end, 2), frame=n)
    return hits

def part_of_frame(n, N, seconds):
    """Start and end of the part of a video to which the n-th of its N frames is nearest."""
    times = sample_seconds(N, 0.0, seconds)
    between = (times[1:] + times[:-1]) / 2
    edges = [0.0, *between.tolist(), seconds]
    return edges[n], edges[n + 1]

def best_frame(vectors, Q, N):
    """The frame nearest to the query's tokens on average, over both levels."""
    near = vectors.float() @ Q.sum(dim=0)  # (N + N + E,)
    return (near[:N] + near[N:2 * N]).argmax().item()

@torch.no_grad()
def hit_of_video(model, query, path, frames):
    """The hit that a video is to a query, as in an index of whole videos."""
    ids, mask = model.tokenize([query])
    mask = mask.to(model.device)
    Q = model.encode_query(ids.to(model.device))
    F, V = model.encode_video(frames[None].to(model.device))
    mms_f, mms_v = model.similarities(Q, mask, F, V)

    N = len(frames)
    n = best_frame(torch.cat([F[0], V[0]]), Q[mask], N)
    start, end = part_of_frame(n, N, video_seconds(frame_times(path)))
    return dict(path=path, score=mms_fv(mms_f, mms_v).item(), F=mms_f.item(), V=mms_v.item(),
                start=start, end=end, frame=n)

# ---- The command line
def open_model(name, device):
    """A run's folder, or an open_clip name for a model that was never trained on video."""
    torch.manual_seed(0)  # new parts are always the same
    if Path(name).is_dir():
        model = VideoColBERT.load(name)
    elif os.path.isfile(name):
        raise InputError(f"{name} is a file, but --model takes a model's folder; --help says "
                         "how to make one of a file of weights")
    elif os.sep in name:
        raise InputError(f"{name}: no such folder")
    else:
        model = VideoColBERT(Config(backbone=name))
    return model.to(device).eval()

def print_lines(lines):
    """Print now. A reader who has left (`| head`) is no error."""
    try:
        print("\n".join(printable(line) for line in lines), flush=True)
    except BrokenPipeError:
        # Python would try again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def index_command(args, device):
    name = os.path.abspath(args.model) if Path(args.model).is_dir() else args.model
    index, skipped = VideoIndex.build(
        args.folder, open_model(args.model, device), args.out, name,
        workers=8, segment=args.segment, stride=args.stride)
    lines = [f"skipped: {problem}" for problem in skipped]
    rows = f", {len(index.vectors)} segments" if args.segment else ""
    print_lines([*lines, f"{len(index.videos)} videos{rows} in {args.out}"])

def search_command(args, device):
    if args.sheet:
        check_picture(args.sheet)
    if args.html:
        check_page(args.html)
    index = VideoIndex.load(args.index, device)
    made_by, segment = index.meta["model"], index.meta["segment"]
    name = args.model or made_by
    if not name:
        raise InputError(f"{args.index} does not say which model made it: use --model")
    try:
        model = open_model(name, device)
    except InputError as error:
        made_by = made_by or "a model without a name"
        raise InputError(f"{error}; {args.index} was made by {made_by}: use --model") from None

    hits = find_hits(index, model, [args.query], args.k)[0]
    lines = []
    for rank, hit in enumerate(hits, 1):
        score = f"{hit['score']:.3f} (F {hit['F']:.3f}, V {hit['V']:.3f})"
        lines.append(f"{rank}  {score}  {hit['path']}  {span(hit, segment)}")
    print_lines([json.dumps(hits)] if args.json else lines)
    if args.sheet:
        sheet = draw_hits(args.query, hits, index.meta["num_frames"], segment)
        save_picture(sheet, args.sheet)
    if args.html:
        write_page(args.html, args.query, hits, model, segment)

def explain_command(args, device):
    if args.html:
        check_page(args.html)
    elif not args.out:
        args.out = "explain.png"
    if args.out:
        check_picture(args.out)
    model = open_model(args.model, device)
    frames = sample_long_video(args.video, model.config.num_frames, model.image_size)
    if args.out and os.path.exists(args.out) and os.path.samefile(args.out, args.video):
        raise InputError(f"{args.out} is the video itself: give another --out")
    words, before, after = interactions(model, args.query, frames)
    if not words:
        raise InputError("the query is empty")
    lines = []
    for word, f, v in zip(words, before, after):
        lines.append(f"{word:20} before: frame {f.argmax() + 1}, {f.max():.3f}   "
                     f"after: frame {v.argmax() + 1}, {v.max():.3f}")
    print_lines(lines)

    if args.html:
        hit = hit_of_video(model, args.query, args.video, frames)
        write_page(args.html, args.query, [hit], model)
        print_lines([args.html])
    if args.out:
        title = f"{args.query}   ({printable(Path(args.video).name)})"
        figure = draw_interactions([(title, words, frames, before.cpu(), after.cpu())])
        save_picture(figure, args.out)
        print_lines([args.out])

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    index = commands.add_parser("index", help="index a folder, or bring an index up to date")
    index.add_argument("folder")
    index.add_argument("--out", required=True, help="the folder of the index")
    index.add_argument("--segment", type=float, default=0.0,
                       help="index longer videos in parts of so many seconds; 0: whole videos")
    index.add_argument("--stride", type=float, default=0.0,
                       help="seconds from one part to the next; default half a segment")

    search = commands.add_parser("search", help="find videos by a sentence")
    search.add_argument("index")
    search.add_argument("query")
    search.add_argument("-k", type=int, default=5, help="number of hits")
    search.add_argument("--sheet", help="draw the hits into this picture")
    search.add_argument("--json", action="store_true", help="print the hits as JSON")

    explain = commands.add_parser("explain", help="draw which frame each word picks in a video")
    explain.add_argument("query")
    explain.add_argument("video")
    explain.add_argument("--out", help="the picture; explain.png if there is no --html")

    functions = {index: index_command, search: search_command, explain: explain_command}
    for command, function in functions.items():
        command.add_argument("--model", required=command is not search,
                             help="a run's folder, or an open_clip name")
        if command is not index:
            command.add_argument("--html", help="write a page with players")
        command.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
        command.set_defaults(function=function)
    args = parser.parse_args(argv)
    args.function(args, pick_device(args.device))

if __name__ == "__main__":
    run_main(main, "extras.search")
