"""PyTorch pickles without running their code: torch's restricted loader, and inert stand-ins for training leftovers.

A checkpoint of a training run names classes of Lightning, omegaconf and numpy. None of them is needed for the weights
and none is imported: each name on the list below becomes ``Inert``, whatever arguments it gets. A name that is on no
list is refused before anything is loaded.
"""

from __future__ import annotations

import codecs
import io
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import safe_globals

from ..errors import CheckpointError, first_line
from .pickle_costs import Costs, TooDear

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
# Of the many names that torch's own restricted loader lets in, those that a file of weights has.
TORCH_NAMES = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|torch\.(Size|device)"
    r"|torch\.(cuda\.)?[A-Z][A-Za-z0-9]*Storage|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\._utils\._rebuild_(tensor(_v2)?|parameter(_with_state)?)|torch\.nn\.parameter\.Parameter"
    r"|torch\.serialization\._get_layout|torch\.(b?float|int|uint|complex)\d+\w*|torch\.bool"
)
# Codecs that take the square of a text's length, and those that take their own results, longer each time.
BAD_CODECS = ("punycode", "idna", "hex", "base64", "uu", "quopri", "zlib", "bz2")
ENCODE = "_codecs encode"
LEGACY_PICKLES = 5
SAFE_TORCH = (2, 10)  # CVE-2026-24747: before, the restricted loader itself could be made to write outside its memory
ZIP_START, ZIP_END, ZIP_END_SIZE = b"PK\x03\x04", b"PK\x05\x06", 22
CONTENT = "data.pkl"
SHOWN = 200  # characters of others' words
# SDXL with averaged weights and its optimizer takes 2 MB and 300,000 opcodes.
MAX_PICKLE, MAX_OPCODES, MAX_MEMBERS = 16 << 20, 1_000_000, 50_000


class Inert:
    """Stands for an object that no weight depends on; takes every argument and keeps none."""

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_pickle(path: Path, *, own: bool = False) -> dict[str, Any]:
    """The dictionary in a torch.save file, its tensors mapped from disk where the format allows.

    ``own``: a step of a training that goes on here, which any torch may read. Raises CheckpointError for code, for
    anything that is not on the lists, for a damaged file, and under a torch whose restricted loader has a known hole.
    """
    if not own:
        _check_torch(path)
    zipped = _is_zip(path)
    names = set(_global_names(path, zipped))
    stand_ins: list[Any] = [(_stand_in(name), name) for name in sorted(names) if _is_inert(name)]
    refused = sorted(name for name in names if not _is_inert(name) and not TORCH_NAMES.fullmatch(name))
    if refused:
        raise CheckpointError(
            f"{path.name} is a pickle that calls {refused[0][:SHOWN]}, and weights need no such thing; "
            "nothing was run, do not use this file, get the .safetensors one"
        )
    try:
        with safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises a dozen kinds for damaged and for refused files
        raise CheckpointError(
            f"{path.name} cannot be read as PyTorch weights ({_reason(error)}); download or save it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path.name} holds a {type(content).__name__}, not a dictionary of weights; give a checkpoint"
        )
    return _bare(content)


def _bare(content: dict[Any, Any]) -> dict[Any, Any]:
    """The same without the attributes that a pickle may set on its dictionaries and tensors, over their own methods."""
    seen: set[int] = set()
    waiting: list[Any] = [content]
    while waiting:
        place = waiting.pop()
        if id(place) in seen:
            continue
        seen.add(id(place))
        if isinstance(place, OrderedDict):
            vars(place).clear()
        for name, value in enumerate(place) if isinstance(place, list) else dict.items(place):
            if isinstance(value, torch.Tensor):
                place[name] = torch.Tensor.detach(value)
            elif isinstance(value, list | dict):
                waiting.append(value)
    return content


def _check_torch(path: Path) -> None:
    found = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if found < SAFE_TORCH:
        raise CheckpointError(
            f"{path.name} is a pickle, and torch {torch.__version__} has a known hole in reading them "
            "(CVE-2026-24747); update to torch 2.10 or later, or get the .safetensors file"
        )


