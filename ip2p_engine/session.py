"""Several instructions one after another: a turn starts from the last one's latents, not from its 8-bit picture.

A picture that goes through the autoencoder and 8 bits at every turn wears off (MagicBrush's multi-turn scores fall so).
Here a turn's latents are the next one's condition as they are, and where a turn has changed nothing they are set back
to what they were, so that after any number of turns an untouched place is the original's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import with_overrides
from .detail import with_detail
from .diffusion.area import area_of
from .edit import EditConfig, InstructPix2Pix
from .errors import ConfigError, DatasetError, ImageError
from .files import disk_errors, locked, read_json, whole_path, write_json
from .hooks import Hooks
from .images import Picture, Size, give_back, open_image, pixels_digest, plan_size, save_image
from .networks.conditioning import Conditioning, clean_latents, encode_text, size_ids
from .networks.digest import digest_of_autoencoder
from .pictures import area_pictures, whole_area

__all__ = ["SETTINGS", "SHARE", "WHOLE", "Session", "Turn", "held", "take_turn"]

SHARE, WHOLE = 0.15, 0.3
"""Of a turn's largest change: places from the first on have changed; a median from the second on is a whole picture."""
ORIGINAL, STATE = "original.png", "session.json"
VERSION = 1
SETTINGS = ("text_cfg", "image_cfg", "steps", "sampler")


def take_turn(
    editor: InstructPix2Pix,
    latents: Tensor,
    instructions: Sequence[str],
    seeds: Sequence[int],
    *,
    config: EditConfig | None = None,
    hold: bool = True,
    hooks: Hooks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(latents after a turn, where it changed something, how far the rest moved before it was set back).

    ``latents`` (B, 4, h, w) are clean ones, a row a session; the second is (B, 1, h, w), 1 where something changed, and
    the third (B,), the root mean square of the change elsewhere: 0 is no drift. ``hold`` sets the rest back.
    """
    condition = _condition(editor, latents, instructions)
    made = editor.latents(condition, seeds, config=config, hooks=hooks)
    return held(latents, made, hold=hold)


@torch.inference_mode()
def _condition(editor: InstructPix2Pix, latents: Tensor, texts: Sequence[str]) -> Conditioning:
    """What edits of clean latents (B, 4, h, w) by a text each are conditioned on: the latents as they are."""
    model, words = editor.model, list(dict.fromkeys(texts))
    embedded, scale = encode_text(model, [*words, ""]), 1.0 if model.spec.scaled_condition else model.spec.latent_scale
    return Conditioning(
        text=embedded.rows([words.index(text) for text in texts]),
        null_text=embedded.rows([len(words)]),
        image=latents / scale,
        size_ids=size_ids(model, [(8 * latents.shape[-1], 8 * latents.shape[-2])] * len(latents)),
    )


def held(before: Tensor, after: Tensor, *, hold: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """As ``take_turn``, of the latents before and after a turn."""
    change = after - before
    area = area_of(change.abs().mean(1, keepdim=True), share=SHARE, whole=WHOLE)
    rest = (1 - area).expand_as(change)
    moved = ((change.square() * rest).sum((1, 2, 3)) / rest.sum((1, 2, 3)).clamp(min=1)).sqrt()
    return (torch.where(area > 0, after, before) if hold else after), area, moved


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One instruction and what it came from."""

    number: int
    """1, 2, ... in the order in which turns were taken; 0 is the original."""
    parent: int
    instruction: str
    seed: int
    changed: float = 0.0
    """The share of the picture that some turn up to here has changed."""
    drift: float = 0.0
    """How far the rest would have moved in this turn, in the latents' unit, had it not been set back."""
    settings: dict[str, Any] = field(default_factory=dict)
    autoencoder: str = ""
    """Whose latents a turn's are (networks/digest.py)."""


def _check(turn: Turn, place: int) -> None:
    """Raises TypeError or ValueError for one that no session wrote: a turn comes from an earlier one."""
    if type(turn.number) is not int or type(turn.parent) is not int or not 0 <= turn.parent < turn.number == place:
        raise ValueError(f"turn {place} does not come from an earlier one")
    texts = (turn.instruction, turn.autoencoder)
    if (
        not all(isinstance(text, str) for text in texts)
        or type(turn.seed) is not int
        or not isinstance(turn.settings, dict)
    ):
        raise TypeError(f"turn {place} has a field of another type")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (turn.changed, turn.drift)):
        raise TypeError(f"turn {place} has no numbers")


