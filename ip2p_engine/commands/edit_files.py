"""Files in, files out: what ``ip2p edit`` does around the editor."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import with_overrides
from ..diffusion.noise import check_seed
from ..edit import EditConfig, EditResult, InstructPix2Pix
from ..errors import ConfigError, ImageError, Interrupted
from ..hooks import Hooks
from ..images import (
    MIN_SIDE,
    PNG_LEVEL,
    check_output,
    is_picture_name,
    open_image,
    open_mask,
    plan_size,
    read_exif,
    save_image,
    upright_size,
)
from ..pictures import full_size
from ..progress import progress, write_note
from ..scenes.notice import NOTICE, PHOTOS_NOTICE, is_scene, model_for
from ..tokenizer import check_length
from .edit_sources import Row, Source
from .options import stop_signals

__all__ = ["Writing", "edit_files", "output_paths"]

STDOUT = Path("-")
WRITERS = 2
LONGEST, NUMBER = 255, 6  # bytes of a file's name on nearly every disk, and of them for "_1234" where it is taken


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Where results go and how."""

    out: Path
    """A folder, a file, or - for standard output."""
    png_level: int = PNG_LEVEL
    keep_exif: bool = False
    strict: bool = False
    """A broken picture ends the command before the network runs; otherwise it is named and left out."""


def edit_files(
    rows: Sequence[Row],
    *,
    load: Callable[[str], InstructPix2Pix],
    checkpoint: str | None,
    config: EditConfig,
    writing: Writing,
    show: Callable[[dict[str, Any]], None],
    mask: Path | None = None,
    control: Path | None = None,
) -> None:
    """Make every row's picture; each is written, and its settings with its file shown, while the network goes on.

    Without a ``checkpoint`` each picture is edited by the embedded model that it is for. Settings, names and what the
    pictures' headers say are checked before a checkpoint is loaded. Memory does not grow with the rows. Raises
    ImageError at the end if pictures were left out, and Interrupted after Ctrl-C or SIGTERM; what was shown stays.
    """
    paths = _checked_paths(rows, writing.out)
    if mask is not None:
        open_mask(mask, (MIN_SIDE, MIN_SIDE))
    if control is not None:
        open_image(control)
    left_out = _LeftOut(len({row.source for row in rows}))
    _check_sources(rows, config, writing.strict, left_out)
    groups = _groups(rows, config, checkpoint, left_out)
    editors = {name: load(name) for name in {group.checkpoint: None for group in groups}}
    with (
        stop_signals() as should_stop,
        progress(len(rows), "edits") as bar,
        _Writers(rows, paths, writing, show) as out,
    ):
        finished = 0
        try:
            for group in groups:
                chosen, editor = [rows[place] for place in group.places], editors[group.checkpoint]
                notice = _notice(editor.name, named=checkpoint is not None)
                results = editor.edits_each(
                    [row.source.picture for row in chosen],
                    [row.instruction for row in chosen],
                    seeds=[row.seed for row in chosen],
                    masks=mask,
                    control_images=control,
                    config=group.config,
                    hooks=Hooks(
                        should_stop=should_stop,
                        on_error=lambda place, error, chosen=chosen: left_out.add(chosen[place].source, error),  # type: ignore[misc]
                    ),
                )
                for result in results:
                    out.put(group.places[result.index], result, notice)
                    finished += 1
                    bar(finished, len(rows))
        except Interrupted as error:
            out.finish()
            raise Interrupted(f"stopped with {out.written} of {len(rows)} results written") from error
    left_out.conclude()


def _checked_paths(rows: Sequence[Row], out: Path) -> list[Path]:
    """Where each result goes, once every row can be made and written."""
    for row in rows:
        check_seed(row.seed)
        check_length(row.instruction)
    paths = output_paths(rows, out)
    if out != STDOUT:
        check_output(paths[0], {"instruction": max((row.instruction for row in rows), key=len)})
    return paths


@dataclass
class _LeftOut:
    """Pictures that cannot be edited, each named once."""

    sources: int
    errors: dict[Source, Exception] = field(default_factory=dict)

    def add(self, source: Source, error: Exception) -> None:
        if source not in self.errors:
            self.errors[source] = error = source.told(error)
            if self.sources > 1:
                write_note(f"ip2p: left out: {error}")

    def conclude(self) -> None:
        """Raises ImageError if there were any."""
        if self.sources == 1 and self.errors:
            raise next(iter(self.errors.values()))
        if self.errors:
            names = ", ".join(source.name for source in [*self.errors][:3]) + (" ..." if len(self.errors) > 3 else "")
            made = "none is left to edit" if len(self.errors) == self.sources else "the others are made"
            raise ImageError(f"{len(self.errors)} of {self.sources} pictures are left out ({names}); {made}")


