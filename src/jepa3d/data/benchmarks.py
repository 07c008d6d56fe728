"""The published benchmarks, in the layouts that people have of them.

Point-BERT's ShapeNet55 and few-shot folds, three releases of ModelNet, ScanObjectNN, two releases
of ShapeNetPart. Their counts are those of the publications; what is missing is named, with where
its owner publishes it.
"""

import io
import json
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from jepa3d.data.arrays import array_rows
from jepa3d.data.boundary import boundary
from jepa3d.data.cloud import PointCloud, ReadError, to_parts
from jepa3d.data.entries import Entry, Source, entries_of
from jepa3d.data.io import read
from jepa3d.data.store import SPLITS
from jepa3d.data.text import read_table


def check_counts(
    layout: str, entries: list[Entry], train: int, test: int, val: int = 0
) -> list[str]:
    """A note where a benchmark's splits are not of the published sizes."""
    found = Counter(entry.split for entry in entries)
    wanted = {"train": train, "test": test} | ({"val": val} if val else {})
    if all(found[split] == count for split, count in wanted.items()):
        return []
    told = ", ".join(f"{found[split]:,} of {count:,} {split}" for split, count in wanted.items())
    return [f"{layout}: {told} shapes: an incomplete download, or a part of it"]


def _lines(path: Path, layout: str) -> list[str]:
    """The non-empty lines of a list.

    A missing one is named, with where its owner publishes the set.
    """
    with boundary(path):
        if not path.is_file():
            raise ReadError(f"is missing from this copy of {layout}; get it from {_OWNERS[layout]}")
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _missing(path: Path, layout: str, listed_in: str) -> PointCloud:
    """What an entry whose file is missing does when read."""
    raise ReadError(f"{path}: is missing, but {listed_in} lists it; get it from {_OWNERS[layout]}")


_OWNERS = {
    "ShapeNet55": "Point-BERT's DATASET.md (github.com/lulutang0608/Point-BERT)",
    "ModelNet": "the ModelNet page of Princeton (modelnet.cs.princeton.edu), normals and HDF5 releases: "
    "PointNet's README (github.com/charlesq34/pointnet2)",
    "ModelNetFewshot": "Point-BERT's DATASET.md (github.com/lulutang0608/Point-BERT)",
    "ScanObjectNN": "the ScanObjectNN page (hkust-vgd.github.io/scanobjectnn), after its form",
    "ShapeNetPart": "the ShapeNet part annotation page of Stanford (shapenet.org), as PointNet++'s README links it",
}
_MODELNET10 = "bathtub bed chair desk dresser monitor night_stand sofa table toilet".split()
_MODELNET40 = [
    "airplane",
    "bathtub",
    "bed",
    "bench",
    "bookshelf",
    "bottle",
    "bowl",
    "car",
    "chair",
    "cone",
    "cup",
    "curtain",
    "desk",
    "door",
    "dresser",
    "flower_pot",
    "glass_box",
    "guitar",
    "keyboard",
    "lamp",
    "laptop",
    "mantel",
    "monitor",
    "night_stand",
    "person",
    "piano",
    "plant",
    "radio",
    "range_hood",
    "sink",
    "sofa",
    "stairs",
    "stool",
    "table",
    "tent",
    "toilet",
    "tv_stand",
    "vase",
    "wardrobe",
    "xbox",
]
MESH_COUNTS = {
    frozenset(_MODELNET10): ("ModelNet10 meshes", 3991, 908),
    frozenset(_MODELNET40): ("ModelNet40 meshes", 9843, 2468),
}


