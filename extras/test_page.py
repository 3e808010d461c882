"""The page of hits plays each video at its moment, shows what the model computes, and can
be moved with its videos. A browser checks it, if Chromium and playwright are installed."""
import base64
import io
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import torch
from PIL import Image

from extras import page
from extras.figures import interactions
from extras.page import draw_cells, picture_address, write_page
from extras.search import find_hits, main
from extras.video_index import VideoIndex
from test_video_colbert import write_clip
from video_colbert import Config, InputError, Timing, VideoColBERT, sample_frames

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

ODD_NAMES = [
    b"<script>alert(1)<\\script>.mp4", b"\"onerror=alert(2) '.mp4",
    b"'><img src=x onerror=alert(3)>.mp4", b"50% #1?t=9&amp;.mp4", b"%41%2e.mp4",
    b"two\nlines\r\t.mp4", "ключ 🐕‍🦺 é.mp4".encode(), b"caf\xe9 \xff.mp4",
    b"javascript:alert(4).mp4", b"a ..mp4", "\u202egnp.mp4".encode()]

class Parser(HTMLParser):
    """A page as a list of elements: (tag, attributes, the text up to the next tag)."""
    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.text = []
        self.elements.append((tag, dict(attributes), self.text))

    def handle_endtag(self, tag):
        self.text = []

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag, name=None):
        """The elements of a tag, or one of their attributes."""
        found = [element for element in self.elements if element[0] == tag]
        return [element[1].get(name) for element in found] if name else found

    def texts(self, tag):
        return ["".join(text).strip() for _, _, text in self.all(tag)]

def parse(path):
    return Parser(Path(path).read_bytes().decode())

def target(address, folder):
    """The file that a relative address leads to from a folder, as bytes."""
    assert re.fullmatch("[A-Za-z0-9_.~%/-]+", address)
    path = os.path.join(os.fsencode(folder), unquote_to_bytes(address))
    return os.path.normpath(path)

def decode_picture(address):
    kind, data = address.split(",")
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), int)

def plain_picture(seed):
    color = np.random.default_rng(seed).integers(0, 256, 3)
    return np.full((32, 48, 3), color, np.uint8)

@pytest.fixture
def clips(tmp_path):
    """Clips of two seconds: five of one colour each, and one that grows lighter."""
    for i in range(5):
        write_clip(tmp_path / f"videos/below/{i}.mp4", 20, picture=plain_picture(i))
    write_clip(tmp_path / "videos/grows lighter.mp4", 20)
    return tmp_path / "videos"

def search_page(folder, tiny, path, query="a small dog", k=9, segment=0):
    """Index a folder and write the page of a query's hits -> the hits."""
    index, _ = VideoIndex.build(folder, tiny, Path(path).parent / "index", segment=segment)
    hits, = find_hits(index, tiny, [query], k)
    write_page(path, query, hits, tiny, segment)
    return hits

def scores(path):
    """[[score, F, V] of each hit], as the page has them."""
    pattern = r"<b>(.*)</b>\n= F&nbsp;(.*) \+ V&nbsp;(.*)</header>"
    found = re.findall(pattern, Path(path).read_text())
    return [[float(number) for number in numbers] for numbers in found]

@pytest.mark.parametrize("segment", [0, 1])
def test_a_page_has_the_hits_in_order_each_with_its_player_scores_and_frames(
        tmp_path, clips, tiny, segment):
    """A player starts with its hit, and stops with it if the index is of segments."""
    hits = search_page(clips, tiny, tmp_path / "hits.html", segment=segment)
    parsed = parse(tmp_path / "hits.html")
    assert parsed.texts("h1") == parsed.texts("title") == ["a small dog"]
    assert len(hits) == len(parsed.all("article")) >= 6
    assert parsed.texts("h2") == [f"{rank}." for rank in range(1, len(hits) + 1)]
    for hit, numbers in zip(hits, scores(tmp_path / "hits.html"), strict=True):
        assert numbers == [round(hit[name], 3) for name in ("score", "F", "V")]

    for hit, player in zip(hits, parsed.all("video"), strict=True):
        assert player[1]["preload"] == "metadata" and "controls" in player[1]
        address, moment = player[1]["src"].split("#t=")
        assert target(address, tmp_path) == os.fsencode(hit["path"])
        end = f",{hit['end']:.2f}" if segment else ""
        assert moment == f"{hit['start']:.2f}{end}"

    # A frame is in a cell of its own, the best one in one that is marked.
    kinds = [element[0] for element in parsed.elements]
    places = [n for n, kind in enumerate(kinds) if kind == "img"]
    marked = [parsed.elements[n - 1][1].get("class") for n in places]
    pictures = parsed.all("img", "src")
    for i, hit in enumerate(hits):
        part = (hit["start"], hit["end"]) if segment else ()
        frames = sample_frames(hit["path"], 6, 48, *part).permute(0, 2, 3, 1).numpy()
        for frame, picture in zip(frames, pictures[6 * i:6 * i + 6], strict=True):
            assert np.abs(decode_picture(picture) - frame).mean() < 3
        best = ["best" if n == hit["frame"] else None for n in range(6)]
        assert marked[6 * i:6 * i + 6] == best
    assert len(pictures) == 6 * len(hits)

