"""Runs whose dVAE has a frozen image transformer: both stages run and resume, and the transformer's
weights are not stored.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from jepa3d.info import describe
from jepa3d.plain import sha256_of
from jepa3d.run import Run
from jepa3d.training.loop import Interrupted
from jepa3d.training.pretrain import dry_run, pretrain


def losses(run):
    return [line["loss"] for line in Run(run).metrics]


@pytest.fixture
def config(tiny, vit):
    return tiny(teacher="dvae", max_steps=20, dvae={"max_steps": 20, "backbone": vit})


def test_twenty_steps_of_both_stages_resumed_once_each(config, tmp_path):
    whole = pretrain(config, tmp_path / "whole")
    for part, settings in (("", config), ("stage1/dvae", config.stage("dvae"))):
        halves = tmp_path / f"halves-{settings.objective}"
        with pytest.raises(Interrupted):
            pretrain(settings, halves, stop_at=10)
        pretrain(settings, halves, resume=True)
        assert losses(whole / part) == losses(halves)
        assert len(losses(halves)) == 20
        assert np.isfinite(losses(halves)).all()
    plain = pretrain(
        replace(config.stage("dvae"), dvae=replace(config.dvae, backbone=None)), tmp_path / "plain"
    )
    assert losses(plain)[0] != losses(whole / "stage1" / "dvae")[0]
    assert "backbone" not in json.loads((plain / "run.json").read_text())


def test_a_run_holds_a_reference_and_a_checksum_but_no_weights_of_the_vit(
    config, vit, tmp_path, capsys
):
    with pytest.raises(Interrupted):
        pretrain(config.stage("dvae"), tmp_path / "stage", stop_at=2)
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "run", stop_at=2)
    pretrain(config, tmp_path / "run", resume=True)
    frozen = {
        value.numpy().tobytes()
        for value in load_file(f"{vit}/model.safetensors").values()
        if value.ndim > 1
    }
    files = [*tmp_path.rglob("*.safetensors")]
    assert len(files) > 4  # files of checkpoints and of saved networks
    for file in files:
        assert not any(value.numpy().tobytes() in frozen for value in load_file(file).values()), (
            file
        )
    for stage in (tmp_path / "stage", tmp_path / "run" / "stage1" / "dvae"):
        record = json.loads((stage / "run.json").read_text())
        assert record["backbone"] == {
            "name": vit,
            "sha256": sha256_of(Path(vit) / "model.safetensors"),
        }
        describe(str(stage))
        assert (
            f"(not stored in the run): {vit}, sha256 {record['backbone']['sha256'][:16]}"
            in capsys.readouterr().out
        )


def test_a_resumed_stage_refuses_another_vit(config, vit, tiny, tmp_path):
    copied = shutil.copytree(vit, tmp_path / "vit")
    config = tiny(objective="dvae", dvae={"backbone": str(copied)})
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "run", stop_at=2)
    tensors = load_file(copied / "model.safetensors")
    save_file({name: value + 1e-3 for name, value in tensors.items()}, copied / "model.safetensors")
    with pytest.raises(ValueError, match="not the ViT that this dVAE was trained with"):
        pretrain(config, tmp_path / "run", resume=True)


def test_a_missing_vit_is_refused_before_anything_is_written(tiny, tmp_path):
    config = tiny(teacher="dvae", dvae={"backbone": str(tmp_path / "nothing")})
    with pytest.raises(ValueError, match="nothing: neither a folder nor a Hub id"):
        pretrain(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_takes_it_along(config, capsys):
    dry_run(config)
    assert "dry run, dvae" in capsys.readouterr().out
