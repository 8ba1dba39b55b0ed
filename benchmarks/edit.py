"""Editing: ours against diffusers' StableDiffusionInstructPix2PixPipeline; same weights, schedule, type and process.

    python benchmarks/edit.py                                   # the embedded model, then SD1.5 size, on this machine
    python benchmarks/edit.py --sizes embedded sd15 --width 64 --steps 4 --engine /path/to/another/checkout
    python benchmarks/edit.py --device cuda --dtype float16 --sizes sd15 --pixels 512 --steps 50 --compile

The pipeline has a copy of the weights with diffusers' own attention, so that neither side is changed by how the other
is set up; with --compile both are compiled, the pipeline as an expert would on that device. Runs alternate (ours,
theirs, ours, ...) after a warm-up, so a drifting machine slows both; medians, and the least, the median and the most of
the paired ratios are printed, by the clock and by the process's own processor time, with the memory that each adds at
its peak. --engine brings another checkout's engine into the same process, in turn with both.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import importlib
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from measuring import in_turn, machine, middle, ratios
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ip2p_engine.networks import model
from ip2p_engine.scenes.world import Scene, render
from ip2p_engine.tokenizer import clip_tokenizer, merges

GUIDANCE = {"both": (7.5, 1.5), "image_cfg 1": (7.5, 1.0), "equal": (2.0, 2.0)}
TEXT = "make it snow"
SHALLOW: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
KINDS = {"attention": ["attention"], "convolutions": ["conv"], "products": ["mm", "linear"], "norms": ["norm"]}
VIEWS = {"_unsafe_view", "_reshape_alias", "empty", "lift_fresh", "detach"}


def of_engine(package: str, *names: str) -> Any:
    """The first of an engine's modules that is there: rooms have moved since 0.1."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(f"{package}.{name}")
    raise ModuleNotFoundError(names)


def brought(checkout: Path) -> str:
    """Another checkout's engine as a package of another name, as ComfyUI would have it."""
    spec = importlib.util.spec_from_file_location(
        "other", checkout / "__init__.py", submodule_search_locations=[str(checkout)]
    )
    sys.modules["other"] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    return "other.ip2p_engine"


def model_of(package: str, size: str, options: argparse.Namespace) -> Any:
    """The embedded model, or random weights of SD1.5's layers, as an engine holds them."""
    module = of_engine(package, "networks.model", "model")
    kind = torch.device(options.device), getattr(torch, options.dtype)
    if size == "embedded":
        return module.load_model("embedded", device=kind[0], dtype=kind[1])
    return sd15(*kind, options.width, module)


def main() -> None:
    options = parse()
    engines = {"ours": "ip2p_engine"} | ({"before": brought(options.engine)} if options.engine else {})
    for size in options.sizes:
        pixels = 64 if size == "embedded" else options.pixels
        picture = render(Scene(shape="heart", colour="red", background="sky", size="large")).resize((pixels, pixels))
        for name in options.guidance:
            # Models of its own for each row: what is compiled stays so.
            models = {way: model_of(package, size, options) for way, package in engines.items()}
            pipe = peer(models["ours"])
            editors = {way: of_engine(engines[way], "edit").InstructPix2Pix(model) for way, model in models.items()}
            what = compare if options.count is None else counted
            row = what(editors, pipe, picture, options, *GUIDANCE[name])
            print(json.dumps({"size": size, "pixels": pixels, "guidance": name, **row}), flush=True)
    print(json.dumps({**machine(options), "width": options.width, "compiled": options.compile}))


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=("embedded", "sd15"), default=["embedded", "sd15"])
    parser.add_argument("--guidance", nargs="+", choices=GUIDANCE, default=list(GUIDANCE))
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="float16" if cuda else "float32")
    parser.add_argument("--pixels", type=int, default=512 if cuda else 256)
    parser.add_argument("--steps", type=int, default=20 if cuda else 4)
    parser.add_argument("--width", type=int, default=320, help="channels of the first level; SD1.5: 320")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile both")
    parser.add_argument("--compile-mode", default="max", help="ours")
    parser.add_argument("--engine", type=Path, help="another checkout, whose engine takes turns with this one's")
    for count, about in ((_operations, "count the operations of a step"), (_shares, "what takes a step's time")):
        name = f"--{count.__name__.strip('_')}"
        parser.add_argument(name, dest="count", action="store_const", const=count, help=f"{about}, and nothing else")
    return parser.parse_args()


