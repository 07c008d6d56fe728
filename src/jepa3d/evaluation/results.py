"""`jepa3d results`: tables of fine-tuning runs, with averages over seeds, gains paired by seed, and
the rule by which the epoch of each row was selected. The command can also choose a setting by the
validation metric.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa3d.config import BOOKKEEPING
from jepa3d.evaluation.protocol import moments
from jepa3d.evaluation.published import PUBLISHED, benchmark_of, published_sheet
from jepa3d.evaluation.tables import ON_TEST, Sheet, mean_std
from jepa3d.plain import read_checked
from jepa3d.run import Run

# The values of `init` (what a network starts from) with which pretrained encoders are compared.
# "scratch": all weights are random, and no encoder was loaded. "untrained": the encoder
# RUN/untrained, which a pretraining run stores before its first step; or, in few-shot runs on
# frozen features, a random encoder.
BASES = ("scratch", "untrained")
CHOSEN_BY = {  # task -> the metric by which an epoch or a setting is chosen
    "classify": "overall_accuracy",
    "fewshot": "overall_accuracy",
    "segment": "instance_miou",
}
_COMMANDS = "classify, segment or fewshot"  # in messages: the commands that write results
# setting -> the words for it in the name of a protocol (`protocol_name` in training/finetune.py)
_IN_PROTOCOL = {
    "trained": ", (all weights|head only|head first)",
    "layer_decay": ", layer decay .*",
}
# The content of a results.json, and two more entries: "folder", the run's folder, and "origin", a
# key for the encoder that the run started from (see `_origin`).
Finished = dict[str, Any]
# the entries of a results.json that are checked, by type
_TEXTS, _NUMBERS = ("protocol", "init", "selection"), ("seed", "votes")
_GROUPS = ("data", "metrics", "settings")
_OPTIONAL = ("validation", "pretraining", "cost")
_FIELDS: dict[str, Any] = dict.fromkeys(_TEXTS, str) | dict.fromkeys(_NUMBERS, int)
_FIELDS |= dict.fromkeys(_GROUPS, dict) | dict.fromkeys(_OPTIONAL, dict | None)


class Arm(NamedTuple):
    """The runs of one configuration, which differ only in their seeds."""

    runs: list[Finished]

    @property
    def result(self) -> dict[str, Any]:
        """The first run's result, for values that all seeds share."""
        return self.runs[0]

    @property
    def init(self) -> str:
        """The origin of the encoder, equal for all seeds (see `_origin`)."""
        return self.runs[0]["origin"]

    @property
    def rule(self) -> str:
        """The rule by which the epoch was chosen; a choice on the test split is marked."""
        rule = self.result["selection"]
        return ON_TEST if rule == "best on test" else rule

    def setting(self, name: str) -> str:
        """Return a setting as text."""
        return _text(self.result["settings"].get(name))

    def values(self, metric: str, part: str = "metrics") -> list[float]:
        """Return a metric of each run that has it. part: "metrics" (on test) or "validation"."""
        found = [run[part].get(metric) for run in self.runs]
        return [value for value in found if value is not None]

    @property
    def validation(self) -> float | None:
        """The mean over runs of the task's metric in `CHOSEN_BY`, on the validation split; None if
        a run lacks it.
        """
        values = self.values(CHOSEN_BY[self.result["task"]], "validation")
        return float(np.mean(values)) if len(values) == len(self.runs) else None

    def measured_on(self) -> str:
        """Return a key that is equal for arms of the same task and data set."""
        data = self.result["data"]
        return json.dumps([self.result["task"], data.get("fingerprint"), data.get("variant")])

    def key(self, without: str | None = None, init: bool = True) -> str:
        """Return a key that is equal for arms with the same protocol, selection rule, votes, data,
        settings and init.

        without: a setting that may differ. init: False if the init may differ.
        """
        result = self.result
        settings = dict(result["settings"])
        settings.pop(without, None)
        # the pattern (?!) matches nothing
        protocol = re.sub(_IN_PROTOCOL.get(without or "", "(?!)"), "", result["protocol"])
        known = [protocol, result["selection"], result["votes"]]
        known += [result["data"].get(name) for name in ("labels", "train")]
        known += [self.measured_on(), settings, self.init if init else None]
        return json.dumps(known, sort_keys=True)

    def label(self) -> str:
        """Return a readable name of the init: "scratch" or "untrained", or the name of the
        pretraining run without its seed. For an encoder without a record of its pretraining, the
        name is the path of the encoder.
        """
        if self.init in BASES:
            return self.init
        names = set()
        for run in self.runs:
            path, record = Path(run["init"]), run["pretraining"]
            name = (path.parent if path.name == "encoder" else path).name
            names.add(name.removesuffix(f"-{record.get('seed')}") if record else str(path))
        return " ".join(sorted(names))


