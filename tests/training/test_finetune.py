"""Supervised runs: selection never uses the test split, a resumed run gives the same result, and
bad settings give one clear line.
"""

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jepa3d import config as settings
from jepa3d.cli import main
from jepa3d.config import FinetuneConfig, SegmentConfig
from jepa3d.data.synthetic import make_shapes
from jepa3d.evaluation.classifiers import fit_head
from jepa3d.evaluation.features import layer_features
from jepa3d.evaluation.labelled import Labelled, stratified
from jepa3d.evaluation.supervised import predict
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier, LinearClassifier
from jepa3d.models.ready import load_network
from jepa3d.plain import from_dict, merge
from jepa3d.training import finetune as training
from jepa3d.training.finetune import finetune
from jepa3d.training.loop import Interrupted
from jepa3d.training.optim import adamw
from jepa3d.training.pretrain import pretrain

ENCODER = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_groups": 16,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 8,
    "drop_path": 0.1,
}
QUICK = {
    "batch_size": 8,
    "max_steps": 12,
    "epochs": 4,
    "lr": 3e-3,
    "log_every": 1,
    "checkpoint_every": 3,
    "encoder": ENCODER,
}


@pytest.fixture
def config(shapes):
    """Return a function that makes a FinetuneConfig from overrides. Its run takes a second."""
    return lambda **overrides: from_dict(FinetuneConfig, merge(QUICK, {"data": shapes}, overrides))


@pytest.fixture
def segment_config(shapes):
    return lambda **overrides: from_dict(SegmentConfig, merge(QUICK, {"data": shapes}, overrides))


def result(run) -> dict:
    return json.loads((run / "results.json").read_text())


def test_it_learns_and_says_how_its_number_was_made(config, tmp_path):
    run = finetune(config(max_steps=60), tmp_path / "run")
    found = result(run)
    assert found["metrics"]["overall_accuracy"] > 70
    assert found["protocol"] == "fine-tuned, all weights"
    assert (found["selection"], found["votes"], found["init"], found["seed"]) == (
        "validation",
        1,
        "scratch",
        0,
    )
    assert (found["data"]["train"], found["data"]["validation"], found["data"]["test"]) == (
        129,
        33,
        78,
    )
    saved = np.load(run / "predictions.npz")
    accuracy = 100 * (saved["label"] == saved["predicted"]).mean()
    assert found["metrics"]["overall_accuracy"] == pytest.approx(accuracy)
    assert np.trace(found["details"]["confusion"]) == (saved["label"] == saved["predicted"]).sum()
    assert found["command"]
    assert found["versions"]["torch"]
    assert not (run / "best").exists()
    assert not (run / "checkpoints").exists()


def test_the_kept_epoch_is_the_best_on_validation(config, tmp_path):
    run = finetune(config(max_steps=48), tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    looked = [line["validation"] for line in lines if "validation" in line]
    assert len(looked) == 3
    assert result(run)["validation"]["overall_accuracy"] == pytest.approx(max(looked))


def test_test_labels_change_nothing_but_the_test_figure(config, shapes, tmp_path):
    data = Labelled.load(config(), 64)
    wrong = replace(data.test, labels=np.random.default_rng(0).permutation(data.test.labels))
    one = finetune(config(), tmp_path / "one", data=data)
    two = finetune(config(), tmp_path / "two", data=replace(data, test=wrong))
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, two)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert result(one)["metrics"] != result(two)["metrics"]
    assert result(one)["validation"] == result(two)["validation"]


def test_selection_on_test_is_called_that_and_last_is_last(config, tmp_path):
    on_test = finetune(config(select="best-on-test", max_steps=48), tmp_path / "test")
    assert result(on_test)["selection"] == "best on test"
    lines = [json.loads(line) for line in (on_test / "metrics.jsonl").read_text().splitlines()]
    best = max(line["test"] for line in lines if "test" in line)
    assert result(on_test)["metrics"]["overall_accuracy"] == pytest.approx(best)
    last = finetune(config(select="last"), tmp_path / "last")
    assert (result(last)["selection"], result(last)["validation"]) == ("last epoch", None)


def test_few_labels_are_all_trained_on(config, tmp_path, capsys):
    run = finetune(config(labels=0.3), tmp_path / "run")
    assert result(run)["selection"] == "last epoch"
    assert (result(run)["data"]["train"], result(run)["data"]["validation"]) == (48, 0)
    assert "48 labelled shapes: none are held out" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [4, 9])
