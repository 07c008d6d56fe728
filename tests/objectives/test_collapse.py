"""The collapse metrics: they must detect a collapse."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from jepa3d.objectives.collapse import collapse_figures, position_loss, rankme
from jepa3d.objectives.jepa import cosine_loss

E = 16


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("unit", ["token", "block"])
@pytest.mark.parametrize("lengths", [1.0, gaussian(64, 4, 1, 1).abs() + 0.1])
def test_constant_rows_are_a_collapse_whatever_their_lengths(unit, lengths):
    rows = (
        gaussian(5, E).expand(64, 4, 5, E) * lengths
        if unit == "block"
        else gaussian(E).expand(64, 4, 5, E) * lengths
    )
    figures = collapse_figures(rows, rows, unit)
    for name in ("prediction", "target"):
        assert figures[f"{name}_std"] == pytest.approx(0, abs=1e-3)
        assert figures[f"{name}_cosine"] == pytest.approx(1, abs=1e-4)
        assert figures[f"{name}_rankme"] == pytest.approx(1, abs=0.02)
    assert figures["constant_loss"] == pytest.approx(0, abs=1e-4)


def test_isotropic_rows_are_healthy():
    figures = collapse_figures(gaussian(100, 4, 5, E), gaussian(100, 4, 5, E, seed=1))
    for name in ("prediction", "target"):
        assert figures[f"{name}_std"] == pytest.approx(1, abs=0.02)
        assert figures[f"{name}_cosine"] == pytest.approx(0, abs=0.01)
        assert figures[f"{name}_rankme"] == pytest.approx(E, rel=0.02)
    assert figures["constant_loss"] == pytest.approx(1, abs=0.05)


def test_prediction_and_target_are_told_apart():
    figures = collapse_figures(torch.ones(50, 4, 5, E), gaussian(50, 4, 5, E))
    assert figures["prediction_std"] < 0.01 < 0.9 < figures["target_std"]
    assert figures["constant_loss"] > 0.9


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.floats(0, 3), unit=st.sampled_from(["token", "block"]))
def test_the_constant_loss_is_what_the_best_constant_reaches(seed, shift, unit):
    target = gaussian(6, 2, 3, E, seed=seed) + shift
    figure = collapse_figures(target, target, unit)["constant_loss"]
    rows = F.normalize(
        target.flatten(0, 1).flatten(1) if unit == "block" else target.flatten(0, 2), dim=-1
    )
    shape = (1, 1, 3, E) if unit == "block" else (1, 1, 1, E)

    def score(constant: torch.Tensor) -> torch.Tensor:
        return cosine_loss(constant.view(shape).expand_as(target), target, unit)

    best = rows.mean(0)
    assert_close(figure, score(best).item(), atol=1e-5, rtol=0)
    for other in [
        *gaussian(10, best.numel(), seed=seed),
        best + 0.1 * gaussian(best.numel(), seed=seed),
    ]:
        assert score(other) >= figure - 1e-5


def test_an_optimised_constant_reaches_the_constant_loss_and_no_lower():
    target = gaussian(8, 2, 3, E) + gaussian(E, seed=1)
    constant = gaussian(E, seed=2).requires_grad_()
    optimizer = torch.optim.Adam([constant], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = cosine_loss(constant.expand_as(target), target)
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(collapse_figures(target, target)["constant_loss"], abs=1e-4)


def test_the_cosine_is_the_mean_over_pairs_of_different_rows():
    rows = gaussian(7, 1, 1, E) + 0.5
    unit = F.normalize(rows.flatten(0, 2), dim=-1)
    pairs = (unit @ unit.T)[~torch.eye(7, dtype=torch.bool)]
    assert collapse_figures(rows, rows)["target_cosine"] == pytest.approx(
        pairs.mean().item(), abs=1e-6
    )


@pytest.mark.parametrize("rank", [1, 2, 5, E])
def test_rankme_of_equal_orthogonal_directions_is_their_number(rank):
    rows = torch.eye(E)[:rank].repeat(10, 1)
    assert rankme(rows) == pytest.approx(rank, rel=1e-3)


def test_rankme_does_not_know_scale():
    assert rankme(100 * gaussian(50, E)) == pytest.approx(rankme(gaussian(50, E)), rel=1e-4)


def test_many_rows_are_thinned_and_not_cut():
    """A collapse in the second half of the batch must be detected."""
    target = torch.cat([gaussian(40, 1, 5, E), torch.ones(40, 1, 5, E)])
    figures = collapse_figures(target, target, max_rows=50)
    assert figures["target_cosine"] == pytest.approx(0.25, abs=0.06)


def test_figures_carry_no_gradient():
    assert all(
        type(v) is float
        for v in collapse_figures(
            gaussian(4, 2, 3, E).requires_grad_(), gaussian(4, 2, 3, E)
        ).values()
    )


@pytest.mark.filterwarnings("ignore:std")
def test_a_single_row_has_figures_that_are_numbers():
    figures = collapse_figures(gaussian(1, 1, 4, E), gaussian(1, 1, 4, E), "block")
    assert all(value == value for value in figures.values())


def test_the_position_loss_tells_targets_that_are_position_from_those_that_are_not():
    centers = gaussian(64, 4, 5, 3).clamp(-1, 1)
    x, y, z = centers.unbind(-1)
    # Polynomials of the position, before the loss scales them to unit length.
    known = torch.stack([x, y * z, x**2 * z, y**3, torch.ones_like(x)], -1)
    assert position_loss(known, centers) < 0.1 < position_loss(known.flip(0), centers)
    assert position_loss(gaussian(64, 4, 5, E, seed=1), centers) > 0.8
    assert position_loss(torch.ones(64, 4, 5, E), centers) == pytest.approx(0, abs=1e-4)
