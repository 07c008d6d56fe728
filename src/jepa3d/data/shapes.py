"""What any source of shapes gives: its labels, its split, and a function that reads one shape.

Built-in shapes, stores, .npz bundles and everybody's files are opened here, so that datasets.py
brings them all to one standard form in one place.
"""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa3d.data import procedural, synthetic
from jepa3d.data.arrays import clouds_in, npz_headers, read_npz
from jepa3d.data.boundary import boundary, printable
from jepa3d.data.cloud import UNLABELLED, ReadError, check_cloud, to_parts
from jepa3d.data.io import SUFFIXES, enough_points
from jepa3d.data.sources import discover
from jepa3d.data.store import SPLITS, Store
from jepa3d.frame import LEAST, are_kept

NO_PARTS = (
    "has no part labels; give a store of jepa3d prepare --keep parts, a .npz with seg or parts, or "
    "such files"
)


class Shape(NamedTuple):
    """One shape as its source has it."""

    points: np.ndarray  # N 3
    up: str  # the axis that is up
    parts: np.ndarray | None = None  # N int16, where they are asked for
    unseen: int = 0  # points that are NaN and were left out


@dataclass(frozen=True)
class Shapes:
    """The shapes of a source, unread."""

    name: str
    read: Callable[[int], Shape]
    labels: np.ndarray  # n int64, -1 for none
    class_names: tuple[str, ...]
    split: np.ndarray  # n int8, index of SPLITS, -1 for none
    part_names: tuple[str, ...] = ()
    fingerprint: str | None = None  # None: that of the points which are read
    store: Store | None = None  # whose clouds are read in place when they are used
    batch: int = (
        1  # shapes that may be read at once: they are in memory, with equal numbers of points
    )
    total: int | None = None  # shapes of the whole source, if these are not all

    def rows(self, split: str) -> np.ndarray:
        """Indices of the shapes of a part; a source without a split is all train.

        Raises ReadError where the part is empty.
        """
        rows = np.arange(len(self.split))
        has_split = bool((self.split >= 0).any())
        if split != "all" and (has_split or split != "train"):
            rows = np.flatnonzero(self.split == SPLITS.index(split))
        if not len(rows):
            raise ReadError(f"{self.name}: no shapes in its {split} part")
        return rows


def opened(
    source: str,
    num_points: int,
    up_axis: str,
    labels_key: str,
    limit: int | None,
    raw: bool,
    parts: bool,
) -> Shapes:
    """The shapes of a source; arguments as of `datasets.py::load`. Raises ReadError."""
    path = Path(source)
    if source.split(":")[0] == "synthetic":
        return _synthetic(source, num_points, limit, parts)
    if (path / "store.json").is_file():
        return _store(path, num_points, up_axis, parts)
    if path.suffix == ".npz" and path.is_file() and clouds_in(path):
        return _bundle(path, num_points, up_axis, labels_key, parts)
    if path.exists() or procedural.count_of(path):
        return _files(path, num_points, up_axis, raw, parts)
    allowed = f"give synthetic, procedural:COUNT, a store, or files of {', '.join(SUFFIXES)}"
    raise ReadError(f"{source}: no such file or folder; {allowed}")


def _synthetic(source: str, num_points: int, limit: int | None, parts: bool) -> Shapes:
    """`synthetic` or `synthetic:COUNT`; every fourth shape is test, whatever COUNT is."""
    count = source.partition(":")[2] or "4000"
    if not count.isdigit() or int(count) < 8:
        allowed = "give synthetic or synthetic:COUNT with COUNT of at least 8"
        raise ReadError(f"{source}: {allowed}")
    total = int(count)
    made = synthetic.make_shapes(min(total, 4 * (limit or total)), 2 * num_points)
    points, labels = made["points"], made["labels"]
    # a class comes every 21: none is left out
    split = (np.arange(len(points)) % 4 == 3).astype(np.int8)
    return Shapes(
        source,
        lambda i: Shape(points[i], "z", made["parts"][i] if parts else None),
        labels,
        synthetic.CLASS_NAMES,
        split,
        synthetic.PART_NAMES,
        hashlib.sha256(points.tobytes()).hexdigest(),
        batch=64,
        total=total,
    )


