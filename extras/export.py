"""Export an index of extras.search to an engine for vectors.

    index = VideoIndex.load("INDEX")
    to_lancedb(index, "folder", partitions=256)
    to_qdrant(index, QdrantClient("http://localhost:6333"))

An engine ranks by the two-level score if a query is as_multivector(Q, Q), without the vectors
whose mask is False: MMS_FV = 3 / M MaxSim - 4, of M query vectors.
"""
import os

import torch

def as_multivector(x, y):
    """The two levels as one set of vectors, for any engine that has MaxSim: F and V of videos,
    or Q and Q again of queries.

    x (..., N, d), y (..., K, d), unit vectors -> (..., N + K, d + 2), unit vectors. Appended are
    (a, 0) to frame vectors and to one copy of the query, (0, a) to temporal vectors and to the
    other copy; everything is divided by sqrt(1 + a^2). With a^2 = 2, a match of one kind scores
    (2 + cos) / 3 >= 1/3 and a match of two kinds cos / 3 <= 1/3, so that a copy only ever
    matches its own kind."""
    a = 2 ** 0.5
    first = x.new_tensor([a, 0]).expand(*x.shape[:-1], 2)
    second = y.new_tensor([0, a]).expand(*y.shape[:-1], 2)
    x = torch.cat([x, first], dim=-1)  # (..., N, d + 2)
    y = torch.cat([y, second], dim=-1)  # (..., K, d + 2)
    return torch.cat([x, y], dim=-2) / 3 ** 0.5

def multivectors(index, size=256):
    """Yield batches of an index: row numbers, [(path below the root, start, end in seconds)],
    and vectors float32 (b, N + N + E, d + 2)."""
    N = index.meta["num_frames"]
    for i in range(0, len(index.vectors), size):
        x = index.vectors[i:i + size].float()
        rows = range(i, i + len(x))
        parts = []
        for row in rows:
            path, start, end = index.segment(row)
            path = os.path.relpath(path, index.meta["root"])
            # Engines take only text; a file's name may be any bytes.
            path = os.fsencode(path).decode("utf-8", "replace")
            parts.append((path, start, end))
        yield rows, parts, as_multivector(x[:, :N], x[:, N:]).cpu().numpy()

def to_lancedb(index, uri, table="videos", partitions=0):
    """Write a LanceDB table (a folder or object storage) of path, start, end, vector -> table.

    With `partitions` (256 for 20,000 videos) its vector index is built. Search it with
    .distance_type("cosine").nprobes(16).refine_factor(10), as RESULTS.md does."""
    import lancedb  # optional, see requirements.txt
    import pyarrow
    vectors = pyarrow.list_(pyarrow.list_(pyarrow.float32(), index.meta["width"] + 2))
    schema = pyarrow.schema([("path", pyarrow.string()), ("start", pyarrow.float64()),
                             ("end", pyarrow.float64()), ("vector", vectors)])

    table = lancedb.connect(uri).create_table(table, lance_batches(index, schema), schema=schema)
    if partitions:
        settings = lancedb.index.IvfFlat(distance_type="cosine", num_partitions=partitions)
        table.create_index("vector", config=settings)
    return table

def lance_batches(index, schema):
    import pyarrow
    for _, parts, vectors in multivectors(index):
        rows = []
        for (path, start, end), x in zip(parts, vectors):
            rows.append(dict(path=path, start=start, end=end, vector=list(x)))
        yield pyarrow.RecordBatch.from_pylist(rows, schema)

def to_qdrant(index, client, collection="videos"):
    """Write a Qdrant collection of multivectors, with path, start and end in the payload."""
    from qdrant_client import models  # optional, see requirements.txt
    maxsim = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    settings = models.VectorParams(size=index.meta["width"] + 2, multivector_config=maxsim,
                                   distance=models.Distance.COSINE)
    client.create_collection(collection, vectors_config=settings)

    # A server takes 32 MB at a time, and a number in JSON is about 22 bytes.
    numbers_per_row = index.vectors.shape[1] * (index.meta["width"] + 2)
    size = max(1, 2 ** 20 // numbers_per_row)
    for rows, parts, vectors in multivectors(index, size):
        points = []
        for row, (path, start, end), x in zip(rows, parts, vectors):
            payload = dict(path=path, start=start, end=end)
            points.append(models.PointStruct(id=row, vector=x.tolist(), payload=payload))
        client.upsert(collection, points)
