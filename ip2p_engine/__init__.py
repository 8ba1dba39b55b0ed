"""ip2p_engine: InstructPix2Pix, from captions to edited pictures, without a host.

Importing it is light; ``InstructPix2Pix`` and ``EditConfig`` load torch on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .version import __version__

__all__ = ["EditConfig", "EditResult", "Hooks", "InstructPix2Pix", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".edit", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
