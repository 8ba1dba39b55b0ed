"""Edit every picture of a folder, however many there are: one batch is held at a time.

python edit_a_folder.py PICTURES "make it snow" RESULTS [CHECKPOINT]
"""

from __future__ import annotations

import sys
from pathlib import Path

from ip2p_engine import InstructPix2Pix


def main(folder: str, instruction: str, results: str, checkpoint: str = "embedded") -> None:
    pictures = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in {".png", ".jpg", ".jpeg"})
    Path(results).mkdir(parents=True, exist_ok=True)
    editor = InstructPix2Pix.load(checkpoint)
    for result in editor.edits(pictures, instruction, seeds=0):
        result.image.save(Path(results) / f"{pictures[result.index].stem}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
