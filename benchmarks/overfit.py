"""A run that learns its 40 pairs by heart: the held-out loss falls, turns, and the loss of the steps goes on falling.

    python benchmarks/overfit.py RUN [--steps 600] [--picture docs/images/overfit.png]

Prints the validation losses at the first step that was measured, where the average is best, and at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from weighted_loss import png

from ip2p_engine.captions.edits import in_test_split
from ip2p_engine.data.record import PairRecord
from ip2p_engine.data.store import PairWriter
from ip2p_engine.scenes.grammar import captions_of, sample_edits
from ip2p_engine.scenes.world import render
from ip2p_engine.train import preset, train


def pairs(trained: int, held_out: int) -> list[PairRecord]:
    """True pairs, so many of captions to train on, so many of the test split's."""
    made: dict[bool, list[PairRecord]] = {False: [], True: []}
    for number, edit in enumerate(sample_edits(40 * held_out, seed=5, held_out=False)):
        before, after = (captions_of(scene)[0] for scene in (edit.source, edit.target))
        row = made[in_test_split(before)]
        if len(row) < (held_out if in_test_split(before) else trained):
            texts = {"edit_prompt": edit.instruction, "original_prompt": before, "edited_prompt": after}
            pictures = {"original_image": png(render(edit.source)), "edited_image": png(render(edit.target))}
            row.append(PairRecord(**texts, **pictures, seed=None, p=None, cfg=None, key=f"{number:07d}/0"))
    return [*made[False], *made[True]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = options.run.parent / f"{options.run.name}-pairs"
    if not store.exists():
        with PairWriter(store, manifest={"config": {"truth": True}}) as writer:
            writer.write(*pairs(40, 32))
    settings = {"batch_size": 8, "schedule": "constant", "ema_decay": 0.98, "hold_out_test": True, "keep": 1}
    settings |= {"optimizer": "adamw", "learning_rate": 1e-3, "validate_every": 25, "validation_count": 1}
    config = preset("embedded", steps=options.steps, **settings)
    result = train(config, data=store, base="embedded-sd", out=options.run, device="cpu")
    rows = [json.loads(line) for line in (options.run / "validation.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["ema"])
    print(json.dumps({"first": rows[0], "best": best, "last": rows[-1], "training_loss": result.loss}))
    if options.picture:
        shutil.copy(result.curve, options.picture)


if __name__ == "__main__":
    main()
