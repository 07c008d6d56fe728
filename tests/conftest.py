"""Shared fixtures: shapes and settings that are so small that a run takes a second."""

import os

# Set before torch is imported, and for child processes too: results are equal to the last bit only
# for equal numbers of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import importlib.util
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec("jaxtyping") and importlib.util.find_spec("beartype"):
    import jaxtyping

    # Types and shapes of arguments and results are checked at every call, except while torch
    # compiles or exports a function. layout.py is excluded: compiled code creates its objects.
    models = (Path(__file__).parent.parent / "src" / "jepa3d" / "models").glob("[a-z]*.py")
    checked = [f"jepa3d.models.{file.stem}" for file in models if file.stem != "layout"]
    whole_numbers_are_floats = "conf=beartype.BeartypeConf(is_pep484_tower=True)"
    checker = f"beartype.beartype({whole_numbers_are_floats})"
    jaxtyping.install_import_hook([*checked, "jepa3d.ops"], checker)
    type(jaxtyping.config).jaxtyping_disable = property(lambda _: torch.compiler.is_compiling())

from jepa3d import cli
from jepa3d import config as settings
from jepa3d.data.synthetic import CLASS_NAMES, make_shapes
from jepa3d.models.encoder import PointEncoder
from jepa3d.plain import log

TINY = {
    "teacher": "ema",
    "mixed_precision": "no",  # fp32, so that numbers agree between machines
    "batch_size": 8,
    "max_steps": 6,
    "log_every": 1,
    "checkpoint_every": 2,
    "encoder": {
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_groups": 16,
        "group_size": 8,
        "num_points": 64,
        "tokenizer_dim": 8,
        "drop_path": 0.1,
    },
    "target": {"norm": "standardize", "num_slices": 8},
    "generative": {"batch_size": 8, "max_steps": 4, "decoder_depth": 1},
    "invariance": {
        "batch_size": 8,
        "max_steps": 4,
        "projector_dim": 16,
        "embedding_dim": 8,
        "num_slices": 8,
    },
    "dvae": {
        "batch_size": 8,
        "max_steps": 4,
        "num_points": 64,
        "width": 24,
        "num_codes": 32,
        "tokenizer_dim": 8,
        "dgcnn_dim": 8,
        "folding_dim": 16,
    },
}


class Echo(logging.Handler):
    """Prints what the library logs, as the command line does, for tests that call functions."""

    def emit(self, record: logging.LogRecord) -> None:
        if not any(isinstance(handler, cli.Printer) for handler in log.handlers):
            file = sys.stderr if record.levelno > logging.INFO else sys.stdout
            print(record.getMessage(), file=file)


log.setLevel(logging.INFO)
log.addHandler(Echo())


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> str:
    """Write a labelled .npz bundle of 48 shapes of 128 points. Returns its path."""
    made = make_shapes(48, 128, seed=3)
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    split = np.tile([0, 0, 1], 16).astype(np.int8)
    np.savez(
        path,
        points=made["points"],
        labels=np.arange(48) // 3 % 3,
        split=split,
        class_names=CLASS_NAMES[:3],
    )
    return str(path)


@pytest.fixture(scope="session")
def tiny(bundle):
    """Return a function that makes a PretrainConfig from overrides. Its run on `bundle` takes a
    second.
    """
    return lambda **overrides: settings.resolve(TINY, {"data": [bundle]}, overrides)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> str:
    """Write 240 shapes of three easy classes with part labels, a third of them in the test split.
    Returns the path.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 3
    points = (
        rng.normal(size=(240, 128, 3))
        * np.array([[1, 1, 1], [1, 1, 0.05], [1, 0.05, 0.05]])[labels][:, None]
    )
    parts = 2 * labels[:, None] + (points[..., 0] > 0)
    path = tmp_path_factory.mktemp("easy") / "shapes.npz"
    np.savez(
        path,
        points=points.astype(np.float32),
        labels=labels,
        split=(np.arange(240) // 3 % 3 == 2).astype(np.int8),
        class_names=["ball", "disc", "rod"],
        seg=parts.astype(np.int16),
        part_names=[
            f"{name}/{end}" for name in ("ball", "disc", "rod") for end in ("left", "right")
        ],
    )
    return str(path)


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> str:
    """Save an image transformer with random weights, 2 layers and width 36. Returns its folder."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 52,
    }
    folder = tmp_path_factory.mktemp("vit")
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def quick_probe(monkeypatch) -> None:
    """Make the probe fit a tenth as often, in this process, for tests that ignore its scores."""
    for name, value in (("_DRAWS", 2), ("_C_GRID", (0.01,)), ("_FEW_C_GRID", (0.01,))):
        monkeypatch.setattr(f"jepa3d.evaluation.probe.{name}", value)
    monkeypatch.setattr("jepa3d.evaluation.classifiers._STEPS", 20)
    monkeypatch.setattr("jepa3d.evaluation.classifiers._WORTH_PROCESSES", float("inf"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real bundles, $JEPA3D_DATA. Skips the test if there is none."""
    folder = Path(os.environ.get("JEPA3D_DATA", "missing"))
    if not folder.is_dir():
        pytest.skip("set JEPA3D_DATA to the folder of real bundles")
    return folder


@pytest.fixture
def encoder_and_data(tmp_path) -> tuple[str, str]:
    """Save an encoder, and a bundle of 60 train and 60 test shapes of four classes, 512 points
    each. Returns both paths.
    """
    made = make_shapes(120, 512, seed=0)["points"]
    np.savez(
        tmp_path / "s.npz", points=made, labels=np.arange(120) // 2 % 4, split=np.arange(120) % 2
    )
    torch.manual_seed(0)
    PointEncoder(32, 2, 2, 16, 8, 128, tokenizer_dim=16).save_pretrained(tmp_path / "one")
    return str(tmp_path / "one"), str(tmp_path / "s.npz")
