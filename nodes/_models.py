"""Checkpoints as ComfyUI's own MODEL, CLIP and VAE objects, whatever layout they came in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.sd
import comfy.supported_models
import folder_paths
import torch
from torch import Tensor, nn

from ..ip2p_engine.checkpoint.published import PUBLISHED, published
from ..ip2p_engine.errors import CheckpointError, IP2PError, first_line

__all__ = [
    "EMBEDDED",
    "Native",
    "is_embedded",
    "load_native",
    "offer_embedded_control",
    "require_edit",
    "source_of",
    "sources",
    "spec_of",
]

EDITORS, PAINTER = ("embedded-photos", "embedded"), "embedded-sd"
EMBEDDED = (*EDITORS, PAINTER)
PUBLISHED_AS = "published/"  # before the names of ip2p fetch
SPEC, OWN_WORLD = "ip2p_spec", "ip2p_embedded"
CONTROL = Path("ip2p_engine", "scenes", "embedded", "control")
UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
AS_TOLD = "process_ip2p_image_in"  # core's name for how an InstructPix2Pix is told its picture; others lack it
TOLD = (8, 12)  # channels: noise, picture; noise, picture, mask
STANDARD = {("sd1", 320), ("sd2", 320), ("sdxl", 320), ("cosxl", 320)}
LOAD_INSTEAD = "load one, e.g. instruct-pix2pix-00-22000.safetensors, with IP2P Load Checkpoint"


@dataclass(frozen=True, kw_only=True)
class Native:
    """A loaded checkpoint as ComfyUI's objects, and what its weights do not say."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    spec: Any


def offer_embedded_control() -> None:
    """Put the embedded world's ControlNet among those that Load ControlNet Model lists."""
    folder_paths.add_model_folder_path("controlnet", str(Path(__file__).parents[1] / CONTROL))


def sources() -> list[str]:
    """What IP2P Load Checkpoint offers: the embedded models, checkpoints by their names, then the other folders."""
    named = [f"diffusion_models/{name}" for name in folder_paths.get_filename_list("diffusion_models")]
    found = [*folder_paths.get_filename_list("checkpoints"), *named, *_diffusers_folders()]
    # The painter last: it makes pictures from text, and most people come to edit.
    return [*EDITORS, *found, *(f"{PUBLISHED_AS}{one.name}" for one in PUBLISHED), PAINTER]


def source_of(name: str) -> str | Path:
    """The embedded name or the path that a choice of ``sources`` stands for; raises CheckpointError."""
    if name in EMBEDDED:
        return name
    if name not in sources():
        raise CheckpointError(
            f"checkpoint {name!r} is not there; press R in ComfyUI to refresh the lists and choose again"
        )
    if name in folder_paths.get_filename_list("checkpoints"):
        return Path(folder_paths.get_full_path_or_raise("checkpoints", name))
    kind, _, rest = name.partition("/")
    if name.startswith(PUBLISHED_AS):
        return _fetched(name.removeprefix(PUBLISHED_AS))
    if kind == "diffusers":
        return next(
            Path(root) / rest for root in folder_paths.get_folder_paths("diffusers") if (Path(root) / rest).is_dir()
        )
    return Path(folder_paths.get_full_path_or_raise("diffusion_models", rest))


def _fetched(name: str) -> str:
    """The name of a published checkpoint if it is on this disk; raises CheckpointError with the command if not."""
    from ..ip2p_engine.checkpoint.download import fetched

    known = published(name)
    if known is None or fetched(known) is None:
        told = f" ({known.size or 'some GB'}, licence: {known.licence}; {known.page})" if known else ""
        raise CheckpointError(f"{name} is not on this disk yet{told}; run once in a terminal: ip2p fetch {name}")
    return name


