"""Teachers compute the tokens that the student (the encoder in training) learns to predict. A
teacher consists of frozen networks, of a moving average of the student, or of both.
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
from jepa3d.shapes import Centers, Float, Patches, Rows, Tokens


class Teacher(nn.Module):
    """Compute target tokens with one or several networks, without randomness.

    networks: each has a method `features(patches, centers, layers)` and an attribute `width`. All
    networks see all patches, get no gradient and stay in evaluation mode; their tokens are
    concatenated along the channels. norm: see `normalise`. layers: the outputs of each network's
    last `layers` blocks are normalised and then averaged (data2vec). average: index of the network
    that is a moving average of the student and is changed by `ema_update` after every step, or None
    if there is no such network. All other networks are frozen.
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
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, patches: Patches, centers: Centers) -> Tokens:
        """Compute the target tokens [B, M, width] of all patches [B, M, K, 3] with centers
        [B, M, 3].
        """
        targets = []
        for network in cast(Iterable[DVAE | PointEncoder], self.networks):
            # The dVAE always runs in float32: half precision would round the logits of its codes.
            # This would change its expected code and perhaps its most likely code.
            exact = isinstance(network, DVAE)
            with torch.autocast(patches.device.type, enabled=False) if exact else nullcontext():
                states = network.features(patches.float(), centers.float(), self.layers)
            targets.append(
                torch.stack([normalise(tokens.float(), self.norm) for tokens in states]).mean(0)
            )
        return torch.cat(targets, -1)


def normalise(tokens: Float[Tensor, "*rest c"], norm: str) -> Float[Tensor, "*rest c"]:
    """Normalise tokens (..., C).

    norm: "none" changes nothing; "layernorm" normalises each token; "center" subtracts each
    channel's mean over the tokens of the whole batch, in all processes; "standardize" also divides
    by each channel's standard deviation.
    """
    if norm == "layernorm":
        return F.layer_norm(tokens, tokens.shape[-1:])
    if norm == "none":
        return tokens
    mean, var = batch_moments(tokens.flatten(0, -2))
    return tokens - mean if norm == "center" else (tokens - mean) * (var + 1e-6).rsqrt()


def batch_moments(rows: Rows) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Compute mean [C] and variance [C] over the rows [n, C] of all processes. All processes must
    have the same number of rows.
    """
    mean = _over_processes(rows.mean(0))
    return mean, _over_processes((rows - mean).square().mean(0))


def _over_processes(mean: Tensor) -> Tensor:
    """Average a tensor over all processes."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
    return mean


@torch.no_grad()
def ema_update(teacher: Teacher, student: nn.Module, momentum: float) -> None:
    """Update the teacher's moving average of the network `student`:
    average <- momentum * average + (1 - momentum) * student.

    BatchNorm statistics are copied from `student`.
    """
    assert teacher.average is not None
    average = teacher.networks[teacher.average]
    old, new = ([p.data for p in module.parameters()] for module in (average, student))
    torch._foreach_lerp_(old, new, 1 - momentum)
    for target, source in zip(average.buffers(), student.buffers(), strict=True):
        target.copy_(source)


def load_module(path: str, known: Iterable[str] = ()) -> DVAE | PointEncoder:
    """Load an encoder or a dVAE.

    path: the folder of a run, a folder written by `save_pretrained`, a Hub id, or "default" for the
    encoder that comes with the package. known: the values that a setting may have instead of a
    path; if `path` looks like a misspelling of one of them, the error message suggests that value.
    Raises ValueError if no network can be loaded.
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
            f"give the folder of a finished run, the folder of a network, or a Hub id"
        ) from error
