"""The size budget (CONTRIBUTING.md, principle 3): files of 600 lines, functions of 60, the training loop 120."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("ip2p_engine", "nodes") for path in (ROOT / folder).rglob("*.py"))
FILE_LINES, FUNCTION_LINES, TRAINING_LOOP_LINES = 600, 60, 120


def too_long(source: str) -> list[str]:
    found = [f"the file has {lines} lines"] if (lines := len(source.splitlines())) > FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > (TRAINING_LOOP_LINES if node.name == "train" else FUNCTION_LINES):
                found.append(f"{node.name} at line {node.lineno} has {lines} lines")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path):
    assert not too_long(path.read_text(encoding="utf-8"))


def function(name: str, lines: int, indent: str = "") -> str:
    return f"{indent}def {name}():\n" + f"{indent}    pass\n" * (lines - 1)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("pass\n" * 600, 0),
        ("pass\n" * 601, 1),
        (function("f", 60), 0),
        (function("f", 61), 1),
        ("async " + function("f", 61), 1),
        ("class A:\n" + function("f", 61, "    "), 1),
        (function("train", 120), 0),
        (function("train", 121), 1),
    ],
)
def test_the_measure(source, count):
    assert len(too_long(source)) == count


def test_there_is_something_to_measure():
    assert len(SOURCES) > 5
