"""Edit with a LoRA, of `ip2p train --lora` or of any other trainer, and without it again.

python lora.py PICTURE "make it a negative" LORA WITH WITHOUT [WEIGHT]
"""

from __future__ import annotations

import sys

from ip2p_engine import InstructPix2Pix


def main(picture: str, instruction: str, lora: str, with_it: str, without: str, weight: str = "1") -> None:
    editor = InstructPix2Pix.load("embedded")  # or the checkpoint that the LoRA was made for
    editor.load_lora(lora, float(weight))
    editor.edit(picture, instruction)[0].image.save(with_it)
    editor.unload_loras()
    editor.edit(picture, instruction)[0].image.save(without)


if __name__ == "__main__":
    main(*sys.argv[1:])
