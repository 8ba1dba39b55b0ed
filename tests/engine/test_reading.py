"""Every published layout is read as it is: by its columns, in its format, with what it carries beyond pictures."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ip2p_engine.data.layouts import LAYOUTS
from ip2p_engine.data.reading import ForeignPairs, Reading, open_pairs
from ip2p_engine.data.sheet import sheet
from ip2p_engine.data.store import PairStore, PairWriter
from ip2p_engine.data.tools import import_dataset, info, verify
from ip2p_engine.data.where import Where
from ip2p_engine.errors import ConfigError, DatasetError
from ip2p_engine.hooks import Hooks
from ip2p_engine.images import open_image


def encoded(colour, kind="PNG", size=(32, 32)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


RED, BLUE, MASK = encoded("red"), encoded("blue"), encoded("white")
EDIT, BACK = "make it blue", "make it red"
MAGIC = {"img_id": "7", "turn_index": 2, "source_img": RED, "mask_img": MASK, "instruction": EDIT, "target_img": BLUE}
HQ = {
    "input": "a red",
    "input_image": RED,
    "edit": EDIT,
    "inverse_edit": BACK,
    "output": "a blue",
    "output_image": BLUE,
}
ULTRA = {"clip_sim_source": 0.3, "clip_sim_dir": 0.25, "ssim": 0.5, "source_caption": "a", "target_caption": "b"}
ULTRA |= {"edit_prompt": EDIT, "source_image": RED, "edited_image": BLUE, "mask_image": None, "idx": 4}
OMNI = {
    "task": "swap",
    "src_img": RED,
    "edited_img": BLUE,
    "edited_prompt_list": [EDIT, "turn it blue"],
    "o_score": 8.5,
}
ANY = {"edit_instruction": EDIT, "edit_type": "colour", "image_file": RED, "edited_file": BLUE, "visual_input": None}
PIPE = {"img_id": "1", "source_img": RED, "target_img": BLUE, "Instruction_VLM-LLM": EDIT, "Instruction_Class": "blue"}
PIPE |= {"Instruction_Ref_Dataset": "blue one"}
BROOKS = {"original_prompt": "a", "original_image": RED, "edit_prompt": EDIT, "edited_prompt": "b"}
FIELD = {
    "timbrooks": {**BROOKS, "edited_image": BLUE},
    "small": {"input_image": RED, "edit_prompt": EDIT, "edited_image": BLUE},
    "magicbrush": MAGIC,
    "hq-edit": HQ,
    "ultraedit": ULTRA,
    "omniedit": OMNI,
    "anyedit": ANY,
    "pipe": PIPE,
    "unknown": {"before_image": RED, "prompt": EDIT, "after_image": BLUE},
    "plain bytes": {"src": 1, "source": RED, "target": BLUE, "edit": EDIT},
}
CARRIED = {
    "magicbrush": {"mask": MASK, "session": "7"},
    "hq-edit": {"original_prompt": "a red", "edited_prompt": "a blue"},
    "ultraedit": {"sim_0": 0.3, "sim_direction": 0.25, "scores": {"ssim": 0.5}, "original_prompt": "a", "mask": None},
    "omniedit": {"kind": "swap", "paraphrases": ("turn it blue",), "scores": {"o_score": 8.5}},
    "anyedit": {"kind": "colour"},
    "pipe": {"paraphrases": ("blue", "blue one"), "session": None},
}


def parquet(folder, *rows, name="train-00000-of-00001.parquet", images=True):
    """As the hub has it: pictures as {"bytes", "path"}."""

    def value(one):
        return {"bytes": one, "path": None} if isinstance(one, bytes) and images else one

    kinds = {name: [value(row[name]) for row in rows] for name in rows[0]}
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    empty = {name for name, values in kinds.items() if all(one is None for one in values)}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    columns = {name: pa.array(values, struct if name in empty else None) for name, values in kinds.items()}
    pq.write_table(pa.table(columns), folder / "data" / name)
    return folder


@pytest.mark.parametrize("name", FIELD)
def test_published_columns_are_known(tmp_path, name):
    folder = parquet(tmp_path / "set", FIELD[name], FIELD[name], images=name != "plain bytes")
    pairs = open_pairs(folder)
    assert len(pairs) == 2
    first = pairs[0]
    assert (first.original_image, first.edit_prompt, first.edited_image) == (RED, EDIT, BLUE)
    for column, value in CARRIED.get(name, {}).items():
        assert getattr(first, column) == value
    assert verify(folder).faults == ()
    assert sheet(folder, tmp_path / "sheet.html") == 2
    assert import_dataset(folder, tmp_path / "store") == 2
    again = PairStore(tmp_path / "store")[1]
    assert replace(again, key="") == replace(first, key="")
    assert verify(tmp_path / "store").sound
    assert import_dataset(folder, tmp_path / "store") == 0


def test_each_layout_of_the_table_is_itself():
    """None is hidden by an earlier one's columns."""
    for number, layout in enumerate(LAYOUTS):
        names = [
            layout.before.partition(".")[0]
            if "." in layout.before and layout.name.startswith("chat")
            else layout.before
        ]
        names += [one.partition(".")[0] if one.startswith(("conv", "json")) else one for one in layout.instructions]
        names += [layout.after.partition(".")[0] if layout.name.startswith("chat") else layout.after]
        assert [one.name for one in LAYOUTS[:number] if one.fits(names)] == []


def files(folder, **pictures):
    for name, data in pictures.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHAT = {"image": ["s/1.png", "t/1.png"], "conversations": [{"from": "human", "value": f"<image>\n{EDIT}"}]}
