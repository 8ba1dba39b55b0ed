"""The shipped workflows. Each describes itself to a Graph and returns the node whose picture is the thumbnail."""

from __future__ import annotations

from collections.abc import Callable

from workflow_graph import Graph, Node

FULL = """
**For photographs** put `instruct-pix2pix-00-22000.safetensors` into `ComfyUI/models/checkpoints`
([download, 7.7 GB](https://huggingface.co/timbrooks/instruct-pix2pix/tree/main)), press R, choose it in *IP2P Load
Checkpoint*, and replace *IP2P Render Scene* by *Load Image*. Then text_cfg 7.5 and image_cfg 1.5 are a good start.
"""
EMBEDDED = "This runs as it is, with the embedded miniature, which knows only scenes: one shape on a plain ground."


def edit_an_image(graph: Graph) -> Node:
    graph.note(
        0,
        f"""
# Edit an image
Write what to do, press Run. {EMBEDDED}

Too little happens: raise **text_cfg**, or lower **image_cfg**. The picture is lost: the other way round.
Another try: change the **seed**.
{FULL}""",
    )
    loader = graph.add(1, "IP2P_LoadCheckpoint")
    scene = graph.add(1, "IP2P_RenderScene")
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
    )
    graph.add(3, "PreviewAny", title="What the checkpoint is", source=loader["report"])
    return graph.add(3, "SaveImage", images=edit["image"], filename_prefix="ip2p/edit")


def edit_with_stock_samplers(graph: Graph) -> Node:
    graph.note(
        0,
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
    guider = graph.add(
        3,
        "IP2P_Guider",
        model=loader["model"],
        positive=encode["positive"],
        negative=encode["negative"],
        text_cfg=4.0,
    )
    noise = graph.add(3, "RandomNoise", noise_seed=7)
    sampler = graph.add(3, "KSamplerSelect", sampler_name="dpmpp_2m")
    sigmas = graph.add(3, "BasicScheduler", model=loader["model"], scheduler="karras", steps=20, denoise=1.0)
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
        0,
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


WORKFLOWS: dict[str, Callable[[Graph], Node]] = {
    "1 Edit an image": edit_an_image,
    "2 Edit with the guider and stock samplers": edit_with_stock_samplers,
    "3 Sweep the two guidances": sweep_the_guidances,
}
