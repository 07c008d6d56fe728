"""Defines every setting with its default, help, range and values in the presets.

The defaults are the paper's (docs/method.md). Command-line flags override the recipe (YAML), the
recipe overrides the preset, the preset overrides these defaults. docs/settings.md is generated from
this file.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

from jepa3d.plain import configuration, differences, from_dict, merge, nearest, setting, to_dict

# `small` is the paper. `tiny` is for runs of minutes, with the settings that learned most in them
# (docs/experiments.md); recipes/tiny-paper.yaml has the paper's objective at this size.
PRESETS = ("tiny", "small", "base")
TEACHERS = ("ema", "untrained", "none")  # teachers that need no stage I
Rival = Literal["dvae", "generative", "invariance"]
STAGE_ONE: tuple[Rival, ...] = ("dvae", "generative", "invariance")  # objectives of stage I
SAMPLERS = ("multi_block", "random", "one_block", "sequence")


@configuration("Encoder")
@dataclass(frozen=True)
class EncoderConfig:
    """Arguments of `PointEncoder`."""

    embed_dim: int = setting(384, "Token width.", "[1, 16384]", tiny=96, base=768)
    depth: int = setting(12, "Number of transformer blocks.", "[1, 200]", tiny=4)
    num_heads: int = setting(6, "Attention heads.", "[1, 256]", tiny=4, base=12)
    num_groups: int = setting(64, "Patches (tokens) per cloud.", "[1, 65536]", tiny=32)
    group_size: int = setting(32, "Points per patch.", "[1, 65536]", tiny=16)
    num_points: int = setting(2048, "Points per cloud.", "[1, 1e7]", tiny=512)
    tokenizer_dim: int = setting(128, "Light PointNet's width.", "[1, 16384]", tiny=64)
    mlp_ratio: float = setting(4.0, "Hidden width of the MLPs / embed_dim.", "(0, 64]")
    drop_path: float = setting(
        0.1, "Drop rate of stochastic depth in the last block.", "[0, 1)", tiny=0.0
    )
    position_every_block: bool = setting(
        True, "Add positions before every block, not only the first."
    )
    qkv_bias: bool = setting(False, "Biases of queries, keys and values (Point-JEPA).")


@configuration("Sampler: which tokens are context and which are targets")
@dataclass(frozen=True)
class SamplerConfig:
    """Ratios are shares of a cloud's tokens."""

    name: str = setting(
        "multi_block",
        "multi_block (the paper's), random, one_block, sequence (Point-JEPA's), or your own "
        "function as package.module:function.",
        tiny="random",
    )
    num_targets: int = setting(4, "Target blocks per cloud.", "[1, 65536]")
    target_ratio: tuple[float, float] = setting(
        (0.15, 0.2), "Size of a target block.", "(0, 1] rising"
    )
    context_ratio: tuple[float, float] | None = setting(
        None,
        "Size of the context before targets are removed. Default: (0.85, 1.0); for sequence "
        "(0.4, 0.75) of the tokens that targets leave.",
        "(0, 1] rising",
    )
    min_context: int = setting(4, "Redraw masks of fewer context tokens.", "[1, 65536]")
    mask_ratio: float = setting(
        0.25, "Share of masked tokens, for random and one_block.", "(0, 1)", tiny=0.6
    )
    masks: int = setting(1, "Masks per cloud; the teacher runs once.", "[1, 256]")


@configuration("Decoder")
@dataclass(frozen=True)
class DecoderConfig:
    """Arguments of `ContextAwareDecoder`."""

    depth: int = setting(2, "Blocks; with 0 the encoder itself predicts.", "[0, 200]")
    cross_attention: bool = setting(True, "Cross-attend to the context in every block.")
    stacked: bool = setting(False, "Predict all target blocks in one pass.")
    isolated: bool = setting(False, "Mask tokens attend to the context only.")
    ranks: bool = setting(False, "Use a token's rank along each axis as position.")


