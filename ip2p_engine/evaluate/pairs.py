"""MagicBrush's and Emu Edit's numbers of edits that exist as files.

MagicBrush (Zhang et al. 2023) compares an edit with the target picture, Emu Edit (Sheynin et al. 2024) with the source.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..clip.similarity import ClipSimilarity
from ..errors import DatasetError, ImageError, IP2PError
from ..files import csv_rows, disk_errors, json_lines
from ..hooks import Hooks
from ..images import mask_levels, open_image
from ..networks.digest import fingerprint
from .metrics import (
    MASK_WHITE,
    Dino,
    Lpips,
    background,
    clip_features,
    distances,
    fitted_mask,
    mean_difference,
)
from .run_folder import NUMBER, Row, Table, row_key, row_log

__all__ = ["MAGICBRUSH", "EditedPicture", "measure_picture", "measure_table", "pair_tables", "read_table"]

PICTURES = ("source", "edited", "target", "mask")
TEXTS = ("caption", "edited_caption")
MAGICBRUSH = {"L1": "l1", "L2": "l2", "CLIP-I": "clip_i", "DINO": "dino", "CLIP-T": "clip_t"}
EMU = {"CLIP-dir": "clip_dir", "CLIP-im": "clip_im", "CLIP-out": "clip_out", "L1": "source_l1", "DINO": "source_dino"}
KEPT = {
    "PSNR to target": "psnr",
    "SSIM to target": "ssim",
    "background PSNR": "background_psnr",
    "background SSIM": "background_ssim",
    "background LPIPS": "background_lpips",
}
NUMBERS = dict.fromkeys((*MAGICBRUSH.values(), *EMU.values(), *KEPT.values(), "background_l2"), NUMBER)


@dataclass(frozen=True, kw_only=True)
class EditedPicture:
    """One row of the table; what is None leaves the numbers out that need it."""

    name: str
    source: Path
    edited: Path
    target: Path | None = None
    mask: Path | None = None
    caption: str | None = None
    edited_caption: str | None = None


def read_table(path: Path) -> list[EditedPicture]:
    """Rows of a .csv or .jsonl file with columns source, edited and maybe target, mask, caption, edited_caption.

    Paths are relative to the file. Raises DatasetError, naming the row, for what is missing.
    """
    rows = [_edited_picture(row, number, path) for number, row in enumerate(_rows(path), start=1)]
    if not rows:
        raise DatasetError(f"{path} has no rows; give one a picture, with columns source and edited")
    return rows


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix.lower() == ".jsonl":
        yield from json_lines(path, DatasetError)
        return
    if path.suffix.lower() != ".csv":
        raise DatasetError(f"{path} is neither .csv nor .jsonl; give one of these with columns source, edited, ...")
    yield from csv_rows(path, DatasetError)


def _edited_picture(row: dict[str, Any], number: int, path: Path) -> EditedPicture:
    for name in ("source", "edited"):
        if not row.get(name):
            raise DatasetError(f"{path}, row {number}, has no {name}; give the columns source and edited")
    for name in (*PICTURES, *TEXTS):
        if not isinstance(row.get(name) or "", str):
            raise DatasetError(f"{path}, row {number}: {name} is {row[name]!r}; give a text")
    files = {name: path.parent / row[name] for name in PICTURES if row.get(name)}
    return EditedPicture(
        name=row["edited"],
        source=files["source"],
        edited=files["edited"],
        target=files.get("target"),
        mask=files.get("mask"),
        caption=row.get("caption") or None,
        edited_caption=row.get("edited_caption") or None,
    )


def measure_table(
    table: Path,
    rows: Sequence[EditedPicture],
    clip: ClipSimilarity,
    dino: Dino | None = None,
    lpips: Lpips | None = None,
    *,
    folder: Path | None = None,
    hooks: Hooks | None = None,
) -> list[Row]:
    """Rows of a table with their numbers; with a ``folder`` they grow in its rows.jsonl, and none is measured twice.

    A number without a finite value is None. Raises what ``measure_picture`` does, naming the row.
    """
    hooks = hooks or Hooks()
    networks: Row = {"clip": fingerprint(clip.network), "lpips": lpips is not None}
    networks["dino"] = None if dino is None else fingerprint(dino.network)
    found = []
    with row_log(folder, NUMBERS, optional=NUMBERS) as (known, append):
        for number, row in enumerate(rows, start=1):
            hooks.check_stop(f"stopped after {number - 1} of {len(rows)} pictures")
            try:
                identity = {**_identity(row), "networks": networks}
                numbers = None if row_key(identity) in known else measure_picture(row, clip, dino, lpips)
            except IP2PError as error:
                raise type(error)(f"{table}, row {number}: {error}") from error
            if numbers is not None:  # JSON has no infinity
                append([{**identity, **{k: v if math.isfinite(v) else None for k, v in numbers.items()}}])
            found.append(known[row_key(identity)])
            hooks.progress(number, len(rows))
    return found


def _identity(row: EditedPicture) -> Row:
    """What a row of the table says, with a checksum of each file."""
    checksums = {}
    for name, path in ((name, getattr(row, name)) for name in PICTURES if getattr(row, name) is not None):
        with disk_errors(path, "read", ImageError):
            if path.exists() and not path.is_file():  # a pipe or a device is read without end
                raise ImageError(f"{path} is no file; give a picture's")
            checksums[name] = f"{zlib.crc32(path.read_bytes()):08x}"
    return {"edited": row.name, "caption": row.caption, "edited_caption": row.edited_caption, "checksums": checksums}


def measure_picture(
    row: EditedPicture, clip: ClipSimilarity, dino: Dino | None = None, lpips: Lpips | None = None
) -> dict[str, float]:
    """All numbers that a row has what it takes for. Raises ImageError for a picture that cannot be read."""
    source, edited = open_image(row.source), open_image(row.edited)
    target = None if row.target is None else open_image(row.target)
    pictures = {"source": source, "edited": edited} | ({} if target is None else {"target": target})
    numbers = {"source_l1": mean_difference(edited, source)}
    numbers |= {} if target is None else distances(edited, target)
    numbers |= _clip_numbers(row, clip, pictures)
    if dino is not None:
        features = dict(zip(pictures, dino.features(list(pictures.values())), strict=True))
        numbers["source_dino"] = _cosine(features["edited"], features["source"])
        numbers |= {} if target is None else {"dino": _cosine(features["edited"], features["target"])}
    mask = None if row.mask is None else fitted_mask(mask_levels(row.mask)[0], source)
    if mask is not None and mask.histogram()[:MASK_WHITE] != [0] * MASK_WHITE:  # else there is no outside
        numbers |= background(source, edited, mask)
        numbers |= {} if lpips is None else {"background_lpips": lpips.background(source, edited, mask)}
    return numbers


def _clip_numbers(row: EditedPicture, clip: ClipSimilarity, pictures: dict[str, Image.Image]) -> dict[str, float]:
    features = dict(zip(pictures, clip_features(clip, list(pictures.values())), strict=True))
    source, edited = features["source"], features["edited"]
    numbers = {"clip_im": _cosine(edited, source)}
    if "target" in features:
        numbers["clip_i"] = _cosine(edited, features["target"])
    if row.edited_caption is not None:
        (after,) = clip.text_features([row.edited_caption])
        numbers["clip_out"] = numbers["clip_t"] = _cosine(edited, after)
        if row.caption is not None and row.caption != row.edited_caption:  # equal ones give no direction
            (before,) = clip.text_features([row.caption])
            numbers["clip_dir"] = _cosine(edited - source, after - before)
    return numbers


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a, b, dim=0))


def pair_tables(numbers: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Means over the rows in both benchmarks' words, with how many rows each mean is of; None is left out."""
    titles = {
        "MagicBrush: edited against target": (MAGICBRUSH, ""),
        "Emu Edit: edited against source": (EMU, ""),
        "What was kept": (
            KEPT,
            "Equal pictures have no PSNR, masks of the whole picture no background: left out of these means.",
        ),
    }
    return [
        Table(title=title, columns=("number", "mean", "n"), rows=_means(numbers, names), note=note)
        for title, (names, note) in titles.items()
        if _means(numbers, names)
    ]


def _means(numbers: Sequence[Mapping[str, Any]], names: dict[str, str]) -> list[tuple[str, str, int]]:
    def found(key: str) -> list[float]:
        values = [one.get(key) for one in numbers]
        return [value for value in values if value is not None and math.isfinite(value)]

    return [(name, f"{fmean(found(key)):.4f}", len(found(key))) for name, key in names.items() if found(key)]
