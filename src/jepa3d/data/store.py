"""Store a data set on disk: shards of points that are read on demand, an index, a JSON header.

STORE/store.json      the header: settings, class names, one record per shard. A shard becomes part
                      of the store when its record is written to the header.
STORE/points-00000.safetensors  the first shard: the points of its clouds, concatenated, and their
                      "normals", "colors" and "parts", if the store keeps them
STORE/index/NAME.bin  one row per cloud (see COLUMNS); keys.bin holds the text of the keys

A key names a cloud: it is the path of the cloud's file in the source (the folder, file or archive
that was converted), with #row added if the file has many clouds. Clouds are z-up in the unit
sphere. If R rotates the up axis of a file to z, the coordinates in the file are
R^T(points) * scale + origin. A writer appends shards. When it continues a store, it first cuts off
the index rows of shards that the header does not record; an interrupted command may have left such
rows.
"""

import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from jepa3d.data.cloud import TO_Z_UP, PointCloud, ReadError
from jepa3d.plain import naming, sha256_of, write_bytes

FORMAT = "jepa3d-store-1"
SPLITS = ("train", "test", "val")
SHARD_BYTES = 32 << 20  # a shard is written once it has 32 MiB of points and attributes
# files that a command leaves if it is killed at the first write to a new store; a folder with no
# other files counts as empty
_UNFINISHED = (".store.json.partial", ".store.json.lock")
# settings that older stores do not record -> the value that the older versions used
_LATER = {"keep_strays": True, "reader": None}
# columns of the index: name -> type and shape of a row
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "end": ("<i8", ()),  # number of points in the store up to the end of this cloud
    "label": ("<i4", ()),  # index into class_names, -1 for no label
    "split": ("i1", ()),  # index into SPLITS, -1 for no split
    "up": ("i1", ()),  # up axis of the file, as an index into "xyz"
    "frame": ("<f8", (4,)),  # origin (3 values) and scale
    "content": ("<u8", ()),  # hash of the points in the file; equal for duplicates
    "key": ("<u8", ()),  # hash of the key
    "key_end": ("<i8", ()),  # number of bytes in keys.bin up to the end of this key
}


def hash64(data: bytes) -> int:
    """Compute a 64-bit BLAKE2b hash of some bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def key_hash(key: str) -> int:
    """Compute the hash of a cloud's key, as in the column "key" of the index."""
    return hash64(key.encode("utf-8", "surrogateescape"))


