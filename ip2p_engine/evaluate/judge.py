"""Scores of edits by a vision-language model on any server that speaks OpenAI's chat protocol.

Each answer is kept in the folder under a digest of all that was asked (texts, pictures, model, temperature, vote), so
nothing is asked twice, whoever asks, and a stopped run goes on.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from ..captions.chat import ChatClient, ServerConfig, json_objects, picture_part
from ..captions.edits import Rejected
from ..errors import ConfigError, DatasetError, ImageError
from ..files import AppendLog, disk_errors, locked
from ..hooks import Hooks
from ..images import open_image, upright_size
from .rubrics import Part, Rubric

__all__ = ["ANSWERS", "Cost", "JudgedEdit", "Judgement", "Verdict", "cost_of", "judge", "judging"]

ANSWERS = "answers.jsonl"
PIXELS_OF_A_TOKEN, LETTERS_OF_A_TOKEN = 28 * 28, 4
"""Of a picture as Qwen2.5-VL counts, and of English; other models count otherwise."""


@dataclass(frozen=True, kw_only=True)
class JudgedEdit:
    """An edit that is to be judged."""

    label: str
    """The line of the tables that it belongs to, such as a checkpoint's name."""
    name: str
    """The same for the same edit by another checkpoint."""
    source: Path | bytes
    edited: Path | bytes
    instruction: str
    kind: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """What a benchmark's own files say of it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge said of an edit."""

    edit: JudgedEdit
    votes: tuple[dict[str, list[float]], ...]
    """{question: its scores} of each vote that is whole."""
    reasons: tuple[str, ...]
    """One for each vote: what the judge said, in the order of the questions."""
    rejected: tuple[str, ...]
    """Why answers could not be used."""

    def marks(self, rubric: Rubric) -> dict[str, float] | None:
        """The rubric's marks, each the mean over the votes; None without a vote."""
        found = [rubric.marks(vote) for vote in self.votes]
        return {name: fmean(one[name] for one in found) for name in rubric.names} if found else None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Who judged, and what."""

    rubric: Rubric
    model: str
    verdicts: list[Verdict]

    @property
    def rejected(self) -> Counter[str]:
        """How many answers could not be used, by reason."""
        return Counter(reason for verdict in self.verdicts for reason in verdict.rejected)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What judging will ask for, before it does."""

    requests: int
    known: int
    """Answers that are there already."""
    pictures: int
    tokens_in: int
    tokens_out: int
    """At most, where no answer is cut off."""

    def as_text(self) -> str:
        """One sentence for people."""
        asked = f"{self.requests:,} requests with {self.pictures:,} pictures, about {self.tokens_in:,} tokens in"
        return f"{asked} and at most {self.tokens_out:,} out; {self.known:,} answers are there already"


@dataclass(frozen=True, kw_only=True)
class _Question:
    key: str
    part: Part
    pictures: tuple[Path | bytes, ...]
    vote: int


class _Judge(ChatClient[_Question, dict[str, Any]]):
    def __init__(self, config: ServerConfig, rubric: Rubric, on_wait: Callable[[], None] | None = None) -> None:
        super().__init__(config, on_wait)
        self._rubric = rubric

    def _messages(self, question: _Question) -> list[dict[str, Any]]:
        shown = [picture_part(_encoded(picture, self._rubric.area), "png") for picture in question.pictures]
        return [{"role": "user", "content": [{"type": "text", "text": question.part.text}, *shown]}]

    def _read(self, question: _Question, text: str) -> dict[str, Any] | None:
        wanted = len(question.part.criteria)
        for found in json_objects(text):
            scores = [self._score(value) for value in _list(found.get("score"))]
            if len(scores) == wanted and None not in scores:
                return {"scores": scores, "reasoning": str(found.get("reasoning", ""))[:1000]}
        return None

    def _score(self, value: Any) -> float | None:
        """A number of the rubric's scale, which some models write as a text."""
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            return None
        return number if self._rubric.lowest <= number <= self._rubric.highest else None

    def _harmless(self) -> _Question:
        """With pictures, so that a model that cannot see is found out."""
        stream = io.BytesIO()
        Image.new("RGB", (64, 64), "grey").save(stream, "PNG")
        part = self._rubric.parts(None, "leave it as it is")[0]
        return _Question(key="", part=part, pictures=(stream.getvalue(),) * 2, vote=0)

    def _seed(self, question: _Question) -> int:
        return question.vote


def judge(
    edits: Sequence[JudgedEdit],
    rubric: Rubric,
    server: ServerConfig,
    folder: Path,
    *,
    votes: int = 1,
    retry_rejected: bool = False,
    hooks: Hooks | None = None,
) -> Judgement:
    """Have every edit judged ``votes`` times, and keep each answer in the folder's answers.jsonl.

    ``retry_rejected`` asks again what could not be used. Raises ImageError for a picture that cannot be read,
    CaptionError where the server fails for good, DatasetError, or Interrupted; the same call goes on.
    """
    _check(edits, votes)
    with judging(rubric, server, folder, votes=votes, retry_rejected=retry_rejected, hooks=hooks) as ask:
        return Judgement(rubric=rubric, model=server.model, verdicts=ask(edits))


