"""`jepa3d retrieval`: how well frozen vectors retrieve shapes of the same class, compared with an
untrained encoder and handcrafted descriptors.

One split of the data is searched, by default the test split. Every shape of this split is the query
once, unless it is alone in its class. All other shapes of the split are ranked by similarity; the
shapes of the query's class are relevant. The average precision is computed over the whole ranking;
equally similar shapes are ranked by their index. Nothing is trained or chosen.

A gain is how much higher the mean average precision of the first model is than that of another
model. Gains are paired by query: the two models are compared on each query. The interval of a gain
is from a bootstrap over queries. This interval ignores that another training run would give other
scores.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa3d.data.arrays import npz_headers
from jepa3d.data.cloud import ReadError
from jepa3d.data.store import Store
from jepa3d.evaluation.descriptors import Descriptor, baselines, cosine
from jepa3d.evaluation.features import untrained_like
from jepa3d.evaluation.labelled import Labelled, LabelledSet
from jepa3d.evaluation.protocol import provenance
from jepa3d.evaluation.tables import Sheet
from jepa3d.models.encoder import PointEncoder, pool
from jepa3d.models.heads import Classifier
from jepa3d.models.ready import load_any

# the baseline "geometry" is standardised by its mean and std over at most this many train shapes
_FITTED = 1024
# rows of the baselines, here and in dense.py
_BASELINES = ("untrained", "histograms", "geometry", "positions", "geometry and positions")
_RESAMPLES = 2000  # number of resamples of the bootstrap
# Largest number of similarities that are computed at once. As doubles, this many take 128 MiB, and
# a few copies of them are made.
_NUMBERS = 2**24


def ranked(similarity: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return two scores of each of q queries, as an array [2, q]: whether the most similar shape
    has the query's class (0 or 1), and the average precision.

    Both are NaN for a query that is alone in its class. similarity: the similarity [q, n] of each
    query to each of n shapes; larger means more similar. labels: the classes [n] of the shapes.
    rows: the index [q] of each query among the n shapes. A query is left out of its own ranking.
    """
    similarity, queries = np.array(similarity, np.float64), np.arange(len(rows))
    similarity[queries, rows] = -np.inf
    order = np.argsort(-similarity, 1, kind="stable")[:, :-1]
    relevant = labels[order] == labels[rows][:, None]
    count = relevant.sum(1)
    precision = relevant.cumsum(1) / np.arange(1, relevant.shape[1] + 1)
    average = (precision * relevant).sum(1) / np.maximum(count, 1)
    return np.where(count > 0, [relevant[:, 0], average], np.nan)


