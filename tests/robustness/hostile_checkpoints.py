"""Checkpoints, in one file or a folder, that are spoiled each in one way; each gives the command that reads it."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from spoiling import (
    HUGE,
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
    return editing(case, path, "--json", "--resolution", "64") if case.rng.random() < 0.3 else reading(case, path)


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
