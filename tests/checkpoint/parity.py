"""How far the loaded reference checkpoints are from the original implementation, as a table.

    python tests/checkpoint/parity.py        # prints the table of docs/checkpoints.md

Everything is fp32 on a CPU. tests/data/reference/README.md tells what the original was given and where the tolerances
come from; the noise is the stored one, so a difference is one of arithmetic.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ip2p_engine.diffusion.guidance import DualGuidance
from ip2p_engine.diffusion.sampling import sample
from ip2p_engine.diffusion.schedule import model_sigmas
from ip2p_engine.networks.conditioning import Conditioning, TextEmbedding, decode_latents, encode_image, encode_text
from ip2p_engine.networks.denoiser import BranchDenoiser
from ip2p_engine.networks.model import Model, load_model
from ip2p_engine.p2p.denoiser import PairConditioning, PairDenoiser
from ip2p_engine.train.config import TrainConfig
from ip2p_engine.train.encoding import Encoded, Encoder
from ip2p_engine.train.objective import Objective
from ip2p_engine.train.randomness import Draws

TESTS = Path(__file__).parent.parent
DATA = TESTS / "data" / "reference"
PROMPT = "turn him into a cyborg"
BRANCHES = {"c": (1.0, 1.0), "i": (0.0, 1.0), "u": (0.0, 0.0)}
RUNS = {"s10_t7.5_i1.5": (7.5, 1.5, 10), "s10_t7.5_i1.0": (7.5, 1.0, 10), "s20_t7.5_i1.5": (7.5, 1.5, 20)}
TRAINING_TEXTS = (PROMPT, "make it winter", "as a watercolor painting", "add a red hat")
PAIR_RUNS = (0.0, 0.3, 0.9)
SUFFIXES = (".ckpt", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity: how far, and how far it may be."""

    quantity: str
    distance: float
    tolerance: float


