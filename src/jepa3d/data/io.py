"""One file to a `PointCloud`. What a parser may raise leaves here as `ReadError`, one line that names the file."""

import importlib
import logging
import lzma
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import trimesh

from jepa3d.data.cloud import PointCloud, ReadError, Reservoir, sample_surface
from jepa3d.data.text import read_table, to_bytes, to_parts

# What the parsers were seen to raise on damaged files (benchmarks/fuzz.py).
_PARSER_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, ArithmeticError, AssertionError,
    MemoryError, ImportError, StopIteration, NameError, SyntaxError, tokenize.TokenError, struct.error, zlib.error,
    lzma.LZMAError, zipfile.BadZipFile,
)  # fmt: skip
_BLOCK = 256  # clouds of an array file read at once
for _parser in ("trimesh", "laspy"):
    logging.getLogger(_parser).addHandler(logging.NullHandler())  # else they print beside the one line of the error


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


def enough_points(cloud: PointCloud, num_points: int, seed: int) -> PointCloud:
    """The cloud, or samples of the mesh, if that is at least `num_points`. Raises ReadError."""
    if cloud.faces is not None:
        cloud = sample_surface(cloud, max(2 * num_points, 2048), seed)
        points = cloud.points.astype(np.float64)
        return PointCloud.make(points + cloud.origin, normals=cloud.normals, label=cloud.label)
    if len(cloud) < num_points:
        raise ReadError(f"{len(cloud)} points, at least {num_points} are needed")
    return cloud


@contextmanager
def boundary(path: Path) -> Iterator[None]:
    """Turns what a parser raises, and what it lacks, into one ReadError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ReadError as error:
        message = str(error)
        raise error if message.startswith(f"{path}: ") else ReadError(f"{path}: {message}") from error
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({_line(error.strerror or error)})") from error
    except _PARSER_ERRORS as error:
        kind = path.suffix[1:].upper()
        raise ReadError(f"{path}: damaged or not a {kind} file ({_line(error)})") from error


def _line(error: Any) -> str:
    """The first line of an error, printable and short."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


def _check_claim(path: Path, claimed: int, factor: int) -> None:
    """ReadError, before anything is allocated, where a header claims more bytes than `factor` times the file's."""
    if claimed > factor * path.stat().st_size:
        raise ReadError(f"truncated or damaged: its header claims {claimed} bytes")


def clouds_in(path: Path) -> int | None:
    """How many clouds an array file holds; None for a file that is one cloud. Raises ReadError."""
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        return None
    with boundary(path):
        shapes = _array_shapes(path, path.stat().st_mtime_ns)
        points = shapes.get("points", ())
        return points[0] if len(points) == 3 else None


def facts_in(path: Path) -> dict[str, np.ndarray]:
    """What an array file of many clouds says of each: label, split, and class_names, those that it has."""
    with boundary(path):
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                names = _known(archive.files) | {name: name for name in ("class_names",) if name in archive.files}
                facts = {key: archive[name] for key, name in names.items() if key in _FACTS}
        elif path.suffix.lower() == ".npy":
            facts = {}
        else:
            with _module("h5py").File(path, "r") as file:
                facts = {key: file[name][:] for key, name in _known(file).items() if key in _FACTS}
        count = clouds_in(path) or 0
        for key in ("label", "split"):
            if key in facts and (len(facts[key]) != count or not np.issubdtype(facts[key].dtype, np.integer)):
                raise ReadError(
                    f"{key} must be {count} whole numbers, found {facts[key].dtype} {list(facts[key].shape)}"
                )
        return facts


# ------------------------------------------------------------------------------------------------ arrays


_NAMES = {
    "points": ("data", "points", "xyz"),
    "label": ("label", "labels"),
    "normals": ("normal", "normals"),
    "parts": ("pid", "seg", "parts"),
    "split": ("split",),
}
_FACTS = ("label", "split", "class_names")


