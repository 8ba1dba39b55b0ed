"""Progress bars on stderr, so that stdout stays for results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .errors import printable

__all__ = ["progress", "write_line", "write_note"]


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[..., None]]:
    """A function (done, total, note="") that moves a bar with rate and time left, in a log every ten seconds."""
    pause = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True, leave=False, mininterval=pause) as bar:

        def show(done: int, of: int, note: str = "") -> None:
            bar.total = of
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield show


def write_line(line: str) -> None:
    """A result on stdout at once, above the bar where both are on a terminal."""
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stdout)
    else:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def write_note(line: str) -> None:
    """A sentence on stderr at once, above the bar; names in it may be strangers'."""
    tqdm.write(printable(line), file=sys.stderr)
