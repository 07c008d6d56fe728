"""Metrics that reveal a collapsed representation or a trivially low loss."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


def rankme(rows: Tensor) -> float:
    """Compute the effective rank of rows [n, E] (Garrido et al. 2023): the singular values are
    divided by their sum, and the rank is exp(entropy) of these shares.

    The rank lies between 1 and min(n, E); 1 means that all rows lie on one line through the origin.
    """
    values = torch.linalg.svdvals(rows.float())
    # the two small numbers prevent division by 0 and log(0)
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


@torch.no_grad()
def row_figures(name: str, rows: Tensor, max_rows: int = 2048) -> dict[str, float]:
    """Compute three measures of collapse for rows [n, E], which are first scaled to unit length.

    name: prefix of the three keys of the result. max_rows: use at most this many rows. NAME_std is
    sqrt(E) times the standard deviation, averaged over dimensions: 1 means isotropic rows, 0 means
    collapsed rows. NAME_cosine is the mean cosine of pairs of different rows: 0 means rows that are
    spread out, 1 means collapsed rows. NAME_rankme is the effective rank (see `rankme`).
    """
    rows = _unit(rows, max_rows)
    count, width = rows.shape
    # This is the mean cosine of all n * n pairs of rows. The n pairs of a row with itself have
    # cosine 1; they are removed below.
    mean_square = float(rows.mean(0).square().sum())
    return {
        f"{name}_std": float(rows.std(0, correction=0).mean()) * width**0.5,
        f"{name}_cosine": (mean_square * count - 1) / max(count - 1, 1),
        f"{name}_rankme": rankme(rows),
    }


@torch.no_grad()
def collapse_figures(
    prediction: Tensor, target: Tensor, unit: str = "token", max_rows: int = 2048
) -> dict[str, float]:
    """Compute `row_figures` for predictions and targets, and the value `constant_loss`, which is
    the loss of the best constant prediction.

    prediction, target: [B, A, T, E], for B clouds with A target blocks of T tokens each. unit:
    whether a row is a "token" or a "block" (the tokens of a block, concatenated), as in
    `cosine_loss` (jepa.py). max_rows: use at most this many rows. A training loss near
    `constant_loss` means that nothing was learned, even if both losses are low.
    """
    rows = [
        value.flatten(0, -3).flatten(1) if unit == "block" else value.flatten(0, -2)
        for value in (prediction, target)
    ]
    figures = row_figures("prediction", rows[0], max_rows) | row_figures(
        "target", rows[1], max_rows
    )
    return figures | {"constant_loss": 1 - float(_unit(rows[1], max_rows).mean(0).norm())}


@torch.no_grad()
def position_loss(target: Tensor, centers: Tensor, degree: int = 4, max_rows: int = 2048) -> float:
    """Compute the loss of predicting target tokens [B, A, T, E] from their positions (centers
    [B, A, T, 3]) alone.

    The decoder knows the positions of its targets, and tokens depend on their positions. So a model
    can reach this loss without any knowledge of the shape. The prediction is a polynomial of the
    coordinates (35 terms at degree 4), fitted by least squares to at most `max_rows` tokens of unit
    length. It is scored on the same tokens, so the loss is too low: for n tokens of pure noise it
    should be 1, but is about 1 - sqrt(35 / n). For example, it is 0.76 for noise with n = 608, the
    number of target tokens in a batch of preset `tiny`.
    """
    rows = _unit(target.flatten(0, -2), max_rows)
    at = _spread(centers.flatten(0, -2), max_rows).to(torch.float32)
    powers = [power for power in product(range(degree + 1), repeat=3) if sum(power) <= degree]
    terms = torch.stack([at.pow(at.new_tensor(power)).prod(-1) for power in powers], -1)
    # a little ridge regularisation, so that the system can always be solved
    gram = terms.T @ terms + 1e-6 * len(rows) * torch.eye(len(powers), device=rows.device)
    fitted = terms @ torch.linalg.solve(gram, terms.T @ rows)
    return 1 - float(F.cosine_similarity(fitted, rows, dim=-1).mean())


def _unit(rows: Tensor, max_rows: int) -> Tensor:
    """Select at most `max_rows` evenly spaced rows and scale them to unit length."""
    return F.normalize(_spread(rows, max_rows).float(), dim=-1)


def _spread(rows: Tensor, max_rows: int) -> Tensor:
    """Select at most `max_rows` evenly spaced rows."""
    if len(rows) <= max_rows:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, max_rows, device=rows.device).long()]
