"""Which token of a caption becomes which of the edited one (Hertz et al. 2022, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import ConfigError
from ..tokenizer import END_OF_TEXT, MAX_TOKENS, clip_tokenizer, tokenize

__all__ = [
    "align",
    "changed_tokens",
    "contains",
    "refinement_map",
    "replacement_map",
    "text_length",
    "tokens_of_words",
    "words",
]

WORD_END = "</w>"


def align(
    source: Sequence[int], edited: Sequence[int], *, match: float = 1, mismatch: float = -1, gap: float = 0
) -> list[int | None]:
    """For each edited symbol the place of its source symbol, or None (global alignment, Needleman & Wunsch 1970).

    The default scores are Hertz et al.'s and never align different symbols. Of several best alignments the one that
    pairs symbols as near the end as possible is taken.
    """
    score = _scores(source, edited, match, mismatch, gap)
    partner: list[int | None] = [None] * len(edited)
    i, j = len(source), len(edited)
    while i and j:
        pair = match if source[i - 1] == edited[j - 1] else mismatch
        if score[i][j] == score[i - 1][j - 1] + pair:
            i, j = i - 1, j - 1
            partner[j] = i
        elif score[i][j] == score[i][j - 1] + gap:
            j -= 1
        else:
            i -= 1
    return partner


def refinement_map(source: str, edited: str) -> tuple[Tensor, Tensor]:
    """(A, own): the refined cross-attention is M_src A where a token has a source, and the token's own elsewhere.

    A is (77, 77) of zeros and ones, own (77,) is 1 for tokens without a source. Padding follows padding, in order.
    """
    a, b = _ids(source), _ids(edited)
    mapping, own = torch.zeros(MAX_TOKENS, MAX_TOKENS), torch.ones(MAX_TOKENS)
    padding = zip(range(len(a), MAX_TOKENS), range(len(b), MAX_TOKENS), strict=False)
    pairs = [(i, j) for j, i in enumerate(align(a, b)) if i is not None and a[i] == b[j]]
    for i, j in [*pairs, *padding]:
        mapping[i, j], own[j] = 1, 0
    return mapping, own


def replacement_map(source: str, edited: str) -> Tensor:
    """A of (77, 77): a swapped word's tokens share the attention of the word before it, M_src A.

    The tokens of a word get an equal part each of what its counterpart's tokens got; the padding follows in order,
    so no attention is lost. Raises ConfigError unless both captions have the same number of words.
    """
    a, b = words(source), words(edited)
    if len(a) != len(b):
        raise ConfigError(
            f"mode 'replace' swaps word by word, and {source!r} has {len(a)} words where {edited!r} has {len(b)}; "
            "use mode 'refine'"
        )
    mapping = torch.zeros(MAX_TOKENS, MAX_TOKENS)
    mapping[0, 0] = 1
    for (old, old_ids), (new, new_ids) in zip(a, b, strict=True):
        if old_ids == new_ids:
            mapping[old, new] = torch.eye(len(old_ids))
        else:
            mapping[old, new] = 1 / len(new_ids)
    start, shift = text_length(source) - 1, text_length(edited) - text_length(source)
    for i in range(start, MAX_TOKENS):
        mapping[i, min(i + shift, MAX_TOKENS - 1)] = 1
    return mapping


def changed_tokens(source: str, edited: str) -> tuple[Tensor, Tensor]:
    """(source, edited): 1 at the tokens that have no equal in the other caption, float32, (77,) each."""
    a, b = _ids(source), _ids(edited)
    partner = align(a, b)
    kept = {i for i in partner if i is not None}
    return _marks(i for i in range(len(a)) if i not in kept), _marks(j for j, i in enumerate(partner) if i is None)


def contains(caption: str, wanted: str) -> bool:
    """Whether a caption has a word or phrase."""
    return bool(_starts(caption, wanted))


def _starts(caption: str, wanted: str) -> list[int]:
    """The numbers of the words at which it begins."""
    have, phrase = words(caption), [ids for _, ids in words(wanted)]
    return [n for n in range(len(have)) if phrase and [ids for _, ids in have[n : n + len(phrase)]] == phrase]


def tokens_of_words(caption: str, wanted: str) -> Tensor:
    """1 at the tokens of each occurrence of a word or phrase in a caption, float32, (77,).

    Raises ConfigError if the caption does not contain it.
    """
    have, length, starts = words(caption), len(words(wanted)), _starts(caption, wanted)
    if not starts:
        raise ConfigError(f"{caption!r} does not contain {wanted!r}; name words as the caption has them")
    spans = [have[n][0] for start in starts for n in range(start, start + length)]
    return _marks(place for span in spans for place in range(span.start, span.stop))


def words(caption: str) -> list[tuple[slice, list[int]]]:
    """The words of a caption as CLIP's tokenizer cuts them: (places among the 77 tokens, token ids)."""
    ids = _ids(caption)[1:-1]
    ends = [n + 1 for n, token in enumerate(ids) if str(clip_tokenizer().id_to_token(token)).endswith(WORD_END)]
    # A caption that was cut at 77 tokens may end within a word.
    bounds = sorted({0, *ends, len(ids)})
    return [(slice(start + 1, stop + 1), ids[start:stop]) for start, stop in pairwise(bounds)]


def text_length(caption: str) -> int:
    """Tokens of a caption with its start and its first end, at most 77."""
    return len(_ids(caption))


def _ids(caption: str) -> list[int]:
    ids = tokenize([caption])[0].tolist()
    return ids[: ids.index(END_OF_TEXT) + 1]


def _marks(places: Iterable[int]) -> Tensor:
    marks = torch.zeros(MAX_TOKENS)
    marks[list(places)] = 1
    return marks


def _scores(
    source: Sequence[int], edited: Sequence[int], match: float, mismatch: float, gap: float
) -> list[list[float]]:
    """score[i][j]: the best score of the first i source and the first j edited symbols."""
    score = [[gap * (i + j) for j in range(len(edited) + 1)] for i in range(len(source) + 1)]
    for i, old in enumerate(source):
        for j, new in enumerate(edited):
            pair = score[i][j] + (match if old == new else mismatch)
            score[i + 1][j + 1] = max(pair, score[i][j + 1] + gap, score[i + 1][j] + gap)
    return score
