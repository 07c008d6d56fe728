"""Few-shot: episodes are balanced and repeatable, published folds are complete or refused, and
classifiers learn from the labelled (support) shapes.
"""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa3d.data.cloud import ReadError
from jepa3d.data.datasets import PointClouds
from jepa3d.data.prepare import Preparation, prepare
from jepa3d.evaluation import fewshot
from jepa3d.evaluation.fewshot import (
    Episode,
    accuracy,
    draw_episodes,
    fold_of,
    load_episodes,
    predict,
    published_folds,
    save_episodes,
)
from jepa3d.models.encoder import PointEncoder

METHODS = ("ncm", "logistic")


def clouds(train: list[int], test: list[int], points: int = 4) -> PointClouds:
    """Make shuffled clouds: train[c] and test[c] shapes of each class c, and one shape of class 0
    in the validation split.
    """
    labels = np.concatenate(
        [np.repeat(np.arange(len(train)), counts) for counts in (train, test)] + [[0]]
    )
    split = np.repeat([0, 1, 2], [sum(train), sum(test), 1]).astype(np.int8)
    order = np.random.default_rng(0).permutation(len(labels))
    made = np.random.default_rng(1).normal(size=(len(labels), points, 3)).astype(np.float32)
    names = tuple(f"class {i}" for i in range(len(train)))
    return PointClouds("made", "f" * 64, made, labels[order], names, split[order])


def same(one: Episode, two: Episode) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


# ----------------------------------------------------------------------------------- drawn episodes


def test_episodes_have_so_many_shapes_of_each_class_and_none_twice():
    data = clouds([12] * 8, [9] * 8)
    for support, query, classes in draw_episodes(data, 5, 10, 6, seed=0, queries=7):
        assert len(set(classes.tolist())) == 5
        assert data.labels[support].tolist() == np.repeat(classes, 10).tolist()
        assert data.labels[query].tolist() == np.repeat(classes, 7).tolist()
        assert len({*support.tolist(), *query.tolist()}) == 5 * 17
        assert (data.split[support] == 0).all()
        assert (data.split[query] == 1).all()


def test_an_episode_depends_on_seed_and_fold_but_not_on_their_number():
    data = clouds([12] * 8, [9] * 8)
    ten, three, again = (
        draw_episodes(data, 3, 4, count, seed=1, queries=5) for count in (10, 3, 10)
    )
    assert all(map(same, ten, again))
    assert all(map(same, ten, three))
    assert not any(same(ten[i], ten[j]) for i in range(10) for j in range(i))
    for other in (draw_episodes(data, 3, 4, 3, 2, 5), draw_episodes(data, 3, 4, 3, 1, 6)):
        assert not any(map(same, three, other))
    assert len({tuple(episode.classes) for episode in ten}) > 3


def test_every_class_and_shape_has_its_turn():
    data = clouds([4] * 5, [3] * 5)
    episodes = draw_episodes(data, 2, 2, 80, seed=0, queries=2)
    assert set(np.concatenate([e.support for e in episodes])) == set(
        np.flatnonzero(data.split == 0)
    )
    assert set(np.concatenate([e.query for e in episodes])) == set(np.flatnonzero(data.split == 1))


def test_only_classes_with_enough_shapes_in_both_parts_are_drawn():
    data = clouds([9, 2, 9, 9, 0], [9, 9, 3, 9, 9])
    for episode in draw_episodes(data, 2, 5, 20, seed=0, queries=5):
        assert episode.classes.tolist() == [0, 3]


def test_too_few_classes_or_shapes_is_one_line_that_tells_what_would_do():
    data = clouds([9, 9, 9, 2], [9, 4, 3, 9])
    with pytest.raises(ReadError) as caught:
        draw_episodes(data, 3, 5, 1, seed=0, queries=5)
    assert str(caught.value) == (
        "made: 3 classes need 5 train and 5 test shapes each, but only 1 have enough; "
        "--queries 3 is possible"
    )
    assert len(draw_episodes(data, 3, 5, 1, seed=0, queries=3)) == 1
    with pytest.raises(
        ReadError, match=r"4 classes need 5 train and 1 test shapes each, but only 3 have enough$"
    ):
        draw_episodes(data, 4, 5, 1, seed=0, queries=1)
    for lacking, what in (
        (replace(data, labels=None), "labels"),
        (replace(data, split=None), "train/test split"),
    ):
        with pytest.raises(ReadError, match=f"made has no {what}"):
            draw_episodes(lacking, 2, 1, 1, seed=0, queries=1)


