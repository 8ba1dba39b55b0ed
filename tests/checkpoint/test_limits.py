"""Small files that ask for huge networks, much memory or much time: one sentence each, and at once."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ip2p_engine.checkpoint import unpickle
from ip2p_engine.checkpoint.limits import TENSORS_A_BLOCK, checked_config
from ip2p_engine.checkpoint.lora import Lora, with_loras
from ip2p_engine.checkpoint.read import HEADER_LIMIT, MAX_TENSORS
from ip2p_engine.checkpoint.report import report_card
from ip2p_engine.checkpoint.spec import ModelSpec, Part, recommended
from ip2p_engine.checkpoint.write import ldm_state
from ip2p_engine.errors import CheckpointError, ConfigError
from ip2p_engine.networks.conditioning import encode_image, encode_text
from ip2p_engine.networks.model import load_model

READERS = [load_model, report_card]
MANY = 10**9


def refused(reader, path):
    with pytest.raises(CheckpointError) as error:
        reader(path)
    text = str(error.value)
    assert "\n" not in text
    assert 30 < len(text) < 500
    return text


BOMBS = {
    "unet": {
        "layers_per_block": MANY,
        "transformer_layers_per_block": 20_000,
        "block_out_channels": [32] * 5000,
        "cross_attention_dim": MANY,
        "norm_eps": "x",
        "freq_shift": 2,
        "downsample_padding": -1,
        "norm_num_groups": -1,
        "attention_head_dim": 0,
        "mid_block_scale_factor": 0,
        "mid_block_type": "UNetMidBlock2D",
        "encoder_hid_dim_type": "text_proj",
        "conv_in_kernel": 10**6,
        "act_fn": ["silu"],
    },
    "autoencoder": {
        "layers_per_block": 20_000,
        "block_out_channels": [32] * 5000,
        "norm_num_groups": -1,
        "latent_channels": 16,
        "act_fn": 3,
        "use_quant_conv": "yes",
    },
    "text": {
        "num_hidden_layers": 20_000,
        "layer_norm_eps": float("nan"),
        "num_attention_heads": -1,
        "hidden_act": "__class__",
        "max_position_embeddings": True,
    },
}
CASES = [(kind, field) for kind, fields in BOMBS.items() for field in fields]
PLACES = {"unet": "unet", "autoencoder": "vae", "text": "text_encoder"}


@pytest.mark.parametrize(("kind", "field"), CASES)
def test_a_folder_s_configuration_that_no_network_has(kind, field, sd1_folder, tmp_path):
    folder = shutil.copytree(sd1_folder, tmp_path / "model")
    place = folder / PLACES[kind] / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), field: BOMBS[kind][field]}))
    assert "configuration" in refused(report_card, folder)


@pytest.mark.parametrize(("kind", "field"), [(kind, next(iter(fields))) for kind, fields in BOMBS.items()])
def test_our_own_header_is_trusted_no_more(kind, field, sd1_file, sd1, ldm_tensors, tmp_path):
    with safe_open(sd1_file, "pt") as opened:
        said = json.loads(opened.metadata()["ip2p_config"])
    network = said["architecture"]
    target = network["text_encoders"][0] if kind == "text" else network[kind]
    target[field] = BOMBS[kind][field]
    save_file(ldm_tensors(sd1), tmp_path / "model.safetensors", {"ip2p_config": json.dumps(said)})
    for reader in READERS:
        assert "configuration" in refused(reader, tmp_path / "model.safetensors")


def test_a_text_encoder_s_configuration_brings_in_no_code(sd1_folder, same_model, sd1, tmp_path):
    """transformers takes attention kernels from the hub, by a name in a configuration."""
    folder = shutil.copytree(sd1_folder, tmp_path / "model")
    place = folder / "text_encoder" / "config.json"
    kernel = {"attn_implementation": "somebody/kernel", "_attn_implementation": "somebody/kernel", "dtype": "float99"}
    place.write_text(json.dumps({**json.loads(place.read_text()), **kernel}))
    same_model(load_model(folder), sd1)


def test_blocks_are_counted_against_the_tensors():
    def part(layers):
        tensors = {str(n): torch.zeros(1) for n in range(10 * TENSORS_A_BLOCK)}
        return Part(kind="text", config={"num_hidden_layers": layers}, tensors=tensors)

    assert checked_config(part(10), "text encoder", "x") == {"num_hidden_layers": 10}
    with pytest.raises(CheckpointError, match="asks for 11 blocks of layers and the file holds 40 tensors"):
        checked_config(part(11), "text encoder", "x")


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [("resolution", 4096, 4097), ("steps", 1000, 1001), ("text_cfg", 1000.0, 1001.0), ("beta_end", 0.999, 1.0)],
)
def test_what_a_checkpoint_may_recommend(field, good, bad):
    values = {"family": "sd1", "in_channels": 8, "prediction": "eps", **recommended("sd1", 8)}
    assert getattr(ModelSpec(**{**values, field: good}), field) == good
    with pytest.raises(ConfigError, match=field):
        ModelSpec(**{**values, field: bad})


@pytest.mark.parametrize("said", [{"in_channels": 4}, {"family": "sdxl"}])
def test_a_spec_of_another_network(said, sd1_file, sd1, ldm_tensors, tmp_path):
    with safe_open(sd1_file, "pt") as opened:
        config = {**json.loads(opened.metadata()["ip2p_config"]), **said}
    save_file(ldm_tensors(sd1), tmp_path / "model.safetensors", {"ip2p_config": json.dumps(config)})
    for reader in READERS:
        assert "the parts are of different models" in refused(reader, tmp_path / "model.safetensors")


NAMES = {
    "blocks": "model.diffusion_model.input_blocks.{}.0.in_layers.2.weight",
    "depth": "model.diffusion_model.middle_block.1.transformer_blocks.{}.norm1.weight",
    "text layers": "cond_stage_model.transformer.text_model.encoder.layers.{}.layer_norm1.weight",
    "levels": "first_stage_model.encoder.down.{}.block.0.conv1.weight",
}


@pytest.mark.parametrize("number", [10**7, "9" * 5000])
@pytest.mark.parametrize("case", NAMES)
def test_numbers_in_names(case, number, sd1, ldm_tensors, tmp_path):
    save_file({**ldm_tensors(sd1), NAMES[case].format(number): torch.zeros(2)}, tmp_path / "model.safetensors")
    refused(report_card, tmp_path / "model.safetensors")


def with_header(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("second", [[0, 4], [2, 6], [8, 12]])
def test_tensors_that_share_bytes_or_leave_gaps(second, tmp_path):
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": second},
    }
    path = with_header(tmp_path / "model.safetensors", header, bytes(second[1]))
    assert "damaged safetensors header" in refused(load_model, path)


def test_a_header_of_many_tensors(tmp_path):
    tensors = {f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(MAX_TENSORS + 1)}
    path = with_header(tmp_path / "model.safetensors", tensors)
    for reader in READERS:
        assert f"holds {MAX_TENSORS + 1:,} tensors" in refused(reader, path)
    del tensors["t0"]
    assert "no UNet" in refused(load_model, with_header(path, tensors))


def test_a_header_of_many_bytes(tmp_path):
    path = with_header(tmp_path / "model.safetensors", {"__metadata__": {"a": " " * HEADER_LIMIT}})
    assert "neither safetensors nor" in refused(load_model, path)


def archive(path, *members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as opened:
        for name, content in (*members, ("a/version", b"3\n"), ("a/byteorder", b"little")):
            opened.writestr(name, content)
    return path


def test_an_archive_that_unfolds(tmp_path):
    """A small file that would be a large one; only data.pkl is ever read, and only where it is not compressed."""
    bomb = archive(tmp_path / "model.ckpt", ("a/data.pkl", bytes(1 << 26)), compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(load_model, bomb)
    other = archive(tmp_path / "model.pt", ("a/data.pkl", b"\x80\x02}."), ("a/x.pkl", b"\x80\x04bad"))
    assert "holds no tensors" in refused(load_model, other)


def test_an_archive_that_two_readers_read_differently(tmp_path):
    good = archive(tmp_path / "model.ckpt", ("a/data.pkl", b"\x80\x02}."))
    (tmp_path / "more.ckpt").write_bytes(good.read_bytes() + b"\0" * 30)
    assert "directory" in refused(load_model, tmp_path / "more.ckpt")
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = archive(tmp_path / "twice.ckpt", ("a/data.pkl", b"\x80\x02}."), ("a/data.pkl", b"\x80\x02}."))
    assert "repeated" in refused(load_model, twice)
    (tmp_path / "legacy.ckpt").write_bytes(pickle.dumps({}, protocol=2) + good.read_bytes())
    assert "damaged" in refused(load_model, tmp_path / "legacy.ckpt")


def test_a_pickle_that_keeps_its_reader_busy(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickle, "MAX_OPCODES", 100)
    path = archive(tmp_path / "model.ckpt", ("a/data.pkl", b"\x80\x02" + b"}0" * 60 + b"}."))
    assert "keep its reader busy" in refused(load_model, path)
    slow = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x08\x00\x00\x00punycode\x86R."
    assert "keep its reader busy" in refused(load_model, archive(path, ("a/data.pkl", slow)))


def quantised():
    return torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)


STRANGE = {
    "quantised": quantised,
    "meta": lambda: torch.empty(4, device="meta"),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "complex": lambda: torch.zeros(4, dtype=torch.complex64),
    "one number seen a billion times": lambda: torch.zeros(1).expand(1000, 1000, 1000),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", STRANGE)
def test_tensors_that_are_none(case, tmp_path):
    torch.save({"a": STRANGE[case]()}, tmp_path / "model.ckpt")
    text = refused(load_model, tmp_path / "model.ckpt")
    assert "no plain tensor" in text or "calls torch" in text


def test_tensors_that_share_their_numbers(tmp_path):
    shared = torch.zeros(100_000)
    torch.save({str(n): shared for n in range(3)}, tmp_path / "model.ckpt")
    assert "more than twice its size" in refused(load_model, tmp_path / "model.ckpt")


@pytest.mark.parametrize(("version", "safe"), [("2.9.1+cu128", False), ("2.10.0", True), ("3.0.0a0", True)])
def test_pickles_are_refused_under_a_torch_with_a_hole(version, safe, monkeypatch, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.ckpt")
    monkeypatch.setattr(torch, "__version__", version)
    text = refused(load_model, tmp_path / "model.ckpt")
    assert ("CVE-2026-24747" in text) != safe


def test_torch_s_advice_to_load_a_file_all_the_same_is_not_passed_on(tmp_path):
    torch.save({"a": torch.nn.Linear(1, 1)}, tmp_path / "model.ckpt")
    path = archive(tmp_path / "other.ckpt", ("a/data.pkl", b"\x80\x02ctorch\ndevice\nK\x05\x85R."))
    for one in (tmp_path / "model.ckpt", path):
        assert "can still be loaded" not in refused(load_model, one)


def test_settings_of_a_gigabyte(sd1_folder, tmp_path):
    folder = shutil.copytree(sd1_folder, tmp_path / "model")
    with (folder / "unet" / "config.json").open("ab") as stream:
        stream.truncate(1 << 30)
    for reader in READERS:
        assert "too many for settings" in refused(reader, folder)


def test_weights_within_what_a_trainer_saved(sd1, same_model, ldm_tensors, tmp_path):
    state = ldm_tensors(sd1)
    for place in ("model", "module"):
        torch.save({"epoch": 3, place: state}, tmp_path / "model.ckpt")
        same_model(load_model(tmp_path / "model.ckpt", text_heads=4), sd1)
    wrapped = OrderedDict((f"module._orig_mod.{name}", value) for name, value in state.items())
    torch.save({"model": wrapped}, tmp_path / "model.ckpt")
    same_model(load_model(tmp_path / "model.ckpt", text_heads=4), sd1)
    save_file(dict(wrapped), tmp_path / "model.safetensors")
    same_model(load_model(tmp_path / "model.safetensors", text_heads=4), sd1)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model."])
def test_a_lone_unet_of_comfyui_s_saver(prefix, sd1, same_model, sd1_file, ldm_tensors, tmp_path):
    mark = "model.diffusion_model."
    state = {prefix + name.removeprefix(mark): v for name, v in ldm_tensors(sd1).items() if name.startswith(mark)}
    save_file(state, tmp_path / "unet.safetensors")
    same_model(load_model(tmp_path / "unet.safetensors", base=sd1_file), sd1)
    assert report_card(tmp_path / "unet.safetensors").layout == "ldm-unet"


@pytest.mark.parametrize("source", ["embedded", pytest.param("embedded-sd", marks=pytest.mark.slow)])
def test_the_embedded_model_as_others_save_it(source, same_model, tmp_path):
    """ComfyUI's CheckpointSave writes no settings: groups, heads and the prediction are known by the shapes."""
    model = load_model(source)
    save_file(ldm_state(model), tmp_path / "saved.safetensors")
    again = load_model(tmp_path / "saved.safetensors")
    assert again.spec == model.spec
    same_model(again, model)
    assert again.unet.config.norm_num_groups == model.unet.config.norm_num_groups


