"""``ip2p pairs``: from caption pairs to a filtered data set."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from ..errors import ConfigError
from ..hooks import QUIET, Hooks
from .options import (
    DTYPES,
    SAMPLER_NAMES,
    SCHEDULE_NAMES,
    Several,
    add_command,
    add_reading_options,
    check_positive,
    local_path,
    progress_bar,
    reading_of,
    stop_signals,
    torch_dtype,
)

__all__ = [
    "add",
    "add_filter",
    "add_thresholds",
    "thresholds",
]

MODES = ("self", "replace", "refine")
MEASURES = ("sim_0", "sim_1", "sim_direction", "sim_image")
THRESHOLDS = ("keep", *(f"min_{measure}" for measure in MEASURES))


def add(commands: Any) -> None:
    parser = add_command(commands, "pairs", _pairs, "make pairs of pictures from captions and filter them by CLIP")
    parser.add_argument("edits", metavar="EDITS", help="a .jsonl or .parquet file, as ip2p captions writes it")
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="FOLDER", help="the data set; an unfinished one goes on"
    )
    _add_model(parser)
    _add_candidates(parser)
    _add_prompt_to_prompt(parser)
    _add_filter(parser)
    _add_work(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_filter(commands)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument("--checkpoint", default="embedded-sd", help="a text-to-image model (default: embedded-sd)")
    group.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a file that has both")
    group.add_argument("--base", help="a checkpoint that gives a lone UNet its autoencoder and text encoder")
    group.add_argument("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    group.add_argument("--dtype", choices=DTYPES, help="default: float16 on CUDA, else float32")


def _add_candidates(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the candidates")
    group.add_argument("--candidates", type=int, default=100, metavar="N", help="of each caption pair (default: 100)")
    group.add_argument("--seed", type=int, default=0, help="of the whole run (default: 0)")
    group.add_argument("--steps", type=int, help="default: 100, the paper's; embedded-sd: 8")
    group.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLER_NAMES)} (embedded-sd: ddim)")
    group.add_argument("--schedule", metavar="NAME", help=", ".join(SCHEDULE_NAMES))
    group.add_argument("--size", metavar="WxH", help="default: the checkpoint's square")
    group.add_argument(
        "--picture-format", default="png", help="png, jpeg (quality 100) or webp (lossless); default: png"
    )


def _add_prompt_to_prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Prompt-to-Prompt")
    group.add_argument("--p", type=float, nargs="+", metavar="P", help="p, or its range (0.1 0.9)")
    group.add_argument("--cfg", type=float, nargs="+", metavar="W", help="w, or its range (7.5 15; embedded-sd: 2 4)")
    group.add_argument(
        "--edited-prompt-start",
        type=float,
        metavar="F",
        help="the fraction of the steps without it (0; embedded-sd: 0.35)",
    )
    group.add_argument("--mode", help=f"{', '.join(MODES)} (default: self, the paper's)")
    group.add_argument("--cross-steps", type=float, metavar="F", help="of replace and refine (0.8)")
    group.add_argument(
        "--reweight", action=Several, nargs="+", metavar="WORD=FACTOR", help="attention to words of the edited caption"
    )
    group.add_argument("--local-blend", action="store_true", help="change only where the changed words look")
    group.add_argument("--blend-words", nargs=2, metavar=("BEFORE", "AFTER"), help="default: the words that differ")
    group.add_argument("--blend-start", type=float, metavar="F", help="the fraction of the steps (0.2)")


def _add_filter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the CLIP filter")
    group.add_argument("--filter", choices=("inline", "none"), default="inline", help="none keeps every candidate")
    group.add_argument("--clip", help="embedded, a folder, or architecture/weights of open_clip (ViT-L-14/openai)")
    add_thresholds(group)
    group.add_argument("--early-reject", action="store_true", help="drop candidates whose preview is doomed")
    group.add_argument("--early-at", type=float, metavar="F", help="look after this part of the steps (0.5)")
    group.add_argument("--early-margin", type=float, metavar="M", help="below a threshold by so much (0.1)")


def add_thresholds(parser: Any) -> None:
    """--keep and the four thresholds; those not given are the CLIP's own, or the paper's."""
    parser.add_argument("--keep", type=int, metavar="K", help="the best of each caption pair (default: 4)")
    for measure in MEASURES:
        flag = f"--min-{measure.replace('_', '-')}"
        parser.add_argument(flag, type=float, metavar="C", help="a cosine (default: the paper's, or the CLIP's own)")


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the work")
    group.add_argument("--batch-pairs", type=int, metavar="B", help="pairs in one batch (default: as many as fit)")
    group.add_argument("--partition", default="0/1", metavar="I/N", help="make every N-th part, from the I-th (0/1)")
    group.add_argument(
        "--rows-per-shard", type=int, default=1000, metavar="R", help="pairs in one file (default: 1000)"
    )
    group.add_argument("--cluster", metavar="ADDRESS", help="make them on a Ray cluster; local starts one here")
    group.add_argument(
        "--save-seconds", type=float, default=300.0, metavar="S", help="unfinished shards (default: 300)"
    )


def _pairs(options: argparse.Namespace) -> None:
    _refuse_early(options)
    from ..captions.edits import read_edits
    from ..factory.run import make_pairs

    edits, work = read_edits(options.edits), _work(options)
    with _workers(options) as workers, stop_signals() as should_stop, progress_bar(0, "pairs") as bar:
        report = make_pairs(
            edits, options.out, workers, work=work, hooks=Hooks(on_progress=bar, should_stop=should_stop)
        )
    sys.stdout.write((json.dumps(report.to_dict()) if options.json else report.as_text()) + "\n")


def _workers(options: argparse.Namespace) -> Any:
    from ..factory.workers import WorkerPlan, local_workers, ray_workers

    pairs = _pair_config(options)
    _refuse_idle(options, pairs.mode)
    clip = options.clip or ("embedded" if options.checkpoint == "embedded-sd" else None)
    plan = WorkerPlan(
        checkpoint=options.checkpoint,
        options={"weights": options.weights, "base": options.base},
        device=options.device,
        dtype=torch_dtype(options),
        pairs=pairs,
        factory=_factory_config(options, clip),
    )
    return ray_workers(plan, options.cluster) if options.cluster else local_workers(plan)


def _refuse_idle(options: argparse.Namespace, mode: str) -> None:
    """An option that would change nothing is a mistake."""
    for holds, needed, names in (
        (mode != "self", "--mode replace or refine", ("cross_steps",)),
        (options.local_blend, "--local-blend", ("blend_words", "blend_start")),
        (options.filter == "inline", "--filter inline", THRESHOLDS),
        (options.early_reject, "--early-reject", ("early_at", "early_margin")),
    ):
        for name in names:
            if not holds and getattr(options, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} has no effect without {needed}; add that, or leave {flag} out")


def _refuse_early(options: argparse.Namespace) -> None:
    """What can be told without the networks, before torch is imported: that takes seconds."""
    partition(options.partition)
    _size(options.size)
    for name, given in (("--p", _range("--p", options.p)), ("--cfg", _range("--cfg", options.cfg))):
        if given and not 0 <= given[0] <= given[1]:
            raise ConfigError(f"{name} is {given[0]} to {given[1]}; give the lower and the upper end, of at least 0")
    if options.mode not in (None, *MODES):
        raise ConfigError(f"mode {options.mode!r} is unknown; choose one of {', '.join(MODES)}")
    if _factors(options.reweight) and options.mode in (None, "self"):
        raise ConfigError("mode 'self' does not edit cross-attention, so reweight has no effect; use mode 'refine'")
    for name in ("candidates", "steps", "rows_per_shard", "batch_pairs", "keep"):
        if getattr(options, name) is not None:
            check_positive(f"--{name.replace('_', '-')}", getattr(options, name))
    for name, known in (("sampler", SAMPLER_NAMES), ("schedule", SCHEDULE_NAMES)):
        if getattr(options, name) not in (None, *known):
            raise ConfigError(f"{name} {getattr(options, name)!r} is unknown; choose one of {', '.join(known)}")
    _refuse_idle(options, options.mode or "self")


def _work(options: argparse.Namespace) -> Any:
    from ..factory.run import Work

    return Work(
        batch_pairs=options.batch_pairs,
        partition=partition(options.partition),
        save_seconds=options.save_seconds,
        rows_per_shard=options.rows_per_shard,
    )


def partition(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"; raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if not found or not int(found[1]) < int(found[2]):
        raise ConfigError(f"--partition is {text!r}; give I/N with 0 <= I < N, such as 0/4")
    return int(found[1]), int(found[2])


def thresholds(options: argparse.Namespace, clip: str) -> Any:
    """The filter that is asked for; what is not given is the CLIP's own, or the paper's."""
    from ..clip.filter import FilterConfig
    from ..clip.similarity import own_thresholds

    given = {name: getattr(options, name) for name in THRESHOLDS if getattr(options, name) is not None}
    return FilterConfig(**{**own_thresholds(clip), **given})


def _factory_config(options: argparse.Namespace, clip: str | None) -> Any:
    from ..clip.similarity import DEFAULT_CLIP
    from ..config import with_overrides
    from ..factory.maker import EarlyReject, FactoryConfig

    name = clip or DEFAULT_CLIP
    looks = {"at": options.early_at, "margin": options.early_margin}
    early = with_overrides(EarlyReject(), looks) if options.early_reject else None
    return FactoryConfig(
        candidates=options.candidates,
        seed=options.seed,
        clip=name,
        filter=thresholds(options, name) if options.filter == "inline" else None,
        early_reject=early,
        picture_format=options.picture_format,
    )


def _pair_config(options: argparse.Namespace) -> Any:
    """What is given, over what suits the embedded model, or else over the paper's settings."""
    from ..config import with_overrides
    from ..p2p.generator import PairConfig
    from ..scenes.grammar import EMBEDDED_PAIRS

    names = ("steps", "sampler", "schedule", "edited_prompt_start", "mode", "cross_steps", "blend_start", "batch_pairs")
    given = {name: getattr(options, name) for name in names}
    given |= {"p2p_range": _range("--p", options.p), "cfg_range": _range("--cfg", options.cfg)}
    given |= {"size": _size(options.size), "reweight": _factors(options.reweight)}
    given |= {
        "local_blend": options.local_blend or None,
        "blend_words": options.blend_words and tuple(options.blend_words),
    }
    return with_overrides(PairConfig(**(EMBEDDED_PAIRS if options.checkpoint == "embedded-sd" else {})), given)


