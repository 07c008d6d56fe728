"""Scores of frozen vectors shape by shape, in per cent, and what a comparison makes of them: paired
differences with their interval over seeds and shapes, the verdict, the tables. Nothing is chosen.

| metric      | of each scored shape                                                                               |
|-------------|----------------------------------------------------------------------------------------------------|
| logistic_10 | share of 10 draws of 10 labels a class in which logistic regression is right (standardised, C 0.1) |
| knn         | whether its 10 nearest train shapes are right (standardised, by cosine)                            |
| map         | average precision of the other scored shapes, ranked by likeness (vectors as they are)             |
| nearest     | whether the nearest of these is of its class                                                       |
| finetuned   | whether a network fine-tuned from the encoder is right, where a grid asks for it                   |

The first two are those of `jepa3d probe --quick`, the next two those of `jepa3d retrieval`. A shape
alone in its class has no average precision and no right neighbour: NaN. Vectors are [mean ; max] of
the tokens of the last layer.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.stats import t as student

from jepa3d.evaluation.classifiers import fitted, one_thread
from jepa3d.evaluation.descriptors import baselines, cosine
from jepa3d.evaluation.features import layer_features
from jepa3d.evaluation.labelled import Labelled, LabelledSet
from jepa3d.evaluation.probe import QUICK_C, few_labels, selection_rule
from jepa3d.evaluation.protocol import moments
from jepa3d.evaluation.retrieval import search
from jepa3d.evaluation.tables import Sheet, mean_std
from jepa3d.models.encoder import PointEncoder
from jepa3d.plain import read_checked, write_checked

Outcomes = dict[str, np.ndarray]  # metric -> per cent of every shape in every run, seeds shapes
METRICS = {
    "logistic_10": "10 labels a class",
    "knn": "kNN",
    "map": "mAP",
    "nearest": "nearest neighbour right",
    "finetuned": "fine-tuned",
}


# Per cent of each of the shapes at rows q, by metric, of their vectors q E.
Score = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


class Vectors(NamedTuple):
    """Vectors of a labelled set, and how two of them are compared."""

    train: np.ndarray  # m E
    scored: np.ndarray  # n E
    likeness: Callable[[np.ndarray, np.ndarray], np.ndarray]  # q E, n E -> q n, larger is nearer


def names_of(sets: Sequence[LabelledSet]) -> dict[LabelledSet, str]:
    """A name for each set: that of its file, or its whole path where two would be the same."""
    names = {}
    for dataset in sets:
        key = "" if dataset.labels_key == "labels" else f" ({dataset.labels_key})"
        name = f"{Path(dataset.source).stem}{key}"
        names[dataset] = name if name not in names.values() else f"{dataset.source}{key}"
    return names


def searching(likeness: Callable, gallery: np.ndarray, labels: np.ndarray) -> Score:
    """Scores map and nearest of queries in a gallery n E, which holds them too."""

    def score(vectors: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        nearest, average = 100 * search(likeness, vectors, gallery, labels, rows)
        return {"nearest": nearest, "map": average}

    return score


def classifying(x: np.ndarray, y: np.ndarray, labels: np.ndarray, seed: int = 0) -> Score:
    """Scores logistic_10 and knn, fitted to train m E, of shapes of classes `labels` n."""
    draws = [fitted("logistic", QUICK_C, x[rows], y[rows]) for rows in few_labels(y, seed)]
    fits = {"logistic_10": draws, "knn": [fitted("knn", 0.0, x, y)]}

    def score(vectors: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        with one_thread():
            return {
                name: 100 * np.mean([fit.predict(vectors) == labels[rows] for fit in some], 0)
                for name, some in fits.items()
            }

    return score


def outcomes(
    vectors: Vectors, y: np.ndarray, y_scored: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Metric -> per cent of each scored shape [n]; `seed` draws the labels of logistic_10."""
    train, scored, likeness = vectors
    rows = np.arange(len(scored))
    found = classifying(train, y, y_scored, seed)(scored, rows)
    return found | searching(likeness, scored, y_scored)(scored, rows)


def kept_outcomes(
    folder: Path, name: str, vectors: Callable[[], Vectors], data: Labelled, seed: int
) -> dict[str, np.ndarray]:
    """`outcomes` from folder/scores-NAME-*.json, which is written first where it is missing."""
    stem = Path(data.name).stem.replace(":", "-")
    file = folder / f"scores-{name}-{stem}-{data.part}-{data.key}.json"
    if not file.exists():
        found = outcomes(vectors(), data.y, data.y_test, seed)
        plain = {}
        for key, values in found.items():
            plain[key] = [None if np.isnan(value) else value for value in values.tolist()]
        rule = selection_rule(data, quick=True)
        write_checked(file, {"seed": seed, "selection": rule, "outcomes": plain})
    kept = read_checked(file, "outcomes")["outcomes"]
    return {key: np.array(values, np.float64) for key, values in kept.items()}


