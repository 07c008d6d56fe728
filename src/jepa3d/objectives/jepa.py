"""3D-JEPA: predict a teacher's embeddings of blocks that the encoder does not see.

Hu, Cheng, Xie, Li, Zhu, "3D-JEPA: A Joint Embedding Predictive Architecture for 3D Self-Supervised
Representation Learning", arXiv 2409.15803. docs/method.md maps the paper's equations to this code.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa3d.config import PretrainConfig
from jepa3d.data.transforms import random_rotate, random_view
from jepa3d.models import sampling
from jepa3d.models.decoder import ContextAwareDecoder, token_ranks
from jepa3d.models.encoder import PointEncoder, pool
from jepa3d.models.sampling import TokenSample
from jepa3d.models.teacher import Teacher, ema_update, normalise
from jepa3d.models.tokenizer import group, groups_at
from jepa3d.objectives.collapse import collapse_figures, position_loss, row_figures
from jepa3d.objectives.regularizers import sigreg
from jepa3d.ops import BatchGenerator, gather_points, unit_sphere
from jepa3d.plain import is_code, load_code


class JEPAOutput(NamedTuple):
    # Axes: B clouds (see `JEPA.forward`), A target blocks of T tokens, M tokens per cloud, K points
    # per patch, n context tokens in the whole batch; C is the width of the encoder, E that of the
    # teacher.
    # scalar: the cosine loss. If the settings add SIGReg, the view term or both, `loss` is the
    # weighted sum of the cosine loss and these terms.
    loss: Tensor
    prediction: Tensor  # B A T E
    target: Tensor  # B A T E
    sample: TokenSample
    centers: Tensor  # B M 3, patch centres of all tokens
    patch_index: Tensor  # B M K, indices of each patch's points
    encoded: Tensor  # n C, the encoder's output for all context tokens of the batch
    sigreg: Tensor | None = None  # the SIGReg term before weighting
    view: Tensor | None = None  # the view term (see `JEPA.forward`) before weighting


class JEPA(nn.Module):
    """The objective of 3D-JEPA: the encoder sees the context, a decoder predicts the targets, and a
    linear layer projects the predictions to the teacher's width. The teacher sees all patches.

    If `teacher` is None, a second run of the encoder, on all tokens and with gradients, computes
    the targets. The regulariser SIGReg, which is applied to all tokens of the second run, then
    prevents collapse, as in LeJEPA. With a teacher, SIGReg is optional and is applied to the
    encoded context. `target.project` applies the linear layer to the targets too. Raises ValueError
    if `target.project` is set and the widths of encoder and teacher differ.

    >>> objective = JEPA(PretrainConfig(), encoder, teacher)
    >>> output = objective(points, BatchGenerator(seed=0, step=0))    # points [B, N, 3]
    >>> output.loss.backward()
    """

    def __init__(self, config: PretrainConfig, encoder: PointEncoder, teacher: Teacher | None):
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
            encoder.position_every_block,
            config.encoder.qkv_bias,
            settings.isolated,
            settings.ranks,
        )
        target_width = teacher.width if teacher else encoder.width
        self.projection = nn.Linear(encoder.width, target_width)
        self.settings = config.target
        if self.settings.project and target_width != encoder.width:
            raise ValueError(
                f"target.project applies one layer to prediction and target, so the teacher's width {target_width} "
                f"must equal encoder.embed_dim {encoder.width}"
            )
        self.sampler, self.masks = make_sampler(config), config.sampler.masks
        if self.settings.view:
            assert teacher
            hidden = 4 * encoder.width
            self.view_head = nn.Sequential(
                nn.Linear(2 * encoder.width, hidden),
                nn.GELU(),
                nn.Linear(hidden, 2 * teacher.width),
            )

    def forward(
        self, points: Tensor, generator: BatchGenerator, progress: float = 0.0, *cached: Tensor
    ) -> JEPAOutput:
        """Compute the loss for points [B, N, 3].

        generator: source of all random draws. progress: not used here. training/loop.py passes this
        number to every objective, since the dVAE's objective needs it.
        cached: either nothing, or three tensors that were computed before training
        (training/cache.py): the point indices of the centers [B, M], those of the patches
        [B, M, K], and the teacher's tokens [B, M, E].

        With the view term (`target.view`), `points` must hold at least the encoder's `num_points`
        points per cloud, in farthest point order. Context and target tokens then come from a
        damaged view of each cloud (`random_view`). A second head predicts, from the encoded context
        of this view, the teacher's vector of the undamaged cloud (`teacher_vectors`); the loss of
        this prediction is the view term.

        With several masks per cloud (`sampler.masks`, as in AsymDSD, arXiv 2506.21724), B in the
        shapes of the output is the number of clouds times `masks`.
        """
        encoder = self.encoder
        view_target = None
        if self.settings.view:
            undamaged = unit_sphere(
                random_rotate(points[:, : encoder.num_points], generator.stream("view/turn"))
            )
            view_target = self.teacher_vectors(undamaged, generator.stream("view/group"))
            points = random_view(points, encoder.num_points, generator.stream("student"))
        if cached:
            grouped = groups_at(points, *cached[:2])
        else:
            grouped = group(
                points, encoder.num_groups, encoder.group_size, generator.stream("group")
            )
        centers, patches, index = grouped
        repeat_masks = partial(torch.repeat_interleave, repeats=self.masks, dim=0)
        repeated_centers = repeat_masks(centers)
        repeated_generator = generator.repeated(self.masks)
        sample = self.sampler(repeated_centers, repeated_generator.stream("sampler"))
        # The teacher runs first, so that its memory is freed before the activations of the encoder
        # and the decoder are stored for the backward pass.
        if cached:
            tokens = cached[2].float()
        elif self.teacher:
            tokens = self.teacher(patches, centers)
        else:
            tokens = encoder.features(
                patches, centers, generator=generator.stream("target_drop_path")
            )[-1]
        prediction, encoded = self.predict(
            repeat_masks(patches),
            repeated_centers,
            sample,
            repeated_generator.stream("drop_path"),
        )
        settings = self.settings
        target = gather_points(repeat_masks(tokens), sample.target)
        if settings.project:
            target = self.projection(target)
        loss = cosine_loss(prediction, target, settings.unit)
        penalty = None
        if settings.sigreg:
            student_tokens = encoded if self.teacher else tokens.flatten(0, 1)
            penalty = sigreg(student_tokens, generator.stream("sigreg"), settings.num_slices)
            loss = (1 - settings.sigreg) * loss + settings.sigreg * penalty
        view_loss = None
        if view_target is not None:
            view_prediction = self.view_head(pool_rows(encoded, sample))
            view_loss = cosine_loss(view_prediction, repeat_masks(view_target))
            loss = loss + settings.view * view_loss
        return JEPAOutput(
            loss,
            prediction,
            target,
            sample,
            repeated_centers,
            repeat_masks(index),
            encoded,
            penalty,
            view_loss,
        )

    @torch.no_grad()
    def teacher_vectors(self, points: Tensor, generator: BatchGenerator) -> Tensor:
        """Compute the teacher's vectors [B, 2E] of whole clouds [B, N, 3]: the mean and max of the
        teacher's tokens of a cloud, standardised over the batch.
        """
        assert self.teacher
        grouped = group(points, self.encoder.num_groups, self.encoder.group_size, generator)
        return normalise(pool(self.teacher(grouped.patches, grouped.centers)), "standardize")

    def predict(
        self,
        patches: Tensor,
        centers: Tensor,
        sample: TokenSample,
        generator: BatchGenerator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict the teacher's target tokens from the patches of the context and the centers of
        the targets.

        patches: [B, M, K, 3]. centers: [B, M, 3]. sample: the indices of context and targets.
        generator: source of random numbers for drop-path. Returns predictions [B, A, T, E], and the
        encoded context packed as rows [n, C].
        """
        encoder, decoder, layout = self.encoder, self.decoder, sample.layout()
        tokens, position = encoder.visible(patches, centers, sample.context, layout)
        target_position = encoder.position(gather_points(centers, sample.target))
        if len(decoder.blocks):
            context = encoder.hidden_states(tokens, position, layout, generator)[-1]
            if decoder.position:  # set by `decoder.ranks`: positions are ranks, not coordinates
                rank_positions = decoder.position(token_ranks(centers))
                position = layout.pack(gather_points(rank_positions, sample.context))
                target_position = gather_points(rank_positions, sample.target)
            return self.projection(decoder(context, layout, position, target_position)), context
        # Without a decoder (Table V of the paper), context and mask tokens go through the encoder
        # together. In its output, the first rows are the context of the first decoder pass.
        x, position, joint = decoder.assemble(tokens, layout, position, target_position)
        encoded = encoder.hidden_states(
            joint.every_pass(x), joint.every_pass(position), joint, generator
        )[-1]
        return self.projection(decoder.predictions(encoded, target_position)), encoded[
            : layout.num_rows
        ]

    def after_step(self, progress: float) -> None:
        """If the teacher has a moving average of the encoder, update it; frozen networks do not
        change.

        progress: the finished share of the run, 0 to 1.
        """
        if self.teacher and self.teacher.average is not None:
            first, last = self.settings.momentum
            ema_update(self.teacher, self.encoder, first + (last - first) * progress)

    def metrics(self, output: JEPAOutput) -> dict[str, float]:
        """Return metrics for the log: measures of collapse, the loss of a prediction from positions
        alone (only for `target.unit` "token"), the view term and SIGReg before weighting (if used),
        the mean number of context tokens, and the share of the context's points that also lie in
        target patches.
        """
        metrics = collapse_figures(output.prediction, output.target, self.settings.unit)
        if self.settings.unit == "token":
            metrics["position_loss"] = position_loss(
                output.target, gather_points(output.centers, output.sample.target)
            )
        metrics |= row_figures("encoded", output.encoded.detach())
        if output.view is not None:
            metrics["view"] = output.view.item()
        if output.sigreg is not None:
            metrics["sigreg"] = output.sigreg.item()
        tokens = output.sample.mask.sum(1).float().mean().item()
        shared = sampling.shared_points(output.patch_index, output.sample).item()
        return metrics | {"context_tokens": tokens, "shared_points": shared}


