"""`frame.py` for batches, as operations that torch.export and ONNX can hold: no loop of open
length, no point less.

A point that does not count is put where another is: farthest point sampling never picks it.
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
    count: Any = torch.sym_min(
        points.shape[1], encoder.num_points
    )  # in a graph a number still open
    order, apart = farthest_point_scan(
        points, count, squared_distance(points, points.new_zeros(1, 3))[..., 0].argmax(1)
    )
    chosen, different = gather_points(points, order), (apart > 0).sum(1, keepdim=True)
    row = torch.arange(encoder.num_points, device=points.device) % different
    row = torch.where(
        different < encoder.min_points, 2**30, row
    )  # out of bounds: the runtime raises
    source = gather_points(chosen, row)
    copied = (
        different < encoder.num_points
    ).any()  # most clouds have enough points, and distances of all pairs cost
    most: Any = torch.sym_min(
        count, 1 + encoder.num_points // encoder.min_points
    )  # turns, and a point itself

    def moved(chosen: Tensor, different: Tensor, source: Tensor) -> Tensor:
        among = (
            torch.arange(chosen.shape[1], device=chosen.device) < different
        )  # what follows is there already
        distance = squared_distance(chosen, chosen).masked_fill(~among[:, None], torch.inf)
        nearest = distance.topk(most, largest=False).indices
        turn = torch.arange(source.shape[1], device=chosen.device)
        turn, row = turn // different, turn % different
        column = torch.where(turn > 0, 1 + (turn - 1) % (different - 1).clamp_min(1), 0)
        other = gather_points(
            chosen, gather_points(nearest, row).gather(2, column[..., None])[..., 0]
        )
        return frame.STEP * (1 - row / (4 * different))[..., None] * (source - other)

    away = torch.cond(
        copied,
        moved,
        lambda chosen, different, source: torch.zeros_like(source),
        (chosen, different, source),
    )
    return unit_sphere((source + away).double()).float()


def without_strays(points: Tensor, least: int) -> Tensor:
    """Clouds B N 3, in double, with every stray (`frame.without_strays`) moved onto a point that is
    none.
    """
    points = points - (points.amin(1, True) + points.amax(1, True)) / 2
    weights = points.new_tensor([1, 2**0.5, torch.pi])
    points = gather_points(points, (points * weights).sum(-1).argsort(1))
    first = (points[:, 1:] != points[:, :-1]).any(-1)
    first = torch.cat(
        [torch.ones_like(first[:, :1]), first], 1
    )  # a point that is there several times counts once
    different, kept, side = first.sum(1, keepdim=True), first, frame.MAX_CELLS
    for _ in range(frame.ROUNDS):
        number = kept.sum(1, keepdim=True).double()
        cells = (3 * number).pow(1 / 3).round().clamp(2, side)
        box = _onto_one(points, kept)
        low = box.amin(1, True)
        width = (box.amax(1, True) - low).amax(2, True).clamp_min(1e-30)
        place = ((points - low) * ((cells - 1e-6)[..., None] / width)).clamp(0, side - 1).long()
        cell = (place[..., 0] * side + place[..., 1]) * side + place[..., 2]
        count = points.new_zeros(points.shape[0], side**3).scatter_add(1, cell, kept.double())
        count = count.view(-1, side, side, side)
        for axis in range(3):
            padded = F.pad(count, [int(axis == other) for other in (2, 1, 0) for _ in range(2)])
            count = padded.narrow(1 + axis, 0, side) + count + padded.narrow(1 + axis, 2, side)
        few = torch.minimum(frame.ALONE * (3 * number / cells**3).clamp_min(1), number / 64)
        kept = kept & (count.flatten(1).gather(1, cell) >= few)
    enough = kept.sum(1, keepdim=True) >= ((1 - frame.MAX_STRAYS) * different).clamp_min(least)
    return _onto_one(points, kept | (first & ~enough))


def _onto_one(points: Tensor, kept: Tensor) -> Tensor:
    """Points B N 3 with those that are not kept, B N, moved onto one that is."""
    place = torch.arange(points.shape[1], device=points.device)
    return gather_points(points, torch.where(kept, place, kept.long().argmax(1, keepdim=True)))
