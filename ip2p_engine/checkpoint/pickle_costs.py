"""What it costs to make a pickle's content, followed opcode by opcode without making it.

A pickle names what it has made as often as it likes: forty tuples, each of the one before twice, take a year to hash,
and a dictionary of a megabyte can be copied a hundred thousand times.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Costs", "TooDear"]

MOST_STEPS = 10_000_000  # places in containers that are gone through; SDXL with its optimizer takes some 100,000
LEAVES = ("NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "GLOBAL")
TEXTS = ("BINUNICODE", "SHORT_BINSTRING")
EMPTY = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET")
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
HASHES = ("collections OrderedDict", "collections Counter")
PUTS, GETS = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")


class TooDear(ValueError):
    """The content costs more than that of any weights."""


class _Node:
    """A value: how many places a copy goes through, how many a hash, of a tuple what is in it, of a name the name."""

    __slots__ = ("hashed", "inside", "length", "name")

    def __init__(self, length: int = 1, hashed: int = 1, inside: list[_Node] | None = None, name: str = "") -> None:
        self.length, self.hashed, self.inside, self.name = length, hashed, inside, name


class Costs:
    """Follows the opcodes that torch's restricted loader knows; at any other it ends, as the loader will there."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, _Node] = {}
        self._steps, self._deepest, self._over = 0, 1, False

    def step(self, name: str, argument: Any) -> None:
        """Raises TooDear, and LookupError or TypeError where the stack lacks what an opcode needs."""
        if name == "STOP":
            self._start()
        elif not self._over:
            self._push(name, argument)

    def _push(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in PUTS:
            self._memo[argument] = stack[-1]
        elif name in GETS:
            stack.append(self._memo[argument])
        elif name in LEAVES:
            stack.append(_Node(name=str(argument) if name == "GLOBAL" else ""))
        elif name in TEXTS:
            stack.append(_Node(len(argument)))
        elif name == "MARK":
            stack.append(None)
        elif name in EMPTY:
            stack.append(_Node(0))
        elif name in TUPLES or name == "TUPLE":
            stack.append(self._tuple(self._marked() if name == "TUPLE" else self._last(TUPLES[name])))
        elif name in ("APPEND", "APPENDS"):
            self._fill(self._marked() if name == "APPENDS" else self._last(1), 1)
        elif name in ("SETITEM", "SETITEMS"):
            self._fill(self._marked() if name == "SETITEMS" else self._last(2), 2)
        elif name in ("REDUCE", "NEWOBJ", "BUILD"):
            self._call(name)
        elif name == "BINPERSID":
            stack[-1] = _Node()
        else:
            self._over = name != "PROTO"

    def _last(self, count: int) -> list[_Node]:
        at = len(self._stack) - count
        found = self._stack[at:]
        del self._stack[at:]
        return found

    def _marked(self) -> list[_Node]:
        found: list[_Node] = []
        while (node := self._stack.pop()) is not None:
            found.append(node)
        return found[::-1]

    def _tuple(self, inside: list[_Node]) -> _Node:
        node = _Node(len(inside), 1 + sum(one.hashed for one in inside), inside)
        self._deepest = max(self._deepest, node.hashed)
        self._count(node.hashed)
        return node

    def _fill(self, items: list[_Node], stride: int) -> None:
        self._count(sum(one.hashed for one in items[::stride]))
        self._stack[-1].length += len(items) // stride

    def _call(self, name: str) -> None:
        """Of a function with its arguments, or of an object with its state; either may copy them."""
        function, what = self._last(2)
        if name != "BUILD" and what.inside is None:
            raise TooDear("a call whose arguments are no tuple")
        given = [what] if name == "BUILD" else what.inside or []
        length = sum(one.length for one in given)
        self._count(length * (self._deepest if function.name in HASHES else 1))
        self._stack.append(_Node(length, what.hashed))

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise TooDear("more steps than any weights take")
