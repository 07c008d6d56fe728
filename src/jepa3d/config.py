"""Defines every setting of a run, with its default, help text, range and values in the presets.

The defaults of pretraining are the paper's settings (docs/method.md). Command-line flags override
the recipe (a YAML file), the recipe overrides the preset, and the preset overrides these defaults.
docs/settings.md is generated from this file.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

from jepa3d.plain import configuration, from_dict, merge, nearest, setting, to_dict

# `small` has the paper's settings, and `base` has a wider encoder. `tiny` is for runs of a few
# minutes: it has a small encoder, and the masks and teachers that reached the best scores in such
# runs (docs/experiments.md). recipes/tiny-paper.yaml has the paper's masks and teacher, but the
# small encoder of `tiny`.
PRESETS = ("tiny", "small", "base")
# Stage I trains a network that the run needs as its teacher or as its initial weights. These values
# of `teacher` need neither stage I nor weights from a file:
TEACHERS = ("ema", "untrained", "none")
Rival = Literal["dvae", "generative", "invariance"]
# The objectives that stage I can train a network with; each network is named after its objective.
STAGE_ONE: tuple[Rival, ...] = ("dvae", "generative", "invariance")
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
    tokenizer_dim: int = setting(128, "Width of the tokenizer.", "[1, 16384]", tiny=64)
    mlp_ratio: float = setting(4.0, "Hidden width of the MLPs, divided by embed_dim.", "(0, 64]")
    drop_path: float = setting(
        0.1,
        "Stochastic depth: drop rate of the last block; the first block has the drop rate 0.",
        "[0, 1)",
        tiny=0.0,
    )
    position_every_block: bool = setting(
        True, "Add position embeddings before every block, not only before the first."
    )
    qkv_bias: bool = setting(False, "Add biases to queries, keys and values.")


@configuration("Sampler: which tokens are context and which are targets")
@dataclass(frozen=True)
class SamplerConfig:
    """Settings of the sampler. A ratio is a share of all tokens, unless its help says otherwise."""

    name: str = setting(
        "multi_block",
        "multi_block (the paper's), random, one_block, sequence (Point-JEPA's), or your own "
        "function as package.module:function.",
        tiny="random",
    )
    num_targets: int = setting(4, "Target blocks per cloud.", "[1, 65536]")
    target_ratio: tuple[float, float] = setting(
        (0.15, 0.2), "Range of a target block's share of the tokens.", "(0, 1] rising"
    )
    context_ratio: tuple[float, float] | None = setting(
        None,
        "Range of the context's share of the tokens, before targets are removed; default "
        "(0.85, 1.0). For sequence: share of the non-target tokens; default (0.4, 0.75).",
        "(0, 1] rising",
    )
    min_context: int = setting(4, "A context with fewer tokens is drawn again.", "[1, 65536]")
    mask_ratio: float = setting(
        0.25, "Share of masked tokens (for random and one_block).", "(0, 1)", tiny=0.6
    )
    masks: int = setting(1, "Masks per cloud; the teacher runs once for all of them.", "[1, 256]")


@configuration("Decoder")
@dataclass(frozen=True)
class DecoderConfig:
    """Arguments of `ContextAwareDecoder`."""

    depth: int = setting(2, "Number of blocks; with 0, the encoder itself predicts.", "[0, 200]")
    cross_attention: bool = setting(True, "Cross-attend to the context in every block.")
    stacked: bool = setting(False, "Predict all target blocks in one forward pass.")
    isolated: bool = setting(False, "Let mask tokens attend only to the context.")
    ranks: bool = setting(False, "Use ranks along the axes as positions, instead of coordinates.")


@configuration("Target: how predictions are compared with the teacher's tokens")
@dataclass(frozen=True)
class TargetConfig:
    """Settings of the targets (their normalisation and averaging), and of additional loss terms."""

    unit: Literal["token", "block"] = setting(
        "token", "Compute one cosine per token, or one per block."
    )
    norm: Literal["none", "layernorm", "center", "standardize"] = setting(
        "standardize", "Normalisation of the teacher's tokens; the paper does not mention any."
    )
    layers: int = setting(
        1, "Average the outputs of this many of the teacher's last blocks.", "[1, 200]", tiny=4
    )
    cache: bool = setting(False, "Run frozen teachers once per shape, before training.")
    project: bool = setting(False, "Project targets like predictions, as in the paper's equation.")
    momentum: tuple[float, float] = setting(
        (0.996, 1.0), "Momentum of the EMA teacher, at the first and the last step.", "[0, 1]"
    )
    view: float = setting(
        0.0,
        "Weight of a loss term: predict the teacher's vector of the whole cloud from a damaged "
        "view.",
        "[0, 1000]",
    )
    sigreg: float = setting(
        0.0,
        "Weight of the regulariser SIGReg on the student's tokens; --teacher none needs a weight above 0.",
        "[0, 1)",
    )
    num_slices: int = setting(256, "Number of SIGReg's random directions.", "[1, 65536]", tiny=64)


@configuration("Schedule")
@dataclass(frozen=True)
class Schedule:
    """Settings of AdamW, of linear warm-up and cosine decay, and of the length of training."""

    lr: float = setting(1e-3, "Highest learning rate.", "(0, 100]")
    weight_decay: float = setting(0.05, "Weight decay of AdamW.", "[0, 100]")
    warmup_epochs: float = setting(10, "Epochs of linear warm-up from `min_lr`.", "[0, 1e6]")
    min_lr: float = setting(1e-6, "Learning rate of the last step.", "[0, 100]")
    clip_grad: float = setting(10.0, "Clip the gradient to this norm.", "(0, 1e9]")
    batch_size: int = setting(128, "Clouds per step, over all processes.", "[1, 1e6]")
    epochs: float = setting(300, "Number of passes over the data.", "(0, 1e6]")
    max_steps: int | None = setting(None, "Number of steps; overrides epochs.", "[1, 1e9]")


SCHEDULE = tuple(part.name for part in fields(Schedule))


def _schedule(config: Schedule) -> dict[str, Any]:
    """Return only the settings of the schedule, as name -> value."""
    return {name: getattr(config, name) for name in SCHEDULE}


@configuration("Run")
@dataclass(frozen=True)
class RunConfig(Schedule):
    """Settings of every training run."""

    seed: int = setting(0, "Seed of all random numbers of the run.", "[0, 4e9]")
    scale: tuple[float, float] = setting(
        (0.8, 1.2),
        "Augmentation: scale each axis by a random factor in this range.",
        "(0, 1000] rising",
    )
    rotate: bool = setting(True, "Augmentation: rotate randomly about the up axis.")
    translate: float = setting(0.0, "Augmentation: largest shift per axis.", "[0, 1000]")
    mixed_precision: Literal["auto", "measure", "no", "bf16", "fp16"] = setting(
        "auto",
        "no: fp32; auto: bf16 on GPUs that support it and on CPUs with AMX, else no; measure: "
        "bf16 or no, whichever is faster in a short trial.",
    )
    compile: Literal["no", "yes", "auto"] = setting(
        "no", "Compile the transformer blocks; auto: only if a short trial shows that it is faster."
    )
    accumulate: int = setting(
        1, "Split each batch into this many micro-batches, to save memory.", "[1, 1e6]"
    )
    checkpoint_activations: bool = setting(
        False, "Recompute activations in the backward pass: saves memory, costs time."
    )
    log_every: int = setting(50, "Steps between log lines.", "[1, 1e9]")
    checkpoint_every: int = setting(1000, "Steps between checkpoints.", "[1, 1e9]")
    snapshot_every: int | None = setting(
        None,
        "Steps between stored copies of the encoder, for jepa3d curve; default: none.",
        "[1, 1e9]",
    )
    track: str | None = setting(None, "Also log to this tracker of Accelerate, such as wandb.")
    encoder: EncoderConfig = EncoderConfig()


# Settings that have no effect on the trained weights.
BOOKKEEPING = ("log_every checkpoint_every snapshot_every checkpoint_activations track").split()


@configuration("Stage I: the dVAE, the paper's teacher")
@dataclass(frozen=True)
class DVAEConfig(Schedule):
    """Settings of the dVAE; the defaults are those of ACT (Dong et al. 2023)."""

    lr: float = setting(5e-4, tiny=2e-3)
    weight_decay: float = setting(5e-4)
    warmup_epochs: float = setting(10, tiny=1)
    batch_size: int = setting(64, tiny=32)
    epochs: float = setting(300, tiny=15)
    num_points: int = setting(1024, "Points per cloud.", "[1, 1e7]", tiny=512)
    width: int = setting(384, "Width of the dVAE's tokens.", "[4, 16384]", tiny=96)
    num_codes: int = setting(8192, "Entries of the codebook.", "[1, 1e6]", tiny=512)
    tokenizer_dim: int = setting(128, "Width of the tokenizer.", "[1, 16384]", tiny=64)
    dgcnn_dim: int = setting(128, "Width of the DGCNNs.", "[1, 16384]", tiny=32)
    folding_dim: int = setting(512, "Width of the folding decoder.", "[1, 16384]", tiny=128)
    temperature: tuple[float, float] = setting(
        (1.0, 0.0625), "Temperature of the Gumbel-softmax: first and last value.", "(0, 1000]"
    )
    kl_weight: float = setting(
        0.1, "Final weight of the KL term; it rises from 0.", "[0, 1000]", tiny=0.01
    )
    backbone: str | None = setting(
        None, "Folder or Hub id of a frozen ViT between the DGCNNs; default: none."
    )


@configuration("Objective generative: masked autoencoder")
@dataclass(frozen=True)
class GenerativeConfig(Schedule):
    """Settings of the masked autoencoder; the defaults are Point-MAE's."""

    warmup_epochs: float = setting(10, tiny=2)
    batch_size: int = setting(128, tiny=32)
    epochs: float = setting(300, tiny=60)
    mask_ratio: float = setting(0.6, "Share of masked tokens.", "(0, 1)")
    decoder_depth: int = setting(4, "Number of decoder blocks.", "[1, 200]")


