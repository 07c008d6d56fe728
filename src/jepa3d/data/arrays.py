"""Read array files (NPY, NPZ, HDF5) that hold one cloud, or many clouds with labels and names.

The header of an array states its shape and type. The size that follows from them is checked before
an array of an NPZ or HDF5 file is unpacked.
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
# The clouds of an NPY or HDF5 file are read in blocks of this many clouds. The two blocks that were
# read last are cached (`array_block`), so a compressed file is not unpacked again for each cloud.
_BLOCK = 256
# Limit on what a damaged or malicious file can unpack to: 50 times the file's size, or 256 MiB if
# that is more. For an NPZ, the limit is on all arrays together that are read. For an HDF5 file, it
# is on the rows of an array that are read at a time (or on one chunk, if that is larger).
_UNPACK_LIMIT = 50, 1 << 28
# largest number of characters of a label or name in an HDF5 file; `_read_texts` says why there is a
# limit
_MAX_TEXT = 1000
# meaning -> names that an array with this meaning may have; if several are present, the first of
# these names is used
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
    """Return the number of clouds in an array file of points [n, N, 3].

    Returns None if the file is a single cloud [N, 3], or no array file. Raises ReadError.
    """
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        return None
    with as_read_error(path):
        return _count(path, path.stat().st_mtime_ns)


def facts_in(path: Path, labels_key: str = "labels", *more: str) -> dict[str, Any]:
    """Read labels, split and names from an array file; returns a dict of what the file has.

    labels_key: name of the labels array; the default "labels" stands for any of the names in
    `_NAMES["label"]`. more: further arrays to return, "points" or "parts". Raises ReadError, also
    if labels_key is another name than "labels" and no array has this name. Apart from the names in
    `more`, the keys of the dict are:

    - label: array [n] int64 for n clouds; -1 means no label
    - class_names: texts; () if the file has labels but does not name the classes. Labels that are
      texts are themselves the names of the classes. If the labels are numbers, only an NPZ can name
      the classes: in the array class_names for the default labels_key, and in X_names if labels_key
      is labels_X or X.
    - split: array [n] of integers, indices into SPLITS
    - names: texts, normally one per cloud (NPZ only)
    - part_names: texts (NPZ only)
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
                wrong = _found(split)
                raise ReadError(f"array split must have {count} integers, {wrong}")
            if len(wrong := split[~np.isin(split, range(len(SPLITS)))]):
                raise ReadError(f"values of array split must be 0, 1 or 2, found {wrong[0]}")
        return found


def _found(values: np.ndarray) -> str:
    return f"found {values.dtype} {list(values.shape)}"


def _classes(values: np.ndarray, names: Names) -> tuple[np.ndarray, Names]:
    """Convert the labels [n] to int64, and also return the class names.

    values: the labels as texts, or as numbers from 0. names: the class names in the file, () if
    there are none. Negative numbers, NaN and the largest value of an integer type become -1 (no
    label). Raises ReadError for labels that are neither whole numbers nor texts, and for a label
    that has no name although `names` is given.
    """
    if values.dtype.kind in "US":
        texts, labels = np.unique(values, return_inverse=True)
        return labels, tuple(map(_text, texts))
    numbers = np.nan_to_num(values, nan=-1) if values.dtype.kind == "f" else values
    if values.dtype.kind not in "iuf" or (numbers != np.floor(numbers)).any():
        raise ReadError(f"labels must be whole numbers or names, {_found(values)}")
    labels = numbers.astype(np.int64)
    if values.dtype.kind in "iu":
        labels[values == np.iinfo(values.dtype).max] = -1
    if names and (largest := labels.max(initial=-1)) >= len(names):
        named = f"only {len(names)} classes are named"
        raise ReadError(f"label {largest} has no class name; {named}")
    return labels.clip(-1), names


def _text(name: object) -> str:
    """Convert a name from a file (text, or bytes from HDF5) to printable text on one line."""
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
        # Iterating over a file gives names only. Arrays without a known name are not opened, so
        # their shape and type stay unknown. They are listed, since an error message may list all
        # names.
        for name in file:
            found[name] = (), np.dtype("V")
            if name in wanted:
                data = _dataset(file, name)
                found[name] = data.shape, data.dtype
    return found


