"""Any source of shapes as `PointClouds`: synthetic shapes, stores, .npz bundles, benchmarks,
folders, single files.

The contract: fixed N, float32, unit sphere, z up, resampled once by farthest points (paper IV-A),
never in a step.
"""

import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from jepa3d.data import procedural, synthetic
from jepa3d.data.arrays import NO_PARTS, clouds_in, npz_headers, parts_in, read_npz
from jepa3d.data.boundary import boundary, printable
from jepa3d.data.cloud import TO_Z_UP, ReadError, check_cloud, to_parts
from jepa3d.data.io import SUFFIXES, enough_points
from jepa3d.data.sources import discover
from jepa3d.data.store import SPLITS, Store, StoredPoints
from jepa3d.frame import LEAST, are_kept
from jepa3d.ops import farthest_point_sample, gather_points, unit_sphere


class StoredParts:
    """Part labels n N int16 of clouds that are read in place, read when indexed: see
    `StoredPoints`.
    """

    def __init__(self, points: StoredPoints):
        self.points = points

    @property
    def shape(self) -> tuple[int, int]:
        return self.points.shape[:2]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index) -> np.ndarray:
        """n N at an index, slice, mask or array of indices; N at a number."""
        rows, count = self.points.rows[index], self.points.num_points
        found = [self.points.store.parts(row, count) for row in np.atleast_1d(rows).tolist()]
        return np.array(found, np.int16).reshape(*np.shape(rows), count)

    def select(self, keep: np.ndarray) -> "StoredParts":
        """Those of the clouds at a mask or index, still unread."""
        return StoredParts(self.points.select(keep))


