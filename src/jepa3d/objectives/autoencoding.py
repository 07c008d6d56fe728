"""The objective that trains the discrete autoencoder (dVAE), as in ACT's first stage. 3D-JEPA
then predicts the tokens of the trained dVAE.
"""

import math

from torch import Tensor, nn

from jepa3d.config import DVAEConfig
from jepa3d.models.dvae import DVAE, DVAEOutput
from jepa3d.models.tokenizer import group
from jepa3d.ops import BatchGenerator


class Autoencoding(nn.Module):
    """Train the dVAE while the Gumbel temperature falls and the KL weight rises from 0, each along
    half a cosine.

    In Point-BERT and ACT the temperature falls over the first 100,000 of 200,000 steps, and the KL
    weight rises between steps 10,000 and 110,000. Here each change starts and ends at the same
    share of the run as in these papers: the temperature at 0 and 1/2, the KL weight at 1/20 and
    11/20.
    """

    def __init__(self, config: DVAEConfig, dvae: DVAE):
        super().__init__()
        self.dvae, self.config = dvae, config

    def forward(self, points: Tensor, generator: BatchGenerator, progress: float) -> DVAEOutput:
        """Compute the loss for points [B, N, 3].

        generator: source of all random draws. progress: the finished share of the run, 0 to 1.
        """
        dvae, (warm, cold) = self.dvae, self.config.temperature
        temperature = cold + (warm - cold) * (1 - _risen(2 * progress))
        kl_weight = self.config.kl_weight * _risen(2 * progress - 0.1)
        centers, patches, _ = group(
            points, dvae.num_groups, dvae.group_size, generator.stream("group")
        )
        return dvae(patches, centers, temperature, kl_weight, generator.stream("gumbel"))

    def after_step(self, progress: float) -> None:
        """Do nothing: this objective has no moving teacher."""

    def metrics(self, output: DVAEOutput) -> dict[str, float]:
        """Return metrics for the log: the terms of the loss, and the perplexity of the codes."""
        return {name: value.item() for name, value in output._asdict().items() if name != "loss"}


def _risen(done: float) -> float:
    """Return a value that rises from 0 to 1 along half a cosine while `done` goes from 0 to 1; it
    is 0 for smaller and 1 for larger values of `done`.
    """
    return (1 - math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
