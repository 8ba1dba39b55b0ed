"""LoRA files of every trainer: what they mean, W + weight alpha / rank up down, whatever they call it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ip2p_engine import InstructPix2Pix, cli
from ip2p_engine.checkpoint.keys import ldm_unet_name
from ip2p_engine.checkpoint.lora import Lora, parse_lora, with_loras
from ip2p_engine.errors import CheckpointError, ConfigError
from ip2p_engine.networks.model import load_model
from ip2p_engine.scenes.world import Scene, render

HEART = Scene(shape="heart", colour="red", background="sky", size="large")
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
OUT = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"
RANK, ALPHA = 3, 6.0


def factors(model):
    """{(network, layer): (down, up)} for linear layers, a convolution and the text encoder."""
    made, random = {}, torch.Generator().manual_seed(0)
    encoder = model.text_encoders[0].state_dict()
    text = next(name for name in encoder if name.endswith(f"{TEXT}.weight"))
    weights = {("unet", name): model.unet.state_dict()[f"{name}.weight"] for name in (ATTENTION, OUT, CONV)}
    for key, weight in {**weights, ("text", text.removesuffix(".weight")): encoder[text]}.items():
        down = torch.randn(RANK, *weight.shape[1:], generator=random)
        up = torch.randn(weight.shape[0], RANK, *[1] * (weight.ndim - 2), generator=random)
        made[key] = (down * 0.1, up * 0.1)
    return made


def text_layer(layer):
    return "text_model." + layer.removeprefix("text_model.")


def kohya(made, config):
    state = {}
    for (network, layer), (down, up) in made.items():
        name = f"lora_unet_{layer}" if network == "unet" else f"lora_te_{text_layer(layer)}"
        name = name.replace(".", "_")
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return state


def kohya_ldm(made, config):
    """kohya's SDXL files name the UNet's layers as the LDM layout does, and number the text encoders."""
    state = {}
    for (network, layer), (down, up) in made.items():
        ldm = ldm_unet_name(f"{layer}.weight", config).removesuffix(".weight") if network == "unet" else None
        name = (f"lora_unet_{ldm}" if ldm else f"lora_te1_{text_layer(layer)}").replace(".", "_")
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return state


def diffusers_old(made, config):
    state = {}
    for (network, layer), (down, up) in made.items():
        name = f"unet.{layer}.lora" if network == "unet" else f"text_encoder.{text_layer(layer)}.lora_linear_layer"
        state |= {f"{name}.down.weight": down, f"{name}.up.weight": up * ALPHA / RANK}
    return state


def diffusers_processors(made, config):
    state = {}
    for (network, layer), (down, up) in made.items():
        head, _, last = layer.removesuffix(".0").rpartition(".")
        name = f"unet.{head}.processor.{last}_lora" if ".attn" in layer and network == "unet" else f"unet.{layer}.lora"
        name = name if network == "unet" else f"text_encoder.{text_layer(layer)}.lora_linear_layer"
        state |= {f"{name}.down.weight": down, f"{name}.up.weight": up * ALPHA / RANK}
    return state


def peft(made, config):
    state = {}
    for (network, layer), (down, up) in made.items():
        name = f"unet.{layer}" if network == "unet" else f"text_encoder.{text_layer(layer)}"
        state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return state


FORMS = [kohya, kohya_ldm, diffusers_old, diffusers_processors, peft]


def written(path, state, metadata=None):
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata)
    return path


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_is_the_same_sum(form, editor, tmp_path):
    model = editor.model
    made = factors(model)
    path = written(tmp_path / "a.safetensors", form(made, model.unet.config))
    merged = with_loras(model, [Lora(path=path, weight=0.5)])
    for (network, layer), (down, up) in made.items():
        before, after = ((m.unet if network == "unet" else m.text_encoders[0]).state_dict() for m in (model, merged))
        weight = before[f"{layer}.weight"]
        expected = weight + 0.5 * ALPHA / RANK * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        torch.testing.assert_close(after[f"{layer}.weight"], expected, atol=1e-6, rtol=1e-6)
        assert not torch.equal(weight, after[f"{layer}.weight"])
    same = [n for n, v in model.unet.state_dict().items() if v.data_ptr() == merged.unet.state_dict()[n].data_ptr()]
    assert len(same) == len(model.unet.state_dict()) - 3


def test_peft_s_alpha_in_the_header(editor, tmp_path):
    made = factors(editor.model)
    state = {name: value for name, value in peft(made, None).items() if not name.endswith(".alpha")}
    said = {"unet.lora_alpha": ALPHA, "text_encoder.lora_alpha": ALPHA}
    one = written(tmp_path / "a.safetensors", state, {"format": "pt", "lora_adapter_metadata": json.dumps(said)})
    other = written(tmp_path / "b.safetensors", peft(made, None))
    a, b = (with_loras(editor.model, [Lora(path=path)]).unet.state_dict() for path in (one, other))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_an_editor_takes_them_and_gives_them_back(tmp_path):
    editor = InstructPix2Pix.load("embedded", device="cpu")
    path = written(tmp_path / "style.safetensors", kohya(factors(editor.model), None))
    plain, plain_model = editor.edit(render(HEART), "make it snow", steps=2)[0], editor.model
    editor.load_lora(path, 0.5)
    editor.load_lora(path, 0.5)
    twice = editor.edit(render(HEART), "make it snow", steps=2)[0]
    assert [row["weight"] for row in twice.settings["loras"]] == [0.5, 0.5]
    assert str(tmp_path) not in json.dumps(twice.settings) and twice.settings["loras"][0]["name"] == "style.safetensors"
    editor.unload_loras()
    assert editor.model is plain_model
    again = editor.edit(render(HEART), "make it snow", steps=2)[0]
    assert torch.equal(again.latent, plain.latent) and (twice.latent - plain.latent).abs().max() > 1e-3
    editor.load_lora(path)
    once = editor.edit(render(HEART), "make it snow", steps=2)[0]
    assert (once.latent - twice.latent).abs().max() < 1e-4


def test_edit_with_a_lora_is_editing_with_the_merged_checkpoint(tmp_path, editor):
    path = written(tmp_path / "style.safetensors", kohya(factors(editor.model), None))
    render(HEART).save(tmp_path / "a.png")
    merged = tmp_path / "merged.safetensors"
    assert cli.main(["convert", "embedded", str(merged), "--to", "ldm", "--lora", f"{path}:0.7"]) == 0
    how = ["--instruction", "make it snow", "--steps", "2"]
    assert cli.main(["edit", f"{tmp_path}/a.png", *how, "--lora", f"{path}:0.7", "--out", f"{tmp_path}/x.png"]) == 0
    assert cli.main(["edit", f"{tmp_path}/a.png", *how, "--checkpoint", str(merged), "--out", f"{tmp_path}/y.png"]) == 0
    from PIL import Image

    x, y = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in "xy")
    assert np.abs(x - y).max() <= 1


def test_a_convolution_of_four_channels_is_one_of_eight(editor, tmp_path):
    weight = editor.model.unet.conv_in.weight
    down, up = torch.randn(2, 4, 3, 3), torch.randn(len(weight), 2, 1, 1)
    path = written(
        tmp_path / "a.safetensors", {"unet.conv_in.lora.down.weight": down, "unet.conv_in.lora.up.weight": up}
    )
    merged = with_loras(editor.model, [Lora(path=path)]).unet.conv_in.weight
    assert torch.equal(merged[:, 4:], weight[:, 4:])
    torch.testing.assert_close(
        merged[:, :4] - weight[:, :4], (up.flatten(1) @ down.flatten(1)).reshape(-1, 4, 3, 3), atol=1e-5, rtol=0
    )


def test_names_with_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "a.safetensors:0.5"):
        (tmp_path / name).touch()
    assert parse_lora("a.safetensors:0.25") == Lora(path=tmp_path.__class__("a.safetensors"), weight=0.25)
    assert parse_lora("a.safetensors:0.5").weight == 1 and parse_lora("a.safetensors").weight == 1
    for wrong in ("b.safetensors", "C:\\a.safetensors", "a.safetensors:much"):
        with pytest.raises(CheckpointError, match="does not exist or is no file"):
            parse_lora(wrong)
    with pytest.raises(ConfigError, match="the weight of a.safetensors is nan"):
        parse_lora("a.safetensors:nan")


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"x.weight": torch.ones(2)}, "holds no LoRA"),
        ({"lora_unet_x.hada_w1_a": torch.ones(2)}, "is a LoHa"),
        (
            {"unet.x.lora.down.weight": torch.ones(2, 2), "unet.x.lora.up.weight": torch.ones(2, 2)},
            "no layer that this model has",
        ),
        (
            {
                f"unet.{ATTENTION}.lora.down.weight": torch.ones(2, 2),
                f"unet.{ATTENTION}.lora.up.weight": torch.ones(2, 2),
            },
            "of the model's own family",
        ),
        (
            {
                f"unet.{ATTENTION}.lora.down.weight": torch.ones(3, 2),
                f"unet.{ATTENTION}.lora.up.weight": torch.ones(2, 2),
            },
            "do not multiply",
        ),
    ],
    ids=["none", "LoHa", "another model", "another width", "unequal"],
)
def test_what_does_not_fit_is_a_sentence(state, sentence, editor, tmp_path):
    path = written(tmp_path / "a.safetensors", state)
    with pytest.raises(CheckpointError, match=sentence):
        with_loras(editor.model, [Lora(path=path)])


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_families(family, tmp_path, tiny_pair_model):
    model = tiny_pair_model(family, torch.float32)
    layers = [n.removesuffix(".weight") for n in model.unet.state_dict() if n.endswith("attn2.to_v.weight")]
    state, deltas = {}, {}
    for layer in layers:
        weight = model.unet.state_dict()[f"{layer}.weight"]
        down, up = torch.randn(1, weight.shape[1]), torch.randn(len(weight), 1)
        name = f"lora_unet_{ldm_unet_name(layer + '.weight', model.unet.config).removesuffix('.weight')}"
        state |= {f"{name.replace('.', '_')}.lora_down.weight": down, f"{name.replace('.', '_')}.lora_up.weight": up}
        deltas[f"{layer}.weight"] = up @ down
    merged = with_loras(model, [Lora(path=written(tmp_path / "a.safetensors", state))])
    for name, delta in deltas.items():
        torch.testing.assert_close(merged.unet.state_dict()[name], model.unet.state_dict()[name] + delta)


def test_diffusers_adds_the_same(editor, tmp_path):
    """An independent reader of kohya's names: diffusers' own, by peft."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from diffusers.models.attention_processor import AttnProcessor

    made = {key: value for key, value in factors(editor.model).items() if key[0] == "unet" and key[1] != CONV}
    path = written(tmp_path / "a.safetensors", kohya(made, None))
    unet = load_model("embedded", device="cpu").unet
    state, alphas = StableDiffusionInstructPix2PixPipeline.lora_state_dict(str(path), unet_config=unet.config)
    StableDiffusionInstructPix2PixPipeline.load_lora_into_unet(state, alphas, unet)
    x, text = torch.randn(1, 8, 8, 8), torch.randn(1, 77, unet.config.cross_attention_dim)
    merged = with_loras(editor.model, [Lora(path=path)]).unet
    with torch.no_grad():
        ours, plain = (net(x, 500, text).sample for net in (merged, load_model("embedded", device="cpu").unet))
        assert (ours - plain).abs().max() > 1e-3
        unet.set_attn_processor(AttnProcessor())
        torch.testing.assert_close(unet(x, 500, text).sample, ours, atol=1e-4, rtol=1e-4)


