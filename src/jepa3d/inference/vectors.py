"""Vectors of clouds in Parquet: one row a cloud, and in the file's metadata what made them.

path        absolute; "FILE#ROW" in a file of many clouds, "STORE#KEY" in a store; unique
label       the class that its folder or file gives it, else its name in a file of many, or null
num_points  of the cloud as read
stamp       hash of size and time of change, or of a stored cloud's content: equal means unchanged
vector      E float32, not normalised
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jepa3d.data.cloud import ReadError
from jepa3d.frame import FRAME

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ValueError("vectors are kept in Parquet: pip install 'jepa3d[search]'") from error

FORMAT = "jepa3d-vectors-1"
ROWS = 8192  # of a row group
COMMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Making:
    """What made vectors; only those of one making can be compared."""

    model: str  # as given: a folder or Hub id, or "default"
    fingerprint: str
    layer: int
    pooling: str
    up_axis: str
    embed_dim: int  # of the vectors
    frame: int = 1  # version of frame.py; files of before have none

    def check_frame(self, where: str) -> None:
        """ValueError for vectors of a version of jepa3d that saw other points of a cloud."""
        if self.frame != FRAME:
            found = f"{where}: its vectors were made by another version of jepa3d (frame {self.frame}, here {FRAME})"
            raise ValueError(f"{found}; embed the clouds again, into another --out")

    def check(self, other: "Making", where: str) -> None:
        """ValueError naming the first difference; a model may go by two names."""
        if self.frame != other.frame:
            other.check_frame(where)
        for name, value in asdict(self).items():
            if name != "model" and value != (theirs := getattr(other, name)):
                what = "another model" if name == "fingerprint" else f"{name.replace('_', '-')} {theirs}"
                now = f"{other.model} there, {self.model} here" if name == "fingerprint" else f"not {value}"
                raise ValueError(f"{where}: its vectors were made with {what} ({now}); choose another --out or --model")


def schema(making: Making) -> pa.Schema:
    number = pa.field("element", pa.float32(), nullable=False)
    fields = [("path", pa.string()), ("label", pa.string()), ("num_points", pa.int64()), ("stamp", pa.uint64())]
    metadata = {"jepa3d": json.dumps({"format": FORMAT} | asdict(making))}
    return pa.schema([*fields, ("vector", pa.list_(number, making.embed_dim))], metadata)


def table(making: Making, rows: dict[str, list], vectors: np.ndarray) -> pa.Table:
    """Columns path, label, num_points, stamp and vectors n E as a table."""
    kind = schema(making)
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    columns = [pa.array(rows[name], kind.field(name).type) for name in kind.names[:-1]]
    return pa.Table.from_arrays(
        [*columns, pa.FixedSizeListArray.from_arrays(flat, type=kind.field("vector").type)], schema=kind
    )


def to_numpy(column: Any) -> np.ndarray:
    """A vector column, or a batch's, as n E float32."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), -1) for chunk in chunks if len(chunk)]
    return np.concatenate(parts) if parts else np.empty((0, column.type.list_size), np.float32)


class Vectors:
    """The vectors in a Parquet file, or in all of a folder. Raises ReadError for others, ValueError for a mixture."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.files = sorted(self.path.glob("*.parquet")) if self.path.is_dir() else [self.path]
        if not self.files:
            raise ReadError(f"{path}: holds no .parquet file; make some with jepa3d embed")
        self.making = _making(self.files[0])
        for file in self.files[1:]:
            self.making.check(_making(file), str(file))

    def __len__(self) -> int:
        return sum(pq.read_metadata(file).num_rows for file in self.files)

    def groups(self) -> Iterator[Callable[[list[str] | None], pa.RecordBatch]]:
        """A function for every row group, in the order of the files, that reads some or all of its columns."""
        for file in self.files:
            try:
                with pq.ParquetFile(file) as opened:
                    for i in range(opened.num_row_groups):
                        yield partial(_row_group, opened, i)
            except (pa.ArrowException, OSError) as error:
                raise ReadError(f"{file}: damaged ({str(error).splitlines()[0]})") from error

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Some or all columns of every row group."""
        for read in self.groups():
            yield read(columns)

    def column(self, name: str) -> list:
        return [value for batch in self.batches([name]) for value in batch.column(0).to_pylist()]


def _row_group(file: pq.ParquetFile, number: int, columns: list[str] | None) -> pa.RecordBatch:
    # Threads cost more than they give: nearly all of a row group is one column.
    return file.read_row_group(number, columns, use_threads=False).combine_chunks().to_batches()[0]


def _making(file: Path) -> Making:
    try:
        found = json.loads((pq.read_schema(file).metadata or {}).get(b"jepa3d", b"{}"))
    except (pa.ArrowException, OSError) as error:
        raise ReadError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    if found.pop("format", None) != FORMAT:
        raise ReadError(f"{file}: not a file of jepa3d embed")
    return Making(**found)


def write(tables: Iterator[pa.Table] | list[pa.Table], making: Making, path: Path) -> None:
    """Tables or batches as a Parquet file, atomically and durably."""
    partial = path.with_name(f".{path.name}.partial")
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["label"]}
    try:
        with pq.ParquetWriter(
            partial, schema(making), **options, use_byte_stream_split=["vector.list.element"]
        ) as writer:
            for some in tables:
                writer.write(some, row_group_size=ROWS)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def merge(old: list[Path], new: list[Path], making: Making, out: Path, dropped: set[str]) -> None:
    """One file of the rows of `new`, and of those of `old` that are not replaced by them or dropped.

    Nothing but a row group and the new paths is held in memory.
    """
    dropped = dropped.union(*(Vectors(file).column("path") for file in new))

    def rows() -> Iterator[pa.Table]:
        for file in old:
            for batch in Vectors(file).batches():
                keep = [path not in dropped for path in batch.column("path").to_pylist()]
                yield pa.Table.from_batches([batch]).filter(pa.array(keep, pa.bool_()))
        for file in new:
            yield from (pa.Table.from_batches([batch]) for batch in Vectors(file).batches())

    write(rows(), making, out)


class PartWriter:
    """Collects rows and makes them durable, a Parquet file at a time: every 8,192 rows or minute.

    finish: makes the vectors n E of a file of what was added with its rows, where that is no vector yet.
    """

    def __init__(self, folder: Path, stem: str, making: Making, finish: Callable[[list], np.ndarray] | None = None):
        self.folder, self.stem, self.making, self.finish = folder, stem, making, finish
        self._rows, self._made, self._last = [], [], time.monotonic()

    def add(self, row: dict[str, Any], made: np.ndarray) -> None:
        """A row's path, label, num_points and stamp, and its vector."""
        self._rows.append(row)
        self._made.append(made)
        if len(self._rows) >= ROWS or time.monotonic() - self._last > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        if self._rows:
            self.folder.mkdir(parents=True, exist_ok=True)
            vectors = self.finish(self._made) if self.finish else np.stack(self._made)
            columns = {name: [row[name] for row in self._rows] for name in self._rows[0]}
            file = self.folder / f"{self.stem}-{uuid.uuid4().hex[:12]}.parquet"  # beside those of other commands
            write([table(self.making, columns, vectors)], self.making, file)
        self._rows, self._made, self._last = [], [], time.monotonic()
