"""The files of GEdit-Bench's and ImgEdit's evaluations: edits to be judged, and scores, read and written.

GEdit-Bench: pictures in fullset/KIND/LANGUAGE/KEY.png beside KEY_SRCIMG.png; scores in NAME_KIND_gpt_score.csv.
ImgEdit: {key: {id, prompt, edit_type}} as JSON, pictures in KEY.png; the judge's texts in result.json, their means in
average_score.json and typescore.json.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data.formats import open_table
from ..data.layouts import NAMES
from ..errors import DatasetError
from ..files import csv_rows, disk_errors, is_within, json_lines, read_json, whole_file, write_json
from .edits import TestEdit, keep_picture, load_edits, save_edits
from .judge import JudgedEdit, Judgement, Verdict
from .rubrics import Rubric
from .run_folder import Row

__all__ = ["edits_of", "is_bare", "read_scores", "write_bare", "write_scores"]

OWN = ", own turns"
GEDIT_COLUMNS = ["source_image", "edited_image", "instruction", "sementics_score", "quality_score"]
GEDIT_COLUMNS += ["intersection_exist", "instruction_language"]
"""As the benchmark spells them."""
GEDIT_TEXTS = ("key", "task_type", "instruction", "instruction_language", "Intersection_exist", "intersection_exist")
GEDIT_PICTURES = ("input_image_raw", "input_image", "source_image")
IMGEDIT_NAMES = {"done": "Prompt Compliance", "done well": "Visual Naturalness", "kept": "Detail Preservation"}


def edits_of(
    folder: Path, described: Path | None = None, sources: Path | None = None
) -> tuple[list[JudgedEdit], list[str]]:
    """(the edits of a folder, what is missing): a run of ``ip2p evaluate edits``, or results for a benchmark.

    A .csv or .jsonl file names its own: source, edited, instruction and maybe kind and checkpoint. ``described`` holds
    a benchmark's instructions by key, ``sources`` is where ImgEdit's pictures lie. Raises DatasetError where there are
    no edits.
    """
    if described is None and folder.is_dir():
        return _run_edits(folder), []
    found = list(_table_edits(folder) if described is None else _described(folder, described, sources))
    missing = [str(path) for one in found for path in (one.source, one.edited) if not Path(str(path)).exists()]
    there = [one for one in found if not {str(one.source), str(one.edited)} & set(missing)]
    if not there:
        first = f"the first that is missing: {missing[0]}" if missing else "it names none"
        raise DatasetError(f"{folder} holds no edit of {described or 'its own'}; {first}")
    return there, missing


def _table_edits(path: Path) -> Iterator[JudgedEdit]:
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise DatasetError(f"{path} is no folder and no .csv or .jsonl; give a run, a benchmark's results, or a table")
    for row in (json_lines if path.suffix.lower() == ".jsonl" else csv_rows)(path, DatasetError):
        source, edited, said = (_text(row, name) for name in ("source", "edited", "instruction"))
        told: dict[str, Any] = {"label": str(row.get("checkpoint") or path.stem), "kind": row.get("kind") or None}
        # The same edit by another checkpoint is told by what was asked.
        name = f"{source}: {said}"
        yield JudgedEdit(name=name, source=path.parent / source, edited=path.parent / edited, instruction=said, **told)


def is_bare(path: Path) -> bool:
    """Whether these are GEdit-Bench's table or ImgEdit's JSON: edits without a true result."""
    if not path.exists():
        return False
    try:
        names = set(_by_key(path)[0] if _is_by_key(path) else open_table(path, None, None)[0].names)
    except (DatasetError, IndexError):
        return False  # whoever reads it as pairs says what is wrong with it
    known = {"id", "prompt", "edit_type"} <= names or {"key", "task_type", "instruction"} <= names
    return known and not names & set(NAMES["after"].split())


def write_bare(
    described: Path, folder: Path, sources: Path | None = None, limit: int | None = None
) -> tuple[list[TestEdit], list[str]]:
    """(a benchmark's edits, whose pictures are now in ``folder``; what is missing), as ``write_truth`` for data sets.

    Pictures lie in the table, or under the names that it gives below ``sources``. Raises DatasetError.
    """
    found: list[TestEdit] = []
    broken: list[str] = []
    for number, row in enumerate(_descriptions(described)):
        if limit is not None and len(found) >= limit:
            break
        try:
            source = keep_picture(folder / "source", number, _picture(row, sources or described.parent))
            found.append(_bare_edit(number, row, source))
        except DatasetError as error:
            broken.append(f"row {number + 1}: {error}")
    if not found:
        raise DatasetError(f"no row of {described} can be edited; the first: {broken[:1]}")
    save_edits(found, folder)
    return found, broken


def _picture(row: Mapping[str, Any], home: Path) -> bytes:
    value = row.get("id") if "edit_type" in row else next((row[n] for n in GEDIT_PICTURES if row.get(n)), None)
    value = value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value
    if isinstance(value, bytes):
        return value
    path = (home / str(value)).resolve()
    if not isinstance(value, str) or not path.is_relative_to(home.resolve()):
        raise DatasetError(f"its picture is {str(value)[:60]!r}; give one, or a file's name below {home}")
    with disk_errors(path, "read", DatasetError):
        return path.read_bytes()


def _bare_edit(number: int, row: Mapping[str, Any], source: Path) -> TestEdit:
    about = {"key": _text(row, "key")}
    if "edit_type" not in row:
        about |= _gedit_about(row)
    return TestEdit(
        number=number,
        source=source,
        target=None,
        mask=None,
        instruction=_text(row, "instruction", "prompt"),
        caption="",
        edited_caption="",
        kind=_text(row, "task_type", "edit_type"),
        session=f"row {number}",
        turn=0,
        about=about,
    )


def _run_edits(folder: Path) -> list[JudgedEdit]:
    """With the true picture before, or where a turn started from an own result, with that."""
    edits = load_edits(folder)
    found = []
    for made in sorted(path for path in (folder / "edits").glob("*") if path.is_dir()):
        languages = {one.about["instruction_language"] for one in edits if "instruction_language" in one.about}
        before = {(one.session, one.turn): made / one.name for one in edits} if made.name.endswith(OWN) else {}
        for one in edits:
            source = before.get((one.session, one.turn - 1), one.source)
            if (made / one.name).exists():
                key, language = one.about.get("key", one.name), one.about.get("instruction_language", "")
                told: dict[str, Any] = {"name": key, "source": source, "kind": one.kind, "about": one.about}
                label = f"{made.name} {language}" if len(languages) > 1 else made.name
                found.append(JudgedEdit(label=label, edited=made / one.name, instruction=one.instruction, **told))
    if not found:
        raise DatasetError(f"{folder} holds no edits; make them with ip2p evaluate edits")
    return found


def _described(folder: Path, described: Path, sources: Path | None) -> Iterator[JudgedEdit]:
    rows = list(_descriptions(described))
    if rows and "edit_type" in rows[0]:
        yield from (_imgedit_edit(folder, row, sources or folder) for row in rows)
    else:
        languages = {str(row.get("instruction_language", "en")) for row in rows}
        yield from (_gedit_edit(folder, row, several=len(languages) > 1) for row in rows)


def _descriptions(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of ImgEdit's JSON by key, or of a table of GEdit-Bench's columns."""
    if _is_by_key(path):
        yield from _by_key(path)
        return
    table, _ = open_table(path, None, None)
    picture = next((name for name in GEDIT_PICTURES if name in table.names), "")
    for row in table.rows(
        [name for name in (*GEDIT_TEXTS, "id", "prompt", "edit_type", picture) if name in table.names]
    ):
        if isinstance(row, DatasetError):
            raise row
        yield dict(row)


def _is_by_key(path: Path) -> bool:
    """Whether a file is one JSON object, as ImgEdit's."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with disk_errors(path, "read", DatasetError), path.open("rb") as stream:
        return stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def _by_key(path: Path) -> list[dict[str, Any]]:
    content = read_json(path, DatasetError)
    rows = content.items() if isinstance(content, dict) else ()
    if not rows or not all(isinstance(row, dict) for _, row in rows):
        raise DatasetError(f"{path} is no list of edits; give ImgEdit's JSON, or GEdit-Bench's table")
    return [{"key": key, **row} for key, row in rows]


def _text(row: Mapping[str, Any], *names: str) -> str:
    for name in names:
        if row.get(name):
            return str(row[name])
    raise DatasetError(f"an edit has the columns {', '.join(map(str, row))} and no {names[0]}; fill it in")


def _gedit_edit(folder: Path, row: Mapping[str, Any], *, several: bool) -> JudgedEdit:
    key, kind, language = _text(row, "key"), _text(row, "task_type"), str(row.get("instruction_language", "en"))
    place = _below(folder, f"fullset/{kind}/{language}")
    return JudgedEdit(
        label=f"{folder.name} {language}" if several else folder.name,
        name=key,
        source=_below(place, f"{key}_SRCIMG.png"),
        edited=_below(place, f"{key}.png"),
        instruction=_text(row, "instruction"),
        kind=kind,
        about=_gedit_about(row),
    )


def _below(folder: Path, name: str) -> Path:
    """A picture that a benchmark's file names; it is shown to a server, so it may not lie anywhere."""
    if not is_within(name):
        raise DatasetError(f"{name[:60]!r} does not lie below {folder}; correct the benchmark's file")
    return folder / name


def _gedit_about(row: Mapping[str, Any]) -> dict[str, str]:
    known = str(row.get("Intersection_exist", row.get("intersection_exist", "")))
    return {"instruction_language": str(row.get("instruction_language", "en")), "intersection_exist": known}


def _imgedit_edit(folder: Path, row: Mapping[str, Any], sources: Path) -> JudgedEdit:
    key = _text(row, "key")
    return JudgedEdit(
        label=folder.name,
        name=key,
        source=_below(sources, _text(row, "id")),
        edited=_below(folder, f"{key}.png"),
        instruction=_text(row, "prompt"),
        kind=_text(row, "edit_type"),
    )


def write_scores(judgement: Judgement, folder: Path) -> list[Path]:
    """Write the scores as the benchmark does, one set of files a checkpoint; returns their paths."""
    by_label: dict[str, list[Verdict]] = {}
    for verdict in judgement.verdicts:
        if verdict.votes:
            by_label.setdefault(verdict.edit.label, []).append(verdict)
    write = _write_gedit if judgement.rubric.name == "viescore" else _write_imgedit
    with disk_errors(folder, "written", DatasetError):
        return [path for label, some in by_label.items() for path in write(folder, label, some, judgement.rubric)]


def _write_gedit(folder: Path, label: str, verdicts: Sequence[Verdict], rubric: Rubric) -> Iterator[Path]:
    groups: dict[str, list[list[Any]]] = {"combined": []}
    for verdict in verdicts:
        edit, marks = verdict.edit, verdict.marks(rubric) or {}
        about = [edit.about.get("intersection_exist", ""), edit.about.get("instruction_language", "en")]
        line = [str(edit.source), str(edit.edited), edit.instruction, marks["SC"], marks["PQ"], *about]
        groups.setdefault(edit.kind or "all", []).append(line)
        groups["combined"].append(line)
    for group, lines in groups.items():
        path, stream = folder / f"{_file(label)}_{_file(group)}_gpt_score.csv", io.StringIO(newline="")
        csv.writer(stream).writerows([GEDIT_COLUMNS, *lines])
        with whole_file(path) as whole:
            whole.write(stream.getvalue().encode())
        yield path


def _write_imgedit(folder: Path, label: str, verdicts: Sequence[Verdict], rubric: Rubric) -> Iterator[Path]:
    means = {verdict.edit.name: (verdict.marks(rubric) or {})["overall"] for verdict in verdicts}
    kinds: dict[str, list[float]] = {}
    for verdict in verdicts:
        kinds.setdefault(verdict.edit.kind or "other", []).append(means[verdict.edit.name])
    home = folder / _file(label)
    home.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("result.json", {verdict.edit.name: _as_text(verdict, rubric) for verdict in verdicts}),
        ("average_score.json", {name: round(mean, 2) for name, mean in means.items()}),
        ("typescore.json", {kind: round(fmean(values), 2) for kind, values in kinds.items()}),
    ):
        write_json(home / name, content)
        yield home / name


