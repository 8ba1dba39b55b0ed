"""Every command on data sets of published layouts: python benchmarks/layouts.py FOLDER [FOLDER ...]

Each FOLDER (or file) is one data set, as small as one likes; or a folder with index.json, {name: {"path": ...}}. No
command is told a column. Prints a table in Markdown: yes, or the last words of what went wrong; a dash where there are
no captions to filter by.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from ip2p_engine.cli import main as ip2p
from ip2p_engine.data.store import PairStore

COMMANDS = ("train", "import", "verify", "sheet", "filter", "evaluate")


def main() -> None:
    sets = {name: path for argument in sys.argv[1:] for name, path in named(Path(argument))}
    print(f"| data set | {' | '.join(COMMANDS)} |\n| --- {'| --- ' * len(COMMANDS)}|")
    for name, path in sets.items():
        with tempfile.TemporaryDirectory() as home:
            print(f"| {name} | {' | '.join(row(str(path), Path(home)))} |", flush=True)


def named(path: Path) -> list[tuple[str, Path]]:
    index = path / "index.json"
    if not index.is_file():
        return [(path.name, path)]
    return [(name, path / one["path"]) for name, one in json.loads(index.read_text()).items()]


def row(data: str, home: Path) -> list[str]:
    quick = ["--preset", "embedded", "--steps", "1", "--batch-size", "2", "--device", "cpu", "--base", "embedded-sd"]
    edits = ["--clip", "embedded", "--steps", "1", "--device", "cpu", "--limit", "2", "--out", str(home / "edits")]
    found = {
        "train": told("train", "--data", data, "--out", str(home / "run"), *quick),
        "import": told("dataset", "import", data, "--out", str(home / "store")),
        "verify": told("dataset", "verify", data),
        "sheet": told("dataset", "sheet", data, "--out", str(home / "sheet.html")),
        "filter": "-",
        "evaluate": told("evaluate", "edits", data, *edits),
    }
    if found["import"] == "yes" and any(PairStore(home / "store").columns("original_prompt")["original_prompt"]):
        found["filter"] = told("filter", data, "--clip", "embedded", "--device", "cpu", "--out", str(home / "kept"))
    return [found[name] for name in COMMANDS]


def told(*arguments: str) -> str:
    """yes, or why not."""
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        try:
            code = ip2p(list(arguments))
        except SystemExit as error:
            code = error.code
    lines = [line for line in said.getvalue().splitlines() if line.startswith("ip2p")] or [""]
    return "yes" if not code else lines[-1].removeprefix("ip2p: ")[-160:].replace("|", "/") or f"exit code {code}"


if __name__ == "__main__":
    main()
