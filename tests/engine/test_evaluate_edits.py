"""The edits of a test set: made once, resumed, turn by turn, and every number of the tables by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

from ip2p_engine import cli
from ip2p_engine.checkpoint.write import save_ldm
from ip2p_engine.clip.similarity import ClipSimilarity
from ip2p_engine.data.reading import name_of_pairs, open_pairs, store_identity
from ip2p_engine.data.record import PairRecord
from ip2p_engine.data.split import test_rows as split_rows
from ip2p_engine.data.store import PairWriter
from ip2p_engine.edit import EditConfig, InstructPix2Pix
from ip2p_engine.errors import DatasetError, Interrupted
from ip2p_engine.evaluate.edits import TestEdit as OneEdit
from ip2p_engine.evaluate.edits import (
    benchmark_tables,
    edited_pictures,
    last_turns,
    load_edits,
    make_edits,
    write_truth,
)
from ip2p_engine.evaluate.metrics import Dino
from ip2p_engine.evaluate.pairs import EMU, MAGICBRUSH, measure_picture
from ip2p_engine.evaluate.seen import seen_table
from ip2p_engine.files import digest_of_text
from ip2p_engine.hooks import Hooks
from ip2p_engine.images import mask_levels, read_settings
from ip2p_engine.networks.model import load_model
from ip2p_engine.scenes.grammar import sample_edits
from ip2p_engine.scenes.world import render

CONFIG = EditConfig(steps=1, batch=2)


def png(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def records():
    """Four rows: a session of two turns, and two rows alone; the last one's captions are equal."""
    found = []
    for n, edit in enumerate(sample_edits(4, seed=3, held_out=True)):
        texts = {"original_prompt": f"scene {n}", "edited_prompt": f"scene {n}" if n == 3 else f"other scene {n}"}
        pictures = {"original_image": png(render(edit.source)), "edited_image": png(render(edit.target))}
        labels = {"session": "s" if n < 2 else None, "kind": "style" if n == 2 else "colour"}
        chance = {"seed": None, "p": None, "cfg": None}
        found.append(PairRecord(**pictures, **texts, **labels, **chance, edit_prompt=edit.instruction, key=f"{n}/0"))
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("testset")
    with PairWriter(folder, manifest={"config": {}}) as writer:
        writer.write(*records())
    return folder


@pytest.fixture(scope="module")
def editor():
    return InstructPix2Pix.load("embedded", device="cpu")


@pytest.fixture
def edits(tmp_path):
    return write_truth(records(), tmp_path / "truth")[0]


