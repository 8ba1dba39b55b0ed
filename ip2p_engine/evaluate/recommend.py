"""Which settings does a checkpoint want? Many pictures whose right edit is known, edited at every point of a grid."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..diffusion.guidance import guidance_of
from ..diffusion.sampling import sampler_of
from ..edit import EditConfig, InstructPix2Pix
from ..errors import ConfigError
from ..hooks import Hooks
from ..images import fit
from ..networks.digest import fingerprint
from ..plots import new_figure
from .metrics import BEST_PSNR, psnr
from .run_folder import FLAG, NUMBER, TEXT, Row, Table, row_key, row_log
from .samples import Sample
from .statistics import bootstrap_means, interval

__all__ = [
    "Grid",
    "Judge",
    "Measured",
    "Recommendation",
    "about_sample",
    "check_decibels",
    "measure_settings",
    "network_of",
    "recommend",
    "settings_plot",
    "truth_judge",
]

SETTING = ("text_cfg", "image_cfg", "steps", "sampler", "guidance_interval")
RESULTS = {"done": FLAG, "kept": NUMBER, "nearest": FLAG, "evaluations": FLAG, "kind": TEXT}
EVERYWHERE, ALONE = None, (1.0, 1.0)
LEVEL = 0.95
UNTOUCHED, BORDER, LEAST_UNTOUCHED = 0.02, 12, 0.25
Judge = Callable[[Sequence[Sample], Sequence[Image.Image]], list[dict[str, Any]]]
"""Says of each picture ``done`` (is it the asked edit?), ``kept`` (dB away from the change, or None), ``nearest`` (dB
to the right edit) and ``kind``."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every pair of scales with every interval, sampler and number of steps; c alone (1, 1) is always there."""

    text_cfg: Sequence[float] = (2.0, 4.0, 7.5)
    image_cfg: Sequence[float] = (1.0, 1.2, 1.5)
    steps: Sequence[int] = (1, 2, 4, 10, 20)
    sampler: Sequence[str] = ("euler_ancestral",)
    guidance_interval: Sequence[tuple[float, float] | None] = (EVERYWHERE,)
    """Noise levels within which guidance acts; None: everywhere."""

    def __post_init__(self) -> None:
        if not all(getattr(self, name) for name in ("steps", "sampler", "guidance_interval")):
            raise ConfigError("an empty grid has nothing to measure; give steps, a sampler and an interval or None")
        for bounds in self.guidance_interval:
            guidance_of(1.0, 1.0, interval=bounds)
        for name in self.sampler:
            sampler_of(name)

    def settings(self) -> Iterator[dict[str, Any]]:
        """Settings by the names of EditConfig, the cheapest first."""
        scales = dict.fromkeys([ALONE, *product(map(float, self.text_cfg), map(float, self.image_cfg))])
        for steps, sampler, pair, bounds in product(self.steps, self.sampler, scales, self.guidance_interval):
            if pair != ALONE or bounds == self.guidance_interval[0]:
                within = None if pair == ALONE or bounds is None else list(bounds)
                yield dict(zip(SETTING, (*pair, steps, sampler, within), strict=True))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A setting over all samples. Intervals are the bootstrap's over samples, 95 %."""

    setting: dict[str, Any]
    count: int
    done: float
    """Share of right edits."""
    done_range: tuple[float, float]
    behind: tuple[float, float, float]
    """Share of right edits less than the best setting's, paired by sample, and its interval."""
    kept: float
    """Mean PSNR in dB away from the change; not a number where no edit leaves enough alone."""
    kept_range: tuple[float, float]
    nearest: float
    """Mean PSNR in dB to the right edit."""
    evaluations: float
    """Of the network, an edit."""
    by_kind: dict[str, float]
    """Share of right edits by kind of edit."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What was measured, and what to take."""

    measured: list[Measured]
    front: list[int]
    """Places of the settings that no other one beats in right edits, kept pixels and evaluations at once."""
    picked: int

    @property
    def setting(self) -> dict[str, Any]:
        """The picked setting, by the names of EditConfig."""
        return self.measured[self.picked].setting

    def card(self) -> dict[str, Any]:
        """The pick by the names of ModelSpec."""
        low, high = self.setting["guidance_interval"] or (0.0, 0.0)
        own = {name: self.setting[name] for name in ("text_cfg", "image_cfg", "steps", "sampler")}
        return {**own, "guidance_low": low, "guidance_high": high}

    def kinds_table(self) -> Table:
        """Right edits by kind, of the settings on the front."""
        kinds = list(self.measured[0].by_kind)
        shown = [self.measured[n] for n in self.front]
        rows = [
            (f"{_name(one.setting)}, {one.setting['steps']}", *(f"{100 * one.by_kind[kind]:.0f}" for kind in kinds))
            for one in shown
        ]
        return Table(title="Right by kind, %, of the front", columns=("s_T / s_I, steps", *kinds), rows=rows)

    def table(self) -> Table:
        """A line a setting, in the order of the grid."""
        rows = [_line(one, n == self.picked, n in self.front) for n, one in enumerate(self.measured)]
        columns = "s_T / s_I|steps|sampler|sigma|evaluations|right %|95 %|behind the best|kept dB|95 %|nearest dB|"
        return Table(
            title="Every setting",
            columns=columns.split("|"),
            rows=rows,
            note=f"{self.measured[0].count} edits a setting",
        )


