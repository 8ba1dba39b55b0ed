"""``ip2p evaluate sweep | pairs``: one picture over a grid, and pictures that exist."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .options import Several, add_command, add_model_options, check_positive, load_editor, local_path, progress_bar

__all__ = ["add"]

DEFAULT_CLIP, PAIRS_CLIP = "ViT-L-14/openai", "ViT-B-32/openai"


def add(actions: Any) -> None:
    _add_sweep(actions)
    _add_pairs(actions)


def _add_sweep(actions: Any) -> None:
    sweep = add_command(actions, "sweep", _sweep, "one picture over a grid of s_T, s_I and seeds, as a labelled sheet")
    sweep.add_argument("picture", metavar="PICTURE")
    sweep.add_argument("--instruction", required=True, metavar="TEXT")
    sweep.add_argument("--caption", required=True, metavar="TEXT", help="describes the picture")
    sweep.add_argument("--edited-caption", required=True, metavar="TEXT", help="describes what it should become")
    sweep.add_argument("--text-cfg", type=float, action=Several, nargs="+", metavar="S_T", help="default: 3 5 7.5")
    sweep.add_argument("--image-cfg", type=float, action=Several, nargs="+", metavar="S_I", help="default: 1.2 1.5 2.0")
    sweep.add_argument("--seed", type=int, default=0, help="the first seed")
    sweep.add_argument("--seeds", type=int, default=1, metavar="K", help="blocks of the grid")
    sweep.add_argument("--steps", type=int, help="default: the checkpoint's recommendation")
    sweep.add_argument("--resolution", type=int, help="longer side that the paper's rule aims at")
    sweep.add_argument(
        "--clip", help=f"scores the pictures (default: {DEFAULT_CLIP}; with the embedded model embedded)"
    )
    sweep.add_argument("--auto", action="store_true", help="also write the picked edit, at the picture's own size")
    sweep.add_argument(
        "--min-sim-image", type=float, help="keeps the picture (default: 0.7; with the embedded CLIP 0.45)"
    )
    sweep.add_argument("--out", type=local_path, required=True, help="the run's folder")
    add_model_options(sweep)


def _sweep(options: argparse.Namespace) -> None:
    from ..clip.similarity import ClipSimilarity
    from ..evaluate.pareto import AutoPick
    from ..evaluate.run_folder import check_run
    from ..evaluate.sweep import SweepConfig, sweep
    from ..scenes.auto import SCENES_MIN_IMAGE

    grid = {name: getattr(options, name) for name in ("text_cfg", "image_cfg")}
    config = SweepConfig(
        **{f"{name}s": values for name, values in grid.items() if values},
        seeds=range(options.seed, options.seed + check_positive("--seeds", options.seeds)),
        steps=options.steps,
        resolution=options.resolution,
    )
    embedded = options.checkpoint == "embedded"
    clip_name = options.clip or ("embedded" if embedded else DEFAULT_CLIP)
    floor = options.min_sim_image
    floor = floor if floor is not None else SCENES_MIN_IMAGE if clip_name == "embedded" else AutoPick().min_sim_image
    check_run(options.out, "sweep")
    editor = load_editor(options)
    clip = ClipSimilarity.load(clip_name, device=editor.model.device)
    captions = (options.caption, options.edited_caption)
    with progress_bar(0, "edits") as bar:
        settings = {"config": config, "auto": AutoPick(min_sim_image=floor), "on_progress": bar}
        result = sweep(editor, options.picture, options.instruction, captions, clip, **settings)
    told = {"picture": options.picture, "clip": clip_name, "min_sim_image": floor}
    lines = _write_sweep(result, options.out, told)
    if options.auto:
        lines.append(_write_pick(editor, result, config, options.out))
    sys.stdout.write("\n".join(lines) + "\n")


def _write_sweep(result: Any, out: Path, told: dict[str, Any]) -> list[str]:
    from ..evaluate.run_folder import Table, save_run, text_of, write_rows
    from ..evaluate.sweep_sheet import sweep_sheet
    from ..images import save_image

    names = ("sim_direction", "sim_image", "sim_0", "sim_1")
    rows = [
        (c.text_cfg, c.image_cfg, c.seed, *(f"{getattr(c.scores, name):.4f}" for name in names), _mark(c, result))
        for c in result.cells
    ]
    table = Table(title="Every setting", columns=("s_T", "s_I", "seed", *names, ""), rows=rows)
    save_image(sweep_sheet(result), out / "sweep.png")
    texts = {name: getattr(result.sample, name) for name in ("instruction", "caption", "edited_caption")}
    settings = {**told, **texts, **result.settings}
    write_rows(out, [{**settings, **_cell_row(cell)} for cell in result.cells])
    pictures = {"sweep.png": result.sample.instruction}
    save_run(out, "sweep", settings=settings, tables=[table], pictures=pictures)
    return [text_of(table), str(out / "sweep.png")]


def _cell_row(cell: Any) -> dict[str, Any]:
    return {"text_cfg": cell.text_cfg, "image_cfg": cell.image_cfg, "seed": cell.seed, **asdict(cell.scores)}


def _mark(cell: Any, result: Any) -> str:
    return "picked" if cell is result.best else "on the front" if cell.on_front else ""


def _write_pick(editor: Any, result: Any, config: Any, out: Path) -> str:
    from ..evaluate.sweep import edit_with
    from ..images import save_image

    edited = edit_with(editor, result, config)
    path = out / "picked.png"
    save_image(edited.image, path, {**edited.settings, **asdict(result.best.scores)})
    best = result.best
    said = f"{path}: --text-cfg {best.text_cfg:g} --image-cfg {best.image_cfg:g} --seed {best.seed}"
    return said if result.picked.keeps else f"{said} (none keeps the picture: this is the nearest to it)"


def _add_pairs(actions: Any) -> None:
    pairs = add_command(actions, "pairs", _pairs, "MagicBrush's and Emu Edit's numbers of pictures that exist")
    pairs.add_argument(
        "table", type=Path, metavar="TABLE", help=".csv or .jsonl: source, edited, target, captions, mask"
    )
    pairs.add_argument("--out", type=local_path, required=True, help="the run's folder")
    pairs.add_argument("--clip", default=PAIRS_CLIP, help=f"default: {PAIRS_CLIP}, as MagicBrush's evaluation")
    pairs.add_argument("--dino", nargs="?", const="", metavar="MODEL", help="also DINO (default: facebook/dino-vits16)")
    pairs.add_argument("--lpips", action="store_true", help="also LPIPS of the background, where there is a mask")
    pairs.add_argument("--device", help="cpu, cuda, mps (default: a GPU if there is one)")


def _pairs(options: argparse.Namespace) -> None:
    from ..clip.similarity import ClipSimilarity
    from ..edit import usable_device
    from ..evaluate.features import DINO, Dino, Lpips
    from ..evaluate.pairs import measure_table, pair_tables, read_table
    from ..evaluate.run_folder import check_run, claim_run, save_run, text_of

    rows, device = read_table(options.table), usable_device(options.device)
    if options.lpips and not any(row.mask for row in rows):
        raise ConfigError(f"--lpips looks outside masks, and {options.table} has none; add a column mask")
    check_run(options.out, "pairs")
    clip = ClipSimilarity.load(options.clip, device=device)
    dino = None if options.dino is None else Dino.load(options.dino or DINO, device=device)
    lpips = Lpips() if options.lpips else None
    claim_run(options.out, "pairs")
    with progress_bar(len(rows), "pictures") as bar:
        numbers = measure_table(options.table, rows, clip, dino, lpips, folder=options.out, on_progress=bar)
    tables = pair_tables(numbers)
    told = {"table": str(options.table), "clip": options.clip, "dino": None if dino is None else options.dino or DINO}
    save_run(options.out, "pairs", settings=told, tables=tables)
    sys.stdout.write("\n\n".join(text_of(table) for table in tables) + "\n")
