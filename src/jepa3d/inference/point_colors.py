"""A cloud as `jepa3d view` draws it, and colours of its points by what an encoder makes of them."""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from jepa3d.inference.clouds import Item
from jepa3d.inference.embedding import see
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.sampling import multi_block
from jepa3d.ops import three_nn_interpolate

MAX_DRAWN = 200_000
ROLES = {
    "in neither": (190, 190, 190),
    "context": (31, 119, 180),
    "target 1": (214, 39, 40),
    "target 2": (255, 152, 0),
    "target 3": (44, 160, 44),
    "target 4": (200, 60, 200),
}
ROLE_COLORS = np.array(list(ROLES.values()), np.uint8)


class View(NamedTuple):
    """A cloud as drawn and as encoded, both z-up in the unit sphere of the points that the encoder
    sees.
    """

    name: str
    total: int  # points in the file; of a mesh, those sampled
    points: np.ndarray  # N 3 float32, at most MAX_DRAWN
    colors: np.ndarray | None  # N 3 uint8, the file's
    tokens: Tensor  # M C, of the last layer
    centers: Tensor  # M 3
    weights: Tensor  # N M: tokens to features at the points, each of its three nearest centres
    vector: np.ndarray  # E, as `jepa3d embed` makes it


@torch.inference_mode()
def view_of(
    encoder: PointEncoder,
    item: Item,
    up_axis: str = "z",
    layer: int = -1,
    pooling: str = "mean_max",
) -> View:
    """A cloud as the page shows it; points and vector are those of `embed`.

    Raises ReadError and OSError.
    """
    _, cloud, turned, seen = see(encoder, item, up_axis)
    states, centers = encoder.states(torch.from_numpy(seen.points)[None])
    drawn = np.sort(np.random.default_rng(0).permutation(len(cloud))[:MAX_DRAWN])
    points, total = seen.place(turned[drawn]), cloud.total or len(cloud)
    colors = None if cloud.colors is None else cloud.colors[drawn]
    unit = torch.eye(centers.shape[1])[None]
    weights = three_nn_interpolate(torch.from_numpy(points)[None], centers, unit)[0]
    vector = encoder.pool(states[layer], layer, pooling)[0].numpy()
    tokens, centers = states[-1][0], centers[0]
    return View(item.path, total, points, colors, tokens, centers, weights, vector)


def nearest_to_ray(points: np.ndarray, origin, direction, reach=0.05) -> int | None:
    """Index of the point that a click on points N 3 means, or None if the ray meets no point.

    Of the points within `reach` of the ray, those up to `reach` behind the foremost are taken, and
    of these the one nearest to the ray.
    """
    direction = np.asarray(direction, float) / np.linalg.norm(direction)
    offset = points - np.asarray(origin, float)
    depth = offset @ direction
    aside = np.linalg.norm(offset - depth[:, None] * direction, axis=1)
    hit = np.flatnonzero((depth > 0) & (aside <= reach))
    if not len(hit):
        return None
    front = hit[depth[hit] <= depth[hit].min() + reach]
    return int(front[aside[front].argmin()])


def pca_colors(view: View) -> tuple[np.ndarray, float]:
    """Colours N 3 uint8 of the first three principal components of the tokens, and their share of
    the variance.
    """
    components = PCA(3, svd_solver="full")
    values = components.fit_transform(view.tokens.double().numpy())
    low, extent = values.min(0), np.ptp(values, axis=0)
    rgb = np.where(extent > 1e-9, (values - low) / np.maximum(extent, 1e-9), 0.5)
    colors = 255 * (view.weights.double().numpy() @ rgb)
    share = float(components.explained_variance_ratio_.sum())
    return colors.round().clip(0, 255).astype(np.uint8), share


def similarity(view: View, point: int) -> np.ndarray:
    """Cosines N of the features at all points with those at one."""
    # Of features by those of tokens: N C would not fit for many points.
    products = view.tokens @ view.tokens.T
    dot = view.weights @ (products @ view.weights[point])
    square = ((view.weights @ products) * view.weights).sum(1).clamp_min(1e-30)
    return (dot / (square * square[point]).sqrt()).clamp(-1, 1).numpy()


def sample_roles(view: View, generator: torch.Generator) -> np.ndarray:
    """Of each point (N) what its nearest token is in one draw of the paper's sampler: 0 unused, 1
    context, 2.. targets.

    Targets may overlap; the later one is given. Raises ValueError for too few tokens.
    """
    sample = multi_block(view.centers[None], generator, num_targets=len(ROLES) - 2)
    role = torch.zeros(len(view.centers), dtype=torch.long)
    role[sample.context[0][sample.mask[0]]] = 1
    for i, target in enumerate(sample.target[0]):
        role[target] = 2 + i
    return role[view.weights.argmax(1)].numpy()
