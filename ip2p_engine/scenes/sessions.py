"""Sessions of several turns on scenes, where the truth after every turn is known (SR@k: all turns so far are right)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..edit import EditConfig, InstructPix2Pix
from ..errors import ConfigError
from ..evaluate.run_folder import Table
from ..evaluate.statistics import bootstrap_means, interval
from ..hooks import Hooks
from ..networks.conditioning import clean_latents
from ..session import take_turn
from .grammar import Edit, edits_from, instructions_for, scenes_of
from .judge import judge_edit, read_scenes
from .world import render

__all__ = ["WAYS", "sample_sessions", "session_rows", "session_table"]

WAYS = ("pictures", "latents", "held")
"""How a turn hands on: as an 8-bit picture; as latents; as latents, with what a turn has not changed set back."""
BATCH = 25


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A session: its turns, each from the true result of the one before, and the seed of its first."""

    edits: tuple[Edit, ...]
    seed: int


def sample_sessions(count: int, turns: int, *, seed: int = 7, held_out: bool = True) -> list[Walk]:
    """Held-out scenes, and so many instructions, one after another, of which none leads to a scene that there was.

    ``held_out``: in phrasings that training has not seen.
    """
    draw = random.Random(seed)
    return [_sample(draw, turns, seed + 1 + 1000 * n, held_out) for n in range(count)]


def _sample(draw: random.Random, turns: int, seed: int, held_out: bool) -> Walk:
    scene, edits, seen = draw.choice(scenes_of(held_out=True)), [], set()
    for _ in range(turns):
        seen.add(scene)
        options: dict[str, list[Any]] = {}
        for kind, target in edits_from(scene):
            if target not in seen:
                options.setdefault(kind, []).append(target)
        kind = draw.choice(sorted(options))
        target = draw.choice(options[kind])
        text = draw.choice(instructions_for(kind, scene, target, held_out=held_out))
        edits.append(Edit(kind=kind, source=scene, target=target, instruction=text))
        scene = target
    return Walk(edits=tuple(edits), seed=seed)


def session_rows(
    editor: InstructPix2Pix, walks: Sequence[Walk], way: str, config: EditConfig, hooks: Hooks | None = None
) -> list[dict[str, Any]]:
    """A row a session: ``right``, turn by turn, whether the picture shows the true scene; and PSNR to it in dB.

    Raises ConfigError for an unknown way, or without sessions.
    """
    if way not in WAYS or not walks:
        raise ConfigError(
            f"{len(walks)} sessions handed on as {way!r}; give at least one, and one of {', '.join(WAYS)}"
        )
    hooks, rows = hooks or Hooks(), []
    for start in range(0, len(walks), BATCH):
        group = walks[start : start + BATCH]
        verdicts = _verdicts(editor, group, way, config, Hooks(should_stop=hooks.should_stop))
        for n, walk in enumerate(group):
            told = {"way": way, "seed": walk.seed, "instructions": [edit.instruction for edit in walk.edits]}
            right = [verdict[n].success for verdict in verdicts]
            rows.append({**told, "right": right, "psnr": [verdict[n].psnr for verdict in verdicts]})
        hooks.progress(len(rows), len(walks))
    return rows


def _verdicts(editor: Any, group: Sequence[Walk], way: str, config: EditConfig, hooks: Hooks) -> list[list[Any]]:
    """The judge's verdicts turn by turn; a turn is right if the picture shows what all turns so far lead to."""
    pictures = [render(walk.edits[0].source) for walk in group]
    image = torch.cat([editor.condition(picture, "-").image for picture in pictures])
    latents, found = clean_latents(editor.model, image), []
    for k in range(len(group[0].edits)):
        texts, seeds = [walk.edits[k].instruction for walk in group], [walk.seed + k for walk in group]
        if way == "pictures":
            results = editor.edit_each(pictures, texts, seeds=seeds, config=config, batch=len(group), hooks=hooks)
            pictures = [result.image for result in results]
        else:
            latents = take_turn(editor, latents, texts, seeds, config=config, hold=way == "held", hooks=hooks)[0]
            pictures = editor.pictures(latents)
        found.append([_verdict(walk.edits[k], picture) for walk, picture in zip(group, pictures, strict=True)])
    return found


def _verdict(edit: Edit, picture: Image.Image) -> Any:
    return judge_edit(edit, picture, read_scenes([picture])[0])


def session_table(rows: Sequence[dict[str, Any]]) -> Table:
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