@configuration("Target: how predictions are compared with the teacher's tokens")
@dataclass(frozen=True)
class TargetConfig:
    """Normalisation and averaging of targets, and additional loss terms."""

    unit: Literal["token", "block"] = setting("token", "A cosine per token or block.")
    norm: Literal["none", "layernorm", "center", "standardize"] = setting(
        "standardize", "Normalisation of the teacher's tokens; the paper mentions none."
    )
    layers: int = setting(1, "Average this many last blocks.", "[1, 200]", tiny=4)
    cache: bool = setting(False, "Run frozen teachers once per shape, before training.")
    project: bool = setting(False, "Project targets too, as in the paper's equation.")
    momentum: tuple[float, float] = setting(
        (0.996, 1.0), "Momentum of the EMA teacher at the first and last step.", "[0, 1]"
    )
    view: float = setting(
        0.0, "Weight of predicting the teacher's vector of the undamaged cloud.", "[0, 1000]"
    )
    sigreg: float = setting(
        0.0, "Weight of SIGReg on the student's tokens; needed for teacher none.", "[0, 1)"
    )
    num_slices: int = setting(256, "SIGReg's random directions.", "[1, 65536]", tiny=64)


@configuration("Schedule")
@dataclass(frozen=True)
class Schedule:
    """AdamW with linear warm-up and cosine decay, and how long to train."""

    lr: float = setting(1e-3, "Highest learning rate.", "(0, 100]")
    weight_decay: float = setting(0.05, "Weight decay of AdamW.", "[0, 100]")
    warmup_epochs: float = setting(10, "Epochs of linear warm-up from 0.", "[0, 1e6]")
    min_lr: float = setting(1e-6, "Learning rate of the last step.", "[0, 100]")
    clip_grad: float = setting(10.0, "Clip the gradient to this norm.", "(0, 1e9]")
    batch_size: int = setting(128, "Clouds per step, over all processes.", "[1, 1e6]")
    epochs: float = setting(300, "Passes over the data.", "(0, 1e6]")
    max_steps: int | None = setting(None, "Steps; overrides epochs.", "[1, 1e9]")


SCHEDULE = tuple(part.name for part in fields(Schedule))


def _schedule(config: Schedule) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SCHEDULE}


@configuration("Run")
@dataclass(frozen=True)
class RunConfig(Schedule):
    """Settings of every training run."""

    seed: int = setting(0, "Seeds weights, batches, masks, augmentation.", "[0, 4e9]")
    scale: tuple[float, float] = setting(
        (0.8, 1.2), "Augmentation: scale each axis by a factor in this range.", "(0, 1000] rising"
    )
    rotate: bool = setting(True, "Augmentation: rotate about the up axis.")
    translate: float = setting(0.0, "Augmentation: largest move per axis.", "[0, 1000]")
    mixed_precision: Literal["auto", "measure", "no", "bf16", "fp16"] = setting(
        "auto",
        "auto: bf16 on GPUs that support it and on CPUs with AMX, else no; measure: the faster "
        "one in a short trial.",
    )
    compile: Literal["no", "yes", "auto"] = setting("no", "Compile transformer blocks.")
    accumulate: int = setting(1, "Split each batch into this many passes.", "[1, 1e6]")
    checkpoint_activations: bool = setting(
        False, "Recompute blocks in the backward pass: less memory, more time."
    )
    log_every: int = setting(50, "Steps between log lines.", "[1, 1e9]")
    checkpoint_every: int = setting(1000, "Steps between checkpoints.", "[1, 1e9]")
    snapshot_every: int | None = setting(
        None, "Steps between stored encoders, for learning curves; default: none.", "[1, 1e9]"
    )
    track: str | None = setting(None, "Accelerate's tracker to log to, such as wandb.")
    encoder: EncoderConfig = EncoderConfig()


