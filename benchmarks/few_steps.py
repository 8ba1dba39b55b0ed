"""How much faster a distilled student edits than its teacher: processor time an edit, in turns, in one process.

    python benchmarks/few_steps.py STUDENT --teacher embedded-photos [--steps 1 2 4] [--rounds 9]

The teacher takes its own recommended settings, and 8 steps guided everywhere, its best on photographs
(docs/evaluation.md); the student takes its recommended ones at each number of steps. What is edited is the demo's
photograph. Prints two tables: whole edits, encoding and decoding counted, and the walk through noise levels alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from measuring import in_turn, middle, ratios

from ip2p_engine import InstructPix2Pix
from ip2p_engine.edit import EditConfig
from ip2p_engine.photos.first_edit import demo_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("--teacher", default="embedded-photos")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher, student = (InstructPix2Pix.load(name, device="cpu") for name in (options.teacher, options.student))
    best = EditConfig(text_cfg=2.0, image_cfg=1.0, steps=8)
    ways = {"teacher, 8 steps": (teacher, best), "teacher, recommended": (teacher, EditConfig())}
    ways |= {f"student, {steps}": (student, EditConfig(steps=steps)) for steps in options.steps}
    picture, text = demo_source(), "make it night"
    whole = {
        name: partial(editor.edit, picture, text, seeds=0, config=config) for name, (editor, config) in ways.items()
    }
    walks = {
        name: partial(editor.latents, editor.condition(picture, text), 0, config=config)
        for name, (editor, config) in ways.items()
    }
    evaluations = {name: run()[0].evaluations for name, run in whole.items()}
    for title, runs in (("whole edits", whole), ("walks alone", walks)):
        print(title)
        show(runs, evaluations, options.rounds)


def show(runs: dict[str, Callable[[], object]], evaluations: dict[str, int], count: int) -> None:
    """A line a way, against the first."""
    rounds, first = in_turn(runs, torch.device("cpu"), count), next(iter(runs))
    for name in runs:
        seconds = middle([one[name].cpu for one in rounds])
        low, *_, high = times = ratios(rounds, name, first, "cpu")
        faster = f"{middle(times):.1f} ({low:.1f} to {high:.1f}) times as fast"
        print(f"{name:22s} {evaluations[name]:3d} evaluations {1000 * seconds:6.0f} ms  {faster}", flush=True)


if __name__ == "__main__":
    main()
