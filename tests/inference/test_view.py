"""The page of `jepa3d view`: in a real browser, who can read it, and what its colours and clicks
mean.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from urllib.request import urlopen

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import viser
import websockets.asyncio.server
from browser import Browser
from processes import Command
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from jepa3d.cli import main
from jepa3d.data.cloud import ReadError
from jepa3d.figures import ramp
from jepa3d.inference import point_colors, view
from jepa3d.inference.clouds import Item, find_clouds
from jepa3d.inference.embed_files import embed_files
from jepa3d.inference.embedding import embed
from jepa3d.inference.point_colors import (
    nearest_to_ray,
    pca_colors,
    sample_roles,
    similarity,
    view_of,
)
from jepa3d.inference.view import open_page
from jepa3d.models.encoder import PointEncoder
from jepa3d.ops import squared_distance, three_nn_interpolate

SIZES = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_groups": 32,
    "group_size": 8,
    "num_points": 256,
}


def ball(count: int, seed: int) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(count, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True) * [1, 1, 0.5 + 0.1 * seed] + [
        5,
        6,
        7,
    ]


def write_ply(path: Path, points: np.ndarray, colors: np.ndarray) -> None:
    kinds = [
        *(f"float {axis}" for axis in "xyz"),
        *(f"uchar {name}" for name in ("red", "green", "blue")),
    ]
    header = [
        "ply",
        "format ascii 1.0",
        f"element vertex {len(points)}",
        *(f"property {kind}" for kind in kinds),
    ]
    rows = [f"{x} {y} {z} {r} {g} {b}" for (x, y, z), (r, g, b) in zip(points, colors, strict=True)]
    path.write_text("\n".join([*header, "end_header", *rows, ""]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Save an encoder as `model`, and four files in `clouds`: a cloud of few points with <i> in its
    name, a cloud of many points, a mesh, and a cloud with colours. Returns the folder.
    """
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("view")
    PointEncoder(**SIZES).eval().save_pretrained(made / "model")
    clouds = made / "clouds"
    clouds.mkdir()
    np.save(clouds / "a<i>few.npy", ball(100, 0))
    np.save(clouds / "b_many.npy", ball(3000, 1))
    (clouds / "c_mesh.off").write_text(
        "OFF\n4 4 0\n0 0 0\n1 0 0\n0 1 0\n0 0 2\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"
    )
    write_ply(clouds / "d_colours.ply", ball(500, 2), np.tile([255, 128, 0], (500, 1)))
    return made


@pytest.fixture(scope="module")
def encoder(folder) -> PointEncoder:
    return PointEncoder.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def items(folder) -> dict[str, Item]:
    return {Path(item.path).name[0]: item for item in find_clouds(folder / "clouds")[0]}


@pytest.fixture(scope="module")
def index(folder) -> Path:
    embed_files([folder / "clouds"], folder / "v.parquet", str(folder / "model"), workers=1)
    return folder / "v.parquet"


@pytest.fixture
def opened(folder):
    """Return a function that opens a page and takes the arguments of `open_page` that differ from
    the defaults below. Pages are closed after the test.
    """
    pages = []

    def make(paths=None, model=str(folder / "model"), index=None, port=0, up_axis="z") -> view.Page:
        pages.append(open_page(paths or [folder / "clouds"], model, index, port, up_axis))
        return pages[-1]

    yield make
    for page in pages:
        view.stop(page.server)


# ----------------------------------------------------------------------------------- without a page


@pytest.mark.parametrize("name", "abcd")
@pytest.mark.parametrize("up_axis", ["y", "z"])
def test_a_view_has_the_vector_of_embed_and_tokens_where_its_points_are(
    folder, encoder, items, name, up_axis
):
    seen = view_of(encoder, items[name], up_axis)
    (vector,) = embed(items[name].path, encoder, up_axis)
    assert np.allclose(seen.vector, vector, atol=1e-5)
    assert len(seen.points) == seen.total == {"a": 100, "b": 3000, "c": 2048, "d": 500}[name]
    # Centres are points of the cloud. Only those of `a` may be moved copies, which are not drawn.
    away = squared_distance(seen.centers, torch.from_numpy(seen.points)).amin(1).sqrt()
    assert away.max() < (0.3 if name == "a" else 1e-5)
    assert (seen.colors is None) == (name != "d")


