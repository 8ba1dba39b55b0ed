"""Kinds that came later: archives, pages of Parquet, tars, bombs in pictures, links, special files, conditions."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hostile_data import shard_of, using
from PIL import Image
from safetensors.torch import load_file, save_file
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

NAMES = (*ESCAPES, "/etc/passwd", "/tmp/../etc/passwd", CONTROL, "a\nb", "\u202egnp.exe", "CON", "x" * 300, "\0", "")


# ---- checkpoints


@generator
def safetensors_text(case: Case) -> list[Any]:
    """A header that another reader of JSON would read differently, or that holds what no tensor is."""
    path = case.copied("tiny.safetensors")
    header, data = header_of(path)
    name = sorted(header)[1]
    text = json.dumps(header)
    more = json.dumps(name) + ": " + json.dumps(header[name])
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: text[:-1] + f", {more}}}",  # a name twice
        lambda: "\ufeff" + text,
        lambda: text + " " * 15_000_000,
        lambda: text.replace(" ", " " * 200),
        lambda: text + "\0" * 8,
        lambda: text + "{}",
        lambda: {**header, "x": {"dtype": "F32", "shape": [0, case.rng.choice(HUGE)], "data_offsets": [len(data)] * 2}},
        lambda: {**header, "x": {"dtype": "F32", "shape": [0] * 4 + [2**62] * 4, "data_offsets": [len(data)] * 2}},
        lambda: {**header, CONTROL: header[name]},
        lambda: {**header, "": {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}},
        lambda: {**header, "__metadata__": {**header["__metadata__"], CONTROL: CONTROL, "modelspec.title": SCRIPT}},
        lambda: {**header, "__metadata__": odd(case.rng)},
        lambda: {
            **header,
            name: {**header[name], "dtype": case.rng.choice(("f32", "F4", "C64", 3, None, "I64" * 999))},
        },
        lambda: {**header, name: {**header[name], "data_offsets": [True, 4.0]}},
        lambda: {key: value for key, value in header.items() if key == "__metadata__"},
    )
    write_header(path, case.rng.choice(kinds)(), data)
    return reading(case, path)


@generator
def safetensors_types(case: Case) -> list[Any]:
    """Sound files of types that weights rarely have."""
    path = case.copied("tiny.safetensors")
    tensors = load_file(path)
    kinds = (torch.bool, torch.int8, torch.float64, torch.float8_e4m3fn, torch.bfloat16, torch.int64, torch.uint8)
    names = sorted(tensors) if case.rng.random() < 0.5 else case.rng.sample(sorted(tensors), 3)
    kind = case.rng.choice(kinds)
    with torch.no_grad():
        save_file(
            {**tensors, **{name: tensors[name].to(kind) for name in names}}, path, header_of(path)[0]["__metadata__"]
        )
    return picked_list(case, editing(case, path), reading(case, path))


@generator
def archive_members(case: Case) -> list[Any]:
    """A .ckpt whose archive has names, links, locks and sizes that torch.save writes none of."""
    source, path = zipfile.ZipFile(case.seeds / "tiny.ckpt"), case.place / "model.ckpt"
    how = case.rng.randrange(8)
    with zipfile.ZipFile(path, "w") as target:
        for one in source.infolist():
            data = source.read(one)
            if how == 1 and one.filename.endswith("data.pkl"):
                one.external_attr = 0o120777 << 16  # a link
            target.writestr(one, data)
        extra = zipfile.ZipInfo(case.rng.choice([name for name in NAMES if "\0" not in name]) or "x")
        if how == 0:
            target.writestr(extra, b"escaped")
        elif how == 2:
            target.writestr("tiny/data.pkl", b"\x80\x02}.")
        elif how == 3:
            target.writestr("other/.data/serialization_id", b"9" * 5000)
            target.writestr("other/byteorder", case.rng.choice((b"big", b"x", b"")))
        elif how == 4:
            target.comment = b"x" * case.rng.choice((1, 65_000))
    content = bytearray(path.read_bytes())
    if how >= 5:  # fields of the directory: encryption, sizes, places
        at = content.find(b"PK\x01\x02", case.rng.randrange(len(content) // 2, len(content) - 100))
        field = case.rng.choice((8, 10, 16, 20, 24, 28, 30, 42))
        content[at + field : at + field + 2] = case.rng.choice((b"\xff\xff", b"\x01\x00", b"\x00\x80"))
        path.write_bytes(content)
    return reading(case, path)


def _memo(number: int, get: bool = False) -> bytes:
    return (b"h" if get else b"q") + bytes([number])


def _doubled(times: int) -> bytes:
    return b")" + _memo(0) + b"".join(_memo(n, True) * 2 + b"\x86" + _memo(n + 1) for n in range(times))


@generator
def pickle_unfolds(case: Case) -> list[Any]:
    """Contents of some hundred bytes that take a machine's memory or a year to make."""
    times = case.rng.choice((10, 24, 30, 60, 200))
    last = _memo(times, True)
    encode = b"c_codecs\nencode\n" + _memo(201)
    text = b"X\x01\x00\x00\x00a"
    codec = case.rng.choice((b"hex", b"quopri", b"base64_codec", b"zip", b"utf-32", b"unicode_escape"))
    name = b"X%c\x00\x00\x00" % len(codec) + codec + _memo(202)
    kinds = (
        _doubled(times) + b"}" + last + b"K\x01s.",
        _doubled(times) + b"ccollections\nOrderedDict\n](](" + last + b"Neee\x85R.",
        _doubled(times) + b"ccollections\nCounter\n](" + last * 50 + b"e\x85R.",
        _doubled(times) + b"}X\x05\x00\x00\x00epoch" + last + b"s.",
        b"]("
        + b"N" * 100_000
        + b"e"
        + _memo(0)
        + b"ccollections\nCounter\n"
        + _memo(1)
        + (_memo(1, True) + _memo(0, True) + b"\x85R") * 3000
        + b"}.",
        encode
        + name
        + text
        + _memo(203)
        + (_memo(201, True) + _memo(203, True) + _memo(202, True) + b"\x86R" + _memo(203)) * 40
        + b"}.",
        b"}" + _memo(0) + b"X\x01\x00\x00\x00a" + _memo(0, True) + b"s.",
        b"(" * 500_000 + b"}.",
        b"]" * 300_000 + b"a" * 299_999 + b".",
    )
    path = case.place / "model.ckpt"
    content = b"\x80\x02" + case.rng.choice(kinds)
    if case.rng.random() < 0.3:
        path.write_bytes(content)
        return reading(case, path)
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in (("a/data.pkl", content), ("a/version", b"3\n"), ("a/byteorder", b"little")):
            archive.writestr(member, data)
    return reading(case, path)


