"""Settings: the paper's defaults, strict names and types, and which source overrides which."""

import copy
import dataclasses
from pathlib import Path

import pytest

from jepa3d import config as settings
from jepa3d.config import PRESETS, DVAEConfig, PretrainConfig
from jepa3d.plain import differences, read_recipe
from jepa3d.validate import departures

# Words in the names of fine-tuning recipes; test_recipes.py tests these recipes.
FINETUNING = {"classify", "segment", "scanobjectnn", "modelnet40", "shapenetpart"}
RECIPES = [
    path
    for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    if not FINETUNING.intersection(path.stem.split("-"))
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder.embed_dim", 384),
        ("encoder.depth", 12),
        ("encoder.num_heads", 6),
        ("encoder.num_groups", 64),
        ("encoder.group_size", 32),
        ("encoder.num_points", 2048),
        ("encoder.drop_path", 0.1),
        ("sampler.name", "multi_block"),
        ("sampler.num_targets", 4),
        ("sampler.target_ratio", (0.15, 0.2)),
        ("sampler.context_ratio", None),
        ("sampler.mask_ratio", 0.25),
        ("decoder.depth", 2),
        ("decoder.cross_attention", True),
        ("decoder.stacked", False),
        ("lr", 1e-3),
        ("weight_decay", 0.05),
        ("batch_size", 128),
        ("warmup_epochs", 10),
        ("epochs", 300),
        ("objective", "jepa"),
        ("teacher", ("dvae",)),
        ("scale", (0.8, 1.2)),
        ("rotate", True),
        ("dvae.lr", 5e-4),
        ("dvae.weight_decay", 5e-4),
        ("dvae.batch_size", 64),
        ("dvae.epochs", 300),
        ("dvae.warmup_epochs", 10),
        ("dvae.clip_grad", 10),
        ("dvae.num_points", 1024),
        ("dvae.width", 384),
        ("dvae.num_codes", 8192),
        ("dvae.temperature", (1.0, 0.0625)),
        ("dvae.kl_weight", 0.1),
        ("target.momentum", (0.996, 1.0)),
        ("target.layers", 1),
        ("encoder.position_every_block", True),
        ("generative.mask_ratio", 0.6),
        ("generative.decoder_depth", 4),
        ("generative.lr", 1e-3),
        ("generative.weight_decay", 0.05),
        ("generative.batch_size", 128),
        ("generative.epochs", 300),
        ("invariance.vicreg", (25.0, 25.0, 1.0)),
        ("invariance.sigreg", 0.02),
    ],
)
def test_the_defaults_are_the_papers(name, value):
    found = PretrainConfig()
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PretrainConfig().lr = 1.0


@pytest.mark.parametrize("name", ["small", "base"])
def test_a_preset_resolves_and_changes_sizes_never_the_method(name):
    config, paper = settings.resolve(settings.preset(name)), PretrainConfig()
    for part in (
        "sampler",
        "decoder",
        "target",
        "objective",
        "teacher",
        "scale",
        "rotate",
        "data",
        "split",
    ):
        assert getattr(config, part) == getattr(paper, part)


def test_tiny_alone_has_what_learned_most_in_minutes():
    config, paper = settings.resolve(settings.preset("tiny")), PretrainConfig()
    changed = differences(settings.to_dict(config), settings.to_dict(paper))
    parts = ("objective", "sampler", "decoder", "target", "teacher", "scale", "rotate")
    assert {name for name in changed if name.split(".")[0] in parts} == {
        "sampler.name",
        "sampler.mask_ratio",
        "target.layers",
        "target.num_slices",
        "teacher",
        "rotate",
    }


def test_small_is_the_paper_and_the_others_are_not():
    assert settings.resolve(settings.preset("small")) == PretrainConfig()
    assert settings.resolve(settings.preset("tiny")).encoder.embed_dim == 96
    base = settings.resolve(settings.preset("base")).encoder
    assert (base.embed_dim, base.depth, base.num_heads) == (768, 12, 12)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"'tiney' is unknown; did you mean 'tiny'\?"):
        settings.preset("tiney")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batchsize": 3}, r"'batchsize' is unknown; did you mean 'batch_size'\?"),
        ({"encoder": {"dept": 3}}, r"'encoder\.dept' is unknown; did you mean 'depth'\?"),
        ({"zzz": 3}, r"'zzz' is unknown\Z"),
        ({1: 3}, "'1' is unknown"),
    ],
)
def test_an_unknown_key_names_the_nearest(values, said):
    with pytest.raises(ValueError, match=said):
        settings.resolve(values)


@pytest.mark.parametrize(
    "values",
    [
        {"lr": "fast"},
        {"lr": True},
        {"lr": None},
        {"batch_size": 3.5},
        {"batch_size": True},
        {"batch_size": "4"},
        {"rotate": 1},
        {"rotate": "no"},
        {"teacher": 3},
        {"max_steps": "many"},
        {"max_steps": 1.5},
        {"data": 3},
        {"data": [3]},
        {"scale": 0.8},
        {"scale": [0.8]},
        {"scale": [0.8, 1, 1.2]},
        {"scale": ["a", "b"]},
        {"encoder": 3},
        {"encoder": None},
        {"encoder": {"depth": [2]}},
    ],
    ids=str,
)
def test_a_wrong_type_is_refused_with_name_and_value(values):
    (name, value), *_ = values.items()
    with pytest.raises(ValueError, match=name) as caught:
        settings.resolve(values)
    assert "\n" not in str(caught.value)
    assert isinstance(value, (dict, list)) or repr(value) in str(caught.value)


