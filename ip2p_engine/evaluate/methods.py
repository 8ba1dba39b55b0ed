"""Ways to edit, on one contract: encode a batch once, then make its pictures at every setting of a sweep."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ..diffusion.guidance import check_scale
from ..diffusion.noise import SampleNoise
from ..diffusion.sampling import ShouldStop, sample
from ..diffusion.schedule import make_sigmas
from ..edit import EditConfig, InstructPix2Pix
from ..images import to_images, to_tensor
from ..networks.conditioning import Conditioning, TextEmbedding, decode_latents, encode_image, encode_text, size_ids
from ..networks.denoiser import guided_denoiser
from ..networks.model import Model
from .samples import Sample

__all__ = ["InstructionEdit", "Made", "Method", "Setting", "common_settings", "encode_texts", "fingerprint", "walk"]


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


@torch.inference_mode()
def walk(
    model: Model,
    cond: Conditioning,
    seeds: Sequence[int],
    sigmas: Tensor,
    *,
    text_cfg: float,
    image_cfg: float,
    sampler: str = "euler_ancestral",
    start: Tensor | None = None,
    should_stop: ShouldStop | None = None,
) -> Tensor:
    """Clean latents (B, 4, h, w) of a batch, from noise of sigmas[0] on ``start`` (B, 4, h, w), or on nothing."""
    noise = SampleNoise(seeds)
    shape = (len(seeds), 4, *cond.image.shape[-2:])
    x = noise.draw(torch.zeros(shape, device=cond.image.device)) * float(sigmas[0])
    x = x if start is None else x + start.to(x)
    with guided_denoiser(model, text_cfg, image_cfg) as denoiser:
        return sample(sampler, denoiser, x, sigmas, cond, noise=noise.draw, should_stop=should_stop)


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
        sampler: str = "euler_ancestral",
        schedule: str = "model",
        should_stop: ShouldStop | None = None,
    ) -> None:
        """Raises ConfigError for a scale, a number of steps, a sampler or a schedule that does not exist."""
        self.model, self._should_stop = editor.model, should_stop
        text_cfgs = [check_scale("text_cfg", value) for value in dict.fromkeys(text_cfgs)]
        image_cfgs = [check_scale("image_cfg", value) for value in dict.fromkeys(image_cfgs)]
        grid = [{"text_cfg": s_t, "image_cfg": s_i} for s_t in text_cfgs for s_i in image_cfgs]
        self.settings = [Setting(curve=label, values=values) for values in grid]
        self._common = common_settings(self.model, editor.name, steps, sampler, schedule)

    def describe(self, setting: Setting) -> dict[str, Any]:
        return {"method": "instruct-pix2pix", **setting.values, **self._common}

    def prepare(self, samples: Sequence[Sample]) -> Conditioning:
        """Every picture and every instruction, encoded once for all settings and seeds."""
        text, null_text = encode_texts(self.model, [one.instruction for one in samples])
        different = {id(one.source): one.source for one in samples}
        rows = [list(different).index(id(one.source)) for one in samples]
        image = encode_image(self.model, to_tensor(list(different.values())))[rows]
        sizes = size_ids(self.model, [one.source.size for one in samples])
        return Conditioning(text=text, null_text=null_text, image=image, size_ids=sizes)

    def make(self, samples: Sequence[Sample], prepared: Conditioning, setting: Setting) -> Made:
        common = self._common
        z = walk(
            self.model,
            prepared,
            [one.seed for one in samples],
            make_sigmas(common["schedule"], self.model.schedule, common["steps"]),
            **setting.values,
            sampler=common["sampler"],
            should_stop=self._should_stop,
        )
        return Made(edited=to_images(decode_latents(self.model, z)))


def common_settings(model: Model, name: str, steps: int | None, sampler: str, schedule: str) -> dict[str, Any]:
    """What every row of a method says about its network and its walk. Raises ConfigError for what cannot be walked."""
    EditConfig(steps=steps, sampler=sampler, schedule=schedule)
    return {
        "checkpoint": name,
        "fingerprint": fingerprint(model.unet, model.autoencoder, *model.text_encoders),
        "weights": model.spec.weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "steps": model.spec.steps if steps is None else steps,
        "sampler": sampler,
        "schedule": schedule,
    }


def fingerprint(*networks: nn.Module) -> str:
    """Names networks by their weights, so that rows of one that has changed are not taken for the new one's."""
    digest = hashlib.sha256()
    for network in networks:
        for name, value in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def encode_texts(model: Model, texts: Sequence[str]) -> tuple[TextEmbedding, TextEmbedding]:
    """(texts, the empty text), each different text encoded once."""
    different = list(dict.fromkeys(texts))
    embedded = encode_text(model, [*different, ""])
    return embedded.rows([different.index(text) for text in texts]), embedded.rows([len(different)])
