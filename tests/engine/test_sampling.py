"""Samplers against closed forms: Gaussian data has a known denoiser, a known flow and a known end."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from ip2p_engine.diffusion.noise import SampleNoise
from ip2p_engine.diffusion.sampling import SAMPLERS, ancestral_split, named, sample
from ip2p_engine.diffusion.schedule import DiscreteSchedule, karras_sigmas, model_sigmas
from ip2p_engine.errors import ConfigError, Interrupted
from ip2p_engine.hooks import Hooks

SPREAD = 0.5
DETERMINISTIC = ("euler", "heun", "dpmpp_2m", "ddim")
STOCHASTIC = ("euler_ancestral", "dpmpp_2m_sde")


def gaussian_denoiser(x, sigma, cond):
    """The exact denoiser of data N(0, SPREAD^2)."""
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


def flow_end(x, sigma):
    """Where the probability-flow ODE carries x from sigma to 0."""
    return x * SPREAD / math.sqrt(SPREAD**2 + sigma**2)


def start(sigma, shape=(2, 4, 8, 8), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sigma


def error_at(name, steps):
    sigmas = karras_sigmas(1e-4, 10.0, steps)  # so small that the last jump to 0 adds nothing
    x = start(10.0)
    return (sample(name, gaussian_denoiser, x, sigmas) - flow_end(x, 10.0)).abs().max().item()


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_error_falls_with_the_order_of_the_method(name, order):
    ratio = error_at(name, 60) / error_at(name, 120)
    assert ratio == pytest.approx(2**order, rel=0.3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_lands_on_the_denoised(name):
    x = start(14.6)
    end = sample(name, gaussian_denoiser, x, torch.tensor([14.6, 0.0]))
    torch.testing.assert_close(end, gaussian_denoiser(x, 14.6, None))


def test_a_consistency_step_noises_the_clean_picture_anew():
    x, noise = start(14.6), start(1.0, seed=5)
    seen = []

    def denoiser(x, sigma, cond):
        seen.append((sigma, x))
        return gaussian_denoiser(x, sigma, cond)

    end = sample("lcm", denoiser, x, torch.tensor([14.6, 2.0, 0.0]), noise=lambda like: noise)
    torch.testing.assert_close(seen[1][1], gaussian_denoiser(x, 14.6, None) + 2.0 * noise)
    torch.testing.assert_close(end, gaussian_denoiser(seen[1][1], 2.0, None))


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_the_denoiser_as_often_as_promised(name, steps):
    calls = []

    def counting(x, sigma, cond):
        calls.append(sigma)
        return gaussian_denoiser(x, sigma, cond)

    noise = SampleNoise([1, 2]).draw
    end = sample(name, counting, start(14.6), model_sigmas(DiscreteSchedule.stable_diffusion(), steps), noise=noise)
    assert len(calls) == (2 * steps - 1 if name == "heun" else steps)
    assert end.isfinite().all()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_end_with_the_spread_of_the_data(name):
    seeds = range(64)
    sigmas = karras_sigmas(0.01, 20.0, 200)
    x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1000 + s)) for s in seeds]) * 20
    end = sample(name, gaussian_denoiser, x, sigmas, noise=SampleNoise(list(seeds)).draw)
    assert end.std().item() == pytest.approx(SPREAD, rel=0.03)  # 16,384 values: 5 standard errors
    assert abs(end.mean().item()) < 0.02


def test_ddim_equals_its_own_equation_in_the_variance_preserving_scale():
    schedule = DiscreteSchedule.stable_diffusion()
    timesteps = [900, 500, 100]
    a = [float(schedule.alphas_cumprod[t]) for t in timesteps]
    sigmas = torch.tensor([math.sqrt((1 - v) / v) for v in a] + [0.0], dtype=torch.float64)
    x = start(float(sigmas[0]))
    z = x * math.sqrt(a[0])
    for now, later in zip(a, [*a[1:], 1.0], strict=True):
        sigma = math.sqrt((1 - now) / now)
        clean = gaussian_denoiser(z / math.sqrt(now), sigma, None)
        eps = (z - math.sqrt(now) * clean) / math.sqrt(1 - now)
        z = math.sqrt(later) * clean + math.sqrt(1 - later) * eps
    torch.testing.assert_close(sample("ddim", gaussian_denoiser, x, sigmas), z)


@pytest.mark.parametrize(("name", "algorithm"), [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")])
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_dpm_solvers_equal_diffusers(name, algorithm, steps):
    """In the variance-preserling scale, on uneven steps, with the same noise."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    kind = {"algorithm_type": algorithm, "solver_type": "midpoint", "prediction_type": "sample"}
    theirs = DPMSolverMultistepScheduler(**betas, **kind, timestep_spacing="linspace", lower_order_final=False)
    theirs.set_timesteps(steps)
    sigmas = theirs.sigmas.double()
    x, draws = start(float(sigmas[0])), [start(1.0, seed=n) for n in range(1, steps)]

    def scale(n):
        return 1 / math.sqrt(1 + float(sigmas[n]) ** 2)

    z = x * scale(0)
    for n, t in enumerate(theirs.timesteps):
        clean = gaussian_denoiser(z / scale(n), float(sigmas[n]), None)
        noise = draws[n] if n < steps - 1 else torch.zeros_like(x)
        z = theirs.step(clean, t, z, variance_noise=noise).prev_sample
    left = iter(draws)
    ours = sample(name, gaussian_denoiser, x, sigmas, noise=lambda _: next(left))
    torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("sigma", "next_sigma"), [(14.6, 10.0), (1.0, 0.999), (0.5, 0.03)])
