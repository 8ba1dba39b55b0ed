"""One set of weights through every layout gives bit-equal networks, told by names and shapes alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ip2p_engine.checkpoint.recognise import EDM_KEYS, PREFIXES, ema_name
from ip2p_engine.checkpoint.source import open_bundle
from ip2p_engine.checkpoint.write import save_diffusers, save_ldm
from ip2p_engine.diffusion.guidance import DualGuidance
from ip2p_engine.errors import CheckpointError
from ip2p_engine.networks.conditioning import Conditioning, TextEmbedding, decode_latents, size_ids
from ip2p_engine.networks.denoiser import BranchDenoiser
from ip2p_engine.networks.model import load_model

SLOW = pytest.mark.slow
FAMILIES = ["sd1", "sd2", "sdxl", "cosxl"]
QUICK_FAMILIES = [
    pytest.param("sd1", marks=SLOW),
    "sd2",
    "cosxl",
    pytest.param("sdxl", marks=SLOW),
]
UNET = PREFIXES["unet"]
HEADS = {"text_heads": 4}


@pytest.mark.parametrize(
    ("family", "in_channels"),
    [*((family, 8) for family in FAMILIES), ("sd1", 4), ("sd1", 12), pytest.param("sdxl", 4, marks=SLOW)],
)
def test_a_bare_ldm_file_is_known_by_names_and_shapes(
    family, in_channels, make_model, same_model, ldm_tensors, tmp_path
):
    model = make_model(family, in_channels)
    save_file(ldm_tensors(model), tmp_path / "misleading_sdxl_v5.safetensors")
    loaded = load_model(tmp_path / "misleading_sdxl_v5.safetensors", **HEADS)
    same_model(loaded, model)
    assert loaded.spec == model.spec
    assert loaded.unet.config.transformer_layers_per_block == model.unet.config.transformer_layers_per_block
    assert [t.config.num_attention_heads for t in loaded.text_encoders] == [4] * len(model.text_encoders)


@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_round_trips_are_exact(family, make_model, same_model, tmp_path):
    model = make_model(family)
    first = load_model(save_ldm(model, tmp_path / "one.safetensors"))
    second = load_model(save_diffusers(first, tmp_path / "folder"))
    save_ldm(second, tmp_path / "two.safetensors")
    for loaded in (first, second):
        same_model(loaded, model)
        assert loaded.spec == model.spec
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_a_folder_without_our_config_is_known_by_diffusers_own(family, make_model, same_model, tmp_path):
    model = make_model(family)
    folder = save_diffusers(model, tmp_path / "folder")
    (folder / "ip2p_config.json").unlink()
    loaded = load_model(folder)
    same_model(loaded, model)
    assert loaded.spec == model.spec


def test_a_folder_that_diffusers_and_transformers_wrote(sd1, same_model, tmp_path):
    sd1.unet.save_pretrained(tmp_path / "unet")
    sd1.autoencoder.save_pretrained(tmp_path / "vae")
    sd1.text_encoders[0].save_pretrained(tmp_path / "text_encoder")
    same_model(load_model(tmp_path), sd1)


def test_a_sharded_unet(sd1, sd1_folder, same_model, tmp_path):
    folder = shutil.copytree(sd1_folder, tmp_path / "folder")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    sd1.unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    pieces = sorted((folder / "unet").glob("*-of-*"))
    assert len(pieces) > 1
    same_model(load_model(folder), sd1)
    pieces[0].unlink()
    with pytest.raises(CheckpointError, match="pieces of its weights"):
        load_model(folder)


def test_old_names_of_attention_in_a_folder(sd1, sd1_folder, same_model, tmp_path):
    """Every folder of 2022 and 2023 says query, key, value and proj_attn in its autoencoder."""
    folder = shutil.copytree(sd1_folder, tmp_path / "folder")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load_file(path).items():
        new = name
        for today, then in old.items():
            new = new.replace(f"attentions.0.{today}.", f"attentions.0.{then}.")
        renamed[new] = value
    assert any(".query." in name for name in renamed)
    save_file(renamed, path)
    same_model(load_model(folder), sd1)


@pytest.mark.parametrize("kind", [pytest.param("safetensors", marks=SLOW), "ckpt"])
def test_ema_is_the_default_and_raw_is_a_choice(kind, make_model, same_model, ldm_tensors, tmp_path):
    raw = make_model()
    averaged = replace(raw, unet=make_model(seed=1).unet)
    state = ldm_tensors(raw)
    for name, value in ldm_tensors(averaged).items():
        if name.startswith(UNET):
            state[ema_name(name.removeprefix(UNET))] = value
    state["model_ema.decay"], state["model_ema.num_updates"] = torch.tensor(0.9999), torch.tensor(7)
    path = tmp_path / f"both.{kind}"
    save_file(state, path) if kind == "safetensors" else torch.save({"state_dict": state}, path)
    by_default, on_request = load_model(path, **HEADS), load_model(path, weights="raw", **HEADS)
    assert (by_default.spec.weights, on_request.spec.weights) == ("ema", "raw")
    same_model(by_default, averaged)
    same_model(on_request, raw)
    del state[next(name for name in state if name.startswith("model_ema.diffusion"))]
    save_file(state, tmp_path / "hole.safetensors")
    with pytest.raises(CheckpointError, match="averaged weights without"):
        load_model(tmp_path / "hole.safetensors")


@pytest.mark.parametrize(("weights", "seed"), [("ema", 1), ("raw", 0)])
def test_a_training_run_s_folder_has_unet_and_unet_ema(weights, seed, make_model, sd1_folder, tmp_path):
    folder = shutil.copytree(sd1_folder, tmp_path / "folder")
    make_model(seed=1).unet.save_pretrained(folder / "unet_ema")
    loaded = load_model(folder, weights=weights)
    assert loaded.spec.weights == weights
    assert torch.equal(loaded.unet.conv_in.weight, make_model(seed=seed).unet.conv_in.weight)


def lone_ldm(model, tensors, folder):
    save_file({n: v for n, v in tensors(model).items() if n.startswith(UNET)}, folder / "unet.safetensors")
    return folder / "unet.safetensors"


def lone_ldm_bare(model, tensors, folder):
    bare = {n.removeprefix(UNET): v for n, v in tensors(model).items() if n.startswith(UNET)}
    save_file(bare, folder / "unet.safetensors")
    return folder / "unet.safetensors"


def lone_diffusers_file(model, tensors, folder):
    save_file(model.unet.state_dict(), folder / "unet.safetensors")
    return folder / "unet.safetensors"


def lone_diffusers_folder(model, tensors, folder):
    model.unet.save_pretrained(folder / "lone")
    return folder / "lone"


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        (lone_ldm, "sd1"),
        pytest.param(lone_ldm, "sdxl", marks=SLOW),
        (lone_ldm_bare, "sd1"),
        (lone_diffusers_file, "sd1"),
        (lone_diffusers_file, "sd2"),
        (lone_diffusers_folder, "sd1"),
    ],
)
def test_a_lone_unet_takes_the_rest_from_a_base(layout, family, make_model, same_model, ldm_tensors, tmp_path):
    model, base = make_model(family), make_model(family, 4, seed=5)
    path = layout(model, ldm_tensors, tmp_path)
    save_ldm(base, tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match="lacks an autoencoder and a text encoder; name a complete"):
        load_model(path)
    loaded = load_model(path, base=tmp_path / "base.safetensors")
    same_model(loaded, replace(model, autoencoder=base.autoencoder, text_encoders=base.text_encoders))
    assert loaded.spec.in_channels == 8


def test_a_lone_unet_of_a_cosxl_base_is_cosxl(make_model, ldm_tensors, tmp_path):
    """Whoever extracts the UNet of a CosXL-Edit loses the two tensors that say what it is."""
    path = lone_ldm(make_model("cosxl"), ldm_tensors, tmp_path)
    save_ldm(make_model("cosxl", 4, seed=5), tmp_path / "base.safetensors")
    assert load_model(path, base=tmp_path / "base.safetensors").spec == make_model("cosxl").spec


def test_one_set_of_weights_is_no_choice(sd1_file, caplog):
    load_model(sd1_file, weights="raw")
    assert "file.safetensors has one set of UNet weights" in caplog.text
    caplog.clear()
    load_model(sd1_file)
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


def test_a_base_of_another_family_is_refused(make_model, ldm_tensors, tmp_path):
    path = lone_ldm(make_model("sd1"), ldm_tensors, tmp_path)
    save_ldm(make_model("sd2", 4), tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match="is SD2, and unet.safetensors needs a complete SD1.5 checkpoint"):
        load_model(path, base=tmp_path / "base.safetensors")


def test_cosxl_edit_is_known_by_its_sigmas(make_model, ldm_tensors, tmp_path):
    state = ldm_tensors(make_model("cosxl"))
    state[EDM_KEYS[1]] = torch.tensor(80.0)
    save_file(state, tmp_path / "file.safetensors")
    model = load_model(tmp_path / "file.safetensors", **HEADS)
    spec = model.spec
    assert (spec.family, spec.prediction, spec.scaled_condition, spec.latent_scale) == ("cosxl", "v", True, 0.13025)
    assert model.schedule.sigma_max == pytest.approx(80.0)
    assert model.schedule.sigma_min == pytest.approx(0.002)
    assert model.timestep(80.0).item() == pytest.approx(0.25 * torch.tensor(80.0).log().item())


@pytest.mark.parametrize(("spread", "prediction"), [(0.02, "eps"), (0.3, "v")])
def test_sd2_tells_its_prediction_by_the_spread_of_a_bias(spread, prediction, make_model, ldm_tensors, tmp_path):
    state = ldm_tensors(make_model("sd2", 4))
    state[f"{UNET}output_blocks.3.1.transformer_blocks.0.norm1.bias"] = torch.linspace(-1, 1, 32) * spread
    save_file(state, tmp_path / "file.safetensors")
    assert open_bundle(tmp_path / "file.safetensors").spec.prediction == prediction
    other = "v" if prediction == "eps" else "eps"
    assert open_bundle(tmp_path / "file.safetensors", prediction=other).spec.prediction == other


@pytest.mark.parametrize(("said", "prediction"), [("v", "v"), ("epsilon", "eps")])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_what_the_header_says_of_the_prediction_counts(family, said, prediction, make_model, ldm_tensors, tmp_path):
    """Stability AI's ModelSpec, which others' trainers write too; it goes before markers and habits."""
    other = "eps" if prediction == "v" else "v"
    state = ldm_tensors(make_model(family, 4, prediction=other if family == "sdxl" else None))
    if family == "sd2":
        spread = 0.02 if other == "eps" else 0.3
        state[f"{UNET}output_blocks.3.1.transformer_blocks.0.norm1.bias"] = torch.linspace(-1, 1, 32) * spread
    save_file(state, tmp_path / "bare.safetensors")
    save_file(state, tmp_path / "file.safetensors", {"modelspec.prediction_type": said})
    assert open_bundle(tmp_path / "bare.safetensors").spec.prediction == ("eps" if family == "sd1" else other)
    assert open_bundle(tmp_path / "file.safetensors").spec.prediction == prediction
    assert open_bundle(tmp_path / "file.safetensors", prediction=other).spec.prediction == other


def test_sdxl_with_a_v_marker(make_model, ldm_tensors, tmp_path):
    save_file(ldm_tensors(make_model("sdxl", prediction="v")), tmp_path / "file.safetensors")
    assert open_bundle(tmp_path / "file.safetensors").spec.prediction == "v"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype, sd1, tmp_path):
    path = save_ldm(sd1, tmp_path / "file.safetensors", dtype)
    loaded = load_model(path, dtype="file")
    assert {loaded.dtype, loaded.autoencoder.dtype, loaded.text_encoders[0].dtype} == {dtype}
    assert torch.equal(loaded.unet.conv_in.weight, sd1.unet.conv_in.weight.to(dtype))


def test_a_base_that_is_not_needed_is_said(sd1_file, caplog):
    load_model(sd1_file, base="embedded")
    assert "is complete, so nothing of the base is taken" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl", "cosxl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sdxl_s_autoencoder_overflows_in_float16_and_stays_float32(dtype, family, make_model, tmp_path):
    path = save_ldm(make_model(family), tmp_path / "file.safetensors", dtype)
    model = load_model(path, dtype=dtype)
    kept = dtype == torch.float16 and family != "sd1"
    assert {model.dtype, *(text.dtype for text in model.text_encoders)} == {dtype}
    assert model.autoencoder.dtype == (torch.float32 if kept else dtype)
    model.autoencoder.encode(torch.zeros(1, 3, 64, 64, dtype=model.autoencoder.dtype)).latent_dist.mode()
    texts = TextEmbedding(tokens=torch.zeros(1, 77, 40, dtype=dtype), pooled=torch.zeros(1, 24, dtype=dtype))
    image = torch.zeros(1, 4, 8, 8)
    cond = Conditioning(text=texts, null_text=texts, image=image, size_ids=size_ids(model, [(64, 64)]))
    if family == "sdxl":
        with torch.inference_mode():
            denoiser = DualGuidance(BranchDenoiser(model), 5.0, 1.5)
            z = denoiser(torch.ones(1, 4, *image.shape[2:]), 2.0, cond)
        assert z.dtype == decode_latents(model, z).dtype == torch.float32


def test_a_mixed_file_becomes_one_type_a_network(sd1, ldm_tensors, tmp_path):
    mixed = {n: v.half() if i % 2 and v.is_floating_point() else v for i, (n, v) in enumerate(ldm_tensors(sd1).items())}
    save_file(mixed, tmp_path / "file.safetensors")
    model = load_model(tmp_path / "file.safetensors", **HEADS)
    assert {p.dtype for p in model.unet.parameters()} == {torch.float32}


def test_what_shapes_do_not_say_comes_from_the_header(same_model, tmp_path):
    """The embedded model's 8 and 4 norm groups and its v-prediction survive a single file."""
    model = load_model("embedded")
    loaded = load_model(save_ldm(model, tmp_path / "file.safetensors"))
    same_model(loaded, model)
    assert loaded.spec == model.spec
    assert (loaded.unet.config.norm_num_groups, loaded.autoencoder.config.norm_num_groups) == (8, 4)


