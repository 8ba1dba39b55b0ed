"""The shipped workflows. Each describes itself to a Graph, and returns the node whose picture is its thumbnail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workflow_graph import Graph, Node

HUB = "https://huggingface.co"
IP2P_MODEL = {
    "name": "instruct-pix2pix-00-22000.safetensors",
    "url": f"{HUB}/timbrooks/instruct-pix2pix/resolve/main/instruct-pix2pix-00-22000.safetensors",
    "directory": "checkpoints",
}
COSXL_MODEL = {
    "name": "cosxl_edit.safetensors",
    "url": f"{HUB}/stabilityai/cosxl/resolve/main/cosxl_edit.safetensors",
    "directory": "checkpoints",
}
SD_MODEL = {
    "name": "v1-5-pruned-emaonly.safetensors",
    "url": f"{HUB}/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/v1-5-pruned-emaonly.safetensors",
    "directory": "checkpoints",
}
CONTROL_MODEL = {
    "name": "control_v11p_sd15_lineart_fp16.safetensors",
    "url": f"{HUB}/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/control_v11p_sd15_lineart_fp16.safetensors",
    "directory": "controlnet",
}
FULL = f"""
**For photographs** put **instruct-pix2pix-00-22000.safetensors** into **ComfyUI/models/checkpoints**
([download, 7.7 GB]({HUB}/timbrooks/instruct-pix2pix/tree/main)), press R, choose it in *IP2P Load Checkpoint*, and replace
*IP2P Render Scene* by *Load Image*.
"""
EMBEDDED = "This runs as it is, with the embedded miniature, which knows only scenes: one shape on a plain ground."
EMBEDDED_SD = "This runs as it is, with the embedded text-to-image model, which knows only scenes."
CLIP_CONFIG = Path(__file__).parents[1] / "ip2p_engine/scenes/embedded/clip/config.json"
# As docs/pairs.md recommends for the embedded model.
EMBEDDED_PAIRS = {"steps": 8, "sampler": "ddim", "cfg_min": 2.0, "cfg_max": 4.0}
EMBEDDED_THRESHOLDS = json.loads(CLIP_CONFIG.read_text())["thresholds"]
IP2P_FILE = f"""**instruct-pix2pix-00-22000.safetensors** in **ComfyUI/models/checkpoints**
([download, 7.7 GB]({HUB}/timbrooks/instruct-pix2pix/tree/main))"""
SD_FILE = f"""Stable Diffusion 1.5 in **ComfyUI/models/checkpoints**
([download, 4.3 GB]({HUB}/stable-diffusion-v1-5/stable-diffusion-v1-5))"""
LARGE = 620


def networks(loader: Node) -> dict[str, tuple[Node, int]]:
    """The three wires from a loader."""
    return {name: loader[name] for name in ("model", "clip", "vae")}


def scales(loader: Node) -> dict[str, tuple[Node, int]]:
    """What the checkpoint recommends."""
    return {name: loader[name] for name in ("text_cfg", "image_cfg")}


def compare(graph: Graph, column: int, before: Node, after: Node, *, output: str = "image", **given: int) -> Node:
    """Before and after, large."""
    options = {"width": LARGE, "shown": 380, **given}
    return graph.add(column, "IP2P_BeforeAfter", before=before["image"], after=after[output], **options)


def edit_an_image(graph: Graph) -> Node:
    graph.note(
        f"""
# Edit an image
Write what to do, press Run. This runs as it is, with a miniature that knows some kinds of edits: *make it night*, *snow*,
*autumn*, *a pencil sketch*, *a painting*, *black and white*, *make the green things purple*, *add a red heart*.

Too little happens: raise **follow_instruction**, or lower **keep_picture**. The picture is lost: the other way round. At 1 they
are what the checkpoint recommends. Another try: change the **seed**.

**For any instruction** put {IP2P_FILE}, press R, choose it in *IP2P Load Checkpoint*. Your own picture: *Load Image* in place of
*IP2P Example Photo*.""",
    )
    loader = graph.add(0, "IP2P_LoadCheckpoint", checkpoint="embedded-photos", models=[IP2P_MODEL])
    photo = graph.add(0, "IP2P_ExamplePhoto", title="The picture")
    adjust = graph.add(1, "IP2P_AdjustScales", **scales(loader))
    edit = graph.add(
        1,
        "IP2P_Sample",
        **networks(loader),
        image=photo["image"],
        instruction="make it autumn",
        **scales(adjust),
        steps=4,
        seed=1,
        detail=True,
        guidance_low=0.5,
        guidance_high=5.0,
    )
    shown = compare(graph, 2, photo, edit, width=680, shown=420)
    graph.add(2, "SaveImage", images=edit["image"], filename_prefix="ip2p/edit", folded=True)
    chosen = [(edit, "instruction"), (adjust, "follow_instruction"), (adjust, "keep_picture"), (edit, "seed")]
    graph.app([(photo, "photo"), *chosen], [shown])
    return shown


def edit_with_stock_samplers(graph: Graph) -> Node:
    graph.width = 270
    graph.note(
        f"""
