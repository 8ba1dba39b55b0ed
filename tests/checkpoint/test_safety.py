"""Files that are broken, lie about themselves, or would run code: one sentence each, and nothing runs."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import signal
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ip2p_engine import files
from ip2p_engine.checkpoint.build import all_finite
from ip2p_engine.checkpoint.recognise import PREFIXES
from ip2p_engine.checkpoint.report import report_card
from ip2p_engine.checkpoint.write import save_diffusers, save_ldm
from ip2p_engine.errors import CheckpointError
from ip2p_engine.networks.model import load_model

UNET, FIRST = PREFIXES["unet"], "input_blocks.0.0.weight"
READERS = [load_model, report_card]


class Touch:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path, how):
        self.path, self.how = str(path), how

    def __reduce__(self):
        calls = {
            "os.mkdir": (os.mkdir, (self.path,)),
            "eval": (eval, (f"__import__('os').mkdir({self.path!r})",)),
            "pathlib": (Path.mkdir, (Path(self.path),)),
        }
        return calls[self.how]


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert 30 < len(text) < 400
    assert ";" in text, "says what to do after a semicolon"
    return text


def refused(reader, path):
    with pytest.raises(CheckpointError) as error:
        reader(path)
    return one_sentence(error)


def as_zip(content, path):
    torch.save(content, path)


def as_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


def as_modern_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=5))


@pytest.mark.parametrize("write", [as_zip, as_legacy, as_plain_pickle, as_modern_pickle])
@pytest.mark.parametrize("how", ["os.mkdir", "eval", "pathlib"])
def test_a_pickle_that_runs_code_runs_nothing(write, how, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "model.ckpt"
    write({"state_dict": {"a": torch.zeros(2)}, "callback": Touch(canary, how)}, path)
    for reader in READERS:
        text = refused(reader, path)
        assert "nothing was run" in text
        assert not canary.exists()
    torch.load(path, weights_only=False) if write in (as_zip, as_legacy) else pickle.loads(path.read_bytes())  # noqa: S301
    assert canary.exists(), "the canary works: a careless loader would have run it"


def test_code_under_a_name_that_is_allowed_is_inert(tmp_path):
    """A name on the list is never imported, so it can be no way in."""
    canary, path = tmp_path / "canary", tmp_path / "model.ckpt"
    module = types.ModuleType("pytorch_lightning")
    module.run = os.mkdir
    sys.modules["pytorch_lightning"] = module
    text = str(canary).encode()
    raw = (
        b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01cpytorch_lightning\nrun\nq\x02"
        + b"X"
        + struct.pack("<I", len(text))
        + text
        + b"\x85Rq\x03s."
    )
    try:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", raw)
            archive.writestr("archive/version", "3\n")
        refused(load_model, path)
        assert not canary.exists()
    finally:
        del sys.modules["pytorch_lightning"]


def lightning_leftovers():
    """What a Lightning run leaves in a .ckpt: callbacks by class, numpy scalars, hyper parameters."""
    lightning = types.ModuleType("pytorch_lightning")
    made = {}
    for name, parent in (("ModelCheckpoint", object), ("AttributeDict", dict), ("Namespace2", object)):
        made[name] = type(name, (parent,), {"__module__": "pytorch_lightning"})
        setattr(lightning, name, made[name])
    state = made["ModelCheckpoint"]()
    state.best = np.float64(0.25)
    content = {
        "epoch": 3,
        "global_step": 22000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {made["ModelCheckpoint"]: {"best_model_score": np.float32(1.5), "object": state}},
        "hyper_parameters": made["AttributeDict"](lr=1e-4, options=argparse.Namespace(a=1), array=np.arange(3)),
        "lr_schedulers": [OrderedDict(last_lr=[np.float64(1e-4)])],
    }
    return lightning, content


@pytest.mark.parametrize("write", [as_zip, as_legacy])
def test_a_training_run_s_leftovers_do_not_hinder(write, sd1, same_model, ldm_tensors, tmp_path):
    lightning, content = lightning_leftovers()
    sys.modules["pytorch_lightning"] = lightning
    try:
        write({**content, "state_dict": ldm_tensors(sd1)}, tmp_path / "model.ckpt")
    finally:
        del sys.modules["pytorch_lightning"]
    before = set(torch.serialization.get_safe_globals())
    same_model(load_model(tmp_path / "model.ckpt", text_heads=4), sd1)
    assert set(torch.serialization.get_safe_globals()) == before, "torch's lists stay as they were"
    assert report_card(tmp_path / "model.ckpt").training == {
        "global_step": 22000,
        "epoch": 3,
        "pytorch-lightning_version": "1.4.2",
    }


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, 0.5, 0.99])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_truncated(suffix, keep, sd1, ldm_tensors, tmp_path):
    path = tmp_path / f"model.{suffix}"
    save_file(ldm_tensors(sd1), path) if suffix == "safetensors" else torch.save(ldm_tensors(sd1), path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    for reader in READERS:
        refused(reader, path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", b"<!DOCTYPE html><html>", "a web page"),
        ("model.ckpt", b"\xff\xd8\xff\xe0" + bytes(100), "a JPEG picture"),
        ("model.ckpt", b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG picture"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git-lfs pointer"),
        ("model.safetensors", b"GGUF" + bytes(100), "a GGUF file"),
        ("model.safetensors", b"", "is empty"),
        ("model.ckpt", bytes(1000), "neither safetensors nor a PyTorch file"),
        ("model.safetensors", struct.pack("<Q", 7) + b'{"a": 1', "damaged safetensors header"),
        ("model.safetensors", struct.pack("<Q", 8) + b'{"a": 1}', "damaged safetensors header"),
    ],
)
def test_not_a_checkpoint_at_all(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    for reader in READERS:
        assert says in refused(reader, tmp_path / name)


def test_mislabelled(sd1, ldm_tensors, tmp_path):
    torch.save(ldm_tensors(sd1), tmp_path / "model.safetensors")
    assert "rename it to .ckpt" in refused(load_model, tmp_path / "model.safetensors")
    save_file(ldm_tensors(sd1), tmp_path / "model.ckpt")
    assert "rename it to .safetensors" in refused(load_model, tmp_path / "model.ckpt")


def test_a_header_whose_length_begins_like_a_pickle(sd1, ldm_tensors, tmp_path):
    """Found by chance: one file in 256 has a header of n * 256 + 0x80 bytes."""
    path = tmp_path / "model.safetensors"
    save_file(ldm_tensors(sd1), path, {"x": ""})
    padding = (0x80 - path.read_bytes()[0]) % 256
    save_file(ldm_tensors(sd1), path, {"x": "y" * padding})
    header = path.read_bytes()[0]
    assert header == 0x80
    assert report_card(path).base == "SD1.5"


def test_a_zip_that_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(load_model, tmp_path / "model.ckpt")


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"state_dict": 5}, {"state_dict": {}}, {"a": 1}])
def test_a_pickle_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "model.ckpt")
    refused(load_model, tmp_path / "model.ckpt")


def changed(state, **changes):
    return {**state, **changes}


def with_stem(channels):
    return lambda state: changed(state, **{UNET + FIRST: torch.zeros(32, channels, 3, 3)})


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def spoiled(name, value):
    def change(state):
        state[name].flatten()[3] = value
        return state

    return change


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}


HEADERS = {
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
    "no type": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "an entry that is a list": {"a": [1]},
    "a negative shape": entry(shape=[-1]),
    "a shape of words": entry(shape=["1"]),
    "a shape that is a word": entry(shape="1"),
    "a shape of fractions": entry(shape=[1.0]),
    "a shape beyond the file": entry(shape=[10**12, 10**12]),
    "offsets of words": entry(data_offsets=[0, "4"]),
    "one offset": entry(data_offsets=[4]),
    "offsets that fall": entry(data_offsets=[4, 0]),
    "a type that is a list": entry(dtype=["F32"]),
    "a type that is none": entry(dtype="F31"),
    "metadata that is null": {"__metadata__": None, **entry()},
    "metadata that is a list": {"__metadata__": [1], **entry()},
    "metadata of numbers": {"__metadata__": {"a": 1}, **entry()},
    "brackets in brackets": "[" * 100_000,
    "a header that is a list": [1],
    "no tensors": {},
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_not_as_it_should_be(case, tmp_path):
    header = HEADERS[case]
    text = ('{"a": ' + header if isinstance(header, str) else json.dumps(header)).encode()
    data = b"" if header in ({}, [1]) else bytes(4)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    for reader in READERS:
        refused(reader, tmp_path / "model.safetensors")


OWN_CONFIGS = {
    "a list": "[1]",
    "null": "null",
    "brackets in brackets": "[" * 100_000,
    "an architecture that is a number": {"architecture": 3},
    "a network that is a number": {"architecture": {"unet": 3}},
    "a network of other settings": {"architecture": {"unet": {"foo": 1}}},
    "text encoders that are a number": {"architecture": {"text_encoders": 3}},
    "channels that are a word": {"in_channels": "8"},
    "a beta that is a word": {"beta_start": "x"},
    "a scale that is NaN": {"latent_scale": float("nan")},
    "no steps": {"steps": 0},
    "a family that is a list": {"family": ["sd1"]},
}


@pytest.mark.parametrize("case", OWN_CONFIGS)
def test_an_own_config_that_is_not_as_it_should_be(case, sd1_file, sd1, ldm_tensors, tmp_path):
    with safe_open(sd1_file, "pt") as opened:
        said = json.loads(opened.metadata()["ip2p_config"])
    wrong = OWN_CONFIGS[case]
    if isinstance(wrong, dict):
        inner = {**said["architecture"], **wrong["architecture"]} if isinstance(wrong.get("architecture"), dict) else 3
        wrong = json.dumps({**said, **wrong, **({"architecture": inner} if "architecture" in wrong else {})})
    save_file(ldm_tensors(sd1), tmp_path / "model.safetensors", {"ip2p_config": wrong})
    for reader in READERS:
        refused(reader, tmp_path / "model.safetensors")


def rewritten(name, **changes):
    def write(folder):
        path = folder / name
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return write


def holding(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def as_others_write(change):
    """Without our own file, so that diffusers' settings count."""
    return lambda folder: ((folder / "ip2p_config.json").unlink(), change(folder))


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FOLDERS = {
    "our config is a list": holding("ip2p_config.json", b"[]"),
    "our config is no text": holding("ip2p_config.json", b"\xff\xfe\x00"),
    "other settings": holding("unet/config.json", b'{"foo": 1}'),
    "settings that are a list": holding("unet/config.json", b"[1]"),
    "settings that are no text": holding("unet/config.json", b"\xff\xfe\x00"),
    "settings in brackets": holding("unet/config.json", b"[" * 100_000),
    "groups that do not divide": rewritten("unet/config.json", norm_num_groups=7, _use_default_values=None),
    "widths that are a word": rewritten("unet/config.json", block_out_channels="x"),
    "blocks that do not exist": rewritten("unet/config.json", down_block_types=["FooBlock2D"] * 2),
    "no width of the text": rewritten("unet/config.json", cross_attention_dim=None),
    "an autoencoder of other settings": holding("vae/config.json", b'{"foo": 1}'),
    "a text encoder of other settings": holding("text_encoder/config.json", b'{"foo": 1}'),
    "no width in the text encoder": rewritten("text_encoder/config.json", hidden_size=None),
    "heads that do not divide": rewritten("text_encoder/config.json", num_attention_heads=7),
    "a scale that is a word": as_others_write(rewritten("vae/config.json", scaling_factor="x")),
    "a beta that is a word": as_others_write(rewritten("scheduler/scheduler_config.json", beta_start="x")),
    "a scheduler that is a number": as_others_write(rewritten("scheduler/scheduler_config.json", _class_name=3)),
    "a shard without numbers": lambda f: (f / WEIGHTS).rename(f / "unet/diffusion_pytorch_model-x-of-y.safetensors"),
    "a network that is a file": lambda f: (shutil.rmtree(f / "unet"), (f / "unet").write_text("x")),
}


