"""Every setting, once. The defaults are the paper's (docs/method.md); presets and recipes override them.

Order of precedence: command-line flags, then the recipe (YAML), then the preset, then these defaults.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from jepa3d.plain import differences, from_dict, merge, nearest, to_dict


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
    position_every_block: bool = True


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
    norm: Literal["none", "layernorm", "center", "standardize"] = "standardize"  # the paper names none: deviation 9
    layers: int = 1  # the teacher's last blocks whose normalised outputs are averaged
    cache: bool = False  # frozen teachers are asked once a shape, before training, not in every step
    project: bool = False  # the paper's literal form: the same FC on the target too
    momentum: tuple[float, float] = (0.996, 1.0)  # of the EMA teacher, first and last step
    view: float = 0.0  # weight of the view term: predict what the teacher says of another view of the whole shape
    sigreg: float = 0.0  # weight of SIGReg on the student's tokens; needed without a teacher
    num_slices: int = 256  # random directions of SIGReg


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
class RunConfig(Schedule):
    """What every training run has beside its schedule."""

    seed: int = 0
    scale: tuple[float, float] = (0.8, 1.2)  # augmentation, per axis
    rotate: bool = True  # augmentation, about the up axis
    translate: float = 0.0  # augmentation, reach along each axis
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = "no"  # auto: what a trial at the start finds fastest
    compile: Literal["no", "yes", "auto"] = "no"  # transformer blocks by torch.compile
    accumulate: int = 1  # forward and backward passes a step, each on its share of the batch
    checkpoint_activations: bool = False  # compute blocks again for their gradient: less memory, more time
    log_every: int = 50
    checkpoint_every: int = 1000
    snapshot_every: int | None = None  # keep the encoder of every so many steps, for learning curves
    track: str | None = (
        None  # an experiment tracker that Accelerate knows, beside metrics.jsonl: tensorboard, wandb, ...
    )
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


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
class GenerativeConfig(Schedule):
    """The masked autoencoder: Point-MAE's settings."""

    mask_ratio: float = 0.6
    decoder_depth: int = 4


@dataclass(frozen=True)
class InvarianceConfig(Schedule):
    """Views of one shape to one embedding: VICReg's weights, LeJEPA's."""

    regularizer: Literal["vicreg", "sigreg"] = "sigreg"
    global_views: int = 2
    partial_views: int = 2
    partial_ratio: tuple[float, float] = (0.3, 0.6)  # of the points, one draw a batch
    projector_dim: int = 2048
    embedding_dim: int = 64
    vicreg: tuple[float, float, float] = (25.0, 25.0, 1.0)  # weights of invariance, variance, covariance
    sigreg: float = 0.02  # weight of SIGReg; the invariance has the rest
    num_slices: int = 256


