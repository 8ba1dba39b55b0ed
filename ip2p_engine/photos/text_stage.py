"""Stage 3 of the photo model: the text encoder, trained to tell what an instruction asks for."""

from __future__ import annotations

import random
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..train.config import preset
from .networks import TEXT_WIDTH
from .texts import FACTS, any_wording, compact_text_encoder, compact_tokens, facts_of, padded
from .tints import HUES, tint
from .world import KINDS, sample_edit, say

__all__ = ["TextStage"]

EDITS = 1760
WORDINGS = 4
LONGEST = 40
SIDE = 128


class TextStage:
    """Every fact of an instruction is read by one linear layer from the end of the text."""

    config = preset("embedded", steps=240, batch_size=64, learning_rate=2e-3)

    def __init__(self) -> None:
        torch.manual_seed(self.config.seed + 1)
        self._nets = nn.ModuleDict({"text": compact_text_encoder(), "facts": nn.Linear(TEXT_WIDTH, len(FACTS))})
        self.trained: nn.Module = self._nets

    @cached_property
    def table(self) -> dict[str, Tensor]:
        """Texts of sampled edits of a card with every colour; no photograph is needed."""
        card, rng = _Card(), random.Random(self.config.seed)
        tokens, facts = [], []
        for n in range(EDITS):
            edit = sample_edit(card, KINDS[n % len(KINDS)], seed=n, held_out=False, size=SIDE)
            texts = [say(edit.canvas, edit.operations, rng, held_out=False) for _ in range(WORDINGS)]
            tokens.append(compact_tokens(texts)[:, :LONGEST])
            facts.append(facts_of(edit.operations))
        return {"tokens": torch.stack(tokens), "facts": torch.stack(facts)}

    def draw(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(EDITS, (self.config.batch_size,), generator=generator)
        return {"tokens": any_wording(self.table["tokens"][rows], generator), "facts": self.table["facts"][rows]}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        states = self._nets["text"](padded(batch["tokens"])).last_hidden_state
        guesses = self._nets["facts"](states[:, -1])
        right = ((guesses > 0) == (batch["facts"] > 0.5)).all(1).float().mean()
        return F.binary_cross_entropy_with_logits(guesses, batch["facts"]), {"right": right.item()}


class _Card:
    """In place of a pool of photographs: stripes of all hues."""

    keys = ("card",)
    weights = torch.ones(1)

    def __init__(self) -> None:
        stripe = torch.tensor([0.8, 0.15, 0.15]).view(3, 1, 1).expand(3, SIDE, SIDE // len(HUES) + 1)
        self.view = torch.cat([stripe if name == "red" else tint(stripe, "red", name) for name in HUES], dim=2)

    def draw_from(self, index: int, size: int, generator: torch.Generator) -> Tensor:
        return self.view[:, :size, :size]
