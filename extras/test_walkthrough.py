"""The walk-through runs from top to bottom, and what its text claims is so.

The notebook loads runs/shapes or runs/walkthrough from the folder in which it runs, and trains
the latter if neither is there. Here it runs in a folder with few clips, so training is short and
the model poor: what holds for a trained model only is checked in the outputs that are committed.
To write them again, run `python train.py` and then `jupyter execute --inplace
extras/walkthrough.ipynb`.
"""
import json
import math
import re
import shutil
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from extras.shapes import choose_clips, draw_clip

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "extras/walkthrough.ipynb"
SAVED = ["Q", "F", "V", "mask", "sim_F", "sim_V", "by_hand", "mms_f", "mms_v", "pair_F", "pair_V",
         "change_F", "order_F", "order_V", "scores", "rank", "boundary", "cosines", "each",
         "gradient", "difference", "is_word", "own"]

def write_clips(folder):
    """40 clips of the gallery and 64 to train on, as write_shapes writes them."""
    (folder / "videos").mkdir(parents=True)
    clips, lines = choose_clips(1), []
    for i in [*range(40), *range(240, 304)]:
        color, shape, frame, motion = clips[i]
        video = f"videos/{i}.mp4"
        draw_clip(folder / video, *clips[i], np.random.default_rng(i))
        captions = [f"a {color} {shape} in a {frame} frame", f"a {color} {shape} {motion}"]
        if i < 240:
            captions = [captions[(i + i // 10) % 2]]
        split = "test" if i < 240 else "train"
        lines.append(json.dumps({"video": video, "captions": captions, "split": split}))
    (folder / "clips.jsonl").write_text("\n".join(lines))
    (folder / "lock").touch()  # as extras.shapes leaves it

@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """The notebook after it ran in extras/ of a copy -> its variables, and its printed text."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    folder = tmp_path_factory.mktemp("walkthrough")
    for name in ("video_colbert.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "extras", folder / "extras", ignore=shutil.ignore_patterns("__*__"))
    (folder / "extras/__init__.py").touch()
    write_clips(folder / "data/shapes")

    notebook = nbformat.read(NOTEBOOK, 4)
    save = f"torch.save({{name: globals()[name] for name in {SAVED}}}, 'values.pt')"
    notebook.cells.append(nbformat.v4.new_code_cell(save))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        resources = {"metadata": {"path": str(folder / "extras")}}
        client = nbclient.NotebookClient(notebook, timeout=120, resources=resources)
        client.execute()  # raises if a cell fails
    assert (folder / "runs/walkthrough/model.safetensors").exists()
    values = torch.load(folder / "values.pt", weights_only=True)
    return values, printed(notebook.cells)

def printed(cells):
    """What the code cells printed, as one text."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    texts = [output["text"] for output in outputs if output.get("name") == "stdout"]
    return "\n".join("".join(text) for text in texts)

def numbers(text, label):
    """The numbers of the line that begins with `label`."""
    (line,) = [line for line in text.splitlines() if line.startswith(label)]
    return [float(x) for x in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", line.removeprefix(label))]

def test_the_vectors_have_unit_length_and_the_mean_of_the_maxima_is_mean_max_sim(walk):
    """Sections 2 to 5, against a loop in float64."""
    values, text = walk
    Q, F, V = (values[name].double() for name in "QFV")
    assert Q.shape == (1, 12, 64) and F.shape == (1, 6, 64) and V.shape == (1, 8, 64)
    for level, X in (("F", F), ("V", V)):
        assert (X.norm(dim=-1) - 1).abs().max() < 1e-6 > (Q.norm(dim=-1) - 1).abs().max()
        assert (values[f"sim_{level}"] - Q[0] @ X[0].T).abs().max() < 1e-6
        want = sum(max(float(q @ x) for x in X[0]) for q in Q[0]) / 12
        by_hand, by_code = numbers(text, f"MMS_{level} by hand")
        assert values["by_hand"][level] == pytest.approx(want, abs=1e-6)
        assert by_hand == pytest.approx(want, abs=1e-6) == by_code

def test_mms_f_knows_no_order_and_mms_v_does(walk):
    """Sections 6 and 7: the clip backwards, and in all orders of its 6 frames. After few steps of
    training the order matters little to MMS_V, but more than rounding, about 1e-7."""
    values, _ = walk
    for level, (low, high) in (("F", (0, 1e-6)), ("V", (5e-6, 2))):
        pair, order = values[f"pair_{level}"], values[f"order_{level}"]
        assert pair.shape == (2, 2) and order.shape == (1, 720)
        assert low <= (pair[:, 0] - pair[:, 1]).abs().max() <= high
        assert low <= order.max() - order.min() <= high
        assert abs(order[0, 0] - values[f"mms_{level.lower()}"]) < 1e-6
    assert values["change_F"].abs().max() < 1e-6 and len(values["change_F"]) == 20

def test_the_score_is_the_sum_and_the_rank_counts_the_videos_that_are_not_worse(walk):
    """Section 8."""
    values, _ = walk
    f, v, total = values["scores"].values()
    assert torch.equal(f + v, total) and total.shape == (40, 40)
    for level, sim in values["scores"].items():
        want = [sum(x >= row[i] for x in row) for i, row in enumerate(sim.tolist())]
        assert values["rank"][level].tolist() == want

def test_the_loss_has_its_boundary_at_011_and_a_raw_t_cannot_learn(walk):
    """Sections 10 and 11, against equation 6 in float64."""
    values, text = walk
    assert values["boundary"] == pytest.approx(0.11, abs=5e-4)
    assert values["each"][1, 1] == pytest.approx(math.log(2), abs=1e-5)
    by_hand, by_code = numbers(text, "sum / 3")
    want = sum(pair_loss(values["cosines"], i, j) for i, j in product(range(3), repeat=2)) / 3
    assert by_hand == pytest.approx(want, abs=1e-3) == by_code

    # Three batches: told apart, all equal, at the start.
    right, raw, wrong = (numbers(text, name) for name in ("right ", "raw t ", "-b "))
    assert right[0] < 1e-3 and right[1] > 10_000 and right[2] == pytest.approx(12.93, abs=0.01)
    assert raw[0] > 8 and raw[1] - raw[0] < 0.05
    assert wrong[2] == pytest.approx(127 * 12.93, rel=1e-3)

def pair_loss(sim, i, j):
    logit = math.exp(4.77) * float(sim[i, j]) - 12.93
    return math.log1p(math.exp(-logit if i == j else logit))

def test_the_gradient_pulls_true_pairs_and_pushes_negatives(walk):
    """Section 12, against finite differences in float64; t / 2 A on the boundary."""
    values, text = walk
    want, step = torch.zeros(3, 3, dtype=torch.float64), 1e-6
    for i, j in product(range(3), repeat=2):
        up, down = values["cosines"].double(), values["cosines"].double()
        up[i, j] += step
        down[i, j] -= step
        want[i, j] = (pair_loss(up, i, j) - pair_loss(down, i, j)) / (2 * step) / 3
    got = values["gradient"].double()
    assert (got - want).abs().max() < 1e-3
    assert (got.diag() < 0).all() and (got[~torch.eye(3, dtype=torch.bool)] >= 0).all()
    assert got[1, 1].item() == pytest.approx(-math.exp(4.77) / 6, abs=1e-3)
    assert numbers(text, "largest difference")[0] == pytest.approx(39.3, abs=0.05)

def test_the_dual_loss_pulls_at_the_level_that_errs_and_the_combined_loss_at_none(walk):
    """Section 13: cosines 0.05 and 0.40, whose sum is above the boundary."""
    _, text = walk
    t, b = math.exp(4.77), -12.93
    lines = [re.findall(r"-?\d+\.\d+", line) for line in text.splitlines() if "pull at F" in line]
    dual, combined = ([float(x) for x in line] for line in lines)
    weak, strong, both = (t / (1 + math.exp(t * x + b)) for x in (0.05, 0.40, 0.45))
    assert dual[1:] == pytest.approx([weak, strong], abs=1e-3) and weak > 117
    assert combined[1:] == pytest.approx([both, both], abs=1e-3) and both < 1e-3

def test_another_pad_changes_no_word(walk):
    """Section 14."""
    values, _ = walk
    difference, is_word = values["difference"], values["is_word"]
    assert difference[is_word].max() < 1e-6 and difference[~is_word].min() > 1e-3

# ---- The outputs that are committed, of the default run
@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]

def test_it_is_small_and_committed_as_it_ran_from_top_to_bottom(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert NOTEBOOK.stat().st_size <= 400_000
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    for before, cell in zip(cells, cells[1:]):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown" and cell["outputs"]
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error" and output.get("name") != "stderr"
    assert "runs/shapes: 30 epochs" in printed(cells)

def test_the_committed_model_tells_a_clip_from_its_reverse_by_v_only(cells):
    text = printed(cells)
    for query, own in (("after", 0), ("before", 1)):
        *f, first, second = numbers(text, f"a red square appears {query} a ball ")
        assert f[0] == f[1] and (first, second)[own] > (first, second)[1 - own] + 0.05
    assert "120 queries about motion; largest change of MMS_F 0e+00" in text
    times = re.search(r"MMS_V is higher for the clip .* backwards: (\d+) times", text)
    assert int(times[1]) > 90  # of 120, where chance is 60

def test_the_committed_gallery_has_a_query_that_only_the_sum_gets_right(cells):
    text = printed(cells)
    found = re.search(r": rank (\d+) by F, (\d+) by V, (\d+) by F \+ V", text)
    assert int(found[1]) > 1 < int(found[2]) and int(found[3]) == 1

def test_the_committed_dual_loss_divides_the_gradient_otherwise_than_the_combined_one(cells):
    """F errs more often than V, so alone it is pulled more."""
    ratios = [float(x) for x in re.findall(r"gradient at V = (\d+\.\d+)", printed(cells))]
    dual, combined = ratios
    assert dual > 1 > combined

def test_the_exercises_name_lines_and_tests_that_are_there(cells):
    code = (ROOT / "video_colbert.py").read_text()
    tests = (ROOT / "test_video_colbert.py").read_text()
    exercises = "".join(cells[-1]["source"])
    lines = re.findall(r" for `([^`]+)`", exercises)
    names = re.findall(r"`(test_\w+)`", exercises)
    assert len(lines) == 5 and len(names) >= 5
    for line in lines:
        assert code.count(line) == 1, line
    for name in names:
        assert f"def {name}(" in tests, name

def test_the_first_cell_continues_training_that_was_interrupted(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    notebook = json.loads(NOTEBOOK.read_text())
    cell = next("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    write_clips(tmp_path / "data/shapes")
    (tmp_path / "video_colbert.py").touch()  # as it finds the repository's root
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    calls, step = [], train.training_step
    def interrupted_once(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)
    monkeypatch.setattr(train, "training_step", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        exec(cell, {})
    exec(cell, variables := {})
    assert variables["run"] == "runs/walkthrough" and train.read_result("runs/walkthrough")

@pytest.mark.parametrize("num_frames, count", [(3, 6), (6, 720), (12, 720)])
def test_no_more_orders_are_tried_than_fit_into_memory(num_frames, count):
    """The paper's 12 frames have 479,001,600. Each is another one, the true one is first."""
    notebook = json.loads(NOTEBOOK.read_text())
    (cell,) = ["".join(c["source"]) for c in notebook["cells"] if "permutations(" in str(c)]
    lines = cell[:cell.index("shuffled = ")]
    variables = dict(torch=torch, settings=train.Settings(num_frames=num_frames))
    exec(lines, variables)
    orders = variables["orders"]
    assert orders.shape == orders.unique(dim=0).shape == (count, num_frames)
    assert orders[0].tolist() == list(range(num_frames))