def search(
    likeness: Callable[[np.ndarray, np.ndarray], np.ndarray],
    queries: np.ndarray,
    gallery: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
) -> np.ndarray:
    """Search a gallery [n, E] with query vectors [q, E]; returns the scores [2, q] of `ranked`.

    likeness: function that computes the similarities [q, n] of queries to the gallery. labels,
    rows: see `ranked`. The similarities are computed in blocks, to limit memory.
    """
    size = max(1, _NUMBERS // len(gallery))
    blocks = [slice(start, start + size) for start in range(0, len(rows), size)]
    found = [ranked(likeness(queries[b], gallery), labels, rows[b]) for b in blocks]
    return np.concatenate(found, 1)


@torch.inference_mode()
def vectors_of(
    model: PointEncoder | Classifier, points: Tensor, batch_size: int = 16
) -> np.ndarray:
    """Compute the vectors [n, E] of clouds [n, N, 3] that `encoder.prepare` returned.

    The vectors of an encoder are those of `jepa3d.embed`. The vectors of a classifier are its class
    token and the maximum over all other tokens, concatenated.
    """
    found = []
    for batch in points.split(batch_size):
        if isinstance(model, Classifier):
            tokens = model.encode(batch)
            found.append(torch.cat([tokens[:, 0], pool(tokens[:, 1:], "max")], -1))
        else:
            found.append(model.vectors(batch))
    return torch.cat(found).numpy()


def paired_interval(gain: np.ndarray, seed: int = 0) -> list[float]:
    """Return the two ends of the 95 % interval of the mean gain, from a bootstrap over queries.

    gain: the gains of n queries.
    """
    rng = np.random.default_rng(seed)
    means = [gain[rng.integers(0, len(gain), len(gain))].mean() for _ in range(_RESAMPLES)]
    return np.percentile(means, [2.5, 97.5]).tolist()


def compared(values: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Compare the first model with all others. Returns a dict from the name of each other model to
    the gain of the first model over this model: its mean and its interval. The entry of the first
    model itself is empty.

    values: model -> scores of the same n queries or shapes, in per cent.
    """
    first, *others = values
    gains = {name: values[first] - values[name] for name in others}
    found: dict[str, dict[str, Any]] = {first: {}}
    for name, gain in gains.items():
        found[name] = {"first_minus_this": float(gain.mean())}
        found[name]["interval"] = paired_interval(gain)
    return found


def compared_cells(row: dict[str, Any]) -> list[str]:
    """Return the two table cells that show a gain from `compared`: its mean and its interval, or
    dashes for the first model.
    """
    if "interval" not in row:
        return ["-", "-"]
    low, high = row["interval"]
    return [f"{row['first_minus_this']:+.1f}", f"{low:+.1f} to {high:+.1f}"]


def retrieval(models: list[str], dataset: LabelledSet, part: str = "test") -> dict[str, Any]:
    """Score each model, and the baselines of the first model, by mAP and by the share of queries
    whose nearest neighbour has the correct class.

    models: encoders as in `jepa3d.load`, or runs of jepa3d classify. part: the split that is
    searched. The baselines are an untrained encoder and the handcrafted descriptors that
    `descriptors.py::baselines` returns. Classes without train or test shapes are left out. (For the
    part "validation", classes without train or validation shapes are left out instead.) Queries
    that are alone in their class are left out too. Returns the result record. Raises ValueError or
    ReadError if a model or the data cannot be used.
    """
    scores: dict[str, np.ndarray] = {}
    record: dict[str, Any] = {}
    kept = np.arange(0)
    for encoder, descriptors, shapes in opened(models, dataset, part):
        kept = queries_of(shapes)
        points, labels = encoder.prepare(shapes.test.points[:]), shapes.y_test
        for name, (of, likeness) in descriptors.items():
            vectors = of(points)
            found = search(likeness, vectors, vectors, labels, np.arange(len(labels)))
            scores[name] = 100 * found
        record = data_record("retrieval", shapes, dataset, part)
    gains = compared({name: average[kept] for name, (_, average) in scores.items()})
    rows = {}
    for name, values in scores.items():
        nearest, average = values[:, kept].mean(1).tolist()
        rows[name] = {"map": average, "nearest": nearest} | gains[name]
    return record | {"queries": len(kept), "results": rows} | provenance()


def check_names(models: list[str]) -> None:
    """Raise ValueError if a model is given by the name of a baseline, whose row it would share."""
    if taken := set(models) & set(_BASELINES):
        name = min(taken)
        raise ValueError(f"{name}: a baseline has this name; give the full path of the folder")


def queries_of(shapes: Labelled) -> np.ndarray:
    """Return the indices of the queries: the shapes of `shapes.test` that are not alone in their
    class. Raises ReadError if there are none.
    """
    queries = np.flatnonzero(np.bincount(shapes.y_test)[shapes.y_test] > 1)
    if not len(queries):
        found = "no class has two shapes in the split that is searched"
        raise ReadError(f"{shapes.name}: {found}, so there is nothing to find")
    return queries


def opened(
    models: list[str], dataset: LabelledSet, part: str, whole: bool = False
) -> Iterator[tuple[PointEncoder, dict[str, Descriptor], Labelled]]:
    """Yield for every model: its encoder; its descriptors by name; and the shapes.

    A descriptor is a pair: a function that computes vectors, and a function that compares them. The
    descriptors of the first model also include its baselines. dataset: where the shapes are read
    from. Its up axis may also be "none", for vectors that do not depend on the rotation of a shape;
    the shapes themselves are then read as z-up. part: the split to search: train, test or
    validation. The attribute `test` of the yielded shapes has this split, whichever it is (see
    `Labelled.of`). whole: read the shapes of an .npz bundle or a store with all of their points,
    and not only with as many points as the encoder sees.
    """
    check_names(models)
    upright = dataset._replace(up_axis=dataset.up_axis.replace("none", "z"))
    for name in models:
        model = load_any(name)
        encoder = model if isinstance(model, PointEncoder) else model.encoder
        # a run whose network is not a `Classifier` is scored by the vectors of its encoder
        if not isinstance(model, Classifier):
            model = encoder
        encoder.upright = dataset.up_axis != "none"
        count = encoder.num_points
        count = _points_in(dataset.source, count) if whole else count
        shapes = upright.read(count, "validation" if part == "validation" else "test")
        train = shapes.train
        descriptors = {name: Descriptor(partial(vectors_of, model), cosine)}
        if name == models[0]:
            rows = np.sort(np.random.default_rng(0).permutation(len(train))[:_FITTED])
            untrained = untrained_like(encoder, train)
            descriptors["untrained"] = Descriptor(partial(vectors_of, untrained), cosine)
            descriptors |= baselines(encoder, encoder.prepare(train.points[rows]))
        shapes = replace(shapes, test=train) if part == "train" else shapes
        yield encoder, descriptors, shapes


def _points_in(data: str, fewest: int) -> int:
    """Return the number of points per cloud in an .npz bundle or a store, but at least `fewest`.

    Return `fewest` if the clouds have different numbers of points, or for any other kind of data.
    """
    path, count = Path(data), None
    if (path / "store.json").is_file():
        count = Store(path).num_points
    elif path.suffix == ".npz" and path.is_file():
        shape = npz_headers(path).get("points", ((),))[0]
        count = shape[1] if len(shape) == 3 else None
    return max(fewest, count or 0)


def data_record(task: str, shapes: Labelled, dataset: LabelledSet, part: str) -> dict[str, Any]:
    """Return the entries of a result that describe its shapes."""
    data = {"name": shapes.name, "fingerprint": shapes.fingerprint}
    data |= {"labels_key": dataset.labels_key, "part": part}
    return {"task": task, "data": data, "classes": len(shapes.class_names)}


def sheet(result: dict[str, Any]) -> Sheet:
    """Return the table of a result."""
    data = result["data"]
    title = (
        f"{data['name']} ({data['labels_key']}), {data['part']} split: {result['queries']:,} "
        f"queries of {result['classes']} classes; mean average precision, and queries whose "
        "nearest neighbour is correct, in %; the vectors are frozen, and no setting was chosen"
    )
    rows = [
        [name, f"{row['map']:.1f}", f"{row['nearest']:.1f}", *compared_cells(row)]
        for name, row in result["results"].items()
    ]
    columns = ["", "mAP", "nearest", "mAP: first - this", "95 %, paired by query"]
    return Sheet(title, columns, rows, [])