class Store:
    """A store, opened for reading. Opening reads only its header and index.

    unfinished: also allow a store that is not complete. Raises ReadError for a path that is no
    store, for a damaged store and, unless `unfinished` is True, for a store that is not complete.
    """

    def __init__(self, path: str | Path, unfinished: bool = False):
        self.path = Path(path)
        try:
            self.header = json.loads((self.path / "store.json").read_text())
            found, shards = self.header.get("format"), self.header.get("shards", ())
            # for each shard, the index of its first cloud and the index of its first point; the
            # last entry of each array is the total number of clouds or points
            self.first = np.cumsum([0] + [shard["clouds"] for shard in shards])
            self._start = np.cumsum([0] + [shard["points"] for shard in shards])
            self.num_points: int | None = self.header["num_points"]
            self.class_names = tuple(self.header["class_names"])
            self.part_names = tuple(self.header["part_names"])
            complete = self.header["complete"]
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise ReadError(f"{path}: not a store, or damaged ({error})") from error
        if found != FORMAT:
            raise ReadError(f"{path}: has format {found!r}; only {FORMAT!r} is read")
        if not (unfinished or complete):
            raise ReadError(f"{path}: is an unfinished store; run jepa3d prepare again")
        self.columns = {name: self._column(name) for name in COLUMNS}
        # If all columns of the index are in memory, the index is checked now. If some columns are
        # memory-mapped, only `verify` checks the index.
        if not any(isinstance(column, np.memmap) for column in self.columns.values()):
            self._check_index()
        # open shards, oldest first: number -> size of its file in bytes, and its arrays
        self._open: dict[int, tuple[int, dict[str, np.ndarray]]] = {}

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def fingerprint(self) -> str:
        """sha256 of the shard records in the header, which contain the checksums of the shards."""
        shards = json.dumps(self.header["shards"], sort_keys=True)
        return hashlib.sha256(shards.encode()).hexdigest()

    def _column(self, name: str) -> np.ndarray:
        path, kind = self.path / "index" / f"{name}.bin", np.dtype(COLUMNS[name])
        if not (needed := len(self) * kind.itemsize):
            return np.empty(0, kind)
        if not path.is_file() or path.stat().st_size < needed:
            raise ReadError(f"{path}: missing or cut off; it must have {needed} bytes")
        # A column of under 16 MiB is read into memory, since a memory-mapped file that is cut off
        # later would kill the process. A larger column is mapped all the same, to save memory.
        if needed < 16 << 20:
            return np.fromfile(path, kind, len(self))
        return np.memmap(path, kind, "r", shape=len(self))

    def shard(self, index: int) -> dict[str, np.ndarray]:
        """Open shard `index` as memory-mapped arrays. Raises ReadError if it is missing or damaged.

        Only damage to the header or the length of the file is noticed here. Damaged values are not,
        since only `verify` checks the checksum. At most 64 shards stay open, since the number of
        open files of a process is limited. Training shuffles the clouds of 32 shards at a time
        (`WINDOW` in training/loop.py), so it does not need more.
        """
        path = self.path / self.header["shards"][index]["file"]
        size = path.stat().st_size if path.is_file() else 0
        # Threads need no lock, since each has its own reference to the arrays that it reads.
        opened = self._open.get(index)
        if opened is None:
            try:
                opened = self._open[index] = size, _map_safetensors(path)
            except (OSError, ValueError, KeyError) as error:
                raise ReadError(f"{path}: not a readable shard ({error})") from error
        size_at_opening, found = opened
        if size < size_at_opening:
            # reading the missing pages would crash the process
            raise ReadError(f"{path}: was deleted or cut off while it was read")
        for first in list(self._open)[:-64]:  # forget the shards that were opened first
            self._open.pop(first, None)
        return found

    def _span(self, row: int) -> tuple[int, slice]:
        """Return the number of the shard that holds a cloud, and the cloud's rows in the shard."""
        if not 0 <= row < len(self):
            raise IndexError(f"there is no cloud {row} of {len(self)}")
        shard = int(np.searchsorted(self.first, row, side="right")) - 1
        begin, end = self._bounds("end", row)
        return shard, slice(begin - self._start[shard], end - self._start[shard])

    def _bounds(self, name: str, row: int) -> tuple[int, int]:
        """Return where the points of a cloud, or the text of its key, begin and end.

        name: the column of the ends: "end" for points, "key_end" for keys.
        """
        ends = self.columns[name]
        return int(ends[row - 1]) if row else 0, int(ends[row])

    def array(self, name: str, row: int, count: int | None = None) -> np.ndarray:
        """Return the first `count` rows (all if None) of a cloud's array, memory-mapped.

        name: points, normals, colors or parts. Raises KeyError if the store lacks this array,
        IndexError if it has no cloud `row`, and ReadError as `shard` does.
        """
        shard, rows = self._span(row)
        return self.shard(shard)[name][rows][:count]

    def points(self, row: int, count: int | None = None) -> np.ndarray:
        """Return the first `count` points [n, 3] (all if None) of a cloud, memory-mapped."""
        return self.array("points", row, count)

    def cloud(self, row: int) -> PointCloud:
        """Read a cloud with all its stored attributes.

        Points and normals have the axes of the cloud's file; `up` says which of them points up.
        """
        names, frame = self.shard(self._span(row)[0]), self.columns["frame"][row]
        arrays: dict[str, Any] = {name: self.array(name, row) for name in names}
        up = "xyz"[self.columns["up"][row]]
        for name in arrays.keys() & {"points", "normals"}:
            arrays[name] = np.asarray(arrays[name], np.float32) @ TO_Z_UP[up]
        origin, scale = np.array(frame[:3]), float(frame[3])
        return PointCloud(origin=origin, scale=scale, up=up, **arrays)

    def key(self, row: int) -> str:
        """Return the key of a cloud."""
        begin, end = self._bounds("key_end", row)
        with (self.path / "index" / "keys.bin").open("rb") as file:
            file.seek(begin)
            return file.read(end - begin).decode("utf-8", "surrogateescape")

    def verify(self) -> None:
        """Check all checksums, and that all coordinates are finite.

        Raises a ReadError that names what is damaged: a file, index rows or a cloud.
        """
        for i, shard in enumerate(self.header["shards"]):
            path = self.path / shard["file"]
            if sha256_of(path) != shard["sha256"]:
                raise ReadError(f"{path}: missing or damaged: its checksum differs")
            for row in range(*self.first[i : i + 2].tolist()):
                self._check_finite(row, self.points(row))
        self._check_index()
        path = self.path / "index" / "keys.bin"
        text = path.read_bytes() if path.is_file() else b""
        for row, key in enumerate(self.columns["key"].tolist()):
            if hash64(text[slice(*self._bounds("key_end", row))]) != key:
                raise ReadError(f"{path}: its text is not the text that was written")

    def _check_finite(self, row: int, points: np.ndarray) -> None:
        if not np.isfinite(points).all():
            wrong = "NaN or infinite coordinates (check with jepa3d info --verify)"
            raise ReadError(f"{self.path}: {self.key(row)}: {wrong}")

    def _check_index(self) -> None:
        """Raise ReadError if the index rows of a shard do not have the checksum in the header."""
        for i, shard in enumerate(self.header["shards"]):
            (begin, end), crc = self.first[i : i + 2].tolist(), 0
            for name in COLUMNS:
                crc = zlib.crc32(self.columns[name][begin:end].tobytes(), crc)
            if crc != shard["index_crc32"]:
                raise ReadError(f"{self.path}: index rows {begin} to {end} are damaged")


