"""Learning curves: probe accuracy of a run's snapshots against the CPU-minutes they cost (the
paper's Fig. 1).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jepa3d.config import BOOKKEEPING, differences
from jepa3d.data.datasets import PointClouds, load
from jepa3d.evaluation.features import layer_features
from jepa3d.evaluation.labelled import Part, chosen_on, shared_classes
from jepa3d.evaluation.probe import PROTOCOLS, run_protocol, selection_rule
from jepa3d.evaluation.protocol import provenance, write_json
from jepa3d.models.encoder import PointEncoder
from jepa3d.plain import read_checked
from jepa3d.run import Run


class Arm(NamedTuple):
    """Runs of one configuration that differ in their seed, at the steps that all of them have."""

    name: str
    seeds: list[int]
    steps: list[int]
    minutes: np.ndarray  # seeds steps, CPU-minutes, stage I included
    accuracy: np.ndarray  # seeds steps, per cent

    def minutes_to(self, accuracy: float) -> float | None:
        """Mean CPU-minutes of the first snapshot from which on the mean never falls below
        `accuracy`.
        """
        below = np.flatnonzero(self.accuracy.mean(0) < accuracy)
        first = below[-1] + 1 if len(below) else 0
        return float(self.minutes.mean(0)[first]) if first < len(self.steps) else None


class _Data(NamedTuple):
    """What encoders are probed on."""

    train: PointClouds
    test: PointClouds
    held: PointClouds | None  # the source's own validation part
    fingerprint: str
    rule: str  # how layer and C are chosen


def learning_curves(
    runs: list[Path],
    data: str,
    labels_key: str = "labels",
    up_axis: str = "z",
    protocol: str = "logistic_10",
    part: Part = "test",
) -> list[Arm]:
    """Probe the untrained encoder, every snapshot and the final encoder of finished runs, grouped
    by configuration.

    Scores are kept in RUN/curve-DATA[-PART]-PROTOCOL.json and used again. The `part` scores every
    point of a curve and selects none. Raises ValueError for what is no finished run of an encoder.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: one of {', '.join(PROTOCOLS)}")
    configs = [_config(run) for run in runs]
    loaded: dict[int, _Data] = {}
    found = []
    for run, config in zip(runs, configs, strict=True):
        num_points = config["encoder"]["num_points"]
        if num_points not in loaded:
            clouds = load([data], num_points, "all", [up_axis], labels_key)
            train, test, _ = shared_classes(clouds, part)
            held = chosen_on(clouds, train, part)
            loaded[num_points] = _Data(
                train, test, held, clouds.fingerprint, selection_rule(part, clouds)
            )
        special = [labels_key] * (labels_key != "labels") + [part] * (part != "test")
        file = (
            run / f"curve-{'-'.join([Path(data).stem.replace(':', '-'), *special, protocol])}.json"
        )
        found.append(_curve(run, config["seed"], file, loaded[num_points], protocol))
    arms: list[tuple[dict, list[int]]] = []
    ignored = {"seed", *BOOKKEEPING}
    for i, config in enumerate(configs):
        same = [at for known, at in arms if not set(differences(config, known)) - ignored]
        same[0].append(i) if same else arms.append((config, [i]))
    return [
        _arm([runs[i] for i in at], [configs[i]["seed"] for i in at], [found[i] for i in at])
        for _, at in arms
    ]


def _config(run: Path) -> dict:
    if not (run / "encoder").is_dir() or not (run / "untrained").is_dir():
        raise ValueError(f"{run}: not a finished run of an encoder")
    return Run(run).config


def _curve(
    run: Path,
    seed: int,
    file: Path,
    data: _Data,
    protocol: str,
) -> dict[int, list[float]]:
    """Step -> [CPU-minutes, accuracy]; what `file` holds already is not scored again."""
    record = Run(run).record
    cost = record["cost"]
    before = read_checked(file) if file.exists() else {}
    same = (before.get("fingerprint"), before.get("selection")) == (data.fingerprint, data.rule)
    known = before["points"] if same else {}
    lines = [*Run(run).metrics, cost]
    spent = {line["step"]: line["cpu_seconds"] for line in lines}
    spent = {0: 0.0} | {
        step: seconds + cost["stage1_cpu_seconds"] for step, seconds in spent.items()
    }
    folders = {0: run / "untrained", cost["step"]: run / "encoder"}
    folders |= {
        int(folder.name.removeprefix("step-")): folder
        for folder in (run / "snapshots").glob("step-*")
    }
    points: dict[int, list[float]] = {}
    train, test, held = data.train, data.test, data.held
    assert train.labels is not None
    assert test.labels is not None
    for step in track(sorted(folders), f"probing {run}", transient=True):
        if str(step) in known:
            points[step] = known[str(step)]
            continue
        model = PointEncoder.from_pretrained(folders[step])
        x, x_test = layer_features(model, train), layer_features(model, test)
        x_held = (
            None
            if held is None or held.labels is None
            else (layer_features(model, held), held.labels)
        )
        score = run_protocol(
            protocol, x, train.labels, x_test, test.labels, list(range(len(x))), seed, x_held
        )
        points[step] = [spent[step] / 60, score["accuracy"]]
    kept = {
        "fingerprint": data.fingerprint,
        "protocol": protocol,
        "selection": data.rule,
        "points": points,
    }
    if len(points) > len(known):
        write_json(file, provenance() | kept)
    return points


def _arm(runs: list[Path], seeds: list[int], curves: list[dict[int, list[float]]]) -> Arm:
    steps = sorted(set(curves[0]).intersection(*curves[1:]))
    values = np.array([[curve[step] for step in steps] for curve in curves])
    return Arm(
        runs[0].name.removesuffix(f"-{seeds[0]}"), seeds, steps, values[..., 0], values[..., 1]
    )


def show_curves(arms: list[Arm], protocol: str, part: Part = "test") -> None:
    """Print where each curve begins and ends, and when each reaches the end of every other."""
    table = Table(
        "run",
        "seeds",
        "untrained",
        "final",
        "CPU-min",
        *(f"{arm.name}'s final after" for arm in arms),
    )
    for arm in arms:
        std = f" ± {arm.accuracy[:, -1].std(ddof=1):.1f}" if len(arm.seeds) > 1 else ""
        reached = [arm.minutes_to(other.accuracy.mean(0)[-1]) for other in arms]
        table.add_row(
            arm.name,
            ",".join(map(str, arm.seeds)),
            f"{arm.accuracy[:, 0].mean():.1f}",
            f"{arm.accuracy[:, -1].mean():.1f}{std}",
            f"{arm.minutes.mean(0)[-1]:.1f}",
            *("-" if minutes is None else f"{minutes:.1f} min" for minutes in reached),
        )
    Console(width=max(Console().width, 60 + 18 * len(arms))).print(table)
    print(
        f"{protocol}, overall accuracy % on the {part} part, which scores every snapshot and selects none"
    )
    print(
        "within a snapshot: layer and C are chosen as by jepa3d probe; the files curve-*.json say on what"
    )
