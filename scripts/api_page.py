"""Writes docs/api.md from the docstrings of what ``import ip2p_engine`` offers, as griffe reads them.

python scripts/api_page.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
HEAD = """# The Python API

What `import ip2p_engine` offers, by name; training is `ip2p_engine.train.train`. Every module below has more, which may
change. Made of the docstrings by `python scripts/api_page.py`; small programs to start from: [examples](examples).
"""


def page() -> str:
    """The whole page."""
    package = griffe.load("ip2p_engine", search_paths=[str(ROOT)])
    parts = [HEAD]
    for name in sorted(package.exports, key=str.lower):
        if name != "__version__":
            parts += entry(name, package[name].final_target if package[name].is_alias else package[name])
    parts += entry("train.train", package["train.loop.train"])
    return "\n".join(parts) + "\n"


def entry(name: str, item: Any) -> Iterator[str]:
    """One name: its signature, what it says of itself, and its public members."""
    yield f"## {name}\n"
    yield f"`{item.path}`\n"
    yield from documented(item)
    for member in item.members.values() if item.is_class else ():
        if member.is_public and not member.is_imported and (member.is_function or member.docstring):
            yield f"### {name}.{member.name}\n"
            yield from documented(member)


def documented(item: Any) -> Iterator[str]:
    if item.is_function:
        yield f"```python\n{item.signature()}\n```\n"
    elif item.is_attribute and item.annotation is not None:
        yield f"```python\n{item.name}: {item.annotation}{f' = {item.value}' if item.value else ''}\n```\n"
    if item.docstring:
        yield f"{item.docstring.value.replace('``', '`')}\n"


if __name__ == "__main__":
    made = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == made else f"{PAGE.name} is old; run {Path(__file__).name}")
    PAGE.write_text(made, encoding="utf-8")
