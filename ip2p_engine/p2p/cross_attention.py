"""Editing by cross-attention: replace, refine, reweight and local blend (Hertz et al. 2022, arXiv 2208.01626).

The source's attention to the words decides where the edited picture's words go. Only the maps onto the 77 tokens are
materialised, and only those of the text branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from ..errors import ConfigError
from ..networks.attention import attend
from ..tokenizer import MAX_TOKENS, token_chunks
from .alignment import changed_tokens, contains, refinement_map, replacement_map, tokens_of_words

__all__ = [
    "CROSS_MODES",
    "CrossControl",
    "CrossEdit",
    "CrossMix",
    "LocalBlend",
    "attention_map",
    "blend_mask",
    "blend_words",
    "control_of",
    "check_reweight",
    "cross_edit",
    "edit_map",
]

CROSS_MODES = ("replace", "refine")
BLEND_LEVEL = 2
BLEND_THRESHOLD = 0.3

CaptionPair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class CrossEdit:
    """How B edited pictures' maps follow from their sources': (M_src A + M_own own) scale."""

    mapping: Tensor
    """A, (B, 77, 77): from the source's tokens to the edited caption's."""
    own: Tensor
    """(B, 77): 1 where a token keeps its own map."""
    scale: Tensor
    """(B, 77): c of section 3.2, attention re-weighting."""

    def to(self, device: torch.device) -> CrossEdit:
        """The same on another device."""
        return CrossEdit(mapping=self.mapping.to(device), own=self.own.to(device), scale=self.scale.to(device))

    def rows(self, index: Sequence[int]) -> CrossEdit:
        """The edit of some of the pairs."""
        chosen = list(index)
        return CrossEdit(mapping=self.mapping[chosen], own=self.own[chosen], scale=self.scale[chosen])


def cross_edit(mode: str, pairs: Sequence[CaptionPair], reweight: Mapping[str, float] | None = None) -> CrossEdit:
    """The edit of (caption, edited caption) pairs: word swap (replace) or added phrases (refine), section 3.2.

    ``reweight`` multiplies the attention to words of the edited captions, of each to those that it has
    (``check_reweight``). Raises ConfigError for captions that do not suit the mode.
    """
    if mode not in CROSS_MODES:
        raise ConfigError(f"mode {mode!r} is unknown; choose one of {', '.join(CROSS_MODES)}")
    if mode == "replace":
        mapping = torch.stack([replacement_map(*pair) for pair in pairs])
        own = torch.zeros(mapping.shape[:2])
    else:
        maps = [refinement_map(*pair) for pair in pairs]
        mapping, own = (torch.stack([both[n] for both in maps]) for n in range(2))
    scale = torch.ones_like(own)
    for word, factor in (reweight or {}).items():
        for row, (_, edited) in enumerate(pairs):
            if contains(edited, word):
                scale[row, tokens_of_words(edited, word).bool()] *= factor
    return CrossEdit(mapping=mapping, own=own, scale=scale)


def check_reweight(reweight: Mapping[str, float] | None, edited: Sequence[str]) -> None:
    """Raises ConfigError for a word that no edited caption contains."""
    for word in reweight or ():
        if not any(contains(caption, word) for caption in edited):
            which = repr(edited[0]) if len(edited) == 1 else f"each of {len(edited)} edited captions"
            raise ConfigError(f"{which} does not contain {word!r}; name words as the captions have them")


def edit_map(source: Tensor, own: Tensor, edit: CrossEdit) -> Tensor:
    """(M_src A + M_own own) scale for maps (B, heads, places, 77); Hertz et al. (2022), section 3.2."""
    moved = source @ edit.mapping[:, None].to(source)
    return (moved + own * edit.own[:, None, None].to(own)) * edit.scale[:, None, None].to(own)


def attention_map(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) of (B, tokens, heads * d) tensors, (B, heads, places, tokens); float32 inside."""
    q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
    logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    return logits.softmax(-1, dtype=_wide(query)).to(query.dtype)


class LocalBlend:
    """Where the edit may change a picture: what the named words looked at, averaged over steps and layers."""

    def __init__(self, source_words: Tensor, edited_words: Tensor, latent: tuple[int, int], levels: int) -> None:
        """``source_words`` and ``edited_words`` mark tokens, (B, 77); ``latent`` is (h, w), ``levels`` the UNet's.

        The maps are read a quarter of the latent's size, 16 x 16 at 512 pixels as Hertz et al. do, or on the deepest
        level of a shallower network.
        """
        self._words, self._latent = (source_words, edited_words), latent
        shrink = 2 ** min(BLEND_LEVEL, levels - 1)
        self._size = (math.ceil(latent[0] / shrink), math.ceil(latent[1] / shrink))
        self._heat: list[Tensor] | None = None

    def rows(self, index: Sequence[int]) -> LocalBlend:
        """The blend of some of the pairs, with what it has seen of them."""
        chosen, few = list(index), copy(self)
        few._words = (self._words[0][chosen], self._words[1][chosen])
        few._heat = None if self._heat is None else [heat[chosen] for heat in self._heat]
        return few

    def watches(self, places: int) -> bool:
        """Whether a layer with so many places is one whose maps count."""
        return places == self._size[0] * self._size[1]

    def add(self, source: Tensor, edited: Tensor) -> None:
        """Add one layer's maps, (B, heads, places, 77)."""
        heat = [
            torch.einsum("bhpn,bn->bp", maps.to(_wide(maps)), words.to(maps.device, _wide(maps))).unflatten(
                1, self._size
            )
            for maps, words in zip((source, edited), self._words, strict=True)
        ]
        self._heat = heat if self._heat is None else [old + new for old, new in zip(self._heat, heat, strict=True)]

    def apply(self, x: Tensor) -> Tensor:
        """x (2B, C, h, w) in which the edited pictures differ from their sources inside the mask only, section 3.2."""
        if self._heat is None:
            return x
        inside = blend_mask(self._heat[0], self._latent) | blend_mask(self._heat[1], self._latent)
        source, edited = x[::2], x[1::2]
        return torch.stack([source, torch.where(inside.to(x.device), edited, source)], dim=1).flatten(0, 1)


