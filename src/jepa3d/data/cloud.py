"""Hold one shape in memory as a `PointCloud`; check it, and reduce it or fill it up to N points."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from jepa3d.frame import LEAST, check, fill, too_few
from jepa3d.ops import farthest_point_sample

# largest number of points that are kept of a table, LAS, LAZ or PTX file; from more points, a
# uniform random sample is taken, so that memory is bounded
MAX_POINTS = 1_000_000
CHUNK = 200_000  # number of rows of a file that are read at once
ATTRIBUTES = ("normals", "colors", "parts")
UNLABELLED = -1  # the part label that means "no label"
# largest values of three integer types: some files write one of them for "no label", although the
# type of their labels is wider
_IGNORED = (2**16 - 1, 2**31 - 1, 2**32 - 1)
# attribute -> alternatives for the names of its columns, fields or properties; the first
# alternative that a file has completely is used
ATTRIBUTE_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "normals": (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z")),
    "colors": (("r", "g", "b"), ("red", "green", "blue")),
    "parts": (("part",), ("label",), ("classification",), ("class",), ("segment",)),
}
# up axis of a source -> rotation matrix [3, 3] that makes z the up axis: z_up = TO_Z_UP[up] @ xyz
TO_Z_UP = {
    "x": np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]], np.float32),
    "y": np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32),
    "z": np.eye(3, dtype=np.float32),
}


class ReadError(ValueError):
    """The error for a file that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class PointCloud:
    """A cloud, or a mesh whose vertices are the points.

    The coordinates in the file are points * scale + origin. Create clouds with `make`, which raises
    ReadError for unusable points. It centres coordinates in float64 and only then rounds them to
    float32, so that map coordinates (6e6 m) keep their millimetres.
    """

    points: np.ndarray  # [N, 3] float32
    origin: np.ndarray  # [3] float64
    scale: float = 1.0
    normals: np.ndarray | None = None  # [N, 3] float32
    colors: np.ndarray | None = None  # [N, 3] uint8
    # array [N] of any number type: the part labels as in the file; `to_parts` converts them
    parts: np.ndarray | None = None
    faces: np.ndarray | None = None  # [F, 3] int64
    # number of points in the file, without NaN points; None if all of these points were kept
    total: int | None = None
    # the up axis, if the format of the file (glTF: y) or the benchmark defines one, or if a store
    # has recorded it
    up: str | None = None
    # number of NaN points that were left out (the sensor measured nothing there)
    unseen: int = 0

    def __len__(self) -> int:
        return len(self.points)

    @staticmethod
    def make(xyz: np.ndarray, unseen: int = 0, **attributes) -> "PointCloud":
        """Create a cloud from coordinates [N, 3] of any number type; NaN points are left out.

        Further columns of `xyz` are ignored. unseen: number of NaN points that the caller
        has already left out. attributes: other fields of this class; normals, colors and parts must
        have N rows. Raises ReadError if `xyz` is no array of points (see `check_shape`) or has no
        points, if all points are NaN or equal, if a coordinate is infinite or its absolute value is
        at least 1e30, if a face has a NaN vertex, or if normals, colors or parts have another
        number of rows.
        """
        check_shape(xyz := np.asarray(xyz))
        xyz, faces = xyz[:, :3].astype(np.float64), attributes.get("faces")
        kept = {n: attributes[n] for n in ATTRIBUTES if attributes.get(n) is not None}
        for name, values in kept.items():
            if len(values) != len(xyz):
                raise ReadError(f"has {len(xyz)} points but {len(values)} {name}")
        seen = np.all(~np.isnan(xyz), axis=1)
        if not seen.all() and (faces is None or seen[faces].all()):
            attributes |= {name: values[seen] for name, values in kept.items()}
            xyz = xyz[seen]
            if faces is None:
                unseen += int((~seen).sum())
            else:
                attributes["faces"] = (np.cumsum(seen) - 1)[faces]
        if unseen and not len(xyz):
            raise ReadError(f"no points: all {unseen:,} are NaN (nothing was measured)")
        check_cloud(xyz)
        origin = xyz.mean(0)
        points = (xyz - origin).astype(np.float32)
        if not points.any():
            raise ReadError("all points are equal up to rounding; two must differ")
        return PointCloud(points, origin, unseen=unseen, **attributes)

    def take(self, index: np.ndarray) -> "PointCloud":
        """Return a cloud of the points at an array of indices, with their normals, colors and
        parts, but without faces.
        """
        arrays = {name: getattr(self, name) for name in ("points", *ATTRIBUTES)}
        kept = {key: None if old is None else old[index] for key, old in arrays.items()}
        return replace(self, faces=None, **kept)

    def normalised(self) -> "PointCloud":
        """Return the cloud in the unit sphere (centroid 0, farthest point at distance 1).

        With the new origin and scale, points * scale + origin still gives the coordinates in the
        file.
        """
        points = self.points.astype(np.float64)
        center = points.mean(0)
        points -= center
        radius = np.linalg.norm(points, axis=1).max()
        points = (points / radius).astype(np.float32)
        origin = self.origin + center * self.scale
        return replace(self, points=points, origin=origin, scale=self.scale * radius)

    def sampled(self, count: int, seed: int) -> "PointCloud":
        """Sample `count` points of this mesh, uniformly by area, with the normals of their faces.

        Raises ReadError for a mesh without area.
        """
        triangles = self.points[self.faces].astype(np.float64)
        points, chosen = sample_triangles(triangles, count, np.random.default_rng(seed))
        a, b, c = triangles[chosen].swapaxes(0, 1)
        normals = np.cross(b - a, c - a)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        points, normals = points.astype(np.float32), normals.astype(np.float32)
        return PointCloud(points, self.origin, self.scale, normals, up=self.up)

    def reduced(self, count: int, method: str, seed: int) -> "PointCloud":
        """Choose `count` points of this cloud, which must have at least `count`.

        method: fps, random or voxel. fps: farthest point sampling; the points stay in the order in
        which they were sampled, so for every n the first n are the farthest point sample of size n.
        random: uniform. voxel: find the coarsest grid (2^k cells per side) that has at least
        `count` occupied cells, take one point from each of these cells, and choose `count` of the
        taken points at random; the sample is nearly even, and the time grows linearly with the
        number of points.
        """
        rng = np.random.default_rng(seed)
        if method == "fps":
            points = torch.from_numpy(self.points)[None]
            return self.take(farthest_point_sample(points, count)[0].numpy())
        if method == "random":
            return self.take(rng.choice(len(self), count, replace=False))
        return self.take(rng.permutation(_one_a_voxel(self.points, count))[:count])

    def filled(self, count: int) -> "PointCloud":
        """Add moved copies of points to this cloud, so that it has `count` points.

        The cloud must have fewer than `count` points. If several points are equal, only one of them
        is kept. `frame.py::fill` says how the copies are moved. Raises ReadError for fewer than
        min(LEAST, count) different points; LEAST (frame.py) is 64.
        """
        different = np.unique(self.points, axis=0, return_index=True)[1]
        if len(different) < (needed := min(LEAST, count)):
            raise ReadError(too_few(len(self), len(different), needed))
        cloud = self.take(different).reduced(len(different), "fps", 0)
        points, source = fill(cloud.points, count)
        return replace(cloud.take(source), points=points)

    @property
    def part_read(self) -> str | None:
        """A sentence for the user if only a sample of the file's points was kept, else None."""
        part = f"a random {MAX_POINTS:,} of its {self.total or 0:,} points were read"
        return part if self.total else None

    def remarks(self) -> list[str]:
        """Return sentences for the user about points of the file that are not in the cloud."""
        unseen = f"left out {self.unseen:,} NaN points (nothing was measured there)"
        unseen = unseen if self.unseen else None
        return [remark for remark in (self.part_read, unseen) if remark]

    def file_coordinates(self) -> np.ndarray:
        """Return the points [N, 3] float64 in the coordinates of the file."""
        return self.points.astype(np.float64) * self.scale + self.origin


