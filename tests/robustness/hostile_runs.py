"""Run folders, settings, addresses and names that are spoiled each in one way."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from spoiling import (
    ADDRESSES,
    CONTROL,
    ESCAPES,
    HUGE,
    SCRIPT,
    Case,
    as_json,
    editing,
    generator,
    odd,
    picked,
    picked_list,
    spoil_bytes,
    spoil_json,
    spoil_lines,
    spoiled,
)

# ---- runs


@generator
def evaluation_run(case: Case) -> list[Any]:
    place = case.copied("evaluation")
    spoil_json(place / "run.json", case.rng)
    return ["evaluate", "report", place]


@generator
def evaluation_pictures(case: Case) -> list[Any]:
    place = case.copied("evaluation")
    run = json.loads((place / "run.json").read_text())
    run["pictures"] = [
        [picked(case, *ESCAPES, "../../secret.txt", "/etc/passwd", "link.png", "fifo.png", CONTROL), SCRIPT]
    ]
    (place / "run.json").write_text(json.dumps(run))
    (place / "link.png").symlink_to(case.place.parent / "secret.txt")
    os.mkfifo(place / "fifo.png")
    return ["evaluate", "report", place]


def training(case: Case, *more: Any, run: Path | None = None) -> list[Any]:
    run = run or case.place / "run"
    base = [
        "train",
        "--data",
        case.seeds / "store",
        "--base",
        case.seeds / "tiny4",
        "--out",
        run,
        "--preset",
        "embedded",
    ]
    return [*base, "--steps", "4", "--batch-size", "2", "--set", "validate_every=0", *more]


@generator
def training_run(case: Case) -> list[Any]:
    place = case.copied("run")
    paths = [one for one in sorted([*place.rglob("*.json"), *place.rglob("*.jsonl")]) if "tokenizer" not in str(one)]
    path = case.rng.choice(paths)
    (spoil_lines if path.suffix == ".jsonl" else spoil_json)(path, case.rng)
    return training(case, run=place)


@generator
def training_step(case: Case) -> list[Any]:
    place = case.copied("run")
    path = sorted((place / "checkpoints").glob("step-*.pt"))[-1]
    if case.rng.random() < 0.5:
        spoil_bytes(path, case.rng, case.rng.choice((20_000, None)))
    else:
        saved = torch.load(path, weights_only=True)
        name = case.rng.choice(sorted(saved))
        saved[name] = case.rng.choice(
            (None, 3, "x", [], {}, torch.zeros(2), {"a": torch.zeros(1).expand(10**4, 10**4, 99)})
        )
        torch.save(saved, path)
    return training(case, run=place)


@generator
def training_cache(case: Case) -> list[Any]:
    place = case.copied("run")
    found = sorted(one for one in place.rglob("*") if one.is_file() and "cache" in one.parts[-2]) or [
        place / "log.jsonl"
    ]
    spoil_bytes(case.rng.choice(found), case.rng, 4000)
    return training(case, run=place)


@generator
def training_config(case: Case) -> list[Any]:
    names = (
        "steps",
        "batch_size",
        "resolution",
        "resize",
        "betas",
        "columns",
        "dropout",
        "workers",
        "lora_rank",
        "optimizer",
    )
    said = {name: odd(case.rng) for name in case.rng.sample((*names, "ema_decay", "cache", "x"), 2)}
    path = case.place / "config.json"
    path.write_text(as_json(picked_list(case, [said], [odd(case.rng)])[0], case.rng), errors="surrogatepass")
    return [
        "train",
        "--data",
        case.seeds / "store",
        "--base",
        case.seeds / "tiny4",
        "--out",
        case.place / "run",
        "--config",
        path,
    ]


@generator
def training_set(case: Case) -> list[Any]:
    names = (
        "lora_rank",
        "workers",
        "resolution",
        "micro_batch",
        "keep",
        "cache_variants",
        "shuffle_buffer",
        "betas",
        "min_snr",
    )
    value = json.dumps(case.rng.choice((*HUGE, -1, 0, "x", [], 1e308, None, True)))
    return training(case, "--set", f"{picked(case, *names)}={value}")


# ---- what is written on the command line


NUMBERS = (
    "-1",
    "0",
    "nan",
    "inf",
    "1e308",
    "65536",
    "100000",
    "1000000000",
    "9" * 30,
    "9" * 5000,
    "x",
    "0x10",
    "",
    "1.5",
)


@generator
def numbers(case: Case) -> list[Any]:
    edit = editing(case, case.seeds / "tiny")
    options = (
        "--steps",
        "--seeds",
        "--seed",
        "--batch",
        "--text-cfg",
        "--image-cfg",
        "--resolution",
        "--size",
        "--dtype",
    )
    pairs = ["pairs", case.seeds / "edits.jsonl", "--checkpoint", case.seeds / "tiny4", "--out", case.place / "out"]
    flags = (
        "--candidates",
        "--size",
        "--steps",
        "--batch-pairs",
        "--partition",
        "--rows-per-shard",
        "--p",
        "--cfg",
        "--save-seconds",
    )
    value = picked(case, *NUMBERS, "65536x65536", "8x99999", "0x0", "1/0", "99999/99999")
    if case.rng.random() < 0.6:
        return [*edit, picked(case, *options), value]
    return [*pairs, "--clip", "embedded", "--candidates", "1", "--steps", "1", picked(case, *flags), value]


@generator
def training_numbers(case: Case) -> list[Any]:
    flags = (
        "--lora",
        "--workers",
        "--resolution",
        "--micro-batch",
        "--save-every",
        "--seed",
        "--learning-rate",
        "--batch-size",
    )
    return training(case, picked(case, *flags), picked(case, *NUMBERS))


@generator
def addresses(case: Case) -> list[Any]:
    address, out = picked(case, *ADDRESSES), case.place / "out"
    return picked_list(
        case,
        ["inspect", address],
        ["convert", address, out, "--to", "ldm"],
        ["convert", case.seeds / "tiny", address, "--to", picked(case, "ldm", "diffusers")],
        ["dataset", "copy", address, out],
        ["dataset", "copy", case.seeds / "store", address],
        ["dataset", "import", address, "--out", out],
        ["dataset", "info", address],
        ["edit", address, "--instruction", "x", "--out", out],
        editing(case, Path("x"))[:5] + [address],
        ["train", "--data", address, "--base", case.seeds / "tiny4", "--out", out],
        ["train", "--data", case.seeds / "store", "--base", address, "--out", out],
        ["captions", "--sample", "1", "--out", address],
        ["filter", case.seeds / "store", "--clip", address],
        ["evaluate", "report", address],
    )


@generator
def names_of_files(case: Case) -> list[Any]:
    """Targets that are no names, or names that would write on a terminal."""
    out = picked(
        case,
        "/",
        "",
        ".",
        "a" * 300,
        CONTROL + ".png",
        "\u202e.png",
        "-",
        "\ud800.png",
        "out\n.html",
        "/dev/full",
    )
    return picked_list(
        case,
        ["convert", case.seeds / "tiny", out, "--to", picked(case, "ldm", "diffusers")],
        ["dataset", "sheet", case.seeds / "store", "--out", out],
        ["dataset", "export", case.seeds / "store", "--out", out],
        ["captions", "--sample", "1", "--out", out],
        [*editing(case, case.seeds / "tiny")[:-1], out],
        ["inspect", out],
        ["evaluate", "report", out],
    )


@generator
def clip_folder(case: Case) -> list[Any]:
    place = case.copied("clip")
    path = place / "config.json"
    said = json.loads(path.read_text())
    part = picked(case, "vision_cfg", "text_cfg")
    if case.rng.random() < 0.5:
        said[part] = {
            **said[part],
            picked(case, "layers", "width", "heads", "patch_size", "image_size"): case.rng.choice(HUGE),
        }
    path.write_text(
        as_json(said if case.rng.random() < 0.5 else spoiled(said, case.rng), case.rng), errors="surrogatepass"
    )
    return ["filter", case.seeds / "store", "--clip", place]


@generator
def newer_options(case: Case) -> list[Any]:
    """Of edit and area, each with a number or a text that it does not expect."""
    flag = picked(
        case,
        "--suffix",
        "--feature-cache",
        "--guidance",
        "--guidance-interval",
        "--guidance-rescale",
        "--mask",
        "--lora",
    )
    value = picked(case, *NUMBERS, CONTROL, SCRIPT, "auto", "instruct-diffusion", "../../escaped", "x" * 5000)
    edit = editing(case, case.seeds / "tiny")
    area = ["area", case.seeds / "picture.png", *edit[2:-1], case.place / "area.png"]
    return [*picked_list(case, edit, area), flag, value, *([value] if flag == "--guidance-interval" else [])]


@generator
def averages(case: Case) -> list[Any]:
    """ip2p average of a stranger's run."""
    place = case.copied("run")
    path = picked_list(case, sorted(place.glob("*.json")), sorted((place / "checkpoints").glob("step-*.pt")))[0]
    (spoil_json if path.suffix == ".json" else spoil_bytes)(path, case.rng)
    return [
        "average",
        place,
        "--sigma-rel",
        picked(case, "0.1", "0", "nan", "1e9"),
        "--out",
        case.place / "a.safetensors",
    ]


