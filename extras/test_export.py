"""Engines that an index is exported to rank by the two-level score."""
import json
import os
import time
import types

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import train
from extras.export import as_multivector, multivectors, to_lancedb, to_qdrant
from extras.search import find_hits
from extras.test_search import QUERIES, clips  # noqa: F401
from extras.video_index import VideoIndex
from test_video_colbert import unit, write_clip
from video_colbert import VideoColBERT, mean_max_sim, mms_fv

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
    monkeypatch.setattr(multivectors, "__defaults__", (5,))
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    cases = []
    for query, hits in zip(QUERIES, find_hits(index, tiny, QUERIES, 10)):
        ids, mask = tiny.tokenize([query])
        with torch.no_grad():
            Q = tiny.encode_query(ids)[mask]                      # (M, d)
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
    table = to_lancedb(index, str(tmp_path / "lance"))
    for vectors, M, hits in cases:
        found = table.search(vectors).distance_type("cosine").limit(10).to_list()
        maxsims = [2 * M - row["_distance"] for row in found]
        assert_same_hits(index, [row["path"] for row in found], maxsims, M, hits)

def synthetic_index(folder, count, d=64, N=12, E=2):
    """An index of videos whose frames are alike, about 100 to a topic, and 50 queries of 12 tokens
    near the frames of one video each -> the index, Q (50, 12, d)."""
    topics = unit(max(1, count // 100), d)
    videos = topics[torch.randint(len(topics), (count,))] + 0.7 * unit(count, d)
    F = normalize(normalize(videos, dim=-1)[:, None] + 0.6 * unit(count, N, d), dim=-1)
    V = normalize(F.mean(1, keepdim=True) + 0.6 * unit(count, N + E, d), dim=-1)
    meta = dict(root="/", model="", fingerprint="", num_frames=N, visual_expansion=E, width=d,
                vectors="vectors-0.f16", videos=[[f"{i}.mp4", 1, 1, 1.0] for i in range(count)])
    folder.mkdir()
    (folder / "vectors-0.f16").write_bytes(torch.cat([F, V], 1).half().numpy().tobytes())
    (folder / "index.json").write_text(json.dumps(meta))
    frames = F[torch.randint(count, (50,))][:, torch.randint(N, (12,))]
    return VideoIndex.load(folder), normalize(frames + 0.8 * unit(50, 12, d), dim=-1)

def index_of_a_run(folder, run):
    """An index of all videos in the folder of a run's clips, and Q of 50 of its captions."""
    model, s = VideoColBERT.load(run), train.read_settings(run)
    clips = train.load_clips(s)["train"]
    root = os.path.commonpath([os.path.dirname(clip.path) for clip in clips])
    index, _ = VideoIndex.build(root, model, folder)
    ids, mask = model.tokenize([clip.captions[0] for clip in clips[:50]])
    assert mask.all()
    with torch.no_grad():
        return index, model.encode_query(ids)

def test_the_vector_index_of_lancedb_finds_the_exact_ten(tmp_path):
    """Nearly, of 1,000 synthetic videos or VIDEOS of them, or of all videos of RUN's clips."""
    pytest.importorskip("lancedb")
    if "RUN" in os.environ:
        index, Q = index_of_a_run(tmp_path / "index", os.environ["RUN"])
    else:
        index, Q = synthetic_index(tmp_path / "index", int(os.environ.get("VIDEOS", 1000)))
    started = time.perf_counter()
    want = mms_fv(*index.scores(Q, torch.ones(Q.shape[:2]))).topk(10).indices.tolist()
    milliseconds = [1000 * (time.perf_counter() - started) / len(Q)]
    table = to_lancedb(index, str(tmp_path / "lance"), partitions=16 if len(index.videos) < 5000
                             else 256)
    rows, recall = {video[0]: i for i, video in enumerate(index.videos)}, []
    for settings in (dict(nprobes=16, refine_factor=10), dict(bypass_vector_index=())):
        found, started = [], time.perf_counter()
        for q in as_multivector(Q, Q).numpy():
            search = table.search(q).distance_type("cosine").limit(10)
            for name, value in settings.items():
                search = getattr(search, name)(*[value] if value else [])
            found.append([rows[row["path"]] for row in search.to_list()])
        milliseconds.append(1000 * (time.perf_counter() - started) / len(Q))
        recall.append(np.mean([len({*a} & {*b}) / 10 for a, b in zip(want, found)]))
    ours, with_index, without = milliseconds
    print(f"{len(index.videos)} videos, recall@10 of its vector index {recall[0]:.3f}; a query "
          f"takes {ours:.1f} ms here, {with_index:.1f} with it, {without:.1f} without")
    assert recall[0] >= 0.95 and recall[1] >= 0.99

def test_qdrant_ranks_by_the_two_level_score(tmp_path, monkeypatch, clips, tiny):
    qdrant_client = pytest.importorskip("qdrant_client")
    index, cases = engine_queries(tmp_path, monkeypatch, clips, tiny)
    client = qdrant_client.QdrantClient(":memory:")
    to_qdrant(index, client)
    for vectors, M, hits in cases:
        found = client.query_points("videos", query=vectors, limit=10).points
        paths = [point.payload["path"] for point in found]
        assert_same_hits(index, paths, [point.score for point in found], M, hits)

@pytest.mark.parametrize("rows, frames", [(40, 130), (200, 26), (2, 3000)])
def test_qdrant_gets_less_at_a_time_than_a_server_takes(rows, frames):
    """32 MB of JSON, also with 64 frames and expansion tokens. All rows arrive, in order."""
    pytest.importorskip("qdrant_client")
    vectors = torch.rand(rows, frames, 512).half()
    index = types.SimpleNamespace(meta=dict(num_frames=frames // 2, width=512, root="/"),
                                  vectors=vectors, segment=lambda row: ("/a.mp4", 0, 1))
    sent, sizes = [], []
    class Client:
        def create_collection(self, *args, **kwargs):
            pass
        def upsert(self, collection, points):
            sent.extend(point.id for point in points)
            sizes.append(sum(len(json.dumps(point.vector)) for point in points))
    to_qdrant(index, Client())
    assert sent == list(range(rows)) and max(sizes) < 33e6 and len(sizes) <= rows / 2 + 1

def test_a_name_that_is_not_utf_8_is_exported_with_a_replacement(tmp_path, tiny):
    pytest.importorskip("lancedb")
    (tmp_path / "clips").mkdir()
    name = os.fsdecode(b"\xff.mp4")
    write_clip(tmp_path / "a.mp4", 3).rename(tmp_path / "clips" / name)
    index, _ = VideoIndex.build(tmp_path / "clips", tiny, tmp_path / "index")
    rows = to_lancedb(index, str(tmp_path / "lance")).to_arrow().to_pylist()
    assert [row["path"] for row in rows] == ["\ufffd.mp4"]
