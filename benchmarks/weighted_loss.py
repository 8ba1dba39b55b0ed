"""Losses that count the changed part of a pair more, against the plain one: right edits and background PSNR on scenes.

    python benchmarks/weighted_loss.py RUNS [--ways plain change mask] [--seeds 3] [--steps 500] [--batch 4] [--n 200]

Every way trains the embedded text-to-image model on the same true pairs, with the same seeds and settings, and is
judged on the same held-out scenes. A run that was stopped goes on, and one that is judged is not made again. Prints a
JSON line a run, the means, and each way's difference from the plain loss with a 95 % interval over the edits.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ip2p_engine import InstructPix2Pix
from ip2p_engine.data.record import PairRecord
from ip2p_engine.data.store import PairWriter
from ip2p_engine.evaluate.statistics import bootstrap_means, interval
from ip2p_engine.scenes.exam import examine
from ip2p_engine.scenes.grammar import sample_edits
from ip2p_engine.scenes.world import render
from ip2p_engine.train import preset, train

WAYS: dict[str, dict[str, Any]] = {"plain": {}, "change": {"change_weight": 1.0}, "mask": {"unmasked_weight": 0.5}}
CHANGED = 16  # levels of 255
FIGURES = {"right": "success", "asked": "asked", "kept": "kept", "background": "background_psnr"}


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def pairs(count: int) -> list[PairRecord]:
    """True pairs of training edits, with a mask of what changes."""
    made = []
    for number, edit in enumerate(sample_edits(count, seed=11, held_out=False)):
        before, after = render(edit.source), render(edit.target)
        difference = np.abs(np.asarray(after, dtype=int) - np.asarray(before, dtype=int)).max(axis=-1)
        mask = Image.fromarray(((difference > CHANGED) * 255).astype(np.uint8))
        texts = {"edit_prompt": edit.instruction, "original_prompt": "", "edited_prompt": ""}
        pictures = {"original_image": png(before), "edited_image": png(after), "mask": png(mask)}
        made.append(PairRecord(**texts, **pictures, seed=None, p=None, cfg=None, key=f"{number:07d}/0"))
    return made


def one(way: str, seed: int, options: argparse.Namespace, store: Path) -> dict[str, Any]:
    """Train and judge; CPU seconds count what this life took."""
    began = time.process_time()
    settings = {"steps": options.steps, "batch_size": options.batch, "seed": seed, "validate_every": 0, "keep": 1}
    # Of small batches Muon's own arithmetic would take most of the time.
    config = preset("embedded", **settings, **WAYS[way], optimizer="adamw", learning_rate=1e-3)
    out = options.runs / f"{way}-{seed}"
    result = train(config, data=store, base="embedded-sd", out=out, device="cpu")
    editor = InstructPix2Pix.load(result.files["ema"], device="cpu", dtype=torch.float32)
    edits = [row["judged"] for row in examine(editor, count=options.n, seed=7).rows]
    columns = {name: [round(float(edit[key]), 3) for edit in edits] for name, key in FIGURES.items()}
    return {"way": way, "seed": seed, "cpu_seconds": round(time.process_time() - began), "edits": columns}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each way the means, of each seed too, and what it is above the plain loss of the same seed and edit."""
    by_way: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_way.setdefault(row["way"], {})[row["seed"]] = row["edits"]
    lines = []
    for way, mine in by_way.items():
        for name in FIGURES:
            means = {seed: round(float(np.mean(edits[name])), 4) for seed, edits in mine.items()}
            line = {"way": way, "figure": name, "mean": round(statistics.mean(means.values()), 4), "by_seed": means}
            shared = sorted(mine.keys() & by_way.get("plain", {}).keys())
            if way != "plain" and shared:
                gains = [np.subtract(mine[seed][name], by_way["plain"][seed][name]) for seed in shared]
                low, high = interval(bootstrap_means(np.mean(gains, axis=0)[:, None], resamples=10_000))
                line["above_plain"] = [round(float(value), 4) for value in (np.mean(gains), low[0], high[0])]
            lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    for name, value in {"seeds": 3, "steps": 500, "batch": 4, "pairs": 300, "n": 200}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    store, log = options.runs / "pairs", options.runs / "results.jsonl"
    if not (store / "manifest.json").exists():
        with PairWriter(store, manifest={"config": {"truth": True}}) as writer:
            writer.write(*pairs(options.pairs))
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(row["way"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        for way in options.ways:
            if (way, seed) not in done:
                rows.append(one(way, seed, options, store))
                with log.open("a") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps({name: rows[-1][name] for name in ("way", "seed", "cpu_seconds")}), flush=True)
    for line in summary(rows):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