# ------------------------------------------------------------------------------------------ reading


def read_runs(paths: list[Path]) -> tuple[list[Finished], list[str]]:
    """Read the finished runs in the folders `paths` and their sub-folders.

    Returns the runs, and a note for each unfinished run. Raises ValueError if a path is not a
    folder or contains no finished run, if a run's config.json is damaged, or as `read_run` does.
    """
    found: dict[Path, Path] = {}
    unfinished: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder; give runs of jepa3d {_COMMANDS}")
        below = list(_below(path, unfinished))
        if not below:
            listed = ", ".join(map(str, unfinished))
            others = f"; unfinished: {listed}; finish them with --resume" if listed else ""
            raise ValueError(f"{path} contains no results.json of {_COMMANDS}{others}")
        found |= {folder.resolve(): folder for folder in below}
    notes = [f"left out, since it is unfinished: {folder}" for folder in unfinished]
    return [read_run(folder) for folder in found.values()], notes


def _below(folder: Path, unfinished: list[Path]) -> Iterator[Path]:
    """Yield the outermost run folders: a few-shot run may contain runs of its folds, which are
    skipped. Unfinished runs are appended to `unfinished` instead.
    """
    if (folder / "results.json").is_file():
        yield folder
    elif Run.is_at(folder) and "task" in read_checked(folder / "config.json"):
        # A run of `jepa3d pretrain` has no task in its config. It is treated like any other folder.
        unfinished.append(folder)
    else:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.is_symlink():
                yield from _below(child, unfinished)


def read_run(folder: Path) -> Finished:
    """Read a run's results.json.

    Raises ValueError if the file is damaged, or is not a result of classify, segment or fewshot.
    """
    file = folder / "results.json"
    result = read_checked(file)
    if result.get("task") not in list(CHOSEN_BY):
        raise ValueError(f"{file} is not a result of jepa3d {_COMMANDS}")
    for name, kind in _FIELDS.items():
        if not isinstance(value := result.setdefault(name, None), kind):
            needed = getattr(kind, "__name__", kind)
            raise ValueError(f"{file}: {name} is {value!r}, not of type {needed}")
    result |= {name: result[name] or {} for name in _OPTIONAL}
    for name, value in [*result["metrics"].items(), *result["validation"].items()]:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{file}: {name} is {value!r}, not a number")
    origin = _origin(result["init"], result["pretraining"])
    return result | {"folder": folder, "origin": origin}


def _origin(init: str, record: dict) -> str:
    """Return a key for the origin of an encoder: `init`, or, for a pretrained encoder, the settings
    and data of its pretraining run, without the seed.

    The key is equal for all seeds of one configuration. The init or teacher of the pretraining may
    itself be a run with the same seed. Then the seed is removed from that run's name: runs/mae-0
    becomes runs/mae.
    """
    if not record or init in BASES:
        return init
    ending = f"-{record.get('seed')}"

    def without_seed(value: Any) -> Any:
        if isinstance(value, list):
            return [without_seed(item) for item in value]
        return value.removesuffix(ending) if isinstance(value, str) else value

    others = {"seed", "cost", "commit", *BOOKKEEPING}
    kept = {name: value for name, value in record.items() if name not in others}
    kept |= {name: without_seed(kept[name]) for name in ("init", "teacher") if name in kept}
    kept["data"] = (record.get("data") or {}).get("fingerprint")
    return json.dumps(kept, sort_keys=True)


# --------------------------------------------------------------------------------------------- arms


def _grouped(items: list, key: Callable[[Any], Any]) -> list[list]:
    """Group items with equal keys; groups and items stay in order."""
    groups: dict[Any, list] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def arms_of(runs: list[Finished]) -> list[Arm]:
    """Group runs that differ only in their seed into arms. Arms that start from scratch or from an
    untrained encoder come first.

    Raises ValueError if two runs of an arm have the same seed, and their pretraining runs have the
    same seed too.
    """
    arms = [Arm(group) for group in _grouped(runs, lambda run: Arm([run]).key())]
    for arm in arms:
        arm.runs.sort(key=lambda run: run["seed"])
        first: dict[tuple, Finished] = {}
        for run in arm.runs:
            same = first.setdefault((run["seed"], run["pretraining"].get("seed")), run)
            if same is not run:
                folders = f"{same['folder']} and {run['folder']}"
                found = f"have the same settings and the same seed {run['seed']}"
                raise ValueError(f"{folders} {found}; give only one of them")
    return sorted(arms, key=lambda arm: arm.init not in BASES)


