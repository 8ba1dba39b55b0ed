"""Which candidates become training pairs: thresholds on the CLIP numbers, then the best few (paper, section 3.1.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..plots import new_figure, save_figure

__all__ = [
    "FilterConfig",
    "FilterReport",
    "FilterResult",
    "MEASURES",
    "PairScores",
    "filter_candidates",
    "plot_report",
]


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """How well a pair of pictures fits its captions; cosines, -1 to 1."""

    sim_0: float
    """Source picture and caption."""
    sim_1: float
    """Edited picture and edited caption."""
    sim_direction: float
    """Change of the picture and change of the text (Gal et al. 2022)."""
    sim_image: float
    """Source and edited picture."""


MEASURES = tuple(field.name for field in fields(PairScores))
MEANINGS = {
    "sim_0": "source picture fits its caption",
    "sim_1": "edited picture fits its caption",
    "sim_direction": "the change fits the change of caption",
    "sim_image": "edited picture resembles the source",
}
BINS_PER_UNIT = 20
BINS = 2 * BINS_PER_UNIT
BAR = 40


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What a pair must reach to be kept; the defaults are the paper's, for ViT-L/14."""

    min_sim_0: float = 0.2
    min_sim_1: float = 0.2
    min_sim_direction: float = 0.2
    min_sim_image: float = 0.7
    keep: int = 4
    """The most pairs to keep of one caption pair, the best by direction."""

    def __post_init__(self) -> None:
        for measure, floor in self.floors().items():
            if isinstance(floor, bool) or not isinstance(floor, int | float) or not -1 <= floor <= 1:
                raise ConfigError(f"min_{measure} is {floor!r}; give a cosine, -1 to 1")
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise ConfigError(f"keep is {self.keep!r}; give a whole number of at least 1")

    def floors(self) -> dict[str, float]:
        """The thresholds by the names of PairScores; a score that equals its threshold passes."""
        return {measure: getattr(self, f"min_{measure}") for measure in MEASURES}


@dataclass(frozen=True, kw_only=True)
class FilterReport:
    """What a filter did with how many candidates; reports of several captions add up."""

    candidates: int
    kept: int
    rejected: dict[str, int]
    """Candidates below each threshold; one may be below several."""
    rejected_alone: dict[str, int]
    """Candidates that this threshold alone keeps out: what lowering it would give back."""
    surplus: int
    """Candidates that pass every threshold and are not among the best."""
    histograms: dict[str, tuple[int, ...]]
    """Counts in 40 bins of 0.05 from -1 to 1 (the last one with 1), of each measure."""
    floors: dict[str, float]
    early: int = 0
    """Further candidates that were dropped unfinished, by their preview."""

    def __add__(self, other: FilterReport) -> FilterReport:
        """Both together; raises ConfigError for reports of different thresholds."""
        if self.floors != other.floors:
            raise ConfigError(f"reports of thresholds {self.floors} and {other.floors} do not add up; filter again")
        return FilterReport(
            candidates=self.candidates + other.candidates,
            kept=self.kept + other.kept,
            rejected=_sum(self.rejected, other.rejected),
            rejected_alone=_sum(self.rejected_alone, other.rejected_alone),
            surplus=self.surplus + other.surplus,
            histograms={
                name: tuple(a + b for a, b in zip(counts, other.histograms[name], strict=True))
                for name, counts in self.histograms.items()
            },
            floors=self.floors,
            early=self.early + other.early,
        )

    @property
    def pass_rate(self) -> float:
        """Kept among all candidates, 0 to 1, those that were dropped early included; 0 without candidates."""
        begun = self.candidates + self.early
        return self.kept / begun if begun else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "pass_rate": self.pass_rate}

    def text(self, *, histograms: bool = True) -> str:
        """The report for people: one line a threshold, then a histogram of each measure."""
        lines = [
            f"{self.kept} of {self.candidates + self.early} candidates kept ({self.pass_rate:.1%}); "
            f"{self.surplus} more passed every threshold and were not among the best"
        ]
        if self.early:
            lines.append(f"  {self.early} dropped unfinished, by their preview; of the other {self.candidates}:")
        for name in MEASURES:
            lines.append(
                f"  {name} >= {self.floors[name]:g} ({MEANINGS[name]}): rejected {self.rejected[name]} "
                f"({self._share(self.rejected[name])}), {self.rejected_alone[name]} of them alone"
            )
        return "\n".join([*lines, *(self._drawn() if histograms else [])])

    def _share(self, count: int) -> str:
        return f"{count / self.candidates:.1%}" if self.candidates else "-"

    def _drawn(self) -> list[str]:
        lines = []
        for name, counts in self.histograms.items():
            filled = [n for n, count in enumerate(counts) if count]
            lines.append(f"{name}, threshold {self.floors[name]:g}")
            for n in range(filled[0], filled[-1] + 1) if filled else ():
                bar = "#" * math.ceil(BAR * counts[n] / max(counts))
                lines.append(f"  {-1 + n / BINS_PER_UNIT:+.2f} {counts[n]:>7} {bar}".rstrip())
        return lines