# Edit with core's samplers
*IP2P Guider* gives the paper's guidance to *SamplerCustomAdvanced*, so any sampler, scheduler, LoRA or ControlNet works. Wire
both outputs of *IP2P Encode Image*.

{EMBEDDED} Scales and **resolution** come from the checkpoint.
{FULL}""",
    )
    loader = graph.add(0, "IP2P_LoadCheckpoint", checkpoint="embedded", models=[IP2P_MODEL])
    scene = graph.add(
        0, "IP2P_RenderScene", title="The picture", shape="circle", colour="yellow", background="mint", place="top left"
    )
    encode = text_and_picture(graph, 1, loader, scene, "turn the circle into a star")
    guider = graph.add(2, "IP2P_Guider", model=loader["model"], **conditions(encode), **scales(loader))
    walk = sampling(graph, 2, loader, "dpmpp_2m", "karras", seed=7)
    sample = graph.add(
        3, "SamplerCustomAdvanced", guider=guider["guider"], latent_image=encode["latent"], **walk, shown=280
    )
    decode = graph.add(3, "VAEDecode", samples=sample["output"], vae=loader["vae"])
    sized = graph.add(3, "IP2P_RestoreSize", image=decode["IMAGE"], original=scene["image"])
    graph.add(3, "SaveImage", images=sized["image"], filename_prefix="ip2p/guider", folded=True)
    return compare(graph, 4, scene, sized, width=460, shown=300)


def text_and_picture(graph: Graph, column: int, loader: Node, scene: Node, instruction: str) -> Node:
    """The instruction, none, and the picture in both."""
    texts = [("Instruction", instruction), ("No instruction (leave empty)", "")]
    positive, negative = (
        graph.add(column, "CLIPTextEncode", title=title, clip=loader["clip"], text=text) for title, text in texts
    )
    given = {"positive": positive["CONDITIONING"], "negative": negative["CONDITIONING"], "vae": loader["vae"]}
    return graph.add(column, "IP2P_EncodeImage", **given, image=scene["image"], resolution=loader["resolution"])


def conditions(node: Node) -> dict[str, tuple[Node, int]]:
    return {name: node[name] for name in ("positive", "negative")}


def sampling(
    graph: Graph, column: int, loader: Node, sampler: str, scheduler: str, *, seed: int
) -> dict[str, tuple[Node, int]]:
    """Core's nodes that say how to sample."""
    noise = graph.add(column, "RandomNoise", noise_seed=seed)
    chosen = graph.add(column, "KSamplerSelect", sampler_name=sampler)
    sigmas = graph.add(column, "BasicScheduler", model=loader["model"], scheduler=scheduler, steps=20, denoise=1.0)
    return {"noise": noise["NOISE"], "sampler": chosen["SAMPLER"], "sigmas": sigmas["SIGMAS"]}


def sweep_the_guidances(graph: Graph) -> Node:
    graph.note(
        f"""
# Sweep the two guidances
Every text_cfg with every image_cfg, in one labelled grid: the quickest way to find what a picture needs. Rows follow the
instruction more from top to bottom, columns keep the picture more from left to right.

{EMBEDDED}
{FULL}""",
    )
    loader = graph.add(0, "IP2P_LoadCheckpoint", checkpoint="embedded", models=[IP2P_MODEL])
    scene = graph.add(0, "IP2P_RenderScene", title="The picture", shape="star", colour="blue", background="sand")
    sweep = graph.add(1, "IP2P_SweepGuidance", text_cfgs="0, 2, 8", image_cfgs="0.5, 1.5, 3")
    edit = graph.add(
        1,
        "IP2P_Sample",
        **networks(loader),
        image=scene["image"],
        instruction="make it a pencil sketch",
        **scales(sweep),
        seed=3,
    )
    graph.add(2, "PreviewImage", title="One by one", images=edit["image"], width=280)
    grid = graph.add(
        2,
        "IP2P_LabelledGrid",
        images=edit["image"],
        labels=sweep["label"],
        columns=sweep["columns"],
        height=128,
        width=280,
    )
    return graph.add(3, "SaveImage", images=grid["grid"], filename_prefix="ip2p/sweep", width=LARGE, shown=640)


