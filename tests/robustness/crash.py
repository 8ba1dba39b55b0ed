"""A power cut before the k-th fsync, rename or unlink of every command that writes; then the command once more.

    python tests/robustness/crash.py [--only COMMAND ...] [--most 60] [--engine CHECKOUT]

At the cut every file that was written since its last fsync is emptied and the process ends. The same command, given
again, has to end well, and what it leaves has to equal an undisturbed run's, with nothing hidden but locks. ``--most``
bounds the points tried of each command, spread evenly. Prints a line a command; exit code 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from spoiling import header_of  # noqa: E402

CUT = 77
EVENTS = ("fsync", "replace", "rename", "unlink", "remove")
NONCE = re.compile(rb"nonce[-=][\"']?[\w-]+")
Stamp = tuple[int, int]


def commands(seeds: Path, out: Path) -> dict[str, list[Any]]:
    """By name; each writes ``out`` or something in it."""
    from seeds import PAIRS, TRAIN

    tiny, store = seeds / "tiny", seeds / "store"
    pairs = ["pairs", seeds / "edits.jsonl", "--checkpoint", seeds / "tiny4", "--out", out, "--size", "64x64", *PAIRS]
    return {
        "convert to a file": ["convert", tiny, out / "model.safetensors", "--to", "ldm"],
        "convert to a folder": ["convert", tiny, out / "model", "--to", "diffusers"],
        "convert over a folder": ["convert", tiny, out / "own-tiny4", "--to", "diffusers"],
        "filter": ["filter", store, "--out", out, *PAIRS[PAIRS.index("--min-sim-0") :]],
        "import": ["dataset", "import", seeds / "original", "--out", out],
        "copy": ["dataset", "copy", store, out],
        "export": ["dataset", "export", store, "--out", out],
        "sheet": ["dataset", "sheet", store, "--out", out / "sheet.html"],
        "captions": ["captions", "--sample", "100", "--out", out / "edits.jsonl"],
        "pairs": pairs,
        "merge": ["dataset", "merge", store, seeds / "original", "--out", out],
        "photos pairs": ["photos", "pairs", out, "--pictures", seeds / "photographs", "--n", "3"],
        "session start": ["session", "start", seeds / "picture.png", out, "--resolution", "64"],
        "session say": ["session", "say", out, "make it night", "--checkpoint", tiny, "--steps", "1"],
        "evaluate recommend": [
            *["evaluate", "recommend", "--n", "2", "--checkpoint", tiny, "--steps", "1"],
            *["--text-cfg", "1", "2", "--image-cfg", "1", "--out", out],
        ],
        "train": ["train", "--data", store, "--base", seeds / "tiny4", "--out", out, *TRAIN],
    }


class _Cut:
    """Counts what makes things last; before number ``at`` the power goes."""

    def __init__(self, place: Path, at: int | None, count_file: Path) -> None:
        self.place, self.at, self.count, self.count_file = place, at, 0, count_file
        self.synced: dict[int, Stamp] = {path.stat().st_ino: _stamp(path) for path in _files(place)}
        for name in EVENTS:
            setattr(os, name, self._counted(getattr(os, name), name))
        from ip2p_engine import files

        if hasattr(files, "_exchange"):
            files._exchange = self._counted(files._exchange, "replace")

    def _counted(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            if self.count == self.at:
                self._go_dark()
            self.count += 1
            self.count_file.write_text(str(self.count))
            result = call(*arguments, **named)
            if name == "fsync":
                found = os.fstat(arguments[0])
                self.synced[found.st_ino] = (found.st_mtime_ns, found.st_size)
            return result

        return counted

    def _go_dark(self) -> None:
        for path in _files(self.place):
            if self.synced.get(path.stat().st_ino) != _stamp(path):
                os.truncate(path, 0)
        os._exit(CUT)


def _files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file() and not path.is_symlink()]


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _run(arguments: list[Any], out: Path, at: int | None, log: Path) -> int:
    """The exit code of a command in a fork."""
    from fuzz import leave

    from ip2p_engine.cli import main as command

    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.chdir(log.parent)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    _Cut(out, at, log.with_suffix(".count"))
    leave(lambda: command([str(one) for one in arguments]))
    return 0


def _content(out: Path, name: str) -> dict[str, str]:
    """{name: digest}; a page's nonce and a training's times differ from run to run."""
    found = {path.relative_to(out).as_posix(): path for path in _files(out) if not path.name.endswith(".lock")}
    if name == "train":
        found = {key: path for key, path in found.items() if key.endswith((".safetensors", ".pt")) or "/." in f"/{key}"}
    return {key: hashlib.sha256(_compared(path)).hexdigest() for key, path in found.items()}


def _compared(path: Path) -> bytes:
    """A file's content, without a header's order and a pickle's repetitions, which are left to chance."""
    if path.suffix == ".safetensors":
        header, data = header_of(path)
        return json.dumps(header, sort_keys=True).encode() + data
    if path.suffix == ".pt":
        import torch

        return b"".join(_leaves(torch.load(path, weights_only=True)))
    return NONCE.sub(b"", path.read_bytes())


