"""docs/editing.md: every command of the walk runs, and means what the page says."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ip2p_engine import cli
from ip2p_engine.checkpoint.recognise import EMBEDDED_FOLDER
from ip2p_engine.scenes.world import Scene, render

PAGE = Path(__file__).parents[2] / "docs" / "editing.md"
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"


@pytest.mark.slow
def test_the_walk(editor, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    scene = render(Scene(shape="heart", colour="red", background="sky", size="large"))
    for name in ("a.png", "b.png"):
        scene.save(f"photos/{name}")
    exif = Image.Exif()
    exif[0x010F] = "A camera"
    scene.resize((256, 256)).save("photos/large.jpg", exif=exif)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save("mask.png")
    weight = editor.model.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight
    factors = {"lora_down": torch.ones(1, weight.shape[1]), "lora_up": torch.ones(len(weight), 1) * 0.02}
    save_file({f"{LAYER}.{part}.weight": value for part, value in factors.items()}, "style.safetensors")
    save_file({"emb_params": torch.randn(2, 96)}, "cozy.safetensors")
    shutil.copy(EMBEDDED_FOLDER / "control" / "scenes-sketch.safetensors", "sketch.safetensors")
    Path("edits.csv").write_text("image,instruction,seed\nphotos/a.png,make it night,3\nphotos/b.png,paint it blue,4\n")
    block = re.search(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(commands) >= 18
    for command in commands:
        few = ["--steps", "2"] if command[1] == "edit" and "--verify" not in command else []
        assert cli.main([*command[1:], *few]) == 0, command
    assert len(list(Path("edited").iterdir())) == 3 + 2 + 4 + 2
    pixels = {name: np.asarray(Image.open(name)).astype(int) for name in ("styled.png", "same.png", "masked.png")}
    assert np.abs(pixels["styled.png"] - pixels["same.png"]).max() <= 1
    outside = np.asarray(mask) == 0
    assert np.array_equal(pixels["masked.png"][outside], np.asarray(scene)[outside])
    for name in ("vae.png", "cozy.png", "drawn.png", "other.png", "local.png"):
        assert Image.open(name).size == scene.size
    assert Image.open("large.jpg").size == (256, 256) and Image.open("large.jpg").getexif()[0x010F] == "A camera"
