"""``ip2p edit`` and what people bring: folders, patterns, streams, addresses, tables; names; broken pictures."""

from __future__ import annotations

import csv
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ip2p_engine import InstructPix2Pix, cli
from ip2p_engine.commands import edit as edit_command
from ip2p_engine.commands.edit_sources import read_table
from ip2p_engine.errors import ConfigError
from ip2p_engine.files import write_new
from ip2p_engine.images import open_image, pixels_digest, read_settings
from ip2p_engine.scenes.world import Scene, render

SNOW = ["--instruction", "make it snow", "--steps", "1"]
HEART = Scene(shape="heart", colour="red", background="sky", size="large")


@pytest.fixture(autouse=True)
def one_editor(editor, monkeypatch):
    monkeypatch.setattr(edit_command, "load_editor", lambda options: editor)


@pytest.fixture
def photos(tmp_path):
    """A folder of five pictures, one of them cut short, and what is no picture."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.jpg", "c.webp", "d [1].png"):
        render(HEART).save(folder / name)
    render(HEART).resize((256, 256)).save(folder / "e.png", compress_level=0)
    (folder / "e.png").write_bytes((folder / "e.png").read_bytes()[:20000])
    (folder / "notes.txt").write_text("no picture")
    (folder / "._a.png").write_bytes(b"what a Mac leaves beside a picture")
    return folder


def run(*arguments) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def made(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_folder_is_edited_and_a_broken_picture_is_named(photos, tmp_path, capsys):
    assert run("edit", photos, *SNOW, "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert made(tmp_path / "out") == [f"{stem}_edited_seed0.png" for stem in ("a", "b", "c", "d [1]")]
    assert len(said.out.splitlines()) == 4
    assert f"ip2p: left out: {photos / 'e.png'} is damaged" in said.err
    assert said.err.strip().splitlines()[-1] == "ip2p: 1 of 5 pictures are left out (e.png); the others are made"


def test_strict_ends_before_the_network_runs(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edit_command, "load_editor", None)
    assert run("edit", photos, *SNOW, "--strict", "--out", tmp_path / "out") == 2
    assert "e.png is damaged" in capsys.readouterr().err and not made(tmp_path / "out")


@pytest.mark.parametrize(
    ("word", "count"),
    [("photos/*.png", 2), ("photos/[ab].*", 2), ("photos/d [1].png", 1), ("~/photos/a.png", 1), ("**/c.webp", 1)],
)
def test_patterns_and_home(word, count, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (photos / "e.png").unlink()
    assert run("edit", word, *SNOW, "--out", "~/out") == 0
    assert len(made(tmp_path / "out")) == count


@pytest.mark.parametrize(("word", "sentence"), [("*.png", "fits no file"), (".", "a folder without pictures")])
def test_nothing_to_edit_is_a_sentence(word, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("edit", word, *SNOW, "--out", tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err


def test_standard_input_and_output(tmp_path, monkeypatch):
    data, out = io.BytesIO(), io.BytesIO()
    render(HEART).save(data, "PNG")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data.getvalue())))
    monkeypatch.setattr("sys.stdout", SimpleNamespace(buffer=out, flush=lambda: None))
    monkeypatch.chdir(tmp_path)
    assert run("edit", "-", *SNOW, "--out", "-") == 0
    picture = Image.open(io.BytesIO(out.getvalue()))
    assert picture.size == (64, 64) and json.loads(picture.info["ip2p"])["source"] == "stdin"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def address(photos):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(photos)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses(address, tmp_path, capsys):
    assert (
        run("edit", f"{address}/a.png?token=secret", f"{address}/d%20%5B1%5D.png", *SNOW, "--out", tmp_path / "out")
        == 0
    )
    assert made(tmp_path / "out") == ["a_edited_seed0.png", "d [1]_edited_seed0.png"]
    capsys.readouterr()
    for wrong in (f"{address}/missing.png?token=secret", "http://[::1", "nothing://x/y.png"):
        assert run("edit", wrong, *SNOW, "--out", tmp_path / "no") == 2
        said = capsys.readouterr().err
        assert "cannot be read" in said and "secret" not in said and "Traceback" not in said


def test_an_address_without_a_picture_is_left_out_by_its_name(address, photos, tmp_path, capsys):
    (photos / "page.html").write_text("<html>")
    words = (f"{address}/a.png", f"{address}/missing.png?token=secret", f"{address}/page.html")
    assert run("edit", *words, *SNOW, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert made(tmp_path / "out") == ["a_edited_seed0.png"] and "secret" not in said and "/tmp" not in said
    assert f"{address}/page.html is not a picture" in said and f"{address}/missing.png cannot be read" in said
    assert run("edit", *words, *SNOW, "--strict", "--out", tmp_path / "no") == 2
    assert f"{address}/missing.png cannot be read" in capsys.readouterr().err and not made(tmp_path / "no")


def test_standard_input_that_is_no_picture_goes_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"hello")))
    assert run("edit", "-", *SNOW, "--out", tmp_path / "out") == 2
    assert "standard input is not a picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "image;instruction;seed\na.png;make it snow;3\n",  # Excel, where numbers have commas
        "image\tinstruction\tseed\na.png\tmake it snow\t3\n",
        "\ufeffImage, Instruction ,SEED\r\n a.png , make it snow, 3.0 \r\n\r\n",
        'image,instruction,seed,\n".\\a.png",make it snow,3,\n',  # written on Windows
    ],
    ids=["semicolons", "tabs", "capitals and blanks", "backslashes"],
)
def test_tables_as_other_programs_write_them(text, photos, tmp_path):
    (photos / "edits.csv").write_bytes(text.encode())
    (row,) = read_table(photos / "edits.csv", 0, tmp_path)
    assert (row.instruction, row.seed, Path(row.source.picture).resolve()) == ("make it snow", 3, photos / "a.png")


def test_a_text_with_commas_is_not_cut(photos, tmp_path):
    (photos / "edits.csv").write_text("image,instruction\na.png,make it snow, and night\n")
    with pytest.raises(ConfigError, match="line 2, has more fields than the first line; put a text .* in quotes"):
        read_table(photos / "edits.csv", 0, tmp_path)


def test_a_table_is_a_row_an_edit(photos, tmp_path, capsys):
    table = photos / "edits.csv"
    with table.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["image", "instruction", "seed", "text_cfg"])
        rows.writerows([["a.png", "make it snow", 3, ""], ["b.jpg", "make it night", "", 5], ["a.png", "", 1, 5]])
    assert run("edit", "--table", table, "--seed", 9, "--steps", 1, "--json", "--out", tmp_path / "out") == 0
    said = sorted(map(json.loads, capsys.readouterr().out.splitlines()), key=lambda row: row["seed"])
    assert [(r["source"], r["instruction"], r["seed"]) for r in said] == [
        ("a.png", "", 1),
        ("a.png", "make it snow", 3),
        ("b.jpg", "make it night", 9),
    ]
    assert [r["text_cfg"] for r in said] == [5, said[1]["text_cfg"], 5] and said[1]["text_cfg"] != 5
    lines = photos / "edits.jsonl"
    lines.write_text('{"image": "a.png", "instruction": "make it snow", "seed": 3}\n')
    assert run("edit", "--table", lines, "--steps", 1, "--json", "--out", tmp_path / "out") == 0
    again = json.loads(capsys.readouterr().out)
    assert np.array_equal(Image.open(again["file"]), Image.open(said[1]["file"]))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"image": "a.png"}', "row 1 has no text in a column instruction"),
        ('{"image": "a.png", "instruction": "x", "seed": 1.5}', "row 1, seed is 1.5; give a whole number"),
        ('{"image": "a.png", "instruction": "x", "text_cfg": "much"}', "text_cfg is 'much'; give a number"),
        ('{"image": "a.png", "instruction": "x", "text_cfg": -1}', "text_cfg is -1"),
        ("", "has no rows"),
    ],
)
def test_bad_tables_are_refused_in_a_sentence(text, sentence, photos, capsys):
    (photos / "edits.jsonl").write_text(text)
    assert run("edit", "--table", photos / "edits.jsonl", "--steps", 1, "--out", photos / "out") == 2
    assert sentence in capsys.readouterr().err and not made(photos / "out")


@pytest.mark.parametrize("name", ["写" * 80, "x" * 250])
def test_a_long_name_is_cut_before_the_work(name, tmp_path):
    source = tmp_path / f"{name}.png"
    render(HEART).save(source)
    for _ in range(2):
        assert run("edit", source, *SNOW, "--out", tmp_path / "out") == 0
    names = made(tmp_path / "out")
    assert len(names) == 2 and all(name[:60] in one and len(one.encode()) <= 255 for one in names)
    assert {one.rpartition("_seed0")[2] for one in names} == {".png", "_2.png"}


@pytest.mark.parametrize(
    ("name", "word"), [("x" * 252 + ".png", "too long"), ("x.heic", "no suffix"), ("x.gif", "no suffix")]
)
def test_a_name_that_cannot_be_written_is_said_before_the_work(name, word, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edit_command, "load_editor", None)
    assert run("edit", photos / "a.png", *SNOW, "--out", tmp_path / name) == 2
    assert word in capsys.readouterr().err and name not in made(tmp_path)


@pytest.mark.parametrize("again", range(6))
def test_of_many_writers_of_one_name_each_has_its_own(again, tmp_path):
    """Also where one takes over the hidden folder that another is just leaving (a third of the rounds, once)."""

    def write(number):
        return write_new(tmp_path / "a.png", lambda stream: stream.write(b"%d" % number))

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(write, range(32)))
    assert len(set(paths)) == 32 == len(list(tmp_path.iterdir()))
    assert [int(path.read_bytes()) for path in paths] == list(range(32))


def test_exif_is_kept_when_asked(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "A camera", 6
    exif.get_ifd(0x8769)[0x9003] = "2026:11:27 08:00:00"
    render(HEART).resize((96, 64)).save(tmp_path / "a.jpg", exif=exif)
    for name, kept in (("out.png", True), ("out.jpg", True), ("plain.jpg", False)):
        keep = ["--keep-exif"] if kept else []
        assert run("edit", tmp_path / "a.jpg", *SNOW, *keep, "--out", tmp_path / name) == 0
        picture = Image.open(tmp_path / name)
        said = picture.getexif()
        assert (said.get(0x010F), said.get(0x0112), picture.size) == (("A camera", 1) if kept else (None, None)) + (
            (64, 96),
        )
        assert (said.get_ifd(0x8769).get(0x9003) is not None) == kept
        assert read_settings(tmp_path / name)["instruction"] == "make it snow"
        assert read_settings(tmp_path / name)["source_sha256"] == pixels_digest(open_image(tmp_path / "a.jpg"))


def test_png_levels_are_the_same_pixels(photos, tmp_path, capsys):
    sizes = {}
    for level in (0, 1, 9):
        assert run("edit", photos / "a.png", *SNOW, "--png-level", level, "--out", tmp_path / f"{level}.png") == 0
        sizes[level] = (tmp_path / f"{level}.png").stat().st_size
    assert sizes[0] > sizes[1] > sizes[9]
    assert np.array_equal(Image.open(tmp_path / "0.png"), Image.open(tmp_path / "9.png"))
    assert run("edit", photos / "a.png", *SNOW, "--png-level", 10) == 2


def test_settings_name_no_place(photos, editor, tmp_path):
    """Neither the source's folder nor the checkpoint's; both are known by what is in them."""
    editor = InstructPix2Pix(editor.model, name=str(photos / "weights.safetensors"))
    result = next(editor.edits(str(photos / "a.png"), "make it snow", steps=1))
    assert str(tmp_path) not in json.dumps(result.settings)
    assert (result.settings["source"], result.settings["checkpoint"]) == ("a.png", "weights.safetensors")
    assert len(result.settings["source_sha256"]) == 64 and len(result.settings["checkpoint_digest"]) == 32


def test_only_small_pictures_are_held(editor, monkeypatch):
    """Of many pictures in one batch, as many are open at full size as there are hands."""
    from ip2p_engine import jobs, pictures

    open_now, most, lock = [], [], threading.Lock()

    def opening(picture):
        with lock:
            open_now.append(1)
            most.append(len(open_now))
        image = Image.new("RGB", (512, 512))
        with lock:
            open_now.pop()
        return image

    monkeypatch.setattr(pictures, "opened", opening)
    monkeypatch.setattr(jobs, "upright_size", lambda picture: (512, 512))
    results = list(editor.edits([f"{n}.png" for n in range(9)], "make it snow", steps=1, size="64x64"))
    assert len(results) == len(most) == 9 and max(most) <= 2
    assert all(result.edited.size == (64, 64) and "image" not in vars(result) for result in results)


def test_a_mask_keeps_the_source_s_pixels(photos, tmp_path, capsys):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(tmp_path / "mask.png")
    out = tmp_path / "out.png"
    assert run("edit", photos / "a.png", *SNOW, "--mask", tmp_path / "mask.png", "--out", out) == 0
    before, after, inside = (np.asarray(Image.open(path)) for path in (photos / "a.png", out, tmp_path / "mask.png"))
    assert np.array_equal(before[inside == 0], after[inside == 0]) and (before != after)[inside > 0].any()
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    assert run("edit", photos / "a.png", *SNOW, "--mask", tmp_path / "black.png", "--out", tmp_path / "no.png") == 2
    assert "is black everywhere" in capsys.readouterr().err
