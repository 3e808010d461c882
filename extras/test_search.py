"""Search is exact, survives what happens to folders and processes, and engines agree with it."""
import copy
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import video_colbert
from extras import search
from extras.search import VideoIndex, as_multivector, draw_hits, fingerprint, main
from test_video_colbert import Killed, naive, unit, write_clip
from video_colbert import (Config, InputError, VideoColBERT, interactions, mean_max_sim, mms_fv,
                           sample_frames)

QUERIES = ["a dog", "a red square moves left", "something"]

@pytest.fixture
def clips(tmp_path):
    """A folder with 12 clips of one colour each, in two folders, and what is no clip."""
    root = tmp_path / "clips"
    for i in range(12):
        picture = np.full((32, 48, 3), np.random.default_rng(i).integers(0, 256, 3), np.uint8)
        write_clip(root / (f"below/{i} 🐕.mkv" if i % 3 else f"{i}.mp4"), 20, picture=picture)
    (root / "broken.mp4").write_bytes(b"x")
    (root / "link.mp4").symlink_to("nowhere")
    (root / "again").symlink_to(root)                             # a circle
    (root / "notes.txt").write_text("x")
    return root

@pytest.fixture
def encoded(monkeypatch, tiny):
    """A list that gets the number of videos of each call of encode_video."""
    counts, encode = [], tiny.encode_video
    def counted(frames):
        counts.append(len(frames))
        return encode(frames)
    monkeypatch.setattr(tiny, "encode_video", counted)
    return counts

def names(index):
    return [path for path, *_ in index.videos]

def test_search_is_the_brute_force_ranking(tmp_path, clips, tiny):
    """Scores are exact for the stored vectors and near those of float32; F + V is the score; the
    best frame and its time are right; broken files and links in circles do no harm."""
    index, problems = VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=5)
    assert "link.mp4: No such file" in problems[0] and "broken.mp4: " in problems[1]
    paths = [str(clips / name) for name in names(index)]
    assert len(problems) == 2 and len(set(paths)) == 12
    with torch.no_grad():
        F, V = tiny.encode_video(torch.stack([sample_frames(p, 6, 64) for p in paths]))
        ids, mask = tiny.tokenize(QUERIES)
        Q = tiny.encode_query(ids, mask)
    want = naive(Q, F, mask) + naive(Q, V, mask)
    stored = np.fromfile(tmp_path / "index/vectors-0.f16", np.float16).reshape(12, 14, 64)
    stored = torch.from_numpy(stored).double()
    exact = naive(Q.double(), stored[:, :6], mask) + naive(Q.double(), stored[:, 6:], mask)
    for q, hits in enumerate(VideoIndex.load(tmp_path / "index").search(tiny, QUERIES, 12)):
        scores = torch.tensor([hit["score"] for hit in hits])
        columns = [paths.index(hit["path"]) for hit in hits]
        assert sorted(columns) == list(range(12)) and (scores[:-1] >= scores[1:]).all()
        assert (scores - want[q, columns]).abs().max() < 2e-3
        assert (scores - exact[q, columns]).abs().max() < 1e-5
        for hit, b in zip(hits, columns):
            assert hit["F"] + hit["V"] == pytest.approx(hit["score"], abs=1e-6)
            n = ((Q[q] @ F[b].T).sum(0) + (Q[q] @ V[b, :6].T).sum(0)).argmax().item()
            span = n, round(n / 3, 2), round((n + 1) / 3, 2)      # 2 seconds in 6 parts
            assert (hit["frame"], hit["start"], hit["end"]) == span

