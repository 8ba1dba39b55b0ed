"""Everything on a GPU in about eight minutes, one stage after another, as JSON.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --stages eager compiled --out again.json
    python benchmarks/gpu.py --device cpu --small --out small.json     # every stage, at sizes that a CPU can do

The file is written anew after each stage, and a stage that fails leaves its error there and does not end the others.
diffusers' pipeline has weights of its own, so that neither side is changed by how the other is set up; compiled, it is
set up as an expert would: channels_last, fused projections, its own compile. Ours and theirs run in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from edit import machine, measure, peer, sd15
from pairs import copied_logits, engine
from pairs import sd15 as text_to_image
from PIL import Image

from ip2p_engine import InstructPix2Pix
from ip2p_engine.networks.conditioning import decode_latents, encode_image, encode_text

TEXT = "make it snow"
UNET_TFLOP = 0.803  # a branch and a step of SD1.5 at 512 pixels, docs/benchmarks.md


def main() -> None:
    options = parse()
    options.sizes = {"edge": 512, "side": 64, "steps": 2} if options.small else {"edge": 8192, "side": 512, "steps": 20}
    found: dict[str, Any] = {"machine": machine(options)}
    for name in options.stages:
        started = time.perf_counter()
        try:
            found[name] = STAGES[name](options)
        except Exception as error:  # a stage that fails does not end the others
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        found[name]["took"] = round(time.perf_counter() - started, 1)
        options.out.write_text(json.dumps(found, indent=1))
        print(json.dumps({name: found[name]}), flush=True)


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="float16" if cuda else "float32")
    parser.add_argument("--small", action="store_true", help="small networks and pictures, to try every stage")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    return parser.parse_args()


def reach(options: argparse.Namespace) -> dict:
    """What the card does at best: a product, a convolution, a copy."""
    edge, kind = options.sizes["edge"], {"device": options.device, "dtype": getattr(torch, options.dtype)}
    matrix = torch.randn(edge, edge, **kind)
    picture = torch.randn(8, 320, edge // 128, edge // 128, **kind)
    conv = torch.nn.Conv2d(320, 320, 3, padding=1, **kind)
    with torch.inference_mode():
        product = best(lambda: matrix @ matrix, options)
        convolved = best(lambda: conv(picture), options)
        copied = best(matrix.clone, options)
    flop = 2 * picture[:, 0].numel() * 320 * 320 * 9
    return {
        "product_tflops": 2 * edge**3 / product / 1e12,
        "convolution_tflops": flop / convolved / 1e12,
        "copy_gb_per_second": 2 * matrix.numel() * matrix.itemsize / copied / 1e9,
    }


def eager(options: argparse.Namespace) -> dict:
    """Ours and diffusers', batch 1 and 8."""
    editor, pipe = InstructPix2Pix(model_of(options)), peer(model_of(options))
    return {f"batch {n}": in_turn(options, n, ours(editor, options, n), theirs(pipe, options, n)) for n in (1, 8)}


def compiled(options: argparse.Namespace) -> dict:
    """Both compiled; ours by repeated blocks and whole."""
    pipe = peer(model_of(options))
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.unet.fuse_qkv_projections()
    pipe.unet.compile(mode="reduce-overhead" if options.device == "cuda" else "default")
    rows = {}
    for mode in ("repeated", "max"):
        editor = InstructPix2Pix(model_of(options))
        editor.compile(mode)
        rows[f"{mode}, batch 1"] = in_turn(options, 1, ours(editor, options, 1), theirs(pipe, options, 1))
        if mode == "max":
            rows["max, batch 8, alone"] = in_turn(options, 8, ours(editor, options, 8))
    return rows


def profile(options: argparse.Namespace) -> dict:
    """One edit: kernels, and the share of the time in which the device works."""
    run = ours(InstructPix2Pix(model_of(options)), options, 1)
    run()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if options.device == "cuda" else []
    started = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as profiler:
        run()
    seconds = time.perf_counter() - started
    on_card = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.device_time for event in on_card) / 1e6
    return {"kernels": len(on_card), "operations": len(profiler.events()), "busy": busy / seconds}


def parts(options: argparse.Namespace) -> dict:
    """The autoencoder and the text encoder alone, a picture or a text."""
    model, side = model_of(options), options.sizes["side"]
    pixels, z = torch.zeros(1, 3, side, side), torch.zeros(1, 4, side // 8, side // 8, device=options.device)
    return {
        "encode": best(lambda: encode_image(model, pixels), options),
        "decode": best(lambda: decode_latents(model, z), options),
        "text": best(lambda: encode_text(model, [TEXT]), options),
    }


def pairs(options: argparse.Namespace) -> dict:
    """Pairs against copied logits, at fewer steps than the paper's 100."""
    options.pixels, options.steps = options.sizes["side"], options.sizes["steps"]
    count, width = (1, 32) if options.small else (8, 320)
    model = text_to_image(torch.device(options.device), getattr(torch, options.dtype), width)
    seeds = list(range(count))
    run, slow = (lambda: engine(model, options, seeds, None)), (lambda: copied_logits(model, options, seeds))
    return in_turn(options, count, run, slow)


STAGES: dict[str, Callable[[argparse.Namespace], dict]] = {
    "reach": reach,
    "eager": eager,
    "profile": profile,
    "compiled": compiled,
    "parts": parts,
    "pairs": pairs,
}


def model_of(options: argparse.Namespace) -> Any:
    """Random weights of SD1.5's size, the same each time; small: its layers at 64 channels."""
    kind = torch.device(options.device), getattr(torch, options.dtype)
    return sd15(*kind, 64) if options.small else sd15(*kind)


def ours(editor: InstructPix2Pix, options: argparse.Namespace, batch: int) -> Callable[[], Any]:
    size = (options.sizes["side"],) * 2
    settings: dict[str, Any] = {"size": size, "steps": options.sizes["steps"], "seeds": list(range(batch))}
    return lambda: editor.edit(Image.new("RGB", size, "red"), TEXT, text_cfg=7.5, image_cfg=1.5, **settings)


def theirs(pipe: Any, options: argparse.Namespace, batch: int) -> Callable[[], Any]:
    picture, steps = Image.new("RGB", (options.sizes["side"],) * 2, "red"), options.sizes["steps"]
    scales = {"guidance_scale": 7.5, "image_guidance_scale": 1.5}
    return lambda: pipe(TEXT, image=picture, num_inference_steps=steps, num_images_per_prompt=batch, **scales)


def in_turn(options: argparse.Namespace, batch: int, run: Callable, other: Callable | None = None) -> dict:
    """Medians over the runs after a warm-up of each, and of the paired ratios."""
    ways = [way for way in (run, other) if way is not None]
    first = [measure(way, torch.device(options.device))[0] for way in ways]
    rows = [[measure(way, torch.device(options.device)) for way in ways] for _ in range(options.runs)]
    row: dict[str, Any] = {"seconds": statistics.median(r[0][0] for r in rows), "first": first}
    row["peak_mb"] = [statistics.median(r[n][1] for r in rows) for n in range(len(ways))]
    if options.sizes["side"] == 512 and not options.small:
        row["unet_tflops"] = 3 * UNET_TFLOP * options.sizes["steps"] * batch / row["seconds"]
    if other is not None:
        row["times_the_other"] = statistics.median(theirs[0] / ours[0] for ours, theirs in rows)
    return row


def best(run: Callable, options: argparse.Namespace) -> float:
    """The least seconds of some runs."""
    run()
    return min(measure(run, torch.device(options.device))[0] for _ in range(options.runs + 2))


if __name__ == "__main__":
    main()
