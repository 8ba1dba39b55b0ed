"""``--low-memory``: what does not run waits in the host's memory, and the pictures are equal."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from ip2p_engine import InstructPix2Pix, cli
from ip2p_engine.checkpoint.recognise import EMBEDDED_FOLDER
from ip2p_engine.errors import ConfigError
from ip2p_engine.networks.offload import Offload
from ip2p_engine.scenes.world import Scene, render

HEART = render(Scene(shape="heart", colour="red", background="sky", size="large"))
SKETCH = EMBEDDED_FOLDER / "control" / "scenes-sketch.safetensors"


def pixels(result):
    return np.asarray(result.image).astype(int)


def stages(editor, **how):
    """(names of the networks on the device whenever one runs, in order without repeats; the result)."""
    model, seen = editor.model, []
    named = {"unet": model.unet, "autoencoder": model.autoencoder, "text": model.text_encoders[0]}
    if editor.control is not None:
        named["control"] = editor.control.network
    handles = [
        network.register_forward_pre_hook(lambda *args: seen.append(_resident(model.offload, named)))
        for network in (model.unet, model.text_encoders[0], model.autoencoder.encoder, model.autoencoder.decoder)
    ]
    result = editor.edit(HEART, "make it snow", seeds=1, steps=2, **how)[0]
    for handle in handles:
        handle.remove()
    return [one for n, one in enumerate(seen) if n == 0 or one != seen[n - 1]], result


def _resident(offload, named):
    return sorted(name for name, network in named.items() if network in offload.resident)


def test_one_network_after_another_and_an_equal_picture(editor):
    small = InstructPix2Pix.load("embedded", device="cpu", low_memory=True)
    order, result = stages(small)
    assert order == [["autoencoder"], ["text"], ["unet"], ["autoencoder"]]
    plain = editor.edit(HEART, "make it snow", seeds=1, steps=2)[0]
    assert np.array_equal(pixels(result), pixels(plain))
    assert {name for name in result.settings if result.settings[name] != plain.settings[name]} == set()


def test_a_controlnet_comes_with_the_unet():
    small, plain = (
        InstructPix2Pix.load("embedded", device="cpu", low_memory=low, control=SKETCH) for low in (True, False)
    )
    order, result = stages(small, control_images=HEART)
    assert order == [["autoencoder"], ["text"], ["control", "unet"], ["autoencoder"]]
    other = plain.edit(HEART, "make it snow", seeds=1, steps=2, control_images=HEART)[0]
    assert np.array_equal(pixels(result), pixels(other))


def test_what_runs_is_moved_and_what_ran_goes_back(monkeypatch):
    """Weights, counted by where they are: the network that runs is away, all others are at home."""
    one, two, three = (nn.Linear(2, 2) for _ in range(3))
    moves = []
    plain = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moves.append((self, torch.device(device).type)))
    offload = Offload(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for networks in ((one,), (one,), (two, three), (three,), ()):
        with offload.running(*networks):
            assert offload.resident == networks
    assert moves == [
        (one, "cuda"),
        (one, "cpu"),
        (two, "cuda"),
        (three, "cuda"),
        (two, "cpu"),
        (three, "cpu"),
    ]
    monkeypatch.setattr(nn.Module, "to", plain)


def test_the_device_is_where_things_run_not_where_they_wait(monkeypatch):
    small = InstructPix2Pix.load("embedded", device="cpu", low_memory=True)
    small.model.offload.device = torch.device("meta")
    assert small.model.device.type == "meta" and next(small.model.unet.parameters()).device.type == "cpu"


def test_two_threads_take_turns():
    small = InstructPix2Pix.load("embedded", device="cpu", low_memory=True)

    def edit(seed):
        return pixels(small.edit(HEART, "make it snow", seeds=seed, steps=2)[0])

    alone = [edit(seed) for seed in range(3)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(edit, range(3)))
    assert all(np.abs(one - other).max() <= 1 for one, other in zip(alone, together, strict=True))


def test_compiled_networks_stay():
    with pytest.raises(ConfigError, match="leave out compile or low_memory"):
        InstructPix2Pix.load("embedded", device="cpu", compile=True, low_memory=True)


def test_the_command(tmp_path):
    HEART.save(tmp_path / "scene.png")
    how = ["--instruction", "make it snow", "--steps", "1", "--low-memory", "--out", str(tmp_path / "out.png")]
    assert cli.main(["edit", str(tmp_path / "scene.png"), *how]) == 0 and (tmp_path / "out.png").exists()