@dataclass(frozen=True)
class PointClouds:
    """Shapes ready for the encoder. `split` is 0 train, 1 test, 2 val."""

    name: str
    fingerprint: (
        str  # sha256 of a store or a bundle's file, or of the points read from files or made
    )
    points: np.ndarray | StoredPoints  # n N 3 float32
    labels: np.ndarray | None = None  # n int64
    class_names: tuple[str, ...] = ()
    split: np.ndarray | None = None  # n int8
    parts: np.ndarray | StoredParts | None = (
        None  # n N int16, one label a point; only where `load` is asked for them
    )
    part_names: tuple[
        str, ...
    ] = ()  # names of the labels, which count through all classes; () where unnamed
    available: int | None = (
        None  # shapes that the source has of the split, where `load` was told a limit
    )

    def __len__(self) -> int:
        return len(self.points)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Shapes in each shard of a store that is read in place, in order;

        () for shapes in memory.
        """
        return (
            tuple(self.points.shard_sizes().tolist())
            if isinstance(self.points, StoredPoints)
            else ()
        )

    def batch(self, index: np.ndarray) -> Tensor:
        """Clouds b N 3 at index."""
        return torch.from_numpy(self.points[index])

    def subset(self, keep: np.ndarray) -> "PointClouds":
        """The shapes at a boolean mask or index."""

        def take(values):
            if isinstance(values, StoredPoints | StoredParts):
                return values.select(keep)
            return None if values is None else values[keep]

        taken = {name: take(getattr(self, name)) for name in ("points", "labels", "split", "parts")}
        return replace(self, **taken)

    def part(self, split: str) -> "PointClouds":
        """The "train", "test" or "val" part. ValueError when the source has none."""
        if self.split is None:
            raise ValueError(f"{self.name}: has no train/test split")
        return self.subset(self.split == SPLITS.index(split))


def load(
    sources: Iterable[str],
    num_points: int,
    split: str = "train",
    up_axis: Iterable[str] = ("z",),
    labels_key: str = "labels",
    limit: int | None = None,
    raw: bool = False,
    parts: bool = False,
) -> PointClouds:
    """All shapes of the sources as one `PointClouds`; labels are kept for a single source.

    split: "train", "test" or "all"; a source without a split counts as train. up_axis: one for all
    or one a source. limit: at most that many shapes a source (a dry run). raw: as they are in the
    source, not resampled. parts: with the part labels of the points, of a single source. Raises
    ValueError or its ReadError.
    """
    sources, axes = list(sources), list(up_axis)
    if len(axes) not in (1, len(sources)):
        raise ValueError(
            f"{len(axes)} values of up_axis for {len(sources)} of data: give one, or one each"
        )
    if wrong := [axis for axis in axes if axis not in TO_Z_UP]:
        raise ValueError(f"up axis {wrong[0]!r}: one of x, y, z")
    if parts and len(sources) != 1:
        raise ValueError(f"part labels of {len(sources)} sources: they are read of one")
    loaded = [
        _load_one(source, num_points, split, axes[i % len(axes)], labels_key, limit, raw, parts)
        for i, source in enumerate(sources)
    ]
    if len(loaded) == 1:
        return loaded[0]
    digest = hashlib.sha256("".join(d.fingerprint for d in loaded).encode()).hexdigest()
    name, available = " + ".join(d.name for d in loaded), sum(d.available or len(d) for d in loaded)
    return PointClouds(
        name, digest, np.concatenate([d.points[:] for d in loaded]), available=available
    )


def _load_one(source, num_points, split, up_axis, labels_key, limit, raw, parts) -> PointClouds:
    path, standard = Path(source), raw
    if source.split(":")[0] == "synthetic":
        found = _synthetic(source, num_points, limit, parts)
        up_axis = "z"
    elif (path / "store.json").is_file():
        return _store(path, num_points, split, limit, up_axis, parts)
    elif path.suffix == ".npz" and path.is_file() and clouds_in(path):
        found = _bundle(path, num_points, labels_key, parts)
    elif path.exists() or procedural.count_of(path):
        found = _files(path, num_points, split, limit, None if raw else up_axis, parts)
        standard = True
    else:
        what = "no such file or folder"
        raise ReadError(
            f"{source}: {what}; give synthetic, procedural:COUNT, a store, or files of {', '.join(SUFFIXES)}"
        )
    if split != "all" or limit:
        chosen = np.ones(len(found), bool) if split == "all" else _split_mask(found, split)
        available = round((found.available or len(found)) * chosen.mean())
        found = replace(found.subset(np.flatnonzero(chosen)[:limit]), available=available)
        if not len(found):
            raise ReadError(f"{source}: no shapes in its {split} part")
    if standard:
        return found
    points, labels = _standard(
        found.points[:], num_points, TO_Z_UP[up_axis], found.name, found.parts
    )
    return replace(found, points=points, parts=labels)


def _split_mask(data: PointClouds, split: str) -> np.ndarray:
    if data.split is None:
        if split == "test":
            raise ReadError(f"{data.name}: has no test part")
        return np.ones(len(data), bool)
    return data.split == SPLITS.index(split)


def _standard(
    points: np.ndarray, num_points: int, axes: np.ndarray, name: str, parts=None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Raw clouds n N 3 as n num_points 3, z up, unit sphere, by FPS; with the part labels n N of
    the chosen points.
    """
    out = np.empty((len(points), num_points, 3), np.float32)
    chosen = None if parts is None else np.empty(out.shape[:2], np.int16)
    size = 64
    starts = range(0, len(points), size)
    for at in track(
        starts,
        f"sampling {num_points:,} points of {name}",
        transient=True,
        disable=len(starts) < 20,
    ):
        raw = points[at : at + size].astype(np.float64)
        raw -= raw.mean(
            1, keepdims=True
        )  # before float32: map coordinates of millions keep their millimetres
        clouds = unit_sphere(torch.from_numpy(raw.astype(np.float32) @ axes.T))
        labels = None if parts is None else parts[at : at + size]
        if clouds.shape[1] > num_points:
            index = farthest_point_sample(clouds, num_points)
            clouds = unit_sphere(gather_points(clouds, index))
            labels = None if labels is None else np.take_along_axis(labels, index.numpy(), 1)
        out[at : at + size] = clouds.numpy()
        if chosen is not None and labels is not None:
            chosen[at : at + size] = labels
    return out, chosen


def _synthetic(source: str, num_points: int, limit: int | None, parts: bool) -> PointClouds:
    """`synthetic` or `synthetic:COUNT`; every fourth shape is test, whatever COUNT is."""
    count = source.partition(":")[2] or "4000"
    if not count.isdigit() or int(count) < 8:
        raise ReadError(f"{source}: give synthetic or synthetic:COUNT with COUNT of at least 8")
    total = int(count)
    made = synthetic.make_shapes(min(total, 4 * (limit or total)), 2 * num_points, seed=0)
    split = (np.arange(len(made["points"])) % 4 == 3).astype(
        np.int8
    )  # a class comes every 21: none is left out
    digest = hashlib.sha256(made["points"].tobytes()).hexdigest()
    found = PointClouds(
        source, digest, made["points"], made["labels"], synthetic.CLASS_NAMES, split
    )
    own: dict[str, Any] = (
        {"parts": made["parts"], "part_names": synthetic.PART_NAMES} if parts else {}
    )
    return replace(found, available=total, **own)


