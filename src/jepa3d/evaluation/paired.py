"""Compare encoders shape by shape: score frozen vectors on every single shape, and compute paired
differences. Each difference has a verdict and a 95 % interval, which accounts for the random choice
of seeds and shapes. The settings of the classifiers of frozen vectors are fixed; none is chosen by
a score. The classifiers are fitted to the train shapes. The scored shapes are those of the test
split or of a validation split.

| metric      | score of one shape, in per cent                                                   |
|-------------|-----------------------------------------------------------------------------------|
| logistic_10 | share of 10 logistic regressions (each on 10 labels a class) that are correct     |
| knn         | 100 if the vote of its 10 nearest train shapes (by cosine) is correct, else 0     |
| map         | average precision when the other scored shapes are ranked by similarity           |
| nearest     | 100 if the most similar of the other scored shapes has the same class, else 0     |
| finetuned   | 100 if a network fine-tuned from the encoder is correct, else 0 (if requested)    |

An encoder's vector of a shape is the mean and the maximum of the last layer's tokens, concatenated.
If the encoder stores a mean and std of its vectors, all metrics except finetuned use vectors that
are standardised by this mean and std. The metrics logistic_10 and knn are those of
`jepa3d probe --quick`: each classifier also standardises the vectors by the mean and std of the
train shapes to which it is fitted. The metrics map and nearest are those of `jepa3d retrieval`,
which does not standardise the vectors again. For a scored shape that is alone in its class, map and
nearest are NaN.
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

Outcomes = dict[str, np.ndarray]  # metric -> scores [seeds, shapes] in per cent
METRICS = {  # metric -> its name in tables
    "logistic_10": "10 labels a class",
    "knn": "kNN",
    "map": "mAP",
    "nearest": "nearest neighbour correct",
    "finetuned": "fine-tuned",
}
# A function of the vectors [q, E] of q shapes, and of their indices [q] among all scored shapes. It
# returns metric -> scores [q] in per cent.
Score = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


class Vectors(NamedTuple):
    """The vectors of the train and scored shapes of a data set, and the function that compares
    vectors.
    """

    train: np.ndarray  # [m, E]
    scored: np.ndarray  # [n, E]
    # vectors [q, E] and [n, E] -> similarities [q, n]; larger means more similar
    likeness: Callable[[np.ndarray, np.ndarray], np.ndarray]


def names_of(sets: Sequence[LabelledSet]) -> dict[LabelledSet, str]:
    """Return a name for each data set: the name of its file, or its whole path if an earlier data
    set already has that name, or its path and up axis if the path is taken too. If the data set's
    labels key is not "labels", the name also contains the key.
    """
    names = {}
    for dataset in sets:
        key = "" if dataset.labels_key == "labels" else f" ({dataset.labels_key})"
        source, up = dataset.source, f"{dataset.source}, up axis {dataset.up_axis}"
        free = (f"{name}{key}" for name in (Path(source).stem, source, up))
        names[dataset] = next(name for name in free if name not in names.values())
    return names


def searching(likeness: Callable, gallery: np.ndarray, labels: np.ndarray) -> Score:
    """Return the function that scores the metrics `map` and `nearest`.

    gallery: vectors [n, E] of the searched shapes, which include the queries. labels: classes [n]
    of the searched shapes.
    """

    def score(vectors: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        nearest, average = 100 * search(likeness, vectors, gallery, labels, rows)
        return {"nearest": nearest, "map": average}

    return score


def classifying(x: np.ndarray, y: np.ndarray, labels: np.ndarray, seed: int = 0) -> Score:
    """Fit the classifiers of logistic_10 and knn; returns the function that scores these metrics.

    x: train vectors [m, E]. y: classes [m] of the train shapes. labels: classes [n] of the scored
    shapes. seed: seed of the samples of 10 labels a class.
    """
    few = [fitted("logistic", QUICK_C, x[rows], y[rows]) for rows in few_labels(y, seed)]
    fits = {"logistic_10": few, "knn": [fitted("knn", 0.0, x, y)]}

    def score(vectors: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        with one_thread():
            return {
                name: 100 * np.mean([fit.predict(vectors) == labels[rows] for fit in models], 0)
                for name, models in fits.items()
            }

    return score


def outcomes(
    vectors: Vectors, y: np.ndarray, y_scored: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Score each of n shapes under all metrics except `finetuned`; returns metric -> scores [n] in
    per cent.

    y, y_scored: classes of the train and of the scored shapes. seed: as in `classifying`.
    """
    train, scored, likeness = vectors
    rows = np.arange(len(scored))
    found = classifying(train, y, y_scored, seed)(scored, rows)
    return found | searching(likeness, scored, y_scored)(scored, rows)


def kept_outcomes(
    folder: Path, name: str, vectors: Callable[[], Vectors], data: Labelled, seed: int
) -> dict[str, np.ndarray]:
    """Read `outcomes` from folder/scores-NAME-*.json. If the file is missing, compute them from
    `vectors()` and write the file.

    name: what the vectors come from, see `vectors_by`. seed: as in `classifying`. The star stands
    for the name of the data set, the scored split, and a hash that changes with the data and with
    the version of jepa3d (`Labelled.key` in labelled.py).
    """
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
    """Compute the vectors of the train and scored shapes of a data set.

    name: "encoder" for the encoder of the run, "untrained" for its untrained encoder, or the name
    of one of the handcrafted `baselines`. The baselines are given the same points as the untrained
    encoder.
    """
    folder = run / ("encoder" if name == "encoder" else "untrained")
    encoder, subsets = PointEncoder.from_pretrained(folder), data.subsets()[:2]
    if name in ("encoder", "untrained"):
        found = [torch.from_numpy(layer_features(encoder, subset)[-1]) for subset in subsets]
        train, scored = (encoder.cpu().standardise(each).numpy() for each in found)
        return Vectors(train, scored, cosine)
    train, scored = (encoder.prepare(subset.points[:]) for subset in subsets)
    of, likeness = baselines(encoder, train)[name]
    return Vectors(of(train), of(scored), likeness)