def npz_headers(path: Path) -> Headers:
    """Read the shape and type of every array in an NPZ.

    Raises ReadError if a header claims more bytes than the file has for this array. For other
    damage, an error of numpy or zipfile is raised.
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
                    raise ReadError(f"truncated: array {name} claims {claimed:,} bytes")
    return found


def _bytes(header: tuple[tuple[int, ...], np.dtype]) -> int:
    """Return the size in bytes of an array with this shape and type.

    The size is a Python int, since a damaged header may claim more than an int64 can hold.
    """
    return math.prod(header[0]) * header[1].itemsize


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = 1 if np.lib.format.read_magic(file) == (1, 0) else 2
    read = getattr(np.lib.format, f"read_array_header_{version}_0")
    shape, _, kind = read(file)
    return shape, kind


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read the named arrays of an NPZ after checking their unpacked size.

    Raises ReadError if the arrays are too large or cut off, or hold Python objects. For other
    damage, an error of numpy or zipfile is raised.
    """
    headers, names = npz_headers(path), list(names)
    for name in names:
        if headers[name][1].hasobject:
            raise ReadError(f"{name} holds Python objects, which are not read")
    check_unpacked(path, sum(_bytes(headers[name]) for name in names), *_UNPACK_LIMIT)
    with np.load(path, allow_pickle=False) as archive:
        return {name: np.asarray(archive[name]) for name in names}


def _dataset(file: Any, name: str) -> Any:
    """Return the HDF5 dataset called `name`, following links inside the file.

    Raises ReadError if `name` leads to another file, to a group or to nothing, if the links form a
    circle, or if the values of the dataset lie in other files.
    """
    h5py, node, path, steps = io_module("h5py"), file, [name], 0
    while path:
        step, steps = path.pop(0), steps + 1
        link = node.get(step, getlink=True)
        if isinstance(link, h5py.ExternalLink) or link is None or steps > 20:
            raise ReadError(f"{name} links to another file, to nothing or in a circle")
        if isinstance(link, h5py.SoftLink):
            node = file if link.path.startswith("/") else node
            target = link.path.split("/")
            path = [step for step in target if step not in ("", ".")] + path
        else:
            node = node[step]
    if not isinstance(node, h5py.Dataset):
        raise ReadError(f"{name} is a group; an array is needed")
    if node.external or node.is_virtual:
        raise ReadError(f"{name} has its values in other files, which are not read")
    return node


# -------------------------------------------------------------------------------------- by meaning


def _known(headers: Headers, labels_key: str = "labels") -> dict[str, str]:
    """Return a dict from meaning (see `_NAMES`) to the name of the array to read.

    labels_key: name of the labels array; the default "labels" stands for any of the names in
    `_NAMES["label"]`. If this array has one label per point, it is read as part labels. Raises
    ReadError if there is no array of points, if labels_key is another name than "labels" and no
    array has this name, or if the shape of the labels does not fit the points.
    """
    wanted, found = _NAMES, {}
    if labels_key != "labels":
        if labels_key not in headers:
            labels = [name for name in headers if name.startswith("label")]
            have = ", ".join(labels) or "none"
            raise ReadError(f"has no array {labels_key!r}; arrays of labels: {have}")
        wanted = _NAMES | {"label": (labels_key,)}
    for key, names in wanted.items():
        if name := next((name for name in names if name in headers), None):
            found[key] = name
    if "points" not in found:
        have = ", ".join(map(str, headers)) or "none"
        raise ReadError(f"has no array named data, points or xyz; it has {have}")
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
def _count(path: Path, mtime: int) -> int | None:
    """Return the number of clouds in a file; None if it is a single cloud.

    mtime: modification time of the file, so that the cache is not used after the file has changed.
    """
    headers = _headers(path)
    shape, _ = headers[_known(headers)["points"]]
    return shape[0] if len(shape) == 3 else None


@lru_cache(maxsize=2)
def array_block(path: Path, block: int | None, mtime: int) -> dict[str, np.ndarray]:
    """Read `_BLOCK` rows of each array of known meaning in a file; returns a dict keyed by meaning.

    block: index of the block; None reads all rows. An NPZ is always read whole. mtime: modification
    time of the file, so that the cache is not used after the file has changed.
    """
    rows = slice(None) if block is None else slice(block * _BLOCK, (block + 1) * _BLOCK)
    return _read(path, _known(_headers(path)), rows)


