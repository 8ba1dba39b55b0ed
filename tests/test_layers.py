"""Imports point down (CONTRIBUTING.md, principle 1): the engine knows no host, and no layer knows the one above."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = ROOT / "ip2p_engine"
HOSTS = ("comfy", "nodes", "folder_paths", "server", "execution")
LOADERS = ("import_module", "__import__")
HEAVY = ("torch", "diffusers", "transformers", "open_clip", "PIL", "numpy", "safetensors")
LAYERS = [
    "errors version config devices files jpeg images strips detail pictures hooks plots progress tokenizer jobs",
    "diffusion",
    "checkpoint clip captions",
    "networks data",
    "edit_config edit",
    "p2p train session",
    "factory",
    "evaluate",
    "scenes photos",
    "commands cli __main__",
]
ORDER = " ".join(LAYERS).split()


def imports(source: str, package: str) -> Iterator[tuple[str, int, bool]]:
    """(absolute module, line, whether it was written relatively), at any depth; names of a package are its modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            names = [alias.name for alias in node.names] if module == "ip2p_engine" else [""]
            yield from ((f"{module}.{name}".rstrip("."), node.lineno, node.level > 0) for name in names)
        elif isinstance(node, ast.Call) and called(node) in LOADERS and node.args:
            written = str(getattr(node.args[0], "value", ""))
            yield (package if written.startswith(".") else "") + written, node.lineno, written.startswith(".")


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def faults(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What one engine module does against the layers; ``module`` is its absolute name."""
    package = module if is_package else module.rpartition(".")[0]
    own = module.split(".")[1] if "." in module else None
    found = []
    for target, line, relative in imports(source, package):
        parts = target.split(".")
        place = f"{module}:{line} imports {target}"
        if parts[0] in HOSTS or parts[0].startswith("comfy"):
            found.append(f"{place}, which is a host")
        if parts[0] != "ip2p_engine":
            continue
        if not relative:
            found.append(f"{place} absolutely")
        other = parts[1] if len(parts) > 1 else None
        if own is None or other in (None, own) or other == "":
            continue
        if other not in ORDER:
            found.append(f"{place}, which has no layer")
        elif own in ORDER and ORDER.index(other) > ORDER.index(own):
            found.append(f"{place}, which lies above")
    return found


def engine_modules() -> dict[str, Path]:
    paths = sorted(ENGINE.rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@pytest.mark.parametrize("module", engine_modules())
def test_imports_point_down(module):
    path = engine_modules()[module]
    assert not faults(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")


def test_every_module_has_a_layer():
    tops = {module.split(".")[1] for module in engine_modules() if "." in module}
    assert tops - set(ORDER) == set()
    assert {"errors", "images", "diffusion"} <= tops


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("edit", "import comfy.utils", "a host"),
        ("edit", "import comfy_api.latest", "a host"),
        ("cli", "def f():\n    import folder_paths", "a host"),
        ("edit", "from nodes import NODE_CLASS_MAPPINGS", "a host"),
        ("edit", "import importlib\nimportlib.import_module('comfy.sd')", "a host"),
        ("edit", "from ip2p_engine.errors import ConfigError", "absolutely"),
        ("edit", "import ip2p_engine", "absolutely"),
        ("errors", "from .images import fit", "above"),
        ("errors", "from . import images", "above"),
        ("diffusion.guidance", "from ..networks.model import Model", "above"),
        ("diffusion.schedule", "def f():\n    from ..edit import EditConfig", "above"),
        (
            "data.store",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..edit import EditConfig",
            "above",
        ),
        ("edit", "from .p2p.generator import PairGenerator", "above"),
        ("evaluate", "from .scenes.world import render", "above"),
        ("scenes.world", "from ..cli import main", "above"),
        ("checkpoint.read", "from ..networks.model import Model", "above"),
        ("scenes.recipe.stages", "from ...cli import main", "above"),
        ("edit", "from .helpers import thing", "no layer"),
    ],
)
def test_the_walk_sees(module, source, reason):
    assert [fault for fault in faults(source, f"ip2p_engine.{module}") if reason in fault]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("edit", "from .version import __version__"),
        ("edit", "from .errors import ConfigError\nfrom .networks.model import Model\nimport torch"),
        ("diffusion.sampling", "from .noise import draw"),
        ("scenes.world", "from ..edit import EditConfig\nfrom .grammar import Edit\nfrom . import judge"),
        ("cli", "def f():\n    from .scenes.world import render"),
        ("__main__", "from .cli import main"),
    ],
)
def test_the_walk_allows(module, source):
    assert not faults(source, f"ip2p_engine.{module}")


def test_the_package_root_may_reach_down_lazily():
    assert not faults("import_module('.edit', __name__)", "ip2p_engine", is_package=True)
    assert faults("import comfy", "ip2p_engine", is_package=True)


def arrows() -> dict[str, set[str]]:
    """Which packages and top modules each of them imports."""
    found: dict[str, set[str]] = {}
    for module, path in engine_modules().items():
        is_package = path.name == "__init__.py"
        package = module if is_package else module.rpartition(".")[0]
        own, names = module.split(".")[1:2], found.setdefault("".join(module.split(".")[1:2]), set())
        for target, _, relative in imports(path.read_text(encoding="utf-8"), package):
            other = target.split(".")[1:2]
            if relative and other and other != own:
                names.update(other)
    return found


def test_the_house_has_few_floors():
    """Nothing stands on more than eleven others, and following the arrows ends."""
    below = {name: others for name, others in arrows().items() if name}

    def floor(name: str, path: tuple[str, ...] = ()) -> int:
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        return 1 + max((floor(other, (*path, name)) for other in below[name]), default=0)

    floors = {name: floor(name) for name in below}
    assert max(floors.values()) <= 12, floors


def test_no_circle_within_a_package():
    modules = engine_modules()
    below = {
        module: {
            target
            for target, *_ in imports(path.read_text(encoding="utf-8"), module.rpartition(".")[0])
            if target in modules and modules[target].name != "__init__.py"
        }
        for module, path in modules.items()
        if path.name != "__init__.py"
    }

    def walk(module: str, path: tuple[str, ...] = ()) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path, module])}"
        for other in below[module]:
            walk(other, (*path, module))

    for module in below:
        walk(module)


def test_importing_the_engine_is_light():
    report = f"import sys, ip2p_engine; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
