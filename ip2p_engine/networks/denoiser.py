"""Networks as denoisers: one contract, denoiser(x, sigma, cond) -> denoised.

``BranchDenoiser`` gives the branches of a step by name, and guidance is a denoiser over it (diffusion/guidance.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.report import ACTIVATIONS_PER_PIXEL
from ..devices import free_memory
from .attention import AttentionCall, project_text
from .conditioning import Conditioning, even
from .control import Control
from .feature_cache import FeatureCache
from .model import Model

__all__ = ["BranchDenoiser", "Times", "denoised_from", "input_scale", "predict"]

WITH_TEXT, WITH_IMAGE = ("c", "t"), ("c", "i")


def input_scale(sigma: float) -> float:
    """c_in = 1 / sqrt(sigma^2 + 1): the network sees unit variance (Karras et al. 2022, table 1)."""
    return 1 / math.sqrt(sigma**2 + 1)


def denoised_from(prediction: str, x: Tensor, sigma: float, output: Tensor) -> Tensor:
    """The clean latent that a network's output means.

    eps: x - sigma eps. v: x / (sigma^2 + 1) - v sigma / sqrt(sigma^2 + 1) (Salimans & Ho 2022, appendix D, in the
    variance-exploding scale of x).
    """
    if prediction == "eps":
        return x - sigma * output
    return x / (sigma**2 + 1) - output * (sigma / math.sqrt(sigma**2 + 1))


def predict(
    model: Model,
    inputs: Tensor,
    t: Tensor,
    call: AttentionCall,
    pooled: Tensor | None = None,
    size_ids: Tensor | None = None,
    cache: FeatureCache | None = None,
    control: Controlled | None = None,
) -> Tensor:
    """The UNet's output for inputs (B, C, h, w) that are scaled already, at time t (1,); the one place of casts.

    ``pooled`` (B, width) and ``size_ids`` (B, 6) are SDXL's. A ``cache`` computes what it has not. Returns the inputs'
    type.
    """
    added = None
    if size_ids is not None and pooled is not None:
        added = {"text_embeds": pooled.to(model.dtype), "time_ids": size_ids}
    told = {"call": call}
    rows = t.expand(len(inputs))
    networks = (model.unet,) if control is None else (model.unet, control.by.net.network)
    with model.running(*networks), model.turn or nullcontext():
        given: dict[str, Any] = {}
        if control is not None:
            given = control.by.residuals(inputs[:, :4].to(model.dtype), rows, control.text, added)
        if cache is not None:
            return cache(model.unet, inputs.to(model.dtype), rows, call, added).to(inputs.dtype)
        if model.turn is not None:
            torch.compiler.cudagraph_mark_step_begin()
        output = model.unet(
            inputs.to(model.dtype), rows, None, added_cond_kwargs=added, cross_attention_kwargs=told, **given
        )
        # The next call of a CUDA graph writes where this one has written.
        return output.sample.to(inputs.dtype, copy=model.turn is not None)


@dataclass(frozen=True, eq=False)
class Controlled:
    """What controls a call, and its texts (B, tokens, width), which a ControlNet reads too."""

    by: Control
    text: Tensor


class Times:
    """The times t of a walk's noise levels, on the device before its first step, so that no step waits for them."""

    def __init__(self, model: Model, sigmas: Sequence[float] = ()) -> None:
        self._model, self._levels = model, [float(sigma) for sigma in sigmas if sigma > 0]
        self._rows: dict[float, Tensor] = {}

    def at(self, sigma: float, device: torch.device) -> Tensor:
        """t of a noise level, (1,), float32; a level that was not announced is brought over alone."""
        if not self._rows and self._levels:
            every = torch.cat([self._model.timestep(level) for level in self._levels]).to(device)
            self._rows = dict(zip(self._levels, every.split(1), strict=True))
        row = self._rows.get(sigma)
        return self._model.timestep(sigma).to(device) if row is None else row


@dataclass(frozen=True, eq=False)
class _Group:
    """Branches that go through the network together, and what they are told, ready for a whole walk."""

    names: tuple[str, ...]
    call: AttentionCall
    image: Tensor
    pooled: Tensor | None
    size_ids: Tensor | None
    cache: FeatureCache | None
    control: Controlled | None


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A condition's branches, as a walk asks for them."""

    cond: Conditioning
    names: tuple[str, ...]
    groups: list[_Group]