def _as_text(verdict: Verdict, rubric: Rubric) -> str:
    """The first vote as ImgEdit's judge writes."""
    marks = rubric.marks(verdict.votes[0])
    lines = [f"{theirs}: {marks[ours]:g}" for ours, theirs in IMGEDIT_NAMES.items()]
    return "\n".join([f"Brief reasoning: {' '.join(verdict.reasons[0].split())}", *lines])


def _file(label: str) -> str:
    """The label as a part of a file's name."""
    return re.sub(r"[^\w.,=()-]+", "_", label)


def read_scores(path: Path, rubric: Rubric, described: Path | None = None) -> list[Row]:
    """Others' scores as rows for the tables: GEdit-Bench's .csv, ImgEdit's result.json or average_score.json.

    ``described`` gives the kinds of ImgEdit's edits. Raises DatasetError.
    """
    if rubric.name == "viescore":
        return [_gedit_row(row, path) for row in csv_rows(path, DatasetError)]
    content = read_json(path, DatasetError)
    if not isinstance(content, dict) or not content:
        raise DatasetError(f"{path} holds no scores by key; give ImgEdit's result.json or average_score.json")
    kinds = {str(row["key"]): str(row.get("edit_type")) for row in _descriptions(described)} if described else {}
    rows = [_imgedit_row(str(key), said, kinds.get(str(key)), path) for key, said in content.items()]
    return [row for row in rows if row["overall"] is not None]


