"""Runs survive damage: damaged files, bad clouds, full disks, two commands at once."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Command
from safetensors.torch import load_file, save_file

from jepa3d.cli import main
from jepa3d.config import FewshotConfig, FinetuneConfig
from jepa3d.data.cloud import ReadError
from jepa3d.data.store import Store
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.ready import load
from jepa3d.plain import from_dict, merge
from jepa3d.run import Run
from jepa3d.training import checkpoint
from jepa3d.training import fewshot as fewshots
from jepa3d.training.fewshot import run_fewshot
from jepa3d.training.finetune import finetune
from jepa3d.training.loop import Interrupted
from jepa3d.training.pretrain import pretrain


def flip(file: Path, seed: int = 0) -> None:
    """Flip one random bit of a file; `seed` chooses it."""
    content, draw = bytearray(file.read_bytes()), random.Random(seed)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


DAMAGE = {
    "flip": flip,
    "truncate": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "remove": Path.unlink,
}
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def weights(run: Path, part: str = "encoder") -> dict[str, torch.Tensor]:
    return load_file(run / part / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(capsys, *words) -> str:
    """Run a command that must be refused. Returns the single line that it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert said.count("\n") == 1
    return said


@pytest.fixture(scope="module")
def cut(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """Return a run that was stopped at step 5 of 6, with checkpoints of steps 4 and 5, and the same
    run without a stop.
    """
    folder = tmp_path_factory.mktemp("cut")
    with pytest.raises(Interrupted):
        pretrain(tiny(), folder / "cut", stop_at=5)
    return folder / "cut", pretrain(tiny(), folder / "whole")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    tiny, cut, tmp_path, capsys, name, damage
):
    run, whole = shutil.copytree(cut[0], tmp_path / "run"), cut[1]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-0000004",
        "step-0000005",
    ]
    bad = run / "checkpoints" / "step-0000005" / name
    DAMAGE[damage](bad)
    pretrain(tiny(), run, resume=True)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(str(bad)))
    assert said.endswith("; resuming from step-0000004")
    assert same(weights(whole), weights(run))


def test_every_bit_of_a_checkpoint_counts(cut, tmp_path):
    """Every flipped bit is detected, unless training does not read it (as spaces in JSON)."""
    run = shutil.copytree(cut[0], tmp_path / "run") / "checkpoints" / "step-0000005"
    for name in FILES:
        file, read = run / name, checkpoint._READ[name]
        content, before, noticed = file.read_bytes(), read(file), []
        for seed in range(40):
            flip(file, seed)
            try:
                after = read(file)
                assert after.keys() == before.keys()
                assert all(
                    torch.equal(torch.as_tensor(after[key]), before[key])
                    for key in before
                    if name != FILES[2]
                )
                assert name != FILES[2] or after == before
            except ValueError as error:
                noticed.append(str(error))
            file.write_bytes(content)
        assert len(noticed) > 20
        assert all(line.startswith(str(file)) for line in noticed)


def test_both_damaged_or_gone_is_a_clear_error(tiny, cut, tmp_path, capsys):
    run = shutil.copytree(cut[0], tmp_path / "run")
    for folder in (run / "checkpoints").iterdir():
        flip(folder / "model.safetensors")
    said = refusal(capsys, "pretrain", "--out", run, "--resume")
    assert "step-0000005/model.safetensors" in said
    assert "no undamaged checkpoint is left: start again with another --out" in said
    shutil.rmtree(run / "checkpoints")
    assert "checkpoints is missing, although the run had saved" in refusal(
        capsys, "pretrain", "--out", run, "--resume"
    )


def test_settings_that_were_damaged_or_edited_are_refused(cut, tmp_path, capsys):
    run = shutil.copytree(cut[0], tmp_path / "run")
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"lr": 0.001', '"lr": 0.003'))
    assert "config.json is missing, damaged or edited" in refusal(
        capsys, "pretrain", "--out", run, "--resume"
    )
    (run / "config.json").write_text(text)
    (run / "run.json").write_text((run / "run.json").read_text().replace('"data"', '"dada"'))
    assert "run.json: damaged: it has no data" in refusal(
        capsys, "pretrain", "--out", run, "--resume"
    )
    os.truncate(run / "run.json", 100)
    assert "run.json: " in refusal(capsys, "pretrain", "--out", run, "--resume")