def test_episodes_are_saved_and_read_again_for_the_same_data_only(tmp_path):
    drawn = draw_episodes(clouds([9] * 4, [9] * 4), 3, 2, 4, seed=0, queries=3)
    save_episodes(tmp_path / "episodes.json", drawn, "a" * 64)
    read = load_episodes(tmp_path / "episodes.json", "a" * 64)
    assert len(read) == 4
    assert all(map(same, drawn, read))
    assert [path.name for path in tmp_path.iterdir()] == ["episodes.json"]
    with pytest.raises(
        ReadError,
        match=r"episodes belong to data with fingerprint aaaaaaaaaaaa, not to this data "
        r"\(fingerprint bbbbbbbbbbbb\)$",
    ):
        load_episodes(tmp_path / "episodes.json", "b" * 64)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", '{"fingerprint": "a"}', '{"fingerprint": "a", "episodes": [{}]}']
)
def test_a_damaged_file_of_episodes_is_one_line(tmp_path, text):
    (tmp_path / "episodes.json").write_text(text)
    with pytest.raises(ReadError, match=r"episodes\.json: damaged"):
        load_episodes(tmp_path / "episodes.json", "a")
    with pytest.raises(ReadError, match=r"^\S*none\.json: missing"):
        load_episodes(tmp_path / "none.json", "a")


def test_the_fold_of_an_episode_is_numbered_from_0():
    data = clouds([9] * 6, [9] * 6)
    (episode,) = draw_episodes(data, 3, 2, 1, seed=1, queries=4)
    assert episode.classes.tolist() != [0, 1, 2]
    train, test = fold_of(data, episode)
    assert train.labels.tolist() == np.repeat(np.arange(3), 2).tolist()
    assert test.labels.tolist() == np.repeat(np.arange(3), 4).tolist()
    assert (
        train.class_names
        == test.class_names
        == tuple(f"class {number}" for number in episode.classes)
    )
    assert np.array_equal(train.points, data.points[episode.support])
    assert np.array_equal(test.points, data.points[episode.query])


def test_episodes_of_other_labels_or_more_shapes_are_refused():
    data = clouds([9] * 6, [9] * 6)
    (episode,) = draw_episodes(data, 3, 2, 1, seed=1, queries=4)
    for other in (
        replace(data, labels=data.labels[::-1].copy()),
        data.subset(np.arange(20)),
        replace(data, labels=None),
    ):
        with pytest.raises(ValueError, match="they were sampled from other data"):
            fold_of(other, episode)


# ---------------------------------------------------------------------------------- published folds


def download(root: Path, setting: str, folds: int = 2, queries: int = 2) -> Path:
    """Write 2-way 1-shot folds in the form of the published pickles."""
    for fold in range(folds):
        rng = np.random.default_rng(fold)
        items = [
            (rng.normal(size=(32, 6)), label, 30 - label) for label in (1, 0, *[0, 1] * queries)
        ]
        path = root / setting / f"{fold}.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps({"train": items[:2], "test": items[2:]}))
    return root


def stored(source: Path, out: Path) -> Path:
    prepare(source, out, Preparation(points=16), workers=1)
    return out


def test_published_folds_are_found_in_every_folder_around_them(tmp_path):
    out = stored(download(tmp_path / "ModelNetFewshot", "2way_1shot"), tmp_path / "out")
    around = stored(tmp_path, tmp_path.parent / f"{tmp_path.name}-around")
    for folder in (out, out / "2way_1shot", around):
        folds = published_folds(folder, 16, "z", 2, 1, 2, 2)
        assert [len(part) for fold in folds for part in fold] == [2, 4, 2, 4]
        assert [train.labels.tolist() for train, _ in folds] == [[1, 0]] * 2
        assert [test.labels.tolist() for _, test in folds] == [[0, 1, 0, 1]] * 2
        assert [train.name for train, _ in folds] == ["2way_1shot/0", "2way_1shot/1"]
        assert folds[0][0].fingerprint != folds[1][0].fingerprint
        assert folds[0][0].points[:].shape == (2, 16, 3)


