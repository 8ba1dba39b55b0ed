"""An examination in words and in a picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ..evaluate.examples import tiled
from ..strips import strip
from .exam import Examination, Score
from .world import render

__all__ = ["as_text", "first_sheet", "worst_sheet"]


def as_text(result: Examination) -> str:
    """A table: one row a kind, then all, then what the autoencoder alone reaches."""
    head = f"{'':16}{'n':>6}{'success':>9}{'asked':>8}{'kept':>8}{'clear':>8}{'PSNR':>8}{'background':>12}"
    rows = [_row(kind, score) for kind, score in result.by_kind.items()]
    settings = "  ".join(f"{name} {value}" for name, value in result.settings.items())
    foot = f"{result.seconds_per_edit:.2f} s an edit   {settings}"
    return "\n".join([head, *rows, _row("all", result.overall), _row("autoencoder", result.ceiling), foot])


def worst_sheet(result: Examination, count: int = 24) -> Image.Image:
    """Failures first, the farthest from the truth on top: source, edit, truth, and the instruction."""
    order = sorted(range(len(result.edits)), key=lambda n: (result.verdicts[n].success, result.verdicts[n].psnr))
    return _sheet(result, order[:count])


def first_sheet(result: Examination, count: int = 12) -> Image.Image:
    """The first edits of the examination, unselected: source, edit, truth, and the instruction."""
    return _sheet(result, range(min(count, len(result.edits))))


def _sheet(result: Examination, numbers: Sequence[int], columns: int = 3) -> Image.Image:
    return tiled([_cell(result, n) for n in numbers], columns)


def _row(name: str, score: Score) -> str:
    fractions = "".join(f"{100 * value:>8.1f}" for value in (score.asked, score.kept, score.clear))
    decibels = f"{score.psnr:>8.2f}{score.background_psnr:>12.2f}"
    return f"{name:16}{score.count:>6}{100 * score.success:>9.1f}{fractions}{decibels}"


def _cell(result: Examination, n: int) -> Image.Image:
    edit = result.edits[n]
    pictures = [render(edit.source), result.pictures[n], render(edit.target)]
    return strip(pictures, [edit.caption, edit.instruction, "truth"], height=128)
