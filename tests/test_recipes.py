"""The recipes run on small data sets in the published layout."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import h5py
import layouts
import numpy as np
import pytest
from processes import Command

from jepa3d import config as settings
from jepa3d.cli import main
from jepa3d.config import FinetuneConfig, SegmentConfig
from jepa3d.plain import differences, from_dict, merge, read_recipe
from jepa3d.training.compare import BASELINES
from jepa3d.training.grid import read_grid
from jepa3d.validate import departures, validate

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def shapenet55(tmp_path_factory) -> Path:
    """Write six shapes in the layout of Point-BERT's release."""
    root = tmp_path_factory.mktemp("shapenet") / "ShapeNet55-34"
    (root / "ShapeNet-55").mkdir(parents=True)
    (root / "shapenet_pc").mkdir()
    names = [f"0269115{i % 2}-model{i}.npy" for i in range(6)]
    for i, name in enumerate(names):
        cloud = np.random.default_rng(i).normal(size=(8192, 3)).astype(np.float32)
        np.save(root / "shapenet_pc" / name, cloud)
    (root / "ShapeNet-55" / "train.txt").write_text("\n".join(names[:4]))
    (root / "ShapeNet-55" / "test.txt").write_text("\n".join(names[4:]))
    return root


@pytest.mark.parametrize("epochs", [pytest.param(150, marks=pytest.mark.slow), 300])
def test_the_paper_s_recipes_dry_run_at_full_size(shapenet55, tmp_path, epochs):
    """The models have full size, and the dVAE runs first; only the batches are small."""
    recipe = RECIPES / f"shapenet55-{epochs}.yaml"
    sizes = ["--batch-size", "2", "--dvae.batch-size", "2", "--dry-run"]
    words = ("pretrain", "--recipe", recipe, "--data", shapenet55, *sizes)
    command = Command(*words, log=tmp_path / "log")
    assert command.end() == 0, command.printed("err")
    printed = command.printed()
    assert "dry run, dvae: 4 clouds of 1024 points" in printed
    assert "dry run, jepa: 4 clouds of 2048 points" in printed
    assert "M parameters in the encoder" in printed


@pytest.mark.parametrize("epochs", [150, 300])
def test_the_paper_s_recipes_depart_in_nothing_but_the_image_transformer(epochs):
    recipe = read_recipe(RECIPES / f"shapenet55-{epochs}.yaml")
    layers = settings.preset(recipe.pop("preset")), recipe, {"data": ["data/ShapeNet55-34"]}
    assert list(departures(settings.resolve(*layers), 52_470)) == ["dvae.backbone"]


def test_the_tiny_paper_recipe_departs_from_the_paper_in_sizes_and_rates_only():
    recipe = read_recipe(RECIPES / "tiny-paper.yaml")
    config = settings.resolve(settings.preset(recipe.pop("preset")), recipe)
    groups = {name.split(".")[0] for name in departures(config, 52_470)}
    assert groups == {
        "batch_size",
        "epochs",
        "max_steps",
        "warmup_epochs",
        "encoder",
        "dvae",
        "split",
    }


def test_the_rivals_recipes_differ_from_the_recommended_one_in_objective_and_rotation_only():
    configs = []
    for name in ("tiny", "tiny-generative", "tiny-invariance"):
        recipe = read_recipe(RECIPES / f"{name}.yaml")
        configs.append(
            settings.to_dict(settings.resolve(settings.preset(recipe.pop("preset")), recipe))
        )
    for rival in configs[1:]:
        changed = set(differences(rival, configs[0])) - set(settings.BOOKKEEPING)
        own = {
            name
            for name in changed
            if name.partition(".")[0] in ("epochs", "max_steps", rival["objective"])
        }
        # Apart from its own schedule, a rival's recipe changes only these two settings.
        assert changed - own == {"objective", "rotate"}
        assert {name.rpartition(".")[2] for name in own} <= {"epochs", "max_steps"}


def test_bf16_is_one_flag(bundle, tmp_path):
    sizes = "--encoder.num-points 64 --encoder.num-groups 16 --encoder.group-size 8"
    words = f"--preset tiny --teacher ema {sizes} --dry-run --mixed-precision bf16".split()
    command = Command("pretrain", "--data", bundle, *words, log=tmp_path / "log")
    assert command.end() == 0, command.printed("err")
    assert "dry run, jepa" in command.printed()


# --------------------------------------------------------------------------------------- downstream


@pytest.fixture
def run(capsys):
    """Return a function that runs a command and returns what it printed."""

    def called(*words) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        said = capsys.readouterr()
        assert ended.value.code == 0, said.err
        return said.out

    return called


