"""Read a file of any known format: as one `PointCloud`, or all of its points in chunks.

Every error of a parser becomes a `ReadError` with one line of text that names the file.
"""

import gzip
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jepa3d.data import scans
from jepa3d.data.arrays import ARRAY_SUFFIXES, npy_rows, read_array
from jepa3d.data.cloud import ATTRIBUTES, PointCloud, ReadError, to_bytes
from jepa3d.data.errors import as_read_error, check_unpacked, suffix_of
from jepa3d.data.gltf import read_gltf
from jepa3d.data.meshes import mesh, read_obj, read_off, read_stl
from jepa3d.data.ply import ply_rows, read_ply
from jepa3d.data.text import read_table, table_rows
from jepa3d.plain import load_code


def read(
    path: str | Path,
    row: int | None = None,
    columns: tuple[str, ...] | None = None,
    reader: str | None = None,
) -> PointCloud:
    """Read the cloud or mesh in a file. Raises ReadError.

    row: index of the cloud in a file of many clouds (HDF5, NPZ, NPY). columns: for a table
    with a header, the three names that it has for x, y and z; for a .bin file or a table without
    header, the names of all columns. reader: the user's own function that reads a file, as
    `package.module:function`; this function gets the path and returns points [n, 3] or a
    `PointCloud`.
    """
    path = Path(path)
    if reader is not None:
        with as_read_error(path):
            return _checked(load_code(reader)(path))
    suffix = suffix_of(path)
    if reason := refusal(path):
        allowed = f"; allowed are {', '.join(SUFFIXES)}, each also with .gz"
        raise ReadError(f"{path}: {reason}{'' if suffix in _CONVERTED else allowed}")
    with as_read_error(path), _inflated(path) as file:
        if file.stat().st_size == 0:
            raise ReadError("empty file")
        if suffix in ARRAY_SUFFIXES:
            return read_array(file, row)
        if suffix in (*_TABLES, ".bin"):
            return _READERS[suffix](file, columns)
        if suffix in _GLTF:
            return read_gltf(file, path.parent)
        return _READERS[suffix](file)


def refusal(path: Path) -> str | None:
    """Return why this kind of file is not read, and how to convert it if a way is known.

    Returns None if this kind of file is read.
    """
    suffix = suffix_of(path)
    if suffix in _CONVERTED:
        return f"{suffix} is not read; convert it first: {_CONVERTED[suffix]}"
    return None if suffix in SUFFIXES else "unknown kind of file"


@contextmanager
def _inflated(path: Path) -> Iterator[Path]:
    """Yield the file itself or, for a .gz, a temporary file with its content.

    Raises ReadError if the content is far larger than the .gz.
    """
    if path.suffix.lower() != ".gz":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        file, total = Path(folder, "file" + suffix_of(path)), 0
        with gzip.open(path) as packed, file.open("wb") as out:
            while block := packed.read(1 << 20):
                total += len(block)
                # the content may have 100 times the size of the .gz, or 64 MiB if that is more
                check_unpacked(path, total, 100, 1 << 26)
                out.write(block)
        yield file


def chunks(path: Path, tell: Callable[[int], None] = lambda unseen: None) -> Iterator[np.ndarray]:
    """Yield all points of a file in chunks, arrays [n, 3] float64, without NaN points.

    The points have the order and the coordinates of the file. LAS, LAZ, NPY, PTX, tables and most
    PLY files need memory for one chunk only; all other files are read whole. tell: called at the
    end with the number of NaN points. Raises ReadError, also for infinite coordinates (1e30 or
    more), for meshes, and for a file that must be read whole but has so many points that `read`
    keeps only a sample.
    """
    reader, number, unseen = _IN_CHUNKS.get(path.suffix.lower()), 0, 0
    with as_read_error(path):
        if path.stat().st_size == 0:
            raise ReadError("empty file")
        parts = (reader(path) if reader else None) or _at_once(path)
    while True:
        with as_read_error(path):
            rows = next(parts, None)
        if rows is None:
            return tell(unseen)
        xyz = rows[:, :3]
        wrong = (np.abs(xyz) >= 1e30).any(1)  # 1e30 counts as infinite, NaN does not
        if wrong.any():
            first = f"the first in point {number + int(wrong.argmax()):,}"
            raise ReadError(f"{path}: has infinite coordinates, {first}")
        number += len(xyz)
        seen = ~np.isnan(xyz).any(1)
        unseen += int((~seen).sum())
        if seen.any():
            yield xyz if seen.all() else xyz[seen]


