"""What `jepa3d view` draws: a cloud, and point colours computed from the encoder's tokens."""

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
    "unused": (190, 190, 190),
    "context": (31, 119, 180),
    "target 1": (214, 39, 40),
    "target 2": (255, 152, 0),
    "target 3": (44, 160, 44),
    "target 4": (200, 60, 200),
}
ROLE_COLORS = np.array(list(ROLES.values()), np.uint8)


class View(NamedTuple):
    """A cloud, drawn and encoded in the same coordinates: z-up, with the encoder's points in the
    unit sphere.
    """

    name: str
    total: int  # number of points in the file; for a mesh, of points sampled
    points: np.ndarray  # N 3 float32, at most MAX_DRAWN
    colors: np.ndarray | None  # N 3 uint8, as in the file
    tokens: Tensor  # M C, of the last layer
    centers: Tensor  # M 3, of the tokens
    # N M, interpolation weights: point features = weights @ tokens, three nearest centres per point
    weights: Tensor
    vector: np.ndarray  # E, the vector that `jepa3d embed` computes


@torch.inference_mode()
def view_of(
    encoder: PointEncoder,
    item: Item,
    up_axis: str = "z",
    layer: int = -1,
    pooling: str = "mean_max",
) -> View:
    """Read and encode a cloud for the viewer; the encoder's input and the vector are the same as in
    `embed`.

    Raises ReadError and OSError for a cloud that cannot be read.
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
    """Return the index of the clicked point among points N 3, or None if no point lies near the
    ray.

    Candidates are within `reach` of the ray, and at most `reach` deeper than the frontmost of them.
    The one nearest to the ray is returned.
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
    """Compute colours N 3 uint8 from the first three principal components of the tokens.

    Returns the colours and the components' share of the variance.
    """
    components = PCA(3, svd_solver="full")
    values = components.fit_transform(view.tokens.double().numpy())
    low, extent = values.min(0), np.ptp(values, axis=0)
    rgb = np.where(extent > 1e-9, (values - low) / np.maximum(extent, 1e-9), 0.5)
    colors = 255 * (view.weights.double().numpy() @ rgb)
    share = float(components.explained_variance_ratio_.sum())
    return colors.round().clip(0, 255).astype(np.uint8), share


def similarity(view: View, point: int) -> np.ndarray:
    """Return the cosine similarity [N] of every point's features with those of `point`."""
    # From dot products of tokens, since the features [N, C] of many points would not fit in memory.
    products = view.tokens @ view.tokens.T
    dot = view.weights @ (products @ view.weights[point])
    squared_norm = ((view.weights @ products) * view.weights).sum(1).clamp_min(1e-30)
    return (dot / (squared_norm * squared_norm[point]).sqrt()).clamp(-1, 1).numpy()


def sample_roles(view: View, generator: torch.Generator) -> np.ndarray:
    """Return the role [N] of each point's nearest token in one draw of the paper's sampler: 0
    unused, 1 context, 2 and up targets.

    Where targets overlap, the later one counts. Raises ValueError for too few tokens.
    """
    sample = multi_block(view.centers[None], generator, num_targets=len(ROLES) - 2)
    role = torch.zeros(len(view.centers), dtype=torch.long)
    role[sample.context[0][sample.mask[0]]] = 1
    for i, target in enumerate(sample.target[0]):
        role[target] = 2 + i
    return role[view.weights.argmax(1)].numpy()
