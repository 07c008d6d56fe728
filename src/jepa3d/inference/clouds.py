"""Finds the clouds at a path, and gives each an address by which every command finds it again."""

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from jepa3d.data.arrays import ARRAY_SUFFIXES
from jepa3d.data.cloud import TO_Z_UP, PointCloud, ReadError
from jepa3d.data.entries import Entry
from jepa3d.data.errors import because
from jepa3d.data.io import read
from jepa3d.data.sources import discover
from jepa3d.data.store import Store, hash64
from jepa3d.plain import log

# Patterns of the parts of files of many clouds.
_PARTS = dict.fromkeys(ARRAY_SUFFIXES, "0|[1-9][0-9]*")
_PARTS[".pkl"] = "(train|test)#[0-9]+"


@dataclass(frozen=True, slots=True)
class Address:
    """The place of one cloud: a file, or a part of a file of many clouds or of a store.

    Written FILE, FILE#PART or STORE#PART. A text that is the name of an existing file means that
    file, even if the name has a #. Where FILE#PART is such a name, the part is written FILE/#PART,
    which cannot be the name of a file.
    """

    file: str  # absolute
    # The row in an array of clouds, the item of a few-shot fold, or the key in a store.
    part: str | None = None

    def __str__(self) -> str:
        """Text that `parse` turns back into this, as long as the files are there."""
        if self.part is None:
            return spelled(self.file)
        text = spelled(f"{self.file}#{self.part}")
        if Address.parse(text) == self:
            return text
        return spelled(f"{self.file}/#{self.part}")

    @staticmethod
    def parse(text: str | Path) -> "Address | None":
        """The address that a text means, or None if there is no cloud."""
        for spelling in dict.fromkeys((str(text), original(str(text)))):
            path = os.path.abspath(spelling)
            if os.path.exists(path):
                return Address(path)
            for sign in reversed([match.start() for match in re.finditer("#", path)]):
                file, part = path[:sign].removesuffix("/"), path[sign + 1 :]
                if is_store(file):
                    found = _row_of(file, part) is not None
                else:
                    parts = _PARTS.get(os.path.splitext(file)[1].lower(), "(?!)")
                    found = re.fullmatch(parts, part) and os.path.isfile(file)
                if found:
                    return Address(file, part)
        return None

    @property
    def z_up(self) -> bool:
        """True for a stored cloud, which has z up whatever the up axis of files is."""
        return self.part is not None and is_store(self.file)

    def open(self) -> PointCloud:
        """Read the cloud. Raises ReadError."""
        if self.part is None:
            return read(self.file)
        if is_store(self.file):
            if (row := _row_of(self.file, self.part)) is None:
                raise ReadError(f"{self}: no longer there")
            return _store(self.file)[0].cloud(row)
        if self.part.isdigit():
            return read(self.file, int(self.part))
        for entry in discover(Path(self.file)).entries:
            if entry.key == self.part:
                return entry.read()
        raise ReadError(f"{self}: no longer there")


@dataclass(frozen=True, slots=True)
class Item:
    """One cloud, which is read when it is needed."""

    path: str  # its address as text
    read: Callable[[], PointCloud]  # picklable
    stamp: int = 0  # differs when its file changed
    label: str | None = None
    z_up: bool = False  # True for a stored cloud, whatever the up axis of files is

    def turned(self, cloud: PointCloud, up_axis: str) -> np.ndarray:
        """The points N 3 of this cloud, as read or sampled, with z up; "none": as they are."""
        if self.z_up or up_axis == "none":
            return cloud.points
        return cloud.points @ TO_Z_UP[cloud.up or up_axis].T


def item_at(path: str | Path, label: str | None = None) -> Item:
    """The cloud at an address. Raises ReadError if there is none."""
    address = Address.parse(path)
    if address is None:
        raise ReadError(f"{path}: no longer there")
    return Item(str(address), address.open, _stamp(address), label, address.z_up)


