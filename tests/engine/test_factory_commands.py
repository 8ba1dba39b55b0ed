"""The factory's commands as a researcher types them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from ip2p_engine import cli
from ip2p_engine.commands.options import stop_signals
from ip2p_engine.data.store import PairStore
from ip2p_engine.data.tools import verify
from ip2p_engine.p2p.generator import PAIR_MODES

QUICK = ["--candidates", "2", "--steps", "1", "--batch-pairs", "2", "--device", "cpu", "--filter", "none"]


def run(*arguments) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's own refusals
        return stop.code


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    """Made by the command itself."""
    path = tmp_path_factory.mktemp("edits") / "edits.jsonl"
    assert run("captions", "--sample", 3, "--out", path) == 0
    return path


@pytest.fixture(scope="module")
def store(edits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "store"
    assert run("pairs", edits, "--out", folder, *QUICK) == 0
    return folder


def test_captions_of_scenes(tmp_path, capsys):
    assert run("captions", "--sample", 4, "--out", tmp_path / "edits.jsonl", "--per-caption", 2, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (tmp_path / "edits.jsonl").open()]
    assert report["written"] == report["new"] == len(lines) and sum(report["rejected"].values()) == 8 - len(lines)
    assert {"caption", "instruction", "edited_caption"} <= set(lines[0])
    (tmp_path / "more.txt").write_text("a large red heart on a sky background\nno scene\n")
    assert run("captions", tmp_path / "more.txt", "--out", tmp_path / "edits.jsonl") == 0
    assert "1 unknown caption" in capsys.readouterr().out


def test_pairs_end_in_a_sound_data_set(store):
    assert verify(store).sound and len(PairStore(store)) == 6
    assert PairStore(store).manifest["config"]["factory"]["clip"] == "embedded"


def test_filter_reports_and_writes(store, tmp_path, capsys):
    out, plot = tmp_path / "kept", tmp_path / "plots" / "scores.png"
    loose = ["--min-sim-0", -1, "--min-sim-1", -1, "--min-sim-image", -1, "--min-sim-direction", -1]
    assert run("filter", store, "--out", out, *loose, "--keep", 1, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["filtered"]["kept"], report["filtered"]["candidates"], report["missing"]) == (3, 6, [])
    assert len(PairStore(out)) == 3 and verify(out).sound
    pytest.importorskip("matplotlib")
    assert run("filter", store, "--plot", plot) == 0
    assert "sim_image, threshold" in capsys.readouterr().out and plot.read_bytes().startswith(b"\x89PNG")
    assert run("filter", store, "--plot", tmp_path / "plot.xyz") == 2


def test_a_filter_of_rows_that_meet_a_condition(store, tmp_path, capsys):
    """By the rows, not by the ledger of all; exactly the rows, and one condition a folder."""
    loose = ["--min-sim-0", -1, "--min-sim-1", -1, "--min-sim-image", -1, "--min-sim-direction", -1, "--keep", 9]
    scales = sorted(PairStore(store).columns("cfg")["cfg"])
    where = f"cfg >= {scales[2]} and edit_prompt != 'nothing'"
    assert run("filter", store, "--where", where, "--out", tmp_path / "kept", *loose, "--json") == 0
    report = json.loads(capsys.readouterr().out)["filtered"]
    assert (report["kept"], report["candidates"]) == (4, 4)
    assert sorted(PairStore(tmp_path / "kept").columns("cfg")["cfg"]) == scales[2:]
    assert run("filter", store, "--where", f"cfg > {scales[2]}", *loose, "--json") == 0
    assert json.loads(capsys.readouterr().out)["filtered"]["kept"] == 3
    assert run("filter", store, "--where", "cfg > 0", "--out", tmp_path / "kept", *loose) == 2
    assert "another run" in capsys.readouterr().err
    assert run("filter", store, "--where", "beauty > 0", *loose) == 2
    assert "`where` asks for 'beauty'" in capsys.readouterr().err.replace("--where", "`where`")


def test_a_data_set_goes_out_and_in_again(store, tmp_path, capsys):
    assert run("dataset", "export", store, "--out", tmp_path / "original") == 0
    assert run("dataset", "import", tmp_path / "original", "--out", tmp_path / "back") == 0
    assert "6 new pairs" in capsys.readouterr().out
    assert run("dataset", "info", tmp_path / "back", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 6
    assert run("dataset", "verify", tmp_path / "back", "--json") == 0
    assert json.loads(capsys.readouterr().out)["sound"] is True
    assert run("dataset", "sheet", tmp_path / "back", "--out", tmp_path / "sheet.html", "--limit", 2) == 0
    assert (tmp_path / "sheet.html").read_text().count("<article") == 2
    (tmp_path / "back" / "data" / "extra.parquet").write_bytes((next((store / "data").iterdir())).read_bytes())
    capsys.readouterr()
    assert run("dataset", "verify", tmp_path / "back") == 1
    assert "its key is there twice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("captions", "--out", "x.jsonl"), "give IN or --sample N"),
        (("captions", "--sample", "3", "--out", "x.txt"), "give a name that ends in .jsonl"),
        (("captions", "missing.txt", "--out", "x.jsonl"), "missing.txt cannot be read"),
        (("captions", "IN", "--out", "x.jsonl", "--source", "server"), "give --base-url URL and --model NAME"),
        (("captions", "IN", "--out", "x.jsonl", "--source", "language-model"), "give --language-model FOLDER"),
        (("captions", "--sample", "3", "--source", "server", "--out", "x.jsonl"), "use it with --source grammar"),
        (
            ("captions", "IN", "--out", "x.jsonl", "--model", "m"),
            "--model is no option of --source grammar; use it with",
        ),
        (("captions", "IN", "--out", "x.jsonl", "--batch", "4"), "use it with --source language-model"),
        (("captions-fine-tune", "EDITS", "--base", "missing", "--out", "x"), "no causal language model"),
        (("pairs", "missing.jsonl", "--out", "x"), "missing.jsonl cannot be read"),
        (("pairs", "EDITS", "--out", "x", "--p", "0.1", "0.5", "0.9"), "--p got 3 numbers"),
        (("pairs", "EDITS", "--out", "x", "--p", "0.9", "0.1"), "lower and the upper end"),
        (("pairs", "EDITS", "--out", "x", "--partition", "2/2"), "--partition is '2/2'"),
        (("pairs", "EDITS", "--out", "x", "--size", "big"), "--size is 'big'"),
        (("pairs", "EDITS", "--out", "x", "--mode", "blend"), "mode 'blend' is unknown"),
        (("pairs", "EDITS", "--out", "x", "--reweight", "snow"), "such as snow=2"),
        (("pairs", "EDITS", "--out", "x", "--checkpoint", "missing.ckpt"), "missing.ckpt"),
        (("pairs", "EDITS", "--out", "x", "--clip", "ViT-L-14/missing"), "open_clip has no CLIP"),
        (("pairs", "EDITS", "--out", "x", "--checkpoint", "embedded"), "pairs are made by a text-to-image model"),
        (("pairs", "EDITS", "--out", "x", "--keep", "0"), "keep is 0"),
        (("pairs", "in.txt", "--out", "x"), "in.txt ends in .txt; give a .jsonl or .parquet file"),
        (("pairs", "EDITS", "--out", "s3://bucket/x"), "ip2p dataset copy"),
        (
            ("pairs", "EDITS", "--out", "x", "--filter", "none", "--keep", "2"),
            "--keep has no effect without --filter inl",
        ),
        (("pairs", "EDITS", "--out", "x", "--cross-steps", "0.5"), "has no effect without --mode replace or refine"),
        (("pairs", "EDITS", "--out", "x", "--blend-words", "a", "b"), "has no effect without --local-blend"),
        (("pairs", "EDITS", "--out", "x", "--early-margin", "0.2"), "has no effect without --early-reject"),
        (("captions", "IN", "--out", "s3://bucket/x.jsonl"), "s3://bucket/x.jsonl lies in shared storage"),
        (("filter", ".", "--out", "s3://u:secret@bucket/x"), "s3://bucket/x lies in shared storage"),
        (("filter", "."), ". is no known layout"),
        (("dataset", "import", "in.txt", "--out", "s3://bucket/x"), "ip2p dataset copy"),
        (("filter", "missing"), "missing is no known layout"),
        (("dataset", "import", "missing", "--out", "x"), "missing is no known layout"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_leaves_nothing(edits, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("a large red heart on a sky background\n")
    named = {"EDITS": str(edits), "IN": "in.txt"}
    assert run(*[named.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in error and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"in.txt"}


@pytest.mark.slow
def test_another_run_s_folder_is_refused(store, edits, capsys):
    before = verify(store).digest
    assert run("pairs", edits, "--out", store, *QUICK, "--seed", 1) == 2
    assert "another run: its config.factory.seed is 0 and now it is 1" in capsys.readouterr().err
    assert run("pairs", edits, "--out", store, *QUICK, "--weights", "raw") == 2
    assert "another run: its config.pairs.weights is None and now it is 'raw'" in capsys.readouterr().err
    assert verify(store).digest == before


def test_the_options_name_what_there_is():
    from ip2p_engine.clip.filter import MEASURES
    from ip2p_engine.commands import pairs

    assert pairs.MODES == PAIR_MODES and set(pairs.MEASURES) == set(MEASURES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_ctrl_c_again_ends(number, capsys):
    before = signal.getsignal(number)
    with stop_signals() as asked:
        assert not asked()
        signal.raise_signal(number)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) == before
    assert "keeping what is finished" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_ends_whole_and_goes_on(edits, tmp_path, number):
    folder = tmp_path / "store"
    command = [sys.executable, "-m", "ip2p_engine", "pairs", edits, "--out", folder, *QUICK, "--save-seconds", "0"]
    command[command.index("2")] = "8"
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("candidates/*.jsonl")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "the same command goes on" in error and "Traceback" not in error
    assert verify(folder).sound
    assert subprocess.run([*map(str, command)], check=True, capture_output=True).returncode == 0
    assert verify(folder).sound and len(PairStore(folder)) == 24
