"""Metrics of a dVAE, an autoencoder that describes each patch by one of a fixed number of codes.
The metrics are its reconstruction error, the error of the best constant patch (for comparison), and
the perplexity of its codes, which measures how many codes are in use.
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
    """Measure how well a dVAE reconstructs test patches, and how many of its codes it uses.

    max_clouds: at most this many train clouds and this many test clouds are used. Returns:

    - reconstruction: mean Chamfer-L1 distance between each test patch and the patch that the dVAE
      reconstructs from the most likely codes. The clouds are scaled to the unit sphere, so a
      distance of 1 is the radius of a cloud.
    - constant_patch: mean Chamfer-L1 distance between the test patches and one constant patch. This
      patch is fitted to the train patches.
    - perplexity: exp(entropy) of the test patches' codes, between 1 and num_codes.
    - num_codes: the number of codes that the dVAE has.
    """
    dvae.eval()
    train_patches, _ = _patches(dvae, train, max_clouds)
    patches, centers = _patches(dvae, test, max_clouds)
    # In batches: with 8,192 codes, the logits of 256 clouds of 64 patches take 0.5 GB, and several
    # arrays of this size are needed at once.
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
    """Fit one patch [K, 3] to patches [n, K, 3]: the optimiser Adam minimises the mean Chamfer-L1
    distance between the fitted patch and the given patches.
    """
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
    """Return patches and centres of up to `max_clouds` clouds, evenly spaced over the data set."""
    index = np.linspace(0, len(clouds) - 1, min(max_clouds, len(clouds))).astype(int)
    points = clouds.batch(index)
    # reduce the clouds to the number of points that the dVAE was trained with
    if points.shape[1] > dvae.num_points:
        points = unit_sphere(gather_points(points, farthest_point_sample(points, dvae.num_points)))
    grouped = group(points, dvae.num_groups, dvae.group_size)
    return grouped.patches, grouped.centers