def find_clouds(
    *paths: str | Path, optional: Collection[str | Path] = ()
) -> tuple[list[Item], list[tuple[str, str]]]:
    """Find the clouds in files, folders and stores, each once, and the files there that hold none.

    A path may also be the address of one cloud. Files without a cloud come as (path, reason).
    optional: paths that may have no cloud; they are then listed like these files. Raises ReadError
    for any other path without a cloud.
    """
    items: dict[str, Item] = {}
    skipped: dict[str, str] = {}
    for path in paths:
        try:
            found, others = _clouds_at(path)
        except ReadError as error:
            if path not in optional:
                raise
            skipped[str(path)] = str(error)
            continue
        items |= {item.path: item for item in found}
        skipped |= {os.path.join(path, key): reason for key, reason in others}
    return list(items.values()), list(skipped.items())


def _clouds_at(path: str | Path) -> tuple[list[Item], list[tuple[str, str]]]:
    if not os.path.exists(path):
        try:
            return [item_at(path)], []
        except ReadError:
            raise ReadError(f"{path}: no such file or folder") from None
    root = os.path.abspath(path)
    if is_store(root):
        store = _store(root)[0]
        names = (*store.class_names, None)
        columns = zip(store.columns["content"], store.columns["label"], strict=True)
        items = []
        for row, (content, label) in enumerate(columns):
            at = Address(root, store.key(row))
            items.append(Item(str(at), at.open, int(content), names[label], True))
        return items, []
    source, items = discover(Path(root)), []
    for entry in source.entries:
        at, label = _address(entry, root), entry.label or entry.name
        items.append(Item(str(at), entry.read, _stamp(at), label))
    return items, source.skipped


def cloud_paths(path: str | Path) -> list[str]:
    """The paths of the clouds in a file, a folder or a store, in the order of `embed`."""
    return [item.path for item in find_clouds(path)[0]]


def _stamp(address: Address) -> int:
    """A number that differs when a cloud changed: of a stored cloud its content, else a hash of the
    size and time of change of its file.
    """
    if address.z_up and (row := _row_of(address.file, str(address.part))) is not None:
        return int(_store(address.file)[0].columns["content"][row])
    try:
        status = os.stat(address.file)
    except OSError:
        return 0  # its reader says what is missing
    return hash64(f"{status.st_size} {status.st_mtime_ns}".encode())


def log_left_out(skipped: list[tuple[str, str]]) -> None:
    """Log a line for each of the first five files without a cloud, and one for all others."""
    for path, reason in skipped[:5]:
        log.info(f"left out: {because(path, reason)}")
    if len(skipped) > 5:
        log.info(f"left out: {len(skipped) - 5:,} more that hold no cloud")


def spelled(name: str) -> str:
    """A file name that is not UTF-8 with its bytes spelled out, as Parquet and terminals need it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def original(name: str) -> str:
    r"""A name that `spelled` wrote, with its bytes again: \xff and so on, from 80 upwards."""
    byte = r"\\x([89a-f][0-9a-f])"
    return re.sub(byte, lambda match: chr(0xDC00 + int(match[1], 16)), name)


def _address(entry: Entry, root: str) -> Address:
    """Where an entry of the folder or file `root` lies."""
    part = None if entry.row is None else str(entry.row)
    if os.path.isdir(root):
        return Address(os.path.join(root, entry.file), part)
    whole = entry.key == os.path.basename(root)
    return Address(root, part if part or whole else entry.key)


def is_store(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "store.json"))


def _row_of(path: str, key: str) -> int | None:
    _, hashes, order = _store(path)
    wanted = hash64(key.encode("utf-8", "surrogateescape"))
    at = int(np.searchsorted(hashes, np.uint64(wanted)))
    return int(order[at]) if at < len(order) and hashes[at] == wanted else None


def _store(path: str) -> tuple[Store, np.ndarray, np.ndarray]:
    """A store, the sorted hashes of its keys, and the row of each."""
    return _opened(path, os.stat(os.path.join(path, "store.json")).st_mtime_ns)


@lru_cache(maxsize=4)
def _opened(path: str, changed: int) -> tuple[Store, np.ndarray, np.ndarray]:
    store = Store(path)
    order = np.argsort(store.columns["key"], kind="stable")
    return store, np.asarray(store.columns["key"])[order], order
