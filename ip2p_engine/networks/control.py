"""ControlNets: residuals that go along with a call of the UNet, so that nothing of them lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..checkpoint.added import read_control
from ..checkpoint.build import build
from ..errors import CheckpointError
from .digest import digest_of_values
from .model import Model

__all__ = ["Control", "ControlNet", "hint_of", "load_control"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlNet:
    """A loaded ControlNet and what settings call it."""

    network: Any
    """diffusers' ControlNetModel."""
    name: str
    digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """What a batch is controlled by (Zhang et al. 2023): the network, a picture a row, and how strongly."""

    net: ControlNet
    hint: Tensor
    """(B, 3, H, W) in [0, 1], of the size that is edited."""
    weight: float = 1.0

    def repeated(self, times: int) -> Control:
        """The same for so many branches, stacked along the batch."""
        return Control(net=self.net, hint=self.hint.repeat(times, 1, 1, 1), weight=self.weight)

    def residuals(
        self, x: Tensor, t: Tensor, text: Tensor, added: dict[str, Tensor] | None
    ) -> tuple[Sequence[Tensor], Tensor]:
        """What the UNet adds on its way up and in its middle, for scaled latents x (B, 4, h, w) at times t (B,)."""
        dtype = next(self.net.network.parameters()).dtype
        return self.net.network(
            x.to(dtype),
            t,
            text.to(dtype),
            self.hint.to(x.device, dtype),
            conditioning_scale=self.weight,
            added_cond_kwargs=added,
            return_dict=False,
        )


def load_control(source: str | Path, model: Model) -> ControlNet:
    """A ControlNet for a model, on its device and in its type. Raises CheckpointError for one of another family."""
    part = read_control(source)
    name = Path(source).name
    network = build(part, name=name, device="cpu" if model.offload else model.device, dtype=model.dtype)
    ours, theirs = model.unet.config, network.config
    for field in ("cross_attention_dim", "block_out_channels", "layers_per_block"):
        if _plain(ours[field]) != _plain(theirs[field]):
            raise CheckpointError(
                f"{name} is for UNets of {field} {_plain(theirs[field])}, and this checkpoint's is of "
                f"{_plain(ours[field])}; give a ControlNet of the checkpoint's own family"
            )
    if (small := 2 ** (len(theirs.conditioning_embedding_out_channels) - 1)) != 8:
        got = f"{name} makes its picture {small} times smaller than the edit's, and latents are 8 times smaller"
        raise CheckpointError(f"{got}; give a ControlNet of Stable Diffusion")
    if theirs.conditioning_channels != 3:
        got = f"{name} looks at pictures of {theirs.conditioning_channels} channels"
        raise CheckpointError(f"{got}, and RGB has 3; give a ControlNet for pictures")
    return ControlNet(network=network, name=name, digest=digest_of_values(network))


def hint_of(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """A control picture as the network sees it, (1, 3, H, W) in [0, 1]: cropped around its centre, the nearest pixels.

    As ComfyUI's Apply ControlNet does it.
    """
    width, height = size
    old, new = picture.width / picture.height, width / height
    x = round((picture.width - picture.width * (new / old)) / 2) if old > new else 0
    y = round((picture.height - picture.height * (old / new)) / 2) if old < new else 0
    columns, rows = _nearest(picture.width - 2 * x, width) + x, _nearest(picture.height - 2 * y, height) + y
    # Only the rows that count become numbers: a large picture would take its memory once more.
    chosen = [np.array(picture.crop((0, row, picture.width, row + 1)).convert("RGB"))[0, columns] for row in rows]
    return torch.from_numpy(np.stack(chosen)).permute(2, 0, 1)[None].float() / 255


def _nearest(there: int, wanted: int) -> np.ndarray:
    """The places among ``there`` that "nearest-exact" takes."""
    places = torch.arange(there, dtype=torch.float32)[None, None]
    return interpolate(places, size=wanted, mode="nearest-exact")[0, 0].long().numpy()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
