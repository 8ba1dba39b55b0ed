"""What ``ip2p evaluate curve`` and ``ablation`` measure on, and the measuring."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.published import EMBEDDED_MODELS
from ..errors import ConfigError, Interrupted
from ..files import public_name
from ..hooks import Hooks
from .options import (
    DTYPES,
    Several,
    add_command,
    add_reading_options,
    check_positive,
    local_path,
    progress_bar,
    reading_of,
    stop_signals,
    torch_dtype,
)

__all__ = [
    "SCENES",
    "add_ablation",
    "add_data_options",
    "measure_samples",
    "named_checkpoints",
    "open_samples",
    "told",
    "warn_of_training",
]

SHARES, TEXT_CFGS = (1.0, 0.1, 0.01), (1.5, 3.0, 4.5, 6.0, 7.5, 10.0)
SCENES = "scenes"


def add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", default=SCENES, help="a data set, or scenes: held-out ones (the default)")
    parser.add_argument(
        "--split", metavar="NAME", default="test", help="test: one caption in twenty (default); all; or one of its own"
    )
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
    add_reading_options(parser, split=False)


def open_samples(options: argparse.Namespace) -> tuple[Sequence[Any], Any]:
    """(samples, who judges them) of the data that the options name, before anything heavy is loaded."""
    from ..evaluate.samples import StoreSamples
    from ..scenes.exam import scene_samples

    if options.data == SCENES:
        count = check_positive("--n", 200 if options.n is None else options.n)
        return scene_samples(count, seed=options.seed, captions=options.captions)
    reading = replace(reading_of(options), split=None)
    return StoreSamples(options.data, reading, split=options.split, count=options.n, seed=options.seed + 1), None


def warn_of_training(checkpoint: str, pairs: Any, *, split: str = "all", option: str = "--split test") -> None:
    """Say it where a checkpoint's header names the data that it is measured on."""
    from ..checkpoint.report import report_card
    from ..data.reading import name_of_pairs
    from ..progress import write_note

    training = {} if checkpoint in EMBEDDED_MODELS else report_card(checkpoint).training
    if pairs is None or name_of_pairs(pairs) not in (training.get("data_sets") or ()):
        return
    held_out = training.get("held_out")
    if held_out and split == "test":
        return
    rest = f"train with --hold-out-test, and measure with {option}"
    if held_out:
        rest = f"{held_out} pairs were held out; measure on those with {option}"
    name = public_name(checkpoint)
    write_note(f"ip2p: {name} was trained on this very data, so these are no figures of new edits; {rest}")


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
        return measure(samples, methods, clip, **settings, hooks=Hooks(on_progress=bar))


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


def told(options: argparse.Namespace) -> dict[str, Any]:
    """The options as a report shows them, addresses without their secrets."""
    from ..checkpoint.lora import parse_lora

    hidden = ("run", "out", "verbose", "command", "unused", "arguments")
    shown = {name: value for name, value in vars(options).items() if name not in hidden and value is not None}
    if loras := shown.pop("lora", None):
        shown["lora"] = ", ".join(f"{one.path.name}:{one.weight:g}" for one in map(parse_lora, loras))
    return {name: public_name(value) if isinstance(value, str) else str(value) for name, value in shown.items()}


def add_ablation(actions: Any) -> None:
    ablation = add_command(actions, "ablation", _ablation, "less data, and no filter, at the same budget (figure 10)")
    add_data_options(ablation)
    ablation.add_argument("--filtered", type=Path, required=True, metavar="DATA", help="pairs that passed the filter")
    ablation.add_argument("--unfiltered", type=Path, metavar="DATA", help="pairs of the same captions that did not")
    ablation.add_argument(
        "--share", type=float, action=Several, nargs="+", default=SHARES, help="of the pairs (default: 1 0.1 0.01)"
    )
    ablation.add_argument("--base", default="embedded-sd", help="text-to-image checkpoint (default: embedded-sd)")
    ablation.add_argument("--preset", default="embedded", help="the recipe, see ip2p train (default: embedded)")
    ablation.add_argument("--steps", type=int, default=500, help="of each training (default: 500)")
    ablation.add_argument("--batch-size", type=int, default=64, help="of each training (default: 64)")
    ablation.add_argument(
        "--text-cfg", type=float, action=Several, nargs="+", default=TEXT_CFGS, metavar="S_T", help="swept"
    )
    ablation.add_argument(
        "--image-cfg", type=float, action=Several, nargs="+", default=[1.5], metavar="S_I", help="default: 1.5"
    )


def _ablation(options: argparse.Namespace) -> None:
    from ..evaluate.report import example_sheet
    from ..evaluate.run_folder import check_run, text_of
    from ..evaluate.trade_off import make_arms, points_table, save_trade_off

    if len({*options.text_cfg}) > 1 and len({*options.image_cfg}) > 1:
        raise ConfigError("an ablation sweeps one guidance; give several s_T or several s_I, not both")
    samples, judge = open_samples(options)
    arms = make_arms(options.filtered, options.unfiltered, options.share)
    check_run(options.out, "ablation")
    with stop_signals() as should_stop:
        files = [_train(options, arm, should_stop) for arm in arms]
        methods = [_method(options, arm.name, path, should_stop) for arm, path in zip(arms, files, strict=True)]
        resolution = methods[0].model.spec.resolution
        rows = measure_samples(options, "ablation", samples, judge, methods, resolution)
        examples = example_sheet(samples, methods, resolution=resolution, count=6, first=1)
    title = f"Less data, and no filter: {options.steps} steps of {options.batch_size} each"
    points = save_trade_off(options.out, rows, kind="ablation", title=title, settings=told(options), examples=examples)
    sys.stdout.write(f"{text_of(points_table(points))}\n{options.out / 'curve.png'}\n")


def _train(options: argparse.Namespace, arm: Any, should_stop: Any) -> Path:
    from ..evaluate.trade_off import train_arm
    from ..train import preset

    config = preset(options.preset, steps=options.steps, batch_size=options.batch_size, validate_every=0)
    with progress_bar(config.steps, "steps") as bar:
        hooks = Hooks(on_progress=bar, should_stop=should_stop)
        path = train_arm(arm, config, options.base, options.out, device=options.device, hooks=hooks)
    if path is None:
        raise Interrupted("stopped, as asked; the same command goes on")
    return path


def _method(options: argparse.Namespace, name: str, path: Path, should_stop: Any) -> Any:
    from ..edit import InstructPix2Pix
    from ..evaluate.methods import InstructionEdit

    editor = InstructPix2Pix.load(path, device=options.device, dtype=torch_dtype(options))
    grid = {"text_cfgs": options.text_cfg, "image_cfgs": options.image_cfg}
    return InstructionEdit(editor, label=name, **grid, hooks=Hooks(should_stop=should_stop))
