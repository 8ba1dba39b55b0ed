"""What the benchmarks share: time and memory of a call, and the machine that took it."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

__all__ = [
    "Taken",
    "give_back_freed_memory",
    "in_turn",
    "machine",
    "measure",
    "middle",
    "peak_resident",
    "ratios",
    "resident",
]


@dataclass(frozen=True)
class Taken:
    """What a call took."""

    seconds: float
    cpu: float
    """Processor seconds of this process: on a machine that others use too, the steadier number."""
    peak: float
    """Megabytes that it added at its peak."""


def measure(run: Callable[[], object], device: torch.device) -> Taken:
    """One call, alone."""
    gc.collect()
    give_back_freed_memory()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else resident()
    with peak_resident() as peak:
        started, cpu = time.perf_counter(), time.process_time()
        run()
        if cuda:
            torch.cuda.synchronize()
        seconds, used = time.perf_counter() - started, time.process_time() - cpu
    most = torch.cuda.max_memory_allocated() / 2**20 - before / 2**20 if cuda else max(0.0, peak[0] - before)
    return Taken(seconds, used, most)


def in_turn(ways: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> list[dict[str, Taken]]:
    """Rounds in which every way has its turn, so that a drifting machine slows all; warm them up before."""
    return [{name: measure(way, device) for name, way in ways.items()} for _ in range(rounds)]


def ratios(rounds: Sequence[dict[str, Taken]], ours: str, other: str, what: str = "seconds") -> list[float]:
    """How often faster ours was, round by round, from the least to the most."""
    return sorted(round(getattr(one[other], what) / getattr(one[ours], what), 3) for one in rounds)


def middle(values: Sequence[float]) -> float:
    """The median, to three places."""
    return round(statistics.median(values), 3)


@contextmanager
def peak_resident() -> Iterator[list[float]]:
    """The most resident megabytes until the block ends."""
    peak, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def give_back_freed_memory() -> None:
    """Otherwise what an earlier way has freed hides what this one takes (glibc keeps it)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> float:
    """This process's resident memory in megabytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def machine(options: Any) -> dict[str, Any]:
    """Device, driver and versions."""
    cuda = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