class _Replaced:
    """Pickles as a state_dict whose own methods are something else."""

    def __init__(self, state: dict[str, Any], attributes: dict[str, Any]) -> None:
        self.state, self.attributes = state, attributes

    def __reduce__(self) -> Any:
        from collections import OrderedDict

        return (OrderedDict, (), self.attributes, None, iter(self.state.items()))


@generator
def pickle_attributes(case: Case) -> list[Any]:
    state = load_file(case.seeds / "tiny.safetensors")
    methods = ("items", "get", "keys", "values", "__iter__", "pop", "copy", "_metadata", "__class__", "__len__")
    attributes = {name: case.rng.choice((None, 3, {}, "x")) for name in case.rng.sample(methods, 3)}
    if case.rng.random() < 0.3:
        value = torch.nn.Parameter(next(iter(state.values())), requires_grad=False)
        for name in ("to", "numel", "shape", "dim"):
            vars(value)[name] = 3
        state[next(iter(state))] = value
    replaced = _Replaced(state, attributes)
    path = case.place / "model.ckpt"
    torch.save(picked_list(case, [replaced], [{"state_dict": replaced}], [{"model": replaced, "epoch": 3}])[0], path)
    return reading(case, path)


@generator
def links_in_folders(case: Case) -> list[Any]:
    """The hub's cache, whose files are links; some lead elsewhere, or in a circle."""
    place = case.place / "models--x--y"
    snapshot = place / "snapshots" / "z"
    shutil.copytree(case.seeds / "own-tiny", snapshot)
    path = case.rng.choice(sorted(one for one in snapshot.rglob("*") if one.is_file()))
    path.unlink()
    target = picked(
        case, "/etc/passwd", "../../../../secret.txt", path.name, "/dev/zero", "/proc/self/mem", "/", "gone"
    )
    path.symlink_to(target)
    if case.rng.random() < 0.2:
        (snapshot / "unet" / "again").symlink_to(snapshot, target_is_directory=True)
    return reading(case, case.rng.choice((snapshot, place)))


