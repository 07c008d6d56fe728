"""Every setting, once. The defaults are the paper's (docs/method.md); presets and recipes override them.

Order of precedence: command-line flags, then the recipe (YAML), then the preset, then these defaults.
"""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml


@dataclass(frozen=True)
class EncoderConfig:
    """Arguments of `PointEncoder`."""

    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    num_groups: int = 64
    group_size: int = 32
    num_points: int = 2048
    tokenizer_dim: int = 128
    mlp_ratio: float = 4.0
    drop_path: float = 0.1


@dataclass(frozen=True)
class SamplerConfig:
    """Which tokens are context and target; ratios are fractions of the M tokens."""

    name: Literal["multi_block", "random", "one_block", "sequence"] = "multi_block"
    num_targets: int = 4
    target_ratio: tuple[float, float] = (0.15, 0.2)
    context_ratio: tuple[float, float] | None = None  # (0.85, 1.0), the paper's; of sequence (0.4, 0.75)
    min_context: int = 4
    mask_ratio: float = 0.25  # of the random and one-block samplers


@dataclass(frozen=True)
class DecoderConfig:
    """Arguments of `ContextAwareDecoder`; depth 0 lets the encoder predict."""

    depth: int = 2
    cross_attention: bool = True
    stacked: bool = False


@dataclass(frozen=True)
class TargetConfig:
    """What is compared: one cosine a token or a block, of a teacher's tokens as they are or normalised."""

    unit: Literal["token", "block"] = "token"
    norm: Literal["none", "layernorm", "standardize"] = "standardize"  # the paper names none: deviation 9
    project: bool = False  # the paper's literal form: the same FC on the target too
    momentum: tuple[float, float] = (0.996, 1.0)  # of the EMA teacher, first and last step


@dataclass(frozen=True)
class Schedule:
    """AdamW with linear warm-up and cosine decay to `min_lr`, and how long to train."""

    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 10
    min_lr: float = 1e-6
    clip_grad: float = 10.0
    batch_size: int = 128
    epochs: float = 300
    max_steps: int | None = None  # ends the schedule here instead of after `epochs`


@dataclass(frozen=True)
class DVAEConfig(Schedule):
    """Stage I: the paper's teacher (ACT's settings), on points only."""

    lr: float = 5e-4
    weight_decay: float = 5e-4
    batch_size: int = 64
    num_points: int = 1024
    width: int = 384
    num_codes: int = 8192
    tokenizer_dim: int = 128
    dgcnn_dim: int = 128
    folding_dim: int = 512
    temperature: tuple[float, float] = (1.0, 0.0625)
    kl_weight: float = 0.1


@dataclass(frozen=True)
class PretrainConfig(Schedule):
    """One pretraining run."""

    data: tuple[str, ...] = ("synthetic",)
    split: Literal["train", "test", "all"] = "train"
    up_axis: tuple[Literal["x", "y", "z"], ...] = ("z",)
    objective: Literal["jepa", "dvae"] = "jepa"
    teacher: str = "dvae"  # dvae, ema, or a folder or Hub id
    seed: int = 0
    scale: tuple[float, float] = (0.8, 1.2)  # augmentation, per axis
    rotate: bool = True  # augmentation, about the up axis
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    log_every: int = 50
    checkpoint_every: int = 1000
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    dvae: DVAEConfig = field(default_factory=DVAEConfig)


SHAPENET55 = 52_470  # shapes in both of its lists

# A preset changes sizes, and rates only where runs of minutes need it.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "tiny": {
        "batch_size": 32,
        "epochs": 60,
        "warmup_epochs": 2,
        "encoder": {
            "embed_dim": 96,
            "depth": 4,
            "num_heads": 4,
            "num_groups": 32,
            "group_size": 16,
            "num_points": 512,
            "tokenizer_dim": 64,
            "drop_path": 0.0,
        },
        "dvae": {
            "lr": 2e-3,
            "kl_weight": 0.01,
            "batch_size": 32,
            "epochs": 15,
            "warmup_epochs": 1,
            "num_points": 512,
            "width": 96,
            "num_codes": 512,
            "tokenizer_dim": 64,
            "dgcnn_dim": 32,
            "folding_dim": 128,
        },
    },
    "base": {"encoder": {"embed_dim": 768, "num_heads": 12}},
}


def merge(base: dict, *overrides: dict) -> dict:
    """Nested dictionaries, later ones winning key by key."""
    out = dict(base)
    for override in overrides:
        for key, value in override.items():
            nested = isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = merge(out[key], value) if nested else value
    return out


def preset(name: str) -> dict:
    """The overrides of a preset. ValueError names the nearest one."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown{_nearest(name, PRESETS)}; one of {', '.join(PRESETS)}")
    return PRESETS[name]


def read_recipe(path: str | Path) -> dict:
    """A recipe's overrides and the name of its preset. ValueError for anything but a mapping."""
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a readable recipe: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe is a YAML mapping of settings")
    return recipe


