"""Data sets as wholes: foreign layouts come in and go out unchanged, faults are found, the sheet works in a browser."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from hashlib import blake2b

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ip2p_engine.cli import main
from ip2p_engine.clip.filter import FilterConfig, PairScores
from ip2p_engine.data import export
from ip2p_engine.data.doctor import doctor
from ip2p_engine.data.export import EXPORTS
from ip2p_engine.data.reading import Reading, open_pairs
from ip2p_engine.data.sheet import sheet
from ip2p_engine.data.split import picture_hash
from ip2p_engine.data.split import test_rows as split_rows
from ip2p_engine.data.store import PairRecord, PairStore, PairWriter
from ip2p_engine.data.tools import export_dataset, import_dataset, info, merge_datasets, verify
from ip2p_engine.errors import ConfigError, DatasetError
from ip2p_engine.factory.refilter import refilter, rescored
from ip2p_engine.files import whole_file
from ip2p_engine.hooks import Hooks
from ip2p_engine.images import open_image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCORES = {"p2p_threshold": 0.5, "cfg_scale": 9.0, "clip_sim_0": 0.25, "clip_sim_1": 0.26}
SCORES |= {"clip_sim_dir": 0.3, "clip_sim_image": 0.8}


def encoded(colour, kind="JPEG", size=(16, 16)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def pair(n, **changes):
    fields = {
        "original_image": encoded((10 * n, 0, 0), "PNG"),
        "edited_image": encoded((0, 10 * n, 0), "PNG"),
        "edit_prompt": f"make it <b>snow</b> & {n}",
        "original_prompt": f"a street {n // 2}",
        "edited_prompt": f"a street {n // 2} in the snow",
        "seed": n,
        "p": 0.5,
        "cfg": 7.5,
        "sim_0": 0.25,
        "sim_image": 0.5 + n / 100,
        "sim_direction": 0.9 - n / 100 if n else None,
        "key": f"{n:07d}/{n}",
    }
    return PairRecord(**{**fields, **changes})


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store", [pair(n) for n in range(8)])


def make_store(folder, pairs):
    with PairWriter(folder, manifest={"config": {}}) as writer:
        writer.write(*pairs)
    return folder


@pytest.fixture(params=["input", "caption"])
def original(request, tmp_path):
    """Two caption folders as the authors' code writes them; the second has no metadata."""
    folder = tmp_path / "original"
    for number, seeds in ((0, ("12", "7")), (4, ("99",))):
        place = folder / f"{number:07d}"
        place.mkdir(parents=True)
        prompt = {request.param: f"a cat {number}", "edit": "make it a dog", "output": f"a dog {number}"}
        (place / "prompt.json").write_text(json.dumps(prompt))
        for seed in seeds:
            (place / f"{seed}_0.jpg").write_bytes(encoded((int(seed), 0, 0)))
            (place / f"{seed}_1.jpg").write_bytes(encoded((0, int(seed), 0)))
    lines = [json.dumps({"seed": seed, **SCORES}) for seed in (7, 12)]
    (folder / "0000000" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "seeds.json").write_text(json.dumps([["0000000", ["12", "7"]], ["0000004", ["99"]]]))
    return folder


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_original_layout_comes_in_byte_for_byte(original, tmp_path):
    assert import_dataset(original, tmp_path / "store") == 3
    pairs = list(PairStore(tmp_path / "store"))
    assert [p.key for p in pairs] == ["0000000/12", "0000000/7", "0000004/99"]
    assert pairs[0].original_image == (original / "0000000" / "12_0.jpg").read_bytes()
    assert (pairs[0].original_prompt, pairs[0].edit_prompt) == ("a cat 0", "make it a dog")
    assert (pairs[0].p, pairs[0].cfg, pairs[0].sim_direction) == (0.5, 9.0, 0.3)
    assert (pairs[2].p, pairs[2].sim_0, pairs[2].seed) == (None, None, 99)
    assert import_dataset(original, tmp_path / "store") == 0
    assert verify(tmp_path / "store").sound


