"""inspect and convert as a user types them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ip2p_engine import cli
from ip2p_engine.checkpoint.merge import add_difference
from ip2p_engine.checkpoint.recognise import PREFIXES, ema_name
from ip2p_engine.checkpoint.report import report_card
from ip2p_engine.checkpoint.write import save_ldm
from ip2p_engine.networks.model import load_model

UNET = PREFIXES["unet"]


def run(*arguments) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse's own refusals
        return stop.code


def said(capsys) -> str:
    """The one sentence on stderr."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("ip2p")
    return last


@pytest.fixture(scope="module")
def run_file(sd1, make_model, tensors_with_ema, tmp_path_factory):
    """A training run's .ckpt: raw weights of one seed, averaged ones of another, and counters."""
    path = tmp_path_factory.mktemp("run") / "epoch=7.ckpt"
    torch.save({"state_dict": tensors_with_ema(sd1, make_model(seed=1)), "global_step": 22000, "epoch": 7}, path)
    return path


@pytest.fixture(scope="module")
def tensors_with_ema(ldm_tensors):
    def make(raw, averaged):
        state = ldm_tensors(raw)
        unet = {n.removeprefix(UNET): v for n, v in ldm_tensors(averaged).items() if n.startswith(UNET)}
        return {**state, **{ema_name(name): value for name, value in unet.items()}}

    return make


def test_inspect_tells_what_a_file_is(run_file, capsys):
    assert run("inspect", run_file) == 0
    text = capsys.readouterr().out
    for words in (
        "SD1.5; InstructPix2Pix, 8 input channels",
        "ema (averaged)",
        "with raw and ema",
        "global_step 22000",
    ):
        assert words in text
    assert run("inspect", run_file, "--json", "--weights", "raw", "--sha256") == 0
    card = json.loads(capsys.readouterr().out)
    assert (card["weights"], card["has_ema"], list(card["sha256"])) == ("raw", True, ["epoch=7.ckpt"])


@pytest.mark.slow
def test_converting_there_and_back_changes_no_bit(run_file, make_model, sd1, same_model, capsys, tmp_path):
    one, folder, two = tmp_path / "one.safetensors", tmp_path / "new" / "folder", tmp_path / "two.safetensors"
    assert run("convert", run_file, one, "--to", "ldm") == 0
    assert capsys.readouterr().out.strip() == str(one)
    assert run("convert", one, folder, "--to", "diffusers") == 0
    assert run("convert", folder, two, "--to", "ldm") == 0
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    same_model(load_model(one), replace(sd1, unet=make_model(seed=1).unet))
    for made in (one, folder, two):
        card = report_card(made)
        assert (card.weights, card.training["global_step"]) == ("ema", 22000)


def test_convert_takes_raw_weights_and_another_type(run_file, sd1, tmp_path):
    target = tmp_path / "raw.safetensors"
    assert run("convert", run_file, target, "--to", "ldm", "--weights", "raw", "--dtype", "bfloat16") == 0
    loaded = load_model(target, dtype="file")
    assert (loaded.spec.weights, loaded.dtype) == ("raw", torch.bfloat16)
    assert torch.equal(loaded.unet.conv_in.weight, sd1.unet.conv_in.weight.bfloat16())


