"""Vectors of clouds in Parquet: one row a cloud, and in the file's metadata what made them.

A file is replaced as a whole: readers see it as it was before or after a change, and a killed
writer changes nothing.

path        its address (clouds.py); unique
label       the class that its folder or file gives it, else its name in a file of many, or null
num_points  of the cloud as read
stamp       hash of size and time of change, or of a stored cloud's content: equal means unchanged
vector      E float32, not normalised
error       only in files of `Embedder`: why a cloud has no vector; such rows are none of `Vectors`
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
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
ROWS = 8192  # of a row group, at least; the last has the rest


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
    keep_strays: bool = False

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
                what = (
                    "another model"
                    if name == "fingerprint"
                    else f"{name.replace('_', '-')} {theirs}"
                )
                now = (
                    f"{other.model} there, {self.model} here"
                    if name == "fingerprint"
                    else f"not {value}"
                )
                raise ValueError(
                    f"{where}: its vectors were made with {what} ({now}); choose another --out or --model"
                )


def schema(making: Making, errors: bool = False) -> pa.Schema:
    number = pa.field("element", pa.float32(), nullable=False)
    fields = [
        ("path", pa.string()),
        ("label", pa.string()),
        ("num_points", pa.int64()),
        ("stamp", pa.uint64()),
    ]
    metadata = {"jepa3d": json.dumps({"format": FORMAT} | asdict(making))}
    fields += [
        ("vector", pa.list_(number, making.embed_dim)),
        *([("error", pa.string())] if errors else []),
    ]
    return pa.schema(fields, metadata)


def table(making: Making, rows: dict[str, list], vectors: np.ndarray) -> pa.Table:
    """Columns path, label, num_points and stamp, and vectors n E, as a table."""
    kind = schema(making)
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    columns = [pa.array(rows[name], kind.field(name).type) for name in kind.names[:-1]]
    return pa.Table.from_arrays(
        [*columns, pa.FixedSizeListArray.from_arrays(flat, type=kind.field("vector").type)],
        schema=kind,
    )


def with_errors(made: pa.Table, making: Making, failed: dict[str, list[str]]) -> pa.Table:
    """The rows of `table`, and those of clouds without a vector: path and error, all else null."""
    kind = schema(making, errors=True)
    columns = [failed.get(field.name, pa.nulls(len(failed["path"]), field.type)) for field in kind]
    lacking = pa.table(dict(zip(kind.names, columns, strict=True)), kind)
    good = made.append_column(kind.field("error"), pa.nulls(len(made), pa.string()))
    return pa.concat_tables([good, lacking])


def to_numpy(column: Any) -> np.ndarray:
    """A vector column, or a batch's, as n E float32."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [
        chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), -1)
        for chunk in chunks
        if len(chunk)
    ]
    if len(parts) == 1:
        return parts[0]  # not copied
    return np.concatenate(parts) if parts else np.empty((0, column.type.list_size), np.float32)


class Vectors:
    """The vectors in a Parquet file, or in all of a folder.

    Raises ReadError for what is no such file or, unless it may be, empty; ValueError for a mixture.
    """

    def __init__(self, path: str | Path, may_be_empty: bool = False):
        self.path = Path(path)
        self.files = sorted(self.path.glob("*.parquet")) if self.path.is_dir() else [self.path]
        if not self.files:
            raise ReadError(f"{path}: holds no .parquet file; make some with jepa3d embed")
        self.making = _making(self.files[0])
        for file in self.files[1:]:
            self.making.check(_making(file), str(file))
        if not may_be_empty and not len(self):
            raise ReadError(f"{path}: holds no vectors; add some with jepa3d embed")

    def __len__(self) -> int:
        return sum(_count(file) for file in self.files)

    def groups(self) -> Iterator[Callable[[list[str] | None], pa.RecordBatch]]:
        """A function for every row group, in the order of the files, that reads some or all of its
        columns.
        """
        for file in self.files:
            try:
                with pq.ParquetFile(file) as opened:
                    for i in range(opened.num_row_groups):
                        if opened.metadata.row_group(
                            i
                        ).num_rows:  # files of earlier versions may have empty ones
                            good = _good(opened, i)
                            if good is None or good.true_count:
                                yield partial(_row_group, opened, i, file, good)
            except (pa.ArrowException, OSError) as error:
                raise ReadError(f"{file}: damaged ({str(error).splitlines()[0]})") from error

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Some or all columns of every row group."""
        for read in self.groups():
            yield read(columns)

    def column(self, name: str) -> list:
        return [value for batch in self.batches([name]) for value in batch.column(0).to_pylist()]


def _count(file: Path) -> int:
    """The rows that have a vector."""
    with pq.ParquetFile(file) as opened:
        errors = "error" in opened.schema_arrow.names
        return opened.read(["error"])["error"].null_count if errors else opened.metadata.num_rows


def _good(opened: pq.ParquetFile, number: int) -> pa.BooleanArray | None:
    """Which rows of a row group have a vector; None where all do."""
    if "error" not in opened.schema_arrow.names:
        return None
    return opened.read_row_group(number, ["error"])["error"].is_null().combine_chunks()


def _row_group(
    opened: pq.ParquetFile,
    number: int,
    file: Path,
    good: pa.BooleanArray | None,
    columns: list[str] | None,
) -> pa.RecordBatch:
    try:  # threads cost more than they give: nearly all of a row group is one column
        found = opened.read_row_group(number, columns, use_threads=False)
        if good is not None:
            found = found.filter(good).select(
                [name for name in found.column_names if name != "error"]
            )
        return found.combine_chunks().to_batches()[0]
    except (pa.ArrowException, OSError) as error:
        raise ReadError(f"{file}: damaged ({str(error).splitlines()[0]})") from error


def _making(file: Path) -> Making:
    try:
        found = json.loads((pq.read_schema(file).metadata or {}).get(b"jepa3d", b"{}"))
    except (pa.ArrowException, OSError) as error:
        raise ReadError(
            f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})"
        ) from error
    if found.pop("format", None) != FORMAT:
        raise ReadError(f"{file}: not a file of jepa3d embed")
    return Making(**found)


def write(tables: Iterable[pa.Table], making: Making, path: Path, errors: bool = False) -> None:
    """Make a Parquet file of the rows of all tables, in groups of 8,192 to 16,384, atomically and
    durably.

    errors: the tables are those of `with_errors`.
    """
    partial = path.with_name(f".{path.name}.partial")
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["label"]}
    waiting, count = [], 0
    try:
        with pq.ParquetWriter(
            partial,
            schema(making, errors),
            **options,
            use_byte_stream_split=["vector.list.element"],
        ) as writer:
            for some in tables:
                waiting.append(some)
                count += len(some)
                if count >= ROWS:
                    writer.write_table(pa.concat_tables(waiting), 2 * ROWS)
                    waiting, count = [], 0
            if count:
                writer.write_table(pa.concat_tables(waiting))
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def update(path: Path, making: Making, new: pa.Table, dropped: set[str]) -> None:
    """Put rows into a file, there or not, in place of those of the same path, and drop others.

    In bounded memory.
    """
    dropped = dropped.union(new.column("path").to_pylist())

    def rows() -> Iterator[pa.Table]:
        for batch in Vectors(path, may_be_empty=True).batches() if path.exists() else ():
            keep = [name not in dropped for name in batch.column("path").to_pylist()]
            yield pa.Table.from_batches([batch]).filter(pa.array(keep, pa.bool_()))
        yield new

    write(rows(), making, path)