def cosine_loss(prediction: Tensor, target: Tensor, unit: str = "token") -> Tensor:
    """Compute the mean over blocks of 1 - cos(prediction, target): the equation in the paper's
    section III-E, with its sign corrected.

    The paper's equation is a similarity, which training would have to maximise. prediction, target:
    tokens [B, A, T, E]. unit: "token" takes the cosine of each token and
    averages over the block; "block" concatenates the tokens of a block and takes one cosine. With
    "token", prediction and target may also be vectors [B, E].
    """
    if unit == "block":
        prediction, target = prediction.flatten(-2), target.flatten(-2)
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


def pool_rows(rows: Tensor, sample: TokenSample) -> Tensor:
    """Pool packed rows [n, C] to the mean and max of each cloud's context tokens, [B, 2C]."""
    tokens, missing = sample.layout().pad(rows), ~sample.mask[..., None]
    mean = tokens.sum(1) / sample.mask.sum(1, keepdim=True)  # padding adds 0
    return torch.cat([mean, tokens.masked_fill(missing, -torch.inf).amax(1)], -1)


def make_sampler(config: PretrainConfig):
    """Return the sampler that the run's settings choose: a function of (centers, generator) that
    returns a `TokenSample`.
    """
    settings = config.sampler
    if is_code(settings.name):
        return partial(load_code(settings.name), settings=settings)
    if settings.name in ("random", "one_block"):
        return partial(getattr(sampling, settings.name), mask_ratio=settings.mask_ratio)
    options = {
        name: getattr(settings, name) for name in ("num_targets", "target_ratio", "min_context")
    }
    if settings.context_ratio is not None:
        options["context_ratio"] = settings.context_ratio
    return partial(getattr(sampling, settings.name), **options)
