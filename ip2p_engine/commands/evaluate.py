"""``ip2p evaluate``: the paper's curves, the field's tables, the embedded world, sweeps and reports."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..storage import public_name
from . import evaluate_ablation, evaluate_pictures, evaluate_scenes
from .evaluate_data import SCENES, add_data_options, measure_samples, open_samples, told
from .options import Several, add_command, local_path, torch_dtype

__all__ = ["add"]

IMAGE_CFGS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def add(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="measure edits: curves, tables, sweeps, reports")
    actions = evaluate.add_subparsers(metavar="ACTION", required=True)
    _add_curve(actions)
    for family in (evaluate_scenes, evaluate_pictures, evaluate_ablation):
        family.add(actions)
    report = add_command(actions, "report", _report, "one HTML file of a run, with all its plots and tables")
    report.add_argument("folder", type=Path, metavar="RUN", help="a folder that ip2p evaluate wrote, or several in one")
    report.add_argument("--out", type=local_path, help="the file (default: RUN/report.html)")


def _add_curve(actions: Any) -> None:
    curve = add_command(actions, "curve", _curve, "image similarity against direction over a sweep (figure 8)")
    add_data_options(curve)
    curve.add_argument(
        "--text-cfg", type=float, action=Several, nargs="+", default=[7.5], metavar="S_T", help="default: 7.5"
    )
    curve.add_argument(
        "--image-cfg", type=float, action=Several, nargs="+", default=IMAGE_CFGS, metavar="S_I", help="1.0, 1.2 ... 2.2"
    )
    curve.add_argument(
        "--strength", type=float, action=Several, nargs="*", help="SDEdit's (default: 0.3 ... 0.9; none: no SDEdit)"
    )
    curve.add_argument("--text-to-image", metavar="CHECKPOINT", help="makes SDEdit and Prompt-to-Prompt")
    curve.add_argument(
        "--checkpoint",
        action=Several,
        nargs="+",
        default=["embedded"],
        metavar="[NAME=]CHECKPOINT",
        help="one curve each",
    )
    curve.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a file that has both")
    curve.add_argument("--steps", type=int, help="default: each checkpoint's recommendation")
    curve.add_argument("--sampler", default="euler_ancestral")
    curve.add_argument("--title", default="Image similarity against direction")


def _curve(options: argparse.Namespace) -> None:
    from ..evaluate.curve import claims
    from ..evaluate.examples import example_sheet
    from ..evaluate.run_folder import check_run, text_of
    from ..evaluate.trade_off import points_table, save_trade_off

    named = named_checkpoints(options.checkpoint)
    painter = options.text_to_image or ("embedded-sd" if options.data == SCENES else None)
    if options.strength and painter is None:
        raise ConfigError("--strength is SDEdit's, which needs a text-to-image checkpoint; give --text-to-image")
    samples, judge = open_samples(options)
    check_run(options.out, "curve")
    editors, baselines, resolution = _curve_methods(options, named, painter)
    rows = measure_samples(options, "curve", samples, judge, [*editors, *baselines], resolution)
    rivals = [name for name in dict.fromkeys(row["curve"] for row in rows) if name.startswith("SDEdit")]
    first = editors[0].settings[0].curve
    s_ts, s_is = set(options.text_cfg), set(options.image_cfg)
    found = claims(rows, first, rivals) if len(s_ts) == 1 and len(s_is) > 1 else []
    examples = example_sheet(samples, editors[:1], resolution=resolution)
    points = save_trade_off(
        options.out,
        rows,
        kind="curve",
        title=options.title,
        settings={**told(options), "checkpoint": ", ".join(f"{name}={public_name(path)}" for name, path in named)},
        claims=found,
        examples=examples,
        closer=[one.settings[0].curve for one in editors],
    )
    sentences = [f"{one.sentence}: {'yes' if one.holds else 'no'} ({one.share:.1%} of resamples)" for one in found]
    sys.stdout.write("\n".join([text_of(points_table(points)), *sentences, f"{options.out / 'curve.png'}"]) + "\n")


def _curve_methods(
    options: argparse.Namespace, named: Sequence[tuple[str, str]], painter: str | None
) -> tuple[list[Any], list[Any], int]:
    """(one method a checkpoint, the baselines, the resolution of all)."""
    from ..edit import InstructPix2Pix, default_dtype, usable_device
    from ..evaluate.baselines import CopyInput, PromptToPrompt, SDEdit, Target
    from ..evaluate.methods import InstructionEdit
    from ..networks.model import load_model

    device = usable_device(options.device)
    dtype = torch_dtype(options) or default_dtype(device)
    walk = {"steps": options.steps, "sampler": options.sampler}
    editors = []
    for name, path in named:
        editor = InstructPix2Pix.load(path, device=device, dtype=dtype, weights=options.weights)
        grid = {"text_cfgs": options.text_cfg, "image_cfgs": options.image_cfg}
        editors.append(InstructionEdit(editor, label=name, **grid, **walk))
    baselines: list[Any] = [CopyInput(), Target("true edit" if options.data == SCENES else "the data set's pair")]
    if painter is not None:
        model, name = load_model(painter, device=device, dtype=dtype), public_name(painter)
        options.strength = STRENGTHS if options.strength is None else options.strength
        if options.strength:
            baselines.insert(0, SDEdit(model, name=name, strengths=options.strength, **walk))
        baselines.append(PromptToPrompt(model, name=name, steps=options.steps))
    return editors, baselines, editors[0].model.spec.resolution


def named_checkpoints(given: Sequence[str]) -> list[tuple[str, str]]:
    """(name in the legend, checkpoint) of NAME=CHECKPOINT or CHECKPOINT; raises ConfigError for a name given twice.

    What stands before = is a name only if it cannot be the beginning of a path or an address.
    """
    found = [re.fullmatch(r"([^=/\\:?]+)=(.+)", one) for one in given]
    pairs = [
        (match[1], match[2]) if match else (Path(public_name(one)).stem, one)
        for match, one in zip(found, given, strict=True)
    ]
    if len({name for name, _ in pairs}) < len(pairs):
        raise ConfigError(f"checkpoints are named {', '.join(name for name, _ in pairs)}; name each: mine=PATH")
    return pairs


def _report(options: argparse.Namespace) -> None:
    from ..evaluate.page import write_report

    sys.stdout.write(f"{write_report(options.folder, options.out or options.folder / 'report.html')}\n")
