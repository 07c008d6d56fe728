"""Measure how often a search with a damaged scan finds the undamaged shape first.

    python benchmarks/dirty.py --data $JEPA3D_DATA --out dirty

The search is among all test shapes of ModelNet10 and PSB (Princeton Shape Benchmark), z up. Of
these, 100 are chosen with a fixed seed; a copy of each is damaged in one way and is a query. The
script writes files, and runs the commands `jepa3d embed` and `jepa3d search` on them. For each kind
of damage, it prints for how many queries the nearest shape is the undamaged one.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

# file of labelled clouds in the folder --data -> its up axis
SETS = {"modelnet10/modelnet10_1024.npz": "z", "psb/psb_2048.npz": "y"}
Damage = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def direction(rng: np.random.Generator, count: int = 1) -> np.ndarray:
    """Sample random unit vectors [count, 3]."""
    way = rng.normal(size=(count, 3))
    return way / np.linalg.norm(way, axis=1, keepdims=True)


def strays(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move 5 % of the points to random places in a ball of 1.5 radii, and add a point at 3 radii."""
    count = len(cloud) // 20
    ball = 1.5 * direction(rng, count) * rng.random((count, 1)) ** (1 / 3)
    return np.concatenate([cloud[count:], ball, 3 * direction(rng)])


def half(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Remove the half of the points that lies beyond a plane with a random normal."""
    place = cloud @ direction(rng)[0]
    return cloud[place < np.median(place)]


def sparse(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keep 256 random points."""
    return cloud[rng.permutation(len(cloud))[:256]]


def turned(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate by a random angle about z."""
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    return cloud @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


def jittered(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add normal noise of 1 % of the radius to every coordinate."""
    return cloud + rng.normal(scale=0.01, size=cloud.shape)


def holed(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Set a fifth of the rows to NaN, as scanners do for rays without an echo."""
    cloud = cloud.copy()
    cloud[rng.random(len(cloud)) < 0.2] = np.nan
    return cloud


DAMAGE: dict[str, Damage] = {
    "strays": strays,
    "half": half,
    "256 points": sparse,
    "turned": turned,
    "jittered": jittered,
    "NaN rows": holed,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument(
        "--part",
        choices=["train", "test"],
        default="test",
        help="split of the shapes; use train to try things out",
    )
    arguments = parser.parse_args()
    out, rng = arguments.out, np.random.default_rng(0)
    (out / "gallery").mkdir(parents=True)
    (out / "queries").mkdir()
    shapes: list[tuple[str, np.ndarray]] = []
    for name, up in SETS.items():
        bundle = np.load(arguments.data / name)
        clouds = bundle["points"][bundle["split"] == (arguments.part == "test")].astype(np.float32)
        clouds = (
            clouds @ np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32)
            if up == "y"
            else clouds
        )
        clouds /= np.linalg.norm(clouds - clouds.mean(1, keepdims=True), axis=2).max(1)[
            :, None, None
        ]
        file = out / "gallery" / f"{Path(name).stem}.npy"
        np.save(file, clouds)
        shapes += [(f"{file.name}#{i}", cloud - cloud.mean(0)) for i, cloud in enumerate(clouds)]
    wanted = {}
    for i, row in enumerate(rng.permutation(len(shapes))[: arguments.queries]):
        kind = list(DAMAGE)[i % len(DAMAGE)]
        name, cloud = shapes[row]
        query = out / "queries" / f"{i:03d} {kind}.xyz"
        scanned = 25 * DAMAGE[kind](cloud.astype(float), rng) + (
            4000,
            -700,
            90,
        )  # in the coordinates of a scanner
        np.savetxt(query, scanned[rng.permutation(len(scanned))], fmt="%.4f")
        wanted[query.name] = name, kind
    jepa3d = [sys.executable, "-c", "from jepa3d.cli import main; main()"]
    index = str(out / "gallery.parquet")
    subprocess.run(
        [*jepa3d, "embed", str(out / "gallery"), "--out", index, "--model", arguments.model],
        check=True,
    )
    asked = [*jepa3d, "search", index, str(out / "queries"), "-k", "1", "--json"]
    lines = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()
    answers = [json.loads(line) for line in lines if line.startswith("{")]
    right, asked_of = Counter(), Counter(kind for _, kind in wanted.values())
    for answer in answers:
        name, kind = wanted[Path(answer["query"]).name]
        right[kind] += Path(answer["hits"][0]["path"]).name == name
    for kind, count in asked_of.items():
        print(f"{kind}: {right[kind]} of {count}")
    print(f"all: {right.total()} of {len(wanted)} queries, among {len(shapes):,} shapes")


if __name__ == "__main__":
    main()
