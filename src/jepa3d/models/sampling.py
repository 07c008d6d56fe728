"""Samplers choose at random which tokens of a cloud are context and which are targets.

A sampler takes token centres and a random generator. Tokens are chosen separately for each cloud of
a batch, but the sizes of blocks are chosen once per batch, so that targets need no padding. Context
and targets never share a token. Contexts differ in length and are padded: a padding entry repeats a
token of the same context and is False in `mask`. In this file, "the paper" is the 3D-JEPA paper
(docs/method.md).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from jepa3d.models.layout import Ragged
from jepa3d.ops import (
    BatchGenerator,
    farthest_point_sample,
    gather_points,
    squared_distance,
    uniform,
    uniform_scalar,
)
from jepa3d.shapes import Bool, Centers, Float, Indices, Int

_REDRAWS = 20  # greatest number of redraws for a cloud whose context is too small

Generator = torch.Generator | BatchGenerator


class TokenSample(NamedTuple):
    # B clouds; V: length of the longest context; A: targets per cloud; T: tokens per target
    context: Tensor  # B V, token indices
    mask: Tensor  # B V, False at padding
    target: Tensor  # B A T, token indices
    # Number of True entries in `mask`; an int, so that later code on the CPU need not wait until
    # the GPU has counted them.
    num_context: int

    def layout(self) -> Ragged:
        """Return the layout that packs the batch's contexts as rows [num_context, C]."""
        return Ragged(self.mask, self.num_context)


def check_sample(sample: TokenSample) -> None:
    """Check what a sampler returned; users can write their own samplers.

    Raises ValueError if the context of a cloud contains a token of the cloud's targets, or if
    `num_context` is wrong.
    """
    rows = sample.mask.sum()
    seen = (sample.context[:, :, None, None] == sample.target[:, None]).flatten(2).any(2)
    if rows != sample.num_context or (seen & sample.mask).any():
        raise ValueError(
            "sampler.name: a sampler must return a TokenSample whose context and target share no token, and whose "
            f"num_context counts the True entries of mask (num_context {sample.num_context}, True entries {int(rows)})"
        )


def multi_block(
    centers: Centers,
    generator: Generator,
    num_targets: int = 4,
    target_ratio: tuple[float, float] = (0.15, 0.2),
    context_ratio: tuple[float, float] = (0.85, 1.0),
    min_context: int = 4,
) -> TokenSample:
    """Sample several target blocks, and one context block without the tokens of the targets: the
    paper's sampler (section III-C).

    A block consists of the tokens nearest to its centre. The centres of target blocks are
    farthest-point samples of the token centres, so that target blocks overlap little; the centre of
    the context block is a random token. centers: [B, M, 3]. generator: source of all random draws.
    num_targets: target blocks per cloud. target_ratio: lowest and highest size of a target block,
    as shares of the M tokens. context_ratio: lowest and highest size of the context block before
    target tokens are removed, also as shares of the M tokens. min_context: a cloud whose context
    has fewer tokens is sampled again. Raises ValueError if a context is still too small after 20
    redraws, if num_targets exceeds M, or for a ratio outside 0 < low <= high <= 1.
    """
    num_tokens = centers.shape[1]
    if num_targets > num_tokens:
        raise ValueError(f"num_targets {num_targets} exceeds the {num_tokens} tokens")
    target_size = max(1, round(_fraction(target_ratio, generator) * num_tokens))
    context_size = max(1, round(_fraction(context_ratio, generator) * num_tokens))

    def draw() -> tuple[Tensor, Tensor]:
        seeds = farthest_point_sample(centers, num_targets, generator)
        target = _balls(centers, gather_points(centers, seeds), target_size)
        block = _balls(centers, _random_token(centers, generator), context_size)
        return _membership(block, num_tokens) & ~_membership(target, num_tokens), target

    return _enough(draw, num_tokens, min_context)