def _store(path: Path, num_points: int, up_axis: str, parts: bool) -> Shapes:
    """A store; its clouds are read in place if they are in farthest point order."""
    store = Store(path)
    if up_axis != "z":
        raise ReadError(f"{path}: a store is z-up already; give the up axis to jepa3d prepare")
    if store.num_points is not None and store.num_points < num_points:
        needed = f"at least {num_points} are needed (num_points)"
        raise ReadError(f"{path}: clouds of {store.num_points} points, {needed}")
    if parts and len(store) and "parts" not in store.shard(0):
        raise ReadError(f"{path}: {NO_PARTS}")
    ordered = store.num_points and store.header["settings"]["reduce"] == "fps"

    def read(row: int) -> Shape:
        with boundary(path):
            points = store.points(row)
            _check(points, num_points, f"{store.key(row)}: ")
            return Shape(points, "z", store.array("parts", row) if parts else None)

    return Shapes(
        path.name,
        read,
        np.asarray(store.columns["label"]).astype(np.int64),
        store.class_names,
        np.asarray(store.columns["split"]),
        store.part_names,
        store.fingerprint,
        store if ordered or store.num_points == num_points else None,
    )


def _check(points: np.ndarray, num_points: int, where: str) -> None:
    check_cloud(points, where)
    if len(points) < num_points:
        needed = f"at least {num_points} are needed (num_points)"
        raise ReadError(f"{where}{len(points)} points, {needed}")


def _files(path: Path, num_points: int, up_axis: str, raw: bool, parts: bool) -> Shapes:
    """A folder, benchmark or single file, as `jepa3d prepare` reads it, without a store."""
    source = discover(path)
    entries = source.entries
    splits = [entry.split for entry in entries]
    if None in splits and any(splits):
        key = entries[splits.index(None)].key
        what = "is in no train or test folder, but others are; move it, or: jepa3d prepare"
        raise ReadError(f"{path}/{key}: {what}")

    def read(i: int) -> Shape:
        entry = entries[i]
        with boundary(path / entry.key if path.is_dir() else path):
            cloud = enough_points(entry.read(), num_points, seed=zlib.crc32(entry.key.encode()))
            if source.unpublished and not raw:
                kept = np.flatnonzero(are_kept(cloud.points.astype(np.float64), LEAST))
                cloud = cloud.take(kept) if len(kept) >= num_points else cloud
            if parts and cloud.parts is None:
                raise ReadError(NO_PARTS)
            labels = to_parts(cloud.parts) if parts and cloud.parts is not None else None
        return Shape(cloud.points, cloud.up or up_axis, labels, cloud.unseen)

    names = tuple(sorted({entry.label for entry in entries if entry.label is not None}))
    number = {name: i for i, name in enumerate(names)}
    labels = [-1 if entry.label is None else number[entry.label] for entry in entries]
    split = [-1 if name is None else SPLITS.index(name) for name in splits]
    parted = np.array(split, np.int8)
    return Shapes(path.name, read, np.array(labels, np.int64), names, parted, source.part_names)


# ------------------------------------------------------------------------------------------ bundles