def contents(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_truth_is_kept_as_it_was_and_turns_are_counted(edits):
    assert [(one.session, one.turn) for one in edits] == [("s", 0), ("s", 1), ("row 2", 0), ("row 3", 0)]
    assert edits[1].source.read_bytes() == records()[1].original_image
    assert edits[1].target.read_bytes() == records()[1].edited_image
    assert [one.number for one in last_turns(edits)] == [1, 2, 3]


def test_only_some_rows_are_kept(tmp_path):
    found, _ = write_truth(records(), tmp_path, 1, rows={2, 3})
    assert [one.number for one in found] == [2]


@pytest.mark.slow
def test_what_training_held_out_is_measured_alone(tmp_path, capsys):
    """By the rule that training holds out by, without captions too."""
    folder = tmp_path / "bare"
    with PairWriter(folder, manifest={"config": {}}) as writer:
        for n, edit in enumerate(sample_edits(40, seed=5, held_out=False)):
            pictures = {"original_image": png(render(edit.source)), "edited_image": png(render(edit.target))}
            bare = {"original_prompt": "", "edited_prompt": "", "seed": None, "p": None, "cfg": None}
            writer.write(PairRecord(**pictures, **bare, edit_prompt=edit.instruction, key=str(n)))
    rule, rows = split_rows(open_pairs(folder), [""])
    assert rule == "pictures" and 0 < len(rows) < 10
    words = ["evaluate", "edits", folder, "--held-out", "--clip", "embedded", "--steps", "1", "--device", "cpu"]
    assert cli.main([str(word) for word in (*words, "--checkpoint", "embedded", "--out", tmp_path / "run")]) == 0
    edited = sorted((tmp_path / "run" / "edits" / "embedded").glob("*.png"))
    assert [int(path.stem) for path in edited] == rows
    few = [*words, "--limit", "1", "--checkpoint", "embedded", "--out", tmp_path / "few"]
    assert cli.main([str(word) for word in few]) == 0
    assert len(list((tmp_path / "few" / "edits" / "embedded").glob("*.png"))) == 1
    capsys.readouterr()


def test_a_row_that_is_none_is_left_out_and_named(tmp_path):
    class Rows:
        def outcomes(self):
            yield records()[0]
            yield DatasetError("row 2: its picture is missing")

    edits, broken = write_truth(Rows(), tmp_path)
    assert (len(edits), broken) == (1, ["row 2: its picture is missing"])
    with pytest.raises(DatasetError, match="no row can be edited; the first: there is none"):
        write_truth([], tmp_path)


def test_edits_are_those_of_the_editor_and_go_on_where_they_stopped(edits, editor, tmp_path):
    make_edits(edits, editor, tmp_path / "whole", config=CONFIG, seed=5)
    whole = contents(tmp_path / "whole")
    for one in edits:
        (alone,) = editor.edit(one.source, one.instruction, seeds=[5 + one.number], config=CONFIG)
        assert np.abs(whole[one.name].astype(int) - np.asarray(alone.image)).max() <= 1  # batches round otherwise
        assert read_settings(tmp_path / "whole" / one.name)["seed"] == 5 + one.number
    asked = []
    hooks = Hooks(should_stop=lambda: asked.append(1) or len(asked) > 1)
    with pytest.raises(Interrupted):
        make_edits(edits, editor, tmp_path / "parts", config=CONFIG, seed=5, hooks=hooks)
    some = contents(tmp_path / "parts")
    assert 0 < len(some) < 4
    stamps = {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in some}
    make_edits(edits, editor, tmp_path / "parts", config=CONFIG, seed=5)
    assert same(contents(tmp_path / "parts"), whole)
    assert {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in some} == stamps


def test_a_turn_starts_from_the_result_of_the_one_before(edits, editor, tmp_path):
    make_edits(edits, editor, tmp_path / "own", config=CONFIG, own_turns=True)
    first = tmp_path / "own" / edits[0].name
    (second,) = editor.edit(first, edits[1].instruction, seeds=[1], config=CONFIG)
    made = np.asarray(Image.open(tmp_path / "own" / edits[1].name))
    assert np.abs(made.astype(int) - np.asarray(second.image)).max() <= 1
    make_edits(edits, editor, tmp_path / "true", config=CONFIG)
    assert not np.array_equal(made, contents(tmp_path / "true")[edits[1].name])


def test_a_folder_of_other_edits_is_refused(edits, editor, tmp_path):
    make_edits(edits[:1], editor, tmp_path / "a", config=CONFIG)
    with pytest.raises(DatasetError, match="holds edits of other seed"):
        make_edits(edits[:1], editor, tmp_path / "a", config=CONFIG, seed=1)
    with pytest.raises(DatasetError, match="holds edits of other rows"):
        make_edits(edits, editor, tmp_path / "a", config=CONFIG)
    with pytest.raises(DatasetError, match="holds edits of other settings"):
        make_edits(edits[:1], editor, tmp_path / "a", config=EditConfig(steps=2))
    make_edits(edits[:1], editor, tmp_path / "a", config=EditConfig(steps=1, batch=7))  # no picture depends on it


def plain_numbers(edit, edited):
    """Both benchmarks' numbers in plain torch; the pictures are of the network's size, so no transform remains."""
    clip = ClipSimilarity.load("embedded")
    network = clip.network
    tokens = open_clip.SimpleTokenizer(context_length=network.context_length)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip._mean, clip._std))
    pixels = [torch.tensor(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255 for path in edited]
    source, result, target = pixels
    with torch.no_grad():
        features = network.encode_image(torch.stack([(one - mean) / std for one in pixels]))
        texts = network.encode_text(tokens([edit.caption, edit.edited_caption]))
    s, r, t = (one / one.norm() for one in features)
    before, after = (one / one.norm() for one in texts)

    def cosine(a, b):
        return float(a @ b / a.norm() / b.norm())

    numbers = {"l1": (result - target).abs().mean(), "l2": (result - target).square().mean()}
    numbers |= {
        "clip_i": cosine(r, t),
        "clip_t": cosine(r, after),
        "clip_im": cosine(r, s),
        "clip_out": cosine(r, after),
    }
    numbers |= {"source_l1": (result - source).abs().mean()}
    if edit.caption != edit.edited_caption:
        numbers["clip_dir"] = cosine(r - s, after - before)
    return {name: float(value) for name, value in numbers.items()}


def test_every_number_is_the_one_by_hand_and_equal_captions_give_none(edits, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for one in edits:
        noise = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.blend(Image.open(one.target).convert("RGB"), Image.fromarray(noise), 0.2).save(folder / one.name)
    clip = ClipSimilarity.load("embedded")
    rows = [measure_picture(one, clip) for one in edited_pictures(edits, folder)]
    hand = [plain_numbers(one, (one.source, folder / one.name, one.target)) for one in edits]
    for row, wanted in zip(rows, hand, strict=True):
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    assert ["clip_dir" in row for row in rows] == [True, True, True, False]
    tables = {table.title: table for table in benchmark_tables({"mine": (edits, rows)})}
    emu = tables["Emu Edit: edited against source"]
    wanted = sum(row["clip_dir"] for row in hand[:3]) / 3
    assert float(emu.rows[0][emu.columns.index("CLIP-dir")]) == pytest.approx(wanted, abs=5e-5)
    assert emu.note.startswith("1 rows have equal captions")
    brush = tables["MagicBrush: edited against target"]
    assert float(brush.rows[0][brush.columns.index("L1")]) == pytest.approx(sum(r["l1"] for r in hand) / 4, abs=5e-5)
    assert brush.rows_apart == [("InstructPix2Pix", "", "0.1122", "", "0.8524", "0.7428", "")]
    assert "MagicBrush's test set" in brush.apart and not emu.rows_apart
    kinds = tables["MagicBrush: edited against target, by kind"].rows
    assert [(kind, n) for _, kind, n, *_ in kinds] == [("colour", 3), ("style", 1)]


def middle(picture, shorter, crop):
    """The shorter side to ``shorter``, the middle ``crop`` pixels, by Pillow alone: (3, crop, crop) in [0, 1]."""
    w, h = picture.size
    size = (shorter, int(shorter * h / w)) if w <= h else (int(shorter * w / h), shorter)
    shrunk = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - crop) / 2) for length in size)
    cut = np.asarray(shrunk.crop((left, top, left + crop, top + crop)))
    return torch.tensor(cut).permute(2, 0, 1).float() / 255


