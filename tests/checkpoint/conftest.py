"""Miniature checkpoints of every family, with the real names of their tensors."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ip2p_engine.checkpoint.spec import ModelSpec, recommended
from ip2p_engine.checkpoint.write import save_diffusers, save_ldm
from ip2p_engine.networks.model import Model

XL_CHANNELS, XL_DEPTHS, POOLED, TIME_IDS, WORDS = (32, 64, 64), (1, 1, 2), 24, 8, 600
LEVEL_WORDS = {False: ("DownBlock2D", "UpBlock2D"), True: ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")}


def tiny_unet(family: str, in_channels: int, context: int) -> UNet2DConditionModel:
    """SD1 and SD2: attention on all levels but the last; SDXL: on all but the first, of rising depth."""
    double = family in ("sdxl", "cosxl")
    attention = (False, True, True) if double else (True, False)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_IDS,
        "projection_class_embeddings_input_dim": 6 * TIME_IDS + POOLED,
        "transformer_layers_per_block": XL_DEPTHS,
    }
    return UNet2DConditionModel(
        in_channels=in_channels,
        block_out_channels=XL_CHANNELS if double else (32, 64),
        down_block_types=tuple(LEVEL_WORDS[a][0] for a in attention),
        up_block_types=tuple(LEVEL_WORDS[a][1] for a in reversed(attention)),
        layers_per_block=1,
        cross_attention_dim=context,
        attention_head_dim=(1, 1, 1) if double else (1, 1) if family == "sd2" else 8,
        use_linear_projection=family != "sd1",
        **(added if double else {}),
    )


def tiny_text(width: int, *, open_clip: bool, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="gelu" if open_clip else "quick_gelu",
        projection_dim=POOLED if projected else width,
        bos_token_id=WORDS - 2,
        eos_token_id=WORDS - 1,
        pad_token_id=0 if open_clip else WORDS - 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def tiny_autoencoder(scale: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        scaling_factor=scale,
    )


@cache
def tiny_model(family: str = "sd1", in_channels: int = 8, prediction: str | None = None, seed: int = 0) -> Model:
    """A random model of the family; the sizes differ from any real one, not the structure. Shared: never changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        texts = {
            "sd1": lambda: (tiny_text(24, open_clip=False),),
            "sd2": lambda: (tiny_text(24, open_clip=True),),
        }.get(family, lambda: (tiny_text(16, open_clip=False), tiny_text(24, open_clip=True, projected=True)))()
        values = recommended(family, in_channels)
        spec = ModelSpec(
            family=family,
            in_channels=in_channels,
            prediction=prediction or ("v" if family == "cosxl" else "eps"),
            schedule="edm" if family == "cosxl" else "ddpm",
            **values,
        )
        width = sum(text.config.hidden_size for text in texts)
        networks = (tiny_unet(family, in_channels, width), tiny_autoencoder(values["latent_scale"]), *texts)
        for network in networks:
            network.eval().requires_grad_(False)
    return Model(spec=spec, unet=networks[0], autoencoder=networks[1], text_encoders=networks[2:])


def assert_same(ours: Model, theirs: Model) -> None:
    """Bit-equal networks of equal behaviour-relevant configuration."""
    assert len(ours.text_encoders) == len(theirs.text_encoders)
    pairs = [(ours.unet, theirs.unet), (ours.autoencoder, theirs.autoencoder)]
    for one, two in [*pairs, *zip(ours.text_encoders, theirs.text_encoders, strict=True)]:
        assert type(one) is type(two)
        left, right = one.state_dict(), two.state_dict()
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []


def tensors_of(model: Model) -> dict[str, torch.Tensor]:
    """The LDM file's content as fresh tensors."""
    from ip2p_engine.checkpoint.write import ldm_state

    return {name: value.clone().contiguous() for name, value in ldm_state(model).items()}


@pytest.fixture(scope="session")
def make_model():
    return tiny_model


@pytest.fixture(scope="session")
def same_model():
    return assert_same


@pytest.fixture(scope="session")
def ldm_tensors():
    return tensors_of


@pytest.fixture(scope="session")
def sd1():
    return tiny_model()


@pytest.fixture(scope="session")
def sd1_file(sd1, tmp_path_factory):
    """The SD1.5 miniature as our single file. Shared: never changed."""
    return save_ldm(sd1, tmp_path_factory.mktemp("sd1") / "file.safetensors")


@pytest.fixture(scope="session")
def sd1_folder(sd1, tmp_path_factory):
    """The same as a pipeline folder. Shared: never changed."""
    return save_diffusers(sd1, tmp_path_factory.mktemp("sd1") / "folder")
