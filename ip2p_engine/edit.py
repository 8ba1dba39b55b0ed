"""The main job: edit pictures by instructions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .checkpoint.added import Word
from .checkpoint.lora import Lora, with_loras
from .config import as_list, with_overrides
from .devices import default_dtype, enough_memory, usable_device
from .diffusion.area import NOISES, SIGMAS, area_of, relevance, set_back
from .diffusion.guidance import FORMULAS, Denoiser, Guidance, guidance_of
from .diffusion.mask import latent_mask
from .diffusion.noise import check_seed
from .diffusion.sampling import named
from .diffusion.schedule import make_sigmas
from .edit_config import HOW_FAST, SCALES, EditConfig, Settled
from .errors import ConfigError, ImageError
from .files import base_name, public_name
from .hooks import Hooks
from .images import Picture, fit, open_image, open_mask, pixels_digest, plan_size, to_tensor, upright_size
from .jobs import Job, Work, batches_of, by_row
from .networks.added import with_autoencoder, with_words
from .networks.compiled import compile_unet
from .networks.conditioning import Conditioning, clean_latents, decode_pictures, encode_image, encode_text, size_ids
from .networks.control import Control, ControlNet, hint_of, load_control
from .networks.denoiser import BranchDenoiser
from .networks.digest import digest_of_values, digest_of_weights
from .networks.model import Model, load_model
from .networks.walk import walk
from .pictures import EditResult, Fitted, Opener, area_pictures, opened, whole_area
from .tokenizer import check_length
from .version import __version__

__all__ = ["EditConfig", "EditResult", "InstructPix2Pix"]

DECODED_AT_ONCE = 4
LOOKS = 2 * NOISES * len(SIGMAS)  # evaluations of finding an area


class InstructPix2Pix:
    """A loaded checkpoint that edits pictures."""

    def __init__(self, model: Model, *, name: str = "", base: str | None = None) -> None:
        """``name`` and ``base`` are what the settings call them. Raises CheckpointError unless
        the model is an InstructPix2Pix."""
        model.require_edit()
        self.model, self.name, self.base = model, name, base
        self.loras: tuple[Lora, ...] = ()
        self.words: tuple[Word, ...] = ()
        self.control: ControlNet | None = None
        self._vae: dict[str, Any] | None = None
        self._plain = model

    @classmethod
    def load(
        cls,
        source: str | Path = "embedded",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        compile_mode: str = "repeated",
        base: str | Path | None = None,
        loras: Sequence[Lora] = (),
        vae: str | Path | None = None,
        embeddings: Sequence[str | Path] = (),
        control: str | Path | None = None,
        low_memory: bool = False,
        **options: Any,
    ) -> InstructPix2Pix:
        """Load "embedded", a file, a diffusers folder, a Hugging Face id or a URL.

        The device defaults to a GPU if there is one, the type to half precision there and float32 elsewhere.
        ``vae``, ``embeddings``, ``loras`` and ``control`` are as for ``load_vae`` and the others.
        ``low_memory``: what does not run waits in the host's memory: slower, and equal pictures.
        ``compile`` compiles the UNet as ``compile_mode`` says, repeated or max (``InstructPix2Pix.compile``).
        """
        if compile and low_memory:
            raise ConfigError("what is compiled stays on the device; leave out compile or low_memory")
        device = usable_device(device)
        home = torch.device("cpu") if low_memory else device
        model = load_model(source, base=base, device=home, dtype=dtype or default_dtype(device), **options)
        model = model.with_little_memory(device) if low_memory else model
        editor = cls(model, name=public_name(source), base=None if base is None else public_name(base))
        if vae is not None:
            editor.load_vae(vae)
        if embeddings:
            editor.load_embeddings(*embeddings)
        for lora in loras:
            editor.load_lora(lora.path, lora.weight)
        if control is not None:
            editor.load_control(control)
        if compile:
            editor.compile(compile_mode)
        return editor

    def load_lora(self, path: str | Path, weight: float = 1.0) -> None:
        """Add a LoRA to those that are loaded: kohya's, diffusers' and peft's files, UNet and text encoders.

        From now on ``model`` is another one, with the LoRAs merged into its weights. Raises CheckpointError.
        """
        self._rest()
        loras = (*self.loras, Lora(path=Path(path), weight=weight))
        self.model, self.loras = with_loras(self._plain, loras), loras

    def unload_loras(self) -> None:
        """Take all LoRAs away: ``model`` is the one that was loaded, to the bit."""
        self.model, self.loras = self._plain, ()

    def load_vae(self, source: str | Path) -> None:
        """Use another autoencoder: a file, a folder, a hub id or a URL. Raises CheckpointError."""
        self._replace_plain(with_autoencoder(self._plain, source))
        digest = digest_of_values(self.model.autoencoder)
        self._vae = {"name": base_name(public_name(source)), "digest": digest}

    def load_embeddings(self, *paths: str | Path) -> None:
        """Know more words (textual inversion): ``embedding:NAME`` in an instruction, or the word that the file says.

        Files of A1111 (.pt, .safetensors) and of diffusers, for both text encoders of SDXL. Raises CheckpointError.
        """
        model, words = with_words(self._plain, [Path(path).expanduser() for path in paths])
        self._replace_plain(model)
        self.words += words

    def load_control(self, source: str | Path) -> None:
        """Let edits be controlled by a ControlNet, which acts where ``control_images`` are given.

        A file, a diffusers folder, a hub id or a URL, of SD1.5, SD2 or SDXL. Raises CheckpointError.
        """
        self.control = load_control(source, self.model)

    def _rest(self) -> None:
        """With little memory: all networks back in the host's, before others are made of them."""
        if self.model.offload is not None:
            self.model.offload.rest()

    def _replace_plain(self, model: Model) -> None:
        self._rest()
        _ = self._digest  # of the checkpoint, before anything is added to it
        self.model, self._plain = with_loras(model, self.loras) if self.loras else model, model

    def compile(self, mode: str = "repeated", *, backend: str = "inductor") -> None:
        """Compile the UNet's repeated blocks, or with "max" all of it, on CUDA with graphs: for many edits of one size.

        A compiled editor may be used from several threads, whose network calls then come one after another. Raises
        ConfigError for another mode, and where nothing can compile.
        """
        compile_unet(self.model, mode, backend=backend)

    def edit(
        self,
        images: Picture | Sequence[Picture],
        instructions: str | Sequence[str],
        *,
        seeds: int | Sequence[int] = 0,
        masks: Picture | Sequence[Picture | None] | None = None,
        control_images: Picture | Sequence[Picture] | None = None,
        config: EditConfig | None = None,
        hooks: Hooks | None = None,
        **overrides: Any,
    ) -> list[EditResult]:
        """Edit every picture by every instruction with every seed, in that order of nesting.

        Sizes may differ. Each result depends on its picture, instruction, seed and settings alone. An empty
        instruction gives the picture back, as the paper's code does. ``masks``, one or one a picture, are white where
        something may change; elsewhere the source's pixels come back. ``control_images``, one or one a picture, are
        what the loaded ControlNet looks at. ``overrides`` are fields of EditConfig. Raises ImageError, ConfigError, or
        Interrupted once ``hooks.should_stop()``.
        """
        pictures = [open_image(image) for image in as_list(images, Picture)]
        given: dict[str, Any] = {"masks": masks, "control_images": control_images, "config": config, "hooks": hooks}
        made = self.edits(pictures, instructions, seeds=seeds, **given, **overrides)
        return sorted(made, key=lambda result: result.index)

    def edits(
        self,
        images: Picture | Sequence[Picture],
        instructions: str | Sequence[str],
        *,
        seeds: int | Sequence[int] = 0,
        masks: Picture | Sequence[Picture | None] | None = None,
        control_images: Picture | Sequence[Picture] | None = None,
        config: EditConfig | None = None,
        hooks: Hooks | None = None,
        **overrides: Any,
    ) -> Iterator[EditResult]:
        """The results of ``edit`` as they are made, of which it holds one batch: memory does not grow with them.

        Pictures of one size are made together, so the order is not that of asking; ``index`` says the place. Files
        are opened beside the network, a batch ahead. One that cannot be opened is told to ``hooks.on_error`` with its
        place among the pictures, and left out; without such a hook it raises ImageError.
        """
        pictures, texts = as_list(images, Picture), as_list(instructions, str)
        combinations = product(range(len(pictures)), range(len(texts)), as_list(seeds, int))
        jobs = [Job(place, *combination) for place, combination in enumerate(combinations)]
        beside = self._beside(masks, control_images, len(pictures))
        work = Work(jobs, pictures, texts, *beside)
        return self._run(work, self._settle(config, overrides), hooks or Hooks())

    def edits_each(
        self,
        images: Sequence[Picture],
        instructions: Sequence[str],
        *,
        seeds: Sequence[int],
        masks: Picture | Sequence[Picture | None] | None = None,
        control_images: Picture | Sequence[Picture] | None = None,
        config: EditConfig | None = None,
        hooks: Hooks | None = None,
        **overrides: Any,
    ) -> Iterator[EditResult]:
        """The n-th picture by the n-th instruction with the n-th seed, as they are made; otherwise as ``edits``."""
        if not len(images) == len(instructions) == len(seeds):
            raise ConfigError(
                f"{len(images)} pictures, {len(instructions)} instructions and {len(seeds)} seeds do not pair up; "
                "give as many of each, or use edit() for every combination"
            )
        given = self._beside(masks, control_images, len(images))
        first: dict[Any, int] = {}  # a picture that is given again is opened once
        rows = [first.setdefault((id(image), *(id(one.get(n)) for one in given)), n) for n, image in enumerate(images)]
        jobs = [Job(n, rows[n], n, seed) for n, seed in enumerate(seeds)]
        return self._run(Work(jobs, images, instructions, *given), self._settle(config, overrides), hooks or Hooks())

    def edit_each(
        self,
        images: Sequence[Picture],
        instructions: Sequence[str],
        *,
        seeds: Sequence[int],
        masks: Picture | Sequence[Picture | None] | None = None,
        control_images: Picture | Sequence[Picture] | None = None,
        config: EditConfig | None = None,
        hooks: Hooks | None = None,
        **overrides: Any,
    ) -> list[EditResult]:
        """Edit the n-th picture by the n-th instruction with the n-th seed; otherwise as ``edit``."""
        pictures = [open_image(image) for image in images]
        given: dict[str, Any] = {"masks": masks, "control_images": control_images, "config": config, "hooks": hooks}
        made = self.edits_each(pictures, instructions, seeds=seeds, **given, **overrides)
        return sorted(made, key=lambda result: result.index)

    def condition(
        self,
        images: Picture | Sequence[Picture],
        instructions: str | Sequence[str],
        *,
        masks: Picture | Sequence[Picture | None] | None = None,
        control_images: Picture | Sequence[Picture] | None = None,
        config: EditConfig | None = None,
        **overrides: Any,
    ) -> Conditioning:
        """What edits are conditioned on: a row for each picture with its instruction; one of either goes with all.

        All pictures have to come to one size. ``masks`` are for a UNet that takes them. ``overrides`` are fields of
        EditConfig, of which ``size`` and ``resolution`` count. Raises ImageError or ConfigError.
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
        given = by_row(masks, len(pictures), "masks")
        white = {row: open_mask(mask, pictures[row].size) for row, mask in given.items()}
        small = [fit(picture, sizes[0]) for picture in pictures]
        told = [fit(white[row], sizes[0]) if row in white else None for row in range(len(small))]
        rows = [n % len(small) for n in range(count)]
        said = [f"{texts[n % len(texts)]}{settled.suffix}" for n in range(count)]
        return self._condition([small[row] for row in rows], said, [told[row] for row in rows])

    @torch.inference_mode()
    def find_area(
        self,
        images: Picture | Sequence[Picture],
        instructions: str | Sequence[str],
        *,
        config: EditConfig | None = None,
        **overrides: Any,
    ) -> list[Image.Image]:
        """Where each picture's instruction may act: masks as large as the pictures, white where something may change.

        To look at and to change by hand; ``auto_mask`` adds where the edit itself has changed something. One picture
        goes with all instructions, or one instruction with all pictures. Raises ImageError or ConfigError.
        """
        settled = self._settle(config, overrides)
        pictures, texts = as_list(images, Picture), as_list(instructions, str)
        count = max(len(pictures), len(texts))
        masks = []
        for n in range(count):
            picture = pictures[n % len(pictures)]
            condition = self.condition(picture, texts[n % len(texts)], config=settled)
            kept = clean_latents(self.model, condition.image)
            masks.append(whole_area(area_pictures(self._area(condition, kept, settled))[0], upright_size(picture)))
        return masks

    def denoiser(self, config: EditConfig | None = None, **overrides: Any) -> Denoiser:
        """The network under guidance, denoiser(x, sigma, condition) -> denoised; ``overrides`` as for ``edit``."""
        settled = self._settle(config, overrides)
        scales = (settled.text_cfg, settled.image_cfg)
        return BranchDenoiser(self.model, together=settled.together, scales=scales).guided(_guidance_of(settled))

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
        # On a CPU one at a time: the decoder takes more memory than the network, and gains nothing by batches there.
        most = 1 if latents.device.type == "cpu" else DECODED_AT_ONCE
        return decode_pictures(self.model, latents, most)

    def _run(self, work: Work, config: Settled, hooks: Hooks) -> Iterator[EditResult]:
        """Make every job's picture, batch by batch, and tell the hooks."""
        if not work.jobs:
            raise ConfigError("nothing to edit; give at least one picture, one instruction and one seed")
        for job in work.jobs:
            check_seed(job.seed)
        for text in work.texts:
            check_length(text)
        return self._made(work, config, hooks)

    def _made(self, work: Work, config: Settled, hooks: Hooks) -> Iterator[EditResult]:
        finished, broken = 0, set[int]()
        with Opener(work.pictures, work.masks) as opener:
            batches = list(batches_of(work, config, self.model.words, hooks))
            for (size, jobs), following in zip(batches, [*batches[1:], None], strict=True):
                fitted: dict[int, Fitted] = {}
                later = {(job.picture, following[0]) for job in following[1]} if following else set()
                for row, future in opener.take(size, {job.picture for job in jobs}, later).items():
                    try:
                        fitted[row] = future.result()
                    except ImageError as error:
                        if row not in broken:
                            hooks.error(row, error)
                        broken.add(row)
                usable = [job for job in jobs if job.picture in fitted]
                for result in self._edit_batch(usable, fitted, work, size, config, hooks):
                    finished += 1
                    hooks.result(result.index, result)
                    yield result
                hooks.progress(finished, len(work.jobs))

    def _settle(self, config: EditConfig | None, overrides: dict[str, Any]) -> Settled:
        """A config with its overrides, and what it leaves to the checkpoint's recommendation filled in."""
        given = with_overrides(config or EditConfig(), overrides)
        if self.model.spec.scale_inputs and (callable(given.guidance) or given.guidance_interval or given.apg):
            raise ConfigError("this model's guidance is inside it; leave out guidance, its interval and APG")
        values = {field.name: getattr(given, field.name) for field in fields(given)}
        spec = self.model.spec
        if given.text_cfg is given.image_cfg is given.guidance_interval is None and spec.guidance_high:
            values["guidance_interval"] = (spec.guidance_low, spec.guidance_high)
        if spec.takes_mask and given.auto_mask:
            raise ConfigError("auto_mask has nothing to say to a checkpoint that is told a mask; give masks, or none")
        own = {name: getattr(spec, name) for name in (*SCALES, "steps", "sampler", "guidance", "suffix", "resolution")}
        own["schedule"] = spec.levels
        if isinstance(given.guidance, str) and given.guidance != spec.guidance:
            own |= zip(SCALES, FORMULAS[given.guidance].scales, strict=True)
        values |= {name: value for name, value in own.items() if values[name] is None}
        return Settled(**values)

    def _edit_batch(
        self,
        jobs: Sequence[Job],
        fitted: dict[int, Fitted],
        work: Work,
        size: tuple[int, int] | None,
        config: Settled,
        hooks: Hooks,
    ) -> Iterator[EditResult]:
        """The results of a batch of one size; size None: empty instructions, which give their pictures back."""
        sources, words = [fitted[job.picture] for job in jobs], [work.texts[job.instruction] for job in jobs]
        said = [f"{text}{config.suffix}" for text in words]
        edited: Any = [(None, None, None)] * len(jobs)
        areas: Sequence[Image.Image | None] = [None] * len(jobs)
        seen: Sequence[dict[str, Any] | None] = [None] * len(jobs)
        evaluations = 0
        if jobs and size is not None:
            with enough_memory(len(jobs), size), torch.inference_mode():
                small: Any = [source.small for source in sources]
                condition = self._condition(small, said, [source.small_mask for source in sources])
                condition, seen = self._controlled(condition, [work.controls.get(job.picture) for job in jobs], config)
                kept = clean_latents(self.model, condition.image)
                free = None if self.model.spec.takes_mask else _free(sources, kept)
                seeds = [job.seed for job in jobs]
                z, evaluations = self._walk(condition, seeds, config, hooks, free=free, kept=kept)
                if config.auto_mask:
                    z, found = set_back(z, kept, self._area(condition, kept, config))
                    areas, evaluations = area_pictures(found), evaluations + LOOKS
                round_trips = self.pictures(kept) if config.detail else [None] * len(jobs)
                edited = list(zip(self.pictures(z), z.cpu(), round_trips, strict=True))
        rows = zip(jobs, sources, words, areas, edited, seen, strict=True)
        for job, source, text, area, (picture, latent, round_trip), control in rows:
            yield EditResult(
                edited=picture,
                picture=source.picture,
                size=size if size is not None and not config.restore_size else source.size,
                profile=source.profile,
                mask=source.mask,
                area=area,
                seen=source.small,
                round_trip=round_trip,
                instruction=text if size is not None else "",
                seed=job.seed,
                latent=latent,
                evaluations=evaluations,
                settings=self._settings(text, job.seed, source, size or source.size, config, control),
                index=job.place,
            )

    def _area(self, condition: Conditioning, kept: Tensor, config: Settled) -> Tensor:
        """Where each row's instruction may act, (B, 1, h, w)."""
        return area_of(relevance(BranchDenoiser(self.model, together=config.together), kept, condition))

    def _walk(
        self, condition: Conditioning, seeds: Sequence[int], config: Settled, hooks: Hooks, **mask: Tensor | None
    ) -> tuple[Tensor, int]:
        sigmas = make_sigmas(config.schedule, self.model.schedule, config.steps)
        names = ("sampler", "together", "feature_cache")
        how: Any = {**{name: getattr(config, name) for name in names}, "hooks": hooks, **mask}
        how["scales"] = (config.text_cfg, config.image_cfg)
        return walk(self.model, condition, seeds, sigmas, _guidance_of(config), **how)

    @torch.inference_mode()
    def _condition(
        self, pictures: Sequence[Image.Image], texts: Sequence[str], masks: Sequence[Image.Image | None]
    ) -> Conditioning:
        """A row for each fitted picture and its mask with its text; each is encoded once."""
        different = {id(picture): (picture, mask) for picture, mask in zip(pictures, masks, strict=True)}
        here = self.model.device
        latents = {
            key: encode_image(
                self.model, to_tensor([picture], here), None if mask is None else to_tensor([mask.convert("RGB")], here)
            )
            for key, (picture, mask) in different.items()
        }
        words = sorted(set(texts))
        embedded = encode_text(self.model, [*words, ""])
        return Conditioning(
            text=embedded.rows([words.index(text) for text in texts]),
            null_text=embedded.rows([len(words)]),
            image=torch.cat([latents[id(picture)] for picture in pictures]),
            size_ids=size_ids(self.model, [picture.size for picture in pictures]),
        )

    def _beside(
        self, masks: Any, controls: Picture | Sequence[Picture] | None, pictures: int
    ) -> tuple[dict[int, Picture], dict[int, Picture]]:
        """Masks and control pictures by the row of their picture. Raises ConfigError for another number of them."""
        if controls is not None and self.control is None:
            raise ConfigError("control_images are for a ControlNet, and none is loaded; give control= or load_control")
        return by_row(masks, pictures, "masks"), by_row(controls, pictures, "control pictures", every=True)

    def _controlled(
        self, condition: Conditioning, pictures: Sequence[Picture | None], config: Settled
    ) -> tuple[Conditioning, list[dict[str, Any] | None]]:
        """The condition with the ControlNet's pictures, and what settings say of each."""
        net, given = self.control, [picture for picture in pictures if picture is not None]
        if net is None or not given:
            return condition, [None] * len(pictures)
        if config.feature_cache > 1:
            raise ConfigError("features are kept without what a ControlNet adds to them; leave one of the two out")
        size = (8 * condition.image.shape[-1], 8 * condition.image.shape[-2])
        hints: dict[int, Tensor] = {}
        told: dict[int, dict[str, Any]] = {}
        for picture in {id(one): one for one in given}.values():
            whole = opened(picture)
            hints[id(picture)] = hint_of(whole, size)
            said = {"image": _name_of(picture), "image_sha256": pixels_digest(whole)}
            told[id(picture)] = {"name": net.name, "digest": net.digest, **said}
        hint = torch.cat([hints[id(one)] for one in given]).to(condition.image.device)
        control = Control(net=net, hint=hint, weight=config.control_weight)
        return replace(condition, control=control), [told[id(one)] for one in given]

    @cached_property
    def _digest(self) -> str:
        return digest_of_weights(self._plain)

    def _settings(
        self,
        instruction: str,
        seed: int,
        source: Fitted,
        size: tuple[int, int],
        config: Settled,
        control: dict[str, Any] | None,
    ) -> dict[str, Any]:
        values = asdict(config)
        return {
            "instruction": instruction if instruction.strip() else "",
            "seed": seed,
            **{name: named(value) for name, value in values.items() if name not in HOW_FAST},
            "edited_at": list(size),
            "source": _name_of(source.picture),
            "source_sha256": source.digest,
            "mask": _name_of(source.mask) or source.mask is not None,
            "checkpoint": base_name(self.name),
            "checkpoint_digest": self._digest,
            "base": self.base and base_name(self.base),
            "loras": [lora.settings for lora in self.loras],
            "vae": self._vae,
            "embeddings": [word.settings for word in self.words],
            "control": control,
            "weights": self.model.spec.weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "ip2p_engine": __version__,
            "torch": torch.__version__,
        }


def _guidance_of(config: Settled) -> Guidance:
    if callable(config.guidance):
        return config.guidance
    return guidance_of(
        config.text_cfg,
        config.image_cfg,
        name=config.guidance,
        interval=config.guidance_interval,
        rescale=config.guidance_rescale,
        apg=config.apg,
    )


def _free(sources: Sequence[Fitted], like: Tensor) -> Tensor | None:
    """Where the latents of a batch may change; None: everywhere."""
    if all(source.small_mask is None for source in sources):
        return None
    pixels = [source.small_mask or Image.new("L", source.small.size, 255) for source in sources if source.small]
    return latent_mask(torch.stack([torch.from_numpy(np.array(one))[None] / 255 for one in pixels]), like)


def _name_of(picture: Picture | None) -> str | None:
    """The base name of a file; None for what came without one."""
    return base_name(picture) if isinstance(picture, str | os.PathLike) else None
