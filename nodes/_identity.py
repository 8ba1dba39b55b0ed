"""A digest of a MODEL, a CLIP and a VAE: the same after a restart, another with another patch."""

from __future__ import annotations

import enum
import functools
import types
import uuid
from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

__all__ = ["identity"]

PATCHES = ("patches", "hook_patches", "object_patches", "weight_wrapper_patches", "wrappers", "injections")
# Where a file lacks them, as most of SD1.5 do, ComfyUI leaves them as the memory was; no picture hangs on them.
BLANK = ("clip_l.transformer.text_projection.weight", "clip_h.transformer.text_projection.weight", "logit_scale")
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum, type)
_weights: WeakKeyDictionary[nn.Module, bytes] = WeakKeyDictionary()


def identity(*things: Any) -> str:
    """16 hexadecimal digits that follow from the content of ComfyUI's objects: weights, patches, and their settings.

    Functions count by their code and by what they hold. What cannot be told apart by its content is other every time.
    """
    walk = _Walk()
    for thing in things:
        walk.add(thing)
    return walk.digest.hexdigest()


class _Walk:
    def __init__(self) -> None:
        self.digest = blake2b(digest_size=8)
        self._seen: dict[int, tuple[int, Any]] = {}

    def add(self, thing: Any) -> None:
        if isinstance(thing, PLAIN):
            return self._say(f"{type(thing).__name__} {thing!r}")
        if id(thing) in self._seen:
            return self._say(f"seen {self._seen[id(thing)][0]}")
        self._seen[id(thing)] = len(self._seen), thing  # held, so that its id stays its own
        self._say(f"{type(thing).__module__}.{type(thing).__qualname__}")
        for part in self._parts(thing):
            self.add(part)
        return None

    def _say(self, text: str) -> None:
        self.digest.update(text.encode() + b"\0")

    def _parts(self, thing: Any) -> Any:
        """What an object is made of."""
        if isinstance(thing, Tensor):
            return [_content(thing)]
        if isinstance(thing, dict):
            return [part for key in sorted(thing, key=repr) for part in (key, thing[key])]
        if isinstance(thing, list | tuple):
            return thing
        if isinstance(thing, set | frozenset):
            return sorted(thing, key=repr)
        if isinstance(thing, comfy.model_patcher.ModelPatcher):
            return [_own_weights(thing), thing.model_options, *(getattr(thing, name, None) for name in PATCHES)]
        if isinstance(thing, comfy.sd.CLIP):
            return [thing.patcher, thing.layer_idx, getattr(thing, "tokenizer_options", None)]
        if isinstance(thing, comfy.sd.VAE):
            return [thing.patcher]
        return _parts_of_code(thing)


def _parts_of_code(thing: Any) -> Any:
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        return [thing.__module__, thing.__qualname__, thing.__code__, thing.__defaults__, thing.__kwdefaults__, cells]
    if isinstance(thing, types.CodeType):
        return [thing.co_code, thing.co_names, thing.co_consts]
    if isinstance(thing, types.MethodType):
        return [thing.__func__, thing.__self__]
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, types.BuiltinFunctionType | types.ModuleType):
        return [thing.__name__]
    if isinstance(thing, nn.Module):
        plain = {name: value for name, value in vars(thing).items() if isinstance(value, PLAIN)}
        return [plain, _content(*_tensors(thing).values())]
    if hasattr(thing, "__dict__"):
        return [vars(thing)]
    return [uuid.uuid4().hex]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _own_weights(patcher: comfy.model_patcher.ModelPatcher) -> bytes:
    """Of the network without LoRAs, which ComfyUI adds to the weights themselves while they are on the device."""
    network = patcher.model
    if network not in _weights:
        given = {name: value for name, value in _tensors(network).items() if not name.endswith(BLANK)}
        originals = {name: kept.weight for name, kept in patcher.backup.items() if name in given}
        _weights[network] = _content(*({**given, **originals}.values()))
    return _weights[network]


def _content(*tensors: Tensor) -> bytes:
    digest = blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()
