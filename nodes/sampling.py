"""Editing: the guider for stock samplers, and the whole edit in one node."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ip2p_engine.diffusion.area import set_back
from ..ip2p_engine.diffusion.sampling import SAMPLERS
from ..ip2p_engine.diffusion.schedule import SCHEDULES
from ..ip2p_engine.images import fit
from ._api import advanced, io, schema
from ._editor import NativeEditor
from ._guiders import DualGuider
from ._host import show_finished, teller, to_image, to_pictures
from ._models import is_embedded, require_edit, spec_of
from .conditioning import (
    MASK_TOOLTIP,
    SIZE_TOOLTIP,
    SIZES,
    as_mask,
    bounded,
    encode,
    in_frame,
    mask_latent,
    mask_pictures,
    noise_mask,
)

TEXT_CFG, IMAGE_CFG, STEPS = 7.5, 1.5, 20
# ComfyUI's seeds have 64 bits; a generator of the engine takes 63.
MAX_SEED = 2**63 - 1
DETAIL_TOOLTIP = (
    "Take the original's detail where the edit only tones it (make it night), at full size; what is new stays as the "
    "model made it. Switch it on for large photographs; it takes a second a megapixel."
)


def guidance_inputs() -> list[io.Input]:
    """The two scales, the same wherever they appear."""
    return [
        io.Float.Input(
            "text_cfg",
            default=TEXT_CFG,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip=(
                "s_T: how strongly to follow the instruction, usually 3 to 12. Raise it if the edit does too little. "
                "7.5 is the paper's; 4 for the embedded model, 5 for SDXL and CosXL."
            ),
        ),
        io.Float.Input(
            "image_cfg",
            default=IMAGE_CFG,
            min=0.0,
            max=10.0,
            step=0.05,
            tooltip=(
                "s_I: how strongly to stay close to the picture, usually 1 to 2. Raise it if the picture is lost, "
                "lower it if nothing changes. 1 saves a third of the time."
            ),
        ),
    ]


def sampling_inputs() -> list[io.Input]:
    """How to sample, and at what size."""
    return [
        io.Int.Input(
            "steps",
            default=STEPS,
            min=1,
            max=1000,
            tooltip="Sampling steps. 20 is quick, 50 cleaner, 100 the paper's.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=MAX_SEED,
            control_after_generate=True,
            tooltip="The picture depends on it alone. Change it for another try with the same settings.",
        ),
        advanced(
            io.Combo.Input(
                "sampler",
                options=list(SAMPLERS),
                default="euler_ancestral",
                tooltip="euler_ancestral is the paper's; dpmpp_2m settles in fewer steps; ddim, euler add no noise.",
            )
        ),
        advanced(
            io.Combo.Input(
                "schedule",
                options=list(SCHEDULES),
                default="model",
                tooltip="Noise levels. model: as in the paper's code. karras, exponential: more steps at low ones.",
            )
        ),
        advanced(io.Combo.Input("size", options=SIZES, default="paper", tooltip=SIZE_TOOLTIP)),
        advanced(
            io.Int.Input(
                "resolution",
                default=0,
                min=0,
                max=4096,
                step=64,
                tooltip="The long side that size = paper aims at, in pixels. 0 takes the checkpoint's own.",
            )
        ),
    ]


def guidance_options() -> list[io.Input]:
    """How the scales act; all as without them."""
    level = {"default": 0.0, "min": 0.0, "max": 1000.0, "step": 0.1, "optional": True}
    return [
        advanced(
            io.Float.Input(
                "guidance_low",
                **level,
                tooltip=(
                    "The lowest noise level (sigma) that is guided, where guidance_high is set; the rest costs a third."
                ),
            )
        ),
        advanced(
            io.Float.Input(
                "guidance_high",
                **level,
                tooltip=(
                    "The highest noise level (sigma) that is guided, such as 5. Saves time and colours. 0 guides all."
                ),
            )
        ),
        advanced(
            io.Float.Input(
                "rescale",
                default=0.0,
                min=0.0,
                max=1.0,
                step=0.05,
                optional=True,
                tooltip=(
                    "Against burnt colours, 0 to 1: how far results get back the spread they have without guidance."
                ),
            )
        ),
        advanced(
            io.Boolean.Input(
                "apg",
                default=False,
                optional=True,
                tooltip="Adaptive projected guidance: high scales do not burn. Changes what the scales mean a little.",
            )
        ),
    ]


def area_inputs() -> list[io.Input]:
    """Where an edit may act, and what it goes on from."""
    return [
        advanced(
            io.Boolean.Input(
                "find_area",
                default=False,
                optional=True,
                tooltip="Change only where the instruction may act, found from the network; area shows where.",
            )
        ),
        io.Latent.Input(
            "last_latent",
            optional=True,
            tooltip="For a second instruction: the latent of the Edit Image before this one, which image belongs to.",
        ),
    ]


def options_of(guidance_low: float, guidance_high: float, rescale: float, apg: bool) -> dict[str, Any]:
    """The inputs as DualGuider's options."""
    interval = (guidance_low, guidance_high) if guidance_high else None
    return {"interval": interval, "rescale": rescale, "apg": apg}


