"""Score part segmentation as the benchmark ShapeNetPart does (Yi et al. 2016; PointNet, section
5.1): the category of each shape is known, and each point is assigned one of the category's parts.

Axes: n shapes, N points, P part ids, C categories. Part ids are global: no two categories share an
id.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jepa3d.data.cloud import UNLABELLED


def category_parts(
    part_names: Sequence[str], labels: np.ndarray, parts: Any, class_names: Sequence[str]
) -> list[np.ndarray]:
    """Return the global part ids of each of the C categories, ascending.

    part_names: the name of each id. A category gets the ids that are named after it:
    "Category/part", or "Category 0" as `jepa3d prepare` names the parts of ShapeNetPart. If no
    ids are named after it, it gets the ids that occur in its shapes. The labels [n] and the parts
    [n, N] (an array, or the `StoredPoints` of data/store.py) are those of the train split, so that
    test shapes have no influence. Raises ValueError if ids are named after a category, but one of
    its shapes has a part with another id.
    """
    owners = [name.rpartition("/" if "/" in name else " ")[0] for name in part_names]
    found = []
    for label, category in enumerate(class_names):
        named = np.flatnonzero([owner == category for owner in owners])
        rows = np.flatnonzero(np.asarray(labels) == label)
        ids = np.asarray(parts[rows])
        observed = np.flatnonzero(np.bincount(ids[ids != UNLABELLED]))
        if len(named) and len(other := np.setdiff1d(observed, named)):
            name = part_names[other[0]] if other[0] < len(part_names) else "without a name"
            problem = f"a shape of {category} has part {other[0]} ({name})"
            raise ValueError(f"{problem}, but the parts of {category} are {named.tolist()}")
        found.append(named if len(named) else observed)
    return found


def restricted_argmax(
    logits: np.ndarray, labels: np.ndarray, parts_of: Sequence[Sequence[int]]
) -> np.ndarray:
    """Return for each point the part with the highest logit, among the parts of its shape's
    category.

    logits: [n, N, P]. labels: the shapes' categories [n]. parts_of: category -> its part ids.
    Returns the parts [n, N] as int16.
    """
    out = np.empty(logits.shape[:2], np.int16)
    for label in np.unique(labels):
        ids, rows = np.asarray(parts_of[label]), labels == label
        out[rows] = ids[logits[rows][:, :, ids].argmax(2)]
    return out


def mean_iou(
    predicted: np.ndarray,
    truth: np.ndarray,
    labels: np.ndarray,
    parts_of: Sequence[Sequence[int]],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Score predicted parts [n, N] against the true parts [n, N], in per cent.

    labels: the shapes' categories [n]. Points whose truth is UNLABELLED are ignored; every shape
    must have a labelled point. Returns:

    - instance_miou: mean of `shape_iou` over all shapes
    - per_category: category name -> mean of `shape_iou` over the shapes of the category
    - category_miou: mean of the values of per_category
    - point_accuracy: share of the labelled points whose part is predicted correctly
    """
    iou = shape_iou(predicted, truth, labels, parts_of)
    per_category = {
        class_names[label]: float(iou[labels == label].mean()) for label in np.unique(labels)
    }
    return {
        "instance_miou": float(iou.mean()),
        "category_miou": float(np.mean(list(per_category.values()))),
        "point_accuracy": float(100 * (predicted == truth)[truth != UNLABELLED].mean()),
        "per_category": per_category,
    }


def shape_iou(
    predicted: np.ndarray, truth: np.ndarray, labels: np.ndarray, parts_of: Sequence[Sequence[int]]
) -> np.ndarray:
    """Return the IoU of each of n shapes in per cent: the mean IoU of the parts of its category.

    The IoU of a part is the size of the intersection of its predicted and its true points, divided
    by the size of their union. It is 100 % if both sets of points are empty. The arguments are
    those of `mean_iou`.
    """
    labelled = truth != UNLABELLED
    highest = [np.max(ids, initial=0) for ids in parts_of]
    size = 1 + int(max(predicted.max(), truth.max(), *highest))
    belongs = np.zeros((len(parts_of), size), bool)  # [C, P]
    for label, ids in enumerate(parts_of):
        belongs[label, ids] = True

    def count(parts: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Count the points of each shape and part where the mask `where` [n, N] is True; returns
        the counts [n, P].
        """
        flat = np.arange(len(parts))[:, None] * size + parts
        return np.bincount(flat[where], minlength=len(parts) * size).reshape(-1, size)

    both = count(truth, predicted == truth)
    either = count(truth, labelled) + count(predicted, labelled) - both
    iou = np.where(either == 0, 1.0, both / np.maximum(either, 1))
    counted = belongs[labels]
    return 100 * np.where(counted, iou, 0).sum(1) / counted.sum(1)
