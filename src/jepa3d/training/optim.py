"""The optimiser AdamW with its parameter groups, and the schedule of the learning rate."""

import math
import re

import torch
from torch import nn

from jepa3d.config import Schedule


def adamw(model: nn.Module, schedule: Schedule, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """Create the optimiser for the parameters of `model` that need gradients. Weight decay applies
    only to parameters with two or more dimensions, so not to biases, nor to the parameters of
    normalisation layers.

    layer_decay: the learning rate of each encoder block, divided by that of the next block, as in
    BEiT. Each parameter group has an entry "lr_scale": the factor, computed by `_lr_scales`, by
    which the learning rate of the group is multiplied.
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
    """Return for each parameter the factor of its learning rate, layer_decay^(depth + 1 - layer).

    layer: 0 for tokenizer and position embedding, i + 1 for block i of the encoder (the first is
    block 0), depth + 1 for all other parameters. depth: the number of blocks of the encoder.
    """
    found = {name: _LAYER.match(name) for name, _ in model.named_parameters()}
    layers = {name: int(match[1] or -1) + 1 for name, match in found.items() if match}
    last = max(layers.values(), default=0) + 1
    return {name: layer_decay ** (last - layers.get(name, last)) for name in found}


def total_steps(schedule: Schedule, num_samples: int) -> int:
    """Return the number of optimiser steps of the whole schedule."""
    steps = math.ceil(schedule.epochs * num_samples / schedule.batch_size)
    return schedule.max_steps or max(1, steps)


def learning_rate(schedule: Schedule, step: int, total: int, num_samples: int) -> float:
    """Return the learning rate of a step. It rises linearly from `min_lr` during the warm-up, which
    takes `warmup_epochs` or a tenth of the run, whichever is shorter. Then it follows a cosine down
    to `min_lr`.

    As in timm's scheduler, which Point-MAE and ACT use, the cosine starts at the first step, not at
    the end of the warm-up. So at the end of the warm-up, the learning rate drops a little.
    """
    warmup = min(schedule.warmup_epochs * num_samples / schedule.batch_size, total / 10)
    share = step / warmup if step < warmup else (1 + math.cos(math.pi * step / total)) / 2
    return schedule.min_lr + (schedule.lr - schedule.min_lr) * share
