"""Grids: the arms of a comparison, read from YAML and resolved, and the steps that equal CPU time
gives each.
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
from jepa3d.plain import from_dict, merge, nearest, read_checked, read_recipe, write_checked
from jepa3d.training.pretrain import check, cpu_costs
from jepa3d.validate import validate

ROUNDS = 3  # of measuring what a step costs, arm after arm


class Grid(NamedTuple):
    """Arms to compare, resolved."""

    path: Path
    title: str
    arms: dict[str, PretrainConfig]
    overrides: dict[str, dict]  # of each arm, as written
    reference: str
    seeds: tuple[int, ...]
    # learning rates to choose from; (None,) leaves each arm its own
    rates: tuple[float | None, ...]
    cpu_minutes: float | None  # of every run, stage I included; None: equal steps
    finetune: FinetuneConfig  # how arms are fine-tuned on the first scored set
    finetuned: tuple[str, ...]  # which are

    def config(self, arm: str, seed: int, rate: float | None) -> PretrainConfig:
        """The configuration of one run.

        The rate is that of the arm's own objective, as of `config.resolve`; stage I keeps its own.
        """
        config = self.arms[arm]
        return replace(config, seed=seed, lr=config.lr if rate is None else rate)


@dataclass(frozen=True)
class _File:
    """The keys of a grid file, but for `equal`."""

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
    """The grid in a file. `common`: overrides that win over its settings, but not over an arm's
    own.

    reserved: names that no arm may have. Raises ValueError, which names the file and the key.
    """
    values = read_recipe(path)
    try:
        equal = values.pop("equal", "steps")
        timed = isinstance(equal, dict) and len(equal) == 1
        minutes = equal.get("cpu_minutes") if timed else None
        if equal != "steps" and not (isinstance(minutes, int | float) and minutes > 0):
            allowed = "steps, or {cpu_minutes: M} with M above 0"
            raise ValueError(f"equal {equal!r}: {allowed}")
        for key in ("arms", "reference", "seeds"):
            if key not in values:
                raise ValueError(f"{key} is missing")
        file = from_dict(_File, values)
        arms = {str(k): {} if v is None else v for k, v in file.arms.items()}
        if not arms:
            raise ValueError("arms: none given, and at least one is needed")
        if file.reference not in arms:
            hint = nearest(file.reference, arms)
            raise ValueError(f"reference {file.reference!r} is no arm{hint}")
        for key, given in (("seeds", file.seeds), ("lr", file.lr)):
            if len(set(given)) < len(given) or (key in values and not given):
                found = f"{key} {list(given)}"
                raise ValueError(f"{found}: one at least, and each only once")
        tuning = _finetuning(file, arms)
        layers = [*_base(path, file), file.settings, common]
        settings.resolve(*layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    ruled = ["seed", *["lr"] * bool(file.lr), *["max_steps"] * (minutes is not None)]
    rates, title = file.lr or (None,), file.title or path.stem
    grid = Grid(path, title, {}, arms, file.reference, file.seeds, rates, minutes, *tuning)
    for name, changes in arms.items():
        try:
            if not re.fullmatch(r"[\w.+-]+", name) or name in reserved:
                allowed = "a name of letters, digits, . + - and _"
                raise ValueError(f"{allowed}, but not {', '.join(reserved)}")
            if not isinstance(changes, dict):
                allowed = "the settings in which it differs, {} for none"
                raise ValueError(f"{allowed}, not {changes!r}")
            grid.arms[name] = config = settings.resolve(*layers, changes)
            written = changes | changes.get(config.objective, {})
            if clash := [key for key in ruled if key in written]:
                raise ValueError(f"{clash[0]} is set by the grid, for all arms alike")
            if config.objective == "dvae":
                raise ValueError("objective dvae trains no encoder")
            for seed, rate in product(grid.seeds, grid.rates):
                check(grid.config(name, seed, rate))
        except ValueError as error:
            raise ValueError(f"{path}: arms.{name}: {error}") from error
    return grid


def _finetuning(file: _File, arms: Iterable[str]) -> tuple[FinetuneConfig, tuple[str, ...]]:
    """How arms are fine-tuned, by settings of jepa3d classify over those of the preset, and which."""
    chosen = file.finetune.get("arms", [*arms] if file.finetune else [])
    if not isinstance(chosen, list) or not set(chosen) <= {*arms}:
        raise ValueError(f"finetune.arms {chosen!r}: a list of some of {', '.join(arms)}")
    changes = {key: value for key, value in file.finetune.items() if key != "arms"}
    changes["data"] = "-"  # the first scored set, which is not known yet
    base = settings.preset(file.preset, FinetuneConfig) if file.preset else {}
    config = from_dict(FinetuneConfig, merge(base, changes))
    validate(config)
    return config, tuple(chosen)


def _base(grid: Path, file: _File) -> list[dict]:
    """The layers of the grid's preset, or of its recipe, beside the grid or at a path."""
    if (file.preset is None) == (file.recipe is None):
        raise ValueError("preset or recipe: one of the two is needed")
    if file.preset:
        return [settings.preset(file.preset)]
    name = str(file.recipe)
    recipe = read_recipe(beside if (beside := grid.parent / name).is_file() else name)
    preset = recipe.pop("preset", None)
    return [settings.preset(preset) if preset else {}, recipe]


def at_equal_time(grid: Grid, out: Path) -> Grid:
    """The grid with as many steps for each arm as its CPU-minutes allow, by costs measured once:
    out/costs.json.

    Raises ValueError for an arm that changed since, or whose stage I takes all the time.
    """
    assert grid.cpu_minutes is not None
    file = out / "costs.json"
    known: dict[str, Any] = read_checked(file, "arms")["arms"] if file.exists() else {}
    plain = {name: settings.to_dict(config) for name, config in grid.arms.items()}
    for name in plain.keys() & known.keys():
        if changed := settings.differences(plain[name], known[name]["settings"]):
            setting, (now, then) = next(iter(changed.items()))
            reason = f"{setting} was {then} when its cost was measured ({file})"
            hint = f"not {now}; give the changed arm another name"
            raise ValueError(f"{grid.path}: arms.{name}: {reason}, {hint}")
    if new := [name for name in grid.arms if name not in known]:
        # The machine may be busier now: what was measured before is measured again beside it.
        again = [name for name in grid.arms if name in known][:1]
        asked = {name: grid.arms[name] for name in [*new, *again]}.items()
        rounds = [{name: cpu_costs(arm) for name, arm in asked} for _ in range(ROUNDS)]
        pairs = {name: [costs[name] for costs in rounds] for name in rounds[0]}
        found = {name: np.median(costs, 0) for name, costs in pairs.items()}
        scale = known[again[0]]["step"] / found[again[0]][1] if again else 1.0
        for name in new:
            before, step = (scale * seconds for seconds in found[name])
            known[name] = {"before": before, "step": step, "settings": plain[name]}
        write_checked(file, {"unit": "CPU-seconds", "arms": known})
    arms = {}
    for name, config in grid.arms.items():
        before, step = known[name]["before"], known[name]["step"]
        steps = int((60 * grid.cpu_minutes - before) / step)
        if steps < 1:
            reason = f"stage I alone takes {before / 60:.1f} of {grid.cpu_minutes:g}"
            raise ValueError(f"{grid.path}: arms.{name}: {reason} CPU-minutes")
        arms[name] = replace(config, max_steps=steps)
    return grid._replace(arms=arms)
