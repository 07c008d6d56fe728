"""A grid from end to end: it is trained once, scored once and can be resumed. A wrong grid is
refused in one line.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from jepa3d import config as settings
from jepa3d.cli import main
from jepa3d.evaluation import paired
from jepa3d.evaluation.labelled import LabelledSet
from jepa3d.evaluation.paired import METRICS, difference
from jepa3d.objectives.jepa import JEPA
from jepa3d.training import compare as comparing
from jepa3d.training import grid as grids
from jepa3d.training.compare import BASELINES, Comparison
from jepa3d.training.grid import at_equal_time, read_grid
from jepa3d.training.pretrain import cpu_costs, pretrain

FROZEN = [metric for metric in METRICS if metric != "finetuned"]
ARMS = {
    "base": {},
    "block": {"sampler": {"name": "multi_block", "num_targets": 2, "min_context": 1}},
}


@pytest.fixture(scope="module")
def write_grid(tiny, tmp_path_factory):
    """Return a function that writes a grid file of two arms and two seeds, 4 steps each.

    Its arguments change keys of the grid; a key None is left out.
    """

    def write(**changes) -> Path:
        folder = tmp_path_factory.mktemp("grid")
        (folder / "recipe.yaml").write_text(
            yaml.safe_dump(settings.to_dict(tiny(max_steps=4, sampler={"name": "random"})))
        )
        grid = {
            "recipe": "recipe.yaml",
            "arms": ARMS,
            "reference": "base",
            "seeds": [0, 1],
        } | changes
        path = folder / "grid.yaml"
        path.write_text(
            yaml.safe_dump(
                {key: value for key, value in grid.items() if value is not None}, sort_keys=False
            )
        )
        return path

    return write


def call(*words, code: int = 0) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, words)])
    assert (stop.value.code or 0) == code


@pytest.fixture(scope="module")
def made(write_grid, tmp_path_factory) -> tuple[Path, Path]:
    """Run a comparison that is scored on the test split. Returns the grid file and the folder."""
    grid, out = write_grid(title="two masks"), tmp_path_factory.mktemp("made") / "out"
    call(grid, "--out", out)
    return grid, out


@pytest.fixture
def copied(made, tmp_path) -> tuple[Path, Path]:
    """Return the grid file and a copy of that folder, which a test may change."""
    return made[0], Path(shutil.copytree(made[1], tmp_path / "out"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "encoder" / "model.safetensors")


# ------------------------------------------------------------------------------------- a whole grid


def test_a_comparison_has_every_run_row_and_file(made):
    _, out = made
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        "base-0",
        "base-1",
        "block-0",
        "block-1",
    ]
    record = json.loads((out / "compare.json").read_text())
    rows = [(row["metric"], row["name"]) for row in record["rows"]]
    assert rows == [(metric, name) for metric in FROZEN for name in ("base", "block", *BASELINES)]
    assert record["arms"]["block"]["overrides"] == ARMS["block"]
    assert record["arms"]["base"]["cpu_minutes"] > 0
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "log.txt").read_text().count("step 4/4") == 4
    table = (out / "table.md").read_text()
    assert table.startswith("### two masks; reference: base\n")
    assert "| block | sampler.name multi_block, " in table
    for said in (
        "seeds 0, 1; equal steps",
        "test used once",
        "shapes of 3 classes, test split",
        "Made by `",
        "95 %",
    ):
        assert said in table
    assert "pretraining" not in table  # pretraining did not use the test split


def test_the_figures_are_those_of_the_kept_outcomes(made):
    _, out = made
    record = json.loads((out / "compare.json").read_text())
    for metric in FROZEN:
        tables = {}
        for arm in ARMS:
            files = [
                next((out / "runs" / f"{arm}-{seed}").glob("scores-encoder-*.json"))
                for seed in (0, 1)
            ]
            kept = [json.loads(file.read_text())["outcomes"][metric] for file in files]
            tables[arm] = np.array(kept, float)
        found = {row["name"]: row for row in record["rows"] if row["metric"] == metric}
        assert found["block"]["values"] == pytest.approx(tables["block"].mean(1))
        assert tuple(found["block"]["difference"].values()) == difference(
            tables["block"], tables["base"]
        )
        assert found["base"]["difference"] is None
        # These vectors are equal for all seeds; only the sampled labels differ.
        for name in ("histograms", "geometry"):
            assert metric == "logistic_10" or len(set(found[name]["values"])) == 1


def test_the_same_command_again_makes_nothing_anew(copied, monkeypatch, capsys):
    grid, out = copied
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    table = (out / "table.md").read_text().rpartition("Made by")[0]
    for module, name in ((comparing, "pretrain"), (paired, "vectors_by")):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    call(grid, "--out", out)
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")} == before
    assert (out / "table.md").read_text().rpartition("Made by")[0] == table
    printed = capsys.readouterr().out
    assert "run 4 of 4: block-1: " in printed
    assert "better" in printed or "undecided" in printed or "worse" in printed


def test_an_interrupted_comparison_goes_on_with_the_same_command(
    made, tmp_path, monkeypatch, capsys
):
    grid, out = made[0], tmp_path / "out"

    def stopped(config, folder, resume, **options):
        return pretrain(
            config, folder, resume, stop_at=2 if folder.name == "block-0" else None, **options
        )

    monkeypatch.setattr(comparing, "pretrain", stopped)
    call(grid, "--out", out, code=130)
    assert "saved; continue with the same command" in capsys.readouterr().err
    assert sorted(path.name for path in (out / "runs").iterdir()) == ["base-0", "block-0"]
    assert not (out / "runs" / "block-0" / "encoder").exists()
    monkeypatch.undo()
    call(grid, "--out", out)
    for name in ("base-0", "block-0", "block-1"):
        ours, theirs = weights(out / "runs" / name), weights(made[1] / "runs" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_arm_and_a_seed_may_be_added_and_other_data_scored(
    copied, write_grid, shapes, bundle, capsys
):
    _, out = copied
    runs = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/encoder/*")}
    added = write_grid(arms=ARMS | {"fast": {"lr": 0.002}}, seeds=[0, 1, 2])
    call(added, "--out", out, "--score", bundle, shapes, "--part", "validation")
    assert len(list((out / "runs").iterdir())) == 9
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    record = json.loads((out / "compare.json").read_text())
    assert len(record["rows"]) == 2 * len(FROZEN) * 6
    assert len(record["rows"][0]["values"]) == 3
    assert record["arms"]["fast"]["lr"] == 0.002
    table = (out / "table.md").read_text()
    assert "used unlabelled in pretraining: base, block, fast" in table
    assert "validation split" in table


def test_a_changed_arm_is_refused_by_name(copied, write_grid, capsys):
    _, out = copied
    changed = write_grid(arms={"base": {}, "block": {"sampler": {"name": "one_block"}}})
    call(changed, "--out", out, code=2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "grid.yaml: arms.block: " in said
    assert "was started with sampler.name = multi_block, not one_block" in said


def test_a_failed_arm_leaves_the_others(write_grid, tmp_path, monkeypatch, capsys):
    forward = JEPA.forward

    def spoilt(self, points, generator, *rest):
        found = forward(self, points, generator, *rest)
        bad = self.settings.norm == "layernorm" and generator.step >= 2
        return found._replace(loss=found.loss * float("nan")) if bad else found

    monkeypatch.setattr(JEPA, "forward", spoilt)
    arms = {"base": {}, "block": {"target": {"norm": "layernorm"}}}
    grid, out = write_grid(arms=arms, seeds=[0]), tmp_path / "out"
    call(grid, "--out", out)
    assert "run 2 of 2: block-0: failed: the loss is nan at step 3" in capsys.readouterr().out
    record = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in record["rows"] if row["metric"] == "map"] == ["base", *BASELINES]
    assert "the loss is nan" in record["arms"]["block"]["failed"]
    table = (out / "table.md").read_text()
    assert table.count("| block | failed | failed | failed | failed | - |") == 1
    assert "NOTE: one seed" in table
    monkeypatch.undo()
    call(grid, "--out", out)  # the failed run is not tried again
    assert "run 2 of 2: block-0: failed: the loss is nan at step 3" in capsys.readouterr().out
    swapped = write_grid(arms=arms, seeds=[0], reference="block")
    call(swapped, "--out", out)
    assert all(
        row["difference"] is None for row in json.loads((out / "compare.json").read_text())["rows"]
    )


def test_some_arms_are_fine_tuned_too_and_kept(copied, write_grid, monkeypatch, capsys):
    """In the row *untrained*, the reference's network is fine-tuned from its initial weights."""
    _, out = copied
    changes = {"arms": ["base"], "labels": 0.5, "epochs": 1, "batch_size": 4, "warmup_epochs": 0}
    grid = write_grid(finetune=changes)
    call(grid, "--out", out)
    record = json.loads((out / "compare.json").read_text())
    rows = [row for row in record["rows"] if row["metric"] == "finetuned"]
    assert [row["name"] for row in rows] == ["base", "untrained"]
    for row, name in zip(rows, ("encoder", "untrained"), strict=True):
        for seed, value in enumerate(row["values"]):
            (folder,) = (out / "runs" / f"base-{seed}").glob(f"finetuned-{name}-test-*")
            metrics = json.loads((folder / "results.json").read_text())["metrics"]
            assert value == pytest.approx(metrics["overall_accuracy"])
            config = json.loads((folder / "config.json").read_text())
            assert (config["labels"], config["seed"]) == (0.5, seed)
            assert config["init"] == str(out / "runs" / f"base-{seed}" / name)
    table = (out / "table.md").read_text()
    assert "fine-tuned, as by jepa3d classify: 50% of the labels, 1 epochs" in table
    lines = [line.split(" | ") for line in table.splitlines()]
    header = next(line for line in lines if "10 labels a class" in line)
    block = next(line for line in lines if line[0] == "| block" and len(line) == len(header))
    assert block[header.index("fine-tuned")] == "-"  # this arm was not to be fine-tuned
    monkeypatch.setattr("jepa3d.training.finetune.fit", None)  # training anything again would fail
    call(grid, "--out", out)
    monkeypatch.chdir(out.parent)
    call(grid, "--out", out.name)
    capsys.readouterr()
    call(write_grid(finetune=changes | {"epochs": 2}), "--out", out, code=2)
    assert "epochs" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- bad grids


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arm": {}}, "setting 'arm' is unknown; did you mean 'arms'?"),
        ({"arms": {}}, "arms is empty: give at least one"),
        ({"arms": None}, "arms is missing"),
        ({"arms": [1]}, "setting 'arms': [1] is not of type dict"),
        ({"reference": "bas"}, "reference 'bas' is not an arm; did you mean 'base'?"),
        (
            {"arms": {"base": {"sampler": {"nam": "x"}}}},
            "arms.base: setting 'sampler.nam' is unknown; did you mean",
        ),
        (
            {"arms": {"base": {"encoder": {"num_heads": 7}}}},
            "arms.base: encoder.embed_dim 24 is not a multiple",
        ),
        (
            {"arms": {"base": [1]}},
            "arms.base: give the settings in which the arm differs, or {} for none, not [1]",
        ),
        ({"arms": {"base": {}, "a/b": {}}}, "arms.a/b: a name may have letters, digits"),
        (
            {"arms": {"base": {}, "untrained": {}}},
            "arms.untrained: a name may have letters, digits",
        ),
        ({"arms": {"base": {"seed": 3}}}, "arms.base: seed is set by the grid for all arms"),
        (
            {"arms": {"base": {"lr": 0.1}}, "lr": [0.1]},
            "arms.base: lr is set by the grid for all arms",
        ),
        ({"arms": {"base": {"objective": "dvae"}}}, "arms.base: objective dvae trains no encoder"),
        ({"settings": {"enc": {}}}, "setting 'enc' is unknown"),
        ({"preset": "tiny"}, "give either preset or recipe"),
        ({"recipe": None, "preset": "tin"}, "preset 'tin' is unknown; did you mean 'tiny'?"),
        ({"recipe": "none.yaml"}, "none.yaml: this recipe cannot be read"),
        ({"seeds": []}, "seeds []: give at least one value, no value twice"),
        ({"seeds": [1, 1]}, "seeds [1, 1]: give at least one value, no value twice"),
        ({"lr": [0.1, 300.0]}, "arms.base: lr 300.0 must be positive and at most 100"),
        (
            {"finetune": {"arms": ["bas"]}},
            "finetune.arms is ['bas']: give a list of arms from base, block",
        ),
        ({"finetune": {"label": 0.1}}, "setting 'label' is unknown; did you mean 'labels'?"),
        ({"finetune": {"init": "default"}}, "finetune.init is set by the comparison"),
        ({"finetune": {"labels": 3}}, "labels 3 must lie in (0, 1]"),
        ({"equal": "time"}, "equal is 'time': use steps, or {cpu_minutes: M} with M above 0"),
        ({"equal": {"cpu_minutes": 0}}, "equal is {'cpu_minutes': 0}: use steps, or"),
        (
            {"arms": {"base": {}, "long": {"max_steps": 6}}},
            "the arms must have equal steps, but have base 4, long 6",
        ),
    ],
)
def test_a_bad_grid_is_one_line_that_names_file_and_key(
    write_grid, changes, said, tmp_path, capsys
):
    grid = write_grid(**changes)
    call(grid, "--out", tmp_path / "out", code=2)
    printed = capsys.readouterr().err
    assert printed.startswith(f"jepa3d: error: {grid}: ")
    assert said in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out" / "runs").exists()


