"""`jepa3d prepare`: a download or a folder of files to a store, in parallel, with a report of what
was left out.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jepa3d.data import procedural
from jepa3d.data.archives import unpacked
from jepa3d.data.cloud import (
    ATTRIBUTES,
    MAX_POINTS,
    TO_Z_UP,
    UNLABELLED,
    ReadError,
    check_cloud,
    filled,
    reduce,
    sample_surface,
    to_parts,
)
from jepa3d.data.entries import Entry, Source
from jepa3d.data.parallel import mapped
from jepa3d.data.sources import discover
from jepa3d.data.splits import divide, lacking
from jepa3d.data.store import SPLITS, Store, StoreWriter, hash64
from jepa3d.frame import LEAST, are_kept
from jepa3d.locking import writing
from jepa3d.plain import printable, write_bytes

_MESH_POINTS = 8192  # samples of a mesh where all points are kept
_CHUNK = 8  # entries sent to a process at once
Attribute = Literal["normals", "colors", "parts"]


@dataclass(frozen=True)
class Preparation:
    """Settings of a store; they are written to it, and it can only be continued with the same."""

    points: int | None = 2048  # a cloud; None keeps all
    reduce: Literal["fps", "random", "voxel"] = "fps"
    # what to do with a cloud of fewer points
    short: Literal["skip", "repeat"] = "repeat"
    up_axis: Literal["x", "y", "z"] | None = (
        None  # of the files; None: as the benchmark or format has it, else z
    )
    unit: str | None = None  # of the files; only written down
    # or the fraction for test, or a file that lists the test clouds
    split: str = "folder"
    keep: tuple[Attribute, ...] = ()
    precision: Literal["float32", "float16"] = "float32"
    variant: str | None = None
    columns: tuple[str, ...] | None = None
    seed: int = 0
    keep_strays: bool = False  # of own files; those of a benchmark stay as published


def prepare(
    source: Path, out: Path, options: Preparation, workers: int = 0, strict: bool = False
) -> list[Path]:
    """Write the clouds at `source` (folder, file or archive) to the store `out`; go on where it was
    interrupted.

    A store that is whole is extended by what is new. A folder of few-shot folds gives a store a
    fold, under `out`. workers: processes, 0 one a core. strict: the first bad cloud stops it.
    Returns the stores. Raises ValueError, also where another command writes to `out`.
    """
    _check(options, workers)
    if not source.exists() and not procedural.count_of(source):
        raise ReadError(f"{source}: no such file or folder")
    if source.resolve() == out.resolve() or (
        source.is_dir() and out.resolve().is_relative_to(source.resolve())
    ):
        raise ValueError(f"{out}: lies in the source {source}; choose another --out")
    with writing(out), unpacked(source, out) as root:
        folds = sorted(root.glob("**/*way_*shot/*.pkl")) if root.is_dir() else []
        folds += sorted(root.glob("*.pkl")) if root.is_dir() and root.name.endswith("shot") else []
        if not folds:
            return [_prepare_one(root, out, options, workers, strict)]
        stores = [out / fold.relative_to(root).with_suffix("") for fold in folds]
        return [
            _prepare_one(*pair, options, workers, strict)
            for pair in zip(folds, stores, strict=True)
        ]


def _check(options: Preparation, workers: int) -> None:
    if options.points is not None and options.points < 1:
        raise ValueError(f"--points {options.points}: all, or a number from 1")
    if options.columns is not None and len(options.columns) < 3:
        raise ValueError(
            f"--columns {' '.join(options.columns)}: the names of x, y and z, or of all columns of a .bin"
        )
    if workers < 0:
        raise ValueError(f"--workers {workers}: a number from 1, or 0 for one a core")


def _prepare_one(root: Path, out: Path, options: Preparation, workers: int, strict: bool) -> Path:
    source = discover(root, options.variant, options.columns)
    entries = divide(source.entries, options.split, options.seed)
    keep = options.keep or (("parts",) if source.part_names and source.layout != "folder" else ())
    ordered: tuple[Attribute, ...] = tuple(sorted(keep, key=ATTRIBUTES.index))
    options = replace(
        options, keep=ordered, keep_strays=options.keep_strays or not source.unpublished
    )
    if options.up_axis is None and any(entry.up_axis is None for entry in entries):
        print("axes are kept: taken as z-up, of glTF as y-up (--up-axis says otherwise)")
    for note in (f"{root}: {source.layout}, {len(entries):,} clouds", *source.notes):
        print(printable(note), flush=True)
    names = tuple(sorted({entry.label for entry in entries if entry.label is not None}))
    parts = source.part_names if "parts" in options.keep else ()
    skipped, taken, fewer, unseen = list(source.skipped), Counter(), 0, Counter()
    strays = Counter()
    settings, begun = json.loads(json.dumps(asdict(options))), False
    try:
        with StoreWriter(out, settings, names, parts) as writer:
            begun = True
            entries, before = _new(entries, writer.keys())
            work = partial(_convert_all, options)
            for entry, result in mapped(work, entries, _CHUNK, workers, "preparing", __name__):
                if isinstance(result, str):
                    path = root / entry.file if root.is_dir() else root
                    skipped.append((entry.key, result.removeprefix(f"{path}: ")))
                    if strict:
                        raise ReadError(f"{path}: {skipped[-1][1]} (--strict)")
                    continue
                arrays, row = result
                fewer += row.pop("count") < (options.points or 0)
                if total := row.pop("total"):
                    source.notes.append(
                        f"{entry.key}: a random {MAX_POINTS:,} of its {total:,} points were read"
                    )
                    print(printable(source.notes[-1]))
                if hidden := row.pop("unseen"):
                    unseen[entry.key] = hidden
                if lost := row.pop("strays"):
                    strays[entry.key] = lost
                writer.add(entry.key, arrays, label=entry.label, split=entry.split, **row)
                taken[Path(entry.file).suffix or source.layout] += 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped after {taken.total():,} new clouds, kept; the same command goes on"
        ) from None
    finally:
        if fewer:
            source.notes.append(
                f"{fewer:,} clouds of fewer than {options.points:,} points were filled up"
            )
            print(f"{source.notes[-1]} (--short skip leaves them out)")
        if strays:
            which = f"in {len(strays):,} clouds, most in {strays.most_common(1)[0][0]}"
            source.notes.append(f"{strays.total():,} stray points left out {which}")
            print(printable(f"{source.notes[-1]} (--keep-strays keeps them)"))
        if unseen:
            which = f"in {len(unseen):,} clouds, most in {unseen.most_common(1)[0][0]}"
            source.notes.append(
                f"{unseen.total():,} points that are NaN, where nothing was seen, left out {which}"
            )
            print(printable(source.notes[-1]))
        if begun and (out / "store.json").is_file():
            _report(out, source, taken, skipped)
    _show(out, taken, before, skipped)
    if not (out / "store.json").is_file():
        raise ReadError(
            f"{root}: none of its clouds can be used; {skipped[-1][0]}: {skipped[-1][1]}"
        )
    _show_lacking(Store(out))
    return out


def _new(entries: list[Entry], done: np.ndarray) -> tuple[list[Entry], int]:
    """The entries whose keys are not among the hashes `done`, and how many are."""
    hashes = np.array(
        [hash64(entry.key.encode("utf-8", "surrogateescape")) for entry in entries], np.uint64
    )
    there = np.isin(hashes, done)
    return [entry for entry, is_there in zip(entries, there, strict=True) if not is_there], int(
        there.sum()
    )


# ---------------------------------------------------------------------------------------- one cloud


def convert(entry: Entry, options: Preparation) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A cloud's arrays as the store has them, and its row of the index. Raises ReadError."""
    cloud = entry.read()
    content = hash64(
        cloud.points.tobytes() + (b"" if cloud.faces is None else cloud.faces.tobytes())
    )
    told = {"total": cloud.total, "unseen": cloud.unseen}
    # not of the key: equal files give equal clouds
    count, seed = options.points, options.seed
    if cloud.faces is not None:
        cloud = sample_surface(cloud, 2 * count if count else _MESH_POINTS, seed)
    found = len(cloud)
    if missing := [name for name in options.keep if getattr(cloud, name) is None]:
        raise ReadError(f"has no {missing[0]} to keep (--keep)")
    if count and len(cloud) < count and options.short == "skip":
        raise ReadError(f"{len(cloud)} points, {count} are needed (--points, --short skip)")
    up = options.up_axis or entry.up_axis or cloud.up or "z"
    if count and not options.keep_strays:
        cloud = cloud.take(np.flatnonzero(are_kept(cloud.points.astype(np.float64), LEAST)))
    told["strays"] = found - len(cloud)
    cloud = cloud.normalised()
    if count and len(cloud) > count:
        cloud = reduce(cloud, count, options.reduce, seed)
    elif count and len(cloud) < count:
        cloud = filled(cloud, count)
    elif count and options.reduce == "fps":
        cloud = reduce(cloud, count, "fps", seed)
    check_cloud(cloud.points, "of the points that are kept: ")
    cloud = cloud.normalised()
    axes = TO_Z_UP[up]
    kind = np.dtype(options.precision)
    arrays = {"points": (cloud.points @ axes.T).astype(kind)}
    if options.precision == "float16":
        _check_rounding(cloud.points @ axes.T, arrays["points"])
    for name in options.keep:
        values = getattr(cloud, name)
        arrays[name] = (values @ axes.T).astype(np.float16) if name == "normals" else values
    if "parts" in arrays:
        arrays["parts"] = to_parts(arrays["parts"])
        if (arrays["parts"] == UNLABELLED).all():
            raise ReadError("none of its points has a part label (--keep parts)")
    return arrays, {
        "up": up,
        "frame": (*cloud.origin, cloud.scale),
        "content": content,
        "count": found,
        **told,
    }


