"""Progress bars on stderr, so that stdout stays for results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["progress"]


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that moves a bar with rate and time left."""
    with tqdm(total=total, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True, leave=False) as bar:

        def show(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield show