# The layers that the published LCM-LoRAs train (their training script's target modules).
LCM = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
LCM += ("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_an_lcm_lora_of_all_its_layers_edits_in_two_steps(form, editor, tmp_path):
    """Guidance of its own it has none: c alone, by the consistency sampler."""
    weights, state = editor.model.unet.state_dict(), {}
    layers = [name.removesuffix(".weight") for name in weights if name.removesuffix(".weight").endswith(LCM)]
    assert {ending for ending in LCM for name in layers if name.endswith(ending)} == set(LCM)
    for layer in layers:
        weight = weights[f"{layer}.weight"]
        name = f"lora_unet_{layer.replace('.', '_')}" if form == "kohya" else f"unet.{layer}"
        parts = (".lora_down.weight", ".lora_up.weight") if form == "kohya" else (".lora_A.weight", ".lora_B.weight")
        state[name + parts[0]] = torch.full((1, *weight.shape[1:]), 1e-3)
        state[name + parts[1]] = torch.full((weight.shape[0], 1, *[1] * (weight.ndim - 2)), 1e-3)
    save_file(state, tmp_path / "lcm.safetensors")
    merged = with_loras(editor.model, [Lora(path=tmp_path / "lcm.safetensors", weight=1.0)])
    changed = [
        layer
        for layer in layers
        if not torch.equal(merged.unet.state_dict()[f"{layer}.weight"], weights[f"{layer}.weight"])
    ]
    assert len(changed) == len(layers)
    how = {"text_cfg": 1, "image_cfg": 1, "steps": 2, "sampler": "lcm", "schedule": "trailing"}
    (edit,) = InstructPix2Pix(merged).edit(render(HEART), "make it night", **how)
    assert edit.evaluations == 2 and edit.latent.isfinite().all()
