"""What cannot work whatever the data."""

from typing import Any

from jepa3d.config import PretrainConfig


def validate(config: PretrainConfig) -> None:
    """Refuse, with a ValueError that names the setting, what cannot work whatever the data."""
    encoder, sampler, dvae, target = config.encoder, config.sampler, config.dvae, config.target
    rivals = {"generative": config.generative, "invariance": config.invariance}
    at_least: list[tuple[str, Any, float]] = [("decoder.depth", config.decoder.depth, 0)]
    at_least += [("log_every", config.log_every, 1), ("checkpoint_every", config.checkpoint_every, 1)]
    at_least += [
        (f"encoder.{k}", v, 1)
        for k, v in vars(encoder).items()
        if k not in ("drop_path", "mlp_ratio", "position_every_block")
    ]
    at_least += [(f"sampler.{k}", getattr(sampler, k), 1) for k in ("num_targets", "min_context", "draws")]
    sizes = ("width", "num_codes", "num_points", "tokenizer_dim", "dgcnn_dim", "folding_dim")
    at_least += [(f"dvae.{k}", getattr(dvae, k), 1) for k in sizes]
    at_least += [("snapshot_every", config.snapshot_every, 1)]
    at_least += [("target.layers", target.layers, 1), ("target.num_slices", target.num_slices, 1)]
    at_least += [("generative.decoder_depth", config.generative.decoder_depth, 1)]
    views = ("global_views", "projector_dim", "embedding_dim", "num_slices")
    at_least += [(f"invariance.{k}", getattr(config.invariance, k), 1) for k in views]
    at_least += [("invariance.partial_views", config.invariance.partial_views, 0)]
    for where, schedule in (("", config), ("dvae.", dvae), *((f"{k}.", v) for k, v in rivals.items())):
        at_least += [(f"{where}{k}", getattr(schedule, k), 1) for k in ("batch_size", "max_steps")]
        at_least += [(f"{where}{k}", getattr(schedule, k), 0) for k in ("weight_decay", "warmup_epochs", "min_lr")]
        for name in ("lr", "epochs", "clip_grad"):
            if not 0 < getattr(schedule, name) < float("inf"):
                raise ValueError(f"{where}{name} {getattr(schedule, name)} must be positive")
    for name, value, least in at_least:
        if value is not None and not value >= least:
            raise ValueError(f"{name} {value} must be at least {least}")
    if not config.teacher or (len(config.teacher) > 1 and "none" in config.teacher):
        raise ValueError(f"teacher {config.teacher}: none stands alone, and one at least is needed")
    if len(set(config.teacher)) < len(config.teacher):
        raise ValueError(f"teacher {config.teacher}: each only once")
    if config.objective == "jepa" and config.teacher == ("none",) and not target.sigreg > 0:
        raise ValueError(
            "teacher none needs target.sigreg above 0 (LeJEPA: 0.02), or everything collapses to one point"
        )
    if config.init in ("dvae", "ema", "none"):
        raise ValueError(f"init {config.init!r}: generative, invariance, a folder or a Hub id")
    if target.layers > encoder.depth:
        raise ValueError(f"target.layers {target.layers} exceeds encoder.depth {encoder.depth}")
    for name, weight in (("target.sigreg", target.sigreg), ("invariance.sigreg", config.invariance.sigreg)):
        if not 0 <= weight < 1:
            raise ValueError(f"{name} {weight} must lie in [0, 1)")
    if not 0 <= encoder.drop_path < 1:
        raise ValueError(f"encoder.drop_path {encoder.drop_path} must lie in [0, 1)")
    if not 0 < config.scale[0] <= config.scale[1]:
        raise ValueError(f"scale {config.scale} must satisfy 0 < low <= high")
    ratios = {
        "sampler.target_ratio": sampler.target_ratio,
        "sampler.context_ratio": sampler.context_ratio or (1.0, 1.0),
    }
    ratios["invariance.partial_ratio"] = config.invariance.partial_ratio
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
