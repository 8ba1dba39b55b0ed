"""Everything on a GPU in about eight minutes, one stage after another, as JSON.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --stages eager compiled --out again.json
    python benchmarks/gpu.py --device cpu --small --out small.json     # every stage, at sizes that a CPU can do

The file is written anew after each stage, and a stage that fails leaves its error there and does not end the others.
diffusers' pipeline has weights of its own, so that neither side is changed by how the other is set up; compiled, it is
set up as an expert would: channels_last, fused projections, its own compile. Ours and theirs run in turn. With --small
nothing is a measurement: it shows that each stage runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from edit import compile_as_an_expert, peer, sd15
from measuring import in_turn, machine, measure, middle, ratios
from pairs import copied_logits, engine
from pairs import sd15 as text_to_image
from PIL import Image

from ip2p_engine import InstructPix2Pix
from ip2p_engine.clip.similarity import ClipSimilarity
from ip2p_engine.networks.conditioning import decode_latents, encode_image, encode_text

ROOT = Path(__file__).parent.parent
TEXT = "make it snow"
UNET_TFLOP = 0.803  # a branch and a step of SD1.5 at 512 pixels, docs/benchmarks.md
SCALES = {"both": (7.5, 1.5), "image_cfg 1": (7.5, 1.0), "equal": (2.0, 2.0)}
WHOLE = {"edge": 8192, "side": 512, "steps": 20, "long": 100, "many": 8, "clip": 256}
SMALL = {"edge": 512, "side": 64, "steps": 2, "long": 3, "many": 2, "clip": 8}
TESTS = ("tests/engine/test_gpu.py", "tests/train/test_gpu.py")


def main() -> None:
    options = parse()
    options.sizes = SMALL if options.small else WHOLE
    found: dict[str, Any] = {"machine": {**machine(options), "small": options.small}}
    for name in options.stages:
        started = time.perf_counter()
        try:
            found[name] = STAGES[name](options, found)
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
    parser.add_argument("--tests-seconds", type=float, default=360, help="limit of the tests; a CPU needs more")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    return parser.parse_args()


def reach(options: argparse.Namespace, found: dict) -> dict:
    """What the card does at best: a product, a convolution, a copy."""
    edge, kind = options.sizes["edge"], {"device": options.device, "dtype": getattr(torch, options.dtype)}
    matrix = torch.randn(edge, edge, **kind)
    picture = torch.randn(8, 320, edge // 128, edge // 128, **kind).to(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(320, 320, 3, padding=1, **kind).to(memory_format=torch.channels_last)
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


def tests(options: argparse.Namespace, found: dict) -> dict:
    """``pytest -m gpu``, what it says at its end; without a GPU the same on the CPU."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if options.device == "cpu":
        environment["IP2P_GPU_TESTS_ON"] = "cpu"
    chosen = "gpu and not slow" if options.small else "gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-m", chosen, "-p", "no:cacheprovider", *TESTS]
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=options.tests_seconds
        )
    except subprocess.TimeoutExpired as error:
        return {"failed": f"longer than {error.timeout:.0f} s; --tests-seconds says how long they may take"}
    lines = run.stdout.strip().splitlines() or [run.stderr.strip()]
    return {"result": lines[-1], "failures": [line for line in lines if re.match("FAILED|ERROR", line)]}


def eager(options: argparse.Namespace, found: dict) -> dict:
    """Ours and diffusers', batch 1 and 8, fewer branches, and the paper's 100 steps."""
    editor, pipe, many = InstructPix2Pix(model_of(options)), peer(model_of(options)), options.sizes["many"]
    rows = {
        f"batch {n}": timed(options, n, ours(editor, options, n), theirs(pipe, options, n), found) for n in (1, many)
    }
    for name in list(SCALES)[1:]:
        ways = (ours(editor, options, 1, name), theirs(pipe, options, 1, name))
        rows[f"batch 1, {name}"] = timed(options, 1, *ways, found, branches=2)
    steps = options.sizes["long"]
    rows[f"batch 1, {steps} steps"] = timed(options, 1, ours(editor, options, 1, steps=steps), None, found, steps=steps)
    return rows


