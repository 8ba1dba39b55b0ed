"""What goes beside a checkpoint or a picture: added files, masks, HEIC, results made again, tables, a server."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hostile_checkpoints import _Calls, bombed
from hostile_data import bad_picture, shard_of, using
from hostile_more import NAMES, _special, picture_bomb
from hostile_runs import session_of
from PIL import Image, PngImagePlugin
from safetensors.torch import load, save_file
from servers import address_of
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
    header_of,
    odd,
    picked,
    picked_list,
    reading,
    spoil_bytes,
    spoil_json,
    spoiled,
    write_header,
)

# ---- files beside a checkpoint


def _entry(case: Case, path: Path) -> None:
    header, data = header_of(path)
    name = case.rng.choice(sorted(header))
    write_header(path, {**header, name: spoiled(header[name], case.rng)}, data)


def _bytes(case: Case, path: Path) -> None:
    spoil_bytes(path, case.rng, case.rng.choice((8, 64, 2000, None)))


def _tensors(case: Case, path: Path) -> None:
    """Some of other shapes, types or values."""
    tensors = load(path.read_bytes())
    for name in case.rng.sample(sorted(tensors), min(len(tensors), case.rng.choice((1, 1, 5)))):
        value = tensors[name]
        kinds = (
            torch.zeros(()),
            torch.zeros(0, 16),
            torch.zeros(100_000, 2),
            torch.full_like(value, float("nan")),
            torch.full_like(value, 1e38),
            value.flatten(),
            value[None],
            value.to(torch.int8),
            value.to(torch.float64),
            value.to(torch.float8_e4m3fn),
        )
        tensors[name] = case.rng.choice(kinds).contiguous()
    save_file(tensors, path, {"format": "pt"})


def _names(case: Case, path: Path) -> None:
    """Numbers in names, marks of other kinds, many more."""
    tensors = load(path.read_bytes())
    for name in case.rng.sample(sorted(tensors), 1):
        number = str(case.rng.choice((*HUGE, "9" * 6000, "x", -1)))
        tensors[".".join(number if part.isdigit() else part for part in name.split("."))] = tensors.pop(name)
    marks = ("difference", "lora_controlnet", "control_model.x", CONTROL, "adapter.x", "", "lora_te_x.alpha", "clip_l")
    tensors[case.rng.choice(marks)] = torch.zeros(1)
    tensors |= {f"down_blocks.{n}.x": torch.zeros(1) for n in range(case.rng.choice((0, 0, 3000, 12_000)))}
    save_file(tensors, path, {"format": "pt", case.rng.choice(("a", CONTROL)): case.rng.choice(("[" * 9999, SCRIPT))})


def _pickled(case: Case, path: Path) -> None:
    """The same as a pickle, which calls something, or holds what no tensor is."""
    tensors: Any = dict(load(path.read_bytes()))
    calls = _Calls(case.place.parent / "canary", picked(case, "mkdir", "eval", "exec"))
    name = case.rng.choice(sorted(tensors))
    odd_one = case.rng.choice((None, 3, "x", [1], torch.empty(2, 8, device="meta"), torch.zeros(1).expand(9999, 9999)))
    contents = (
        {**tensors, "x": calls},
        {**tensors, name: odd_one},
        {"state_dict": {**tensors, name: odd_one}},
        {"string_to_param": {"*": odd_one}, "name": case.rng.choice((3, CONTROL, "x" * 9999, "\ud800", "the"))},
        {"string_to_param": tensors, "name": calls},
        [tensors],
        {3: tensors[name], ("a",): tensors[name]},
    )
    torch.save(case.rng.choice(contents), path)


def _another(case: Case, path: Path) -> None:
    """A sound file of another kind, or none."""
    path.unlink()
    kinds = ("tiny.safetensors", "lora.safetensors", "word.safetensors", "control.safetensors", "vae.safetensors")
    if case.rng.random() < 0.3:
        return _special(path, case)
    shutil.copy(case.seeds / picked(case, *kinds, "picture.png", "tiny.ckpt", "edits.jsonl"), path)
    return None


SPOILS: tuple[Callable[[Case, Path], Any], ...] = (_entry, _bytes, _tensors, _names, _pickled, _another)


def spoiled_file(case: Case, name: str) -> Path:
    """A copy of a file of weights that is spoiled in one way; a pickle's name says so, or does not."""
    path = case.copied(name)
    how = case.rng.choice(SPOILS)
    how(case, path)
    if how is _pickled and case.rng.random() < 0.8:
        path = path.rename(path.with_suffix(picked(case, ".pt", ".ckpt", ".bin", ".pth")))
    return path