def _begun(folder: Path, names: set[str], image: Image.Image, state: dict[str, Any]) -> bool:
    """Whether what is there is the same beginning, maybe cut off."""
    with suppress(ImageError, DatasetError):
        same = pixels_digest(open_image(folder / ORIGINAL)) == pixels_digest(image)
        return (
            same
            and names <= {ORIGINAL, STATE}
            and (STATE not in names or read_json(folder / STATE, DatasetError) == state)
        )
    return False


class Session:
    """A picture and its turns, in a folder: ``say``, ``undo``, ``branch``, ``turns``.

    The folder holds the original, a picture and latents a turn, and session.json. What is there is whole, whatever
    kills the process.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a session. Raises DatasetError for a folder that holds none."""
        self.folder = Path(folder)
        if not (self.folder / STATE).is_file():
            raise DatasetError(f"{self.folder} holds no session; begin one there, as ip2p session start does")
        state = read_json(self.folder / STATE, DatasetError)
        try:
            self.turns = [Turn(**turn) for turn in state["turns"]]
            self.current, size = int(state["current"]), state["size"]
            self.size = None if size is None else (int(size[0]), int(size[1]))
            for place, turn in enumerate(self.turns, start=1):
                _check(turn, place)
        except (ArithmeticError, KeyError, TypeError, ValueError, IndexError) as error:
            raise DatasetError(f"{self.folder / STATE} is no session's ({error}); start a new one") from error
        self._turn(self.current)

    @classmethod
    def start(
        cls, picture: Picture, folder: str | Path, *, size: str = "paper", resolution: int | None = None
    ) -> Session:
        """A new session of a picture, which is copied into the folder.

        The paper's rule aims at ``resolution``, or at that of the model which takes the first turn. Raises ConfigError
        or ImageError, and DatasetError where something else is already.
        """
        folder, image = Path(folder), open_image(picture)
        later = size == "paper" and resolution is None
        planned = None if later else list(plan_size(size, *image.size, resolution or 0))
        state = {"version": VERSION, "size": planned, "current": 0, "turns": []}
        with disk_errors(folder, "read", DatasetError):
            names = {one.name for one in folder.iterdir() if one.name[0] != "."} if folder.exists() else set()
        if names and not _begun(folder, names, image, state):
            raise DatasetError(f"{folder} is not empty; give a new folder, or go on with the session that it holds")
        save_image(image, folder / ORIGINAL)
        with disk_errors(folder, "written", DatasetError):
            write_json(folder / STATE, state)
        return cls(folder)

    @property
    def original(self) -> Image.Image:
        """The picture that the session began with."""
        return open_image(self.folder / ORIGINAL)

    def picture_path(self, number: int | None = None) -> Path:
        """The file of a turn's picture; None: of the current one."""
        number = self.current if number is None else number
        return self.folder / (f"turn-{number:03d}.png" if number else ORIGINAL)

    def line(self, number: int | None = None) -> list[Turn]:
        """The turns that lead to one, the earliest first."""
        number, found = self.current if number is None else number, []
        while number:
            turn = self._turn(number)
            found.append(turn)
            number = turn.parent
        return found[::-1]

    def say(
        self,
        editor: InstructPix2Pix,
        instruction: str,
        *,
        seed: int = 0,
        config: EditConfig | None = None,
        hooks: Hooks | None = None,
        **overrides: Any,
    ) -> Turn:
        """Take a turn from the current one, which it becomes; ``overrides`` are fields of EditConfig.

        With ``detail`` the turn's picture has the original's, where a local colour transform explains all turns up to
        here; latents do not know. Raises ConfigError, DatasetError, or Interrupted.
        """
        if not instruction.strip():
            raise ConfigError("the instruction is empty; say what to do, or undo the last turn")
        chosen, spec = with_overrides(config or EditConfig(), overrides), editor.model.spec
        told = {name: getattr(chosen, name) for name in SETTINGS}
        self.size = self.size or plan_size("paper", *self.original.size, spec.resolution)
        before, area = self._state(editor, self.size)
        after, new, moved = take_turn(editor, before[None], [instruction], [seed], config=chosen, hooks=hooks)
        area = torch.maximum(area, new[0])
        turn = Turn(
            number=len(self.turns) + 1,
            parent=self.current,
            instruction=instruction,
            seed=seed,
            changed=float(area.mean()),
            drift=float(moved[0]),
            settings={name: getattr(spec, name) if value is None else value for name, value in told.items()},
            autoencoder=digest_of_autoencoder(editor.model),
        )
        self._keep(editor, turn, after[0].cpu(), area.cpu(), detail=chosen.detail)
        return turn

    def undo(self) -> int:
        """Go back to the turn before the current one; returns its number. Raises ConfigError at the original."""
        if not self.current:
            raise ConfigError("there is no turn to undo; this is the original")
        return self.branch(self._turn(self.current).parent)

    def branch(self, number: int) -> int:
        """Make an earlier turn, or 0, the original, the current one; nothing is lost. Raises ConfigError."""
        self._turn(number)
        self._write(number, self.turns)
        return number

    def _turn(self, number: int) -> Turn:
        if not 0 <= number <= len(self.turns):
            raise ConfigError(f"there is no turn {number}; there are {len(self.turns)}, and 0 is the original")
        return self.turns[number - 1] if number else Turn(number=0, parent=0, instruction="", seed=0)

    def _state(self, editor: InstructPix2Pix, size: Size) -> tuple[Tensor, Tensor]:
        """(latents (4, h, w), where something has changed (1, h, w)) of the current turn.

        Latents of another autoencoder mean nothing to this one: then it encodes the turn's picture.
        """
        if not self.current:
            first = self._encoded(editor, self.original, size)
            return first, torch.zeros_like(first[:1])
        path, places = self._latents_path(self.current), (size[1] // 8, size[0] // 8)
        try:
            state = load_file(path)
            latents, area = (state[name].to(editor.model.device) for name in ("latents", "area"))
            if latents.shape != (4, *places) or area.shape != (1, *places) or not latents.isfinite().all():
                raise ValueError(f"it is not of {size[0]} x {size[1]} pixels")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DatasetError(f"{path} cannot be read ({error}); branch from another turn") from error
        if self._turn(self.current).autoencoder not in ("", digest_of_autoencoder(editor.model)):
            latents = self._encoded(editor, open_image(self.picture_path()), size)
        return latents, area

    @staticmethod
    def _encoded(editor: InstructPix2Pix, picture: Image.Image, size: Size) -> Tensor:
        """Clean latents (4, h, w)."""
        return clean_latents(editor.model, editor.condition(picture, "-", size=size).image)[0]

    def _keep(self, editor: InstructPix2Pix, turn: Turn, latents: Tensor, area: Tensor, *, detail: bool) -> None:
        """Write a turn's latents and picture, then that there is one."""
        (edited,) = editor.pictures(latents[None].to(editor.model.device))
        picture = self.original
        (mask,) = area_pictures(area[None])
        if detail:
            (round_trip,) = editor.pictures(self._encoded(editor, picture, edited.size)[None])
            whole = with_detail(round_trip, edited, picture)
        else:
            whole = edited if edited.size == picture.size else give_back(edited, picture.size)
        picture.paste(whole, mask=whole_area(mask, picture.size))
        with disk_errors(self.folder, "written", DatasetError), whole_path(self._latents_path(turn.number)) as new:
            save_file({"latents": latents.contiguous(), "area": area.contiguous()}, new)
        told = {"session": [asdict(one) for one in [*self.line(), turn]]}
        save_image(picture, self.picture_path(turn.number), told)
        self._write(turn.number, [*self.turns, turn])

    def _latents_path(self, number: int) -> Path:
        return self.folder / f"turn-{number:03d}.safetensors"

    def _write(self, current: int, turns: Sequence[Turn]) -> None:
        """Write the state, unless another process has gone on meanwhile. Raises DatasetError."""
        refusal = f"another process takes a turn in {self.folder}; wait for it"
        with disk_errors(self.folder, "written", DatasetError), locked(self.folder / ".lock", refusal, DatasetError):
            known = read_json(self.folder / STATE, DatasetError)["turns"]
            if len(known) != len(self.turns):
                raise DatasetError(f"{self.folder} has gone on elsewhere, to turn {len(known)}; open it again")
            content = {"version": VERSION, "size": self.size and list(self.size), "current": current}
            write_json(self.folder / STATE, {**content, "turns": [asdict(turn) for turn in turns]})
        self.current, self.turns = current, list(turns)
