"""What the rooms have in common: one set of hooks, and Python's words below the command line."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

from ip2p_engine.commands.options import in_options

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
        if path.parent.name != "commands"
        for function, name in arguments(tree)
        if name in ("on_progress", "on_step", "on_result", "on_error", "on_fault", "should_stop")
    ]
    assert not own


def sentences(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of the strings that are no docstrings."""
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.lineno, node.value


def test_the_engine_names_arguments_and_not_options():
    named = [
        f"{path.relative_to(ENGINE)}:{line}: {text}"
        for path, tree in TREES.items()
        if path.parent.name != "commands" and path.name not in ("cli.py", "hub.py")  # a card
        for line, text in sentences(tree)
        if re.search(r"[\s(]--[a-z]|^--\S+\s|same command", text)
        and text != "scenes --auto"  # the name of a kind of run
    ]
    assert not named


OWN_PICTURES = ("images.py", "curve.py", "pictures.py", "gather.py")  # the third and fourth of a list that ships


def test_pictures_of_others_are_opened_in_one_place():
    """Where the formats are a closed list: Pillow reads many more, one of which starts a program."""
    opened = [
        f"{path.relative_to(ENGINE)}:{node.lineno}"
        for path, tree in TREES.items()
        if path.name not in OWN_PICTURES
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "open" and getattr(node.value, "id", "") == "Image"
    ]
    assert not opened


def test_names_of_others_reach_the_terminal_by_one_way():
    """``progress.write_note`` makes them printable; the others write what the engine itself says."""
    own = ("cli.py", "options.py", "train.py", "scenes.py", "progress.py")
    written = [
        f"{path.relative_to(ENGINE)}:{node.lineno}"
        for path, tree in TREES.items()
        if path.name not in own
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "write" and ast.unparse(node.value) == "sys.stderr"
    ]
    assert not written


def test_the_command_line_says_its_options():
    given = argparse.Namespace(hold_out_test=False, base=None, lora_rank=4)
    assert in_options("give `hold_out_test`, or another `base`", given) == "give --hold-out-test, or another --base"
    assert in_options("its own `lora_rank`, or `lora_conv_rank`", given) == "its own --lora, or lora_conv_rank"
    assert in_options("a smaller `batch`; the same call goes on", given) == "a smaller batch; the same command goes on"
