"""A run, or a folder of runs, as one HTML file that needs nothing else: plots, tables, strips, settings, versions."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from ..errors import DatasetError
from ..files import disk_errors, read_json, whole_file
from ..strips import strip
from .methods import Method, Setting
from .run_folder import RUN, Run, Table, load_run, versions
from .samples import Sample, batches

__all__ = [
    "example_sheet",
    "tiled",
    "write_report",
]

PNG, LARGEST = b"\x89PNG\r\n\x1a\n", 64 << 20
TITLES = {
    "curve": "Trade-off curve",
    "ablation": "Ablation: less data, no filter",
    "scenes": "Scenes: edits against the truth",
    "scenes --auto": "Scenes: the automatic pick",
    "sweep": "Sweep of one picture",
    "pairs": "Edited pictures",
    "edits": "Edits of a test set",
    "judge": "Scores by a vision-language model",
    "limits": "What fails",
}


def write_report(folder: Path, out: Path) -> Path:
    """Write the report of a run, or of every run in a folder; returns its path. Raises DatasetError for no run.

    An ablation's folder also holds its trainings, whose run.json has no kind: they are no evaluations.
    """
    runs = sorted(path.parent for path in Path(folder).rglob(RUN) if _is_evaluation(path))
    found = [(path, load_run(path)) for path in runs]
    if not found:
        raise DatasetError(f"{folder} holds no run; give the folder that an evaluation wrote")
    page = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(
        nonce=secrets.token_urlsafe(16),
        title=escape(f"Evaluation: {Path(folder).resolve().name}"),
        made=escape("Written by " + ", ".join(f"{name} {number}" for name, number in list(versions().items())[:2])),
        contents=_contents([_title(path, run, Path(folder)) for path, run in found], [run for _, run in found]),
        sections="\n".join(_section(n, path, run, Path(folder)) for n, (path, run) in enumerate(found)),
    )
    with disk_errors(out, "written", DatasetError):
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out) as stream:
            stream.write(page.encode(errors="backslashreplace"))  # halves of letters
    return out


def _is_evaluation(path: Path) -> bool:
    content = read_json(path, DatasetError)
    return isinstance(content, dict) and "kind" in content


def _title(path: Path, run: Run, folder: Path) -> str:
    place = (Path(folder.resolve().name) / path.relative_to(folder)).as_posix()
    return f"{TITLES.get(run.kind, run.kind)}: {place}"


def _contents(titles: Sequence[str], runs: Sequence[Run]) -> str:
    """Links to the runs, and below each to its tables."""
    lines = []
    for n, (title, run) in enumerate(zip(titles, runs, strict=True)):
        tables = (f'<li><a href="#run-{n}-{t}">{escape(one.title)}</a></li>' for t, one in enumerate(run.tables))
        lines.append(f'<li><a href="#run-{n}">{escape(title)}</a><ul>{"".join(tables)}</ul></li>')
    return f"<ul>{''.join(lines)}</ul>"


def _section(number: int, path: Path, run: Run, folder: Path) -> str:
    title = escape(_title(path, run, folder))
    pictures = [_figure(path / name, caption) for name, caption in run.pictures.items()]
    tables = [_table(table, f"run-{number}-{n}") for n, table in enumerate(run.tables)]
    parts = [f'<h2 id="run-{number}">{title}</h2>', *pictures, *tables]
    return "\n".join([*parts, _details("Settings", run.settings), _details("Versions", run.versions)])


def _figure(path: Path, caption: str) -> str:
    """A picture that lies in the run's folder: whoever opens the report gives away what is in it."""
    content = b""
    if path.is_file() and not path.is_symlink():
        with disk_errors(path, "read", DatasetError), path.open("rb") as stream:
            content = stream.read(LARGEST + 1)
    if not content.startswith(PNG) or len(content) > LARGEST:
        what = f"no PNG picture of at most {LARGEST >> 20} MB"
        raise DatasetError(f"{path} is {what}; remove it from {RUN}, or make the run again")
    words = escape(caption)
    image = f'<img alt="{words}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>"


def _table(table: Table, name: str) -> str:
    head = _cells("th", table.columns)
    body = "\n".join(_cells("td", row) for row in table.rows)
    if table.rows_apart:
        line = f'<tr class="apart"><td colspan="{len(table.columns)}">{escape(table.apart)}</td></tr>'
        body = "\n".join([body, line, *(_cells("td", row) for row in table.rows_apart)])
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h3 id="{name}">{escape(table.title)}</h3><div class="scroll"><table><thead>{head}</thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _cells(kind: str, cells: Any) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(str(cell))}</{kind}>" for cell in cells) + "</tr>"


def _details(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(_cells("td", pair) for pair in values.items())
    return f'<details><summary>{title}</summary><div class="scroll"><table>{rows}</table></div></details>'


def example_sheet(
    samples: Sequence[Sample],
    methods: Sequence[Method],
    *,
    resolution: int,
    count: int = 4,
    first: int | None = None,
    height: int = 128,
) -> Image.Image:
    """One row a sample: before, the methods' pictures at (the ``first``) settings, and the target if there is one."""
    chosen = [(method, setting) for method in methods for setting in method.settings[:first]]
    labels = [_label(setting, [other for _, other in chosen]) for _, setting in chosen]
    rows = []
    for group in batches(samples[:count], count, resolution):
        prepared = {id(method): method.prepare(group) for method in methods}
        made = [method.make(group, prepared[id(method)], setting).edited for method, setting in chosen]
        rows += [_row(sample, [one[n] for one in made], labels, height) for n, sample in enumerate(group)]
    return tiled(rows)


def tiled(pictures: Sequence[Image.Image], columns: int = 1) -> Image.Image:
    """Pictures on white, row by row, each in a cell as large as the largest."""
    width, height = max(one.width for one in pictures), max(one.height for one in pictures)
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for n, one in enumerate(pictures):
        sheet.paste(one, (n % columns * width, n // columns * height))
    return sheet


def _label(setting: Setting, settings: Sequence[Setting]) -> str:
    """The curve and the values in which the settings differ."""
    curve = [setting.curve] if len({other.curve for other in settings}) > 1 else []
    varies = [name for name in setting.values if len({other.values[name] for other in settings}) > 1]
    return ", ".join([*curve, *(f"{name} {setting.values[name]:g}" for name in varies)])


def _row(sample: Sample, edited: Sequence[Image.Image], labels: Sequence[str], height: int) -> Image.Image:
    target = [] if sample.target is None else [sample.target]
    captions = [sample.instruction, *labels, *["target"] * len(target)]
    return strip([sample.source, *edited, *target], captions, height=height)
