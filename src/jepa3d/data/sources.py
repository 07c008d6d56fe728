"""Find the clouds at a path: a published benchmark, a folder of files, or one file.

Only `jepa3d prepare` unpacks archives, since it copies the clouds to a store (store.py); other
commands refuse archives.
"""

import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from jepa3d.data import procedural
from jepa3d.data.benchmarks import benchmark_at, check_sizes, fold_of, meshes_of
from jepa3d.data.cloud import ReadError
from jepa3d.data.entries import Entry, Source, classes_and_splits, entries_of, split_of
from jepa3d.data.errors import as_read_error, check_unpacked, first_line, refuse
from jepa3d.data.io import SUFFIXES, refusal
from jepa3d.data.scans import NO_COLUMNS
from jepa3d.data.text import Table
from jepa3d.plain import log, printable

_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz")
# An archive may unpack to at most 100 times its size, or to 1 GiB if that is more. A larger total
# is refused, since damaged and malicious archives can claim any size.
_MOST = 100, 1 << 30
REFUSAL = "is an archive; unpack it first, or make a store from it with jepa3d prepare"
# what Python raises for damaged archives
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    RuntimeError,
)


def discover(
    root: Path,
    variant: str | None = None,
    columns: tuple[str, ...] | None = None,
    reader: str | None = None,
) -> Source:
    """Find the clouds at `root`: a benchmark, a folder of files, a file, or `procedural:COUNT`.

    variant: name of the variant, if a benchmark has several. columns, reader: as for
    `io.py::read`; with a reader, no folder is treated as a benchmark. Raises ReadError if there is
    no cloud, if `root` is an archive, if COUNT is not a positive number, if a few-shot fold (.pkl)
    cannot be read, or as `benchmarks.py::benchmark_at` does.
    """
    if count := procedural.count_of(root):
        readers = [partial(procedural.read, i) for i in range(count)]
        shapes = [Entry(str(i), read, up_axis="z") for i, read in enumerate(readers)]
        return Source("procedural", shapes)
    if root.is_file() and (reader or root.suffix != ".pkl"):
        if is_archive(root):
            raise ReadError(f"{root}: {REFUSAL}")
        source = Source("file", entries_of(root, root.name, None, None, columns, reader))
    elif root.suffix == ".pkl":
        source = fold_of(root)
    elif reader or not (source := benchmark_at(root, variant)):
        source = _files(root, variant, columns, reader)
    if not source.entries:
        reason = f"; {': '.join(source.skipped[0])}" if source.skipped else ""
        raise ReadError(f"{root}: has no cloud to read ({' '.join(SUFFIXES)}){reason}")
    return source


