"""The context-aware decoder (paper III-D): the encoded context is fed to every layer."""

import torch
from torch import Tensor, nn

from jepa3d.models.transformer import Attention, Mlp, init_weights


class ContextAwareBlock(nn.Module):
    """Self-attention over [context ; mask tokens], cross-attention to the encoder's output, MLP; all residual.

    The cross-attention's query is normalised; its key and value are the encoder's output, normalised already
    and the same for every block. Without `cross_attention` it is a plain block (Table V, second row).
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, cross_attention: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = Attention(dim, num_heads), Mlp(dim, mlp_ratio)
        self.crosses = cross_attention
        if cross_attention:
            self.cross_norm, self.cross_attention = nn.LayerNorm(dim), Attention(dim, num_heads)

    def forward(self, x: Tensor, context: Tensor, self_mask: Tensor, context_mask: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, self_mask)
        if self.crosses:
            # Queries do not see each other here, so all blocks of a sample share one call, and the context's
            # key and value are projected once a sample instead of once a target block.
            query = self.cross_norm(x).reshape(len(context), -1, x.shape[-1])
            x = x + self.cross_attention(query, context, context_mask).view_as(x)
        return x + self.mlp(self.norm2(x))


class ContextAwareDecoder(nn.Module):
    """Predicts every target token from the encoded context and the positions of the target's centres.

    One pass a target block, all of them batched as B*A, so that a block never sees another block's mask
    tokens (the paper's equation); `stacked` puts all blocks in one pass (its overview picture).
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
    ):
        super().__init__()
        self.stacked, self.position_every_block = stacked, position_every_block
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(ContextAwareBlock(dim, num_heads, mlp_ratio, cross_attention) for _ in range(depth))
        self.norm = nn.LayerNorm(dim) if depth else nn.Identity()
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        context: Tensor,
        mask: Tensor,
        context_position: Tensor,
        target_position: Tensor,
    ) -> Tensor:
        """Predictions B A T C.

        context B V C, mask B V (True where a token exists), context_position B V C, target_position B A T C.
        """
        x, position, joint = self.assemble(context, mask, context_position, target_position)
        for layer, block in enumerate(self.blocks):
            x = block(x + position if layer == 0 or self.position_every_block else x, context, joint, mask)
        return self.predictions(self.norm(x), target_position)

    def assemble(
        self, context: Tensor, mask: Tensor, context_position: Tensor, target_position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[context ; mask tokens], their positions and mask, one row a pass: (B*P) S C, P = A or 1 if stacked."""
        if self.stacked:
            target_position = target_position.flatten(1, 2)[:, None]
        passes, length = target_position.shape[1:3]

        def join(head: Tensor, tail: Tensor) -> Tensor:
            return torch.cat([head[:, None].expand(-1, passes, *head.shape[1:]), tail], 2).flatten(0, 1)

        x = join(context, self.mask_token.expand_as(target_position))
        position = join(context_position, target_position)
        joint = join(mask[..., None], mask.new_ones(len(mask), passes, length, 1))[..., 0]
        return x, position, joint

    @staticmethod
    def predictions(x: Tensor, target_position: Tensor) -> Tensor:
        """The mask tokens of every pass, (B*P) S C, as B A T C."""
        batch, blocks, length, _ = target_position.shape
        tokens = blocks * length * batch // len(x)
        return x[:, -tokens:].reshape(batch, blocks, length, -1)