def test_published_folds_are_in_the_order_of_their_numbers(tmp_path):
    out = stored(download(tmp_path / "source", "2way_1shot", folds=11), tmp_path / "out")
    folds = published_folds(out, 16, "z", 2, 1, 11, 2)
    assert [train.name.partition("/")[2] for train, _ in folds] == [str(i) for i in range(11)]
    assert len(published_folds(out, 16, "z", 2, 1, 10, 2)) == 10


def test_a_setting_that_is_not_there_is_named(tmp_path):
    source = download(tmp_path / "source", "2way_1shot")
    out = stored(download(source, "3way_1shot"), tmp_path / "out")
    with pytest.raises(ReadError, match="has 2-way 1-shot, 3-way 1-shot, but not 2-way 5-shot"):
        published_folds(out, 16, "z", 2, 5, 2, 2)
    assert len(published_folds(out, 16, "z", 2, 1, 2, 2)) == 2
    with pytest.raises(
        ReadError, match=r"3 classes of 1 train shapes, but .* have \[1, 1\] shapes"
    ):
        published_folds(out, 16, "z", 3, 1, 2, 2)


def test_other_folders_are_no_published_folds(tmp_path, bundle):
    source = download(tmp_path / "source", "2way_1shot")
    for folder in (source, source / "2way_1shot", tmp_path, tmp_path / "none", Path(bundle)):
        assert published_folds(folder, 16, "z", 2, 1, 2, 2) is None


def test_a_missing_unfinished_or_incomplete_fold_is_one_line_that_names_it(tmp_path):
    out = stored(download(tmp_path / "source", "2way_1shot", folds=3), tmp_path / "out")
    with pytest.raises(
        ReadError,
        match=r"2way_1shot/3 is missing, but 10 folds are needed; repeat its jepa3d prepare",
    ):
        published_folds(out, 16, "z", 2, 1, 10, 2)
    with pytest.raises(
        ReadError,
        match=r"shot/0 must have 2 classes of 20 test shapes, but .* have \[2, 2\] shapes",
    ):
        published_folds(out, 16, "z", 2, 1, 3, 20)
    with pytest.raises(ReadError, match="z-up already"):
        published_folds(out, 16, "y", 2, 1, 3, 2)
    with pytest.raises(ReadError, match="32 are needed"):
        published_folds(out, 32, "z", 2, 1, 3, 2)
    header = out / "2way_1shot/1/store.json"
    text = header.read_text()
    header.write_text(json.dumps(json.loads(text) | {"complete": False}))
    with pytest.raises(ReadError, match="2way_1shot/1: is an unfinished store"):
        published_folds(out, 16, "z", 2, 1, 3, 2)
    header.unlink()
    with pytest.raises(ReadError, match="2way_1shot/1 is missing"):
        published_folds(out, 16, "z", 2, 1, 3, 2)


# ---------------------------------------------------------------------------------- frozen features


def features(y: np.ndarray, gap: float, seed: int) -> np.ndarray:
    """Sample Gaussian features [n, 8]; `gap` scales the distances between class means."""
    means = np.random.default_rng(0).normal(size=(9, 8))
    return np.random.default_rng(seed).normal(size=(len(y), 8)) + gap * means[y]


def test_separable_features_score_100_and_noise_chance():
    y, y_query = np.repeat(np.arange(5), 10), np.tile(np.arange(5), 200)
    for method in METHODS:
        assert (predict(method, features(y, 9, 1), y, features(y_query, 9, 2)) == y_query).all()
        assert (
            0.15
            < (predict(method, features(y, 0, 1), y, features(y_query, 0, 2)) == y_query).mean()
            < 0.25
        )


def test_nearest_class_mean_by_hand():
    """The mean of the support is (1, 1). After centring and normalisation, class 4 is (1, 0) and
    (0, 1), with a mean along (1, 1). Class 7 is (-1, 0) and (0, -1), with a mean along (-1, -1).
    """
    support, y = np.array([[3.0, 1], [1, 3], [-1, 1], [1, -1]]), np.array([4, 4, 7, 7])
    # After centring, the sums of the coordinates are 0.1, -0.2, -0.1 and 1.
    query = np.array([[1.5, 0.6], [0.9, 0.9], [1.2, 0.7], [9, -6]])
    assert predict("ncm", support, y, query).tolist() == [4, 7, 7, 4]


