"""Checks a run's settings before any data is read, and compares them with the paper's.

config.py defines the range of each number; this file checks the ranges, and then whether the
settings fit together. The paper is that of 3D-JEPA (arXiv 2409.15803).
"""

from collections.abc import Iterator
from typing import Any

from jepa3d import config as settings
from jepa3d.plain import check_choice, check_ranges, differences, to_dict

SHAPENET55 = 52_470  # number of shapes in ShapeNet55, train and test


def validate(config: settings.RunConfig) -> None:
    """Check a run's settings. For the first problem, raises a ValueError that names the setting."""
    check_ranges(config)
    for problem in _problems(config):
        raise ValueError(problem)


def _problems(config: settings.RunConfig) -> Iterator[str]:
    """Yield one sentence per problem. The ranges of all numbers must have been checked before."""
    yield from _of_encoder(config.encoder)
    if isinstance(config, settings.PretrainConfig):
        yield from _of_pretraining(config)
    if isinstance(config, settings.FinetuneConfig):
        yield from _of_finetuning(config)
    if isinstance(config, settings.SegmentConfig):
        yield from _of_segmentation(config)
    if isinstance(config, settings.FewshotConfig):
        yield from _of_fewshot(config)


def _of_encoder(encoder: settings.EncoderConfig) -> Iterator[str]:
    width, heads, ratio = encoder.embed_dim, encoder.num_heads, encoder.mlp_ratio
    if width % heads:
        yield f"encoder.embed_dim {width} is not a multiple of num_heads {heads}"
    if width * ratio < 1:
        yield f"encoder.mlp_ratio {ratio} times embed_dim {width} must be at least 1"
    for name in ("num_groups", "group_size"):
        if (size := getattr(encoder, name)) > (most := encoder.num_points):
            yield f"encoder.{name} {size} must not exceed encoder.num_points {most}"


def _of_pretraining(config: settings.PretrainConfig) -> Iterator[str]:
    encoder, dvae = config.encoder, config.dvae
    target, teacher = config.target, config.teacher
    groups, used = encoder.num_groups, (config.objective, *config.stages)
    check_choice("objective", config.objective, ("jepa", *settings.STAGE_ONE))
    check_choice("sampler.name", config.sampler.name, settings.SAMPLERS)
    if not config.data:
        yield "data is empty: give at least one source of shapes"
    if not teacher or (len(teacher) > 1 and "none" in teacher):
        yield f"teacher {teacher}: give at least one teacher; 'none' cannot be combined with others"
    if len(set(teacher)) < len(teacher):
        yield f"teacher {teacher}: give each teacher only once"
    if config.objective == "jepa" and teacher == ("none",) and not target.sigreg > 0:
        hint = "otherwise all tokens collapse to one point"
        yield f"teacher 'none' needs target.sigreg above 0 (LeJEPA: 0.02); {hint}"
    if target.view and (teacher == ("none",) or target.cache):
        others = "use neither teacher 'none' nor target.cache"
        yield f"target.view needs a teacher that runs in every step: {others}"
    if config.init in ("dvae", *settings.TEACHERS):
        allowed = "generative, invariance, default, a run, a folder or a Hub id"
        yield f"init {config.init!r} must be {allowed}"
    if target.cache and (moving := {"ema", "none"}.intersection(teacher)):
        yield f"target.cache needs frozen teachers, not {min(moving)} (teacher: {', '.join(teacher)})"
    if target.layers > encoder.depth:
        yield f"target.layers {target.layers} exceeds encoder.depth {encoder.depth}"
    if config.decoder.depth == 0 and (config.decoder.isolated or config.decoder.ranks):
        yield "decoder.isolated and decoder.ranks need decoder.depth 1 or more"
    if (targets := config.sampler.num_targets) > groups:
        yield f"sampler.num_targets {targets} exceeds encoder.num_groups {groups}"
    masked = {"generative"}.intersection(used)
    masked |= {"sampler"} if config.sampler.name in ("random", "one_block") else set()
    for name in sorted(masked):
        ratio = getattr(config, name).mask_ratio
        if max(1, int(ratio * groups)) >= groups:
            yield f"{name}.mask_ratio {ratio} leaves no visible token: encoder.num_groups is {groups}"
    if "invariance" in used:
        size = config.schedule("invariance").batch_size
        yield from _of_batch("invariance: batch_size", size, config.accumulate)
    if "dvae" in used and (points := dvae.num_points) < max(groups, encoder.group_size):
        yield f"dvae.num_points {points} is less than encoder.num_groups or encoder.group_size"
    if "dvae" in used and dvae.width % 4:
        yield f"dvae.width {dvae.width} must be a multiple of 4"
    if "dvae" in used and dvae.dgcnn_dim % 2:
        yield f"dvae.dgcnn_dim {dvae.dgcnn_dim} must be even"


