"""The dVAE, the discrete autoencoder that is the paper's teacher."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from jepa3d.models.dvae import DVAE, EdgeConv, FoldingDecoder
from jepa3d.models.tokenizer import group
from jepa3d.ops import BatchGenerator, chamfer_l1, knn

SIZES = {
    "width": 16,
    "num_codes": 12,
    "num_groups": 8,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 8,
    "dgcnn_dim": 8,
    "folding_dim": 8,
}


@pytest.fixture
def dvae():
    torch.manual_seed(0)
    return DVAE(**SIZES)


@pytest.fixture
def grouped():
    points = torch.randn(3, 64, 3, generator=torch.Generator().manual_seed(0))
    centers, patches, _ = group(points, 8, 8)
    return patches, centers


class Constant(nn.Module):
    """Stands for a network: returns the same logits for every input."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, *_):
        return self.logits


def test_every_parameter_gets_a_gradient(dvae, grouped):
    dvae(*grouped, 1.0, 0.1, BatchGenerator(0)).loss.backward()
    for name, parameter in dvae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.ndim < 2 or parameter.grad.any(), name


def test_the_loss_is_its_parts(dvae, grouped):
    plain, weighed = (dvae(*grouped, 0.5, weight, BatchGenerator(0)) for weight in (0.0, 0.3))
    assert_close(plain.loss, plain.reconstruction)
    assert_close(weighed.loss - plain.loss, 0.3 * plain.kl)
    assert 0 < plain.fine < plain.reconstruction
    assert_close(plain.reconstruction, weighed.reconstruction)


def test_a_generator_makes_the_gumbel_noise_again(dvae, grouped):
    one, two, other = (dvae(*grouped, 1.0, 0.0, BatchGenerator(0, step)).loss for step in (1, 1, 2))
    assert one == two
    assert one != other


def test_a_cold_softmax_of_a_certain_code_is_that_code(dvae, grouped):
    """If one logit is far above the Gumbel noise, training and evaluation give the same result."""
    logits = 200 * F.one_hot(torch.randint(12, (3, 8)), 12).float()
    dvae.to_logits = Constant(logits)
    dvae.eval()
    out = dvae(*grouped, 0.0625, 0.0, BatchGenerator(0))
    assert_close(out.fine, chamfer_l1(dvae.reconstruct(*grouped), grouped[0]))


def soft_codes(dvae, grouped, temperature: float) -> torch.Tensor:
    """Return the codes that the second network gets in training."""
    seen = []
    handle = dvae.to_features.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dvae(*grouped, temperature, 0.0, BatchGenerator(0))
    handle.remove()
    return seen[0]


def test_a_cold_gumbel_softmax_is_one_code_and_a_hot_one_their_mean(dvae, grouped):
    cold, hot = (soft_codes(dvae, grouped, temperature) for temperature in (1e-4, 1e6))
    assert torch.cdist(cold.flatten(0, 1), dvae.codebook).amin(1).quantile(0.8) < 1e-3
    assert_close(hot, dvae.codebook.mean(0).expand_as(hot), atol=1e-3, rtol=0)


def test_gumbel_noise_draws_codes_as_often_as_their_softmax_says(dvae, grouped):
    patches, centers = (value[:1].expand(250, *value.shape[1:]) for value in grouped)
    dvae.to_logits = Constant(torch.arange(12.0).div(4).expand(250, 8, 12))
    drawn = torch.cdist(
        soft_codes(dvae, (patches, centers), 1e-4).flatten(0, 1), dvae.codebook
    ).argmin(1)
    share = torch.bincount(drawn, minlength=12) / len(drawn)
    assert_close(share, torch.arange(12.0).div(4).softmax(0), atol=0.03, rtol=0)


# ---------------------------------------------------------------------------------------- teacher


def test_features_are_the_second_network_on_the_expected_codes(dvae, grouped):
    patches, centers = grouped
    dvae.eval()
    neighbours = knn(centers, centers, 4)
    logits = dvae.to_logits(dvae.tokenizer(patches), neighbours)
    expected = sum(
        share[..., None] * code
        for share, code in zip(logits.softmax(-1).unbind(-1), dvae.codebook, strict=True)
    )
    assert_close(dvae.features(*grouped)[0], dvae.to_features(expected, neighbours))
    assert dvae.features(*grouped)[0].shape == (3, 8, dvae.width)
    assert torch.equal(dvae.codes(*grouped), logits.argmax(-1))
    assert dvae.reconstruct(*grouped).shape == (3, 8, 8, 3)


