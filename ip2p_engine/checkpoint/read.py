"""Files of tensors: what kind a file is, its header, and its tensors mapped from disk."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..files import NO_JSON
from .unpickle import read_pickle

__all__ = [
    "MAX_TENSORS",
    "PICKLE_SUFFIXES",
    "SAFE_SUFFIXES",
    "WEIGHT_SUFFIXES",
    "WeightFile",
    "keep",
    "read_header",
    "read_weights",
    "real_tensor",
    "sniff",
]

SAFE_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
WEIGHT_SUFFIXES = SAFE_SUFFIXES + PICKLE_SUFFIXES
# Of a safetensors file; one of SDXL with averaged weights takes 0.5 MB, parsed it takes thirty times the memory.
HEADER_LIMIT = 16_000_000
MAX_DIMENSIONS = 8
MAX_TENSORS = 10_000  # SDXL with averaged weights has about 4,200
# Where training programs put the weights within what they save, and what they put before all names.
NESTED = ("state_dict", "model", "model_state_dict", "module")
WRAPPERS = ("module.", "_orig_mod.", "diffusion_model.")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
OTHER_KINDS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights", "fetch the file itself with git lfs pull"),
    (b"<", "a web page", "download the file itself, not the page about it"),
    (b"\x89PNG", "a PNG picture", "give a checkpoint"),
    (b"\xff\xd8\xff", "a JPEG picture", "give a checkpoint"),
    (b"GGUF", "a GGUF file", "give the .safetensors or .ckpt it was made from"),
)


def keep(tensor: Tensor) -> None:
    """Release a tensor that is not mapped: there is nothing to give back."""


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file's tensors by name, its text metadata, and what else a training run left in it."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    leftovers: Mapping[str, Any] = field(default_factory=dict)
    release: Callable[[Tensor], None] = keep
    """Give a mapped tensor's memory back to the system; its values are read again if they are used again."""
    prefix: str = ""
    """Of all names in the file, and of none in ``tensors``."""

    @property
    def name(self) -> str:
        return self.path.name


def sniff(path: Path) -> str:
    """ "safetensors" or "pickle", by content; raises CheckpointError for all else and where the name says otherwise."""
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; give a checkpoint file, a diffusers folder or a hub id")
    with path.open("rb") as stream:
        start = stream.read(32)
    kind = _kind_of(start, path)
    suffix = path.suffix.lower()
    if suffix in SAFE_SUFFIXES and kind == "pickle":
        raise CheckpointError(f"{path.name} is a PyTorch pickle, not safetensors; rename it to .ckpt to load it as one")
    if suffix in PICKLE_SUFFIXES and kind == "safetensors":
        raise CheckpointError(f"{path.name} is a safetensors file, not a pickle; rename it to .safetensors")
    return kind


def read_weights(path: Path) -> WeightFile:
    """A file's tensors, mapped from disk: memory is used when they are, and shared with the system's cache."""
    if sniff(path) == "pickle":
        return _read_pickle(path)
    entries, metadata = _safetensors_header(path)
    mapped, start = _map(path)
    tensors = {name: _mapped_tensor(mapped, start, entry) for name, entry in entries.items()}
    return _unwrapped(WeightFile(path=path, tensors=tensors, metadata=metadata, release=_Release(mapped)))


def read_header(path: Path) -> WeightFile:
    """Names, shapes and types only: safetensors give meta tensors, pickles (which have no header) mapped ones."""
    if sniff(path) == "pickle":
        return _read_pickle(path)
    entries, metadata = _safetensors_header(path)
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    return _unwrapped(WeightFile(path=path, tensors=tensors, metadata=metadata))


def real_tensor(file: WeightFile, name: str) -> Tensor:
    """One tensor with its values, also of a file whose header alone was read."""
    tensor = file.tensors[name]
    if not tensor.is_meta:
        return tensor
    with safe_open(file.path, "pt") as opened:
        return opened.get_tensor(file.prefix + name)


def _unwrapped(file: WeightFile) -> WeightFile:
    """The file without what DataParallel, torch.compile or ComfyUI's ModelSave put before every name."""
    if len(file.tensors) > MAX_TENSORS:
        raise CheckpointError(
            f"{file.name} holds {len(file.tensors):,} tensors, and no Stable Diffusion more than {MAX_TENSORS:,}; "
            "give a checkpoint of that family"
        )
    tensors, prefix = file.tensors, ""
    while wrapper := next((one for one in WRAPPERS if tensors and all(name.startswith(one) for name in tensors)), ""):
        tensors, prefix = {name[len(wrapper) :]: value for name, value in tensors.items()}, prefix + wrapper
    return replace(file, tensors=tensors, prefix=prefix)


