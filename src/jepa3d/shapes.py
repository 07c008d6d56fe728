"""Shapes of tensors in signatures, in the notation of jaxtyping: `Float[Tensor, "b m 3"]`.

The tests check these shapes at every call (tests/conftest.py). Elsewhere they only inform the
reader: nothing is checked, and jaxtyping is not imported.

Axes: b clouds, n points, m tokens, k points of a patch, c channels, v tokens of the context,
a target blocks, t tokens of a target block; `rows` are the tokens of all clouds, one after another.
"""

import sys
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING or "jaxtyping" not in sys.modules:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
    from typing import Annotated as Shaped
else:
    from jaxtyping import Bool, Float, Int, Shaped

Points = Float[Tensor, "b n 3"]
Centers = Float[Tensor, "b m 3"]  # of patches
Patches = Float[Tensor, "b m k 3"]  # points relative to the centre of their patch
Indices = Int[Tensor, "b *any"]  # of points or tokens
Tokens = Float[Tensor, "b m c"]
Blocks = Float[Tensor, "b a t c"]  # tokens of target blocks
Rows = Float[Tensor, "rows c"]
Vectors = Float[Tensor, "b e"]

__all__ = ["Bool", "Float", "Int", "Shaped"]
