"""The objective of supervised training: cross-entropy of a classifier or part segmenter. Supervised
training uses the same training loop as pretraining.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from jepa3d.data.cloud import UNLABELLED
from jepa3d.models.heads import Classifier, LinearClassifier, Segmenter
from jepa3d.ops import BatchGenerator


class SupervisedOutput(NamedTuple):
    loss: Tensor  # scalar
    logits: Tensor  # B classes, or B N parts
    target: Tensor  # B, or B N


class Supervised(nn.Module):
    """Train with cross-entropy and label smoothing; clouds or points without a label are ignored.

    trained: "all" trains all weights; "head" freezes the encoder and trains the head alone;
    "head_first" trains all weights, but the statistics of the encoder's BatchNorms stay as they
    are, since the head was already fitted to vectors that the encoder computed with them
    (training/finetune.py).

    >>> # labels: [B]; parts: [B, N]
    >>> output = Supervised(classifier)(points, BatchGenerator(0), 0.0, labels)
    >>> output = Supervised(segmenter)(points, BatchGenerator(0), 0.0, labels, parts)
    """

    def __init__(
        self,
        network: Classifier | LinearClassifier | Segmenter,
        label_smoothing: float = 0.0,
        trained: str = "all",
    ):
        super().__init__()
        self.network, self.label_smoothing, self.trained = network, label_smoothing, trained
        if trained == "head":
            network.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "Supervised":
        """Set the mode as in torch, with one exception: modules whose statistics must not change
        (see `trained`) stay in evaluation mode.
        """
        super().train(mode)
        if self.trained == "head":
            self.network.encoder.eval()
        elif self.trained == "head_first":
            self.network.encoder.tokenizer.eval()  # no other part of the encoder has BatchNorms
        return self

    def forward(
        self,
        points: Tensor,
        generator: BatchGenerator,
        progress: float,
        labels: Tensor,
        parts: Tensor | None = None,
    ) -> SupervisedOutput:
        """Compute the loss for points [B, N, 3] with labels [B] and, for a segmenter, parts [B, N].

        labels: classes; for a segmenter, the categories of the clouds, which are an input of the
        network. parts: part labels, the targets of a segmenter.
        generator: source of all random draws. progress: unused; other objectives may need it.
        """
        if isinstance(self.network, Segmenter):
            assert parts is not None
            logits, target = self.network(points, labels, generator), parts
        else:
            logits, target = self.network(points, generator), labels
        flat, smoothing = logits.flatten(0, -2).float(), self.label_smoothing
        loss = F.cross_entropy(
            flat, target.flatten(), ignore_index=UNLABELLED, label_smoothing=smoothing
        )
        return SupervisedOutput(loss, logits, target)

    def after_step(self, progress: float) -> None:
        """Do nothing: this objective has no moving teacher."""

    def metrics(self, output: SupervisedOutput) -> dict[str, float]:
        """Return the accuracy on the batch's labelled clouds or points, in %."""
        correct = (output.logits.argmax(-1) == output.target)[output.target != UNLABELLED]
        return {"accuracy": 100 * correct.float().mean().item()}
