"""``ip2p train``: from pairs to an InstructPix2Pix."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..hooks import Hooks, OnProgress
from .options import Several, add_command, add_reading_options, local_path, stop_signals

__all__ = ["add", "training_bars"]

PRESET_NAMES = ("paper", "one-gpu", "lora", "sd2", "sdxl", "cosxl", "embedded")
STOPPED = 130
READING = ("data_weights", "columns", "split", "limit", "where", "inverses", "pictures_from")
WHOLE = (
    "steps",
    "batch_size",
    "micro_batch",
    "resolution",
    "workers",
    "save_every",
    "export_every",
    "validate_every",
    "seed",
)
FLAGS = (
    "hold_out_test",
    "cache",
    "streaming",
    "buckets",
    "gradient_checkpointing",
    "compile",
    "train_text_encoder",
)
EXAMPLES = """examples:
  ip2p train --data my-pairs --base sd15.safetensors --out runs/edit
  ip2p train --data my-pairs --base embedded-sd --out runs/small --preset embedded
  accelerate launch -m ip2p_engine train --data owner/pairs --base sd15.safetensors --out runs/edit --precision bfloat16
Run the same command again to go on where it stopped."""


def add(commands: Any) -> None:
    parser = add_command(commands, "train", _train, "train an InstructPix2Pix, or go on training")
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES
    parser.add_argument(
        "--data", required=True, action=Several, nargs="+", help="a data set of any known layout, or several"
    )
    parser.add_argument(
        "--data-weights", action=Several, nargs="+", type=float, metavar="X", help="how often each is drawn from"
    )
    parser.add_argument(
        "--base", required=True, help="Stable Diffusion or an InstructPix2Pix: a file, folder, hub id, URL"
    )
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="RUN", help="the run's folder; resumes what is there"
    )
    parser.add_argument("--preset", choices=PRESET_NAMES, default="paper", help="the recipe (default: paper)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON with fields of TrainConfig, or a run.json")
    for name in WHOLE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    parser.add_argument("--learning-rate", type=float, metavar="X")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit", "muon", "adafactor", "lion", "prodigy"))
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--lora", type=int, dest="lora_rank", metavar="RANK", help="train adapters only")
    parser.add_argument("--lora-from", metavar="FILE", help="a LoRA file that the adapters begin with")
    _add_distill(parser)
    parser.add_argument(
        "--outputs",
        action=Several,
        nargs="+",
        choices=("ema", "raw", "diffusers", "lora"),
        help="what is left (default: ema)",
    )
    add_reading_options(parser)
    for flag in FLAGS:
        parser.add_argument(f"--{flag.replace('_', '-')}", action=argparse.BooleanOptionalAction)
    parser.add_argument(
        "--set", action=Several, nargs="+", default=[], metavar="NAME=VALUE", help="any other field, as JSON"
    )
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="push the run to the hub, with a model card")
    parser.add_argument("--push-every", type=int, metavar="N", help="also every N steps")
    parser.add_argument("--resume-from-hub", metavar="OWNER/NAME", help="a new folder goes on with a pushed run")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: what Accelerate finds")
    parser.add_argument(
        "--validate-with", metavar="FILE", help=".csv or .jsonl: source, instruction; edited as it learns"
    )
    parser.add_argument("--validation-clip", metavar="CLIP", help="scores these edits, such as ViT-L-14/openai")
    parser.add_argument("--plan", action="store_true", help="say what the run would take, and do not train")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _train(options: argparse.Namespace) -> int:
    from ..train import plan, train

    config = _config(options)
    what = {"data": options.data, "base": options.base, "out": options.out, "device": options.device}
    if options.plan:
        told = plan(config, **what)
        sys.stdout.write(f"{json.dumps(told.as_dict()) if options.json else told}\n" if _is_first_process() else "")
        return 0
    with stop_signals() as should_stop, training_bars() as (steps, caching):
        result = train(
            config,
            **what,
            hooks=Hooks(on_progress=steps, should_stop=should_stop),
            on_cache=caching,
            on_plan=_say_plan,
        )
    if _is_first_process():
        _report(result, options.json)
    return 0 if result.finished else STOPPED


def _say_plan(plan: Any) -> None:
    if _is_first_process():
        sys.stderr.write(f"{plan}\n")


def _is_first_process() -> bool:
    """Of those that torchrun or ``accelerate launch`` started: one of them speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _report(result: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(vars(result), default=str) + "\n")
    else:
        sys.stdout.write("".join(f"{path}\n" for path in result.files.values()))
    if result.broken_count:
        from ..progress import write_note

        rows = "row was" if result.broken_count == 1 else "rows were"
        write_note(f"ip2p: {result.broken_count} broken {rows} left out, such as {result.broken[0]}")
    if not result.finished:
        sys.stderr.write(f"ip2p: stopped after step {result.step}; the same command goes on\n")


def _add_distill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distill",
        type=float,
        nargs=2,
        metavar=("S_T", "S_I"),
        help="learn the base's edits with this guidance, in 1 to 4 evaluations",
    )
    parser.add_argument(
        "--distill-to",
        type=float,
        nargs=2,
        metavar=("S_T", "S_I"),
        help="with all scales from --distill to these, which edits then choose from",
    )


def _config(options: argparse.Namespace) -> Any:
    from ..config import from_mapping
    from ..train.config import PRESETS, TrainConfig, read_config

    names = (
        *WHOLE,
        "learning_rate",
        "optimizer",
        "precision",
        "outputs",
        "validate_with",
        "validation_clip",
        *READING,
        "lora_rank",
        "distill",
        "distill_to",
        "lora_from",
        "push_to_hub",
        "push_every",
        "resume_from_hub",
        *FLAGS,
    )
    values = PRESETS[options.preset]
    values = read_config(options.config, values) if options.config else values
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return from_mapping(TrainConfig, {**values, **given, **dict(map(_assignment, options.set))})


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set got {text!r}; give NAME=VALUE, such as min_snr=5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@contextmanager
def training_bars() -> Iterator[tuple[OnProgress, Callable[[int, int], None]]]:
    """(progress of steps, of rows that are cached) as bars on stderr, with loss, rate and time left."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def bar(name: str, total: int) -> Any:
        if name not in bars:
            bars[name] = tqdm(
                total=total, unit=f" {name}", file=sys.stderr, dynamic_ncols=True, disable=not _is_first_process()
            )
        return bars[name]

    def on_cache(done: int, of: int) -> None:
        bar("rows cached", of).update(done - bar("rows cached", of).n)

    def on_progress(step: int, steps: int, note: str) -> None:
        steps_bar = bar("steps", steps)
        steps_bar.set_postfix_str(note, refresh=False)
        steps_bar.update(step - steps_bar.n)

    try:
        yield on_progress, on_cache
    finally:
        for one in bars.values():
            one.close()
