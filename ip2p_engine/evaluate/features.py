"""Features of whole pictures through CLIP's and DINO's own transforms, as MagicBrush's evaluation takes them.

Both shrink the shorter side with Pillow's (antialiased) bicubic, CLIP to 224, DINO to 256, and cut out the middle 224.
The paper's four numbers squeeze instead (``clip_similarity.clip_input``), so the two do not compare.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..clip.similarity import ClipSimilarity
from ..errors import CheckpointError, first_line
from .pixels import evaluate_extra, same_size, unit

__all__ = ["DINO", "Dino", "Lpips", "centre", "clip_features"]

DINO = "facebook/dino-vits16"
DINO_RESIZE, DINO_CROP = 256, 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def centre(image: Image.Image, resize: int, crop: int) -> Image.Image:
    """The shorter side to ``resize``, then the middle ``crop`` x ``crop``: torchvision's Resize and CenterCrop."""
    from torchvision.transforms import functional

    shrunk = functional.resize(image.convert("RGB"), [resize], functional.InterpolationMode.BICUBIC)
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
        levels = mask.convert("L").resize(source.size, Image.Resampling.NEAREST)
        inside = levels.point(lambda level: 255 * (level >= 128))
        kept = Image.composite(source.convert("RGB"), resized, inside)
        self._metric.reset()
        return float(self._metric(unit(kept)[None], unit(source)[None]))
