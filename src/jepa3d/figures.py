"""Draw pictures, some of them like figures 1, 4, 6 and 7 of the 3D-JEPA paper (docs/method.md).

The package's extra `view` must be installed. The argument `path` of a function is the file to
write: a path, or a binary file that is open for writing.
"""

import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from jepa3d.config import PretrainConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.data.errors import shortened
from jepa3d.evaluation.classifiers import one_thread
from jepa3d.evaluation.curve import Curve
from jepa3d.evaluation.paired import METRICS, Row
from jepa3d.models.tokenizer import group
from jepa3d.objectives.jepa import make_sampler
from jepa3d.ops import BatchGenerator, unit_sphere
from jepa3d.run import Run

Target = Path | BinaryIO
# A t-SNE plot has at most 20 colours, so each group of 20 classes gets its own marker. With more
# than 160 classes, the markers are used again.
_MARKERS = "osD^vP*X"
_DOTS = 4096  # a picture in a contact sheet shows at most this many points of its cloud
_DPI = 110
# The view of contact sheets. Each row is a direction in the coordinates of the cloud: to the right
# of the picture, to its top, and to the viewer. The direction to the viewer is 30 degrees above the
# ground and 60 degrees from the x axis towards -y.
_FRONT_RIGHT = np.array(
    [[3**0.5 / 2, 0.5, 0], [-0.25, 3**0.5 / 4, 3**0.5 / 2], [3**0.5 / 4, -0.75, 0.5]]
)


def _new(width: float, height: float, **options) -> Any:
    """Make an empty figure of this width and height in inches.

    A figure made without pyplot need not be closed. Raises ValueError if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        needed = "pictures need matplotlib: pip install 'jepa3d[view]'"
        raise ValueError(needed) from error
    return Figure((width, height), dpi=_DPI, **options)


def _colors(name: str, values: Any) -> np.ndarray:
    """Return the RGBA colours [..., 4] of values [...] in the colour map `name` of matplotlib."""
    from matplotlib import colormaps

    return colormaps[name](values)


def ramp(values: np.ndarray) -> np.ndarray:
    """Return the colours [n, 3] (uint8, viridis) of values [n].

    The smallest and the largest value get the two end colours.
    """
    share = (values - values.min()) / max(float(np.ptp(values)), 1e-9)
    return (255 * _colors("viridis", share)[:, :3]).round().astype(np.uint8)


def _text(name: str) -> str:
    """Escape a name for matplotlib: a $ would begin a formula, and a leading _ would hide the name
    from the legend.
    """
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _cloud_axes(figure: Any, at: tuple[int, int, int], reach: float, zoom: float) -> Any:
    """Add a subplot for a cloud, without visible axes and with the same scale along x, y and z.

    at: number of rows, number of columns, and the subplot's number (from 1). reach: the subplot
    shows coordinates from -reach to reach. zoom: matplotlib's magnification.
    """
    axes = figure.add_subplot(*at, projection="3d")
    axes.set_axis_off()
    axes.set_box_aspect((1, 1, 1), zoom=zoom)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))
    return axes


def evenly(count: int, most: int) -> np.ndarray:
    """Return the indices of at most `most` of `count` rows, evenly spread."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def first_of_each(labels: np.ndarray) -> np.ndarray:
    """Return the indices of shapes with labels [n] in this order: the first shape of each class,
    then the second shape of each class, and so on.
    """
    rank_in_class = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rank_in_class[labels == label] = np.arange((labels == label).sum())
    return np.lexsort((labels, rank_in_class))


