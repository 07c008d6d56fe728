"""Implement `jepa3d prepare`, which converts a download or a folder of files to a store.

A store is a data set on disk in the format of store.py. By default, the command uses all cores. It
prints which files were left out and why, and writes the complete list to report.json.
"""

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jepa3d.data import procedural
from jepa3d.data.cloud import ATTRIBUTES, TO_Z_UP, ReadError, check_cloud, to_parts
from jepa3d.data.entries import Entry, Source, divide, lacking
from jepa3d.data.parallel import mapped
from jepa3d.data.sources import discover, unpacked
from jepa3d.data.store import SPLITS, Store, StoreWriter, hash64, key_hash
from jepa3d.frame import LEAST, are_kept
from jepa3d.locking import writing
from jepa3d.plain import load_code, log, printable, to_dict, write_bytes

_MESH_POINTS = 8192  # number of points sampled from a mesh with --points all
# number of entries (clouds that are not read yet) that a process gets at a time
_CHUNK = 8
_SHOWN = 40  # largest number of left-out files that are printed; report.json lists all
Attribute = Literal["normals", "colors", "parts"]


@dataclass(frozen=True)
class Preparation:
    """Settings of a store.

    The settings are saved in the store, and clouds can be added later only with equal settings.
    """

    points: int | None = 2048  # number of points of each cloud; None keeps all points
    reduce: Literal["fps", "random", "voxel"] = "fps"
    # a cloud with fewer than `points` points is left out (skip), or filled up with copies of its
    # points that are moved a little, see `frame.py::fill` (repeat)
    short: Literal["skip", "repeat"] = "repeat"
    # up axis in the files; None means the axis that the benchmark or format defines, or else z
    up_axis: Literal["x", "y", "z"] | None = None
    unit: str | None = None  # unit of the coordinates in the files; only recorded
    # "folder" (the splits of the source), the fraction of each class that goes into the test split,
    # or a file that lists the test clouds
    split: str = "folder"
    keep: tuple[Attribute, ...] = ()  # attributes of points to keep in the store
    precision: Literal["float32", "float16"] = "float32"
    variant: str | None = None  # variant of a benchmark that has several
    columns: tuple[str, ...] | None = None  # names of columns, as for `io.py::read`
    seed: int = 0
    # True keeps stray points, which lie far from all others (`frame.py::without_strays` has the
    # rule); always True for benchmarks and for procedural shapes. If `points` is None, stray points
    # are kept in any case.
    keep_strays: bool = False
    reader: str | None = None  # function that reads the files: package.module:function


def prepare(
    source: Path, out: Path, options: Preparation, workers: int = 0, strict: bool = False
) -> list[Path]:
    """Write the clouds of `source` to the store `out`.

    source: a folder, file or archive, or procedural:COUNT. If the store exists, complete or not,
    only the clouds that it lacks are added. A folder with few-shot folds of ModelNet40 (files such
    as 5way_10shot/0.pkl) becomes one store per fold in the folder `out`. workers: number of
    processes, 0 for one per core. strict: stop at the first cloud that cannot be used. Returns the
    paths of the stores.

    Raises ReadError if the source is missing or cannot be read, or if none of its clouds can be
    used. With `strict`, already the first cloud that cannot be used raises ReadError. Raises
    ValueError for wrong arguments, if the store exists with other settings, or if another command
    is writing to `out`.
    """
    _check(options, workers)
    if not source.exists() and not procedural.count_of(source):
        raise ReadError(f"{source}: no such file or folder")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out}: lies in the source {source}; choose another --out")
    with writing(out), unpacked(source, out) as root:
        folds = sorted(root.glob("**/*way_*shot/*.pkl")) if root.is_dir() else []
        if root.is_dir() and root.resolve().match("*way_*shot"):
            folds += sorted(root.glob("*.pkl"))
        stores = {fold: out / fold.relative_to(root).with_suffix("") for fold in folds}
        pairs = (stores or {root: out}).items()
        return [_prepare_one(*pair, options, workers, strict) for pair in pairs]


def _check(options: Preparation, workers: int) -> None:
    if options.points is not None and options.points < 1:
        raise ValueError(f"--points {options.points}: give 'all', or 1 or more")
    if options.columns is not None and len(options.columns) < 3:
        needed = "give the three names of the x, y and z columns, or all names"
        raise ValueError(f"--columns {' '.join(options.columns)}: {needed}")
    if options.reader is not None:
        load_code(options.reader)
    if workers < 0:
        raise ValueError(f"--workers {workers}: give 1 or more, or 0 for one per core")