def test_the_third_axis_points_up(encoder, items):
    seen, lying = view_of(encoder, items["b"]).points, view_of(encoder, items["b"], "y").points
    assert np.ptp(seen, axis=0).argmin() == 2
    assert np.ptp(lying, axis=0).argmin() == 1  # the file is flat along z; now its y is up


def test_no_more_points_are_drawn_than_a_browser_bears(encoder, items, monkeypatch):
    whole = view_of(encoder, items["b"])
    monkeypatch.setattr(point_colors, "MAX_DRAWN", 700)
    some = view_of(encoder, items["b"])
    assert (len(some.points), some.total, some.weights.shape) == (700, 3000, (700, 32))
    assert {tuple(row) for row in some.points} < {tuple(row) for row in whole.points}
    assert np.array_equal(some.vector, whole.vector)


def test_a_cloud_of_too_few_points_is_named(encoder, tmp_path):
    np.save(tmp_path / "three.npy", np.eye(3))
    with pytest.raises(ReadError, match=r"three\.npy: 3 points, at least 32 are needed"):
        view_of(encoder, find_clouds(tmp_path / "three.npy")[0][0])


def test_similarity_is_the_cosine_of_interpolated_tokens(encoder, items):
    seen = view_of(encoder, items["b"])
    features = three_nn_interpolate(
        torch.from_numpy(seen.points)[None], seen.centers[None], seen.tokens[None]
    )[0]
    expected = torch.nn.functional.cosine_similarity(features, features[17:18])
    found = similarity(seen, 17)
    assert np.allclose(found, expected, atol=1e-4)
    assert found.argmax() == 17 or found[17] > 0.9999
    assert found.min() < 0.99


def test_pca_colors_are_those_of_principal_components(encoder, items):
    seen = view_of(encoder, items["b"])
    colors, share = pca_colors(seen)
    assert (colors.shape, colors.dtype) == ((3000, 3), np.uint8)
    values = (seen.tokens.double() - seen.tokens.double().mean(0)).numpy()
    variance, axes = np.linalg.eigh(values.T @ values)
    assert share == pytest.approx(variance[-3:].sum() / variance.sum())
    for channel in range(3):  # equal up to sign, scale and rounding to bytes
        component = seen.weights.numpy() @ (values @ axes[:, -1 - channel])
        assert abs(np.corrcoef(component, colors[:, channel])[0, 1]) > 0.999


def test_context_and_targets_of_a_sample(encoder, items):
    seen = view_of(encoder, items["b"])
    first = sample_roles(seen, torch.Generator().manual_seed(0))
    assert set(first) >= {1, 2, 5}  # 1 is context; 5 is the last target, drawn over the others
    assert set(first) <= set(range(6))
    generator = torch.Generator().manual_seed(0)
    assert np.array_equal(first, sample_roles(seen, generator))
    assert not np.array_equal(first, sample_roles(seen, generator))
    token = squared_distance(torch.from_numpy(seen.points), seen.centers).argmin(1).numpy()
    assert all(len(set(first[token == one])) == 1 for one in set(token))


def test_ramp_runs_from_dark_to_bright():
    colors = ramp(np.array([3.0, 1.0, 2.0, 1.0]))
    assert colors[1].tolist() == colors[3].tolist() == [68, 1, 84]
    assert colors[0].tolist() == [253, 231, 37]
    assert len(set(map(tuple, ramp(np.ones(5))))) == 1


