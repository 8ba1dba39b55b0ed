"""Compiling a UNet: its repeated blocks quickly, or the whole of it for long work."""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch

from ..errors import ConfigError
from .model import Model

__all__ = ["COMPILE_MODES", "check_compiler", "compile_unet"]

COMPILE_MODES = ("repeated", "max")


def compile_unet(model: Model, mode: str = "repeated", *, backend: str = "inductor") -> None:
    """Compile a model's UNet; calls from several threads then come one after another.

    "repeated" compiles the transformer blocks, "max" the whole network, on CUDA in channels_last and with CUDA graphs:
    minutes, for each size and batch. On CUDA the autoencoder, which is not compiled, is in channels_last too. Raises
    ConfigError for another mode, and where nothing can compile.
    """
    if mode not in COMPILE_MODES:
        raise ConfigError(f"compile_mode is {mode!r}; choose one of {', '.join(COMPILE_MODES)}")
    check_compiler(model.device.type, backend)
    chosen: dict[str, Any] = {"backend": backend}
    unet: Any = model.unet
    if model.device.type == "cuda":
        model.autoencoder.to(memory_format=torch.channels_last)
    if mode == "repeated":
        # Each block attends to keys of its own, so each is an entry of its own; compiled code is shared.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _blocks(unet) + 8)
        unet.compile_repeated_blocks(**chosen)
    elif model.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
        unet.compile(**chosen, **({"mode": "reduce-overhead"} if backend == "inductor" else {}))
    else:
        unet.compile(**chosen)
    model.turn = Lock()


def _blocks(unet: Any) -> int:
    return sum(type(module).__name__ in unet._repeated_blocks for module in unet.modules())


def check_compiler(device: str, backend: str = "inductor") -> None:
    """Raises ConfigError where nothing can compile for a kind of device."""
    if device not in ("cuda", "cpu"):
        raise ConfigError(f"compile is for CUDA and the CPU, and the device is {device}; leave compile off")
    if backend != "inductor":
        return
    if device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ConfigError(
                "compile needs a C++ compiler, and none is found here; install g++, or leave compile off"
            ) from error
        return
    from torch.utils._triton import has_triton

    if not has_triton():
        raise ConfigError("compile on CUDA needs Triton, which is missing; pip install triton, or leave compile off")
