"""Under FSDP tensors lie in pieces; checkpoints and exports hold whole ones."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ip2p_engine.errors import CheckpointError, ConfigError
from ip2p_engine.train import TrainConfig
from ip2p_engine.train.checkpoints import State, is_sharded, whole
from ip2p_engine.train.networks import make_trainable, trained_parameters, usable
from ip2p_engine.train.optimizers import Average, make_optimizers
from ip2p_engine.train.setup import _state


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def trained(model, config):
    """A state after one step with a made-up gradient."""
    parameters = trained_parameters(model.unet)
    average = Average(parameters, config.ema_decay)
    optimizers = make_optimizers(parameters, config)
    state = State(parameters=parameters, average=average, optimizers=optimizers, scaler=None)
    for n, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, 0.01 * (n + 1))
    for optimizer in optimizers:
        optimizer.step()
    average.update(1)
    return state


def same(a, b):
    return {**a, "optimizers": None}.keys() == b.keys() and all(
        torch.equal(value, b[part][name]) for part in ("trained", "ema") for name, value in a[part].items()
    )


@pytest.mark.slow
def test_pieces_are_saved_whole_and_go_on_where_whole_ones_were(group, tiny_model):
    config = TrainConfig()
    plain = make_trainable(copy.deepcopy(tiny_model()), config)
    pieces = copy.deepcopy(plain)
    fully_shard(pieces.unet, mesh=group)
    assert is_sharded(pieces.unet)
    assert not is_sharded(plain.unet)
    saved = trained(plain, config).saved()
    state = trained(pieces, config)
    assert same(saved, state.saved())
    assert all(isinstance(parameter, DTensor) for parameter in state.parameters.values())

    other = make_trainable(copy.deepcopy(tiny_model()), config)
    fully_shard(other.unet, mesh=group)
    parameters = trained_parameters(other.unet)
    optimizers = make_optimizers(parameters, config)
    resumed = State(parameters=parameters, average=Average(parameters, 0.9), optimizers=optimizers, scaler=None)
    resumed.load(saved, "x")
    assert same(saved, resumed.saved())
    first = next(iter(resumed.optimizers[0].state.values()))
    assert isinstance(first["exp_avg"], DTensor)
    with usable(other) as shown:
        assert not is_sharded(shown.unet)
        assert all(torch.equal(value, saved["trained"][name]) for name, value in shown.unet.state_dict().items())
    assert whole("text") == "text"


def test_a_checkpoint_of_another_network_is_refused(tiny_model):
    config = TrainConfig()
    state = trained(make_trainable(copy.deepcopy(tiny_model()), config), config)
    saved = state.saved()
    narrow = {**saved["trained"], "conv_in.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"x: conv_in.bias has the shape \(3,\) and this run's \(16,\)"):
        state.load({**saved, "trained": narrow}, "x")
    with pytest.raises(CheckpointError, match="holds other weights"):
        state.load({**saved, "trained": {}}, "x")


@pytest.mark.parametrize(
    "settings", [{"optimizer": "adafactor"}, {"optimizer": "muon"}, {"lora_rank": 2}, {"train_text_encoder": True}]
)
def test_what_needs_whole_tensors_is_refused_where_they_lie_in_pieces(settings):
    with pytest.raises(ConfigError, match="adafactor and training text encoders need whole tensors"):
        _state(None, TrainConfig(**settings), SimpleNamespace(distributed_type="FSDP"))
