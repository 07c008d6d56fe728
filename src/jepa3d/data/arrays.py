"""Files of arrays, NPY, NPZ and HDF5: one cloud, or many with what is known of each.

Shapes and types are read first, from the headers, and what they claim is bounded before anything is
inflated.
"""

import zipfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from jepa3d.data.boundary import boundary, check_claim, module
from jepa3d.data.cloud import UNLABELLED, PointCloud, ReadError, to_parts

NO_PARTS = "has no part labels; give a store of jepa3d prepare --keep parts, a .npz with seg or parts, or such files"
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
    """What an array file of many clouds says of each: label and split [n], names, and class_names;
    those it has.
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
                raise ReadError(
                    f"split must be {count} whole numbers, found {values.dtype} {list(values.shape)}"
                )
            if key == "label":
                facts[key] = _classes(values, names[key])
        return facts


def _classes(values: np.ndarray, name: str) -> np.ndarray:
    """Labels n as texts, or as int64 with -1 for NaN and the largest value of an integer type.

    Raises ReadError.
    """
    if values.dtype.kind in "US":
        return values
    whole = np.nan_to_num(values, nan=-1) if values.dtype.kind == "f" else values
    if values.dtype.kind not in "iuf" or (whole != np.floor(whole)).any():
        raise ReadError(
            f"{name} must be whole numbers or names, found {values.dtype} {list(values.shape)}"
        )
    if values.dtype.kind in "iu":
        whole = np.where(values == np.iinfo(values.dtype).max, -1, values.astype(np.int64))
    return whole.astype(np.int64)


# ------------------------------------------------------------------------------------------ headers


def _headers(path: Path) -> Headers:
    if path.suffix.lower() == ".npz":
        return npz_headers(path)
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            return {"points": _npy_header(file)}
    with module("h5py").File(path, "r") as file:
        wanted = {name for names in _NAMES.values() for name in names} | {"mask"}
        found = {
            name: _dataset(file, name) if name in wanted else None for name in file
        }  # by its links: none is opened
        return {
            name: ((), np.dtype("V")) if data is None else (data.shape, data.dtype)
            for name, data in found.items()
        }


def npz_headers(path: Path) -> Headers:
    """Shape and type of every array of an NPZ.

    Raises ReadError where one claims more than its member holds.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as file:
                    shape, kind = _npy_header(file)
                    claimed = int(np.prod(shape, dtype=object)) * kind.itemsize
                    if (
                        not kind.hasobject
                        and file.tell() + claimed > archive.getinfo(name).file_size
                    ):
                        raise ReadError(
                            f"truncated or damaged: the header of {name[:-4]} claims {claimed:,} bytes"
                        )
                found[name[:-4]] = shape, kind
    return found


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
            raise ReadError(
                f"{name} holds Python objects, which could run anything and are not read"
            )
    check_inflated(
        path, sum(int(np.prod(headers[n][0], dtype=object)) * headers[n][1].itemsize for n in names)
    )
    with np.load(path, allow_pickle=False) as archive:
        return {name: np.asarray(archive[name]) for name in names}


def check_inflated(path: Path, claimed: int) -> None:
    """ReadError where a compressed file would fill the memory: over 256 MiB and 50 times the file's
    size.
    """
    if claimed > max(2**28, 50 * path.stat().st_size):
        size = path.stat().st_size
        raise ReadError(
            f"refused: {size:,} bytes that claim to hold {claimed:,}; save it again without compression"
        )


