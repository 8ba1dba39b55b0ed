"""Kill a training run with SIGKILL at random instants, and compare what it ends with with an undisturbed run.

    OMP_NUM_THREADS=1 python tests/robustness/kill_train.py [--kills 20] [--steps 60] [--seed 0]

A run that is killed is started again with the same arguments, as a user would, until it has finished. At the end the
loss of every step, the last checkpoint, exported files, averages, validation losses and pictures must equal the
undisturbed run's bit for bit, and nothing hidden may lie there but locks. Prints one JSON line, with the number of
kills that hit a file while it was being written; exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "train")]

import torch  # noqa: E402
from conftest import config, small_model, true_pairs  # noqa: E402
from safetensors import safe_open  # noqa: E402

from ip2p_engine.checkpoint.write import save_ldm  # noqa: E402
from ip2p_engine.train import train  # noqa: E402
from ip2p_engine.train.checkpoints import latest, load_checkpoint  # noqa: E402


def live(home: Path, out: Path, steps: int, kill_after: float | None) -> bool:
    """One life of the run, in a process of its own; returns whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            more = {"validate_every": 6, "validation_count": 1, "validation_pairs": 2, "posthoc_every": 6}
            more |= {"export_every": 8, "outputs": ("ema", "raw"), "train_text_encoder": True}
            settings = config(steps=steps, save_every=2, cache=True, learning_rate=1e-3, **more)
            train(settings, data=true_pairs(10), base=home / "base.safetensors", out=out, device="cpu")
            os._exit(0)
        finally:
            os._exit(1)
    ends = time.monotonic() + (kill_after if kill_after is not None else 3600)
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"a life of the run ended by itself with status {status}")
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def torn(out: Path) -> int:
    """What killed writers left half done."""
    return sum(1 for _ in out.rglob(".*.part")) if out.exists() else 0


def differences(out: Path, truth: Path) -> list[str]:
    found = []
    ours, theirs = (
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (out, truth)
    )
    found += [] if ours == theirs else ["the losses differ"]
    mine, whole = (load_checkpoint(latest(folder / "checkpoints")) for folder in (out, truth))
    for part in ("trained", "ema"):
        equal = all(torch.equal(mine[part][name], value) for name, value in whole[part].items())
        found += [] if equal else [f"{part} weights differ"]
    for part in ("trained", "ema"):
        found += [] if set(mine[part]) == set(whole[part]) else [f"{part} holds others"]
    names = [sorted(path.relative_to(f).as_posix() for path in f.rglob("*") if path.is_file()) for f in (out, truth)]
    found += [f"only one has {name}" for name in sorted(set(names[0]) ^ set(names[1]))]
    for name in (name for name in names[1] if name in names[0]):
        if name.endswith(".safetensors"):
            found += [] if content(out / name) == content(truth / name) else [f"{name} differs"]
        if name.endswith(".png") and name.startswith("validation/") or name == "validation.jsonl":
            found += [] if (out / name).read_bytes() == (truth / name).read_bytes() else [f"{name} differs"]
    found += [f"{path.name} is left" for path in out.rglob(".*") if path.suffix != ".lock" and path.name != ".lock"]
    return found


def content(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Header and tensors: safetensors writes the header's entries in no fixed order."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, kills, hits, rounds, found = random.Random(options.seed), 0, 0, 0, []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        save_ldm(small_model(), home / "base.safetensors")
        started = time.monotonic()
        live(home, home / "truth", options.steps, None)
        span = 0.35 * (time.monotonic() - started)
        while kills < options.kills:
            rounds += 1
            out = home / f"killed-{rounds}"
            while live(home, out, options.steps, draw.uniform(0, span) if kills < options.kills else None):
                kills += 1
                hits += bool(torn(out))
            found += differences(out, home / "truth")
    sys.stdout.write(json.dumps({"kills": kills, "within_a_file": hits, "runs": rounds, "differences": found}) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
