"""Small sound inputs of every kind for the campaign to spoil, written by the engine under test where it writes them."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

Main = Callable[[list[str]], int]
WIDTH = 8
SEEN = ["--clip", "embedded", "--min-sim-0", "-1", "--min-sim-1", "-1", "--min-sim-direction", "-1"]
PAIRS = ["--candidates", "2", "--steps", "2", "--cfg", "2", "--rows-per-shard", "4", *SEEN, "--min-sim-image", "-1"]
TRAIN = ["--preset", "embedded", "--steps", "3", "--batch-size", "2", "--save-every", "1", "--set", "validate_every=0"]


def make_seeds(home: Path, main: Main, engine: Path) -> None:
    """Everything under ``home``; raises RuntimeError where the engine refuses to make it."""

    def run(*arguments: object) -> None:
        if main([str(one) for one in arguments]) != 0:
            raise RuntimeError(f"the engine does not make {arguments[:3]}")

    torch.manual_seed(0)
    _picture(home / "picture.png")
    Image.open(home / "picture.png").save(home / "picture.jpg")
    for name, channels in (("tiny", 8), ("tiny4", 4)):
        _pipeline(home / name, channels)
        run("convert", home / name, home / f"{name}.safetensors", "--to", "ldm")
        run("convert", home / name, home / f"own-{name}", "--to", "diffusers")
    torch.save({"state_dict": _state(home / "tiny.safetensors"), "epoch": 3}, home / "tiny.ckpt")
    run("captions", "--sample", "3", "--out", home / "edits.jsonl")
    run(
        "pairs",
        home / "edits.jsonl",
        "--checkpoint",
        home / "tiny4",
        "--out",
        home / "store",
        "--size",
        "64x64",
        *PAIRS,
    )
    run("dataset", "export", home / "store", "--out", home / "original")
    run("train", "--data", home / "store", "--base", home / "tiny4", "--out", home / "run", *TRAIN)
    _evaluation(home / "evaluation")
    save_file(_lora(), home / "lora.safetensors")
    _added(home)
    edit = ["edit", home / "picture.png", "--instruction", "snow", "--checkpoint", home / "tiny.safetensors"]
    run(*edit, "--steps", "1", "--resolution", "64", "--out", home / "result.png")
    shutil.copytree(engine / "ip2p_engine" / "scenes" / "embedded" / "clip", home / "clip")
    _triplets(home / "triplets")
    catalogue = engine / "ip2p_engine" / "photos" / "pictures.tsv"
    if catalogue.exists():  # older versions have none
        _photographs(home, catalogue)


def _state(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _picture(path: Path) -> None:
    picture = Image.radial_gradient("L").resize((64, 64))
    Image.merge("RGB", (picture, picture.rotate(90), picture.transpose(Image.Transpose.TRANSPOSE))).save(path)


def _pipeline(folder: Path, channels: int) -> None:
    """Stable Diffusion 1's structure, 100,000 times smaller, as diffusers writes it."""
    unet = UNet2DConditionModel(
        in_channels=channels,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=WIDTH,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    unet.save_pretrained(folder / "unet")
    autoencoder.save_pretrained(folder / "vae")
    text.save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionInstructPix2PixPipeline"}))


def _evaluation(folder: Path) -> None:
    folder.mkdir()
    _picture(folder / "curve.png")
    table = {"title": "Points", "columns": ["method", "value"], "rows": [["IP2P", 0.5]], "note": ""}
    run = {"kind": "curve", "settings": {"n": 3}, "versions": {"torch": "2"}, "tables": [table], "figures": {}}
    (folder / "run.json").write_text(json.dumps({**run, "pictures": [["curve.png", "The curve"]]}))
    (folder / "rows.jsonl").write_text(json.dumps({"curve": "IP2P", "image": 0.5}) + "\n")


def _lora() -> dict[str, torch.Tensor]:
    layers = [f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{name}" for name in "qkv"]
    factors = {"lora_down.weight": torch.randn(4, 16), "lora_up.weight": torch.randn(16, 4), "alpha": torch.tensor(4.0)}
    return {f"{layer}.{part}": value.clone() for layer in layers for part, value in factors.items()}


def _added(home: Path) -> None:
    """What goes beside a checkpoint: an autoencoder, a ControlNet, a word of textual inversion; and a HEIC."""
    from pillow_heif import register_heif_opener

    prefix = "first_stage_model."
    found = _state(home / "tiny.safetensors").items()
    save_file(
        {name.removeprefix(prefix): value for name, value in found if name.startswith(prefix)}, home / "vae.safetensors"
    )
    unet = UNet2DConditionModel.from_pretrained(home / "tiny4" / "unet")
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4)).save_pretrained(home / "control")
    shutil.copy(home / "control" / "diffusion_pytorch_model.safetensors", home / "control.safetensors")
    save_file({"emb_params": torch.randn(2, WIDTH)}, home / "word.safetensors")
    register_heif_opener()
    Image.open(home / "picture.png").save(home / "picture.heic")


def _photographs(home: Path, catalogue: Path) -> None:
    """A folder of gathered photographs, very small ones."""
    (home / "photographs").mkdir()
    for one in csv.DictReader(catalogue.read_text().splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE):
        Image.open(home / "picture.png").save(home / "photographs" / f"{one['key']}.png")


def _triplets(folder: Path) -> None:
    folder.mkdir()
    _picture(folder / "a.png")
    _picture(folder / "b.png")
    row = {
        "original_image": "a.png",
        "edited_image": "b.png",
        "edit_prompt": "make it snow",
        "original_prompt": "a cat",
    }
    (folder / "list.jsonl").write_text((json.dumps(row) + "\n") * 2)
    (folder / "list.csv").write_text(",".join(row) + "\n" + (",".join(row.values()) + "\n") * 2)
    save_file({"a": torch.zeros(2)}, folder / "other.safetensors")
