"""Context and targets: properties that the samplers of the most similar methods do not have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa3d.models import sampling
from jepa3d.models.sampling import TokenSample, multi_block, one_block, random, sequence
from jepa3d.ops import BatchGenerator

B = 8


def clouds(num_tokens: int, batch: int = B, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, num_tokens, 3, generator=torch.Generator().manual_seed(seed))


def same_cloud(num_tokens: int) -> torch.Tensor:
    return clouds(num_tokens, 1).expand(B, -1, -1)


def contexts(sample) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(sample.context, sample.mask, strict=True)]


tokens, seeds = st.integers(16, 96), st.integers(0, 2**31)


@st.composite
def blocks(draw):
    """Draw settings of a block sampler that always leave some context."""
    count = draw(st.integers(1, 4))
    high = draw(st.floats(0.1, 0.6 / count))
    return {
        "num_targets": count,
        "target_ratio": (draw(st.floats(0.05, high)), high),
        "context_ratio": (draw(st.floats(0.8, 0.9)), draw(st.floats(0.9, 1))),
        "min_context": 1,
    }


def check(sample, num_tokens: int) -> None:
    """Check the properties of every sample of every sampler."""
    for row, mask, targets in zip(*sample[:3], strict=True):
        context = row[mask].tolist()
        assert context
        assert len(set(context)) == len(context)
        assert not set(context) & set(targets.flatten().tolist())
        assert set(row[~mask].tolist()) <= set(context), (
            "padding repeats a token of the same context"
        )
        assert all(len(set(block)) == len(block) for block in targets.tolist())
        assert min(context) >= 0
        assert targets.min() >= 0
        assert max(max(context), targets.max()) < num_tokens
    assert sample.num_context == sample.mask.sum()
    assert sample.mask.sum(1).max() == sample.mask.shape[1], (
        "no more padding than the longest context needs"
    )


# ------------------------------------------------------------------------------ every block sampler


@pytest.mark.parametrize("sampler", [multi_block, sequence])
@settings(max_examples=25, deadline=None)
@given(num_tokens=tokens, seed=seeds, options=blocks())
def test_contexts_and_targets_share_no_token_and_have_the_sizes_asked(
    sampler, num_tokens, seed, options
):
    if sampler is sequence:  # overlaps of independent spans vary more, so targets are smaller
        options = options | {"target_ratio": tuple(ratio / 2 for ratio in options["target_ratio"])}
    sample = sampler(clouds(num_tokens, seed=seed), BatchGenerator(seed), **options)
    check(sample, num_tokens)
    whole = int if sampler is sequence else round
    low, high = (max(1, whole(ratio * num_tokens)) for ratio in options["target_ratio"])
    assert sample.target.shape[:2] == (B, options["num_targets"])
    assert low <= sample.target.shape[2] <= high
    context_size = round(options["context_ratio"][1] * num_tokens)
    assert sample.mask.shape[1] <= context_size


@pytest.mark.parametrize("sampler", [random, one_block])
@settings(max_examples=25, deadline=None)
@given(num_tokens=tokens, seed=seeds, ratio=st.floats(0.01, 0.95))
def test_random_and_one_block_split_the_tokens_in_two(sampler, num_tokens, seed, ratio):
    sample = sampler(clouds(num_tokens, seed=seed), BatchGenerator(seed), mask_ratio=ratio)
    check(sample, num_tokens)
    assert sample.target.shape == (B, 1, max(1, int(ratio * num_tokens)))
    for context, target in zip(contexts(sample), sample.target.flatten(1).tolist(), strict=True):
        assert sorted(context + target) == list(range(num_tokens))


ALL = [multi_block, sequence, random, one_block]


@pytest.mark.parametrize("sampler", ALL)
@settings(max_examples=10, deadline=None)
@given(num_tokens=st.integers(32, 96), seed=seeds)
def test_samples_of_a_batch_differ(sampler, num_tokens, seed):
    """All eight samples are the same cloud, so only their random numbers can make them differ."""
    options = (
        {} if sampler in (random, one_block) else {"target_ratio": (0.1, 0.15), "min_context": 1}
    )
    sample = sampler(same_cloud(num_tokens), BatchGenerator(seed), **options)
    assert len({tuple(map(tuple, blocks)) for blocks in sample.target.sort(-1).values.tolist()}) > 1
    assert len(set(map(tuple, contexts(sample)))) > 1


@pytest.mark.parametrize("sampler", [multi_block, sequence])
def test_the_context_has_a_draw_of_its_own_in_every_sample(sampler):
    """The context differs even if targets have only one token, so that they hardly affect it."""
    options = {"num_targets": 1, "target_ratio": (0.01, 0.01), "context_ratio": (0.5, 0.5)}
    sample = sampler(same_cloud(40), BatchGenerator(0), **options)
    assert len(set(map(tuple, contexts(sample)))) >= 4


@pytest.mark.parametrize("sampler", ALL)
def test_a_generator_makes_the_sample_again(sampler):
    one, two, other = (sampler(clouds(64), BatchGenerator(0, step)) for step in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    assert one.target.shape != other.target.shape or not torch.equal(one.target, other.target)


@pytest.mark.parametrize("sampler", ALL)
def test_a_plain_generator_works_too(sampler):
    one, two = (sampler(clouds(64), torch.Generator().manual_seed(1)) for _ in range(2))
    check(one, 64)
    assert torch.equal(one.target, two.target)


@pytest.mark.parametrize("sampler", ALL)
@pytest.mark.parametrize("seed", range(4))
def test_two_half_batches_are_the_whole_batch(sampler, seed):
    """Because of min_context, some samples, not all, are drawn again."""
    options = {
        multi_block: {"min_context": 16},
        sequence: {"context_ratio": (0.6, 0.6), "min_context": 16},
    }.get(sampler, {})
    centers = clouds(64, seed=seed)
    whole = sampler(centers, BatchGenerator(seed), **options)
    halves = [sampler(centers[i : i + 4], BatchGenerator(seed, 0, i, B), **options) for i in (0, 4)]
    assert torch.equal(torch.cat([half.target for half in halves]), whole.target)
    assert contexts(halves[0]) + contexts(halves[1]) == contexts(whole)


def test_sizes_are_drawn_anew_in_every_batch():
    sizes = {multi_block(clouds(64), BatchGenerator(0, step)).target.shape[2] for step in range(40)}
    assert sizes == set(range(round(0.15 * 64), round(0.2 * 64) + 1))


# ----------------------------------------------------------------------------------- their geometry


def is_ball(block: torch.Tensor, seed: int, cloud: torch.Tensor) -> bool:
    return set(block.tolist()) == set(
        (cloud - cloud[seed]).norm(dim=1).argsort()[: len(block)].tolist()
    )


@pytest.mark.parametrize("sampler", [multi_block, one_block])
def test_targets_are_balls_around_one_of_their_tokens(sampler):
    centers = clouds(48)
    sample = sampler(centers, BatchGenerator(2))
    for cloud, targets in zip(centers, sample.target, strict=True):
        for block in targets:
            assert is_ball(block, block[0], cloud)


def test_targets_of_a_sample_begin_far_apart():
    """The first tokens of the targets are farthest points: each is the token farthest from the
    earlier ones.
    """
    centers = clouds(48)
    for cloud, targets in zip(centers, multi_block(centers, BatchGenerator(2)).target, strict=True):
        picked = targets[:, 0].tolist()
        for count in range(1, len(picked)):
            gaps = torch.cdist(cloud, cloud[picked[:count]]).amin(1)
            assert gaps.argmax() == picked[count]


def test_the_context_is_a_ball_less_the_targets():
    centers = clouds(40)
    sample = multi_block(centers, BatchGenerator(5), context_ratio=(0.8, 0.8))
    for cloud, context, targets in zip(centers, contexts(sample), sample.target, strict=True):
        hidden = set(targets.flatten().tolist())
        balls = [set((cloud - c).norm(dim=1).argsort()[:32].tolist()) - hidden for c in cloud]
        assert set(context) in balls


def test_random_targets_are_not_balls():
    centers = clouds(64)
    sample = random(centers, BatchGenerator(0))
    assert not any(
        is_ball(target[0], int(token), cloud)
        for cloud, target in zip(centers, sample.target, strict=True)
        for token in target[0]
    )


def greedy_walk(cloud: torch.Tensor) -> list[int]:
    rows = cloud.tolist()
    left, walk = set(range(len(rows))), [min(range(len(rows)), key=lambda i: sum(rows[i]))]
    while left := left - {walk[-1]}:
        walk.append(
            min(
                left,
                key=lambda i: sum(
                    (a - b) ** 2 for a, b in zip(rows[i], rows[walk[-1]], strict=True)
                ),
            )
        )
    return walk


def test_blocks_of_the_sequence_sampler_are_spans_of_a_greedy_walk():
    """The context is a span of the tokens that are in no target; its length is int(0.55 x their
    number) (Point-JEPA's ContextSampler).
    """
    centers = clouds(32)
    sample = sequence(centers, BatchGenerator(1), context_ratio=(0.55, 0.55))
    for cloud, context, targets in zip(
        centers, contexts(sample), sample.target.tolist(), strict=True
    ):
        walk = greedy_walk(cloud)
        for block in targets:
            start = walk.index(block[0])
            assert block == walk[start : start + len(block)]
        left = [
            token for token in walk if token not in {token for block in targets for token in block}
        ]
        first = min(map(left.index, context))
        assert set(context) == set(left[first : first + len(context)])
        assert len(context) == int(0.55 * len(left))


def test_the_sequence_sampler_takes_as_many_tokens_as_point_jepa():
    """Of 64 tokens, the context has 17.7 on average (by a plain loop of 200,000 draws) and at least
    int(0.4 x 16); targets have 9 to 12.
    """
    samples = [sequence(clouds(64, 32, step), BatchGenerator(0, step)) for step in range(60)]
    lengths = torch.cat([sample.mask.sum(1) for sample in samples]).float()
    assert lengths.mean().item() == pytest.approx(17.7, abs=0.4)
    assert lengths.min() >= 6
    assert {sample.target.shape[2] for sample in samples} == {9, 10, 11, 12}


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("sampler", [multi_block, sequence])
def test_a_context_that_stays_empty_is_an_error_that_names_the_setting(sampler):
    with pytest.raises(
        ValueError,
        match=r"4 targets of 2[12] tokens still leave fewer than min_context = 4 of 24 tokens",
    ):
        sampler(clouds(24), BatchGenerator(0), target_ratio=(0.9, 0.9))


def test_a_context_below_the_minimum_is_drawn_again():
    centers, options = clouds(64), {"target_ratio": (0.2, 0.2), "context_ratio": (0.85, 0.85)}
    shortest = (
        multi_block(centers, BatchGenerator(0), **options, min_context=1).mask.sum(1).min().item()
    )
    again = multi_block(centers, BatchGenerator(0), **options, min_context=shortest + 1)
    check(again, 64)
    assert again.mask.sum(1).min() > shortest


def test_only_the_samples_that_need_it_are_drawn_again():
    centers, options = clouds(64), {"target_ratio": (0.2, 0.2), "context_ratio": (0.85, 0.85)}
    first = multi_block(centers, BatchGenerator(0), **options, min_context=1)
    shortest = first.mask.sum(1).min()
    again = multi_block(centers, BatchGenerator(0), **options, min_context=int(shortest) + 1)
    kept = first.mask.sum(1) > shortest
    assert 0 < kept.sum() < B
    assert torch.equal(again.target[kept], first.target[kept])
    assert [c for c, k in zip(contexts(again), kept, strict=True) if k] == [
        c for c, k in zip(contexts(first), kept, strict=True) if k
    ]


@pytest.mark.parametrize("ratio", [(0.0, 0.2), (0.3, 0.2), (0.5, 1.1)])
@pytest.mark.parametrize("name", ["target_ratio", "context_ratio"])
def test_an_impossible_ratio_is_an_error(name, ratio):
    with pytest.raises(ValueError, match="0 < low <= high <= 1"):
        multi_block(clouds(24), BatchGenerator(0), **{name: ratio})


@pytest.mark.parametrize("sampler", [random, one_block])
def test_a_mask_ratio_that_leaves_no_context_is_an_error(sampler):
    with pytest.raises(ValueError, match="mask_ratio leaves no context"):
        sampler(clouds(24), BatchGenerator(0), mask_ratio=1.0)


@pytest.mark.parametrize("sampler", [random, one_block])
def test_masks_are_counted_as_by_point_mae(sampler):
    """Point-MAE truncates: int(0.6 x 128) is 76, while rounding would give 77."""
    assert sampler(clouds(128), BatchGenerator(0), mask_ratio=0.6).target.shape[2] == 76


def test_more_targets_than_tokens_is_an_error():
    with pytest.raises(ValueError, match="num_targets 25 exceeds the 24 tokens"):
        multi_block(clouds(24), BatchGenerator(0), num_targets=25)


def test_shared_points_are_the_share_of_the_contexts_points_in_target_patches():
    # Four patches of two points each, from six points.
    patches = torch.tensor([[[0, 1], [1, 2], [2, 3], [4, 5]]])
    sample = TokenSample(
        torch.tensor([[0, 3]]), torch.tensor([[True, True]]), torch.tensor([[[1], [2]]]), 2
    )
    # Of the context's points 0, 1, 4 and 5, only 1 is in a target.
    assert sampling.shared_points(patches, sample).item() == pytest.approx(1 / 4)
