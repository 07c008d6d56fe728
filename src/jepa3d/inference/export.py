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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCardData
from rich.progress import track
from torch import Tensor, nn

from jepa3d import frame
from jepa3d.inference.graph_frame import prepared
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier, LinearClassifier, Segmenter
from jepa3d.models.ready import fingerprint, load_any
from jepa3d.models.tokenizer import group

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  what torch.onnx needs
except ImportError as error:
    raise ValueError("export needs ONNX: pip install 'jepa3d[export]'") from error

RTOL, ATOL = 1e-4, 1e-5
MAX_POINTS = 10**6  # of a cloud, as declared to torch.export
BATCHES = (1, 2, 7)

Network = PointEncoder | Classifier | LinearClassifier
Run = Callable[..., list[np.ndarray]]  # an exported file: arrays to arrays


@dataclass(frozen=True)
class Graph:
    """One graph: files of what name it becomes, its module, and what it must agree with."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arrays: Callable[[Tensor], tuple[np.ndarray, ...]]  # inputs of clouds B N 3
    expected: Callable[[Tensor], tuple[Tensor, ...]]  # outputs of them, by the network itself


class FromPoints(nn.Module):
    """Clouds B N 3 in any unit to vectors B E, tokens B M C and centers B M 3."""

    def __init__(self, encoder: PointEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, points: Tensor) -> tuple[Tensor, ...]:
        grouped = group(
            prepared(self.encoder, points), self.encoder.num_groups, self.encoder.group_size
        )
        tokens = self.encoder.features(grouped.patches, grouped.centers)[0]
        return self.encoder.pool(tokens), tokens, grouped.centers


class FromPatches(nn.Module):
    """Patches B M K 3 and centers B M 3 to vectors B E and tokens B M C."""

    def __init__(self, encoder: PointEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, patches: Tensor, centers: Tensor) -> tuple[Tensor, ...]:
        tokens = self.encoder.features(patches, centers)[0]
        return self.encoder.pool(tokens), tokens


class ToClasses(nn.Module):
    """Clouds B N 3 in any unit to logits B classes."""

    def __init__(self, network: Classifier | LinearClassifier):
        super().__init__()
        self.network = network

    def forward(self, points: Tensor) -> tuple[Tensor, ...]:
        return (self.network(prepared(self.network.encoder, points)),)


def export(model: str, out: Path) -> None:
    """Write the folder `out`; `model` as of `jepa3d.load`, or a classifier's run or folder.

    Raises ValueError for a model that cannot be had or exported, an `out` that exists, or a graph
    whose results differ from torch's; then nothing is left.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another --out")
    network = _load(model).float()
    encoder = network if isinstance(network, PointEncoder) else network.encoder
    if (
        needed := 1 + encoder.num_points // encoder.min_points
    ) > encoder.min_points:  # no graph has such a `fill`
        raise ValueError(
            f"{model}: cannot be exported: num_groups or group_size would have to be at least {needed}"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        differences = _write(network, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for name, difference in differences.items():
        print(
            f"{name}: differs from torch by at most {difference:.1e} (batches of 1, 2 and 7 clouds)"
        )
    print(f"written: {out}, {', '.join(sorted(file.name for file in out.iterdir()))}")


def _load(model: str) -> Network:
    network = load_any(model)
    if isinstance(network, Segmenter):
        raise ValueError(
            f"{model}: a network that segments; only encoders and classifiers are exported"
        )
    return network


def _graphs(network: Network) -> list[Graph]:
    if not isinstance(network, PointEncoder):
        outputs = ("logits",)
        return [
            Graph(
                "classifier",
                ToClasses(network),
                ("points",),
                outputs,
                _points,
                lambda x: (network.predict(x),),
            )
        ]

    def expected(points: Tensor) -> tuple[Tensor, ...]:
        tokens, centers = network.tokens(points)
        return network.pool(tokens), tokens, centers

    def patches(points: Tensor) -> tuple[np.ndarray, ...]:
        sizes = network.num_points, network.num_groups, network.group_size
        parts = zip(*(frame.group(cloud, *sizes) for cloud in points.numpy()), strict=True)
        return tuple(np.stack(part) for part in parts)

    vector = ("embedding", "tokens")
    return [
        Graph("encoder", FromPoints(network), ("points",), (*vector, "centers"), _points, expected),
        Graph("patches", FromPatches(network), ("patches", "centers"), vector, patches, expected),
    ]


def _points(points: Tensor) -> tuple[np.ndarray, ...]:
    return (points.numpy(),)


@torch.no_grad()
def _write(network: Network, folder: Path) -> dict[str, float]:
    """Every file of the folder; of each graph's file the largest difference from torch."""
    encoder, differences = network if isinstance(network, PointEncoder) else network.encoder, {}
    properties = {
        name: str(getattr(encoder, name)) for name in ("num_points", "num_groups", "group_size")
    }
    if isinstance(network, PointEncoder):
        properties["fingerprint"] = fingerprint(network)
        shutil.copyfile(frame.__file__, folder / "grouping.py")
    else:
        properties["class_names"] = json.dumps(network.class_names)
    for graph in track(_graphs(network), "exporting", transient=True):
        with _quiet():
            program = _program(graph, encoder)
            _write_onnx(program, graph, properties, folder / f"{graph.name}.onnx")
            files = {f"{graph.name}.onnx": _run_onnx}
            if graph.inputs == ("points",):
                torch.export.save(program, folder / f"{graph.name}.pt2")
                files[f"{graph.name}.pt2"] = _run_pt2
        for name, opened in files.items():
            differences[name] = _difference(graph, encoder, name, opened(folder / name, graph))
    network.save_pretrained(folder)
    (folder / "README.md").write_text(_card(network, encoder, differences), encoding="utf-8")
    return differences


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnxscript say about themselves: a missing torchvision, deprecations,
    each folded node.
    """
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _program(graph: Graph, encoder: PointEncoder) -> torch.export.ExportedProgram:
    clouds = torch.rand(
        2, encoder.num_points + 8, 3, generator=torch.Generator()
    )  # a batch of 1 becomes a constant
    arrays = graph.arrays(clouds)
    batch = torch.export.Dim("batch", min=1)
    points = torch.export.Dim("num_points", min=encoder.min_points, max=MAX_POINTS)
    shapes = {
        name: {0: batch, 1: points} if name == "points" else {0: batch} for name in graph.inputs
    }
    # Not strict, torch would take the `len` of a tensor for a constant.
    return torch.export.export(
        graph.module, tuple(map(torch.from_numpy, arrays)), dynamic_shapes=shapes, strict=True
    )


def _write_onnx(
    program: torch.export.ExportedProgram, graph: Graph, properties: dict[str, str], file: Path
) -> None:
    names = {"input_names": graph.inputs, "output_names": graph.outputs}
    made = torch.onnx.export(program, (), dynamo=True, external_data=False, verbose=False, **names)
    assert made is not None
    proto = made.model_proto
    onnx.helper.set_model_props(proto, properties)
    _name_axes(proto.graph)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, file)


def _run_onnx(file: Path, graph: Graph) -> Run:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda *arrays: list(
        map(np.asarray, session.run(graph.outputs, dict(zip(graph.inputs, arrays, strict=True))))
    )


def _run_pt2(file: Path, graph: Graph) -> Run:
    module = torch.export.load(file).module()
    return lambda *arrays: [output.numpy() for output in module(*map(torch.from_numpy, arrays))]


def _name_axes(graph) -> None:
    """Torch's symbols, such as s77, by names in every shape."""
    names = {}
    for dim, name in zip(
        graph.input[0].type.tensor_type.shape.dim, ("batch", "num_points"), strict=False
    ):
        if dim.dim_param:
            names[dim.dim_param] = name
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), dim.dim_param)


