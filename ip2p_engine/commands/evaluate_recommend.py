"""``ip2p evaluate recommend``, ``areas`` and ``session``: measured where the truth is known."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..hooks import Hooks
from .options import (
    Several,
    add_command,
    add_guidance_options,
    add_model_options,
    check_positive,
    edit_config,
    load_editor,
    local_path,
    progress_bar,
    stop_signals,
)

__all__ = ["add_areas", "add_recommend", "add_sessions", "name_checkpoint", "open_world"]

SCENES, PHOTOS = "scenes", "photos"
BY_WORLD = "embedded; of photos embedded-photos"
EVERYWHERE = "all"
PICTURES_HELP = "of photos: gathered photographs (ip2p photos gather)"


def add_recommend(actions: Any) -> None:
    parser = add_command(
        actions, "recommend", _recommend, "the settings a checkpoint wants: right edits, kept pixels, evaluations"
    )
    _add_world(parser)
    parser.add_argument("--text-cfg", type=float, action=Several, nargs="+", metavar="S_T", help="default: 2 4 7.5")
    parser.add_argument("--image-cfg", type=float, action=Several, nargs="+", metavar="S_I", help="default: 1 1.2 1.5")
    parser.add_argument("--steps", type=int, action=Several, nargs="+", help="default: 1 2 4 10 20")
    parser.add_argument("--sampler", action=Several, nargs="+", metavar="NAME", help="default: euler_ancestral")
    parser.add_argument(
        "--guidance-interval",
        action=Several,
        nargs="+",
        metavar="LOW:HIGH",
        help="noise levels within which guidance acts; all: everywhere (default: all)",
    )
    parser.add_argument(
        "--decibels", type=float, default=0.5, help="kept less than this below the best counts as equal (default: 0.5)"
    )
    parser.add_argument(
        "--write", action="store_true", help="write the pick into the checkpoint, as its recommendation"
    )
    add_model_options(parser, checkpoint=None, usual=BY_WORLD)


def add_areas(actions: Any) -> None:
    parser = add_command(actions, "areas", _areas, "what ip2p edit --mask auto finds and is worth, by kind of edit")
    _add_world(parser)
    add_guidance_options(parser)
    add_model_options(parser, checkpoint=None, usual=BY_WORLD)


def add_sessions(actions: Any) -> None:
    parser = add_command(actions, "session", _sessions, "several turns: SR@k, all turns so far right, and why not")
    parser.add_argument("data", nargs="?", choices=(SCENES, PHOTOS), default=SCENES, help="default: scenes")
    parser.add_argument("--n", type=int, default=200, help="sessions (default: 200)")
    parser.add_argument("--turns", type=int, default=5, help="of each (default: 5)")
    parser.add_argument("--seed", type=int, default=7, help="chooses the sessions and their noise")
    parser.add_argument("--pictures", type=local_path, help=PICTURES_HELP)
    parser.add_argument(
        "--handed-on",
        choices=("pictures", "latents", "held", "true"),
        action=Several,
        nargs="+",
        default=["pictures", "held"],
        help="8-bit pictures, latents, latents with what has not changed set back, or every turn from the true picture "
        "(default: pictures held)",
    )
    parser.add_argument("--phrasings", choices=("held-out", "train"), default="held-out", help="default: held-out")
    parser.add_argument("--out", type=local_path, required=True, help="the run's folder; the same again goes on")
    add_guidance_options(parser)
    add_model_options(parser, checkpoint=None, usual=BY_WORLD)


def name_checkpoint(options: argparse.Namespace) -> None:
    """Each world has its own embedded model: the other one's edits of it are none."""
    options.checkpoint = options.checkpoint or ("embedded-photos" if options.data == PHOTOS else "embedded")


def _sessions(options: argparse.Namespace) -> None:
    from ..evaluate.run_folder import check_run, claim_run, save_run, text_of
    from ..evaluate.sessions import cause_table, session_rows, session_table
    from .evaluate_data import told

    check_run(options.out, "session")
    name_checkpoint(options)
    count, turns = check_positive("--n", options.n), check_positive("--turns", options.turns)
    walks = _walks(options, count, turns)
    editor, rows, config = load_editor(options), list[dict[str, Any]](), edit_config(options)
    claim_run(options.out, "session")
    with stop_signals() as should_stop, progress_bar(0, "sessions") as bar:
        for way in dict.fromkeys(options.handed_on):
            hooks = Hooks(on_progress=bar, should_stop=should_stop)
            rows += session_rows(editor, walks, way, config, folder=options.out, hooks=hooks)
    tables = [session_table(rows), cause_table(rows)]
    save_run(options.out, "session", settings=told(options), tables=tables)
    sys.stdout.write("\n\n".join(map(text_of, tables)) + "\n")


def _walks(options: argparse.Namespace, count: int, turns: int) -> Sequence[Any]:
    how: Any = {"seed": options.seed, "held_out": options.phrasings == "held-out"}
    if options.data == SCENES:
        from ..scenes.sessions import sample_sessions

        return sample_sessions(count, turns, **how)
    from ..photos.sessions import sample_photo_sessions

    return sample_photo_sessions(_pool(options), count, turns, **how)