def plain_vit(state, picture, *, heads):
    """The class token of a ViT (Dosovitskiy et al. 2021, pre-norm, as DINO's) in plain torch, unit length."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    patches, stem = state["embeddings.patch_embeddings.projection.weight"], "embeddings.patch_embeddings.projection"
    side = patches.shape[-1]
    tiles = picture.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).reshape(-1, 3 * side * side)
    x = tiles @ patches.reshape(len(patches), -1).T + state[f"{stem}.bias"]
    x = torch.cat([state["embeddings.cls_token"][0], x]) + state["embeddings.position_embeddings"][0]
    for n in range(1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))):
        layer = f"encoder.layer.{n}"
        y = norm(x, f"{layer}.layernorm_before")
        query, key, value = (
            linear(y, f"{layer}.attention.attention.{name}").reshape(len(y), heads, -1).transpose(0, 1)
            for name in ("query", "key", "value")
        )
        weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).exp()
        mixed = (weights / weights.sum(-1, keepdim=True)) @ value
        x = x + linear(mixed.transpose(0, 1).reshape(len(y), -1), f"{layer}.attention.output.dense")
        y = linear(norm(x, f"{layer}.layernorm_after"), f"{layer}.intermediate.dense")
        x = x + linear(y * (1 + torch.erf(y / 2**0.5)) / 2, f"{layer}.output.dense")
    token = norm(x, "layernorm")[0]
    return token / token.norm()


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """DINO ViT-S/16's shape but for its depth, untrained: its published weights cannot be part of a test."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 1536}
    network = ViTModel(ViTConfig(**shape, patch_size=16), add_pooling_layer=False)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.normal_(0, 0.05).add_(float("norm" in name and name.endswith("weight")))
    folder = tmp_path_factory.mktemp("dino")
    network.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_every_number_of_both_tables_by_an_independent_implementation(tmp_path, dino_folder):
    """Pictures of other sizes than any network's, through Pillow and plain torch alone, DINO's too: <= 1e-5."""
    state, clip = load_file(dino_folder / "model.safetensors"), ClipSimilarity.load("embedded")
    rows = []
    for n, record in enumerate(records()):
        sizes = {"original_image": (100, 84), "edited_image": (84, 100 + n)}
        resized = {
            name: png(Image.open(io.BytesIO(getattr(record, name))).resize(size)) for name, size in sizes.items()
        }
        rows.append(replace(record, **resized))
    edits, _ = write_truth(rows, tmp_path)
    (tmp_path / "made").mkdir()
    generator = np.random.default_rng(0)
    for one in edits:
        noise = generator.integers(0, 256, (64, 72, 3), dtype=np.uint8)
        Image.blend(Image.open(one.source).convert("RGB").resize((72, 64)), Image.fromarray(noise), 0.3).save(
            tmp_path / "made" / one.name
        )
    dino = Dino.load(dino_folder)
    found = [measure_picture(one, clip, dino) for one in edited_pictures(edits, tmp_path / "made")]
    network, tokens = clip.network, open_clip.SimpleTokenizer(context_length=clip.network.context_length)
    clip_norm = [torch.tensor(values).view(3, 1, 1) for values in (clip._mean, clip._std)]
    dino_norm = [torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]

    def cosine(a, b):
        return float(a.double() @ b.double() / a.double().norm() / b.double().norm())

    hand = []
    for one in edits:
        opened = [Image.open(path).convert("RGB") for path in (one.source, tmp_path / "made" / one.name, one.target)]
        with torch.no_grad():
            seen = torch.stack([(middle(p, clip.size, clip.size) - clip_norm[0]) / clip_norm[1] for p in opened])
            s, r, t = (f / f.norm() for f in network.encode_image(seen))
            before, after = (f / f.norm() for f in network.encode_text(tokens([one.caption, one.edited_caption])))
            ds, dr, dt = (
                plain_vit(state, (middle(p, 256, 224) - dino_norm[0]) / dino_norm[1], heads=6) for p in opened
            )
        at_target, at_source = (
            np.asarray(opened[1].resize(other.size, Image.Resampling.BICUBIC)) / 255 - np.asarray(other) / 255
            for other in (opened[2], opened[0])
        )
        numbers = {"l1": np.abs(at_target).mean(), "l2": (at_target**2).mean(), "source_l1": np.abs(at_source).mean()}
        numbers |= {"clip_i": cosine(r, t), "clip_t": cosine(r, after), "clip_out": cosine(r, after)}
        numbers |= {"clip_im": cosine(r, s), "dino": cosine(dr, dt), "source_dino": cosine(dr, ds)}
        numbers |= {"clip_dir": cosine(r - s, after - before)} if one.caption != one.edited_caption else {}
        hand.append(numbers)
    for row, wanted in zip(found, hand, strict=True):
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
        assert "clip_dir" in wanted or "clip_dir" not in row
    names = {"MagicBrush": MAGICBRUSH, "Emu Edit": EMU}
    for table in benchmark_tables({"mine": (edits, found)}):
        keys = names[table.title.partition(":")[0]]
        for line in table.rows:
            cells = dict(zip(table.columns, line, strict=True))
            chosen = [h for one, h in zip(edits, hand, strict=True) if "kind" not in cells or one.kind == cells["kind"]]
            for name, key in keys.items():
                values = [one[key] for one in chosen if key in one]
                assert (cells[name] == "") == (not values)
                assert not values or float(cells[name]) == pytest.approx(sum(values) / len(values), abs=6e-5)
            assert cells["n"] == len(chosen)


