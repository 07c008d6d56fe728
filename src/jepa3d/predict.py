"""A fine-tuned network on files: a CSV of classes, or coloured PLYs of parts in the files' own
coordinates.
"""

import colorsys
import csv
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from jepa3d.data.cloud import PointCloud, ReadError
from jepa3d.data.errors import left_out
from jepa3d.data.io import sampled
from jepa3d.data.ply import header_of
from jepa3d.data.sources import discover
from jepa3d.evaluation.partseg import restricted_argmax
from jepa3d.models.heads import UNKNOWN, Classifier, LinearClassifier, Segmenter
from jepa3d.models.ready import load_network
from jepa3d.plain import printable, write_bytes

Network = Classifier | LinearClassifier | Segmenter
_CHUNK = 2**16  # points segmented at once


def predict_files(
    run: Path, paths: list[Path], out: Path, category: str | None = None, up_axis: str = "z"
) -> None:
    """Classify every cloud at `paths` into the CSV `out`, or segment it into a PLY in the folder
    `out`.

    Files that cannot be used are named and left out. Raises ValueError for a network, category or
    output that cannot work, and ReadError where no file can be used.
    """
    network = load_network(run)
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another --out")
    if missing := [path for path in paths if not path.exists()]:
        raise ReadError(f"{missing[0]}: no such file or folder")
    label = _category(network, category) if isinstance(network, Segmenter) else 0
    if isinstance(network, Segmenter):
        written = len(
            _of_each(
                paths, network, lambda n, cloud: _segment(network, n, cloud, label, out, up_axis)
            )
        )
        what = f"{written:,} PLY files"
    else:
        rows = _of_each(
            paths, network, lambda n, c: [n, *classify_cloud(network, c, c.to_z_up(up_axis))]
        )
        written, what = len(rows), f"{len(rows):,} rows"
        buffer = io.StringIO()
        csv.writer(buffer).writerows(
            [["file", "class", "probability", "second", "second_probability"], *rows]
        )
        if rows:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(out, buffer.getvalue().encode("utf-8", "surrogateescape"))
    if not written:
        raise ReadError(f"{paths[0]}: none of the clouds can be used")
    print(f"written: {out}, {what}")


def _category(network: Segmenter, category: str | None) -> int:
    names = network.class_names
    if category is None and len(names) > 1:
        raise ValueError(f"--category is missing: one of {', '.join(names)}")
    if category is not None and category not in names:
        raise ValueError(f"--category {category}: one of {', '.join(names)}")
    return names.index(category) if category else 0


def _of_each(
    paths: Iterable[Path], network: Network, work: Callable[[str, PointCloud], Any]
) -> list:
    """What `work` makes of the name and cloud (of a mesh, samples) of all that can be used; says
    once what cannot.
    """
    made, count, seen = [], 0, set()
    for path in paths:
        source = discover(path)
        entries = source.entries
        for key, reason in source.skipped:
            print(left_out(str(path / key), reason))
        count += len(source.skipped)
        for entry in track(entries, f"reading {path}", transient=True, disable=len(entries) < 20):
            name = (
                str(path / entry.key)
                if path.is_dir()
                else str(path) + entry.key.removeprefix(path.name)
            )
            if os.path.abspath(name) in seen:
                continue
            seen.add(os.path.abspath(name))
            try:
                cloud = entry.read()
                for remark in cloud.remarks():
                    print(printable(f"{name}: {remark}"))
                made.append(work(name, sampled(cloud, network.encoder.num_points)))
            except (
                ValueError,
                OSError,
            ) as error:  # ReadError, and what the encoder's frame refuses
                print(left_out(name, str(error)))
                count += 1
    if count:
        print(f"left out {count:,}")
    return made


@torch.no_grad()
def classify_cloud(
    network: Classifier | LinearClassifier, cloud: PointCloud, axes: np.ndarray
) -> tuple[str, float | str, str, float]:
    """The two most probable classes of a cloud, each with its probability; `axes` turns it z-up.

    Of a cloud unlike every class: `UNKNOWN`, an empty probability, then the most probable class.
    """
    points, unknown = network.encoder.prepare(cloud.points @ axes.T), False
    if isinstance(network, LinearClassifier):
        vectors = network.vectors(points)
        unknown, logits = bool(network.unknown(vectors)), network.out(vectors)
    else:
        logits = network(points)
    value, index = logits[0].softmax(-1).topk(2)
    (first, second), (a, b) = (network.class_names[i] for i in index), value.tolist()
    return (
        (UNKNOWN, "", first, round(a, 4)) if unknown else (first, round(a, 4), second, round(b, 4))
    )


@torch.no_grad()
def segment_cloud(
    network: Segmenter, cloud: PointCloud, label: int, axes: np.ndarray
) -> np.ndarray:
    """The part N int16 of every point of a cloud of category `label`, however many points the
    network encodes.
    """
    points = cloud.points @ axes.T
    seen, number = network.encoder.frame(points), torch.tensor([label])
    parts_of = [np.array(parts) for parts in network.parts_of]
    encoded = network.encode(torch.from_numpy(seen.points)[None])
    logits = (
        network.decode(
            torch.from_numpy(seen.place(points[at : at + _CHUNK]))[None], *encoded, number
        )
        for at in range(0, len(points), _CHUNK)
    )
    return np.concatenate(
        [restricted_argmax(part.numpy(), number.numpy(), parts_of)[0] for part in logits]
    )


def _segment(
    network: Segmenter, name: str, cloud: PointCloud, label: int, out: Path, up_axis: str
) -> int:
    parts = segment_cloud(network, cloud, label, cloud.to_z_up(up_axis))
    colors = part_colors(network.parts_of[label])
    kinds = {**dict.fromkeys("xyz", "<f8"), **dict.fromkeys(("red", "green", "blue"), "u1")}
    rows = np.empty(len(cloud), [*kinds.items(), ("part", "<i2")])
    rows["x"], rows["y"], rows["z"] = cloud.file_coordinates().T
    rows["red"], rows["green"], rows["blue"] = np.array([colors[part] for part in parts.tolist()]).T
    rows["part"] = parts
    used = [f"part {part} {network.part_names[part]}" for part in network.parts_of[label]]
    file = out / (Path(name).name.replace("#", "-") + ".ply")
    while file.exists():  # files of one name in different folders
        file = file.with_name(f"_{file.name}")
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(file, header_of(rows.dtype, len(rows), used) + rows.tobytes())
    return 1


def part_colors(parts: list[int]) -> dict[int, tuple[int, int, int]]:
    """A colour a part, evenly spaced in hue."""
    hues = [colorsys.hsv_to_rgb(i / len(parts), 0.75, 0.95) for i in range(len(parts))]
    return {
        part: (round(255 * r), round(255 * g), round(255 * b))
        for part, (r, g, b) in zip(parts, hues, strict=True)
    }
