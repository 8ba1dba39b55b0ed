"""Small bases and pairs to train on, in seconds."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ip2p_engine.checkpoint.spec import recommended
from ip2p_engine.checkpoint.write import save_ldm
from ip2p_engine.data.store import PairRecord, PairWriter
from ip2p_engine.networks.model import Model, ModelSpec
from ip2p_engine.scenes.grammar import sample_edits
from ip2p_engine.scenes.world import render
from ip2p_engine.train import TrainConfig, train

WIDTH = 8
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
}


def png(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def true_pairs(count, seed=3):
    """Renders before and after a training edit."""
    return [
        PairRecord(
            original_image=png(render(edit.source)),
            edited_image=png(render(edit.target)),
            edit_prompt=edit.instruction,
            original_prompt="",
            edited_prompt="",
            seed=None,
            p=None,
            cfg=None,
            key=f"{number:07d}/0",
        )
        for number, edit in enumerate(sample_edits(count, seed=seed, held_out=False))
    ]


@pytest.fixture(scope="session")
def records():
    return true_pairs(10)


@pytest.fixture(scope="session")
def store(records, tmp_path_factory):
    """Ten true pairs of scenes."""
    folder = tmp_path_factory.mktemp("pairs")
    with PairWriter(folder, manifest={"config": {"truth": True}}) as writer:
        writer.write(*records)
    return folder


@pytest.fixture(scope="session")
def masked(records, tmp_path_factory):
    """The ten pairs with masks: the left half was edited, of the second the whole, of the third nobody says."""
    folder = tmp_path_factory.mktemp("masked")
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    masks = [half, Image.new("L", (64, 64), 255), None, *[half] * 7]
    with PairWriter(folder, manifest={"config": {}}) as writer:
        writer.write(*(replace(row, mask=mask and png(mask)) for row, mask in zip(records, masks, strict=True)))
    return folder


@cache
def small_model(family="sd1"):
    """An untrained text-to-image Model: one level with attention, since runs here load and save many times."""
    double = family in ("sdxl", "cosxl")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        texts = (_text(CLIPTextModel), _text(CLIPTextModelWithProjection))[: 1 + double]
        autoencoder = AutoencoderKL(
            block_out_channels=(4, 4, 4, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=2,
        )
        unet = UNet2DConditionModel(
            in_channels=4,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            cross_attention_dim=WIDTH * (1 + double),
            attention_head_dim=4,
            norm_num_groups=4,
            **(ADDED if double else {}),
        )
    for network in (unet, autoencoder, *texts):
        network.eval().requires_grad_(False)
    values = {**recommended(family, 4), "resolution": 64, "steps": 2}
    values |= {"cosxl": {"prediction": "v", "schedule": "edm"}, "sd2": {"prediction": "v"}}.get(family, {})
    spec = ModelSpec(family=family, in_channels=4, **{"prediction": "eps", **values})
    return Model(spec=spec, unet=unet, autoencoder=autoencoder, text_encoders=texts)


def _text(kind):
    return kind(
        CLIPTextConfig(
            hidden_size=WIDTH,
            projection_dim=WIDTH,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )


@pytest.fixture(scope="session")
def tiny_model():
    """Makes an untrained text-to-image Model of a family, 64 pixels; shared, so never changed."""
    return small_model


@pytest.fixture(scope="session")
def base(tiny_model, tmp_path_factory):
    """The path of a saved text-to-image checkpoint of a family."""
    folder, written = tmp_path_factory.mktemp("bases"), {}

    def path(family="sd1"):
        if family not in written:
            written[family] = save_ldm(tiny_model(family), folder / f"{family}.safetensors")
        return written[family]

    return path


def config(**overrides):
    """A short run on 64 pixels."""
    values = {
        "steps": 4,
        "batch_size": 4,
        "resolution": 64,
        "resize": (64, 72),
        "workers": 0,
        "validate_every": 0,
        "learning_rate": 1e-5,
    }
    return TrainConfig(**{**values, **overrides})


@pytest.fixture(scope="session")
def run_in(store, base):
    """Trains: (folder, family or path of the base, data, device, hooks, overrides of the config)."""
    saved_base = base

    def start(folder, *, family="sd1", base=None, data=None, device="cpu", hooks=None, **overrides):
        return train(
            config(**overrides),
            data=store if data is None else data,
            base=base or saved_base(family),
            out=folder,
            device=device,
            hooks=hooks,
        )

    return start


@pytest.fixture
def run(run_in, tmp_path):
    """The same, in a folder of the test's own."""
    return lambda name="run", **settings: run_in(tmp_path / name, **settings)