def _gedit_row(row: Mapping[str, Any], path: Path) -> Row:
    try:
        following, quality = float(row["sementics_score"]), float(row["quality_score"])
        if not (0 <= following <= 10 and 0 <= quality <= 10):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{path} has a row without sementics_score and quality_score of 0 to 10; give the benchmark's"
        ) from error
    edited = Path(str(row.get("edited_image", "")).replace("\\", "/"))
    kind = edited.parent.parent.name or None  # fullset/KIND/LANGUAGE/KEY.png
    return {
        "edited": edited.stem,
        "kind": kind,
        "SC": following,
        "PQ": quality,
        "overall": math.sqrt(following * quality),
    }


def _imgedit_row(key: str, said: Any, kind: str | None, path: Path) -> Row:
    """A text with numbers at the ends of its lines, as the benchmark reads it, or a mean."""
    if isinstance(said, int | float) and not isinstance(said, bool):
        return {"edited": key, "kind": kind, "overall": float(said)}
    if not isinstance(said, str):
        return {"edited": key, "kind": kind, "overall": None}
    scores = [float(found) for found in re.findall(r"^.*?: ([1-5])\s*$", said, re.MULTILINE)]
    names = dict(zip(IMGEDIT_NAMES, scores, strict=False)) if len(scores) == len(IMGEDIT_NAMES) else {}
    return {"edited": key, "kind": kind, **names, "overall": fmean(scores) if scores else None}
