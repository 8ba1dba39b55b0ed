"""Prompt-to-Prompt pairs: sharing queries and keys in batches, against copying logits, against a batch of one.

    python benchmarks/pairs.py                                  # 512 pixels at reduced width, on this machine
    python benchmarks/pairs.py --device cuda --dtype float16 --width 320 --pairs 16 --steps 20

All run on the same random weights in one process, in turn after a warm-up, so a drifting machine slows all; medians and
the median of the paired ratios are printed, with the memory that each adds at its peak. 512 pixels are 4096 places in
the widest layers: the logits of one pair and one such layer take 4 x 8 x 4096 x 4096 numbers, which is what the
original copies.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from measuring import Taken, in_turn, machine, middle, ratios
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ip2p_engine.diffusion.noise import SampleNoise
from ip2p_engine.diffusion.schedule import make_sigmas
from ip2p_engine.networks.conditioning import encode_text
from ip2p_engine.networks.model import Model, ModelSpec
from ip2p_engine.p2p.generator import PairConfig, PairGenerator, PairJob, draw_settings, pairs_that_fit

CAPTION, EDITED = "photograph of a girl riding a horse", "photograph of a girl riding a dragon"
SLOW = Path(__file__).parent.parent / "tests" / "slow_pairs.py"


def main() -> None:
    options = parse()
    model = sd15(torch.device(options.device), getattr(torch, options.dtype), options.width)
    seeds = list(range(options.pairs))
    ways = {
        "ours": lambda: engine(model, options, seeds, options.batch_pairs),
        "batch of one": lambda: engine(model, options, seeds, 1),
        "copied logits": lambda: copied_logits(model, options, seeds),
    }
    results = {name: run() for name, run in ways.items()}
    apart = {name: float((z - results["ours"]).abs().max()) for name, z in results.items()}
    runs = in_turn(ways, model.device, options.runs)
    for name in ways:
        print(json.dumps({"way": name, **row(name, runs, options), "difference": apart[name]}), flush=True)
    print(json.dumps({**machine(options), "width": options.width, "pixels": options.pixels}))


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="float16" if cuda else "float32")
    parser.add_argument(
        "--width", type=int, default=320 if cuda else 32, help="channels of the first level; SD1.5: 320"
    )
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=16 if cuda else 2)
    parser.add_argument("--batch-pairs", type=int, help="ours; default: as many as fit")
    parser.add_argument("--steps", type=int, default=20 if cuda else 2)
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args()


@torch.inference_mode()
def engine(model: Model, options: argparse.Namespace, seeds: list[int], batch: int | None) -> Tensor:
    """The engine's way to the clean latents; decoding is the same for all and left out."""
    generator = PairGenerator(model, PairConfig(steps=options.steps, size=(options.pixels,) * 2))
    jobs = [PairJob(caption=CAPTION, edited_caption=EDITED, seed=seed) for seed in seeds]
    count = batch or pairs_that_fit(model, generator.size)
    return torch.cat([generator.latents(jobs[n : n + count]).cpu() for n in range(0, len(jobs), count)])


@torch.inference_mode()
def copied_logits(model: Model, options: argparse.Namespace, seeds: list[int]) -> Tensor:
    """One pair after another, every map materialised and the logits copied, as in the original."""
    slow = load_slow()
    texts = encode_text(model, ["", CAPTION, EDITED]).tokens
    sigmas = make_sigmas("model", model.schedule, options.steps).tolist()
    pairs = []
    for seed in seeds:
        (p, w), noise = draw_settings(seed), SampleNoise([seed])
        like = torch.empty(1, 4, options.pixels // 8, options.pixels // 8, device=model.device)
        noises = [noise.draw(like) for _ in range(options.steps)]
        pairs.append(slow.slow_pair(model, texts, p, w, sigmas, noises).float().cpu())
    return torch.stack(pairs)


def load_slow():
    """The slow way that the tests hold the engine against."""
    spec = importlib.util.spec_from_file_location("slow_pairs", SLOW)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(name: str, runs: list[dict[str, Taken]], options: argparse.Namespace) -> dict:
    seconds = statistics.median(run[name].seconds for run in runs)
    peak, ours = (statistics.median(run[way].peak for run in runs) for way in (name, "ours"))
    faster = ratios(runs, "ours", name)
    return {
        "pairs": options.pairs,
        "steps": options.steps,
        "seconds": round(seconds, 3),
        "pairs_per_second": round(options.pairs / seconds, 4),
        "peak_mb": round(peak, 1),
        "speed_of_ours": [faster[0], middle(faster), faster[-1]],
        "memory_of_ours": round(ours / peak, 3) if peak else None,
    }


def sd15(device: torch.device, dtype: torch.dtype, width: int) -> Model:
    """Stable Diffusion 1.5's layers with random weights; ``width`` 320 is its size, less is its shape in small."""
    torch.manual_seed(0)
    channels = (width, 2 * width, 4 * width, 4 * width)
    unet = UNet2DConditionModel(block_out_channels=channels, cross_attention_dim=768, attention_head_dim=8)
    autoencoder = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, num_hidden_layers=1, num_attention_heads=12, eos_token_id=49407)
    )
    for module in (unet, autoencoder, text):
        module.eval().requires_grad_(False).to(device, dtype)
    spec = ModelSpec(
        family="sd1",
        in_channels=4,
        prediction="eps",
        scaled_condition=False,
        latent_scale=0.18215,
        text_cfg=7.5,
        image_cfg=1.0,
        resolution=512,
        steps=100,
    )
    return Model(spec=spec, unet=unet, autoencoder=autoencoder, text_encoders=(text,))


if __name__ == "__main__":
    main()
