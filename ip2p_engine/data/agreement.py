"""Do a pair's pictures differ as its instruction makes others of the set differ? By the set's own pairs and a CLIP.

The change of CLIP's image features is predicted from the words and from the picture before, by kernel ridge regression
on other pairs than the one that is asked about; pairs that fit badly count little in the next round. What is measured
is the cosine of the predicted change and the true one: about -1 where the pictures are swapped, about 0 where the
instruction is another's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["FEWEST", "agreement"]

FEWEST, MOST, FOLDS, ROUNDS, RIDGE = 100, 2000, 10, 2, 0.05
ANSWERED_AT_ONCE, MOST_WORDS = 512, 4000


def agreement(before: Any, after: Any, texts: Sequence[str], *, seed: int = 0) -> Any:
    """Cosines (n,) in -1..1 of features (n, d) before and after and the texts between them; at least 100 pairs.

    Of a large set 2,000 pairs, drawn from the seed, are what all are compared with.
    """
    draw = np.random.default_rng(seed)
    before, after = (_unit(np.asarray(one, dtype=np.float64)) for one in (before, after))
    change = after - before
    words = _words(texts)
    known = np.sort(draw.permutation(len(texts))[:MOST])
    place = _unit(before - before[known].mean(axis=0))
    fold, weights, score = draw.integers(0, FOLDS, len(texts)), np.ones(len(known)), np.zeros(len(texts))
    kernel = _kernel(words[known], place[known], words[known], place[known])
    for turn in range(ROUNDS + 1):
        for part in range(FOLDS):
            learned = np.flatnonzero(fold[known] != part)
            square = kernel[np.ix_(learned, learned)] + RIDGE * np.diag(1 / weights[learned])
            answer = np.linalg.solve(square, change[known[learned]])
            wanted = known if turn < ROUNDS else np.arange(len(texts))
            wanted = wanted[fold[wanted] == part]
            for start in range(0, len(wanted), ANSWERED_AT_ONCE):
                some, base = wanted[start : start + ANSWERED_AT_ONCE], known[learned]
                found = _kernel(words[some], place[some], words[base], place[base]) @ answer
                score[some] = (_unit(found) * _unit(change[some])).sum(axis=1)
        weights = np.clip((score[known] - 0.2) / 0.4, 0.02, 1)
    return score


def _kernel(words: Any, place: Any, other_words: Any, other_place: Any) -> Any:
    """Alike are the same words, the more so in like pictures."""
    return np.maximum(words @ other_words.T, 0) ** 1.5 * (0.2 + np.exp(place @ other_place.T - 1))


def _words(texts: Sequence[str]) -> Any:
    """Unit rows of the words, pairs of words, and texts that are there at least twice; the rarer the heavier."""
    parts = []
    for text in texts:
        words = text.split()
        parts.append({*words, *map(" ".join, zip(words, words[1:], strict=False)), text})
    counts = Counter(one for part in parts for one in part)
    column = {one: n for n, (one, count) in enumerate(counts.most_common(MOST_WORDS)) if count > 1}
    found = np.zeros((len(texts), max(1, len(column))), dtype=np.float32)
    for row, part in enumerate(parts):
        for one in part & column.keys():
            found[row, column[one]] = np.log(len(texts) / counts[one])
    return _unit(found)


def _unit(rows: Any) -> Any:
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9)
