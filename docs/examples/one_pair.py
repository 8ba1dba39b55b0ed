"""One pair of pictures by Prompt-to-Prompt, from two captions.

python one_pair.py "a red heart" "a blue heart" BEFORE AFTER [CHECKPOINT]
"""

from __future__ import annotations

import sys

from ip2p_engine import PairGenerator


def main(caption: str, edited_caption: str, before: str, after: str, checkpoint: str = "embedded-sd") -> None:
    # Equal ends fix what is otherwise drawn from the seed: half of the steps share self-attention, at a scale of 7.5.
    generator = PairGenerator.load(checkpoint, steps=50, p2p_range=(0.5, 0.5), cfg_range=(7.5, 7.5))
    (pair,) = generator.generate(caption, edited_caption, seeds=0)
    pair.source_image.save(before)
    pair.edited_image.save(after)


if __name__ == "__main__":
    main(*sys.argv[1:])