@contextmanager
def judging(
    rubric: Rubric,
    server: ServerConfig,
    folder: Path,
    *,
    votes: int = 1,
    retry_rejected: bool = False,
    hooks: Hooks | None = None,
) -> Iterator[Callable[[Sequence[JudgedEdit]], list[Verdict]]]:
    """A function that has edits judged, for those that come bit by bit: the answers' file is read once."""
    hooks = hooks or Hooks()

    def look_up() -> None:
        hooks.check_stop(f"stopped with {len(known)} answers in {folder}; the same call goes on")

    def ask(edits: Sequence[JudgedEdit]) -> list[Verdict]:
        questions = [list(_questions(edit, rubric, server, votes)) for edit in edits]
        asked = {one.key: one for of_one in questions for one in of_one}
        missing = [one for key, one in asked.items() if _is_open(known.get(key), retry_rejected)]
        finished = len(asked) - len(missing)
        hooks.progress(finished, len(asked))
        for place, answer in client.answers(missing):
            row = vars(answer) if isinstance(answer, Rejected) else answer
            about = {"rubric": rubric.name, "prompts": rubric.prompts, "model": server.model}
            append({"key": missing[place].key, **about, "part": missing[place].part.name, **row})
            finished += 1
            hooks.progress(finished, len(asked))
        return [_verdict(edit, of_one, known, votes) for edit, of_one in zip(edits, questions, strict=True)]

    client = _Judge(server, rubric, look_up)
    with _answers(folder) as (known, append):
        yield ask


def cost_of(
    edits: Sequence[JudgedEdit],
    rubric: Rubric,
    server: ServerConfig,
    folder: Path,
    *,
    votes: int = 1,
    retry_rejected: bool = False,
) -> Cost:
    """What ``judge`` would ask, estimated from texts and the pictures' sizes. Raises as ``judge``."""
    _check(edits, votes)
    known = {row["key"]: row for row in AppendLog(folder / ANSWERS, DatasetError)} if _is_there(folder) else {}
    asked = {one.key: one for edit in edits for one in _questions(edit, rubric, server, votes)}
    missing = [one for key, one in asked.items() if _is_open(known.get(key), retry_rejected)]
    pixels = sum(_pixels(picture, rubric.area) for one in missing for picture in one.pictures)
    letters = sum(len(one.part.text) for one in missing)
    return Cost(
        requests=len(missing),
        known=len(asked) - len(missing),
        pictures=sum(len(one.pictures) for one in missing),
        tokens_in=round(pixels / PIXELS_OF_A_TOKEN + letters / LETTERS_OF_A_TOKEN),
        tokens_out=len(missing) * server.max_tokens,
    )


def _check(edits: Sequence[JudgedEdit], votes: int) -> None:
    if not edits:
        raise DatasetError("there are no edits to judge; give a folder that holds some")
    if votes < 1:
        raise ConfigError(f"`votes` is {votes}; give a whole number of at least 1")


def _is_there(folder: Path) -> bool:
    return (folder / ANSWERS).exists()


def _is_open(row: Mapping[str, Any] | None, retry_rejected: bool) -> bool:
    return row is None or (retry_rejected and "reason" in row)


@contextmanager
def _answers(folder: Path) -> Iterator[tuple[dict[str, dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """(answers by key, how to add one), locked against a second writer."""
    with disk_errors(folder, "written", DatasetError):
        folder.mkdir(parents=True, exist_ok=True)
    refusal = f"{folder} is being written by another judge; wait for it, or give another folder"
    with locked(folder / ".answers.lock", refusal, DatasetError):
        log = AppendLog(folder / ANSWERS, DatasetError)
        known = {str(row.get("key")): row for row in log}

        def append(row: dict[str, Any]) -> None:
            log.append(row)
            known[row["key"]] = row

        yield known, append


def _questions(edit: JudgedEdit, rubric: Rubric, server: ServerConfig, votes: int) -> Iterator[_Question]:
    """Of one edit, vote by vote; the key is of all that the answer depends on."""
    for vote in range(votes):
        for part in rubric.parts(edit.kind, edit.instruction):
            pictures = (edit.source, edit.edited) if part.both else (edit.edited,)
            said = [rubric.name, rubric.version, part.text, *map(_digest, pictures)]
            asked = [*said, server.model, server.temperature, dict(server.extra), vote]
            key = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()
            yield _Question(key=key, part=part, pictures=pictures, vote=vote)


def _digest(picture: Path | bytes) -> str:
    if isinstance(picture, bytes):
        return hashlib.blake2b(picture, digest_size=16).hexdigest()
    with disk_errors(picture, "read", ImageError):
        return hashlib.blake2b(picture.read_bytes(), digest_size=16).hexdigest()


def _verdict(
    edit: JudgedEdit, questions: Sequence[_Question], known: Mapping[str, Mapping[str, Any]], votes: int
) -> Verdict:
    found: list[dict[str, list[float]]] = [{} for _ in range(votes)]
    reasons: list[list[str]] = [[] for _ in range(votes)]
    rejected = []
    for question in questions:
        row = known[question.key]
        if "reason" in row:
            rejected.append(str(row["reason"]))
            continue
        found[question.vote][question.part.name] = [float(score) for score in row["scores"]]
        reasons[question.vote].append(str(row.get("reasoning", "")))
    whole = [vote for vote in range(votes) if len(found[vote]) == len(questions) // votes]
    return Verdict(
        edit=edit,
        votes=tuple(found[vote] for vote in whole),
        reasons=tuple(" ".join(reasons[vote]) for vote in whole),
        rejected=tuple(rejected),
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _encoded(picture: Path | bytes, area: int | None) -> bytes:
    """As PNG, since losses of another format would count against the edit."""
    image, stream = open_image(picture), io.BytesIO()
    size = _shown(image.size, area)
    image = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
    image.save(stream, "PNG")
    return stream.getvalue()


def _shown(size: tuple[int, int], area: int | None) -> tuple[int, int]:
    """The size of a picture of so many pixels with the same sides' ratio."""
    if area is None:
        return size
    width, height = size
    factor = math.sqrt(area / (width * height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _pixels(picture: Path | bytes, area: int | None) -> int:
    return area if area is not None else math.prod(upright_size(picture))
