"""`jepa3d export`: an encoder or a classifier as ONNX, torch.export and Hub folder, each compared
with torch.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from jepa3d import frame
from jepa3d.inference.graph_frame import prepared
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier, LinearClassifier, Segmenter
from jepa3d.models.ready import fingerprint, load_any
from jepa3d.models.tokenizer import group
from jepa3d.plain import log

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  what torch.onnx needs
except ImportError as error:
    raise ValueError("export needs ONNX: pip install 'jepa3d[export]'") from error

RTOL, ATOL = 1e-4, 1e-5
MAX_POINTS = 10**6  # of a cloud, as declared to torch.export
BATCHES = (1, 2, 7)
SIZES = ("num_points", "num_groups", "group_size")

Program = torch.export.ExportedProgram
Network = PointEncoder | Classifier | LinearClassifier
Differences = dict[str, float]  # of files, from torch
Run = Callable[..., list[np.ndarray]]  # an exported file: arrays to arrays


class Graph(NamedTuple):
    """One graph to export, and the network's own results, with which its files must agree."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arrays: Callable[[Tensor], tuple[np.ndarray, ...]]  # inputs of clouds B N 3
    expected: Callable[[Tensor], tuple[Tensor, ...]]  # their outputs by the network


class FromPatches(nn.Module):
    """Patches B M K 3 and centers B M 3 to vectors B E and tokens B M C."""

    def __init__(self, encoder: PointEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, patches: Tensor, centers: Tensor) -> tuple[Tensor, ...]:
        tokens = self.encoder.features(patches, centers)[0]
        return self.encoder.pool(tokens), tokens


class FromPoints(nn.Module):
    """Clouds B N 3 in any unit to vectors B E, tokens B M C and centers B M 3."""

    def __init__(self, encoder: PointEncoder):
        super().__init__()
        self.network = FromPatches(encoder)

    def forward(self, points: Tensor) -> tuple[Tensor, ...]:
        encoder = self.network.encoder
        points = prepared(encoder, points)
        grouped = group(points, encoder.num_groups, encoder.group_size)
        return *self.network(grouped.patches, grouped.centers), grouped.centers


class ToClasses(nn.Module):
    """Clouds B N 3 in any unit to logits B classes."""

    def __init__(self, network: Classifier | LinearClassifier):
        super().__init__()
        self.network = network

    def forward(self, points: Tensor) -> tuple[Tensor, ...]:
        return (self.network(prepared(self.network.encoder, points)),)


def export(model: str | Path, out: str | Path) -> dict[str, float]:
    """Write the folder `out`; `model` as of `jepa3d.load`, or a classifier's run or folder.

    Returns the largest difference of each file from torch. Raises ValueError for a model that
    cannot be had or exported, an `out` that exists, or a graph whose results differ from torch's;
    then nothing is left.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another --out")
    network = load_any(model).float()
    if isinstance(network, Segmenter):
        raise ValueError(f"{model}: a network that segments, which is not exported")
    encoder = network if isinstance(network, PointEncoder) else network.encoder
    # No graph has such a `fill`.
    if (needed := 1 + encoder.num_points // encoder.min_points) > encoder.min_points:
        sizes = f"num_groups or group_size would have to be at least {needed}"
        raise ValueError(f"{model}: cannot be exported: {sizes}")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        differences = _write(network, encoder, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return differences


def _graphs(network: Network) -> list[Graph]:
    def points(clouds: Tensor) -> tuple[np.ndarray, ...]:
        return (clouds.numpy(),)

    if not isinstance(network, PointEncoder):
        graph = "classifier", ToClasses(network), ("points",), ("logits",), points
        return [Graph(*graph, lambda clouds: (network.predict(clouds),))]

    def expected(clouds: Tensor) -> tuple[Tensor, ...]:
        tokens, centers = network.tokens(clouds)
        return network.pool(tokens), tokens, centers

    def patches(clouds: Tensor) -> tuple[np.ndarray, ...]:
        sizes = [getattr(network, name) for name in SIZES]
        parts = [frame.group(cloud, *sizes) for cloud in clouds.numpy()]
        return tuple(np.stack(part) for part in zip(*parts, strict=True))

    outputs = ("embedding", "tokens", "centers")
    whole, part = FromPoints(network), FromPatches(network)
    inputs = ("patches", "centers")
    return [
        Graph("encoder", whole, ("points",), outputs, points, expected),
        Graph("patches", part, inputs, outputs[:2], patches, expected),
    ]


@torch.no_grad()
def _write(network: Network, encoder: PointEncoder, folder: Path) -> Differences:
    """Write every file of the folder. Returns of each graph's file the largest difference from torch."""
    properties = {name: str(getattr(encoder, name)) for name in SIZES}
    if isinstance(network, PointEncoder):
        properties["fingerprint"] = fingerprint(network)
        shutil.copyfile(frame.__file__, folder / "grouping.py")
    else:
        properties["class_names"] = json.dumps(network.class_names)
    differences = {}
    for graph in _graphs(network):
        with _quiet():
            program = _program(graph, encoder)
            _write_onnx(program, graph, properties, folder / f"{graph.name}.onnx")
            files = {f"{graph.name}.onnx": _run_onnx}
            if graph.inputs == ("points",):
                torch.export.save(program, folder / f"{graph.name}.pt2")
                files[f"{graph.name}.pt2"] = _run_pt2
        for name, opened in files.items():
            run = opened(folder / name, graph)
            differences[name] = _difference(graph, encoder, name, run)
            largest = f"differs from torch by at most {differences[name]:.1e}"
            log.info(f"{name}: {largest} (batches of 1, 2 and 7 clouds)")
    network.save_pretrained(folder)
    card = _card(network, encoder, differences)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return differences


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages of torch and onnxscript: a missing torchvision, deprecations, every folded
    node.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _program(graph: Graph, encoder: PointEncoder) -> Program:
    # Of two clouds: a batch of 1 becomes a constant.
    clouds = torch.rand(2, encoder.num_points + 8, 3, generator=torch.Generator())
    axes = {0: torch.export.Dim("batch", min=1)}
    count = torch.export.Dim("num_points", min=encoder.min_points, max=MAX_POINTS)
    shapes = dict.fromkeys(graph.inputs, axes)
    if "points" in shapes:
        shapes["points"] = axes | {1: count}
    arrays = tuple(map(torch.from_numpy, graph.arrays(clouds)))
    # Not strict, torch would take the `len` of a tensor for a constant.
    return torch.export.export(graph.module, arrays, dynamic_shapes=shapes, strict=True)


