"""Data sets out again: the original repository's folders."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DatasetError
from ..files import disk_errors, whole_file, write_json
from ..images import open_image
from .record import IMAGE_COLUMNS, PairRecord

__all__ = ["write_original"]

METADATA = {
    "p": "p2p_threshold",
    "cfg": "cfg_scale",
    "sim_0": "clip_sim_0",
    "sim_1": "clip_sim_1",
    "sim_image": "clip_sim_image",
    "sim_direction": "clip_sim_dir",
}
CAPTION_FOLDER = re.compile(r"[0-9]{7}")


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
