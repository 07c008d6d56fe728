"""`jepa3d probe --parts`: how well a frozen encoder's tokens predict to which part of a shape each
point belongs.

As in `jepa3d segment`, the tokens after each third of the encoder's layers are concatenated. The
features of a point are interpolated from the tokens of the three nearest patch centres.

The category of each shape is given. For each category, a logistic regression over its parts is
fitted to the standardised features of at most 256 labelled points per train shape. For each encoder
and each baseline, C (the inverse regularisation strength) is chosen by instance mIoU (see
partseg.py). It is chosen on the data set's own validation split. If the data set has no such split,
or if the validation split is the scored one, C is chosen on a held-out fifth of train. Then the
classifiers are fitted to all of train. The scored split (by default test) is used once, with all
points of its shapes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor

from jepa3d.data.cloud import UNLABELLED
from jepa3d.data.datasets import PointClouds
from jepa3d.evaluation.classifiers import fitted, one_thread
from jepa3d.evaluation.descriptors import surface
from jepa3d.evaluation.features import untrained_like
from jepa3d.evaluation.labelled import LabelledSet, Part, fifth
from jepa3d.evaluation.partseg import mean_iou, shape_iou
from jepa3d.evaluation.protocol import provenance
from jepa3d.evaluation.retrieval import check_names, compared, compared_cells
from jepa3d.evaluation.tables import Sheet
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import thirds
from jepa3d.models.ready import load as load_encoder
from jepa3d.ops import three_nn_interpolate

_C_GRID = (0.001, 0.01, 0.1)  # values of C that are tried
# The classifiers are fitted to at most this many labelled points of each train shape.
_POINTS = 256
# The largest total number of points, to limit time and memory. If `_POINTS` points of each train
# shape would be more, fewer points of each shape are used, but at least 16. So for over 8,192
# shapes the total is still larger than this.
_MOST_POINTS = 2**17
_BATCH = 16  # clouds per batch

# Function of clouds [B, N, 3] and points [B, Q, 3], both in the encoder's coordinates, that returns
# the features [B, Q, E] of the points.
Features = Callable[[Tensor, Tensor], Tensor]


def probe_parts(models: list[str], dataset: LabelledSet, part: Part = "test") -> dict[str, Any]:
    """Score how well parts are predicted from the features of each encoder, and from the baselines
    of the first encoder.

    models: encoders, as in `jepa3d.load`. part: the split that is scored, see `Labelled.of` in
    labelled.py. The baselines are an untrained encoder and the handcrafted `local_features`.
    Returns the result record. For each encoder and baseline, it has the chosen C, the metrics of
    `partseg.py::mean_iou`, and (except for the first encoder) by how much the first encoder's
    instance mIoU is higher, with an interval. Raises ValueError or ReadError if a model or the data
    cannot be used.
    """
    check_names(models)
    found: dict[str, dict[str, Any]] = {}
    record: dict[str, Any] = {}
    iou: dict[str, np.ndarray] = {}
    for model in models:
        encoder = load_encoder(model)
        shapes = dataset.read(encoder.num_points, part, parts=True)
        train, test, held = shapes.train, shapes.test, shapes.validation
        fit = np.arange(len(train))
        if held is None:
            fit, held_out = fifth(shapes.y, seed=0)
            held = train.subset(held_out)
        assert test.parts is not None
        assert held.parts is not None
        truth = test.parts[:], shapes.y_test, shapes.parts_of
        held_truth = held.parts[:], np.asarray(held.labels), shapes.parts_of
        rows: dict[str, Features] = {model: partial(token_features, encoder)}
        if model == models[0]:
            rows["untrained"] = partial(token_features, untrained_like(encoder, train))
            rows |= local_features(encoder)
        for name, features in rows.items():
            x, y = _samples(features, encoder, train)
            tried = [_classifiers(c, x[fit], y[fit], shapes.y[fit]) for c in _C_GRID]
            predicted = _predict(tried, features, encoder, held)
            scores = [shape_iou(each, *held_truth).mean() for each in predicted]
            c = _C_GRID[int(np.argmax(scores))]
            best = [_classifiers(c, x, y, shapes.y)]
            (predicted,) = _predict(best, features, encoder, test)
            iou[name] = shape_iou(predicted, *truth)
            found[name] = {"C": c, "channels": x.shape[-1]}
            found[name] |= mean_iou(predicted, *truth, shapes.class_names)
        about = {"name": shapes.name, "fingerprint": shapes.fingerprint}
        about |= {"labels": dataset.labels_key, "part": part, "train": len(train)}
        about |= {"test": len(test), "categories": len(shapes.class_names)}
        record = {"task": "parts", "data": about, "points": _points_a_shape(len(train))}
    for name, gain in compared(iou).items():
        found[name] |= gain
    return record | {"results": found} | provenance()


@torch.inference_mode()
def token_features(encoder: PointEncoder, clouds: Tensor, at: Tensor) -> Tensor:
    """Concatenate the tokens after each third of the encoder's layers, and interpolate them to
    points.

    clouds: [B, N, 3]. at: the points [B, Q, 3]. Returns features [B, Q, 3 * E] for tokens of width
    E.
    """
    states, centers = encoder.states(clouds)
    tokens = torch.cat([states[layer] for layer in thirds(encoder.depth)], -1)
    return three_nn_interpolate(at, centers, tokens)


def local_features(encoder: PointEncoder) -> dict[str, Features]:
    """Return the functions that compute handcrafted features: geometry, positions, and both
    together.

    geometry: the 89 numbers that `descriptors.py::surface` computes at the encoder's patch centres,
    interpolated to the points. positions: the 34 products of powers of x, y and z of total degree 1
    to 4.
    """

    def geometry(clouds: Tensor, at: Tensor) -> Tensor:
        tokens, centers = surface(clouds, encoder.num_groups, encoder.group_size)
        return three_nn_interpolate(at, centers, tokens.float())

    def positions(_: Tensor, at: Tensor) -> Tensor:
        polynomial = PolynomialFeatures(4, include_bias=False)
        terms = polynomial.fit_transform(at.flatten(0, 1).numpy())
        return torch.from_numpy(terms).float().unflatten(0, at.shape[:2])

    def both(clouds: Tensor, at: Tensor) -> Tensor:
        return torch.cat([geometry(clouds, at), positions(clouds, at)], -1)

    found: dict[str, Features] = {"geometry": geometry, "positions": positions}
    return found | {"geometry and positions": both}


def _batches(
    encoder: PointEncoder, clouds: PointClouds
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Yield batches of b clouds: their indices [b], the points that the encoder sees
    [b, num_points, 3], and all points in the encoder's coordinates [b, N, 3].
    """
    for at in range(0, len(clouds), _BATCH):
        index = np.arange(at, min(at + _BATCH, len(clouds)))
        pairs = [(encoder.frame(cloud), cloud) for cloud in clouds.points[index]]
        seen = np.stack([frame.points for frame, _ in pairs])
        placed = np.stack([frame.place(cloud) for frame, cloud in pairs])
        yield index, torch.from_numpy(seen), torch.from_numpy(placed)


