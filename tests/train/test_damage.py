"""Run folders that were damaged, or written by a stranger: one sentence, and nothing goes on with other numbers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ip2p_engine.errors import CheckpointError, ConfigError, DatasetError
from ip2p_engine.train import encoding
from ip2p_engine.train.checkpoints import PARTS, load_checkpoint, save_checkpoint
from ip2p_engine.train.run_folder import RunFolder

STATE = {"trained": {"a": torch.arange(1000.0)}, "ema": {}, "optimizers": [], "scaler": None, "broken": ["x"]}


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 3, STATE, keep=1)
    assert load_checkpoint(path)["step"] == 3
    data = bytearray(path.read_bytes())
    at = data.find(torch.arange(1000.0).numpy().tobytes()[400:440])
    data[at + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not as it was written.*delete it"):
        load_checkpoint(path)


@pytest.mark.parametrize("changes", [{"step": 4}, {"broken": [3]}, {"broken": None}])
def test_a_checkpoint_of_other_content(changes, tmp_path):
    path = save_checkpoint(tmp_path, 3, STATE, keep=1)
    torch.save({"step": 3, **STATE, **changes}, path)
    with pytest.raises(CheckpointError, match="delete it"):
        load_checkpoint(path)
    torch.save(dict.fromkeys(PARTS), path)
    with pytest.raises(CheckpointError, match="delete it"):
        load_checkpoint(path)


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(content, stream):
        error = RuntimeError("[enforce fail at inline_container.cc:1] . PytorchStreamWriter failed")
        error.__context__ = OSError(28, "No space left on device")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left.*free some space"):
        save_checkpoint(tmp_path, 3, STATE, keep=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", [{"step": "3", "loss": 1.0}, {"step": 3}, {"step": 3, "loss": None}])
def test_a_log_of_other_rows(row, tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match="row 2, has no step and loss"):
        RunFolder(tmp_path, writes=False).rows()


OTHER = [[], {"config": 3}, {"spec": []}, {"changes": [3]}, {"changes": [{"after_step": "1"}]}]


@pytest.mark.parametrize("about", OTHER)
def test_a_run_json_of_other_content(about, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="no training run's"):
        RunFolder(tmp_path, writes=False)._saved()


def test_a_cached_shard_whose_numbers_have_changed(tmp_path):
    tensors = {"0.mean": torch.arange(4.0)}
    about = {encoding.BROKEN: "{}", encoding.TEXT_OF: "{}"}
    path = tmp_path / "shard-000000.safetensors"
    save_file(tensors, path, about)
    assert encoding._Shard.open(path).names == {"0.mean"}, "of 0.1, without a digest"
    save_file(tensors, path, {**about, encoding.DIGEST: encoding._digest(tensors)})
    assert encoding._Shard.open(path).names == {"0.mean"}
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert load_file(path)["0.mean"][3] != 3
    with pytest.raises(DatasetError, match="its numbers have changed.*delete it, it is made again"):
        encoding._Shard.open(path)
