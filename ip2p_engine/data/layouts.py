"""Foreign layouts of edit data sets, in and out: the original repository's folders, and lists of triplets.

The original layout (``dataset_creation/`` of the authors' code): one folder a caption pair, ``0000012/prompt.json``
with input (or caption), edit and output; ``{seed}_0.jpg`` before and ``{seed}_1.jpg`` after; ``metadata.jsonl`` with
a line of scores a seed; above them ``seeds.json``, [[folder, [seed, ...]], ...].
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DatasetError
from ..files import csv_rows, disk_errors, json_lines, read_json, whole_file, write_json
from ..images import open_image
from .store import IMAGE_COLUMNS, PairRecord

__all__ = ["is_original", "listing", "named", "read_original", "read_triplets", "write_original"]

NAMES = {
    "original_prompt": ("original_prompt", "caption", "input", "original_caption"),
    "edit_prompt": ("edit_prompt", "instruction", "edit"),
    "edited_prompt": ("edited_prompt", "edited_caption", "output"),
    "original_image": ("original_image", "source_image", "source", "input_image"),
    "edited_image": ("edited_image", "target_image", "target"),
}
METADATA = {
    "p": "p2p_threshold",
    "cfg": "cfg_scale",
    "sim_0": "clip_sim_0",
    "sim_1": "clip_sim_1",
    "sim_image": "clip_sim_image",
    "sim_direction": "clip_sim_dir",
}
CAPTION_FOLDER = re.compile(r"[0-9]{7}")
KEPT_FORMATS = ("PNG", "JPEG", "WEBP")


def is_original(folder: Path) -> bool:
    """Whether a folder is laid out as the original repository's."""
    return (folder / "seeds.json").exists() or any(folder.glob("*/prompt.json"))


def read_original(folder: Path) -> Iterator[PairRecord]:
    """The pairs of an original data set, pictures byte for byte; with or without seeds.json and metadata.jsonl.

    Raises DatasetError for a file that is missing or broken.
    """
    for name, seeds in listing(folder):
        place = folder / name
        prompt = read_json(place / "prompt.json", DatasetError)
        texts: dict[str, Any] = {column: named(prompt, column, place / "prompt.json") for column in list(NAMES)[:3]}
        log = place / "metadata.jsonl"
        metadata = {str(row.get("seed")): row for row in json_lines(log, DatasetError)} if log.exists() else {}
        for seed in seeds:
            row = metadata.get(seed, {})
            scores: dict[str, Any] = {column: _number(row, theirs, log) for column, theirs in METADATA.items()}
            before, after = (_picture(place / f"{seed}_{n}.jpg") for n in (0, 1))
            key, number = f"{name}/{seed}", _seed({"seed": seed}, place)
            yield PairRecord(original_image=before, edited_image=after, seed=number, key=key, **texts, **scores)


