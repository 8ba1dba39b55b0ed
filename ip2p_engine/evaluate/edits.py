"""The edits of a test set by checkpoints, and the field's tables of them.

Each row's picture is edited by its instruction. Turns of a session (MagicBrush) are edited from the true picture before
them, and on wish each from the result of the turn before. What is made lies in the folder and is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from ..data.parquet import numbered
from ..data.reading import Pairs
from ..data.record import PairRecord
from ..data.values import format_of
from ..edit import EditConfig, InstructPix2Pix
from ..errors import DatasetError, first_line
from ..files import digest_of_text, disk_errors, is_within, json_lines, read_json, whole_file, write_json
from ..hooks import Hooks
from ..images import open_image, save_image
from ..networks.digest import fingerprint
from ..strips import strip
from .pairs import EMU, MAGICBRUSH, EditedPicture
from .report import tiled
from .run_folder import Row, Table

__all__ = [
    "PUBLISHED",
    "TestEdit",
    "benchmark_tables",
    "edited_pictures",
    "examples",
    "keep_picture",
    "last_turns",
    "load_edits",
    "make_edits",
    "save_edits",
    "write_truth",
]

SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
PICTURES = ("source", "target", "mask")
NOTHING = type(None)
TYPES = {
    "number": (int,),
    "turn": (int,),
    **dict.fromkeys(("source", "instruction", "caption", "edited_caption", "session"), (str,)),
    **dict.fromkeys(("target", "mask", "kind"), (str, NOTHING)),
    "about": (dict,),
}
AT_ONCE = 64  # pictures in memory
MADE, EDITS = "made.json", "edits.jsonl"
PUBLISHED = {"InstructPix2Pix": {"l1": 0.1122, "clip_i": 0.8524, "dino": 0.7428}}
PUBLISHED_WHERE = (
    "Published by Zhang et al. 2023 for MagicBrush's test set, single turn: beside no other data, CLIP or DINO"
)


@dataclass(frozen=True, kw_only=True)
class TestEdit:
    """One edit of a test set; its pictures lie in the folder."""

    __test__ = False  # pytest takes every Test... for one of its own

    number: int
    source: Path
    target: Path | None
    mask: Path | None
    instruction: str
    caption: str
    edited_caption: str
    kind: str | None
    session: str
    turn: int
    """From 0, within the session."""
    about: Mapping[str, str] = field(default_factory=dict)
    """What a benchmark's own files say of it, its "key" among that."""

    @property
    def name(self) -> str:
        return f"{self.number:06d}.png"


def write_truth(
    pairs: Pairs, folder: Path, limit: int | None = None, *, rows: Container[int] | None = None
) -> tuple[list[TestEdit], list[str]]:
    """(the edits of a test set, whose pictures are now in ``folder``; what is wrong with rows that are left out).

    ``rows``: only these.
    """
    found: list[TestEdit] = []
    broken: list[str] = []
    turns: dict[str, int] = {}
    for number, pair in numbered(_outcomes(pairs)):
        if limit is not None and len(found) >= limit:
            break
        if rows is not None and number not in rows:
            continue
        if isinstance(pair, DatasetError):
            broken.append(str(pair))
            continue
        session = pair.session or f"row {number}"
        turns[session] = turns.get(session, -1) + 1
        pictures = {"source": pair.original_image, "target": pair.edited_image, "mask": pair.mask}
        files = {name: keep_picture(folder / name, number, data) for name, data in pictures.items() if data is not None}
        found.append(
            TestEdit(
                number=number,
                source=files["source"],
                target=files["target"],
                mask=files.get("mask"),
                instruction=pair.edit_prompt,
                caption=pair.original_prompt,
                edited_caption=pair.edited_prompt,
                kind=pair.kind,
                session=session,
                turn=turns[session],
            )
        )
    if not found:
        raise DatasetError(f"no row can be edited; the first: {broken[0] if broken else 'there is none'}")
    save_edits(found, folder)
    return found, broken


def save_edits(edits: Sequence[TestEdit], folder: Path) -> None:
    """Beside the pictures, for who judges them later; paths are relative to the folder."""
    rows = [{name: _relative(value, folder) for name, value in vars(one).items()} for one in edits]
    with disk_errors(folder, "written", DatasetError), whole_file(folder / EDITS) as stream:
        stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _relative(value: Any, folder: Path) -> Any:
    return value.relative_to(folder).as_posix() if isinstance(value, Path) else value


