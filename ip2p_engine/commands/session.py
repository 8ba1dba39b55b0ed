"""``ip2p session``: several instructions one after another, in one folder."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..hooks import Hooks
from .options import (
    BY_PICTURE,
    add_command,
    add_guidance_options,
    add_model_options,
    edit_config,
    load_editor,
    local_path,
)

__all__ = ["add"]


def add(commands: Any) -> None:
    session = commands.add_parser("session", help="several instructions one after another, with undo and branches")
    actions = session.add_subparsers(metavar="ACTION", required=True)
    start = add_command(actions, "start", _start, "begin with a picture")
    start.add_argument("picture", metavar="PICTURE")
    start.add_argument("folder", type=local_path, metavar="FOLDER", help="a new one, which holds the session")
    start.add_argument("--size", default="paper", help="as for ip2p edit (default: paper)")
    start.add_argument("--resolution", type=int, help="the longer side that paper aims at (default: the first model's)")
    say = add_command(actions, "say", _say, "take turns from where the session stands")
    _add_folder(say)
    say.add_argument("instructions", nargs="+", metavar="TEXT", help="one a turn")
    say.add_argument("--seed", type=int, default=0, help="of the first of these turns (default: 0)")
    say.add_argument("--detail", action="store_true", help="take the original's detail where turns only tone it")
    add_model_options(say, checkpoint=None, usual=BY_PICTURE)
    add_guidance_options(say)
    _add_folder(add_command(actions, "undo", _undo, "go back by one turn; nothing is lost"))
    branch = add_command(actions, "branch", _branch, "go on from another turn; nothing is lost")
    _add_folder(branch)
    branch.add_argument("turn", type=int, help="its number; 0 is the original")
    history = add_command(actions, "history", _history, "say what was said, and what became of it")
    _add_folder(history)
    history.add_argument("--json", action="store_true")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the session")


def _start(options: argparse.Namespace) -> None:
    from ..session import Session

    session = Session.start(options.picture, options.folder, size=options.size, resolution=options.resolution)
    at = (
        "the size of the model that takes the first turn"
        if session.size is None
        else "{} x {} pixels".format(*session.size)
    )
    sys.stdout.write(f"{session.folder}: edits happen at {at}\n")


def _say(options: argparse.Namespace) -> None:
    from ..scenes.notice import model_for
    from ..session import Session
    from .options import stop_signals

    session, config = Session(options.folder), replace(edit_config(options), detail=options.detail)
    options.checkpoint = options.checkpoint or model_for(session.original)
    editor = load_editor(options)
    with stop_signals() as should_stop:
        for number, text in enumerate(options.instructions):
            turn = session.say(
                editor, text, seed=options.seed + number, config=config, hooks=Hooks(should_stop=should_stop)
            )
            sys.stdout.write(f"{session.picture_path()}: {_told(turn)}\n")
            sys.stdout.flush()


def _undo(options: argparse.Namespace) -> None:
    from ..session import Session

    session = Session(options.folder)
    session.undo()
    sys.stdout.write(f"{session.picture_path()}\n")


def _branch(options: argparse.Namespace) -> None:
    from ..session import Session

    session = Session(options.folder)
    session.branch(options.turn)
    sys.stdout.write(f"{session.picture_path()}\n")


def _history(options: argparse.Namespace) -> None:
    from ..session import Session

    session = Session(options.folder)
    if options.json:
        content = {"current": session.current, "turns": [asdict(turn) for turn in session.turns]}
        sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")
        return
    on_line = {turn.number for turn in session.line()}
    lines = [f"{'*' if not session.current else ' '} 0 the original"]
    for turn in session.turns:
        mark = "*" if turn.number == session.current else "-" if turn.number in on_line else " "
        after = f" (after {turn.parent})" if turn.parent != turn.number - 1 else ""
        lines.append(f"{mark} {turn.number} {turn.instruction}{after}: {_told(turn)}")
    sys.stdout.write("\n".join(lines) + "\n")


def _told(turn: Any) -> str:
    """What became of a turn, and its drift: what it would have moved elsewhere."""
    return f"{100 * turn.changed:.0f} % changed so far, drift {turn.drift:.3f} held back"
