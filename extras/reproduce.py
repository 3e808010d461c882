"""The paper's tables and figures, by the runs that they need.

    python -m extras.reproduce --table 3 --seeds 3  # trains, resumes or reuses runs
    python -m extras.reproduce --figure 4           # which frame each word picks
    python -m extras.reproduce --seeds 3            # the scores of one setting, three seeds
    python -m extras.reproduce --table 5 --data msrvtt --root /data/MSRVTT

Tables 1 to 8, 11 and 12, figures 3 and 4; all other flags are train.py's. A run in runs/
with the same settings, clips and file of weights is reused, or resumed if it is not
finished. The result is printed and kept in runs/, beside earlier ones.
"""
import argparse
import contextlib
import io
import itertools
import os
import shlex
import statistics
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import train
from extras import shapes
from extras.figures import draw_bars, draw_interactions, interactions, keep
from extras.cost import cost_table
from extras.paper import (
    BACKBONES, COMPARED, METRICS, SIGLIP, TABLES, markdown, quote, show)
from train import (
    MAY_CHANGE, WORLD, parse_settings, pick_device, read_result, read_settings, run_main)
from video_colbert import (
    InputError, VideoColBERT, mms_fv, ranks, reciprocal_rank_fusion, sample_frames)

# ---- Runs
@cache
def warn_once(message):
    print(message, file=sys.stderr)

def all_runs():
    """Every run in runs/ whose settings can be read -> [(folder, Settings)]."""
    runs = []
    for path in sorted(Path("runs").glob("*/settings.json")):
        try:
            runs.append((path.parent, read_settings(path.parent)))
        except InputError as error:
            warn_once(f"skipped: {error}")
    return runs

# Settings that do not make two runs different.
IGNORED = MAY_CHANGE - {"data", "eval_only"}

def identity(s):
    """The settings that make one run differ from another. The file of clips counts by its
    real path, the file of weights by its content."""
    settings = train.as_saved(s)
    settings["data"] = os.path.realpath(s.data)
    settings["pretrained"] = s.pretrained_hash or s.pretrained
    return {name: value for name, value in settings.items() if name not in IGNORED}

def find_run(s):
    """The folder of a run with these settings and clips, a finished one first, or None."""
    data_id = train.data_hash(train.load_clips(s))
    wanted = identity(s)
    unfinished = None
    for folder, saved in all_runs():
        if identity(saved) != wanted:
            continue
        try:
            record = read_result(folder)
            state = record or train.load_checkpoint(folder)
        except InputError as error:
            warn_once(f"not reused: {error}")
            continue
        if state and state.get("data") != data_id:
            warn_once(f"not reused: {folder} was run on other clips or captions")
        elif record and missing_note(record) and not s.allow_missing:
            warn_once(f"not reused: {folder} lacks clips, see --allow-missing")
        elif record:
            return folder
        else:
            unfinished = unfinished or folder
    return unfinished

def new_folder(s):
    """Make runs/NAME or, if that exists, runs/NAME-2 and so on."""
    folder = Path("runs", Path(s.data).stem)
    for number in itertools.count(2):
        with train.user_errors(folder, OSError), contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        folder = Path("runs", f"{Path(s.data).stem}-{number}")

def runs_of(argv, flags, seeds, device):
    """The folders of the finished runs that the flags and seeds ask for: found, resumed or
    trained now."""
    folders = []
    for k in range(seeds):
        s = parse_settings([*argv, *flags])
        s = replace(s, seed=s.seed + k)
        found = find_run(s)
        if found:
            warn_once(f"{'reused' if read_result(found) else 'resumed'}: {found}")
            # Its file of weights may have had another name.
            s = replace(s, resume=str(found), pretrained=read_settings(found).pretrained)
            folders.append(train.run(s, device))
            continue
        folder = new_folder(s)
        try:
            folders.append(train.run(replace(s, out=str(folder)), device))
        finally:
            # If the run has failed before it began.
            with contextlib.suppress(OSError):
                folder.rmdir()
    return folders

class Query(NamedTuple):
    text: str
    clip: int  # index among the test clips
    tokens: int  # without start and end
    rank: dict  # of F, V, FV and RRF, 1 is best

