"""A folder of 24-megapixel photographs through ``ip2p edit``: peak memory by their number, and speed beside a loop.

python benchmarks/folder.py [--many 64] [--few 4] [--turns 1] [--steps 1] [--checkpoint embedded] [--folder FOLDER]

With more turns the folder and the loop run in turn, each first every other time, and the medians count: what else runs
on the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

SIZE = (6000, 4000)
INSTRUCTION = "make it snow"


def photograph(seed: int) -> Image.Image:
    """Noise of every scale: it compresses as badly as a photograph."""
    random = np.random.default_rng(seed)
    channels = []
    for _ in range(3):
        plane = np.zeros((SIZE[1], SIZE[0]), np.float32)
        for power in range(2, 12):
            noise = Image.fromarray(random.standard_normal((2**power, 2**power), dtype=np.float32))
            plane += np.asarray(noise.resize(SIZE, Image.Resampling.BICUBIC)) * 2.0 ** (-0.75 * power)
        channels.append(np.uint8((127 + 50 * plane / plane.std()).clip(0, 255)))
    return Image.fromarray(np.stack(channels, -1))


def apart(work, *arguments) -> dict[str, float]:
    """{seconds, processor seconds, mebibytes at most} of a piece of work in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            code = work(*arguments) or 0
        finally:
            os._exit(code)
    begun = time.perf_counter()
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit("the measured process failed")
    scale = 1 if sys.platform == "darwin" else 1024
    processor = used.ru_utime + used.ru_stime
    return {"seconds": time.perf_counter() - begun, "processor": processor, "peak_mib": used.ru_maxrss * scale / 2**20}


def command(pictures: list[Path], out: Path, options: argparse.Namespace) -> int:
    from ip2p_engine import cli

    how = ["--steps", str(options.steps), "--checkpoint", options.checkpoint, "--out", str(out)]
    return cli.main(["edit", *map(str, pictures), "--instruction", INSTRUCTION, *how])


def one_by_one(pictures: list[Path], out: Path, options: argparse.Namespace) -> None:
    from ip2p_engine import InstructPix2Pix
    from ip2p_engine.images import save_image

    editor = InstructPix2Pix.load(options.checkpoint)
    for path in pictures:
        result = editor.edit(str(path), INSTRUCTION, steps=options.steps)[0]
        save_image(result.image, out / f"{path.stem}.png", result.settings)


def apart_of(work: Any, pictures: list[Path], scratch: str, options: argparse.Namespace) -> dict[str, float]:
    """What ``apart`` measured of some pictures; what was made is removed."""
    with TemporaryDirectory(dir=scratch) as out:
        measured = apart(work, pictures, Path(out), options)
    return {"pictures": len(pictures), **measured, "pictures_a_second": len(pictures) / measured["seconds"]}


def middle(turns: list[dict[str, float]], name: str) -> float:
    return statistics.median(turn[name] for turn in turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--many", type=int, default=64)
    parser.add_argument("--few", type=int, default=4)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--checkpoint", default="embedded")
    parser.add_argument("--folder", type=Path, help="where the pictures lie, or are made")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with TemporaryDirectory(dir=options.folder) as scratch:
        home = (options.folder or Path(scratch)) / "photographs"
        home.mkdir(exist_ok=True)
        pictures = [home / f"{number}.jpg" for number in range(options.many)]
        first = np.asarray(photograph(0))
        for number, path in enumerate(pictures):
            if not path.exists():
                Image.fromarray(np.roll(first, 90 * number, axis=1)).save(path, quality=92)
        del first
        found: dict[str, Any] = {"few": apart_of(command, pictures[: options.few], scratch, options)}
        both = {"many": command, "loop": one_by_one}
        for turn in range(options.turns):
            for name in list(both)[:: -1 if turn % 2 else 1]:
                found.setdefault(name, []).append(apart_of(both[name], pictures, scratch, options))
    many, loop = (found[name] for name in both)
    found["memory"] = middle(many, "peak_mib") / found["few"]["peak_mib"]
    found["speed"] = middle(loop, "seconds") / middle(many, "seconds")
    found["speed_by_processor"] = middle(loop, "processor") / middle(many, "processor")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
