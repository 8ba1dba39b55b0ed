"""What a stranger's configuration may ask for, held against the tensors before any network is built from it.

A configuration is a few bytes that can ask for a network of any size, for odd parts of diffusers, and (in
transformers) for code from the hub. So each field has a rule here; a field without one has to be the class's default.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel

from ..errors import CheckpointError
from .read import MAX_TENSORS
from .spec import Part

__all__ = ["TEXTS", "checked_config", "diffusers_class"]

TENSORS_A_BLOCK = 4  # at least: residual blocks have 8 and more, transformer blocks 16 and more
SHOWN = 60
Rule = Callable[[Any], bool]


def _anything(value: Any) -> bool:
    return True


def _flag(value: Any) -> bool:
    return type(value) is bool


def _whole(low: int, high: int, *, none: bool = False) -> Rule:
    return lambda value: (none and value is None) or (type(value) is int and low <= value <= high)


def _number(low: float, high: float) -> Rule:
    """Above ``low``, as zero would divide or vanish."""
    return lambda value: type(value) in (int, float) and math.isfinite(value) and low < value <= high


def _one_of(*values: Any) -> Rule:
    return lambda value: not isinstance(value, list | dict) and value in values


def _all(rule: Rule) -> Rule:
    return lambda value: isinstance(value, list | tuple) and 0 < len(value) < MAX_TENSORS and all(map(rule, value))


def _one_or_all(rule: Rule) -> Rule:
    return lambda value: rule(value) or _all(rule)(value)


WIDTH, COUNT = _whole(1, 1 << 20), _whole(1, MAX_TENSORS)
MAYBE_WIDTH = _whole(1, 1 << 20, none=True)
NUMBER = _number(-1e6, 1e6)
NETWORK = {
    "block_out_channels": _all(WIDTH),
    "layers_per_block": _one_or_all(COUNT),
    "act_fn": _one_of("silu", "swish", "gelu", "mish", "relu"),
    "norm_num_groups": WIDTH,
    "sample_size": _anything,
}
UNET = {
    **NETWORK,
    "in_channels": WIDTH,
    "out_channels": _one_of(4),
    "down_block_types": _all(_one_of("DownBlock2D", "CrossAttnDownBlock2D")),
    "up_block_types": _all(_one_of("UpBlock2D", "CrossAttnUpBlock2D")),
    "transformer_layers_per_block": _one_or_all(COUNT),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": _one_or_all(WIDTH),
    "num_attention_heads": lambda value: value is None or _one_or_all(WIDTH)(value),
    "use_linear_projection": _flag,
    "upcast_attention": lambda value: value is None or _flag(value),
    "flip_sin_to_cos": _flag,
    "freq_shift": _one_of(0, 1),
    "downsample_padding": _one_of(0, 1),
    "mid_block_scale_factor": _number(0, 1e6),
    "norm_eps": _number(0, 1),
    "dropout": _number(-1, 1),
    "time_cond_proj_dim": MAYBE_WIDTH,
    "addition_embed_type": _one_of(None, "text_time"),
    "addition_time_embed_dim": MAYBE_WIDTH,
    "projection_class_embeddings_input_dim": MAYBE_WIDTH,
}
CONTROL = {
    **{name: rule for name, rule in UNET.items() if name not in ("out_channels", "up_block_types", "upcast_attention")},
    "in_channels": _one_of(4),
    "conditioning_channels": _whole(1, 64),
    "conditioning_embedding_out_channels": _all(WIDTH),
    "mid_block_type": _one_of("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "global_pool_conditions": _flag,
    "only_cross_attention": _one_of(False),
}
AUTOENCODER = {
    **NETWORK,
    "in_channels": _one_of(3),
    "out_channels": _one_of(3),
    "latent_channels": _one_of(4),
    "down_block_types": _all(_one_of("DownEncoderBlock2D")),
    "up_block_types": _all(_one_of("UpDecoderBlock2D")),
    "scaling_factor": NUMBER,
    "shift_factor": lambda value: value is None or NUMBER(value),
    "latents_mean": _anything,
    "latents_std": _anything,
    "force_upcast": _anything,
    "use_quant_conv": _flag,
    "use_post_quant_conv": _flag,
    "mid_block_add_attention": _flag,
}
TOKEN = _whole(-1, 1 << 24, none=True)
TEXT = {
    "vocab_size": WIDTH,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "projection_dim": WIDTH,
    "num_hidden_layers": COUNT,
    "num_attention_heads": WIDTH,
    "max_position_embeddings": WIDTH,
    "hidden_act": _one_of("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"),
    "layer_norm_eps": _number(0, 1),
    "bos_token_id": TOKEN,
    "eos_token_id": TOKEN,
    "pad_token_id": TOKEN,
}
RULES: dict[str, dict[str, Rule]] = {
    "unet": UNET,
    "autoencoder": AUTOENCODER,
    "control": CONTROL,
    "text": TEXT,
    "projected_text": TEXT,
}
TEXTS = ("text", "projected_text")


def checked_config(part: Part, word: str, name: str) -> dict[str, Any]:
    """The fields that a network is built from; ``word`` and ``name`` say whose they are.

    Raises CheckpointError for a value outside its rule, and for more layers than the tensors could fill.
    """
    rules, config = RULES[part.kind], part.config
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{name}: the {word}'s configuration is {_short(config)}; get the checkpoint again")
    for field, value in config.items():
        if field in rules and not rules[field](value):
            raise _refusal(field, value, word, name)
    for field, default in _defaults(part.kind).items():
        if field not in rules and not _same(config.get(field, default), default):
            raise _refusal(field, config[field], word, name)
    asked, held = _blocks(part), len(part.tensors)
    if asked * TENSORS_A_BLOCK > held:
        raise CheckpointError(
            f"{name}: the {word}'s configuration asks for {asked:,} blocks of layers and the file holds "
            f"{held:,} tensors, too few for them; it is damaged or meant to harm, get the checkpoint from its author"
        )
    return {field: value for field, value in config.items() if field in rules}


def diffusers_class(kind: str) -> Any:
    """The class of a network that is no text encoder."""
    if kind == "control":
        # Not above: all of diffusers' ControlNets come with it, and few edits use one.
        from diffusers import ControlNetModel

        return ControlNetModel
    return {"unet": UNet2DConditionModel, "autoencoder": AutoencoderKL}[kind]


def _refusal(field: str, value: Any, word: str, name: str) -> CheckpointError:
    shown = f"{str(field)[:SHOWN]} = {_short(value)}"
    return CheckpointError(
        f"{name}: the {word}'s configuration says {shown}, which no Stable Diffusion has; get the checkpoint again"
    )


def _short(value: Any) -> str:
    """A value that may hold anything, without making all of its text."""
    if isinstance(value, str | int | float | bool | None):
        return repr(value[:SHOWN] if isinstance(value, str) else value)[:SHOWN]
    return f"a {type(value).__name__} of {len(value):,}" if hasattr(value, "__len__") else type(value).__name__


@lru_cache(maxsize=8)
def _defaults(kind: str) -> Mapping[str, Any]:
    """Of the fields of diffusers' classes; transformers' text encoders take a hundred, and get those with rules."""
    if kind in TEXTS:
        return {}
    parameters = inspect.signature(diffusers_class(kind).__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def _same(value: Any, default: Any) -> bool:
    """JSON has lists where Python's defaults are tuples."""
    return (tuple(value) if isinstance(value, list) else value) == default


def _blocks(part: Part) -> int:
    """How many residual and transformer blocks, at least as many as will be built; every value has its rule by now."""
    config = part.config
    if part.kind in TEXTS:
        return int(config.get("num_hidden_layers", 12))
    said = {**_defaults(part.kind), **config}
    levels = len(said["block_out_channels"])
    layers = _by_level(said["layers_per_block"], levels)
    if part.kind == "autoencoder":
        return sum(2 * one + 1 for one in layers)
    depths = _by_level(said["transformer_layers_per_block"], levels)
    down = _attended(layers, depths, said["down_block_types"])
    if part.kind == "control":
        return max(levels, down + depths[-1])
    up = _attended([one + 1 for one in reversed(layers)], depths[::-1], said["up_block_types"])
    return max(levels, down + up + depths[-1])


def _by_level(value: Any, levels: int) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def _attended(layers: list[int], depths: list[int], types: list[str]) -> int:
    """Residual blocks, and where a level attends, as many transformer blocks to each as the depth says."""
    rows = zip(layers, depths, types, strict=False)
    return sum(one * (1 + depth * kind.startswith("CrossAttn")) for one, depth, kind in rows)