def test_the_embedded_pair():
    edit, text_to_image = load_model("embedded"), load_model("embedded-sd")
    assert (edit.spec.in_channels, text_to_image.spec.in_channels) == (8, 4)
    text_to_image_error = "takes 4 input channels .text to image., and an InstructPix2Pix takes 8; load one"
    edit.require_edit()
    with pytest.raises(CheckpointError, match=text_to_image_error):
        text_to_image.require_edit()


def test_the_header_explains_the_file(sd1, tmp_path):
    path = save_ldm(sd1, tmp_path / "my edit.safetensors", training={"steps": 10})
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-v1-edit"
    assert header["modelspec.prediction_type"] == "epsilon"
    assert header["modelspec.title"] == "my edit"
    assert json.loads(header["ip2p_config"])["family"] == "sd1"
    assert json.loads(header["ip2p_training"]) == {"steps": 10}


def test_networks_come_frozen_and_in_eval_mode(sd1_file):
    model = load_model(sd1_file)
    for network in (model.unet, model.autoencoder, *model.text_encoders):
        assert not network.training
        assert not any(p.requires_grad or p.is_meta for p in network.parameters())
        assert not any(b.is_meta for b in network.buffers())


def test_one_tensor_of_the_text_encoder_may_carry_its_prefix_or_not(sd1, same_model, ldm_tensors, tmp_path):
    state = {n.replace("transformer.text_model.", "transformer."): v for n, v in ldm_tensors(sd1).items()}
    save_file(state, tmp_path / "file.safetensors")
    same_model(load_model(tmp_path / "file.safetensors", **HEADS), sd1)


def test_casting_gives_the_mapped_memory_back_and_changes_nothing(sd1_file):
    half, again = load_model(sd1_file, dtype=torch.float16).unet.state_dict(), load_model(sd1_file).unet.state_dict()
    assert all(torch.equal(value.half(), half[name]) for name, value in again.items())


def test_networks_own_their_memory(sd1, sd1_file, tmp_path):
    """A mapped file is private: training in place writes to memory, never to the file."""
    path = shutil.copy(sd1_file, tmp_path)
    before = Path(path).read_bytes()
    model = load_model(path)
    model.unet.conv_in.weight.add_(1)
    assert Path(path).read_bytes() == before
    assert torch.equal(model.unet.conv_in.weight, sd1.unet.conv_in.weight + 1)
