"""Files in, files out: what ``ip2p edit`` does around the editor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from ..diffusion.noise import check_seed
from ..edit import EditConfig, EditResult, InstructPix2Pix
from ..errors import ConfigError, Interrupted
from ..hooks import Hooks
from ..images import check_output, is_picture_name, open_image, plan_size, save_image
from ..progress import progress
from .options import stop_signals

__all__ = ["edit_files", "output_paths"]


def edit_files(
    sources: Sequence[str],
    instructions: Sequence[str],
    *,
    load: Callable[[], InstructPix2Pix],
    config: EditConfig,
    seeds: Iterable[int],
    out: Path,
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Edit files; each result is written, and its settings with its file shown, as soon as its batch is done.

    All sources are opened, and all settings and names checked, before the checkpoint is loaded, so a broken one costs
    nothing. Raises Interrupted after Ctrl-C or SIGTERM; what was shown stays.
    """
    pictures = [open_image(source) for source in sources]
    seed_list = [check_seed(seed) for seed in seeds]
    for picture in pictures:
        plan_size(config.size, *picture.size, config.resolution or 512)
    paths = output_paths(sources, len(instructions), seed_list, out)
    check_output(paths[0], {"instruction": max(instructions, key=len)})
    per_source = len(instructions) * len(seed_list)
    editor, written = load(), []

    def write(place: int, result: EditResult) -> None:
        path = paths[place] if paths[place] == out else _unused(paths[place])
        row = _write(result, sources[place // per_source], path)
        written.append(path)
        show(row)

    with stop_signals() as should_stop, progress(len(paths), "edits") as bar:
        hooks = Hooks(on_progress=bar, on_result=write, should_stop=should_stop)
        try:
            editor.edit(pictures, instructions, seeds=seed_list, config=config, hooks=hooks)
        except Interrupted as error:
            raise Interrupted(f"stopped with {len(written)} of {len(paths)} results written") from error


def output_paths(sources: Sequence[str], instructions: int, seeds: Sequence[int], out: Path) -> list[Path]:
    """Where each result goes: the file that was named, or names in a folder, which may be taken.

    Raises ConfigError if one file is named for several results, or is a source.
    """
    results = len(sources) * instructions * len(seeds)
    if is_picture_name(out) and not out.is_dir():
        if results > 1:
            raise ConfigError(f"--out {out} is one file and there are {results} results; name a folder instead")
        if out.exists() and out.samefile(sources[0]):
            raise ConfigError(f"--out {out} is the picture to edit, which would be lost; name another file or a folder")
        return [out]
    paths = []
    for source in sources:
        for instruction in range(instructions):
            for seed in seeds:
                parts = [Path(source).stem, "edited", *([str(instruction + 1)] if instructions > 1 else [])]
                paths.append(out / ("_".join([*parts, f"seed{seed}"]) + ".png"))
    return paths


def _unused(path: Path) -> Path:
    """The path, or the first numbered one that is free: nothing in a folder is overwritten."""
    numbers, free = count(2), path
    while os.path.lexists(free):
        free = path.with_stem(f"{path.stem}_{next(numbers)}")
    return free


def _write(result: EditResult, source: str, path: Path) -> dict[str, Any]:
    settings = {**result.settings, "source": Path(source).name}
    save_image(result.image, path, settings)
    return {"file": str(path), "evaluations": result.evaluations, **settings}
