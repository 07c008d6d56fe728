"""Files of arrays, NPY, NPZ and HDF5: one cloud, or many with what is known of each.

Shapes and types are read first, from the headers, and what they claim is bounded before anything is
inflated.
"""

import math
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from jepa3d.data.boundary import boundary, check_claim, module
from jepa3d.data.cloud import PointCloud, ReadError

ARRAY_SUFFIXES = (".npy", ".npz", ".h5", ".hdf5")
_BLOCK = 256  # clouds read at once
_NAMES = {
    "points": ("data", "points", "xyz"),
    "label": ("label", "labels"),
    "normals": ("normal", "normals"),
    "parts": ("pid", "seg", "parts"),
    "split": ("split",),
}
_FACTS = ("label", "split", "class_names", "names")
Headers = dict[str, tuple[tuple[int, ...], np.dtype]]  # name -> shape and type


def clouds_in(path: Path) -> int | None:
    """How many clouds an array file holds; None for a file that is one cloud. Raises ReadError."""
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        return None
    with boundary(path):
        shapes = _array_shapes(path, path.stat().st_mtime_ns)
        return shapes["points"][0] if len(shapes["points"]) == 3 else None


def facts_in(path: Path) -> dict[str, np.ndarray]:
    """What an array file of many clouds says of them: label and split [n], names, class_names.

    Only those that it has. Raises ReadError.
    """
    with boundary(path):
        headers = _headers(path)
        names = {key: name for key, name in _known(headers).items() if key in _FACTS}
        if path.suffix.lower() == ".npz":
            names |= {name: name for name in _FACTS[2:] if name in headers}
        facts = _read(path, names, slice(None))
        count = clouds_in(path) or 0
        for key, values in facts.items():
            facts[key] = values = values.reshape(-1) if values.shape == (len(values), 1) else values
            if key == "split" and (values.shape != (count,) or values.dtype.kind not in "iu"):
                raise ReadError(f"split must be {count} whole numbers, found {_described(values)}")
            if key == "label":
                facts[key] = _classes(values, names[key])
        return facts


def _described(values: np.ndarray) -> str:
    return f"{values.dtype} {list(values.shape)}"


def _classes(values: np.ndarray, name: str) -> np.ndarray:
    """Labels n as texts, or as int64 with -1 for NaN and the largest value of an integer type.

    Raises ReadError for other values.
    """
    if values.dtype.kind in "US":
        return values
    numbers = np.nan_to_num(values, nan=-1) if values.dtype.kind == "f" else values
    if values.dtype.kind not in "iuf" or (numbers != np.floor(numbers)).any():
        raise ReadError(f"{name} must be whole numbers or names, found {_described(values)}")
    if values.dtype.kind in "iu":
        numbers = np.where(values == np.iinfo(values.dtype).max, -1, values.astype(np.int64))
    return numbers.astype(np.int64)


# ------------------------------------------------------------------------------------------ headers


def _headers(path: Path) -> Headers:
    if path.suffix.lower() == ".npz":
        return npz_headers(path)
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            return {"points": _npy_header(file)}
    found: Headers = {}
    wanted = {"mask"}.union(*_NAMES.values())
    with module("h5py").File(path, "r") as file:
        for name in file:  # by its links: others than the wanted ones are not opened
            data = _dataset(file, name) if name in wanted else None
            found[name] = ((), np.dtype("V")) if data is None else (data.shape, data.dtype)
    return found


def npz_headers(path: Path) -> Headers:
    """Shape and type of every array of an NPZ.

    Raises ReadError where one claims more than its member holds.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                continue
            name = member.filename[:-4]
            with archive.open(member.filename) as file:
                found[name] = header = _npy_header(file)
                if not header[1].hasobject and file.tell() + _bytes(header) > member.file_size:
                    claim = f"the header of {name} claims {_bytes(header):,} bytes"
                    raise ReadError(f"truncated or damaged: {claim}")
    return found


def _bytes(header: tuple[tuple[int, ...], np.dtype]) -> int:
    """What an array of this shape and type needs, however much that is."""
    return math.prod(header[0]) * header[1].itemsize


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    old = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape, _, kind = read(file)
    return shape, kind


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """These arrays of an NPZ, bounded before they are inflated.

    Raises ReadError, and what numpy raises.
    """
    headers, names = npz_headers(path), list(names)
    for name in names:
        if headers[name][1].hasobject:
            danger = "which could run anything and are not read"
            raise ReadError(f"{name} holds Python objects, {danger}")
    check_inflated(path, sum(_bytes(headers[name]) for name in names))
    with np.load(path, allow_pickle=False) as archive:
        return {name: np.asarray(archive[name]) for name in names}


def check_inflated(path: Path, claimed: int) -> None:
    """ReadError for a compressed file that would fill the memory.

    That is one of over 256 MiB and of 50 times the file's size.
    """
    size = path.stat().st_size
    if claimed > max(2**28, 50 * size):
        claim = f"{size:,} bytes that claim to hold {claimed:,}"
        raise ReadError(f"refused: {claim}; save it again without compression")


def _dataset(file: Any, name: str) -> Any:
    """The data set at a name. ReadError for one that lies, or whose values lie, in another file."""
    h5py, place, left, steps = module("h5py"), file, [name], 0
    while left:
        step, steps = left.pop(0), steps + 1
        link = place.get(step, getlink=True)
        if isinstance(link, h5py.ExternalLink) or link is None or steps > 20:
            where = "to another file, to nothing or in a circle"
            raise ReadError(f"{name} is a link {where}, which is not followed")
        if isinstance(link, h5py.SoftLink):
            place = file if link.path.startswith("/") else place
            left = [part for part in link.path.split("/") if part not in ("", ".")] + left
        else:
            place = place[step]
    if not isinstance(place, h5py.Dataset):
        raise ReadError(f"{name} is a group, not an array")
    if place.external or place.is_virtual:
        raise ReadError(f"{name} has its values in other files, which are not read")
    return place


# --------------------------------------------------------------------------------- by what they are


def _known(headers: Headers) -> dict[str, str]:
    """The names of the arrays that are read, by what they are. Raises ReadError.

    An array label of a number a point [n, N] holds parts, not classes.
    """
    found = {key: next((n for n in known if n in headers), None) for key, known in _NAMES.items()}
    if found["points"] is None:
        have = ", ".join(map(str, headers)) or "none"
        raise ReadError(f"has no array named {', '.join(_NAMES['points'])}; it has {have}")
    shape, label = headers[found["points"]][0], found["label"]
    if label:
        size = headers[label][0]
        if size in (shape[:-1], (*shape[:-1], 1)):
            found |= {"label": None, "parts": found["parts"] or label}
        elif len(shape) == 3 and size not in (shape[:1], (shape[0], 1)):
            n, points = shape[:2]
            allowed = f"[{n}] or [{n}, 1] for classes, [{n}, {points}] for part labels"
            raise ReadError(f"{label} has shape {list(size)}; it must be {allowed}")
    return {key: name for key, name in found.items() if name}


@lru_cache(maxsize=4)
def _array_shapes(path: Path, changed: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a file, by what they are."""
    headers = _headers(path)
    return {key: headers[name][0] for key, name in _known(headers).items()}


