"""Some samples at every setting of a sweep, so that a curve can be looked at."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ..images import strip
from .methods import Method
from .samples import Sample, batches

__all__ = ["example_sheet", "stacked"]


def example_sheet(
    samples: Sequence[Sample], method: Method, *, resolution: int, count: int = 4, height: int = 128
) -> Image.Image:
    """One row a sample: before, the method's picture at each setting, and the target where there is one."""
    rows = []
    for group in batches(samples[:count], count, resolution):
        prepared = method.prepare(group)
        made = [method.make(group, prepared, setting).edited for setting in method.settings]
        labels = [", ".join(f"{n} {v:g}" for n, v in s.values.items() if _varies(n, method)) for s in method.settings]
        rows += [_row(sample, [one[n] for one in made], labels, height) for n, sample in enumerate(group)]
    return stacked(rows)


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other on white."""
    sheet = Image.new("RGB", (max(one.width for one in pictures), sum(one.height for one in pictures)), "white")
    top = 0
    for one in pictures:
        sheet.paste(one, (0, top))
        top += one.height
    return sheet


def _varies(name: str, method: Method) -> bool:
    return len({setting.values[name] for setting in method.settings}) > 1


def _row(sample: Sample, edited: Sequence[Image.Image], labels: Sequence[str], height: int) -> Image.Image:
    target = [] if sample.target is None else [sample.target]
    captions = [sample.instruction, *labels, *["target"] * len(target)]
    return strip([sample.source, *edited, *target], captions, height=height)