class StoredPoints:
    """Points [n, N, 3] float32, or part labels [n, N] int16, of some clouds of a store.

    The values are read from disk when this object is indexed; `PointClouds` (datasets.py) uses the
    object like an array. rows: the rows of the n clouds in the store. num_points: the number N; the
    first N stored points of each cloud are used. name: "points" or "parts".
    """

    def __init__(self, store: Store, rows: np.ndarray, num_points: int, name="points"):
        self.store, self.rows, self.num_points = store, rows, num_points
        self.name = name
        self.shape = (len(rows), num_points, 3)[: 3 if name == "points" else 2]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> np.ndarray:
        """Read clouds at a slice, mask or array of indices, or one cloud at an integer.

        Returns points [n, N, 3] in the unit sphere, or part labels [n, N]. For one cloud, the
        shape is [N, 3] or [N].
        """
        rows = np.atleast_1d(self.rows[index])
        kind = np.float32 if self.name == "points" else np.int16
        out = np.empty((len(rows), *self.shape[1:]), kind)
        for i, row in enumerate(rows.tolist()):
            out[i] = self.store.array(self.name, row, self.num_points)
            self.store._check_finite(row, out[i])
        # normalise again: a sample of the stored points has another centroid and radius
        if self.name == "points" and self.num_points != self.store.num_points:
            out -= out.mean(1, keepdims=True)
            out /= np.linalg.norm(out, axis=2).max(1)[:, None, None]
        return out[0] if np.ndim(self.rows[index]) == 0 else out

    def select(self, keep: np.ndarray) -> "StoredPoints":
        """Choose clouds by a mask or an array of indices, without reading them."""
        return StoredPoints(self.store, self.rows[keep], self.num_points, self.name)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Number of these clouds in each shard that has any, in the order of the shards.

        If the clouds are not in the order of the store, they count as a single shard.
        """
        if (np.diff(self.rows) < 0).any():
            return (len(self.rows),)
        counts = np.diff(np.searchsorted(self.rows, self.store.first))
        return tuple(counts[counts > 0].tolist())


class StoreWriter:
    """Append clouds to a new store, or to a store with the same settings. Use it in a `with` block.

    At the end of the block, all added clouds are written to the store (see `commit`), unless an
    OSError ended the block. The store is marked complete only if no exception ended the block. A
    new store without clouds is deleted. settings: the fields of `Preparation` (prepare.py). Raises
    ValueError if `path` is a file or a non-empty folder that is no store, or if the store has other
    settings or part names. Raises ReadError if the store is damaged.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        class_names: tuple[str, ...],
        part_names: tuple[str, ...],
    ):
        self.path, self._index = path, path / "index"
        self._rows: list[dict[str, Any]] = []
        self._clouds: list[dict[str, np.ndarray]] = []
        self._bytes = 0
        self._new = not (path / "store.json").is_file()
        if self._new:
            names = [p.name for p in path.iterdir()] if path.is_dir() else []
            if (path.exists() and not path.is_dir()) or set(names) - {*_UNFINISHED}:
                raise ValueError(f"{path}: is not a store; choose another --out")
            header = {
                "format": FORMAT,
                "complete": False,
                "settings": settings,
                "shards": [],
                "num_points": settings["points"],
                "class_names": [],
                "part_names": list(part_names),
            }
            # from here on, `path` is a store that can be continued
            write_bytes(path / "store.json", json.dumps(header).encode())
        store = Store(path, unfinished=True)
        recorded, wanted = _LATER | store.header["settings"], _LATER | settings
        if recorded != wanted:
            name = next(key for key in wanted if recorded.get(key) != wanted[key])
            was = f"begun with {name} = {recorded.get(name)}, not {wanted[name]}"
            raise ValueError(f"{path}: was {was}; choose another --out")
        if part_names and part_names != store.part_names:
            raise ValueError(f"{path}: has other part names; choose another --out")
        classes = dict.fromkeys([*store.class_names, *class_names])
        self.header = store.header | {"settings": settings, "class_names": [*classes]}
        # number of points, and number of bytes of keys; both include clouds not yet written
        self._end = int(store.columns["end"][-1]) if len(store) else 0
        self._key_end = int(store.columns["key_end"][-1]) if len(store) else 0
        self._size = {name: rows.nbytes for name, rows in store.columns.items()}
        self._size["keys"] = self._key_end
        # the store is still empty if the command that began it was killed
        self._new |= not len(store)
        del store  # closes its index, which is truncated below
        self._index.mkdir(exist_ok=True)
        for name, size in self._size.items():
            file = self._index / f"{name}.bin"
            file.touch()
            os.truncate(file, size)

    def keys(self) -> np.ndarray:
        """Return the hashes of the keys of all committed clouds."""
        return np.fromfile(self._index / "key.bin", COLUMNS["key"][0])

    def add(self, key: str, arrays: dict[str, np.ndarray], **row: Any) -> None:
        """Add a cloud: its arrays (points and attributes) and its row of the index.

        row: label and split (names or None), up ("x", "y" or "z"), and frame and content as in
        `COLUMNS`; other entries are ignored. Raises ValueError if the label is not a class of the
        store. Once the added clouds fill a shard (`SHARD_BYTES`), they are written.
        """
        label, split, classes = row["label"], row["split"], self.header["class_names"]
        if label is not None and label not in classes:
            raise ValueError(f"{key}: class {label!r} is not a class of the store")
        text = key.encode("utf-8", "surrogateescape")
        self._end += len(arrays["points"])
        self._key_end += len(text)
        row |= {
            "end": self._end,
            "label": -1 if label is None else classes.index(label),
            "split": -1 if split is None else SPLITS.index(split),
            "up": "xyz".index(row["up"]),
            "key": hash64(text),
            "key_end": self._key_end,
            "text": text,
        }
        self._rows.append(row)
        self._clouds.append(arrays)
        self._bytes += sum(values.nbytes for values in arrays.values())
        if self._bytes >= SHARD_BYTES:
            self.commit()

    def commit(self) -> None:
        """Write all added clouds: first the shard, then the index, then the header.

        Only the header makes the clouds part of the store, so an interrupted commit does not change
        the store.
        """
        header, sizes = self.header, self._size
        if self._clouds:
            clouds = self._clouds
            arrays = {name: np.concatenate([c[name] for c in clouds]) for name in clouds[0]}
            content, crc = save(arrays), 0
            shard = {
                "file": f"points-{len(header['shards']):05d}.safetensors",
                "clouds": len(clouds),
                "points": len(arrays["points"]),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            write_bytes(self.path / shard["file"], content)
            for name, (kind, _) in COLUMNS.items():
                rows = np.array([row[name] for row in self._rows], kind).tobytes()
                crc = zlib.crc32(rows, crc)
                sizes = sizes | {name: self._append(name, rows)}
            keys = b"".join(row["text"] for row in self._rows)
            sizes = sizes | {"keys": self._append("keys", keys)}
            shards = [*header["shards"], shard | {"index_crc32": crc}]
            header = header | {"shards": shards}
        write_bytes(self.path / "store.json", json.dumps(header, indent=1).encode())
        # updated last, so that a failed commit can be repeated
        self.header, self._size = header, sizes
        self._rows, self._clouds, self._bytes = [], [], 0

    def _append(self, name: str, content: bytes) -> int:
        """Write content after the committed rows of an index file. Returns the new size."""
        with naming(path := self._index / f"{name}.bin"), path.open("r+b") as file:
            file.seek(self._size[name])
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def __enter__(self) -> "StoreWriter":
        self.header["complete"] = False
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if not isinstance(error, OSError):
            self.header["complete"] = kind is None
            self.commit()
        if self._new and not self.header["shards"]:  # nothing was added
            shutil.rmtree(self.path.resolve())  # rmtree refuses links


def _map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Memory-map the tensors of a safetensors file; returns a dict from names to arrays.

    The file consists of 8 bytes with the length of the header, the header in JSON, and the data.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"its header claims {length:,} bytes")
        header = json.loads(file.read(length))
    kinds = {"F16": "<f2", "F32": "<f4", "U8": "u1", "I16": "<i2", "I32": "<i4"}
    data = np.memmap(path, np.uint8, "r", offset=8 + length)
    out = {}
    for name, entry in header.items():
        if name != "__metadata__":
            values = data[slice(*entry["data_offsets"])].view(kinds[entry["dtype"]])
            out[name] = values.reshape(entry["shape"])
    return out
