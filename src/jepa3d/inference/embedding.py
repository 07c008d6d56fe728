"""`jepa3d embed`: a vector a cloud, of arrays in memory or of files into Parquet, on all cores,
adding what is new.
"""

import copy
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jepa3d.data.cloud import TO_Z_UP, PointCloud, ReadError
from jepa3d.data.errors import left_out
from jepa3d.data.io import sampled
from jepa3d.data.parallel import mapped
from jepa3d.data.store import hash64
from jepa3d.frame import FRAME
from jepa3d.inference.clouds import Address, Item, items_of, listed, show_left_out, spelled
from jepa3d.locking import writing
from jepa3d.models.encoder import POOLINGS, PointEncoder, as_array
from jepa3d.models.ready import fingerprint, load
from jepa3d.plain import printable

if TYPE_CHECKING:  # needs the extra `search`
    from jepa3d.inference.vectors import Making

BATCH = 32
COMMIT_SECONDS = 60.0


def embed(
    clouds: str | Path | np.ndarray | Tensor | Sequence,
    encoder: PointEncoder | None = None,
    up_axis: str = "z",
    layer: int = -1,
    pooling: str = "mean_max",
) -> np.ndarray:
    """Vectors n E float32 of clouds: one array N 3, many (n N 3, or a list of arrays of any N), or
    paths.

    A path is a file, a folder of files, or a store, and gives a vector for every cloud there, in
    the order of `cloud_paths`. encoder: `jepa3d.load()` by default. up_axis: x, y or z of the
    clouds, a store knows its own; or none, for vectors that are the same however a cloud is turned.
    layer and pooling: see `PointEncoder.embed`. Raises ValueError for a cloud of NaN or too few
    points, naming it.

    >>> embed([np.random.rand(3000, 3), np.random.rand(2048, 3)]).shape[0]
    2
    """
    encoder = load() if encoder is None else encoder
    _check(up_axis, layer, pooling, encoder)
    if up_axis == "none":
        encoder = copy.copy(encoder)  # the caller's stays as it is
        encoder.upright = False
    if isinstance(clouds, (str, Path)):
        clouds = [clouds]
    if isinstance(clouds, (np.ndarray, Tensor)):
        clouds = [clouds] if clouds.ndim == 2 else list(clouds)
    prepared = []
    for i, cloud in enumerate(clouds):
        if isinstance(cloud, (str, Path)):
            for item in items_of(Path(cloud)):
                read = item.read()
                for remark in read.remarks():
                    print(printable(f"{item.path}: {remark}"))
                prepared.append(prepare(encoder, read, item.path, up_axis, item.z_up))
        else:
            try:
                made = PointCloud.make(as_array(cloud))
                if made.unseen:
                    raise ReadError("NaN or infinite coordinates")
            except ReadError as error:
                raise ReadError(f"cloud {i}: {error}") from error
            prepared.append(prepare(encoder, made, f"cloud {i}", up_axis))
    if not prepared:
        raise ValueError("no clouds to embed")
    return np.concatenate(
        [encode(encoder, prepared[at : at + BATCH], layer, pooling) for at in _starts(prepared)]
    )


def _starts(items: Sequence) -> range:
    return range(0, len(items), BATCH)


def _check(up_axis: str, layer: int, pooling: str, encoder: PointEncoder) -> None:
    if up_axis not in (*TO_Z_UP, "none"):
        raise ValueError(f"up axis {up_axis!r}: one of {', '.join(TO_Z_UP)}, none")
    if not -1 <= layer <= encoder.depth:
        raise ValueError(f"layer {layer}: 0 (tokenizer) to {encoder.depth}, or -1 for the last")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r}: one of {', '.join(POOLINGS)}")


def prepare(
    encoder: PointEncoder, cloud: PointCloud, name: str, up_axis: str, z_up: bool = False
) -> Tensor:
    """The points num_points 3 of a cloud or mesh that the encoder sees.

    Raises ReadError that begins with the name.
    """
    try:
        points = sampled(cloud, encoder.num_points).points
        standing = z_up or up_axis == "none"
        return torch.from_numpy(
            encoder.frame(points if standing else points @ cloud.to_z_up(up_axis).T).points
        )
    except ValueError as error:
        raise ReadError(f"{name}: {error}") from error


@torch.inference_mode()
def encode(encoder: PointEncoder, prepared: list[Tensor], layer: int, pooling: str) -> np.ndarray:
    """Vectors n E of prepared points."""
    return (
        encoder.vectors(torch.stack(prepared).to(encoder.norm.weight), layer, pooling)
        .float()
        .cpu()
        .numpy()
    )


# --------------------------------------------------------------------------------- files to Parquet