def _range(name: str, values: list[float] | None) -> tuple[float, float] | None:
    if values is None:
        return None
    if len(values) > 2:
        raise ConfigError(f"{name} got {len(values)} numbers; give one, or the lower and the upper end")
    return values[0], values[-1]


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if not found:
        raise ConfigError(f"--size is {text!r}; give width x height in pixels, such as 512x512")
    return int(found[1]), int(found[2])


def _factors(given: list[str] | None) -> dict[str, float] | None:
    if not given:
        return None
    parts = [re.fullmatch(r"(.+)=(-?\d+(?:\.\d+)?)", text) for text in given]
    if not all(parts):
        raise ConfigError(f"--reweight is {' '.join(given)}; give words and factors, such as snow=2 red=0.5")
    return {found[1]: float(found[2]) for found in parts if found}


def add_filter(commands: Any) -> None:
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
    parser.add_argument(
        "--min-score",
        action=Several,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="of other judges, such as viescore_overall=6 (ip2p dataset judge)",
    )
    parser.add_argument("--device", help="of the new scores: cpu, cuda, mps (default: a GPU if there is one)")
    add_thresholds(parser)
    parser.add_argument(
        "--plot", type=local_path, metavar="FILE", help="the histograms as a picture (.png, .svg, .pdf)"
    )
    add_reading_options(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _filter(options: argparse.Namespace) -> None:
    from ..data.reading import open_pairs
    from ..factory.refilter import clip_of, refilter

    reading = reading_of(options)
    pairs = open_pairs(options.store, reading, hooks=QUIET)
    config, least = thresholds(options, options.clip or clip_of(pairs)), _least(options.min_score)
    with progress_bar(len(pairs), "pairs") as bar:
        scores = _rescored(pairs, options, bar) if options.clip else None
        more = {"scores": scores, "clip": options.clip, "least": least, "hooks": Hooks(on_progress=bar)}
        report = refilter(options.store, options.out, config, reading, **more)
    if options.plot:
        from ..clip.filter import plot_report

        plot_report(report.filtered, options.plot)
    sys.stdout.write((json.dumps(report.to_dict()) if options.json else report.as_text()) + "\n")


def _least(given: list[str]) -> dict[str, float]:
    parts = [re.fullmatch(r"([^=]+)=(-?\d+(?:\.\d+)?)", text) for text in given]
    if not all(parts):
        raise ConfigError(f"--min-score is {' '.join(given)}; give names and numbers, such as viescore_overall=6")
    return {found[1]: float(found[2]) for found in parts if found}


def _rescored(pairs: Any, options: argparse.Namespace, bar: Any) -> Any:
    from ..clip.similarity import ClipSimilarity
    from ..edit import usable_device
    from ..factory.refilter import rescored

    clip = ClipSimilarity.load(options.clip, device=usable_device(options.device))
    return rescored(pairs, clip, hooks=Hooks(on_progress=bar))
