"""The context-aware decoder (the paper's section III-D), whose layers all attend to the encoded
context. In this file, "the paper" is the 3D-JEPA paper (docs/method.md).
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa3d.models.layout import Joint, Ragged
from jepa3d.models.transformer import Attention, Mlp, init_xavier, position_embedding
from jepa3d.shapes import Blocks, Centers, Rows


class ContextAwareBlock(nn.Module):
    """One decoder layer: self-attention over [context ; mask tokens], cross-attention to the
    encoder's output, and an MLP, each with a residual connection.

    The cross-attention normalises only its queries: its keys and values come from the encoder's
    output, which is already normalised and is the same for every layer. Without `cross_attention`
    the layer is a plain transformer block (the paper's Table V, second row). With `isolated` every
    token attends only to the context, so mask tokens do not see each other.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        cross_attention: bool,
        qkv_bias: bool = False,
        isolated: bool = False,
    ):
        super().__init__()
        self.isolated = isolated
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = Attention(dim, num_heads, qkv_bias), Mlp(dim, mlp_ratio)
        self.crosses = cross_attention
        if cross_attention:
            self.cross_norm = nn.LayerNorm(dim)
            self.cross_attention = Attention(dim, num_heads, qkv_bias)

    def forward(self, x: Rows, context: Tensor, joint: Joint, last: bool = False) -> Tensor:
        """Update the tokens x, packed as rows [n, C] with the layout `joint` (see layout.py).

        context: the encoder's output, packed as rows with the layout `joint.context`. Its keys and
        values are computed once per cloud and used by all decoder passes (one pass per target block
        or one for all). last: whether this is the last layer. Returns the updated rows, in which
        every decoder pass has its own copy of the context. The last layer is an exception: it
        returns only the rows of mask tokens, since nothing reads the context afterwards.
        """
        normed = self.norm1(x)
        seen, keys = (
            (normed[: joint.context.num_rows], joint.context) if self.isolated else (normed, joint)
        )
        if last:  # the context's rows are still keys and values, but no longer queries
            x, queries = x[-joint.num_masked :], normed[-joint.num_masked :]
        else:
            x, queries = joint.every_pass(x), normed
        x = x + self.attention(queries, seen, joint, keys)
        if self.crosses:
            x = x + self.cross_attention(self.cross_norm(x), context, joint, joint.context)
        return x + self.mlp(self.norm2(x))


class ContextAwareDecoder(nn.Module):
    """Predict every target token from the encoded context and the position of the token's centre.

    By default each target block has its own forward pass ("decoder pass"), so that a block never
    sees another block's mask tokens, as in the paper's equation. If each of B clouds has A blocks,
    the passes run as one batch of B * A. stacked: all target blocks share one pass, as in the
    paper's overview picture. isolated: no mask token sees another mask token (AsymDSD, arXiv
    2506.21724), so one pass is enough. ranks: positions are embedded from `token_ranks` instead of
    coordinates, as in MPL-MAE (arXiv 2606.31570), but without the gate of that method. Without
    `ranks`, positions are embedded by the encoder's MLP `position`. depth: with 0, there are no
    layers, and `forward` is not used; instead, objectives/jepa.py passes the rows that `assemble`
    returns through the encoder's blocks.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 2,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        cross_attention: bool = True,
        stacked: bool = False,
        position_every_block: bool = True,
        qkv_bias: bool = False,
        isolated: bool = False,
        ranks: bool = False,
    ):
        super().__init__()
        self.stacked = stacked or isolated
        self.position_every_block = position_every_block
        self.checkpoints = False
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(
            ContextAwareBlock(dim, num_heads, mlp_ratio, cross_attention, qkv_bias, isolated)
            for _ in range(depth)
        )
        self.position = position_embedding(dim) if ranks else None
        self.norm = nn.LayerNorm(dim) if depth else nn.Identity()
        self.apply(init_xavier)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self, context: Rows, layout: Ragged, context_position: Rows, target_position: Blocks
    ) -> Blocks:
        """Predict the target tokens [B, A, T, C]: T tokens for each of A blocks.

        context and context_position: the encoded context and its embedded positions, both packed as
        rows [n, C] with the layout `layout`. target_position: the embedded positions of the
        targets, [B, A, T, C].
        """
        x, position, joint = self.assemble(context, layout, context_position, target_position)
        for layer, block in enumerate(self.blocks):
            if layer == 0 or self.position_every_block:
                x = x + position
            inputs = x, context, joint, layer == len(self.blocks) - 1
            x = (
                checkpoint(block, *inputs, use_reentrant=False)
                if self.checkpoints
                else block(*inputs)
            )
            if layer == 0:
                position = joint.every_pass(position)
        return self.predictions(self.norm(x), target_position)

    def assemble(
        self, context: Rows, layout: Ragged, context_position: Rows, target_position: Blocks
    ) -> tuple[Tensor, Tensor, Joint]:
        """Join the context with one mask token per target token. The arguments are those of
        `forward`.

        Returns [context ; mask tokens] as rows, their positions as rows, and the layout of both. In
        these rows, all decoder passes of a cloud still share one copy of the context.
        """
        batch, blocks, length, width = target_position.shape
        joint = Joint(layout, 1, blocks * length) if self.stacked else Joint(layout, blocks, length)
        position = torch.cat([context_position, target_position.reshape(-1, width)])
        return (
            torch.cat([context, self.mask_token.expand(batch * blocks * length, -1)]),
            position,
            joint,
        )

    @staticmethod
    def predictions(x: Rows, target_position: Blocks) -> Blocks:
        """Select the mask tokens, the last rows of x, and reshape them to [B, A, T, C]."""
        return x[-target_position.shape[:3].numel() :].view(target_position.shape)


def token_ranks(centers: Centers) -> Centers:
    """Replace each coordinate of the centres [B, M, 3] by its rank among the cloud's centres,
    scaled to [-1, 1].

    Ranks tell the order of the tokens along each axis but not the distances between tokens. The
    distances are hidden because they alone reveal much of a shape.
    """
    return centers.argsort(1).argsort(1).to(centers) * (2 / max(centers.shape[1] - 1, 1)) - 1
