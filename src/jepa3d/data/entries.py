"""What a source is: a list of entries, one for each cloud, that can be read in any process."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from jepa3d.data.arrays import clouds_in, facts_in
from jepa3d.data.boundary import printable
from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.io import read
from jepa3d.data.store import SPLITS


@dataclass(frozen=True, slots=True)
class Entry:
    """One cloud of a source."""

    key: str  # unique in the source: the path and, in a file of many clouds, the row
    read: Callable[[], PointCloud]
    label: str | None = None
    split: str | None = None  # train, test or val
    up_axis: str | None = None  # where the layout's owner fixed one
    name: str | None = None  # of the cloud, where its file has names
    row: int | None = None  # in a file of many clouds, whose key ends in #row

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
        """True of people's own files: their stray points are left out; those of a benchmark stay."""
        return self.layout in ("folder", "file")


def entries_of(
    path: Path, key: str, label: str | None, split: str | None, columns: tuple[str, ...] | None
) -> list[Entry]:
    """The clouds of one file; an array file's own labels and split, where it has them, win."""
    count = clouds_in(path)
    if count is None:
        return [Entry(key, partial(read, path, None, columns), label, split)]
    facts = facts_in(path)
    labels, splits = [label] * count, [split] * count
    if "label" in facts:
        classes = [_text(name) for name in facts.get("class_names", ())]
        labels = [_class_of(value, classes, path) for value in facts["label"]]
    if "split" in facts:
        numbers = facts["split"].tolist()
        if wrong := [number for number in numbers if not 0 <= number < len(SPLITS)]:
            allowed = "split must be 0 (train), 1 (test) or 2 (val)"
            raise ReadError(f"{path}: {allowed}, found {wrong[0]}")
        splits = [SPLITS[number] for number in numbers]
    names: list = [_text(name) for name in facts.get("names", ())]
    names = names if len(names) == count else [None] * count
    return [
        Entry(f"{key}#{i}", partial(read, path, i), labels[i], splits[i], None, names[i], i)
        for i in range(count)
    ]


def _class_of(value: np.generic, names: list[str], path: Path) -> str | None:
    """The class that a label of an array file means: a text, or a number; None for one below 0."""
    if value.dtype.kind in "US":
        return _text(value)
    number = int(value)
    if number < 0:
        return None
    if names and number >= len(names):
        raise ReadError(f"{path}: label {number} without class: there are {len(names)} names")
    return names[number] if names else str(number)


def _text(name: object) -> str:
    """A name in a file, which may be the bytes of HDF5, on one line."""
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)
    return printable(text)
