"""Search is exact, survives what happens to folders and processes, and engines agree with it."""
import itertools
import json
import os
import resource

import filelock
import numpy as np
import pytest
import torch
from PIL import Image

import video_colbert
from extras import search
from extras.search import VideoIndex, as_multivector, fingerprint, main
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
    assert set(os.listdir(tmp_path / "index")) == {"index.json", "vectors-1.f16", "lock"}

def test_a_killed_build_continues(tmp_path, clips, tiny, monkeypatch, encoded):
    """What was saved is not encoded again, and the end is that of an undisturbed build."""
    whole, _ = VideoIndex.build(clips, tiny, tmp_path / "whole", batch_size=1)
    encode, calls = tiny.encode_video, itertools.count()
    def dies(frames):
        if next(calls) == 3:
            raise Killed
        return encode(frames)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(search, "SAVE_EVERY", 1)
        patch.setattr(tiny, "encode_video", dies)
        VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    with open(tmp_path / "index/vectors-0.f16", "ab") as file:
        file.write(b"what came after the last save")
    with pytest.raises(InputError, match="not a complete index"):
        VideoIndex.load(tmp_path / "index")
    before = sum(encoded)
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert sum(encoded) - before == 9 and index.videos == whole.videos
    assert torch.equal(index.vectors, whole.vectors)

def test_ctrl_c_keeps_what_is_encoded(tmp_path, clips, tiny, monkeypatch):
    encode, calls = tiny.encode_video, itertools.count()
    def interrupted(frames):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return encode(frames)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="with 4 videos in"):
        patch.setattr(tiny, "encode_video", interrupted)
        VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert len(VideoIndex.load(tmp_path / "index").videos) == 4

def test_two_builds_of_one_index_do_not_mix(tmp_path, clips, tiny):
    (tmp_path / "index").mkdir()
    with filelock.FileLock(tmp_path / "index/lock"):
        with pytest.raises(InputError, match="another process is at work on .*index"):
            VideoIndex.build(clips, tiny, tmp_path / "index")

@pytest.mark.parametrize("name, size", [("vectors-0.f16", 1000), ("vectors-0.f16", 10 ** 6),
                                        ("vectors-0.f16", None), ("index.json", 100),
                                        ("index.json", 0), ("index.json", None)])
def test_a_damaged_index_is_refused_with_its_name(tmp_path, clips, tiny, name, size):
    """Too short, too long, or gone."""
    VideoIndex.build(clips, tiny, tmp_path / "index")
    path = tmp_path / "index" / name
    path.unlink() if size is None else os.truncate(path, size)
    with pytest.raises(InputError, match="index is not a complete index: ") as error:
        VideoIndex.load(tmp_path / "index")
    assert "\n" not in str(error.value)

def test_an_index_belongs_to_its_model_and_its_videos(tmp_path, clips, tiny):
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index", name="mine")
    torch.manual_seed(1)
    other = VideoColBERT(Config(backbone="tiny", num_frames=6)).eval()
    with pytest.raises(InputError, match=r"made by another model \(mine\), or its weights"):
        index.search(other, ["a dog"], 1)
    for name, message in (("mine", "weights or settings have changed"),
                          ("other", "by mine, not other")):
        with pytest.raises(InputError, match=message):
            VideoIndex.build(clips, other, tmp_path / "index", name=name)
    with pytest.raises(InputError, match="has none of the videos in .*below"):
        VideoIndex.build(clips / "below", tiny, tmp_path / "index")
    with pytest.raises(InputError, match="no folder .*nowhere"):
        VideoIndex.build(tmp_path / "nowhere", tiny, tmp_path / "other")
    with pytest.raises(InputError, match="interaction mp has none"):
        pooled = VideoColBERT(Config(backbone="tiny", interaction="mp"))
        VideoIndex.build(clips, pooled, tmp_path / "other")

def test_a_folder_that_moved_is_not_encoded_again(tmp_path, clips, tiny, encoded):
    VideoIndex.build(clips, tiny, tmp_path / "index")
    clips.rename(tmp_path / "moved")
    index, _ = VideoIndex.build(tmp_path / "moved", tiny, tmp_path / "index")
    assert sum(encoded) == 12 and os.path.exists(index.search(tiny, ["a dog"], 1)[0][0]["path"])