def draw_blocks(clouds: PointClouds, config: PretrainConfig, path: Target, shapes: int = 4) -> None:
    """Draw some shapes with context and target blocks, which are sampled as in training.

    Each shape has one row: the cloud, the context that the encoder sees, and each target block.
    shapes: number of shapes to draw; they are evenly spread over `clouds`.
    """
    points = clouds.batch(np.linspace(0, len(clouds) - 1, shapes).astype(int))
    generator = BatchGenerator(config.seed)
    grouped = group(points, config.encoder.num_groups, config.encoder.group_size)
    sample = make_sampler(config)(grouped.centers, generator.stream("sampler"))
    blocks = sample.target.shape[1]
    titles = ["cloud", "context", *(f"target {i + 1}" for i in range(blocks))]
    colors, columns = ["0.25", "tab:blue", *["tab:red"] * blocks], 2 + blocks
    figure = _new(1.7 * columns, 1.6 * shapes)
    for row, cloud in enumerate(points):
        tokens = [sample.context[row][sample.mask[row]], *sample.target[row]]
        for column, title in enumerate(titles):
            at = shapes, columns, row * columns + column + 1
            axes = _cloud_axes(figure, at, 0.7, 1.25)
            inside = torch.full((len(cloud),), column == 0)
            if column:
                inside[grouped.index[row, tokens[column - 1]].flatten()] = True
            axes.scatter(*cloud[~inside].T, s=1, color="0.85", depthshade=False)
            style = {"color": colors[column], "depthshade": column == 0}
            axes.scatter(*cloud[inside].T, s=3, **style)
            if row == 0:
                axes.set_title(title, fontsize=9)
    figure.subplots_adjust(0, 0, 1, 0.96, 0, 0)
    figure.savefig(path)


def draw_curves(run: Path, path: Target, selected: str = "validation") -> None:
    """Plot a run's logged metrics by step: one panel for losses, one for effective ranks and one
    for accuracies. A panel is omitted if the run has logged none of its metrics.

    The losses include those of two baselines: predictions from positions alone, and the best
    constant prediction. The effective ranks are the logged values whose names end in "_rankme"
    (RankMe). Their panel also shows the perplexity of a dVAE's codes.
    selected: the legend's text for the logged score by which fine-tuning chose the epoch whose
    weights it kept. Raises ValueError if the run has not logged any step.
    """
    ranks = [f"{x}_rankme" for x in ("prediction", "target", "embedding", "encoded")]
    losses = ("loss", "position_loss", "constant_loss", "reconstruction")
    names = {"accuracy": "training accuracy", "validation": selected, "test": selected}
    panels = {"loss": losses, "effective rank": [*ranks, "perplexity"], "%": [*names]}
    if not (lines := Run(run).metrics):
        raise ValueError(f"{run}: no step has been logged")
    logged = {key for line in lines for key in line}
    shown = {unit: keys for unit, keys in panels.items() if not logged.isdisjoint(keys)}
    figure = _new(4.5 * len(shown), 3.2, layout="tight")
    grid = figure.subplots(1, len(shown), squeeze=False)
    for axes, (unit, keys) in zip(grid[0], shown.items(), strict=True):
        for key in filter(logged.__contains__, keys):
            at = [(x["step"], x[key]) for x in lines if x.get(key) is not None]
            label = _text(names.get(key, key.replace("_rankme", "").replace("_", " ")))
            marker = "." if len(at) < 40 else None
            axes.plot(*zip(*at, strict=True), label=label, marker=marker, lw=1.4)
        axes.set(xlabel="step", ylabel=unit, ylim=(0, None))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(path)


