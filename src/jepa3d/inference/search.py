"""`jepa3d search`: find the vectors of an index with the highest cosine to a query. An index is the
Parquet output of `jepa3d embed`, or a database of `jepa3d index` (lance.py). The search is exact,
unless a database is searched with `probes`.

A search in Parquet files has only one row group (a block of rows) in memory at a time. Cosines in
float32 select a few candidates, whose cosines are then computed in float64 (`rank` in hits.py).

For Parquet files with at least `WORTH` vectors, a copy `NAME.arrow` is written beside the index and
mapped into memory, so that further searches read little from disk. The copy holds the rows
uncompressed. It also holds the length of each vector and, in half precision, its direction; a
search with few queries reads only lengths and directions at first. The copy records the names,
sizes, modification times and inodes of the index's files. If one of these has changed, the copy is
made again. You may delete the copy at any time.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
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

# Twice the largest error of a cosine in half precision, rounded up. This error is 0.00122, the sum
# of three errors: 2^-11 from rounding the first factor, 2^-11 from rounding the second factor, and
# 2^-12 from rounding the sum of products, which torch computes in float32.
HALF_SLACK = 2.5e-3
# A search with at most this many queries uses half precision if the index has a copy. For so few
# queries, reading the vectors takes longer than multiplying them, and half precision halves what is
# read.
FEW = 4
# An index with at least this many rows gets a copy. A smaller index is read from Parquet within
# about 0.2 seconds, so a copy would save little time.
WORTH = 100_000
# metadata key of a copy; its value is the `_stamp` of the files that were copied
_KEY = b"jepa3d copy 2 of"
# columns of the index that are copied
_COPIED = ["path", "label", "num_points", "vector"]
# Columns that only the copy has: the length of each vector, and its direction. A direction is the
# vector scaled to length 1, in half precision; for a zero vector, it is zero.
_MORE = ("length", "direction")


def search(
    index: str | Path,
    queries: np.ndarray | str | Path,
    k: int = 10,
    where: Sequence[str] = (),
    exclude: Sequence[str | None] | None = None,
    probes: int | None = None,
) -> list[list[Hit]]:
    """Find, for each query, the k rows of an index with the highest cosine; best first.

    index: a Parquet file or folder of `jepa3d embed`, or a database of `jepa3d index`. queries:
    vectors [q, E], or a path (see `query_vectors`). Every cloud at the path is a query, in the
    order of `clouds.py::cloud_paths`; clouds that cannot be used are left out. where: conditions
    that must all hold for a row, see `hits.py::Condition`. exclude: for each query, None or the
    path of a cloud that is left out of the hits, even if the index has it under another path that
    links to the same file. By default, a cloud at the path `queries` is not its own hit. probes:
    how many partitions of a database to search; the search is then approximate, and the database
    needs the partitions that `jepa3d index --ann` makes.

    Cosines are rounded to six decimals; rows of equal cosine are ordered by path. A query has fewer
    than k hits if fewer rows remain after `where` and `exclude`. Raises ValueError for wrong
    settings, or if a query is zero, is not finite or has another width than the vectors. Raises
    ReadError if the index cannot be read, or if none of the queries can be read. Both are also
    raised by `open_index` and, if `queries` is a path, by `query_vectors`.
    """
    if k < 1:
        raise ValueError(f"-k {k}: must be 1 or more")
    if probes is not None and probes < 1:
        raise ValueError(f"--probes {probes}: must be 1 or more")
    if isinstance(queries, (str, Path)):
        names, queries = query_vectors(index, queries)
        exclude = names if exclude is None else exclude
    index, conditions = Path(index), [Condition.parse(text) for text in where]
    vectors = open_index(index)
    directions = _directions(queries, vectors.spec.embed_dim)
    number = k + (exclude is not None)
    if isinstance(vectors, Vectors):
        if probes:
            needed = "a database of jepa3d index --ann"
            raise ValueError(f"--probes {probes}: needs {needed}")
        found = _search_files(vectors, directions, number, conditions)
    else:
        found = [vectors.search(x, number, conditions, probes) for x in directions]
    both = zip(found, exclude or [None] * len(found), strict=True)
    return [_without(hits, path)[:k] for hits, path in both]


def _without(hits: list[Hit], path: str | None) -> list[Hit]:
    """Remove the hit of this path. If there is none, remove the hit of another path that links to
    the same file.
    """
    paths = [hit.path for hit in hits]
    if path is not None and path not in paths:
        real = _real(path)
        path = next((p for p in paths if _real(p) == real), None)
    return [hit for hit in hits if hit.path != path]


def _real(path: str) -> str:
    """Resolve the links in an address, even if FILE in FILE#PART is a link itself."""
    signs = [match.start() for match in re.finditer("#", path)]
    ends = [len(path), *reversed(signs)]
    end = next((end for end in ends if os.path.exists(path[:end])), len(path))
    return os.path.realpath(path[:end]) + path[end:]


