"""Grouping, and the small PointNet that makes tokens of patches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from jepa3d.models.tokenizer import BatchNorm, PatchTokenizer, group
from jepa3d.ops import BatchGenerator


@pytest.fixture
def points():
    return torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))


def test_patches_are_the_nearest_points_relative_to_their_centre(points):
    centers, patches, index = group(points, 6, 8)
    assert (centers.shape, patches.shape, index.shape) == ((2, 6, 3), (2, 6, 8, 3), (2, 6, 8))
    distance = torch.cdist(centers.double(), points.double())
    assert torch.equal(index.sort(-1).values, distance.argsort(-1)[..., :8].sort(-1).values)
    for b in range(2):
        assert_close(patches[b] + centers[b][:, None], points[b][index[b]])


def test_every_centre_is_a_point_and_lies_in_its_own_patch(points):
    centers, patches, _ = group(points, 6, 8)
    assert torch.equal(patches[:, :, 0], torch.zeros(2, 6, 3))
    assert (centers[:, :, None] == points[:, None]).all(-1).any(-1).all()


def test_a_generator_moves_the_first_centre(points):
    assert not torch.equal(
        group(points, 6, 8, BatchGenerator(0)).centers, group(points, 6, 8).centers
    )
    assert torch.equal(
        group(points, 6, 8, BatchGenerator(0)).index, group(points, 6, 8, BatchGenerator(0)).index
    )


@pytest.mark.parametrize(("num_groups", "group_size"), [(51, 8), (6, 51)])
def test_too_few_points_is_an_error_that_says_how_many(points, num_groups, group_size):
    with pytest.raises(
        ValueError, match=f"50 points cannot give {num_groups} patches of {group_size} points"
    ):
        group(points, num_groups, group_size)


def textbook(tokenizer: PatchTokenizer, patches: torch.Tensor) -> torch.Tensor:
    """Compute the tokens in the plain way: no split layers, no folded BatchNorm."""
    size = patches.shape[-2]
    x = patches.reshape(-1, 3)
    x = tokenizer.linear2(F.relu(tokenizer.norm1(tokenizer.linear1(x)))).view(
        -1, size, tokenizer.linear2.out_features
    )
    x = torch.cat([x.amax(1, keepdim=True).expand_as(x), x], -1).flatten(0, 1)
    x = tokenizer.linear4(F.relu(tokenizer.norm3(tokenizer.linear3(x))))
    return x.view(*patches.shape[:-1], -1).amax(-2)


def made_up_tokenizer() -> PatchTokenizer:
    """Return a tokenizer in double precision, with random norms."""
    torch.manual_seed(0)
    tokenizer = PatchTokenizer(12, 8).double()
    for norm in (tokenizer.norm1, tokenizer.norm3):
        for value in (norm.weight, norm.bias, norm.running_mean):
            torch.nn.init.normal_(value)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    return tokenizer


@pytest.mark.parametrize("training", [True, False])
def test_the_exact_rewrites_are_exact_in_value_gradient_and_statistics(training):
    ours = made_up_tokenizer().train(training)
    plain = copy.deepcopy(ours)
    patches = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    inputs = patches.clone().requires_grad_(), patches.clone().requires_grad_()
    weights = torch.randn(2, 5, 12, dtype=torch.float64)
    out, expected = ours(inputs[0]), textbook(plain, inputs[1])
    assert_close(out, expected)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad)
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert_close(one.grad, other.grad, msg=lambda m, name=name: f"{name}: {m}")
    for one, other in zip(ours.buffers(), plain.buffers(), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("training", [True, False])
def test_the_order_of_a_patchs_points_does_not_matter(training):
    tokenizer = made_up_tokenizer().train(training)
    patches = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    assert_close(tokenizer(patches), tokenizer(patches[:, :, torch.randperm(7)]))


def test_patches_do_not_mix_in_evaluation_mode():
    tokenizer = made_up_tokenizer().eval()
    patches = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    assert_close(tokenizer(patches)[1, 2], tokenizer(patches[1, 2]))


def test_batchnorm_of_one_process_is_torchs():
    x, ours, theirs = torch.randn(6, 4), BatchNorm(4), torch.nn.BatchNorm1d(4)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