def benchmark_at(root: Path, variant: str | None) -> Source | None:
    """The benchmark whose files lie at `root`, or None."""
    if (root / "shapenet_pc").is_dir():
        return _shapenet55(root)
    if any((root / f"modelnet{n}_shape_names.txt").is_file() for n in (10, 40)):
        return _modelnet_normals(root, variant)
    if (root / "shape_names.txt").is_file() and any(root.glob("ply_data_*.h5")):
        return _modelnet_hdf5(root)
    if any(
        (root / f"{part}_objectdataset{tail}.h5").is_file()
        for part in ("training", "test")
        for tail in ("", _HARD)
    ):
        return _scanobjectnn(root, variant)
    if (root / "synsetoffset2category.txt").is_file() or any(
        root.glob("train_test_split/shuffled_*_file_list.json")
    ):
        return _shapenetpart(root)
    inner = {
        name: root / folder
        for name, folder in _SCANOBJECTNN_AT.items()
        if any((root / folder).glob(f"t*_objectdataset{_HARD if name == 'pb_t50_rs' else ''}.h5"))
    }
    if inner:
        return _scanobjectnn(inner[_chosen(root, list(inner), variant)], variant)
    return None


def _shapenet55(root: Path) -> Source:
    entries = []
    for split in ("train", "test"):
        for name in _lines(root / "ShapeNet-55" / f"{split}.txt", "ShapeNet55"):
            path = root / "shapenet_pc" / name
            exists = path.is_file()
            reader = (
                partial(read, path)
                if exists
                else partial(_missing, path, "ShapeNet55", f"{split}.txt")
            )
            entries.append(Entry(f"shapenet_pc/{name}", reader, name.split("-")[0], split, "y"))
    return Source("ShapeNet55", entries, notes=check_counts("ShapeNet55", entries, 41_952, 10_518))


def _modelnet_normals(root: Path, variant: str | None) -> Source:
    """PointNet++'s release: 10,000 points with normals, lists for its 10 and 40 classes."""
    found = [f"modelnet{n}" for n in (10, 40) if (root / f"modelnet{n}_shape_names.txt").is_file()]
    name = _chosen(root, found, variant)
    classes, entries = set(_lines(root / f"{name}_shape_names.txt", "ModelNet")), []
    for split in ("train", "test"):
        for shape in _lines(root / f"{name}_{split}.txt", "ModelNet"):
            label = shape.rpartition("_")[0]
            if label not in classes:
                raise ReadError(
                    f"{root / f'{name}_{split}.txt'}: label {label!r} of {shape} without class"
                )
            path = root / label / f"{shape}.txt"
            reader = partial(_table, path, ("x", "y", "z", "nx", "ny", "nz"))
            reader = (
                reader
                if path.is_file()
                else partial(_missing, path, "ModelNet", f"{name}_{split}.txt")
            )
            entries.append(Entry(f"{label}/{shape}.txt", reader, label, split, "y"))
    layout = f"{name.replace('modeln', 'ModelN')} normals"
    sizes = (3991, 908) if name == "modelnet10" else (9843, 2468)
    return Source(layout, entries, notes=check_counts(layout, entries, *sizes))


def _table(path: Path, names: tuple[str, ...]) -> PointCloud:
    with boundary(path):
        return read_table(path, names=names)


def _modelnet_hdf5(root: Path) -> Source:
    names, entries = _lines(root / "shape_names.txt", "ModelNet"), []
    for split in ("train", "test"):
        for line in _lines(root / f"{split}_files.txt", "ModelNet"):
            path = root / Path(line).name  # the list's own folders are those of its maker's machine
            if not path.is_file():
                _missing(path, "ModelNet", f"{split}_files.txt")
            entries += _rows_of(path, path.name, names, split, "y")
    layout = "ModelNet40 HDF5"
    return Source(layout, entries, notes=check_counts(layout, entries, 9840, 2468))


def _rows_of(
    path: Path, key: str, names: Sequence[str], split: str, up_axis: str | None
) -> list[Entry]:
    """An HDF5's clouds with the classes of its labels.

    Raises ReadError for a label without class.
    """
    entries = []
    for entry in entries_of(path, key, None, split, None):
        number = -1 if entry.label is None else int(entry.label)
        if not 0 <= number < len(names):
            raise ReadError(
                f"{path}: label {number} of {entry.key} without class: there are {len(names)}"
            )
        entries.append(replace(entry, label=names[number], up_axis=up_axis))
    return entries


