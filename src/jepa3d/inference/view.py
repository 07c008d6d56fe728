"""`jepa3d view`: a local page of clouds, coloured by what an encoder makes of them, beside their
nearest shapes.
"""

import functools
import html
import io
import re
import socket
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa3d.data.cloud import TO_Z_UP, ReadError
from jepa3d.data.errors import printable, shortened
from jepa3d.data.io import sampled
from jepa3d.inference.clouds import Item, item_at, listed, show_left_out
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.ready import fingerprint, load
from jepa3d.models.sampling import multi_block
from jepa3d.ops import three_nn_interpolate

try:
    import viser
    import websockets.asyncio.server as websocket_server
except ImportError as error:
    raise ValueError("the page of clouds needs viser: pip install 'jepa3d[view]'") from error

HOST = "127.0.0.1"
MAX_DRAWN = 200_000
MAX_LISTED = 300  # clouds in a list to choose from; of more, one is chosen by its number
NEIGHBOURS = 6
HEIGHT, OWN, PCA, SIMILARITY, SAMPLE = (
    "height",
    "file's own",
    "PCA of tokens",
    "similarity",
    "context and targets",
)
_VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])
_ROLE_NAMES = ("in neither", "context", "target 1", "target 2", "target 3", "target 4")
_ROLES = np.array(
    [[190] * 3, [31, 119, 180], [214, 39, 40], [255, 152, 0], [44, 160, 44], [200, 60, 200]],
    np.uint8,
)
# The page's own origin, also through a tunnel from another port; None: no browser. Any other is a
# foreign web page.
_ORIGINS = [re.compile(r"http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"), None]


@dataclass(frozen=True)
class View:
    """A cloud as drawn and as encoded, both z-up in the unit sphere of the points that the encoder
    sees.
    """

    name: str
    total: int  # points in the file; of a mesh, those sampled
    points: np.ndarray  # N 3 float32, at most MAX_DRAWN
    colors: np.ndarray | None  # N 3 uint8, the file's
    tokens: Tensor  # M C, of the last layer
    centers: Tensor  # M 3
    weights: Tensor  # N M: tokens to features at the points, each of its three nearest centres
    vector: np.ndarray  # E, as `jepa3d embed` makes it


@torch.inference_mode()
def view_of(
    encoder: PointEncoder,
    item: Item,
    up_axis: str = "z",
    layer: int = -1,
    pooling: str = "mean_max",
) -> View:
    """The points and the vector are those of `prepare` and `embed`.

    Raises ReadError and OSError.
    """
    cloud = sampled(item.read(), encoder.num_points)
    turned = cloud.points if item.z_up else cloud.points @ cloud.to_z_up(up_axis).T
    try:
        seen = encoder.frame(turned)
    except ValueError as error:
        raise ReadError(f"{item.path}: {error}") from error
    states, centers = encoder.states(torch.from_numpy(seen.points)[None])
    drawn = np.sort(np.random.default_rng(0).permutation(len(cloud))[:MAX_DRAWN])
    points, colors = (
        seen.place(turned[drawn]),
        None if cloud.colors is None else cloud.colors[drawn],
    )
    weights = three_nn_interpolate(
        torch.from_numpy(points)[None], centers, torch.eye(centers.shape[1])[None]
    )[0]
    vector = encoder.pool(states[layer], layer, pooling)[0].numpy()
    return View(
        item.path,
        cloud.total or len(cloud),
        points,
        colors,
        states[-1][0],
        centers[0],
        weights,
        vector,
    )


def nearest_to_ray(points: np.ndarray, origin, direction, reach: float = 0.05) -> int | None:
    """Which of points N 3 is meant by a ray: of the foremost layer within `reach` of it, the
    nearest to the ray.

    The layer is `reach` deep. None where the ray passes all points by, or they lie behind its
    origin.
    """
    direction = np.asarray(direction, float) / np.linalg.norm(direction)
    offset = points - np.asarray(origin, float)
    depth = offset @ direction
    aside = np.linalg.norm(offset - depth[:, None] * direction, axis=1)
    hit = np.flatnonzero((depth > 0) & (aside <= reach))
    if not len(hit):
        return None
    front = hit[depth[hit] <= depth[hit].min() + reach]
    return int(front[aside[front].argmin()])


