"""The training loss: equal to the original's on its own draws, and to closed forms."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ip2p_engine.diffusion.guidance import conditioning_dropout
from ip2p_engine.networks.conditioning import TextEmbedding
from ip2p_engine.networks.model import load_model
from ip2p_engine.train.config import TrainConfig
from ip2p_engine.train.encoding import Encoded, Encoder
from ip2p_engine.train.networks import make_trainable, trained_parameters, usable, widened
from ip2p_engine.train.objective import Objective, dropped, noise_levels, snr_weight
from ip2p_engine.train.optimizers import Average, decay_at, learning_rate, make_optimizers
from ip2p_engine.train.randomness import Draws

DATA = Path(__file__).parent.parent / "data" / "reference"
TEXTS = json.loads((DATA / "misc.json").read_text())


@pytest.fixture(scope="module")
def theirs():
    return load_file(DATA / "D_training.safetensors")


@pytest.fixture(scope="module")
def model(tiny_ckpt):
    return make_trainable(load_model(tiny_ckpt, weights="raw"), TrainConfig())


@pytest.fixture(scope="module")
def step(model, theirs):
    """One step on the original's pictures and draws: losses, gradients, the weights after it, their average."""
    encoder = Encoder(model)
    pixels = torch.stack([theirs["input_u8"], theirs["edited_u8"]], dim=1).permute(0, 1, 4, 2, 3)
    latents = encoder.latents(pixels.contiguous())
    text = TextEmbedding(tokens=theirs["cond_full"])
    encoded = Encoded(**latents, text=text, size_ids=torch.zeros(4, 6))
    draws = Draws(
        drop=theirs["drop"],
        level=(theirs["t"].double() + 0.5) / 1000,
        posterior=theirs["post_noise"],
        noise=theirs["noise"],
        offset=torch.zeros(4, 4, 1, 1),
        scales=torch.zeros(4, 2),
    )
    config = TrainConfig()
    parameters = trained_parameters(model.unet)
    average = Average(parameters, config.ema_decay)
    (optimizer,) = make_optimizers(parameters, config)
    losses = Objective(model, encoder.null_text, config)(model.unet, encoded, draws)
    losses.mean().backward()
    first = model.unet.conv_in
    gradients = first.weight.grad.clone(), first.bias.grad.clone()
    optimizer.step()
    average.update(1)
    return {
        "latents": latents,
        "losses": losses.detach(),
        "gradients": gradients,
        "after": first.weight.detach(),
        "average": average.values["conv_in.weight"],
        "null": encoder.null_text.tokens,
        "dropped": dropped(encoded, encoder.null_text, draws.drop, 0.05),
    }


def distance(ours, theirs):
    return (ours - theirs).abs().max().item()


def test_posterior_and_condition(step, theirs):
    mean, logvar = theirs["edited_moments"].chunk(2, dim=1)
    assert distance(step["latents"]["mean"], mean) < 5e-5
    assert distance(step["latents"]["std"], (0.5 * logvar).exp()) < 5e-5
    assert distance(step["latents"]["condition"], theirs["c_concat_full"]) < 5e-5
    assert distance(step["null"], theirs["null_emb"]) < 1e-5


def test_masked_conditions(step, theirs):
    text, condition = step["dropped"]
    assert distance(text.tokens, theirs["c_crossattn"]) < 1e-5
    assert distance(condition, theirs["c_concat"]) < 5e-5
    assert (condition[1:3] == 0).all()


def test_loss_equals_the_originals(step, theirs):
    assert distance(step["losses"].mean(), theirs["loss"]) < 2e-6
    assert distance(step["losses"], theirs["loss_per_sample"]) < 4e-6


def test_first_convolutions_gradient_equals_the_originals(step, theirs):
    weight, bias = step["gradients"]
    assert distance(weight, theirs["grad_conv_in_weight"]) < 2e-6
    assert distance(bias, theirs["grad_conv_in_bias"]) < 2e-6


def test_optimiser_and_average_equal_the_originals(step, theirs):
    # AdamW's first step has the size lr for any gradient, so it divides a difference of 2e-7 by small gradients.
    assert distance(step["after"], theirs["after_step_conv_in_weight"]) < 2e-5
    assert distance(step["average"], theirs["after_step_ema_conv_in_weight"]) < 2e-5