def test_damaged_metrics_lose_their_line_only(tiny, cut, tmp_path):
    run = shutil.copytree(cut[0], tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(
        lines[0] + b"\xff{" + lines[1] + b"".join(lines[2:]) + b'{"step": 5, "lo'
    )
    pretrain(tiny(), run, resume=True)
    assert [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ] == [1, 3, 4, 5, 6]


QUICK = {
    "batch_size": 8,
    "max_steps": 12,
    "lr": 3e-3,
    "log_every": 1,
    "checkpoint_every": 3,
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
}


def test_a_damaged_checkpoint_of_fine_tuning_too(shapes, tmp_path, capsys):
    config = from_dict(FinetuneConfig, merge(QUICK, {"data": shapes}))
    whole = finetune(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        finetune(config, tmp_path / "cut", stop_at=7)
    flip(tmp_path / "cut" / "checkpoints" / "step-0000007" / "optimizer.safetensors")
    finetune(config, tmp_path / "cut", resume=True)
    assert "optimizer.safetensors is damaged" in capsys.readouterr().out
    assert same(weights(whole, "model"), weights(tmp_path / "cut", "model"))


def test_a_damaged_start_or_episode_of_few_shot_is_refused(shapes, tmp_path, monkeypatch):
    torch.manual_seed(0)
    PointEncoder(**QUICK["encoder"]).save_pretrained(tmp_path / "given")
    sizes = {
        "data": shapes,
        "ways": 2,
        "shots": 4,
        "queries": 5,
        "folds": 2,
        "init": str(tmp_path / "given"),
    }
    config, run = from_dict(FewshotConfig, merge(QUICK, sizes)), tmp_path / "run"
    real = fewshots.finetune
    monkeypatch.setattr(fewshots, "finetune", lambda *a, **options: real(*a, stop_at=4, **options))
    with pytest.raises(Interrupted):
        run_fewshot(config, run)
    monkeypatch.undo()
    for file in (run / "start" / "model.safetensors", run / "episodes.json"):
        content = file.read_bytes()
        os.truncate(file, len(content) - 5)
        with pytest.raises(ValueError, match=file.name):
            run_fewshot(config, run, resume=True)
        file.write_bytes(content)
    flip(run / "fold-0" / "checkpoints" / "step-0000004" / "state.json")
    run_fewshot(config, run, resume=True)
    assert json.loads((run / "results.json").read_text())["details"]["folds"]


def test_stage_one_goes_on_from_its_older_checkpoint(tiny, tmp_path, capsys):
    config = tiny(teacher="dvae")
    whole = pretrain(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        pretrain(config.stage("dvae"), tmp_path / "stage", stop_at=3)
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "run", stop_at=1)
    stage = tmp_path / "run" / "stage1" / "dvae"
    shutil.rmtree(stage)
    shutil.copytree(tmp_path / "stage", stage)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    flip(stage / "checkpoints" / "step-0000003" / "model.safetensors")
    pretrain(config, tmp_path / "run", resume=True)
    assert "resuming from step-0000002" in capsys.readouterr().out
    assert same(weights(whole), weights(tmp_path / "run"))


def test_a_checkpoint_holds_a_layer_with_two_names(tmp_path):
    layer = torch.nn.Linear(3, 3)
    model = torch.nn.ModuleDict({"one": layer, "two": layer})
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint.save(tmp_path, model, optimizer, {"step": 1})
    torch.nn.init.zeros_(layer.weight)
    checkpoint.restore(tmp_path, model, optimizer)
    assert same(before, model.state_dict())


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["targets.npy", "run.json"])
def test_damaged_targets_are_computed_again(tiny, tmp_path, capsys, name, damage):
    config = tiny(teacher="untrained", target={"cache": True})
    whole = pretrain(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "run", stop_at=3)
    DAMAGE[damage](tmp_path / "run" / "cache" / name)
    pretrain(config, tmp_path / "run", resume=True)
    said = capsys.readouterr().out
    assert ("its targets are computed again" in said) or (damage, name) == ("remove", "run.json")
    assert same(weights(whole), weights(tmp_path / "run"))


@pytest.mark.parametrize("change", [(b")]", b")\x00"), (b"<f2", b"<i2"), (b"(32,)", b"(31,)")])
def test_targets_with_a_damaged_header_are_computed_again(tiny, tmp_path, capsys, change):
    config = tiny(teacher="untrained", target={"cache": True})
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "run", stop_at=3)
    file = tmp_path / "run" / "cache" / "targets.npy"
    content = file.read_bytes()
    file.write_bytes(content.replace(*change, 1))
    assert file.read_bytes() != content
    pretrain(config, tmp_path / "run", resume=True)
    assert "its targets are computed again" in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_with_nan_are_refused_by_name(tmp_path, value):
    encoder = PointEncoder(**QUICK["encoder"])
    encoder.blocks[1].norm1.weight.data[3] = value
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(
        ValueError,
        match=r"encoder/model\.safetensors: blocks\.1\.norm1\.weight holds NaN or infinite",
    ):
        load(tmp_path / "encoder")


def test_weights_of_others_without_a_checksum_load_and_flipped_ones_do_not(tmp_path):
    encoder = PointEncoder(**QUICK["encoder"])
    encoder.save_pretrained(tmp_path / "encoder")
    file = tmp_path / "encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .* checksum"):
        load(tmp_path / "encoder")
    save_file(encoder.state_dict(), file)
    load(tmp_path / "encoder")


# --------------------------------------------------------------------------------------- bad clouds


