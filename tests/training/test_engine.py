"""Cached targets, micro-batches, recomputed activations, and settings that are chosen by a rule or
a trial run.
"""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from processes import two_processes
from test_loop import losses, same, weights
from torch.testing import assert_close

from jepa3d import config as settings
from jepa3d import info
from jepa3d.models import decoder, encoder
from jepa3d.models.tokenizer import BatchNorm, group
from jepa3d.ops import BatchGenerator, farthest_point_sample
from jepa3d.plain import write_checked
from jepa3d.run import Run
from jepa3d.training import cache, engine, loop
from jepa3d.training.loop import Interrupted
from jepa3d.training.pretrain import clouds_of, make_task, pretrain, with_cache

CACHED = {"teacher": "untrained", "target": {"cache": True}}


def record(run):
    return json.loads((run / "run.json").read_text())


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------- cached targets


def test_cached_targets_are_what_the_teacher_says_of_the_shapes_as_they_are(tiny):
    # All 32 shapes are one batch, so the result does not depend on their order.
    config = tiny(**CACHED, batch_size=32)
    clouds = clouds_of(config, "jepa")
    task = with_cache(make_task(config, "jepa", clouds, {}), clouds, config, None)
    index = np.array([3, 0, 31])
    centers, patches, tokens = task.targets(index)
    every = group(clouds.batch(np.arange(32)), 16, 8)
    expected = task.objective.teacher(every.patches, every.centers)
    assert_close(tokens.float(), expected[index], atol=2e-3, rtol=1e-3)  # half precision
    assert torch.equal(patches, every.index[index])
    assert torch.equal(centers, farthest_point_sample(clouds.batch(index), 16))


def test_a_cached_step_without_augmentation_is_the_plain_step(tiny):
    config = tiny(**CACHED, batch_size=32, rotate=False, scale=(1.0, 1.0))
    clouds = clouds_of(config, "jepa")
    task = make_task(config, "jepa", clouds, {})
    cached = with_cache(task, clouds, config, None)
    points, generator = clouds.batch(np.arange(32)), BatchGenerator(0)
    grouped = group(points, 16, 8)
    objective = task.objective
    sample = objective.sampler(grouped.centers, generator.stream("sampler"))
    prediction, _ = objective.predict(
        grouped.patches, grouped.centers, sample, generator.stream("drop_path")
    )
    output = objective(points, generator, 0.0, *cached.targets(np.arange(32)))
    assert_close(output.prediction, prediction)
    tokens = objective.teacher(grouped.patches, grouped.centers)
    assert_close(
        output.target,
        tokens[torch.arange(32)[:, None, None], output.sample.target],
        atol=2e-3,
        rtol=1e-3,
    )


def test_patches_of_a_cached_step_are_of_the_augmented_points(tiny, monkeypatch):
    config, seen = tiny(**CACHED), []
    clouds = clouds_of(config, "jepa")
    task = with_cache(make_task(config, "jepa", clouds, {}), clouds, config, None)
    index = np.arange(4)
    points = 2.0 * clouds.batch(index)
    monkeypatch.setattr(
        task.objective,
        "predict",
        lambda patches, centers, *_: seen.append((patches, centers)) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        task.objective(points, BatchGenerator(0), 0.0, *task.targets(index))
    plain = group(clouds.batch(index), 16, 8)
    assert_close(seen[0], (2 * plain.patches, 2 * plain.centers))


def test_an_interrupted_cache_goes_on_and_the_run_is_the_same(tiny, tmp_path, monkeypatch):
    config = tiny(**CACHED, max_steps=4)
    whole = pretrain(config, tmp_path / "whole")
    assert not (whole / "cache").exists(), "gone when the run is finished"
    assert json.loads((whole / "run.json").read_text())["cost"]["stage1_cpu_seconds"] > 0
    monkeypatch.setattr(cache, "SAVE_EVERY", 1)
    asked, farthest = [], farthest_point_sample

    def stops(points, count):
        asked.append(len(points))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return farthest(points, count)

    monkeypatch.setattr(cache, "farthest_point_sample", stops)
    with pytest.raises(Interrupted, match="while computing targets"):
        pretrain(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "cache" / "run.json").read_text())["batches"] == 2
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "run", resume=True, stop_at=2)
    assert asked == [8] * 5, "four batches of 32 shapes, the third asked twice"
    run = pretrain(config, tmp_path / "run", resume=True)
    assert len(asked) == 5
    assert same(weights(whole), weights(run))


