"""`jepa3d retrieval`: mean average precision of frozen vectors on labelled shapes, beside an untrained encoder and D2.

Every shape of the part is a query once; the others of it are ranked by cosine, those of its class are relevant, and
the average precision is taken over the whole ranking (ties by number). Nothing is trained, chosen or tuned. Gains are
paired by query; their interval is the bootstrap's over queries, which says nothing about other training runs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from jepa3d.data.datasets import PointClouds, load
from jepa3d.data.store import StoredPoints
from jepa3d.evaluation.features import untrained_like
from jepa3d.evaluation.labelled import Labelled
from jepa3d.evaluation.protocol import provenance
from jepa3d.models.encoder import PointEncoder, pool
from jepa3d.models.heads import Classifier
from jepa3d.models.ready import load_any

D2_BINS = 64
_RESAMPLES = 2000
_NUMBERS = 2**24  # at once: 128 MiB of doubles, a few times


def average_precision(similarity: np.ndarray, labels: np.ndarray, first: int = 0) -> np.ndarray:
    """Average precision q of shapes first, first + 1 ... as queries among the others, NaN for one alone in its class.

    similarity: q n, larger is nearer; a query's own is ignored. labels: n.
    """
    ranked = np.array(similarity, np.float64)
    queries = np.arange(len(ranked))
    ranked[queries, first + queries] = -np.inf
    order = np.argsort(-ranked, 1, kind="stable")[:, :-1]
    relevant = labels[order] == labels[first + queries][:, None]
    count = relevant.sum(1)
    precision = relevant.cumsum(1) / np.arange(1, relevant.shape[1] + 1)
    return np.where(count > 0, (precision * relevant).sum(1) / np.maximum(count, 1), np.nan)


def precision_by_blocks(similarity: Callable[[slice], np.ndarray], labels: np.ndarray, width: int = 1) -> np.ndarray:
    """`average_precision` n of all shapes, a block of queries at a time, so that memory is bounded whatever n.

    similarity: of the rows in a slice to all, q n. width: numbers it needs for each pair of a query and a shape.
    """
    blocks = _blocks(len(labels), width)
    return np.concatenate([average_precision(similarity(block), labels, block.start) for block in blocks])


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors n E at length 1; a zero vector stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def d2_histograms(points: np.ndarray | StoredPoints, seed: int = 0) -> np.ndarray:
    """D2 shape histograms n 64 of clouds n N 3 (Osada et al. 2002).

    The distances of 32,768 random pairs of points, divided by their mean, in 64 bins up to 3.
    """
    rng = np.random.default_rng(seed)
    histograms = np.empty((len(points), D2_BINS))
    for i in range(len(points)):
        cloud = points[i]
        first, second = cloud[rng.integers(0, len(cloud), (2, 2**15))]
        distance = np.linalg.norm(first - second, axis=1)
        histograms[i] = np.histogram(distance / distance.mean(), D2_BINS, (0, 3))[0] / len(distance)
    return histograms


def likeness(histograms: np.ndarray, rows: slice) -> np.ndarray:
    """Minus the L1 distances q n of the histograms in `rows` to all n; needs 64 numbers a pair on the way."""
    return -np.abs(histograms[rows, None] - histograms[None]).sum(-1)


def _blocks(count: int, width: int = 1) -> list[slice]:
    """Slices of `count` rows; those of one and all rows make few pairs, each of `width` numbers."""
    size = max(1, _NUMBERS // (count * width))
    return [slice(at, at + size) for at in range(0, count, size)]


@torch.inference_mode()
def vectors_of(model: PointEncoder | Classifier, clouds: PointClouds, batch_size: int = 64) -> np.ndarray:
    """Vectors n E: an encoder's `embed`, a classifier's [class token ; max over tokens]."""
    found = []
    for at in range(0, len(clouds), batch_size):
        points = clouds.batch(np.arange(at, min(at + batch_size, len(clouds))))
        if isinstance(model, Classifier):
            tokens = model.encode(model.encoder.prepare(points))
            found.append(torch.cat([tokens[:, 0], pool(tokens[:, 1:], "max")], -1))
        else:
            found.append(model.embed(points))
    return torch.cat(found).numpy()


def paired_interval(gain: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of gains n, over queries."""
    rng = np.random.default_rng(seed)
    means = [gain[rng.integers(0, len(gain), len(gain))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def retrieval(
    models: list[str], data: str, labels_key: str = "labels", up_axis: str = "z", part: str = "test"
) -> dict[str, Any]:
    """mAP of each model on a part of labelled shapes, of the first one's untrained encoder, and of D2 histograms.

    models: encoders as of `jepa3d.load`, or runs of jepa3d classify. Classes that train or test lacks are left out.
    Raises ValueError and ReadError.
    """
    scores: dict[str, np.ndarray] = {}
    labelled = None
    for name in models:
        model = load_any(name)
        encoder = model if isinstance(model, PointEncoder) else model.encoder
        model = model if isinstance(model, Classifier) else encoder  # heads of others have no features of their own
        labelled = Labelled.of(load([data], encoder.num_points, "all", [up_axis], labels_key), data)
        clouds = labelled.test if part == "test" else labelled.train
        assert clouds.labels is not None
        scores[name] = _of_vectors(vectors_of(model, clouds), clouds.labels)
        if name == models[0]:
            untrained = untrained_like(encoder, labelled.train)
            scores["untrained"] = _of_vectors(vectors_of(untrained, clouds), clouds.labels)
            histograms = d2_histograms(clouds.points)
            scores["D2 histograms"] = precision_by_blocks(partial(likeness, histograms), clouds.labels, D2_BINS)
    assert labelled is not None
    kept = np.isfinite(scores[models[0]])
    found: dict[str, dict[str, Any]] = {}
    for name, values in scores.items():
        gain = 100 * (scores[models[0]] - values)[kept]
        found[name] = {"map": 100 * float(values[kept].mean())}
        if name != models[0]:
            found[name] |= {"first_minus_this": float(gain.mean()), "interval": paired_interval(gain)}
    return {
        "task": "retrieval",
        "data": {"name": labelled.name, "fingerprint": labelled.fingerprint, "labels_key": labels_key, "part": part},
        "queries": int(kept.sum()),
        "classes": len(labelled.class_names),
        "results": found,
    } | provenance()


def _of_vectors(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    unit = unit_length(vectors)
    return precision_by_blocks(lambda rows: unit[rows] @ unit.T, labels)


def show(result: dict[str, Any]) -> None:
    """The table of a result."""
    data = result["data"]
    print(
        f"\n{data['name']} ({data['labels_key']}), {data['part']} part: {result['queries']:,} queries of "
        f"{result['classes']} classes; mean average precision %, cosine of frozen vectors, nothing chosen"
    )
    table = Table()
    for name in ("", "mAP", "first - this", "95 %, paired by query"):
        table.add_column(name)
    for name, values in result["results"].items():
        low, high = values.get("interval", (0, 0))
        gain = values.get("first_minus_this")
        table.add_row(
            name,
            f"{values['map']:.1f}",
            *(("-", "-") if gain is None else (f"{gain:+.1f}", f"{low:+.1f} to {high:+.1f}")),
        )
    Console(width=max(100, Console().width)).print(table)
