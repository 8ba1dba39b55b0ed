"""A short run of the two campaigns: each generator a time or so, and a power cut at a few points."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Sound inputs, made once for both."""
    return tmp_path_factory.mktemp("campaign") / "seeds"


def run(script: str, seeds: Path, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", str(HERE / script), "--seeds", str(seeds), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_spoiled_inputs_end_in_a_sentence(seeds):
    assert "0 causes" in run("fuzz.py", seeds, "--cases", "48", "--keep-going", "8", "--seed", "4")


def test_a_power_cut_loses_nothing(seeds):
    assert "| captions |" in run("crash.py", seeds, "--only", "captions", "import", "--most", "2")