_SCANOBJECTNN_AT = {
    "obj_bg": "main_split",
    "pb_t50_rs": "main_split",
    "obj_only": "main_split_nobg",
}
_SCANOBJECTNN = [
    "bag",
    "bin",
    "box",
    "cabinet",
    "chair",
    "desk",
    "display",
    "door",
    "shelf",
    "table",
    "bed",
    "pillow",
    "sink",
    "sofa",
    "toilet",
]
_HARD = "_augmentedrot_scale75"


def _scanobjectnn(root: Path, variant: str | None) -> Source:
    """obj_bg and pb_t50_rs lie in main_split, obj_only in main_split_nobg."""
    plain = "obj_only" if "nobg" in root.name else "obj_bg"
    hard = "pb_t50_rs_nobg" if "nobg" in root.name else "pb_t50_rs"
    tails = {plain: "", hard: _HARD}
    found = [v for v, tail in tails.items() if any(root.glob(f"t*_objectdataset{tail}.h5"))]
    name, entries = _chosen(root, found, variant), []
    for split, part in (("train", "training"), ("test", "test")):
        path = root / f"{part}_objectdataset{tails[name]}.h5"
        if not path.is_file():
            _missing(path, "ScanObjectNN", f"the {name} variant")
        for entry in _rows_of(path, path.name, _SCANOBJECTNN, split, "y"):
            row = int(entry.key.rpartition("#")[2])
            entries.append(replace(entry, read=partial(_masked, path, row)))
    layout = f"ScanObjectNN {name}"
    sizes = (11_416, 2882) if name == hard else (2309, 581)
    return Source(
        layout, entries, ("background", "object"), notes=check_counts(layout, entries, *sizes)
    )


def _masked(path: Path, row: int) -> PointCloud:
    """A cloud whose part labels say what belongs to the object (mask -1 does not)."""
    with boundary(path):
        cloud = read(path, row)
        arrays, at = array_rows(path, row)
        return (
            replace(cloud, parts=(arrays["mask"][at] != -1).astype(np.int32))
            if "mask" in arrays
            else cloud
        )


# Parts a category, in the order of the 50 global labels.
SHAPENETPART = {
    "Airplane": 4,
    "Bag": 2,
    "Cap": 2,
    "Car": 4,
    "Chair": 4,
    "Earphone": 3,
    "Guitar": 3,
    "Knife": 2,
    "Lamp": 4,
    "Laptop": 2,
    "Motorbike": 6,
    "Mug": 2,
    "Pistol": 3,
    "Rocket": 3,
    "Skateboard": 3,
    "Table": 3,
}


def _shapenetpart(root: Path) -> Source:
    """Both releases:

    `ID.txt` with normals and global part labels, or `points/ID.pts` + `points_label/ID.seg`.
    """
    lines = (line.split() for line in _lines(root / "synsetoffset2category.txt", "ShapeNetPart"))
    category = {line[1]: line[0] for line in lines if len(line) == 2}
    firsts = dict(
        zip(SHAPENETPART, np.cumsum([0, *SHAPENETPART.values()])[:-1].tolist(), strict=True)
    )
    if unknown := set(category.values()) - set(firsts):
        raise ReadError(
            f"{root / 'synsetoffset2category.txt'}: label {min(unknown)!r} without class"
        )
    found: dict[str, partial] = {}  # synset/id -> reader
    for synset, name in category.items():
        for path in sorted((root / synset).glob("*.txt")):
            found[f"{synset}/{path.stem}"] = partial(
                _table, path, ("x", "y", "z", "nx", "ny", "nz", "part")
            )
        for path in sorted((root / synset / "points").glob("*.pts")):
            side = root / synset / "points_label" / f"{path.stem}.seg"
            found[f"{synset}/{path.stem}"] = partial(
                _with_parts, path, side, firsts[name], SHAPENETPART[name]
            )
    listed = {}
    for split in SPLITS:
        path = root / "train_test_split" / f"shuffled_{split}_file_list.json"
        if path.is_file():
            with boundary(path):
                listed |= {
                    item.removeprefix("shape_data/"): split for item in json.loads(path.read_text())
                }
    entries = []
    for shape in sorted(found.keys() | listed.keys()):
        missing = partial(
            _missing, root / shape, "ShapeNetPart", f"shuffled_{listed.get(shape)}_file_list.json"
        )
        reader, label = found.get(shape, missing), category.get(shape.partition("/")[0])
        entries.append(
            Entry(
                reader.args[0].relative_to(root).as_posix(), reader, label, listed.get(shape), "y"
            )
        )
    parts = tuple(f"{name} {i}" for name, count in SHAPENETPART.items() for i in range(count))
    notes = check_counts("ShapeNetPart", entries, 12_137, 2874, 1870)
    if unlisted := sum(entry.split is None for entry in entries):
        notes.append(f"ShapeNetPart: {unlisted:,} shapes are in none of its split lists")
    return Source("ShapeNetPart", entries, parts, notes=notes)