def test_it_goes_out_again_as_it_came(original, tmp_path):
    import_dataset(original, tmp_path / "store")
    assert export_dataset(tmp_path / "store", tmp_path / "again") == 3
    before, after = files_of(original), files_of(tmp_path / "again")
    assert {name for name in after if name.endswith(".jpg")} == {name for name in before if name.endswith(".jpg")}
    assert all(after[name] == before[name] for name in before if name.endswith(".jpg"))
    assert json.loads(after["seeds.json"]) == json.loads(before["seeds.json"])
    prompt = json.loads(after["0000004/prompt.json"])
    assert prompt["caption"] == prompt["input"] == "a cat 4"
    rows = [json.loads(line) for line in after["0000000/metadata.jsonl"].splitlines()]
    assert {"seed": 12, **SCORES} in rows
    import_dataset(tmp_path / "again", tmp_path / "third")
    assert list(PairStore(tmp_path / "third")) == list(PairStore(tmp_path / "store"))


def test_folders_without_a_list_of_seeds_are_read_by_their_files(original, tmp_path):
    (original / "seeds.json").unlink()
    assert import_dataset(original, tmp_path / "store") == 3


def test_broken_originals_are_named(original, tmp_path):
    (original / "0000004" / "99_1.jpg").unlink()
    faults = []
    assert import_dataset(original, tmp_path / "a", hooks=Hooks(on_error=lambda _, e: faults.append(str(e)))) == 2
    assert "original, row 3: " in faults[0] and "'0000004/99_1.jpg' is not in" in faults[0]
    (original / "0000000" / "prompt.json").write_text('{"text": "a cat"}')
    with pytest.raises(DatasetError, match="no row of .* can be used; the last"):
        import_dataset(original, tmp_path / "b", hooks=Hooks(on_error=lambda _, e: faults.append(str(e))))
    assert any(
        "has no original_prompt or caption or input" in fault and "only text; add it" in fault for fault in faults
    )
    for text, said in (("{", "prompt.json is not JSON"), ("[1]", "prompt.json is not a JSON object; give one with")):
        (original / "0000000" / "prompt.json").write_text(text)
        faults.clear()
        with pytest.raises(DatasetError, match="no row of"):
            import_dataset(original, tmp_path / "c", hooks=Hooks(on_error=lambda _, e: faults.append(str(e))))
        assert said in faults[0]


