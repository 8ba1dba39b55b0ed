"""The main job: edit pictures by instructions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .config import as_list, with_overrides
from .devices import enough_memory, usable_device
from .diffusion.guidance import Denoiser, DualGuidance, Guidance, check_scale
from .diffusion.noise import SampleNoise, check_seed
from .diffusion.sampling import Sampler, named, sample, sampler_of
from .diffusion.schedule import SCHEDULES, make_sigmas
from .errors import ConfigError
from .files import public_name
from .hooks import Hooks
from .images import Picture, fit, give_back, open_image, plan_size, to_images, to_tensor, upright_size
from .networks.conditioning import Conditioning, decode_latents, encode_image, encode_text, size_ids
from .networks.denoiser import BranchDenoiser
from .networks.model import Model, load_model
from .version import __version__

__all__ = ["EditConfig", "EditResult", "InstructPix2Pix", "walk"]

HOW_FAST = ("batch", "together")  # settings that no picture depends on


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """How to edit; None takes the checkpoint's recommendation."""

    text_cfg: float | None = None
    """s_T: how strongly to follow the instruction, 0 to about 15."""
    image_cfg: float | None = None
    """s_I: how strongly to stay close to the picture, 0 to about 3."""
    steps: int | None = None
    sampler: str | Sampler = "euler_ancestral"
    """A name of SAMPLERS, or a function that takes a Step and returns x at its next sigma."""
    schedule: str = "model"
    guidance: Guidance | None = None
    """Makes the denoiser over the branches c, i, u and t; None is dual guidance by the two scales."""
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
        for name, floor, most in (("steps", 1, 1000), ("resolution", 64, 4096), ("batch", 1, 1024)):
            _check_whole(name, getattr(self, name), floor, most)
        sampler_of(self.sampler)
        if self.guidance is not None and not callable(self.guidance):
            raise ConfigError(f"guidance is {self.guidance!r}; give a function that makes a denoiser over branches")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule {self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")


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
    index: int = 0
    """Its place among the results that were asked for."""


@dataclass(frozen=True)
class _Job:
    """One picture to make: its place among the results, rows of the picture and the instruction, and the seed."""

    place: int
    picture: int
    instruction: int
    seed: int


@dataclass(frozen=True)
class _Work:
    """Jobs, and the pictures and texts that they point to; pictures that are no Image yet are opened batch by batch."""

    jobs: Sequence[_Job]
    pictures: Sequence[Picture]
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
        model = load_model(source, base=base, device=device, dtype=dtype, **options)
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
        Raises ImageError, ConfigError, or Interrupted once ``hooks.should_stop()``.
        """
        pictures = [open_image(image) for image in as_list(images, Picture)]
        made = self.edits(pictures, instructions, seeds=seeds, config=config, hooks=hooks, **overrides)
        return sorted(made, key=lambda result: result.index)

    def edits(
        self,
        images: Picture | Sequence[Picture],
        instructions: str | Sequence[str],
        *,
        seeds: int | Sequence[int] = 0,
        config: EditConfig | None = None,
        hooks: Hooks | None = None,
        **overrides: Any,
    ) -> Iterator[EditResult]:
        """The results of ``edit`` as they are made, of which it holds one batch: memory does not grow with them.

        Pictures of one size are made together, so the order is not that of asking; ``index`` says the place. Files
        are opened when their batch is made.
        """
        pictures, texts = as_list(images, Picture), as_list(instructions, str)
        combinations = product(range(len(pictures)), range(len(texts)), as_list(seeds, int))
        jobs = [_Job(place, *combination) for place, combination in enumerate(combinations)]
        return self._run(_Work(jobs, pictures, texts), self._settle(config, overrides), hooks or Hooks())

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
        work = _Work(
            [_Job(n, n, n, seed) for n, seed in enumerate(seeds)],
            [open_image(image) for image in images],
            list(instructions),
        )
        made = self._run(work, self._settle(config, overrides), hooks or Hooks())
        return sorted(made, key=lambda result: result.index)

    def condition(
        self,
        images: Picture | Sequence[Picture],
        instructions: str | Sequence[str],
        *,
        config: EditConfig | None = None,
        **overrides: Any,
    ) -> Conditioning:
        """What edits are conditioned on: a row for each picture with its instruction; one of either goes with all.

        All pictures have to come to one size. ``overrides`` are fields of EditConfig, of which ``size`` and
        ``resolution`` count. Raises ImageError or ConfigError.
        """
        settled = self._settle(config, overrides)
        pictures = [open_image(image) for image in as_list(images, Picture)]
        texts = as_list(instructions, str)
        count = max(len(pictures), len(texts))
        if not pictures or not texts or {len(pictures), len(texts)} - {1, count}:
            got = f"{len(pictures)} pictures and {len(texts)} instructions"
            raise ConfigError(f"{got} do not pair up; give as many of each, or one of either")
        sizes = sorted({plan_size(settled.size, *picture.size, settled.resolution) for picture in pictures})
        if len(sizes) > 1:
            raise ConfigError(f"the pictures come to {sizes[0]} and {sizes[1]}; give one size, or one at a time")
        jobs = [_Job(n, n % len(pictures), n % len(texts), 0) for n in range(count)]
        return self._condition(_Work(jobs, pictures, texts), sizes[0])

    def denoiser(self, config: EditConfig | None = None, **overrides: Any) -> Denoiser:
        """The network under guidance, denoiser(x, sigma, condition) -> denoised; ``overrides`` as for ``edit``."""
        settled = self._settle(config, overrides)
        return _guidance_of(settled)(BranchDenoiser(self.model, together=settled.together))

    def latents(
        self,
        condition: Conditioning,
        seeds: int | Sequence[int],
        *,
        config: EditConfig | None = None,
        hooks: Hooks | None = None,
        **overrides: Any,
    ) -> Tensor:
        """Clean latents (B, 4, h, w), float32, of a condition's rows, each with its seed, in one batch."""
        settled = self._settle(config, overrides)
        return self._walk(condition, as_list(seeds, int), settled, hooks or Hooks())[0]

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """The pictures of clean latents (B, 4, h, w)."""
        # One at a time: the decoder takes more memory than all branches of the network, and gains nothing by batches.
        return [to_images(decode_latents(self.model, latent))[0] for latent in latents.split(1)]

    def _run(self, work: _Work, config: _Settled, hooks: Hooks) -> Iterator[EditResult]:
        """Make every job's picture, batch by batch, and tell the hooks."""
        if not work.jobs:
            raise ConfigError("nothing to edit; give at least one picture, one instruction and one seed")
        for job in work.jobs:
            check_seed(job.seed)
        return self._made(work, config, hooks)

    def _made(self, work: _Work, config: _Settled, hooks: Hooks) -> Iterator[EditResult]:
        finished = 0
        for size, jobs in _batches(work, config):
            rows = sorted({job.picture for job in jobs})
            opened = {row: _opened(work.pictures[row]) for row in rows}
            batch = _Work(
                [replace(job, picture=rows.index(job.picture)) for job in jobs], list(opened.values()), work.texts
            )
            if size is None:
                edited = [self._unchanged(opened[job.picture], job, config) for job in jobs]
            else:
                with enough_memory(len(jobs), size):
                    edited = self._edit_batch(batch, size, config, hooks)
            for result in edited:
                finished += 1
                hooks.result(result.index, result)
                yield result
            hooks.progress(finished, len(work.jobs))

    def _settle(self, config: EditConfig | None, overrides: dict[str, Any]) -> _Settled:
        """A config with its overrides, and what it leaves to the checkpoint's recommendation filled in."""
        given = with_overrides(config or EditConfig(), overrides)
        values = {field.name: getattr(given, field.name) for field in fields(given)}
        for name in ("text_cfg", "image_cfg", "steps", "resolution"):
            values[name] = getattr(self.model.spec, name) if values[name] is None else values[name]
        return _Settled(**values)

    @torch.inference_mode()
    def _edit_batch(self, work: _Work, size: tuple[int, int], config: _Settled, hooks: Hooks) -> list[EditResult]:
        """Edit a batch of one size."""
        z, evaluations = self._walk(self._condition(work, size), [job.seed for job in work.jobs], config, hooks)
        return [
            self._result(job, work, image, latent, evaluations, size, config)
            for job, image, latent in zip(work.jobs, self.pictures(z), z.cpu(), strict=True)
        ]

    def _walk(
        self, condition: Conditioning, seeds: Sequence[int], config: _Settled, hooks: Hooks
    ) -> tuple[Tensor, int]:
        sigmas = make_sigmas(config.schedule, self.model.schedule, config.steps)
        together, guidance = config.together, _guidance_of(config)
        return walk(
            self.model, condition, seeds, sigmas, guidance, sampler=config.sampler, together=together, hooks=hooks
        )

    @torch.inference_mode()
    def _condition(self, work: _Work, size: tuple[int, int]) -> Conditioning:
        """Encode each picture and each text of the batch once, then lay them out as the jobs want them."""
        used_pictures = sorted({job.picture for job in work.jobs})
        used_texts = sorted({job.instruction for job in work.jobs})
        pictures = [fit(_opened(work.pictures[row]), size) for row in used_pictures]
        latents = [encode_image(self.model, to_tensor([picture])) for picture in pictures]
        embedded = encode_text(self.model, [*(work.texts[row] for row in used_texts), ""])
        return Conditioning(
            text=embedded.rows([used_texts.index(job.instruction) for job in work.jobs]),
            null_text=embedded.rows([len(used_texts)]),
            image=torch.cat([latents[used_pictures.index(job.picture)] for job in work.jobs]),
            size_ids=size_ids(self.model, [size] * len(work.jobs)),
        )

    def _result(
        self,
        job: _Job,
        work: _Work,
        image: Image.Image,
        latent: Tensor,
        evaluations: int,
        size: tuple[int, int],
        config: _Settled,
    ) -> EditResult:
        source, instruction = _opened(work.pictures[job.picture]), work.texts[job.instruction]
        image = give_back(image, source.size) if config.restore_size else image
        if "icc_profile" in source.info:  # the numbers stayed in the source's colour space
            image.info["icc_profile"] = source.info["icc_profile"]
        return EditResult(
            image=image,
            source=source,
            instruction=instruction,
            seed=job.seed,
            latent=latent,
            evaluations=evaluations,
            settings=self._settings(instruction, job.seed, size, config),
            index=job.place,
        )

    def _unchanged(self, picture: Image.Image, job: _Job, config: _Settled) -> EditResult:
        return EditResult(
            image=picture.copy(),
            source=picture,
            instruction="",
            seed=job.seed,
            evaluations=0,
            latent=None,
            settings=self._settings("", job.seed, picture.size, config),
            index=job.place,
        )

    def _settings(self, instruction: str, seed: int, size: tuple[int, int], config: _Settled) -> dict[str, Any]:
        values = asdict(config)
        return {
            "instruction": instruction,
            "seed": seed,
            **{name: named(value) for name, value in values.items() if name not in HOW_FAST},
            "edited_at": list(size),
            "checkpoint": self.name,
            "base": self.base,
            "weights": self.model.spec.weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "ip2p_engine": __version__,
            "torch": torch.__version__,
        }


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
    together: bool | None = None,
    hooks: Hooks | None = None,
) -> tuple[Tensor, int]:
    """(clean latents (B, 4, h, w), evaluations a sample) of a batch that walks down the sigmas.

    From noise of sigmas[0] on ``start`` (B, 4, h, w), or on nothing; each row has the noise of its seed. The
    condition's image may have no channels: then the model is one from text to image.
    """
    if len(seeds) != len(condition.image):
        got = f"{len(seeds)} seeds for a condition of {len(condition.image)} rows"
        raise ConfigError(f"{got}; give one seed for each row")
    noise, branches = SampleNoise(seeds), BranchDenoiser(model, together=together, sigmas=sigmas.tolist())
    blank = torch.zeros(len(seeds), 4, *condition.image.shape[-2:], device=condition.image.device)
    x = noise.draw(blank) * float(sigmas[0])
    x = x if start is None else x + start.to(x)
    z = sample(sampler, guidance(branches), x, sigmas, condition, noise=noise.ahead(len(sigmas) - 1), hooks=hooks)
    return z, branches.evaluations


def _guidance_of(config: _Settled) -> Guidance:
    return config.guidance or (lambda branches: DualGuidance(branches, config.text_cfg, config.image_cfg))


def _opened(picture: Picture) -> Image.Image:
    """A picture that is opened already as it is, else a new one."""
    return picture if isinstance(picture, Image.Image) else open_image(picture)


def _batches(work: _Work, config: _Settled) -> Iterator[tuple[tuple[int, int] | None, list[_Job]]]:
    """Jobs of one size together, at most config.batch of them; size None: there is nothing to do."""
    sizes = [picture.size if isinstance(picture, Image.Image) else upright_size(picture) for picture in work.pictures]
    by_size: dict[tuple[int, int] | None, list[_Job]] = {None: []}
    for job in work.jobs:
        busy = work.texts[job.instruction].strip()
        size = plan_size(config.size, *sizes[job.picture], config.resolution) if busy else None
        by_size.setdefault(size, []).append(job)
    for size, members in by_size.items():
        for start in range(0, len(members), config.batch):
            yield size, members[start : start + config.batch]


def _check_whole(name: str, value: Any, floor: int, most: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not floor <= value <= most):
        raise ConfigError(f"{name} is {value!r}; give a whole number from {floor} to {most}")
