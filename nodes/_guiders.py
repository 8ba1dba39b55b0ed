"""The engine's guidance and samplers where ComfyUI expects a guider and a sampler."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import comfy.conds
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import latent_preview
import node_helpers
import torch
from torch import Tensor

from ..ip2p_engine.diffusion.area import area_of, relevance
from ..ip2p_engine.diffusion.guidance import FORMULAS, check_scale, guidance_of
from ..ip2p_engine.diffusion.sampling import sample
from ..ip2p_engine.diffusion.schedule import DiscreteSchedule
from ..ip2p_engine.errors import ConfigError
from ..ip2p_engine.hooks import Hooks
from ._models import require_edit, spec_of

__all__ = [
    "MASK",
    "SIGMA",
    "AreaSampler",
    "DualGuider",
    "EngineSampler",
    "fractional_time",
    "ladder",
    "step_callback",
    "with_options",
]

IMAGE = "concat_latent_image"
SIGMA = "ip2p_sigma"
MASK = "ip2p_mask"  # in a condition: what makes the mask's latents (B or 1, 4, h, w), asked where a network is told it
BLIND = ("t", "u")  # branches without the picture, by the index of their text's condition
CFG_HOOKS = (
    "sampler_pre_cfg_function",
    "sampler_cfg_function",
    "sampler_post_cfg_function",
    "disable_cfg1_optimization",
)
PATCHES = ("patches", "patches_replace", "wrappers", "callbacks", "optimized_attention_override")
Conds = list[dict[str, Any]]


class DualGuider(comfy.samplers.CFGGuider):
    """u + s_I (i - u) + s_T (c - i) over a native MODEL; equation 3 of Brooks et al. (2023), or what its spec asks for.

    c and i are the positive and the negative condition with the picture; u and t, without it, are made here. The three
    branches of a formula are one call of the network. Where a patch may look at the condition indices, the one without
    the picture has a call of its own, so that they stay 0 (text) and 1 (no text), which is all that most packs know.
    """

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        text_cfg: float,
        image_cfg: float,
        *,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        apg: bool = False,
    ) -> None:
        """The options are the engine's (``guidance_of``).

        Raises CheckpointError for a MODEL that does not edit, ConfigError for a scale below 0 or such an option.
        """
        require_edit(model)
        super().__init__(model)
        name, self._takes_mask = spec_of(model).guidance, spec_of(model).takes_mask
        self._formula = FORMULAS[name]
        self.text_cfg, self.image_cfg = check_scale("text_cfg", text_cfg), check_scale("image_cfg", image_cfg)
        self._guidance = guidance_of(text_cfg, image_cfg, name=name, interval=interval, rescale=rescale, apg=apg)
        self._at_levels, self._plain = interval is not None, interval is None and not rescale and not apg

    def set_conds(self, positive: list, negative: list) -> None:
        """Both conditions; the picture of the positive one stands in where the negative one has none."""
        picture = next((values[IMAGE] for _, values in positive if IMAGE in values), None)
        if picture is None:
            raise ConfigError("the positive condition carries no picture; wire it through IP2P Encode Image first")
        given = {"positive": _with_image(positive, picture), "negative": _with_image(negative, picture)}
        self.inner_set_conds({name: _with_mask(one) for name, one in given.items()} if self._takes_mask else given)

    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: comfy.samplers.Sampler,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        *more: Any,
        **named: Any,
    ) -> Tensor:
        """As core's; a network that is told the mask is not bound by it too."""
        bound = None if self._takes_mask else denoise_mask
        return super().sample(noise, latent_image, sampler, sigmas, bound, *more, **named)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict = {}, seed: int | None = None) -> Tensor:  # noqa: B006
        """The guided clean latent; ComfyUI's name, and its signature, for what a denoiser returns."""
        if not any(model_options.get(name) for name in CFG_HOOKS):
            return self._guidance(
                lambda x, sigma, cond, names: self._evaluate(tuple(names), x, timestep, model_options)
            )(x, self._sigma(timestep, model_options), None)
        if not self._plain:
            raise ConfigError(
                "another node changes the guidance too; take it away, or set guidance_high, rescale and apg back"
            )
        return self._hooked(x, timestep, model_options)

    def _sigma(self, timestep: Tensor, model_options: dict) -> float:
        """The noise level, where the guidance asks for it; the device is asked only if nobody knows the number."""
        if not self._at_levels:
            return 0.0
        known = model_options.get("transformer_options", {}).get(SIGMA)
        return float(timestep.max()) if known is None else known

    def branches_at(self, x: Tensor, sigma: float, names: Sequence[str], model_options: dict) -> dict[str, Tensor]:
        """Clean latents of the named branches at a noise level."""
        told = with_options(model_options, {SIGMA: sigma})
        return self._evaluate(tuple(names), x, x.new_full((len(x),), sigma), told)

    def _hooked(self, x: Tensor, timestep: Tensor, model_options: dict) -> Tensor:
        """The same value as plain guidance between two ends, which is what other packs' CFG hooks understand.

        A formula f is linear in s_T: with U = f(0) and C = f(1) it is U + s_T (C - U).
        """
        branches = self._evaluate(tuple(self._formula.weights(1.0, 1.0)), x, timestep, model_options)
        ends = [self._formula.combine(branches, text_cfg, self.image_cfg) for text_cfg in (1.0, 0.0)]
        positive, negative = self.conds["positive"], self.conds["negative"]
        shared = {"cond_scale": self.text_cfg, "timestep": timestep, "input": x, "sigma": timestep}
        for hook in model_options.get("sampler_pre_cfg_function", []):
            given = {"conds": [positive, negative], "conds_out": ends, "model": self.inner_model}
            ends = hook({**shared, **given, "model_options": model_options})
        return comfy.samplers.cfg_function(
            self.inner_model, ends[0], ends[1], self.text_cfg, x, timestep, model_options, positive, negative
        )

    def _evaluate(self, names: tuple[str, ...], x: Tensor, timestep: Tensor, model_options: dict) -> dict[str, Tensor]:
        """The network's clean latents of some branches; the others are not computed."""
        positive, negative = self.conds["positive"], self.conds["negative"]
        wanted = [positive if "c" in names else None, negative if "i" in names else None]
        blind = next((name for name in names if name in BLIND), None)  # no formula has both
        if blind is None:
            found = self._calculate(wanted, x, timestep, model_options)
        else:
            place, sighted = BLIND.index(blind), (positive, negative)
            emptied = _without_image(sighted[place])
            if not _indices_are_seen(model_options):
                found = self._calculate([*wanted, emptied], x, timestep, model_options)
            else:
                alone: list[Conds | None] = [None, None]
                alone[place] = emptied
                found = self._calculate(wanted, x, timestep, model_options) if any(wanted) else [None, None]
                found = [*found, self._calculate(alone, x, timestep, model_options)[place]]
        return {name: one for name, one in zip(("c", "i", blind), found, strict=False) if name in names}

    def _calculate(self, conds: list[Conds | None], x: Tensor, timestep: Tensor, model_options: dict) -> list[Tensor]:
        hook = model_options.get("sampler_calc_cond_batch_function")
        if hook is None:
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        given = {"conds": conds, "input": x, "sigma": timestep, "model": self.inner_model}
        return hook({**given, "model_options": model_options})