@pytest.mark.parametrize("segment, start, end, clocks", [
    (2, 4.0, 10.0, ["00:05.0", "00:07.0", "00:09.0"]),
    (0, 0.0, 2.0, ["00:02.0", "00:06.0", "00:10.0"]),
    (0, 0.0, 5.0, ["00:02", "00:08", "00:12"]), (15, 0.0, 15.0, ["00:02", "00:08", "00:12"]),
    (14.9, 0.0, 14.9, ["00:02.5", "00:07.4", "00:12.4"])])
def test_the_times_of_frames_are_those_of_the_hit_or_of_the_whole_video(
        segment, start, end, clocks):
    """With a tenth of a second if there are less than five seconds from frame to frame."""
    seconds = 12.0 if end == 2.0 else 15.0
    timing = Timing(np.array([3000, 3500]), 3000 + 1000 * seconds, 0.001, True)
    hit = {"start": start, "end": end}
    assert page.frame_clocks(hit, 3, timing, segment) == clocks

def test_the_tables_are_each_words_similarity_to_each_frame(tmp_path, clips, tiny):
    """Before and after the temporal transformer; the largest of a word is outlined, and a
    colour is the same number on the whole page."""
    hits = search_page(clips, tiny, tmp_path / "hits.html")
    parsed = parse(tmp_path / "hits.html")
    assert parsed.all("tbody", "class") == ["F", "V"] * len(hits)
    sims = []
    for hit in hits:
        frames = sample_frames(hit["path"], 6, 48)
        words, before, after = interactions(tiny, "a small dog", frames)
        sims += [before, after]
    assert words == ["a", "small", "dog"]
    sims = torch.stack(sims).view(-1, 6)  # (hits 2 words, frames)

    values = torch.tensor([float(text) for text in parsed.texts("td")]).view(-1, 6)
    assert (values - sims).abs().max() < 0.0051
    picks = torch.tensor([name == "pick" for name in parsed.all("td", "class")])
    picks = picks.view(-1, 6).int()
    assert picks.sum() == len(sims) and (picks.argmax(1) == sims.argmax(1)).all()
    styles = parsed.all("td", "style")
    heats = torch.tensor([float(style.removeprefix("--heat:")) for style in styles])
    expected = 0.75 * (sims - sims.min()) / (sims.max() - sims.min())
    assert (heats.view(-1, 6) - expected).abs().max() < 0.0051
    rows = [text for text in parsed.texts("th") if text in words]
    assert rows == words * 2 * len(hits)

def test_a_number_just_below_zero_has_no_sign_and_equal_numbers_no_colour():
    cells = Parser(draw_cells(torch.tensor([-0.001, 0.5, -0.5]), -1, 1))
    assert cells.texts("td") == ["0.00", "0.50", "-0.50"]
    cells = Parser(draw_cells(torch.tensor([0.5, 0.5]), 0.5, 0.5))
    assert cells.all("td", "style") == ["--heat:0.00"] * 2

@pytest.mark.parametrize("size, shown", [(224, 96), (48, 48)])
def test_pictures_are_small_whatever_the_model_sees(size, shown):
    frame = torch.full((3, size, size), 200, dtype=torch.uint8)
    picture = decode_picture(picture_address(frame))
    assert picture.shape == (shown, shown, 3) and np.abs(picture - 200).max() < 3

@pytest.mark.parametrize("segment, clocks", [
    (0, ["00:00.2", "00:00.5", "00:00.8", "00:01.2", "00:01.5", "00:01.8"]),
    (40, ["00:03", "00:10", "00:17", "00:23", "00:30", "00:37"])])