def test_videos_are_found_by_their_ending_in_order_and_links_are_followed_once(tmp_path):
    numbered = [f"{i}/{i}.ts" for i in range(8)]
    for name in ("root/z/2.MP4", "root/z/1.mkv", "root/b/3.avi", "root/b/notes.txt", "away/4.webm",
                 *(f"root/{name}" for name in reversed(numbered))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    root = tmp_path / "root"
    for name, target in (("m", tmp_path / "away"), ("n", tmp_path / "away"), ("y", root)):
        (root / name).symlink_to(target)
    found = [os.path.relpath(path, root) for path in search.video_files(root)]
    assert found == [*numbered, "b/3.avi", "m/4.webm", "z/1.mkv", "z/2.MP4"]

def test_a_video_is_demuxed_once(tmp_path, clips, tiny, monkeypatch):
    calls, frame_times = [], video_colbert.frame_times
    def counted(path):
        calls.append(path)
        return frame_times(path)
    monkeypatch.setattr(search, "frame_times", counted)
    monkeypatch.setattr(video_colbert, "frame_times", counted)
    VideoIndex.build(clips, tiny, tmp_path / "index")
    assert len(calls) == len(set(calls)) == 13                    # 12 and the broken one

def test_an_index_is_brought_up_to_date_by_what_changed_alone(tmp_path, clips, tiny, encoded):
    def build(folder="index"):
        return VideoIndex.build(clips, tiny, tmp_path / folder, batch_size=1)[0]
    build(), build()
    assert sum(encoded) == 12
    write_clip(clips / "new.mp4", 5)
    assert len(build().videos) == 13 == sum(encoded)
    (clips / "0.mp4").unlink()
    write_clip(clips / "3.mp4", 7)
    index = build()
    assert sum(encoded) == 14 and "0.mp4" not in names(index) and len(index.videos) == 12
    fresh = build("fresh")
    order = [names(fresh).index(name) for name in names(index)]
    assert torch.equal(index.vectors, fresh.vectors[order])
    assert set(os.listdir(tmp_path / "index")) - {"lock"} == {"index.json", "vectors-1.f16"}

@pytest.mark.parametrize("size, mtime", [(0, 1), (1, 0)])
def test_a_file_of_another_size_or_time_is_encoded_again(tmp_path, clips, tiny, encoded, size,
                                                         mtime):
    VideoIndex.build(clips, tiny, tmp_path / "index")
    status = os.stat(clips / "3.mp4")
    with open(clips / "3.mp4", "ab") as file:
        file.write(bytes(size))
    os.utime(clips / "3.mp4", ns=(0, status.st_mtime_ns + mtime))
    VideoIndex.build(clips, tiny, tmp_path / "index")
    assert sum(encoded) == 13

def test_a_killed_build_continues(tmp_path, clips, tiny, monkeypatch, encoded):
    """What was saved is not encoded again, and the end is that of an undisturbed build. Only a
    build accepts an array that goes on after the last saved list."""
    whole, _ = VideoIndex.build(clips, tiny, tmp_path / "whole", batch_size=1)
    encode, calls = tiny.encode_video, itertools.count()
    def copy_index(frames):                                       # what a kill -9 here would leave
        if next(calls) == 3:
            shutil.copytree(tmp_path / "killed", tmp_path / "index")
        return encode(frames)
    with monkeypatch.context() as patch:
        patch.setattr(search, "SAVE_EVERY", 1)
        patch.setattr(tiny, "encode_video", copy_index)
        VideoIndex.build(clips, tiny, tmp_path / "killed", batch_size=1)
    assert len(VideoIndex.load(tmp_path / "index").videos) == 3
    with open(tmp_path / "index/vectors-0.f16", "ab") as file:
        file.write(b"what came after the last save")
    with pytest.raises(InputError, match="its build was killed: run index again"):
        VideoIndex.load(tmp_path / "index")
    before = sum(encoded)
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert sum(encoded) - before == 9 and index.videos == whole.videos
    assert torch.equal(index.vectors, whole.vectors)

def test_a_long_build_saves_on_the_way(tmp_path, clips, tiny, monkeypatch):
    """With SAVE_EVERY 5 and batches of 2, when 5 videos or 10 were passed, and at both ends."""
    saved, write_file = [], search.write_file
    def counted(path, content):
        saved.append(len(json.loads(content)["videos"]))
        write_file(path, content)
    monkeypatch.setattr(search, "SAVE_EVERY", 5)
    monkeypatch.setattr(search, "write_file", counted)
    VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=2)
    assert saved == [0, 6, 10, 12]

@pytest.mark.parametrize("stop, message", [
    (KeyboardInterrupt, "^stopped with 4 videos in .*index; the same command continues$"),
    (Killed, "")])
