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
            raise ConfigError(f"device {name!r} cannot be used ({reason}); choose cpu, cuda or mps") from error
        if device.type == "meta":
            raise ConfigError("device 'meta' holds no numbers; choose cpu, cuda or mps")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Half precision on a GPU, float32 elsewhere."""
    return torch.float16 if device.type == "cuda" else torch.float32


@contextmanager
def enough_memory(count: int, size: tuple[int, int]) -> Iterator[None]:
    """Torch's own error as a sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the device's memory does not hold {count} edits of {size[0]} x {size[1]} pixels at once; "
            "give a smaller batch (--batch) or resolution (--resolution)"
        ) from error


def free_memory(device: torch.device) -> int:
    """Bytes that a computation on the device may still use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * 2**30
