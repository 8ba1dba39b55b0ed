"""``ip2p evaluate ablation``: train on less data and on unfiltered data, and compare."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Interrupted
from .evaluate_data import add_data_options, measure_samples, open_samples, told
from .options import Several, add_command, progress_bar, torch_dtype
from .stopping import stop_signals

__all__ = ["add"]

SHARES, TEXT_CFGS = (1.0, 0.1, 0.01), (1.5, 3.0, 4.5, 6.0, 7.5, 10.0)


def add(actions: Any) -> None:
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
    from ..evaluate.ablation import make_arms
    from ..evaluate.examples import example_sheet
    from ..evaluate.run_folder import check_run, text_of
    from ..evaluate.trade_off import points_table, save_trade_off

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
    from ..evaluate.ablation import train_arm
    from ..train import preset

    config = preset(options.preset, steps=options.steps, batch_size=options.batch_size, validate_every=0)
    with progress_bar(config.steps, "steps") as bar:
        show = lambda progress: bar(progress.step, progress.steps)  # noqa: E731
        path = train_arm(
            arm, config, options.base, options.out, device=options.device, on_progress=show, should_stop=should_stop
        )
    if path is None:
        raise Interrupted("stopped, as asked; the same command goes on")
    return path


def _method(options: argparse.Namespace, name: str, path: Path, should_stop: Any) -> Any:
    from ..edit import InstructPix2Pix
    from ..evaluate.methods import InstructionEdit

    editor = InstructPix2Pix.load(path, device=options.device, dtype=torch_dtype(options))
    grid = {"text_cfgs": options.text_cfg, "image_cfgs": options.image_cfg}
    return InstructionEdit(editor, label=name, **grid, should_stop=should_stop)
