"""A folder of 24-megapixel photographs through ``ip2p edit``: peak memory by their number, and speed beside a loop.

python benchmarks/folder.py [--many 64] [--few 4] [--steps 1] [--checkpoint embedded] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--many", type=int, default=64)
    parser.add_argument("--few", type=int, default=4)
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
        jobs = {"few": (command, options.few), "many": (command, options.many), "loop": (one_by_one, options.many)}
        found = {}
        for name, (work, count) in jobs.items():
            out = Path(scratch) / name
            out.mkdir()
            measured = apart(work, pictures[:count], out, options)
            found[name] = {"pictures": count, **measured, "pictures_a_second": count / measured["seconds"]}
            for path in out.iterdir():
                path.unlink()
    found["memory"] = found["many"]["peak_mib"] / found["few"]["peak_mib"]
    found["speed"] = found["many"]["pictures_a_second"] / found["loop"]["pictures_a_second"]
    found["speed_by_processor"] = found["loop"]["processor"] / found["many"]["processor"]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
