"""Labelled shapes for training and probing: classes in both halves, a share of the labels, a
validation part.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sklearn.model_selection import train_test_split

from jepa3d.config import FinetuneConfig
from jepa3d.data.cloud import UNLABELLED, ReadError
from jepa3d.data.datasets import PointClouds, load
from jepa3d.data.splits import lacking
from jepa3d.data.store import SPLITS
from jepa3d.evaluation.partseg import category_parts

Part = Literal["test", "validation"]  # what is scored


@dataclass(frozen=True)
class Labelled:
    """Train, test and, where the source has one, validation parts; labels count the classes from 0."""

    name: str
    layout: str | None  # the benchmark and variant of a store
    fingerprint: str
    train: PointClouds
    test: PointClouds
    validation: PointClouds | None
    class_names: tuple[str, ...]
    dropped: tuple[str, ...] = ()  # classes that train or test lacks, with their counts
    part_names: tuple[str, ...] = ()
    parts_of: list[list[int]] = field(default_factory=list)  # parts of each class

    @staticmethod
    def load(config: FinetuneConfig, num_points: int, parts: bool = False) -> "Labelled":
        """The shapes of `config.data`.

        Raises ReadError where labels, parts or a test part are missing.
        """
        clouds = load(
            [config.data], num_points, "all", [config.up_axis], config.labels_key, parts=parts
        )
        if clouds.labels is None:
            told = "sub-folders are classes, and --labels-key names a bundle's"
            raise ReadError(f"{config.data}: has no labels, or not of all its shapes; {told}")
        if clouds.split is None or not (clouds.split == SPLITS.index("test")).any():
            raise ReadError(
                f"{config.data}: has no test part; make one with: jepa3d prepare --split 0.2"
            )
        return Labelled.of(clouds, config.data)

    @staticmethod
    def of(clouds: PointClouds, source: str = "") -> "Labelled":
        """Labelled clouds with a split, reduced to the classes that train and test share; the
        others are named.
        """
        labels, split = clouds.labels, clouds.split
        assert labels is not None
        assert split is not None
        both = np.intersect1d(labels[split == 0], labels[split == 1])
        if len(both) < (least := 2 if clouds.parts is None else 1):
            raise ReadError(
                f"{clouds.name}: {len(both)} classes in both train and test, at least {least} are needed"
            )
        names = tuple(clouds.class_names[i] if clouds.class_names else str(i) for i in both)
        dropped = tuple(lacking(labels, split == 0, split == 1, clouds.class_names))
        show_dropped(dropped)
        kept = clouds.subset(np.flatnonzero(np.isin(labels, both)))
        renumbered = np.searchsorted(both, labels[np.isin(labels, both)]).astype(np.int64)
        kept = replace(kept, labels=renumbered, class_names=names)
        halves = {
            name: kept.subset(np.flatnonzero(kept.split == i)) for i, name in enumerate(SPLITS)
        }
        validation = halves["val"] if len(halves["val"]) else None
        report = Path(source) / "report.json"
        layout = json.loads(report.read_text()).get("layout") if report.is_file() else None
        parts: dict[str, Any] = {}
        if kept.parts is not None:
            if alone := int((kept.parts[:] == UNLABELLED).all(1).sum()):
                raise ReadError(
                    f"{clouds.name}: {alone} shapes have no labelled point; leave them out"
                )
            train = halves["train"]
            assert train.labels is not None
            found = category_parts(clouds.part_names, train.labels, train.parts, names)
            part_names = clouds.part_names or tuple(
                f"part {i}" for i in range(int(kept.parts[:].max()) + 1)
            )
            parts = {"part_names": part_names, "parts_of": [list(map(int, p)) for p in found]}
        return Labelled(
            clouds.name,
            layout,
            clouds.fingerprint,
            halves["train"],
            halves["test"],
            validation,
            names,
            dropped,
            **parts,
        )

    def labelled(self, share: float, seed: int) -> np.ndarray:
        """Rows of train whose labels are known, a stratified `share` of them."""
        labels = self.train.labels
        assert labels is not None
        return (
            np.arange(len(labels))
            if share == 1
            else stratified(labels, share, np.random.default_rng([seed, 0]))
        )

    def divide(
        self, share: float, held: float, seed: int
    ) -> tuple[PointClouds, PointClouds | None]:
        """The labelled `share` of train, less a fraction `held` of it for validation.

        Where nothing is held and all is labelled, the source's own validation part, if it has one.
        """
        chosen, labels = self.labelled(share, seed), self.train.labels
        assert labels is not None
        if not held:
            return self.train.subset(chosen), self.validation if share == 1 else None
        spared = chosen[stratified(labels[chosen], held, np.random.default_rng([seed, 1]), keep=1)]
        return self.train.subset(np.setdiff1d(chosen, spared)), self.train.subset(spared)

    def record(
        self, train: PointClouds, validation: PointClouds | None, labels: float
    ) -> dict[str, Any]:
        """What a result says of its data."""
        return {
            "name": self.name,
            "variant": self.layout,
            "fingerprint": self.fingerprint,
            "classes": len(self.class_names),
            "dropped_classes": list(self.dropped),
            "train": len(train),
            "validation": 0 if validation is None else len(validation),
            "test": len(self.test),
            "labels": labels,
        }


def show_dropped(classes: Sequence[str]) -> None:
    """Name the classes that are left out, if there are any."""
    if classes:
        print(
            f"{len(classes)} classes dropped, since not in both parts: {', '.join(classes)}",
            flush=True,
        )


def stratified(
    labels: np.ndarray, share: float, rng: np.random.Generator, keep: int = 0
) -> np.ndarray:
    """Sorted indices of about a `share` of each class, at least one of each, but leaving `keep` of
    each.
    """
    picked = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        picked.append(members[: min(max(1, round(share * len(members))), len(members) - keep)])
    return np.sort(np.concatenate(picked))


# --------------------------------------------------------------------------------------- for probes


def has_validation(clouds: PointClouds) -> bool:
    return clouds.split is not None and bool((clouds.split == SPLITS.index("val")).any())


def shared_classes(
    clouds: PointClouds, part: Part = "test"
) -> tuple[PointClouds, PointClouds, list[str]]:
    """Train and test parts with the classes present in both, and the classes that were dropped,
    which are printed.

    `part` "validation" leaves the test part alone: the source's own validation part takes its
    place, or, where it has none, a held-out fifth of train (always the same).
    """
    if clouds.labels is None:
        raise ReadError(f"{clouds.name}: has no labels, and a probe needs them")
    if clouds.split is None:
        raise ReadError(f"{clouds.name}: has no train/test split, and a probe needs both")
    labels, (in_train, in_test, in_val) = (
        clouds.labels,
        (clouds.split == SPLITS.index(name) for name in SPLITS),
    )
    if part == "validation" and in_val.any():
        in_test = in_val
    elif part == "validation":
        if in_train.sum() < 5:
            raise ReadError(
                f"{clouds.name}: {in_train.sum()} train shapes, and validation needs a fifth of them"
            )
        clouds, labels = clouds.subset(in_train), labels[in_train]
        in_train = np.isin(np.arange(len(labels)), fifth(labels, seed=0)[0])
        in_test = ~in_train
    both = np.intersect1d(labels[in_train], labels[in_test])
    if len(both) < 2:
        raise ReadError(
            f"{clouds.name}: {len(both)} classes in both train and {part}, a probe needs at least 2"
        )
    if np.bincount(labels[in_train])[both].max() < 2:
        raise ReadError(
            f"{clouds.name}: one train shape a class, a probe needs two to choose on one of them"
        )
    dropped = lacking(labels, in_train, in_test, clouds.class_names, part)
    show_dropped(dropped)
    kept = np.isin(labels, both)
    return clouds.subset(kept & in_train), clouds.subset(kept & in_test), dropped


def chosen_on(clouds: PointClouds, train: PointClouds, part: Part) -> PointClouds | None:
    """The source's own validation part, of the classes of train, if it has one and it is not what
    is scored.
    """
    if part == "validation" or not has_validation(clouds):
        return None
    assert clouds.labels is not None
    assert train.labels is not None
    held = clouds.subset(
        (clouds.split == SPLITS.index("val")) & np.isin(clouds.labels, train.labels)
    )
    return held if len(held) else None


def fifth(y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of four fifths and of a held-out fifth; of each class of two or more at least one in
    each.
    """
    counts = np.unique(y, return_counts=True)[1]
    if counts.min() > 1 and len(y) // 5 >= len(counts):
        fit, held = train_test_split(
            np.arange(len(y)), test_size=0.2, random_state=seed, stratify=y
        )
    else:
        held = stratified(y, 0.2, np.random.default_rng(seed), keep=1)
        fit = np.setdiff1d(np.arange(len(y)), held)
    return fit, held
