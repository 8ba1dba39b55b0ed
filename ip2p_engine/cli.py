"""The ``ip2p`` command: parse, call the engine, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .errors import ConfigError, IP2PError

__all__ = ["build_parser", "main"]

SAMPLER_NAMES = ("euler_ancestral", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "ddim")
SCHEDULE_NAMES = ("model", "karras", "exponential")
DTYPES = ("float32", "float16", "bfloat16")
STAGE_NAMES = ("autoencoder", "decoder", "clip", "text-to-image", "edit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends with one sentence on stderr and exit code 2."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        return options.run(options) or 0
    except IP2PError as error:
        sys.stderr.write(f"ip2p: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("ip2p: interrupted\n")
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="ip2p", description="Edit pictures by instructions (InstructPix2Pix).")
    parser.add_argument("--version", action="version", version=f"ip2p {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is done on stderr")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_edit(commands)
    _add_demo(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_scenes(commands)
    return parser


def _add_edit(commands: Any) -> None:
    parser = _command(commands, "edit", _edit, "edit pictures by instructions")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures to edit")
    parser.add_argument("--instruction", nargs="+", required=True, metavar="TEXT", help='e.g. "make it snow"')
    _add_model_options(parser)
    _add_guidance_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first result (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="results per picture and instruction")
    parser.add_argument(
        "--size",
        default="paper",
        help="paper: the 64 rule of the paper's code; keep: the picture's own; or WxH (default: paper)",
    )
    parser.add_argument("--resolution", type=int, help="longer side that the paper's rule aims at")
    parser.add_argument("--out", type=Path, default=Path("."), help="a folder, or a file if there is one result")
    parser.add_argument("--json", action="store_true", help="print the settings of each result as JSON")


def _add_demo(commands: Any) -> None:
    parser = _command(commands, "demo", _demo, "a first edit with the embedded model, no download")
    parser.add_argument("--out", type=Path, default=Path("ip2p-demo.png"), help="the strip (default: ip2p-demo.png)")
    parser.add_argument("--seed", type=int, default=0)
    _add_model_options(parser)


def _add_inspect(commands: Any) -> None:
    parser = _command(commands, "inspect", _inspect, "say what a checkpoint is, without loading it")
    parser.add_argument("source", metavar="CHECKPOINT", help="a file, a diffusers folder, a hub id or embedded")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--sha256", action="store_true", help="also the file's SHA-256")
    parser.add_argument("--json", action="store_true")


def _add_convert(commands: Any) -> None:
    parser = _command(commands, "convert", _convert, "write a checkpoint in another layout, or merge three")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="SOURCE TARGET; with --add-difference TARGET alone")
    parser.add_argument("--to", choices=("ldm", "diffusers"), required=True, help="one file, or a pipeline folder")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the file's own")
    parser.add_argument("--base", help="a checkpoint that gives a lone UNet its autoencoder and text encoder")
    parser.add_argument(
        "--add-difference",
        nargs=5,
        metavar=("IP2P", "-", "SD_BASE", "+", "OTHER"),
        help="the editing skill of IP2P on another model of its family",
    )


def _add_scenes(commands: Any) -> None:
    scenes = commands.add_parser("scenes", help="the embedded world: judge a checkpoint, train the shipped models")
    actions = scenes.add_subparsers(metavar="ACTION", required=True)
    judge = _command(actions, "judge", _scenes_judge, "edit held-out scenes and compare with the truth")
    judge.add_argument("--n", type=int, default=1000, help="edits (default: 1000)")
    judge.add_argument("--seed", type=int, default=7)
    judge.add_argument("--sheet", type=Path, help="also write a picture of the worst results")
    judge.add_argument("--json", action="store_true")
    _add_model_options(judge)
    _add_guidance_options(judge)
    train = _command(actions, "train", _scenes_train, "train the embedded models from nothing; resumes")
    train.add_argument("stages", nargs="*", metavar="STAGE", help=f"{' '.join(STAGE_NAMES)} (default: all)")
    train.add_argument("--runs", type=Path, default=Path("runs/scenes"), help="checkpoints and logs")
    train.add_argument("--processes", type=int, default=2, help="one thread each (default: 2)")
    train.add_argument("--device", default="cpu")
    export = _command(actions, "export", _scenes_export, "write the trained models as the files that ship")
    export.add_argument("--runs", type=Path, default=Path("runs/scenes"))
    export.add_argument("--out", type=Path, required=True)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", default="embedded", help="embedded, a file, a diffusers folder or a hub id")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a file that has both")
    parser.add_argument("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    parser.add_argument("--base", help="a checkpoint that gives a lone UNet its autoencoder and text encoder")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on CUDA, else float32")
    parser.add_argument("--compile", action="store_true", help="compile the network (CUDA)")


def _add_guidance_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text-cfg", type=float, help="how strongly to follow the instruction (default: 7.5)")
    parser.add_argument("--image-cfg", type=float, help="how strongly to keep the picture (default: 1.5)")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's recommendation")
    parser.add_argument("--sampler", default="euler_ancestral", metavar="NAME", help=", ".join(SAMPLER_NAMES))
    parser.add_argument("--schedule", default="model", metavar="NAME", help=", ".join(SCHEDULE_NAMES))


def _command(commands: Any, name: str, run: Callable, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _edit(options: argparse.Namespace) -> None:
    from .edit_command import edit_files

    config = _config(options, size=options.size, resolution=options.resolution)
    seeds = range(options.seed, options.seed + _positive("--seeds", options.seeds))
    rows = edit_files(
        options.images, options.instruction, load=lambda: _load(options), config=config, seeds=seeds, out=options.out
    )
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n" if options.json else f"{row['file']}\n")


def _demo(options: argparse.Namespace) -> None:
    from .scenes.demo import make_demo

    report = make_demo(_load(options), options.out, seed=options.seed)
    sys.stdout.write(report + "\n")


def _inspect(options: argparse.Namespace) -> None:
    from .checkpoint.report import report_card

    card = report_card(options.source, sha256=options.sha256, weights=options.weights)
    sys.stdout.write((card.to_json() if options.json else str(card)) + "\n")


def _convert(options: argparse.Namespace) -> None:
    from .model import convert, merge_files

    settings = {"to": options.to, "weights": options.weights, "dtype": _dtype(options)}
    if options.add_difference:
        ip2p, minus, base, plus, other = options.add_difference
        if (minus, plus, len(options.paths)) != ("-", "+", 1):
            raise ConfigError("a merge reads --add-difference IP2P - SD_BASE + OTHER --to LAYOUT -- TARGET")
        written = merge_files(ip2p, base, other, options.paths[0], **settings)
    else:
        if len(options.paths) != 2:
            raise ConfigError(f"convert got {len(options.paths)} paths; give SOURCE and TARGET")
        written = convert(*options.paths, base=options.base, **settings)
    sys.stdout.write(f"{written}\n")


def _scenes_judge(options: argparse.Namespace) -> None:
    from .scenes.exam import examine
    from .scenes.report import as_text, worst_sheet

    count, config = _positive("--n", options.n), _config(options)
    editor = _load(options)
    with _bar(count, "edits") as bar:
        result = examine(editor, count=count, seed=options.seed, config=config, on_progress=bar)
    if options.sheet:
        worst_sheet(result).save(options.sheet)
    sys.stdout.write((json.dumps(result.figures()) if options.json else as_text(result)) + "\n")


def _scenes_train(options: argparse.Namespace) -> None:
    from .scenes.recipe import STAGES, train_in_processes, train_stage

    stages = options.stages or list(STAGES)
    logging.getLogger(__package__).setLevel(logging.INFO)
    if options.processes == 1 and len(stages) == 1:
        train_stage(stages[0], options.runs, device=options.device)
    else:
        train_in_processes(stages, options.runs, processes=options.processes, device=options.device)


def _scenes_export(options: argparse.Namespace) -> None:
    from .scenes.recipe import export_embedded

    export_embedded(options.runs, options.out)


def _load(options: argparse.Namespace) -> Any:
    from .edit import InstructPix2Pix

    return InstructPix2Pix.load(
        options.checkpoint,
        device=options.device,
        dtype=_dtype(options),
        compile=options.compile,
        weights=options.weights,
        base=options.base,
    )


def _dtype(options: argparse.Namespace) -> Any:
    import torch

    return getattr(torch, options.dtype) if options.dtype else None


def _config(options: argparse.Namespace, **more: Any) -> Any:
    from .edit import EditConfig

    names = ("text_cfg", "image_cfg", "steps", "sampler", "schedule")
    return EditConfig(**{name: getattr(options, name) for name in names}, **more)


def _bar(total: int, unit: str) -> Any:
    from .progress import progress

    return progress(total, unit)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{name} is {value}; give a whole number of at least 1")
    return value
