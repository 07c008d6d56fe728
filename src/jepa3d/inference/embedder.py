"""`jepa3d.Embedder`: files to vectors inside another engine, such as an actor of Ray Data."""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from jepa3d.data.errors import left_out
from jepa3d.data.parallel import isolated
from jepa3d.inference import embedding
from jepa3d.inference.clouds import Item, listed, spelled
from jepa3d.inference.vectors import pa, table, with_errors
from jepa3d.models.ready import load


class Embedder:
    """Turns batches of paths into rows with vectors; made once in a process, called for every
    batch.

    model, up_axis, layer and pooling are those of `jepa3d embed`; workers: the processes that read
    and embed, so that a file whose parser crashes costs its own row only. `making` is what `jepa3d
    embed` writes beside such vectors.

    >>> rows = ray.data.from_items([{"path": "a.ply"}]).map_batches(jepa3d.Embedder, num_cpus=1)
    """

    def __init__(
        self,
        model: str = "default",
        up_axis: str = "z",
        layer: int = -1,
        pooling: str = "mean_max",
        workers: int = 1,
    ):
        self.encoder, self.workers = load(model), workers
        self.making = embedding.making_for(model, self.encoder, up_axis, layer, pooling)
        self.encoder.upright = up_axis != "none"
        self.on_device = (
            torch.accelerator.is_available()
        )  # Ray hides the GPU from an actor that did not ask for one
        if self.on_device:
            self.encoder = self.encoder.to(torch.accelerator.current_accelerator())
        self.work = partial(embedding.embed_items, model, self.making, self.on_device)

    def __call__(self, batch: Mapping[str, Iterable[str]]) -> pa.Table:
        """Rows of `vectors.py` and the column `error`, for every cloud of every path in the column
        `path`.

        A path, taken once, is a file, a folder, a store, or the address of one cloud. What cannot
        be used is a row of its path and its error, all else null. Rows with vectors come first.
        """
        items: list[Item] = []
        failed: dict[str, list[str]] = {"path": [], "error": []}

        def fail(path: str, reason: str) -> None:
            failed["path"].append(spelled(path))
            failed["error"].append(left_out(path, reason).removeprefix("left out: "))

        for path in dict.fromkeys(map(str, batch["path"])):
            try:
                found, skipped = listed(Path(path))
            except (ValueError, OSError) as error:
                fail(path, str(error))
                continue
            items += found
            for key, reason in skipped:
                fail(f"{path}/{key}", reason)
        chunks = [items[at : at + embedding.BATCH] for at in range(0, len(items), embedding.BATCH)]
        made = chain.from_iterable(isolated(chunks, self.work, self.workers, embedding.__name__))
        results = zip(items, made, strict=True)
        if self.on_device:
            results = embedding.encode_on_device(
                results, self.encoder, self.making.layer, self.making.pooling
            )
        rows: dict[str, list] = {
            "path": [],
            "label": [],
            "num_points": [],
            "stamp": [],
            "vector": [],
        }
        for item, result in results:
            if isinstance(result, str):
                fail(item.path, result)
                continue
            for name, value in zip(
                rows, (item.path, item.label, result[1], item.stamp, result[0]), strict=True
            ):
                rows[name].append(value)
        return with_errors(
            table(self.making, rows, np.asarray(rows["vector"])), self.making, failed
        )
