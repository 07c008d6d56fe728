"""Checks of settings that are possible before any data is read; the ranges of numbers are in
config.py.
"""

from jepa3d.config import (
    SAMPLERS,
    STAGE_ONE,
    TEACHERS,
    FewshotConfig,
    FinetuneConfig,
    PretrainConfig,
    RunConfig,
    SegmentConfig,
)
from jepa3d.plain import check_choice, check_ranges


def validate(config: PretrainConfig) -> None:
    """Raise ValueError, which names the setting, for settings that cannot work with any data."""
    _validate_run(config)
    encoder, dvae, target = config.encoder, config.dvae, config.target
    check_choice("objective", config.objective, ("jepa", *STAGE_ONE))
    check_choice("sampler.name", config.sampler.name, SAMPLERS)
    if not config.teacher or (len(config.teacher) > 1 and "none" in config.teacher):
        raise ValueError(f"teacher {config.teacher}: none stands alone, and one at least is needed")
    if len(set(config.teacher)) < len(config.teacher):
        raise ValueError(f"teacher {config.teacher}: each only once")
    if config.objective == "jepa" and config.teacher == ("none",) and not target.sigreg > 0:
        raise ValueError(
            "teacher none needs target.sigreg above 0 (LeJEPA: 0.02), or all tokens collapse to one point"
        )
    if target.view and (config.teacher == ("none",) or target.cache):
        raise ValueError(
            "target.view needs a teacher that runs in every step: not teacher none, not target.cache"
        )
    if config.init in ("dvae", *TEACHERS):
        raise ValueError(
            f"init {config.init!r} must be generative, invariance, default, a run, a folder or a Hub id"
        )
    if target.cache and (moving := [name for name in config.teacher if name in ("ema", "none")]):
        raise ValueError(
            f"target.cache needs frozen teachers, not {moving[0]} (teacher {', '.join(config.teacher)})"
        )
    if target.layers > encoder.depth:
        raise ValueError(f"target.layers {target.layers} exceeds encoder.depth {encoder.depth}")
    if config.decoder.depth == 0 and (config.decoder.isolated or config.decoder.ranks):
        raise ValueError(
            "decoder.isolated and decoder.ranks need a decoder: decoder.depth 1 or more"
        )
    if config.sampler.num_targets > encoder.num_groups:
        raise ValueError(
            f"sampler.num_targets {config.sampler.num_targets} exceeds encoder.num_groups {encoder.num_groups}"
        )
    used = (config.objective, *config.stages)
    masks = {
        "generative": "generative" in used,
        "sampler": config.sampler.name in ("random", "one_block"),
    }
    for name in (name for name, masked in masks.items() if masked):
        ratio = getattr(config, name).mask_ratio
        if max(1, int(ratio * encoder.num_groups)) >= encoder.num_groups:
            raise ValueError(
                f"{name}.mask_ratio {ratio} leaves no visible token of encoder.num_groups {encoder.num_groups}"
            )
    if "dvae" in used:
        if dvae.num_points < max(encoder.num_groups, encoder.group_size):
            raise ValueError(
                f"dvae.num_points {dvae.num_points} is less than encoder.num_groups or group_size"
            )
        if dvae.width % 4:
            raise ValueError(f"dvae.width {dvae.width} must be a multiple of 4")


def validate_finetune(config: FinetuneConfig) -> None:
    """Raise ValueError, which names the setting, for settings that cannot work with any data."""
    _validate_run(config)
    if not config.data:
        raise ValueError("--data is missing: labelled shapes with a train and a test part")
    if config.batch_size < 2 * config.accumulate:
        passes = f" per pass (accumulate {config.accumulate})" if config.accumulate > 1 else ""
        raise ValueError(
            f"batch_size {config.batch_size} must be at least 2{passes}: BatchNorm needs two shapes"
        )
    if config.trained == "head_first" and isinstance(config, SegmentConfig):
        raise ValueError(
            "trained head_first is for classes of whole shapes; segment takes all or head"
        )
    if config.trained == "head_first" and config.init is None:
        raise ValueError("trained head_first needs --init, an encoder; from scratch use all")
    if isinstance(config, FewshotConfig):
        if config.mixed_precision == "measure" or config.compile == "auto":
            raise ValueError(
                "mixed_precision measure and compile auto: folds are too short for a trial; choose a value"
            )
        if config.labels != 1:
            raise ValueError(f"labels {config.labels}: all shots of an episode are labelled")
        if config.votes > 1 and config.method != "finetune":
            raise ValueError(
                f"votes {config.votes}: voting needs method finetune, not {config.method}"
            )
    layers = config.layers or () if isinstance(config, SegmentConfig) else ()
    if wrong := [layer for layer in layers if layer > config.encoder.depth]:
        raise ValueError(
            f"layers {layers}: {wrong[0]} is not 0 (tokenizer) to {config.encoder.depth}"
        )


def _validate_run(config: RunConfig) -> None:
    check_ranges(config)
    encoder = config.encoder
    if encoder.embed_dim % encoder.num_heads:
        raise ValueError(
            f"encoder.embed_dim {encoder.embed_dim} is not a multiple of num_heads {encoder.num_heads}"
        )
    if encoder.embed_dim * encoder.mlp_ratio < 1:
        raise ValueError(
            f"encoder.mlp_ratio {encoder.mlp_ratio} of embed_dim {encoder.embed_dim} is less than 1"
        )
    for name in ("num_groups", "group_size"):
        if getattr(encoder, name) > encoder.num_points:
            raise ValueError(
                f"encoder.{name} {getattr(encoder, name)} must not exceed encoder.num_points {encoder.num_points}"
            )
