"""What the stages train on, as tensors: latents of every training scene, every true edit, every text.

The standard vocabulary has 49,408 rows and the grammar uses about a hundred, so training works on the rows in use;
they are scattered into the full table when the text encoder is exported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...tokenizer import END_OF_TEXT, START_OF_TEXT, tokenize
from ..grammar import INSTRUCTIONS, KINDS, captions_of, edits_from, instructions_for, scenes_of
from ..world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene

__all__ = [
    "EditTable",
    "TextTable",
    "caption_rows",
    "edit_table",
    "latent_table",
    "text_table",
    "words_in_use",
]

MOST_PHRASINGS = max(len(phrasings.train) for phrasings in INSTRUCTIONS.values())


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """Unique texts as rows of compact token ids, shape (N, 77)."""

    texts: tuple[str, ...]
    tokens: Tensor

    def index(self) -> dict[str, int]:
        return {text: row for row, text in enumerate(self.texts)}


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


def text_table(texts: Sequence[str]) -> TextTable:
    """Compact token rows of some texts."""
    rows = torch.cat([tokenize(texts[start : start + 4096]) for start in range(0, len(texts), 4096)])
    words = words_in_use()
    compact = torch.searchsorted(words, rows)
    if not torch.equal(words[compact.clamp(max=len(words) - 1)], rows):
        raise AssertionError("a text of the grammar uses a token that words_in_use() does not list")
    return TextTable(texts=tuple(texts), tokens=compact.to(torch.int16))


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


@torch.no_grad()
def latent_table(autoencoder, pictures: Callable[[], Tensor], path: Path) -> dict[str, Tensor]:
    """Posterior mean and standard deviation of every training scene, unscaled, cached in a file."""
    if path.exists():
        return load_file(path)
    posteriors = [autoencoder.encode(part.float() / 127.5 - 1).latent_dist for part in pictures().split(64)]
    table = {
        "mean": torch.cat([p.mean for p in posteriors]).contiguous(),
        "std": torch.cat([p.std for p in posteriors]).contiguous(),
    }
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # several processes may make it at once
    save_file(table, temporary)
    temporary.replace(path)
    return table
