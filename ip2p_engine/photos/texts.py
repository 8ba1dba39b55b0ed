"""The photo world's texts as tensors: the words in use, and what a text says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..tokenizer import END_OF_TEXT, MAX_TOKENS, START_OF_TEXT, tokenize
from .edits import WAYS, Add, Move, Operation, Recolour, Reshape, Resize, Tint, Tone
from .grammar import all_words
from .objects import COLOURS, LARGE, SHAPES
from .tones import HUES, TONES

__all__ = [
    "FACTS",
    "any_wording",
    "compact_tokens",
    "facts_of",
    "padded",
    "words_in_use",
]


FACTS = (
    *(f"is {name}" for name in ("Tone", "Tint", "Add", "Remove", "Recolour", "Reshape", "Resize", "Move", "Swap")),
    *(f"tone {name}" for name in TONES),
    *(f"from {name}" for name in HUES),
    *(f"to {name}" for name in COLOURS),
    *(f"into {name}" for name in SHAPES),
    *(f"way {name}" for name in WAYS),
    "larger",
    "smaller",
)
"""What the first text stage asks of an instruction."""


@lru_cache(maxsize=1)
def words_in_use() -> Tensor:
    """Token ids of all that the grammar can say, sorted; row k of a compact table is id words_in_use()[k]."""
    texts = all_words()
    joined = [f"{text}," for text in texts]
    special = torch.tensor([START_OF_TEXT, END_OF_TEXT])
    return torch.cat([tokenize(texts).flatten(), tokenize(joined).flatten(), special]).unique()


def compact_tokens(texts: Sequence[str]) -> Tensor:
    """Rows of the compact table, int64, (N, 77). Raises ConfigError for a word that the grammar does not have."""
    rows, words = tokenize(texts), words_in_use()
    compact = torch.searchsorted(words, rows).clamp(max=len(words) - 1)
    if not torch.equal(words[compact], rows):
        wrong = (words[compact] != rows).any(1).nonzero()[0, 0]
        raise ConfigError(
            f"{texts[int(wrong)]!r} has a word that the photo world's grammar lacks; all_words() lists them"
        )
    return compact


def facts_of(operations: Sequence[Operation]) -> Tensor:
    """Which of ``FACTS`` an instruction for these operations states, float, (len(FACTS),)."""
    stated = set()
    for one in operations:
        stated.add(f"is {type(one).__name__}")
        if isinstance(one, Tone):
            stated.add(f"tone {one.name}")
        elif isinstance(one, Tint):
            stated |= {f"from {one.colour}", f"to {one.target}"}
        elif isinstance(one, Add):
            stated |= {f"to {one.thing.colour}", f"into {one.thing.shape}"}
        elif isinstance(one, Recolour):
            stated.add(f"to {one.colour}")
        elif isinstance(one, Reshape):
            stated.add(f"into {one.shape}")
        elif isinstance(one, Resize):
            stated.add("larger" if one.size == LARGE else "smaller")
        elif isinstance(one, Move):
            stated.add(f"way {one.way}")
    return torch.tensor([float(fact in stated) for fact in FACTS])


def padded(tokens: Tensor) -> Tensor:
    """Rows of 77 compact tokens from shorter ones: the rest is the end of the text, as Stable Diffusion pads."""
    end = int(torch.searchsorted(words_in_use(), torch.tensor(END_OF_TEXT)))
    return F.pad(tokens.long(), (0, MAX_TOKENS - tokens.shape[1]), value=end)


def any_wording(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """One of each row's wordings: (N, wordings, length) to (N, length)."""
    pick = torch.randint(tokens.shape[1], (len(tokens),), generator=generator)
    return tokens[torch.arange(len(tokens)), pick]
