"""Networks for downstream tasks: an encoder with a head for classification or part segmentation
(the paper's section IV-B).
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa3d.models.encoder import Clouds, PointEncoder
from jepa3d.models.hub import Pretrained
from jepa3d.models.tokenizer import BatchNorm, Groups, group
from jepa3d.ops import BatchGenerator, three_nn_interpolate, uniform
from jepa3d.shapes import Bool, Centers, Float, Int, Points, Rows, Tokens, Vectors

UNKNOWN = "unknown"  # label given to a cloud that resembles no class


class Classifier(
    Pretrained, library_name="jepa3d", tags=["point-cloud", "classification"], license="apache-2.0"
):
    """Classify clouds with an MLP on [class token ; maximum over tokens], as in Point-MAE and ACT.

    The MLP has two hidden layers of width 256, each with BatchNorm, ReLU and dropout. A linear
    layer to the classes follows. encoder: arguments of `PointEncoder`. The class token and its
    position are not pretrained.

    >>> model = Classifier.from_pretrained("runs/classifier/model")
    >>> model.predict(torch.randn(4, 2048, 3)).argmax(-1)    # 4 class numbers, indices of model.class_names
    """

    PARTS: ClassVar = {"encoder": PointEncoder}  # see `Pretrained` (hub.py)

    def __init__(self, encoder: dict[str, Any], class_names: list[str], dropout: float = 0.5):
        super().__init__()
        self.encoder, self.class_names = PointEncoder(**encoder), list(class_names)
        width = self.encoder.width
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.cls_position = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.hidden1, self.hidden2 = Hidden(2 * width, 256, dropout), Hidden(256, 256, dropout)
        self.out = nn.Linear(256, len(class_names))

    def forward(self, points: Points, generator: BatchGenerator | None = None) -> Vectors:
        """Compute logits [B, classes] of clouds [B, N, 3] in the unit sphere.

        generator: source of all random draws (first patch centre, drop-path, dropout).
        """
        tokens = self.encode(points, generator)
        x = torch.cat([tokens[:, 0], tokens[:, 1:].amax(1)], -1)
        x = self.hidden1(x, generator and generator.stream("dropout1"))
        return self.out(self.hidden2(x, generator and generator.stream("dropout2")))

    def encode(self, points: Points, generator: BatchGenerator | None = None) -> Tokens:
        """Encode clouds [B, N, 3]; returns the tokens [B, 1 + M, C] after the last block, the class
        token first.
        """
        encoder, grouped = self.encoder, _group(self.encoder, points, generator)
        tokens, position = encoder.tokenizer(grouped.patches), encoder.position(grouped.centers)
        rows = (len(points), 1, encoder.width)
        tokens = torch.cat([self.cls_token.expand(rows), tokens], 1)
        position = torch.cat([self.cls_position.expand(rows), position], 1)
        return encoder.hidden_states(
            tokens, position, None, generator and generator.stream("drop_path")
        )[-1]

    def predict(self, points: Clouds) -> Vectors:
        """Compute logits [B, classes] of clouds, which are given as for `PointEncoder.embed`.

        Raises ValueError as `PointEncoder.prepare` does.
        """
        return self(self.encoder.prepare(points))


class LinearClassifier(
    Pretrained, library_name="jepa3d", tags=["point-cloud", "classification"], license="apache-2.0"
):
    """Classify clouds with a linear head on the encoder's vectors.

    Such a head is fitted by `jepa3d label`, and at the start of head-first fine-tuning
    (training/finetune.py). encoder: arguments of `PointEncoder`. layer and pooling: as for
    `PointEncoder.embed`. least_likeness: a cloud is unknown if the cosine between its standardised
    vector and the nearest class mean is lower than least_likeness (see inference/label.py); with
    -1, no cloud is unknown. Logits do not depend on least_likeness.
    """

    PARTS: ClassVar = {"encoder": PointEncoder}  # see `Pretrained` (hub.py)

    def __init__(
        self,
        encoder: dict[str, Any],
        class_names: list[str],
        layer: int = -1,
        pooling: str = "mean_max",
        least_likeness: float = -1.0,
    ):
        super().__init__()
        self.encoder = PointEncoder(**encoder)
        self.class_names = class_names
        self.layer = layer
        self.pooling = pooling
        self.least_likeness = least_likeness
        self.out = nn.Linear(self.encoder.width * len(pooling.split("_")), len(class_names))
        if least_likeness > -1:
            # inference/label.py sets the values of these three buffers: the mean (`shift`) and
            # standard deviation (`spread`) of vectors, and one mean of standardised vectors per
            # class (`means`). The rows of `means` have length 1, so that `unknown` computes
            # cosines.
            self.shift, self.spread = (
                nn.Buffer(torch.ones(self.out.in_features)) for _ in range(2)
            )
            self.means = nn.Buffer(torch.ones_like(self.out.weight))

    def forward(self, points: Points, generator: BatchGenerator | None = None) -> Vectors:
        """Compute logits [B, classes] of clouds [B, N, 3] in the unit sphere.

        generator: source of all random draws (first patch centre, drop-path).
        """
        return self.out(self.vectors(points, generator))

    def vectors(self, points: Points, generator: BatchGenerator | None = None) -> Vectors:
        """Compute the inputs of the head, [B, E]. The arguments are those of `forward`."""
        encoder, grouped = self.encoder, _group(self.encoder, points, generator)
        tokens, position = encoder.tokenizer(grouped.patches), encoder.position(grouped.centers)
        states = encoder.hidden_states(
            tokens, position, None, generator and generator.stream("drop_path")
        )
        return encoder.pool(states[self.layer], self.layer, self.pooling)

    def unknown(self, vectors: Vectors) -> Bool[Tensor, " b"]:
        """Return a mask [B] that is True for the vectors [B, E] of unknown clouds (see
        `least_likeness`).
        """
        if self.least_likeness <= -1:
            return torch.zeros(len(vectors), dtype=torch.bool)
        likeness = F.normalize((vectors - self.shift) / self.spread, dim=-1) @ self.means.T
        return likeness.amax(-1) < self.least_likeness

    def predict(self, points: Clouds) -> Vectors:
        """Compute logits [B, classes] of clouds, which are given as for `PointEncoder.embed`.

        Raises ValueError as `PointEncoder.prepare` does.
        """
        return self(self.encoder.prepare(points))


class Segmenter(
    Pretrained,
    library_name="jepa3d",
    tags=["point-cloud", "part-segmentation"],
    license="apache-2.0",
):
    """Predict a part for every point of a cloud whose category is known, as in Point-MAE.

    encoder: arguments of `PointEncoder`. class_names: the names of the categories. parts_of: the
    part numbers of each category. layers: the numbers of the three blocks whose tokens are used.
    The head is an MLP with layers of widths 512, 256 and the number of parts. For each point, the
    head sees the point's coordinates, a token interpolated from the tokens of the three nearest
    centres, and a vector of the whole shape. This vector has the max and mean of the tokens, and an
    embedding of the category. The MLP's first layer is applied to the tokens before they are
    interpolated. Interpolation and the matrix of this layer are linear, so their order does not
    change the result. But in this order, the layer runs on M tokens instead of N points.
    """

    PARTS: ClassVar = {"encoder": PointEncoder}  # see `Pretrained` (hub.py)

    def __init__(
        self,
        encoder: dict[str, Any],
        class_names: list[str],
        part_names: list[str],
        parts_of: list[list[int]],
        layers: list[int],
        dropout: float = 0.5,
    ):
        super().__init__()
        self.encoder, self.layers, self.parts_of = PointEncoder(**encoder), list(layers), parts_of
        self.class_names, self.part_names = list(class_names), list(part_names)
        width = len(layers) * self.encoder.width
        # This norm is for the tokens of the two earlier blocks; the encoder itself normalises the
        # tokens of the last block.
        self.norm = nn.LayerNorm(self.encoder.width)
        self.category = nn.Sequential(nn.Linear(len(class_names), 64), nn.LeakyReLU(0.2))
        self.from_point, self.from_token = nn.Linear(3, 512), nn.Linear(width, 512, bias=False)
        self.from_shape = nn.Linear(2 * width + 64, 512, bias=False)
        self.norm1, self.dropout = BatchNorm(512), Dropout(dropout)
        self.hidden2 = Hidden(512, 256, 0.0)
        self.out = nn.Linear(256, len(part_names))

    def forward(
        self, points: Points, labels: Int[Tensor, " b"], generator: BatchGenerator | None = None
    ) -> Tokens:
        """Compute logits [B, N, parts] of clouds [B, N, 3] in the unit sphere.

        labels: the clouds' category numbers, [B]. generator: source of all random draws.
        """
        return self.decode(points, *self.encode(points, generator), labels, generator)

    def decode(
        self,
        at: Points,
        tokens: Tokens,
        centers: Centers,
        labels: Int[Tensor, " b"],
        generator: BatchGenerator | None = None,
    ) -> Float[Tensor, "b n parts"]:
        """Compute logits [B, Q, parts] of the points `at` [B, Q, 3]. These need not be points of
        the encoded clouds, but must be in the same coordinates.

        tokens and centers: as `encode` returns them. labels: the clouds' category numbers, [B].
        generator: source of the random numbers for dropout.
        """
        pooled = torch.cat([tokens.amax(1), tokens.mean(1)], -1)
        category = self.category(F.one_hot(labels, len(self.class_names)).to(tokens))
        local = three_nn_interpolate(at, centers, self.from_token(tokens))
        x = (
            self.from_point(at)
            + local
            + self.from_shape(torch.cat([pooled, category], -1))[:, None]
        )
        rows = F.relu(self.norm1(x.flatten(0, 1)))
        rows = self.dropout(rows.view_as(x), generator and generator.stream("dropout")).flatten(
            0, 1
        )
        return self.out(self.hidden2(rows)).unflatten(0, at.shape[:2])

    def encode(
        self, points: Points, generator: BatchGenerator | None = None
    ) -> tuple[Tokens, Centers]:
        """Encode clouds [B, N, 3]; returns the tokens of the three blocks, concatenated to
        [B, M, 3C], and the patch centers [B, M, 3].
        """
        encoder, grouped = self.encoder, _group(self.encoder, points, generator)
        draws = generator and generator.stream("drop_path")
        states = encoder.hidden_states(
            encoder.tokenizer(grouped.patches), encoder.position(grouped.centers), None, draws
        )
        chosen = [
            states[layer] if layer == encoder.depth else self.norm(states[layer])
            for layer in self.layers
        ]
        return torch.cat(chosen, -1), grouped.centers


def thirds(depth: int) -> tuple[int, int, int]:
    """Return the number of the last block in each third of an encoder's blocks: 4, 8 and 12 for
    depth 12.
    """
    return max(1, round(depth / 3)), max(1, round(2 * depth / 3)), depth


class Hidden(nn.Module):
    """Apply a linear layer, BatchNorm, ReLU and dropout to rows: [n, width] -> [n, out]."""

    def __init__(self, width: int, out: int, dropout: float):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.norm = BatchNorm(out)
        self.dropout = Dropout(dropout)

    def forward(self, x: Rows, generator: BatchGenerator | None = None) -> Tensor:
        return self.dropout(F.relu(self.norm(self.linear(x))), generator)


class Dropout(nn.Module):
    """Apply dropout with an explicit generator, so that a resumed run drops the same elements.

    The first axis of the input is the batch.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(
        self, x: Float[Tensor, "*any"], generator: BatchGenerator | None = None
    ) -> Float[Tensor, "*any"]:
        if not self.training or self.rate == 0:
            return x
        keep = (uniform(generator, tuple(x.shape), x.device) >= self.rate).to(x.dtype)
        return x * keep.mul_(1 / (1 - self.rate))


def _group(encoder: PointEncoder, points: Points, generator: BatchGenerator | None) -> Groups:
    """Group points [B, N, 3] into patches. The first patch centre is a random point if there is a
    generator, else the point farthest from the centroid.
    """
    draws = generator.stream("group") if generator else None
    return group(points, encoder.num_groups, encoder.group_size, draws)