LONG, THIN = torch.zeros(200_000, 1), torch.zeros(1, 200_000)
FACTORS = {
    "multiplies to 40,000,000,000 numbers": {"lora_up.weight": LONG, "lora_down.weight": THIN},
    "is damaged": {"lora_up.weight": torch.zeros(()), "lora_down.weight": torch.zeros(())},
}


@pytest.mark.parametrize("says", FACTORS)
def test_a_lora_of_long_thin_factors(says, sd1, tmp_path):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{layer}.{part}": value for part, value in FACTORS[says].items()}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=says):
        with_loras(sd1, [Lora(path=tmp_path / "lora.safetensors")])


def test_a_text_encoder_of_few_words_is_said_before_it_reads(sd1):
    with pytest.raises(CheckpointError, match="reads 600 tokens at 77 places, and CLIP's are 49,408"):
        encode_text(sd1, ["snow"])
    with pytest.raises(CheckpointError, match="makes 32 latents of 64 pixels"):
        encode_image(sd1, torch.zeros(1, 3, 64, 64))


def put(number):
    return b"q" + bytes([number])


def get(number):
    return b"h" + bytes([number])


def doubled(times):
    """A tuple that holds the one before twice; the last has the memo's number ``times``."""
    return b")" + put(0) + b"".join(get(n) * 2 + b"\x86" + put(n + 1) for n in range(times))


