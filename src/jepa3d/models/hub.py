"""Saving and loading a network: a folder or a Hub repository of config.json and model.safetensors."""

import inspect
from pathlib import Path

from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import nn


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
        model.load_state_dict(load_file(file))
        return model.eval()
