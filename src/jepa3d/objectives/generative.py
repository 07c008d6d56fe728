"""The generative rival of 3D-JEPA (the paper's Fig. 2), as in Point-MAE: reconstruct the points of
masked patches.

"The paper" is that of 3D-JEPA, which jepa.py names. Point-MAE is from Pang et al., "Masked
Autoencoders for Point Cloud Self-supervised Learning", ECCV 2022.
"""

from typing import NamedTuple

from torch import Tensor, nn

from jepa3d.config import PretrainConfig
from jepa3d.models import sampling
from jepa3d.models.decoder import ContextAwareDecoder
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.tokenizer import group
from jepa3d.objectives.collapse import row_figures
from jepa3d.ops import BatchGenerator, chamfer_l2, gather_points


class GenerativeOutput(NamedTuple):
    # Axes: B clouds, T masked patches per cloud, K points per patch, n visible tokens in the whole
    # batch, C the width of the encoder.
    loss: Tensor  # scalar, Chamfer-L2 between predicted and true masked patches
    prediction: Tensor  # B T K 3, points of masked patches, relative to their centres
    target: Tensor  # B T K 3, the true masked patches
    encoded: Tensor  # n C, the encoder's output for all visible tokens of the batch


class Generative(nn.Module):
    """Masked autoencoder: the encoder sees the visible tokens; a plain decoder and a linear head
    predict the K points of each masked patch.

    The decoder is plain: unlike that of 3D-JEPA, it has no cross-attention to the encoder's output.
    """

    def __init__(self, config: PretrainConfig, encoder: PointEncoder):
        super().__init__()
        self.encoder, self.mask_ratio = encoder, config.generative.mask_ratio
        self.decoder = ContextAwareDecoder(
            encoder.width,
            config.generative.decoder_depth,
            config.encoder.num_heads,
            config.encoder.mlp_ratio,
            cross_attention=False,
            stacked=True,
            position_every_block=encoder.position_every_block,
            qkv_bias=config.encoder.qkv_bias,
        )
        self.head = nn.Linear(encoder.width, 3 * encoder.group_size)

    def forward(
        self, points: Tensor, generator: BatchGenerator, progress: float = 0.0
    ) -> GenerativeOutput:
        """Compute the loss for points [B, N, 3].

        generator: source of all random draws. progress: not used here. training/loop.py passes this
        number to every objective, since the dVAE's objective needs it.
        """
        encoder = self.encoder
        centers, patches, _ = group(
            points, encoder.num_groups, encoder.group_size, generator.stream("group")
        )
        sample = sampling.random(centers, generator.stream("sampler"), self.mask_ratio)
        layout = sample.layout()
        # As in Point-MAE, all patches are tokenized, so BatchNorm's statistics include the masked
        # patches.
        tokens = layout.pack(gather_points(encoder.tokenizer(patches), sample.context))
        position = layout.pack(encoder.position(gather_points(centers, sample.context)))
        encoded = encoder.hidden_states(tokens, position, layout, generator.stream("drop_path"))[-1]
        masked = encoder.position(gather_points(centers, sample.target))
        decoded = self.decoder(encoded, layout, position, masked)[:, 0]
        prediction = self.head(decoded).unflatten(-1, (-1, 3))
        target = gather_points(patches.flatten(2), sample.target[:, 0]).unflatten(-1, (-1, 3))
        return GenerativeOutput(chamfer_l2(prediction.float(), target), prediction, target, encoded)

    def after_step(self, progress: float) -> None:
        """Do nothing: this objective has no moving teacher."""

    def metrics(self, output: GenerativeOutput) -> dict[str, float]:
        """Return metrics for the log: measures of collapse for the encoder's tokens."""
        return row_figures("encoded", output.encoded.detach())
