"""Prompt-to-Prompt pairs over a native MODEL: a clone is patched, and the formulas are the engine's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from torch import Tensor

from ..ip2p_engine.diffusion.noise import SampleNoise
from ..ip2p_engine.diffusion.schedule import make_sigmas, step_of
from ..ip2p_engine.errors import CheckpointError, ConfigError
from ..ip2p_engine.networks.attention import attend, p2p_active, share_self_attention, sharing_rows
from ..ip2p_engine.p2p.cross_attention import (
    CROSS_MODES,
    CrossControl,
    LocalBlend,
    attention_map,
    blend_words,
    cross_edit,
    edit_map,
)
from ._editor import literal, text_rows
from ._guiders import EngineSampler, fractional_time, ladder, step_callback
from ._host import to_pictures
from ._models import in_channels
from .conditioning import size_values

__all__ = ["NativePairs", "require_text_to_image"]

TEXT = 0  # the index of the positive condition in ComfyUI's cond_or_uncond
TOKENS = 77


def require_text_to_image(model: comfy.model_patcher.ModelPatcher) -> None:
    """Raises CheckpointError unless the MODEL makes pictures from text with the 4 channels of Stable Diffusion."""
    channels = in_channels(model)
    if channels != 4:
        raise CheckpointError(
            f"this MODEL takes {channels} input channels, and pairs are made by a text-to-image model, which takes 4; "
            "load one with Load Checkpoint, e.g. Stable Diffusion 1.5, or choose embedded-sd"
        )


class PairGuider(comfy.samplers.CFGGuider):
    """u + w (c - u) with a w of its own for each pair; section 3.1 of Brooks et al. (2023)."""

    def __init__(self, model: Any, scales: Sequence[float], early: Callable[[float], bool], cross: Any) -> None:
        """``early(sigma)``: whether the edited picture still follows the source's caption."""
        super().__init__(model)
        self._scales, self._early, self._cross = scales, early, cross

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict = {}, seed: int | None = None) -> Tensor:  # noqa: B006
        """The guided clean latents of [source, edited, source, edited, ...]."""
        sigma = float(timestep[0])
        early = self._early(sigma)
        positive, negative = self.conds["source" if early else "positive"], self.conds["negative"]
        self._cross.step(sigma, early)
        c, u = comfy.samplers.calc_cond_batch(self.inner_model, [positive, negative], x, timestep, model_options)
        scale = torch.tensor(self._scales, dtype=x.dtype, device=x.device).repeat_interleave(2).view(-1, 1, 1, 1)
        return comfy.samplers.cfg_function(
            self.inner_model, c, u, scale, x, timestep, model_options, cond=positive, uncond=negative
        )


class _CrossAttention:
    """Edited cross-attention as an attn2 replacement; only the text condition's rows are touched."""

    def __init__(self, control: CrossControl, levels: Sequence[float], cross_steps: float) -> None:
        self.control, self._levels, self._cross_steps = control, levels, cross_steps

    def step(self, sigma: float, early: bool) -> None:
        """Before each evaluation: whether this step is edited. Early on, both pictures of a pair are still one."""
        edited = step_of(sigma, self._levels) < self._cross_steps * (len(self._levels) - 1)
        self.control.use(editing=edited and not early, watching=not early)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """ComfyUI's hook, between the projections and to_out."""
        heads, conditions = options["n_heads"], options["cond_or_uncond"]
        mixed = attend(query, key, value, heads)
        if TEXT not in conditions or not (self.control.editing or self.control.watching):
            return mixed
        rows = len(query) // len(conditions)
        start = conditions.index(TEXT) * rows
        source, edited = slice(start, start + rows, 2), slice(start + 1, start + rows, 2)
        source_map = attention_map(query[source], key[source], heads)
        used = attention_map(query[edited], key[edited], heads)
        if self.control.editing and self.control.edit is not None:
            used = edit_map(source_map, used, self.control.edit)
            values = value[edited].unflatten(-1, (heads, -1)).transpose(1, 2)
            mixed[edited] = (used @ values).transpose(1, 2).flatten(2)
        blend = self.control.blend
        if self.control.watching and blend is not None and blend.watches(query.shape[1]):
            blend.add(source_map, used)
        return mixed


