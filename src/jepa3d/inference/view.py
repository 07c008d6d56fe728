"""`jepa3d view`: serve a local web page that shows clouds in colours computed from the encoder's
tokens, and the nearest shapes of each cloud.
"""

import functools
import html
import io
import re
import socket
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jepa3d.data.cloud import TO_Z_UP, ReadError
from jepa3d.data.errors import printable, shortened
from jepa3d.figures import ramp
from jepa3d.inference import point_colors
from jepa3d.inference.clouds import Item, find_clouds, item_at, log_left_out
from jepa3d.inference.point_colors import ROLE_COLORS, ROLES, View, view_of
from jepa3d.models.ready import load
from jepa3d.plain import log

try:
    import viser
    import websockets.asyncio.server as websocket_server
except ImportError as error:
    raise ValueError("view needs viser: pip install 'jepa3d[view]'") from error

HOST = "127.0.0.1"
# Up to this many clouds are offered in a list of names. If there are more, the user enters the
# number of a cloud.
MAX_LISTED = 300
NEIGHBOURS = 6  # number of nearest shapes that are shown
# choices for the colours of a cloud
HEIGHT, OWN, PCA = "height", "file's own", "PCA of tokens"
SIMILARITY, SAMPLE = "similarity", "context and targets"
# Origins that may connect. As the origin, a browser sends the address of the web page that opens
# the connection. Pages from localhost are allowed, and the page of this server is one of them. The
# port may be any, since an ssh tunnel may change it. A missing origin (None) is allowed too, since
# programs other than browsers send none.
_ORIGINS = [re.compile(r"http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"), None]


def serve(port: int) -> viser.ViserServer:
    """Start a server that answers only requests from this machine. The server refuses connections
    that web pages from other hosts open in the user's browser.

    port: 0 for any free port. Raises ValueError if the port is invalid or not available.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port}: must be 1 to 65535, or 0 for any free port")
    try:
        with socket.socket() as probe:  # viser would silently choose another port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    except OSError as error:
        raise ValueError(f"--port {port}: not available ({error.strerror})") from error
    library: Any = websocket_server
    original = library.serve
    # viser has no setting for origins; without this change, any web page in the browser could
    # connect
    library.serve = functools.partial(original, origins=_ORIGINS)
    try:
        with redirect_stdout(io.StringIO()):
            server = viser.ViserServer(HOST, port, label="jepa3d view", verbose=False)
    finally:
        library.serve = original
    server.gui.configure_theme(show_logo=False, show_share_button=False)
    server.scene.set_up_direction("+z")
    server.initial_camera.position = (0.5, -2.8, 0.9)
    server.initial_camera.look_at = (0.0, 0.0, -0.35)
    return server


def stop(server: viser.ViserServer) -> None:
    """Stop a server, without viser's message."""
    with redirect_stdout(io.StringIO()):
        server.stop()


