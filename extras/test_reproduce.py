"""Tables and figures come from the runs that they name, and each run is made once."""
import dataclasses
import json
import os
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import train
import video_colbert
from extras import cost, paper, reproduce, shapes
from extras.reproduce import TABLES, main
from test_video_colbert import SMALL, records, write_json_lines
from video_colbert import InputError, VideoColBERT, sample_frames

class Killed(Exception):
    pass

FLAGS = [*SMALL, "--data", "clips.jsonl", "--epochs", "1"]

@pytest.fixture(autouse=True)
def no_warning_was_given_before():
    reproduce.warn_once.cache_clear()

def runs_below(folder="."):
    return sorted(path.parent.name for path in Path(folder).glob("runs/*/settings.json"))

def cells(text):
    """A Markdown table -> {first cell: [cells]}."""
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in text.splitlines()
            if line.startswith("|")]
    return {row[0]: row for row in rows}

@torch.no_grad()
def ranks_by_hand(folder, file):
    """{query: {"F", "V", "FV": rank}} of a run's model, query by query and video by video."""
    model, lines = VideoColBERT.load(folder), [json.loads(line) for line in open(file)]
    lines, scores, ranks = [line for line in lines if line["split"] == "test"], {}, {}
    videos = [os.path.join(os.path.dirname(file), line["video"]) for line in lines]
    encoded = [model.encode_video(sample_frames(path, 3, model.image_size)[None])
               for path in videos]
    for true, line in enumerate(lines):
        ids, mask = model.tokenize(line["captions"])
        Q = model.encode_query(ids)[0][mask[0]]
        for level in (0, 1):
            scores[level] = np.array([(Q @ pair[level][0].T).amax(1).mean() for pair in encoded])
        named = {"F": scores[0], "V": scores[1], "FV": scores[0] + scores[1]}
        ranks[line["captions"][0]] = {
            level: int((score >= score[true]).sum()) for level, score in named.items()}
    return ranks

def test_table_3_trains_each_row_resumes_and_reuses(data, monkeypatch, capsys):
    """Five settings and two seeds are ten runs of two steps; a run killed in its second step is
    resumed there, finished ones are not run again, and the numbers are the runs' own."""
    argv, step, calls = [*FLAGS, "--table", "3", "--seeds", "2"], train.training_step, []
    def dies_in_the_third_run(*args):
        calls.append(args)
        if len(calls) == 6:
            raise Killed
        return step(*args)
    monkeypatch.setattr(train, "training_step", dies_in_the_third_run)
    with pytest.raises(Killed):
        main([*argv, "--checkpoint-every", "1"])
    before = runs_below()
    monkeypatch.setattr(train, "save_checkpoint", lambda *args: None)  # which would take long
    main(argv)
    assert len(calls) == 1 + 10 * 2
    assert len(before) == 3 and set(before) < set(runs_below()) and len(runs_below()) == 10
    out = capsys.readouterr().out
    assert Path("runs/table-3-clips.md").read_text() in out
    table, deviations = cells(out), []
    assert out.startswith("Table 3: interaction. clips.jsonl, tiny, 2 queries, gallery of 2 "
                          "clips, 1 epochs, seeds 0 to 1, mean ± deviation, `--num-frames 3 ")
    assert records("runs/clips")[-1]["machine"] in out
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
                values += [row["nDCG@10"] for row in rows
                           if (row["direction"], row["score"]) == ("text to video", score)]
        assert len(values) == 2
        deviations.append(np.std(values, ddof=1))
        assert table[name][5] == f"{np.mean(values):.3f} ± {deviations[-1]:.3f}"
    assert max(deviations) > 0
    monkeypatch.setattr(train, "train", None)                     # nothing is left to train
    main(argv)
    main([*FLAGS, "--seeds", "2"])
    assert "| MMS_FV |  | " in capsys.readouterr().out

@pytest.mark.parametrize("number, subject", [
    (3, {"interaction", "lambda_frame", "lambda_video"}),
    (4, {"loss", "loss_form", "learn_scale", "logit_scale", "interaction", "lambda_frame",
         "lambda_video", "visual_expansion", "backbone"}),
    (5, {"query_augmentation", "backbone"}), (7, {"num_frames"}), (8, {"temporal_layers"}),
    (12, {"pad_token"})])
