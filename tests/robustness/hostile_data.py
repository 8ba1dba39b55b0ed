"""Data sets, captions and pictures that are spoiled each in one way."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from seeds import PAIRS
from spoiling import (
    CONTROL,
    ESCAPES,
    SCRIPT,
    Case,
    editing,
    generator,
    picked,
    picked_list,
    spoil_bytes,
    spoil_json,
    spoil_lines,
)

# ---- data sets


def using(case: Case, store: Path) -> list[Any]:
    """A command that reads a data set."""
    out, edits = case.place / "out", case.seeds / "edits.jsonl"
    return picked_list(
        case,
        ["dataset", "info", store],
        ["dataset", "verify", store],
        ["dataset", "sheet", store, "--out", case.place / "sheet.html", "--side", "32"],
        ["dataset", "export", store, "--out", out],
        ["dataset", "import", store, "--out", out],
        ["dataset", "copy", store, out],
        ["filter", store, "--out", out],
        ["captions", shard_of(store), "--out", case.place / "more.jsonl"],
        ["pairs", edits, "--checkpoint", case.seeds / "tiny4", "--out", store, "--size", "64x64", *PAIRS],
    )


def shard_of(store: Path) -> Path:
    return min([*(store / "data").glob("*.parquet"), store / "data" / "z.parquet"])


def column_of(kind: str, values: list[Any], rng: random.Random) -> Any:
    count = len(values)
    made = {
        "text": pa.array([rng.choice((*ESCAPES, SCRIPT, CONTROL, "", "x" * 3000)) for _ in range(count)]),
        "bool": pa.array([True] * count),
        "float": pa.array([rng.choice((0.5, float("nan"), 1e300)) for _ in range(count)]),
        "list": pa.array([[1, 2]] * count),
        "binary": pa.array([b"\xff\x00<script>"] * count),
        "null": pa.nulls(count),
        "large": pa.array([2**62] * count),
        "negative": pa.array([-1] * count),
        "struct": pa.array([{"bytes": b"x", "path": "../../escaped"}] * count),
        "date": pa.array([10**6] * count, pa.timestamp("us")),
        "decimal": pa.array([1] * count).cast(pa.decimal128(20)),
        "nested": pa.array([json.dumps({"a": [1]})] * count),
    }
    return made[kind]


KINDS = ("text", "bool", "float", "list", "binary", "null", "large", "negative", "struct", "date", "decimal", "nested")


@generator
def parquet_types(case: Case) -> list[Any]:
    store = case.copied("store")
    path = shard_of(store)
    table = pq.read_table(path)
    for name in case.rng.sample(table.column_names, case.rng.choice((1, 1, 2))):
        at = table.column_names.index(name)
        table = table.set_column(at, name, column_of(picked(case, *KINDS), table[name].to_pylist(), case.rng))
    pq.write_table(table, path)
    return using(case, store)


@generator
def parquet_values(case: Case) -> list[Any]:
    """One cell of its own type with a hostile value."""
    store = case.copied("store")
    path = shard_of(store)
    table = pq.read_table(path)
    rows = table.to_pylist()
    name = case.rng.choice(table.column_names)
    kind = table.schema.field(name).type
    pool: tuple[Any, ...] = (None, -1, 2**63 - 1, 0) if pa.types.is_integer(kind) else (None, float("nan"), -1e300)
    pool = (None, *ESCAPES, SCRIPT, CONTROL, "", "\u202e", "a" * 10_000) if pa.types.is_string(kind) else pool
    if pa.types.is_struct(kind):
        pool = (
            None,
            {"bytes": None, "path": "../../escaped"},
            {"bytes": b"", "path": None},
            {"bytes": b"x", "path": "/etc/passwd"},
        )
    case.rng.choice(rows)[name] = case.rng.choice(pool)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return using(case, store)


@generator
def parquet_columns(case: Case) -> list[Any]:
    store = case.copied("store")
    path = shard_of(store)
    table = pq.read_table(path)
    name = case.rng.choice(table.column_names)
    how = case.rng.randrange(4)
    if how == 0:
        table = table.drop_columns([name])
    elif how == 1:
        table = table.append_column(name + picked(case, "2", "\x1b[2J", "'"), table[name])
    elif how == 2:
        table = table.rename_columns([one.upper() if one == name else one for one in table.column_names])
    else:
        table = table.slice(0, 0)
    pq.write_table(table, path)
    return using(case, store)


@generator
def parquet_bytes(case: Case) -> list[Any]:
    store = case.copied("store")
    spoil_bytes(shard_of(store), case.rng)
    return using(case, store)


@generator
def store_files(case: Case) -> list[Any]:
    store = case.copied("store")
    path = case.rng.choice(sorted(one for one in store.rglob("*") if one.is_file()))
    path.unlink()
    how = case.rng.randrange(5)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to(case.place / "nowhere")
    elif how == 3:
        path.write_bytes(b"")
    return using(case, store)


@generator
def manifest(case: Case) -> list[Any]:
    store = case.copied("store")
    spoil_json(store / "manifest.json", case.rng)
    return using(case, store)


@generator
def ledger(case: Case) -> list[Any]:
    store = case.copied("store")
    logs = sorted(store.rglob("*.jsonl"))
    spoil_lines(case.rng.choice(logs), case.rng)
    return using(case, store)


@generator
def pictures_in_parquet(case: Case) -> list[Any]:
    store = case.copied("store")
    path = shard_of(store)
    table = pq.read_table(path)
    rows = table.to_pylist()
    picture = case.rng.choice(rows)[picked(case, "original_image", "edited_image")]
    picture["bytes"] = bad_picture(case)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return using(case, store)


@generator
def original_layout(case: Case) -> list[Any]:
    place = case.copied("original")
    path = case.rng.choice(sorted([*place.rglob("*.json"), *place.rglob("*.jsonl")]))
    (spoil_lines if path.suffix == ".jsonl" else spoil_json)(path, case.rng)
    return ["dataset", "import", place, "--out", case.place / "out"]


@generator
def triplets(case: Case) -> list[Any]:
    place = case.copied("triplets")
    path = place / picked(case, "list.jsonl", "list.csv")
    if path.suffix == ".jsonl":
        spoil_lines(path, case.rng)
    else:
        text = path.read_text().replace(
            "a.png", picked(case, "../../secret.txt", "/etc/passwd", CONTROL, "", "\0", "a" * 5000), 1
        )
        path.write_text(picked(case, text, text.replace(",", ";"), text + '"', text.encode("utf-16").decode("latin1")))
    return ["dataset", "import", path, "--out", case.place / "out"]


@generator
def edits_lines(case: Case) -> list[Any]:
    path = case.copied("edits.jsonl")
    spoil_lines(path, case.rng)
    out = case.place / "out"
    making = [
        "pairs",
        path,
        "--checkpoint",
        case.seeds / "tiny4",
        "--out",
        out,
        "--candidates",
        "1",
        "--steps",
        "1",
        "--size",
        "64x64",
    ]
    more = ["captions", path, "--out", case.place / picked(case, "more.jsonl", "edits.jsonl")]
    return picked_list(case, [*making, "--clip", "embedded"], more)


@generator
def edits_parquet(case: Case) -> list[Any]:
    rows = [json.loads(line) for line in (case.seeds / "edits.jsonl").read_text().splitlines()]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    name = case.rng.choice(sorted(columns))
    table = pa.table({**columns, name: column_of(picked(case, *KINDS), columns[name], case.rng)})
    path = case.place / "edits.parquet"
    pq.write_table(table, path)
    return ["captions", path, "--out", case.place / "more.jsonl"]


# ---- pictures


def bad_picture(case: Case) -> bytes:
    picture = Image.open(case.seeds / "picture.png")
    stream = io.BytesIO()
    kind = picked(case, "PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM", "JPEG2000")
    picture.save(stream, kind)
    data = bytearray(stream.getvalue())
    for _ in range(case.rng.choice((1, 5, 50))):
        data[case.rng.randrange(len(data) if case.rng.random() < 0.5 else min(60, len(data)))] = case.rng.randrange(256)
    return bytes(data[: case.rng.randrange(len(data))] if case.rng.random() < 0.2 else data)


@generator
def pictures(case: Case) -> list[Any]:
    path = case.place / picked(case, "a.png", "a.jpg", "a.tiff", "a.gif")
    path.write_bytes(bad_picture(case))
    return ["edit", path, *editing(case, case.seeds / "tiny")[2:]]


@generator
def texts_for_numbers(case: Case) -> list[Any]:
    """A text where a seed or a score belongs, in every row; an export names files by it, a page shows it."""
    store = case.copied("store")
    path = shard_of(store)
    table = pq.read_table(path)
    name = picked(case, "seed", "seed", "sim_0", "sim_direction", "p", "cfg", "key")
    values = [case.rng.choice((*ESCAPES, SCRIPT, CONTROL))] * table.num_rows
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), path)
    out = case.place / "out"
    export = ["dataset", "export", store, "--out", out]
    page = ["dataset", "sheet", store, "--out", case.place / "sheet.html", "--side", "32"]
    return picked_list(
        case, export, export, page, page, ["dataset", "verify", store], ["dataset", "import", store, "--out", out]
    )
