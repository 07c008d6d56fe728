"""Heads: the rewritten first layer equals the plain one, all weights learn, and saving works."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier, Segmenter
from jepa3d.models.ready import load_any
from jepa3d.ops import BatchGenerator, gather_points, knn

ENCODER = {
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
    "num_groups": 8,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 8,
    "drop_path": 0.1,
}
PARTS = [[0, 1], [2, 3, 4]]


@pytest.fixture
def points() -> torch.Tensor:
    return torch.randn(4, 64, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(ENCODER, ["a", "b"], [*"vwxyz"], PARTS, [1, 2, 3])


def test_every_weight_of_both_networks_learns(points, segmenter):
    labels = torch.tensor([0, 1, 0, 1])
    classifier = Classifier(ENCODER, ["a", "b", "c"])
    for network, arguments in ((classifier, (points,)), (segmenter, (points, labels))):
        network.train()
        network(*arguments, BatchGenerator(0)).square().sum().backward()
        assert [
            name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()
        ] == []


def test_the_first_layer_on_tokens_is_the_one_on_interpolated_features(points, segmenter):
    segmenter.eval()
    labels = torch.tensor([0, 1, 1, 0])
    tokens, centers = segmenter.encode(points)
    index = knn(points, centers, 3)
    weight = 1 / ((gather_points(centers, index) - points[:, :, None]).square().sum(-1) + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    features = (gather_points(tokens, index) * weight[..., None]).sum(2)
    category = segmenter.category(F.one_hot(labels, 2).float())
    shape = torch.cat([tokens.amax(1), tokens.mean(1), category], -1)[:, None].expand(-1, 64, -1)
    layers = segmenter.from_point.weight, segmenter.from_token.weight, segmenter.from_shape.weight
    joined = torch.cat([points, features, shape], -1)
    first = F.linear(joined, torch.cat(layers, 1), segmenter.from_point.bias)
    x = segmenter.hidden2(F.relu(segmenter.norm1(first.flatten(0, 1))))
    torch.testing.assert_close(
        segmenter(points, labels).flatten(0, 1), segmenter.out(x), rtol=1e-4, atol=1e-5
    )


def test_points_that_the_encoder_does_not_see_can_be_asked_for(points, segmenter):
    segmenter.eval()
    labels = torch.tensor([0, 1, 1, 0])
    whole = segmenter(points, labels)
    torch.testing.assert_close(
        segmenter.decode(points[:, :5], *segmenter.encode(points), labels),
        whole[:, :5],
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_category_matters(points, segmenter):
    segmenter.eval()
    one, two = (segmenter(points, torch.full((4,), label)) for label in (0, 1))
    assert not torch.allclose(one, two)


def test_saved_networks_come_back(points, segmenter, tmp_path):
    classifier = Classifier(ENCODER, ["a", "b", "c"], dropout=0.3).eval()
    classifier.save_pretrained(tmp_path / "c")
    again = Classifier.from_pretrained(tmp_path / "c")
    assert again.class_names == ["a", "b", "c"]
    assert torch.equal(again.predict(points), classifier.predict(points))
    segmenter.eval().save_pretrained(tmp_path / "s")
    labels = torch.tensor([0, 1, 1, 0])
    loaded = Segmenter.from_pretrained(tmp_path / "s")
    assert (loaded.parts_of, loaded.part_names) == (PARTS, [*"vwxyz"])
    assert torch.equal(loaded(points, labels), segmenter(points, labels))


def test_dropout_is_the_generator_s(points):
    classifier = Classifier(ENCODER, ["a", "b"]).train()
    one, again, other = (classifier(points, BatchGenerator(0, step)) for step in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


def test_a_prediction_depends_on_neither_unit_nor_place(points):
    classifier = Classifier(ENCODER, ["a", "b"]).eval()
    moved = points.double() * 7 + torch.tensor([1e4, -50.0, 3.0])
    np.testing.assert_allclose(
        classifier.predict(moved).detach(), classifier.predict(points).detach(), atol=1e-3
    )


def test_default_is_the_encoder_in_the_package_even_beside_a_folder_of_this_name(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Classifier(ENCODER, ["a", "b"]).save_pretrained("default")
    assert isinstance(load_any("default"), PointEncoder)
    assert isinstance(load_any("./default"), Classifier)
