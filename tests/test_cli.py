"""The command line: a run from end to end. Every mistake of the user gives one line and status 2,
and leaves no files behind.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa3d.cli import main
from jepa3d.models.encoder import PointEncoder
from jepa3d.training import pretrain as training

TINY = {
    "encoder.embed-dim": 16,
    "encoder.depth": 2,
    "encoder.num-heads": 2,
    "encoder.num-groups": 8,
    "encoder.group-size": 8,
    "encoder.num-points": 64,
    "encoder.tokenizer-dim": 8,
    "sampler.num-targets": 2,
    "sampler.min-context": 1,
    "batch-size": 4,
    "max-steps": 3,
    "log-every": 1,
    "teacher": "ema",
}
TINY_DVAE = {
    "teacher": "dvae",
    "dvae.batch-size": 4,
    "dvae.max-steps": 3,
    "dvae.num-points": 64,
    "dvae.width": 16,
    "dvae.num-codes": 16,
    "dvae.tokenizer-dim": 8,
    "dvae.dgcnn-dim": 4,
    "dvae.folding-dim": 8,
}


def flags(*groups: dict) -> list[str]:
    """Return the command-line words of settings. Later groups override earlier ones; a setting None
    is left out.
    """
    settings = {key: value for group in groups for key, value in group.items()}
    return [
        word
        for key, value in settings.items()
        if value is not None
        for word in (f"--{key}", *str(value).split())
    ]


def call(*words) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code or 0


def refusal(capsys, *words) -> str:
    """Run a command that must be refused. Returns the single line that it prints."""
    capsys.readouterr()
    code, printed = call(*words), capsys.readouterr().err
    assert code == 2
    assert printed.startswith("jepa3d: error: ")
    assert printed.count("\n") == 1
    return printed


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def write_shapes(path: Path, **changes) -> Path:
    """Write 48 blobs of 96 points in three classes, which differ in their proportions. The last 16
    are the test split.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 3
    points = (
        rng.normal(size=(48, 96, 3)) * np.array([[1, 1, 1], [1, 1, 6], [1, 6, 6]])[labels][:, None]
    )
    arrays = {
        "points": points.astype(np.float32),
        "labels": labels,
        "split": (np.arange(48) >= 32).astype(np.int8),
    }
    arrays = arrays | {"class_names": np.array(["ball", "stick", "plate"])} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "blobs.npz")


@pytest.fixture(scope="module")
def run(tmp_path_factory, shapes) -> Path:
    """Train a short run with an EMA teacher. Returns its folder."""
    out = tmp_path_factory.mktemp("runs") / "ema"
    assert call("pretrain", *flags(TINY, {"data": shapes}), "--out", out) == 0
    return out


# -------------------------------------------------------------------------------------- a whole run


def test_pretrain_writes_a_whole_run(run, shapes):
    assert {"config.json", "run.json", "metrics.jsonl", "encoder", "untrained"} <= {
        p.name for p in run.iterdir()
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 < line["loss"] < 2 for line in lines)
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["data"]["shapes"] == 32
    assert record["departures"]["encoder.embed_dim"] == [16, 384]
    assert not (run / "checkpoints").exists()
    assert not list(run.rglob(".*"))


def test_the_encoder_of_a_run_loads_embeds_and_differs_from_the_untrained_one(run):
    trained, untrained = (
        PointEncoder.from_pretrained(run / name) for name in ("encoder", "untrained")
    )
    points = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
    assert trained.embed(points).shape == (2, 32)
    assert not torch.allclose(trained.embed(points), untrained.embed(points))


def test_no_pickle_is_written(run):
    assert {p.suffix for p in run.rglob("*") if p.is_file()} <= {
        ".json",
        ".jsonl",
        ".safetensors",
        ".md",
    }


def test_probe_writes_every_protocol_for_every_model(run, shapes, tmp_path, capsys):
    out = tmp_path / "probe.json"
    assert call("probe", run, "--data", shapes, "--protocols", "logistic", "knn", "--out", out) == 0
    result = json.loads(out.read_text())
    by_hand = ["histograms", "geometry"]
    assert [row["model"] for row in result["rows"]] == ["untrained", "pretrained", *by_hand]
    assert all(set(row["scores"]) == {"logistic", "knn"} for row in result["rows"])
    assert (result["data"]["train"], result["data"]["test"], result["data"]["classes"]) == (
        32,
        16,
        3,
    )
    gain = (
        result["rows"][1]["scores"]["knn"]["accuracy"]
        - result["rows"][0]["scores"]["knn"]["accuracy"]
    )
    assert result["summary"]["gain"]["knn"]["mean"] == pytest.approx(gain)
    printed = capsys.readouterr().out
    assert "pretrained - untrained" in printed
    assert str(out) in printed