def test_what_changes_no_vector_changes_no_fingerprint():
    def fingerprint_of(**settings):
        torch.manual_seed(0)
        return fingerprint(VideoColBERT(Config(backbone="tiny", num_frames=2, **settings)))
    same = fingerprint_of(lambda_frame=0.5, loss="infonce", learn_scale=True, logit_scale=1.0)
    assert same == fingerprint_of() != fingerprint_of(query_augmentation=False)
    model = VideoColBERT(Config(backbone="tiny", num_frames=2))
    before = fingerprint(model)
    model.mean += 1
    assert fingerprint(model) != before

def test_few_videos_give_few_hits_and_none_an_error(tmp_path, clips, tiny):
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    assert len(index.search(tiny, ["a dog"], 99)[0]) == 12
    for k, query, message in ((0, "a dog", "k must be at least 1"), (5, " ", "the query is empty")):
        with pytest.raises(InputError, match=message):
            index.search(tiny, [query], k)
    (tmp_path / "none").mkdir()
    index, _ = VideoIndex.build(tmp_path / "none", tiny, tmp_path / "empty")
    with pytest.raises(InputError, match="empty is empty"):
        index.search(tiny, ["a dog"])

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

def engine_queries(tmp_path, clips, tiny):
    """An index, and for each query its multivector, its number of tokens and our ten hits."""
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

def test_lancedb_ranks_by_the_two_level_score(tmp_path, clips, tiny):
    """Its distance is the sum over the query's vectors of 1 - best cosine."""
    pytest.importorskip("lancedb")
    index, cases = engine_queries(tmp_path, clips, tiny)
    table = index.to_lancedb(str(tmp_path / "lance"))
    for vectors, M, hits in cases:
        found = table.search(vectors).distance_type("cosine").limit(10).to_list()
        maxsims = [2 * M - row["_distance"] for row in found]
        assert_same_hits(index, [row["path"] for row in found], maxsims, M, hits)

def test_qdrant_ranks_by_the_two_level_score(tmp_path, clips, tiny):
    qdrant_client = pytest.importorskip("qdrant_client")
    index, cases = engine_queries(tmp_path, clips, tiny)
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

    os.unlink(hits[1]["path"])                                    # it is a grey strip
    main(["search", "index", "a dog", "-k", "3", "--sheet", "sheet.png", "--device", "cpu"])
    for hit, line in zip(hits, capsys.readouterr().out.splitlines(), strict=True):
        assert hit["path"] in line and f"{hit['score']:.3f}" in line
    strip = np.asarray(Image.open("sheet.png"))[40 + 130 + 25]
    assert (strip[100:500] == 200).all()

    path = hits[0]["path"]
    main(["explain", "a small dog", path, "--model", "model", "--out", "why.png"])
    words, before, after = interactions(tiny, "a small dog", sample_frames(path, 6, 64))
    for word, f, v, line in zip(words, before, after, capsys.readouterr().out.splitlines()):
        assert line.split()[0] == word and f"frame {f.argmax() + 1}, {f.max():.3f}" in line
        assert line.endswith(f"frame {v.argmax() + 1}, {v.max():.3f}")
    assert Image.open("why.png").width > 500

@pytest.mark.parametrize("ending", ["png", "jpg", "gif"])
def test_a_still_picture_can_be_explained(tmp_path, monkeypatch, capsys, tiny, ending):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    Image.new("RGB", (50, 40), "red").save(f"a.{ending}")
    main(["explain", "a dog", f"a.{ending}", "--model", "model", "--device", "cpu"])
    assert capsys.readouterr().out.endswith("explain.png\n")

@pytest.mark.parametrize("command, message", [
    ("search nowhere x", "nowhere is not a complete index"),
    ("search index x --sheet hits.xyz", "hits.xyz: a picture's name ends in"),
    ("search index x --sheet no/hits.png", "no/hits.png: no such folder"),
    ("explain x nothing.mp4 --model model", "nothing.mp4: No such file"),
    ("index . --model ViT-B-23 --out i", "unknown backbone 'ViT-B-23'")])
def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch, capsys, tiny, command, message):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    with pytest.raises(InputError, match=message):
        main([*command.split(), "--device", "cpu"])
    assert capsys.readouterr().out == ""