def random(centers: Centers, generator: Generator, mask_ratio: float = 0.25) -> TokenSample:
    """Sample int(mask_ratio * M) random tokens, but at least one, as the target; all other tokens
    are the context (random masking, the paper's Table IV).

    M is the number of tokens of a cloud. Raises ValueError unless 0 < mask_ratio < 1.
    """
    order = uniform(generator, centers.shape[:2], centers.device).argsort(1)
    size = max(1, int(_fraction((mask_ratio, mask_ratio), None) * centers.shape[1]))
    return _complement(order[:, :size], centers.shape[1])


def one_block(centers: Centers, generator: Generator, mask_ratio: float = 0.25) -> TokenSample:
    """Sample one block of int(mask_ratio * M) tokens, but at least one, as the target: the tokens
    nearest to a random token. All other tokens are the context (one-block masking, the paper's
    Table IV).

    M is the number of tokens of a cloud. Raises ValueError unless 0 < mask_ratio < 1.
    """
    size = max(1, int(_fraction((mask_ratio, mask_ratio), None) * centers.shape[1]))
    start = _random_token(centers, generator)
    return _complement(_balls(centers, start, size)[:, 0], centers.shape[1])


def sequence(
    centers: Centers,
    generator: Generator,
    num_targets: int = 4,
    target_ratio: tuple[float, float] = (0.15, 0.2),
    context_ratio: tuple[float, float] = (0.4, 0.75),
    min_context: int = 4,
) -> TokenSample:
    """Sample targets and context as spans of consecutive tokens on a greedy walk through the cloud:
    Point-JEPA's sampler (Saito et al. 2024, section 3.2).

    The walk starts at the token whose coordinates have the smallest sum, and always goes to the
    nearest token not yet visited. Two shares are drawn once per batch: s from the range
    `target_ratio`, and c from the range `context_ratio`. Each target is a span of int(s * M) of the
    M tokens, at a random place of the walk. Then the tokens of all targets are removed from the
    walk, and the context is a span of int(c * R) of the R remaining tokens. So a context may lie on
    both sides of a target. Targets and contexts have at least one token. The arguments are those of
    `multi_block`, but `context_ratio` is the range of a share of the R remaining tokens.

    Raises ValueError if a context is still too small after 20 redraws, or for a ratio outside
    0 < low <= high <= 1.
    """
    batch, num_tokens, _ = centers.shape
    order = _nearest_walk(centers)
    size = max(1, int(_fraction(target_ratio, generator) * num_tokens))
    share = _fraction(context_ratio, generator)

    def draw() -> tuple[Tensor, Tensor]:
        start = (
            uniform(generator, (batch, num_targets), centers.device) * (num_tokens - size + 1)
        ).long()
        places = (start[..., None] + torch.arange(size, device=centers.device)).flatten(1)
        left = ~_membership(places, num_tokens)  # True at tokens of no target, in the walk's order
        count = left.sum(1, keepdim=True)
        length = (share * count).long().clamp_min(1)
        first = (uniform(generator, (batch, 1), centers.device) * (count - length + 1)).long()
        rank = left.cumsum(1) - 1
        run = left & (rank >= first) & (rank < first + length)
        return torch.zeros_like(run).scatter_(1, order, run), order.gather(1, places).view(
            batch, num_targets, size
        )

    return _enough(draw, num_tokens, min_context)


def shared_points(patches: Int[Tensor, "b m k"], sample: TokenSample) -> Float[Tensor, ""]:
    """Compute the share of the context's points that also lie in a target patch.

    patches: point indices [B, M, K]. Context and targets share no token, but their patches share
    points where they overlap, and these points reveal a part of the targets. Returns a scalar
    tensor.
    """
    num_points = int(patches.max()) + 1
    rows = torch.arange(len(patches), device=patches.device)[:, None]
    target = _membership(patches[rows, sample.target.flatten(1)], num_points)
    # padding repeats a token of the context, so it adds no points
    context = _membership(patches[rows, sample.context], num_points)
    return (context & target).sum() / context.sum()