def _check_rounding(points: np.ndarray, rounded: np.ndarray) -> None:
    """ReadError where float16 moves points n 3 of the unit sphere by over 1 % of their extent: a
    far one scales all.
    """
    error = np.median(np.linalg.norm(rounded.astype(np.float32) - points, axis=1))
    extent = np.median(np.linalg.norm(points - np.median(points, 0), axis=1))
    if error > 0.01 * extent:
        far = "a point far out sets its scale; remove it, or --precision float32"
        raise ReadError(
            f"float16 moves its points by {100 * error / max(extent, 1e-30):.0f} % of their extent: {far}"
        )


Result = tuple[dict[str, np.ndarray], dict[str, Any]] | str


def _convert_all(options: Preparation, entries: list[Entry]) -> list[Result]:
    """What becomes of each entry: arrays and row, or why not."""
    results: list[Result] = []
    for entry in entries:
        try:
            results.append(convert(entry, options))
        except ReadError as error:
            results.append(str(error))
        except OSError as error:
            results.append(f"cannot be read ({error.strerror or error})")
    return results


# --------------------------------------------------------------------------------------- the report


def _report(out: Path, source: Source, taken: Counter, skipped: list[tuple[str, str]]) -> None:
    record = {
        "layout": source.layout,
        "notes": source.notes,
        "new": taken.total(),
        "skipped": [{"file": key, "reason": reason} for key, reason in skipped],
    }
    write_bytes(out / "report.json", json.dumps(record, indent=1).encode())


def _show(
    out: Path, taken: Counter, before: int, skipped: list[tuple[str, str]], lines: int = 40
) -> None:
    already = f", {before:,} were there already" if before else ""
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in taken.most_common())
    print(
        f"{out}: took {taken.total():,} clouds{f' ({kinds})' if kinds else ''}{already}; left out {len(skipped):,}"
        + (":" if skipped else "")
    )
    for key, reason in skipped[:lines]:
        print(printable(f"  {key}: {reason}"))
    if len(skipped) > lines:
        print(f"  and {len(skipped) - lines:,} more, in {out / 'report.json'}")


def _show_lacking(store: Store) -> None:
    split, labels = np.asarray(store.columns["split"]), np.asarray(store.columns["label"])
    train, test = (split == SPLITS.index(part) for part in ("train", "test"))
    if train.any() and test.any() and (found := lacking(labels, train, test, store.class_names)):
        print(
            f"in one part only, so that training and testing will leave them out: {', '.join(found)}"
        )