def test_a_transparent_place_is_where_the_edit_was_wanted(tmp_path):
    picture = Image.new("RGBA", (8, 8), (255, 255, 255, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 4, 8))
    picture.save(tmp_path / "rgba.png")
    mask = np.asarray(mask_levels(tmp_path / "rgba.png")[0])
    assert (mask[:, :4] == 255).all() and (mask[:, 4:] == 0).all()
    Image.new("RGBA", (8, 8), (9, 9, 9, 255)).save(tmp_path / "opaque.png")
    assert np.asarray(mask_levels(tmp_path / "opaque.png")[0]).max() == 9


def write_turns(home, *, sessions=False):
    """MagicBrush's own files: session 7 of two turns, session 8 of one; masks are clear where the edit was."""
    first = records()
    pictures = {"7-input": 0, "7-output1": 1, "7-output2": 2, "8-input": 3, "8-output1": 0}
    for name, n in pictures.items():
        place = home / "images" / name.partition("-")[0]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.png").write_bytes(first[n].original_image)
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    mask.save(home / "images" / "7" / "7-mask1.png")
    turns = [
        {"input": "7-input.png", "mask": "7-mask1.png", "output": "7-output1.png", "instruction": "one"},
        {"input": "7-output1.png", "output": "7-output2.png", "instruction": "two"},
        {"input": "8-input.png", "output": "8-output1.png", "instruction": "three"},
    ]
    content = {"7": turns[:2], "8": turns[2:]} if sessions else turns
    path = home / ("edit_sessions.json" if sessions else "edit_turns.json")
    path.write_text(json.dumps(content))
    said = {"7": {"7-input.png": "a", "7-output1.png": "b", "7-output2.png": "c"}}
    (home / "global_descriptions.json").write_text(json.dumps(said))
    return path


