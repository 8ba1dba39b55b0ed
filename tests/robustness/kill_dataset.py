"""Kill import, merge, export and doctor --drop with SIGKILL at random instants; each must end as if undisturbed.

    python tests/robustness/kill_dataset.py [--kills 30] [--pairs 400] [--seed 0] [--only import merge export drop]

A command that is killed is started again, as a user would, until it has finished; then every file must equal the
undisturbed run's, and nothing else may be there. Every other kill falls between the first file and the end, which may
be a small part of the time. Prints a JSON line a command; exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from ip2p_engine.data.record import PairRecord
from ip2p_engine.data.store import PairWriter

ROOT = Path(__file__).parents[2]
COMMANDS, LAYOUTS = ("import", "merge", "export", "drop"), ("folders", "musubi", "hub", "original")


def picture(draw: random.Random) -> bytes:
    small = np.frombuffer(draw.randbytes(75), dtype=np.uint8).reshape(5, 5, 3)
    stream = io.BytesIO()
    Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make_source(folder: Path, pairs: int) -> Path:
    draw = random.Random(0)
    with PairWriter(folder, manifest={"config": {}}) as writer:
        for n in range(pairs):
            texts = {
                "edit_prompt": "make it snow",
                "original_prompt": f"street {n // 4}",
                "edited_prompt": f"snow {n // 4}",
            }
            pictures = {"original_image": picture(draw), "edited_image": picture(draw)}
            writer.write(PairRecord(**texts, **pictures, seed=n, p=None, cfg=None, key=f"{n // 4:07d}/{n}"))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file but empty locks, which a dead writer leaves and a new one takes."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def changes(folder: Path) -> list[float]:
    """When each thing in a folder was last changed; a hidden one may be gone at any time."""
    found = []
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):
            found.append(path.stat().st_mtime)
    return found


def live(command: list[str], kill_after: float | None, begun: Path | None = None) -> bool:
    """Run a command; returns whether it was killed in time, which counts from its first change in ``begun``."""
    started = time.time()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT) as process:
        while begun is not None and max(changes(begun), default=0) < started and process.poll() is None:
            time.sleep(0.002)
        try:
            _, said = process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return True
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}: {said.decode()}")
    return False


def trial(home: Path, name: str, arguments: list[str], kills: int, draw: random.Random) -> dict:
    command = [sys.executable, "-m", "ip2p_engine", "dataset", *arguments]
    whole_folder = home / f"{name}-whole"
    started = time.time()
    live([*command, str(whole_folder)], None)
    length, whole = time.time() - started, contents(whole_folder)
    writing = started + length - min(changes(whole_folder))
    killed, written, wrong, runs = 0, 0, [], 0
    while killed < kills:
        runs, out, lives = runs + 1, home / f"{name}-{runs}", 0
        while lives < 3:
            # A command takes a second to begin; then it may be killed anywhere.
            late = lives % 2 == 1
            after = draw.uniform(0.0, 1.0) * writing if late else draw.uniform(0.3, 1.0) * length
            if not live([*command, str(out)], after, out if late else None):
                break
            killed, lives, written = killed + 1, lives + 1, written + out.exists()
        else:
            live([*command, str(out)], None)
        if contents(out) != whole:
            wrong.append(f"{out.name}: {sorted(set(contents(out).items()) ^ set(whole.items()))[:4]}")
    return {"kills": killed, "after_the_first_file": written, "finished_runs": runs, "faults": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of each command; the layouts of export share them")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        source = str(make_source(home / "source", options.pairs))
        jobs = {
            "import": ["import", source, "--limit", str(options.pairs - 1), "--out"],
            "merge": ["merge", source, source, "--out"],
            **{f"export-{one}": ["export", source, "--layout", one, "--out"] for one in LAYOUTS},
            "drop": ["doctor", source, "--limit", "40", "--drop"],
        }
        broken = False
        for name, arguments in jobs.items():
            command = name.partition("-")[0]
            if command in options.only:
                kills = -(-options.kills // len(LAYOUTS)) if command == "export" else options.kills
                report = trial(home, name, arguments, kills, draw)
                sys.stdout.write(json.dumps({name: report}) + "\n")
                sys.stdout.flush()
                broken = broken or bool(report["faults"])
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