def query_ranks(folder, s, device):
    """A finished run's model on its test clips -> model, clips, [Query]. The place of the data,
    cache, workers and allow_missing are those of `s`, all other settings are the run's."""
    model = VideoColBERT.load(folder).to(device)
    saved = replace(read_settings(folder), epochs=0, data=s.data, root=s.root, cache=s.cache,
                    workers=s.workers, allow_missing=s.allow_missing)
    clips = train.load_clips(saved)["test"]
    clips = train.fill_cache(clips, "test", saved, model.image_size)
    mms_f, mms_v, target = train.evaluate(model, clips, saved, device)
    sims = {"F": mms_f, "V": mms_v, "FV": mms_fv(mms_f, mms_v),
            "RRF": reciprocal_rank_fusion(mms_f, mms_v)}
    rank = {level: ranks(sim).gather(1, target[:, None]) for level, sim in sims.items()}

    then = result(read_result(folder), "text to video", "FV")["R@1"]
    now = 100 * (rank["FV"] == 1).double().mean().item()
    if abs(then - now) > 1:
        warn_once(f"{folder}: R@1 was {then:.1f} when it was trained, and is {now:.1f} with "
                  "today's code, data or device; move it out of runs/ to train again")
    special = int(model.real_tokens(model.tokenize([""])[0]).sum())
    texts = [caption for clip in clips for caption in clip.captions]
    tokens = model.real_tokens(model.tokenize(texts)[0]).sum(dim=1) - special
    queries = []
    for i, text in enumerate(texts):
        rank_of_query = {level: int(rank[level][i]) for level in rank}
        queries.append(Query(text, int(target[i]), int(tokens[i]), rank_of_query))
    return model, clips, queries

# ---- Tables
def changed_flags(s):
    """The settings that change the result and differ from the defaults of their data and
    backbone, as flags."""
    default = train.as_saved(parse_settings(["--data", s.data, "--backbone", s.backbone]))
    skipped = IGNORED | {"pretrained_hash"}
    flags = []
    for name, value in train.as_saved(s).items():
        flag = name.replace("_", "-")
        if value == default[name] or name in skipped:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag} {shlex.quote(str(value))}")
    return flags

def missing_note(record):
    train_clips = record.get("missing_train", 0)  # older runs do not say
    if record["missing"] or train_clips:
        return (f"{record['missing']} test and {train_clips} training clips missing: "
                "not comparable")

def describe(title, s, records, seeds=1):
    """The line above a table: what was measured, how, and where."""
    first, seed_note = records[0], f"seed {s.seed}"
    if seeds > 1:
        seed_note = f"seeds {s.seed} to {s.seed + seeds - 1}, mean ± deviation"
    parts = [s.data, s.backbone, f"{first['evaluation'][0]['queries']} queries",
             f"gallery of {first['gallery']} clips", f"{s.epochs} epochs", seed_note]
    notes = [missing_note(record) for record in records]
    parts += dict.fromkeys(note for note in notes if note)
    if changed_flags(s):
        parts.append(f"`{' '.join(changed_flags(s))}`")
    machines = dict.fromkeys(record["machine"] for record in records)
    return f"{title}. {', '.join(parts)}; {'; '.join(machines)}"

def result(record, direction, level):
    """The metrics of F, V, FV or RRF in a run's record, whatever the interaction."""
    for row in record["evaluation"]:
        if row["direction"] == direction and row["score"].rpartition("_")[2] == level:
            return row

