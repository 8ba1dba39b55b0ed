"""What became of every candidate, also of those without pictures: a ledger beside the shards of a data set.

``candidates/IIIII-of-NNNNN.jsonl`` has a line a caption pair with the scores of all its candidates. A caption pair is
done once its line is there; its pictures reach the disk before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..captions.edits import CaptionEdit
from ..clip.filter import MEASURES, FilterConfig, FilterReport, PairScores, filter_candidates
from ..errors import DatasetError
from ..files import AppendLog, json_lines

__all__ = ["CandidateLog", "CaptionCandidates", "digest_of", "has_candidates", "pair_key", "read_candidates"]

FOLDER = "candidates"


@dataclass(frozen=True, kw_only=True)
class CaptionCandidates:
    """All candidates of one caption pair, in the order in which they were made."""

    caption: int
    """The row of the caption pair in the file of edits, from 0."""
    edit: str
    """``digest_of`` the caption pair: a changed file of edits is noticed."""
    seeds: tuple[int, ...]
    scores: tuple[PairScores, ...]
    kept: tuple[int, ...] = ()
    """Seeds whose pictures are in the data set, best first."""
    early: tuple[int, ...] = ()
    """Seeds that were dropped unfinished; their scores are the preview's."""
    unsuited: str = ""
    """Why no candidate could be made, such as captions that do not suit the mode."""

    def finished(self) -> list[tuple[int, PairScores]]:
        """(seed, scores) of the candidates that were made to the end."""
        early = set(self.early)
        return [(seed, score) for seed, score in zip(self.seeds, self.scores, strict=True) if seed not in early]

    def filtered(self, config: FilterConfig | None) -> CaptionCandidates:
        """The same with what a filter keeps of it; None keeps all that were finished."""
        if config is None:
            return replace(self, kept=tuple(seed for seed, _ in self.finished()))
        return self.judged(config)[0]

    def judged(self, config: FilterConfig) -> tuple[CaptionCandidates, FilterReport]:
        """The same with what a filter keeps of it, and the filter's report."""
        finished = self.finished()
        result = filter_candidates([score for _, score in finished], config)
        kept = tuple(finished[n][0] for n in result.kept)
        return replace(self, kept=kept), replace(result.report, early=len(self.early))

    def to_row(self) -> dict[str, Any]:
        """As a line of the ledger: scores as one list a measure."""
        columns = {name: [getattr(score, name) for score in self.scores] for name in MEASURES}
        row = {"caption": self.caption, "edit": self.edit, "seeds": list(self.seeds), **columns}
        rest = {"kept": list(self.kept), "early": list(self.early), "unsuited": self.unsuited}
        return row | {name: value for name, value in rest.items() if value or name == "kept"}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> CaptionCandidates:
        """Raises KeyError, TypeError or ValueError for a line that is none of ours."""
        whole = [row["caption"], *row["seeds"], *row["kept"], *row.get("early", ())]
        numbers = [value for name in MEASURES for value in row[name]]
        for values, kinds in (
            (whole, (int,)),
            (numbers, (int, float)),
            ([row["edit"], row.get("unsuited", "")], (str,)),
        ):
            for value in values:
                if type(value) not in kinds:
                    raise TypeError(f"{value!r} where a {kinds[-1].__name__} belongs")
        scores = zip(*(row[name] for name in MEASURES), strict=True)
        return cls(
            caption=row["caption"],
            edit=row["edit"],
            seeds=tuple(row["seeds"]),
            scores=tuple(PairScores(**dict(zip(MEASURES, values, strict=True))) for values in scores),
            kept=tuple(row["kept"]),
            early=tuple(row.get("early", ())),
            unsuited=row.get("unsuited", ""),
        )


class CandidateLog:
    """The ledger of one partition, for the partition's one writer."""

    def __init__(self, folder: Path, partition: tuple[int, int]) -> None:
        """Opens or makes it, and cuts off a line that a killed writer left half done; raises DatasetError."""
        self._log = AppendLog(folder / FOLDER / "{:05d}-of-{:05d}.jsonl".format(*partition), DatasetError)

    def append(self, rows: list[CaptionCandidates]) -> None:
        """Bring lines to the disk; on any error the ledger is as it was. Raises DatasetError."""
        if rows:
            self._log.append(*(row.to_row() for row in rows))


def has_candidates(folder: Path | str) -> bool:
    """Whether a data set has a ledger with anything in it."""
    return any(path.stat().st_size for path in (Path(folder) / FOLDER).glob("*.jsonl"))


def read_candidates(folder: Path | str) -> Iterator[CaptionCandidates]:
    """All lines of all partitions; a last line that is still being written is left out. Raises DatasetError."""
    for path in sorted((Path(folder) / FOLDER).glob("*.jsonl")):
        for row in json_lines(path, DatasetError, growing=True):
            try:
                yield CaptionCandidates.from_row(row)
            except (KeyError, TypeError, ValueError) as error:
                raise DatasetError(f"{path} has a line that is no caption's ({error!r}); restore the file") from error


def digest_of(edit: CaptionEdit) -> str:
    """16 hexadecimal digits that follow from the three texts."""
    texts = "\0".join((edit.caption, edit.instruction, edit.edited_caption))
    return hashlib.blake2b(texts.encode(), digest_size=8).hexdigest()


def pair_key(caption: int, seed: int) -> str:
    """The key of a pair: the caption pair's row, and the seed."""
    return f"{caption:07d}/{seed}"
