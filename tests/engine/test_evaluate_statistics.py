"""Bootstrap, comparison of curves, Pareto front and automatic pick: closed forms and slow references."""

from __future__ import annotations

import numpy as np
import pytest

from ip2p_engine.clip.filter import PairScores
from ip2p_engine.errors import ConfigError
from ip2p_engine.evaluate.curve import claims, curve_points
from ip2p_engine.evaluate.statistics import AutoPick, bootstrap_means, curve_margin, interval, pareto_front
from ip2p_engine.evaluate.trade_off import points_table


def scores(image, direction=0.5):
    return PairScores(sim_0=0.3, sim_1=0.3, sim_direction=direction, sim_image=image)


def test_resampled_means_have_the_spread_of_the_closed_form():
    """The bootstrap's variance of a mean is the population variance over n, exactly in the limit."""
    values = np.random.default_rng(0).normal(size=(40, 1))
    means = bootstrap_means(values, resamples=20_000, seed=1)
    assert means.mean() == pytest.approx(values.mean(), abs=3 * values.std() / np.sqrt(40 * 20_000))
    assert means.std() == pytest.approx(values.std() / np.sqrt(40), rel=0.02)
    low, high = interval(means, 0.95)
    assert (high - low)[0] == pytest.approx(2 * 1.96 * values.std() / np.sqrt(40), rel=0.05)


def test_two_values_give_the_binomial():
    means = bootstrap_means(np.array([[0.0], [1.0]]), resamples=20_000, seed=0)[:, 0]
    assert [np.mean(means == value) for value in (0, 0.5, 1)] == pytest.approx([0.25, 0.5, 0.25], abs=0.015)


def test_columns_stay_paired_and_seeds_repeat():
    first = np.random.default_rng(3).normal(size=30)
    means = bootstrap_means(np.stack([first, 3 * first + 1], axis=1), resamples=50, seed=9)
    assert np.allclose(means[:, 1], 3 * means[:, 0] + 1)
    again = bootstrap_means(np.stack([first, first], axis=1), resamples=50, seed=9)
    assert np.array_equal(again[:, 0], means[:, 0])
    assert not np.array_equal(bootstrap_means(first[:, None], resamples=50, seed=8), means[:, :1])


def test_equal_values_and_one_sample_have_no_spread():
    for values in (np.full((7, 2), 0.4), np.array([[0.4, 0.4]])):
        low, high = interval(bootstrap_means(values))
        assert np.allclose(low, 0.4) and np.allclose(high, 0.4)


@pytest.mark.parametrize("values", [np.zeros((0, 2)), np.zeros(3)])
def test_nothing_to_resample(values):
    with pytest.raises(ConfigError, match="shape"):
        bootstrap_means(values)


@pytest.mark.parametrize("level", [0, 1, 1.5])
def test_levels_of_an_interval(level):
    with pytest.raises(ConfigError, match="level"):
        interval(np.zeros((3, 1)), level)


@pytest.mark.parametrize(
    ("other", "margin"),
    [
        ([(0, 0.4), (1, -0.6)], 0.1),  # parallel
        ([(1, -0.6), (0, 0.4)], 0.1),  # in either direction
        ([(0, 0.0), (1, 0.0)], -0.5),  # crossing
        ([(0.2, 0.0), (0.4, 0.0)], 0.1),  # one inside the other
        ([(1, -0.7)], 0.2),  # a point, touching
        ([(0.5, 0.0), (3, 0.0)], -0.5),  # reaching farther
        ([(2, -0.5)], 0.0),  # farther, with as little y as the end: no worse than it
        ([(-1, 0.3)], 0.2),  # worse in both
        ([(-2, 0.9), (-1, 0.8)], None),  # less x, more y: another part of the trade-off
        ([(2, -0.7)], None),  # more x, less y: the same
    ],
)
def test_the_margin_between_two_curves(other, margin):
    found = curve_margin(np.array([(0, 0.5), (1, -0.5)]), np.array(other, dtype=float))
    assert found == (None if margin is None else pytest.approx(margin))


def beaten(point, points):
    return any(all(b >= a for a, b in zip(point, q, strict=True)) and q != point for q in points)