@configuration("Objective invariance: the same embedding for all views of a shape")
@dataclass(frozen=True)
class InvarianceConfig(Schedule):
    """Settings of the objective that gives all views of a shape the same embedding.

    The default loss weights are those of VICReg and LeJEPA.
    """

    warmup_epochs: float = setting(10, tiny=2)
    batch_size: int = setting(128, tiny=32)
    epochs: float = setting(300, tiny=30)
    regularizer: Literal["vicreg", "sigreg"] = setting(
        "sigreg", "The term of the loss that prevents collapse."
    )
    global_views: int = setting(2, "Number of views of the whole cloud.", "[1, 64]")
    partial_views: int = setting(
        2, "Number of views of a part: the points in a random ball.", "[0, 64]"
    )
    partial_ratio: tuple[float, float] = setting(
        (0.3, 0.6), "Range of a partial view's share of the points.", "(0, 1] rising"
    )
    projector_dim: int = setting(2048, "Hidden width of the projector.", "[1, 65536]", tiny=256)
    embedding_dim: int = setting(64, "Width of the embeddings.", "[1, 65536]")
    vicreg: tuple[float, float, float] = setting(
        (25.0, 25.0, 1.0), "Weights of invariance, variance and covariance.", "[0, 1e6]"
    )
    sigreg: float = setting(
        0.02, "Weight w of SIGReg; the invariance term has the weight 1 - w.", "[0, 1)"
    )
    num_slices: int = setting(256, "Number of SIGReg's random directions.", "[1, 65536]", tiny=64)