class Page:
    """The content of the page, which shows the clouds of `items` one at a time. All open tabs show
    the same cloud.

    look: the function that reads and encodes a cloud. index: path of the vectors that are searched
    for the nearest shapes; if None, no nearest shapes are shown.
    """

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
        # Viser runs the callbacks below in many threads. The lock is reentrant, since setting the
        # value of a control also runs its callback.
        self.lock = threading.RLock()
        gui, count = server.gui, len(items)
        files = [shortened(Path(item.path).name, 24) for item in items]
        names = [f"{i}:  {name}" for i, name in enumerate(files, 1)]
        listed = count <= MAX_LISTED
        self.choices: Any = names if listed else range(1, count + 1)
        self.text = gui.add_html("")
        self.chooser: Any = gui.add_dropdown("Cloud", names) if listed else None
        self.chooser = self.chooser or gui.add_number("Cloud", 1, min=1, max=count)
        self.chooser.visible = count > 1
        step = gui.add_button_group("", ("previous", "next"), visible=count > 1)
        ways = (HEIGHT, PCA, SIMILARITY, SAMPLE)
        self.colours: Any = gui.add_dropdown("Colours", ways)
        self.again = gui.add_button("sample again", visible=False)
        with gui.add_folder("Nearest shapes", visible=index is not None):
            rows = range(NEIGHBOURS)
            self.buttons = [gui.add_button("", visible=False) for _ in rows]
        on = self.callback
        find, steps = self.choices.index, {"next": 1, "previous": -1}
        self.chooser.on_update(on(lambda event: self.go(find(event.target.value))))
        step.on_click(on(lambda _: self.go(max(self.row + steps[step.value], -1))))
        self.colours.on_update(on(lambda _: self.recolour()))
        self.again.on_click(on(lambda _: self.recolour()))
        click = on(lambda event: self.pick(event.ray_origin, event.ray_direction))
        server.scene.on_click()(click)
        for i, button in enumerate(self.buttons):
            button.on_click(on(lambda _, i=i: self.show(self._neighbour(i))))

    def callback(self, action: Callable[[Any], None]) -> Callable[[Any], None]:
        """Wrap an action so that it holds the lock and shows errors on the page."""

        def call(event: Any) -> None:
            with self.lock:
                try:
                    action(event)
                except (ValueError, OSError) as error:  # ReadError among them
                    self._say(f"<b>not shown</b>: {html.escape(printable(str(error)))}")

        return call

    def _say(self, text: str) -> None:
        style = "padding: 0 1em; font-size: 0.85em; overflow-wrap: anywhere"
        self.text.content = f"<div style='{style}'>{text}</div>"

    def go(self, row: int) -> None:
        """Show cloud number `row` of the items (from 0), unless it is shown already. The number
        after the last cloud means the first cloud, and -1 means the last.
        """
        row %= len(self.items)
        if row != self.row:
            self.show(self.items[row])

    def show(self, item: Item) -> None:
        """Encode and draw a cloud and its neighbours.

        Raises ReadError or OSError if the cloud cannot be read; the previous cloud then stays
        visible.
        """
        # The row is set before the chooser: a change of the chooser calls `go`, which does nothing
        # if the row is set already.
        self.row = self.rows.get(item.path, -1)
        if self.row >= 0:
            self.chooser.value = self.choices[self.row]
        self.view, self.picked = self.look(item), None
        points, colors = self.view.points, self.view.colors
        name = f"{Path(item.path).name} {item.label or ''}".strip()
        self.title = html.escape(printable(name))
        size = float(np.clip(1.2 / np.sqrt(len(points)), 0.004, 0.02))
        self.cloud = self._draw("/cloud", points, size)
        own = () if colors is None else (OWN,)
        self.colours.options = (HEIGHT, *own, PCA, SIMILARITY, SAMPLE)
        self.recolour()
        if self.index is not None:
            self._show_neighbours(self.index, self.view)

    def _draw(
        self, name: str, points: np.ndarray, size: float, position=(0.0, 0.0, 0.0)
    ) -> viser.PointCloudHandle:
        look: Any = {"point_shape": "circle", "point_shading": "flat"}
        look |= {"point_size": size, "precision": "float32", "position": position}
        colors, scene = ramp(points[:, 2]), self.server.scene
        return scene.add_point_cloud(name, points, colors, **look)

    def pick(self, origin, direction) -> None:
        """Colour the cloud by similarity to the clicked point, if the click hit a point.

        origin, direction: the ray from the viewer through the clicked pixel.
        """
        points = np.empty((0, 3)) if self.view is None else self.view.points
        point = point_colors.nearest_to_ray(points, origin, direction)
        if point is not None:
            self.picked = point
            # Setting the value recolours the cloud only if the value changes. If the cloud is
            # coloured by similarity already, the call of `recolour` is needed.
            self.colours.value = SIMILARITY
            self.recolour()

    def recolour(self) -> None:
        """Colour the cloud by the chosen property, and explain the colours.

        Raises ValueError if there are too few tokens to sample a context and targets.
        """
        view, by = self.view, self.colours.value
        if view is None:
            return
        picked = self.picked if by == SIMILARITY else None
        self.again.visible = by == SAMPLE
        at = np.zeros(3) if picked is None else view.points[picked]
        add, red = self.server.scene.add_icosphere, (255, 0, 0)
        add("/picked", 0.03, red, position=at, visible=picked is not None)
        self.cloud.colors, meaning = self._colors(view, by, picked)
        drawn = f", {len(view.points):,} drawn" if len(view.points) < view.total else ""
        self._say(f"<b>{self.title}</b>: {view.total:,} points{drawn}<br>{meaning}")

    def _colors(self, view: View, by: str, picked: int | None) -> tuple[Any, str]:
        """Return the colours of the points, [N, 3] uint8, and HTML text that explains them."""
        if by == OWN and view.colors is not None:
            return view.colors, "as in the file"
        if by == PCA:
            colors, share = point_colors.pca_colors(view)
            what = f"first principal components of {len(view.tokens)} tokens"
            return colors, f"red, green, blue: {what}, {share:.0%} of variance"
        if by == SIMILARITY and picked is None:
            grey = np.tile(ROLE_COLORS[0], (len(view.points), 1))
            return grey, "click a point of the cloud"
        if picked is not None:
            cosine = point_colors.similarity(view, picked)
            low, high = f"{cosine.min():.3f} (dark)", f"{cosine.max():.3f} (bright)"
            return ramp(cosine), f"cosine with point {picked:,}: {low} to {high}"
        if by == SAMPLE:
            what = "tokens of one pretraining sample; points are coloured by their nearest token"
            nowrap = "white-space: nowrap"
            legend = " ".join(
                f"<span style='{nowrap}; color: rgb{rgb}'>&#9632; {name}</span>"
                for name, rgb in ROLES.items()
            )
            colors = ROLE_COLORS[point_colors.sample_roles(view, self.generator)]
            return colors, f"{what}; where targets overlap, the last is shown:<br>{legend}"
        return ramp(view.points[:, 2]), "low is dark, high is bright"

    def _neighbour(self, i: int) -> Item:
        """Return the cloud of a neighbour. Raises ReadError if the cloud is gone."""
        return item_at(self.hits[i].path, self.hits[i].label)

    def _show_neighbours(self, index: Path, view: View) -> None:
        """Show the shapes of the index that are nearest to the cloud, except the cloud itself. Each
        shape gets a button, and is drawn small in a row below the cloud.
        """
        from jepa3d.inference.search import search

        (self.hits,) = search(index, view.vector, NEIGHBOURS, exclude=[view.name])
        for i, button in enumerate(self.buttons):
            self.server.scene.remove_by_name(f"/neighbours/{i}")
            button.visible = i < len(self.hits)
            if button.visible:
                name, cosine = Path(self.hits[i].path).name, self.hits[i].cosine
                button.label = f"{i + 1}:  {cosine:.4f}  {shortened(name, 24)}"
                try:
                    title = f"{i + 1}:  {cosine:.3f}\n{shortened(name, 12)}"
                    points = self.look(self._neighbour(i)).points
                    thinned = points[:: -(-len(points) // 2048)]
                    x, place = 0.62 * (i - (len(self.hits) - 1) / 2), f"/neighbours/{i}"
                    self._draw(place, 0.28 * thinned, 0.012, (x, 0.0, -1.5))
                    at: Any = {"position": (0.0, 0.0, -0.33), "anchor": "top-center"}
                    self.server.scene.add_label(f"{place}/title", title, **at)
                except ReadError as error:
                    button.label += f"  not drawn: {error}"


def open_page(
    paths: list[Path], model: str | None, index: Path | None, port: int, up_axis: str
) -> Page:
    """Start the server and show the first cloud.

    paths: files and folders of clouds. model: the encoder, as in `jepa3d.load`; None means the
    encoder of the index or, without an index, the encoder in the package. index: see `Page`. Raises
    ValueError for wrong settings, and ReadError or OSError if the index cannot be read or if there
    is no cloud to show.
    """
    if up_axis not in TO_Z_UP:
        raise ValueError(f"--up-axis {up_axis} is unknown: use {', '.join(TO_Z_UP)}")
    if index is None:
        look = functools.partial(view_of, load(model or "default"), up_axis=up_axis)
    else:
        from jepa3d.inference.search import open_index

        spec = open_index(index).spec
        if spec.up_axis != up_axis:
            raise ValueError(f"{index}: made with up axis {spec.up_axis}, not {up_axis}")
        settings = {"up_axis": up_axis, "layer": spec.layer, "pooling": spec.pooling}
        look = functools.partial(view_of, spec.encoder(index, model), **settings)
    items, skipped = find_clouds(*paths)
    log_left_out(skipped)
    if not items:
        raise ReadError(f"{paths[0]}: no clouds were found there")
    server = serve(port)
    try:
        page = Page(server, items, look, index)
        # If there are several clouds and the first cannot be shown, the error is shown on the page,
        # and the server keeps running.
        first = page.go if len(items) == 1 else page.callback(page.go)
        with page.lock:
            first(0)
    except BaseException:
        stop(server)
        raise
    return page


def serve_until_stopped(server: viser.ViserServer) -> None:
    """Log the page's address and serve the page until Ctrl-C."""
    at = server.get_port()
    tunnel = f"from another machine, run: ssh -L {at}:{HOST}:{at} HOST"
    log.info(f"http://{HOST}:{at}  (Ctrl-C stops it)\n{tunnel}")
    try:
        server.sleep_forever()
    finally:
        stop(server)
