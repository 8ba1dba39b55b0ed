"""The engine's edit over a native MODEL, CLIP and VAE."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ip2p_engine.diffusion.noise import SampleNoise
from ..ip2p_engine.diffusion.schedule import make_sigmas
from ..ip2p_engine.errors import ConfigError
from ._guiders import MASK, AreaSampler, DualGuider, EngineSampler, fractional_time, ladder, step_callback
from ._models import spec_of
from .conditioning import size_values

__all__ = ["NativeEditor", "literal", "text_rows"]

AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class NativeEditor:
    """How to edit, with the engine's names."""

    model: Any
    clip: Any
    text_cfg: float
    image_cfg: float
    steps: int
    sampler: str = "euler_ancestral"
    schedule: str = "model"
    guidance: Mapping[str, Any] = field(default_factory=dict)
    """Options of DualGuider."""
    done: int = 0
    of: int | None = None
    """What the progress bar counts beside this call: pictures before it, and in all."""

    def latents(
        self,
        source: Tensor,
        instructions: Sequence[str],
        seeds: Sequence[int],
        mask: Tensor | None = None,
        told: Tensor | None = None,
    ) -> Tensor:
        """Edited latents (B, 4, h, w), unscaled, of image conditions ``source``, the n-th by the n-th instruction.

        In parts of 8, and a picture does not depend on its part. ``mask`` (B, 1, H, W) is 1 where it may change;
        ``told`` (B, 4, h, w) is a mask's latents, for networks of 12 channels.
        """
        model = fractional_time(self.model)
        parts = source.split(AT_ONCE)
        edited = []
        for number, part in enumerate(parts):
            chosen = slice(number * AT_ONCE, number * AT_ONCE + len(part))
            done, of = self.done + number * AT_ONCE, self.of or len(source)
            show = step_callback(model, self.steps, done, of, len(part))
            free, shown = (None if one is None else one[chosen] for one in (mask, told))
            guider = self._guider(model, part, instructions[chosen], shown)
            edited.append(self._part(guider, part, seeds[chosen], free, show))
        return torch.cat(edited).to(source)

    def areas(self, source: Tensor, instructions: Sequence[str]) -> Tensor:
        """Where each picture's instruction may act, (B, 1, h, w), as the engine's ``find_area`` has it.

        Raises ConfigError for a network that is told a mask: it looks where that says.
        """
        if spec_of(self.model).takes_mask:
            raise ConfigError(
                "find_area has nothing to say to a MODEL that is told a mask; paint one, or switch it off"
            )
        model, found = fractional_time(self.model), []
        for start in range(0, len(source), AT_ONCE):
            part, sampler = source[start : start + AT_ONCE], AreaSampler()
            guider = self._guider(model, part, instructions[start : start + AT_ONCE])
            level = torch.tensor([1.0, 0.0])  # ComfyUI wants a walk; the sampler has levels of its own
            guider.sample(torch.zeros_like(part), part, sampler, level, disable_pbar=True, seed=0)
            found.append(sampler.found)
        return torch.cat(found)

    def _guider(self, model: Any, source: Tensor, texts: Sequence[str], told: Tensor | None = None) -> DualGuider:
        guider = DualGuider(model, self.text_cfg, self.image_cfg, **self.guidance)
        values = {"concat_latent_image": source, **size_values(source)}
        values |= {} if told is None else {MASK: lambda: told}
        said = [f"{text}{spec_of(self.model).suffix}" for text in texts]
        guider.set_conds(text_rows(self.clip, said, values), text_rows(self.clip, [""], values))
        return guider

    def _part(self, guider: DualGuider, source: Tensor, seeds: Sequence[int], mask: Tensor | None, show: Any) -> Tensor:
        noise, sigmas = SampleNoise(seeds), make_sigmas(self.schedule, ladder(guider.model_patcher), self.steps)
        return guider.sample(
            noise.draw(source),
            source,
            EngineSampler(self.sampler, sigmas, noise.ahead(self.steps)),
            sigmas.float(),
            denoise_mask=mask,
            callback=show,
            disable_pbar=True,
            seed=seeds[0],
        )


def literal(text: str) -> str:
    """A text of a data set for ``text_rows``: its parentheses are letters and no weights."""
    from ..ip2p_engine.tokenizer import clean

    return re.sub(r"[()]", r"\\\g<0>", clean(text))


def text_rows(clip: Any, texts: Sequence[str], values: dict[str, Any]) -> list:
    """Texts as one CONDITIONING of many rows, each different text encoded once.

    Cleaned as the engine does; what ComfyUI does with weights in parentheses stays.
    """
    from ..ip2p_engine.tokenizer import clean

    encoded = {text: clip.encode_from_tokens_scheduled(clip.tokenize(clean(text)))[0] for text in dict.fromkeys(texts)}
    longest = math.lcm(*(tensor.shape[1] for tensor, _ in encoded.values()))
    # Repeated tokens weigh nothing in attention, which is how ComfyUI itself evens texts out.
    rows = torch.cat([encoded[text][0].repeat(1, longest // encoded[text][0].shape[1], 1) for text in texts])
    known = dict(encoded[texts[0]][1])
    if known.get("pooled_output") is not None:
        known["pooled_output"] = torch.cat([encoded[text][1]["pooled_output"] for text in texts])
    return [[rows, {**known, **values}]]
