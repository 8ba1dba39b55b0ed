"""One picture over a grid of s_T, s_I and seeds, scored, and the settings to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..clip.filter import PairScores
from ..clip.similarity import ClipSimilarity
from ..diffusion.noise import check_seed
from ..edit import EditResult, InstructPix2Pix
from ..errors import ConfigError
from ..hooks import Hooks
from ..images import fit, open_image, plan_size
from .methods import InstructionEdit, Setting
from .samples import Sample
from .statistics import AutoPick, Picked, pareto_front

__all__ = [
    "AUTO_IMAGE_CFGS",
    "AUTO_TEXT_CFGS",
    "Cell",
    "Sweep",
    "SweepConfig",
    "edit_with",
    "sweep",
    "sweep_sheet",
]

FRONT, PICKED, INK, PAPER = (0, 140, 90), (214, 102, 0), (40, 40, 40), "white"
FRAME, GAP = 5, 10
TITLE = "green: no other cell both keeps the picture better and follows the instruction better; orange: the pick"
AUTO_TEXT_CFGS, AUTO_IMAGE_CFGS = (3.0, 5.0, 7.5), (1.2, 1.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The grid, and how each edit of it is made."""

    text_cfgs: Sequence[float] = AUTO_TEXT_CFGS
    image_cfgs: Sequence[float] = AUTO_IMAGE_CFGS
    seeds: Sequence[int] = (0,)
    steps: int | None = None
    sampler: str | None = None
    resolution: int | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        if not (self.text_cfgs and self.image_cfgs and self.seeds) or self.batch < 1:
            raise ConfigError("an empty grid has nothing to sweep; give at least one s_T, s_I and seed")
        for seed in self.seeds:
            check_seed(seed)
        for name in ("text_cfgs", "image_cfgs", "seeds"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One edit of the grid."""

    text_cfg: float
    image_cfg: float
    seed: int
    image: Image.Image
    scores: PairScores
    on_front: bool
    """Whether no other cell keeps the picture better and follows the instruction better at once."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The cells by s_T, then s_I, then seed; and the automatic pick."""

    source: Image.Image
    sample: Sample
    cells: list[Cell]
    picked: Picked
    settings: dict[str, Any]
    """What all cells share: the size, and what a method says of its network and its walk."""

    @property
    def best(self) -> Cell:
        """The picked cell."""
        return self.cells[self.picked.index]


def sweep(
    editor: InstructPix2Pix,
    picture: str | Image.Image,
    instruction: str,
    captions: tuple[str, str],
    clip: ClipSimilarity,
    *,
    config: SweepConfig | None = None,
    auto: AutoPick | None = None,
    hooks: Hooks | None = None,
) -> Sweep:
    """Edit one picture at every setting with every seed; the picture and the texts are encoded once.

    ``captions`` describe the picture before and after; without them nothing could say whether the instruction was
    followed. Raises ConfigError, ImageError, or Interrupted.
    """
    settings, hooks = config or SweepConfig(), hooks or Hooks()
    if not all(text.strip() for text in (instruction, *captions)):
        raise ConfigError("a sweep compares pictures with texts; give an instruction and both captions")
    source = open_image(picture)
    method = _method(editor, settings, hooks)
    resolution = editor.model.spec.resolution if settings.resolution is None else settings.resolution
    size = plan_size("paper", *source.size, resolution)
    sample = Sample(
        key="picture",
        source=fit(source, size),
        instruction=instruction,
        caption=captions[0],
        edited_caption=captions[1],
        seed=settings.seeds[0],
    )
    made = []
    for part in _edits(method, sample, settings):
        made += part
        hooks.progress(len(made), len(settings.text_cfgs) * len(settings.image_cfgs) * len(settings.seeds))
    cells = _scored(made, sample, clip)
    return Sweep(
        source=source,
        sample=sample,
        cells=cells,
        picked=(auto or AutoPick()).pick([cell.scores for cell in cells]),
        settings={"size": list(size), **method.describe(Setting(curve=""))},
    )


def edit_with(editor: InstructPix2Pix, result: Sweep, config: SweepConfig | None = None) -> EditResult:
    """The picked edit once more, by ``InstructPix2Pix.edit``: at the picture's own size, with its settings."""
    settings, best = config or SweepConfig(), result.best
    (edited,) = editor.edit(
        result.source,
        result.sample.instruction,
        seeds=best.seed,
        text_cfg=best.text_cfg,
        image_cfg=best.image_cfg,
        steps=settings.steps,
        sampler=settings.sampler,
        resolution=settings.resolution,
    )
    return edited


def _method(editor: InstructPix2Pix, config: SweepConfig, hooks: Hooks) -> InstructionEdit:
    return InstructionEdit(
        editor,
        label="",
        text_cfgs=config.text_cfgs,
        image_cfgs=config.image_cfgs,
        steps=config.steps,
        sampler=config.sampler,
        hooks=hooks,
    )


def _edits(
    method: InstructionEdit, sample: Sample, config: SweepConfig
) -> Iterator[list[tuple[float, float, int, Image.Image]]]:
    """(s_T, s_I, seed, picture) of the grid, some seeds of one setting at a time."""
    seeds = [list(config.seeds[k : k + config.batch]) for k in range(0, len(config.seeds), config.batch)]
    prepared = [method.prepare([sample] * len(part)) for part in seeds]
    for setting, n in product(method.settings, range(len(seeds))):
        edited = method.make([_seeded(sample, seed) for seed in seeds[n]], prepared[n], setting).edited
        values = setting.values
        yield [(values["text_cfg"], values["image_cfg"], *one) for one in zip(seeds[n], edited, strict=True)]


def _seeded(sample: Sample, seed: int) -> Sample:
    return Sample(**{**vars(sample), "seed": seed})


def _scored(made: Sequence[tuple[float, float, int, Image.Image]], sample: Sample, clip: ClipSimilarity) -> list[Cell]:
    count = len(made)
    pictures = [image for *_, image in made]
    texts = [sample.caption] * count, [sample.edited_caption] * count
    scores = clip.score([sample.source] * count, pictures, *texts)
    front = set(pareto_front([(one.sim_direction, one.sim_image) for one in scores]))
    return [
        Cell(text_cfg=s_t, image_cfg=s_i, seed=seed, image=image, scores=score, on_front=n in front)
        for n, ((s_t, s_i, seed, image), score) in enumerate(zip(made, scores, strict=True))
    ]


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
