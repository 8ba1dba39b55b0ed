"""Figure 10 in small: one recipe on all, a tenth, a hundredth of the pairs, and on unfiltered ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..data.store import PairStore
from ..errors import ConfigError, DatasetError
from ..train import Progress, TrainConfig, train
from ..train.sources import Chosen, open_source
from .samples import in_test_split

__all__ = ["Arm", "make_arms", "subset", "train_arm"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training of the comparison: its name in the legend and as a folder, and what it is trained on."""

    name: str
    folder: str
    data: Path
    share: float = 1.0


def make_arms(filtered: Path, unfiltered: Path | None, shares: Sequence[float]) -> list[Arm]:
    """An arm a share of the filtered pairs, and one of all unfiltered ones. Raises ConfigError for a share."""
    for share in shares:
        if not 0 < share <= 1:
            raise ConfigError(f"share is {share}; give a part of the pairs, more than 0 up to 1")
    arms = [
        Arm(name=f"{100 * share:g} % of the pairs", folder=f"share-{share:g}", data=filtered, share=share)
        for share in shares
    ]
    return arms + ([Arm(name="without the filter", folder="unfiltered", data=unfiltered)] if unfiltered else [])


def subset(pairs: PairStore, share: float) -> list[int]:
    """Rows of a share of the pairs outside the test split, at least one; a smaller share's are among a larger one's.

    Pairs are ordered by a hash of their key, so the choice does not depend on shards. Raises DatasetError for none.
    """
    columns = pairs.columns("original_prompt", "key")
    rows = [n for n, caption in enumerate(columns["original_prompt"]) if not in_test_split(caption)]
    if not rows:
        raise DatasetError(f"{pairs.folder} has no pairs outside the test split; make more")
    keys = columns["key"]
    rows.sort(key=lambda n: hashlib.sha256(f"{keys[n] or n}".encode()).digest())
    return sorted(rows[: max(1, round(share * len(rows)))])


def train_arm(
    arm: Arm,
    config: TrainConfig,
    base: str,
    folder: Path,
    *,
    device: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Path | None:
    """Train one arm, or go on where it stopped; returns its averaged checkpoint, None if it was asked to stop."""
    rows = subset(PairStore(arm.data), arm.share)
    config = replace(config, hold_out_test=False)  # subset leaves it out
    result = train(
        config,
        data=Chosen(open_source(arm.data, config), rows),
        base=base,
        out=folder / arm.folder,
        device=device,
        on_progress=on_progress,
        should_stop=should_stop,
    )
    return result.files["ema"] if result.finished else None