def test_ancestral_split_keeps_the_variance(sigma, next_sigma):
    down, up = ancestral_split(sigma, next_sigma)
    assert down**2 + up**2 == pytest.approx(next_sigma**2)
    assert 0 < up <= next_sigma
    assert ancestral_split(sigma, next_sigma, eta=0) == (next_sigma, 0.0)
    assert ancestral_split(sigma, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_depends_on_its_own_seed_alone(name):
    sigmas = karras_sigmas(0.05, 10.0, 7)

    def run(seeds):
        noise = SampleNoise(seeds)
        x = noise.draw(torch.empty(len(seeds), 4, 8, 8)) * 10
        return sample(name, gaussian_denoiser, x, sigmas, noise=noise.draw)

    together, backwards = run([5, 6, 7]), run([7, 6, 5])
    for row, seed in enumerate([5, 6, 7]):
        assert torch.equal(together[row], run([seed])[0])
        assert torch.equal(together[row], backwards[2 - row])
    assert not torch.equal(together[0], together[1])


def test_noise_is_the_stream_of_the_papers_code():
    noise = SampleNoise([1371])
    like = torch.empty(1, 4, 16, 16)
    drawn = [noise.draw(like), noise.draw(like)]
    torch.manual_seed(1371)
    assert torch.equal(drawn[0], torch.randn(1, 4, 16, 16))
    assert torch.equal(drawn[1], torch.randn(1, 4, 16, 16))


def test_every_step_is_reported_and_a_stop_is_obeyed_at_once():
    seen, sigmas = [], karras_sigmas(0.05, 10.0, 5)
    x = start(10.0)
    sample("euler", gaussian_denoiser, x, sigmas, hooks=Hooks(on_step=lambda i, n, x, s, d: seen.append((i, n, s))))
    assert [row[:2] for row in seen] == [(i, 5) for i in range(5)]
    assert [row[2] for row in seen] == pytest.approx(sigmas[:-1].tolist())
    seen.clear()
    with pytest.raises(Interrupted, match="step 3 of 5"):
        hooks = Hooks(on_step=lambda i, n, x, s, d: seen.append(i), should_stop=lambda: len(seen) == 2)
        sample("euler", gaussian_denoiser, x, sigmas, hooks=hooks)
    assert seen == [0, 1]


def test_refusals_name_the_choices():
    with pytest.raises(ConfigError, match="'plms' is unknown; choose one of euler_ancestral"):
        sample("plms", gaussian_denoiser, start(1.0), torch.tensor([1.0, 0.0]))
    with pytest.raises(ConfigError, match="give a function of a Step"):
        sample(7, gaussian_denoiser, start(1.0), torch.tensor([1.0, 0.0]))
    with pytest.raises(ConfigError, match="draws noise"):
        sample("euler_ancestral", gaussian_denoiser, start(1.0), torch.tensor([1.0, 0.5, 0.0]))
    for seed in (-1, 2**63, 1.5, True):
        with pytest.raises(ConfigError, match="whole number"):
            SampleNoise([seed])


def test_a_sampler_of_one_s_own_is_a_function_of_a_step():
    def mine(step):
        return step.x + step.slope * (step.next_sigma - step.sigma)

    sigmas, x = karras_sigmas(0.05, 10.0, 5), start(10.0)
    assert torch.equal(sample(mine, gaussian_denoiser, x, sigmas), sample("euler", gaussian_denoiser, x, sigmas))
    assert named(mine).endswith(":test_a_sampler_of_one_s_own_is_a_function_of_a_step.<locals>.mine")
    assert named("euler") == "euler" and named(SAMPLERS["heun"]) == "ip2p_engine.diffusion.sampling:heun"
