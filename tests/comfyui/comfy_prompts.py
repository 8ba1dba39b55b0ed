"""Small workflows in the API's format, for tests that change one thing."""

from __future__ import annotations

from typing import Any

LOADER = {"checkpoint": "embedded", "weights": "ema", "base": "from the file itself"}
SAMPLE = {
    "instruction": "make it snow",
    "text_cfg": 4.0,
    "image_cfg": 1.5,
    "steps": 10,
    "seed": 1,
    "sampler": "euler_ancestral",
    "schedule": "model",
    "size": "paper",
    "resolution": 0,
}
TRAIN = {
    "name": "nothing",
    "base": "embedded",
    "preset": "embedded",
    "steps": 10,
    "batch_size": 4,
    "learning_rate": 1e-4,
    "resolution": 0,
    "micro_batch": 0,
    "seed": 0,
}
EVALUATE = {
    "text_cfg": 4.0,
    "image_cfgs": "1.5",
    "steps": 2,
    "count": 2,
    "seed": 0,
    "clip_model": "embedded",
    "label": "mine",
    "references": True,
}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def edit(image: str, **changes: Any) -> dict[str, Any]:
    """Load a picture, edit it, save it as node "save"."""
    return {
        "load": node("IP2P_LoadCheckpoint", **LOADER),
        "image": node("LoadImage", image=image),
        "edit": node(
            "IP2P_Sample",
            model=["load", 0],
            clip=["load", 1],
            vae=["load", 2],
            image=["image", 0],
            **{**SAMPLE, **changes},
        ),
        "save": node("SaveImage", images=["edit", 0], filename_prefix="test/edit"),
    }


def guided(image: str, *, model: Any = ("load", 0), sampler: str = "euler_ancestral", **changes: Any) -> dict[str, Any]:
    """The same by the guider and core's nodes; further nodes or changed inputs by node id."""
    prompt = {
        "load": node("IP2P_LoadCheckpoint", **LOADER),
        "image": node("LoadImage", image=image),
        "positive": node("CLIPTextEncode", clip=["load", 1], text="make it snow"),
        "negative": node("CLIPTextEncode", clip=["load", 1], text=""),
        "encode": node(
            "IP2P_EncodeImage",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["load", 2],
            image=["image", 0],
            size="paper",
            resolution=64,
        ),
        "guider": node(
            "IP2P_Guider",
            model=list(model),
            positive=["encode", 0],
            negative=["encode", 1],
            text_cfg=4.0,
            image_cfg=1.5,
        ),
        "noise": node("RandomNoise", noise_seed=1),
        "sampler": node("KSamplerSelect", sampler_name=sampler),
        "sigmas": node("BasicScheduler", model=["load", 0], scheduler="normal", steps=10, denoise=1.0),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["encode", 2],
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test/guided"),
    }
    for name, change in changes.items():
        if "class_type" in change:
            prompt[name] = change
        else:
            prompt[name] = {**prompt[name], "inputs": {**prompt[name]["inputs"], **change}}
    return prompt
