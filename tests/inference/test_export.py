"""Exported files give the results of their network, and a failed export leaves no files behind."""

import io
import json
import logging
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from jepa3d import frame, load
from jepa3d.cli import main
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier, LinearClassifier, Segmenter
from jepa3d.models.tokenizer import BatchNorm, group

onnxruntime = pytest.importorskip("onnxruntime")
module = pytest.importorskip("jepa3d.inference.export", exc_type=ValueError)
RNG = np.random.default_rng(0)
SIZES = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_groups": 16,
    "group_size": 8,
    "num_points": 128,
    "tokenizer_dim": 16,
}


def trained(network):
    """Give a network random BatchNorm statistics, and return it in evaluation mode."""
    for norm in network.modules():
        if isinstance(norm, BatchNorm):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def printed() -> list[str]:
    return []


@pytest.fixture(scope="module")
def made(tmp_path_factory, printed):
    """Export an encoder once, since it takes seconds. Returns the encoder's folder and that of the
    export; `printed` gets what the command prints.
    """
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    trained(PointEncoder(**SIZES)).save_pretrained(folder / "model")
    with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit, match=r"^0$"):
        main(["export", str(folder / "model"), "--out", str(folder / "deep" / "out")])
    printed += said.getvalue().strip().splitlines()
    return folder / "model", folder / "deep" / "out"


