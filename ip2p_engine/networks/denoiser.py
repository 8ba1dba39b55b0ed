"""Networks as denoisers: one contract, denoiser(x, sigma, cond) -> denoised.

``BranchDenoiser`` gives the branches of a step by name, and guidance is a denoiser over it (diffusion/guidance.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.report import ACTIVATIONS_PER_PIXEL
from ..devices import free_memory
from ..diffusion.guidance import Denoiser, Guidance, guidance_of
from ..errors import ConfigError
from .attention import AttentionCall, fused_projections, project_text, whole_blocks
from .conditioning import Conditioning, even
from .control import Control
from .feature_cache import FeatureCache
from .forward import TimeRows, forward, is_plain, project_times
from .model import Model
from .scales import scales_embedding

__all__ = ["BranchDenoiser", "Times", "denoised_from", "fused_for", "input_scale", "predict"]

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
    *,
    times: TimeRows | None = None,
    cache: FeatureCache | None = None,
    control: Controlled | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """The UNet's output for inputs (B, C, h, w) that are scaled already, at time t (1,); the one place of casts.

    ``pooled`` (B, width) and ``size_ids`` (B, 6) are SDXL's, ``scales`` (1, width) of a network that takes them.
    ``times`` is t as it was projected before, with the scales. A ``cache`` computes what it has not. Returns the
    inputs' type.
    """
    added = None
    if size_ids is not None and pooled is not None:
        added = {"text_embeds": pooled.to(model.dtype), "time_ids": size_ids}
    rows, x = t.expand(len(inputs)), inputs.to(model.dtype)
    networks = (model.unet,) if control is None else (model.unet, control.by.net.network)
    with model.running(*networks), model.turn or nullcontext():
        residuals = None
        if control is not None:
            residuals = control.by.residuals(x[:, :4], rows, control.text, added)
        if call.fused is None or torch.is_grad_enabled():
            output = _by_diffusers(model, x, rows, call, added, residuals, scales)
            return output.to(inputs.dtype, copy=model.turn is not None)
        if times is None:
            times = project_times(model.unet, t if added is None else rows, added, scales)
        if cache is not None:
            return cache(model.unet, x, times, call).to(inputs.dtype)
        return forward(model.unet, x, times, call, residuals=residuals)[0].to(inputs.dtype)


def _by_diffusers(
    model: Model,
    x: Tensor,
    t: Tensor,
    call: AttentionCall,
    added: dict[str, Tensor] | None,
    residuals: tuple[Sequence[Tensor], Tensor] | None,
    scales: Tensor | None,
) -> Tensor:
    """The network's own evaluation; where it is compiled, the next call may write where this one has written."""
    given: dict[str, Any] = {"timestep_cond": scales}
    if residuals is not None:
        given |= {"down_block_additional_residuals": residuals[0], "mid_block_additional_residual": residuals[1]}
    if model.turn is not None:
        torch.compiler.cudagraph_mark_step_begin()
    told = {"call": call}
    return model.unet(x, t, None, added_cond_kwargs=added, cross_attention_kwargs=told, **given).sample


def fused_for(model: Model) -> Any:
    """``AttentionCall.fused`` for a walk of this model; None where the network is compiled, or is not a plain one."""
    return fused_projections(model.unet) if model.turn is None and is_plain(model.unet) else None


@dataclass(frozen=True, eq=False)
class Controlled:
    """What controls a call, and its texts (B, tokens, width), which a ControlNet reads too."""

    by: Control
    text: Tensor


