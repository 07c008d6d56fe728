"""Open sources of shapes: built-in shapes, stores, .npz bundles and files.

A store is a folder that `jepa3d prepare` wrote. A bundle is an .npz file of many clouds. Each
source becomes a `Shapes` with labels, a split, and a function that reads one shape; datasets.py
then loads the shapes.
"""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jepa3d.data import procedural, synthetic
from jepa3d.data.arrays import clouds_in, facts_in
from jepa3d.data.cloud import UNLABELLED, PointCloud, ReadError, check_cloud, to_parts
from jepa3d.data.errors import as_read_error
from jepa3d.data.io import SUFFIXES, sampled
from jepa3d.data.sources import discover
from jepa3d.data.store import SPLITS, Store
from jepa3d.frame import LEAST, are_kept
from jepa3d.plain import sha256_of

NO_PARTS = (
    "has no part labels; give a store made by jepa3d prepare --keep parts, "
    "a .npz with an array seg or parts, or files with part labels"
)


@dataclass(frozen=True)
class Shapes:
    """The shapes of a source, not yet read."""

    name: str
    # returns shape i: a cloud with all of its points, or points sampled from a mesh. There are
    # usually more than the `num_points` that datasets.py then chooses. The cloud's fields `up`,
    # `unseen` and (if asked for) `parts` are set.
    read: Callable[[int], PointCloud]
    labels: np.ndarray  # [n] int64, -1 for no label
    class_names: tuple[str, ...]
    split: np.ndarray  # [n] int8, index into SPLITS, -1 for no split
    part_names: tuple[str, ...] = ()
    # identifies the data; if None, a digest of the points is used
    fingerprint: str | None = None
    # the store, if its clouds are read on demand, that is, when they are used; else None
    store: Store | None = None
    # number of shapes that datasets.py reads and converts together; above 1 if all shapes are in
    # memory and have the same number of points
    batch: int = 1
    # number of shapes in the source; given if this object may hold only some of them, else None
    total: int | None = None

    def rows(self, split: str) -> np.ndarray:
        """Return the indices of the shapes in a split, or of all shapes if `split` is "all".

        A source without a split counts as train.
        """
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
    """Open the shapes of one source. Arguments: see `datasets.py::load`.

    Raises ReadError if there is no such source, or if it cannot be used.
    """
    path = Path(source)
    if path.suffix.lower() == ".npz" and path.is_file() and clouds_in(path):
        return _bundle(path, num_points, up_axis, labels_key, parts)
    if labels_key != "labels":
        found = f"--labels-key {labels_key} chooses an array of an .npz of many clouds"
        raise ReadError(f"{source}: {found}, but this is none")
    if source.split(":")[0] == "synthetic":
        return _synthetic(source, num_points, limit, parts)
    if (path / "store.json").is_file():
        return _store(path, num_points, up_axis, parts)
    if path.exists() or procedural.count_of(source):
        return _files(path, num_points, up_axis, raw, parts)
    allowed = "synthetic, procedural:COUNT, a store, or files of " + ", ".join(SUFFIXES)
    raise ReadError(f"{source}: no such file or folder; give {allowed}")


def _synthetic(source: str, num_points: int, limit: int | None, parts: bool) -> Shapes:
    """Make the shapes of `synthetic` or `synthetic:COUNT`; every fourth shape is a test shape."""
    counted = source if ":" in source else "synthetic:4000"
    total = procedural.count_of(counted, "synthetic", 8)
    # Every fourth shape is a test shape and the others are train shapes. So 4 * limit shapes
    # include at least `limit` shapes of either split. Each shape is made with twice as many points
    # as are needed, so that farthest point sampling (in datasets.py) has a choice.
    made = synthetic.make_shapes(min(total, 4 * (limit or total)), 2 * num_points)
    points, labels = made["points"], made["labels"]
    # shape i has class i % 21; 4 and 21 have no common factor, so every class has a test shape
    # among any 84 shapes in a row
    split = (np.arange(len(points)) % 4 == 3).astype(np.int8)
    digest = hashlib.sha256(points.tobytes()).hexdigest()

    def read(i: int) -> PointCloud:
        part_labels = made["parts"][i] if parts else None
        return PointCloud(points[i], np.zeros(3), up="z", parts=part_labels)

    names = synthetic.CLASS_NAMES, split, synthetic.PART_NAMES
    return Shapes(source, read, labels, *names, digest, batch=64, total=total)


def _store(path: Path, num_points: int, up_axis: str, parts: bool) -> Shapes:
    """Open a store.

    Its clouds are read on demand if their first num_points points can be used as they are. If not,
    all clouds are read into memory and sampled anew. Raises ReadError if the store is damaged, if
    `up_axis` is not "z", or if `parts` is True and the store has no part labels.
    """
    store = Store(path)
    if up_axis != "z":
        raise ReadError(f"{path}: a store is z-up already; give --up-axis to jepa3d prepare")
    if parts and len(store) and "parts" not in store.shard(0):
        raise ReadError(f"{path}: {NO_PARTS}")
    ordered, have = store.header["settings"]["reduce"] == "fps", store.num_points or 0
    # Clouds reduced by "fps" have their points in farthest point order. In this order, the first
    # num_points points are a farthest point sample of all points.
    on_demand = store if have == num_points or (ordered and have > num_points) else None

    def read(row: int) -> PointCloud:
        with as_read_error(path):
            points = store.points(row).astype(np.float32)
            cloud = replace(store.cloud(row), points=points, up="z")
            return _checked(cloud, num_points, f"{store.key(row)}: ")

    labels = np.asarray(store.columns["label"]).astype(np.int64)
    names = store.class_names, np.asarray(store.columns["split"]), store.part_names
    return Shapes(_name(path), read, labels, *names, store.fingerprint, on_demand)


