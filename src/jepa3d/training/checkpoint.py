"""Checkpoints that a kill at any moment cannot spoil: safetensors and JSON in a new folder, renamed
when whole.

Two are kept, every file with its checksum: where the newer one is damaged, a run goes on from the
older one.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jepa3d.models.hub import load_file, save_file
from jepa3d.models.teacher import Teacher
from jepa3d.plain import read_checked, write_checked

KEPT = 2


def replace_folder(path: Path, write: Callable[[Path], object], new: bool = False) -> None:
    """Call write(partial folder), make it durable, then rename it to `path`; if `new`,
    FileExistsError where one is.

    A failure, such as a full disk, leaves nothing behind; a kill leaves `path` whole, or for
    `put_back`.
    """
    partial, old = (path.with_name(f".{path.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if new and path.exists():
            raise FileExistsError(f"{path}: exists already")
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def put_back(path: Path) -> Path:
    """Return `path`, after restoring the folder that a kill during `replace_folder` left beside it
    under another name.
    """
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    return path


def _trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything a step changes: all but frozen teachers."""
    teacher, frozen = getattr(model, "teacher", None), ()
    if isinstance(teacher, Teacher):
        others = (i for i in range(len(teacher.networks)) if i != teacher.average)
        frozen = tuple(f"teacher.networks.{i}." for i in others)
    state = model.state_dict().items()
    return {name: value for name, value in state if not name.startswith(frozen)}


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write `folder`/step-NNNNNNN and drop all but it and the one before it; state must hold
    "step".
    """
    moments = {
        f"{index}.{name}": value.cpu()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }

    def write(partial: Path) -> None:
        kept = _trained_state(model).items()
        weights = {name: value.cpu().contiguous() for name, value in kept}
        save_file(weights, partial / "model.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        write_checked(partial / "state.json", state)

    newest = folder / f"step-{state['step']:07d}"
    replace_folder(newest, write)
    before = [old for old in _all(folder) if old < newest]  # what is newer was damaged
    for old in set(_all(folder)) - {newest, *before[1 - KEPT :]}:
        shutil.rmtree(old)


def _all(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], list[str]]:
    """Load model and optimizer in place from the newest undamaged checkpoint.

    Returns the saved state and a line for every damaged one, which names its file. ValueError where
    all are damaged or the weights do not fit.
    """
    damaged = []
    for checkpoint in reversed(_all(folder)):
        try:
            found = [read(checkpoint / name) for name, read in _READ.items()]
            state, weights, moments = found
        except ValueError as error:
            damaged.append(str(error))
            continue
        _check_fit(checkpoint, weights, _trained_state(model))
        model.load_state_dict(weights, strict=False)
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in moments.items():
            index, _, name = key.partition(".")
            entries.setdefault(int(index), {})[name] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
        return state, [f"{line}; going on from {checkpoint.name}" for line in damaged]
    hint = "no whole checkpoint is left: begin again with another --out"
    raise ValueError(f"{'; '.join(damaged)}; {hint}")


_READ: dict[str, Callable[[Path], dict[str, Any]]] = {
    "state.json": read_checked,
    "model.safetensors": load_file,
    "optimizer.safetensors": load_file,
}


def _check_fit(checkpoint: Path, weights: dict[str, Any], expected: dict[str, Any]) -> None:
    """ValueError unless the weights have the names and shapes of those expected."""
    shapes, wanted = ({(k, v.shape) for k, v in found.items()} for found in (weights, expected))
    if wrong := {name for name, _ in shapes ^ wanted}:
        found = f"first of {len(wrong)}: {min(wrong)}"
        raise ValueError(f"{checkpoint}: does not fit this model ({found})")
