"""The point encoder: what every command trains, saves, loads and uses."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa3d.models.hub import Pretrained
from jepa3d.models.layout import Layout, Ragged
from jepa3d.models.tokenizer import BatchNorm, PatchTokenizer, group
from jepa3d.models.transformer import Block, drop_path_scales, init_weights, position_embedding
from jepa3d.ops import BatchGenerator, farthest_point_sample, gather_points, unit_sphere

POOLINGS = ("mean_max", "mean", "max")


class PointEncoder(
    Pretrained,
    library_name="jepa3d",
    tags=["point-cloud", "self-supervised", "3d-jepa"],
    license="apache-2.0",
):
    """PointNet tokens and a plain pre-LN transformer; positions are added at every block, or once.

    The defaults are the paper's encoder (22.1 M parameters). Weights travel as safetensors:
    `save_pretrained(folder)`, `PointEncoder.from_pretrained(folder or Hub id)`.

    >>> encoder = PointEncoder().eval()
    >>> vectors = encoder.embed(torch.randn(4, 2048, 3))    # 4 x 768
    """

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
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.blocks.apply(init_weights)  # tokenizer and position keep torch's: at 0.02, inputs of 3 all but vanish

    def hidden_states(
        self,
        tokens: Tensor,
        position: Tensor,
        layout: Layout | None = None,
        generator: BatchGenerator | None = None,
    ) -> list[Tensor]:
        """Tokens before the first block and after each one, `depth + 1` of B M C; the last is normalised.

        Tokens and position are B M C, or rows [n, C] of a `layout`. `generator` draws the drop-path, once a sample.
        """
        keep = None
        if self.training and self.drop_path > 0:
            batch = layout.batch if layout else len(tokens)
            keep = drop_path_scales(self.drop_path, batch, self.depth, generator, tokens).flatten(1)
            keep = (layout.per_row(keep) if layout else keep[:, None]).unflatten(-1, (self.depth, 2))
        states = [tokens]
        for layer, block in enumerate(self.blocks):
            x = states[-1] + position if layer == 0 or self.position_every_block else states[-1]
            inputs = x, layout, None if keep is None else keep[..., layer, :]
            states.append(checkpoint(block, *inputs, use_reentrant=False) if self.checkpoints else block(*inputs))
        states[-1] = self.norm(states[-1])
        return states

    def visible(self, patches: Tensor, centers: Tensor, index: Tensor, layout: Ragged) -> tuple[Tensor, Tensor]:
        """Tokens and positions, rows [n, C], of the patches (of B M K 3) and centers (B M 3) at index B V.

        Packed, so that padding costs nothing and enters no BatchNorm.
        """
        first = centers.shape[1] * torch.arange(len(index), device=index.device)
        chosen = layout.pack((index + first[:, None])[..., None])[:, 0]
        return self.tokenizer(patches.flatten(0, 1)[chosen]), self.position(centers.flatten(0, 1)[chosen])

    def features(
        self, patches: Tensor, centers: Tensor, layers: int = 1, generator: BatchGenerator | None = None
    ) -> list[Tensor]:
        """Encoded tokens B M C of patches (B M K 3) and centers (B M 3) after each of the last `layers` blocks."""
        return self.hidden_states(self.tokenizer(patches), self.position(centers), None, generator)[-layers:]

    def prepare(self, points: Tensor) -> Tensor:
        """Clouds B N 3 in any unit as the encoder was trained on them: unit sphere, at most `num_points` by FPS."""
        if points.ndim != 3 or points.shape[-1] != 3:
            raise ValueError(f"points must be B x N x 3, got {tuple(points.shape)}")
        if not torch.isfinite(points).all():
            raise ValueError("points contain NaN or infinite coordinates")
        if (points == points[:, :1]).all((1, 2)).any():
            raise ValueError("all points of a cloud are equal")
        points = unit_sphere(points.double()).to(self.norm.weight)  # in double first: map coordinates are large
        if points.shape[1] > self.num_points:
            points = unit_sphere(gather_points(points, farthest_point_sample(points, self.num_points)))
        return points

    def layer_tokens(self, points: Tensor) -> tuple[list[Tensor], Tensor]:
        """Tokens of every layer (see `hidden_states`) and their centers B M 3, grouped deterministically."""
        grouped = group(self.prepare(points), self.num_groups, self.group_size)
        states = self.hidden_states(self.tokenizer(grouped.patches), self.position(grouped.centers))
        return states, grouped.centers

    def tokens(self, points: Tensor, layer: int = -1) -> tuple[Tensor, Tensor]:
        """Tokens B M C after block `layer` (0: the tokenizer's; -1: the encoder's output) and centers B M 3.

        Centers are in the unit sphere of the cloud. Raises ValueError for NaN or too few points.
        """
        states, centers = self.layer_tokens(points)
        return states[layer], centers

    def embed(self, points: Tensor, layer: int = -1, pooling: str = "mean_max") -> Tensor:
        """One vector a cloud, B E: pooled tokens; E = 2C for "mean_max", C for "mean" and "max".

        `points` is B N 3 in any unit. Call `.eval()` first, as `from_pretrained` does: in training mode the
        vector would depend on the rest of the batch.
        """
        return pool(self.tokens(points, layer)[0], pooling)

    forward = embed


def pool(tokens: Tensor, pooling: str = "mean_max") -> Tensor:
    """Tokens B M C as one vector a cloud."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r}: one of {', '.join(POOLINGS)}")
    parts = {"mean": tokens.mean(1), "max": tokens.amax(1)}
    return torch.cat([parts[name] for name in pooling.split("_")], -1)


@torch.no_grad()
def calibrate_batchnorm(encoder: PointEncoder, points: Tensor, batch_size: int = 128) -> None:
    """Set every BatchNorm's running statistics to the mean over batches of points (n N 3).

    An encoder that was never trained has none, and a comparison against it would be one against noise.
    """
    norms = [module for module in encoder.modules() if isinstance(module, BatchNorm)]
    momenta, was_training = [norm.momentum for norm in norms], encoder.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.synchronised = None, False  # cumulative mean over batches, the same on every process
        norm.train()
    for batch in points.split(batch_size):
        grouped = group(encoder.prepare(batch), encoder.num_groups, encoder.group_size)
        encoder.tokenizer(grouped.patches)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum, norm.synchronised = momentum, True
    encoder.train(was_training)
