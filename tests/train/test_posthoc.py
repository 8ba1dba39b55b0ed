"""Averages of any length after a run: the profiles, their combination, and what a run keeps for them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ip2p_engine import cli
from ip2p_engine.errors import CheckpointError, ConfigError
from ip2p_engine.hooks import Hooks
from ip2p_engine.networks.model import load_model
from ip2p_engine.train.checkpoints import latest, load_checkpoint
from ip2p_engine.train.optimizers import PowerAverage, power_exponent
from ip2p_engine.train.posthoc import model_of_length
from ip2p_engine.train.snapshots import coefficients, combine, snapshots, write_snapshot


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_the_papers(sigma_rel, gamma):
    """And of width sigma_rel: the deviation of tau over t under the density (gamma + 1) tau^gamma."""
    found = power_exponent(sigma_rel)
    assert found == pytest.approx(gamma, abs=0.01)
    mean, square = (found + 1) / (found + 2), (found + 1) / (found + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)
    for wrong in (0.0, 0.29):
        with pytest.raises(ConfigError, match="sigma_rel is"):
            power_exponent(wrong)


def walk(steps, seed=0):
    """A parameter's values after each step."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 5, generator=generator).cumsum(0) / steps**0.5


def followed(values, sigma_rel):
    """The running average after each step."""
    parameter = torch.nn.Parameter(torch.full((5,), 9.0))
    average, found = PowerAverage({"w": parameter}, sigma_rel), []
    for step, value in enumerate(values, start=1):
        parameter.data.copy_(value)
        average.update(step)
        found.append(average.values["w"].clone())
    return found


def test_the_running_average_has_the_profile_of_a_power():
    """The share of step n is the integral of the profile over (n - 1, n]; where the parameter began counts nothing."""
    values, exponent = walk(200), power_exponent(0.1)
    edges = torch.linspace(0, 1, 201, dtype=torch.float64) ** (exponent + 1)
    wanted = (edges.diff()[:, None] * values).sum(0)
    assert torch.allclose(followed(values, 0.1)[-1].double(), wanted, atol=1e-5)


@pytest.mark.parametrize("steps", [(25, 50, 75, 100), (50, 100)])
@pytest.mark.parametrize("sigma_rel", [0.02, 0.07, 0.25])
def test_coefficients_are_the_least_squares_of_the_profiles_that_sum_to_one(steps, sigma_rel):
    """By a fine grid, in plain numpy, the last one being what the others leave."""
    kept = [(step, one) for step in steps for one in (0.05, 0.1)]
    tau = (np.arange(200_000) + 0.5) / 2000

    def profile(step, sigma_rel):
        exponent = power_exponent(sigma_rel)
        return np.where(tau <= step, (exponent + 1) / step * (tau / step) ** exponent, 0)

    matrix = np.stack([profile(*one) for one in kept], axis=1)
    free, rest, last = matrix[:, :-1] - matrix[:, -1:], profile(100, sigma_rel) - matrix[:, -1], matrix[:, -1]
    wanted = free @ np.linalg.lstsq(free, rest, rcond=None)[0] + last
    found = coefficients(kept, (100, sigma_rel))
    assert sum(found) == pytest.approx(1, abs=1e-9)
    assert np.allclose(matrix @ found, wanted, atol=1e-4 * profile(100, sigma_rel).max())
    assert coefficients(kept, (100, 0.05)) == pytest.approx([0] * (len(kept) - 2) + [1, 0], abs=1e-6)


def test_another_length_is_what_following_it_would_have_given(tmp_path):
    values = walk(400)
    kept = {one: followed(values, one) for one in (0.05, 0.1)}
    for step in range(20, 401, 20):
        write_snapshot(tmp_path / "averages", step, {one: {"w": found[step - 1]} for one, found in kept.items()})
    found = snapshots(tmp_path)
    for sigma_rel in (0.05, 0.07, 0.15):
        wanted = followed(values, sigma_rel)
        assert torch.allclose(combine(found, sigma_rel)["w"], wanted[-1], atol=4e-3), sigma_rel
        assert torch.allclose(combine(found, sigma_rel, 200)["w"], wanted[199], atol=4e-3), sigma_rel
    assert (followed(values, 0.07)[-1] - kept[0.1][-1]).abs().max() > 2e-2
    with pytest.raises(ConfigError, match="no average after step 30; choose among 20, 40"):
        combine(found, 0.07, 30)
    (tmp_path / "averages" / "step-00000400.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="step-00000400.safetensors is damaged"):
        snapshots(tmp_path)
    with pytest.raises(CheckpointError, match="kept no averages to combine"):
        snapshots(tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}])
def test_a_run_keeps_averages_and_a_command_makes_others(run, store, tmp_path, capsys, more):
    settings = {"steps": 4, "posthoc_every": 2, "save_every": 3, "learning_rate": 1e-2, "validation_pairs": 2, **more}
    run("whole", **settings)
    done = [0]
    stop = Hooks(on_result=lambda step, _: done.append(step), should_stop=lambda: done[-1] >= 2)
    run("pieces", **settings, hooks=stop)
    run("pieces", **settings)
    for name in ("step-00000002.safetensors", "step-00000004.safetensors"):
        one, other = (load_file(tmp_path / folder / "averages" / name) for folder in ("whole", "pieces"))
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    out, curve = tmp_path / "out.safetensors", tmp_path / "curve.png"
    words = ["average", str(tmp_path / "whole"), "--sigma-rel"]
    assert cli.main([*words, "0.1", "--out", str(out)]) == 0
    model = load_model(out, device="cpu", dtype="file")
    kept = load_checkpoint(latest(tmp_path / "whole" / "checkpoints"))["lengths"][1]
    same = model_of_length(tmp_path / "whole", 0.1).unet.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.unet.state_dict().items())
    if not more:
        assert all(torch.allclose(same[name], value, atol=2e-3) for name, value in kept.items())
    capsys.readouterr()
    assert cli.main([*words, "0.05", "0.1", "0.2", "--curve", str(curve), "--data", str(store), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["sigma_rel"] for one in found] == [0.05, 0.1, 0.2] and all(one["loss"] > 0 for one in found)
    assert curve.stat().st_size > 1000
    assert cli.main(["average", str(tmp_path / "whole")]) == 2
    assert "give --out a file, or --curve a picture" in capsys.readouterr().err