@generator
def run_as_checkpoint(case: Case) -> list[Any]:
    """A stranger's run folder, in place of a checkpoint."""
    place = case.copied("run")
    how = case.rng.randrange(4)
    if how == 0:
        spoil_json(place / "run.json", case.rng)
    elif how == 1:
        path = sorted((place / "checkpoints").glob("step-*.pt"))[-1]
        saved = torch.load(path, weights_only=True)
        part = saved[picked(case, "ema", "trained")]
        name = case.rng.choice(sorted(part))
        part[name] = case.rng.choice(
            (None, 3, torch.zeros(2), torch.zeros(0), torch.full_like(part[name], float("nan")))
        )
        part[picked(case, "x.lora_A.default.weight", "conv_in.lora_B.default.weight", "a" * 9999)] = torch.zeros(4, 4)
        torch.save(saved, path)
    elif how == 2:
        for path in place.glob("*.safetensors"):
            header, data = header_of(path)
            header.setdefault("__metadata__", {})["ip2p_training"] = case.rng.choice(
                ("[" * 9999, "[]", '{"step": "x"}', "3")
            )
            write_header(path, header, data)
    else:
        path = case.rng.choice(sorted(one for one in place.rglob("*") if one.is_file()))
        path.unlink()
        path.symlink_to(picked(case, "/etc/passwd", "gone", path.name, "/dev/zero"))
    return reading(case, case.rng.choice((place, Path(f"{place}@{picked(case, '1', '3', '99', '9' * 30, 'x')}"))))


# ---- data sets


@generator
def parquet_pages(case: Case) -> list[Any]:
    """Page headers, levels and lengths, where the columns begin."""
    store = case.copied("store")
    path = shard_of(store)
    group = pq.read_metadata(path).row_group(0)
    data = bytearray(path.read_bytes())
    for _ in range(case.rng.choice((1, 1, 2, 4))):
        column = group.column(case.rng.randrange(group.num_columns))
        data[column.data_page_offset + case.rng.randrange(60)] = case.rng.randrange(256)
    path.write_bytes(data)
    return using(case, store)


@generator
def parquet_writers(case: Case) -> list[Any]:
    """The same rows as other programs write them."""
    store = case.copied("store")
    path = shard_of(store)
    table = pq.read_table(path)
    name = case.rng.choice(table.column_names)
    at, column = table.column_names.index(name), table[name]
    kinds: dict[str, Any] = {
        "large": pa.large_string(),
        "view": pa.string_view(),
        "dictionary": pa.dictionary(pa.int8(), pa.string()),
    }
    if pa.types.is_string(column.type):
        table = table.set_column(at, name, column.cast(kinds[picked(case, *kinds)]))
    elif pa.types.is_floating(column.type):
        table = table.set_column(at, name, column.cast(case.rng.choice((pa.float32(), pa.float64()))))
    pq.write_table(
        table,
        path,
        compression=picked(case, "none", "snappy", "zstd", "gzip", "brotli"),
        use_dictionary=case.rng.random() < 0.5,
        data_page_version=picked(case, "1.0", "2.0"),
        row_group_size=case.rng.choice((1, 2, 100)),
        version=picked(case, "1.0", "2.6"),
        write_statistics=case.rng.random() < 0.5,
    )
    return using(case, store)


