"""What lies at a path: a published benchmark, anybody's own files, or one file."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from jepa3d.data import procedural
from jepa3d.data.archives import REFUSAL, is_archive
from jepa3d.data.benchmarks import MESH_COUNTS, benchmark_at, check_counts, fold_of
from jepa3d.data.boundary import boundary, printable
from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.entries import Entry, Source, entries_of
from jepa3d.data.io import SUFFIXES, refusal
from jepa3d.data.scans import NO_COLUMNS
from jepa3d.data.splits import classes_and_splits, split_of
from jepa3d.data.text import check_table


def discover(
    root: Path, variant: str | None = None, columns: tuple[str, ...] | None = None
) -> Source:
    """What lies at `root`: a benchmark, a folder of files, a file, or `procedural:COUNT`.

    Raises ReadError.
    """
    if count := procedural.count_of(root):
        return Source(
            "procedural",
            [Entry(str(i), partial(procedural.read, i), up_axis="z") for i in range(count)],
        )
    if root.suffix == ".pkl":
        source = fold_of(root)
    elif root.is_file() and is_archive(root):
        raise ReadError(f"{root}: {REFUSAL}")
    elif root.is_file():
        source = Source("file", entries_of(root, root.name, None, None, columns))
    else:
        source = benchmark_at(root, variant) or _files(root, variant, columns)
    if not source.entries:
        reason = f"; {source.skipped[0][0]}: {source.skipped[0][1]}" if source.skipped else ""
        raise ReadError(f"{root}: holds no cloud ({' '.join(SUFFIXES)}){reason}")
    return source


def _refuse(message: str) -> PointCloud:
    """What an entry does when read whose file was seen to be bad before."""
    raise ReadError(message)


def walk(
    root: Path, failed: Callable[[OSError], None]
) -> Iterable[tuple[Path, list[str], list[str]]]:
    """os.walk, sorted, through links to folders but never in a circle;

    `failed` gets what cannot be listed.
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


def _files(root: Path, variant: str | None, columns: tuple[str, ...] | None) -> Source:
    """Any tree of files; its folders are classes and splits: see splits.py."""
    entries, skipped, notes, part_names = [], [], [], ()
    inner, found_files = [], []

    def failed(error: OSError) -> None:
        skipped.append(
            (
                Path(error.filename).relative_to(root).as_posix(),
                f"cannot be read ({error.strerror})",
            )
        )

    for folder, folders, files in walk(root, failed):
        found = benchmark_at(folder, variant) if folder != root else None
        if found:
            at = folder.relative_to(root).as_posix()
            folders.clear()
            inner.append(found)
            entries += [replace(entry, key=f"{at}/{entry.key}") for entry in found.entries]
            skipped += [(f"{at}/{key}", reason) for key, reason in found.skipped]
            notes += [f"{at}: {found.layout}", *found.notes]
            part_names = part_names or found.part_names
            continue
        for name in files:
            path = folder / name
            key = path.relative_to(root).as_posix()
            why = REFUSAL if is_archive(path) else refusal(path)
            why = "written by macOS beside the file" if name.startswith("._") else why
            if why:
                skipped.append(
                    (key, "a few-shot fold is prepared by itself" if path.suffix == ".pkl" else why)
                )
                continue
            try:
                with boundary(path):
                    if path.suffix.lower() == ".txt":
                        check_table(path)
                    if path.suffix.lower() == ".bin" and columns is None:  # or a mesh's buffer
                        raise ReadError(NO_COLUMNS)
            except ReadError as error:  # a README is no damaged cloud
                skipped.append((key, str(error).removeprefix(f"{path}: ")))
                continue
            found_files.append((path, key))
    places = classes_and_splits([Path(key).parts[:-1] for _, key in found_files], flat=bool(inner))
    for (path, key), (name, split) in zip(found_files, places, strict=True):
        label = None if name is None else printable(name)  # it goes into JSON, Parquet and pictures
        try:
            entries += entries_of(path, key, label, split, columns)
        except ReadError as error:
            entries.append(Entry(key, partial(_refuse, str(error)), label, split))
    if len(inner) == 1 and len(entries) == len(
        inner[0].entries
    ):  # the benchmark in a folder of its archive
        return replace(inner[0], entries=entries, skipped=skipped)
    if both := sorted({entry.label for entry in entries if entry.label and split_of(entry.label)}):
        notes.append(f"folder {', '.join(both)}: taken as a class, not as a split")
    layout = "folder"
    if names := MESH_COUNTS.get(frozenset(entry.label for entry in entries)):
        layout = names[0]
        entries = [replace(entry, up_axis="z") for entry in entries]
        notes += check_counts(layout, entries, *names[1:])
    return Source(layout, entries, part_names, skipped, notes)
