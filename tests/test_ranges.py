"""Every numeric setting has a range beside its default. A value outside is refused with the
setting's name. A run has one schedule.
"""

import dataclasses
import functools
import math
import random
import re
import typing
from pathlib import Path

import pytest

from jepa3d import config as settings
from jepa3d.cli import main
from jepa3d.config import KINDS, SCHEDULE, PretrainConfig
from jepa3d.plain import check_ranges, from_dict, to_dict
from jepa3d.training import pretrain as training
from jepa3d.validate import departures, validate

RECIPES = Path(__file__).parent.parent / "recipes"


def numbers(cls, path=()):
    """Yield path, type and range of every numeric field: a number or a tuple of numbers, possibly
    None.
    """
    for part in dataclasses.fields(cls):
        kind = part.type
        if dataclasses.is_dataclass(kind):
            yield from numbers(kind, (*path, part.name))
            continue
        kinds = {kind, *typing.get_args(kind)}
        kinds |= {inner for outer in kinds for inner in typing.get_args(outer)}
        if kinds & {int, float}:
            yield (*path, part.name), kind, part.metadata.get("range")


def changed(config, path, value):
    inner = value if len(path) == 1 else changed(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: inner})


FIELDS = [(command, *found) for command, cls in KINDS.items() for found in numbers(cls)]
NAMES = [f"{command}-{'.'.join(path)}" for command, path, *_ in FIELDS]


@pytest.mark.parametrize(("command", "path", "kind", "allowed"), FIELDS, ids=NAMES)
def test_a_number_outside_of_its_range_is_refused_by_name(command, path, kind, allowed):
    name = ".".join(path)
    assert allowed, f"{name} has no range"
    low, high = map(float, re.findall(r"[\d.e]+", allowed))
    draw, whole = random.Random(name), "int" in str(kind) and "float" not in str(kind)
    wrong: list = [low - draw.uniform(1, 1e9), high + draw.uniform(1, 1e12), low - 1, 10 * high + 1]
    wrong = (
        [int(value) for value in wrong]
        if whole
        else [*wrong, math.nan, math.inf, -math.inf, low - 1e-9]
    )
    config = KINDS[command](**({} if command == "pretrain" else {"data": "x"}))
    size = str(kind).count("float" if not whole else "int") if "tuple" in str(kind) else 0
    for value in wrong:
        items: list = list(functools.reduce(getattr, path, config) or ()) if size else []
        items = items or [1] * size
        if size:
            items[draw.randrange(size)] = value
        with pytest.raises(ValueError, match=f"^{re.escape(name)} "):
            validate(changed(config, path, tuple(items) if size else value))


@pytest.mark.parametrize("command", KINDS)
def test_the_defaults_and_presets_lie_within(command):
    for preset in settings.PRESETS:
        overrides = settings.preset(preset, KINDS[command])
        check_ranges(
            settings.resolve(overrides)
            if command == "pretrain"
            else from_dict(KINDS[command], overrides)
        )


@pytest.mark.parametrize(
    "name", ["sampler.target_ratio", "sampler.context_ratio", "invariance.partial_ratio", "scale"]
)
def test_a_range_given_backwards_is_refused(name):
    with pytest.raises(ValueError, match="low <= high"):
        validate(changed(PretrainConfig(), tuple(name.split(".")), (0.9, 0.2)))


def test_an_empty_list_of_sources_is_refused():
    with pytest.raises(ValueError, match="data is empty"):
        validate(settings.resolve({"data": []}))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch-size", "1000000000"), "batch_size 1000000000 must be"),
        (("--batch-size", "1000000", "--preset", "base"), "needs at least"),
        (("--target.momentum", "2", "1"), "target.momentum (2.0, 1.0) must lie in [0, 1]"),
        (("--scale", "nan", "1"), "scale (nan, 1.0)"),
        (("--scale", "0.5", "inf"), "scale (0.5, inf)"),
        (("--dvae.kl-weight", "-1"), "dvae.kl_weight -1"),
        (("--invariance.vicreg", "-25", "25", "1"), "invariance.vicreg (-25.0, 25.0, 1.0)"),
        (("--encoder.embed-dim", "1000000000000"), "encoder.embed_dim 1000000000000 must be"),
        (
            ("--encoder.embed-dim", "16384", "--encoder.num-heads", "1", "--encoder.depth", "200"),
            "this machine has",
        ),
        (("--encoder.num-heads", "5"), "not a multiple of num_heads 5"),
        (
            ("--encoder.num-groups", "4000"),
            "encoder.num_groups 4000 must not exceed encoder.num_points",
        ),
        (("--seed", "-1"), "seed -1"),
        (("--epochs", "inf"), "epochs inf"),
        (
            (
                "--objective",
                "generative",
                "--encoder.num-groups",
                "1",
                "--sampler.num-targets",
                "1",
            ),
            "generative.mask_ratio 0.6",
        ),
    ],
    ids=str,
)
def test_refused_at_the_command_line_before_anything_is_written(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "pretrain",
                "--data",
                "synthetic:8",
                "--teacher",
                "ema",
                *words,
                "--out",
                str(tmp_path / "run"),
            ]
        )
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- one schedule a run