def _indices_are_seen(model_options: dict[str, Any]) -> bool:
    """Whether something of another pack runs where the condition indices are told."""
    around = (model_options.get(name) for name in ("model_function_wrapper", "sampler_calc_cond_batch_function"))
    inside = (model_options.get("transformer_options", {}).get(name) for name in PATCHES)
    return any(map(_filled, (*around, *inside)))


def _filled(value: Any) -> bool:
    return any(map(_filled, value.values())) if isinstance(value, dict) else bool(value)


def _with_image(conditioning: list, picture: Tensor) -> list:
    """The conditions, with the picture where they have none."""
    given = node_helpers.conditioning_set_values(conditioning, {IMAGE: picture})
    return [own if IMAGE in own[1] else filled for own, filled in zip(conditioning, given, strict=True)]


def _with_mask(conditioning: list) -> list:
    """The conditions with their mask's latents after the picture's."""
    return [[text, {**values, IMAGE: _picture_and_mask(values)}] for text, values in conditioning]


def _picture_and_mask(values: dict[str, Any]) -> Tensor:
    if MASK not in values:
        raise ConfigError("this MODEL is told a mask too; wire both conditions through IP2P Encode Image")
    picture = values[IMAGE]
    return torch.cat([picture, values[MASK]().to(picture).expand_as(picture)], dim=1)