def _bomb(kind: str, table: Any) -> Any:
    """Rows that unfold to gigabytes."""
    count = table.num_rows
    if kind == "text":
        return table.set_column(2, "edit_prompt", pa.array(["a" * 250_000_000] * count, pa.large_string()))
    if kind == "dictionary":
        return pa.concat_tables([table.set_column(2, "edit_prompt", pa.array(["a" * 20_000_000] * count))] * 20)
    if kind == "picture":
        cell = {"bytes": bytes(300_000_000), "path": None}
        return table.set_column(0, "original_image", pa.array([cell] * count, table.schema.field(0).type))
    if kind == "columns":
        return pa.table(
            {**{f"c{n}": pa.nulls(count) for n in range(20_000)}, **{name: table[name] for name in table.column_names}}
        )
    rows = pa.concat_tables([table.slice(0, 1)] * 1)
    return pa.table({name: pa.nulls(30_000_000, rows.schema.field(name).type) for name in table.column_names})


@generator
def parquet_bomb(case: Case) -> list[Any]:
    """Each is made once, as that takes seconds."""
    kind = picked(case, "text", "dictionary", "picture", "columns", "nulls")
    made = case.seeds / f"bomb-{kind}.parquet"
    if not made.exists():
        process = os.fork()  # so that this one stays small
        if not process:
            table = _bomb(kind, pq.read_table(shard_of(case.seeds / "store")))
            pq.write_table(
                table, made, compression="zstd", use_dictionary=kind != "picture", dictionary_pagesize_limit=10**9
            )
            os._exit(0)
        os.waitpid(process, 0)
    store = case.copied("store")
    shutil.copy(made, shard_of(store))
    return using(case, store)


