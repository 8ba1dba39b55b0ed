"""Generators of the campaign: each spoils a sound input in one way, and gives the command that reads it."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from seeds import PAIRS

PARENT = Path(__file__).parent
ESCAPES = ("../../escaped", "../../../escaped", "..\\..\\escaped")
SCRIPT, CONTROL = "<script>alert(1)</script>", "\x1b]0;owned\x07\x1b[2J"
HUGE = (20_000, 100_000, 10**7, 10**9, 2**31, 2**63, 10**30)
ODD = (
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "x" * 5000,
    [],
    {},
    [[]],
    [None] * 9,
    {"": {}},
)
ADDRESSES = (
    "http://[::1",
    "s3://[x",
    "http://\u2100.com/x",
    "://",
    "file://",
    "hf://",
    "hf://a/b/c",
    "ftp://x:y@z/a?b#c",
)
ADDRESSES += ("memory://x/y", "zip://a.zip", "s3://u:p@b/k?t=1", "\\\\host\\share", "http://a b/c", "data:text/plain,x")


@dataclass(frozen=True)
class Case:
    """A folder to spoil things in, the sound inputs, and the case's own randomness."""

    place: Path
    seeds: Path
    rng: random.Random

    def copied(self, name: str) -> Path:
        source, target = self.seeds / name, self.place / name
        return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))


Make = Callable[[Case], list[Any]]
GENERATORS: dict[str, Make] = {}


def generator(make: Make) -> Make:
    GENERATORS[make.__name__.removeprefix("_")] = make
    return make


def odd(rng: random.Random) -> Any:
    """A value that should not stand where it will."""
    kinds = (ODD, HUGE, ESCAPES, (SCRIPT, CONTROL, "\ud800", "/etc/passwd", "\u202e\u2028"))
    value = copy.deepcopy(rng.choice(rng.choice(kinds)))
    return [value] * rng.choice((1, 2, 4, 5000)) if rng.random() < 0.1 else value


