"""Train where no file may become larger than a limit, at limits up to the largest file; then without one.

    OMP_NUM_THREADS=1 python tests/robustness/full_disk.py [--sizes 12] [--steps 6]

A limit stands for a disk that fills up while a file is written (RLIMIT_FSIZE needs no rights). Under it the command
has to end with one sentence and exit code 2, and leave nothing hidden but locks; without it the same command has to end
with the losses and files of a run that was never disturbed. Prints one JSON line; exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "train"), str(ROOT / "tests" / "robustness")]

import torch  # noqa: E402
from conftest import small_model, true_pairs  # noqa: E402
from kill_train import differences  # noqa: E402

from ip2p_engine.checkpoint.write import save_ldm  # noqa: E402
from ip2p_engine.cli import main as command  # noqa: E402
from ip2p_engine.data.store import PairWriter  # noqa: E402

SMALLEST = 4096  # what the command says has to fit
SETTINGS = ("resize=[64,72]", "validation_count=1", "validation_pairs=2", "posthoc_every=2", "keep=1")


def live(home: Path, out: Path, steps: int, limit: int | None) -> tuple[int, str]:
    """(exit code, the last line on stderr) of a command in a process of its own."""
    said = home / "said.txt"
    words = ["train", "--data", home / "pairs", "--base", home / "base.safetensors", "--out", out, "--device", "cpu"]
    words += ["--steps", steps, "--batch-size", 4, "--resolution", 64, "--workers", 0, "--cache", "--save-every", 2]
    words += ["--validate-every", 2, "--export-every", 2, "--outputs", "ema", "raw", "--set", *SETTINGS]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = command([str(word) for word in words])
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, said.read_text()[-3000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, refused = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        save_ldm(small_model(), home / "base.safetensors")
        with PairWriter(home / "pairs", manifest={"config": {}}) as writer:
            writer.write(*true_pairs(10))
        live(home, home / "truth", options.steps, None)
        sizes = sorted(path.stat().st_size for path in (home / "truth").rglob("*") if path.is_file())
        inner = [round(sizes[-1] * n / options.sizes) for n in range(1, options.sizes - 1)]
        limits = [SMALLEST, *inner, sizes[-1] - 1]
        for number, limit in enumerate(limits):
            out = home / f"full-{number}"
            code, said = live(home, out, options.steps, limit)
            refused += code == 2
            sentence = [line for line in said.splitlines() if line.startswith("ip2p: ")]
            if code != 2 or "Traceback" in said or len(sentence) != 1:
                found.append(f"{limit} bytes: ended {code}, saying {said[-300:]!r}")
            hidden = (
                [p.name for p in out.rglob(".*") if p.name != ".lock" and p.suffix != ".lock"] if out.exists() else []
            )
            found += [f"{limit} bytes: {name} is left" for name in hidden]
            code, said = live(home, out, options.steps, None)
            if code:
                found.append(f"after {limit} bytes: ended {code}, saying {said[-300:]!r}")
                continue
            found += [f"after {limit} bytes: {one}" for one in differences(out, home / "truth")]
        sys.stdout.write(json.dumps({"sizes": limits, "refused": refused, "faults": found}) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
