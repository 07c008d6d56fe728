"""Any source of shapes as `PointClouds`: built-in synthetic shapes, .npz bundles, folders of files, ShapeNet55.

The contract: fixed N, float32, unit sphere, z up, resampled once by farthest points (paper IV-A), never in a step.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from jepa3d.data import synthetic
from jepa3d.data.io import SUFFIXES, ReadError, check_cloud, read_points
from jepa3d.ops import farthest_point_sample, gather_points, unit_sphere

# Rows of (x, y, z) giving the z-up frame of a source whose up axis is the key.
_TO_Z_UP = {
    "x": np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]], np.float32),
    "y": np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32),
    "z": np.eye(3, dtype=np.float32),
}
_SPLITS = ("train", "test")


@dataclass(frozen=True)
class PointClouds:
    """Shapes ready for the encoder. `split` is 0 train, 1 test."""

    name: str
    fingerprint: str  # sha256 of a bundle's file, or of the points read from a folder or made
    points: np.ndarray  # n N 3 float32
    labels: np.ndarray | None = None  # n int64
    class_names: tuple[str, ...] = ()
    split: np.ndarray | None = None  # n int8

    def __len__(self) -> int:
        return len(self.points)

    def batch(self, index: np.ndarray) -> Tensor:
        """Clouds b N 3 at index."""
        return torch.from_numpy(self.points[index])

    def subset(self, keep: np.ndarray) -> "PointClouds":
        """The shapes at a boolean mask or index."""

        def take(values):
            return None if values is None else values[keep]

        return replace(self, points=self.points[keep], labels=take(self.labels), split=take(self.split))

    def part(self, split: str) -> "PointClouds":
        """The "train" or "test" part. ValueError when the source has none."""
        if self.split is None:
            raise ValueError(f"{self.name}: has no train/test split")
        return self.subset(self.split == _SPLITS.index(split))


def load(
    sources: Iterable[str],
    num_points: int,
    split: str = "train",
    up_axis: Iterable[str] = ("z",),
    labels_key: str = "labels",
    limit: int | None = None,
    raw: bool = False,
) -> PointClouds:
    """All shapes of the sources as one `PointClouds`; labels are kept for a single source.

    split: "train", "test" or "all"; a source without a split counts as train. up_axis: one for all or one a
    source. limit: at most that many shapes a source (a dry run). raw: as they are in the source, not resampled.
    Raises ValueError or its ReadError.
    """
    sources, axes = list(sources), list(up_axis)
    if len(axes) not in (1, len(sources)):
        raise ValueError(f"{len(axes)} values of up_axis for {len(sources)} of data: give one, or one each")
    if wrong := [axis for axis in axes if axis not in _TO_Z_UP]:
        raise ValueError(f"up axis {wrong[0]!r}: one of x, y, z")
    loaded = [
        _load_one(source, num_points, split, axes[i % len(axes)], labels_key, limit, raw)
        for i, source in enumerate(sources)
    ]
    if len(loaded) == 1:
        return loaded[0]
    digest = hashlib.sha256("".join(d.fingerprint for d in loaded).encode()).hexdigest()
    name = " + ".join(d.name for d in loaded)
    return PointClouds(name, digest, np.concatenate([d.points for d in loaded]))


def _load_one(source, num_points, split, up_axis, labels_key, limit, raw) -> PointClouds:
    path = Path(source)
    if source.split(":")[0] == "synthetic":
        found = _synthetic(source, num_points, limit)
        up_axis = "z"
    elif path.is_dir():
        found = _folder(path, num_points, split, limit, None if raw else _TO_Z_UP[up_axis])
    elif path.suffix == ".npz" and path.is_file():
        found = _bundle(path, num_points, labels_key)
    else:
        what = "no such file or folder" if not path.exists() else "not a source of shapes"
        raise ReadError(f"{source}: {what}; give synthetic, a .npz bundle or a folder of {', '.join(SUFFIXES)} files")
    if split != "all":
        found = found.subset(np.flatnonzero(_split_mask(found, split))[:limit])
        if not len(found):
            raise ReadError(f"{source}: no shapes in its {split} part")
    elif limit:
        found = found.subset(np.arange(min(limit, len(found))))
    if raw or path.is_dir():
        return found
    return replace(found, points=_standard(found.points, num_points, _TO_Z_UP[up_axis], found.name))


def _split_mask(data: PointClouds, split: str) -> np.ndarray:
    if data.split is None:
        if split == "test":
            raise ReadError(f"{data.name}: has no test part")
        return np.ones(len(data), bool)
    return data.split == _SPLITS.index(split)


def _standard(points: np.ndarray, num_points: int, axes: np.ndarray, name: str) -> np.ndarray:
    """Raw clouds n N 3 as n num_points 3, z up, unit sphere, by FPS."""
    out = np.empty((len(points), num_points, 3), np.float32)
    size = 64
    starts = range(0, len(points), size)
    for at in track(starts, f"sampling {num_points:,} points of {name}", transient=True, disable=len(starts) < 20):
        raw = points[at : at + size].astype(np.float64)
        raw -= raw.mean(1, keepdims=True)  # before float32: map coordinates of millions keep their millimetres
        clouds = unit_sphere(torch.from_numpy(raw.astype(np.float32) @ axes.T))
        if clouds.shape[1] > num_points:
            clouds = unit_sphere(gather_points(clouds, farthest_point_sample(clouds, num_points)))
        out[at : at + size] = clouds.numpy()
    return out


def _synthetic(source: str, num_points: int, limit: int | None) -> PointClouds:
    """`synthetic` or `synthetic:COUNT`; every fourth shape is test, whatever COUNT is."""
    count = source.partition(":")[2] or "4000"
    if not count.isdigit() or int(count) < 8:
        raise ReadError(f"{source}: give synthetic or synthetic:COUNT with COUNT of at least 8")
    total = int(count)
    made = synthetic.make_shapes(min(total, 4 * (limit or total)), 2 * num_points, seed=0)
    split = (np.arange(len(made["points"])) % 4 == 3).astype(np.int8)  # a class comes every 21: none is left out
    digest = hashlib.sha256(made["points"].tobytes()).hexdigest()
    return PointClouds(source, digest, made["points"], made["labels"], synthetic.CLASS_NAMES, split)


def _bundle(path: Path, num_points: int, labels_key: str) -> PointClouds:
    """A .npz with points n N 3 and, if it has them, labels, class_names and split."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if not name.startswith("raw_")}
        points = arrays.get("points", np.empty(0))
        usable = points.ndim == 3 and points.shape[2] == 3 and len(points) and np.issubdtype(points.dtype, np.number)
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ReadError(f"{path}: not a readable .npz bundle ({reason})") from error
    if not usable:
        found = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in arrays.items())
        raise ReadError(f"{path}: a bundle needs numbers 'points' [n, N, 3], n > 0; it has {found or 'nothing'}")
    for i, cloud in enumerate(points):
        check_cloud(cloud, num_points, f"{path}: shape {i}")
    labels = arrays.get(labels_key)
    if labels is None and labels_key != "labels":
        known = ", ".join(name for name in arrays if name.startswith("labels")) or "no labels"
        raise ReadError(f"{path}: has no labels {labels_key!r}; it has {known}")
    stem = labels_key.removeprefix("labels").strip("_") or "class"
    names = tuple(str(name) for name in arrays.get(f"{stem}_names", ()))
    split = arrays.get("split")
    for name, values in (("labels", labels), ("split", split)):
        if values is not None and values.shape != (len(points),):
            raise ReadError(f"{path}: {len(points)} shapes but {name} {list(values.shape)}")
        if values is not None and (not np.issubdtype(values.dtype, np.integer) or values.min() < 0):
            raise ReadError(f"{path}: {name} must be integers from 0, found {values.dtype}")
    if split is not None and split.max() > 1:
        raise ReadError(f"{path}: split must be 0 (train) or 1 (test), found {split.max()}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if labels is not None and not names:
        names = tuple(str(i) for i in range(int(labels.max()) + 1))
    if labels is not None and labels.max() >= len(names):
        raise ReadError(f"{path}: label {labels.max()}, but only {len(names)} names in {stem}_names")
    return PointClouds(path.name, digest, points, labels, names, split)


def _folder(root: Path, num_points: int, split: str, limit: int | None, axes: np.ndarray | None) -> PointClouds:
    """A ShapeNet55 download, or any tree of files: the first sub-folder is a class, one named train or test a split.

    Each cloud is brought to the standard form as it is read, so that memory holds one raw cloud; with axes None
    all stay raw, in an object array.
    """
    listed = _shapenet55(root)
    if listed is None:
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise ReadError(f"{root}: holds no {', '.join(SUFFIXES)} file")
        parts = [file.relative_to(root).parts[:-1] for file in files]
        classes = [next((name for name in p if name not in _SPLITS), None) for p in parts]
        in_split = [next((_SPLITS.index(s) for s in p if s in _SPLITS), None) for p in parts]
        if None in in_split and any(s is not None for s in in_split):
            stray = files[in_split.index(None)]
            raise ReadError(f"{stray}: is in no train or test folder, but other files of {root} are; move it or them")
    else:
        files, classes, in_split = listed
    keep = range(len(files))
    if split != "all" and None not in in_split:
        keep = [i for i in keep if in_split[i] == _SPLITS.index(split)]
    keep = list(keep)[:limit]
    files, classes, in_split = [files[i] for i in keep], [classes[i] for i in keep], [in_split[i] for i in keep]
    clouds, digest = [], hashlib.sha256()
    for file in track(files, f"reading {root}", transient=True, disable=len(files) < 20):
        cloud = read_points(file, num_points, seed=zlib.crc32(str(file.relative_to(root)).encode()))
        digest.update(cloud.tobytes())
        clouds.append(cloud if axes is None else _standard(cloud[None], num_points, axes, root.name)[0])
    names = tuple(sorted({c for c in classes if c is not None}))
    labels = None if None in classes or not names else np.array([names.index(c) for c in classes])
    splits = None if None in in_split else np.array(in_split, np.int8)
    points = np.empty(len(clouds), object) if axes is None else np.empty((len(clouds), num_points, 3), np.float32)
    for i, cloud in enumerate(clouds):
        points[i] = cloud
    return PointClouds(root.name, digest.hexdigest(), points, labels, names, splits)


def _shapenet55(root: Path) -> tuple[list[Path], list[str | None], list[int | None]] | None:
    """Files, synsets and splits of Point-BERT's release (`ShapeNet-55/*.txt`, `shapenet_pc/*.npy`), or None."""
    lists = [root / "ShapeNet-55" / f"{name}.txt" for name in _SPLITS]
    if not (root / "shapenet_pc").is_dir() or not all(p.is_file() for p in lists):
        return None
    names = [(line, i) for i, p in enumerate(lists) for line in p.read_text().split()]
    files = [root / "shapenet_pc" / line for line, _ in names]
    return files, [line.split("-")[0] for line, _ in names], [i for _, i in names]
