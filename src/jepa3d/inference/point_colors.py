"""Compute what `jepa3d view` draws: the points of a cloud, and colours that show the encoder's
tokens.
"""

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

MAX_DRAWN = 200_000  # largest number of points that are drawn
ROLES = {  # use of a token in pretraining -> its colour
    "unused": (190, 190, 190),
    "context": (31, 119, 180),
    "target 1": (214, 39, 40),
    "target 2": (255, 152, 0),
    "target 3": (44, 160, 44),
    "target 4": (200, 60, 200),
}
ROLE_COLORS = np.array(list(ROLES.values()), np.uint8)


class View(NamedTuple):
    """The drawn points of a cloud, and the tokens of its encoded points (the points that the
    encoder receives). All coordinates are the encoder's: z-up, with the encoded points in the unit
    sphere. Drawn points may lie outside the unit sphere.
    """

    name: str
    total: int  # number of points in the file; for a mesh, number of points sampled from it
    points: np.ndarray  # [N, 3] float32, at most MAX_DRAWN points
    # [N, 3] uint8, as in the file; None if the file has no colours
    colors: np.ndarray | None
    tokens: Tensor  # [M, C], tokens of the last layer
    centers: Tensor  # [M, 3], centres of the tokens
    # [N, M], weights for interpolation from the three nearest centres of each point; so the
    # features of the points are weights @ tokens
    weights: Tensor
    vector: np.ndarray  # [E], the vector that `jepa3d embed` computes


@torch.inference_mode()
def view_of(
    encoder: PointEncoder,
    item: Item,
    up_axis: str = "z",
    layer: int = -1,
    pooling: str = "mean_max",
) -> View:
    """Read and encode a cloud for the viewer. The encoder's input and the vector are the same as in
    `jepa3d embed`.

    layer, pooling: used for the vector only. Raises ReadError if the cloud cannot be read, or has
    too few different points for the encoder.
    """
    _, cloud, turned, seen = see(encoder, item, up_axis)
    states, centers = encoder.states(torch.from_numpy(seen.points)[None])
    drawn = np.sort(np.random.default_rng(0).permutation(len(cloud))[:MAX_DRAWN])
    points, total = seen.place(turned[drawn]), cloud.total or len(cloud)
    colors = None if cloud.colors is None else cloud.colors[drawn]
    identity = torch.eye(centers.shape[1])[None]
    weights = three_nn_interpolate(torch.from_numpy(points)[None], centers, identity)[0]
    vector = encoder.pool(states[layer], layer, pooling)[0].numpy()
    tokens, centers = states[-1][0], centers[0]
    return View(item.path, total, points, colors, tokens, centers, weights, vector)


def nearest_to_ray(points: np.ndarray, origin, direction, reach=0.05) -> int | None:
    """Find the point that a user clicked: returns its index among points [N, 3], or None if no
    point lies near the ray.

    origin, direction: the ray from the viewer through the clicked pixel. Among the points in front
    of the viewer and within `reach` of the ray, the frontmost is found. Points that lie more than
    `reach` behind the frontmost are discarded. Of the rest, the point nearest to the ray is chosen.
    """
    direction = np.asarray(direction, float) / np.linalg.norm(direction)
    offset = points - np.asarray(origin, float)
    depth = offset @ direction
    distance = np.linalg.norm(offset - depth[:, None] * direction, axis=1)
    hit = np.flatnonzero((depth > 0) & (distance <= reach))
    if not len(hit):
        return None
    front = hit[depth[hit] <= depth[hit].min() + reach]
    return int(front[distance[front].argmin()])


def pca_colors(view: View) -> tuple[np.ndarray, float]:
    """Compute colours [N, 3] uint8 from the first three principal components of the tokens.

    Returns the colours, and the share of the tokens' variance that these components explain.
    """
    components = PCA(3, svd_solver="full")
    values = components.fit_transform(view.tokens.double().numpy())
    low, extent = values.min(0), np.ptp(values, axis=0)
    rgb = np.where(extent > 1e-9, (values - low) / np.maximum(extent, 1e-9), 0.5)
    colors = 255 * (view.weights.double().numpy() @ rgb)
    share = float(components.explained_variance_ratio_.sum())
    return colors.round().clip(0, 255).astype(np.uint8), share


def similarity(view: View, point: int) -> np.ndarray:
    """Return cosines [N]: for each point, the cosine between its features and those of the point
    with the index `point`.
    """
    # The cosines are computed from dot products of tokens, since the features [N, C] of all points
    # would take more memory than arrays [N, M]: with the default settings of `PointEncoder`, C is
    # 384 and the number of tokens M is 64.
    products = view.tokens @ view.tokens.T
    dot = view.weights @ (products @ view.weights[point])
    squared_norm = ((view.weights @ products) * view.weights).sum(1).clamp_min(1e-30)
    return (dot / (squared_norm * squared_norm[point]).sqrt()).clamp(-1, 1).numpy()


def sample_roles(view: View, generator: torch.Generator) -> np.ndarray:
    """Sample a context and targets from the tokens, as in pretraining with the paper's sampler
    (sampling.py). Returns roles [N]: for each point, the role of the nearest token (0 unused,
    1 context, 2 and higher the targets).

    The sampler is always `multi_block`, even if the encoder was pretrained with another sampler. A
    token in several targets gets the role of the last of them. Raises ValueError if there are too
    few tokens.
    """
    sample = multi_block(view.centers[None], generator, num_targets=len(ROLES) - 2)
    role = torch.zeros(len(view.centers), dtype=torch.long)
    role[sample.context[0][sample.mask[0]]] = 1
    for i, target in enumerate(sample.target[0]):
        role[target] = 2 + i
    return role[view.weights.argmax(1)].numpy()
