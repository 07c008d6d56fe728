"""Load shapes from any source and convert them to one standard form, as `PointClouds`.

In the standard form, coordinates are float32 in the unit sphere, z is up, and all shapes have the
same number of points. These points are chosen by farthest point sampling (section IV-A of the paper
of 3D-JEPA) when a shape is loaded, never in a training step. For a store that is read on demand
(each cloud when it is used), they were chosen when the store was prepared.
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
    """Shapes in the standard form or, after `load(raw=True)`, with the points of their source."""

    name: str
    # identifies the data: for a store, sha256 of the list of shards in its header
    # (`Store.fingerprint`); for an .npz bundle (an .npz file of many clouds, [n, N, 3]), sha256 of
    # the file; for other sources, sha256 of the points; for several sources, sha256 of their
    # fingerprints
    fingerprint: str
    # [n, N, 3] float32. After load(raw=True), shapes may have different numbers of points, so
    # they are an object array [n] of arrays [N_i, 3]. But "synthetic", .npz bundles, and stores
    # that are read on demand give [n, N, 3] even then, since all of their shapes have N points.
    points: np.ndarray | StoredPoints
    labels: np.ndarray | None = None  # [n] int64; None if any shape has no label
    class_names: tuple[str, ...] = ()
    split: np.ndarray | None = None  # [n] int8: 0 train, 1 test, 2 val, -1 none
    # [n, N] int16, one label per point; None unless `load` was called with parts=True
    parts: np.ndarray | StoredPoints | None = None
    # name of each part label; labels are numbered over the parts of all classes; () if unnamed
    part_names: tuple[str, ...] = ()
    # number of shapes that the source has in this split; with `limit`, fewer may be loaded
    available: int | None = None

    def __len__(self) -> int:
        return len(self.points)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Number of these shapes in each shard of the store; () if they are in memory."""
        return self.points.shard_sizes if isinstance(self.points, StoredPoints) else ()

    def batch(self, index: np.ndarray) -> Tensor:
        """Return the clouds [b, N, 3] at an array of b indices."""
        return torch.from_numpy(self.points[index])

    def subset(self, keep: np.ndarray) -> "PointClouds":
        """Return the shapes that a boolean mask or an array of indices selects."""

        def take(values):
            if isinstance(values, StoredPoints):
                return values.select(keep)
            return None if values is None else values[keep]

        names = ("points", "labels", "split", "parts")
        return replace(self, **{name: take(getattr(self, name)) for name in names})

    def part(self, split: str) -> "PointClouds":
        """Return the shapes in one split: train, test or val.

        Raises ValueError if the data have no splits.
        """
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
    """Load one split of all sources as one `PointClouds`.

    If there are several sources, their labels and splits are dropped. sources: each one is
    "synthetic", "synthetic:COUNT", "procedural:COUNT", or the path of a store, an .npz bundle, a
    benchmark, a folder or a file. num_points: number of points of a shape in the standard form.
    split: train, test, val or all; if a source has no splits, all its shapes count as train.
    up_axis: one value for all sources, or one per source. labels_key: name of the labels array in
    an .npz bundle; other sources allow only the default. limit: largest number of shapes to read
    from each source. raw: keep the points as in the source, that is, neither sample nor normalise
    them; this has no effect on a store that is read on demand. parts: also read part labels, which
    is possible for a single source only. Raises ValueError for arguments that do not fit, and its
    subclass ReadError for a source that cannot be used or has no shapes in the split.
    """
    sources, axes = list(sources), list(up_axis)
    if len(axes) not in (1, len(sources)):
        found = f"up_axis has {len(axes)} values for {len(sources)} sources"
        raise ValueError(f"{found}: give one, or one per source")
    if wrong := [axis for axis in axes if axis not in TO_Z_UP]:
        raise ValueError(f"up axis {wrong[0]!r} is unknown: use x, y or z")
    if parts and len(sources) != 1:
        found = f"not from {len(sources)}"
        raise ValueError(f"part labels can be read from one source only, {found}")
    loaded = []
    for i, source in enumerate(sources):
        axis = axes[i % len(axes)]
        shapes = open_shapes(source, num_points, axis, labels_key, limit, raw, parts)
        rows, total = shapes.rows(split), shapes.total or len(shapes.split)
        if not len(rows):
            hint = "split 'all' reads every shape"
            raise ReadError(f"{source}: it has no shapes in split {split!r}; {hint}")
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
    """Load the shapes at `rows` into memory, except those of a store that is read on demand."""
    if (store := shapes.store) is not None:
        points, digest = StoredPoints(store, rows, num_points), store.fingerprint
        part_labels = StoredPoints(store, rows, num_points, "parts") if parts else None
    else:
        points, part_labels, digest = _read(shapes, rows, num_points, raw, parts)
    digest, labels = shapes.fingerprint or digest, shapes.labels[rows]
    classes = (labels, shapes.class_names) if (labels >= 0).all() else (None, ())
    split = shapes.split[rows] if (shapes.split >= 0).any() else None
    labelled = part_labels, shapes.part_names if parts else ()
    return PointClouds(shapes.name, digest, points, *classes, split, *labelled)


def _read(
    shapes: Shapes, rows: np.ndarray, num_points: int, raw: bool, parts: bool
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Read the shapes at `rows`; returns points in the standard form, part labels and a digest.

    raw: keep the points as in the source. Clouds that are read one by one (`Shapes.batch` is 1) may
    then have different numbers of points, so they are returned as an object array. The digest is a
    sha256 of the points as in the source. If the source has a fingerprint, the digest is not used.
    """
    digest, clouds, part_labels, unseen = hashlib.sha256(), [], [], 0
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
        part_labels.append(labels)
    if unseen:
        what = "NaN points (nothing was measured there)"
        log.info(f"{shapes.name}: left out {unseen:,} {what}")
    varied = raw and shapes.batch == 1
    labels = _joined(part_labels, varied) if parts else None
    return _joined(clouds, varied), labels, digest.hexdigest()


def _joined(batches: list, varied: bool) -> np.ndarray:
    """Join batches [b, N, ...] to [n, N, ...].

    varied: if True, each batch is one cloud, and N may differ between clouds. The result is then an
    object array [n].
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
    """Convert clouds [b, N, 3] to the standard form, [b, num_points, 3].

    axes: rotation matrix [3, 3] that makes z the up axis. parts: part labels [b, N], or None. Also
    returns the part labels of the chosen points.
    """
    points = points.astype(np.float64)
    # subtract the mean in float64, so that map coordinates (millions of metres) keep their
    # millimetres
    points -= points.mean(1, keepdims=True)
    # float32 cannot hold the squares of very large or small coordinates; scale by powers of two,
    # which rounds nothing
    points = np.ldexp(points, -np.frexp(np.abs(points).max((1, 2), keepdims=True))[1])
    clouds = unit_sphere(torch.from_numpy(points.astype(np.float32) @ axes.T))
    if clouds.shape[1] > num_points:
        index = farthest_point_sample(clouds, num_points)
        clouds = unit_sphere(gather_points(clouds, index))
        parts = None if parts is None else np.take_along_axis(parts, index.numpy(), 1)
    return clouds.numpy(), parts
