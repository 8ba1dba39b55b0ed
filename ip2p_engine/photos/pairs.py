"""True pairs of photographs as a data set, from which a distillation or adapters can learn."""

from __future__ import annotations

import io
from pathlib import Path

from torch import Tensor

from ..data.store import PairRecord, PairWriter
from ..hooks import Hooks
from ..images import to_images
from .world import KINDS, VIEW, PhotoEdit, Pool, sample_edit

__all__ = ["write_pairs"]

AT_ONCE = 50


def write_pairs(pool: Pool, folder: Path | str, count: int, *, seed: int = 1, hooks: Hooks | None = None) -> None:
    """Write the first ``count`` edits of a seed, kinds in turn, in training's phrasings.

    What is there is not made again. Raises DatasetError, or Interrupted after writing what was made.
    """
    hooks = hooks or Hooks()
    with PairWriter(folder, manifest={"config": {"photos": True, "view": VIEW}, "seed": seed}) as writer:
        known, records = writer.done_keys(), []
        for n in range(count):
            hooks.check_stop(f"stopped after {n} of {count} pairs")
            if f"{n:07d}" not in known:
                edit = sample_edit(pool, KINDS[n % len(KINDS)], seed=seed * 1_000_003 + n, held_out=False)
                records.append(_record(edit, f"{n:07d}"))
            if len(records) == AT_ONCE or n == count - 1:
                writer.write(*records)
                records = []
            hooks.progress(n + 1, count)


def _record(edit: PhotoEdit, key: str) -> PairRecord:
    return PairRecord(
        original_image=_png(edit.source),
        edited_image=_png(edit.target),
        edit_prompt=edit.instruction,
        original_prompt="",
        edited_prompt="",
        seed=None,
        p=None,
        cfg=None,
        key=key,
        kind=edit.kind,
    )


def _png(picture: Tensor) -> bytes:
    stream = io.BytesIO()
    to_images(picture[None] * 2 - 1)[0].save(stream, "PNG")
    return stream.getvalue()
