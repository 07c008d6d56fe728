"""Views of a shape: they are drawn independently, embedded together, and do not collapse."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from jepa3d.config import resolve
from jepa3d.data.transforms import random_crop
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.tokenizer import group
from jepa3d.objectives.invariance import Invariance
from jepa3d.objectives.regularizers import sigreg, variance_covariance
from jepa3d.ops import BatchGenerator

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
SMALL = {"projector_dim": 16, "embedding_dim": 6, "num_slices": 16}


def make(**settings) -> Invariance:
    torch.manual_seed(0)
    changes = {name: settings.pop(name) for name in ("scale", "rotate") if name in settings}
    config = resolve(
        {"objective": "invariance", "encoder": SIZES, "invariance": SMALL | settings}, changes
    )
    return Invariance(config, PointEncoder(**vars(config.encoder)))


def clouds(seed: int = 0, batch: int = 8) -> torch.Tensor:
    return torch.randn(batch, 64, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("regularizer", ["sigreg", "vicreg"])
@pytest.mark.parametrize("partial", [0, 2])
def test_every_parameter_gets_a_gradient(regularizer, partial):
    objective = make(regularizer=regularizer, partial_views=partial).train()
    output = objective(clouds(), BatchGenerator(0))
    assert output.embedding.shape == (2 + partial, 8, 6)
    output.loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.ndim < 2 or parameter.grad.any(), name


def test_two_global_views_with_vicreg_are_the_published_loss():
    output = make(regularizer="vicreg", partial_views=0)(clouds(), BatchGenerator(0))
    a, b = output.embedding
    (va, ca), (vb, cb) = variance_covariance(a), variance_covariance(b)
    expected = 25 * torch.nn.functional.mse_loss(a, b) + 25 * (va + vb) / 2 + 1 * (ca + cb)
    assert_close(output.loss, expected)


def test_with_sigreg_it_is_lejepas_loss():
    output = make()(clouds(), BatchGenerator(0))
    center = output.embedding[:2].mean(0)
    terms = [sigreg(view, BatchGenerator(0).stream("sigreg"), 16) for view in output.embedding]
    expected = 0.98 * ((output.embedding - center) ** 2).mean() + 0.02 * sum(terms) / 4
    assert_close(output.loss, expected)


def test_each_view_is_augmented_by_itself(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "jepa3d.objectives.invariance.group",
        lambda points, *rest: seen.append(points) or group(points, *rest),
    )
    make()(clouds(), BatchGenerator(0))
    make(scale=(1.0, 1.0), rotate=False)(clouds(), BatchGenerator(0))
    augmented, plain = seen[:4], seen[4:]
    assert [len(view[0]) for view in seen] == [64, 64, *[len(augmented[2][0])] * 2] * 2
    assert all(torch.equal(view, clouds()) for view in plain[:2])
    norms = [view.norm(dim=-1) for view in augmented[:2]]
    assert (norms[0] - norms[1]).abs().max() > 0.01  # the two views have different scales
    inside = (plain[2][:, :, None] == clouds()[:, None]).all(-1).any(-1)
    assert inside.all()  # a partial view is a subset of the cloud
    assert not torch.equal(plain[2], plain[3])


def test_a_crop_is_a_ball_of_points_left_where_they_are():
    points = clouds(batch=3)
    cropped = random_crop(points, 20, BatchGenerator(1))
    assert cropped.shape == (3, 20, 3)
    for cloud, part in zip(points, cropped, strict=True):
        rows = [int((cloud == p).all(1).nonzero()) for p in part]
        assert len(set(rows)) == 20
        # For some point of the crop, its 20 nearest points are exactly the crop.
        radii = torch.cdist(part, cloud)
        assert any(set(row.topk(20, largest=False).indices.tolist()) == set(rows) for row in radii)


def test_training_brings_views_together_without_collapse():
    objective = make(partial_views=0).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3)
    outputs = []
    for step in range(60):
        output = objective(clouds(batch=32), BatchGenerator(0, step))
        outputs.append(output)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()

    def apart(output) -> float:
        """Return the squared distance of two views of a shape, divided by that of two shapes."""
        a, b = output.embedding.detach()
        return float((a - b).square().mean() / (a - b.roll(1, 0)).square().mean())

    assert np.mean([apart(o) for o in outputs[-5:]]) < 0.8 * np.mean(
        [apart(o) for o in outputs[:5]]
    )
    assert outputs[-1].embedding.std(1).mean() > 0.3
