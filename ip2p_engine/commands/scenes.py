"""``ip2p scenes``: the embedded world."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from .options import (
    add_command,
    add_guidance_options,
    add_model_options,
    check_positive,
    edit_config,
    load_editor,
    progress_bar,
)

__all__ = ["add"]

STAGE_NAMES = ("autoencoder", "decoder", "clip", "text-to-image", "edit")


def add(commands: Any) -> None:
    scenes = commands.add_parser("scenes", help="the embedded world: judge a checkpoint, train the shipped models")
    actions = scenes.add_subparsers(metavar="ACTION", required=True)
    judge = add_command(actions, "judge", _scenes_judge, "edit held-out scenes and compare with the truth")
    judge.add_argument("--n", type=int, default=1000, help="edits (default: 1000)")
    judge.add_argument("--seed", type=int, default=7)
    judge.add_argument("--sheet", type=Path, help="also write a picture of the worst results")
    judge.add_argument("--json", action="store_true")
    add_model_options(judge)
    add_guidance_options(judge)
    train = add_command(actions, "train", _scenes_train, "train the embedded models from nothing; resumes")
    train.add_argument("stages", nargs="*", metavar="STAGE", help=f"{' '.join(STAGE_NAMES)} (default: all)")
    train.add_argument("--runs", type=Path, default=Path("runs/scenes"), help="checkpoints and logs")
    train.add_argument("--processes", type=int, default=2, help="one thread each (default: 2)")
    train.add_argument("--device", default="cpu")
    export = add_command(actions, "export", _scenes_export, "write the trained models as the files that ship")
    export.add_argument("--runs", type=Path, default=Path("runs/scenes"))
    export.add_argument("--out", type=Path, required=True)


def _scenes_judge(options: argparse.Namespace) -> None:
    from ..scenes.exam import examine
    from ..scenes.report import as_text, worst_sheet

    count, config = check_positive("--n", options.n), edit_config(options)
    editor = load_editor(options)
    with progress_bar(count, "edits") as bar:
        result = examine(editor, count=count, seed=options.seed, config=config, on_progress=bar)
    if options.sheet:
        worst_sheet(result).save(options.sheet)
    sys.stdout.write((json.dumps(result.figures()) if options.json else as_text(result)) + "\n")


def _scenes_train(options: argparse.Namespace) -> None:
    from ..scenes.recipe import STAGES, train_in_processes, train_stage

    stages = options.stages or list(STAGES)
    logging.getLogger("ip2p_engine").setLevel(logging.INFO)
    if options.processes == 1 and len(stages) == 1:
        train_stage(stages[0], options.runs, device=options.device)
    else:
        train_in_processes(stages, options.runs, processes=options.processes, device=options.device)


def _scenes_export(options: argparse.Namespace) -> None:
    from ..scenes.recipe import export_embedded

    export_embedded(options.runs, options.out)