def test_scores_and_seeds_that_are_none_are_named(original, tmp_path):
    row = {"seed": "12", "clip_sim_0": "high"}
    (original / "0000000" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    faults = []
    assert import_dataset(original, tmp_path / "a", hooks=Hooks(on_error=lambda _, e: faults.append(str(e)))) == 2
    assert "row 1: its sim_0 is 'high'; give a number, or leave it out" in faults[0]
    (tmp_path / "a.png").write_bytes(encoded("red", "PNG"))
    for n, (seed, score) in enumerate([("nan", ""), ("1.5", ""), (str(2**63), ""), ("", "nan"), ("", "1e999")]):
        (tmp_path / "l.csv").write_text(f"source,target,edit,seed,sim_0\na.png,a.png,x,{seed},{score}\n")
        said = f"row 1: its {'seed' if seed else 'sim_0'} is '{seed or score}'; give a"
        with pytest.raises(DatasetError, match=said):
            import_dataset(tmp_path / "l.csv", tmp_path / f"out{n}")
    (tmp_path / "l.csv").write_text(f"source,target,edit,seed,sim_0\na.png,a.png,x,{2**63 - 1},0.5\n")
    import_dataset(tmp_path / "l.csv", tmp_path / "good")
    assert (PairStore(tmp_path / "good")[0].seed, PairStore(tmp_path / "good")[0].sim_0) == (2**63 - 1, 0.5)


def test_pairs_without_folder_names_are_gathered_by_their_texts(tmp_path):
    pairs = [pair(n, key=f"x{n}", seed=None, edit_prompt="snow") for n in range(4)]
    assert export_dataset(make_store(tmp_path / "store", pairs), tmp_path / "out") == 4
    assert json.loads((tmp_path / "out" / "seeds.json").read_text()) == [
        ["0000000", ["0", "1"]],
        ["0000001", ["0", "1"]],
    ]
    with Image.open(tmp_path / "out" / "0000001" / "1_1.jpg") as picture:
        assert picture.format == "JPEG"
        assert abs(picture.getpixel((8, 8))[1] - 30) <= 2
    with pytest.raises(DatasetError, match="holds another export, or the beginning of one; export to a new folder"):
        export_dataset(make_store(tmp_path / "other", pairs[1:]), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(DatasetError, match="is not empty; export to a new folder"):
        export_dataset(tmp_path / "store", tmp_path / "full")
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="file cannot be written"):
        export_dataset(tmp_path / "store", tmp_path / "file")
    with pytest.raises(ConfigError, match="layout is 'other'"):
        export_dataset(tmp_path / "store", tmp_path / "new", layout="other")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_lists_of_triplets_come_in(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(encoded("red", "PNG"))
    (tmp_path / "b.bmp").write_bytes(encoded("blue", "BMP"))
    row = {
        "source_image": "a.png",
        "target_image": "b.bmp",
        "instruction": "make it blue",
        "caption": "red",
        "seed": "3",
    }
    text = json.dumps(row) if kind == "jsonl" else ",".join(row) + "\n" + ",".join(row.values())
    (tmp_path / f"list.{kind}").write_text(text + "\n")
    assert import_dataset(tmp_path / f"list.{kind}", tmp_path / "store") == 1
    found = PairStore(tmp_path / "store")[0]
    assert (found.edit_prompt, found.original_prompt, found.edited_prompt) == ("make it blue", "red", "")
    assert (found.seed, found.key) == (3, "list/0")
    assert found.original_image == (tmp_path / "a.png").read_bytes()
    assert Image.open(io.BytesIO(found.edited_image)).format == "PNG"


def test_the_hubs_files_come_in(tmp_path):
    row = pair(3)
    picture = {"bytes": row.original_image, "path": None}
    table = {"original_image": [picture], "edited_image": [picture], "edit_prompt": ["x"]}
    table |= {"original_prompt": ["a"], "edited_prompt": ["b"]}
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table(table), tmp_path / "hub" / "part.parquet")
    assert import_dataset(tmp_path / "hub", tmp_path / "store") == 1
    assert PairStore(tmp_path / "store")[0].key == "row/0"
    for column, value in (("edit_prompt", None), ("edited_image", {"bytes": None, "path": "x.png"})):
        pq.write_table(pa.table({**table, column: [value]}), tmp_path / "hub" / "part.parquet")
        with pytest.raises(DatasetError, match=f"part.parquet, row 1: it is without {column}; fill it in"):
            import_dataset(tmp_path / "hub", tmp_path / column)
        assert f"without {column}" in verify(tmp_path / "hub").faults[-1]
    pq.write_table(
        pa.table({**table, "original_prompt": pa.array([None], pa.string())}), tmp_path / "hub" / "p.parquet"
    )
    assert PairStore(tmp_path / "hub")[0].original_prompt == ""


def test_the_hubs_files_come_in_from_deeper_folders(store, tmp_path):
    (tmp_path / "hub" / "default" / "train").mkdir(parents=True)
    PairStore(store).shards[0].rename(tmp_path / "hub" / "default" / "train" / "0000.parquet")
    assert import_dataset(tmp_path / "hub", tmp_path / "out") == 8


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("a.png,a.png,make it a caf\xe9\n".encode("latin-1"), "l.csv is not UTF-8 text"),
        (b"a.png,a.png," + b"x" * 200_000 + b"\n", "l.csv, row 1: it is not CSV"),
        (b"a\0.png,a.png,x\n", "is no path, since it holds a NUL"),
    ],
    ids=["latin-1", "long", "NUL"],
)
def test_lists_that_cannot_be_read_are_named(tmp_path, rows, said):
    (tmp_path / "a.png").write_bytes(encoded("red", "PNG"))
    (tmp_path / "l.csv").write_bytes(b"source,target,edit,key\n" + rows)
    with pytest.raises(DatasetError, match=said):
        import_dataset(tmp_path / "l.csv", tmp_path / "out")


