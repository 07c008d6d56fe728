"""Parts of a pre-LN transformer, shared by encoder and decoder."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa3d.models.layout import Layout
from jepa3d.ops import BatchGenerator, uniform
from jepa3d.shapes import Float


class Attention(nn.Module):
    """Multi-head attention: queries are made from tokens [B, Q, C], keys and values from tokens
    [B, S, C].

    Both inputs may also be packed as rows [n, C] (see layout.py). Raises ValueError if `dim` is not
    a multiple of `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key_value = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor, queries: Layout | None = None, keys: Layout | None = None
    ) -> Tensor:
        """Attend from x, which gives the queries, to context, which gives keys and values.

        queries: layout of x if x is packed as rows. keys: layout of context if context is packed as
        rows. Returns tokens in the form of x.
        """
        query, key_value, mask = self.query(x), self.key_value(context), None
        if queries:
            query = queries.pad(query)
        if keys:
            key_value = keys.pad(key_value)
            mask = keys.mask if keys.mask is None else keys.mask.flatten(0, -2)[:, None, None]
        key_value = key_value.flatten(0, -3)
        # The decoder may give the queries of several passes per cloud, such as one for each target
        # block, but only one sequence of keys per cloud (see layout.py). The queries of a cloud are
        # then joined into one sequence here. `lead` is the shape before they are joined; after
        # attention, `out` is reshaped to it.
        lead = query.shape
        query = query.reshape(
            len(key_value), -1, self.num_heads, lead[-1] // self.num_heads
        ).transpose(1, 2)
        key, value = key_value.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = _attend(query, key, value, mask)
        out = out.transpose(1, 2).reshape(lead)
        return self.out(queries.pack(out) if queries else out)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention with torch's kernel; the mask is False at keys that are ignored."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # On a CPU, torch's bf16 kernel takes three to eight times as long to compute the gradient
        # as its fp32 kernel, so the inputs are converted to fp32.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(
                query.float(), key.float(), value.float(), attn_mask=mask
            )
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Mlp(nn.Sequential):
    """Two linear layers with a GELU between them; the hidden width is dim * ratio."""

    def __init__(self, dim: int, ratio: float):
        hidden = int(dim * ratio)
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Block(nn.Module):
    """A transformer block: self-attention and MLP, each pre-normalised and residual.

    `forward` takes tokens [B, M, C], or rows [n, C] together with their layout (see layout.py). The
    argument `keep` holds factors for the outputs of the two residual branches (see
    `drop_path_scales`). Its shape is [B, 1, 2] for tokens and [n, 2] for rows.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool = False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, qkv_bias)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(
        self, x: Float[Tensor, "*rest c"], layout: Layout | None = None, keep: Tensor | None = None
    ) -> Float[Tensor, "*rest c"]:
        normed = self.norm1(x)
        branch = self.attention(normed, normed, layout, layout)
        x = x + (branch if keep is None else branch * keep[..., :1])
        branch = self.mlp(self.norm2(x))
        return x + (branch if keep is None else branch * keep[..., 1:])


def drop_path_scales(
    rate: float, batch: int, depth: int, generator: BatchGenerator | None, like: Tensor
):
    """Choose at random which residual branches are dropped (stochastic depth, Huang et al. 2016);
    returns factors [batch, depth, 2] for the outputs of the two branches of each block.

    A factor is 0 for a dropped branch, else 1 / (1 - drop rate). The drop rate rises linearly from
    0 in the first block to `rate` in the last. like: a tensor of the wanted device and dtype.
    """
    rates = (
        rate
        * torch.arange(depth, device=like.device, dtype=like.dtype)[:, None]
        / max(depth - 1, 1)
    )
    draws = uniform(generator, (batch, depth, 2), like.device)
    return (draws >= rates).to(like.dtype) / (1 - rates)


def position_embedding(dim: int) -> nn.Sequential:
    """Make Point-MAE's position embedding: an MLP from coordinates (..., 3) to (..., dim)."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))


def init_xavier(module: nn.Module) -> None:
    """Initialise a linear layer or `Attention` with Xavier-uniform weights and zero biases, as in
    the decoders of Point-MAE and ACT.

    In those decoders one matrix [C, 3C] computes query, key and value. So the weights of all three
    are drawn here within the Xavier bound of a matrix of that size.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Attention):
        # `Module.apply` visits the linear layers inside `Attention` first, so the branch above has
        # already drawn the weights of query and key_value. Draw them again.
        bound = math.sqrt(6 / (4 * module.out.in_features))
        nn.init.uniform_(module.query.weight, -bound, bound)
        nn.init.uniform_(module.key_value.weight, -bound, bound)


def init_weights(module: nn.Module) -> None:
    """Initialise a linear layer with truncated normal weights (std 0.02) and zero biases, as in the
    encoders of Point-MAE and ACT.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