def _name(path: Path) -> str:
    """Return the name of a file or folder; the path of the working directory, `.`, has no name."""
    return path.name or path.resolve().name


def _checked(cloud: PointCloud, num_points: int, where: str = "") -> PointCloud:
    """Return the cloud if it is usable; otherwise raise ReadError. A cloud is usable if
    `check_cloud` accepts it and it has at least num_points points.

    where: text with which the error message begins.
    """
    check_cloud(cloud.points, where)
    if len(cloud) < num_points:
        needed = f"at least {num_points} are needed (num_points)"
        raise ReadError(f"{where}{len(cloud)} points, {needed}")
    return cloud


def _bundle(path: Path, num_points: int, up_axis: str, key: str, parts: bool) -> Shapes:
    """Open an .npz bundle, whose array of points [n, N, 3] is named points, data or xyz.

    The bundle may also have the arrays labels, class_names, split, seg (or parts) and part_names;
    arrays.py lists more names that are allowed. key: name of the labels array.
    """
    facts = facts_in(path, key, "points", *(["parts"] if parts else []))
    # further columns are ignored, as in `PointCloud.make`
    points, none = facts["points"][..., :3], np.full(len(facts["points"]), -1)
    labels, names = facts.get("label", none), facts.get("class_names", ())
    if not names:  # number the labels that occur, and name them by their value
        found, labels = np.unique(labels, return_inverse=True)
        unlabelled = int((found < 0).sum())
        names = tuple(map(str, found[unlabelled:].tolist()))
        labels -= unlabelled
    per_point, part_names = _parts(facts, path) if parts else ([None] * len(points), ())

    def read(i: int) -> PointCloud:
        with as_read_error(path):
            cloud = PointCloud(points[i], np.zeros(3), up=up_axis, parts=per_point[i])
            return _checked(cloud, num_points, f"shape {i}: ")

    split = facts.get("split", none).astype(np.int8)
    digest = sha256_of(path)
    return Shapes(path.name, read, labels, names, split, part_names, digest, batch=64)


def _parts(facts: dict[str, Any], path: Path) -> tuple[Any, tuple[str, ...]]:
    """Return an .npz's part labels [n, N] int16, and the names of the parts.

    Raises ReadError if part labels are missing, have a wrong shape or type, or are not covered by
    part_names, and if all points of a shape are unlabelled.
    """
    if "parts" not in facts:
        raise ReadError(f"{path}: {NO_PARTS}")
    parts, names = facts["parts"], facts.get("part_names", ())
    shape = facts["points"].shape[:2]
    with as_read_error(path):
        if parts.shape not in (shape, (*shape, 1)) or parts.dtype.kind not in "iu":
            found = f"found {parts.dtype} {list(parts.shape)}"
            raise ReadError(f"part labels must be integers {list(shape)}, {found}")
        parts = to_parts(parts.reshape(shape))
        if empty := int((parts == UNLABELLED).all(1).sum()):
            raise ReadError(f"{empty} shapes have no part label other than -1")
        if names and (largest := parts.max()) >= len(names):
            allowed = f"must be from 0 to {len(names) - 1}, as in part_names"
            raise ReadError(f"part labels {allowed}, found {largest}")
    return parts, names


def _files(path: Path, num_points: int, up_axis: str, raw: bool, parts: bool) -> Shapes:
    """Open a folder, benchmark, file or procedural:COUNT as `jepa3d prepare` does.

    Unlike that command, this function makes no store.
    """
    source = discover(path)
    entries = source.entries
    split = [-1 if e.split is None else SPLITS.index(e.split) for e in entries]
    if -1 in split and max(split) >= 0:
        key, what = entries[split.index(-1)].key, "is in no split, but other files are"
        raise ReadError(f"{path}/{key}: {what}")

    def read(i: int) -> PointCloud:
        key = entries[i].key
        with as_read_error(path / key if path.is_dir() else path):
            seed = zlib.crc32(key.encode("utf-8", "surrogateescape"))
            cloud = _checked(sampled(entries[i].cloud(), num_points, seed), num_points)
            # Stray points are removed only from a user's own files (`Source.unpublished`), and not
            # if fewer than num_points points would be left.
            if source.unpublished and not raw:
                kept = np.flatnonzero(are_kept(cloud.points.astype(np.float64), LEAST))
                cloud = cloud.take(kept) if len(kept) >= num_points else cloud
            labels = cloud.parts if parts else None
            if parts and labels is None:
                raise ReadError(NO_PARTS)
            labels = None if labels is None else to_parts(labels)
        return replace(cloud, up=cloud.up or up_axis, parts=labels)

    names = tuple(sorted({entry.label for entry in entries if entry.label is not None}))
    labels = [-1 if e.label is None else names.index(e.label) for e in entries]
    arrays = np.array(labels, np.int64), names, np.array(split, np.int8)
    return Shapes(_name(path), read, *arrays, source.part_names)
