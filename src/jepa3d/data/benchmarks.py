"""Recognise and read the published benchmarks, in the layouts in which they are distributed.

The benchmarks are ShapeNet55 and the few-shot folds of ModelNet40 (both as Point-BERT publishes
them), three releases of ModelNet, ScanObjectNN, and two releases of ShapeNetPart. If a file of a
benchmark is missing, the error says where the owner publishes the benchmark.
"""

import json
import pickle
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import yaml

from jepa3d.data.cloud import PointCloud, ReadError, to_parts
from jepa3d.data.entries import Entry, Source, entries_of
from jepa3d.data.errors import as_read_error
from jepa3d.data.io import read
from jepa3d.data.store import SPLITS

_PUBLISHED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
SHAPENETPART: dict[str, int] = _PUBLISHED["parts"]  # number of parts per category
# variant of ScanObjectNN -> its folder in the full download, and how its file names end
_SCANS = {
    "obj_bg": ("main_split", ""),
    "pb_t50_rs": ("main_split", "_augmentedrot_scale75"),
    "obj_only": ("main_split_nobg", ""),
    "pb_t50_rs_nobg": ("main_split_nobg", "_augmentedrot_scale75"),
}


def benchmark_at(root: Path, variant: str | None) -> Source | None:
    """Return the benchmark whose files lie at `root`, or None if there is none.

    variant: name of the variant to read, for the benchmarks that have variants (ModelNet with
    normals and ScanObjectNN); it may be None if `root` has only one variant. Raises ReadError if
    `root` lacks the variant, if `variant` is None and `root` has several, if a label is not a class
    of the benchmark, or if a file that many shapes need, such as a list of shapes, is missing or
    damaged. There are two exceptions. If a split list of ShapeNetPart is missing, no error is
    raised, and the entries of its shapes get the split None. If the file of a single shape is
    missing or damaged, the error is raised when the entry of that shape is read.
    """
    part_lists = root.glob("train_test_split/shuffled_*_file_list.json")
    if (root / "shapenet_pc").is_dir():
        source = _shapenet55(root)
    elif any(root.glob("modelnet[14]0_shape_names.txt")):
        source = _modelnet_normals(root, variant)
    elif (root / "shape_names.txt").is_file() and any(root.glob("ply_data_*.h5")):
        source = _modelnet_hdf5(root)
    elif any(part_lists) or (root / "synsetoffset2category.txt").is_file():
        source = _shapenetpart(root)
    elif not (source := _scanobjectnn(root, variant)):
        return None
    notes = check_sizes(source.layout, source.entries)
    return replace(source, notes=notes + source.notes)


def meshes_of(classes: set[str | None]) -> str | None:
    """Return the layout, "ModelNet10 meshes" or "ModelNet40 meshes", that has these classes.

    Returns None if neither has exactly the same classes.
    """
    names = ("ModelNet10", "ModelNet40")
    found = [name for name in names if classes == set(_PUBLISHED["classes"][name])]
    return f"{found[0]} meshes" if found else None


def check_sizes(layout: str, entries: list[Entry]) -> list[str]:
    """Compare the numbers of shapes in each split of a benchmark with the published numbers.

    Returns a list with one note if they differ, else an empty list.
    """
    found = Counter(entry.split for entry in entries)
    sizes = _PUBLISHED["sizes"][layout]
    if all(found[split] == size for split, size in sizes.items()):
        return []
    counts = [f"{found[split]:,} of {size:,} {split}" for split, size in sizes.items()]
    note = "shapes: the download is incomplete or only a subset"
    return [f"{layout}: {', '.join(counts)} {note}"]


def _lines(path: Path, owner: str) -> list[str]:
    """Read the non-empty lines of a text file of a benchmark, such as a list of shapes.

    owner: name of the benchmark under `owners` in benchmarks.yaml. Raises ReadError if the file is
    missing.
    """
    with as_read_error(path):
        if not path.is_file():
            _missing(owner, None, path)
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _missing(owner: str, list_name: str | None, path: Path) -> NoReturn:
    """Raise a ReadError for a missing file.

    If the file of a single shape is missing, this function is the reader of the shape's entry, so
    that the error is raised when the entry is read. owner: as for `_lines`. list_name: name of the
    list that names the file, or None.
    """
    listed = f"but {list_name} lists it" if list_name else f"but {owner} needs it"
    hint = f"get it from {_PUBLISHED['owners'][owner]}"
    raise ReadError(f"{path}: is missing, {listed}; {hint}")


def _listed(path: Path, reader: Callable, owner: str, list_name: str) -> partial:
    """Return a function that reads a listed file or, if the file is missing, raises a ReadError."""
    missing = partial(_missing, owner, list_name, path)
    return partial(reader, path) if path.is_file() else missing


def _shapenet55(root: Path) -> Source:
    entries = []
    for split in ("train", "test"):
        for name in _lines(root / "ShapeNet-55" / f"{split}.txt", "ShapeNet55"):
            key = f"shapenet_pc/{name}"
            reader = _listed(root / key, read, "ShapeNet55", f"{split}.txt")
            entries.append(Entry(key, reader, name.split("-")[0], split, "y"))
    return Source("ShapeNet55", entries)


