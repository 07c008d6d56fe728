"""The point encoder: what every command trains, saves, loads and uses."""

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

# N 3, B N 3, or a list of N 3 of any N
Clouds = Tensor | np.ndarray | Sequence[Tensor | np.ndarray]

POOLINGS = ("mean_max", "mean", "max")


class PointEncoder(
    Pretrained,
    library_name="jepa3d",
    tags=["point-cloud", "self-supervised", "3d-jepa"],
    license="apache-2.0",
):
    """PointNet tokens and a plain pre-LN transformer; positions are added at every block, or once.

    The defaults are the paper's encoder (21.8 M parameters). Weights travel as safetensors:
    `save_pretrained(folder)`, `PointEncoder.from_pretrained(folder or Hub id)`.

    >>> encoder = PointEncoder().eval()
    >>> vectors = encoder.embed(torch.randn(4, 2048, 3))    # 4 x 768
    """

    keep_strays = (
        False  # of clouds: see frame.py; True on an encoder whose clouds must lose nothing
    )
    # clouds stand as they are given, z up; False: vectors are the same however a cloud is turned
    upright = True
    # where config.json does not say: so it was then
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
        self.min_points = max(num_groups, group_size)  # of a cloud
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
        for name in ("vector_mean", "vector_std"):  # of `standardise_vectors`
            self.register_buffer(name, torch.ones(2 * embed_dim) if standardised else None)
        # tokenizer and position keep torch's: at 0.02, inputs of 3 all but vanish
        self.blocks.apply(init_weights)

    def hidden_states(
        self,
        tokens: Tensor,
        position: Tensor,
        layout: Layout | None = None,
        generator: BatchGenerator | None = None,
    ) -> list[Tensor]:
        """Tokens before the first block and after each one, `depth + 1` of B M C; the last is
        normalised.

        Tokens and position are B M C, or rows [n, C] of a `layout`. `generator` draws the
        drop-path, once a sample.
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
        self, patches: Tensor, centers: Tensor, index: Tensor, layout: Ragged
    ) -> tuple[Tensor, Tensor]:
        """Tokens and positions, rows [n, C], of the patches (of B M K 3) and centers (B M 3) at
        index B V.

        Packed, so that padding costs nothing and enters no BatchNorm.
        """
        first = centers.shape[1] * torch.arange(len(index), device=index.device)
        chosen = layout.pack((index + first[:, None])[..., None])[:, 0]
        return self.tokenizer(patches.flatten(0, 1)[chosen]), self.position(
            centers.flatten(0, 1)[chosen]
        )

    def features(
        self,
        patches: Tensor,
        centers: Tensor,
        layers: int = 1,
        generator: BatchGenerator | None = None,
    ) -> list[Tensor]:
        """Encoded tokens B M C of patches (B M K 3) and centers (B M 3) after each of the last
        `layers` blocks.
        """
        return self.hidden_states(self.tokenizer(patches), self.position(centers), None, generator)[
            -layers:
        ]

    def prepare(self, clouds: Clouds) -> Tensor:
        """Clouds as the encoder sees them, B num_points 3 on its device: see `frame`. No gradient
        flows through it.

        Raises ValueError for NaN, another shape, or fewer than `min_points` different points in a
        cloud.
        """
        if isinstance(clouds, Tensor | np.ndarray):
            if clouds.ndim not in (2, 3):
                raise ValueError(
                    f"points must be N x 3, B x N x 3 or a list of N x 3, found {list(clouds.shape)}"
                )
            clouds = as_array(clouds)[None] if clouds.ndim == 2 else as_array(clouds)
        if not len(clouds):
            raise ValueError("no clouds to embed")
        return torch.from_numpy(np.stack([self.frame(cloud).points for cloud in clouds])).to(
            self.norm.weight
        )

    def frame(self, cloud: Tensor | np.ndarray, min_points: int | None = None) -> Frame:
        """What the encoder sees of one cloud N 3, and where it lies. min_points: different points,
        instead of min_points.
        """
        min_points = self.min_points if min_points is None else min_points
        return frame(
            as_array(cloud), self.num_points, min_points, sample_one, self.keep_strays, self.upright
        )

    def poses(self, prepared: Tensor) -> list[Tensor]:
        """Prepared clouds B N 3 in every pose whose vectors are averaged: one, or all `TURNS` if
        not `upright`.
        """
        return (
            [prepared]
            if self.upright
            else [prepared @ turn.mT for turn in torch.from_numpy(TURNS).to(prepared)]
        )

    def vectors(self, prepared: Tensor, layer: int = -1, pooling: str = "mean_max") -> Tensor:
        """One vector a prepared cloud, see `embed`."""
        poses = self.poses(prepared)
        return torch.stack(
            [self.pool(self.states(pose)[0][layer], layer, pooling) for pose in poses]
        ).mean(0)

    def states(self, prepared: Tensor) -> tuple[list[Tensor], Tensor]:
        """Tokens of every layer (see `hidden_states`) of prepared clouds, and their centers B M 3."""
        grouped = group(prepared, self.num_groups, self.group_size)
        states = self.hidden_states(self.tokenizer(grouped.patches), self.position(grouped.centers))
        return states, grouped.centers

    def layer_tokens(self, points: Clouds) -> tuple[list[Tensor], Tensor]:
        """Tokens of every layer (see `hidden_states`) and their centers B M 3, grouped
        deterministically.
        """
        return self.states(self.prepare(points))

    def tokens(self, points: Clouds, layer: int = -1) -> tuple[Tensor, Tensor]:
        """Tokens B M C after block `layer` (0: the tokenizer's; -1: the encoder's output) and
        centers B M 3.

        Takes what `embed` takes. Centers are in the unit sphere of what the encoder sees: see
        `frame`.
        """
        states, centers = self.layer_tokens(points)
        return states[layer], centers

    def embed(self, points: Clouds, layer: int = -1, pooling: str = "mean_max") -> Tensor:
        """One vector a cloud, B E: pooled tokens, standardised; E = 2C for "mean_max", C for "mean"
        and "max".

        `points` is one cloud N 3, clouds B N 3, or a list of N 3 of any N: tensors, or arrays of
        numpy, in any unit. Call `.eval()` first, as `from_pretrained` does: in training mode the
        vector would depend on the rest of the batch. Raises ValueError for NaN, another shape, or
        fewer than `min_points` different points.
        """
        return self.vectors(self.prepare(points), layer, pooling)

    forward = embed

    def load_weights(self, source: nn.Module) -> None:
        """Take weights and BatchNorm statistics of an encoder of the same sizes.

        Raises RuntimeError for another.
        """
        weights = {
            name: value
            for name, value in source.state_dict().items()
            if not name.startswith("vector_")
        }
        self.load_state_dict(weights)

    def pool(self, tokens: Tensor, layer: int = -1, pooling: str = "mean_max") -> Tensor:
        """Tokens B M C of block `layer` as one vector B E a cloud, as of `embed`."""
        return self.standardise(pool(tokens, pooling), layer, pooling)

    def standardise(self, vectors: Tensor, layer: int = -1, pooling: str = "mean_max") -> Tensor:
        """Pooled tokens B E of block `layer`; of the last block standardised, where its statistics
        are known.
        """
        if self.vector_mean is None or self.vector_std is None or layer not in (-1, self.depth):
            return vectors
        part = {"mean_max": slice(None), "mean": slice(self.width), "max": slice(self.width, None)}[
            pooling
        ]
        return (vectors - self.vector_mean[part]) / self.vector_std[part]


def as_array(cloud: Tensor | np.ndarray) -> np.ndarray:
    """A tensor on any device, or what numpy takes for an array, as an array."""
    if isinstance(cloud, Tensor):
        cloud = cloud.detach().cpu()
        return cloud.float().numpy() if cloud.dtype == torch.bfloat16 else cloud.numpy()
    return np.asarray(cloud)


def pool(tokens: Tensor, pooling: str = "mean_max") -> Tensor:
    """Tokens B M C as one vector a cloud."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r}: one of {', '.join(POOLINGS)}")
    parts = {"mean": tokens.mean(1), "max": tokens.amax(1)}
    return torch.cat([parts[name] for name in pooling.split("_")], -1)


