"""Editing: ours against diffusers' StableDiffusionInstructPix2PixPipeline; same weights, schedule, type and process.

    python benchmarks/edit.py                                   # the embedded model, then SD1.5 size, on this machine
    python benchmarks/edit.py --sizes embedded sd15 --width 64 --steps 4 --engine /path/to/another/checkout
    python benchmarks/edit.py --device cuda --dtype float16 --sizes sd15 --pixels 512 --steps 50 --compile

The pipeline has a copy of the weights with diffusers' own attention, so that neither side is changed by how the other
is set up; with --compile both are compiled, the pipeline as an expert would on that device. Runs alternate (ours,
theirs, ours, ...) after a warm-up, so a drifting machine slows both; medians, and the least, the median and the most of
the paired ratios are printed, by the clock and by the process's own processor time, with the memory that each adds at
its peak. --engine runs this checkout and another in processes in turn and prints what was gained.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import json
import os
import subprocess
import sys
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

from ip2p_engine import InstructPix2Pix
from ip2p_engine.scenes.world import Scene, render
from ip2p_engine.tokenizer import clip_tokenizer, merges

GUIDANCE = {"both": (7.5, 1.5), "image_cfg 1": (7.5, 1.0), "equal": (2.0, 2.0)}
ROOT = Path(__file__).parent.parent
TEXT = "make it snow"
VIEWS = {"_unsafe_view", "_reshape_alias", "empty", "lift_fresh", "detach"}


def engine(*names: str) -> Any:
    """The first of the engine's modules that is there: rooms have moved since 0.1."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(f"ip2p_engine.{name}")
    raise ModuleNotFoundError(names)


MODEL = engine("networks.model", "model")


def main() -> None:
    options = parse()
    if options.engine:
        against(options)
        return
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    for size in options.sizes:
        small = size == "embedded"
        pixels = 64 if small else options.pixels
        picture = render(Scene(shape="heart", colour="red", background="sky", size="large")).resize((pixels, pixels))
        for name in options.guidance:
            # A model of its own for each row: what is compiled stays so.
            model = (
                MODEL.load_model("embedded", device=device, dtype=dtype)
                if small
                else sd15(device, dtype, options.width)
            )
            row = (operations if options.operations else compare)(model, picture, options, *GUIDANCE[name])
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
    parser.add_argument("--engine", type=Path, help="another checkout, to be run in turn with this one")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each checkout")
    parser.add_argument("--operations", action="store_true", help="count the operations of a step, and time nothing")
    return parser.parse_args()


def against(options: argparse.Namespace) -> None:
    """This checkout and another in turn, in processes of their own, and how much more often ours is faster now."""
    words = list(sys.argv[1:])
    at = words.index("--engine")
    del words[at : at + 2]
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(options.rounds):
        for name, checkout in (("before", options.engine), ("now", ROOT)):
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            run = subprocess.run([sys.executable, __file__, *words], env=environment, capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr[-2000:])
            for row in map(json.loads, run.stdout.splitlines()[:-1]):
                key = f"{row['size']}, {row['guidance']}"
                found.setdefault(key, {}).setdefault(name, []).append(row["cpu_ratios"][1])
                print(json.dumps({"round": number, "checkout": name, **row}), flush=True)
    for key, ways in found.items():
        gain = middle(ways["now"]) - middle(ways["before"])
        print(json.dumps({"row": key, **{name: sorted(rows) for name, rows in ways.items()}, "gain": round(gain, 3)}))


def compare(model: Any, picture: Image.Image, options: argparse.Namespace, text_cfg: float, image_cfg: float) -> dict:
    """Time both, in turn, and say how far their pictures are apart."""
    steps = options.steps if picture.width > 64 else 20
    pipe, editor = peer(model), InstructPix2Pix(model)
    if options.compile:
        editor.compile(options.compile_mode)
        compile_as_an_expert(pipe, options.device)
    evaluations = []

    def ours() -> np.ndarray:
        scales = {"text_cfg": text_cfg, "image_cfg": image_cfg}
        result = editor.edit(picture, TEXT, seeds=1, steps=steps, size=picture.size, **scales)[0]
        evaluations.append(result.evaluations)
        return np.asarray(result.image)

    def theirs() -> np.ndarray:
        scales = {"guidance_scale": text_cfg, "image_guidance_scale": image_cfg}
        generator = torch.Generator().manual_seed(1)
        output = pipe(TEXT, image=picture, num_inference_steps=steps, generator=generator, **scales)
        return np.asarray(output.images[0])

    apart = np.abs(ours().astype(int) - theirs().astype(int)).mean()
    rounds = in_turn({"ours": ours, "diffusers": theirs}, model.device, options.runs)
    row: dict[str, Any] = {"steps": steps}
    for way in ("ours", "diffusers"):
        row[f"{way}_seconds"] = middle([one[way].seconds for one in rounds])
        row[f"{way}_cpu"] = middle([one[way].cpu for one in rounds])
        row[f"{way}_peak_mb"] = middle([one[way].peak for one in rounds])
    for name, what in (("ratios", "seconds"), ("cpu_ratios", "cpu")):
        found = ratios(rounds, "ours", "diffusers", what)
        row[name] = [found[0], middle(found), found[-1]]
    row |= {"ours_evaluations": evaluations[-1], "diffusers_evaluations": 3 * steps}
    return {**row, "mean_difference_of_255": float(apart)}


def operations(
    model: Any, picture: Image.Image, options: argparse.Namespace, text_cfg: float, image_cfg: float
) -> dict:
    """Tensor operations of a step that are no mere views, as a device is given them: of 4 steps less 2, over 2."""
    pipe, editor = peer(model), InstructPix2Pix(model)
    scales = {"guidance_scale": text_cfg, "image_guidance_scale": image_cfg}

    def ours(steps: int) -> None:
        editor.edit(picture, TEXT, steps=steps, size=picture.size, text_cfg=text_cfg, image_cfg=image_cfg)

    def theirs(steps: int) -> None:
        pipe(TEXT, image=picture, num_inference_steps=steps, **scales)

    return {"ours": _a_step(ours), "diffusers": _a_step(theirs)}


def _a_step(run: Any) -> float:
    counts = []
    for steps in (2, 4):
        with Operations() as counted:
            run(steps)
        counts.append(counted.count)
    return (counts[1] - counts[0]) / 2


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


def sd15(device: torch.device, dtype: torch.dtype, width: int = 320) -> Any:
    """Stable Diffusion 1.5's layers with random weights: time and memory do not depend on what they are."""
    torch.manual_seed(0)
    channels, inner = (width, 2 * width, 4 * width, 4 * width), max(32, 2 * width // 5 // 32 * 32)
    unet = UNet2DConditionModel(
        in_channels=8, block_out_channels=channels, cross_attention_dim=768, attention_head_dim=8
    )
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
            num_hidden_layers=12,
            num_attention_heads=12,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    for module in (unet, autoencoder, text):
        module.eval().requires_grad_(False).to(device, dtype)
    spec = MODEL.ModelSpec(
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
    return MODEL.Model(spec=spec, unet=unet, autoencoder=autoencoder, text_encoders=(text,))


if __name__ == "__main__":
    main()
