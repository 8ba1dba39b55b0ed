"""Options that several commands share, and what they mean to the engine."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import ConfigError
from ..files import NO_JSON, public_name

__all__ = [
    "BY_PICTURE",
    "DTYPES",
    "Several",
    "add_command",
    "add_guidance_options",
    "add_lora_option",
    "add_model_options",
    "add_reading_options",
    "check_limits",
    "check_positive",
    "edit_config",
    "in_options",
    "json_option",
    "load_editor",
    "local_path",
    "loras_of",
    "progress_bar",
    "reading_of",
    "stop_signals",
    "torch_dtype",
]

SAMPLER_NAMES = ("euler_ancestral", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "ddim", "lcm")
GUIDANCE_NAMES = ("dual", "instruct-diffusion")
BY_PICTURE = "embedded-photos; for drawn scenes embedded"
SCHEDULE_NAMES = ("model", "karras", "exponential", "trailing")
# What can be asked for, by option, or by command and option where one command means something else by it.
MOST = {
    "batch": 1024,
    "batch_pairs": 1024,
    "batch_size": 1_000_000,
    "candidates": 10_000,
    "concurrency": 256,
    "epochs": 10_000,
    "keep": 100_000,
    "limit": 100_000,
    "lora_rank": 4096,
    "max_tokens": 100_000,
    "micro_batch": 10_000,
    "n": 1_000_000,
    "per_caption": 10_000,
    "processes": 256,
    "resolution": 4096,
    "retries": 1000,
    "rows_per_shard": 1_000_000,
    "sample": 10_000_000,
    "seeds": 10_000,
    "side": 4096,
    "steps": 1000,
    "votes": 100,
    "train.steps": 100_000_000,
    "ablation.steps": 100_000_000,
    "workers": 256,
    "worst": 10_000,
}
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # SIGHUP is Unix's, SIGBREAK Windows'
SHORT = {"lora_rank": "--lora", "p2p_range": "--p", "cfg_range": "--cfg", "rubric": "--as"}
ARGUMENT = re.compile(r"`(\w+)`")
DTYPES = ("float32", "float16", "bfloat16")
HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none


class Several(argparse.Action):
    """For options of several values: given again, an option adds to them, where argparse forgets the earlier ones."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, list(values) if given is self.default else [*given, *values])


def add_command(commands: Any, name: str, run: Callable, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run, command=name)
    return parser


def check_limits(options: argparse.Namespace) -> None:
    """Raises ConfigError for a number that no work needs and that would fill the machine or never end."""
    for name, value in vars(options).items():
        for one in value if isinstance(value, list | tuple) else [value]:
            flag = flag_of(name)
            if isinstance(one, float) and not math.isfinite(one):
                raise ConfigError(f"{name} ({flag}) is {one}; give a number")
            most = MOST.get(f"{options.command}.{name}", MOST.get(name))
            if most is not None and type(one) is int and one > most:
                raise ConfigError(f"{flag} is {one:,}; give at most {most:,}")


def flag_of(name: str) -> str:
    """The option that sets an argument."""
    return SHORT.get(name, f"--{name.replace('_', '-')}")


def in_options(text: str, options: argparse.Namespace) -> str:
    """A sentence of the engine's in the command line's words: `hold_out_test` is --hold-out-test, a call a command."""

    def option(found: re.Match[str]) -> str:
        return flag_of(found[1]) if found[1] in options else found[1]

    return ARGUMENT.sub(option, text).replace("the same call", "the same command")


def add_model_options(
    parser: argparse.ArgumentParser, *, checkpoint: str | None = "embedded", usual: str | None = None
) -> None:
    """``checkpoint`` is taken where none is named; None: the command chooses, as ``usual`` says."""
    parser.add_argument(
        "--checkpoint",
        default=checkpoint,
        help="embedded, embedded-photos, a file, a diffusers folder, a hub id or a URL "
        f"(default: {checkpoint or usual})",
    )
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a file that has both")
    parser.add_argument("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    parser.add_argument("--base", help="a checkpoint that gives a lone UNet its autoencoder and text encoder")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on CUDA, else float32")
    parser.add_argument("--compile", action="store_true", help="compile the network, for many edits of one size")
    parser.add_argument(
        "--compile-mode",
        choices=("repeated", "max"),
        default="repeated",
        help="repeated: its repeated blocks, soon done; max: all of it, on CUDA with graphs (default: repeated)",
    )
    add_lora_option(parser)
    parser.add_argument(
        "--low-memory", action="store_true", help="keep on the device only what runs: slower, equal pictures"
    )
    parser.add_argument("--vae", help="another autoencoder: a file, a folder, a hub id or a URL")
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE",
        help="a word of textual inversion, embedding:NAME in the instruction; may be given again",
    )


def add_lora_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="a LoRA of kohya, diffusers or peft, merged into the weights; may be given again",
    )


def loras_of(options: argparse.Namespace) -> Any:
    from ..checkpoint.lora import parse_lora

    return [parse_lora(text) for text in options.lora]


