"""A short run of the two campaigns: each generator a time or so, and a power cut at a few points."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_spoiled_inputs_end_in_a_sentence():
    assert "0 causes" in run("fuzz.py", "--cases", "48", "--keep-going", "12", "--seed", "4")


def test_a_power_cut_loses_nothing():
    assert "| captions |" in run("crash.py", "--only", "captions", "import", "--most", "2")