@configuration("Run")
@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Settings of one pretraining run."""

    warmup_epochs: float = setting(10, tiny=2)
    batch_size: int = setting(128, tiny=32)
    epochs: float = setting(300, tiny=60)
    rotate: bool = setting(True, tiny=False)
    data: tuple[str, ...] = setting(("synthetic",), "Sources of shapes (docs/data.md).")
    split: Literal["train", "test", "all"] = setting("train", "Split to train on.")
    up_axis: tuple[Literal["x", "y", "z"], ...] = setting(
        ("z",), "Up axis of the data: one for all sources, or one per source."
    )
    objective: str = setting(
        "jepa",
        "jepa; generative or invariance (competing methods); dvae (train only the paper's teacher); "
        "or your own function as package.module:function.",
    )
    teacher: tuple[str, ...] = setting(
        ("dvae",),
        "dvae, generative or invariance (trained first), ema (moving average of the student), "
        "untrained (random weights), none (no teacher), default (the encoder in the package), a "
        "run, a folder, a Hub id or package.module:function; the tokens of several teachers are "
        "concatenated.",
        tiny=("ema", "untrained"),
    )
    init: str | None = setting(
        None,
        "Initial weights of the student: generative or invariance (trained first), "
        "default (the encoder in the package), a run, a folder or a Hub id.",
    )
    sampler: SamplerConfig = SamplerConfig()
    decoder: DecoderConfig = DecoderConfig()
    target: TargetConfig = TargetConfig()
    dvae: DVAEConfig = DVAEConfig()
    generative: GenerativeConfig = GenerativeConfig()
    invariance: InvarianceConfig = InvarianceConfig()

    @property
    def stages(self) -> tuple[Rival, ...]:
        """Return the names of the networks that stage I must train first."""
        named = (*self.teacher, self.init) if self.objective == "jepa" else ()
        return tuple(name for name in STAGE_ONE if name in named)

    def __post_init__(self) -> None:
        """If the run's objective is in `STAGE_ONE`, copy the run's schedule into the group of this
        objective.
        """
        if self.objective in STAGE_ONE:
            group = replace(getattr(self, self.objective), **_schedule(self))
            object.__setattr__(self, self.objective, group)

    def schedule(self, objective: str) -> Schedule:
        """Return the schedule of an objective: for the run's own objective, the run's schedule; for
        any other objective, the schedule in its group.
        """
        return self if objective == self.objective else getattr(self, objective)

    def stage(self, name: str) -> "PretrainConfig":
        """Return the settings with which stage I trains the network `name`.

        The schedule is the one in the group `name`, and no snapshots are stored.
        """
        return replace(self, objective=name, snapshot_every=None, **_schedule(getattr(self, name)))


@configuration("Run")
@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Settings of classification; the defaults are those of Point-MAE and ACT on ScanObjectNN.

    `encoder` is used only for training from scratch: with `init`, the loaded encoder has its own
    settings.
    """

    lr: float = 5e-4
    warmup_epochs: float = setting(10, tiny=2)
    batch_size: int = 32
    epochs: float = setting(300, tiny=30)
    scale: tuple[float, float] = (1.0, 1.0)
    data: str = setting("", "Labelled shapes with a test split (docs/data.md).")
    labels_key: str = setting("labels", "Name of the array of labels in an .npz file.")
    up_axis: Literal["x", "y", "z"] = setting("z", "Up axis of the data.")
    init: str | None = setting(
        None,
        "The pretrained encoder: default (the one in the package), a run, a folder or a Hub id. "
        "Without --init, training starts from scratch.",
    )
    num_points: int | None = setting(None, "Points per cloud; default: the encoder's.", "[1, 1e7]")
    num_groups: int | None = setting(
        None, "Patches per cloud; default: the encoder's.", "[1, 65536]"
    )
    trained: Literal["all", "head", "head_first"] = setting(
        "all",
        "all: train all weights; head: keep the encoder frozen; head_first: fit a linear "
        "head to the frozen encoder's vectors, then train all weights.",
    )
    layer_decay: float = setting(
        1.0, "Learning rate of each block, divided by that of the next block.", "(0, 1]"
    )
    dropout: float = setting(0.5, "Dropout in the head.", "[0, 1)")
    label_smoothing: float = setting(0.0, "Label smoothing of the loss.", "[0, 1)")
    labels: float = setting(1.0, "Share of each class's labels to use.", "(0, 1]")
    validation: float = setting(
        0.2, "Share of the used labels to hold out if the data has no validation split.", "[0, 1)"
    )
    select: Literal["validation", "last", "best-on-test"] = setting(
        "validation", "How to choose the epoch to keep (docs/protocols.md)."
    )
    votes: int = setting(
        1,
        "If above 1: average the logits of this many scaled and shifted copies of a test shape.",
        "[1, 10000]",
    )


