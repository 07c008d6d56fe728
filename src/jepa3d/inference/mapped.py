"""A copy of large Parquet vectors that is mapped into memory: many searches of one process read
nothing twice.

`NAME.arrow` beside the index holds its rows uncompressed, with the length of every vector and its
direction in half precision: what a single query reads of all of them. It says which files it was
made of, with their sizes and times of change, and is made again where any of these differs. It may
be deleted.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor, from_dlpack

from jepa3d.inference.vectors import Vectors, to_numpy
from jepa3d.locking import writing

WORTH = 100_000  # rows from which on a copy is made: fewer are read from Parquet in 0.2 seconds
_KEY = b"jepa3d copy 2 of"


class Group(NamedTuple):
    """A row group of an index."""

    read: Callable[[list[str]], pa.RecordBatch]  # some of its columns
    lengths: np.ndarray | None = None  # of its vectors, where they are known
    directions: Tensor | None = (
        None  # n E, vectors of length 1 in half precision, where they are known; zero if zero
    )


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
        directions = from_dlpack(batch.column("direction").flatten()).view(len(batch), -1)
        yield Group(batch.select, batch.column("length").to_numpy(), directions)


def copy_of(index: Path) -> Path:
    """Where the copy of an index lies."""
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
    except (
        OSError,
        ValueError,
        pa.ArrowException,
    ) as error:  # a full disk, another process at it, damaged vectors
        print(f"searching without {file.name}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def _stamp(files: list[Path]) -> str:
    """Equal where every file is the same one: a change of vectors replaces a file by a new one."""
    found = [
        (file.name, stat.st_size, stat.st_mtime_ns, stat.st_ino)
        for file in files
        if (stat := file.stat())
    ]
    return json.dumps(found)


@lru_cache(maxsize=2)  # mapped once, so that a search meets pages that are there
def _open(file: Path, stamp: str) -> list[pa.RecordBatch]:
    """The row groups of a copy, nothing read yet.

    Raises OSError or ValueError where it is none of these files.
    """
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    if (reader.schema.metadata or {}).get(_KEY) != stamp.encode():
        raise ValueError(f"{file}: a copy of other vectors")
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _write(vectors: Vectors, file: Path, stamp: str) -> None:
    """Whole or not at all. Raises OSError, and ValueError where the vectors changed meanwhile."""
    partial = file.with_name(f".{file.name}.partial")
    size = len(vectors) * vectors.making.embed_dim * 6 / 1e6
    print(f"making {file}, a copy for quick searches ({size:,.0f} MB)", file=sys.stderr, flush=True)
    try:
        with partial.open("wb") as sink:
            writer = None
            for batch in vectors.batches(["path", "label", "num_points", "vector"]):
                x = to_numpy(batch.column("vector"))
                length = np.linalg.norm(x, axis=1)
                half = (x / np.maximum(length, 1e-30)[:, None]).astype(np.float16)
                batch = batch.append_column("length", pa.array(length, pa.float32()))
                batch = batch.append_column(
                    "direction", pa.FixedSizeListArray.from_arrays(half.ravel(), x.shape[1])
                )
                batch = batch.replace_schema_metadata(None)
                writer = writer or pa.ipc.new_file(sink, batch.schema.with_metadata({_KEY: stamp}))
                writer.write_batch(batch)
            if writer:
                writer.close()
            sink.flush()
            os.fsync(sink.fileno())
        if _stamp(vectors.files) != stamp:
            raise ValueError(f"{vectors.path}: changed while it was copied")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