def _without_image(conds: Conds) -> Conds:
    """Copies of conditions whose image latents are zero: the null image."""
    emptied = []
    for cond in conds:
        inputs = dict(cond["model_conds"])
        inputs["c_concat"] = comfy.conds.CONDNoiseShape(torch.zeros_like(inputs["c_concat"].cond))
        emptied.append({**cond, "model_conds": inputs})
    return emptied


class EngineSampler(comfy.samplers.Sampler):
    """The engine's sampling loop as a SAMPLER: x starts at noise * sigma_0, and each sample has a stream of its own."""

    def __init__(
        self,
        name: str,
        sigmas: Tensor,
        draw: Callable[[Tensor], Tensor],
        after_step: Callable[[int, Tensor], Tensor] | None = None,
    ) -> None:
        """``sigmas`` in float64; ``draw(x)`` gives a step's unit noise, after the start noise was drawn."""
        self._name, self._sigmas, self._draw, self._after_step = name, sigmas, draw, after_step

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """ComfyUI's call: walk from the start noise to the clean latent."""
        inner = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        inner.latent_image, inner.noise = latent_image, noise

        def denoiser(x: Tensor, sigma: float, cond: None) -> Tensor:
            # The number goes along, so that nobody has to ask the device for it.
            told = _with_options(extra_args, {SIGMA: sigma})
            return inner(x, x.new_full((len(x),), sigma), denoise_mask, **told)

        def on_step(i: int, n: int, x: Tensor, sigma: float, denoised: Tensor) -> None:
            if callback is not None:
                callback(i, denoised, x, n)

        start = noise * float(self._sigmas[0])
        return sample(
            self._name,
            denoiser,
            start,
            self._sigmas,
            noise=self._draw,
            after_step=self._after_step,
            hooks=Hooks(on_step=on_step),
        )


class AreaSampler(comfy.samplers.Sampler):
    """A SAMPLER that takes no step: it finds where each row's instruction may act, (B, 1, h, w) in ``found``."""

    found: Tensor | None = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """ComfyUI's call; returns the picture as it came."""
        picture = noise if latent_image is None else latent_image
        options = extra_args.get("model_options", {})

        def branches(x: Tensor, sigma: float, cond: None, names: Sequence[str]) -> dict[str, Tensor]:
            return model_wrap.branches_at(x, sigma, names, options)

        self.found = area_of(relevance(branches, picture, None)).cpu()
        return picture


def _with_options(extra_args: dict, options: dict) -> dict:
    """Copies of ComfyUI's arguments with more transformer options, which reach every patch of this call."""
    model_options = extra_args.get("model_options", {})
    return {**extra_args, "model_options": with_options(model_options, options)}


def with_options(model_options: dict, options: dict) -> dict:
    """A copy of model options with more transformer options."""
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), **options}}


def step_callback(
    model: comfy.model_patcher.ModelPatcher, steps: int, done: int = 0, of: int = 1, at_once: int = 1
) -> Callable:
    """Progress, the preview of the predicted clean picture, and the look whether Cancel was pressed, once a step.

    One bar for ``of`` things of so many steps, of which ``done`` are made and ``at_once`` are being made.
    """
    show = latent_preview.prepare_callback(model, steps * of)
    # ComfyUI's counts from 0.
    return lambda step, denoised, x, total: show(done * steps + (step + 1) * at_once - 1, denoised, x, steps * of)


def ladder(model: comfy.model_patcher.ModelPatcher) -> DiscreteSchedule:
    """A MODEL's noise levels as the engine's schedule."""
    sampling = model.get_model_object("model_sampling")
    sigmas = sampling.sigmas.detach().cpu().double()
    return DiscreteSchedule(1 / (1 + sigmas**2), bool(getattr(sampling, "zsnr", False)))


def fractional_time(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone whose network is told t as the paper's code does: between the steps of the ladder too.

    ComfyUI rounds it to the nearest of the 1000.
    """
    clone = model.clone()
    sampling = clone.get_model_object("model_sampling")
    if type(sampling).timestep is comfy.model_sampling.ModelSamplingDiscrete.timestep:
        exact, steps = copy.copy(sampling), ladder(model)
        exact.timestep = lambda sigma: steps.sigma_to_t(sigma).float().to(sigma.device)
        clone.add_object_patch("model_sampling", exact)
    return clone
