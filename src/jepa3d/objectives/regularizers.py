"""Regularisers that prevent collapse without a frozen teacher: SIGReg, and VICReg's variance and
covariance terms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa3d.ops import BatchGenerator, sum_over_processes

_KNOTS = 17  # number of points t at which SIGReg compares characteristic functions
_LAST = 3.0  # the largest knot t; the smallest is 0


def sigreg(rows: Tensor, generator: BatchGenerator, num_slices: int = 256) -> Tensor:
    """Compute how far rows [n, E] are from samples of N(0, I): sketched isotropic Gaussian
    regularisation (LeJEPA, arXiv 2511.08544).

    The rows are projected on `num_slices` random directions. For each direction, the empirical
    characteristic function is compared with that of a Gaussian at 17 knots t between 0 and 3. The
    statistic is that of Epps and Pulley: the squared difference is weighted by a Gaussian window,
    integrated over positive and negative t by the trapezoid rule, and multiplied by the number of
    rows in all processes. Returns a scalar, the mean over directions. It is about 1 for rows that
    are samples of N(0, I), however many there are.
    """
    width = rows.shape[1]
    rows = rows.float()  # in half precision the characteristic function would be noise
    source = generator.on(rows.device)  # gives the same directions on every process
    directions = torch.randn(width, num_slices, generator=source, device=rows.device)
    slices = F.normalize(directions, dim=0)
    step = _LAST / (_KNOTS - 1)
    knots = torch.arange(_KNOTS, device=rows.device) * step
    gaussian = torch.exp(-knots.square() / 2)
    # Chebyshev's recurrence computes cos and sin of k * angle from those of angle, so that cos and
    # sin are each called once instead of 17 times.
    angle = rows @ slices * step
    cos, sin = angle.cos(), angle.sin()
    real, imaginary = [torch.ones_like(cos), cos], [torch.zeros_like(sin), sin]
    for _ in range(2, _KNOTS):
        real.append(2 * cos * real[-1] - real[-2])
        imaginary.append(2 * cos * imaginary[-1] - imaginary[-2])
    # sums over rows, [2, knots, slices]
    sums = torch.stack([torch.stack([x.sum(0) for x in terms]) for terms in (real, imaginary)])
    count = sum_over_processes(rows.new_tensor(float(len(rows))))
    mean = sum_over_processes(sums) / count
    error = (mean[0] - gaussian[:, None]).square() + mean[1].square()
    weights = torch.full_like(knots, 2 * step)  # trapezoid rule, doubled for negative t
    weights[[0, -1]] = step
    return ((weights * gaussian) @ error).mean() * count


def variance_covariance(
    rows: Tensor, least: float = 1.0, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Compute VICReg's variance and covariance terms for rows [n, E] (Bardes et al. 2022).

    least: standard deviation below which a dimension is penalised. eps: small number that is added
    to variances, so that the gradient of the standard deviation stays finite. Returns two scalars:
    first the mean over dimensions of max(0, least - std), second the sum of the squared covariances
    between different dimensions, divided by E. Both are computed over the rows of all processes.
    """
    rows = rows.float()
    count = sum_over_processes(rows.new_tensor(float(len(rows))))
    centred = rows - sum_over_processes(rows.sum(0)) / count
    covariance = sum_over_processes(centred.T @ centred) / (count - 1)
    std = (covariance.diagonal() + eps).sqrt()
    between = covariance - torch.diag(covariance.diagonal())
    return F.relu(least - std).mean(), between.square().sum() / rows.shape[1]
