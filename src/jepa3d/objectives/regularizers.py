"""SIGReg and VICReg's two regularisers, which prevent collapse without a frozen teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa3d.ops import BatchGenerator, sum_over_processes

_KNOTS, _LAST = 17, 3.0


def sigreg(rows: Tensor, generator: BatchGenerator, num_slices: int = 256) -> Tensor:
    """Sketched isotropic Gaussian regularisation (LeJEPA, arXiv 2511.08544): how far rows [n, E]
    are from samples of N(0, I).

    Along `num_slices` random directions, the empirical characteristic function is compared with
    that of a Gaussian at 17 knots on [0, 3]. The statistic is Epps-Pulley's (squared difference,
    Gaussian window, trapezoid rule, both signs of t), times n, the number of rows of all processes.
    It is about 1 for Gaussian rows, for any n. Returns a scalar.
    """
    width = rows.shape[1]
    rows = rows.float()  # in half precision the characteristic function would be noise
    maker = generator.on(rows.device)  # the same directions on every process
    slices = F.normalize(torch.randn(width, num_slices, generator=maker, device=rows.device), dim=0)
    step = _LAST / (_KNOTS - 1)
    knots = torch.arange(_KNOTS, device=rows.device) * step
    gaussian = torch.exp(-knots.square() / 2)
    # Chebyshev's recurrence gives cos and sin of k * angle from those of angle: one call each
    # instead of 17.
    angle = rows @ slices * step
    cos, sin = angle.cos(), angle.sin()
    real, imaginary = [torch.ones_like(cos), cos], [torch.zeros_like(sin), sin]
    for _ in range(2, _KNOTS):
        real.append(2 * cos * real[-1] - real[-2])
        imaginary.append(2 * cos * imaginary[-1] - imaginary[-2])
    # 2 knots slices
    sums = torch.stack([torch.stack([x.sum(0) for x in part]) for part in (real, imaginary)])
    count = sum_over_processes(rows.new_tensor(float(len(rows))))
    mean = sum_over_processes(sums) / count
    error = (mean[0] - gaussian[:, None]).square() + mean[1].square()
    weights = torch.full_like(knots, 2 * step)
    weights[[0, -1]] = step
    return ((weights * gaussian) @ error).mean() * count


def variance_covariance(
    rows: Tensor, least: float = 1.0, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """VICReg's two regularisers of rows [n, E] (Bardes et al. 2022), as scalars.

    The first is the mean hinge loss max(0, least - std) over dimensions; the second is the sum of
    the squared covariances of different dimensions, divided by E.
    """
    rows = rows.float()
    count = sum_over_processes(rows.new_tensor(float(len(rows))))
    centred = rows - sum_over_processes(rows.sum(0)) / count
    covariance = sum_over_processes(centred.T @ centred) / (count - 1)
    std = (covariance.diagonal() + eps).sqrt()
    between = covariance - torch.diag(covariance.diagonal())
    return F.relu(least - std).mean(), between.square().sum() / rows.shape[1]