def test_below_each_frame_is_its_time(tmp_path, tiny, segment, clocks):
    seconds = segment or 2
    write_clip(tmp_path / "videos/a.mp4", seconds, times=range(seconds), rate=1)
    search_page(tmp_path / "videos", tiny, tmp_path / "hits.html", segment=segment)
    # The parser gives the text after a picture to the picture.
    assert parse(tmp_path / "hits.html").texts("img") == clocks

def test_a_moment_counts_from_the_files_zero_as_players_do(tmp_path, tiny):
    """Search counts from the first frame, which is here shown after three seconds."""
    write_clip(tmp_path / "videos/late.mp4", 20, times=range(30, 50))
    for segment in (0, 1):
        path = tmp_path / f"{segment}/hits.html"
        hits = search_page(tmp_path / "videos", tiny, path, segment=segment)
        for hit, address in zip(hits, parse(path).all("video", "src"), strict=True):
            moments = address.split("#t=")[1].split(",")
            expected = [3 + hit["start"], 3 + hit["end"]][:segment + 1]
            assert moments == [f"{moment:.2f}" for moment in expected]

def odd_clips(folder):
    for i, name in enumerate(ODD_NAMES):
        clip = write_clip(folder / "a.mp4", 20, picture=plain_picture(i))
        os.rename(clip, os.path.join(os.fsencode(folder), name))
    return folder

def test_names_and_queries_inject_nothing_and_addresses_are_bytes(tmp_path, tiny):
    folder = odd_clips(tmp_path / "100% \"odd\" #1 <b>")
    query = "<script>alert(1)</script> \"dog\" 'x' &amp; </title><b>\udcff\x1b"
    hits = search_page(folder, tiny, tmp_path / "hits.html", query, k=20)
    parsed = parse(tmp_path / "hits.html")
    assert {tag for tag, _, _ in parsed.elements} == {
        "html", "meta", "title", "style", "h1", "article", "header", "h2", "a", "bdi", "b",
        "video", "div", "table", "thead", "tbody", "tr", "th", "td", "img", "span", "p"}
    assert {name for _, names, _ in parsed.elements for name in names} == {
        "lang", "charset", "name", "content", "dir", "href", "controls", "playsinline",
        "preload", "src", "class", "colspan", "style", "alt"}
    shown = query.replace("\udcff\x1b", "\ufffd\ufffd")
    assert parsed.texts("h1") == parsed.texts("title") == [shown]
    assert len(parsed.all("article")) == len(ODD_NAMES) == len(hits)

    paths = {os.path.join(os.fsencode(folder), name) for name in ODD_NAMES}
    assert {target(address, tmp_path) for address in parsed.all("a", "href")} == paths
    players = [address.split("#t=")[0] for address in parsed.all("video", "src")]
    assert players == parsed.all("a", "href")
    names = [f"{folder.name}/{os.fsdecode(name)}" for name in ODD_NAMES]
    readable = [re.sub("[\n\r\t\udce9\udcff]", "\ufffd", name) for name in names]
    assert sorted(parsed.texts("bdi")) == sorted(readable)

def test_videos_that_are_gone_or_damaged_say_so_and_others_are_shown(
        tmp_path, clips, tiny):
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    hits, = find_hits(index, tiny, ["a dog"], 3)
    os.unlink(hits[0]["path"])
    Path(hits[1]["path"]).write_bytes(b"x")
    write_page(tmp_path / "hits.html", "a dog", hits, tiny)
    parsed = parse(tmp_path / "hits.html")
    gone, damaged, _ = parsed.texts("p")
    assert gone == "missing or unreadable: No such file or directory"
    assert damaged == "missing or unreadable: Invalid data found when processing input"
    assert len(parsed.all("video")) == 1 and len(parsed.all("img")) == 6
    assert len(parsed.all("h2")) == 3

    # All are gone, and no number is left.
    shutil.rmtree(clips)
    write_page(tmp_path / "hits.html", "a dog", hits, tiny)
    assert len(parse(tmp_path / "hits.html").all("p")) == 4

