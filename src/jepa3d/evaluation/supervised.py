"""Compute the predictions of a fine-tuned network, and their metrics."""

from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix

from jepa3d.data.datasets import PointClouds
from jepa3d.data.transforms import augment
from jepa3d.evaluation.classifiers import by_class, class_accuracy
from jepa3d.evaluation.features import default_device
from jepa3d.evaluation.partseg import mean_iou, restricted_argmax
from jepa3d.models.heads import Classifier, LinearClassifier, Segmenter
from jepa3d.ops import BatchGenerator, unit_sphere

Network = Classifier | LinearClassifier | Segmenter
# Voting averages the logits of several copies of a cloud. Along each axis, a copy is scaled by a
# random factor in the range VOTE_SCALE, and shifted by at most VOTE_REACH, as in Point-MAE.
VOTE_SCALE, VOTE_REACH = (2 / 3, 3 / 2), 0.2


@torch.no_grad()
def predict(
    network: Network, clouds: PointClouds, votes: int = 1, seed: int = 0, batch_size: int = 64
) -> dict[str, np.ndarray]:
    """Predict the classes or parts of n clouds.

    votes: if more than 1, the logits of this many randomly scaled and shifted copies of each cloud
    are averaged (as in Point-MAE). Returns "predicted": for a classifier, the classes [n]; for
    a segmenter, the parts [n, N], chosen among the parts of each shape's category, which is known.
    For a classifier, also returns "probability": an array [n, C] for C classes.
    """
    network.eval().to(device := default_device())
    segments = isinstance(network, Segmenter)
    predicted, probability = [], []
    for at in range(0, len(clouds), batch_size):
        index = np.arange(at, min(at + batch_size, len(clouds)))
        points, labels = clouds.batch(index), np.zeros(len(index), int)
        if clouds.labels is not None:
            labels = clouds.labels[index]
        # The encoder's method `prepare` changes the order and number of the points. It is not used
        # for a segmenter: each row of points must keep its part label.
        if segments:
            points = unit_sphere(points.double()).to(network.encoder.norm.weight)
        else:
            points = network.encoder.prepare(points)
        category = [torch.from_numpy(labels).to(device)] if segments else []
        total = torch.zeros(())
        for vote in range(votes):
            draws = BatchGenerator(seed, at, stream=f"vote {vote}")
            copy = points
            if votes > 1:
                copy = augment(points, VOTE_SCALE, False, VOTE_REACH, draws)
            total = total + network(copy, *category).float().cpu()
        if isinstance(network, Segmenter):
            predicted.append(restricted_argmax(total.numpy(), labels, network.parts_of))
        else:
            predicted.append(total.argmax(-1).numpy().astype(np.int16))
            probability.append((total / votes).softmax(-1).numpy())
    found = {"predicted": predicted, "probability": probability}
    return {name: np.concatenate(values) for name, values in found.items() if values}


def score(network: Network, clouds: PointClouds) -> float:
    """Return the metric by which the best epoch of a fine-tuning run is chosen, in per cent:
    overall accuracy for a classifier, instance mIoU for a segmenter.
    """
    metrics = figures(network, clouds, predict(network, clouds))[0]
    segments = isinstance(network, Segmenter)
    return metrics["instance_miou" if segments else "overall_accuracy"]


def figures(
    network: Network, clouds: PointClouds, predicted: dict[str, np.ndarray]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Score what `predict` returned: compute metrics in per cent, and details by class or category.

    For a classifier, the details include the confusion matrix; its rows are the true classes.
    """
    assert clouds.labels is not None
    labels, found = clouds.labels, predicted["predicted"]
    names = list(network.class_names)
    if isinstance(network, Segmenter):
        assert clouds.parts is not None
        metrics = mean_iou(found, clouds.parts[:], labels, network.parts_of, names)
        details = {"per_category": metrics.pop("per_category")}
        return metrics, details | {"class_names": names}
    confusion = confusion_matrix(labels, found, labels=np.arange(len(names)))
    metrics = {
        "overall_accuracy": 100 * float((labels == found).mean()),
        "mean_class_accuracy": float(np.nanmean(class_accuracy(confusion))),
    }
    details = {"per_class": by_class(confusion.tolist(), names)}
    return metrics, details | {"confusion": confusion.tolist(), "class_names": names}
