"""`--corruptions` of retrieval and probe: what frozen vectors are worth when the shapes asked about
are damaged.

A shape is corrupted before the frame, from all the points that its source has (data/corruptions.py
has the kinds), for the encoder and everything beside it alike. The clean shapes that are searched,
or that classifiers were fitted to, stay as they are. Nothing is chosen.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jepa3d.data.corruptions import KINDS, corrupt
from jepa3d.data.datasets import PointClouds
from jepa3d.evaluation.classifiers import fitted
from jepa3d.evaluation.descriptors import Descriptor
from jepa3d.evaluation.labelled import Part
from jepa3d.evaluation.probe import QUICK_C, few_labels
from jepa3d.evaluation.protocol import provenance
from jepa3d.evaluation.retrieval import data_record, opened, search
from jepa3d.models.encoder import PointEncoder

QUERIES = 400  # at most; where a kind has five severities, half as many at each

# Of prepared clouds q N 3 and their numbers q: figures in per cent by the name of a vector.
Figures = Callable[[Tensor, np.ndarray], dict[str, dict[str, float]]]


def search_corrupted(
    models: list[str], data: str, labels_key: str = "labels", up_axis: str = "z", part: str = "test"
) -> dict[str, Any]:
    """What `retrieval` finds for corrupted queries, in the clean part without their own shape.

    Of every kind, lists over its severities. Raises ValueError and ReadError.
    """
    found: dict[str, dict[str, Any]] = {}
    record: dict[str, Any] = {}
    for encoder, descriptors, _, clouds in opened(
        models, data, labels_key, up_axis, part, whole=True
    ):
        labels = clouds.labels
        assert labels is not None
        own = _some(np.flatnonzero(np.bincount(labels)[labels] > 1))
        points = encoder.prepare(clouds.points[:])
        gallery = {name: of(points) for name, (of, _) in descriptors.items()}
        _under_each_kind(
            encoder, clouds, own, partial(_searched, descriptors, gallery, labels), found
        )
        record = data_record("retrieval", clouds, labels_key, part) | {"queries": len(own)}
    return record | {"corruptions": found} | provenance()


def probe_corrupted(
    models: list[str],
    data: str,
    labels_key: str = "labels",
    up_axis: str = "z",
    part: Part = "test",
) -> dict[str, Any]:
    """Accuracy on corrupted shapes of a part, under logistic_10 and knn fitted to clean train
    shapes.

    Of every kind, lists over its severities. Raises ValueError and ReadError.
    """
    found: dict[str, dict[str, Any]] = {}
    record: dict[str, Any] = {}
    for encoder, descriptors, train, clouds in opened(
        models, data, labels_key, up_axis, part, whole=True
    ):
        y = train.labels
        assert y is not None
        assert clouds.labels is not None
        own, points = _some(np.arange(len(clouds))), encoder.prepare(train.points[:])
        fits: dict[str, dict[str, list[Any]]] = {}
        for name, (of, _) in descriptors.items():
            x = of(points)
            few = [
                fitted("logistic_10", QUICK_C, x[shots], y[shots])
                for shots in few_labels(y, seed=0)
            ]
            fits[name] = {"logistic_10": few, "knn": [fitted("knn", 0.0, x, y)]}
        _under_each_kind(
            encoder, clouds, own, partial(_classified, descriptors, fits, clouds.labels), found
        )
        record = data_record("probe", clouds, labels_key, part) | {
            "train": len(train),
            "queries": len(own),
        }
    return record | {"corruptions": found} | provenance()


def _some(numbers: np.ndarray) -> np.ndarray:
    """At most `QUERIES` of them, always the same."""
    return np.sort(np.random.default_rng(0).permutation(numbers)[:QUERIES])


def _under_each_kind(
    encoder: PointEncoder,
    clouds: PointClouds,
    own: np.ndarray,
    figures: Figures,
    found: dict[str, dict[str, Any]],
) -> None:
    """Add to `found` the figures of the shapes `own` of clouds, clean and under every kind: lists
    over severities.
    """
    for name in ("clean", *KINDS):
        levels = KINDS[name].levels if name in KINDS else (0,)
        trained = name not in KINDS or KINDS[name].trained
        row = found.setdefault(name, {"levels": list(levels), "trained": trained, "results": {}})
        asked, results = own[:: 1 if len(levels) == 1 else 2], {}
        for severity in range(len(levels)):
            shapes = [clouds.points[i] for i in asked]
            if name in KINDS:
                shapes = [
                    corrupt(shape, name, severity, i)
                    for i, shape in zip(asked, shapes, strict=True)
                ]
            for vector, values in figures(encoder.prepare(shapes), asked).items():
                for figure, value in values.items():
                    results.setdefault(vector, {}).setdefault(figure, []).append(value)
        row["results"] |= results


def _searched(
    descriptors: dict[str, Descriptor],
    gallery: dict[str, np.ndarray],
    labels: np.ndarray,
    dirty: Tensor,
    own: np.ndarray,
) -> dict[str, dict[str, float]]:
    """Nearest shape right and mAP of dirty queries q N 3, shapes number `own` q of a gallery."""
    found = {}
    for name, (of, likeness) in descriptors.items():
        nearest, average = 100 * search(likeness, of(dirty), gallery[name], labels, own).mean(1)
        found[name] = {"nearest": float(nearest), "map": float(average)}
    return found


def _classified(
    descriptors: dict[str, Descriptor],
    fits: dict[str, dict[str, list[Any]]],
    labels: np.ndarray,
    dirty: Tensor,
    own: np.ndarray,
) -> dict[str, dict[str, float]]:
    """Accuracy on dirty shapes q N 3, number `own` q, of each protocol: the mean over its
    classifiers.
    """
    found: dict[str, dict[str, float]] = {}
    for name, (of, _) in descriptors.items():
        x = of(dirty)
        found[name] = {
            protocol: 100 * float(np.mean([fit.predict(x) == labels[own] for fit in classifiers]))
            for protocol, classifiers in fits[name].items()
        }
    return found


def show(result: dict[str, Any]) -> None:
    """The table of a result: a row a kind, the figures of every vector, means over severities."""
    data, searches = result["data"], result["task"] == "retrieval"
    figures = "nearest right / mAP" if searches else "10 labels a class / kNN"
    told = (
        "searched among the clean shapes, without their own"
        if searches
        else f"told by logistic_10 and knn fitted to {result['train']:,} clean train shapes (last layer, C {QUICK_C})"
    )
    print(
        f"\n{data['name']} ({data['labels_key']}), {data['part']} part: {result['queries']:,} shapes of "
        f"{result['classes']} classes, corrupted before the frame and {told}; %, nothing chosen.\n"
        "The first seven kinds: mean of PointCloud-C's five severities, at each every second shape.\n"
        "* the encoder of the package was never trained with it"
    )
    table = Table(figures, *result["corruptions"]["clean"]["results"])
    for kind, row in result["corruptions"].items():
        cells = [
            " / ".join(f"{np.mean(values):.1f}" for values in by.values())
            for by in row["results"].values()
        ]
        table.add_row(kind + " *" * (not row["trained"]), *cells)
    Console(width=max(100, Console().width)).print(table)