def blend_mask(heat: Tensor, size: tuple[int, int]) -> Tensor:
    """Where a word's attention (B, h', w') exceeds 0.3 of its maximum, grown by a place: bool, (B, 1, h, w)."""
    grown = interpolate(max_pool2d(heat[:, None], 3, stride=1, padding=1), size)
    return grown > BLEND_THRESHOLD * grown.amax((2, 3), keepdim=True)


def blend_words(pairs: Sequence[CaptionPair], named: CaptionPair | None = None) -> tuple[Tensor, Tensor]:
    """(source, edited) marks (B, 77) of the named words, or of the words in which the captions differ.

    Raises ConfigError if there are none.
    """
    if named is not None:
        marks = [(tokens_of_words(a, named[0]), tokens_of_words(b, named[1])) for a, b in pairs]
    else:
        marks = [changed_tokens(a, b) for a, b in pairs]
        equal = [pair for pair, (old, new) in zip(pairs, marks, strict=True) if not (old.any() or new.any())]
        if equal:
            raise ConfigError(f"a local blend needs a change, and both captions are {equal[0][0]!r}; name blend_words")
    source, edited = zip(*marks, strict=True)
    return torch.stack(source), torch.stack(edited)


@dataclass(frozen=True, eq=False)
class CrossControl:
    """What is done to the cross-attention of a walk's pairs."""

    edit: CrossEdit | None = None
    blend: LocalBlend | None = None

    def rows(self, index: Sequence[int]) -> CrossControl:
        """The control of some of the pairs."""
        return CrossControl(self.edit and self.edit.rows(index), self.blend and self.blend.rows(index))

    def mix(self, *, editing: bool, watching: bool) -> CrossMix | None:
        """What cross-attention does in one call, if its maps are edited or collected for the blend; else None."""
        edit, blend = self.edit if editing else None, self.blend if watching else None
        return None if edit is None and blend is None else CrossMix(edit, blend)

    def after_step(self, start: float) -> Callable[[int, Tensor], Tensor] | None:
        """The local blend as what happens after step ``start`` and later ones of a walk; None without one."""
        blend = self.blend
        return None if blend is None else lambda step, x: blend.apply(x) if step >= start else x


@dataclass(frozen=True, eq=False)
class CrossMix:
    """Cross-attention in which the edited pictures' maps follow from their sources'; the same in both hosts."""

    edit: CrossEdit | None
    blend: LocalBlend | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, heads: int, text: slice | None = None) -> Tensor:
        """What attention to the texts gives, (B, places, width).

        ``text``: the rows of the text condition, [source, edited, source, edited, ...]; None is the second half of
        the batch. Only the edited ones among them change.
        """
        mixed = attend(query, key, value, heads)
        watching = self.blend is not None and self.blend.watches(query.shape[1])
        if self.edit is None and not watching:
            return mixed
        rows = text or slice(len(query) // 2, len(query))
        source, edited = slice(rows.start, rows.stop, 2), slice(rows.start + 1, rows.stop, 2)
        source_map = attention_map(query[source], key[source], heads)
        used = attention_map(query[edited], key[edited], heads)
        if self.edit is not None:
            used = edit_map(source_map, used, self.edit)
            values = value[edited].unflatten(-1, (heads, -1)).transpose(1, 2)
            mixed[edited] = (used @ values).transpose(1, 2).flatten(2)
        if self.blend is not None and watching:
            self.blend.add(source_map, used)
        return mixed


class CrossSettings(Protocol):
    """What a PairConfig says of cross-attention."""

    @property
    def mode(self) -> str: ...

    @property
    def reweight(self) -> dict[str, float] | None: ...

    @property
    def local_blend(self) -> bool: ...

    @property
    def blend_words(self) -> CaptionPair | None: ...


def control_of(
    config: CrossSettings, pairs: Sequence[CaptionPair], size: tuple[int, int], *, levels: int, device: torch.device
) -> CrossControl:
    """What a config does to the cross-attention of pairs of (width, height), in a UNet of so many levels.

    Raises ConfigError for captions that do not suit the mode.
    """
    if config.mode in CROSS_MODES or config.local_blend:
        for caption in {caption for pair in pairs for caption in pair}:
            _check_one_chunk(caption)
    edit = cross_edit(config.mode, pairs, config.reweight).to(device) if config.mode in CROSS_MODES else None
    if not config.local_blend:
        return CrossControl(edit)
    source, edited = (marks.to(device) for marks in blend_words(pairs, config.blend_words))
    return CrossControl(edit, LocalBlend(source, edited, (size[1] // 8, size[0] // 8), levels))


def _check_one_chunk(caption: str) -> None:
    if len(token_chunks(caption)) > 1:
        got = f"the caption {caption[:40]!r}... has more than {MAX_TOKENS - 2} tokens"
        raise ConfigError(f"{got}, and maps onto words have so many; shorten it, or use mode 'self' and no local blend")


def _wide(tensor: Tensor) -> torch.dtype:
    """At least float32: sums over many steps do not fit half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)
