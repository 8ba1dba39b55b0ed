"""What an early look at unfinished candidates would save, and what it would cost.

    python benchmarks/early_reject.py                                               # the embedded models, on scenes
    python benchmarks/early_reject.py --edits edits.jsonl --checkpoint SD --clip ViT-L-14/openai --steps 100

Every candidate is made to the end and looked at on the way. For each moment and each margin a line says how many
candidates the look would have dropped, what share of the network's work that saves, and how many of the pairs that
the filter keeps would have been lost (or replaced by the next best).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ip2p_engine.captions.edits import CaptionEdit, Request, read_edits
from ip2p_engine.clip.filter import FilterConfig, PairScores, filter_candidates
from ip2p_engine.clip.similarity import ClipSimilarity, own_thresholds
from ip2p_engine.config import with_overrides
from ip2p_engine.factory.maker import candidate_seed
from ip2p_engine.hooks import Hooks
from ip2p_engine.p2p.generator import PairConfig, PairGenerator, PairJob
from ip2p_engine.scenes.grammar import EMBEDDED_PAIRS, GrammarSource, sample_captions

MOMENTS, MARGINS = (0.25, 0.5, 0.75), (0.0, 0.05, 0.1, 0.2, 0.3)
MEASURES = {"image": ("sim_image",), "image and direction": ("sim_image", "sim_direction")}


def main() -> None:
    options = parse()
    settings = PairConfig(**(EMBEDDED_PAIRS if options.checkpoint == "embedded-sd" else {}))
    given = {"steps": options.steps, "batch_pairs": options.batch_pairs}
    generator = PairGenerator.load(options.checkpoint, with_overrides(settings, given), device=options.device)
    scorer = ClipSimilarity.load(options.clip, device=generator.model.device)
    config = FilterConfig(**own_thresholds(options.clip))
    captions = []
    for number, edit in enumerate(edits(options)):
        captions.append(looked_at(generator, scorer, number, edit, options.candidates))
        print(f"{number + 1} caption pairs", file=sys.stderr)
    for line in table(captions, config):
        print(json.dumps(line))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=Path, help="default: edits of scenes")
    parser.add_argument("--captions", type=int, default=16, help="caption pairs (default: 16)")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--checkpoint", default="embedded-sd")
    parser.add_argument("--clip", default="embedded")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="default: 100, with embedded-sd 8")
    parser.add_argument("--batch-pairs", type=int, default=16)
    return parser.parse_args()


def edits(options: argparse.Namespace) -> list[CaptionEdit]:
    if options.edits:
        return read_edits(options.edits)[: options.captions]
    requests = [Request.make(caption, 0, 0) for caption in sample_captions(2 * options.captions, seed=0)]
    found = [answer for answer in GrammarSource().propose(requests) if isinstance(answer, CaptionEdit)]
    return found[: options.captions]


Look = dict[float, list[PairScores]]


def looked_at(
    generator: PairGenerator, scorer: ClipSimilarity, number: int, edit: CaptionEdit, count: int
) -> tuple[list[PairScores], Look]:
    """(final scores, previews' scores at each moment) of a caption pair's candidates."""
    jobs = [
        PairJob(caption=edit.caption, edited_caption=edit.edited_caption, seed=candidate_seed(0, number, n))
        for n in range(count)
    ]
    steps = {max(1, round(moment * generator.config.steps)) - 1: moment for moment in MOMENTS}
    seen: Look = {moment: [] for moment in MOMENTS}

    def scores(pictures) -> list[PairScores]:
        texts = ([edit.caption] * len(pictures), [edit.edited_caption] * len(pictures))
        return scorer.score([a for a, _ in pictures], [b for _, b in pictures], *texts)

    def on_step(step, _, x, sigma, denoised) -> None:
        if step in steps:
            seen[steps[step]] += scores(generator.pictures(denoised.unflatten(0, (-1, 2))))

    final = []
    for batch in generator.batches(jobs, hooks=Hooks(on_step=on_step)):
        final += scores([(pair.source_image, pair.edited_image) for pair in batch])
    return final, seen


def table(captions: list[tuple[list[PairScores], Look]], config: FilterConfig) -> Iterator[dict]:
    total = sum(len(final) for final, _ in captions)
    for moment in MOMENTS:
        for name, measures in MEASURES.items():
            for margin in MARGINS:
                dropped = kept = lost = 0
                for final, seen in captions:
                    floors = {measure: config.floors()[measure] - margin for measure in measures}
                    out = {n for n, one in enumerate(seen[moment]) if any(getattr(one, m) < floors[m] for m in floors)}
                    best = filter_candidates(final, config).kept
                    dropped, kept, lost = dropped + len(out), kept + len(best), lost + len(out & set(best))
                yield {
                    "at": moment,
                    "by": name,
                    "margin": margin,
                    "candidates": total,
                    "dropped": round(dropped / total, 3),
                    "work_saved": round(dropped / total * (1 - moment), 3),
                    "kept": kept,
                    "kept_lost": lost,
                }


if __name__ == "__main__":
    main()
