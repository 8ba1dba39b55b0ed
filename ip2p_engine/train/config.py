"""What a training run does, as one frozen dataclass, and the recipes as one table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..config import from_mapping
from ..diffusion.guidance import check_scale, guidance_of
from ..errors import ConfigError
from ..files import read_json

__all__ = [
    "ADJUSTABLE",
    "FREE",
    "HUB_ID",
    "PRESETS",
    "TrainConfig",
    "changed_fields",
    "preset",
    "read_config",
    "with_outputs",
]

CHOICES = {
    "optimizer": ("adamw", "adamw8bit", "muon", "adafactor", "lion", "prodigy"),
    "schedule": ("constant", "cosine", "linear", "polynomial", "restarts"),
    "precision": ("float32", "bfloat16", "float16"),
    "prediction": (None, "eps", "v"),
    "tracker": (None, "tensorboard", "wandb"),
}
SCALES, SCALES_ALONE = ("text_cfg", "image_cfg"), (1.0, 1.0)
OUTPUTS = ("ema", "raw", "diffusers", "lora")
AT_LEAST: dict[str, float] = {
    "steps": 1,
    "batch_size": 1,
    "resolution": 64,
    "warm_up": 0,
    "shuffle_buffer": 1,
    "workers": 0,
    "lora_rank": 0,
    "lora_conv_rank": 0,
    "cache_variants": 1,
    "save_every": 1,
    "keep": 0,
    "export_every": 0,
    "push_every": 0,
    "posthoc_every": 0,
    "validate_every": 0,
    "validation_count": 1,
    "validation_pairs": 0,
    "seed": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "clip_norm": 0,
    "min_snr": 0,
    "change_weight": 0,
    "unmasked_weight": 0,
    "schedule_power": 0,
    "schedule_restarts": 1,
    "offset_noise": 0,
    "ema_decay": 0,
    "distill_rungs": 1,
    "dropout": 0,
    "flip": 0,
}
MOST_AT_ONCE = 10_000  # examples of a process
AT_MOST = {
    "ema_decay": 1,
    "dropout": 1 / 3,
    "flip": 1,
    "unmasked_weight": 1,
    "steps": 100_000_000,
    "batch_size": 1_000_000,
    "resolution": 4096,
    "workers": 256,
    "lora_rank": 4096,
    "lora_conv_rank": 4096,
    "cache_variants": 1000,
    "shuffle_buffer": 10_000_000,
    "validation_count": 10_000,
    "validation_pairs": 100_000,
    "seed": 2**63 - 1,
    "weight_decay": 1000,
    "clip_norm": 1e9,
    "min_snr": 1e9,
    "offset_noise": 1000,
    "distill_rungs": 1000,
}
TUPLES: dict[str, tuple[int, tuple[type, ...], str]] = {
    "columns": (3, (str,), "the names of picture, instruction and edited picture"),
    "resize": (2, (int,), "two whole numbers of pixels"),
    "posthoc_lengths": (2, (float,), "two numbers above 0 and below 0.28, such as 0.05 and 0.1"),
    "betas": (2, (int, float), "two numbers from 0 to below 1"),
}
FLAGS = (
    "hold_out_test",
    "inverses",
    "streaming",
    "buckets",
    "gradient_checkpointing",
    "compile",
    "cache",
    "mask_channels",
    "zero_snr",
    "train_text_encoder",
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
NUMBERS_OR_NONE = ("lora_alpha", "lora_conv_alpha", "text_learning_rate")

# A config's field is never None: what is not given is filled in when it is made.
NOT_GIVEN: Any = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run; the defaults are the paper's recipe (Brooks et al. 2023, section 3.2 and appendix A)."""

    columns: tuple[str, str, str] = ("original_image", "edit_prompt", "edited_image")
    """Names of picture, instruction and edited picture in a foreign data set; a dot reaches into a JSON column.
    The default goes by the names that the field uses (docs/datasets.md)."""
    split: str = "train"
    """The split of a foreign data set; one that has a single split is read by that."""
    data_weights: tuple[float, ...] | None = None
    """How often each of several data sets is drawn from; None: as their sizes are."""
    limit: int | None = None
    """Train on so many rows at most, of those that ``where`` lets through."""
    where: str | None = None
    """Train on rows that meet a condition on their columns, such as ``o_score >= 8 and edit_type != 'style'``."""
    inverses: bool = False
    """Rows with an instruction that leads back are two pairs."""
    pictures_from: str | None = None
    """The folder that paths in a table are relative to, and may not leave; None: the table's own."""
    hold_out_test: bool = False
    """Leave out the test split of a store, on which ``ip2p evaluate`` measures (``captions.edits.in_test_split``)."""
    streaming: bool = False
    """Read a hub data set in its own order through a shuffle buffer, without a copy on the disk."""
    shuffle_buffer: int = 1000
    """Examples that a stream is shuffled among."""
    workers: int = 4
    """Processes that decode pictures; 0 decodes in the training process."""

    resolution: int = 256
    """Side of the square that is trained on, pixels; with buckets the root of the area."""
    resize: tuple[int, int] = NOT_GIVEN
    """The shorter side is resized to a uniform whole number of these bounds, then a crop is cut; one draw a pair.
    None: from the resolution to 9/8 of it, as in the paper."""
    flip: float = 0.5
    """Probability that a pair is mirrored, both pictures alike."""
    buckets: bool = False
    """Keep aspects: each step's examples have one of several shapes of about equal area."""

    steps: int = 10_000
    """Optimiser steps."""
    batch_size: int = 1024
    """Examples of one optimiser step, over all processes."""
    micro_batch: int | None = None
    """Examples that one process computes at once; None: its whole share. Gradients are accumulated."""
    optimizer: str = "adamw"
    """adamw, adamw8bit (bitsandbytes), muon (float32 and bfloat16 only), adafactor (torch), lion (lion-pytorch) or
    prodigy (prodigyopt, with a learning_rate of 1, which it scales itself)."""
    learning_rate: float = 1e-4
    schedule: str = "constant"
    """constant; or down to 0 at the last step: cosine, linear, polynomial (of ``schedule_power``), restarts (a cosine
    that begins ``schedule_restarts`` times)."""
    schedule_power: float = 2.0
    schedule_restarts: int = 4
    warm_up: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 0.0
    """Longest gradient, L2; 0 clips nothing."""
    dropout: float = 0.05
    """p: this share of the examples loses the text, the same the picture, the same both."""
    text_dropout: float | None = None
    """The share that loses the text alone, where it is another; None: ``dropout``."""
    image_dropout: float | None = None
    """The share that loses the picture alone, where it is another; None: ``dropout``."""
    change_weight: float = 0.0
    """w: errors count (1 + w d) / (1 + w) where d is the size of the pair's change of latents there over its mean.
    Measured on scenes it made fewer edits right (docs/training.md)."""
    unmasked_weight: float = 1.0
    """How much an error counts outside the mask that the data give, beside 1 inside; 1 is the plain loss.
    Measured on scenes less made fewer edits right (docs/training.md)."""
    mask_channels: bool = False
    """Tell the network the data's masks as four more channels, as UltraEdit does; a base that has them goes on so."""
    prediction: str | None = None
    """eps or v; None keeps what the base predicts."""
    zero_snr: bool = False
    """Rescale the noise levels so that the last is pure noise, and predict v (Lin et al. 2023)."""
    min_snr: float = 0.0
    """gamma of min-SNR weighting (Hang et al. 2023); 0 weights all noise levels alike."""
    offset_noise: float = 0.0
    """Size of a shift of the noise that is constant over a channel; 0 for none."""
    posthoc_every: int = 0
    """Steps between snapshots of two more averages, of which ``ip2p average`` makes any length afterwards; 0: none."""
    posthoc_lengths: tuple[float, float] = (0.05, 0.1)
    """Their widths, as shares of the run (sigma_rel of Karras et al. 2024)."""
    ema_decay: float = 0.9999
    """Highest decay; with n updates done it is min(this, (1 + n) / (10 + n))."""

    distill: tuple[float, float] | None = None
    """s_T and s_I: learn to give the base's edits with this guidance in one to four evaluations (train/distill.py)."""
    distill_to: tuple[float, float] | None = None
    """Other ends of s_T and s_I: each example has scales between, and the network takes its scales as inputs."""
    distill_interval: tuple[float, float] | None = None
    """The noise levels (sigma) within which the teacher is guided; elsewhere it is c alone. None: everywhere."""
    distill_rungs: int = 50
    """DDIM steps of the teacher, between which the student is to be consistent; few are learned sooner."""

    precision: str = "float32"
    """Of the networks' arithmetic; the trained weights and their average stay float32."""
    gradient_checkpointing: bool = False
    """Compute activations twice and keep few of them."""
    compile: bool | None = False
    """Compile the UNet (torch.compile); None, in the presets for a GPU: on CUDA where Triton is, elsewhere not."""
    lora_rank: int = 0
    """Train adapters of this rank on the attention layers instead of all weights; 0 trains all."""
    lora_alpha: float | None = None
    """Adapters count alpha / rank; None: the rank, so 1."""
    lora_conv_rank: int = 0
    """With adapters: others of this rank on all convolutions but the first and the last; 0 for none."""
    lora_conv_alpha: float | None = None
    """Of these; None: their rank."""
    lora_from: str | None = None
    """A LoRA file, of any trainer, whose numbers the adapters begin with."""
    train_text_encoder: bool = False
    """Train the text encoders too, whole or by adapters; texts are then not cached."""
    text_learning_rate: float | None = None
    """Theirs at its highest, under the same schedule; None: ``learning_rate``."""
    cache: bool = False
    """Encode pictures and texts once, before training."""
    cache_variants: int = 4
    """Crops and flips of a pair that are cached; 1 where nothing is random about a square picture."""

    save_every: int = 500
    keep: int = 2
    """Checkpoints that are kept while the run goes on; a finished one keeps its last, and with 0 none to go on from."""
    export_every: int = 0
    """Steps between models that are written to exports/ in the forms of ``outputs``; 0 for none."""
    outputs: tuple[str, ...] | None = None
    """What a finished run leaves: ema, raw (whole checkpoints), diffusers (a folder, with raw also as its variant
    non_ema), lora (adapters). None: ema, and lora where adapters are trained."""
    validate_every: int = 500
    """Steps between validation strips; 0 for none."""
    validation_count: int = 4
    """So many examples are edited, spread over what is held out, else over the data (of a stream the first)."""
    validation_pairs: int = 32
    """The loss is measured on so many of these pairs, always with the same noise and levels; 0 for none."""
    validate_with: str | None = None
    """A .csv or .jsonl file with columns source and instruction: pictures of one's own that are edited too."""
    validation_clip: str | None = None
    """A CLIP that scores these edits, such as ViT-L-14/openai; None scores nothing and loads nothing."""
    push_to_hub: str | None = None
    """owner/name on the hub, where the run is pushed at its end, with a model card; a new repository is private."""
    push_every: int = 0
    """Steps between earlier pushes, of the last checkpoint too; 0 for none."""
    resume_from_hub: str | None = None
    """owner/name of a run that was pushed: a folder without a run goes on with it."""
    tracker: str | None = None
    """tensorboard or wandb."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in AT_LEAST.items():
            _check_number(name, getattr(self, name), least, AT_MOST.get(name))
        if self.resize is None:
            object.__setattr__(self, "resize", (self.resolution, self.resolution * 9 // 8))
        for name, (count, kinds, what) in TUPLES.items():
            value = getattr(self, name)
            fits = isinstance(value, list | tuple) and len(value) == count
            if not fits or not all(type(part) in kinds for part in value):
                raise ConfigError(f"{name} is {value!r}; give {what}")
            object.__setattr__(self, name, tuple(value))  # JSON has lists
        if self.data_weights is not None:
            object.__setattr__(self, "data_weights", _weights(self.data_weights))
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool) and (name, getattr(self, name)) != ("compile", None):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give true or false")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                words = ", ".join(str(word) for word in known)
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {words}")
        for name, least in (("micro_batch", 1), ("limit", 1), *((name, 0) for name in NUMBERS_OR_NONE)):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), least, None)
        self._check_outputs()
        self._check_together()

    def _check_outputs(self) -> None:
        if self.outputs is None:
            return
        known = isinstance(self.outputs, list | tuple) and set(self.outputs) <= set(OUTPUTS)
        if not known or not self.outputs:
            raise ConfigError(f"outputs are {self.outputs!r}; choose among {', '.join(OUTPUTS)}")
        if "lora" in self.outputs and not self.lora_rank:
            raise ConfigError("outputs name lora, and all weights are trained; give lora_rank, or leave lora out")
        object.__setattr__(self, "outputs", tuple(dict.fromkeys(self.outputs)))

    def _check_together(self) -> None:
        if (self.micro_batch or self.batch_size) > MOST_AT_ONCE:
            raise ConfigError(
                f"{self.micro_batch or self.batch_size:,} examples would be in memory at once; "
                f"give micro_batch, of at most {MOST_AT_ONCE:,}"
            )
        low, high = self.resize
        if low > high:
            raise ConfigError(f"resize is {low} to {high}; give the lower bound first")
        if low < self.resolution and not self.buckets:
            raise ConfigError(
                f"resize is {low} to {high} and crops are {self.resolution}; give bounds of at least the resolution"
            )
        if self.resolution % 8:
            raise ConfigError(f"resolution is {self.resolution}; give a multiple of 8, better of 64")
        if not all(self.columns):
            raise ConfigError(f"columns are {self.columns}; name three: picture, instruction, edited picture")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {self.betas}; give {TUPLES['betas'][2]}")
        if not 0 < min(self.posthoc_lengths) < max(self.posthoc_lengths) < 0.28:
            raise ConfigError(f"posthoc_lengths is {self.posthoc_lengths}; give {TUPLES['posthoc_lengths'][2]}")
        for name in ("text_dropout", "image_dropout"):
            share = getattr(self, name)
            if share is not None and (type(share) not in (int, float) or not 0 <= share <= 1):
                raise ConfigError(f"{name} is {share!r}; give a share from 0 to 1")
        if sum(self.dropouts) > 1 + 1e-9:
            raise ConfigError(
                f"the dropouts are {self.dropouts}, text alone, both, picture alone; give 1 in all at most"
            )
        if self.optimizer == "muon" and self.precision == "float16":
            raise ConfigError("muon has no gradient scaler; choose precision float32 or bfloat16, or adamw")
        if self.optimizer in ("lion", "prodigy") and not self.learning_rate:
            raise ConfigError(f"{self.optimizer} takes no learning_rate of 0; give one above it")
        if self.optimizer == "prodigy" and self.text_learning_rate not in (None, self.learning_rate):
            raise ConfigError("prodigy finds one rate for all weights; leave text_learning_rate out, or choose adamw")
        for name in ("lora_conv_rank", "lora_from"):
            if getattr(self, name) and not self.lora_rank:
                raise ConfigError(f"{name} is of adapters, and all weights are trained; give lora_rank too")
        if self.text_learning_rate is not None and not (self.train_text_encoder and self.learning_rate):
            raise ConfigError(
                "text_learning_rate is beside a learning_rate above 0, with train_text_encoder; give both"
            )
        for name in ("push_to_hub", "resume_from_hub"):
            repository = getattr(self, name)
            if repository is not None and not (isinstance(repository, str) and HUB_ID.fullmatch(repository)):
                raise ConfigError(f"{name} is {repository!r}; give owner/name")
        if self.push_every and not self.push_to_hub:
            raise ConfigError("push_every is of pushes to the hub; give `push_to_hub` owner/name too")
        if self.zero_snr and self.prediction == "eps":
            raise ConfigError("zero_snr predicts v, since noise says nothing of pure noise; leave prediction out")
        self._check_distill()
        if self.streaming and (self.buckets or self.cache):
            word = "buckets" if self.buckets else "cache"
            raise ConfigError(f"{word} needs all rows before training, and a stream has no end; turn streaming off")

    def _check_distill(self) -> None:
        if self.distill is None:
            for name in ("distill_to", "distill_interval"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} is of the teacher's scales; give distill too")
            return
        if self.distill_interval is not None:
            guidance_of(*SCALES_ALONE, interval=self.distill_interval)
            object.__setattr__(self, "distill_interval", tuple(self.distill_interval))
        for field in ("distill",) if self.distill_to is None else ("distill", "distill_to"):
            given = getattr(self, field)
            if not isinstance(given, list | tuple) or len(given) != len(SCALES):
                raise ConfigError(f"{field} is {given!r}; give the teacher's s_T and s_I")
            object.__setattr__(self, field, tuple(check_scale(n, v) for n, v in zip(SCALES, given, strict=True)))
        if self.distill_to is not None and self.lora_rank:
            raise ConfigError("adapters have no place for the scales as inputs; leave out lora_rank or distill_to")
        for name in ("lora_from", "train_text_encoder", "mask_channels", "zero_snr", "prediction"):
            if getattr(self, name):
                raise ConfigError(f"distill learns from the base as it is, and {name} changes it; leave one out")

    @property
    def dropouts(self) -> tuple[float, float, float]:
        """The shares of examples that lose the text alone, both, the picture alone."""
        text, image = (self.dropout if one is None else one for one in (self.text_dropout, self.image_dropout))
        return text, self.dropout, image

    @property
    def variants(self) -> int:
        """How many crops and flips of a pair the cache holds."""
        fixed = self.flip in (0, 1) and self.resize[0] == self.resize[1] == self.resolution
        return 1 if fixed else self.cache_variants


FREE = frozenset(
    {
        "steps",
        "micro_batch",
        "workers",
        "gradient_checkpointing",
        "compile",
        "save_every",
        "keep",
        "export_every",
        "outputs",
        "validate_every",
        "validation_count",
        "validation_pairs",
        "validate_with",
        "validation_clip",
        "tracker",
        "push_to_hub",
        "push_every",
        "resume_from_hub",
    }
)
"""What may differ between a run and its continuation."""
ADJUSTABLE = frozenset({"learning_rate", "clip_norm", "precision"})
"""What may be changed for the steps to come, and is noted: the ways out where a loss is not finite any more."""

MUON: dict[str, Any] = {"optimizer": "muon", "schedule": "cosine", "warm_up": 50, "betas": (0.9, 0.98)}
PRESETS: dict[str, dict[str, Any]] = {
    # The paper: SD1.5, 256 px, 10,000 steps of 1024 examples on 8 x A100.
    "paper": {"compile": None},
    # The same on one GPU of 24 GB: 8-bit states, 16 examples at once, cached latents.
    "one-gpu": {
        "precision": "bfloat16",
        "micro_batch": 16,
        "batch_size": 256,
        "optimizer": "adamw8bit",
        "gradient_checkpointing": True,
        "cache": True,
        "compile": None,
    },
    # A small edit skill on a released InstructPix2Pix, a few GB.
    "lora": {
        "precision": "bfloat16",
        "lora_rank": 16,
        "batch_size": 16,
        "steps": 2000,
        "resolution": 512,
        "gradient_checkpointing": True,
        "cache": True,
        "compile": None,
    },
    # SD2.1, v-prediction, 512 px.
    "sd2": {"precision": "bfloat16", "resolution": 512, "micro_batch": 16, "batch_size": 256, "compile": None},
    # diffusers' published SDXL recipe's size; time ids an example.
    "sdxl": {
        "precision": "bfloat16",
        "resolution": 768,
        "micro_batch": 4,
        "batch_size": 128,
        "learning_rate": 5e-5,
        "gradient_checkpointing": True,
        "compile": None,
    },
    # CosXL-Edit: EDM noise levels, v, scaled image condition (all from the base).
    "cosxl": {
        "precision": "bfloat16",
        "resolution": 1024,
        "micro_batch": 2,
        "batch_size": 128,
        "learning_rate": 1e-5,
        "gradient_checkpointing": True,
        "compile": None,
    },
    # The embedded world in about an hour of two CPU cores: docs/scenes.md.
    "embedded": {
        **MUON,
        "steps": 2000,
        "batch_size": 96,
        "learning_rate": 2e-3,
        "weight_decay": 0.0,
        "ema_decay": 0.998,
        "resolution": 64,
        "resize": (64, 64),
        "flip": 0.0,
        "workers": 0,
        "cache": True,
        "save_every": 100,
    },
}


def preset(name: str, **overrides: Any) -> TrainConfig:
    """The config of a named recipe, some fields replaced; raises ConfigError for an unknown name or field."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    given = {field: value for field, value in overrides.items() if value is not None}
    return from_mapping(TrainConfig, {**PRESETS[name], **given})


