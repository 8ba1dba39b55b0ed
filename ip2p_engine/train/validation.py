"""What a run shows of itself: the loss on pairs that stay the same, and edits; nothing that training draws from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..clip.similarity import ClipSimilarity
from ..edit import EditConfig, InstructPix2Pix
from ..errors import ConfigError, DatasetError, ImageError
from ..files import csv_rows, json_lines
from ..images import Size, fit, open_image, open_mask, save_image
from ..networks.conditioning import TextEmbedding
from ..networks.model import Model
from ..strips import strip
from .augment import crop_mask, crop_pair, draw_crop, size_ids
from .config import TrainConfig
from .encoding import Encoded, Encoder
from .networks import arithmetic, usable
from .objective import Objective
from .optimizers import Average
from .randomness import draw, stream
from .sources import Pair, Rows, Stream, held_out_rows, open_pair

__all__ = ["Own", "ValidationSet", "read_own"]

BEFORE_TRAINING = -1  # the step of the draws: training's begin at 0
KEPT = 1.0  # r of conditioning dropout at which nothing is left out


@dataclass(frozen=True, kw_only=True)
class Own:
    """A picture and an instruction of the user's, of which nobody knows the true edit."""

    original: Image.Image
    instruction: str
    mask: Image.Image | None = None
    """For a network that is told one: white where something may change."""
    captions: tuple[str, str] | None = None
    """Before and after, for CLIP's direction."""