def measure_settings(
    editor: InstructPix2Pix,
    samples: Sequence[Sample],
    judge: Judge,
    grid: Grid,
    *,
    folder: Path | None = None,
    batch: int = 16,
    hooks: Hooks | None = None,
) -> list[Row]:
    """A row for each sample at each setting; in a ``folder`` they grow in rows.jsonl, and none is measured twice.

    Raises ConfigError, ImageError, DatasetError, or Interrupted once ``hooks.should_stop()``.
    """
    if not samples:
        raise ConfigError("there are no pictures to measure on; give at least one")
    hooks, settings = hooks or Hooks(), list(grid.settings())
    network = network_of(editor)
    about = [about_sample(sample) for sample in samples]
    found: list[Row] = []
    with row_log(folder, RESULTS) as (known, append):
        for setting in settings:
            rows = [{"network": network, **setting, **one} for one in about]
            missing = [n for n, row in enumerate(rows) if row_key(row) not in known]
            for start in range(0, len(missing), batch):
                places = missing[start : start + batch]
                results = _edited(editor, [samples[n] for n in places], setting, judge, hooks)
                append([{**rows[n], **result} for n, result in zip(places, results, strict=True)])
                hooks.progress(len(found) + places[-1] + 1, len(settings) * len(samples))
            found += [known[row_key(row)] for row in rows]
    return found


def check_decibels(decibels: float) -> None:
    """Raises ConfigError below 0: not even the best keeps that much."""
    if not decibels >= 0:
        raise ConfigError(f"`decibels` is {decibels}; give 0 or more")


def recommend(rows: Sequence[Row], *, decibels: float = 0.5, resamples: int = 2000) -> Recommendation:
    """The settings to take: of those that are as right as the best, the cheapest that keeps as much.

    As right: by the bootstrap over samples, paired, the share of right edits may equal the best setting's. As much: at
    most ``decibels`` less kept than the most of them. Raises ConfigError without rows, or with different samples a
    setting, or for ``decibels`` below 0.
    """
    check_decibels(decibels)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row_key({name: row[name] for name in SETTING}), []).append(row)
    if not groups or len({tuple(row["sample"] for row in group) for group in groups.values()}) > 1:
        raise ConfigError(f"{len(groups)} settings were not measured on the same samples; measure them again")
    done = np.array([[float(row["done"]) for row in group] for group in groups.values()]).T
    resampled = bootstrap_means(done, resamples=resamples)
    best = int(done.mean(axis=0).argmax())
    behind = resampled - resampled[:, [best]]
    measured = [_measured(group, resampled[:, n], behind[:, n], resamples) for n, group in enumerate(groups.values())]
    as_right = [n for n, one in enumerate(measured) if one.behind[2] >= 0]
    most = max((_kept(measured[n]) for n in as_right), default=0.0)
    keeping = [n for n in as_right if _kept(measured[n]) >= most - decibels]
    picked = min(keeping, key=lambda n: (measured[n].evaluations, -measured[n].done, -_kept(measured[n])))
    return Recommendation(measured=measured, front=_front(measured), picked=picked)


