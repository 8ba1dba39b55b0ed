"""Pairs that were made, on disk as they are made: Cancel, a crash or another Run lose none of them."""

from __future__ import annotations

import io as streams
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import folder_paths

from ..ip2p_engine.images import open_image
from ..ip2p_engine.version import __version__
from . import _host

__all__ = ["PairView", "count_lost", "make_record", "stored_pairs", "with_key"]

KIND = "ip2p_pairs"
ROWS_PER_SHARD = 32  # the last shard is written again with every batch
_used: set[Path] = set()
_lost = 0


class PairView(Sequence):
    """Some pairs of a sequence, with some of their fields changed; read when they are asked for."""

    def __init__(self, pairs: Sequence[Any], rows: Sequence[int], changes: Sequence[Mapping[str, Any]]) -> None:
        self._pairs, self._rows, self._changes = pairs, list(rows), list(changes)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        return with_key(replace(self._pairs[self._rows[index]], **self._changes[index]))


def stored_pairs(maker: Any, jobs: Sequence[Any], batch: int, instruction: str, networks: str) -> PairView:
    """The pairs of jobs of one caption pair; those that are not on disk yet are made, and written batch by batch.

    ``networks`` names the MODEL, CLIP and VAE. Raises DatasetError if the disk refuses, or another ComfyUI is
    making the same pairs.
    """
    from ..ip2p_engine.data.store import PairStore, PairWriter

    settings = asdict(maker.config)
    captions = {"caption": jobs[0].caption, "edited_caption": jobs[0].edited_caption}
    made_by = {"made_by": f"IP2P Generate Pairs {__version__}", "networks": networks}
    place = Path(folder_paths.get_output_directory()) / KIND / _digest({**made_by, **settings}) / _digest(captions)
    manifest = {"config": {**made_by, **captions, **settings}}
    with PairWriter(place, manifest=manifest, rows_per_shard=ROWS_PER_SHARD) as writer:
        there = writer.done_keys()
        missing = [job for job in jobs if str(job.seed) not in there]
        parts = [missing[start : start + batch] for start in range(0, len(missing), batch)]
        before = -(-(len(jobs) - len(missing)) // batch)
        for number, part in enumerate(parts, before):
            _host.check_interrupted()
            made = maker.make(part, number, before + len(parts))
            writer.write(*(_row(one, instruction) for one in made))
            writer.flush()
            finished = [made[-1].source_image, made[-1].edited_image]
            _host.show_finished(finished, (number + 1) * maker.config.steps, (before + len(parts)) * maker.config.steps)
    _used.add(place)
    store = PairStore(place)
    rows = {seed: row for row, seed in enumerate(store.columns("seed")["seed"])}
    texts = {"edit_prompt": instruction, "key": ""}
    pairs = PairView(store, [rows[job.seed] for job in jobs], [texts] * len(jobs))
    if not missing:
        _host.show_finished([open_image(pairs[-1].original_image), open_image(pairs[-1].edited_image)], 1, 1)
    return pairs


def count_lost() -> int:
    """How often pairs that this ComfyUI made were deleted from the disk: a node has to make them again."""
    global _lost
    gone = {place for place in _used if not place.exists()}
    _used.difference_update(gone)
    _lost += len(gone)
    return _lost


def make_record(
    before: Any, after: Any, *, seed: int | None = None, p: float | None = None, cfg: float | None = None, **texts: Any
) -> Any:
    """A PairRecord of two pictures and their texts."""
    from ..ip2p_engine.data.store import PairRecord

    pictures = {"original_image": _png(before), "edited_image": _png(after)}
    values: dict[str, Any] = {**pictures, **texts, "seed": seed, "p": p, "cfg": cfg}
    return with_key(PairRecord(**{"key": "", **values}))


def with_key(record: Any) -> Any:
    """The record with a key that follows from its texts and its pictures, unless it has one."""
    if record.key:
        return record
    words = "\0".join([record.original_prompt, record.edited_prompt, record.edit_prompt]).encode()
    parts = (words, record.original_image + record.edited_image)
    return replace(record, key="/".join(blake2b(part, digest_size=8).hexdigest() for part in parts))


def _row(candidate: Any, instruction: str) -> Any:
    """A candidate as it is stored; a later reader may have another instruction, which changes no picture."""
    return make_record(
        candidate.source_image,
        candidate.edited_image,
        original_prompt=candidate.caption,
        edited_prompt=candidate.edited_caption,
        edit_prompt=instruction,
        seed=candidate.seed,
        p=candidate.p2p_threshold,
        cfg=candidate.cfg,
        key=str(candidate.seed),
    )


def _png(picture: Any) -> bytes:
    stream = streams.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _digest(values: Mapping[str, Any]) -> str:
    return blake2b(repr(sorted(values.items())).encode(), digest_size=8).hexdigest()