def _bundle(path: Path, num_points: int, up_axis: str, labels_key: str, parts: bool) -> Shapes:
    """A .npz with points n N 3 and, if it has them, labels, class_names, split, seg or parts n N
    and part_names.
    """
    arrays = _arrays(path)
    points = arrays["points"]
    for i, cloud in enumerate(points):
        with boundary(path):
            _check(cloud, num_points, f"shape {i}: ")
    labels, names = _classes(arrays, labels_key, path)
    split = arrays.get("split", np.full(len(points), -1))
    for name, values in (("labels", labels), ("split", split)):
        if values.shape != (len(points),):
            raise ReadError(f"{path}: {len(points)} shapes but {name} {list(values.shape)}")
        if values.dtype.kind not in "iu":
            raise ReadError(f"{path}: {name} must be integers from 0, found {values.dtype}")
    if "split" in arrays and not np.isin(split, range(len(SPLITS))).all():
        allowed = "0 (train), 1 (test) or 2 (val)"
        raise ReadError(f"{path}: split must be {allowed}, found {split.min()} to {split.max()}")
    of_points, part_names = _parts(arrays, path) if parts else (None, ())
    return Shapes(
        path.name,
        lambda i: Shape(points[i], up_axis, None if of_points is None else of_points[i]),
        labels.astype(np.int64),
        names,
        split.astype(np.int8),
        part_names,
        hashlib.sha256(path.read_bytes()).hexdigest(),
        batch=64,
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a bundle, but those of objects and of raw data. Raises ReadError."""
    with boundary(path):
        headers = npz_headers(path)
        objects = {name for name, (_, kind) in headers.items() if kind.hasobject} - {"points"}
        names = [name for name in headers.keys() - objects if not name.startswith("raw_")]
        arrays = read_npz(path, names)
    points = arrays.get("points", np.empty(0))
    if (
        points.ndim != 3
        or points.shape[2] != 3
        or not len(points)
        or points.dtype.kind not in "iuf"
    ):
        kinds = [f"{name} {value.dtype} {list(value.shape)}" for name, value in arrays.items()]
        needed = "a bundle needs numbers 'points' [n, N, 3], n > 0"
        raise ReadError(f"{path}: {needed}; it has {', '.join(kinds) or 'nothing'}")
    return arrays


def _classes(
    arrays: dict[str, np.ndarray], key: str, path: Path
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels n of a bundle, -1 for none, and the names of the classes. Raises ReadError.

    Labels of the points [n, N] become the array parts.
    """
    shape = arrays["points"].shape[:2]
    labels, none = arrays.get(key), np.full(shape[0], -1)
    if labels is None:
        if key != "labels":
            known = ", ".join(name for name in arrays if name.startswith("labels")) or "no labels"
            raise ReadError(f"{path}: has no labels {key!r}; it has {known}")
        return none, ()
    if labels.shape in (shape, (*shape, 1)):
        arrays.setdefault("parts", labels.reshape(shape))
        return none, ()
    if labels.shape == (shape[0], 1):
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != shape[:1]:
        return labels, ()
    if labels.min() < 0:  # as of a store: of all shapes or of none
        return none, ()
    stem = key.removeprefix("labels").strip("_") or "class"
    names = tuple(printable(str(name)) for name in arrays.get(f"{stem}_names", ()))
    names = names or tuple(str(i) for i in range(int(labels.max()) + 1))
    if labels.max() >= len(names):
        raise ReadError(
            f"{path}: label {labels.max()}, but only {len(names)} names in {stem}_names"
        )
    return labels, names


def _parts(arrays: dict[str, np.ndarray], path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Part labels n N int16 of a bundle, and their names. Raises ReadError."""
    key = "seg" if "seg" in arrays else "parts"
    if key not in arrays:
        raise ReadError(f"{path}: {NO_PARTS}")
    parts, shape = arrays[key], arrays["points"].shape[:2]
    if parts.shape != shape or parts.dtype.kind not in "iu":
        found = f"found {parts.dtype} {list(parts.shape)}"
        raise ReadError(f"{path}: {key} must be a whole number a point, {list(shape)}, {found}")
    with boundary(path):
        parts = to_parts(parts)
        if empty := int((parts == UNLABELLED).all(1).sum()):
            reason = "all of theirs are -1 or the like"
            raise ReadError(f"{key}: {empty} shapes have no labelled point, {reason}")
        names = tuple(str(name) for name in arrays.get("part_names", ()))
        if names and (largest := parts.max()) >= len(names):
            raise ReadError(f"{key} must be from 0 to {len(names) - 1}, found {largest}")
    return parts, names
