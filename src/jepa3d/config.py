"""Every setting, once. The defaults are the paper's (docs/method.md); presets and recipes override
them.

Order of precedence: command-line flags, then the recipe (YAML), then the preset, then these
defaults. `within(default, range)` is the default of a number (or of each number of a tuple) and the
range it must lie in.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from jepa3d.plain import differences, from_dict, merge, nearest, to_dict, within


@dataclass(frozen=True)
class EncoderConfig:
    """Arguments of `PointEncoder`."""

    embed_dim: int = within(384, "[1, 16384]")
    depth: int = within(12, "[1, 200]")
    num_heads: int = within(6, "[1, 256]")
    num_groups: int = within(64, "[1, 65536]")
    group_size: int = within(32, "[1, 65536]")
    num_points: int = within(2048, "[1, 1e7]")
    tokenizer_dim: int = within(128, "[1, 16384]")
    mlp_ratio: float = within(4.0, "(0, 64]")
    drop_path: float = within(0.1, "[0, 1)")
    position_every_block: bool = True
    qkv_bias: bool = False  # of queries, keys and values: none in Point-MAE and ACT


@dataclass(frozen=True)
class SamplerConfig:
    """Which tokens are context and target; ratios are fractions of the M tokens."""

    name: Literal["multi_block", "random", "one_block", "sequence"] = "multi_block"
    num_targets: int = within(4, "[1, 65536]")
    target_ratio: tuple[float, float] = within((0.15, 0.2), "(0, 1] rising")
    # None: (0.85, 1.0), the paper's; of sequence (0.4, 0.75), of the tokens that targets leave
    context_ratio: tuple[float, float] | None = within(None, "(0, 1] rising")
    min_context: int = within(4, "[1, 65536]")
    mask_ratio: float = within(0.25, "(0, 1)")  # of the random and one-block samplers
    masks: int = within(
        1, "[1, 256]"
    )  # drawn per cloud and step; the teacher encodes the cloud once for all of them


@dataclass(frozen=True)
class DecoderConfig:
    """Arguments of `ContextAwareDecoder`; depth 0 lets the encoder predict."""

    depth: int = within(2, "[0, 200]")
    cross_attention: bool = True
    stacked: bool = False
    isolated: bool = False  # mask tokens see the context only, not each other
    ranks: bool = (
        False  # the decoder is told the order of the tokens along each axis, not their coordinates
    )


@dataclass(frozen=True)
class TargetConfig:
    """What is compared: one cosine a token or a block, of a teacher's tokens as they are or
    normalised.
    """

    unit: Literal["token", "block"] = "token"
    norm: Literal["none", "layernorm", "center", "standardize"] = (
        "standardize"  # the paper names none: deviation 8
    )
    layers: int = within(
        1, "[1, 200]"
    )  # the teacher's last blocks whose normalised outputs are averaged
    cache: bool = (
        False  # frozen teachers are asked once a shape, before training, not in every step
    )
    project: bool = False  # the paper's literal form: the same FC on the target too
    momentum: tuple[float, float] = within(
        (0.996, 1.0), "[0, 1]"
    )  # of the EMA teacher, first and last step
    view: float = within(
        0.0, "[0, 1000]"
    )  # weight of the view term: predict the teacher's vector of the whole cloud
    sigreg: float = within(
        0.0, "[0, 1)"
    )  # weight of SIGReg on the student's tokens; needed without a teacher
    num_slices: int = within(256, "[1, 65536]")  # random directions of SIGReg


@dataclass(frozen=True)
class Schedule:
    """AdamW with linear warm-up and cosine decay to `min_lr`, and how long to train."""

    lr: float = within(1e-3, "(0, 100]")
    weight_decay: float = within(0.05, "[0, 100]")
    warmup_epochs: float = within(10, "[0, 1e6]")
    min_lr: float = within(1e-6, "[0, 100]")
    clip_grad: float = within(10.0, "(0, 1e9]")
    batch_size: int = within(128, "[1, 1e6]")
    epochs: float = within(300, "(0, 1e6]")
    max_steps: int | None = within(
        None, "[1, 1e9]"
    )  # ends the schedule here instead of after `epochs`


SCHEDULE = tuple(part.name for part in fields(Schedule))


def _schedule(config: Schedule) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SCHEDULE}


@dataclass(frozen=True)
class RunConfig(Schedule):
    """What every training run has beside its schedule."""

    seed: int = within(0, "[0, 4e9]")
    scale: tuple[float, float] = within((0.8, 1.2), "(0, 1000] rising")  # augmentation, per axis
    rotate: bool = True  # augmentation, about the up axis
    translate: float = within(0.0, "[0, 1000]")  # augmentation, reach along each axis
    # auto: bf16 on GPUs that have it and processors with AMX, else no; measure: what a trial at the
    # start finds faster
    mixed_precision: Literal["auto", "measure", "no", "bf16", "fp16"] = "auto"
    compile: Literal["no", "yes", "auto"] = "no"  # transformer blocks by torch.compile
    accumulate: int = within(
        1, "[1, 1e6]"
    )  # forward and backward passes a step, each on its share of the batch
    checkpoint_activations: bool = (
        False  # compute blocks again for their gradient: less memory, more time
    )
    log_every: int = within(50, "[1, 1e9]")
    checkpoint_every: int = within(1000, "[1, 1e9]")
    snapshot_every: int | None = within(
        None, "[1, 1e9]"
    )  # keep the encoder of every so many, for curves
    track: str | None = (
        None  # an experiment tracker of Accelerate's beside metrics.jsonl: tensorboard, wandb, ...
    )
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


@dataclass(frozen=True)
class DVAEConfig(Schedule):
    """Stage I: the paper's teacher (ACT's settings)."""

    lr: float = 5e-4
    weight_decay: float = 5e-4
    batch_size: int = 64
    num_points: int = within(1024, "[1, 1e7]")
    width: int = within(384, "[4, 16384]")
    num_codes: int = within(8192, "[1, 1e6]")
    tokenizer_dim: int = within(128, "[1, 16384]")
    dgcnn_dim: int = within(128, "[1, 16384]")
    folding_dim: int = within(512, "[1, 16384]")
    temperature: tuple[float, float] = within((1.0, 0.0625), "(0, 1000]")
    kl_weight: float = within(0.1, "[0, 1000]")
    backbone: str | None = (
        None  # folder or Hub id of the frozen ViT between the DGCNNs; None: points only
    )


@dataclass(frozen=True)
class GenerativeConfig(Schedule):
    """The masked autoencoder: Point-MAE's settings."""

    mask_ratio: float = within(0.6, "(0, 1)")
    decoder_depth: int = within(4, "[1, 200]")


