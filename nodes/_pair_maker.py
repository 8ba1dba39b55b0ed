"""Prompt-to-Prompt pairs over a native MODEL: a clone is patched, and the formulas are the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from torch import Tensor

from ..ip2p_engine.diffusion.noise import SampleNoise
from ..ip2p_engine.diffusion.schedule import make_sigmas
from ..ip2p_engine.errors import CheckpointError
from ..ip2p_engine.networks.attention import attend, share_self_attention
from ..ip2p_engine.p2p.cross_attention import CrossControl, control_of
from ..ip2p_engine.p2p.plan import PairPlan, sharing_rows
from ._editor import literal, text_rows
from ._guiders import SIGMA, EngineSampler, fractional_time, ladder, step_callback, with_options
from ._host import to_pictures
from ._models import in_channels
from .conditioning import size_values

__all__ = ["NativePairs", "require_text_to_image"]

STEP, ROWS = "ip2p_pair_step", "ip2p_pair_rows"
TEXT = 0  # the index of the positive condition in ComfyUI's cond_or_uncond


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

    def __init__(self, model: Any, scales: Sequence[float], plan: PairPlan) -> None:
        super().__init__(model)
        self._scale = torch.tensor(scales).repeat_interleave(2).view(-1, 1, 1, 1)
        self._plan, self._rows = plan, _Rows(plan)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict = {}, seed: int | None = None) -> Tensor:  # noqa: B006
        """The guided clean latents of [source, edited, source, edited, ...]."""
        now = self._plan.step(model_options["transformer_options"][SIGMA])
        positive, negative = self.conds["source" if now.early else "positive"], self.conds["negative"]
        told = with_options(model_options, {STEP: now, ROWS: self._rows.on(x.device)})
        c, u = comfy.samplers.calc_cond_batch(self.inner_model, [positive, negative], x, timestep, told)
        self._scale = self._scale.to(x)
        return comfy.samplers.cfg_function(
            self.inner_model, c, u, self._scale, x, timestep, model_options, cond=positive, uncond=negative
        )


class _Rows:
    """Which row's queries and keys each row uses, brought to the device before the first step for all of them."""

    def __init__(self, plan: PairPlan) -> None:
        self._patterns = {plan.step(sigma).active for sigma in plan.sigmas[:-1]}
        self._known: dict[tuple[tuple[bool, ...], int], Tensor] = {}

    def on(self, device: torch.device) -> _Rows:
        """Itself, on the device; a walk stays on one."""
        if not self._known:
            keys = [(active, halves) for active in self._patterns for halves in (1, 2)]
            self._known = {key: torch.tensor(sharing_rows(*key)).to(device, non_blocking=True) for key in keys}
        return self

    def of(self, active: tuple[bool, ...], halves: int) -> Tensor:
        """The rows of ``sharing_rows``; ComfyUI may evaluate the two conditions together or apart."""
        return self._known[active, halves]


def _share(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """ComfyUI's attn1 patch: the edited picture looks where the source looks."""
    active = options[STEP].active
    if not any(active):
        return n, context, value
    rows = options[ROWS].of(active, len(options["cond_or_uncond"]))
    return *share_self_attention(n, context, rows), value


def _cross_attention(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """ComfyUI's attn2 replacement, between the projections and to_out; only the text condition's rows are edited."""
    mix, heads, conditions = options[STEP].mix, options["n_heads"], options["cond_or_uncond"]
    if mix is None or TEXT not in conditions:
        return attend(query, key, value, heads)
    rows = len(query) // len(conditions)
    start = conditions.index(TEXT) * rows
    return mix(query, key, value, heads, slice(start, start + rows))


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
        levels = len(self.model.model.model_config.unet_config["channel_mult"])
        captions = [(job.caption, job.edited_caption) for job in jobs]
        cross = control_of(config, captions, config.size, levels=levels, device=self.model.load_device)
        plan = PairPlan(
            sigmas=sigmas.tolist(),
            p2p_thresholds=[p for p, _ in drawn],
            edited_prompt_start=config.edited_prompt_start,
            cross_steps=config.cross_steps,
            cross=cross,
        )
        _patch(clone, cross)
        guider = PairGuider(clone, [w for _, w in drawn], plan)
        guider.inner_set_conds(self._conditions(jobs))
        noise = SampleNoise([job.seed for job in jobs])
        draw = noise.ahead(config.steps)
        start = noise.draw(torch.zeros(len(jobs), 4, height // 8, width // 8)).repeat_interleave(2, dim=0)
        return guider.sample(
            start,
            torch.zeros_like(start),
            EngineSampler(
                config.sampler,
                sigmas,
                lambda like: draw(like[::2]).repeat_interleave(2, dim=0),
                cross.after_step(config.blend_start * config.steps),
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
        return {name: text_rows(self.clip, texts, values) for name, texts in rows.items()}


def _patch(clone: comfy.model_patcher.ModelPatcher, cross: CrossControl) -> None:
    clone.set_model_attn1_patch(_share)
    if cross.edit is None and cross.blend is None:
        return
    network = clone.model.diffusion_model
    places = [("input", n) for n in range(len(network.input_blocks))] + [("middle", 0)]
    for block, number in places + [("output", n) for n in range(len(network.output_blocks))]:
        clone.set_model_attn2_replace(_cross_attention, block, number)