def _reason(error: Exception) -> str:
    """Torch's first line advises to load the file all the same; what it found stands behind this word."""
    found = re.search(r"UnpicklingError: (.+)|WeightsUnpickler error: (.+)", str(error))
    if found:
        return (found[1] or found[2])[:SHOWN]
    return "it needs code" if str(error).startswith("Weights only load failed") else first_line(error)


def _is_inert(name: str) -> bool:
    return name in INERT_NAMES or name.split(".")[0] in INERT_MODULES


def _stand_in(name: str) -> Any:
    return OrderedDict if name.endswith(MAPPING_NAMES) else Inert


def _is_zip(path: Path) -> bool:
    """As torch.load decides it: a file that two readers take for two things has two contents."""
    with path.open("rb") as stream:
        return stream.read(len(ZIP_START)) == ZIP_START


def _global_names(path: Path, zipped: bool) -> Iterator[str]:
    """Every name that the pickles of a file would import, read without unpickling."""
    costs, encodes, bad_codec = Costs(), False, False
    try:
        for number, (opcode, argument, _) in enumerate(_opcodes(path, zipped)):
            costs.step(opcode.name, argument)
            bad_codec = bad_codec or (isinstance(argument, str) and _is_bad_codec(argument))
            encodes = encodes or argument == ENCODE
            if number > MAX_OPCODES or (encodes and bad_codec):
                raise TooDear
            if opcode.name in ("GLOBAL", "INST"):
                yield ".".join(argument.split(" ", 1))
            elif opcode.name == "STACK_GLOBAL":
                raise CheckpointError(
                    f"{path.name} is a pickle of protocol 4, which torch.save does not write; "
                    "nothing was run, get the .safetensors file"
                )
    except CheckpointError:
        raise
    except TooDear as error:
        raise CheckpointError(
            f"{path.name} is a pickle made to keep its reader busy; nothing was run, get the .safetensors file"
        ) from error
    except Exception as error:  # zipfile, zlib and pickletools raise as many kinds for damaged files
        raise CheckpointError(
            f"{path.name} is a truncated or damaged PyTorch file ({first_line(error)}); download it again"
        ) from error


def _is_bad_codec(text: str) -> bool:
    try:
        return len(text) < 20 and codecs.lookup(text).name in BAD_CODECS
    except (LookupError, ValueError):
        return False


def _opcodes(path: Path, zipped: bool) -> Iterator[tuple[Any, Any, int | None]]:
    if zipped:
        yield from pickletools.genops(io.BytesIO(_content_of(path)))
        return
    with path.open("rb") as stream:
        yield from _legacy_opcodes(stream)


def _content_of(path: Path) -> bytes:
    """data.pkl, of an archive of few, uncompressed members: torch reads what it needs of the others where it lies."""
    with path.open("rb") as stream:
        stream.seek(-ZIP_END_SIZE, io.SEEK_END)
        end = stream.read()
    # With a comment behind it, or with another archive, readers could differ on where the directory is.
    if end[:4] != ZIP_END or int.from_bytes(end[12:16], "little") > MAX_MEMBERS * 200:
        raise ValueError("its directory is not where it should be")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        contents = [one for one in members if one.filename.rpartition("/")[2] == CONTENT]
        packed = any(one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size for one in members)
        if packed or len(members) > MAX_MEMBERS or len({one.filename for one in members}) < len(members):
            raise ValueError("compressed or repeated members, which torch.save does not write")
        if len(contents) != 1 or contents[0].file_size > MAX_PICKLE:
            raise ValueError(f"no {CONTENT}, several, or a huge one")
        return archive.read(contents[0])


def _legacy_opcodes(stream: BinaryIO) -> Iterator[tuple[Any, Any, int | None]]:
    """torch.save before 1.6: magic number, protocol, system, content and keys, a pickle each; then raw storages."""
    for index in range(LEGACY_PICKLES):
        if index and not stream.peek(1):  # type: ignore[attr-defined]
            return  # a plain pickle; torch's loader says what it thinks of it
        yield from pickletools.genops(stream)