def test_search_and_explain_write_a_page(tmp_path, monkeypatch, capsys, clips, tiny):
    """A video that is explained has the scores and the moment of a search. With --html
    and without --out there is no picture."""
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    for folder, segment in (("parts", "1"), ("index", "0")):
        main(["index", "videos", "--model", "model", "--out", folder, "--segment", segment,
              "--device", "cpu"])
        main(["search", folder, "a dog", "-k", "3", "--html", "a.HTML", "--device", "cpu"])
        addresses = parse("a.HTML").all("video", "src")
        assert ["," in address for address in addresses] == [folder == "parts"] * 3
    for hit in find_hits(VideoIndex.load("index"), tiny, ["a dog"], 9)[0]:
        capsys.readouterr()
        command = ["explain", "a dog", hit["path"], "--model", "model", "--device", "cpu"]
        main([*command, "--html", "why.htm"])
        assert capsys.readouterr().out.splitlines()[-1] == "why.htm"
        for number, name in zip(scores("why.htm")[0], ("score", "F", "V"), strict=True):
            assert abs(number - hit[name]) < 0.002  # an index has half precision
        player, = parse("why.htm").all("video", "src")
        assert player.endswith(f"#t={hit['start']:.2f}")
    assert not os.path.exists("explain.png")
    main([*command, "--html", "why.htm", "--out", "why.png"])
    assert os.path.exists("why.png")

def test_a_query_without_words_has_frames_and_no_numbers(tmp_path, clips, tiny):
    """The tokenizer resolves what looks like HTML, here into a space."""
    search_page(clips, tiny, tmp_path / "hits.html", "&nbsp;", k=2)
    parsed = parse(tmp_path / "hits.html")
    assert len(parsed.all("img")) == 12 and not parsed.all("td")

@pytest.mark.parametrize("command, message", [
    ("search index x --html hits.txt", "^hits.txt: a page's name ends in .html$"),
    ("search index x --html hits", "^hits: a page's name ends in .html$"),
    ("search index x --html no/hits.html", "^no/hits.html: no such folder$"),
    ("explain x a.mp4 --model model --html a.png", "^a.png: a page's name ends in .html$"),
    ("explain x a.mp4 --model model --html no/a.html", "^no/a.html: no such folder$"),
    ("explain x no.mp4 --model model --html a.html", "^no.mp4: No such file or directory$"),
    ("explain . a.mp4 --model model --html folder.html", "^folder.html: Is a directory$")])
def test_what_cannot_be_done_is_one_line_and_writes_nothing(
        tmp_path, monkeypatch, tiny, command, message):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    write_clip(tmp_path / "a.mp4")
    os.mkdir("folder.html")
    before = sorted(os.listdir())
    with pytest.raises(InputError, match=message):
        main([*command.split(), "--device", "cpu"])
    assert sorted(os.listdir()) == before

def test_a_full_disk_is_one_line_and_leaves_the_page_as_it_was(
        tmp_path, clips, tiny, monkeypatch):
    path = tmp_path / "hits.html"
    path.write_text("before")
    def full(file):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("train.os.fsync", full)
    hit = dict(path=str(clips / "below/0.mp4"), score=0, F=0, V=0, start=0, end=1, frame=0)
    with pytest.raises(InputError, match=f"^{path}: No space left on device$"):
        write_page(path, "a dog", [hit], tiny)
    assert path.read_text() == "before"

# ---- In a browser
@pytest.fixture(scope="module")
def browser():
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"no {CHROMIUM}")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()

def open_page(browser, path, **context):
    """-> a tab with the page, all its players at their moment, and what went wrong."""
    tab, problems = browser.new_context(**context).new_page(), []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("requestfailed", lambda request: problems.append(request.url))
    tab.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    tab.goto(Path(path).as_uri())
    tab.wait_for_function("""[...document.querySelectorAll('video')].every(
        video => video.error || video.readyState > 1 && !video.seeking)""")
    return tab, problems

def players(tab):
    return tab.evaluate("""[...document.querySelectorAll('video')].map(
        video => ({time: video.currentTime, seconds: video.duration, width: video.videoWidth,
                   error: video.error && video.error.message}))""")

