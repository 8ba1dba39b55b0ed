"""The shipped workflows. Each describes itself to a Graph and returns the node whose picture is the thumbnail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from workflow_graph import Graph, Node

FULL = """
**For photographs** put `instruct-pix2pix-00-22000.safetensors` into `ComfyUI/models/checkpoints`
([download, 7.7 GB](https://huggingface.co/timbrooks/instruct-pix2pix/tree/main)), press R, choose it in *IP2P Load
Checkpoint*, and replace *IP2P Render Scene* by *Load Image*. Then text_cfg 7.5 and image_cfg 1.5 are a good start.
"""
EMBEDDED_SD = "This runs as it is, with the embedded text-to-image model, which knows only scenes."
CLIP_CONFIG = Path(__file__).parents[1] / "ip2p_engine/scenes/embedded/clip/config.json"
# As docs/pairs.md recommends for the embedded model.
EMBEDDED_PAIRS = {"steps": 8, "sampler": "ddim", "cfg_min": 2.0, "cfg_max": 4.0}
EMBEDDED_THRESHOLDS = json.loads(CLIP_CONFIG.read_text())["thresholds"]
IP2P_FILE = """`instruct-pix2pix-00-22000.safetensors` in `ComfyUI/models/checkpoints`
([download, 7.7 GB](https://huggingface.co/timbrooks/instruct-pix2pix/tree/main))"""
SD_FILE = """Stable Diffusion 1.5 in `ComfyUI/models/checkpoints`
([download, 4.3 GB](https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5))"""
WIDE, TABLE, WIDE_TABLE = 420, 660, 980
EMBEDDED = "This runs as it is, with the embedded miniature, which knows only scenes: one shape on a plain ground."


def edit_an_image(graph: Graph) -> Node:
    graph.note(
        f"""
# Edit an image
Write what to do, press Run. {EMBEDDED}

Too little happens: raise **text_cfg**, or lower **image_cfg**. The picture is lost: the other way round.
Another try: change the **seed**.
{FULL}""",
    )
    loader = graph.add(1, "IP2P_LoadCheckpoint")
    scene = graph.add(1, "IP2P_RenderScene")
    graph.add(2, "PreviewAny", title="What the checkpoint is", source=loader["report"], width=WIDE, lines=13)
    edit = graph.add(
        2,
        "IP2P_Sample",
        model=loader["model"],
        clip=loader["clip"],
        vae=loader["vae"],
        image=scene["image"],
        instruction="make it snow",
        text_cfg=4.0,
        seed=1,
        width=WIDE,
    )
    return graph.add(3, "SaveImage", images=edit["image"], filename_prefix="ip2p/edit")


def edit_with_stock_samplers(graph: Graph) -> Node:
    graph.note(
        f"""
# Edit with core's samplers
*IP2P Guider* gives the paper's guidance to *SamplerCustomAdvanced*, so any sampler, scheduler, LoRA or
ControlNet works. The condition without a picture is made inside; wire both outputs of *IP2P Encode Image*.

{EMBEDDED} Set **resolution** to 512 for SD1.5 checkpoints, 768 for SDXL, 1024 for CosXL-Edit.
{FULL}""",
    )
    loader = graph.add(1, "IP2P_LoadCheckpoint")
    scene = graph.add(1, "IP2P_RenderScene", shape="circle", colour="yellow", background="mint", place="top left")
    positive = graph.add(
        2, "CLIPTextEncode", title="Instruction", clip=loader["clip"], text="turn the circle into a star"
    )
    negative = graph.add(2, "CLIPTextEncode", title="No instruction (leave empty)", clip=loader["clip"], text="")
    encode = graph.add(
        2,
        "IP2P_EncodeImage",
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        vae=loader["vae"],
        image=scene["image"],
        resolution=64,
    )
    noise = graph.add(3, "RandomNoise", noise_seed=7)
    sampler = graph.add(3, "KSamplerSelect", sampler_name="dpmpp_2m")
    sigmas = graph.add(3, "BasicScheduler", model=loader["model"], scheduler="karras", steps=20, denoise=1.0)
    guider = graph.add(
        3,
        "IP2P_Guider",
        model=loader["model"],
        positive=encode["positive"],
        negative=encode["negative"],
        text_cfg=4.0,
    )
    sample = graph.add(
        4,
        "SamplerCustomAdvanced",
        noise=noise["NOISE"],
        guider=guider["guider"],
        sampler=sampler["SAMPLER"],
        sigmas=sigmas["SIGMAS"],
        latent_image=encode["latent"],
    )
    decode = graph.add(4, "VAEDecode", samples=sample["output"], vae=loader["vae"])
    sized = graph.add(4, "IP2P_RestoreSize", image=decode["IMAGE"], original=scene["image"])
    return graph.add(5, "SaveImage", images=sized["image"], filename_prefix="ip2p/guider")


def sweep_the_guidances(graph: Graph) -> Node:
    graph.note(
        f"""
# Sweep the two guidances
Every text_cfg with every image_cfg, in one labelled grid: the quickest way to find what a picture needs.
Rows follow the instruction more from top to bottom, columns keep the picture more from left to right.

{EMBEDDED}
{FULL}""",
    )
    loader = graph.add(1, "IP2P_LoadCheckpoint")
    scene = graph.add(1, "IP2P_RenderScene", shape="star", colour="blue", background="sand")
    sweep = graph.add(1, "IP2P_SweepGuidance", text_cfgs="0, 2, 8", image_cfgs="0.5, 1.5, 3")
    edit = graph.add(
        2,
        "IP2P_Sample",
        model=loader["model"],
        clip=loader["clip"],
        vae=loader["vae"],
        image=scene["image"],
        instruction="make it a pencil sketch",
        text_cfg=sweep["text_cfg"],
        image_cfg=sweep["image_cfg"],
        seed=3,
    )
    graph.add(3, "PreviewImage", title="One by one", images=edit["image"])
    grid = graph.add(
        3, "IP2P_LabelledGrid", images=edit["image"], labels=sweep["label"], columns=sweep["columns"], height=128
    )
    return graph.add(3, "SaveImage", images=grid["grid"], filename_prefix="ip2p/sweep")


def make_a_pair(graph: Graph) -> Node:
    graph.note(
        f"""
# Make a pair with Prompt-to-Prompt
Two captions become two pictures that differ only where the captions do: the picture after looks where the picture
before looks, in a share p of the steps. This is how the paper made its training data (section 3.1).

Too different: raise **p2p_min**. The edit does not show: lower **p2p_max**. Every candidate draws its own p.

*IP2P Pair Images* makes pairs of pictures from anywhere; below, two of them are scored as the filter scores candidates.

{EMBEDDED_SD}
**For photographs** choose *Load Checkpoint* with {SD_FILE} instead of *IP2P Load Checkpoint*.""",
    )
    graph.band("Pairs from two captions")
    loader = graph.add(1, "IP2P_LoadCheckpoint", checkpoint="embedded-sd")
    pairs = graph.add(
        2,
        "IP2P_GeneratePairs",
        model=loader["model"],
        clip=loader["clip"],
        vae=loader["vae"],
        caption="a large red heart in the centre on a sky background",
        edited_caption="a large blue heart in the centre on a sky background",
        instruction="make the heart blue",
        candidates=4,
        seed=3,
        p2p_min=0.3,
        **EMBEDDED_PAIRS,
    )
    graph.add(3, "SaveImage", title="Before", images=pairs["before"], filename_prefix="ip2p/before")
    graph.add(3, "SaveImage", title="After", images=pairs["after"], filename_prefix="ip2p/after")
    both = graph.add(4, "ImageStitch", image1=pairs["before"], image2=pairs["after"], direction="down")
    grid = graph.add(4, "IP2P_LabelledGrid", images=both["IMAGE"], columns=4, height=256)
    shown = graph.add(4, "PreviewImage", title="Above before, below after", images=grid["grid"])

    graph.band("A pair of your own pictures")
    first = graph.add(1, "IP2P_RenderScene", title="Your picture before", shape="star", colour="green")
    second = graph.add(1, "IP2P_RenderScene", title="Your picture after", shape="star", colour="purple")
    own = graph.add(
        2,
        "IP2P_PairImages",
        before=first["image"],
        after=second["image"],
        caption=first["caption"],
        edited_caption=second["caption"],
        instruction="make the star purple",
    )
    scored = graph.add(3, "IP2P_ClipFilter", title="Scores of your pictures", pairs=own["pairs"], **EMBEDDED_THRESHOLDS)
    graph.add(4, "PreviewAny", title="Scores", source=scored["scores"], width=TABLE, lines=14)
    return shown


def save_a_data_set(graph: Graph) -> Node:
    graph.note(
        f"""
# Generate, filter and save a small data set
Captions become edits, edits become candidates, CLIP keeps the best, and the pairs are added to
`ComfyUI/output/datasets/my-pairs`. Everything right of *IP2P Captions* runs once for each edit. Run it again with
another seed for more; what is there already is skipped. Cancelled, it goes on where it was.

{EMBEDDED_SD} The thresholds here are the embedded CLIP's; the paper's, for ViT-L-14, are 0.7 and 0.2.
**For photographs** use *Load Checkpoint* with {SD_FILE}, captions of your own, and ViT-L-14/openai.""",
    )
    captions = graph.add(1, "IP2P_Captions", count=3, seed=4)
    loader = graph.add(1, "IP2P_LoadCheckpoint", checkpoint="embedded-sd")
    pairs = graph.add(
        2,
        "IP2P_GeneratePairs",
        model=loader["model"],
        clip=loader["clip"],
        vae=loader["vae"],
        caption=captions["caption"],
        edited_caption=captions["edited_caption"],
        instruction=captions["instruction"],
        candidates=4,
        seed=0,
        **EMBEDDED_PAIRS,
    )
    kept = graph.add(3, "IP2P_ClipFilter", pairs=pairs["pairs"], keep=1, **EMBEDDED_THRESHOLDS)
    saved = graph.add(4, "IP2P_SaveDataset", pairs=kept["pairs"])
    graph.add(4, "PreviewAny", title="Scores", source=kept["scores"], width=TABLE, lines=16)
    graph.add(5, "PreviewAny", title="What is in it", source=saved["report"], width=WIDE)
    both = graph.add(4, "ImageStitch", image1=kept["before"], image2=kept["after"])
    grid = graph.add(5, "IP2P_LabelledGrid", images=both["IMAGE"], columns=1, height=128)
    return graph.add(5, "PreviewImage", title="Kept: before and after", images=grid["grid"])


def train_on_it(graph: Graph) -> Node:
    graph.note(
        f"""
# Train an InstructPix2Pix
Pairs go in, a checkpoint comes out: in `ComfyUI/models/checkpoints/ip2p`, ready for *IP2P Load Checkpoint*, and loaded here
for a first try. **Cancel saves; Run goes on.**

This runs as it is in about a minute: a few steps on true edits of scenes, from the embedded model. It shows the way, and
the model stays about as good as it was.

**For your own skill** choose a data set of workflow 5 in *IP2P Load Data Set*, as **base** {IP2P_FILE}, and the preset
**lora** (a few GB; `pip install peft`) or **one-gpu** (24 GB; `pip install bitsandbytes`), with **steps** 0 for the preset's
own. Training SD1.5 from the paper's data takes days on one GPU.""",
    )
    data = graph.add(1, "IP2P_LoadDataset", count=64, preview=4)
    train = graph.add(2, "IP2P_Train", pairs=data["pairs"], steps=10, batch_size=8, learning_rate=0.0001)
    scene = graph.add(2, "IP2P_RenderScene", shape="square", colour="green", background="grey", place="bottom right")
    graph.add(3, "PreviewAny", title="Where it is", source=train["checkpoint"], lines=5)
    edit = graph.add(
        3,
        "IP2P_Sample",
        model=train["model"],
        clip=train["clip"],
        vae=train["vae"],
        image=scene["image"],
        instruction="make it night",
        text_cfg=4.0,
        seed=2,
    )
    graph.add(4, "SaveImage", title="First edit", images=edit["image"], filename_prefix="ip2p/trained")
    return graph.add(4, "SaveImage", title="Loss", images=train["loss_curve"], filename_prefix="ip2p/loss")


def evaluate_and_plot(graph: Graph) -> Node:
    graph.note(
        f"""
# Evaluate and plot
The paper's figure 8: each point is one **image_cfg**. To the right, the change fits the change of caption better; up, more of
the picture is kept. A better checkpoint lies further up and to the right. The copied input and the true edits are the ends.

{EMBEDDED} Only eight pairs are measured, so the intervals are wide: raise **count**.
**For a full checkpoint** choose {IP2P_FILE}, your test pairs, ViT-L-14/openai, text_cfg 7.5, and 100 or more pairs.""",
    )
    loader = graph.add(1, "IP2P_LoadCheckpoint")
    data = graph.add(1, "IP2P_LoadDataset", count=8, seed=11, preview=4)
    result = graph.add(
        2,
        "IP2P_Evaluate",
        model=loader["model"],
        clip=loader["clip"],
        vae=loader["vae"],
        pairs=data["pairs"],
        text_cfg=4.0,
        image_cfgs="1, 1.5, 3",
        steps=10,
        count=8,
        label="embedded model",
    )
    shown = graph.add(3, "SaveImage", images=result["plot"], filename_prefix="ip2p/curve", width=WIDE)
    graph.add(3, "PreviewAny", title="Numbers", source=result["table"], width=WIDE_TABLE)
    return shown


def edit_with_controlnet(graph: Graph) -> Node:
    graph.note(
        f"""
# Edit with ControlNet
The instruction says what changes, a ControlNet says where. *Apply ControlNet* goes **behind** *IP2P Encode Image*, on both
conditions, and *IP2P Guider* does the rest.

Here a pencil sketch moves the shape: without it the star would stay in the middle. **strength** 0 shows that.

{EMBEDDED} So does the small ControlNet that comes with it, *scenes-sketch*.
**For photographs** take any ControlNet for SD1.5, such as `control_v11p_sd15_lineart_fp16.safetensors`, from
`ComfyUI/models/controlnet` ([download, 0.7 GB](https://huggingface.co/comfyanonymous/ControlNet-v1-1_fp16_safetensors)), with a
full InstructPix2Pix, and **resolution** 512.
{FULL}""",
    )
    loader = graph.add(1, "IP2P_LoadCheckpoint")
    scene = graph.add(1, "IP2P_RenderScene", title="The picture", shape="heart", colour="red", background="sky")
    sketch = graph.add(
        1,
        "IP2P_RenderScene",
        title="The sketch that says where",
        shape="star",
        colour="red",
        background="grey",
        size="small",
        style="sketch",
        place="top left",
    )
    positive = graph.add(
        2, "CLIPTextEncode", title="Instruction", clip=loader["clip"], text="turn the heart into a star"
    )
    negative = graph.add(2, "CLIPTextEncode", title="No instruction (leave empty)", clip=loader["clip"], text="")
    encode = graph.add(
        2,
        "IP2P_EncodeImage",
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        vae=loader["vae"],
        image=scene["image"],
        resolution=64,
    )
    network = graph.add(3, "ControlNetLoader", control_net_name="scenes-sketch.safetensors")
    control = graph.add(
        3,
        "ControlNetApplyAdvanced",
        positive=encode["positive"],
        negative=encode["negative"],
        control_net=network["CONTROL_NET"],
        image=sketch["image"],
        strength=1.0,
    )
    guider = graph.add(
        3,
        "IP2P_Guider",
        model=loader["model"],
        positive=control["positive"],
        negative=control["negative"],
        text_cfg=4.0,
    )
    noise = graph.add(4, "RandomNoise", noise_seed=1)
    sampler = graph.add(4, "KSamplerSelect", sampler_name="euler_ancestral")
    sigmas = graph.add(4, "BasicScheduler", model=loader["model"], scheduler="normal", steps=20, denoise=1.0)
    sample = graph.add(
        5,
        "SamplerCustomAdvanced",
        noise=noise["NOISE"],
        guider=guider["guider"],
        sampler=sampler["SAMPLER"],
        sigmas=sigmas["SIGMAS"],
        latent_image=encode["latent"],
    )
    decode = graph.add(5, "VAEDecode", samples=sample["output"], vae=loader["vae"])
    return graph.add(5, "SaveImage", images=decode["IMAGE"], filename_prefix="ip2p/control")


def sdxl_and_cosxl(graph: Graph) -> Node:
    graph.note(
        """
# SDXL and CosXL-Edit
The same nodes; the settings follow the checkpoint. *IP2P Load Checkpoint* says which text_cfg and image_cfg its authors
recommend, and they are wired; **resolution** 0 takes the checkpoint's own; v-prediction, EDM noise levels and the scaled
picture of CosXL-Edit are found in the file.

**Load one of these instead of embedded**, from `ComfyUI/models/checkpoints`:
- `cosxl_edit.safetensors` ([download, 6.9 GB](https://huggingface.co/stabilityai/cosxl)): 1024 px, text 5, image 1.5
- SDXL InstructPix2Pix, a diffusers folder in `ComfyUI/models/diffusers`
  ([download](https://huggingface.co/diffusers/sdxl-instructpix2pix-768)): 768 px

There is no embedded SDXL. Until you load one, this runs on the embedded miniature of SD1.5, which knows only scenes.""",
    )
    loader = graph.add(1, "IP2P_LoadCheckpoint")
    scene = graph.add(1, "IP2P_RenderScene", shape="triangle", colour="orange", background="lavender")
    graph.add(2, "PreviewAny", title="What the checkpoint is", source=loader["report"], width=WIDE, lines=13)
    edit = graph.add(
        2,
        "IP2P_Sample",
        width=WIDE,
        model=loader["model"],
        clip=loader["clip"],
        vae=loader["vae"],
        image=scene["image"],
        instruction="make the triangle green",
        text_cfg=loader["text_cfg"],
        image_cfg=loader["image_cfg"],
        seed=5,
    )
    return graph.add(3, "SaveImage", images=edit["image"], filename_prefix="ip2p/xl")


WORKFLOWS: dict[str, Callable[[Graph], Node]] = {
    "1 Edit an image": edit_an_image,
    "2 Edit with the guider and stock samplers": edit_with_stock_samplers,
    "3 Sweep the two guidances": sweep_the_guidances,
    "4 Make a pair with Prompt-to-Prompt": make_a_pair,
    "5 Generate, filter and save a data set": save_a_data_set,
    "6 Train on it": train_on_it,
    "7 Evaluate and plot": evaluate_and_plot,
    "8 Edit with ControlNet": edit_with_controlnet,
    "9 SDXL and CosXL": sdxl_and_cosxl,
}
