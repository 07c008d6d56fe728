"""Regularisers agree with independent computations, and with known answers for some rows."""

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from torch.testing import assert_close

from jepa3d.objectives.regularizers import sigreg, variance_covariance
from jepa3d.ops import BatchGenerator


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sigreg_is_the_epps_pulley_statistic_along_its_directions():
    """The expected value uses numpy's complex exponentials and scipy's quadrature."""
    rows, generator = gaussian(50, 6) * 0.7 + 0.3, BatchGenerator(3)
    slices = torch.randn(6, 8, generator=generator.on(torch.device("cpu")))
    slices = (slices / slices.norm(dim=0)).numpy()
    t = np.linspace(-3, 3, 33)
    empirical = np.exp(1j * (rows.numpy() @ slices)[..., None] * t).mean(0)
    squared = np.abs(empirical - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
    assert_close(
        sigreg(rows, BatchGenerator(3), 8).item(),
        50 * trapezoid(squared, t).mean(),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("number", [64, 1024])
def test_sigreg_is_small_for_gaussian_rows_whatever_their_number_and_large_for_others(number):
    rows, generator = gaussian(number, 16), BatchGenerator(0)
    fine = sigreg(rows, generator)
    assert 0.3 < fine < 2
    collapsed, shrunk, flat = rows[:1].expand_as(rows), 0.2 * rows, rows * torch.eye(16)[0]
    for bad in (collapsed, shrunk, flat, rows + 1, rows.sign() * 3):
        assert sigreg(bad, generator) > 5 * fine


def test_sigreg_pulls_rows_towards_a_gaussian():
    rows = (0.1 * gaussian(256, 4) + 2).requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=0.05)
    for step in range(400):
        optimizer.zero_grad()
        sigreg(rows, BatchGenerator(0, step), 32).backward()
        optimizer.step()
    assert_close(rows.mean(0), torch.zeros(4), atol=0.1, rtol=0)
    assert_close(torch.cov(rows.T), torch.eye(4), atol=0.3, rtol=0)


def test_sigreg_draws_other_directions_at_every_step_and_the_same_for_every_view():
    rows = gaussian(20, 8) + 1
    assert sigreg(rows, BatchGenerator(0, 1), 4) != sigreg(rows, BatchGenerator(0, 2), 4)
    generator = BatchGenerator(0, 1)
    assert sigreg(rows, generator.stream("sigreg"), 4) == sigreg(
        rows, generator.stream("sigreg"), 4
    )


def test_variance_and_covariance_are_vicregs():
    rows = gaussian(40, 5) * torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0]) + gaussian(40, 1, seed=1)
    variance, covariance = variance_covariance(rows)
    matrix = np.cov(rows.numpy().T)
    std = np.sqrt(np.diag(matrix) + 1e-4)
    assert_close(variance.item(), np.maximum(0, 1 - std).mean(), rtol=1e-5, atol=0)
    assert_close(
        covariance.item(), ((matrix - np.diag(np.diag(matrix))) ** 2).sum() / 5, rtol=1e-4, atol=0
    )


def test_collapsed_rows_have_the_largest_variance_term_and_correlated_ones_a_covariance_term():
    assert variance_covariance(torch.ones(10, 4))[0].item() == pytest.approx(0.99)
    alike = gaussian(1000, 1).expand(-1, 4) * 2
    assert variance_covariance(alike)[0] == 0
    assert variance_covariance(alike)[1] > 30 > 1 > variance_covariance(gaussian(1000, 4) * 2)[1]
