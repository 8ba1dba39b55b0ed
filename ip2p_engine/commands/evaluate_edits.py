"""``ip2p evaluate edits``: a test set edited by checkpoints, and the field's tables."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import public_name
from ..hooks import Hooks
from ..progress import write_note
from .evaluate_data import named_checkpoints, told, warn_of_training
from .options import (
    DTYPES,
    Several,
    add_command,
    add_guidance_options,
    add_reading_options,
    check_positive,
    edit_config,
    local_path,
    progress_bar,
    reading_of,
    stop_signals,
    torch_dtype,
)

__all__ = ["add_edits"]

CLIP = "ViT-B-32/openai"


def add_edits(actions: Any) -> None:
    edits = add_command(actions, "edits", _edits, "edit a test set by checkpoints: MagicBrush's and Emu Edit's tables")
    edits.add_argument("data", metavar="DATA", help="pairs in any layout, GEdit-Bench's table or ImgEdit's JSON")
    edits.add_argument("--sources", type=Path, metavar="FOLDER", help="where ImgEdit's pictures lie")
    edits.add_argument(
        "--checkpoint",
        action=Several,
        nargs="+",
        default=["embedded"],
        metavar="[NAME=]CHECKPOINT",
        help="a line of the tables each; a training run's folder is one too",
    )
    edits.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a file that has both")
    edits.add_argument(
        "--turns", choices=("true", "own", "both"), default="true", help="what a session's later turns start from"
    )
    edits.add_argument("--seed", type=int, default=0, help="row n has the seed SEED + n (default: 0)")
    edits.add_argument("--resolution", type=int, help="longer side that the paper's rule aims at")
    edits.add_argument("--batch", type=int, default=8, help="edits in one batch at most (default: 8)")
    edits.add_argument("--clip", default=CLIP, help=f"default: {CLIP}, as MagicBrush's evaluation")
    edits.add_argument("--dino", nargs="?", const="", metavar="MODEL", help="also DINO (default: facebook/dino-vits16)")
    edits.add_argument("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    edits.add_argument("--dtype", choices=DTYPES, help="default: float16 on CUDA, else float32")
    edits.add_argument("--out", type=local_path, required=True, help="the run's folder; the same again goes on")
    edits.add_argument("--held-out", action="store_true", help="only the pairs that --hold-out-test holds out")
    add_guidance_options(edits)
    add_reading_options(edits)


def _edits(options: argparse.Namespace) -> None:
    from ..clip.similarity import ClipSimilarity
    from ..data.reading import open_pairs
    from ..edit import usable_device
    from ..evaluate.benchmarks import is_bare, write_bare
    from ..evaluate.edits import benchmark_tables, examples, write_truth
    from ..evaluate.metrics import DINO, Dino
    from ..evaluate.run_folder import check_run, claim_run, save_run, text_of
    from ..evaluate.seen import seen_table
    from ..images import save_image

    named = named_checkpoints(options.checkpoint)
    check_positive("--batch", options.batch)
    check_run(options.out, "edits")
    bare = is_bare(Path(options.data))
    reading, limit = reading_of(options), None
    if options.held_out:  # of those that are held out, not of the first that there are
        reading, limit = replace(reading, limit=None), reading.limit
    pairs = None if bare else open_pairs(options.data, reading)
    rows = _held_out(pairs, options.data) if options.held_out else None
    for _, path in named if pairs is not None else ():
        warn_of_training(path, pairs, split="test" if options.held_out else "all", option="--held-out")
    device = usable_device(options.device)
    clip = ClipSimilarity.load(options.clip, device=device)
    dino = None if options.dino is None else Dino.load(options.dino or DINO, device=device)
    claim_run(options.out, "edits")
    if pairs is None:
        edits, broken = write_bare(Path(options.data), options.out, options.sources, options.limit)
    else:
        edits, broken = write_truth(pairs, options.out, limit, rows=rows)
    made: dict[str, Any] = {}
    with stop_signals() as should_stop:
        for name, path in named:
            made |= _made_by(options, name, path, edits, should_stop)
        measured = {
            label: (chosen, _measured(options, label, chosen, folder, clip, dino))
            for label, (chosen, folder) in made.items()
        }
    tables = [*benchmark_tables(measured), seen_table(named, pairs, weights=options.weights, held_out=options.held_out)]
    save_image(examples(made), options.out / "examples.png")
    settings = {**told(options), "checkpoint": ", ".join(f"{name}={public_name(path)}" for name, path in named)}
    shown = {"pictures": {"examples.png": "The first edits: before, by each checkpoint, and the true one"}}
    save_run(options.out, "edits", settings={**settings, "left out": len(broken)}, tables=tables, **shown)
    if broken:
        write_note(f"ip2p: {len(broken)} rows were left out, such as {broken[0]}")
    sys.stdout.write("\n\n".join(text_of(table) for table in tables) + "\n")


def _held_out(pairs: Any, data: str) -> set[int]:
    from ..data.split import test_rows

    if pairs is None:
        raise ConfigError(f"{data} has no pairs of which some could be held out; leave --held-out out")
    rows = test_rows(pairs, [text or "" for text in pairs.columns("original_prompt")["original_prompt"]])[1]
    if not rows:
        raise ConfigError(f"of {data} no pair is held out; bring more, or leave --held-out out")
    return set(rows)


def _made_by(options: argparse.Namespace, name: str, path: str, edits: Any, should_stop: Any) -> dict[str, Any]:
    """{line of the tables: (edits, their folder)} of one checkpoint."""
    from ..edit import InstructPix2Pix
    from ..evaluate.edits import last_turns, make_edits

    settings = {"device": options.device, "dtype": torch_dtype(options), "weights": options.weights}
    editor = InstructPix2Pix.load(path, **settings)
    config = edit_config(options, resolution=options.resolution, batch=options.batch)
    folders = {"true": (name, edits), "own": (f"{name}, last turn on own results", last_turns(edits))}
    wanted = {"true": ["true"], "own": ["own"], "both": ["true", "own"]}[options.turns]
    found = {}
    for turns in wanted:
        label, shown = folders[turns]
        folder: Path = options.out / "edits" / (name if turns == "true" else f"{name}, own turns")
        with progress_bar(len(edits), "edits") as bar:
            hooks = Hooks(on_progress=bar, should_stop=should_stop)
            own = turns == "own"
            make_edits(edits, editor, folder, config=config, seed=options.seed, own_turns=own, hooks=hooks)
        found[label] = (shown, folder)
    return found


def _measured(options: argparse.Namespace, label: str, edits: Any, folder: Path, clip: Any, dino: Any) -> Any:
    from ..evaluate.edits import edited_pictures
    from ..evaluate.pairs import measure_table

    with progress_bar(len(edits), f"pictures of {label}") as bar:
        pictures = edited_pictures(edits, folder)
        return measure_table(folder, pictures, clip, dino, folder=options.out, hooks=Hooks(on_progress=bar))