OUTPUT = {"output_image": "t/1.png"}
LISTS = {
    "seed": {"source_image": "s/1.png", "target_image": "t/1.png", "instruction": EDIT},
    "musubi": {"image_path": "t/1.png", "control_path": "s/1.png", "caption": EDIT},
    "numbered": {"image_path": "t/1.png", "control_path_0": "s/1.png", "caption": EDIT},
    "pico": {
        "open_image_input_url": "https://a.b/c.jpg",
        "text": EDIT,
        "output_image": "t/1.png",
        "local_input_image": "s/1.png",
    },
    "chat": CHAT,
    "list of one": {"source_image": ["s/1.png"], "target_image": ["t/1.png"], "instruction": [EDIT]},
    "imagefolder": {"original_image_file_name": "s/1.png", "edited_image_file_name": "t/1.png", "edit_prompt": EDIT},
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_lists_with_pictures_beside_them(tmp_path, name, ending):
    files(tmp_path, s__1_dot_png=RED, t__1_dot_png=BLUE)
    path = lines(tmp_path / f"metadata.{ending}", LISTS[name], LISTS[name])
    if ending == "json":
        path.write_text(json.dumps([LISTS[name]] * 2))
    pair = open_pairs(path)[1]
    assert (pair.original_image, pair.edit_prompt, pair.edited_image) == (RED, EDIT, BLUE)
    assert open_pairs(tmp_path)[0].edit_prompt == EDIT
    assert import_dataset(path, tmp_path / "store") == 2


@pytest.mark.parametrize("comma", [",", ";", "\t"])
def test_csv_with_any_comma(tmp_path, comma):
    files(tmp_path, a_dot_png=RED, b_dot_png=BLUE)
    rows = (["source", "target", "edit", "seed"], ["a.png", "b.png", '"one, two; three\nlines"', "12.0"], [], ["a.png"])
    text = "\r\n".join(comma.join(row) for row in rows) + comma.join(["", "b.png", EDIT, "\r\n"])
    (tmp_path / "l.csv").write_text("\ufeff" + text, newline="")
    pairs = open_pairs(tmp_path / "l.csv")
    assert [pair.edit_prompt for pair in pairs] == ["one, two; three\nlines", EDIT]
    assert [pairs[1].seed, pairs[0].seed] == [None, 12]


def test_a_field_too_many_is_told(tmp_path):
    """It may well be the rest of a text, cut at its comma."""
    files(tmp_path, a_dot_png=RED, b_dot_png=BLUE)
    (tmp_path / "l.csv").write_text("source,target,edit\na.png,b.png,make it blue, please\na.png,b.png,make it red,,\n")
    faults = []
    hooks = Hooks(on_error=lambda _, error: faults.append(str(error)))
    assert import_dataset(tmp_path / "l.csv", tmp_path / "store", hooks=hooks) == 1
    assert PairStore(tmp_path / "store")[0].edit_prompt == BACK
    said = "row 1: it has more fields than the first line; put a text that holds commas in quotes"
    assert faults == [f"{tmp_path / 'l.csv'}, {said}"]


def write_tar(path, *rows, form="x/{}.{}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for suffix, data in row.items():
                member = tarfile.TarInfo(form.format(number, suffix))
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def test_tars_alone_in_folders_and_by_pattern(tmp_path):
    row = {"source.jpg": encoded("red", "JPEG"), "json": json.dumps({"edit": EDIT}).encode(), "target.jpg": BLUE}
    for number in range(3):
        write_tar(tmp_path / "tars" / f"{number:03d}.tar", row, row)
    for source, count in (
        (tmp_path / "tars" / "000.tar", 2),
        (tmp_path / "tars", 6),
        (tmp_path / "tars" / "{000..001}.tar", 4),
    ):
        pairs = open_pairs(source)
        assert len(pairs) == count == len(list(pairs))
        assert (pairs[-1].original_image, pairs[-1].edit_prompt, pairs[-1].edited_image) == (
            row["source.jpg"],
            EDIT,
            BLUE,
        )
    with pytest.raises(DatasetError, match="003.tar does not exist; correct the pattern"):
        open_pairs(tmp_path / "tars" / "{000..003}.tar")
    broken = tmp_path / "tars" / "000.tar"
    broken.write_bytes(b"?" * 2000)
    with pytest.raises(DatasetError, match="000.tar is no whole tar"):
        open_pairs(broken)


@pytest.mark.parametrize("size", ["../../x", str(10**30), "-5"])
def test_a_tar_whose_extended_header_is_no_number(size, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.jpg")
        member.pax_headers = {"size": size}
        tar.addfile(member)
    with pytest.raises(DatasetError, match="a.tar"):
        open_pairs(path)


def test_a_row_of_a_tar_without_its_text_is_named(tmp_path):
    whole = {"source.jpg": RED, "json": json.dumps({"edit": EDIT}).encode(), "target.jpg": BLUE}
    path = write_tar(tmp_path / "a.tar", whole, {name: whole[name] for name in ("source.jpg", "target.jpg")})
    faults = []
    assert import_dataset(path, tmp_path / "store", hooks=Hooks(on_error=lambda _, e: faults.append(str(e)))) == 1
    assert faults == [f"{path}, row 2: its json.edit is None; give a text"]


@pytest.mark.parametrize("names", [("control", "target"), ("source", "images"), ("x", "y")])
def test_two_folders_of_equal_names(tmp_path, names):
    before, after = (tmp_path / name for name in names)
    for number in range(3):
        files(before, **{f"{number}_dot_png": RED})
        files(after, **{f"{number}_dot_jpg": encoded("blue", "JPEG"), f"{number}_dot_txt": f"{EDIT}\n".encode()})
    (before / "1.png").unlink()
    pairs = open_pairs(tmp_path)
    assert (len(pairs), pairs[2].edit_prompt, pairs[2].original_image) == (3, EDIT, RED)
    faults = []
    assert (
        import_dataset(
            tmp_path, tmp_path.parent / f"{names[0]}-store", hooks=Hooks(on_error=lambda _, e: faults.append(str(e)))
        )
        == 2
    )
    assert "row 2: its" in faults[0] and "a picture is missing" in faults[0]


PICTURE = {name: {"bytes": data, "path": None} for name, data in (("red", RED), ("blue", BLUE))}
LIKE_THEM = {
    "other letters": {"Source_Image": PICTURE["red"], "Instruction": EDIT, "Target_Image": PICTURE["blue"], "Extra": 1},
    "words of a name": {"src_img_path": PICTURE["red"], "edit_prompt_en": EDIT, "edited_img_path": PICTURE["blue"]},
    "others": {"orig_image": PICTURE["red"], "editing_instruction": EDIT, "result_image": PICTURE["blue"]},
    "nested": {
        "images": {"source": PICTURE["red"], "target": PICTURE["blue"]},
        "edit": {"instruction": EDIT, "language": "en"},
    },
    "lists of one": {"input_images": [PICTURE["red"]], "instruction": [EDIT], "output_images": [PICTURE["blue"]]},
    "messages": {
        "images": [PICTURE["red"], PICTURE["blue"]],
        "messages": [{"role": "user", "content": f"<image>{EDIT}"}, {"role": "assistant", "content": "<image>"}],
    },
    "words before and after": {"pre_image": PICTURE["red"], "user_request": EDIT, "post_image": PICTURE["blue"]},
    "two in a list": {"images": [PICTURE["red"], PICTURE["blue"]], "instruction": EDIT},
    "numbers": {"image1": PICTURE["red"], "text": EDIT, "image2": PICTURE["blue"]},
    "numbers and a mask": {"img_1": PICTURE["blue"], "img_0": PICTURE["red"], "prompt": EDIT, "mask": PICTURE["red"]},
    "humps": {"sourceImage": PICTURE["red"], "editInstruction": EDIT, "targetImage": PICTURE["blue"]},
    "a pair as an object": {"image_pair": {"before": PICTURE["red"], "after": PICTURE["blue"]}, "caption": EDIT},
    "two languages": {"src": PICTURE["red"], "instruction_zh": "x", "instruction_en": EDIT, "tgt": PICTURE["blue"]},
    "an English one beside": {"in": PICTURE["red"], "instruction": "x", "instruction_en": EDIT, "out": PICTURE["blue"]},
    "DiffSynth-Studio's": {"image": PICTURE["blue"], "prompt": EDIT, "edit_image": PICTURE["red"]},
    "Kontext's": {"image": PICTURE["blue"], "prompt": EDIT, "kontext_images": [PICTURE["red"]]},
    "written as texts": {
        "before": "data:image/png;base64," + base64.b64encode(RED).decode(),
        "edit": EDIT,
        "after": base64.encodebytes(BLUE).decode(),
    },
}


@pytest.mark.parametrize("name", LIKE_THEM)
def test_columns_that_are_like_published_ones(tmp_path, name):
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist([LIKE_THEM[name]] * 2), tmp_path / "data" / "train-00000-of-00001.parquet")
    pair = open_pairs(tmp_path)[1]
    assert (pair.original_image, pair.edit_prompt, pair.edited_image) == (RED, EDIT, BLUE)


def test_large_and_dictionary_columns_of_parquet(tmp_path):
    pictures = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    table = {
        "input_image": pa.array([PICTURE["red"]], pictures),
        "instruction": pa.array([EDIT], pa.large_string()).dictionary_encode(),
        "output_image": pa.array([BLUE], pa.large_binary()),
        "task": pa.array(["colour"]).dictionary_encode(),
    }
    pq.write_table(pa.table(table), tmp_path / "0.parquet", compression="zstd")
    (pair,) = open_pairs(tmp_path)
    assert (pair.original_image, pair.edit_prompt, pair.edited_image) == (RED, EDIT, BLUE)
    assert pair.kind == "colour"


def test_a_picture_written_as_text_that_is_none(tmp_path):
    good = LIKE_THEM["written as texts"]
    path = lines(tmp_path / "l.jsonl", good, {**good, "after": "data:image/png;base64,????"})
    faults = []
    hooks = Hooks(on_error=lambda _, error: faults.append(str(error)))
    assert import_dataset(path, tmp_path / "store", hooks=hooks) == 1
    assert "row 2: its after: a picture written as text is no base64" in faults[0]


def test_lists_in_several_folders_are_one_set(tmp_path):
    for n, said in enumerate((EDIT, BACK)):
        files(tmp_path / "train" / f"part{n}", a_dot_png=(RED, BLUE)[n], b_dot_png=(BLUE, RED)[n])
        row = {"input_file_name": "a.png", "edited_file_name": "b.png", "edit_prompt": said}
        lines(tmp_path / "train" / f"part{n}" / "metadata.jsonl", row)
    pairs = open_pairs(tmp_path)
    assert [(one.original_image, one.edit_prompt, one.edited_image) for one in pairs] == [
        (RED, EDIT, BLUE),
        (BLUE, BACK, RED),
    ]
    assert pairs[1].edit_prompt == BACK
    lines(tmp_path / "train" / "part1" / "metadata.jsonl", {**row, "input_file_name": "../../../a.png"})
    with pytest.raises(DatasetError, match="lies outside"):
        open_pairs(tmp_path)[1]


PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": EDIT}]}, {"role": "assistant"}]
LISTS_LIKE_THEM = {
    "paths in words": {"input": "s/1.png", "output": "t/1.png", "instruction": EDIT, "id": 3},
    "the hub's one picture": {"file_name": "s/1.png", "edited_file_name": "t/1.png", "prompt": EDIT},
    "the hub's one picture after": {"file_name": "t/1.png", "conditioning_image": "s/1.png", "text": EDIT},
    "messages in parts": {"messages": PARTS, "images": ["s/1.png", "t/1.png"]},
}


@pytest.mark.parametrize("name", LISTS_LIKE_THEM)
def test_lists_that_are_like_published_ones(tmp_path, name):
    files(tmp_path, s__1_dot_png=RED, t__1_dot_png=BLUE)
    pair = open_pairs(lines(tmp_path / "metadata.jsonl", LISTS_LIKE_THEM[name]))[0]
    assert (pair.original_image, pair.edit_prompt, pair.edited_image) == (RED, EDIT, BLUE)


def test_pictures_written_as_text_in_other_formats(tmp_path):
    red, blue = (base64.b64encode(encoded(*one)).decode() for one in (("red", "BMP"), ("blue", "GIF")))
    (pair,) = open_pairs(lines(tmp_path / "l.jsonl", {"source": red, "edit": EDIT, "target": blue}))
    assert open_image(pair.original_image).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(pair.edited_image).getpixel((0, 0)) == (0, 0, 255)


def test_several_references_are_no_pair(tmp_path):
    """A list of two pictures beside the result is another task, and neither is the result."""
    row = {"source_images": [PICTURE["red"]] * 2, "instruction": EDIT, "target_image": PICTURE["blue"]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "0.parquet")
    with pytest.raises(DatasetError, match="none is known for the picture before"):
        open_pairs(tmp_path)


ROW = {"source": "s/1.png", "instruction": EDIT, "target": "t/1.png"}
WRAPPED = {
    "a list beside other things": {"info": {"version": 1}, "data": [ROW, ROW]},
    "objects by name": {"x": ROW, "y": ROW},
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("indent", [None, 1])
def test_lists_within_an_object(tmp_path, name, indent):
    files(tmp_path, s__1_dot_png=RED, t__1_dot_png=BLUE)
    (tmp_path / "annotations.json").write_text(json.dumps(WRAPPED[name], indent=indent))
    pairs = open_pairs(tmp_path)
    assert [(one.original_image, one.edit_prompt, one.edited_image) for one in pairs] == [(RED, EDIT, BLUE)] * 2
    assert pairs[0].session is None
    assert name != "objects by name" or pairs[1].key == "y"


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_gzipped_lists(tmp_path, ending):
    files(tmp_path, s__1_dot_png=RED, t__1_dot_png=BLUE)
    text = json.dumps(ROW) if ending == "jsonl" else "source,instruction,target\ns/1.png,make it blue,t/1.png"
    (tmp_path / f"pairs.{ending}.gz").write_bytes(gzip.compress(f"{text}\n".encode()))
    for source in (tmp_path, tmp_path / f"pairs.{ending}.gz"):
        (pair,) = open_pairs(source)
        assert (pair.original_image, pair.edit_prompt, pair.edited_image) == (RED, EDIT, BLUE)


def test_lists_of_splits_and_of_parts(tmp_path):
    files(tmp_path, s__1_dot_png=RED, t__1_dot_png=BLUE)
    lines(tmp_path / "train.jsonl", ROW, ROW)
    lines(tmp_path / "test.jsonl", {**ROW, "instruction": BACK})
    (tmp_path / "config.json").write_text("{}")
    assert [one.edit_prompt for one in open_pairs(tmp_path)] == [EDIT, EDIT]
    assert [one.edit_prompt for one in open_pairs(tmp_path, Reading(split="test"))] == [BACK]
    (tmp_path / "test.jsonl").rename(tmp_path / "part-2.jsonl")
    assert [one.edit_prompt for one in open_pairs(tmp_path)] == [BACK, EDIT, EDIT]


@pytest.mark.parametrize("place", ["annotations/train.jsonl", "train.jsonl"])
def test_pictures_that_lie_in_a_folder_beside(tmp_path, place):
    """Names are relative to the folder above the list, or to one that lies beside it."""
    files(tmp_path / "images", s__1_dot_png=RED, t__1_dot_png=BLUE)
    above = "images/" if "/" in place else ""
    row = {"source": f"{above}s/1.png", "instruction": EDIT, "target": f"{above}t/1.png"}
    path = lines(tmp_path / place, row)
    (pair,) = open_pairs(tmp_path)
    assert (pair.original_image, pair.edit_prompt, pair.edited_image) == (RED, EDIT, BLUE)
    lines(path, {**row, "source": "nowhere.png"}, row)
    with pytest.raises(DatasetError, match="'nowhere.png' is not in .*; restore it, or name the folder that pic"):
        open_pairs(tmp_path)[0]


def test_a_file_of_the_library_alone(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"before": [RED], "edit": [EDIT], "after": [BLUE]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    (pair,) = open_pairs(arrow)
    assert (pair.original_image, pair.edit_prompt, pair.edited_image) == (RED, EDIT, BLUE)


def test_sessions_of_parquet(tmp_path):
    chain = {"id": "x", "images": [PICTURE["red"], PICTURE["blue"], PICTURE["red"]], "instructions": [EDIT, BACK]}
    pq.write_table(pa.Table.from_pylist([chain, {**chain, "id": "y"}]), tmp_path / "0.parquet")
    pairs = list(open_pairs(tmp_path))
    assert [(one.edit_prompt, one.session) for one in pairs] == [(EDIT, "x"), (BACK, "x"), (EDIT, "y"), (BACK, "y")]
    assert (pairs[1].original_image, pairs[1].edited_image) == (BLUE, RED)


def test_an_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(DatasetError, match="a.zip is an archive; unpack it, and give the folder"):
        open_pairs(tmp_path / "a.zip")


FOLDERS = {
    "lines": {"a/2.png": RED, "a/10.png": BLUE, "b/2.png": BLUE, "b/10.png": RED, "prompts.txt": f"{EDIT}\n{BACK}\n"},
    "by name": {"Before/1.png": RED, "After/1.png": BLUE, "prompts.json": json.dumps({"1.png": EDIT})},
    "beside the first": {"input/1.png": RED, "output/1.png": BLUE, "input/1.txt": EDIT},
    "in a third": {"before/1.png": RED, "after/1.png": BLUE, "text/1.txt": EDIT},
    "by their endings": {"1_before.png": RED, "1_after.png": BLUE, "1.txt": EDIT, "2_before.png": RED},
    "start and end": {"1_start.png": RED, "1_end.png": BLUE, "1.txt": EDIT},
    "a folder a pair": {"1/input.png": RED, "1/output.png": BLUE, "1/prompt.txt": EDIT},
    "a folder a pair, JSON": {"1/source.png": RED, "1/target.png": BLUE, "1/meta.json": json.dumps({"edit": EDIT})},
    "splits above": {"train/input/1.png": RED, "train/target/1.png": BLUE, "train/target/1.txt": EDIT}
    | {"test/input/2.png": BLUE, "test/target/2.png": RED, "test/target/2.txt": BACK},
    "splits below": {"A/train/1.png": RED, "B/train/1.png": BLUE, "B/train/1.txt": EDIT}
    | {"A/test/0.png": BLUE, "B/test/0.png": RED, "B/test/0.txt": BACK},
}


def write_files(folder, content):
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_whose_names_say_what_is_what(tmp_path, name):
    write_files(tmp_path, FOLDERS[name])
    pairs = open_pairs(tmp_path)
    found = sorted((one.edit_prompt, one.original_image, one.edited_image) for one in pairs)
    both = [(EDIT, RED, BLUE), (BACK, BLUE, RED)]
    assert found == sorted(both if name == "lines" else both[:1])
    if name.startswith("splits"):
        (other,) = open_pairs(tmp_path, Reading(split="test"))
        assert (other.original_image, other.edit_prompt, other.edited_image) == (BLUE, BACK, RED)


def test_texts_that_lead_out_of_their_folder(tmp_path):
    home = tmp_path / "set"
    write_files(tmp_path, {"secret.txt": "secret", "set/before/1.png": RED, "set/after/1.png": BLUE})
    (home / "after" / "1.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DatasetError, match="1.txt leads out of"):
        open_pairs(home)[0]


def test_a_broken_first_line_of_json_lines(tmp_path):
    files(tmp_path, s__1_dot_png=RED, t__1_dot_png=BLUE)
    (tmp_path / "l.json").write_text("{broken\n" + json.dumps(ROW) + "\n")
    faults = []
    hooks = Hooks(on_error=lambda _, error: faults.append(str(error)))
    assert import_dataset(tmp_path / "l.json", tmp_path / "store", hooks=hooks) == 1
    assert "row 1: it is not JSON" in faults[0]


def test_lines_for_other_pictures_than_are_there(tmp_path):
    write_files(tmp_path, {**FOLDERS["lines"], "prompts.txt": EDIT})
    with pytest.raises(DatasetError, match="prompts.txt has 1 texts, and there are 2 pictures; give one for each"):
        open_pairs(tmp_path)


SPLITLESS = {
    "a list": {"pairs.jsonl": json.dumps(ROW)},
    "JSON": {"pairs.json": json.dumps([ROW])},
    "folders": {"before/1.png": RED, "after/1.png": BLUE, "after/1.txt": EDIT},
    "groups": {"1_before.png": RED, "1_after.png": BLUE, "1.txt": EDIT},
    "the original's": {"0000000/prompt.json": json.dumps({"input": "a", "edit": "b", "output": "c"})},
}


@pytest.mark.parametrize("name", SPLITLESS)
def test_a_split_that_is_not_there_is_refused(tmp_path, name):
    """Or a test would be one of what was trained on."""
    write_files(tmp_path, SPLITLESS[name])
    files = [tmp_path / one for one in SPLITLESS[name]] if name in ("a list", "JSON") else []
    for source in (tmp_path, *files):
        with pytest.raises(DatasetError, match="has one split, train, not test; choose one with `split`"):
            open_pairs(source, Reading(split="test"))
        assert len(open_pairs(source, Reading(split="train"))) == (0 if name == "the original's" else 1)


def test_splits_within_an_object(tmp_path):
    files(tmp_path, s__1_dot_png=RED, t__1_dot_png=BLUE)
    (tmp_path / "all.json").write_text(json.dumps({"train": [ROW, ROW], "test": [{**ROW, "instruction": BACK}]}))
    for source in (tmp_path, tmp_path / "all.json"):
        assert [one.edit_prompt for one in open_pairs(source)] == [EDIT, EDIT]
        assert [one.edit_prompt for one in open_pairs(source, Reading(split="test"))] == [BACK]


def test_addresses_of_files_are_paths(tmp_path):
    files(tmp_path, s__1_dot_png=RED, t__1_dot_png=BLUE)
    row = {name: f"file://{tmp_path}/{value}" if value.endswith("png") else value for name, value in ROW.items()}
    (pair,) = open_pairs(lines(tmp_path / "l.jsonl", row))
    assert (pair.original_image, pair.edited_image) == (RED, BLUE)
    with pytest.raises(DatasetError, match="lies outside"):
        open_pairs(lines(tmp_path / "m.jsonl", {**row, "source": "file:///etc/1.png"}))[0]


def test_edits_of_one_picture_each_start_from_it(tmp_path):
    files(tmp_path, s__1_dot_png=RED, t__1_dot_png=BLUE, u__1_dot_png=MASK)
    edits = [{"prompt": EDIT, "image": "t/1.png"}, {"prompt": "whiten it", "image": "u/1.png"}]
    pairs = list(open_pairs(lines(tmp_path / "l.jsonl", {"image": "s/1.png", "edits": edits})))
    assert [(one.original_image, one.edited_image) for one in pairs] == [(RED, BLUE), (RED, MASK)]


SESSIONS = {
    "texts and pictures": {
        "files": [{"id": n, "url": f"{name}/1.png"} for n, name in enumerate("sts")],
        "metadata_edit_turn_prompts": [EDIT, BACK],
        "id": "x",
    },
    "objects": {
        "source_image": "s/1.png",
        "conversation": [
            {"instruction": EDIT, "target_image": "t/1.png"},
            {"instruction": BACK, "target_image": "s/1.png"},
        ],
        "id": "x",
    },
    "objects from one picture": {
        "image": "s/1.png",
        "turns": [{"instruction": EDIT, "output": "t/1.png"}, {"instruction": BACK, "output": "s/1.png"}],
        "id": "x",
    },
}


@pytest.mark.parametrize("name", SESSIONS)
def test_sessions_in_a_row_are_a_pair_a_turn(tmp_path, name):
    files(tmp_path, s__1_dot_png=RED, t__1_dot_png=BLUE)
    path = lines(tmp_path / "l.jsonl", SESSIONS[name], {"id": "none"}, SESSIONS[name])
    faults = []
    hooks = Hooks(on_error=lambda _, error: faults.append(str(error)))
    assert import_dataset(path, tmp_path / "store", hooks=hooks) == 4
    pairs = list(PairStore(tmp_path / "store"))
    assert [pair.edit_prompt for pair in pairs] == [EDIT, BACK] * 2
    assert (pairs[1].original_image, pairs[1].edited_image, pairs[1].session) == (BLUE, RED, "x")
    assert "row 3: it is no session of edits" in faults[0]


INSTRUCTED = json.dumps({"instruction": EDIT}).encode()
TARS = {
    "their names": {"input_image.png": RED, "output_image.png": BLUE, "json": INSTRUCTED},
    "short names": {"src.png": RED, "tgt.png": BLUE, "txt": EDIT.encode()},
    "one without a name": {"png": RED, "edited.png": BLUE, "prompt.txt": EDIT.encode()},
    "another without a name": {"png": BLUE, "control.png": RED, "txt": EDIT.encode()},
    "numbers": {"0.png": RED, "1.png": BLUE, "json": INSTRUCTED},
    "capitals": {"INPUT.PNG": RED, "OUTPUT.Webp": BLUE, "TXT": EDIT.encode()},
}


@pytest.mark.parametrize("names", [("_input.png", ".txt", "_output.png"), ("/input.png", "/prompt.txt", "/output.png")])
def test_tars_of_files_that_webdataset_would_not_group(tmp_path, names):
    row = dict(zip(names, (RED, EDIT.encode(), BLUE), strict=True))
    pairs = list(open_pairs(write_tar(tmp_path / "a.tar", row, row, form="{}{}")))
    assert [(one.original_image, one.edit_prompt, one.edited_image) for one in pairs] == [(RED, EDIT, BLUE)] * 2


@pytest.mark.parametrize("name", TARS)
def test_tars_with_other_suffixes(tmp_path, name):
    write_tar(tmp_path / ("0.TAR" if name == "capitals" else "0.tar"), TARS[name], TARS[name])
    pair = open_pairs(tmp_path)[1]
    assert (pair.original_image, pair.edit_prompt, pair.edited_image) == (RED, EDIT, BLUE)


def test_gzipped_tars_alone_and_in_folders(tmp_path):
    row = {"source.jpg": RED, "json": json.dumps({"edit": EDIT}).encode(), "target.jpg": BLUE}
    whole = write_tar(tmp_path / "a.tar", row, row).read_bytes()
    (tmp_path / "a.tar").unlink()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train-00000-of-00001.tar.gz").write_bytes(gzip.compress(whole))
    for source in (tmp_path / "set", tmp_path / "set" / "train-00000-of-00001.tar.gz"):
        pairs = open_pairs(source)
        assert (len(pairs), pairs[1].edited_image, pairs[0].edit_prompt) == (2, BLUE, EDIT)
    torn = tmp_path / "torn.tgz"
    torn.write_bytes(gzip.compress(os.urandom(9000))[:5000])
    with pytest.raises(DatasetError, match="torn.tgz is no whole gzipped file"):
        open_pairs(torn)


def test_what_cannot_be_read_is_told_in_a_sentence(tmp_path):
    row = {"source_image": "s/1.png", "target_image": "t/1.png", "instruction": EDIT}
    (tmp_path / "l.jsonl").write_text(json.dumps(row), encoding="utf-16")
    with pytest.raises(DatasetError, match="l.jsonl is UTF-16 text; save it as UTF-8"):
        open_pairs(tmp_path / "l.jsonl")
    three = lines(tmp_path / "m.jsonl", {**CHAT, "image": ["s/1.png", "s/1.png", "t/1.png"]})
    with pytest.raises(DatasetError, match="row 1: it has 3 pictures, so it is of another task; give two"):
        open_pairs(three)[0]
    none = lines(tmp_path / "n.jsonl", {"a": "a.png", "b": "b.png", "t": "c.png"})
    with pytest.raises(DatasetError, match="has the columns a, b, t, of which none is known for the picture before"):
        open_pairs(none)
    twice = lines(tmp_path / "o.jsonl", {"source_1_image": "a.png", "source_2_image": "b.png", "target": "c.png"})
    with pytest.raises(DatasetError, match="source_1_image and source_2_image, each of which could be the picture bef"):
        open_pairs(twice)


def test_two_folders_can_be_named(tmp_path):
    files(tmp_path, one__a_dot_png=RED, two__a_dot_png=BLUE, two__a_dot_caption=EDIT.encode(), three__a_dot_png=RED)
    pair = open_pairs(tmp_path, Reading(columns=("one", "caption", "two")))[0]
    assert (pair.original_image, pair.edit_prompt, pair.edited_image) == (RED, EDIT, BLUE)


def test_splits_side_by_side(tmp_path):
    parquet(tmp_path, MAGIC, MAGIC)
    parquet(tmp_path, {**MAGIC, "instruction": "dev"}, name="dev-00000-of-00001.parquet")
    assert len(open_pairs(tmp_path)) == 2
    assert [pair.edit_prompt for pair in open_pairs(tmp_path, Reading(split="dev"))] == ["dev"]
    with pytest.raises(DatasetError, match="has the splits dev, train, not test; choose one with `split`"):
        open_pairs(tmp_path, Reading(split="test"))
    free = parquet(tmp_path / "ultra", ULTRA, name="FreeForm_0-00000-of-00001.parquet")
    assert len(open_pairs(free, Reading(split="train"))) == 1
    parquet(free, ULTRA, name="FreeForm_1-00000-of-00001.parquet")
    with pytest.raises(DatasetError, match="has the splits FreeForm_0, FreeForm_1, not train"):
        open_pairs(free)


def test_parts_are_chosen(tmp_path):
    rows = [{**OMNI, "o_score": float(n), "task": "swap" if n % 2 else "style"} for n in range(10)]
    folder = parquet(tmp_path / "set", *rows)
    reading = Reading(where="o_score >= 3 and task != 'style'", limit=3)
    pairs = open_pairs(folder, reading)
    assert [pair.scores["o_score"] for pair in pairs] == [3, 5, 7] == [pairs[n].scores["o_score"] for n in range(3)]
    assert pairs.columns("kind") == {"kind": ["swap"] * 3}
    assert import_dataset(folder, tmp_path / "store", reading) == 3
    chosen = open_pairs(tmp_path / "store", Reading(where="o_score > 3 and kind in ('swap', 'x')"))
    assert [pair.scores["o_score"] for pair in chosen] == [5, 7]
    assert chosen.identity != open_pairs(tmp_path / "store", Reading(limit=2)).identity
    with pytest.raises(ConfigError, match="`where` asks for 'size', and .* has task, src_img"):
        open_pairs(folder, Reading(where="size > 3"))
    with pytest.raises(ConfigError, match="`limit` is 0"):
        Reading(limit=0)


def test_edits_that_lead_back_are_pairs_of_their_own(tmp_path):
    folder = parquet(tmp_path / "set", HQ, {**HQ, "inverse_edit": None}, HQ)
    pairs = open_pairs(folder, Reading(inverses=True))
    assert [pair.edit_prompt for pair in pairs] == [EDIT, BACK, EDIT, EDIT, BACK]
    back = pairs[1]
    assert (back.original_image, back.edited_image, back.original_prompt) == (BLUE, RED, "a blue")
    assert back.key == "row/0/inverse"
    assert import_dataset(folder, tmp_path / "store", Reading(inverses=True)) == 5
    with pytest.raises(ConfigError, match="no instructions that lead back"):
        open_pairs(parquet(tmp_path / "magic", MAGIC), Reading(inverses=True))


def test_rows_of_another_task_and_broken_ones_are_passed_over(tmp_path):
    files(tmp_path, s__1_dot_png=RED, t__1_dot_png=BLUE, note_dot_txt=b"no picture")
    good = {"source_image": "s/1.png", "target_image": "t/1.png", "instruction": EDIT}
    bad = [{"source_image": "note.txt"}, {"instruction": " "}, {"target_image": "none.png"}, {"instruction": 7}]
    bad += [{"source_image": ["s/1.png", "s/1.png"]}, {"instruction": "half \ud800"}, {"source_image": "t"}]
    path = lines(tmp_path / "l.jsonl", good, *({**good, **one} for one in bad), good)
    with path.open("a") as stream:
        stream.write("{torn\n[1]\n")
    faults = []
    assert import_dataset(path, tmp_path / "store", hooks=Hooks(on_error=lambda _, e: faults.append(str(e)))) == 2
    assert len(faults) == len(bad) + 2
    assert all(fault.startswith(f"{path}, row ") for fault in faults)
    assert [pair.key for pair in PairStore(tmp_path / "store")] == ["l/0", "l/8"]
    visual = parquet(tmp_path / "any", {**ANY, "visual_input": RED}, {**ANY, "visual_input": None})
    assert import_dataset(visual, tmp_path / "other", hooks=Hooks(on_error=lambda _, e: faults.append(str(e)))) == 1
    assert "row 1: it has a visual_input, so it is of another task" in faults[-1]


def test_a_file_in_which_nothing_can_be_used_is_an_error(tmp_path):
    path = lines(tmp_path / "l.jsonl", {"source_image": "a.png", "target_image": "b.png", "instruction": EDIT})
    with pytest.raises(DatasetError, match="no row of .*l.jsonl can be used; the last: .*'a.png' is not in"):
        import_dataset(path, tmp_path / "store")


@pytest.mark.parametrize("where", ["../secret.png", "{home}/secret.png", "link.png"])
def test_paths_reach_only_below_their_folder(tmp_path, where):
    files(tmp_path, secret_dot_png=RED, set__a_dot_png=BLUE)
    os.symlink(tmp_path / "secret.png", tmp_path / "set" / "link.png")
    row = {"source": where.format(home=tmp_path), "target": "a.png", "edit": EDIT}
    path = lines(tmp_path / "set" / "l.jsonl", row)
    with pytest.raises(DatasetError, match="lies outside .*; allow its folder with `pictures_from`"):
        open_pairs(path)[0]
    with pytest.raises(DatasetError, match="lies outside"):
        open_pairs(path).example(0)
    inside = {"source": str(tmp_path / "secret.png"), "target": "set/a.png", "edit": EDIT}
    allowed = open_pairs(lines(path, inside), Reading(pictures_from=tmp_path))
    assert allowed[0].original_image == RED


def test_addresses_are_fetched_when_asked(tmp_path):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(RED)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files(tmp_path, t_dot_png=BLUE)
    row = {
        "open_image_input_url": f"http://127.0.0.1:{server.server_port}/a.png",
        "text": EDIT,
        "output_image": "t.png",
    }
    path = lines(tmp_path / "l.jsonl", row)
    with pytest.raises(DatasetError, match="is an address; fetch pictures with `download`"):
        open_pairs(path)[0]
    assert open_pairs(path, Reading(download=True))[0].original_image == RED
    server.shutdown()
    local = lines(tmp_path / "m.jsonl", {**row, "open_image_input_url": "file:///etc/hostname"})
    with pytest.raises(DatasetError, match="'/etc/hostname' lies outside"):
        open_pairs(local, Reading(download=True))[0]


def test_the_licence_is_carried(tmp_path):
    folder = parquet(tmp_path / "set", MAGIC)
    assert open_pairs(folder)[0].licence is None
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\ntags: []\n---\n# MagicBrush\nlicense: other\n")
    assert open_pairs(folder)[0].licence == "cc-by-4.0"
    assert open_pairs(folder, Reading(licence="mine"))[0].licence == "mine"
    assert open_pairs(parquet(tmp_path / "own", {**MAGIC, "license": "MIT"}))[0].licence == "MIT"


def test_columns_that_nothing_is_known_of_are_named(tmp_path):
    folder = parquet(tmp_path, {"x": RED, "y": EDIT, "z": BLUE})
    with pytest.raises(DatasetError, match="has the columns x, y, z, of which none is known for the picture before"):
        open_pairs(folder)
    assert open_pairs(folder, Reading(columns=("x", "y", "z")))[0].edited_image == BLUE
    with pytest.raises(DatasetError, match="has the columns x, y, z and no 'w'; name three"):
        open_pairs(folder, Reading(columns=("x", "y", "w")))


def test_the_libraries_own_folders_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    parquet(tmp_path / "set", MAGIC, MAGIC)
    saved = datasets.Dataset.from_parquet(str(tmp_path / "set" / "data" / "*.parquet"), cache_dir=str(tmp_path / "c"))
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"dev": saved}).save_to_disk(str(tmp_path / "two"))
    for name in ("one", "two"):
        pairs = open_pairs(tmp_path / name)
        assert isinstance(pairs, ForeignPairs)
        assert (len(pairs), pairs[1].mask) == (2, MASK)
        with pytest.raises(DatasetError, match="not test; choose one with `split`"):
            open_pairs(tmp_path / name, Reading(split="test"))


def test_info_of_a_foreign_set(tmp_path):
    found = info(parquet(tmp_path, ULTRA, ULTRA))
    assert (found.pairs, found.shards, found.captions) == (2, 1, 1)
    assert found.picture_sizes == {"32x32 PNG": 2}
    assert found.scores["sim_0"]["median"] == 0.3


@pytest.mark.parametrize(
    ("text", "row", "met"),
    [
        ("a >= 8", {"a": 8}, True),
        ("a > 8", {"a": 8}, False),
        ("a < 8 or b = 'x'", {"a": 9, "b": "x"}, True),
        ("not (a < 8 or b = 'x')", {"a": 9, "b": "x"}, False),
        ("a != 1", {"a": None}, False),
        ("a == null", {"a": None}, True),
        ("a != null", {"a": 0}, True),
        ("a < 'z'", {"a": 1}, False),
        ("a in (1, 'x')", {"a": "x"}, True),
        ("a not in (1, 'x')", {"a": 2}, True),
        ('json.a-b = "it\'s"', {"json.a-b": "it's"}, True),
        ("a = -1.5e1", {"a": -15}, True),
        ("a == true", {"a": True}, True),
        ("a > 1 and b > 1 or c > 1", {"a": 0, "b": 2, "c": 2}, True),
    ],
)
def test_conditions(text, row, met):
    assert Where(text)(row) is met


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a ==",
        "a == b",
        "a == 1 b == 2",
        "(a == 1",
        "__import__('os')",
        "(" * 100,
        "a === 1",
        "a not 5",
        "and = 1",
    ]
    + ["a == 1 or", "a in 5", "a in ()", "a == 'open", "x" * 3000, "a == 1; b", "a.b() == 1", "1 == a"],
)
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(ConfigError, match="`where`"):
        Where(text)


def test_a_stores_rows_of_0_1_are_read(tmp_path):
    """The hub's first set and a store are the same columns; a store may be a part."""
    folder = parquet(tmp_path, FIELD["timbrooks"])
    assert isinstance(open_pairs(folder), PairStore)
    with PairWriter(tmp_path / "own", manifest={}) as writer:
        writer.write(replace(open_pairs(folder)[0], key="a"))
    assert open_pairs(tmp_path / "own", Reading(limit=5))[0].key == "a"