def _folder(case: Case, name: str) -> Path:
    place = case.place / name
    shutil.copytree(case.seeds / ("tiny/vae" if name == "vae" else name), place)
    path = place / "config.json"
    said = json.loads(path.read_text())
    how = case.rng.randrange(3)
    if how == 0:
        spoil_json(path, case.rng)
    elif how == 1:
        path.write_text(json.dumps(bombed(said, case.rng)))
    else:
        return spoiled_folder(case, place)
    return place


def spoiled_folder(case: Case, place: Path) -> Path:
    """One file of a folder is missing, or something else."""
    path = case.rng.choice(sorted(one for one in place.rglob("*") if one.is_file()))
    path.unlink()
    if case.rng.random() < 0.7:
        _special(path, case)
    return place


@generator
def other_autoencoder(case: Case) -> list[Any]:
    path = _folder(case, "vae") if case.rng.random() < 0.4 else spoiled_file(case, "vae.safetensors")
    return [*editing(case, case.seeds / "tiny"), "--vae", path]


@generator
def controls(case: Case) -> list[Any]:
    path = _folder(case, "control") if case.rng.random() < 0.4 else spoiled_file(case, "control.safetensors")
    picture = case.seeds / "picture.png"
    if case.rng.random() < 0.2:
        path, picture = case.seeds / "control", case.place / "hint.png"
        picture.write_bytes(picture_bomb(case)[1] if case.rng.random() < 0.5 else bad_picture(case))
    edit = [*editing(case, case.seeds / "tiny"), "--control", path, "--control-image", picture]
    return [*edit, *picked_list(case, [], [], ["--control-weight", picked(case, "nan", "1e308", "-1", "9" * 400, "x")])]


@generator
def words_of_their_own(case: Case) -> list[Any]:
    path = spoiled_file(case, "word.safetensors")
    if case.rng.random() < 0.3:
        names = ("the.safetensors", "\x1b[2J.safetensors", "a" * 200 + ".safetensors", "<script>.safetensors", ".pt")
        path = path.rename(path.with_name(picked(case, *names)))
    edit = editing(case, case.seeds / "tiny")
    edit[3] = f"snow embedding:{path.stem}"
    again = ["--embedding", path] if case.rng.random() < 0.2 else []
    return [*edit, "--embedding", path, *again]


@generator
def added_loras(case: Case) -> list[Any]:
    weight = picked(case, "", ":1", ":0", ":-3", ":1e38", ":", ":x", ":1:2")
    path = spoiled_file(case, "lora.safetensors")
    convert = ["convert", case.seeds / "tiny", case.place / "out", "--to", "diffusers"]
    return [*picked_list(case, editing(case, case.seeds / "tiny"), convert), "--lora", f"{path}{weight}"]


# ---- pictures: masks and HEIC


@generator
def masks(case: Case) -> list[Any]:
    """A file that is cut short, of odd modes, transparent, black, or none."""
    path = case.place / "mask.png"
    mode = picked(case, "1", "L", "LA", "P", "RGB", "RGBA", "I;16")
    picture = Image.new(mode, case.rng.choice(((64, 64), (64, 64), (8, 8), (2000, 2000), (5000, 200), (7, 7))))
    if mode in ("RGBA", "LA"):
        picture.putalpha(case.rng.choice((0, 255, 9)))
    picture.save(path, **({"transparency": 0} if mode in ("P", "L") and case.rng.random() < 0.5 else {}))
    how = case.rng.randrange(5)
    if how == 0:
        path.write_bytes(path.read_bytes()[: case.rng.randrange(20, 90)])
    elif how == 1:
        spoil_bytes(path, case.rng, 200)
    elif how == 2:
        path.unlink()
        _special(path, case)
    elif how == 3:
        path.write_bytes(case.rng.choice((heic, bad_picture, lambda one: picture_bomb(one)[1]))(case))
    edit, area = [*editing(case, case.seeds / "tiny"), "--mask", path], case.place / "area.png"
    return picked_list(case, edit, [*edit, "--detail"], ["area", path, "--instruction", "snow", "--out", area])