def _check_sources(rows: Sequence[Row], config: EditConfig, strict: bool, left_out: _LeftOut) -> None:
    """Headers, sizes; with ``strict`` the pixels too. Raises ImageError if nothing is left."""
    for source in {id(row.source): row.source for row in rows}.values():
        try:
            if source.fault:
                raise source.fault
            size = open_image(source.picture).size if strict else upright_size(source.picture)
        except ImageError as error:
            if strict:
                raise source.told(error) from error
            left_out.add(source, error)
        else:
            plan_size(config.size, *size, config.resolution or 512)
    if len(left_out.errors) == left_out.sources:
        left_out.conclude()


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Places of the rows that one editor makes with one set of settings."""

    checkpoint: str
    config: EditConfig
    places: list[int] = field(default_factory=list)


def _groups(rows: Sequence[Row], config: EditConfig, checkpoint: str | None, left_out: _LeftOut) -> list[_Group]:
    """Rows of the same model and settings together, without those of broken pictures."""
    groups: dict[tuple[str, str], _Group] = {}
    models: dict[Source, str] = {}
    for place, row in enumerate(rows):
        own = with_overrides(config, row.settings)
        if row.source not in left_out.errors and row.source not in models:
            try:
                models[row.source] = checkpoint or model_for(open_image(row.source.picture))
            except ImageError as error:
                left_out.add(row.source, error)
        if row.source not in left_out.errors:
            key = models[row.source], json.dumps(dict(row.settings), sort_keys=True)
            groups.setdefault(key, _Group(checkpoint=key[0], config=own)).places.append(place)
    if len(left_out.errors) == left_out.sources:
        left_out.conclude()
    return list(groups.values())


def _notice(name: str, *, named: bool) -> str:
    """What is said of a picture that is no scene; empty: nothing."""
    return NOTICE if name == "embedded" else "" if named else PHOTOS_NOTICE


def output_paths(rows: Sequence[Row], out: Path) -> list[Path]:
    """Where each result goes: the file that was named, or names in a folder, which may be taken.

    Raises ConfigError if one file is named for several results, or is a source.
    """
    if out == STDOUT or (is_picture_name(out) and not os.path.isdir(out)):
        what = "standard output" if out == STDOUT else f"--out {out}"
        if len(rows) > 1:
            raise ConfigError(f"{what} is one file and there are {len(rows)} results; name a folder instead")
        picture = rows[0].source.picture
        if isinstance(picture, str) and os.path.exists(out) and os.path.exists(picture) and out.samefile(picture):
            raise ConfigError(f"--out {out} is the picture to edit, which would be lost; name another file or a folder")
        return [out]
    return [out / _name_of(row) for row in rows]


def _name_of(row: Row) -> str:
    """stem_edited_2_seed7.png; a stem that is too long for a file's name is cut."""
    ending = "_".join(["_edited", *([str(row.number)] if row.number else []), f"seed{row.seed}"]) + ".png"
    room = LONGEST - NUMBER - len(ending)
    return os.fsencode(row.source.stem)[:room].decode(sys.getfilesystemencoding(), "ignore") + ending


class _Writers:
    """Threads that bring results to their size and encode them; a few at a time, shown in their order."""

    def __init__(
        self,
        rows: Sequence[Row],
        paths: Sequence[Path],
        writing: Writing,
        show: Callable[[dict[str, Any]], None],
    ) -> None:
        self._rows, self._paths, self._writing, self._show = rows, paths, writing, show
        self._told = False
        self._pool = ThreadPoolExecutor(max_workers=WRITERS, thread_name_prefix="ip2p-write")
        self._pending: deque[Future[dict[str, Any]]] = deque()
        self.written = 0

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.finish()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def put(self, place: int, result: EditResult, notice: str) -> None:
        """Hand on a result, and what is said of a picture that is no scene; waits while too many are on their way."""
        self._pending.append(self._pool.submit(self._write, place, result, notice))
        self._show_finished(WRITERS)

    def finish(self) -> None:
        """Wait for all. Raises ImageError if one could not be written."""
        self._show_finished(0)

    def _show_finished(self, waiting: int) -> None:
        while self._pending and (len(self._pending) > waiting or self._pending[0].done()):
            row = self._pending.popleft().result()
            self.written += 1
            if "notice" in row and not self._told:
                write_note(f"ip2p: {row['source']}: {row['notice']}")
                self._told = True
            self._show(row)

    def _write(self, place: int, result: EditResult, notice: str) -> dict[str, Any]:
        source, writing = self._rows[place].source, self._writing
        settings = {**result.settings, "source": source.name}
        exif = read_exif(source.picture) if writing.keep_exif else None
        with full_size(math.prod(result.size)):
            strange = notice and result.seen is not None and not is_scene(result.seen)
            target: Any = sys.stdout.buffer if writing.out == STDOUT else self._paths[place]
            new = target != writing.out and writing.out != STDOUT
            path = save_image(result.image, target, settings, new=new, png_level=writing.png_level, exif=exif)
        told = {"notice": notice} if strange else {}
        return {"file": str(path), "evaluations": result.evaluations, **settings, **told}
