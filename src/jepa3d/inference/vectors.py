"""Read and write vectors of clouds in Parquet files. A file has one row per cloud; its metadata say
how the vectors were computed (spec.py).

A file is always replaced as a whole: readers see it as it was before or after a change, and a
killed writer changes nothing. The columns are:

path        the cloud's address (clouds.py), unique
label       the cloud's class, from its folder or file. If the cloud has no class, the label is its
            name in a file of many clouds. If it has no name either, the label is null
num_points  number of points in the cloud as it was read; for a mesh, the number of its vertices
stamp       for a cloud in a store that `jepa3d prepare` made, a hash of its content, its class and
            the settings of the store; for any other cloud, a hash of its file's size and
            modification time. While the stamp stays equal, the cloud is unchanged
vector      E numbers, float32; the vector is not scaled to length 1
error       why the cloud has no vector; null if it has one. Only the tables that `Embedder`
            (embedding.py) returns, and files made from these tables, have this column. `Vectors`
            skips rows with an error
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jepa3d.data.cloud import ReadError
from jepa3d.data.errors import first_line
from jepa3d.inference.spec import EmbeddingSpec
from jepa3d.plain import replacing

try:
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.parquet as pq
except ImportError as error:
    raise ValueError("vectors need Parquet: pip install 'jepa3d[search]'") from error

# The functions of pyarrow.compute are created only when it is imported, so type checkers do not see
# them. Therefore the type is Any.
pc: Any = pa.compute
FORMAT = "jepa3d-vectors-1"
# Tables with fewer rows are joined before they are written, see `write`. A search reads one row
# group at a time, so many small row groups would make it slow.
ROWS = 8192

# a function that reads some or all columns of a row group
ReadGroup = Callable[[list[str] | None], pa.Table]


def vector_type(embed_dim: int, dtype: str = "float32") -> pa.DataType:
    """Return the type of a column of vectors."""
    number = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
    return pa.list_(number, embed_dim)


def schema(spec: EmbeddingSpec) -> pa.Schema:
    """Return the columns and metadata of a file of vectors."""
    columns = {"path": pa.string(), "label": pa.string(), "num_points": pa.int64()}
    columns |= {"stamp": pa.uint64(), "vector": vector_type(spec.embed_dim)}
    return pa.schema(columns, {"jepa3d": json.dumps({"format": FORMAT} | asdict(spec))})


def table(spec: EmbeddingSpec, rows: Iterable[tuple]) -> pa.Table:
    """Make a table of rows (path, label, num_points, stamp, vector)."""
    *columns, vectors = [*zip(*rows, strict=True)] or [()] * 5
    return pa.table([*columns, to_column(vectors, spec.embed_dim)], schema(spec))


def with_errors(rows: pa.Table, failed: list[tuple[str, str]]) -> pa.Table:
    """Add a column `error` to rows. For each (path, error) in `failed`, also add a row with these
    two values; its other columns are null.
    """
    rows = rows.append_column("error", pa.nulls(len(rows), pa.string()))
    kind = pa.schema({"path": pa.string(), "error": pa.string()})
    lacking = pa.table(list(zip(*failed, strict=True)) or [[], []], kind)
    return pa.concat_tables([rows, lacking], promote_options="default")


def to_column(vectors: Sequence | np.ndarray, embed_dim: int, dtype: str = "float32") -> pa.Array:
    """Turn vectors [n, E] into a column."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=vector_type(embed_dim, dtype))


def to_numpy(column: Any) -> np.ndarray:
    """Turn a column of vectors into an array [n, E], without a copy if the column is one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), column.type.list_size)


class Vectors:
    """The vectors in a Parquet file, or in all Parquet files of a folder.

    may_be_empty: allow files without vectors. Raises ReadError if a file is not a file of vectors,
    if the folder has no Parquet file, or if there are no vectors but `may_be_empty` is False.
    Raises ValueError if the specifications of the files (`EmbeddingSpec`, spec.py) differ.
    """

    def __init__(self, path: str | Path, may_be_empty: bool = False):
        self.path = Path(path)
        inside = sorted(self.path.glob("*.parquet"))
        self.files = inside if self.path.is_dir() else [self.path]
        if not self.files:
            hint = "make one with jepa3d embed"
            raise ReadError(f"{path}: holds no .parquet file; {hint}")
        self.spec = _read_spec(self.files[0])
        for file in self.files[1:]:
            self.spec.check(_read_spec(file), file)
        if not may_be_empty and not len(self):
            raise ReadError(f"{path}: holds no vectors; add some with jepa3d embed")

    def __len__(self) -> int:
        return sum(_count(file) for file in self.files)

    def groups(self) -> Iterator[ReadGroup]:
        """Yield, for every row group, a function that reads columns of the group. Each function can
        be used until the next one is yielded.
        """
        for file in self.files:
            with _naming(file), pq.ParquetFile(file) as opened:
                for number in range(opened.num_row_groups):
                    # Files of earlier versions may have empty groups.
                    if opened.metadata.row_group(number).num_rows:
                        yield partial(_read_group, opened, number, file)

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield some or all columns of every row group."""
        for read in self.groups():
            yield read(columns)

    def column(self, name: str) -> list:
        """Return the values of a column."""
        parts = (batch.column(0).to_pylist() for batch in self.batches([name]))
        return [value for part in parts for value in part]

    def array(self) -> np.ndarray:
        """Return all vectors [n, E]."""
        batches = self.batches(["vector"])
        return np.concatenate([to_numpy(batch.column(0)) for batch in batches])


