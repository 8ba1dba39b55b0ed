"""PyTorch pickles without running their code: torch's restricted loader, and inert stand-ins for training leftovers.

A checkpoint of a training run names classes of Lightning, omegaconf and numpy. None of them is needed for the weights
and none is imported: each name on the list below becomes ``Inert``, whatever arguments it gets. A name that is on no
list is refused before anything is loaded.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import safe_globals

from ..errors import CheckpointError, first_line

__all__ = ["INERT_MODULES", "INERT_NAMES", "Inert", "read_pickle"]

INERT_MODULES = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "omegaconf", "numpy")
INERT_NAMES = frozenset(
    f"{module}.{name}"
    for module, names in {
        "argparse": ("Namespace",),
        "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
        "typing": ("Any", "Union", "Optional"),
        "datetime": ("datetime", "timedelta", "date"),
        "collections": ("defaultdict", "deque"),
        "builtins": ("dict", "list", "tuple", "set", "int", "float", "str", "bool", "object", "slice", "range"),
        "__builtin__": ("dict", "list", "tuple", "set", "int", "float", "str", "bool", "object", "long", "unicode"),
    }.items()
    for name in names
)
MAPPING_NAMES = ("AttributeDict",)
TORCH_MODULES = ("torch", "collections", "_codecs")
LEGACY_PICKLES = 4


class Inert:
    """Stands for an object that no weight depends on; takes every argument and keeps none."""

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a torch.save file, its tensors mapped from disk where the format allows.

    Raises CheckpointError for code, for anything that is not on the lists, and for a damaged file.
    """
    names = set(_global_names(path))
    stand_ins: list[Any] = [(_stand_in(name), name) for name in sorted(names) if _is_inert(name)]
    refused = sorted(name for name in names if not _is_inert(name) and not _is_torch(name))
    if refused:
        raise CheckpointError(
            f"{path.name} is a pickle that calls {refused[0]}, and weights need no such thing; "
            "nothing was run, do not use this file, get the .safetensors one"
        )
    try:
        with safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises a dozen kinds for damaged and for refused files
        raise CheckpointError(
            f"{path.name} cannot be read as PyTorch weights ({first_line(error)}); download or save it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path.name} holds a {type(content).__name__}, not a dictionary of weights; give a checkpoint"
        )
    return content


def _is_inert(name: str) -> bool:
    return name in INERT_NAMES or name.split(".")[0] in INERT_MODULES


def _is_torch(name: str) -> bool:
    """Names that torch's own restricted loader judges."""
    return name.split(".")[0] in TORCH_MODULES


def _stand_in(name: str) -> Any:
    return OrderedDict if name.endswith(MAPPING_NAMES) else Inert


def _global_names(path: Path) -> Iterator[str]:
    """Every name that the pickles of a file would import, read without unpickling."""
    try:
        for opcode, argument, _ in _opcodes(path):
            if opcode.name in ("GLOBAL", "INST"):
                yield ".".join(argument.split(" ", 1))
            elif opcode.name == "STACK_GLOBAL":
                raise CheckpointError(
                    f"{path.name} is a pickle of protocol 4, which torch.save does not write; "
                    "nothing was run, get the .safetensors file"
                )
    except CheckpointError:
        raise
    except Exception as error:  # zipfile, zlib and pickletools raise as many kinds for damaged files
        raise CheckpointError(
            f"{path.name} is a truncated or damaged PyTorch file ({first_line(error)}); download it again"
        ) from error


def _opcodes(path: Path) -> Iterator[tuple[Any, Any, int | None]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    yield from pickletools.genops(io.BytesIO(archive.read(name)))
        return
    with path.open("rb") as stream:
        yield from _legacy_opcodes(stream)


def _legacy_opcodes(stream: BinaryIO) -> Iterator[tuple[Any, Any, int | None]]:
    """torch.save before 1.6: magic number, protocol, system info and content, one pickle each; then raw storages."""
    for index in range(LEGACY_PICKLES):
        if index and not stream.peek(1):  # type: ignore[attr-defined]
            return  # a plain pickle; torch's loader says what it thinks of it
        yield from pickletools.genops(stream)
