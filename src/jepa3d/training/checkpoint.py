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
    """`path`, the folder that was there before where a kill came while `replace_folder` put a new
    one in its place.
    """
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    return path


def _trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything a step changes: all but frozen teachers."""
    teacher = getattr(model, "teacher", None)
    frozen = ()
    if isinstance(teacher, Teacher):
        frozen = tuple(
            f"teacher.networks.{i}." for i in range(len(teacher.networks)) if i != teacher.average
        )
    return {
        name: value for name, value in model.state_dict().items() if not name.startswith(frozen)
    }


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
        weights = {name: value.cpu().contiguous() for name, value in _trained_state(model).items()}
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
            state, weights, moments = (read(checkpoint / name) for name, read in _READ.items())
        except ValueError as error:
            damaged.append(str(error))
            continue
        _load(checkpoint, model, optimizer, weights, moments)
        return state, [f"{line}; going on from {checkpoint.name}" for line in damaged]
    raise ValueError(
        f"{'; '.join(damaged)}; no whole checkpoint is left: begin again with another --out"
    )


_READ: dict[str, Callable[[Path], dict[str, Any]]] = {
    "state.json": read_checked,
    "model.safetensors": load_file,
    "optimizer.safetensors": load_file,
}


def _load(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
) -> None:
    expected = _trained_state(model)
    shapes, wanted = ({name: value.shape for name, value in d.items()} for d in (weights, expected))
    wrong = [name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)]
    if wrong:
        raise ValueError(
            f"{checkpoint}: does not fit this model (first of {len(wrong)}: {min(wrong)})"
        )
    model.load_state_dict(weights, strict=False)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
