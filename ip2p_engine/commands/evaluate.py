"""``ip2p evaluate``: the paper's curves, the field's tables, the embedded world, sweeps and reports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import public_name
from ..hooks import Hooks
from ..progress import write_note
from .evaluate_data import (
    SCENES,
    add_ablation,
    add_data_options,
    measure_samples,
    named_checkpoints,
    open_samples,
    told,
    warn_of_training,
)
from .evaluate_edits import add_edits
from .evaluate_judge import add_judge
from .evaluate_recommend import add_areas, add_recommend, add_sessions
from .options import (
    Several,
    add_command,
    add_guidance_options,
    add_lora_option,
    add_model_options,
    check_positive,
    edit_config,
    load_editor,
    local_path,
    loras_of,
    progress_bar,
    torch_dtype,
)

__all__ = [
    "add",
]

DEFAULT_CLIP, PAIRS_CLIP = "ViT-L-14/openai", "ViT-B-32/openai"
OF_ONE_EDIT = ("kind", "case", "came_out", "instruction", "seed")
IMAGE_CFGS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def add(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="measure edits: curves, tables, sweeps, reports")
    actions = evaluate.add_subparsers(metavar="ACTION", required=True)
    _add_curve(actions)
    _add_scenes(actions)
    _add_pictures(actions)
    add_edits(actions)
    add_recommend(actions)
    add_areas(actions)
    add_sessions(actions)
    add_judge(actions)
    add_ablation(actions)
    report = add_command(actions, "report", _report, "one HTML file of a run, with all its plots and tables")
    report.add_argument("folder", type=Path, metavar="RUN", help="a folder that ip2p evaluate wrote, or several in one")
    report.add_argument("--out", type=local_path, help="the file (default: RUN/report.html)")


def _add_curve(actions: Any) -> None:
    curve = add_command(actions, "curve", _curve, "image similarity against direction over a sweep (figure 8)")
    add_data_options(curve)
    curve.add_argument(
        "--text-cfg", type=float, action=Several, nargs="+", default=[7.5], metavar="S_T", help="default: 7.5"
    )
    curve.add_argument(
        "--image-cfg", type=float, action=Several, nargs="+", default=IMAGE_CFGS, metavar="S_I", help="1.0, 1.2 ... 2.2"
    )
    curve.add_argument(
        "--strength", type=float, action=Several, nargs="*", help="SDEdit's (default: 0.3 ... 0.9; none: no SDEdit)"
    )
    curve.add_argument("--text-to-image", metavar="CHECKPOINT", help="makes SDEdit and Prompt-to-Prompt")
    curve.add_argument(
        "--checkpoint",
        action=Several,
        nargs="+",
        default=["embedded"],
        metavar="[NAME=]CHECKPOINT",
        help="one curve each",
    )
    curve.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a file that has both")
    add_lora_option(curve)
    curve.add_argument("--steps", type=int, help="default: each checkpoint's recommendation")
    curve.add_argument("--sampler", default="euler_ancestral", help="default: euler_ancestral")
    curve.add_argument("--title", default="Image similarity against direction")


def _curve(options: argparse.Namespace) -> None:
    from ..data.reading import open_pairs
    from ..evaluate.curve import claims
    from ..evaluate.report import example_sheet
    from ..evaluate.run_folder import check_run, text_of
    from ..evaluate.seen import seen_table
    from ..evaluate.trade_off import points_table, save_trade_off

    named = named_checkpoints(options.checkpoint)
    painter = options.text_to_image or ("embedded-sd" if options.data == SCENES else None)
    if options.strength and painter is None:
        raise ConfigError("--strength is SDEdit's, which needs a text-to-image checkpoint; give --text-to-image")
    samples, judge = open_samples(options)
    check_run(options.out, "curve")
    for _, path in named if options.data != SCENES else ():
        warn_of_training(path, getattr(samples, "pairs", None), split=options.split)
    captioned = getattr(samples, "captioned", len(samples))  # all scenes are
    if captioned < len(samples):
        some = f"direction is of the other {captioned}" if captioned else "image metrics alone"
        write_note(f"ip2p: {len(samples) - captioned} of {len(samples)} samples lack a caption: {some}")
    bare = captioned < len(samples)
    editors, baselines, resolution = _curve_methods(options, named, painter, bare=bare)
    rows = measure_samples(options, "curve", samples, judge, [*editors, *baselines], resolution)
    rivals = [name for name in dict.fromkeys(row["curve"] for row in rows) if name.startswith("SDEdit")]
    first = editors[0].settings[0].curve
    s_ts, s_is = set(options.text_cfg), set(options.image_cfg)
    found = claims(rows, first, rivals) if len(s_ts) == 1 and len(s_is) > 1 else []
    examples = example_sheet(samples, editors, resolution=resolution)
    measured = None if options.data == SCENES else open_pairs(options.data)
    points = save_trade_off(
        options.out,
        rows,
        kind="curve",
        title=options.title,
        settings={**told(options), "checkpoint": ", ".join(f"{name}={public_name(path)}" for name, path in named)},
        claims=found,
        examples=examples,
        closer=[one.settings[0].curve for one in editors],
        more=[seen_table(named, measured, weights=options.weights)],
    )
    sentences = [f"{one.sentence}: {'yes' if one.holds else 'no'} ({one.share:.1%} of resamples)" for one in found]
    plot = options.out / ("curve.png" if any("sim_direction" in point.means for point in points) else "examples.png")
    sys.stdout.write("\n".join([text_of(points_table(points)), *sentences, f"{plot}"]) + "\n")


def _curve_methods(
    options: argparse.Namespace, named: Sequence[tuple[str, str]], painter: str | None, *, bare: bool = False
) -> tuple[list[Any], list[Any], int]:
    """(one method a checkpoint, the baselines, the resolution of all); ``bare`` samples have no captions to paint."""
    from ..edit import InstructPix2Pix
    from ..evaluate.methods import CopyInput, InstructionEdit, PromptToPrompt, SDEdit, Target
    from ..networks.model import load_model

    device, dtype = options.device, torch_dtype(options)
    walk = {"steps": options.steps, "sampler": options.sampler}
    editors = []
    for name, path in named:
        loras = loras_of(options)
        editor = InstructPix2Pix.load(path, device=device, dtype=dtype, weights=options.weights, loras=loras)
        grid = {"text_cfgs": options.text_cfg, "image_cfgs": options.image_cfg}
        editors.append(InstructionEdit(editor, label=name, **grid, **walk))
    baselines: list[Any] = [CopyInput(), Target("true edit" if options.data == SCENES else "the data set's pair")]
    if painter is not None:
        model, name = load_model(painter, device=device, dtype=dtype), public_name(painter)
        options.strength = STRENGTHS if options.strength is None else options.strength
        if options.strength:
            texts: dict[str, Any] = {"texts": ("instruction",)} if bare else {}
            baselines.insert(0, SDEdit(model, name=name, strengths=options.strength, **texts, **walk))
        if not bare:
            baselines.append(PromptToPrompt(model, name=name, steps=options.steps))
    return editors, baselines, editors[0].model.spec.resolution


def _report(options: argparse.Namespace) -> None:
    from ..evaluate.report import write_report

    sys.stdout.write(f"{write_report(options.folder, options.out or options.folder / 'report.html')}\n")


def _add_pictures(actions: Any) -> None:
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
    from ..evaluate.run_folder import check_run
    from ..evaluate.statistics import AutoPick
    from ..evaluate.sweep import SweepConfig, sweep
    from ..scenes.exam import SCENES_MIN_IMAGE

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
        auto, hooks = AutoPick(min_sim_image=floor), Hooks(on_progress=bar)
        text = options.instruction
        result = sweep(editor, options.picture, text, captions, clip, config=config, auto=auto, hooks=hooks)
    told = {"picture": options.picture, "clip": clip_name, "min_sim_image": floor}
    lines = _write_sweep(result, options.out, told)
    if options.auto:
        lines.append(_write_pick(editor, result, config, options.out))
    sys.stdout.write("\n".join(lines) + "\n")


def _write_sweep(result: Any, out: Path, told: dict[str, Any]) -> list[str]:
    from ..evaluate.run_folder import Table, save_run, text_of, write_rows
    from ..evaluate.sweep import sweep_sheet
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
    from ..evaluate.metrics import DINO, Dino, Lpips
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
        hooks = Hooks(on_progress=bar)
        numbers = measure_table(options.table, rows, clip, dino, lpips, folder=options.out, hooks=hooks)
    tables = pair_tables(numbers)
    told = {"table": str(options.table), "clip": options.clip, "dino": None if dino is None else options.dino or DINO}
    save_run(options.out, "pairs", settings=told, tables=tables)
    sys.stdout.write("\n\n".join(text_of(table) for table in tables) + "\n")


def _add_scenes(actions: Any) -> None:
    scenes = add_command(actions, "scenes", _scenes, "edit held-out scenes and compare with the truth, kind by kind")
    scenes.add_argument("--n", type=int, default=1000, help="edits (default: 1000)")
    scenes.add_argument("--seed", type=int, default=7)
    scenes.add_argument("--out", type=local_path, required=True, help="the run's folder; the same again goes on")
    scenes.add_argument("--worst", type=int, default=24, help="how many of the worst to show (default: 24)")
    scenes.add_argument("--batch", type=int, default=16, help="pictures at once (default: 16)")
    scenes.add_argument("--clip", default="embedded", help="scores the pictures (default: embedded)")
    scenes.add_argument("--auto", action="store_true", help="sweep the guidance and compare the automatic pick")
    scenes.add_argument("--min-sim-image", type=float, help="keeps the picture (--auto; default: 0.45)")
    add_model_options(scenes)
    add_guidance_options(scenes)
    _add_limits(actions)


def _add_limits(actions: Any) -> None:
    limits = add_command(actions, "limits", _limits, "zoom, move, colour one of two, swap: how often they fail")
    limits.add_argument("--n", type=int, default=40, help="edits of each kind (default: 40)")
    limits.add_argument("--seed", type=int, default=7)
    limits.add_argument("--out", type=local_path, required=True, help="the run's folder")
    add_model_options(limits)
    add_guidance_options(limits)


def _limits(options: argparse.Namespace) -> None:
    from ..evaluate.run_folder import check_run, save_run, text_of, write_rows
    from ..images import save_image
    from ..scenes.limits import CASES, limit_rows, limit_sheet, limit_table, make_cases, outcomes

    count = check_positive("--n", options.n)
    check_run(options.out, "limits")
    editor, found = load_editor(options), []
    with progress_bar(len(CASES) * count, "edits") as bar:
        for kind in CASES:
            cases = make_cases(kind, count, seed=options.seed)
            found += outcomes(editor, cases, seed=options.seed, config=edit_config(options))
            bar(len(found), len(CASES) * count)
    table = limit_table(found)
    save_image(limit_sheet(found), options.out / "limits.png")
    rows = limit_rows(found)
    write_rows(options.out, rows)
    told = {**{name: value for name, value in rows[0].items() if name not in OF_ONE_EDIT}, "n": count}
    told["seed"] = options.seed
    save_run(options.out, "limits", settings=told, tables=[table], pictures={"limits.png": "Before, after, asked"})
    sys.stdout.write(text_of(table) + "\n")


def _scenes(options: argparse.Namespace) -> None:
    from ..clip.similarity import ClipSimilarity
    from ..evaluate.measure import measure
    from ..evaluate.methods import RoundTrip
    from ..evaluate.run_folder import check_run, claim_run
    from ..scenes.exam import scene_samples

    kind = "scenes --auto" if options.auto else "scenes"
    _refuse_ignored(options)
    samples, judge = scene_samples(check_positive("--n", options.n), seed=options.seed)
    check_run(options.out, kind)
    editor = load_editor(options)
    method = _method(options, editor)
    limit = RoundTrip(editor.model, name=editor.name)
    clip = ClipSimilarity.load(options.clip, device=editor.model.device)
    settings = {"resolution": editor.model.spec.resolution, "batch": options.batch, "folder": options.out}
    claim_run(options.out, kind)
    with progress_bar(0, "pictures") as bar:
        rows = measure(samples, [method, limit], clip, judge=judge, hooks=Hooks(on_progress=bar), **settings)
    edits, limits = ([row for row in rows if row["curve"] == name] for name in ("edit", "autoencoder"))
    if options.auto:
        _finish_auto(options, method, edits)
    else:
        _finish(options, samples, method, edits, limits)


def _refuse_ignored(options: argparse.Namespace) -> None:
    if options.auto and (options.text_cfg is not None or options.image_cfg is not None):
        raise ConfigError("--auto sweeps a grid of its own; leave --text-cfg and --image-cfg out")
    if options.min_sim_image is not None and not options.auto:
        raise ConfigError("--min-sim-image is the automatic pick's; add --auto, or leave it out")
    check_positive("--worst", options.worst)


def _method(options: argparse.Namespace, editor: Any) -> Any:
    from ..evaluate.methods import InstructionEdit
    from ..evaluate.sweep import AUTO_IMAGE_CFGS, AUTO_TEXT_CFGS

    spec = editor.model.spec
    return InstructionEdit(
        editor,
        label="edit",
        text_cfgs=AUTO_TEXT_CFGS if options.auto else [_or(options.text_cfg, spec.text_cfg)],
        image_cfgs=AUTO_IMAGE_CFGS if options.auto else [_or(options.image_cfg, spec.image_cfg)],
        steps=options.steps,
        sampler=options.sampler,
        schedule=options.schedule,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _finish(options: argparse.Namespace, samples: Any, method: Any, rows: Any, limits: Any) -> None:
    from ..evaluate.run_folder import save_run, text_of
    from ..scenes.limits import confusions, side_effects, summary

    tables = [summary(rows, limits), side_effects(rows), *confusions(rows)]
    _save_worst(options, samples, method, rows)
    told = method.describe(method.settings[0]) | {"n": options.n, "seed": options.seed, "clip": options.clip}
    save_run(options.out, "scenes", settings=told, tables=tables, pictures={"worst.png": "The worst edits"})
    sys.stdout.write("\n\n".join(text_of(table) for table in tables) + "\n")


def _save_worst(options: argparse.Namespace, samples: Any, method: Any, rows: Any) -> None:
    """Make the worst once more, since rows hold no pictures, and show them."""
    from ..evaluate.samples import batches
    from ..images import save_image
    from ..scenes.limits import edit_sheet, worst

    shown = worst(rows, options.worst)
    by_key = {sample.key: sample for sample in samples}
    chosen = [by_key[row["sample"]] for row in shown]
    pictures = []
    for group in batches(chosen, options.batch, method.model.spec.resolution):
        pictures += method.make(group, method.prepare(group), method.settings[0]).edited
    save_image(edit_sheet(chosen, pictures, shown), options.out / "worst.png")


def _finish_auto(options: argparse.Namespace, method: Any, rows: Any) -> None:
    from ..evaluate.run_folder import save_run, text_of
    from ..evaluate.statistics import AutoPick
    from ..scenes.exam import SCENES_MIN_IMAGE, choices
    from ..scenes.limits import compare

    auto = AutoPick(min_sim_image=_or(options.min_sim_image, SCENES_MIN_IMAGE))
    table = compare(choices(rows, auto, (7.5, 1.5)))
    told = method.describe(method.settings[0]) | {"n": options.n, "seed": options.seed, "clip": options.clip}
    swept = sorted({f"{s.values['text_cfg']:g} / {s.values['image_cfg']:g}" for s in method.settings})
    told = {name: value for name, value in told.items() if name not in ("text_cfg", "image_cfg")}
    save_run(options.out, "scenes --auto", settings={**told, "s_T / s_I": ", ".join(swept)}, tables=[table])
    sys.stdout.write(text_of(table) + "\n")
