"""Train the embedded world's ControlNet: a pencil sketch says where, and how large, the edited picture's shape is.

usage: python scripts/train_control.py --runs FOLDER --out ip2p_engine/scenes/embedded/control/scenes-sketch.safetensors

Zhang et al. 2023 (arXiv 2302.05543) on the frozen embedded InstructPix2Pix. The instruction says what changes; the
target lies at a random place in a random size, which only the sketch tells. Stopped, it goes on from FOLDER.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ip2p_engine.diffusion.guidance import conditioning_dropout
from ip2p_engine.images import to_tensor
from ip2p_engine.networks.conditioning import encode_image, encode_text
from ip2p_engine.networks.model import Model, load_model
from ip2p_engine.scenes.grammar import sample_edits
from ip2p_engine.scenes.world import BACKGROUNDS, COLOURS, PLACES, SIZES, render

WIDTH, DEEP, TIME, CONTEXT, HEADS = 64, 128, 256, 96, 2
HINT = ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1), (96, 256, 2), (256, WIDTH, 1))
EXAMPLES, BATCH, RATE, SAVE_EVERY = 800, 24, 1e-3, 20
# Where things are is decided while there is much noise; the little steps belong to the UNet.
FIRST_T = 250


class ResidualBlock(nn.Module):
    """Two convolutions and the time, by the names of the authors' code."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(TIME, out))
        last = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Identity(), last)
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Down(nn.Module):
    """Half the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Control(nn.Module):
    """The encoder half of a small Stable Diffusion, in the layout that ComfyUI's Load ControlNet Model reads."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(WIDTH, TIME), nn.SiLU(), nn.Linear(TIME, TIME))
        layers = [nn.Conv2d(a, b, 3, padding=1, stride=stride) for a, b, stride in HINT]
        self.input_hint_block = nn.Sequential(*[part for layer in layers for part in (layer, nn.SiLU())][:-1])
        attention = Transformer2DModel(
            HEADS, DEEP // HEADS, in_channels=DEEP, cross_attention_dim=CONTEXT, norm_num_groups=32
        )
        blocks = [
            [nn.Conv2d(4, WIDTH, 3, padding=1)],
            [ResidualBlock(WIDTH, WIDTH)],
            [Down(WIDTH)],
            [ResidualBlock(WIDTH, DEEP), attention],
        ]
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        widths = (WIDTH, WIDTH, WIDTH, DEEP)
        self.zero_convs = nn.ModuleList(nn.ModuleList([_zero(width)]) for width in widths)
        self.middle_block = nn.ModuleList([ResidualBlock(DEEP, DEEP)])
        self.middle_block_out = nn.ModuleList([_zero(DEEP)])
        self._times = Timesteps(WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)

    def forward(self, x: Tensor, hint: Tensor, t: Tensor, text: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """What to add to the UNet's skip connections and middle; x (B, 4, h, w), hint (B, 3, 8h, 8w) in [0, 1]."""
        time = self.time_embed(self._times(t))
        h, found = x, []
        for number, (block, zero) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            for layer in block:
                if isinstance(layer, ResidualBlock):
                    h = layer(h, time)
                elif isinstance(layer, Transformer2DModel):
                    h = layer(h, text).sample
                else:
                    h = layer(h)
            h = h + self.input_hint_block(hint) if number == 0 else h
            found.append(zero[0](h))
        return tuple(found), self.middle_block_out[0](self.middle_block[0](h, time))


def _zero(channels: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, channels, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def examples(model: Model, count: int, seed: int) -> dict[str, Tensor]:
    """Everything that the frozen networks make of the examples, once."""
    draw = random.Random(seed)
    columns: dict[str, list[Tensor]] = {"source": [], "target": [], "hint": [], "text": []}
    for edit in sample_edits(count, seed=seed, held_out=False):
        place, size = draw.choice(list(PLACES)), draw.choice(list(SIZES))
        target = edit.target.with_(place=place, size=size)
        loose = {"colour": draw.choice(list(COLOURS)), "background": draw.choice(list(BACKGROUNDS))}
        sketch = target.with_(style="sketch", **loose)
        pixels = to_tensor([render(edit.source), render(target), render(sketch)])
        latents = encode_image(model, pixels[:2])
        columns["source"].append(latents[0])
        columns["target"].append(latents[1] * model.spec.latent_scale)
        columns["hint"].append((pixels[2] + 1) / 2)
        columns["text"].append(encode_text(model, [edit.instruction]).tokens[0])
    return {name: torch.stack(rows) for name, rows in columns.items()}


def loss_of(model: Model, control: Control, rows: dict[str, Tensor], null: Tensor, draws: torch.Generator) -> Tensor:
    """Mean squared error of v, with the paper's dropout of both conditions."""
    count = len(rows["source"])
    t = torch.randint(FIRST_T, model.schedule.steps, (count,), generator=draws)
    noise = torch.randn(rows["target"].shape, generator=draws)
    no_text, no_image = conditioning_dropout(torch.rand(count, generator=draws))
    text = torch.where(no_text[:, None, None], null, rows["text"])
    image = torch.where(no_image[:, None, None, None], 0.0, rows["source"])
    alpha, sigma = model.schedule.alpha_sigma(t)
    x, v = alpha * rows["target"] + sigma * noise, alpha * noise - sigma * rows["target"]
    skips, middle = control(x, rows["hint"], t, text)
    predicted = model.unet(
        torch.cat([x, image], dim=1),
        t,
        encoder_hidden_states=text,
        down_block_additional_residuals=skips,
        mid_block_additional_residual=middle,
    ).sample
    return mse_loss(predicted, v)


def train(runs: Path, steps: int) -> Control:
    """Train, or go on; returns the averaged network."""
    runs.mkdir(parents=True, exist_ok=True)
    model, torch_state = load_model("embedded", dtype=torch.float32), runs / "state.pt"
    data = cached(runs / "examples.pt", lambda: examples(model, EXAMPLES, 0))
    null = encode_text(model, [""]).tokens.clone()
    torch.manual_seed(0)
    control, average = Control(), Control()
    average.load_state_dict(control.state_dict())
    optimizer = torch.optim.AdamW(control.parameters(), lr=RATE, weight_decay=1e-4)
    first = 0
    if torch_state.exists():
        saved = torch.load(torch_state, weights_only=True)
        first = saved["step"]
        for part, name in ((control, "control"), (average, "average"), (optimizer, "optimizer")):
            part.load_state_dict(saved[name])
    started = time.monotonic()
    for step in range(first, steps):
        draws = torch.Generator().manual_seed(step)
        rows = torch.randint(0, EXAMPLES, (BATCH,), generator=draws)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * min(1.0, 2 * (1 - step / steps))
        loss = loss_of(model, control, {name: column[rows] for name, column in data.items()}, null, draws)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        optimizer.step()
        decay = min(0.98, (1 + step) / (10 + step))
        for mean, value in zip(average.parameters(), control.parameters(), strict=True):
            mean.data.lerp_(value.data, 1 - decay)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            parts = {"control": control, "average": average, "optimizer": optimizer}
            torch.save({"step": step + 1, **{n: part.state_dict() for n, part in parts.items()}}, torch_state)
            sys.stdout.write(f"{step + 1} loss {loss.item():.4f} {time.monotonic() - started:.0f} s\n")
            sys.stdout.flush()
    return average


def cached(path: Path, make) -> dict[str, Tensor]:
    """What ``make`` gives, kept in a file."""
    if not path.exists():
        torch.save(make(), path)
    return torch.load(path, weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=260)
    options = parser.parse_args()
    control = train(options.runs, options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in control.state_dict().items()}
    save_file(state, options.out, {"format": "pt"})


if __name__ == "__main__":
    main()
