"""What the nodes need of ComfyUI that is neither a model nor sampling: pictures, places on disk, progress."""

from __future__ import annotations

import os
import re
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image
from torch import Tensor, nn

from ..ip2p_engine.errors import ConfigError
from ..ip2p_engine.images import open_image

__all__ = [
    "check_interrupted",
    "contained",
    "hold",
    "images_of",
    "load",
    "output_folder",
    "preformatted",
    "progress",
    "show_finished",
    "teller",
    "to_image",
    "to_pictures",
]

PREVIEW_SIDE = 512
PLAIN_NAME = re.compile(r"\w([\w .-]*\w)?")
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)


def to_pictures(image: Tensor) -> list[Image.Image]:
    """RGB pictures of an IMAGE (B, H, W, C) in [0, 1]; transparency is laid on white."""
    levels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [
        open_image(Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)) for picture in levels
    ]


def to_image(pictures: Sequence[Image.Image]) -> Tensor:
    """An IMAGE (B, H, W, 3) in [0, 1] of RGB pictures of one size, where ComfyUI keeps what passes between nodes."""
    levels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return (torch.from_numpy(levels).float() / 255).to(comfy.model_management.intermediate_device())


def images_of(pairs: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(before, after) of pairs as lists of IMAGEs, since their sizes may differ."""
    before, after = (
        [to_image([open_image(getattr(pair, side))]) for pair in pairs] for side in ("original_image", "edited_image")
    )
    return before, after


def preformatted(text: str) -> str:
    """Text whose columns stay below each other: the older Preview Any shows Markdown, where an indent keeps lines."""
    return textwrap.indent(text, "    ")


def check_interrupted() -> None:
    """Raise ComfyUI's own signal if the artist pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def progress(total: int) -> Callable[[int, int], None]:
    """A function (done, total) that moves the node's progress bar; it also stops on Cancel.

    The bar moves ten times a second at most: ComfyUI queues a message for each move.
    """
    bar, moved = comfy.utils.ProgressBar(total), 0.0

    def show(done: int, total: int) -> None:
        nonlocal moved
        check_interrupted()
        if done >= total or time.monotonic() - moved > 0.1:
            moved = time.monotonic()
            bar.update_absolute(done, total)

    return show


def teller(node: str | None) -> Callable[[str], None]:
    """Shows a line of text in a node while it works, five times a second at most."""
    from server import PromptServer  # not while the pack is imported

    told = 0.0

    def tell(text: str) -> None:
        nonlocal told
        server = getattr(PromptServer, "instance", None)
        if server is not None and node is not None and time.monotonic() - told > 0.2:
            told = time.monotonic()
            server.send_progress_text(text, node)

    return tell


def show_finished(pictures: Sequence[Image.Image], done: int, of: int) -> None:
    """The finished pictures side by side as the node's last preview, unless previews are switched off."""
    if args.preview_method == LatentPreviewMethod.NoPreviews:
        return
    sheet = Image.new("RGB", (sum(one.width for one in pictures), max(one.height for one in pictures)))
    left = 0
    for one in pictures:
        sheet.paste(one, (left, 0))
        left += one.width
    comfy.utils.ProgressBar(of).update_absolute(done, of, ("JPEG", sheet, PREVIEW_SIDE))


def contained(root: str | os.PathLike, name: str) -> Path:
    """The folder or file ``name`` inside ``root``; raises ConfigError for a name that leads out of it."""
    base = Path(root).resolve()
    path = (base / name).resolve()
    if not name.strip() or path == base or not path.is_relative_to(base):
        raise ConfigError(f"the name {name!r} leads out of {base.name}/; give a plain name such as my-set")
    return path


def output_folder(kind: str, name: str) -> Path:
    """A place of our own under ComfyUI's output folder, such as output/datasets/my-set.

    Raises ConfigError for a name that could not be a file's everywhere: two names never mean one place.
    """
    if not PLAIN_NAME.fullmatch(name) or WINDOWS_DEVICE.fullmatch(name):
        raise ConfigError(
            f"the name {name!r} is not one file's on every system; give a plain name such as my-set: letters, digits, "
            "_, and between them spaces, dots or hyphens"
        )
    return Path(folder_paths.get_output_directory()) / kind / name


class _Held(nn.Module):
    """Wraps a network of another library: ComfyUI sets attributes that some of them do not allow."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


def hold(network: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A network of another library under ComfyUI's memory management; ``load`` it before each use."""
    return comfy.model_patcher.ModelPatcher(
        _Held(network),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def load(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Bring a held network to the device, as a whole."""
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