def _bundle(path: Path, num_points: int, labels_key: str, parts: bool) -> PointClouds:
    """A .npz with points n N 3 and, if it has them, labels, class_names, split, seg or parts n N
    and part_names.
    """
    with boundary(path):
        headers = {
            name: kind
            for name, (_, kind) in npz_headers(path).items()
            if not name.startswith("raw_")
        }
        arrays = read_npz(
            path, [name for name, kind in headers.items() if name == "points" or not kind.hasobject]
        )
        points = arrays.get("points", np.empty(0))
        usable = (
            points.ndim == 3
            and points.shape[2] == 3
            and len(points)
            and np.issubdtype(points.dtype, np.number)
        )
    if not usable:
        found = ", ".join(
            f"{name} {value.dtype} {list(value.shape)}" for name, value in arrays.items()
        )
        raise ReadError(
            f"{path}: a bundle needs numbers 'points' [n, N, 3], n > 0; it has {found or 'nothing'}"
        )
    if points.shape[1] < num_points:
        raise ReadError(
            f"{path}: clouds of {points.shape[1]} points, at least {num_points} are needed (num_points)"
        )
    for i, cloud in enumerate(points):
        with boundary(path):
            check_cloud(cloud, f"shape {i}: ")
    labels = arrays.get(labels_key)
    if labels is not None and labels.shape in (
        points.shape[:2],
        (*points.shape[:2], 1),
    ):  # one a point
        arrays, labels = {"parts": labels.reshape(points.shape[:2])} | arrays, None
    elif labels is None and labels_key != "labels":
        known = ", ".join(name for name in arrays if name.startswith("labels")) or "no labels"
        raise ReadError(f"{path}: has no labels {labels_key!r}; it has {known}")
    stem = labels_key.removeprefix("labels").strip("_") or "class"
    names = tuple(printable(str(name)) for name in arrays.get(f"{stem}_names", ()))
    if labels is not None and labels.shape == (len(points), 1):
        labels = labels[:, 0]
    if labels is not None and np.issubdtype(labels.dtype, np.integer) and (labels < 0).any():
        labels = None  # as of a store: of all shapes or of none
    split = arrays.get("split")
    for name, values in (("labels", labels), ("split", split)):
        if values is not None and values.shape != (len(points),):
            raise ReadError(f"{path}: {len(points)} shapes but {name} {list(values.shape)}")
        if values is not None and (not np.issubdtype(values.dtype, np.integer) or values.min() < 0):
            raise ReadError(f"{path}: {name} must be integers from 0, found {values.dtype}")
    if split is not None and split.max() >= len(SPLITS):
        raise ReadError(
            f"{path}: split must be 0 (train), 1 (test) or 2 (val), found {split.max()}"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if labels is not None and not names:
        names = tuple(str(i) for i in range(int(labels.max()) + 1))
    if labels is not None and labels.max() >= len(names):
        raise ReadError(
            f"{path}: label {labels.max()}, but only {len(names)} names in {stem}_names"
        )
    found = PointClouds(path.name, digest, points, labels, names, split)
    return replace(found, **parts_in(arrays, path)) if parts else found


def _files(
    path: Path, num_points: int, split: str, limit: int | None, up_axis: str | None, parts: bool
) -> PointClouds:
    """A folder, benchmark or single file, read whole: what `jepa3d prepare` reads, without a store.

    Each cloud is brought to the standard form as it is read, so that memory holds one raw cloud;
    with up_axis None all stay raw, in an object array.
    """
    source, raw = discover(path), up_axis is None
    entries = source.entries
    in_split = [entry.split for entry in entries]
    if None in in_split and any(s is not None for s in in_split):
        stray = entries[in_split.index(None)].key
        raise ReadError(
            f"{path}/{stray}: is in no train or test folder, but others are; move it, or: jepa3d prepare"
        )
    if split != "all" and None not in in_split:
        entries = [entry for entry in entries if entry.split == split]
    available, entries = len(entries), entries[:limit]
    clouds, digest, unseen = [], hashlib.sha256(), 0
    for entry in track(entries, f"reading {path}", transient=True, disable=len(entries) < 20):
        with boundary(path / entry.key if path.is_dir() else path):
            cloud = enough_points(entry.read(), num_points, seed=zlib.crc32(entry.key.encode()))
            if source.own and not raw:  # as `jepa3d prepare` does
                kept = np.flatnonzero(are_kept(cloud.points.astype(np.float64), LEAST))
                cloud = cloud.take(kept) if len(kept) >= num_points else cloud
            if parts and cloud.parts is None:
                raise ReadError(NO_PARTS)
            one = (
                cloud.points[None],
                to_parts(cloud.parts)[None] if parts and cloud.parts is not None else None,
            )
        unseen += cloud.unseen
        digest.update(cloud.points.tobytes())
        axes = None if up_axis is None else cloud.to_z_up(up_axis)
        clouds.append(
            one if axes is None else _standard(one[0], num_points, axes, path.name, one[1])
        )
    if unseen:
        print(f"{path}: {unseen:,} points that are NaN, where nothing was seen, were left out")
    names = tuple(sorted({entry.label for entry in entries if entry.label is not None}))
    number = {name: i for i, name in enumerate(names)}
    labelled = names and all(entry.label is not None for entry in entries)
    labels = np.array([number[str(entry.label)] for entry in entries]) if labelled else None
    splits = (
        None
        if None in in_split
        else np.array([SPLITS.index(entry.split) for entry in entries], np.int8)
    )
    points = _joined([cloud for cloud, _ in clouds], up_axis is None)
    found = PointClouds(
        path.name, digest.hexdigest(), points, labels, names if labelled else (), splits
    )
    own: dict[str, Any] = (
        {"parts": _joined([p for _, p in clouds], up_axis is None), "part_names": source.part_names}
        if parts
        else {}
    )
    return replace(found, available=available, **own)


def _joined(arrays: list, raw: bool) -> np.ndarray:
    """Arrays of one cloud each, 1 N ..., as n N ...; raw ones, whose N differ, in an object array."""
    if not raw:
        return np.concatenate(arrays)
    out = np.empty(len(arrays), object)
    for i, values in enumerate(arrays):
        out[i] = values[0]
    return out


def _store(
    path: Path, num_points: int, split: str, limit: int | None, up_axis: str, parts: bool
) -> PointClouds:
    """A store, in place where its clouds are in farthest point order, else sampled in memory."""
    store = Store(path)
    if up_axis != "z":
        raise ReadError(f"{path}: a store is z-up already; give the up axis to jepa3d prepare")
    in_split = np.asarray(store.columns["split"])
    has_split = bool(
        (in_split >= 0).any()
    )  # clouds in no part are then in none, as in a benchmark's lists
    rows = np.arange(len(store))
    if split != "all" and (has_split or split != "train"):
        rows = np.flatnonzero(in_split == SPLITS.index(split))
    available, rows = len(rows), rows[:limit]
    if not available:
        raise ReadError(f"{path}: no shapes in its {split} part")
    labels = np.asarray(store.columns["label"])[rows].astype(np.int64)
    labelled = bool((labels >= 0).all())
    splits = in_split[rows] if has_split else None
    if store.num_points is not None and store.num_points < num_points:
        raise ReadError(
            f"{path}: clouds of {store.num_points} points, {num_points} are needed (num_points)"
        )
    if parts and "parts" not in store.shard(0):
        raise ReadError(f"{path}: {NO_PARTS}")
    points: Any = StoredPoints(store, rows, num_points)
    own: Any = StoredParts(points) if parts else None
    if store.num_points != num_points and (
        store.num_points is None or store.header["settings"]["reduce"] != "fps"
    ):
        points = np.empty((len(rows), num_points, 3), np.float32)
        own = np.empty(points.shape[:2], np.int16) if parts else None
        for i, row in enumerate(
            track(rows.tolist(), f"sampling {path}", transient=True, disable=len(rows) < 20)
        ):
            raw = store.points(row)
            if len(raw) < num_points:
                raise ReadError(
                    f"{path}: {store.key(row)} has {len(raw)} points, {num_points} are needed (num_points)"
                )
            with boundary(path):
                check_cloud(raw, f"{store.key(row)}: ")
            raw_parts = store.parts(row)[None] if parts else None
            cloud, chosen = _standard(raw[None], num_points, TO_Z_UP["z"], path.name, raw_parts)
            points[i] = cloud[0]
            if own is not None and chosen is not None:
                own[i] = chosen[0]
    names = store.class_names if labelled else ()
    found = PointClouds(
        path.name, store.fingerprint, points, labels if labelled else None, names, splits
    )
    return replace(
        found, parts=own, part_names=store.part_names if parts else (), available=available
    )