def choose(arms: list[Arm], setting: str) -> tuple[list[Arm], list[str]]:
    """Choose the arm with the highest mean validation metric from each group of arms that differ
    only in `setting`.

    Arms without validation metrics are all kept, since a choice by test metrics is not allowed.
    Returns the chosen and the kept arms, and notes on the choices.
    """
    kept, notes = [], []
    for group in _grouped(arms, lambda arm: arm.key(setting)):
        kept += [arm for arm in group if arm.validation is None]
        known = [arm for arm in group if arm.validation is not None]
        name, result = group[0].label(), group[0].result
        if len(known) < len(group):
            what = f"{name} (selection: {result['selection']})"
            notes.append(f"NOTE: {what} has no validation metrics: every {setting} is kept")
        if known:
            best = max(known, key=lambda arm: arm.validation or 0)
            how = "is the only one"
            if len(known) > 1:
                tried = [(arm.setting(setting), arm.validation) for arm in known]
                means = ", ".join(f"{value}: {score:.2f}" for value, score in tried)
                how = f"chosen by mean validation {CHOSEN_BY[result['task']]} ({means})"
            kept.append(best)
            notes.append(f"{name}: {setting} {best.setting(setting)} {how}")
        if len({len(arm.runs) for arm in known}) > 1:
            notes.append(f"NOTE: {name}: the values of {setting} have different numbers of seeds")
    return [arm for arm in arms if arm in kept], notes


# ------------------------------------------------------------------------------------------- tables


def tables(paths: list[Path], setting: str | None = None) -> list[Sheet]:
    """Return the tables for each task and data set: the arms; their gains paired by seed; and, if
    the data set is a known benchmark, published results.

    setting: the name of a setting to choose on validation, see `choose`. Raises ValueError as
    `read_runs` and `arms_of` do, and for an unknown setting.
    """
    runs, notes = read_runs(paths)
    known = sorted({name for run in runs for name in run["settings"]})
    if setting is not None and setting not in known:
        found = f"is not a setting of these runs; use one of {', '.join(known)}"
        raise ValueError(f"--choose {setting} {found}")
    sheets = []
    for arms in _grouped(arms_of(runs), Arm.measured_on):
        arms, decided = (arms, []) if setting is None else choose(arms, setting)
        sheets.append(_arms_sheet(arms, setting, [*decided, *notes]))
        sheets += _gains_sheet(arms, setting)
        for group in _grouped(arms, lambda arm: benchmark_of(arm.result)):
            if key := benchmark_of(group[0].result):
                results = [run for arm in group for run in arm.runs]
                sheets.append(published_sheet(PUBLISHED[key], results))
        notes = []  # notes on unfinished runs appear only below the first table
    return sheets


def _spread(values: list[float], sign: str = "") -> str:
    """Format values as the text "mean ± sample std"; return "-" if there are no values."""
    return mean_std(moments(values), f"{sign}.2f") if values else "-"


def _minutes(records: list[dict]) -> str:
    """Format the mean CPU-minutes of the runs whose cost is known. The minutes before a pretraining
    run's first step are included: those of stage I (the training of a teacher or of initial
    weights) and of cached targets. Return "-" if no cost is known.
    """
    costs = [record.get("cost") or {} for record in records]
    known = [cost for cost in costs if cost.get("cpu_seconds")]
    spent = [c["cpu_seconds"] + (c.get("stage1_cpu_seconds") or 0) for c in known]
    return f"{np.mean(spent) / 60:.1f}" if spent else "-"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _differing(arms: list[Arm], setting: str | None = None) -> list[str]:
    """Return the names of the settings in which arms differ; `setting` is always included."""
    every = [arm.result["settings"] for arm in arms]
    names = dict.fromkeys(name for known in every for name in known)
    values = {name: {json.dumps(known.get(name)) for known in every} for name in names}
    return [name for name in names if len(values[name]) > 1 or name == setting]


def _labels(arms: list[Arm]) -> dict[str, str]:
    """Return origin -> name for the origins of the arms' encoders. The name is that of `Arm.label`,
    or the path of the encoder if several origins have the same label.
    """
    names = {arm.init: arm.label() for arm in arms}
    counts = Counter(names.values())
    ambiguous = [arm for arm in arms if counts[names[arm.init]] > 1]
    return names | {arm.init: arm.result["init"] for arm in ambiguous}