def _read(path: Path, names: dict[str, str], rows: slice) -> dict[str, np.ndarray]:
    """Read some rows of the named arrays; returns a dict keyed by meaning.

    names: meaning -> name of the array. An NPZ is always read whole, whatever `rows` says.
    """
    if path.suffix.lower() == ".npy":
        values = np.load(path, allow_pickle=False, mmap_mode="r")[rows]
        return dict.fromkeys(names, values)
    if path.suffix.lower() == ".npz":
        arrays = read_npz(path, set(names.values()))
        return {key: arrays[name] for key, name in names.items()}
    with io_module("h5py").File(path, "r") as file:
        found = {}
        for key, name in names.items():
            data = _dataset(file, name)
            if data.dtype.hasobject:
                found[key] = _read_texts(data, name, rows)
                continue
            # gzip compresses by a factor of at most 1032; a header that claims more than 1100 times
            # the size of the file is damaged
            check_claim(path, data.nbytes, 1100)
            share = len(range(*rows.indices(len(data)))) / max(1, len(data))
            chunk = _bytes((data.chunks or (), data.dtype))
            check_unpacked(path, max(int(data.nbytes * share), chunk), *_UNPACK_LIMIT)
            found[key] = data[rows]
        return found


def _read_texts(data: Any, name: str, rows: slice) -> np.ndarray:
    """Read some rows of an HDF5 dataset of strings of variable length.

    HDF5 never compresses such strings, so their size needs no check. Raises ReadError for values of
    another type, and for a text of over `_MAX_TEXT` characters: a numpy array of texts has room for
    the longest text in every cell, so a single long text would make it huge.
    """
    if io_module("h5py").check_string_dtype(data.dtype) is None:
        raise ReadError(f"{name} holds values of varying length, not numbers")
    texts = data.asstr()[rows]
    if max(map(len, texts.flat), default=0) > _MAX_TEXT:
        raise ReadError(f"{name} holds a text of over {_MAX_TEXT:,} characters")
    return texts.astype(str)


def read_array(path: Path, row: int | None) -> PointCloud:
    """Read a file that is one cloud, or the cloud at `row` of a file of many clouds.

    Normals and part labels are left out if their shape does not fit the points. Raises ReadError.
    Some damage raises an error of numpy, zipfile or h5py; `io.py::read` turns it into a ReadError.
    """
    mtime = path.stat().st_mtime_ns
    count = _count(path, mtime)
    if row is not None and row >= (count or 0):
        held = "one cloud" if count is None else f"{count:,} clouds"
        raise ReadError(f"holds {held}, but no cloud #{row}")
    if count is None:
        arrays = array_block(path, None, mtime)
    elif row is None:
        raise ReadError(f"holds {count:,} clouds: choose one cloud as PATH#ROW")
    else:
        whole = path.suffix.lower() == ".npz"
        block, at = (None, row) if whole else divmod(row, _BLOCK)
        arrays = array_block(path, block, mtime)
        lengths = {key: len(values) for key, values in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ReadError(f"arrays must have one row per cloud; their rows: {lengths}")
        arrays = {key: values[at] for key, values in arrays.items()}
    points, attributes = arrays["points"], {}
    normals, parts = arrays.get("normals"), arrays.get("parts")
    if normals is not None and points.ndim == 2 and normals.shape == points.shape:
        attributes["normals"] = normals.astype(np.float32)
    if parts is not None and parts.shape in (points.shape[:1], (*points.shape[:1], 1)):
        attributes["parts"] = parts.reshape(-1)
    return PointCloud.make(points, **attributes)


def npy_rows(path: Path) -> Iterator[np.ndarray]:
    """Yield the points of an NPY in chunks, arrays [n, 3] float64.

    Raises ReadError if the array cannot be an array of points, and numpy's ValueError for a damaged
    file.
    """
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    check_shape(values)
    for at in range(0, len(values), clouds.CHUNK):
        # map the file again for each chunk; otherwise all pages read so far would count as memory
        # of this process
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        yield values[at : at + clouds.CHUNK, :3].astype(np.float64)