def test_a_dvae_stored_before_expected_codes_speaks_in_arg_max_codes(dvae, grouped, tmp_path):
    dvae.eval().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["expected_code"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = DVAE.from_pretrained(tmp_path)
    neighbours = knn(grouped[1], grouped[1], 4)
    spoken = loaded.to_features(loaded.codebook[loaded.codes(*grouped)], neighbours)
    assert torch.equal(loaded.features(*grouped)[0], spoken)
    assert not torch.allclose(dvae.features(*grouped)[0], spoken, atol=1e-3)


def test_features_are_deterministic(dvae, grouped):
    dvae.eval()
    torch.manual_seed(1)
    first = dvae.features(*grouped)[0]
    torch.manual_seed(2)
    assert torch.equal(dvae.features(*grouped)[0], first)
    assert len(first.flatten(0, 1).unique(dim=0)) > 1


def test_a_cloud_has_the_same_features_alone_and_in_a_batch(dvae, grouped):
    dvae.eval()
    alone = torch.cat(
        [dvae.features(*(value[i : i + 1] for value in grouped))[0] for i in range(3)]
    )
    assert_close(dvae.features(*grouped)[0], alone, atol=1e-5, rtol=1e-5)


def test_fewer_than_four_tokens_are_all_neighbours(dvae, grouped):
    patches, centers = (value[:, :3] for value in grouped)
    assert dvae.eval().features(patches, centers)[0].shape == (3, 3, 16)


# ------------------------------------------------------------------------------------ KL, codes


def test_kl_is_zero_for_uniform_usage(dvae, grouped):
    dvae.to_logits = Constant(torch.full((3, 8, 12), 0.7))
    assert_close(dvae(*grouped, 1.0, 0.1, BatchGenerator(0)).kl.item(), 0.0, atol=1e-6, rtol=0)


def test_kl_is_zero_when_sure_codes_are_used_equally_often(dvae, grouped):
    """The KL term spreads the usage of codes over a cloud, not the choice of each token."""
    dvae.num_codes, logits = 4, torch.zeros(3, 8, 4)
    logits.scatter_(2, torch.arange(8).remainder(4).expand(3, 8)[..., None], 50.0)
    dvae.to_logits, dvae.codebook = Constant(logits), nn.Parameter(torch.randn(4, 16))
    out = dvae(*grouped, 1.0, 0.1, BatchGenerator(0))
    assert_close(out.kl.item(), 0.0, atol=1e-6, rtol=0)
    assert_close(out.perplexity.item(), 4.0)


def test_kl_of_other_usage_is_the_textbook_sum_and_positive(dvae, grouped):
    logits = torch.randn(3, 8, 12)
    dvae.to_logits = Constant(logits)
    kl = dvae(*grouped, 1.0, 0.1, BatchGenerator(0)).kl
    usage = logits.softmax(-1).mean(1).tolist()
    expected = sum(sum(math.log(1 / 12 / q) / 12 for q in row) for row in usage) / 3
    assert_close(kl.item(), expected)
    assert kl > 0


def test_perplexity_counts_the_codes_in_use(dvae, grouped):
    for used in (1, 3):
        codes = torch.arange(24).remainder(used).view(3, 8)
        dvae.to_logits = Constant(9 * F.one_hot(codes, 12).float())
        assert_close(dvae(*grouped, 1.0, 0.1, BatchGenerator(0)).perplexity.item(), float(used))


# ------------------------------------------------------------------------------------------ parts


def test_edge_convolution_is_the_unsplit_textbook_form():
    torch.manual_seed(0)
    conv, x = EdgeConv(6, 8).double(), torch.randn(2, 7, 6, dtype=torch.float64)
    nn.init.normal_(conv.norm.weight)  # weights of both signs
    nn.init.normal_(conv.norm.bias)
    neighbours = torch.randint(7, (2, 7, 4))
    near = torch.stack([x[b][neighbours[b]] for b in range(2)])
    own = x[:, :, None].expand_as(near)
    edges = F.linear(torch.cat([near - own, own], -1), conv.linear.weight)
    groups = edges.permute(0, 3, 1, 2).reshape(2, 4, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normed = (centred / (centred.square().mean(-1, keepdim=True) + conv.norm.eps).sqrt()).view(
        2, 8, 7, 4
    )
    normed = normed * conv.norm.weight[:, None, None] + conv.norm.bias[:, None, None]
    expected = F.leaky_relu(normed, 0.2).amax(-1).transpose(1, 2)
    assert_close(conv(x, neighbours), expected)


def test_folding_is_the_unsplit_textbook_form():
    torch.manual_seed(0)
    folding, tokens = FoldingDecoder(6, 8, 5).eval(), torch.randn(2, 3, 6)
    coarse, fine = folding(tokens)
    assert coarse.shape == (2, 3, 2, 3)
    assert fine.shape == (2, 3, 8, 3)
    for point in range(8):
        around, grid = coarse[:, :, point // 4], folding.grid[point % 4].expand(2, 3, 2)
        joined = torch.cat([around, grid, tokens], -1).flatten(0, 1)
        weight = torch.cat([folding.point.weight, folding.token.weight], 1)
        x = F.relu(folding.norm1(F.linear(joined, weight, folding.token.bias)))
        x = folding.linear3(F.relu(folding.norm2(folding.linear2(x)))).view(2, 3, 3)
        assert_close(fine[:, :, point], x + around)


def test_the_folded_grid_has_four_different_places():
    assert len(FoldingDecoder(4, 4, 4).grid.unique(dim=0)) == 4


@pytest.mark.parametrize("group_size", [6, 33])
def test_a_patch_that_is_no_multiple_of_four_is_an_error(group_size):
    with pytest.raises(ValueError, match=f"group_size {group_size} must be a multiple of 4"):
        DVAE(**SIZES | {"group_size": group_size})


def test_what_is_saved_is_what_is_loaded(dvae, grouped, tmp_path):
    dvae.eval().save_pretrained(tmp_path)
    loaded = DVAE.from_pretrained(tmp_path)
    assert torch.equal(loaded.features(*grouped)[0], dvae.features(*grouped)[0])
