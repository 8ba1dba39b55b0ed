"""Processor time of a training step with no option set, this checkout and another in turn; are the losses the same?

    python benchmarks/step_time.py --engine /path/to/checkout [--rounds 3] [--steps 30] [--batch 4]

Each round is a process of each checkout, on the embedded model and the same true pairs, cached. Prints a JSON line a
process, and at the end the ratio of the medians and whether the losses are the same.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def measure(store: Path, steps: int, batch: int) -> None:
    """One process: train with the engine that PYTHONPATH names, print the median step and the losses."""
    import torch

    from ip2p_engine.train import preset, train

    torch.set_num_threads(1)
    ticks, losses = [], []

    def tick(progress: object) -> None:
        ticks.append(time.process_time())
        losses.append(progress.loss)  # type: ignore[attr-defined]

    settings = {"steps": steps, "batch_size": batch, "validate_every": 0, "save_every": 10_000, "optimizer": "adamw"}
    watched: dict[str, object] = {"on_progress": tick}
    if "hooks" in inspect.signature(train).parameters:
        from ip2p_engine.hooks import Hooks

        watched = {"hooks": Hooks(on_result=lambda step, progress: tick(progress))}
    with tempfile.TemporaryDirectory() as out:
        train(preset("embedded", **settings), data=store, base="embedded-sd", out=out, device="cpu", **watched)  # type: ignore[arg-type]
    seconds = [later - earlier for earlier, later in zip(ticks[4:-1], ticks[5:], strict=True)]
    print(json.dumps({"median_ms": 1000 * statistics.median(seconds), "losses": losses}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    for name, value in {"rounds": 3, "steps": 30, "batch": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if options.store:
        measure(options.store, options.steps, options.batch)
        return
    from weighted_loss import pairs

    from ip2p_engine.data.store import PairWriter

    found: dict[str, list[dict]] = {"theirs": [], "ours": []}
    with tempfile.TemporaryDirectory() as temporary:
        with PairWriter(Path(temporary), manifest={"config": {}}) as writer:
            writer.write(*pairs(24))
        words = ["--store", temporary, "--steps", str(options.steps), "--batch", str(options.batch)]
        for _ in range(options.rounds):
            for name, engine in (("theirs", options.engine), ("ours", ROOT)):
                command = [sys.executable, __file__, "--engine", str(engine), *words]
                environment = {**os.environ, "PYTHONPATH": str(engine)}
                run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found[name].append(json.loads(run.stdout.splitlines()[-1]))
                print(json.dumps({"engine": name, "median_ms": round(found[name][-1]["median_ms"], 2)}), flush=True)
    medians = {name: statistics.median(one["median_ms"] for one in rows) for name, rows in found.items()}
    same = all(one["losses"] == found["theirs"][0]["losses"] for rows in found.values() for one in rows)
    print(json.dumps({**medians, "ratio": medians["ours"] / medians["theirs"], "same_losses": same}))


if __name__ == "__main__":
    main()
