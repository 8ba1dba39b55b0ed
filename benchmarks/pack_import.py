"""What the pack adds to ComfyUI's start, in processor seconds: from finding its folder to knowing its nodes.

usage, in ComfyUI's Python: python benchmarks/pack_import.py COMFYUI [--runs 5]
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def measure() -> float:
    """Seconds of one import, after ComfyUI has loaded what it needs itself. The working folder is ComfyUI's."""
    sys.path.insert(0, "")
    sys.argv = sys.argv[:1]
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    from comfy_api.latest import io  # noqa: F401

    import nodes  # noqa: F401

    started = time.process_time()
    spec = importlib.util.spec_from_file_location(
        "ip2p_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    pack = sys.modules["ip2p_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    asyncio.run(schemas(pack))
    return time.process_time() - started


async def schemas(pack) -> None:
    extension = await pack.comfy_entrypoint()
    for node in await extension.get_node_list():
        node.GET_SCHEMA()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    command = [sys.executable, str(Path(__file__).resolve()), "--once"]
    runs = [
        subprocess.run(command, cwd=options.comfyui, stdout=subprocess.PIPE, text=True, check=True)
        for _ in range(options.runs)
    ]
    seconds = [float(run.stdout.splitlines()[-1]) for run in runs]
    print(f"median {statistics.median(seconds):.2f} s of {', '.join(f'{value:.2f}' for value in sorted(seconds))}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--once"]:
        print(measure())
    else:
        main()
