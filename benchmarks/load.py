"""Loading one SD1.5-size file: ours against diffusers' from_single_file, each in processes of its own.

    python benchmarks/load.py                     # float32 (4.3 GB); makes the file in a temporary folder
    python benchmarks/load.py --size tiny         # a dry run in seconds
    python benchmarks/load.py --dtype float16 --rounds 5
    python benchmarks/load.py --device cuda       # onto a GPU; the peak is still the process's own memory

Loaders alternate. Peak is the process's largest resident set, mapped files included, less what it was after importing;
"factor" is the peak over the size of the networks that result (at most 1.3 is the aim). "loaded" is when the loader
returns, "ready" when every weight has been read once after that, so that a lazy mapping pays like a copy. Ours has
looked for NaN by then, and has taken EMA where there is one; diffusers does neither. "ready_cpu_s" is the same in
seconds of the processor, which a busy machine does not stretch as far. The page cache is warm for all.
Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from ip2p_engine.checkpoint.recognise import PREFIXES, ema_name
from ip2p_engine.checkpoint.write import ldm_state, save_diffusers, save_ldm
from ip2p_engine.networks.model import Model, ModelSpec, load_model

SPEC = ModelSpec(
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
CASES = (
    "ours",
    "ours, file without our header",
    "ours, .ckpt with EMA",
    "ours, cast to float16",
    "diffusers",
    "diffusers, cast to float16",
)


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(measure(options.child, Path(options.folder), options.device)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        folder = options.files or temporary
        if not (Path(folder) / "bare.ckpt").exists():
            make_files(Path(folder), options.size, getattr(torch, options.dtype))
        rounds = [{case: in_process(case, folder, options.device) for case in CASES} for _ in range(options.rounds)]
    for case in CASES:
        rows = [entry[case] for entry in rounds]
        print(json.dumps({"case": case, **{key: statistics.median(row[key] for row in rows) for key in rows[0]}}))
    print(json.dumps(machine(options)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sd15", "tiny"), default="sd15")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", help="folder for 20 GB of temporary files")
    parser.add_argument("--files", help="keep the files in this folder, and use those that are there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_files(folder: Path, size: str, dtype: torch.dtype) -> None:
    """One random model as our file, a bare file, a .ckpt with EMA, and a folder with diffusers' configurations."""
    model = random_model(size)
    save_ldm(model, folder / "ours.safetensors", dtype)
    save_diffusers(model, folder / "pipeline", dtype)
    state = {name: value.to(dtype).contiguous() for name, value in ldm_state(model).items()}
    save_file(state, folder / "bare.safetensors")
    unet = PREFIXES["unet"]
    averaged = {ema_name(n.removeprefix(unet)): v.clone() for n, v in state.items() if n.startswith(unet)}
    torch.save({"state_dict": {**state, **averaged}, "global_step": 22000}, folder / "bare.ckpt")


def random_model(size: str) -> Model:
    """SD1.5's sizes, or the same structure in small; values do not matter here, so one block of noise is repeated."""
    tiny = size == "tiny"
    widths = (32, 64, 64, 64) if tiny else (128, 256, 512, 512)
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    full = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = CLIPTextConfig(**(text if tiny else full))
    channels = (32, 64, 64, 64) if tiny else (320, 640, 1280, 1280)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            in_channels=8, block_out_channels=channels, cross_attention_dim=config.hidden_size, attention_head_dim=8
        )
        autoencoder = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            scaling_factor=SPEC.latent_scale,
        )
        encoder = CLIPTextModel(config)
    networks = [filled(network) for network in (unet, autoencoder, encoder)]
    return Model(spec=SPEC, unet=networks[0], autoencoder=networks[1], text_encoders=(networks[2],))


def filled(network: torch.nn.Module) -> torch.nn.Module:
    network.to_empty(device="cpu")
    noise = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for tensor in network.state_dict().values():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), noise.numel()):
            flat[start : start + noise.numel()] = noise[: flat.numel() - start]
    return network


def in_process(case: str, folder: str, device: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", case, "--folder", folder, "--device", device]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    print(f"{case}: {run.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(case: str, folder: Path, device: str) -> dict[str, float]:
    """Load in this process; seconds, peak bytes beyond the imports, and the size of what resulted."""
    ours, bare = folder / "ours.safetensors", folder / "bare.safetensors"
    loaders = {
        CASES[0]: lambda: modules(load_model(ours, device=device)),
        CASES[1]: lambda: modules(load_model(bare, device=device)),
        CASES[2]: lambda: modules(load_model(folder / "bare.ckpt", device=device)),
        CASES[3]: lambda: modules(load_model(ours, device=device, dtype=torch.float16)),
        CASES[4]: lambda: from_single_file(folder, load_dtype(folder), device),
        CASES[5]: lambda: from_single_file(folder, torch.float16, device),
    }
    torch.zeros(1, device=device)  # starts the device
    before, start, working = reset_peak(), time.perf_counter(), time.process_time()
    networks = loaders[case]()
    loaded = time.perf_counter() - start
    for network in networks:
        for tensor in network.state_dict().values():
            torch.aminmax(tensor)[0].item()
    ready, working = time.perf_counter() - start, time.process_time() - working
    result = sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())
    peak = status_bytes("VmHWM") - before
    return {
        "loaded_s": round(loaded, 2),
        "ready_s": round(ready, 2),
        "ready_cpu_s": round(working, 2),
        "peak_mb": round(peak / 1e6),
        "networks_mb": round(result / 1e6),
        "factor": round(peak / result, 3),
    }


def modules(model: Model) -> list[torch.nn.Module]:
    return [model.unet, model.autoencoder, *model.text_encoders]


def from_single_file(folder: Path, dtype: torch.dtype, device: str) -> list[torch.nn.Module]:
    """diffusers' own way, with the configurations given so that it needs no hub."""
    pipeline = StableDiffusionInstructPix2PixPipeline.from_single_file(
        str(folder / "bare.safetensors"), config=str(folder / "pipeline"), local_files_only=True, torch_dtype=dtype
    )
    return [network.to(device) for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder)]


def load_dtype(folder: Path) -> torch.dtype:
    from safetensors import safe_open

    with safe_open(folder / "bare.safetensors", "pt") as file:
        return file.get_tensor(f"{PREFIXES['unet']}out.2.bias").dtype


def reset_peak() -> int:
    """Let the kernel count the peak anew; returns the resident bytes of now. (ru_maxrss would be the parent's.)"""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def machine(options: argparse.Namespace) -> dict[str, str]:
    return {
        "size": f"{options.size}, {options.dtype}, {options.device}",
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}",
    }


if __name__ == "__main__":
    main()
