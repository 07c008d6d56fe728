"""Which clouds lie at a path, and the address of each, by which every command finds it again."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from jepa3d.data.arrays import ARRAY_SUFFIXES
from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.entries import Entry
from jepa3d.data.errors import left_out
from jepa3d.data.io import read
from jepa3d.data.sources import discover
from jepa3d.data.store import Store, hash64

_PARTS = {".pkl": "(train|test)#[0-9]+"} | dict.fromkeys(
    ARRAY_SUFFIXES, "0|[1-9][0-9]*"
)  # of files of many clouds


@dataclass(frozen=True, slots=True)
class Address:
    """Where one cloud lies: a file, or one of those in a file of many or in a store.

    Written FILE, FILE#PART or STORE#PART. What exists under the whole text is meant first, so a
    file whose name has a # is that file; FILE/#PART is never the name of a file, and is written
    where FILE#PART is one.
    """

    file: str  # absolute
    part: str | None = (
        None  # the row in an array of clouds, the item of a few-shot fold, or the key in a store
    )

    def __str__(self) -> str:
        """Text that `parse` turns back into this, as long as the files are there."""
        if self.part is None:
            return spelled(self.file)
        text = spelled(f"{self.file}#{self.part}")
        return text if Address.parse(text) == self else spelled(f"{self.file}/#{self.part}")

    @staticmethod
    def parse(text: str | Path) -> "Address | None":
        """The address that a text means, or None where nothing is there."""
        for spelling in dict.fromkeys((str(text), _original(str(text)))):
            path = os.path.abspath(spelling)
            if os.path.exists(path):
                return Address(path)
            for sign in reversed([match.start() for match in re.finditer("#", path)]):
                file, part = path[:sign].removesuffix("/"), path[sign + 1 :]
                if is_store(file):
                    if _row_of(file, part) is not None:
                        return Address(file, part)
                elif re.fullmatch(
                    _PARTS.get(os.path.splitext(file)[1].lower(), "(?!)"), part
                ) and os.path.isfile(file):
                    return Address(file, part)
        return None

    @property
    def z_up(self) -> bool:
        """True of a stored cloud, whatever is said of files."""
        return self.part is not None and is_store(self.file)

    def open(self) -> PointCloud:
        """The cloud. Raises ReadError."""
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
    """One cloud to embed."""

    path: str  # its address as text
    read: Callable[[], PointCloud]  # picklable
    stamp: int = 0  # differs when its file changed
    label: str | None = None
    z_up: bool = False


def item_at(path: str | Path, label: str | None = None) -> Item:
    """The one cloud that a text means. Raises ReadError where nothing is there."""
    address = Address.parse(path)
    if address is None:
        raise ReadError(f"{path}: no longer there")
    return Item(str(address), address.open, _stamp(address), label, address.z_up)


def items_of(path: Path) -> list[Item]:
    """The clouds of a file, folder or store, or that of an address. Raises ReadError."""
    return listed(path)[0]


def listed(path: Path) -> tuple[list[Item], list[tuple[str, str]]]:
    """The clouds as of `items_of`, and the files there that are none, each with the reason.

    Raises ReadError.
    """
    if not os.path.exists(path):
        try:
            return [item_at(path)], []
        except ReadError:
            raise ReadError(f"{path}: no such file or folder") from None
    root = os.path.abspath(path)
    if is_store(root):
        store = _store(root)[0]
        names, content = (*store.class_names, None), store.columns["content"]
        addresses = [Address(root, store.key(row)) for row in range(len(store))]
        labels = [names[number] for number in store.columns["label"]]
        return [
            Item(str(address), address.open, int(stamp), label, True)
            for address, stamp, label in zip(addresses, content, labels, strict=True)
        ], []
    found, items = discover(Path(root)), []
    for entry in found.entries:
        address = _address(entry, root)
        items.append(Item(str(address), entry.read, _stamp(address), entry.label or entry.name))
    return items, found.skipped


def _stamp(address: Address) -> int:
    """What differs when a cloud changed: of a stored one its content, else size and time of change
    of its file.
    """
    if address.z_up and (row := _row_of(address.file, str(address.part))) is not None:
        return int(_store(address.file)[0].columns["content"][row])
    try:
        status = os.stat(address.file)
    except OSError:
        return 0  # its reader says what is missing
    return hash64(f"{status.st_size} {status.st_mtime_ns}".encode())


def show_left_out(skipped: list[tuple[str, str]]) -> None:
    """A line for each of the first five files that are no clouds, and one for all others."""
    for key, reason in skipped[:5]:
        print(left_out(key, reason))
    if len(skipped) > 5:
        print(f"left out: {len(skipped) - 5:,} more that are no clouds")


def cloud_paths(path: str | Path) -> list[str]:
    """The paths of the clouds in a file, a folder or a store, as `embed` takes them."""
    return [item.path for item in items_of(Path(path))]


def open_cloud(path: str) -> tuple[PointCloud, bool]:
    """The cloud of a `path` that `items_of` gave, and whether it is z-up whatever its file.

    Raises ReadError.
    """
    item = item_at(path)
    return item.read(), item.z_up


def spelled(name: str) -> str:
    """A file name that is not UTF-8 with its bytes spelled out, as Parquet and terminals need it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _original(name: str) -> str:
    r"""A name that `spelled` wrote, with its bytes again: \xff and so on, from 80 upwards."""
    return re.sub(r"\\x([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), name)


def _address(entry: Entry, root: str) -> Address:
    """Where an entry of the folder or file `root` lies."""
    part = None if entry.row is None else str(entry.row)
    if os.path.isdir(root):
        return Address(os.path.join(root, entry.file), part)
    return Address(root, part if part or entry.key == os.path.basename(root) else entry.key)


def is_store(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "store.json"))


def _row_of(path: str, key: str) -> int | None:
    _, hashes, order = _store(path)
    wanted = hash64(key.encode("utf-8", "surrogateescape"))
    at = int(np.searchsorted(hashes, np.uint64(wanted)))
    return int(order[at]) if at < len(order) and hashes[at] == wanted else None


def _store(path: str) -> tuple[Store, np.ndarray, np.ndarray]:
    """A store, the hashes of its keys in order, and their rows."""
    return _opened(path, os.stat(os.path.join(path, "store.json")).st_mtime_ns)


@lru_cache(maxsize=4)
def _opened(path: str, changed: int) -> tuple[Store, np.ndarray, np.ndarray]:
    store = Store(path)
    order = np.argsort(store.columns["key"], kind="stable")
    return store, np.asarray(store.columns["key"])[order], order