def test_data_without_labels_is_refused_before_training(write_grid, tmp_path, capsys):
    np.savez(tmp_path / "bare.npz", points=np.random.default_rng(0).normal(size=(40, 64, 3)))
    call(write_grid(), "--data", tmp_path / "bare.npz", "--out", tmp_path / "out", code=2)
    assert "has no labels, or only for some shapes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------- equal time, rates


@pytest.fixture
def costs(monkeypatch):
    """Replace the measured costs by known ones. Returns the CPU-seconds before the first step and
    those of one step, by the sampler's name, and the list of names in the order of measurement.
    """
    known, asked = {"random": (0.0, 0.5), "multi_block": (10.0, 1.0), "one_block": (0.0, 2.0)}, []
    monkeypatch.setattr(
        grids,
        "cpu_costs",
        lambda config: asked.append(config.sampler.name) or known[config.sampler.name],
    )
    return known, asked


def test_equal_time_gives_steps_by_cost_and_keeps_them(write_grid, costs, tmp_path):
    known, asked = costs
    timed = {"arms": ARMS, "equal": {"cpu_minutes": 1}}
    grid = read_grid(write_grid(**timed), {})
    steps = {name: config.max_steps for name, config in at_equal_time(grid, tmp_path).arms.items()}
    assert steps == {"base": 120, "block": 50}  # 60 s / 0.5 s; (60 - 10 s of stage I) / 1 s
    assert asked == ["random", "multi_block"] * 3  # measured in turns
    # Now the machine is busier, and every cost doubles.
    known |= {name: (2 * before, 2 * step) for name, (before, step) in known.items()}
    asked.clear()
    assert {
        name: config.max_steps for name, config in at_equal_time(grid, tmp_path).arms.items()
    } == steps
    assert not asked
    timed["arms"] = ARMS | {"one": {"sampler": {"name": "one_block"}}}
    grid = read_grid(write_grid(**timed), {})
    found = {name: config.max_steps for name, config in at_equal_time(grid, tmp_path).arms.items()}
    # The new arm is measured beside an old one, to correct for the busier machine.
    assert found == steps | {"one": 30}
    assert set(asked) == {"one_block", "random"}


