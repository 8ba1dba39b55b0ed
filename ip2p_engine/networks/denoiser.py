"""Networks as denoisers: one contract, denoiser(x, sigma, cond) -> denoised."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..diffusion.guidance import check_scale, dual_guidance, needed_branches
from .attention import TextKeys, text_keys
from .conditioning import Conditioning, TextEmbedding
from .model import Model

__all__ = ["GuidedDenoiser", "denoised_from", "free_memory", "guided_denoiser", "input_scale"]

ACTIVATIONS_PER_PIXEL = 60
TOGETHER = "together"


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


class GuidedDenoiser:
    """A checkpoint's UNet under dual guidance; counts its evaluations per sample.

    Casts and moves happen here and nowhere else: x stays float32, the network runs in its own type.
    """

    def __init__(
        self, model: Model, keys: TextKeys, text_cfg: float, image_cfg: float, *, together: bool | None = None
    ) -> None:
        """``together``: all branches in one batch, or one after another; None decides by free memory."""
        self.text_cfg, self.image_cfg = check_scale("text_cfg", text_cfg), check_scale("image_cfg", image_cfg)
        self.evaluations = 0
        self._model, self._keys, self._together = model, keys, together
        self._branches = needed_branches(self.text_cfg, self.image_cfg)
        self._prepared: Conditioning | None = None

    def __call__(self, x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        if cond is not self._prepared:
            self._prepare(cond, x)
        self.evaluations += len(self._branches)
        if self._together:
            outputs = list(self._evaluate(TOGETHER, self._branches, x, sigma, cond).chunk(len(self._branches)))
        else:
            outputs = [self._evaluate(name, (name,), x, sigma, cond) for name in self._branches]
        guided = dual_guidance(dict(zip(self._branches, outputs, strict=True)), self.text_cfg, self.image_cfg)
        return denoised_from(self._model.spec.prediction, x, sigma, guided)

    def _prepare(self, cond: Conditioning, x: Tensor) -> None:
        """Project the texts once for the whole walk."""
        if self._together is None:
            self._together = _activation_bytes(self._model, x) * len(self._branches) < 0.6 * free_memory(x.device)
        groups = {TOGETHER: self._branches} if self._together else {name: (name,) for name in self._branches}
        for name, branches in groups.items():
            context = torch.cat([_text_of(branch, cond).tokens for branch in branches])
            self._keys.prepare(name, context.to(self._model.dtype))
        self._prepared = cond

    def _evaluate(self, name: str, branches: tuple[str, ...], x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        """The network's output for some branches, stacked along the batch, in x's type."""
        model, count = self._model, len(branches)
        noisy = (x * input_scale(sigma)).repeat(count, 1, 1, 1)
        image = torch.cat([cond.image if branch != "u" else torch.zeros_like(cond.image) for branch in branches])
        inputs = torch.cat([noisy.to(image.dtype), image], dim=1).to(model.dtype)
        t = model.timestep(sigma).to(x.device).expand(len(inputs))
        self._keys.use(name)
        added = _added_conditions(branches, cond, model.dtype)
        return model.unet(inputs, t, encoder_hidden_states=None, added_cond_kwargs=added).sample.to(x.dtype)


@contextmanager
def guided_denoiser(
    model: Model, text_cfg: float, image_cfg: float, *, together: bool | None = None
) -> Iterator[GuidedDenoiser]:
    """A GuidedDenoiser for the length of a with-block; the model is as before afterwards."""
    with text_keys(model.unet) as keys:
        yield GuidedDenoiser(model, keys, text_cfg, image_cfg, together=together)


def free_memory(device: torch.device) -> int:
    """Bytes that a computation on the device may still use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * 2**30


def _activation_bytes(model: Model, x: Tensor) -> int:
    """A generous estimate of one branch's peak activations: so many copies of the widest feature map."""
    width = model.unet.config.block_out_channels[0]
    return x.shape[0] * x.shape[-1] * x.shape[-2] * width * ACTIVATIONS_PER_PIXEL * model.dtype.itemsize


def _text_of(branch: str, cond: Conditioning) -> TextEmbedding:
    return cond.text if branch == "c" else cond.null_text.rows([0] * len(cond.image))


def _added_conditions(branches: tuple[str, ...], cond: Conditioning, dtype: torch.dtype) -> dict[str, Tensor] | None:
    if cond.size_ids is None:
        return None
    rows = [_text_of(branch, cond).pooled for branch in branches]
    pooled = torch.cat([row for row in rows if row is not None])
    return {"text_embeds": pooled.to(dtype), "time_ids": cond.size_ids.repeat(len(branches), 1)}
