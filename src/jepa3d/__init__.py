"""Self-supervised learning on 3D point clouds with 3D-JEPA (arXiv 2409.15803).

The names of this module are imported at their first use (PEP 562), because importing torch takes
over a second and `jepa3d --help` does not need torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

# The names that `from jepa3d import *` imports. All other names must be imported explicitly, since
# some of them need optional packages (the extras in pyproject.toml).
__all__ = ["CloudVectorizer", "Embedder", "PointEncoder", "embed", "load", "predict"]

# public name -> module that defines it
_MODULES = {
    "CloudVectorizer": "jepa3d.inference.vectorizer",
    "Embedder": "jepa3d.inference.embedding",
    "PointEncoder": "jepa3d.models.encoder",
    "embed": "jepa3d.inference.embedding",
    "export": "jepa3d.inference.export",
    "finetune": "jepa3d.training.finetune",
    "load": "jepa3d.models.ready",
    "predict": "jepa3d.inference.predicting",
    "pretrain": "jepa3d.training.pretrain",
    "probe": "jepa3d.evaluation.probe",
    "search": "jepa3d.inference.search",
}

if TYPE_CHECKING:  # editors and type checkers read these lines instead of running __getattr__
    from jepa3d.evaluation.probe import probe as probe
    from jepa3d.inference.embedding import Embedder, embed
    from jepa3d.inference.export import export as export
    from jepa3d.inference.predicting import predict
    from jepa3d.inference.search import search as search
    from jepa3d.inference.vectorizer import CloudVectorizer
    from jepa3d.models.encoder import PointEncoder
    from jepa3d.models.ready import load
    from jepa3d.training.finetune import finetune as finetune
    from jepa3d.training.pretrain import pretrain as pretrain

    __version__: str
else:

    def __getattr__(name: str):
        """Import a public name at its first use; read `__version__` from the metadata of the
        installed package.
        """
        if name == "__version__":
            from importlib.metadata import version

            value = version("jepa3d")
        elif name in _MODULES:
            value = getattr(import_module(_MODULES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """List the names in this module, and the public names that have not been imported yet."""
    return sorted({*globals(), *_MODULES, "__version__"})
