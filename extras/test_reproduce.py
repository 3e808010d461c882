"""Tables and figures come from the runs that they name, and each run is made once."""
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from extras.reproduce import TABLES, main
from test_video_colbert import SMALL, Killed, records
from video_colbert import InputError

FLAGS = [*SMALL, "--data", "clips.jsonl", "--epochs", "1"]

def runs_below(folder="."):
    return sorted(path.parent.name for path in Path(folder).glob("runs/*/settings.json"))

def cells(text):
    """A Markdown table -> {first cell: [cells]}."""
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in text.splitlines()
            if line.startswith("|")]
    return {row[0]: row for row in rows}

def test_table_3_trains_each_row_resumes_and_reuses(data, monkeypatch, capsys):
    """Five settings and two seeds are ten runs; a killed one is resumed, finished ones are not run
    again, and the numbers are the runs' own."""
    argv, step, calls = [*FLAGS, "--table", "3", "--seeds", "2"], train.training_step, []
    def dies(*args):
        calls.append(args)
        if len(calls) == 6:
            raise Killed
        return step(*args)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "training_step", dies)
        main(argv)
    before = runs_below()
    main(argv)
    assert len(before) == 3 and set(before) < set(runs_below()) and len(runs_below()) == 10
    out = capsys.readouterr().out
    assert Path("runs/table-3-clips.md").read_text() in out
    table = cells(out)
    assert list(table)[2:] == ["MP on frames", "MP on video", "MMS_F", "MMS_V", "MMS_FV", "RRF"]
    assert table["MMS_F"][1] == "`--lambda-video 0`"
    for name, changes, score in (
            ("MP on video", dict(interaction="mp", lambda_frame=0), "MP_V"),
            ("MMS_V", dict(lambda_frame=0, interaction="mms"), "MMS_V"),
            ("RRF", dict(interaction="mms", lambda_frame=1, lambda_video=1), "RRF")):
        values = []
        for run in runs_below():
            settings = json.loads(Path("runs", run, "settings.json").read_text())
            if changes.items() <= settings.items():
                rows = records(f"runs/{run}")[-1]["evaluation"]
                values += [row["R@5"] for row in rows
                           if (row["direction"], row["score"]) == ("text to video", score)]
        assert len(values) == 2
        assert table[name][3] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    monkeypatch.setattr(train, "train", None)                     # nothing is left to train
    main(argv)
    main([*FLAGS, "--seeds", "2"])
    assert "| MMS_FV |  | " in capsys.readouterr().out

@pytest.mark.parametrize("number, subject", [
    (3, {"interaction", "lambda_frame", "lambda_video"}),
    (4, {"loss", "loss_form", "learn_scale", "logit_scale", "interaction", "lambda_frame",
         "lambda_video"}),
    (5, {"query_augmentation", "backbone"}), (7, {"num_frames"}), (8, {"temporal_layers"}),
    (12, {"pad_token"})])
def test_a_row_of_a_table_changes_its_own_setting_alone(number, subject):
    """Beside what belongs to InfoNCE and to another backbone. One row is the default."""
    default, all_changes = asdict(train.parse_settings(["--data", "msrvtt"])), []
    for _, flags, score, paper in TABLES[number][1]:
        s = asdict(train.parse_settings(["--data", "msrvtt", *flags]))
        changes = {name for name in s if s[name] != default[name]}
        assert changes <= subject and len(paper) == 4
        if not changes and score == "MMS_FV":
            assert paper[0] == 48.1
        all_changes.append(changes)
    assert set() in all_changes and set.union(*all_changes) == subject

def test_table_6_figures_3_and_4_and_table_1_come_from_the_runs(data, capsys):
    os.mkdir("msrvtt")
    os.rename("clips.jsonl", "msrvtt/clips.jsonl")
    for i in range(6):
        os.rename(f"{i}", f"msrvtt/{i}")
    argv = [*FLAGS, "--data", "msrvtt/clips.jsonl"]
    for what in ("--figure 3", "--table 6", "--figure 4", "--table 1"):
        main([*argv, *what.split()])
    out = capsys.readouterr().out
    assert len(runs_below()) == 2
    table = cells(Path("runs/table-6-clips.md").read_text())
    for query in ("caption 0 of 3", "caption 0 of 5"):
        _, before, after, change = table[query]
        assert int(after) - int(before) == int(change)
    for number in (3, 4):
        assert Image.open(f"runs/figure-{number}-clips.png").width > 250
    assert "| msrvtt | tiny | runs/clips |" in out and "--query-augmentation False" in out
    assert "| msvd | ViT-B-16-SigLIP | no run |" in out and "48.1 / 74.9 / 83.9 / 0.652" in out

def test_runs_on_other_clips_and_unreadable_neighbours_are_named_and_not_used(data, capsys):
    """An edited caption makes another run; an empty settings.json disturbs nothing."""
    main([*FLAGS, "--seeds", "1"])
    os.mkdir("runs/empty")
    Path("runs/empty/settings.json").touch()
    lines = Path("clips.jsonl").read_text()
    Path("clips.jsonl").write_text(lines.replace("caption 0 of 3", "edited"))
    main([*FLAGS, "--seeds", "1"])
    error = capsys.readouterr().err
    assert "skipped: runs/empty/settings.json does not hold settings" in error
    assert "not reused: runs/clips was run on other clips or captions" in error
    assert runs_below() == ["clips", "clips-2", "empty"]

def test_the_table_of_synthetic_clips_tells_appearance_from_motion(data, monkeypatch, capsys):
    """R@1 of all queries is the mean of the two kinds, each half of the queries."""
    os.makedirs("data/shapes")
    lines = [json.loads(line) for line in open("clips.jsonl")]
    lines[3]["captions"], lines[5]["captions"] = ["a red bar in a blue frame"], ["a red bar grows"]
    for line in lines:
        line["video"] = os.path.abspath(line["video"])
    Path("data/shapes/clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    main([*FLAGS, "--data", "shapes", "--seeds", "1"])
    row = cells(capsys.readouterr().out)["MMS_V"]
    assert (float(row[7]) + float(row[8])) / 2 == float(row[2])

def test_table_11_measures_without_weights(data, capsys):
    main(["--table", "11", "--backbone", "tiny", "--num-frames", "2", "--device", "cpu"])
    row = cells(Path("runs/table-11-msrvtt.md").read_text())["MMS_FV"]
    assert float(row[1]) > 0 and float(row[2]) > 0 and row[3] == "9.64 / 11.2"

@pytest.mark.parametrize("flags, message", [
    (["--table", "3", "--out", "x"], "--out, --resume and --eval-only"),
    (["--seeds", "0"], "--seeds is at least 1")])
def test_flags_of_a_single_run_are_refused(data, flags, message):
    with pytest.raises(InputError, match=message):
        main([*FLAGS, *flags])
