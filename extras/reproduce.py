"""The paper's tables and figures, by the runs that they need.

    python -m extras.reproduce --table 3 --seeds 3     trains, resumes or reuses what it needs
    python -m extras.reproduce --figure 4              which frame each word picks
    python -m extras.reproduce --seeds 3               the scores of one setting over three seeds
    python -m extras.reproduce --table 5 --data msrvtt --root /data/MSRVTT

Tables 1 to 8, 11 and 12, figures 3 and 4; all other flags are train.py's. A run in runs/ with the
same settings and the same clips is reused, or resumed if it is not finished. The result is printed
and kept in runs/.
"""
import argparse
import statistics
import sys
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import normalize
from torch.utils.benchmark import Timer

import train
from extras import shapes
from train import NEUTRAL, WORLD, Settings, finished, parse_settings, pick_device, run_main
from video_colbert import (InputError, VideoColBERT, draw_interactions, interactions, mean_max_sim,
                           mms_fv, ranks, read_settings, reciprocal_rank_fusion, sample_frames,
                           write_file)

# ---- The paper's numbers: R@1, R@5, R@10, nDCG@10 ------------------------------------------------
METRICS = ("R@1", "R@5", "R@10", "nDCG@10")
MAIN, SIGLIP = (48.1, 74.9, 83.9, .652), ["--backbone", "ViT-B-16-SigLIP"]
MP, INFONCE = ["--interaction", "mp"], ["--loss", "infonce"]
FRAME_ONLY, VIDEO_ONLY = ["--lambda-video", "0"], ["--lambda-frame", "0"]
COMBINED = ["--loss-form", "combined"]

TABLES = {                                                        # (row, flags, score, the paper's)
    0: ("Scores of one setting", [
        (score, [], score, None) for score in ("MMS_F", "MMS_V", "MMS_FV", "RRF")]),
    3: ("Table 3: interaction", [
        ("MP on frames", [*MP, *FRAME_ONLY], "MP_F", (42.1, 69.6, 79.3, .601)),
        ("MP on video", [*MP, *VIDEO_ONLY], "MP_V", (43.4, 70.4, 80.1, .610)),
        ("MMS_F", FRAME_ONLY, "MMS_F", (44.3, 71.5, 82.4, .626)),
        ("MMS_V", VIDEO_ONLY, "MMS_V", (47.0, 74.1, 82.4, .643)),
        ("MMS_FV", [], "MMS_FV", MAIN), ("RRF", [], "RRF", (46.8, 74.6, 83.8, .646))]),
    4: ("Table 4: loss", [
        ("combined InfoNCE", [*INFONCE, *COMBINED], "MMS_FV", (45.1, 71.4, 81.4, .625)),
        ("combined sigmoid", COMBINED, "MMS_FV", (47.1, 73.1, 83.9, .647)),
        ("dual InfoNCE", INFONCE, "MMS_FV", (45.3, 73.0, 83.8, .640)),
        ("dual sigmoid", [], "MMS_FV", MAIN),
        ("CLIP4Clip meanP (Table 1)", [*INFONCE, *MP, *FRAME_ONLY], "MP_F",
         (43.1, 70.4, 80.8, None)),
        ("CLIP4Clip seqTransf (Table 1)", [*INFONCE, *MP, *VIDEO_ONLY], "MP_V",
         (44.5, 71.4, 81.6, None))]),
    5: ("Table 5: query augmentation", [
        ("off", ["--no-query-augmentation"], "MMS_FV", (45.3, 72.5, 82.0, .631)),
        ("on", [], "MMS_FV", MAIN),
        ("SigLIP, off", [*SIGLIP, "--no-query-augmentation"], "MMS_FV", (51.0, 75.9, 85.1, .675)),
        ("SigLIP, on", SIGLIP, "MMS_FV", (51.5, 76.3, 85.5, .677))]),
    7: ("Table 7: frames", [
        ("4 frames", ["--num-frames", "4"], "MMS_FV", (45.2, 70.7, 80.7, .622)),
        ("12 frames", ["--num-frames", "12"], "MMS_FV", MAIN),
        ("20 frames", ["--num-frames", "20"], "MMS_FV", (48.4, 74.8, 83.4, .652))]),
    8: ("Table 8: temporal layers", [
        ("2 layers", ["--temporal-layers", "2"], "MMS_FV", (47.0, 74.0, 82.3, .642)),
        ("4 layers", ["--temporal-layers", "4"], "MMS_FV", MAIN),
        ("8 layers", ["--temporal-layers", "8"], "MMS_FV", (48.5, 74.1, 82.6, .650))]),
    12: ("Table 12: pad token", [
        (f"pad {token}", ["--pad-token", str(token)], "MMS_FV", (r1, None, None, None))
        for token, r1 in ((31, 46.0), (49407, 46.0), (3002, 47.8), (13530, 47.9), (49406, 48.0),
                          (0, 48.1))]),
}
BACKBONES = {                                                     # Tables 1 and 2
    "ViT-B-32-quickgelu": {
        "msrvtt": MAIN, "msvd": (46.0, 75.0, 84.0, .645), "vatex": (61.8, 90.8, 95.7, .794),
        "didemo": (48.2, 75.1, 83.7, .654), "activitynet": (45.5, 74.6, 85.5, .645)},
    "ViT-B-16-quickgelu": {
        "msrvtt": (51.0, 77.1, 85.5, .677), "msvd": (50.2, 79.6, 87.8, .683),
        "vatex": (66.8, 92.9, 96.8, .826), "didemo": (51.9, 78.3, 85.6, .682),
        "activitynet": (50.6, 78.0, 87.9, .685)},
    "ViT-B-16-SigLIP": {
        "msrvtt": (51.5, 76.3, 85.5, .677), "msvd": (55.2, 82.9, 89.4, .724),
        "vatex": (68.0, 93.4, 96.9, .833), "didemo": (51.7, 76.1, 84.8, .675),
        "activitynet": (45.8, 76.3, 86.7, .656)}}
