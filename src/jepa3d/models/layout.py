"""Sequences of unequal length as packed rows: linear layers see no padding, only attention does.

Contexts of one batch differ in length by a half: padded, a third of the student's work would be on
nothing. A layout turns rows [n, C] into padded sequences and back; its `mask` is True at tokens
that exist, None if all do.
"""

import torch
from torch import Tensor


class Ragged:
    """One sequence a sample; `mask` (B V) has its True entries first, `num_rows` of them.

    The number is given, since counting would make the host wait for the device.
    """

    def __init__(self, mask: Tensor, num_rows: int):
        self.batch, self.longest = mask.shape
        self.num_rows = num_rows
        full = num_rows == mask.numel()
        self.mask = None if full else mask
        # A stable sort puts the places of True entries first; `nonzero` would wait for their
        # number.
        self._place = (
            None if full else mask.flatten().byte().argsort(descending=True, stable=True)[:num_rows]
        )

    def pad(self, rows: Tensor) -> Tensor:
        """Rows (..., n, C) as sequences (..., B, V, C), zero where there is no token."""
        if self._place is not None:
            empty = rows.new_zeros(*rows.shape[:-2], self.batch * self.longest, rows.shape[-1])
            rows = empty.index_copy(-2, self._place, rows)
        return rows.unflatten(-2, (self.batch, self.longest))

    def pack(self, sequences: Tensor) -> Tensor:
        """Sequences (..., B, V, C) as rows (..., n, C)."""
        rows = sequences.flatten(-3, -2)
        return rows if self._place is None else rows.index_select(-2, self._place)

    def per_row(self, values: Tensor) -> Tensor:
        """The value of its sample (B C) for every row, n C."""
        return self.pack(values[:, None].expand(-1, self.longest, -1))


class Joint:
    """[context ; mask tokens], P passes a sample, as rows: the contexts of each pass, then B x P x
    T mask tokens.

    As long as the passes share their context its rows stand there once; mask tokens may also stand
    alone.
    """

    def __init__(self, context: Ragged, passes: int, length: int):
        self.batch, self.passes, self.length = context.batch, passes, length
        self.context, self.num_masked = context, context.batch * passes * length
        self.mask = None
        if context.mask is not None:
            seen = context.mask[:, None].expand(-1, passes, -1)
            self.mask = torch.cat([seen, seen.new_ones(self.batch, passes, length)], 2)

    def pad(self, rows: Tensor) -> Tensor:
        """Rows as sequences B P V+T C; of mask tokens alone B P T C."""
        head, tail = rows.tensor_split([len(rows) - self.num_masked])
        tail = tail.unflatten(0, (self.batch, self.passes, self.length))
        if not len(head):
            return tail
        head = self.context.pad(head.unflatten(0, (-1, self.context.num_rows))).transpose(0, 1)
        return torch.cat([head.expand(-1, self.passes, -1, -1), tail], 2)

    def pack(self, sequences: Tensor) -> Tensor:
        """The inverse of `pad`, with the contexts of every pass."""
        if sequences.shape[2] == self.length:
            return sequences.flatten(0, 2)
        head, tail = sequences.split([self.context.longest, self.length], 2)
        return torch.cat(
            [self.context.pack(head.transpose(0, 1)).flatten(0, 1), tail.flatten(0, 2)]
        )

    def every_pass(self, rows: Tensor) -> Tensor:
        """Rows with the context of every pass, of rows whose passes may still share it."""
        head, tail = rows.tensor_split([len(rows) - self.num_masked])
        if len(head) == self.passes * self.context.num_rows:
            return rows
        return torch.cat([head.repeat(self.passes, 1), tail])

    def per_row(self, values: Tensor) -> Tensor:
        """The value of its sample (B C) for every row."""
        length = self.context.longest + self.length
        return self.pack(values[:, None, None].expand(-1, self.passes, length, -1))


Layout = Ragged | Joint
