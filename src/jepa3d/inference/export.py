"""`jepa3d export`: write an encoder or a classifier as ONNX, as a torch.export program and as a
folder for the Hugging Face Hub. The results of the exported files are compared with those of torch;
if they differ by more than the tolerances, nothing is written.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa3d import frame
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier, LinearClassifier, Segmenter
from jepa3d.models.ready import fingerprint, load_any
from jepa3d.models.tokenizer import group
from jepa3d.ops import farthest_point_scan, gather_points, squared_distance, unit_sphere
from jepa3d.plain import log
from jepa3d.training.checkpoint import replace_folder

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  torch.onnx needs it
except ImportError as error:
    raise ValueError("export needs ONNX: pip install 'jepa3d[export]'") from error

RTOL, ATOL = 1e-4, 1e-5  # relative and absolute tolerance of the comparison with torch
MAX_POINTS = 10**6  # largest number of points of a cloud, as declared to torch.export
# batch sizes for which exported files are compared with torch; in `_difference`, the clouds of each
# batch have another number of points
BATCHES = (1, 2, 7)
# settings of the encoder that `frame.group` needs
SIZES = ("num_points", "num_groups", "group_size")

Network = PointEncoder | Classifier | LinearClassifier
Differences = dict[str, float]  # file name -> largest difference from torch


class Graph(nn.Module):
    """A network to export as one graph, with the names of the graph's inputs and outputs.

    Letters in the shapes below: B clouds of N points; M patches of K points per cloud; tokens of
    width C; vectors of width E.
    """

    name: str
    inputs: tuple[str, ...] = ("points",)
    outputs: tuple[str, ...]

    def __init__(self, network: Network):
        super().__init__()
        self.network: Any = network

    def arrays(self, clouds: Tensor) -> tuple[np.ndarray, ...]:
        """Return the graph's inputs for clouds [B, N, 3]."""
        return (clouds.numpy(),)

    def expected(self, clouds: Tensor) -> tuple[Tensor, ...]:
        """Return what the network itself computes in torch for clouds [B, N, 3]. A classifier
        computes logits. An encoder computes vectors, tokens and centers, even if the graph has no
        output `centers`.
        """
        if not isinstance(self.network, PointEncoder):
            return (self.network.predict(clouds),)
        tokens, centers = self.network.tokens(clouds)
        return self.network.pool(tokens), tokens, centers


class FromPatches(Graph):
    """The encoder as a graph from patches [B, M, K, 3] and centers [B, M, 3] to vectors [B, E]
    and tokens [B, M, C].
    """

    name, inputs, outputs = "patches", ("patches", "centers"), ("embedding", "tokens")

    def forward(self, patches: Tensor, centers: Tensor) -> tuple[Tensor, ...]:
        tokens = self.network.features(patches, centers)[0]
        return self.network.pool(tokens), tokens

    def arrays(self, clouds: Tensor) -> tuple[np.ndarray, ...]:
        sizes = [getattr(self.network, name) for name in SIZES]
        parts = [frame.group(cloud, *sizes) for cloud in clouds.numpy()]
        return tuple(np.stack(part) for part in zip(*parts, strict=True))


class FromPoints(Graph):
    """The encoder as a graph from clouds [B, N, 3] in any unit to vectors [B, E], tokens [B, M, C]
    and centers [B, M, 3].
    """

    name, outputs = "encoder", ("embedding", "tokens", "centers")

    def forward(self, points: Tensor) -> tuple[Tensor, ...]:
        encoder = self.network
        points = prepared(encoder, points)
        grouped = group(points, encoder.num_groups, encoder.group_size)
        tokens = encoder.features(grouped.patches, grouped.centers)[0]
        return encoder.pool(tokens), tokens, grouped.centers


class ToClasses(Graph):
    """A classifier as a graph from clouds [B, N, 3] in any unit to logits [B, classes]."""

    name, outputs = "classifier", ("logits",)

    def forward(self, points: Tensor) -> tuple[Tensor, ...]:
        return (self.network(prepared(self.network.encoder, points)),)