def listing(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, seeds) as seeds.json lists them, or else as the files are there."""
    path = folder / "seeds.json"
    if path.exists():
        rows = read_json(path, DatasetError)
        try:
            found = [(str(name), [str(int(seed)) for seed in seeds]) for name, seeds in rows]
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{path} is no list of [folder, [seeds]]; remove it to go by the files") from error
        for name, _ in found:
            if Path(name).name != name:
                raise DatasetError(f"{path} names {name!r}, which is no folder beside it; correct it")
        yield from found
        return
    for prompt in sorted(folder.glob("*/prompt.json")):
        seeds = sorted(before.name.removesuffix("_0.jpg") for before in prompt.parent.glob("*_0.jpg"))
        yield prompt.parent.name, [seed for seed in seeds if seed.isdecimal()]


def named(row: Any, column: str, place: Any) -> str:
    """The value of a column under any of its names in the field; raises DatasetError if it has none."""
    if not isinstance(row, Mapping):
        raise DatasetError(
            f"{place} is no JSON object; give one with {', '.join(names[0] for names in NAMES.values())}"
        )
    for name in NAMES[column]:
        if isinstance(row.get(name), str):
            return row[name]
    raise DatasetError(f"{place} has no {' or '.join(NAMES[column])}, only {', '.join(map(str, row))}; add it")


def read_triplets(path: Path) -> Iterator[PairRecord]:
    """The pairs of a CSV or JSON Lines file: paths of two pictures, beside it or absolute, and an instruction.

    Captions, seed and scores are optional. Raises DatasetError for a row that lacks the rest.
    """
    for number, row in enumerate(_rows(path)):
        place = f"{path}, row {number + 1},"
        pictures: dict[str, Any] = {
            column: _picture(path.parent / named(row, column, place)) for column in list(NAMES)[3:]
        }
        texts: dict[str, Any] = {column: _optional(row, column) for column in ("original_prompt", "edited_prompt")}
        texts["edit_prompt"] = named(row, "edit_prompt", place)
        texts["seed"] = _seed(row, place)
        scores: dict[str, Any] = {column: _number(row, column, place) for column in METADATA}
        yield PairRecord(**pictures, **texts, **scores, key=str(row.get("key") or f"{path.stem}/{number}"))


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix.lower() == ".csv":
        yield from csv_rows(path, DatasetError)
    else:
        yield from json_lines(path, DatasetError)


def _optional(row: Mapping[str, Any], column: str) -> str:
    return next((str(row[name]) for name in NAMES[column] if row.get(name)), "")


def _number(row: Mapping[str, Any], column: str, place: Any) -> float | None:
    value: Any = row.get(column)
    try:
        number = None if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if number is not None and not math.isfinite(number):
        raise DatasetError(f"{place} has the {column} {value!r}; give a number, or leave it out")
    return number


def _seed(row: Mapping[str, Any], place: Any) -> int | None:
    value: Any = row.get("seed")
    if value in (None, ""):
        return None
    try:
        seed = int(str(value).removesuffix(".0"))  # spreadsheets write 12 as 12.0
    except ValueError:
        seed = 2**63
    if not -(2**63) <= seed < 2**63:
        raise DatasetError(f"{place} has the seed {value!r}; give a whole number below 2**63, or leave it out")
    return seed


def _picture(path: Path) -> bytes:
    """The file as it is, if it is a picture in a format of the store, else as PNG."""
    if "\0" in str(path):
        raise DatasetError(f"{str(path)!r} is no path, since it holds a NUL; correct it")
    with disk_errors(path, "read", DatasetError):
        data = path.read_bytes()
    return data if _format(data, path) in KEPT_FORMATS else _encoded(data, "PNG", str(path))


def _format(data: bytes, name: Any) -> str | None:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.format
    except Exception as error:  # as in images.open_image: decoders raise nearly every class
        raise DatasetError(f"{name} is no picture; restore it, or leave the pair out") from error


def _encoded(data: bytes, kind: str, name: str) -> bytes:
    stream = io.BytesIO()
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    open_image(data, name=name).save(stream, kind, **options)
    return stream.getvalue()


def write_original(pairs: Iterable[PairRecord], folder: Path) -> int:
    """Write pairs as the original repository does, JPEGs byte for byte, others at quality 100; returns their number.

    A key such as 0000012/34 names the folder; other pairs are gathered by their texts, in the order of appearance.
    seeds.json comes last, so a folder without it is unfinished. Raises DatasetError if the folder is not empty.
    """
    numbers: dict[Any, str] = {}
    seeds: dict[str, list[str]] = {}
    with disk_errors(folder, "written", DatasetError, "free some space and export to a new folder"):
        if folder.exists() and any(folder.iterdir()):
            raise DatasetError(f"{folder} is not empty; export to a new folder")
        for pair in pairs:
            name = _caption_folder(pair, numbers)
            if name not in seeds:
                seeds[name] = []
                _begin(folder / name, pair)
            seed = str(len(seeds[name]) if pair.seed is None else pair.seed)
            if seed in seeds[name]:
                raise DatasetError(
                    f"{folder / name} would get seed {seed} twice (pair {pair.key!r}); give each its own"
                )
            _write_pair(folder / name, seed, pair)
            seeds[name].append(seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "seeds.json", sorted([name, sorted(of)] for name, of in seeds.items()))
    return sum(map(len, seeds.values()))


def _caption_folder(pair: PairRecord, numbers: dict[Any, str]) -> str:
    prefix = pair.key.rpartition("/")[0]
    if CAPTION_FOLDER.fullmatch(prefix):
        return prefix
    return numbers.setdefault((pair.original_prompt, pair.edit_prompt, pair.edited_prompt), f"{len(numbers):07d}")


def _begin(place: Path, pair: PairRecord) -> None:
    place.mkdir(parents=True)
    prompt = {"input": pair.original_prompt, "edit": pair.edit_prompt, "output": pair.edited_prompt}
    # Both names, since the authors' generator asks for one and their published file has the other.
    (place / "prompt.json").write_text(json.dumps({**prompt, "caption": pair.original_prompt}), encoding="utf-8")


def _write_pair(place: Path, seed: str, pair: PairRecord) -> None:
    for n, column in enumerate(IMAGE_COLUMNS):
        data, name = getattr(pair, column), f"the {column} of pair {pair.key or f'{place.name}/{seed}'}"
        with whole_file(place / f"{seed}_{n}.jpg") as stream:
            stream.write(data if _format(data, name) == "JPEG" else _encoded(data, "JPEG", name))
    row = {"seed": int(seed), **{theirs: getattr(pair, column) for column, theirs in METADATA.items()}}
    with (place / "metadata.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(row) + "\n")
