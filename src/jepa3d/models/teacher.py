"""What the student predicts: frozen networks, a moving average of the student itself, or several
joined.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa3d.models.dvae import DVAE
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.hub import DEFAULT, check_name, local_folder, read_settings


class Teacher(nn.Module):
    """Deterministic target tokens from networks with `features(patches, centers, layers)` and
    `width`.

    It sees all tokens, never gets a gradient and stays in evaluation mode. Targets of several
    networks are joined along the channels. `layers` averages the normalised outputs of each
    network's last blocks (data2vec). `average` is the index of the network that `ema_update` moves
    after every step; all others are frozen.
    """

    def __init__(
        self,
        networks: Sequence[DVAE | PointEncoder],
        norm: str = "none",
        layers: int = 1,
        average: int | None = None,
    ):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.norm, self.layers, self.average = norm, layers, average
        self.width = sum(network.width for network in networks)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, patches: Tensor, centers: Tensor) -> Tensor:
        """Target tokens B M width of all patches (B M K 3)."""
        targets = []
        for network in cast(Iterable[DVAE | PointEncoder], self.networks):
            exact = isinstance(network, DVAE)  # an arg-max code must not hang on rounding
            with torch.autocast(patches.device.type, enabled=False) if exact else nullcontext():
                states = network.features(patches.float(), centers.float(), self.layers)
            targets.append(
                torch.stack([normalise(tokens.float(), self.norm) for tokens in states]).mean(0)
            )
        return torch.cat(targets, -1)


def normalise(tokens: Tensor, norm: str) -> Tensor:
    """Normalise tokens B M C: LayerNorm of each, or per channel over all tokens of the batch.

    norm: none, layernorm, center or standardize.
    """
    if norm == "layernorm":
        return F.layer_norm(tokens, tokens.shape[-1:])
    if norm == "none":
        return tokens
    mean, var = batch_moments(tokens.flatten(0, -2))
    return tokens - mean if norm == "center" else (tokens - mean) * (var + 1e-6).rsqrt()


def batch_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of rows [n, C] over all processes' rows (equal n)."""
    mean = _over_processes(rows.mean(0))
    return mean, _over_processes((rows - mean).square().mean(0))


def _over_processes(mean: Tensor) -> Tensor:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
    return mean


@torch.no_grad()
def ema_update(teacher: Teacher, student: nn.Module, momentum: float) -> None:
    """Its average <- momentum * average + (1 - momentum) * student; statistics of BatchNorm are
    copied.
    """
    assert teacher.average is not None
    average = teacher.networks[teacher.average]
    old, new = ([p.data for p in module.parameters()] for module in (average, student))
    torch._foreach_lerp_(old, new, 1 - momentum)
    for mine, theirs in zip(average.buffers(), student.buffers(), strict=True):
        mine.copy_(theirs)


def load_module(path: str, known: Iterable[str] = ()) -> DVAE | PointEncoder:
    """The network in a run, in a folder of `save_pretrained` or on the Hub; "default": the encoder
    of the package. ValueError if there is none.

    known: other names that the setting takes, for the hint at a misspelt one.
    """
    if path == "default":
        path = str(DEFAULT)
    try:
        check_name(path, known)
        exported = [sub for name in ("encoder", "dvae") if (sub := Path(path) / name).is_dir()]
        folder = exported[0] if exported else local_folder(path)
        return (DVAE if "num_codes" in read_settings(folder) else PointEncoder).from_pretrained(
            folder
        )
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(
            f"{path}: no encoder or dVAE could be loaded ({reason}); "
            f"give a finished run, a folder of save_pretrained or a Hub id"
        ) from error
