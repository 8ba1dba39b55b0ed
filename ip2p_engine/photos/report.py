"""An examination as a table in Markdown and as a sheet of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..images import save_image, strip, to_images
from .exam import Examination
from .tones import TONES
from .world import LOCAL_KINDS

__all__ = ["exam_sheet", "exam_table"]

SHOWN, HEIGHT = 40, 144


def exam_table(examination: Examination) -> str:
    """A row a kind; every kind counts alike in the last ones."""
    lines = ["| kind | edits | done % | nearest dB | kept dB |", "|---|---|---|---|---|"]
    for kind, score in examination.by_kind.items():
        kept = "" if score.kept is None else f"{score.kept:.1f}"
        lines.append(f"| {kind} | {score.count} | {100 * score.done:.1f} | {score.nearest:.1f} | {kept} |")
    figures = examination.figures()
    count, kept = len(examination.edits), figures["kept"]
    lines.append(f"| **all** | {count} | **{100 * figures['done']:.1f}** | | {'' if kept is None else f'{kept:.1f}'} |")
    for name, kinds in (("whole picture", tuple(TONES)), ("local", LOCAL_KINDS)):
        lines.append(f"| {name} | | {100 * examination.share_done(kinds):.1f} | | |")
    lines.append(f"\n{figures['seconds_per_edit']:.2f} s an edit; {figures['settings']}")
    return "\n".join(lines)


def exam_sheet(examination: Examination, path: Path) -> None:
    """The first 40 results, unselected: source, result and a right answer of each."""
    shown = list(zip(examination.edits, examination.pictures, strict=True))[:SHOWN]
    trios = []
    for edit, picture in shown:
        images = to_images(torch.stack([edit.source, picture, edit.target]) * 2 - 1)
        trios.append(strip(images, ["", edit.instruction, "(truth)"], height=HEIGHT))
    save_image(_grid(trios), path)


def _grid(pictures: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for n, picture in enumerate(pictures):
        grid.paste(picture, (n % columns * width, n // columns * height))
    return grid
