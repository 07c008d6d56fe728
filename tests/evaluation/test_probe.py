"""Probes: they find classes that the features contain, never choose on the test split, and report
missing classes.
"""

import json

import numpy as np
import pytest
import torch

from jepa3d import config as settings
from jepa3d.cli import main
from jepa3d.data.datasets import PointClouds
from jepa3d.data.io import ReadError
from jepa3d.evaluation import classifiers
from jepa3d.evaluation import probe as probing
from jepa3d.evaluation.features import layer_features, untrained_like
from jepa3d.evaluation.labelled import Labelled, LabelledSet
from jepa3d.evaluation.probe import PROTOCOLS, run_protocol, summarise
from jepa3d.evaluation.tables import show
from jepa3d.models.encoder import PointEncoder, calibrate_batchnorm


def features(labels: np.ndarray, gaps: tuple[float, ...], seed: int) -> np.ndarray:
    """Sample Gaussian features [L, n, 6] of `labels`; each layer has its own gap between the class
    means.
    """
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(0).normal(size=(9, 6))
    return np.stack([gap * means[labels] + rng.normal(size=(len(labels), 6)) for gap in gaps])


def data(gaps: tuple[float, ...], train: int = 90, test: int = 60, classes: int = 3) -> tuple:
    y, y_test = np.arange(train) % classes, np.arange(test) % classes
    return features(y, gaps, 1), y, features(y_test, gaps, 2), y_test


@pytest.fixture
def calls(monkeypatch):
    """Record the arguments of every call of `_confusion`, which fits and scores a classifier."""
    seen, confusion = [], probing._confusion

    def watched(*arguments, seed=0):
        seen.append(arguments)
        return confusion(*arguments, seed=seed)

    monkeypatch.setattr(probing, "_confusion", watched)
    monkeypatch.setattr(probing, "_DRAWS", 3)
    monkeypatch.setattr(classifiers, "_STEPS", 100)
    return seen


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_separable_features_are_separated_and_their_layer_is_found(protocol, calls):
    result = run_protocol(protocol, *data((0.0, 8.0)), [0, 1])
    assert result["accuracy"] > 97
    layers = (
        [layer for layer, _ in result["chosen"]] if protocol == "logistic_10" else [result["layer"]]
    )
    assert set(layers) == {1}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_features_that_know_nothing_score_chance(protocol, calls):
    result = run_protocol(protocol, *data((0.0,), 120, 400, 4), [0])
    assert 10 < result["accuracy"] < 40


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_test_labels_do_not_change_what_is_chosen(protocol, calls):
    x, y, x_test, y_test = data((0.5, 0.6, 0.4))
    one = run_protocol(protocol, x, y, x_test, y_test, [0, 1, 2])
    two = run_protocol(
        protocol, x, y, x_test, np.random.default_rng(0).permutation(y_test), [0, 1, 2]
    )
    assert one["accuracy"] != two["accuracy"]
    for choice in ("layer", "C", "chosen"):
        assert one.get(choice) == two.get(choice)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_layer_that_is_good_on_test_only_is_not_chosen(protocol, calls):
    x, y, x_test, y_test = data((8.0, 0.0))
    x_test = x_test[::-1]  # reversed: on test, only the second layer contains the classes
    result = run_protocol(protocol, x, y, x_test, y_test, [0, 1])
    layers = (
        [layer for layer, _ in result["chosen"]] if protocol == "logistic_10" else [result["layer"]]
    )
    assert set(layers) == {0}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_test_part_is_scored_once_and_last(protocol, calls):
    x, y, x_test, y_test = data((0.5, 0.6))
    run_protocol(protocol, x, y, x_test, y_test, [0, 1])
    uses = [i for i, (*_, against) in enumerate(calls) if against is y_test]
    assert len(uses) == (3 if protocol == "logistic_10" else 1)  # once per sample of the labels
    assert uses[-1] == len(calls) - 1


