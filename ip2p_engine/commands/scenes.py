"""``ip2p scenes``: the embedded world."""

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
    SAMPLER_NAMES,
    Several,
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
from .pairs import add_thresholds, thresholds
from .train import training_bars

__all__ = ["add"]

STAGE_NAMES = ("autoencoder", "decoder", "clip", "clip-text", "text-to-image", "edit")


def add(commands: Any) -> None:
    scenes = commands.add_parser("scenes", help="the embedded world: judge a checkpoint, train the shipped models")
    actions = scenes.add_subparsers(metavar="ACTION", required=True)
    judge = add_command(actions, "judge", _scenes_judge, "edit held-out scenes and compare with the truth")
    judge.add_argument("--n", type=int, default=1000, help="edits (default: 1000)")
    judge.add_argument("--seed", type=int, default=7)
    judge.add_argument("--sheet", type=local_path, help="also write a picture of the worst results")
    judge.add_argument("--first", type=local_path, help="also write a picture of the first twelve results")
    judge.add_argument("--json", action="store_true")
    add_model_options(judge)
    add_guidance_options(judge)
    _add_pairs(actions)
    train = add_command(actions, "train", _scenes_train, "train the embedded models from nothing; resumes")
    train.add_argument("stages", nargs="*", metavar="STAGE", help=f"{' '.join(STAGE_NAMES)} (default: all)")
    train.add_argument("--pairs", type=Path, help="train the edit model on this data set and not on true pairs")
    train.add_argument("--runs", type=local_path, default=Path("runs/scenes"), help="checkpoints and logs")
    train.add_argument("--processes", type=int, default=2, help="one thread each (default: 2)")
    train.add_argument("--device", default="cpu")
    export = add_command(actions, "export", _scenes_export, "write the trained models as the files that ship")
    export.add_argument("--runs", type=local_path, default=Path("runs/scenes"))
    export.add_argument("--out", type=local_path, required=True)


def _add_pairs(actions: Any) -> None:
    pairs = add_command(actions, "pairs", _scenes_pairs, "make pairs of the grammar's captions and judge them by truth")
    pairs.add_argument("folder", type=local_path, help="a data set with every candidate; an unfinished one goes on")
    pairs.add_argument("--judge-only", action="store_true", help="judge the pairs that the folder has")
    pairs.add_argument("--n", type=int, default=300, help="caption pairs (default: 300)")
    pairs.add_argument("--candidates", type=int, default=20, help="of each (default: 20)")
    pairs.add_argument("--seed", type=int, default=7)
    pairs.add_argument("--training", action="store_true", help="captions of the training split, not the held-out ones")
    group = pairs.add_argument_group("generation (defaults: what suits the embedded model, see docs/pairs.md)")
    group.add_argument("--steps", type=int)
    group.add_argument("--sampler", metavar="NAME", help=", ".join(SAMPLER_NAMES))
    group.add_argument("--p", dest="p2p_range", type=float, nargs=2, metavar=("LOW", "HIGH"))
    group.add_argument("--cfg", dest="cfg_range", type=float, nargs=2, metavar=("LOW", "HIGH"))
    group.add_argument("--edited-prompt-start", type=float, metavar="F", help="the fraction of the steps without it")
    group = pairs.add_argument_group("the CLIP filter")
    group.add_argument("--clip", default="embedded", help="embedded, a folder, or architecture/weights of open_clip")
    add_thresholds(group)
    pairs.add_argument("--plot", type=local_path, metavar="PNG", help="draw the fraction of right pairs over p")
    pairs.add_argument(
        "--beside", type=Path, action=Several, nargs="+", default=[], metavar="FOLDER", help="judged ones to draw too"
    )
    pairs.add_argument("--sheet", type=local_path, metavar="PNG", help="a contact sheet of right and wrong pairs")
    pairs.add_argument(
        "--copy-to",
        type=local_path,
        metavar="FOLDER",
        help="write the pairs without held-out scenes there, to train",
    )
    pairs.add_argument("--json", action="store_true")


