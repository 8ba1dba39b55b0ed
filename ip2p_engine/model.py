"""A loaded checkpoint: its networks, and what a host must know that is not in the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .checkpoint.infer import autoencoder_config, count, text_config, unet_config
from .checkpoint.names import autoencoder_pairs, rename, unet_pairs
from .checkpoint.read import read_weights
from .config import from_mapping
from .errors import CheckpointError, ConfigError
from .schedule import DiscreteSchedule

__all__ = ["EMBEDDED", "Model", "ModelSpec", "load_model"]

EMBEDDED = {"embedded": "unet", "embedded-sd": "unet_text_to_image"}
EMBEDDED_FOLDER = Path(__file__).parent / "scenes" / "embedded"
SPEC_FILE = "ip2p_config.json"
UNET, EMA, AUTOENCODER = "model.diffusion_model.", "model_ema.", "first_stage_model."
TEXT = "cond_stage_model.transformer."


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the weights do not say; saved beside them as ip2p_config.json."""

    family: str
    """sd1."""
    in_channels: int
    """Of the UNet: 4 for text to image, 8 for InstructPix2Pix."""
    prediction: str
    """What the UNet predicts: eps or v."""
    scaled_condition: bool
    """Whether the image condition is multiplied by the latent scale."""
    latent_scale: float
    text_cfg: float
    """Recommended s_T."""
    image_cfg: float
    """Recommended s_I."""
    resolution: int
    """Recommended longer side in pixels."""
    steps: int
    """Recommended number of sampling steps."""
    name: str = ""
    weights: str = "only"
    """Which were taken: ema, raw, or the only ones there are."""

    def __post_init__(self) -> None:
        if self.prediction not in ("eps", "v"):
            raise ConfigError(f"prediction is {self.prediction!r}; expected eps or v")


STABLE_DIFFUSION_1 = ModelSpec(
    family="sd1",
    in_channels=8,
    prediction="eps",
    scaled_condition=False,
    latent_scale=0.18215,
    text_cfg=7.5,
    image_cfg=1.5,
    resolution=512,
    steps=100,
)


@dataclass(kw_only=True)
class Model:
    """The networks of one checkpoint, ready to run."""

    spec: ModelSpec
    unet: UNet2DConditionModel
    autoencoder: AutoencoderKL
    text_encoders: tuple[CLIPTextModel, ...]

    @cached_property
    def schedule(self) -> DiscreteSchedule:
        """The noise ladder that the UNet was trained on."""
        return DiscreteSchedule.stable_diffusion()

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def timestep(self, sigma: float) -> Tensor:
        """The fractional time that the UNet is given at a noise level, float32, shape (1,)."""
        return self.schedule.sigma_to_t(torch.tensor([sigma], dtype=torch.float64)).float()

    def require_edit(self) -> None:
        """Raises CheckpointError unless the UNet takes 8 channels."""
        if self.spec.in_channels != 8:
            raise CheckpointError(
                f"this checkpoint's UNet takes {self.spec.in_channels} channels and an InstructPix2Pix takes 8; "
                "load one, e.g. instruct-pix2pix-00-22000.safetensors"
            )