@pytest.fixture
def resolved(monkeypatch):
    """Return a function that gives the configuration which a pretrain command would use."""

    def resolve(*words) -> PretrainConfig:
        configs = []
        monkeypatch.setattr(training, "dry_run", configs.append)
        with pytest.raises(SystemExit) as stop:
            main(["pretrain", *map(str, words), "--dry-run"])
        assert not stop.value.code
        return configs[0]

    return resolve


@pytest.mark.parametrize("objective", ["jepa", "generative", "invariance", "dvae"])
@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_the_flags_of_the_schedule_are_the_run_s_whatever_the_objective(
    resolved, objective, preset
):
    flags = {
        "lr": 3e-3,
        "weight_decay": 0.01,
        "warmup_epochs": 3.0,
        "min_lr": 1e-5,
        "clip_grad": 5.0,
        "batch_size": 12,
    }
    flags |= {"epochs": 7.0, "max_steps": 9}
    words = [
        word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    config = resolved("--preset", preset, "--objective", objective, *words)
    assert {name: getattr(config.schedule(objective), name) for name in SCHEDULE} == flags
    assert settings.resolve(to_dict(config)) == config


@pytest.mark.parametrize("objective", ["generative", "invariance", "dvae"])
def test_a_preset_s_schedule_of_the_objective_is_the_run_s(resolved, objective):
    config = resolved("--preset", "tiny", "--objective", objective)
    for name, value in settings.preset("tiny")[objective].items():
        assert (
            getattr(
                config.schedule(objective) if name in SCHEDULE else getattr(config, objective), name
            )
            == value
        )


def test_the_rival_s_own_flag_is_another_name_and_two_that_differ_are_refused(resolved, capsys):
    config = resolved(
        "--recipe",
        RECIPES / "tiny-paper.yaml",
        "--objective",
        "generative",
        "--generative.max-steps",
        440,
    )
    assert config.schedule("generative").max_steps == 440
    config = resolved(
        "--recipe", RECIPES / "tiny-generative.yaml", "--generative.max_steps=7", "--max-steps", 7
    )
    assert config.max_steps == 7
    words = [
        "pretrain",
        "--objective",
        "invariance",
        "--max-steps",
        "5",
        "--invariance.max-steps",
        "6",
        "--dry-run",
    ]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert (
        "max_steps 5 and 6: max_steps and invariance.max_steps are the same setting in this run"
        in capsys.readouterr().err
    )


def test_stage_one_keeps_its_own_schedule(resolved):
    words = (
        "--preset",
        "tiny",
        "--teacher",
        "generative",
        "--max-steps",
        670,
        "--generative.max-steps",
        480,
    )
    config = resolved(*words, "--lr", 2e-3)
    assert (config.schedule("jepa").max_steps, config.schedule("generative").max_steps) == (
        670,
        480,
    )
    stage = config.stage("generative")
    assert (stage.objective, stage.max_steps, stage.lr) == ("generative", 480, 1e-3)
    assert stage.schedule("generative") is stage


def test_the_flag_objective_leaves_the_schedule_of_the_recipe_s_objective(resolved, tmp_path):
    (tmp_path / "a.yaml").write_text("objective: generative\ngenerative: {max_steps: 50}\n")
    words = ("--recipe", tmp_path / "a.yaml", "--objective", "jepa", "--generative.lr", 0.1)
    config = resolved(*words)
    assert (config.objective, config.max_steps, config.lr) == ("jepa", None, 1e-3)
    assert (config.generative.max_steps, config.generative.lr) == (50, 0.1)


@pytest.mark.parametrize(("name", "steps"), [("generative", 4400), ("invariance", 1150)])
def test_the_rivals_recipes_give_the_runs_they_gave(resolved, name, steps):
    schedule = resolved("--recipe", RECIPES / f"tiny-{name}.yaml").schedule(name)
    assert (schedule.max_steps, schedule.batch_size, schedule.lr, schedule.warmup_epochs) == (
        steps,
        32,
        1e-3,
        2,
    )


def test_a_rival_departs_in_its_own_schedule_only():
    faithful = {"data": ["ShapeNet55"], "split": "all", "objective": "dvae"}
    faithful["dvae"] = {"backbone": "google/vit-base-patch16-384"}
    found = departures(settings.resolve(faithful, {"max_steps": 7}), 52_470)
    assert found == {"objective": ("dvae", "jepa"), "max_steps": (7, None)}
