"""The picture as a condition, and its size given back."""

from __future__ import annotations

from functools import partial
from typing import Any

import node_helpers
import torch
from PIL import Image, ImageChops
from torch import Tensor

from ..ip2p_engine.errors import ConfigError
from ..ip2p_engine.images import fit, give_back, plan_size
from ..ip2p_engine.pictures import area_pictures, whole_area
from ._api import io, schema
from ._guiders import MASK
from ._host import to_image, to_pictures

SIZES = ["paper", "keep"]
SIZE_TOOLTIP = (
    "paper: the paper's rule, multiples of 64 with the long side near resolution; best for what it was trained on. "
    "keep: the picture's own size to the nearest 64; for detail, at the price of memory and of edits that reach less."
)
MASK_TOOLTIP = "Where the picture may change (white). Without it, or with nothing painted, everywhere."


class EncodeImage(io.ComfyNode):
    """The picture as the condition that an InstructPix2Pix was trained with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_EncodeImage",
            display_name="IP2P Encode Image",
            group="conditioning",
            description=(
                "Puts the picture into both conditions and makes the empty latent of the same size, for IP2P Guider "
                "and any sampler. Resizes by the paper's rule, where core's node crops to multiples of 8."
            ),
            search_aliases=[
                "InstructPixToPixConditioning",
                "image conditioning",
                "vae encode for edit",
                "concat latent",
            ],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The instruction, from CLIP Text Encode."),
                io.Conditioning.Input(
                    "negative", tooltip="No instruction: CLIP Text Encode with an empty text, as the model was trained."
                ),
                io.Vae.Input("vae", tooltip="The checkpoint's autoencoder."),
                io.Image.Input("image", tooltip="The picture to edit, or a batch of pictures of one size."),
                io.Combo.Input("size", options=SIZES, default="paper", tooltip=SIZE_TOOLTIP),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=4096,
                    step=64,
                    tooltip=(
                        "The long side that size = paper aims at, in pixels: 512 for SD1.5, 768 for SDXL, 1024 for "
                        "CosXL-Edit, 64 for the embedded model. Wire it from IP2P Load Checkpoint, which knows."
                    ),
                ),
                io.Mask.Input("mask", optional=True, tooltip=MASK_TOOLTIP),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The instruction with the picture."),
                io.Conditioning.Output(display_name="negative", tooltip="No instruction, with the picture."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="Where sampling starts: empty, or with a mask the picture itself, changed only inside.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive: list,
        negative: list,
        vae: Any,
        image: Tensor,
        size: str = "paper",
        resolution: int = 512,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        latent = encode(vae, image, size, resolution)
        masks = mask_pictures(mask, image)
        told = partial(mask_latent, vae, masks, latent)
        values = {"concat_latent_image": latent, MASK: told, **size_values(latent)}
        conditions = [node_helpers.conditioning_set_values(given, values) for given in (positive, negative)]
        return io.NodeOutput(*conditions, start_latent(latent, masks))


class RestoreSize(io.ComfyNode):
    """The edited picture in the original's size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_RestoreSize",
            display_name="IP2P Restore Size",
            group="conditioning",
            description=(
                "Gives the edited picture the width and height of the original, so that one lies over the other; "
                "margins that the resize rule cut off are mirrored. IP2P Edit Image does this itself."
            ),
            search_aliases=["resize back", "original size", "uncrop"],
            inputs=[
                io.Image.Input("image", tooltip="The edited picture, from VAE Decode."),
                io.Image.Input(
                    "original", tooltip="The picture that went into IP2P Encode Image; only its size counts."
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The edited picture, as large as the original.")],
        )

    @classmethod
    def execute(cls, image: Tensor, original: Tensor) -> io.NodeOutput:
        return io.NodeOutput(to_image(in_frame(image, original, [])))


def encode(vae: Any, image: Tensor, size: str, resolution: int) -> Tensor:
    """The image condition c_I (B, 4, h, w) of an IMAGE: the posterior's mode, unscaled, at the planned size."""
    target = plan_size(size, image.shape[2], image.shape[1], resolution)
    return vae.encode(to_image([fit(picture, target) for picture in to_pictures(image)]))


def size_values(latent: Tensor) -> dict[str, int]:
    """SDXL's six numbers for a picture of that latent, as the engine gives them; other models do not look."""
    height, width = 8 * latent.shape[-2], 8 * latent.shape[-1]
    return {
        "width": width,
        "height": height,
        "crop_w": 0,
        "crop_h": 0,
        "target_width": width,
        "target_height": height,
    }


def in_frame(
    edited: Tensor, original: Tensor, masks: list[Image.Image], seen: Tensor | None = None
) -> list[Image.Image]:
    """Edited pictures as large as the original IMAGE; outside their masks, if there are any, they are the original.

    With what the model has ``seen`` of it, decoded, they have the original's detail where it was only toned.
    """
    frame = (original.shape[2], original.shape[1])
    if seen is None:
        whole = [give_back(picture, frame) for picture in to_pictures(edited)]
    else:
        from ..ip2p_engine.detail import with_detail

        whole = [with_detail(*parts) for parts in zip(*map(to_pictures, (seen, edited, original)), strict=True)]
    if not masks:
        return whole
    return [Image.composite(*parts) for parts in zip(whole, to_pictures(original), masks, strict=True)]


def start_latent(latent: Tensor, masks: list[Image.Image]) -> dict[str, Tensor]:
    """The LATENT to sample from: empty, or the picture with a noise mask."""
    if not masks:
        return {"samples": torch.zeros_like(latent)}
    return {"samples": latent, "noise_mask": noise_mask(masks, latent)}


def mask_pictures(mask: Tensor | None, image: Tensor) -> list[Image.Image]:
    """A MASK as grey pictures, one a picture of an IMAGE and as large; none without a mask, or with nothing painted.

    Load Image gives a black mask where there is none. A single mask holds for all pictures.
    Raises ConfigError for another number of masks.
    """
    if mask is None or not mask.any():
        return []
    masks = mask.reshape(-1, *mask.shape[-2:])
    if len(masks) not in (1, len(image)):
        raise ConfigError(f"there are {len(masks)} masks and {len(image)} pictures; give one mask, or one a picture")
    levels = (masks.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    frame = (image.shape[2], image.shape[1])
    return [Image.fromarray(one).resize(frame) for one in levels] * (len(image) // len(masks))


def noise_mask(masks: list[Image.Image], latent: Tensor) -> Tensor:
    """Where a latent may change (B, 1, H, W): the masks, cropped as ``fit`` cropped their pictures."""
    size = (8 * latent.shape[-1], 8 * latent.shape[-2])
    return to_image([fit(one, size) for one in masks])[..., 0].unsqueeze(1)


def mask_latent(vae: Any, masks: list[Image.Image], latent: Tensor) -> Tensor:
    """What UltraEdit's networks are told of masks, (B, 4, h, w): their latents as pictures; of none, of a white one."""
    size = (8 * latent.shape[-1], 8 * latent.shape[-2])
    shown = [fit(one, size).convert("RGB") for one in masks] or [Image.new("RGB", size, "white")] * len(latent)
    return vae.encode(to_image(shown))


def bounded(masks: list[Image.Image], area: Tensor, image: Tensor) -> list[Image.Image]:
    """Masks as large as the IMAGE of what was found, (B, 1, h, w), within those by hand where there are some."""
    frame = (image.shape[2], image.shape[1])
    found = [whole_area(one, frame) for one in area_pictures(area)]
    return [ImageChops.darker(*pair) for pair in zip(masks, found, strict=True)] if masks else found


def as_mask(masks: list[Image.Image], image: Tensor) -> Tensor:
    """Masks as a MASK (B, H, W), white everywhere where there are none."""
    if not masks:
        return torch.ones(image.shape[:3])
    return to_image([one.convert("RGB") for one in masks])[..., 0]
