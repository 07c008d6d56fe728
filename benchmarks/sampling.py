"""Measure farthest point sampling and the search for nearest neighbours. (Their share of a training
step is measured by parts.py.)

    python benchmarks/sampling.py                                # some 2 minutes
    python benchmarks/sampling.py --rounds 3 --json numbers.json

The script prints milliseconds per cloud on one thread, for random clouds. Implementations run in
turn, and times are medians over rounds. "jepa3d" is what a user gets: `ops.farthest_point_sample`,
which uses torch-quickfps if it is installed, and `ops.knn`. Other libraries are measured if they
are installed: `pip install fpsample torch-fps` (torch-fps is compiled with ninja at its first
call); torch-cluster and pytorch3d are built from source.

In the table of farthest points, "exact" is yes if the indices are the same as those of the textbook
loop from the same start, and ties if they differ only where several points are equally far. All
implementations start at the first point of a cloud. In the clouds made here, this is the point
farthest from the centroid, where `farthest_point_sample` starts. In the table of neighbours,
"exact" is the share of queries with the same set of neighbours as in scipy's tree, which computes
distances in float64.
"""

import argparse
import importlib
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import machine, random_clouds
from scipy.spatial import KDTree
from torch import Tensor

from jepa3d import ops
from jepa3d.allocator import keep_large_blocks

BATCH, NEIGHBOURS = 128, 32
FPS = {
    (1024, 64): 32,
    (2048, 128): 16,
    (8192, 512): 4,
    (8192, 1024): 4,
    (100_000, 4096): 1,
}  # (points, samples) -> number of clouds, sampled one at a time
KNN = {
    (1024, 64): 32,
    (2048, 128): 32,
    (100_000, 4096): 1,
}  # (points, queries) -> clouds in one batch
OTHERS = ("torch_quickfps", "fpsample", "torch_fps", "torch_cluster", "pytorch3d")
INSTALLED = {
    name: importlib.import_module(name) for name in OTHERS if importlib.util.find_spec(name)
}

# name of an implementation -> number of clouds per call, and the function to call
Contenders = dict[str, tuple[int, Callable[[], Tensor]]]


def starting_farthest(count: int, num_points: int) -> Tensor:
    """Make random clouds whose first point is the one farthest from the centroid."""
    points = random_clouds(count, num_points)
    for cloud, farthest in zip(
        points, ops.farthest_point_sample(points, 1)[:, 0].tolist(), strict=True
    ):
        cloud[[0, farthest]] = cloud[[farthest, 0]]
    return points


def textbook(points: Tensor, num_samples: int) -> Tensor:
    """Sample farthest points of a cloud N 3, as ports of PointNet++ to torch do.

    The ports update the distances with a mask, which is slower than the `minimum` used here.
    """
    distance = torch.full((len(points),), torch.inf)
    picked, current = torch.zeros(num_samples, dtype=torch.long), torch.tensor(0)
    for i in range(num_samples):
        picked[i] = current
        distance = torch.minimum(distance, ((points - points[current]) ** 2).sum(-1))
        current = distance.argmax()
    return picked