def _diffusers_folders() -> list[str]:
    """Folders at any depth, since people keep them as author/name and as the hub's cache does."""
    found, seen = [], set()
    for root in folder_paths.get_folder_paths("diffusers"):
        for place, folders, files in os.walk(root, followlinks=True):
            if (home := os.path.realpath(place)) in seen:  # links in a circle
                folders.clear()
                continue
            seen.add(home)
            if "model_index.json" in files:
                folders.clear()
                found.append(f"diffusers/{Path(place).relative_to(root).as_posix()}")
    return sorted(set(found))


def is_embedded(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether a MODEL is the embedded one, with LoRAs or without, which knows scenes alone."""
    return bool(model.get_attachment(OWN_WORLD))


def spec_of(model: comfy.model_patcher.ModelPatcher) -> Any:
    """The ModelSpec that our loader attached, or what the MODEL's own type says where core loaded it."""
    known = model.get_attachment(SPEC)
    if known is not None:
        return known
    from ..ip2p_engine.checkpoint.spec import ModelSpec, recommended

    sampling, channels = model.get_model_object("model_sampling"), in_channels(model)
    edm = isinstance(sampling, comfy.model_sampling.ModelSamplingContinuousEDM)
    wide = isinstance(model.model, comfy.model_base.SDXL)
    family = "cosxl" if wide and edm else "sdxl" if wide else "sd1"
    prediction = "v" if isinstance(sampling, comfy.model_sampling.V_PREDICTION) else "eps"
    schedule = "edm" if edm else "ddpm"
    return ModelSpec(
        family=family,
        in_channels=channels,
        prediction=prediction,
        schedule=schedule,
        zero_snr=bool(getattr(sampling, "zsnr", False)) and prediction == "v",
        **recommended(family, channels),
    )


def in_channels(model: comfy.model_patcher.ModelPatcher) -> int:
    """Input channels of a MODEL's network; 0 where it has no such setting."""
    return int(model.model.model_config.unet_config.get("in_channels") or 0)


def require_edit(model: comfy.model_patcher.ModelPatcher) -> None:
    """Raises CheckpointError unless the MODEL's network is told a picture as an InstructPix2Pix is."""
    channels = in_channels(model)
    if not hasattr(model.model, AS_TOLD):
        got = f"this MODEL takes {channels} input channels" if channels else "this MODEL is of another kind"
        if channels in TOLD:  # SD2, and UltraEdit, which core takes for models of other kinds
            raise CheckpointError(f"{got} and was not loaded as an InstructPix2Pix; use IP2P Load Checkpoint")
        raise CheckpointError(f"{got}, and an InstructPix2Pix takes 8; {LOAD_INSTEAD}")


def load_native(source: str | Path, *, weights: str = "ema", base: str | Path | None = None) -> Native:
    """Load an embedded model, a file or a diffusers folder.

    A complete single file without a choice of weights goes through ComfyUI's own loader. Everything else is read by
    the engine and handed over under the authors' names. Raises CheckpointError for what is no InstructPix2Pix.
    """
    from ..ip2p_engine.checkpoint.build import check_bundle
    from ..ip2p_engine.checkpoint.read import SAFE_SUFFIXES
    from ..ip2p_engine.checkpoint.source import open_bundle

    bundle = open_bundle(source, weights=weights, header_only=True)
    check_bundle(bundle)  # before core counts layers by the names, as far as a stranger's names go
    if bundle.spec.scale_inputs:
        raise CheckpointError(
            f"{bundle.path.name} is told its scales (--distill-to), which ComfyUI's networks have no place for; edit "
            "with it by ip2p edit, or distil it for one pair of scales"
        )
    if not bundle.spec.edits and source != PAINTER:
        raise CheckpointError(
            f"{bundle.path.name} has a UNet of {bundle.spec.in_channels} input channels (text to image), and an "
            f"InstructPix2Pix takes 8; {LOAD_INSTEAD}"
        )
    standard = (bundle.spec.family, bundle.unet.config["block_out_channels"][0]) in STANDARD
    plain = bundle.layout == "ldm" and bundle.complete and not bundle.ema_parameters
    with _structure_known(bundle.path.name):
        if standard and plain and bundle.path.suffix.lower() in SAFE_SUFFIXES:
            parts = comfy.sd.load_checkpoint_guess_config(str(bundle.path), embedding_directory=_embeddings())[:3]
        else:
            parts = _through_the_engine(source, weights, base, standard)
        return _native(parts, bundle.spec, embedded=source == "embedded")


@contextmanager
def _structure_known(name: str) -> Iterator[None]:
    """Whatever core's networks raise for a structure that they do not know, as one sentence."""
    try:
        yield
    except (IP2PError, comfy.model_management.InterruptProcessingException, comfy.model_management.OOM_EXCEPTION):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{name} is built in a way that ComfyUI's networks do not know ({first_line(error)}); "
            "use it headless with ip2p edit"
        ) from error