def _box(kind: bytes, content: bytes, full: bytes = b"") -> bytes:
    content = full + content
    return struct.pack(">I", 8 + len(content)) + kind + content


def _inner(data: bytes, kind: bytes) -> bytes:
    """The first box of a kind, whole."""
    at = data.find(kind) - 4
    return data[at : at + struct.unpack(">I", data[at : at + 4])[0]]


def grid(sound: bytes, rows: int, columns: int, size: tuple[int, int], tiles: int | None = None) -> bytes:
    """A HEIC whose picture is a grid of one tile, named again and again, as phones write large ones."""
    coded, zero = _inner(sound, b"mdat")[8:], bytes(4)
    wide = struct.pack(">BBBBII", 0, 1, rows - 1, columns - 1, *size)
    items = b"".join(
        _box(b"infe", struct.pack(">HH4sB", number, 0, kind, 0), b"\x02\0\0\0")
        for number, kind in ((1, b"hvc1"), (2, b"grid"))
    )
    count = min(rows * columns, 65_535) if tiles is None else tiles
    references = _box(b"dimg", struct.pack(">HH", 2, count) + b"\0\1" * count)
    spatial = [_box(b"ispe", struct.pack(">II", *one), zero) for one in ((64, 64), size)]
    properties = _box(b"ipco", _inner(sound, b"hvcC") + spatial[0] + spatial[1])
    owned = struct.pack(">I", 2) + b"\0\1\2\x81\x02" + b"\0\2\1\x03"

    def whole(start: int) -> bytes:
        places = struct.pack(">BBH", 0x44, 0, 2)
        places += struct.pack(">HHHHII", 1, 0, 0, 1, start, len(coded))
        places += struct.pack(">HHHHII", 2, 0, 0, 1, start + len(coded), len(wide))
        inside = [
            _box(b"hdlr", zero + b"pict" + bytes(13), zero),
            _box(b"pitm", b"\0\2", zero),
            _box(b"iloc", places, b"\0\0\0\0"),
            _box(b"iinf", struct.pack(">H", 2) + items, zero),
            _box(b"iref", references, zero),
            _box(b"iprp", properties + _box(b"ipma", owned, zero)),
        ]
        return _inner(sound, b"ftyp") + _box(b"meta", b"".join(inside), zero)

    return whole(len(whole(0)) + 8) + _box(b"mdat", coded + wide)


def heic(case: Case) -> bytes:
    """What a phone could have written, and did not."""
    sound = (case.seeds / "picture.heic").read_bytes()
    how = case.rng.randrange(7)
    data = bytearray(sound)
    if how == 0:
        at = data.find(b"ispe") + 8
        sizes = ((64, 64), (9900, 9900), (2**31, 2**31), (65, 63), (1, 10**6), (0, 0), (2**32 - 1, 1))
        data[at : at + 8] = struct.pack(">II", *case.rng.choice(sizes))
    elif how == 1:
        limit = case.rng.choice((len(data), data.find(b"mdat")))
        for _ in range(case.rng.choice((1, 3, 20))):
            data[case.rng.randrange(12, limit)] = case.rng.randrange(256)
    elif how == 2:
        del data[case.rng.randrange(len(data)) :]
    elif how == 3:
        sides = case.rng.choice((1, 10, 70, 140, 154, 155, 256))
        asked = case.rng.choice((64 * sides, 64 * sides, 9900, 20_000, 2**31, 3))
        return grid(sound, sides, sides, (asked, asked), case.rng.choice((None, None, 1, 65_535)))
    elif how == 4:  # a profile that is long, or none
        at = data.find(b"colr")
        data[at + 4 : at + 8] = case.rng.choice((b"prof", b"rICC", b"xxxx"))
    elif how == 5:
        at = data.find(b"iloc")
        data[at + 4 + case.rng.randrange(26)] = case.rng.choice((0, 1, 0x7F, 0xFF))
    else:
        at = data.find(case.rng.choice((b"hvcC", b"ipma", b"iinf", b"meta", b"iprp")))
        data[at - 4 : at] = struct.pack(">I", case.rng.choice((0, 1, 7, 9, 2**31, 2**32 - 1)))
    return bytes(data)


