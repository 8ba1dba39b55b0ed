"""Kill ``ip2p pairs`` with SIGKILL at random instants, and compare what it ends with with an undisturbed run's data.

    OMP_NUM_THREADS=1 python tests/robustness/kill_pairs.py [--kills 50] [--seed 0]

The whole command, from the file of edits to shards and ledger, with the embedded models and little work. A killed run
is started again, as a user would, until it has finished. Between two lives the data set must verify, and the ledger
must name no pair that is not there. At the end every file of pairs and the ledger must equal the undisturbed run's byte
for byte. Each life is a process of its own, forked from one that has done nothing but the imports. Prints one JSON
line; exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pyarrow.parquet  # noqa: F401  (the lives inherit the imports)

from ip2p_engine import cli
from ip2p_engine.captions.edits import make_captions
from ip2p_engine.data import tools as dataset
from ip2p_engine.data.ledger import pair_key, read_candidates
from ip2p_engine.data.store import PairStore
from ip2p_engine.factory import run, workers  # noqa: F401
from ip2p_engine.scenes.grammar import GrammarSource, sample_captions

OPTIONS = "--candidates 4 --steps 2 --batch-pairs 6 --rows-per-shard 6 --save-seconds 0.2 --keep 2 --device cpu"
THRESHOLDS = "--min-sim-0 0 --min-sim-1 0 --min-sim-direction 0.1 --min-sim-image 0.5"


def life(edits: Path, folder: Path, kill_after: float | None) -> bool:
    """One life of the command; whether it was killed before it had finished."""
    process = os.fork()
    if process == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = cli.main(["pairs", str(edits), "--out", str(folder), *OPTIONS.split(), *THRESHOLDS.split()])
        os._exit(code)
    ended = waited(process, kill_after)
    if ended is None:
        os.kill(process, signal.SIGKILL)
        ended = waited(process, None)
    if os.WIFSIGNALED(ended):
        return True
    if os.WEXITSTATUS(ended):
        raise SystemExit(f"ip2p pairs ended with {os.WEXITSTATUS(ended)}; run it by hand to see why")
    return False


def waited(process: int, seconds: float | None) -> int | None:
    """The process's exit status, or None if it lives on after so many seconds."""
    if seconds is None:
        return os.waitpid(process, 0)[1]
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return status
        time.sleep(0.002)
    return None


def faults(folder: Path) -> list[str]:
    """What is wrong with a data set between two lives; a torn temporary file is not, and goes with the next life."""
    if not (folder / "manifest.json").exists():
        return []
    found = [fault for fault in dataset.verify(folder).faults if "left of a killed writer" not in fault]
    rows, keys = list(read_candidates(folder)), PairStore(folder).keys()
    named = [pair_key(row.caption, seed) for row in rows for seed in row.kept]
    found += [f"the ledger names {key}, which is not there" for key in named if key not in keys]
    numbers = [row.caption for row in rows]
    return found + (["a caption pair is in the ledger twice"] if len(numbers) != len(set(numbers)) else [])


def contents(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def trial(place: Path, *, kills: int, captions: int, seed: int) -> dict:
    edits, undisturbed = place / "edits.jsonl", place / "undisturbed"
    make_captions(sample_captions(captions, seed=seed), GrammarSource(), edits)
    started = time.monotonic()
    life(edits, undisturbed, None)
    seconds, expected = time.monotonic() - started, contents(undisturbed)
    draw, wrong, killed, lives, runs, torn = random.Random(seed), [], 0, 0, 0, 0
    while killed < kills:
        folder, finished, runs = place / f"killed-{runs}", False, runs + 1
        while not finished:
            finished = not life(edits, folder, draw.uniform(0, 0.7 * seconds) if killed < kills else None)
            lives, killed = lives + 1, killed + (not finished)
            torn += any(folder.rglob(".*.part"))
            wrong += faults(folder)
        if contents(folder) != expected:
            wrong.append(f"{folder.name} ended with other files")
    pairs = len(PairStore(undisturbed))
    counts = {
        "kills": killed,
        "within_a_file": torn,
        "lives": lives,
        "finished_runs": runs,
        "seconds": round(seconds, 1),
    }
    return {**counts, "caption_pairs": captions, "pairs": pairs, "files": len(expected), "faults": sorted(set(wrong))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--captions", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = trial(Path(folder), kills=options.kills, captions=options.captions, seed=options.seed)
    sys.stdout.write(json.dumps(report) + "\n")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
