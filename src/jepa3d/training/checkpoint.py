"""Checkpoints that survive a kill at any moment: their files (safetensors and JSON) are written to
a temporary folder, which is renamed when it is complete.

Every file has a checksum, and the newest two checkpoints are kept. If the newest one is damaged,
the run resumes from the older one.
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

KEPT = 2  # number of checkpoints that a run keeps


def replace_folder(path: Path, write: Callable[[Path], object], new: bool = False) -> None:
    """Write a new folder `path`: call write(temporary folder), flush that folder to disk, and
    rename it to `path`.

    An old folder `path` is renamed to .NAME.old just before, and deleted just after. new: raise
    FileExistsError if `path` exists, instead of replacing it. An error, such as a full disk, leaves
    no temporary folder behind. After a kill, `path` holds either the complete old folder or the
    complete new one, unless the kill came between the two renames. In this case `path` is missing,
    and `put_back` restores the old folder.
    """
    partial = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
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
    """Return `path`. If a kill during `replace_folder` left the old folder under a temporary name,
    first rename it back to `path`.
    """
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    return path


def _trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights and buffers except those of frozen teachers, which no step changes."""
    teacher, frozen = getattr(model, "teacher", None), ()
    if isinstance(teacher, Teacher):
        others = (i for i in range(len(teacher.networks)) if i != teacher.average)
        frozen = tuple(f"teacher.networks.{i}." for i in others)
    state = model.state_dict().items()
    return {name: value for name, value in state if not name.startswith(frozen)}


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write the checkpoint `folder`/step-NNNNNNN, numbered by state["step"]. Then keep only this
    checkpoint and the one before it, and delete all others.
    """
    moments = {
        f"{index}.{name}": value.cpu()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }

    def write(partial: Path) -> None:
        # safetensors refuses tensors that share memory, such as the weights of a layer that a
        # user's own objective uses under two names, so each is copied
        kept, layout = _trained_state(model).items(), torch.contiguous_format
        weights = {name: value.cpu().clone(memory_format=layout) for name, value in kept}
        save_file(weights, partial / "model.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        write_checked(partial / "state.json", state)

    newest = folder / f"step-{state['step']:07d}"
    replace_folder(newest, write)
    # If there is a checkpoint of a later step, it is damaged: the run skipped it and resumed from
    # an earlier one. So it is deleted too.
    earlier = [old for old in _all(folder) if old < newest]
    for old in set(_all(folder)) - {newest, *earlier[1 - KEPT :]}:
        shutil.rmtree(old)


def _all(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first."""
    return sorted(folder.glob("step-*"))


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], list[str]]:
    """Load the newest undamaged checkpoint into `model` and `optimizer`.

    Returns the `state` that was saved, and for each newer, damaged checkpoint a line that names the
    damaged file. Raises ValueError if all checkpoints are damaged, or if the weights do not fit the
    model.
    """
    damaged = []
    for checkpoint in reversed(_all(folder)):
        try:
            files = [read(checkpoint / name) for name, read in _READ.items()]
            state, weights, moments = files
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
        return state, [f"{line}; resuming from {checkpoint.name}" for line in damaged]
    hint = "no undamaged checkpoint is left: start again with another --out"
    raise ValueError(f"{'; '.join(damaged)}; {hint}")


_READ: dict[str, Callable[[Path], dict[str, Any]]] = {
    "state.json": read_checked,
    "model.safetensors": load_file,
    "optimizer.safetensors": load_file,
}


def _check_fit(checkpoint: Path, weights: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ValueError unless the weights have the expected names and shapes."""
    found = {(name, value.shape) for name, value in weights.items()}
    wanted = {(name, value.shape) for name, value in expected.items()}
    if wrong := {name for name, _ in found ^ wanted}:
        problem = f"{len(wrong)} weights differ in name or shape, for example"
        raise ValueError(f"{checkpoint} does not fit this model: {problem} {min(wrong)}")
