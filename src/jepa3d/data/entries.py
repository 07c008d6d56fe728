"""Represent a source of clouds as a list of entries: one per cloud, with its class and split.

Any process can read the cloud of an entry. Class and split come from the file or from the names of
the folders that contain it. `divide` can replace these splits: it chooses a fraction of each class
at random as test clouds, or reads a list of test clouds.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from jepa3d.data.arrays import clouds_in, facts_in
from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.io import read
from jepa3d.data.store import SPLITS
from jepa3d.plain import log, printable

# name of a folder, in lower case -> split
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval"), "val"),
}
# prefixes and suffixes that the name of a split folder may have: 01_train, Test Set, train_data
_ADDED = re.compile(r"^\d+[ _-]+|[ _-]*(set|data|split)$")


@dataclass(frozen=True, slots=True)
class Entry:
    """One cloud of a source."""

    key: str  # unique in the source: the path, and #row in a file of many clouds
    read: Callable[[], PointCloud]
    label: str | None = None
    split: str | None = None  # train, test or val
    up_axis: str | None = None  # up axis in the file, if the source defines it
    name: str | None = None  # name of the cloud, if the file has names for its clouds
    row: int | None = None  # index in a file of many clouds, else None

    def cloud(self) -> PointCloud:
        """Read the cloud, with the up axis that the source or the format defines."""
        cloud = self.read()
        return replace(cloud, up=self.up_axis or cloud.up)

    @property
    def file(self) -> str:
        """Path of the file: the key without its row."""
        return self.key if self.row is None else self.key.removesuffix(f"#{self.row}")


@dataclass(frozen=True)
class Source:
    """The clouds of a folder or file, in a fixed order."""

    # name of the benchmark and its layout, or "folder", "file" or "procedural"
    layout: str
    entries: list[Entry]
    part_names: tuple[str, ...] = ()
    # (key, reason) of each file without a usable cloud
    skipped: list[tuple[str, str]] = field(default_factory=list)
    # sentences for the user, for example about an unexpected number of clouds
    notes: list[str] = field(default_factory=list)

    @property
    def unpublished(self) -> bool:
        """True for a user's own files, False for a benchmark and for procedural shapes.

        Stray points (see `frame.py::without_strays`) are removed from a user's own files only.
        """
        return self.layout in ("folder", "file")


def entries_of(
    path: Path, key: str, label: str | None, split: str | None, *how: Any
) -> list[Entry]:
    """Return the entries of one file.

    label, split: class and split of every cloud; labels and splits in an array file override them.
    how: columns and reader, as for `io.py::read`. Raises ReadError.
    """
    # a user's own reader returns one cloud per file
    count = None if any(how[1:]) else clouds_in(path)
    if count is None:
        return [Entry(key, partial(read, path, None, *how), label, split)]
    if not count:
        raise ReadError(f"{path}: holds no clouds")
    facts = facts_in(path)
    labels, splits, names = repeat(label), repeat(split), facts.get("names", ())
    if "label" in facts:
        classes, numbers = facts["class_names"] or None, facts["label"].tolist()
        labels = [None if n < 0 else classes[n] if classes else str(n) for n in numbers]
    if "split" in facts:
        splits = [SPLITS[n] for n in facts["split"].tolist()]
    if len(names) != count:
        names = repeat(None)
    rows = zip(range(count), labels, splits, names, strict=False)
    return [
        Entry(f"{key}#{row}", partial(read, path, row), label, split, None, name, row)
        for row, label, split, name in rows
    ]


def split_of(name: str) -> str | None:
    """Return the split that the name of a folder means, or None if the name means no split.

    Upper and lower case make no difference, nor do the prefixes and suffixes in `_ADDED`.
    """
    return SPLIT_OF.get(_ADDED.sub("", name.lower()))


def classes_and_splits(
    folders: list[tuple[str, ...]], flat: bool
) -> list[tuple[str | None, str | None]]:
    """Find the class and split of each file from the names of its folders.

    folders: for each file, the names of its folders, outermost first. If all folders at one depth
    have names of splits, these folders are the splits. Otherwise, a folder with such a name, say
    `test`, is a split if a sibling folder has the name of another split, or if one of its
    subfolders has the same name as one of its siblings. If neither holds, `test` is a class.

    The class of a file is the outermost of its folders that is no split and is not skipped. A
    folder is skipped if all files share it and if, inside it, each file lies in a further folder
    that is no split. flat: if True, no folder is skipped.
    """
    # folder -> names of its subfolders
    inside: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for names in set(folders):
        for depth, name in enumerate(names):
            inside[names[:depth]].add(name)

    def splits_in(names: set[str]) -> int:
        return len({split_of(name) for name in names} - {None})

    levels: dict[int, set[str]] = defaultdict(set)  # depth -> names of its folders
    for at, names in inside.items():
        levels[len(at)] |= names
    all_named = [depth for depth, names in levels.items() if all(map(split_of, names))]
    # several depths can qualify (if folders train and test contain only a class named `test`):
    # choose the depth with the largest number of different splits, and among equals the outermost
    level = max(sorted(all_named), key=lambda at: splits_in(levels[at]), default=None)

    def is_split(names: tuple[str, ...], depth: int) -> bool:
        if level is not None:
            return depth == level
        beside, within = inside[names[:depth]], inside.get(names[: depth + 1], set())
        is_likely = splits_in(beside) > 1 or not beside.isdisjoint(within)
        return split_of(names[depth]) is not None and is_likely

    @cache
    def divided(names: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
        """Return the names of the folders that are no split, and the split or None."""
        for depth in range(len(names)):
            if is_split(names, depth):
                return names[:depth] + names[depth + 1 :], split_of(names[depth])
        return names, None

    found = [divided(names) for names in folders]
    outer = zip(*(names[:-1] for names, _ in found), strict=False)
    shared = list(takewhile(lambda names: len(set(names)) == 1, outer))
    depth = 0 if flat else len(shared)
    return [(next(iter(names[depth:]), None), split) for names, split in found]


def divide(entries: list[Entry], split: str, seed: int) -> list[Entry]:
    """Return the entries with their splits set.

    split: "folder" keeps the splits of the source. A fraction puts this share of each class into
    the test split: at least one cloud, but never all; a class of one cloud stays in train. Clouds
    without a class count as one class. seed: for the random choice of test clouds. A path names a
    file that lists the keys of the test clouds. With a fraction or a list, all other clouds are in
    the train split. Raises ValueError for a fraction that is not between 0 and 1, and its subclass
    ReadError for a list that is missing or names a cloud that is not in `entries`.
    """
    if split == "folder":
        without = [entry for entry in entries if entry.split is None]
        if without and len(without) < len(entries):
            counts = f"{len(without):,} of {len(entries):,} clouds"
            key = printable(without[0].key)
            log.info(f"{counts} are in no split, for example {key}")
        return entries
    try:
        fraction = float(split)
    except ValueError:
        test = _listed(entries, Path(split))
    else:
        if not 0 < fraction < 1:
            raise ValueError(f"--split {split}: a fraction must be between 0 and 1")
        if any(entry.split for entry in entries):
            log.info(f"--split {split} replaces the splits of the source")
        rng, test = np.random.default_rng(seed), set()
        for label in sorted({entry.label or "" for entry in entries}):
            keys = [entry.key for entry in entries if (entry.label or "") == label]
            count = min(max(round(fraction * len(keys)), 1), len(keys) - 1)
            test |= {keys[i] for i in rng.permutation(len(keys))[:count]}
    return [replace(e, split="test" if e.key in test else "train") for e in entries]


def _listed(entries: list[Entry], path: Path) -> set[str]:
    """Read the keys of test clouds from a file.

    Raises ReadError if there is no such file, or if it lists a key that no entry has.
    """
    if not path.is_file():
        allowed = "the word folder, a fraction, or a file that lists the test clouds"
        raise ReadError(f"--split {path}: no such file; give {allowed}")
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    listed = {line.strip() for line in lines if line.strip()}
    if missing := listed - {entry.key for entry in entries}:
        raise ReadError(f"{path}: lists {min(missing)!r}, which is not in the source")
    return listed


def lacking(
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    names: Sequence[str],
    part: str = "test",
) -> list[str]:
    """Describe the classes that at least one of two splits lacks, such as "disc (2 train, 0 test)".

    labels: array [n] with the class of each shape, -1 for no label. train, test: masks [n] of the
    shapes in the two splits. names: class names. part: name of the second split. Returns one text
    per class.
    """
    found = []
    for label in np.unique(labels[labels >= 0]).tolist():
        a, b = (int((labels[mask] == label).sum()) for mask in (train, test))
        if not (a and b):
            name = names[label] if label < len(names) else str(label)
            found.append(f"{printable(name)} ({a} train, {b} {part})")
    return found