def compare(
    editors: dict[str, Any],
    pipe: Any,
    picture: Image.Image,
    options: argparse.Namespace,
    text_cfg: float,
    image_cfg: float,
) -> dict:
    """Time all, in turn, and say how far the pictures are from diffusers'."""
    steps, device = options.steps if picture.width > 64 else 20, torch.device(options.device)
    if options.compile:
        editors["ours"].compile(options.compile_mode)
        compile_as_an_expert(pipe, options.device)
    made: dict[str, np.ndarray] = {}
    evaluations = {"diffusers": 3 * steps}

    def ours(way: str) -> None:
        scales = {"text_cfg": text_cfg, "image_cfg": image_cfg}
        result = editors[way].edit(picture, TEXT, seeds=1, steps=steps, size=picture.size, **scales)[0]
        evaluations[way], made[way] = result.evaluations, np.asarray(result.image)

    def theirs() -> None:
        scales = {"guidance_scale": text_cfg, "image_guidance_scale": image_cfg}
        generator = torch.Generator().manual_seed(1)
        output = pipe(TEXT, image=picture, num_inference_steps=steps, generator=generator, **scales)
        made["diffusers"] = np.asarray(output.images[0])

    ways = {**{way: partial(ours, way) for way in editors}, "diffusers": theirs}
    for way in ways.values():
        way()
    rounds = in_turn(ways, device, options.runs)
    row: dict[str, Any] = {"steps": steps, "evaluations": evaluations}
    for way in ways:
        row[way] = {what: middle([getattr(one[way], what) for one in rounds]) for what in ("seconds", "cpu", "peak")}
    for way in editors:
        for what in ("seconds", "cpu"):
            found = ratios(rounds, way, "diffusers", what)
            row[way][f"times_diffusers_by_{what}"] = [found[0], middle(found), found[-1]]
        difference = made[way].astype(int) - made["diffusers"].astype(int)
        row[way]["mean_difference_of_255"] = float(np.abs(difference).mean())
    return row


def counted(
    editors: dict[str, Any],
    pipe: Any,
    picture: Image.Image,
    options: argparse.Namespace,
    text_cfg: float,
    image_cfg: float,
) -> dict:
    """What ``options.count`` finds of a step of each: of a long walk, less a short one."""
    scales = {"guidance_scale": text_cfg, "image_guidance_scale": image_cfg}

    def ours(way: str, steps: int) -> None:
        editors[way].edit(picture, TEXT, steps=steps, size=picture.size, text_cfg=text_cfg, image_cfg=image_cfg)

    def theirs(steps: int) -> None:
        pipe(TEXT, image=picture, num_inference_steps=steps, **scales)

    ways = {**{way: partial(ours, way) for way in editors}, "diffusers": theirs}
    return {way: options.count(run) for way, run in ways.items()}


def _operations(run: Any) -> float:
    """Tensor operations that are no mere views, as a device is given them."""
    counts = []
    for steps in (2, 4):
        with Operations() as counted:
            run(steps)
        counts.append(counted.count)
    return (counts[1] - counts[0]) / 2


def _shares(run: Any) -> dict[str, float]:
    """Of a step's time on the CPU, by torch's profiler."""
    run(2)
    spent: collections.Counter[str] = collections.Counter()
    for steps, sign in ((2, -1), (12, 1)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            run(steps)
        for event in profiler.key_averages():
            kind = next((kind for kind, marks in KINDS.items() if any(mark in event.key for mark in marks)), "rest")
            spent[kind] += sign * event.self_cpu_time_total
    return {kind: round(time / sum(spent.values()), 3) for kind, time in spent.most_common()}


class Operations(TorchDispatchMode):
    """Counts what is computed or copied."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inference mode hands on whole compositions; what they are made of is what counts.
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                made = func.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        self.count += not func.is_view and func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def compile_as_an_expert(pipe: Any, device: str) -> None:
    """The pipeline's UNet, fused and compiled; on CUDA in channels_last and with graphs."""
    pipe.unet.fuse_qkv_projections()
    if device == "cuda":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.unet.compile(mode="reduce-overhead")
    else:
        pipe.unet.compile()


def peer(model: Any) -> StableDiffusionInstructPix2PixPipeline:
    """diffusers' pipeline around copies of the networks, with its own attention."""
    kind = {"eps": "epsilon", "v": "v_prediction"}[model.spec.prediction]
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=kind,
        timestep_spacing="linspace",
    )
    unet = copy.deepcopy(model.unet)
    unet.set_attn_processor(AttnProcessor2_0())
    pipe = StableDiffusionInstructPix2PixPipeline(
        vae=copy.deepcopy(model.autoencoder),
        text_encoder=model.text_encoders[0],
        tokenizer=CLIPTokenizer(
            vocab=clip_tokenizer().get_vocab(), merges=merges(), model_max_length=77, pad_token="<|endoftext|>"
        ),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd15(
    device: torch.device, dtype: torch.dtype, width: int = 320, classes: Any = model, *, shallow: bool = False
) -> Any:
    """Stable Diffusion 1.5's layers with random weights: time and memory do not depend on what they are.

    ``shallow``: two levels of one layer each, which are soon compiled.
    """
    torch.manual_seed(0)
    channels, inner = (width, 2 * width, 4 * width, 4 * width), max(32, 2 * width // 5 // 32 * 32)
    kind = {"in_channels": 8, "cross_attention_dim": 768, "attention_head_dim": 8, **(SHALLOW if shallow else {})}
    unet = UNet2DConditionModel(block_out_channels=channels[: 2 if shallow else 4], **kind)
    autoencoder = AutoencoderKL(
        block_out_channels=(inner, 2 * inner, 4 * inner, 4 * inner),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=0.18215,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=2 if shallow else 12,
            num_attention_heads=12,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    for module in (unet, autoencoder, text):
        module.eval().requires_grad_(False).to(device, dtype)
    spec = classes.ModelSpec(
        family="sd1",
        in_channels=8,
        prediction="eps",
        scaled_condition=False,
        latent_scale=0.18215,
        text_cfg=7.5,
        image_cfg=1.5,
        resolution=512,
        steps=100,
    )
    return classes.Model(spec=spec, unet=unet, autoencoder=autoencoder, text_encoders=(text,))


if __name__ == "__main__":
    main()