def session(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def clouds(batch: int, count: int) -> np.ndarray:
    return (RNG.normal(size=(batch, count, 3)) * 30 + 100).astype(np.float32)


def of_torch(encoder, points) -> list[np.ndarray]:
    with torch.no_grad():
        tokens, centers = encoder.tokens(torch.from_numpy(points))
        return [encoder.embed(torch.from_numpy(points)).numpy(), tokens.numpy(), centers.numpy()]


# ---------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(("batch", "count"), [(1, 16), (2, 50), (1, 128), (1, 129), (33, 200)])
def test_onnx_and_torch_export_give_what_the_encoder_gives_for_any_batch_and_number_of_points(
    made, batch, count
):
    points = clouds(batch, count)
    expected = of_torch(load(made[0]), points)
    found = session(made[1] / "encoder.onnx").run(
        ["embedding", "tokens", "centers"], {"points": points}
    )
    program = torch.export.load(made[1] / "encoder.pt2").module()
    for one, other, wanted in zip(found, program(torch.from_numpy(points)), expected, strict=True):
        assert_allclose(one, wanted, rtol=1e-4, atol=1e-5)
        assert_allclose(other.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def of_encoder_onnx(folder, points):
    return session(folder / "encoder.onnx").run(["embedding"], {"points": points[None]})[0]


@cache
def program(file):
    """The loaded module of a .pt2 file; torch takes seconds to load it."""
    return torch.export.load(file).module()


def of_encoder_pt2(folder, points):
    return program(folder / "encoder.pt2")(torch.from_numpy(points)[None])[0].detach()


def of_grouping_and_patches_onnx(folder, points):
    grouped = runpy.run_path(str(folder / "grouping.py"))["group"](points, 128, 16, 8)
    inputs = dict(zip(("patches", "centers"), (part[None] for part in grouped), strict=True))
    return session(folder / "patches.onnx").run(["embedding"], inputs)[0]


@pytest.mark.parametrize("vector", [of_encoder_onnx, of_encoder_pt2, of_grouping_and_patches_onnx])
@pytest.mark.parametrize("count", [16, 17, 40, 127, 128, 129, 700])
def test_every_exported_file_gives_the_vector_of_a_cloud_whatever_its_order_and_copies(
    made, vector, count
):
    u, v = np.random.default_rng(0).uniform(-1, 1, (2, count))
    sheet = np.stack([u, v, np.sin(2 * u) * v], 1) * 30
    order = RNG.permutation(count + count // 2)
    for cloud in (sheet, np.concatenate([sheet, sheet[: count // 2]])[order]):
        points = (cloud - cloud.mean(0)).astype(np.float32)
        expected = load(made[0]).embed(np.add(cloud, (500, -200, 40))).detach()[0]
        assert_allclose(vector(made[1], points)[0], expected, rtol=1e-5, atol=1e-5)


def test_the_graph_refuses_fewer_points_too(made):
    few = clouds(1, 15)[0]
    opened = session(made[1] / "encoder.onnx")
    for cloud in (few, np.tile(few, (20, 1)), few[:1], np.ones((64, 3))):
        with pytest.raises(Exception, match=r"Out of range|out of data bounds|Shape mismatch"):
            opened.run(["embedding"], {"points": (cloud - cloud.mean(0)).astype(np.float32)[None]})


def test_axes_and_metadata_say_what_goes_in(made):
    (points,) = session(made[1] / "encoder.onnx").get_inputs()
    assert points.shape == ["batch", "num_points", 3]
    opened = session(made[1] / "patches.onnx")
    assert [value.shape for value in opened.get_inputs()] == [["batch", 16, 8, 3], ["batch", 16, 3]]
    assert [value.shape for value in opened.get_outputs()] == [["batch", 64], ["batch", 16, 32]]
    assert (
        opened.get_modelmeta().custom_metadata_map.items()
        >= {"num_points": "128", "group_size": "8"}.items()
    )
    assert not list(made[1].glob("*.data"))  # each network is one file


@pytest.mark.parametrize("count", [40, 128, 5000])
def test_patches_of_numpy_give_the_encoder_s_vector_for_a_cloud_in_map_coordinates(made, count):
    cloud = RNG.normal(size=(count, 3)) * 30 + 4000
    encoder = load(made[0])
    patches, centers = frame.group(cloud, 128, 16, 8)
    expected = group(encoder.prepare(torch.from_numpy(cloud)[None]), 16, 8)
    assert_allclose(centers, expected.centers[0], atol=1e-6)
    assert_allclose(patches, expected.patches[0], atol=1e-6)
    inputs = {"patches": patches[None], "centers": centers[None]}
    (found,) = session(made[1] / "patches.onnx").run(["embedding"], inputs)
    assert_allclose(
        found, encoder.embed(torch.from_numpy(cloud)[None]).detach(), rtol=1e-4, atol=1e-5
    )


def test_the_copied_grouping_needs_numpy_alone(made, tmp_path):
    shutil.copy(made[1] / "grouping.py", tmp_path)
    code = (
        "import sys; sys.modules['torch'] = sys.modules['jepa3d'] = None\n"
        "import numpy as np, grouping\n"
        "print(*(part.shape for part in grouping.group(np.random.rand(300, 3), 128, 16, 8)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.split("\n")[0] == "(16, 8, 3) (16, 3)"


@pytest.mark.parametrize(
    ("cloud", "reason"),
    [
        (np.zeros((200, 2)), "N x 3"),
        (np.full((200, 3), np.nan), "NaN"),
        (np.ones((200, 3)), "are equal"),
        (np.random.default_rng(0).random((15, 3)), "15 points, at least 16"),
    ],
)
def test_grouping_refuses_what_the_encoder_refuses(cloud, reason):
    with pytest.raises(ValueError, match=reason):
        frame.group(cloud, 128, 16, 8)


@pytest.mark.slow
def test_a_classifier_gives_its_logits_and_names_its_classes(tmp_path):
    torch.manual_seed(0)
    network = trained(Classifier(SIZES | {"depth": 1}, ["cup", "Stuhl, groß", "car"]))
    network.save_pretrained(tmp_path / "run" / "model")
    module.export(str(tmp_path / "run"), tmp_path / "out")
    opened = session(tmp_path / "out" / "classifier.onnx")
    points = clouds(5, 300)
    with torch.no_grad():
        expected = network.predict(torch.from_numpy(points)).numpy()
    assert_allclose(opened.run(["logits"], {"points": points})[0], expected, rtol=1e-4, atol=1e-5)
    assert (
        json.loads(opened.get_modelmeta().custom_metadata_map["class_names"]) == network.class_names
    )
    assert Classifier.from_pretrained(tmp_path / "out").class_names == network.class_names


@pytest.mark.parametrize(("layer", "pooling"), [(-1, "mean_max"), (0, "mean"), (1, "max")])
def test_a_linear_classifier_s_graph_is_its_predict(layer, pooling):
    network = trained(LinearClassifier(SIZES, ["cup", "car"], layer, pooling))
    points = torch.from_numpy(clouds(3, 200))
    torch.testing.assert_close(
        module.ToClasses(network)(points)[0], network.predict(points), rtol=1e-5, atol=1e-5
    )


# --------------------------------------------------------------------------------------- the folder


def test_the_folder_is_a_model_of_the_hub(made):
    again = PointEncoder.from_pretrained(made[1])
    assert all(
        torch.equal(value, load(made[0]).state_dict()[name])
        for name, value in again.state_dict().items()
    )
    front = (made[1] / "README.md").read_text().split("---")[1]
    assert "license: apache-2.0" in front
    assert "library_name: jepa3d" in front


def test_the_code_of_the_card_runs(made, monkeypatch, tmp_path):
    blocks = (made[1] / "README.md").read_text().split("```python\n")[1:]
    script = tmp_path / "card.py"
    script.write_text(
        "".join(block.split("```")[0] for block in blocks) + "\nassert embedding.shape == (1, 64)\n"
    )
    monkeypatch.chdir(made[1])
    monkeypatch.syspath_prepend(str(made[1]))
    runpy.run_path(str(script))


def test_the_command_says_what_it_wrote(made, printed):
    names = ["encoder.onnx", "encoder.pt2", "patches.onnx", "written"]
    assert [line.split(":")[0] for line in printed] == names
    assert all("differs from torch by at most" in line for line in printed[:3])
    # Another test runs the card's code in this folder, which makes __pycache__.
    written = sorted(file.name for file in made[1].iterdir() if file.name != "__pycache__")
    assert written == printed[3].split(", ")[1:]


# --------------------------------------------------------------------------------------- what fails


def test_a_graph_that_differs_is_an_error_and_leaves_nothing(made, tmp_path, monkeypatch):
    program, run = torch.export.load(made[1] / "encoder.pt2"), module._open
    monkeypatch.setattr(module, "_program", lambda *_: program)
    monkeypatch.setattr(
        module,
        "_write_onnx",
        lambda _, graph, __, file: shutil.copy(made[1] / "encoder.onnx", file),
    )
    monkeypatch.setattr(
        module, "_open", lambda *given: lambda x: [y * 1.001 for y in run(*given)(x)]
    )
    with pytest.raises(
        ValueError, match=r"^encoder.onnx: embedding of 1 clouds differs from torch by"
    ):
        module.export(str(made[0]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said_and_leaves_nothing(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="exists already"):
        module.export(str(made[0]), made[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: neither an encoder"):
        module.export(str(tmp_path / "empty"), out)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="no/such model"):
        module.export("no/such model", out)
    Segmenter(SIZES, ["a"], ["p", "q"], [[0, 1]], [1, 2, 2]).save_pretrained(
        tmp_path / "run" / "model"
    )
    with pytest.raises(ValueError, match="a segmentation network"):
        module.export(str(tmp_path / "run"), out)
    shutil.copytree(made[0], tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="broken: the encoder cannot be read"):
        module.export(str(tmp_path / "broken"), out)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_program_that_disabled_log_messages_keeps_its_setting():
    logging.disable(logging.ERROR)
    try:
        with module._quiet():
            assert logging.root.manager.disable == logging.ERROR
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)


def test_without_onnx_the_error_names_the_extra(made, tmp_path):
    code = "import sys; sys.modules['onnxscript'] = None\nfrom jepa3d.cli import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", code, "export", str(made[0]), "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines() == [
        "jepa3d: error: export needs ONNX: pip install 'jepa3d[export]'"
    ]
