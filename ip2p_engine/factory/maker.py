"""From a caption pair to the few pairs of pictures that are kept: generate, score, filter, encode."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from ..captions.edits import CaptionEdit
from ..clip.filter import MEASURES, FilterConfig, PairScores
from ..clip.similarity import DEFAULT_CLIP, ClipSimilarity, rounded
from ..data.ledger import CaptionCandidates, digest_of, pair_key
from ..data.store import PairRecord
from ..errors import ConfigError
from ..hooks import Hooks
from ..p2p.generator import PairCandidate, PairGenerator, PairJob, Preview

__all__ = ["CandidateMaker", "EarlyReject", "FactoryConfig", "MadeCaption", "Task", "candidate_seed"]

FORMATS: dict[str, dict[str, Any]] = {
    "png": {},
    "jpeg": {"quality": 100, "subsampling": 0},
    "webp": {"lossless": True},
}


@dataclass(frozen=True, kw_only=True)
class EarlyReject:
    """Drop a candidate whose preview, the clean picture predicted halfway, is below a threshold by a margin."""

    at: float = 0.5
    """The fraction of the steps after which to look."""
    margin: float = 0.1
    """How far below a threshold a preview's cosine must lie."""
    measures: tuple[str, ...] = ("sim_image",)
    """The cosines that may reject early."""

    def __post_init__(self) -> None:
        if not 0 < self.at < 1:
            raise ConfigError(f"early reject at {self.at}; give a fraction of the steps between 0 and 1")
        if not 0 <= self.margin <= 2:
            raise ConfigError(f"early reject has the margin {self.margin}; give a difference of cosines, 0 to 2")
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown or not self.measures:
            raise ConfigError(f"early reject by {', '.join(unknown) or 'nothing'}; choose among {', '.join(MEASURES)}")