def test_an_arm_that_changed_since_it_was_measured_or_has_no_time_left_is_refused(
    write_grid, costs, tmp_path
):
    timed = {"arms": ARMS, "equal": {"cpu_minutes": 1}}
    at_equal_time(read_grid(write_grid(**timed), {}), tmp_path)
    timed["arms"] = ARMS | {"block": {"sampler": {"name": "one_block"}}}
    with pytest.raises(
        ValueError, match=r"grid.yaml: arms.block: sampler.name was multi_block when the arm's cost"
    ):
        at_equal_time(read_grid(write_grid(**timed), {}), tmp_path)
    costs[0]["multi_block"] = (66.0, 1.0)
    with pytest.raises(
        ValueError, match=r"arms.block: stage I and cached targets take 1.1 of 1 CPU-minutes"
    ):
        at_equal_time(
            read_grid(write_grid(arms=ARMS, equal={"cpu_minutes": 1}), {}), tmp_path / "other"
        )


def test_arms_share_a_stage_one_of_the_same_settings_and_seed(write_grid, tiny, tmp_path):
    block = ARMS["block"] | {"teacher": ["dvae"]}
    longer = {"teacher": ["dvae"], "dvae": {"max_steps": 3}}
    arms = {"base": {"teacher": ["dvae"]}, "block": block, "longer": longer}
    call(write_grid(settings={"dvae": {"max_steps": 2}}, arms=arms), "--out", tmp_path / "out")
    made = {
        run.parents[2].name: run.parent for run in tmp_path.glob("out/runs/*/stage1/dvae/run.json")
    }
    costs = {
        name: json.loads((run / "run.json").read_text())["cost"]["wall_seconds"]
        for name, run in made.items()
    }
    for seed in (0, 1):
        assert costs[f"base-{seed}"] == costs[f"block-{seed}"] != costs[f"longer-{seed}"], (
            "copied, not trained again"
        )
    assert costs["base-0"] != costs["base-1"]
    alone = tiny(
        max_steps=4, sampler={"name": "random"}, teacher=["dvae"], dvae={"max_steps": 2}, seed=1
    )
    alone = pretrain(
        replace(alone, sampler=replace(alone.sampler, **ARMS["block"]["sampler"])),
        tmp_path / "alone",
    )
    assert_close(weights(made["block-1"].parents[1]), weights(alone), rtol=0, atol=0)
    call(
        write_grid(settings={"dvae": {"max_steps": 2}}, arms=arms), "--out", tmp_path / "out"
    )  # continues


