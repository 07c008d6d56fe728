"""Metrics of the dVAE: the constant patch is a strong baseline, and codes are counted correctly."""

import pytest
import torch

from jepa3d.data.datasets import load
from jepa3d.evaluation.reconstruction import best_constant_patch, dvae_figures
from jepa3d.models.dvae import DVAE
from jepa3d.models.tokenizer import group
from jepa3d.ops import chamfer_l1


@pytest.fixture(scope="module")
def dvae():
    torch.manual_seed(0)
    return DVAE(
        num_groups=8,
        group_size=8,
        num_points=64,
        width=16,
        num_codes=16,
        tokenizer_dim=8,
        dgcnn_dim=4,
        folding_dim=8,
    )


@pytest.fixture(scope="module")
def clouds():
    return load(["synthetic:16"], 64, "all")


@pytest.fixture(scope="module")
def patches(clouds):
    """Return shuffled patches, n 8 3."""
    found = group(clouds.batch(range(16)), 16, 8).patches.flatten(0, 1)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


def test_the_constant_patch_beats_a_random_one_no_patch_and_any_patch_of_the_set(patches):
    fit, held = patches.split(128)
    constant = best_constant_patch(fit, steps=100, batch_size=64)
    assert constant.shape == (8, 3)
    assert not constant.requires_grad
    spread = fit.std() * torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
    rivals = torch.stack([spread, torch.zeros(8, 3), *fit[:20]])
    scores = [chamfer_l1(one.expand_as(held), held).item() for one in rivals]
    assert chamfer_l1(constant.expand_as(held), held).item() < min(scores)


def test_the_constant_patch_is_the_same_every_time(patches):
    assert torch.equal(best_constant_patch(patches, 5, 16), best_constant_patch(patches, 5, 16))


def test_the_constant_patch_follows_the_size_of_the_patches(patches):
    large = best_constant_patch(1024 * patches, 20, 32)
    assert torch.allclose(large / 1024, best_constant_patch(patches, 20, 32), atol=1e-3)


def test_figures_have_their_names_and_ranges(dvae, clouds):
    figures = dvae_figures(dvae, clouds.part("train"), clouds.part("test"))
    assert set(figures) == {"reconstruction", "constant_patch", "perplexity", "num_codes"}
    assert figures["num_codes"] == 16
    assert 1 - 1e-9 <= figures["perplexity"] <= 16 + 1e-9
    assert 0 < figures["constant_patch"] < 2
    # This autoencoder was never trained.
    assert figures["reconstruction"] > figures["constant_patch"]


def test_figures_are_repeatable_and_leave_the_network_alone(dvae, clouds):
    before = {name: value.clone() for name, value in dvae.state_dict().items()}
    one, two = (
        dvae_figures(dvae.train(), clouds.part("train"), clouds.part("test")) for _ in range(2)
    )
    assert one == two
    assert all(torch.equal(value, before[name]) for name, value in dvae.state_dict().items())


@pytest.mark.parametrize("used", [1, 4, 16])
def test_perplexity_counts_the_codes_in_even_use(dvae, clouds, monkeypatch, used):
    def cycling(patches, centers):
        return torch.arange(centers[..., 0].numel()).view(centers.shape[:2]) % used

    monkeypatch.setattr(dvae, "codes", cycling)
    figures = dvae_figures(dvae, clouds, clouds)  # 16 clouds of 8 patches
    assert figures["perplexity"] == pytest.approx(used)