def _kind_of(start: bytes, path: Path) -> str:
    # first: the header's length may begin with any byte, also a pickle's 0x80
    if len(start) >= 9 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < HEADER_LIMIT:
        return "safetensors"
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return "pickle"
    for magic, what, remedy in OTHER_KINDS:
        if start.lstrip().startswith(magic):
            raise CheckpointError(f"{path.name} is {what}; {remedy}")
    what = "empty" if not start else "neither safetensors nor a PyTorch file"
    raise CheckpointError(f"{path.name} is {what}; a checkpoint is one of the two, download it again")


class _Entry(NamedTuple):
    """A tensor as the header tells of it; the offsets count from the header's end."""

    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


def _safetensors_header(path: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """(tensors, metadata), every value checked."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        text = stream.read(length)
    try:
        header = json.loads(text)
        metadata = dict(header.pop("__metadata__", {}))
        entries = {name: _entry(value, path) for name, value in header.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is no text")
        _check_places(entries)
    except (*NO_JSON, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name} has a damaged safetensors header; download it again") from error
    end = max((entry.end for entry in entries.values()), default=0)
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path.name} has {size} bytes and its header promises {8 + length + end}; it is truncated or damaged, "
            "download it again"
        )
    return entries, metadata


def _entry(value: Any, path: Path) -> _Entry:
    """Raises what _safetensors_header catches."""
    dtype, shape, (begin, end) = _dtype(value["dtype"], path), value["shape"], value["data_offsets"]
    numbers = [*shape, begin, end]
    if not all(type(number) is int and number >= 0 for number in numbers) or len(shape) > MAX_DIMENSIONS:
        raise ValueError("sizes that are no whole numbers")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("offsets that do not fit the shape")
    return _Entry(dtype, shape, begin, end)


def _check_places(entries: Mapping[str, _Entry]) -> None:
    """Tensors lie one behind the other: of those that share bytes, a small file could hold any amount."""
    expected = 0
    for entry in sorted(entries.values(), key=lambda one: (one.begin, one.end)):
        if entry.begin != expected:
            raise ValueError("tensors that overlap or leave gaps")
        expected = entry.end


def _map(path: Path) -> tuple[mmap.mmap, int]:
    """The file as private memory (a change stays in this process), and where its tensors begin."""
    with path.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY), 8 + length


def _mapped_tensor(mapped: mmap.mmap, start: int, entry: _Entry) -> Tensor:
    count = math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=start + entry.begin).reshape(entry.shape)


class _Release:
    """Tells the system that a tensor's pages are not needed for now, where the system can be told."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self._address = torch.frombuffer(mapped, dtype=torch.uint8, count=1).data_ptr()

    def __call__(self, tensor: Tensor) -> None:
        begin = tensor.data_ptr() - self._address
        if not hasattr(mmap, "MADV_DONTNEED") or not 0 <= begin < len(self._mapped):
            return
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (begin + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def _dtype(name: str, path: Path) -> torch.dtype:
    if name not in DTYPES:
        raise CheckpointError(f"{path.name} stores type {name}, and weights are {', '.join(DTYPES)}; convert it first")
    return DTYPES[name]


def _read_pickle(path: Path) -> WeightFile:
    content = read_pickle(path)
    place = next((name for name in NESTED if _holds_tensors(content.get(name))), "")
    nested = content[place] if place else content
    tensors = {str(name): value for name, value in nested.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path.name} holds no tensors; give a checkpoint of weights")
    _check_pickled(tensors, path)
    leftovers = {name: value for name, value in content.items() if place and name != place}
    return _unwrapped(WeightFile(path=path, tensors=tensors, leftovers=leftovers))


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(one, Tensor) for one in value.values())


def _check_pickled(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A pickle can make tensors of every kind, and views of one number that are any size."""
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in DTYPES.values()
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path.name}: {name[:200]} is no plain tensor (quantised, sparse, or without numbers of its own); "
                "get the .safetensors file"
            )
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * path.stat().st_size:
        raise CheckpointError(f"{path.name} unfolds to more than twice its size; get the .safetensors file")
