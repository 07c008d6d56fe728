"""Compute the features of a frozen network, one vector per cloud and layer. Also create an
untrained encoder with which a trained encoder can be compared.
"""

import numpy as np
import torch

from jepa3d.data.datasets import PointClouds
from jepa3d.models.dvae import DVAE
from jepa3d.models.encoder import PointEncoder, calibrate_batchnorm, pool, standardise_vectors
from jepa3d.models.tokenizer import group


def default_device() -> torch.device:
    """Return the machine's accelerator if it has one, else the CPU."""
    available = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if available else None
    return device or torch.device("cpu")


@torch.no_grad()
def layer_features(
    model: PointEncoder | DVAE, clouds: PointClouds, pooling: str = "mean_max", batch_size: int = 64
) -> np.ndarray:
    """Compute one vector per cloud from every layer: the tokens of the layer, pooled.

    An encoder's layer 0 is the output of its tokenizer. If an encoder does not assume upright
    clouds, its vectors are averaged over several poses (rotations) of the cloud. A dVAE (the
    discrete autoencoder that can be a teacher) has only one layer: the tokens that its students
    learn to predict. pooling: how the tokens are pooled, see `pool` in models/encoder.py. Returns
    an array [L, n, E] float32 for L layers and n clouds.
    """
    device = default_device()
    model.eval().to(device)
    layers = []
    for start in range(0, len(clouds), batch_size):
        index = np.arange(start, min(start + batch_size, len(clouds)))
        points = clouds.batch(index).to(device)
        if isinstance(model, PointEncoder):
            poses = [model.states(pose)[0] for pose in model.poses(model.prepare(points))]
        else:
            grouped = group(points, model.num_groups, model.group_size)
            poses = [model.features(grouped.patches, grouped.centers)]
        pooled = [torch.stack([pool(layer, pooling) for layer in pose]) for pose in poses]
        layers.append(torch.stack(pooled).mean(0).cpu())
    return torch.cat(layers, 1).numpy()


def untrained_like(encoder: PointEncoder, clouds: PointClouds, seed: int = 0) -> PointEncoder:
    """Create a randomly initialised encoder with the same settings as `encoder`.

    clouds: the first 1,024 of these clouds determine the BatchNorm statistics of the new encoder.
    If `encoder` standardises its vectors, the new encoder does so too, with the mean and std of its
    own vectors of the same clouds.
    """
    settings = vars(encoder)["_hub_mixin_config"] | {"standardised": False}
    points = clouds.batch(np.arange(min(len(clouds), 1024)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        untrained = PointEncoder(**settings).eval()
    untrained.upright = encoder.upright
    calibrate_batchnorm(untrained, points)
    if encoder.vector_mean is not None:
        standardise_vectors(untrained, points)
    return untrained