class Times:
    """The times t of a walk's noise levels, on the device before its first step, so that no step waits for them."""

    def __init__(self, model: Model, sigmas: Sequence[float] = (), scales: Tensor | None = None) -> None:
        """``scales`` (1, width) go with all of them, for a network that takes them."""
        self._model, self._levels = model, [float(sigma) for sigma in sigmas if sigma > 0]
        self.scales = scales
        self._rows: dict[float, Tensor] = {}
        self._projected: dict[float, TimeRows] = {}

    def at(self, sigma: float, device: torch.device) -> Tensor:
        """t of a noise level, (1,), float32; a level that was not announced is brought over alone."""
        if not self._rows and self._levels:
            every = torch.cat([self._model.timestep(level) for level in self._levels]).to(device)
            self._rows = dict(zip(self._levels, every.split(1), strict=True))
        row = self._rows.get(sigma)
        return self._model.timestep(sigma).to(device) if row is None else row

    def projected(self, sigma: float) -> TimeRows | None:
        """What the residual blocks add at an announced level, projected with all others; SDXL's differ by row: None.

        Asked after ``at``.
        """
        unet = self._model.unet
        if not self._projected and self._rows and not unet.config.addition_embed_type:
            with self._model.running(unet):
                found = project_times(unet, torch.cat(list(self._rows.values())), scales=self.scales)
            columns = {module: rows.split(1) for module, rows in found.items()}
            self._projected = {
                level: {module: rows[n] for module, rows in columns.items()} for n, level in enumerate(self._rows)
            }
        return self._projected.get(sigma)


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
        self,
        model: Model,
        *,
        together: bool | None = None,
        sigmas: Sequence[float] = (),
        feature_cache: int = 1,
        scales: tuple[float, float] | None = None,
    ) -> None:
        """``together``: all branches in one batch, or one after another; None decides by free memory.

        ``sigmas``: noise levels that will be asked for, if they are known; others are answered too. Deep features are
        kept for ``feature_cache`` evaluations; 1 keeps none. ``scales`` are s_T and s_I, for a network that takes them
        as inputs; None: those that it recommends.
        """
        self.evaluations = 0
        """Evaluations of the network so far, per sample."""
        self._model, self._together, self._keep = model, together, feature_cache
        self._times = Times(model, sigmas, _scales_of(model, scales))
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

    def guided(self, guidance: Guidance) -> Denoiser:
        """The denoiser under a guidance; of a network that takes its scales as inputs it is the branch c."""
        return guidance_of(1.0, 1.0)(self) if self._model.spec.scale_inputs else guidance(self)

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
            keys, mask = whole_blocks(project_text(self._model.unet, context))
            call = AttentionCall(texts=keys, mask=mask, fused=fused_for(self._model))
        if call.fused and names[:2] == WITH_IMAGE and self._begins_with_text and not pooled:
            call = replace(call, twins=len(cond.image))
        if self._keep > 1 and call.fused is None:
            raise ConfigError("features are kept of Stable Diffusion's own layers, not compiled; leave one of them out")
        return _Group(
            names,
            call,
            torch.cat([cond.image if name in WITH_IMAGE else blank for name in names]).to(dtype),
            torch.cat(pooled) if pooled else None,
            None if cond.size_ids is None else cond.size_ids.repeat(len(names), 1),
            FeatureCache(self._keep) if self._keep > 1 else None,
            # ComfyUI's Apply ControlNet on both conditions: every branch sees it, whichever is made of them.
            None if cond.control is None else Controlled(cond.control.repeated(len(names)), context),
        )

    @property
    def _begins_with_text(self) -> bool:
        """Whether the network's first layer attends to the text, as SD1's and SD2's do and SDXL's does not."""
        unet: Any = self._model.unet
        return getattr(unet.down_blocks[0], "has_cross_attention", False)

    def _evaluate(self, group: _Group, x: Tensor, sigma: float) -> tuple[Tensor, ...]:
        """The clean latents of some branches, stacked along the batch for the network."""
        noisy = (x * input_scale(sigma)).repeat(len(group.names), 1, 1, 1)
        inputs, t = torch.cat([noisy, group.image], dim=1), self._times.at(sigma, x.device)
        told = (group.call, group.pooled, group.size_ids)
        times = self._times.projected(sigma) if group.call.fused else None
        how: Any = {"cache": group.cache, "control": group.control, "scales": self._times.scales}
        output = predict(self._model, inputs, t, *told, times=times, **how)
        output = output.unflatten(0, (len(group.names), -1))
        return denoised_from(self._model.spec.prediction, x, sigma, output).unbind()


def _scales_of(model: Model, scales: tuple[float, float] | None) -> Tensor | None:
    """What a network that takes its scales is told of them, (1, width); None of others."""
    if not model.spec.scale_inputs:
        return None
    pair = torch.tensor([scales or (model.spec.text_cfg, model.spec.image_cfg)])
    return scales_embedding(pair, model.unet.config.time_cond_proj_dim).to(model.device, model.dtype)


def _activation_bytes(model: Model, x: Tensor) -> int:
    """A generous estimate of one branch's peak activations: so many copies of the widest feature map."""
    width = model.unet.config.block_out_channels[0]
    return x.shape[0] * x.shape[-1] * x.shape[-2] * width * ACTIVATIONS_PER_PIXEL * model.dtype.itemsize