@pytest.mark.parametrize("sessions", [False, True])
def test_magicbrushs_own_files_are_a_test_set(sessions, tmp_path):
    path = write_turns(tmp_path / "set", sessions=sessions)
    for source in (path, path.parent):
        edits, broken = write_truth(open_pairs(source), tmp_path / "run")
        assert not broken
        assert [(one.session, one.turn, one.instruction) for one in edits] == [
            ("7", 0, "one"),
            ("7", 1, "two"),
            ("8", 0, "three"),
        ]
        assert [(one.caption, one.edited_caption) for one in edits] == [("a", "b"), ("b", "c"), ("", "")]
    assert edits[1].source.read_bytes() == edits[0].target.read_bytes()
    white = np.asarray(mask_levels(edits[0].mask)[0])
    assert (white[:, :32] == 255).all() and not white[:, 32:].any() and edits[1].mask is None
    assert load_edits(tmp_path / "run") == edits
    path = tmp_path / "run" / "edits.jsonl"
    first, *rest = path.read_text().splitlines()
    for wrong in (
        {"turn": "1"},
        {"number": "../x"},
        {"about": "x"},
        {"source": "../../etc/passwd"},
        {"mask": "/a.png"},
    ):
        path.write_text("\n".join([json.dumps({**json.loads(first), **wrong}), *rest]))
        with pytest.raises(DatasetError, match="is no list of edits"):
            load_edits(tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"input": "7-input.png"}]', "lacks input, output, instruction"),
        ('{"7": 3}', "in place of turns"),
        ("7", "in place"),
    ],
)
def test_other_content_under_magicbrushs_names_is_refused(content, said, tmp_path):
    (tmp_path / "edit_turns.json").write_text(content)
    with pytest.raises(DatasetError, match=said):
        open_pairs(tmp_path)


def test_what_a_checkpoint_has_seen(store, tmp_path):
    """As its header says: nothing, other data, the same with pairs held out, the same, one of several sets."""
    source, pairs = load_model("embedded", device="cpu"), open_pairs(store)
    digest = digest_of_text(store_identity(pairs))
    for name, more in (
        ("other", {"data_digest": "x"}),
        ("held", {"data_digest": digest, "held_out": 4}),
        ("same", {"data_digest": digest}),
        ("among", {"data_digest": "x", "data_sets": ["y", name_of_pairs(pairs)]}),
    ):
        save_ldm(
            source, tmp_path / f"{name}.safetensors", training={"data": "mine", "step": 5, "licences": ["cc"], **more}
        )
    named = [(name, str(tmp_path / f"{name}.safetensors")) for name in ("other", "held", "same", "among")]
    table = seen_table([("e", "embedded"), *named], pairs)
    assert table.rows[0] == ("e", "scenes", "", "", "")
    assert [row[1:4] for row in table.rows[1:]] == [("mine", 5, "cc")] * 4
    said = [row[4] for row in table.rows[1:]]
    assert said[0].startswith("other data") and "4 pairs were held out" in said[1] and "has seen these pairs" in said[2]
    assert said[3] == "among its data: it has seen these pairs, or some"
    alone = seen_table(named, pairs, held_out=True).rows
    assert alone[1][4] == "the pairs that were held out of the same data" and alone[2][4] == said[2]


@pytest.mark.slow
def test_the_command(store, tmp_path, capsys):
    words = ["evaluate", "edits", store, "--checkpoint", "a=embedded", "b=embedded", "--out", tmp_path / "run"]
    words += ["--turns", "both", "--clip", "embedded", "--steps", "1", "--device", "cpu"]
    assert cli.main([str(word) for word in words]) == 0
    first = capsys.readouterr().out
    assert "a, last turn on own results" in first and "-- Published by" in first
    assert Image.open(tmp_path / "run" / "examples.png").height > 3 * 192
    rows = (tmp_path / "run" / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 2 * (4 + 3)
    assert cli.main([str(word) for word in words]) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "run" / "rows.jsonl").read_text().splitlines() == rows
    assert json.loads((tmp_path / "run" / "run.json").read_text())["kind"] == "edits"
    assert isinstance(OneEdit, type)
