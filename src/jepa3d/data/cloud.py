"""One shape in memory: `PointCloud`, what makes it unusable, and how it becomes N points."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch

from jepa3d.frame import LEAST, check, fill, too_few
from jepa3d.ops import farthest_point_sample

# kept of one file; of more, a uniform random part, so that memory is bounded
MAX_POINTS = 1_000_000
CHUNK = 200_000  # rows of a file that are read at once
ATTRIBUTES = ("normals", "colors", "parts")
UNLABELLED = -1  # the part label of a point that has none
# what files of larger or unknown types write for it
_IGNORED = (2**16 - 1, 2**31 - 1, 2**32 - 1)
# names of the columns, fields or properties of each attribute; the first ones found count
ATTRIBUTE_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "normals": (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z")),
    "colors": (("r", "g", "b"), ("red", "green", "blue")),
    "parts": (("part",), ("label",), ("classification",), ("class",), ("segment",)),
}
# Rows of (x, y, z) giving the z-up frame of a source whose up axis is the key.
TO_Z_UP = {
    "x": np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]], np.float32),
    "y": np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32),
    "z": np.eye(3, dtype=np.float32),
}


class ReadError(ValueError):
    """A file that cannot be used: which, and why."""


@dataclass(frozen=True)
class PointCloud:
    """A cloud, or a mesh's vertices and faces. In the file's own axes and units it is `points *
    scale + origin`.

    Coordinates are shifted in float64 before they become float32, so that those of a map (6e6 m)
    keep their millimetres. Raises ReadError when made of what is no cloud: see `make`.
    """

    points: np.ndarray  # N 3 float32
    origin: np.ndarray  # 3 float64
    scale: float = 1.0
    normals: np.ndarray | None = None  # N 3 float32
    colors: np.ndarray | None = None  # N 3 uint8
    # N numbers of any type: part labels as the file has them; `to_parts` reads them
    parts: np.ndarray | None = None
    faces: np.ndarray | None = None  # F 3 int64
    total: int | None = None  # points in the file, where more than MAX_POINTS
    # the axis that is up where the file's format says so: y in glTF
    up: str | None = None
    # points of the file that were left out, for they are NaN: where a sensor saw nothing
    unseen: int = 0

    def __len__(self) -> int:
        return len(self.points)

    @staticmethod
    def make(xyz: np.ndarray, unseen: int = 0, **attributes) -> "PointCloud":
        """From coordinates N 3 of any number type, and attributes of as many rows.

        Points of NaN are left out and counted with `unseen`, those that the caller left out. Raises
        ReadError: no such array, no points, infinite ones, all equal, a mesh of NaN, an attribute
        of other length.
        """
        xyz = np.asarray(xyz)
        found = f"expected an array of points [n, 3], found {xyz.dtype} {list(xyz.shape)}"
        if xyz.ndim != 2 or xyz.shape[1] < 3 or xyz.dtype.kind not in "iuf":
            raise ReadError(found)
        if len(xyz) == 3 and xyz.shape[1] > 32:
            raise ReadError(f"{found}: turn it over, points first")
        xyz, faces = xyz[:, :3].astype(np.float64), attributes.get("faces")
        kept = {name: attributes[name] for name in ATTRIBUTES if attributes.get(name) is not None}
        for name, values in kept.items():
            if len(values) != len(xyz):
                raise ReadError(f"{len(xyz)} points but {len(values)} {name}")
        seen = ~np.isnan(xyz).any(1)
        if faces is None and not seen.all():
            xyz, unseen = xyz[seen], unseen + int((~seen).sum())
            attributes |= {name: values[seen] for name, values in kept.items()}
        if unseen and not len(xyz):
            raise ReadError(f"no points: all {unseen:,} are NaN, where nothing was seen")
        check_cloud(xyz)
        origin = xyz.mean(0)
        points = (xyz - origin).astype(np.float32)
        if not points.any():
            raise ReadError("all points are equal, up to rounding")
        return PointCloud(points, origin, unseen=unseen, **attributes)

    def to_z_up(self, up_axis: str) -> np.ndarray:
        """Rows [3, 3] of `TO_Z_UP` for the axis that the file's format says is up; where it says
        none, `up_axis`.
        """
        return TO_Z_UP[self.up or up_axis]

    def take(self, index: np.ndarray) -> "PointCloud":
        """The points at index, without faces."""
        found = {name: getattr(self, name) for name in ATTRIBUTES}
        found = {name: values[index] for name, values in found.items() if values is not None}
        return replace(self, points=self.points[index], faces=None, **found)

    def normalised(self) -> "PointCloud":
        """In the unit sphere: centroid 0, farthest point at distance 1; origin and scale lead back."""
        points = self.points.astype(np.float64)
        center = points.mean(0)
        points -= center
        radius = np.linalg.norm(points, axis=1).max()
        points, origin = (points / radius).astype(np.float32), self.origin + center * self.scale
        return replace(self, points=points, origin=origin, scale=self.scale * radius)

    def remarks(self) -> list[str]:
        """What users should be told: that points of the file are not in the cloud."""
        found = []
        if self.total:
            found.append(f"a random {MAX_POINTS:,} of its {self.total:,} points were read")
        if self.unseen:
            missing = f"{self.unseen:,} points that are NaN, where nothing was seen"
            found.append(f"{missing}, were left out")
        return found

    def file_coordinates(self) -> np.ndarray:
        """Points N 3 float64 in the file's own frame."""
        return self.points.astype(np.float64) * self.scale + self.origin


