"""A copy of large Parquet vectors that is mapped into memory: many searches of one process read
nothing twice.

`NAME.arrow` beside the index holds its rows uncompressed, with the length of every vector and its
direction in half precision: what a single query reads of all of them. It says which files it was
made of, with their sizes and times of change, and is made again where any of these differs. It may
be deleted.
"""

import json
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor, from_dlpack

from jepa3d.data.errors import first_line
from jepa3d.inference.vectors import Vectors, to_numpy
from jepa3d.locking import writing
from jepa3d.plain import log

# Rows from which on a copy is made: fewer are read from Parquet in 0.2 seconds.
WORTH = 100_000
_KEY = b"jepa3d copy 2 of"


class Group(NamedTuple):
    """A row group of an index: a function that reads its columns, and what the copy knows besides."""

    read: Callable[[list[str]], pa.RecordBatch]  # some of its columns
    # Of its vectors, where they are known: the lengths n, and in half precision the directions n E
    # (of length 1, or zero for a zero vector).
    lengths: np.ndarray | None = None
    directions: Tensor | None = None


def groups(vectors: Vectors) -> Iterator[Group]:
    """The row groups of an index, one after another.

    From the copy, made now where it is missing or old; from Parquet where the vectors are few, the
    copy cannot be written, or another process is writing it.
    """
    batches = _copied(vectors) if len(vectors) >= WORTH else None
    if batches is None:
        yield from map(Group, vectors.groups())
        return
    for batch in batches:
        flat, lengths = from_dlpack(batch["direction"].flatten()), batch["length"]
        yield Group(batch.select, lengths.to_numpy(), flat.view(len(batch), -1))


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
    partial = file.with_name(f".{file.name}.partial")
    size = len(vectors) * vectors.spec.embed_dim * 6 / 1e6
    log.warning(f"making {file}, a copy for quick searches ({size:,.0f} MB)")
    try:
        with partial.open("wb") as sink:
            writer = None
            for batch in vectors.batches(["path", "label", "num_points", "vector"]):
                x = to_numpy(batch.column("vector"))
                length = np.linalg.norm(x, axis=1)
                half = (x / np.maximum(length, 1e-30)[:, None]).astype(np.float16)
                directions = pa.FixedSizeListArray.from_arrays(half.ravel(), x.shape[1])
                batch = batch.append_column("length", pa.array(length, pa.float32()))
                batch = batch.append_column("direction", directions)
                batch = batch.replace_schema_metadata({_KEY: stamp})
                writer = writer or pa.ipc.new_file(sink, batch.schema)
                writer.write_table(batch)
            if writer:
                writer.close()
            sink.flush()
            os.fsync(sink.fileno())
        if _stamp(vectors.files) != stamp:
            raise ValueError(f"{vectors.path}: changed while it was copied")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
