"""``ip2p filter``: other thresholds for a data set, without generating again."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .options import add_command, local_path, progress_bar
from .pairs import add_thresholds, thresholds

__all__ = ["add"]


def add(commands: Any) -> None:
    parser = add_command(
        commands, "filter", _filter, "filter a data set again and say which threshold rejected how many"
    )
    parser.add_argument("store", metavar="STORE", help="the folder of a data set")
    parser.add_argument(
        "--out", type=local_path, metavar="STORE", help="write what is kept there (default: only report)"
    )
    parser.add_argument(
        "--clip", help="score the pictures anew: embedded, a folder, or open_clip's architecture/weights"
    )
    parser.add_argument("--device", help="of the new scores: cpu, cuda, mps (default: a GPU if there is one)")
    add_thresholds(parser)
    parser.add_argument(
        "--plot", type=local_path, metavar="FILE", help="the histograms as a picture (.png, .svg, .pdf)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _filter(options: argparse.Namespace) -> None:
    from ..data.store import PairStore
    from ..factory.refilter import clip_of, refilter

    pairs = PairStore(options.store)
    config = thresholds(options, options.clip or clip_of(pairs))
    with progress_bar(len(pairs), "pairs") as bar:
        scores = _rescored(pairs, options, bar) if options.clip else None
        report = refilter(options.store, options.out, config, scores=scores, clip=options.clip, on_progress=bar)
    if options.plot:
        from ..clip.filter_plot import plot_report

        plot_report(report.filtered, options.plot)
    sys.stdout.write((json.dumps(report.to_dict()) if options.json else report.as_text()) + "\n")


def _rescored(pairs: Any, options: argparse.Namespace, bar: Any) -> Any:
    from ..clip.similarity import ClipSimilarity
    from ..edit import usable_device
    from ..factory.refilter import rescored

    return rescored(pairs, ClipSimilarity.load(options.clip, device=usable_device(options.device)), on_progress=bar)
