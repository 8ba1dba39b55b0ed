"""Schedules, dropout and weights of the loss that the paper's recipe does not have, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from ip2p_engine.diffusion.guidance import conditioning_dropout
from ip2p_engine.errors import ConfigError
from ip2p_engine.train import TrainConfig
from ip2p_engine.train.objective import _left_out, change_weights
from ip2p_engine.train.optimizers import learning_rate


@pytest.mark.parametrize(
    ("settings", "at", "wanted"),
    [
        ({"schedule": "linear"}, (0, 50, 99), (1, 0.5, 0.01)),
        ({"schedule": "polynomial", "schedule_power": 3.0}, (0, 50, 99), (1, 0.125, 1e-6)),
        ({"schedule": "restarts", "schedule_restarts": 2}, (0, 25, 49, 50, 75), (1, 0.5, None, 1, 0.5)),
        ({"schedule": "linear", "warm_up": 10}, (0, 9, 50), (0.1, 0.91, 0.5)),
    ],
)
def test_schedules(settings, at, wanted):
    config = TrainConfig(steps=100, learning_rate=1.0, **settings)
    last = 0.5 * (1 + math.cos(0.98 * math.pi))
    found = [learning_rate(config, step) for step in at]
    assert found == pytest.approx([last if one is None else one for one in wanted])


def test_one_restart_is_a_cosine():
    one, cosine = (TrainConfig(steps=7, schedule=name, schedule_restarts=1) for name in ("restarts", "cosine"))
    assert [learning_rate(one, n) for n in range(7)] == [learning_rate(cosine, n) for n in range(7)]


def test_shares_of_what_is_left_out():
    r = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    config = TrainConfig(dropout=0.05, text_dropout=0.1, image_dropout=0.02)
    no_text, no_image = _left_out(r, config.dropouts)
    counts = [int(one.sum()) for one in (no_text & ~no_image, no_text & no_image, no_image & ~no_text)]
    assert counts == [1000, 500, 200]
    plain = _left_out(r, TrainConfig().dropouts)
    assert all(torch.equal(a, b) for a, b in zip(plain, conditioning_dropout(r, 0.05), strict=True))


@pytest.mark.parametrize(
    "values", [{"text_dropout": 1.1}, {"image_dropout": -0.1}, {"text_dropout": 0.9, "dropout": 0.1}]
)
def test_shares_that_are_none(values):
    with pytest.raises(ConfigError, match="dropout"):
        TrainConfig(**values)


def test_weights_of_change():
    change = torch.zeros(2, 4, 2, 2)
    change[0, :, 0, 0] = -3.0
    change[0, :, 0, 1] = 1.0
    found = change_weights(change, 2.0)
    assert torch.allclose(found[0, 0], torch.tensor([[1 + 2 * 3, 1 + 2 * 1], [1, 1]]) / 3)
    assert torch.allclose(found.mean(dim=(1, 2, 3)), torch.ones(2)) and torch.equal(found[1], torch.ones(1, 2, 2))