def compiled(options: argparse.Namespace, found: dict) -> dict:
    """Both compiled; ours by repeated blocks and whole."""
    pipe, many = peer(model_of(options)), options.sizes["many"]
    compile_as_an_expert(pipe, options.device)
    rows = {}
    for mode in ("repeated", "max"):
        editor = InstructPix2Pix(model_of(options))
        editor.compile(mode)
        rows[f"{mode}, batch 1"] = timed(options, 1, ours(editor, options, 1), theirs(pipe, options, 1), found)
        if mode == "max":
            rows[f"max, batch {many}, alone"] = timed(options, many, ours(editor, options, many), None, found)
            steps = options.sizes["long"]
            run = ours(editor, options, 1, steps=steps)
            rows[f"max, batch 1, {steps} steps, alone"] = timed(options, 1, run, None, found, steps=steps)
    return rows


def profile(options: argparse.Namespace, found: dict) -> dict:
    """One edit of each: operations, kernels, copies that wait, and the share of the time in which the device works."""
    ways = {
        "ours": ours(InstructPix2Pix(model_of(options)), options, 1),
        "diffusers": theirs(peer(model_of(options)), options, 1),
    }
    return {name: _profiled(run, options) for name, run in ways.items()}


def _profiled(run: Callable, options: argparse.Namespace) -> dict:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if options.device == "cuda" else []
    run()
    started = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as profiler:
        run()
    seconds, events = time.perf_counter() - started, profiler.events()
    on_card = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "operations": sum(event.name.startswith("aten::") for event in events),
        "kernels": len(on_card),
        "waits": sum("Synchronize" in event.name for event in events),
        "busy": sum(event.device_time for event in on_card) / 1e6 / seconds,
    }


def parts(options: argparse.Namespace, found: dict) -> dict:
    """The autoencoder and the text encoder alone: seconds a picture or a text."""
    model, side = model_of(options), options.sizes["side"]
    pixels, z = torch.zeros(1, 3, side, side), torch.zeros(1, 4, side // 8, side // 8, device=options.device)
    rows = {
        "encode": best(lambda: encode_image(model, pixels), options),
        "decode": best(lambda: decode_latents(model, z), options),
        "decode 4": best(lambda: decode_latents(model, z.expand(4, -1, -1, -1)), options) / 4,
        "text": best(lambda: encode_text(model, [TEXT]), options),
    }
    model.autoencoder.to(memory_format=torch.channels_last)
    return {**rows, "decode, channels_last": best(lambda: decode_latents(model, z), options)}


def clip(options: argparse.Namespace, found: dict) -> dict:
    """Pairs that the filter scores in a second, by a ViT-L/14 of random weights (small: the embedded CLIP)."""
    scorer, count, side = _scorer(options), options.sizes["clip"], options.sizes["side"]
    pixels = torch.rand(count, 3, side, side)
    captions = [f"a hill, number {n}" for n in range(count)]
    seconds = best(lambda: scorer.score(pixels, pixels, captions, captions), options)
    return {"pairs_per_second": count / seconds}


def _scorer(options: argparse.Namespace) -> ClipSimilarity:
    if options.small:
        return ClipSimilarity.load("embedded", device=options.device)
    import open_clip

    network = open_clip.create_model("ViT-L-14", pretrained=None, force_quick_gelu=True).to(options.device)
    return ClipSimilarity(network, size=224, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))


def pairs(options: argparse.Namespace, found: dict) -> dict:
    """Pairs against copied logits, at fewer steps than the paper's 100: ``steps_scaled`` says how many."""
    options.pixels, options.steps = options.sizes["side"], options.sizes["steps"]
    count, width = options.sizes["many"], 32 if options.small else 320
    model = text_to_image(torch.device(options.device), getattr(torch, options.dtype), width)
    seeds = list(range(count))
    ways = ((lambda: engine(model, options, seeds, None)), (lambda: copied_logits(model, options, seeds)))
    return {"steps_scaled": options.steps, **timed(options, count, *ways, found)}