def _scenes_judge(options: argparse.Namespace) -> None:
    from ..images import check_output, save_image
    from ..scenes.exam import as_text, examine, first_sheet, worst_sheet

    count, config = check_positive("--n", options.n), edit_config(options)
    for path in filter(None, (options.sheet, options.first)):
        check_output(path)
    editor = load_editor(options)
    with progress_bar(count, "edits") as bar:
        result = examine(editor, count=count, seed=options.seed, config=config, hooks=Hooks(on_progress=bar))
    if options.sheet:
        save_image(worst_sheet(result), options.sheet)
    if options.first:
        save_image(first_sheet(result), options.first)
    sys.stdout.write((json.dumps(result.figures()) if options.json else as_text(result)) + "\n")


def _scenes_pairs(options: argparse.Namespace) -> None:
    from ..clip.similarity import ClipSimilarity
    from ..data.store import PairStore
    from ..images import check_output, save_image
    from ..scenes.pair_exam import (
        as_text,
        copy_without_held_out,
        draw_curves,
        examine_pairs,
        judge_store,
        kept_pairs,
        pair_sheet,
    )

    config = thresholds(options, options.clip)
    for path in filter(None, (options.plot, options.sheet)):
        check_output(path)
    if not options.judge_only:
        _make_candidates(options)
    clip = ClipSimilarity.load(options.clip)
    judged = {}
    for folder in (options.folder, *options.beside):
        with progress_bar(0, "judged") as bar:
            judged[folder] = judge_store(folder, clip, hooks=Hooks(on_progress=bar))
    results = {folder.name: examine_pairs(pairs, config) for folder, pairs in judged.items()}
    if options.plot:
        draw_curves(results, options.plot)
    if options.sheet:
        pairs = judged[options.folder]
        save_image(pair_sheet(PairStore(options.folder), pairs, kept_pairs(pairs, config)), options.sheet)
    if options.copy_to:
        left_out = copy_without_held_out(options.folder, judged[options.folder], options.copy_to)
        sys.stderr.write(f"{options.copy_to}: without the {left_out} pairs that show a held-out scene\n")
    result = results[options.folder.name]
    sys.stdout.write((json.dumps(result.figures()) if options.json else as_text(result)) + "\n")


def _make_candidates(options: argparse.Namespace) -> None:
    """Every candidate of some caption pairs of the grammar, unfiltered; what the folder has is not made again."""
    from ..factory.maker import FactoryConfig
    from ..factory.run import make_pairs
    from ..factory.workers import WorkerPlan, local_workers
    from ..p2p.generator import PairConfig
    from ..scenes.grammar import EMBEDDED_PAIRS
    from ..scenes.pair_exam import sample_caption_edits

    names = ("steps", "sampler", "p2p_range", "cfg_range", "edited_prompt_start")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given |= {name: tuple(value) for name, value in given.items() if name.endswith("_range")}
    factory = FactoryConfig(
        candidates=check_positive("--candidates", options.candidates),
        seed=options.seed,
        clip=options.clip,
        filter=None,
    )
    plan = WorkerPlan(pairs=PairConfig(**{**EMBEDDED_PAIRS, **given}), factory=factory)
    edits = sample_caption_edits(check_positive("--n", options.n), seed=options.seed, held_out=not options.training)
    with local_workers(plan) as workers, stop_signals() as should_stop, progress_bar(0, "pairs") as bar:
        make_pairs(edits, options.folder, workers, hooks=Hooks(on_progress=bar, should_stop=should_stop))


def _scenes_train(options: argparse.Namespace) -> int:
    from ..scenes.recipe.stages import STAGES, train_in_processes, train_on_pairs, train_stage

    if options.pairs and options.stages:
        raise ConfigError(f"--pairs trains the edit model alone; leave out {' '.join(options.stages)}")
    stages, count = options.stages or list(STAGES), check_positive("--processes", options.processes)
    logging.getLogger("ip2p_engine").setLevel(logging.INFO)
    with stop_signals() as should_stop:
        if count == 1 and len(stages) == 1 and not options.pairs:
            with training_bars() as (bar, _):
                hooks = Hooks(on_progress=bar, should_stop=should_stop)
                train_stage(stages[0], options.runs, device=options.device, hooks=hooks)
            return 0
        hooks = Hooks(should_stop=should_stop)
        how: dict[str, Any] = {"processes": count, "device": options.device, "hooks": hooks}
        if options.pairs:
            return train_on_pairs(options.pairs, options.runs, **how)
        return train_in_processes(stages, options.runs, **how)


def _scenes_export(options: argparse.Namespace) -> None:
    from ..scenes.recipe.stages import export_embedded

    export_embedded(options.runs, options.out)
