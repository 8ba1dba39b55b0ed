"""The weights that the original implementation was run on, rebuilt bit for bit from their recipe.

Every tensor comes from numpy's frozen legacy generator, seeded by the CRC-32 of a label, so any machine makes the
same checkpoint. tests/data/reference/README.md tells what was computed with it.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data" / "reference"
UNET = "model.diffusion_model."
SHARP = (".to_q.", ".to_k.", ".q_proj.", ".k_proj.", ".attn_1.q.", ".attn_1.k.", "in_proj_weight")
RESIDUAL = (".out_layers.3.", ".proj_out.", ".to_out.0.", ".ff.net.2.", ".conv2.", ".out_proj.", ".fc2.", ".c_proj.")
QUIET = np.float32(0.25)


def reference_state(kind: str) -> dict[str, Tensor]:
    """The tiny checkpoint in the LDM layout: "ip2p" (8 channels, raw and EMA weights) or "sd" (4 channels)."""
    keys = dict(json.loads((DATA / "weights_keys.json").read_text())["tiny"]["keys"])
    stem = UNET + "input_blocks.0.0.weight"
    if kind == "sd":
        keys[stem] = [keys[stem][0], 4, 3, 3]
    state = {name: _tensor(kind, name, shape) for name, shape in keys.items() if not _is_buffer(name)}
    if kind == "ip2p":
        state["model_ema.decay"] = torch.tensor(0.9999)
        state["model_ema.num_updates"] = torch.tensor(22000, dtype=torch.int32)
        for name, shape in keys.items():
            if name.startswith(UNET):
                state[ema_name(name)] = torch.from_numpy(make("tiny|ip2p-ema", name, shape))
    return state


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the EMA weights in the place of the raw ones, as people publish it."""
    kept = {name: value for name, value in state.items() if not name.startswith("model_ema.")}
    return {n: (state[ema_name(n)] if n.startswith(UNET) else v).contiguous() for n, v in kept.items()}


def ema_name(name: str) -> str:
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def make(label: str, name: str, shape: list[int]) -> np.ndarray:
    seed = zlib.crc32(f"{label}|{name}".encode()) & 0xFFFFFFFF
    uniform = np.random.RandomState(seed).random_sample(int(np.prod(shape, dtype=np.int64)))
    centre, half_width = _spread(name, shape)
    values = (centre + (2.0 * uniform - 1.0) * half_width).astype(np.float32).reshape(shape)
    return _plant(name.removeprefix(UNET), values) if name.startswith(UNET) else values


def _is_buffer(name: str) -> bool:
    """The twelve buffers of the noise schedule, which no loader needs."""
    return "." not in name


def _tensor(kind: str, name: str, shape: list[int]) -> Tensor:
    if name.endswith("position_ids"):
        return torch.arange(shape[1], dtype=torch.int64)[None]
    role = "vae" if name.startswith("first_stage") else "text" if name.startswith("cond_stage") else kind
    return torch.from_numpy(make(f"tiny|{role}", name, shape))


def _spread(name: str, shape: list[int]) -> tuple[float, float]:
    """Centre and half width of a tensor's uniform distribution."""
    if name.endswith("token_embedding.weight"):
        return 0.0, 0.8
    if name.endswith(("position_embedding.weight", "positional_embedding", "class_embedding")):
        return 0.0, 0.3
    if name.endswith("logit_scale"):
        return 2.6592, 0.0
    if len(shape) <= 1:
        return (1.0, 0.25) if name.endswith("weight") else (0.0, 0.2)
    fan_in = shape[0] if name.endswith(("visual.proj", "text_projection")) else int(np.prod(shape[1:]))
    gain = 1.4 if any(s in name for s in SHARP) else 0.7 if any(s in name for s in RESIDUAL) else 1.0
    return 0.0, gain * math.sqrt(3.0 / fan_in)


def _plant(name: str, a: np.ndarray) -> np.ndarray:
    """A rough denoiser's behaviour, so that trajectories stay sane: 8 channels carry the latent through to the end."""
    if name == "input_blocks.0.0.weight":
        a[:8] = 0
        for j in range(4):
            a[2 * j, j, 1, 1], a[2 * j + 1, j, 1, 1] = 1, -1
    elif name == "output_blocks.11.0.skip_connection.weight":
        a[:8] = 0
        a[np.arange(8), a.shape[1] // 2 + np.arange(8)] = 1
    elif name in ("input_blocks.0.0.bias", "output_blocks.11.0.skip_connection.bias", "out.0.bias"):
        a[:8] = 0
    elif name == "out.0.weight":
        a[:8] = 1
    elif name.startswith(("output_blocks.11.0.out_layers.3.", "output_blocks.11.1.proj_out.")):
        a[:8] *= QUIET
    elif name == "out.2.bias":
        a *= QUIET
    elif name == "out.2.weight":
        a *= QUIET
        a[:, :8] = 0
        for j in range(4):
            a[j, 2 * j, 1, 1], a[j, 2 * j + 1, 1, 1] = 1, -1
    return a