@generator
def judged(case: Case) -> list[Any]:
    """evaluate judge reads a run and a benchmark's list; the server is never there."""
    place = case.copied("evaluation")
    row = {"instruction": "snow", "source": "curve.png", "edited": "curve.png", "key": "a", "task": "x"}
    row[case.rng.choice(sorted(row))] = case.rng.choice((odd(case.rng), *ESCAPES, CONTROL))
    (place / "edits.jsonl").write_text(json.dumps(row) + "\n", errors="surrogatepass")
    more = picked_list(
        case, [], ["--edits", place / "edits.jsonl"], ["--edits", place / "edits.jsonl", "--sources", "/etc"]
    )
    server = ["--server", "http://127.0.0.1:9/v1", "--model", "x", "--retries", "0"]
    return [
        "evaluate",
        "judge",
        place,
        *more,
        *server,
        *picked_list(case, [], ["--plan"], ["--request", str(odd(case.rng))]),
    ]


def session_of(place: Path) -> Path:
    """A session of two turns, as the engine writes it."""
    place.mkdir()
    shutil.copy(place.parent.parent.parent / "seeds" / "picture.png", place / "original.png")
    turn = {"instruction": "snow", "seed": 0, "changed": 0.1, "drift": 0.0, "settings": {}}
    turns = [{**turn, "number": n + 1, "parent": n} for n in range(2)]
    state = {"version": 1, "size": [64, 64], "current": 2, "turns": turns}
    (place / "session.json").write_text(json.dumps(state))
    for n in (1, 2):
        shutil.copy(place / "original.png", place / f"turn-{n:03d}.png")
        save_file({"latents": torch.zeros(4, 8, 8), "area": torch.zeros(1, 8, 8)}, place / f"turn-{n:03d}.safetensors")
    return place


@generator
def sessions(case: Case) -> list[Any]:
    """A folder of several turns, gone on with."""
    place = session_of(case.place / "session")
    how = case.rng.randrange(4)
    if how < 2:
        spoil_json(place / "session.json", case.rng)
    elif how == 2:
        state = json.loads((place / "session.json").read_text())
        state["turns"][case.rng.randrange(2)]["parent"] = case.rng.choice((2, 1, 99, -1, 1.0, "1"))
        (place / "session.json").write_text(json.dumps(state))
    else:
        shape = case.rng.choice(((4, 8, 8), (4, 4096, 512), (8,), (0, 8, 8)))
        value = case.rng.choice(
            (torch.full(shape, float("nan")), torch.zeros(shape), torch.zeros(shape, dtype=torch.int8))
        )
        save_file({"latents": value, picked(case, "area", "x"): torch.zeros(1, 8, 8)}, place / "turn-002.safetensors")
    say = ["session", "say", place, "make it night", *editing(case, case.seeds / "tiny")[4:-4]]
    return picked_list(
        case, say, say, ["session", "history", place], ["session", "undo", place], ["session", "branch", place, "1"]
    )
