"""What cannot work whatever the data."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jepa3d.config import (
    STAGE_ONE,
    TEACHERS,
    FewshotConfig,
    FinetuneConfig,
    PretrainConfig,
    RunConfig,
    Schedule,
    SegmentConfig,
)  # fmt: skip

# Whole numbers that may be 0; all others begin at 1.
_MAY_BE_ZERO = {"seed", "decoder.depth", "invariance.partial_views"}


def validate(config: PretrainConfig) -> None:
    """Refuse, with a ValueError that names the setting, what cannot work whatever the data."""
    encoder, sampler, dvae, target = config.encoder, config.sampler, config.dvae, config.target
    _validate_run(config)
    for name in STAGE_ONE:
        _validate_schedule(getattr(config, name), f"{name}.")
    if not config.teacher or (len(config.teacher) > 1 and "none" in config.teacher):
        raise ValueError(f"teacher {config.teacher}: none stands alone, and one at least is needed")
    if len(set(config.teacher)) < len(config.teacher):
        raise ValueError(f"teacher {config.teacher}: each only once")
    if config.objective == "jepa" and config.teacher == ("none",) and not target.sigreg > 0:
        raise ValueError(
            "teacher none needs target.sigreg above 0 (LeJEPA: 0.02), or everything collapses to one point"
        )
    if target.view and (config.teacher == ("none",) or target.cache):
        raise ValueError("target.view needs a teacher that is asked in every step: not teacher none, not target.cache")
    if config.init in ("dvae", *TEACHERS):
        raise ValueError(f"init {config.init!r}: generative, invariance, a folder or a Hub id")
    if target.cache and (moving := [name for name in config.teacher if name in ("ema", "none")]):
        raise ValueError(f"target.cache needs frozen teachers, not {moving[0]} (teacher {', '.join(config.teacher)})")
    if target.layers > encoder.depth:
        raise ValueError(f"target.layers {target.layers} exceeds encoder.depth {encoder.depth}")
    for name, weight in (("target.sigreg", target.sigreg), ("invariance.sigreg", config.invariance.sigreg)):
        if not 0 <= weight < 1:
            raise ValueError(f"{name} {weight} must lie in [0, 1)")
    ratios = {
        "sampler.target_ratio": sampler.target_ratio,
        "sampler.context_ratio": sampler.context_ratio or (1.0, 1.0),
        "invariance.partial_ratio": config.invariance.partial_ratio,
    }
    for name, (low, high) in ratios.items():
        if not 0 < low <= high <= 1:
            raise ValueError(f"{name} {(low, high)} must satisfy 0 < low <= high <= 1")
    if sampler.num_targets > encoder.num_groups:
        raise ValueError(f"sampler.num_targets {sampler.num_targets} exceeds encoder.num_groups {encoder.num_groups}")
    for name, ratio in (("sampler", sampler.mask_ratio), ("generative", config.generative.mask_ratio)):
        if not 0 < ratio < 1:
            raise ValueError(f"{name}.mask_ratio {ratio} must lie between 0 and 1")
    if "dvae" in (config.objective, *config.stages):
        if dvae.num_points < max(encoder.num_groups, encoder.group_size):
            raise ValueError(f"dvae.num_points {dvae.num_points} is less than encoder.num_groups or group_size")
        if dvae.width % 4:
            raise ValueError(f"dvae.width {dvae.width} must be a multiple of 4")


def validate_finetune(config: FinetuneConfig) -> None:
    """Refuse, with a ValueError that names the setting, what cannot work whatever the data."""
    _validate_run(config)
    if not config.data:
        raise ValueError("--data is missing: labelled shapes with a train and a test part")
    if config.batch_size < 2 * config.accumulate:
        passes = f" a pass (accumulate {config.accumulate})" if config.accumulate > 1 else ""
        raise ValueError(f"batch_size {config.batch_size} must be at least 2{passes}: a BatchNorm needs two shapes")
    for name in ("labels", "layer_decay"):
        if not 0 < getattr(config, name) <= 1:
            raise ValueError(f"{name} {getattr(config, name)} must lie in (0, 1]")
    for name in ("validation", "dropout", "label_smoothing"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)} must lie in [0, 1)")
    if isinstance(config, FewshotConfig):
        if "auto" in (config.mixed_precision, config.compile):
            raise ValueError("mixed_precision and compile auto: folds are too short for a trial; say which")
        if config.ways < 2:
            raise ValueError(f"ways {config.ways} must be at least 2")
        if config.labels != 1:
            raise ValueError(f"labels {config.labels}: all shots of an episode are labelled")
        if config.votes > 1 and config.method != "finetune":
            raise ValueError(f"votes {config.votes}: frozen features have none")
    layers = config.layers or () if isinstance(config, SegmentConfig) else ()
    if wrong := [layer for layer in layers if not 0 <= layer <= config.encoder.depth]:
        raise ValueError(f"layers {layers}: {wrong[0]} is not 0 (tokenizer) to {config.encoder.depth}")


def _validate_run(config: RunConfig) -> None:
    for name, value in _whole_numbers(config):
        if value < (least := 0 if name in _MAY_BE_ZERO else 1):
            raise ValueError(f"{name} {value} must be at least {least}")
    _validate_schedule(config, "")
    if not 0 <= config.encoder.drop_path < 1:
        raise ValueError(f"encoder.drop_path {config.encoder.drop_path} must lie in [0, 1)")
    if not 0 < config.scale[0] <= config.scale[1]:
        raise ValueError(f"scale {config.scale} must satisfy 0 < low <= high")
    if not config.translate >= 0:
        raise ValueError(f"translate {config.translate} must be at least 0")


def _validate_schedule(schedule: Schedule, where: str) -> None:
    for name in ("lr", "epochs", "clip_grad"):
        if not 0 < getattr(schedule, name) < float("inf"):
            raise ValueError(f"{where}{name} {getattr(schedule, name)} must be positive")
    for name in ("weight_decay", "warmup_epochs", "min_lr"):
        if not getattr(schedule, name) >= 0:
            raise ValueError(f"{where}{name} {getattr(schedule, name)} must be at least 0")


def _whole_numbers(config: Any, where: str = "") -> Iterator[tuple[str, int]]:
    """Dotted name and value of every integer setting that is not None."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{where}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _whole_numbers(value, f"{name}.")
        elif field.type in (int, int | None) and value is not None:
            yield name, value