def _arms_sheet(arms: list[Arm], setting: str | None, notes: list[str]) -> Sheet:
    """Return a table with one row per arm. Its first notes warn if rows are not comparable."""
    result, labels, settings = arms[0].result, _labels(arms), _differing(arms, setting)
    metrics = dict.fromkeys(name for arm in arms for name in arm.result["metrics"])
    rows = [
        {
            "init": labels[arm.init],
            "protocol": arm.result["protocol"],
            "train": _text(arm.result["data"].get("train")),
            **{name: arm.setting(name) for name in settings},
            "seeds": str(len(arm.runs)),
            **{name: _spread(arm.values(name)) for name in metrics},
            "selection": arm.rule,
            "votes": str(arm.result["votes"]),
            "CPU-min": _minutes(arm.runs),
            "pretraining CPU-min": _minutes([run["pretraining"] for run in arm.runs]),
        }
        for arm in arms
    ]
    columns, protocols = list(rows[0]), {row["protocol"] for row in rows}
    if {row["pretraining CPU-min"] for row in rows} == {"-"}:
        columns.remove("pretraining CPU-min")
    title = _title(result)
    if len(protocols) == 1:
        columns.remove("protocol")
        title += f"; {result['protocol']}"
    mixed = []
    for name, words in (("selection", "selection rules"), ("votes", "votes")):
        found = sorted({arm.result[name] for arm in arms})
        if len(found) > 1:
            what = f"NOTE: rows with different {words} are not comparable"
            mixed.append(f"{what}: {', '.join(map(str, found))}")
    if any(arm.rule == ON_TEST for arm in arms):
        what = "the epoch was chosen on the test split, as in published tables"
        mixed.append(f"NOTE: scores {ON_TEST} are optimistic: {what}")
    known = result["settings"].items()
    shared = [f"{name} {_text(value)}" for name, value in known if name not in settings]
    notes = [*mixed, *notes, *[f"shared settings: {', '.join(shared)}"] * bool(shared)]
    cells = [[row[name] for name in columns] for row in rows]
    return Sheet(f"{title}; per cent, mean ± std over seeds", columns, cells, notes)


def _title(result: dict[str, Any]) -> str:
    """Return the task and data of a result in words."""
    data = result["data"]
    variant, dropped = data.get("variant"), data.get("dropped_classes") or 0
    # older versions stored only the number of dropped classes
    if not isinstance(dropped, int):
        dropped = len(dropped)
    name = f"{data.get('name')} ({variant})" if variant else data.get("name")
    classes = f"{_text(data.get('classes'))} classes"
    classes += f" ({dropped} more dropped)" if dropped else ""
    return f"{result['task']}, {name}: {classes}, {_text(data.get('test'))} test shapes"


def _gains_sheet(arms: list[Arm], setting: str | None) -> list[Sheet]:
    """Return a list with one table: the gain of each pretrained arm over the arms that start from
    scratch or from an untrained encoder, paired by seed. If there are no arms to compare, return an
    empty list.

    Two arms are compared if they differ only in their init. They may also differ in `setting`, if
    it was chosen by validation metrics.
    """
    settings, labels = _differing(arms, setting), _labels(arms)
    every = [run["metrics"].keys() for arm in arms for run in arm.runs]
    metrics = [name for name in every[0] if all(name in known for known in every)]
    metrics = [name for name in metrics if name != "std_over_folds"]
    rows, notes = [], []

    def alike(arm: Arm) -> str:
        return arm.key(setting if arm.validation is not None else None, init=False)

    for group in _grouped(arms, alike):
        ours = [arm for arm in group if arm.init not in BASES]
        for base, arm in product((arm for arm in group if arm.init in BASES), ours):
            gains = [paired_gains(arm, base, name) for name in metrics]
            if not any(gains):
                names = f"{labels[arm.init]} and {base.init}"
                notes.append(f"{names} have no seed in common, so no gain is shown")
                continue
            row = [labels[arm.init], base.init, arm.result["protocol"]]
            row += [*map(arm.setting, settings), arm.rule, str(len(gains[0]))]
            rows.append(row + [_spread(values, "+") for values in gains])
    columns = ["init", "over", "protocol", *settings, "selection", "pairs", *metrics]
    title = "gain in percentage points, paired by seed, mean ± std over seeds"
    return [Sheet(title, columns, rows, notes)] if rows or notes else []


def paired_gains(arm: Arm, base: Arm, metric: str) -> list[float]:
    """Return for each run of `arm` its metric minus the mean metric of the runs of `base` with the
    same seed.

    A run is left out if `base` has no run with its seed.
    """
    bases: dict[int, list[float]] = {}
    for run in base.runs:
        bases.setdefault(run["seed"], []).append(run["metrics"][metric])
    ours = [(run["metrics"][metric], bases.get(run["seed"])) for run in arm.runs]
    return [value - float(np.mean(theirs)) for value, theirs in ours if theirs]
