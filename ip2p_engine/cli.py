"""The ``ip2p`` command: parse, call the engine, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from .commands import average, captions, checkpoint, dataset, edit, evaluate, pairs, photos, scenes, session, train
from .commands.options import check_limits, in_options
from .errors import Interrupted, IP2PError, printable
from .version import __version__

__all__ = ["build_parser", "main"]

LONGEST = 1500  # characters of a sentence
# Blocks that the system takes back at once: smaller ones stay with the thread that a large picture was opened in.
os.environ.setdefault("PILLOW_BLOCK_SIZE", "64m")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends with one sentence on stderr and exit code 2."""
    parser = build_parser()
    for text in arguments or ():
        _check_text(parser, text)
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # a process of its own, whose libraries may be told what is installed
        sys.modules.update(dict.fromkeys(options.unused))
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Lines(options))
    with redirect_stdout(_PrintableStream(sys.stdout)):
        return _run(options)


def _check_text(parser: argparse.ArgumentParser, text: str) -> None:
    """A shell gives nothing else; a caller may."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        parser.error(f"{text!r} is no text or name that this system can write (it has half a letter); give another")


def _run(options: argparse.Namespace) -> int:
    try:
        check_limits(options)
        code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except IP2PError as error:
        _say(in_options(str(error), options))
        return 130 if isinstance(error, Interrupted) else 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:  # the reader has gone, as `| head` does
        _close_stdout()
        return 141
    except OSError as error:
        _close_stdout()
        _say(f"{error}; check the disk's space and the permissions")
        return 2
    except MemoryError:
        _say("there is not enough memory for this; ask for less at once")
        return 2


def _say(sentence: str) -> None:
    """On stderr, in one piece: names in it may be strangers'."""
    text = printable(sentence)
    shown = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    sys.stderr.write(f"ip2p: {shown}\n")


class _Parser(argparse.ArgumentParser):
    """Its errors repeat what was given."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(message), file)


class _Lines(logging.Formatter):
    """What the engine logs, printable and in the command line's words."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__("%(message)s")
        self._options = options

    def format(self, record: logging.LogRecord) -> str:
        return printable(in_options(super().format(record), self._options))


class _PrintableStream:
    """A stream that writes control characters as escapes: no stranger's file moves the terminal's cursor."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _close_stdout() -> None:
    """What is left in the buffer goes nowhere: Python would fail on it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="ip2p", description="Edit pictures by instructions (InstructPix2Pix).")
    parser.add_argument("--version", action="version", version=f"ip2p {__version__}")
    parser.set_defaults(unused=())
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is done on stderr")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for family in (edit, session, captions, pairs, dataset, train, average, evaluate, checkpoint, scenes, photos):
        family.add(commands)
    return parser