def copied(times):
    """A list of 5,000, counted so many times."""
    return (
        b"](" + b"N" * 5000 + b"e" + put(0) + b"ccollections\nCounter\n" + put(1) + (get(1) + get(0) + b"\x85R") * times
    )


ENCODED = b"}c_codecs\nencode\nX\x01\x00\x00\x00aX%c\x00\x00\x00%b\x86R."
DEAR = {
    "a key of tuples within tuples": doubled(60) + b"}" + get(60) + b"K\x01s.",
    "such a key in a list of pairs": doubled(20) + b"ccollections\nOrderedDict\n](" + get(20) * 20 + b"e\x85R.",
    "a list copied many times": copied(2500) + b"}.",
    "a text that doubles": ENCODED % (3, b"hex"),
    "arguments that are a list": b"ccollections\nCounter\n]R.",
}
CHEAP = {"tuples": doubled(15) + b"}.", "copies": copied(1500) + b"}.", "bytes": ENCODED % (6, b"latin1")}


@pytest.mark.parametrize("case", DEAR)
def test_a_small_pickle_that_takes_long_to_make(case, tmp_path):
    content = b"\x80\x02" + DEAR[case]
    assert "keep its reader busy" in refused(load_model, archive(tmp_path / "model.ckpt", ("a/data.pkl", content)))
    (tmp_path / "plain.ckpt").write_bytes(content)
    assert "keep its reader busy" in refused(load_model, tmp_path / "plain.ckpt")


@pytest.mark.parametrize("case", CHEAP)
def test_a_pickle_that_shares_as_much_as_weights_may(case, tmp_path):
    path = archive(tmp_path / "model.ckpt", ("a/data.pkl", b"\x80\x02" + CHEAP[case]), ("a/version", b"3\n"))
    assert "keep its reader busy" not in refused(load_model, path)


class Replaced:
    """Pickled as an OrderedDict whose methods are numbers."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return OrderedDict, (), dict.fromkeys(("items", "values", "get", "keys"), 3), None, iter(self.state.items())


def test_a_pickle_replaces_no_methods(sd1, same_model, ldm_tensors, tmp_path):
    state = ldm_tensors(sd1)
    first = next(iter(state))
    state[first] = torch.nn.Parameter(state[first])
    vars(state[first])["to"] = 3
    torch.save(Replaced({"state_dict": Replaced(state)}), tmp_path / "model.ckpt")
    same_model(load_model(tmp_path / "model.ckpt", text_heads=4), sd1)