class Likes:
    """In place of a CLIP."""

    def score(self, before, after, captions, edited):
        assert len(before) == len(after) == len(captions) == len(edited)
        return [PairScores(sim_0=0.5, sim_1=0.5, sim_image=0.9, sim_direction=0.5)] * len(before)


def test_a_picture_that_cannot_be_used_is_named_with_its_pair(tmp_path, caplog):
    """And the others are shown, written and scored."""
    small, torn = encoded("red", "PNG", size=(4, 4)), encoded("red", "PNG")[:45]
    folder = make_store(tmp_path / "store", [pair(1), pair(2, edited_image=small), pair(3, original_image=torn)])
    assert sheet(folder, tmp_path / "sheet.html") == 1
    assert "1 of 3 pairs" in (tmp_path / "sheet.html").read_text()
    scores = rescored(PairStore(folder), scorer=Likes())
    assert list(scores) == ["0000001/1"]
    assert refilter(folder, tmp_path / "kept", FilterConfig(), scores=scores).filtered.kept == 1
    assert "pair 0000002/2" in caplog.text and "has 4 x 4 pixels" in caplog.text and "pair 0000003/3" in caplog.text


@pytest.mark.parametrize("layout", EXPORTS)
def test_an_export_passes_over_what_cannot_be_decoded_and_says_so(tmp_path, capsys, layout):
    torn = encoded("red", "PNG")[:45]
    store = make_store(tmp_path / "store", [pair(0), pair(1, edited_image=torn), pair(2), pair(3, edited_image=torn)])
    sound = make_store(tmp_path / "sound", [pair(0), pair(2)])
    arguments = ["dataset", "export", str(store), "--layout", layout, "--out", str(tmp_path / "out"), "--json"]
    for _ in range(2):  # the second finds all of it there
        assert main(arguments) == 1
        said = capsys.readouterr()
        found = json.loads(said.out)
        assert (found["pairs"], found["left_out"], found["broken_files"]) == (2, 2, 0)
        assert "ip2p: left out: the edited_image of pair 0000001/1" in said.err
    assert export_dataset(sound, tmp_path / "expected", layout=layout) == 2
    named = {".export.json", "manifest.json", "README.md"}  # which name the source
    of_both = (files_of(tmp_path / name) for name in ("out", "expected"))
    out, expected = (
        {name: data for name, data in found.items() if name.rpartition("/")[2] not in named} for found in of_both
    )
    assert out == expected
    torn_only = make_store(tmp_path / "torn", [pair(1, edited_image=torn)])
    with pytest.raises(DatasetError, match="no pair can be used; the last: the edited_image of pair 0000001/1"):
        export_dataset(torn_only, tmp_path / "nothing", layout=layout)


def test_pictures_of_other_formats_go_out_as_png(tmp_path):
    bmp = encoded("red", "BMP")
    store = make_store(tmp_path / "store", [pair(0, edited_image=bmp)])
    assert export_dataset(store, tmp_path / "out", layout="folders") == 1
    assert open_image(tmp_path / "out" / "target" / "0000000.png").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("command", ["import", "export", "merge"])
