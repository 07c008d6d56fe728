"""Learning curves: probe accuracy of a run's snapshots against the CPU-minutes they cost (the
paper's Fig. 1).
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

from jepa3d.config import BOOKKEEPING, differences
from jepa3d.evaluation.features import layer_features
from jepa3d.evaluation.labelled import Labelled, Part
from jepa3d.evaluation.probe import check_protocols, score, selection_rule
from jepa3d.evaluation.protocol import moments, provenance, write_json
from jepa3d.evaluation.tables import Sheet, mean_std
from jepa3d.models.encoder import PointEncoder
from jepa3d.plain import read_checked
from jepa3d.run import Run


class Curve(NamedTuple):
    """Runs of one configuration that differ in their seed, at the steps that all of them have."""

    name: str
    seeds: list[int]
    steps: list[int]
    minutes: np.ndarray  # seeds steps, CPU-minutes, stage I included
    accuracy: np.ndarray  # seeds steps, per cent

    def minutes_to(self, accuracy: float) -> float | None:
        """Mean CPU-minutes of the first snapshot from which on the mean accuracy stays at least
        `accuracy`.
        """
        below = np.flatnonzero(self.accuracy.mean(0) < accuracy)
        first = below[-1] + 1 if len(below) else 0
        return float(self.minutes.mean(0)[first]) if first < len(self.steps) else None


def learning_curves(
    runs: list[Path],
    data: str,
    labels_key: str = "labels",
    up_axis: str = "z",
    protocol: str = "logistic_10",
    part: Part = "test",
) -> list[Curve]:
    """Probe the untrained encoder, every snapshot and the final encoder of finished runs, grouped
    by configuration.

    Scores are kept in RUN/curve-DATA[-PART]-PROTOCOL.json and used again. The `part` scores every
    point of a curve and selects none. Raises ValueError for what is no finished run of an encoder.
    """
    check_protocols([protocol])
    for run in map(Run, runs):
        if not run.encoder.is_dir() or not run.untrained.is_dir():
            raise ValueError(f"{run.folder}: not a finished run of an encoder")
    configs = [Run(run).config for run in runs]
    read = cache(lambda num_points: Labelled.read(data, num_points, up_axis, labels_key, part))
    special = [labels_key] * (labels_key != "labels") + [part] * (part != "test")
    name = "-".join(["curve", Path(data).stem.replace(":", "-"), *special, protocol])
    found = []
    for run, config in zip(runs, configs, strict=True):
        shapes = read(config["encoder"]["num_points"])
        found.append(_points(run, config["seed"], run / f"{name}.json", shapes, protocol))
    groups: list[list[int]] = []  # places of runs of one configuration
    ignored = {"seed", *BOOKKEEPING}
    for i, config in enumerate(configs):
        same = [
            group for group in groups if not {*differences(config, configs[group[0]])} - ignored
        ]
        same[0].append(i) if same else groups.append([i])
    curves = []
    for group in groups:
        seeds, points = [configs[i]["seed"] for i in group], [found[i] for i in group]
        steps = sorted(set(points[0]).intersection(*points[1:]))
        values = np.array([[of_run[step] for step in steps] for of_run in points])
        name = runs[group[0]].name.removesuffix(f"-{seeds[0]}")
        curves.append(Curve(name, seeds, steps, values[..., 0], values[..., 1]))
    return curves


def _points(
    folder: Path, seed: int, file: Path, shapes: Labelled, protocol: str
) -> dict[int, list[float]]:
    """Step -> [CPU-minutes, accuracy]; what `file` holds already is not scored again."""
    run, rule = Run(folder), selection_rule(shapes)
    cost = run.record["cost"]
    before = read_checked(file) if file.exists() else {}
    same = (before.get("fingerprint"), before.get("selection")) == (shapes.fingerprint, rule)
    known = before["points"] if same else {}
    stage_one = cost["stage1_cpu_seconds"]
    spent = {line["step"]: line["cpu_seconds"] + stage_one for line in [*run.metrics, cost]}
    spent[0] = 0.0
    points: dict[int, list[float]] = {}
    for step, path in track(sorted(run.snapshots.items()), f"probing {folder}", transient=True):
        if str(step) in known:
            points[step] = known[str(step)]
            continue
        model = PointEncoder.from_pretrained(path)
        features = [layer_features(model, subset) for subset in shapes.subsets()]
        accuracy = score(protocol, features, shapes, range(len(features[0])), seed)["accuracy"]
        points[step] = [spent[step] / 60, accuracy]
    if len(points) > len(known):
        kept = {"fingerprint": shapes.fingerprint, "protocol": protocol, "selection": rule}
        write_json(file, provenance() | kept | {"points": points})
    return points


def sheet(curves: list[Curve], protocol: str, part: Part = "test") -> Sheet:
    """Where each curve begins and ends, and when each reaches the end of every other."""
    rows = []
    for curve in curves:
        first, last = curve.accuracy[:, 0], curve.accuracy[:, -1]
        reached = [curve.minutes_to(other.accuracy.mean(0)[-1]) for other in curves]
        seeds, spent = ",".join(map(str, curve.seeds)), curve.minutes.mean(0)[-1]
        rows.append([curve.name, seeds, f"{first.mean():.1f}", mean_std(moments(last))])
        rows[-1].append(f"{spent:.1f}")
        rows[-1] += ["-" if minutes is None else f"{minutes:.1f} min" for minutes in reached]
    columns = ["run", "seeds", "untrained", "final", "CPU-min"]
    notes = [
        f"{protocol}, overall accuracy % on the {part} part, which scores every snapshot and "
        "selects none",
        "within a snapshot: layer and C are chosen as by jepa3d probe; the files curve-*.json say "
        "on what",
    ]
    columns += [f"{curve.name}'s final after" for curve in curves]
    return Sheet("learning curves", columns, rows, notes)