def truth_judge(samples: Sequence[Sample], pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Judges by a sample's target: done is a picture that is nearer to it than to the source (mean squared error).

    Kept is what the photo world calls so: PSNR 12 pixels and more away from where source and target differ. Raises
    ConfigError for a sample without a target.
    """
    return [_judged(sample, picture) for sample, picture in zip(samples, pictures, strict=True)]


def settings_plot(found: Recommendation, title: str) -> Any:
    """A figure of right edits over kept pixels, a line a pair of scales over the steps; the pick has a ring."""
    figure = new_figure(7.2, 5.2)
    axes = figure.add_subplot()
    lines: dict[str, list[Measured]] = {}
    for one in found.measured:
        lines.setdefault(_name(one.setting), []).append(one)
    for name, points in lines.items():
        axes.plot([one.kept for one in points], [100 * one.done for one in points], marker="o", label=name)
        for one in points:
            axes.annotate(f"{one.evaluations:g}", (one.kept, 100 * one.done), textcoords="offset points", xytext=(4, 4))
    picked = found.measured[found.picked]
    axes.plot([picked.kept], [100 * picked.done], "o", markersize=16, fillstyle="none", color="black", label="picked")
    axes.set(xlabel="kept away from the change, dB", ylabel="right edits, %", title=title)
    axes.legend(fontsize="small", title="s_T / s_I; numbers: evaluations")
    return figure


def _edited(
    editor: InstructPix2Pix, samples: Sequence[Sample], setting: dict[str, Any], judge: Judge, hooks: Hooks
) -> list[dict[str, Any]]:
    """What the judge says of the samples' edits, and what each took."""
    bounds = setting["guidance_interval"]
    config = EditConfig(
        **{**setting, "guidance_interval": None if bounds is None else tuple(bounds)}, batch=len(samples)
    )
    results = editor.edit_each(
        [one.source for one in samples],
        [one.instruction for one in samples],
        seeds=[one.seed for one in samples],
        config=config,
        hooks=Hooks(should_stop=hooks.should_stop),
    )
    verdicts = judge(samples, [result.image for result in results])
    names = ("done", "kept", "nearest", "kind")
    return [
        {**{name: verdict[name] for name in names}, "evaluations": result.evaluations}
        for verdict, result in zip(verdicts, results, strict=True)
    ]


def network_of(editor: InstructPix2Pix) -> str:
    """What tells an editor's weights from others."""
    model = editor.model
    return fingerprint(model.unet, model.autoencoder, *model.text_encoders)


def about_sample(sample: Sample) -> Row:
    """What tells a sample from others."""
    picture = f"{zlib.crc32(sample.source.tobytes()):08x}"
    return {"sample": sample.key, "picture": picture, "instruction": sample.instruction, "seed": sample.seed}


def _measured(group: Sequence[Row], done: np.ndarray, behind: np.ndarray, resamples: int) -> Measured:
    kept = np.array([[row["kept"]] for row in group if row["kept"] is not None])
    bounds = interval(bootstrap_means(kept, resamples=resamples), LEVEL) if len(kept) else ([np.nan], [np.nan])
    kinds = sorted({row["kind"] for row in group})
    right = [float(row["done"]) for row in group]
    low, high = interval(np.stack([done, behind], axis=1), LEVEL)
    return Measured(
        setting={name: group[0][name] for name in SETTING},
        count=len(group),
        done=float(np.mean(right)),
        done_range=(float(low[0]), float(high[0])),
        behind=(float(behind.mean()), float(low[1]), float(high[1])),
        kept=float(kept.mean()) if len(kept) else float("nan"),
        kept_range=(float(bounds[0][0]), float(bounds[1][0])),
        nearest=float(np.mean([row["nearest"] for row in group])),
        evaluations=float(np.mean([row["evaluations"] for row in group])),
        by_kind={
            kind: float(np.mean([value for value, row in zip(right, group, strict=True) if row["kind"] == kind]))
            for kind in kinds
        },
    )


def _kept(one: Measured) -> float:
    return 0.0 if np.isnan(one.kept) else one.kept


def _front(measured: Sequence[Measured]) -> list[int]:
    values = [(one.done, _kept(one), -one.evaluations) for one in measured]
    return [
        n
        for n, mine in enumerate(values)
        if not any(all(b >= a for a, b in zip(mine, other, strict=True)) and other != mine for other in values)
    ]


def _name(setting: dict[str, Any]) -> str:
    bounds = setting["guidance_interval"]
    within = "" if bounds is None else f", sigma {bounds[0]:g} to {bounds[1]:g}"
    sampler = "" if setting["sampler"] == "euler_ancestral" else f", {setting['sampler']}"
    return f"{setting['text_cfg']:g} / {setting['image_cfg']:g}{within}{sampler}"


def _line(one: Measured, picked: bool, on_front: bool) -> tuple[Any, ...]:
    setting, bounds = one.setting, one.setting["guidance_interval"]
    return (
        f"{setting['text_cfg']:g} / {setting['image_cfg']:g}",
        setting["steps"],
        setting["sampler"],
        "all" if bounds is None else f"{bounds[0]:g} to {bounds[1]:g}",
        f"{one.evaluations:g}",
        f"{100 * one.done:.1f}",
        "{:.1f} to {:.1f}".format(*(100 * value for value in one.done_range)),
        "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in one.behind)),
        f"{one.kept:.1f}",
        "{:.1f} to {:.1f}".format(*one.kept_range),
        f"{one.nearest:.1f}",
        "picked" if picked else "on the front" if on_front else "",
    )


def _judged(sample: Sample, picture: Image.Image) -> dict[str, Any]:
    if sample.target is None:
        raise ConfigError(f"sample {sample.key} has no true result to compare with; give pairs")
    size = sample.source.size
    source, target, result = (
        _pixels(one if one.size == size else fit(one, size)) for one in (sample.source, sample.target, picture)
    )
    changed = np.abs(target - source).max(axis=2) > UNTOUCHED
    untouched = ~_near(changed)
    error = (result - target) ** 2
    return {
        "done": bool(error.mean() < ((result - source) ** 2).mean()),
        "kept": psnr(error[untouched].mean(), BEST_PSNR) if untouched.mean() >= LEAST_UNTOUCHED else None,
        "nearest": psnr(error.mean(), BEST_PSNR),
        "kind": "all",
    }


def _near(changed: np.ndarray) -> np.ndarray:
    """What lies at most BORDER pixels along rows or columns from something that is true."""
    from PIL import ImageFilter

    grown = Image.fromarray(changed.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * BORDER + 1))
    return np.asarray(grown) > 0


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