@generator
def heic_pictures(case: Case) -> list[Any]:
    path = case.place / picked(case, "a.heic", "a.heif", "a.png")
    path.write_bytes(heic(case))
    edit = editing(case, case.seeds / "tiny")
    return picked_list(
        case, ["edit", path, *edit[2:]], ["edit", path, *edit[2:], "--keep-exif"], [*edit, "--mask", path]
    )


@generator
def pictures_of_other_formats_in_rows(case: Case) -> list[Any]:
    """HEIC and bombs as a cell, and formats that nobody asked for, one of which would start a program."""
    store = case.copied("store")
    path = shard_of(store)
    rows = pq.read_table(path).to_pylist()
    canary = case.place.parent / "canary"
    program = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n({canary}) (w) file closefile\n%%EOF\n".encode()
    stream = io.BytesIO()
    kind = picked(case, "ICO", "PCX", "TGA", "SGI", "IM", "DDS", "PDF", "MPO", "ICNS")
    Image.open(case.seeds / "picture.png").convert("RGB").save(stream, kind)
    pictures = (program, program, heic(case), heic(case), picture_bomb(case)[1], stream.getvalue())
    for row in case.rng.sample(rows, case.rng.choice((1, len(rows)))):
        for name in ("original_image", "edited_image"):
            row[name]["bytes"] = case.rng.choice(pictures)
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    out = case.place / "out"
    return picked_list(
        case,
        using(case, store),
        ["dataset", "verify", store],
        ["dataset", "doctor", store, "--out", out],
        ["dataset", "info", store],
    )


# ---- results made again


@generator
def results_again(case: Case) -> list[Any]:
    """--like and --verify of a picture whose settings a stranger wrote."""
    for name in ("picture.png", "tiny.safetensors", "lora.safetensors", "word.safetensors", "vae.safetensors"):
        case.copied(name)
    path = case.copied("result.png")
    picture = Image.open(path)
    said = json.loads(picture.info["ip2p"])
    places: tuple[Any, ...] = (*ESCAPES, *NAMES, *ADDRESSES, "picture.png", "secret.txt", ".", "..")
    how = case.rng.randrange(5)
    if how == 0:
        said = spoiled(said, case.rng)
    elif how == 1:
        said[picked(case, "source", "checkpoint", "base", "mask")] = case.rng.choice(places)
    elif how == 2:
        said["loras"] = [{"name": case.rng.choice(("lora.safetensors", *places)), "weight": odd(case.rng)}]
        said["embeddings"] = [{"name": case.rng.choice(("word.safetensors", *places))}] * case.rng.choice((0, 1, 3))
    elif how == 3:
        said["vae"] = odd(case.rng) if case.rng.random() < 0.3 else {"name": case.rng.choice(places)}
        said["control"] = {"name": case.rng.choice(places), "image": case.rng.choice(places)}
    else:
        names = ("steps", "seed", "size", "resolution", "sampler", "text_cfg", "guidance_interval", "dtype", "device")
        said[picked(case, *names)] = case.rng.choice((odd(case.rng), 10**6, 10**9, "cuda:99", "65536x65536", [1, 2]))
    text = as_json(said, case.rng)
    kind = picked(case, ".png", ".png", ".jpg", ".webp")
    exif = Image.Exif()
    exif[0x010E] = json.dumps({"ip2p": said}) if case.rng.random() < 0.7 else text[:60_000]
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("ip2p", text.encode(errors="replace").decode(), zip=case.rng.random() < 0.3)
    path = path.with_suffix(kind)
    picture.save(path, **({"pnginfo": chunks} if kind == ".png" else {"exif": exif}))
    if case.rng.random() < 0.1:
        spoil_bytes(path, case.rng, 2000)
    sources = [] if case.rng.random() < 0.7 else [case.place / "picture.png"]
    like = ["edit", *sources, "--like", path, "--out", case.place / "out.png"]
    return picked_list(case, like, ["edit", *sources, "--verify", path], [*like, "--json"])