@torch.no_grad()
def calibrate_batchnorm(encoder: PointEncoder, points: Tensor, batch_size: int = 128) -> None:
    """Set every BatchNorm's running statistics to the mean over batches of points (n N 3).

    An encoder that was never trained has none, and a comparison against it would be one against
    noise.
    """
    norms = [module for module in encoder.modules() if isinstance(module, BatchNorm)]
    momenta, was_training = [norm.momentum for norm in norms], encoder.training
    for norm in norms:
        norm.reset_running_stats()
        # cumulative mean over batches, the same on every process
        norm.momentum, norm.synchronised = (
            None,
            False,
        )
        norm.train()
    for batch in points.split(batch_size):
        grouped = group(encoder.prepare(batch), encoder.num_groups, encoder.group_size)
        encoder.tokenizer(grouped.patches)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum, norm.synchronised = momentum, True
    encoder.train(was_training)


@torch.no_grad()
def standardise_vectors(encoder: PointEncoder, points: Tensor, batch_size: int = 64) -> None:
    """Make every channel of the encoder's vectors have mean 0 and standard deviation 1 over
    `points` (n N 3).

    Without it a few channels of large spread, and the mean that all clouds share, decide which
    vectors are alike.
    """
    encoder.vector_mean = encoder.vector_std = None
    vectors = torch.cat([encoder.embed(batch).cpu() for batch in points.split(batch_size)]).double()
    weight = encoder.norm.weight
    encoder.vector_mean = vectors.mean(0).to(weight)
    encoder.vector_std = vectors.std(0, correction=0).clamp_min(1e-6).to(weight)
    vars(encoder)["_hub_mixin_config"]["standardised"] = True
