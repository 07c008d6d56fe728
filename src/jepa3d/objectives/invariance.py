"""The invariance rival of 3D-JEPA (the paper's Fig. 2): the encoder learns to give all views of a
shape the same embedding, and a regulariser prevents collapse.

Some views are whole clouds, others are crops (multi-crop). The regulariser is that of VICReg
(Bardes, Ponce, LeCun, ICLR 2022), or SIGReg (LeJEPA, Balestriero and LeCun, arXiv 2511.08544).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from jepa3d.config import PretrainConfig
from jepa3d.data.transforms import augment, random_crop
from jepa3d.models.encoder import PointEncoder, pool
from jepa3d.models.tokenizer import BatchNorm, group
from jepa3d.objectives.collapse import row_figures
from jepa3d.objectives.regularizers import sigreg, variance_covariance
from jepa3d.ops import BatchGenerator, uniform_scalar


class InvarianceOutput(NamedTuple):
    loss: Tensor  # scalar
    invariance: Tensor  # mean squared difference of embeddings from the mean of the global views
    regularizer: Tensor  # VICReg's variance and covariance terms, weighted; or SIGReg, unweighted
    embedding: Tensor  # V B E: V views, the global views first
    encoded: Tensor  # n C, the encoder's output for all tokens of the first view


class Invariance(nn.Module):
    """Train the encoder to give the same embedding to global views (the whole cloud) and partial
    views (crops: the points inside a ball).

    Each view is augmented independently, encoded, pooled and projected.
    """

    def __init__(self, config: PretrainConfig, encoder: PointEncoder):
        super().__init__()
        settings = config.invariance
        self.encoder, self.settings, self.config = encoder, settings, config
        hidden = settings.projector_dim
        self.projector = nn.Sequential(
            nn.Linear(2 * encoder.width, hidden),
            BatchNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            BatchNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, settings.embedding_dim),
        )

    def forward(
        self, points: Tensor, generator: BatchGenerator, progress: float = 0.0
    ) -> InvarianceOutput:
        """Compute the loss for points [B, N, 3], not yet augmented.

        generator: source of all random draws. progress: unused; other objectives may need it.
        """
        settings, encoder = self.settings, self.encoder
        low, high = settings.partial_ratio
        share = low + (high - low) * uniform_scalar(generator.stream("partial"))
        pooled, encoded = [], None
        for view in range(settings.global_views + settings.partial_views):
            draws, groups, seen = generator.stream(f"view{view}"), encoder.num_groups, points
            if view >= settings.global_views:
                # A view with fewer points gets fewer patches. So the distances between its patch
                # centres, and the overlap of its patches, are about those of a whole cloud.
                groups = max(1, round(share * groups))
                seen = random_crop(
                    points, max(encoder.group_size, round(share * points.shape[1])), draws
                )
            seen = augment(
                seen, self.config.scale, self.config.rotate, self.config.translate, draws
            )
            grouped = group(seen, groups, encoder.group_size, draws.stream("group"))
            position = encoder.position(grouped.centers)
            tokens = encoder.hidden_states(
                encoder.tokenizer(grouped.patches), position, None, draws.stream("drop_path")
            )[-1]
            encoded = tokens if encoded is None else encoded
            pooled.append(pool(tokens))
        embedding = torch.stack([self.projector(view) for view in pooled]).float()
        assert encoded is not None
        center = embedding[: settings.global_views].mean(0)
        invariance = (embedding - center).square().mean()
        if settings.regularizer == "sigreg":
            terms = [
                sigreg(view, generator.stream("sigreg"), settings.num_slices) for view in embedding
            ]
            regularizer = torch.stack(terms).mean()
            loss = (1 - settings.sigreg) * invariance + settings.sigreg * regularizer
        else:
            w_invariance, w_variance, w_covariance = settings.vicreg
            terms = [torch.stack(variance_covariance(view)) for view in embedding]
            variance, covariance = torch.stack(terms).mean(0)
            # The factor is 2 because VICReg's published code adds the covariance terms of its two
            # views, but `covariance` is a mean over views. (The published code averages the
            # variance terms, so `variance` needs no such factor.)
            regularizer = w_variance * variance + 2 * w_covariance * covariance
            # The factor is 4 because the published loss has the squared distance between two views,
            # which is 4 times the squared distance from either view to their mean.
            loss = 4 * w_invariance * invariance + regularizer
        return InvarianceOutput(loss, invariance, regularizer, embedding, encoded.flatten(0, 1))

    def after_step(self, progress: float) -> None:
        """Do nothing: this objective has no moving teacher."""

    def metrics(self, output: InvarianceOutput) -> dict[str, float]:
        """Return metrics for the log: the terms of the loss, and measures of collapse for the
        first view: for its embedding, and for the encoder's tokens.
        """
        parts = {"invariance": output.invariance.item(), "regularizer": output.regularizer.item()}
        embedding = row_figures("embedding", output.embedding[0].detach())
        return parts | embedding | row_figures("encoded", output.encoded.detach())
