"""``ip2p evaluate scenes``: edits judged where the truth is known."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import ConfigError
from .options import (
    add_command,
    add_guidance_options,
    add_model_options,
    check_positive,
    edit_config,
    load_editor,
    local_path,
    progress_bar,
)

__all__ = ["add"]

OF_ONE_EDIT = ("kind", "case", "came_out", "instruction", "seed")


def add(actions: Any) -> None:
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
    from ..evaluate.baselines import RoundTrip
    from ..evaluate.measure import measure
    from ..evaluate.run_folder import check_run, claim_run
    from ..scenes.samples import scene_samples

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
        rows = measure(samples, [method, limit], clip, judge=judge, on_progress=bar, **settings)
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
    from ..scenes.findings import confusions, side_effects, summary

    tables = [summary(rows, limits), side_effects(rows), *confusions(rows)]
    _save_worst(options, samples, method, rows)
    told = method.describe(method.settings[0]) | {"n": options.n, "seed": options.seed, "clip": options.clip}
    save_run(options.out, "scenes", settings=told, tables=tables, pictures={"worst.png": "The worst edits"})
    sys.stdout.write("\n\n".join(text_of(table) for table in tables) + "\n")


def _save_worst(options: argparse.Namespace, samples: Any, method: Any, rows: Any) -> None:
    """Make the worst once more, since rows hold no pictures, and show them."""
    from ..evaluate.samples import batches
    from ..images import save_image
    from ..scenes.findings import worst, worst_sheet

    shown = worst(rows, options.worst)
    by_key = {sample.key: sample for sample in samples}
    chosen = [by_key[row["sample"]] for row in shown]
    pictures = []
    for group in batches(chosen, options.batch, method.model.spec.resolution):
        pictures += method.make(group, method.prepare(group), method.settings[0]).edited
    save_image(worst_sheet(chosen, pictures, shown), options.out / "worst.png")


def _finish_auto(options: argparse.Namespace, method: Any, rows: Any) -> None:
    from ..evaluate.pareto import AutoPick
    from ..evaluate.run_folder import save_run, text_of
    from ..scenes.auto import SCENES_MIN_IMAGE, choices
    from ..scenes.findings import compare

    auto = AutoPick(min_sim_image=_or(options.min_sim_image, SCENES_MIN_IMAGE))
    table = compare(choices(rows, auto, (7.5, 1.5)))
    told = method.describe(method.settings[0]) | {"n": options.n, "seed": options.seed, "clip": options.clip}
    swept = sorted({f"{s.values['text_cfg']:g} / {s.values['image_cfg']:g}" for s in method.settings})
    told = {name: value for name, value in told.items() if name not in ("text_cfg", "image_cfg")}
    save_run(options.out, "scenes --auto", settings={**told, "s_T / s_I": ", ".join(swept)}, tables=[table])
    sys.stdout.write(text_of(table) + "\n")