@lru_cache(maxsize=2)
def array_block(path: Path, block: int | None, changed: int) -> dict[str, np.ndarray]:
    """Rows [256 * block, 256 * (block + 1)) of a file's arrays, by what they are;

    None, or an NPZ, reads them whole.
    """
    rows = slice(None) if block is None else slice(block * _BLOCK, (block + 1) * _BLOCK)
    headers = _headers(path)
    return _read(path, _known(headers) | ({"mask": "mask"} if "mask" in headers else {}), rows)


def _read(path: Path, names: dict[str, str], rows: slice) -> dict[str, np.ndarray]:
    """The arrays of these names, and of all but an NPZ these rows."""
    if path.suffix.lower() == ".npy":
        return {key: np.load(path, allow_pickle=False, mmap_mode="r")[rows] for key in names}
    if path.suffix.lower() == ".npz":
        arrays = read_npz(path, set(names.values()))
        return {key: arrays[name] for key, name in names.items()}
    h5py = module("h5py")
    with h5py.File(path, "r") as file:
        found = {}
        for key, name in names.items():
            data = _dataset(file, name)
            if data.dtype.hasobject:
                # texts as h5py writes them by default, whose bytes are within the file's
                if h5py.check_string_dtype(data.dtype) is None:
                    raise ReadError(f"{name} holds objects of any length, not numbers")
                found[key] = data.asstr()[rows].astype(str)
                continue
            check_claim(path, data.nbytes, 1100)  # gzip's best is 1032
            share = len(range(*rows.indices(len(data)))) / max(1, len(data))
            check_inflated(
                path, max(int(data.nbytes * share), _bytes((data.chunks or (), data.dtype)))
            )
            found[key] = data[rows]
        return found


def array_rows(path: Path, row: int) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of the block that holds a row, and the row's place there. Raises ReadError."""
    block, at = divmod(row, _BLOCK) if path.suffix.lower() != ".npz" else (None, row)
    arrays = array_block(path, block, path.stat().st_mtime_ns)
    counts = {key: len(values) for key, values in arrays.items()}
    if len(set(counts.values())) > 1:
        lengths = ", ".join(f"{key} {n}" for key, n in counts.items())
        raise ReadError(f"arrays of different lengths: {lengths}")
    if at >= len(arrays["points"]):
        raise ReadError(f"has no cloud {row}")
    return arrays, at


def read_array(path: Path, row: int | None) -> PointCloud:
    """A file that is one cloud, or the cloud at `row` of a file of many. Raises ReadError."""
    shape = _array_shapes(path, path.stat().st_mtime_ns)["points"]
    if len(shape) != 3:
        arrays = array_block(path, None, path.stat().st_mtime_ns)
    elif row is None:
        raise ReadError(f"expected an array of points [n, 3], found {list(shape)}: many clouds")
    else:
        arrays, at = array_rows(path, row)
        arrays = {key: values[at] for key, values in arrays.items()}
    points, attributes = arrays["points"], {}
    normals, parts = arrays.get("normals"), arrays.get("parts")
    if normals is not None and points.ndim == 2 and normals.shape == points.shape:
        attributes["normals"] = normals.astype(np.float32)
    if parts is not None and parts.shape in (points.shape[:1], (*points.shape[:1], 1)):
        attributes["parts"] = parts.reshape(-1)
    return PointCloud.make(points, **attributes)


def npy_rows(path: Path, size: int, attributes: bool) -> Iterator[np.ndarray]:
    """Chunks of the points of an NPY, float64 n 3, at most `size` at once. Raises ReadError."""
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if values.ndim != 2 or values.shape[1] < 3 or values.dtype.kind not in "fiu":
        raise ReadError(f"expected an array of points [n, 3], found {_described(values)}")
    for at in range(0, len(values), size):
        # opened again, else all pages that were read once count as memory of this process
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        yield values[at : at + size, :3].astype(np.float64)