def test_probe_writes_into_the_run_unless_told(run, shapes):
    assert (
        call(
            "probe",
            run,
            "--data",
            shapes,
            "--protocols",
            "svc_linear",
            "--layer",
            1,
            "--pooling",
            "max",
        )
        == 0
    )
    result = json.loads((run / "probe-blobs-layer1-max-svc_linear.json").read_text())
    assert result["rows"][0]["scores"]["svc_linear"]["layer"] == 1
    assert result["pooling"] == "max"


def test_info_tells_of_a_run_of_shapes_and_of_the_installation(run, shapes, capsys):
    assert call("info", run) == 0
    said = capsys.readouterr().out
    assert "finished" in said
    assert "encoder.embed_dim: 16 (paper: 384)" in said
    assert call("info", shapes) == 0
    said = capsys.readouterr().out
    assert "48 shapes of 96 points" in said
    assert "train 32, test 16" in said
    assert "ball 16, stick 16, plate 16" in said
    assert call("info") == 0
    assert "torch" in capsys.readouterr().out


def test_a_dvae_teacher_is_trained_first_and_probed_beside(shapes, tmp_path):
    out = tmp_path / "run"
    assert call("pretrain", *flags(TINY, TINY_DVAE, {"data": shapes}), "--out", out) == 0
    assert (out / "stage1" / "dvae").is_dir()
    assert "stage1_cpu_seconds" in json.loads((out / "run.json").read_text())["cost"]
    assert call("probe", out, "--data", shapes, "--protocols", "svc_linear", "--layer", 2) == 0
    rows = json.loads((out / "probe-blobs-layer2-svc_linear.json").read_text())["rows"]
    by_hand = ["histograms", "geometry"]
    assert [row["model"] for row in rows] == ["untrained", "stage1 dvae", "pretrained", *by_hand]


def test_a_finished_run_serves_as_teacher(run, shapes, tmp_path):
    out = tmp_path / "run"
    assert call("pretrain", *flags(TINY, {"data": shapes, "teacher": run}), "--out", out) == 0
    taught, teacher = (
        PointEncoder.from_pretrained(p) for p in (out / "given" / "0", run / "encoder")
    )
    assert all(
        torch.equal(a, b) for a, b in zip(taught.parameters(), teacher.parameters(), strict=True)
    )