def test_the_cost_of_stage_one_comes_before_the_first_step(tiny):
    before, step = cpu_costs(tiny(max_steps=4))
    assert before == 0
    assert step > 0
    before, step = cpu_costs(tiny(max_steps=4, init="generative", generative={"max_steps": 1000}))
    assert before > 100 * step > 0  # stage I is a thousand steps of the autoencoder


def test_equal_time_trains_each_arm_for_its_steps(write_grid, costs, tmp_path):
    costs[0].update(random=(0.0, 0.5), multi_block=(0.0, 1.0))
    grid = write_grid(equal={"cpu_minutes": 0.05}, seeds=[0])
    call(grid, "--out", tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "equal CPU time, 0.05 minutes a run" in table
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {arm: values["steps"] for arm, values in record["arms"].items()} == {
        "base": 6,
        "block": 3,
    }
    spent = json.loads((tmp_path / "out" / "runs" / "base-0" / "run.json").read_text())["cost"]
    assert spent["step"] == 6
    assert record["arms"]["base"]["cpu_minutes"] == pytest.approx(spent["cpu_seconds"] / 60)


def test_the_learning_rate_is_chosen_on_validation_alone(write_grid, bundle, tmp_path, monkeypatch):
    """The scores are imitated. On validation, base is best at the first rate, and block at the
    second; on test it is the other way round.
    """
    grid = read_grid(write_grid(lr=[0.001, 0.002]), {}, BASELINES)
    looked = []

    def scripted(folder, name, vectors, shapes, seed):
        looked.append((folder.name, name, shapes.part))
        slow, base = "lr0.001" in folder.name, folder.name.startswith("base")
        best = (slow == base) == (shapes.part == "validation")
        return dict.fromkeys(FROZEN, np.full(len(shapes.y_test), 90.0 if best else 10.0))

    monkeypatch.setattr(paired, "kept_outcomes", scripted)
    comparison = Comparison(grid, [LabelledSet(bundle)], "test", tmp_path)
    comparison.run()
    assert comparison.rates == {"base": 0.001, "block": 0.002}
    tested = {run for run, name, part in looked if part == "test" and name == "encoder"}
    assert tested == {"base-lr0.001-0", "base-lr0.001-1", "block-lr0.002-0", "block-lr0.002-1"}
    chosen = {run for run, _, part in looked if part == "validation"}
    assert chosen == {f"{arm}-lr{rate}-0" for arm in ARMS for rate in (0.001, 0.002)}
    # The runs of the first seed are not trained twice.
    assert len(list((tmp_path / "runs").iterdir())) == 6
    assert (
        "each arm's lr is the best of 0.001, 0.002 at 10 labels a class on validation, seed 0"
        in comparison.notes()[0]
    )


def test_the_validation_part_is_no_test_shape(bundle):
    parts = {part: LabelledSet(bundle).read(64, part) for part in ("test", "validation")}
    tested = {cloud.tobytes() for cloud in parts["test"].test.points[:]}
    halves = parts["validation"].subsets()
    validated = {cloud.tobytes() for half in halves for cloud in half.points[:]}
    assert not tested & validated
    assert parts["test"].key != parts["validation"].key


def test_scores_are_not_kept_if_only_the_labels_change(tmp_path):
    def key(labels: np.ndarray) -> str:
        with h5py.File(tmp_path / "shapes.h5", "w") as file:
            file["data"], file["label"] = np.random.default_rng(0).normal(size=(8, 64, 3)), labels
            file["split"] = [0] * 4 + [1] * 4
        return LabelledSet(str(tmp_path / "shapes.h5")).read(64).key

    first = np.arange(8) % 2
    assert key(first) == key(first) != key(1 - first)


def test_a_rate_is_that_of_the_arm_s_own_objective(write_grid):
    arms = {"base": {}, "rival": {"objective": "generative"}, "taught": {"teacher": "generative"}}
    grid = read_grid(
        write_grid(arms=arms, lr=[0.5], settings={"generative": {"lr": 0.004, "max_steps": 4}}), {}
    )
    assert grid.config("base", 0, 0.5).lr == 0.5
    rival, taught = grid.config("rival", 3, 0.5), grid.config("taught", 0, 0.5)
    assert (rival.lr, rival.generative.lr, rival.seed) == (0.5, 0.5, 3)
    assert (taught.lr, taught.generative.lr, taught.schedule("generative").lr) == (
        0.5,
        0.004,
        0.004,
    )
    assert (
        read_grid(write_grid(arms=arms, settings={"generative": {"lr": 0.004}}), {})
        .arms["rival"]
        .lr
        == 0.004
    )


def test_flags_say_what_is_trained_on_and_scored(write_grid, monkeypatch, tmp_path):
    """Without --score, --up-axis is the up axis of the training data too."""
    seen = []
    monkeypatch.setattr(
        comparing, "compare", lambda plan, sets, part, out: seen.append((plan, sets, part))
    )
    call(write_grid(), "--data", "a.npz", "--up-axis", "y", "--out", tmp_path)
    call(
        write_grid(),
        "--data",
        "a.npz",
        "--score",
        "b.npz",
        "c.npz",
        "--up-axis",
        "y",
        "z",
        "--labels-key",
        "labels",
        "fine",
        "--part",
        "validation",
        "--out",
        tmp_path,
    )
    (first, sets, part), (second, others, validation) = seen
    assert (first.arms["base"].data, first.arms["base"].up_axis) == (("a.npz",), ("y",))
    assert (sets, part, validation) == ([LabelledSet("a.npz", "labels", "y")], "test", "validation")
    assert second.arms["base"].up_axis == ("z",)
    assert others == [LabelledSet("b.npz", "labels", "y"), LabelledSet("c.npz", "fine", "z")]