def read_own(path: Path) -> list[Own]:
    """Rows with source, instruction, maybe mask, caption and edited_caption of a .csv or .jsonl file.

    Paths are relative to it.

    Raises ConfigError.
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise ConfigError(f"validate_with is {path}; give a .csv or .jsonl file with columns source and instruction")
    rows = (json_lines if path.suffix.lower() == ".jsonl" else csv_rows)(path, ConfigError)
    found = []
    for number, row in enumerate(rows, start=1):
        source, said = row.get("source"), row.get("instruction")
        if not isinstance(source, str) or not isinstance(said, str) or not said.strip():
            raise ConfigError(f"{path}, row {number}, has no source or no instruction; give both")
        try:
            original, mask = open_image(path.parent / source), row.get("mask")
            mask = open_mask(path.parent / mask, original.size) if mask and isinstance(mask, str) else None
            texts = (row.get("caption"), row.get("edited_caption"))
            captions = (str(texts[0]), str(texts[1])) if all(texts) else None
            found.append(Own(original=original, instruction=said, mask=mask, captions=captions))
        except ImageError as error:
            raise ConfigError(f"{path}, row {number}: {error}") from error
    if not found:
        raise ConfigError(f"{path} has no rows; give pictures and instructions")
    return found


class ValidationSet:
    """Pairs that are held out, or where none are some of training's, and pictures of the user's own."""

    def __init__(self, source: Rows | Stream, config: TrainConfig, *, masks: bool = False, scores: bool = True) -> None:
        """``scores``: whether this process is the one that asks for them, and needs the CLIP."""
        self._config, self._masks = config, masks
        rest = held_out_rows(source)
        self.held_out = rest is not None
        self._rows = source if rest is None else rest
        count = config.validation_count
        self.pairs = list(islice(_good(self._rows, count, masks=masks), count))
        self.own = read_own(Path(config.validate_with)) if config.validate_with else []
        self._encoded: list[tuple[Encoded, list[str]]] | None = None
        # On the CPU, so that it takes no memory where training needs it.
        self._clip = ClipSimilarity.load(config.validation_clip) if config.validation_clip and scores else None

    def losses(self, model: Model, average: Average, encoder: Encoder, micro: int) -> dict[str, float]:
        """The objective's mean over the pairs, by the raw and by the averaged weights.

        Crop, noise and posterior sample of a pair are always the same, n pairs have the levels (k + 1/2) / n, and
        nothing is dropped, so that two losses differ by the weights alone.
        """
        if self._encoded is None:
            self._encoded = list(self._encode(encoder, micro))
        if not self._encoded:
            return {}
        objective = Objective(model, encoder.null_text, self._config)
        found = {}
        for kind in ("raw", "ema"):
            with average.applied() if kind == "ema" else nullcontext(), usable(model) as shown:
                found[kind] = self._mean(shown.unet, objective, encoder, model.device)
        return found

    @torch.no_grad()
    def _mean(self, unet: Any, objective: Objective, encoder: Encoder, device: torch.device) -> float:
        total, first, count = 0.0, 0, sum(len(one.mean) for one, _ in self._encoded or ())
        for encoded, said in self._encoded or ():
            if encoder.trained_texts:
                text, null = encoder.trained_text(said)
                encoded = replace(encoded, text=text, null_text=null)
            n = len(encoded.mean)
            draws = draw(self._config.seed, BEFORE_TRAINING, range(first, first + n), encoded.mean.shape[1:])
            levels = (torch.arange(first, first + n, dtype=torch.float64) + 0.5) / count
            draws = replace(draws, drop=torch.full((n,), KEPT), level=levels)
            moved = {name: value.to(device) for name, value in vars(draws).items() if name != "level"}
            with arithmetic(device.type, self._config):
                errors = objective(unet, _moved(encoded, device), replace(draws, **moved))
            total += float(errors.cpu().double().sum())  # not every device has float64
            first += n
        return total / count

    def _encode(self, encoder: Encoder, micro: int) -> Iterator[tuple[Encoded, list[str]]]:
        config, count = self._config, self._config.validation_pairs
        pairs = enumerate(islice(_good(self._rows, count, masks=self._masks), count) if count else iter(()))
        size = (config.resolution,) * 2
        while group := list(islice(pairs, micro)):
            drawn = [stream(config.seed, "validation crop", number) for number, _ in group]
            crops = [draw_crop(pair.original.size, size, config, g) for (_, pair), g in zip(group, drawn, strict=True)]
            pixels = [crop_pair((pair.original, pair.edited), c) for (_, pair), c in zip(group, crops, strict=True)]
            masks = [crop_mask(pair.mask, c) for (_, pair), c in zip(group, crops, strict=True)] if self._masks else []
            latents: dict[str, Any] = encoder.latents(torch.stack(pixels), torch.stack(masks) if masks else None)
            said = [pair.instruction for _, pair in group]
            sizes = torch.stack([size_ids(crop) for crop in crops])
            yield _moved(Encoded(**latents, text=encoder.text(said), size_ids=sizes), torch.device("cpu")), said

    @property
    def _shown(self) -> list[Pair | Own]:
        return [*self.pairs, *self.own]

    def edit(self, model: Model, average: Average) -> list[list[Image.Image]]:
        """[source, edit, truth] of each pair and [source, edit] of the user's own, at the training resolution."""
        size = (self._config.resolution,) * 2
        config = EditConfig(size=size, restore_size=False)
        sources = [fit(one.original, size) for one in self._shown]
        instructions = [one.instruction for one in self._shown]
        with average.applied(), usable(model) as shown, arithmetic(model.device.type, self._config):
            editor = InstructPix2Pix(shown)
            masks = [_fitted_mask(one.mask, size) if shown.spec.takes_mask else None for one in self._shown]
            edits = editor.edit_each(sources, instructions, seeds=range(len(sources)), masks=masks, config=config)
        truths = [[fit(pair.edited, size)] for pair in self.pairs] + [[] for _ in self.own]
        return [[a, b.image, *c] for a, b, c in zip(sources, edits, truths, strict=True)]

    def scores(self, rows: Sequence[Sequence[Image.Image]]) -> dict[str, float]:
        """CLIP's means over the edits of ``edit``; {} without a CLIP.

        clip_image: image similarity to the picture before. clip_direction: of those whose captions differ, with their
        number, clip_directions; both are missing where there are none.
        """
        if self._clip is None or not rows:
            return {}
        before, edited = (self._clip.image_features([row[n] for row in rows]) for n in (0, 1))
        found = {"clip_image": float(cosine_similarity(before, edited).mean())}
        said = [(n, one.captions) for n, one in enumerate(self._shown) if _differ(one.captions)]
        if said:
            places = [n for n, _ in said]
            texts = [self._clip.text_features([both[n] for _, both in said if both]) for n in (0, 1)]
            changes = cosine_similarity(edited[places] - before[places], texts[1] - texts[0])
            found |= {"clip_direction": float(changes.mean()), "clip_directions": len(said)}
        return found

    def sheet(self, rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
        """One picture: a strip for each pair, one below the other."""
        strips = [
            strip(row, ["before", one.instruction, "true edit"][: len(row)], height=128)
            for row, one in zip(rows, self._shown, strict=True)
        ]
        sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
        y = 0
        for one in strips:
            sheet.paste(one, (0, y))
            y += one.height
        return sheet

    def save(self, rows: Sequence[Sequence[Image.Image]], path: Path) -> None:
        """The sheet as a file."""
        save_image(self.sheet(rows), path)


def _differ(captions: tuple[str, str] | None) -> bool:
    """Whether captions are there, before and after, and say a change."""
    before, after = (text.strip() for text in captions or ("", ""))
    return bool(before and after) and before != after


def _fitted_mask(mask: Image.Image | None, size: Size) -> Image.Image | None:
    """As its picture is fitted; None where nothing white is left, which is told as no mask is."""
    fitted = None if mask is None else fit(mask.convert("RGB"), size).convert("L")
    return fitted if fitted is not None and fitted.getextrema()[1] else None


def _moved(encoded: Encoded, device: torch.device) -> Encoded:
    def move(value: Tensor | None) -> Any:
        return None if value is None else value.to(device)

    return Encoded(
        mean=move(encoded.mean),
        std=move(encoded.std),
        condition=move(encoded.condition),
        text=TextEmbedding(tokens=move(encoded.text.tokens), pooled=move(encoded.text.pooled)),
        size_ids=move(encoded.size_ids),
        mask=move(encoded.mask),
        null_text=encoded.null_text,
    )


def _good(source: Any, count: int, *, masks: bool = False) -> Iterator[Pair]:
    """Pairs that can be used: of rows ``count`` stretches in turn, since neighbours are often of one caption."""
    if hasattr(source, "__len__"):
        stretch = -(-len(source) // count)
        order = (start + k for k in range(stretch) for start in range(0, len(source), stretch))
        reads = (partial(source.__getitem__, row) for row in order if row < len(source))
    else:
        reads = (partial(lambda one: one, example) for example in source.epoch(0))
    for read in reads:
        try:
            yield open_pair(read(), masks=masks)  # reading alone can fail too
        except DatasetError:
            continue
