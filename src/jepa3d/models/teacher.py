"""What the student predicts: a frozen network, or a moving average of the student itself."""

import copy
import json
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import Tensor, nn

from jepa3d.models.dvae import DVAE
from jepa3d.models.encoder import PointEncoder


class Teacher(nn.Module):
    """Deterministic target tokens from a network with `features(patches, centers)` and `width`.

    It sees all tokens, never gets a gradient and stays in evaluation mode. `averages` marks the EMA teacher,
    which the loop moves after every step; any other is frozen.
    """

    def __init__(self, module: DVAE | PointEncoder, target_norm: str = "none", averages: bool = False):
        super().__init__()
        self.averages = averages
        self.module, self.target_norm, self.width = module, target_norm, module.width
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, patches: Tensor, centers: Tensor) -> Tensor:
        """Target tokens B M width of all patches (B M K 3)."""
        with torch.autocast(patches.device.type, enabled=False):  # an arg-max code must not hang on rounding
            tokens = self.module.features(patches.float(), centers.float())
        if self.target_norm == "layernorm":
            return nn.functional.layer_norm(tokens, tokens.shape[-1:])
        if self.target_norm == "standardize":  # per channel over the batch's tokens: no shared mean direction
            mean, var = batch_moments(tokens.flatten(0, -2))
            return (tokens - mean) * (var + 1e-6).rsqrt()
        return tokens


def batch_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of rows [n, C] over all processes' rows (equal n)."""
    mean = _over_processes(rows.mean(0))
    return mean, _over_processes((rows - mean).square().mean(0))


def _over_processes(mean: Tensor) -> Tensor:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
    return mean


def ema_teacher(student: PointEncoder, target_norm: str) -> Teacher:
    """A teacher that begins as the student; `ema_update` moves it."""
    return Teacher(copy.deepcopy(student), target_norm, averages=True)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student; statistics of BatchNorm are copied."""
    old, new = ([p.data for p in module.parameters()] for module in (teacher, student))
    torch._foreach_lerp_(old, new, 1 - momentum)
    for mine, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        mine.copy_(theirs)


def load_module(path: str) -> DVAE | PointEncoder:
    """The network in a run, in a folder of `save_pretrained` or on the Hub. ValueError if there is none."""
    folder = Path(path)
    exported = [sub for name in ("encoder", "dvae") if (sub := folder / name).is_dir()]
    source = exported[0] if exported else folder
    try:
        if folder.exists():
            is_dvae = "num_codes" in json.loads((source / "config.json").read_text())
            return (DVAE if is_dvae else PointEncoder).from_pretrained(source)
        return PointEncoder.from_pretrained(path)
    except (OSError, HfHubHTTPError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: no encoder or dVAE could be loaded ({reason}); "
            f"give a finished run, a folder of save_pretrained or a Hub id"
        ) from error