def test_a_ray_means_the_foremost_layer_and_in_it_the_nearest_point():
    front, beside, back, behind = [0, 0, 1], [0.03, 0, 1.04], [0, 0, -1], [0, 0, 9]
    points = np.array([back, beside, front, behind], np.float32)
    assert nearest_to_ray(points, (0, 0, 5), (0, 0, -3)) == 2
    assert nearest_to_ray(points, (0, 0, -5), (0, 0, 1)) == 0
    assert nearest_to_ray(points, (0.03, 0, 5), (0, 0, -1)) == 1
    assert nearest_to_ray(points, (0.2, 0, 5), (0, 0, -1)) is None
    assert nearest_to_ray(points[:3], (0, 0, 5), (0, 0, 1)) is None


# ---------------------------------------------------------------------------------- who may read it


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "https://localhost",
        "http://localhost.evil.example",
        "http://127.0.0.1:80@evil",
        "null",
    ],
)
def test_other_web_pages_are_refused(opened, origin):
    with pytest.raises(InvalidStatus) as refused, _socket(opened(), origin):
        pass
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize("origin", ["http://localhost:9999", "http://127.0.0.1:8080", None])
def test_its_own_page_is_let_in_also_through_a_tunnel(opened, origin):
    with _socket(opened(), origin) as mine:
        assert len(mine.recv(timeout=10)) > 0


def _socket(page: view.Page, origin: str | None):
    address, protocol = f"ws://127.0.0.1:{page.server.get_port()}/", f"viser-v{viser.__version__}"
    return connect(address, origin=origin, subprotocols=[protocol])


def test_other_servers_in_this_process_are_as_they_were(opened):
    before = websockets.asyncio.server.serve
    opened()
    assert websockets.asyncio.server.serve is before


def test_only_this_machine_can_connect(opened):
    port = opened().server.get_port()
    assert urlopen(f"http://127.0.0.1:{port}", timeout=10).status == 200
    with pytest.raises(OSError):  # noqa: PT011  (a server on all addresses would answer on this one too)
        socket.create_connection(("127.0.0.2", port), 5)