def _modelnet_normals(root: Path, variant: str | None) -> Source:
    """Read PointNet++'s release of ModelNet: files of 10,000 points with normals.

    The variants are `modelnet10` and `modelnet40`. For each variant, the release has
    three lists: of the classes, of the train shapes and of the test shapes.
    """
    lists = sorted(root.glob("modelnet[14]0_shape_names.txt"))
    name = _chosen(root, [path.name.partition("_")[0] for path in lists], variant)
    classes, entries = set(_lines(root / f"{name}_shape_names.txt", "ModelNet")), []
    table = partial(read, columns=("x", "y", "z", "nx", "ny", "nz"))
    for split in ("train", "test"):
        path = root / f"{name}_{split}.txt"
        for shape in _lines(path, "ModelNet"):
            label = shape.rpartition("_")[0]
            key = f"{label}/{shape}.txt"
            if label not in classes:
                wrong = f"label {label!r} of {shape} is not a class"
                raise ReadError(f"{path}: {wrong} in {name}_shape_names.txt")
            reader = _listed(root / key, table, "ModelNet", path.name)
            entries.append(Entry(key, reader, label, split, "y"))
    return Source(f"{name.replace('modeln', 'ModelN')} normals", entries)


def _modelnet_hdf5(root: Path) -> Source:
    names, entries = _lines(root / "shape_names.txt", "ModelNet"), []
    for split in ("train", "test"):
        for line in _lines(root / f"{split}_files.txt", "ModelNet"):
            # the paths in the list name folders on its author's machine, so use only the file name
            path = root / Path(line).name
            if not path.is_file():
                _missing("ModelNet", f"{split}_files.txt", path)
            entries += _rows_of(path, names, split)
    return Source("ModelNet40 HDF5", entries)


def _rows_of(path: Path, names: Sequence[str], split: str) -> list[Entry]:
    """Return the clouds of an HDF5 file, labelled by class name.

    names: the class names; label i of the file means names[i]. Raises ReadError if a label is
    missing or is not an index of `names`.
    """
    entries = []
    for entry in entries_of(path, path.name, None, split):
        number = -1 if entry.label is None else int(entry.label)
        if not 0 <= number < len(names):
            wrong = f"label {number} of {entry.key} is not a class"
            raise ReadError(f"{path}: {wrong}; allowed are 0 to {len(names) - 1}")
        entries.append(replace(entry, label=names[number], up_axis="y"))
    return entries


def _scanobjectnn(root: Path, variant: str | None) -> Source | None:
    """Read ScanObjectNN from the full download or from one of its two folders of splits.

    The folders are main_split and main_split_nobg (scans without background). Returns None if
    `root` holds no files of ScanObjectNN.
    """
    is_folder = any(root.glob("t*_objectdataset*.h5"))
    only = "main_split_nobg" if "nobg" in root.absolute().name else "main_split"
    files = {
        name: (root if is_folder else root / folder, f"_objectdataset{end}.h5")
        for name, (folder, end) in _SCANS.items()
        if folder == only or not is_folder
    }
    found = [name for name, (at, end) in files.items() if any(at.glob(f"t*{end}"))]
    if not found:
        return None
    name, entries = _chosen(root, found, variant), []
    folder, end = files[name]
    for split, part in (("train", "training"), ("test", "test")):
        path = folder / f"{part}{end}"
        if not path.is_file():
            _missing("ScanObjectNN", None, path)
        rows = _rows_of(path, _PUBLISHED["classes"]["ScanObjectNN"], split)
        entries += [replace(row, read=partial(_masked, row.read)) for row in rows]
    return Source(f"ScanObjectNN {name}", entries, ("background", "object"))


def _masked(reader: Callable[[], PointCloud]) -> PointCloud:
    """Read a cloud and convert its mask to part labels.

    Part label 0 means background, which is -1 in the mask. Part label 1 means object.
    """
    cloud = reader()
    parts = None if cloud.parts is None else (cloud.parts != -1).astype(np.int32)
    return replace(cloud, parts=parts)


