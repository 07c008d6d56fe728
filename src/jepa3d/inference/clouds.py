"""Find the clouds at a path, and give each cloud an address: a text by which every command finds
the cloud again.
"""

import json
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
from jepa3d.data.store import Store, hash64, key_hash
from jepa3d.plain import log

# Suffix of a type of file that can hold many clouds -> regular expression of the text that selects
# one of them. This text is a row number, or in a few-shot fold (.pkl) the split and a row number.
_PARTS = dict.fromkeys(ARRAY_SUFFIXES, "0|[1-9][0-9]*")
_PARTS[".pkl"] = "(train|test)#[0-9]+"


@dataclass(frozen=True, slots=True)
class Address:
    """The place of one cloud. If a file holds only this cloud, the place is the file. Otherwise,
    `part` selects the cloud among those of a file or of a store (a dataset of `jepa3d prepare`).

    As text, an address is FILE, FILE#PART or STORE#PART. If there is a file whose whole name is
    this text, the text means that file, even if the name contains #. So if there is a file called
    FILE#PART, the address of the cloud PART in FILE is FILE/#PART. No file can have this name,
    since FILE is not a folder.
    """

    file: str  # absolute path of the file or store
    # the row in an array of clouds, the sample in a few-shot fold, or the key in a store; None if
    # the file holds only this cloud
    part: str | None = None

    def __str__(self) -> str:
        """Return the address as text. `parse` turns this text back into the address, provided that
        the file exists.
        """
        if self.part is None:
            return spelled(self.file)
        text = spelled(f"{self.file}#{self.part}")
        if Address.parse(text) == self:
            return text
        return spelled(f"{self.file}/#{self.part}")

    @staticmethod
    def parse(text: str | Path) -> "Address | None":
        """Return the address that a text means. If the file does not exist, or if the store has no
        such key, return None.

        Files are not opened. So an address is returned even if the file has no such row or holds no
        cloud at all.
        """
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
    def in_store(self) -> bool:
        """True for a cloud in a store."""
        return self.part is not None and is_store(self.file)

    def open(self) -> PointCloud:
        """Read the cloud. Raises ReadError if that fails."""
        if self.part is None:
            return read(self.file)
        if self.in_store:
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
    """One cloud, which is read only when needed."""

    path: str  # the cloud's address as text
    read: Callable[[], PointCloud]  # picklable
    stamp: int = 0  # a number that changes when the cloud changes, see `_stamp`
    label: str | None = None

    def turned(self, cloud: PointCloud, up_axis: str) -> np.ndarray:
        """Rotate a cloud to z-up; if `up_axis` is "none", do not rotate. Returns the points
        [N, 3].

        cloud: the result of `read`; for a mesh, points sampled from it. up_axis: the up axis of a
        file that does not define its own.
        """
        if up_axis == "none":
            return cloud.points
        return cloud.points @ TO_Z_UP[cloud.up or up_axis].T


def item_at(path: str | Path, label: str | None = None) -> Item:
    """Return the cloud at an address. Raises ReadError if its file or its key is missing."""
    address = Address.parse(path)
    if address is None:
        raise ReadError(f"{path}: no longer there")
    return Item(str(address), address.open, _stamp(address), label)


