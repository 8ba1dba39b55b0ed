"""The report card says what loading would find, without loading."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ip2p_engine.checkpoint import read
from ip2p_engine.checkpoint.recognise import PREFIXES, ema_name
from ip2p_engine.checkpoint.report import report_card
from ip2p_engine.checkpoint.write import save_diffusers, save_ldm

WEIGHT_FILES = {
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
}


@pytest.mark.parametrize(
    ("family", "base", "prediction", "condition"),
    [
        ("sd1", "SD1.5", "eps", "unscaled"),
        ("sd2", "SD2", "eps", "unscaled"),
        ("sdxl", "SDXL", "eps", "unscaled"),
        ("cosxl", "CosXL", "v", "scaled"),
    ],
)
def test_families(family, base, prediction, condition, make_model, ldm_tensors, monkeypatch, tmp_path):
    model = make_model(family)
    state = ldm_tensors(model)
    save_file(state, tmp_path / "file.safetensors")
    monkeypatch.setattr(read, "read_weights", None)
    card = report_card(tmp_path / "file.safetensors")
    assert (card.base, card.prediction, card.condition) == (base, prediction, condition)
    assert (card.layout, card.task, card.in_channels) == ("ldm", "InstructPix2Pix", 8)
    assert card.parameters["unet"] == sum(p.numel() for p in model.unet.parameters())
    assert set(card.dtypes.values()) == {"float32"}
    assert card.file_bytes == (tmp_path / "file.safetensors").stat().st_size
    assert card.lacking == ()


@pytest.mark.parametrize(
    ("in_channels", "task", "settings"),
    [
        (4, "text to image", (7.5, 1.0, 512, 100)),
        (8, "InstructPix2Pix", (7.5, 1.5, 512, 100)),
        (12, "InstructPix2Pix with a mask", (7.5, 1.5, 512, 50)),
    ],
)
def test_channels_tell_the_task(in_channels, task, settings, make_model, ldm_tensors, tmp_path):
    save_file(ldm_tensors(make_model(in_channels=in_channels)), tmp_path / "file.safetensors")
    card = report_card(tmp_path / "file.safetensors")
    assert (card.task, card.in_channels) == (task, in_channels)
    assert (card.text_cfg, card.image_cfg, card.resolution, card.steps) == settings


def test_no_tensor_is_read_from_safetensors(sd1, ldm_tensors, monkeypatch, tmp_path):
    save_file(ldm_tensors(sd1), tmp_path / "file.safetensors")

    def never(*_, **__):
        raise AssertionError("opened for tensors")

    monkeypatch.setattr(read, "safe_open", never)
    assert report_card(tmp_path / "file.safetensors").base == "SD1.5"


def test_layouts(sd1, ldm_tensors, tmp_path):
    folder = save_diffusers(sd1, tmp_path / "folder")
    unet = {n: v for n, v in ldm_tensors(sd1).items() if n.startswith(PREFIXES["unet"])}
    save_file(unet, tmp_path / "unet.safetensors")
    assert report_card(folder).layout == "diffusers"
    card = report_card(tmp_path / "unet.safetensors")
    assert (card.layout, card.lacking) == ("ldm-unet", ("autoencoder", "text_encoder"))
    assert "name a base" in str(card)
    sd1.unet.save_pretrained(tmp_path / "lone")
    assert report_card(tmp_path / "lone").layout == "diffusers-unet"


def test_ema_and_the_choice(make_model, ldm_tensors, tmp_path):
    state = ldm_tensors(make_model())
    prefix = PREFIXES["unet"]
    state.update({ema_name(n.removeprefix(prefix)): v.clone() for n, v in state.items() if n.startswith(prefix)})
    save_file(state, tmp_path / "both.safetensors")
    card = report_card(tmp_path / "both.safetensors")
    assert (card.has_ema, card.weights) == (True, "ema")
    assert report_card(tmp_path / "both.safetensors", weights="raw").weights == "raw"
    assert "ema (averaged)" in str(card)
    assert "with raw and ema weights" in str(card)


def test_a_file_of_averaged_weights_alone_has_no_choice(sd1, tmp_path):
    averaged = replace(sd1, spec=replace(sd1.spec, weights="ema"))
    card = report_card(save_ldm(averaged, tmp_path / "file.safetensors"))
    assert (card.has_ema, card.weights) == (False, "ema")
    assert "with raw" not in str(card)


def test_embedded():
    card, text_to_image = report_card("embedded"), report_card("embedded-sd")
    assert (card.base, card.prediction, card.in_channels) == ("embedded", "v", 8)
    assert (text_to_image.task, text_to_image.condition) == ("text to image", "none")


def test_training_settings_and_digest(sd1, tmp_path):
    path = save_ldm(sd1, tmp_path / "file.safetensors", torch.float16, training={"steps": 300, "learning_rate": 1e-4})
    card = report_card(path, sha256=True)
    assert card.training == {"steps": 300, "learning_rate": 1e-4}
    assert card.sha256 == {"file.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert report_card(path).sha256 == {}
    folder = save_diffusers(sd1, tmp_path / "folder", training={"steps": 300})
    card = report_card(folder, sha256=True)
    assert card.training == {"steps": 300}
    assert card.sha256 == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in WEIGHT_FILES}


def test_json_and_text(sd1, tmp_path):
    card = report_card(save_ldm(sd1, tmp_path / "file.safetensors"))
    values = json.loads(card.to_json())
    assert (values["base"], values["text_cfg"], values["image_cfg"]) == ("SD1.5", 7.5, 1.5)
    text = str(card)
    for words in ("SD1.5; InstructPix2Pix, 8 input channels", "unscaled image latent", "s_T 7.5, s_I 1.5", "float32"):
        assert words in text
    assert values["memory"]["float32"] == 2 * values["memory"]["float16"] > values["parameters"]["unet"] * 4
