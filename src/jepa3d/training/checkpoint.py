"""Checkpoints that a kill at any moment cannot spoil: safetensors and JSON in a new folder, renamed when whole."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from jepa3d.models.teacher import Teacher


def replace_folder(path: Path, write: Callable[[Path], object], new: bool = False) -> None:
    """Call write(partial folder), make it durable, then rename it to `path`; if `new`, FileExistsError where one is."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if new and path.exists():
        shutil.rmtree(partial)
        raise FileExistsError(f"{path}: exists already")
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def _trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything a step changes: all but frozen teachers."""
    teacher = getattr(model, "teacher", None)
    frozen = ()
    if isinstance(teacher, Teacher):
        frozen = tuple(f"teacher.networks.{i}." for i in range(len(teacher.networks)) if i != teacher.average)
    return {name: value for name, value in model.state_dict().items() if not name.startswith(frozen)}


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write `folder`/step-NNNNNNN and drop the older ones; state must hold "step"."""
    moments = {
        f"{index}.{name}": value.cpu()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }

    def write(partial: Path) -> None:
        weights = {name: value.cpu().contiguous() for name, value in _trained_state(model).items()}
        save_file(weights, partial / "model.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(state))

    newest = folder / f"step-{state['step']:07d}"
    replace_folder(newest, write)
    for old in folder.glob("step-*"):
        if old != newest:
            shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    return max(folder.glob("step-*"), default=None)


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load model and optimizer in place; returns the saved state. ValueError when the weights do not fit."""
    weights = load_file(checkpoint / "model.safetensors")
    expected = _trained_state(model)
    shapes, wanted = ({name: value.shape for name, value in d.items()} for d in (weights, expected))
    wrong = [name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)]
    if wrong:
        raise ValueError(f"{checkpoint}: does not fit this model (first of {len(wrong)}: {min(wrong)})")
    model.load_state_dict(weights, strict=False)
    moments = load_file(checkpoint / "optimizer.safetensors")
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((checkpoint / "state.json").read_text())