# ------------------------------------------------------------------------------- paired differences


class Difference(NamedTuple):
    """A mean difference, in percentage points, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["better", "worse", "undecided"]:
        """Return "better" if the whole interval lies above 0, "worse" if it lies below 0, and
        "undecided" if it contains 0.
        """
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Return the mean of ours - theirs with its 95 % interval.

    ours, theirs: scores [seeds, shapes]; both have the same seeds and shapes. Seeds and shapes are
    both random samples. The S * N differences d = ours - theirs of S seeds and N shapes are not
    independent: a shape that is hard for one run is usually hard for the other runs. So the
    variance of their mean is estimated from the sample variances over seeds s and over shapes i:

        variance = A + B,  A = var_s(mean_i d) / S,  B = var_i(mean_s d) / N

    This estimates the variance of the mean of a table whose rows and columns are both random (Owen,
    "The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007). The estimate counts the noise
    of the single differences d[s, i] twice, so the interval is slightly too wide. The half-width of
    the interval is sqrt(variance) times the 97.5 % quantile of Student's t distribution. The
    degrees of freedom are (A + B)^2 / (A^2 / (S - 1) + B^2 / (N - 1)) (Satterthwaite, Biometrics
    Bulletin 2, 1946). A single seed gives no A; the interval then ignores that training runs
    differ. If all differences are equal, the variance is 0, and the interval has no width.
    """
    gain = ours - theirs
    terms = []  # (variance, degrees of freedom)
    for axis, count in enumerate(gain.shape):
        if count > 1:
            terms.append((gain.mean(1 - axis).var(ddof=1) / count, count - 1))
    variance = sum(term for term, _ in terms)
    mean, half_width = float(gain.mean()), 0.0
    if variance:
        freedom = variance**2 / sum(term**2 / count for term, count in terms)
        half_width = float(student.ppf(0.975, freedom) * np.sqrt(variance))
    return Difference(mean, mean - half_width, mean + half_width)


class Row(NamedTuple):
    """The scores of one arm or baseline under one metric on one data set. An arm is a configuration
    that is trained with several seeds. A baseline is an untrained encoder or a handcrafted
    descriptor (`vectors_by`).
    """

    data: str
    metric: str
    name: str
    values: list[float]  # one value per seed: the mean score over shapes, in per cent
    # the difference from the reference arm; None for the reference itself, and if the reference has
    # no score under this metric (if its training failed, or if it was not fine-tuned)
    difference: Difference | None

    def record(self) -> dict[str, Any]:
        """Return the row as a dictionary that can be written as JSON."""
        found = self._asdict() | moments(self.values)
        if gain := self.difference:
            found |= {"difference": gain._asdict(), "verdict": gain.verdict}
        return found


def rows_of(data: str, found: dict[str, Outcomes], reference: str) -> list[Row]:
    """Return the rows of the data set `data`, metric by metric.

    found: name of an arm or baseline -> its outcomes. reference: name of the reference arm. A shape
    that is alone in its class has the score NaN under some metrics. Such a shape is left out of
    all rows of these metrics. If that leaves no shape, there are no rows of these metrics.
    """
    rows = []
    for metric in METRICS:
        tables = {name: kept[metric] for name, kept in found.items() if metric in kept}
        if not tables:
            continue
        kept = np.isfinite(np.concatenate([*tables.values()])).all(0)
        if not kept.any():
            continue
        tables = {name: table[:, kept] for name, table in tables.items()}
        for name, table in tables.items():
            compared = name != reference and reference in tables
            gain = difference(table, tables[reference]) if compared else None
            rows.append(Row(data, metric, name, table.mean(1).tolist(), gain))
    return rows


def sheets_of(
    rows: list[Row], minutes: dict[str, float], failed: dict[str, str], about: dict[str, str]
) -> list[Sheet]:
    """Return a table for every data set, with a column for every metric that was scored on it.

    rows: each one becomes a cell of a table. The cell shows the difference from the reference, its
    interval and its verdict. Without a difference (as for the reference itself), the cell shows
    mean ± std over seeds. minutes: arm -> CPU-minutes of one training run, averaged over seeds.
    failed: arm -> why it failed. about: data set -> its description.
    """
    # data set -> row -> metric -> cell
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        gain, cell = row.difference, mean_std(moments(row.values))
        if gain:
            cell = f"{gain.mean:+.1f} ({gain.low:.1f} to {gain.high:.1f}), {gain.verdict}"
        tables.setdefault(row.data, {}).setdefault(row.name, {})[row.metric] = cell
    sheets = []
    for data, table in tables.items():
        scored = set().union(*table.values())
        metrics = [metric for metric in METRICS if metric in scored]
        lines = []
        for name, cells in table.items():
            spent = f"{minutes[name]:.1f}" if name in minutes else "-"
            lines.append([name, *(cells.get(metric, "-") for metric in metrics), spent])
        lines += [[name, *["failed"] * len(metrics), "-"] for name in failed]
        columns = ["", *(METRICS[metric] for metric in metrics), "CPU-min"]
        sheets.append(Sheet(f"{data}: {about[data]}", columns, lines, []))
    return sheets