def load_model(
    source: str | Path,
    *,
    weights: str = "ema",
    text_heads: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """Load "embedded", "embedded-sd" (its text-to-image half), a single file or a diffusers folder.

    ``weights`` picks "ema" or "raw" where a file has both. ``text_heads`` is for miniatures whose files do not say
    it. Raises CheckpointError for a file that is missing, broken, unsafe or of another architecture.
    """
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights is {weights!r}; choose ema or raw")
    if source in EMBEDDED:
        model = _load_folder(EMBEDDED_FOLDER, EMBEDDED[str(source)])
    elif Path(source).is_dir():
        model = _load_folder(Path(source), "unet")
    else:
        model = _load_ldm(Path(source), weights, text_heads)
    for module in (model.unet, model.autoencoder, *model.text_encoders):
        nn.Module.to(module.eval().requires_grad_(False), device=device, dtype=dtype or torch.float32)
    return model


def _load_folder(folder: Path, unet_name: str) -> Model:
    """A diffusers pipeline folder; ours also has ip2p_config.json."""
    unet_settings = _read_json(folder / unet_name / "config.json")
    unet = _assemble(UNet2DConditionModel, unet_settings, _folder_weights(folder / unet_name))
    autoencoder = _assemble(AutoencoderKL, _read_json(folder / "vae" / "config.json"), _folder_weights(folder / "vae"))
    text_settings = CLIPTextConfig(**_read_json(folder / "text_encoder" / "config.json"))
    text = _assemble_text(text_settings, _folder_weights(folder / "text_encoder"))
    spec = STABLE_DIFFUSION_1
    if (folder / SPEC_FILE).exists():
        spec = from_mapping(ModelSpec, _read_json(folder / SPEC_FILE))
    elif (folder / "scheduler" / "scheduler_config.json").exists():
        kind = _read_json(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
        spec = replace(spec, prediction="v" if kind == "v_prediction" else "eps")
    spec = replace(spec, in_channels=unet.config.in_channels, latent_scale=autoencoder.config.scaling_factor)
    return Model(spec=spec, unet=unet, autoencoder=autoencoder, text_encoders=(text,))


def _load_ldm(path: Path, weights: str, text_heads: int | None) -> Model:
    """A single file in the layout of latent diffusion."""
    tensors = read_weights(path).tensors
    unet_tensors = _part(tensors, UNET)
    if not unet_tensors:
        raise CheckpointError(
            f"{path.name} has no {UNET}* tensors; expected a Stable Diffusion or InstructPix2Pix file"
        )
    taken = "only"
    if any(name.startswith(EMA + "diffusion_model") for name in tensors):
        taken = weights
        if weights == "ema":
            unet_tensors = {name: _ema_of(tensors, name, path) for name in unet_tensors}
    settings = unet_config(unet_tensors)
    attention = [kind.startswith("CrossAttn") for kind in settings["down_block_types"]]
    pairs = unet_pairs(len(attention), settings["layers_per_block"], attention)
    unet = _assemble(UNet2DConditionModel, settings, rename(unet_tensors, pairs))
    spec = replace(STABLE_DIFFUSION_1, in_channels=settings["in_channels"], weights=taken)
    return Model(
        spec=spec,
        unet=unet,
        autoencoder=_ldm_autoencoder(_part(tensors, AUTOENCODER), spec.latent_scale),
        text_encoders=(_ldm_text(_part(tensors, TEXT), text_heads),),
    )


def _ldm_autoencoder(tensors: Mapping[str, Tensor], latent_scale: float) -> AutoencoderKL:
    tensors = {name: value for name, value in tensors.items() if not name.startswith("loss.")}
    settings = autoencoder_config(tensors, latent_scale=latent_scale)
    levels = count(tensors, r"encoder\.down\.(\d+)\.")
    renamed = rename(tensors, autoencoder_pairs(levels, settings["layers_per_block"]))
    flat = {name: value.flatten(1) if ".to_" in name and value.ndim == 4 else value for name, value in renamed.items()}
    return _assemble(AutoencoderKL, settings, flat)


def _ldm_text(tensors: Mapping[str, Tensor], heads: int | None) -> CLIPTextModel:
    plain = _without_prefix(tensors)
    return _assemble_text(CLIPTextConfig(**text_config(plain, heads=heads)), plain)


def _ema_of(tensors: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    """LitEma keeps names without dots, and without the leading model."""
    key = EMA + "diffusion_model" + name.replace(".", "")
    if key not in tensors:
        raise CheckpointError(f"{path.name} has EMA weights but lacks {key}; load it with weights=raw")
    return tensors[key]


def _assemble(kind: Any, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """A diffusers network around given tensors; nothing is initialised, nothing copied."""
    with torch.device("meta"):
        module = kind.from_config(dict(settings))
    return _fill(module, tensors)


def _assemble_text(settings: CLIPTextConfig, tensors: Mapping[str, Tensor]) -> CLIPTextModel:
    with torch.device("meta"):
        module = CLIPTextModel(settings)
    own = "text_model." if any(name.startswith("text_model.") for name in module.state_dict()) else ""
    _fill(module, {own + name: value for name, value in _without_prefix(tensors).items()})
    for part in module.modules():
        if "position_ids" in part._buffers:  # not saved with the weights, and still on the meta device
            part.register_buffer("position_ids", torch.arange(settings.max_position_embeddings)[None], persistent=False)
    return module


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    wanted = module.state_dict()
    wrong = [name for name, value in tensors.items() if name in wanted and value.shape != wanted[name].shape]
    problems = {
        "lacks": sorted(set(wanted) - set(tensors)),
        "does not know": sorted(set(tensors) - set(wanted)),
        "has another shape for": wrong,
    }
    for verb, names in problems.items():
        if names:
            raise CheckpointError(
                f"the weights do not fit {type(module).__name__}: one {verb} {names[0]!r}, {len(names)} such in all; "
                "is this another architecture?"
            )
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    return module


def _folder_weights(folder: Path) -> Mapping[str, Tensor]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise CheckpointError(f"{folder} has no weights; expected a .safetensors file beside config.json")
    plain = [file for file in files if ".fp16." not in file.name]
    return read_weights((plain or files)[0]).tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; expected a diffusers pipeline folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); the folder is damaged") from error


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Text encoder names without text_model., and without the position ids that old files carry."""
    plain = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    return {name: value for name, value in plain.items() if not name.endswith("position_ids")}
