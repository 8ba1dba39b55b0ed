"""How sure a mean is, and which of two curves lies above: the bootstrap over samples (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError

__all__ = ["bootstrap_means", "curve_margin", "interval"]


def bootstrap_means(values: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Means of resampled rows: ``values`` (samples, columns) -> (resamples, columns), float64.

    A resample draws as many rows as there are, with replacement, and takes whole rows, so that columns measured on the
    same samples stay paired. Raises ConfigError without samples or resamples.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not len(values) or resamples < 1:
        raise ConfigError(f"values have the shape {values.shape}, resamples is {resamples}; give (samples, columns)")
    count = len(values)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return draws @ values / count


def interval(means: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The percentile interval that holds ``level`` of the resampled means, column by column."""
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; give a share between 0 and 1, such as 0.95")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def curve_margin(curve: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float | None:
    """By how much a curve lies above another: the least difference in y wherever both have an x; None if nowhere.

    Curves are points (x, y), joined by straight lines; the least difference lies at one of the points.
    """
    a, b = sorted(curve), sorted(other)
    low, high = max(a[0][0], b[0][0]), min(a[-1][0], b[-1][0])
    if low > high:
        return None
    places = [low, high, *(x for x, _ in (*a, *b) if low <= x <= high)]
    return float(np.min(np.interp(places, *zip(*a, strict=True)) - np.interp(places, *zip(*b, strict=True))))
