"""What the miniature Stable Diffusions of both worlds with known truth have in common: text encoder, latents, files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..checkpoint.spec import ModelSpec, spec_to_json
from ..checkpoint.write import model_index, scheduler_config, write_network
from ..errors import ConfigError
from ..files import write_json

__all__ = [
    "LATENT_SCALE",
    "TEXT_WIDTH",
    "compact_text_encoder",
    "export_miniature",
    "finished_weights",
    "fold_latent_scale",
    "make_text_encoder",
    "with_vocabulary",
]

LATENT_SCALE = 0.18215
TEXT_WIDTH = 96
VOCABULARY = 49408
TABLE = "embeddings.token_embedding.weight"


def make_text_encoder() -> CLIPTextModel:
    """CLIP's text encoder with the standard vocabulary and 77 positions."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return CLIPTextModel(config)


def compact_text_encoder(words: Tensor) -> CLIPTextModel:
    """The same with a table of some words only: row k is that of the token words[k]."""
    encoder = make_text_encoder()
    encoder.embeddings.token_embedding = nn.Embedding(len(words), TEXT_WIDTH)
    nn.init.normal_(encoder.embeddings.token_embedding.weight, std=0.02)
    return encoder


def with_vocabulary(state: Mapping[str, Tensor], words: Tensor, name: str = TABLE) -> dict[str, Tensor]:
    """A compact encoder's weights with the standard table, in which the rows of other tokens are zero."""
    table = torch.zeros(VOCABULARY, state[name].shape[1])
    table[words] = state[name].float()
    return {**state, name: table}


@torch.no_grad()
def fold_latent_scale(autoencoder: Any, pictures: Tensor, *, at_once: int = 64) -> None:
    """Shift and scale each latent channel through the 1 x 1 convolutions, so that 0.18215 z has mean 0, variance 1."""
    latents = torch.cat([autoencoder.encode(part).latent_dist.mean for part in pictures.split(at_once)])
    centre, scale = latents.mean((0, 2, 3)), LATENT_SCALE * latents.std((0, 2, 3))
    encode, decode = autoencoder.quant_conv, autoencoder.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ centre
    decode.weight *= scale[None, :, None, None]
    encode.weight[:4] /= scale[:, None, None, None]
    encode.bias[:4] = (encode.bias[:4] - centre) / scale
    encode.bias[4:] -= 2 * torch.log(scale)


def finished_weights(runs: Path, stage: str, world: str) -> dict[str, Tensor]:
    """The weights of a finished stage; raises ConfigError if there are none."""
    path = runs / f"{stage}.safetensors"
    if not path.exists():
        raise ConfigError(f"{path} does not exist; train the stage {stage!r} first (ip2p {world} train {stage})")
    return load_file(path)


def export_miniature(
    folder: Path, spec: ModelSpec, networks: Iterable[tuple[str, Any, Mapping[str, Tensor], str]]
) -> None:
    """Write a diffusers folder in half precision of networks: (folder, configuration, weights, name of the file)."""
    for name, config, weights, file in networks:
        write_network(folder / name, config, weights, torch.float16, file)
    index = model_index(spec)
    del index["tokenizer"]  # the engine carries CLIP's vocabulary
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(spec))
    write_json(folder / "ip2p_config.json", json.loads(spec_to_json(spec)))
    write_json(folder / "model_index.json", index)
