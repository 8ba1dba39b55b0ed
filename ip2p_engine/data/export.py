"""Data sets out again: the original repository's folders, folder pairs, musubi-tuner's JSON Lines, a folder of the hub.

Each goes on where it was killed: files appear whole, what is there is not written again, and the file that says what is
being exported goes last.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import versions_of
from ..errors import ConfigError, DatasetError, ImageError, IP2PError
from ..files import disk_errors, read_json, sweep, whole_file, write_json
from ..hooks import Hooks, passing_over
from ..images import open_image
from .parquet import numbered
from .reading import ForeignPairs, Pairs, name_of_pairs
from .record import IMAGE_COLUMNS, PICTURES, SCORES, PairRecord
from .store import PairWriter
from .values import format_of, kept_bytes

__all__ = ["EXPORTS", "export_pairs"]

METADATA = {
    "p": "p2p_threshold",
    "cfg": "cfg_scale",
    "sim_0": "clip_sim_0",
    "sim_1": "clip_sim_1",
    "sim_image": "clip_sim_image",
    "sim_direction": "clip_sim_dir",
}
CAPTION_FOLDER = re.compile(r"[0-9]{7}")
EXPORTED, CARD, LINES = ".export.json", "README.md", "metadata.jsonl"
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))


def export_pairs(pairs: Pairs, folder: Path, layout: str, *, name: str = "", hooks: Hooks | None = None) -> int:
    """Write pairs in a layout of ``EXPORTS``; returns their number.

    ``name``: what to call the data set in its card. ``hooks.on_error``, or the log, hears of rows that cannot be used.
    Raises ConfigError for an unknown layout, and DatasetError if the folder holds something else or the disk refuses.
    """
    if layout not in EXPORTS:
        raise ConfigError(f"layout is {layout!r}; choose {', '.join(EXPORTS)}")
    usable = _usable(pairs, passing_over(hooks))
    if layout == "hub":
        return _write_hub(pairs, folder, usable, name or pairs.folder.name)
    with disk_errors(folder, "written", DatasetError, "free some space and repeat the same call"):
        about = {"layout": layout, "pairs": len(pairs), "name": pairs.folder.name, "data": name_of_pairs(pairs)}
        _begin(folder, {**about, **_chosen(pairs)})
        return WRITERS[layout](usable, folder)


def _chosen(pairs: Pairs) -> dict[str, Any]:
    return pairs.reading.in_manifest() if isinstance(pairs, ForeignPairs) else {}


def _begin(folder: Path, about: dict[str, Any]) -> None:
    """Take an empty folder, or one with the same export, which may have been killed at any point of it."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / EXPORTED
    if not marker.exists():
        if any(path.name[:1] != "." for path in folder.iterdir()):
            raise DatasetError(f"{folder} is not empty; export to a new folder")
        write_json(marker, about)
    sweep(folder)
    if read_json(marker, DatasetError) != about:
        raise DatasetError(f"{folder} holds another export, or the beginning of one; export to a new folder")


def _usable(pairs: Pairs, hooks: Hooks) -> Iterator[PairRecord]:
    fault, good = None, False
    for number, found in numbered(pairs.outcomes()):
        hooks.check_stop(f"stopped after {number} of {len(pairs)} pairs")
        if isinstance(found, PairRecord):
            found = _sound(found, number)
        if isinstance(found, IP2PError):
            fault = found
            hooks.error(number, found)
        else:
            good = True
            yield found
        hooks.progress(number + 1, len(pairs))
    if fault is not None and not good:
        raise DatasetError(f"no pair can be used; the last: {fault}") from fault


def _sound(pair: PairRecord, number: int) -> PairRecord | ImageError:
    """A pair whose pictures can be decoded, or which cannot: what else is exported breaks other people's training."""
    try:
        for column in IMAGE_COLUMNS:
            open_image(getattr(pair, column), name=f"the {column} of pair {pair.key or number}")
    except ImageError as error:
        return error
    return pair


