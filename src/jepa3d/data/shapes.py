"""What every source of shapes gives: labels, a split, and a function that reads one shape.

Built-in shapes, stores, .npz bundles and files are opened here; datasets.py reads them.
"""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa3d.data import procedural, synthetic
from jepa3d.data.arrays import clouds_in, npz_headers, read_npz
from jepa3d.data.cloud import UNLABELLED, ReadError, check_cloud, to_parts
from jepa3d.data.errors import as_read_error, printable
from jepa3d.data.io import SUFFIXES, enough_points
from jepa3d.data.sources import discover
from jepa3d.data.store import SPLITS, Store
from jepa3d.frame import LEAST, are_kept

NO_PARTS = (
    "has no part labels; give a store of jepa3d prepare --keep parts, "
    "a .npz with seg or parts, or such files"
)


class Shape(NamedTuple):
    """One shape in the form that its source has it."""

    points: np.ndarray  # N 3
    up: str  # the axis that is up
    parts: np.ndarray | None = None  # N int16, if they are asked for
    unseen: int = 0  # points that are NaN and were left out


@dataclass(frozen=True)
class Shapes:
    """The shapes of a source, not yet read."""

    name: str
    read: Callable[[int], Shape]
    labels: np.ndarray  # n int64, -1 for none
    class_names: tuple[str, ...]
    split: np.ndarray  # n int8, index of SPLITS, -1 for none
    part_names: tuple[str, ...] = ()
    fingerprint: str | None = None  # None for a digest of the points
    store: Store | None = None  # if clouds are read in place, when they are used
    # shapes to read at once; more than 1 if they are in memory and have equal numbers of points
    batch: int = 1
    total: int | None = None  # shapes of the whole source, if these are not all

    def rows(self, split: str) -> np.ndarray:
        """Indices of the shapes in a part; a source without a split is all train."""
        if split == "all" or (split == "train" and (self.split < 0).all()):
            return np.arange(len(self.split))
        return np.flatnonzero(self.split == SPLITS.index(split))


def open_shapes(
    source: str,
    num_points: int,
    up_axis: str,
    labels_key: str,
    limit: int | None,
    raw: bool,
    parts: bool,
) -> Shapes:
    """The shapes of a source. Arguments as of `datasets.py::load`. Raises ReadError."""
    path = Path(source)
    if source.split(":")[0] == "synthetic":
        return _synthetic(source, num_points, limit, parts)
    if (path / "store.json").is_file():
        return _store(path, num_points, up_axis, parts)
    if path.suffix == ".npz" and path.is_file() and clouds_in(path):
        return _bundle(path, num_points, up_axis, labels_key, parts)
    if path.exists() or procedural.count_of(path):
        return _files(path, num_points, up_axis, raw, parts)
    allowed = "synthetic, procedural:COUNT, a store, or files of " + ", ".join(SUFFIXES)
    raise ReadError(f"{source}: no such file or folder; give {allowed}")


def _synthetic(source: str, num_points: int, limit: int | None, parts: bool) -> Shapes:
    """`synthetic` or `synthetic:COUNT`; every fourth shape is test, for any COUNT."""
    count = source.partition(":")[2] or "4000"
    if not count.isdigit() or int(count) < 8:
        raise ReadError(f"{source}: give synthetic:COUNT with COUNT of at least 8")
    total = int(count)
    made = synthetic.make_shapes(min(total, 4 * (limit or total)), 2 * num_points)
    points, labels = made["points"], made["labels"]
    # classes repeat every 21 shapes, so that test has all of them
    split = (np.arange(len(points)) % 4 == 3).astype(np.int8)
    digest = hashlib.sha256(points.tobytes()).hexdigest()

    def read(i: int) -> Shape:
        return Shape(points[i], "z", made["parts"][i] if parts else None)

    names = synthetic.CLASS_NAMES, split, synthetic.PART_NAMES
    return Shapes(source, read, labels, *names, digest, batch=64, total=total)


def _store(path: Path, num_points: int, up_axis: str, parts: bool) -> Shapes:
    """A store; its clouds are read in place if they are in farthest point order."""
    store = Store(path)
    if up_axis != "z":
        raise ReadError(f"{path}: a store is z-up already (prepare --up-axis)")
    if store.num_points is not None and store.num_points < num_points:
        raise ReadError(f"{path}: clouds of {_too_few(store.num_points, num_points)}")
    if parts and len(store) and "parts" not in store.shard(0):
        raise ReadError(f"{path}: {NO_PARTS}")
    ordered = store.num_points and store.header["settings"]["reduce"] == "fps"

    def read(row: int) -> Shape:
        with as_read_error(path):
            points = store.points(row)
            _check(points, num_points, f"{store.key(row)}: ")
            return Shape(points, "z", store.array("parts", row) if parts else None)

    labels = np.asarray(store.columns["label"]).astype(np.int64)
    names = store.class_names, np.asarray(store.columns["split"]), store.part_names
    in_place = store if ordered or store.num_points == num_points else None
    return Shapes(path.name, read, labels, *names, store.fingerprint, in_place)


def _check(points: np.ndarray, num_points: int, where: str) -> None:
    check_cloud(points, where)
    if len(points) < num_points:
        raise ReadError(f"{where}{_too_few(len(points), num_points)}")


def _too_few(count: int, num_points: int) -> str:
    return f"{count} points, at least {num_points} are needed (num_points)"


