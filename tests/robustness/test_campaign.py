"""A short run of the two campaigns: some generators once, and a power cut at a few points."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_spoiled_inputs_end_in_a_sentence_and_a_power_cut_loses_nothing():
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(HERE / "short.py"),
        "--cases",
        "48",
        "--keep-going",
        "6",
        "--seed",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "0 causes" in done.stdout and "| captions |" in done.stdout and "| import |" in done.stdout
