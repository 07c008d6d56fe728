"""Fine-tuning runs in one table: seeds averaged, settings chosen on validation, gains paired by
seed, rules told.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa3d.config import BOOKKEEPING
from jepa3d.evaluation.published import ON_TEST, PUBLISHED, Sheet, benchmark_of, published_sheet

BASES = ("scratch", "untrained")  # what a pretrained encoder is measured against
CHOSEN_BY = {
    "classify": "overall_accuracy",
    "fewshot": "overall_accuracy",
    "segment": "instance_miou",
}
_NEEDED: dict[str, type] = {
    "protocol": str,
    "init": str,
    "selection": str,
    "seed": int,
    "votes": int,
}
_NEEDED |= dict.fromkeys(("data", "metrics", "settings"), dict)


class Run(NamedTuple):
    """A finished run: its folder, results.json, and what its encoder began as, seeds apart."""

    folder: Path
    result: dict[str, Any]
    init: str


class Arm(NamedTuple):
    """Runs that differ in their seeds only."""

    runs: list[Run]

    @property
    def result(self) -> dict[str, Any]:
        """The first run's, for all that the seeds share."""
        return self.runs[0].result

    @property
    def init(self) -> str:
        return self.runs[0].init

    def values(self, metric: str, part: str = "metrics") -> list[float]:
        """A figure a run on the test part, or of part "validation"; of those runs that have it."""
        found = [(run.result[part] or {}).get(metric) for run in self.runs]
        return [value for value in found if value is not None]

    def has_validation(self) -> bool:
        return len(self.values(CHOSEN_BY[self.result["task"]], "validation")) == len(self.runs)

    def measured_on(self) -> str:
        """Equal for arms of one task and data set."""
        return json.dumps(
            [
                self.result["task"],
                *(self.result["data"].get(name) for name in ("fingerprint", "variant")),
            ]
        )

    def key(self, without: str | None = None, init: bool = True) -> str:
        """Equal for arms that differ in nothing else than the setting `without`, and than init
        where that is False.
        """
        settings = {
            name: value for name, value in self.result["settings"].items() if name != without
        }
        known = [self.result[name] for name in ("protocol", "selection", "votes")]
        known += [self.result["data"].get(name) for name in ("labels", "train")]
        return json.dumps(
            [self.measured_on(), *known, settings, self.init if init else None], sort_keys=True
        )

    def label(self) -> str:
        """The encoder's origin for a reader: a pretraining run's name without its seed."""
        if self.init in BASES:
            return self.init
        names = set()
        for run in self.runs:
            record, path = run.result["pretraining"] or {}, Path(run.result["init"])
            path = path.parent if path.name == "encoder" else path
            names.add(path.name.removesuffix(f"-{record.get('seed')}") if record else str(path))
        return " ".join(sorted(names))


# ------------------------------------------------------------------------------------------ reading