def test_a_lost_shard_is_named_and_the_code_says_so(command, tmp_path, capsys):
    """As of a broken one, though nobody knows how many rows it had."""
    store = tmp_path / "store"
    with PairWriter(store, manifest={"config": {}}, rows_per_shard=2) as writer:
        for n in range(6):
            writer.write(pair(n))
    (store / "data" / "train-00000-of-00001-000001.parquet").unlink()
    arguments = ["dataset", command, str(store), "--out", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["left_out"], found["broken_files"], found["pairs" if command == "export" else "new"]) == (0, 1, 4)
    assert found["faults"] == [f"{store} has lost train-00000-of-00001-000001.parquet; restore it from a copy"]
    assert "ip2p: the rows of 1 file are lost; restore the files to have them" in said.err


def test_a_lost_shard_is_told_by_those_who_only_read(tmp_path, caplog):
    store = tmp_path / "store"
    with PairWriter(store, manifest={"config": {}}, rows_per_shard=1) as writer:
        for n in range(3):
            writer.write(pair(n, sim_0=0.5, sim_1=0.5, sim_image=0.9, sim_direction=0.5))
    (store / "data" / "train-00000-of-00001-000001.parquet").unlink()
    for command in ("info", "sheet", "doctor", "filter"):
        out = ["--out", str(tmp_path / "out")] if command in ("sheet", "doctor") else []
        assert main([*(["dataset"] if command != "filter" else []), command, str(store), *out]) == 0
        assert caplog.text.count("has lost train-00000-of-00001-000001.parquet") == 1, command
        caplog.clear()


def test_after_a_broken_file_rows_have_their_own_numbers(tmp_path):
    """Or a set that is mended would come in twice, under other keys, and another split would be held out."""
    rows = [{"source": encoded("red", "PNG"), "edit": f"do {n}", "target": encoded("blue", "PNG")} for n in range(6)]
    folder = tmp_path / "set"
    folder.mkdir()
    for n in range(3):
        pq.write_table(pa.Table.from_pylist(rows[2 * n : 2 * n + 2]), folder / f"train-{n:05d}-of-00003.parquet")
    whole = [one.key for one in open_pairs(folder)]
    held_out = split_rows(open_pairs(folder), [""])
    path = folder / "train-00001-of-00003.parquet"
    kept, place = path.read_bytes(), pq.read_metadata(path).row_group(0).column(0).data_page_offset
    data = bytearray(kept)
    data[place : place + 20] = b"\xff" * 20
    path.write_bytes(data)
    places = []
    hooks = Hooks(on_error=lambda number, error: places.append((number, error.rows)))
    assert import_dataset(folder, tmp_path / "out", hooks=hooks) == 4
    assert places == [(2, 2)]
    assert [one.key for one in PairStore(tmp_path / "out")] == [*whole[:2], *whole[4:]]
    assert [one.row for one in doctor(folder).findings if "broken" in one.faults] == [2, 3]
    assert set(split_rows(open_pairs(folder), [""])[1]) <= set(held_out[1])
    path.write_bytes(kept)
    assert import_dataset(folder, tmp_path / "out") == 2
    assert PairStore(tmp_path / "out").keys() == set(whole)


def test_files_that_names_promise_and_that_are_not_there_are_told(tmp_path, caplog):
    rows = [{"source": encoded("red", "PNG"), "edit": "do", "target": encoded("blue", "PNG")}]
    for n in (0, 2):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"train-{n:05d}-of-00003.parquet")
    assert len(open_pairs(tmp_path)) == 2
    assert f"{tmp_path} has 2 of the 3 files of train; what is there is read" in caplog.text


def test_unknown_layouts_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "missing.csv", tmp_path / "missing"):
        with pytest.raises(DatasetError, match="is no known layout; give a folder of the original layout"):
            import_dataset(source, tmp_path / "store")
    assert not (tmp_path / "store").exists()


RICH = {"kind": "style", "scores": {"o_score": 9.0}, "session": "a", "licence": "MIT", "paraphrases": ("let it snow",)}


