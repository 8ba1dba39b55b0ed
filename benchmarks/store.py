"""Opening a large data set: seconds and memory for 450,000 rows (at most 0.5 s and 200 MB is the aim).

    python benchmarks/store.py                  # 450 shards of 1,000 rows with pictures of 16 px

The first shard is written by PairWriter; the others are copies of it on the disk, since only footers and columns count
here. Each figure is of a process of its own, with the page cache warm: seconds of the processor, which a busy machine
does not stretch as far, and by the clock. Peak is the process's largest resident set, in all and after its imports.
Linux only (/proc).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet  # noqa: F401  what a process that reads pays once, before the clock starts
from PIL import Image

from ip2p_engine.data.store import SCORES, PairRecord, PairStore, PairWriter

ROWS_PER_SHARD = 1000
READS: dict[str, Callable[[PairStore], object]] = {
    "open": len,
    "open, four score columns": lambda pairs: pairs.columns(*SCORES),
    "open, keys": lambda pairs: pairs.keys(),
    "open, 100 rows far apart": lambda pairs: [pairs[n * len(pairs) // 100] for n in range(100)],
}


def main() -> None:
    options = parse()
    if options.read:
        print(json.dumps(measured(options.read, options.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        about = made(Path(folder), options.shards)
        print(json.dumps({**about, "cores": os.cpu_count()}))
        for name in READS:
            command = [sys.executable, __file__, "--read", name, "--folder", folder]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            print(run.stdout.strip(), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=450)
    parser.add_argument("--read", choices=READS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def made(folder: Path, shards: int) -> dict:
    stream = io.BytesIO()
    Image.effect_noise((16, 16), 64).convert("RGB").save(stream, "JPEG", quality=95)
    with PairWriter(folder, manifest={}, rows_per_shard=ROWS_PER_SHARD) as writer:
        writer.write(*(record(n, stream.getvalue()) for n in range(ROWS_PER_SHARD)))
    first = PairStore(folder).shards[0]
    for n in range(1, shards):
        shutil.copyfile(first, first.with_name(f"train-00000-of-00001-{n:06d}.parquet"))
    megabytes = sum(path.stat().st_size for path in first.parent.iterdir()) / 2**20
    return {"rows": len(PairStore(folder)), "shards": shards, "MiB": round(megabytes)}


def record(number: int, picture: bytes) -> PairRecord:
    captions = (f"a photograph of town {number} by the sea", f"a photograph of town {number} by the sea in winter")
    return PairRecord(
        original_image=picture,
        edited_image=picture,
        edit_prompt="make it winter",
        original_prompt=captions[0],
        edited_prompt=captions[1],
        seed=number,
        p=0.5,
        cfg=7.5 + number / 1000,
        **{name: (number + k) % 1000 / 1000 for k, name in enumerate(SCORES)},
        key=f"{number:07d}/{number}",
    )


def measured(name: str, folder: Path) -> dict:
    imports = peak()
    cpu, clock = time.process_time(), time.perf_counter()
    READS[name](PairStore(folder))
    seconds = {"cpu_s": round(time.process_time() - cpu, 3), "s": round(time.perf_counter() - clock, 3)}
    return {"read": name, **seconds, "peak_MB": round(peak()), "imports_MB": round(imports)}


def peak() -> float:
    """MB; getrusage would tell of the parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else 0.0


if __name__ == "__main__":
    main()
