"""Plots: the one place that imports matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import ConfigError
from .files import disk_errors, whole_file

__all__ = ["DPI", "new_figure", "save_figure"]

DPI = 150


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that belongs to no window and no global state; ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib, which is missing; pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure whole, in the format that the suffix names; parents are made. Raises ConfigError."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise ConfigError(f"{path} cannot be drawn in that format; give a name that ends in .png, .svg or .pdf")
    undated = {"metadata": {"Date": None}} if kind == "svg" else {}
    with disk_errors(path, "written", ConfigError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as stream:
            figure.savefig(stream, format=kind, dpi=DPI, **undated)
