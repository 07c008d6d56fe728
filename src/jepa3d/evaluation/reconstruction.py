"""Metrics of a dVAE: its reconstruction error, compared with the best constant patch, and how many
codes it uses.
"""

import numpy as np
import torch
from torch import Tensor

from jepa3d.data.datasets import PointClouds
from jepa3d.models.dvae import DVAE
from jepa3d.models.tokenizer import group
from jepa3d.ops import chamfer_l1, farthest_point_sample, gather_points, unit_sphere


def dvae_figures(
    dvae: DVAE, train: PointClouds, test: PointClouds, max_clouds: int = 256
) -> dict[str, float]:
    """Return the Chamfer-L1 (unit-sphere units) between test patches and (a) their reconstruction
    from arg-max codes, (b) one constant patch; also the perplexity of the codes.

    The constant patch is fitted to train patches with the same loss. The perplexity, exp(entropy)
    of the codes of the test patches, lies between 1 and num_codes.
    """
    dvae.eval()
    train_patches, _ = _patches(dvae, train, max_clouds)
    patches, centers = _patches(dvae, test, max_clouds)
    # in batches: with 8,192 codes, all logits together take gigabytes
    with torch.no_grad():
        batches = list(zip(patches.split(16), centers.split(16), strict=True))
        codes = torch.cat([dvae.codes(*batch) for batch in batches])
        reconstructed = torch.cat([dvae.reconstruct(*batch) for batch in batches])
        counts = torch.bincount(codes.flatten(), minlength=dvae.num_codes)
        share = counts.double() / codes.numel()
        reconstruction = chamfer_l1(reconstructed, patches)
    constant = best_constant_patch(train_patches.flatten(0, 1))
    return {
        "reconstruction": reconstruction.item(),
        "constant_patch": chamfer_l1(constant.expand_as(patches), patches).item(),
        "perplexity": float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum())),
        "num_codes": dvae.num_codes,
    }


def best_constant_patch(patches: Tensor, steps: int = 200, batch_size: int = 512) -> Tensor:
    """Fit by Adam the patch K 3 with the smallest mean Chamfer-L1 to patches n K 3."""
    generator = torch.Generator().manual_seed(0)
    points = patches.flatten(0, 1)
    rows = torch.randint(len(points), patches.shape[1:2], generator=generator)
    constant = points[rows].clone().requires_grad_()
    optimizer = torch.optim.Adam([constant], lr=0.05 * patches.norm(dim=-1).mean().item())
    for _ in range(steps):
        batch = patches[torch.randint(len(patches), (batch_size,), generator=generator)]
        optimizer.zero_grad()
        chamfer_l1(constant.expand_as(batch), batch).backward()
        optimizer.step()
    return constant.detach()


def _patches(dvae: DVAE, clouds: PointClouds, max_clouds: int) -> tuple[Tensor, Tensor]:
    index = np.linspace(0, len(clouds) - 1, min(max_clouds, len(clouds))).astype(int)
    points = clouds.batch(index)
    # use the point density that the dVAE was trained with
    if points.shape[1] > dvae.num_points:
        points = unit_sphere(gather_points(points, farthest_point_sample(points, dvae.num_points)))
    grouped = group(points, dvae.num_groups, dvae.group_size)
    return grouped.patches, grouped.centers
