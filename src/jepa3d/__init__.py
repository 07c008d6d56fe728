"""Self-supervised learning on 3D point clouds with 3D-JEPA (arXiv 2409.15803).

The names of this module are imported when they are first used (PEP 562): torch alone takes over a
second to import, and `jepa3d --help` needs none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "PointEncoder",
    "embed",
    "load",
]  # not Embedder: `from jepa3d import *` would need the extra `search`

_MODULES = {
    "Embedder": "jepa3d.inference.embedder",
    "PointEncoder": "jepa3d.models.encoder",
    "embed": "jepa3d.inference.embedding",
    "load": "jepa3d.models.ready",
}

if TYPE_CHECKING:  # editors and type checkers read these lines instead of running __getattr__
    from jepa3d.inference.embedder import Embedder as Embedder
    from jepa3d.inference.embedding import embed
    from jepa3d.models.encoder import PointEncoder
    from jepa3d.models.ready import load

    __version__: str
else:

    def __getattr__(name: str):
        """Import a public name on its first use;

        `__version__` is that of the installed distribution.
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
    return sorted({*globals(), *_MODULES, "__version__"})
