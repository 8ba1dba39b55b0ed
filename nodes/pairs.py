"""Pairs of pictures from pairs of captions: Prompt-to-Prompt as the paper makes its data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ip2p_engine.diffusion.sampling import SAMPLERS
from ..ip2p_engine.errors import ConfigError, DatasetError
from ..ip2p_engine.images import open_image
from . import _host, _pair_store
from ._api import Pairs, advanced, io, schema

MODES = ["self", "replace", "refine"]


class GeneratePairs(io.ComfyNode):
    """Candidates of one caption pair."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_GeneratePairs",
            display_name="IP2P Generate Pairs",
            group="data",
            description=(
                "Makes pairs of pictures, before and after an edit, from two captions and a text-to-image model "
                "(Prompt-to-Prompt, section 3.1 of the paper). Finished batches lie in output/ip2p_pairs, so Cancel, a "
                "crash and another Run lose none."
            ),
            search_aliases=["Prompt-to-Prompt", "prompt to prompt", "p2p", "attention sharing", "training pairs"],
            inputs=_generate_inputs(),
            outputs=[
                Pairs.Output(display_name="pairs", tooltip="The candidates with their captions, for IP2P CLIP Filter."),
                io.Image.Output(display_name="before", tooltip="The pictures of the caption, one a candidate."),
                io.Image.Output(display_name="after", tooltip="The pictures of the edited caption, in the same order."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **settings: Any) -> int:
        return _pair_store.count_lost()

    @classmethod
    def execute(cls, model: Any, clip: Any, vae: Any, **settings: Any) -> io.NodeOutput:
        pairs = generate(model, clip, vae, **settings)
        before, after = [], []
        for pair in pairs:
            before.append(open_image(pair.original_image))
            after.append(open_image(pair.edited_image))
        return io.NodeOutput(pairs, _host.to_image(before), _host.to_image(after))


class PairImages(io.ComfyNode):
    """Pairs out of any pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_PairImages",
            display_name="IP2P Pair Images",
            group="data",
            description="Makes pairs of your own pictures: the n-th before with the n-th after.",
            search_aliases=["own pairs", "image pair", "pair dataset", "before after pair"],
            inputs=[
                io.Image.Input("before", tooltip="Pictures before the edit."),
                io.Image.Input("after", tooltip="Pictures after it, as many and as large."),
                io.String.Input(
                    "caption", default="", multiline=True, tooltip="What the pictures before show; for CLIP Filter."
                ),
                io.String.Input("edited_caption", default="", multiline=True, tooltip="What the pictures after show."),
                io.String.Input("instruction", default="", multiline=True, tooltip="What was asked for; for training."),
            ],
            outputs=[Pairs.Output(display_name="pairs", tooltip="The pairs with their texts.")],
        )

    @classmethod
    def execute(
        cls, before: Tensor, after: Tensor, caption: str = "", edited_caption: str = "", instruction: str = ""
    ) -> io.NodeOutput:
        if before.shape[:3] != after.shape[:3]:
            raise ConfigError(
                f"before is {tuple(before.shape[:3])} and after {tuple(after.shape[:3])} (pictures, height, width); "
                "give as many pictures of one size"
            )
        both = zip(_host.to_pictures(before), _host.to_pictures(after), strict=True)
        texts: dict[str, Any] = {
            "original_prompt": caption,
            "edited_prompt": edited_caption,
            "edit_prompt": instruction,
        }
        return io.NodeOutput(tuple(_pair_store.make_record(*pictures, **texts) for pictures in both))


def generate(
    model: Any,
    clip: Any,
    vae: Any,
    *,
    caption: str,
    edited_caption: str,
    candidates: int,
    seed: int,
    steps: int,
    p2p_min: float,
    p2p_max: float,
    cfg_min: float,
    cfg_max: float,
    mode: str,
    local_blend: bool,
    sampler: str,
    resolution: int,
    batch: int,
    instruction: str = "",
) -> Sequence[Any]:
    """PairRecords with the seeds seed, seed + 1, ...; those that are on disk already are not made again."""
    from ..ip2p_engine.p2p.alignment import changed_tokens
    from ..ip2p_engine.p2p.generator import PairConfig, PairJob
    from ._identity import identity
    from ._models import spec_of
    from ._pair_maker import NativePairs, require_text_to_image

    require_text_to_image(model)
    if local_blend and not any(marks.any() for marks in changed_tokens(caption, edited_caption)):
        raise ConfigError("local_blend keeps what the changed words leave, and no word changes; switch it off")
    side = resolution or spec_of(model).resolution
    config = PairConfig(
        steps=steps,
        sampler=sampler,
        size=(side, side),
        p2p_range=(p2p_min, p2p_max),
        cfg_range=(cfg_min, cfg_max),
        mode=mode,
        local_blend=local_blend,
    )
    jobs = [PairJob(caption=caption, edited_caption=edited_caption, seed=seed + n) for n in range(candidates)]
    maker = NativePairs(model=model, clip=clip, vae=vae, config=config)
    return _pair_store.stored_pairs(maker, jobs, batch, instruction, identity(model, clip, vae))


def require_pairs(pairs: Sequence[Any]) -> None:
    """Raises DatasetError if there is no pair."""
    if not len(pairs):
        raise DatasetError("there is no pair; if IP2P CLIP Filter kept none, its scores say which threshold to lower")


def _generate_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="A text-to-image model with 4 channels: Stable Diffusion 1.5, or embedded-sd."),
        io.Clip.Input("clip", tooltip="Its text encoder."),
        io.Vae.Input("vae", tooltip="Its autoencoder."),
        io.String.Input(
            "caption", multiline=True, default="a large red heart on a sky background", tooltip="The picture before."
        ),
        io.String.Input(
            "edited_caption",
            multiline=True,
            default="a large blue heart on a sky background",
            tooltip="The picture after; the fewer words differ, the more stays.",
        ),
        io.String.Input(
            "instruction",
            multiline=True,
            default="make the heart blue",
            tooltip="What leads from one to the other; it is only written into the pairs.",
        ),
        io.Int.Input(
            "candidates",
            default=8,
            min=1,
            max=1000,
            tooltip="How many pairs to make. The paper makes 100 and keeps at most 4.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**48,
            control_after_generate=True,
            tooltip="Of the first candidate; the others follow it. A pair depends on its seed alone.",
        ),
        io.Int.Input(
            "steps", default=50, min=1, max=1000, tooltip="Sampling steps. 20 is quick, 50 cleaner, 100 the paper's."
        ),
        *_range_inputs(),
        *_further_inputs(),
    ]


def _range_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "p2p_min",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip=(
                "p is drawn between p2p_min and p2p_max: the share of the steps in which the picture after looks where "
                "the picture before looks. Higher keeps more and changes less; 0 to 0 gives two unrelated pictures."
            ),
        ),
        io.Float.Input(
            "p2p_max",
            default=0.9,
            min=0.0,
            max=1.1,
            step=0.05,
            tooltip="The upper end of p; 0.9 is the paper's. Lower it if the edit does not show.",
        ),
        io.Float.Input(
            "cfg_min",
            default=7.5,
            min=0.0,
            max=30.0,
            step=0.5,
            tooltip=(
                "The guidance scale is drawn between cfg_min and cfg_max. 7.5 to 15 is the paper's; 3 to 6 for the "
                "embedded model."
            ),
        ),
        io.Float.Input(
            "cfg_max",
            default=15.0,
            min=0.0,
            max=30.0,
            step=0.5,
            tooltip="The upper end of the guidance scale; 15 is the paper's. Lower it if colours burn.",
        ),
    ]


def _further_inputs() -> list[io.Input]:
    return [
        advanced(
            io.Combo.Input(
                "mode",
                options=MODES,
                default="self",
                tooltip=(
                    "self: share self-attention, the paper's. replace: also swap words of equal number. refine: also "
                    "add words (Hertz et al. 2022)."
                ),
            )
        ),
        advanced(
            io.Boolean.Input(
                "local_blend",
                default=False,
                tooltip="Keep the picture where the changed words do not look. Switch it on for small objects.",
            )
        ),
        advanced(
            io.Combo.Input(
                "sampler",
                options=list(SAMPLERS),
                default="euler_ancestral",
                tooltip="euler_ancestral is the paper's; others for comparison.",
            )
        ),
        advanced(
            io.Int.Input(
                "resolution",
                default=0,
                min=0,
                max=2048,
                step=64,
                tooltip="Side of the pictures in pixels. 0 takes the checkpoint's own (512 for SD1.5), which is best.",
            )
        ),
        advanced(
            io.Int.Input(
                "batch",
                default=4,
                min=1,
                max=64,
                tooltip="Pairs made at once, 1 to 64; lower it if memory runs out. Changes no pair.",
            )
        ),
    ]