def _fraction(ratio: tuple[float, float], generator: Generator | None) -> float:
    """Draw one fraction in [low, high] for the whole batch.

    Raises ValueError unless 0 < low <= high <= 1.
    """
    low, high = ratio
    if not 0 < low <= high <= 1:
        raise ValueError(f"a ratio {ratio} must satisfy 0 < low <= high <= 1")
    return low if low == high else low + (high - low) * uniform_scalar(generator)


def _random_token(centers: Centers, generator: Generator) -> Float[Tensor, "b 1 3"]:
    """Return the centre of a random token of each cloud."""
    pick = (uniform(generator, (len(centers), 1), centers.device) * centers.shape[1]).long()
    return gather_points(centers, pick)


def _balls(centers: Centers, around: Float[Tensor, "b a 3"], size: int) -> Int[Tensor, "b a t"]:
    """Find the `size` tokens nearest to each point of `around` [B, A, 3]; returns indices
    [B, A, T].
    """
    return squared_distance(around, centers).topk(size, largest=False).indices


def _membership(index: Indices, num_tokens: int) -> Bool[Tensor, "b m"]:
    """Return a mask [B, M] that is True at the tokens whose indices are in `index` [B, ...]."""
    inside = torch.zeros(len(index), num_tokens, dtype=torch.bool, device=index.device)
    return inside.scatter_(1, index.flatten(1), True)


def _compact(
    context: Bool[Tensor, "b m"], counts: list[int]
) -> tuple[Int[Tensor, "b v"], Bool[Tensor, "b v"]]:
    """Find the True entries of a mask [B, M]. Returns their indices [B, V], and a mask [B, V] that
    is False at padding.

    counts: the number of True entries of each cloud; V is the largest of these numbers. Padding
    repeats the first index of the same cloud.
    """
    longest = max(counts)
    index = context.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :longest]
    mask = torch.arange(longest, device=context.device) < context.sum(1, keepdim=True)
    return torch.where(mask, index, index[:, :1]), mask


def _complement(target: Int[Tensor, "b t"], num_tokens: int) -> TokenSample:
    """Return a sample with one target block (indices [B, T]) and all other tokens as context.

    Raises ValueError if all tokens are targets.
    """
    batch, size = target.shape
    if size >= num_tokens:
        raise ValueError(f"mask_ratio leaves no context: all {num_tokens} tokens are targets")
    counts = batch * [num_tokens - size]
    return TokenSample(
        *_compact(~_membership(target, num_tokens), counts), target[:, None], sum(counts)
    )


def _enough(draw, num_tokens: int, min_context: int) -> TokenSample:
    """Call `draw` until every context has at least `min_context` tokens.

    draw: a function that returns a mask [B, M] of the context tokens, and the target indices
    [B, A, T]. Only clouds with too few context tokens take the result of a repeated call. Raises
    ValueError if a context is still too small after `_REDRAWS` repeated calls.
    """
    context, target = draw()
    for attempt in range(_REDRAWS + 1):
        lengths = context.sum(1)
        counts = lengths.tolist()  # here the CPU waits for the GPU, once per draw
        if min(counts) >= min_context:
            return TokenSample(*_compact(context, counts), target, sum(counts))
        if attempt < _REDRAWS:
            short = (lengths < min_context)[:, None]
            new_context, new_target = draw()
            context = torch.where(short, new_context, context)
            target = torch.where(short[..., None], new_target, target)
    raise ValueError(
        f"after {_REDRAWS} new random draws, {target.shape[1]} targets of {target.shape[2]} tokens still leave "
        f"fewer than min_context = {min_context} of {num_tokens} tokens in a context; "
        f"use fewer or smaller targets (num_targets, target_ratio)"
    )


def _nearest_walk(centers: Centers) -> Int[Tensor, "b m"]:
    """Order the tokens by a greedy nearest-neighbour walk; returns indices [B, M]."""
    distance = squared_distance(centers, centers)
    rows = torch.arange(len(centers), device=centers.device)
    current = centers.sum(-1).argmin(1)
    order = []
    for _ in range(centers.shape[1]):
        order.append(current)
        distance[rows, :, current] = torch.inf
        current = distance[rows, current].argmin(1)
    return torch.stack(order, 1)
