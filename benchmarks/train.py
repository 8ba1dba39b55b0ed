"""Training steps: this trainer, and with cached latents, against the step of diffusers' example script.

    python benchmarks/train.py                                        # reduced width on this machine
    python benchmarks/train.py --device cuda --dtype bfloat16 --width 320 --vae 128 --batch 32 --workers 8 --steps 30

The peer is diffusers' examples/instruct_pix2pix step for step, written anew: whole-batch transforms in the training
process, two passes of the autoencoder, the null text encoded in every step, AdamW, EMAModel, the loss gathered in every
step. All train the same random weights on the same pictures, batch and type, in turn in one process, so a drifting
machine slows all; medians over the rounds and the median of the paired ratios are printed. Ours is the whole of
``train()`` between two of its steps: decoding, drawing, logging and all. On a CPU the time is the process's own, so
that a busy machine does not blur it (leave --workers 0 there). Peak memory is what each adds. The peer runs without
workers, as the script does by default, and on a GPU with eight too, as an expert would; ours are compared with the
faster.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.training_utils import EMAModel
from edit import SHALLOW
from measuring import give_back_freed_memory, machine, middle, peak_resident, resident
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers import CLIPTextConfig, CLIPTextModel

from ip2p_engine.checkpoint.spec import recommended
from ip2p_engine.checkpoint.write import save_ldm
from ip2p_engine.data.store import PairRecord
from ip2p_engine.errors import Interrupted
from ip2p_engine.hooks import Hooks
from ip2p_engine.networks.model import Model, ModelSpec, load_model
from ip2p_engine.tokenizer import tokenize
from ip2p_engine.train import Progress, TrainConfig, train
from ip2p_engine.train.networks import widened

SCALE, WARM_UP, DROPOUT = 0.18215, 2, 0.05


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        base = save_ldm(sd15(options), home / "base.safetensors")
        pairs = make_pairs(options)
        rounds = [one_round(number, options, pairs, base, home) for number in range(options.rounds)]
    for way in rounds[0]:
        print(json.dumps(row(way, rounds, options)), flush=True)
    print(json.dumps({**machine(options), "batch": options.batch, "vae": options.vae}))


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16" if cuda else "float32"
    )
    parser.add_argument("--width", type=int, default=320 if cuda else 64, help="of the UNet; SD1.5: 320")
    parser.add_argument("--vae", type=int, default=128 if cuda else 32, help="of the autoencoder; SD1.5: 128")
    parser.add_argument("--shallow", action="store_true", help="a few layers, which are soon compiled")
    parser.add_argument("--pixels", type=int, default=256 if cuda else 128)
    parser.add_argument("--batch", type=int, default=32 if cuda else 4)
    parser.add_argument("--workers", type=int, default=8 if cuda else 0, help="ours")
    parser.add_argument(
        "--peer-workers", type=int, nargs="+", default=[0, 8] if cuda else [0], help="the script's default is 0"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="ours compiled as well")
    parser.add_argument("--steps", type=int, default=20 if cuda else 4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def one_round(number: int, options: argparse.Namespace, pairs: list[PairRecord], base: Path, home: Path) -> dict:
    """Every way once; ``peer`` is the faster of the peers, whichever number of workers that takes."""
    kinds: dict[str, dict[str, bool]] = {"ours": {}, "ours, cached": {"cache": True}}
    if options.compile:
        kinds |= {f"{name}, compiled": {**kind, "compile": True} for name, kind in kinds.items()}
    ways: dict[str, Callable] = {
        f"peer, {workers} workers": partial(peer, options, pairs, base, workers) for workers in options.peer_workers
    }
    for name, kind in kinds.items():
        ways[name] = partial(ours, options, pairs, base, home / f"{name}-{number}", **kind)
    return {name: measured(way, options) for name, way in ways.items()}


def measured(way: Callable[[Callable[[], None]], None], options: argparse.Namespace) -> tuple[float, float]:
    """(seconds a step, megabytes at the peak; on a CPU those that were added)."""
    gc.collect()
    give_back_freed_memory()
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before, ticks = resident(), []

    def tick() -> None:
        # Without waiting for a GPU, which both wait for as they read their losses.
        ticks.append(time.perf_counter() if cuda else time.process_time())

    with peak_resident() as peak:
        way(tick)
    pauses = [later - earlier for earlier, later in zip(ticks[WARM_UP - 1 :], ticks[WARM_UP:], strict=False)]
    return statistics.median(pauses), torch.cuda.max_memory_allocated() / 2**20 if cuda else peak[0] - before


def row(way: str, rounds: list[dict], options: argparse.Namespace) -> dict:
    seconds, peak = (statistics.median(each[way][part] for each in rounds) for part in (0, 1))
    best = [min(each[name][0] for name in each if name.startswith("peer")) for each in rounds]
    faster = sorted(round(peers / each[way][0], 3) for peers, each in zip(best, rounds, strict=True))
    return {
        "way": way,
        "samples_per_second": round(options.batch / seconds, 3),
        "times_the_best_peer": [faster[0], middle(faster), faster[-1]],
        "peak_mb": round(peak),
        "rounds": len(rounds),
    }


def ours(
    options: argparse.Namespace,
    pairs: list[PairRecord],
    base: Path,
    out: Path,
    tick: Callable[[], None],
    *,
    cache: bool = False,
    compile: bool = False,
) -> None:
    """``train()`` as it is, until its last steps; nothing is saved within."""
    config = TrainConfig(
        steps=options.steps + WARM_UP + 2,  # on a GPU the loss of the last but one is read with the last
        batch_size=options.batch,
        resolution=options.pixels,
        resize=(options.pixels, options.pixels * 9 // 8),
        workers=options.workers,
        precision=options.dtype,
        clip_norm=1.0,
        cache=cache,
        compile=compile,
        cache_variants=2,
        validate_every=0,
        save_every=10**6,
    )
    done = []

    def on_result(step: int, _: Progress) -> None:
        tick()
        done.append(step)
        if len(done) == options.steps + WARM_UP:
            raise Interrupted("enough")

    with suppress(Interrupted):
        train(config, data=pairs, base=base, out=out, device=options.device, hooks=Hooks(on_result=on_result))


def peer(
    options: argparse.Namespace, pairs: list[PairRecord], base: Path, workers: int, tick: Callable[[], None]
) -> None:
    """The step of the example script: same order of work, same libraries, weights in float32."""
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[options.dtype]
    accelerator = Accelerator(mixed_precision=precision, cpu=options.device == "cpu")
    half, device = getattr(torch, options.dtype), accelerator.device
    model = widened(load_model(base, device="cpu", dtype=torch.float32))
    model.unet.set_attn_processor(AttnProcessor2_0())
    unet, vae, text = model.unet.to(device).train().requires_grad_(True), model.autoencoder, model.text_encoders[0]
    vae.to(device, half), text.to(device, half)
    average = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    average.to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    loader = DataLoader(pairs * 99, options.batch, shuffle=True, num_workers=workers, collate_fn=peer_batch(options))
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    for _, batch in zip(range(options.steps + WARM_UP), loader, strict=False):
        latents = vae.encode(batch["edited"].to(half)).latent_dist.sample() * SCALE
        noise, count = torch.randn_like(latents), len(latents)
        t = torch.randint(0, 1000, (count,), device=device).long()
        noisy = scheduler.add_noise(latents, noise, t)
        context = text(batch["tokens"])[0]
        condition = vae.encode(batch["original"].to(half)).latent_dist.mode()
        r = torch.rand(count, device=device)
        null = text(tokenize([""]).to(device))[0]
        context = torch.where((r < 2 * DROPOUT).reshape(count, 1, 1), null, context)
        keep = 1 - ((r >= DROPOUT).to(half) * (r < 3 * DROPOUT).to(half))
        prediction = unet(torch.cat([noisy, keep.reshape(count, 1, 1, 1) * condition], dim=1), t, context).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise.float(), reduction="mean")
        accelerator.gather(loss.repeat(count)).mean().item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        tick()
    accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)


def peer_batch(options: argparse.Namespace) -> Callable[[list[PairRecord]], dict[str, Tensor]]:
    """The script's transforms: each picture to the square, then one crop and one mirroring for the whole batch."""
    augment = transforms.Compose([transforms.RandomCrop(options.pixels), transforms.RandomHorizontalFlip()])

    def collate(pairs: list[PairRecord]) -> dict[str, Tensor]:
        arrays = [square(data, options.pixels) for p in pairs for data in (p.original_image, p.edited_image)]
        pixels = augment(2 * (torch.tensor(np.stack(arrays)) / 255) - 1)
        return {"original": pixels[::2], "edited": pixels[1::2], "tokens": tokenize([p.edit_prompt for p in pairs])}

    return collate


