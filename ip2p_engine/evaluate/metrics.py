"""How pictures compare: distances of pixels, and features of CLIP and DINO as MagicBrush's evaluation takes them.

Both shrink the shorter side with Pillow's (antialiased) bicubic, CLIP to 224, DINO to 256, and cut out the middle 224.
The paper's four numbers squeeze instead (``clip.similarity.clip_input``), so the two do not compare.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..clip.similarity import ClipSimilarity
from ..errors import CheckpointError, ConfigError, ImageError, first_line

__all__ = [
    "BEST_PSNR",
    "DINO",
    "Dino",
    "Lpips",
    "MASK_WHITE",
    "background",
    "centre",
    "clip_features",
    "distances",
    "evaluate_extra",
    "fitted_mask",
    "mean_difference",
    "psnr",
    "same_size",
    "unit",
]

SSIM_WINDOW = 11
BAND_PIXELS = 1 << 19  # of each SSIM takes 80 numbers
BEST_PSNR = 99.0
"""Of equal pictures, where means are taken: infinity would swallow them."""
MASK_WHITE = 128  # of 255: from there on a mask says that the edit was wanted
DINO = "facebook/dino-vits16"
DINO_RESIZE, DINO_CROP = 256, 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def centre(image: Image.Image, resize: int, crop: int) -> Image.Image:
    """The shorter side to ``resize``, then the middle ``crop`` x ``crop``: torchvision's Resize and CenterCrop."""
    from torchvision.transforms import functional

    image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy a large one
    shrunk = functional.resize(image, [resize], functional.InterpolationMode.BICUBIC)
    return functional.center_crop(shrunk, [crop])


def clip_features(clip: ClipSimilarity, images: Sequence[Image.Image]) -> Tensor:
    """Unit features (B, d) of pictures through CLIP's own transform."""
    return clip.image_features([centre(image, clip.size, clip.size) for image in images])


