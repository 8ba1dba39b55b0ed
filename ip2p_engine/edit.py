"""The main job: edit pictures by instructions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .config import with_overrides
from .devices import default_dtype, enough_memory, usable_device
from .diffusion.guidance import check_scale, needed_branches
from .diffusion.noise import SampleNoise, check_seed
from .diffusion.sampling import SAMPLERS, OnStep, ShouldStop, evaluations_of, sample
from .diffusion.schedule import SCHEDULES, make_sigmas
from .errors import ConfigError
from .files import public_name
from .images import fit, give_back, open_image, plan_size, to_images, to_tensor
from .networks.conditioning import Conditioning, decode_latents, encode_image, encode_text, size_ids
from .networks.denoiser import guided_denoiser
from .networks.model import Model, load_model
from .version import __version__

__all__ = ["EditConfig", "EditResult", "Hooks", "InstructPix2Pix", "default_dtype", "usable_device"]

Picture = str | os.PathLike | Image.Image
HOW_FAST = ("batch", "together")  # settings that no picture depends on


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a host may watch and stop."""

    on_progress: Callable[[int, int], None] | None = None
    """Called with (finished, all) results after each batch."""
    on_result: Callable[[int, EditResult], None] | None = None
    """Called with each edit and its place among the results as soon as its batch is done."""
    on_step: OnStep | None = None
    """Called with (i, n, x, sigma, denoised) once a sampling step."""
    should_stop: ShouldStop | None = None
    """Asked before each step; Interrupted is raised as soon as it says yes."""


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """How to edit; None takes the checkpoint's recommendation."""

    text_cfg: float | None = None
    """s_T: how strongly to follow the instruction, 0 to about 15."""
    image_cfg: float | None = None
    """s_I: how strongly to stay close to the picture, 0 to about 3."""
    steps: int | None = None
    sampler: str = "euler_ancestral"
    schedule: str = "model"
    size: str | tuple[int, int] = "paper"
    """paper: the 64 rule of the paper's code; keep: the picture's own size; or WxH."""
    resolution: int | None = None
    """The longer side that the paper's rule aims at."""
    batch: int = 8
    """Edits in one batch at most; a picture does not depend on it."""
    together: bool | None = None
    """The guidance branches in one batch (True), one after another (False), or as memory allows (None)."""
    restore_size: bool = True
    """Give the original width and height back."""

    def __post_init__(self) -> None:
        for name in ("text_cfg", "image_cfg"):
            if getattr(self, name) is not None:
                check_scale(name, getattr(self, name))
        for name, floor in (("steps", 1), ("resolution", 64), ("batch", 1)):
            _check_whole(name, getattr(self, name), floor)
        for name, known in (("sampler", SAMPLERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class _Settled(EditConfig):
    """A config in which nothing is left to the checkpoint."""

    text_cfg: float
    image_cfg: float
    steps: int
    resolution: int


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """One edited picture and all that is needed to make it again."""

    image: Image.Image
    source: Image.Image
    instruction: str
    seed: int
    evaluations: int
    """Network evaluations that this picture took."""
    latent: Tensor | None
    """The clean latent (4, h, w), float32, as the decoder got it; None if nothing was edited."""
    settings: dict[str, Any]


@dataclass(frozen=True)
class _Job:
    """One picture to make: its place among the results, rows of the picture and the instruction, and the seed."""

    place: int
    picture: int
    instruction: int
    seed: int


@dataclass(frozen=True)
class _Work:
    """Jobs, and the pictures and texts that they point to."""

    jobs: Sequence[_Job]
    pictures: Sequence[Image.Image]
    texts: Sequence[str]


class InstructPix2Pix:
    """A loaded checkpoint that edits pictures."""

    def __init__(self, model: Model, *, name: str = "", base: str | None = None) -> None:
        """``name`` and ``base`` are what the settings call them. Raises CheckpointError for no InstructPix2Pix."""
        model.require_edit()
        self.model, self.name, self.base = model, name, base

    @classmethod
    def load(
        cls,
        source: str | Path = "embedded",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        base: str | Path | None = None,
        **options: Any,
    ) -> InstructPix2Pix:
        """Load "embedded", a file, a diffusers folder, a Hugging Face id or a URL.

        The device defaults to a GPU if there is one, the type to half precision there and float32 elsewhere.
        ``compile`` (GPU) runs the UNet in channels_last through torch.compile with CUDA graphs.
        """
        device = usable_device(device)
        if compile and device.type != "cuda":
            raise ConfigError(f"compile is for CUDA and the device is {device.type}; leave it out")
        model = load_model(source, base=base, device=device, dtype=dtype or default_dtype(device), **options)
        editor = cls(model, name=public_name(source), base=None if base is None else public_name(base))
        if compile:
            editor.compile()
        return editor

    def compile(self) -> None:
        """Compile the UNet: channels_last, CUDA graphs; pays from the second edit of one size and guidance on."""
        self.model.unet.to(memory_format=torch.channels_last)
        self.model.unet.compile(mode="reduce-overhead")

    def edit(
        self,
        images: Picture | Sequence[Picture],
        instructions: str | Sequence[str],
        *,
        seeds: int | Sequence[int] = 0,
        config: EditConfig | None = None,
        hooks: Hooks | None = None,
        **overrides: Any,
    ) -> list[EditResult]:
        """Edit every picture by every instruction with every seed, in that order of nesting.

        Sizes may differ. Each result depends on its picture, instruction, seed and settings alone. An empty
        instruction gives the picture back, as the paper's code does. ``overrides`` are fields of EditConfig.
        Raises ImageError, ConfigError, or Interrupted once ``should_stop()`` is true.
        """
        pictures = [open_image(image) for image in _as_list(images, Image.Image | str | os.PathLike)]
        texts, seed_list = _as_list(instructions, str), _as_list(seeds, int)
        combinations = product(range(len(pictures)), range(len(texts)), seed_list)
        jobs = [_Job(place, *combination) for place, combination in enumerate(combinations)]
        settled = self._settle(with_overrides(config or EditConfig(), overrides))
        return self._run(_Work(jobs, pictures, texts), settled, hooks or Hooks())

    def edit_each(
        self,
        images: Sequence[Picture],
        instructions: Sequence[str],
        *,
        seeds: Sequence[int],
        config: EditConfig | None = None,
        hooks: Hooks | None = None,
        **overrides: Any,
    ) -> list[EditResult]:
        """Edit the n-th picture by the n-th instruction with the n-th seed; otherwise as ``edit``."""
        if not len(images) == len(instructions) == len(seeds):
            raise ConfigError(
                f"{len(images)} pictures, {len(instructions)} instructions and {len(seeds)} seeds do not pair up; "
                "give as many of each, or use edit() for every combination"
            )
        pictures = [open_image(image) for image in images]
        jobs = [_Job(n, n, n, seed) for n, seed in enumerate(seeds)]
        settled = self._settle(with_overrides(config or EditConfig(), overrides))
        return self._run(_Work(jobs, pictures, list(instructions)), settled, hooks or Hooks())

    def _run(self, work: _Work, config: _Settled, hooks: Hooks) -> list[EditResult]:
        """Make every job's picture, tell the hooks as they are made, and return them in the jobs' order."""
        if not work.jobs:
            raise ConfigError("nothing to edit; give at least one picture, one instruction and one seed")
        for job in work.jobs:
            check_seed(job.seed)
        results: dict[int, EditResult] = {}
        for batch, edited in self._made(work, config, hooks):
            for job, result in zip(batch, edited, strict=True):
                results[job.place] = result
                if hooks.on_result is not None:
                    hooks.on_result(job.place, result)
            if hooks.on_progress is not None:
                hooks.on_progress(len(results), len(work.jobs))
        return [results[place] for place in range(len(work.jobs))]

    def _made(self, work: _Work, config: _Settled, hooks: Hooks) -> Iterator[tuple[Sequence[_Job], list[EditResult]]]:
        """What needs no network, then batches of one size."""
        idle = [job for job in work.jobs if not work.texts[job.instruction].strip()]
        if idle:
            yield idle, [self._unchanged(work.pictures[job.picture], job.seed, config) for job in idle]
        busy = [job for job in work.jobs if work.texts[job.instruction].strip()]
        for size, batch in _batches(busy, work.pictures, config):
            with enough_memory(len(batch), size):
                edited = self._edit_batch(replace(work, jobs=batch), size, config, hooks)
            yield batch, edited

    def _settle(self, config: EditConfig) -> _Settled:
        """Fill what was left to the checkpoint's recommendation."""
        values = {field.name: getattr(config, field.name) for field in fields(config)}
        return _Settled(
            **{k: getattr(self.model.spec, k) if v is None and k != "together" else v for k, v in values.items()}
        )

    @torch.inference_mode()
    def _edit_batch(self, work: _Work, size: tuple[int, int], config: _Settled, hooks: Hooks) -> list[EditResult]:
        """Edit a batch of one size."""
        conditioning = self._condition(work, size)
        noise = SampleNoise([job.seed for job in work.jobs])
        sigmas = make_sigmas(config.schedule, self.model.schedule, config.steps)
        x = noise.draw(conditioning.image.float()) * float(sigmas[0])
        with guided_denoiser(self.model, config.text_cfg, config.image_cfg, together=config.together) as denoiser:
            z = sample(
                config.sampler,
                denoiser,
                x,
                sigmas,
                conditioning,
                noise=noise.draw,
                on_step=hooks.on_step,
                should_stop=hooks.should_stop,
            )
        # One at a time: the decoder takes more memory than all branches of the network, and gains nothing by batches.
        edited = [to_images(decode_latents(self.model, latent))[0] for latent in z.split(1)]
        return [
            self._result(image, latent, work.pictures[job.picture], work.texts[job.instruction], job.seed, size, config)
            for job, image, latent in zip(work.jobs, edited, z.cpu(), strict=True)
        ]

    def _condition(self, work: _Work, size: tuple[int, int]) -> Conditioning:
        """Encode each picture and each text of the batch once, then lay them out as the jobs want them."""
        used_pictures = sorted({job.picture for job in work.jobs})
        used_texts = sorted({job.instruction for job in work.jobs})
        latents = [encode_image(self.model, to_tensor([fit(work.pictures[row], size)])) for row in used_pictures]
        embedded = encode_text(self.model, [*(work.texts[row] for row in used_texts), ""])
        return Conditioning(
            text=embedded.rows([used_texts.index(job.instruction) for job in work.jobs]),
            null_text=embedded.rows([len(used_texts)]),
            image=torch.cat([latents[used_pictures.index(job.picture)] for job in work.jobs]),
            size_ids=size_ids(self.model, [size] * len(work.jobs)),
        )

    def _result(
        self,
        image: Image.Image,
        latent: Tensor,
        source: Image.Image,
        instruction: str,
        seed: int,
        size: tuple[int, int],
        config: _Settled,
    ) -> EditResult:
        branches = len(needed_branches(config.text_cfg, config.image_cfg))
        image = give_back(image, source.size) if config.restore_size else image
        if "icc_profile" in source.info:  # the numbers stayed in the source's colour space
            image.info["icc_profile"] = source.info["icc_profile"]
        return EditResult(
            image=image,
            source=source,
            instruction=instruction,
            seed=seed,
            latent=latent,
            evaluations=branches * evaluations_of(config.sampler, config.steps),
            settings=self._settings(instruction, seed, size, config),
        )

    def _unchanged(self, picture: Image.Image, seed: int, config: _Settled) -> EditResult:
        settings = self._settings("", seed, picture.size, config)
        return EditResult(
            image=picture.copy(),
            source=picture,
            instruction="",
            seed=seed,
            evaluations=0,
            latent=None,
            settings=settings,
        )

    def _settings(self, instruction: str, seed: int, size: tuple[int, int], config: _Settled) -> dict[str, Any]:
        values = asdict(config)
        return {
            "instruction": instruction,
            "seed": seed,
            **{name: value for name, value in values.items() if name not in HOW_FAST},
            "edited_at": list(size),
            "checkpoint": self.name,
            "base": self.base,
            "weights": self.model.spec.weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "ip2p_engine": __version__,
            "torch": torch.__version__,
        }


def _batches(
    jobs: Sequence[_Job], pictures: Sequence[Image.Image], config: _Settled
) -> Iterator[tuple[tuple[int, int], list[_Job]]]:
    """Jobs of one size together, at most config.batch of them."""
    by_size: dict[tuple[int, int], list[_Job]] = {}
    for job in jobs:
        size = plan_size(config.size, *pictures[job.picture].size, config.resolution)
        by_size.setdefault(size, []).append(job)
    for size, members in by_size.items():
        for start in range(0, len(members), config.batch):
            yield size, members[start : start + config.batch]


def _as_list(value: Any, single: Any) -> list:
    return [value] if isinstance(value, single) else list(value)


def _check_whole(name: str, value: Any, floor: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < floor):
        raise ConfigError(f"{name} is {value!r}; give a whole number of at least {floor}")
