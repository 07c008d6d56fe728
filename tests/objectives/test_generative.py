"""The masked autoencoder: it sees only visible patches, and its loss is on the masked ones."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch.testing import assert_close

from jepa3d.config import resolve
from jepa3d.models import sampling
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.tokenizer import group
from jepa3d.objectives.generative import Generative
from jepa3d.ops import BatchGenerator, chamfer_l2

SIZES = {
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 3,
    "num_groups": 16,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 8,
    "drop_path": 0.0,
}


def make(**settings) -> Generative:
    torch.manual_seed(0)
    config = resolve({"objective": "generative", "encoder": SIZES, "generative": settings})
    return Generative(config, PointEncoder(**vars(config.encoder)))


def clouds(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 64, 3, generator=torch.Generator().manual_seed(seed))


def test_every_parameter_gets_a_gradient():
    objective = make().train()
    objective(clouds(), BatchGenerator(0)).loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.ndim < 2 or parameter.grad.any(), name


@pytest.mark.parametrize(("ratio", "masked"), [(0.6, 9), (0.25, 4)])
def test_targets_are_the_masked_patches(ratio, masked):
    output = make(mask_ratio=ratio)(clouds(), BatchGenerator(0))
    centers, patches, _ = group(clouds(), 16, 8, BatchGenerator(0).stream("group"))
    sample = sampling.random(centers, BatchGenerator(0).stream("sampler"), ratio)
    assert output.prediction.shape == output.target.shape == (4, masked, 8, 3)
    assert len(output.encoded) == 4 * (16 - masked)
    for b in range(4):
        assert torch.equal(output.target[b], patches[b][sample.target[b, 0]])
    assert_close(output.loss, chamfer_l2(output.prediction, output.target))


def test_masked_points_that_no_visible_patch_holds_do_not_change_the_prediction(monkeypatch):
    objective, points = make().eval(), clouds()
    grouped = group(points, 16, 8, BatchGenerator(0).stream("group"))
    sample = sampling.random(grouped.centers, BatchGenerator(0).stream("sampler"), 0.6)
    seen = torch.zeros(4, 64, dtype=torch.bool)
    for b in range(4):
        seen[b, grouped.index[b, sample.context[b]].flatten()] = True
    assert (~seen).sum(1).min() > 0
    predictions = []
    for which in (None, ~seen, seen):
        moved = points if which is None else torch.where(which[..., None], points + 1, points)
        patches = moved[torch.arange(4)[:, None, None], grouped.index] - grouped.centers[:, :, None]
        fixed = grouped._replace(patches=patches)
        monkeypatch.setattr("jepa3d.objectives.generative.group", lambda *_, fixed=fixed: fixed)
        predictions.append(objective(points, BatchGenerator(0)).prediction)
    assert torch.equal(predictions[0], predictions[1])
    assert not torch.equal(predictions[0], predictions[2])


def test_the_tokenizers_norms_see_masked_patches_too_as_in_point_mae():
    """In training, 4 clouds have 16 patches of 8 points each, and 9 patches of each are masked. The
    first norm's mean is over all 512 points.
    """
    objective, points = make().train(), clouds()
    first, norm = objective.encoder.tokenizer.linear1, objective.encoder.tokenizer.norm1
    norm.reset_running_stats()
    patches = group(points, 16, 8, BatchGenerator(0).stream("group")).patches
    objective(points, BatchGenerator(0))
    rows = first(patches.reshape(-1, 3))
    assert len(rows) == 512
    assert_close(norm.running_mean, 0.1 * rows.mean(0))
    assert_close(norm.running_var, 0.9 + 0.1 * rows.var(0))


def test_chamfer_l2_is_the_sum_of_mean_squared_nearest_distances():
    a, b = torch.randn(2, 3, 10, 3), torch.randn(2, 3, 7, 3)
    expected = []
    for x, y in zip(a.flatten(0, 1).numpy(), b.flatten(0, 1).numpy(), strict=True):
        there, back = cKDTree(y).query(x)[0], cKDTree(x).query(y)[0]
        expected.append((there**2).mean() + (back**2).mean())
    assert_close(chamfer_l2(a, b).item(), np.mean(expected), rtol=1e-5, atol=0)
    assert chamfer_l2(a, a) == 0


def test_it_learns_to_reconstruct():
    objective = make().train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        loss = objective(clouds(), BatchGenerator(0, step)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
