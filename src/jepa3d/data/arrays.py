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
from jepa3d.data.errors import as_read_error, check_claim, check_unpacked, io_module
from jepa3d.data.store import SPLITS
from jepa3d.plain import printable

ARRAY_SUFFIXES = (".npy", ".npz", ".h5", ".hdf5")
_BLOCK = 256  # clouds read at once
_MOST = 50, 1 << 28  # see `check_unpacked`
_NAMES = {
    "points": ("data", "points", "xyz"),
    "label": ("label", "labels"),
    "normals": ("normal", "normals"),
    "parts": ("pid", "seg", "parts", "mask"),
    "split": ("split",),
}
Names = tuple[str, ...]
Headers = dict[str, tuple[tuple[int, ...], np.dtype]]  # name -> shape and type


def clouds_in(path: Path) -> int | None:
    """The number of clouds in an array file; None for a file that is one cloud. Raises ReadError."""
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        return None
    with as_read_error(path):
        shape = _shape(path, path.stat().st_mtime_ns)
        return shape[0] if len(shape) == 3 else None


def facts_in(path: Path, labels_key: str = "labels", *more: str) -> dict[str, Any]:
    """What an array file says of its clouds, by meaning; only what it has.

    label: n int64, -1 for none. class_names: their names; without any, labels are numbers. split: n
    integers, indices of SPLITS. names: n texts. part_names: texts. labels_key: the array of the
    labels. more: other arrays to read, points or parts. Raises ReadError.
    """
    with as_read_error(path):
        headers = _headers(path)
        known = _known(headers, labels_key)
        count = headers[known["points"]][0][0]
        arrays = {key: known[key] for key in ("label", "split", *more) if key in known}
        if path.suffix.lower() == ".npz":
            classes = labels_key.removeprefix("labels").strip("_") or "class"
            lists = {"class_names": f"{classes}_names"}
            lists |= {name: name for name in ("names", "part_names")}
            arrays |= {key: name for key, name in lists.items() if name in headers}
        found: dict[str, Any] = _read(path, arrays, slice(None))
        for key in found.keys() & {"class_names", "names", "part_names"}:
            found[key] = tuple(map(_text, found[key]))
        if "label" in found:
            names, values = found.get("class_names", ()), found["label"].reshape(count)
            found["label"], found["class_names"] = _classes(values, names)
        if (split := found.get("split")) is not None:
            if split.shape != (count,) or split.dtype.kind not in "iu":
                raise ReadError(f"split must be {count} integers: {_described(split)}")
            if len(wrong := split[~np.isin(split, range(len(SPLITS)))]):
                raise ReadError(f"split must be 0, 1 or 2, found {wrong[0]}")
        return found


def _described(values: np.ndarray) -> str:
    return f"{values.dtype} {list(values.shape)}"


def _classes(values: np.ndarray, names: Names) -> tuple[np.ndarray, Names]:
    """Labels n as int64 and the names of their classes. They are texts, or numbers from 0.

    -1 for numbers below 0, NaN, and the largest value of an integer type. Raises ReadError.
    """
    if values.dtype.kind in "US":
        texts, labels = np.unique(values, return_inverse=True)
        return labels, tuple(map(_text, texts))
    numbers = np.nan_to_num(values, nan=-1) if values.dtype.kind == "f" else values
    if values.dtype.kind not in "iuf" or (numbers != np.floor(numbers)).any():
        found = f"found {_described(values)}"
        raise ReadError(f"labels must be whole numbers or names, {found}")
    labels = numbers.astype(np.int64)
    if values.dtype.kind in "iu":
        labels[values == np.iinfo(values.dtype).max] = -1
    if names and (largest := labels.max(initial=-1)) >= len(names):
        raise ReadError(f"label {largest} without class: {len(names)} have names")
    return labels.clip(-1), names


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
    wanted = set().union(*_NAMES.values())
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
                    raise ReadError(f"truncated: {name} claims {claimed:,} bytes")
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
    check_unpacked(path, sum(_bytes(headers[name]) for name in names), *_MOST)
    with np.load(path, allow_pickle=False) as archive:
        return {name: np.asarray(archive[name]) for name in names}


