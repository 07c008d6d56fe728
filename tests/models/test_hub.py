"""Networks from folders and from the Hub: what a name means. Errors name the file and what is
expected.
"""

import json
import random
import re
import shutil
import time
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jepa3d.models import hub
from jepa3d.models.dvae import DVAE
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier, LinearClassifier, Segmenter
from jepa3d.models.ready import load, load_any, load_network
from jepa3d.models.teacher import load_module

SIZES = {
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "num_groups": 4,
    "group_size": 8,
    "num_points": 32,
}
NETWORKS = {
    "encoder": lambda: PointEncoder(**SIZES, tokenizer_dim=8),
    "dvae": lambda: DVAE(16, 8, 4, 8, 32, 8, 8, 8),
    "classifier": lambda: Classifier(SIZES, ["a", "b"]),
    "linear": lambda: LinearClassifier(SIZES, ["a", "b"]),
    "segmenter": lambda: Segmenter(SIZES, ["a"], ["p", "q"], [[0, 1]], [0, 1, 1]),
}
LOADERS = {
    "encoder": (load, load_any, load_module, PointEncoder.from_pretrained),
    "dvae": (load_module, DVAE.from_pretrained),
    "classifier": (load_any, load_network, Classifier.from_pretrained),
    "linear": (load_any, load_network, LinearClassifier.from_pretrained),
    "segmenter": (load_any, load_network, Segmenter.from_pretrained),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name, make in NETWORKS.items():
        make().save_pretrained(folder / name)
    return folder


def refusals(loaders, path) -> list[str]:
    """Load damaged files with each loader. Returns the messages: each is one line, without Python
    internals and torch's own messages.
    """
    said = []
    for loader in loaders:
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            loader(str(path))
        said.append(str(caught.value))
        assert "\n" not in said[-1]
        assert not re.search(
            r"__init__|state_dict|Traceback|object has no attribute|argument", said[-1]
        )
    return said


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_was_saved_loads_and_a_younger_argument_takes_its_default(saved, tmp_path, kind):
    shutil.copytree(saved / kind, tmp_path / kind)
    file = tmp_path / kind / "config.json"
    settings = json.loads(file.read_text())
    younger = [
        name
        for name in ("mlp_ratio", "dropout", "pooling")
        if name in settings and kind != "linear"
    ]
    file.write_text(
        json.dumps(
            {name: value for name, value in settings.items() if name not in younger} | {"new": 1}
        )
    )
    for loader in LOADERS[kind]:
        loaded = loader(str(tmp_path / kind))
        assert not loaded.training
        assert vars(loaded)["_hub_mixin_config"] == settings
        for name, values in load_file(file.with_name("model.safetensors")).items():
            assert torch.equal(loaded.state_dict()[name], values)


@pytest.mark.parametrize("kind", NETWORKS)
def test_damaged_settings_name_their_file_and_what_is_expected(saved, tmp_path, kind):
    """Every setting is tried as missing, of another type, or in the wrong place."""
    shutil.copytree(saved / kind, tmp_path / kind)
    file = tmp_path / kind / "config.json"
    settings = json.loads(file.read_text())
    first = {"encoder": "embed_dim", "dvae": "width"}.get(kind, "class_names")
    damaged = {"{": "not JSON", "[]": "of type list", "": "not JSON", "3": "of type int"}
    damaged[json.dumps({k: v for k, v in settings.items() if k != first})] = (
        "lacks|without classes|encoder"
    )
    for name, value in settings.items():
        wrong = "seven" if not isinstance(value, str) else 7
        damaged[json.dumps(settings | {name: wrong})] = f"{name} is {wrong!r}, not"
        if isinstance(value, int) and not isinstance(value, bool) and name != "layer":
            damaged[json.dumps(settings | {name: 0})] = f"{name} is 0, but must be at least 1"
    if "encoder" in settings:
        for name in SIZES:
            damaged[json.dumps(settings | {"encoder": SIZES | {name: -2}})] = (
                f"encoder: {name} is -2, but must be at least 1"
            )
            damaged[json.dumps(settings | {"encoder": SIZES | {name: None}})] = (
                f"encoder: {name} is None"
            )
        misspelt = settings | {"encoder": SIZES | {"embed_dimm": 3}}
        damaged[json.dumps(misspelt)] = "embed_dimm is unknown; did you mean 'embed_dim'"
    for text, expected in damaged.items():
        file.write_text(text)
        loaders = (
            LOADERS[kind] if first in text and '"num_codes": "' not in text else LOADERS[kind][-1:]
        )
        for said in refusals(loaders, tmp_path / kind):
            assert re.search(expected, said), (text, said)
            assert "config.json" in said


@pytest.mark.parametrize("kind", NETWORKS)
def test_damaged_weights_name_their_file_and_what_is_wrong(saved, tmp_path, kind):
    draw = random.Random(kind)
    shutil.copytree(saved / kind, tmp_path / kind)
    file = tmp_path / kind / "model.safetensors"
    # Cloned, since some versions of safetensors map the file, which is overwritten below.
    whole = {name: values.clone() for name, values in load_file(file).items()}
    content = file.read_bytes()
    name = draw.choice(sorted(name for name in whole if whole[name].ndim))
    damaged = {
        f"{name} is missing": {k: v for k, v in whole.items() if k != name},
        "extra is not a tensor of this network": whole | {"extra": torch.zeros(2)},
        f"{name} has the shape": whole | {name: torch.zeros(1, 2, 3, 4)},
        "and .* more": {},
    }
    for expected, tensors in damaged.items():
        save_file(tensors, file)
        assert all(
            re.search(expected, said) and file.name in said
            for said in refusals(LOADERS[kind], tmp_path / kind)
        )
    for cut in (0, 7, 100, draw.randrange(len(content)), len(content) - 1):
        file.write_bytes(content[:cut])
        assert all(file.name in said for said in refusals(LOADERS[kind], tmp_path / kind))
    file.unlink()
    assert all("is missing" in said for said in refusals(LOADERS[kind], tmp_path / kind))


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("defalt", "; did you mean 'default'?"),
        ("Default", "; did you mean 'default'?"),
        ("zzz", ""),
        ("runs/mien/", "; did you mean 'runs/mine'?"),
        ("./runs/mime", "; did you mean 'runs/mine'?"),
        ("a/b/c", ""),
        ("../x", ""),
        ("~/runs/mine", ""),
        ("no/such model", ""),
        ("/nowhere/at/all", ""),
        ("vectors.parque", ""),
    ],
)
def test_a_name_that_is_not_of_the_hub_is_refused_here(
    name, hint, tmp_path, monkeypatch, no_network
):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for loader in (load, load_any):
        with pytest.raises(ValueError, match=re.escape(name)) as caught:
            loader(name)
        assert str(caught.value).endswith(f"neither a folder nor a Hub id (owner/name){hint}")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("emma", "ema"), ("dvea", "dvae"), ("invariant", "invariance"), ("untraind", "untrained")],
)
def test_a_misspelt_teacher_is_told_the_one_that_is_meant(name, hint, tiny, tmp_path, no_network):
    from jepa3d.training.pretrain import dry_run, pretrain

    for setting in ("teacher", "init"):
        config = tiny(**{setting: (name,) if setting == "teacher" else name})
        for begin in (
            lambda config=config: pretrain(config, tmp_path / "run"),
            lambda config=config: dry_run(config),
        ):
            with pytest.raises(ValueError, match=rf"\A{name}: .*did you mean '{hint}'\?"):
                begin()
    assert not (tmp_path / "run").exists()


def test_a_hub_id_is_said_to_be_out_of_reach_within_seconds(monkeypatch, tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def away(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(hub.urllib.request, "urlopen", away)
    began = time.perf_counter()
    for loader in (load, load_any, load_module, PointEncoder.from_pretrained):
        with pytest.raises(
            ValueError, match=r"\Aruns/mien: .*no route, and no copy.*did you mean 'runs/mine'\?"
        ):
            loader("runs/mien")
    assert time.perf_counter() - began < 5


def test_a_kept_copy_of_the_hub_is_used_without_a_connection(monkeypatch, saved, tmp_path):
    copy = tmp_path / "models--owner--name"
    shutil.copytree(saved / "encoder", copy / "snapshots" / ("0" * 40))
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(hub, "_unreachable", lambda: "no route")
    loaded = PointEncoder.from_pretrained("owner/name", cache_dir=tmp_path)
    assert torch.equal(loaded.norm.weight, load(saved / "encoder").norm.weight)
    with pytest.raises(ValueError, match=r"owner/other: .*no copy is stored here"):
        PointEncoder.from_pretrained("owner/other", cache_dir=tmp_path)
