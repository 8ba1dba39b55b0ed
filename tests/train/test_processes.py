"""The command line, on one process and on two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from ip2p_engine import InstructPix2Pix, cli
from ip2p_engine.commands import train as commands
from ip2p_engine.errors import ConfigError
from ip2p_engine.files import locked
from ip2p_engine.train import PRESETS

ROOT = Path(__file__).parents[2]
SHORT = ["--resolution", "64", "--set", "resize=[64,72]", "--workers", "0", "--validate-every", "0", "--device", "cpu"]


PIECES = Path(__file__).parent / "in_pieces.py"
OUTPUTS = ("ema.safetensors",)
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def command(store, base, out, *more):
    return ["train", "--data", str(store), "--base", str(base), "--out", str(out), *SHORT, *more]


def test_one_step_from_the_command_to_an_edit(store, base, tmp_path, capsys):
    """The whole way once, in every check: what the run leaves has learnt something, loads and edits."""
    settings = ("--steps", "1", "--batch-size", "2", "--json")
    assert cli.main(command(store, base(), tmp_path / "run", *settings)) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["step"], result["finished"]) == (1, True)
    assert 0 < result["loss"] == losses(tmp_path / "run")[0] < 10
    editor = InstructPix2Pix.load(result["files"]["ema"], device="cpu")
    new = editor.model.unet.conv_in.weight[:, 4:]
    assert new.isfinite().all() and (new != 0).any()
    edit = editor.edit(Image.new("RGB", (64, 64)), "add snow", steps=1, size="keep")[0]
    assert edit.latent.isfinite().all()


@pytest.mark.slow
def test_train_command(store, base, tmp_path, capsys):
    settings = ("--steps", "2", "--batch-size", "4", "--json")
    assert cli.main(command(store, base(), tmp_path / "run", *settings)) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["step"], result["finished"]) == (2, True)
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["config"]["resize"] == [64, 72]
    assert {"torch", "ip2p_engine"} <= saved["versions"].keys()
    assert cli.main(command(store, base(), tmp_path / "run", "--steps", "3", "--batch-size", "2")) == 2
    assert "holds a run with batch_size 4 and now it is 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "stepz=1"], "no setting 'stepz'"),
        (["--set", "steps=null"], "steps is None; give a whole number"),
        (["--set", "steps"], "give NAME=VALUE"),
        (["--lora", "-1"], "lora_rank is -1"),
        (["--columns", "a", "b", "c"], "has the columns"),
        (["--optimizer", "adamw8bit"], "bitsandbytes"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(store, base, tmp_path, capsys, more, message):
    if message == "bitsandbytes" and _has("bitsandbytes"):
        pytest.skip("it is installed")
    assert cli.main(command(store, base(), tmp_path / "run", "--steps", "1", "--batch-size", "2", *more)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ip2p:")]
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_options_replace_a_files_values_and_null_is_a_value(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"lora_alpha": 8, "steps": 5, "seed": 1}')
    words = ["--config", str(path), "--resolution", "128", "--seed", "2", "--set", "lora_alpha=null", "seed=3"]
    options = cli.build_parser().parse_args(["train", "--data", "x", "--base", "y", "--out", "z", *words])
    config = commands._config(options)
    assert (config.lora_alpha, config.steps, config.seed, config.resize) == (None, 5, 3, (128, 144))


def _has(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_names_on_the_command_line_are_the_engines():
    assert set(commands.PRESET_NAMES) == set(PRESETS)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


LOSS = ["--set", "mask_channels=true", "unmasked_weight=0.3", "change_weight=1", "zero_snr=true"]
TEXT = ["--train-text-encoder", "--set", "text_learning_rate=3e-6"]
POSTHOC = ["--set", "posthoc_every=2"]
SEEN = ["--validate-every", "4", "--validation-clip", "embedded", "--set", "validation_count=1", "validation_pairs=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        [],
        [*LOSS, *TEXT, "--lora", "2", "--set", "lora_conv_rank=2"],
        [*TEXT, *POSTHOC, *SEEN],
        ["--distill", "7.5", "1.5", *POSTHOC],
    ],
)
def test_two_processes_train_as_one_with_twice_the_batch(masked, base, tmp_path, more):
    settings = ("--steps", "4", "--batch-size", "8", "--learning-rate", "1e-5", "--outputs", "ema", *more)
    start = "embedded" if "--distill" in more else base()
    assert cli.main(command(masked, start, tmp_path / "one", *settings)) == 0
    run = on_two(["-m", "ip2p_engine"], command(masked, start, tmp_path / "two", *settings, "--micro-batch", "3"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert run.stdout.split() == [str(tmp_path / "two" / name) for name in OUTPUTS]  # one process speaks for both
    assert_same_averages(tmp_path / "one", tmp_path / "two", kept=2 if "posthoc_every=2" in more else 0)
    if "--validation-clip" in more:
        one, two = (json.loads((tmp_path / name / "validation.jsonl").read_text()) for name in ("one", "two"))
        assert one == pytest.approx(two, abs=1e-4) and {"raw", "ema", "clip_image"} <= one.keys()


def assert_same_averages(one, two, *, kept):
    """The default average, and in half precision what others are made of: equal but for one number in 10,000.

    AdamW turns a gradient of rounding's size into a whole step, so that single numbers may lie a few rates apart.
    """
    files = sorted(path.relative_to(one) for path in one.rglob("averages/*"))
    assert len(files) == kept and all((two / path).is_file() for path in files)
    for name, apart in [("ema.safetensors", 1e-6), *((path, 0.0) for path in files)]:
        first, second = (load_file(run / name) for run in (one, two))
        assert first.keys() == second.keys()
        pairs = [(first[key].double(), second[key].double()) for key in first if first[key].numel()]
        assert sum(int(((a - b).abs() > apart).sum()) for a, b in pairs) < 1e-4 * sum(a.numel() for a, _ in pairs)
        assert max(float((a - b).abs().max()) for a, b in pairs) < 2e-4  # a half's rounding, and rates of 1e-5


@pytest.mark.slow
def test_weights_in_pieces_train_as_whole_ones_and_go_on_from_each_other_s_checkpoints(store, base, tmp_path):
    def trained(name, *more):
        settings = ("--batch-size", "8", "--learning-rate", "1e-5", *POSTHOC, *more)
        return command(store, base(), tmp_path / name, *settings)

    assert cli.main(trained("whole", "--steps", "4", "--save-every", "2")) == 0
    on_two([str(PIECES)], trained("pieces", "--steps", "4", "--save-every", "2", "--micro-batch", "2"), sharded=True)
    expected = losses(tmp_path / "whole")
    assert losses(tmp_path / "pieces") == pytest.approx(expected, abs=1e-5)
    assert cli.main(trained("pieces", "--steps", "6")) == 0
    on_two([str(PIECES)], trained("whole", "--steps", "6", "--validate-every", "6"), sharded=True)
    assert len(losses(tmp_path / "whole")) == 6
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "pieces"), abs=1e-5)
    assert (tmp_path / "whole" / "validation").is_dir()
    assert_same_averages(tmp_path / "whole", tmp_path / "pieces", kept=3)


def on_two(program, arguments, sharded=False):
    """A program on two processes that share the work, by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = SHARDED if sharded else {}
    run = subprocess.run(
        [*launcher, *program, *arguments], env=environment() | more, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_same_command_goes_on(store, base, tmp_path, number):
    arguments = command(store, base(), tmp_path / "run", "--steps", "400", "--batch-size", "2")
    log = tmp_path / "run" / "log.jsonl"
    with subprocess.Popen([sys.executable, "-m", "ip2p_engine", *arguments], env=environment(), cwd=ROOT) as process:
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 2):
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=300) == 130
    assert_saved(tmp_path / "run")