def _native(parts: tuple, spec: Any, *, embedded: bool) -> Native:
    model, clip, vae = parts
    model.set_attachments(SPEC, spec)
    model.set_attachments(OWN_WORLD, embedded)
    if spec.edits and not hasattr(model.model, AS_TOLD):
        _tell_pictures(model.model, spec.latent_scale if spec.scaled_condition else 1.0)
    config = model.model.model_config
    if spec.zero_snr:  # core knows it by a tensor, and of SDXL alone
        config.sampling_settings = {**config.sampling_settings, "zsnr": True}
    if spec.prediction == "v" and (spec.zero_snr or model.model.model_type == comfy.model_base.ModelType.EPS):
        sampling = comfy.model_base.model_sampling(config, comfy.model_base.ModelType.V_PREDICTION)
        model.add_object_patch("model_sampling", sampling)
    return Native(model=model, clip=clip, vae=vae, spec=spec)


def _tell_pictures(network: comfy.model_base.BaseModel, scale: float) -> None:
    """Let a network that core takes for another kind see its conditions as core's InstructPix2Pix do.

    Core knows those of SD1.5 and SDXL with 8 channels; SD2 and UltraEdit's 12 channels become inpainting models there.
    """
    network.concat_cond = MethodType(comfy.model_base.IP2P.concat_cond, network)
    setattr(network, AS_TOLD, lambda latents: latents * scale)


def _through_the_engine(source: str | Path, weights: str, base: str | Path | None, standard: bool) -> tuple:
    from ..ip2p_engine.checkpoint.write import ldm_state
    from ..ip2p_engine.networks.model import load_model

    loaded = load_model(source, weights=weights, base=base, device="cpu", dtype="file" if standard else torch.float32)
    state = {name: value.detach() for name, value in ldm_state(loaded).items()}
    if standard:
        return comfy.sd.load_state_dict_guess_config(state, embedding_directory=_embeddings())[:3]
    if loaded.spec.family != "sd1":
        raise CheckpointError(
            f"{source} is a {loaded.spec.family} of unusual width, and ComfyUI knows the usual ones; "
            "use it headless with ip2p edit"
        )
    vae = _narrow_autoencoder(loaded, state)
    return _narrow_model(loaded, state, vae.first_stage_model), _narrow_clip(loaded, state), vae


def _embeddings() -> list[str]:
    """Where ``embedding:NAME`` of a text is looked for, as core's own loader says it."""
    return list(folder_paths.get_folder_paths("embeddings"))


