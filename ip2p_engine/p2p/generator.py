"""Pairs of pictures from pairs of captions: Prompt-to-Prompt as the paper makes its data set (section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoint.report import ACTIVATIONS_PER_PIXEL
from ..config import as_list, with_overrides
from ..devices import free_memory
from ..diffusion.guidance import check_scale
from ..diffusion.noise import SampleNoise, check_seed
from ..diffusion.sampling import Sampler, named, sample, sampler_of
from ..diffusion.schedule import SCHEDULES, make_sigmas
from ..errors import CheckpointError, ConfigError
from ..files import public_name
from ..hooks import Hooks
from ..images import MAX_SIDE
from ..networks.compiled import compile_unet
from ..networks.conditioning import decode_pictures, encode_text, size_ids
from ..networks.model import Model, load_model
from ..version import __version__
from .cross_attention import CROSS_MODES, CrossControl, check_reweight, control_of
from .denoiser import PairConditioning, PairDenoiser

__all__ = [
    "PAIR_MODES",
    "PairCandidate",
    "PairConfig",
    "PairGenerator",
    "PairJob",
    "Preview",
    "draw_settings",
    "pairs_that_fit",
]

PAIR_MODES = ("self", *CROSS_MODES)
ROWS_PER_PAIR = 4
DECODED_AT_ONCE = 16
USABLE_MEMORY = 0.6
MOST_PAIRS = 64
MOST = 1000  # steps, and pairs in a batch that is asked for


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """How to make pairs; the defaults are the paper's."""

    steps: int = 100
    sampler: str | Sampler = "euler_ancestral"
    schedule: str = "model"
    size: tuple[int, int] | None = None
    """(width, height) in pixels; None is the checkpoint's square."""
    p2p_range: tuple[float, float] = (0.1, 0.9)
    """p is drawn from here: the fraction of the steps that share self-attention. Equal ends fix it; 0 is off."""
    cfg_range: tuple[float, float] = (7.5, 15.0)
    """w, the guidance scale, is drawn from here. Equal ends fix it."""
    edited_prompt_start: float = 0.0
    """The fraction of the steps in which the edited picture still follows the source's caption, 0 to 1."""
    mode: str = "self"
    """self: the paper's. replace, refine: edit the cross-attention as well (Hertz et al. 2022)."""
    cross_steps: float = 0.8
    """The fraction of the steps in which cross-attention is edited; not in mode self."""
    reweight: dict[str, float] | None = None
    """Factors for words of the edited caption; not in mode self."""
    local_blend: bool = False
    """Keep the source where the changed words do not look."""
    blend_words: tuple[str, str] | None = None
    """The words of the local blend in both captions; None are those in which the captions differ."""
    blend_start: float = 0.2
    """The fraction of the steps after which the local blend starts."""
    batch_pairs: int | None = None
    """Pairs in one batch at most; None is what the free memory holds. A pair does not depend on it."""

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch_pairs", self.batch_pairs)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST):
                raise ConfigError(f"{name} is {value!r}; give a whole number from 1 to {MOST}")
        sampler_of(self.sampler)
        for name, known in (("schedule", SCHEDULES), ("mode", PAIR_MODES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        for name in ("p2p_range", "cfg_range"):
            _check_range(name, getattr(self, name))
        for name in ("edited_prompt_start", "cross_steps", "blend_start"):
            if check_scale(name, getattr(self, name)) > 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a fraction of the steps, 0 to 1")
        if self.mode == "self" and self.reweight:
            raise ConfigError("mode 'self' does not edit cross-attention, so reweight has no effect; use mode 'refine'")


@dataclass(frozen=True, kw_only=True)
class PairJob:
    """One pair to make."""

    caption: str
    edited_caption: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class PairCandidate:
    """One pair of pictures, before any filter, and all that is needed to make it again."""

    source_image: Image.Image
    edited_image: Image.Image
    caption: str
    edited_caption: str
    seed: int
    p2p_threshold: float
    """p: self-attention was shared while p > i / (n - 1)."""
    cfg: float
    """w: the guidance scale."""
    latents: Tensor
    """Clean latents of source and edited, (2, 4, h, w), float32, as the decoder got them."""
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A look at unfinished pairs that may drop some; the rest is as if nobody had looked."""

    at: float
    """The fraction of the steps after which to look."""
    judge: Callable[[Sequence[PairJob], Tensor], list[int]]
    """The rows that go on, by the predicted clean latents (B, 2, 4, h, w) of the batch."""

    def step(self, config: PairConfig) -> int:
        """How many steps come first, at least one and not all; raises ConfigError where there is no such moment."""
        if config.steps < 2 or named(config.sampler).startswith("dpmpp"):
            got = f"an early look after some of {config.steps} steps of {config.sampler} is not possible"
            raise ConfigError(
                f"{got}; give at least 2 steps, and a sampler that keeps nothing of its last step, as euler"
            )
        return min(max(1, round(self.at * config.steps)), config.steps - 1)


@dataclass(frozen=True)
class _Walk:
    """What a batch walks with."""

    sigmas: Tensor
    noise: SampleNoise
    hooks: Hooks


def draw_settings(
    seed: int, p2p_range: tuple[float, float] = (0.1, 0.9), cfg_range: tuple[float, float] = (7.5, 15.0)
) -> tuple[float, float]:
    """(p, w) of a seed: the first two uniforms of a CPU generator, as the paper's code draws them on a GPU.

    Raises ConfigError for a seed outside 0 .. 2**63 - 1.
    """
    generator = torch.Generator().manual_seed(check_seed(seed))
    p, w = (low + torch.rand((), generator=generator).item() * (high - low) for low, high in (p2p_range, cfg_range))
    return p, w


class PairGenerator:
    """A text-to-image checkpoint that makes candidates for a data set of edits."""

    def __init__(self, model: Model, config: PairConfig | None = None, *, name: str = "") -> None:
        """Raises CheckpointError if the model does not make pictures from text, ConfigError for a size it cannot."""
        if model.spec.in_channels != 4:
            raise CheckpointError(
                f"this checkpoint's UNet takes {model.spec.in_channels} input channels, and pairs are made by a "
                "text-to-image model, which takes 4; load one, e.g. Stable Diffusion 1.5, or embedded-sd"
            )
        self.model, self.config, self.name = model, config or PairConfig(), name
        self.size = self.config.size or (model.spec.resolution, model.spec.resolution)
        multiple = 8 * 2 ** (len(model.unet.config.block_out_channels) - 1)
        if len(self.size) != 2 or any(side not in range(multiple, MAX_SIDE + 1, multiple) for side in self.size):
            what = f"multiples of {multiple} up to {MAX_SIDE}"
            raise ConfigError(f"size is {self.size}; give a width and a height that are {what}")

    @classmethod
    def load(
        cls,
        source: str | Path = "embedded-sd",
        config: PairConfig | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        weights: str = "ema",
        base: str | Path | None = None,
        compile: bool = False,
        **overrides: Any,
    ) -> PairGenerator:
        """Load "embedded-sd", a file, a diffusers folder, a hub id or a URL; device, type, weights as for editing.

        ``compile`` compiles the UNet's repeated blocks. ``overrides`` are fields of PairConfig.
        """
        config = with_overrides(config or PairConfig(), overrides)
        model = load_model(source, device=device, dtype=dtype, weights=weights, base=base)
        generator = cls(model, config, name=public_name(source))
        if compile:
            generator.compile()
        return generator

    def compile(self, *, backend: str = "inductor") -> None:
        """Compile the UNet's repeated blocks, one shape whatever pairs share.

        Raises ConfigError where nothing can compile, and where cross-attention changes from step to step.
        """
        if self.config.mode in CROSS_MODES or self.config.local_blend:
            got = "a local blend" if self.config.local_blend else f"mode {self.config.mode!r}"
            raise ConfigError(
                f"{got} tells each step's cross-attention something else and is not compiled; leave it out"
            )
        compile_unet(self.model, "repeated", backend=backend)

    def generate(
        self, caption: str, edited_caption: str, seeds: int | Sequence[int] = 0, *, hooks: Hooks | None = None
    ) -> list[PairCandidate]:
        """Candidates of one caption pair, one a seed, in the seeds' order; each depends on its seed alone.

        ``hooks.on_progress`` counts pairs. Raises ConfigError, or Interrupted once ``hooks.should_stop()``.
        """
        check_reweight(self.config.reweight, [edited_caption])
        jobs = [PairJob(caption=caption, edited_caption=edited_caption, seed=seed) for seed in as_list(seeds, int)]
        return [candidate for batch in self.batches(jobs, hooks=hooks) for candidate in batch]

    def batches(
        self,
        jobs: Sequence[PairJob],
        *,
        batch_pairs: int | None = None,
        preview: Preview | None = None,
        hooks: Hooks | None = None,
    ) -> Iterator[list[PairCandidate]]:
        """Candidates of any captions, batch by batch in the jobs' order, so that finished ones are safe early.

        ``batch_pairs`` overrides the config's; candidates that a ``preview`` drops are left out.
        """
        watch = hooks or Hooks()
        for start, rows, z in self.walks(jobs, batch_pairs=batch_pairs, preview=preview, hooks=watch):
            batch = self.candidates([jobs[start + row] for row in rows], z)
            for row, candidate in zip(rows, batch, strict=True):
                watch.result(start + row, candidate)
            yield batch

    def walks(
        self,
        jobs: Sequence[PairJob],
        *,
        batch_pairs: int | None = None,
        preview: Preview | None = None,
        hooks: Hooks | None = None,
    ) -> Iterator[tuple[int, list[int], Tensor]]:
        """Batch by batch (its first job's place, the rows of its jobs that were finished, their clean latents).

        For ``candidates``, which can be made of them while the next batch walks. ``hooks.on_progress`` counts pairs.
        """
        if not jobs:
            raise ConfigError("no pair to make; give at least one seed")
        for job in jobs:
            check_seed(job.seed)
        count, watch = batch_pairs or self.batch_pairs(), hooks or Hooks()
        for start in range(0, len(jobs), count):
            yield start, *self._walk(jobs[start : start + count], watch, preview)
            watch.progress(min(start + count, len(jobs)), len(jobs))

    def batch_pairs(self) -> int:
        """Pairs in one batch: the config's, or what the free memory holds now."""
        return self.config.batch_pairs or pairs_that_fit(self.model, self.size)

    def check(self, caption: str, edited_caption: str) -> None:
        """Raise ConfigError for captions that the mode cannot edit, such as a swap of words of unequal number."""
        self._control([PairJob(caption=caption, edited_caption=edited_caption, seed=0)])

    def latents(self, jobs: Sequence[PairJob], *, hooks: Hooks | None = None) -> Tensor:
        """Clean latents (B, 2, 4, h, w) of one batch of pairs, source and edited, before they are decoded."""
        return self._walk(jobs, hooks or Hooks(), None)[1]

    @torch.inference_mode()
    def _walk(self, jobs: Sequence[PairJob], hooks: Hooks, preview: Preview | None) -> tuple[list[int], Tensor]:
        """(rows of the jobs that were finished, their clean latents (B, 2, 4, h, w))."""
        noise, rows, cross = SampleNoise([job.seed for job in jobs]), list(range(len(jobs))), self._control(jobs)
        walk = _Walk(make_sigmas(self.config.schedule, self.model.schedule, self.config.steps), noise, hooks)
        start = torch.empty(len(jobs), 4, self.size[1] // 8, self.size[0] // 8, device=self.model.device)
        x = noise.draw(start).repeat_interleave(2, dim=0) * float(walk.sigmas[0])
        first = 0
        if preview is not None:
            first = preview.step(self.config)
            x, denoised = self._stretch(walk, (0, first), x, jobs, rows, cross)
            rows = preview.judge(jobs, denoised.unflatten(0, (-1, 2)))
            x, jobs, cross = x.unflatten(0, (-1, 2))[rows].flatten(0, 1), [jobs[row] for row in rows], cross.rows(rows)
        if rows:
            x, _ = self._stretch(walk, (first, self.config.steps), x, jobs, rows, cross)
        return rows, x.unflatten(0, (-1, 2))

    def _stretch(
        self,
        walk: _Walk,
        span: tuple[int, int],
        x: Tensor,
        jobs: Sequence[PairJob],
        rows: Sequence[int],
        cross: CrossControl,
    ) -> tuple[Tensor, Tensor]:
        """(x after the steps from span[0] up to span[1], the clean latents that the last of them predicted)."""
        (first, last), steps, seen = span, self.config.steps, [x]
        draw, chosen = walk.noise.ahead(last - first), torch.tensor(rows, device=x.device)

        def on_step(step: int, _: int, x: Tensor, sigma: float, denoised: Tensor) -> None:
            seen[0] = denoised
            if walk.hooks.on_step is not None:
                walk.hooks.on_step(first + step, steps, x, sigma, denoised)

        arrived = sample(
            self.config.sampler,
            PairDenoiser(self.model, walk.sigmas, cross),
            x,
            walk.sigmas[first : last + 1],
            self._condition(jobs),
            noise=lambda like: draw(like[::2])[chosen].repeat_interleave(2, dim=0),
            after_step=cross.after_step(self.config.blend_start * steps - first),
            hooks=replace(walk.hooks, on_step=on_step),
        )
        return arrived, seen[0]

    def draw(self, seed: int) -> tuple[float, float]:
        """(p, w) that this generator gives a seed."""
        return draw_settings(seed, self.config.p2p_range, self.config.cfg_range)

    def _condition(self, jobs: Sequence[PairJob]) -> PairConditioning:
        """Encode each caption of the batch once."""
        captions = sorted({text for job in jobs for text in (job.caption, job.edited_caption)} - {""})
        texts = ["", *captions]
        drawn = [self.draw(job.seed) for job in jobs]
        cross = self.config.mode in CROSS_MODES
        return PairConditioning(
            texts=encode_text(self.model, texts),
            source_rows=tuple(texts.index(job.caption) for job in jobs),
            edited_rows=tuple(texts.index(job.edited_caption) for job in jobs),
            p2p_thresholds=tuple(p for p, _ in drawn),
            cfg=tuple(w for _, w in drawn),
            edited_prompt_start=self.config.edited_prompt_start,
            cross_steps=self.config.cross_steps if cross else 0.0,
            size_ids=size_ids(self.model, [self.size]),
        )

    def _control(self, jobs: Sequence[PairJob]) -> CrossControl:
        """What is done to the cross-attention of a batch."""
        levels = len(self.model.unet.config.block_out_channels)
        captions = [(job.caption, job.edited_caption) for job in jobs]
        return control_of(self.config, captions, self.size, levels=levels, device=self.model.device)

    def pictures(self, z: Tensor) -> list[tuple[Image.Image, Image.Image]]:
        """(source, edited) of clean latents (B, 2, 4, h, w), decoded as many at once as fit."""
        decoded = decode_pictures(self.model, z.flatten(0, 1), DECODED_AT_ONCE)
        return list(zip(decoded[::2], decoded[1::2], strict=True))

    def candidates(self, jobs: Sequence[PairJob], z: Tensor) -> list[PairCandidate]:
        """The pairs of clean latents (B, 2, 4, h, w) that ``walks`` gave, decoded, each with its settings."""
        if not jobs:
            return []
        triples = zip(jobs, self.pictures(z), z.cpu(), strict=True)
        return [self._candidate(job, images, latents) for job, images, latents in triples]

    def _candidate(self, job: PairJob, images: tuple[Image.Image, Image.Image], latents: Tensor) -> PairCandidate:
        p, w = self.draw(job.seed)
        return PairCandidate(
            source_image=images[0],
            edited_image=images[1],
            caption=job.caption,
            edited_caption=job.edited_caption,
            seed=job.seed,
            p2p_threshold=p,
            cfg=w,
            latents=latents,
            settings={"seed": job.seed, "p2p_threshold": p, "cfg": w, **self._settings()},
        )

    def _settings(self) -> dict[str, Any]:
        """What all pairs of this generator have in common; how they were batched is no part of it."""
        values = {name: value for name, value in asdict(self.config).items() if name != "batch_pairs"}
        return {
            **values,
            "size": list(self.size),
            "checkpoint": self.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "ip2p_engine": __version__,
            "torch": torch.__version__,
        }


def pairs_that_fit(model: Model, size: tuple[int, int]) -> int:
    """How many pairs of that (width, height) the free memory holds at once, at most 64.

    A power of two, so that small changes of the free memory change nothing; past 64 there is little to gain, and more
    to lose when a run is stopped.
    """
    latent_pixels = size[0] * size[1] // 64
    width = model.unet.config.block_out_channels[0]
    a_pair = ROWS_PER_PAIR * latent_pixels * width * ACTIVATIONS_PER_PIXEL * model.dtype.itemsize
    fitting = min(MOST_PAIRS, max(1, int(USABLE_MEMORY * free_memory(model.device) / a_pair)))
    return 1 << (fitting.bit_length() - 1)


def _check_range(name: str, values: tuple[float, float]) -> None:
    if len(values) != 2 or check_scale(name, values[0]) > check_scale(name, values[1]):
        raise ConfigError(f"{name} is {values}; give the lower and the upper end, both at least 0")
