"""Handcrafted descriptors: their values, and what they do not depend on."""

import numpy as np
import pytest
import torch

from jepa3d.evaluation.descriptors import (
    BINS,
    baselines,
    cosine,
    geometry,
    minus_l1,
    shape_histograms,
    standardised,
    unit_length,
)
from jepa3d.models.encoder import PointEncoder

RNG = np.random.default_rng(0)


@pytest.fixture
def encoder() -> PointEncoder:
    torch.manual_seed(0)
    return PointEncoder(32, 1, 2, 16, 8, 128, tokenizer_dim=16).eval()


def clouds(count: int, points: int = 200) -> np.ndarray:
    return RNG.normal(size=(count, points, 3)) * RNG.uniform(0.2, 1, (count, 1, 3))


def test_each_of_the_four_histograms_sums_to_one(encoder):
    found = shape_histograms(encoder.prepare(clouds(20)))
    assert found.shape == (20, 4 * BINS)
    np.testing.assert_allclose(found.reshape(20, 4, BINS).sum(-1), 1, rtol=1e-12)


def test_histograms_tell_a_ball_from_a_line_whatever_their_size_and_turn(encoder):
    ball, line = RNG.normal(size=(500, 3)), np.outer(RNG.uniform(size=500), [1, 0, 0])
    turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    found = shape_histograms(
        encoder.prepare(np.stack([ball, 5 * ball @ turn, line, 0.1 * line @ turn]))
    )
    # The heights are left out, since a rotation changes them.
    shapes = minus_l1(found[:, : 3 * BINS], found[:, : 3 * BINS])
    assert min(shapes[0, 1], shapes[2, 3]) > -0.3
    assert max(shapes[0, 2], shapes[1, 3]) < -1.5


def test_histograms_of_known_shapes():
    """For points on a level line, all A3 angles are 0 or 180 degrees, all D3 areas are 0, and all
    heights fall into one bin.
    """
    line = np.outer(np.linspace(-1, 1, 128), [1, 0, 0])[None]
    d2, a3, d3, height = shape_histograms(torch.from_numpy(line).float()).reshape(4, BINS)
    assert a3[0] + a3[-1] == pytest.approx(1)
    # With probability 1/3, the first of three points lies between the others.
    assert a3[-1] == pytest.approx(1 / 3, abs=0.02)
    assert d3[0] > 0.9
    assert height[BINS // 2] == 1
    np.testing.assert_allclose(
        d2, 2 * (1 - (np.arange(BINS) + 0.5) / BINS) / BINS, atol=0.008
    )  # the density of distances falls linearly


def test_the_surface_around_a_token_is_described():
    """On a level plane, the smallest share of variance is 0, its direction is up, and all tokens
    have height 0.
    """
    side = np.linspace(-0.7, 0.7, 16)
    plane = np.stack([*np.meshgrid(side, side), np.zeros((16, 16))], -1).reshape(1, 256, 3)
    mean = geometry(torch.from_numpy(plane).float(), 16, 8)[0, :89]
    for scale in range(4):
        smallest, up = mean[19 * scale + 1], mean[19 * scale + 4 : 19 * scale + 10]
        assert smallest < 1e-3
        assert up[5] > 0.3
        assert np.abs(up[:5]).max() < 1e-6
    assert mean[-2] == pytest.approx(0, abs=1e-9)
    # In a level plane, the distances to the centroid and to the vertical axis are equal.
    assert mean[-3] == pytest.approx(mean[-1])


def test_no_descriptor_depends_on_the_order_of_points_or_on_the_rest_of_a_batch(encoder):
    given = clouds(9)
    train = encoder.prepare(clouds(12))
    shuffled = np.stack([RNG.permutation(cloud) for cloud in given])
    for descriptor in baselines(encoder, train).values():
        found = descriptor.of(encoder.prepare(given))
        np.testing.assert_array_equal(found, descriptor.of(encoder.prepare(shuffled)))
        np.testing.assert_allclose(
            found[-1:], descriptor.of(encoder.prepare(given[-1:])), rtol=1e-6, atol=1e-6
        )
        assert np.isfinite(found).all()


def test_standardising_reads_the_train_clouds_alone(encoder):
    train, gallery = encoder.prepare(clouds(12)), encoder.prepare(clouds(9))
    of = standardised(lambda points: geometry(points, 16, 8), train)
    np.testing.assert_allclose(of(train).mean(0), 0, atol=1e-6)
    assert of(train).std(0).max() == pytest.approx(1)
    together = of(gallery)
    np.testing.assert_allclose(
        np.concatenate([of(cloud[None]) for cloud in gallery]), together, rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(
        together, standardised(lambda points: geometry(points, 16, 8), gallery)(gallery)
    )


def test_likenesses_against_their_definitions():
    a, b = RNG.normal(size=(5, 7)), RNG.normal(size=(6, 7))
    np.testing.assert_allclose(minus_l1(a, b), -np.abs(a[:, None] - b[None]).sum(-1))
    found = cosine(a, b)
    assert found[2, 3] == pytest.approx(a[2] @ b[3] / np.linalg.norm(a[2]) / np.linalg.norm(b[3]))
    assert (unit_length(np.zeros((1, 4))) == 0).all()
