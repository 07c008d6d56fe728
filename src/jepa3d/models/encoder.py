"""The point encoder: the network that is pretrained and then used for all tasks."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa3d.frame import TURNS, Frame, frame
from jepa3d.models.hub import Pretrained
from jepa3d.models.layout import Layout, Ragged
from jepa3d.models.tokenizer import BatchNorm, PatchTokenizer, group
from jepa3d.models.transformer import Block, drop_path_scales, init_weights, position_embedding
from jepa3d.ops import BatchGenerator, sample_one
from jepa3d.shapes import Centers, Float, Int, Patches, Points, Rows, Tokens, Vectors

# One cloud [N, 3], clouds [B, N, 3], or a list of clouds [N, 3] of different sizes.
Clouds = Tensor | np.ndarray | Sequence[Tensor | np.ndarray]

POOLINGS = ("mean_max", "mean", "max")


class PointEncoder(
    Pretrained,
    library_name="jepa3d",
    tags=["point-cloud", "self-supervised", "3d-jepa"],
    license="apache-2.0",
):
    """Encode point clouds with a light PointNet per patch and a plain pre-LN transformer.

    The defaults are the encoder of the 3D-JEPA paper (21.8 M parameters); docs/settings.md explains
    every argument. `save_pretrained(folder)` writes config.json and model.safetensors, which
    `PointEncoder.from_pretrained(folder or Hub id)` loads. Raises ValueError if `num_groups` or
    `group_size` exceeds `num_points`, or if `embed_dim` is not a multiple of `num_heads`.

    >>> encoder = PointEncoder().eval()
    >>> vectors = encoder.embed(torch.randn(4, 2048, 3))    # [4, 768]
    """

    keep_strays = False  # True: stray points are not removed (see frame.py)
    upright = True  # True: clouds must be z-up; False: they may be rotated (see `poses`)
    # An older config.json lacks these settings; an encoder loaded from it has these values.
    BEFORE: ClassVar = {
        "qkv_bias": True,
        "standardised": False,
    }
    vector_mean: Tensor | None
    vector_std: Tensor | None

    def __init__(
        self,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_groups: int = 64,
        group_size: int = 32,
        num_points: int = 2048,
        tokenizer_dim: int = 128,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        position_every_block: bool = True,
        qkv_bias: bool = False,
        standardised: bool = False,
    ):
        super().__init__()
        # Every cloud must have at least this many different points.
        self.min_points = max(num_groups, group_size)
        if self.min_points > num_points:
            raise ValueError(
                f"num_groups {num_groups} and group_size {group_size} must not exceed num_points {num_points}"
            )
        self.width, self.depth, self.drop_path = embed_dim, depth, drop_path
        self.position_every_block, self.checkpoints = position_every_block, False
        self.num_groups, self.group_size, self.num_points = num_groups, group_size, num_points
        self.tokenizer = PatchTokenizer(embed_dim, tokenizer_dim)
        self.position = position_embedding(embed_dim)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        for name in ("vector_mean", "vector_std"):  # set by `standardise_vectors`
            self.register_buffer(name, torch.ones(2 * embed_dim) if standardised else None)
        # Tokenizer and position MLP keep torch's default weights: with the standard deviation 0.02
        # of `init_weights`, their 3 input channels would hardly influence the output.
        self.blocks.apply(init_weights)

    def hidden_states(
        self,
        tokens: Float[Tensor, "*rest c"],
        position: Float[Tensor, "*rest c"],
        layout: Layout | None = None,
        generator: BatchGenerator | None = None,
    ) -> list[Float[Tensor, "*rest c"]]:
        """Run the transformer blocks.

        tokens and position: [B, M, C], or packed as rows [n, C] with the layout `layout`
        (layout.py). generator: source of random numbers for drop-path, one number per cloud and
        residual branch. Returns `depth + 1` tensors, each of the shape of `tokens`: the tokens
        before the first block and after each block. The encoder's final norm is applied to the last
        of them only.
        """
        keep = None
        if self.training and self.drop_path > 0:
            batch = layout.batch if layout else len(tokens)
            keep = drop_path_scales(self.drop_path, batch, self.depth, generator, tokens).flatten(1)
            keep = (layout.per_row(keep) if layout else keep[:, None]).unflatten(
                -1, (self.depth, 2)
            )
        states = [tokens]
        for layer, block in enumerate(self.blocks):
            x = states[-1] + position if layer == 0 or self.position_every_block else states[-1]
            inputs = x, layout, None if keep is None else keep[..., layer, :]
            states.append(
                checkpoint(block, *inputs, use_reentrant=False)
                if self.checkpoints
                else block(*inputs)
            )
        states[-1] = self.norm(states[-1])
        return states

    def visible(
        self, patches: Patches, centers: Centers, index: Int[Tensor, "b v"], layout: Ragged
    ) -> tuple[Rows, Rows]:
        """Compute tokens and embedded positions of the visible patches only; returns both packed as
        rows [n, C].

        patches: [B, M, K, 3]. centers: [B, M, 3]. index: [B, V], indices of the visible patches.
        layout: tells which entries of `index` are padding; padding is never encoded, so it does not
        influence BatchNorm.
        """
        first = centers.shape[1] * torch.arange(len(index), device=index.device)
        chosen = layout.pack((index + first[:, None])[..., None])[:, 0]
        return self.tokenizer(patches.flatten(0, 1)[chosen]), self.position(
            centers.flatten(0, 1)[chosen]
        )

    def features(
        self,
        patches: Patches,
        centers: Centers,
        layers: int = 1,
        generator: BatchGenerator | None = None,
    ) -> list[Tokens]:
        """Encode all patches [B, M, K, 3] with centers [B, M, 3].

        layers: the number of tensors to return. generator: source of random numbers for drop-path.
        Returns a list of `layers` tensors [B, M, C]: the tokens after each of the last `layers`
        blocks.
        """
        return self.hidden_states(self.tokenizer(patches), self.position(centers), None, generator)[
            -layers:
        ]

    def prepare(self, clouds: Clouds) -> Points:
        """Convert clouds, given as for `embed`, to the points that the encoder sees (see frame.py),
        without gradient.

        Returns [B, num_points, 3] on the encoder's device. Raises ValueError if there are no
        clouds, if a cloud has a wrong shape or number type, if a coordinate is NaN, infinite or at
        least 1e30, or if a cloud has fewer than `min_points` different points.
        """
        if isinstance(clouds, Tensor | np.ndarray):
            if clouds.ndim not in (2, 3):
                raise ValueError(
                    f"points must be N x 3, B x N x 3 or a list of N x 3, not {list(clouds.shape)}"
                )
            clouds = as_array(clouds)[None] if clouds.ndim == 2 else as_array(clouds)
        if not len(clouds):
            raise ValueError("no clouds to embed")
        return torch.from_numpy(np.stack([self.frame(cloud).points for cloud in clouds])).to(
            self.norm.weight
        )

    def frame(self, cloud: Tensor | np.ndarray, min_points: int | None = None) -> Frame:
        """Convert one cloud [N, 3] to the points that the encoder sees. Returns a `Frame`: these
        points, and the position, scale and rotation that place the cloud in the encoder's
        coordinates.

        min_points: number of different points that the cloud needs, by default the encoder's
        `min_points`. Raises ValueError as `prepare` does.
        """
        min_points = self.min_points if min_points is None else min_points
        return frame(
            as_array(cloud), self.num_points, min_points, sample_one, self.keep_strays, self.upright
        )

    def poses(self, prepared: Points) -> list[Points]:
        """Return the poses whose vectors are averaged. If `upright` is set, the only pose is the
        prepared clouds [B, N, 3] as they are. If not, there are 12 poses: the clouds rotated by
        each of the rotations in `TURNS` (see frame.py).
        """
        return (
            [prepared]
            if self.upright
            else [prepared @ turn.mT for turn in torch.from_numpy(TURNS).to(prepared)]
        )

    def vectors(self, prepared: Points, layer: int = -1, pooling: str = "mean_max") -> Vectors:
        """Encode prepared clouds [B, N, 3] to vectors [B, E], averaged over the poses of each
        cloud. The arguments `layer` and `pooling` are those of `embed`.
        """
        poses = self.poses(prepared)
        return torch.stack(
            [self.pool(self.states(pose)[0][layer], layer, pooling) for pose in poses]
        ).mean(0)

    def states(self, prepared: Points) -> tuple[list[Tokens], Centers]:
        """Encode prepared clouds [B, N, 3]; returns the tokens of every layer (see `hidden_states`)
        and the patch centers [B, M, 3].
        """
        grouped = group(prepared, self.num_groups, self.group_size)
        states = self.hidden_states(self.tokenizer(grouped.patches), self.position(grouped.centers))
        return states, grouped.centers

    def layer_tokens(self, points: Clouds) -> tuple[list[Tokens], Centers]:
        """Encode clouds, given as for `embed`; returns the tokens of every layer (see
        `hidden_states`) and the patch centers [B, M, 3].
        """
        return self.states(self.prepare(points))

    def tokens(self, points: Clouds, layer: int = -1) -> tuple[Tokens, Centers]:
        """Encode clouds to one token per patch.

        points: as for `embed`. layer: the block after which tokens are taken (0: before the first
        block, -1: the encoder's output). Returns tokens [B, M, C] and the patch centers [B, M, 3]
        in the encoder's coordinates, the unit sphere (see frame.py). Raises ValueError as
        `prepare` does.
        """
        states, centers = self.layer_tokens(points)
        return states[layer], centers

    def embed(self, points: Clouds, layer: int = -1, pooling: str = "mean_max") -> Vectors:
        """Encode each cloud to one vector: its pooled tokens, standardised as in `standardise`.

        points: one cloud [N, 3], clouds [B, N, 3], or a list of clouds [N, 3] of different sizes;
        tensors or numpy arrays, in any unit of length. layer: as for `tokens`. pooling: "mean_max",
        "mean" or "max". Returns vectors [B, E], where E is 2C for "mean_max" and C for the other
        poolings.

        Call `.eval()` first, as `from_pretrained` does: in training mode a vector depends on the
        rest of the batch. Raises ValueError as `prepare` does, and for an unknown pooling.
        """
        return self.vectors(self.prepare(points), layer, pooling)

    forward = embed

    def load_weights(self, source: nn.Module) -> None:
        """Copy the weights and BatchNorm statistics of another encoder.

        The statistics that `standardise_vectors` stored are not copied. Raises RuntimeError if the
        weights of the two encoders differ in names or shapes, or if this encoder itself has
        statistics from `standardise_vectors`.
        """
        weights = {
            name: value
            for name, value in source.state_dict().items()
            if not name.startswith("vector_")
        }
        self.load_state_dict(weights)

    def pool(self, tokens: Tokens, layer: int = -1, pooling: str = "mean_max") -> Vectors:
        """Pool the tokens [B, M, C] of block `layer` to one vector per cloud, [B, E], and
        standardise it, as `embed` does.
        """
        return self.standardise(pool(tokens, pooling), layer, pooling)

    def standardise(self, vectors: Vectors, layer: int = -1, pooling: str = "mean_max") -> Vectors:
        """Standardise vectors [B, E], which were pooled from the tokens of block `layer`.

        The mean and standard deviation are those that `standardise_vectors` stored. If the encoder
        has none, or if `layer` is not the last block, the vectors are returned unchanged.
        """
        if self.vector_mean is None or self.vector_std is None or layer not in (-1, self.depth):
            return vectors
        channels = {
            "mean_max": slice(None),
            "mean": slice(self.width),
            "max": slice(self.width, None),
        }[pooling]
        return (vectors - self.vector_mean[channels]) / self.vector_std[channels]


def as_array(cloud: Tensor | np.ndarray) -> np.ndarray:
    """Convert a tensor on any device, or anything that numpy accepts, to a numpy array."""
    if isinstance(cloud, Tensor):
        cloud = cloud.detach().cpu()
        return cloud.float().numpy() if cloud.dtype == torch.bfloat16 else cloud.numpy()
    return np.asarray(cloud)


def pool(tokens: Tokens, pooling: str = "mean_max") -> Vectors:
    """Pool tokens [B, M, C] to one vector per cloud: [B, 2C] for "mean_max", [B, C] for "mean" and
    "max".

    Raises ValueError for an unknown pooling.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is unknown: use {', '.join(POOLINGS)}")
    parts = {"mean": tokens.mean(1), "max": tokens.amax(1)}
    return torch.cat([parts[name] for name in pooling.split("_")], -1)


@torch.no_grad()
def calibrate_batchnorm(encoder: PointEncoder, points: Points, batch_size: int = 128) -> None:
    """Compute the running statistics of every BatchNorm anew from the n clouds `points` [n, N, 3].

    The result is the mean of the statistics of all batches of `batch_size` clouds.

    The BatchNorms of a randomly initialised encoder still have mean 0 and variance 1. With these
    values, the encoder would be too weak a baseline for trained encoders.
    """
    norms = [module for module in encoder.modules() if isinstance(module, BatchNorm)]
    momenta, was_training = [norm.momentum for norm in norms], encoder.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch then averages over all batches
        norm.synchronised = False  # every process sees all points
        norm.train()
    for batch in points.split(batch_size):
        grouped = group(encoder.prepare(batch), encoder.num_groups, encoder.group_size)
        encoder.tokenizer(grouped.patches)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum, norm.synchronised = momentum, True
    encoder.train(was_training)


@torch.no_grad()
def standardise_vectors(encoder: PointEncoder, points: Points, batch_size: int = 64) -> None:
    """Make the encoder standardise its vectors, so that over the n clouds `points` [n, N, 3] each
    channel has mean 0 and standard deviation 1.

    The mean and standard deviation are those of the vectors from the last block with the pooling
    "mean_max". They also contain the values for the poolings "mean" and "max".

    Without this, the similarity of two vectors would mostly depend on a few channels of large
    variance and on the mean of all vectors.
    """
    encoder.vector_mean = encoder.vector_std = None
    vectors = torch.cat([encoder.embed(batch).cpu() for batch in points.split(batch_size)]).double()
    weight = encoder.norm.weight
    encoder.vector_mean = vectors.mean(0).to(weight)
    encoder.vector_std = vectors.std(0, correction=0).clamp_min(1e-6).to(weight)
    vars(encoder)["_hub_mixin_config"]["standardised"] = True
