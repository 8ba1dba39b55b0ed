"""Some samples at every setting of a sweep, so that a curve can be looked at."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ..strips import strip
from .methods import Method, Setting
from .samples import Sample, batches

__all__ = ["example_sheet", "tiled"]


def example_sheet(
    samples: Sequence[Sample],
    methods: Sequence[Method],
    *,
    resolution: int,
    count: int = 4,
    first: int | None = None,
    height: int = 128,
) -> Image.Image:
    """One row a sample: before, the methods' pictures at (the ``first``) settings, and the target if there is one."""
    chosen = [(method, setting) for method in methods for setting in method.settings[:first]]
    labels = [_label(setting, [other for _, other in chosen]) for _, setting in chosen]
    rows = []
    for group in batches(samples[:count], count, resolution):
        prepared = {id(method): method.prepare(group) for method in methods}
        made = [method.make(group, prepared[id(method)], setting).edited for method, setting in chosen]
        rows += [_row(sample, [one[n] for one in made], labels, height) for n, sample in enumerate(group)]
    return tiled(rows)


def tiled(pictures: Sequence[Image.Image], columns: int = 1) -> Image.Image:
    """Pictures on white, row by row, each in a cell as large as the largest."""
    width, height = max(one.width for one in pictures), max(one.height for one in pictures)
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for n, one in enumerate(pictures):
        sheet.paste(one, (n % columns * width, n // columns * height))
    return sheet


def _label(setting: Setting, settings: Sequence[Setting]) -> str:
    """The curve and the values in which the settings differ."""
    curve = [setting.curve] if len({other.curve for other in settings}) > 1 else []
    varies = [name for name in setting.values if len({other.values[name] for other in settings}) > 1]
    return ", ".join([*curve, *(f"{name} {setting.values[name]:g}" for name in varies)])


def _row(sample: Sample, edited: Sequence[Image.Image], labels: Sequence[str], height: int) -> Image.Image:
    target = [] if sample.target is None else [sample.target]
    captions = [sample.instruction, *labels, *["target"] * len(target)]
    return strip([sample.source, *edited, *target], captions, height=height)
