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
from jepa3d.config import PretrainConfig
from jepa3d.plain import (
    differences,
    from_dict,
    nearest,
    read_checked,
    read_recipe,
    to_dict,
    write_checked,
)
from jepa3d.training.pretrain import check, cpu_costs

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

    def config(self, arm: str, seed: int, rate: float | None) -> PretrainConfig:
        """Of one run.

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


def read_grid(path: Path, common: dict, reserved: Iterable[str] = ()) -> Grid:
    """The grid in a file. `common`: overrides that win over its settings, but not over an arm's
    own.

    reserved: names that no arm may have. Raises ValueError, which names the file and the key.
    """
    values = read_recipe(path)
    try:
        equal = values.pop("equal", "steps")
        minutes = equal.get("cpu_minutes") if isinstance(equal, dict) and len(equal) == 1 else None
        if equal != "steps" and not (isinstance(minutes, int | float) and minutes > 0):
            raise ValueError(f"equal {equal!r}: steps, or {{cpu_minutes: M}} with M above 0")
        if missing := [key for key in ("arms", "reference", "seeds") if key not in values]:
            raise ValueError(f"{missing[0]} is missing")
        file = from_dict(_File, values)
        overrides = {
            str(name): {} if changes is None else changes for name, changes in file.arms.items()
        }
        if not overrides:
            raise ValueError("arms: none given, and at least one is needed")
        if file.reference not in overrides:
            raise ValueError(
                f"reference {file.reference!r} is no arm{nearest(file.reference, overrides)}"
            )
        for key, given in (("seeds", file.seeds), ("lr", file.lr)):
            if len(set(given)) < len(given) or (key in values and not given):
                raise ValueError(f"{key} {list(given)}: one at least, and each only once")
        layers = [*_base(path, file), file.settings, common]
        settings.resolve(*layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    ruled = ["seed", *["lr"] * bool(file.lr), *["max_steps"] * (minutes is not None)]
    rates = file.lr or (None,)
    grid = Grid(
        path, file.title or path.stem, {}, overrides, file.reference, file.seeds, rates, minutes
    )
    for name, changes in overrides.items():
        try:
            if not re.fullmatch(r"[\w.+-]+", name) or name in reserved:
                raise ValueError(
                    f"a name of letters, digits, . + - and _, but not {', '.join(reserved)}"
                )
            if not isinstance(changes, dict):
                raise ValueError(
                    f"the settings in which it differs, {{}} for none, not {changes!r}"
                )
            grid.arms[name] = config = settings.resolve(*layers, changes)
            if clash := [
                key for key in ruled if key in changes | changes.get(config.objective, {})
            ]:
                raise ValueError(f"{clash[0]} is set by the grid, for all arms alike")
            if config.objective == "dvae":
                raise ValueError("objective dvae trains no encoder")
            for seed, rate in product(grid.seeds, grid.rates):
                check(grid.config(name, seed, rate))
        except ValueError as error:
            raise ValueError(f"{path}: arms.{name}: {error}") from error
    return grid


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
    for name in grid.arms.keys() & known.keys():
        if changed := differences(to_dict(grid.arms[name]), known[name]["settings"]):
            setting, (now, then) = next(iter(changed.items()))
            reason = f"{setting} was {then} when its cost was measured ({file}), not {now}"
            raise ValueError(
                f"{grid.path}: arms.{name}: {reason}; give the changed arm another name"
            )
    if new := [name for name in grid.arms if name not in known]:
        # The machine may be busier now: what was measured before is measured again beside it.
        again = [name for name in grid.arms if name in known][:1]
        found = _measured({name: grid.arms[name] for name in [*new, *again]})
        scale = known[again[0]]["step"] / found[again[0]][1] if again else 1.0
        for name in new:
            before, step = (scale * seconds for seconds in found[name])
            known[name] = {"before": before, "step": step, "settings": to_dict(grid.arms[name])}
        write_checked(file, {"unit": "CPU-seconds", "arms": known})
    arms = {}
    for name, config in grid.arms.items():
        before, step = known[name]["before"], known[name]["step"]
        steps = int((60 * grid.cpu_minutes - before) / step)
        if steps < 1:
            reason = f"stage I alone takes {before / 60:.1f} of {grid.cpu_minutes:g} CPU-minutes"
            raise ValueError(f"{grid.path}: arms.{name}: {reason}")
        arms[name] = replace(config, max_steps=steps)
    return grid._replace(arms=arms)


def _measured(arms: dict[str, PretrainConfig]) -> dict[str, np.ndarray]:
    """`cpu_costs` of every arm, the median of rounds in which the arms take turns."""
    rounds = [{name: cpu_costs(config) for name, config in arms.items()} for _ in range(ROUNDS)]
    return {name: np.median([found[name] for found in rounds], 0) for name in arms}