def _of_batch(name: str, size: int, count: int) -> Iterator[str]:
    if size < 2 * count:
        fewest = f"{2 * count} (2 x accumulate)" if count > 1 else "2"
        yield f"{name} {size} must be at least {fewest}: BatchNorm needs two shapes at a time"


def _of_finetuning(config: settings.FinetuneConfig) -> Iterator[str]:
    if not config.data:
        yield "--data is missing: give labelled shapes with a train and a test split"
    yield from _of_batch("batch_size", config.batch_size, config.accumulate)
    if config.trained == "head_first" and config.init is None:
        yield "--trained head_first needs --init with an encoder; without --init, use --trained all"


def _of_segmentation(config: settings.SegmentConfig) -> Iterator[str]:
    depth = config.encoder.depth
    if config.trained == "head_first":
        yield "--trained head_first is for classes of whole shapes: segment takes --trained all or head"
    if config.layers and (wrong := max(config.layers)) > depth:
        yield f"layers {config.layers}: {wrong} must be from 0 (tokenizer) to {depth}"


def _of_fewshot(config: settings.FewshotConfig) -> Iterator[str]:
    if config.mixed_precision == "measure" or config.compile == "auto":
        reason = "episodes are too short for a trial; choose other values"
        yield f"mixed_precision measure and compile auto: {reason}"
    if config.labels != 1:
        yield f"labels {config.labels} must be 1: all shots of an episode are labelled"
    if config.votes > 1 and config.method != "finetune":
        yield f"votes {config.votes}: voting needs method finetune, not {config.method}"


def departures(config: settings.PretrainConfig, num_shapes: int) -> dict[str, tuple[Any, Any]]:
    """Find the settings of a run that differ from the paper's, as dotted name -> (here, paper).

    num_shapes: number of shapes in the run's data. If it is that of ShapeNet55, the data are taken
    to be the paper's. The paper trains for 150 or 300 epochs, so neither number counts as a
    difference. The seed, the up axis, the settings in `BOOKKEEPING`, such as log_every, and the
    settings that have no effect in this run are not compared.
    """
    # If the objective is not jepa, the schedule is compared with the defaults of that objective.
    paper = to_dict(settings.resolve({"objective": config.objective}))
    paper |= {"objective": "jepa", "data": ["ShapeNet55"], "split": "all"}
    paper["mixed_precision"] = "no"
    paper["dvae"] |= {"backbone": "google/vit-base-patch16-384"}
    ours = to_dict(config)
    # The precision that `auto` chooses depends on the machine, so `auto` is not compared.
    unknown = ["mixed_precision"] if config.mixed_precision == "auto" else []
    for key in ("seed", "up_axis", *unknown, *settings.BOOKKEEPING):
        del ours[key]
    if num_shapes == SHAPENET55:
        ours["data"] = paper["data"]
    ours["epochs"] = 300 if ours["epochs"] == 150 else ours["epochs"]
    # Without SIGReg, the number of its slices has no effect.
    if not config.target.sigreg:
        del ours["target"]["num_slices"]
    if config.objective in settings.STAGE_ONE:
        # these objectives do not use the next settings
        for key in ("sampler", "decoder", "target", "teacher", "init"):
            del ours[key]
        # The schedule of the run's own objective is compared once, at the top level, and not again
        # in the group of the objective.
        for key in settings.SCHEDULE:
            del ours[config.objective][key]
    # Groups of objectives that the run does not train are ignored.
    for name in set(settings.STAGE_ONE) - {config.objective, *config.stages}:
        del ours[name]
    return differences(ours, paper)