COST = {"MMS_F": (8.90, 11.1), "MMS_V": (9.64, 11.1), "MMS_FV": (9.64, 11.2)}   # Table 11, A5000

def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)

def quote(numbers):
    """The paper's numbers as one cell."""
    return " / ".join("–" if x is None else f"{x:.3f}" if x < 1 else f"{x:.1f}" for x in numbers)

# ---- Runs ----------------------------------------------------------------------------------------
@cache
def warn_once(message):
    print(message, file=sys.stderr)

def all_runs():
    """Every run in runs/ whose settings can be read -> [(folder, Settings)]."""
    runs = []
    for path in sorted(Path("runs").glob("*/settings.json")):
        try:
            runs.append((path.parent, read_settings(Settings, path)))
        except InputError as error:
            warn_once(f"skipped: {error}")
    return runs

def find_run(s):
    """The folder of a run with these settings and these clips, a finished one first, or None."""
    wanted = {name: value for name, value in asdict(s).items() if name not in NEUTRAL}
    candidates, data_id = [], train.data_hash(train.load_clips(s))
    for folder, saved in all_runs():
        if wanted.items() <= asdict(saved).items():
            record = finished(folder)
            state = record or train.load_checkpoint(folder / "checkpoints")
            if state and not str(state.get("data")).startswith(data_id):  # pixels may follow it
                warn_once(f"not reused: {folder} was run on other clips or captions")
            elif record and record["missing"] and not s.allow_missing:
                warn_once(f"not reused: {folder} lacks test clips, see --allow-missing")
            else:
                candidates.append((record is None, folder))
    return min(candidates)[1] if candidates else None

def runs_of(argv, flags, seeds, device):
    """The folders of the finished runs that flags and seeds mean: found, resumed or trained now."""
    folders = []
    for k in range(seeds):
        s = parse_settings([*argv, *flags])
        s = replace(s, seed=s.seed + k)
        folders.append(train.run(replace(s, resume=str(find_run(s) or "")), device))
    return folders

class Query(NamedTuple):
    text: str
    clip: int                                                     # index among the test clips
    tokens: int                                                   # without start and end
    rank: dict                                                    # of F, V, FV and RRF, 1 is best

