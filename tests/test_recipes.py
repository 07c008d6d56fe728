"""The recipes, run on files of the published layout."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jepa3d import config as settings
from jepa3d.plain import read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
COMMAND = [sys.executable, "-c", "from jepa3d.cli import main; main()"]


@pytest.fixture(scope="module")
def shapenet55(tmp_path_factory) -> Path:
    """Six shapes laid out as Point-BERT's release."""
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


@pytest.mark.parametrize("epochs", [150, 300])
def test_the_paper_s_recipes_dry_run_at_full_size(shapenet55, epochs):
    """The whole model, dVAE first; only the batches are small."""
    recipe = RECIPES / f"shapenet55-{epochs}.yaml"
    sizes = ["--batch-size", "2", "--dvae.batch-size", "2", "--dry-run"]
    command = [*COMMAND, "pretrain", "--recipe", str(recipe), "--data", str(shapenet55), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "dry run, dvae: 4 clouds of 1024 points" in done.stdout
    assert "dry run, jepa: 4 clouds of 2048 points" in done.stdout
    assert "M parameters in the encoder" in done.stdout


@pytest.mark.parametrize("epochs", [150, 300])
def test_the_paper_s_recipes_depart_in_nothing(epochs):
    recipe = read_recipe(RECIPES / f"shapenet55-{epochs}.yaml")
    layers = settings.preset(recipe.pop("preset")), recipe, {"data": ["data/ShapeNet55-34"]}
    assert settings.departures(settings.resolve(*layers), 52_470) == {}


def test_the_tiny_paper_recipe_departs_from_the_paper_in_sizes_and_rates_only():
    recipe = read_recipe(RECIPES / "tiny-paper.yaml")
    config = settings.resolve(settings.preset(recipe.pop("preset")), recipe)
    groups = {name.split(".")[0] for name in settings.departures(config, 52_470)}
    assert groups == {"batch_size", "epochs", "max_steps", "warmup_epochs", "encoder", "dvae", "split"}


def test_the_rivals_recipes_differ_from_the_recommended_one_in_objective_and_rotation_only():
    configs = []
    for name in ("tiny", "tiny-generative", "tiny-invariance"):
        recipe = read_recipe(RECIPES / f"{name}.yaml")
        configs.append(settings.to_dict(settings.resolve(settings.preset(recipe.pop("preset")), recipe)))
    for rival in configs[1:]:
        changed = set(settings.differences(rival, configs[0])) - set(settings.BOOKKEEPING)
        assert changed == {"objective", "rotate", "max_steps", f"{rival['objective']}.max_steps"}


def test_bf16_is_one_flag(bundle):
    sizes = ["--encoder.num-points", "64", "--encoder.num-groups", "16", "--encoder.group-size", "8"]
    command = [*COMMAND, "pretrain", "--preset", "tiny", "--teacher", "ema", "--data", bundle, *sizes, "--dry-run"]
    done = subprocess.run([*command, "--mixed-precision", "bf16"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "dry run, jepa" in done.stdout