def read_config(path: Path, base: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config file over a preset's: a JSON object of them, or the run.json of another run.

    Raises ConfigError for a file that is no such thing.
    """
    values = read_json(path, ConfigError)
    given = values.get("config", values) if isinstance(values, dict) else values
    if not isinstance(given, dict):
        raise ConfigError(f"{path} is no JSON object; give one with fields of TrainConfig")
    return {**base, **given}


def with_outputs(config: TrainConfig, saved: Mapping[str, Any] | None) -> TrainConfig:
    """The config with what its run leaves filled in: as the run began, where nothing else is asked for.

    Of a run that 0.1 began, which left every form.
    """
    if config.outputs is not None:
        return config
    before = tuple((saved or {}).get("outputs") or ())
    if saved is not None and "outputs" not in saved:
        before = OUTPUTS if config.lora_rank else OUTPUTS[:3]
    return replace(config, outputs=before or (("ema", "lora") if config.lora_rank else ("ema",)))


def changed_fields(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Fields by which a config would not go on as the saved one does."""
    known = from_mapping(TrainConfig, saved)
    names = [field.name for field in fields(config) if field.name not in FREE]
    return [name for name in names if getattr(known, name) != getattr(config, name)]


def _weights(given: Any) -> tuple[float, ...]:
    values = given if isinstance(given, list | tuple) else [given]
    fits = all(isinstance(one, int | float) and math.isfinite(one) and one > 0 for one in values)
    if not values or not fits:
        raise ConfigError(f"`data_weights` are {given!r}; give a number above 0 for each data set")
    return tuple(values)


def _check_number(name: str, value: Any, least: float, most: float | None) -> None:
    kinds = (int, float) if isinstance(getattr(TrainConfig, name), float) or name in NUMBERS_OR_NONE else int
    fits = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < least or (most is not None and value > most):
        bound = f"at least {least}" if most is None or most > 1 else f"from {least} to {most:.3g}"
        if fits and most is not None and value > most > 1:
            bound = f"of at most {most:,}"
        what = "a whole number" if kinds is int else "a number"
        raise ConfigError(f"{name} is {value!r}; give {what} {bound}")
