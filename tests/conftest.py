"""Fixtures for the whole suite."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# Before any import of the hub's client: no test needs the net, and asking a hub that is not there takes its retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

TESTS = Path(__file__).parent


def pytest_configure(config):
    alone = "PYTEST_XDIST_WORKER" not in os.environ  # workers of two threads each would slow one another ten-fold
    torch.set_num_threads(min(2, torch.get_num_threads()) if alone else 1)


def load_by_path(name):
    """A module beside this file (tests are no package, so it is loaded by path)."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference_weights():
    """The module that rebuilds the reference checkpoint."""
    return load_by_path("reference_weights")


@pytest.fixture(scope="session")
def slow_pairs():
    """Prompt-to-Prompt the slow way."""
    return load_by_path("slow_pairs")


@pytest.fixture(scope="session")
def tiny_pair_model():
    """Makes an untrained text-to-image model: (family, dtype) -> Model; with in_channels=8 one that edits."""
    return load_by_path("tiny_text_to_image").tiny_model


@pytest.fixture(scope="session")
def waits():
    """Tensors that claim to be on a GPU, and count what waits for it."""
    return load_by_path("waits")


@pytest.fixture(scope="session")
def reference():
    """Numbers of the original implementation: tests/data/reference/README.md."""
    folder = TESTS / "data" / "reference"
    return {**load_file(folder / "B_common.safetensors"), **load_file(folder / "B_tiny.safetensors")}


@pytest.fixture(scope="session")
def tiny_ckpt(reference_weights, tmp_path_factory):
    """The tiny IP2P as the authors publish: a pickled .ckpt with raw and EMA weights."""
    path = tmp_path_factory.mktemp("reference") / "ip2p_tiny.ckpt"
    torch.save({"state_dict": reference_weights.reference_state("ip2p"), "global_step": 22000}, path)
    return path


@pytest.fixture(scope="session")
def tiny_safetensors(reference_weights, tmp_path_factory):
    """The same with the EMA weights merged in."""
    path = tmp_path_factory.mktemp("reference") / "ip2p_tiny.safetensors"
    save_file(reference_weights.merged(reference_weights.reference_state("ip2p")), path)
    return path


@pytest.fixture(scope="session")
def tiny_sd(reference_weights, tmp_path_factory):
    """The tiny text-to-image model that the reference pairs were made with."""
    from ip2p_engine.networks.model import load_model

    path = tmp_path_factory.mktemp("reference") / "sd_tiny.safetensors"
    save_file(reference_weights.reference_state("sd"), path)
    return load_model(path)


@pytest.fixture(scope="session")
def pairs_reference():
    """Numbers of the original's pair generator: tests/data/reference/README.md."""
    return load_file(TESTS / "data" / "reference" / "C_pairs.safetensors")


@pytest.fixture(scope="session")
def editor():
    """The embedded model."""
    from ip2p_engine import InstructPix2Pix

    return InstructPix2Pix.load("embedded", device="cpu")
