"""One file to a `PointCloud`. What a parser may raise leaves here as `ReadError`, one line that names the file."""

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import trimesh

from jepa3d.data.arrays import ARRAY_SUFFIXES, read_array
from jepa3d.data.boundary import boundary
from jepa3d.data.cloud import PointCloud, ReadError, sample_surface
from jepa3d.data.scans import columns_of, read_e57, read_las, read_pcd
from jepa3d.data.text import read_table


def read(path: str | Path, row: int | None = None, columns: tuple[str, ...] | None = None) -> PointCloud:
    """The cloud, or mesh, of a file; of an array of clouds (HDF5, NPZ) that at `row`.

    columns: names of x, y, z in a table whose header has others. Raises ReadError.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ReadError(f"{path}: unknown kind of file; allowed are {', '.join(SUFFIXES)}")
    with boundary(path):
        if path.stat().st_size == 0:
            raise ReadError("empty file")
        if path.suffix.lower() in ARRAY_SUFFIXES:
            return reader(path, row)
        return read_table(path, columns) if reader is read_table else reader(path)


def read_points(path: str | Path, num_points: int, seed: int = 0) -> np.ndarray:
    """At least `num_points` points [n, 3] of a file, float32, in the file's own axes, shifted to centroid 0.

    A mesh is sampled uniformly by area with `seed`, at least twice as densely as needed; a cloud is taken as it is.
    Raises ReadError for a damaged file, NaN or infinite coordinates, too few points, or no extent.
    """
    with boundary(Path(path)):
        return enough_points(read(path), num_points, seed).points


def sampled(cloud: PointCloud, num_points: int, seed: int = 0) -> PointCloud:
    """The cloud, or more than `num_points` samples of the mesh, by default the same for equal meshes."""
    if cloud.faces is None:
        return cloud
    cloud = sample_surface(cloud, max(2 * num_points, 2048), seed)
    points = cloud.points.astype(np.float64)
    return PointCloud.make(points + cloud.origin, normals=cloud.normals, label=cloud.label)


def enough_points(cloud: PointCloud, num_points: int, seed: int) -> PointCloud:
    """The cloud, or samples of the mesh, if that is at least `num_points`. Raises ReadError."""
    cloud = sampled(cloud, num_points, seed)
    if len(cloud) < num_points:
        raise ReadError(f"{len(cloud)} points, at least {num_points} are needed")
    return cloud


def _off(path: Path) -> PointCloud:
    """OFF by one split of its numbers: three times as fast as trimesh's, and ModelNet's one-line header is read."""
    header, _, body = path.read_bytes().lstrip().partition(b"OFF")
    if header not in (b"", b"C", b"N", b"CN"):
        raise ReadError("not an OFF file: it does not begin with OFF")
    if b"#" in body:
        body = b"\n".join(line.partition(b"#")[0] for line in body.splitlines())
    lines = body.lstrip().split(b"\n", 1)
    counts = [int(n) for n in lines[0].split()]
    if len(counts) < 2 or min(counts) < 0:
        raise ReadError("an OFF file begins with its numbers of vertices and faces")
    words = lines[1].split() if len(lines) > 1 else []
    num_vertices, num_faces = counts[:2]
    width = 3 + 3 * ("N" in header.decode()) + 4 * ("C" in header.decode())
    if len(words) < width * num_vertices + 4 * num_faces:
        raise ReadError(f"truncated: {len(words)} numbers for {num_vertices} vertices and {num_faces} faces")
    vertices = np.array(words[: width * num_vertices], np.float64).reshape(-1, width)[:, :3]
    rest = words[width * num_vertices :]
    if num_faces == 0:
        return PointCloud.make(vertices)
    if len(rest) == 4 * num_faces and set(rest[::4]) == {b"3"}:
        return PointCloud.make(vertices, faces=np.array(rest, np.int64).reshape(-1, 4)[:, 1:])
    return PointCloud.make(vertices, faces=_fans(body.split(b"\n")[1:], num_vertices, num_faces))


def _fans(lines: list[bytes], num_vertices: int, num_faces: int) -> np.ndarray:
    """Triangles of an OFF file's polygons, a line each, which colours may follow."""
    rows = [row for row in (line.split() for line in lines) if row][num_vertices:]
    if len(rows) < num_faces:
        raise ReadError(f"truncated: {len(rows)} of {num_faces} faces")
    fans = []
    for row in rows[:num_faces]:
        count = int(row[0])
        corners = [int(n) for n in row[1 : count + 1]]
        if len(corners) < count:
            raise ReadError(f"a face of {count} vertices names {len(corners)}")
        fans += [(corners[0], corners[i], corners[i + 1]) for i in range(1, count - 1)]
    return np.array(fans, np.int64).reshape(-1, 3)


def _geometry(path: Path) -> PointCloud:
    """What trimesh reads: meshes, clouds, or scenes of meshes."""
    loaded: Any = trimesh.load(path, process=False)
    if path.suffix.lower() == ".ply":
        _check_ply_is_whole(path, loaded)
    if isinstance(loaded, trimesh.Scene):
        loaded = loaded.to_geometry()
    vertices = np.asarray(getattr(loaded, "vertices", np.empty((0, 3))))
    if isinstance(loaded, trimesh.Trimesh) and len(loaded.faces):
        return PointCloud.make(vertices, faces=np.asarray(loaded.faces))
    raw = getattr(loaded, "metadata", {}).get("_ply_raw", {}).get("vertex", {}).get("data")
    return PointCloud.make(vertices, **columns_of(raw, len(vertices)))


def _check_ply_is_whole(path: Path, loaded) -> None:
    """trimesh drops the missing rows of a truncated ASCII file without a word; its header tells."""
    with path.open("rb") as file:
        header = takewhile(lambda row: row.strip() != b"end_header", iter(lambda: file.readline(200), b""))
        lines = [row.decode("ascii", "replace").split() for row in header]
    declared = {line[1]: int(line[2]) for line in lines if line[:1] == ["element"] and len(line) == 3}
    found = {"vertex": len(loaded.vertices), "face": len(getattr(loaded, "faces", ()))}  # faces: triangles, no fewer
    for element, count in found.items():
        if count < declared.get(element, 0):
            raise ReadError(f"truncated: {count} of {declared[element]} of its {element} rows")


_READERS: dict[str, Callable[..., PointCloud]] = {
    ".npy": read_array, ".npz": read_array, ".h5": read_array, ".hdf5": read_array,
    ".off": _off, ".ply": _geometry, ".obj": _geometry, ".stl": _geometry, ".glb": _geometry, ".gltf": _geometry,
    ".xyz": read_table, ".txt": read_table, ".csv": read_table, ".pts": read_table, ".asc": read_table,
    ".pcd": read_pcd, ".las": read_las, ".laz": read_las, ".e57": read_e57,
}  # fmt: skip
SUFFIXES = tuple(_READERS)