class _SmallLatents(comfy.latent_formats.SD15):
    """Latents of an autoencoder so small that previews are its own pictures."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self._decoder = decoder
        self.latent_rgb_factors, self.latent_rgb_factors_bias = torch.eye(3).tolist(), None
        self.latent_rgb_factors_reshape, self.taesd_decoder_name = self._picture, None

    def _picture(self, latent: Tensor) -> Tensor:
        """RGB in [-1, 1] of scaled latents (B, 4, h, w), the first of them: a preview shows one."""
        place = next(self._decoder.parameters())
        with torch.inference_mode():
            return self._decoder.decode(self.process_out(latent[:1].to(place))).float()


class _NarrowText(comfy.supported_models.SD15):
    """Stable Diffusion 1.5 of any width."""

    model_class = comfy.model_base.BaseModel
    unet_config: ClassVar[dict[str, Any]] = {}

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> comfy.model_base.BaseModel:
        return self.model_class(self, model_type=self.network_type, device=device)


class _NarrowEdit(_NarrowText):
    """InstructPix2Pix of any width."""

    model_class = comfy.model_base.SD15_instructpix2pix


class _Multiple(float):
    """A width as a multiple of the first one; core multiplies the two and builds layers of the product."""

    def __mul__(self, width: float) -> int:  # type: ignore[override]
        return round(float(self) * width)

    __rmul__ = __mul__


def _operations(groups: int) -> type:
    """Core's layers of float32, with norms of so many groups where core asks for 32."""

    class Norm(comfy.ops.disable_weight_init.GroupNorm):
        def __init__(self, num_groups: int, *given: Any, **named: Any) -> None:
            super().__init__(groups, *given, **named)

    return type("Operations", (comfy.ops.disable_weight_init,), {"GroupNorm": Norm})


def _narrow_model(loaded: Any, state: dict[str, Tensor], decoder: nn.Module) -> comfy.model_patcher.ModelPatcher:
    detected = comfy.model_detection.detect_unet_config(state, UNET)
    config = (_NarrowEdit if loaded.spec.edits else _NarrowText)(detected)
    config.unet_config["num_heads"] = loaded.unet.config.attention_head_dim  # diffusers' old name for the heads
    widths = loaded.unet.config.block_out_channels
    config.unet_config["channel_mult"] = [_Multiple(width / widths[0]) for width in widths]
    config.custom_operations = _operations(loaded.unet.config.norm_num_groups)
    types = comfy.model_base.ModelType
    config.network_type = types.V_PREDICTION if loaded.spec.prediction == "v" else types.EPS
    config.latent_format = _SmallLatents(decoder)
    config.set_inference_dtype(torch.float32, None)
    network = config.get_model(state, UNET)
    network.load_model_weights(dict(state), UNET)
    manager = comfy.model_management
    return comfy.model_patcher.ModelPatcher(
        network, load_device=manager.get_torch_device(), offload_device=manager.unet_offload_device()
    )


def _narrow_clip(loaded: Any, state: dict[str, Tensor]) -> comfy.sd.CLIP:
    config = loaded.text_encoders[0].config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    options = {"clip_l_model_config": {name: getattr(config, name) for name in names}}
    target = comfy.supported_models.SD15({}).clip_target()
    given = comfy.supported_models.SD15({}).process_clip_state_dict(dict(state))
    clip = comfy.sd.CLIP(target, embedding_directory=_embeddings(), tokenizer_data=given, model_options=options)
    clip.load_sd(given, full_model=True)
    return clip


def _narrow_autoencoder(loaded: Any, state: dict[str, Tensor]) -> comfy.sd.VAE:
    """ComfyUI builds norms of 32 groups and no others, so it builds a wider network, which gets the narrow weights."""
    config = loaded.autoencoder.config
    widths = config.block_out_channels
    shape = {
        "double_z": True,
        "z_channels": config.latent_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.layers_per_block,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    settings = {"ddconfig": shape, "embed_dim": config.latent_channels}
    blank = comfy.ldm.models.autoencoder.AutoencoderKL(**settings).state_dict()
    vae = comfy.sd.VAE(sd=blank, config={"params": settings})
    own = {name.removeprefix(AUTOENCODER): value for name, value in state.items() if name.startswith(AUTOENCODER)}
    for name, value in own.items():
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(value.to(vae.vae_dtype), requires_grad=False)
        setattr(vae.first_stage_model.get_submodule(owner), leaf, parameter)
    _regroup(vae.first_stage_model, config.norm_num_groups)
    vae.size = None
    vae.patcher.size = 0
    return vae


def _regroup(network: nn.Module, groups: int) -> None:
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups, module.num_channels = groups, len(module.weight)