@pytest.mark.parametrize("where", ["autocast", "round"])
def test_ctrl_c_and_errors_keep_what_is_encoded(tmp_path, clips, tiny, monkeypatch, encoded, stop,
                                                message, where):
    """At the start of a batch, and when its vectors are written but its names not yet listed."""
    calls, function = itertools.count(), {"autocast": search.autocast, "round": round}[where]
    def stopped(*args):
        if next(calls) == 4:
            raise stop
        return function(*args)
    with monkeypatch.context() as patch, pytest.raises(stop) as error:
        patch.setattr(search, where, stopped, raising=False)
        VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert re.search(message, str(error.value))
    assert len(VideoIndex.load(tmp_path / "index").videos) == 4
    before = sum(encoded)
    VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert sum(encoded) - before == 8

def test_two_processes_do_not_build_one_index(tmp_path, clips, tiny, monkeypatch):
    """The second leaves with one line and code 2, and the first is not disturbed."""
    tiny.save(tmp_path / "model")
    encode, results = tiny.encode_video, []
    def second_process(frames):
        command = [sys.executable, "-m", "extras.search", "index", str(clips), "--device", "cpu",
                   "--model", str(tmp_path / "model"), "--out", str(tmp_path / "index")]
        results.append(subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True,
                                      text=True, timeout=100))
        return encode(frames)
    monkeypatch.setattr(tiny, "encode_video", second_process)
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    result, = results
    assert result.returncode == 2 and len(index.videos) == 12
    assert result.stderr == (f"extras.search: another process is at work on {tmp_path}/index; try "
                             "again later\n")

ARRAY_SIZE = 12 * (6 + 8) * 64 * 2

@pytest.mark.parametrize("name, size", [("vectors-0.f16", ARRAY_SIZE - 1), ("vectors-0.f16", None),
                                        ("vectors-0.f16", ARRAY_SIZE + 1), ("index.json", 100),
                                        ("index.json", 0), ("index.json", None)])
def test_a_damaged_index_is_refused_with_its_name(tmp_path, clips, tiny, name, size):
    """Too short, too long, or gone. A build repairs only what an earlier build may have left."""
    VideoIndex.build(clips, tiny, tmp_path / "index")
    path = tmp_path / "index" / name
    path.unlink() if size is None else os.truncate(path, size)
    with pytest.raises(InputError, match="index is not a complete index: ") as error:
        VideoIndex.load(tmp_path / "index")
    assert "\n" not in str(error.value)
    if name == "vectors-0.f16" and size != ARRAY_SIZE + 1:
        with pytest.raises(InputError, match="index is not a complete index: "):
            VideoIndex.build(clips, tiny, tmp_path / "index")

def test_index_json_of_something_else_is_refused(tmp_path):
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(InputError, match="is not a complete index: "):
        VideoIndex.load(tmp_path)

def test_an_index_belongs_to_its_model_and_its_videos(tmp_path, clips, tiny):
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index", name="mine")
    torch.manual_seed(1)
    other = VideoColBERT(Config(backbone="tiny", num_frames=6)).eval()
    with pytest.raises(InputError, match=r"made by another model \(mine\), or its weights"):
        index.search(other, ["a dog"], 1)
    for name, message in (("mine", "the model's weights or settings have changed since"),
                          ("other", "it was made by mine, not other")):
        with pytest.raises(InputError, match=f"{message}: index into a new folder"):
            VideoIndex.build(clips, other, tmp_path / "index", name=name)
    with pytest.raises(InputError, match="has none of the videos in .*below"):
        VideoIndex.build(clips / "below", tiny, tmp_path / "index")
    with pytest.raises(InputError, match="notes.txt: File exists"):
        VideoIndex.build(clips, tiny, clips / "notes.txt")
    with pytest.raises(InputError, match="no folder .*nowhere"):
        VideoIndex.build(tmp_path / "nowhere", tiny, tmp_path / "other")
    with pytest.raises(InputError, match="interaction mp has none"):
        pooled = VideoColBERT(Config(backbone="tiny", interaction="mp"))
        VideoIndex.build(clips, pooled, tmp_path / "other")

