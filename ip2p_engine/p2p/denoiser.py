"""A text-to-image network as the denoiser of picture pairs: Prompt-to-Prompt, batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.schedule import step_of
from ..networks.attention import SelfSharing, TextKeys, p2p_active, self_sharing, sharing_rows, text_keys
from ..networks.conditioning import TextEmbedding
from ..networks.denoiser import denoised_from, input_scale
from ..networks.model import Model
from .cross_attention import CrossControl

__all__ = ["PairConditioning", "PairDenoiser", "pair_denoiser"]

PAIRS, SOURCES = "pairs", "sources"


@dataclass(frozen=True, kw_only=True)
class PairConditioning:
    """The texts and the settings of B pairs; no pair's depend on another's."""

    texts: TextEmbedding
    """Distinct texts; row 0 is the empty one."""
    source_rows: tuple[int, ...]
    """Each pair's caption, a row of ``texts``."""
    edited_rows: tuple[int, ...]
    """Each pair's edited caption."""
    p2p_thresholds: tuple[float, ...]
    """p of each pair: self-attention is shared while p > i / (n - 1)."""
    cfg: tuple[float, ...]
    """w of each pair: u + w (c - u)."""
    edited_prompt_start: float = 0.0
    """The fraction of the steps in which the edited picture still follows the source's caption."""
    cross_steps: float = 0.0
    """The fraction of the steps in which cross-attention maps are edited."""
    size_ids: Tensor | None = None
    """SDXL's six numbers, (1, 6)."""

    def rows(self, name: str) -> list[int]:
        """The text row of each row of a network batch: [no text, text] blocks of all pictures or of the sources."""
        both = zip(self.source_rows, self.edited_rows, strict=True)
        block = list(self.source_rows) if name == SOURCES else [row for pair in both for row in pair]
        return [0] * len(block) + block


class PairDenoiser:
    """A text-to-image UNet on pairs, with the paper's self-attention sharing and single-scale guidance.

    x is (2B, 4, h, w): source, edited, source, edited, ... Both pictures of a pair must start from one noise.
    """

    def __init__(
        self, model: Model, keys: TextKeys, sharing: SelfSharing, sigmas: Sequence[float], cross: CrossControl
    ) -> None:
        """``sigmas`` are all noise levels of the walk: which step a call belongs to follows from its sigma."""
        self.evaluations = 0
        self._model, self._keys, self._sharing, self._cross = model, keys, sharing, cross
        self._sigmas = [float(sigma) for sigma in sigmas]
        self._prepared: PairConditioning | None = None

    def __call__(self, x: Tensor, sigma: float, cond: PairConditioning) -> Tensor:
        if cond is not self._prepared:
            self._prepare(cond)
        step, steps = step_of(sigma, self._sigmas), len(self._sigmas) - 1
        # Until the edited caption starts, both pictures of a pair are one: it is computed once.
        if step < cond.edited_prompt_start * steps:
            self._sharing.use(None)
            self._cross.use(editing=False, watching=False)
            return self._guided(SOURCES, x[::2], sigma, cond).repeat_interleave(2, dim=0)
        active = [p2p_active(step, steps, threshold) for threshold in cond.p2p_thresholds]
        self._sharing.use(sharing_rows(active), x.device)
        self._cross.use(editing=step < cond.cross_steps * steps, watching=True)
        return self._guided(PAIRS, x, sigma, cond)

    def _prepare(self, cond: PairConditioning) -> None:
        """Project the texts once for the whole walk."""
        context = cond.texts.tokens.to(self._model.dtype)
        for name in (PAIRS, SOURCES) if cond.edited_prompt_start > 0 else (PAIRS,):
            self._keys.prepare(name, context, cond.rows(name))
        self._prepared = cond

    def _guided(self, name: str, x: Tensor, sigma: float, cond: PairConditioning) -> Tensor:
        """u + w (c - u) for all pictures or for the sources, as the clean latent."""
        model = self._model
        inputs = (x * input_scale(sigma)).to(model.dtype).repeat(2, 1, 1, 1)
        t = model.timestep(sigma).to(x.device).expand(len(inputs))
        self._keys.use(name)
        added = _added_conditions(cond, cond.rows(name), model.dtype)
        output = model.unet(inputs, t, encoder_hidden_states=None, added_cond_kwargs=added).sample.to(x.dtype)
        self.evaluations += len(inputs) // len(cond.cfg)
        empty, text = output.chunk(2)
        scale = torch.tensor(cond.cfg, dtype=x.dtype, device=x.device).repeat_interleave(len(x) // len(cond.cfg))
        guided = empty + scale[:, None, None, None] * (text - empty)
        return denoised_from(model.spec.prediction, x, sigma, guided)


@contextmanager
def pair_denoiser(
    model: Model, sigmas: Sequence[float] | Tensor, cross: CrossControl | None = None
) -> Iterator[PairDenoiser]:
    """A PairDenoiser for the length of a with-block; the model is as before afterwards."""
    control = cross or CrossControl()
    with text_keys(model.unet, control.layer()) as keys, self_sharing(model.unet) as sharing:
        yield PairDenoiser(model, keys, sharing, [float(sigma) for sigma in sigmas], control)


def _added_conditions(cond: PairConditioning, rows: list[int], dtype: torch.dtype) -> dict[str, Tensor] | None:
    pooled = cond.texts.rows(rows).pooled
    if cond.size_ids is None or pooled is None:
        return None
    return {"text_embeds": pooled.to(dtype), "time_ids": cond.size_ids.expand(len(rows), -1)}