def pca_colors(view: View) -> tuple[np.ndarray, float]:
    """Colours N 3 uint8 of the first three principal components of the tokens, and their share of
    the variance.
    """
    centred = (view.tokens - view.tokens.mean(0)).double()
    _, strength, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = (
        axes[:3] * axes[:3].gather(1, axes[:3].abs().argmax(1, keepdim=True)).sign()
    )  # signs are arbitrary: fix them
    values = centred @ axes.T
    low, extent = values.amin(0), values.amax(0) - values.amin(0)
    rgb = torch.where(extent > 1e-9, (values - low) / extent.clamp_min(1e-9), 0.5)
    share = strength[:3].square().sum() / strength.square().sum().clamp_min(1e-30)
    return (view.weights.double() @ rgb).mul(255).round().clamp(0, 255).byte().numpy(), float(share)


def similarity(view: View, point: int) -> np.ndarray:
    """Cosines N of the features at all points with those at one."""
    products = (
        view.tokens @ view.tokens.T
    )  # of features by those of tokens: N C would not fit for many points
    dot = view.weights @ (products @ view.weights[point])
    square = ((view.weights @ products) * view.weights).sum(1).clamp_min(1e-30)
    return (dot / (square * square[point]).sqrt()).clamp(-1, 1).numpy()


def sample_roles(view: View, generator: torch.Generator) -> np.ndarray:
    """Of each point (N) what its nearest token is in one draw of the paper's sampler: 0 unused, 1
    context, 2.. targets.

    Targets may overlap; the later one is given. Raises ValueError for too few tokens.
    """
    sample = multi_block(view.centers[None], generator, num_targets=len(_ROLES) - 2)
    role = torch.zeros(len(view.centers), dtype=torch.long)
    role[sample.context[0][sample.mask[0]]] = 1
    for i, target in enumerate(sample.target[0]):
        role[target] = 2 + i
    return role[view.weights.argmax(1)].numpy()


def ramp(values: np.ndarray) -> np.ndarray:
    """Colours n 3 uint8 (viridis) of values n, from their least to their greatest."""
    at = (values - values.min()) / max(float(np.ptp(values)), 1e-9) * (len(_VIRIDIS) - 1)
    channels = [np.interp(at, range(len(_VIRIDIS)), channel) for channel in _VIRIDIS.T]
    return np.stack(channels, 1).round().astype(np.uint8)