def spoiled(value: Any, rng: random.Random) -> Any:
    """JSON with one to three places changed, left out, or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, key = value, None
        while isinstance(at, dict | list) and at and (key is None or rng.random() < 0.7):
            inner, key = at, rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            at = inner[key]
        if key is None or rng.random() < 0.05:
            return odd(rng)
        if isinstance(inner, dict) and rng.random() < 0.2:
            del inner[key]
        elif type(at) is int and rng.random() < 0.4:
            inner[key] = rng.choice((*HUGE, -at, at + 1, float(at), str(at)))
        else:
            inner[key] = odd(rng)
    return value


def as_json(value: Any, rng: random.Random) -> str:
    if rng.random() < 0.04:
        return rng.choice(("[" * 100_000, "", "\x00", "{", "nul", '{"a":1}{"b":2}', "9" * 5000))
    return json.dumps(value, ensure_ascii=rng.random() < 0.9 or "\\ud800" in json.dumps(value))


def spoil_json(path: Path, rng: random.Random) -> None:
    path.write_text(as_json(spoiled(json.loads(path.read_text()), rng), rng), errors="surrogatepass")


def spoil_lines(path: Path, rng: random.Random) -> None:
    lines = path.read_text().splitlines() or ["{}"]
    at = rng.randrange(len(lines))
    lines[at] = as_json(spoiled(json.loads(lines[at]), rng), rng)
    path.write_text("\n".join(lines) + rng.choice(("", "\n", "\n\n")), errors="surrogatepass")


def spoil_bytes(path: Path, rng: random.Random, limit: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 20))):
        data[rng.randrange(min(len(data), limit or len(data)))] = rng.randrange(256)
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    path.write_bytes(data)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: Any, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode(errors="surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def picked(case: Case, *names: str) -> str:
    return case.rng.choice(names)


def reading(case: Case, path: Path) -> list[Any]:
    """A command that reads a checkpoint."""
    if case.rng.random() < 0.7:
        return ["inspect", path, *picked_list(case, [], ["--json"], ["--sha256"], ["--weights", "raw"])]
    if case.rng.random() < 0.5:
        return ["convert", path, case.place / "out", "--to", "diffusers"]
    return editing(case, path)


def picked_list(case: Case, *lists: list[Any]) -> list[Any]:
    return case.rng.choice(lists)


def editing(case: Case, path: Path, *more: Any) -> list[Any]:
    edit = ["edit", case.seeds / "picture.png", "--instruction", "snow", "--checkpoint", path]
    return [*edit, *(more or ("--steps", "1", "--resolution", "64")), "--out", case.place / "out.png"]


# ---- checkpoints in one file


@generator
def safetensors_entry(case: Case) -> list[Any]:
    path = case.copied("tiny.safetensors")
    header, data = header_of(path)
    name = case.rng.choice(sorted(header))
    write_header(path, {**header, name: spoiled(header[name], case.rng)}, data)
    return reading(case, path)


@generator
def safetensors_bytes(case: Case) -> list[Any]:
    path = case.copied("tiny.safetensors")
    spoil_bytes(path, case.rng, case.rng.choice((8, 64, 20_000)))
    return reading(case, path)


@generator
def safetensors_names(case: Case) -> list[Any]:
    path = case.copied("tiny.safetensors")
    header, data = header_of(path)
    for name in case.rng.sample(sorted(header), 3):
        number = case.rng.choice((*HUGE, "9" * 6000, "\u0661", -1, "x"))
        parts = [str(number) if part.isdigit() and case.rng.random() < 0.7 else part for part in name.split(".")]
        header[".".join(parts)] = header.pop(name)
    write_header(path, header, data)
    return reading(case, path)


@generator
def safetensors_shapes(case: Case) -> list[Any]:
    path = case.copied("tiny.safetensors")
    header, data = header_of(path)
    for name in case.rng.sample([name for name in sorted(header) if name != "__metadata__"], 4):
        shape = header[name]["shape"]
        header[name]["shape"] = case.rng.choice((shape[::-1], [*shape, 1], [1, *shape], [1] * 40 + shape, shape * 2))
    write_header(path, header, data)
    return reading(case, path)


@generator
def safetensors_overlap(case: Case) -> list[Any]:
    path = case.copied("tiny.safetensors")
    header, data = header_of(path)
    count = case.rng.choice((3, 1000, 30_000))
    entry = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    write_header(path, {**header, **{f"model.diffusion_model.x{n}": entry for n in range(count)}}, data)
    return reading(case, path)


@generator
def safetensors_many(case: Case) -> list[Any]:
    path = case.copied("tiny.safetensors")
    header, data = header_of(path)
    name = picked(
        case,
        "model.diffusion_model.input_blocks.{}.0.in_layers.2.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.{}.norm1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.{}.layer_norm1.weight",
        "model_ema.{}",
    )
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [len(data)] * 2}
    write_header(path, {**header, **{name.format(n): entry for n in range(case.rng.choice((50, 3000, 60_000)))}}, data)
    return reading(case, path)


@generator
def safetensors_values(case: Case) -> list[Any]:
    path = case.copied("tiny.safetensors")
    header, data = header_of(path)
    content = bytearray(data)
    for _ in range(case.rng.choice((1, 50))):
        at = 4 * case.rng.randrange(len(content) // 4)
        content[at : at + 4] = struct.pack("<f", case.rng.choice((float("nan"), float("inf"), 1e38, -1e38)))
    write_header(path, header, bytes(content))
    return picked_list(case, editing(case, path), ["convert", path, case.place / "out", "--to", "diffusers"])


def own_config(case: Case, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = case.copied("tiny.safetensors")
    header, data = header_of(path)
    said = change(json.loads(header["__metadata__"]["ip2p_config"]))
    header["__metadata__"]["ip2p_config"] = as_json(said, case.rng)
    write_header(path, header, data)
    return path


@generator
def own_spec(case: Case) -> list[Any]:
    def change(said: dict[str, Any]) -> Any:
        network = said.pop("architecture")
        said = spoiled(said, case.rng)
        return {**said, "architecture": network} if isinstance(said, dict) else said

    path = own_config(case, change)
    return editing(case, path, "--json") if case.rng.random() < 0.3 else reading(case, path)


@generator
def own_architecture(case: Case) -> list[Any]:
    path = own_config(case, lambda said: {**said, "architecture": spoiled(said["architecture"], case.rng)})
    return reading(case, path)


COUNTS = ("layers_per_block", "transformer_layers_per_block", "block_out_channels", "num_hidden_layers", "vocab_size")
COUNTS += ("cross_attention_dim", "num_attention_heads", "attention_head_dim", "max_position_embeddings", "hidden_size")
COUNTS += ("intermediate_size", "norm_num_groups", "latent_channels", "num_class_embeds", "conv_in_kernel")
SETTINGS = (
    "norm_eps",
    "layer_norm_eps",
    "freq_shift",
    "downsample_padding",
    "mid_block_scale_factor",
    "act_fn",
    "hidden_act",
)
SETTINGS += ("scaling_factor", "time_embedding_type", "mid_block_type", "addition_embed_type", "encoder_hid_dim_type")
SETTINGS += ("attn_implementation", "dtype", "dropout", "flip_sin_to_cos", "only_cross_attention", "class_embed_type")


def bombed(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    name = rng.choice([one for one in COUNTS if one in config] or COUNTS)
    number = rng.choice(HUGE)
    is_list = isinstance(config.get(name), list) or rng.random() < 0.2
    return {**config, name: [8] * rng.choice((3, 5000, 100_000)) if is_list else number}


@generator
def own_architecture_bomb(case: Case) -> list[Any]:
    def change(said: dict[str, Any]) -> Any:
        parts = said["architecture"]
        kind = picked(case, "unet", "autoencoder", "text")
        if kind == "text":
            parts["text_encoders"][0] = bombed(parts["text_encoders"][0], case.rng)
        else:
            parts[kind] = bombed(parts[kind], case.rng)
        return said

    return reading(case, own_config(case, change))


@generator
def lora_file(case: Case) -> list[Any]:
    path = case.copied("lora.safetensors")
    tensors = load_file(path)
    for name in case.rng.sample(sorted(tensors), 2):
        tensors[name] = case.rng.choice(
            (
                torch.zeros(200_000, 1),
                torch.zeros(1, 200_000),
                torch.zeros(()),
                torch.zeros(0, 16),
                torch.full((16, 4), 1e38),
            )
        )
    save_file(
        tensors,
        path,
        {"lora_adapter_metadata": picked(case, "{}", "[" * 9999, "[3]", '{"a": NaN}', '{"unet.alpha_pattern": 3}')},
    )
    if case.rng.random() < 0.4:
        spoil_bytes(path, case.rng, 2000)
    weight = picked(case, "", ":1", ":nan", ":1e9", ":-1")
    return [*editing(case, case.seeds / "tiny"), "--lora", f"{path}{weight}"]


# ---- folders


def folder_json(case: Case, folder: str, name: str, change: Callable[[Any], Any]) -> list[Any]:
    place = case.copied(folder)
    path = place / name
    path.write_text(as_json(change(json.loads(path.read_text())), case.rng), errors="surrogatepass")
    return reading(case, place)


@generator
def unet_config(case: Case) -> list[Any]:
    return folder_json(case, "tiny", "unet/config.json", lambda said: spoiled(said, case.rng))


@generator
def autoencoder_config(case: Case) -> list[Any]:
    return folder_json(case, "tiny", "vae/config.json", lambda said: spoiled(said, case.rng))


@generator
def text_config(case: Case) -> list[Any]:
    return folder_json(case, "tiny", "text_encoder/config.json", lambda said: spoiled(said, case.rng))


PLACES = ("unet/config.json", "vae/config.json", "text_encoder/config.json")


@generator
def config_bomb(case: Case) -> list[Any]:
    return folder_json(case, "tiny", picked(case, *PLACES), lambda said: bombed(said, case.rng))


@generator
def config_setting(case: Case) -> list[Any]:
    """Values that a network is built with and first fails on when it is used."""
    place = case.copied("tiny")
    path = place / picked(case, *PLACES)
    said = json.loads(path.read_text())
    name = case.rng.choice([one for one in SETTINGS if one in said] or SETTINGS)
    path.write_text(
        json.dumps({**said, name: case.rng.choice((odd(case.rng), -1, 2, 1e9, "gelu", "x/y", [1], "identity"))})
    )
    return editing(case, place)


@generator
def pipeline_settings(case: Case) -> list[Any]:
    names = ("ip2p_config.json", "scheduler/scheduler_config.json", "model_index.json")
    place = case.copied("own-tiny")
    name = picked(case, *names)
    if name != names[0]:
        (place / names[0]).unlink()
    spoil_json(place / name, case.rng)
    return reading(case, place)


@generator
def pipeline_files(case: Case) -> list[Any]:
    place = case.copied("own-tiny")
    path = case.rng.choice(sorted(one for one in place.rglob("*") if one.is_file() and "tokenizer" not in str(one)))
    if case.rng.random() < 0.3:
        spoil_bytes(path, case.rng)
        return reading(case, place)
    path.unlink()
    how = case.rng.randrange(4)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.symlink_to("/dev/zero")
    elif how == 2:
        path.mkdir()
    return reading(case, place)


# ---- pickles


class _Calls:
    def __init__(self, canary: Path, how: str) -> None:
        self.canary, self.how = str(canary), how

    def __reduce__(self) -> Any:
        code = f"__import__('os').mkdir({self.canary!r})"
        return {"mkdir": (os.mkdir, (self.canary,)), "eval": (eval, (code,)), "exec": (exec, (code,))}[self.how]


@generator
def pickle_code(case: Case) -> list[Any]:
    path = case.place / picked(case, "model.ckpt", "model.pt", "model.bin")
    content = {
        "state_dict": {"a": torch.zeros(2)},
        "x": _Calls(case.place.parent / "canary", picked(case, "mkdir", "eval", "exec")),
    }
    how = case.rng.randrange(4)
    if how < 2:
        torch.save(content, path, _use_new_zipfile_serialization=bool(how))
    else:
        path.write_bytes(pickle.dumps(content, protocol=case.rng.choice((0, 2, 4, 5))))
    return reading(case, path)


@generator
def pickle_bytes(case: Case) -> list[Any]:
    path = case.copied("tiny.ckpt")
    spoil_bytes(path, case.rng, case.rng.choice((60_000, None)))
    return reading(case, path)


@generator
def pickle_opcodes(case: Case) -> list[Any]:
    """The content with opcodes exchanged, within a sound archive."""
    source = zipfile.ZipFile(case.seeds / "tiny.ckpt")
    path = case.place / "model.ckpt"
    with zipfile.ZipFile(path, "w") as target:
        for one in source.infolist():
            data = bytearray(source.read(one))
            if one.filename.endswith("data.pkl"):
                for _ in range(case.rng.choice((1, 2, 10))):
                    data[case.rng.randrange(len(data))] = case.rng.choice(
                        b"}])(.0123RbcasutqhXK\x80\x81\x85\x86\x87\x88\x89\x93\x94"
                    )
            target.writestr(one.filename, bytes(data))
    return reading(case, path)


NAMES = (b"torch\nTensor", b"torch\nFloatTensor", b"builtins\nbytearray", b"builtins\nset", b"collections\nCounter")
NAMES += (b"torch._utils\n_rebuild_wrapper_subclass", b"torch\nSize", b"os\nsystem", b"torch.jit\nload", b"torch\nload")
NAMES += (
    b"numpy\nfromfile",
    b"pytorch_lightning\nrun",
    b"torch._utils\n_rebuild_meta_tensor_no_storage",
    b"_codecs\nencode",
)


@generator
def pickle_names(case: Case) -> list[Any]:
    """A call of a name that some loader lets in, with a number that is too large."""
    number = b"\x8a\x08" + struct.pack("<q", case.rng.choice((10**4, 10**10, 10**12, -1)))
    content = b"\x80\x02}X\x01\x00\x00\x00ac" + case.rng.choice(NAMES) + b"\n" + number + b"\x85Rs."
    path = case.place / "model.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("a/data.pkl", content), ("a/version", b"3\n"), ("a/byteorder", b"little")):
            archive.writestr(name, data)
    return reading(case, path)


@generator
def pickle_bomb(case: Case) -> list[Any]:
    """Archives that unfold to a gigabyte and a half; each is made once, as that takes seconds."""
    name = picked(case, "data.pkl", "other.pkl", "constants.pkl", "data")
    block = picked(case, "\0", "}0", "(")
    made = case.seeds / f"bomb-{name}-{ord(block[0])}.ckpt"
    if not made.exists():
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("a/version", b"3\n")
            if name != "data.pkl":
                archive.writestr("a/data.pkl", b"\x80\x02}.")
            with archive.open(f"a/{name}" if name != "data" else "a/data/0", "w", force_zip64=True) as stream:
                for _ in range(384):
                    stream.write((block * (1 << 22))[: 1 << 22].encode())
    return ["inspect", shutil.copy(made, case.place / "model.ckpt")]


@generator
def pickle_tensors(case: Case) -> list[Any]:
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: torch.quantize_per_tensor(torch.zeros(16, 8, 3, 3), 0.1, 0, torch.qint8),
        lambda: torch.empty(16, 8, 3, 3, device="meta"),
        lambda: torch.zeros(16, 8).to_sparse(),
        lambda: torch.zeros(1).expand(4000, 4000, 100),
        lambda: torch.zeros(16, 8, 3, 3, dtype=torch.complex64),
        lambda: torch.zeros(16, 8, 3, 3, dtype=torch.int8),
        lambda: torch.nn.Parameter(torch.zeros(16, 8, 3, 3)),
        lambda: [1, 2],
    )
    content = torch.load(case.seeds / "tiny.ckpt", weights_only=True)
    for name in case.rng.sample(sorted(content["state_dict"]), case.rng.choice((1, 5, 200))):
        content["state_dict"][name] = case.rng.choice(kinds)()
    content = picked_list(
        case, [content], [{"model": content["state_dict"]}], [{"x": content}], [content["state_dict"]]
    )[0]
    path = case.place / "model.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=case.rng.random() < 0.7)
    return reading(case, path)


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