@dataclass(frozen=True, kw_only=True)
class FactoryConfig:
    """What to make of each caption pair; the defaults are the paper's."""

    candidates: int = 100
    seed: int = 0
    """The run's: each candidate's seed follows from it, the caption pair's row and the candidate's number."""
    clip: str = DEFAULT_CLIP
    filter: FilterConfig | None = field(default_factory=FilterConfig)
    """None keeps the pictures of every candidate, to be filtered later."""
    early_reject: EarlyReject | None = None
    picture_format: str = "png"

    def __post_init__(self) -> None:
        if isinstance(self.candidates, bool) or not isinstance(self.candidates, int) or self.candidates < 1:
            raise ConfigError(f"candidates is {self.candidates!r}; give a whole number of at least 1")
        if self.picture_format not in FORMATS:
            raise ConfigError(f"the picture format is {self.picture_format!r}; choose one of {', '.join(FORMATS)}")
        if self.early_reject is not None and self.filter is None:
            raise ConfigError("early reject drops what the filter would, and there is no filter; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One caption pair to make pictures of."""

    number: int
    """Its row in the file of edits, from 0."""
    edit: CaptionEdit


@dataclass(frozen=True, kw_only=True)
class MadeCaption:
    """What one caption pair gave: the ledger's line, and the pairs that are kept, best first."""

    candidates: CaptionCandidates
    pairs: tuple[PairRecord, ...]


def candidate_seed(seed: int, caption: int, candidate: int) -> int:
    """The seed of a candidate, 0 to 2**48 - 1, from the run's seed, the caption pair's row and its own number."""
    digest = hashlib.blake2b(f"{seed}/{caption}/{candidate}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


class CandidateMaker:
    """A generator and a CLIP that turn caption pairs into pairs of pictures."""

    def __init__(
        self,
        generator: PairGenerator,
        scorer: ClipSimilarity,
        config: FactoryConfig,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        """``origin``: what else made the generator's model what it is, for the manifest."""
        self._origin = dict(origin or {})
        self._generator, self._scorer, self.config = generator, scorer, config
        if config.early_reject is not None:
            Preview(at=config.early_reject.at, judge=lambda jobs, z: []).step(generator.config)

    def describe(self) -> dict[str, Any]:
        """What a data set's manifest says of the pictures' origin; all workers of a run must agree on it."""
        generator = self._generator
        settings = {name: value for name, value in asdict(generator.config).items() if name != "batch_pairs"}
        size, dtype = list(generator.size), str(generator.model.dtype).removeprefix("torch.")
        return {
            "pairs": {**settings, "size": size, "dtype": dtype, "checkpoint": generator.name, **self._origin},
            "factory": asdict(self.config),
        }

    @property
    def overlaps(self) -> bool:
        """Whether pictures are finished beside the walks: on a device of their own, and not on a CPU."""
        return self._generator.model.device.type != "cpu"

    def batch_pairs(self) -> int:
        """Pairs in one batch, as the config says or as the free memory allows."""
        return self._generator.batch_pairs()

    def make(self, tasks: Sequence[Task], batch_pairs: int, hooks: Hooks | None = None) -> list[MadeCaption]:
        """All candidates of some caption pairs in common batches, scored and filtered.

        ``hooks.on_progress`` counts candidates. Raises Interrupted once ``hooks.should_stop()``.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ip2p-pairs") as beside:
            return self.begin(tasks, batch_pairs, beside, hooks).result()

    def begin(
        self, tasks: Sequence[Task], batch_pairs: int, beside: Executor, hooks: Hooks | None = None
    ) -> Future[list[MadeCaption]]:
        """The same, of which this thread does the walks; what follows them is done by ``beside``, one thread.

        That decodes, scores and filters a batch, and encodes the pictures that are kept, while the next one walks,
        where it ``overlaps``.
        """
        refused = {task.number: self._refusal(task.edit) for task in tasks}
        jobs = [job for task in tasks if not refused[task.number] for job in self._jobs(task)]
        results, running = _Results(), list[Future[None]]()
        if jobs:
            preview = self._preview(results)
            walks = self._generator.walks(jobs, batch_pairs=batch_pairs, preview=preview, hooks=hooks)
            for start, rows, z in walks:
                chosen = [jobs[start + row] for row in rows]
                if self.overlaps:
                    running.append(beside.submit(self._finish, chosen, z, results))
                else:
                    self._finish(chosen, z, results)

        def made() -> list[MadeCaption]:
            for one in running:
                one.result()
            return [self._made(task, refused[task.number], results) for task in tasks]

        return beside.submit(made)

    def _finish(self, jobs: Sequence[PairJob], z: Tensor, results: _Results) -> None:
        """Decode and score what walked."""
        batch = self._generator.candidates(jobs, z)
        pictures = [(one.source_image, one.edited_image) for one in batch]
        results.scores.update(zip(jobs, self._scores(pictures, jobs), strict=True))
        results.pairs.update(zip(jobs, batch, strict=True))

    def _refusal(self, edit: CaptionEdit) -> str:
        """Why the mode cannot edit these captions; empty if it can."""
        try:
            self._generator.check(edit.caption, edit.edited_caption)
        except ConfigError as error:
            return str(error)
        return ""

    def _jobs(self, task: Task) -> list[PairJob]:
        seeds = [candidate_seed(self.config.seed, task.number, n) for n in range(self.config.candidates)]
        return [
            PairJob(caption=task.edit.caption, edited_caption=task.edit.edited_caption, seed=seed) for seed in seeds
        ]

    def _scores(self, pictures: Sequence[tuple[Image.Image, Image.Image]], jobs: Sequence[PairJob]) -> list[PairScores]:
        if not jobs:
            return []
        sources, edited = ([both[n] for both in pictures] for n in range(2))
        captions = ([job.caption for job in jobs], [job.edited_caption for job in jobs])
        found = self._scorer.score(sources, edited, *captions)
        return [rounded(one) for one in found]

    def _preview(self, results: _Results) -> Preview | None:
        """The early look, which notes the scores of what it drops."""
        rule, config = self.config.early_reject, self.config.filter
        if rule is None or config is None:
            return None
        least = {name: config.floors()[name] - rule.margin for name in rule.measures}

        def judge(jobs: Sequence[PairJob], denoised: Tensor) -> list[int]:
            scores = self._scores(self._generator.pictures(denoised), jobs)
            doomed = [any(getattr(one, name) < floor for name, floor in least.items()) for one in scores]
            results.early.update({job: one for job, one, out in zip(jobs, scores, doomed, strict=True) if out})
            return [row for row, out in enumerate(doomed) if not out]

        return Preview(at=rule.at, judge=judge)

    def _made(self, task: Task, refused: str, results: _Results) -> MadeCaption:
        jobs = {} if refused else {job.seed: job for job in self._jobs(task)}
        row = CaptionCandidates(
            caption=task.number,
            edit=digest_of(task.edit),
            seeds=tuple(jobs),
            scores=tuple(results.early.get(job) or results.scores[job] for job in jobs.values()),
            early=tuple(seed for seed, job in jobs.items() if job in results.early),
            unsuited=refused,
        ).filtered(self.config.filter)
        pairs = tuple(self._record(task, jobs[seed], results) for seed in row.kept)
        return MadeCaption(candidates=row, pairs=pairs)

    def _record(self, task: Task, job: PairJob, results: _Results) -> PairRecord:
        pair = results.pairs[job]
        return PairRecord(
            original_image=_encoded(pair.source_image, self.config.picture_format),
            edited_image=_encoded(pair.edited_image, self.config.picture_format),
            edit_prompt=task.edit.instruction,
            original_prompt=task.edit.caption,
            edited_prompt=task.edit.edited_caption,
            seed=pair.seed,
            p=pair.p2p_threshold,
            cfg=pair.cfg,
            **asdict(results.scores[job]),
            key=pair_key(task.number, pair.seed),
        )


@dataclass(frozen=True)
class _Results:
    """What is known of the candidates of one ``make``."""

    scores: dict[PairJob, PairScores] = field(default_factory=dict)
    early: dict[PairJob, PairScores] = field(default_factory=dict)
    """The previews' scores of what was dropped."""
    pairs: dict[PairJob, PairCandidate] = field(default_factory=dict)


def _encoded(picture: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **FORMATS[kind])
    return stream.getvalue()
