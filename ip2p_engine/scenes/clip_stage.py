"""Stage 2 of the embedded models: a small CLIP that sees layout.

Each batch holds scenes beside near misses of themselves (another place, another shape, another attribute), so that
the contrast between right and almost right is what it learns.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from open_clip import CLIP
from torch import Tensor, nn

from .grammar import caption_of, scenes_of
from .stage import StageConfig
from .tables import text_table, words_in_use
from .world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, STYLES, all_scenes, world_pixels

__all__ = ["CLIP_CONFIG", "CLIP_MEAN", "CLIP_STD", "ClipStage", "make_clip"]

CLIP_MEAN = CLIP_STD = (0.5, 0.5, 0.5)
CLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 96, "layers": 4, "head_width": 24},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
AXES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "size": tuple(SIZES),
    "style": STYLES,
    "place": tuple(PLACES),
}


@dataclass(frozen=True, kw_only=True)
class ClipStageConfig(StageConfig):
    """How the CLIP trains; a batch is made of groups of one scene and its near misses."""

    group: int = 4


def make_clip(vocabulary: int = 49408) -> CLIP:
    """open_clip's CLIP in small: ViT of patch 8 on 64 x 64, and a text tower with the standard vocabulary."""
    config = CLIP_CONFIG | {"text_cfg": CLIP_CONFIG["text_cfg"] | {"vocab_size": vocabulary}}
    return CLIP(**config)


class ClipStage:
    """The symmetric contrastive loss of CLIP (Radford et al. 2021)."""

    config = ClipStageConfig(steps=600, batch=128, learning_rate=1.5e-3)

    def __init__(self) -> None:
        torch.manual_seed(self.config.seed + 2)
        self.trained: nn.Module = make_clip(len(words_in_use()))

    @cached_property
    def _world(self) -> tuple[Tensor, Tensor, dict]:
        """(pixels, caption tokens, row of each scene) of the training scenes."""
        scenes = scenes_of(held_out=False)
        position = {scene: n for n, scene in enumerate(all_scenes())}
        pixels = world_pixels()[[position[scene] for scene in scenes]]
        tokens = text_table([caption_of(scene) for scene in scenes]).tokens
        pixels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        return pixels, tokens, {scene: n for n, scene in enumerate(scenes)}

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        pixels, tokens, rows = self._world
        scenes = scenes_of(held_out=False)
        chosen: list[int] = []
        while len(chosen) < self.config.batch:
            anchor = scenes[int(torch.randint(len(scenes), (1,), generator=generator))]
            chosen += self._group(anchor, rows, generator)
        index = torch.tensor(chosen[: self.config.batch])
        return {"pictures": pixels[index].float() / 127.5 - 1, "tokens": tokens[index].long()}

    def _group(self, anchor, rows: dict, generator: torch.Generator) -> list[int]:
        """The anchor, moved, reshaped, and with any attribute changed, as far as the training split has them."""
        names = list(AXES)
        picked = ["place", "shape", names[int(torch.randint(len(names), (1,), generator=generator))]]
        group = {rows[anchor]}
        for name in picked[: self.config.group - 1]:
            value = AXES[name][int(torch.randint(len(AXES[name]), (1,), generator=generator))]
            group.add(rows.get(anchor.with_(**{name: value}), rows[anchor]))
        return sorted(group)

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        image = self.trained.encode_image(batch["pictures"], normalize=True)
        text = self.trained.encode_text(batch["tokens"], normalize=True)
        logits = self.trained.logit_scale.exp().clamp(max=100) * image @ text.T
        same = (batch["tokens"][:, None] == batch["tokens"][None]).all(-1).float()
        target = same / same.sum(dim=1, keepdim=True)
        loss = (
            -(target * logits.log_softmax(1)).sum(1).mean() / 2 - (target * logits.T.log_softmax(1)).sum(1).mean() / 2
        )
        right = (logits.argmax(1) == torch.arange(len(logits))).float().mean()
        return loss, {"top1": right.item()}


def clip_config_json() -> dict:
    """What the exported file says of itself."""
    return CLIP_CONFIG | {"preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD}, "training": asdict(ClipStage.config)}
