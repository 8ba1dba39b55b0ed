"""The paper's figure 10 on photographs: less data, and pairs that no filter has seen, at the same budget.

    python benchmarks/photo_ablation.py RUNS PICTURES --out OUT [--steps 500] [--n 120]

RUNS is what `ip2p photos train` left (autoencoder, text and latents), PICTURES what `ip2p photos gather` wrote. Each
arm trains the edit stage from nothing on edits of the whole picture, with one seed, and is judged on the same held-out
edits of held-out photographs. An arm that was stopped goes on, and what is measured is not measured again. Prints a
table in Markdown and writes OUT/ablation.png.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ip2p_engine import InstructPix2Pix
from ip2p_engine.evaluate.recommend import Grid, Measured, measure_settings, recommend
from ip2p_engine.photos.exam import photo_samples
from ip2p_engine.photos.pictures import PhotoPool
from ip2p_engine.photos.recipe import export_photos, train_stage
from ip2p_engine.photos.tones import TONES
from ip2p_engine.photos.world import KINDS, VIEW, sample_edit
from ip2p_engine.plots import new_figure, save_figure

ARMS = {"all": (1.0, 0.0), "10 %": (0.1, 0.0), "1 %": (0.01, 0.0), "all, 30 % wrong": (1.0, 0.3)}
"""(share of the edits, share of those whose instruction is another's: pairs that a filter would have refused)."""
GRID = Grid(text_cfg=(2.0,), image_cfg=(1.0, 1.5, 2.0), steps=(4,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500, help="of each training (default: 500)")
    parser.add_argument("--n", type=int, default=120, help="held-out edits (default: 120)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool, tones = PhotoPool(options.pictures, ("held-out",), smallest=VIEW), tuple(TONES)
    edits = [sample_edit(pool, tones[n % len(tones)], seed=61_000 + n, held_out=True) for n in range(options.n)]
    samples, judge = photo_samples(edits, seed=62)
    found = {}
    for number, name in enumerate(ARMS):
        folder = options.out / f"arm-{number}"
        count = make_arm(options.runs, folder, *ARMS[name])
        train_stage("edit", folder, options.pictures, steps=options.steps)
        export_photos(folder, folder / "model")
        editor = InstructPix2Pix.load(folder / "model", device="cpu")
        rows = measure_settings(editor, samples, judge, GRID, folder=folder / "rows")
        found[f"{name} ({count:,} edits)"] = recommend(rows).measured
        print(f"{name}: done", flush=True)
    print(table(found))
    save_figure(plot(found, options.n), options.out / "ablation.png")


def make_arm(runs: Path, folder: Path, share: float, wrong: float) -> int:
    """A folder of stages that lacks the edit stage alone; returns the number of edits to train on."""
    (folder / "latents").mkdir(parents=True, exist_ok=True)
    for name in ("autoencoder.safetensors", "text.safetensors"):
        shutil.copy(runs / name, folder / name)
    count = 0
    for side in (128, VIEW):
        parts = [load_file(path) for path in sorted((runs / "latents").glob(f"{side}-*.safetensors"))]
        rows = chosen({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, share, wrong)
        save_file(rows, folder / "latents" / f"{side}-0000.safetensors")
        count += len(rows["kind"])
    return count


def chosen(rows: dict[str, Tensor], share: float, wrong: float) -> dict[str, Tensor]:
    """The first share of the edits of whole pictures; of the first of those, the next one's instruction instead."""
    whole = torch.isin(rows["kind"], torch.tensor([KINDS.index(name) for name in TONES])).nonzero().flatten()
    kept = whole[: max(1, round(share * len(whole)))]
    taken = {name: value[kept].clone() for name, value in rows.items()}
    spoiled = round(wrong * len(kept))
    for name in ("tokens", "facts"):
        taken[name][:spoiled] = taken[name][:spoiled].roll(1, 0)
    return taken


def table(found: dict[str, list[Measured]]) -> str:
    """A line an arm and setting."""
    lines = ["| trained on | s_T / s_I | right % | 95 % | nearest dB |", "|---|---|---|---|---|"]
    for name, measured in found.items():
        for one in measured:
            low, high = (100 * value for value in one.done_range)
            scales = f"{one.setting['text_cfg']:g} / {one.setting['image_cfg']:g}"
            lines.append(f"| {name} | {scales} | {100 * one.done:.1f} | {low:.1f} to {high:.1f} | {one.nearest:.1f} |")
    return "\n".join(lines)


def plot(found: dict[str, list[Measured]], count: int):
    """Right edits over the distance to the truth, a line an arm over s_I."""
    figure = new_figure(7.2, 5.2)
    axes = figure.add_subplot()
    for name, measured in found.items():
        points = [one for one in measured if one.setting["text_cfg"] > 1]
        axes.plot([one.nearest for one in points], [100 * one.done for one in points], marker="o", label=name)
        for one in points:
            place = (one.nearest, 100 * one.done)
            axes.annotate(f"{one.setting['image_cfg']:g}", place, textcoords="offset points", xytext=(4, 4))
    axes.set(
        xlabel="PSNR to the true edit, dB", ylabel="right edits, %", title=f"Less data, and no filter: {count} edits"
    )
    axes.legend(fontsize="small", title="numbers: s_I")
    return figure


if __name__ == "__main__":
    main()