@dataclass(frozen=True, kw_only=True)
class FilterResult:
    """Which candidates to keep, best first, and why the others not."""

    kept: tuple[int, ...]
    """Places in the list of candidates."""
    report: FilterReport


def filter_candidates(scores: Sequence[PairScores], config: FilterConfig | None = None) -> FilterResult:
    """The candidates of one caption pair that reach every threshold, the best few by direction (section 3.1.2).

    Of equal directions the earlier comes first. A NaN reaches nothing.
    """
    settings = config or FilterConfig()
    floors = settings.floors()
    below = [[name for name in MEASURES if not getattr(one, name) >= floors[name]] for one in scores]
    passing = [n for n, names in enumerate(below) if not names]
    kept = sorted(passing, key=lambda n: -scores[n].sim_direction)[: settings.keep]
    report = FilterReport(
        candidates=len(scores),
        kept=len(kept),
        rejected={name: sum(name in names for names in below) for name in MEASURES},
        rejected_alone={name: below.count([name]) for name in MEASURES},
        surplus=len(passing) - len(kept),
        histograms={name: _histogram([getattr(one, name) for one in scores]) for name in MEASURES},
        floors=floors,
    )
    return FilterResult(kept=tuple(kept), report=report)


def _histogram(values: Sequence[float]) -> tuple[int, ...]:
    """Counts in bins from -1 to 1; rounding beyond the ends belongs to the end bins, NaN to none."""
    counts = [0] * BINS
    for value in values:
        if not math.isnan(value):
            # The millionth keeps a threshold such as 0.7 in the bin that begins with it.
            counts[min(max(math.floor((value + 1) * BINS_PER_UNIT + 1e-6), 0), BINS - 1)] += 1
    return tuple(counts)


def _sum(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: count + b[name] for name, count in a.items()}


def plot_report(report: FilterReport, path: Path | str) -> None:
    """One histogram a measure, its threshold drawn in; raises ConfigError without matplotlib, or for the path."""
    figure = new_figure(9, 6)
    for axes, (name, counts) in zip(figure.subplots(2, 2).flat, report.histograms.items(), strict=True):
        _draw(axes, name, counts, report)
    figure.suptitle(f"{report.kept:,} of {report.candidates + report.early:,} candidates kept ({report.pass_rate:.1%})")
    save_figure(figure, Path(path))


def _draw(axes: Any, name: str, counts: tuple[int, ...], report: FilterReport) -> None:
    filled = [n for n, count in enumerate(counts) if count] or [BINS_PER_UNIT]
    shown = range(filled[0], filled[-1] + 1)
    axes.bar([-1 + n / BINS_PER_UNIT for n in shown], [counts[n] for n in shown], width=1 / BINS_PER_UNIT, align="edge")
    axes.axvline(report.floors[name], color="black", linestyle="--")
    axes.set_title(f"{name}: {MEANINGS[name]}", fontsize="medium")
    axes.set_xlabel(f"threshold {report.floors[name]:g}, below it {report.rejected[name]:,}")