def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path, stop):
    whole = finetune(config(max_steps=36), tmp_path / "whole")
    with pytest.raises(Interrupted):
        finetune(config(max_steps=36), tmp_path / "cut", stop_at=stop)
    cut = finetune(config(max_steps=36), tmp_path / "cut", resume=True)
    weights = [load_file(run / "model" / "model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert result(whole)["metrics"] == result(cut)["metrics"]


def test_it_begins_with_the_encoder_it_is_given_at_the_size_it_is_told(config, tmp_path):
    torch.manual_seed(5)
    encoder = PointEncoder(**ENCODER)
    encoder.save_pretrained(tmp_path / "given")
    run = finetune(
        config(init=str(tmp_path / "given"), num_groups=12, num_points=48), tmp_path / "run"
    )
    start = PointEncoder.from_pretrained(run / "start")
    assert (start.num_groups, start.num_points) == (12, 48)
    assert all(
        torch.equal(value, start.state_dict()[name]) for name, value in encoder.state_dict().items()
    )
    assert json.loads((run / "config.json").read_text())["encoder"]["num_groups"] == 12
    assert result(run)["init"] == str(tmp_path / "given")


def test_a_frozen_encoder_stays_and_the_head_learns(config, tmp_path):
    run = finetune(config(trained="head", max_steps=20), tmp_path / "run")
    start, end = (
        load_file(run / "start" / "model.safetensors"),
        load_file(run / "model" / "model.safetensors"),
    )
    assert all(torch.equal(value, end[f"encoder.{name}"]) for name, value in start.items())
    assert end["cls_token"].any()
    assert result(run)["protocol"] == "fine-tuned, head only"


@pytest.fixture
def head_first(config, tmp_path):
    """Return a function that makes settings from overrides, for a head-first run from a saved
    encoder.
    """
    torch.manual_seed(5)
    PointEncoder(**ENCODER).save_pretrained(tmp_path / "given")
    given = {"init": str(tmp_path / "given"), "trained": "head_first"}
    return lambda **overrides: config(**given | overrides)


def test_head_first_begins_as_the_frozen_probe(head_first):
    config = head_first()
    data, encoder = Labelled.load(config, 64), training.start_encoder(config, None)
    said = predict(training.make_network(config, data, data.train, encoder), data.test)
    head = fit_head(layer_features(encoder, data.train)[-1], data.train.labels)[0]
    expected = head.predict_proba(layer_features(encoder, data.test)[-1])
    np.testing.assert_allclose(said["probability"], expected, atol=1e-4)
    assert (said["predicted"] == data.test.labels).mean() > 0.5


def test_head_first_trains_all_but_the_statistics_of_batchnorm(head_first, tmp_path):
    run = finetune(head_first(select="last"), tmp_path / "run")
    start, end = (
        load_file(run / "start" / "model.safetensors"),
        load_file(run / "model" / "model.safetensors"),
    )
    same = {name for name, value in start.items() if torch.equal(value, end[f"encoder.{name}"])}
    kept = ("running_mean", "running_var", "num_batches_tracked")
    assert same == {name for name in start if name.endswith(kept)} != set()
    assert result(run)["protocol"] == "fine-tuned, head first"
    assert isinstance(load_network(run), LinearClassifier)


def test_head_first_keeps_the_fitted_head_where_no_epoch_is_better(head_first, tmp_path, capsys):
    config = head_first(max_steps=34)  # the learning rate is too large, so training makes it worse
    data, encoder = Labelled.load(config, 64), training.start_encoder(config, None)
    train, validation = data.divide(1.0, 0.2, 0)
    begun = training.make_network(config, data, train, encoder)
    run = finetune(config, tmp_path / "run")
    kept = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in begun.state_dict().items())
    said = 100 * (predict(begun, validation)["predicted"] == validation.labels).mean()
    assert f"no training yet: validation {said:.4g}" in capsys.readouterr().out


def test_a_resumed_head_first_run_is_the_uninterrupted_one(head_first, tmp_path):
    whole = finetune(head_first(select="last"), tmp_path / "whole")
    with pytest.raises(Interrupted):
        finetune(head_first(select="last"), tmp_path / "cut", stop_at=5)
    cut = finetune(head_first(select="last"), tmp_path / "cut", resume=True)
    weights = [load_file(run / "model" / "model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert result(whole)["metrics"] == result(cut)["metrics"]


def test_head_first_takes_one_label_a_class(head_first, tmp_path):
    run = finetune(head_first(labels=0.01, max_steps=2), tmp_path / "run")
    assert result(run)["data"]["train"] == result(run)["data"]["classes"]


def test_head_first_needs_an_encoder_and_whole_shapes(config, segment_config, tmp_path):
    with pytest.raises(ValueError, match="head_first needs --init"):
        finetune(config(trained="head_first"), tmp_path / "run")
    with pytest.raises(ValueError, match="segment takes --trained all or head"):
        finetune(segment_config(trained="head_first", init="default"), tmp_path / "run")


def test_only_a_folder_of_a_run_comes_from_that_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(pretrain(tiny(max_steps=1), tmp_path / "run"))
    assert training.pretraining_of("default") is None
    assert (training.pretraining_of("encoder") or {})["encoder_of"] == ""


def test_the_encoder_of_the_package_is_a_beginning(config):
    encoder = training.start_encoder(config(init="default", num_points=256, num_groups=32), None)
    assert (encoder.width, encoder.num_points, encoder.num_groups) == (192, 256, 32)


def test_layer_decay_slows_the_early_layers():
    network = Classifier(ENCODER, ["a", "b"])
    optimizer = adamw(network, FinetuneConfig(), 0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scale) == len(list(network.parameters()))
    assert scale[id(network.out.weight)] == 1
    assert scale[id(network.encoder.blocks[1].mlp[0].weight)] == 0.5
    assert scale[id(network.encoder.blocks[0].mlp[0].weight)] == 0.25
    assert scale[id(network.encoder.tokenizer.linear1.weight)] == 0.125


def test_votes_average_logits_as_in_point_mae(config, monkeypatch):
    """The mean logits of three votes are 8/3, 2, 0, so the first class wins. By mean probabilities
    it would lose, 0.36 to 0.61.
    """
    said = iter([[8.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 3.0, 0.0]])
    monkeypatch.setattr(
        Classifier, "forward", lambda _, points: torch.tensor([next(said)] * len(points))
    )
    shapes = Labelled.load(config(), 64).test
    found = predict(Classifier(ENCODER, ["a", "b", "c"]), shapes, votes=3, batch_size=len(shapes))
    assert set(found["predicted"]) == {0}
    assert found["probability"][0] == pytest.approx([0.631, 0.324, 0.044], abs=1e-3)


def test_votes_are_counted_and_repeatable(config, tmp_path):
    one, two = (finetune(config(votes=3), tmp_path / name) for name in ("one", "two"))
    assert result(one)["votes"] == 3
    assert result(one)["metrics"] == result(two)["metrics"]
    probability = [np.load(run / "predictions.npz")["probability"] for run in (one, two)]
    np.testing.assert_array_equal(*probability)
    assert not np.array_equal(
        probability[0],
        np.load(finetune(config(), tmp_path / "p") / "predictions.npz")["probability"],
    )


def test_labelled_fractions_are_stratified_and_never_mix_with_validation():
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    picked = stratified(labels, 0.1, np.random.default_rng(0))
    assert np.bincount(labels[picked]).tolist() == [10, 4, 1]
    spared = stratified(np.repeat([0, 1], [10, 1]), 0.2, np.random.default_rng(0), keep=1)
    assert len(stratified(np.zeros(2, int), 0.5, np.random.default_rng(0), keep=3)) == 0
    assert spared.tolist() != []
    assert 10 not in spared  # the only shape of its class stays for training


def test_train_validation_and_test_are_disjoint(config):
    data = Labelled.load(config(), 64)
    train, validation = data.divide(0.5, 0.25, seed=3)
    clouds = [
        {cloud.tobytes() for cloud in part.points[:]} for part in (train, validation, data.test)
    ]
    assert [len(part) for part in clouds] == [60, 21, 78]
    assert not clouds[0] & clouds[1]
    assert not (clouds[0] | clouds[1]) & clouds[2]
    assert len(data.divide(0.5, 0.25, seed=3)[0]) == len(train)


def test_parts_are_learned_within_each_category(segment_config, tmp_path):
    run = finetune(
        segment_config(max_steps=80, lr=5e-3, rotate=False, scale=[1, 1], translate=0),
        tmp_path / "run",
    )
    found = result(run)
    assert found["metrics"]["instance_miou"] > 60
    assert set(found["details"]["per_category"]) == {"ball", "disc", "rod"}
    saved = np.load(run / "predictions.npz")
    assert (saved["predicted"] // 2 == saved["label"][:, None]).all()
    assert saved["points"].shape == (78, 64, 3)
    assert (saved["parts"] % 2 == (saved["points"][..., 0] > saved["points"][..., 0].min())).any()


def test_a_resumed_segmentation_is_the_uninterrupted_one(segment_config, tmp_path):
    whole = finetune(segment_config(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        finetune(segment_config(), tmp_path / "cut", stop_at=5)
    finetune(segment_config(), tmp_path / "cut", resume=True)
    assert result(whole)["metrics"] == result(tmp_path / "cut")["metrics"]


def test_a_run_from_scratch_at_other_sizes_is_resumed_too(config, tmp_path):
    with pytest.raises(Interrupted):
        finetune(config(num_groups=12), tmp_path / "run", stop_at=4)
    finetune(config(num_groups=12), tmp_path / "run", resume=True)
    assert result(tmp_path / "run")["settings"]["num_groups"] == 12


def test_a_share_of_the_labels_is_a_share_of_those_for_validation_too(config):
    data = Labelled.load(config(), 64)
    data = replace(data, validation=data.test)
    assert training.selection(config(), data) == ("validation", 0.0)
    assert data.divide(1.0, 0.0, 0)[1] is data.test
    assert training.selection(config(labels=0.2), data) == ("last", 0.0)
    assert data.divide(0.2, 0.0, 0)[1] is None
    assert training.selection(config(labels=0.8), data) == ("validation", 0.2)


def test_layers_are_those_of_the_encoder_that_is_loaded(segment_config, tmp_path):
    PointEncoder(**ENCODER).save_pretrained(tmp_path / "given")
    config = segment_config(init=str(tmp_path / "given"), layers=[1, 2, 3], encoder={"depth": 12})
    with pytest.raises(ValueError, match="3 must be from 0"):
        finetune(config, tmp_path / "run")


def test_scratch_weights_are_the_seed_s(config):
    data = Labelled.load(config(), 64)
    one, two, three = (
        training.make_network(config(seed=s), data, data.train, None) for s in (0, 0, 1)
    )
    assert torch.equal(one.out.weight, two.out.weight)
    assert not torch.equal(one.out.weight, three.out.weight)


def test_encoders_from_scratch_with_other_settings_are_other_arms(config):
    """`jepa3d results` averages runs with equal settings."""
    changes = [{}, {"mlp_ratio": 2.0}, {"tokenizer_dim": 4}, {"qkv_bias": True}, {"depth": 1}]
    arms = [training.arm_settings(config(encoder=change)) for change in changes]
    assert all(one != other for one, other in itertools.combinations(arms, 2))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"labels": 0}, "labels 0 must lie in (0, 1]"),
        ({"validation": 1.0}, "validation 1.0 must lie in [0, 1)"),
        ({"batch_size": 1}, "at least 2"),
        ({"init": "nowhere"}, "nowhere: no encoder"),
        ({"data": ""}, "--data is missing"),
        ({"lr": 0}, "lr 0 must be positive"),
        ({"labels_key": "nothing"}, "nothing"),
        ({"track": "board"}, "--track board is unknown"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(config, tmp_path, overrides, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        finetune(config(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_without_a_test_part_says_what_makes_one(config, tmp_path):
    np.savez(
        tmp_path / "d.npz", points=make_shapes(12, 64, seed=0)["points"], labels=np.arange(12) % 2
    )
    with pytest.raises(ValueError, match="no test shapes; make one with: jepa3d prepare --split"):
        finetune(config(data=str(tmp_path / "d.npz")), tmp_path / "run")


def test_segmenting_data_without_parts_says_what_gives_them(segment_config, bundle, tmp_path):
    with pytest.raises(ValueError, match="no part labels"):
        finetune(segment_config(data=bundle), tmp_path / "run")


def test_a_run_of_one_task_is_not_resumed_as_another(config, shapes, tmp_path, capsys):
    finetune(config(), tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["segment", "--data", shapes, "--out", str(tmp_path / "run"), "--resume"])
    assert "a run of jepa3d classify, not of segment" in capsys.readouterr().err


def command(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0


def test_the_command_line_trains_resumes_and_shows(shapes, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(json.dumps({k: v for k, v in QUICK.items()}))
    words = [
        "classify",
        "--recipe",
        str(tmp_path / "r.yaml"),
        "--data",
        shapes,
        "--out",
        str(tmp_path / "run"),
    ]
    command([*words, "--max-steps", "4"])
    said = capsys.readouterr().out
    assert "fine-tuned, all weights on shapes.npz: overall accuracy" in said
    assert "selection: validation" in said
    command(["classify", "--out", str(tmp_path / "run"), "--resume"])
    assert "finished already" in capsys.readouterr().out


def test_presets_give_sizes_to_scratch():
    assert settings.preset("tiny", FinetuneConfig)["encoder"]["embed_dim"] == 96
