"""The frozen image transformer inside the dVAE, here small and with random weights."""

import builtins
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from jepa3d.models.backbone import NUM_PROMPTS, PromptedViT, load_vit
from jepa3d.models.dvae import DVAE
from jepa3d.models.teacher import Teacher, load_module
from jepa3d.models.tokenizer import group
from jepa3d.ops import BatchGenerator, knn

transformers = pytest.importorskip("transformers")

SIZES = {
    "width": 16,
    "num_codes": 12,
    "num_groups": 8,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 8,
    "dgcnn_dim": 8,
    "folding_dim": 8,
}


@pytest.fixture
def dvae(vit):
    torch.manual_seed(0)
    return DVAE(**SIZES, backbone=vit)


@pytest.fixture
def grouped():
    points = torch.randn(3, 64, 3, generator=torch.Generator().manual_seed(0))
    centers, patches, _ = group(points, 8, 8)
    return patches, centers


def test_prompts_and_maps_get_gradients_and_the_vit_none(dvae, grouped):
    frozen = dvae.backbone._frozen[0]
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    optimizer = torch.optim.AdamW(dvae.parameters(), lr=0.1, weight_decay=0.1)
    dvae.train()
    for step in range(3):
        dvae(*grouped, 1.0, 0.1, BatchGenerator(0, step)).loss.backward()
        for name, parameter in dvae.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.ndim < 2 or parameter.grad.any(), name
        for prompts in (*dvae.backbone.prompts.grad, *dvae.backbone.prompt_positions.grad):
            assert prompts.any()  # the prompts of every layer get gradients
        optimizer.step()
        optimizer.zero_grad()
    assert not frozen.training
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


def test_it_is_the_vit_s_own_layers_with_new_prompts_at_each(vit):
    """The expected result is computed layer by layer, with the weights that transformers loads."""
    torch.manual_seed(0)
    prompted, own = PromptedViT(vit, 16).eval(), transformers.ViTModel.from_pretrained(vit).eval()
    tokens, centers = torch.randn(2, 5, 16), torch.randn(2, 5, 3)
    x = prompted.enter(tokens)
    for i, layer in enumerate(own.layers):
        prompts = (prompted.prompts[i] + prompted.prompt_positions[i]).expand(2, NUM_PROMPTS, -1)
        x = layer(torch.cat([prompts, x + prompted.position(centers)], 1))[:, NUM_PROMPTS:]
    assert_close(prompted(tokens, centers), prompted.leave(own.layernorm(x)))
    assert prompted.prompts.shape == (len(own.layers), 64, own.config.hidden_size)


def test_a_classifier_s_folder_gives_the_vit_inside_it(vit, tmp_path):
    """Published checkpoints are of this kind: names begin with vit., and there is a head."""
    tensors = {
        f"vit.{name}": value for name, value in load_file(f"{vit}/model.safetensors").items()
    }
    save_file(tensors | {"classifier.weight": torch.zeros(3, 36)}, tmp_path / "model.safetensors")
    shutil.copy(f"{vit}/config.json", tmp_path)
    inside, plain = (load_vit(str(folder))[0].state_dict() for folder in (tmp_path, vit))
    assert all(torch.equal(inside[name], value) for name, value in plain.items())


def test_the_features_are_of_codes_that_went_through_the_vit(dvae, grouped):
    dvae.eval()
    centers = grouped[1]
    with_it, neighbours = dvae.features(*grouped)[0], knn(centers, centers, 4)
    logits = dvae.to_logits(dvae.tokenizer(grouped[0]), neighbours)
    through = dvae.backbone(logits.softmax(-1) @ dvae.codebook, centers)
    assert_close(with_it, dvae.to_features(through, neighbours))
    dvae.backbone = None
    assert (dvae.features(*grouped)[0] - with_it).abs().max() > 0.1


