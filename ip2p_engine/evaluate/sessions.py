"""Sessions of several turns whose truth is known: SR@k, all turns so far right, and why the others went wrong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..edit import EditConfig, InstructPix2Pix
from ..errors import ConfigError, DatasetError
from ..hooks import Hooks
from ..networks.conditioning import clean_latents
from ..session import SETTINGS, take_turn
from .recommend import network_of
from .run_folder import FLAG, Row, Table, row_key, row_log
from .statistics import bootstrap_means, interval

__all__ = ["NOTHING", "OTHER", "WAYS", "Walk", "cause_table", "session_rows", "session_table"]

WAYS = ("pictures", "latents", "held", "true")
"""How a turn hands on: as an 8-bit picture; as latents; as latents, with what a turn has not changed set back; or not,
since each turn begins at the true picture, which tells what single turns lose."""
NOTHING, OTHER = "nothing changed", "changed, not as asked"
RESULTS = {"right": [FLAG], "psnr": [FLAG], "kind": (str, type(None)), "cause": (str, type(None))}
BATCH = 25


@dataclass(frozen=True, kw_only=True)
class Walk(ABC):
    """A session: its turns, each from the true result of the one before, and who knows what comes of them."""

    edits: tuple[Any, ...]
    """Of a world: with an ``instruction`` and a ``kind`` each."""
    seed: int
    """Of its first turn; each has the next one."""

    @cached_property
    def instructions(self) -> list[str]:
        return [edit.instruction for edit in self.edits]

    @cached_property
    def kinds(self) -> list[str]:
        return [edit.kind for edit in self.edits]

    @abstractmethod
    def picture(self, turn: int) -> Image.Image:
        """The true one before a turn, counted from 0."""

    @abstractmethod
    def judge(self, turn: int, picture: Image.Image) -> tuple[bool, float, str]:
        """(whether it shows what all turns up to this one lead to, PSNR to that in dB, else what is wrong)."""


def session_rows(
    editor: InstructPix2Pix,
    walks: Sequence[Walk],
    way: str,
    config: EditConfig,
    *,
    folder: Path | None = None,
    hooks: Hooks | None = None,
) -> list[Row]:
    """A row a session: ``right`` and ``psnr`` turn by turn, and the ``kind`` and ``cause`` of the first wrong turn.

    In a ``folder`` the rows grow in rows.jsonl, and none is measured twice. Raises ConfigError for an unknown way, or
    without sessions.
    """
    if way not in WAYS or not walks:
        raise ConfigError(
            f"{len(walks)} sessions handed on as {way!r}; give at least one, and one of {', '.join(WAYS)}"
        )
    hooks, spec = hooks or Hooks(), editor.model.spec
    how = {name: getattr(spec if getattr(config, name) is None else config, name) for name in SETTINGS}
    how |= {"guidance_interval": config.guidance_interval, "way": way, "network": network_of(editor)}
    rows = [{**how, "seed": walk.seed, "instructions": list(walk.instructions)} for walk in walks]
    with row_log(folder, RESULTS) as (known, append):
        missing = [n for n, row in enumerate(rows) if row_key(row) not in known]
        for start in range(0, len(missing), BATCH):
            places = missing[start : start + BATCH]
            group = [walks[n] for n in places]
            turns = list(_turns(editor, group, way, config, Hooks(should_stop=hooks.should_stop)))
            judged = [_judged(walk, [pictures[n] for pictures in turns]) for n, walk in enumerate(group)]
            append([{**rows[n], **one} for n, one in zip(places, judged, strict=True)])
            hooks.progress(len(walks) - len(missing) + start + len(places), len(walks))
        found = [known[row_key(row)] for row in rows]
    for row in found:
        if not len(row["right"]) == len(row["psnr"]) == len(row["instructions"]):
            raise DatasetError(f"{folder} holds a session of {len(row['right'])} turns among others; give a new folder")
    return found


def _turns(
    editor: InstructPix2Pix, group: Sequence[Walk], way: str, config: EditConfig, hooks: Hooks
) -> Iterator[list[Image.Image]]:
    """The pictures of all sessions after each turn."""
    pictures = [walk.picture(0) for walk in group]
    latents = _latents(editor, pictures)
    for turn in range(len(group[0].instructions)):
        texts, seeds = [walk.instructions[turn] for walk in group], [walk.seed + turn for walk in group]
        if way == "pictures":
            results = editor.edit_each(pictures, texts, seeds=seeds, config=config, batch=len(group), hooks=hooks)
            pictures = [result.image for result in results]
        else:
            if way == "true":
                latents = _latents(editor, [walk.picture(turn) for walk in group])
            latents = take_turn(editor, latents, texts, seeds, config=config, hold=way == "held", hooks=hooks)[0]
            pictures = editor.pictures(latents)
        yield pictures


@torch.inference_mode()
def _latents(editor: InstructPix2Pix, pictures: Sequence[Image.Image]) -> Tensor:
    image = torch.cat([editor.condition(picture, "-", size="keep").image for picture in pictures])
    return clean_latents(editor.model, image)


def _judged(walk: Walk, pictures: Sequence[Image.Image]) -> Row:
    verdicts = [walk.judge(turn, picture) for turn, picture in enumerate(pictures)]
    right, psnrs, causes = (list(column) for column in zip(*verdicts, strict=True))
    first = right.index(False) if not all(right) else None
    why = {"kind": None, "cause": None} if first is None else {"kind": walk.kinds[first], "cause": causes[first]}
    return {"right": right, "psnr": psnrs, **why}


def cause_table(rows: Sequence[Row]) -> Table:
    """What ended the sessions that went wrong, at their first wrong turn: how many of each kind of edit."""
    wrong = [row for row in rows if row["cause"]]
    kinds = sorted({str(row["kind"]) for row in wrong})
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        for cause in sorted({row["cause"] for row in wrong if row["way"] == way}):
            mine = Counter(str(row["kind"]) for row in wrong if (row["way"], row["cause"]) == (way, cause))
            lines.append((way, cause, mine.total(), *(mine[kind] or "" for kind in kinds)))
    columns = ("handed on as", "why", "all", *kinds)
    return Table(title="The first wrong turn: why, and of which kind", columns=columns, rows=lines)


def session_table(rows: Sequence[Row]) -> Table:
    """SR@k in percent with its interval, and the PSNR after the last turn, a line a way of handing on."""
    turns, lines = len(rows[0]["right"]), []
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        far = np.array([np.cumprod(row["right"]) for row in mine], dtype=float)
        low, high = interval(bootstrap_means(far))
        shares = [f"{100 * share:.1f}" for share in far.mean(axis=0)]
        last = float(np.mean([row["psnr"][-1] for row in mine]))
        lines.append((way, len(mine), *shares, f"{100 * low[-1]:.1f} to {100 * high[-1]:.1f}", f"{last:.1f}"))
    columns = (
        "handed on as",
        "sessions",
        *(f"SR@{k + 1} %" for k in range(turns)),
        f"95 % of SR@{turns}",
        "dB at the end",
    )
    return Table(title=f"Sessions of {turns} turns, all so far right", columns=columns, rows=lines)
