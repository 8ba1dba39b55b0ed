"""How sure a mean is, and which of two curves lies above: the bootstrap over samples (Efron 1979)."""

from __future__ import annotations

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


def curve_margin(curve: np.ndarray, other: np.ndarray) -> float | None:
    """By how much a curve lies above another: the least difference in y wherever both have an x; None if nowhere.

    Curves are points (x, y), shape (points, 2), joined by straight lines; the least difference lies at one of them.
    """
    (x, y), (other_x, other_y) = (np.asarray(one)[np.argsort(np.asarray(one)[:, 0])].T for one in (curve, other))
    low, high = max(x[0], other_x[0]), min(x[-1], other_x[-1])
    if low > high:
        return None
    inside = np.concatenate([x, other_x])
    places = np.array([low, high, *inside[(inside >= low) & (inside <= high)]])
    return float((np.interp(places, x, y) - np.interp(places, other_x, other_y)).min())
