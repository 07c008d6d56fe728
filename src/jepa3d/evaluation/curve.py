"""Learning curves, as in Fig. 1 of the paper: the probe accuracy of each snapshot of a run, against
the CPU-minutes of training up to that snapshot.

The paper is that of 3D-JEPA (arXiv 2409.15803). A snapshot is an encoder that was stored during
training. Here the untrained and the final encoder count as snapshots too.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa3d.config import BOOKKEEPING
from jepa3d.evaluation.features import layer_features
from jepa3d.evaluation.labelled import Labelled, LabelledSet, Part
from jepa3d.evaluation.probe import check_protocols, run_protocol, selection_rule
from jepa3d.evaluation.protocol import moments, provenance, write_json
from jepa3d.evaluation.tables import Sheet, mean_std
from jepa3d.models.encoder import PointEncoder
from jepa3d.plain import progress_bar, read_checked
from jepa3d.run import Run


class Curve(NamedTuple):
    """The curves of runs that train in the same way but with different seeds, one curve per seed.
    The curves have only the steps at which all of these runs have a snapshot.
    """

    name: str
    seeds: list[int]
    steps: list[int]
    # CPU-minutes [seeds, steps], including stage I: the training of the networks that a run needs
    # first, such as a dVAE teacher. They are 0 at step 0, even for a run with stage I.
    minutes: np.ndarray
    accuracy: np.ndarray  # [seeds, steps], in per cent

    def minutes_to(self, accuracy: float) -> float | None:
        """Return the CPU-minutes after which the curve, averaged over seeds, reaches `accuracy` and
        does not fall below it again.

        More exactly, these are the CPU-minutes of the earliest snapshot that is not below
        `accuracy` and is followed by no snapshot below it. Returns None if the last snapshot is
        below `accuracy`.
        """
        below = np.flatnonzero(self.accuracy.mean(0) < accuracy)
        first = below[-1] + 1 if len(below) else 0
        return float(self.minutes.mean(0)[first]) if first < len(self.steps) else None


def learning_curves(
    runs: list[Path], dataset: LabelledSet, protocol: str = "logistic_10", part: Part = "test"
) -> list[Curve]:
    """Probe every snapshot of finished runs. Returns one `Curve` per configuration.

    Runs share a `Curve` if they differ only in their seed, and in settings that do not change the
    training (`BOOKKEEPING`), such as the steps of snapshots.

    runs: folders of the runs. dataset: the labelled shapes. protocol: one of `PROTOCOLS` in
    probe.py. part: the split on which every snapshot is scored. The encoder's layer and the
    classifier's regularisation C are not chosen on this split. Raises ValueError for an unknown
    protocol, and for a folder that is not a finished run with an encoder.

    The scores of each run are saved in RUN/curve-DATA[-KEY][-PART]-PROTOCOL.json and reused. DATA
    is the file name of the data set's source, without its suffix. KEY is the name of the label
    array; it is left out if it is "labels". PART is the argument `part`; it is left out if it is
    "test".
    """
    check_protocols([protocol])
    configs = {}
    for run in map(Run, runs):
        if not run.encoder.is_dir() or not run.untrained.is_dir():
            raise ValueError(f"{run.folder} is not a finished run with an encoder")
        configs[run] = run.config
    read, key = cache(dataset.read), dataset.labels_key
    suffixes = [key] * (key != "labels") + [part] * (part != "test")
    stem = Path(dataset.source).stem.replace(":", "-")
    name = "-".join(["curve", stem, *suffixes, protocol])
    ignored = {"seed", *BOOKKEEPING}
    # configuration, as JSON -> run -> step -> [CPU-minutes, accuracy]
    groups: dict[str, dict[Run, dict[int, list[float]]]] = {}
    for run, config in configs.items():
        shapes = read(config["encoder"]["num_points"], part)
        file = run.folder / f"{name}.json"
        points = _points(run, config["seed"], file, shapes, protocol)
        kept = {name: value for name, value in config.items() if name not in ignored}
        groups.setdefault(json.dumps(kept, sort_keys=True), {})[run] = points
    curves = []
    for group in groups.values():
        first, *others = group.values()
        steps = sorted(set(first).intersection(*others))
        rows = [[points[step] for step in steps] for points in group.values()]
        values = np.array(rows)
        seeds = [configs[run]["seed"] for run in group]
        name = next(iter(group)).folder.name.removesuffix(f"-{seeds[0]}")
        curves.append(Curve(name, seeds, steps, values[..., 0], values[..., 1]))
    return curves


def _points(
    run: Run, seed: int, file: Path, shapes: Labelled, protocol: str
) -> dict[int, list[float]]:
    """Return step -> [CPU-minutes, accuracy] for each snapshot of a run.

    Scores are read from `file` if it was written for the same data (`Labelled.key` in labelled.py),
    protocol and selection rule (`selection_rule` in probe.py). Scores that are not in the file are
    computed and written to it.
    """
    cost, rule = run.record["cost"], selection_rule(shapes)
    kept = {"fingerprint": shapes.fingerprint, "key": shapes.key}
    kept |= {"protocol": protocol, "selection": rule}
    saved = read_checked(file) if file.exists() else {}
    known = saved["points"] if kept.items() <= saved.items() else {}
    stage_one, lines = cost["stage1_cpu_seconds"], [*run.metrics, cost]
    spent = {line["step"]: line["cpu_seconds"] + stage_one for line in lines}
    spent[0] = 0.0
    points: dict[int, list[float]] = {}
    snapshots = sorted(run.snapshots.items())
    for step, path in progress_bar(snapshots, f"probing {run.folder}"):
        if str(step) in known:
            points[step] = known[str(step)]
            continue
        model = PointEncoder.from_pretrained(path)
        features = [layer_features(model, subset) for subset in shapes.subsets()]
        train, test, *held = zip(features, shapes.labels(), strict=True)
        choice = range(len(features[0])), seed, held[0] if held else None
        accuracy = run_protocol(protocol, *train, *test, *choice)["accuracy"]
        points[step] = [spent[step] / 60, accuracy]
    if len(points) > len(known):
        write_json(file, provenance() | kept | {"points": points})
    return points


def sheet(curves: list[Curve], protocol: str, part: Part = "test") -> Sheet:
    """Return a table with a row for each `Curve`: its accuracy at the start and at the end, and its
    CPU-minutes. The table also has a column for each `Curve`. This column says after how many
    CPU-minutes the curve of a row reaches the final accuracy of the column's curve (see
    `Curve.minutes_to`).
    """
    rows = []
    for curve in curves:
        first, last = curve.accuracy[:, 0].mean(), moments(curve.accuracy[:, -1])
        reached = [curve.minutes_to(other.accuracy.mean(0)[-1]) for other in curves]
        spent, seeds = curve.minutes.mean(0)[-1], ",".join(map(str, curve.seeds))
        row = [curve.name, seeds, f"{first:.1f}", mean_std(last), f"{spent:.1f}"]
        rows.append(row + ["-" if at is None else f"{at:.1f} min" for at in reached])
    columns = ["run", "seeds", "untrained", "final", "CPU-min"]
    columns += [f"reaches final accuracy of {curve.name} after" for curve in curves]
    what = f"{protocol}, overall accuracy % on the {part} split"
    rule = "for each snapshot, layer and C are chosen as by jepa3d probe"
    notes = [f"{what}; every snapshot is scored on this split, but none is selected by it"]
    notes.append(f"{rule}; the files curve-*.json say on which shapes")
    return Sheet("learning curves", columns, rows, notes)
