"""Which pairs are the test split, on which ``ip2p evaluate`` measures: one in twenty, by a hash, whatever their order.

captions  one caption in twenty, by its text (as in stores of 0.1); pairs without a caption are of no split
pictures  one source picture in twenty, where there are no captions; near-equal pictures and the turns of a session
          are of one side
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import Image

from ..captions.edits import TEST_PERCENT, in_test_split
from ..errors import DatasetError
from ..images import encoded
from .parquet import numbered

__all__ = ["CAPTIONS", "PICTURES", "near_groups", "picture_hash", "test_rows"]

CAPTIONS, PICTURES = "captions", "pictures"
NEAR, BANDS, FLATTEST, COMPARED_AT_ONCE = 3, 4, 6, 64


def test_rows(pairs: Any, captions: Sequence[str]) -> tuple[str, list[int]]:
    """(the rule that decides, the rows of the test split) of pairs and the captions of their source pictures."""
    if any(caption.strip() for caption in captions):
        return CAPTIONS, [row for row, caption in enumerate(captions) if in_test_split(caption)]
    return PICTURES, _by_pictures(pairs)


def _by_pictures(pairs: Any) -> list[int]:
    hashes: list[int | None] = [None] * len(pairs)
    sessions: list[str | None] = [None] * len(pairs)
    for row, found in numbered(pairs.outcomes() if hasattr(pairs, "outcomes") else pairs):
        if not isinstance(found, DatasetError):
            hashes[row], sessions[row] = picture_hash(found.original_image), found.session
    groups = near_groups(hashes, sessions)
    return [row for row, group in enumerate(groups) if hashes[row] is not None and _is_test(group)]


def _is_test(group: int) -> bool:
    return zlib.crc32(group.to_bytes(8, "big")) % 100 < TEST_PERCENT


def picture_hash(data: bytes) -> int | None:
    """64 bits that near-equal pictures nearly share (dHash); of a flat picture, and of none, bits of its bytes."""
    try:
        with encoded(data) as picture:
            picture.draft("L", (72, 64))
            small = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    except Exception:  # decoders raise nearly every class of exception on broken data
        return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
    bits = small[:, 1:] > small[:, :-1] + 1
    if bits.sum() < FLATTEST:
        return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_groups(hashes: Sequence[int | None], sessions: Sequence[str | None] = ()) -> list[int]:
    """Of each picture the least hash of those that it is near to, by up to 3 of 64 bits or by its session."""
    least: dict[int, int] = {}

    def root(one: int) -> int:
        while least[one] != one:
            least[one] = least[least[one]]
            one = least[one]
        return one

    def join(one: int, other: int) -> None:
        low, high = sorted((root(one), root(other)))
        least[high] = low

    unique = sorted({one for one in hashes if one is not None})
    least.update((one, one) for one in unique)
    for one, other in _near_pairs(unique):
        join(one, other)
    first: dict[str, int] = {}
    for known, session in zip(hashes, sessions, strict=False):
        if session is not None and known is not None:
            join(first.setdefault(session, known), known)
    return [0 if one is None else root(one) for one in hashes]


def _near_pairs(unique: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Hashes that differ in at most three bits share one of four bands, so only those are compared."""
    values, width = np.array(unique, dtype=np.uint64), 64 // BANDS
    for band in range(BANDS):
        keys = (values >> np.uint64(band * width)) & np.uint64(2**width - 1)
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[order])) + 1
        for bucket in np.split(values[order], cuts):
            yield from _near_within(bucket)


def _near_within(bucket: Any) -> Iterable[tuple[int, int]]:
    for start in range(0, len(bucket) - 1, COMPARED_AT_ONCE):
        some = bucket[start : start + COMPARED_AT_ONCE]
        differing = (some[:, None] ^ bucket[None, start:])[..., None].view(np.uint8)
        distance = np.unpackbits(differing, axis=-1).sum(axis=-1)
        for n, m in np.argwhere(distance <= NEAR):
            if n < m:
                yield int(some[n]), int(bucket[start + m])
