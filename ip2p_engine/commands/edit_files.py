"""Files in, files out: what ``ip2p edit`` does around the editor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..edit import EditConfig, EditResult, Hooks, InstructPix2Pix
from ..errors import ConfigError
from ..images import check_output, open_image, plan_size, save_image
from ..noise import check_seed
from ..progress import progress

__all__ = ["edit_files", "output_paths"]


def edit_files(
    sources: Sequence[str],
    instructions: Sequence[str],
    *,
    load: Callable[[], InstructPix2Pix],
    config: EditConfig,
    seeds: Iterable[int],
    out: Path,
) -> list[dict[str, Any]]:
    """Edit files and write the results; returns one row of settings a result, with its file.

    All sources are opened, and all settings and names checked, before the checkpoint is loaded, so a broken one costs
    nothing.
    """
    pictures = [open_image(source) for source in sources]
    seed_list = [check_seed(seed) for seed in seeds]
    for picture in pictures:
        plan_size(config.size, *picture.size, config.resolution or 512)
    count = len(pictures) * len(instructions) * len(seed_list)
    paths = output_paths(sources, len(instructions), seed_list, out)
    check_output(paths[0])
    names = [source for source in sources for _ in range(len(instructions) * len(seed_list))]
    editor = load()
    with progress(count, "edits") as bar:
        results = editor.edit(pictures, instructions, seeds=seed_list, config=config, hooks=Hooks(on_progress=bar))
    return [_write(result, name, path) for result, name, path in zip(results, names, paths, strict=True)]


def output_paths(sources: Sequence[str], instructions: int, seeds: Sequence[int], out: Path) -> list[Path]:
    """Where each result goes: the file that was named, or numbered names in a folder.

    Raises ConfigError if one file is named for several results.
    """
    count = len(sources) * instructions * len(seeds)
    if out.suffix and not out.is_dir():
        if count > 1:
            raise ConfigError(f"--out {out} is one file and there are {count} results; name a folder instead")
        return [out]
    paths = []
    for number, source in enumerate(sources):
        stem = (
            Path(source).stem
            if [Path(s).stem for s in sources].count(Path(source).stem) == 1
            else (f"{Path(source).stem}_{number + 1}")
        )
        for instruction in range(instructions):
            for seed in seeds:
                parts = [stem, "edited", *([str(instruction + 1)] if instructions > 1 else [])]
                paths.append(out / ("_".join([*parts, f"seed{seed}"]) + ".png"))
    return paths


def _write(result: EditResult, source: str, path: Path) -> dict[str, Any]:
    settings = {**result.settings, "source": Path(source).name}
    save_image(result.image, path, settings)
    return {"file": str(path), "evaluations": result.evaluations, **settings}
