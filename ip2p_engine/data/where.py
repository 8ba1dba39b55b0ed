"""``where``: a condition on the columns of a row, such as ``o_score >= 8 and edit_type != 'style'``.

    condition = all {"or" all};  all = part {"and" part};  part = ["not"] (comparison | "(" condition ")")
    comparison = NAME ("==" | "=" | "!=" | "<" | "<=" | ">" | ">=") VALUE
               | NAME ["not"] "in" "(" VALUE {"," VALUE} ")"

A VALUE is a number, a text in quotes, true, false or null. Nothing is run: the text becomes a tree of comparisons.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

__all__ = ["Where"]

TOKEN = re.compile(
    r"""\s*(?:(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)(?![\w.])|(?P<text>'[^']*'|"[^"]*")|(?P<name>[^\W\d][\w.-]*)"""
    r"""|(?P<sign>==|!=|<=|>=|=|<|>|\(|\)|,))"""
)
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
CONSTANTS = {"true": True, "false": False, "null": None}
KEYWORDS = ("and", "or", "not", "in", *CONSTANTS)
MOST_LETTERS, DEEPEST = 2000, 20
Test = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Where:
    """A parsed condition; raises ConfigError, pointing at the place, for a text that is none."""

    text: str

    def __post_init__(self) -> None:
        if not self.text.strip() or len(self.text) > MOST_LETTERS:
            raise ConfigError(f"`where` is of {len(self.text)} letters; give a condition of 1 to {MOST_LETTERS}")
        parser = _Parser(self.text)
        object.__setattr__(self, "_test", parser.whole())
        object.__setattr__(self, "names", tuple(dict.fromkeys(parser.names)))

    names: tuple[str, ...] = ()
    """The columns that it looks at."""

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Whether a row meets it. A comparison with what is missing, or of another type, is not met."""
        return self._test(row)  # type: ignore[attr-defined]


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at, self._last, self._depth = text, 0, 0, 0
        self.names: list[str] = []

    def whole(self) -> Test:
        found = self._either()
        if self._text[self._at :].strip():
            raise self._refusal("the end, 'and' or 'or'")
        return found

    def _either(self) -> Test:
        tests = [self._all()]
        while self._takes("or"):
            tests.append(self._all())
        return lambda row: any(test(row) for test in tests)

    def _all(self) -> Test:
        tests = [self._part()]
        while self._takes("and"):
            tests.append(self._part())
        return lambda row: all(test(row) for test in tests)

    def _part(self) -> Test:
        if self._takes("not"):
            inner = self._nested(self._part)
            return lambda row: not inner(row)
        if self._takes("("):
            inner = self._nested(self._either)
            self._expect(")")
            return inner
        return self._comparison()

    def _nested(self, parse: Callable[[], Test]) -> Test:
        self._depth += 1
        if self._depth > DEEPEST:
            raise ConfigError(f"`where` is nested more than {DEEPEST} deep; write it simpler")
        inner = parse()
        self._depth -= 1
        return inner

    def _comparison(self) -> Test:
        kind, name = self._peek()
        if kind != "name" or name in KEYWORDS:
            raise self._refusal("the name of a column")
        self._next()
        self.names.append(name)
        negated = self._takes("not")
        if self._takes("in"):
            values = self._values()
            return lambda row: any(_equal(row.get(name), value) for value in values) != negated
        sign = self._next()[1]
        if negated or sign not in COMPARE:
            self._at = self._last
            raise self._refusal("==, !=, <, <=, >, >= or in")
        value, compare = self._value(), COMPARE[sign]
        if value is None and sign in ("==", "=", "!="):
            return lambda row: compare(row.get(name), None)
        return lambda row: _holds(compare, row.get(name), value)

    def _values(self) -> list[Any]:
        self._expect("(")
        found = [self._value()]
        while self._takes(","):
            found.append(self._value())
        self._expect(")")
        return found

    def _value(self) -> Any:
        kind, word = self._next()
        if kind == "number":
            return float(word)
        if kind == "text":
            return word[1:-1]
        if word in CONSTANTS:
            return CONSTANTS[word]
        self._at = self._last
        raise self._refusal("a number, or a text in quotes")

    def _peek(self) -> tuple[str, str]:
        found = TOKEN.match(self._text, self._at)
        return (str(found.lastgroup), found[str(found.lastgroup)]) if found else ("", "")

    def _next(self) -> tuple[str, str]:
        found = TOKEN.match(self._text, self._at)
        if found is None:
            raise self._refusal("a comparison that goes on")
        kind, word = self._peek()
        self._last, self._at = self._at, found.end()
        return kind, word

    def _takes(self, word: str) -> bool:
        kind, found = self._peek()
        taken = kind in ("name", "sign") and found == word
        if taken:
            self._next()
        return taken

    def _expect(self, sign: str) -> None:
        if not self._takes(sign):
            raise self._refusal(repr(sign))

    def _refusal(self, wanted: str) -> ConfigError:
        said = f"`where` cannot be understood at {self._text[self._at :].strip()[:30]!r}"
        return ConfigError(f"{said}; give {wanted} there, as in o_score >= 8 and edit_type != 'style'")


def _holds(compare: Callable[[Any, Any], bool], found: Any, value: Any) -> bool:
    if found is None or value is None:
        return False
    numbers = isinstance(found, int | float) and isinstance(value, int | float)
    if not numbers and not (isinstance(found, str) and isinstance(value, str)):
        return False
    return bool(compare(found, value))


def _equal(found: Any, value: Any) -> bool:
    return found is None if value is None else _holds(operator.eq, found, value)