def test_selection_fits_on_four_fifths_and_scores_the_rest(calls):
    x, y, x_test, y_test = data((0.5, 0.6))
    run_protocol("svc_linear", x, y, x_test, y_test, [0, 1])
    assert [(len(fit), len(held)) for _, _, fit, _, held, _ in calls] == [
        (72, 18),
        (72, 18),
        (90, 60),
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_quick_probe_fits_once_a_draw_and_chooses_nothing(protocol, calls):
    """There is one fit per score, with the given C and the given layer."""
    result = run_protocol(protocol, *data((8.0, 0.0, 8.0)), [2], c=0.1)
    assert len(calls) == (3 if protocol == "logistic_10" else 1)
    assert {c for _, c, *_ in calls} == ({0.1} if protocol.startswith("logistic") else {0.0})
    assert result["accuracy"] > 97
    if protocol == "logistic_10":
        assert result["chosen"] == [[2, 0.1]] * 3
    else:
        assert (result["layer"], result["C"]) == (2, 0.1 if protocol == "logistic" else None)


def test_a_quick_probe_uses_the_last_layer_and_says_so(tmp_path, shapes, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PointEncoder(16, 2, 2, 16, 8, 64, tokenizer_dim=8).save_pretrained(tmp_path / "encoder")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "probe",
                "encoder",
                "--data",
                shapes,
                "--quick",
                "--protocols",
                "logistic",
                "logistic_10",
            ]
        )
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "layer last" in said
    assert "selection: none, quick: layer and C are fixed (C 0.1); test used once" in said
    (file,) = tmp_path.glob("probe-*.json")
    assert file.stem.endswith("-quick")
    for row in json.loads(file.read_text())["rows"]:
        # Handcrafted descriptors have one layer.
        last = 2 if row["model"] in ("untrained", "pretrained") else 0
        assert (row["scores"]["logistic"]["layer"], row["scores"]["logistic"]["C"]) == (last, 0.1)
        assert row["scores"]["logistic_10"]["chosen"] == [[last, 0.1]] * 10


def test_a_fixed_layer_is_used_and_only_c_is_chosen(calls):
    result = run_protocol("logistic", *data((0.0, 8.0)), [0])
    assert result["layer"] == 0
    assert {c for _, c, *_ in calls} == set(probing._C_GRID)
    assert run_protocol("knn", *data((0.0, 8.0)), [0])["C"] is None


def test_few_labels_are_ten_a_class_and_all_of_a_smaller_class(calls):
    y = np.repeat([0, 1, 2], [40, 25, 6])
    x, y_test = features(y, (1.0,), 1), np.arange(30) % 3
    result = run_protocol("logistic_10", x, y, features(y_test, (1.0,), 2), y_test, [0])
    finals = [labels for *_, labels, _, against in calls if against is y_test]
    assert [np.bincount(labels).tolist() for labels in finals] == [[10, 10, 6]] * 3
    assert len(result["chosen"]) == 3


def test_few_labels_choose_among_the_same_ten_and_score_the_mean_over_draws(calls, monkeypatch):
    x, y, x_test, y_test = data((1.0, 0.9))
    drawn, scores = [], iter([50.0, 60.0, 80.0])

    def scripted(_protocol, _c, fit, labels, _held, against, *, seed):
        drawn.append((len(fit), np.bincount(labels).tolist(), against is y_test))
        right = next(scores) if against is y_test else 0.0
        return np.array([[right, 100 - right], [0, 0]])

    monkeypatch.setattr(probing, "_confusion", scripted)
    result = run_protocol("logistic_10", x, y, x_test, y_test, [0, 1])
    # Each fit uses four of five folds of the 30 labels.
    assert {rows for rows, _, final in drawn if not final} == {24}
    assert [counts for _, counts, final in drawn if final] == [[10, 10, 10]] * 3
    assert result["accuracy"] == pytest.approx(190 / 3)
    assert result["std_over_draws"] == pytest.approx(
        np.sqrt(((50 - 190 / 3) ** 2 + (60 - 190 / 3) ** 2 + (80 - 190 / 3) ** 2) / 2)
    )


def test_draws_differ_and_the_seed_decides_them(calls):
    x, y, x_test, y_test = data((0.5,))

    def drawn(seed: int) -> list[float]:
        calls.clear()
        run_protocol("logistic_10", x, y, x_test, y_test, [0], seed)
        return [float(fit.sum()) for _, _, fit, _, _, against in calls if against is y_test]

    assert len({*drawn(0), *drawn(1)}) == 6
    assert drawn(0) == drawn(0)


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name != "logistic_10"])
def test_the_confusion_counts_every_test_shape_and_its_diagonal_is_the_accuracy(protocol, calls):
    # The labels have gaps, and the test classes have unequal sizes.
    y, y_test = np.arange(90) % 3 * 2, np.repeat([0, 2, 4], [10, 20, 30])
    x, x_test = features(y, (1.0,), 1), features(y_test, (1.0,), 2)
    result = run_protocol(protocol, x, y, x_test, y_test, [0])
    table = np.array(result["confusion"])
    assert table.sum(1).tolist() == [10, 20, 30]  # rows are true classes
    assert 0 < np.trace(table) < 60
    assert result["accuracy"] == pytest.approx(100 * np.trace(table) / 60)
    assert result["mean_class_accuracy"] == pytest.approx(
        100 * np.mean(np.diag(table) / [10, 20, 30])
    )
    found = classifiers.predict(protocol, result["C"] or 0.0, x[0], y, x_test[0])
    assert table[0, 1] == np.sum((y_test == 0) & (found == 2))  # columns are predicted classes
    assert np.sum(found == y_test) == np.trace(table)