def samplers(points: Tensor, num_samples: int, few: int) -> Contenders:
    """Return all implementations of farthest point sampling.

    few: number of clouds for implementations that take one cloud at a time. Those of jepa3d also
    take all `points` as one batch.
    """
    num_points, start = points.shape[1], torch.zeros(len(points), dtype=torch.long)
    reference, sample = ops._farthest_point_sample_reference, ops.farthest_point_sample

    def singly(run: Callable[[Tensor], Tensor]) -> tuple[int, Callable[[], Tensor]]:
        return few, lambda: torch.cat([run(cloud).view(1, -1) for cloud in points[:few].split(1)])

    def in_numpy(run: Callable, *options: int) -> tuple[int, Callable[[], Tensor]]:
        arrays = list(points[:few].numpy())
        return few, lambda: torch.from_numpy(
            np.stack([run(cloud, num_samples, *options, start_idx=0) for cloud in arrays]).astype(
                np.int64
            )
        )

    found: Contenders = {
        "textbook loop in torch": singly(lambda cloud: textbook(cloud[0], num_samples)),
        "jepa3d, reference": singly(lambda cloud: reference(cloud, num_samples, start[:1])),
        "jepa3d": singly(lambda cloud: sample(cloud, num_samples)),
    }
    if len(points) == BATCH:
        found[f"jepa3d, reference, batch {BATCH}"] = (
            BATCH,
            lambda: reference(points, num_samples, start),
        )
        found[f"jepa3d, batch {BATCH}"] = BATCH, lambda: sample(points, num_samples)
    if quick := INSTALLED.get("torch_quickfps"):
        found["torch_quickfps"] = singly(
            lambda cloud: quick.sample_idx(cloud, num_samples, start_idx=0)
        )
    if fpsample := INSTALLED.get("fpsample"):
        height = (
            3 if num_points < 8192 else 5 if num_points < 100_000 else 7
        )  # its documentation recommends 3 for small clouds, 5 or 7 for larger, 9 for the largest
        found["fpsample, bucket_fps_kdline_sampling"] = in_numpy(
            fpsample.bucket_fps_kdline_sampling, height
        )
        found["fpsample, fps_sampling"] = in_numpy(fpsample.fps_sampling)
    if torch_fps := INSTALLED.get("torch_fps"):
        run, valid = torch_fps.farthest_point_sampling, torch.ones(1, num_points, dtype=torch.bool)
        found["torch_fps"] = singly(
            lambda cloud: run(cloud, valid, num_samples, start_idx=start[:1])
        )
    if cluster := INSTALLED.get("torch_cluster"):
        ratio = num_samples / num_points  # rounding may give one sample too many, which is cut off
        found["torch_cluster"] = singly(
            lambda cloud: cluster.fps(cloud[0], None, ratio, False)[:num_samples]
        )
    if "pytorch3d" in INSTALLED:
        from pytorch3d.ops import sample_farthest_points

        found["pytorch3d"] = singly(lambda cloud: sample_farthest_points(cloud, K=num_samples)[1])
    return found


def searches(points: Tensor, centers: Tensor) -> Contenders:
    """Return all implementations of the search for the NEIGHBOURS nearest `points` of `centers`."""
    batch, num_points, _ = points.shape

    def scipy() -> Tensor:
        pairs = zip(points.numpy(), centers.numpy(), strict=True)
        return torch.from_numpy(
            np.stack([KDTree(cloud).query(query, NEIGHBOURS)[1] for cloud, query in pairs])
        )

    found: Contenders = {
        "scipy KDTree, build and query": (batch, scipy),
        "torch.cdist and topk": (
            batch,
            lambda: torch.cdist(centers, points).topk(NEIGHBOURS, largest=False).indices,
        ),
        "jepa3d": (batch, lambda: ops.knn(centers, points, NEIGHBOURS)),
    }
    if cluster := INSTALLED.get("torch_cluster"):
        of_point, of_center = (
            torch.arange(batch).repeat_interleave(x.shape[1]) for x in (points, centers)
        )
        flat = points.flatten(0, 1), centers.flatten(0, 1), NEIGHBOURS, of_point, of_center
        found["torch_cluster"] = (
            batch,
            lambda: cluster.knn(*flat)[1].view(batch, -1, NEIGHBOURS) % num_points,
        )
    return found


def exactness(points: Tensor, indices: Tensor, expected: Tensor) -> str:
    """Compare indices with the expected ones: yes, ties or no, as explained at the top."""
    if torch.equal(indices, expected):
        return "yes"
    if not torch.equal(indices[:, 0], expected[:, 0]):
        return "no"
    for cloud, picked in zip(points, indices, strict=True):
        distance = torch.full((len(cloud),), torch.inf)
        for current in picked:
            if distance[current] < distance.max():
                return "no"
            distance = torch.minimum(distance, ((cloud - cloud[current]) ** 2).sum(-1))
    return "ties"


