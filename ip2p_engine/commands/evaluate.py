"""``ip2p evaluate``: the paper's curves, the field's tables, the embedded world, sweeps and reports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import evaluate_pictures, evaluate_scenes
from .options import DTYPES, add_command, check_positive, progress_bar, torch_dtype

__all__ = ["add"]

IMAGE_CFGS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SCENES = "scenes"


def add(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="measure edits: curves, tables, sweeps, reports")
    actions = evaluate.add_subparsers(metavar="ACTION", required=True)
    _add_curve(actions)
    for family in (evaluate_scenes, evaluate_pictures):
        family.add(actions)
    report = add_command(actions, "report", _report, "one HTML file of a run, with all its plots and tables")
    report.add_argument("run", type=Path, metavar="RUN", help="a folder that ip2p evaluate wrote, or several in one")
    report.add_argument("--out", type=Path, help="the file (default: RUN/report.html)")


def _add_curve(actions: Any) -> None:
    curve = add_command(actions, "curve", _curve, "image similarity against direction over a sweep (figure 8)")
    _add_data_options(curve)
    curve.add_argument("--text-cfg", type=float, nargs="+", default=[7.5], metavar="S_T", help="default: 7.5")
    curve.add_argument("--image-cfg", type=float, nargs="+", default=IMAGE_CFGS, metavar="S_I", help="1.0, 1.2 ... 2.2")
    curve.add_argument("--strength", type=float, nargs="*", default=STRENGTHS, help="SDEdit's (default: 0.3 ... 0.9)")
    curve.add_argument("--text-to-image", metavar="CHECKPOINT", help="makes SDEdit and Prompt-to-Prompt")
    curve.add_argument(
        "--checkpoint", nargs="+", default=["embedded"], metavar="[NAME=]CHECKPOINT", help="one curve each"
    )
    curve.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a file that has both")
    curve.add_argument("--steps", type=int, help="default: each checkpoint's recommendation")
    curve.add_argument("--sampler", default="euler_ancestral")
    curve.add_argument("--title", default="Image similarity against direction")


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", default=SCENES, help="a data set, or scenes: held-out ones (the default)")
    parser.add_argument("--split", choices=("test", "all"), default="test", help="one caption in twenty, or all")
    parser.add_argument(
        "--captions", choices=("short", "full"), default="short", help="of scenes: without the place, or all"
    )
    parser.add_argument("--n", type=int, help="samples (default: 200 scenes, or the whole split)")
    parser.add_argument("--seed", type=int, default=7, help="the samples' seeds follow it")
    parser.add_argument("--clip", help="scores the pictures (default: ViT-L-14/openai; for scenes embedded)")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; the same again goes on")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on CUDA, else float32")


def _curve(options: argparse.Namespace) -> None:
    from ..evaluate.curve import claims, table
    from ..evaluate.trade_off import save_trade_off

    editors, baselines, resolution = _curve_methods(options)
    rows = _measure(options, [*editors, *baselines], resolution)
    rivals = [name for name in dict.fromkeys(row["curve"] for row in rows) if name.startswith("SDEdit")]
    first = editors[0].settings[0].curve
    found = claims(rows, first, rivals) if len(options.text_cfg) == 1 and len(options.image_cfg) > 1 else []
    points = save_trade_off(options.out, rows, kind="curve", title=options.title, settings=_told(options), claims=found)
    sentences = [f"{one.sentence}: {'yes' if one.holds else 'no'} ({one.share:.1%} of resamples)" for one in found]
    sys.stdout.write("\n".join([table(points), *sentences, f"{options.out / 'curve.png'}"]) + "\n")


def _curve_methods(options: argparse.Namespace) -> tuple[list[Any], list[Any], int]:
    """(one method a checkpoint, the baselines, the resolution of all)."""
    from ..edit import InstructPix2Pix, default_dtype, usable_device
    from ..evaluate.baselines import CopyInput, PromptToPrompt, SDEdit, Target
    from ..evaluate.methods import InstructionEdit
    from ..model import load_model

    device = usable_device(options.device)
    dtype = torch_dtype(options) or default_dtype(device)
    walk = {"steps": options.steps, "sampler": options.sampler}
    editors = []
    for name, path in named_checkpoints(options.checkpoint):
        editor = InstructPix2Pix.load(path, device=device, dtype=dtype, weights=options.weights)
        grid = {"text_cfgs": options.text_cfg, "image_cfgs": options.image_cfg}
        editors.append(InstructionEdit(editor, label=name, **grid, **walk))
    baselines: list[Any] = [CopyInput(), Target("true edit" if options.data == SCENES else "the data set's pair")]
    source = options.text_to_image or ("embedded-sd" if options.data == SCENES else None)
    if source is not None:
        painter = load_model(source, device=device, dtype=dtype)
        if options.strength:
            baselines.insert(0, SDEdit(painter, name=source, strengths=options.strength, **walk))
        baselines.append(PromptToPrompt(painter, name=source, steps=options.steps))
    return editors, baselines, editors[0].model.spec.resolution


def named_checkpoints(given: Sequence[str]) -> list[tuple[str, str]]:
    """(name in the legend, checkpoint) of NAME=CHECKPOINT or CHECKPOINT; raises ConfigError for a name given twice."""
    pairs = [
        (name, path) if path else (Path(name).stem, name) for name, _, path in (one.partition("=") for one in given)
    ]
    if len({name for name, _ in pairs}) < len(pairs):
        raise ConfigError(f"checkpoints are named {', '.join(name for name, _ in pairs)}; name each: mine=PATH")
    return pairs


def _measure(options: argparse.Namespace, methods: list[Any], resolution: int) -> list[dict[str, Any]]:
    from ..clip_similarity import DEFAULT_CLIP, ClipSimilarity
    from ..edit import usable_device
    from ..evaluate.measure import measure
    from ..evaluate.samples import StoreSamples
    from ..scenes.samples import scene_samples

    samples: Sequence[Any]
    judge = None
    if options.data == SCENES:
        count = check_positive("--n", options.n or 200)
        samples, judge = scene_samples(count, seed=options.seed, captions=options.captions)
    else:
        samples = StoreSamples(options.data, split=options.split, count=options.n, seed=options.seed + 1)
    options.clip = options.clip or ("embedded" if options.data == SCENES else DEFAULT_CLIP)
    clip = ClipSimilarity.load(options.clip, device=usable_device(options.device))
    settings = {"resolution": resolution, "batch": options.batch, "folder": options.out, "judge": judge}
    with progress_bar(0, "pictures") as bar:
        return measure(samples, methods, clip, **settings, on_progress=bar)


def _told(options: argparse.Namespace) -> dict[str, Any]:
    """The options as a report shows them."""
    hidden = ("run", "out", "verbose")
    return {name: str(value) for name, value in vars(options).items() if name not in hidden and value is not None}


def _report(options: argparse.Namespace) -> None:
    from ..evaluate.page import write_report

    sys.stdout.write(f"{write_report(options.run, options.out or options.run / 'report.html')}\n")
