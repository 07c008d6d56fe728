"""Few-shot episodes: S labelled shapes of each of W classes to learn from, others of the same
classes to name.

The protocol of Sharma and Kaul (NeurIPS 2020) as Point-BERT and those after it use it on
ModelNet40: 5 or 10 ways, 10 or 20 shots from the train part, 20 test shapes a class, ten folds,
mean and std over the folds. Either the published folds, or episodes drawn here from any labelled
data. On frozen features two classifiers score them, nothing is chosen:

| method   | features                                  | classifier                                               |
|----------|-------------------------------------------|----------------------------------------------------------|
| ncm      | less the support's mean, then length 1    | nearest class mean by cosine                             |
| logistic | standardised by the support's mean, std   | logistic regression, C = 0.1                             |

W * S labels are too few to hold some out, so C, layer and pooling are fixed before anything is
seen; C is the larger of the two that `probe`'s logistic_10 chooses from. What a query shape is
called depends on no other query shape.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa3d.data.cloud import ReadError
from jepa3d.data.datasets import PointClouds, load
from jepa3d.data.errors import as_read_error, printable
from jepa3d.data.store import SPLITS
from jepa3d.evaluation import classifiers
from jepa3d.evaluation.descriptors import cosine, unit_length
from jepa3d.evaluation.features import layer_features
from jepa3d.models.dvae import DVAE
from jepa3d.models.encoder import PointEncoder
from jepa3d.plain import log, read_checked, write_checked

_C = 0.1
_SETTING = re.compile(r"(\d+)way_?(\d+)shot")
Fold = tuple[PointClouds, PointClouds]  # train and test


class Episode(NamedTuple):
    """Rows of a `PointClouds`, class after class. Sizes W S, W Q and W."""

    support: np.ndarray
    query: np.ndarray
    classes: np.ndarray  # the W class numbers, ascending


# ----------------------------------------------------------------------------------- drawn episodes


def draw_episodes(
    clouds: PointClouds, ways: int, shots: int, folds: int, seed: int, queries: int
) -> list[Episode]:
    """Episodes of `ways` classes with `shots` train and `queries` test shapes of each, all without
    replacement.

    Episode i depends on the data, seed, ways, shots, queries and i alone, not on how many are
    drawn. Classes are drawn among those that have enough shapes in both parts. All have `queries`
    test shapes, so accuracy is also the mean over classes. Raises ValueError where too few classes
    have enough, with the number of queries that would do.
    """
    if clouds.labels is None or clouds.split is None:
        lacks = "labels" if clouds.labels is None else "train/test split"
        raise ReadError(f"{clouds.name}: has no {lacks}, which few-shot episodes need")
    labels, size = clouds.labels, int(clouds.labels.max(initial=0)) + 1
    train_rows, test_rows = (np.flatnonzero(clouds.split == i) for i in range(2))
    train = np.bincount(labels[train_rows], minlength=size)
    test = np.bincount(labels[test_rows], minlength=size)
    enough = np.flatnonzero((train >= shots) & (test >= queries))
    if len(enough) < ways:
        most = np.sort(test[train >= shots])[::-1][ways - 1 : ways]  # queries that would do
        needed = f"{ways} classes with {shots} train and {queries} test shapes each are needed"
        found = f"{needed}, {len(enough)} are there"
        if most.any():
            found += f"; with {most[0]} test shapes a class there are enough"
        raise ReadError(f"{clouds.name}: {found}")
    names = dict(enumerate(clouds.class_names))
    few = np.setdiff1d(np.flatnonzero(train + test), enough).tolist()
    if few:
        listed = ", ".join(f"{names.get(i, i)} ({train[i]} train, {test[i]} test)" for i in few)
        needed = f"{shots} train and {queries} test shapes"
        log.info(f"not drawn, for want of {needed}: {printable(listed)}")

    def draw(fold: int) -> Episode:
        rng = np.random.default_rng([seed, ways, shots, fold])
        classes = np.sort(rng.choice(enough, ways, replace=False))

        def some(rows: np.ndarray, count: int) -> np.ndarray:
            of_class = [rows[labels[rows] == number] for number in classes]
            picked = [rng.choice(among, count, replace=False) for among in of_class]
            return np.concatenate(picked)

        return Episode(some(train_rows, shots), some(test_rows, queries), classes)

    return [draw(fold) for fold in range(folds)]


def save_episodes(path: Path, episodes: list[Episode], fingerprint: str) -> None:
    """Write the episodes of the data of `fingerprint` as JSON, atomically."""
    plain = [dict(zip(Episode._fields, map(np.ndarray.tolist, e), strict=True)) for e in episodes]
    write_checked(path, {"fingerprint": fingerprint, "episodes": plain})


def load_episodes(path: Path, fingerprint: str) -> list[Episode]:
    """The episodes of `save_episodes`.

    Raises ReadError for a damaged file and for episodes of other data.
    """
    with as_read_error(path):
        record = read_checked(path)
        if record["fingerprint"] != fingerprint:
            found = f"has episodes of the data {record['fingerprint']:.12}"
            raise ReadError(f"{found}, these are {fingerprint:.12}")
        rows = [[row[key] for key in Episode._fields] for row in record["episodes"]]
        return [Episode(*(np.array(values, np.int64) for values in row)) for row in rows]


def fold_of(clouds: PointClouds, episode: Episode) -> Fold:
    """Train (support) and test (query) parts of an episode, labels 0 to W - 1.

    Raises ValueError for an episode of other data.
    """
    labels = np.empty(0) if clouds.labels is None else clouds.labels
    rows = np.concatenate(episode[:2])
    inside = rows.min() >= 0 and rows.max() < len(labels)
    if not inside or not np.isin(labels[rows], episode.classes).all():
        found = f"its {len(clouds)} shapes or their labels are not those"
        raise ValueError(f"{clouds.name}: {found} that the episodes were drawn from")
    known = clouds.class_names
    names = tuple(known[number] for number in episode.classes if number < len(known))
    numbers = np.searchsorted(episode.classes, labels)
    clouds = replace(clouds, labels=numbers, class_names=names)
    return clouds.subset(episode.support), clouds.subset(episode.query)


# ---------------------------------------------------------------------------------- published folds


def published_folds(
    folder: Path, num_points: int, up_axis: str, ways: int, shots: int, folds: int, queries: int
) -> list[Fold] | None:
    """Train and test parts, labels 0 to W - 1, of the folds 0, 1 ... that `jepa3d prepare
    ModelNetFewshot` stored.

    folder: that of the setting (`D/5way_10shot`), or one around it. None where `folder` is no such
    thing. Raises ReadError where the setting, or one of its first `folds`, is missing or
    unfinished, or has not exactly W classes of S train and `queries` test shapes.
    """
    found: dict[tuple[int, int], Path] = {}
    below = [path for depth in ("", "*/") for path in sorted(folder.glob(f"{depth}*way*shot"))]
    for path in [folder, *below]:
        name = _SETTING.fullmatch(path.resolve().name)
        if name and any(path.glob("*/store.json")):
            found.setdefault((int(name[1]), int(name[2])), path)
    if not found:
        return None
    if (ways, shots) not in found:
        names = ", ".join(f"{a}-way {b}-shot" for a, b in sorted(found))
        raise ReadError(f"{folder}: holds {names}, not {ways}-way {shots}-shot")

    def read(path: Path) -> Fold:
        if not (path / "store.json").is_file():
            found = f"{path}: is missing, and {folds} folds are needed"
            raise ReadError(f"{found}; run its jepa3d prepare again, it goes on")
        clouds = load([str(path)], num_points, "all", [up_axis])
        clouds = replace(clouds, name=f"{path.resolve().parent.name}/{path.name}")
        if clouds.labels is None or clouds.split is None:
            raise ReadError(f"{path}: has no labels or no train/test split")
        for i, count in enumerate((shots, queries)):
            labels = clouds.labels[clouds.split == i]
            counts = np.bincount(labels, minlength=len(clouds.class_names)).tolist()
            if counts != [count] * ways:
                needed = f"{ways} classes of {count} {SPLITS[i]} shapes"
                raise ReadError(f"{path}: {needed} are needed, it has {counts}")
        return clouds.part("train"), clouds.part("test")

    return [read(found[ways, shots] / str(i)) for i in range(folds)]


# ---------------------------------------------------------------------------------- frozen features


def predict(method: str, support: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The class of each query [q, E] of one layer, learned from the support [s, E] with labels y
    [s].

    ncm is SimpleShot's CL2N (Wang et al., arXiv 1911.04623): features less a mean, L2-normalised,
    nearest class mean. Theirs is the mean over base classes, which an episode has not: here it is
    the support's. Nearest is by cosine, as in Classifier-Baseline (Chen et al., arXiv 2003.04390);
    SimpleShot's distance is Euclidean.
    """
    if method == "logistic":
        return classifiers.predict("logistic", _C, support, y, query)
    center, classes = support.mean(0), np.unique(y)
    known = unit_length(support - center)
    means = np.stack([known[y == number].mean(0) for number in classes])
    return classes[cosine(query - center, means).argmax(1)]


def accuracy(
    model: PointEncoder | DVAE, train: PointClouds, test: PointClouds, method: str
) -> float:
    """Accuracy in per cent of a method on the frozen features of one fold."""
    x, x_test = (layer_features(model, part)[-1] for part in (train, test))
    found = predict(method, x, np.asarray(train.labels), x_test)
    return 100 * float((found == test.labels).mean())
