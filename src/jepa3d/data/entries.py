"""A source of clouds is a list of entries, one a cloud; each knows how to read itself, also in
another process.
"""

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

    key: str  # unique in the source: path, and row of a file with many
    read: Callable[[], PointCloud]
    label: str | None = None
    split: str | None = None  # train, test or val
    up_axis: str | None = None  # where the layout's owner fixed one
    name: str | None = None  # of the cloud, where its file has names
    row: int | None = None  # in a file of many, whose key ends in #row

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
    skipped: list[tuple[str, str]] = field(
        default_factory=list
    )  # files that are no clouds: key, reason
    notes: list[str] = field(
        default_factory=list
    )  # what its reader should know, such as a wrong count

    @property
    def own(self) -> bool:
        """Somebody's own files, whose stray points are left out; a benchmark's clouds stay as
        published.
        """
        return self.layout in ("folder", "file")


def entries_of(
    path: Path, key: str, label: str | None, split: str | None, columns: tuple[str, ...] | None
) -> list[Entry]:
    """The clouds of one file; an array file's own labels and split, where it has them, win."""
    count = clouds_in(path)
    if count is None:
        return [Entry(key, partial(read, path, None, columns), label, split)]
    facts, entries = facts_in(path), []
    titles = facts.get("names", ())
    names = [_text(name) for name in facts.get("class_names", ())]
    for row in range(count):
        own, half = label, split
        if "label" in facts:
            own = _class_of(facts["label"][row], names, f"{path}: label of cloud {row}")
        if "split" in facts:
            number = int(facts["split"][row])
            if not 0 <= number < len(SPLITS):
                raise ReadError(
                    f"{path}: split must be 0 (train), 1 (test) or 2 (val), found {number}"
                )
            half = SPLITS[number]
        title = _text(titles[row]) if len(titles) == count else None
        entries.append(
            Entry(f"{key}#{row}", partial(read, path, row), own, half, name=title, row=row)
        )
    return entries


def _class_of(value: np.generic, names: list[str], where: str) -> str | None:
    """The class that a label of an array file means: a text, or a number; None for one below 0."""
    if value.dtype.kind in "US":
        return _text(value)
    number = int(value)
    if number < 0:
        return None
    if names and number >= len(names):
        raise ReadError(f"{where}: {number} is without class: there are {len(names)} names")
    return names[number] if names else str(number)


def _text(name: object) -> str:
    """A name in a file, which may be the bytes of HDF5, on one line."""
    return printable(
        name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)
    )
