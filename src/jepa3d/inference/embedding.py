"""`jepa3d embed`: a vector a cloud, of arrays in memory or of files into Parquet, on all cores, adding what is new."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jepa3d.data.cloud import TO_Z_UP, PointCloud, ReadError
from jepa3d.data.io import read, sampled
from jepa3d.data.parallel import mapped
from jepa3d.data.sources import discover
from jepa3d.data.store import Store, hash64
from jepa3d.frame import FRAME
from jepa3d.models.encoder import POOLINGS, PointEncoder, as_array, pool
from jepa3d.models.ready import fingerprint, load

BATCH = 32


@dataclass(frozen=True, slots=True)
class Item:
    """One cloud to embed."""

    path: str  # see vectors.py
    read: Callable[[], PointCloud]
    stamp: int
    label: str | None = None
    z_up: bool = False  # as stored clouds are, whatever --up-axis says of files


# ---------------------------------------------------------------------------------------------- in memory


def embed(
    clouds: str | Path | np.ndarray | Tensor | Sequence,
    encoder: PointEncoder | None = None,
    up_axis: str = "z",
    layer: int = -1,
    pooling: str = "mean_max",
) -> np.ndarray:
    """Vectors n E float32 of clouds: one array N 3, many (n N 3, or a list of arrays of any N), or paths.

    A path is a file, a folder of files, or a store, and gives a vector for every cloud there, in the order of
    `cloud_paths`. encoder: `jepa3d.load()` by default. up_axis: x, y or z of the clouds; a store knows its own.
    layer and pooling: see `PointEncoder.embed`. Raises ValueError for a cloud of NaN or too few points, naming it.

    >>> embed([np.random.rand(3000, 3), np.random.rand(2048, 3)]).shape[0]
    2
    """
    encoder = load() if encoder is None else encoder
    _check(up_axis, layer, pooling, encoder)
    if isinstance(clouds, (str, Path)):
        clouds = [clouds]
    if isinstance(clouds, (np.ndarray, Tensor)):
        clouds = [clouds] if clouds.ndim == 2 else list(clouds)
    prepared = []
    for i, cloud in enumerate(clouds):
        if isinstance(cloud, (str, Path)):
            prepared += [prepare(encoder, item.read(), item.path, up_axis, item.z_up) for item in items_of(Path(cloud))]
        else:
            try:
                made = PointCloud.make(as_array(cloud))
            except ReadError as error:
                raise ReadError(f"cloud {i}: {error}") from error
            prepared.append(prepare(encoder, made, f"cloud {i}", up_axis))
    if not prepared:
        raise ValueError("no clouds to embed")
    return np.concatenate([encode(encoder, prepared[at : at + BATCH], layer, pooling) for at in _starts(prepared)])


def cloud_paths(path: str | Path) -> list[str]:
    """The paths of the clouds in a file, a folder or a store, as `embed` takes them."""
    return [item.path for item in items_of(Path(path))]


def _starts(items: Sequence) -> range:
    return range(0, len(items), BATCH)


def _check(up_axis: str, layer: int, pooling: str, encoder: PointEncoder) -> None:
    if up_axis not in TO_Z_UP:
        raise ValueError(f"up axis {up_axis!r}: one of {', '.join(TO_Z_UP)}")
    if not -1 <= layer <= encoder.depth:
        raise ValueError(f"layer {layer}: 0 (tokenizer) to {encoder.depth}, or -1 for the last")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r}: one of {', '.join(POOLINGS)}")


def prepare(encoder: PointEncoder, cloud: PointCloud, name: str, up_axis: str, z_up: bool = False) -> Tensor:
    """The points num_points 3 of a cloud or mesh that the encoder sees. Raises ReadError that begins with the name."""
    try:
        points = sampled(cloud, encoder.num_points).points
        return torch.from_numpy(encoder.frame(points if z_up else points @ TO_Z_UP[up_axis].T).points)
    except ValueError as error:
        raise ReadError(f"{name}: {error}") from error


@torch.inference_mode()
def encode(encoder: PointEncoder, prepared: list[Tensor], layer: int, pooling: str) -> np.ndarray:
    """Vectors n E of prepared points."""
    states, _ = encoder.states(torch.stack(prepared).to(encoder.norm.weight))
    return pool(states[layer], pooling).float().cpu().numpy()


# ---------------------------------------------------------------------------------------------- what lies at a path


def items_of(path: Path) -> list[Item]:
    """The clouds of a file, folder or store. Raises ReadError."""
    if (path / "store.json").is_file():
        store, at = Store(path), str(path.resolve())
        names = (*store.class_names, None)
        return [
            Item(
                f"{at}#{printable(store.key(row))}",
                partial(_stored, at, row),
                int(store.columns["content"][row]),
                names[store.columns["label"][row]],
                True,
            )
            for row in range(len(store))
        ]
    if not path.exists() and "#" in path.name:
        name = printable(str(path.absolute()))
        return [Item(name, lambda: open_cloud(name)[0], 0, None, open_cloud(name)[1])]
    if not path.exists():
        raise ReadError(f"{path}: no such file or folder")
    found, items = discover(path), []
    for entry in found.entries:
        inside, _, row = entry.key.partition("#") if not (path / entry.key).exists() else (entry.key, "", "")
        file = path / inside if path.is_dir() else path
        stamp = f"{file.stat().st_size} {file.stat().st_mtime_ns}" if file.is_file() else entry.key
        name = printable(str(file.absolute())) + (f"#{row}" if row else "")
        items.append(
            Item(name, entry.read, hash64(stamp.encode("utf-8", "surrogateescape")), entry.label or entry.name)
        )
    for key, reason in found.skipped[:5]:
        print(f"left out: {printable(key)}: {reason}")
    if len(found.skipped) > 5:
        print(f"left out: {len(found.skipped) - 5:,} more that are no clouds")
    return items


def open_cloud(path: str) -> tuple[PointCloud, bool]:
    """The cloud of a `path` that `items_of` gave, and whether it is z-up whatever its file. Raises ReadError."""
    if Path(path).exists():
        return read(path), False
    for at, sign in enumerate(path):
        outer = Path(path[:at])
        if sign == "#" and (outer / "store.json").is_file():
            store = _open(str(outer))
            rows = np.flatnonzero(store.columns["key"] == np.uint64(hash64(path[at + 1 :].encode())))
            if len(rows):
                return store.cloud(int(rows[0])), True
        elif sign == "#" and outer.is_file() and path[at + 1 :].isdigit():
            return read(outer, int(path[at + 1 :])), False
    raise ReadError(f"{path}: no longer there")


def printable(name: str) -> str:
    """A file name that is not UTF-8 with its bytes spelled out, as Parquet and terminals need it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@lru_cache(maxsize=4)