def serve(port: int) -> viser.ViserServer:
    """A page on this machine only, for no other web page.

    Port 0: any. Raises ValueError where it is not to be had.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port}: 1 to 65535, or 0 for any that is free")
    try:
        with socket.socket() as probe:  # viser would silently take another
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    except OSError as error:
        raise ValueError(
            f"--port {port}: not to be had ({error.strerror}); choose another, or 0 for any"
        ) from error
    library: Any = websocket_server
    original = library.serve
    # viser has no setting for it, and answers every web page that the browser has open
    library.serve = functools.partial(original, origins=_ORIGINS)
    try:
        with redirect_stdout(io.StringIO()):
            server = viser.ViserServer(host=HOST, port=port, label="jepa3d view", verbose=False)
    finally:
        library.serve = original
    server.gui.configure_theme(show_logo=False, show_share_button=False)
    server.scene.set_up_direction("+z")
    server.initial_camera.position, server.initial_camera.look_at = (
        (0.5, -2.8, 0.9),
        (0.0, 0.0, -0.35),
    )
    return server


def stop(server: viser.ViserServer) -> None:
    with redirect_stdout(io.StringIO()):
        server.stop()


class Page:
    """What `server` shows of `items`; all tabs that are open share it."""

    def __init__(
        self,
        server: viser.ViserServer,
        items: list[Item],
        look: Callable[[Item], View],
        index: Path | None,
    ):
        self.server, self.items, self.look, self.index = server, items, look, index
        self.rows = {item.path: row for row, item in enumerate(items)}
        self.row, self.hits = -1, []
        self.view: View | None = None
        self.picked: int | None = None
        self.generator = torch.Generator().manual_seed(0)
        self.lock = (
            threading.RLock()
        )  # viser calls back from many threads, and from the same when a value is set
        gui, count = server.gui, len(items)
        names = [
            f"{row + 1}:  {shortened(Path(item.path).name, 24)}" for row, item in enumerate(items)
        ]
        listed = count <= MAX_LISTED
        self.choices: Any = names if listed else range(1, count + 1)
        self.text = gui.add_html("")
        self.chooser: Any = (
            gui.add_dropdown("Cloud", names)
            if listed
            else gui.add_number("Cloud", 1, min=1, max=count)
        )
        self.chooser.visible = count > 1
        step = gui.add_button_group("", ("previous", "next"), visible=count > 1)
        self.colours: Any = gui.add_dropdown("Colours", (HEIGHT, PCA, SIMILARITY, SAMPLE))
        self.again = gui.add_button("sample again", visible=False)
        self.chooser.on_update(
            self.callback(lambda event: self.go(self.choices.index(event.target.value)))
        )
        step.on_click(
            self.callback(lambda _: self.go(self.row + (1 if step.value == "next" else -1)))
        )
        self.colours.on_update(self.callback(lambda _: self.recolour()))
        self.again.on_click(self.callback(lambda _: self.recolour()))
        server.scene.on_click()(
            self.callback(lambda event: self.pick(event.ray_origin, event.ray_direction))
        )
        with gui.add_folder("Nearest shapes", visible=index is not None):
            self.buttons = [gui.add_button("", visible=False) for _ in range(NEIGHBOURS)]
        for at, button in enumerate(self.buttons):
            button.on_click(self.callback(lambda _, at=at: self.show(_item(self.hits[at]))))

    def callback(self, action: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(event: Any) -> None:
            with self.lock:
                try:
                    action(event)
                except (ValueError, OSError) as error:  # ReadError among them
                    self._say(f"<b>not shown</b>: {html.escape(printable(str(error)))}")

        return call

    def _say(self, text: str) -> None:
        self.text.content = (
            f"<div style='padding: 0 1em; font-size: 0.85em; overflow-wrap: anywhere'>{text}</div>"
        )

    def go(self, row: int) -> None:
        row %= len(self.items)
        if row != self.row:
            self.show(self.items[row])

    def show(self, item: Item) -> None:
        """Encode and draw a cloud and its neighbours.

        Raises ReadError and OSError; what is shown then stays.
        """
        self.row = self.rows.get(item.path, -1)  # before the chooser is set, which calls `go`
        if self.row >= 0:
            self.chooser.value = self.choices[self.row]
        self.view, self.picked = self.look(item), None
        points = self.view.points
        self.title = " ".join(
            html.escape(printable(part)) for part in (Path(item.path).name, item.label) if part
        )
        self.cloud = self._draw(
            "/cloud", points, float(np.clip(1.2 / np.sqrt(len(points)), 0.004, 0.02))
        )
        self.colours.options = (
            HEIGHT,
            *([] if self.view.colors is None else [OWN]),
            PCA,
            SIMILARITY,
            SAMPLE,
        )
        self.recolour()
        if self.index is not None:
            self._show_neighbours(self.index, self.view)

    def _draw(
        self, name: str, points: np.ndarray, size: float, position=(0.0, 0.0, 0.0)
    ) -> viser.PointCloudHandle:
        return self.server.scene.add_point_cloud(
            name,
            points,
            ramp(points[:, 2]),
            point_size=size,
            point_shape="circle",
            point_shading="flat",
            precision="float32",
            position=position,
        )

    def pick(self, origin, direction) -> None:
        """Colour by similarity to the point that a ray means, if it means one."""
        point = None if self.view is None else nearest_to_ray(self.view.points, origin, direction)
        if point is not None:
            self.picked = point
            self.colours.value = SIMILARITY  # recolours if it was another
            self.recolour()

    def recolour(self) -> None:
        """Colour the cloud as chosen, and say what the colours mean.

        Raises ValueError for too few tokens to sample.
        """
        view, by = self.view, self.colours.value
        if view is None:
            return
        picked = self.picked if by == SIMILARITY else None
        self.again.visible = by == SAMPLE
        at = np.zeros(3) if picked is None else view.points[picked]
        self.server.scene.add_icosphere(
            "/picked", 0.03, (255, 0, 0), position=at, visible=picked is not None
        )
        colors, said = ramp(view.points[:, 2]), "low is dark, high is bright"
        if by == OWN and view.colors is not None:
            colors, said = view.colors, "as in the file"
        elif by == PCA:
            colors, share = pca_colors(view)
            said = f"red, green, blue: first principal components of {len(view.tokens)} tokens, {share:.0%} of variance"
        elif picked is not None:
            cosine = similarity(view, picked)
            colors = ramp(cosine)
            said = f"cosine with point {picked:,}: {cosine.min():.3f} (dark) to {cosine.max():.3f} (bright)"
        elif by == SIMILARITY:
            colors, said = _ROLES[np.zeros(len(view.points), int)], "click a point of the cloud"
        elif by == SAMPLE:
            colors = _ROLES[sample_roles(view, self.generator)]
            said = (
                "one pretraining sample, by each point's nearest token; of overlapping targets the last:<br>"
                + " ".join(
                    f"<span style='white-space: nowrap; color: rgb{tuple(rgb.tolist())}'>&#9632; {name}</span>"
                    for name, rgb in zip(_ROLE_NAMES, _ROLES, strict=True)
                )
            )
        self.cloud.colors = colors
        drawn = f", {len(view.points):,} drawn" if len(view.points) < view.total else ""
        self._say(f"<b>{self.title}</b>: {view.total:,} points{drawn}<br>{said}")

    def _show_neighbours(self, index: Path, view: View) -> None:
        """The nearest shapes of the index but itself: a button each that shows it, and small clouds
        in a row below.
        """
        from jepa3d.inference.search import search

        (self.hits,), scene = (
            search(index, view.vector, NEIGHBOURS, but=[view.name]),
            self.server.scene,
        )
        for at, button in enumerate(self.buttons):
            scene.remove_by_name(name := f"/neighbours/{at}")
            button.visible = at < len(self.hits)
            if not button.visible:
                continue
            hit, x = self.hits[at], 0.62 * (at - (len(self.hits) - 1) / 2)
            button.label = f"{at + 1}:  {hit.cosine:.4f}  {shortened(Path(hit.path).name, 24)}"
            try:
                points = self.look(_item(hit)).points
                self._draw(name, 0.28 * points[:: -(-len(points) // 2048)], 0.012, (x, 0.0, -1.5))
                title = f"{at + 1}:  {hit.cosine:.3f}\n{shortened(Path(hit.path).name, 12)}"
                scene.add_label(
                    f"{name}/title", title, position=(0.0, 0.0, -0.33), anchor="top-center"
                )
            except (ReadError, OSError) as error:
                button.label += f"  not drawn: {error}"


def _item(hit: Any) -> Item:
    """A neighbour. Raises ReadError where it is gone."""
    return item_at(hit.path, hit.label)


def open_page(
    paths: list[Path], model: str | None, index: Path | None, port: int, up_axis: str
) -> Page:
    """The page, served and showing the first cloud. Raises ValueError, ReadError and OSError."""
    if up_axis not in TO_Z_UP:
        raise ValueError(f"--up-axis {up_axis}: one of {', '.join(TO_Z_UP)}")
    layer, pooling, keep_strays = -1, "mean_max", False
    if index is not None:
        from jepa3d.inference.search import making_of

        making = making_of(index)
        if making.up_axis != up_axis:
            raise ValueError(f"{index}: made with --up-axis {making.up_axis}, not {up_axis}")
        making.check_frame(str(index))
        model, layer, pooling, keep_strays = (
            model or making.model,
            making.layer,
            making.pooling,
            making.keep_strays,
        )
        if fingerprint(load(model)) != making.fingerprint:
            raise ValueError(
                f"{index}: made with another encoder than {model}; embed again, or --model"
            )
    found = [listed(path) for path in paths]
    items = list({item.path: item for some, _ in found for item in some}.values())
    show_left_out([one for _, skipped in found for one in skipped])
    if not items:
        raise ReadError(f"{paths[0]}: no clouds there")
    encoder = load(model or "default")
    encoder.keep_strays = keep_strays
    look = functools.partial(view_of, encoder, up_axis=up_axis, layer=layer, pooling=pooling)
    server = serve(port)
    try:
        page = Page(server, items, look, index)
        with page.lock:
            (page.go if len(items) == 1 else page.callback(page.go))(
                0
            )  # of many, others may be readable
    except BaseException:
        stop(server)
        raise
    return page


def view(paths: list[Path], model: str | None, index: Path | None, port: int, up_axis: str) -> None:
    """Serve the page until Ctrl-C. Raises what `open_page` raises."""
    server = open_page(paths, model, index, port, up_axis).server
    at = server.get_port()
    print(
        f"http://{HOST}:{at}  (Ctrl-C stops it)\nfrom another machine, first: ssh -L {at}:{HOST}:{at} HOST",
        flush=True,
    )
    try:
        server.sleep_forever()
    finally:
        stop(server)
