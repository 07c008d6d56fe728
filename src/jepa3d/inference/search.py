"""`jepa3d search`: the nearest vectors by cosine, exactly, from Parquet files, in the memory of a
row group.

Cosines in float32 leave few candidates, which are compared in float64 (`rank`).

Many vectors are read from a copy that is mapped into memory, so that many searches of one process
read nothing twice. `NAME.arrow` beside the index holds its rows uncompressed, with the length of
every vector and its direction in half precision, which is all that a few queries first read. It
says which files it was made of, with their sizes and times of change, and is made again where any
of these differs. It may be deleted.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import from_dlpack

from jepa3d.data.cloud import ReadError
from jepa3d.data.errors import as_read_error, first_line
from jepa3d.inference.embedding import embed_each
from jepa3d.inference.hits import SLACK, Condition, Hit, best, rank
from jepa3d.inference.vectors import ReadGroup, Vectors, pa, schema, to_numpy
from jepa3d.locking import writing
from jepa3d.plain import log, replacing

if TYPE_CHECKING:
    from jepa3d.inference.lance import VectorStore

# In half precision cosines may be wrong by 0.00122: 2^-11 for rounding either factor, 2^-12 for
# rounding the sum, which torch makes in float32.
HALF_SLACK = 2.5e-3
FEW = 4  # queries up to which reading the vectors takes longer than multiplying them
# Rows from which on a copy is made: fewer are read from Parquet in 0.2 seconds.
WORTH = 100_000
_KEY = b"jepa3d copy 2 of"
_COPIED = ["path", "label", "num_points", "vector"]
# Of the vectors, which only the copy has: the lengths, and in half precision the directions (of
# length 1, or zero for a zero vector).
_MORE = ("length", "direction")


def search(
    index: str | Path,
    queries: np.ndarray | str | Path,
    k: int = 10,
    where: Sequence[str] = (),
    exclude: Sequence[str | None] | None = None,
    probes: int | None = None,
) -> list[list[Hit]]:
    """The k rows of an index nearest to each query by cosine to six decimals, best first, ties by
    path.

    index: a Parquet file or folder of `jepa3d embed`, or a store of `jepa3d index`. queries:
    vectors q E; or a path, of whose clouds (in the order of `cloud_paths`) each is a query that is
    not among its own neighbours; those that cannot be used are left out. where: see `Condition`;
    all must hold. exclude: a path a query to leave out, whatever links lead there. probes:
    approximate, by that many partitions of an indexed store. Fewer come back where fewer remain.
    Raises ValueError for a query of other width, or that is not finite or zero.
    """
    if k < 1:
        raise ValueError(f"-k {k}: a number from 1")
    if isinstance(queries, (str, Path)):
        names, queries = query_vectors(index, queries)
        exclude = names if exclude is None else exclude
    index, conditions = Path(index), [Condition.parse(text) for text in where]
    vectors = open_index(index)
    directions = _directions(queries, vectors.spec.embed_dim)
    number = k + (exclude is not None)
    if isinstance(vectors, Vectors):
        if probes:
            raise ValueError(f"--probes {probes}: first, jepa3d index --ann {index}")
        found = _search_files(vectors, directions, number, conditions)
    else:
        found = [vectors.search(x, number, conditions, probes) for x in directions]
    both = zip(found, exclude or [None] * len(found), strict=True)
    return [_without(hits, path)[:k] for hits, path in both]


def _without(hits: list[Hit], path: str | None) -> list[Hit]:
    """Hits without the one of this path, or of a path that leads to the same file."""
    paths = [hit.path for hit in hits]
    if path is not None and path not in paths:
        real = os.path.realpath(path)
        path = next((p for p in paths if os.path.realpath(p) == real), None)
    return [hit for hit in hits if hit.path != path]


def _search_files(
    vectors: Vectors, directions: np.ndarray, k: int, conditions: list[Condition]
) -> list[list[Hit]]:
    hits: list[list[Hit]] = [[] for _ in directions]
    for read, more in groups(vectors):
        batch = read(["vector", *more, *{condition.column for condition in conditions}])
        mask = np.ones(len(batch), bool)
        for condition in conditions:
            mask &= condition.holds(batch.column(condition.column))
        rows = np.flatnonzero(mask)
        if not len(rows):
            continue
        x, names = to_numpy(batch.column("vector")), None
        scores, slack = _cosines(x, directions, *map(batch.column, more))
        for i, query in enumerate(directions):
            # Above -inf, the cosine of a zero vector, which is no hit.
            worst = hits[i][-1].cosine if len(hits[i]) == k else -2.0
            top = rows[_near(scores[i, rows], worst, k, slack)]
            if slack > SLACK:
                exact = x[top] @ query.astype(np.float32)
                exact /= np.linalg.norm(x[top], axis=1)
                top = top[_near(exact, worst, k, SLACK)]
            if len(top):  # most groups are too far away
                names = names or read(["path", "label"])
                path, label = (names.column(i).take(top).to_pylist() for i in (0, 1))
                hits[i] = best(hits[i] + rank(query, x[top], path, label, k), k)
    return hits


def _cosines(
    x: np.ndarray, directions: np.ndarray, lengths: Any = None, halves: Any = None
) -> tuple[np.ndarray, float]:
    """Cosines q n of queries q E with vectors x n E, and the slack that their precision needs.

    lengths and halves: the columns `_MORE` of the copy. The cosine of a zero vector is -inf.
    """
    length = np.linalg.norm(x, axis=1) if lengths is None else lengths.to_numpy()
    if halves is not None and len(directions) <= FEW:
        # The product with a vector is several times as fast as that with a matrix of few columns.
        queries = torch.from_numpy(directions).to(torch.float16)
        vectors = from_dlpack(halves.flatten()).view(x.shape)
        products = torch.stack([vectors @ query for query in queries])
        scores, slack = products.float().numpy(), HALF_SLACK
    else:
        products = (x @ directions.T.astype(np.float32)).T
        scores, slack = products / np.maximum(length, 1e-30), SLACK
    return np.where(length > 0, scores, -np.inf), slack


def _near(scores: np.ndarray, worst: float, k: int, slack: float) -> np.ndarray:
    """Indices of the scores that may belong to the k best and reach `worst`, if each may err by
    half of `slack`.
    """
    top = np.flatnonzero(scores >= worst - slack)
    if len(top) > k:
        worst = max(worst, np.partition(scores[top], -k)[-k])
        top = top[scores[top] >= worst - slack]
    return top


def _directions(queries: np.ndarray, embed_dim: int) -> np.ndarray:
    """Queries q E with length 1, float64. Raises ValueError."""
    queries = np.atleast_2d(np.asarray(queries, np.float64))
    if queries.shape[-1] != embed_dim:
        width = queries.shape[-1]
        raise ValueError(f"a query of {width} numbers, the vectors have {embed_dim}")
    length = np.linalg.norm(queries, axis=-1, keepdims=True)
    if not (np.isfinite(length).all() and (length > 0).all()):
        raise ValueError("a query that is zero or not finite")
    return queries / length


def open_index(index: Path) -> "Vectors | VectorStore":
    """What `jepa3d embed` or `index` wrote.

    Raises ReadError where nothing is there, or nothing is in it.
    """
    if not index.exists():
        raise ReadError(f"{index}: no such file or folder; make it with jepa3d embed")
    if index.suffix != ".lancedb":
        return Vectors(index)
    from jepa3d.inference.lance import VectorStore

    store = VectorStore(index)
    if not len(store):
        raise ReadError(f"{index}: holds no vectors; add some with jepa3d index")
    return store


def query_vectors(
    index: str | Path, query: str | Path, model: str | None = None
) -> tuple[list[str], np.ndarray]:
    """Names and vectors of a query: a file of one or many clouds, embedded as the index was, or a
    .npy of vectors.

    Clouds that cannot be used are logged and left out. model: where the encoder of the index lies
    now. Raises ValueError where it is another, and ReadError where no cloud is or can be used.
    """
    spec, path = open_index(Path(index)).spec, Path(query)
    if path.suffix == ".npy" and path.is_file():
        with as_read_error(path):
            array = np.load(path, allow_pickle=False)
        if array.ndim and array.shape[-1] == spec.embed_dim:
            return [str(query)] * len(np.atleast_2d(array)), np.atleast_2d(array)
    found, errors = embed_each(path, spec.encoder(index, model), spec)
    for error in errors:
        log.warning(f"left out: {error}")
    vectors = {name: vector for name, vector in found if vector is not None}
    return [*vectors], np.stack([*vectors.values()])


# ---------------------------------------------------------------------------------------- the copy


def groups(vectors: Vectors) -> Iterator[tuple[ReadGroup, tuple[str, ...]]]:
    """The row groups of an index: a function that reads columns of one, and those of `_MORE` that
    it has.

    From the copy, made now where it is missing or old; from Parquet where the vectors are few, the
    copy cannot be written, or another process is writing it.
    """
    batches = _copied(vectors) if len(vectors) >= WORTH else None
    if batches is None:
        return ((read, ()) for read in vectors.groups())
    return ((batch.select, _MORE) for batch in batches)


def copy_of(index: Path) -> Path:
    """The path of the copy of an index."""
    real = index.resolve()
    return real.with_name(f"{real.name}.arrow")


def _copied(vectors: Vectors) -> list[pa.RecordBatch] | None:
    file, stamp = copy_of(vectors.path), _stamp(vectors.files)
    try:
        return _open(file, stamp)
    except (OSError, ValueError):
        pass
    try:
        with writing(file):
            _write(vectors, file, stamp)
        return _open(file, stamp)
    # A full disk, another process that writes it, or damaged vectors.
    except (OSError, ValueError, pa.ArrowException) as error:
        log.warning(f"searching without {file.name}: {first_line(error)}")
        return None


def _stamp(files: list[Path]) -> str:
    """A text that differs when a file changed: every change replaces the file by a new one."""
    stats = [(file.name, file.stat()) for file in files]
    return json.dumps([(name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats])


@lru_cache(maxsize=2)  # mapped once, so that a search meets pages that are there
def _open(file: Path, stamp: str) -> list[pa.RecordBatch]:
    """The row groups of a copy, mapped but not read yet.

    Raises OSError or ValueError for a copy of other files.
    """
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    if (reader.schema.metadata or {}).get(_KEY) != stamp.encode():
        raise ValueError(f"{file}: a copy of other vectors")
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _write(vectors: Vectors, file: Path, stamp: str) -> None:
    """Write a copy, whole or not at all. Raises OSError, and ValueError if the vectors changed
    meanwhile.
    """
    size = len(vectors) * vectors.spec.embed_dim * 6 / 1e6
    log.warning(f"making {file}, a copy for quick searches ({size:,.0f} MB)")
    width = vectors.spec.embed_dim
    types = pa.float32(), pa.list_(pa.float16(), width)
    base = pa.schema(map(schema(vectors.spec).field, _COPIED))
    kind = pa.schema([*base, *zip(_MORE, types, strict=True)], {_KEY: stamp})
    with replacing(file) as partial:
        with pa.ipc.new_file(str(partial), kind) as writer:
            for batch in vectors.batches(_COPIED):
                x = to_numpy(batch.column("vector"))
                length = np.linalg.norm(x, axis=1)
                half = (x / np.maximum(length, 1e-30)[:, None]).astype(np.float16)
                direction = pa.FixedSizeListArray.from_arrays(half.ravel(), width)
                columns = [*batch.cast(base).columns, length, direction]
                writer.write_table(pa.table(columns, kind))
        if _stamp(vectors.files) != stamp:
            raise ValueError(f"{vectors.path}: changed while it was copied")