class Dino:
    """DINO's ViT (Caron et al. 2021): unit features of the class token."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, source: str | Path = DINO, *, device: str | torch.device = "cpu") -> Dino:
        """Load a Hugging Face id (downloaded once) or its folder; raises CheckpointError for what is no ViT."""
        from transformers import ViTModel

        try:
            network, found = ViTModel.from_pretrained(source, add_pooling_layer=False, output_loading_info=True)
            # transformers fills in at random what a file of another network lacks.
            if found["missing_keys"]:
                raise ValueError(f"it lacks {min(found['missing_keys'])}")
            if network.config.image_size != DINO_CROP:
                raise ValueError(f"it sees {network.config.image_size} pixels, and DINO {DINO_CROP}")
        except (OSError, ValueError, RuntimeError) as error:
            reason = first_line(error)
            raise CheckpointError(
                f"{source} is no DINO that can be loaded ({reason}); give {DINO} or a folder that holds it"
            ) from error
        return cls(network.to(device))

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit features (B, d) on the CPU."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        inputs = [(unit(centre(image, DINO_RESIZE, DINO_CROP)) - mean) / std for image in images]
        device = next(self.network.parameters()).device
        hidden = self.network(pixel_values=torch.stack(inputs).to(device)).last_hidden_state
        return normalize(hidden[:, 0].float(), dim=-1).cpu()


class Lpips:
    """LPIPS (Zhang et al. 2018, SqueezeNet) of what lies outside a mask."""

    def __init__(self) -> None:
        """torchvision downloads SqueezeNet's weights once, torchmetrics carries the rest; CheckpointError offline."""
        metric: Any = evaluate_extra("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity
        try:
            with redirect_stdout(sys.stderr):  # torch tells of its download where results belong
                self._metric = metric(net_type="squeeze", normalize=True)
        except OSError as error:
            raise CheckpointError(
                f"LPIPS needs SqueezeNet's weights, which cannot be downloaded ({error}); connect once, or do without"
            ) from error

    @torch.inference_mode()
    def background(self, source: Image.Image, edited: Image.Image, mask: Image.Image) -> float:
        """Of a source and its edit, with what lies inside the mask taken as kept."""
        resized = same_size(edited.convert("RGB"), source)
        inside = fitted_mask(mask, source).point(lambda level: 255 * (level >= MASK_WHITE))
        kept = Image.composite(source.convert("RGB"), resized, inside)
        self._metric.reset()
        return float(self._metric(unit(kept)[None], unit(source)[None]))


def unit(image: Image.Image) -> Tensor:
    """An RGB picture as float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def same_size(image: Image.Image, other: Image.Image) -> Image.Image:
    """The picture at the other's size, Pillow's bicubic: how MagicBrush's evaluation makes sizes equal."""
    return image if image.size == other.size else image.resize(other.size, Image.Resampling.BICUBIC)


def mean_difference(image: Image.Image, other: Image.Image) -> float:
    """The l1 of ``distances`` alone, which takes a hundredth of its time."""
    image = same_size(image, other)
    rows = max(1, BAND_PIXELS // other.width)
    bands = [(0, top, other.width, min(top + rows, other.height)) for top in range(0, other.height, rows)]
    sums = [float((unit(image.crop(box)) - unit(other.crop(box))).abs().double().sum()) for box in bands]
    return sum(sums) / (3 * other.width * other.height)


def distances(image: Image.Image, other: Image.Image) -> dict[str, float]:
    """l1 and l2 (mean absolute and mean squared difference in [0, 1]), psnr (dB) and ssim; sizes are made equal."""
    absolute, squared, ssim = _compared(same_size(image, other), other)
    return {"l1": absolute, "l2": squared, "psnr": psnr(squared), "ssim": ssim}


def fitted_mask(mask: Image.Image, source: Image.Image) -> Image.Image:
    """A mask in grey at its picture's size, by the nearest pixel."""
    return mask.convert("L").resize(source.size, Image.Resampling.NEAREST)


def background(source: Image.Image, edited: Image.Image, mask: Image.Image) -> dict[str, float]:
    """How well an edit kept what lies outside a mask: psnr, ssim and l2 of source and edited over its black pixels.

    ``mask`` is white (``MASK_WHITE`` and more) where the edit was wanted. Only pixels outside count, so a large mask
    does not flatter; SSIM's windows reach 5 pixels into it. Raises ImageError for a mask without an outside.
    """
    outside = np.asarray(fitted_mask(mask, source)) < MASK_WHITE
    if not outside.any():
        raise ImageError("the mask is white everywhere, so nothing is outside the edit; give one with black parts")
    _, squared, ssim = _compared(source, same_size(edited, source), outside)
    return {"background_l2": squared, "background_psnr": psnr(squared), "background_ssim": ssim}


def psnr(mean_square: float, most: float = math.inf) -> float:
    """10 log10(1 / MSE), in dB, of a mean squared error in [0, 1]; equal pictures give ``most``."""
    return min(most, -10 * math.log10(mean_square)) if mean_square > 0 else most


def _compared(a: Image.Image, b: Image.Image, counts: np.ndarray | None = None) -> tuple[float, float, float]:
    """Means of the absolute and the squared difference, and of SSIM, over the pixels that count, (H, W) bool.

    SSIM's is over those whose whole window lies inside the picture, if there are any. Some rows at a time.
    """
    (width, height), edge = b.size, SSIM_WINDOW // 2
    counts = np.broadcast_to(True, (height, width)) if counts is None else counts
    margin = edge if counts[edge:-edge, edge:-edge].any() else 0
    rows = max(1, BAND_PIXELS // width)
    sums, numbers = np.zeros(3), np.zeros(3)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        # Neighbours beyond the band, so that its windows see what they would see of the whole.
        first, last = max(0, top - SSIM_WINDOW), min(height, bottom + SSIM_WINDOW)
        here, there = (unit(one.crop((0, first, width, last))) for one in (a, b))
        differ, alike = (here - there)[:, top - first : bottom - first], _ssim_map(here, there)
        alike = alike[:, top - first : bottom - first]
        inner = np.zeros((bottom - top, width), bool)
        inner[max(0, margin - top) : height - margin - top, margin : width - margin] = True
        where = [torch.from_numpy(one) for one in (counts[top:bottom].copy(), counts[top:bottom] & inner)]
        for n, (values, mask) in enumerate(zip((differ.abs(), differ**2, alike), (where[0], *where), strict=True)):
            chosen = values[:, mask].double()
            sums[n] += float(chosen.sum())
            numbers[n] += chosen.numel()
    absolute, squared, ssim = (float(one) for one in sums / numbers)
    return absolute, squared, ssim


def _ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """SSIM at each pixel, (3, H, W): Wang et al. (2004), Gaussian window of 11, sigma 1.5, range 1."""
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ImageError(f"SSIM looks at windows of {SSIM_WINDOW} pixels and the picture is {tuple(a.shape[-2:])}")
    metric = evaluate_extra("torchmetrics.functional.image").structural_similarity_index_measure
    _, full = metric(a[None], b[None], data_range=1.0, kernel_size=SSIM_WINDOW, sigma=1.5, return_full_image=True)
    return full[0]


def evaluate_extra(module: str) -> Any:
    """A module of the extra [evaluate]; raises ConfigError, naming it, where it is missing."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f"this measure needs {package}, which is missing; pip install {package}") from error
