"""Every error that a user can cause, as one tree. Messages say what came, what was expected and what to do.

IP2PError
├── ConfigError        an option, a size, a schedule or a missing extra
├── ImageError         a picture that cannot be read or edited
├── CheckpointError    weights that are missing, broken, unsafe or of the wrong kind
├── CaptionError       captions or instructions that cannot be read or written
├── DatasetError       a data set that is missing, broken, taken or full
├── TrainingError      a run whose loss or weights are not finite any more
└── Interrupted        the caller asked to stop
"""

from __future__ import annotations

import re

__all__ = [
    "CaptionError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "IP2PError",
    "ImageError",
    "Interrupted",
    "TrainingError",
    "first_line",
    "printable",
]

# Control characters but line ends and tabs, those of the second block, and what turns the direction of writing.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class IP2PError(Exception):
    """Base of every error that the engine raises on purpose."""


class ConfigError(IP2PError):
    """An option, a size, a schedule or a missing extra."""


class ImageError(IP2PError):
    """A picture that cannot be read or edited."""


class CheckpointError(IP2PError):
    """Weights that are missing, broken, unsafe or of the wrong kind."""


class CaptionError(IP2PError):
    """Captions or instructions that cannot be read or written."""


class DatasetError(IP2PError):
    """A data set that is missing, broken, taken by another writer, or on a full disk."""


class TrainingError(IP2PError):
    """A run whose loss or weights are not finite any more."""


class Interrupted(IP2PError):
    """The caller asked to stop; nothing was lost but the work in progress."""


def printable(text: str) -> str:
    """The text as a terminal may show it: what would move its cursor or turn its lines is written as escapes."""
    return UNPRINTABLE.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough to be part of a sentence; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