# ---- tables


@generator
def tables_of_edits(case: Case) -> list[Any]:
    """edit --table, whose pictures lead elsewhere, or whose lines readers differ on."""
    path = case.place / picked(case, "t.jsonl", "t.csv", "t.txt", "t.CSV")
    shutil.copy(case.seeds / "picture.png", case.place / "a.png")
    os.mkfifo(case.place / "pipe.png")
    (case.place / "bomb.png").write_bytes(picture_bomb(case)[1])
    places = (*NAMES, *ADDRESSES, "a.png", "pipe.png", "bomb.png", "/dev/zero", "*.png", ".", "-", "~", "../secret.txt")
    rows = [{"image": "a.png", "instruction": "snow", "seed": 1, "steps": 1}]
    for _ in range(case.rng.choice((1, 1, 3))):
        rows.append({**rows[0], picked(case, "image", "image", "instruction", "seed"): case.rng.choice(places)})
    if path.suffix.lower() == ".csv":
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=picked(case, ",", ",", ";", "\t"))
        writer.writerows([list(rows[0]), *([str(one) for one in row.values()] for row in rows)])
        data = text.getvalue().encode(errors="surrogatepass")
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    cuts = (
        data,
        data,
        data,
        data + b'"',
        data * 3,
        b"\xef\xbb\xbf" + data,
        data.decode(errors="replace").encode("utf-16"),
    )
    path.write_bytes(case.rng.choice(cuts))
    edit = editing(case, case.seeds / "tiny")[4:-2]
    return [
        "edit",
        "--table",
        path,
        *edit,
        "--out",
        case.place / "out",
        *picked_list(case, [], ["--strict"], ["--json"]),
    ]


@generator
def benchmarks_of_edits(case: Case) -> list[Any]:
    """Published tables, edited or judged: GEdit-Bench's, ImgEdit's JSON, MagicBrush's turns."""
    place = case.place / "bench"
    (place / "images" / "a").mkdir(parents=True)
    for name in ("a.png", "a/a-1.png"):
        shutil.copy(case.seeds / "picture.png", place / "images" / name)
    os.mkfifo(place / "images" / "pipe.png")
    (place / "images" / "link.png").symlink_to(picked(case, "/etc/passwd", "/dev/zero", "../../../secret.txt"))
    names = (*NAMES, *ESCAPES, "images/pipe.png", "images/link.png", "/dev/zero", "images", "", None, 3)
    kind = picked(case, "imgedit", "gedit", "turns")
    if kind == "imgedit":
        row = {"id": "images/a.png", "prompt": "snow", "edit_type": "style"}
        wrong = {**row, picked(case, "id", "id", "prompt", "edit_type"): case.rng.choice((*names, odd(case.rng)))}
        path = place / "edit.json"
        content = {"a": row, case.rng.choice([str(one) for one in names]): wrong, "c": case.rng.choice((row, 3, []))}
        path.write_text(as_json(content, case.rng), errors="surrogatepass")
    elif kind == "gedit":
        picture = {"bytes": (case.seeds / "picture.png").read_bytes(), "path": "a.png"}
        row = {"key": "a", "task_type": "style", "instruction": "snow", "instruction_language": "en"}
        wrong = {**row, case.rng.choice(sorted(row)): case.rng.choice([str(one) for one in names if one != "\0"])}
        cells = [picture, case.rng.choice((picture, {"bytes": picture_bomb(case)[1], "path": "../../x"}, None))]
        table = pa.Table.from_pylist(
            [{**one, "input_image": cell} for one, cell in zip((row, wrong), cells, strict=True)]
        )
        path = place / "bench.parquet"
        pq.write_table(table, path)
        if case.rng.random() < 0.3:
            spoil_bytes(path, case.rng)
    else:
        turn = {"input": "a-1.png", "output": "a-1.png", "mask": "a-1.png", "instruction": "snow"}
        wrong = {**turn, case.rng.choice(sorted(turn)): case.rng.choice((*names, odd(case.rng)))}
        path = place / "edit_turns.json"
        path.write_text(as_json([turn, wrong], case.rng), errors="surrogatepass")
    edit = ["evaluate", "edits", path, "--checkpoint", case.seeds / "tiny", "--out", case.place / "out", "--steps", "1"]
    edit += ["--resolution", "64", "--clip", "embedded", *picked_list(case, [], ["--sources", place])]
    judge = ["evaluate", "judge", place, "--edits", path, "--server", "http://127.0.0.1:9/v1", "--model", "x"]
    return picked_list(case, edit, edit, [*judge, "--retries", "0", *picked_list(case, [], ["--plan"])])