def draw_learning_curves(curves: list[Curve], path: Target, title: str) -> None:
    """Plot probe accuracy against CPU-minutes, with one line per configuration.

    A line is the mean over seeds; a band around it shows one standard deviation.
    """
    figure = _new(7.5, 4.5, layout="tight")
    axes = figure.subplots()
    for curve in curves:
        minutes, accuracy = curve.minutes.mean(0), curve.accuracy.mean(0)
        seeds = len(curve.seeds)
        label = _text(f"{curve.name} ({seeds} seeds)")
        (line,) = axes.plot(minutes, accuracy, marker=".", label=label)
        if seeds > 1:
            std = curve.accuracy.std(0, ddof=1)
            band = {"color": line.get_color(), "alpha": 0.15, "lw": 0}
            axes.fill_between(minutes, accuracy - std, accuracy + std, **band)
    words = "CPU-minutes, including the training of teachers"
    axes.set(xlabel=words, ylabel="accuracy, %", title=_text(title))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def draw_differences(rows: Sequence[Row], path: Target, title: str) -> None:
    """Plot differences from a reference with their 95 % intervals, one panel per metric.

    An arm is a configuration that was compared; the reference is one of the arms. A panel has one
    line for each other arm and for each baseline (an untrained encoder or a handcrafted descriptor)
    on each data set. The line is green if the arm or baseline is better than the reference, red if
    it is worse, and grey if the verdict is undecided.
    """
    lines = list(dict.fromkeys((row.data, row.name) for row in rows if row.difference))
    scored = {row.metric for row in rows}
    metrics = [metric for metric in METRICS if metric in scored]
    size = 3 + 2.4 * len(metrics), 1.4 + 0.28 * len(lines)
    figure = _new(*size, layout="constrained")
    grid = figure.subplots(1, len(metrics), sharey=True)
    colors = {"better": "tab:green", "worse": "tab:red", "undecided": "0.5"}
    for axes, metric in zip(grid, metrics, strict=True):
        for row in rows:
            if row.metric == metric and (gain := row.difference):
                at, color = lines.index((row.data, row.name)), colors[gain.verdict]
                axes.plot([gain.low, gain.high], [at, at], color=color, lw=2)
                axes.plot(gain.mean, at, "o", color=color, ms=5)
        axes.axvline(0, color="0.3", lw=0.8)
        axes.set_title(METRICS[metric], fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    labels = [_text(f"{name}, {data}") for data, name in lines]
    grid[0].set_yticks(range(len(lines)), labels, fontsize=8)
    grid[0].set_ylim(max(len(lines), 1) - 0.5, -0.5)  # the first line is at the top
    figure.suptitle(_text(f"{title}, percentage points"), fontsize=10)
    figure.savefig(path)


def draw_contact_sheet(clouds: list[np.ndarray], titles: list[str], path: Target) -> None:
    """Write a PNG of 32 colours: a picture of each cloud with its title below it, in rows of up to
    6 pictures.

    clouds: an array [N, 3] for each cloud, with z up. The pictures show the clouds from the front
    right (`_FRONT_RIGHT`). A PNG with a palette of 32 colours is much smaller than one with all
    colours.
    """
    cell, caption = 190, 46  # pixels
    columns = min(6, len(clouds))
    rows = -(-len(clouds) // columns)
    width, height = columns * cell, rows * (cell + caption)
    figure = _new(width / _DPI, height / _DPI)
    for i, (points, title) in enumerate(zip(clouds, titles, strict=True)):
        left, top = cell * (i % columns), height - (cell + caption) * (i // columns)
        figure.figimage(_pixels(points, cell), left, top - cell, origin="upper")
        x, y = (left + cell / 2) / width, (top - cell) / height
        style = {"fontsize": 7, "ha": "center", "va": "top", "linespacing": 1.1}
        figure.text(x, y, _caption(title), **style)
    drawn = io.BytesIO()
    # matplotlib would warn if its font lacks a letter of a title
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(drawn)
    from PIL import Image  # installed with matplotlib, which needs it

    Image.open(drawn).convert("RGB").quantize(32).save(path, "PNG", optimize=True)


def even_sample(points: np.ndarray) -> np.ndarray:
    """Return a random sample of at most 4,096 of the points [N, 3].

    The first points would not do: if a file lists its points by position, its first points cover
    only a part of the shape.
    """
    return points[np.sort(np.random.default_rng(0).permutation(len(points))[:_DOTS])]


def _pixels(points: np.ndarray, size: int) -> np.ndarray:
    """Render a random sample of a cloud as an image [size, size, 3] uint8.

    Near points hide the points behind them. The colour of a point shows its height.
    """
    points = even_sample(points).astype(np.float64)
    points -= points.mean(0)
    points /= max(np.linalg.norm(points, axis=1).max(), 1e-30)
    across, up, towards = _FRONT_RIGHT @ points.T
    nearest_last = np.argsort(towards, kind="stable")
    colors = ramp(points[nearest_last, 2])
    x, y = ((1 + 0.94 * at[nearest_last]) * size / 2 for at in (across, -up))
    image = np.full((size, size, 3), 255, np.uint8)
    # A dot is a square with this side in pixels; clouds with fewer points get larger dots.
    side = int(np.clip(0.5 * size / np.sqrt(len(points)), 2, 6))
    shifts = np.indices((side, side)).reshape(2, -1) - side // 2
    # row and column of every pixel of every dot: [points, 2, pixels of a dot]
    at = np.stack([y, x], 1).astype(int)[:, :, None] + shifts
    at = at.transpose(0, 2, 1).reshape(-1, 2).clip(0, size - 1)
    image[at[:, 0], at[:, 1]] = np.repeat(colors, side * side, axis=0)
    return image


def _caption(title: str, width: int = 28, lines: int = 3) -> str:
    """Wrap a title to at most `lines` lines of `width` characters.

    If a title is longer than three quarters of this space, its middle is left out. The rest of the
    space is slack: lines break between words, so most lines are not full. If the title still needs
    more than `lines` lines, its end is cut off.
    """
    wrapped = textwrap.wrap(shortened(title, width * lines * 3 // 4), width)
    return _text("\n".join(wrapped[:lines]))


def draw_parts(
    points: np.ndarray, truth: np.ndarray, predicted: np.ndarray, titles: list[str], path: Target
) -> None:
    """Draw each shape twice, as in the paper's figure 6: with its true and its predicted parts.

    points: the points [n, N, 3] of n shapes, with z up. truth, predicted: part labels [n, N]. A row
    shows two shapes, that is, four pictures. A part has the same colour in both pictures of its
    shape.
    """
    pairs = min(2, len(points))
    rows = -(-len(points) // pairs)
    figure = _new(4.2 * pairs, 2.1 * rows)
    clouds = unit_sphere(torch.from_numpy(points.astype(np.float32))).numpy()
    for i, (cloud, title) in enumerate(zip(clouds, titles, strict=True)):
        present = np.unique([truth[i], predicted[i]])
        sides = (truth[i], "true"), (predicted[i], "predicted")
        for side, (parts, name) in enumerate(sides):
            axes = _cloud_axes(figure, (rows, 2 * pairs, 2 * i + side + 1), 0.75, 1.3)
            colors = _colors("tab10", np.searchsorted(present, parts) % 10)
            axes.scatter(*cloud.T, s=2, c=colors, depthshade=False)
            words = name if side else f"{_text(title[-20:])}, {name}"
            axes.set_title(words, fontsize=8, pad=0)
    figure.subplots_adjust(0, 0, 1, 0.97, 0, 0.06)
    figure.savefig(path)


def draw_tsne(
    before: np.ndarray,
    after: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    path: Target,
) -> None:
    """Plot t-SNE maps of features before and after fine-tuning, coloured by class, as in the
    paper's figure 7.

    before, after: features [n, E] of the same shapes. t-SNE uses a fixed seed and the first 50
    principal components. Raises ValueError for fewer than 5 shapes.
    """
    if len(labels) < 5:
        raise ValueError(f"t-SNE needs at least 5 shapes, but there are {len(labels)}")
    present = np.unique(labels)
    columns = min(5, len(present))
    # height of the legend in inches: its lines and a margin
    legend = 0.19 * -(-len(present) // columns) + 0.15
    figure = _new(9, 4.4 + legend)
    grid, titles = figure.subplots(1, 2), ("before fine-tuning", "after fine-tuning")
    for axes, features, title in zip(grid, (before, after), titles, strict=True):
        rows = features.astype(np.float64)
        near = min(30, (len(rows) - 1) / 3)
        with one_thread():
            rows = PCA(min(50, *rows.shape), random_state=0).fit_transform(rows)
            tsne = TSNE(perplexity=near, init="pca", random_state=0)
            plane = tsne.fit_transform(rows)
        for i, label in enumerate(present):
            color = _colors("tab10" if len(present) <= 10 else "tab20", i % 20)
            marker = _MARKERS[i // 20 % len(_MARKERS)]
            style = {"marker": marker, "color": color, "s": 9, "lw": 0}
            name = _text(class_names[label][:22])
            axes.scatter(*plane[labels == label].T, label=name, **style)
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])
    style = {"loc": "lower center", "fontsize": 8, "frameon": False, "markerscale": 2}
    figure.legend(*grid[0].get_legend_handles_labels(), ncols=columns, **style)
    figure.subplots_adjust(0.01, legend / (4.4 + legend), 0.99, 0.94, 0.03)
    figure.savefig(path)


def draw_confusion(confusion: np.ndarray, class_names: Sequence[str], path: Target) -> None:
    """Draw a confusion matrix [true class, predicted class].

    A cell shows a count of shapes; its colour shows the count's share of the row.
    """
    confusion, count = np.asarray(confusion), len(class_names)
    names = [_text(name[:22]) for name in class_names]
    size, font = min(3 + 0.33 * count, 14), 8 if count <= 25 else 5
    figure = _new(size, size, layout="constrained")
    axes = figure.subplots()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(count), names, rotation=90, fontsize=font)
    axes.set_yticks(range(count), names, fontsize=font)
    axes.set(xlabel="predicted", ylabel="true")
    style = {"ha": "center", "va": "center", "fontsize": font}
    for row, column in np.argwhere(confusion):
        color = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(confusion[row, column]), color=color, **style)
    figure.savefig(path)
