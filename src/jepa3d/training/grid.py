"""Read grids from YAML files. A grid lists the arms of a comparison. An arm is a variant of the
training settings. Also compute how many steps each arm can take in equal CPU time.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa3d import config as settings
from jepa3d.config import FinetuneConfig, PretrainConfig
from jepa3d.plain import (
    differences,
    from_dict,
    merge,
    nearest,
    read_checked,
    read_recipe,
    write_checked,
)
from jepa3d.training.pretrain import check, cpu_costs
from jepa3d.validate import validate

ROUNDS = 3  # number of times that the CPU times of each arm are measured; their median is used


class Grid(NamedTuple):
    """The arms to compare, each with its full settings."""

    path: Path
    title: str
    arms: dict[str, PretrainConfig]
    overrides: dict[str, dict]  # arm -> its own settings, as in the file
    reference: str
    seeds: tuple[int, ...]
    # Learning rates to choose from, or (None,) if each arm keeps its own rate.
    rates: tuple[float | None, ...]
    # per run, including stage I (explained in `config` below); None if the arms get equal steps
    cpu_minutes: float | None
    # how arms are fine-tuned on the first of the labelled data sets on which they are scored
    finetune: FinetuneConfig
    finetuned: tuple[str, ...]  # the arms that are fine-tuned

    def config(self, arm: str, seed: int, rate: float | None) -> PretrainConfig:
        """Return the configuration of one run.

        rate: learning rate for the arm's objective; None for the rate in the arm's settings. Stage
        I (the training of a network that the arm needs first, such as a teacher) keeps its own
        learning rate.
        """
        config = self.arms[arm]
        return replace(config, seed=seed, lr=config.lr if rate is None else rate)


@dataclass(frozen=True)
class _File:
    """The keys of a grid file except `equal`."""

    arms: dict
    reference: str
    seeds: tuple[int, ...]
    preset: str | None = None
    recipe: str | None = None
    settings: dict = field(default_factory=dict)
    lr: tuple[float, ...] = ()
    title: str = ""
    finetune: dict = field(default_factory=dict)


def read_grid(path: Path, common: dict, reserved: Iterable[str] = ()) -> Grid:
    """Read a grid from a file.

    common: settings that override the file's common settings, but not an arm's own settings.
    reserved: names that no arm may have. If the grid is not valid, raises a ValueError that names
    the file and the key.
    """
    values = read_recipe(path)
    try:
        equal = values.pop("equal", "steps")
        timed = isinstance(equal, dict) and len(equal) == 1
        minutes = equal.get("cpu_minutes") if timed else None
        if equal != "steps" and not (isinstance(minutes, int | float) and minutes > 0):
            allowed = "use steps, or {cpu_minutes: M} with M above 0"
            raise ValueError(f"equal is {equal!r}: {allowed}")
        for key in ("arms", "reference", "seeds"):
            if key not in values:
                raise ValueError(f"{key} is missing")
        file = from_dict(_File, values)
        arms = {str(k): {} if v is None else v for k, v in file.arms.items()}
        if not arms:
            raise ValueError("arms is empty: give at least one")
        if file.reference not in arms:
            hint = nearest(file.reference, arms)
            raise ValueError(f"reference {file.reference!r} is not an arm{hint}")
        for key, given in (("seeds", file.seeds), ("lr", file.lr)):
            if len(set(given)) < len(given) or (key in values and not given):
                found = f"{key} {list(given)}"
                raise ValueError(f"{found}: give at least one value, no value twice")
        tuning = _finetuning(file, arms)
        layers = [*_base(path, file), file.settings, common]
        settings.resolve(*layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    fixed = ["seed", *["lr"] * bool(file.lr), *["max_steps"] * (minutes is not None)]
    rates, title = file.lr or (None,), file.title or path.stem
    grid = Grid(path, title, {}, arms, file.reference, file.seeds, rates, minutes, *tuning)
    for name, changes in arms.items():
        try:
            if not re.fullmatch(r"[\w.+-]+", name) or name in reserved:
                allowed = "a name may have letters, digits, . + - and _"
                raise ValueError(f"{allowed}, and must not be {', '.join(reserved)}")
            if not isinstance(changes, dict):
                allowed = "give the settings in which the arm differs, or {} for none"
                raise ValueError(f"{allowed}, not {changes!r}")
            grid.arms[name] = config = settings.resolve(*layers, changes)
            written = changes | changes.get(config.objective, {})
            if clash := [key for key in fixed if key in written]:
                raise ValueError(f"{clash[0]} is set by the grid for all arms")
            if config.objective == "dvae":
                raise ValueError("objective dvae trains no encoder to compare")
            for seed, rate in product(grid.seeds, grid.rates):
                check(grid.config(name, seed, rate))
        except ValueError as error:
            raise ValueError(f"{path}: arms.{name}: {error}") from error
    return grid


def _finetuning(file: _File, arms: Iterable[str]) -> tuple[FinetuneConfig, tuple[str, ...]]:
    """Return the settings of fine-tuning, and which arms are fine-tuned. The file's key `finetune`
    overrides the settings of the file's preset, or the defaults if the file has no preset.
    """
    chosen = file.finetune.get("arms", [*arms] if file.finetune else [])
    if not isinstance(chosen, list) or not set(chosen) <= {*arms}:
        raise ValueError(f"finetune.arms is {chosen!r}: give a list of arms from {', '.join(arms)}")
    changes = {key: value for key, value in file.finetune.items() if key != "arms"}
    if ruled := changes.keys() & {"data", "labels_key", "up_axis", "init", "seed"}:
        raise ValueError(f"finetune.{min(ruled)} is set by the comparison: leave it out")
    changes["data"] = "-"  # a placeholder for the first scored data set, not known yet
    base = settings.preset(file.preset, FinetuneConfig) if file.preset else {}
    config = from_dict(FinetuneConfig, merge(base, changes))
    validate(config)
    return config, tuple(chosen)


def _base(grid: Path, file: _File) -> list[dict]:
    """Return the settings of the grid's preset or recipe. A recipe's path may be relative to the
    grid file.
    """
    if (file.preset is None) == (file.recipe is None):
        raise ValueError("give either preset or recipe")
    if file.preset:
        return [settings.preset(file.preset)]
    name = str(file.recipe)
    recipe = read_recipe(beside if (beside := grid.parent / name).is_file() else name)
    preset = recipe.pop("preset", None)
    return [settings.preset(preset) if preset else {}, recipe]


def at_equal_time(grid: Grid, out: Path) -> Grid:
    """Return the grid with as many steps for each arm as the grid's CPU-minutes allow.

    Two CPU times are measured for each arm: the time before the first step (stage I and cached
    targets), and the time per step. Each is the median of `ROUNDS` measurements. Both are saved in
    out/costs.json, and later calls use the saved values. Raises ValueError for an arm whose
    settings have changed since it was measured. Also raises it for an arm that has no time left for
    a step after stage I and cached targets.
    """
    assert grid.cpu_minutes is not None
    file = out / "costs.json"
    known: dict[str, Any] = read_checked(file, "arms")["arms"] if file.exists() else {}
    plain = {name: settings.to_dict(config) for name, config in grid.arms.items()}
    for name in plain.keys() & known.keys():
        if changed := differences(plain[name], known[name]["settings"]):
            setting, (now, then) = next(iter(changed.items()))
            reason = f"{setting} was {then} when the arm's cost was measured ({file})"
            hint = f"not {now}; a changed arm needs another name"
            raise ValueError(f"{grid.path}: arms.{name}: {reason}, {hint}")
    if new := [name for name in grid.arms if name not in known]:
        # If other arms were measured earlier, the machine may be busier or less busy now. So
        # measure one of those arms again. The CPU times of new arms are multiplied by the ratio of
        # that arm's earlier CPU time per step to its CPU time per step now.
        again = [name for name in grid.arms if name in known][:1]
        todo = {name: grid.arms[name] for name in [*new, *again]}.items()
        rounds = [{name: cpu_costs(arm) for name, arm in todo} for _ in range(ROUNDS)]
        pairs = {name: [costs[name] for costs in rounds] for name in rounds[0]}
        medians = {name: np.median(costs, 0) for name, costs in pairs.items()}
        scale = known[again[0]]["step"] / medians[again[0]][1] if again else 1.0
        for name in new:
            before, step = (scale * seconds for seconds in medians[name])
            known[name] = {"before": before, "step": step, "settings": plain[name]}
        write_checked(file, {"unit": "CPU-seconds", "arms": known})
    arms = {}
    for name, config in grid.arms.items():
        before, step = known[name]["before"], known[name]["step"]
        steps = int((60 * grid.cpu_minutes - before) / step)
        if steps < 1:
            reason = f"stage I and cached targets take {before / 60:.1f} of {grid.cpu_minutes:g}"
            raise ValueError(f"{grid.path}: arms.{name}: {reason} CPU-minutes, and no step is left")
        arms[name] = replace(config, max_steps=steps)
    return grid._replace(arms=arms)