def check_shape(xyz: np.ndarray) -> None:
    """Raise ReadError unless `xyz` is an array of numbers with shape [n, D], D >= 3.

    Arrays [3, D] with D > 32 are refused as well: three points with so many values each are
    unlikely, so most likely each column is a point.
    """
    found = f"expected an array of points [n, 3], found {xyz.dtype} {list(xyz.shape)}"
    if xyz.ndim != 2 or xyz.shape[1] < 3 or xyz.dtype.kind not in "iuf":
        raise ReadError(found)
    if len(xyz) == 3 and xyz.shape[1] > 32:
        raise ReadError(f"{found}: transpose it, so that each row is a point")


def check_cloud(points: np.ndarray, where: str = "") -> None:
    """Raise ReadError unless all points [n, 3] are finite and at least two of them differ.

    where: text with which the error message begins.
    """
    try:
        check(points)
    except ValueError as error:
        raise ReadError(f"{where}{error}") from error
    if (points == points[0]).all():
        raise ReadError(where + too_few(len(points), 1, 2))


def to_parts(values: np.ndarray) -> np.ndarray:
    """Convert part labels [N] to int16.

    Negative values, NaN, the values in `_IGNORED` and the largest value of the labels' own integer
    type become UNLABELLED. Call this where labels are used, not when a file is read, so that bad
    labels do no harm to other uses of a file. Raises ReadError for labels that are not numbers, and
    for all other values that are not whole numbers from 0 to 32,767.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise ReadError(f"part labels must be whole numbers, found {values.dtype}")
    whole = values.astype(np.float64)
    known = (whole >= 0) & ~np.isin(whole, _IGNORED)  # False for NaN
    if values.dtype.kind in "iu":
        known &= values != np.iinfo(values.dtype).max
    whole[~known] = UNLABELLED
    if len(wrong := whole[(whole != np.floor(whole)) | (whole > 32_767)]):
        allowed = "part labels must be whole numbers from 0 to 32767"
        raise ReadError(f"{allowed}, found {wrong[0]:.10g}")
    return whole.astype(np.int16)


def to_bytes(colors: np.ndarray) -> np.ndarray:
    """Convert colours [N, 3] to uint8.

    The range of the colours is guessed from their type and their largest value. Floats that are all
    below 2 are taken as fractions of 1; the limit is not 1, since in some files they are slightly
    above 1. If the largest value is above 255, the range is that of 16 bits, 0 to 65,535. In all
    other cases, the range is 0 to 255. NaN and infinity become 0.
    """
    colors = np.asarray(colors)
    if colors.dtype == np.uint8:
        return colors
    whole = colors.dtype.kind in "iu"
    colors = np.nan_to_num(colors.astype(np.float64), posinf=0, neginf=0)
    top = colors.max(initial=0)
    if not whole and 0 < top < 2:
        colors = colors * 255
    elif top > 255:
        colors = colors / 257
    return colors.clip(0, 255).round().astype(np.uint8)


def rotation(quaternion: np.ndarray) -> np.ndarray:
    """Return the rotation matrix [3, 3] of a quaternion (w, x, y, z) of any length.

    A quaternion of zeros gives the identity.
    """
    w, x, y, z = quaternion / (np.linalg.norm(quaternion) or 1.0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows)


def attributes_of(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Find normals, colors and parts among the columns of a file; returns a dict of those found.

    columns: name of a column, field or property -> its n values.
    """
    found: dict[str, Any] = {}
    forms = {"normals": np.float32, "colors": to_bytes, "parts": np.ravel}
    for key, groups in ATTRIBUTE_COLUMNS.items():
        if names := next((g for g in groups if {*g} <= columns.keys()), None):
            found[key] = forms[key](np.stack([columns[name] for name in names], 1))
    # PCL (Point Cloud Library) packs a colour into one float or integer with the bytes b, g, r, a
    packed = columns.get("rgb", columns.get("rgba"))
    if packed is not None and "colors" not in found and packed.dtype.itemsize == 4:
        packed = np.ascontiguousarray(packed, packed.dtype.newbyteorder("<"))
        bgra = packed.view(np.uint8).reshape(-1, 4)
        found["colors"] = bgra[:, 2::-1].copy()
    return found


