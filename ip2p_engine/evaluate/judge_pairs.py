"""A data set's pairs scored by a judge that sees; the scores go along in the store, so a threshold can be set later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..captions.chat import ServerConfig
from ..data.parquet import numbered
from ..data.reading import Reading, open_pairs
from ..data.record import PairRecord
from ..data.store import PairWriter
from ..errors import CaptionError, ConfigError, DatasetError
from ..hooks import Hooks, passing_over
from .judge import Cost, JudgedEdit, Verdict, cost_of, judging
from .rubrics import Rubric

__all__ = ["JudgedPairs", "cost_of_pairs", "judge_pairs"]

AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class JudgedPairs:
    """What became of the pairs of a call."""

    new: int
    rejected: int
    """Pairs of which no answer could be used; they are not written."""


def judge_pairs(
    folder: Path | str,
    out: Path | str,
    rubric: Rubric,
    server: ServerConfig,
    reading: Reading | None = None,
    *,
    votes: int = 1,
    retry_rejected: bool = False,
    hooks: Hooks | None = None,
) -> JudgedPairs:
    """Write a data set's pairs as a store, with the judge's marks among their ``scores`` (``viescore_overall`` ...).

    ``hooks.on_error``, or the log, hears of rows that cannot be used and of pairs without a whole answer. A stopped
    call goes on. Raises DatasetError, CaptionError, ConfigError, or Interrupted once ``hooks.should_stop()``.
    """
    if votes < 1:
        raise ConfigError(f"`votes` is {votes}; give a whole number of at least 1")
    hooks, new, rejected = passing_over(hooks), 0, 0
    pairs = open_pairs(folder, reading, hooks=hooks)
    about = {"judged": str(folder), "rubric": rubric.name, "prompts": rubric.prompts, "model": server.model}
    settings: dict[str, Any] = {"votes": votes, "retry_rejected": retry_rejected}
    quiet = Hooks(should_stop=hooks.should_stop)
    with (
        PairWriter(out, manifest={"config": {**about, "votes": votes}}) as writer,
        judging(rubric, server, Path(out), **settings, hooks=quiet) as ask,
    ):
        done = writer.done_keys()
        for batch in _batches(numbered(pairs.outcomes())):
            hooks.check_stop(f"stopped with {new} new pairs in {out}; the same call goes on")
            named = {n: pair for n, pair in _named(batch, hooks) if pair.key not in done}
            verdicts = ask([_edit(pair) for pair in named.values()])
            for (n, pair), verdict in zip(named.items(), verdicts, strict=True):
                marks = _scores(verdict, rubric)
                if marks is None:
                    rejected += 1
                    hooks.error(n, CaptionError(f"pair {pair.key}: {', '.join(verdict.rejected)}"))
                    continue
                writer.write(replace(pair, scores={**(pair.scores or {}), **marks}))
                new += 1
            hooks.progress(batch[-1][0] + 1, len(pairs))
    return JudgedPairs(new=new, rejected=rejected)


def cost_of_pairs(
    folder: Path | str,
    out: Path,
    rubric: Rubric,
    server: ServerConfig,
    reading: Reading | None = None,
    *,
    votes: int = 1,
) -> Cost:
    """What judging all pairs costs, by the first 64 of them, and answers that are there already left aside."""
    pairs = open_pairs(folder, reading)
    some = [_edit(pair) for pair in islice(pairs.outcomes(), AT_ONCE) if isinstance(pair, PairRecord)]
    cost = cost_of(some, rubric, server, out / "none", votes=votes)
    times = len(pairs) / max(1, len(some))
    return Cost(
        requests=round(times * cost.requests),
        known=0,
        pictures=round(times * cost.pictures),
        tokens_in=round(times * cost.tokens_in),
        tokens_out=round(times * cost.tokens_out),
    )


def _batches(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(islice(rows, AT_ONCE)):
        yield batch


def _named(batch: Sequence[tuple[int, Any]], hooks: Hooks) -> Iterator[tuple[int, PairRecord]]:
    for number, found in batch:
        if isinstance(found, DatasetError):
            hooks.error(number, found)
        else:
            yield number, found if found.key else replace(found, key=f"row/{number}")


def _edit(pair: PairRecord) -> JudgedEdit:
    told: dict[str, Any] = {"instruction": pair.edit_prompt, "kind": pair.kind}
    return JudgedEdit(label="pairs", name=pair.key, source=pair.original_image, edited=pair.edited_image, **told)


def _scores(verdict: Verdict, rubric: Rubric) -> dict[str, float] | None:
    marks = verdict.marks(rubric)
    if marks is None:
        return None
    return {f"{rubric.name}_{name.replace(' ', '_')}": mark for name, mark in marks.items()}