def _dataset(file: Any, name: str) -> Any:
    """The data set at a name. ReadError for one that lies, or whose values lie, in another file."""
    h5py, place, left, steps = module("h5py"), file, [name], 0
    while left:
        step, steps = left.pop(0), steps + 1
        link = place.get(step, getlink=True)
        if isinstance(link, h5py.ExternalLink) or link is None or steps > 20:
            raise ReadError(
                f"{name} is a link to another file, to nothing or in a circle, which is not followed"
            )
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
    """The names of the arrays that are read, by what they are: [n, N] labels are parts, not
    classes. Or ReadError.
    """
    found = {key: next((n for n in known if n in headers), None) for key, known in _NAMES.items()}
    if found["points"] is None:
        raise ReadError(
            f"has no array named {', '.join(_NAMES['points'])}; it has {', '.join(map(str, headers)) or 'none'}"
        )
    shape, label = headers[found["points"]][0], found["label"]
    if label:
        size = headers[label][0]
        if size in (shape[:-1], (*shape[:-1], 1)):
            found |= {"label": None, "parts": found["parts"] or label}
        elif len(shape) == 3 and size not in (shape[:1], (shape[0], 1)):
            wanted = f"[{shape[0]}] or [{shape[0]}, 1] for classes, [{shape[0]}, {shape[1]}] for part labels"
            raise ReadError(f"{label} has shape {list(size)}; it must be {wanted}")
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
    with module("h5py").File(path, "r") as file:
        found = {key: _dataset(file, name) for key, name in names.items()}
        texts = {key for key, data in found.items() if data.dtype.hasobject and _is_text(data)}
        for name, data in found.items():
            if name in texts:
                continue
            if data.dtype.hasobject:
                raise ReadError(f"{name} holds objects of any length, not numbers")
            check_claim(path, data.nbytes, 1100)  # gzip's best is 1032
            share = len(range(*rows.indices(len(data)))) / max(1, len(data))
            chunk = int(np.prod(data.chunks or (), dtype=object)) * data.dtype.itemsize
            check_inflated(path, max(int(data.nbytes * share), chunk))
        return {
            key: data.asstr()[rows].astype(str) if key in texts else data[rows]
            for key, data in found.items()
        }


def _is_text(data: Any) -> bool:
    """Whether a data set of HDF5 holds texts, as h5py writes them by default; their bytes are
    within the file's.
    """
    return module("h5py").check_string_dtype(data.dtype) is not None


def array_rows(path: Path, row: int) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of the block that holds a row, and the row's place there. Raises ReadError."""
    block, at = divmod(row, _BLOCK) if path.suffix.lower() != ".npz" else (None, row)
    arrays = array_block(path, block, path.stat().st_mtime_ns)
    counts = {key: len(values) for key, values in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ReadError(
            "arrays of different lengths: " + ", ".join(f"{key} {n}" for key, n in counts.items())
        )
    if at >= len(arrays["points"]):
        raise ReadError(f"has no cloud {row}")
    return arrays, at


def read_array(path: Path, row: int | None) -> PointCloud:
    shapes = _array_shapes(path, path.stat().st_mtime_ns)
    if len(shapes["points"]) == 3:
        if row is None:
            raise ReadError(
                f"expected an array of points [n, 3], found {list(shapes['points'])}: many clouds"
            )
        arrays, at = array_rows(path, row)
        arrays = {key: values[at] for key, values in arrays.items()}
    else:
        arrays = array_block(path, None, path.stat().st_mtime_ns)
    attributes: dict[str, Any] = {}
    if np.ndim(points := arrays["points"]) == 2:
        if (normals := arrays.get("normals")) is not None and np.shape(normals) == np.shape(points):
            attributes["normals"] = np.asarray(normals, np.float32)
        if (parts := arrays.get("parts")) is not None and np.shape(parts) in (
            (len(points),),
            (len(points), 1),
        ):
            attributes["parts"] = np.reshape(parts, -1)
    return PointCloud.make(points, **attributes)


def parts_in(arrays: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    """`parts` n N int16 and `part_names` of a bundle. Raises ReadError."""
    key = "seg" if "seg" in arrays else "parts"
    if key not in arrays:
        raise ReadError(f"{path}: {NO_PARTS}")
    parts, (count, size, _) = arrays[key], arrays["points"].shape
    if parts.shape != (count, size) or not np.issubdtype(parts.dtype, np.integer):
        found = f"{parts.dtype} {list(parts.shape)}"
        raise ReadError(
            f"{path}: {key} must be a whole number a point, [{count}, {size}], found {found}"
        )
    with boundary(path):
        parts = to_parts(parts)
        if alone := int((parts == UNLABELLED).all(1).sum()):
            raise ReadError(
                f"{key}: {alone} shapes have no labelled point, all of theirs are -1 or the like"
            )
    names = tuple(str(name) for name in arrays.get("part_names", ()))
    if names and parts.max() >= len(names):
        raise ReadError(f"{path}: {key} must be from 0 to {len(names) - 1}, found {parts.max()}")
    return {"parts": parts, "part_names": names}
