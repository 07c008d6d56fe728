"""`jepa3d index`: copy the vectors of Parquet files into a LanceDB database, here called a store.
A store can hold millions of vectors, which can be added, deleted and searched.

A search without `probes` compares the query with all vectors, so it is exact. A search with
`probes` is approximate; it needs the index of partitions (IVF_FLAT) that `build` adds. Every change
is one LanceDB transaction: readers see the store as it was before or after the change, and a killed
writer changes nothing.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from jepa3d.data.cloud import ReadError
from jepa3d.data.errors import first_line
from jepa3d.inference.hits import SLACK, Condition, Hit, rank
from jepa3d.inference.vectors import Vectors, schema, spec_of, to_numpy

try:
    import lancedb
    import pyarrow as pa
    from lancedb.index import BTree, IvfFlat
except ImportError as error:
    raise ValueError(
        "a store of jepa3d index needs LanceDB: pip install 'jepa3d[search]'"
    ) from error

_TABLE = "vectors"
# number of rows requested in addition to k, so that ties with the k-th row are noticed; if even
# more rows tie, `search` makes a second request for all of them
_SPARE = 64
# Old versions of the store are kept for this time, since other processes may still read them.
_OLD = timedelta(hours=1)


class VectorStore:
    """An existing store. To make a new store, use `create_or_update`.

    Hold the lock `jepa3d.locking.writing` while changing the store. Raises ReadError if there is no
    store at `path`, or if what is there was not made by `jepa3d index`.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_dir():
            raise ReadError(f"{path}: no such LanceDB store; make it with jepa3d index")
        try:
            self.table = _connect(path).open_table(_TABLE)
        except (ValueError, RuntimeError, OSError) as error:
            wrong = f"not a store of jepa3d index ({first_line(error)})"
            raise ReadError(f"{path}: {wrong}") from error
        wrong = "a LanceDB store, but not of jepa3d index"
        self.spec = spec_of(self.table.schema.metadata or {}, f"{path}: {wrong}")

    def __len__(self) -> int:
        return self.table.count_rows()

    def delete(self, conditions: list[Condition]) -> int:
        """Delete the rows for which all conditions hold. Returns the number of deleted rows."""
        count = self.table.delete(_sql(conditions)).num_deleted_rows
        self.table.optimize(cleanup_older_than=_OLD)
        return count

    def build(self) -> None:
        """Build an index for approximate search. The number of partitions is the square root of the
        number of rows. The vectors in the index are not compressed. An index of the paths is built
        too.
        """
        self.table.create_index("vector", config=IvfFlat(distance_type="cosine"))
        self.table.create_index("path", config=BTree())

    @property
    def indexed(self) -> bool:
        """Whether the store has an index for approximate search."""
        return any("vector" in index.columns for index in self.table.list_indices())

    def search(
        self, query: np.ndarray, k: int, conditions: list[Condition], probes: int | None
    ) -> list[Hit]:
        """Return the k rows with the highest cosine to a query [E] (of length 1) among the rows
        for which all conditions hold, in the order of `hits.py::rank`.

        probes: how many partitions of the index to search; None for an exact search. Raises
        ValueError if `probes` is given but the store has no index.
        """
        if probes and not self.indexed:
            raise ValueError(f"{self.path}: --probes needs jepa3d index --ann first")
        ask = self.table.search(query.astype(np.float32)).distance_type("cosine")
        ask = ask.select(["path", "label", "vector", "_distance"])
        ask = ask.nprobes(probes) if probes else ask.bypass_vector_index()
        ask = ask.where(_sql(conditions)) if conditions else ask
        rows = ask.limit(k + _SPARE).to_arrow()
        distance = rows.column("_distance").to_pylist()
        # If even the last of these rows ties with the k-th row, further rows may tie too. So all
        # rows up to the distance of the k-th row are requested.
        if len(rows) == k + _SPARE and distance[-1] <= distance[k - 1] + SLACK:
            ask = ask.distance_range(None, distance[k - 1] + SLACK)
            rows = ask.limit(len(self)).to_arrow()
        paths, labels = (rows.column(name).to_pylist() for name in ("path", "label"))
        return rank(query, to_numpy(rows.column("vector")), paths, labels, k)


def create_or_update(vectors: Vectors, path: Path) -> tuple[int, int]:
    """Add vectors to a store. A vector replaces a stored row of the same path. If there is no store
    at `path`, it is made.

    Returns the number of new rows and the number of replaced rows. Vectors of length zero are left
    out, since they have no cosine. Raises ValueError if the name of `path` does not end in
    .lancedb, or if the vectors have another specification than the store (spec.py: the encoder and
    settings with which they were computed). Raises ReadError if `path` is a file, or a folder that
    is not a store, or if the vectors are damaged.
    """
    if path.suffix != ".lancedb":
        expected = "a folder whose name ends in .lancedb"
        raise ValueError(f"{path}: a LanceDB store is {expected}")
    table = path / f"{_TABLE}.lance"
    # If the command that made the store was killed, the table may have no finished transaction. The
    # table is then made again.
    unfinished = path.is_dir() and set(path.iterdir()) <= {table}
    unfinished = unfinished and not any((table / "_versions").glob("*.manifest"))
    if not path.exists() or unfinished:
        try:
            with _reader(vectors) as reader:
                _connect(path).create_table(_TABLE, reader)
        except ReadError:
            shutil.rmtree(path)
            raise
        return len(VectorStore(path)), 0
    store = VectorStore(path)
    vectors.spec.check(store.spec, path)
    merging = store.table.merge_insert("path").when_matched_update_all()
    with _reader(vectors) as reader:
        result = merging.when_not_matched_insert_all().execute(reader)
    # `optimize` also adds the new rows to the index for approximate search.
    store.table.optimize(cleanup_older_than=_OLD)
    return result.num_inserted_rows, result.num_updated_rows


@contextmanager
def _reader(vectors: Vectors) -> Iterator[pa.RecordBatchReader]:
    """Return a context manager that gives LanceDB the rows whose vectors are not zero. If
    reading the rows raises a ReadError, LanceDB raises a RuntimeError in its place; this context
    manager then raises the original ReadError.
    """
    kind, damage = schema(vectors.spec), []

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            for batch in vectors.batches():
                nonzero = np.linalg.norm(to_numpy(batch["vector"]), axis=1) > 0
                yield from batch.filter(pa.array(nonzero)).cast(kind).to_batches()
        except ReadError as error:
            damage.append(error)
            raise

    try:
        yield pa.RecordBatchReader.from_batches(kind, batches())
    except RuntimeError as error:
        raise (damage or [error])[0] from None


def _connect(path: Path) -> Any:
    # With an interval of 0, changes made by other processes are seen at once.
    return lancedb.connect(str(path), read_consistency_interval=timedelta(0))


def _sql(conditions: list[Condition]) -> str:
    return " AND ".join(condition.sql() for condition in conditions)