class Guider(io.ComfyNode):
    """The paper's dual guidance for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_Guider",
            display_name="IP2P Guider",
            group="sampling",
            description=(
                "The paper's guidance by instruction and picture, for Sampler Custom Advanced with any sampler and "
                "scheduler. Makes the condition without a picture itself, so there is nothing to wire wrongly."
            ),
            search_aliases=["DualCFGGuider", "dual cfg", "image cfg", "InstructPix2Pix guidance"],
            inputs=[
                io.Model.Input("model", tooltip="An InstructPix2Pix, with LoRAs if you like."),
                io.Conditioning.Input("positive", tooltip="The instruction with the picture, from IP2P Encode Image."),
                io.Conditioning.Input("negative", tooltip="No instruction, with the picture, from IP2P Encode Image."),
                *guidance_inputs(),
                *guidance_options(),
            ],
            outputs=[
                io.Guider.Output(display_name="guider", tooltip="For the guider input of Sampler Custom Advanced.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        negative: list,
        text_cfg: float = TEXT_CFG,
        image_cfg: float = IMAGE_CFG,
        guidance_low: float = 0.0,
        guidance_high: float = 0.0,
        rescale: float = 0.0,
        apg: bool = False,
    ) -> io.NodeOutput:
        guider = DualGuider(model, text_cfg, image_cfg, **options_of(guidance_low, guidance_high, rescale, apg))
        guider.set_conds(positive, negative)
        return io.NodeOutput(guider)


class Sample(io.ComfyNode):
    """The whole edit in one node, the same picture as ``ip2p edit`` gives."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_Sample",
            essentials_category="Image Tools",
            display_name="IP2P Edit Image",
            group="sampling",
            description=(
                "Edits a picture by an instruction and gives its size back. The same settings and seed give the same "
                "picture as the command ip2p edit. Other samplers: IP2P Encode Image, IP2P Guider and core's samplers."
            ),
            search_aliases=[
                "InstructPix2Pix",
                "edit image",
                "instruct",
                "edit photo",
                "image editing",
                "img2img instruction",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An InstructPix2Pix, with LoRAs if you like."),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoder."),
                io.Vae.Input("vae", tooltip="The checkpoint's autoencoder."),
                io.Image.Input(
                    "image", tooltip="The picture to edit, or a batch; every picture is edited with the same seed."
                ),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default="make it snow",
                    tooltip='What to do, as one would say it: "make it snow". Empty gives the picture back.',
                ),
                *guidance_inputs(),
                *sampling_inputs(),
                io.Mask.Input("mask", optional=True, tooltip=MASK_TOOLTIP),
                io.Boolean.Input("detail", default=False, optional=True, tooltip=DETAIL_TOOLTIP),
                *guidance_options(),
                *area_inputs(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The edited picture in the size of the original."),
                io.Latent.Output(display_name="latent", tooltip="Its latent at the working size, for further steps."),
                io.Mask.Output(
                    display_name="area", tooltip="Where the picture could change, as large as the original."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        image: Tensor,
        instruction: str,
        text_cfg: float = TEXT_CFG,
        image_cfg: float = IMAGE_CFG,
        steps: int = STEPS,
        seed: int = 0,
        sampler: str = "euler_ancestral",
        schedule: str = "model",
        size: str = "paper",
        resolution: int = 0,
        mask: Tensor | None = None,
        detail: bool = False,
        guidance_low: float = 0.0,
        guidance_high: float = 0.0,
        rescale: float = 0.0,
        apg: bool = False,
        find_area: bool = False,
        last_latent: dict | None = None,
    ) -> io.NodeOutput:
        require_edit(model)
        longer = resolution or spec_of(model).resolution
        source = encode(vae, image, size, longer) if last_latent is None else last_latent["samples"]
        masks = mask_pictures(mask, image)
        if not instruction.strip():
            return io.NodeOutput(image, {"samples": source}, as_mask(masks, image))
        editor = NativeEditor(
            model=model,
            clip=clip,
            text_cfg=text_cfg,
            image_cfg=image_cfg,
            steps=steps,
            sampler=sampler,
            schedule=schedule,
            guidance=options_of(guidance_low, guidance_high, rescale, apg),
        )
        texts = [instruction] * len(source)
        told = mask_latent(vae, masks, source) if spec_of(model).takes_mask else None
        free = noise_mask(masks, source) if masks else None
        found = editor.areas(source, texts) if find_area else None
        latent = editor.latents(source, texts, [seed] * len(source), free, told)
        if found is not None:
            latent, found = set_back(latent, source, found.to(latent))
            masks = bounded(masks, found, image)
        edited = in_frame(vae.decode(latent), image, masks, vae.decode(source) if detail else None)
        show_finished(edited[:1], steps * len(source), steps * len(source))
        told = _notice(model, image, source, cls.hidden.unique_id)
        shown = {"ui": {"text": told}} if told else {}
        return io.NodeOutput(to_image(edited), {"samples": latent}, as_mask(masks, image), **shown)


def _notice(model: Any, image: Tensor, like: Tensor, node: str | None) -> list[str]:
    """What the embedded model says of pictures that are none of its world, shown in the node; else nothing."""
    if not is_embedded(model):
        return []
    from ..ip2p_engine.scenes.notice import NOTICE, is_scene

    size = (8 * like.shape[-1], 8 * like.shape[-2])
    if all(is_scene(fit(picture, size)) for picture in to_pictures(image)):
        return []
    teller(node)(NOTICE)
    return [NOTICE]


class AdjustScales(io.ComfyNode):
    """A checkpoint's recommended scales, stronger or weaker."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        factor = {"default": 1.0, "min": 0.0, "max": 4.0, "step": 0.05}
        return schema(
            node_id="IP2P_AdjustScales",
            display_name="IP2P Adjust Scales",
            group="sampling",
            description=(
                "Makes the scales that a checkpoint recommends stronger or weaker: 1 leaves them as they are, so a "
                "workflow fits another checkpoint without typing numbers."
            ),
            search_aliases=["edit strength", "guidance strength", "text cfg", "image cfg strength"],
            inputs=[
                io.Float.Input(
                    "text_cfg", default=TEXT_CFG, min=0.0, max=30.0, step=0.1, tooltip="From IP2P Load Checkpoint."
                ),
                io.Float.Input(
                    "image_cfg", default=IMAGE_CFG, min=0.0, max=10.0, step=0.05, tooltip="From IP2P Load Checkpoint."
                ),
                io.Float.Input(
                    "follow_instruction", **factor, tooltip="Times text_cfg. Raise it if the edit does too little."
                ),
                io.Float.Input("keep_picture", **factor, tooltip="Times image_cfg. Raise it if the picture is lost."),
            ],
            outputs=[
                io.Float.Output(display_name="text_cfg", tooltip="For a text_cfg input."),
                io.Float.Output(display_name="image_cfg", tooltip="For an image_cfg input."),
            ],
        )

    @classmethod
    def execute(
        cls, text_cfg: float, image_cfg: float, follow_instruction: float = 1.0, keep_picture: float = 1.0
    ) -> io.NodeOutput:
        return io.NodeOutput(text_cfg * follow_instruction, image_cfg * keep_picture)