def _with_parts(path: Path, side: Path, first: int, count: int) -> PointCloud:
    """A cloud and its part labels, which its file numbers from 1 to `count` within the category."""
    cloud = read(path)
    with boundary(side):
        parts = to_parts(np.loadtxt(side, ndmin=1))
        if len(parts) != len(cloud):
            raise ReadError(f"{len(parts)} part labels for {len(cloud)} points")
        if parts.min() < 1 or parts.max() > count:
            raise ReadError(
                f"part labels {parts.min()}-{parts.max()}, but the category has 1-{count}"
            )
        return replace(cloud, parts=parts + (first - 1))


def _chosen(root: Path, found: list[str], variant: str | None) -> str:
    """The variant of a benchmark: that named, or the only one."""
    if variant is None and len(found) == 1:
        return found[0]
    if variant not in found:
        said = f"has no variant {variant!r}" if variant else "holds more than one data set"
        raise ReadError(f"{root}: {said}; choose with --variant: {', '.join(found)}")
    return variant


# ----------------------------------------------------------------------------------- few-shot folds


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers, and nothing that could run."""

    _ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype")} | {
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    }

    def find_class(self, module: str, name: str):
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes bytes
            return lambda text, _: text.encode("latin1")
        if (module, name) not in self._ALLOWED:
            raise ReadError(f"a pickle that asks for {module}.{name}; only numpy arrays are read")
        return super().find_class(module, name)


@lru_cache(maxsize=1)
def _fold(path: Path, changed: int) -> dict[str, list]:
    with boundary(path):
        try:
            fold = _ArraysOnly(io.BytesIO(path.read_bytes())).load()
        except pickle.UnpicklingError as error:
            raise ReadError(f"damaged or not a pickle ({error})") from error
        if not isinstance(fold, dict) or not {"train", "test"} <= set(fold):
            raise ReadError("a few-shot fold is a dict with lists train and test")
        return fold


def fold_of(path: Path) -> Source:
    """One published few-shot fold (`5way_10shot/0.pkl`): train W * S items, test W * 20."""
    fold, entries = _fold(path, path.stat().st_mtime_ns), []
    with boundary(path):
        for split in ("train", "test"):
            for i, item in enumerate(fold[split]):
                label = str(int(np.ravel(item[1])[0]))
                entries.append(
                    Entry(f"{split}#{i}", partial(_fold_item, path, split, i), label, split, "y")
                )
    return Source("ModelNetFewshot", entries)


def _fold_item(path: Path, split: str, row: int) -> PointCloud:
    with boundary(path):
        rows = np.asarray(_fold(path, path.stat().st_mtime_ns)[split][row][0])
        return PointCloud.make(
            rows, normals=rows[:, 3:6].astype(np.float32) if rows.shape[1] >= 6 else None
        )
