"""The walk of a batch from noise to clean latents, the same for edits and for what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..diffusion.guidance import Guidance
from ..diffusion.mask import Masked
from ..diffusion.noise import SampleNoise
from ..diffusion.sampling import Sampler, sample
from ..errors import ConfigError
from ..hooks import Hooks
from .conditioning import Conditioning
from .denoiser import BranchDenoiser
from .model import Model

__all__ = ["walk"]


@torch.inference_mode()
def walk(
    model: Model,
    condition: Conditioning,
    seeds: Sequence[int],
    sigmas: Tensor,
    guidance: Guidance,
    *,
    sampler: str | Sampler = "euler_ancestral",
    start: Tensor | None = None,
    free: Tensor | None = None,
    kept: Tensor | None = None,
    together: bool | None = None,
    feature_cache: int = 1,
    scales: tuple[float, float] | None = None,
    hooks: Hooks | None = None,
) -> tuple[Tensor, int]:
    """(clean latents (B, 4, h, w), evaluations a sample) of a batch that walks down the sigmas.

    It begins at ``start`` (B, 4, h, w), or at zero, plus noise of sigmas[0]; each row has the noise of its seed. The
    condition's image may have no channels: then the model is one from text to image. Where the mask ``free``
    (B, 1, h, w) is 0 the clean latents are ``kept`` (B, 4, h, w). A network that takes s_T and s_I as inputs is told
    the ``scales``, and not guided.
    """
    if len(seeds) != len(condition.image):
        got = f"{len(seeds)} seeds for a condition of {len(condition.image)} rows"
        raise ConfigError(f"{got}; give one seed for each row")
    noise, branches = (
        SampleNoise(seeds),
        BranchDenoiser(model, together=together, sigmas=sigmas.tolist(), feature_cache=feature_cache, scales=scales),
    )
    blank = torch.zeros(len(seeds), 4, *condition.image.shape[-2:], device=condition.image.device)
    drawn = noise.draw(blank)
    x = drawn * float(sigmas[0])
    x = x if start is None else x + start.to(x)
    denoiser = branches.guided(guidance)
    if free is not None and kept is not None:
        denoiser = Masked(denoiser, free, kept.to(x), drawn)
    z = sample(sampler, denoiser, x, sigmas, condition, noise=noise.ahead(len(sigmas) - 1), hooks=hooks)
    return z, branches.evaluations
