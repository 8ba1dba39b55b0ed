"""A cluster makes the pairs of one machine, to the byte, also when it loses a worker."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager

import pytest
import torch

from ip2p_engine.captions.edits import CaptionEdit
from ip2p_engine.errors import CheckpointError, ConfigError, Interrupted
from ip2p_engine.factory.maker import FactoryConfig
from ip2p_engine.factory.run import Work, make_pairs
from ip2p_engine.factory.workers import WorkerPlan, local_workers, ray_workers
from ip2p_engine.hooks import Hooks
from ip2p_engine.p2p.generator import PairConfig

HEARTS = [
    CaptionEdit(caption=f"a large {old} heart", instruction=f"paint it {new}", edited_caption=f"a large {new} heart")
    for old, new in (("red", "blue"), ("blue", "green"), ("green", "white"), ("white", "yellow"), ("yellow", "red"))
]
PLAN = WorkerPlan(
    device="cpu",
    pairs=PairConfig(steps=1, batch_pairs=2),
    factory=FactoryConfig(candidates=2, clip="embedded", filter=None),
)
# On a machine that is busy with other work: Ray's workers run at niceness 15, have a minute to start, and seconds to
# answer.
PATIENCE = {
    "worker_niceness": "0",
    "worker_register_timeout_seconds": "900",
    "health_check_timeout_ms": "60000",
    "health_check_failure_threshold": "20",
}


def contents(folder):
    return {path.name: path.read_bytes() for place in ("data", "candidates") for path in (folder / place).iterdir()}


@contextmanager
def one_thread():
    """As Ray's workers on CPUs compute: sums over more threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_loses_a_worker_makes_the_same_files(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    for name, value in PATIENCE.items():
        monkeypatch.setenv(f"RAY_{name}", value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with one_thread(), local_workers(PLAN) as workers:
        make_pairs(HEARTS, tmp_path / "alone", workers)
    lost = []
    with ray_workers(PLAN, "local", workers=2) as workers:

        def lose(done, total, note):
            if not lost:
                lost.append(workers.processes[1])
                os.kill(lost[0], signal.SIGKILL)

        make_pairs(HEARTS, tmp_path / "cluster", workers, hooks=Hooks(on_progress=lose))
        assert lost and contents(tmp_path / "cluster") == contents(tmp_path / "alone")
        with pytest.raises(Interrupted, match="the same call goes on"):
            make_pairs(HEARTS, tmp_path / "stopped", workers, hooks=Hooks(should_stop=lambda: True))
    broken = WorkerPlan(checkpoint="missing.safetensors", device="cpu", factory=PLAN.factory)
    with (
        ray_workers(broken, "local", workers=1) as workers,
        pytest.raises(CheckpointError, match="missing.safetensors"),
    ):
        make_pairs(HEARTS, tmp_path / "broken", workers, work=Work())


def test_without_ray_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'ray\[default\]'"), ray_workers(PLAN, "local"):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "127.0.0.1:99999"])
def test_an_address_where_nobody_answers_is_refused_at_once(monkeypatch, address):
    """Ray itself takes minutes."""
    monkeypatch.setattr("ip2p_engine.factory.workers._ray", lambda: pytest.fail("Ray was asked"))
    with pytest.raises(ConfigError, match=r"no Ray cluster at .* \(.*\); start one"), ray_workers(PLAN, address):
        pass