def add_guidance_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-cfg",
        type=float,
        help="how strongly to follow the instruction (default: the checkpoint's recommendation, 7.5 for the paper's)",
    )
    parser.add_argument(
        "--image-cfg",
        type=float,
        help="how strongly to keep the picture (default: the checkpoint's recommendation, 1.5 for the paper's)",
    )
    parser.add_argument("--steps", type=int, help="default: the checkpoint's recommendation")
    parser.add_argument(
        "--sampler", metavar="NAME", help=f"{', '.join(SAMPLER_NAMES)} (default: the checkpoint's recommendation)"
    )
    parser.add_argument(
        "--schedule", metavar="NAME", help=f"{', '.join(SCHEDULE_NAMES)} (default: the checkpoint's recommendation)"
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide between these noise levels (sigma) alone, 0 1000: at all; the other steps cost a third",
    )
    parser.add_argument(
        "--guidance-rescale", type=float, default=0.0, metavar="SHARE", help="against burnt colours, 0 to 1"
    )
    parser.add_argument(
        "--guidance",
        choices=GUIDANCE_NAMES,
        help="the formula of the scales (default: the checkpoint's recommendation)",
    )
    parser.add_argument(
        "--suffix", metavar="TEXT", help="said after each instruction (default: the checkpoint's, which only HIVE has)"
    )
    parser.add_argument(
        "--feature-cache",
        type=int,
        default=1,
        metavar="N",
        help="keep the network's deep features for N evaluations: faster, a little off (default: 1, exact)",
    )
    parser.add_argument("--apg", action="store_true", help="adaptive projected guidance: high scales do not burn")


def add_reading_options(parser: argparse.ArgumentParser, *, split: bool = True) -> None:
    """Which part of a data set is read, and how; its layout is recognised by its columns.

    Without ``split`` where a command has one of its own.
    """
    group = parser.add_argument_group("what is read of a data set (any layout: ip2p dataset layouts)")
    columns = ("PICTURE", "TEXT", "EDITED")
    group.add_argument("--columns", nargs=3, metavar=columns, help="where the names of its columns say too little")
    if split:
        group.add_argument("--split", metavar="NAME", help="default: train, or the only one there is")
    group.add_argument("--limit", type=int, metavar="N", help="N rows at most")
    group.add_argument("--where", metavar="CONDITION", help="rows that meet it: \"o_score >= 8 and edit_type != 'x'\"")
    group.add_argument(
        "--inverses", action="store_const", const=True, help="rows with an edit that leads back are two pairs"
    )
    group.add_argument(
        "--pictures-from", metavar="FOLDER", help="what paths in a table are relative to, and stay below"
    )


def reading_of(options: argparse.Namespace) -> Any:
    from ..data.reading import Reading

    names = ("split", "limit", "where", "inverses", "pictures_from", "download", "licence")
    given = {name: getattr(options, name, None) for name in names}
    columns = tuple(options.columns) if options.columns else None
    return Reading(columns=columns, **{name: value for name, value in given.items() if value is not None})


def load_editor(options: argparse.Namespace) -> Any:
    from ..edit import InstructPix2Pix

    return InstructPix2Pix.load(
        options.checkpoint,
        device=options.device,
        dtype=torch_dtype(options),
        compile=options.compile,
        compile_mode=options.compile_mode,
        weights=options.weights,
        base=options.base,
        loras=loras_of(options),
        vae=options.vae,
        embeddings=options.embedding,
        control=getattr(options, "control", None),
        low_memory=options.low_memory,
    )


def torch_dtype(options: argparse.Namespace) -> Any:
    import torch

    return getattr(torch, options.dtype) if options.dtype else None


def edit_config(options: argparse.Namespace, **more: Any) -> Any:
    from ..edit import EditConfig

    names = ("text_cfg", "image_cfg", "steps", "sampler", "schedule", "guidance", "suffix", "apg", "feature_cache")
    interval = {name: getattr(options, name) for name in ("guidance_interval", "guidance_rescale")}
    return EditConfig(**{name: getattr(options, name) for name in names}, **interval, **more)


def local_path(text: str) -> Path:
    """For options that say where to write; a Path would take an address for a folder named ``s3:``."""
    if "://" in text:
        got = f"{public_name(text)} lies in shared storage, and this writes to a local disk"
        raise argparse.ArgumentTypeError(f"{got}; write here and copy it there (a data set: ip2p dataset copy)")
    return Path(text).expanduser()


def json_option(flag: str, text: str) -> dict[str, Any]:
    """The object that an option gives as JSON."""
    try:
        found = json.loads(text)
    except NO_JSON:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f'{flag} is {text[:60]!r}; give a JSON object such as {{"reasoning_effort": "low"}}')
    return found


def progress_bar(total: int, unit: str) -> Any:
    from ..progress import progress

    return progress(total, unit)


def check_positive(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{name} is {value}; give a whole number of at least 1")
    return value


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """``should_stop`` for the length of a with-block: true after a Ctrl-C, SIGTERM, or the end of the terminal.

    A second Ctrl-C ends at once. A SIGHUP that is ignored, as nohup has it, stays ignored.
    Outside the main thread, where signals do not arrive, it stays false.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # torchrun passes a Ctrl-C on as SIGTERM
        asked.set()
        if number == HANG_UP:
            _speak_to_nobody()
        with suppress(OSError):  # the terminal may be gone
            sys.stderr.write("\nip2p: stopping, and keeping what is finished; once more ends at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    # A shell has SIGINT ignored in what it starts in the background, and whoever sends one there means it.
    heard = [number for number in numbers if number != HANG_UP or signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _speak_to_nobody() -> None:
    """The terminal has gone, and whatever is written to it from now on would end the program before it has saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if os.isatty(stream):
            os.dup2(nowhere, stream)
    os.close(nowhere)