def _dataset(file: Any, name: str) -> Any:
    """The data set of a name. Raises ReadError if it, or its values, lie in another file."""
    h5py, place, left, steps = io_module("h5py"), file, [name], 0
    while left:
        step, steps = left.pop(0), steps + 1
        link = place.get(step, getlink=True)
        if isinstance(link, h5py.ExternalLink) or link is None or steps > 20:
            raise ReadError(f"{name} links to another file, to nothing or in a circle")
        if isinstance(link, h5py.SoftLink):
            place = file if link.path.startswith("/") else place
            path = link.path.split("/")
            left = [part for part in path if part not in ("", ".")] + left
        else:
            place = place[step]
    if not isinstance(place, h5py.Dataset):
        raise ReadError(f"{name} is a group; an array is needed")
    if place.external or place.is_virtual:
        raise ReadError(f"{name} has its values in other files, which are not read")
    return place


# -------------------------------------------------------------------------------------- by meaning


def _known(headers: Headers, labels_key: str = "labels") -> dict[str, str]:
    """Names of the arrays to read, by their meaning (see `_NAMES`). Raises ReadError.

    labels_key: the array of the labels. One with a number for each point, [n, N], is taken as
    parts.
    """
    wanted, found = _NAMES, {}
    if labels_key != "labels":
        if labels_key not in headers:
            have = ", ".join(name for name in headers if name.startswith("label"))
            raise ReadError(f"has no labels {labels_key!r}, but {have or 'none'}")
        wanted = _NAMES | {"label": (labels_key,)}
    for key, names in wanted.items():
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
def _shape(path: Path, changed: int) -> tuple[int, ...]:
    """The shape of the points of a file."""
    headers = _headers(path)
    return headers[_known(headers)["points"]][0]


@lru_cache(maxsize=2)
def array_block(path: Path, block: int | None, changed: int) -> dict[str, np.ndarray]:
    """Rows [256 * block, 256 * (block + 1)) of a file's arrays, by their meaning.

    All rows if block is None, and always all of an NPZ.
    """
    rows = slice(None) if block is None else slice(block * _BLOCK, (block + 1) * _BLOCK)
    return _read(path, _known(_headers(path)), rows)


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
            check_unpacked(path, max(int(data.nbytes * share), chunk), *_MOST)
            found[key] = data[rows]
        return found


def read_array(path: Path, row: int | None) -> PointCloud:
    """A file that is one cloud, or the cloud at `row` of a file of many. Raises ReadError."""
    changed, count = path.stat().st_mtime_ns, clouds_in(path)
    if count is None:
        arrays = array_block(path, None, changed)
    elif row is None:
        raise ReadError(f"holds {count:,} clouds; PATH#ROW names one")
    else:
        whole = path.suffix.lower() == ".npz"
        block, at = (None, row) if whole else divmod(row, _BLOCK)
        arrays = array_block(path, block, changed)
        lengths = {key: len(values) for key, values in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ReadError(f"its arrays must have as many rows as clouds: {lengths}")
        arrays = {key: values[at] for key, values in arrays.items()}
    points, attributes = arrays["points"], {}
    normals, parts = arrays.get("normals"), arrays.get("parts")
    if normals is not None and points.ndim == 2 and normals.shape == points.shape:
        attributes["normals"] = normals.astype(np.float32)
    if parts is not None and parts.shape in (points.shape[:1], (*points.shape[:1], 1)):
        attributes["parts"] = parts.reshape(-1)
    return PointCloud.make(points, **attributes)


def npy_rows(path: Path) -> Iterator[np.ndarray]:
    """Chunks of the points of an NPY, float64 n 3. Raises ReadError."""
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    check_shape(values)
    for at in range(0, len(values), clouds.CHUNK):
        # opened again for each chunk, or all pages read so far would count as our memory
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        yield values[at : at + clouds.CHUNK, :3].astype(np.float64)
