"""Part segmentation as ShapeNetPart measures it (Yi et al. 2016; PointNet, section 5.1): a point
is given one of the parts of its shape's category.

Axes: n shapes, N points, P global part ids, C categories. Part ids count through all categories.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jepa3d.data.cloud import UNLABELLED


def category_parts(
    part_names: Sequence[str], labels: np.ndarray, parts: Any, class_names: Sequence[str]
) -> list[np.ndarray]:
    """The global part ids of each of the C categories, ascending.

    From names "Category/part" or, as stores of ShapeNetPart have them, "Category 0"; of a category
    that has no such names, those observed. labels n and parts n N, or what reads them when indexed:
    of the train part, so that no test shape decides. A category that has neither names nor shapes
    gets none. Raises ValueError for a shape with a part that its category's names exclude.
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
            raise ValueError(
                f"part {other[0]} ({name}) in a shape of {category}, whose parts are {named.tolist()}"
            )
        found.append(named if len(named) else observed)
    return found


def restricted_argmax(
    logits: np.ndarray, labels: np.ndarray, parts_of: Sequence[np.ndarray]
) -> np.ndarray:
    """The best part n N int16 of logits n N P among those of each shape's category, which its label
    n names.
    """
    out = np.empty(logits.shape[:2], np.int16)
    for label in np.unique(labels):
        ids, rows = parts_of[label], labels == label
        out[rows] = ids[logits[rows][:, :, ids].argmax(2)]
    return out


def mean_iou(
    predicted: np.ndarray,
    truth: np.ndarray,
    labels: np.ndarray,
    parts_of: Sequence[np.ndarray],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """How well parts predicted n N fit the truth n N of shapes of categories labels n, in per cent.

    instance_miou: mean over all shapes of their IoU. category_miou: mean over the categories that
    have shapes of the mean over theirs, which are in per_category by name. point_accuracy: points
    that are right. Points whose truth is UNLABELLED count nowhere; every shape has another one.
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
    predicted: np.ndarray, truth: np.ndarray, labels: np.ndarray, parts_of: Sequence[np.ndarray]
) -> np.ndarray:
    """IoU n of each shape in per cent: the mean over its category's parts of intersection / union.

    1 for a part that is in neither. Arguments as of `mean_iou`.
    """
    labelled = truth != UNLABELLED
    highest = [ids.max(initial=0) for ids in parts_of]
    size = 1 + int(max(predicted.max(), truth.max(), *highest))
    belongs = np.zeros((len(parts_of), size), bool)  # C P
    for label, ids in enumerate(parts_of):
        belongs[label, ids] = True

    def count(parts: np.ndarray, where: np.ndarray) -> np.ndarray:
        """n P: the points of each part among those where n N."""
        flat = np.arange(len(parts))[:, None] * size + parts
        return np.bincount(flat[where], minlength=len(parts) * size).reshape(-1, size)

    both = count(truth, predicted == truth)
    either = count(truth, labelled) + count(predicted, labelled) - both
    iou = np.where(either == 0, 1.0, both / np.maximum(either, 1))
    counted = belongs[labels]
    return 100 * np.where(counted, iou, 0).sum(1) / counted.sum(1)