def _shapenetpart(root: Path) -> Source:
    """Read ShapeNetPart in either release.

    One release has files `ID.txt` with points, normals and global part labels: one numbering covers
    the parts of all categories. The other release has points in `points/ID.pts`, and their part
    labels in `points_label/ID.seg`; these labels begin at 1 in every category.
    """
    path = root / "synsetoffset2category.txt"
    lines = [line.split() for line in _lines(path, "ShapeNetPart")]
    category = {line[1]: line[0] for line in lines if len(line) == 2}
    if unknown := set(category.values()) - SHAPENETPART.keys():
        allowed = ", ".join(SHAPENETPART)
        wrong = f"label {min(unknown)!r} is not a class"
        raise ReadError(f"{path}: {wrong}; allowed are {allowed}")
    firsts = np.cumsum([0, *SHAPENETPART.values()]).tolist()
    readers: dict[str, partial] = {}  # "synset/id" -> reader of the shape
    table = partial(read, columns=("x", "y", "z", "nx", "ny", "nz", "part"))
    for synset, name in category.items():
        first = firsts[[*SHAPENETPART].index(name)]
        labelled = partial(_with_parts, first, SHAPENETPART[name])
        for reader, pattern in ((table, "*.txt"), (labelled, "points/*.pts")):
            for path in sorted((root / synset).glob(pattern)):
                readers[f"{synset}/{path.stem}"] = partial(reader, path)
    splits = {}
    for split in SPLITS:
        path = root / "train_test_split" / f"shuffled_{split}_file_list.json"
        if path.is_file():
            with as_read_error(path):
                names = json.loads(path.read_text())
                splits |= {name.removeprefix("shape_data/"): split for name in names}
    entries = []
    for shape in sorted(readers.keys() | splits.keys()):
        split, label = splits.get(shape), category.get(shape.partition("/")[0])
        listed_in = f"shuffled_{split}_file_list.json"
        missing = partial(_missing, "ShapeNetPart", listed_in, root / shape)
        reader = readers.get(shape, missing)
        key = reader.args[-1].relative_to(root).as_posix()
        entries.append(Entry(key, reader, label, split, "y"))
    parts = [f"{name} {i}" for name, n in SHAPENETPART.items() for i in range(n)]
    unlisted = sum(entry.split is None for entry in entries)
    note = f"ShapeNetPart: {unlisted:,} shapes are in none of its split lists"
    notes = [note] if unlisted else []
    return Source("ShapeNetPart", entries, tuple(parts), notes=notes)


def _with_parts(first: int, count: int, path: Path) -> PointCloud:
    """Read a cloud from points/ID.pts, and its part labels from points_label/ID.seg.

    The labels 1 to `count` in the second file become global labels `first` to `first + count - 1`.
    """
    cloud = read(path)
    side = path.parents[1] / "points_label" / f"{path.stem}.seg"
    with as_read_error(side):
        parts = to_parts(np.loadtxt(side, ndmin=1))
        if len(parts) != len(cloud):
            raise ReadError(f"{len(parts)} part labels for {len(cloud)} points")
        low, high = parts.min(), parts.max()
        if low < 1 or high > count:
            raise ReadError(f"part labels {low}-{high}, but its category has 1-{count}")
        return replace(cloud, parts=parts + (first - 1))


def _chosen(root: Path, found: list[str], variant: str | None) -> str:
    """Return the named variant, or the only one if none is named.

    Raises ReadError if the named variant was not found, or if none is named and there are several.
    """
    if variant is None and len(found) == 1:
        return found[0]
    if variant not in found:
        what = f"no variant {variant!r}" if variant else "several variants"
        choice = f"choose with --variant: {', '.join(found)}"
        raise ReadError(f"{root}: holds {what}; {choice}")
    return variant


# ----------------------------------------------------------------------------------- few-shot folds


# the functions and classes that a pickle of numpy arrays refers to
_ARRAY_PARTS = re.compile(
    r"numpy\.(ndarray|dtype"
    r"|_?core\.(numeric\._frombuffer|multiarray\.(_reconstruct|scalar)))"
)


class _ArraysOnly(pickle.Unpickler):
    """An unpickler of numpy arrays in plain containers; it refuses whatever could run code."""

    def find_class(self, module: str, name: str):
        # pickle protocol 2 stores bytes as a call of this function
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")
        if not _ARRAY_PARTS.fullmatch(f"{module}.{name}"):
            raise ReadError(f"contains {module}.{name}; only numpy arrays are read")
        return super().find_class(module, name)


@lru_cache(maxsize=1)
def _fold(path: Path, mtime: int) -> dict[str, list]:
    # `mtime` (the time of the file's last change) is a part of the cache's key, so that a changed
    # file is read again.
    with as_read_error(path):
        with path.open("rb") as file:
            fold = _ArraysOnly(file).load()
        if not isinstance(fold, dict) or not {"train", "test"} <= set(fold):
            raise ReadError("a few-shot fold must be a dict with lists train and test")
        return fold


def fold_of(path: Path) -> Source:
    """Read a published W-way S-shot fold, such as `5way_10shot/0.pkl`.

    The train split has W * S clouds, and the test split has W * 20.
    """
    fold, entries = _fold(path, path.stat().st_mtime_ns), []
    with as_read_error(path):
        for split in ("train", "test"):
            for i, item in enumerate(fold[split]):
                label = str(int(np.ravel(item[1])[0]))
                reader = partial(_fold_item, path, split, i)
                entries.append(Entry(f"{split}#{i}", reader, label, split, "y"))
    return Source("ModelNetFewshot", entries)


def _fold_item(path: Path, split: str, row: int) -> PointCloud:
    with as_read_error(path):
        rows = np.asarray(_fold(path, path.stat().st_mtime_ns)[split][row][0])
        normals = rows[:, 3:6].astype(np.float32) if rows.shape[1] >= 6 else None
        return PointCloud.make(rows, normals=normals)
