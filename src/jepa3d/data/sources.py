"""Find what lies at a path: a published benchmark, a folder of files, or one file."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from jepa3d.data import procedural
from jepa3d.data.archives import REFUSAL, is_archive
from jepa3d.data.benchmarks import benchmark_at, check_sizes, fold_of, meshes_of
from jepa3d.data.cloud import ReadError
from jepa3d.data.entries import Columns, Entry, Source, entries_of
from jepa3d.data.errors import as_read_error, printable
from jepa3d.data.io import SUFFIXES, refusal
from jepa3d.data.scans import NO_COLUMNS
from jepa3d.data.splits import classes_and_splits, split_of
from jepa3d.data.text import check_table


def discover(root: Path, variant: str | None = None, columns: Columns = None) -> Source:
    """The clouds at `root`: a benchmark, a folder of files, a file, or `procedural:COUNT`.

    variant: of a benchmark that has several. columns: as of `io.py::read`. Raises ReadError if
    there is no cloud.
    """
    if count := procedural.count_of(root):
        readers = [partial(procedural.read, i) for i in range(count)]
        shapes = [Entry(str(i), read, up_axis="z") for i, read in enumerate(readers)]
        return Source("procedural", shapes)
    if root.suffix == ".pkl":
        source = fold_of(root)
    elif root.is_file() and is_archive(root):
        raise ReadError(f"{root}: {REFUSAL}")
    elif root.is_file():
        source = Source("file", entries_of(root, root.name, None, None, columns))
    else:
        source = benchmark_at(root, variant) or _files(root, variant, columns)
    if not source.entries:
        reason = f"; {': '.join(source.skipped[0])}" if source.skipped else ""
        raise ReadError(f"{root}: holds no cloud ({' '.join(SUFFIXES)}){reason}")
    return source


def walk(
    root: Path, failed: Callable[[OSError], None]
) -> Iterable[tuple[Path, list[str], list[str]]]:
    """Like os.walk, but sorted, and following links to folders without running in a circle.

    failed: called with the error of each folder that cannot be listed.
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


def _files(root: Path, variant: str | None, columns: Columns) -> Source:
    """Any tree of files; folders are classes and splits, as splits.py finds them."""
    entries, skipped, notes, part_names = [], [], [], ()
    benchmarks, paths = [], {}

    def failed(error: OSError) -> None:
        key = Path(error.filename).relative_to(root).as_posix()
        skipped.append((key, f"cannot be read ({error.strerror})"))

    for folder, folders, files in walk(root, failed):
        if folder != root and (found := benchmark_at(folder, variant)):
            at = folder.relative_to(root).as_posix()
            folders.clear()
            benchmarks.append(found)
            entries += [replace(one, key=f"{at}/{one.key}") for one in found.entries]
            notes += [f"{at}: {found.layout}", *found.notes]
            part_names = part_names or found.part_names
            continue
        for path in map(folder.joinpath, files):
            key = path.relative_to(root).as_posix()
            if reason := _no_cloud(path, columns):
                skipped.append((key, reason))
            else:
                paths[key] = path
    folders = [Path(key).parts[:-1] for key in paths]
    places = classes_and_splits(folders, flat=bool(benchmarks))
    for (key, path), (name, split) in zip(paths.items(), places, strict=True):
        label = name and printable(name)  # for JSON, Parquet and pictures
        try:
            entries += entries_of(path, key, label, split, columns)
        except ReadError as error:
            entries.append(Entry(key, partial(_refuse, str(error)), label, split))
    if len(benchmarks) == 1 and len(entries) == len(benchmarks[0].entries):
        # the folder of an archive with one benchmark in it
        return replace(benchmarks[0], entries=entries, skipped=skipped)
    classes = {entry.label for entry in entries}
    if both := sorted(label for label in classes if label and split_of(label)):
        notes.append(f"folder {', '.join(both)}: taken as a class, not as a split")
    layout = meshes_of(classes)
    if layout:
        entries = [replace(entry, up_axis="z") for entry in entries]
        notes += check_sizes(layout, entries)
    return Source(layout or "folder", entries, part_names, skipped, notes)


def _no_cloud(path: Path, columns: Columns) -> str | None:
    """Why a file of a folder is left out unread; None if it may be a cloud."""
    if path.name.startswith("._"):
        return "written by macOS beside the file"
    if path.suffix == ".pkl":
        return "a few-shot fold is prepared by itself"
    if reason := REFUSAL if is_archive(path) else refusal(path):
        return reason
    # a .bin may be the buffer of a mesh
    if path.suffix.lower() == ".bin" and columns is None:
        return NO_COLUMNS
    if path.suffix.lower() == ".txt":
        try:
            with as_read_error(path):
                check_table(path)
        except ReadError as error:  # a README, say
            return str(error).removeprefix(f"{path}: ")
    return None


def _refuse(message: str) -> NoReturn:
    """Raises a ReadError that was found before; stands for the reader of a bad file."""
    raise ReadError(message)
