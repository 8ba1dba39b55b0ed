"""Networks from configurations and tensors: made without memory, then given the tensors as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..errors import CheckpointError, first_line
from .keys import few
from .limits import TEXTS, checked_config, diffusers_class
from .spec import Bundle, Part

__all__ = ["all_finite", "build", "check_bundle", "check_widths", "module_state", "overflow", "skeleton"]

WORDS = {
    "unet": "UNet",
    "autoencoder": "autoencoder",
    "control": "ControlNet",
    "text": "text encoder",
    "projected_text": "second text encoder",
}
IGNORED = ("position_ids",)
INSIDE = "text_model."


def build(
    part: Part, *, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, check: bool = True
) -> Any:
    """The network of a part, in eval mode, without gradients; ``dtype`` None keeps the file's.

    Raises CheckpointError where tensors are missing, left over, of a wrong shape or, with ``check``, not finite, in
    the file or in ``dtype``.
    """
    module = skeleton(part, name=name)
    state = module_state(part, module.state_dict(), name=name)
    dtype = dtype or _common_type(state)
    for key in state:
        value = state[key].to(device=device, dtype=dtype)
        if check and not all_finite(value):
            _refuse(part.rename(key.removeprefix(INSIDE)), state[key], dtype, part, name)
        if value is not state[key]:
            part.release(state[key])
        state[key] = value
    module.load_state_dict(state, strict=True, assign=True)
    _fill_buffers(module, device)
    return module.eval().requires_grad_(False)


def skeleton(part: Part, *, name: str) -> Any:
    """The network of a part without its numbers; raises CheckpointError for a configuration that makes none."""
    config = checked_config(part, WORDS[part.kind], name)
    with _from_config(part, name), torch.device("meta"):
        return _empty(part.kind, config)


def check_bundle(bundle: Bundle) -> None:
    """Raises CheckpointError where the names, the shapes or the configurations would not load; no value is read."""
    name = bundle.path.name
    modules = [skeleton(part, name=name) for part in bundle.parts]
    for part, module in zip(bundle.parts, modules, strict=True):
        module_state(part, module.state_dict(), name=name)
    if bundle.text_encoders:
        check_widths(modules[0], modules[-len(bundle.text_encoders) :], name=name)


def check_widths(unet: Any, text_encoders: Sequence[Any], *, name: str) -> None:
    """Raises CheckpointError unless the UNet attends to what the text encoders give."""
    given = sum(encoder.config.hidden_size for encoder in text_encoders)
    wanted = unet.config.cross_attention_dim
    if given != wanted:
        raise CheckpointError(
            f"{name}: the UNet attends to texts {wanted} wide and the text encoder gives {given}; "
            "the parts are of different models, give the base that the UNet was made from"
        )


def module_state(part: Part, expected: Mapping[str, Tensor], *, name: str) -> dict[str, Tensor]:
    """The part's tensors under the module's names and in its shapes, every one accounted for."""
    with _from_config(part, name):
        origin = {key: part.rename(key.removeprefix(INSIDE)) for key in expected}
    word = WORDS[part.kind]
    missing = [source for source in origin.values() if source not in part.tensors]
    strange = [key for key in part.tensors.keys() - set(origin.values()) if not key.endswith(IGNORED)]
    if missing or strange:
        problem = f"lacks {few(missing)}" if missing else f"has {few(strange)} beyond what it should"
        raise CheckpointError(
            f"{name}: the {word} {problem}; the file is incomplete or of another architecture, get it again"
        )
    return {key: _fit(part.tensors[origin[key]], expected[key], origin[key], name) for key in expected}


def _empty(kind: str, config: dict[str, Any]) -> nn.Module:
    if kind not in TEXTS:
        return diffusers_class(kind).from_config(config)
    settings = CLIPTextConfig(**config)
    return CLIPTextModel(settings) if kind == "text" else CLIPTextModelWithProjection(settings)


@contextmanager
def _from_config(part: Part, name: str) -> Iterator[None]:
    """What a configuration's values make diffusers, transformers and the names raise, as one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # nearly every class
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{name}: the {WORDS[part.kind]}'s configuration makes no network ({reason}); get the checkpoint again"
        ) from error


def _fit(value: Tensor, expected: Tensor, source: str, name: str) -> Tensor:
    """A linear layer stored as a 1x1 convolution is the same numbers."""
    if value.shape == (*expected.shape, 1, 1) or (*value.shape, 1, 1) == expected.shape:
        value = value.reshape(expected.shape)
    if value.shape != expected.shape:
        raise CheckpointError(
            f"{name}: {source} has shape {tuple(value.shape)} and {tuple(expected.shape)} was expected; "
            "the file is damaged or of another architecture, get it again"
        )
    return value


def _common_type(state: Mapping[str, Tensor]) -> torch.dtype:
    """One type for a network: the widest in the file; 8-bit floats, which no layer computes in, become bfloat16."""
    common: torch.dtype | None = None
    for value in state.values():
        if value.is_floating_point():
            dtype = torch.bfloat16 if value.dtype.itemsize == 1 else value.dtype
            common = dtype if common is None else torch.promote_types(common, dtype)
    return common or torch.float32


def all_finite(value: Tensor) -> bool:
    """Whether every value is finite: a NaN becomes both ends of the range. One pass, no copy."""
    if not value.numel():
        return True
    low, high = torch.aminmax(value)
    return bool(low.isfinite() and high.isfinite())


def overflow(source: str, value: Tensor, dtype: torch.dtype, name: str) -> CheckpointError:
    """The error for numbers that are finite and leave the range of ``dtype``."""
    largest, kind = float(value.abs().max()), str(dtype).removeprefix("torch.")
    return CheckpointError(
        f"{name}: {source} has values up to {largest:.3g}, which {kind} cannot hold; take bfloat16 or float32"
    )


def _refuse(source: str, value: Tensor, dtype: torch.dtype, part: Part, name: str) -> None:
    if all_finite(value.float()):
        raise overflow(source, value.float(), dtype, name)
    raise CheckpointError(
        f"{name}: {source} of the {WORDS[part.kind]} holds NaN or infinity; "
        "the training or conversion that made it failed, use an earlier one"
    )


def _fill_buffers(module: nn.Module, device: str | torch.device) -> None:
    """Buffers that no file holds: the numbers of the positions."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:
                owner.register_buffer(name, torch.arange(buffer.shape[-1], device=device)[None], persistent=False)