def _prepare_one(root: Path, out: Path, options: Preparation, workers: int, strict: bool) -> Path:
    source = discover(root, options.variant, options.columns, options.reader)
    entries = divide(source.entries, options.split, options.seed)
    keep: tuple[Attribute, ...] = tuple(sorted(options.keep, key=ATTRIBUTES.index))
    if not keep and source.part_names and source.layout != "folder":
        keep = ("parts",)
    keep_strays = options.keep_strays or not source.unpublished
    options = replace(options, keep=keep, keep_strays=keep_strays)
    if options.up_axis is None and any(entry.up_axis is None for entry in entries):
        log.info("files are read as z-up, glTF as y-up; if that is wrong, give --up-axis")
    for note in (f"{root}: {source.layout}, {len(entries):,} clouds", *source.notes):
        log.info(printable(note))
    names = tuple(sorted({entry.label for entry in entries if entry.label is not None}))
    parts = source.part_names if "parts" in options.keep else ()
    report = _Report(source, options.points or 0)
    with StoreWriter(out, to_dict(options), names, parts) as writer:
        known = set(writer.keys().tolist())
        new = [entry for entry in entries if key_hash(entry.key) not in known]
        work = partial(_convert_all, options)
        results = mapped(work, new, _CHUNK, workers, "preparing", __name__)
        try:
            for entry, result in results:
                if isinstance(result, str):
                    path = root / entry.file if root.is_dir() else root
                    reason = result.removeprefix(f"{path}: ")
                    source.skipped.append((entry.key, reason))
                    if strict:
                        raise ReadError(f"{path}: {reason} (--strict)")
                    continue
                arrays, row = result
                report.add(entry, row)
                row |= {"label": entry.label, "split": entry.split}
                writer.add(entry.key, arrays, **row)
        except KeyboardInterrupt:
            kept = f"stopped after {report.taken.total():,} new clouds, which are saved"
            raise KeyboardInterrupt(f"{kept}; run again to continue") from None
        finally:
            report.write(out)
    report.show(out, len(entries) - len(new))
    if not (out / "store.json").is_file():
        reason = ": ".join(source.skipped[-1])
        raise ReadError(f"{root}: none of its clouds can be used; {reason}")
    _show_lacking(Store(out))
    return out


# ---------------------------------------------------------------------------------------- one cloud


Arrays, Row = dict[str, np.ndarray], dict[str, Any]


def convert(entry: Entry, options: Preparation) -> tuple[Arrays, Row]:
    """Read the cloud of an entry, and convert it for a store.

    Returns the arrays of the cloud (points and attributes) and its row in the store's index. The
    row still lacks label and split. Four of its values are not stored; only `_Report.add` uses
    them:

    - part: a sentence, if only a sample of the file's points was read, else None
    - unseen: number of NaN points that were left out
    - count: number of points before stray points were removed
    - strays: number of stray points that were removed

    Raises ReadError if the cloud cannot be used.
    """
    cloud = entry.cloud()
    faces = b"" if cloud.faces is None else cloud.faces.tobytes()
    content = hash64(cloud.points.tobytes() + faces)
    row: Row = {"part": cloud.part_read, "unseen": cloud.unseen, "content": content}
    # the seed does not depend on the key, so that equal files give equal clouds
    count, seed = options.points, options.seed
    if cloud.faces is not None:
        # twice the number of points that are kept, so that farthest point sampling can choose
        # evenly spread points
        cloud = cloud.sampled(2 * count if count else _MESH_POINTS, seed)
    row["count"] = len(cloud)
    if missing := [name for name in options.keep if getattr(cloud, name) is None]:
        raise ReadError(f"has no {missing[0]} to keep (--keep)")
    if count and len(cloud) < count and options.short == "skip":
        raise ReadError(f"{len(cloud)} points, fewer than {count} (--points, --short skip)")
    up = options.up_axis or cloud.up or "z"
    if count and not options.keep_strays:
        cloud = cloud.take(are_kept(cloud.points.astype(np.float64), LEAST))
    row["strays"] = row["count"] - len(cloud)
    cloud = cloud.normalised()
    if count and len(cloud) < count:
        cloud = cloud.filled(count)
    elif count and (len(cloud) > count or options.reduce == "fps"):
        cloud = cloud.reduced(count, options.reduce, seed)
    check_cloud(cloud.points, "after sampling: ")
    cloud = cloud.normalised()
    rotate = TO_Z_UP[up].T
    points = cloud.points @ rotate
    arrays = {"points": points.astype(options.precision)}
    _check_rounding(points, arrays["points"])
    arrays |= {name: getattr(cloud, name) for name in options.keep}
    if "normals" in arrays:
        arrays["normals"] = (arrays["normals"] @ rotate).astype(np.float16)
    if "parts" in arrays:
        arrays["parts"] = to_parts(arrays["parts"])
        if (arrays["parts"] < 0).all():
            raise ReadError("none of its points has a part label (--keep parts)")
    return arrays, row | {"up": up, "frame": (*cloud.origin, cloud.scale)}


