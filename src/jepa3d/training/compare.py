"""`jepa3d compare`: the arms of a grid, trained with the same seeds, scored once and set against a
reference.

OUT/runs/ARM-SEED/   a run of jepa3d pretrain, ARM-lrRATE-SEED where rates are searched; scores-*.json, its outcomes,
                     and in the reference's runs those of the baselines
OUT/costs.json       what a step costs, where arms get equal CPU time     OUT/log.txt    what training printed
OUT/table.md         the tables            OUT/compare.json  all of it    OUT/compare.png  differences with intervals
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from jepa3d.config import PretrainConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.evaluation.labelled import Labelled, Part
from jepa3d.evaluation.outcomes import (
    LabelledSet,
    encoded,
    kept_outcomes,
    made_by_hand,
    names_of,
)
from jepa3d.evaluation.paired import Outcomes, Row, rows_of, sheets_of, stacked
from jepa3d.evaluation.probe import selection_rule, was_seen
from jepa3d.evaluation.protocol import provenance, write_json
from jepa3d.evaluation.tables import Sheet, markdown, show
from jepa3d.figures import draw_differences
from jepa3d.plain import log, read_checked, to_dict, write_bytes, write_checked
from jepa3d.run import Run
from jepa3d.training import runs
from jepa3d.training.engine import plain_settings, settle
from jepa3d.training.grid import Grid, at_equal_time
from jepa3d.training.loop import Diverged
from jepa3d.training.optim import total_steps
from jepa3d.training.pretrain import clouds_of, pretrain

BY_HAND = ("histograms", "geometry")
BASELINES = ("untrained", *BY_HAND)


class Comparison:
    """The runs and scores of a grid in a folder: what is there is used, the rest is made, a line a
    run.
    """

    def __init__(self, grid: Grid, sets: list[LabelledSet], part: Part, out: Path):
        """Read the scored sets and check what is there.

        Raises ValueError, before anything is trained.
        """
        self.names, self.part, self.out = names_of(sets), part, out
        self.shapes = cache(LabelledSet.read)
        self.clouds: dict[tuple, PointClouds] = {}
        self.ended: dict[Path, str | None] = {}  # run -> why it failed, None where it did not
        self.failed: dict[str, str] = {}  # arm -> why
        self.rates: dict[str, float | None] = {}  # arm -> the learning rate chosen
        self.total = len(grid.arms) * (len(grid.rates) + len(grid.seeds) - 1)
        parts: set[Part] = {part, "validation"} if len(grid.rates) > 1 else {part}
        for dataset, config, scored in product(sets, grid.arms.values(), parts):
            self.shapes(dataset, config.encoder.num_points, scored)
        out.mkdir(parents=True, exist_ok=True)
        if grid.cpu_minutes is not None:
            log.info("measuring what a step of each arm costs, where that is not known yet")
            with self._quiet():
                grid = at_equal_time(grid, out)
        self.grid = grid
        for arm, seed, rate in product(grid.arms, grid.seeds, grid.rates):
            if (folder := self.folder(arm, seed, rate)).exists():
                try:
                    runs.check_unchanged(settle(grid.config(arm, seed, rate), folder), folder)
                except ValueError as error:
                    raise ValueError(
                        f"{grid.path}: arms.{arm}: {error}; give a changed arm another name"
                    ) from error
        self.steps = {
            arm: config.max_steps or total_steps(config, len(self._load(config)))
            for arm, config in grid.arms.items()
        }
        text = ", ".join(f"{arm} {steps:,}" for arm, steps in self.steps.items())
        log.info(f"steps of a run: {text}")
        if grid.cpu_minutes is None and len(set(self.steps.values())) > 1:
            raise ValueError(
                f"{grid.path}: equal steps, but they are {text}; give all arms the same max_steps"
            )

    def folder(self, arm: str, seed: int, rate: float | None) -> Path:
        """Where a run lies."""
        return self.out / "runs" / (f"{arm}-{seed}" if rate is None else f"{arm}-lr{rate:g}-{seed}")

    def run(self) -> list[Row]:
        """Train and score everything."""
        grid, rows = self.grid, []
        for arm in grid.arms:
            self.rates[arm] = self._choose_rate(arm)
        for seed, arm in product(grid.seeds, grid.arms):
            if arm not in self.failed and (reason := self._train(arm, seed, self.rates[arm])):
                self.failed[arm] = f"seed {seed}: {reason}"
        for dataset, name in self.names.items():
            found = {
                arm: self._outcomes(arm, dataset) for arm in grid.arms if arm not in self.failed
            }
            if grid.reference in found:
                found |= self._baselines(dataset)
            rows += rows_of(name, found, grid.reference)
        return rows

    def minutes(self, arm: str) -> float:
        """CPU-minutes of a run of an arm, stage I included, mean over seeds."""
        return float(np.mean([Run(folder).cpu_minutes for folder in self._folders(arm).values()]))

    def notes(self) -> list[str]:
        """The protocol in words."""
        grid = self.grid
        equal = "equal steps"
        if grid.cpu_minutes is not None:
            equal = f"equal CPU time, {grid.cpu_minutes:g} minutes a run, stage I included"
        rule = "every arm as it is written, nothing searched"
        if len(grid.rates) > 1:
            tried = ", ".join(f"{rate:g}" for rate in grid.rates)
            rule = f"learning rate of {tried}, by 10 labels a class on the validation part, seed {grid.seeds[0]}"
        notes = [
            f"seeds {', '.join(map(str, grid.seeds))}; {equal}; chosen: {rule}",
            "frozen vectors, [mean ; max] of the last layer. 10 labels a class: logistic regression, 10 draws; kNN: 10 "
            "nearest; both standardised by train. mAP, nearest neighbour: within the scored part, vectors as they are",
            "difference: from the reference, paired by seed and by shape, with its 95 % interval over both "
            "(evaluation/paired.py); better or worse: the whole interval lies on that side of 0. Of twenty rows that "
            "are equal one is called better or worse by chance",
        ]
        if len(grid.seeds) == 1:
            notes.append(
                "NOTE: one seed: the intervals are over shapes alone and say nothing about other runs"
            )
        for dataset, name in self.names.items():
            shapes = self._read(dataset, grid.reference)
            notes.append(f"{name}: selection {selection_rule(shapes, quick=True)}")
            configs = {arm: to_dict(config) for arm, config in grid.arms.items()}
            seen = [arm for arm in configs if was_seen(configs[arm], dataset.source, self.part)]
            if seen:
                what = "scored shapes were among the unlabelled ones of pretraining"
                notes.append(f"{name}: {what}: {', '.join(seen)}")
        return notes + [f"NOTE: arm {arm} failed: {reason}" for arm, reason in self.failed.items()]

    def sheets(self, rows: list[Row]) -> list[Sheet]:
        """The arms with the protocol, then a table for every set and metric."""
        grid = self.grid
        minutes = {arm: self.minutes(arm) for arm in self.grid.arms if arm not in self.failed}
        lines = []
        for arm, config in grid.arms.items():
            changed = plain_settings(grid.overrides[arm]).items()
            changes = ", ".join(f"{name} {value}" for name, value in changed) or "-"
            rate, steps = f"{self.rates[arm] or config.lr:g}", f"{self.steps[arm]:,}"
            lines.append([arm, changes, rate, steps, str(config.batch_size)])
        columns = ["arm", "its own settings", "lr", "steps", "batch"]
        first = Sheet(f"{grid.title}; reference: {grid.reference}", columns, lines, self.notes())
        about = {}
        for dataset, name in self.names.items():
            shapes = self._read(dataset, grid.reference)
            about[name] = (
                f"{len(shapes.test):,} shapes of {len(shapes.class_names)} classes, {self.part} "
                "part, mean ± std over seeds"
            )
        return [first, *sheets_of(rows, minutes, self.failed, about)]

    def record(self, rows: list[Row]) -> dict[str, Any]:
        """All of it as JSON."""
        grid = self.grid
        arms = {
            arm: {
                "settings": to_dict(config),
                "overrides": grid.overrides[arm],
                "lr": self.rates[arm] or config.lr,
                "steps": self.steps[arm],
                "failed": self.failed.get(arm),
                "cpu_minutes": None if arm in self.failed else self.minutes(arm),
            }
            for arm, config in grid.arms.items()
        }
        names = ("title", "reference", "seeds", "rates", "cpu_minutes")
        return (
            provenance()
            | {name: getattr(grid, name) for name in names}
            | {
                "part": self.part,
                "data": {name: dataset._asdict() for dataset, name in self.names.items()},
                "arms": arms,
                "notes": self.notes(),
                "rows": [row.record() for row in rows],
            }
        )

    def _choose_rate(self, arm: str) -> float | None:
        """The learning rate that is best by 10 labels a class on the validation parts, mean over
        sets, first seed.
        """
        rates, seed = self.grid.rates, self.grid.seeds[0]
        if len(rates) == 1:
            return rates[0]
        ended = [rate for rate in rates if self._train(arm, seed, rate) is None]
        if not ended:
            self.failed[arm] = f"at every learning rate, seed {seed}"
            return None

        def score(rate: float | None) -> float:
            found = [self._score(arm, seed, rate, dataset, "validation") for dataset in self.names]
            return float(np.mean([outcomes["logistic_10"].mean() for outcomes in found]))

        return max(ended, key=score)

    def _train(self, arm: str, seed: int, rate: float | None) -> str | None:
        """Train a run, or go on with it; says so in a line.

        Returns why it failed, None where it did not.
        """
        folder, config = self.folder(arm, seed, rate), self.grid.config(arm, seed, rate)
        if folder in self.ended:
            return self.ended[folder]
        reason, failure = None, folder / "failed.json"
        if failure.exists():
            reason = read_checked(failure, "reason")["reason"]
        elif not (folder.exists() and Run(folder).finished):
            try:
                with self._quiet():
                    trained = sorted(
                        run.parent for run in self.out.glob("runs/*/stage1/*/run.json")
                    )
                    pretrain(
                        config,
                        folder,
                        folder.exists(),
                        clouds=self._load(config),
                        stage_one=trained,
                    )
            except Diverged as error:
                reason = str(error)
                write_checked(failure, {"reason": reason})
        self.ended[folder] = reason
        text = f"failed: {reason}" if reason else f"{Run(folder).cpu_minutes:.1f} CPU-minutes"
        log.info(f"run {len(self.ended)} of {self.total}: {folder.name}: {text}")
        return reason

    def _load(self, config: PretrainConfig) -> PointClouds:
        """The shapes of a run; runs of the same data share them."""
        # those are read with twice the points
        viewed = config.objective == "jepa" and config.target.view > 0
        key = config.data, config.split, config.up_axis, config.encoder.num_points, viewed
        if key not in self.clouds:
            self.clouds[key] = clouds_of(config, config.objective)
        return self.clouds[key]

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """What training logs goes to OUT/log.txt."""
        handlers, level = log.handlers[:], log.level
        file = logging.FileHandler(self.out / "log.txt", encoding="utf-8", delay=True)
        log.handlers = [file]
        log.setLevel(logging.INFO)
        try:
            yield
        finally:
            log.handlers = handlers
            log.setLevel(level)
            file.close()

    def _folders(self, arm: str) -> dict[int, Path]:
        """The runs of an arm at its rate, by seed."""
        return {seed: self.folder(arm, seed, self.rates[arm]) for seed in self.grid.seeds}

    def _read(self, dataset: LabelledSet, arm: str, part: Part | None = None) -> Labelled:
        """A scored set at the points of an arm."""
        return self.shapes(dataset, self.grid.arms[arm].encoder.num_points, part or self.part)

    def _score(
        self, arm: str, seed: int, rate: float | None, dataset: LabelledSet, part: Part
    ) -> dict[str, np.ndarray]:
        folder, shapes = self.folder(arm, seed, rate), self._read(dataset, arm, part)
        return kept_outcomes(
            folder, "encoder", partial(encoded, folder / "encoder", shapes), shapes, seed
        )

    def _outcomes(self, arm: str, dataset: LabelledSet) -> Outcomes:
        """Of an arm, seeds x shapes."""
        return stacked(
            [
                self._score(arm, seed, self.rates[arm], dataset, self.part)
                for seed in self.grid.seeds
            ]
        )

    def _baselines(self, dataset: LabelledSet) -> dict[str, Outcomes]:
        """Vectors without training, on the shapes that the reference sees; seeds draw weights and
        labels.
        """
        folders, shapes = (
            self._folders(self.grid.reference),
            self._read(dataset, self.grid.reference),
        )
        first, found = folders[self.grid.seeds[0]], {}
        for name in BASELINES:
            by_hand = cache(partial(made_by_hand, first / "untrained", name, shapes))
            found[name] = stacked(
                [
                    kept_outcomes(
                        folder,
                        name,
                        by_hand
                        if name in BY_HAND
                        else partial(encoded, folder / "untrained", shapes),
                        shapes,
                        seed,
                    )
                    for seed, folder in folders.items()
                ]
            )
        return found


def compare(grid: Grid, sets: list[LabelledSet], part: Part, out: Path) -> list[Row]:
    """Make the comparison in `out`, print its tables and write them there.

    Raises ValueError and loop.Interrupted.
    """
    comparison = Comparison(grid, sets, part, out)
    rows = comparison.run()
    sheets = comparison.sheets(rows)
    show(sheets)
    write_json(out / "compare.json", comparison.record(rows))
    write_bytes(out / "table.md", markdown(sheets, provenance()["command"]).encode())
    draw_differences(
        rows, out / "compare.png", f"{grid.title}: difference from {grid.reference}, {part} part"
    )
    return rows