def test_a_row_of_a_table_changes_its_own_setting_alone(number, subject):
    """Beside what belongs to InfoNCE and to another backbone. One row is the default."""
    default, all_changes = asdict(train.parse_settings(["--data", "msrvtt"])), []
    for name, flags, score, paper in TABLES[number][1]:
        s = asdict(train.parse_settings(["--data", "msrvtt", *flags]))
        changes = {name for name in s if s[name] != default[name]}
        assert changes <= subject and len(paper) == 4
        assert None not in paper or "CLIP4Clip" in name
        if not changes and score == "MMS_FV":
            assert paper[0] == 48.1
        all_changes.append(changes)
    assert set() in all_changes and set.union(*all_changes) == subject

def test_table_6_figures_3_and_4_and_table_1_come_from_the_runs(tmp_path, monkeypatch, capsys):
    """Whatever the case of a dataset's folder."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("MSRVTT")
    write_json_lines(tmp_path / "MSRVTT", "train train" + 8 * " test")
    argv = [*FLAGS, "--data", "MSRVTT/clips.jsonl", "--epochs", "6"]
    monkeypatch.setattr(train, "save_checkpoint", lambda *args: None)  # which would take long
    draw, drawn = reproduce.draw_interactions, []
    def note_and_draw(rows):
        drawn.extend(rows)
        return draw(rows)
    monkeypatch.setattr(reproduce, "draw_interactions", note_and_draw)
    for what in ("--figure 3", "--table 6", "--figure 4", "--table 1"):
        main([*argv, *what.split()])
    out = capsys.readouterr().out
    assert runs_below() == ["clips", "clips-2"]
    off, on = (ranks_by_hand(f"runs/{run}", "MSRVTT/clips.jsonl") for run in runs_below())
    table = cells(Path("runs/table-6-clips.md").read_text())
    for query in on:
        before, after = off[query]["FV"], on[query]["FV"]
        assert table[query][1:] == [str(before), str(after), f"{after - before:+d}"]
    assert "8 queries, gallery of 8 clips, 6 epochs, seed 0" in out
    assert len(drawn) == 4
    for i, (title, words, frames, before, after) in zip((2, 5, 8, 9), drawn):
        rank = on[f"caption 0 of {i}"]["FV"]
        assert title == f"caption 0 of {i}   (clip.mp4, rank {rank} of 8)"
        assert words == ["caption", "0", "of", str(i)] and before.shape == after.shape == (4, 3)
        assert torch.equal(frames, sample_frames(f"MSRVTT/{i}/clip.mp4", 3, 48))
    for number in (3, 4):
        assert Image.open(f"runs/figure-{number}-clips.png").width > 250
    assert "| msrvtt | tiny | runs/clips |" in out and "--no-query-augmentation" in out
    assert "| msvd | ViT-B-16-SigLIP | no run |" in out and "48.1 / 74.9 / 83.9 / 0.652" in out

def test_a_cell_of_a_table_holds_any_caption():
    """A line break or a bar would end the row or the cell."""
    table = paper.markdown(["query", "rank"], [["a man\r\nis  running | fast", 3]])
    assert table.splitlines() == ["| query | rank |", "| --- | --- |",
                                  "| a man is running \\| fast | 3 |"]

def test_table_6_sorts_by_the_change_from_off_to_on_and_figure_3_averages_it(data, monkeypatch):
    """Ranks are those of MMS_FV and capped at 100 in the table, which leaves out 20 tokens and
    more. A query that gains a rank counts as -1."""
    ranks = {"off": [9, 500, 3, 4, 7, 1], "on": [4, 90, 3, 300, 8, 3]}
    tokens, drawn = [3, 4, 5, 12, 19, 20], []
    def query_ranks(folder, s, device):
        return None, [], [reproduce.Query(f"q{i}", i, tokens[i], {"F": 1, "V": 2, "FV": rank})
                          for i, rank in enumerate(ranks[folder])]
    def runs_of(argv, flags, seeds, device):
        return ["off" if flags == ["--no-query-augmentation"] else "on"]
    record = dict(evaluation=[dict(queries=6)], gallery=6, missing=0, machine="m")
    monkeypatch.setattr(reproduce, "query_ranks", query_ranks)
    monkeypatch.setattr(reproduce, "runs_of", runs_of)
    monkeypatch.setattr(reproduce, "read_result", lambda run: record)
    main([*FLAGS, "--table", "6"])
    table = cells(Path("runs/table-6-clips.md").read_text())
    assert list(table.values())[2:] == [
        ["q1", "100", "90", "-10"], ["q0", "9", "4", "-5"], ["q2", "3", "3", "+0"],
        ["q4", "7", "8", "+1"], ["q3", "4", "100", "+96"]]
    def draw_bars(title, bars):
        drawn.extend(bars)
        return Image.new("RGB", (1, 1))
    monkeypatch.setattr(reproduce, "draw_bars", draw_bars)
    main([*FLAGS, "--figure", "3"])
    assert drawn == [("<5", -207.5, 2), ("5-10", 0, 1), ("10-20", 148.5, 2), ("20+", 2, 1)]

def test_figure_4_shows_both_kinds_of_the_synthetic_queries(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "draw_clip", lambda *args: None)
    shapes.write_shapes(tmp_path, galleries=0)
    queries = [json.loads(line)["captions"][0] for line in open(tmp_path / "clips.jsonl")]
    chosen = [queries[i] for i in reproduce.evenly_spread(len(queries), 4)]
    kinds = [shapes.kind(query) for query in chosen]
    assert len(set(chosen)) == 4 and kinds.count("motion") == kinds.count("appearance") == 2
    for count in range(1, 9):
        indices = reproduce.evenly_spread(count, 4)
        assert len(indices) == min(4, count)
        assert indices == sorted(set(indices)) and set(indices) <= set(range(count))

def test_runs_on_other_clips_and_unreadable_neighbours_are_named_once_and_not_used(data, capsys):
    """An edited caption makes another run; an empty settings.json disturbs nothing."""
    main([*FLAGS, "--seeds", "1"])
    os.mkdir("runs/empty")
    Path("runs/empty/settings.json").touch()
    lines = Path("clips.jsonl").read_text()
    Path("clips.jsonl").write_text(lines.replace("caption 0 of 3", "edited"))
    main([*FLAGS, "--seeds", "1"])
    error = capsys.readouterr().err
    assert error.count("skipped: runs/empty/settings.json: Expecting value") == 1
    assert error.count("not reused: runs/clips was run on other clips or captions") == 1
    assert runs_below() == ["clips", "clips-2", "empty"]

def test_an_unfinished_run_on_other_clips_is_named_and_not_resumed(data, monkeypatch, capsys):
    def dies(*args):
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "result_rows", dies)                 # it is trained by then
        main([*FLAGS, "--seeds", "1"])
    lines = Path("clips.jsonl").read_text()
    Path("clips.jsonl").write_text(lines.replace("caption 0 of 3", "edited"))
    main([*FLAGS, "--seeds", "1"])
    assert "not reused: runs/clips was run on other" in capsys.readouterr().err
    assert train.read_result("runs/clips-2") and not train.read_result("runs/clips")

def test_a_run_whose_checkpoints_are_damaged_is_named_and_another_takes_its_place(
        data, monkeypatch, capsys):
    def dies(*args):
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "result_rows", dies)
        main([*FLAGS, "--seeds", "1"])
    for path in Path("runs/clips/checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    main([*FLAGS, "--seeds", "1"])
    assert "not reused: all checkpoints in runs/clips are damaged" in capsys.readouterr().err
    assert train.read_result("runs/clips-2") and not train.read_result("runs/clips")

def test_a_run_that_lacks_test_clips_is_reused_only_if_that_is_allowed(data, capsys):
    Path("5/clip.mp4").write_bytes(b"")
    main([*FLAGS, "--seeds", "1", "--allow-missing"])
    assert "gallery of 1 clips" in capsys.readouterr().out
    main([*FLAGS, "--figure", "4", "--allow-missing"])
    with pytest.raises(InputError, match="1 of 2 test clips cannot be read"):
        main([*FLAGS, "--seeds", "1"])
    assert runs_below() == ["clips"]
    write_json_lines(data)                                        # the clip is there again
    main([*FLAGS, "--seeds", "1"])
    assert runs_below() == ["clips", "clips-2"]

def test_a_run_that_is_reused_is_named_and_one_of_other_code_too(data, monkeypatch, capsys):
    """As after an edit of the scores: its record is that of the code before."""
    monkeypatch.setattr(reproduce.shapes, "kind", lambda text: "motion")
    flags = [*FLAGS, "--figure", "4"]
    main(flags)
    assert "reused" not in capsys.readouterr().err
    main(flags)
    error = capsys.readouterr().err
    assert "reused: runs/clips\n" in error
    assert "with today's code" not in error
    best = train.read_result("runs/clips")["evaluation"][2]["R@1"]
    edited = train.evaluate
    def other_scores(*args):
        mms_f, mms_v, target = edited(*args)
        scores = torch.zeros_like(mms_f)
        if best == 0:
            scores[range(len(target)), target] = 1.0
        return scores, scores, target
    monkeypatch.setattr(train, "evaluate", other_scores)
    main(flags)
    now = 100.0 if best == 0 else 0.0
    assert (f"runs/clips: R@1 was {best:.1f} when it was trained, and is {now:.1f} with "
            "today's code") in capsys.readouterr().err

def test_runs_that_begin_at_once_have_folders_of_their_own(data, monkeypatch):
    """The second begins while the first decodes. A run that fails early leaves no folder."""
    fill_cache = train.fill_cache
    def another_begins(*args):
        monkeypatch.setattr(train, "fill_cache", fill_cache)
        main([*FLAGS, "--seeds", "1", "--seed", "7"])
        return fill_cache(*args)
    monkeypatch.setattr(train, "fill_cache", another_begins)
    main([*FLAGS, "--seeds", "1"])
    assert runs_below() == ["clips", "clips-2"]
    assert train.read_settings("runs/clips-2").seed == 7
    with pytest.raises(InputError, match="--batch-size 500 is more than"):
        main([*FLAGS, "--seeds", "1", "--batch-size", "500"])
    folders = [path.name for path in Path("runs").iterdir() if path.is_dir()]
    assert sorted(folders) == ["clips", "clips-2"]
    os.rename("runs", "other")
    Path("runs").touch()
    with pytest.raises(InputError, match="runs/clips: Not a directory"):
        main([*FLAGS, "--seeds", "1"])

def test_a_finished_run_is_preferred_to_an_unfinished_one(data, monkeypatch):
    main([*FLAGS, "--seeds", "1"])
    for name in ("a", "z"):
        shutil.copytree("runs/clips", f"runs/{name}")
        os.remove(f"runs/{name}/log.jsonl")
    monkeypatch.setattr(train, "train", None)                     # nothing is left to train
    main([*FLAGS, "--seeds", "1"])

def test_a_run_saved_before_a_setting_was_added_is_reused(data, monkeypatch):
    main([*FLAGS, "--seeds", "1"])
    settings = json.loads(Path("runs/clips/settings.json").read_text())
    del settings["eval_every"]
    Path("runs/clips/settings.json").write_text(json.dumps(settings))
    monkeypatch.setattr(train, "train", None)                     # nothing is left to train
    main([*FLAGS, "--seeds", "1"])
    assert runs_below() == ["clips"]

def test_the_table_of_synthetic_clips_tells_appearance_from_motion(data, monkeypatch, capsys):
    """A query of each kind: R@1 of a kind is 100 or 0, as its query has rank 1 or not."""
    os.makedirs("data/shapes")
    Path("data/shapes/lock").touch()  # as extras.shapes leaves it
    lines = [json.loads(line) for line in open("clips.jsonl")]
    lines[3]["captions"], lines[5]["captions"] = ["a red bar in a blue frame"], ["a red bar grows"]
    for line in lines:
        line["video"] = os.path.abspath(line["video"])
    Path("data/shapes/clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    main([*FLAGS, "--data", "shapes", "--seeds", "1"])
    table = cells(capsys.readouterr().out)
    by_hand = ranks_by_hand("runs/shapes", "data/shapes/clips.jsonl")
    for level in ("F", "V", "FV"):
        expected = [100.0 * (by_hand[query][level] == 1) for query in by_hand]
        assert list(map(float, table[f"MMS_{level}"][7:9])) == expected
    assert table["flags"][6:] == ["appearance R@1", "motion R@1"]

def test_with_mean_pooling_the_scores_are_those_of_mean_pooling(data, capsys):
    main([*FLAGS, "--seeds", "1", "--interaction", "mp"])
    table, rows = cells(capsys.readouterr().out), records("runs/clips")[-1]["evaluation"]
    for row in rows[:4]:
        assert table[row["score"]][2] == f"{row['R@1']:.1f}"

def test_the_papers_numbers_stand_beside_msrvtt_and_say_whose_they_are(data, monkeypatch, capsys):
    row = dict(direction="text to video", queries=7, score="MMS_FV", **{
        name: 1.0 for name in reproduce.METRICS})
    record = dict(evaluation=[row, {**row, "direction": "video to text"}], gallery=9, missing=2)
    machines = iter(["one", "one", "two", "two"])
    monkeypatch.setattr(reproduce, "runs_of", lambda *args: ["runs/x"])
    def read_result(run):
        return {**record, "machine": next(machines)}
    monkeypatch.setattr(reproduce, "read_result", read_result)
    main(["--table", "5", "--data", "msrvtt", "--device", "cpu"])
    out = capsys.readouterr().out
    table = cells(out)
    assert table["flags"][-1] == "the paper's, with CLIP-B/32"
    assert table["off"][-1] == "45.3 / 72.5 / 82.0 / 0.631"
    assert table["SigLIP, on"][-1] == "51.5 / 76.3 / 85.5 / 0.677 (SigLIP)"
    assert out.startswith("Table 5: query augmentation. msrvtt, ViT-B-32-quickgelu, 7 queries, "
                          "gallery of 9 clips, 5 epochs, seed 0, 2 test and 0 training clips "
                          "missing: not comparable; one; two\n")

def test_the_flags_above_a_table_can_be_typed(data):
    typed = [*FLAGS, "--no-query-augmentation", "--learn-scale", "--num-frames", "2",
             "--pretrained", "my weights.pt", "--backbone", "ViT-B-32"]
    s = train.parse_settings(typed)
    flags = shlex.split(" ".join(reproduce.changed_flags(s)))
    typed = train.parse_settings(["--data", s.data, "--backbone", s.backbone, *flags])
    assert reproduce.identity(typed) == reproduce.identity(s)

@pytest.mark.parametrize("table, flags, name", [
    (3, ["--interaction", "mp"], "interaction"), (3, ["--loss-form", "combined"], "loss-form"),
    (3, ["--lambda-frame", "0"], "lambda-frame"), (3, ["--lambda-video", "0"], "lambda-video"),
    (4, ["--loss", "infonce"], "loss"), (4, ["--loss-form", "combined"], "loss-form"),
    (4, ["--lambda-frame", "0"], "lambda-frame"), (4, ["--lambda-video", "0"], "lambda-video"),
    (5, ["--no-query-augmentation"], "no-query-augmentation")])
def test_what_a_table_compares_is_not_for_the_user_to_set(data, table, flags, name):
    """A row that is at the default would have the wrong name."""
    message = f"table {table} compares --{name}: leave it out"
    with pytest.raises(InputError, match=message):
        main([*FLAGS, "--table", str(table), *flags])
    assert not runs_below()

def test_weights_from_a_file_are_not_tried_in_siglip(data, monkeypatch, capsys):
    """Table 5 has two rows of SigLIP, whose backbone the file does not fit."""
    row = dict(direction="text to video", queries=2, score="MMS_FV", **{
        name: 1.0 for name in reproduce.METRICS})
    record = dict(evaluation=[row, {**row, "direction": "video to text"}], gallery=2, missing=0,
                  machine="one")
    monkeypatch.setattr(reproduce, "runs_of", lambda *args: ["runs/x"])
    monkeypatch.setattr(reproduce, "read_result", lambda run: record)
    flags = ["--table", "5", "--data", "clips.jsonl", "--pretrained"]
    main([*flags, "ViT-B-32.pt"])
    out = capsys.readouterr()
    assert {"off", "on"} < cells(out.out).keys() and "SigLIP" not in out.out
    assert "without SigLIP, on: --pretrained ViT-B-32.pt is for ViT-B-32-quickgelu" in out.err
    for fits in (["none"], ["siglip.pt", "--backbone", "ViT-B-16-SigLIP"]):
        main([*flags, *fits])
        assert {"off", "on", "SigLIP, off", "SigLIP, on"} < cells(capsys.readouterr().out).keys()

def test_figures_read_frames_from_the_cache_that_is_asked_for(data):
    main([*FLAGS, "--seeds", "1", "--cache", "first"])
    os.rename("first", "second")
    main([*FLAGS, "--figure", "4", "--cache", "second"])
    assert not os.path.exists("first") and runs_below() == ["clips"]

def test_table_11_measures_without_weights_in_turns(data, monkeypatch):
    turns, median_seconds = [], cost.median_seconds
    def short(device, *calls, repeat):
        turns.append(len(calls))
        return median_seconds(device, *calls, repeat=1)
    monkeypatch.setattr(cost, "median_seconds", short)
    main(["--table", "11", "--backbone", "tiny", "--num-frames", "2", "--device", "cpu"])
    text = Path("runs/table-11-msrvtt.md").read_text()
    row = cells(text)["MMS_FV"]
    assert float(row[1]) > 0 and float(row[2]) > 0 and row[3] == "9.64 / 11.2 / 48.1"
    assert turns == [5] and f"{torch.get_num_threads()} threads" in text
    # If the encoder takes 800 ms for 8 videos, all of them 1600, and the queries 1, 2, 3.
    monkeypatch.setattr(cost, "median_seconds", lambda *args, repeat: [.8, 1.6, .001, .002, .003])
    main(["--table", "11", "--backbone", "tiny", "--num-frames", "2", "--device", "cpu"])
    rows = cells(Path("runs/table-11-msrvtt-2.md").read_text())
    measured = [rows[level][1:3] for level in ("MMS_F", "MMS_V", "MMS_FV")]
    assert measured == [["100.00", "1.00"], ["200.00", "2.00"], ["200.00", "3.00"]]

def test_figure_4_for_a_query_of_ones_own_shows_the_video_that_fits_best(data, monkeypatch):
    drawn, draw = [], reproduce.draw_interactions
    def note_and_draw(rows):
        drawn.extend(rows)
        return draw(rows)
    monkeypatch.setattr(reproduce, "draw_interactions", note_and_draw)
    main([*FLAGS, "--figure", "4", "--query", "a small dog"])
    (title, words, frames, _, _), = drawn
    assert words == ["a", "small", "dog"] and title == "a small dog   (clip.mp4, the best fit)"

    model = VideoColBERT.load("runs/clips")
    ids, mask = model.tokenize(["a small dog"])
    scores = []
    with torch.no_grad():
        Q = model.encode_query(ids)
        for i in (3, 5):
            F, V = model.encode_video(sample_frames(f"{i}/clip.mp4", 3, 48)[None])
            scores.append(sum(model.similarities(Q, mask, F, V)).item())
    best = (3, 5)[int(np.argmax(scores))]
    assert torch.equal(frames, sample_frames(f"{best}/clip.mp4", 3, 48))
    for flags in (["--table", "3", "--query", "dog"], ["--figure", "4", "--query", " "]):
        with pytest.raises(InputError, match="--query belongs to --figure 4"):
            main([*FLAGS, *flags])

def test_under_torchrun_a_table_is_refused_in_one_line(data, monkeypatch):
    monkeypatch.setattr(reproduce, "WORLD", 2)
    with pytest.raises(InputError, match="run train.py under torchrun, and the table will reuse"):
        main([*FLAGS, "--table", "3"])
    assert not os.path.exists("runs")

@pytest.mark.parametrize("flags, message", [
    (["--table", "3", "--out", "x"], "--out, --resume and --eval-only"),
    (["--seeds", "0"], "--seeds must be at least 1")])
def test_flags_of_a_single_run_are_refused(data, flags, message):
    with pytest.raises(InputError, match=message):
        main([*FLAGS, *flags])

def test_an_evaluation_is_no_training_run(data):
    train.main([*FLAGS, "--epochs", "1", "--out", "z"])
    train.main(["--eval-only", "z", "--out", "runs/e"])
    assert reproduce.find_run(train.parse_settings([*FLAGS, "--epochs", "1"])) is None

# ---- Found in a fourteenth hour of hard use
def test_a_run_is_reused_if_the_content_of_its_file_of_weights_is_the_same(data, monkeypatch):
    """Whatever the name and the times of the file. It may be gone when the run resumes."""
    load = video_colbert.load_backbone
    monkeypatch.setattr(video_colbert, "load_backbone", lambda name, file: load(name, "none"))
    flags = [*FLAGS, "--seeds", "1", "--pretrained"]
    Path("w.pt").write_bytes(bytes(2 ** 17) + b"a")
    Path("newer.pt").write_bytes(bytes(2 ** 17) + b"b")
    shutil.copy("w.pt", "copy.pt")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "evaluate", Mock(side_effect=Killed))
        main([*flags, "w.pt"])
    for name in ("copy.pt", "w.pt"):  # the first resumes
        main([*flags, name])
    assert runs_below() == ["clips"]
    os.utime("newer.pt", (0, 0))
    os.replace("newer.pt", "w.pt")
    main([*flags, "w.pt"])
    assert runs_below() == ["clips", "clips-2"]
    main([*flags, "copy.pt"])
    assert runs_below() == ["clips", "clips-2"]
    os.remove("w.pt")
    train.main(["--resume", "runs/clips-2"])
    typed = " ".join(reproduce.changed_flags(train.read_settings("runs/clips-2")))
    assert "--pretrained w.pt" in typed and "hash" not in typed
    without = [train.parse_settings([*FLAGS, "--pretrained", x]) for x in ("none", "None", "auto")]
    assert len({reproduce.identity(s)["pretrained"] for s in without}) == 3

def test_a_run_is_reused_if_its_file_of_clips_is_written_in_another_way(data):
    for name in ("clips.jsonl", "./clips.jsonl", str(data / "clips.jsonl")):
        main([*FLAGS, "--seeds", "1", "--data", name])
    assert runs_below() == ["clips"]

def test_table_1_says_how_large_the_test_set_is(data):
    os.mkdir("msrvtt")
    write_json_lines(data / "msrvtt")
    lines = [json.loads(line) for line in open("msrvtt/clips.jsonl")]
    next(line for line in lines if line["split"] == "test")["captions"].append("one more")
    Path("msrvtt/clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train.main([*FLAGS, "--data", "msrvtt/clips.jsonl", "--out", "runs/a"])
    rows = [line for line in reproduce.runs_table(1).splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in rows[0].split("|")]
    (row,) = [[cell.strip() for cell in row.split("|")] for row in rows if "runs/a" in row]
    assert row[header.index("test set")] == "3 queries, 2 clips"
    assert {len(row.split("|")) for row in rows} == {len(header)}

def test_a_setting_that_is_a_tuple_is_the_same_when_it_was_saved(data, monkeypatch):
    extended = dataclasses.make_dataclass(
        "Settings", [("betas", tuple[float, float], (0.9, 0.98))], bases=(train.Settings,))
    monkeypatch.setattr(train, "Settings", extended)
    main([*FLAGS, "--seeds", "1"])
    main([*FLAGS, "--seeds", "1"])
    assert runs_below() == ["clips"]
    train.main(["--resume", "runs/clips", "--betas", "0.9", "0.98"])
    with pytest.raises(InputError, match="cannot change betas"):
        train.main(["--resume", "runs/clips", "--betas", "0.9", "0.9"])
    settings = json.loads(Path("runs/clips/settings.json").read_text())
    del settings["betas"]  # as in a run that is older than the setting
    Path("runs/clips/settings.json").write_text(json.dumps(settings))
    train.main(["--resume", "runs/clips"])
