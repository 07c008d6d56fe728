"""One file to points. Everything a parser may raise leaves here as `ReadError`, one line that names the file."""

import struct
from pathlib import Path

import numpy as np
import trimesh

POINT_SUFFIXES = (".npy",)
MESH_SUFFIXES = (".off", ".ply", ".obj", ".stl", ".glb")
SUFFIXES = POINT_SUFFIXES + MESH_SUFFIXES

# What numpy's and trimesh's parsers were seen to raise on damaged files.
_PARSER_ERRORS = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError, EOFError, ArithmeticError,
    UnicodeError, MemoryError, ImportError, struct.error,
)  # fmt: skip


class ReadError(ValueError):
    """A file that cannot be used: which, and why."""


def read_points(path: str | Path, num_points: int, seed: int = 0) -> np.ndarray:
    """At least `num_points` points [n, 3] of a file, float32, in the file's own axes, shifted to centroid 0.

    A mesh is sampled uniformly by area with `seed`, at least twice as densely as needed; a cloud is taken as it is.
    Raises ReadError for a damaged file, NaN or infinite coordinates, too few points, or no extent.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ReadError(f"{path}: unknown kind of file; allowed are {', '.join(SUFFIXES)}")
    try:
        if path.suffix.lower() == ".npy":
            points = np.load(path, allow_pickle=False, mmap_mode="r")
        else:
            points = _read_geometry(path, max(2 * num_points, 2048), seed)
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({error.strerror or error})") from error
    except _PARSER_ERRORS as error:
        if isinstance(error, ReadError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ReadError(f"{path}: damaged or not a {path.suffix[1:].upper()} file ({reason})") from error
    if points.ndim != 2 or points.shape[1] < 3 or not np.issubdtype(points.dtype, np.number):
        raise ReadError(f"{path}: expected an array of points [n, 3], found {points.dtype} {list(points.shape)}")
    points = check_cloud(np.asarray(points[:, :3], np.float64), num_points, str(path))
    return (points - points.mean(0)).astype(np.float32)


def check_cloud(points: np.ndarray, num_points: int, where: str) -> np.ndarray:
    """points [n, 3] if they can be used; else a ReadError that begins with `where`."""
    if len(points) < num_points:
        raise ReadError(f"{where}: {len(points)} points, at least {num_points} are needed (num_points)")
    if not np.isfinite(points).all():
        raise ReadError(f"{where}: NaN or infinite coordinates")
    if (points == points[0]).all():
        raise ReadError(f"{where}: all points are equal")
    return points


def _read_geometry(path: Path, samples: int, seed: int) -> np.ndarray:
    loaded = trimesh.load(path, process=False)
    if path.suffix.lower() == ".ply":
        _check_ply_is_whole(path, loaded)
    if isinstance(loaded, trimesh.Scene):
        loaded = loaded.to_geometry()
    if not isinstance(loaded, trimesh.Trimesh) or not len(loaded.faces):
        return np.asarray(getattr(loaded, "vertices", np.empty((0, 3))))
    if not np.isfinite(loaded.vertices).all():
        raise ReadError(f"{path}: NaN or infinite coordinates")
    if not loaded.area > 0:
        raise ReadError(f"{path}: a mesh without surface")
    return np.asarray(trimesh.sample.sample_surface(loaded, samples, seed=seed)[0])


def _check_ply_is_whole(path: Path, loaded) -> None:
    """trimesh drops the missing rows of a truncated ASCII file without a word; its header tells."""
    with path.open("rb") as file:
        header = iter(lambda: file.readline(200).decode("ascii", "replace").split(), ["end_header"])
        declared = {line[1]: int(line[2]) for line in header if line[:1] == ["element"] and len(line) == 3}
    found = {"vertex": len(loaded.vertices), "face": len(getattr(loaded, "faces", ()))}  # faces: triangles, no fewer
    for element, count in found.items():
        if count < declared.get(element, 0):
            raise ReadError(f"{path}: truncated: {count} of {declared[element]} of its {element} rows")
