"""Compute the vectors of clouds and return them, without writing a file: `jepa3d.embed` takes arrays
or files, `jepa3d.Embedder` takes batches of paths.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.errors import because, printable, refuse
from jepa3d.data.io import sampled
from jepa3d.data.parallel import isolated
from jepa3d.evaluation.features import default_device
from jepa3d.frame import Frame
from jepa3d.inference.clouds import Item, find_clouds, spelled
from jepa3d.inference.spec import EmbeddingSpec
from jepa3d.models.encoder import PointEncoder, as_array
from jepa3d.models.ready import load
from jepa3d.plain import log

if TYPE_CHECKING:  # pyarrow is in the extra `search`
    import pyarrow as pa

Clouds = str | Path | np.ndarray | Tensor | Sequence
BATCH = 32  # number of clouds that are encoded at once


class Seen(NamedTuple):
    """A cloud as it was read, and as the encoder receives it."""

    read: PointCloud  # as it was read
    # equal to `read`; if `read` is a mesh, points sampled from the mesh
    cloud: PointCloud
    # [N, 3], the points of `cloud`, rotated to z-up unless `up_axis` is "none"
    points: np.ndarray
    # the encoder's input, and the mapping of points to the encoder's coordinates
    frame: Frame


class Embedded(NamedTuple):
    """The vector of a cloud, and facts about the cloud as it was read."""

    # [E]; until the cloud is encoded, this field holds the encoder's input [num_points, 3]
    vector: np.ndarray
    # number of points of the cloud that was read, or of vertices of the mesh
    num_points: int
    unseen: int  # number of further points, left out because they have NaN coordinates
    remarks: list[str]  # lines for the user, such as how many points were left out


def embed(
    clouds: Clouds,
    encoder: PointEncoder | None = None,
    up_axis: str = "z",
    layer: int = -1,
    pooling: str = "mean_max",
) -> np.ndarray:
    """Compute the vectors of clouds; returns an array [n, E] float32.

    clouds: one cloud as an array [N, 3]; several clouds as an array [n, N, 3] or a list of arrays;
    a path; or a list of paths. A path is a file, a folder of files, a store (a dataset of
    `jepa3d prepare`), or the address of one cloud (see clouds.py). Every cloud at a path gets a row
    of the result; `clouds.py::cloud_paths` lists these clouds in the same order. A cloud that
    cannot be used gets a row of NaN, and a warning names it.

    encoder: `jepa3d.load()` by default. up_axis: the up axis of the clouds, "x", "y" or "z" (stores
    and glTF files define their own), or "none" for vectors that do not depend on the rotation of a
    cloud. layer and pooling: see `PointEncoder.embed`. Raises ValueError for an unknown setting or
    an empty list of clouds, and ReadError if no cloud can be used.

    >>> embed([np.random.rand(3000, 3), np.random.rand(2048, 3)]).shape[0]
    2
    """
    encoder = encoder or load()
    spec = EmbeddingSpec.of("", encoder, up_axis, layer, pooling)
    found, errors = embed_each(clouds, encoder, spec)
    for error in errors:
        warnings.warn(f"{error}; its vector is NaN", stacklevel=2)
    missing = np.full(spec.embed_dim, np.nan, np.float32)
    return np.stack([missing if vector is None else vector for _, vector in found])


def embed_each(
    clouds: Clouds, encoder: PointEncoder, spec: EmbeddingSpec
) -> tuple[list[tuple[str, np.ndarray | None]], list[str]]:
    """Compute vectors as `embed` does. Returns a pair (path, vector) for each cloud, and an error
    text for each cloud that cannot be used; the vector of such a cloud is None.

    Raises ReadError if no cloud can be used, and ValueError if `clouds` is empty.
    """
    encoder, items = spec.applied(encoder), list(_items_of(clouds))
    found, errors = [], []
    results = encode(encoder, spec, (_seen_by(encoder, spec, item) for item in items))
    for item, result in zip(items, results, strict=True):
        if isinstance(result, str):
            errors.append(because(item.path, result))
            found.append((item.path, None))
        else:
            log_remarks(item.path, result.remarks)
            found.append((item.path, result.vector))
    if len(errors) == len(found):
        raise ReadError(errors[0]) if errors else ValueError("no clouds to embed")
    return found, errors


def _items_of(clouds: Clouds) -> Iterator[Item]:
    """Yield one item (`clouds.py::Item`) per cloud. A path without clouds becomes an item that
    raises ReadError when it is read.
    """
    if isinstance(clouds, (str, Path)) or getattr(clouds, "ndim", 0) == 2:
        clouds = [clouds]
    for i, cloud in enumerate(clouds):
        if isinstance(cloud, (str, Path)):
            found, failed = find_clouds(cloud, optional=[cloud])
            yield from found or [Item(x, partial(refuse, why)) for x, why in failed]
        else:
            yield Item(f"cloud {i}", partial(_whole_cloud, cloud))


def _whole_cloud(points: np.ndarray | Tensor) -> PointCloud:
    """Turn an array into a cloud. Raises ReadError if a coordinate is NaN, and as
    `PointCloud.make` does.
    """
    cloud = PointCloud.make(as_array(points))
    if cloud.unseen:
        raise ReadError("has NaN or infinite coordinates")
    return cloud


def log_remarks(path: str, remarks: list[str]) -> None:
    """Log the remarks on a cloud."""
    for remark in remarks:
        log.info(printable(f"{path}: {remark}"))


def see(encoder: PointEncoder, item: Item, up_axis: str) -> Seen:
    """Read a cloud or mesh and convert it to the encoder's input. Raises ReadError on failure."""
    try:
        read = item.read()
        cloud = sampled(read, encoder.num_points)
        points = item.turned(cloud, up_axis)
        return Seen(read, cloud, points, encoder.frame(points))
    except ReadError:
        raise
    except OSError as error:
        raise ReadError(f"cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ReadError(f"{item.path}: {error}") from error


def _seen_by(encoder: PointEncoder, spec: EmbeddingSpec, item: Item) -> Embedded | str:
    """Return the encoder's input for a cloud, or the reason why the cloud cannot be used."""
    try:
        read, *_, frame = see(encoder, item, spec.up_axis)
        return Embedded(frame.points, len(read), read.unseen, read.remarks())
    except ReadError as error:
        return str(error)


@torch.inference_mode()
def encode(
    encoder: PointEncoder, spec: EmbeddingSpec, results: Iterable[Embedded | str]
) -> Iterator[Embedded | str]:
    """Encode the results of `_seen_by` in batches: in each result, replace the encoder's input by
    the vector. Error texts are yielded unchanged.
    """
    results = iter(results)
    while batch := list(islice(results, BATCH)):
        points = [result.vector for result in batch if isinstance(result, Embedded)]
        if points:
            stacked = torch.from_numpy(np.stack(points)).to(encoder.norm.weight)
            vectors = encoder.vectors(stacked, spec.layer, spec.pooling)
            made = iter(vectors.float().cpu().numpy())
            for i, result in enumerate(batch):
                if isinstance(result, Embedded):
                    batch[i] = result._replace(vector=next(made))
        yield from batch


@lru_cache(maxsize=1)
def _loaded(model: str, fingerprint: str) -> PointEncoder:
    """Load an encoder. Its fingerprint is part of the cache's key, so that a changed encoder is
    loaded again.
    """
    return load(model)


def embed_items(
    model: str, spec: EmbeddingSpec, points_only: bool, items: list[Item]
) -> list[Embedded | str]:
    """Compute the vectors of clouds in a worker process. For a cloud that cannot be used, return
    the reason.

    points_only: return the encoder's inputs instead of vectors.
    """
    encoder = spec.applied(_loaded(model, spec.fingerprint))
    results = (_seen_by(encoder, spec, item) for item in items)
    return list(results if points_only else encode(encoder, spec, results))


class Embedder:
    """Turn batches of paths into rows with vectors. Create an Embedder once per process and call it
    for every batch, for example as an actor of Ray Data.

    model, up_axis, layer, pooling and keep_strays: as for `jepa3d embed`. workers: number of
    processes that read clouds, and also encode them if there is no accelerator. If a file crashes
    the code that parses it, only this file gets an error instead of a vector. The attribute `spec`
    is the specification of the vectors (see spec.py), as `jepa3d embed` stores it.

    >>> rows = ray.data.from_items([{"path": "a.ply"}]).map_batches(jepa3d.Embedder, num_cpus=1)
    """

    def __init__(
        self,
        model: str = "default",
        up_axis: str = "z",
        layer: int = -1,
        pooling: str = "mean_max",
        workers: int = 1,
        keep_strays: bool = False,
    ):
        encoder, self.workers = load(model), workers
        encoder.keep_strays = keep_strays
        self.spec = EmbeddingSpec.of(model, encoder, up_axis, layer, pooling)
        # This is False in a Ray actor that did not request a GPU, since Ray hides the GPU from it.
        self.on_device = torch.accelerator.is_available()
        self.encoder = self.spec.applied(encoder).to(default_device())
        # `spec.model` is an absolute path, unlike `model`; the working directory may change.
        self.work = partial(embed_items, self.spec.model, self.spec, self.on_device)

    def finish(self, results: Iterable[Embedded | str]) -> Iterator[Embedded | str]:
        """Return results of `work` with vectors. If this process has an accelerator, `work`
        returned the encoder's inputs, which are encoded here; otherwise `work` has already encoded
        them.

        `work` is an attribute: the function `embed_items` with the settings of this Embedder.
        Worker processes call it.
        """
        if self.on_device:
            return encode(self.encoder, self.spec, results)
        return iter(results)

    def __call__(self, batch: Mapping[str, Iterable[str]]) -> "pa.Table":
        """Return one row for every cloud at the paths in the column `path`. The returned columns
        are those that vectors.py lists, including `error`.

        A path is a file, a folder, a store, or the address of one cloud. A cloud that is found
        twice gets one row. Clouds that cannot be used and paths without clouds get a row with the
        path and an error; the other columns are null. Rows with vectors come first.
        """
        from jepa3d.inference.vectors import table, with_errors

        paths = dict.fromkeys(map(str, batch["path"]))
        items, failed = find_clouds(*paths, optional=paths)
        chunks = [items[at : at + BATCH] for at in range(0, len(items), BATCH)]
        results = isolated(chunks, self.work, self.workers, __name__)
        finished, rows = self.finish(chain.from_iterable(results)), []
        for item, result in zip(items, finished, strict=True):
            if isinstance(result, str):
                failed.append((item.path, result))
            else:
                rows.append(as_row(item, result))
        errors = [(spelled(path), because(path, reason)) for path, reason in failed]
        return with_errors(table(self.spec, rows), errors)


def as_row(item: Item, result: Embedded) -> tuple:
    """Return a cloud's row in a file of vectors, as a tuple."""
    return item.path, item.label, result.num_points, item.stamp, result.vector
