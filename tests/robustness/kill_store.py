"""Kill a writer of pairs with SIGKILL at random instants, and compare what it leaves with an undisturbed run's.

    python tests/robustness/kill_store.py [--kills 50] [--rows 600] [--seed 0]

A writer that is killed is started again, as a user would, until it has finished. Between two lives the folder must
read whole, hold no pair twice and none that the run would not make. At the end every shard must equal the undisturbed
run's byte for byte. Prints one JSON line, with the number of kills that
hit a shard while it was being written; exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from ip2p_engine.data.store import PairRecord, PairStore, PairWriter

ROWS_PER_SHARD, GROUP = 16, 3


def groups(rows: int) -> Iterator[list[PairRecord]]:
    """The work: groups of pairs that follow from their number alone."""
    for start in range(0, rows, GROUP):
        yield [record(n) for n in range(start, min(start + GROUP, rows))]


def record(n: int) -> PairRecord:
    draw = random.Random(n)
    return PairRecord(
        original_image=draw.randbytes(2000),
        edited_image=draw.randbytes(2000),
        edit_prompt="make it snow",
        original_prompt=f"caption {n // GROUP}",
        edited_prompt=f"caption {n // GROUP} in the snow",
        seed=n,
        p=draw.random(),
        cfg=draw.random(),
        sim_direction=draw.random(),
        key=f"{n // GROUP:07d}/{n}",
    )


def write(folder: Path, rows: int, pause: float) -> None:
    """One life of the writer; it says when it is ready, so that kills hit the writing and not the imports."""
    with PairWriter(folder, manifest={"config": {"rows": rows}}, rows_per_shard=ROWS_PER_SHARD) as writer:
        done = writer.done_keys()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        for group in groups(rows):
            if group[0].key not in done:
                time.sleep(pause)
                writer.write(*group)


def live(folder: Path, rows: int, pause: float, kill_after: float | None) -> bool:
    """Start a writer, kill it after some seconds of writing; returns whether it was killed in time."""
    command = [sys.executable, __file__, "--write", str(folder), "--rows", str(rows), "--pause", str(pause)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
    if process.returncode not in (0, -9):
        raise SystemExit(f"the writer ended with {process.returncode}")
    return process.returncode == -9


def faults(folder: Path, expected: dict[str, PairRecord]) -> list[str]:
    """What is wrong with a folder between two lives."""
    found = list(PairStore(folder))
    keys = [row.key for row in found]
    wrong = [] if len(keys) == len(set(keys)) else ["a pair is there twice"]
    wrong += [f"{row.key} differs" for row in found if expected.get(row.key) != row]
    whole = {key for group in groups(len(expected)) for key in [row.key for row in group] if group[0].key in keys}
    return wrong + [f"{key} is missing from its group" for key in whole - set(keys)]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "data").iterdir()}


def trial(folder: Path, *, kills: int, rows: int, seed: int) -> dict:
    expected = {row.key: row for group in groups(rows) for row in group}
    live(folder / "undisturbed", rows, 0.0, None)
    draw, wrong, killed, lives, runs, torn = random.Random(seed), [], 0, 0, 0, 0
    while killed < kills:
        place, finished, runs = folder / f"killed-{runs}", False, runs + 1
        while not finished:
            finished = not live(place, rows, 0.001, draw.uniform(0, 0.15) if killed < kills else None)
            lives, killed = lives + 1, killed + (not finished)
            torn += any((place / "data").glob(".*.part"))
            wrong += faults(place, expected)
        if contents(place) != contents(folder / "undisturbed"):
            wrong.append(f"{place.name} ended with other files")
    counts = {"kills": killed, "within_a_shard": torn, "lives": lives, "finished_runs": runs, "rows": rows}
    return {**counts, "faults": sorted(set(wrong))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write, options.rows, options.pause)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = trial(Path(folder), kills=options.kills, rows=options.rows, seed=options.seed)
    sys.stdout.write(json.dumps(report) + "\n")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
