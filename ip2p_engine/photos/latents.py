"""What the edit stage trains on: latents of sources and targets of sampled edits, in chunks of one file each.

A chunk depends on its size and number alone, so chunks can be made at any time, in any order, by several processes.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint.write import write_safetensors
from ..hooks import Hooks
from .pictures import PhotoPool
from .texts import compact_tokens, facts_of
from .world import KINDS, sample_edit, say

__all__ = ["CHUNKS", "Chunks", "make_chunk", "make_chunks"]

CHUNKS = {128: (512, 90), 256: (128, 60)}
"""Side of the views: (edits a chunk, chunks)."""
WORDINGS = 4
LONGEST = 40
"""Tokens of the longest instruction, its ends counted."""
JITTERED = 0.5
ENCODED_TOGETHER = 16
WEIGHTS = {"one colour": 4.0, "add": 4.0, "remove": 2.5, "recolour": 2.5, "reshape": 3.5, "enlarge": 2.0, "shrink": 2.0,
           "move": 4.0, "one of two": 4.0, "swap": 4.0, "several": 6.0}  # fmt: skip
"""How often a kind is drawn; the others once each."""


def make_chunks(autoencoder, pictures: Path, folder: Path, *, hooks: Hooks | None = None) -> None:
    """Make every chunk that the folder lacks."""
    hooks = hooks or Hooks()
    folder.mkdir(parents=True, exist_ok=True)
    pool = PhotoPool(pictures, ("train",), smallest=200)
    todo = [(n, side) for n in range(max(c for _, c in CHUNKS.values())) for side, (_, c) in CHUNKS.items() if n < c]
    for done, (number, side) in enumerate(todo):
        hooks.check_stop(f"stopped after {done} of {len(todo)} chunks")
        path = folder / f"{side}-{number:04d}.safetensors"
        if not path.exists():
            chunk = make_chunk(autoencoder, pool, side, number)
            write_safetensors(chunk, path, {"format": "pt"})
        hooks.progress(done + 1, len(todo))


@torch.no_grad()
def make_chunk(autoencoder, pool: PhotoPool, side: int, number: int) -> dict[str, Tensor]:
    """source, target: posterior means, float16, (N, 4, side/8, side/8); tokens (N, 4 wordings, 40); kind; facts."""
    rng = random.Random(f"{side} {number}")
    kinds = rng.choices(KINDS, [WEIGHTS.get(kind, 1.0) for kind in KINDS], k=CHUNKS[side][0])
    rows: dict[str, list[Tensor]] = {"tokens": [], "facts": [], "source": [], "target": []}
    pairs: list[Tensor] = []
    for n, kind in enumerate(kinds):
        seed = rng.randrange(2**31)
        edit = sample_edit(pool, kind, seed=seed, held_out=False, size=side, jittered=JITTERED)
        texts = [say(edit.canvas, edit.operations, rng, held_out=False) for _ in range(WORDINGS)]
        rows["tokens"].append(compact_tokens(texts)[:, :LONGEST].to(torch.int16))
        rows["facts"].append(facts_of(edit.operations).to(torch.int8))
        pairs.append(torch.stack([edit.source, edit.target]))
        if len(pairs) == ENCODED_TOGETHER or n == len(kinds) - 1:
            source, target = _encode(autoencoder, torch.stack(pairs)).unbind(1)
            rows["source"].append(source)
            rows["target"].append(target)
            pairs = []
    table = {name: (torch.cat if name in ("source", "target") else torch.stack)(parts) for name, parts in rows.items()}
    table["kind"] = torch.tensor([KINDS.index(kind) for kind in kinds])
    return {name: value.contiguous() for name, value in table.items()}


def _encode(autoencoder, pairs: Tensor) -> Tensor:
    """(N, 2, 3, H, W) in [0, 1] to latents (N, 2, 4, H/8, W/8), unscaled, float16."""
    with torch.autocast(pairs.device.type, dtype=torch.bfloat16):
        latents = autoencoder.encode(pairs.flatten(0, 1) * 2 - 1).latent_dist.mean
    return latents.half().unflatten(0, pairs.shape[:2])


class Chunks:
    """The chunks of one size that exist, as one table; looks for new ones when asked."""

    def __init__(self, folder: Path, side: int) -> None:
        self.folder, self.side = folder, side
        self._known: list[Path] = []
        self.table: dict[str, Tensor] = {}

    def refresh(self) -> int:
        """Read new chunks; returns the number of edits."""
        paths = sorted(self.folder.glob(f"{self.side}-*.safetensors"))
        fresh = [path for path in paths if path not in self._known]
        if fresh:
            parts = ([self.table] if self.table else []) + [load_file(path) for path in fresh]
            self.table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            self._known += fresh
        return len(self.table["kind"]) if self.table else 0