# Settings that never change what is learned.
BOOKKEEPING = ("log_every checkpoint_every snapshot_every checkpoint_activations track").split()


@configuration("Stage I: the dVAE, the paper's teacher")
@dataclass(frozen=True)
class DVAEConfig(Schedule):
    """ACT's settings."""

    lr: float = setting(5e-4, tiny=2e-3)
    weight_decay: float = setting(5e-4)
    warmup_epochs: float = setting(10, tiny=1)
    batch_size: int = setting(64, tiny=32)
    epochs: float = setting(300, tiny=15)
    num_points: int = setting(1024, "Points per cloud.", "[1, 1e7]", tiny=512)
    width: int = setting(384, "Width of the dVAE's tokens.", "[4, 16384]", tiny=96)
    num_codes: int = setting(8192, "Entries of the codebook.", "[1, 1e6]", tiny=512)
    tokenizer_dim: int = setting(128, "Light PointNet's width.", "[1, 16384]", tiny=64)
    dgcnn_dim: int = setting(128, "Width of the DGCNNs.", "[1, 16384]", tiny=32)
    folding_dim: int = setting(512, "Folding decoder's width.", "[1, 16384]", tiny=128)
    temperature: tuple[float, float] = setting(
        (1.0, 0.0625), "Gumbel-softmax temperature, first and last.", "(0, 1000]"
    )
    kl_weight: float = setting(0.1, "KL term's final weight.", "[0, 1000]", tiny=0.01)
    backbone: str | None = setting(
        None, "Folder or Hub id of a frozen ViT between the DGCNNs; default: none."
    )


@configuration("Rival: masked autoencoder")
@dataclass(frozen=True)
class GenerativeConfig(Schedule):
    """Point-MAE's settings."""

    warmup_epochs: float = setting(10, tiny=2)
    batch_size: int = setting(128, tiny=32)
    epochs: float = setting(300, tiny=60)
    mask_ratio: float = setting(0.6, "Share of masked tokens.", "(0, 1)")
    decoder_depth: int = setting(4, "Number of decoder blocks.", "[1, 200]")


@configuration("Rival: invariance")
@dataclass(frozen=True)
class InvarianceConfig(Schedule):
    """All views of a shape get the same embedding. Loss weights are those of VICReg and LeJEPA."""

    warmup_epochs: float = setting(10, tiny=2)
    batch_size: int = setting(128, tiny=32)
    epochs: float = setting(300, tiny=30)
    regularizer: Literal["vicreg", "sigreg"] = setting("sigreg", "Prevents collapse.")
    global_views: int = setting(2, "Views of the whole cloud.", "[1, 64]")
    partial_views: int = setting(2, "Views of a ball cut out of the cloud.", "[0, 64]")
    partial_ratio: tuple[float, float] = setting(
        (0.3, 0.6), "Share of the points in a ball, drawn once per batch.", "(0, 1] rising"
    )
    projector_dim: int = setting(2048, "Projector hidden width.", "[1, 65536]", tiny=256)
    embedding_dim: int = setting(64, "Width of the embedding.", "[1, 65536]")
    vicreg: tuple[float, float, float] = setting(
        (25.0, 25.0, 1.0), "Weights of invariance, variance and covariance.", "[0, 1e6]"
    )
    sigreg: float = setting(0.02, "SIGReg's weight w; invariance has 1 - w.", "[0, 1)")
    num_slices: int = setting(256, "SIGReg's random directions.", "[1, 65536]", tiny=64)