def query_ranks(folder, s, device):
    """A finished run's model on its test clips -> model, clips, [Query]. Cache, workers and
    allow_missing are those of `s`, all other settings are the run's."""
    model = VideoColBERT.load(folder).to(device)
    saved = read_settings(Settings, folder / "settings.json")
    saved = replace(saved, epochs=0, cache=s.cache, workers=s.workers,
                    allow_missing=s.allow_missing)
    data, _, _ = train.fill_cache(train.load_clips(saved), saved, model.image_size)
    clips = data["test"]
    sim_F, sim_V, target = train.evaluate(model, clips, saved, device)
    sims = {"F": sim_F, "V": sim_V, "FV": mms_fv(sim_F, sim_V),
            "RRF": reciprocal_rank_fusion(sim_F, sim_V)}
    rank = {level: ranks(sim, target).tolist() for level, sim in sims.items()}
    texts = [caption for clip in clips for caption in clip.captions]
    special = int(model.real_tokens(model.tokenize([""])[0]).sum())
    tokens = (model.real_tokens(model.tokenize(texts)[0]).sum(1) - special).tolist()
    return model, clips, [Query(text, clip, tokens[i], {level: rank[level][i] for level in rank})
                          for i, (text, clip) in enumerate(zip(texts, target.tolist()))]

