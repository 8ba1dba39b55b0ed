"""The ``ip2p`` command: parse, call the engine, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from .commands import captions, checkpoint, dataset, edit, evaluate, pairs, scenes, train
from .errors import Interrupted, IP2PError
from .version import __version__

__all__ = ["build_parser", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends with one sentence on stderr and exit code 2."""
    options = build_parser().parse_args(arguments)
    if arguments is None:  # a process of its own, whose libraries may be told what is installed
        sys.modules.update(dict.fromkeys(options.unused))
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except Interrupted as error:
        sys.stderr.write(f"ip2p: {error}\n")
        return 130
    except IP2PError as error:
        sys.stderr.write(f"ip2p: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("ip2p: interrupted\n")
        return 130
    except BrokenPipeError:  # the reader has gone, as `| head` does
        _close_stdout()
        return 141
    except OSError as error:
        _close_stdout()
        sys.stderr.write(f"ip2p: {error}; check the disk's space and the permissions\n")
        return 2


def _close_stdout() -> None:
    """What is left in the buffer goes nowhere: Python would fail on it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="ip2p", description="Edit pictures by instructions (InstructPix2Pix).")
    parser.add_argument("--version", action="version", version=f"ip2p {__version__}")
    parser.set_defaults(unused=())
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is done on stderr")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for family in (edit, captions, pairs, dataset, train, evaluate, checkpoint, scenes):
        family.add(commands)
    return parser