def find_clouds(
    *paths: str | Path, optional: Collection[str | Path] = ()
) -> tuple[list[Item], list[tuple[str, str]]]:
    """Find the clouds in files, folders and stores; each cloud is returned once.

    A path may also be the address of one cloud. Returns the clouds, and a pair (path, reason) for
    each file without a cloud. optional: paths at which there may be no cloud; such a path then gets
    a pair (path, reason) too. Raises ReadError for any other path without clouds.
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
    """Find the clouds at one path, see `find_clouds`."""
    if not os.path.exists(path):
        try:
            return [item_at(path)], []
        except ReadError:
            raise ReadError(f"{path}: no such file or folder") from None
    root = os.path.abspath(path)
    if is_store(root):
        store = _store(root)[0]
        names = (*store.class_names, None)
        items = []
        for row, label in enumerate(store.columns["label"]):
            at, stamp = Address(root, store.key(row)), _stored_stamp(store, row)
            items.append(Item(str(at), at.open, stamp, names[label]))
        return items, []
    source, items = discover(Path(root)), []
    for entry in source.entries:
        at, label = _address(entry, root), entry.label or entry.name
        items.append(Item(str(at), entry.read, _stamp(at), label))
    return items, source.skipped


def cloud_paths(path: str | Path) -> list[str]:
    """Return the addresses of the clouds in a file, a folder or a store, in the order in which
    `jepa3d.embed` returns their vectors.
    """
    return [item.path for item in find_clouds(path)[0]]


def _stamp(address: Address) -> int:
    """Return a number that changes when a cloud changes. For a cloud in a store, see
    `_stored_stamp`. For any other cloud, the number is a hash of the size and modification time of
    the cloud's file.
    """
    row = _row_of(address.file, str(address.part)) if address.in_store else None
    if row is not None:
        return _stored_stamp(_store(address.file)[0], row)
    try:
        status = os.stat(address.file)
    except OSError:
        return 0  # reading the file will report what is missing
    return hash64(f"{status.st_size} {status.st_mtime_ns}".encode())


def _stored_stamp(store: Store, row: int) -> int:
    """Return a hash of what a cloud in a store was made from: the content of its file, its up axis,
    its label and the settings of the store.
    """
    up, label = (int(store.columns[name][row]) for name in ("up", "label"))
    name = None if label < 0 else store.class_names[label]
    made_from = store.columns["content"][row].item(), up, name, store.header["settings"]
    return hash64(json.dumps(made_from, sort_keys=True).encode())


def log_left_out(skipped: list[tuple[str, str]]) -> None:
    """Log one line for each of the first five files without a cloud, and one line for the rest."""
    for path, reason in skipped[:5]:
        log.info(f"left out: {because(path, reason)}")
    if len(skipped) > 5:
        log.info(f"left out: {len(skipped) - 5:,} more files that hold no cloud")


def spelled(name: str) -> str:
    """Escape the bytes of a file name that are not UTF-8, since Parquet and terminals cannot
    represent them.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def original(name: str) -> str:
    r"""Undo `spelled`: turn the escapes \x80 to \xff of a file name into bytes again."""
    byte = r"\\x([89a-f][0-9a-f])"
    return re.sub(byte, lambda match: chr(0xDC00 + int(match[1], 16)), name)


def _address(entry: Entry, root: str) -> Address:
    """Return the address of an entry (data/entries.py) that was found at `root`, a folder or a
    file.
    """
    part = None if entry.row is None else str(entry.row)
    if os.path.isdir(root):
        return Address(os.path.join(root, entry.file), part)
    whole = entry.key == os.path.basename(root)
    return Address(root, part if part or whole else entry.key)


def is_store(path: str) -> bool:
    """Return whether a path is the folder of a store."""
    return os.path.isfile(os.path.join(path, "store.json"))


def _row_of(path: str, key: str) -> int | None:
    """Return the row of a key in the store at `path`, or None if the store has no such key."""
    _, hashes, order = _store(path)
    wanted = np.uint64(key_hash(key))
    at = int(np.searchsorted(hashes, wanted))
    return int(order[at]) if at < len(order) and hashes[at] == wanted else None


def _store(path: str) -> tuple[Store, np.ndarray, np.ndarray]:
    """Open a store. Returns the store, the sorted hashes of its keys, and the row of each hash."""
    return _opened(path, os.stat(os.path.join(path, "store.json")).st_mtime_ns)


@lru_cache(maxsize=4)
def _opened(path: str, changed: int) -> tuple[Store, np.ndarray, np.ndarray]:
    """Open a store, as `_store` does.

    changed: modification time of the store. It is part of the cache's key, so that a changed store
    is opened again.
    """
    store = Store(path)
    order = np.argsort(store.columns["key"], kind="stable")
    return store, np.asarray(store.columns["key"])[order], order