def trained_table(number, argv, s, seeds, device):
    """A table of rows that are each trained, as Markdown: mean and standard deviation over
    seeds. For the synthetic clips also R@1 by what a query is about."""
    title, rows = TABLES[number]
    for changed in changed_flags(s):
        flag = changed.split()[0]
        if flag in COMPARED.get(number, ()):
            raise InputError(f"table {number} compares {flag}: leave it out")
    kinds = ("appearance", "motion") if s.data == "shapes" else ()
    is_quoted = s.data == "msrvtt" and number > 0
    lines, all_records, queries = [], [], {}
    for name, flags, score, paper in rows:
        is_siglip = flags[:2] == SIGLIP
        if is_siglip and s.backbone not in BACKBONES:  # a tiny model's table is without it
            continue
        # A file or a tag of weights fits one backbone.
        if is_siglip and s.backbone != SIGLIP[1] and s.pretrained not in ("auto", "none"):
            warn_once(f"without {name}: --pretrained {s.pretrained} is for {s.backbone}")
            continue
        folders = runs_of(argv, flags, seeds, device)
        records = [read_result(folder) for folder in folders]
        all_records += records
        # With --interaction mp, the row of MMS_F shows MP_F.
        level = score.rpartition("_")[2]
        if number == 0:
            name = name.replace("MMS", s.interaction.upper())
        line = [name, f"`{' '.join(flags)}`" if flags else ""]
        for metric in METRICS:
            values = [result(record, "text to video", level)[metric] for record in records]
            line.append(show(metric, values))
        line.append(show("R@1", [result(record, "video to text", level)["R@1"]
                                 for record in records]))

        for folder in folders if kinds else ():
            if folder not in queries:
                queries[folder] = query_ranks(folder, s, device)[2]
        for kind in kinds:
            recalls = []
            for folder in folders:
                ranked = [q.rank[level] for q in queries[folder] if shapes.kind(q.text) == kind]
                recalls.append(100 * ranked.count(1) / len(ranked))
            line.append(show("R@1", recalls))
        if is_quoted:
            line.append(quote(paper) + " (SigLIP)" * is_siglip)
        lines.append(line)

    header = ["", "flags", *METRICS, "video to text R@1", *(f"{kind} R@1" for kind in kinds)]
    if is_quoted:
        header.append("the paper's, with CLIP-B/32")
    return describe(title, s, all_records, seeds) + "\n\n" + markdown(header, lines)

def runs_table(number):
    """Tables 1 and 2 as Markdown: the existing runs of each dataset and backbone."""
    lines, runs = [], [(folder, s, read_result(folder)) for folder, s in all_runs()]
    for data in ("msrvtt", "msvd", "vatex") if number == 1 else ("didemo", "activitynet"):
        here = [run for run in runs if data in Path(run[1].data.lower()).with_suffix("").parts
                and run[1].interaction == "mms" and run[2]]
        for backbone in dict.fromkeys([*BACKBONES, *(s.backbone for _, s, _ in here)]):
            paper = BACKBONES.get(backbone, {}).get(data)
            quoted = quote(paper) if paper else ""
            found = [run for run in here if run[1].backbone == backbone]
            if not found:
                lines.append([data, backbone, "no run", "", "", *[""] * len(METRICS), quoted])
            for folder, s, record in found:
                changes = changed_flags(s)
                if missing_note(record):
                    changes.append(missing_note(record))
                row = result(record, "text to video", "FV")
                size = f"{row['queries']} queries, {record['gallery']} clips"
                numbers = [show(metric, [row[metric]]) for metric in METRICS]
                lines.append([data, backbone, folder, size, " ".join(changes), *numbers, quoted])
    header = ["dataset", "backbone", "run", "test set", "changed settings", *METRICS,
              "the paper's"]
    return f"Table {number}: the runs in runs/, MMS_FV\n\n{markdown(header, lines)}"

def augmentation(argv, s, device):
    """Two runs, without and with query augmentation -> their records, and for each query
    (text, number of tokens, rank without, rank with)."""
    folders = [runs_of(argv, [flag], 1, device)[0]
               for flag in ("--no-query-augmentation", "--query-augmentation")]
    without, with_it = [query_ranks(folder, s, device)[2] for folder in folders]
    moved = [(a.text, a.tokens, b.rank["FV"], a.rank["FV"]) for b, a in zip(without, with_it)]
    return [read_result(folder) for folder in folders], moved

def queries_table(argv, s, device, number=5):
    """Table 6 as Markdown: the queries of fewer than 20 tokens that query augmentation moves
    most, ranks capped at 100."""
    records, queries = augmentation(argv, s, device)
    moved = [(query, min(before, 100), min(after, 100))
             for query, tokens, before, after in queries if tokens < 20]
    moved.sort(key=lambda row: row[2] - row[1])
    chosen = moved[:number] + moved[max(number, len(moved) - number):]
    lines = [[query, before, after, f"{after - before:+d}"]
             for query, before, after in chosen]
    title = "Table 6: the queries that query augmentation improves and degrades most"
    header = ["query", "rank before", "rank after", "change"]
    return describe(title, s, records) + "\n\n" + markdown(header, lines)