def training(options: argparse.Namespace, found: dict) -> dict:
    """benchmarks/train.py: the example script with 0 and 8 workers; ours, cached, and both compiled."""
    words = ["--device", options.device, "--rounds", "1"]
    if options.small:
        words += ["--width", "32", "--vae", "32", "--pixels", "64", "--batch", "2", "--steps", "2"]
        words += ["--shallow", "--compile"]
    else:
        words += ["--width", "320", "--vae", "128", "--pixels", "256", "--batch", "32", "--steps", "12"]
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *words]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if run.returncode:
        return {"failed": run.stderr[-2000:]}
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {row.pop("way"): row for row in rows if "way" in row}


STAGES: dict[str, Callable[[argparse.Namespace, dict], dict]] = {
    "reach": reach,
    "tests": tests,
    "eager": eager,
    "profile": profile,
    "compiled": compiled,
    "parts": parts,
    "clip": clip,
    "pairs": pairs,
    "training": training,
}


def model_of(options: argparse.Namespace) -> Any:
    """Random weights of SD1.5's size, the same each time; small: a few layers of 32 channels."""
    kind = torch.device(options.device), getattr(torch, options.dtype)
    return sd15(*kind, 32, shallow=True) if options.small else sd15(*kind)


def ours(
    editor: InstructPix2Pix, options: argparse.Namespace, batch: int, scales: str = "both", steps: int | None = None
) -> Callable[[], Any]:
    size, (text_cfg, image_cfg) = (options.sizes["side"],) * 2, SCALES[scales]
    settings: dict[str, Any] = {"size": size, "steps": steps or options.sizes["steps"], "seeds": list(range(batch))}
    return lambda: editor.edit(Image.new("RGB", size, "red"), TEXT, text_cfg=text_cfg, image_cfg=image_cfg, **settings)


def theirs(pipe: Any, options: argparse.Namespace, batch: int, scales: str = "both") -> Callable[[], Any]:
    picture, steps = Image.new("RGB", (options.sizes["side"],) * 2, "red"), options.sizes["steps"]
    told = dict(zip(("guidance_scale", "image_guidance_scale"), SCALES[scales], strict=True))
    return lambda: pipe(TEXT, image=picture, num_inference_steps=steps, num_images_per_prompt=batch, **told)


def timed(
    options: argparse.Namespace,
    batch: int,
    run: Callable,
    other: Callable | None,
    found: dict,
    *,
    branches: int = 3,
    steps: int | None = None,
) -> dict:
    """Medians over the runs after a warm-up of each, paired ratios, and the share of what the card reaches."""
    device = torch.device(options.device)
    ways = {"ours": run} if other is None else {"ours": run, "other": other}
    first = {name: round(measure(way, device).seconds, 3) for name, way in ways.items()}
    rounds = in_turn(ways, device, options.runs)
    row: dict[str, Any] = {"first": first}
    for name in ways:
        row[f"{name}_seconds"] = statistics.median(one[name].seconds for one in rounds)
        row[f"{name}_peak_mb"] = middle([one[name].peak for one in rounds])
    if other is not None:
        faster = ratios(rounds, "ours", "other")
        row["times_the_other"] = [faster[0], middle(faster), faster[-1]]
    if not options.small:
        tflops = branches * UNET_TFLOP * (steps or options.sizes["steps"]) * batch / row["ours_seconds"]
        row["unet_tflops"] = tflops
        if "product_tflops" in found.get("reach", {}):
            row["share_of_reach"] = tflops / found["reach"]["product_tflops"]
    return row


def best(run: Callable, options: argparse.Namespace) -> float:
    """The least seconds of some runs."""
    run()
    return min(measure(run, torch.device(options.device)).seconds for _ in range(options.runs + 2))


if __name__ == "__main__":
    main()