def make_a_pair(graph: Graph) -> Node:
    graph.note(
        f"""
# Make a pair with Prompt-to-Prompt
Two captions become two pictures that differ only where the captions do: the picture after looks where the picture before
looks, in a share p of the steps. This is how the paper made its training data (section 3.1).

Too different: raise **p2p_min**. The edit does not show: lower **p2p_max**. Every candidate draws its own p.

{EMBEDDED_SD}
**For photographs** choose *Load Checkpoint* with {SD_FILE} instead of *IP2P Load Checkpoint*.""",
    )
    loader = graph.add(0, "IP2P_LoadCheckpoint", checkpoint="embedded-sd", models=[SD_MODEL])
    pairs = graph.add(
        1,
        "IP2P_GeneratePairs",
        **networks(loader),
        caption="a large red heart in the centre on a sky background",
        edited_caption="a large blue heart in the centre on a sky background",
        instruction="make the heart blue",
        candidates=4,
        seed=3,
        p2p_min=0.3,
        **EMBEDDED_PAIRS,
    )
    shown = graph.add(
        2,
        "IP2P_BeforeAfter",
        before=pairs["before"],
        after=pairs["after"],
        columns=2,
        height=192,
        width=680,
        shown=360,
    )
    graph.add(2, "SaveImage", title="Before", images=pairs["before"], filename_prefix="ip2p/before", folded=True)
    graph.add(2, "SaveImage", title="After", images=pairs["after"], filename_prefix="ip2p/after", folded=True)
    return shown


def save_a_data_set(graph: Graph) -> Node:
    graph.note(
        f"""
# Generate, filter and save
Captions become edits, edits become candidates, CLIP keeps the best, and the pairs are added to
**ComfyUI/output/datasets/my-pairs**. Everything right of *IP2P Captions* runs once for each edit. Cancel and crashes lose
nothing: what is made lies in **ComfyUI/output/ip2p_pairs**.

{EMBEDDED_SD} The thresholds are the embedded CLIP's; the paper's, for ViT-L-14, are 0.7 and 0.2.
**For photographs** use *Load Checkpoint* with {SD_FILE}, captions of your own, and ViT-L-14/openai.""",
    )
    captions = graph.add(0, "IP2P_Captions", count=3, seed=4)
    loader = graph.add(0, "IP2P_LoadCheckpoint", checkpoint="embedded-sd", models=[SD_MODEL])
    pairs = graph.add(
        1,
        "IP2P_GeneratePairs",
        **networks(loader),
        caption=captions["caption"],
        edited_caption=captions["edited_caption"],
        instruction=captions["instruction"],
        candidates=4,
        seed=0,
        **EMBEDDED_PAIRS,
    )
    kept = graph.add(2, "IP2P_ClipFilter", pairs=pairs["pairs"], keep=1, **EMBEDDED_THRESHOLDS)
    saved = graph.add(2, "IP2P_SaveDataset", pairs=kept["pairs"])
    graph.add(2, "PreviewAny", title="What is in it", source=saved["report"], shown=170)
    shown = graph.add(
        3,
        "IP2P_BeforeAfter",
        title="Kept",
        before=kept["before"],
        after=kept["after"],
        height=128,
        width=660,
        columns=2,
        shown=330,
    )
    graph.add(3, "PreviewAny", title="Scores", source=kept["scores"], width=660, shown=300)
    return shown


def train_on_it(graph: Graph) -> Node:
    graph.note(
        f"""
# Train an InstructPix2Pix
Pairs go in, a checkpoint comes out: in **ComfyUI/models/checkpoints/ip2p**, ready for *IP2P Load Checkpoint*, and loaded here
for a first try. **Cancel saves; Run goes on.**

This runs as it is in about a minute: a few steps on true edits of scenes, from the embedded model. It shows the way, and the
model stays about as good as it was.

**For your own skill** choose a data set of workflow 5 in *IP2P Load Data Set*, as **base** {IP2P_FILE}, and the preset
**lora** (a few GB; pip install peft) or **one-gpu** (24 GB; pip install bitsandbytes), with **steps** 0 for the preset's
own. Training SD1.5 from the paper's data takes days on one GPU.""",
    )
    data = graph.add(0, "IP2P_LoadDataset", count=64, preview=4)
    scene = graph.add(
        1,
        "IP2P_RenderScene",
        title="A picture",
        shape="square",
        colour="green",
        background="grey",
        place="bottom right",
    )
    train = graph.add(1, "IP2P_Train", pairs=data["pairs"], steps=10, batch_size=8, learning_rate=0.0001)
    graph.add(2, "PreviewAny", title="Where it is", source=train["checkpoint"], shown=110)
    edit = graph.add(
        2,
        "IP2P_Sample",
        title="A first edit",
        **networks(train),
        image=scene["image"],
        instruction="make it night",
        text_cfg=4.0,
        seed=2,
    )
    shown = compare(graph, 3, scene, edit, shown=330)
    saved = {"filename_prefix": "ip2p/loss", "width": LARGE, "shown": 330}
    graph.add(3, "SaveImage", title="Loss", images=train["loss_curve"], **saved)
    graph.add(3, "SaveImage", title="First edit", images=edit["image"], filename_prefix="ip2p/trained", folded=True)
    return shown


