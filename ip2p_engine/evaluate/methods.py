"""Ways to edit, on one contract: encode a batch once, then make its pictures at every setting of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from ..diffusion.guidance import FORMULAS, DualGuidance, check_scale
from ..diffusion.schedule import make_sigmas
from ..edit import EditConfig, InstructPix2Pix
from ..errors import ConfigError
from ..hooks import Hooks
from ..images import to_images, to_tensor
from ..networks.conditioning import Conditioning, TextEmbedding, decode_latents, encode_image, encode_text, size_ids
from ..networks.digest import fingerprint
from ..networks.model import Model
from ..networks.walk import walk
from ..p2p.generator import PairConfig, PairGenerator, PairJob
from .samples import Sample

__all__ = [
    "CopyInput",
    "InstructionEdit",
    "Made",
    "Method",
    "PromptToPrompt",
    "RoundTrip",
    "SDEdit",
    "Setting",
    "Target",
    "common_settings",
    "encode_texts",
]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of a curve: the curve's name in the legend, and the values that were swept."""

    curve: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A batch's pictures; ``sources`` where a method makes those too, as Prompt-to-Prompt does."""

    edited: list[Image.Image]
    sources: list[Image.Image] | None = None


class Method(Protocol):
    """``prepare`` does once a batch what every setting shares; ``make`` gives the pictures of one setting."""

    @property
    def settings(self) -> Sequence[Setting]: ...

    def describe(self, setting: Setting) -> dict[str, Any]: ...

    def prepare(self, samples: Sequence[Sample]) -> Any: ...

    def make(self, samples: Sequence[Sample], prepared: Any, setting: Setting) -> Made: ...


