"""`jepa3d compare`: train the arms of a grid (variants of the settings, see grid.py) with the same
seeds, score every run once, and compare each arm with a reference arm.

OUT/runs/ARM-SEED/   a run of jepa3d pretrain, and the scores of its vectors in scores-*.json. The
                     runs of the reference also have the scores of the baselines (their untrained
                     encoders, and handcrafted vectors). Fine-tuning runs are in sub-folders
                     finetuned-*. If the grid gives learning rates (`lr`), the folder is called
                     ARM-lrRATE-SEED instead of ARM-SEED
OUT/costs.json       if arms get equal CPU time: the CPU seconds of each arm before its first step,
                     and per step
OUT/log.txt          the log of all runs
OUT/table.md         the tables
OUT/compare.json     all results
OUT/compare.png      the differences with their intervals
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from jepa3d.config import PretrainConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.evaluation import paired
from jepa3d.evaluation.labelled import Labelled, LabelledSet, Part
from jepa3d.evaluation.probe import selection_rule, was_seen
from jepa3d.evaluation.protocol import provenance, write_json
from jepa3d.evaluation.tables import Sheet, markdown, show
from jepa3d.figures import draw_differences
from jepa3d.plain import log, read_checked, to_dict, write_bytes, write_checked
from jepa3d.run import Run
from jepa3d.training import runs
from jepa3d.training.engine import plain_settings, settle
from jepa3d.training.finetune import finetune
from jepa3d.training.grid import Grid, at_equal_time
from jepa3d.training.loop import Diverged
from jepa3d.training.optim import total_steps
from jepa3d.training.pretrain import clouds_of, pretrain

BY_HAND = ("histograms", "geometry")  # names of the handcrafted vectors
BASELINES = ("untrained", *BY_HAND)


class Comparison:
    """Train and score the runs of a grid in a folder. Runs and scores that exist already are not
    computed again. One line is logged for each run.
    """

    def __init__(self, grid: Grid, sets: list[LabelledSet], part: Part, out: Path):
        """Read the scored sets (the labelled shapes on which arms are scored), and check that
        existing runs have the settings of the grid. If arms get equal CPU time, also measure the
        CPU times of each arm that OUT/costs.json does not have yet (see `grid.py::at_equal_time`).

        Raises ValueError, before any run is trained, if the comparison cannot be made.
        """
        self.names, self.part, self.out = paired.names_of(sets), part, out
        self.shapes = cache(LabelledSet.read)
        self.clouds: dict[tuple, PointClouds] = {}
        # folder of a run that has ended -> why the run failed, or None if it succeeded
        self.ended: dict[Path, str | None] = {}
        self.failed: dict[str, str] = {}  # arm -> why it failed
        self.rates: dict[str, float | None] = {}  # arm -> its chosen learning rate
        # runs of an arm: one per learning rate with the first seed, and one with each other seed
        self.total = len(grid.arms) * (len(grid.rates) + len(grid.seeds) - 1)
        parts: set[Part] = {part, "validation"} if len(grid.rates) > 1 else {part}
        for dataset, config, scored in product(sets, grid.arms.values(), parts):
            self.shapes(dataset, config.encoder.num_points, scored)
        out.mkdir(parents=True, exist_ok=True)
        if grid.cpu_minutes is not None:
            log.info("measuring the CPU time per step of arms not measured yet")
            with self._quiet():
                grid = at_equal_time(grid, out)
        self.grid = grid
        for arm, seed, rate in product(grid.arms, grid.seeds, grid.rates):
            folder = self.folder(arm, seed, rate)
            try:
                if folder.exists():
                    config = settle(grid.config(arm, seed, rate), folder)
                    runs.check_unchanged(config, folder)
            except ValueError as error:
                text = f"{error}; a changed arm needs another name"
                raise ValueError(f"{grid.path}: arms.{arm}: {text}") from error
        self.steps = {}
        for arm, config in grid.arms.items():
            steps = config.max_steps or total_steps(config, len(self._load(config)))
            self.steps[arm] = steps
        text = ", ".join(f"{arm} {steps:,}" for arm, steps in self.steps.items())
        log.info(f"steps of a run: {text}")
        if grid.cpu_minutes is None and len(set(self.steps.values())) > 1:
            found = f"the arms must have equal steps, but have {text}"
            raise ValueError(f"{grid.path}: {found}; give all arms the same max_steps")

    def folder(self, arm: str, seed: int, rate: float | None) -> Path:
        """Return the folder of a run."""
        suffix = "" if rate is None else f"-lr{rate:g}"
        return self.out / "runs" / f"{arm}{suffix}-{seed}"

    def run(self) -> list[paired.Row]:
        """Train and score all arms; returns the rows of the tables of all scored sets."""
        grid, rows = self.grid, []
        for arm in grid.arms:
            self.rates[arm] = self._choose_rate(arm)
        for seed, arm in product(grid.seeds, grid.arms):
            if arm in self.failed:
                continue
            if reason := self._train(arm, seed, self.rates[arm]):
                self.failed[arm] = f"seed {seed}: {reason}"
        arms = [arm for arm in grid.arms if arm not in self.failed]
        scored = [(arm, "encoder", arm) for arm in arms]
        if grid.reference in arms:
            scored += [(name, name, grid.reference) for name in BASELINES]
        for dataset, title in self.names.items():
            found = {row: self._outcomes(of, arm, dataset) for row, of, arm in scored}
            for row, name, arm in scored:
                first = dataset == next(iter(self.names))
                if first and arm in grid.finetuned and name not in BY_HAND:
                    found[row]["finetuned"] = self._finetuned(name, arm, dataset)
            rows += paired.rows_of(title, found, grid.reference)
        return rows

    def notes(self) -> list[str]:
        """Return the protocol in words, as notes of the table."""
        grid, equal = self.grid, "equal steps"
        if grid.cpu_minutes is not None:
            minutes = f"{grid.cpu_minutes:g} minutes a run"
            equal = f"equal CPU time, {minutes}, stage I included"
        rule = "every arm has its own settings, and no setting is searched"
        if len(grid.rates) > 1:
            tried = ", ".join(f"{rate:g}" for rate in grid.rates)
            rule = f"each arm's lr is the best of {tried} at 10 labels a class on validation, seed {grid.seeds[0]}"
        notes = [
            f"seeds {', '.join(map(str, grid.seeds))}; {equal}; {rule}",
            "scores, except after fine-tuning, are of frozen vectors, [mean ; max] of the last layer. 10 labels a "
            "class: logistic regression, mean of 10 samples of labels. kNN: 10 neighbours. "
            "Both standardise the vectors by the train shapes to which they are fitted. mAP, "
            "nearest neighbour: each scored shape is compared with all others, by vectors that are not standardised",
            "other arms: difference from the reference, paired by seed and by shape, with a 95 % interval over seeds "
            "and shapes (evaluation/paired.py). A row is better if its whole interval lies above 0, worse if below. "
            "By chance, one of twenty arms that are equal to the reference is called better or worse",
        ]
        if len(grid.seeds) == 1:
            what = "the intervals are over shapes only, not over training runs"
            notes.append(f"NOTE: one seed: {what}")
        if grid.finetuned:
            tuned = grid.finetune
            how = f"{tuned.labels:.0%} of the labels, {tuned.epochs:g} epochs, lr {tuned.lr:g}"
            rule = "the epoch is chosen on a fifth of the labelled shapes; the row 'untrained' is trained from scratch"
            notes.append(f"fine-tuned, as by jepa3d classify: {how}, {rule}")
        for dataset, name in self.names.items():
            shapes = self._read(dataset, grid.reference)
            rule = selection_rule(shapes, quick=True)
            notes.append(f"{name}: selection {rule}")
            seen = [
                arm
                for arm, config in grid.arms.items()
                if was_seen(to_dict(config), dataset.source, shapes)
            ]
            if seen:
                what = "scored shapes were also used unlabelled in pretraining"
                notes.append(f"{name}: {what}: {', '.join(seen)}")
        failed = self.failed.items()
        return notes + [f"NOTE: arm {arm} failed: {reason}" for arm, reason in failed]

    def record(self, rows: list[paired.Row]) -> dict[str, Any]:
        """Return the result as values for compare.json."""
        grid, arms = self.grid, {}
        for arm, config in grid.arms.items():
            minutes = None
            if arm not in self.failed:
                spent = [Run(run).cpu_minutes for run in self._runs(arm).values()]
                minutes = float(np.mean(spent))
            arms[arm] = {
                "settings": to_dict(config),
                "overrides": grid.overrides[arm],
                "lr": self.rates[arm] or config.lr,
                "steps": self.steps[arm],
                "failed": self.failed.get(arm),
                "cpu_minutes": minutes,  # per run, with stage I (see grid.py); mean over seeds
            }
        names = ("title", "reference", "seeds", "rates", "cpu_minutes")
        return {
            **provenance(),
            **{name: getattr(grid, name) for name in names},
            "part": self.part,
            "finetune": to_dict(grid.finetune) if grid.finetuned else None,
            "data": {name: dataset._asdict() for dataset, name in self.names.items()},
            "arms": arms,
            "notes": self.notes(),
            "rows": [row.record() for row in rows],
        }

    def sheets(self, rows: list[paired.Row], record: dict[str, Any]) -> list[Sheet]:
        """Return the tables: first a table of the arms, with the protocol in its notes, then one
        table for every scored set.
        """
        arms, lines, about = record["arms"], [], {}
        for arm, values in arms.items():
            changed = plain_settings(values["overrides"]).items()
            changes = ", ".join(f"{name} {value}" for name, value in changed) or "-"
            rate, steps = f"{values['lr']:g}", f"{values['steps']:,}"
            batch = str(values["settings"]["batch_size"])
            lines.append([arm, changes, rate, steps, batch])
        columns = ["arm", "its own settings", "lr", "steps", "batch"]
        title = f"{record['title']}; reference: {record['reference']}"
        for dataset, name in self.names.items():
            shapes = self._read(dataset, record["reference"])
            size = f"{len(shapes.test):,} shapes of {len(shapes.class_names)} classes"
            about[name] = f"{size}, {self.part} split; %, mean ± std over seeds"
        minutes = {arm: arms[arm]["cpu_minutes"] for arm in arms.keys() - self.failed}
        first = Sheet(title, columns, lines, record["notes"])
        return [first, *paired.sheets_of(rows, minutes, self.failed, about)]

    def _choose_rate(self, arm: str) -> float | None:
        """Return the learning rate whose run with the first seed has the best accuracy with 10
        labels per class (`logistic_10`), averaged over the validation splits of all sets.

        If the grid has one rate, this rate is returned without a search. Returns None if the grid
        has no rates (each arm keeps its own), or if the runs of all rates fail.
        """
        rates, seed, scores = self.grid.rates, self.grid.seeds[0], {}
        if len(rates) == 1:
            return rates[0]
        for rate in rates:
            if self._train(arm, seed, rate) is None:
                found, run = [], {seed: self.folder(arm, seed, rate)}
                for dataset in self.names:
                    some = self._outcomes("encoder", arm, dataset, run, "validation")
                    found.append(some["logistic_10"].mean())
                scores[rate] = np.mean(found)
        if not scores:
            self.failed[arm] = f"at every learning rate, seed {seed}"
        return max(scores, key=scores.__getitem__, default=None)

    def _train(self, arm: str, seed: int, rate: float | None) -> str | None:
        """Train or resume a run, unless it has ended already. One line is logged for each run.
        Returns why the run failed (its loss became NaN or infinite), or None if it succeeded.
        """
        folder, config = self.folder(arm, seed, rate), self.grid.config(arm, seed, rate)
        if folder in self.ended:
            return self.ended[folder]
        reason, failure = None, folder / "failed.json"
        if failure.exists():
            reason = read_checked(failure, "reason")["reason"]
        elif not (folder.exists() and Run(folder).finished):
            files = sorted(self.out.glob("runs/*/stage1/*/run.json"))
            stages = [file.parent for file in files]
            try:
                with self._quiet():
                    clouds = self._load(config)
                    pretrain(config, folder, folder.exists(), clouds=clouds, stage_one=stages)
            except Diverged as error:
                reason = str(error)
                write_checked(failure, {"reason": reason})
        self.ended[folder] = reason
        text = f"failed: {reason}"
        if reason is None:
            text = f"{Run(folder).cpu_minutes:.1f} CPU-minutes"
        log.info(f"run {len(self.ended)} of {self.total}: {folder.name}: {text}")
        return reason

    def _load(self, config: PretrainConfig) -> PointClouds:
        """Load the shapes of a run; runs on the same data share the loaded shapes."""
        # `clouds_of` (pretrain.py) reads twice as many points if the objective also predicts a
        # vector from a damaged view of the cloud (the setting `target.view`)
        viewed = config.objective == "jepa" and config.target.view > 0
        size = config.encoder.num_points
        key = config.data, config.split, config.up_axis, viewed, size
        if key not in self.clouds:
            self.clouds[key] = clouds_of(config, config.objective)
        return self.clouds[key]

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Return a context in which log messages go only to OUT/log.txt."""
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

    def _runs(self, arm: str) -> dict[int, Path]:
        """Return for each seed the folder of an arm's run at the chosen learning rate."""
        rate = self.rates[arm]
        return {seed: self.folder(arm, seed, rate) for seed in self.grid.seeds}

    def _read(self, dataset: LabelledSet, arm: str, part: Part | None = None) -> Labelled:
        """Read a scored set with as many points per shape as an arm's encoder takes."""
        size = self.grid.arms[arm].encoder.num_points
        return self.shapes(dataset, size, part or self.part)

    def _outcomes(
        self,
        name: str,
        arm: str,
        dataset: LabelledSet,
        runs: dict[int, Path] | None = None,
        part: Part | None = None,
    ) -> paired.Outcomes:
        """Score the vectors `name` of an arm's runs; returns an array [seeds, shapes] for each
        metric.

        name: as in `paired.vectors_by`. The handcrafted vectors of a shape are the same for all
        seeds. For these vectors, a seed only chooses the samples of 10 labels per class.
        """
        shapes, runs = self._read(dataset, arm, part), runs or self._runs(arm)
        vectors = cache(lambda run: paired.vectors_by(name, run, shapes))
        found, first = [], next(iter(runs.values()))
        for seed, run in runs.items():
            make = partial(vectors, first if name in BY_HAND else run)
            found.append(paired.kept_outcomes(run, name, make, shapes, seed))
        return {name: np.stack([some[name] for some in found]) for name in found[0]}

    def _finetuned(self, name: str, arm: str, dataset: LabelledSet) -> np.ndarray:
        """For each run of an arm, fine-tune the encoder in the run's sub-folder `name`, which is
        "encoder" or "untrained".

        Returns an array [seeds, shapes]: 100 where the predicted class is correct, else 0.
        """
        shapes, correct = self._read(dataset, arm), []
        source, key, axis = dataset
        data: dict[str, Any] = {"data": source, "labels_key": key, "up_axis": axis}
        for seed, run in self._runs(arm).items():
            folder = run / f"finetuned-{name}-{self.part}-{shapes.key}"
            init = str(run / name)
            # in an earlier call, the path of `out` may have been written in another way
            if folder.exists():
                init = Run(folder).config["init"]
            config = replace(self.grid.finetune, **data, init=init, seed=seed)
            with self._quiet():
                finetune(config, folder, folder.exists(), data=shapes)
            log.info(f"fine-tuned: {run.name}, {name}")
            with np.load(folder / "predictions.npz") as found:
                correct.append(100.0 * (found["predicted"] == found["label"]))
        return np.stack(correct)


def compare(grid: Grid, sets: list[LabelledSet], part: Part, out: Path) -> list[paired.Row]:
    """Run the comparison in the folder `out`; print its tables and write them there.

    Raises ValueError if the comparison cannot be made. Raises loop.Interrupted if it is stopped.
    """
    comparison = Comparison(grid, sets, part, out)
    rows = comparison.run()
    record = comparison.record(rows)
    sheets = comparison.sheets(rows, record)
    show(sheets)
    write_json(out / "compare.json", record)
    text = markdown(sheets, record["command"])
    write_bytes(out / "table.md", text.encode("utf-8", "backslashreplace"))
    title = f"{grid.title}: difference from {grid.reference}, {part} split"
    draw_differences(rows, out / "compare.png", title)
    return rows