def evaluate_and_plot(graph: Graph) -> Node:
    graph.note(
        f"""
# Evaluate and plot
The paper's figure 8: each point is one **image_cfg**. To the right, the change fits the change of caption better; up, more of
the picture is kept. A better checkpoint lies further up and to the right. The copied input and the true edits are the ends.

{EMBEDDED} Few pairs are measured, so the intervals are wide: raise **count**. Scenes are easy, so **text_cfg** is low here: at
the recommended 4 all points lie at the true edits.
**For a full checkpoint** choose {IP2P_FILE}, your test pairs, ViT-L-14/openai, 100 or more pairs, and the text_cfg you edit
with.""",
    )
    loader = graph.add(0, "IP2P_LoadCheckpoint", checkpoint="embedded", models=[IP2P_MODEL])
    data = graph.add(0, "IP2P_LoadDataset", count=12, seed=11, preview=4)
    result = graph.add(
        1,
        "IP2P_Evaluate",
        **networks(loader),
        pairs=data["pairs"],
        text_cfg=0.5,
        image_cfgs="0, 0.4, 0.8, 1.5, 5",
        steps=10,
        count=12,
        label="embedded model",
    )
    shown = graph.add(2, "SaveImage", images=result["plot"], filename_prefix="ip2p/curve", width=900, shown=520)
    graph.add(2, "PreviewAny", title="Numbers", source=result["table"], width=900, shown=240)
    return shown


def edit_with_controlnet(graph: Graph) -> Node:
    graph.width = 270
    graph.note(
        f"""
# Edit with ControlNet
The instruction says what changes, a ControlNet says where. *Apply ControlNet* goes **behind** *IP2P Encode Image*, on both
conditions, and *IP2P Guider* does the rest. Here a sketch moves the shape; **strength** 0 shows what it does.

{EMBEDDED} So does the small ControlNet that comes with it.
**For photographs** take any ControlNet for SD1.5, such as **control_v11p_sd15_lineart_fp16.safetensors**, from
**ComfyUI/models/controlnet** ([download, 0.7 GB]({HUB}/comfyanonymous/ControlNet-v1-1_fp16_safetensors)), with a
full InstructPix2Pix: {IP2P_FILE}.""",
    )
    loader = graph.add(0, "IP2P_LoadCheckpoint", checkpoint="embedded", models=[IP2P_MODEL])
    scene = graph.add(0, "IP2P_RenderScene", title="The picture", shape="heart", colour="red", background="sky")
    encode = text_and_picture(graph, 1, loader, scene, "turn the heart into a star")
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
    network = graph.add(2, "ControlNetLoader", control_net_name="scenes-sketch.safetensors", models=[CONTROL_MODEL])
    control = graph.add(
        2,
        "ControlNetApplyAdvanced",
        **conditions(encode),
        control_net=network["CONTROL_NET"],
        image=sketch["image"],
        strength=1.0,
    )
    guider = graph.add(2, "IP2P_Guider", model=loader["model"], **conditions(control), **scales(loader))
    walk = sampling(graph, 3, loader, "euler_ancestral", "normal", seed=1)
    sample = graph.add(
        3, "SamplerCustomAdvanced", guider=guider["guider"], latent_image=encode["latent"], **walk, shown=280
    )
    decode = graph.add(3, "VAEDecode", samples=sample["output"], vae=loader["vae"])
    graph.add(4, "PreviewImage", title="The sketch", images=sketch["image"], shown=220)
    graph.add(4, "SaveImage", images=decode["IMAGE"], filename_prefix="ip2p/control", folded=True)
    options = {"before": scene["image"], "after": decode["IMAGE"]}
    return graph.add(4, "IP2P_BeforeAfter", **options, width=460, shown=300)


