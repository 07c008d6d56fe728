"""`jepa3d search`: the nearest vectors by cosine, exactly, from Parquet files, in the memory of a
row group.

Cosines in float32 leave few candidates, which are compared in float64 (`rank`). Many vectors are
read from a copy that is mapped into memory (mapped.py); of it few queries read directions in half
precision first, half as many bytes.
"""

import operator
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jepa3d.data.cloud import ReadError
from jepa3d.data.errors import as_read_error
from jepa3d.data.io import SUFFIXES
from jepa3d.inference import mapped
from jepa3d.inference.clouds import Address, listed, show_left_out
from jepa3d.inference.embedding import embed
from jepa3d.inference.vectors import Making, Vectors, to_numpy
from jepa3d.models.ready import fingerprint, load

if TYPE_CHECKING:
    from jepa3d.inference.lance import VectorStore

COLUMNS = ("path", "label", "num_points")
SLACK = 1e-5  # twice what cosines in float32 may be wrong by, in any order of summing
# In half precision they may be wrong by 0.00122: 2^-11 for rounding either factor, 2^-12 for
# rounding the sum, which torch makes in float32.
HALF_SLACK = 2.5e-3
FEW = 4  # queries up to which reading the vectors takes longer than multiplying them
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "~": lambda value, pattern: re.fullmatch(regex(pattern), value, re.DOTALL) is not None,
}


@dataclass(frozen=True)
class Hit:
    """A neighbour."""

    cosine: float
    path: str
    label: str | None


@dataclass(frozen=True)
class Condition:
    """`COLUMN OP VALUE` over path, label and num_points.

    OP is = != < <= > >=, or ~ for a pattern of * and ?.
    """

    column: str
    compare: str
    value: str | int

    @staticmethod
    def parse(text: str) -> "Condition":
        """Raises ValueError that says what is allowed."""
        match = re.fullmatch(r"\s*(\w+)\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*", text, re.DOTALL)
        if not match or match[1] not in COLUMNS:
            raise ValueError(
                f"condition {text!r}: 'COLUMN OP VALUE' in quotes, as the shell takes < > * ? for itself; "
                f"columns {', '.join(COLUMNS)}; OP = != < <= > >= or ~"
            )
        column, compare, value = match.groups()
        if column != "num_points":
            return Condition(column, compare, value)
        if not re.fullmatch(r"\d+", value) or compare == "~":
            raise ValueError(
                f"condition {text!r}: num_points is compared with a number, as in 'num_points>=1000'"
            )
        return Condition(column, compare, int(value))

    def holds(self, values: list) -> np.ndarray:
        """Which of a column's values it holds for; never for one that is missing, but for !=."""
        test = _COMPARE[self.compare]
        return np.array(
            [self.compare == "!=" if v is None else test(v, self.value) for v in values], bool
        )


def regex(pattern: str) -> str:
    """A pattern of * and ? as a regular expression."""
    return re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")


def search(
    index: str | Path,
    queries: np.ndarray,
    k: int = 10,
    where: Sequence[str] = (),
    but: Sequence[str | None] | None = None,
    probes: int | None = None,
) -> list[list[Hit]]:
    """The k rows of an index nearest to each query (q E) by cosine to six decimals, best first,
    ties by path.

    index: a Parquet file or folder of `jepa3d embed`, or a store of `jepa3d index`. where: see
    `Condition`; all must hold. but: of each query a path to leave out, whatever links lead there.
    probes: approximate, by that many partitions of an indexed store. Fewer come back where fewer
    remain. Raises ValueError for a query of other width, or that is not finite or zero.
    """
    if k < 1:
        raise ValueError(f"-k {k}: a number from 1")
    index, conditions = Path(index), [Condition.parse(text) for text in where]
    found = _find(index, queries, k + (but is not None), conditions, probes)
    return [
        _without(hits, path)[:k]
        for hits, path in zip(found, but or [None] * len(found), strict=True)
    ]


def _without(hits: list[Hit], path: str | None) -> list[Hit]:
    """Hits but for the one of a path, or of the file that it leads to."""
    paths = [hit.path for hit in hits]
    if path is not None and path not in paths:
        path = next((p for p in paths if os.path.realpath(p) == os.path.realpath(path)), None)
    return [hit for hit in hits if hit.path != path]


def rank(
    query: np.ndarray, vectors: np.ndarray, paths: list[str], labels: list[str | None], k: int
) -> list[Hit]:
    """The k of vectors n E nearest to a query E of length 1.

    Each cosine is summed by itself in float64 and rounded to six decimals, so that copies of a
    cloud tie wherever they lie, and ties are in the order of their paths.
    """
    x = vectors.astype(np.float64)
    cosine = np.round((x * query).sum(1) / np.linalg.norm(x, axis=1), 6)
    return sorted(map(Hit, cosine.tolist(), paths, labels), key=_order)[:k]