@pytest.fixture(scope="module")
def pipeline(sd1, tmp_path_factory):
    return save_diffusers(sd1, tmp_path_factory.mktemp("pipeline") / "model", training={"steps": 1})


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_not_as_it_should_be(case, pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "model")
    FOLDERS[case](folder)
    for reader in READERS:
        refused(reader, folder)


def test_a_training_note_that_is_no_text_hinders_nothing(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "model")
    (folder / "ip2p_training.json").write_bytes(b"\xff\xfe\x00")
    assert "unreadable" in report_card(folder).training


@pytest.mark.parametrize("names", [(1,), (1, "a"), (("a", 1),)])
def test_tensors_whose_names_are_no_words(names, tmp_path):
    torch.save({"state_dict": {name: torch.zeros(2) for name in names}}, tmp_path / "model.ckpt")
    for reader in READERS:
        refused(reader, tmp_path / "model.ckpt")


def test_damaged_compression(tmp_path):
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00." * 100)
    data = bytearray(path.read_bytes())
    place = data.find(b"data.pkl") + 8
    data[place : place + 6] = b"\xff" * 6
    path.write_bytes(data)
    for reader in READERS:
        refused(reader, path)


@pytest.mark.parametrize("source", ["~nosuchuser/model.ckpt", "a" * 5000, "a\0b"])
def test_names_that_no_system_takes(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for reader in READERS:
        refused(reader, source)


@pytest.mark.parametrize("reason", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_cannot_be_opened(reason, sd1_file, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise reason

    monkeypatch.setattr(Path, "open", refuse)
    for reader in READERS:
        assert f"cannot be read ({reason.strerror}); check" in refused(reader, sd1_file)


WRONG = {
    "9 channels": (with_stem(9), "9 input channels .an inpainting model"),
    "3 channels": (with_stem(3), "3 input channels"),
    "a missing tensor": (without(f"{UNET}time_embed.0.bias"), "lacks time_embed.0.bias"),
    "no first tensor": (without(UNET + FIRST), "no UNet"),
    "no autoencoder end": (without("first_stage_model.decoder.norm_out.bias"), "lacks decoder.norm_out.bias"),
    "a tensor too many": (
        lambda s: changed(s, **{f"{UNET}adapter.weight": torch.ones(2)}),
        "has adapter.weight beyond",
    ),
    "a strange tensor": (
        lambda s: changed(s, **{"control_model.a": torch.ones(2)}),
        "no Stable Diffusion checkpoint has",
    ),
    "a wrong shape": (
        lambda s: changed(s, **{f"{UNET}time_embed.0.bias": torch.ones(3)}),
        r"shape \(3,\) and \(128,\)",
    ),
    "NaN in the UNet": (spoiled(f"{UNET}out.2.bias", float("nan")), "out.2.bias of the UNet holds NaN"),
    "NaN in the text encoder": (
        spoiled("cond_stage_model.transformer.text_model.final_layer_norm.bias", float("nan")),
        "of the text encoder holds NaN",
    ),
    "Playground v2.5": (lambda s: changed(s, edm_mean=torch.zeros(4)), "no Stable Diffusion checkpoint has .edm_mean"),
    "infinity": (spoiled("first_stage_model.quant_conv.bias", float("inf")), "of the autoencoder holds NaN or inf"),
}

IN_VALUES = ("NaN in the UNet", "NaN in the text encoder", "infinity")  # which the report card does not read


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors(case, sd1, ldm_tensors, tmp_path):
    change, says = WRONG[case]
    save_file(change(ldm_tensors(sd1)), tmp_path / "model.safetensors")
    for reader in READERS[: 1 if case in IN_VALUES else 2]:
        with pytest.raises(CheckpointError, match=says) as error:
            reader(tmp_path / "model.safetensors")
        one_sentence(error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_bad_number_in_a_thousand_is_found(place, value, dtype):
    tensor = torch.linspace(-1, 1, 1000).to(dtype).reshape(10, 100)
    assert all_finite(tensor)
    tensor.view(-1)[place] = value
    assert not all_finite(tensor)
    assert all_finite(torch.empty(0, dtype=dtype))


def test_a_large_finite_weight_in_half_precision_is_no_infinity(sd1, ldm_tensors, tmp_path):
    state = {name: value.half() if value.is_floating_point() else value for name, value in ldm_tensors(sd1).items()}
    state[f"{UNET}out.2.bias"] = torch.full((4,), 65504.0, dtype=torch.float16)
    save_file(state, tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors", text_heads=4, dtype="file").dtype == torch.float16


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"lora_unet_down.lora_down.weight": torch.ones(2)}, "a LoRA, not a checkpoint"),
        ({"encoder.conv_in.weight": torch.ones(2), "decoder.conv_in.weight": torch.ones(2)}, "an autoencoder alone"),
        ({"a.weight": torch.ones(2)}, "no UNet .its tensors are a.weight"),
    ],
)
def test_other_files_of_the_field(tensors, says, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    for reader in READERS:
        with pytest.raises(CheckpointError, match=says) as error:
            reader(tmp_path / "model.safetensors")
        one_sentence(error)


@pytest.mark.parametrize(
    "source", ["", " ", "/dev/null", "nowhere.safetensors", "folder/nowhere.ckpt", "no such thing", "a/b/c/d.ckpt"]
)
def test_nothing_there(source, monkeypatch, tmp_path):
    """Said at once: a path that is wrong is not looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    refused(load_model, source)


def test_an_empty_folder(tmp_path):
    assert "give a diffusers pipeline folder" in refused(load_model, tmp_path)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "unet").mkdir()
    assert "has no weights" in refused(load_model, tmp_path)


def test_weights_is_ema_or_raw():
    with pytest.raises(CheckpointError, match="choose ema"):
        load_model("embedded", weights="best")


def test_a_damaged_own_config(sd1, ldm_tensors, tmp_path):
    save_file(ldm_tensors(sd1), tmp_path / "model.safetensors", {"ip2p_config": '{"family": "sd9"}'})
    assert "ip2p_config that cannot be used" in refused(load_model, tmp_path / "model.safetensors")


@pytest.fixture
def small_disk():
    """No file can grow beyond 100 kB, as if the disk were full."""
    resource = pytest.importorskip("resource")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("write", [save_ldm, save_diffusers])
def test_a_failed_write_leaves_what_was_there(write, sd1, small_disk, tmp_path):
    target = tmp_path / "target.safetensors" if write is save_ldm else tmp_path / "target"
    target.write_text("old") if write is save_ldm else target.mkdir()
    with pytest.raises(CheckpointError, match="cannot be written .*too large.*; choose a place with room"):
        write(sd1, target)
    assert target.is_dir() or target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_pipeline_folder_replaces_an_older_one(family, make_model, tmp_path):
    first = save_diffusers(make_model(family), tmp_path / "model", training={"steps": 1})
    assert save_diffusers(make_model(family, seed=1), first) == first
    assert torch.equal(
        load_model(first, text_heads=4).unet.conv_in.weight, make_model(family, seed=1).unet.conv_in.weight
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["README.md", "loras/snow.safetensors", ".git/HEAD", "unet/model.fp16.safetensors"])
def test_a_folder_with_other_files_is_not_replaced(name, sd1, tmp_path):
    own = save_diffusers(sd1, tmp_path / "model") / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine")
    with pytest.raises(CheckpointError, match=f"holds {name}, which would be lost") as error:
        save_diffusers(sd1, tmp_path / "model")
    one_sentence(error)
    assert own.read_text() == "mine"


@pytest.mark.parametrize("here", [".", ".."])
def test_the_folder_where_the_command_runs_is_not_replaced(here, sd1, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="is where this command runs; give the name of a new folder"):
        save_diffusers(sd1, here)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_old_folder_is_back_if_the_new_one_cannot_take_its_place(sd1, monkeypatch, tmp_path):
    target, rename = save_diffusers(sd1, tmp_path / "model"), Path.replace

    def refuse(path, other):
        if path.name == "new" and path.is_dir():
            raise PermissionError(13, "Permission denied")
        return rename(path, other)

    monkeypatch.setattr(files, "_exchange", lambda *names: False)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(CheckpointError, match="cannot be written .*Permission denied"):
        save_diffusers(sd1, target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert load_model(target, text_heads=4).spec == sd1.spec


def test_a_number_that_half_precision_cannot_hold_is_named(sd1, ldm_tensors, tmp_path):
    state = changed(ldm_tensors(sd1), **{f"{UNET}out.2.bias": torch.full((4,), 1e5)})
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="out.2.bias has values up to 1e.05, which float16 cannot hold; take"):
        load_model(tmp_path / "model.safetensors", text_heads=4, dtype=torch.float16)
    model = load_model(tmp_path / "model.safetensors", text_heads=4, dtype=torch.bfloat16)
    assert model.unet.conv_out.bias.isfinite().all()
    with pytest.raises(
        CheckpointError, match="half.safetensors: .*out.2.bias has values up to 9.98e.04, which float16"
    ):
        save_ldm(model, tmp_path / "half.safetensors", torch.float16)
    assert not (tmp_path / "half.safetensors").exists()


def test_written_files_are_as_readable_as_others(sd1, tmp_path):
    (tmp_path / "other").touch()
    path = save_ldm(sd1, tmp_path / "model.safetensors")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