def sdxl_and_cosxl(graph: Graph) -> Node:
    graph.note(
        f"""
# SDXL and CosXL-Edit
The same nodes; the settings follow the checkpoint: the scales that its authors recommend are wired, **resolution** 0 takes the
checkpoint's own, and v-prediction, EDM noise levels and the scaled picture of CosXL-Edit are found in the file.

**Load one of these** from **ComfyUI/models/checkpoints**:
- **cosxl_edit.safetensors** ([download, 6.9 GB]({HUB}/stabilityai/cosxl)): 1024 px, text 5, image 1.5
- SDXL InstructPix2Pix, a diffusers folder in **ComfyUI/models/diffusers**
  ([download]({HUB}/diffusers/sdxl-instructpix2pix-768)): 768 px

There is no embedded SDXL. Until you load one, this runs on the embedded miniature of SD1.5, which knows only scenes.""",
    )
    loader = graph.add(0, "IP2P_LoadCheckpoint", checkpoint="embedded", models=[COSXL_MODEL])
    scene = graph.add(
        1, "IP2P_RenderScene", title="The picture", shape="triangle", colour="orange", background="lavender"
    )
    graph.add(1, "PreviewAny", title="What the checkpoint is", source=loader["report"], width=420, shown=280)
    edit = graph.add(
        2,
        "IP2P_Sample",
        **networks(loader),
        image=scene["image"],
        instruction="make the triangle green",
        **scales(loader),
        seed=5,
    )
    shown = compare(graph, 3, scene, edit, width=560, shown=360)
    graph.add(3, "SaveImage", images=edit["image"], filename_prefix="ip2p/xl", folded=True)
    return shown


def score_your_own(graph: Graph) -> Node:
    graph.note(
        """
# Pairs of your own pictures
*IP2P Pair Images* makes pairs of pictures from anywhere: what another editor made, what you painted. Here two scenes; put
*Load Image* in their place. *IP2P CLIP Filter* scores the pair as it scores candidates, and *IP2P Save Data Set* adds it to
**ComfyUI/output/datasets/my-own**, to train on.

This runs as it is: the embedded CLIP knows only scenes. **For photographs** choose ViT-L-14/openai, which is downloaded once
(0.9 GB), and the paper's thresholds, 0.7 and 0.2; a full checkpoint is not needed.""",
    )
    first = graph.add(0, "IP2P_RenderScene", title="Your picture before", shape="star", colour="green")
    second = graph.add(0, "IP2P_RenderScene", title="Your picture after", shape="star", colour="purple")
    own = graph.add(
        1,
        "IP2P_PairImages",
        before=first["image"],
        after=second["image"],
        caption=first["caption"],
        edited_caption=second["caption"],
        instruction="make the star purple",
    )
    kept = graph.add(1, "IP2P_ClipFilter", title="Scores of your pictures", pairs=own["pairs"], **EMBEDDED_THRESHOLDS)
    shown = compare(graph, 2, first, second, width=660, shown=330)
    graph.add(2, "PreviewAny", title="Scores", source=kept["scores"], width=660, shown=230)
    saved = graph.add(1, "IP2P_SaveDataset", pairs=kept["pairs"], name="my-own")
    graph.add(2, "PreviewAny", title="What is in it", source=saved["report"], width=660, shown=120)
    return shown


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
    "10 Score pairs of your own pictures": score_your_own,
}


def edit_blueprint(graph: Graph) -> dict[str, Any]:
    """One node that edits a picture: checkpoint, instruction, two strengths."""
    loader = graph.add(0, "IP2P_LoadCheckpoint", checkpoint="embedded-photos", models=[IP2P_MODEL])
    adjust = graph.add(1, "IP2P_AdjustScales", **scales(loader))
    edit = graph.add(2, "IP2P_Sample", **networks(loader), instruction="make it snow", **scales(adjust), detail=True)
    shown = [(edit, "image"), (edit, "mask"), (edit, "instruction"), (loader, "checkpoint")]
    shown += [(adjust, "follow_instruction"), (adjust, "keep_picture"), (edit, "seed")]
    return graph.blueprint(
        shown,
        edit["image"],
        description="Edits a picture by an instruction. Choose a full checkpoint for any instruction; embedded-photos knows some.",
        aliases=["instruct pix2pix", "edit image", "edit by instruction"],
    )


BLUEPRINTS: dict[str, Callable[[Graph], dict[str, Any]]] = {"Edit image (InstructPix2Pix)": edit_blueprint}