def test_ten_labels_a_class_are_many_draws_and_have_no_confusion(calls):
    assert "confusion" not in run_protocol("logistic_10", *data((0.5,)), [0])


def test_mlp3_is_the_same_for_a_seed_whatever_torch_drew_before_and_draws_nothing_itself(calls):
    x, y, x_test, y_test = data((0.5, 0.6))
    found = []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        found.append(run_protocol("mlp3", x, y, x_test, y_test, [0, 1], seed))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]
    assert found[0]["confusion"] != found[2]["confusion"]


def test_mlp3_is_the_head_of_point_mae():
    layers = list(classifiers._head(192, 10))
    assert [
        tuple(layer.weight.shape) for layer in layers if isinstance(layer, torch.nn.Linear)
    ] == [
        (256, 192),
        (256, 256),
        (10, 256),
    ]
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == [*["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2, "Linear"]
    assert {layer.p for layer in layers if isinstance(layer, torch.nn.Dropout)} == {0.5}


def test_mlp3_finds_what_no_plane_separates(calls):
    """The class is the sign of a product, so a linear protocol can only score chance."""
    x, x_test = (np.random.default_rng(seed).normal(size=(1, 400, 4)) for seed in (1, 2))
    y, y_test = ((half[0, :, 0] * half[0, :, 1] > 0).astype(int) for half in (x, x_test))
    accuracy = {
        name: run_protocol(name, x, y, x_test, y_test, [0])["accuracy"]
        for name in ("mlp3", "logistic")
    }
    assert accuracy["mlp3"] > 85
    assert accuracy["logistic"] < 65


def clouds(labels, split) -> PointClouds:
    points = np.arange(len(split) * 6, dtype=np.float32).reshape(-1, 2, 3)
    names = tuple("abcdefgh")
    return PointClouds(
        "set", "f", points, None if labels is None else np.array(labels), names, split
    )


def test_classes_of_one_half_are_dropped_and_named(capsys):
    split = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    found = Labelled.of(clouds([0, 1, 2, 0, 0, 1, 3, 4], split))
    assert found.y.tolist() == [0, 1, 0]
    assert found.y_test.tolist() == [0, 1]
    assert found.dropped == ("c (1 train, 0 test)", "d (0 train, 1 test)", "e (0 train, 1 test)")
    assert "3 classes dropped" in (said := capsys.readouterr().out)
    assert all(name in said for name in found.dropped)
    assert found.train.points[:, 0, 0].tolist() == [0, 6, 18]


def test_a_report_json_of_the_user_s_own_is_not_read(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("train/cup", "train/axe", "test/cup", "test/axe"):
        (tmp_path / folder).mkdir(parents=True)
        np.save(tmp_path / folder / "1.npy", rng.normal(size=(40, 3)))
    (tmp_path / "report.json").write_text("[1]")
    assert LabelledSet(str(tmp_path)).read(16).layout is None


def test_a_source_s_validation_part_is_neither_train_nor_test():
    source = clouds([0, 1, 0, 1, 0, 1, 0], np.array([0, 0, 0, 1, 1, 2, 2]))
    found = Labelled.of(source)
    assert found.train.points[:, 0, 0].tolist() == [0, 6, 12]
    assert found.test.points[:, 0, 0].tolist() == [18, 24]
    assert found.validation.points[:, 0, 0].tolist() == [30, 36]
    found = Labelled.of(source, "validation")
    assert found.test.points[:, 0, 0].tolist() == [30, 36]
    assert found.validation is None
    # pretraining on train has not seen the source's own validation split
    seen = {split: {"data": ["a/set"], "split": split} for split in ("train", "all")}
    assert not probing.was_seen(seen["train"], "b/set", found)
    assert probing.was_seen(seen["all"], "b/set", found)
    found = Labelled.of(clouds([0, 1] * 8, np.repeat([0, 1], [12, 4])), "validation")
    assert probing.was_seen(seen["train"], "b/set", found)


def test_a_source_s_validation_part_chooses_layer_and_c():
    """Layer 0 separates the classes of the train split only; layer 1 does so in both splits."""
    y = np.repeat([0, 1], 20)
    good, rng = (
        np.eye(2)[y] + np.random.default_rng(0).normal(scale=0.8, size=(40, 2)),
        np.random.default_rng(1),
    )
    features = np.stack([np.eye(2)[y], good])  # in the train split, layer 0 is the answer
    x_test = np.stack([rng.normal(size=(40, 2)), np.eye(2)[y]])
    found = run_protocol("logistic", features, y, x_test, y, [0, 1])
    assert (found["layer"], found["accuracy"] < 80) == (0, True)
    found = run_protocol("logistic", features, y, x_test, y, [0, 1], held=(x_test, y))
    assert (found["layer"], found["accuracy"]) == (1, 100)


def test_validation_is_a_fifth_of_train_of_every_class_and_leaves_test_alone():
    split = np.repeat([0, 1], [40, 10])
    source = clouds(np.arange(50) % 4, split)
    found = Labelled.of(source, "validation")
    assert np.bincount(found.y).tolist() == [8, 8, 8, 8]
    assert np.bincount(found.y_test).tolist() == [2, 2, 2, 2]
    assert not found.dropped
    seen = {float(value) for half in found.subsets() for value in half.points[:, 0, 0]}
    # All shapes of train are used, and none of test.
    assert seen == {float(value) for value in source.points[:40, 0, 0]}
    assert (Labelled.of(source, "validation").test.points == found.test.points).all()


@pytest.mark.parametrize(
    ("labels", "split", "said"),
    [
        (None, np.array([0, 1]), "no labels"),
        ([0, 1], None, "no train/test split"),
        ([0, 1, 0, 2], np.array([0, 0, 1, 1]), "1 classes"),
    ],
)
def test_data_that_cannot_be_probed_is_refused_in_one_line(labels, split, said):
    source = clouds(labels, split if split is not None else np.zeros(2))
    source = PointClouds(source.name, "f", source.points, source.labels, source.class_names, split)
    with pytest.raises(ReadError, match=rf"\Aset: .*{said}.*\Z"):
        Labelled.of(source)


def test_validation_without_a_train_part_is_refused():
    with pytest.raises(ReadError, match=r"\Aset: 0 train shapes.*\Z"):
        Labelled.of(clouds([0, 1, 0, 1], np.ones(4)), "validation")


def test_one_train_shape_a_class_is_refused_where_something_is_chosen(calls):
    x, y, x_test, y_test = data((1.0, 2.0), train=3)
    for protocol in ("knn", "logistic_10"):
        with pytest.raises(ValueError, match=r"\Aevery class has only one train shape.*\Z"):
            run_protocol(protocol, x, y, x_test, y_test, [0, 1])
        assert run_protocol(protocol, x, y, x_test, y_test, [1], c=0.1)["accuracy"] > 30


def test_a_class_of_one_shape_beside_one_other_class_is_probed(calls):
    x, y, x_test, y_test = data((1.0, 2.0), train=8, classes=2)
    keep = np.flatnonzero((y == 1) | (np.arange(8) == 0))
    found = run_protocol("logistic_10", x[:, keep], y[keep], x_test, y_test, [0, 1])
    assert found["accuracy"] > 30


def row(run: str, model: str, accuracy: float) -> dict:
    return {"run": run, "model": model, "seed": 0, "scores": {"knn": {"accuracy": accuracy}}}


def test_the_gain_is_paired_by_run_with_the_sample_deviation():
    rows = [
        row("a", "untrained", 50.0),
        row("b", "untrained", 60.0),
        row("b", "pretrained", 90.0),
        row("a", "pretrained", 70.0),
    ]
    table = summarise(rows, ("knn",))
    assert table["untrained"]["knn"] == {"mean": 55.0, "std": pytest.approx(50**0.5), "runs": 2}
    assert table["pretrained"]["knn"] == {"mean": 80.0, "std": pytest.approx(200**0.5), "runs": 2}
    assert table["gain"]["knn"] == {"mean": 25.0, "std": pytest.approx(50**0.5), "runs": 2}
    assert "teacher" not in table


def test_one_run_has_no_deviation():
    table = summarise(
        [row("a", "untrained", 50.0), row("a", "teacher", 40.0), row("a", "pretrained", 45.0)],
        ("knn",),
    )
    assert table["gain"]["knn"] == {"mean": -5.0, "std": None, "runs": 1}
    assert table["teacher"]["knn"]["mean"] == 40.0


def test_the_mean_class_accuracy_stands_beside_the_accuracy_it_belongs_to():
    rows = [row("a", "untrained", 50.0), row("a", "pretrained", 70.0), row("b", "untrained", 50.0)]
    rows.append(row("b", "pretrained", 60.0))
    for at, mean in zip(rows, (40.0, 45.0, 40.0, 65.0), strict=True):
        at["scores"]["knn"]["mean_class_accuracy"] = mean
    table = summarise(rows, ("knn",))
    assert table["pretrained"]["knn"]["mean"] == 65.0
    assert table["pretrained"]["knn"]["mean_class_accuracy"]["mean"] == 55.0
    assert table["gain"]["knn"]["mean_class_accuracy"] == {
        "mean": 15.0,
        "std": pytest.approx(200**0.5),
        "runs": 2,
    }


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> dict:
    """Probe two seeds of an imitated run on shapes of four classes, one of which is in the train
    split only. Returns the result.
    """
    folder = tmp_path_factory.mktemp("probed")
    runs = [folder / f"run-{seed}" for seed in (0, 1)]
    encoder = {
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "num_groups": 4,
        "group_size": 8,
        "num_points": 32,
    }
    for seed, run in enumerate(runs):
        run.mkdir()
        config = {
            "objective": "jepa",
            "teacher": ["ema"],
            "encoder": encoder,
            "seed": seed,
            "data": [],
            "split": "all",
        }
        (run / "config.json").write_text(json.dumps(config))
        (run / "run.json").write_text("{}")
        for at, name in enumerate(("untrained", "encoder")):
            torch.manual_seed(2 * seed + at)
            PointEncoder(**encoder).save_pretrained(run / name)
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(32) % 4, np.repeat([0, 2, 3], [8, 4, 4])])
    stretch = np.array([[1, 1, 1], [1, 1, 9], [1, 9, 1], [9, 9, 1]])[labels]
    np.savez(
        folder / "blobs.npz",
        points=(rng.normal(size=(48, 32, 3)) * stretch[:, None]).astype(np.float32),
        labels=labels,
        class_names=["ball", "rod", "beam", "disc [flat]"],
        split=np.repeat([0, 1], [32, 16]),
    )
    protocols = ("logistic_10", "knn", "svc_linear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "_DRAWS", 2)
        return probing.probe(runs, str(folder / "blobs.npz"), protocols=protocols)


def test_every_row_names_its_present_classes_and_their_accuracy(probed):
    assert probed["class_names"] == ["ball", "beam", "disc [flat]"]
    assert probed["pooling"] == "mean_max"
    assert json.loads(json.dumps(probed)) == probed
    for at in probed["rows"]:
        assert not {"confusion", "per_class", "predicted"} & set(at["scores"]["logistic_10"])
        for protocol in ("knn", "svc_linear"):
            score = at["scores"][protocol]
            table = np.array(score["confusion"])
            assert table.sum(1).tolist() == [8, 4, 4]
            assert list(score["per_class"]) == probed["class_names"]
            for i, figures in enumerate(score["per_class"].values()):
                assert figures == {
                    "accuracy": 100 * table[i, i] / table[i].sum(),
                    "count": table[i].sum(),
                }
            assert "predicted" not in score


def test_the_table_of_classes_is_printed_when_asked_for(probed, capsys):
    show(probing.sheets(probed))
    assert "beam" not in capsys.readouterr().out
    show(probing.sheets(probed, per_class="knn"))
    lines = [line.replace("│", " ") for line in capsys.readouterr().out.splitlines()]
    scores = [(at["model"], at["scores"]["knn"]) for at in probed["rows"]]

    def mean(model: str, figure) -> float:
        return float(np.mean([figure(score) for name, score in scores if name == model]))

    def cells(figure) -> list[str]:
        models = ("untrained", "pretrained", "histograms", "geometry")
        before, after, *by_hand = (mean(model, figure) for model in models)
        return [f"{value:.1f}" for value in (before, after, *by_hand)] + [f"{after - before:+.1f}"]

    for name, count in (("ball", 8), ("beam", 4), ("disc [flat]", 4)):
        found = (
            next(line for line in lines if f" {name} " in line).removeprefix(f"  {name}").split()
        )
        assert found == [
            str(count),
            *cells(lambda score, name=name: score["per_class"][name]["accuracy"]),
        ]
    found = next(line for line in lines if "mean class accuracy" in line).split()[3:]
    assert found == ["16", *cells(lambda score: score["mean_class_accuracy"])]


@pytest.mark.parametrize("protocol", ["logistic_10", "mlp3", "svm"])
def test_a_protocol_without_figures_of_classes_is_refused(probed, protocol):
    with pytest.raises(
        ValueError,
        match=rf"\A--per-class '{protocol}': use one of the probed protocols: knn, svc_linear .*\Z",
    ):
        probing.check_per_class(protocol, probed["rows"][0]["scores"])


@pytest.mark.parametrize("content", ["nothing", "folder", "unfinished"])
def test_a_folder_that_is_no_finished_run_is_refused_in_one_line(tmp_path, content):
    run = tmp_path / "run"
    if content != "nothing":
        run.mkdir()
    if content == "unfinished":
        (run / "config.json").write_text(
            json.dumps({"objective": "jepa", "encoder": {"num_points": 64}, "seed": 0})
        )
        (run / "run.json").write_text("{}")
        (run / "untrained").mkdir()
    with pytest.raises(ValueError, match=rf"\A{run}\b.*\Z") as caught:
        probing.probe([run], "synthetic:24")
    assert ("--resume" in str(caught.value)) == (content == "unfinished")


def test_an_unknown_protocol_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="'svm' is not one of logistic"):
        probing.probe([tmp_path], "synthetic:24", protocols=("svm",))


def test_the_built_in_shapes_are_neither_trivial_nor_hopeless():
    """A logistic probe of preset tiny's untrained encoder scores between 50 and 90 per cent."""
    torch.manual_seed(0)
    encoder = PointEncoder(**vars(settings.resolve(settings.preset("tiny")).encoder))
    shapes = LabelledSet("synthetic:1000").read(512)
    calibrate_batchnorm(encoder, torch.from_numpy(shapes.train.points[:256]))
    x, x_test = (layer_features(encoder, half) for half in shapes.subsets())
    found = probing.run_protocol("logistic", x, shapes.y, x_test, shapes.y_test, [encoder.depth])
    assert 50 < found["accuracy"] < 90


@pytest.mark.parametrize("where", ["folder", "run's folder", "default"])
def test_an_encoder_by_itself_is_probed_beside_an_untrained_one_of_its_settings(
    where, tmp_path, shapes, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    encoder = PointEncoder(16, 1, 2, 4, 8, 32)
    monkeypatch.setattr("jepa3d.models.ready.DEFAULT", tmp_path / "own")
    folder = (
        tmp_path / {"folder": "own", "run's folder": "runs/mine/encoder", "default": "own"}[where]
    )
    encoder.save_pretrained(folder)
    name = "default" if where == "default" else str(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as ended:
        main(["probe", name, "--data", shapes, "--protocols", "knn", "--up-axis", "y"])
    assert not ended.value.code
    assert sorted(folder.iterdir()) == before
    called = {"folder": "own", "run's folder": "mine", "default": "default"}[where]
    result = json.loads((tmp_path / f"probe-shapes-{called}-up-y-knn.json").read_text())
    by_hand = ["histograms", "geometry"]
    assert [row["model"] for row in result["rows"]] == ["untrained", "pretrained", *by_hand]
    assert set(result["summary"]) == {"untrained", "pretrained", "gain", *by_hand}
    read = LabelledSet(shapes, up_axis="y").read(32)
    untrained = untrained_like(encoder, read.train)
    for row, model in zip(result["rows"][:2], (untrained, encoder), strict=True):
        x, x_test = (layer_features(model, half) for half in read.subsets())
        expected = run_protocol("knn", x, read.y, x_test, read.y_test, [0, 1])
        assert row["scores"]["knn"]["confusion"] == expected["confusion"]


def test_folders_whose_names_differ_after_a_dot_have_results_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probing, "probe", lambda *arguments: {})
    monkeypatch.setattr(probing, "sheets", lambda *arguments: [])
    for name in ("scans.v1", "scans.v2"):
        (tmp_path / name).mkdir()
        with pytest.raises(SystemExit):
            main(["probe", "default", "--data", name])
    files = {file.name for file in tmp_path.glob("probe-*.json")}
    assert files == {"probe-scans.v1-default.json", "probe-scans.v2-default.json"}


def test_encoders_by_themselves_are_not_averaged(tmp_path):
    for name in ("a", "b"):
        PointEncoder(16, 1, 2, 4, 8, 32).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="one per command"):
        probing.probe([tmp_path / "a", tmp_path / "b"], "synthetic:24")
