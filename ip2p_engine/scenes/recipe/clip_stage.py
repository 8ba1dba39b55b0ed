"""The embedded CLIP, which sees layout: both towers together, then the text tower alone in every wording.

Together: each batch holds scenes beside near misses of themselves (another place, another shape, another attribute),
so that the contrast between right and almost right is what it learns. Alone: the pictures' features are fixed, so a
text can be compared with all of the world at once; a caption that does not say where means every place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from open_clip import CLIP
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...train.config import preset
from ..grammar import caption_of, scenes_of
from ..world import ATTRIBUTES, PLACES, Scene
from .tables import as_input, caption_rows, text_table, training_pixels, words_in_use

__all__ = ["CLIP_CONFIG", "CLIP_MEAN", "CLIP_STD", "ClipStage", "ClipTextStage", "make_clip", "with_text_tower"]

CLIP_MEAN = CLIP_STD = (0.5, 0.5, 0.5)
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 96, "layers": 4, "head_width": 24},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
THRESHOLDS = {"min_sim_0": 0.65, "min_sim_1": 0.65, "min_sim_direction": 0.8, "min_sim_image": 0.45}
"""Where the filter's thresholds belong for this CLIP: calibrated on training scenes, see docs/pairs.md."""
TOLD = ("steps", "batch_size", "learning_rate", "warm_up", "ema_decay", "seed")


def make_clip(vocabulary: int = 49408) -> CLIP:
    """open_clip's CLIP in small: ViT of patch 8 on 64 x 64, and a text tower with the standard vocabulary."""
    config = CLIP_CONFIG | {"text_cfg": CLIP_CONFIG["text_cfg"] | {"vocab_size": vocabulary}}
    return CLIP(**config)


class ClipStage:
    """The symmetric contrastive loss of CLIP (Radford et al. 2021)."""

    config = preset("embedded", steps=600, batch_size=128, learning_rate=1.5e-3)

    def __init__(self) -> None:
        torch.manual_seed(self.config.seed + 2)
        self.trained: Any = make_clip(len(words_in_use()))
        self._scenes = scenes_of(held_out=False)
        self._rows = {scene: n for n, scene in enumerate(self._scenes)}
        self._tokens = text_table([caption_of(scene) for scene in self._scenes])

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen: list[int] = []
        while len(chosen) < self.config.batch_size:
            chosen += self._group(_any(self._scenes, generator), generator)
        index = torch.tensor(chosen[: self.config.batch_size])
        return {"pictures": as_input(training_pixels()[index]), "tokens": self._tokens[index].long()}

    def _group(self, anchor: Scene, generator: torch.Generator) -> list[int]:
        """The anchor, moved, reshaped, and with any attribute changed, as far as the training split has them."""
        row = self._rows[anchor]
        group = {row}
        for name in ("place", "shape", _any(list(ATTRIBUTES), generator)):
            changed = anchor.with_(**{name: _any(ATTRIBUTES[name], generator)})
            group.add(self._rows.get(changed, row))
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


class ClipTextStage:
    """The text tower on fixed features of the pictures: each wording against every training scene.

    The cross entropy of CLIP from text to image, whose right answers are all scenes that the caption describes.
    """

    config = preset("embedded", steps=300, batch_size=128, learning_rate=1e-3)

    def __init__(self, clip: Mapping[str, Tensor]) -> None:
        """``clip`` holds the weights of the finished first stage, which this one goes on from."""
        network = make_clip(len(words_in_use()))
        network.load_state_dict(dict(clip))
        self._features = _scene_features(network.eval())
        self._scale = network.logit_scale.exp().clamp(max=100).item()
        captions, self._rows = caption_rows()
        tokens = text_table(captions)
        # A text is read up to its end, so places behind the longest text neither learn nor cost.
        self._tokens = tokens[:, : int(tokens.argmax(dim=1).max()) + 1]
        self._meant = _meant_scenes(self._rows, len(captions))
        self.trained: Any = _text_tower(network, self._tokens.shape[1])

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        scenes = torch.randint(len(self._rows), (self.config.batch_size,), generator=generator)
        wordings = torch.randint(self._rows.shape[1], (self.config.batch_size,), generator=generator)
        texts = self._rows[scenes, wordings]
        return {"tokens": self._tokens[texts].long(), "meant": self._meant[texts]}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        encoded, meant = self.trained.encode_text(batch["tokens"], normalize=True), batch["meant"]
        logits = self._scale * encoded @ self._features.to(encoded.device).T
        target = torch.zeros_like(logits).scatter_add_(1, meant.clamp(min=0), (meant >= 0).float())
        loss = -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
        return loss, {"top1": target.gather(1, logits.argmax(1, keepdim=True)).mean().item()}


def with_text_tower(clip: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP with the text tower of ClipTextStage, whose positions are the first of the standard 77."""
    positions = clip["positional_embedding"].clone()
    learnt = text["positional_embedding"]
    positions[: len(learnt)] = learnt
    return {**clip, **text, "positional_embedding": positions}


def _any(options: Sequence, generator: torch.Generator) -> Any:
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def _text_tower(network: CLIP, length: int) -> CLIP:
    """The CLIP without its picture tower, for texts of at most ``length`` tokens."""
    del network.visual
    network.logit_scale.requires_grad_(False)
    network.positional_embedding = nn.Parameter(network.positional_embedding.detach()[:length].clone())
    network.attn_mask = network.attn_mask[:length, :length].clone()
    return network


@torch.no_grad()
def _scene_features(network: CLIP) -> Tensor:
    """Unit features of every training scene, (scenes, 64)."""
    encoded = [network.encode_image(as_input(part)) for part in training_pixels().split(256)]
    return normalize(torch.cat(encoded), dim=-1)


def _meant_scenes(rows: Tensor, count: int) -> Tensor:
    """The training scenes that each caption describes, (captions, 9), filled up with -1."""
    meant: list[list[int]] = [[] for _ in range(count)]
    for scene, captions in enumerate(rows.tolist()):
        for caption in captions:
            meant[caption].append(scene)
    return torch.tensor([(scenes + [-1] * len(PLACES))[: len(PLACES)] for scenes in meant])


def clip_config_json() -> dict:
    """What the exported file says of itself."""
    stages = {"together": ClipStage.config, "text": ClipTextStage.config}
    training = {stage: {name: getattr(config, name) for name in TOLD} for stage, config in stages.items()}
    seen = {"preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD}, "thresholds": THRESHOLDS}
    return CLIP_CONFIG | seen | {"training": training}