@pytest.mark.parametrize("teacher", ["ema", "none"])
def test_a_moving_teacher_cannot_be_cached(tiny, tmp_path, teacher):
    config = tiny(
        teacher=["untrained", teacher] if teacher == "ema" else teacher,
        target={"cache": True, "sigreg": 0.1},
    )
    with pytest.raises(ValueError, match=rf"target\.cache needs frozen teachers, not {teacher}"):
        pretrain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_too_small_for_the_targets_is_said_before_anything_is_written(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(
        ValueError, match=r"target\.cache needs 0\.0 GB in .*, but only 0\.0 GB are free"
    ):
        pretrain(tiny(**CACHED), tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------ passes of one step


def test_passes_of_a_step_add_up_to_its_gradient(tiny, monkeypatch):
    """BatchNorm and the standardisation of targets are left out here, since each micro-batch has
    its own statistics.
    """
    monkeypatch.setattr(BatchNorm, "forward", lambda self, x: x)
    states = []
    for accumulate in (1, 4):
        config = tiny(accumulate=accumulate, max_steps=3, target={"norm": "layernorm"}, lr=1e-2)
        clouds = clouds_of(config, "jepa")
        task = make_task(config, "jepa", clouds, {})
        state = loop.fit(task, clouds, config, None)
        states.append((state["metrics"]["loss"], task.objective.state_dict()))
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-5)
    assert_close(states[0][1], states[1][1], atol=2e-4, rtol=1e-3)


def test_accumulation_resumes(tiny, tmp_path):
    config = tiny(accumulate=2)
    whole = pretrain(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "halves", stop_at=3)
    assert same(weights(whole), weights(pretrain(config, tmp_path / "halves", resume=True)))


def test_a_batch_that_passes_cannot_share_is_an_error(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"batch_size 8 is not a multiple of processes \(1\) x accumulate \(3\)"
    ):
        pretrain(tiny(accumulate=3), tmp_path / "run")


@pytest.mark.parametrize(
    "overrides", [{}, {"decoder": {"depth": 0}}, {"objective": "generative"}], ids=str
)
def test_recomputed_activations_change_nothing(tiny, tmp_path, overrides, monkeypatch):
    again = []
    for module in (decoder, encoder):

        def noted(*a, original=module.checkpoint, **k):
            again.append(1)
            return original(*a, **k)

        monkeypatch.setattr(module, "checkpoint", noted)
    plain = pretrain(tiny(**overrides), tmp_path / "plain")
    assert not again
    assert same(
        weights(plain),
        weights(pretrain(tiny(checkpoint_activations=True, **overrides), tmp_path / "again")),
    )
    assert again


# ------------------------------------------------------------------------------------- the rule


class GPU:
    """Imitates torch's module of a device."""

    def __init__(self, bf16: bool):
        self.bf16 = bf16

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return self.bf16 or including_emulation

    def get_device_name(self) -> str:
        return "GPU of 2030"


@pytest.mark.parametrize(
    ("gpu", "amx", "precision", "name"),
    [
        (None, True, "bf16", "CPU with AMX"),
        (None, False, "no", "CPU"),
        (GPU(True), False, "bf16", "GPU of 2030"),
        (GPU(False), True, "no", "GPU of 2030"),
    ],
)
def test_auto_is_bf16_on_gpus_that_have_it_and_with_amx_and_fp32_elsewhere(
    tiny, monkeypatch, capsys, gpu, amx, precision, name
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(engine, "ON_CPU", gpu is None)
    monkeypatch.setattr(torch, "get_device_module", lambda: gpu)
    monkeypatch.setattr(engine, "PartialState", lambda cpu: SimpleNamespace(is_main_process=True))
    monkeypatch.setattr(engine, "broadcast_object_list", lambda found: found)
    assert engine.settle(tiny(mixed_precision="auto")).mixed_precision == precision
    said = {"no": "fp32"}.get(precision, precision)
    assert capsys.readouterr().out == f"computing in {said} on {name} (mixed_precision auto)\n"
    assert engine.settle(tiny(mixed_precision="fp16")).mixed_precision == "fp16"


def test_auto_is_fp32_where_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not engine.has_fast_bf16()
    monkeypatch.setattr(engine, "ON_CPU", False)
    monkeypatch.setattr(torch, "get_device_module", lambda: SimpleNamespace())
    assert not engine.has_fast_bf16()


def test_a_run_says_what_auto_came_to_and_keeps_to_it_on_another_machine(
    tiny, tmp_path, monkeypatch, capsys
):
    run, amx = tmp_path / "run", [True]
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx[0])
    config = tiny(mixed_precision="auto", max_steps=4, **CACHED)
    with pytest.raises(Interrupted):
        pretrain(config, run, stop_at=2)
    assert json.loads((run / "config.json").read_text())["mixed_precision"] == "bf16"
    assert record(run)["engine"] == {
        "mixed_precision": "bf16",
        "compile": False,
        "device": "CPU with AMX",
    }
    assert record(run)["departures"]["mixed_precision"] == ["bf16", "no"]
    amx[0] = False
    capsys.readouterr()
    pretrain(config, run, resume=True)
    said = capsys.readouterr().out
    assert f"{run}: started in bf16 on CPU with AMX; continues in bf16 on CPU\n" in said
    assert "mixed_precision auto" not in said
    assert losses(
        pretrain(tiny(mixed_precision="bf16", max_steps=4, **CACHED), tmp_path / "bf16")
    ) == losses(run)
    info.describe(str(run))
    assert "computed in: bf16 on CPU with AMX\n" in capsys.readouterr().out


def test_a_run_begun_in_fp32_by_an_older_version_stays_in_it(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        pretrain(tiny(max_steps=4), run, stop_at=2)
    edit_json(run / "run.json", lambda found: found.pop("engine"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    pretrain(tiny(mixed_precision="auto", max_steps=4), run, resume=True)
    assert losses(run) == losses(pretrain(tiny(max_steps=4), tmp_path / "fp32"))


@pytest.mark.parametrize("tried", [True, False], ids=["after its trial", "before its trial"])
def test_auto_of_an_older_version_was_a_trial(tiny, tmp_path, monkeypatch, tried):
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        pretrain(tiny(mixed_precision="bf16", max_steps=4), run, stop_at=2)
    edit_json(run / "config.json", lambda found: found.update(mixed_precision="auto"))
    edit_json(run / "run.json", lambda found: (found.pop("engine"), found.pop("config")))
    if tried:
        write_checked(
            run / "engine.json",
            {"mixed_precision": "bf16", "compile": False, "seconds": {"bf16": 1.0}},
        )
    monkeypatch.setattr(engine, "trial", lambda *_: 1 / 0 if tried else {("bf16", False): 1.0})
    assert Run(run).config["mixed_precision"] == "measure"
    pretrain(tiny(mixed_precision="measure", max_steps=4), run, resume=True)
    assert losses(run) == losses(
        pretrain(tiny(mixed_precision="bf16", max_steps=4), tmp_path / "bf16")
    )


def edit_json(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_two_processes_take_what_the_first_one_finds(monkeypatch, tiny):
    monkeypatch.setattr(engine, "broadcast_object_list", lambda found: ["bf16"])
    assert engine.settle(tiny(mixed_precision="auto")).mixed_precision == "bf16"


# ------------------------------------------------------------------------------------- the trial


def test_a_trial_chooses_the_fastest_and_a_resume_keeps_it(tiny, tmp_path, monkeypatch, capsys):
    tried = []

    def trial(task, clouds, config, hows):
        tried.append(hows)
        return {how: 1.0 + (how[0] == "no") for how in hows}

    monkeypatch.setattr(engine, "trial", trial)
    config = tiny(mixed_precision="measure", max_steps=4)
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "run", stop_at=2)
    pretrain(config, tmp_path / "run", resume=True)
    assert tried == [[("no", False), ("bf16", False)]]
    found = record(tmp_path / "run")["engine"]
    assert (found["mixed_precision"], found["compile"], found["seconds"]) == (
        "bf16",
        False,
        {"fp32": 2.0, "bf16": 1.0},
    )
    assert (
        "trial, forward and backward in ms: fp32 2000, bf16 1000; chosen: bf16"
        in capsys.readouterr().out
    )
    bf16 = pretrain(tiny(mixed_precision="bf16", max_steps=4), tmp_path / "bf16")
    assert losses(bf16) == losses(tmp_path / "run")


def test_a_trial_leaves_the_run_as_it_was(tiny, tmp_path, monkeypatch):
    plain = pretrain(tiny(max_steps=2), tmp_path / "plain")
    measured = engine.trial

    def trial(*args):
        found = measured(*args)
        assert found.keys() == {("no", False), ("bf16", False)}
        assert min(found.values()) > 0
        return {("no", False): 1.0}

    monkeypatch.setattr(engine, "trial", trial)
    assert same(
        weights(plain),
        weights(pretrain(tiny(mixed_precision="measure", max_steps=2), tmp_path / "run")),
    )


def test_what_cannot_be_computed_is_left_out_of_the_choice(tiny, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler\nsecond line")

    config = tiny(compile="auto")
    clouds = clouds_of(config, "jepa")
    task = make_task(config, "jepa", clouds, {})
    monkeypatch.setattr(
        engine, "compile_blocks", lambda objective: setattr(objective, "forward", broken)
    )
    assert engine.choose(task, clouds, config, None) == ("no", False)
    assert (
        "trial of fp32, compiled failed: no compiler\ntrial, forward and backward in ms: fp32 "
        in capsys.readouterr().out
    )
    with pytest.raises(RuntimeError, match="no compiler"):
        engine.trial(task, clouds, config, [("no", True)])


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_and_keep_their_names(tiny, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    states = []
    for wanted in ("no", "yes"):
        sizes = {"encoder": {"drop_path": 0.0, "depth": 1}, "decoder": {"depth": 1}}
        config = tiny(compile=wanted, max_steps=2, **sizes)
        clouds = clouds_of(config, "jepa")
        task = make_task(config, "jepa", clouds, {})
        loop.fit(task, clouds, config, None)
        states.append(task.objective.state_dict())
        blocks = [*task.objective.encoder.blocks, *task.objective.decoder.blocks]
        assert all((block._compiled_call_impl is not None) == (wanted == "yes") for block in blocks)
    assert_close(*states, atol=1e-4, rtol=1e-3)


def compile_eagerly(self, **options):
    self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager", **options)


# -------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_cache_accumulate_and_choose_as_one(tiny, tmp_path):
    """This holds for micro-batches too: together, two processes have the same first micro-batch as
    one process.
    """
    config = tiny(**CACHED, max_steps=4)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings.to_dict(config)))

    def run(name: str, *flags: str):
        words = ("pretrain", "--recipe", recipe, "--out", tmp_path / name, *flags)
        two_processes(*words, log=tmp_path / "logs" / name)
        return tmp_path / name

    one = pretrain(config, tmp_path / "one")
    assert losses(run("two")) == pytest.approx(losses(one), rel=1e-4)
    one = pretrain(replace(config, accumulate=2), tmp_path / "one-2")
    assert losses(run("two-2", "--accumulate", "2")) == pytest.approx(losses(one), rel=1e-4)
    assert record(run("measure", "--mixed-precision", "measure"))["engine"]["seconds"].keys() == {
        "fp32",
        "bf16",
    }
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "more", stop_at=2)
    assert losses(run("more", "--resume")) == pytest.approx(losses(tmp_path / "one"), rel=1e-4), (
        "begun by one process"
    )


# ---------------------------------------------------------------------------------- trackers


def test_tensorboard_gets_the_figures_of_metrics_jsonl_and_the_settings(tiny, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        # An interruption must not lose metrics.
        pretrain(tiny(track="tensorboard", log_every=1), run, stop_at=2)
    time.sleep(1.1)  # tensorboardX names files by the second of their creation
    pretrain(tiny(track="tensorboard", log_every=1), run, resume=True)
    events = b"".join(path.read_bytes() for path in sorted((run / "jepa3d").glob("events*")))
    figures = lines(run)
    assert events.count(b"grad_norm") >= len(figures)
    hparams = next((run / "jepa3d").rglob("hparams.yml"))
    assert yaml.safe_load(hparams.read_text())["sampler.name"] == "multi_block"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("board", "--track board is unknown: use one of .*tensorboard"),
        ("aim", "--track aim needs a package: pip install aim"),
    ],
)
def test_a_tracker_that_cannot_be_had_is_told(tiny, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        pretrain(tiny(track=name), tmp_path / "run")
    assert not (tmp_path / "run").exists()
