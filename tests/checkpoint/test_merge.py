"""ip2p - base + other, in numbers that can be checked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ip2p_engine.checkpoint.merge import add_difference
from ip2p_engine.errors import CheckpointError


@pytest.fixture
def base(make_model):
    return make_model(in_channels=4, seed=1)


@pytest.fixture
def other(make_model):
    return make_model(in_channels=4, seed=2)


def test_the_other_equal_to_the_base_changes_no_bit(sd1, base, same_model):
    merged = add_difference(sd1, base, base)
    same_model(merged, replace(sd1, autoencoder=base.autoencoder))


def test_every_tensor_is_the_sum(sd1, base, other):
    merged = add_difference(sd1, base, other)
    ours, theirs, others = (model.unet.state_dict() for model in (sd1, base, other))
    for name, value in merged.unet.state_dict().items():
        if name != "conv_in.weight":
            torch.testing.assert_close(value, ours[name] - theirs[name] + others[name], atol=1e-6, rtol=1e-5)
    conv = merged.unet.conv_in.weight
    torch.testing.assert_close(
        conv[:, :4], ours["conv_in.weight"][:, :4] - theirs["conv_in.weight"] + others["conv_in.weight"]
    )
    assert torch.equal(conv[:, 4:], ours["conv_in.weight"][:, 4:])
    text = [model.text_encoders[0].final_layer_norm.bias for model in (merged, sd1, base, other)]
    torch.testing.assert_close(text[0], text[1] - text[2] + text[3])
    assert merged.autoencoder is other.autoencoder


def test_the_three_are_left_as_they_were(sd1, base, other):
    before = sd1.unet.conv_in.weight.clone()
    add_difference(sd1, base, other)
    assert torch.equal(sd1.unet.conv_in.weight, before)


@pytest.mark.parametrize(
    ("order", "says"), [((1, 0, 2), "the ip2p model takes 4"), ((0, 0, 2), "the base model takes 8")]
)
def test_the_order_matters(order, says, sd1, base, other):
    models = [sd1, base, other]
    with pytest.raises(CheckpointError, match=says):
        add_difference(*(models[i] for i in order))


def test_families_do_not_mix(sd1, base, make_model):
    with pytest.raises(CheckpointError, match="three of one family"):
        add_difference(sd1, base, make_model("sd2", 4))
    with pytest.raises(CheckpointError, match="differs in"):
        add_difference(sd1, base, replace(make_model("sd2", 4), spec=base.spec))
