"""Schedules against the original's numbers, against slow loops, and at their ends."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ip2p_engine.diffusion.schedule import (
    SCHEDULES,
    DiscreteSchedule,
    exponential_sigmas,
    karras_sigmas,
    make_sigmas,
    model_sigmas,
)
from ip2p_engine.errors import ConfigError

REFERENCE = load_file(Path(__file__).parent.parent / "data" / "reference" / "schedule.safetensors")
SCHEDULE = DiscreteSchedule.stable_diffusion()
STEPS = (1, 2, 3, 10, 20, 100)


def assert_original(sigmas: torch.Tensor, expected: torch.Tensor) -> None:
    """The original is float32 throughout, which costs it 1.3e-5 of its smallest sigma; ours is float64."""
    assert sigmas.shape == expected.shape
    torch.testing.assert_close(sigmas, expected.double(), atol=0, rtol=2e-5)
    torch.testing.assert_close(sigmas, expected.double(), atol=5e-6, rtol=0)


def test_the_ladder_is_the_originals():
    assert_original(SCHEDULE.sigmas, REFERENCE["all_sigmas"])
    assert (SCHEDULE.steps, SCHEDULE.sigma_min, SCHEDULE.sigma_max) == (1000, SCHEDULE.sigmas[0], SCHEDULE.sigmas[-1])


@pytest.mark.parametrize("steps", [5, 10, 20, 50, 100])
def test_the_walk_is_the_originals(steps):
    sigmas = model_sigmas(SCHEDULE, steps)
    assert_original(sigmas, REFERENCE[f"sigmas_{steps}"])
    t = REFERENCE[f"t_{steps}"].double()
    torch.testing.assert_close(SCHEDULE.sigma_to_t(sigmas[:-1]), t, atol=2e-4, rtol=0)
    torch.testing.assert_close(SCHEDULE.t_to_sigma(t), sigmas[:-1], atol=5e-6, rtol=0)


def test_twenty_steps_fall_between_the_trained_ones():
    t = SCHEDULE.sigma_to_t(model_sigmas(SCHEDULE, 20)[:-1])
    torch.testing.assert_close(t, torch.linspace(999, 0, 20, dtype=torch.float64), atol=1e-9, rtol=0)
    assert ((t - t.round()).abs() > 0.01).sum() == 18


def test_sigma_is_the_noise_to_signal_ratio_of_the_betas():
    signal = 1.0
    for t, root in enumerate(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).tolist()):
        signal *= 1 - root * root
        assert float(SCHEDULE.sigmas[t]) == pytest.approx(math.sqrt((1 - signal) / signal), rel=1e-10)


def test_t_and_sigma_are_inverse():
    t = torch.linspace(0, 999, 4321, dtype=torch.float64)
    sigma = SCHEDULE.t_to_sigma(t)
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(SCHEDULE.sigma_to_t(sigma), t, atol=1e-9, rtol=0)
    torch.testing.assert_close(SCHEDULE.t_to_sigma(SCHEDULE.sigma_to_t(sigma)), sigma, atol=0, rtol=1e-12)


@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_whole_t_are_the_ladder_itself(t):
    assert float(SCHEDULE.t_to_sigma(torch.tensor(t))) == pytest.approx(float(SCHEDULE.sigmas[t]), rel=1e-14)
    assert float(SCHEDULE.sigma_to_t(SCHEDULE.sigmas[t])) == pytest.approx(t, abs=1e-9)


def test_between_two_steps_sigma_is_the_geometric_mean():
    low, high = SCHEDULE.sigmas[[700, 701]].tolist()
    assert float(SCHEDULE.t_to_sigma(torch.tensor(700.5))) == pytest.approx(math.sqrt(low * high), rel=1e-12)
    assert float(SCHEDULE.t_to_sigma(torch.tensor(0.25))) == pytest.approx(
        float(SCHEDULE.sigmas[0]) ** 0.75 * float(SCHEDULE.sigmas[1]) ** 0.25, rel=1e-12
    )


@pytest.mark.parametrize(("sigma", "t"), [(0.0, 0), (1e-9, 0), (0.029, 0), (14.7, 999), (1e9, 999)])
def test_sigmas_off_the_ladder_are_clamped(sigma, t):
    assert SCHEDULE.sigma_to_t(torch.tensor([sigma])).tolist() == [t]


@pytest.mark.parametrize(("t", "clamped"), [(-1.0, 0), (999.5, 999), (5000.0, 999)])
def test_t_off_the_ladder_is_clamped(t, clamped):
    assert SCHEDULE.t_to_sigma(torch.tensor(t)) == SCHEDULE.t_to_sigma(torch.tensor(clamped))


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_shapes_are_kept(shape):
    sigma = torch.full(shape, 3.0)
    assert SCHEDULE.sigma_to_t(sigma).shape == SCHEDULE.t_to_sigma(sigma).shape == shape


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_the_top_falls_and_ends_at_zero(name, steps):
    sigmas = make_sigmas(name, SCHEDULE, steps)
    assert (sigmas.shape, sigmas.dtype) == ((steps + 1,), torch.float64)
    assert float(sigmas[0]) == pytest.approx(SCHEDULE.sigma_max, rel=1e-14)
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    if steps > 1 and name != "trailing":
        assert float(sigmas[-2]) == pytest.approx(SCHEDULE.sigma_min, rel=1e-14)


def test_trailing_steps_are_equal_parts_of_the_ladder():
    found = SCHEDULE.sigma_to_t(make_sigmas("trailing", SCHEDULE, 4)[:-1])
    assert found.tolist() == pytest.approx([999, 749, 499, 249], abs=1e-6)
    assert float(make_sigmas("trailing", SCHEDULE, 1)[0]) == pytest.approx(SCHEDULE.sigma_max)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", STEPS)
def test_karras_is_equation_5(steps, rho):
    low, high = 0.002, 80.0
    expected = []
    for i in range(steps):
        part = i / max(steps - 1, 1)
        expected.append((high ** (1 / rho) + part * (low ** (1 / rho) - high ** (1 / rho))) ** rho)
    sigmas = karras_sigmas(low, high, steps, rho)
    assert sigmas.tolist() == pytest.approx([*expected, 0.0], rel=1e-11)
    assert float(sigmas[0]) == pytest.approx(high, rel=1e-14)
    assert float(karras_sigmas(low, high, 2, rho)[1]) == pytest.approx(low, rel=1e-11)


def test_karras_uses_rho_7_unless_told():
    assert torch.equal(karras_sigmas(0.1, 10, 9), karras_sigmas(0.1, 10, 9, rho=7))
    assert torch.equal(make_sigmas("karras", SCHEDULE, 9), karras_sigmas(SCHEDULE.sigma_min, SCHEDULE.sigma_max, 9))


@pytest.mark.parametrize("steps", STEPS)
def test_exponential_steps_have_one_ratio(steps):
    low, high = 0.002, 80.0
    expected = [high * (low / high) ** (i / max(steps - 1, 1)) for i in range(steps)]
    assert exponential_sigmas(low, high, steps).tolist() == pytest.approx([*expected, 0.0], rel=1e-12)


def test_the_three_schedules_differ():
    walks = [make_sigmas(name, SCHEDULE, 10) for name in SCHEDULES]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(walks) for b in walks[:i])


@pytest.mark.parametrize("steps", [0, -1, 1.0, 2.5, float("nan"), True, "10", None])
@pytest.mark.parametrize("name", SCHEDULES)
def test_bad_steps(name, steps):
    with pytest.raises(ConfigError, match="steps is .*at least 1"):
        make_sigmas(name, SCHEDULE, steps)


@pytest.mark.parametrize("name", ["", "Karras", "cosine", None])
def test_unknown_names_list_the_choices(name):
    with pytest.raises(ConfigError, match="choose one of model, karras, exponential"):
        make_sigmas(name, SCHEDULE, 10)


@pytest.mark.parametrize("t", [0, 3, 250, 600, 999])
def test_alpha_and_sigma_are_a_rotation(t):
    alpha, sigma = SCHEDULE.alpha_sigma(torch.tensor([t, t]))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == torch.float32
    assert float(alpha[0] ** 2 + sigma[0] ** 2) == pytest.approx(1, abs=1e-6)
    assert float(sigma[0] / alpha[0]) == pytest.approx(float(SCHEDULE.sigmas[t]), rel=1e-6)


ZERO = DiscreteSchedule.stable_diffusion(zero_snr=True)


def test_a_ladder_to_pure_noise_is_diffusers():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    theirs = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    torch.testing.assert_close(ZERO.alphas_cumprod, theirs, atol=1e-12, rtol=0)
    assert ZERO.alphas_cumprod[-1] == 0 and ZERO.alphas_cumprod[0] == pytest.approx(1 - 0.00085)
    assert ZERO.alpha_sigma(torch.tensor([999])) == (torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    assert ZERO.sigmas.isfinite().all() and ZERO.sigma_max == pytest.approx(4518.77, rel=1e-5)
    assert not SCHEDULE.zero_snr and torch.equal(SCHEDULE.sigmas, DiscreteSchedule.stable_diffusion().sigmas)


@pytest.mark.parametrize("steps", [1, 10, 20, 1000])
def test_walks_from_pure_noise_are_spaced_as_diffusers(steps):
    from diffusers import EulerAncestralDiscreteScheduler

    named = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    how = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    theirs = EulerAncestralDiscreteScheduler(**named, **how)
    theirs.set_timesteps(steps)
    ours = model_sigmas(ZERO, steps)
    torch.testing.assert_close(ZERO.sigma_to_t(ours[:-1]), theirs.timesteps.double(), atol=2e-3, rtol=0)
    torch.testing.assert_close(ours[1:-1], theirs.sigmas[1:-1].double(), atol=0, rtol=1e-3)
    assert ours[0] == pytest.approx(ZERO.sigma_max) and ours[-1] == 0
