"""Scores of frozen vectors on a labelled set, shape by shape, in per cent; nothing is chosen.

| metric      | of each scored shape                                                                               |
|-------------|----------------------------------------------------------------------------------------------------|
| logistic_10 | share of 10 draws of 10 labels a class in which logistic regression is right (standardised, C 0.1) |
| knn         | whether its 10 nearest train shapes are right (standardised, by cosine)                            |
| map         | average precision of the other scored shapes, ranked by likeness (vectors as they are)             |
| nearest     | whether the nearest of these is of its class                                                       |

The first two are those of `jepa3d probe --quick`, the last two those of `jepa3d retrieval`. A shape
alone in its class has no average precision and no right neighbour: NaN. Vectors are [mean ; max] of
the tokens of the last layer.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from jepa3d.evaluation.classifiers import predict
from jepa3d.evaluation.descriptors import baselines, cosine
from jepa3d.evaluation.features import layer_features
from jepa3d.evaluation.labelled import Labelled, Part
from jepa3d.evaluation.probe import QUICK_C, few_labels, selection_rule
from jepa3d.evaluation.retrieval import search
from jepa3d.models.encoder import PointEncoder
from jepa3d.plain import read_checked, write_checked

METRICS = {
    "logistic_10": "10 labels a class",
    "knn": "kNN",
    "map": "mAP",
    "nearest": "nearest neighbour right",
}


class Vectors(NamedTuple):
    """Vectors of a labelled set, and how two of them are compared."""

    train: np.ndarray  # m E
    scored: np.ndarray  # n E
    likeness: Callable[[np.ndarray, np.ndarray], np.ndarray]  # q E, n E -> q n, larger is nearer


class LabelledSet(NamedTuple):
    """A source of labelled shapes, and how it is read."""

    source: str
    labels_key: str = "labels"
    up_axis: str = "z"

    def read(self, num_points: int, part: Part) -> Labelled:
        """The shapes; raises ReadError for those without labels or parts (see `Labelled.read`)."""
        return Labelled.read(self.source, num_points, self.up_axis, self.labels_key, part)

    @staticmethod
    def each(
        sources: Sequence[str], labels_keys: Sequence[str], up_axes: Sequence[str]
    ) -> "list[LabelledSet]":
        """One a source; a single key or axis is that of all.

        Raises ValueError for another number of them.
        """
        for flag, values in (("--labels-key", labels_keys), ("--up-axis", up_axes)):
            if len(values) not in (1, len(sources)):
                raise ValueError(
                    f"{flag}: {len(values)} values for {len(sources)} scored sets: give one, or one each"
                )
        keys, axes = (list(values) * len(sources) for values in (labels_keys, up_axes))
        return [LabelledSet(*one) for one in zip(sources, keys, axes, strict=False)]


def names_of(sets: Sequence[LabelledSet]) -> dict[LabelledSet, str]:
    """A name for each set: that of its file, or its whole path where two would be the same."""
    names = {}
    for asked in sets:
        key = "" if asked.labels_key == "labels" else f" ({asked.labels_key})"
        name = f"{Path(asked.source).stem}{key}"
        names[asked] = name if name not in names.values() else f"{asked.source}{key}"
    return names


def outcomes(
    vectors: Vectors, y: np.ndarray, y_scored: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Metric -> per cent of each scored shape [n]; `seed` draws the labels of logistic_10."""
    train, scored, likeness = vectors
    right = [
        predict("logistic", QUICK_C, train[rows], y[rows], scored) == y_scored
        for rows in few_labels(y, seed)
    ]
    nearest, average = search(likeness, scored, scored, y_scored, np.arange(len(scored)))
    return {
        "logistic_10": 100 * np.mean(right, 0),
        "knn": 100.0 * (predict("knn", 0.0, train, y, scored) == y_scored),
        "map": 100 * average,
        "nearest": 100 * nearest,
    }


def kept_outcomes(
    folder: Path, name: str, vectors: Callable[[], Vectors], data: Labelled, seed: int
) -> dict[str, np.ndarray]:
    """`outcomes` from folder/scores-NAME-*.json, which is written first where it is missing."""
    stem = Path(data.name).stem.replace(":", "-")
    file = folder / f"scores-{name}-{stem}-{data.part}-{data.key}.json"
    if not file.exists():
        found = outcomes(vectors(), data.y, data.y_test, seed)
        plain = {
            key: [None if np.isnan(x) else x for x in values.tolist()]
            for key, values in found.items()
        }
        rule = selection_rule(data, quick=True)
        write_checked(file, {"seed": seed, "selection": rule, "outcomes": plain})
    kept = read_checked(file, "outcomes")["outcomes"]
    return {key: np.array(values, np.float64) for key, values in kept.items()}


def encoded(folder: Path, data: Labelled) -> Vectors:
    """Vectors by the encoder in a folder."""
    encoder = PointEncoder.from_pretrained(folder)
    subsets = [
        torch.from_numpy(layer_features(encoder, subset)[-1]) for subset in data.subsets()[:2]
    ]
    train, scored = (encoder.cpu().standardise(subset).numpy() for subset in subsets)
    return Vectors(train, scored, cosine)


def made_by_hand(folder: Path, name: str, data: Labelled) -> Vectors:
    """The descriptor `name` of `baselines`, on what the encoder in a folder would see."""
    encoder = PointEncoder.from_pretrained(folder)
    train, scored = (encoder.prepare(subset.points[:]) for subset in data.subsets()[:2])
    of, likeness = baselines(encoder, train)[name]
    return Vectors(of(train), of(scored), likeness)
