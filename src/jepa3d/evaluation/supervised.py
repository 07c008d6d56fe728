"""What a fine-tuned network says of shapes, and how right it is."""

from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix

from jepa3d.data.datasets import PointClouds
from jepa3d.data.transforms import augment
from jepa3d.evaluation.classifiers import by_class, class_accuracy
from jepa3d.evaluation.partseg import mean_iou, restricted_argmax
from jepa3d.models.heads import Classifier, LinearClassifier, Segmenter
from jepa3d.ops import BatchGenerator, unit_sphere

Network = Classifier | LinearClassifier | Segmenter
VOTE_SCALE, VOTE_REACH = (2 / 3, 3 / 2), 0.2  # of the copies that vote: Point-MAE's


@torch.no_grad()
def predict(
    network: Network, clouds: PointClouds, votes: int = 1, seed: int = 0, batch_size: int = 64
) -> dict[str, np.ndarray]:
    """`predicted`, n classes or n N parts within each shape's category; of a classifier also
    `probability` n classes.

    With several votes, the logits of as many randomly scaled and moved copies are averaged
    (Point-MAE).
    """
    device = (
        torch.accelerator.current_accelerator()
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )
    network.eval().to(device)
    predicted, probability = [], []
    for at in range(0, len(clouds), batch_size):
        index = np.arange(at, min(at + batch_size, len(clouds)))
        points = clouds.batch(index)
        if isinstance(network, Segmenter):  # parts belong to rows, which stay in their order
            points = unit_sphere(points.double()).to(network.encoder.norm.weight)
        else:
            points = network.encoder.prepare(points)
        labels = np.zeros(len(index), int) if clouds.labels is None else clouds.labels[index]
        total = torch.zeros(())
        for vote in range(votes):
            draws = BatchGenerator(seed, at, stream=f"vote {vote}")
            seen = points if votes == 1 else augment(points, VOTE_SCALE, False, VOTE_REACH, draws)
            if isinstance(network, Segmenter):
                logits = network(seen, torch.from_numpy(labels).to(device))
            else:
                logits = network(seen)
            total = total + logits.float().cpu()
        if isinstance(network, Segmenter):
            parts_of = [np.array(parts) for parts in network.parts_of]
            predicted.append(restricted_argmax(total.numpy(), labels, parts_of).astype(np.int16))
        else:
            predicted.append(total.argmax(-1).numpy().astype(np.int16))
            probability.append((total / votes).softmax(-1).numpy())
    out = {"predicted": np.concatenate(predicted)}
    return out | ({"probability": np.concatenate(probability)} if probability else {})


def score(network: Network, clouds: PointClouds) -> float:
    """The figure that chooses an epoch: overall accuracy, or instance mIoU, per cent."""
    metrics = figures(network, clouds, predict(network, clouds))[0]
    return metrics["instance_miou" if isinstance(network, Segmenter) else "overall_accuracy"]


def figures(
    network: Network, clouds: PointClouds, predicted: dict[str, np.ndarray]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics in per cent, and their details by class or category."""
    assert clouds.labels is not None
    names = list(network.class_names)
    if isinstance(network, Segmenter):
        assert clouds.parts is not None
        parts_of = [np.array(parts) for parts in network.parts_of]
        found = mean_iou(predicted["predicted"], clouds.parts[:], clouds.labels, parts_of, names)
        return found, {"per_category": found.pop("per_category"), "class_names": names}
    return accuracies(clouds.labels, predicted["predicted"], names)


def accuracies(
    labels: np.ndarray, predicted: np.ndarray, names: list[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Overall accuracy and its mean over the classes that occur; confusion matrix (rows true) and
    accuracy a class.
    """
    confusion = confusion_matrix(labels, predicted, labels=np.arange(len(names)))
    mean = float(np.nanmean(class_accuracy(confusion)))
    metrics = {
        "overall_accuracy": 100 * float((labels == predicted).mean()),
        "mean_class_accuracy": mean,
    }
    rows = confusion.tolist()
    return metrics, {"per_class": by_class(rows, names), "confusion": rows, "class_names": names}
