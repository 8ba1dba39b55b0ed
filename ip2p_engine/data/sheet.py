"""A contact sheet of a data set: one HTML file with the pictures inside, sorted and filtered in the page."""

from __future__ import annotations

import base64
import io
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from PIL import Image

from ..errors import ConfigError, DatasetError, ImageError
from ..files import disk_errors, whole_file
from ..images import open_image
from .reading import Pairs, Reading, open_pairs
from .record import SCORES, PairRecord

__all__ = ["sheet", "write_page"]

log = logging.getLogger(__name__)
NUMBERS = (*SCORES, "p", "cfg", "seed")


def sheet(
    folder: Path | str, out: Path | str, reading: Reading | None = None, *, limit: int = 200, side: int = 256
) -> int:
    """Write the sheet of up to ``limit`` pairs, spread evenly over the data set; returns how many it shows.

    Pictures are shown at most ``side`` pixels wide and high, about 20 kB each. Raises ConfigError, DatasetError.
    """
    for name, value in (("limit", limit), ("side", side)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; give a whole number of at least 1")
    pairs, out = open_pairs(folder, reading), Path(out)
    count = min(limit, len(pairs))
    if not count:
        raise DatasetError(f"{folder} has no pairs yet; a sheet needs at least one")
    shown = list(_readable(pairs, (n * len(pairs) // count for n in range(count))))
    if not shown:
        raise DatasetError(f"{folder} has no pair that can be shown; look with ip2p dataset verify")
    name = Path(folder).resolve().name
    return write_page(shown, out, lambda count: f"{name}: {count} of {len(pairs):,} pairs", side=side)


def write_page(
    shown: Sequence[tuple[int, PairRecord]],
    out: Path,
    title: Callable[[int], str],
    *,
    side: int = 256,
    notes: Mapping[int, str] | None = None,
) -> int:
    """A page of pairs, (row, pair), with a note below some, under a title of their number; returns that.

    Pairs whose pictures cannot be read are left out, and the log says so. Raises DatasetError if all are, and if the
    disk refuses.
    """
    cards = list(_cards(shown, side, notes or {}))
    if shown and not cards:
        raise DatasetError(f"{out} would show no pair, since none can be read; look with ip2p dataset verify")
    page = Template(files(__package__).joinpath("sheet.html").read_text(encoding="utf-8")).substitute(
        nonce=secrets.token_urlsafe(16),
        title=escape(title(len(cards))),
        options="".join(f'<option value="{name}">{name}</option>' for name in _sort_names(shown)),
        thresholds="\n".join(map(_threshold, _present(shown, SCORES))),
        cards="\n".join(cards),
    )
    with disk_errors(out, "written", DatasetError):
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out) as stream:
            stream.write(page.encode())
    return len(cards)


def _cards(shown: Sequence[tuple[int, PairRecord]], side: int, notes: Mapping[int, str]) -> Iterator[str]:
    for index, pair in shown:
        try:
            yield _card(index, pair, side, notes.get(index, ""))
        except ImageError as error:
            log.warning("left out: %s", error)


def _readable(pairs: Pairs, indices: Iterable[int]) -> Iterator[tuple[int, PairRecord]]:
    for index in indices:
        try:
            yield index, pairs[index]
        except DatasetError as error:
            log.warning("left out: %s", error)


def _present(shown: Sequence[tuple[int, PairRecord]], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(getattr(pair, name) is not None for _, pair in shown)]


def _sort_names(shown: Sequence[tuple[int, PairRecord]]) -> list[str]:
    """The direction similarity first, since pairs are kept by it; then the order in the data set."""
    names = _present(shown, NUMBERS)
    return [*sorted(names, key=lambda name: name != "sim_direction"), "index"]


def _threshold(name: str) -> str:
    return f'<label>{name} ≥ <input type="number" step="0.01" name="{name}" data-least></label>'


def _card(index: int, pair: PairRecord, side: int, note: str) -> str:
    numbers = {"index": index, **{name: getattr(pair, name) for name in NUMBERS}}
    texts = (pair.edit_prompt, pair.original_prompt, pair.edited_prompt)
    data = {name: "" if value is None else value for name, value in numbers.items()}
    attributes = " ".join(f'data-{name}="{escape(str(value))}"' for name, value in data.items())
    words = escape("\n".join((*texts, note)).lower())
    shown = [f"{name} {_short(value)}" for name, value in numbers.items() if value is not None]
    pictures = "".join(
        f'<img alt="{alt}" src="{_data_uri(data, side, f"pair {pair.key or index}, the picture {alt},")}">'
        for alt, data in (("before", pair.original_image), ("after", pair.edited_image))
    )
    return (
        f'<article {attributes} data-words="{words}"><div class="pictures">{pictures}</div><div class="text">'
        f'<p class="instruction">{escape(pair.edit_prompt)}</p>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + f'<p class="captions">{escape(pair.original_prompt)} → {escape(pair.edited_prompt)}</p>'
        f'<p class="numbers">{"".join(f"<span>{escape(text)}</span> " for text in shown)}</p></div></article>'
    )


def _short(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _data_uri(data: bytes, side: int, name: str) -> str:
    picture = open_image(data, name=name)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