def test_prompts_drop_out_in_training_only_by_the_generator(dvae, grouped):
    codes = dvae.codebook[dvae.codes(*grouped)].detach()
    backbone, centers = dvae.backbone, grouped[1]
    one, same, other = (
        backbone.train()(codes, centers, BatchGenerator(0, step)) for step in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(*(backbone.eval()(codes, centers) for _ in range(2)))


def test_neither_state_nor_folder_holds_its_weights(dvae, grouped, vit, tmp_path):
    dvae.eval().save_pretrained(tmp_path)
    known = {
        tuple(value.shape)
        for value in dvae.backbone._frozen[0].layers.state_dict().values()
        if value.ndim > 1
    }
    assert not known & {tuple(value.shape) for value in dvae.state_dict().values()}
    assert not any(
        id(p) in {id(q) for q in dvae.parameters()} for p in dvae.backbone._frozen[0].parameters()
    )
    assert json.loads((tmp_path / "config.json").read_text())["backbone"] == vit
    loaded = load_module(str(tmp_path))
    assert torch.equal(loaded.features(*grouped)[0], dvae.features(*grouped)[0])
    assert Teacher([loaded])(*grouped).shape == (3, 8, 16)


def test_it_moves_with_the_dvae(dvae):
    assert dvae.to(torch.float64).backbone._frozen[0].layernorm.weight.dtype == torch.float64


# ---------------------------------------------------------------------------------- one-line errors


def refusal(call, *arguments) -> str:
    with pytest.raises(ValueError, match="backbone") as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_transformers_the_extra_is_named(vit, monkeypatch):
    found = builtins.__import__

    def missing(name, *others):
        if name.startswith("transformers"):
            raise ImportError(name)
        return found(name, *others)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert "pip install 'jepa3d[vit]'" in refusal(load_vit, vit)


def test_another_vit_is_refused(dvae, vit, tmp_path):
    other = shutil.copytree(vit, tmp_path / "vit")
    dvae.save_pretrained(tmp_path / "dvae")
    settings = json.loads((tmp_path / "dvae" / "config.json").read_text())
    (tmp_path / "dvae" / "config.json").write_text(json.dumps(settings | {"backbone": str(other)}))
    load_module(str(tmp_path / "dvae"))  # the same ViT in another folder is accepted
    tensors = load_file(other / "model.safetensors")
    save_file(
        tensors | {"layernorm.bias": tensors["layernorm.bias"] + 1e-3}, other / "model.safetensors"
    )
    said = refusal(load_module, str(tmp_path / "dvae"))
    assert f"{other} is not the ViT that this dVAE was trained with" in said
    assert dvae.backbone.sha256[:16] in said


def test_a_stored_dvae_says_what_it_lacks_when_its_vit_is_gone(vit, tmp_path):
    moved = shutil.copytree(vit, tmp_path / "vit")
    DVAE(**SIZES, backbone=str(moved)).save_pretrained(tmp_path / "dvae")
    shutil.rmtree(moved)
    said = refusal(load_module, str(tmp_path / "dvae"))
    assert str(moved) in said
    assert "backbone in the config.json of a dVAE" in said


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: shutil.rmtree(folder), "neither a folder nor a Hub id"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "damaged"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
            "'bert', but must be 'vit'",
        ),
        (
            lambda folder: edit(folder, num_hidden_layers=3),
            "so it does not hold the weights of a ViT",
        ),
        (lambda folder: edit(folder, hidden_size=64), "no ViT can be made from its settings"),
        (lambda folder: edit(folder, hidden_size="wide"), "no ViT can be made from its settings"),
        (
            lambda folder: edit(folder, num_attention_heads=0),
            "no ViT can be made from its settings",
        ),
    ],
)
def test_a_folder_that_holds_no_vit_is_refused(vit, tmp_path, harm, says):
    folder = shutil.copytree(vit, tmp_path / "vit")
    harm(folder)
    assert says in refusal(load_vit, str(folder))


def edit(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
