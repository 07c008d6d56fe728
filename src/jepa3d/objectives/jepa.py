"""3D-JEPA: predict, in embedding space, what a teacher says about blocks that the encoder does not see.

Hu, Cheng, Xie, Li, Zhu, "3D-JEPA: A Joint Embedding Predictive Architecture for 3D Self-Supervised
Representation Learning", arXiv 2409.15803. docs/method.md maps its equations to these lines.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa3d.config import PretrainConfig
from jepa3d.models import sampling
from jepa3d.models.decoder import ContextAwareDecoder
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.sampling import TokenSample
from jepa3d.models.teacher import Teacher, ema_update
from jepa3d.models.tokenizer import group
from jepa3d.objectives.collapse import collapse_figures
from jepa3d.ops import BatchGenerator, gather_points


class JEPAOutput(NamedTuple):
    loss: Tensor  # scalar, mean over blocks of 1 - cos
    prediction: Tensor  # B A T E
    target: Tensor  # B A T E
    sample: TokenSample
    patch_index: Tensor  # B M K, the points of each patch


class JEPA(nn.Module):
    """Encoder on the context only, decoder, one linear projection to the teacher's width, teacher on all tokens.

    >>> objective = JEPA(PretrainConfig(), encoder, teacher)
    >>> output = objective(points, BatchGenerator(seed=0, step=0))    # points B N 3
    >>> output.loss.backward()
    """

    def __init__(self, config: PretrainConfig, encoder: PointEncoder, teacher: Teacher):
        super().__init__()
        self.encoder, self.teacher = encoder, teacher
        settings = config.decoder
        self.decoder = ContextAwareDecoder(
            encoder.width,
            settings.depth,
            config.encoder.num_heads,
            config.encoder.mlp_ratio,
            settings.cross_attention,
            settings.stacked,
        )
        self.projection = nn.Linear(encoder.width, teacher.width)
        self.project_target, self.target_unit = config.target.project, config.target.unit
        self.momentum = config.target.momentum
        if self.project_target and teacher.width != encoder.width:
            raise ValueError(
                f"target.project applies one layer to prediction and target, so the teacher's width {teacher.width} "
                f"must equal encoder.embed_dim {encoder.width}"
            )
        self.sampler = make_sampler(config)

    def forward(self, points: Tensor, generator: BatchGenerator, progress: float = 0.0) -> JEPAOutput:
        """One pass on points B N 3; `progress` (of every objective) plays no part before `after_step`."""
        encoder = self.encoder
        centers, patches, index = group(points, encoder.num_groups, encoder.group_size, generator.stream("group"))
        sample = self.sampler(centers, generator.stream("sampler"))
        prediction = self.predict(patches, centers, sample, generator.stream("drop_path"))
        target = gather_points(self.teacher(patches, centers), sample.target)
        if self.project_target:
            target = self.projection(target)
        return JEPAOutput(cosine_loss(prediction, target, self.target_unit), prediction, target, sample, index)

    def predict(
        self, patches: Tensor, centers: Tensor, sample: TokenSample, generator: BatchGenerator | None = None
    ) -> Tensor:
        """Predicted teacher tokens B A T E; only context patches are read."""
        encoder, decoder = self.encoder, self.decoder
        position = encoder.position(gather_points(centers, sample.context))
        target_position = encoder.position(gather_points(centers, sample.target))
        tokens = self.context_tokens(patches, sample)
        if len(decoder.blocks):
            context = encoder.hidden_states(tokens, position, sample.mask, generator)[-1]
            return self.projection(decoder(context, sample.mask, position, target_position))
        # Decoder depth 0 (Table V): context and mask tokens go through the encoder together.
        x, position, mask = decoder.assemble(tokens, sample.mask, position, target_position)
        encoded = encoder.hidden_states(x, position, mask, generator, passes=len(x) // len(tokens))[-1]
        return self.projection(decoder.predictions(encoded, target_position))

    def context_tokens(self, patches: Tensor, sample: TokenSample) -> Tensor:
        """The student's tokens B V C; packed, so that padding costs nothing and enters no BatchNorm."""
        rows = torch.arange(len(patches), device=patches.device)[:, None].expand_as(sample.context)
        packed = self.encoder.tokenizer(patches[rows[sample.mask], sample.context[sample.mask]])
        tokens = packed.new_zeros(*sample.mask.shape, packed.shape[-1])
        return tokens.index_put((sample.mask,), packed)

    def after_step(self, progress: float) -> None:
        """Move an EMA teacher; a frozen one stays. `progress` is the finished fraction of the run, 0 to 1."""
        if self.teacher.averages:
            first, last = self.momentum
            ema_update(self.teacher.module, self.encoder, first + (last - first) * progress)

    def metrics(self, output: JEPAOutput) -> dict[str, float]:
        """Collapse figures, the mean number of context tokens, and the share of points they have in common."""
        figures = collapse_figures(output.prediction, output.target, self.target_unit)
        tokens = output.sample.mask.sum(1).float().mean().item()
        shared = sampling.shared_points(output.patch_index, output.sample).item()
        return figures | {"context_tokens": tokens, "shared_points": shared}


def cosine_loss(prediction: Tensor, target: Tensor, unit: str = "token") -> Tensor:
    """Mean over blocks of 1 - cos(prediction, target), B A T E (paper, equation of III-E with its sign corrected).

    `unit` "token": cosine of each token, averaged over the block; "block": of the block's tokens as one vector.
    """
    if unit == "block":
        prediction, target = prediction.flatten(-2), target.flatten(-2)
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


def make_sampler(config: PretrainConfig):
    """The configured sampler as a function of (centers, generator)."""
    settings = config.sampler
    if settings.name in ("random", "one_block"):
        return partial(getattr(sampling, settings.name), mask_ratio=settings.mask_ratio)
    options = {name: getattr(settings, name) for name in ("num_targets", "target_ratio", "min_context")}
    if settings.context_ratio is not None:
        options["context_ratio"] = settings.context_ratio
    return partial(getattr(sampling, settings.name), **options)
