"""Any source of shapes as `PointClouds`, brought to one standard form in one place.

The standard form: float32, z up, unit sphere, the same number of points for all shapes, sampled
once by farthest points (paper IV-A) and never in a training step.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from jepa3d.data.cloud import TO_Z_UP, ReadError
from jepa3d.data.shapes import Shapes, open_shapes
from jepa3d.data.store import SPLITS, StoredPoints
from jepa3d.ops import farthest_point_sample, gather_points, unit_sphere
from jepa3d.plain import log, progress_bar


@dataclass(frozen=True)
class PointClouds:
    """Shapes in the standard form. `split` is 0 for train, 1 for test, 2 for val."""

    name: str
    # sha256 of a store or of a bundle's file, else of the points
    fingerprint: str
    points: np.ndarray | StoredPoints  # n N 3 float32
    labels: np.ndarray | None = None  # n int64
    class_names: tuple[str, ...] = ()
    split: np.ndarray | None = None  # n int8
    # n N int16, a label for each point, if `load` was asked for them
    parts: np.ndarray | StoredPoints | None = None
    # names of the part labels, which are numbered through all classes; () if they have none
    part_names: tuple[str, ...] = ()
    # shapes in this part of the source, of which `load` may have read fewer (limit)
    available: int | None = None

    def __len__(self) -> int:
        return len(self.points)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """How many shapes each shard of a store holds, if it is read in place; () for shapes in
        memory.
        """
        return self.points.shard_sizes if isinstance(self.points, StoredPoints) else ()

    def batch(self, index: np.ndarray) -> Tensor:
        """Clouds b N 3 at an index."""
        return torch.from_numpy(self.points[index])

    def subset(self, keep: np.ndarray) -> "PointClouds":
        """The shapes at a boolean mask or index."""

        def take(values):
            if isinstance(values, StoredPoints):
                return values.select(keep)
            return None if values is None else values[keep]

        names = ("points", "labels", "split", "parts")
        return replace(self, **{name: take(getattr(self, name)) for name in names})

    def part(self, split: str) -> "PointClouds":
        """The train, test or val part. Raises ValueError if the source has no split."""
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
    """All shapes of the sources as one `PointClouds`; labels are kept if there is one source.

    sources: synthetic, procedural:COUNT, stores, .npz bundles, benchmarks, folders or files. split:
    train, test or all; a source without a split is all train. up_axis: one for all sources, or one
    each. limit: the largest number of shapes of a source. raw: points as they are in the source,
    not sampled. parts: also read the part labels of points, of a single source. Raises ValueError
    or its subclass ReadError.
    """
    sources, axes = list(sources), list(up_axis)
    if len(axes) not in (1, len(sources)):
        found = f"{len(axes)} values of up_axis for {len(sources)} of data"
        raise ValueError(f"{found}: give one, or one each")
    if wrong := [axis for axis in axes if axis not in TO_Z_UP]:
        raise ValueError(f"up axis {wrong[0]!r}: one of x, y, z")
    if parts and len(sources) != 1:
        raise ValueError(f"part labels of {len(sources)} sources: they are read of one")
    loaded = []
    for i, source in enumerate(sources):
        axis = axes[i % len(axes)]
        shapes = open_shapes(source, num_points, axis, labels_key, limit, raw, parts)
        rows, total = shapes.rows(split), shapes.total or len(shapes.split)
        if not len(rows):
            raise ReadError(f"{source}: no shapes in its {split} part; 'all' has all")
        found = _loaded(shapes, rows[:limit], num_points, raw, parts)
        available = round(len(rows) * total / len(shapes.split))
        loaded.append(replace(found, available=available))
    if len(loaded) == 1:
        return loaded[0]
    digest = hashlib.sha256("".join(d.fingerprint for d in loaded).encode()).hexdigest()
    name = " + ".join(d.name for d in loaded)
    available = sum(d.available or len(d) for d in loaded)
    points = np.concatenate([d.points[:] for d in loaded])
    return PointClouds(name, digest, points, available=available)


def _loaded(
    shapes: Shapes, rows: np.ndarray, num_points: int, raw: bool, parts: bool
) -> PointClouds:
    """These shapes of a source, in place or in memory."""
    if (store := shapes.store) is not None:
        points, digest = StoredPoints(store, rows, num_points), store.fingerprint
        of_points = StoredPoints(store, rows, num_points, "parts") if parts else None
    else:
        points, of_points, digest = _read(shapes, rows, num_points, raw, parts)
    digest, labels = shapes.fingerprint or digest, shapes.labels[rows]
    classes = (labels, shapes.class_names) if (labels >= 0).all() else (None, ())
    split = shapes.split[rows] if (shapes.split >= 0).any() else None
    of_parts = of_points, shapes.part_names if parts else ()
    return PointClouds(shapes.name, digest, points, *classes, split, *of_parts)


def _read(
    shapes: Shapes, rows: np.ndarray, num_points: int, raw: bool, parts: bool
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Points of these shapes in the standard form, the part labels of these points, and a digest.

    raw: points as they are in the source; those of files, which differ in number, in an object
    array.
    """
    digest, clouds, of_points, unseen = hashlib.sha256(), [], [], 0
    starts = range(0, len(rows), shapes.batch)
    for at in progress_bar(starts, f"reading {shapes.name}"):
        found = [shapes.read(row) for row in rows[at : at + shapes.batch].tolist()]
        unseen += sum(shape.unseen for shape in found)
        if not shapes.fingerprint:
            digest.update(b"".join(shape.points.tobytes() for shape in found))
        points = np.stack([shape.points for shape in found])
        labels = np.stack([np.asarray(s.parts) for s in found]) if parts else None
        if not raw:
            axes = TO_Z_UP[found[0].up or "z"]
            points, labels = _standard(points, num_points, axes, labels)
        clouds.append(points)
        of_points.append(labels)
    if unseen:
        what = "points that are NaN, where nothing was seen, were left out"
        log.info(f"{shapes.name}: {unseen:,} {what}")
    varied = raw and shapes.batch == 1
    labels = _joined(of_points, varied) if parts else None
    return _joined(clouds, varied), labels, digest.hexdigest()


def _joined(batches: list, varied: bool) -> np.ndarray:
    """Batches [b, N, ...] joined to [n, N, ...].

    varied: batches of one cloud, whose N differ; they are joined to an object array [n].
    """
    if not varied:
        return np.concatenate(batches)
    out = np.empty(len(batches), object)
    for i, (values,) in enumerate(batches):
        out[i] = values
    return out


def _standard(
    points: np.ndarray, num_points: int, axes: np.ndarray, parts: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Clouds b N 3 in the standard form, b num_points 3, and the part labels of the chosen points."""
    points = points.astype(np.float64)
    # in float64, so that map coordinates of millions keep their millimetres
    points -= points.mean(1, keepdims=True)
    clouds = unit_sphere(torch.from_numpy(points.astype(np.float32) @ axes.T))
    if clouds.shape[1] > num_points:
        index = farthest_point_sample(clouds, num_points)
        clouds = unit_sphere(gather_points(clouds, index))
        parts = None if parts is None else np.take_along_axis(parts, index.numpy(), 1)
    return clouds.numpy(), parts