def read_runs(paths: list[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs at and below folders, and a note for each unfinished one below.

    Raises ValueError.
    """
    found: dict[Path, Path] = {}
    unfinished: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ValueError(
                f"{path}: no such folder; give runs of jepa3d classify, segment or fewshot"
            )
        if _is_unfinished(path):
            raise ValueError(
                f"{path}: an unfinished run, without results.json; finish it with --resume"
            )
        below = _below(path, unfinished)
        if not below:
            left = f"; unfinished: {', '.join(map(str, unfinished))}" if unfinished else ""
            raise ValueError(
                f"{path}: no results.json of classify, segment or fewshot in or below it{left}"
            )
        found |= {folder.resolve(): folder for folder in below}
    return [read_run(folder) for folder in found.values()], [
        f"unfinished, left out: {f}" for f in unfinished
    ]


def _below(folder: Path, unfinished: list[Path]) -> list[Path]:
    """The outermost run folders: a few-shot run may hold its folds' runs."""
    if (folder / "results.json").is_file():
        return [folder]
    if _is_unfinished(folder):
        unfinished.append(folder)
        return []
    inner = (
        child for child in sorted(folder.iterdir()) if child.is_dir() and not child.is_symlink()
    )
    return [run for child in inner for run in _below(child, unfinished)]


def _is_unfinished(folder: Path) -> bool:
    """Whether it is a fine-tuning run (a pretraining run's config names no task) that has no
    result.
    """
    return (
        (folder / "run.json").is_file()
        and not (folder / "results.json").is_file()
        and "task" in _json(folder / "config.json")
    )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from error


def read_run(folder: Path) -> Run:
    """A run by its results.json. ValueError for one that is damaged, or of something else."""
    file = folder / "results.json"
    result = _json(file)
    if not isinstance(result, dict) or result.get("task") not in list(CHOSEN_BY):
        raise ValueError(f"{file}: not a result of jepa3d classify, segment or fewshot")
    if wrong := [name for name, kind in _NEEDED.items() if not isinstance(result.get(name), kind)]:
        raise ValueError(
            f"{file}: {wrong[0]} is {result.get(wrong[0])!r}, not a {_NEEDED[wrong[0]].__name__}"
        )
    for name in ("validation", "pretraining", "cost"):
        if not isinstance(result.setdefault(name, None), dict | None):
            raise ValueError(f"{file}: {name} is {result[name]!r}, neither null nor a dict")
    for name, value in [*result["metrics"].items(), *(result["validation"] or {}).items()]:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{file}: {name} is {value!r}, not a number")
    return Run(folder, result, _origin(result["init"], result["pretraining"]))


def _origin(init: str, record: dict | None) -> str:
    """What an encoder began as, by its pretraining run's record: the same for all seeds of one
    configuration.
    """
    if not record or init in BASES:
        return init
    kept = {
        name: value
        for name, value in record.items()
        if name not in ("seed", "cost", "commit", *BOOKKEEPING)
    }
    kept["data"] = (record.get("data") or {}).get("fingerprint")
    return json.dumps(_seedless(kept, record.get("seed")), sort_keys=True)


def _seedless(settings: dict, seed: int | None) -> dict:
    """Settings whose init and teacher, where they are runs of the same seed (runs/mae-0), are named
    without it.
    """

    def plain(value):
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value.removesuffix(f"-{seed}") if isinstance(value, str) else value

    return settings | {
        name: plain(settings[name]) for name in ("init", "teacher") if name in settings
    }


# --------------------------------------------------------------------------------------------- arms


def _grouped(items: list, key: Callable[[Any], Any]) -> list[list]:
    groups: dict[Any, list] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def arms_of(runs: list[Run]) -> list[Arm]:
    """Runs grouped by all but their seeds, scratch and untrained first.

    ValueError for a seed given twice.
    """
    arms = [Arm(group) for group in _grouped(runs, lambda run: Arm([run]).key())]
    for arm in arms:
        seen: dict[Any, Path] = {}
        for run in arm.runs:
            seed, record = run.result["seed"], run.result["pretraining"] or {}
            drawn = seed, record.get("seed")
            if drawn in seen:
                raise ValueError(
                    f"{seen[drawn]} and {run.folder}: both seed {seed} of one arm; give one of them"
                )
            seen[drawn] = run.folder
        arm.runs.sort(key=lambda run: run.result["seed"])
    return sorted(arms, key=lambda arm: arm.init not in BASES)


def choose(arms: list[Arm], setting: str) -> tuple[list[Arm], list[str]]:
    """Of arms that differ in one setting only, that of the best mean on validation, and what was
    decided.

    Arms without validation figures are all kept: the test part chooses nothing.
    """
    kept, notes = [], []
    for group in _grouped(arms, lambda arm: arm.key(setting)):
        judged = [arm for arm in group if arm.has_validation()]
        kept += [arm for arm in group if not arm.has_validation()]
        name, rule = group[0].label(), group[0].result["selection"]
        if len(judged) < len(group):
            notes.append(
                f"NOTE: {name} (selection: {rule}) has no validation figures: every {setting} is kept"
            )
        if judged:
            metric = CHOSEN_BY[group[0].result["task"]]
            scores = [float(np.mean(arm.values(metric, "validation"))) for arm in judged]
            tried = [_told(arm.result["settings"].get(setting)) for arm in judged]
            best = int(np.argmax(scores))
            kept.append(judged[best])
            told = ", ".join(
                f"{value}: {score:.2f}" for value, score in zip(tried, scores, strict=True)
            )
            how = (
                f"chosen by mean validation {metric} ({told})"
                if len(judged) > 1
                else "is the only one there"
            )
            notes.append(f"{name}: {setting} {tried[best]} {how}")
        if len({len(arm.runs) for arm in judged}) > 1:
            notes.append(f"NOTE: {name}: the {setting}s compared have different numbers of seeds")
    return [arm for arm in arms if arm in kept], notes


# ------------------------------------------------------------------------------------------- tables


def tables(paths: list[Path], setting: str | None = None) -> list[Sheet]:
    """Of each task and data set the arms, their paired gains and, where it is a published
    benchmark, its figures.

    `setting` is one to choose on validation. ValueError: no finished run, an unknown setting, a
    seed given twice.
    """
    runs, notes = read_runs(paths)
    known = sorted({name for run in runs for name in run.result["settings"]})
    if setting is not None and setting not in known:
        raise ValueError(
            f"--choose {setting}: not a setting of these runs; one of {', '.join(known)}"
        )
    sheets = []
    for arms in _grouped(arms_of(runs), Arm.measured_on):
        arms, decided = (arms, []) if setting is None else choose(arms, setting)
        sheets.append(_arms_sheet(arms, setting, [*decided, *notes]))
        sheets += _gains_sheet(arms, setting)
        for group in _grouped(arms, lambda arm: benchmark_of(arm.result)):
            if key := benchmark_of(group[0].result):
                sheets.append(
                    published_sheet(
                        PUBLISHED[key], [run.result for arm in group for run in arm.runs]
                    )
                )
        notes = []  # said once
    return sheets


def _moments(values: list[float], sign: str = "") -> str:
    """Mean ± sample std; the mean alone of one value."""
    std = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.2f}{std}" if values else "-"


def _minutes(records: list[dict]) -> str:
    """Mean CPU-minutes of records of a cost, stage I included."""
    spent = [
        cost["cpu_seconds"] + (cost.get("stage1_cpu_seconds") or 0)
        for cost in records
        if cost.get("cpu_seconds")
    ]
    return f"{np.mean(spent) / 60:.1f}" if spent else "-"


def _told(value: Any) -> str:
    return "-" if value is None else str(value)


def _rule(arm: Arm) -> str:
    return ON_TEST if arm.result["selection"] == "best on test" else arm.result["selection"]


def _differing(arms: list[Arm], setting: str | None = None) -> list[str]:
    """Names of the settings in which arms differ, `setting` always among them."""
    names = dict.fromkeys(name for arm in arms for name in arm.result["settings"])
    every = {name: {json.dumps(arm.result["settings"].get(name)) for arm in arms} for name in names}
    return [name for name in names if len(every[name]) > 1 or name == setting]


def _labels(arms: list[Arm]) -> dict[str, str]:
    """A name for each init of the arms, told apart by their paths where the names are the same."""
    names = {arm.init: arm.label() for arm in arms}
    paths = {arm.init: arm.result["init"] for arm in arms}
    return {
        init: name if list(names.values()).count(name) == 1 else paths[init]
        for init, name in names.items()
    }


def _arms_sheet(arms: list[Arm], setting: str | None, notes: list[str]) -> Sheet:
    result, data, labels = arms[0].result, arms[0].result["data"], _labels(arms)
    metrics = list(dict.fromkeys(name for arm in arms for name in arm.result["metrics"]))
    settings = _differing(arms, setting)
    costs = [
        [(run.result["pretraining"] or {}).get("cost") or {} for run in arm.runs] for arm in arms
    ]
    columns: dict[str, list[str]] = {
        "init": [labels[arm.init] for arm in arms],
        "protocol": [arm.result["protocol"] for arm in arms],
        "train": [_told(arm.result["data"].get("train")) for arm in arms],
        **{name: [_told(arm.result["settings"].get(name)) for arm in arms] for name in settings},
        "seeds": [str(len(arm.runs)) for arm in arms],
        **{name: [_moments(arm.values(name)) for arm in arms] for name in metrics},
        "selection": [_rule(arm) for arm in arms],
        "votes": [str(arm.result["votes"]) for arm in arms],
        "CPU-min": [_minutes([run.result["cost"] or {} for run in arm.runs]) for arm in arms],
        "pretraining CPU-min": [_minutes(records) for records in costs],
    }
    if set(columns["pretraining CPU-min"]) == {"-"}:
        del columns["pretraining CPU-min"]
    protocol = f"; {columns.pop('protocol')[0]}" if len(set(columns["protocol"])) == 1 else ""
    shared = [
        f"{name} {_told(value)}"
        for name, value in result["settings"].items()
        if name not in settings
    ]
    notes = [
        *_mixtures(arms),
        *notes,
        *([f"shared settings: {', '.join(shared)}"] if shared else []),
    ]
    name = f"{data.get('name')} ({data['variant']})" if data.get("variant") else data.get("name")
    dropped = data.get("dropped_classes") or 0
    dropped = (
        dropped if isinstance(dropped, int) else len(dropped)
    )  # results of older versions only count them
    dropped = f" ({dropped} more dropped)" if dropped else ""
    counts = f"{_told(data.get('classes'))} classes{dropped}, {_told(data.get('test'))} test shapes"
    title = f"{result['task']}, {name}: {counts}{protocol}; per cent, mean ± std over seeds"
    return Sheet(
        title, list(columns), [list(row) for row in zip(*columns.values(), strict=True)], notes
    )


def _mixtures(arms: list[Arm]) -> list[str]:
    """What makes rows of one table incomparable."""
    rules, votes = (sorted({arm.result[name] for arm in arms}) for name in ("selection", "votes"))
    notes = []
    if len(rules) > 1:
        notes.append(
            f"NOTE: rows of different selection rules are not comparable: {', '.join(rules)}"
        )
    if len(votes) > 1:
        notes.append(
            f"NOTE: rows of different votes are not comparable: {', '.join(map(str, votes))}"
        )
    if "best on test" in rules:
        notes.append(
            f"NOTE: {ON_TEST} is optimistic: the test part chose the epoch, as in published tables"
        )
    return notes


def _gains_sheet(arms: list[Arm], setting: str | None) -> list[Sheet]:
    """The gain over scratch or untrained of arms that differ in init only (and in what was chosen),
    seed by seed.
    """
    settings, labels = _differing(arms, setting), _labels(arms)
    shared = set.intersection(*(set(run.result["metrics"]) for arm in arms for run in arm.runs)) - {
        "std_over_folds"
    }
    metrics = [name for name in arms[0].result["metrics"] if name in shared]
    rows, notes = [], []
    for group in _grouped(
        arms, lambda arm: arm.key(setting if arm.has_validation() else None, init=False)
    ):
        bases = [arm for arm in group if arm.init in BASES]
        for arm, base in ((arm, base) for base in bases for arm in group if arm.init not in BASES):
            gains = [paired_gains(arm, base, name) for name in metrics]
            if not any(gains):
                notes.append(f"{labels[arm.init]} and {base.init} have no seed in common")
                continue
            told = [
                arm.result["protocol"],
                *(_told(arm.result["settings"].get(name)) for name in settings),
            ]
            told += [_rule(arm), str(len(gains[0])), *(_moments(values, "+") for values in gains)]
            rows.append([labels[arm.init], base.init, *told])
    columns = ["init", "over", "protocol", *settings, "selection", "pairs", *metrics]
    sheet = Sheet("gain, points, paired by seed, mean ± std over seeds", columns, rows, notes)
    return [sheet] if rows or notes else []


def paired_gains(arm: Arm, base: Arm, metric: str) -> list[float]:
    """A run's figure less the mean of the base's of the same seed, for each run of `arm` whose seed
    the base has.
    """
    pairs = [
        (run, [b for b in base.runs if b.result["seed"] == run.result["seed"]]) for run in arm.runs
    ]
    return [
        run.result["metrics"][metric] - float(np.mean(Arm(same).values(metric)))
        for run, same in pairs
        if same
    ]
