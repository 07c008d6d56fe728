"""Types that state the shapes of tensors in signatures, like `Float[Tensor, "b m 3"]` of jaxtyping.

In the tests, every call of a function of ops.py or of `models/` (except layout.py) checks these
shapes: tests/conftest.py imports jaxtyping before this file. Outside the tests, nothing is checked
and jaxtyping is not imported; the types only inform the reader.

Each letter stands for the size of an axis: b is the number of clouds, n of points of a cloud, m of
tokens of a cloud, k of points of a patch, c of channels of a token, e of channels of a vector, v of
tokens of a context, a of target blocks of a cloud, and t of tokens of a target block. `rows` is the
number of tokens of all clouds together; the tokens are stored one cloud after another. A name with
a star, such as `*any` or `*rest`, stands for any number of axes.
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
Centers = Float[Tensor, "b m 3"]  # centres of patches
Patches = Float[Tensor, "b m k 3"]  # points, relative to the centre of their patch
Indices = Int[Tensor, "b *any"]  # indices of points or tokens
Tokens = Float[Tensor, "b m c"]
Blocks = Float[Tensor, "b a t c"]  # the tokens of target blocks
Rows = Float[Tensor, "rows c"]
Vectors = Float[Tensor, "b e"]

__all__ = ["Bool", "Float", "Int", "Shaped"]