def _search_files(
    vectors: Vectors, directions: np.ndarray, k: int, conditions: list[Condition]
) -> list[list[Hit]]:
    """Return the k best hits of each query among the rows that meet the conditions.

    directions: the queries [q, E], scaled to length 1.
    """
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
            # A zero vector has the score -inf, and must never be a hit. -2 is above that score, but
            # below every cosine.
            worst = hits[i][-1].cosine if len(hits[i]) == k else -2.0
            top = rows[_near(scores[i, rows], worst, k, slack)]
            # candidates by half precision: keep those that are still candidates by float32
            if slack > SLACK:
                exact = x[top] @ query.astype(np.float32)
                exact /= np.linalg.norm(x[top], axis=1)
                top = top[_near(exact, worst, k, SLACK)]
            if len(top):  # most row groups have no candidate
                names = names or read(["path", "label"])
                path, label = (names.column(i).take(top).to_pylist() for i in (0, 1))
                hits[i] = best(hits[i] + rank(query, x[top], path, label, k), k)
    return hits


def _cosines(
    x: np.ndarray, directions: np.ndarray, lengths: Any = None, halves: Any = None
) -> tuple[np.ndarray, float]:
    """Return the cosines [q, n] of queries (`directions` [q, E]) with vectors (`x` [n, E]), and the
    slack, which is twice the largest rounding error of these cosines.

    lengths, halves: if the vectors come from a copy, its columns `length` and `direction` (see
    `_MORE`). A zero vector gets the cosine -inf.
    """
    length = np.linalg.norm(x, axis=1) if lengths is None else lengths.to_numpy()
    if halves is not None and len(directions) <= FEW:
        # For few queries, one product per query is several times as fast as a matrix product.
        queries = torch.from_numpy(directions).to(torch.float16)
        vectors = from_dlpack(halves.flatten()).view(x.shape)
        products = torch.stack([vectors @ query for query in queries])
        scores, slack = products.float().numpy(), HALF_SLACK
    else:
        products = (x @ directions.T.astype(np.float32)).T
        scores, slack = products / np.maximum(length, 1e-30), SLACK
    return np.where(length > 0, scores, -np.inf), slack


def _near(scores: np.ndarray, worst: float, k: int, slack: float) -> np.ndarray:
    """Return the indices of all scores whose exact values may be among the k best and not below
    `worst`, the cosine of the worst of the k hits found so far (-2 if there are fewer). Each score
    differs from its exact value by at most half of `slack`.
    """
    top = np.flatnonzero(scores >= worst - slack)
    if len(top) > k:
        worst = max(worst, np.partition(scores[top], -k)[-k])
        top = top[scores[top] >= worst - slack]
    return top


def _directions(queries: np.ndarray, embed_dim: int) -> np.ndarray:
    """Scale queries [q, E] to length 1, as float64.

    Raises ValueError if a query is zero or not finite, or if its width is not `embed_dim`.
    """
    queries = np.atleast_2d(np.asarray(queries, np.float64))
    if (width := queries.shape[-1]) != embed_dim:
        raise ValueError(f"a query has {width} numbers, the vectors have {embed_dim}")
    length = np.linalg.norm(queries, axis=-1, keepdims=True)
    if not (np.isfinite(length).all() and (length > 0).all()):
        raise ValueError("a query is zero or not finite")
    return queries / length


