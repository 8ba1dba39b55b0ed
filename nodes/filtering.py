"""IP2P CLIP Filter: which pairs are worth training on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from comfy_execution.graph import ExecutionBlocker

from ..ip2p_engine.errors import ConfigError
from ..ip2p_engine.images import open_image
from . import _host
from ._api import Pairs, advanced, io, schema
from ._pair_store import PairView

CLIPS = ["embedded", "ViT-L-14/openai", "ViT-B-32/openai"]
IMAGES = ("original_image", "edited_image")
AT_ONCE = 32
MEASURES = ("sim_image", "sim_direction", "sim_0", "sim_1")
LOWER = "Lower it if nothing is kept."


class ClipFilter(io.ComfyNode):
    """Thresholds on the four CLIP numbers, then the best few."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_ClipFilter",
            display_name="IP2P CLIP Filter",
            group="data",
            description=(
                "Scores pairs by CLIP as the paper does (section 3.1.2) and keeps the best that reach every threshold. "
                "If none does, the pictures' outputs are silent and the scores say why."
            ),
            search_aliases=["directional similarity", "CLIP score", "filter dataset", "aesthetic filter"],
            inputs=_inputs(),
            outputs=[
                Pairs.Output(display_name="pairs", tooltip="The kept pairs with their scores, best first."),
                io.Image.Output(
                    display_name="before", is_output_list=True, tooltip="Their pictures before the edit, one by one."
                ),
                io.Image.Output(display_name="after", is_output_list=True, tooltip="Their pictures after it."),
                io.String.Output(
                    display_name="scores", tooltip="Every candidate's four numbers, and what each threshold rejects."
                ),
            ],
        )

    @classmethod
    def execute(cls, pairs: Sequence[Any], clip_model: str, keep: int, **floors: float) -> io.NodeOutput:
        kept, table = filter_pairs(pairs, clip_model, keep, floors)
        if not kept:
            return io.NodeOutput((), ExecutionBlocker(None), ExecutionBlocker(None), table)
        return io.NodeOutput(kept, *_host.images_of(kept), table)


def filter_pairs(
    pairs: Sequence[Any], clip_model: str, keep: int, floors: dict[str, float]
) -> tuple[Sequence[Any], str]:
    """(the kept PairRecords with their scores, best first; a table of all scores)."""
    from ..ip2p_engine.clip.filter import FilterConfig, filter_candidates

    scores, seeds = score(pairs, clip_model)
    result = filter_candidates(scores, FilterConfig(keep=keep, **floors))
    lines = [f"{'kept':<5} {'seed':>8} " + " ".join(f"{name:>13}" for name in MEASURES)]
    for number, (one, seed) in enumerate(zip(scores, seeds, strict=True)):
        mark, shown = "*" if number in result.kept else "", "-" if seed is None else seed
        lines.append(f"{mark:<5} {shown:>8} " + " ".join(f"{getattr(one, name):>13.3f}" for name in MEASURES))
    table = _host.preformatted("\n".join([*lines, "", result.report.text(histograms=False)]))
    return PairView(pairs, result.kept, [vars(scores[number]) for number in result.kept]), table


def score(pairs: Sequence[Any], clip_model: str) -> tuple[list[Any], list[int | None]]:
    """(the four cosines of each pair, their seeds), some pairs at a time, by a CLIP that ComfyUI may send away."""
    scores: list[Any] = []
    seeds: list[int | None] = []
    if not len(pairs):
        return scores, seeds
    show = _host.progress(len(pairs))
    with scorer(clip_model) as similarity:
        for start in range(0, len(pairs), AT_ONCE):
            show(start, len(pairs))
            rows = pairs[start : start + AT_ONCE]
            pictures = ([open_image(getattr(row, name)) for row in rows] for name in IMAGES)
            captions = ([row.original_prompt for row in rows], [row.edited_prompt for row in rows])
            scores += similarity.score(*pictures, *captions)
            seeds += [row.seed for row in rows]
    return scores, seeds


@contextmanager
def scorer(name: str) -> Iterator[Any]:
    """A CLIP on its device; between uses ComfyUI may send it away. Raises ConfigError for one that is not offered."""
    if name not in CLIPS:
        raise ConfigError(f"clip_model is {name!r}; choose one of {', '.join(CLIPS)}")
    similarity, patcher = _loaded(name)
    _host.load(patcher)
    yield similarity


@lru_cache(maxsize=1)
def _loaded(name: str) -> tuple[Any, Any]:
    from ..ip2p_engine.clip.similarity import ClipSimilarity

    similarity = ClipSimilarity.load(name)
    return similarity, _host.hold(similarity.network)


def _inputs() -> list[io.Input]:
    return [
        Pairs.Input("pairs", tooltip="Candidates of one caption pair, or any pairs with captions."),
        io.Combo.Input(
            "clip_model",
            options=CLIPS,
            default="embedded",
            tooltip=(
                "embedded knows scenes only, with its own scale of scores. ViT-L-14/openai is the paper's; open_clip "
                "downloads it once (0.9 GB)."
            ),
        ),
        io.Int.Input(
            "keep",
            default=4,
            min=1,
            max=1000,
            tooltip="The most pairs to keep, best direction first; the paper's are 4 of 100. Lower it for variety.",
        ),
        _floor("min_sim_image", 0.7, "How much the two pictures must be alike", "Lower it for large edits."),
        _floor(
            "min_sim_direction",
            0.2,
            "How well the change of the picture must fit the change of the caption",
            "Raise it for clearer edits, and fewer.",
        ),
        advanced(_floor("min_sim_0", 0.2, "How well the picture before must fit its caption", LOWER)),
        advanced(_floor("min_sim_1", 0.2, "How well the picture after must fit its caption", LOWER)),
    ]


def _floor(name: str, default: float, meaning: str, advice: str) -> io.Input:
    """A threshold on a cosine."""
    tooltip = f"{meaning}, -1 to 1; {default} is the paper's. {advice}"
    return io.Float.Input(name, default=default, min=-1.0, max=1.0, step=0.01, tooltip=tooltip)