def test_the_front_is_what_nothing_beats():
    draw = np.random.default_rng(5)
    for _ in range(50):
        points = [tuple(map(float, point)) for point in draw.integers(0, 6, size=(15, 2))]
        assert pareto_front(points) == [n for n, point in enumerate(points) if not beaten(point, points)]
    assert pareto_front([]) == [] and pareto_front([(1, 1), (1, 1)]) == [0, 1]


def test_the_pick_on_both_sides_of_its_threshold():
    pick = AutoPick(min_sim_image=0.7)
    assert pick.pick([scores(0.7, 0.1), scores(0.6999, 0.9)]).index == 0
    assert pick.pick([scores(0.7, 0.1), scores(0.7, 0.9)]).index == 1
    assert pick.pick([scores(0.9, 0.3), scores(0.8, 0.3)]).index == 0
    last = pick.pick([scores(0.3, 0.9), scores(0.6, 0.1)])
    assert (last.index, last.keeps) == (1, False)
    assert pick.pick([scores(0.7)]).keeps


def test_a_pick_needs_candidates_and_a_cosine():
    with pytest.raises(ConfigError, match="nothing to pick from"):
        AutoPick().pick([])
    with pytest.raises(ConfigError, match="cosine"):
        AutoPick(min_sim_image=7)


def rows(curve, settings, image, direction, samples=12, spread=0.0):
    """Made-up rows: the s-th setting's numbers plus a sample's own offset."""
    draw = np.random.default_rng(0).normal(size=samples) * spread
    return [
        {
            "curve": curve,
            **setting,
            "sample": str(n),
            "sim_0": 0.2,
            "sim_1": 0.2,
            "sim_image": image[s] + draw[n],
            "sim_direction": direction[s] - draw[n],
        }
        for s, setting in enumerate(settings)
        for n in range(samples)
    ]


IMAGE_CFGS = [{"text_cfg": 7.5, "image_cfg": s_i} for s_i in (1.0, 1.5, 2.0)]
STRENGTHS = [{"strength": s} for s in (0.3, 0.9)]


def test_points_are_means_with_their_interval():
    made = rows("a", IMAGE_CFGS, (0.5, 0.6, 0.7), (0.9, 0.8, 0.7), spread=0.1)
    points = curve_points(made, resamples=500)
    assert [point.setting["image_cfg"] for point in points] == [1.0, 1.5, 2.0]
    for point, start in zip(points, (0, 12, 24), strict=True):
        values = [row["sim_image"] for row in made[start : start + 12]]
        assert point.count == 12 and point.means["sim_image"] == pytest.approx(np.mean(values))
        assert point.low["sim_image"] < np.mean(values) < point.high["sim_image"]
    assert any("image_cfg 1.5" in row[1] for row in points_table(points).rows)


def test_judged_numbers_become_means_too():
    made = [
        {**row, "judged": {"success": n % 2 == 0, "psnr": 20.0 + n}} for n, row in enumerate(rows("a", [{}], [1], [0]))
    ]
    (point,) = curve_points(made)
    assert point.means["success"] == 0.5 and point.means["psnr"] == pytest.approx(25.5)


def test_what_figure_8_claims():
    above = rows("ours", IMAGE_CFGS, (0.6, 0.7, 0.8), (0.9, 0.8, 0.7), spread=0.02)
    below = rows("SDEdit", STRENGTHS, (0.7, 0.5), (0.7, 0.9), spread=0.02)
    found = claims([*above, *below], "ours", ["SDEdit"], resamples=200)
    assert [one.holds for one in found] == [True, True, True]
    assert all(one.share == 1 for one in found)
    turned = claims([*above, *below], "SDEdit", ["ours"], resamples=50)
    assert not turned[-1].holds and turned[-1].share == 0


def test_a_curve_that_falls_where_it_should_rise():
    made = rows("ours", IMAGE_CFGS, (0.6, 0.59, 0.8), (0.9, 0.8, 0.81))
    assert [one.holds for one in claims(made, "ours", [])] == [False, False]


def test_curves_of_different_samples_do_not_compare():
    ours, other = rows("ours", IMAGE_CFGS, (1, 1, 1), (1, 1, 1)), rows("SDEdit", STRENGTHS, (1, 1), (1, 1), samples=5)
    with pytest.raises(ConfigError, match="same samples"):
        claims([*ours, *other], "ours", ["SDEdit"])
    with pytest.raises(ConfigError, match="same samples"):
        claims(ours, "ours", ["absent"])
