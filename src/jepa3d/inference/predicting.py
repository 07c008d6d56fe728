"""Apply a fine-tuned network to files. A classifier writes a CSV file with the class of each cloud.
A segmenter writes a PLY file for each cloud, with a part label and a colour for every point.
"""

import colorsys
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from jepa3d.data.cloud import TO_Z_UP, PointCloud, ReadError
from jepa3d.data.errors import because
from jepa3d.data.ply import header_of
from jepa3d.evaluation.partseg import restricted_argmax
from jepa3d.frame import Frame
from jepa3d.inference.clouds import Item, find_clouds, log_left_out, original, spelled
from jepa3d.inference.embedding import Seen, log_remarks, see
from jepa3d.inference.outputs import ply_row
from jepa3d.models.heads import UNKNOWN, Classifier, LinearClassifier, Segmenter
from jepa3d.models.ready import Network, load_network
from jepa3d.plain import log, progress_bar, write_bytes, write_csv

CSV_COLUMNS = ("class", "probability", "second", "second_probability")
_CHUNK = 2**16  # at most this many points are segmented at once, to bound the memory


@dataclass(frozen=True)
class Prediction:
    """The class or parts that a network predicts for a cloud, or why the cloud cannot be used."""

    path: str
    # From a classifier: the most probable and the second most probable class, see `two_classes`.
    class_name: str | None = None
    probability: float | None = None
    second: str | None = None
    second_probability: float | None = None
    # From a segmenter: the part label of every point, [N] int16.
    parts: np.ndarray | None = None
    error: str | None = None


def predict(
    run: str | Path,
    clouds: str | Path | Sequence[str | Path],
    category: str | None = None,
    up_axis: str = "z",
) -> list[Prediction]:
    """Classify or segment the clouds in files, folders and stores. Returns one Prediction per
    cloud, in the order in which the clouds are given.

    run: the output folder of `jepa3d classify`, `jepa3d segment` or `jepa3d label`. category: the
    category of the clouds, which is needed if the network is a segmenter for several categories. A
    cloud that cannot be used gives a Prediction with an `error`. For each file without any cloud,
    another Prediction with an `error` follows at the end of the list. Raises ValueError for a
    network, category or up axis that cannot be used.
    """
    if up_axis not in TO_Z_UP:
        raise ValueError(f"up axis {up_axis!r} is unknown: use {', '.join(TO_Z_UP)}")
    network = load_network(run)
    label = _label(network, category)
    paths = [clouds] if isinstance(clouds, (str, Path)) else clouds
    items, failed = _find(paths, optional=paths)
    predictions = [found for found, _ in _predictions(network, items, label, up_axis)]
    return predictions + [Prediction(path, error=reason) for path, reason in failed]


def predict_files(
    run: Path,
    paths: list[Path],
    out: Path,
    category: str | None = None,
    up_axis: str = "z",
) -> None:
    """Apply a network to the clouds at `paths`. A classifier writes the CSV file `out`; a segmenter
    writes PLY files into the folder `out`.

    Clouds that cannot be used are logged and left out. Raises ValueError for a network or category
    that cannot be used, or if `out` exists. Raises ReadError if there are no clouds at one of the
    paths, or if no cloud can be used.
    """
    network = load_network(run)
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another --out")
    label = _label(network, category)
    items, skipped = _find(paths)
    log_left_out(skipped)
    rows = []
    predictions = _predictions(network, items, label, up_axis)
    for found, seen in progress_bar(predictions, "predicting", total=len(items)):
        if seen is None:
            log.info(f"left out: {because(found.path, str(found.error))}")
            continue
        log_remarks(found.path, seen.read.remarks())
        if isinstance(network, Segmenter):
            _write_parts(network, found, seen.cloud, label, out)
        rows.append([*vars(found).values()][:5])
    if failed := len(skipped) + len(items) - len(rows):
        log.info(f"left out {failed:,}")
    if not rows:
        raise ReadError(f"{paths[0]}: none of the clouds can be used")
    if not isinstance(network, Segmenter):
        write_csv(out, ("file", *CSV_COLUMNS), *rows)
    what = "PLY files" if isinstance(network, Segmenter) else "rows"
    log.info(f"written: {out}, {len(rows):,} {what}")


def _label(network: Network, category: str | None) -> int:
    """Return the number of the category whose parts are predicted; 0 for a classifier.

    Raises ValueError if the category is unknown, or is missing but needed.
    """
    if not isinstance(network, Segmenter):
        return 0
    names = network.class_names
    if category is None and len(names) > 1:
        raise ValueError(f"--category is missing: give one of {', '.join(names)}")
    if category is not None and category not in names:
        raise ValueError(f"--category {category} is unknown: use {', '.join(names)}")
    return names.index(category) if category else 0


