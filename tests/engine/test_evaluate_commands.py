"""The command line of the evaluator: what its folders hold, what its options mean, and what it refuses."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ip2p_engine import InstructPix2Pix
from ip2p_engine.cli import build_parser, main
from ip2p_engine.commands import evaluate_data as evaluate_ablation
from ip2p_engine.commands.evaluate import _curve_methods
from ip2p_engine.commands.evaluate_data import named_checkpoints, told
from ip2p_engine.data.store import PairRecord, PairWriter
from ip2p_engine.errors import DatasetError
from ip2p_engine.evaluate.run_folder import ROWS, RUN, check_run, claim_run, load_run
from ip2p_engine.scenes.exam import scene_samples
from ip2p_engine.scenes.limits import CASES
from ip2p_engine.scenes.world import render


def test_a_folder_is_of_one_kind(tmp_path):
    check_run(tmp_path / "new", "pairs")
    claim_run(tmp_path / "new", "curve")
    claim_run(tmp_path / "new", "curve")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / RUN).write_text('{"config": {}, "data": "pairs"}')
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / ROWS).write_text("{}\n")
    for name, found in (("new", "curve"), ("training", "training"), ("rows", "rows.jsonl without run.json")):
        before = {path: path.read_text() for path in (tmp_path / name).iterdir()}
        with pytest.raises(DatasetError, match=rf"holds another run \({found}\), and this one is pairs"):
            claim_run(tmp_path / name, "pairs")
        assert {path: path.read_text() for path in (tmp_path / name).iterdir()} == before


KINDS = {
    "pairs": ["t.csv"],
    "curve": ["--n", "1"],
    "scenes": ["--n", "1"],
    "limits": ["--n", "1"],
    "sweep": ["p.png", "--instruction", "i", "--caption", "c", "--edited-caption", "e"],
    "ablation": ["--n", "1", "--filtered", "p"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_command_replaces_another_s_rows(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("source,edited\na,b\n")
    claim_run(tmp_path / "out", "scenes --auto")
    (tmp_path / "out" / ROWS).write_text('{"sample": 1}\n')
    assert main(["evaluate", kind, *KINDS[kind], "--out", "out"]) == 2
    assert f"holds another run (scenes --auto), and this one is {kind}" in capsys.readouterr().err
    assert (tmp_path / "out" / ROWS).read_text() == '{"sample": 1}\n'


def test_an_arm_is_measured_in_the_dtype_that_was_asked_for(monkeypatch):
    asked = {}
    monkeypatch.setattr(InstructPix2Pix, "load", lambda path, **options: asked.update(options))
    monkeypatch.setattr("ip2p_engine.evaluate.methods.InstructionEdit", lambda *args, **more: None)
    options = argparse.Namespace(device=None, dtype="bfloat16", text_cfg=[1.0], image_cfg=[1.5])
    evaluate_ablation._method(options, "arm", Path("x"), None)
    assert asked["dtype"] is torch.bfloat16


def test_only_names_are_names_of_checkpoints():
    given = ["mine=a.ckpt", "runs/lr=1e-4/ema.safetensors", "https://host/b.safetensors?sig=x", "s3=s3://x/c=1.ckpt"]
    assert named_checkpoints(given) == [
        ("mine", "a.ckpt"),
        ("ema", "runs/lr=1e-4/ema.safetensors"),
        ("b", "https://host/b.safetensors?sig=x"),
        ("s3", "s3://x/c=1.ckpt"),
    ]


def test_no_secret_of_an_address_is_told():
    said = told(argparse.Namespace(base="https://me:pw@host/b.ckpt?sig=x", n=3, clip=None))
    assert said == {"base": "https://host/b.ckpt", "n": "3"}


def test_the_sweep_command_tells_all_that_made_its_rows(tmp_path, capsys):
    render(scene_samples(1)[1].edits["000000"].source).save(tmp_path / "p.png")
    command = ["evaluate", "sweep", str(tmp_path / "p.png"), "--instruction", "make it snow", "--caption", "a heart"]
    command += ["--edited-caption", "a heart in snow", "--text-cfg", "2", "2", "--image-cfg", "1", "1.5"]
    assert main([*command, "--out", str(tmp_path / "out"), "--steps", "1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / ROWS).read_text().splitlines()]
    assert [(row["text_cfg"], row["image_cfg"]) for row in rows] == [(2, 1), (2, 1.5)]
    made_by = {"picture", "size", "steps", "sampler", "schedule", "dtype", "checkpoint", "fingerprint", "clip"}
    assert made_by <= set(rows[0]) and made_by <= set(load_run(tmp_path / "out").settings)


def test_the_limits_command_tells_what_was_used(tmp_path, capsys):
    assert main(["evaluate", "limits", "--n", "1", "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / ROWS).read_text().splitlines()]
    assert [row["kind"] for row in rows] == list(CASES) and {"came_out", "instruction", "seed"} <= set(rows[0])
    settings = load_run(tmp_path / "out").settings
    assert settings["steps"] == 1 and settings["text_cfg"] is not None and settings["seed"] == 7


@pytest.mark.slow
def test_the_curve_command(tmp_path, capsys):
    command = ["evaluate", "curve", "scenes", "--n", "1", "--steps", "1", "--image-cfg", "1", "1.5", "--strength", "1"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "image similarity rises" in said and "embedded lies above SDEdit, output caption" in said
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 + 2 + 3 and [row["curve"] for row in rows if "judged" not in row] == ["Prompt-to-Prompt"]
    assert main(["evaluate", "report", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {
        "curve.png",
        "curve.svg",
        "examples.png",
        "run.json",
        "report.html",
    }


@pytest.mark.slow
def test_a_curve_without_captions_is_of_image_metrics_and_shows_every_checkpoint(tmp_path, capsys):
    with PairWriter(tmp_path / "data", manifest={"config": {}}) as writer:
        for n in range(2):
            texts = {"edit_prompt": "make it red", "original_prompt": "", "edited_prompt": ""}
            stream = io.BytesIO()
            Image.new("RGB", (64, 64), (n, 9, 9)).save(stream, "PNG")
            pictures = {"original_image": stream.getvalue(), "edited_image": stream.getvalue()}
            writer.write(PairRecord(**pictures, **texts, seed=n, p=None, cfg=None, key=f"{n}"))
    command = ["evaluate", "curve", str(tmp_path / "data"), "--split", "all", "--steps", "1", "--image-cfg", "1", "1.5"]
    command += ["--checkpoint", "a=embedded", "b=embedded", "--clip", "embedded", "--out", str(tmp_path / "run")]
    assert main([*command, "--text-to-image", "embedded-sd", "--strength", "1"]) == 0
    said = capsys.readouterr()
    assert "2 of 2 samples lack a caption: image metrics alone" in said.err
    assert "sim_image" in said.out and "sim_direction" not in said.out and "image similarity rises" in said.out
    assert "SDEdit, instruction" in said.out and "SDEdit, output" not in said.out and "Prompt-to-Prompt" not in said.out
    assert not (tmp_path / "run" / "curve.png").exists()
    sheet = Image.open(tmp_path / "run" / "examples.png")
    assert sheet.width > 6 * 96  # before, two settings of each checkpoint, target
    tables = load_run(tmp_path / "run").tables
    assert [row[0] for row in tables[-1].rows] == ["a", "b"] and tables[-1].title == "What the checkpoints have seen"
    assert main(["evaluate", "report", str(tmp_path / "run")]) == 0


def test_a_lora_is_merged_into_every_checkpoint_of_a_curve(tmp_path):
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    save_file(
        {f"{layer}.lora_down.weight": torch.ones(1, 96), f"{layer}.lora_up.weight": torch.ones(128, 1)},
        tmp_path / "style.safetensors",
    )
    command = ["evaluate", "curve", "scenes", "--n", "1", "--out", str(tmp_path / "run"), "--strength"]
    given = {}
    for name, more in (("plain", []), ("styled", ["--lora", f"{tmp_path / 'style.safetensors'}:0.5"])):
        options = build_parser().parse_args([*command, *more])
        editors, _, _ = _curve_methods(options, [("a", "embedded"), ("b", "embedded")], None)
        given[name] = {editor.describe(editor.settings[0])["fingerprint"] for editor in editors}
    assert len(given["plain"]) == len(given["styled"]) == 1 and given["plain"] != given["styled"]
    assert told(options)["lora"] == "style.safetensors:0.5" and str(tmp_path) not in str(told(options)["lora"])


@pytest.mark.slow
def test_the_scenes_command(tmp_path, capsys):
    command = ["evaluate", "scenes", "--n", "2", "--steps", "1", "--worst", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    assert "By kind of edit" in capsys.readouterr().out and (tmp_path / "worst.png").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["curve", "--checkpoint", "a=embedded", "a=embedded"], "name each"),
        (["curve", "absent"], "absent is no known layout"),
        (["curve", "--n", "0"], "--n is 0"),
        (["curve", "data", "--strength", "0.5"], "--strength is SDEdit's"),
        (["scenes", "--auto", "--text-cfg", "4"], "--auto sweeps a grid of its own"),
        (["scenes", "--min-sim-image", "0.5"], "--min-sim-image is the automatic pick's"),
        (["scenes", "--worst", "0"], "--worst is 0"),
        (["pairs", "absent.csv"], "absent.csv cannot be read"),
        (["scenes", "--n", "0"], "--n is 0"),
        (["ablation", "--filtered", "x", "--share", "2"], "share is 2"),
        (["ablation", "--filtered", "x", "--image-cfg", "1", "2"], "sweeps one guidance"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, capsys):
    assert main(["evaluate", *arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_lpips_needs_a_mask(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("source,edited\na,b\n")
    assert main(["evaluate", "pairs", str(tmp_path / "t.csv"), "--lpips", "--out", str(tmp_path / "out")]) == 2
    assert "--lpips looks outside masks" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--sheet", "--first"])
def test_sheets_that_cannot_be_written_are_refused_before_the_work(option, tmp_path, capsys):
    assert main(["scenes", "judge", "--checkpoint", "absent", option, str(tmp_path / "x.foo")]) == 2
    assert "x.foo has no suffix that can be written" in capsys.readouterr().err