def _put(path: Path, content: Callable[[], bytes]) -> None:
    """A file that is whole, or absent; one that is there was written before a kill."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as stream:
        stream.write(content())


def _write_original(pairs: Iterator[PairRecord], folder: Path) -> int:
    """JPEGs byte for byte, others at quality 100.

    A key such as 0000012/34 names the folder; other pairs are gathered by their texts, in the order of appearance.
    """
    numbers: dict[Any, str] = {}
    metadata: dict[str, dict[str, str]] = {}
    for pair in pairs:
        name = _caption_folder(pair, numbers)
        rows, place = metadata.setdefault(name, {}), folder / name
        seed = str(len(rows) if pair.seed is None else pair.seed)
        if seed in rows:
            raise DatasetError(f"{place} would get seed {seed} twice (pair {pair.key!r}); give each its own")
        if not rows:
            texts = {"input": pair.original_prompt, "edit": pair.edit_prompt, "output": pair.edited_prompt}
            # Both names, since the authors' generator asks for one and their published file has the other.
            prompt = json.dumps({**texts, "caption": pair.original_prompt}).encode()
            _put(place / "prompt.json", lambda prompt=prompt: prompt)  # type: ignore[misc]
        for n, column in enumerate(IMAGE_COLUMNS):
            data = getattr(pair, column)
            _put(place / f"{seed}_{n}.jpg", lambda data=data: _jpeg(data))  # type: ignore[misc]
        scores = {theirs: getattr(pair, column) for column, theirs in METADATA.items()}
        rows[seed] = json.dumps({"seed": int(seed), **scores})
    for name, rows in metadata.items():
        _put(folder / name / LINES, lambda rows=rows: ("\n".join(rows.values()) + "\n").encode())  # type: ignore[misc]
    listed = sorted([name, sorted(rows)] for name, rows in metadata.items())
    _put(folder / "seeds.json", lambda: (json.dumps(listed, indent=2) + "\n").encode())
    return sum(map(len, metadata.values()))


def _caption_folder(pair: PairRecord, numbers: dict[Any, str]) -> str:
    prefix = pair.key.rpartition("/")[0]
    if CAPTION_FOLDER.fullmatch(prefix):
        return prefix
    return numbers.setdefault((pair.original_prompt, pair.edit_prompt, pair.edited_prompt), f"{len(numbers):07d}")


def _jpeg(data: bytes) -> bytes:
    if format_of(data) == "JPEG":
        return data
    stream = io.BytesIO()
    open_image(data).save(stream, "JPEG", quality=100, subsampling=0)
    return stream.getvalue()


def _write_folders(pairs: Iterator[PairRecord], folder: Path) -> int:
    """``control`` and ``target`` with equal names; the instruction is NAME.txt beside the target."""
    count = 0
    for count, pair in enumerate(pairs, start=1):
        _put_pictures(pair, folder, f"{count - 1:07d}")
        _put(folder / f"target/{count - 1:07d}.txt", pair.edit_prompt.encode)
    return count


def _write_musubi(pairs: Iterator[PairRecord], folder: Path) -> int:
    """The pictures as folder pairs, and a line for each pair with all that is known of it."""
    lines = []
    for count, pair in enumerate(pairs):
        before, after = _put_pictures(pair, folder, f"{count:07d}")
        row = {"image_path": after, "control_path": before, "caption": pair.edit_prompt}
        known = {name: value for name, value in vars(pair).items() if name not in (*PICTURES, "edit_prompt")}
        lines.append(json.dumps({**row, **{name: value for name, value in known.items() if value not in (None, "")}}))
    _put(folder / LINES, lambda: "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def _put_pictures(pair: PairRecord, folder: Path, name: str) -> list[str]:
    """Byte for byte, or as PNG what is of other formats; their names within the folder."""
    names = []
    for place, column in zip(("control", "target"), IMAGE_COLUMNS, strict=True):
        data = kept_bytes(getattr(pair, column), f"its {column}")
        names.append(f"{place}/{name}.{format_of(data).lower()}")
        _put(folder / names[-1], lambda data=data: data)  # type: ignore[misc]
    return names


def _write_hub(pairs: Pairs, folder: Path, usable: Iterator[PairRecord], name: str) -> int:
    """A store of its own, which is the hub's layout as it is, and a data card."""
    counted: Counter[str] = Counter()
    licences: set[str] = set()
    with PairWriter(folder, manifest={"config": {"exported": name, **_chosen(pairs)}}) as writer:
        done = writer.done_keys()
        for number, pair in enumerate(usable):
            key = pair.key or f"row/{number}"
            counted.update(name for name in ("mask", "kind", "session", *SCORES) if getattr(pair, name) is not None)
            counted["pairs"] += 1
            licences |= {pair.licence} if pair.licence else set()
            if key not in done:
                writer.write(replace(pair, key=key))
    with disk_errors(folder, "written", DatasetError), whole_file(folder / CARD) as stream:
        stream.write(_card(name, counted, sorted(licences), _filter_of(pairs)).encode())
    return counted["pairs"]


def _filter_of(pairs: Pairs) -> dict[str, Any]:
    """The thresholds that the pairs passed, as far as their manifest says."""
    try:
        config = pairs.manifest.get("config")
    except DatasetError:
        return {}
    for name in ("filtered", "factory"):
        part = config.get(name) if isinstance(config, dict) else None
        if isinstance(part, dict) and isinstance(part.get("filter"), dict):
            return part["filter"]
    return {}


def _card(name: str, counted: Counter[str], licences: list[str], thresholds: dict[str, Any]) -> str:
    size = next((word for most, word in SIZES if counted["pairs"] < most), "n>1M")
    licence = licences[0] if len(licences) == 1 else "other" if licences else "unknown"
    head = ["---", f"license: {json.dumps(licence)}", "task_categories:", "- image-to-image", "size_categories:"]
    head += [f"- {size}", "tags:", "- instruct-pix2pix", "- image-editing", "---", "", f"# {name}", ""]
    rows = [f"| pairs | {counted['pairs']:,} |", "|---|---|"]
    rows += [f"| with {column} | {count:,} |" for column, count in sorted(counted.items()) if column != "pairs"]
    text = ["A row is a pair: `original_image`, `edit_prompt`, `edited_image`, and what is known of it.", "", *rows, ""]
    if licences:
        text += [f"Licences of the pairs: {', '.join(licences)}.", ""]
    if thresholds:
        text += ["Kept by " + ", ".join(f"{key} {value}" for key, value in thresholds.items()) + ".", ""]
    made = ", ".join(f"{key} {value}" for key, value in versions_of("pyarrow").items())
    return "\n".join([*head, *text, f"Written by {made}.", ""])


WRITERS: dict[str, Callable[[Iterator[PairRecord], Path], int]] = {
    "original": _write_original,
    "folders": _write_folders,
    "musubi": _write_musubi,
}
EXPORTS = (*WRITERS, "hub")