def sample_triangles(
    triangles: np.ndarray, count: int, rng: np.random.Generator, weight: Any = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Sample points uniformly on triangles [t, 3, 3].

    Returns points [count, 3], and an array [count] with the index of each point's triangle. weight:
    factors [t] on the triangles' areas. Raises ReadError if the total area is 0.
    """
    a, b, c = triangles.swapaxes(0, 1)
    area = np.cumsum(weight * np.linalg.norm(np.cross(b - a, c - a), axis=1))
    if not area[-1] > 0:
        raise ReadError("a mesh without surface: its triangles have no area")
    chosen = np.searchsorted(area, rng.random(count) * area[-1], side="right")
    # uniform within a triangle: Osada et al. 2002, eq. 1
    u, v = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    return (1 - u) * a[chosen] + u * (1 - v) * b[chosen] + u * v * c[chosen], chosen


def _one_a_voxel(points: np.ndarray, count: int) -> np.ndarray:
    """Return the index of the first point in each occupied cell of a grid.

    The grid has 2^k cells per side; it is the coarsest one with at least `count` occupied cells. If
    there is none up to k = 20, all indices are returned.
    """
    low, extent = points.min(0), np.ptp(points, axis=0).max()
    for level in range(1, 21):
        cells = ((points - low) / extent * 2**level).astype(np.int64)
        cells = np.minimum(cells, 2**level - 1)
        index = np.unique(cells @ (1 << 42, 1 << 21, 1), return_index=True)[1]
        if len(index) >= count:
            return index
    return np.arange(len(points))


class Reservoir:
    """Sample at most `limit` rows uniformly from rows that arrive in chunks, in bounded memory.

    Every row gets a random key; the rows with the smallest keys are kept, in their original order.
    """

    def __init__(self, limit: int = MAX_POINTS, seed: int = 0):
        self.limit, self.total = limit, 0
        self._rng, self._kept = np.random.default_rng(seed), []

    def add(self, rows: np.ndarray) -> None:
        """Add a chunk of rows [r, D]."""
        keys = self._rng.random((len(rows), 1))
        self._kept.append(np.concatenate([keys, rows], 1))
        self.total += len(rows)
        if sum(map(len, self._kept)) > 2 * self.limit:
            self._kept = [self._trimmed()]

    def rows(self) -> np.ndarray:
        """Return the sample: at most `limit` rows [n, D]."""
        return self._trimmed()[:, 1:] if self._kept else np.empty((0, 3))

    def _trimmed(self) -> np.ndarray:
        rows = np.concatenate(self._kept)
        if len(rows) <= self.limit:
            return rows
        return rows[np.sort(np.argpartition(rows[:, 0], self.limit)[: self.limit])]


def collected(chunks: Iterable[np.ndarray], names: Iterable[str]) -> PointCloud:
    """Collect chunks of rows [n, D] into one cloud without NaN points.

    If more than MAX_POINTS rows are left without NaN points, a random sample of MAX_POINTS of them
    is kept. names: the names of the first columns (at most D names); the first three are x, y and
    z. An attribute is left out if one of its columns has no finite value. Raises ReadError as
    `PointCloud.make` does.
    """
    reservoir, unseen = Reservoir(), 0
    for rows in chunks:
        seen = rows[~np.isnan(rows[:, :3]).any(1)]
        unseen += len(rows) - len(seen)
        reservoir.add(seen)
    rows = reservoir.rows()
    columns = zip(names, rows.T, strict=False)
    found = attributes_of({n: v for n, v in columns if np.isfinite(v).any()})
    total = reservoir.total if reservoir.total > len(rows) else None
    return PointCloud.make(rows[:, :3], total=total, unseen=unseen, **found)