# ----------------------------------------------------------------------------------------- mistakes


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["view", *map(str, arguments)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_taken_port_is_said_and_no_other_taken(folder, capsys):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        error = fails(capsys, folder / "clouds", "--model", folder / "model", "--port", port)
    assert f"--port {port}: not available (Address already in use)" in error
    assert "--port 70000: must be 1 to 65535" in fails(
        capsys, folder / "clouds", "--model", folder / "model", "--port", 70000
    )


def test_mistakes_are_one_line(folder, index, capsys, tmp_path):
    clouds, model = folder / "clouds", ("--model", folder / "model", "--port", 0)
    assert "missing.ply: no such file" in fails(capsys, tmp_path / "missing.ply", *model)
    (tmp_path / "bad.npy").write_bytes(b"no array")
    assert "bad.npy" in fails(capsys, tmp_path / "bad.npy", *model)
    assert "--up-axis w is unknown: use x, y, z" in fails(capsys, clouds, *model, "--up-axis", "w")
    assert "made with up axis z, not y" in fails(
        capsys, clouds, *model, "--up-axis", "y", "--index", index
    )
    torch.manual_seed(1)
    PointEncoder(**SIZES).eval().save_pretrained(tmp_path / "other")
    assert "another encoder" in fails(
        capsys, clouds, "--model", tmp_path / "other", "--port", 0, "--index", index
    )


# ----------------------------------------------------------------------------------------- the page


def test_neighbours_are_of_the_cloud_but_itself_and_open(opened, index, items):
    page = opened(model=None, index=index)  # the index names its encoder
    assert page.view.name == items["a"].path
    assert sorted(hit.path for hit in page.hits) == sorted(items[name].path for name in "bcd")
    assert [button.visible for button in page.buttons] == [True] * 3 + [False] * 3
    nearest, cosine = page.hits[0].path, page.hits[0].cosine
    assert page.buttons[0].label == f"1:  {cosine:.4f}  {Path(nearest).name}"
    page.callback(lambda _: page.show(page._neighbour(0)))(None)
    assert page.view.name == nearest
    assert nearest not in {hit.path for hit in page.hits}
    assert page.chooser.value.endswith(Path(nearest).name)


def test_a_damaged_cloud_among_others_is_said_and_the_next_shown(opened, folder, tmp_path):
    (tmp_path / "a_bad<b>.off").write_bytes(b"no mesh")
    shutil.copy(folder / "clouds" / "b_many.npy", tmp_path)
    page = opened([tmp_path / "a_bad<b>.off", tmp_path / "b_many.npy"])
    assert "not shown" in page.text.content
    assert "a_bad&lt;b&gt;.off" in page.text.content
    page.go(1)
    assert "<b>b_many.npy" in page.text.content
    page.pick((5, 5, 5), (1, 0, 0))  # a click beside the cloud
    assert page.picked is None


def test_of_many_clouds_one_is_chosen_by_its_number(opened, monkeypatch, items):
    monkeypatch.setattr(view, "MAX_LISTED", 3)
    page = opened()
    page.chooser.value = 4
    assert page.view.name == items["d"].path
    page.go(page.row + 1)
    assert (page.chooser.value, page.view.name) == (1, items["a"].path)


def test_the_files_colours_are_offered_where_it_has_some(opened, items):
    page = opened()
    assert view.OWN not in page.colours.options
    page.show(items["d"])
    page.colours.value = view.OWN
    assert (page.cloud.colors == [255, 128, 0]).all()
    page.show(items["b"])  # this file has no colours: coloured by height again
    assert page.colours.value == view.HEIGHT
    assert len(np.unique(page.cloud.colors, axis=0)) > 50


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_command_says_its_address_and_ends_by_ctrl_c(folder, tmp_path):
    words = ("view", folder / "clouds" / "b_many.npy", "--model", folder / "model", "--port", 0)
    command = Command(*words, log=tmp_path / "log")
    command.wait_for("HOST\n")
    lines = command.printed().splitlines()
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)  \(Ctrl-C stops it\)", lines[0])
    assert found, lines
    tunnel = f"ssh -L {found[1]}:127.0.0.1:{found[1]} HOST"
    assert lines[1] == f"from another machine, run: {tunnel}"
    assert urlopen(f"http://127.0.0.1:{found[1]}", timeout=10).status == 200
    os.kill(command.process.pid, signal.SIGINT)
    assert (command.end(), len(command.printed().splitlines())) == (130, 2)
    error = command.printed("err")
    assert error.startswith("jepa3d: ")
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_in_a_browser(opened, index, items):
    page = opened(index=index)
    with Browser(f"http://127.0.0.1:{page.server.get_port()}", 900, 500) as browser:
        browser.wait("document.querySelector('canvas') !== null")
        browser.wait_text("a<i>few.npy")  # a name is text, not HTML
        browser.screenshot()  # waits until the panel stops moving
        assert "Share" not in browser.text()
        browser.press("next")
        browser.wait_text("3,000 points")
        browser.choose(view.HEIGHT, view.PCA)
        browser.wait_text("components of 32 tokens")
        picture = imageio.imread(io.BytesIO(browser.screenshot()))[:, :560, :3].reshape(-1, 3)
        assert len(np.unique(picture, axis=0)) > 200
        assert (
            picture.min(1) < 200
        ).mean() > 0.02  # share of the canvas that coloured points cover
        browser.click(450, 200)
        browser.wait_text("cosine with point")
        # The chosen point is on the side that the camera sees.
        assert page.view.points[page.picked][1] < 0.1
        browser.choose(view.SIMILARITY, view.SAMPLE)
        browser.wait_text("target 4")
        before, name = page.cloud.colors.copy(), Path(page.hits[0].path).name
        browser.press("sample again")
        end = time.monotonic() + 30
        while np.array_equal(before, page.cloud.colors):
            assert time.monotonic() < end
            time.sleep(0.05)
        browser.press(name)
        browser.wait(f"document.querySelector('b').innerText.startsWith({json.dumps(name)})")
        assert page.view.name == items[name[0]].path
        # The other cloud is coloured by a sample too.
        assert browser.text().count("target 4") == 1