def _difference(graph: Graph, encoder: PointEncoder, name: str, run: Run) -> float:
    """The largest difference of a file's results from torch's.

    Raises ValueError beyond the tolerance.
    """
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for batch, count in zip(
        BATCHES, (encoder.min_points, encoder.num_points, 2 * encoder.num_points), strict=True
    ):
        points = torch.randn(batch, count, 3, generator=generator) * 30 + 100
        for key, found, wanted in zip(
            graph.outputs, run(*graph.arrays(points)), graph.expected(points), strict=False
        ):
            difference = float(np.abs(found - wanted.numpy()).max())
            if not np.allclose(found, wanted.numpy(), RTOL, ATOL):
                raise ValueError(
                    f"{name}: {key} of {batch} clouds differs from torch by {difference:.1e}; not exported"
                )
            largest = max(largest, difference)
    return largest


_CARD = """\
---
{front}
---

# {title}

Exported by jepa3d. *To add before you publish: what it was trained on, and how well it does.*

Input `points`: float32 [batch, num_points, 3], any unit, z up as in training, at least {min_points} different
points a cloud (for fewer the runtime raises). All clouds of a batch have equally many points.

{outputs}

| file | largest difference from torch, batches of 1, 2 and 7 clouds |
|---|---|
{differences}

```python
import numpy as np, onnxruntime

session = onnxruntime.InferenceSession("{name}.onnx")
cloud = np.random.rand(2 * {num_points}, 3).astype(np.float32)
{first} = session.run(["{first}"], {{"points": cloud[None]}})[0]
```

The same in torch without jepa3d: `torch.export.load("{name}.pt2").module()(points)`. With it:
`{kind}.from_pretrained(folder)`. Where points are equally far apart (regular grids), each runtime may take others of
them, and results differ by more than above.
{more}"""

_PATCHES = """
`patches.onnx` is the network alone, without sampling and in float32 throughout, for accelerators and for clouds of
unequal size. `grouping.py` needs numpy only and makes its inputs:

```python
from grouping import group

patches, centers = group(cloud, num_points={num_points}, num_groups={num_groups}, group_size={group_size})
session = onnxruntime.InferenceSession("patches.onnx")
embedding = session.run(["embedding"], {{"patches": patches[None], "centers": centers[None]}})[0]
```
"""


def _card(network: Network, encoder: PointEncoder, differences: dict[str, float]) -> str:
    data: ModelCardData = type(network)._hub_mixin_info.model_card_data
    sizes = {
        name: getattr(encoder, name)
        for name in ("min_points", "num_points", "num_groups", "group_size")
    }
    if isinstance(network, PointEncoder):
        shape = f"[batch, {encoder.num_groups}, {encoder.width}]"
        outputs = f"Outputs: `embedding` [batch, {2 * encoder.width}] (mean and max of the tokens), `tokens` {shape}, "
        outputs += (
            f"`centers` [batch, {encoder.num_groups}, 3] of the tokens in the cloud's unit sphere."
        )
        parts = {"title": "Point cloud encoder", "name": "encoder", "first": "embedding"}
    else:
        names = network.class_names
        outputs = f"Output: `logits` [batch, {len(names)}] of the classes {', '.join(names)}."
        parts = {"title": "Point cloud classifier", "name": "classifier", "first": "logits"}
    return _CARD.format(
        front=data.to_yaml().strip(),
        outputs=outputs,
        kind=type(network).__name__,
        **parts,
        **sizes,
        differences="\n".join(f"| {name} | {value:.1e} |" for name, value in differences.items()),
        more=_PATCHES.format(**sizes) if isinstance(network, PointEncoder) else "",
    )
