"""A text-to-image network as the denoiser of picture pairs: Prompt-to-Prompt, batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..networks.attention import AttentionCall, KeyValue, Sharing, attend, project_text
from ..networks.conditioning import TextEmbedding
from ..networks.denoiser import Times, denoised_from, fused_for, input_scale, predict
from ..networks.model import Model
from .cross_attention import CrossControl
from .plan import PairPlan, sharing_rows

__all__ = ["PairConditioning", "PairDenoiser"]

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


@dataclass(frozen=True, eq=False)
class _Batch:
    """What a batch of the network is told, for all pictures or for the sources alone."""

    keys: list[KeyValue]
    pooled: Tensor | None
    size_ids: Tensor | None
    scale: Tensor
    """w of each picture, (B, 1, 1, 1)."""


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A condition laid out for a walk, on the device before its first step."""

    cond: PairConditioning
    plan: PairPlan
    sharing: dict[tuple[bool, ...], Sharing | None]
    batches: dict[str, _Batch]
    fused: Any
    """The self-attentions' projections (``fused_for``)."""


class PairDenoiser:
    """A text-to-image UNet on pairs, with the paper's self-attention sharing and single-scale guidance.

    x is (2B, 4, h, w): source, edited, source, edited, ... Both pictures of a pair must start from one noise.
    """

    def __init__(self, model: Model, sigmas: Sequence[float] | Tensor, cross: CrossControl | None = None) -> None:
        """``sigmas`` are all noise levels of the walk: which step a call belongs to follows from its sigma."""
        self.evaluations = 0
        """Evaluations of the network so far, per pair."""
        self._model, self._cross = model, cross or CrossControl()
        self._sigmas = [float(sigma) for sigma in sigmas]
        self._times = Times(model, self._sigmas)
        self._prepared: _Prepared | None = None

    def __call__(self, x: Tensor, sigma: float, cond: PairConditioning) -> Tensor:
        prepared = self._prepared
        if prepared is None or prepared.cond is not cond:
            prepared = self._prepared = self._prepare(cond, x)
        now = prepared.plan.step(sigma)
        # Until the edited caption starts, both pictures of a pair are one: it is computed once.
        if now.early:
            call = AttentionCall(texts=prepared.batches[SOURCES].keys, fused=prepared.fused)
            self.evaluations += 2
            return self._guided(prepared.batches[SOURCES], call, x[::2], sigma).repeat_interleave(2, dim=0)
        batch, sharing = prepared.batches[PAIRS], prepared.sharing[now.active]
        call = AttentionCall(texts=batch.keys, sharing=sharing, mix=now.mix or attend, fused=prepared.fused)
        self.evaluations += 4
        return self._guided(batch, call, x, sigma)

    def _prepare(self, cond: PairConditioning, x: Tensor) -> _Prepared:
        """Project the texts, and lay everything out, once for the whole walk."""
        plan = PairPlan(
            sigmas=self._sigmas,
            p2p_thresholds=cond.p2p_thresholds,
            edited_prompt_start=cond.edited_prompt_start,
            cross_steps=cond.cross_steps,
            cross=self._cross,
        )
        patterns = {plan.step(sigma).active for sigma in self._sigmas[:-1]}
        fixed = self._model.turn is not None
        sharing = {active: Sharing.of(sharing_rows(active), x.device, fixed=fixed) for active in patterns}
        names = (PAIRS, SOURCES) if cond.edited_prompt_start > 0 else (PAIRS,)
        batches = {name: self._batch(name, cond, x) for name in names}
        return _Prepared(cond, plan, sharing, batches, fused_for(self._model))

    def _batch(self, name: str, cond: PairConditioning, x: Tensor) -> _Batch:
        rows = cond.rows(name)
        size_ids = None if cond.size_ids is None else cond.size_ids.expand(len(rows), -1)
        keys = project_text(self._model.unet, cond.texts.tokens.to(self._model.dtype), rows)
        pictures = len(rows) // 2 // len(cond.cfg)
        scale = torch.tensor(cond.cfg, dtype=x.dtype, device=x.device).repeat_interleave(pictures)
        return _Batch(keys, cond.texts.rows(rows).pooled, size_ids, scale[:, None, None, None])

    def _guided(self, batch: _Batch, call: AttentionCall, x: Tensor, sigma: float) -> Tensor:
        """u + w (c - u) for all pictures or for the sources, as the clean latent."""
        inputs = (x * input_scale(sigma)).repeat(2, 1, 1, 1)
        t = self._times.at(sigma, x.device)
        times = self._times.projected(sigma) if call.fused else None
        output = predict(self._model, inputs, t, call, batch.pooled, batch.size_ids, times=times)
        empty, text = output.chunk(2)
        guided = empty + batch.scale * (text - empty)
        return denoised_from(self._model.spec.prediction, x, sigma, guided)
