"""The grid of a sweep as one labelled picture: s_T down, s_I across, a block a seed, four numbers under each cell."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .sweep import Cell, Sweep

__all__ = ["sweep_sheet"]

FRONT, PICKED, INK, PAPER = (0, 140, 90), (214, 102, 0), (40, 40, 40), "white"
FRAME, GAP = 5, 10
TITLE = "green: no other cell both keeps the picture better and follows the instruction better; orange: the pick"


def sweep_sheet(result: Sweep, *, side: int = 176) -> Image.Image:
    """The sheet, RGB; each picture is shown ``side`` pixels high."""
    s_ts, s_is, seeds = (sorted({getattr(c, n) for c in result.cells}) for n in ("text_cfg", "image_cfg", "seed"))
    letter = max(10, side // 14)
    small = ImageFont.load_default(letter)
    width = round(max(1.0, result.sample.source.width / result.sample.source.height) * side)
    column, row = width + 2 * FRAME + GAP, side + 2 * FRAME + GAP + round(3.2 * letter)
    left, top = round(6 * letter), round(6 * letter)
    columns = len(s_is) * len(seeds)
    sheet = Image.new("RGB", (left + (columns + 1) * column, top + len(s_ts) * row), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), result.sample.instruction, fill=INK, font=ImageFont.load_default(side // 9))
    draw.text((GAP, GAP + side // 9 * 1.5), TITLE, fill=INK, font=small)
    sheet.paste(_shown(result.sample.source, width, side, PAPER), (left, top))
    draw.text((left + FRAME, top + side + 2 * FRAME), "before", fill=INK, font=small)
    for cell in result.cells:
        place = seeds.index(cell.seed) * len(s_is) + s_is.index(cell.image_cfg)
        x, y = left + (place + 1) * column, top + s_ts.index(cell.text_cfg) * row
        sheet.paste(_shown(cell.image, width, side, _frame(cell, result.best)), (x, y))
        draw.text((x + FRAME, y + side + 2 * FRAME), _numbers(cell), fill=INK, font=small, spacing=2)
    for n, (seed, s_i) in enumerate((seed, s_i) for seed in seeds for s_i in s_is):
        label = f"s_I {s_i:g}" + (f"  seed {seed}" if len(seeds) > 1 else "")
        draw.text((left + (n + 1) * column + FRAME, top - 1.5 * letter), label, fill=INK, font=small)
    for n, s_t in enumerate(s_ts):
        draw.text((GAP, top + n * row + side // 2), f"s_T {s_t:g}", fill=INK, font=small)
    return sheet


def _numbers(cell: Cell) -> str:
    s = cell.scores
    return f"direction {s.sim_direction:.3f}\nimage {s.sim_image:.3f}\nbefore {s.sim_0:.2f}  after {s.sim_1:.2f}"


def _frame(cell: Cell, best: Cell) -> str | tuple[int, int, int]:
    return PICKED if cell is best else FRONT if cell.on_front else PAPER


def _shown(picture: Image.Image, width: int, side: int, frame: str | tuple[int, int, int]) -> Image.Image:
    smooth = Image.Resampling.LANCZOS if picture.height > side else Image.Resampling.BICUBIC
    return ImageOps.expand(ImageOps.pad(picture, (width, side), smooth, color=PAPER), FRAME, frame)