def test_dropout_masks_equal_the_originals_on_both_sides_of_each_bound(theirs):
    text, image = conditioning_dropout(theirs["edge_drop"])
    assert torch.equal(text, theirs["edge_text_dropped"])
    assert torch.equal(image, theirs["edge_image_dropped"])


def test_average_warms_up():
    assert decay_at(1, 0.9999) == 2 / 11
    assert decay_at(100_000, 0.9999) == 0.9999
    assert decay_at(8, 0.998) == 0.5


def test_average_is_the_weighted_sum_of_what_it_saw():
    parameter = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    average = Average({"w": parameter}, 0.9999)
    expected = 1.0
    for n, value in enumerate([2.0, -1.0, 0.5], start=1):
        parameter.data.fill_(value)
        average.update(n)
        decay = (1 + n) / (10 + n)
        expected = decay * expected + (1 - decay) * value
    assert average.values["w"].dtype == torch.float32
    assert average.values["w"].item() == pytest.approx(expected, rel=1e-6)
    with average.applied():
        assert parameter.item() == pytest.approx(expected, rel=1e-2)
    assert parameter.item() == 0.5


def test_an_error_amid_an_edit_with_the_averages_leaves_the_run_its_own_weights(tiny_model):
    """A validation that fails, or is stopped, must not go on with averaged weights, nor in eval mode."""
    model = make_trainable(copy.deepcopy(tiny_model()), TrainConfig())
    parameters = trained_parameters(model.unet)
    average = Average(parameters, 0.9999)
    for parameter in parameters.values():
        parameter.data += 1
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with pytest.raises(ZeroDivisionError), average.applied(), usable(model):
        assert not model.unet.training
        assert torch.allclose(model.unet.conv_in.bias + 1, before["conv_in.bias"])
        raise ZeroDivisionError
    assert model.unet.training
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weights(prediction):
    alpha = torch.tensor([0.999, 0.8, 0.1]).view(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    snr = (alpha / sigma).flatten() ** 2
    weights = snr_weight(alpha, sigma, prediction, 5.0)
    below = snr < 5
    if prediction == "eps":
        assert torch.allclose(weights[below], torch.ones(int(below.sum())))
        assert torch.allclose(weights[~below], 5 / snr[~below])
    else:
        assert torch.allclose(weights, torch.minimum(snr, torch.tensor(5.0)) / (snr + 1))
    assert torch.equal(snr_weight(alpha, sigma, prediction, 0.0), torch.ones(3))


def test_noise_levels_of_the_ladder_are_its_steps(model):
    level = torch.tensor([0.0, 0.5, 1 - 1e-12], dtype=torch.float64)
    alpha, sigma, t = noise_levels(model, level)
    assert t.tolist() == [0, 500, 999]
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(3, 1, 1, 1))