def test_ncm_counts_directions_not_lengths_of_shapes():
    """The mean of the support is (0, 0). With normalised shapes, the mean of class 0 is along (1,
    1). Without normalisation it would be (5, 0.5), and (-1, 5) would be class 1.
    """
    support, y = np.array([[10.0, 0], [0, 1], [-10, 0], [0, -1]]), np.array([0, 0, 1, 1])
    assert predict("ncm", support, y, np.array([[-1.0, 5], [1, -5]])).tolist() == [0, 1]


def test_ncm_counts_directions_not_lengths_of_means():
    """The shapes of class 1 lie 60 degrees on either side of (0, 1), so their mean has length 0.5.
    A query at 50 degrees is nearer to its direction than to (1, 0).
    """
    support = np.array(
        [[1, 0], [1, 0], [0.75**0.5, 0.5], [-(0.75**0.5), 0.5], [-1, -0.5], [-1, -0.5]]
    )
    angles = np.deg2rad([40, 50])
    query = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert predict("ncm", support, np.array([0, 0, 1, 1, 2, 2]), query).tolist() == [0, 1]


@pytest.mark.parametrize("method", METHODS)
def test_what_a_shape_is_called_depends_on_no_other_query(method):
    y = np.repeat(np.arange(3), 5)
    x, query = features(y, 1, 1), features(np.arange(60) % 3, 1, 2)
    alone = np.concatenate([predict(method, x, y, query[i : i + 1]) for i in range(60)])
    crowd = 1000 * np.random.default_rng(3).normal(size=(200, 8)) + 500
    assert predict(method, x, y, np.concatenate([query, crowd]))[:60].tolist() == alone.tolist()
    assert len(set(alone.tolist())) == 3


def test_logistic_regression_standardises_by_the_support():
    """One feature, a thousand times smaller than seven of noise, contains the classes."""
    y, rng = np.repeat(np.arange(2), 50), np.random.default_rng(0)
    x, query = rng.normal(size=(2, 100, 8))
    for values in (x, query):
        values[:, 0] = 1e-3 * (0.1 * values[:, 0] + y)
    assert (predict("logistic", x, y, query) == y).mean() > 0.9
    assert (predict("logistic", x[:, 1:], y, query[:, 1:]) == y).mean() < 0.7


@pytest.fixture
def fake_layers(monkeypatch) -> list[int]:
    """Replace `layer_features` by two layers: noise, and the first point of each cloud. Returns the
    list of requested sizes.
    """
    asked = []

    def layers(_model, part):
        asked.append(len(part))
        last = part.points[:][:, 0]
        return np.stack([np.random.default_rng(0).normal(size=last.shape), last])

    monkeypatch.setattr(fewshot, "layer_features", layers)
    return asked


def labelled_by_place(data: PointClouds) -> PointClouds:
    """Move the first point of each cloud to a position of its class, plus a little noise."""
    places = 20 * np.random.default_rng(5).normal(size=(9, 3)).astype(np.float32)
    points = data.points.copy()
    points[:, 0] = 0.1 * points[:, 0] + places[data.labels]
    return replace(data, points=points)


def test_each_episode_gets_the_features_of_its_own_shapes(fake_layers):
    data = labelled_by_place(clouds([4] * 5, [3] * 5))
    for episode in draw_episodes(data, 3, 2, 6, seed=0, queries=2):
        assert accuracy(None, *fold_of(data, episode), "ncm") == 100
    assert fake_layers == [6, 6] * 6


def test_a_network_is_scored_on_real_episodes(tiny):
    torch.manual_seed(0)
    encoder = PointEncoder(**vars(tiny().encoder))
    data = clouds([4] * 3, [3] * 3, points=64)
    data.points[data.labels == 1, :, 2] = 0  # flat
    data.points[data.labels == 2, :, 1:] = 0  # thin
    episodes = draw_episodes(data, 3, 3, 2, seed=0, queries=3)
    for method in METHODS:
        assert min(accuracy(encoder, *fold_of(data, some), method) for some in episodes) > 60
