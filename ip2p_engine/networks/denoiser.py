"""Networks as denoisers: one contract, denoiser(x, sigma, cond) -> denoised.

``BranchDenoiser`` gives the branches of a step by name, and guidance is a denoiser over it (diffusion/guidance.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import free_memory
from .attention import AttentionCall, KeyValue, project_text
from .conditioning import Conditioning, TextEmbedding
from .model import Model

__all__ = ["ACTIVATIONS_PER_PIXEL", "BranchDenoiser", "denoised_from", "input_scale", "predict"]

ACTIVATIONS_PER_PIXEL = 60
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
    sigma: float,
    call: AttentionCall,
    pooled: Tensor | None = None,
    size_ids: Tensor | None = None,
) -> Tensor:
    """The UNet's output for inputs (B, C, h, w) that are scaled already; the one place where casts happen.

    ``pooled`` (B, width) and ``size_ids`` (B, 6) are SDXL's. Returns the inputs' type.
    """
    t = model.timestep(sigma).to(inputs.device).expand(len(inputs))
    added = None
    if size_ids is not None and pooled is not None:
        added = {"text_embeds": pooled.to(model.dtype), "time_ids": size_ids}
    told = {"call": call}
    output = model.unet(inputs.to(model.dtype), t, None, added_cond_kwargs=added, cross_attention_kwargs=told)
    return output.sample.to(inputs.dtype)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Texts projected for a walk: for some branches together, or for each alone."""

    cond: Conditioning
    names: tuple[str, ...]
    groups: dict[tuple[str, ...], list[KeyValue]]


class BranchDenoiser:
    """The branches of a step: c (text and image), i (image alone), u (neither), t (text alone).

    What it keeps between calls is its own: two of one model can be nested, or run in two threads.
    """

    def __init__(self, model: Model, *, together: bool | None = None) -> None:
        """``together``: all branches in one batch, or one after another; None decides by free memory."""
        self.evaluations = 0
        """Evaluations of the network so far, per sample."""
        self._model, self._together = model, together
        self._prepared: _Prepared | None = None

    def __call__(self, x: Tensor, sigma: float, cond: Conditioning, names: Sequence[str]) -> dict[str, Tensor]:
        """Clean latents (B, C, h, w) of the named branches, for x at noise level sigma."""
        wanted = tuple(names)
        prepared = self._prepared
        if prepared is None or prepared.cond is not cond or prepared.names != wanted:
            prepared = self._prepared = self._prepare(cond, x, wanted)
        self.evaluations += len(wanted)
        parts = [self._evaluate(group, keys, x, sigma, cond) for group, keys in prepared.groups.items()]
        return dict(zip(wanted, (branch for part in parts for branch in part), strict=True))

    def _prepare(self, cond: Conditioning, x: Tensor, names: tuple[str, ...]) -> _Prepared:
        """Project the texts once for the whole walk."""
        together = self._together
        if together is None:
            together = _activation_bytes(self._model, x) * len(names) < 0.6 * free_memory(x.device)
        groups = [names] if together else [(name,) for name in names]
        contexts = [torch.cat([_text_of(name, cond).tokens for name in group]) for group in groups]
        unet, dtype = self._model.unet, self._model.dtype
        keys = [project_text(unet, context.to(dtype)) for context in contexts]
        return _Prepared(cond, names, dict(zip(groups, keys, strict=True)))

    def _evaluate(
        self, names: tuple[str, ...], keys: list[KeyValue], x: Tensor, sigma: float, cond: Conditioning
    ) -> tuple[Tensor, ...]:
        """The clean latents of some branches, stacked along the batch for the network."""
        noisy = (x * input_scale(sigma)).repeat(len(names), 1, 1, 1)
        image = torch.cat([cond.image if name in WITH_IMAGE else torch.zeros_like(cond.image) for name in names])
        pooled = [_text_of(name, cond).pooled for name in names]
        output = predict(
            self._model,
            torch.cat([noisy, image.to(noisy.dtype)], dim=1),
            sigma,
            AttentionCall(texts=keys),
            torch.cat([row for row in pooled if row is not None]) if cond.size_ids is not None else None,
            None if cond.size_ids is None else cond.size_ids.repeat(len(names), 1),
        )
        denoised = denoised_from(self._model.spec.prediction, x, sigma, output.unflatten(0, (len(names), -1)))
        return denoised.unbind()


def _activation_bytes(model: Model, x: Tensor) -> int:
    """A generous estimate of one branch's peak activations: so many copies of the widest feature map."""
    width = model.unet.config.block_out_channels[0]
    return x.shape[0] * x.shape[-1] * x.shape[-2] * width * ACTIVATIONS_PER_PIXEL * model.dtype.itemsize


def _text_of(branch: str, cond: Conditioning) -> TextEmbedding:
    return cond.text if branch in WITH_TEXT else cond.null_text.rows([0] * len(cond.image))