@lru_cache(maxsize=4)
def _array_shapes(path: Path, changed: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a file, by what they are."""
    if path.suffix.lower() == ".npy":
        return {"points": np.load(path, allow_pickle=False, mmap_mode="r").shape}
    if path.suffix.lower() == ".npz":
        return {key: np.shape(values) for key, values in array_block(path, None, changed).items()}
    with _module("h5py").File(path, "r") as file:
        return {key: file[name].shape for key, name in _known(file).items()}


def _known(names) -> dict[str, str]:
    found = {key: next((n for n in known if n in names), None) for key, known in _NAMES.items()}
    if found["points"] is None:
        raise ReadError(
            f"has no array named {', '.join(_NAMES['points'])}; it has {', '.join(map(str, names)) or 'none'}"
        )
    return {key: name for key, name in found.items() if name}


@lru_cache(maxsize=2)
def array_block(path: Path, block: int | None, changed: int) -> dict[str, np.ndarray]:
    """Rows [256 * block, 256 * (block + 1)) of a file's arrays, by what they are; None, or an NPZ, reads them whole."""
    rows = slice(None) if block is None else slice(block * _BLOCK, (block + 1) * _BLOCK)
    if path.suffix.lower() == ".npy":
        return {"points": np.load(path, allow_pickle=False, mmap_mode="r")[rows]}
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {key: np.asarray(archive[name]) for key, name in _known(archive.files).items()}
    with _module("h5py").File(path, "r") as file:
        names = _known(file) | ({"mask": "mask"} if "mask" in file else {})
        for name in names.values():
            _check_claim(path, file[name].nbytes, 1100)  # gzip's best is 1032
        return {key: file[name][rows] for key, name in names.items()}


def array_rows(path: Path, row: int) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of the block that holds a row, and the row's place there. Raises ReadError."""
    block, at = divmod(row, _BLOCK) if path.suffix.lower() != ".npz" else (None, row)
    arrays = array_block(path, block, path.stat().st_mtime_ns)
    counts = {key: len(values) for key, values in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ReadError("arrays of different lengths: " + ", ".join(f"{key} {n}" for key, n in counts.items()))
    if at >= len(arrays["points"]):
        raise ReadError(f"has no cloud {row}")
    return arrays, at


def _array(path: Path, row: int | None) -> PointCloud:
    shapes = _array_shapes(path, path.stat().st_mtime_ns)
    if len(shapes["points"]) == 3:
        if row is None:
            raise ReadError(f"expected an array of points [n, 3], found {list(shapes['points'])}: many clouds")
        arrays, at = array_rows(path, row)
        arrays = {key: values[at] for key, values in arrays.items()}
    else:
        arrays = array_block(path, None, path.stat().st_mtime_ns)
    attributes: dict[str, Any] = {}
    if np.ndim(arrays["points"]) == 2:
        if (normals := arrays.get("normals")) is not None and np.shape(normals) == np.shape(arrays["points"]):
            attributes["normals"] = np.asarray(normals, np.float32)
        if (parts := arrays.get("parts")) is not None and np.shape(parts) == (len(arrays["points"]),):
            attributes["parts"] = to_parts(parts)
    if (label := arrays.get("label")) is not None and np.size(label) == 1:
        attributes["label"] = int(np.ravel(label)[0])
    return PointCloud.make(arrays["points"], **attributes)


# ------------------------------------------------------------------------------------------------ meshes and clouds


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
    return PointCloud.make(vertices, **_columns_of(raw, len(vertices)))


def _columns_of(raw, count: int) -> dict[str, np.ndarray]:
    """Normals, colours and part labels among named columns (PLY properties, PCD fields)."""
    if raw is None:
        return {}
    names = getattr(raw, "dtype", None)
    have = set(names.names) if names is not None else set(raw)

    def stack(group: tuple[str, ...]) -> np.ndarray:
        return np.stack([np.asarray(raw[name]).reshape(count) for name in group], 1)

    found: dict[str, np.ndarray] = {}
    for group in (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z")):
        if set(group) <= have:
            found["normals"] = stack(group).astype(np.float32)
    if {"red", "green", "blue"} <= have:
        found["colors"] = to_bytes(stack(("red", "green", "blue")))
    for name in ("part", "label", "class", "classification"):
        if name in have and "parts" not in found:
            found["parts"] = to_parts(stack((name,))[:, 0])
    return found


def _check_ply_is_whole(path: Path, loaded) -> None:
    """trimesh drops the missing rows of a truncated ASCII file without a word; its header tells."""
    with path.open("rb") as file:
        header = iter(lambda: file.readline(200).decode("ascii", "replace").split(), ["end_header"])
        declared = {line[1]: int(line[2]) for line in header if line[:1] == ["element"] and len(line) == 3}
    found = {"vertex": len(loaded.vertices), "face": len(getattr(loaded, "faces", ()))}  # faces: triangles, no fewer
    for element, count in found.items():
        if count < declared.get(element, 0):
            raise ReadError(f"truncated: {count} of {declared[element]} of its {element} rows")


def _pcd(path: Path) -> PointCloud:
    pypcd4 = _module("pypcd4")
    with path.open("rb") as file:
        lines = [file.readline(10_000).decode("utf-8", "replace").strip() for _ in range(30)]
    end = next((i + 1 for i, line in enumerate(lines) if line.startswith("DATA")), len(lines))
    header = pypcd4.MetaData.parse_header(lines[:end])
    _check_claim(path, header.points * sum(s * n for s, n in zip(header.size, header.count, strict=True)), 100)
    cloud = pypcd4.PointCloud.from_path(path)
    if {"x", "y", "z"} - set(cloud.fields):
        raise ReadError(f"has no fields x, y, z; it has {', '.join(cloud.fields)}")
    data = cloud.pc_data
    if len(data) != cloud.points:
        raise ReadError(f"truncated: {len(data)} of {cloud.points} points")
    attributes = _columns_of(data, len(data))
    if "rgb" in cloud.fields:
        attributes["colors"] = np.asarray(cloud.decode_rgb(data["rgb"]), np.uint8).reshape(-1, 3)
    return PointCloud.make(np.stack([data[axis].astype(np.float64) for axis in "xyz"], 1), **attributes)


def _check_las(path: Path) -> None:
    """ReadError for counts over which laspy would loop for hours, or lazrs abort the process: records, LAZ chunks."""
    with path.open("rb") as file:
        head = file.read(108)
        start, records = (int.from_bytes(head[i : i + 4], "little") for i in (96, 100))
        _check_claim(path, 54 * records, 1)
        if head[104:105] >= b"\x80":  # compressed: bit 7 of the point format
            file.seek(start)
            table = int.from_bytes(file.read(8), "little", signed=True)
            if table < 0:  # written as a stream: the offset is at the end
                file.seek(-8, 2)
                table = int.from_bytes(file.read(8), "little", signed=True)
            file.seek(max(table, 0) + 4)
            _check_claim(path, int.from_bytes(file.read(4), "little"), 1)


def _las(path: Path) -> PointCloud:
    """LAS and LAZ, in chunks; colours and classification come along."""
    laspy = _module("laspy")
    reservoir, color = Reservoir(), False
    _check_las(path)
    try:
        with laspy.open(path, read_evlrs=False) as file:
            declared = file.header.point_count
            packed = file.header.are_points_compressed
            _check_claim(path, declared * file.header.point_format.size, 5000 if packed else 1)
            color = "red" in set(file.header.point_format.dimension_names)
            names = ("x", "y", "z", "classification") + (("red", "green", "blue") if color else ())
            for chunk in file.chunk_iterator(500_000):
                reservoir.add(np.stack([np.asarray(chunk[name], np.float64) for name in names], 1))
    except laspy.errors.LaspyException as error:
        raise ReadError(f"damaged or not a LAS file ({_line(error)})") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, no Exception and not importable
            raise
        raise ReadError(f"damaged or not a LAZ file ({_line(error)})") from error
    if reservoir.total < declared:
        raise ReadError(f"truncated: {reservoir.total} of {declared} points")
    rows = reservoir.rows()
    colors = to_bytes(rows[:, 4:]) if color else None
    total = reservoir.total if reservoir.total > len(rows) else None
    return PointCloud.make(rows[:, :3], parts=to_parts(rows[:, 3]), colors=colors, total=total)


def _e57(path: Path) -> PointCloud:
    """All scans of an E57 file, each placed by its pose."""
    pye57 = _module("pye57")
    try:
        file = pye57.E57(str(path))
        try:
            for i in range(file.scan_count):
                _check_claim(path, file.get_header(i).point_count, 8)  # a bit each
            scans = [file.read_scan(i, ignore_missing_fields=True) for i in range(file.scan_count)]
        finally:
            file.close()
    except pye57.libe57.E57Exception as error:
        raise ReadError(f"damaged or not an E57 file ({_line(error)})") from error
    names = [f"cartesian{axis}" for axis in "XYZ"]
    return PointCloud.make(np.concatenate([np.stack([scan[name] for name in names], 1) for scan in scans]))


def _module(name: str) -> Any:
    """A parser of the `io` extra; without it, a ReadError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ReadError(f"needs {name}: pip install 'jepa3d[io]'") from error


_READERS: dict[str, Callable[..., PointCloud]] = {
    ".npy": _array, ".npz": _array, ".h5": _array, ".hdf5": _array,
    ".off": _off, ".ply": _geometry, ".obj": _geometry, ".stl": _geometry, ".glb": _geometry, ".gltf": _geometry,
    ".xyz": read_table, ".txt": read_table, ".csv": read_table, ".pts": read_table, ".asc": read_table,
    ".pcd": _pcd, ".las": _las, ".laz": _las, ".e57": _e57,
}  # fmt: skip
ARRAY_SUFFIXES = (".npy", ".npz", ".h5", ".hdf5")
SUFFIXES = tuple(_READERS)
