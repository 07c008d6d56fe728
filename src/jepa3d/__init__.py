"""Self-supervised learning on 3D point clouds with 3D-JEPA (arXiv 2409.15803)."""

from importlib.metadata import version

from jepa3d.models.encoder import PointEncoder

__version__ = version("jepa3d")
__all__ = ["PointEncoder"]
