"""Editing: ours against diffusers' StableDiffusionInstructPix2PixPipeline; same weights, schedule, type and process.

    python benchmarks/edit.py                                   # the embedded model, then SD1.5 size, on this machine
    python benchmarks/edit.py --device cuda --dtype float16 --sizes sd15 --pixels 512 --steps 50 --compile

Runs alternate (ours, theirs, ours, ...) after a warm-up, so a drifting machine slows both; medians and the median of
the paired ratios are printed, with the evaluations each needs and the memory that each adds at its peak.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ip2p_engine import InstructPix2Pix
from ip2p_engine.networks.model import Model, ModelSpec, load_model
from ip2p_engine.scenes.world import Scene, render
from ip2p_engine.tokenizer import clip_tokenizer, merges

GUIDANCE = {"both": (7.5, 1.5), "image_cfg 1": (7.5, 1.0), "equal": (2.0, 2.0)}


def main() -> None:
    options = parse()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    for size in options.sizes:
        model = (
            load_model("embedded", device=device, dtype=dtype)
            if size == "embedded"
            else sd15(device, dtype, options.width)
        )
        pixels = 64 if size == "embedded" else options.pixels
        picture = render(Scene(shape="heart", colour="red", background="sky", size="large")).resize((pixels, pixels))
        for name, (text_cfg, image_cfg) in GUIDANCE.items():
            row = compare(model, picture, options, text_cfg, image_cfg)
            print(json.dumps({"size": size, "pixels": pixels, "guidance": name, **row}), flush=True)
    print(json.dumps(machine(options)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=("embedded", "sd15"), default=["embedded", "sd15"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--pixels", type=int, default=512 if torch.cuda.is_available() else 256)
    parser.add_argument("--steps", type=int, default=20 if torch.cuda.is_available() else 4)
    parser.add_argument("--width", type=int, default=320, help="channels of the first level; SD1.5: 320")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile ours (CUDA graphs)")
    return parser.parse_args()


def compare(model: Model, picture: Image.Image, options, text_cfg: float, image_cfg: float) -> dict:
    """Time both, in turn, and say how far their pictures are apart."""
    steps = options.steps if picture.width > 64 else 20
    editor = InstructPix2Pix(model)
    if options.compile:
        editor.compile()
    pipe = peer(model)

    def ours() -> np.ndarray:
        result = editor.edit(
            picture, "make it snow", seeds=1, steps=steps, text_cfg=text_cfg, image_cfg=image_cfg, size=picture.size
        )[0]
        ours.evaluations = result.evaluations
        return np.asarray(result.image)

    def theirs() -> np.ndarray:
        generator = torch.Generator().manual_seed(1)
        output = pipe(
            "make it snow",
            image=picture,
            num_inference_steps=steps,
            guidance_scale=text_cfg,
            image_guidance_scale=image_cfg,
            generator=generator,
        )
        return np.asarray(output.images[0])

    apart = np.abs(ours().astype(int) - theirs().astype(int)).mean()
    a, b = zip(
        *[(measure(ours, model.device), measure(theirs, model.device)) for _ in range(options.runs)], strict=True
    )
    return {
        "steps": steps,
        "ours_seconds": median(a, 0),
        "diffusers_seconds": median(b, 0),
        "speed_ratio": statistics.median(theirs[0] / ours[0] for ours, theirs in zip(a, b, strict=True)),
        "ours_evaluations": ours.evaluations,
        "diffusers_evaluations": 3 * steps,
        "ours_peak_mb": median(a, 1),
        "diffusers_peak_mb": median(b, 1),
        "mean_difference_of_255": float(apart),
    }


def median(rows, column: int) -> float:
    return round(statistics.median(row[column] for row in rows), 3)


def measure(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(seconds, megabytes added at the peak)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - started, (torch.cuda.max_memory_allocated() - before) / 2**20
    before, peak, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return seconds, max(0.0, peak[0] - before)


def resident() -> float:
    """This process's resident memory in megabytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def peer(model: Model) -> StableDiffusionInstructPix2PixPipeline:
    """diffusers' pipeline around the very same modules."""
    kind = {"eps": "epsilon", "v": "v_prediction"}[model.spec.prediction]
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=kind,
        timestep_spacing="linspace",
    )
    pipe = StableDiffusionInstructPix2PixPipeline(
        vae=model.autoencoder,
        text_encoder=model.text_encoders[0],
        tokenizer=CLIPTokenizer(
            vocab=clip_tokenizer().get_vocab(), merges=merges(), model_max_length=77, pad_token="<|endoftext|>"
        ),
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd15(device: torch.device, dtype: torch.dtype, width: int = 320) -> Model:
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
    spec = ModelSpec(
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
    return Model(spec=spec, unet=unet, autoencoder=autoencoder, text_encoders=(text,))


def machine(options) -> dict:
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


if __name__ == "__main__":
    main()
