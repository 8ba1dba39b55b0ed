"""Train on any torch Dataset of (before, after, instruction), then edit with what was learned.

python train_on_a_dataset.py OUT [STEPS]
"""

from __future__ import annotations

import sys

from PIL import Image
from torch.utils.data import Dataset

from ip2p_engine import Hooks, InstructPix2Pix
from ip2p_engine.train import preset, train


class Negatives(Dataset[tuple[Image.Image, Image.Image, str]]):
    """Plain grounds and their negatives: put your own pictures here."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image, str]:
        grey = index * 4
        before = Image.new("RGB", (64, 64), (grey, 255 - grey, 128))
        after = Image.new("RGB", (64, 64), (255 - grey, grey, 127))
        return before, after, "make it a negative"


def say(step: int, steps: int, note: str) -> None:
    if step % 20 == 0:
        sys.stdout.write(f"{step} of {steps}: {note}\n")


def main(out: str, steps: str = "200") -> None:
    config = preset("embedded", steps=int(steps), batch_size=8, validate_every=0)
    result = train(config, data=Negatives(), base="embedded-sd", out=out, hooks=Hooks(on_progress=say))
    editor = InstructPix2Pix.load(result.files["ema"])
    editor.edit(Negatives()[10][0], "make it a negative")[0].image.save(f"{out}/negative.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
