"""What the stages train on, as tensors: latents of every training scene, every true edit, every text.

The standard vocabulary has 49,408 rows and the grammar uses about a hundred, so training works on the rows in use;
they are scattered into the full table when the text encoder is exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...checkpoint.write import write_safetensors
from ...tokenizer import END_OF_TEXT, START_OF_TEXT, tokenize
from ..grammar import INSTRUCTIONS, KINDS, captions_of, edits_from, instructions_for, is_held_out, scenes_of
from ..world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, all_scenes, world_pixels

__all__ = [
    "EditTable",
    "as_input",
    "caption_rows",
    "edit_table",
    "latent_table",
    "text_table",
    "training_pixels",
    "words_in_use",
]

MOST_PHRASINGS = max(len(phrasings.train) for phrasings in INSTRUCTIONS.values())


@dataclass(frozen=True, kw_only=True)
class EditTable:
    """Every training edit: scene indices, kinds, and rows of its instructions (repeated to equal length)."""

    source: Tensor
    target: Tensor
    kind: Tensor
    instruction: Tensor
    texts: tuple[str, ...]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(source, target, instruction row) with kinds equally often."""
        kinds = torch.randint(len(KINDS), (count,), generator=generator)
        rows = torch.empty(count, dtype=torch.int64)
        for kind in range(len(KINDS)):
            members = (self.kind == kind).nonzero()[:, 0]
            mine = (kinds == kind).nonzero()[:, 0]
            rows[mine] = members[torch.randint(len(members), (len(mine),), generator=generator)]
        phrase = torch.randint(self.instruction.shape[1], (count,), generator=generator)
        return self.source[rows], self.target[rows], self.instruction[rows, phrase]


def words_in_use() -> Tensor:
    """Token ids of everything that the grammar can say, sorted; row k of a compact table is id words_in_use()[k]."""
    vocabulary = [*SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *PLACES]
    frames = [t for p in INSTRUCTIONS.values() for t in (*p.train, *p.held_out)]
    phrases = [" ".join(w for w in frame.split() if "{" not in w) for frame in frames]
    ids = tokenize([*vocabulary, *phrases, "a an , at night in the snow pencil sketch of on background, centre,"])
    names = tokenize([f"{word}," for word in [*BACKGROUNDS, *SIZES, *PLACES]])
    special = torch.tensor([START_OF_TEXT, END_OF_TEXT])
    return torch.cat([ids.flatten(), names.flatten(), special]).unique()


def text_table(texts: Sequence[str]) -> Tensor:
    """Compact token rows of some texts, (texts, 77), int16."""
    rows = torch.cat([tokenize(texts[start : start + 4096]) for start in range(0, len(texts), 4096)])
    words = words_in_use()
    compact = torch.searchsorted(words, rows)
    if not torch.equal(words[compact.clamp(max=len(words) - 1)], rows):
        raise AssertionError("a text of the grammar uses a token that words_in_use() does not list")
    return compact.to(torch.int16)


def caption_rows() -> tuple[list[str], Tensor]:
    """(unique captions, rows of each training scene's phrasings (scenes, 3))."""
    texts: dict[str, int] = {}
    rows = [[texts.setdefault(c, len(texts)) for c in captions_of(scene)] for scene in scenes_of(held_out=False)]
    return list(texts), torch.tensor(rows)


def edit_table() -> EditTable:
    """Every edit between training scenes."""
    scenes = scenes_of(held_out=False)
    position = {scene: n for n, scene in enumerate(scenes)}
    texts: dict[str, int] = {}
    source, target, kinds, rows = [], [], [], []
    for n, scene in enumerate(scenes):
        for kind, after in edits_from(scene):
            if after in position:
                source.append(n)
                target.append(position[after])
                kinds.append(KINDS.index(kind))
                rows.append(_phrase_rows(kind, scene, after, texts))
    return EditTable(
        source=torch.tensor(source),
        target=torch.tensor(target),
        kind=torch.tensor(kinds),
        instruction=torch.tensor(rows),
        texts=tuple(texts),
    )


def _phrase_rows(kind: str, before: Scene, after: Scene, texts: dict[str, int]) -> list[int]:
    rows = [texts.setdefault(text, len(texts)) for text in instructions_for(kind, before, after)]
    return (rows * MOST_PHRASINGS)[:MOST_PHRASINGS]


@cache
def training_pixels() -> Tensor:
    """Every training scene, uint8, (scenes, 3, 64, 64), in the order of ``scenes_of``."""
    keep = [not is_held_out(scene) for scene in all_scenes()]
    return torch.from_numpy(np.ascontiguousarray(world_pixels()[keep].transpose(0, 3, 1, 2)))


def as_input(pixels: Tensor) -> Tensor:
    """What networks take: float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def latent_table(autoencoder: Any, path: Path) -> dict[str, Tensor]:
    """Posterior mean and standard deviation of every training scene, unscaled; made once, then read from the file."""
    if not path.exists():
        posteriors = [autoencoder.encode(as_input(part)).latent_dist for part in training_pixels().split(64)]
        table = {name: torch.cat([getattr(one, name) for one in posteriors]) for name in ("mean", "std")}
        write_safetensors(table, path, {"format": "pt"})  # whole, even if several processes make it at once
    return load_file(path)
