"""One process or many, through Accelerate: devices, precision, gradient sums, trackers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import ConfigError
from .config import TrainConfig

__all__ = ["Sums", "accelerated", "log_picture", "ordinary_gradients", "refusals", "total"]

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@contextmanager
def accelerated(config: TrainConfig, folder: Path, device: str | None) -> Iterator[Any]:
    """An Accelerator for the length of a run; ``accelerate launch`` and torchrun say how many processes there are.

    ``device`` is cpu, cuda or mps, or None for what Accelerate finds. Raises ConfigError where accelerate or a tracker
    is missing, or the device is, or it cannot compute in the run's precision.
    """
    accelerate = _accelerate()
    if device not in (None, "cpu", "cuda", "mps"):
        raise ConfigError(f"device is {device!r}; choose cpu, cuda or mps, and one GPU with CUDA_VISIBLE_DEVICES")
    ours = not accelerate.state.PartialState._shared_state
    handlers = [accelerate.DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)]
    try:
        with refusals():
            accelerator = accelerate.Accelerator(
                cpu=device == "cpu",
                mixed_precision=PRECISIONS[config.precision],
                log_with=config.tracker,
                project_dir=str(folder),
                kwargs_handlers=handlers,
            )
        found = accelerator.device.type
        if device not in (None, found):
            raise ConfigError(f"device is {device} and PyTorch finds {found} here; leave device out, or choose {found}")
        if config.tracker and not accelerator.log_with:  # Accelerate goes on without a tracker that is missing
            raise ConfigError(f"tracker {config.tracker!r} is not installed; pip install {config.tracker}")
        yield accelerator
    finally:
        # Accelerate keeps its settings for the process, and the next run in it may want others.
        if ours:
            accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def refusals() -> Iterator[None]:
    """What Accelerate says of settings that do not go together, as one sentence."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise ConfigError(f"Accelerate refuses these settings: {' '.join(str(error).split())}") from error


@contextmanager
def ordinary_gradients() -> Iterator[None]:
    """Gradients, whatever mode the host is in: ComfyUI runs every node in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


class Sums:
    """Numbers that a device is making."""

    def __init__(self, row: torch.Tensor) -> None:
        self.behind = int(row.device.type == "cuda")
        """After how many further steps they are best read."""
        self._row, self._made = row, None
        if self.behind:
            self._row, self._made = row.to("cpu", non_blocking=True), torch.cuda.Event()
            self._made.record()

    def read(self) -> list[float]:
        """Waits for them, and for nothing that the device was given later."""
        if self._made is not None:
            self._made.synchronize()
        return self._row.tolist()


def total(accelerator: Any, first: torch.Tensor, *others: float) -> Sums:
    """Sums of a device's number and some of the host's over the processes."""
    host = torch.tensor(others, dtype=torch.float32).to(accelerator.device, non_blocking=True)
    return Sums(accelerator.reduce(torch.cat([first.detach().float().view(1), host]), "sum"))


def log_picture(accelerator: Any, name: str, picture: Image.Image, step: int) -> None:
    """A picture in TensorBoard or W&B, where the run has one of them."""
    for tracker in accelerator.trackers:
        shape = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: np.asarray(picture.convert("RGB"))[None]}, step=step, **shape)


def _accelerate() -> Any:
    try:
        import accelerate
    except ImportError as error:
        raise ConfigError("training needs accelerate, which is missing; pip install accelerate") from error
    return accelerate
