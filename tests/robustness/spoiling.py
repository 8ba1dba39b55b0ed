"""What the campaign's generators share: a case, odd values, spoiled JSON and bytes, commands that read a checkpoint."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ESCAPES = ("../../escaped", "../../../escaped", "..\\..\\escaped")
SCRIPT, CONTROL = "<script>alert(1)</script>", "\x1b]0;owned\x07\x1b[2J"
HUGE = (20_000, 100_000, 10**7, 10**9, 2**31, 2**63, 10**30)
ODD = (
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "x" * 5000,
    [],
    {},
    [[]],
    [None] * 9,
    {"": {}},
)
ADDRESSES = (
    "http://[::1",
    "s3://[x",
    "http://\u2100.com/x",
    "://",
    "file://",
    "hf://",
    "hf://a/b/c",
    "ftp://x:y@z/a?b#c",
)
ADDRESSES += ("memory://x/y", "zip://a.zip", "s3://u:p@b/k?t=1", "\\\\host\\share", "http://a b/c", "data:text/plain,x")


@dataclass(frozen=True)
class Case:
    """A folder to spoil things in, the sound inputs, and the case's own randomness."""

    place: Path
    seeds: Path
    rng: random.Random
    environment: dict[str, str] = field(default_factory=dict)
    """What the command finds in its environment beside what is there."""

    def copied(self, name: str) -> Path:
        source, target = self.seeds / name, self.place / name
        return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))


Make = Callable[[Case], list[Any]]
GENERATORS: dict[str, Make] = {}


def generator(make: Make) -> Make:
    GENERATORS[make.__name__.removeprefix("_")] = make
    return make


def odd(rng: random.Random) -> Any:
    """A value that should not stand where it will."""
    kinds = (ODD, HUGE, ESCAPES, (SCRIPT, CONTROL, "\ud800", "/etc/passwd", "\u202e\u2028"))
    value = copy.deepcopy(rng.choice(rng.choice(kinds)))
    return [value] * rng.choice((1, 2, 4, 5000)) if rng.random() < 0.1 else value


def spoiled(value: Any, rng: random.Random) -> Any:
    """JSON with one to three places changed, left out, or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, key = value, None
        while isinstance(at, dict | list) and at and (key is None or rng.random() < 0.7):
            inner, key = at, rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            at = inner[key]
        if key is None or rng.random() < 0.05:
            return odd(rng)
        if isinstance(inner, dict) and rng.random() < 0.2:
            del inner[key]
        elif type(at) is int and rng.random() < 0.4:
            inner[key] = rng.choice((*HUGE, -at, at + 1, float(at), str(at)))
        else:
            inner[key] = odd(rng)
    return value


def as_json(value: Any, rng: random.Random) -> str:
    if rng.random() < 0.04:
        return rng.choice(("[" * 100_000, "", "\x00", "{", "nul", '{"a":1}{"b":2}', "9" * 5000))
    return json.dumps(value, ensure_ascii=rng.random() < 0.9 or "\\ud800" in json.dumps(value))


def spoil_json(path: Path, rng: random.Random) -> None:
    path.write_text(as_json(spoiled(json.loads(path.read_text()), rng), rng), errors="surrogatepass")


def spoil_lines(path: Path, rng: random.Random) -> None:
    lines = path.read_text().splitlines() or ["{}"]
    at = rng.randrange(len(lines))
    lines[at] = as_json(spoiled(json.loads(lines[at]), rng), rng)
    path.write_text("\n".join(lines) + rng.choice(("", "\n", "\n\n")), errors="surrogatepass")


def spoil_bytes(path: Path, rng: random.Random, limit: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 20))):
        data[rng.randrange(min(len(data), limit or len(data)))] = rng.randrange(256)
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    path.write_bytes(data)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: Any, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode(errors="surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def picked(case: Case, *names: str) -> str:
    return case.rng.choice(names)


def reading(case: Case, path: Path) -> list[Any]:
    """A command that reads a checkpoint."""
    if case.rng.random() < 0.7:
        return ["inspect", path, *picked_list(case, [], ["--json"], ["--sha256"], ["--weights", "raw"])]
    if case.rng.random() < 0.5:
        return ["convert", path, case.place / "out", "--to", "diffusers"]
    return editing(case, path)


def picked_list(case: Case, *lists: list[Any]) -> list[Any]:
    return case.rng.choice(lists)


def editing(case: Case, path: Path, *more: Any) -> list[Any]:
    edit = ["edit", case.seeds / "picture.png", "--instruction", "snow", "--checkpoint", path]
    return [*edit, *(more or ("--steps", "1", "--resolution", "64")), "--out", case.place / "out.png"]


def one_step(case: Case, data: Path, out: Path) -> list[Any]:
    """A training of one step."""
    base = ["--base", case.seeds / "tiny4", "--preset", "embedded", "--steps", "1"]
    return ["train", "--data", data, "--out", out, *base]