def load_edits(folder: Path) -> list[TestEdit]:
    """The edits of a test set whose pictures lie in ``folder``, as ``write_truth`` left them. Raises DatasetError."""
    path = folder / EDITS
    if not path.exists():
        made = "ip2p evaluate edits makes it, also where it is run again over a folder of its own"
        raise DatasetError(f"{folder} holds no {EDITS}; {made}")
    try:
        return [_loaded(row, folder) for row in json_lines(path, DatasetError)]
    except (TypeError, ValueError, KeyError) as error:
        raise DatasetError(
            f"{path} is no list of edits ({first_line(error)}); run ip2p evaluate edits again"
        ) from error


def _loaded(row: Mapping[str, Any], folder: Path) -> TestEdit:
    """An edit of a line; raises ValueError for values of other types, and for pictures outside the folder."""
    for name, types in TYPES.items():
        if name in row and type(row[name]) not in types:
            raise ValueError(f"its {name} is {str(row[name])[:60]!r}")
    named = {name: row[name] for name in PICTURES if row[name] is not None}
    if outside := [value for value in named.values() if not is_within(value)]:
        raise ValueError(f"{outside[0][:60]!r} does not lie below it")
    return TestEdit(**{**row, **{name: folder / value for name, value in named.items()}})


def _outcomes(pairs: Any) -> Iterator[PairRecord | DatasetError]:
    return pairs.outcomes() if hasattr(pairs, "outcomes") else iter(pairs)


def keep_picture(folder: Path, number: int, data: bytes) -> Path:
    """Write an encoded picture of a row, if it is not there; returns its path. Raises DatasetError."""
    path = folder / f"{number:06d}{SUFFIXES.get(format_of(data), '.png')}"
    with disk_errors(path, "written", DatasetError):
        if not path.exists() or path.read_bytes() != data:
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as stream:
                stream.write(data)
    return path


def make_edits(
    edits: Sequence[TestEdit],
    editor: InstructPix2Pix,
    folder: Path,
    *,
    config: EditConfig,
    seed: int = 0,
    own_turns: bool = False,
    hooks: Hooks | None = None,
) -> None:
    """Write each edit as a PNG of its name; row n has the seed ``seed`` + n. What is there is not made again.

    ``own_turns``: a later turn of a session starts from the result of the one before. Raises DatasetError where the
    folder holds edits of other rows, by another checkpoint or with other settings.
    """
    hooks = hooks or Hooks()
    _claim(folder, edits, editor, config, seed, own_turns=own_turns)
    result_of = {(one.session, one.turn): folder / one.name for one in edits}
    finished = 0
    for round_ in _rounds(edits, own_turns=own_turns):
        missing = [one for one in round_ if not (folder / one.name).exists()]
        finished += len(round_) - len(missing)
        for start in range(0, len(missing), AT_ONCE):
            group = missing[start : start + AT_ONCE]
            sources = [result_of[one.session, one.turn - 1] if own_turns and one.turn else one.source for one in group]
            made = editor.edits_each(
                [str(path) for path in sources],
                [one.instruction for one in group],
                seeds=[seed + one.number for one in group],
                config=config,
                hooks=Hooks(should_stop=hooks.should_stop, on_step=hooks.on_step),
            )
            for result in made:
                save_image(result.image, folder / group[result.index].name, result.settings)
                finished += 1
                hooks.progress(finished, len(edits))


def _claim(
    folder: Path, edits: Sequence[TestEdit], editor: InstructPix2Pix, config: EditConfig, seed: int, *, own_turns: bool
) -> None:
    """Note what the pictures of a folder are made of, or hold it against what is noted there."""
    rows = "\n".join(f"{one.number} {one.session} {one.instruction}" for one in edits)
    made = {
        "checkpoint": fingerprint(editor.model.unet),
        "rows": digest_of_text(rows),
        "settings": {name: value for name, value in asdict(config).items() if name != "batch"},
        "seed": seed,
        "own_turns": own_turns,
    }
    path = folder / MADE
    if path.exists():
        known = read_json(path, DatasetError)
        other = [name for name in made if not isinstance(known, dict) or known.get(name) != _plain(made[name])]
        if other:
            raise DatasetError(f"{folder} holds edits of other {other[0]}; give a new folder, or remove this one")
        return
    with disk_errors(folder, "written", DatasetError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, made)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _rounds(edits: Sequence[TestEdit], *, own_turns: bool) -> Iterator[Sequence[TestEdit]]:
    """Edits that can be made at once: all, or the first turns, then the second ones."""
    if not own_turns:
        yield edits
        return
    for turn in range(1 + max(one.turn for one in edits)):
        yield [one for one in edits if one.turn == turn]


