"""The small programs of docs/examples do what they say, and the API page is that of the code."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ip2p_engine.scenes.world import Scene, render

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "docs" / "examples"
HEART = Scene(shape="heart", colour="red", background="sky", size="large")


def program(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def heart(tmp_path):
    path = tmp_path / "in" / "heart.png"
    path.parent.mkdir()
    render(HEART).save(path)
    return path


@pytest.mark.slow
def test_a_folder(heart, tmp_path):
    render(HEART).resize((96, 64)).save(heart.parent / "wide.jpg")
    (heart.parent / "notes.txt").write_text("no picture")
    program("edit_a_folder").main(str(heart.parent), "make it night", str(tmp_path / "out"))
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert sizes == {"heart.png": (64, 64), "wide.png": (96, 64)}


def test_a_sampler_of_one_s_own(heart, tmp_path, capsys):
    program("own_sampler").main(str(heart), "make it night", str(tmp_path / "out.png"))
    # Two looks a step but the last, which arrives at the clean latent; three branches each.
    assert capsys.readouterr().out == "117 evaluations by own_sampler:ralston\n"
    assert Image.open(tmp_path / "out.png").getpixel((2, 2)) != Image.open(heart).getpixel((2, 2))


def test_guidance_of_one_s_own(heart, tmp_path):
    program("own_guidance").main(str(heart), "make it night", str(tmp_path / "out.png"))
    assert Image.open(tmp_path / "out.png").size == (64, 64)


def test_a_server_for_two_users(heart, editor):
    server = program("server").make_server(0)
    Thread(target=server.serve_forever, daemon=True).start()

    def post(asked, data=None):
        address = f"http://127.0.0.1:{server.server_port}/?{asked}"
        with urllib.request.urlopen(urllib.request.Request(address, data or heart.read_bytes())) as answer:
            return Image.open(io.BytesIO(answer.read())).tobytes()

    try:
        asked = ["instruction=make+it+night&seed=1", "instruction=make+it+snow&seed=2"]
        with ThreadPoolExecutor(2) as pool:
            pictures = list(pool.map(post, asked))
        for refused, data in (("seed=1", None), ("instruction=x&seed=one", None), ("instruction=x", b"no picture")):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                post(refused, data)
    finally:
        server.shutdown()
        server.server_close()
    for picture, text, seed in zip(pictures, ("make it night", "make it snow"), (1, 2), strict=True):
        alone = editor.edit(heart, text, seeds=seed)[0].image.tobytes()
        assert max(abs(a - b) for a, b in zip(picture, alone, strict=True)) <= 1


def test_scores_of_one_s_own_pairs(heart, capsys):
    render(HEART).save(heart.parent / "same.png")
    table = heart.parent / "pairs.csv"
    table.write_text("before,after,caption,edited_caption\nheart.png,same.png,a red heart,a blue heart\n")
    program("score_pairs").main(str(table), "embedded")
    said = capsys.readouterr().out
    assert said.startswith("drop  direction 0.000  image 1.000") and said.endswith("same.png\n")


@pytest.mark.slow
def test_one_pair(tmp_path):
    program("one_pair").main("a red heart", "a blue heart", *(str(tmp_path / f"{n}.png") for n in range(2)))
    assert [Image.open(tmp_path / f"{n}.png").size for n in range(2)] == [(64, 64)] * 2


@pytest.mark.slow
def test_training_on_a_torch_dataset(tmp_path, capsys):
    program("train_on_a_dataset").main(str(tmp_path / "run"), "1")
    assert Image.open(tmp_path / "run" / "negative.png").size == (64, 64)


def test_the_api_page_is_that_of_the_code():
    pytest.importorskip("griffe")
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "api_page.py", "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_a_lora(heart, tmp_path, editor):
    """A LoRA that changes one layer, under kohya's names."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    width_out, width_in = editor.model.unet.get_submodule(name).weight.shape
    stem = f"lora_unet_{name.replace('.', '_')}"
    draw = torch.Generator().manual_seed(0)
    state = {
        f"{stem}.lora_down.weight": torch.randn(4, width_in, generator=draw),
        f"{stem}.lora_up.weight": torch.randn(width_out, 4, generator=draw),
        f"{stem}.alpha": torch.tensor(4.0),
    }
    save_file(state, tmp_path / "lora.safetensors")
    given = (str(heart), "make it night", str(tmp_path / "lora.safetensors"))
    program("lora").main(*given, str(tmp_path / "with.png"), str(tmp_path / "without.png"))
    changed, plain = (Image.open(tmp_path / f"{name}.png").tobytes() for name in ("with", "without"))
    assert plain == editor.edit(heart, "make it night")[0].image.tobytes() != changed