def _at_once(path: Path) -> Iterator[np.ndarray]:
    """Yield the points of a file that is read whole, and then one NaN row for each NaN point.

    The NaN rows are for `chunks`, which counts them. `read` has dropped the NaN points and kept
    only their number.
    """
    cloud = _whole(path, path.stat().st_mtime_ns)
    yield cloud.file_coordinates()
    yield np.full((cloud.unseen, 3), np.nan)


@lru_cache(maxsize=1)
def _whole(path: Path, mtime: int) -> PointCloud:
    """Read a file as one cloud.

    Raises ReadError for a mesh, and if the file has so many points that `read` keeps only a sample.

    mtime: modification time of the file, so that the cache is not used after the file has changed.
    """
    cloud = read(path)
    if cloud.faces is not None:
        raise ReadError("is a mesh, but a scene must be a cloud of points")
    if cloud.total:
        raise ReadError(f"{cloud.total:,} points are too many for this format; use LAS or PLY")
    return cloud


def sampled(cloud: PointCloud, num_points: int, seed: int = 0) -> PointCloud:
    """Return a cloud as it is; sample max(2 * `num_points`, 2048) points from a mesh.

    Farthest point sampling later chooses `num_points` of the sampled points, so more points are
    sampled than are needed. Equal meshes give equal samples if the seed is equal too.
    """
    if cloud.faces is None:
        return cloud
    cloud = cloud.sampled(max(2 * num_points, 2048), seed)
    return PointCloud.make(cloud.file_coordinates(), normals=cloud.normals, up=cloud.up)


def _checked(found: Any) -> PointCloud:
    """Check what a user's reader returned, which may be any `PointCloud`. Raises ReadError."""
    if not isinstance(found, PointCloud):
        return PointCloud.make(found)
    kept: dict[str, Any] = {name: getattr(found, name) for name in ATTRIBUTES}
    kept["colors"] = None if found.colors is None else to_bytes(found.colors)
    faces = np.empty((0, 3), np.int64) if found.faces is None else found.faces
    return mesh(found.file_coordinates(), faces, up=found.up, **kept)


_GLTF = (".glb", ".gltf")
_TABLES = (".xyz", ".txt", ".csv", ".pts", ".asc")
_READERS: dict[str, Callable[..., PointCloud]] = {
    **dict.fromkeys(ARRAY_SUFFIXES, read_array),
    ".off": read_off,
    ".ply": read_ply,
    ".obj": read_obj,
    ".stl": read_stl,
    **dict.fromkeys(_GLTF, read_gltf),
    **dict.fromkeys(_TABLES, read_table),
    ".pcd": scans.read_pcd,
    **dict.fromkeys((".las", ".laz"), scans.read_las),
    ".e57": scans.read_e57,
    ".ptx": scans.read_ptx,
    ".bin": scans.read_bin,
}
SUFFIXES = tuple(_READERS)
# readers that yield chunks of rows x, y, z, ..., or return None if the file must be read whole
_IN_CHUNKS: dict[str, Callable[[Path], Iterator[np.ndarray] | None]] = {
    **dict.fromkeys((".las", ".laz"), scans.las_rows),
    **dict.fromkeys(_TABLES, table_rows),
    ".ply": ply_rows,
    ".npy": npy_rows,
    ".ptx": scans.ptx_rows,
}
_TRIMESH = (
    "pip install trimesh pycollada lxml networkx; "
    """python -c "import trimesh as t; t.load('IN', force='mesh').export('OUT.ply')\""""
)
_PYVISTA = (
    """pip install pyvista; python -c "import pyvista; pyvista.read('IN')"""
    """.extract_surface().triangulate().save('OUT.ply')\""""
)
_BLENDER = (".fbx", ".blend", ".3ds", ".x3d", ".wrl", ".usd", ".usdc", ".usdz")
_FREECAD = (".step", ".stp", ".iges", ".igs", ".brep")
# suffixes of formats that are not read -> how to convert a file
_CONVERTED = {
    **dict.fromkeys((".dae", ".3mf"), _TRIMESH),
    **dict.fromkeys((".vtk", ".vtp", ".vtu"), _PYVISTA),
    **dict.fromkeys(_BLENDER, "in Blender, to PLY"),
    **dict.fromkeys(_FREECAD, "in FreeCAD, to STL"),
}
