"""Files of arrays (NPY, NPZ, HDF5): one cloud, or many clouds with labels and names.

The shapes and types in the headers are checked before anything is unpacked.
"""

import math
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from jepa3d.data import cloud as clouds
from jepa3d.data.cloud import PointCloud, ReadError, check_shape
from jepa3d.data.errors import as_read_error, check_claim, io_module, printable
from jepa3d.data.store import SPLITS

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
    """The number of clouds in an array file; None for a file that is one cloud. Raises ReadError."""
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        return None
    with as_read_error(path):
        shapes = _array_shapes(path, path.stat().st_mtime_ns)
        return shapes["points"][0] if len(shapes["points"]) == 3 else None


def facts_in(path: Path) -> dict[str, list]:
    """Labels, splits and names of the clouds in an array file, each a list of texts or None.

    Only those that the file has. Raises ReadError.
    """
    with as_read_error(path):
        headers = _headers(path)
        arrays = {key: name for key, name in _known(headers).items() if key in _FACTS}
        if path.suffix.lower() == ".npz":
            arrays |= {name: name for name in _FACTS[2:] if name in headers}
        count, facts, found = clouds_in(path), _read(path, arrays, slice(None)), {}
        for key, values in facts.items():
            facts[key] = values[:, 0] if values.shape == (len(values), 1) else values
        if "label" in facts:
            names = [_text(name) for name in facts.get("class_names", ())]
            found["label"] = _classes(facts["label"], names, arrays["label"])
        if (split := facts.get("split")) is not None:
            if split.shape != (count,) or split.dtype.kind not in "iu":
                raise ReadError(f"split must be {count} integers: {_described(split)}")
            if not np.isin(split, range(len(SPLITS))).all():
                raise ReadError(f"split must be 0, 1 or 2, found {split.max()}")
            found["split"] = [SPLITS[number] for number in split.tolist()]
        if len(names := facts.get("names", ())) == count:
            found["names"] = [_text(name) for name in names]
        return found


def _described(values: np.ndarray) -> str:
    return f"{values.dtype} {list(values.shape)}"


def _classes(values: np.ndarray, names: list[str], array: str) -> list[str | None]:
    """The name of the class of each label. Labels are texts, or numbers that index `names`.

    None for numbers below 0, NaN, and the largest value of an integer type. Raises ReadError.
    """
    if values.dtype.kind in "US":
        return [_text(value) for value in values]
    numbers = np.nan_to_num(values, nan=-1) if values.dtype.kind == "f" else values
    if values.dtype.kind not in "iuf" or (numbers != np.floor(numbers)).any():
        found = f"found {_described(values)}"
        raise ReadError(f"{array} must be whole numbers or names, {found}")
    numbers = numbers.astype(np.int64)
    if values.dtype.kind in "iu":
        numbers[values == np.iinfo(values.dtype).max] = -1
    if names and (largest := numbers.max(initial=-1)) >= len(names):
        raise ReadError(f"label {largest} without class: there are {len(names)} names")
    return [None if n < 0 else names[n] if names else str(n) for n in numbers.tolist()]


def _text(name: object) -> str:
    """A name from a file, which HDF5 may give as bytes, printable on one line."""
    if isinstance(name, bytes):
        name = name.decode("utf-8", "surrogateescape")
    return printable(str(name))


# ------------------------------------------------------------------------------------------ headers


def _headers(path: Path) -> Headers:
    if path.suffix.lower() == ".npz":
        return npz_headers(path)
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            return {"points": _npy_header(file)}
    found: Headers = {}
    wanted = {"mask"}.union(*_NAMES.values())
    with io_module("h5py").File(path, "r") as file:
        for name in file:  # lists names only; other arrays are not opened
            found[name] = (), np.dtype("V")
            if name in wanted:
                data = _dataset(file, name)
                found[name] = data.shape, data.dtype
    return found


