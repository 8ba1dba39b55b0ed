"""A little of both campaigns in one warm process: as many cases as given take, and power cuts of two commands."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]


def main() -> int:
    import crash
    import fuzz

    root = Path(tempfile.mkdtemp(prefix="short"))
    try:
        fuzz.warm_up(root)
        return fuzz.try_all(root, fuzz.parsed(sys.argv[1:])) + crash.try_all(root, ["captions", "import"], 2)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
