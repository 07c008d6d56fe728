"""A frozen image transformer (ViT) with learned prompt tokens. It can be a part of the discrete
autoencoder (the dVAE of dvae.py), as in ACT (Dong et al. 2023).

Runs do not store the ViT's weights. They store a checksum of the weights and the place where the
ViT is found: the path of its folder, or its Hub id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jepa3d.models.hub import first_line, load_file, local_folder, read_settings
from jepa3d.models.transformer import position_embedding
from jepa3d.ops import BatchGenerator, uniform
from jepa3d.plain import sha256_of
from jepa3d.shapes import Centers, Tokens

if TYPE_CHECKING:
    from transformers import ViTModel

# The next two values are those of ACT.
NUM_PROMPTS = 64  # prompt tokens per layer
DROPOUT = 0.1  # share of the prompts' elements that are set to 0 in training
HINT = (
    "runs do not store a ViT's weights: give the ViT's folder or Hub id as dvae.backbone, "
    "or as backbone in the config.json of a dVAE"
)


class PromptedViT(nn.Module):
    """Apply a frozen ViT to the tokens of a cloud. Every layer has its own learned prompt tokens,
    which stand before the cloud's tokens.

    name: folder or Hub id of the ViT. width: number of channels of the cloud's tokens. Only the
    ViT's transformer layers and last norm are used, not its image patches, class token or image
    positions. Training changes only the prompts, their positions, the MLP that embeds the tokens'
    centers, and the two linear layers that change the width before and after the ViT.
    """

    def __init__(self, name: str, width: int):
        super().__init__()
        vit, sha256 = load_vit(name)
        self.name, self.sha256 = name, sha256
        # The tuple hides the ViT from parameters(), state_dict() and train(), so it stays frozen.
        self._frozen = (vit,)
        dim = vit.config.hidden_size
        self.enter, self.leave = nn.Linear(width, dim), nn.Linear(dim, width)
        self.position = position_embedding(dim)
        self.prompts, self.prompt_positions = (
            nn.Parameter(
                nn.init.trunc_normal_(torch.empty(len(vit.layers), NUM_PROMPTS, dim), std=0.02)
            )
            for _ in range(2)
        )
        # The sha256 of the ViT is stored with the trained weights, so that a checkpoint or an
        # exported dVAE is never used with another ViT.
        self.register_buffer("digest", torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(check_digest)

    def forward(
        self, tokens: Tokens, centers: Centers, generator: BatchGenerator | None = None
    ) -> Tokens:
        """Transform tokens [B, M, width] with centers [B, M, 3]; returns tokens of the same shape.

        Positions are added before every layer, as in ACT. generator: source of the random numbers
        for the prompts' dropout, which is applied only in training.
        """
        vit = self._frozen[0]
        hidden, position = self.enter(tokens), self.position(centers)
        for layer, prompts, prompt_position in zip(
            vit.layers, self.prompts, self.prompt_positions, strict=True
        ):
            prompts = prompts.expand(len(tokens), -1, -1)
            if self.training:
                kept = uniform(generator, tuple(prompts.shape), prompts.device) >= DROPOUT
                prompts = prompts * kept / (1 - DROPOUT)
            hidden = layer(torch.cat([prompts + prompt_position, hidden + position], 1))[
                :, NUM_PROMPTS:
            ]
        return self.leave(vit.layernorm(hidden))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PromptedViT:
        self._frozen[0]._apply(fn, recurse)  # gives the hidden ViT the new device or dtype
        return super()._apply(fn, recurse)


def check_digest(
    module: PromptedViT, state_dict: Mapping[str, Tensor], prefix: str, *others: object
) -> None:
    """Check that weights were trained with this module's ViT. Torch calls this hook before it loads
    the weights.

    Raises ValueError if they were trained with another ViT.
    """
    found = state_dict.get(f"{prefix}digest")
    if found is not None and bytes(found.tolist()).hex() != module.sha256:
        raise ValueError(
            f"backbone {module.name} is not the ViT that this dVAE was trained with: the sha256 of its "
            f"model.safetensors is {module.sha256[:16]}..., not {bytes(found.tolist()).hex()[:16]}..."
        )


def load_vit(name: str) -> tuple[ViTModel, str]:
    """Load a ViT from a folder or Hub id, and freeze it.

    Returns the ViT and the sha256 of its model.safetensors. Raises ValueError if the package
    transformers is not installed, or if the folder or Hub id does not give a ViT.
    """
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import ViTConfig, ViTModel
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(
            f"backbone {name} needs transformers: pip install 'jepa3d[vit]'"
        ) from error
    try:
        folder = local_folder(name)
        settings, weights = read_settings(folder), folder / "model.safetensors"
        if (kind := settings.get("model_type")) != "vit":
            raise ValueError(f"{folder}/config.json: model_type is {kind!r}, but must be 'vit'")
        tensors = load_file(weights)
    except ValueError as error:
        raise ValueError(f"backbone {str(error).removeprefix('backbone ')}; {HINT}") from error
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # else transformers warns about unused weights of a classifier
    logging.disable_progress_bar()
    try:
        loaded: Any = ViTModel.from_pretrained(
            None,
            config=ViTConfig(**settings),
            state_dict=tensors,
            dtype=torch.float32,
            add_pooling_layer=False,
            output_loading_info=True,
        )
    except (StrictDataclassError, RuntimeError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"backbone {name}: no ViT can be made from its settings and weights ({first_line(error)}); {HINT}"
        ) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    vit, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"backbone {weights}: the file lacks {missing[0]}, so it does not hold the weights of a ViT; {HINT}"
        )
    sha256 = sha256_of(weights)
    assert sha256 is not None  # the file exists: it was just read
    return vit.requires_grad_(False).eval(), sha256


def reference(name: str) -> str:
    """Return the name of a ViT as config.json stores it: a Hub id unchanged, but a folder as an
    absolute path, so that commands started in another folder find it too.
    """
    return str(Path(name).absolute()) if Path(name).exists() else name
