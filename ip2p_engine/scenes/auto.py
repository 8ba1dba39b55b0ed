"""Does the automatic pick pay? A grid of settings on every scene, and who chooses among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from ..clip.similarity import PairScores
from ..errors import ConfigError
from ..evaluate.measure import Row
from ..evaluate.pareto import AutoPick

__all__ = ["SCENES_MIN_IMAGE", "choices"]

SCENES_MIN_IMAGE = 0.45
"""The embedded CLIP gives true edits an image similarity of 0.47 and more; the paper's 0.7 is for ViT-L/14."""


def choices(rows: Sequence[Row], auto: AutoPick, fixed: tuple[float, float]) -> dict[str, list[Row]]:
    """The rows that each way takes, one a sample: the fixed (s_T, s_I), the best pair on average, and the pick.

    The best on average is chosen with hindsight, on these very samples: what a fixed pair could reach at most. Raises
    ConfigError if the fixed pair is not in the grid.
    """
    by_sample: dict[str, list[Row]] = {}
    by_pair: dict[tuple[float, float], list[Row]] = {}
    for row in rows:
        by_sample.setdefault(row["sample"], []).append(row)
        by_pair.setdefault((row["text_cfg"], row["image_cfg"]), []).append(row)
    if fixed not in by_pair:
        raise ConfigError(f"{fixed} is not in the grid; add it, to compare with")
    best = max(by_pair, key=lambda pair: sum(row["judged"]["success"] for row in by_pair[pair]))
    return {
        "fixed {:g} / {:g}".format(*fixed): by_pair[fixed],
        "best fixed, in hindsight: {:g} / {:g}".format(*best): by_pair[best],
        f"automatic, image similarity >= {auto.min_sim_image:g}": [
            group[auto.pick([_scores(row) for row in group]).index] for group in by_sample.values()
        ],
    }


def _scores(row: Row) -> PairScores:
    return PairScores(**{field.name: row[field.name] for field in fields(PairScores)})