def square(data: bytes, pixels: int) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB").resize((pixels, pixels))).transpose(2, 0, 1)


def make_pairs(options: argparse.Namespace) -> list[PairRecord]:
    """Smooth random pictures of twice the size, as JPEG."""
    draw = np.random.RandomState(0)

    def picture() -> bytes:
        coarse = Image.fromarray(draw.randint(0, 256, (16, 16, 3), dtype=np.uint8))
        stream = io.BytesIO()
        coarse.resize((2 * options.pixels,) * 2, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
        return stream.getvalue()

    empty = dict.fromkeys(("seed", "p", "cfg"))
    texts = {"original_prompt": "a hill", "edited_prompt": "a hill in the snow"}
    return [
        PairRecord(
            original_image=picture(), edited_image=picture(), edit_prompt=f"add snow {n}", key=str(n), **texts, **empty
        )
        for n in range(4 * options.batch)
    ]


def sd15(options: argparse.Namespace) -> Model:
    """Stable Diffusion 1.5's layers with random weights at ``width`` and ``vae`` channels; its own text encoder's size
    on a GPU, two layers of it here."""
    torch.manual_seed(0)
    w, v = options.width, options.vae
    kind = {"cross_attention_dim": 768, "attention_head_dim": 8, **(SHALLOW if options.shallow else {})}
    channels = (w, 2 * w, 4 * w, 4 * w)[: 2 if options.shallow else 4]
    unet = UNet2DConditionModel(block_out_channels=channels, **kind)
    autoencoder = AutoencoderKL(
        block_out_channels=(v, 2 * v, 4 * v, 4 * v),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    layers = 12 if options.device == "cuda" else 2
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=12)
    )
    spec = ModelSpec(family="sd1", in_channels=4, prediction="eps", **recommended("sd1", 4))
    networks = (unet, autoencoder, text)
    for network in networks:
        network.eval().requires_grad_(False)
    return Model(spec=spec, unet=unet, autoencoder=autoencoder, text_encoders=(text,))


if __name__ == "__main__":
    main()