# Teachers that need no stage I: the student's moving average, its frozen first weights, nobody.
TEACHERS = ("ema", "untrained", "none")
# Objectives whose networks can teach.
STAGE_ONE: tuple[Literal["dvae", "generative", "invariance"], ...] = ("dvae", "generative", "invariance")


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """One pretraining run."""

    data: tuple[str, ...] = ("synthetic",)
    split: Literal["train", "test", "all"] = "train"
    up_axis: tuple[Literal["x", "y", "z"], ...] = ("z",)
    objective: Literal["jepa", "generative", "invariance", "dvae"] = "jepa"
    teacher: tuple[str, ...] = ("dvae",)  # one or more of TEACHERS, STAGE_ONE, folders and Hub ids, joined
    init: str | None = None  # the student's first weights: generative, invariance, a folder or Hub id
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    dvae: DVAEConfig = field(default_factory=DVAEConfig)
    generative: GenerativeConfig = field(default_factory=GenerativeConfig)
    invariance: InvarianceConfig = field(default_factory=InvarianceConfig)

    @property
    def stages(self) -> tuple[Literal["dvae", "generative", "invariance"], ...]:
        """Names of the networks that stage I has to train first."""
        if self.objective != "jepa":
            return ()
        return tuple(name for name in STAGE_ONE if name in (*self.teacher, self.init))

    def schedule(self, objective: str) -> Schedule:
        """The schedule of an objective: 3D-JEPA's is the run's, each other has its own."""
        return self if objective == "jepa" else getattr(self, objective)


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Supervised training: classification with the published settings of ScanObjectNN (Point-MAE's, ACT's).

    `encoder` is that of a run from scratch; with `init` it is what the loaded encoder was made with.
    """

    lr: float = 5e-4
    batch_size: int = 32
    scale: tuple[float, float] = (1.0, 1.0)
    data: str = ""  # shapes with labels and a test part
    labels_key: str = "labels"  # of a .npz bundle
    up_axis: Literal["x", "y", "z"] = "z"
    init: str | None = None  # the encoder's weights: a run, a folder or a Hub id; None: from scratch
    num_points: int | None = None  # a cloud, where not the encoder's own
    num_groups: int | None = None  # patches a cloud, where not the encoder's own
    trained: Literal["all", "head"] = "all"  # head: the encoder stays as it is
    layer_decay: float = 1.0  # factor of the learning rate from one block to the one before it
    dropout: float = 0.5
    label_smoothing: float = 0.0
    labels: float = 1.0  # share of the train part that is labelled, drawn with the seed, stratified
    validation: float = 0.2  # share of the labelled shapes kept to choose the epoch by; a source's own part wins
    select: Literal["validation", "last", "best-on-test"] = "validation"  # which epoch's weights are kept
    votes: int = 1  # passes over scaled and moved copies of a test shape whose probabilities are averaged


@dataclass(frozen=True)
class SegmentConfig(FinetuneConfig):
    """Part segmentation with the published settings of ShapeNetPart (Point-MAE's, which scales all axes alike)."""

    lr: float = 2e-4
    batch_size: int = 16
    rotate: bool = False
    scale: tuple[float, float] = (0.8, 1.25)
    translate: float = 0.1
    layers: tuple[int, int, int] | None = None  # blocks whose tokens are joined; None: after each third of the depth


@dataclass(frozen=True)
class FewshotConfig(FinetuneConfig):
    """W-way S-shot episodes with the published settings of ModelNet40 (Point-MAE's)."""

    epochs: float = 150
    rotate: bool = False
    scale: tuple[float, float] = (2 / 3, 3 / 2)
    translate: float = 0.2
    ways: int = 5
    shots: int = 10
    folds: int = 10
    queries: int = 20  # test shapes a class
    method: Literal["finetune", "ncm", "logistic"] = "finetune"  # the last two on frozen features


# Settings that never change what is learned.
BOOKKEEPING = ("log_every", "checkpoint_every", "snapshot_every", "checkpoint_activations", "track")
SHAPENET55 = 52_470  # shapes in both of its lists

# A preset changes sizes. `tiny` is for runs of minutes: rates, and what 3D-JEPA predicts, are those that learned most
# in them (docs/experiments.md); recipes/tiny-paper.yaml has the paper's objective at its sizes.
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
        raise ValueError(f"preset {name!r} is unknown{nearest(name, PRESETS)}; one of {', '.join(PRESETS)}")
    return PRESETS[name]


def finetune_preset(name: str) -> dict:
    """The sizes of a preset for supervised training; `tiny` has fewer epochs."""
    sizes = {"encoder": preset(name).get("encoder", {})}
    return sizes | ({"epochs": 30, "warmup_epochs": 2} if name == "tiny" else {})


def resolve(*layers: dict) -> PretrainConfig:
    """The configuration that layers of overrides give, weakest first."""
    return from_dict(PretrainConfig, merge({}, *layers))


def departures(config: PretrainConfig, num_shapes: int) -> dict[str, tuple[Any, Any]]:
    """Settings of a run on `num_shapes` shapes that depart from the paper's, as dotted name -> (here, paper).

    The paper pretrains on ShapeNet55, all shapes, for 150 or 300 epochs; how often a run logs, its
    seed and which way its data points are not the method's.
    """
    paper = to_dict(PretrainConfig()) | {"data": ["ShapeNet55"], "split": "all"}
    ours = to_dict(config)
    for key in ("seed", "up_axis", *BOOKKEEPING):
        del ours[key]
    if num_shapes == SHAPENET55:
        ours["data"] = paper["data"]
    if ours["epochs"] == 150:
        ours["epochs"] = 300
    if not config.target.sigreg:
        del ours["target"]["num_slices"]
    for name in STAGE_ONE:
        if name not in (*config.stages, config.objective):
            del ours[name]
    return differences(ours, paper)
