"""What `--detail` keeps of a photograph: tones made at 256 px on a view of 1024, against the truth made at full size.

usage: python benchmarks/photo_detail.py PICTURES [--edits 48]

PICTURES is what `ip2p photos gather` wrote. A view of 1024 px of a held-out photograph is edited by embedded-photos at
256 px, with and without detail, and compared with the tone's own formula at 1024 px; the same edit at 256 px is what it
can reach.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ip2p_engine import InstructPix2Pix
from ip2p_engine.edit import EditConfig
from ip2p_engine.images import to_images
from ip2p_engine.photos.grammar import TONE_WORDS
from ip2p_engine.photos.pictures import PhotoPool
from ip2p_engine.photos.tones import TONES

SIDE, SMALL = 1024, 256
# Where the truth at full size is one: snow falls anywhere, and strokes and lines have a width in pixels.
SAME_AT_EVERY_SIZE = [name for name in TONES if name not in ("snow", "painting", "sketch")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--edits", type=int, default=45)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool = PhotoPool(options.pictures, ("held-out",), smallest=SIDE)
    editor = InstructPix2Pix.load("embedded-photos", device="cpu")
    rows = []
    for number in range(options.edits):
        generator = torch.Generator().manual_seed(number)
        source = pool.draw(SIDE, generator)
        name = SAME_AT_EVERY_SIZE[number % len(SAME_AT_EVERY_SIZE)]
        words = TONE_WORDS[name].held_out
        rows.append((name, *compare(editor, source, name, words[number % len(words)], number)))
        print(f"{rows[-1][0]:16s} " + " ".join(f"{value:6.2f}" for value in rows[-1][1:]), flush=True)
    small, plain, detailed = (statistics.mean(column) for column in list(zip(*rows, strict=True))[1:])
    large = f"at {SIDE} px {plain:.2f} enlarged, {detailed:.2f} with detail"
    print(f"{len(rows)} edits: {small:.2f} dB at {SMALL} px; {large}")


def compare(editor: InstructPix2Pix, source: Tensor, name: str, text: str, seed: int) -> tuple[float, float, float]:
    """PSNR to the truth: at 256 px, at 1024 px enlarged, at 1024 px with the source's detail."""
    (large,) = to_images(2 * source[None] - 1)
    little = large.resize((SMALL, SMALL), Image.Resampling.LANCZOS)
    config = EditConfig(resolution=SMALL)
    results = [
        editor.edit(little, text, seeds=seed, config=config)[0].image,
        editor.edit(large, text, seeds=seed, config=config)[0].image,
        editor.edit(large, text, seeds=seed, config=EditConfig(resolution=SMALL, detail=True))[0].image,
    ]
    truths = [TONES[name](pixels(picture), torch.Generator().manual_seed(0)) for picture in (little, large, large)]
    small, plain, detailed = (psnr(pixels(one), truth) for one, truth in zip(results, truths, strict=True))
    return small, plain, detailed


def pixels(picture: Image.Image) -> Tensor:
    """RGB in [0, 1], (3, H, W)."""
    from torchvision.transforms.functional import to_tensor

    return to_tensor(picture)


def psnr(result: Tensor, truth: Tensor) -> float:
    return float(-10 * (result - truth.clamp(0, 1)).square().mean().log10())


if __name__ == "__main__":
    main()