def _check_rounding(points: np.ndarray, rounded: np.ndarray) -> None:
    """Raise ReadError if rounding to float16 moves points by over 1 % of the cloud's extent.

    points: [n, 3], in the unit sphere. rounded: the same points as they will be stored. The median
    distance by which rounding moves a point is compared with the median distance of a point from
    the middle of the cloud. Rounding moves the points too far if one point is so far out that, in
    the unit sphere, all other points lie very close together.
    """
    error = np.median(np.linalg.norm(rounded.astype(np.float32) - points, axis=1))
    extent = np.median(np.linalg.norm(points - np.median(points, 0), axis=1))
    if error > 0.01 * extent:
        reason = "one far point sets its scale; remove it or use --precision float32"
        raise ReadError(f"float16 moves its points by over 1 % of its extent: {reason}")


def _convert_all(options: Preparation, entries: list[Entry]) -> list[tuple | str]:
    """Convert entries; returns for each entry its arrays and row, or the text of its error."""
    results: list[tuple | str] = []
    for entry in entries:
        try:
            results.append(convert(entry, options))
        except ReadError as error:
            results.append(str(error))
    return results


# --------------------------------------------------------------------------------------- the report


@dataclass
class _Report:
    """Counts of clouds that were taken, changed or left out, for printing and for report.json."""

    source: Source  # its lists `notes` and `skipped` grow while clouds are converted
    points: int  # number of points of each cloud; 0 if all points are kept
    # number of clouds by file suffix
    taken: Counter[str] = field(default_factory=Counter)
    fewer: int = 0  # number of clouds with too few points, which were filled up
    # numbers of stray points and of NaN points that were left out, by key
    strays: Counter[str] = field(default_factory=Counter)
    unseen: Counter[str] = field(default_factory=Counter)

    def add(self, entry: Entry, row: Row) -> None:
        """Count a cloud that was taken. row: the second result of `convert`."""
        self.taken[Path(entry.file).suffix or self.source.layout] += 1
        self.fewer += row["count"] < self.points
        if part := row["part"]:
            self._note(f"{entry.key}: {part}")
        for counts, name in ((self.strays, "strays"), (self.unseen, "unseen")):
            counts.update({entry.key: row[name]} if row[name] else {})

    def write(self, out: Path) -> None:
        """Print how clouds were changed, and write report.json."""
        if self.fewer:
            short = f"{self.fewer:,} clouds of fewer than {self.points:,} points"
            self._note(f"{short} were filled up", " (--short skip leaves them out)")
        unseen = "NaN points (nothing was measured there)"
        keep = " (--keep-strays keeps them)"
        found = (self.strays, "stray points", keep), (self.unseen, unseen, "")
        for counts, what, option in found:
            if counts:
                most = counts.most_common(1)[0][0]
                where = f"in {len(counts):,} clouds, the largest number in {most}"
                self._note(f"left out {counts.total():,} {what} {where}", option)
        source = self.source
        record = {
            "layout": source.layout,
            "notes": source.notes,
            "new": self.taken.total(),
            "skipped": [{"file": key, "reason": why} for key, why in source.skipped],
        }
        write_bytes(out / "report.json", json.dumps(record, indent=1).encode())

    def _note(self, note: str, option: str = "") -> None:
        self.source.notes.append(note)
        log.info(printable(note + option))

    def show(self, out: Path, before: int) -> None:
        """Print how many clouds were taken, and which files were left out.

        before: number of clouds that the store already had.
        """
        already = f", {before:,} were there already" if before else ""
        kinds = [f"{count:,} {suffix}" for suffix, count in self.taken.most_common()]
        kinds = f" ({', '.join(kinds)})" if kinds else ""
        took = f"took {self.taken.total():,} clouds{kinds}{already}"
        skipped = self.source.skipped
        log.info(f"{out}: {took}; left out {len(skipped):,}{':' if skipped else ''}")
        for key, reason in skipped[:_SHOWN]:
            log.info(printable(f"  {key}: {reason}"))
        if (more := len(skipped) - _SHOWN) > 0:
            log.info(f"  and {more:,} more: see {out / 'report.json'}")


def _show_lacking(store: Store) -> None:
    """Print the classes that have shapes in only one of the splits train and test."""
    split, labels = store.columns["split"], store.columns["label"]
    train, test = (split == SPLITS.index(name) for name in ("train", "test"))
    found = lacking(labels, train, test, store.class_names)
    if train.any() and test.any() and found:
        alone = "classes that train or test lacks, left out by training and testing"
        log.info(f"{alone}: {', '.join(found)}")