@pytest.mark.slow
def test_a_file_may_replace_itself(sd1_file, sd1, same_model, tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(sd1_file.read_bytes())
    assert run("convert", path, path, "--to", "ldm") == 0
    same_model(load_model(path), sd1)


def test_convert_completes_a_lone_unet(sd1, make_model, tmp_path):
    base = save_ldm(make_model(in_channels=4, seed=5), tmp_path / "base.safetensors")
    save_file(sd1.unet.state_dict(), tmp_path / "unet.safetensors")
    target = tmp_path / "whole.safetensors"
    assert (
        run("convert", tmp_path / "unet.safetensors", target, "--to", "ldm", "--base", base, "--prediction", "v") == 0
    )
    card = report_card(target)
    assert (card.lacking, card.in_channels, card.prediction) == ((), 8, "v")


@pytest.fixture(scope="module")
def three(sd1_file, make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    others = (save_ldm(make_model(in_channels=4, seed=seed), folder / f"{seed}.safetensors") for seed in (1, 2))
    return (sd1_file, *others)


@pytest.mark.slow
def test_merge(three, sd1, make_model, same_model, tmp_path):
    target = tmp_path / "merged.safetensors"
    assert run("convert", target, "--to", "ldm", "--add-difference", three[0], "-", three[1], "+", three[2]) == 0
    same_model(
        load_model(target), add_difference(sd1, make_model(in_channels=4, seed=1), make_model(in_channels=4, seed=2))
    )


@pytest.mark.slow
def test_a_lone_unet_is_merged_with_the_rest_of_its_base(three, sd1, tmp_path):
    save_file(sd1.unet.state_dict(), tmp_path / "unet.safetensors")
    words = ["--add-difference", tmp_path / "unet.safetensors", "-", three[1], "+", three[2]]
    assert run("convert", *words, tmp_path / "merged.safetensors", "--to", "ldm") == 0
    assert report_card(tmp_path / "merged.safetensors").in_channels == 8


BAD = {
    "a missing source": (["nowhere.ckpt", "out.safetensors", "--to", "ldm"], "nowhere.ckpt does not exist"),
    "no target": (["{file}", "--to", "ldm"], "got 1 paths; give SOURCE and TARGET"),
    "no path": (["--to", "ldm"], "got 0 paths; give SOURCE and TARGET"),
    "three paths": (["{file}", "a.safetensors", "b.safetensors", "--to", "ldm"], "got 3 paths"),
    "no layout": (["{file}", "out.safetensors"], "--to"),
    "an unknown layout": (["{file}", "out.safetensors", "--to", "onnx"], "onnx"),
    "a pickle as target": (["{file}", "out.ckpt", "--to", "ldm"], "give a name ending in .safetensors"),
    "no suffix": (["{file}", "out", "--to", "ldm"], "give a name ending in .safetensors"),
    "a folder named as a file": (["{file}", "out.safetensors", "--to", "diffusers"], "a pipeline is a folder"),
    "a file in the way": (["{file}", "{file}/out.safetensors", "--to", "ldm"], "cannot be written"),
    "a file in the folder's way": (["{file}", "{file}/out", "--to", "diffusers"], "cannot be written"),
    "another folder in the way": (["{file}", "{here}", "--to", "diffusers"], "holds notes.txt"),
    "a missing base": (["{unet}", "out.safetensors", "--to", "ldm", "--base", "no.ckpt"], "no.ckpt does not exist"),
    "no base": (["{unet}", "out.safetensors", "--to", "ldm"], "as the --base"),
    "a merge without words": (
        ["out.safetensors", "--to", "ldm", "--add-difference", "a", "b", "c"],
        "expected 5 arguments",
    ),
    "a merge in other signs": (
        ["out.safetensors", "--to", "ldm", "--add-difference", "a", "+", "b", "-", "c"],
        "a merge is TARGET --to LAYOUT --add-difference IP2P - SD_BASE + OTHER",
    ),
    "a merge into nothing": (["--to", "ldm", "--add-difference", "a", "-", "b", "+", "c"], "a merge is TARGET"),
    "a merge in the wrong order": (
        ["out.safetensors", "--to", "ldm", "--add-difference", "{file}", "-", "{file}", "+", "{file}"],
        "the base model takes 8",
    ),
    "a merge with a base": (
        ["out.safetensors", "--to", "ldm", "--base", "x", "--add-difference", "a", "-", "b", "+", "c"],
        "leave them out",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_sentence(case, sd1, sd1_file, monkeypatch, capsys, tmp_path):
    words, sentence = BAD[case]
    (tmp_path / "notes.txt").write_text("mine")
    save_file(sd1.unet.state_dict(), tmp_path / "unet.safetensors")
    monkeypatch.chdir(tmp_path)
    names = {"{file}": sd1_file, "{unet}": tmp_path / "unet.safetensors", "{here}": tmp_path}
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    assert run("convert", *words) == 2
    assert sentence in said(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "unet.safetensors"]


def test_inspect_of_what_is_no_checkpoint_ends_with_one_sentence(capsys, tmp_path):
    for source in ("", tmp_path, tmp_path / "no.safetensors"):
        assert run("inspect", source) == 2
        assert "give a" in said(capsys)