def test_a_folder_that_moved_is_not_encoded_again(tmp_path, clips, tiny, encoded):
    """If its files still have their names, sizes and times; else it is another folder."""
    VideoIndex.build(clips, tiny, tmp_path / "index", name="mine")
    clips.rename(tmp_path / "moved")
    index, _ = VideoIndex.build(tmp_path / "moved", tiny, tmp_path / "index")
    assert sum(encoded) == 12 and index.meta["root"] == str(tmp_path / "moved")
    assert index.meta["model"] == "mine"                          # also if the name is not repeated
    assert os.path.exists(index.search(tiny, ["a dog"], 1)[0][0]["path"])
    (tmp_path / "moved").rename(tmp_path / "other")
    for path, *_ in index.videos:
        os.utime(tmp_path / "other" / path, ns=(0, 0))
    with pytest.raises(InputError, match="is an index of .*moved and has none of the videos in .*"
                                         "other: index into a new folder"):
        VideoIndex.build(tmp_path / "other", tiny, tmp_path / "index")

def test_a_fingerprint_changes_with_what_changes_vectors_alone(tiny):
    """Settings of Q, F and V, every weight, mean and std; not the settings or scale of the loss."""
    model, settings, changes = copy.deepcopy(tiny), tiny.config, set()
    for field in fields(Config):
        model.config = replace(settings, **{field.name: "another"})
        if fingerprint(model) != fingerprint(tiny):
            changes.add(field.name)
    assert changes == {
        "backbone", "num_frames", "num_tokens", "pad_token", "query_augmentation",
        "temporal_layers", "visual_expansion", "interaction"}
    model.config = settings
    for name in ("logit_scale", "logit_bias", "mean", "std", "clip.text.positional_embedding",
                 "temporal.visual_expansion"):
        value = model.state_dict()[name]                          # shares the model's memory
        value += 1
        assert (fingerprint(model) == fingerprint(tiny)) == name.startswith("logit_")
        value.copy_(tiny.state_dict()[name])

def test_few_videos_give_few_hits_and_none_an_error(tmp_path, clips, tiny):
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    assert len(index.search(tiny, ["a dog"], 99)[0]) == 12
    for k in (0, -1):
        with pytest.raises(InputError, match="k must be at least 1"):
            index.search(tiny, ["a dog"], k)
    for query in ("", " "):
        with pytest.raises(InputError, match="the query is empty"):
            index.search(tiny, ["a dog", query])
    (tmp_path / "none").mkdir()
    index, _ = VideoIndex.build(tmp_path / "none", tiny, tmp_path / "empty")
    with pytest.raises(InputError, match="empty is empty"):
        index.search(tiny, ["a dog"])

def test_scores_do_not_depend_on_the_pieces_that_they_are_computed_in(tmp_path):
    meta = dict(num_frames=3, visual_expansion=1, width=8, videos=[])
    index, Q, mask = VideoIndex(tmp_path, meta), unit(4, 5, 8), torch.rand(4, 5) < 0.6
    mask[:, 0] = True
    for B in (0, 1024, 2500):
        index.vectors = unit(B, 7, 8).half()
        F, V = index.vectors[:, :3].float(), index.vectors[:, 3:].float()
        for level, want in zip(index.scores(Q, mask), (naive(Q, F, mask), naive(Q, V, mask))):
            assert level.shape == (4, B) and ((level - want).abs() < 1e-6).all()

