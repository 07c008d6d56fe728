"""Load labelled shapes for training and probing, keep the classes that train and test have in
common, sample a fraction of the labels, and make a validation split.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn.model_selection import train_test_split

from jepa3d.config import FinetuneConfig
from jepa3d.data.cloud import UNLABELLED, ReadError
from jepa3d.data.datasets import PointClouds, load
from jepa3d.data.entries import lacking
from jepa3d.data.store import SPLITS
from jepa3d.evaluation.partseg import category_parts
from jepa3d.frame import FRAME
from jepa3d.plain import log, read_checked

Part = Literal["test", "validation"]  # the split that is scored
_TRAIN, _TEST, _VALIDATION = range(len(SPLITS))


class LabelledSet(NamedTuple):
    """Where labelled shapes are read from: the source, the name of its label array, its up axis."""

    source: str
    labels_key: str = "labels"
    up_axis: str = "z"

    def read(self, num_points: int, part: Part = "test", parts: bool = False) -> "Labelled":
        """Read the shapes, with `num_points` points each.

        part: the split that is scored. parts: also read the part label of every point. Raises
        ReadError if the source cannot be read, or if the labels or the part labels are missing.
        Also raises the errors of `Labelled.of`.
        """
        source, key, axis = self
        clouds = load([source], num_points, "all", [axis], key, parts=parts)
        report, layout = Path(source) / "report.json", None
        # any other folder may have a file of this name too
        if (Path(source) / "store.json").is_file() and report.is_file():
            layout = read_checked(report).get("layout")
        found = Labelled.of(clouds, part)
        # for most sources, the fingerprint does not change with the labels
        labels, split = np.asarray(clouds.labels), np.asarray(clouds.split)
        known = [clouds.fingerprint, key, axis, num_points, part, FRAME]
        known += [version("jepa3d"), clouds.class_names, labels.tolist(), split.tolist()]
        digest = hashlib.sha256(repr(known).encode()).hexdigest()
        return replace(found, layout=layout, key=digest[:8])

    @staticmethod
    def each(
        sources: Sequence[str], labels_keys: Sequence[str], up_axes: Sequence[str]
    ) -> "list[LabelledSet]":
        """Create one set per source. A single key or axis applies to all sources.

        Raises ValueError unless there is one key, or one per source; likewise for axes.
        """
        count, columns = len(sources), []
        for flag, values in (("--labels-key", labels_keys), ("--up-axis", up_axes)):
            if len(values) not in (1, count):
                found = f"{flag} has {len(values)} values for {count} scored sets"
                raise ValueError(f"{found}: give one, or one per set")
            columns.append([*values] * (count // len(values)))
        return list(map(LabelledSet, sources, *columns))


@dataclass(frozen=True)
class Labelled:
    """Labelled shapes: those of `train`, and those of `test`, which are scored. Only the classes
    that `train` and `test` have in common are included; these classes are numbered from 0.
    """

    name: str
    # for data that `jepa3d prepare` stored: the benchmark and its variant, or "folder", "file" or
    # "procedural"; None for other data
    layout: str | None
    fingerprint: str  # hash of the shapes and labels
    train: PointClouds
    # the scored shapes: those of the test split, or of a validation split if `part` is "validation"
    test: PointClouds
    # the source's own validation split; None if the source has none, or if it is scored as `test`
    validation: PointClouds | None
    class_names: tuple[str, ...]
    # one text for each class that lacks train or test shapes, such as "disc (2 train, 0 test)"
    dropped: tuple[str, ...] = ()
    part_names: tuple[str, ...] = ()
    parts_of: list[list[int]] = field(default_factory=list)  # class -> its part ids
    part: Part = "test"
    has_validation: bool = False  # whether the source has its own validation split
    # short hash that changes with the shapes, the labels, the way in which they are read, and the
    # version of jepa3d
    key: str = ""

    @staticmethod
    def load(config: FinetuneConfig, num_points: int, parts: bool = False) -> "Labelled":
        """Load the shapes that a run is trained and tested on."""
        dataset = LabelledSet(config.data, config.labels_key, config.up_axis)
        return dataset.read(num_points, parts=parts)

    @staticmethod
    def of(clouds: PointClouds, part: Part = "test") -> "Labelled":
        """Keep the shapes of the classes that train and the scored split have in common; log the
        classes that are dropped.

        part: the split that is scored. If it is "validation", the test split is not used. Instead,
        the source's own validation split is scored, or a fixed fifth of train if the source has
        none. Raises ReadError if the labels or the train/test split are missing, if train is too
        small to hold out a fifth, if too few classes are shared, or if a shape has only unlabelled
        points although the source has part labels. Raises ValueError as `fifth` (below) and
        `partseg.py::category_parts` do.
        """
        name = clouds.name
        if clouds.labels is None:
            hint = "name sub-folders after classes, or give the array of labels by --labels-key"
            raise ReadError(f"{name}: has no labels, or only for some shapes; {hint}")
        if clouds.split is None or (part == "test" and not (clouds.split == _TEST).any()):
            hint = "make one with: jepa3d prepare --split 0.2"
            raise ReadError(f"{name}: has no train/test split, or no test shapes; {hint}")
        has_validation = bool((clouds.split == _VALIDATION).any())
        if part == "validation" and not has_validation:
            clouds = _with_validation(clouds.part("train"))
        labels, split = np.asarray(clouds.labels), np.asarray(clouds.split)
        scored = _TEST if part == "test" else _VALIDATION
        in_train, in_test = split == _TRAIN, split == scored
        both = np.intersect1d(labels[in_train], labels[in_test])
        if len(both) < (needed := 2 if clouds.parts is None else 1):
            found = f"train and {part} have {len(both)} classes in common"
            raise ReadError(f"{name}: {found}, but at least {needed} are needed")
        dropped = tuple(lacking(labels, in_train, in_test, clouds.class_names, part))
        if dropped:
            what = f"{len(dropped)} classes dropped, since train or {part} lacks them"
            log.info(f"{what}: {', '.join(dropped)}")
        every = clouds.class_names or list(map(str, range(labels.max() + 1)))
        names = tuple(every[i] for i in both)
        mask = np.isin(labels, both)
        numbers = np.searchsorted(both, labels[mask])
        kept = replace(clouds.subset(mask), labels=numbers, class_names=names)
        train, test, held = (kept.subset(split[mask] == i) for i in range(len(SPLITS)))
        if part == "validation":
            test, held = held, ()
        subsets, parts = (train, test, held or None), _parts(kept, train)
        known = name, None, clouds.fingerprint, *subsets, names, dropped, *parts
        return Labelled(*known, part, has_validation)

    @property
    def y(self) -> np.ndarray:
        """The labels of train."""
        return np.asarray(self.train.labels)

    @property
    def y_test(self) -> np.ndarray:
        """The labels of test."""
        return np.asarray(self.test.labels)

    def subsets(self) -> list[PointClouds]:
        """Return train, test and, if there is one, validation."""
        return [self.train, self.test, *([self.validation] if self.validation else [])]

    def labels(self) -> list[np.ndarray]:
        """Return the labels of each of the `subsets`."""
        return [np.asarray(subset.labels) for subset in self.subsets()]

    def labelled(self, share: float, seed: int) -> np.ndarray:
        """Sample the train shapes whose labels may be used: the fraction `share` of every class.

        Returns their indices.
        """
        if share == 1:
            return np.arange(len(self.y))
        return stratified(self.y, share, np.random.default_rng([seed, 0]))

    def divide(
        self, share: float, held: float, seed: int
    ) -> tuple[PointClouds, PointClouds | None]:
        """Take the labelled `share` of train, and split it into train and validation.

        held: the fraction of this share that becomes validation. If `held` is 0, nothing is split
        off, and validation is the source's own validation split, or None if the source has no such
        split or if `share` is less than 1. Returns train and validation.
        """
        chosen = self.labelled(share, seed)
        if not held:
            return self.train.subset(chosen), self.validation if share == 1 else None
        rng = np.random.default_rng([seed, 1])
        validation = chosen[stratified(self.y[chosen], held, rng, keep=1)]
        rest = np.setdiff1d(chosen, validation)
        return self.train.subset(rest), self.train.subset(validation)

    def record(
        self, train: PointClouds, validation: PointClouds | None, labels: float
    ) -> dict[str, Any]:
        """Return the entry "data" of a fine-tuning run's result.

        train, validation: the shapes that the run used. labels: the labelled share of train.
        """
        return {
            "name": self.name,
            "variant": self.layout,
            "fingerprint": self.fingerprint,
            "classes": len(self.class_names),
            "dropped_classes": list(self.dropped),
            "train": len(train),
            "validation": len(validation or ()),
            "test": len(self.test),
            "labels": labels,
        }


def _with_validation(train: PointClouds) -> PointClouds:
    """Mark a fixed fifth of the train shapes as the validation split. Raises ReadError if there are
    fewer than five train shapes.
    """
    if len(train) < 5:
        found = f"{len(train)} train shapes are too few to hold out a fifth of them"
        raise ReadError(f"{train.name}: {found}")
    split = np.full(len(train), _TRAIN, np.int8)
    split[fifth(np.asarray(train.labels), seed=0)[1]] = _VALIDATION
    return replace(train, split=split)


def _parts(clouds: PointClouds, train: PointClouds) -> tuple[tuple[str, ...], list[list[int]]]:
    """Return the names of all parts, and for each class its part ids. Both are empty if the clouds
    have no part labels. Raises ReadError if all points of a shape are unlabelled, and ValueError as
    `partseg.py::category_parts` does.

    clouds: all shapes. train: those of the train split; `category_parts` reads only these.
    """
    if clouds.parts is None:
        return (), []
    parts = clouds.parts[:]
    if bare := int((parts == UNLABELLED).all(1).sum()):
        found = f"{bare} shapes have no labelled point"
        raise ReadError(f"{clouds.name}: {found}; remove them from the data")
    labels = np.asarray(train.labels)
    found = category_parts(clouds.part_names, labels, train.parts, clouds.class_names)
    names = clouds.part_names or tuple(f"part {i}" for i in range(int(parts.max()) + 1))
    return names, [ids.tolist() for ids in found]


def stratified(
    labels: np.ndarray, share: float, rng: np.random.Generator, keep: int = 0
) -> np.ndarray:
    """Sample about the fraction `share` of each class, and at least one shape of each class that
    has more than `keep` shapes; returns sorted indices.

    keep: this many shapes of each class are never sampled. A class with `keep` shapes or fewer is
    not sampled at all.
    """
    picked = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = max(1, round(share * len(members)))
        picked.append(members[: max(0, min(count, len(members) - keep))])
    return np.sort(np.concatenate(picked))


def fifth(y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split labels y into four fifths and a held-out fifth; returns the indices of both.

    Every class has at least one shape in the four fifths. A class with few shapes may have none in
    the held-out fifth. Raises ValueError if no class has two shapes.
    """
    check_pairs(y)
    rows, counts = np.arange(len(y)), np.unique(y, return_counts=True)[1]
    if counts.min() > 1 and len(y) // 5 >= len(counts):
        fit, held = train_test_split(rows, test_size=0.2, random_state=seed, stratify=y)
        return fit, held
    held = stratified(y, 0.2, np.random.default_rng(seed), keep=1)
    return np.setdiff1d(rows, held), held


def check_pairs(y: np.ndarray) -> None:
    """Raise ValueError unless at least one class occurs twice in the labels y, so that a classifier
    can be fitted to one shape and validated on another.
    """
    if np.unique(y, return_counts=True)[1].max() < 2:
        needed = "choosing a setting needs a class with at least two"
        raise ValueError(f"every class has only one train shape: {needed}")
