"""Files of arrays, NPY, NPZ and HDF5: one cloud, or many with what is known of each."""

from functools import lru_cache
from pathlib import Path
from typing import Any

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


def clouds_in(path: Path) -> int | None:
    """How many clouds an array file holds; None for a file that is one cloud. Raises ReadError."""
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        return None
    with boundary(path):
        shapes = _array_shapes(path, path.stat().st_mtime_ns)
        points = shapes.get("points", ())
        return points[0] if len(points) == 3 else None


def facts_in(path: Path) -> dict[str, np.ndarray]:
    """What an array file of many clouds says of each: label, split and names, and class_names, those that it has."""
    with boundary(path):
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                names = _known(archive.files) | {name: name for name in _FACTS[2:] if name in archive.files}
                facts = {key: archive[name] for key, name in names.items() if key in _FACTS}
        elif path.suffix.lower() == ".npy":
            facts = {}
        else:
            with module("h5py").File(path, "r") as file:
                facts = {key: file[name][:] for key, name in _known(file).items() if key in _FACTS}
        count = clouds_in(path) or 0
        for key in ("label", "split"):
            if key in facts and (len(facts[key]) != count or not np.issubdtype(facts[key].dtype, np.integer)):
                raise ReadError(
                    f"{key} must be {count} whole numbers, found {facts[key].dtype} {list(facts[key].shape)}"
                )
        return facts


@lru_cache(maxsize=4)
def _array_shapes(path: Path, changed: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a file, by what they are."""
    if path.suffix.lower() == ".npy":
        return {"points": np.load(path, allow_pickle=False, mmap_mode="r").shape}
    if path.suffix.lower() == ".npz":
        return {key: np.shape(values) for key, values in array_block(path, None, changed).items()}
    with module("h5py").File(path, "r") as file:
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
    with module("h5py").File(path, "r") as file:
        names = _known(file) | ({"mask": "mask"} if "mask" in file else {})
        for name in names.values():
            check_claim(path, file[name].nbytes, 1100)  # gzip's best is 1032
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


def read_array(path: Path, row: int | None) -> PointCloud:
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
            attributes["parts"] = parts
    if (label := arrays.get("label")) is not None and np.size(label) == 1:
        attributes["label"] = int(np.ravel(label)[0])
    return PointCloud.make(arrays["points"], **attributes)