@pytest.mark.parametrize("layout", ["folders", "musubi", "hub"])
def test_out_and_in_again_nothing_is_lost(tmp_path, layout):
    """Pictures to the byte; folder pairs hold an instruction alone."""
    rows = [pair(n, **RICH if n else {}, edited_image=encoded("red", "JPEG")) for n in range(3)]
    store = make_store(tmp_path / "store", rows)
    assert export_dataset(store, tmp_path / "out", layout=layout) == 3
    before = files_of(tmp_path / "out")
    again = list(open_pairs(tmp_path / "out"))
    assert [row.original_image for row in again] == [row.original_image for row in rows]
    assert [row.edited_image for row in again] == [row.edited_image for row in rows]
    assert [row.edit_prompt for row in again] == [row.edit_prompt for row in rows]
    if layout != "folders":
        assert again == rows
    assert import_dataset(tmp_path / "out", tmp_path / "third") == 3
    if layout == "hub":
        card = (tmp_path / "out" / "README.md").read_text()
        assert 'license: "MIT"' in card and "| with kind | 2 |" in card and "n<1K" in card
    # Whoever was killed after the last file, or asks once more, has what he asked for.
    assert export_dataset(store, tmp_path / "out", layout=layout) == 3
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("layout", ["original", "folders", "musubi", "hub"])
def test_a_killed_export_goes_on(store, tmp_path, monkeypatch, layout):
    export_dataset(store, tmp_path / "whole", layout=layout)
    times = []

    def give_up(*arguments):
        times.append(arguments)
        if len(times) % 5 == 0:
            raise KeyboardInterrupt
        return whole_file(*arguments)

    monkeypatch.setattr(export, "whole_file", give_up)
    for _ in range(50):
        try:
            export_dataset(store, tmp_path / "killed", layout=layout)
            break
        except KeyboardInterrupt:
            continue
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_several_sets_become_one(store, original, tmp_path):
    assert merge_datasets([store, original, store], tmp_path / "one") == 8 + 3 + 8
    merged = list(PairStore(tmp_path / "one"))
    assert [row.key for row in merged[6:10]] == ["0/0000006/6", "0/0000007/7", "1/0000000/12", "1/0000000/7"]
    assert replace(merged[0], key="") == replace(PairStore(store)[0], key="")
    assert merge_datasets([store, original, store], tmp_path / "one") == 0
    with pytest.raises(DatasetError, match="holds pairs of another run"):
        merge_datasets([store, original], tmp_path / "one")
    assert verify(tmp_path / "one").sound


def test_info_says_what_is_there(store):
    found = info(store)
    assert (found.pairs, found.captions, found.shards) == (8, 8, 1)
    assert found.picture_sizes == {"16x16 PNG": 8}
    assert found.scores["sim_image"]["count"] == 8
    assert found.scores["sim_direction"]["count"] == 7
    assert found.scores["sim_image"]["median"] == pytest.approx(0.535)
    assert "sim_1" not in found.scores
    assert "8 pairs of 8 captions" in found.as_text()
    bare = [pair(n, original_prompt="", edited_prompt="") for n in range(2)]
    assert "2 pairs with 2 instructions and no captions" in info(make_store(store.parent / "bare", bare)).as_text()
    assert info(make_store(store.parent / "empty", [])).pairs == 0
    assert info(make_store(store.parent / "bad", [pair(1, original_image=b"")])).picture_sizes == {"unreadable": 1}