def _order(hit: Hit) -> tuple[float, str]:
    return -hit.cosine, hit.path


def _find(
    index: Path, queries: np.ndarray, k: int, conditions: list[Condition], probes: int | None
) -> list[list[Hit]]:
    vectors = open_index(index)
    if not isinstance(vectors, Vectors):
        if probes and not vectors.indexed:
            raise ValueError(
                f"{index}: has no index for --probes; build one with jepa3d index --ann"
            )
        return [
            vectors.search(query, k, conditions, probes) for query in unit(queries, vectors.making)
        ]
    if probes:
        raise ValueError(
            f"--probes {probes}: {index} is searched exactly; make a store of it with jepa3d index --ann"
        )
    directions = unit(queries, vectors.making)
    best: list[list[Hit]] = [[] for _ in directions]
    for group in mapped.groups(vectors):
        batch = group.read(["vector", *{condition.column for condition in conditions}])
        rows = np.arange(len(batch))
        for condition in conditions:
            rows = rows[condition.holds(batch.column(condition.column).take(rows).to_pylist())]
        if not len(rows):
            continue
        x, names = to_numpy(batch.column("vector")), None
        scores, slack = _cosines(group, x, directions)
        for i, query in enumerate(directions):
            worst = best[i][-1].cosine if len(best[i]) == k else -2.0  # a zero vector is no hit
            top = rows[_near(scores[i, rows], worst, k, slack)]
            if slack > SLACK:
                exact = x[top] @ query.astype(np.float32) / np.linalg.norm(x[top], axis=1)
                top = top[_near(exact, worst, k, SLACK)]
            if len(top):
                names = names or group.read(
                    ["path", "label"]
                )  # of few row groups: most are too far away
                path, label = (names.column(column).take(top).to_pylist() for column in (0, 1))
                best[i] = sorted(best[i] + rank(query, x[top], path, label, k), key=_order)[:k]
    return best


def _cosines(
    group: mapped.Group, x: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, float]:
    """Cosines q n of queries q E with the vectors x n E of a group, and the slack that their
    precision needs.

    The cosine of a zero vector is -inf.
    """
    length = np.linalg.norm(x, axis=1) if group.lengths is None else group.lengths
    if group.directions is not None and len(directions) <= FEW:
        # One by one: the product with a vector is several times as fast as that with a matrix of
        # few columns.
        made = [
            group.directions @ torch.from_numpy(query).to(torch.float16) for query in directions
        ]
        scores, slack = torch.stack(made).float().numpy(), HALF_SLACK
    else:
        scores, slack = (x @ directions.T.astype(np.float32)).T / np.maximum(length, 1e-30), SLACK
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


def unit(queries: np.ndarray, making: Making) -> np.ndarray:
    """Queries q E as directions, float64. Raises ValueError."""
    queries = np.atleast_2d(np.asarray(queries, np.float64))
    if queries.shape[-1] != making.embed_dim:
        raise ValueError(
            f"a query of {queries.shape[-1]} numbers, but the vectors have {making.embed_dim}"
        )
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


def making_of(index: Path) -> Making:
    return open_index(index).making


def query_vectors(
    index: Path, query: str, model: str | None = None
) -> tuple[list[str], np.ndarray]:
    """Names and vectors of a query: a file of one or many clouds, embedded as the index was, or a
    .npy of vectors.

    model: where the encoder of the index lies now. Raises ValueError where it is another.
    """
    making, path = making_of(index), Path(query)
    if Address.parse(query) is None:
        raise ReadError(
            f"{query}: no such file; a query is a cloud or mesh ({' '.join(SUFFIXES)}), or a .npy of vectors"
        )
    if path.suffix == ".npy" and path.is_file():
        with as_read_error(path):
            array = np.load(path, allow_pickle=False)
        if array.ndim and array.shape[-1] == making.embed_dim:
            return [query] * len(np.atleast_2d(array)), np.atleast_2d(array)
    making.check_frame(str(index))
    encoder = load(model or making.model)
    encoder.keep_strays = making.keep_strays
    if fingerprint(encoder) != making.fingerprint:
        raise ValueError(
            f"{index}: made with another encoder than {model or making.model}; embed again, or --model"
        )
    items, skipped = listed(path)
    show_left_out(skipped)
    return [item.path for item in items], embed(
        path, encoder, making.up_axis, making.layer, making.pooling
    )
