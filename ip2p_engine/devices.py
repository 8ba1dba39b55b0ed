"""Where to compute, in which type, and what to do where the memory is too small."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import ConfigError, first_line

__all__ = ["default_dtype", "enough_memory", "free_memory", "usable_device"]


def usable_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name, or a GPU if there is one, else the CPU; raises ConfigError for one that is not here."""
    if name is not None:
        try:
            device = torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            reason = first_line(error)
            raise ConfigError(f"device {name!r} cannot be used ({reason}); choose cpu, cuda, mps or xpu") from error
        if device.type == "meta":
            raise ConfigError("device 'meta' holds no numbers; choose cpu, cuda, mps or xpu")
        return device
    found = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}
    return torch.device(next((name for name, kind in found.items() if kind.is_available()), "cpu"))


def default_dtype(device: torch.device) -> torch.dtype:
    """Half precision on a GPU, float32 elsewhere."""
    return torch.float16 if device.type in ("cuda", "xpu") else torch.float32


@contextmanager
def enough_memory(count: int, size: tuple[int, int]) -> Iterator[None]:
    """Torch's own error as a sentence."""
    try:
        yield
    except RuntimeError as error:
        # Apple's devices have no error of their own for it.
        if not isinstance(error, torch.OutOfMemoryError) and "MPS backend out of memory" not in str(error):
            raise
        raise ConfigError(
            f"the device's memory does not hold {count} edits of {size[0]} x {size[1]} pixels at once; "
            "give a smaller `batch` or `resolution`"
        ) from error


def free_memory(device: torch.device) -> int:
    """Bytes that a computation on the device may still use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).total_memory - torch.xpu.memory_allocated(device)
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * 2**30
