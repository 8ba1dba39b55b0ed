"""The plot of the loss: an axis that one can read."""

from __future__ import annotations

import pytest

from ip2p_engine.train.run_folder import _ticks


@pytest.mark.parametrize(
    ("high", "least", "expected"),
    [
        (0.183, 0.0, [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18]),
        (1.0, 0.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (10, 1, [0, 2, 4, 6, 8, 10]),
        (3, 1, [0, 1, 2, 3]),
        (99, 1, [0, 20, 40, 60, 80]),
        (0, 1, [0]),
    ],
)
def test_ticks_are_round_and_few(high, least, expected):
    assert _ticks(high, least) == pytest.approx(expected)
