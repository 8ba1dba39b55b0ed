"""``ip2p average``: a run's average of any length, after the run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..hooks import Hooks
from .options import Several, add_command, local_path, progress_bar

__all__ = ["add"]

LENGTHS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25)


def add(commands: Any) -> None:
    parser = add_command(commands, "average", _average, "a run's average of any length, of the two that it kept")
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run with posthoc_every")
    parser.add_argument(
        "--sigma-rel", type=float, action=Several, nargs="+", metavar="X", help="its width as a share of the run"
    )
    parser.add_argument("--out", type=local_path, metavar="FILE", help="write the model (.safetensors)")
    parser.add_argument("--step", type=int, metavar="N", help="after this step (default: the last that was kept)")
    parser.add_argument(
        "--curve", type=local_path, metavar="PNG", help="draw the validation loss over widths, --sigma-rel's or eleven"
    )
    parser.add_argument("--data", action=Several, nargs="+", help="the run's data, for --curve")
    parser.add_argument("--base", help="what the run was trained from, where it has moved")
    parser.add_argument("--json", action="store_true", help="print the losses as JSON")


def _average(options: argparse.Namespace) -> None:
    if not options.out and not options.curve:
        raise ConfigError("there is nothing to make; give `out` a file, or `curve` a picture")
    if options.out and len(options.sigma_rel or ()) != 1:
        raise ConfigError("`sigma_rel` says which average `out` is; give one number, such as 0.1")
    if options.curve:
        _curve(options)
    if options.out:
        from ..checkpoint.write import save_ldm
        from ..train.posthoc import model_of_length

        model = model_of_length(options.folder, options.sigma_rel[0], step=options.step, base=options.base)
        about = {"run": options.folder.name, "sigma_rel": options.sigma_rel[0], "step": options.step}
        sys.stdout.write(f"{save_ldm(model, options.out, training=about)}\n")


def _curve(options: argparse.Namespace) -> None:
    from ..plots import new_figure, save_figure
    from ..train.posthoc import length_losses

    if not options.data:
        raise ConfigError("a curve measures on the run's validation pairs; give `data`")
    data = options.data[0] if len(options.data) == 1 else options.data
    lengths = sorted(options.sigma_rel or LENGTHS)
    with progress_bar(len(lengths), "averages") as bar:
        found = length_losses(options.folder, lengths, data=data, base=options.base, hooks=Hooks(on_progress=bar))
    figure = new_figure(6, 4)
    axes = figure.add_subplot()
    axes.plot(*zip(*found, strict=True), marker="o")
    axes.set_xlabel("width of the average, share of the run (sigma_rel)")
    axes.set_ylabel("validation loss")
    axes.grid(alpha=0.3)
    save_figure(figure, options.curve)
    best = min(found, key=lambda one: one[1])
    said = json.dumps([{"sigma_rel": x, "loss": loss} for x, loss in found])
    lines = "".join(f"{x:<8g} {loss:.5f}{'  best' if x == best[0] else ''}\n" for x, loss in found)
    sys.stdout.write(f"{said}\n" if options.json else lines)
