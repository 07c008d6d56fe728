"""Features of every layer of a frozen network, one vector a cloud, and the untrained encoder to
compare them with.
"""

import numpy as np
import torch

from jepa3d.data.datasets import PointClouds
from jepa3d.models.dvae import DVAE
from jepa3d.models.encoder import PointEncoder, calibrate_batchnorm, pool, standardise_vectors
from jepa3d.models.tokenizer import group


def default_device() -> torch.device:
    """The machine's accelerator, or the CPU."""
    available = torch.accelerator.is_available()
    found = torch.accelerator.current_accelerator() if available else None
    return found or torch.device("cpu")


@torch.no_grad()
def layer_features(
    model: PointEncoder | DVAE, clouds: PointClouds, pooling: str = "mean_max", batch_size: int = 64
) -> np.ndarray:
    """Pooled tokens [L, n, E] float32 of every layer; a dVAE has one, the tokens that it teaches."""
    device = default_device()
    model.eval().to(device)
    layers = []
    for at in range(0, len(clouds), batch_size):
        points = clouds.batch(np.arange(at, min(at + batch_size, len(clouds)))).to(device)
        if isinstance(model, PointEncoder):
            poses = [model.states(pose)[0] for pose in model.poses(model.prepare(points))]
        else:
            grouped = group(points, model.num_groups, model.group_size)
            poses = [model.features(grouped.patches, grouped.centers)]
        pooled = [torch.stack([pool(layer, pooling) for layer in pose]) for pose in poses]
        layers.append(torch.stack(pooled).mean(0).cpu())
    return torch.cat(layers, 1).numpy()


def untrained_like(encoder: PointEncoder, clouds: PointClouds, seed: int = 0) -> PointEncoder:
    """A new encoder of the same settings; the clouds' statistics are in its BatchNorm, and in its
    vectors if they are in those of `encoder`.
    """
    settings = vars(encoder)["_hub_mixin_config"] | {"standardised": False}
    points = clouds.batch(np.arange(min(len(clouds), 1024)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = PointEncoder(**settings).eval()
    made.upright = encoder.upright
    calibrate_batchnorm(made, points)
    if encoder.vector_mean is not None:
        standardise_vectors(made, points)
    return made