def vectors_by(name: str, run: Path, data: Labelled) -> Vectors:
    """Vectors by a run's encoder ("encoder"), by its untrained one ("untrained"), or by the
    descriptor of that name in `baselines` on what this encoder sees.
    """
    folder = run / ("encoder" if name == "encoder" else "untrained")
    encoder, subsets = PointEncoder.from_pretrained(folder), data.subsets()[:2]
    if name in ("encoder", "untrained"):
        found = [torch.from_numpy(layer_features(encoder, subset)[-1]) for subset in subsets]
        train, scored = (encoder.cpu().standardise(some).numpy() for some in found)
        return Vectors(train, scored, cosine)
    train, scored = (encoder.prepare(subset.points[:]) for subset in subsets)
    of, likeness = baselines(encoder, train)[name]
    return Vectors(of(train), of(scored), likeness)


# ------------------------------------------------------------------------------- paired differences


class Difference(NamedTuple):
    """A mean difference in points and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["better", "worse", "undecided"]:
        """Decided only where the whole interval lies on one side of 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Mean of ours - theirs and its 95 % interval, both seeds x shapes: the same seeds and shapes
    on both sides.

    Seeds and shapes are both drawn at random, and a shape that is hard for one run is hard for the
    others. With d[s, i] = ours - theirs of S seeds and N shapes, and sample variances,

        variance = A + B,  A = var_s(mean_i d) / S,  B = var_i(mean_s d) / N

    is that of the mean of a table whose rows and columns are both random (Owen, "The pigeonhole
    bootstrap", Annals of Applied Statistics 1, 2007). It counts what is particular to one cell
    twice, so the interval is rather too wide than too narrow. The quantile is that of Student's t
    with (A + B)^2 / (A^2 / (S - 1) + B^2 / (N - 1)) degrees of freedom (Satterthwaite, Biometrics
    Bulletin 2, 1946). One seed leaves B alone, and says nothing about other training runs.
    """
    gain = ours - theirs
    parts = []  # variance, degrees of freedom
    for axis, count in enumerate(gain.shape):
        if count > 1:
            parts.append((gain.mean(1 - axis).var(ddof=1) / count, count - 1))
    variance = sum(part for part, _ in parts)
    mean, reach = float(gain.mean()), 0.0
    if variance:
        freedom = variance**2 / sum(part**2 / count for part, count in parts)
        reach = float(student.ppf(0.975, freedom) * np.sqrt(variance))
    return Difference(mean, mean - reach, mean + reach)


class Row(NamedTuple):
    """One arm or baseline under one metric on one set."""

    data: str
    metric: str
    name: str
    values: list[float]  # of each seed, per cent
    difference: Difference | None  # from the reference; None of itself, or where that failed

    def record(self) -> dict[str, Any]:
        """As JSON."""
        found = self._asdict() | moments(self.values)
        if gain := self.difference:
            found |= {"difference": gain._asdict(), "verdict": gain.verdict}
        return found


def rows_of(data: str, found: dict[str, Outcomes], reference: str) -> list[Row]:
    """Rows of one set, metric by metric; shapes without a figure (alone in their class) are left
    out of all.
    """
    rows = []
    for metric in METRICS:
        tables = {name: kept[metric] for name, kept in found.items() if metric in kept}
        if not tables:
            continue
        kept = np.isfinite(np.concatenate([*tables.values()])).all(0)
        tables = {name: table[:, kept] for name, table in tables.items()}
        for name, table in tables.items():
            compared = name != reference and reference in tables
            gain = difference(table, tables[reference]) if compared else None
            rows.append(Row(data, metric, name, table.mean(1).tolist(), gain))
    return rows


def sheets_of(
    rows: list[Row], minutes: dict[str, float], failed: dict[str, str], about: dict[str, str]
) -> list[Sheet]:
    """A table for every set, with a column for every metric that it has.

    A cell is the mean ± std over seeds of the reference; of any other row the difference from it,
    with its interval and verdict. minutes: CPU-minutes of an arm. about: what each set is, in
    words.
    """
    tables: dict[str, dict[str, dict[str, str]]] = {}  # set -> row -> metric -> cell
    for row in rows:
        gain, cell = row.difference, mean_std(moments(row.values))
        if gain:
            cell = f"{gain.mean:+.1f} ({gain.low:.1f} to {gain.high:.1f}), {gain.verdict}"
        tables.setdefault(row.data, {}).setdefault(row.name, {})[row.metric] = cell
    sheets = []
    for data, table in tables.items():
        metrics = [metric for metric in METRICS if any(metric in cells for cells in table.values())]
        lines = []
        for name, cells in table.items():
            spent = f"{minutes[name]:.1f}" if name in minutes else "-"
            lines.append([name, *(cells.get(metric, "-") for metric in metrics), spent])
        lines += [[name, *["failed"] * len(metrics), "-"] for name in failed]
        columns = ["", *(METRICS[metric] for metric in metrics), "CPU-min"]
        sheets.append(Sheet(f"{data}: {about[data]}", columns, lines, []))
    return sheets
