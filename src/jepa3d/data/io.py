"""One file to a `PointCloud`.

What a parser may raise leaves here as `ReadError`, one line that names the file.
"""

import gzip
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jepa3d.data.arrays import ARRAY_SUFFIXES, read_array
from jepa3d.data.boundary import boundary, suffix_of
from jepa3d.data.cloud import PointCloud, ReadError, sample_surface
from jepa3d.data.gltf import read_gltf
from jepa3d.data.obj import read_obj
from jepa3d.data.off import read_off
from jepa3d.data.ply import read_ply
from jepa3d.data.scans import read_bin, read_e57, read_las, read_pcd, read_ptx
from jepa3d.data.stl import read_stl
from jepa3d.data.text import read_table

_MOST_INFLATED = 100, 1 << 26  # bytes of a .gz: this many times its size, or this many


def read(
    path: str | Path, row: int | None = None, columns: tuple[str, ...] | None = None
) -> PointCloud:
    """The cloud, or mesh, of a file; of an array of clouds (HDF5, NPZ) that at `row`.

    columns: names of x, y, z in a table whose header has others, or of all columns of a .bin.
    Raises ReadError.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if why := refusal(path):
        allowed = (
            "" if suffix in _CONVERTED else f"; allowed are {', '.join(SUFFIXES)}, each also as .gz"
        )
        raise ReadError(f"{path}: {why}{allowed}")
    reader = _READERS[suffix]
    with boundary(path), _inflated(path) as file:
        if file.stat().st_size == 0:
            raise ReadError("empty file")
        if suffix in ARRAY_SUFFIXES:
            return reader(file, row)
        return reader(file, columns) if reader in (read_table, read_bin) else reader(file)


def refusal(path: Path) -> str | None:
    """Why a file of this name is not read, and what to do; None where it is."""
    suffix = suffix_of(path)
    if suffix in _CONVERTED:
        return f"{suffix} is not read; convert it first: {_CONVERTED[suffix]}"
    return None if suffix in SUFFIXES else "unknown kind of file"


@contextmanager
def _inflated(path: Path) -> Iterator[Path]:
    """The file, or of a .gz a temporary file of what is in it.

    Raises ReadError where that is far too much.
    """
    if path.suffix.lower() != ".gz":
        yield path
        return
    most = max(_MOST_INFLATED[0] * path.stat().st_size, _MOST_INFLATED[1])
    with tempfile.TemporaryDirectory() as folder:
        file, total = Path(folder, "file" + suffix_of(path)), 0
        with gzip.open(path) as packed, file.open("wb") as out:
            while some := packed.read(1 << 20):
                total += len(some)
                if total > most:
                    raise ReadError(
                        f"holds more than {most:,} bytes, too many for its size; unpack it to read it"
                    )
                out.write(some)
        yield file


def read_points(path: str | Path, num_points: int, seed: int = 0) -> np.ndarray:
    """At least `num_points` points [n, 3] of a file, float32, in the file's own axes, shifted to
    centroid 0.

    A mesh is sampled uniformly by area with `seed`, at least twice as densely as needed; a cloud is
    taken as it is. Raises ReadError for a damaged file, NaN or infinite coordinates, too few
    points, or no extent.
    """
    with boundary(Path(path)):
        return enough_points(read(path), num_points, seed).points


def sampled(cloud: PointCloud, num_points: int, seed: int = 0) -> PointCloud:
    """The cloud, or more than `num_points` samples of the mesh, by default the same for equal
    meshes.
    """
    if cloud.faces is None:
        return cloud
    cloud = sample_surface(cloud, max(2 * num_points, 2048), seed)
    points = cloud.points.astype(np.float64)
    return PointCloud.make(points + cloud.origin, normals=cloud.normals, up=cloud.up)


def enough_points(cloud: PointCloud, num_points: int, seed: int) -> PointCloud:
    """The cloud, or samples of the mesh, if that is at least `num_points`. Raises ReadError."""
    cloud = sampled(cloud, num_points, seed)
    if len(cloud) < num_points:
        raise ReadError(f"{len(cloud)} points, at least {num_points} are needed")
    return cloud


_READERS: dict[str, Callable[..., PointCloud]] = {
    ".npy": read_array,
    ".npz": read_array,
    ".h5": read_array,
    ".hdf5": read_array,
    ".off": read_off,
    ".ply": read_ply,
    ".obj": read_obj,
    ".stl": read_stl,
    ".glb": read_gltf,
    ".gltf": read_gltf,
    ".xyz": read_table,
    ".txt": read_table,
    ".csv": read_table,
    ".pts": read_table,
    ".asc": read_table,
    ".pcd": read_pcd,
    ".las": read_las,
    ".laz": read_las,
    ".e57": read_e57,
    ".ptx": read_ptx,
    ".bin": read_bin,
}
SUFFIXES = tuple(_READERS)
_PYTHON = """pip install {}; python -c "import {}; {}('OUT.ply')\""""
_TRIMESH = ("trimesh pycollada lxml networkx", "trimesh", "trimesh.load('IN', force='mesh').export")
_PYVISTA = ("pyvista", "pyvista", "pyvista.read('IN').extract_surface().triangulate().save")
_CONVERTED = {
    **dict.fromkeys((".dae", ".3mf"), _PYTHON.format(*_TRIMESH)),
    **dict.fromkeys((".vtk", ".vtp", ".vtu"), _PYTHON.format(*_PYVISTA)),
    **dict.fromkeys(
        (".fbx", ".blend", ".3ds", ".x3d", ".wrl", ".usd", ".usdc", ".usdz"), "in Blender, to PLY"
    ),
    **dict.fromkeys((".step", ".stp", ".iges", ".igs", ".brep"), "in FreeCAD, to STL"),
}