def _pool(options: argparse.Namespace) -> Any:
    from ..photos.pictures import PhotoPool
    from ..photos.world import VIEW

    return PhotoPool(options.pictures or Path("runs/photos/pictures"), ("held-out",), smallest=VIEW)


def _add_world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", default=SCENES, help="scenes (default), photos, or a data set of pairs")
    parser.add_argument("--n", type=int, default=200, help="edits (default: 200)")
    parser.add_argument("--seed", type=int, default=7, help="chooses the edits and their noise")
    parser.add_argument("--pictures", type=local_path, help=PICTURES_HELP)
    parser.add_argument("--batch", type=int, default=16, help="pictures at once (default: 16)")
    parser.add_argument("--out", type=local_path, required=True, help="the run's folder; the same again goes on")


def _areas(options: argparse.Namespace) -> None:
    from ..evaluate.areas import area_tables, measure_areas
    from ..evaluate.run_folder import check_run, claim_run, save_run, text_of
    from .evaluate_data import told

    check_run(options.out, "areas")
    name_checkpoint(options)
    samples, judge = open_world(options)
    editor = load_editor(options)
    claim_run(options.out, "areas")
    with stop_signals() as should_stop, progress_bar(0, "edits") as bar:
        hooks = Hooks(on_progress=bar, should_stop=should_stop)
        how: Any = {"folder": options.out, "batch": options.batch, "hooks": hooks}
        rows = measure_areas(editor, samples, judge, edit_config(options), **how)
    tables = area_tables(rows)
    save_run(options.out, "areas", settings=told(options), tables=tables)
    sys.stdout.write("\n\n".join(map(text_of, tables)) + "\n")


def open_world(options: argparse.Namespace) -> tuple[Sequence[Any], Any]:
    """(samples, who judges them) of scenes, photographs or a data set's pairs."""
    count = check_positive("--n", options.n)
    if options.data == SCENES:
        from ..scenes.exam import scene_samples

        samples, judge = scene_samples(count, seed=options.seed)
        return samples, judge.truths
    if options.data == PHOTOS:
        from ..photos.exam import photo_samples
        from ..photos.world import sample_edits

        return photo_samples(
            sample_edits(_pool(options), count, seed=options.seed, held_out=True), seed=options.seed + 1
        )
    from ..evaluate.recommend import truth_judge
    from ..evaluate.samples import StoreSamples

    return StoreSamples(options.data, split="all", count=count, seed=options.seed + 1), truth_judge


def _recommend(options: argparse.Namespace) -> None:
    from ..checkpoint.card import check_card
    from ..evaluate.recommend import Grid, check_decibels, measure_settings, recommend
    from ..evaluate.run_folder import check_run, claim_run

    name_checkpoint(options)
    names = ("text_cfg", "image_cfg", "steps", "sampler")
    given = {name: getattr(options, name) for name in names if getattr(options, name)}
    if options.guidance_interval:
        given["guidance_interval"] = [_bounds(text) for text in options.guidance_interval]
    grid = Grid(**given)
    check_decibels(options.decibels)
    if options.write:
        check_card(options.checkpoint)
    check_run(options.out, "recommend")
    samples, judge = open_world(options)
    editor = load_editor(options)
    claim_run(options.out, "recommend")
    with stop_signals() as should_stop, progress_bar(0, "edits") as bar:
        hooks = Hooks(on_progress=bar, should_stop=should_stop)
        how: Any = {"folder": options.out, "batch": options.batch, "hooks": hooks}
        found = recommend(measure_settings(editor, samples, judge, grid, **how), decibels=options.decibels)
    _report(options, found)


def _bounds(text: str) -> tuple[float, float] | None:
    if text == EVERYWHERE:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError as error:
        raise ConfigError(f"--guidance-interval got {text!r}; give LOW:HIGH, such as 0.3:5, or {EVERYWHERE}") from error
    return low, high


def _report(options: argparse.Namespace, found: Any) -> None:
    from ..checkpoint.card import write_card
    from ..evaluate.recommend import settings_plot
    from ..evaluate.run_folder import save_run, text_of
    from ..plots import save_figure
    from .evaluate_data import told

    save_figure(
        settings_plot(found, f"{Path(options.checkpoint).name} on {Path(options.data).name}"),
        options.out / "settings.png",
    )
    tables = [found.table(), found.kinds_table()]
    figures = {"picked": found.setting, "settings": [vars(one) for one in found.measured], "front": found.front}
    pictures = {"settings.png": "Right edits over kept pixels"}
    save_run(options.out, "recommend", settings=told(options), tables=tables, pictures=pictures, figures=figures)
    said = [*map(text_of, tables), f"picked: {options_of(found.setting)}"]
    if options.write:
        said.append(f"{write_card(options.checkpoint, found.card())}: recommends this from now on")
    sys.stdout.write("\n\n".join(said) + "\n")


def options_of(setting: dict[str, Any]) -> str:
    """A setting as options of ``ip2p edit``."""
    given = {name: setting[name] for name in ("text_cfg", "image_cfg", "steps", "sampler")}
    said = [
        f"--{name.replace('_', '-')} {value:{'' if isinstance(value, str) else 'g'}}" for name, value in given.items()
    ]
    if (bounds := setting["guidance_interval"]) is not None:
        said.append("--guidance-interval {:g} {:g}".format(*bounds))
    return " ".join(said)
