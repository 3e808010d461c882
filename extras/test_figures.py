"""The figures show what the model computes, where it belongs."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from extras import figures
from extras.figures import draw_bars, draw_interactions, interactions, load_font
from video_colbert import Config, InputError, VideoColBERT

def pixels(*shape):
    return torch.randint(0, 256, (*shape, 3, 48, 48), dtype=torch.uint8)

def test_interactions_are_each_words_similarity_to_each_frame():
    """Subword tokens are averaged; start, end and pads have no place. The paper's figure is
    without visual expansion, so frames are those of a model that has no expansion tokens."""
    torch.manual_seed(0)
    model = VideoColBERT(Config(backbone="tiny", num_frames=6)).eval()
    plain = VideoColBERT(Config(backbone="tiny", num_frames=6, visual_expansion=0)).eval()
    weights = model.state_dict()
    weights["temporal.visual_expansion"] = weights["temporal.visual_expansion"][:0]
    plain.load_state_dict(weights)

    frames = pixels(6)
    words, before, after = interactions(model, "a doggedly  small dog", frames)
    with torch.no_grad():
        ids, _ = model.tokenize(["a doggedly small dog"])
        Q = model.encode_query(ids)[0]
        F, V = plain.encode_video(frames[None])
        _, with_expansion = model.encode_video(frames[None])
    assert words == ["a", "doggedly", "small", "dog"]
    assert len(model.tokenizer.encode("doggedly")) == 2
    tokens = torch.stack([Q[1], (Q[2] + Q[3]) / 2, Q[4], Q[5]])
    assert (before - tokens @ F[0].T).abs().max() < 1e-6
    assert (after - tokens @ V[0].T).abs().max() < 1e-6
    assert (V[0] - with_expansion[0, :6]).abs().max() > 1e-4
    assert model.temporal.visual_expansion.shape == (2, 64)

    words, before, _ = interactions(model, "dog " * 50, frames[:3])
    assert words == ["dog"] * 30 and before.shape == (30, 3)  # a long query is cut
    words, before, after = interactions(model, " ", frames)
    assert words == [] and before.shape == after.shape == (0, 6)

def ink(image, channel):
    """Where a picture, right of its margin, is of one colour: (points, 2)."""
    strip = np.asarray(image)[:, 8:].astype(int)
    others = np.delete(strip, channel, axis=-1).max(-1)
    return np.argwhere(strip[..., channel] > others + 60)

def test_figure_4_puts_each_word_above_and_below_the_frame_it_picks():
    frames = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    picks = torch.eye(4)[1:2], torch.eye(4)[3:4]
    image = draw_interactions([("", ["dog"], frames, *picks)])
    green, red = ink(image, 1), ink(image, 0)
    assert set(green[:, 1] // 96) == {1} and set(red[:, 1] // 96) == {3}
    assert green[:, 0].max() < red[:, 0].min()

    # All of six words are drawn, to the last line.
    six = [sim.repeat(6, 1) for sim in picks]
    image = draw_interactions([("", ["dog"] * 6, frames, *six)])
    for channel in (1, 0):
        rows = np.unique(ink(image, channel)[:, 0])
        assert 0 < rows.min() and rows.max() < image.height - 2
        assert np.count_nonzero(np.diff(rows) > 2) == 5

def test_figure_4_wraps_its_title_and_shows_at_most_12_frames_those_that_words_picked():
    """Of 64 black frames the two that are picked are white."""
    frames = torch.zeros(64, 3, 64, 64, dtype=torch.uint8)
    frames[[20, 50]] = 255
    sims = torch.eye(64)[20:21], torch.eye(64)[50:51]
    short = draw_interactions([("words", ["dog"], frames, *sims)])
    long = draw_interactions([("many words " * 40, ["dog"], frames, *sims)])
    assert long.width == short.width < 1300 and long.height > short.height + 60
    for image in (short, long):
        row = np.asarray(image)[-60 - 25]  # through the strip of frames
        whites = (row[8:].min(1) > 250).reshape(-1, 96)[:, 10:80].all(1)
        assert whites.sum() == 2

def test_words_of_other_alphabets_have_letters_if_the_system_has_dejavu(monkeypatch):
    """Without that font there are boxes, but no error."""
    try:
        ImageFont.truetype("DejaVuSans.ttf", 12)
    except OSError:
        pytest.skip("no DejaVu Sans")
    masks = [bytes(load_font(12).getmask(letter)) for letter in "жщéλ"]
    assert len(set(masks)) == 4
    truetype = ImageFont.truetype
    def not_installed(font, *args, **kwargs):
        if font == "DejaVuSans.ttf":
            raise OSError
        return truetype(font, *args, **kwargs)
    monkeypatch.setattr(ImageFont, "truetype", not_installed)
    assert bytes(load_font(12).getmask("ж")) == bytes(load_font(12).getmask("щ"))

def test_rows_of_figure_4_are_below_one_another():
    frames, sims = torch.zeros(4, 3, 64, 64, dtype=torch.uint8), torch.eye(4)[:1]
    row = ("title", ["dog"], frames, sims, sims)
    one, two = draw_interactions([row]), draw_interactions([row, row])
    assert np.array_equal(np.asarray(two), np.concatenate([one, one]))

def test_figure_3_draws_an_improvement_below_the_line_in_green():
    image = draw_bars("title", [("<5", -2.0, 3), ("5-10", 0.0, 0), ("10-20", 1.0, 4)])
    green, red = ink(image, 1) + (0, 8), ink(image, 0) + (0, 8)
    assert set(green[:, 1]) == set(range(70, 141)) and green[:, 0].max() == 310
    assert set(red[:, 1]) == set(range(310, 381)) and red[:, 0].min() == 130

def test_a_picture_that_is_too_large_for_its_format_is_one_line(tmp_path):
    with pytest.raises(InputError, match="hits.webp: .*limit of 16383 pixels"):
        figures.save_picture(Image.new("RGB", (8, 16400)), tmp_path / "hits.webp")
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("name", ["a.png", "A.JPG", "a.jpeg", "a.webp"])
def test_a_picture_is_saved_in_the_format_of_its_ending(tmp_path, name):
    figures.check_picture(tmp_path / name)
    figures.save_picture(Image.new("RGB", (8, 6)), tmp_path / name)
    formats = {"a.png": "PNG", "a.webp": "WEBP"}
    assert Image.open(tmp_path / name).format == formats.get(name, "JPEG")
