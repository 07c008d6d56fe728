"""AdamW with proper parameter groups, and the learning-rate and momentum schedules."""

import math

import torch
from torch import nn

from jepa3d.config import Schedule


def adamw(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """Weight decay on matrices only: none on biases, norms and the mask token. Fused: one kernel a step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.lr, fused=True)


def total_steps(schedule: Schedule, num_samples: int) -> int:
    """Optimiser steps of the whole schedule."""
    return schedule.max_steps or max(1, math.ceil(schedule.epochs * num_samples / schedule.batch_size))


def learning_rate(schedule: Schedule, step: int, total: int, num_samples: int) -> float:
    """Linear warm-up from `min_lr` over `warmup_epochs` (at most a tenth of the run), then a cosine to `min_lr`."""
    warmup = min(schedule.warmup_epochs * num_samples / schedule.batch_size, total / 10)
    if step < warmup:
        return schedule.min_lr + (schedule.lr - schedule.min_lr) * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total - warmup, 1)
    return schedule.min_lr + (schedule.lr - schedule.min_lr) * (1 + math.cos(math.pi * done)) / 2