@configuration("Run")
@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Settings of one pretraining run."""

    warmup_epochs: float = setting(10, tiny=2)
    batch_size: int = setting(128, tiny=32)
    epochs: float = setting(300, tiny=60)
    rotate: bool = setting(True, tiny=False)
    data: tuple[str, ...] = setting(("synthetic",), "Training shapes (docs/data.md).")
    split: Literal["train", "test", "all"] = setting("train", "Split of the data.")
    up_axis: tuple[Literal["x", "y", "z"], ...] = setting(
        ("z",), "Up axis of the data: one, or one per source."
    )
    objective: str = setting(
        "jepa",
        "jepa; a rival: generative or invariance; dvae: stage I alone; or your own function as "
        "package.module:function.",
    )
    teacher: tuple[str, ...] = setting(
        ("dvae",),
        "dvae, generative or invariance (trained first), ema, untrained, none, default, a run, a "
        "folder, a Hub id or package.module:function; several are concatenated.",
        tiny=("ema", "untrained"),
    )
    init: str | None = setting(
        None,
        "Initial weights of the student: generative, invariance, default (the encoder in the "
        "package), a run, a folder or a Hub id.",
    )
    sampler: SamplerConfig = SamplerConfig()
    decoder: DecoderConfig = DecoderConfig()
    target: TargetConfig = TargetConfig()
    dvae: DVAEConfig = DVAEConfig()
    generative: GenerativeConfig = GenerativeConfig()
    invariance: InvarianceConfig = InvarianceConfig()

    @property
    def stages(self) -> tuple[Rival, ...]:
        """The networks that stage I must train first."""
        named = (*self.teacher, self.init) if self.objective == "jepa" else ()
        return tuple(name for name in STAGE_ONE if name in named)

    def __post_init__(self) -> None:
        """Copy the run's schedule into the group of its own objective."""
        if self.objective in STAGE_ONE:
            group = replace(getattr(self, self.objective), **_schedule(self))
            object.__setattr__(self, self.objective, group)

    def schedule(self, objective: str) -> Schedule:
        """The schedule of an objective: the run's own, or that of a network of stage I."""
        return self if objective == self.objective else getattr(self, objective)

    def stage(self, name: str) -> "PretrainConfig":
        """Settings of the run that trains a network of stage I, with its own schedule."""
        return replace(self, objective=name, snapshot_every=None, **_schedule(getattr(self, name)))


