"""`jepa3d search`: the nearest vectors by cosine, exactly, from Parquet files, in the memory of a
row group.

Cosines in float32 leave few candidates, which are compared in float64 (`rank`). Many vectors are
read from a copy that is mapped into memory (mapped.py). Of that copy a few queries first read the
directions in half precision, which is half as many bytes.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from jepa3d.data.cloud import ReadError
from jepa3d.data.errors import as_read_error, left_out
from jepa3d.data.io import SUFFIXES
from jepa3d.inference import mapped
from jepa3d.inference.clouds import Address
from jepa3d.inference.embedding import Embedded, embed_each
from jepa3d.inference.hits import SLACK, Condition, Hit, best, rank
from jepa3d.inference.vectors import Vectors, to_numpy
from jepa3d.plain import log

if TYPE_CHECKING:
    from jepa3d.inference.lance import VectorStore

# In half precision cosines may be wrong by 0.00122: 2^-11 for rounding either factor, 2^-12 for
# rounding the sum, which torch makes in float32.
HALF_SLACK = 2.5e-3
FEW = 4  # queries up to which reading the vectors takes longer than multiplying them


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
            hint = "make a store of it with jepa3d index --ann"
            raise ValueError(f"--probes {probes}: {index} is searched exactly; {hint}")
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
    for group in mapped.groups(vectors):
        batch = group.read(["vector", *{condition.column for condition in conditions}])
        mask = np.ones(len(batch), bool)
        for condition in conditions:
            mask &= condition.holds(batch.column(condition.column))
        rows = np.flatnonzero(mask)
        if not len(rows):
            continue
        x, names = to_numpy(batch.column("vector")), None
        scores, slack = _cosines(group, x, directions)
        for i, query in enumerate(directions):
            # Above -inf, the cosine of a zero vector, which is no hit.
            worst = hits[i][-1].cosine if len(hits[i]) == k else -2.0
            top = rows[_near(scores[i, rows], worst, k, slack)]
            if slack > SLACK:
                exact = x[top] @ query.astype(np.float32)
                exact /= np.linalg.norm(x[top], axis=1)
                top = top[_near(exact, worst, k, SLACK)]
            if len(top):  # most groups are too far away
                names = names or group.read(["path", "label"])
                path, label = (names.column(i).take(top).to_pylist() for i in (0, 1))
                hits[i] = best(hits[i] + rank(query, x[top], path, label, k), k)
    return hits


def _cosines(
    group: mapped.Group, x: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, float]:
    """Cosines q n of queries q E with the vectors x n E of a group, and the slack that their
    precision needs.

    The cosine of a zero vector is -inf.
    """
    length = np.linalg.norm(x, axis=1) if group.lengths is None else group.lengths
    if group.directions is not None and len(directions) <= FEW:
        # The product with a vector is several times as fast as that with a matrix of few columns.
        queries = torch.from_numpy(directions).to(torch.float16)
        products = torch.stack([group.directions @ query for query in queries])
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
    now. Raises ValueError where it is another, and ReadError where no cloud can be used.
    """
    spec, path = open_index(Path(index)).spec, Path(query)
    if Address.parse(query) is None:
        kinds = f"a cloud or mesh ({' '.join(SUFFIXES)}), or a .npy of vectors"
        raise ReadError(f"{query}: no such file; a query is {kinds}")
    if path.suffix == ".npy" and path.is_file():
        with as_read_error(path):
            array = np.load(path, allow_pickle=False)
        if array.ndim and array.shape[-1] == spec.embed_dim:
            return [str(query)] * len(np.atleast_2d(array)), np.atleast_2d(array)
    encoder = spec.encoder(index, model)
    found = embed_each(path, encoder, spec)
    errors = [left_out(path, made) for path, made in found if isinstance(made, str)]
    if len(errors) == len(found):
        raise ReadError(errors[0].removeprefix("left out: "))
    for error in errors:
        log.warning(error)
    good = [(path, made.vector) for path, made in found if isinstance(made, Embedded)]
    return [path for path, _ in good], np.stack([vector for _, vector in good])