# ---- Figures
def draw_augmentation(argv, s, device):
    """Figure 3: the mean change in rank by the length of the query -> PIL image."""
    changes = {"<5": [], "5-10": [], "10-20": [], "20+": []}
    for _, tokens, before, after in augmentation(argv, s, device)[1]:
        place = sum(tokens >= edge for edge in (5, 10, 20))
        list(changes.values())[place].append(after - before)
    bars = [(name, statistics.mean(part) if part else 0.0, len(part))
            for name, part in changes.items()]
    return draw_bars(f"{s.data}, {s.backbone}: mean change in rank by query augmentation", bars)

def evenly_spread(count, number):
    """Up to `number` different indices below `count`. Adding k makes both kinds of the
    synthetic queries occur, which alternate."""
    number = min(number, count)
    return [k + min(k * count // number, count - number) for k in range(number)]

def draw_examples(argv, s, device, number=4):
    """Figure 4 for a few test queries -> PIL image."""
    folder, = runs_of(argv, [], 1, device)
    model, clips, queries = query_ranks(folder, s, device)
    rows = []
    for i in evenly_spread(len(queries), number):
        query = queries[i]
        note = f"rank {query.rank['FV']} of {len(clips)}"
        rows.append(example_row(model, query.text, clips[query.clip], note))
    return draw_interactions(rows)

def example_row(model, text, clip, note):
    """A row of Figure 4: title, words, frames, similarities before and after."""
    frames = sample_frames(clip.path, model.config.num_frames, model.image_size,
                           clip.start, clip.end)
    words, before, after = interactions(model, text, frames)
    title = f"{text}   ({Path(clip.path).name}, {note})"
    return title, words, frames, before.cpu(), after.cpu()

def draw_own_query(argv, s, device, text):
    """Figure 4 for a query of one's own and the test video that fits it best -> PIL image."""
    folder, = runs_of(argv, [], 1, device)
    model, clips, _ = query_ranks(folder, s, device)
    saved = replace(read_settings(folder), cache=s.cache)
    asked = [replace(clip, captions=[text]) for clip in clips]
    mms_f, mms_v, _ = train.evaluate(model, asked, saved, device)
    best = int(mms_fv(mms_f, mms_v)[0].argmax())
    return draw_interactions([example_row(model, text, clips[best], "the best fit")])

# ---- Command line
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table", type=int, choices=[1, 2, 3, 4, 5, 6, 7, 8, 11, 12], default=0)
    what.add_argument("--figure", type=int, choices=[3, 4], default=0)
    parser.add_argument("--seeds", type=int, default=1, help="runs per row, from --seed on")
    parser.add_argument("--query", default="", help="Figure 4 for a query of your own")
    args, argv = parser.parse_known_args(argv)
    if args.query and (args.figure != 4 or not args.query.strip()):
        raise InputError("--query belongs to --figure 4, and needs a word")
    if WORLD > 1:
        raise InputError("tables are made by one process: run train.py under torchrun, and "
                         "the table will reuse its runs")
    if args.table == 11:
        argv = ["--data", "msrvtt", *argv]
    s = parse_settings(argv)
    if s.out or s.resume or s.eval_only:
        raise InputError("--out, --resume and --eval-only are not for tables and figures")
    if args.seeds < 1:
        raise InputError("--seeds must be at least 1")
    device = pick_device(s.device)

    data = Path(s.data).stem
    if args.figure:
        if args.query:
            image = draw_own_query(argv, s, device, args.query)
        elif args.figure == 4:
            image = draw_examples(argv, s, device)
        else:
            image = draw_augmentation(argv, s, device)
        content = io.BytesIO()
        image.save(content, "PNG")
        print(keep(content.getvalue(), Path(f"runs/figure-{args.figure}-{data}.png")))
        return
    path = Path(f"runs/table-{args.table}-{data}.md" if args.table
                else f"runs/seeds-{args.seeds}-{data}.md")
    if args.table in (1, 2):
        text = runs_table(args.table)
    elif args.table == 6:
        text = queries_table(argv, s, device)
    elif args.table == 11:
        text = cost_table(s, device)
    else:
        text = trained_table(args.table, argv, s, args.seeds, device)
    path = keep(f"{text}\n".encode(), path)
    print(text, "", path, sep="\n")

if __name__ == "__main__":
    run_main(main, "extras.reproduce")