@pytest.mark.slow
def test_the_embedded_model_s_training_passes_a_signal_on(store, tmp_path):
    words = ["scenes", "train", "--pairs", str(store), "--runs", str(tmp_path), "--processes", "1"]
    folder = tmp_path / "edit-pairs"
    log = folder / "log.jsonl"
    with subprocess.Popen([sys.executable, "-m", "ip2p_engine", *words], env=environment(), cwd=ROOT) as process:
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 2):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 130
    assert_saved(folder)
    with locked(folder / ".lock", "its child is still at work", ConfigError):
        pass


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs", "STORE", "edit"], "--pairs trains the edit model alone; leave out edit"),
        (["--pairs", "EMPTY"], "is no known layout"),
        (["clip", "bogus"], "stage 'bogus' is unknown"),
        (["--processes", "0"], "--processes"),
    ],
)
def test_what_the_embedded_model_cannot_be_trained_on_is_one_sentence(store, tmp_path, capsys, words, message):
    places = {"STORE": store, "EMPTY": tmp_path}
    words = [str(places.get(word, word)) for word in words]
    assert cli.main(["scenes", "train", "--processes", "1", "--runs", str(tmp_path / "runs"), *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "runs").exists()


def assert_saved(folder):
    done = len(losses(folder))
    assert 2 <= done < 400
    assert (folder / "checkpoints" / f"step-{done:08d}.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "method"), [(signal.SIGTERM, "fork"), (signal.SIGINT, "spawn")])
def test_workers_outlive_a_signal_that_reaches_them_too(store, base, tmp_path, number, method):
    """A terminal's Ctrl-C and torchrun's SIGTERM go to the whole group."""
    start = f"import multiprocessing, sys; multiprocessing.set_start_method({method!r})"
    program = f"{start}; from ip2p_engine import cli; sys.exit(cli.main(sys.argv[1:]))"
    words = command(store, base(), tmp_path / "run", "--steps", "400", "--batch-size", "2", "--workers", "2")
    log, said = tmp_path / "run" / "log.jsonl", tmp_path / "said"
    with (
        said.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", program, *words],
            env=environment(),
            cwd=ROOT,
            stderr=stderr,
            start_new_session=True,
        ) as process,
    ):
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 2):
            time.sleep(0.05)
        os.killpg(process.pid, number)
        assert process.wait(timeout=300) == 130
    assert_saved(tmp_path / "run")
    assert said.read_text().count("keeping what is finished") == 1
    assert "Traceback" not in said.read_text()
