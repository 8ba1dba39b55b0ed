"""What the rooms have in common: one set of hooks, and Python's words below the command line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ENGINE = Path(__file__).parents[1] / "ip2p_engine"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ENGINE.rglob("*.py"))}


def arguments(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            given = node.args
            for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs):
                yield node.name, argument.arg


def test_whoever_watches_hands_in_one_set_of_hooks():
    own = [
        f"{path.relative_to(ENGINE)}: {function}({name})"
        for path, tree in TREES.items()
        if path.parent.name not in ("train", "commands")  # train's inner functions hand on what hooks say
        for function, name in arguments(tree)
        if name in ("on_progress", "on_step", "on_result", "on_error", "on_fault", "should_stop")
    ]
    assert not own
