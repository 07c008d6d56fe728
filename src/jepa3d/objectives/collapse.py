"""Is the loss worth anything? Figures that show a collapsed or trivial representation as such."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


def rankme(rows: Tensor) -> float:
    """Effective rank of rows [n, E]: exp of the entropy of the normalised singular values (Garrido
    et al. 2023).

    Between 1 and min(n, E); 1 means that all rows lie on one line.
    """
    values = torch.linalg.svdvals(rows.float())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


@torch.no_grad()
def row_figures(name: str, rows: Tensor, max_rows: int = 2048) -> dict[str, float]:
    """Figures of rows [n, E].

    std: mean over dimensions of the std of unit-length rows, times sqrt(E): 1 is isotropic, 0 is
    collapse. cosine: mean pairwise cosine of different rows: 0 is spread, 1 is collapse. rankme:
    effective rank.
    """
    rows = _unit(rows, max_rows)
    count, width = rows.shape
    mean_square = float(rows.mean(0).square().sum())  # |mean of unit rows|^2, diagonal included
    return {
        f"{name}_std": float(rows.std(0, correction=0).mean()) * width**0.5,
        f"{name}_cosine": (mean_square * count - 1) / max(count - 1, 1),
        f"{name}_rankme": rankme(rows),
    }


@torch.no_grad()
def collapse_figures(
    prediction: Tensor, target: Tensor, unit: str = "token", max_rows: int = 2048
) -> dict[str, float]:
    """`row_figures` of predictions and targets (B A T E), each row a token or a block as the loss
    sees it.

    constant_loss: what the best constant prediction would score, so a loss near it, however low,
    says nothing was predicted.
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
    """What a least-squares polynomial of a target's position alone scores on tokens B A T E at
    centers B A T 3.

    A predictor is told where its target lies, and tokens carry their position: this much of a low
    loss needs no shape. The polynomial (35 terms at degree 4) is fitted to unit-length tokens, on
    the rows that it is scored on: n rows of noise would score about 1 - sqrt(35 / n), 0.76 for a
    batch of preset `tiny`.
    """
    rows = _unit(target.flatten(0, -2), max_rows)
    at = _spread(centers.flatten(0, -2), max_rows).to(torch.float32)
    powers = [power for power in product(range(degree + 1), repeat=3) if sum(power) <= degree]
    terms = torch.stack([at.pow(at.new_tensor(power)).prod(-1) for power in powers], -1)
    gram = terms.T @ terms + 1e-6 * len(rows) * torch.eye(len(powers), device=rows.device)
    fitted = terms @ torch.linalg.solve(gram, terms.T @ rows)
    return 1 - float(F.cosine_similarity(fitted, rows, dim=-1).mean())


def _unit(rows: Tensor, max_rows: int) -> Tensor:
    """At most `max_rows` of rows, evenly spread, at unit length."""
    return F.normalize(_spread(rows, max_rows).float(), dim=-1)


def _spread(rows: Tensor, most: int) -> Tensor:
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]