class InstructionEdit:
    """InstructPix2Pix over a grid of s_T and s_I (the paper's figures 8 and 10)."""

    def __init__(
        self,
        editor: InstructPix2Pix,
        *,
        label: str,
        text_cfgs: Sequence[float],
        image_cfgs: Sequence[float],
        steps: int | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        """Raises ConfigError for a scale, a number of steps, a sampler or a schedule that does not exist."""
        self.model, self._hooks = editor.model, hooks or Hooks()
        text_cfgs = [check_scale("text_cfg", value) for value in dict.fromkeys(text_cfgs)]
        image_cfgs = [check_scale("image_cfg", value) for value in dict.fromkeys(image_cfgs)]
        grid = [{"text_cfg": s_t, "image_cfg": s_i} for s_t in text_cfgs for s_i in image_cfgs]
        self.settings = [Setting(curve=label, values=values) for values in grid]
        self._common = common_settings(self.model, editor.name, steps, sampler, schedule)

    def describe(self, setting: Setting) -> dict[str, Any]:
        return {"method": "instruct-pix2pix", **setting.values, **self._common}

    def prepare(self, samples: Sequence[Sample]) -> Conditioning:
        """Every picture and every instruction, encoded once for all settings and seeds."""
        texts = [f"{one.instruction}{self.model.spec.suffix}" for one in samples]
        text, null_text = encode_texts(self.model, texts)
        different = {id(one.source): one.source for one in samples}
        rows = [list(different).index(id(one.source)) for one in samples]
        image = encode_image(self.model, to_tensor(list(different.values()), self.model.device))[rows]
        sizes = size_ids(self.model, [one.source.size for one in samples])
        return Conditioning(text=text, null_text=null_text, image=image, size_ids=sizes)

    def make(self, samples: Sequence[Sample], prepared: Conditioning, setting: Setting) -> Made:
        common = self._common
        z, _ = walk(
            self.model,
            prepared,
            [one.seed for one in samples],
            make_sigmas(common["schedule"], self.model.schedule, common["steps"]),
            partial(DualGuidance, **setting.values, formula=FORMULAS[self.model.spec.guidance]),
            scales=(setting.values["text_cfg"], setting.values["image_cfg"]),
            sampler=common["sampler"],
            hooks=self._hooks,
        )
        return Made(edited=to_images(decode_latents(self.model, z)))


def common_settings(
    model: Model, name: str, steps: int | None, sampler: str | None, schedule: str | None
) -> dict[str, Any]:
    """What every row of a method says about its network and its walk. Raises ConfigError for what cannot be walked."""
    EditConfig(steps=steps, sampler=sampler, schedule=schedule)
    return {
        "checkpoint": name,
        "fingerprint": fingerprint(model.unet, model.autoencoder, *model.text_encoders),
        "weights": model.spec.weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "steps": model.spec.steps if steps is None else steps,
        "sampler": model.spec.sampler if sampler is None else sampler,
        "schedule": model.spec.levels if schedule is None else schedule,
    }


def encode_texts(model: Model, texts: Sequence[str]) -> tuple[TextEmbedding, TextEmbedding]:
    """(texts, the empty text), each different text encoded once."""
    different = list(dict.fromkeys(texts))
    embedded = encode_text(model, [*different, ""])
    return embedded.rows([different.index(text) for text in texts]), embedded.rows([len(different)])


class SDEdit:
    """SDEdit (Meng et al. 2022) with a text-to-image checkpoint: noise the picture up to a level, denoise under a text.

    Of n steps the last round(strength n) are walked. The text is the edited caption, or the instruction.
    """

    def __init__(
        self,
        model: Model,
        *,
        name: str,
        strengths: Sequence[float],
        texts: Sequence[str] = ("edited_caption", "instruction"),
        cfg: float = 7.5,
        steps: int | None = None,
        sampler: str = "euler_ancestral",
        schedule: str = "model",
        hooks: Hooks | None = None,
    ) -> None:
        """Raises ConfigError for a strength that walks no step or more than all."""
        self.model, self._hooks = model, hooks or Hooks()
        self._common = {**common_settings(model, name, steps, sampler, schedule), "cfg": cfg}
        for strength in strengths:
            if not 0 < strength <= 1 or self._walked(strength) < 1:
                got = f"strength {strength} is no part of {self._common['steps']} steps that can be walked"
                raise ConfigError(f"{got}; give more than 0, up to 1, and more steps for a small one")
        self.settings = [
            Setting(curve=f"SDEdit, {text.replace('edited_', 'output ')}", values={"text": text, "strength": strength})
            for text in texts
            for strength in dict.fromkeys(strengths)
        ]

    def describe(self, setting: Setting) -> dict[str, Any]:
        return {"method": "sdedit", **setting.values, **self._common}

    def prepare(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The clean latents, and the conditioning by either text."""
        scale = 1.0 if self.model.spec.scaled_condition else self.model.spec.latent_scale
        latents = encode_image(self.model, to_tensor([one.source for one in samples], self.model.device)) * scale
        used = {setting.values["text"] for setting in self.settings}
        return {"latents": latents, **{name: self._condition(samples, latents, name) for name in used}}

    def make(self, samples: Sequence[Sample], prepared: dict[str, Any], setting: Setting) -> Made:
        common = self._common
        sigmas = make_sigmas(common["schedule"], self.model.schedule, common["steps"])
        z, _ = walk(
            self.model,
            prepared[setting.values["text"]],
            [one.seed for one in samples],
            sigmas[len(sigmas) - 1 - self._walked(setting.values["strength"]) :],
            # Equal scales are u + s (c - u): plain guidance.
            partial(DualGuidance, text_cfg=common["cfg"], image_cfg=common["cfg"]),
            sampler=common["sampler"],
            start=prepared["latents"],
            hooks=self._hooks,
        )
        return Made(edited=to_images(decode_latents(self.model, z)))

    def _walked(self, strength: float) -> int:
        return round(strength * self._common["steps"])

    def _condition(self, samples: Sequence[Sample], latents: Tensor, name: str) -> Conditioning:
        """A text and an image of no channels: what a text-to-image network takes."""
        text, null_text = encode_texts(self.model, [getattr(one, name) for one in samples])
        sizes = size_ids(self.model, [one.source.size for one in samples])
        return Conditioning(text=text, null_text=null_text, image=latents[:, :0], size_ids=sizes)


class PromptToPrompt:
    """The pair that Prompt-to-Prompt makes of both captions, source included: what the training data look like."""

    def __init__(self, model: Model, *, name: str, steps: int | None = None, label: str = "Prompt-to-Prompt") -> None:
        self.model = model
        self.settings = [Setting(curve=label)]
        self._common = common_settings(model, name, steps, "euler_ancestral", "model")
        self._name = name

    def describe(self, setting: Setting) -> dict[str, Any]:
        config = PairConfig()
        ranges = {"p2p_range": list(config.p2p_range), "cfg_range": list(config.cfg_range)}
        return {"method": "prompt-to-prompt", **ranges, **self._common}

    def prepare(self, samples: Sequence[Sample]) -> PairGenerator:
        config = PairConfig(steps=self._common["steps"], size=samples[0].source.size)
        return PairGenerator(self.model, config, name=self._name)

    def make(self, samples: Sequence[Sample], prepared: PairGenerator, setting: Setting) -> Made:
        jobs = [PairJob(caption=s.caption, edited_caption=s.edited_caption, seed=s.seed) for s in samples]
        pairs = [pair for batch in prepared.batches(jobs) for pair in batch]
        return Made(edited=[pair.edited_image for pair in pairs], sources=[pair.source_image for pair in pairs])


class CopyInput:
    """The edit that does nothing: image similarity 1, direction 0."""

    settings = (Setting(curve="copy the input"),)

    def describe(self, setting: Setting) -> dict[str, Any]:
        return {"method": "copy"}

    def prepare(self, samples: Sequence[Sample]) -> None:
        return None

    def make(self, samples: Sequence[Sample], prepared: None, setting: Setting) -> Made:
        return Made(edited=[one.source for one in samples])


class Target(CopyInput):
    """The samples' own targets: the data set's pairs, or the true edits."""

    def __init__(self, label: str) -> None:
        self.settings = (Setting(curve=label),)

    def describe(self, setting: Setting) -> dict[str, Any]:
        return {"method": "target"}

    def make(self, samples: Sequence[Sample], prepared: None, setting: Setting) -> Made:
        """Raises ConfigError for a sample without a target."""
        targets = [one.target for one in samples if one.target is not None]
        if len(targets) != len(samples):
            raise ConfigError(f"{len(samples) - len(targets)} samples have no target; leave the method Target out")
        return Made(edited=targets)


class RoundTrip(Target):
    """The targets through the autoencoder and back: no edit can be nearer to them."""

    def __init__(self, model: Model, *, name: str, label: str = "autoencoder") -> None:
        super().__init__(label)
        self.model = model
        self._described = {"method": "round trip", "checkpoint": name, "fingerprint": fingerprint(model.autoencoder)}

    def describe(self, setting: Setting) -> dict[str, Any]:
        return self._described

    def make(self, samples: Sequence[Sample], prepared: None, setting: Setting) -> Made:
        targets = super().make(samples, prepared, setting).edited
        scale = 1.0 if self.model.spec.scaled_condition else self.model.spec.latent_scale
        latents = encode_image(self.model, to_tensor(targets, self.model.device)) * scale
        return Made(edited=to_images(decode_latents(self.model, latents)))
