"""Mean average precision agrees with its definition; intervals and baselines are correct."""

import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from jepa3d.data.cloud import ReadError
from jepa3d.data.synthetic import make_shapes
from jepa3d.evaluation import retrieval as module
from jepa3d.evaluation.corrupted import corrupted
from jepa3d.evaluation.dense import probe_parts
from jepa3d.evaluation.descriptors import Descriptor, cosine, minus_l1
from jepa3d.evaluation.labelled import LabelledSet
from jepa3d.evaluation.retrieval import paired_interval, ranked, retrieval, search
from jepa3d.evaluation.tables import show

RNG = np.random.default_rng(0)
BASELINES = ["untrained", "histograms", "geometry"]


def test_average_precision_is_scikit_learn_s_for_every_query():
    vectors, labels = RNG.normal(size=(40, 5)), RNG.integers(0, 4, 40)
    similarity = cosine(vectors, vectors)
    nearest, found = ranked(similarity, labels, np.arange(40))
    for i in range(40):
        others = np.arange(40) != i
        assert found[i] == pytest.approx(
            average_precision_score((labels == labels[i])[others], similarity[i, others])
        )
        assert nearest[i] == (labels[others][similarity[i, others].argmax()] == labels[i])


def test_a_shape_alone_in_its_class_has_no_precision_and_the_query_does_not_find_itself():
    similarity = np.array([[9.0, 1.0, 2.0], [1.0, 9.0, 0.0], [2.0, 0.0, 9.0]])
    nearest, found = ranked(similarity, np.array([0, 0, 1]), np.arange(3))
    assert found[:2].tolist() == pytest.approx([0.5, 1])
    assert nearest[:2].tolist() == [0, 1]
    assert np.isnan([nearest[2], found[2]]).all()


def test_some_queries_find_what_they_find_among_all():
    labels, similarity, own = (
        RNG.integers(0, 4, 40),
        RNG.normal(size=(40, 40)),
        np.array([3, 17, 30]),
    )
    np.testing.assert_array_equal(
        ranked(similarity[own], labels, own), ranked(similarity, labels, np.arange(40))[:, own]
    )


@pytest.mark.parametrize("likeness", [cosine, minus_l1])
def test_blocks_of_any_size_give_the_same_numbers(monkeypatch, likeness):
    """This includes ties: histograms of equal clouds."""
    labels, vectors = RNG.integers(0, 4, 30), RNG.normal(size=(30, 64))
    if likeness is minus_l1:  # only with L1, since equal cosines may differ by rounding
        vectors[20:] = vectors[:10]
    expected = ranked(likeness(vectors, vectors), labels, np.arange(30))
    for numbers in (1, 30 * 7, 30 * 11, 10**9):
        monkeypatch.setattr(module, "_NUMBERS", numbers)
        found = search(likeness, vectors, vectors, labels, np.arange(30))
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("likeness", [cosine, minus_l1])
def test_memory_is_bounded_however_many_shapes(monkeypatch, likeness):
    monkeypatch.setattr(module, "_NUMBERS", 2**16)
    vectors = RNG.normal(size=(3000, 8))
    tracemalloc.start()
    search(likeness, vectors, vectors, np.arange(3000) % 4, np.arange(3000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23  # all similarities at once would need over 300 MB


def test_the_interval_holds_the_mean_and_narrows_with_queries():
    few, many = RNG.normal(1, 1, 30), RNG.normal(1, 1, 3000)
    (low, high), (lower, higher) = paired_interval(few), paired_interval(many)
    assert low < few.mean() < high
    assert high - low > 4 * (higher - lower)


def spy_on_baselines(monkeypatch, watched: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Replace the vectors of each descriptor by `watched(name, vectors)`."""
    opened = module.opened

    def changed(*args, **options):
        for encoder, descriptors, shapes in opened(*args, **options):
            seen = {
                name: Descriptor(
                    lambda points, name=name, of=of: watched(name, of(points)), likeness
                )
                for name, (of, likeness) in descriptors.items()
            }
            yield encoder, seen, shapes

    monkeypatch.setattr(module, "opened", changed)


def test_the_table_has_the_models_the_untrained_encoder_and_the_descriptors(
    encoder_and_data, monkeypatch, capsys
):
    model, data = encoder_and_data
    result = retrieval([model] * 2, LabelledSet(data))
    assert result["queries"] == 60
    assert list(result["results"]) == [model, *BASELINES]
    for name in BASELINES:
        low, high = result["results"][name]["interval"]
        assert low <= result["results"][name]["first_minus_this"] <= high
    show([module.sheet(result)])
    shown = capsys.readouterr().out
    assert "60 queries of 4 classes" in shown
    assert all(name in shown for name in BASELINES)
    labels = np.arange(120)[1::2] // 2 % 4
    spy_on_baselines(
        monkeypatch, lambda name, vectors: np.eye(4)[labels] if name == model else vectors
    )
    perfect = retrieval([model], LabelledSet(data))["results"]
    assert perfect[model]["map"] == pytest.approx(100)
    assert perfect[model]["nearest"] == 100
    assert perfect["histograms"]["first_minus_this"] == pytest.approx(
        100 - perfect["histograms"]["map"]
    )


@pytest.mark.parametrize("score", [retrieval, probe_parts])
def test_a_model_with_the_name_of_a_baseline_is_refused(encoder_and_data, score):
    model, data = encoder_and_data
    with pytest.raises(ValueError, match="untrained: a baseline has this name"):
        score([model, "untrained"], LabelledSet(data))


@pytest.mark.parametrize("score", [retrieval, partial(corrupted, "retrieval")])
def test_data_without_two_shapes_of_a_class_to_search_are_refused(encoder_and_data, score):
    model, data = encoder_and_data
    arrays = dict(np.load(data))
    np.savez(data, **arrays | {"split": 1 * (np.arange(120) < 8), "labels": np.arange(120) % 8})
    with pytest.raises(ReadError, match=r"s\.npz: no class has two shapes"):
        score([model], LabelledSet(data))


def test_no_baseline_s_statistics_are_of_the_searched_part(encoder_and_data, monkeypatch):
    """When the test split is replaced by another, the descriptors of a cloud stay the same."""
    model, data = encoder_and_data
    cloud = torch.from_numpy(make_shapes(1, 512, seed=3)["points"])

    def said() -> list[np.ndarray]:
        encoder, descriptors, *_ = next(module.opened([model], LabelledSet(data), "test"))
        return [descriptor.of(encoder.prepare(cloud)) for descriptor in descriptors.values()]

    before = said()
    arrays = dict(np.load(data))
    arrays["points"][arrays["split"] == 1] *= [1, 0.3, 2]
    np.savez(data, **arrays)
    for one, other in zip(before, said(), strict=True):
        np.testing.assert_array_equal(one, other)
