"""Augmentations stay in their ranges, differ between samples, and do not change the up axis."""

import numpy as np
import pytest
import torch

from jepa3d import frame
from jepa3d.data.transforms import (
    MAX_CLUTTER,
    MAX_LUMPS,
    VIEW_SHARES,
    augment,
    fill,
    random_jitter,
    random_rotate,
    random_view,
)
from jepa3d.ops import BatchGenerator

POINTS = torch.randn(16, 50, 3, generator=torch.Generator().manual_seed(0))


def scaled(points: torch.Tensor, generator: BatchGenerator) -> torch.Tensor:
    return augment(points, (0.8, 1.2), False, 0.0, generator)


def test_scale_is_one_factor_an_axis_and_sample_within_its_range():
    factors = scaled(POINTS, BatchGenerator(0)) / POINTS
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), atol=1e-4)
    factors = factors[:, 0]
    assert factors.min() >= 0.8 - 1e-4
    assert factors.max() <= 1.2 + 1e-4
    assert factors.max() - factors.min() > 0.3  # most of the range is used
    assert len(factors.flatten().unique()) == factors.numel()


def test_rotation_keeps_height_and_norm():
    turned = random_rotate(POINTS, BatchGenerator(0))
    assert torch.equal(turned[..., 2], POINTS[..., 2])
    assert torch.allclose(turned.norm(dim=-1), POINTS.norm(dim=-1), atol=1e-5)


def test_rotation_is_rigid_and_not_a_mirror():
    turned = random_rotate(POINTS, BatchGenerator(0))
    gaps = (POINTS[:, :, None] - POINTS[:, None]).norm(dim=-1)
    assert torch.allclose((turned[:, :, None] - turned[:, None]).norm(dim=-1), gaps, atol=1e-4)
    assert torch.allclose(
        torch.linalg.det(turned[:, :3]), torch.linalg.det(POINTS[:, :3]), atol=1e-3
    )


def test_every_sample_is_turned_by_its_own_angle_over_the_whole_circle():
    ones = torch.tensor([1.0, 0.0, 0.5]).expand(200, 1, 3)
    turned = random_rotate(ones, BatchGenerator(0))[:, 0]
    angle = torch.atan2(turned[:, 1], turned[:, 0])
    assert len(angle.unique()) == 200
    assert torch.histc(angle, 4, -torch.pi, torch.pi).min() > 25


@pytest.mark.parametrize("transform", [scaled, random_rotate])
def test_the_generator_decides(transform):
    one, again, other = (transform(POINTS, BatchGenerator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("transform", [scaled, random_rotate])
def test_the_points_given_are_not_changed(transform):
    points = POINTS.clone()
    transform(points, BatchGenerator(0))
    assert torch.equal(points, POINTS)


@pytest.mark.parametrize("transform", [scaled, random_rotate])
def test_half_a_batch_on_each_of_two_processes_is_the_whole_batch(transform):
    whole = transform(POINTS, BatchGenerator(0, total=16))
    halves = [
        transform(POINTS[at : at + 8], BatchGenerator(0, first=at, total=16)) for at in (0, 8)
    ]
    assert torch.equal(torch.cat(halves), whole)


def test_translation_moves_a_cloud_as_a_whole():
    moved = augment(POINTS, (1.0, 1.0), False, 0.2, BatchGenerator(0)) - POINTS
    assert torch.allclose(moved, moved[:, :1].expand_as(moved), atol=1e-5)
    assert 0.15 < moved.abs().max() <= 0.2 + 1e-5
    assert len(moved[:, 0].flatten().unique()) > 40


def test_jitter_is_normal_and_cut():
    noise = random_jitter(torch.zeros(64, 200, 3), 0.1, BatchGenerator(0))
    assert noise.std() == pytest.approx(0.1, rel=0.02)
    assert noise.mean().abs() < 0.002
    assert noise.abs().max() <= 0.3 + 1e-6
    assert ((noise.abs() < 0.1).float().mean() - 0.683).abs() < 0.01


def ball(clouds: int, count: int) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(clouds, count, 3, generator=torch.Generator().manual_seed(1)), dim=-1
    )


def views_of(cloud: torch.Tensor, num_points: int, share: float) -> torch.Tensor:
    """Return the views of the first step that keeps this share of the points."""
    choices = (BatchGenerator(0, i).stream("count").choice(len(VIEW_SHARES)) for i in range(50))
    step = next(i for i, choice in enumerate(choices) if VIEW_SHARES[choice] == share)
    return random_view(cloud, num_points, BatchGenerator(0, step))


def test_a_view_has_all_its_points_in_the_unit_sphere_whatever_share_is_kept():
    for step in range(20):
        view = random_view(ball(16, 400), 200, BatchGenerator(0, step))
        assert view.shape == (16, 200, 3)
        assert torch.allclose(view.mean(1), torch.zeros(16, 3), atol=1e-5)
        assert torch.allclose(view.norm(dim=-1).amax(1), torch.ones(16), atol=1e-5)


def test_half_of_the_views_are_cut_by_a_plane():
    """A cut view of a ball is flattened: its extent along one direction is smaller."""
    view = views_of(ball(200, 2000), 1000, 1)
    directions = torch.nn.functional.normalize(
        torch.randn(500, 3, generator=torch.Generator().manual_seed(2)), dim=-1
    )
    centred = view - (view.amax(1, keepdim=True) + view.amin(1, keepdim=True)) / 2
    reach = (centred @ directions.T).amax(1) - (centred @ directions.T).amin(1)
    flattened = (reach.amin(1) / reach.amax(1) < 0.85).float().mean()
    assert 0.2 < flattened < 0.6


def test_a_third_of_the_views_has_clutter_and_at_most_a_tenth_of_their_points():
    view = views_of(ball(200, 2000), 1000, 1)
    inside = (view - view.median(1, keepdim=True).values).norm(dim=-1) < 0.5
    share = inside.float().mean(1)
    # Views that are not cut.
    whole = (view.mean(1).norm(dim=-1) < 0.02) & ((view.amin(1) + view.amax(1)).abs().amax(1) < 0.1)
    assert 0.15 < (share[whole] > 0.005).float().mean() < 0.5
    assert share[whole].max() < MAX_CLUTTER


def test_another_third_has_lumps_of_up_to_a_third_of_its_points():
    view = views_of(ball(200, 2000), 1000, 1)
    # Number of points near each point, itself included.
    beside = (torch.cdist(view, view) < 0.1).sum(-1)
    lumped = beside.amax(1) > 4 * beside.float().mean(1)
    assert 0.1 < lumped.float().mean() < 0.4
    dense = (beside > 2.5 * beside.float().median(1, keepdim=True).values).float().mean(1)
    assert 0.02 < dense[lumped].mean() < MAX_LUMPS


def test_few_points_are_filled_up_as_the_frame_fills_one_cloud():
    points = torch.randn(3, 130, 3, generator=torch.Generator().manual_seed(1))
    filled = fill(points, 700)
    want = np.stack([frame.fill(cloud, 700)[0] for cloud in points.numpy()])
    assert np.allclose(filled, want, atol=1e-6)
    assert torch.equal(fill(points, 130), points)
    few = frame.fill(points[0, :5].numpy(), 40)[0]  # more rounds of copies than neighbours
    assert np.allclose(fill(points[:1, :5], 40)[0], few, atol=1e-6)