def _samples(
    features: Features, encoder: PointEncoder, clouds: PointClouds
) -> tuple[np.ndarray, np.ndarray]:
    """Sample P labelled points of each of n clouds. If a cloud has fewer than P labelled points,
    some of them are repeated.

    Returns the features [n, P, E] and the parts [n, P] of these points.
    """
    assert clouds.parts is not None
    rng, count = np.random.default_rng(0), _points_a_shape(len(clouds))
    x, y = [], []
    for index, seen, placed in _batches(encoder, clouds):
        parts = clouds.parts[index]
        known = [np.flatnonzero(labels != UNLABELLED) for labels in parts]
        rows = np.stack([rng.choice(ids, count, replace=len(ids) < count) for ids in known])
        at = torch.take_along_dim(placed, torch.from_numpy(rows)[..., None], 1)
        x.append(features(seen, at).numpy())
        y.append(np.take_along_axis(parts, rows, 1))
    return np.concatenate(x), np.concatenate(y)


def _points_a_shape(shapes: int) -> int:
    """Return how many points of each train shape are used to fit a classifier."""
    return max(16, min(_POINTS, _MOST_POINTS // shapes))


def _classifiers(c: float, x: np.ndarray, y: np.ndarray, labels: np.ndarray) -> dict[int, Any]:
    """Fit one classifier per category; returns category -> classifier.

    x: features [n, P, E]. y: parts [n, P]. labels: categories [n].
    """
    return {
        label: _fit(c, np.concatenate(x[labels == label]), y[labels == label].ravel())
        for label in np.unique(labels).tolist()
    }


def _fit(c: float, x: np.ndarray, y: np.ndarray) -> Any:
    """Fit logistic regression, or, if y has only one part, a classifier that always predicts it."""
    has_parts = len(np.unique(y)) > 1
    return fitted("logistic", c, x, y) if has_parts else DummyClassifier().fit(x, y)


def _predict(
    classifiers: list[dict[int, Any]],
    features: Features,
    encoder: PointEncoder,
    clouds: PointClouds,
) -> np.ndarray:
    """Predict the part of every point of n clouds, with the classifier of each cloud's category.

    classifiers: a list of results of `_classifiers`, one for each C that is tried. Returns
    the parts [len(classifiers), n, N].
    """
    assert clouds.parts is not None
    labels = np.asarray(clouds.labels)
    out = np.empty((len(classifiers), *clouds.parts.shape), np.int16)
    with one_thread():
        for index, seen, placed in _batches(encoder, clouds):
            found = features(seen, placed).numpy()
            for i, x in zip(index.tolist(), found, strict=True):
                out[:, i] = [by_category[labels[i]].predict(x) for by_category in classifiers]
    return out


def sheet(result: dict[str, Any]) -> Sheet:
    """Return the table of a result."""
    data = result["data"]
    title = (
        f"{data['name']} ({data['labels']}): {data['categories']} categories, {data['train']:,} "
        f"train, {data['test']:,} {data['part']}; part of each point, from frozen features, in %"
    )
    keys = ("instance_miou", "category_miou", "point_accuracy")
    rows = [
        [name, *(f"{row[key]:.1f}" for key in keys), *compared_cells(row)]
        for name, row in result["results"].items()
    ]
    rule = "selection: C of each row is chosen by instance mIoU on held-out shapes"
    columns = ["", "instance mIoU", "category mIoU", "points correct"]
    columns += ["first - this", "95 %, paired by shape"]
    note = f"{rule}; the {data['part']} split is scored once"
    return Sheet(title, columns, rows, [note])
