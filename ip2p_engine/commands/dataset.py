"""``ip2p dataset``: what one does with a data set as a whole."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from typing import Any

from ..hooks import Hooks
from .evaluate_judge import add_pairs_judge
from .options import (
    Several,
    add_command,
    add_reading_options,
    in_options,
    local_path,
    progress_bar,
    reading_of,
    stop_signals,
)

__all__ = ["add"]

SHOWN, PAIRS_OF_A_SHEET = 20, 200
Fault = tuple[str, int | None]
"""What is wrong, and how many rows are lost where it is a file's; 0 where nobody knows."""


def add(commands: Any) -> None:
    actions = commands.add_parser("dataset", help="look into a data set, verify it, bring it in and out")
    group = actions.add_subparsers(metavar="ACTION", required=True)
    for name, run, summary in (
        ("info", _info, "say what is in a data set"),
        ("verify", _verify, "read everything and list the faults; exit code 1 if there are any"),
        ("import", _import, "bring in a data set of any known layout, or a part of it"),
        ("export", _export, "write it as the original repository, other trainers, or the hub have it"),
        ("sheet", _sheet, "write a contact sheet, one HTML file to sort and filter in any browser"),
        ("copy", _copy, "bring it to shared storage (s3://bucket/pairs ...) or back, or up to date there"),
    ):
        parser = add_command(group, name, run, summary)
        foreign = name in ("import", "copy")
        parser.add_argument("source" if foreign else "store", metavar="SOURCE" if foreign else "STORE")
        if name == "copy":
            parser.add_argument("target", metavar="TARGET", help="a folder, or any address that fsspec writes")
        if name in ("import", "export", "sheet"):
            parser.add_argument("--out", type=local_path, required=True, help="where to write")
        if name == "sheet":
            parser.add_argument("--side", type=int, default=256, help="pixels of a shown picture (default: 256)")
        if name == "export":
            choices = ("original", "folders", "musubi", "hub")
            parser.add_argument("--layout", choices=choices, default="original", help="default: original")
        if name in ("info", "import", "export", "verify", "sheet"):
            add_reading_options(parser)
        if name == "import":
            parser.add_argument("--download", action="store_true", help="fetch pictures that are given as addresses")
            parser.add_argument("--licence", metavar="NAME", help="of all pairs (default: as rows or data card say)")
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
    checked = add_command(group, "doctor", _doctor, "measure what will hurt training, pair by pair; leave it out")
    checked.add_argument("store", metavar="STORE")
    checked.add_argument("--out", type=local_path, metavar="FILE", help="an HTML page of the pairs with a fault")
    checked.add_argument("--drop", type=local_path, metavar="FOLDER", help="write the pairs without one as a store")
    checked.add_argument("--faults", action=Several, nargs="+", help="that --drop leaves out (default: all but split)")
    checked.add_argument(
        "--checkpoint", metavar="NAME", help="also look for wrong instructions and swapped pictures, by an edit model"
    )
    checked.add_argument("--base", metavar="NAME", help="a checkpoint that completes a lone UNet")
    checked.add_argument("--device", metavar="NAME", help="of the edit model (default: a GPU if there is one)")
    checked.add_argument("--clip", metavar="NAME", help="the same by a CLIP and the set's other pairs, less surely")
    add_reading_options(checked)
    checked.add_argument("--json", action="store_true", help="print the result as JSON")
    seen = add_command(group, "describe", _describe, "captions by a vision model that sees both pictures")
    seen.add_argument("store", metavar="STORE")
    seen.add_argument("--out", type=local_path, required=True, help="where to write")
    seen.add_argument("--base-url", required=True, metavar="URL", help="a server of OpenAI's protocol")
    seen.add_argument("--model", required=True, help="the name under which the server knows it")
    seen.add_argument("--key-variable", default="OPENAI_API_KEY", help="the environment variable with the key")
    seen.add_argument("--concurrency", type=int, default=4, help="requests at one time (default: 4)")
    seen.add_argument("--instructions", action="store_true", help="replace the instructions too")
    add_reading_options(seen)
    seen.add_argument("--json", action="store_true", help="print the result as JSON")
    add_pairs_judge(group)
    merge = add_command(group, "merge", _merge, "make one store of several data sets")
    merge.add_argument("sources", metavar="SOURCE", nargs="+", help="of any known layout")
    merge.add_argument("--out", type=local_path, required=True, help="where to write")
    merge.add_argument("--json", action="store_true", help="print the result as JSON")
    layouts = add_command(group, "layouts", _layouts, "print the layouts that are known, by their columns")
    layouts.add_argument("--json", action="store_true", help="print the result as JSON")


def _info(options: argparse.Namespace) -> None:
    from ..data.tools import info

    found = info(options.store, reading_of(options))
    _print(options, asdict(found), found.as_text())


def _verify(options: argparse.Namespace) -> int:
    from ..data.tools import verify

    with progress_bar(0, "pairs") as bar:
        verdict = verify(options.store, reading_of(options), hooks=Hooks(on_progress=bar))
    state = "sound" if verdict.sound else f"{len(verdict.faults)} faults"
    lines = [f"{options.store}: {verdict.pairs:,} pairs, {state}, content {verdict.digest[:16]}", *verdict.faults]
    _print(options, {**asdict(verdict), "sound": verdict.sound}, "\n".join(lines))
    return 0 if verdict.sound else 1