def walk(
    root: Path, failed: Callable[[OSError], None]
) -> Iterable[tuple[Path, list[str], list[str]]]:
    """Walk a tree of folders like os.walk, but in sorted order.

    Links to folders are followed, but no folder is entered twice. failed: called with the
    error of each folder that cannot be listed.
    """
    seen = set()
    for folder, folders, files in os.walk(root, onerror=failed, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield Path(folder), folders, sorted(files)


def _files(root: Path, variant: str | None, columns: Any, reader: str | None) -> Source:
    """Find the clouds in a tree of files, and their classes and splits from the names of folders.

    If a folder below `root` holds a published benchmark, the benchmark's own classes and splits are
    used. With the user's own reader, no folder is treated as a benchmark. columns, reader: as for
    `io.py::read`.
    """
    entries, skipped, notes, part_names = [], [], [], ()
    benchmarks, paths = [], {}

    def failed(error: OSError) -> None:
        key = Path(error.filename).relative_to(root).as_posix()
        skipped.append((key, f"cannot be read ({error.strerror})"))

    for folder, folders, files in walk(root, failed):
        # with the user's own reader, no folder is treated as a benchmark
        if folder != root and not reader and (found := benchmark_at(folder, variant)):
            at = folder.relative_to(root).as_posix()
            folders.clear()
            benchmarks.append(found)
            entries += [replace(one, key=f"{at}/{one.key}") for one in found.entries]
            notes += [f"{at}: {found.layout}", *found.notes]
            part_names = part_names or found.part_names
            continue
        for path in map(folder.joinpath, files):
            key = path.relative_to(root).as_posix()
            if reason := _no_cloud(path, columns, reader):
                skipped.append((key, reason))
            else:
                paths[key] = path
    folders = [Path(key).parts[:-1] for key in paths]
    places = classes_and_splits(folders, flat=bool(benchmarks))
    for (key, path), (name, split) in zip(paths.items(), places, strict=True):
        # labels must be printable, since they go into JSON, Parquet and pictures
        label = name and printable(name)
        try:
            entries += entries_of(path, key, label, split, columns, reader)
        except ReadError as error:
            entries.append(Entry(key, partial(refuse, str(error)), label, split))
    if len(benchmarks) == 1 and len(entries) == len(benchmarks[0].entries):
        # All clouds belong to one benchmark in a folder below `root`, which is typical of an
        # unpacked archive. So the source is treated as this benchmark.
        return replace(benchmarks[0], entries=entries, skipped=skipped)
    classes = {entry.label for entry in entries}
    if both := sorted(label for label in classes if label and split_of(label)):
        notes.append(f"folder {', '.join(both)}: taken as a class, not as a split")
    if layout := meshes_of(classes):
        entries = [replace(entry, up_axis="z") for entry in entries]
        notes += check_sizes(layout, entries)
    return Source(layout or "folder", entries, part_names, skipped, notes)


def _no_cloud(path: Path, columns: Any, reader: str | None) -> str | None:
    """Return why a file in a folder cannot be a cloud; None if it may be a cloud."""
    if path.name.startswith("._"):
        return "is a metadata file of macOS"
    if reader:
        return None
    if path.suffix == ".pkl":
        return "is a few-shot fold; give its own path to jepa3d prepare"
    if reason := REFUSAL if is_archive(path) else refusal(path):
        return reason
    # if `columns` is None, a .bin file is left out; it may be the buffer of a glTF mesh beside it
    if path.suffix.lower() == ".bin" and columns is None:
        return NO_COLUMNS
    if path.suffix.lower() == ".txt":
        try:
            with as_read_error(path):
                Table(path)
        except ReadError as error:  # the file is, for example, a README
            return str(error).removeprefix(f"{path}: ")
    return None


def is_archive(path: Path) -> bool:
    """Tell from its name if a file is an archive; a compressed single file (a.ply.gz) is not."""
    return path.suffix.lower() in _SUFFIXES and refusal(path) is not None


@contextmanager
def unpacked(source: Path, out: Path) -> Iterator[Path]:
    """Unpack an archive to a temporary folder beside `out`; yield the folder, then remove it.

    Any other source is yielded as it is. The caller must hold the lock of `out` (locking.py).
    Raises ReadError for an archive that is damaged, that would unpack to more bytes than `_MOST`
    allows or than the disk has free, or that would write outside its folder.
    """
    if not (source.is_file() and is_archive(source)):
        yield source
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # The caller holds the lock, so no other command uses these folders: a killed command left them.
    for left in out.parent.glob(f".{escape(out.name)}.unpacked-*"):
        shutil.rmtree(left)
    made = tempfile.mkdtemp(prefix=f".{out.name}.unpacked-", dir=out.parent)
    folder = Path(made).resolve()
    unpack = _unzip if source.suffix.lower() == ".zip" else _untar
    try:
        log.info(f"unpacking {printable(str(source))}")
        try:
            unpack(source, folder)
        except _DAMAGE as error:
            raise ReadError(f"{source}: bad archive ({first_line(error)})") from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unzip(source: Path, folder: Path) -> None:
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            if not (folder / name).resolve().is_relative_to(folder):
                raise ReadError(f"{source}: {name!r} would be unpacked outside its folder")
        _check_size(source, folder, sum(m.file_size for m in archive.infolist()))
        archive.extractall(folder)


def _untar(source: Path, folder: Path) -> None:
    """Unpack the members of an archive one by one, each after a check of the total size."""
    with tarfile.open(source) as archive:
        total = 0
        for member in archive:
            total += member.size
            _check_size(source, folder, total)
            archive.extract(member, folder, filter="data")
        # tarfile takes a damaged header for the end of the archive, but the end is a block of zeros
        archive.fileobj.seek(archive.offset)
        if any(archive.fileobj.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("damaged header")
        # The checksum of a .gz stands at its end, where nothing is read otherwise.
        while rest := archive.fileobj.read(1 << 20):
            total += len(rest)
            _check_size(source, folder, total)


def _check_size(source: Path, folder: Path, total: int) -> None:
    """Raise ReadError if `total`, the size of all unpacked files in bytes, is more than `_MOST`
    allows or than the disk has free.
    """
    with as_read_error(source):
        check_unpacked(source, total, *_MOST)
        if total > (free := shutil.disk_usage(folder).free):
            raise ReadError(f"unpacks to {total:,} bytes, but only {free:,} are free")
