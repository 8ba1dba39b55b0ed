"""A sampler of one's own: a function that takes one step.

Here Ralston's second-order method, whose second look lies at two thirds of the step.
python own_sampler.py PICTURE "make it night" RESULT [CHECKPOINT]
"""

from __future__ import annotations

import sys

from torch import Tensor

from ip2p_engine import InstructPix2Pix, Step


def ralston(step: Step) -> Tensor:
    """x at step.next_sigma, by the slopes at the start (1/4) and at two thirds of the way (3/4)."""
    if step.next_sigma == 0:
        return step.denoised
    length = step.next_sigma - step.sigma
    ahead, sigma = step.x + 2 / 3 * length * step.slope, step.sigma + 2 / 3 * length
    slope = (ahead - step.denoise(ahead, sigma)) / sigma
    return step.x + length * (step.slope / 4 + 3 / 4 * slope)


def main(picture: str, instruction: str, result: str, checkpoint: str = "embedded") -> None:
    edited = InstructPix2Pix.load(checkpoint).edit(picture, instruction, sampler=ralston)[0]
    edited.image.save(result)
    sys.stdout.write(f"{edited.evaluations} evaluations by {edited.settings['sampler']}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