def _import(options: argparse.Namespace) -> int:
    from ..data.tools import import_dataset

    faults: list[Fault] = []
    with progress_bar(0, "pairs") as bar:
        count = import_dataset(options.source, options.out, reading_of(options), hooks=_noting(faults, bar))
    return _say(options, {"new": count}, f"{count:,} new pairs", faults)


def _layouts(options: argparse.Namespace) -> None:
    from ..data.layouts import LAYOUTS, table_text

    _print(options, [asdict(layout) for layout in LAYOUTS], table_text())


def _export(options: argparse.Namespace) -> int:
    from ..data.tools import export_dataset

    faults: list[Fault] = []
    reading = reading_of(options)
    with progress_bar(0, "pairs") as bar:
        hooks = _noting(faults, bar)
        count = export_dataset(options.store, options.out, reading, layout=options.layout, hooks=hooks)
    return _say(options, {"pairs": count}, f"{count:,} pairs", faults) or int(bool(faults))


def _doctor(options: argparse.Namespace) -> None:
    from ..data.doctor import doctor, drop, show

    reading, kept, editor = reading_of(options), None, None
    if options.checkpoint:
        from ..edit import InstructPix2Pix

        editor = InstructPix2Pix.load(options.checkpoint, base=options.base, device=options.device)
    with progress_bar(0, "pairs") as bar:
        found = doctor(options.store, reading, clip=options.clip, editor=editor, hooks=Hooks(on_progress=bar))
    if options.out:
        show(options.store, options.out, found, reading)
    if options.drop:
        kept = drop(options.store, options.drop, found, reading, faults=options.faults or ())
    told = in_options(found.as_text(), options) + (f"\n{options.drop}: {kept:,} new pairs" if options.drop else "")
    _print(options, {**asdict(found), "counts": found.counts(), "new": kept}, told)


def _describe(options: argparse.Namespace) -> int:
    from ..captions.server import SeeingSource, ServerConfig
    from ..data.describe import describe

    names = ("base_url", "model", "key_variable", "concurrency")
    source = SeeingSource(ServerConfig(**{name: getattr(options, name) for name in names}))
    faults: list[Fault] = []
    with stop_signals() as should_stop, progress_bar(0, "pairs") as bar:
        hooks = _noting(faults, bar, should_stop)
        reading, instructions = reading_of(options), options.instructions
        found = describe(options.store, options.out, source, reading, instructions=instructions, hooks=hooks)
    return _say(options, {"new": found.new}, f"{found.new:,} new pairs", faults)


def _merge(options: argparse.Namespace) -> int:
    from ..data.tools import merge_datasets

    faults: list[Fault] = []
    with progress_bar(0, "pairs") as bar:
        count = merge_datasets(options.sources, options.out, hooks=_noting(faults, bar))
    return _say(options, {"new": count}, f"{count:,} new pairs", faults)


def _sheet(options: argparse.Namespace) -> None:
    from ..data.sheet import sheet

    reading = replace(reading_of(options), limit=None)  # of a sheet it says how many are shown
    count = sheet(options.store, options.out, reading, limit=options.limit or PAIRS_OF_A_SHEET, side=options.side)
    _print(options, {"out": str(options.out), "pairs": count}, f"{options.out}: {count:,} pairs")


def _copy(options: argparse.Namespace) -> None:
    from ..data.copy import copy_dataset
    from ..files import public_name

    with progress_bar(0, "files") as bar:
        report = copy_dataset(options.source, options.target, hooks=Hooks(on_progress=bar))
    megabytes = f"{report.files:,} files ({report.bytes / 2**20:,.1f} MiB) copied, {report.present:,} were there"
    _print(options, asdict(report), f"{public_name(options.target)}: {megabytes}")


def _noting(faults: list[Fault], bar: Any = None, should_stop: Any = None) -> Hooks:
    """What is left out goes into ``faults``; an error itself would keep its row in memory."""

    def note(_: int, error: Exception) -> None:
        faults.append((str(error), getattr(error, "rows", None)))

    return Hooks(on_progress=bar, should_stop=should_stop, on_error=note)


def _say(options: argparse.Namespace, counts: dict[str, int], text: str, faults: list[Fault]) -> int:
    """What was written and what was left out; the code is 1 where it was more than single rows: a file, or its rest."""
    from ..progress import write_note

    shown = [in_options(said, options) for said, _ in faults[:SHOWN]]
    for said in shown:
        write_note(f"ip2p: left out: {said}")
    lost = [rows for _, rows in faults if rows is not None]
    count = sum(lost) + len(faults) - len(lost)
    told = {"left_out": count, "faults": shown, "broken_files": len(lost)}
    left = f", {count:,} {'row' if count == 1 else 'rows'} left out" if count else ""
    if lost:
        known = f"{sum(lost):,} rows" if all(lost) else f"{sum(lost):,} rows and more" if any(lost) else "the rows"
        files = f"{len(lost)} file{'s' if len(lost) > 1 else ''}"
        write_note(f"ip2p: {known} of {files} are lost; restore the files to have them")
    _print(options, {"out": str(options.out), **counts, **told}, f"{options.out}: {text}{left}")
    return int(bool(lost))


def _print(options: argparse.Namespace, values: Any, text: str) -> None:
    sys.stdout.write((json.dumps(values) if options.json else text) + "\n")
