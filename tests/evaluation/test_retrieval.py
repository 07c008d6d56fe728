"""Mean average precision against its definition, and what stands beside it."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from jepa3d.data.synthetic import make_shapes
from jepa3d.evaluation import retrieval as module
from jepa3d.evaluation.retrieval import average_precision, paired_interval, retrieval
from jepa3d.models.encoder import PointEncoder

RNG = np.random.default_rng(0)


def cosine(vectors: np.ndarray) -> np.ndarray:
    unit = module.unit_length(vectors)
    return unit @ unit.T


def d2_similarity(points: np.ndarray) -> np.ndarray:
    return module.likeness(module.d2_histograms(points), slice(None))


def test_average_precision_is_scikit_learn_s_for_every_query():
    labels, similarity = RNG.integers(0, 4, 40), cosine(RNG.normal(size=(40, 5)))
    found = average_precision(similarity, labels)
    for i in range(40):
        others = np.arange(40) != i
        assert found[i] == pytest.approx(average_precision_score((labels == labels[i])[others], similarity[i, others]))


def test_a_shape_alone_in_its_class_has_no_precision_and_the_query_does_not_find_itself():
    similarity = np.array([[9.0, 1.0, 2.0], [1.0, 9.0, 0.0], [2.0, 0.0, 9.0]])
    found = average_precision(similarity, np.array([0, 0, 1]))
    assert found[0] == pytest.approx(0.5)
    assert found[1] == pytest.approx(1.0)
    assert np.isnan(found[2])


def test_d2_tells_a_ball_from_a_line_whatever_their_size_and_turn():
    ball, line = RNG.normal(size=(500, 3)), np.outer(RNG.uniform(size=500), [1, 0, 0])
    turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    found = d2_similarity(np.stack([ball, 5 * ball @ turn, line, 0.1 * line @ turn]))
    assert min(found[0, 1], found[2, 3]) > -0.1
    assert max(found[0, 2], found[1, 3]) < -0.4


def test_blocks_of_any_size_give_the_same_numbers(monkeypatch):
    """Ties included: histograms of equal clouds."""
    labels, points = RNG.integers(0, 4, 30), RNG.normal(size=(30, 40, 3))
    points[20:] = points[:10]
    vectors = RNG.normal(size=(30, 5)).astype(np.float32)
    whole = d2_similarity(points)
    expected = average_precision(whole, labels), average_precision(cosine(vectors), labels)
    histograms = module.d2_histograms(points)
    assert np.array_equal(whole, -np.abs(histograms[:, None] - histograms[None]).sum(-1))
    for numbers in (1, 30 * 64 * 7, 30 * 11, 10**9):
        monkeypatch.setattr(module, "_NUMBERS", numbers)
        found = module.precision_by_blocks(partial(module.likeness, histograms), labels, 64)
        np.testing.assert_array_equal(found, expected[0])
        found = module.precision_by_blocks(lambda rows: cosine(vectors)[rows], labels)
        np.testing.assert_allclose(found, expected[1], rtol=1e-9)


def test_memory_is_bounded_however_many_shapes(monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS", 2**16)
    shapes = np.repeat(RNG.normal(size=(4, 8, 3)), 200, 0)
    histograms = module.d2_histograms(shapes)
    tracemalloc.start()
    module.precision_by_blocks(partial(module.likeness, histograms), np.arange(800) % 4, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23  # in one piece 330 MB


def test_the_interval_holds_the_mean_and_narrows_with_queries():
    few, many = RNG.normal(1, 1, 30), RNG.normal(1, 1, 3000)
    (low, high), (lower, higher) = paired_interval(few), paired_interval(many)
    assert low < few.mean() < high
    assert high - low > 4 * (higher - lower)


def test_the_table_has_the_models_the_untrained_encoder_and_d2(tmp_path, monkeypatch, capsys):
    shapes = make_shapes(120, 256, seed=0)
    np.savez(tmp_path / "s.npz", points=shapes["points"], labels=np.arange(120) // 2 % 4, split=np.arange(120) % 2)
    torch.manual_seed(0)
    encoder = PointEncoder(32, 2, 2, 16, 8, 128, tokenizer_dim=16)
    encoder.save_pretrained(tmp_path / "one")
    result = retrieval([str(tmp_path / "one")] * 2, str(tmp_path / "s.npz"))
    assert result["queries"] == 60
    assert list(result["results"]) == [str(tmp_path / "one"), "untrained", "D2 histograms"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "vectors_of", lambda model, clouds: np.eye(4)[clouds.labels])
        perfect = retrieval([str(tmp_path / "one")], str(tmp_path / "s.npz"))["results"]
    assert perfect[str(tmp_path / "one")]["map"] == pytest.approx(100)
    assert perfect["D2 histograms"]["first_minus_this"] == pytest.approx(100 - perfect["D2 histograms"]["map"])
    module.show(result)
    assert "60 queries of 4 classes" in capsys.readouterr().out
