"""ip2p_engine: InstructPix2Pix, from captions to edited pictures, without a host.

Importing it is light; ``InstructPix2Pix`` and ``EditConfig`` load torch on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["EditConfig", "EditResult", "Hooks", "InstructPix2Pix", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".edit", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