def _find(
    paths: Sequence[str | Path], optional: Sequence[str | Path] = ()
) -> tuple[dict[str, Item], list[tuple[str, str]]]:
    """Find the clouds at all paths; each cloud is returned once. Returns a dict from the name of
    each cloud to its `Item` (clouds.py), and a pair (path, reason) for each file without a cloud.

    The name of a cloud begins with the first of the paths at which the cloud was found. optional:
    as for `clouds.py::find_clouds`. Raises ReadError as `find_clouds` does.
    """
    named, skipped = {}, []
    for path in paths:
        found, others = find_clouds(path, optional=optional)
        skipped += others
        for item in found:
            inside = item.path.removeprefix(spelled(os.path.abspath(path)))
            name = f"{path}{original(inside)}"
            named.setdefault(item.path, (os.path.normpath(name), item))
    return dict(named.values()), skipped


def _predictions(
    network: Network, items: dict[str, Item], label: int, up_axis: str
) -> Iterator[tuple[Prediction, Seen | None]]:
    """Yield, for each cloud, the prediction and a `Seen` (embedding.py), which holds the cloud as
    it was read and as the encoder receives it. For a cloud that cannot be used, None is yielded
    instead of `Seen`.
    """
    for name, item in items.items():
        try:
            seen = see(network.encoder, item, up_axis)
        except ReadError as error:
            yield Prediction(name, error=str(error)), None
            continue
        if isinstance(network, Segmenter):
            parts = segment_cloud(network, seen.points, seen.frame, label)
            yield Prediction(name, parts=parts), seen
        else:
            yield Prediction(name, *classify_cloud(network, seen.frame)), seen


@torch.no_grad()
def classify_cloud(
    network: Classifier | LinearClassifier, seen: Frame
) -> tuple[str, float | None, str, float]:
    """Return the two most probable classes of a cloud, each with its probability, see
    `two_classes`.

    seen: the points that are encoded.
    """
    points, unknown = torch.from_numpy(seen.points)[None], False
    if isinstance(network, LinearClassifier):
        vectors = network.vectors(points)
        unknown, logits = bool(network.unknown(vectors)), network.out(vectors)
    else:
        logits = network(points)
    return two_classes(network.class_names, logits[0].softmax(-1).numpy(), unknown)


def two_classes(
    names: Sequence[str] | np.ndarray, probability: np.ndarray, unknown: bool
) -> tuple[str, float | None, str, float]:
    """Return the two most probable classes, each followed by its probability, which is rounded to
    four decimals.

    probability: the probability of each class in `names`. If the cloud is unknown (unlike all
    classes), the first class returned is `UNKNOWN`, with the probability None, and the second is
    the most probable class with its probability.
    """
    order = np.argsort(-probability, kind="stable")[:2]
    first, second = ((str(names[i]), round(float(probability[i]), 4)) for i in order)
    return (UNKNOWN, None, *first) if unknown else (*first, *second)


@torch.no_grad()
def segment_cloud(network: Segmenter, points: np.ndarray, seen: Frame, label: int) -> np.ndarray:
    """Predict the part label of every point of a cloud; returns [N] int16.

    points: all points [N, 3], z-up. seen: the points that are encoded, usually fewer than N. label:
    number of the cloud's category.
    """
    number = torch.tensor([label])
    encoded = network.encode(torch.from_numpy(seen.points)[None])
    parts = []
    for at in range(0, len(points), _CHUNK):
        query = torch.from_numpy(seen.place(points[at : at + _CHUNK]))[None]
        logits = network.decode(query, *encoded, number).numpy()
        parts.append(restricted_argmax(logits, number.numpy(), network.parts_of)[0])
    return np.concatenate(parts)


def _write_parts(
    network: Segmenter, found: Prediction, cloud: PointCloud, label: int, out: Path
) -> None:
    """Write a cloud as PLY, in the coordinates of its file, with part labels and a colour for each
    part.
    """
    parts_of = network.parts_of[label]
    colors = np.zeros((max(parts_of) + 1, 3), np.uint8)
    for i, part in enumerate(parts_of):
        rgb = colorsys.hsv_to_rgb(i / len(parts_of), 0.75, 0.95)
        colors[part] = np.round(255 * np.array(rgb))
    comments = [f"part {part} {network.part_names[part]}" for part in parts_of]
    columns: list = [*cloud.file_coordinates().T, *colors[found.parts].T, found.parts]
    rows = np.rec.fromarrays(columns, dtype=ply_row({"part": "<i2"}))
    file = out / (Path(found.path).name.replace("#", "-") + ".ply")
    while file.exists():  # another folder had a file of this name
        file = file.with_name(f"_{file.name}")
    write_bytes(file, header_of(rows.dtype, len(rows), comments) + rows.tobytes())