def test_verify_finds_every_kind_of_fault(tmp_path):
    bad = [
        pair(1, original_image=b"no picture"),
        pair(2, edited_image=encoded("red", size=(8, 8))),
        pair(3, edit_prompt="  "),
        pair(4, sim_0=7.0),
        pair(5, sim_1=float("nan")),
    ]
    folder = make_store(tmp_path / "store", [pair(0), *bad])
    second = folder / "data" / "train-00001-of-00002-000000.parquet"
    shutil.copy(PairStore(folder).shards[0], second)
    verdict = verify(folder)
    assert not verdict.sound
    said = "\n".join(verdict.faults)
    for text in (
        "cannot be decoded",
        "have the sizes (16, 16) and (8, 8)",
        "no instruction",
        "sim_0 is 7",
        "sim_1 is nan",
    ):
        assert text in said
    assert said.count("its key is there twice") == 6
    second.write_bytes(second.read_bytes().replace(pair(0).original_image, bytes(len(pair(0).original_image))))
    assert any("cannot be decoded" in fault for fault in verify(folder).faults)
    (folder / "manifest.json").unlink()
    assert "has no manifest.json" in verify(folder).faults[0]


def test_a_text_has_so_many_letters():
    assert len(pair(0, edit_prompt="a" * 2**20).edit_prompt) == 2**20
    with pytest.raises(DatasetError, match="its edit_prompt has 1,048,577 letters; give at most 1,048,576"):
        pair(0, edit_prompt="a" * (2**20 + 1))


