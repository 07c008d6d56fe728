"""Few-shot episodes: learn W classes (ways) from S labelled shapes (shots) of each class, then
classify other shapes of the same classes, the queries.

This is the protocol of Sharma and Kaul (NeurIPS 2020), as Point-BERT and later papers use it on
ModelNet40: 5 or 10 ways, 10 or 20 shots from the train split, and 20 queries per class from the
test split. Ten episodes, called folds, give the mean and std of the accuracy. The episodes are
either the published folds, or sampled from any labelled data. The W * S labelled shapes of an
episode are called its support. Two classifiers can be fitted to frozen features; all their settings
are fixed:

| method   | features                                            | classifier                   |
|----------|-----------------------------------------------------|------------------------------|
| ncm      | minus the support's mean, then scaled to length 1   | nearest class mean by cosine |
| logistic | standardised by mean and std of the support         | logistic regression, C = 0.1 |

The support is too small to hold out a part of it for validation, so C, layer and pooling are fixed
in advance. C is the larger of the two values from which the protocol logistic_10 of probe.py
chooses. The prediction for a query does not depend on other queries.
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
# the train shapes (support) and the test shapes (queries)
Fold = tuple[PointClouds, PointClouds]


class Episode(NamedTuple):
    """The shapes of an episode, as row numbers of a `PointClouds`, sorted by class."""

    support: np.ndarray  # W * S row numbers
    query: np.ndarray  # W * Q row numbers, for Q queries per class
    classes: np.ndarray  # the W class numbers, ascending


# --------------------------------------------------------------------------------- sampled episodes


def draw_episodes(
    clouds: PointClouds, ways: int, shots: int, folds: int, seed: int, queries: int
) -> list[Episode]:
    """Sample `folds` episodes of `ways` classes. Each class of an episode has `shots` train shapes
    and `queries` test shapes.

    Classes are sampled from those with enough train and test shapes. Within an episode, no class
    and no shape occurs twice. Episode i depends on the data, seed, ways, shots, queries and i, but
    not on `folds`. All classes have equally many queries, so the overall accuracy equals the mean
    class accuracy. Raises ReadError if the clouds have no labels or no split, or if too few classes
    have enough shapes. In the latter case, if episodes with fewer queries are possible, the message
    states the largest possible number of queries.
    """
    if clouds.labels is None or clouds.split is None:
        lacks = "labels" if clouds.labels is None else "train/test split"
        raise ReadError(f"{clouds.name} has no {lacks}, which few-shot episodes need")
    labels, size = clouds.labels, int(clouds.labels.max(initial=0)) + 1
    train_rows, test_rows = (np.flatnonzero(clouds.split == i) for i in range(2))
    train = np.bincount(labels[train_rows], minlength=size)
    test = np.bincount(labels[test_rows], minlength=size)
    enough = np.flatnonzero((train >= shots) & (test >= queries))
    if len(enough) < ways:
        # the largest number of queries for which there are enough classes
        most = np.sort(test[train >= shots])[::-1][ways - 1 : ways]
        needed = f"{ways} classes need {shots} train and {queries} test shapes each"
        found = f"{needed}, but only {len(enough)} have enough"
        if most.any():
            found += f"; --queries {most[0]} is possible"
        raise ReadError(f"{clouds.name}: {found}")
    names = dict(enumerate(clouds.class_names))
    few = np.setdiff1d(np.flatnonzero(train + test), enough).tolist()
    if few:
        listed = ", ".join(f"{names.get(i, i)} ({train[i]} train, {test[i]} test)" for i in few)
        needed = f"fewer than {shots} train or {queries} test shapes"
        log.info(f"classes left out, with {needed}: {printable(listed)}")

    def draw(fold: int) -> Episode:
        rng = np.random.default_rng([seed, ways, shots, fold])
        classes = np.sort(rng.choice(enough, ways, replace=False))

        def sample(rows: np.ndarray, count: int) -> np.ndarray:
            of_class = [rows[labels[rows] == number] for number in classes]
            chosen = [rng.choice(members, count, replace=False) for members in of_class]
            return np.concatenate(chosen)

        return Episode(sample(train_rows, shots), sample(test_rows, queries), classes)

    return [draw(fold) for fold in range(folds)]


def save_episodes(path: Path, episodes: list[Episode], fingerprint: str) -> None:
    """Write episodes to a JSON file, atomically, with the fingerprint (a hash) of their data."""
    plain = [dict(zip(Episode._fields, map(np.ndarray.tolist, e), strict=True)) for e in episodes]
    write_checked(path, {"fingerprint": fingerprint, "episodes": plain})


def load_episodes(path: Path, fingerprint: str) -> list[Episode]:
    """Read the episodes that `save_episodes` wrote.

    Raises ReadError if the file is missing or damaged, or if its episodes were sampled from other
    data.
    """
    with as_read_error(path):
        record = read_checked(path)
        if record["fingerprint"] != fingerprint:
            found = f"the episodes belong to data with fingerprint {record['fingerprint']:.12}"
            raise ReadError(f"{found}, not to this data (fingerprint {fingerprint:.12})")
        rows = [[row[key] for key in Episode._fields] for row in record["episodes"]]
        return [Episode(*(np.array(values, np.int64) for values in row)) for row in rows]


def fold_of(clouds: PointClouds, episode: Episode) -> Fold:
    """Return the train (support) and test (query) shapes of an episode, with labels 0 to W - 1.

    Raises ValueError if the episode has row numbers that do not exist in `clouds`, or shapes of
    other classes than its own; it was then sampled from other data.
    """
    labels = np.empty(0) if clouds.labels is None else clouds.labels
    rows = np.concatenate(episode[:2])
    inside = rows.min() >= 0 and rows.max() < len(labels)
    if not inside or not np.isin(labels[rows], episode.classes).all():
        found = f"the episodes do not fit the {len(clouds)} shapes or their labels"
        raise ValueError(f"{clouds.name}: {found}; they were sampled from other data")
    known = clouds.class_names
    names = tuple(known[number] for number in episode.classes if number < len(known))
    numbers = np.searchsorted(episode.classes, labels)
    clouds = replace(clouds, labels=numbers, class_names=names)
    return clouds.subset(episode.support), clouds.subset(episode.query)


# ---------------------------------------------------------------------------------- published folds


def published_folds(
    folder: Path, num_points: int, up_axis: str, ways: int, shots: int, folds: int, queries: int
) -> list[Fold] | None:
    """Read the published folds that `jepa3d prepare ModelNetFewshot` stored. Their labels are 0
    to ways - 1.

    folder: the folder of one setting, such as 5way_10shot, or a folder one or two levels above it.
    Returns None if there are no published folds of any setting. Raises ReadError if there are only
    folds of other settings. It is also raised if one of the first `folds` folds is missing or
    unfinished, has no labels or no split, or does not have exactly `ways` classes with `shots`
    train shapes and `queries` test shapes each.
    """
    found: dict[tuple[int, int], Path] = {}
    below = [*sorted(folder.glob("*way*shot")), *sorted(folder.glob("*/*way*shot"))]
    for path in [folder, *below]:
        name = _SETTING.fullmatch(path.resolve().name)
        if name and any(path.glob("*/store.json")):
            found.setdefault((int(name[1]), int(name[2])), path)
    if not found:
        return None
    if (ways, shots) not in found:
        names = ", ".join(f"{a}-way {b}-shot" for a, b in sorted(found))
        raise ReadError(f"{folder} has {names}, but not {ways}-way {shots}-shot")

    def read(path: Path) -> Fold:
        if not (path / "store.json").is_file():
            found = f"{path} is missing, but {folds} folds are needed"
            raise ReadError(f"{found}; repeat its jepa3d prepare command to continue")
        clouds = load([str(path)], num_points, "all", [up_axis])
        clouds = replace(clouds, name=f"{path.resolve().parent.name}/{path.name}")
        if clouds.labels is None or clouds.split is None:
            raise ReadError(f"{path} has no labels or no train/test split")
        for i, count in enumerate((shots, queries)):
            labels = clouds.labels[clouds.split == i]
            counts = np.bincount(labels, minlength=len(clouds.class_names)).tolist()
            if counts != [count] * ways:
                needed = f"must have {ways} classes of {count} {SPLITS[i]} shapes"
                raise ReadError(f"{path} {needed}, but they have {counts} shapes")
        return clouds.part("train"), clouds.part("test")

    return [read(found[ways, shots] / str(i)) for i in range(folds)]


# ---------------------------------------------------------------------------------- frozen features


def predict(method: str, support: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Predict the class of each query [q, E] from the support [s, E] with labels y [s].

    method: "logistic" or "ncm". ncm is CL2N of SimpleShot (Wang et al., arXiv 1911.04623), which
    subtracts a mean from the features, scales them to length 1 and takes the nearest class mean.
    There are two changes. SimpleShot subtracts the mean over base classes, which are classes for
    training the network. Episodes have no base classes, so here the mean over the support is
    subtracted. SimpleShot compares by Euclidean distance; here vectors are compared by cosine, as
    in Classifier-Baseline (Chen et al., arXiv 2003.04390).
    """
    if method == "logistic":
        return classifiers.predict("logistic", _C, support, y, query)
    center, classes = support.mean(0), np.unique(y)
    vectors = unit_length(support - center)
    means = np.stack([vectors[y == number].mean(0) for number in classes])
    return classes[cosine(query - center, means).argmax(1)]


def accuracy(
    model: PointEncoder | DVAE, train: PointClouds, test: PointClouds, method: str
) -> float:
    """Return the accuracy, in per cent, of a method (see `predict`) on one fold, from the features
    of the model's last layer.
    """
    x, x_test = (layer_features(model, part)[-1] for part in (train, test))
    predicted = predict(method, x, np.asarray(train.labels), x_test)
    return 100 * float((predicted == test.labels).mean())