def export(model: str | Path, out: str | Path) -> dict[str, float]:
    """Export a model into a new folder `out`.

    model: as for `jepa3d.load`; for a classifier, its folder or the folder of its run. Returns a
    dict from the name of each exported file to the largest difference between its results and those
    of torch. Raises ValueError if the model cannot be loaded or exported, if `out` exists, or if
    results differ too much from those of torch. In all these cases, nothing is written.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another --out")
    network = load_any(model).float()
    if isinstance(network, Segmenter):
        raise ValueError(f"{model}: a segmentation network, which cannot be exported")
    encoder = network if isinstance(network, PointEncoder) else network.encoder
    # `prepared` looks up the `needed` nearest points of each point. So even the smallest allowed
    # cloud, of `min_points` points, must have at least `needed` points.
    if (needed := 1 + encoder.num_points // encoder.min_points) > encoder.min_points:
        raise ValueError(f"{model}: export needs num_groups of at least {needed}")
    differences: Differences = {}
    replace_folder(out, partial(_write, network, encoder, differences), True)
    return differences


@torch.no_grad()
def _write(network: Network, encoder: PointEncoder, found: Differences, folder: Path) -> None:
    """Write every file of the folder. For each exported file, add its largest difference from torch
    to `found`.
    """
    properties = {name: str(getattr(encoder, name)) for name in SIZES}
    if isinstance(network, PointEncoder):
        graphs: list[Graph] = [FromPoints(network), FromPatches(network)]
        properties["fingerprint"] = fingerprint(network)
        shutil.copyfile(frame.__file__, folder / "grouping.py")
    else:
        graphs = [ToClasses(network)]
        properties["class_names"] = json.dumps(network.class_names)
    for graph in graphs:
        with _quiet():
            program = _program(graph, encoder)
            _write_onnx(program, graph, properties, folder / f"{graph.name}.onnx")
            if graph.inputs == ("points",):
                torch.export.save(program, folder / f"{graph.name}.pt2")
        for file in sorted(folder.glob(f"{graph.name}.*")):
            found[file.name] = _difference(graph, encoder, file)
            largest = f"differs from torch by at most {found[file.name]:.1e}"
            log.info(f"{file.name}: {largest} (batches of 1, 2 and 7 clouds)")
    network.save_pretrained(folder)
    card = _card(network, encoder, found)
    (folder / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages of torch and onnxscript about a missing torchvision, about deprecations, and
    about every graph node that is folded into a constant.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(before)


def _program(graph: Graph, encoder: PointEncoder) -> torch.export.ExportedProgram:
    """Export a graph for any batch size. A graph whose input is points is also exported for any
    number of points from `min_points` to `MAX_POINTS`.
    """
    # The example batch has two clouds: torch would turn a batch size of 1 into a constant.
    clouds = torch.rand(2, encoder.num_points + 8, 3, generator=torch.Generator())
    axes = {0: torch.export.Dim("batch", min=1)}
    if graph.inputs == ("points",):
        least = encoder.min_points
        axes[1] = torch.export.Dim("num_points", min=least, max=MAX_POINTS)
    shapes = dict.fromkeys(graph.inputs, axes)
    arrays = tuple(map(torch.from_numpy, graph.arrays(clouds)))
    # Without strict=True, torch would treat the `len` of a tensor as a constant.
    return torch.export.export(graph, arrays, dynamic_shapes=shapes, strict=True)


def _write_onnx(program: Any, graph: Graph, properties: dict[str, str], file: Path) -> None:
    """Write an exported program as an ONNX file with named axes and metadata, and check it."""
    options: Any = {"input_names": graph.inputs, "output_names": graph.outputs}
    options |= {"dynamo": True, "external_data": False, "verbose": False}
    exported: Any = torch.onnx.export(program, (), **options)
    proto = exported.model_proto
    onnx.helper.set_model_props(proto, properties)
    _name_axes(proto.graph)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, file)


def _open(file: Path, graph: Graph) -> Callable[[Sequence[np.ndarray]], Sequence]:
    """Load an exported file. Returns a function from input arrays to output arrays."""
    if file.suffix == ".pt2":
        module = torch.export.load(file).module()
        return lambda arrays: module(*map(torch.from_numpy, arrays))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x: session.run(graph.outputs, dict(zip(graph.inputs, x, strict=True)))


def _name_axes(graph) -> None:
    """Replace torch's symbols, such as s77, by readable names in every shape of the graph."""
    axes = graph.input[0].type.tensor_type.shape.dim
    both = zip(axes, ("batch", "num_points"), strict=False)
    names = {axis.dim_param: name for axis, name in both if axis.dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                new = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), dim.dim_param)
                dim.dim_param = new