@pytest.mark.parametrize("out", [[], ["--out", "run"]], ids=["without out", "with out"])
def test_a_dry_run_writes_nothing(shapes, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    write_shapes(tmp_path / "here.npz")
    before = listing(tmp_path) | listing(shapes.parent)
    assert call("pretrain", *flags(TINY, TINY_DVAE, {"data": shapes}), "--dry-run", *out) == 0
    assert listing(tmp_path) | listing(shapes.parent) == before
    said = capsys.readouterr().out
    assert "dry run, dvae" in said
    assert "dry run, jepa" in said


def test_resume_alone_recalls_the_settings_and_a_finished_run_is_left_alone(run, capsys):
    before = listing(run)
    assert call("pretrain", "--out", run, "--resume") == 0
    assert "finished already" in capsys.readouterr().out
    assert listing(run) == before


def test_an_interrupted_run_goes_on_from_the_command_line(run, shapes, tmp_path, capsys):
    out = tmp_path / "run"
    real = training.pretrain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training, "pretrain", lambda config, out, resume: real(config, out, resume, stop_at=2)
        )
        assert call("pretrain", *flags(TINY, {"data": shapes}), "--out", out) == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"--out {out} --resume" in said
    assert "status" in json.loads((out / "run.json").read_text())
    assert call("probe", out, "--data", shapes) == 2
    assert call("pretrain", "--out", out, "--resume") == 0
    for weights in ("encoder", "untrained"):
        ours, whole = (
            (folder / weights / "model.safetensors").read_bytes() for folder in (out, run)
        )
        assert ours == whole


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="pictures need matplotlib")
def test_the_demo_ends_and_draws_pictures(tmp_path, quick_probe, capsys):
    out = tmp_path / "demo"
    assert call("demo", "--max-steps", 3, "--shapes", 200, "--out", out) == 0
    for name in ("blocks.png", "curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "gain" in json.loads((out / "probe.json").read_text())["summary"]
    assert (out / "run" / "encoder").is_dir()
    before = (out / "blocks.png").read_bytes()
    assert "synthetic:200" in refusal(
        capsys, "demo", "--max-steps", 3, "--shapes", 100, "--out", out
    )
    assert (out / "blocks.png").read_bytes() == before


def test_a_demo_interrupted_after_its_first_picture_is_no_folder_of_something_else(
    tmp_path, capsys
):
    (tmp_path / "blocks.png").write_bytes(b"")
    assert "COUNT" in refusal(capsys, "demo", "--out", tmp_path, "--shapes", 3)


def test_the_demo_leaves_a_folder_of_something_else_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert "contains files but no demo" in refusal(
        capsys, "demo", "--out", tmp_path, "--shapes", 24
    )
    assert list(listing(tmp_path)) == ["thesis.txt"]


# ------------------------------------------------------------------------------- which setting wins


@pytest.fixture
def resolved(monkeypatch):
    """Return a function that gives the configuration which a command would use."""

    def resolve(*words):
        configs = []
        monkeypatch.setattr(training, "dry_run", configs.append)
        assert call("pretrain", *words, "--dry-run") == 0
        return configs[0]

    return resolve


def test_flags_win_over_the_recipe_it_over_the_preset_and_that_over_the_defaults(
    resolved, tmp_path
):
    recipe = tmp_path / "a.yaml"
    recipe.write_text(
        "encoder:\n  embed_dim: 32\n  num_heads: 8\ndata: [a, b]\nup_axis: [x, y]\nmax_steps: 7\n"
    )
    config = resolved(
        "--preset", "tiny", "--recipe", recipe, "--encoder.num-heads", 2, "--no-rotate"
    )
    assert config.encoder.num_heads == 2
    assert config.encoder.embed_dim == 32
    assert config.encoder.depth == 4
    assert config.encoder.mlp_ratio == 4.0
    assert (config.data, config.up_axis, config.max_steps, config.rotate) == (
        ("a", "b"),
        ("x", "y"),
        7,
        False,
    )


def test_a_list_given_by_flag_replaces_that_of_the_recipe(resolved, tmp_path):
    (tmp_path / "a.yaml").write_text("data: [a, b]\nscale: [0.5, 2]\n")
    config = resolved("--recipe", tmp_path / "a.yaml", "--data", "c", "--scale", 0.9, 1.1)
    assert (config.data, config.scale) == (("c",), (0.9, 1.1))


def test_a_repeated_flag_gives_several_sources_each_with_its_up_axis(resolved):
    config = resolved("--data", "a", "--data", "b", "--up-axis", "x", "--up-axis", "y")
    assert (config.data, config.up_axis) == (("a", "b"), ("x", "y"))


def test_a_recipe_may_name_its_preset_and_the_flag_wins(resolved, tmp_path):
    (tmp_path / "a.yaml").write_text("preset: tiny\n")
    assert resolved("--recipe", tmp_path / "a.yaml").encoder.embed_dim == 96
    assert resolved("--recipe", tmp_path / "a.yaml", "--preset", "base").encoder.embed_dim == 768


def test_without_anything_the_settings_are_the_papers(resolved):
    assert resolved() == training.PretrainConfig()


# ----------------------------------------------------------------------------- mistakes of the user


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder.group-size": 100}, "group_size 100"),
        ({"encoder.num-groups": 100}, "num_groups 100"),
        ({"encoder.num-heads": 3}, "num_heads 3"),
        ({"encoder.num-heads": 0}, "num_heads"),
        ({"encoder.depth": -1}, "depth"),
        ({"encoder.num-points": 97}, "96 points"),
        ({"sampler.num-targets": 8, "sampler.target-ratio": "0.9 1.0"}, "tokens in a context"),
        ({"sampler.num-targets": 9}, "num_targets 9"),
        ({"sampler.target-ratio": "0.9 0.1"}, "ratio"),
        ({"batch-size": 0}, "batch_size 0"),
        ({"batch-size": -4}, "batch_size -4"),
        ({"epochs": 0}, "epochs 0"),
        ({"max-steps": 0, "epochs": 1}, "max_steps 0"),
        ({"lr": "nan"}, "nan"),
        ({"lr": -1}, "-1"),
        ({"data": "nowhere"}, "nowhere"),
        ({"split": "all", "data": "synthetic:3"}, "COUNT"),
        ({"teacher": "none"}, "target.sigreg"),
        ({"teacher": "ema none"}, "'none' cannot be combined"),
        ({"teacher": "ema ema"}, "each teacher only once"),
        ({"init": "dvae"}, "init 'dvae'"),
        ({"target.layers": 9}, "target.layers 9"),
        ({"target.sigreg": 1.5}, "target.sigreg 1.5"),
        ({"generative.mask-ratio": 0}, "generative.mask_ratio"),
        ({"teacher": "generative", "generative.lr": -1}, "generative.lr -1"),
        ({"invariance.partial-ratio": "0.6 0.3"}, "partial_ratio"),
        ({"snapshot-every": 0}, "snapshot_every 0"),
        (
            {"teacher": "default", "encoder.depth": 8, "target.layers": 7},
            "target.layers 7 exceeds the depth 6 of teacher default",
        ),
        ({"objective": "invariance", "batch-size": 1}, "invariance: batch_size 1 must be"),
        (
            {"teacher": "invariance", "invariance.batch-size": 4, "accumulate": 4},
            "invariance: batch_size 4 must be at least 8",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(
    shapes, tmp_path, capsys, changes, said
):
    out = tmp_path / "run"
    printed = refusal(capsys, "pretrain", *flags(TINY, {"data": shapes}, changes), "--out", out)
    assert said in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dvae.batch-size": 0}, "dvae.batch_size"),
        ({"dvae.max-steps": 0, "dvae.epochs": 1}, "dvae.max_steps"),
        ({"dvae.max-steps": None, "dvae.epochs": -1}, "dvae.epochs"),
        ({"dvae.num-points": 97}, "at least 97 are needed"),
        ({"dvae.num-points": 4}, "dvae.num_points 4"),
        ({"dvae.width": 15}, "15"),
        ({"encoder.group-size": 7}, "multiple of 4"),
        ({"dvae.dgcnn-dim": 33}, "dvae.dgcnn_dim 33 must be even"),
        ({"sampler.num-targets": 8, "sampler.target-ratio": "0.9 1.0"}, "tokens in a context"),
    ],
    ids=str,
)
def test_settings_of_stage_one_are_refused_before_anything_is_written(
    shapes, tmp_path, capsys, changes, said
):
    out = tmp_path / "run"
    printed = refusal(
        capsys, "pretrain", *flags(TINY, TINY_DVAE, {"data": shapes}, changes), "--out", out
    )
    assert said in printed
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_untouched(run, shapes, tmp_path, capsys):
    before = listing(run)
    assert "--resume" in refusal(capsys, "pretrain", *flags(TINY, {"data": shapes}), "--out", run)
    assert listing(run) == before
    (tmp_path / "thesis.txt").write_text("precious")
    for more in ([], ["--resume"]):
        refusal(capsys, "pretrain", *flags(TINY, {"data": shapes}), "--out", tmp_path, *more)
    assert list(listing(tmp_path)) == ["thesis.txt"]