@generator
def lines_of_rows(case: Case) -> list[Any]:
    """JSON Lines and CSV that readers differ on, or that are very long."""
    place = case.copied("triplets")
    row = json.loads((place / "list.jsonl").read_text().splitlines()[0])
    text = json.dumps(row)
    kinds = (
        text[:-1] + ', "edit_prompt": "another"}',
        text.replace("make it snow", "x" * 3_000_000),
        text[:-1] + f', "x": {"9" * 6000}}}',
        text[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        text[:-1] + ', "x": NaN, "y": -Infinity, "seed": 1e400}',
        text.replace("make it snow", "\\ud800\\u202e\\u2028" + SCRIPT),
        json.dumps({**row, **{f"c{n}": n for n in range(50_000)}}),
        json.dumps({**row, "original_image": case.rng.choice(NAMES)}),
        json.dumps({**row, "original_image": {"bytes": 3, "path": [1]}}),
        json.dumps({**row, "original_image": odd(case.rng), "edit_prompt": odd(case.rng)}),
        json.dumps({**row, "original_image": "http://[::1", "edited_image": "file:///etc/passwd"}),
        "\r".join([text] * 3),
        "\ufeff" + text,
    )
    line = case.rng.choice(kinds)
    if case.rng.random() < 0.6:
        path = place / picked(case, "list.jsonl", "list.json", "list.ndjson")
        path.write_text(line + "\n" + text + "\n", errors="surrogatepass")
    else:
        path = place / "list.csv"
        cells = case.rng.choice(
            (
                ["a" * 200_000] * 4,
                list(row.values()) * 900,
                [CONTROL] * 4,
                ['"'] * 4,
                ["a.png"] * 2,
                [str(odd(case.rng))] * 4,
            )
        )
        with path.open("w", newline="", errors="surrogatepass") as stream:
            csv.writer(stream).writerows([list(row), cells, list(row.values())])
    return picked_list(
        case,
        ["dataset", "import", path, "--out", case.place / "out"],
        ["dataset", "verify", path],
        ["dataset", "info", path],
        ["dataset", "sheet", path, "--out", case.place / "sheet.html"],
        ["filter", path, "--out", case.place / "out"],
        one_step(case, path, case.place / "run"),
    )


@generator
def tars(case: Case) -> list[Any]:
    """WebDataset with members that lead out, are devices, lie about their size, or have odd names."""
    path, picture = case.place / "data-000.tar", (case.seeds / "picture.png").read_bytes()
    with tarfile.open(path, "w", format=case.rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for stem in ("a", "b"):
            for name, data in (
                ("input.png", picture),
                ("edited.png", picture),
                ("json", b'{"instruction": "make it snow"}'),
            ):
                member = tarfile.TarInfo(f"{stem}.{name}")
                member.size = len(data)
                if stem == "a" and case.rng.random() < 0.4:
                    member.name = f"{case.rng.choice(NAMES).replace(chr(0), '')}.{name}"
                if stem == "a" and case.rng.random() < 0.2:
                    member.type = case.rng.choice(
                        (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
                    )
                    member.linkname, member.size, data = "/etc/passwd", 0, b""
                if name == "json" and case.rng.random() < 0.3:
                    data = case.rng.choice(
                        (b"[" * 99_999, b"3", b'{"instruction": 3}', b"\xff", b'{"instruction": "\\ud800"}')
                    )
                    member.size = len(data)
                if case.rng.random() < 0.1:
                    member.pax_headers = {
                        picked(case, "size", "path", "GNU.sparse.map", "hdrcharset"): picked(
                            case, "-1", "9" * 30, "../../x", "0,1"
                        )
                    }
                tar.addfile(member, io.BytesIO(data))
    if case.rng.random() < 0.3:
        spoil_bytes(path, case.rng, 1024)
    return picked_list(
        case,
        ["dataset", "import", path, "--out", case.place / "out"],
        ["dataset", "verify", path],
        ["dataset", "info", path],
    )


def _special(path: Path, case: Case) -> None:
    """Something in place of a file."""
    how = picked(case, "pipe", "socket", "folder", "zero", "gone", "itself", "closed", "empty", "memory")
    if how == "pipe":
        os.mkfifo(path)
    elif how == "socket":
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # a socket's path has 108 bytes
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.fchdir(here)
            os.close(here)
    elif how == "folder":
        path.mkdir()
    elif how in ("closed", "empty"):
        path.write_bytes(b"")
        path.chmod(0 if how == "closed" else 0o644)
    else:
        targets = {"zero": "/dev/zero", "gone": "nowhere", "itself": path.name, "memory": "/proc/self/mem"}
        path.symlink_to(targets[how])


@generator
def special_files(case: Case) -> list[Any]:
    """Every option that takes a file is given none."""
    ending = picked(case, ".png", ".jsonl", ".csv", ".json", ".safetensors", ".ckpt", ".parquet", ".tar", "")
    path, out = case.place / f"x{ending}", case.place / "out"
    _special(path, case)
    edit = editing(case, case.seeds / "tiny")
    train = one_step(case, case.seeds / "store", case.place / "run")
    return picked_list(
        case,
        ["edit", path, *edit[2:]],
        [*edit, "--mask", path],
        [*edit, "--lora", path],
        [*edit[:-1], path],
        ["edit", "--table", path, "--checkpoint", case.seeds / "tiny", "--out", out],
        ["inspect", path],
        ["convert", path, out, "--to", "ldm"],
        ["convert", case.seeds / "tiny", path, "--to", "ldm"],
        ["captions", path, "--out", out / "more.jsonl"],
        ["captions", "--sample", "2", "--out", path],
        ["pairs", path, "--checkpoint", case.seeds / "tiny4", "--out", out],
        ["dataset", "import", path, "--out", out],
        ["dataset", "info", path],
        ["dataset", "verify", path],
        ["dataset", "sheet", case.seeds / "store", "--out", path],
        ["dataset", "copy", path, out],
        ["dataset", "export", path, "--out", out],
        ["dataset", "doctor", path],
        ["dataset", "merge", path, case.seeds / "store", "--out", out],
        ["filter", path, "--out", out],
        ["filter", case.seeds / "store", "--clip", path],
        ["evaluate", "report", path],
        ["evaluate", "pairs", path, "--out", out],
        [*train, "--config", path],
        [*train, "--validate-with", path],
        one_step(case, path, case.place / "run"),
        one_step(case, case.seeds / "store", path),
    )


@generator
def folders_of_pictures(case: Case) -> list[Any]:
    """Two folders with equal names, a text beside; some are none, lead out, or have names to write on a terminal."""
    place = case.place / "pairs"
    for folder in ("source", "target"):
        (place / folder).mkdir(parents=True)
        for name in ("a", "b"):
            shutil.copy(case.seeds / "picture.png", place / folder / f"{name}.png")
            (place / folder / f"{name}.txt").write_text(
                case.rng.choice(("make it snow", SCRIPT, CONTROL, "", "x" * 99_999))
            )
    path = case.rng.choice(sorted(one for one in place.rglob("*") if one.is_file()))
    how = case.rng.randrange(4)
    if how == 0:
        path.rename(
            path.with_name(case.rng.choice(("\x1b[2J.png", "a\nb.png", "\u202e.png", "..png", "a" * 250 + ".png")))
        )
    elif how == 1:
        path.unlink()
        path.symlink_to(picked(case, "/etc/passwd", "../../secret.txt", "/dev/zero", path.name))
    elif how == 2:
        path.unlink()
        _special(path, case)
    else:
        (place / "source" / "again").symlink_to("..", target_is_directory=True)
    return picked_list(
        case,
        *([*one, "--out", case.place / "out"] for one in (["dataset", "import", place], ["dataset", "export", place])),
        ["dataset", "verify", place],
        ["dataset", "sheet", place, "--out", case.place / "s.html"],
    )


@generator
def saved_data_set(case: Case) -> list[Any]:
    """The folder that the datasets library saves, and the lists that the hub has beside pictures."""
    place = case.place / "saved"
    place.mkdir()
    if case.rng.random() < 0.5:
        shutil.copy(case.seeds / "picture.png", place / "a.png")
        row = {
            "file_name": "a.png",
            "edited_image_file_name": case.rng.choice(NAMES),
            "edit_prompt": "make it snow",
            "original_image": "a.png",
        }
        (place / "metadata.jsonl").write_text(json.dumps(row) + "\n", errors="surrogatepass")
        return ["dataset", "import", place, "--out", case.place / "out"]
    table = pq.read_table(shard_of(case.seeds / "store"))
    with (
        pa.OSFile(str(place / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": "a",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    (place / "state.json").write_text(json.dumps(state))
    (place / "dataset_info.json").write_text(
        json.dumps({"features": {"edit_prompt": {"dtype": "string", "_type": "Value"}}, "builder_name": "x"})
    )
    path = place / picked(case, "state.json", "dataset_info.json", "data-00000-of-00001.arrow")
    if path.suffix == ".json" and case.rng.random() < 0.3:
        changed = {
            "state.json": {**state, "_data_files": [{"filename": case.rng.choice(NAMES)}]},
            "dataset_info.json": {
                "features": {"x": {"_type": picked(case, "Image", "Audio", "__class__", "os.system")}}
            },
        }
        path.write_text(json.dumps(changed[path.name]))
    elif path.suffix == ".json":
        spoil_json(path, case.rng)
    else:
        spoil_bytes(path, case.rng, 3000)
    return ["dataset", "import", place, "--out", case.place / "out"]


@generator
def conditions(case: Case) -> list[Any]:
    """--where."""
    text = picked(
        case,
        "(" * 900 + "seed > 1" + ")" * 900,
        "not " * 400 + "seed > 1",
        "seed in (" + ", ".join(["1"] * 600) + ")",
        "seed > 1 or " * 150 + "seed > 1",
        "seed > " + "9" * 1500,
        "seed > 1e999999",
        "seed > \u0661",
        "edit_prompt == '" + "a" * 1900 + "'",
        "edit_prompt = '\x1b[2J' and \x1b[2J > 3",
        "__class__.__mro__ != null",
        "original_image.bytes == 'x'",
        "key.a.b.c.d > 1",
        "seed >",
        "seed in ()",
        "\ud800 > 1",
        "--where",
        "",
        " " * 1500 + "x",
        "'" * 1501,
        "-" * 1900,
        "1 " * 900,
    )
    store = case.seeds / "store"
    out = case.place / "out"
    train = one_step(case, store, out)
    return [
        *picked_list(case, ["dataset", "import", store, "--out", out], ["dataset", "verify", store], train),
        f"--where={text}",
    ]


@generator
def several_sets(case: Case) -> list[Any]:
    """The doctor, merging and evaluating on a spoiled store."""
    store = case.copied("store")
    if case.rng.random() < 0.5:
        spoil_bytes(shard_of(store), case.rng)
    else:
        path = shard_of(store)
        rows = pq.read_table(path).to_pylist()
        case.rng.choice(rows)[picked(case, "edit_prompt", "key", "original_prompt")] = picked(
            case, *ESCAPES, SCRIPT, CONTROL, ""
        )
        pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    out = case.place / "out"
    return picked_list(
        case,
        ["dataset", "doctor", store, "--out", out],
        ["dataset", "merge", store, case.seeds / "store", "--out", out],
        [
            "evaluate",
            "edits",
            store,
            "--checkpoint",
            case.seeds / "tiny",
            "--out",
            out,
            "--steps",
            "1",
            "--resolution",
            "64",
        ],
        one_step(case, store, out),
    )


@generator
def edit_table(case: Case) -> list[Any]:
    path = case.place / picked(case, "t.jsonl", "t.csv")
    row = {"image": str(case.seeds / "picture.png"), "instruction": "snow", "seed": 1, "steps": 1}
    name = case.rng.choice((*row, "text_cfg", "image_cfg", "x", "sampler"))
    wrong = {**row, name: odd(case.rng)}
    if path.suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n" + json.dumps(wrong) + "\n", errors="surrogatepass")
        if case.rng.random() < 0.3:
            spoil_lines(path, case.rng)
    else:
        with path.open("w", newline="", errors="surrogatepass") as stream:
            csv.writer(stream).writerows([list(wrong), [str(one)[:5000].replace("\0", "") for one in wrong.values()]])
    return [
        "edit",
        "--table",
        path,
        "--checkpoint",
        case.seeds / "tiny",
        "--resolution",
        "64",
        "--out",
        case.place / "out",
    ]


# ---- pictures


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, mode: int, depth: int, pixels: bytes, *chunks: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, mode, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _zeros(count: int) -> bytes:
    packer = zlib.compressobj(1)
    block = bytes(1 << 20)
    return (
        b"".join(packer.compress(block[: min(len(block), count - at)]) for at in range(0, count, len(block)))
        + packer.flush()
    )


def picture_bomb(case: Case) -> tuple[str, bytes]:
    """(ending, bytes) of a small picture that asks for much."""
    kind = case.rng.choice(
        ("huge", "large", "text", "profile", "frames", "tiff", "exif", "jpeg", "webp", "apng", "xmp", "deep")
    )
    small = zlib.compress(b"".join(b"\0" + bytes(64 * 3) for _ in range(64)))
    if kind == "huge":
        side = case.rng.choice((20_000, 2**31 - 1, 100_000))
        return ".png", _png(side, side, 2, 8, small)
    if kind == "large":  # within the limit
        mode, depth, each = case.rng.choice(((2, 8, 3), (6, 8, 4), (0, 16, 2), (6, 16, 8), (4, 8, 2), (0, 1, 0)))
        row = (9900 * each if each else 9900 // 8 + 1) + 1
        return ".png", _png(9900, 9900, mode, depth, _zeros(9900 * row))
    if kind == "text":
        packed = zlib.compress(bytes(100_000_000), 1)
        return ".png", _png(64, 64, 2, 8, small, *[_chunk(b"zTXt", b"ip2p\0\0" + packed)] * 20)
    if kind == "xmp":
        return ".png", _png(64, 64, 2, 8, small, _chunk(b"iTXt", b"ip2p\0\0\0\0\0" + b"[" * 500_000))
    if kind == "profile":
        return ".png", _png(64, 64, 2, 8, small, _chunk(b"iCCP", b"x\0\0" + _zeros(500_000_000)))
    if kind == "apng":
        count = _chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
        return ".png", _png(64, 64, 2, 8, small, count)
    picture, stream = Image.open(case.seeds / "picture.png"), io.BytesIO()
    if kind == "frames":
        picture.save(stream, "GIF", save_all=True, append_images=[picture.rotate(n % 360) for n in range(300)])
        return ".gif", stream.getvalue()
    if kind == "tiff":  # a directory that points at itself, or far away
        picture.save(stream, "TIFF")
        data = bytearray(stream.getvalue())
        data[4:8] = struct.pack("<I", case.rng.choice((4, 8, len(data) - 4, 2**32 - 1)))
        return ".tif", bytes(data)
    if kind == "exif":
        exif = Image.Exif()
        exif[0x0112], exif[0x8769] = case.rng.choice((6, 99, 8)), {0x927C: b"x" * 60_000}
        picture.save(stream, "JPEG", exif=exif)
        data = bytearray(stream.getvalue())
        for _ in range(8):
            data[case.rng.randrange(20, 200)] = case.rng.randrange(256)
        return ".jpg", bytes(data)
    if kind == "jpeg":
        picture.save(stream, "JPEG", progressive=True)
        data = bytearray(stream.getvalue())
        at = data.find(b"\xff\xc2")
        data[at + 5 : at + 9] = struct.pack(
            ">HH", *case.rng.choice(((65_535, 65_535), (9_999, 9_999), (0, 64), (64, 0)))
        )
        return ".jpg", bytes(data)
    if kind == "deep":
        picture.convert("L").convert("I;16").save(stream, "TIFF")
        return ".tif", stream.getvalue()
    picture.save(stream, "WEBP", save_all=True, append_images=[picture] * 3)
    data = bytearray(stream.getvalue())
    data[24:30] = case.rng.choice((b"\xff" * 6, b"\x3f\x00\x00\xff\xff\xff"))
    return ".webp", bytes(data)


@generator
def picture_bombs(case: Case) -> list[Any]:
    ending, data = picture_bomb(case)
    path = case.place / f"a{ending}"
    path.write_bytes(data)
    edit = editing(case, case.seeds / "tiny")
    return picked_list(
        case, ["edit", path, *edit[2:]], ["edit", path, *edit[2:], "--keep-exif"], [*edit, "--mask", path]
    )


@generator
def picture_bombs_in_rows(case: Case) -> list[Any]:
    store = case.copied("store")
    path = shard_of(store)
    rows = pq.read_table(path).to_pylist()
    case.rng.choice(rows)[picked(case, "original_image", "edited_image")]["bytes"] = picture_bomb(case)[1]
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    return using(case, store)


@generator
def instructions(case: Case) -> list[Any]:
    """What is written in an edit's text, and in a name of a result."""
    text = case.rng.choice(
        (
            SCRIPT,
            CONTROL,
            "\ud800",
            "x" * 100_000,
            "\0",
            "",
            " ",
            "\n\n",
            "\u202e",
            "a" * 40 + "\u0301" * 5000,
            "&#x41;" * 500,
            "((((" * 300,
        )
    )
    edit = editing(case, case.seeds / "tiny")
    edit[3] = text
    return [*edit, *picked_list(case, [], ["--json"])]


@generator
def metrics_table(case: Case) -> list[Any]:
    """evaluate pairs."""
    place = case.copied("triplets")
    row = {"source": "a.png", "edited": "b.png", "target": "b.png", "source_caption": "a cat", "target_caption": "snow"}
    os.mkfifo(place / "pipe.png")
    wrong = {
        **row,
        case.rng.choice((*row, "mask", "x")): case.rng.choice(
            (odd(case.rng), case.rng.choice(NAMES), "pipe.png", "/dev/zero")
        ),
    }
    path = place / "table.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(wrong) + "\n", errors="surrogatepass")
    return ["evaluate", "pairs", path, "--out", case.place / "out", "--clip", "embedded"]