@dataclass(frozen=True, kw_only=True)
class NativePairs:
    """A text-to-image MODEL with its CLIP and VAE that makes candidates, as the engine's PairGenerator does."""

    model: comfy.model_patcher.ModelPatcher
    clip: Any
    vae: Any
    config: Any
    """The engine's PairConfig, with a size."""

    def make(self, jobs: Sequence[Any], part: int = 0, parts: int = 1) -> list[Any]:
        """The PairCandidates of one batch of PairJobs; each depends on its seed alone.

        ``part`` of ``parts`` is for the progress bar. Raises ConfigError for captions that do not suit the mode.
        """
        from ..ip2p_engine.p2p.generator import PairCandidate, draw_settings

        drawn = [draw_settings(job.seed, self.config.p2p_range, self.config.cfg_range) for job in jobs]
        latents = self._walk(jobs, drawn, part, parts)
        pictures = to_pictures(self.vae.decode(latents))
        return [
            PairCandidate(
                source_image=pictures[2 * n],
                edited_image=pictures[2 * n + 1],
                caption=job.caption,
                edited_caption=job.edited_caption,
                seed=job.seed,
                p2p_threshold=p,
                cfg=w,
                latents=latents[2 * n : 2 * n + 2].cpu(),
                settings={"seed": job.seed, "p2p_threshold": p, "cfg": w},
            )
            for n, (job, (p, w)) in enumerate(zip(jobs, drawn, strict=True))
        ]

    def _walk(self, jobs: Sequence[Any], drawn: Sequence[tuple[float, float]], part: int, parts: int) -> Tensor:
        """Clean latents (2B, 4, h, w) of B pairs."""
        config, (width, height) = self.config, self.config.size
        clone = fractional_time(self.model)
        sigmas = make_sigmas(config.schedule, ladder(self.model), config.steps)
        levels = sigmas.tolist()
        cross = _CrossAttention(self._control(jobs), levels, config.cross_steps)
        self._patch(clone, [p for p, _ in drawn], levels, cross)
        guider = PairGuider(
            clone,
            [w for _, w in drawn],
            lambda sigma: step_of(sigma, levels) < config.edited_prompt_start * config.steps,
            cross,
        )
        guider.inner_set_conds(self._conditions(jobs))
        noise = SampleNoise([job.seed for job in jobs])
        blank = torch.zeros(len(jobs), 4, height // 8, width // 8)
        start = noise.draw(blank).repeat_interleave(2, dim=0)
        return guider.sample(
            start,
            torch.zeros_like(start),
            EngineSampler(
                config.sampler,
                sigmas,
                lambda like: noise.draw(like[::2]).repeat_interleave(2, dim=0),
                self._after_step(cross.control),
            ),
            sigmas.float(),
            callback=step_callback(clone, config.steps, part, parts),
            disable_pbar=True,
            seed=jobs[0].seed,
        )

    def _conditions(self, jobs: Sequence[Any]) -> dict[str, list]:
        """The texts of all pictures, of their sources twice, and none, each as one condition of many rows."""
        both = [literal(text) for job in jobs for text in (job.caption, job.edited_caption)]
        width, height = self.config.size
        values = size_values(torch.empty(1, 4, height // 8, width // 8))
        rows = {"positive": both, "source": [text for text in both[::2] for _ in range(2)], "negative": [""]}
        conditions = {name: text_rows(self.clip, texts, values) for name, texts in rows.items()}
        if self.config.mode in CROSS_MODES and conditions["positive"][0][0].shape[1] != TOKENS:
            raise ConfigError(f"mode {self.config.mode!r} takes captions of at most {TOKENS} tokens; shorten them")
        return conditions

    def _patch(self, clone: Any, thresholds: Sequence[float], levels: Sequence[float], cross: _CrossAttention) -> None:
        steps = len(levels) - 1

        def share(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            step = step_of(float(options["sigmas"][0]), levels)
            active = [p2p_active(step, steps, threshold) for threshold in thresholds]
            if not any(active):
                return n, context, value
            # ComfyUI may evaluate the two conditions together or apart.
            query, key = share_self_attention(n, context, sharing_rows(active, len(options["cond_or_uncond"])))
            return query, key, value

        clone.set_model_attn1_patch(share)
        if cross.control.edit is None and cross.control.blend is None:
            return
        network = clone.model.diffusion_model
        places = [("input", n) for n in range(len(network.input_blocks))] + [("middle", 0)]
        for block, number in places + [("output", n) for n in range(len(network.output_blocks))]:
            clone.set_model_attn2_replace(cross, block, number)

    def _control(self, jobs: Sequence[Any]) -> CrossControl:
        """What is done to the cross-attention of a batch, as the engine's generator decides it."""
        config, (width, height) = self.config, self.config.size
        pairs = [(job.caption, job.edited_caption) for job in jobs]
        device = self.model.load_device
        edit = cross_edit(config.mode, pairs, config.reweight).to(device) if config.mode in CROSS_MODES else None
        if not config.local_blend:
            return CrossControl(edit)
        before, after = (words.to(device) for words in blend_words(pairs, config.blend_words))
        levels = len(self.model.model.model_config.unet_config["channel_mult"])
        return CrossControl(edit, LocalBlend(before, after, (height // 8, width // 8), levels))

    def _after_step(self, control: CrossControl) -> Callable[[int, Tensor], Tensor] | None:
        blend, first = control.blend, self.config.blend_start * self.config.steps
        return None if blend is None else lambda step, x: blend.apply(x) if step >= first else x
