"""Layouts pack token sequences of different lengths as rows, so that only attention needs padding.

With multi-block masks, the contexts of a batch (the visible tokens of each cloud) differ in length.
If each context were padded to the longest of its batch, about a quarter of the encoder's input
would be padding (for 64 tokens per cloud and batches of 128 clouds), and linear layers would waste
their work on it. So the tokens of all clouds are stored one after another as rows [n, C], without
padding. A layout converts these rows to padded sequences and back. The attribute `mask` of a layout
is False at padding; it is None if there is no padding.
"""

import torch
from torch import Tensor

from jepa3d.shapes import Blocks, Bool, Float, Rows, Shaped


class Ragged:
    """Layout with one sequence per cloud.

    mask: [B, V], True at tokens and False at padding, which must come after a cloud's tokens. V is
    the number of tokens of the longest sequence. num_rows: the number n of True entries; it is an
    argument because counting the entries on a GPU would make the CPU wait.
    """

    def __init__(self, mask: Bool[Tensor, "b v"], num_rows: int):
        self.batch, self.longest = mask.shape
        self.num_rows = num_rows
        full = num_rows == mask.numel()
        self.mask = None if full else mask
        # Indices of the True entries, found by sorting, since `nonzero` would make the CPU wait for
        # the GPU.
        self._place = (
            None if full else mask.flatten().byte().argsort(descending=True, stable=True)[:num_rows]
        )

    def pad(self, rows: Float[Tensor, "*rest rows c"]) -> Float[Tensor, "*rest b v c"]:
        """Convert rows (..., n, C) to sequences (..., B, V, C), with zeros as padding."""
        if self._place is not None:
            empty = rows.new_zeros(*rows.shape[:-2], self.batch * self.longest, rows.shape[-1])
            rows = empty.index_copy(-2, self._place, rows)
        return rows.unflatten(-2, (self.batch, self.longest))

    def pack(self, sequences: Shaped[Tensor, "*rest b v c"]) -> Shaped[Tensor, "*rest rows c"]:
        """Convert sequences (..., B, V, C) to rows (..., n, C)."""
        rows = sequences.flatten(-3, -2)
        return rows if self._place is None else rows.index_select(-2, self._place)

    def per_row(self, values: Float[Tensor, "b c"]) -> Rows:
        """Give each row the values of its cloud: values [B, C] become rows [n, C]."""
        return self.pack(values[:, None].expand(-1, self.longest, -1))


class Joint:
    """Layout of [context ; mask tokens] for P decoder passes per cloud.

    A decoder pass is one forward pass of the decoder, which predicts one target block of a cloud,
    or all its target blocks. The rows of the contexts come first, then the rows of the B * P * T
    mask tokens of all B clouds. Rows have one of three forms: with one copy of each context, which
    all passes share; with one copy of each context per pass; or without contexts. context: layout
    of the contexts. passes: P. length: number of mask tokens per pass, T.
    """

    def __init__(self, context: Ragged, passes: int, length: int):
        self.batch, self.passes, self.length = context.batch, passes, length
        self.context, self.num_masked = context, context.batch * passes * length
        self.mask = None
        if context.mask is not None:
            seen = context.mask[:, None].expand(-1, passes, -1)
            self.mask = torch.cat([seen, seen.new_ones(self.batch, passes, length)], 2)

    def pad(self, rows: Rows) -> Blocks:
        """Convert rows to sequences [B, P, V + T, C], or to [B, P, T, C] if the rows are only mask
        tokens. V is the length of the longest context.
        """
        head, tail = rows.tensor_split([len(rows) - self.num_masked])
        tail = tail.unflatten(0, (self.batch, self.passes, self.length))
        if not len(head):
            return tail
        head = self.context.pad(head.unflatten(0, (-1, self.context.num_rows))).transpose(0, 1)
        return torch.cat([head.expand(-1, self.passes, -1, -1), tail], 2)

    def pack(self, sequences: Blocks) -> Rows:
        """Convert sequences, as `pad` returns them, to rows. If the sequences have contexts, the
        rows have one copy of each context per pass.
        """
        if sequences.shape[2] == self.length:
            return sequences.flatten(0, 2)
        head, tail = sequences.split([self.context.longest, self.length], 2)
        return torch.cat(
            [self.context.pack(head.transpose(0, 1)).flatten(0, 1), tail.flatten(0, 2)]
        )

    def every_pass(self, rows: Rows) -> Float[Tensor, "every c"]:
        """Repeat the contexts for each decoder pass, unless the rows already hold one copy per
        pass.
        """
        head, tail = rows.tensor_split([len(rows) - self.num_masked])
        if len(head) == self.passes * self.context.num_rows:
            return rows
        return torch.cat([head.repeat(self.passes, 1), tail])

    def per_row(self, values: Float[Tensor, "b c"]) -> Rows:
        """Give each row the values of its cloud: values [B, C] become rows [n, C], with one copy of
        each context per pass.
        """
        length = self.context.longest + self.length
        return self.pack(values[:, None, None].expand(-1, self.passes, length, -1))


Layout = Ragged | Joint
