"""The discrete autoencoder (dVAE) of ACT's first stage, with or without ACT's image transformer. In
the paper of 3D-JEPA (arXiv 2409.15803), this dVAE is the frozen teacher.

Data flow: tokens -> DGCNN (a graph network) -> logits over codes -> Gumbel-softmax -> codebook ->
frozen ViT (optional) -> DGCNN -> folding decoder. 3D-JEPA predicts the output of the second DGCNN.
As a teacher the dVAE is deterministic: it runs in evaluation mode, and instead of a Gumbel sample
it uses the expected code or the most likely one (`expected_code` of `DVAE`). The method is that of
ACT (Dong et al. 2023, section 4); the networks are those of Point-BERT (Yu et al. 2022).
"""

import math
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa3d.models.backbone import PromptedViT
from jepa3d.models.hub import Pretrained
from jepa3d.models.tokenizer import BatchNorm, PatchTokenizer
from jepa3d.ops import BatchGenerator, chamfer_l1, gather_points, knn, uniform
from jepa3d.shapes import Centers, Float, Indices, Int, Patches, Tokens


class EdgeConv(nn.Module):
    """Compute, for each token i, the maximum over its neighbours j of
    LeakyReLU(GroupNorm(W [x_j - x_i ; x_i])) (Wang et al. 2019).

    If W = [Wd Wc], then W [x_j - x_i ; x_i] = Wd x_j + (Wc - Wd) x_i. So the two products, with Wd
    and with Wc - Wd, are computed once per token instead of once per pair (i, j).
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.linear = nn.Linear(2 * in_dim, out_dim, bias=False)
        self.norm = nn.GroupNorm(4, out_dim)

    def forward(self, x: Tokens, neighbours: Indices) -> Float[Tensor, "b m out"]:
        of_difference, of_center = self.linear.weight.chunk(2, 1)
        edges = (
            gather_points(F.linear(x, of_difference), neighbours)
            + F.linear(x, of_center - of_difference)[:, :, None]
        )
        edges = self.norm(edges.movedim(-1, 1)).movedim(1, -1)
        # LeakyReLU is increasing, so it may be applied after the maximum, which is cheaper
        return F.leaky_relu(edges.amax(2), 0.2)


class TokenDGCNN(nn.Module):
    """Apply four EdgeConvs, all with the same neighbours, then one linear layer to the concatenated
    outputs of all four (Yu et al. 2022).

    Before the EdgeConvs, a linear layer changes the tokens' width from `in_dim` to `dim`. The
    EdgeConvs' widths are multiples of `dim`. The output is normalised over the tokens of each
    cloud (GroupNorm, as in Yu et al.) or, with `over_batch`, over all tokens of the batch
    (BatchNorm).
    """

    def __init__(self, in_dim: int, out_dim: int, dim: int, over_batch: bool = False):
        super().__init__()
        widths = [dim, 2 * dim, 4 * dim, 4 * dim, 8 * dim]
        self.first = nn.Linear(in_dim, dim)
        self.layers = nn.ModuleList(EdgeConv(a, b) for a, b in pairwise(widths))
        self.last = nn.Linear(sum(widths[1:]), out_dim, bias=False)
        self.norm = BatchNorm(out_dim) if over_batch else nn.GroupNorm(4, out_dim)

    def forward(self, x: Tokens, neighbours: Indices) -> Float[Tensor, "b m out"]:
        x, outputs = self.first(x), []
        for layer in self.layers:
            x = layer(x, neighbours)
            outputs.append(x)
        out = self.last(torch.cat(outputs, -1))
        if isinstance(self.norm, BatchNorm):
            out = self.norm(out.flatten(0, 1)).view_as(out)
        else:
            out = self.norm(out.transpose(1, 2)).transpose(1, 2)
        return F.leaky_relu(out, 0.2)


class FoldingDecoder(nn.Module):
    """Decode a token to a coarse patch with an MLP. A second MLP then replaces each coarse point by
    four fine points: it folds a 2 x 2 grid around the coarse point.

    Raises ValueError if `group_size` is not a multiple of 4.
    """

    def __init__(self, dim: int, group_size: int, hidden_dim: int):
        super().__init__()
        if group_size % 4:
            raise ValueError(
                f"the dVAE decodes every patch in groups of 4 points: group_size {group_size} must be a multiple of 4"
            )
        self.num_coarse = group_size // 4
        self.coarse = nn.Sequential(
            nn.Linear(dim, 2 * hidden_dim),
            nn.ReLU(),
            nn.Linear(2 * hidden_dim, 2 * hidden_dim),
            nn.ReLU(),
            nn.Linear(2 * hidden_dim, 3 * self.num_coarse),
        )
        self.token = nn.Linear(dim, hidden_dim)
        self.point = nn.Linear(5, hidden_dim, bias=False)
        self.norm1, self.linear2 = BatchNorm(hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        self.norm2, self.linear3 = BatchNorm(hidden_dim), nn.Linear(hidden_dim, 3)
        axis = torch.tensor([-0.05, 0.05])
        self.register_buffer("grid", torch.cartesian_prod(axis, axis), persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        # The weights of the last layer are small, so that before training the fine points lie close
        # to the coarse points.
        nn.init.normal_(self.linear3.weight, std=0.01)

    def forward(self, tokens: Tokens) -> tuple[Float[Tensor, "b m coarse 3"], Patches]:
        """Decode tokens [B, M, C] to coarse patches [B, M, K/4, 3] and fine patches [B, M, K, 3],
        both relative to the patch centres.
        """
        coarse = self.coarse(tokens).unflatten(-1, (self.num_coarse, 3))
        around = coarse[..., None, :].expand(*coarse.shape[:-1], 4, 3)
        seeds = torch.cat([around, self.grid.expand(*around.shape[:-1], 2)], -1).flatten(2, 3)
        # All points of a patch share one token, so the layer `token` is applied once per patch.
        hidden = self.point(seeds) + self.token(tokens)[:, :, None]
        shape = hidden.shape
        hidden = F.relu(self.norm1(hidden.flatten(0, 2)))
        hidden = F.relu(self.norm2(self.linear2(hidden)))
        return coarse, self.linear3(hidden).view(*shape[:-1], 3) + around.flatten(2, 3)


class DVAEOutput(NamedTuple):
    loss: Tensor  # reconstruction + kl_weight * KL
    reconstruction: Tensor  # Chamfer-L1 of the coarse patches + Chamfer-L1 of the fine patches
    fine: Tensor  # Chamfer-L1 of the fine patches
    kl: Tensor  # KL(uniform || a cloud's mean code distribution), averaged over clouds
    # How many codes the batch uses, 1 to num_codes: exp(entropy) of the frequencies of the codes,
    # where each patch counts for its most likely code.
    perplexity: Tensor


class DVAE(Pretrained, library_name="jepa3d", license="apache-2.0"):
    """A discrete variational autoencoder of patches. Its method `features` computes the tokens that
    3D-JEPA predicts.

    backbone: folder or Hub id of the frozen ViT between the two DGCNNs; empty if there is no ViT.
    expected_code: whether `features` represents a patch by its expected code, softmax(logits) @
    codebook, instead of by its most likely code. docs/settings.md explains the other arguments.
    Raises ValueError if `group_size` or `width` is not a multiple of 4, if `dgcnn_dim` is odd, or
    if the ViT cannot be loaded.
    """

    # If an older config.json lacks the setting `expected_code`, the dVAE is loaded with the value
    # below.
    BEFORE: ClassVar = {"expected_code": False}

    def __init__(
        self,
        width: int = 384,
        num_codes: int = 8192,
        num_groups: int = 64,
        group_size: int = 32,
        num_points: int = 1024,
        tokenizer_dim: int = 128,
        dgcnn_dim: int = 128,
        folding_dim: int = 512,
        backbone: str = "",
        expected_code: bool = True,
    ):
        super().__init__()
        self.width, self.num_codes, self.expected_code = width, num_codes, expected_code
        self.num_groups, self.group_size, self.num_points = num_groups, group_size, num_points
        self.tokenizer = PatchTokenizer(width, tokenizer_dim)
        # With Point-BERT's GroupNorm all patches chose the same code for thousands of steps.
        # Normalisation over the batch makes the logits differ between patches from the first step
        # on, and the scale of 4 makes the logits larger than the Gumbel noise (std 1.3).
        self.to_logits = TokenDGCNN(width, num_codes, dgcnn_dim, over_batch=True)
        nn.init.constant_(self.to_logits.norm.weight, 4.0)
        self.codebook = nn.Parameter(torch.randn(num_codes, width))
        self.to_features = TokenDGCNN(width, width, dgcnn_dim)
        self.decoder = FoldingDecoder(width, group_size, folding_dim)
        self.backbone = PromptedViT(backbone, width) if backbone else None

    def _logits(self, patches: Patches, centers: Centers) -> tuple[Tokens, Indices]:
        """Compute the logits over codes, [B, M, num_codes], and the indices [B, M, 4] of the 4
        tokens nearest to each token, the token itself included. If M is less than 4, the indices
        are [B, M, M].
        """
        neighbours = knn(centers, centers, min(4, centers.shape[1]))
        return self.to_logits(self.tokenizer(patches), neighbours), neighbours

    def codes(self, patches: Patches, centers: Centers) -> Int[Tensor, "b m"]:
        """Return the most likely code of every patch, [B, M]."""
        return self._logits(patches, centers)[0].argmax(-1)

    def features(self, patches: Patches, centers: Centers, layers: int = 1) -> list[Tokens]:
        """Compute the tokens that 3D-JEPA predicts, without randomness: the output of the second
        DGCNN, [B, M, width].

        patches: [B, M, K, 3]. centers: [B, M, 3]. layers: ignored, since only this one output of a
        dVAE is used. Returns a list of one tensor, because other teachers return one tensor per
        layer.
        """
        logits, neighbours = self._logits(patches, centers)
        code = (
            F.softmax(logits, -1) @ self.codebook
            if self.expected_code
            else self.codebook[logits.argmax(-1)]
        )
        return [self._features(code, centers, neighbours)]

    def _features(
        self,
        tokens: Tokens,
        centers: Centers,
        neighbours: Indices,
        generator: BatchGenerator | None = None,
    ) -> Tokens:
        """Apply the ViT, if there is one, and then the second DGCNN to code vectors
        [B, M, width].
        """
        if self.backbone is not None:
            tokens = self.backbone(tokens, centers, generator and generator.stream("prompts"))
        return self.to_features(tokens, neighbours)

    def reconstruct(self, patches: Patches, centers: Centers) -> Patches:
        """Reconstruct patches [B, M, K, 3] from their most likely codes. Returns the fine patches
        of the decoder.
        """
        logits, neighbours = self._logits(patches, centers)
        return self.decoder(self._features(self.codebook[logits.argmax(-1)], centers, neighbours))[
            1
        ]

    def forward(
        self,
        patches: Patches,
        centers: Centers,
        temperature: float,
        kl_weight: float,
        generator: BatchGenerator | None = None,
    ) -> DVAEOutput:
        """Compute the training loss for patches [B, M, K, 3] with centers [B, M, 3].

        temperature: temperature of the Gumbel-softmax. kl_weight: weight of the KL term. generator:
        source of the Gumbel noise and of the dropout of the ViT's prompts.
        """
        logits, neighbours = self._logits(patches, centers)
        noise = uniform(generator, tuple(logits.shape), logits.device).clamp_(1e-7, 1 - 1e-7)
        gumbel = -torch.log(-torch.log(noise))
        soft = F.softmax((logits + gumbel) / temperature, -1)
        coarse, fine = self.decoder(
            self._features(soft @ self.codebook, centers, neighbours, generator)
        )
        coarse_loss, fine_loss = chamfer_l1(coarse, patches), chamfer_l1(fine, patches)
        # The mean code distribution of each cloud: [B, num_codes].
        usage = F.softmax(logits, -1).mean(1)
        # KL(uniform || usage) keeps all codes in use (Yu et al. 2022).
        kl = -(usage.clamp_min(1e-12).log() + math.log(self.num_codes)).mean(-1).mean()
        with torch.no_grad():
            codes = logits.argmax(-1).flatten()
            # counted in float32, since bf16 has no odd integers above 256
            counts = torch.zeros(self.num_codes, device=codes.device)
            counts.index_add_(0, codes, torch.ones_like(codes, dtype=counts.dtype))
            share = counts / counts.sum()
            perplexity = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
        return DVAEOutput(
            coarse_loss + fine_loss + kl_weight * kl,
            coarse_loss + fine_loss,
            fine_loss,
            kl,
            perplexity,
        )
