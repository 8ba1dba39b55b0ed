"""What the doctor finds of faults that were planted, and what each of them costs a training.

    python benchmarks/faults.py doctor --out runs/doctor # scenes with faults: what is found, and false alarms
    python benchmarks/faults.py train --out runs/faults    # the embedded model on each; what is there is not done again

Both print a table in Markdown. Training goes on from the shipped edit model with one seed and one order of the examples
for all sets, so that models differ by what was planted alone; held-out scenes and phrasings, judged by truth.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ip2p_engine.data.doctor import doctor
from ip2p_engine.data.record import PairRecord
from ip2p_engine.data.store import PairWriter
from ip2p_engine.scenes.grammar import INSTRUCTIONS, Edit, caption_of, sample_edits
from ip2p_engine.scenes.world import BACKGROUNDS, COLOURS, SHAPES, render

Plant = Callable[[PairRecord, random.Random, Sequence[PairRecord]], PairRecord]
LEARNED = ("shift", "unchanged", "wrong instruction", "swapped", "cast")
SIDE = 64
VALUES = {
    name: f"(?P<{name}>{'|'.join(values)})"
    for own, values in {"colour": COLOURS, "background": BACKGROUNDS, "shape": SHAPES}.items()
    for name in (own, f"old_{own}")
}
"""Of the grammar's phrasings, as patterns."""


def scene_pairs(count: int, *, seed: int, captions: bool = False) -> list[PairRecord]:
    """True pairs of training scenes, all eleven kinds in turn."""
    return [_pair(n, edit, captions) for n, edit in enumerate(sample_edits(count, seed=seed, held_out=False))]


def _pair(number: int, edit: Edit, captions: bool) -> PairRecord:
    return PairRecord(
        original_image=encoded(render(edit.source)),
        edited_image=encoded(render(edit.target)),
        edit_prompt=edit.instruction,
        original_prompt=caption_of(edit.source) if captions else "",
        edited_prompt=caption_of(edit.target) if captions else "",
        seed=number,
        p=None,
        cfg=None,
        key=f"{number:06d}",
    )


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def shift(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    """By 2 to 5 of 64 pixels along each of one or two axes; what comes in is the edge's colour."""
    by = [draw.choice((-1, 1)) * draw.randint(2, 5) for _ in "xy"]
    by[draw.randrange(2)] *= draw.randrange(2)
    wide = np.pad(np.asarray(opened(pair.edited_image)), ((8, 8), (8, 8), (0, 0)), mode="edge")
    return _after(pair, Image.fromarray(wide[8 - by[1] : 72 - by[1], 8 - by[0] : 72 - by[0]]))


def zoom(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    """By 5 to 10 % about the middle."""
    margin = SIDE * (1 - 1 / draw.uniform(1.05, 1.10)) / 2
    box = (margin, margin, SIDE - margin, SIDE - margin)
    return _after(pair, opened(pair.edited_image).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))


def cast(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    """Each channel by up to 25 of 255, the strongest by at least 10."""
    by = np.array([draw.uniform(-25, 25) for _ in "rgb"])
    by *= max(1.0, 10 / np.abs(by).max())
    pixels = np.asarray(opened(pair.edited_image), dtype=np.float32) + by
    return _after(pair, Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8)))


