"""The histograms of a filter's report as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import disk_errors
from .filter import BINS_PER_UNIT, MEANINGS, FilterReport

__all__ = ["plot_report"]


def plot_report(report: FilterReport, path: Path | str) -> None:
    """One histogram a measure, its threshold drawn in; raises ConfigError without matplotlib, or for the path."""
    path = Path(path)
    figure_class = _matplotlib()
    figure = figure_class(figsize=(9, 6), layout="constrained")
    for axes, (name, counts) in zip(figure.subplots(2, 2).flat, report.histograms.items(), strict=True):
        _draw(axes, name, counts, report)
    figure.suptitle(f"{report.kept:,} of {report.candidates + report.early:,} candidates kept ({report.pass_rate:.1%})")
    try:
        with disk_errors(path, "written", ConfigError):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be drawn ({error}); give a name that ends in .png, .svg or .pdf") from error


def _draw(axes: Any, name: str, counts: tuple[int, ...], report: FilterReport) -> None:
    filled = [n for n, count in enumerate(counts) if count] or [BINS_PER_UNIT]
    shown = range(filled[0], filled[-1] + 1)
    axes.bar([-1 + n / BINS_PER_UNIT for n in shown], [counts[n] for n in shown], width=1 / BINS_PER_UNIT, align="edge")
    axes.axvline(report.floors[name], color="black", linestyle="--")
    axes.set_title(f"{name}: {MEANINGS[name]}", fontsize="medium")
    axes.set_xlabel(f"threshold {report.floors[name]:g}, below it {report.rejected[name]:,}")


def _matplotlib() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib, which is missing; pip install matplotlib") from error
    return Figure