def test_a_literal_names_what_is_allowed():
    with pytest.raises(ValueError, match="'val' is not one of train, test, all"):
        settings.resolve({"split": "val"})
    with pytest.raises(ValueError, match="'w' is not one of x, y, z"):
        settings.resolve({"up_axis": ["z", "w"]})


def test_one_text_serves_as_a_list_of_one():
    assert settings.resolve({"data": "shapes.npz"}).data == ("shapes.npz",)


def test_a_later_layer_wins_key_by_key():
    config = settings.resolve(
        {"lr": 1.0, "batch_size": 8, "encoder": {"depth": 2, "num_heads": 2}, "data": ["a", "b"]},
        {"lr": 2.0, "encoder": {"depth": 3}, "data": ["c"]},
    )
    assert (config.lr, config.batch_size, config.data) == (2.0, 8, ("c",))
    assert (config.encoder.depth, config.encoder.num_heads, config.encoder.embed_dim) == (3, 2, 384)


def test_layers_are_not_changed_by_merging():
    layers = settings.preset("tiny"), {"encoder": {"depth": 3}, "dvae": {"width": 8}}
    before = copy.deepcopy(layers)
    settings.resolve(*layers)
    assert before == layers


@pytest.mark.parametrize(
    "config", [settings.resolve(settings.preset(name), {"max_steps": 7}) for name in PRESETS]
)
def test_a_configuration_survives_its_dictionary(config):
    assert settings.from_dict(PretrainConfig, settings.to_dict(config)) == config
    assert settings.from_dict(DVAEConfig, settings.to_dict(config.dvae)) == config.dvae


def test_differences_are_dotted_names_with_both_values():
    one, two = (
        settings.to_dict(PretrainConfig()),
        settings.to_dict(settings.resolve({"lr": 2.0, "dvae": {"width": 8}})),
    )
    assert differences(two, one) == {"lr": (2.0, 1e-3), "dvae.width": (8, 384)}
    assert differences(one, one) == {}


FAITHFUL = {
    "data": ["disk/ShapeNet55"],
    "split": "all",
    "dvae": {"backbone": "google/vit-base-patch16-384"},
}


@pytest.mark.parametrize(
    "changes", [{}, {"epochs": 150}, {"seed": 3, "log_every": 1, "checkpoint_every": 5}]
)
def test_the_papers_run_departs_in_nothing(changes):
    assert departures(settings.resolve(FAITHFUL, changes), 52_470) == {}


def test_the_points_only_dvae_is_a_departure():
    config = settings.resolve({"data": ["disk/pc"], "split": "all"})
    assert departures(config, 52_470) == {"dvae.backbone": (None, "google/vit-base-patch16-384")}


def test_saying_that_shapenet55_is_y_up_is_no_departure():
    """Its files are y-up, so a faithful run has to change the default."""
    config = settings.resolve(FAITHFUL, {"up_axis": ["y"]})
    assert departures(config, 52_470) == {}


def test_tiny_departs_in_its_sizes_and_says_what_it_predicts():
    config = settings.resolve(
        settings.preset("tiny"), {"data": ["ShapeNet55"], "split": "all", "teacher": "dvae"}
    )
    found = departures(config, 52_470)
    assert found["encoder.embed_dim"] == (96, 384)
    assert found["dvae.num_codes"] == (512, 8192)
    assert found["sampler.name"] == ("random", "multi_block")
    assert found["target.layers"] == (4, 1)
    assert "data" not in found


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"data": ["scans"]}, "data"),
        ({"split": "train"}, "split"),
        ({"teacher": "ema"}, "teacher"),
        ({"epochs": 200}, "epochs"),
        ({"rotate": False}, "rotate"),
        ({"sampler": {"num_targets": 3}}, "sampler.num_targets"),
        ({"target": {"norm": "layernorm"}}, "target.norm"),
        ({"max_steps": 5}, "max_steps"),
    ],
)
def test_what_departs_is_listed_and_nothing_else(changes, name):
    num_shapes = 10 if name == "data" else 52_470
    assert list(departures(settings.resolve(FAITHFUL, changes), num_shapes)) == [name]


def test_a_rival_has_no_departures_in_settings_that_only_3d_jepa_has():
    config = settings.resolve(settings.preset("tiny"), {"objective": "generative"})
    groups = {name.split(".")[0] for name in departures(config, 10)}
    assert not groups & {"sampler", "decoder", "target", "teacher", "init"}


def test_a_teacher_that_is_not_trained_here_has_no_departures_of_stage_one():
    config = settings.resolve(settings.preset("tiny"), {"teacher": "ema"})
    assert not any(name.startswith("dvae") for name in departures(config, 10))


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "", "lr: [", "3", "\x00"], ids=["list", "empty", "cut", "3", "binary"]
)
def test_a_recipe_that_is_no_mapping_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml: ") as caught:
        read_recipe(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.yaml"):
        read_recipe(tmp_path / "nothing.yaml")


def test_a_recipe_cannot_run_code(tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"teacher: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n"
    )
    with pytest.raises(ValueError, match="this recipe cannot be read"):
        read_recipe(tmp_path / "a.yaml")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves(path):
    recipe = read_recipe(path)
    config = settings.resolve(settings.preset(recipe.pop("preset", "small")), recipe)
    assert settings.from_dict(PretrainConfig, settings.to_dict(config)) == config
