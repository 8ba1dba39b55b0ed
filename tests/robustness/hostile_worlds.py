"""Photographs and measured settings, odd pictures, LoRAs, tokenizers, JSON, variables, paths, ids of the hub."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile_data import bad_picture
from hostile_more import _chunk, _png, _special, _zeros, picture_bomb
from hostile_runs import session_of
from PIL import Image
from safetensors.torch import load, save_file
from spoiling import (
    CONTROL,
    ESCAPES,
    HUGE,
    SCRIPT,
    Case,
    editing,
    generator,
    header_of,
    odd,
    one_step,
    picked,
    picked_list,
    reading,
    spoil_bytes,
    spoil_json,
    spoil_lines,
    write_header,
)

JUNK = (
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-308",
    "9" * 30,
    "x",
    "",
    " ",
    "1:2",
    "0x10",
    "1_0",
    "\u0661",
    "1,5",
)

# ---- the world of photographs, and settings that are measured


def small(case: Case, *more: Any) -> list[Any]:
    return ["--checkpoint", case.seeds / "tiny", *more]


def _photo_commands(case: Case, place: Path) -> list[Any]:
    out, one = case.place / "out", ["--pictures", place, "--n", "1"]
    steps = ["--steps", "1"]
    return picked_list(
        case,
        ["photos", "judge", *one, *small(case), *steps],
        ["photos", "judge", *one, *small(case), "--of", "autoencoder", "--json"],
        ["photos", "judge", *one, *small(case), *steps, "--sheet", case.place / "sheet.png"],
        ["photos", "pairs", out, *one],
        ["photos", "pairs", out, *one],
        ["evaluate", "recommend", "photos", *one, *small(case), *steps, "--text-cfg", "1", "--out", out],
        ["evaluate", "areas", "photos", *one, *small(case), *steps, "--out", out],
        ["evaluate", "session", "photos", *one, "--turns", "1", *small(case), *steps, "--out", out],
    )


@generator
def photographs(case: Case) -> list[Any]:
    """A folder of gathered photographs, one of which is none, or is of another kind."""
    place = case.copied("photographs")
    for path in case.rng.sample(sorted(place.glob("*.png")), case.rng.choice((1, 3, 30))):
        path.unlink()
        how = case.rng.randrange(5)
        if how == 0:
            _special(path, case)
        elif how == 1:
            path.write_bytes(bad_picture(case))
        elif how == 2:
            path.write_bytes(picture_bomb(case)[1])
        elif how == 3:
            mode = picked(case, "1", "L", "LA", "P", "RGBA", "I;16", "RGB")
            Image.new(mode, case.rng.choice(((1, 1), (2000, 1), (1, 300), (7, 9), (300, 300), (3000, 20)))).save(path)
    return _photo_commands(case, place)


@generator
def measured_runs(case: Case) -> list[Any]:
    """A folder of measured settings, areas or turns that a stranger wrote, gone on with."""
    kind = picked(case, *MEASURED)
    _measure(case, kind)
    place = case.copied(kind)
    path = case.rng.choice(sorted([*place.rglob("*.json"), *place.rglob("*.jsonl")]))
    how = case.rng.randrange(4)
    if how == 0:
        path.unlink()
        _special(path, case)
    elif path.suffix == ".jsonl":
        spoil_lines(path, case.rng)
    else:
        spoil_json(path, case.rng)
    return [*MEASURED[kind](case), "--out", place] if case.rng.random() < 0.8 else ["evaluate", "report", place]


MEASURED: dict[str, Callable[[Case], list[Any]]] = {
    "recommend": lambda case: [
        *["evaluate", "recommend", "--n", "2", *small(case), "--steps", "1", "--text-cfg", "1", "--image-cfg", "1"]
    ],
    "areas": lambda case: ["evaluate", "areas", "--n", "2", *small(case), "--steps", "1"],
    "sessions": lambda case: ["evaluate", "session", "--n", "1", "--turns", "2", *small(case), "--steps", "1"],
}


def _measure(case: Case, kind: str) -> None:
    """A sound folder, made when the first case asks, in a process of its own."""
    from fuzz import leave

    from ip2p_engine.cli import main

    if (case.seeds / kind).exists():
        return
    process = os.fork()
    if not process:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        leave(lambda: main([str(one) for one in (*MEASURED[kind](case), "--out", case.seeds / kind)]))
    os.waitpid(process, 0)


@generator
def measuring_settings(case: Case) -> list[Any]:
    """evaluate recommend, areas and session, and ip2p photos, with settings that nothing can be measured with."""
    kind = picked(case, *MEASURED, "recommend")
    flags = {
        "recommend": ("--text-cfg", "--image-cfg", "--steps", "--sampler", "--guidance-interval", "--decibels"),
        "areas": ("--text-cfg", "--sampler", "--guidance-rescale", "--schedule", "--suffix"),
        "sessions": ("--turns", "--handed-on", "--phrasings", "--image-cfg"),
    }[kind]
    flag = case.rng.choice((*flags, "--n", "--seed", "--batch", "--pictures", "--dtype"))
    value = picked(
        case, *JUNK, CONTROL, "euler", "0:1000", "5:1", "1:1", "nan:inf", ":", "all", "x" * 5000, "1000000000"
    )
    where = case.rng.choice(("scenes", "photos", "/", "", "scenes ", case.seeds / "store", case.seeds / "picture.png"))
    run = MEASURED[kind](case)
    return [*run[:2], where, *run[2:], "--out", case.place / "out", flag, value, *picked_list(case, [], ["--write"])]


# ---- pictures


def _many_frames(case: Case, kind: str) -> bytes:
    """An animation whose frames cost a few bytes each."""
    count, stream = case.rng.choice((2, 1000, 30_000)), io.BytesIO()
    picture = Image.new("P", (64, 64))
    if kind == "GIF":
        picture.save(stream, "GIF")
        data = stream.getvalue()
        at = data.find(b",\0\0\0\0")
        frame = b"\x21\xf9\x04\0\0\0\0\0" + data[at:-1]
        return data[:at] + frame * count + case.rng.choice((b";", b""))
    if kind == "PNG":
        pixels = zlib.compress(bytes(65 * 64))
        size, parts = struct.pack(">IIII", 64, 64, 0, 0), []
        for n in range(min(count, 5000)):
            parts.append(_chunk(b"fcTL", struct.pack(">I", 2 * n) + size + bytes(6)))
            parts.append(_chunk(b"fdAT", struct.pack(">I", 2 * n + 1) + pixels))
        return _png(
            64, 64, 3, 8, pixels, _chunk(b"PLTE", bytes(768)), _chunk(b"acTL", struct.pack(">II", count, 0)), *parts
        )
    picture = picture.convert("RGB")
    others = [picture.point(lambda level, n=n: n % 255) for n in range(min(count, 60))]
    picture.save(stream, kind, save_all=True, append_images=others)
    return stream.getvalue()


def _chunks(case: Case) -> bytes:
    """A PNG of many or contradicting chunks."""
    pixels = zlib.compress(b"".join(b"\0" + bytes(64 * 3) for _ in range(64)))
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    packed = zlib.compress(bytes(1 << 20), 9)
    kinds: tuple[Callable[[], list[bytes]], ...] = (
        lambda: [_chunk(b"tEXt", b"k\0v")] * 300_000,
        lambda: [_chunk(b"tEXt", b"ip2p\0" + b"[" * 3_000_000)],
        lambda: [_chunk(b"zTXt", b"ip2p\0\0" + packed)] * 63,
        lambda: [_chunk(b"iTXt", b"ip2p\0\1\0\0\0" + packed)] * 200,
        lambda: [
            _chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(16) + b"RGB " + bytes(case.rng.choice((0, 200, 10**6)))))
        ],
        lambda: [_chunk(b"iCCP", b"x\0\0" + _zeros(64 << 20))] * 8,
        lambda: [head, head],
        lambda: [_chunk(b"PLTE", bytes(3))] * 9,
        lambda: [_chunk(b"tRNS", bytes(case.rng.choice((0, 1, 6, 900))))],
        lambda: [_chunk(b"eXIf", bytes(case.rng.choice((0, 5, 70_000))))],
        lambda: [_chunk(b"gAMA", bytes(case.rng.choice((0, 2, 4)))), _chunk(b"cHRM", b"\xff" * 32)],
        lambda: [_chunk(b"pHYs", bytes(9)), _chunk(b"sRGB", b""), _chunk(b"IDAT", b"")],
        lambda: [_chunk(b"IDAT", b"")] * 200_000,
    )
    return _png(64, 64, 2, 8, pixels, *case.rng.choice(kinds)())


def _scans(case: Case) -> bytes:
    """A progressive JPEG that repeats a scan: each costs a pass over all coefficients."""
    stream, side = io.BytesIO(), case.rng.choice((64, 2000, 9000))
    Image.new("RGB", (side, side), (90, 160, 20)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    at = data.rfind(b"\xff\xc4") if case.rng.random() < 0.5 else data.rfind(b"\xff\xda")
    return data[:-2] + data[at:-2] * case.rng.choice((5, 90, 3000)) + data[-2:]


def _entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value)


def _tiff(case: Case) -> bytes:
    """Tiles and strips as a program that lies writes them."""
    side, tile = case.rng.choice((64, 9900, 65_535)), case.rng.choice((0, 16, 17, 64, 2**20, 2**31))
    packing, bits = case.rng.choice((1, 5, 7, 8, 32773, 34925, 50000)), case.rng.choice((1, 8, 16, 32, 63))
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, bits), (259, 3, 1, packing)]
    tags += [(262, 3, 1, case.rng.choice((1, 2, 3, 5, 6, 9, 32803))), (277, 3, 1, case.rng.choice((1, 3, 4, 0, 999)))]
    if case.rng.random() < 0.6:
        tags += [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 300), (325, 4, 1, case.rng.choice((64, 2**31)))]
    else:
        tags += [(273, 4, 1, 300), (278, 4, 1, case.rng.choice((0, 1, side, 2**31))), (279, 4, 1, 4096)]
    if case.rng.random() < 0.3:
        tags.append((case.rng.choice((330, 34665, 34675, 700, 320)), 4, case.rng.choice((1, 2**30)), 8))
    block = struct.pack("<H", len(tags)) + b"".join(_entry(*one) for one in sorted(tags))
    following = case.rng.choice((0, 0, 8, 2**32 - 1))
    head = b"II*\0" + struct.pack("<I", 8) + block + struct.pack("<I", following)
    return head.ljust(300, b"\0") + case.rng.choice((bytes(5000), zlib.compress(bytes(1 << 24)), b"\xff" * 5000))


def _pages(case: Case) -> bytes:
    stream, pages = io.BytesIO(), [Image.new("L", (32, 32), n) for n in range(case.rng.choice((3, 200)))]
    Image.new("L", (64, 64)).save(stream, "TIFF", save_all=True, append_images=pages)
    return stream.getvalue()


def _oriented(case: Case) -> bytes:
    """EXIF whose entries are of other types, count too far, or lead to themselves."""
    entries = b"".join(
        _entry(case.rng.choice((0x112, 0x112, 0x8769, 0x8825, 0x10E, 0x927C)), *numbers)
        for numbers in (
            (case.rng.randrange(14), case.rng.choice((0, 1, 2, 2**31)), case.rng.choice((0, 6, 8, 9, 2**31, 0xFFFF)))
            for _ in range(case.rng.choice((1, 3, 2000)))
        )
    )
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries) // 12) + entries
    exif += struct.pack("<I", case.rng.choice((0, 8, 2**32 - 1)))
    stream = io.BytesIO()
    Image.open(case.seeds / "picture.png").save(stream, picked(case, "JPEG", "PNG", "WEBP"), exif=exif)
    return stream.getvalue()


@generator
def odd_pictures(case: Case) -> list[Any]:
    """Animations of thousands of frames, chunks, scans, tiles and EXIF that cost more than they should."""
    kinds: tuple[Callable[[Case], bytes], ...] = (
        lambda one: _many_frames(one, picked(one, "GIF", "PNG", "WEBP", "AVIF", "TIFF")),
        _chunks,
        _chunks,
        _scans,
        _tiff,
        _tiff,
        _pages,
        _oriented,
    )
    path = case.place / picked(case, "a.png", "a.gif", "a.tif", "a.jpg")
    path.write_bytes(case.rng.choice(kinds)(case))
    edit = editing(case, case.seeds / "tiny")
    other = ["edit", path, *edit[2:]]
    return picked_list(
        case,
        other,
        [*other, "--keep-exif"],
        [*other, "--detail"],
        [*edit, "--mask", path],
        [*edit, "--like", path],
        ["edit", case.seeds / "picture.png", "--verify", path],
        ["session", "start", path, case.place / "session", "--resolution", "64"],
        ["area", path, "--instruction", "snow", *small(case, "--resolution", "64"), "--out", case.place / "area.png"],
        [*edit, "--control", case.seeds / "control", "--control-image", path],
    )


@generator
def large_photographs(case: Case) -> list[Any]:
    """What a camera of a hundred megapixels gives, by a careless user to everything that takes a picture."""
    kind, side = picked(case, "white.png", "smooth.jpg", "clear.png"), case.rng.choice((9990, 3000, 3000, 3000))
    made = case.seeds / f"large-{side}-{kind}"
    if not made.exists():
        process = os.fork()  # so that this one stays small
        if not process:
            mode, colour = {"w": ("L", 255), "s": ("RGB", (90, 160, 20)), "c": ("RGBA", (9, 99, 199, 90))}[kind[0]]
            Image.new(mode, (side, side), colour).save(made, progressive=True, compress_level=1)
            os._exit(0)
        os.waitpid(process, 0)
    edit = editing(case, case.seeds / "tiny")
    other = ["edit", made, *edit[2:]]
    pair = {
        "source": str(made),
        "edited": str(case.seeds / "picture.png"),
        "source_caption": "a",
        "target_caption": "b",
    }
    table = case.place / "table.jsonl"
    table.write_text(json.dumps(pair) + "\n")
    return picked_list(
        case,
        [*other, "--mask", case.seeds / "picture.jpg"],
        [*other, "--mask", made],
        [*other, "--detail"],
        [*other, "--mask", "auto"],
        [*edit, "--control", case.seeds / "control", "--control-image", made],
        ["edit", made, made, *edit[2:-1], case.place / "out"],
        ["session", "start", made, case.place / "session", "--resolution", "64"],
        ["area", made, "--instruction", "snow", *small(case, "--resolution", "64"), "--out", case.place / "area.png"],
        ["evaluate", "pairs", table, "--out", case.place / "out", "--clip", "embedded"],
    )


# ---- weights and words beside a checkpoint


@generator
def loras_of_no_rank(case: Case) -> list[Any]:
    """Ranks of none, alphas that are no numbers, factors that do not fit, names of all makers."""
    tensors = load((case.seeds / "lora.safetensors").read_bytes())
    layer = sorted(tensors)[0].partition(".")[0]
    nan, inf = float("nan"), float("inf")
    alphas = (0.0, -1.0, nan, inf, -inf, 1e38, 1e-38, 2.0**63)
    kinds: tuple[Callable[[], dict[str, torch.Tensor]], ...] = (
        lambda: {f"{layer}.alpha": torch.tensor(case.rng.choice(alphas))},
        lambda: {
            f"{layer}.alpha": case.rng.choice((torch.zeros(0), torch.zeros(3), torch.zeros(2, 2), torch.tensor(True)))
        },
        lambda: {f"{layer}.lora_down.weight": torch.zeros(0, 16), f"{layer}.lora_up.weight": torch.zeros(16, 0)},
        lambda: {f"{layer}.lora_down.weight": torch.randn(4, case.rng.choice((1, 15, 17, 4096)))},
        lambda: {f"{layer}.lora_up.weight": torch.randn(case.rng.choice((1, 15, 17)), 4)},
        lambda: {f"{layer}.lora_up.weight": torch.randn(16, 5)},
        lambda: {
            f"{layer}.lora_down.weight": torch.randn(4, 16, 1, 1),
            f"{layer}.lora_up.weight": torch.randn(16, 4, 3, 3),
        },
        lambda: {f"{layer}.lora_mid.weight": torch.randn(4, 4, 3, 3)},
        lambda: {f"{layer}.dora_scale": torch.randn(16)},
        lambda: {f"{layer}.hada_w1_a": torch.randn(16, 4), f"{layer}.hada_w1_b": torch.randn(4, 16)},
        lambda: {f"{layer}.lokr_w1": torch.randn(4, 4), f"{layer}.lokr_w2": torch.randn(4, 4)},
        lambda: {f"{layer}.diff": torch.randn(16, 16), f"{layer}.diff_b": torch.randn(16)},
        lambda: {
            f"{layer}.{part}": torch.zeros(16, 16) for part in ("lora_down.weight", "lora_A.weight", "lora.down.weight")
        },
        lambda: {
            f"lora_te_text_model_encoder_layers_{case.rng.choice((0, 99))}_mlp_fc1.lora_down.weight": torch.ones(4, 8)
        },
        lambda: {name: torch.full_like(value, case.rng.choice((nan, inf, 1e38))) for name, value in tensors.items()},
        lambda: {f"base_model.model.x.{n}.lora_A.weight": torch.ones(1, 1) for n in range(9000)},
        lambda: {"lora_unet_.alpha": torch.tensor(1.0), "lora_unet_..lora_up.weight": torch.ones(1)},
    )
    tensors |= case.rng.choice(kinds)()
    path = case.place / picked(case, "lora.safetensors", "lora:0.5.safetensors")
    metadata = {
        "ss_network_dim": picked(case, "0", "-1", "x"),
        "ss_network_alpha": picked(case, "inf", "nan", "[" * 9999),
    }
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    weight = picked(case, "", "", ":1", ":1e38", ":-0.0", ":inf", "::", ":1e400")
    edit, out = editing(case, case.seeds / "tiny"), case.place / "out"
    convert = ["convert", case.seeds / "tiny", out, "--to", "diffusers"]
    train = [*one_step(case, case.seeds / "store", case.place / "run"), "--lora", picked(case, "0", "-1", "999999999")]
    return picked_list(case, *([[*one, "--lora", f"{path}{weight}"] for one in (edit, edit, convert)]), train)


@generator
def overlapping_tensors(case: Case) -> list[Any]:
    """Offsets that overlap, leave holes, go backwards or begin beyond the file; names twice."""
    path = case.copied("tiny.safetensors")
    header, data = header_of(path)
    names = case.rng.sample([name for name in sorted(header) if name != "__metadata__"], 2)
    first, second = (header[name] for name in names)
    size = second["data_offsets"][1] - second["data_offsets"][0]
    how = case.rng.randrange(7)
    if how == 0:
        second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]
    elif how == 1:
        second["data_offsets"] = second["data_offsets"][::-1]
    elif how == 2:
        second["data_offsets"] = [len(data), len(data) + size]
    elif how == 3:
        second["data_offsets"] = [case.rng.choice((-1, 2**63, 2**64 - size, 1.5, "0")), second["data_offsets"][1]]
    elif how == 4:
        data += bytes(case.rng.choice((1, 4096)))
    elif how == 5:
        second["shape"] = case.rng.choice(([2**32, 2**32], [-1], [0], [1] * 5000, [True], ["4"], None, [2**64]))
    text = json.dumps(header)
    if how == 6:
        other = json.dumps({**first, "dtype": picked(case, "F16", "U8", "F64")})
        text = text[:-1] + f", {json.dumps(names[0])}: {other}" * case.rng.choice((1, 3)) + "}"
    write_header(path, text, data)
    return reading(case, path)


@generator
def tokenizers(case: Case) -> list[Any]:
    """The words of a folder: merges, vocabularies and settings of a tokenizer that a stranger wrote."""
    place = case.copied("own-tiny")
    folder = place / "tokenizer"
    names = sorted(one.name for one in folder.iterdir())
    path = folder / case.rng.choice(names)
    how = case.rng.randrange(6)
    if how == 0:
        path.unlink()
        _special(path, case)
    elif path.suffix == ".json" and how < 4:
        said = json.loads(path.read_text())
        keys = sorted(said) if isinstance(said, dict) else []
        if keys:
            said[case.rng.choice(keys)] = odd(case.rng)
        path.write_text(picked(case, json.dumps(said), "[" * 99_999, "{}", "[]", '{"a": ' + "9" * 5000 + "}", "\0"))
    elif path.suffix == ".txt":
        lines = path.read_text().splitlines()
        broken = ("a", "a b c", "", "\0 \0", "a " * 9999, "\ud800 x", "x" * 99_999 + " y", "#version", "</w> </w>")
        lines[case.rng.randrange(min(len(lines), 3000))] = case.rng.choice(broken)
        kept = case.rng.choice((0, 1, 10, len(lines), len(lines)))
        path.write_text("\n".join(lines[:kept]), errors="surrogatepass")
    else:
        spoil_bytes(path, case.rng)
    edit = editing(case, place)
    edit[3] = case.rng.choice(("snow", "\u2603" * 50, "a" * 3000, "(x:1.5) " * 30, "\U0001f1e6" * 9, ""))
    return picked_list(case, edit, edit, ["inspect", place], ["convert", place, case.place / "out", "--to", "ldm"])


# ---- JSON of every command


DEEP = ("[" * 200_000, '{"a":' * 100_000, "[" * 900 + "]" * 900, '{"a":' * 500 + "1" + "}" * 500)
TEXTS = (
    *DEEP,
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    '"' + "x" * 3_000_000 + '"',
    '{"a":1,"a":2}',
    "\ufeff{}",
    "{}{}",
)
TEXTS += ("", " ", "null", "true", "[null]", '"\\ud800"', "{'a': 1}", "[1,]", "// x\n{}", "\0", "\xff")


@generator
def json_of_all_kinds(case: Case) -> list[Any]:
    """One of the JSON files that a command reads is another; or one of its values."""
    out = case.place / "out"
    place = case.place / "session"
    files: dict[str, Callable[[], tuple[Path, list[Any]]]] = {
        "session": lambda: (session_of(place) / "session.json", ["session", "history", place]),
        "said": lambda: (session_of(place) / "session.json", ["session", "undo", place]),
        "evaluation": lambda: (
            case.copied("evaluation") / "run.json",
            ["evaluate", "report", case.place / "evaluation"],
        ),
        "edits": lambda: (
            case.copied("edits.jsonl"),
            ["captions", case.place / "edits.jsonl", "--out", case.place / "m.jsonl"],
        ),
        "store": lambda: (case.copied("store") / "manifest.json", ["dataset", "info", case.place / "store"]),
        "index": lambda: (case.copied("own-tiny") / "model_index.json", ["inspect", case.place / "own-tiny"]),
        "unet": lambda: (case.copied("own-tiny") / "unet/config.json", ["inspect", case.place / "own-tiny"]),
        "run": lambda: (case.copied("run") / "run.json", ["inspect", case.place / "run"]),
        "control": lambda: (
            case.copied("control") / "config.json",
            [
                *editing(case, case.seeds / "tiny"),
                "--control",
                case.place / "control",
                "--control-image",
                case.seeds / "picture.png",
            ],
        ),
        "config": lambda: (
            case.place / "config.json",
            [*one_step(case, case.seeds / "store", case.place / "run"), "--config", case.place / "config.json"],
        ),
        "table": lambda: (
            case.place / "t.jsonl",
            ["edit", "--table", case.place / "t.jsonl", *editing(case, case.seeds / "tiny")[4:-1], out],
        ),
        "clip": lambda: (
            case.copied("clip") / "config.json",
            ["filter", case.seeds / "store", "--clip", case.place / "clip"],
        ),
    }
    path, command = files[picked(case, *files)]()
    text = case.rng.choice(TEXTS)
    if path.exists() and case.rng.random() < 0.5:
        whole = path.read_text()
        said = json.loads(whole.splitlines()[0] if path.suffix == ".jsonl" else whole)
        if isinstance(said, dict) and said:
            name = json.dumps(case.rng.choice(sorted(said)))
            rest = json.dumps(said)
            text = f"{rest[:-1]}, {name}: {text}}}" if case.rng.random() < 0.5 else f"{{{name}: {text}, {rest[1:]}"
    path.write_text(text + "\n", errors="surrogatepass")
    return command


# ---- what stands around a command


VARIABLES = (
    "IP2P_CACHE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HOME",
    "TMPDIR",
    "COLUMNS",
)
VARIABLES += (
    "LINES",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "LANG",
    "LC_ALL",
)
VARIABLES += (
    "XDG_CACHE_HOME",
    "MPLBACKEND",
    "MPLCONFIGDIR",
    "TORCH_HOME",
    "CUDA_VISIBLE_DEVICES",
    "TQDM_DISABLE",
    "TERM",
)
VARIABLES += (
    "TQDM_MININTERVAL",
    "PILLOW_BLOCK_SIZE",
    "TOKENIZERS_PARALLELISM",
    "ACCELERATE_MIXED_PRECISION",
    "TZ",
    "USER",
)
VARIABLES += (
    "ACCELERATE_USE_CPU",
    "OPENAI_API_KEY",
    "HTTP_PROXY",
    "http_proxy",
    "NO_COLOR",
    "PYTHONWARNINGS",
    "SOURCE_DATE_EPOCH",
)


@generator
def variables(case: Case) -> list[Any]:
    """The environment of another user, container or cluster."""
    file = case.place / "file"
    file.write_text("x")
    os.mkfifo(case.place / "pipe")
    places = (str(file), str(case.place / "pipe"), "/proc", "/dev/null", "nowhere/at/all", "~nobody/x", "x" * 5000, ".")
    values = (*places, *JUNK, CONTROL, SCRIPT, "true", "http://[::1", "\udcff", "a\nb")
    for name in case.rng.sample(VARIABLES, case.rng.choice((1, 1, 3))):
        case.environment[name] = case.rng.choice(values)
    out = case.place / "out"
    return picked_list(
        case,
        editing(case, case.seeds / "tiny"),
        editing(case, case.seeds / "tiny"),
        ["fetch", "pieces"],
        ["inspect", "a/b"],
        ["inspect", case.seeds / "tiny"],
        ["inspect", "http://127.0.0.1:9/x.ckpt"],
        one_step(case, case.seeds / "store", case.place / "run"),
        ["captions", "--sample", "2", "--out", out],
        ["captions", "--language-model", "x/y", "--sample", "2", "--out", out],
        ["dataset", "info", case.seeds / "store"],
        ["filter", case.seeds / "store", "--clip", "ViT-B-32/openai", "--out", out],
        ["demo", "--out", out],
        [*MEASURED["recommend"](case), "--out", out],
    )


STRANGE = (
    "-x",
    "--out",
    "a\nb",
    "\x1b[2J",
    "\u202egnp",
    "a" * 240,
    " ",
    "~",
    "~root",
    "@3",
    "a@3",
    "a:0.5",
    "[a]*",
    "%s",
    "{0}",
)
STRANGE += (
    "$HOME",
    "\\",
    "a\\b",
    "a.",
    "...",
    "\udcff",
    "caf\u0301e",
    "\U0001f431",
    "#?&=",
    "a;b",
    "a'b\"c",
    "con",
    "http:",
    "a\tb",
)


@generator
def strange_paths(case: Case) -> list[Any]:
    """Files that lie under names with line ends, dashes, bytes that are no text, and marks that mean something."""
    name = case.rng.choice(STRANGE)
    if case.rng.random() < 0.2:
        home = case.place / case.rng.choice(("\udcffhome", "a\nb", "-r", "a b", "[x]"))
        home.mkdir()
    else:
        home = case.place
    out = case.place / "out"
    edit = editing(case, case.seeds / "tiny")

    def put(source: str, ending: str = "") -> Path:
        path, origin = home / f"{name}{ending}", case.seeds / source
        shutil.copytree(origin, path) if origin.is_dir() else shutil.copy(origin, path)
        return path

    kinds: tuple[Callable[[], list[Any]], ...] = (
        lambda: ["edit", put("picture.png", ".png"), *edit[2:]],
        lambda: ["edit", put("picture.png", ".png").parent, *edit[2:-1], out],
        lambda: [*edit[:-1], home / f"{name}.png"],
        lambda: [*edit[:-1], home / name],
        lambda: [*edit, "--mask", put("picture.png", ".png")],
        lambda: [*edit, "--lora", put("lora.safetensors", ".safetensors")],
        lambda: [*edit, "--embedding", put("word.safetensors", ".safetensors")],
        lambda: [*edit, "--vae", put("vae.safetensors", ".safetensors")],
        lambda: editing(case, put("tiny.safetensors", ".safetensors")),
        lambda: editing(case, put("tiny")),
        lambda: ["inspect", put("tiny.ckpt", ".ckpt"), "--json"],
        lambda: ["inspect", put("run")],
        lambda: ["convert", case.seeds / "tiny", home / name, "--to", picked(case, "ldm", "diffusers")],
        lambda: ["dataset", picked(case, "info", "verify"), put("store")],
        lambda: ["dataset", "sheet", put("store"), "--out", home / f"{name}.html"],
        lambda: ["dataset", "export", put("store"), "--out", out],
        lambda: ["dataset", "import", put("original"), "--out", home / f"{name}2"],
        lambda: ["dataset", "merge", put("store"), case.seeds / "store", "--out", out],
        lambda: ["captions", put("edits.jsonl", ".jsonl"), "--out", home / f"{name}2.jsonl"],
        lambda: one_step(case, put("store"), home / f"{name}2"),
        lambda: ["evaluate", "report", put("evaluation")],
        lambda: ["session", "start", put("picture.png", ".png"), home / f"{name}2", "--resolution", "64"],
        lambda: ["photos", "pairs", home / name, "--pictures", put("photographs", "2"), "--n", "1"],
    )
    return case.rng.choice(kinds)()


@generator
def names_of_the_hub(case: Case) -> list[Any]:
    """Ids that lead out of a cache, name nothing, or are an id to one reader and a path to another."""
    ids = (
        "../..",
        "a/..",
        "../b",
        "a/../../escaped",
        "a//b",
        "a/b/c/d",
        "/a/b",
        "a/b@../x",
        "a/b@",
        "@x",
        "a/b@" + "x" * 999,
    )
    ids += (
        "a/b:../../escaped",
        "hf://a/b@c/../../d",
        "hf://../x",
        "hf://a",
        "a\\b",
        "-a/-b",
        ".a/.b",
        "a/b.git",
        "a" * 99 + "/b",
    )
    ids += (
        "a/b\n",
        "a/\x1b[2J",
        "\udcff/x",
        "a/b?x=1",
        "a/b#x",
        "datasets/a/b",
        "hf://datasets/a/b",
        "hf://buckets/a/b",
        "a/b ",
    )
    name, out, edit = case.rng.choice(ids), case.place / "out", editing(case, case.seeds / "tiny")
    return picked_list(
        case,
        ["inspect", name],
        ["fetch", name],
        editing(case, Path("x"))[:5] + [name, "--out", case.place / "out.png"],
        ["convert", name, out, "--to", "ldm"],
        ["dataset", "import", name, "--out", out],
        ["dataset", "info", name],
        ["dataset", "copy", name, out],
        ["filter", case.seeds / "store", "--clip", name],
        [*edit, "--vae", name],
        [*edit, "--control", name, "--control-image", case.seeds / "picture.png"],
        ["captions", "--language-model", name, "--sample", "1", "--out", out],
        [*one_step(case, case.seeds / "store", out)[:-6], "--base", name, "--preset", "embedded", "--steps", "1"],
        ["evaluate", "pairs", case.seeds / "triplets" / "list.jsonl", "--dino", name, "--out", out],
    )


@generator
def sessions_of_others(case: Case) -> list[Any]:
    """A session whose pictures and latents were exchanged, and settings that no turn can be taken with."""
    place = session_of(case.place / "session")
    files = sorted(one for one in place.iterdir() if one.suffix in (".png", ".safetensors"))
    for path in case.rng.sample(files, case.rng.choice((1, 2))):
        path.unlink()
        how = case.rng.randrange(4)
        if how == 0:
            _special(path, case)
        elif how == 1:
            path.write_bytes(picture_bomb(case)[1] if case.rng.random() < 0.5 else bad_picture(case))
        elif how == 2:
            shutil.copy(
                case.seeds / picked(case, "tiny.ckpt", "tiny.safetensors", "picture.heic", "lora.safetensors"), path
            )
        else:
            shape = case.rng.choice(((4, 8, 8), (4, 8), (3, 8, 8), (4, 9, 8)))
            value = torch.full(shape, case.rng.choice((float("inf"), 1e30, -1.0, 0.0)))
            save_file({"latents": value, "area": torch.full((1, 8, 8), case.rng.choice((0.0, 9e9, -5.0)))}, path)
    if case.rng.random() < 0.5:
        state = json.loads((place / "session.json").read_text())
        state[picked(case, "size", "version", "current")] = case.rng.choice(
            (odd(case.rng), [4096, 4096], [8, 8], [64, 72], [2**40, 8], [0, 0], [64.5, 64], ["64", "64"], *HUGE)
        )
        (place / "session.json").write_text(json.dumps(state), errors="surrogatepass")
    flag, value = picked(case, "--seed", "--steps", "--text-cfg", "--sampler", "--suffix"), picked(case, *JUNK, CONTROL)
    say = [
        "session",
        "say",
        place,
        picked(case, "make it night", CONTROL, "x" * 9999, "\0"),
        *small(case, "--steps", "1"),
    ]
    return picked_list(
        case,
        say,
        say,
        [*say, flag, value],
        ["session", "history", place, "--json"],
        ["session", "branch", place, picked(case, *JUNK)],
        [
            "session",
            "start",
            case.seeds / "picture.png",
            case.place / "new",
            picked(case, "--size", "--resolution"),
            value,
        ],
        [
            "session",
            "start",
            case.seeds / "picture.png",
            case.rng.choice((*ESCAPES[:0], place, "/", "/proc/x", "\udcff")),
        ],
    )