def embed_files(
    paths: list[Path],
    out: Path,
    model: str = "default",
    up_axis: str = "z",
    layer: int = -1,
    pooling: str = "mean_max",
    workers: int = 0,
    share: str = "1/1",
    prune: bool = False,
    keep_strays: bool = False,
) -> None:
    """Embed every cloud at `paths` that is new or changed into `out`: a .parquet file, or a folder
    of one a share.

    Interrupted, the same command goes on. share: "2/4" is the second of four commands that fill one
    folder. prune: forget what is no longer at `paths`, and files that are gone. Raises ValueError,
    also where another command writes, and ReadError where nothing can be used.
    """
    from jepa3d.inference.vectors import Vectors, write

    files, of = _files(out, share)
    encoder = load(model)
    encoder.keep_strays, encoder.upright = keep_strays, up_axis != "none"
    making = making_for(model, encoder, up_axis, layer, pooling)
    if workers < 0:
        raise ValueError(f"--workers {workers}: a number from 1, or 0 for one a core")
    items, skipped = _items(paths, prune)
    inside = tuple(spelled(os.path.abspath(path)) + sign for path in paths for sign in "/#")
    on_device = torch.accelerator.is_available()
    if on_device:
        encoder = encoder.to(torch.accelerator.current_accelerator())
    work = partial(embed_items, model, making, on_device)
    counts = Counter({"left out": skipped})
    with ExitStack() as locks:
        for file in files.values():
            locks.enter_context(writing(file))
        for number, file in files.items():
            known: dict[str, int] = {}
            if file.exists():
                there = Vectors(file, may_be_empty=True)
                making.check(there.making, str(file))
                known = dict(zip(there.column("path"), there.column("stamp"), strict=True))
            elif of > 1:
                write([], making, file)  # a share may have no clouds, yet its name says what n is
            mine = [
                item
                for item in items.values()
                if of == 1 or hash64(item.path.encode()) % of == number - 1
            ]
            todo = [item for item in mine if known.get(item.path) != item.stamp]
            gone = {
                path for path in known.keys() - items.keys() if prune and _is_gone(path, inside)
            }
            counts.update(
                known=len(known),
                tried=len(todo),
                unchanged=len(mine) - len(todo),
                forgotten=len(gone),
            )
            processes = workers or min(
                os.cpu_count() or 1, max(1, len(todo) // (4 * BATCH))
            )  # one takes seconds
            results = mapped(work, todo, BATCH, processes, "embedding", __name__)
            results = encode_on_device(results, encoder, layer, pooling) if on_device else results
            _collect(results, file, making, known.keys(), gone, counts)
    if counts["tried"] and not counts["known"] + counts["new"]:
        raise ReadError(f"{paths[0]}: none of the clouds can be used")
    print(
        f"{out}: {counts['new']:,} new, {counts['changed']:,} changed, {counts['unchanged']:,} unchanged"
        f"{f', {gone:,} forgotten' if (gone := counts['forgotten']) else ''}; left out {counts['left out']:,}"
        f"{f'; {unseen:,} points that are NaN were left out' if (unseen := counts['unseen']) else ''}"
    )


def making_for(
    model: str, encoder: PointEncoder, up_axis: str, layer: int, pooling: str
) -> "Making":
    """What is written beside vectors of these settings;

    `encoder` is the model's. Raises ValueError.
    """
    from jepa3d.inference.vectors import Making

    _check(up_axis, layer, pooling, encoder)
    name = str(Path(model).absolute()) if Path(model).exists() else model
    layer, width = layer % (encoder.depth + 1), encoder.width * len(pooling.split("_"))
    return Making(
        name, fingerprint(encoder), layer, pooling, up_axis, width, FRAME, encoder.keep_strays
    )


def _files(out: Path, share: str) -> tuple[dict[int, Path], int]:
    """The files to write by the number of their share, and of how many shares they are.

    Raises ValueError.
    """
    first, _, of = share.partition("/")
    if not (first.isdigit() and of.isdigit() and 1 <= int(first) <= int(of)):
        raise ValueError(f"--share {share}: i/n, such as 2/4 for the second of four")
    if out.suffix == ".parquet":
        if int(of) > 1:
            raise ValueError(
                f"--share {share}: needs a folder as --out, which is filled by parts, not a .parquet file"
            )
        if out.is_dir():
            raise ValueError(f"{out}: exists and is no file; choose another --out")
        return {1: out}, 1
    if out.suffix or out.is_file():
        hint = "; jepa3d index makes a .lancedb of them" if out.suffix == ".lancedb" else ""
        raise ValueError(
            f"--out {out}: a .parquet file, or a folder of them, whose name has no dot{hint}"
        )
    begun = set()
    for file in out.glob("*.parquet"):
        if not (part := re.fullmatch(r"part-\d+of(\d+)\.parquet", file.name)):
            raise ValueError(
                f"{file}: not written by this version of jepa3d embed --out {out}; choose another --out"
            )
        begun.add(int(part[1]))
    if len(begun) > 1 or (int(of) > 1 and begun - {int(of)}):
        raise ValueError(
            f"--share {share}: {out} was begun with n = {min(begun)}; a folder keeps its n"
        )
    count = begun.pop() if begun else int(of)
    numbers = (
        [int(first)] if int(of) > 1 else range(1, count + 1)
    )  # without --share, all of them in turn
    return {number: out / f"part-{number}of{count}.parquet" for number in numbers}, count


def _items(paths: list[Path], prune: bool) -> tuple[dict[str, Item], int]:
    """The clouds at all paths by their path, and how many files are none, which are named.

    To forget what was there, a folder may be empty. Raises ReadError.
    """
    items: dict[str, Item] = {}
    count = 0
    for path in paths:
        try:
            found, skipped = listed(path)
            items |= {item.path: item for item in found}
            show_left_out(skipped)
            count += len(skipped)
        except ReadError as error:
            if not (prune and path.is_dir()):
                raise
            print(error)
    return items, count


def _is_gone(path: str, inside: tuple[str, ...]) -> bool:
    """True of a cloud that is not among those found and lies below what was searched, or is
    nowhere.
    """
    return path.startswith(inside) or Address.parse(path) is None


@lru_cache(maxsize=1)
def _loaded(model: str) -> PointEncoder:
    return load(model)


def embed_items(model: str, making: "Making", points_only: bool, items: list[Item]) -> list:
    """Worker.

    Returns per item (vector or, if points_only, prepared points; count; points of NaN), or an error
    text.
    """
    encoder, results, good = _loaded(model), [], []
    encoder.keep_strays, encoder.upright = making.keep_strays, making.up_axis != "none"
    for item in items:
        try:
            cloud = item.read()
            good.append(prepare(encoder, cloud, item.path, making.up_axis, item.z_up))
            results.append((len(cloud), cloud.unseen))
        except ReadError as error:
            results.append(str(error))
        except OSError as error:
            results.append(f"cannot be read ({error.strerror or error})")
    if good and not points_only:
        good = list(encode(encoder, good, making.layer, making.pooling))
    made = iter(good)
    return [
        result if isinstance(result, str) else (np.asarray(next(made)), *result)
        for result in results
    ]


def encode_on_device(
    results: Iterator, encoder: PointEncoder, layer: int, pooling: str
) -> Iterator:
    """Results with vectors in place of prepared points, made by the one process that has the
    accelerator.
    """
    while some := list(islice(results, BATCH)):
        points = [torch.from_numpy(result[0]) for _, result in some if not isinstance(result, str)]
        made = iter(encode(encoder, points, layer, pooling) if points else ())
        yield from (
            (item, result if isinstance(result, str) else (next(made), *result[1:]))
            for item, result in some
        )


def _collect(
    results: Iterator, file: Path, making: "Making", known: Any, gone: set[str], counts: Counter
) -> None:
    """Bring a file up to date with results, from time to time and at the end, also of an
    interrupted run.
    """
    from jepa3d.inference.vectors import table, update

    rows: dict[str, list] = {"path": [], "label": [], "num_points": [], "stamp": [], "vector": []}
    last, cost = time.monotonic(), 0.0

    def commit() -> None:
        nonlocal last, cost
        begun = time.monotonic()
        if rows["path"] or gone:
            update(file, making, table(making, rows, np.asarray(rows["vector"])), gone)
            [values.clear() for values in (*rows.values(), gone)]
        last = time.monotonic()
        cost = last - begun

    try:
        for item, result in results:
            if isinstance(result, str):
                dropped = "; its former vector is dropped" if item.path in known else ""
                print(left_out(item.path, result) + dropped)
                gone.update([item.path] if dropped else [])
                counts["left out"] += 1
                continue
            for name, value in zip(
                rows, (item.path, item.label, result[1], item.stamp, result[0]), strict=True
            ):
                rows[name].append(value)
            counts["changed" if item.path in known else "new"] += 1
            counts["unseen"] += result[2]
            if time.monotonic() - last > max(
                COMMIT_SECONDS, 10 * cost
            ):  # the file is written as a whole
                commit()
    except KeyboardInterrupt:
        done = counts["new"] + counts["changed"]
        raise KeyboardInterrupt(
            f"stopped after {done:,} new vectors, kept; the same command goes on"
        ) from None
    finally:
        commit()