# ---- Tables --------------------------------------------------------------------------------------
def cell(values, digits=1):
    """Mean and, of several values, standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"

def changed_flags(s):
    """The settings that differ from the defaults of their data and backbone, as flags."""
    default = asdict(parse_settings(["--data", s.data, "--backbone", s.backbone]))
    return [f"--{name.replace('_', '-')} {value}" for name, value in asdict(s).items()
            if name not in NEUTRAL and value != default[name]]

def missing_note(record):
    return f"{record['missing']} test clips missing: not comparable"

def describe(title, s, records, seeds=1):
    """The line above a table: what it was measured on, how, and where."""
    first, seed_note = records[0], f"seeds {s.seed} to {s.seed + seeds - 1}, mean ± deviation"
    parts = [s.data, s.backbone, f"{first['evaluation'][0]['queries']} queries",
             f"gallery of {first['gallery']} clips", f"{s.epochs} epochs",
             seed_note if seeds > 1 else f"seed {s.seed}"]
    parts += dict.fromkeys(missing_note(record) for record in records if record["missing"])
    parts += [f"`{' '.join(changed_flags(s))}`"] if changed_flags(s) else []
    machines = dict.fromkeys(record["machine"] for record in records)
    return f"{title}. {', '.join(parts)}; {'; '.join(machines)}"

def trained_table(number, argv, s, seeds, device):
    """A table of rows that are each trained, as Markdown: mean and standard deviation of seeds. For
    the synthetic clips also R@1 by what a query is about."""
    title, rows = TABLES[number]
    kinds = ("appearance", "motion") if s.data == "shapes" else ()
    quoted = s.data == "msrvtt" and number > 0
    lines, all_records, queries = [], [], {}
    for name, flags, score, paper in rows:
        is_siglip = flags[:2] == SIGLIP
        if is_siglip and s.backbone not in BACKBONES:             # beside a toy it says nothing
            continue
        folders = runs_of(argv, flags, seeds, device)
        records = [finished(folder) for folder in folders]
        all_records += records
        level = score.rpartition("_")[2]                   # with --interaction mp MP_F is the F row
        name = name if number else name.replace("MMS", s.interaction.upper())
        line = [name, f"`{' '.join(flags)}`" if flags else ""]
        for direction, metrics in (("text to video", METRICS), ("video to text", ["R@1"])):
            for metric in metrics:
                values = [row[metric] for record in records for row in record["evaluation"]
                          if row["direction"] == direction
                          and row["score"].rpartition("_")[2] == level]
                line.append(cell(values, 3 if metric == "nDCG@10" else 1))
        for folder in folders if kinds else ():
            if folder not in queries:
                queries[folder] = query_ranks(folder, s, device)[2]
        for kind in kinds:
            recalls = []
            for folder in folders:
                hits = [q.rank[level] == 1 for q in queries[folder] if shapes.kind(q.text) == kind]
                recalls.append(100 * sum(hits) / len(hits))
            line.append(cell(recalls))
        if quoted:
            line.append(quote(paper) + " (SigLIP)" * is_siglip)
        lines.append(line)
    header = ["", "flags", *METRICS, "video to text R@1", *(f"{kind} R@1" for kind in kinds)]
    return (describe(title, s, all_records, seeds) + "\n\n"
            + markdown(header + ["the paper's, with CLIP-B/32"] * quoted, lines))

def runs_table(number):
    """Tables 1 and 2 as Markdown: the runs that there are of each dataset and backbone."""
    lines, runs = [], all_runs()
    for data in ("msrvtt", "msvd", "vatex") if number == 1 else ("didemo", "activitynet"):
        here = [(folder, s) for folder, s in runs if data in Path(s.data).with_suffix("").parts
                and s.interaction == "mms" and finished(folder)]
        for backbone in dict.fromkeys([*BACKBONES, *(s.backbone for _, s in here)]):
            paper = BACKBONES.get(backbone, {}).get(data)
            found = [(folder, s) for folder, s in here if s.backbone == backbone]
            for folder, s in found or [(None, None)]:
                line = [data, backbone, folder or "no run", "", *[""] * len(METRICS)]
                if folder:
                    record, changes = finished(folder), changed_flags(s)
                    changes += [missing_note(record)] * (record["missing"] > 0)
                    row, = [row for row in record["evaluation"]
                            if (row["direction"], row["score"]) == ("text to video", "MMS_FV")]
                    line[3:] = [" ".join(changes), *(f"{row[name]:.3f}" if name == "nDCG@10" else
                                                     f"{row[name]:.1f}" for name in METRICS)]
                lines.append(line + [quote(paper) if paper else ""])
    header = ["dataset", "backbone", "run", "settings beside the default", *METRICS, "the paper's"]
    return f"Table {number}: the runs in runs/, MMS_FV\n\n{markdown(header, lines)}"

def augmentation(argv, s, device):
    """Two runs, without and with query augmentation -> their records, and for each query the text,
    the number of tokens, and its rank before and after."""
    folders = [runs_of(argv, [flag], 1, device)[0]
               for flag in ("--no-query-augmentation", "--query-augmentation")]
    without, with_it = (query_ranks(folder, s, device)[2] for folder in folders)
    moved = [(a.text, a.tokens, b.rank["FV"], a.rank["FV"]) for b, a in zip(without, with_it)]
    return [finished(folder) for folder in folders], moved

def queries_table(argv, s, device, number=5):
    """Table 6 as Markdown: the queries below 20 tokens that query augmentation moves most, ranks
    capped at 100."""
    records, queries = augmentation(argv, s, device)
    moved = [(query, min(before, 100), min(after, 100))
             for query, tokens, before, after in queries if tokens < 20]
    moved.sort(key=lambda row: row[2] - row[1])
    rows = moved[:number] + moved[max(number, len(moved) - number):]
    lines = [[query.replace("|", "\\|"), before, after, f"{after - before:+d}"]
             for query, before, after in rows]
    title = "Table 6: the queries that query augmentation improves and degrades most"
    return (describe(title, s, records) + "\n\n"
            + markdown(["query", "rank before", "rank after", "change"], lines))

@torch.no_grad()
def cost_table(s, device, gallery=1000, videos=8):
    """Table 11 as Markdown, with random weights and pixels."""
    model = VideoColBERT(replace(s, pretrained=None)).to(device).eval()
    size, d, M = model.image_size, model.width, model.num_tokens
    frames = torch.randint(0, 256, (videos, s.num_frames, 3, size, size), dtype=torch.uint8,
                           device=device)
    ids = torch.randint(2, 30000, (1, M), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    F = normalize(torch.randn(gallery, s.num_frames, d, device=device), dim=-1)
    V = normalize(torch.randn(gallery, s.num_frames + s.visual_expansion, d, device=device), dim=-1)
    images = (frames.flatten(0, 1).float() - model.mean) / model.std

    def milliseconds(function, *arguments):
        with train.autocast(device):
            names = dict(function=function, arguments=arguments)
            timer = Timer("function(*arguments)", globals=names,
                          num_threads=torch.get_num_threads())    # else one
            return 1000 * timer.blocked_autorange(min_run_time=1).median

    def answer(*levels):
        Q = model.encode_query(ids, mask)
        return sum(mean_max_sim(Q, level, mask) for level in levels).topk(10)

    frame_cost = milliseconds(model.clip.visual, images) / videos
    both_cost = milliseconds(model.encode_video, frames) / videos
    lines = []
    for name, index_cost, levels in (("MMS_F", frame_cost, [F]), ("MMS_V", both_cost, [V]),
                                     ("MMS_FV", both_cost, [F, V])):
        paper = f"{COST[name][0]:.2f} / {COST[name][1]:.1f}"
        lines.append([name, f"{index_cost:.2f}", f"{milliseconds(answer, *levels):.2f}", paper])
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    header = ["", "indexing, ms per video", "query, ms", "the paper's, on an A5000"]
    return (f"Table 11: cost. {s.backbone}, {s.num_frames} frames, {videos} videos at a time, query"
            f" against {gallery} videos; {name}, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}\n\n{markdown(header, lines)}")

# ---- Figures -------------------------------------------------------------------------------------
def draw_augmentation(argv, s, device):
    """Figure 3: the mean change in rank by the length of the query -> PIL image."""
    changes = [[], [], [], []]
    for _, tokens, before, after in augmentation(argv, s, device)[1]:
        changes[sum(tokens >= edge for edge in (5, 10, 20))].append(after - before)
    means = [statistics.mean(part) if part else 0.0 for part in changes]
    scale = 120 / (max(map(abs, means)) or 1)
    image, font = Image.new("RGB", (560, 400), "white"), ImageFont.load_default(14)
    draw = ImageDraw.Draw(image)
    text = partial(draw.text, fill="black", font=font, anchor="ma", align="center")
    text((280, 12), f"{s.data}, {s.backbone}: mean change in rank by query augmentation")
    for i, (name, mean) in enumerate(zip(("<5", "5-10", "10-20", "20+"), means)):
        x, y = 70 + 120 * i, 190 - mean * scale
        color = "#c4161c" if mean > 0 else "#0a7d28"
        draw.rectangle((x, min(y, 190), x + 70, max(y, 190)), color)
        label = f"{mean:+.3f}" if changes[i] else "none"
        text((x + 35, y - 18 if mean > 0 else y + 4), label)
        text((x + 35, 345), f"{name}\n{len(changes[i])} queries")
    draw.line((50, 190, 530, 190), "black")
    text((280, 380), "length of the query in tokens; below the line is better")
    return image

def evenly_spread(count, number):
    """Up to `number` different indices below `count`. The k that is added makes both kinds of the
    synthetic queries occur, which alternate."""
    number = min(number, count)
    return [k + min(k * count // number, count - number) for k in range(number)]

def draw_examples(argv, s, device, number=4):
    """Figure 4 for a few test queries -> PIL image."""
    model, clips, queries = query_ranks(runs_of(argv, [], 1, device)[0], s, device)
    rows = []
    for i in evenly_spread(len(queries), number):
        query = queries[i]
        path, _, start, end = clips[query.clip]
        frames = sample_frames(path, model.config.num_frames, model.image_size, start, end)
        words, before, after = interactions(model, query.text, frames)
        title = f"{query.text}   ({Path(path).name}, rank {query.rank['FV']} of {len(clips)})"
        rows.append((title, words, frames, before.cpu(), after.cpu()))
    return draw_interactions(rows)

# ---- Command line --------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table", type=int, choices=[1, 2, 3, 4, 5, 6, 7, 8, 11, 12], default=0)
    what.add_argument("--figure", type=int, choices=[3, 4], default=0)
    parser.add_argument("--seeds", type=int, default=1, help="runs per row, from --seed on")
    args, argv = parser.parse_known_args(argv)
    if WORLD > 1:
        raise InputError("tables are made by one process: run train.py under torchrun, and the "
                         "table will reuse its runs")
    if args.table == 11:
        argv = ["--data", "msrvtt", *argv]
    s = parse_settings(argv)
    if s.out or s.resume or s.eval_only or args.seeds < 1:
        raise InputError("--out, --resume and --eval-only are of one run; --seeds is at least 1")
    device = pick_device(s.device)
    kind = "figure" if args.figure else "table" if args.table else "seeds"
    name = f"runs/{kind}-{args.figure or args.table or args.seeds}-{Path(s.data).stem}"
    if args.figure:
        draw = draw_augmentation if args.figure == 3 else draw_examples
        image = draw(argv, s, device)
        image.save(f"{name}.png")
        print(f"{name}.png")
        return
    text = (runs_table(args.table) if args.table in (1, 2) else
            queries_table(argv, s, device) if args.table == 6 else
            cost_table(s, device) if args.table == 11 else
            trained_table(args.table, argv, s, args.seeds, device))
    Path("runs").mkdir(exist_ok=True)
    write_file(f"{name}.md", f"{text}\n".encode())
    print(f"{text}\n\n{name}.md")

if __name__ == "__main__":
    run_main(main, "extras.reproduce")