def test_a_large_index_opens_without_being_read(tmp_path):
    """8 GB on paper, a sparse file: opening it adds next to nothing to memory."""
    videos = [[f"{i}.mp4", 1, 1, 1.0] for i in range(5000)]
    meta = dict(root="/", model="", fingerprint="", num_frames=400, visual_expansion=0, width=1024,
                vectors="vectors-0.f16", videos=videos)
    (tmp_path / "index.json").write_text(json.dumps(meta))
    with open(tmp_path / "vectors-0.f16", "wb") as file:
        file.truncate(2 * 5000 * 800 * 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = VideoIndex.load(tmp_path)
    assert index.vectors.shape == (5000, 800, 1024) and index.vectors[4999].float().sum() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000            # kB

# ---- Engines -------------------------------------------------------------------------------------
@pytest.mark.parametrize("M, N, E", [(32, 12, 2), (5, 1, 0), (1, 4, 3)])
def test_as_multivector_makes_the_two_level_score_one_maxsim(M, N, E):
    """3 / M MaxSim - 4 = MMS_FV, also where every match of the wrong kind is perfect."""
    Q, F, V = (unit(n, m, 16, dtype=torch.float64) for n, m in ((4, M), (6, N), (6, N + E)))
    F[0], V[0] = Q[0, 0], -Q[0, 0]
    q, v = as_multivector(Q, Q), as_multivector(F, V)
    assert q.shape == (4, 2 * M, 18) and v.shape == (6, 2 * N + E, 18)
    assert (q.norm(dim=-1) - 1).abs().max() < 1e-12
    maxsim = torch.einsum("amd,bnd->abmn", q, v).amax(-1).sum(-1)
    want = mms_fv(mean_max_sim(Q, F), mean_max_sim(Q, V))
    assert (3 / M * maxsim - 4 - want).abs().max() < 1e-12

def engine_queries(tmp_path, monkeypatch, clips, tiny):
    """An index, to be exported in three batches, and for each query its multivector, its number of
    tokens and our ten hits."""
    monkeypatch.setattr(VideoIndex.multivectors, "__defaults__", (5,))
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    cases = []
    for query, hits in zip(QUERIES, index.search(tiny, QUERIES, 10)):
        ids, mask = tiny.tokenize([query])
        with torch.no_grad():
            Q = tiny.encode_query(ids, mask)[mask]                # (M, d)
        cases.append((as_multivector(Q, Q).tolist(), len(Q), hits))
    return index, cases

def assert_same_hits(index, paths, maxsims, M, hits):
    want = [os.path.relpath(hit["path"], index.meta["root"]) for hit in hits]
    assert paths == want
    scores = [3 / M * maxsim - 4 for maxsim in maxsims]
    assert scores == pytest.approx([hit["score"] for hit in hits], abs=1e-4)

def test_lancedb_ranks_by_the_two_level_score(tmp_path, monkeypatch, clips, tiny):
    """Its distance is the sum over the query's vectors of 1 - best cosine."""
    pytest.importorskip("lancedb")
    index, cases = engine_queries(tmp_path, monkeypatch, clips, tiny)
    table = index.to_lancedb(str(tmp_path / "lance"))
    for vectors, M, hits in cases:
        found = table.search(vectors).distance_type("cosine").limit(10).to_list()
        maxsims = [2 * M - row["_distance"] for row in found]
        assert_same_hits(index, [row["path"] for row in found], maxsims, M, hits)

def test_qdrant_ranks_by_the_two_level_score(tmp_path, monkeypatch, clips, tiny):
    qdrant_client = pytest.importorskip("qdrant_client")
    index, cases = engine_queries(tmp_path, monkeypatch, clips, tiny)
    client = qdrant_client.QdrantClient(":memory:")
    index.to_qdrant(client)
    for vectors, M, hits in cases:
        found = client.query_points("videos", query=vectors, limit=10).points
        paths = [point.payload["path"] for point in found]
        assert_same_hits(index, paths, [point.score for point in found], M, hits)

# ---- Command line --------------------------------------------------------------------------------
def test_index_search_and_explain_from_the_command_line(tmp_path, monkeypatch, capsys, clips, tiny):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    main(["index", "clips", "--model", "model", "--out", "index", "--device", "cpu"])
    out = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in out] == ["skipped: ", "skipped: ", "12 videos"]
    main(["search", "index", "a dog", "-k", "3", "--json", "--device", "cpu"])
    hits = json.loads(capsys.readouterr().out)
    assert hits == VideoIndex.load("index").search(tiny, ["a dog"], 3)[0]

    main(["search", "index", "a dog", "-k", "3", "--sheet", "sheet.png", "--device", "cpu"])
    for hit, line in zip(hits, capsys.readouterr().out.splitlines(), strict=True):
        assert hit["path"] in line and f"{hit['score']:.3f}" in line
    assert Image.open("sheet.png").height > 300
    os.rename("model", "moved")
    main(["search", "index", "a dog", "-k", "3", "--json", "--model", "moved", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out) == hits

    path = hits[0]["path"]
    main(["explain", "a small dog", path, "--model", "moved", "--out", "why.png"])
    words, before, after = interactions(tiny, "a small dog", sample_frames(path, 6, 64))
    for word, f, v, line in zip(words, before, after, capsys.readouterr().out.splitlines()):
        assert line.split()[0] == word and f"frame {f.argmax() + 1}, {f.max():.3f}" in line
        assert line.endswith(f"frame {v.argmax() + 1}, {v.max():.3f}")
    assert Image.open("why.png").width > 500

def test_a_model_that_was_never_trained_is_the_same_each_time(tmp_path, monkeypatch, capsys, clips):
    """Else no search would accept the index that it made."""
    monkeypatch.chdir(tmp_path)
    main(["index", "clips", "--model", "tiny", "--out", "index", "--device", "cpu"])
    torch.manual_seed(1)
    main(["search", "index", "a dog", "-k", "1", "--device", "cpu"])
    assert "clips/" in capsys.readouterr().out.splitlines()[-1]

def test_a_hit_that_is_gone_or_damaged_is_a_grey_strip_with_its_name(tmp_path, clips, tiny):
    """The others keep their frames, the best one framed in red."""
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    hits, = index.search(tiny, ["a dog"], 3)
    os.unlink(hits[0]["path"])
    Path(hits[1]["path"]).write_bytes(b"x")
    pixels = np.asarray(draw_hits("a dog", hits, 6))
    strips = [pixels[40 + 130 * i + 20:][:96, 8:8 + 6 * 96] for i in range(3)]
    for strip in strips[:2]:
        assert (strip[20] == 200).all() and (strip[30:60] == 0).any()       # grey, black letters
    red = (strips[2] == (196, 22, 28)).all(-1)
    left = 96 * hits[2]["frame"]
    assert red[1].nonzero()[0].tolist() == list(range(left, left + 96))
    frame = sample_frames(hits[2]["path"], 6, 88)[0]
    assert (strips[2][4:92, 4:92] == frame.permute(1, 2, 0).numpy()).all()

def test_hits_are_printed_before_their_sheet_is_drawn(tmp_path, monkeypatch, capsys, clips, tiny):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    VideoIndex.build(clips, tiny, "index", "model")
    def draws_nothing(*args):
        raise Killed
    monkeypatch.setattr(search, "draw_hits", draws_nothing)
    with pytest.raises(Killed):
        main(["search", "index", "a dog", "--sheet", "sheet.png", "--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()) == 5

@pytest.mark.parametrize("ending", ["png", "jpg", "gif"])
def test_a_still_picture_can_be_explained(tmp_path, monkeypatch, capsys, tiny, ending):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    Image.new("RGB", (50, 40), "red").save(f"a.{ending}")
    main(["explain", "a dog", f"a.{ending}", "--model", "model", "--device", "cpu"])
    assert capsys.readouterr().out.endswith("explain.png\n")
    columns = np.asarray(Image.open("explain.png"), int)[:, 80:70 + 6 * 96:96]  # one of each frame
    assert ((np.abs(columns - (255, 0, 0)) < 5).all(-1).sum(0) == 92).all()

@pytest.mark.parametrize("command, message", [
    ("search nowhere x", "nowhere is not a complete index"),
    ("search unnamed x", "unnamed does not say which model made it: use --model"),
    ("search index x --sheet hits.xyz", "hits.xyz: a picture's name ends in"),
    ("search index x --sheet hits.psd", "hits.psd: a picture's name ends in"),
    ("search index x --sheet no/hits.png", "no/hits.png: no such folder"),
    ("explain x a.png --model model --out no/why.png", "no/why.png: no such folder"),
    ("explain x nothing.mp4 --model model", "nothing.mp4: No such file"),
    ("explain . a.mp4 --model nothing", "unknown backbone 'nothing'"),
    ("index . --model ViT-B-23 --out i", "unknown backbone 'ViT-B-23'")])
def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch, capsys, tiny, command, message):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    VideoIndex.build(tmp_path, tiny, "unnamed")
    with pytest.raises(InputError, match=message):
        main([*command.split(), "--device", "cpu"])
    assert capsys.readouterr().out == ""

@pytest.mark.parametrize("query", ["", " "])
def test_explain_needs_a_word(tmp_path, monkeypatch, tiny, query):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    write_clip(tmp_path / "a.mp4")
    with pytest.raises(InputError, match="the query is empty"):
        main(["explain", query, "a.mp4", "--model", "model", "--device", "cpu"])
    assert not os.path.exists("explain.png")