def distance(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


@torch.inference_mode()
def compare(model: Model, weights: str, reference: dict[str, Tensor], *, steps_limit: int = 20) -> list[Row]:
    """Every quantity of the edit reference for a model that holds the ``weights`` (ema or raw)."""
    rows = [*_encoders(model, reference), *_one_step(model, weights, reference), *_probes(model, weights, reference)]
    for run, (text_cfg, image_cfg, steps) in RUNS.items():
        if steps <= steps_limit:
            rows += _run(model, weights, reference, run, (text_cfg, image_cfg, steps))
    return rows + (list(_training(model, load_file(DATA / "D_training.safetensors"))) if weights == "raw" else [])


@torch.inference_mode()
def compare_pairs(model: Model, reference: dict[str, Tensor]) -> list[Row]:
    """Prompt-to-Prompt pairs of the text-to-image checkpoint, 10 steps, cfg 9."""
    tokens = model.text_encoders[0](reference["tokens"].long()).last_hidden_state
    texts = TextEmbedding(tokens=torch.cat([encode_text(model, [""]).tokens, tokens]))
    noises = reference["noises/cpu_order"].expand(-1, 2, -1, -1, -1)
    sigmas, rows = model_sigmas(model.schedule, 10), []
    for threshold in PAIR_RUNS:
        stream = iter(noises[1:])
        cond = PairConditioning(
            texts=texts, source_rows=(1,), edited_rows=(2,), p2p_thresholds=(threshold,), cfg=(9.0,)
        )
        denoiser = PairDenoiser(model, sigmas)
        start = noises[0] * float(sigmas[0])
        z = sample("euler_ancestral", denoiser, start, sigmas, cond, noise=lambda _, s=stream: next(s))
        key, name = f"p2p{threshold}_cpu_order", f"pair, p = {threshold}"
        gap = distance(z, reference[f"{key}/z"])
        rows.append(Row(quantity=f"{name}: end latents", distance=gap, tolerance=5e-4))
        pictures = 255 * ((decode_latents(model, z) + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
        gap = distance(pictures.floor(), reference[f"{key}/image_u8"].float())  # the original truncates
        rows.append(Row(quantity=f"{name}: pictures, steps of 255", distance=gap, tolerance=1.0))
    return rows


def _encoders(model: Model, reference: dict[str, Tensor]) -> Iterator[Row]:
    # the original rounds the cumulative product to float32: half a unit in its last place, 2^-25, over the smallest
    # 1 - a = 8.5e-4, halved by the square root, is 1.75e-5
    for steps in (5, 10, 20, 50, 100):
        theirs = reference[f"sigmas_{steps}"].double()
        gap = ((model_sigmas(model.schedule, steps) - theirs).abs()[:-1] / theirs[:-1]).max().item()
        yield Row(quantity=f"sigmas, {steps} steps (relative)", distance=gap, tolerance=1.75e-5)
    texts = encode_text(model, [PROMPT, ""]).tokens
    theirs = torch.cat([reference["text_emb"], reference["null_emb"]])
    yield Row(quantity="text embeddings", distance=distance(texts, theirs), tolerance=1e-5)
    mode = encode_image(model, reference["image"])
    yield Row(quantity="image latent (mode)", distance=distance(mode, reference["c_concat"]), tolerance=5e-5)
    decoded = decode_latents(model, reference["dec_z"])
    yield Row(quantity="decoded picture", distance=distance(decoded, reference["dec_out"]), tolerance=5e-5)


def _condition(model: Model, reference: dict[str, Tensor]) -> Conditioning:
    texts = encode_text(model, [PROMPT, ""])
    image = encode_image(model, reference["image"])
    return Conditioning(text=texts.rows([0]), null_text=texts.rows([1]), image=image)


def _one_step(model: Model, weights: str, reference: dict[str, Tensor]) -> Iterator[Row]:
    cond = _condition(model, reference)
    context = torch.cat([cond.text.tokens, cond.null_text.tokens, cond.null_text.tokens])
    for level in ("step_hi", "step_lo"):
        z, sigma, key = reference[f"{level}/z"], float(reference[f"{level}/sigma"]), f"{weights}/{level}"
        eps = model.unet(reference[f"{key}/unet_in"], model.timestep(sigma).expand(3), context).sample
        for row, name in enumerate(BRANCHES):
            gap = distance(eps[row], reference[f"{key}/eps"][row])
            yield Row(quantity=f"eps of branch {name}, sigma {sigma:.2f}", distance=gap, tolerance=2e-5)
        denoiser = DualGuidance(BranchDenoiser(model), 7.5, 1.5)
        combined = denoiser(z, sigma, cond)
        gap = distance(combined, reference[f"{key}/combined"])
        yield Row(quantity=f"combined, sigma {sigma:.2f}", distance=gap, tolerance=1e-3)


def _probes(model: Model, weights: str, reference: dict[str, Tensor]) -> Iterator[Row]:
    """Inputs of size 1e-3, where a wrong epsilon of a normalisation shows."""
    text = encode_text(model, [PROMPT]).tokens
    eps = model.unet(reference["probe_unet_in"], torch.tensor([500.0]), text).sample
    pairs = {
        "UNet": (eps, reference[f"{weights}/probe_unet_out"]),
        "encoder": (
            model.autoencoder.encode(reference["probe_img"]).latent_dist.parameters,
            reference["probe_moments"],
        ),
        "decoder": (decode_latents(model, reference["probe_z"]), reference["probe_decoded"]),
    }
    for name, (ours, theirs) in pairs.items():
        yield Row(quantity=f"tiny input, {name}", distance=distance(ours, theirs), tolerance=1e-4)


def _run(
    model: Model, weights: str, reference: dict[str, Tensor], run: str, settings: tuple[float, float, int]
) -> Iterator[Row]:
    text_cfg, image_cfg, steps = settings
    noises, sigmas = reference[f"noises_astro_{steps}"], model_sigmas(model.schedule, steps)
    stream = iter(noises[1:])
    denoiser = DualGuidance(BranchDenoiser(model), text_cfg, image_cfg)
    start = noises[0] * float(sigmas[0])
    cond = _condition(model, reference)
    z = sample("euler_ancestral", denoiser, start, sigmas, cond, noise=lambda _: next(stream))
    name = f"{steps} steps, s_T {text_cfg}, s_I {image_cfg}"
    key = f"{weights}/run_{run}"
    yield Row(quantity=f"{name}: end latent", distance=distance(z, reference[f"{key}/z"]), tolerance=5e-4)
    if f"{key}/image01" in reference:
        picture = ((decode_latents(model, z) + 1) / 2).clamp(0, 1)
        gap = distance(picture, reference[f"{key}/image01"])
        yield Row(quantity=f"{name}: picture in [0, 1]", distance=gap, tolerance=1e-4)


def _training(model: Model, stored: dict[str, Tensor]) -> Iterator[Row]:
    """The loss of the stored batch, from its pictures and texts on, with the stored draws."""
    encoder = Encoder(model)
    pixels = torch.stack([stored["input_u8"], stored["edited_u8"]], dim=1).permute(0, 1, 4, 2, 3).contiguous()
    text = encode_text(model, TRAINING_TEXTS)
    encoded = Encoded(**encoder.latents(pixels), text=text, size_ids=torch.zeros(len(pixels), 6))
    draws = Draws(
        drop=stored["drop"],
        level=(stored["t"].double() + 0.5) / 1000,
        posterior=stored["post_noise"],
        noise=stored["noise"],
        offset=torch.zeros(len(pixels), 4, 1, 1),
        scales=torch.zeros(len(pixels), 2),
    )
    losses = Objective(model, encoder.null_text, TrainConfig())(model.unet, encoded, draws)
    gap = distance(losses, stored["loss_per_sample"])
    yield Row(quantity="training loss of each example", distance=gap, tolerance=4e-6)
    yield Row(quantity="training loss", distance=distance(losses.mean(), stored["loss"][0]), tolerance=2e-6)


def load_recipe():
    """tests/reference_weights.py (the tests are no package)."""
    spec = importlib.util.spec_from_file_location("reference_weights", TESTS / "reference_weights.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    recipe = load_recipe()
    reference = {**load_file(DATA / "B_common.safetensors"), **load_file(DATA / "B_tiny.safetensors")}
    pairs = load_file(DATA / "C_pairs.safetensors")
    with tempfile.TemporaryDirectory() as name:
        files = write_files(recipe, Path(name))
        edits = {
            ".ckpt, ema": compare(load_model(files["ip2p.ckpt"]), "ema", reference),
            ".ckpt, raw": compare(load_model(files["ip2p.ckpt"], weights="raw"), "raw", reference),
            ".safetensors, ema": compare(load_model(files["merged.safetensors"]), "ema", reference),
            ".safetensors, raw": compare(load_model(files["both.safetensors"], weights="raw"), "raw", reference),
        }
        pair_tables = {suffix: compare_pairs(load_model(files[f"sd{suffix}"]), pairs) for suffix in SUFFIXES}
    sys.stdout.write(f"{as_table(edits)}\n\n{as_table(pair_tables)}\n")


def write_files(recipe, folder: Path) -> dict[str, Path]:
    """The reference checkpoints as people publish them: .ckpt, a file of both sets, one of the EMA weights alone."""
    edit, text_to_image = recipe.reference_state("ip2p"), recipe.reference_state("sd")
    save_file(edit, folder / "both.safetensors")
    save_file(recipe.merged(edit), folder / "merged.safetensors")
    save_file(text_to_image, folder / "sd.safetensors")
    torch.save({"state_dict": edit, "global_step": 22000}, folder / "ip2p.ckpt")
    torch.save({"state_dict": text_to_image}, folder / "sd.ckpt")
    return {path.name: path for path in folder.iterdir()}


def as_table(columns: dict[str, list[Row]]) -> str:
    """A Markdown table: one line a quantity, one column a file."""
    distances = {name: {row.quantity: row.distance for row in rows} for name, rows in columns.items()}
    tolerances = {row.quantity: row.tolerance for rows in columns.values() for row in rows}
    lines = [f"| quantity | {' | '.join(columns)} | tolerance |", "|---" * (len(columns) + 2) + "|"]
    for quantity, tolerance in tolerances.items():
        cells = [f"{column[quantity]:.1e}" if quantity in column else "" for column in distances.values()]
        lines.append(f"| {quantity} | {' | '.join(cells)} | {tolerance:.3g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
