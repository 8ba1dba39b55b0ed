"""Another autoencoder, words of textual inversion, a ControlNet: whatever names their files have, and what they do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ip2p_engine import InstructPix2Pix, cli
from ip2p_engine.checkpoint.added import read_control
from ip2p_engine.checkpoint.build import build
from ip2p_engine.checkpoint.keys import OLD_ATTENTION, infer_control, ldm_autoencoder_name, ldm_control_name
from ip2p_engine.checkpoint.recognise import EMBEDDED_FOLDER
from ip2p_engine.checkpoint.write import save_diffusers, save_ldm
from ip2p_engine.diffusion.noise import SampleNoise
from ip2p_engine.errors import CheckpointError, ConfigError
from ip2p_engine.images import read_settings
from ip2p_engine.networks.added import with_words
from ip2p_engine.networks.conditioning import encode_text
from ip2p_engine.networks.control import hint_of, load_control
from ip2p_engine.scenes.world import Scene, render
from ip2p_engine.tokenizer import clip_tokenizer, tokenize

SKETCH = EMBEDDED_FOLDER / "control" / "scenes-sketch.safetensors"
HEART = render(Scene(shape="heart", colour="red", background="sky", size="large"))
STAR = render(Scene(shape="star", colour="red", background="grey", size="small", style="sketch", place="top left"))
STEPS = 2
RED = 736  # the token of "red"


def pixels(result):
    return np.asarray(result.image).astype(int)


def edited(editor, text="make it night", **more):
    return editor.edit(HEART, text, seeds=1, steps=STEPS, sampler="euler", **more)[0]


@pytest.fixture(scope="module")
def other(editor):
    """The embedded model with a decoder that makes pictures darker."""
    autoencoder = AutoencoderKL.from_config(editor.model.autoencoder.config)
    autoencoder.load_state_dict(editor.model.autoencoder.state_dict())
    with torch.no_grad():
        autoencoder.decoder.conv_out.bias -= 0.2
    return replace(editor.model, autoencoder=autoencoder.eval().requires_grad_(False))


def vae_files(other, folder):
    """The same autoencoder under every name."""
    network = other.autoencoder
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    ldm = {ldm_autoencoder_name(name, network.config): value for name, value in state.items()}
    new = {modern: old for old, modern in OLD_ATTENTION.items()}
    old = {}
    for name, value in state.items():
        for modern, former in new.items():
            name = name.replace(f".{modern}.", f".{former}.") if ".attentions." in name else name
        old[name] = value
    save_file(ldm, folder / "ldm.safetensors")
    save_file({f"first_stage_model.{name}": value for name, value in ldm.items()}, folder / "prefix.safetensors")
    save_file(state, folder / "diffusers.safetensors")
    save_file(old, folder / "old.safetensors")
    torch.save({"state_dict": ldm}, folder / "ldm.pt")
    network.save_pretrained(folder / "vae")
    save_diffusers(other, folder / "pipeline")
    save_ldm(other, folder / "checkpoint.safetensors")
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def test_an_autoencoder_goes_by_every_name(editor, other, tmp_path):
    expected, plain = edited(InstructPix2Pix(other, name="embedded")), edited(editor)
    digests = set()
    for path in vae_files(other, tmp_path):
        with_vae = InstructPix2Pix(editor.model, name="embedded")
        with_vae.load_vae(path)
        result = edited(with_vae)
        assert np.array_equal(pixels(result), pixels(expected)), path
        assert result.settings["vae"]["name"] == path.name and str(tmp_path) not in str(result.settings)
        assert result.settings["checkpoint_digest"] == plain.settings["checkpoint_digest"]
        digests.add(result.settings["vae"]["digest"])
    assert len(digests) == 1 and plain.settings["vae"] is None
    assert np.abs(pixels(expected) - pixels(plain)).mean() > 5


def test_what_is_no_autoencoder_of_the_family_is_a_sentence(other, tmp_path):
    other.autoencoder.save_pretrained(tmp_path / "sdxl")
    config = tmp_path / "sdxl" / "config.json"
    config.write_text(config.read_text().replace("0.18215", "0.13025"))
    save_file({"decoder.conv_in.weight": torch.ones(8, 16, 3, 3)}, tmp_path / "half.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "strange.safetensors")
    for path, words in {
        tmp_path / "sdxl": "is for latents times 0.13025, and this checkpoint's are times 0.18215",
        tmp_path / "half.safetensors": "the autoencoder has no encoder levels",
        tmp_path / "strange.safetensors": "holds no autoencoder",
        tmp_path / "absent.safetensors": "does not exist",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            InstructPix2Pix(other).load_vae(path)


def word_files(vectors, folder):
    """The same vectors in every form: {path: a word for it}."""
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "own", "step": 9}, folder / "a.pt"
    )
    torch.save({"<rouge>": vectors}, folder / "b.bin")
    save_file({"emb_params": vectors}, folder / "c.safetensors")
    save_file({"<rouge>": vectors}, folder / "d.safetensors")
    save_file({"clip_l": vectors}, folder / "e.safetensors")
    return {
        folder / "a.pt": "own",
        folder / "b.bin": "<rouge>",
        folder / "c.safetensors": "c",
        folder / "d.safetensors": "<rouge>",
        folder / "e.safetensors": "e",
    }


def test_a_word_is_its_vectors(editor, tmp_path):
    """Vectors that are a known word's own give that word's picture, by either name of the new one."""
    assert tokenize(["red"])[0, 1] == RED
    table = editor.model.text_encoders[0].get_input_embeddings().weight
    plain, blue = edited(editor, "paint it red"), edited(editor, "paint it blue")
    assert np.abs(pixels(plain) - pixels(blue)).mean() > 1
    red = encode_text(editor.model, ["paint it red"]).tokens
    for path, own in word_files(table[[RED]].clone(), tmp_path).items():
        knowing = InstructPix2Pix(editor.model, name="embedded")
        knowing.load_embeddings(path)
        for word in (f"embedding:{path.stem}", f"embedding:{path.name}"):
            assert torch.equal(encode_text(knowing.model, [f"paint it {word}"]).tokens, red), (path, word)
        result = edited(knowing, f"paint it {own}")
        assert np.array_equal(pixels(result), pixels(plain)), path
        assert [one["name"] for one in result.settings["embeddings"]] == [path.name]
        assert result.settings["checkpoint_digest"] == plain.settings["checkpoint_digest"]
    assert np.array_equal(pixels(edited(knowing, "paint it blue")), pixels(blue))


@pytest.mark.parametrize("end", [2, 49407])
def test_a_word_of_two_text_encoders(end, editor, tmp_path):
    """SDXL: each encoder has vectors of its own, and the pooled text looks for its end as before.

    Published files say that the end is token 2, by which transformers takes the largest number for it.
    """
    torch.manual_seed(0)
    shape = {"vocab_size": 49408, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": end}
    encoders = [
        CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, **shape)),
        CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=12, intermediate_size=8, projection_dim=6, **shape)),
    ]
    spec = replace(editor.model.spec, family="sdxl")
    model = replace(editor.model, spec=spec, text_encoders=tuple(one.eval().requires_grad_(False) for one in encoders))
    left, right = (one.get_input_embeddings().weight[[RED, 1579]].clone() for one in encoders)
    save_file({"clip_l": left, "clip_g": right}, tmp_path / "rouge.safetensors")
    knowing, _ = with_words(model, [tmp_path / "rouge.safetensors"])
    second = clip_tokenizer().id_to_token(1579).removesuffix("</w>")
    ours, theirs = encode_text(knowing, ["a embedding:rouge, cat"]), encode_text(model, [f"a red {second}, cat"])
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.pooled, theirs.pooled)
    save_file({"clip_l": left}, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match="vectors of width 8, and this checkpoint's text encoders take 8 and 12"):
        with_words(model, [tmp_path / "half.safetensors"])


def control_files(folder):
    """The embedded ControlNet under every name."""
    part = read_control(SKETCH)
    network = build(part, name="sketch", dtype=torch.float32)
    ldm = {name: value.float() for name, value in load_file(SKETCH).items()}
    save_file({f"control_model.{name}": value for name, value in ldm.items()}, folder / "prefix.safetensors")
    torch.save({f"control_model.{name}": value for name, value in ldm.items()}, folder / "prefix.pth")
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "names.safetensors")
    network.save_pretrained(folder / "folder")
    return [SKETCH, *folder.iterdir()]


def test_a_controlnet_goes_by_every_name(editor, tmp_path):
    results = []
    for path in control_files(tmp_path):
        editor = InstructPix2Pix(editor.model, name="embedded")
        editor.load_control(path)
        results.append(edited(editor, "turn the heart into a star", control_images=STAR))
        said = results[-1].settings["control"]
        assert said["name"] == path.name and str(tmp_path) not in str(results[-1].settings)
    assert all(np.array_equal(pixels(one), pixels(results[0])) for one in results)
    assert len({one.settings["control"]["digest"] for one in results}) == 1


FULL = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.mark.slow  # diffusers draws the numbers that nobody looks at
@pytest.mark.parametrize("family", FULL)
def test_a_full_size_controlnet_is_known_by_its_shapes(family):
    with torch.device("meta"):
        network = ControlNetModel(**FULL[family])
    expected = {name: shape(value) for name, value in network.config.items() if not name.startswith("_")}
    state = network.state_dict()
    ldm = {ldm_control_name(name, network.config): value for name, value in state.items()}
    assert len(ldm) == len(state) and {"input_hint_block.14.weight", "middle_block_out.0.bias"} <= ldm.keys()
    for names, layout in ((state, "diffusers"), (ldm, "ldm")):
        found = infer_control(names, layout)
        assert {name: shape(value) for name, value in found.items()}.items() <= expected.items()
        left_out = expected.keys() - found.keys()
        defaults = {name: shape(value) for name, value in ControlNetModel().config.items() if name in left_out}
        assert defaults == {name: expected[name] for name in left_out}


def miniature(family, channels, kind, **more):
    """SD2's or SDXL's structure, with their heads of 64, at a width of 64 and 128."""
    levels = ("CrossAttnDownBlock2D",) * 2 if family == "sd2" else ("DownBlock2D", "CrossAttnDownBlock2D")
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 24 + 6 * 256,
        "transformer_layers_per_block": (1, 2),
    }
    return kind(
        in_channels=channels,
        block_out_channels=(64, 128),
        down_block_types=levels,
        layers_per_block=1,
        attention_head_dim=(1, 2),
        cross_attention_dim=24 if family == "sd2" else 48,
        use_linear_projection=True,
        **(added if family == "sdxl" else {}),
        **more,
    ).eval()


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_controlnet_of_sd2_and_sdxl_adds_what_diffusers_adds(family, tiny_pair_model, tmp_path):
    """One step to sigma 0 by files under both names, against the two networks themselves."""
    torch.manual_seed(0)
    ups = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D" if family == "sd2" else "UpBlock2D")
    unet = miniature(family, 8, UNet2DConditionModel, up_block_types=ups).requires_grad_(False)
    network = miniature(family, 4, ControlNetModel, conditioning_embedding_out_channels=(8, 16, 24, 32))
    for weight in (one for one in network.requires_grad_(False).parameters() if not one.any()):
        weight.normal_(std=0.05)  # the zeros that training begins with
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, tmp_path / "names.safetensors")
    ldm = {f"control_model.{ldm_control_name(name, network.config)}": value for name, value in state.items()}
    save_file(ldm, tmp_path / "ldm.safetensors")
    model = replace(tiny_pair_model(family, in_channels=8), unet=unet)
    how = {"seeds": 1, "steps": 1, "sampler": "euler", "text_cfg": 1.0, "image_cfg": 1.0}  # c alone
    condition, sigma = InstructPix2Pix(model).condition(HEART, "make it snow"), float(model.schedule.sigmas[-1])
    x = SampleNoise([1]).draw(condition.image) * sigma
    scaled, t, text = x / (sigma**2 + 1) ** 0.5, model.timestep(sigma), condition.text
    added = None
    if text.pooled is not None:
        added = {"text_embeds": text.pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    given = {"encoder_hidden_states": text.tokens, "added_cond_kwargs": added}
    down, middle = network(
        scaled, t, controlnet_cond=hint_of(STAR, (64, 64)), conditioning_scale=0.7, return_dict=False, **given
    )
    inputs, more = torch.cat([scaled, condition.image], dim=1), {"down_block_additional_residuals": down}
    said = unet(inputs, t, mid_block_additional_residual=middle, **more, **given).sample
    expected = (
        x - sigma * said if family == "sdxl" else scaled / (sigma**2 + 1) ** 0.5 - said * sigma / (sigma**2 + 1) ** 0.5
    )
    for file in ("names", "ldm"):
        editor = InstructPix2Pix(model)
        plain = editor.edit(HEART, "make it snow", **how)[0].latent
        editor.load_control(tmp_path / f"{file}.safetensors")
        latent = editor.edit(HEART, "make it snow", control_images=STAR, control_weight=0.7, **how)[0].latent
        torch.testing.assert_close(latent[None], expected, atol=2e-3, rtol=1e-3)
        assert (latent - plain).abs().max() > 0.05


def shape(value):
    return tuple(value) if isinstance(value, list) else value


@pytest.fixture(scope="module")
def controlled():
    return InstructPix2Pix.load("embedded", device="cpu", control=SKETCH)


def test_weight_and_picture_count(controlled, editor):
    text = "turn the heart into a star"
    plain = edited(editor, text)
    assert np.array_equal(pixels(edited(controlled, text)), pixels(plain))
    none, half, full = (
        edited(controlled, text, control_images=STAR, control_weight=weight) for weight in (0.0, 0.5, 1.0)
    )
    assert np.abs(pixels(none) - pixels(plain)).max() <= 1
    gaps = [np.abs(pixels(one) - pixels(plain)).mean() for one in (half, full)]
    assert min(gaps) > 1 and not np.array_equal(pixels(half), pixels(full))
    other = edited(controlled, text, control_images=HEART)
    assert not np.array_equal(pixels(other), pixels(full))
    assert full.settings["control"]["image_sha256"] != other.settings["control"]["image_sha256"]
    assert plain.settings["control"] is None and full.settings["control_weight"] == 1.0


def test_every_branch_sees_the_control(controlled):
    """As ComfyUI's Apply ControlNet on both conditions: the branch without a picture is made of the negative one."""
    asked = []
    network = controlled.control.network
    handle = network.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    for scales, rows in (((4.0, 1.5), 3), ((4.0, 1.0), 2), ((1.0, 1.0), 1)):
        asked.clear()
        edited(controlled, control_images=STAR, text_cfg=scales[0], image_cfg=scales[1])
        assert asked == [rows] * STEPS
        asked.clear()
        edited(controlled, control_images=STAR, text_cfg=scales[0], image_cfg=scales[1], together=False)
        assert asked == [1] * STEPS * rows
    handle.remove()