@configuration("Run")
@dataclass(frozen=True)
class SegmentConfig(FinetuneConfig):
    """Settings of part segmentation; the defaults are those of Point-MAE on ShapeNetPart."""

    lr: float = 2e-4
    batch_size: int = 16
    rotate: bool = False
    scale: tuple[float, float] = (0.8, 1.25)
    translate: float = 0.1
    layers: tuple[int, int, int] | None = setting(
        None,
        "The three blocks whose tokens the head uses; default: the last block of each third of "
        "the depth.",
        "[0, 200]",
    )


@configuration("Run")
@dataclass(frozen=True)
class FewshotConfig(FinetuneConfig):
    """Settings of few-shot episodes; the defaults are those of Point-MAE on ModelNet40."""

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
        "finetune: train a network per episode; ncm: nearest class mean of frozen features; "
        "logistic: logistic regression on frozen features.",
    )


# training command -> the dataclass of its settings
KINDS = {
    "pretrain": PretrainConfig,
    "classify": FinetuneConfig,
    "segment": SegmentConfig,
    "fewshot": FewshotConfig,
}


def preset(name: str, kind: Any = PretrainConfig) -> dict[str, Any]:
    """Return the settings that a preset changes, as a nested dictionary.

    kind: the dataclass of settings. Raises ValueError for an unknown preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        hint, known = nearest(name, PRESETS), ", ".join(PRESETS)
        raise ValueError(f"preset {name!r} is unknown{hint}; use {known}")
    found = {}
    for part in fields(kind):
        if is_dataclass(part.type):
            found[part.name] = preset(name, part.type)
        elif name in part.metadata.get("presets", {}):
            found[part.name] = part.metadata["presets"][name]
    return {key: value for key, value in found.items() if value != {}}


def resolve(*layers: dict) -> PretrainConfig:
    """Merge dictionaries of settings, and return them as the settings of a pretraining run.

    A later dictionary overrides the earlier ones. Every objective of stage I has a group of
    settings with its own schedule. For example, `generative.max_steps` is the number of steps of
    the masked autoencoder. If the run's objective is `generative`, the run and the group
    `generative` have the same schedule, so `max_steps` and `generative.max_steps` are the same
    setting. Its default is the default of the group. If one dictionary has both names, the value of
    `generative.max_steps` is used. Raises ValueError as `plain.py::from_dict` does.
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
