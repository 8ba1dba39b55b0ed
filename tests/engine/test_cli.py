"""The command line as a user meets it: results, one sentence for bad input, nothing heavy for --help."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ip2p_engine import cli
from ip2p_engine.commands import options, scenes
from ip2p_engine.diffusion.sampling import SAMPLERS
from ip2p_engine.diffusion.schedule import SCHEDULES
from ip2p_engine.images import read_settings, save_image
from ip2p_engine.networks.conditioning import decode_pictures
from ip2p_engine.scenes.recipe.stages import STAGES
from ip2p_engine.scenes.world import Scene, render

SNOW = ["--instruction", "make it snow", "--steps", "2"]


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "scene.png"
    render(Scene(shape="heart", colour="red", background="sky", size="large")).save(path)
    return path


def run(*arguments) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse's own refusals
        return stop.code


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ([], [1.5]),
        (["--x", "2"], [2]),
        (["--x", "2", "3", "--x", "4"], [2, 3, 4]),
        (["--x", "1.5", "--x", "2"], [1.5, 2]),
    ],
)
def test_an_option_given_again_adds_its_values_and_replaces_the_default(arguments, values):
    parser = argparse.ArgumentParser()
    parser.add_argument("--x", action=options.Several, type=float, nargs="+", default=[1.5])
    assert [parser.parse_args(arguments).x for _ in range(2)] == [values, values]


def test_every_option_of_several_values_adds_them_up():
    kinds = {
        type(action) for parser in all_parsers(cli.build_parser()) for action in parser._actions if several(action)
    }
    assert kinds == {options.Several}


def several(action):
    ranges = ("p", "cfg")  # their two values are ends, of which the last ones given count
    return action.nargs in ("+", "*") and action.option_strings and action.dest not in ranges


def all_parsers(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in set(action.choices.values()):
                yield from all_parsers(child)


def test_edit_writes_a_picture_with_its_settings(scene, tmp_path, capsys):
    out = tmp_path / "snow.png"
    assert run("edit", scene, *SNOW, "--seed", 3, "--out", out, "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["file"] == str(out)
    assert (row["seed"], row["steps"], row["evaluations"]) == (3, 2, 6)
    assert read_settings(out)["instruction"] == row["instruction"] == "make it snow"
    assert Image.open(out).size == (64, 64)


def test_every_combination_gets_its_own_file(scene, tmp_path, capsys):
    other = tmp_path / "other.png"
    Image.new("RGB", (100, 80), "white").save(other)
    texts = ["--instruction", "make it snow", "paint it blue"]
    assert run("edit", scene, other, *texts, "--steps", 1, "--seeds", 2, "--out", tmp_path / "results") == 0
    files = capsys.readouterr().out.split()
    assert len(set(files)) == 8
    assert sorted({Image.open(f).size for f in files}) == [(64, 64), (100, 80)]
    assert (tmp_path / "results" / "other_edited_2_seed1.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_keeps_what_is_finished(number, scene, tmp_path, monkeypatch, capsys):
    from ip2p_engine.commands import edit_files

    def save_and_stop(image, path, settings, **how):
        if "seed1" in path.name:
            os.kill(os.getpid(), number)
        return save_image(image, path, settings, **how)

    monkeypatch.setattr(edit_files, "save_image", save_and_stop)
    out = tmp_path / "results"
    assert run("edit", scene, *SNOW, "--seeds", 8, "--batch", 1, "--out", out) == 130
    said = capsys.readouterr()
    count = len(said.out.split())
    assert 2 <= count < 8 and said.out.split() == [str(out / f"scene_edited_seed{seed}.png") for seed in range(count)]
    assert sorted(map(str, out.iterdir())) == said.out.split()
    assert f"stopped with {count} of 8 results written" in said.err


def test_a_failing_batch_loses_no_other(scene, tmp_path, monkeypatch, capsys):
    from ip2p_engine import edit

    decoded = []

    def fail_later(model, latents, most):
        decoded.append(latents)
        return decode_pictures(model, latents * (float("nan") if len(decoded) == 2 else 1), most)

    monkeypatch.setattr(edit, "decode_pictures", fail_later)
    assert run("edit", scene, *SNOW, "--seeds", 2, "--batch", 1, "--out", tmp_path / "results") == 2
    sentence_about(capsys, "not finite")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["scene_edited_seed0.png"]


def test_in_a_folder_nothing_is_overwritten(tmp_path, capsys):
    sources = [tmp_path / name for name in ("a.png", "x/a.png", "a_edited_seed0.png")]
    (tmp_path / "x").mkdir()
    for source, colour in zip(sources, ("red", "green", "blue"), strict=True):
        Image.new("RGB", (64, 64), colour).save(source)
    before = sources[2].read_bytes()
    for text in ("make it snow", "paint it blue"):
        assert run("edit", *sources, "--instruction", text, "--steps", 1, "--out", tmp_path) == 0
    files = capsys.readouterr().out.split()
    assert len(set(files)) == 6 and str(sources[2]) not in files
    assert sources[2].read_bytes() == before
    texts = [read_settings(file)["instruction"] for file in files]
    assert texts == ["make it snow"] * 3 + ["paint it blue"] * 3


def test_a_picture_is_not_replaced_by_its_edit(scene, capsys):
    before = scene.read_bytes()
    assert run("edit", scene, *SNOW, "--out", scene) == 2
    sentence_about(capsys, "is the picture to edit")
    assert scene.read_bytes() == before


def test_a_picture_after_the_instruction_is_told_its_place(scene, capsys):
    assert run("edit", "--instruction", "make it snow", scene) == 2
    sentence_about(capsys, "name the pictures first: ip2p edit photo.png --instruction")


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code", "words"), [("| true", 141, ""), ("> /dev/full", 2, "No space left on device")])
def test_an_output_that_takes_no_more_is_no_traceback(end, code, words):
    command = f"set -o pipefail; '{sys.executable}' -m ip2p_engine inspect embedded {end}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr, "ignored" in done.stderr) == (code, False, False)
    assert words in done.stderr


def test_a_new_folder_may_have_a_dot(scene, tmp_path, capsys):
    assert run("edit", scene, *SNOW, "--out", tmp_path / "results.v2") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "results.v2" / "scene_edited_seed0.png")


def test_what_cannot_be_written_is_said_before_the_work(scene, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ip2p_engine.commands.edit.load_editor", None)
    assert run("edit", scene, "--instruction", "x" + 70000 * " ", "--out", tmp_path / "long.jpg") == 2
    sentence_about(capsys, "shorten the instruction or write a PNG")
    for name in ("demo.gif", "."):
        assert run("demo", "--out", tmp_path / name) == 2
        sentence_about(capsys, str(tmp_path / name))


def test_two_runs_of_one_command_write_equal_pictures(scene, tmp_path):
    for name in ("a.png", "b.png"):
        assert run("edit", scene, *SNOW, "--out", tmp_path / name) == 0
    a, b = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert np.array_equal(a, b)


@pytest.mark.slow
def test_demo_says_what_the_judge_sees_and_how_long_it_took(tmp_path, capsys):
    assert run("demo", "--checkpoint", "embedded", "--out", tmp_path / "demo.png") == 0
    said = capsys.readouterr().out
    assert "'make it snow': a large red heart on sky, snow" in said
    assert "s an edit" in said
    assert Image.open(tmp_path / "demo.png").width > 1000


@pytest.mark.slow
def test_judge_prints_figures_by_kind(capsys, tmp_path):
    sheet = tmp_path / "worst.png"
    assert run("scenes", "judge", "--n", 11, "--steps", 1, "--json", "--sheet", sheet) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["overall"]["count"] == 11
    assert len(figures["by_kind"]) == 11
    assert sheet.exists()
    assert run("scenes", "judge", "--n", 11, "--steps", 1) == 0
    assert "background" in capsys.readouterr().out


def bad_picture(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    if kind == "zero-byte":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no picture")
    elif kind == "truncated":
        whole = folder / "whole.png"
        render(Scene(shape="star", colour="blue", background="sand", size="small")).save(whole)
        path.write_bytes(whole.read_bytes()[:200])
    elif kind == "one pixel":
        Image.new("RGB", (1, 1)).save(path)
    elif kind == "sliver":
        Image.new("RGB", (20000, 3)).save(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "animated":
        path = folder / "animated.gif"
        frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "float":
        path = folder / "float.tiff"
        Image.fromarray(np.zeros((64, 64), dtype=np.float32)).save(path)
    return path


@pytest.mark.parametrize(
    "kind", ["missing", "zero-byte", "text", "truncated", "one pixel", "sliver", "folder", "animated", "float"]
)
def test_bad_pictures_end_with_one_sentence(kind, tmp_path, capsys):
    path = bad_picture(kind, tmp_path)
    assert run("edit", path, *SNOW, "--out", tmp_path / "out.png") == 2
    sentence_about(capsys, path.name)
    assert not (tmp_path / "out.png").exists()


BAD_OPTIONS = {
    "steps zero": (["--steps", 0], "steps"),
    "steps negative": (["--steps", -5], "steps"),
    "steps word": (["--steps", "many"], "steps"),
    "text_cfg nan": (["--text-cfg", "nan"], "text_cfg"),
    "text_cfg negative": (["--text-cfg", -1], "text_cfg"),
    "image_cfg infinite": (["--image-cfg", "inf"], "image_cfg"),
    "image_cfg word": (["--image-cfg", "much"], "image-cfg"),
    "sampler": (["--sampler", "plms"], "plms"),
    "schedule": (["--schedule", "cosine"], "cosine"),
    "seed negative": (["--seed", -1], "seed"),
    "seed huge": (["--seed", 2**63], "seed"),
    "seed word": (["--seed", "lucky"], "seed"),
    "no seeds": (["--seeds", 0], "seeds"),
    "size word": (["--size", "huge"], "huge"),
    "size zero": (["--size", "0x64"], "0x64"),
    "size odd": (["--size", "65x64"], "65x64"),
    "size enormous": (["--size", "99968x64"], "99968x64"),
    "resolution": (["--resolution", 10], "resolution"),
    "checkpoint missing": (["--checkpoint", "missing.safetensors"], "missing.safetensors"),
    "checkpoint 4 channels": (["--checkpoint", "embedded-sd"], "4"),
    "weights": (["--weights", "best"], "weights"),
    "dtype": (["--dtype", "float8"], "dtype"),
    "device": (["--device", "abacus"], "abacus"),
    "device without numbers": (["--device", "meta"], "meta"),
    "resolution of a kept size": (["--size", "keep", "--resolution", 64], "--resolution"),
    "resolution of a given size": (["--size", "64x64", "--resolution", 64], "--resolution"),
    "batch": (["--batch", 0], "batch"),
    "one file for two results": (["--seeds", 2], "2 results"),
    "unknown option": (["--colour", "red"], "colour"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_end_with_one_sentence(case, scene, tmp_path, capsys):
    arguments, word = BAD_OPTIONS[case]
    assert run("edit", scene, "--instruction", "make it snow", *arguments, "--out", tmp_path / "out.png") == 2
    sentence_about(capsys, word)
    assert not (tmp_path / "out.png").exists()


def test_bad_checkpoint_files_end_with_one_sentence(scene, tmp_path, capsys):
    for name, content in {"empty.safetensors": b"", "text.ckpt": b"hello", "photo.jpg": b"\xff\xd8\xff"}.items():
        (tmp_path / name).write_bytes(content)
        assert run("edit", scene, *SNOW, "--checkpoint", tmp_path / name) == 2
        sentence_about(capsys, name)


def test_unwritable_output_ends_with_one_sentence(scene, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run("edit", scene, *SNOW, "--out", tmp_path / "file" / "out.png") == 2
    sentence_about(capsys, "file")
    assert run("edit", scene, *SNOW, "--out", tmp_path / "out.gif") == 2
    sentence_about(capsys, "gif")


def test_stages_are_named(tmp_path, capsys):
    assert run("scenes", "train", "everything", "--runs", tmp_path, "--processes", 1) == 2
    sentence_about(capsys, "autoencoder")
    assert run("scenes", "train", "edit", "--runs", tmp_path, "--processes", 1) == 2
    sentence_about(capsys, "does not exist")


@pytest.mark.parametrize(
    "command",
    [
        ("edit", "x.png", *SNOW),
        ("demo",),
        ("train", "--data", "x", "--base", "x"),
        ("evaluate", "curve", "scenes", "--checkpoint", "embedded"),
        ("evaluate", "report", "x"),
        ("scenes", "export"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_no_address_is_taken_for_a_folder(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*command, "--out", "s3://user:secret@bucket/x") == 2
    said = capsys.readouterr().err
    assert "s3://bucket/x lies in shared storage" in said and "secret" not in said
    assert not list(tmp_path.iterdir())


def sentence_about(capsys, word: str) -> None:
    said = capsys.readouterr().err
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("ip2p")
    assert word in last


def test_names_on_the_command_line_are_the_engines():
    assert set(options.SAMPLER_NAMES) == set(SAMPLERS)
    assert set(options.SCHEDULE_NAMES) == set(SCHEDULES)
    assert set(scenes.STAGE_NAMES) == set(STAGES)


def test_help_is_light():
    code = (
        "import sys; from ip2p_engine.cli import build_parser; build_parser().format_help(); "
        "heavy = {'torch', 'diffusers', 'transformers', 'open_clip', 'PIL', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


LIGHT = """
import sys
from ip2p_engine.cli import main
commands = (
    "dataset import {0}/rows.csv --out {0}/store", "dataset info {0}/store", "dataset verify {0}/store",
    "dataset copy {0}/store {0}/copy", "dataset sheet {0}/store --out {0}/sheet.html",
    "dataset export {0}/store --out {0}/out", "captions --sample 3 --out {0}/captions.jsonl",
    "pairs {0}/captions.jsonl --out {0}/pairs --keep -3",
)
for command in commands:
    assert main(command.format(sys.argv[1]).split()) == 2 * command.startswith("pairs"), command
    heavy = {"torch", "diffusers", "transformers", "open_clip", "peft", "scipy"} & set(sys.modules)
    assert not heavy, (command, heavy)
"""


def test_data_sets_and_captions_need_no_torch(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "rows.csv").write_text("original_image,edited_image,instruction\na.png,b.png,make it blue\n")
    subprocess.run([sys.executable, "-c", LIGHT, str(tmp_path)], check=True)


@pytest.mark.slow
def test_an_edit_imports_no_training_libraries(scene, tmp_path):
    code = (
        "import sys; from ip2p_engine.cli import main; code = main(); "
        "assert not [name for name in ('peft', 'scipy', 'open_clip') if sys.modules.get(name)]; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "edit", str(scene), *SNOW, "--out", str(tmp_path / "out.png")]
    subprocess.run(command, check=True)
    assert (tmp_path / "out.png").exists()


def test_interrupting_is_quiet(monkeypatch, scene, capsys):
    from ip2p_engine.commands import edit_files

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(edit_files, "edit_files", interrupted)
    assert run("edit", scene, *SNOW) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "ip2p_engine", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    assert done.stdout.startswith("ip2p ")