def _write_onnx(program: Program, graph: Graph, properties: dict[str, str], file: Path) -> None:
    options: Any = {"input_names": graph.inputs, "output_names": graph.outputs}
    options |= {"dynamo": True, "external_data": False, "verbose": False}
    exported = torch.onnx.export(program, (), **options)
    assert exported is not None
    proto = exported.model_proto
    onnx.helper.set_model_props(proto, properties)
    _name_axes(proto.graph)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, file)


def _run_onnx(file: Path, graph: Graph) -> Run:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        found = session.run(graph.outputs, dict(zip(graph.inputs, arrays, strict=True)))
        return list(map(np.asarray, found))

    return run


def _run_pt2(file: Path, graph: Graph) -> Run:
    module = torch.export.load(file).module()
    return lambda *arrays: [x.numpy() for x in module(*map(torch.from_numpy, arrays))]


def _name_axes(graph) -> None:
    """Replace torch's symbols, such as s77, by names in every shape."""
    axes = graph.input[0].type.tensor_type.shape.dim
    both = zip(axes, ("batch", "num_points"), strict=False)
    names = {axis.dim_param: name for axis, name in both if axis.dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                new = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), dim.dim_param)
                dim.dim_param = new


def _difference(graph: Graph, encoder: PointEncoder, name: str, run: Run) -> float:
    """The largest difference of a file's results from torch's.

    Raises ValueError beyond the tolerance.
    """
    generator, largest = torch.Generator().manual_seed(0), 0.0
    counts = encoder.min_points, encoder.num_points, 2 * encoder.num_points
    for batch, count in zip(BATCHES, counts, strict=True):
        points = torch.randn(batch, count, 3, generator=generator) * 30 + 100
        results, expected = run(*graph.arrays(points)), graph.expected(points)
        for key, found, wanted in zip(graph.outputs, results, expected, strict=False):
            difference = float(np.abs(found - wanted.numpy()).max())
            if not np.allclose(found, wanted.numpy(), RTOL, ATOL):
                wrong = f"differs from torch by {difference:.1e}; not exported"
                raise ValueError(f"{name}: {key} of {batch} clouds {wrong}")
            largest = max(largest, difference)
    return largest


def _card(network: Network, encoder: PointEncoder, differences: Differences) -> str:
    """The README of the folder, of templates beside this file."""
    values = {name: getattr(encoder, name) for name in ("min_points", *SIZES)}
    values["front"] = type(network)._hub_mixin_info.model_card_data.to_yaml().strip()
    values["kind"], folder = type(network).__name__, Path(__file__).parent
    rows = [f"| {name} | {value:.1e} |" for name, value in differences.items()]
    values["differences"] = "\n".join(rows)
    if isinstance(network, PointEncoder):
        values |= {"width": encoder.width, "vector_width": 2 * encoder.width}
        values |= {"kind_name": "encoder", "first": "embedding"}
        outputs = (folder / "card_encoder.md").read_text().strip()
        values["outputs"] = outputs.format(**values)
        values["more"] = (folder / "card_patches.md").read_text().format(**values)
    else:
        names = network.class_names
        values |= {"kind_name": "classifier", "first": "logits"}
        classes = f"[batch, {len(names)}] of the classes {', '.join(names)}"
        values["outputs"] = f"Output: `logits` {classes}."
        values["more"] = ""
    return (folder / "card.md").read_text().format(**values)