def test_a_program_is_no_picture(tmp_path):
    """PostScript is one to Pillow, which would have it drawn by a program."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EOF\n"
    folder = make_store(tmp_path / "store", [pair(0, original_image=program)])
    assert "original_image is not a picture in a known format" in verify(folder).faults[0]
    assert info(folder).picture_sizes == {"unreadable": 1}
    assert picture_hash(program) == int.from_bytes(blake2b(program, digest_size=8).digest(), "big")


@pytest.mark.parametrize("command", ["import", "export", "merge"])
def test_a_file_that_cannot_be_read_is_counted_by_its_rows(command, tmp_path, capsys):
    """The code says so, unlike of a few broken rows, which any large set has."""
    stores = [make_store(tmp_path / name, [pair(n) for n in range(3)]) for name in "ab"]
    shutil.copy(next((stores[1] / "data").iterdir()), stores[0] / "data" / "train-00000-of-00001-000001.parquet")
    path = next((stores[0] / "data").iterdir())
    arguments = [command, *([stores[0], stores[1]] if command == "merge" else [stores[0]])]
    arguments = ["dataset", *map(str, arguments), "--out", str(tmp_path / "out"), "--json"]
    data = bytearray(path.read_bytes())
    place = pq.read_metadata(path).row_group(0).column(2).data_page_offset
    data[place : place + 20] = b"\xff" * 20
    path.write_bytes(data)
    assert main(arguments) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["left_out"], found["broken_files"], found["new" if command != "export" else "pairs"]) == (
        (3, 1, 3) if command != "merge" else (3, 1, 6)
    )
    assert "3 of its 3 rows are lost" in found["faults"][0]
    assert "ip2p: 3 rows of 1 file are lost; restore the files to have them" in said.err


def test_a_broken_row_is_counted_and_no_error(original, tmp_path, capsys):
    (original / "0000000" / "metadata.jsonl").write_text(json.dumps({"seed": "12", "clip_sim_0": "high"}) + "\n")
    assert main(["dataset", "import", str(original), "--out", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["new"], said["left_out"], said["broken_files"]) == (2, 1, 0)


def test_the_digest_is_of_the_content_alone(store, tmp_path):
    cut = tmp_path / "cut"
    with PairWriter(cut, manifest={}, rows_per_shard=3) as writer:
        for row in reversed(list(PairStore(store))):
            writer.write(row)
    assert verify(cut).digest == verify(store).digest
    other = make_store(tmp_path / "other", [replace(row, sim_0=0.26) for row in PairStore(store)])
    assert verify(other).digest != verify(store).digest


def test_a_sheet_is_self_contained_and_safe(store, tmp_path):
    out = tmp_path / "sheets" / "sheet.html"
    assert sheet(store, out, limit=4) == 4
    page = out.read_text(encoding="utf-8")
    assert page.count("<article") == 4
    assert 'data-index="6"' in page
    assert "make it &lt;b&gt;snow&lt;/b&gt; &amp; 6" in page
    assert not re.search(r"(src|href)=.(?!data:)", page)
    assert "http:" not in page
    assert "https:" not in page
    with pytest.raises(ConfigError, match="limit is 0"):
        sheet(store, out, limit=0)
    with pytest.raises(DatasetError, match="has no pairs yet"):
        sheet(make_store(tmp_path / "empty", []), out)


def test_a_strangers_values_run_nothing(store, tmp_path):
    """Scripts run by a nonce that is drawn for each page, and a value cannot end its attribute."""
    shard = PairStore(store).shards[0]
    rows = pq.read_table(shard).to_pylist()
    rows[1]["key"], rows[1]["edit_prompt"] = '"><script>alert(1)</script>', "</p><script>alert(2)</script>"
    pq.write_table(pa.Table.from_pylist(rows), shard)
    sheet(store, tmp_path / "a.html")
    sheet(store, tmp_path / "b.html")
    pages = [(tmp_path / name).read_text(encoding="utf-8") for name in ("a.html", "b.html")]
    nonces = [re.findall(r"nonce[-=]\"?([\w-]{20,})", page) for page in pages]
    assert all(len(found) == 4 and len(set(found)) == 1 for found in nonces)
    assert nonces[0][0] != nonces[1][0]
    assert "unsafe-inline" not in pages[0]
    assert pages[0].count("<script") == 1


def test_seeds_that_are_paths_write_nothing(store, tmp_path):
    shard = PairStore(store).shards[0]
    rows = [{**row, "seed": "../../outside"} for row in pq.read_table(shard).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), shard)
    with pytest.raises(DatasetError, match=r"row 8: its seed is '../../outside' \(str\); give a whole number"):
        export_dataset(store, tmp_path / "a" / "b" / "out")
    assert not list(tmp_path.rglob("outside*"))
    assert "its seed is" in verify(store).faults[0]


def test_a_list_of_seeds_reaches_only_its_own_folder(original, tmp_path):
    (original / "seeds.json").write_text(json.dumps([["../secret", ["1"]]]))
    with pytest.raises(DatasetError, match="names '../secret', which is no folder beside it"):
        import_dataset(original, tmp_path / "store")


def shown(page, address=""):
    """What a browser shows of the sheet: (indices of the visible cards in order, the count it states)."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"{page.as_uri()}{address}"]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    cards = [tag for tag in re.findall(r"<article[^>]*>", dom) if "hidden" not in tag]
    count = html.unescape(re.search(r'id="count"[^>]*>([^<]*)<', dom).group(1))
    return [int(re.search(r'data-index="(\d+)"', tag).group(1)) for tag in cards], count


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_sorts_and_filters(store, tmp_path):
    page = tmp_path / "sheet.html"
    sheet(store, page)
    assert shown(page) == ([1, 2, 3, 4, 5, 6, 7, 0], "8 of 8 pairs")  # by direction; a pair without one comes last
    assert shown(page, "#sort=sim_image") == ([7, 6, 5, 4, 3, 2, 1, 0], "8 of 8 pairs")
    assert shown(page, "#sort=index&ascending=on&sim_image=0.55")[0] == [5, 6, 7]
    assert shown(page, "#sim_direction=0.86&text=STREET%201") == ([2, 3], "2 of 8 pairs")


def test_a_set_that_was_brought_in_was_not_made_by_this_day_s_packages(tmp_path):
    source = tmp_path / "source"
    make_store(source, [pair(0), pair(1)])
    import_dataset(source, tmp_path / "store")
    said = info(tmp_path / "store").as_text()
    assert f"imported from {source}" in said and "made by" not in said
    assert "made by" in info(source).as_text()
    assert info(source, Reading(limit=1)).pairs == 1
