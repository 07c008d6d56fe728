"""A source is a list of entries, one for each cloud, which can be read in any process."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jepa3d.data.arrays import clouds_in, facts_in
from jepa3d.data.cloud import PointCloud
from jepa3d.data.io import read

Columns = tuple[str, ...] | None  # as of `io.py::read`


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
    path: Path, key: str, label: str | None, split: str | None, columns: Columns = None
) -> list[Entry]:
    """The clouds of one file. Labels and splits in an array file take the place of the given ones.

    Raises ReadError.
    """
    count = clouds_in(path)
    if count is None:
        return [Entry(key, partial(read, path, None, columns), label, split)]
    facts = facts_in(path)
    given = {"label": label, "split": split, "names": None}
    found = [facts.get(name, [value] * count) for name, value in given.items()]
    rows = zip(*found, strict=True)
    return [
        Entry(f"{key}#{row}", partial(read, path, row), label, split, None, name, row)
        for row, (label, split, name) in enumerate(rows)
    ]