@contextmanager
def _naming(file: Path, problem: str = "damaged") -> Iterator[None]:
    """Return a context manager that turns errors of the Parquet library into a ReadError, which
    names the file.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ReadError(f"{file}: {problem} ({first_line(error)})") from error


def _count(file: Path) -> int:
    """Count the rows that have a vector."""
    with _naming(file), pq.ParquetFile(file) as opened:
        if "error" in opened.schema_arrow.names:
            return opened.read(["error"])["error"].null_count
        return opened.metadata.num_rows


def _read_group(
    opened: pq.ParquetFile, number: int, file: Path, columns: list[str] | None
) -> pa.Table:
    """Read columns of a row group, without the rows that have no vector."""
    names = opened.schema_arrow.names
    wanted = [name for name in columns or names if name != "error"]
    errors = [name for name in names if name == "error"]
    # Threads would slow this down, since nearly all data of a row group is in one column.
    with _naming(file):
        found = opened.read_row_group(number, wanted + errors, use_threads=False)
        if errors:
            found = found.filter(pc.is_null(found["error"])).drop_columns("error")
        return found.combine_chunks()


def _read_spec(file: Path) -> EmbeddingSpec:
    """Read the specification of a file of vectors. Raises ReadError for any other file."""
    with _naming(file, "not a readable Parquet file"):
        metadata = pq.read_schema(file).metadata or {}
    return spec_of(metadata, f"{file}: not a file of jepa3d embed")


def spec_of(metadata: dict[bytes, bytes], message: str) -> EmbeddingSpec:
    """Return the specification in the metadata of a file or store. Raises ReadError(message) if
    there is none.
    """
    found = json.loads(metadata.get(b"jepa3d", b"{}"))
    if found.pop("format", None) != FORMAT:
        raise ReadError(message)
    return EmbeddingSpec(**found)


def write(tables: Iterable[pa.Table], path: Path, minimum: int | None = None) -> None:
    """Write tables of one schema to a Parquet file, atomically and durably.

    Tables are joined until they have at least `minimum` rows (default `ROWS`). They are then
    written in row groups of at most 2 * `minimum` rows. There must be at least one table, which may
    be empty. Raises OSError if the file cannot be written.
    """
    tables, minimum = iter(tables), minimum or ROWS
    waiting = [next(tables)]
    kind = waiting[0].schema
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["label"]}
    lists = [x for x in kind if pa.types.is_fixed_size_list(x.type)]
    floats = [x.name for x in lists if x.type.value_type == pa.float32()]
    options["use_byte_stream_split"] = [f"{x}.list.element" for x in floats] or False

    def flush(writer: pq.ParquetWriter) -> None:
        if any(map(len, waiting)):
            writer.write_table(pa.concat_tables(waiting), 2 * minimum)
        waiting.clear()

    try:
        with replacing(path) as file, pq.ParquetWriter(file, kind, **options) as writer:
            for rows in tables:
                if sum(map(len, waiting)) >= minimum:
                    flush(writer)
                waiting.append(rows)
            flush(writer)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def update(path: Path, new: pa.Table, dropped: set[str]) -> None:
    """Add the rows `new` to a file; existing rows of the same paths are replaced. If there is no
    file yet, create it.

    dropped: paths whose rows are deleted. Only a few row groups of the file are in memory at a
    time.
    """
    dropped_paths = pa.array([*dropped, *new["path"].to_pylist()], pa.string())

    def rows() -> Iterator[pa.Table]:
        old = Vectors(path, may_be_empty=True).batches() if path.exists() else ()
        for batch in old:
            kept = batch.filter(pc.invert(pc.is_in(batch["path"], dropped_paths)))
            yield kept.replace_schema_metadata(new.schema.metadata)
        yield new

    write(rows(), path)
