"""The reference checkpoints agree with the original implementation, quantity by quantity."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from ip2p_engine.networks.model import load_model


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("parity", Path(__file__).with_name("parity.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check(rows):
    assert {row.quantity: row.distance for row in rows if not row.distance <= row.tolerance} == {}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_ckpt(weights, parity, tiny_ckpt, reference):
    rows = parity.compare(load_model(tiny_ckpt, weights=weights), weights, reference, steps_limit=0)
    check(rows)
    assert len(rows) >= 19


@pytest.mark.slow
def test_merged_safetensors(parity, tiny_safetensors, reference):
    check(parity.compare(load_model(tiny_safetensors), "ema", reference, steps_limit=0))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_whole_runs(weights, parity, tiny_ckpt, reference):
    check(parity.compare(load_model(tiny_ckpt, weights=weights), weights, reference))


@pytest.mark.slow
def test_the_wrong_weights_would_show(parity, tiny_ckpt, reference):
    """Raw where EMA was meant is off by thousands of tolerances, so the table can tell them apart."""
    rows = parity.compare(load_model(tiny_ckpt, weights="raw"), "ema", reference, steps_limit=0)
    assert max(row.distance / row.tolerance for row in rows) > 1000


@pytest.mark.slow
def test_pairs(parity, tiny_sd, pairs_reference):
    check(parity.compare_pairs(tiny_sd, pairs_reference))