def _difference(graph: Graph, encoder: PointEncoder, file: Path) -> float:
    """Return the largest difference between a file's results and torch's.

    Raises ValueError if a difference exceeds the tolerance.
    """
    generator, largest, run = torch.Generator().manual_seed(0), 0.0, _open(file, graph)
    counts = encoder.min_points, encoder.num_points, 2 * encoder.num_points
    for batch, count in zip(BATCHES, counts, strict=True):
        # neither centred nor of radius 1, since the graphs take clouds in any unit
        points = torch.randn(batch, count, 3, generator=generator) * 30 + 100
        results, expected = run(graph.arrays(points)), graph.expected(points)
        for key, found, wanted in zip(graph.outputs, results, expected, strict=False):
            found, wanted = np.asarray(found), wanted.numpy()
            difference = float(np.abs(found - wanted).max())
            if not np.allclose(found, wanted, RTOL, ATOL):
                wrong = f"differs from torch by {difference:.1e}; not exported"
                raise ValueError(f"{file.name}: {key} of {batch} clouds {wrong}")
            largest = max(largest, difference)
    return largest


def _card(network: Network, encoder: PointEncoder, differences: Differences) -> str:
    """Return the text of the folder's README, made from the templates beside this file."""
    values = {name: getattr(encoder, name) for name in ("min_points", "width", *SIZES)}
    values |= {"vector_width": 2 * encoder.width, "kind": type(network).__name__}
    values["front"] = type(network)._hub_mixin_info.model_card_data.to_yaml().strip()
    rows = [f"| {name} | {value:.1e} |" for name, value in differences.items()]
    values["differences"], folder = "\n".join(rows), Path(__file__).parent
    if isinstance(network, PointEncoder):
        values |= {"kind_name": "encoder", "first": "embedding"}
        parts = (folder / "card_encoder.md", folder / "card_patches.md")
        outputs, values["more"] = (x.read_text().format(**values) for x in parts)
        values["outputs"] = outputs.strip()
    else:
        values |= {"kind_name": "classifier", "first": "logits", "more": ""}
        names = network.class_names
        classes = f"[batch, {len(names)}] of the classes {', '.join(names)}"
        values["outputs"] = f"Output: `logits` {classes}."
    return (folder / "card.md").read_text().format(**values)


