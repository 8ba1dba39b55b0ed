"""Training on a GPU is training on a CPU. IP2P_GPU_TESTS_ON=cpu runs the same without one."""

from __future__ import annotations

import json
import os

import pytest
import torch

from ip2p_engine.hooks import Hooks

WHERE = os.environ.get("IP2P_GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHERE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("settings", [{}, {"cache": True}, {"micro_batch": 2}, {"clip_norm": 1.0}], ids=str)
def test_three_steps_are_those_of_a_cpu(run, tmp_path, settings):
    for device in ("cpu", WHERE):
        run(f"on {device}", device=device, steps=3, **settings)
    here, there = (losses(tmp_path / f"on {device}") for device in ("cpu", WHERE))
    assert there == pytest.approx(here, rel=1e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_the_same(run, tmp_path, precision):
    for name, chosen in (("whole", "float32"), ("half", precision)):
        run(name, device=WHERE, steps=3, precision=chosen)
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "whole"), rel=0.05)


def test_a_stopped_run_goes_on(run, tmp_path):
    done = []
    stop = Hooks(on_result=lambda step, _: done.append(step), should_stop=lambda: len(done) == 1)
    run("whole", device=WHERE, steps=3)
    assert not run("parts", device=WHERE, steps=3, hooks=stop).finished
    assert run("parts", device=WHERE, steps=3).finished
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
def test_compiled_steps_are_plain_ones(run, tmp_path):
    for compile in (False, True):
        run(f"compiled {compile}", device=WHERE, steps=3, compile=compile)
    assert losses(tmp_path / "compiled True") == pytest.approx(losses(tmp_path / "compiled False"), rel=1e-4)