def check_cloud(points: np.ndarray, where: str = "") -> None:
    """ReadError, which begins with `where`, for points n 3 that no shape has."""
    try:
        check(points)
    except ValueError as error:
        raise ReadError(f"{where}{error}") from error
    if (points == points[0]).all():
        raise ReadError(where + too_few(len(points), 1, 2))


def to_parts(values: np.ndarray) -> np.ndarray:
    """Part labels N as int16, UNLABELLED where a value is negative, NaN, or the largest of its
    integer type.

    Labels are checked here, where they are used, and not when a file is read. Raises ReadError for
    other values than whole numbers from 0 to 32,767.
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
        raise ReadError(f"part labels must be whole numbers from 0 to 32767, found {wrong[0]:.10g}")
    return whole.astype(np.int16)


def to_bytes(colors: np.ndarray) -> np.ndarray:
    """Colours N 3 as uint8, from fractions (a few may exceed 1), 0-255 or 16 bits; what is no
    number is 0.
    """
    colors = np.asarray(colors)
    if colors.dtype == np.uint8:
        return colors
    whole = colors.dtype.kind in "iu"
    colors = np.nan_to_num(colors.astype(np.float64), posinf=0, neginf=0)
    top = colors.max(initial=0)
    colors = colors * 255 if not whole and 0 < top < 2 else colors / 257 if top > 255 else colors
    return colors.clip(0, 255).round().astype(np.uint8)


def rotation(quaternion: np.ndarray) -> np.ndarray:
    """The matrix [3, 3] of a quaternion (w, x, y, z) of any length; of zeros the identity."""
    w, x, y, z = quaternion / (np.linalg.norm(quaternion) or 1.0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows)


def attribute_names(known: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The names of the columns, fields or properties that are normals, colors or parts."""
    found: dict[str, tuple[str, ...]] = {}
    for key, groups in ATTRIBUTE_COLUMNS.items():
        if names := next((group for group in groups if set(group) <= set(known)), None):
            found[key] = names
    return found


def as_attribute(key: str, values: np.ndarray) -> np.ndarray:
    """Values N D of the columns of one attribute as `PointCloud` has them."""
    if key == "normals":
        return values.astype(np.float32)
    return to_bytes(values) if key == "colors" else values[:, 0]