def prepared(encoder: PointEncoder, points: Tensor) -> Tensor:
    """Prepare clouds [B, N, 3] as the functions `frame` and `fill` of `jepa3d.frame` do, but with
    operations that a graph can contain. A graph cannot raise errors itself, so the checks of these
    functions are left out. Only for a cloud with too few points does the runtime raise an error,
    because the graph then uses an index that is out of bounds.
    """
    points = without_strays(points.double(), encoder.min_points)
    points = points - (points.amin(1, True) + points.amax(1, True)) / 2
    points = (points / points.abs().amax((1, 2), True)).float()
    device, min_points = points.device, encoder.min_points
    # While exporting, the number of points is symbolic.
    count: Any = torch.sym_min(points.shape[1], encoder.num_points)
    start = squared_distance(points, points.new_zeros(1, 3))[..., 0].argmax(1)
    order, apart = farthest_point_scan(points, count, start)
    chosen, different = gather_points(points, order), (apart > 0).sum(1, keepdim=True)
    row = torch.arange(encoder.num_points, device=device) % different
    # If a cloud has fewer than `min_points` different points, an index is set out of bounds, so
    # that the runtime raises an error.
    row = torch.where(different < min_points, 2**30, row)
    source = gather_points(chosen, row)
    # Copies are needed if a cloud has fewer than `num_points` different points. Only then are the
    # distances of all pairs of points computed, since these distances are costly.
    copied = (different < encoder.num_points).any()
    # Number of nearest points to look up for each point: itself, and one more for each round of
    # copies.
    most: Any = torch.sym_min(count, 1 + encoder.num_points // min_points)

    def moved(chosen: Tensor, different: Tensor, source: Tensor) -> Tensor:
        # Only the first `different` rows of `chosen` are different points; the rest are duplicates.
        among = torch.arange(chosen.shape[1], device=device) < different
        distance = squared_distance(chosen, chosen)
        distance = distance.masked_fill(~among[:, None], torch.inf)
        nearest = distance.topk(most, largest=False).indices
        turn = torch.arange(source.shape[1], device=device)
        turn, row = turn // different, turn % different
        column = torch.where(turn > 0, 1 + (turn - 1) % (different - 1).clamp_min(1), 0)
        other = gather_points(nearest, row).gather(2, column[..., None])[..., 0]
        step = frame.STEP * (1 - row / (4 * different))[..., None]
        return step * (source - gather_points(chosen, other))

    def unmoved(chosen: Tensor, different: Tensor, source: Tensor) -> Tensor:
        return torch.zeros_like(source)

    away = torch.cond(copied, moved, unmoved, (chosen, different, source))
    return unit_sphere((source + away).double()).float()


def without_strays(points: Tensor, min_points: int) -> Tensor:
    """Replace each stray point of clouds [B, N, 3] (double) by a point that is not stray.

    Stray points are those that `frame.without_strays` removes.
    """
    points = points - (points.amin(1, True) + points.amax(1, True)) / 2
    # Sort the points by one number per point, as in `frame._distinct`, so that equal points are
    # neighbours.
    weights = points.new_tensor([1, 2**0.5, torch.pi])
    points = gather_points(points, (points * weights).sum(-1).argsort(1))
    first = (points[:, 1:] != points[:, :-1]).any(-1)
    # The mask `first` marks the first of several equal points. Only this one is counted.
    first = torch.cat([torch.ones_like(first[:, :1]), first], 1)
    different, kept, side = first.sum(1, keepdim=True), first, frame.MAX_CELLS
    for _ in range(frame.ROUNDS):
        number = kept.sum(1, keepdim=True).double()
        cells = (3 * number).pow(1 / 3).round().clamp(2, side)
        # All other points are moved onto a kept point, so these points have the bounding box of the
        # kept points.
        box = _onto_one(points, kept)
        low = box.amin(1, True)
        width = (box.amax(1, True) - low).amax(2, True).clamp_min(1e-30)
        place = (points - low) * ((cells - 1e-6)[..., None] / width)
        place = place.clamp(0, side - 1).long()
        cell = (place[..., 0] * side + place[..., 1]) * side + place[..., 2]
        count = points.new_zeros(points.shape[0], side**3)
        count = count.scatter_add(1, cell, kept.double())
        count = count.view(-1, side, side, side)
        # Add up each cell and its 26 neighbours: three cells along each axis in turn.
        for axis in range(3):
            width_of_pad = [int(axis == other) for other in (2, 1, 0) for _ in "ab"]
            padded, dim = F.pad(count, width_of_pad), 1 + axis
            count = padded.narrow(dim, 0, side) + count + padded.narrow(dim, 2, side)
        few = frame.ALONE * (3 * number / cells**3).clamp_min(1)
        few = torch.minimum(few, number / 64)
        kept = kept & (count.flatten(1).gather(1, cell) >= few)
    fewest = ((1 - frame.MAX_STRAYS) * different).clamp_min(min_points)
    enough = kept.sum(1, keepdim=True) >= fewest
    return _onto_one(points, kept | (first & ~enough))


def _onto_one(points: Tensor, kept: Tensor) -> Tensor:
    """Replace each point of clouds [B, N, 3] that is not kept (see the mask `kept` [B, N]) by the
    first kept point of its cloud.
    """
    place = torch.arange(points.shape[1], device=points.device)
    first = kept.long().argmax(1, keepdim=True)
    return gather_points(points, torch.where(kept, place, first))
