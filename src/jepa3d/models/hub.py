"""Saving and loading a network: a folder or a Hub repository of config.json and model.safetensors."""

import hashlib
import inspect
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, their checksum among the metadata. OSError names a file that cannot be written."""
    try:
        safetensors.torch.save_file(tensors, path, {"sha256": _digest(tensors)})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def load_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError, which names it, where it is damaged.

    A file without a checksum (made by version 0.1.0, or by others) is taken as it is.
    """
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: missing, cut off or damaged ({str(error).splitlines()[0]})") from error
    if written is not None and written != _digest(tensors):
        raise ValueError(f"{path}: damaged: its checksum is not the one written")
    return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.detach().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Pretrained(nn.Module, ModelHubMixin):
    """`save_pretrained(folder)`, `from_pretrained(folder or Hub id)`, `push_to_hub`; loads all weights or none.

    The arguments of `__init__` travel as config.json and must be plain values.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, save_directory / "model.safetensors")

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **model_kwargs
    ):
        # An argument younger than the file takes its default, which is how the network was before it.
        first = next(name for name in inspect.signature(cls.__init__).parameters if name != "self")
        if first not in model_kwargs:
            raise ValueError(f"{model_id}: config.json is not one of {cls.__name__}: it lacks {first}")
        file = Path(model_id) / "model.safetensors"
        if not Path(model_id).is_dir():
            file = hf_hub_download(
                model_id, file.name, revision=revision, cache_dir=cache_dir, force_download=force_download,
                token=token, local_files_only=local_files_only,
            )  # fmt: skip
        model = cls(**model_kwargs)
        weights = load_file(file)
        for name, values in weights.items():
            if not torch.isfinite(values).all():
                raise ValueError(f"{file}: {name} holds NaN or infinite values: train again, or take other weights")
        model.load_state_dict(weights)
        return model.eval()
