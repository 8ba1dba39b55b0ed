"""Dual guidance against equation 3 in float64, its exact elisions, and the bands of conditioning dropout."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ip2p_engine.diffusion.guidance import (
    BRANCHES,
    DualGuidance,
    ProjectedGuidance,
    check_scale,
    conditioning_dropout,
    dual_guidance,
    guidance_of,
    needed_branches,
    rescaled,
    within,
)
from ip2p_engine.errors import ConfigError

REFERENCE = load_file(Path(__file__).parent.parent / "data" / "reference" / "schedule.safetensors")
GRID = list(itertools.product([0, 0.3, 0.999999, 1, 1.0000001, 1.5, 2, 7.5, 30, 1000], repeat=2))
RANDOM = random.Random(2023)
SCALES = GRID + [(RANDOM.uniform(0, 3), RANDOM.uniform(0, 3)) for _ in range(60)]
SCALES += [(RANDOM.uniform(0, 20), RANDOM.uniform(0, 20)) for _ in range(60)]


def random_branches(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 4, 8, 8, generator=generator, dtype=dtype) for name in BRANCHES}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_only_the_needed_branches_give_equation_3(dtype, tolerance):
    for seed, (text_cfg, image_cfg) in enumerate(SCALES):
        branches = random_branches(dtype, seed)
        c, i, u = (branches[name].double() for name in BRANCHES)
        expected = u + image_cfg * (i - u) + text_cfg * (c - i)
        needed = needed_branches(text_cfg, image_cfg)
        guided = dual_guidance({name: branches[name] for name in needed}, text_cfg, image_cfg)
        size = max(1.0, text_cfg, image_cfg)
        assert guided.dtype == dtype
        # |branch| < 6, and every scale multiplies a difference of two.
        assert (guided.double() - expected).abs().max() <= tolerance * size * 6, (text_cfg, image_cfg)


def test_the_paper_s_defaults_by_hand():
    branches = {"c": torch.tensor([4.0]), "i": torch.tensor([2.0]), "u": torch.tensor([1.0])}
    assert dual_guidance(branches, 7.5, 1.5).tolist() == [1 + 1.5 * 1 + 7.5 * 2]
    assert dual_guidance(branches, 7.5, 0.5).tolist() == [1 + 0.5 * 1 + 7.5 * 2]
    assert dual_guidance(branches, 0.5, 1.5).tolist() == [1 + 1.5 * 1 + 0.5 * 2]


@pytest.mark.parametrize(
    ("text_cfg", "image_cfg", "needed"),
    [
        (7.5, 1.5, "ciu"),
        (7.5, 0.5, "ciu"),
        (0.5, 0.7, "ciu"),
        (1, 0, "ciu"),
        (7.5, 0, "ciu"),
        (1, 1.5, "ciu"),
        (1.0000001, 1, "ci"),
        (7.5, 1, "ci"),
        (0.5, 1.0, "ci"),
        (4, 4, "cu"),
        (0.5, 0.5, "cu"),
        (0, 1.5, "iu"),
        (0, 0.5, "iu"),
        (1, 1, "c"),
        (0, 1, "i"),
        (0, 0, "u"),
    ],
)
def test_number_of_branches(text_cfg, image_cfg, needed):
    assert needed_branches(text_cfg, image_cfg) == tuple(needed)
    assert needed_branches(float(text_cfg), float(image_cfg)) == tuple(needed)


@pytest.mark.parametrize(("text_cfg", "image_cfg"), GRID)
def test_every_needed_branch_is_used_and_no_other(text_cfg, image_cfg):
    """The derivative by a branch is its weight in equation 3; an elided branch may hold NaN."""
    weights = {"c": text_cfg, "i": image_cfg - text_cfg, "u": 1 - image_cfg}
    needed = needed_branches(text_cfg, image_cfg)
    branches = {name: torch.full((1,), 1.0 if name in needed else math.nan, dtype=torch.float64) for name in BRANCHES}
    for branch in branches.values():
        branch.requires_grad_()
    guided = dual_guidance(branches, text_cfg, image_cfg)
    guided.backward()
    for name, branch in branches.items():
        assert (branch.grad is not None) == (name in needed) == (weights[name] != 0)
        assert branch.grad is None or float(branch.grad) == pytest.approx(weights[name], abs=1e-12)


@pytest.mark.parametrize(("text_cfg", "image_cfg", "only"), [(1, 1, "c"), (0, 1, "i"), (0, 0, "u")])
def test_one_branch_comes_through_bit_for_bit(text_cfg, image_cfg, only):
    branches = random_branches(torch.float32)
    assert torch.equal(dual_guidance({only: branches[only]}, text_cfg, image_cfg), branches[only])


@pytest.mark.parametrize(("text_cfg", "image_cfg"), [(7.5, 1.5), (7.5, 1), (4, 4), (0, 1.5), (1, 1)])
def test_inputs_stay_as_they_were(text_cfg, image_cfg):
    branches = random_branches(torch.float32)
    before = {name: branch.clone() for name, branch in branches.items()}
    dual_guidance(branches, text_cfg, image_cfg)
    assert all(torch.equal(branches[name], before[name]) for name in BRANCHES)


def test_a_missing_branch_is_an_error_not_a_guess():
    branches = random_branches(torch.float32)
    for name in BRANCHES:
        with pytest.raises(KeyError, match=name):
            dual_guidance({other: branch for other, branch in branches.items() if other != name}, 7.5, 1.5)


def test_dropout_bands_on_a_grid():
    r = (torch.arange(2000) + 0.5) / 2000
    text, image = conditioning_dropout(r)
    both, only_text, only_image = text & image, text & ~image, image & ~text
    assert [int(band.sum()) for band in (only_text, both, only_image, ~text & ~image)] == [100, 100, 100, 1700]
    assert only_text.nonzero().max() < both.nonzero().min() < both.nonzero().max() < only_image.nonzero().min()
    assert text.dtype == image.dtype == torch.bool and text.shape == image.shape == (2000,)


def test_dropout_at_the_edges_is_the_originals():
    r = REFERENCE["edge_drop"]
    assert (r.dtype, len(r)) == (torch.float32, 11)
    text, image = conditioning_dropout(r)
    assert torch.equal(text, REFERENCE["edge_text_dropped"])
    assert torch.equal(image, REFERENCE["edge_image_dropped"])


@pytest.mark.parametrize(
    ("edge", "below", "at"),
    [(0.05, (True, False), (True, True)), (0.10, (True, True), (False, True)), (0.15, (False, True), (False, False))],
)
def test_dropout_beside_each_edge(edge, below, at):
    middle = torch.tensor([edge], dtype=torch.float32)
    for r, expected in [(middle.nextafter(torch.zeros(1)), below), (middle, at), (middle.nextafter(torch.ones(1)), at)]:
        assert tuple(bool(band) for band in conditioning_dropout(r)) == expected


@pytest.mark.parametrize(
    ("probability", "expected"), [(0.0, (0, 0, 0)), (0.1, (100, 100, 100)), (0.25, (250, 250, 250))]
)
def test_dropout_probability(probability, expected):
    text, image = conditioning_dropout((torch.arange(1000) + 0.5) / 1000, probability)
    assert (int((text & ~image).sum()), int((text & image).sum()), int((image & ~text).sum())) == expected


@pytest.mark.parametrize("value", [0, 0.0, 1, 0.5, 7.5, 1e6])
def test_scales_that_pass(value):
    checked = check_scale("text_cfg", value)
    assert checked == value and type(checked) is float


@pytest.mark.parametrize("value", [-1e-9, -1, math.nan, math.inf, -math.inf, "7.5", None, True, [1.5], 1j])
def test_scales_that_do_not(value):
    with pytest.raises(ConfigError, match="text_cfg is .*finite number of at least 0"):
        check_scale("text_cfg", value)


class Given:
    """Branches that are there, and what was asked of them."""

    def __init__(self, seed=0):
        self.values, self.asked = random_branches(torch.float64, seed), []

    def __call__(self, x, sigma, cond, names):
        self.asked.append("".join(names))
        return {name: self.values[name] for name in names}


@pytest.mark.parametrize(("sigma", "acts"), [(4.999, False), (5.0, True), (7.0, True), (10.0, True), (10.001, False)])
def test_guidance_acts_within_its_interval_alone(sigma, acts):
    branches = Given()
    guided = guidance_of(7.5, 1.5, interval=(5.0, 10.0))(branches)(torch.zeros(1), sigma, None)
    expected = dual_guidance(branches.values, 7.5, 1.5) if acts else branches.values["c"]
    assert torch.equal(guided, expected) and branches.asked == ["ciu" if acts else "c"]


def test_a_scale_may_follow_the_noise_level():
    branches = Given()
    denoiser = DualGuidance(branches, lambda sigma: sigma, 1.0)
    for sigma in (0.0, 1.0, 3.0):
        assert torch.equal(denoiser(torch.zeros(1), sigma, None), dual_guidance(branches.values, sigma, 1.0))
    assert branches.asked == ["i", "c", "ci"]
    with pytest.raises(ConfigError, match="text_cfg is -1"):
        denoiser(torch.zeros(1), -1.0, None)
    for low, high in ((5, 5), (6, 5), (-1, 5)):
        with pytest.raises(ConfigError, match="the lower first"):
            within(2.0, low, high)


@pytest.mark.parametrize(
    ("text_cfg", "image_cfg", "asked"), [(7.5, 1.5, "ciu"), (7.5, 1, "ci"), (1, 1.5, "ciu"), (1, 1, "c")]
)
def test_projected_guidance(text_cfg, image_cfg, asked):
    """All of the parallel part is equation 3; none of it leaves every difference at right angles to c."""
    branches = Given(1)
    whole = ProjectedGuidance(branches, text_cfg, image_cfg, parallel=1.0)(torch.zeros(1), 1.0, None)
    assert (whole - dual_guidance(branches.values, text_cfg, image_cfg)).abs().max() < 1e-12
    guided = ProjectedGuidance(branches, text_cfg, image_cfg)(torch.zeros(1), 1.0, None)
    c = branches.values["c"]
    assert ((guided - c) * c).sum((1, 2, 3)).abs().max() < 1e-10
    assert branches.asked == [asked] * 2
    short = ProjectedGuidance(branches, text_cfg, 1.0, parallel=1.0, norm=2.0)(torch.zeros(1), 1.0, None)
    assert (short - c).flatten(1).norm(dim=1).tolist() == pytest.approx([abs(text_cfg - 1) * 2.0] * 2)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescaled_guidance_has_the_spread_of_c(share):
    branches = Given(2)
    inner = lambda given: DualGuidance(given, 7.5, 1.5)  # noqa: E731
    guided, plain = (
        rescaled(inner, share)(branches)(torch.zeros(1), 1.0, None),
        inner(branches)(torch.zeros(1), 1.0, None),
    )
    spread = [branches.values["c"].std((1, 2, 3)), plain.std((1, 2, 3))]
    expected = plain * (share * spread[0] / spread[1] + 1 - share)[:, None, None, None]
    assert (guided - expected).abs().max() < 1e-12
    assert branches.asked == ["ciu", "ciu"]  # what is known is not asked for again
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="rescale is"):
            rescaled(inner, wrong)