class BranchDenoiser:
    """The branches of a step: c (text and image), i (image alone), u (neither), t (text alone).

    What it keeps between calls is its own: two of one model can be nested, or run in two threads.
    """

    def __init__(
        self, model: Model, *, together: bool | None = None, sigmas: Sequence[float] = (), feature_cache: int = 1
    ) -> None:
        """``together``: all branches in one batch, or one after another; None decides by free memory.

        ``sigmas``: noise levels that will be asked for, if they are known; others are answered too. Deep features are
        kept for ``feature_cache`` evaluations; 1 keeps none.
        """
        self.evaluations = 0
        """Evaluations of the network so far, per sample."""
        self._model, self._together, self._keep = model, together, feature_cache
        self._times = Times(model, sigmas)
        self._prepared: _Prepared | None = None

    def __call__(self, x: Tensor, sigma: float, cond: Conditioning, names: Sequence[str]) -> dict[str, Tensor]:
        """Clean latents (B, C, h, w) of the named branches, for x at noise level sigma."""
        wanted = tuple(names)
        prepared = self._prepared
        if prepared is None or prepared.cond is not cond or prepared.names != wanted:
            prepared = self._prepared = self._prepare(cond, x, wanted)
        self.evaluations += len(wanted)
        parts = [self._evaluate(group, x, sigma) for group in prepared.groups]
        return dict(zip(wanted, (branch for part in parts for branch in part), strict=True))

    def _prepare(self, cond: Conditioning, x: Tensor, names: tuple[str, ...]) -> _Prepared:
        """Project the texts, and lay everything out, once for the whole walk."""
        together = self._together
        if together is None:
            together = _activation_bytes(self._model, x) * len(names) < 0.6 * free_memory(x.device)
        groups = [names] if together else [(name,) for name in names]
        return _Prepared(cond, names, [self._group(group, cond, x.dtype) for group in groups])

    def _group(self, names: tuple[str, ...], cond: Conditioning, dtype: torch.dtype) -> _Group:
        null = cond.null_text.rows([0] * len(cond.image))
        texts = [cond.text if name in WITH_TEXT else null for name in names]
        blank = torch.zeros_like(cond.image)
        pooled = [text.pooled for text in texts if text.pooled is not None]
        context = torch.cat(even([text.tokens for text in texts])).to(self._model.dtype)
        with self._model.running(self._model.unet):
            keys = project_text(self._model.unet, context)
        return _Group(
            names,
            AttentionCall(texts=keys),
            torch.cat([cond.image if name in WITH_IMAGE else blank for name in names]).to(dtype),
            torch.cat(pooled) if pooled else None,
            None if cond.size_ids is None else cond.size_ids.repeat(len(names), 1),
            FeatureCache(self._keep) if self._keep > 1 else None,
            # ComfyUI's Apply ControlNet on both conditions: every branch sees it, whichever is made of them.
            None if cond.control is None else Controlled(cond.control.repeated(len(names)), context),
        )

    def _evaluate(self, group: _Group, x: Tensor, sigma: float) -> tuple[Tensor, ...]:
        """The clean latents of some branches, stacked along the batch for the network."""
        noisy = (x * input_scale(sigma)).repeat(len(group.names), 1, 1, 1)
        inputs, t = torch.cat([noisy, group.image], dim=1), self._times.at(sigma, x.device)
        output = predict(self._model, inputs, t, group.call, group.pooled, group.size_ids, group.cache, group.control)
        output = output.unflatten(0, (len(group.names), -1))
        return denoised_from(self._model.spec.prediction, x, sigma, output).unbind()


def _activation_bytes(model: Model, x: Tensor) -> int:
    """A generous estimate of one branch's peak activations: so many copies of the widest feature map."""
    width = model.unet.config.block_out_channels[0]
    return x.shape[0] * x.shape[-1] * x.shape[-2] * width * ACTIVATIONS_PER_PIXEL * model.dtype.itemsize