def test_resuming_nothing_is_refused(shapes, tmp_path, capsys):
    printed = refusal(
        capsys, "pretrain", *flags(TINY, {"data": shapes}), "--out", tmp_path / "run", "--resume"
    )
    assert "no run to resume" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flag", "value"), [("--lr", 0.5), ("--encoder.depth", 3), ("--seed", 4)])
def test_a_changed_setting_on_resume_is_refused_with_both_values(run, capsys, flag, value):
    before = listing(run)
    printed = refusal(capsys, "pretrain", "--out", run, "--resume", flag, value)
    assert flag.strip("-") in printed
    assert str(value) in printed
    assert listing(run) == before


def test_out_is_asked_for(shapes, capsys):
    assert "--out" in refusal(capsys, "pretrain", *flags(TINY, {"data": shapes}))


def test_an_unknown_preset_names_the_nearest(shapes, tmp_path, capsys):
    printed = refusal(
        capsys, "pretrain", "--preset", "tyni", *flags({"data": shapes}), "--out", tmp_path / "run"
    )
    assert "did you mean 'tiny'" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("encoder:\n  dept: 3\n", "did you mean 'depth'"),
        ("batchsize: 3\n", "did you mean 'batch_size'"),
        ("lr: fast\n", "'fast'"),
        ("preset: tiney\n", "did you mean 'tiny'"),
        ("preset: [tiny]\n", "preset"),
        ("- lr\n", "mapping"),
        ("lr: [\n", "this recipe cannot be read"),
    ],
)
def test_a_wrong_recipe_is_refused(shapes, tmp_path, capsys, text, said):
    recipe = tmp_path / "a.yaml"
    recipe.write_text(text)
    printed = refusal(
        capsys, "pretrain", "--recipe", recipe, *flags({"data": shapes}), "--out", tmp_path / "run"
    )
    assert said in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "nearest"), [("--encoder.dept", "--encoder.depth"), ("--batchsize", "--batch-size")]
)
def test_an_unknown_flag_suggests_the_nearest(shapes, tmp_path, capsys, flag, nearest):
    code = call("pretrain", *flags(TINY, {"data": shapes}), "--out", tmp_path / "run", flag, 3)
    assert code == 2
    assert nearest in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_data_with_nan_names_file_and_shape(tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(48, 96, 3))
    rows[7, 3, 1] = np.nan
    path = write_shapes(tmp_path / "broken.npz", points=rows)
    printed = refusal(capsys, "pretrain", *flags(TINY, {"data": path}), "--out", tmp_path / "run")
    assert f"{path}: shape 7: NaN" in printed
    assert not (tmp_path / "run").exists()