def sample_surface(mesh: PointCloud, count: int, seed: int) -> PointCloud:
    """`count` points of a mesh, uniform by area, with its faces' normals.

    Raises ReadError for a mesh without area.
    """
    assert mesh.faces is not None
    triangles = mesh.points[mesh.faces].astype(np.float64)
    points, chosen = sample_triangles(triangles, count, np.random.default_rng(seed))
    a, b, c = triangles[chosen].swapaxes(0, 1)
    normals = np.cross(b - a, c - a)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    points, normals = points.astype(np.float32), normals.astype(np.float32)
    return PointCloud(points, mesh.origin, mesh.scale, normals, up=mesh.up)


def sample_triangles(
    triangles: np.ndarray, count: int, rng: np.random.Generator, weight: np.ndarray | int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Points [count, 3] uniform on the surface `triangles` [t, 3, 3], and the triangle of each.

    weight: of the triangles [t], times their area. Raises ReadError where they have no area.
    """
    a, b, c = triangles.swapaxes(0, 1)
    area = np.cumsum(weight * np.linalg.norm(np.cross(b - a, c - a), axis=1))
    if not area[-1] > 0:
        raise ReadError("a mesh without surface")
    chosen = np.searchsorted(area, rng.random(count) * area[-1], side="right")
    # uniform in a triangle: Osada et al. 2002, eq. 1
    u, v = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    return (1 - u) * a[chosen] + u * (1 - v) * b[chosen] + u * v * c[chosen], chosen


def reduce(cloud: PointCloud, count: int, method: str, seed: int) -> PointCloud:
    """`count` of a cloud's points, at least as many.

    fps: in farthest point order, so that any first n are what FPS to n gives. random: uniform.
    voxel: one point a cell of the coarsest grid (of 2^k cells a side) that has `count` occupied,
    then random; near-even, in linear time.
    """
    rng = np.random.default_rng(seed)
    if method == "fps":
        index = farthest_point_sample(torch.from_numpy(cloud.points)[None], count)[0].numpy()
    elif method == "random":
        index = rng.choice(len(cloud), count, replace=False)
    else:
        index = rng.permutation(_one_a_voxel(cloud.points, count))[:count]
    return cloud.take(index)


def filled(cloud: PointCloud, count: int) -> PointCloud:
    """`count` of a cloud's fewer points: see `frame.fill`.

    Raises ReadError for fewer than LEAST different ones.
    """
    different = np.unique(cloud.points, axis=0, return_index=True)[1]
    if len(different) < (least := min(LEAST, count)):
        raise ReadError(too_few(len(cloud), len(different), least))
    cloud = reduce(cloud.take(different), len(different), "fps", 0)
    points, source = fill(cloud.points, count)
    return replace(cloud.take(source), points=points)


def _one_a_voxel(points: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first point of every occupied cell, of the coarsest grid with `count` of them.

    Grids have 2^k cells a side.
    """
    low, extent = points.min(0), np.ptp(points, axis=0).max()
    for level in range(1, 21):
        cells = np.minimum(((points - low) / extent * 2**level).astype(np.int64), 2**level - 1)
        index = np.unique(cells @ (1 << 42, 1 << 21, 1), return_index=True)[1]
        if len(index) >= count:
            return index
    return np.arange(len(points))


class Reservoir:
    """A uniform random part of rows that come in chunks: at most `limit`, in bounded memory.

    Every row draws a key, by seed; the rows of the smallest keys stay, in the order they came.
    """

    def __init__(self, limit: int = MAX_POINTS, seed: int = 0):
        self.limit, self.total = limit, 0
        self._rng, self._kept = np.random.default_rng(seed), []

    def add(self, rows: np.ndarray) -> None:
        """A chunk of rows r D."""
        keys = self._rng.random((len(rows), 1))
        self._kept.append(np.concatenate([keys, rows], 1))
        self.total += len(rows)
        if sum(map(len, self._kept)) > 2 * self.limit:
            self._kept = [self._trimmed()]

    def rows(self) -> np.ndarray:
        """At most `limit` rows n D."""
        return self._trimmed()[:, 1:] if self._kept else np.empty((0, 3))

    def _trimmed(self) -> np.ndarray:
        rows = np.concatenate(self._kept)
        if len(rows) <= self.limit:
            return rows
        return rows[np.sort(np.argpartition(rows[:, 0], self.limit)[: self.limit])]
