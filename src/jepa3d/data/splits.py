"""Classes and splits: from the names of folders, by a fraction or a list, and which classes a split
leaves out.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from jepa3d.data.boundary import printable
from jepa3d.data.cloud import ReadError
from jepa3d.data.entries import Entry

SPLIT_OF = {  # what the name of a folder, in lower case, says
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "validate": "val",
    "dev": "val",
    "eval": "val",
}
# to such a name: 01_train, Test Set, train_data
_ADDED = re.compile(r"^\d+[ _-]+|[ _-]*(set|data|split)$")


def split_of(name: str) -> str | None:
    """The split that the name of a folder says, in any case; None for other names."""
    return SPLIT_OF.get(_ADDED.sub("", name.lower()))


def classes_and_splits(
    folders: list[tuple[str, ...]], flat: bool
) -> list[tuple[str | None, str | None]]:
    """Class and split of files, each given by the names of the folders around it, outermost first.

    Where all folders of a level have names of splits, that level is the split. Else a folder `test`
    is a class where it lies among classes, and a split where others beside it are splits too, or
    those in it are named as those beside. The class is the first folder left that does not stand
    around all files; flat: the first one, whatever it is.
    """
    inside: dict[tuple[str, ...], set[str]] = defaultdict(set)  # folders in a folder
    for names in set(folders):
        for depth, name in enumerate(names):
            inside[names[:depth]].add(name)

    def splits_in(names: set[str]) -> set[str]:
        return {split for name in names if (split := split_of(name))}

    levels = [
        set().union(*(inside[at] for at in inside if len(at) == depth))
        for depth in range(max(map(len, inside), default=-1) + 1)
    ]
    all_named = [depth for depth, names in enumerate(levels) if all(map(split_of, names))]
    # Of several such levels (a class `test` in folders train and test) the one with most splits.
    level = max(all_named, key=lambda depth: (len(splits_in(levels[depth])), -depth), default=None)

    def is_split(names: tuple[str, ...], depth: int) -> bool:
        if level is not None:
            return depth == level
        beside, within = inside[names[:depth]], inside.get(names[: depth + 1], set())
        return split_of(names[depth]) is not None and (
            len(splits_in(beside)) > 1 or not beside.isdisjoint(within)
        )

    @cache
    def divided(names: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
        """The folders but that of the split, and the split."""
        at = next((depth for depth in range(len(names)) if is_split(names, depth)), None)
        return (names, None) if at is None else (names[:at] + names[at + 1 :], split_of(names[at]))

    found = [divided(names) for names in folders]
    classes, depth = {names for names, _ in found}, 0
    while (
        not flat
        and len({names[: depth + 1] for names in classes}) == 1
        and min(map(len, classes)) > depth + 1
    ):
        depth += 1
    return [(names[depth] if len(names) > depth else None, split) for names, split in found]


def divide(entries: list[Entry], split: str, seed: int) -> list[Entry]:
    """Entries with their split: "folder" keeps that of folders or lists; else a fraction for test,
    or a list's path.

    Of each class of two clouds or more a fraction gives at least one to train and one to test.
    Raises ValueError.
    """
    if split == "folder":
        some = [entry for entry in entries if entry.split is None]
        if some and len(some) < len(entries):
            one = printable(some[0].key)
            print(
                f"{len(some):,} of {len(entries):,} clouds are in no train or test part, such as {one}"
            )
        return entries
    try:
        fraction = float(split)
    except ValueError:
        return _divide_by_list(entries, Path(split))
    if not 0 < fraction < 1:
        raise ValueError(f"--split {split}: a fraction for test between 0 and 1")
    if any(entry.split for entry in entries):
        print(f"--split {split} takes the place of the split that the source has")
    rng, test = np.random.default_rng(seed), set()
    for label in sorted({entry.label or "" for entry in entries}):
        keys = [entry.key for entry in entries if (entry.label or "") == label]
        count = min(max(round(fraction * len(keys)), 1), len(keys) - 1)
        test |= {keys[i] for i in rng.permutation(len(keys))[:count]}
    return [replace(entry, split="test" if entry.key in test else "train") for entry in entries]


def _divide_by_list(entries: list[Entry], path: Path) -> list[Entry]:
    if not path.is_file():
        raise ReadError(
            f"--split {path}: folder, a fraction for test, or a file that lists the test clouds"
        )
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    listed = {line.strip() for line in lines if line.strip()}
    if missing := listed - {entry.key for entry in entries}:
        raise ReadError(f"{path}: lists {min(missing)!r}, which is not in the source")
    return [replace(entry, split="test" if entry.key in listed else "train") for entry in entries]


def lacking(
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    names: Sequence[str],
    part: str = "test",
) -> list[str]:
    """The classes that one of two parts has no shape of, with their counts, such as "disc (2 train,
    0 test)".

    labels: n, -1 where unknown; train, test: masks n; part: what the second is called.
    """
    found = []
    for label in np.unique(labels[labels >= 0]).tolist():
        a, b = (int((labels[mask] == label).sum()) for mask in (train, test))
        if not (a and b):
            found.append(
                f"{printable(names[label] if label < len(names) else str(label))} ({a} train, {b} {part})"
            )
    return found