def open_index(index: Path) -> "Vectors | VectorStore":
    """Open an index: the vectors that `jepa3d embed` or `jepa3d index` wrote.

    Raises ReadError if the index does not exist, is of another kind or holds no vectors. Raises
    ValueError if the Parquet files of a folder have different specifications (spec.py).
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
    """Return the names and vectors of queries. The queries are the clouds at the path `query`,
    embedded with the settings of the index. If `query` is a .npy file with rows as wide as the
    vectors of the index, the queries are these rows.

    Clouds that cannot be used are logged and left out. model: path of the index's encoder, if the
    encoder was moved. Raises ValueError if the encoder cannot be loaded or is a different one, or
    if the vectors were made by an incompatible version of jepa3d. Raises ReadError if no cloud can
    be used, or if a .npy file is damaged.
    """
    spec, path = open_index(Path(index)).spec, Path(query)
    if path.suffix == ".npy" and path.is_file():
        with as_read_error(path):
            array = np.load(path, allow_pickle=False)
        is_vectors = array.ndim in (1, 2) and array.dtype.kind in "iuf"
        if is_vectors and array.shape[-1] == spec.embed_dim:
            return [str(query)] * len(np.atleast_2d(array)), np.atleast_2d(array)
    found, errors = embed_each(path, spec.encoder(index, model), spec)
    for error in errors:
        log.warning(f"left out: {error}")
    vectors = {name: vector for name, vector in found if vector is not None}
    return [*vectors], np.stack([*vectors.values()])


# ---------------------------------------------------------------------------------------- the copy


def groups(vectors: Vectors) -> Iterator[tuple[ReadGroup, tuple[str, ...]]]:
    """Return, for each row group of an index, a function that reads columns by name, and the names
    of the additional columns: `_MORE` for a copy, none for Parquet.

    An index with at least `WORTH` rows is read from its copy. If the copy is missing or outdated,
    it is made now. If the copy cannot be written, or if another process is writing it, the index is
    read from Parquet.
    """
    batches = _copied(vectors) if len(vectors) >= WORTH else None
    if batches is None:
        return ((read, ()) for read in vectors.groups())
    return ((batch.select, _MORE) for batch in batches)


def copy_of(index: Path) -> Path:
    """Return the path of an index's copy."""
    real = index.resolve()
    return real.with_name(f"{real.name}.arrow")


def _copied(vectors: Vectors) -> list[pa.RecordBatch] | None:
    """Return the row groups of an index's copy. If necessary, the copy is made now; if that fails,
    return None.
    """
    file, stamp = copy_of(vectors.path), _stamp(vectors.files)
    with suppress(OSError, ValueError):
        return _open(file, stamp)
    try:
        with writing(file):
            _write(vectors, file, stamp)
        return _open(file, stamp)
    # The disk may be full, another process may be writing the copy, or the vectors may be damaged.
    except (OSError, ValueError, pa.ArrowException) as error:
        log.warning(f"searching without {file.name}: {first_line(error)}")
        return None


def _stamp(files: list[Path]) -> str:
    """Return a text that differs after any change of the files: it has their names, sizes,
    modification times and inodes, and every change of an index replaces a file by a new one.
    """
    stats = [(file.name, file.stat()) for file in files]
    return json.dumps([(name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats])


# The mapping is kept, so that later searches find its pages in memory.
@lru_cache(maxsize=2)
def _open(file: Path, stamp: str) -> list[pa.RecordBatch]:
    """Map the row groups of a copy into memory, without reading them.

    Raises OSError or ValueError if there is no readable copy, and ValueError if the copy was made
    from other files.
    """
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    if (reader.schema.metadata or {}).get(_KEY) != stamp.encode():
        raise ValueError(f"{file}: is a copy of other vectors")
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _write(vectors: Vectors, file: Path, stamp: str) -> None:
    """Write the copy of an index. An incomplete copy is never left behind.

    Raises OSError if the copy cannot be written, ReadError if the vectors are damaged, and
    ValueError if they change meanwhile.
    """
    size = len(vectors) * vectors.spec.embed_dim * 6 / 1e6
    made = f"a copy of the index for quick searches ({size:,.0f} MB)"
    log.warning(f"making {file}, {made}")
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