def npz_headers(path: Path) -> Headers:
    """Shape and type of every array of an NPZ.

    Raises ReadError if a header claims more bytes than its member has.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                continue
            name = member.filename[:-4]
            with archive.open(member.filename) as file:
                found[name] = header = _npy_header(file)
                claimed = 0 if header[1].hasobject else _bytes(header)
                if file.tell() + claimed > member.file_size:
                    raise ReadError(f"truncated: the header of {name} claims {claimed:,} bytes")
    return found


def _bytes(header: tuple[tuple[int, ...], np.dtype]) -> int:
    """The bytes that an array of this shape and type takes, without overflow."""
    return math.prod(header[0]) * header[1].itemsize


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = 1 if np.lib.format.read_magic(file) == (1, 0) else 2
    read = getattr(np.lib.format, f"read_array_header_{version}_0")
    shape, _, kind = read(file)
    return shape, kind


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """These arrays of an NPZ, whose size is checked first. Raises ReadError, and what numpy raises."""
    headers, names = npz_headers(path), list(names)
    for name in names:
        if headers[name][1].hasobject:
            raise ReadError(f"{name} holds Python objects, which are not read")
    check_inflated(path, sum(_bytes(headers[name]) for name in names))
    with np.load(path, allow_pickle=False) as archive:
        return {name: np.asarray(archive[name]) for name in names}


def check_inflated(path: Path, claimed: int) -> None:
    """Raises ReadError for a file that claims over 256 MiB and over 50 times its own size."""
    size = path.stat().st_size
    if claimed > max(2**28, 50 * size):
        raise ReadError(
            f"refused: {claimed:,} bytes in a file of {size:,}; save it without compression"
        )


def _dataset(file: Any, name: str) -> Any:
    """The data set of a name. Raises ReadError if it, or its values, lie in another file."""
    h5py, place, left, steps = io_module("h5py"), file, [name], 0
    while left:
        step, steps = left.pop(0), steps + 1
        link = place.get(step, getlink=True)
        if isinstance(link, h5py.ExternalLink) or link is None or steps > 20:
            raise ReadError(f"{name} is a link to another file, to nothing or a circle")
        if isinstance(link, h5py.SoftLink):
            place = file if link.path.startswith("/") else place
            path = [part for part in link.path.split("/") if part not in ("", ".")]
            left = path + left
        else:
            place = place[step]
    if not isinstance(place, h5py.Dataset):
        raise ReadError(f"{name} is a group, not an array")
    if place.external or place.is_virtual:
        raise ReadError(f"{name} has its values in other files, which are not read")
    return place


# -------------------------------------------------------------------------------------- by meaning


def _known(headers: Headers) -> dict[str, str]:
    """Names of the arrays to read, by their meaning (see `_NAMES`). Raises ReadError.

    An array label with a number for each point, [n, N], is taken as parts.
    """
    found: dict[str, str] = {}
    for key, names in _NAMES.items():
        if name := next((name for name in names if name in headers), None):
            found[key] = name
    if "points" not in found:
        have, wanted = map(", ".join, (map(str, headers), _NAMES["points"]))
        raise ReadError(f"has no array named {wanted}; it has {have or 'none'}")
    shape, label = headers[found["points"]][0], found.get("label")
    if label:
        size = headers[label][0]
        if size in (shape[:-1], (*shape[:-1], 1)):
            found = {"parts": found.pop("label")} | found
        elif len(shape) == 3 and size not in (shape[:1], (shape[0], 1)):
            n, points = shape[:2]
            allowed = f"[{n}] or [{n}, 1] for classes, [{n}, {points}] for part labels"
            raise ReadError(f"{label} has shape {list(size)}; it must be {allowed}")
    return found


@lru_cache(maxsize=4)
def _array_shapes(path: Path, changed: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a file, by their meaning."""
    headers = _headers(path)
    return {key: headers[name][0] for key, name in _known(headers).items()}


@lru_cache(maxsize=2)
def array_block(path: Path, block: int | None, changed: int) -> dict[str, np.ndarray]:
    """Rows [256 * block, 256 * (block + 1)) of a file's arrays, by their meaning.

    All rows if block is None, and always all of an NPZ.
    """
    rows = slice(None) if block is None else slice(block * _BLOCK, (block + 1) * _BLOCK)
    headers = _headers(path)
    names = _known(headers)
    if "mask" in headers:
        names["mask"] = "mask"
    return _read(path, names, rows)


def _read(path: Path, names: dict[str, str], rows: slice) -> dict[str, np.ndarray]:
    """The arrays of these names; only these rows, except of an NPZ, which is read whole."""
    if path.suffix.lower() == ".npy":
        values = np.load(path, allow_pickle=False, mmap_mode="r")[rows]
        return dict.fromkeys(names, values)
    if path.suffix.lower() == ".npz":
        arrays = read_npz(path, set(names.values()))
        return {key: arrays[name] for key, name in names.items()}
    h5py = io_module("h5py")
    with h5py.File(path, "r") as file:
        found = {}
        for key, name in names.items():
            data = _dataset(file, name)
            if data.dtype.hasobject:
                # texts, whose bytes lie in the file: no size to check
                if h5py.check_string_dtype(data.dtype) is None:
                    raise ReadError(f"{name} holds objects of any length, not numbers")
                found[key] = data.asstr()[rows].astype(str)
                continue
            check_claim(path, data.nbytes, 1100)  # gzip packs at most 1032 times
            share = len(range(*rows.indices(len(data)))) / max(1, len(data))
            chunk = _bytes((data.chunks or (), data.dtype))
            check_inflated(path, max(int(data.nbytes * share), chunk))
            found[key] = data[rows]
        return found


def array_rows(path: Path, row: int) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of the block with this row, and the row's index in them. Raises ReadError."""
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
        raise ReadError(f"expected points [n, 3], found {list(shape)}: many clouds")
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


def npy_rows(path: Path, attributes: bool) -> Iterator[np.ndarray]:
    """Chunks of the points of an NPY, float64 n 3. Raises ReadError."""
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    check_shape(values)
    for at in range(0, len(values), clouds.CHUNK):
        # opened again for each chunk, or all pages read so far would count as our memory
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        yield values[at : at + clouds.CHUNK, :3].astype(np.float64)