@pytest.fixture
def store(tmp_path) -> Path:
    """Prepare a store of 40 clouds of 64 points. Returns its path."""
    for i in range(40):
        np.savetxt(tmp_path / f"{i:02}.xyz", np.random.default_rng(i).normal(size=(64, 3)))
    (tmp_path / "clouds").mkdir()
    for file in tmp_path.glob("*.xyz"):
        file.rename(tmp_path / "clouds" / file.name)
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "prepare",
                str(tmp_path / "clouds"),
                "--out",
                str(tmp_path / "store"),
                "--points",
                "64",
                "--workers",
                "1",
            ]
        )
    assert not stop.value.code
    return tmp_path / "store"


def spoil(store: Path, row: int) -> None:
    opened = Store(store)
    file = store / opened.header["shards"][0]["file"]
    content = bytearray(file.read_bytes())
    at = len(content) - 40 * 64 * 12 + row * 64 * 12
    content[at : at + 4] = np.float32("nan").tobytes()
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["nan", "truncated", "gone"])
def test_a_bad_cloud_is_named_with_its_step_and_the_run_goes_on_when_it_is_whole(
    tiny, store, tmp_path, capsys, how
):
    config = tiny(data=[str(store)], checkpoint_every=100)
    whole = pretrain(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "run", stop_at=2)
    file = next(store.glob("points-*"))
    content, spoilt = file.read_bytes(), False
    real = torch.optim.AdamW.step

    def step(self, *arguments, **options):
        nonlocal spoilt
        if not spoilt:  # damages the store after the first batch
            if how == "nan":
                for row in range(40):
                    spoil(store, row)
            elif how == "truncated":
                os.truncate(file, len(content) // 2)
            else:
                file.unlink()
            spoilt = True
        return real(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(
            ReadError, match=r"read at step [45]; restore the damaged file"
        ) as caught:
            pretrain(config, tmp_path / "run", resume=True)
    assert str(store) in str(caught.value)
    assert (".xyz: NaN or infinite" in str(caught.value)) == (how == "nan")
    assert "lr" not in str(caught.value)
    # The batch of the next step may have been read already.
    step = int(re.search(r"read at step (\d)", str(caught.value))[1])
    assert Run(tmp_path / "run").checkpoint.name == f"step-{step - 1:07d}"
    assert str(store) in refusal(capsys, "info", store, "--verify")
    file.write_bytes(content)
    pretrain(config, tmp_path / "run", resume=True)
    assert same(weights(whole), weights(tmp_path / "run"))


@pytest.mark.parametrize("name", ["label", "split", "end", "key_end", "frame"])
def test_a_damaged_index_of_a_store_is_refused_when_it_is_opened(store, capsys, name):
    flip(store / "index" / f"{name}.bin", 5)
    assert "index rows 0 to 40 are damaged" in refusal(capsys, "info", store)


def test_verify_finds_nan_whose_checksum_is_right(store, capsys):
    opened = Store(store)
    spoil(store, 7)
    header = json.loads((store / "store.json").read_text())
    file = store / header["shards"][0]["file"]
    header["shards"][0]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (store / "store.json").write_text(json.dumps(header))
    assert f"{opened.key(7)}: NaN or infinite coordinates" in refusal(
        capsys, "info", store, "--verify"
    )


# -------------------------------------------------------------------------- two at once, full disks


def test_a_second_command_on_a_run_is_refused_by_name(tiny, cut, tmp_path):
    run = shutil.copytree(cut[0], tmp_path / "run")
    hold = "import sys, time; from jepa3d.locking import writing\n"
    hold += "with writing(sys.argv[1]): print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(run)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="run: another command is writing there"):
            pretrain(tiny(), run, resume=True)
        other.kill()
    assert same(weights(pretrain(tiny(), run, resume=True)), weights(cut[1]))


def fill_the_disk(limit: int) -> None:
    """Limit the size of every file that this process writes to `limit` bytes. Called before the
    command starts.
    """
    import resource

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # printed text must not be limited
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.mark.parametrize("limit", [2_000, 30_000, 60_000])
def test_a_full_disk_names_the_file_and_what_was_whole_stays(tiny, cut, tmp_path, limit):
    """A limit on file sizes imitates a full disk: small files fit, weights or optimiser states do
    not.
    """
    pytest.importorskip("resource")
    run = shutil.copytree(cut[0], tmp_path / "run")
    before = {
        str(path): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.suffix != ".jsonl"
    }
    words = ("pretrain", "--out", run, "--resume")
    command = Command(*words, log=tmp_path / "log", before=partial(fill_the_disk, limit))
    if code := command.end():
        said = command.printed("err")
        assert code == 2, said
        assert said.startswith("jepa3d: error: ")
        assert said.count("\n") == 1
        assert str(run) in said
        assert {name: Path(name).read_bytes() for name in before} == before
        assert not [path for path in run.rglob(".*") if path.suffix != ".lock"]
    pretrain(tiny(), run, resume=True)
    assert same(weights(run), weights(cut[1]))
    assert code or limit > 2_000