@pytest.mark.parametrize("segment", [0, 1])
def test_players_are_at_their_hits_also_after_the_folder_was_moved(
        tmp_path, clips, tiny, browser, segment):
    """First the page is beside its videos, then in another folder."""
    write_clip(clips / "late.mkv", 20, times=range(30, 50))
    for place in ("hits.html", "pages of hits/here/hits.html"):
        path = tmp_path / "all" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(clips, tmp_path / "all/videos", dirs_exist_ok=True)
        hits = search_page(tmp_path / "all/videos", tiny, path, segment=segment)
        for folder in ("all", "moved #1"):
            os.rename(tmp_path / "all", tmp_path / folder)
            tab, problems = open_page(browser, tmp_path / folder / place)
            for hit, player in zip(hits, players(tab), strict=True):
                first = 3 if "late" in hit["path"] else 0
                assert abs(player["time"] - first - hit["start"]) < 0.01
                assert player["width"] == 48 and player["error"] is None
            assert problems == []
            os.rename(tmp_path / folder, tmp_path / "all")

def test_a_player_of_a_segment_stops_at_its_end(tmp_path, clips, tiny, browser):
    hits = search_page(clips, tiny, tmp_path / "hits.html", segment=1)
    tab, _ = open_page(browser, tmp_path / "hits.html")
    i = [hit["end"] < 2 for hit in hits].index(True)
    tab.evaluate(f"document.querySelectorAll('video')[{i}].play()")
    tab.wait_for_function(f"document.querySelectorAll('video')[{i}].paused")
    assert abs(players(tab)[i]["time"] - hits[i]["end"]) < 0.3

def test_odd_names_play_and_inject_nothing(tmp_path, tiny, browser):
    folder = odd_clips(tmp_path / "100% \"odd\" #1 <b>")
    query = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    search_page(folder, tiny, tmp_path / "hits.html", query, k=20)
    tab, problems = open_page(browser, tmp_path / "hits.html")
    for player in players(tab):
        assert player["seconds"] == 2 and player["error"] is None
    assert tab.locator("video").count() == len(ODD_NAMES)
    assert tab.locator("script, bdi *, h1 *").count() == 0
    assert tab.locator("img").count() == 6 * len(ODD_NAMES)
    assert tab.title() == query and problems == []
    # The link leads to the file as well.
    assert tab.evaluate("""[...document.querySelectorAll('article')].every(article =>
        article.querySelector('video').src.split('#')[0] == article.querySelector('a').href)""")

@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_a_phone_and_is_readable_in_both_themes(
        tmp_path, browser, width, theme):
    """Only tables scroll sideways, each to its best frame, while its words stay. Every
    text has a contrast of at least 4.5 to what is behind it (WCAG AA)."""
    path = write_clip(tmp_path / f"{'averylongnamewithoutanyspace' * 7}.mp4", 20)
    hit = dict(path=str(path), score=1, F=0.5, V=0.5, start=1, end=1.125, frame=8)
    model = VideoColBERT(Config(backbone="tiny", num_frames=16)).eval()
    query = "supercalifragilisticexpialidocious dog " * 2
    write_page(tmp_path / "hits.html", query, [hit], model)
    size = dict(width=width, height=800)
    tab, problems = open_page(
        browser, tmp_path / "hits.html", viewport=size, color_scheme=theme)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert problems == []
    table = tab.locator(".scroll").first.bounding_box()
    word = tab.locator("tbody th").nth(1).bounding_box()
    best = tab.locator(".best").first.bounding_box()
    assert abs(word["x"] - table["x"]) < 6
    assert word["x"] + word["width"] <= best["x"]
    assert best["x"] + best["width"] <= width

    page = colors(tab, "body", "backgroundColor")[0, :3]
    assert (luminance(page) < 0.1) == (theme == "dark")
    selector = "h1, header, a, .quiet, .best, th span, td"
    texts, backs = colors(tab, selector, "color"), colors(tab, selector, "backgroundColor")
    assert len(texts) > 2 * 4 * 16
    alpha = backs[:, 3:]
    behind = luminance(alpha * backs[:, :3] + (1 - alpha) * page)
    text = luminance(texts[:, :3])
    contrast = (np.maximum(text, behind) + 0.05) / (np.minimum(text, behind) + 0.05)
    assert contrast.min() >= 4.5

def colors(tab, selector, name):
    """A colour of each element -> (elements, 4), red, green, blue and opacity."""
    styles = tab.locator(selector).evaluate_all(
        f"elements => elements.map(element => getComputedStyle(element).{name})")
    numbers = [re.findall(r"[\d.]+", style) for style in styles]
    return np.array([[*rgb, 1][:4] for rgb in numbers], float)

def luminance(rgb):
    """As WCAG defines it, of sRGB from 0 to 255."""
    x = rgb / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)