def test_noise_levels_of_edm_have_unit_variance_and_its_own_time(tiny_model):
    model = tiny_model("cosxl")
    alpha, sigma, t = noise_levels(model, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    ratio = (sigma / alpha).flatten()
    assert torch.allclose(ratio[[0, 2]], torch.tensor([0.002, 120.0]), rtol=1e-4)
    assert torch.allclose(t, ratio.log() / 4, atol=1e-5)
    assert torch.allclose(t[1], model.timestep(float(ratio[1])), atol=1e-5)


class Copy(torch.nn.Module):
    """A UNet that returns what it is given to predict from: its first four input channels."""

    def forward(self, x, t, context, added_cond_kwargs=None):
        self.seen = x, t, context, added_cond_kwargs
        return type("Output", (), {"sample": x[:, :4]})


def draws(count, **values):
    shape = (count, 4, 8, 8)
    generator = torch.Generator().manual_seed(0)
    defaults = {
        "drop": torch.full((count,), 0.9),
        "level": torch.rand(count, generator=generator, dtype=torch.float64),
        "posterior": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "offset": torch.ones(count, 4, 1, 1),
        "scales": torch.zeros(count, 2),
    }
    return Draws(**{**defaults, **values})


def encoded(count, *, pooled=None):
    generator = torch.Generator().manual_seed(1)
    mean, condition = torch.randn(2, count, 4, 8, 8, generator=generator)
    text = TextEmbedding(tokens=torch.ones(count, 77, 24), pooled=pooled)
    return Encoded(
        mean=mean, std=torch.full_like(mean, 0.1), condition=condition, text=text, size_ids=torch.ones(count, 6)
    )


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_targets(tiny_model, prediction):
    """A network that returns alpha z + sigma n is wrong by exactly that minus the target."""
    model = tiny_model()
    model = replace(model, spec=replace(model.spec, prediction=prediction, latent_scale=0.5))
    null = TextEmbedding(tokens=torch.zeros(1, 77, 24))
    given, chance = encoded(3), draws(3)
    losses = Objective(model, null, TrainConfig(offset_noise=0.1))(Copy(), given, chance)
    alpha, sigma, _ = noise_levels(model, chance.level)
    z = 0.5 * (given.mean + 0.1 * chance.posterior)
    noise = chance.noise + 0.1
    target = noise if prediction == "eps" else alpha * noise - sigma * z
    assert torch.allclose(losses, (alpha * z + sigma * noise - target).square().mean((1, 2, 3)), rtol=1e-5)


def test_pooled_text_is_dropped_with_the_text(tiny_model):
    """SDXL's published training keeps the pooled text where it drops the tokens."""
    null = TextEmbedding(tokens=torch.zeros(1, 77, 24), pooled=torch.zeros(1, 24))
    given = encoded(4, pooled=torch.ones(4, 24))
    text, condition = dropped(given, null, torch.tensor([0.02, 0.07, 0.12, 0.5]), 0.05)
    for row, (has_text, has_image) in enumerate([(0, 1), (0, 0), (1, 0), (1, 1)]):
        assert (text.tokens[row] == has_text).all()
        assert (text.pooled[row] == has_text).all()
        assert torch.equal(condition[row], given.condition[row] * has_image)


def test_a_text_of_two_chunks_is_dropped_for_the_empty_one_twice(tiny_model):
    null = TextEmbedding(tokens=torch.rand(1, 77, 24))
    given = replace(encoded(2), text=TextEmbedding(tokens=torch.rand(2, 154, 24)))
    text, _ = dropped(given, null, torch.tensor([0.02, 0.5]), 0.05)
    assert torch.equal(text.tokens[0], null.tokens[0].repeat(2, 1))
    assert torch.equal(text.tokens[1], given.text.tokens[1])
    short, _ = dropped(encoded(2), TextEmbedding(tokens=torch.rand(1, 154, 24)), torch.tensor([0.5, 0.5]), 0.05)
    assert torch.equal(short.tokens, encoded(2).text.tokens.repeat(1, 2, 1))


def test_size_ids_and_pooled_text_reach_the_network(tiny_model):
    unet, model = Copy(), tiny_model("sdxl")
    null = TextEmbedding(tokens=torch.zeros(1, 77, 24), pooled=torch.zeros(1, 24))
    Objective(model, null, TrainConfig())(unet, encoded(3, pooled=torch.ones(3, 24)), draws(3))
    added = unet.seen[3]
    assert added["time_ids"].shape == (3, 6)
    assert added["text_embeds"].shape == (3, 24)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "cosxl"])
def test_widening_changes_no_output_and_keeps_the_bias(tiny_model, family):
    model = tiny_model(family)
    wide = widened(model)
    assert torch.equal(wide.unet.conv_in.bias, model.unet.conv_in.bias)
    assert torch.equal(wide.unet.conv_in.weight[:, :4], model.unet.conv_in.weight)
    assert (wide.unet.conv_in.weight[:, 4:] == 0).all()
    assert wide.spec.in_channels == 8
    assert wide.spec.scaled_condition == (family == "cosxl")
    x, picture = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    double = family in ("sdxl", "cosxl")
    context = torch.ones(1, 77, 16 if double else 8)
    added = {"text_embeds": torch.ones(1, 8), "time_ids": torch.ones(1, 6)} if double else None
    before = model.unet(x, 500, context, added_cond_kwargs=added).sample
    after = wide.unet(torch.cat([x, 100 * picture], dim=1), 500, context, added_cond_kwargs=added).sample
    assert torch.allclose(before, after, atol=1e-5)


def test_learning_rate_warms_up_and_falls():
    config = TrainConfig(steps=100, warm_up=10, learning_rate=1.0)
    assert learning_rate(config, 0) == 0.1
    assert learning_rate(config, 9) == learning_rate(config, 99) == 1.0
    cosine = replace(config, schedule="cosine", warm_up=0)
    assert [learning_rate(cosine, n) for n in (0, 50)] == pytest.approx([1.0, 0.5])
    assert learning_rate(cosine, 99) == pytest.approx(0.5 * (1 + math.cos(0.99 * math.pi)))
