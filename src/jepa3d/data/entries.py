"""A source is a list of entries, one for each cloud, which can be read in any process; their classes
and splits are found by the names of folders, by a fraction or by a list.
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

_NAMES = {
    "train": "train training",
    "test": "test testing",
    "val": "val valid validation validate dev eval",
}
# the split that the name of a folder, in lower case, means
SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names.split()}
# what may stand around such a name: 01_train, Test Set, train_data
_ADDED = re.compile(r"^\d+[ _-]+|[ _-]*(set|data|split)$")


@dataclass(frozen=True, slots=True)
class Entry:
    """One cloud of a source."""

    key: str  # unique in the source: the path and, in a file of many clouds, the row
    read: Callable[[], PointCloud]
    label: str | None = None
    split: str | None = None  # train, test or val
    up_axis: str | None = None  # of a published layout
    name: str | None = None  # of the cloud, if its file has names
    row: int | None = None  # in a file of many clouds; the key ends in #row

    @property
    def file(self) -> str:
        """The key without the row."""
        return self.key if self.row is None else self.key.removesuffix(f"#{self.row}")


@dataclass(frozen=True)
class Source:
    """The clouds of a folder or file, in an order that is always the same."""

    layout: str
    entries: list[Entry]
    part_names: tuple[str, ...] = ()
    # files that hold no cloud: key and reason
    skipped: list[tuple[str, str]] = field(default_factory=list)
    # what users should know, such as an unexpected number of clouds
    notes: list[str] = field(default_factory=list)

    @property
    def unpublished(self) -> bool:
        """True for users' own files, whose stray points are removed; benchmarks are kept as
        published.
        """
        return self.layout in ("folder", "file")


def entries_of(
    path: Path, key: str, label: str | None, split: str | None, *how: Any
) -> list[Entry]:
    """The clouds of one file. Labels and splits in an array file take the place of the given ones.

    how: columns and reader, as of `io.py::read`. Raises ReadError.
    """
    # a file that a reader of the user's reads is one cloud
    count = None if any(how[1:]) else clouds_in(path)
    if count is None:
        return [Entry(key, partial(read, path, None, *how), label, split)]
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
    """The split that the name of a folder means, in any case; None for other names."""
    return SPLIT_OF.get(_ADDED.sub("", name.lower()))


def classes_and_splits(
    folders: list[tuple[str, ...]], flat: bool
) -> list[tuple[str | None, str | None]]:
    """Class and split of each file, by the names of the folders around it, outermost first.

    If all folders of a level have names of splits, that level is the split. Else a folder `test` is
    a split if another folder beside it is a split too, or if it has folders with the names of those
    beside it; otherwise it is a class. The class is the first other folder that does not contain
    all files; flat: simply the first other folder.
    """
    # the folders in each folder
    inside: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for names in set(folders):
        for depth, name in enumerate(names):
            inside[names[:depth]].add(name)

    def splits_in(names: set[str]) -> int:
        return len({split_of(name) for name in names} - {None})

    levels: dict[int, set[str]] = defaultdict(set)  # the folders of each depth
    for at, names in inside.items():
        levels[len(at)] |= names
    all_named = [depth for depth, names in levels.items() if all(map(split_of, names))]
    # of several such levels (a class `test` in folders train and test) the first with most splits
    level = max(sorted(all_named), key=lambda at: splits_in(levels[at]), default=None)

    def is_split(names: tuple[str, ...], depth: int) -> bool:
        if level is not None:
            return depth == level
        beside, within = inside[names[:depth]], inside.get(names[: depth + 1], set())
        several = splits_in(beside) > 1 or not beside.isdisjoint(within)
        return split_of(names[depth]) is not None and several

    @cache
    def divided(names: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
        """The names without the split's folder, and the split."""
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
    """The entries with their splits.

    split: "folder" keeps the splits that the source has; a fraction puts that part of each class
    into test, at least one cloud but not all; a path is a list of the test clouds. Raises
    ValueError.
    """
    if split == "folder":
        without = [entry for entry in entries if entry.split is None]
        if without and len(without) < len(entries):
            counts = f"{len(without):,} of {len(entries):,} clouds"
            key = printable(without[0].key)
            log.info(f"{counts} are in no train or test part, such as {key}")
        return entries
    try:
        fraction = float(split)
    except ValueError:
        test = _listed(entries, Path(split))
    else:
        if not 0 < fraction < 1:
            raise ValueError(f"--split {split}: a fraction for test between 0 and 1")
        if any(entry.split for entry in entries):
            log.info(f"--split {split} takes the place of the split of the source")
        rng, test = np.random.default_rng(seed), set()
        for label in sorted({entry.label or "" for entry in entries}):
            keys = [entry.key for entry in entries if (entry.label or "") == label]
            count = min(max(round(fraction * len(keys)), 1), len(keys) - 1)
            test |= {keys[i] for i in rng.permutation(len(keys))[:count]}
    return [replace(e, split="test" if e.key in test else "train") for e in entries]


def _listed(entries: list[Entry], path: Path) -> set[str]:
    """The keys in a list of test clouds. Raises ReadError if it has a key that no entry has."""
    if not path.is_file():
        allowed = "folder, a fraction for test, or a file that lists the test clouds"
        raise ReadError(f"--split {path}: {allowed}")
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
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
    """Texts on the classes that only one of two parts has, such as "disc (2 train, 0 test)".

    labels: n, -1 for none. train, test: masks n. part: the name of the second part.
    """
    found = []
    for label in np.unique(labels[labels >= 0]).tolist():
        a, b = (int((labels[mask] == label).sum()) for mask in (train, test))
        if not (a and b):
            name = names[label] if label < len(names) else str(label)
            found.append(f"{printable(name)} ({a} train, {b} {part})")
    return found