def _files(path: Path, num_points: int, up_axis: str, raw: bool, parts: bool) -> Shapes:
    """A folder, benchmark or single file, as `jepa3d prepare` reads it, without a store."""
    source = discover(path)
    entries = source.entries
    split = [-1 if e.split is None else SPLITS.index(e.split) for e in entries]
    if -1 in split and max(split) >= 0:
        key, what = entries[split.index(-1)].key, "is in no train or test folder"
        raise ReadError(f"{path}/{key}: {what}, but others are")

    def read(i: int) -> Shape:
        key = entries[i].key
        with as_read_error(path / key if path.is_dir() else path):
            seed = zlib.crc32(key.encode())
            cloud = enough_points(entries[i].read(), num_points, seed)
            if source.unpublished and not raw:
                kept = np.flatnonzero(are_kept(cloud.points.astype(np.float64), LEAST))
                cloud = cloud.take(kept) if len(kept) >= num_points else cloud
            labels = cloud.parts if parts else None
            if parts and labels is None:
                raise ReadError(NO_PARTS)
            labels = None if labels is None else to_parts(labels)
        return Shape(cloud.points, cloud.up or up_axis, labels, cloud.unseen)

    names = tuple(sorted({entry.label for entry in entries if entry.label is not None}))
    labels = [-1 if e.label is None else names.index(e.label) for e in entries]
    numbers, parted = np.array(labels, np.int64), np.array(split, np.int8)
    return Shapes(path.name, read, numbers, names, parted, source.part_names)


# ------------------------------------------------------------------------------------------ bundles


def _bundle(path: Path, num_points: int, up_axis: str, key: str, parts: bool) -> Shapes:
    """A .npz with points n N 3 and optionally labels, class_names, split, seg or parts, part_names."""
    arrays = _arrays(path)
    points = arrays["points"]
    for i, cloud in enumerate(points):
        with as_read_error(path):
            _check(cloud, num_points, f"shape {i}: ")
    labels, names = _classes(arrays, key, path)
    split = arrays.get("split", np.full(len(points), -1))
    for name, values in (("labels", labels), ("split", split)):
        size, kind = list(values.shape), values.dtype
        if size != [len(points)]:
            raise ReadError(f"{path}: {len(points)} shapes but {name} {size}")
        if kind.kind not in "iu":
            raise ReadError(f"{path}: {name} must be integers from 0, found {kind}")
    if "split" in arrays and not np.isin(split, range(len(SPLITS))).all():
        raise ReadError(f"{path}: split must be 0, 1 or 2, found {split.max()}")
    of_points, part_names = [None] * len(points), ()
    if parts:
        of_points, part_names = _parts(arrays, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    labels, split = labels.astype(np.int64), split.astype(np.int8)

    def read(i: int) -> Shape:
        return Shape(points[i], up_axis, of_points[i])

    return Shapes(path.name, read, labels, names, split, part_names, digest, batch=64)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a bundle, without those of Python objects and raw data. Raises ReadError."""
    with as_read_error(path):
        headers = npz_headers(path)
        objects = {name for name, (_, kind) in headers.items() if kind.hasobject}
        names = headers.keys() - (objects - {"points"})
        arrays = read_npz(path, [name for name in names if not name.startswith("raw_")])
    points = arrays.get("points", np.empty(0))
    usable = points.ndim == 3 and len(points) and points.dtype.kind in "iuf"
    if not usable or points.shape[2] != 3:
        kinds = [f"{name} {a.dtype} {list(a.shape)}" for name, a in arrays.items()]
        needed = "a bundle needs numbers 'points' [n, N, 3], n > 0"
        raise ReadError(f"{path}: {needed}; it has {', '.join(kinds) or 'nothing'}")
    return arrays


def _classes(
    arrays: dict[str, np.ndarray], key: str, path: Path
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels n of a bundle, -1 for none, and the names of its classes. Raises ReadError.

    Labels of points, [n, N], become the array parts.
    """
    shape = arrays["points"].shape[:2]
    labels, none = arrays.get(key), np.full(shape[0], -1)
    if labels is None:
        if key != "labels":
            known = ", ".join(name for name in arrays if name.startswith("labels"))
            raise ReadError(f"{path}: has no labels {key!r}, but {known or 'none'}")
        return none, ()
    if labels.shape in (shape, (*shape, 1)):
        arrays.setdefault("parts", labels.reshape(shape))
        return none, ()
    if labels.shape == (shape[0], 1):
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != shape[:1]:
        return labels, ()
    if labels.min() < 0:  # as in a store, all shapes must have a label, or none has
        return none, ()
    stem = key.removeprefix("labels").strip("_") or "class"
    names = tuple(printable(str(name)) for name in arrays.get(f"{stem}_names", ()))
    names = names or tuple(str(i) for i in range(int(labels.max()) + 1))
    if (most := labels.max()) >= len(names):
        raise ReadError(f"{path}: label {most}, but {len(names)} {stem}_names")
    return labels, names


def _parts(arrays: dict[str, np.ndarray], path: Path) -> tuple[Any, tuple[str, ...]]:
    """Part labels n N int16 of a bundle, and the names of the parts. Raises ReadError."""
    key = "seg" if "seg" in arrays else "parts"
    if key not in arrays:
        raise ReadError(f"{path}: {NO_PARTS}")
    parts, shape = arrays[key], arrays["points"].shape[:2]
    if parts.shape != shape or parts.dtype.kind not in "iu":
        found = f"{parts.dtype} {list(parts.shape)}"
        raise ReadError(f"{path}: {key} must be integers {list(shape)}, found {found}")
    with as_read_error(path):
        parts = to_parts(parts)
        if empty := int((parts == UNLABELLED).all(1).sum()):
            raise ReadError(f"{key}: {empty} shapes have no labelled point, only -1")
        names = tuple(str(name) for name in arrays.get("part_names", ()))
        if names and (largest := parts.max()) >= len(names):
            raise ReadError(f"{key} must be from 0 to {len(names) - 1}, found {largest}")
    return parts, names