def from_dict(cls: type, values: dict, where: str = "") -> Any:
    """A (nested, frozen) dataclass from plain values.

    ValueError for an unknown key, naming the nearest, or a wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    made = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in fields:
            raise ValueError(f"setting {name!r} is unknown{_nearest(key, fields)}")
        kind = fields[key].type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ValueError(f"setting {name!r} is a group of settings, not {value!r}")
            made[key] = from_dict(kind, value, f"{name}.")
        else:
            made[key] = _checked(name, value, kind)
    return cls(**made)


def resolve(*layers: dict) -> PretrainConfig:
    """The configuration that layers of overrides give, weakest first."""
    return from_dict(PretrainConfig, merge({}, *layers))


def to_dict(config: Any) -> dict:
    """Plain JSON values (tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(values: dict, reference: dict, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value, reference) of every setting that differs."""
    out = {}
    for key, value in values.items():
        other = reference.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            out |= differences(value, other, f"{where}{key}.")
        elif value != other:
            out[f"{where}{key}"] = (value, other)
    return out


def departures(config: PretrainConfig, num_shapes: int) -> dict[str, tuple[Any, Any]]:
    """Settings of a run on `num_shapes` shapes that depart from the paper's, as dotted name -> (here, paper).

    The paper pretrains on ShapeNet55, all shapes, for 150 or 300 epochs; how often a run logs, its
    seed and which way its data points are not the method's.
    """
    paper = to_dict(PretrainConfig()) | {"data": ["ShapeNet55"], "split": "all"}
    ours = to_dict(config)
    for key in ("seed", "log_every", "checkpoint_every", "up_axis"):
        del ours[key]
    if num_shapes == SHAPENET55:
        ours["data"] = paper["data"]
    if ours["epochs"] == 150:
        ours["epochs"] = 300
    if config.teacher != "dvae":
        del ours["dvae"]
    return differences(ours, paper)


def validate(config: PretrainConfig) -> None:
    """Refuse, with a ValueError that names the setting, what cannot work whatever the data."""
    encoder, sampler, dvae = config.encoder, config.sampler, config.dvae
    at_least: list[tuple[str, Any, float]] = [("decoder.depth", config.decoder.depth, 0)]
    at_least += [("log_every", config.log_every, 1), ("checkpoint_every", config.checkpoint_every, 1)]
    at_least += [(f"encoder.{k}", v, 1) for k, v in vars(encoder).items() if k not in ("drop_path", "mlp_ratio")]
    at_least += [(f"sampler.{k}", getattr(sampler, k), 1) for k in ("num_targets", "min_context")]
    sizes = ("width", "num_codes", "num_points", "tokenizer_dim", "dgcnn_dim", "folding_dim")
    at_least += [(f"dvae.{k}", getattr(dvae, k), 1) for k in sizes]
    for where, schedule in (("", config), ("dvae.", dvae)):
        at_least += [(f"{where}{k}", getattr(schedule, k), 1) for k in ("batch_size", "max_steps")]
        at_least += [(f"{where}{k}", getattr(schedule, k), 0) for k in ("weight_decay", "warmup_epochs", "min_lr")]
        for name in ("lr", "epochs", "clip_grad"):
            if not 0 < getattr(schedule, name) < float("inf"):
                raise ValueError(f"{where}{name} {getattr(schedule, name)} must be positive")
    for name, value, least in at_least:
        if value is not None and not value >= least:
            raise ValueError(f"{name} {value} must be at least {least}")
    if not 0 <= encoder.drop_path < 1:
        raise ValueError(f"encoder.drop_path {encoder.drop_path} must lie in [0, 1)")
    if not 0 < config.scale[0] <= config.scale[1]:
        raise ValueError(f"scale {config.scale} must satisfy 0 < low <= high")
    ratios = {"target_ratio": sampler.target_ratio, "context_ratio": sampler.context_ratio or (1.0, 1.0)}
    for name, (low, high) in ratios.items():
        if not 0 < low <= high <= 1:
            raise ValueError(f"sampler.{name} {(low, high)} must satisfy 0 < low <= high <= 1")
    if sampler.num_targets > encoder.num_groups:
        raise ValueError(f"sampler.num_targets {sampler.num_targets} exceeds encoder.num_groups {encoder.num_groups}")
    if not 0 < sampler.mask_ratio < 1:
        raise ValueError(f"sampler.mask_ratio {sampler.mask_ratio} must lie between 0 and 1")
    if "dvae" in (config.objective, config.teacher):
        if dvae.num_points < max(encoder.num_groups, encoder.group_size):
            raise ValueError(f"dvae.num_points {dvae.num_points} is less than encoder.num_groups or group_size")
        if dvae.width % 4:
            raise ValueError(f"dvae.width {dvae.width} must be a multiple of 4")


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(str(name), list(known), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _checked(name: str, value: Any, kind: Any) -> Any:
    """value as `kind`: a scalar, a Literal, an Optional or a tuple of these."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"setting {name!r}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        wanted = len(args) if Ellipsis not in args else None
        if not isinstance(items, (list, tuple)) or (wanted and len(items) != wanted):
            raise ValueError(f"setting {name!r}: {value!r} is not a list of {wanted or 'values'}")
        return tuple(_checked(name, item, args[0]) for item in items)
    if type(None) in args:
        return None if value is None else _checked(name, value, args[0])
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number:
        return value
    if kind is float and isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"setting {name!r}: {value!r} is not {kind.__name__}")
    return value