def last_turns(edits: Sequence[TestEdit]) -> list[TestEdit]:
    """Of each session the last."""
    return list({one.session: one for one in edits}.values())


def edited_pictures(edits: Sequence[TestEdit], folder: Path) -> list[EditedPicture]:
    """What is measured of edits that were made in ``folder``."""
    return [
        EditedPicture(
            name=f"{folder.name}/{one.name}",
            source=one.source,
            edited=folder / one.name,
            target=one.target,
            mask=one.mask,
            caption=one.caption or None,
            edited_caption=one.edited_caption or None,
        )
        for one in edits
    ]


def examples(made: Mapping[str, tuple[Sequence[TestEdit], Path]], count: int = 6, height: int = 192) -> Image.Image:
    """The first edits that all checkpoints have, a row each: before, by each checkpoint, and the true one."""
    numbers = set.intersection(*({one.number for one in edits} for edits, _ in made.values()))
    shown = [one for one in next(iter(made.values()))[0] if one.number in numbers][:count]
    rows = []
    for one in shown:
        paths = [one.source, *(folder / one.name for _, folder in made.values())]
        paths, words = (paths, []) if one.target is None else ([*paths, one.target], ["target"])
        rows.append(strip(map(open_image, paths), [one.instruction, *made, *words], height=height))
    return tiled(rows)


def benchmark_tables(measured: Mapping[str, tuple[Sequence[TestEdit], Sequence[Row]]]) -> list[Table]:
    """MagicBrush's and Emu Edit's means, a line a checkpoint, and by kind of edit where the data names kinds."""
    tables = []
    for title, names, published in (
        ("MagicBrush: edited against target", MAGICBRUSH, PUBLISHED),
        ("Emu Edit: edited against source", EMU, {}),
    ):
        if all(one.target is None for edits, _ in measured.values() for one in edits) and names is MAGICBRUSH:
            continue
        there = {key for _, rows in measured.values() for row in rows for key in row if row[key] is not None}
        names = {
            name: key for name, key in names.items() if key in there or any(key in one for one in published.values())
        }
        lines = [(label, len(rows), *_means(rows, names)) for label, (_, rows) in measured.items()]
        below = [(label, "", *_cells(known, names)) for label, known in published.items()]
        note = _equal_captions(measured) if "clip_dir" in names.values() else ""
        apart: dict[str, Any] = {"apart": PUBLISHED_WHERE, "rows_apart": below} if below else {}
        tables.append(Table(title=title, columns=("checkpoint", "n", *names), rows=lines, note=note, **apart))
        kinds = sorted({one.kind for edits, _ in measured.values() for one in edits if one.kind})
        if kinds:
            by_kind = [
                (label, kind, len(chosen), *_means(chosen, names))
                for label, (edits, rows) in measured.items()
                for kind in kinds
                if (chosen := [row for one, row in zip(edits, rows, strict=True) if one.kind == kind])
            ]
            tables.append(Table(title=f"{title}, by kind", columns=("checkpoint", "kind", "n", *names), rows=by_kind))
    return tables


def _equal_captions(measured: Mapping[str, tuple[Sequence[TestEdit], Sequence[Row]]]) -> str:
    edits = next(iter(measured.values()))[0]
    equal = sum(bool(one.caption) and one.caption == one.edited_caption for one in edits)
    return f"{equal} rows have equal captions, which give no direction, and are left out of CLIP-dir." if equal else ""


def _means(rows: Sequence[Row], names: Mapping[str, str]) -> list[str]:
    found = {key: [row[key] for row in rows if row.get(key) is not None] for key in names.values()}
    return _cells({key: fmean(values) for key, values in found.items() if values}, names)


def _cells(values: Mapping[str, float], names: Mapping[str, str]) -> list[str]:
    return [f"{values[key]:.4f}" if key in values else "" for key in names.values()]
