"""Self-supervised learning on 3D point clouds with 3D-JEPA (arXiv 2409.15803)."""

from importlib.metadata import version

from jepa3d.inference.embedding import embed
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.ready import load

__version__ = version("jepa3d")
__all__ = ["PointEncoder", "embed", "load"]


def __getattr__(name: str) -> type:
    """`jepa3d.Embedder` is imported when it is asked for: it needs the extra `search`."""
    if name != "Embedder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jepa3d.inference.embedder import Embedder

    return Embedder