def unchanged(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    return replace(pair, edited_image=pair.original_image)


def wrong_instruction(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    """Another pair's, that asks for something else: "make it bigger" in place of "enlarge the heart" is not wrong."""
    return replace(pair, edit_prompt=draw.choice([one for one in others if _asks(one) != _asks(pair)]).edit_prompt)


def _asks(pair: PairRecord) -> tuple[str, str]:
    """The kind of edit, and which colour, ground or shape it is to become."""
    for kind, phrasings in INSTRUCTIONS.items():
        for phrasing in phrasings.train:
            if found := re.fullmatch(re.sub(r"{(\w+)}", lambda name: VALUES[name[1]], phrasing), pair.edit_prompt):
                return kind, found.groupdict().get(kind, "")
    raise ValueError(f"the grammar does not say {pair.edit_prompt!r}")


def swapped(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    return replace(pair, original_image=pair.edited_image, edited_image=pair.original_image)


def blocks(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    return replace(pair, edited_image=encoded(opened(pair.edited_image), "JPEG", quality=draw.randint(5, 15)))


def duplicate(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    """Of an earlier pair, saved once more as a JPEG."""
    other = draw.choice([one for one in others if one.key < pair.key] or [others[0]])
    pictures = (encoded(opened(one), "JPEG", quality=95) for one in (other.original_image, other.edited_image))
    return replace(
        pair, edit_prompt=other.edit_prompt, **dict(zip(("original_image", "edited_image"), pictures, strict=True))
    )


def caption(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    """In place of the instruction."""
    return replace(pair, edit_prompt=draw.choice(CAPTIONS))


def aspect(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    return _after(pair, opened(pair.edited_image).crop((0, 0, SIDE, SIDE - draw.randint(6, 20))))


def tiny(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    return _after(pair, opened(pair.edited_image).resize((32, 32)))


def empty(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    return _after(pair, Image.new("RGB", (SIDE, SIDE), (draw.randrange(256), 90, 90)))


def broken(pair: PairRecord, draw: random.Random, others: Sequence[PairRecord]) -> PairRecord:
    return replace(pair, edited_image=pair.edited_image[: draw.randint(20, len(pair.edited_image) // 2)])


def _after(pair: PairRecord, picture: Image.Image) -> PairRecord:
    return replace(pair, edited_image=encoded(picture))


CAPTIONS = tuple(caption_of(edit.target) for edit in sample_edits(200, seed=99, held_out=False))
PLANTS: dict[str, Plant] = {
    "shift": shift,
    "zoom": zoom,
    "cast": cast,
    "unchanged": unchanged,
    "swapped": swapped,
    "wrong instruction": wrong_instruction,
    "blocks": blocks,
    "duplicate": duplicate,
    "caption": caption,
    "aspect": aspect,
    "tiny": tiny,
    "empty": empty,
    "broken": broken,
}
NAMED = {"shift": "offset", "zoom": "offset", "empty": "tiny", "wrong instruction": "instruction"}
"""The doctor's words, where they are others."""
ALSO = {"wrong instruction": "swapped"}
"""As good a word: an instruction that asks for the way back makes a swapped pair."""


def planted(pairs: Sequence[PairRecord], shares: dict[str, float], *, seed: int) -> tuple[list[PairRecord], list[str]]:
    """(the pairs, each fault in its share of them, and of each which); what is drawn depends on its number alone."""
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    faults, start = [""] * len(pairs), 0
    for name, share in shares.items():
        for n in order[start : start + round(share * len(pairs))]:
            faults[n] = name
        start += round(share * len(pairs))
    sound = [pair for pair, fault in zip(pairs, faults, strict=True) if not fault]
    found = [
        PLANTS[fault](pair, random.Random(seed * 1_000_003 + n), sound) if fault else pair
        for n, (pair, fault) in enumerate(zip(pairs, faults, strict=True))
    ]
    return found, faults


def write_store(folder: Path, pairs: Sequence[PairRecord]) -> Path:
    with PairWriter(folder, manifest={"config": {"scenes": len(pairs)}}) as writer:
        done = writer.done_keys()
        writer.write(*(pair for pair in pairs if pair.key not in done))
    return folder


def study_doctor(options: argparse.Namespace) -> None:
    """Several sets, each with some of the faults in the same share of its pairs; no captions, no kinds of edit."""
    from ip2p_engine.edit import InstructPix2Pix

    editor = InstructPix2Pix.load(options.checkpoint, device="cpu") if options.checkpoint else None
    names = options.faults or list(PLANTS)
    sets = {n: dict.fromkeys(names[n :: options.sets], options.share) for n in range(options.sets)}
    tallies: dict[int, dict[str, list[int]]] = {}
    for number, shares in sets.items():
        result = options.out / f"set-{number}.json"
        if not result.exists():
            seed = options.seed + number
            pairs, faults = planted(scene_pairs(options.pairs, seed=10 + seed), shares, seed=seed)
            store = write_store(options.out / f"set-{number}", pairs)
            looked = doctor(store, clip=options.clip, editor=editor)
            found = {one.row: set(one.faults) for one in looked.findings}
            if options.show:
                _show_misses(pairs, faults, found)
            result.write_text(json.dumps(_tally(faults, found)))
        tallies[number] = json.loads(result.read_text())
    print(doctor_table(tallies, options))


def _tally(faults: Sequence[str], found: dict[int, set[str]]) -> dict[str, list[int]]:
    """Of each planted fault (planted, found), of each of the doctor's words (sound for it, called so)."""
    tally: dict[str, list[int]] = {}
    for row, fault in enumerate(faults):
        if fault:
            counts = tally.setdefault(fault, [0, 0])
            counts[0] += 1
            counts[1] += bool({NAMED.get(fault, fault), ALSO.get(fault)} & found.get(row, set()))
    for word in dict.fromkeys(NAMED.get(name, name) for name in PLANTS):
        rows = [row for row, fault in enumerate(faults) if not fault]
        tally[f"false {word}"] = [len(rows), sum(word in found.get(row, ()) for row in rows)]
    return tally


def doctor_table(tallies: dict[int, dict[str, list[int]]], options: argparse.Namespace) -> str:
    lines = [f"| planted in {options.share:.0%} of {options.pairs} pairs | called | found | false alarms |"]
    lines += ["| --- | --- | --- | --- |"]
    for name in options.faults or PLANTS:
        word = NAMED.get(name, name)
        count, hits = next(one[name] for one in tallies.values() if name in one)
        sound, false = np.array([one[f"false {word}"] for one in tallies.values()]).sum(axis=0)
        called = " or ".join(filter(None, (word, ALSO.get(name))))
        lines.append(
            f"| {name} | {called} | {hits} of {count} ({hits / count:.1%}) | {false} of {sound} ({false / sound:.2%}) |"
        )
    return "\n".join(lines)


def _show_misses(pairs: Sequence[PairRecord], faults: Sequence[str], found: dict[int, set[str]]) -> None:
    for row, fault in enumerate(faults):
        words = found.get(row, set()) - {"split"}
        if (fault and not {NAMED.get(fault, fault), ALSO.get(fault)} & words) or (not fault and words):
            print(f"{fault or 'sound'}: {words or 'nothing'}: {pairs[row].edit_prompt}", file=sys.stderr)


def study_training(options: argparse.Namespace) -> None:
    from ip2p_engine.edit import EditConfig, InstructPix2Pix
    from ip2p_engine.hooks import Hooks
    from ip2p_engine.scenes.exam import examine
    from ip2p_engine.train import preset, train

    pairs = scene_pairs(options.pairs, seed=1)
    config = preset("embedded", steps=options.steps, batch_size=options.batch, validate_every=0, validation_pairs=0)
    rights: dict[str, list[bool]] = {}
    for name in ("clean", *LEARNED):
        home = options.out / name.replace(" ", "-")
        exam = home / "exam.json"
        if not exam.exists():
            started = time.process_time()
            shares = {} if name == "clean" else {name: options.share}
            store = write_store(home / "pairs", planted(pairs, shares, seed=2)[0])
            hooks = Hooks(on_progress=lambda done, total, note, name=name: _tell(name, done, total))
            result = train(config, data=store, base=options.base, out=home / "run", device="cpu", hooks=hooks)
            editor = InstructPix2Pix.load(str(home / "run" / "ema.safetensors"), device="cpu")
            found = examine(
                editor, count=options.n, seed=7, config=EditConfig(steps=options.edit_steps, sampler="ddim")
            )
            right = [row["judged"]["success"] for row in found.rows]
            kept = [row["judged"]["kept"] for row in found.rows]
            about = {"right": right, "kept": kept, "background": found.overall.background_psnr, "steps": result.step}
            exam.write_text(json.dumps({**about, "cpu_seconds": time.process_time() - started}))
            _tell(name, sum(right), len(right))
        rights[name] = json.loads(exam.read_text())
    print(training_table(rights, options))


def _tell(name: str, done: int, total: int) -> None:
    if done % 50 == 0 or done == total:
        print(f"{name}: {done} of {total}", file=sys.stderr, flush=True)


def training_table(rights: dict[str, Any], options: argparse.Namespace) -> str:
    clean, count = rights["clean"], options.n
    lines = [
        f"| {options.share:.0%} of the pairs | right % | against clean | only clean / only this right | background dB |"
    ]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name, found in rights.items():
        lost = sum(one and not other for one, other in zip(clean["right"], found["right"], strict=True))
        won = sum(other and not one for one, other in zip(clean["right"], found["right"], strict=True))
        share, gap = sum(found["right"]) / count, (won - lost) / count
        spread = 1.96 * math.sqrt(max(0.0, (won + lost) / count - gap**2) / count)
        beside = "" if name == "clean" else f"{100 * gap:+.1f} ± {100 * spread:.1f}"
        both = "" if name == "clean" else f"{lost} / {won}"
        lines.append(f"| {name} | {100 * share:.1f} | {beside} | {both} | {found['background']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)
    looked = actions.add_parser("doctor")
    looked.add_argument("--pairs", type=int, default=1000, help="of each set (default: 1000)")
    looked.add_argument("--share", type=float, default=0.05, help="of a set's pairs with each fault (default: 0.05)")
    looked.add_argument("--sets", type=int, default=3, help="among which the faults are dealt (default: 3)")
    looked.add_argument("--faults", nargs="+", choices=list(PLANTS), help="default: all")
    looked.add_argument("--clip", help="judge instructions by this CLIP (embedded)")
    looked.add_argument("--checkpoint", help="judge instructions by this edit model (embedded)")
    looked.add_argument("--seed", type=int, default=0, help="thresholds were chosen on others (default: 0)")
    looked.add_argument("--out", type=Path, required=True, help="sets and results; what is there is not done again")
    looked.add_argument("--show", action="store_true", help="what was missed, and what was called a fault and is none")
    looked.set_defaults(run=study_doctor)
    found = actions.add_parser("train")
    found.add_argument("--out", type=Path, required=True, help="stores, runs and results; an unfinished study goes on")
    found.add_argument("--pairs", type=int, default=2000)
    found.add_argument("--share", type=float, default=0.2, help="of the pairs with a fault (default: 0.2)")
    found.add_argument("--steps", type=int, default=500)
    found.add_argument(
        "--base", default="embedded", help="what is trained on: the shipped model (default), embedded-sd"
    )
    found.add_argument("--batch", type=int, default=24)
    found.add_argument("--n", type=int, default=300, help="held-out edits (default: 300)")
    found.add_argument("--edit-steps", type=int, default=8)
    found.set_defaults(run=study_training)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