def test_a_teacher_folder_without_a_model_is_one_line_on_a_real_terminal(shapes, tmp_path):
    """The command runs in its own process, since pytest cannot capture what libraries write to the
    terminal directly.
    """
    (tmp_path / "empty").mkdir()
    words = [
        "pretrain",
        *flags(TINY, {"data": shapes, "teacher": tmp_path / "empty"}),
        "--out",
        tmp_path / "run",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "from jepa3d.cli import main; main()", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()
    assert str(tmp_path / "empty") in done.stderr
    assert done.stderr.startswith("jepa3d: error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["labels", "split"])
def test_probing_shapes_without_labels_or_split_is_refused(run, tmp_path, capsys, missing):
    path = write_shapes(tmp_path / "bare.npz", **{missing: None})
    assert missing in refusal(capsys, "probe", run, "--data", path)
    assert not list(run.glob("probe-bare*"))


def test_labels_that_do_not_exist_are_refused(run, shapes, capsys):
    assert "labels_fine" in refusal(
        capsys, "probe", run, "--data", shapes, "--labels-key", "labels_fine"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layer", 9], "layers 0 (tokenizer) to 2"),
        (["--layer", "last"], "best"),
        (["--pooling", "median"], "mean_max"),
        (["--protocols", "svm"], "logistic"),
        (["--up-axis", "w"], "x, y"),
        (["--data", "nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_a_wrong_probe_is_refused(run, shapes, capsys, words, said):
    data = [] if "--data" in words else ["--data", shapes]
    assert said in refusal(capsys, "probe", run, *data, *words)


@pytest.mark.parametrize("command", ["probe", "info"])
def test_a_folder_that_is_no_run_is_refused(shapes, tmp_path, capsys, command):
    words = ["--data", shapes] if command == "probe" else []
    assert str(tmp_path) in refusal(capsys, command, tmp_path, *words)
    assert list(tmp_path.iterdir()) == []


def test_probe_averages_seeds_of_one_configuration_only(run, shapes, tmp_path, capsys):
    other = tmp_path / "other"
    assert call("pretrain", *flags(TINY, {"data": shapes, "lr": 0.01}), "--out", other) == 0
    assert "differ in lr" in refusal(capsys, "probe", run, other, "--data", shapes)
    assert "must have different seeds" in refusal(capsys, "probe", run, run, "--data", shapes)
