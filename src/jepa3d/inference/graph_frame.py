"""`frame.py` for batches, as operations that torch.export and ONNX can hold: no loop of unknown
length, and always the same number of points.

A point that is left out is moved onto another one, where farthest point sampling never picks it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa3d import frame
from jepa3d.models.encoder import PointEncoder
from jepa3d.ops import farthest_point_scan, gather_points, squared_distance, unit_sphere


def prepared(encoder: PointEncoder, points: Tensor) -> Tensor:
    """`frame` and its `fill` for clouds B N 3, as operations of a graph, which cannot hold their
    checks.
    """
    points = without_strays(points.double(), encoder.min_points)
    points = points - (points.amin(1, True) + points.amax(1, True)) / 2
    points = (points / points.abs().amax((1, 2), True)).float()
    device, min_points = points.device, encoder.min_points
    # In a graph a number still open.
    count: Any = torch.sym_min(points.shape[1], encoder.num_points)
    start = squared_distance(points, points.new_zeros(1, 3))[..., 0].argmax(1)
    order, apart = farthest_point_scan(points, count, start)
    chosen, different = gather_points(points, order), (apart > 0).sum(1, keepdim=True)
    row = torch.arange(encoder.num_points, device=device) % different
    # Out of bounds where there are too few: the runtime raises.
    row = torch.where(different < min_points, 2**30, row)
    source = gather_points(chosen, row)
    # Most clouds have enough points, and distances of all pairs cost.
    copied = (different < encoder.num_points).any()
    # Turns, and a point itself.
    most: Any = torch.sym_min(count, 1 + encoder.num_points // min_points)

    def moved(chosen: Tensor, different: Tensor, source: Tensor) -> Tensor:
        # The other points are copies of these.
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
    """Clouds B N 3, in double, with every stray (`frame.without_strays`) moved onto a point that is
    none.
    """
    points = points - (points.amin(1, True) + points.amax(1, True)) / 2
    weights = points.new_tensor([1, 2**0.5, torch.pi])
    points = gather_points(points, (points * weights).sum(-1).argsort(1))
    first = (points[:, 1:] != points[:, :-1]).any(-1)
    # A point that is there several times counts once.
    first = torch.cat([torch.ones_like(first[:, :1]), first], 1)
    different, kept, side = first.sum(1, keepdim=True), first, frame.MAX_CELLS
    for _ in range(frame.ROUNDS):
        number = kept.sum(1, keepdim=True).double()
        cells = (3 * number).pow(1 / 3).round().clamp(2, side)
        box = _onto_one(points, kept)
        low = box.amin(1, True)
        width = (box.amax(1, True) - low).amax(2, True).clamp_min(1e-30)
        place = (points - low) * ((cells - 1e-6)[..., None] / width)
        place = place.clamp(0, side - 1).long()
        cell = (place[..., 0] * side + place[..., 1]) * side + place[..., 2]
        count = points.new_zeros(points.shape[0], side**3)
        count = count.scatter_add(1, cell, kept.double())
        count = count.view(-1, side, side, side)
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
    """Points B N 3 with those that are not kept, B N, moved onto one that is."""
    place = torch.arange(points.shape[1], device=points.device)
    first = kept.long().argmax(1, keepdim=True)
    return gather_points(points, torch.where(kept, place, first))