def test_one_editor_controls_and_does_not_at_once(controlled):
    """Nothing of the control lies in the network: calls with, without and with another picture, in two threads."""
    ways = [{"control_images": STAR}, {}, {"control_images": HEART, "control_weight": 0.5}] * 2
    alone = [edited(controlled, **way) for way in ways]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda way: edited(controlled, **way), ways))
    for one, other in zip(alone, together, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_a_hint_is_cropped_around_its_centre():
    wide = Image.fromarray(np.arange(8 * 24, dtype=np.uint8).reshape(8, 24)).convert("RGB")
    assert torch.equal(hint_of(wide, (8, 8)), hint_of(wide.crop((8, 0, 16, 8)), (8, 8)))
    assert torch.equal(hint_of(wide, (24, 8))[0, 0] * 255, torch.arange(8 * 24).reshape(8, 24).float())
    assert hint_of(wide, (64, 64)).shape == (1, 3, 64, 64)


def test_what_is_no_controlnet_of_the_family_is_a_sentence(editor, tmp_path):
    wide = ControlNetModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D",) * 2, cross_attention_dim=24,
        attention_head_dim=4, layers_per_block=1,
    )  # fmt: skip
    wide.save_pretrained(tmp_path / "other")
    save_file({"lora_controlnet": torch.ones(1)}, tmp_path / "control-lora.safetensors")
    save_file({"adapter.body.0.resnets.0.block1.weight": torch.ones(1)}, tmp_path / "adapter.safetensors")
    save_file({"control_add_embedding.linear_1.bias": torch.ones(1)}, tmp_path / "union.safetensors")
    save_file({"controlnet_blocks.0.weight": torch.ones(1)}, tmp_path / "flux.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "strange.safetensors")
    for name, words in {
        "other": "is for UNets of cross_attention_dim 24, and this checkpoint's is of 96",
        "control-lora.safetensors": "is a Control-LoRA",
        "adapter.safetensors": "is a T2I-Adapter",
        "union.safetensors": "several kinds",
        "flux.safetensors": "of a transformer",
        "strange.safetensors": "holds no ControlNet",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            load_control(tmp_path / name, editor.model)
    with pytest.raises(ConfigError, match="none is loaded"):
        editor.edit(HEART, "make it snow", control_images=STAR)


def test_the_command(tmp_path, capsys):
    for name, picture in {"scene": HEART, "star": STAR}.items():
        picture.save(tmp_path / f"{name}.png")
    command = ["edit", str(tmp_path / "scene.png"), "--instruction", "turn it into a star", "--steps", "1"]
    control = ["--control", str(SKETCH), "--control-image", str(tmp_path / "star.png"), "--control-weight", "0.8"]
    vae = ["--vae", str(EMBEDDED_FOLDER / "vae"), "--out", str(tmp_path / "out.png")]
    assert cli.main([*command, *control, *vae]) == 0
    said = read_settings(tmp_path / "out.png")
    assert said["control"]["image"] == "star.png" and said["control_weight"] == 0.8 and said["vae"]["name"] == "vae"
    assert str(tmp_path) not in str(said)
    assert cli.main([*command, "--control", str(SKETCH)]) == 2
    assert "give both --control and --control-image" in capsys.readouterr().err


def test_a_hint_takes_the_nearest_pixels_of_its_middle():
    """As torch's "nearest-exact" does of the whole picture, which is never made numbers at once."""
    random = np.random.default_rng(0)
    for width, height, size in ((31, 17, (8, 8)), (9, 40, (24, 16)), (64, 64, (64, 64)), (13, 13, (40, 8))):
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        old, new = width / height, size[0] / size[1]
        x = round((width - width * (new / old)) / 2) if old > new else 0
        y = round((height - height * (old / new)) / 2) if old < new else 0
        middle = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None, :, y : height - y, x : width - x]
        expected = torch.nn.functional.interpolate(middle, size=size[::-1], mode="nearest-exact").float() / 255
        assert torch.equal(hint_of(picture, size), expected)


@pytest.mark.parametrize(("channels", "fits"), [((4, 4, 4), False), ((4, 4, 4, 4), True), ((4,) * 5, False)])
def test_a_controlnet_whose_picture_comes_to_another_size(tmp_path, tiny_pair_model, channels, fits):
    ups = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    miniature("sd2", 4, ControlNetModel, conditioning_embedding_out_channels=channels).save_pretrained(tmp_path / "net")
    unet = miniature("sd2", 8, UNet2DConditionModel, up_block_types=ups)
    model = replace(tiny_pair_model("sd2", in_channels=8), unet=unet)
    if fits:
        assert load_control(tmp_path / "net", model).name == "net"
        return
    with pytest.raises(CheckpointError, match="times smaller than the edit's, and latents are 8 times smaller"):
        load_control(tmp_path / "net", model)