def _leaves(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict | list | tuple):
        for name, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield repr(name).encode()
            yield from _leaves(one)
    else:
        yield value.numpy().tobytes() if hasattr(value, "numpy") else repr(value).encode()


def _hidden(out: Path) -> list[str]:
    """What is hidden and no lock; an export keeps .export.json, by which the same export is known again."""
    return sorted(path.name for path in out.rglob(".*") if not path.name.endswith(".lock"))


def _tried(name: str, root: Path, most: int) -> tuple[int, int, list[str]]:
    """(points that there are, points tried, what went wrong)."""
    out, log = root / "out", root / "log.txt"
    arguments = commands(root / "seeds", out)[name]

    def fresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if name == "convert over a folder":
            shutil.copytree(root / "seeds" / "own-tiny4", out / "own-tiny4")
        if name == "session say" and _run(commands(root / "seeds", out)["session start"], out, None, log):
            raise SystemExit(log.read_text())

    fresh()
    if _run(arguments, out, None, log):
        return 0, 0, [f"the undisturbed run fails: {log.read_text()[-300:]}"]
    wanted, kept, points = _content(out, name), _hidden(out), int(log.with_suffix(".count").read_text())
    chosen = sorted({round(n * (points - 1) / max(1, min(most, points) - 1)) for n in range(min(most, points))})
    wrong = []
    for at in chosen:
        fresh()
        cut = _run(arguments, out, at, log)
        between = (out / "own-tiny4" / "model_index.json").exists() or name != "convert over a folder"
        # A turn that was taken is not taken again; what stands there is chosen instead.
        taken = name == "session say" and json.loads((out / "session.json").read_text())["turns"]
        again = _run(["session", "branch", out, "1"] if taken else arguments, out, None, log)
        got = _content(out, name)
        if cut != CUT or again or got != wanted or _hidden(out) != kept or not between:
            differ = sorted(key for key in {*got, *wanted} if got.get(key) != wanted.get(key))
            said = log.read_text().strip().splitlines()[-1:]
            wrong.append(
                f"k = {at}: ended {cut}, then {again}; there {between}; {differ[:3]} {_hidden(out)[:3]} {said}"
            )
    return points, len(chosen), wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", metavar="COMMAND")
    parser.add_argument("--most", type=int, default=60)
    parser.add_argument("--seeds", type=Path, help="sound inputs of an earlier run, or where to keep them")
    parser.add_argument("--engine", type=Path, default=HERE.parents[1])
    options = parser.parse_args()
    sys.path[:0] = [str(options.engine), str(HERE)]
    from fuzz import warm_up

    root = Path(tempfile.mkdtemp(prefix="crash"))
    try:
        warm_up(root, options.seeds)
        return try_all(root, options.only, options.most)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def try_all(root: Path, only: list[str] | None, most: int) -> int:
    """Power cuts of some commands, or of all, in a process that is warm; 1 if a promise was broken."""
    broken = 0
    for name in only or commands(root, root):
        points, tried, wrong = _tried(name, root, most)
        broken += len(wrong)
        sys.stdout.write(f"| {name} | {points} | {tried} | {len(wrong)} |\n")
        sys.stdout.write("".join(f"  {one}\n" for one in wrong))
        sys.stdout.flush()
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