@dataclass(frozen=True)
class InvarianceConfig(Schedule):
    """Views of one shape to one embedding: VICReg's weights, LeJEPA's."""

    regularizer: Literal["vicreg", "sigreg"] = "sigreg"
    global_views: int = within(2, "[1, 64]")
    partial_views: int = within(2, "[0, 64]")
    partial_ratio: tuple[float, float] = within(
        (0.3, 0.6), "(0, 1] rising"
    )  # of the points, one draw a batch
    projector_dim: int = within(2048, "[1, 65536]")
    embedding_dim: int = within(64, "[1, 65536]")
    vicreg: tuple[float, float, float] = within(
        (25.0, 25.0, 1.0), "[0, 1e6]"
    )  # invariance, variance, covariance
    sigreg: float = within(0.02, "[0, 1)")  # weight of SIGReg; the invariance has the rest
    num_slices: int = within(256, "[1, 65536]")


TEACHERS = (
    "ema",
    "untrained",
    "none",
)  # need no stage I: the moving average, the frozen first weights, nobody
# Objectives whose networks can teach.
STAGE_ONE: tuple[Literal["dvae", "generative", "invariance"], ...] = (
    "dvae",
    "generative",
    "invariance",
)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """One pretraining run."""

    data: tuple[str, ...] = ("synthetic",)
    split: Literal["train", "test", "all"] = "train"
    up_axis: tuple[Literal["x", "y", "z"], ...] = ("z",)
    objective: Literal["jepa", "generative", "invariance", "dvae"] = "jepa"
    teacher: tuple[str, ...] = (
        "dvae",
    )  # one or more of TEACHERS, STAGE_ONE, folders and Hub ids, joined
    init: str | None = (
        None  # the student's first weights: generative, invariance, a folder or Hub id
    )
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    dvae: DVAEConfig = field(default_factory=DVAEConfig)
    generative: GenerativeConfig = field(default_factory=GenerativeConfig)
    invariance: InvarianceConfig = field(default_factory=InvarianceConfig)

    @property
    def stages(self) -> tuple[Literal["dvae", "generative", "invariance"], ...]:
        """Names of the networks that stage I has to train first."""
        named = (*self.teacher, self.init) if self.objective == "jepa" else ()
        return tuple(name for name in STAGE_ONE if name in named)

    def __post_init__(self) -> None:
        """The schedule in the group of the run's own objective is the run's; those of other groups
        are of stage I.
        """
        if self.objective in STAGE_ONE:
            own = replace(getattr(self, self.objective), **_schedule(self))
            object.__setattr__(self, self.objective, own)

    def schedule(self, objective: str) -> Schedule:
        """The run's schedule for its own objective, else that of a network of stage I."""
        return self if objective == self.objective else getattr(self, objective)

    def stage(self, name: str) -> "PretrainConfig":
        """The run that trains a network of stage I, on its own schedule."""
        return replace(self, objective=name, snapshot_every=None, **_schedule(getattr(self, name)))


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Supervised training: classification with the published settings of ScanObjectNN (Point-MAE's,
    ACT's).

    `encoder` is that of a run from scratch; with `init` it is what the loaded encoder was made
    with.
    """

    lr: float = 5e-4
    batch_size: int = 32
    scale: tuple[float, float] = (1.0, 1.0)
    data: str = ""  # shapes with labels and a test part
    labels_key: str = "labels"  # of a .npz bundle
    up_axis: Literal["x", "y", "z"] = "z"
    init: str | None = (
        None  # the encoder's weights: a run, a folder or a Hub id; None: from scratch
    )
    num_points: int | None = within(None, "[1, 1e7]")  # a cloud, where not the encoder's own
    num_groups: int | None = within(
        None, "[1, 65536]"
    )  # patches a cloud, where not the encoder's own
    # head: the encoder stays as it is; head_first: a linear head is fitted to it, then all weights
    # are trained
    trained: Literal["all", "head", "head_first"] = "all"
    layer_decay: float = within(
        1.0, "(0, 1]"
    )  # factor of the learning rate from one block to the one before it
    dropout: float = within(0.5, "[0, 1)")
    label_smoothing: float = within(0.0, "[0, 1)")
    labels: float = within(
        1.0, "(0, 1]"
    )  # share of the train part that is labelled, drawn with the seed, stratified
    validation: float = within(
        0.2, "[0, 1)"
    )  # share of these that chooses the epoch; a source's own part wins
    select: Literal["validation", "last", "best-on-test"] = (
        "validation"  # which epoch's weights are kept
    )
    votes: int = within(1, "[1, 10000]")  # scaled and moved copies of a test shape, logits averaged


@dataclass(frozen=True)
class SegmentConfig(FinetuneConfig):
    """Part segmentation with the published settings of ShapeNetPart (Point-MAE's, which scales all
    axes alike).
    """

    lr: float = 2e-4
    batch_size: int = 16
    rotate: bool = False
    scale: tuple[float, float] = (0.8, 1.25)
    translate: float = 0.1
    layers: tuple[int, int, int] | None = within(
        None, "[0, 200]"
    )  # blocks to join; None: each third


@dataclass(frozen=True)
class FewshotConfig(FinetuneConfig):
    """W-way S-shot episodes with the published settings of ModelNet40 (Point-MAE's)."""

    epochs: float = 150
    rotate: bool = False
    scale: tuple[float, float] = (2 / 3, 3 / 2)
    translate: float = 0.2
    ways: int = within(5, "[2, 10000]")
    shots: int = within(10, "[1, 1e6]")
    folds: int = within(10, "[1, 10000]")
    queries: int = within(20, "[1, 1e6]")  # test shapes a class
    method: Literal["finetune", "ncm", "logistic"] = "finetune"  # the last two on frozen features


KINDS = {
    "pretrain": PretrainConfig,
    "classify": FinetuneConfig,
    "segment": SegmentConfig,
    "fewshot": FewshotConfig,
}
# Settings that never change what is learned.
BOOKKEEPING = ("log_every", "checkpoint_every", "snapshot_every", "checkpoint_activations", "track")
SHAPENET55 = 52_470  # shapes in both of its lists

# A preset changes sizes. `tiny` is for runs of minutes: rates, and what 3D-JEPA predicts, are those
# that learned most in them (docs/experiments.md); recipes/tiny-paper.yaml has the paper's objective
# at its sizes.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "tiny": {
        "teacher": ["ema", "untrained"],
        "rotate": False,
        "sampler": {"name": "random", "mask_ratio": 0.6},
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
        "generative": {"batch_size": 32, "epochs": 60, "warmup_epochs": 2},
        "invariance": {
            "batch_size": 32,
            "epochs": 30,
            "warmup_epochs": 2,
            "projector_dim": 256,
            "embedding_dim": 64,
            "num_slices": 64,
        },
        "target": {"layers": 4, "num_slices": 64},  # slices of SIGReg, where it is on
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


def preset(name: str) -> dict:
    """The overrides of a preset. ValueError names the nearest one."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(
            f"preset {name!r} is unknown{nearest(name, PRESETS)}; one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]


def finetune_preset(name: str) -> dict:
    """The sizes of a preset for supervised training; `tiny` has fewer epochs."""
    sizes = {"encoder": preset(name).get("encoder", {})}
    return sizes | ({"epochs": 30, "warmup_epochs": 2} if name == "tiny" else {})


def resolve(*layers: dict) -> PretrainConfig:
    """The configuration that layers of overrides give, weakest first.

    A schedule is written for each objective (`max_steps` is 3D-JEPA's, `generative.max_steps` the
    autoencoder's): in every layer that of the run's objective is the run's.
    """
    objective = merge({}, *layers).get("objective", "jepa")
    defaults = {objective: to_dict(PretrainConfig())[objective]} if objective in STAGE_ONE else {}
    return from_dict(
        PretrainConfig,
        merge({}, *(_one_schedule(layer, objective) for layer in (defaults, *layers))),
    )


def _one_schedule(layer: dict, objective: str) -> dict:
    own = layer.get(objective)
    return (
        layer | {key: own[key] for key in SCHEDULE if key in own}
        if isinstance(own, dict)
        else layer
    )


def departures(config: PretrainConfig, num_shapes: int) -> dict[str, tuple[Any, Any]]:
    """Settings of a run on `num_shapes` shapes that depart from the paper's, as dotted name ->
    (here, paper).

    The paper's: ShapeNet55, all shapes, 150 or 300 epochs. Logging, seed and up axis are not the
    method's.
    """
    defaults = to_dict(
        resolve({"objective": config.objective})
    )  # a rival's schedule is compared with its own
    paper = defaults | {
        "objective": "jepa",
        "data": ["ShapeNet55"],
        "split": "all",
        "mixed_precision": "no",
    }
    paper["dvae"] |= {"backbone": "google/vit-base-patch16-384"}
    ours = to_dict(config)
    unknown = ["mixed_precision"] if config.mixed_precision == "auto" else []
    for key in ("seed", "up_axis", *unknown, *BOOKKEEPING):
        del ours[key]
    if num_shapes == SHAPENET55:
        ours["data"] = paper["data"]
    ours["epochs"] = 300 if ours["epochs"] == 150 else ours["epochs"]
    if not config.target.sigreg:
        del ours["target"]["num_slices"]
    for name in STAGE_ONE:
        if name == config.objective:
            ours[name] = {key: value for key, value in ours[name].items() if key not in SCHEDULE}
        elif name not in config.stages:
            del ours[name]
    return differences(ours, paper)