def interleaved(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """Time implementations in turn. Returns the milliseconds per cloud of each in every round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (count, run) in contenders.items():
            began = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - began) * 1000 / count)
    return times


def farthest_points(rounds: int) -> dict[str, dict]:
    """Return the times and the exactness of every implementation, by size.

    The first call of each, whose result is checked, isn't timed.
    """
    figures = {}
    for (num_points, num_samples), few in FPS.items():
        points = starting_farthest(BATCH if num_points < 100_000 else few, num_points)
        contenders = samplers(points, num_samples, few)
        expected = torch.stack([textbook(cloud, num_samples) for cloud in points[:few]])
        exact = {
            name: exactness(points[:few], run()[:few], expected)
            for name, (_, run) in contenders.items()
        }
        figures[f"{num_points:,} -> {num_samples:,}"] = {
            "ms": interleaved(contenders, rounds),
            "exact": exact,
        }
    return figures


def neighbours(rounds: int) -> dict[str, dict]:
    """Return the times and the share of exact queries of every implementation, by size."""
    figures = {}
    for (num_points, num_queries), batch in KNN.items():
        points = starting_farthest(batch, num_points)
        contenders = searches(
            points, ops.gather_points(points, ops.farthest_point_sample(points, num_queries))
        )
        found = {name: run().sort(-1).values for name, (_, run) in contenders.items()}
        expected = next(iter(found.values()))
        exact = {
            name: (index == expected).all(-1).double().mean().item()
            for name, index in found.items()
        }
        size = f"{num_queries:,} x {NEIGHBOURS} of {num_points:,}"
        figures[size] = {"ms": interleaved(contenders, rounds), "exact": exact}
    return figures


def milliseconds(times: list[float] | None) -> str:
    """Format the median with three digits; return a dash if nothing was measured."""
    if times is None:
        return "-"
    middle = median(times)
    return f"{middle:,.0f}" if middle >= 100 else f"{middle:#.3g}"


def print_table(figures: dict[str, dict], exact: Callable[[list], str]) -> None:
    """Print a row per implementation and a column per size.

    exact: returns one word for the exactness of an implementation at all sizes.
    """
    print(f"| ms per cloud | {' | '.join(figures)} | exact |\n|{'---|' * (len(figures) + 2)}")
    for name in next(iter(figures.values()))["ms"]:
        cells = [milliseconds(part["ms"].get(name)) for part in figures.values()]
        of_sizes = [part["exact"][name] for part in figures.values() if name in part["exact"]]
        print(f"| {name} | {' | '.join(cells)} | {exact(of_sizes)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers of every round to this file")
    arguments = parser.parse_args()
    keep_large_blocks()  # for all implementations, as the command line does
    torch.set_num_threads(1)
    sampled = farthest_points(arguments.rounds)
    print(f"\nFarthest point sampling: {machine()}; median of {arguments.rounds} rounds\n")
    print_table(
        sampled, lambda words: next(word for word in ("no", "ties", "yes") if word in words)
    )
    size, part = list(sampled.items())[-1]
    ratio = median(
        a / b
        for a, b in zip(part["ms"]["textbook loop in torch"], part["ms"]["jepa3d"], strict=True)
    )
    print(f"\n{size}: jepa3d is {ratio:.0f} times as fast as the textbook loop.")
    print(
        f"Not installed: {', '.join(name for name in OTHERS if name not in INSTALLED) or 'none'}."
    )

    searched = neighbours(arguments.rounds)
    print(f"\nNearest neighbours: {machine()}; median of {arguments.rounds} rounds\n")
    print_table(
        searched,
        lambda shares: "yes" if min(shares) == 1 else f"{100 * min(shares):.2f} % of queries",
    )

    if arguments.json:
        figures = {"machine": machine(), "sampling": sampled, "neighbours": searched}
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
