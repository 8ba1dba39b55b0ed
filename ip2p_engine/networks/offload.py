"""Little memory: of a model's networks only those that run are on the device, the others wait in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch import nn

__all__ = ["Offload"]

HOST = torch.device("cpu")


class Offload:
    """Brings networks to a device when they run, and takes away those that were there before.

    Calls from several threads come one after another.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.resident: tuple[nn.Module, ...] = ()
        self._lock = RLock()

    @contextmanager
    def running(self, *networks: nn.Module) -> Iterator[None]:
        """For the length of a with-block these are on the device, alone; they stay until others run."""
        with self._lock:
            self._move([one for one in self.resident if one not in networks], HOST)
            self._move([one for one in networks if one not in self.resident], self.device)
            self.resident = networks
            yield

    def rest(self) -> None:
        """Take everything back."""
        with self._lock:
            self._move(list(self.resident), HOST)
            self.resident = ()

    def _move(self, networks: list[nn.Module], device: torch.device) -> None:
        for network in networks:
            network.to(device)
        if networks and device == HOST and self.device.type == "cuda":
            torch.cuda.empty_cache()  # what is freed is for the next network, in pieces of other sizes
