"""The filter: both sides of every threshold, the best few, and a report that adds up."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from ip2p_engine.clip.filter import FilterConfig, PairScores, filter_candidates
from ip2p_engine.errors import ConfigError

GOOD = PairScores(sim_0=0.25, sim_1=0.25, sim_direction=0.3, sim_image=0.8)
FLOORS = {"sim_0": 0.2, "sim_1": 0.2, "sim_direction": 0.2, "sim_image": 0.7}


@pytest.mark.parametrize(("measure", "floor"), FLOORS.items())
def test_both_sides_of_every_threshold(measure, floor):
    assert FilterConfig().floors() == FLOORS
    at, below = replace(GOOD, **{measure: floor}), replace(GOOD, **{measure: math.nextafter(floor, 0)})
    result = filter_candidates([at, below])
    assert result.kept == (0,)
    assert result.report.rejected == {**dict.fromkeys(FLOORS, 0), measure: 1} == result.report.rejected_alone


@pytest.mark.parametrize("measure", FLOORS)
def test_a_score_that_is_no_number_reaches_nothing(measure):
    result = filter_candidates([replace(GOOD, **{measure: math.nan})])
    assert result.kept == () and result.report.rejected[measure] == 1
    assert sum(result.report.histograms[measure]) == 0


def test_the_best_few_by_direction():
    scores = [replace(GOOD, sim_direction=direction) for direction in (0.3, 0.9, 0.1, 0.5, 0.4, 0.6)]
    result = filter_candidates(scores)
    assert result.kept == (1, 5, 3, 4)
    assert (result.report.kept, result.report.surplus, result.report.candidates) == (4, 1, 6)
    assert filter_candidates(scores, FilterConfig(keep=1)).kept == (1,)
    assert filter_candidates(scores, FilterConfig(keep=9)).kept == (1, 5, 3, 4, 0)


def test_equal_directions_keep_their_order():
    assert filter_candidates([GOOD] * 6).kept == (0, 1, 2, 3)


def test_thresholds_can_be_changed_later():
    scores = [replace(GOOD, sim_image=0.5), GOOD]
    assert filter_candidates(scores).kept == (1,)
    assert filter_candidates(scores, FilterConfig(min_sim_image=0.4)).kept == (0, 1)


def test_the_report_counts_who_rejected_whom():
    scores = [
        GOOD,
        replace(GOOD, sim_image=0.1),
        replace(GOOD, sim_image=0.1, sim_direction=-0.5),
        replace(GOOD, sim_1=0.0),
    ]
    report = filter_candidates(scores).report
    assert report.rejected == {"sim_0": 0, "sim_1": 1, "sim_direction": 1, "sim_image": 2}
    assert report.rejected_alone == {"sim_0": 0, "sim_1": 1, "sim_direction": 0, "sim_image": 1}
    assert report.pass_rate == 0.25


def test_reports_add_up():
    scores = [replace(GOOD, sim_direction=n / 20) for n in range(-20, 21)]
    first, second = filter_candidates(scores[:15]).report, filter_candidates(scores[15:]).report
    total, whole = first + second, filter_candidates(scores, FilterConfig(keep=100)).report
    assert (total.candidates, total.rejected, total.histograms) == (41, whole.rejected, whole.histograms)
    assert total.kept + total.surplus == whole.kept
    with pytest.raises(ConfigError, match="do not add up"):
        first + filter_candidates(scores, FilterConfig(min_sim_0=0.1)).report


def test_histograms():
    values = [-1.0, -1.0000001, -0.951, 0.0, 0.7, 0.749, 0.75, 1.0, 1.0000001]
    counts = filter_candidates([replace(GOOD, sim_image=value) for value in values]).report.histograms["sim_image"]
    assert len(counts) == 40 and sum(counts) == len(values)
    assert (counts[0], counts[20], counts[34], counts[35], counts[39]) == (3, 1, 2, 1, 2)


def test_no_candidates():
    result = filter_candidates([])
    assert result.kept == () and result.report.pass_rate == 0
    assert result.report.text().startswith("0 of 0 candidates kept (0.0%)")


def test_the_text_says_what_happened():
    text = filter_candidates([GOOD, replace(GOOD, sim_image=0.1)]).report.text()
    assert text.splitlines()[0].startswith("1 of 2 candidates kept (50.0%)")
    assert "sim_image >= 0.7 (edited picture resembles the source): rejected 1 (50.0%), 1 of them alone" in text
    assert "+0.80       1 ########################################" in text
    assert len(filter_candidates([GOOD]).report.text(histograms=False).splitlines()) == 5


def test_the_report_is_json():
    saved = json.loads(json.dumps(filter_candidates([GOOD]).report.to_dict()))
    assert saved["kept"] == 1 and saved["pass_rate"] == 1.0 and len(saved["histograms"]["sim_0"]) == 40


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_sim_image": 1.1}, "min_sim_image is 1.1; give a cosine"),
        ({"min_sim_0": math.nan}, "min_sim_0 is nan"),
        ({"min_sim_1": "0.2"}, "min_sim_1 is '0.2'"),
        ({"min_sim_direction": True}, "min_sim_direction is True"),
        ({"keep": 0}, "keep is 0; give a whole number"),
        ({"keep": 2.0}, "keep is 2.0"),
    ],
)
def test_settings_that_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        FilterConfig(**options)
