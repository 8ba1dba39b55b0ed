"""What ``ip2p evaluate curve`` and ``ablation`` measure on, and the measuring."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..storage import public_name
from .options import DTYPES, check_positive, local_path, progress_bar

__all__ = ["SCENES", "add_data_options", "measure_samples", "open_samples", "told"]

SCENES = "scenes"


def add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", default=SCENES, help="a data set, or scenes: held-out ones (the default)")
    parser.add_argument("--split", choices=("test", "all"), default="test", help="one caption in twenty, or all")
    parser.add_argument(
        "--captions", choices=("short", "full"), default="short", help="of scenes: without the place, or with all"
    )
    parser.add_argument("--n", type=int, help="samples (default: 200 scenes, or the whole split)")
    parser.add_argument("--seed", type=int, default=7, help="the samples' seeds follow it")
    parser.add_argument("--clip", help="scores the pictures (default: ViT-L-14/openai; for scenes embedded)")
    parser.add_argument("--out", type=local_path, required=True, help="the run's folder; the same again goes on")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on CUDA, else float32")


def open_samples(options: argparse.Namespace) -> tuple[Sequence[Any], Any]:
    """(samples, who judges them) of the data that the options name, before anything heavy is loaded."""
    from ..evaluate.samples import StoreSamples
    from ..scenes.samples import scene_samples

    if options.data == SCENES:
        count = check_positive("--n", 200 if options.n is None else options.n)
        return scene_samples(count, seed=options.seed, captions=options.captions)
    return StoreSamples(options.data, split=options.split, count=options.n, seed=options.seed + 1), None


def measure_samples(
    options: argparse.Namespace, kind: str, samples: Sequence[Any], judge: Any, methods: Sequence[Any], resolution: int
) -> list[dict[str, Any]]:
    """Rows of the methods, scored by the CLIP that the options name, in the folder of a run of that kind."""
    from ..clip.similarity import DEFAULT_CLIP, ClipSimilarity
    from ..edit import usable_device
    from ..evaluate.measure import measure
    from ..evaluate.run_folder import claim_run

    options.clip = options.clip or ("embedded" if options.data == SCENES else DEFAULT_CLIP)
    clip = ClipSimilarity.load(options.clip, device=usable_device(options.device))
    settings = {"resolution": resolution, "batch": options.batch, "folder": options.out, "judge": judge}
    claim_run(options.out, kind)
    with progress_bar(0, "pictures") as bar:
        return measure(samples, methods, clip, **settings, on_progress=bar)


def told(options: argparse.Namespace) -> dict[str, Any]:
    """The options as a report shows them, addresses without their secrets."""
    hidden = ("run", "out", "verbose")
    shown = {name: value for name, value in vars(options).items() if name not in hidden and value is not None}
    return {name: public_name(value) if isinstance(value, str) else str(value) for name, value in shown.items()}