def _open(path: str) -> Store:
    return Store(path)


def _stored(path: str, row: int) -> PointCloud:
    return _open(path).cloud(row)


# ---------------------------------------------------------------------------------------------- files to Parquet


@lru_cache(maxsize=1)
def _loaded(model: str) -> PointEncoder:
    return load(model)


def _work(model: str, layer: int, pooling: str, up_axis: str, points_only: bool, items: list[Item]) -> list:
    """In a process: of each item its vector (for an accelerator, its points) and number of points, or why not."""
    encoder, results, good = _loaded(model), [], []
    for item in items:
        try:
            cloud = item.read()
            good.append(prepare(encoder, cloud, item.path, up_axis, item.z_up))
            results.append(len(cloud))
        except ReadError as error:
            results.append(str(error))
        except OSError as error:
            results.append(f"cannot be read ({error.strerror or error})")
    if good and not points_only:
        good = list(encode(encoder, good, layer, pooling))
    made = iter(good)
    return [result if isinstance(result, str) else (np.asarray(next(made)), result) for result in results]


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
) -> None:
    """Embed every cloud at `paths` that is new or changed into `out`: one .parquet file, or a folder of parts.

    Interrupted, the same command goes on. share: "2/4" is the second of four commands that fill one folder.
    prune: forget the rows of files that are gone. Raises ValueError, and ReadError where nothing can be used.
    """
    from jepa3d.inference import vectors as parquet

    encoder, single = load(model), out.suffix == ".parquet"
    _check(up_axis, layer, pooling, encoder)
    first, of = _share(share, single)
    if workers < 0:
        raise ValueError(f"--workers {workers}: a number from 1, or 0 for one a core")
    if out.exists() and out.is_dir() == single:
        raise ValueError(f"{out}: exists and is no {'file' if single else 'folder'}; choose another --out")
    name = str(Path(model).absolute()) if Path(model).exists() else model
    layer, width = layer % (encoder.depth + 1), encoder.width * len(pooling.split("_"))
    making = parquet.Making(name, fingerprint(encoder), layer, pooling, up_axis, width, FRAME)
    parts = out.with_name(f".{out.name}.parts") if single else out
    old = [out] if single and out.exists() else []
    begun = sorted(parts.glob("*.parquet")) if parts.is_dir() else []
    known: dict[str, int] = {}
    for file in [*old, *begun]:
        there = parquet.Vectors(file)
        making.check(there.making, str(file))
        known |= zip(there.column("path"), there.column("stamp"), strict=True)
    items = list({item.path: item for path in paths for item in items_of(path)}.values())[first - 1 :: of]
    todo = [item for item in items if known.get(item.path) != item.stamp]
    changed = [item.path for item in todo if item.path in known]
    if changed and of > 1:
        raise ValueError(f"{changed[0]}: changed since it was embedded; bring {out} up to date without --share first")
    on_device = torch.accelerator.is_available()
    finish = None
    if on_device:
        encoder = encoder.to(torch.accelerator.current_accelerator())
        finish = partial(_encode_all, encoder, layer, pooling)
    processes = workers or min(os.cpu_count() or 1, max(1, len(todo) // (4 * BATCH)))  # one takes seconds to start
    work = partial(_work, model, layer, pooling, up_axis, on_device)
    taken: list[str] = []
    writer = parquet.PartWriter(parts, f"part-{first}of{of}", making, finish)
    try:
        for item, result in mapped(work, todo, BATCH, processes, "embedding", __name__):
            if isinstance(result, str):
                print(f"left out: {item.path}: {result.removeprefix(f'{item.path}: ')}")
                continue
            writer.add(
                {"path": item.path, "label": item.label, "num_points": result[1], "stamp": item.stamp}, result[0]
            )
            taken.append(item.path)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped after {len(taken):,} new vectors, kept; the same command goes on") from None
    finally:
        writer.commit()
    gone = [path for path in known if not _there(path)] if prune else []
    replaced = set(taken) & set(changed)
    if single and (taken or begun or gone):
        parquet.merge(old, sorted(parts.glob("*.parquet")), making, out, set(gone))
        shutil.rmtree(parts, ignore_errors=True)
    elif replaced or gone:
        for file in begun:
            parquet.merge([file], [], making, file, replaced | set(gone))
    if not (known or taken):
        raise ReadError(f"{paths[0]}: none of the clouds can be used")
    print(
        f"{out}: {len(taken) - len(replaced):,} new, {len(replaced):,} changed, {len(items) - len(todo):,} unchanged"
        f"{f', {len(gone):,} forgotten' if gone else ''}; left out {len(todo) - len(taken):,}"
    )


def _share(share: str, single: bool) -> tuple[int, int]:
    first, _, of = share.partition("/")
    if not (first.isdigit() and of.isdigit() and 1 <= int(first) <= int(of)):
        raise ValueError(f"--share {share}: i/n, such as 2/4 for the second of four")
    if single and int(of) > 1:
        raise ValueError(f"--share {share}: needs a folder as --out, which is filled by parts, not a .parquet file")
    return int(first), int(of)


def _there(path: str) -> bool:
    return Path(path).exists() or Path(path.partition("#")[0]).exists()


def _encode_all(encoder: PointEncoder, layer: int, pooling: str, prepared: list[np.ndarray]) -> np.ndarray:
    """Vectors of points that processes prepared, by the one process that has the accelerator."""
    batches = [[torch.from_numpy(points) for points in prepared[at : at + BATCH]] for at in _starts(prepared)]
    return np.concatenate([encode(encoder, batch, layer, pooling) for batch in batches])
