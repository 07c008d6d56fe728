"""AdamW with proper parameter groups, and the learning-rate and momentum schedules."""

import math
import re

import torch
from torch import nn

from jepa3d.config import Schedule


def adamw(model: nn.Module, schedule: Schedule, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """Weight decay on matrices only: none on biases, norms and single tokens. Fused: one kernel a
    step.

    `layer_decay` lowers the rates of an encoder's blocks from the last to the first (BEiT), as each
    group's "lr_scale".
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    scales = _lr_scales(model, layer_decay)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = schedule.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((-scales[name], -decay), []).append(parameter)
    rows = [
        {"params": groups[key], "weight_decay": -key[1], "lr_scale": -key[0]}
        for key in sorted(groups)
    ]
    return torch.optim.AdamW(rows, lr=schedule.lr, fused=True)


_LAYER = re.compile(r".*?\bencoder\.(?:blocks\.(\d+)|tokenizer|position)\.")


def _lr_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """layer_decay^(depth + 1 - layer): layer 0 before an encoder's blocks, i + 1 block i, depth + 1
    after them.
    """
    found = {name: _LAYER.match(name) for name, _ in model.named_parameters()}
    layers = {name: int(match[1] or -1) + 1 for name, match in found.items() if match}
    last = max(layers.values(), default=0) + 1
    return {name: layer_decay ** (last - layers.get(name, last)) for name in found}


def total_steps(schedule: Schedule, num_samples: int) -> int:
    """Optimiser steps of the whole schedule."""
    steps = math.ceil(schedule.epochs * num_samples / schedule.batch_size)
    return schedule.max_steps or max(1, steps)


def learning_rate(schedule: Schedule, step: int, total: int, num_samples: int) -> float:
    """Linear warm-up from `min_lr` over `warmup_epochs` (at most a tenth of the run), then a cosine
    to `min_lr`.

    The cosine counts from the first step, not from the end of the warm-up, as timm's of Point-MAE
    and ACT does.
    """
    warmup = min(schedule.warmup_epochs * num_samples / schedule.batch_size, total / 10)
    share = step / warmup if step < warmup else (1 + math.cos(math.pi * step / total)) / 2
    return schedule.min_lr + (schedule.lr - schedule.min_lr) * share