@configuration("Run")
@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Classification. The defaults are the published settings for ScanObjectNN (Point-MAE, ACT).

    `encoder` is used for training from scratch; with `init` it becomes that of the loaded encoder.
    """

    lr: float = 5e-4
    warmup_epochs: float = setting(10, tiny=2)
    batch_size: int = 32
    epochs: float = setting(300, tiny=30)
    scale: tuple[float, float] = (1.0, 1.0)
    data: str = setting("", "Shapes with labels and a test part (docs/data.md).")
    labels_key: str = setting("labels", "Key of the labels in an .npz file.")
    up_axis: Literal["x", "y", "z"] = setting("z", "Up axis of the data.")
    init: str | None = setting(
        None,
        "The pretrained encoder: default (that in the package), a run, a folder or a Hub id; "
        "without it, training is from scratch.",
    )
    num_points: int | None = setting(None, "Points, if not the encoder's.", "[1, 1e7]")
    num_groups: int | None = setting(None, "Patches per cloud, if not the encoder's.", "[1, 65536]")
    trained: Literal["all", "head", "head_first"] = setting(
        "all",
        "all: all weights; head: the encoder stays frozen; head_first: a linear head is fitted "
        "to its vectors, then all weights are trained.",
    )
    layer_decay: float = setting(
        1.0, "Factor on the learning rate from each block to the one below.", "(0, 1]"
    )
    dropout: float = setting(0.5, "Dropout in the head.", "[0, 1)")
    label_smoothing: float = setting(0.0, "Label smoothing of the loss.", "[0, 1)")
    labels: float = setting(1.0, "Share of the labels; seeded, stratified.", "(0, 1]")
    validation: float = setting(
        0.2, "Share of these used for validation, if the data has no such split.", "[0, 1)"
    )
    select: Literal["validation", "last", "best-on-test"] = setting(
        "validation", "How the kept epoch is chosen (docs/protocols.md)."
    )
    votes: int = setting(
        1, "Average the logits of this many scaled, moved copies of a test shape.", "[1, 10000]"
    )


@configuration("Run")
@dataclass(frozen=True)
class SegmentConfig(FinetuneConfig):
    """Part segmentation. The defaults are the published settings for ShapeNetPart (Point-MAE)."""

    lr: float = 2e-4
    batch_size: int = 16
    rotate: bool = False
    scale: tuple[float, float] = (0.8, 1.25)
    translate: float = 0.1
    layers: tuple[int, int, int] | None = setting(
        None, "Blocks whose tokens are used; default: after each third of the depth.", "[0, 200]"
    )


@configuration("Run")
@dataclass(frozen=True)
class FewshotConfig(FinetuneConfig):
    """Few-shot episodes. The defaults are the published settings for ModelNet40 (Point-MAE)."""

    epochs: float = setting(150, tiny=30)
    rotate: bool = False
    scale: tuple[float, float] = (2 / 3, 3 / 2)
    translate: float = 0.2
    ways: int = setting(5, "Classes per episode.", "[2, 10000]")
    shots: int = setting(10, "Labelled shapes per class.", "[1, 1e6]")
    folds: int = setting(10, "Number of episodes.", "[1, 10000]")
    queries: int = setting(20, "Test shapes per class.", "[1, 1e6]")
    method: Literal["finetune", "ncm", "logistic"] = setting(
        "finetune",
        "finetune: train each episode; ncm, logistic: nearest class mean or logistic regression "
        "on frozen features.",
    )


KINDS = {
    "pretrain": PretrainConfig,
    "classify": FinetuneConfig,
    "segment": SegmentConfig,
    "fewshot": FewshotConfig,
}
SHAPENET55 = 52_470  # shapes in both of its lists


def preset(name: str, kind: Any = PretrainConfig) -> dict[str, Any]:
    """The settings (nested) that a preset changes; kind: the dataclass of settings.

    Raises ValueError for an unknown preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        hint, known = nearest(name, PRESETS), ", ".join(PRESETS)
        raise ValueError(f"preset {name!r} is unknown{hint}; one of {known}")
    found = {}
    for part in fields(kind):
        if is_dataclass(part.type):
            found[part.name] = preset(name, part.type)
        elif name in part.metadata.get("presets", {}):
            found[part.name] = part.metadata["presets"][name]
    return {key: value for key, value in found.items() if value != {}}


def resolve(*layers: dict) -> PretrainConfig:
    """Merge layers of overrides (later ones win) to the settings of a pretraining run.

    Each objective may have its own schedule in a layer: `max_steps` is 3D-JEPA's,
    `generative.max_steps` the masked autoencoder's. The schedule of the run's objective becomes
    that of the run. Raises ValueError as `from_dict` does.
    """
    objective = merge({}, *layers).get("objective", "jepa")
    if objective in STAGE_ONE:
        layers = ({objective: to_dict(PretrainConfig())[objective]}, *layers)
    merged: dict[str, Any] = {}
    for layer in layers:
        group = layer.get(objective)
        known = group if isinstance(group, dict) else {}
        schedule = {key: known[key] for key in SCHEDULE if key in known}
        merged = merge(merged, layer, schedule)
    return from_dict(PretrainConfig, merged)


def departures(config: PretrainConfig, num_shapes: int) -> dict[str, tuple[Any, Any]]:
    """The settings of a run that differ from the paper's, as dotted name -> (here, paper).

    num_shapes: of the run's data. The paper uses all shapes of ShapeNet55, and 150 or 300 epochs.
    Logging, seed and up axis are ignored.
    """
    # for a rival, these include its own schedule
    paper = to_dict(resolve({"objective": config.objective}))
    paper |= {"objective": "jepa", "data": ["ShapeNet55"], "split": "all"}
    paper["mixed_precision"] = "no"
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