@generator
def scores_of_others(case: Case) -> list[Any]:
    """evaluate judge --beside: tables and JSON of scores, and an own run's edits and answers."""
    place = case.place / "run"
    (place / "edits" / "tiny").mkdir(parents=True)
    for name in ("source/000000.png", "edits/tiny/000000.png"):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(case.seeds / "picture.png", place / name)
    fields = {"number": 0, "source": "source/000000.png", "target": None, "mask": None, "instruction": "snow"}
    fields |= {"caption": "", "edited_caption": "", "kind": "style", "session": "row 0", "turn": 0, "about": {}}
    if case.rng.random() < 0.5:
        fields[case.rng.choice(sorted(fields))] = case.rng.choice((odd(case.rng), *NAMES, *ESCAPES))
    (place / "edits.jsonl").write_text(json.dumps(fields) + "\n")
    beside = case.place / picked(case, "scores.csv", "result.json", "average_score.json")
    values = ("3", "nan", "-1", "1e999", "", "x", "9" * 5000)
    if beside.suffix == ".csv":
        head = "source_image,edited_image,instruction,sementics_score,quality_score\n"
        beside.write_text(head + f"a,{picked(case, 'a/b/c.png', *ESCAPES, CONTROL)},x,{picked(case, *values)},3\n")
    else:
        content = {"a": f"x\nPrompt Compliance: {picked(case, *values)}", CONTROL: odd(case.rng), "c": 3.0}
        beside.write_text(as_json(content, case.rng), errors="surrogatepass")
    rubric = "viescore" if beside.suffix == ".csv" else "imgedit"
    server = ["--server", "http://127.0.0.1:9/v1", "--model", "x", "--retries", "0", "--as", rubric]
    name = picked(case, "x=", "", f"{CONTROL}=", "../../escaped=")
    return ["evaluate", "judge", place, *server, "--beside", f"{name}{beside}", *picked_list(case, [], ["--plan"])]


# ---- runs and sessions


@generator
def files_of_runs(case: Case) -> list[Any]:
    """A run folder in place of a checkpoint, and a session, with something else in place of a file."""
    if case.rng.random() < 0.5:
        place = spoiled_folder(case, case.copied("run"))
        average = ["average", place, "--sigma-rel", "0.1", "--out", case.place / "a.safetensors"]
        return picked_list(case, reading(case, place), reading(case, place), average)
    place = spoiled_folder(case, session_of(case.place / "session"))
    more = editing(case, case.seeds / "tiny")[4:-4]
    return picked_list(
        case,
        ["session", "say", place, "make it night", *more],
        ["session", "history", place],
        ["session", "undo", place],
        ["session", "branch", place, "1"],
        ["session", "start", place, case.seeds / "picture.png"],
    )


# ---- what a server sends


@generator
def pieces(case: Case) -> list[Any]:
    """A checkpoint of one or several pieces from a server that does not mean well; also a picture and a data set."""
    import dataclasses

    from ip2p_engine.checkpoint import published

    address = address_of(case.seeds, case.rng)
    if case.rng.random() < 0.6:
        known = dataclasses.replace(
            published.PUBLISHED[5],
            name="pieces",
            addresses=tuple(address() for _ in range(case.rng.choice((1, 2, 3)))),
        )
        published.PUBLISHED = (*(one for one in published.PUBLISHED if one.name != "pieces"), known)
        return picked_list(case, ["fetch", "pieces"], ["inspect", "pieces"])
    return picked_list(
        case,
        ["inspect", address()],
        ["edit", address(), *editing(case, case.seeds / "tiny")[2:]],
        ["dataset", "copy", address(), case.place / "out"],
        ["dataset", "info", address()],
        [*editing(case, case.seeds / "tiny"), "--vae", address()],
    )
