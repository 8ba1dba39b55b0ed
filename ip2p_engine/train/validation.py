"""Edits of some examples while training goes on: fixed seeds, and nothing that training draws from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from ..edit import EditConfig, InstructPix2Pix
from ..errors import DatasetError
from ..images import fit, save_image, strip
from ..networks.model import Model
from .config import TrainConfig
from .networks import arithmetic, usable
from .optimizers import Average
from .sources import Pair, Rows, Stream, open_pair

__all__ = ["ValidationSet"]


class ValidationSet:
    """Some pairs, edited by the averaged weights with the checkpoint's recommended guidance."""

    def __init__(self, source: Rows | Stream, config: TrainConfig) -> None:
        self._config = config
        self.pairs = list(islice(_good(source, config.validation_count), config.validation_count))

    def edit(self, model: Model, average: Average) -> list[list[Image.Image]]:
        """[source, edit, truth] of each pair, at the training resolution."""
        size = (self._config.resolution,) * 2
        config = EditConfig(size=size, restore_size=False)
        sources = [fit(pair.original, size) for pair in self.pairs]
        instructions = [pair.instruction for pair in self.pairs]
        with average.applied(), usable(model) as shown, arithmetic(model.device.type, self._config):
            editor = InstructPix2Pix(shown)
            edits = editor.edit_each(sources, instructions, seeds=range(len(sources)), config=config)
        truths = [fit(pair.edited, size) for pair in self.pairs]
        return [[a, b.image, c] for a, b, c in zip(sources, edits, truths, strict=True)]

    def save(self, rows: Sequence[Sequence[Image.Image]], path: Path) -> None:
        """One picture: a strip for each pair, one below the other."""
        strips = [
            strip(row, ["before", pair.instruction, "true edit"], height=128)
            for row, pair in zip(rows, self.pairs, strict=True)
        ]
        sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
        y = 0
        for one in strips:
            sheet.paste(one, (0, y))
            y += one.height
        save_image(sheet, path)


def _good(source: Any, count: int) -> Iterator[Pair]:
    """Pairs that can be used: of rows ``count`` stretches in turn, since neighbours are often of one caption."""
    if hasattr(source, "__len__"):
        stretch = -(-len(source) // count)
        order = (start + k for k in range(stretch) for start in range(0, len(source), stretch))
        examples = (source[row] for row in order if row < len(source))
    else:
        examples = source.epoch(0)
    for example in examples:
        try:
            yield open_pair(example)
        except DatasetError:
            continue