@pytest.mark.parametrize("variant", ["obj_bg", "obj_only", "pb_t50_rs"])
def test_scanobjectnn_runs_at_paper_size_from_its_download(run, tmp_path, variant):
    """Two steps of the full-size model run, in small batches. The HDF5 files have the published
    names and arrays.
    """
    folder = tmp_path / "h5_files" / ("main_split_nobg" if variant == "obj_only" else "main_split")
    folder.mkdir(parents=True)
    for part, labels in (("training", [0, 4, 0, 4]), ("test", [4, 0])):
        tail = "_augmentedrot_scale75" if variant == "pb_t50_rs" else ""
        with h5py.File(folder / f"{part}_objectdataset{tail}.h5", "w") as file:
            file["data"] = (
                np.random.default_rng(len(labels))
                .normal(size=(len(labels), 2048, 3))
                .astype(np.float32)
            )
            file["label"] = np.array(labels)
            file["mask"] = np.full((len(labels), 2048), 3)
    store, out = tmp_path / "store", tmp_path / "run"
    run("prepare", tmp_path / "h5_files", "--out", store, "--variant", variant, "--workers", 1)
    recipe = RECIPES / "scanobjectnn.yaml"
    run(
        "classify",
        "--recipe",
        recipe,
        "--data",
        store,
        "--out",
        out,
        "--max-steps",
        2,
        "--batch-size",
        2,
    )
    result = json.loads((out / "results.json").read_text())
    assert result["data"]["variant"] == f"ScanObjectNN {variant}"
    assert (result["settings"]["num_groups"], result["settings"]["depth"]) == (128, 12)
    assert "3D-JEPA" in run("results", out)  # the table also has the published rows


def test_shapenetpart_runs_at_paper_size_from_its_download(run, tmp_path):
    layouts.shapenetpart_normals(
        tmp_path / "shapenetcore_partanno_segmentation_benchmark_v0_normal"
    )
    store, out = tmp_path / "store", tmp_path / "run"
    run(
        "prepare",
        tmp_path / "shapenetcore_partanno_segmentation_benchmark_v0_normal",
        "--out",
        store,
        "--workers",
        1,
    )
    recipe = RECIPES / "shapenetpart.yaml"
    run(
        "segment",
        "--recipe",
        recipe,
        "--data",
        store,
        "--out",
        out,
        "--max-steps",
        2,
        "--batch-size",
        2,
    )
    result = json.loads((out / "results.json").read_text())
    assert set(result["metrics"]) == {"instance_miou", "category_miou", "point_accuracy"}
    assert result["data"]["train"] == 1
    assert json.loads((out / "model" / "config.json").read_text())["layers"] == [4, 8, 12]


def test_the_published_folds_are_run_as_they_are(run, tmp_path):
    """Two folds in the form of the published pickles are run with a small encoder."""
    rng = np.random.default_rng(0)
    for fold in range(2):
        items = {
            part: [
                (rng.normal(size=(8192, 6)).astype(np.float32), label, 0)
                for label in range(5)
                for _ in range(count)
            ]
            for part, count in (("train", 10), ("test", 20))
        }
        path = tmp_path / "ModelNetFewshot" / "5way_10shot" / f"{fold}.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(items))
    store = tmp_path / "store"
    run("prepare", tmp_path / "ModelNetFewshot", "--out", store, "--points", 512, "--workers", 1)
    recipe = RECIPES / "modelnet40-fewshot.yaml"
    sizes = [
        "--preset",
        "tiny",
        "--num-points",
        512,
        "--num-groups",
        32,
        "--folds",
        2,
        "--max-steps",
        2,
    ]
    run("fewshot", "--recipe", recipe, "--data", store, "--out", tmp_path / "run", *sizes)
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(result["details"]["folds"]) == 2
    assert not (tmp_path / "run" / "episodes.json").exists()
    assert "Point-MAE" in run("results", tmp_path / "run")


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "compare").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_grids_resolve(path):
    """The settings of every arm, with every seed and learning rate, are known and valid."""
    grid = read_grid(path, {"data": ["synthetic:40"]}, BASELINES)
    assert grid.reference in grid.arms
    assert all(config.data == ("synthetic:40",) for config in grid.arms.values())


@pytest.mark.parametrize(
    "name",
    ["modelnet40-1k", "modelnet40-8k", "tiny-classify", "tiny-segment", "head-first-classify"],
)
def test_the_other_downstream_recipes_resolve(name):
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    kind = SegmentConfig if "segment" in name else FinetuneConfig
    config = from_dict(kind, merge(settings.preset(recipe.pop("preset", "small"), kind), recipe))
    validate(replace(config, data="x", init="default"))
