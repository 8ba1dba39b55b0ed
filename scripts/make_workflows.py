"""Write workflows/*.json, their API twins and their thumbnails, by running each in a real ComfyUI.

usage: [COMFYUI_PATH=PATH] python scripts/make_workflows.py [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from PIL import ImageOps
from workflow_graph import Graph  # first: it also makes the tests' modules importable
from workflow_sources import BLUEPRINTS, WORKFLOWS

from comfy_install import find  # isort: skip
from comfy_server import ComfyServer  # isort: skip
from workflow_format import to_api  # isort: skip


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "workflows"
THUMBNAIL = (640, 400)


def main() -> None:
    options = parse()
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as base, ComfyServer(find(), Path(base)) as server:
        info = server.object_info()
        for name, describe in BLUEPRINTS.items():
            write(ROOT / "subgraphs" / f"{name}.json", describe(Graph(name, info, version)))
        for name, describe in WORKFLOWS.items():
            if options.names and not any(wanted in name for wanted in options.names):
                continue
            graph = Graph(name, info, version)
            shown = describe(graph)
            page = graph.page()
            prompt = to_api(page, info)
            write(FOLDER / f"{name}.json", page)
            write(FOLDER / "api" / f"{name}.json", prompt)
            if options.keep_pictures:
                continue
            run = server.run(prompt, page)
            if run.status != "success":
                sys.exit(f"{name}: {run.message}\n{server.log.read_text()[-3000:]}")
            picture = run.pictures[str(shown.number)][0].convert("RGB")
            ImageOps.pad(picture, THUMBNAIL, color="white").save(FOLDER / f"{name}.jpg", quality=88)
            sys.stdout.write(f"{name}: {run.seconds:.1f} s\n")


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of those to make; default: all")
    parser.add_argument("--keep-pictures", action="store_true", help="write the files only, for another word in a note")
    return parser.parse_args()


if __name__ == "__main__":
    main()
