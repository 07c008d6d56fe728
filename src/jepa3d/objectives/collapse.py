"""Is the loss worth anything? Figures that show a collapsed or trivial representation as such."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rankme(rows: Tensor) -> float:
    """Effective rank of rows [n, E]: exp of the entropy of the normalised singular values (Garrido et al. 2023).

    Between 1 and min(n, E); 1 means that all rows lie on one line.
    """
    values = torch.linalg.svdvals(rows.float())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


@torch.no_grad()
def row_figures(name: str, rows: Tensor, max_rows: int = 2048) -> dict[str, float]:
    """Figures of rows [n, E].

    std: mean over dimensions of the std of unit-length rows, times sqrt(E): 1 is isotropic, 0 is collapse.
    cosine: mean pairwise cosine of different rows: 0 is spread, 1 is collapse. rankme: effective rank.
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
def collapse_figures(prediction: Tensor, target: Tensor, unit: str = "token", max_rows: int = 2048) -> dict[str, float]:
    """`row_figures` of predictions and targets (B A T E), each row a token or a block as the loss sees it.

    constant_loss: what the best constant prediction would score, so a loss near it, however low, says nothing was
    predicted.
    """
    rows = [
        value.flatten(0, -3).flatten(1) if unit == "block" else value.flatten(0, -2) for value in (prediction, target)
    ]
    figures = row_figures("prediction", rows[0], max_rows) | row_figures("target", rows[1], max_rows)
    return figures | {"constant_loss": 1 - float(_unit(rows[1], max_rows).mean(0).norm())}


def _unit(rows: Tensor, max_rows: int) -> Tensor:
    """At most `max_rows` of rows, evenly spread, at unit length."""
    if len(rows) > max_rows:
        rows = rows[torch.linspace(0, len(rows) - 1, max_rows, device=rows.device).long()]
    return F.normalize(rows.float(), dim=-1)
