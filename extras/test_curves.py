"""The curves of a run show its log."""
import json
import sys

import numpy as np
import pytest
from PIL import Image

from extras import curves
from video_colbert import InputError

def write_log(folder, steps):
    lines = [dict(step=i, loss=20 - i, MMS_F=0.0, MMS_V=i / 20) for i in range(steps)]
    text = "\n".join(json.dumps(line) for line in [*lines, {"epoch": 0, "R@1": 3.0}])
    (folder / "log.jsonl").write_text(text)

def test_a_falling_loss_falls_and_the_panels_have_their_colours(tmp_path):
    write_log(tmp_path, 20)
    pixels = np.asarray(curves.draw_curves(tmp_path)).astype(int)
    assert pixels.shape == (curves.HEIGHT, 2 * curves.WIDTH, 3)
    left, right = pixels[40:, :curves.WIDTH], pixels[40:, curves.WIDTH:]
    inside = left[:curves.HEIGHT - 80, curves.MARGIN + 2:curves.WIDTH - 14]
    rows, columns = np.nonzero(inside.max(axis=-1) < 100)
    assert rows[columns < 40].mean() < rows[columns > 300].mean()
    is_red = right[..., 0] > right[..., 1] + 100
    is_green = right[..., 1] > right[..., 0] + 60
    assert is_red.any() and is_green.any()
    assert is_red.nonzero()[0].mean() < is_green.nonzero()[0].mean()  # MMS_V is above MMS_F

def test_the_command_draws_the_run_into_the_picture(tmp_path, monkeypatch, capsys):
    write_log(tmp_path, 20)
    picture = tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path), str(picture)])
    curves.main()
    assert capsys.readouterr().out == f"{picture}\n"
    assert np.array_equal(np.asarray(Image.open(picture)), curves.draw_curves(tmp_path))
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path / "no run"), "curves.xyz"])
    with pytest.raises(InputError, match="curves.xyz"):
        curves.main()

def test_a_point_is_the_mean_of_the_steps_before_it():
    assert curves.smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]

@pytest.mark.parametrize("steps", [None, 1])
def test_a_run_without_steps_is_one_line(tmp_path, steps):
    if steps:
        write_log(tmp_path, steps)
    with pytest.raises(InputError, match="log.jsonl"):
        curves.draw_curves(tmp_path)
