"""What strangers' names, folders, addresses and numbers do: one sentence and exit code 2, and nothing given away."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ip2p_engine import images, pictures
from ip2p_engine.captions import edits
from ip2p_engine.cli import main
from ip2p_engine.commands import edit_sources
from ip2p_engine.commands.edit_files import output_paths
from ip2p_engine.commands.edit_sources import Row, Source
from ip2p_engine.commands.options import MOST, stop_signals
from ip2p_engine.data import parquet, tables
from ip2p_engine.data.pages import NoPlainValues, _levels, places_of
from ip2p_engine.data.reading import open_pairs
from ip2p_engine.data.store import PairStore
from ip2p_engine.errors import ConfigError, DatasetError, ImageError, printable
from ip2p_engine.evaluate.report import write_report
from ip2p_engine.evaluate.run_folder import Table, save_run
from ip2p_engine.files import public_name, whole_file
from ip2p_engine.images import open_image, open_mask, save_image
from ip2p_engine.train.config import MOST_AT_ONCE, TrainConfig

ESCAPE = "\x1b[2J\x1b]0;owned\x07"


def refused(capsys, *arguments):
    """The one sentence, behind the bar if there is one, of a command that ends with exit code 2."""
    assert main([str(one) for one in arguments]) == 2
    *before, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("ip2p: ")
    assert not any("Traceback" in line for line in before)
    return last


@pytest.mark.parametrize("address", ["http://[::1", "s3://[x", "http://\u2100.com/x", "s3://b/a#b@c?d"])
def test_addresses_that_are_none(address, capsys, tmp_path):
    assert public_name(address).startswith(address.partition("://")[0])
    assert refused(capsys, "inspect", address)
    assert refused(capsys, "dataset", "copy", address, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://user:secret@host/a.ckpt?token=secret#secret", "https://host/a.ckpt"),
        ("https://user:secret@[::1/a?x=secret", "https://[::1/a"),
        ("s3://secret@bucket?secret/x", "s3://bucket"),
        ("https://u:p@ss@host/p@th/x", "https://host/p@th/x"),
        ("folder/a.ckpt", "folder/a.ckpt"),
    ],
)
def test_an_address_without_its_secrets(address, shown):
    assert public_name(address) == shown


def test_the_root_is_no_name(capsys):
    assert "cannot be written" in refused(capsys, "convert", "embedded", "/", "--to", "diffusers")
    with pytest.raises(IsADirectoryError), whole_file(Path("/")):
        pass


TOO_MUCH = [
    ("edit", "a.png", "--instruction", "x", "--seeds", MOST["seeds"] + 1),
    ("edit", "a.png", "--instruction", "x", "--steps", MOST["steps"] + 1),
    ("edit", "a.png", "--instruction", "x", "--text-cfg", "nan"),
    ("pairs", "e.jsonl", "--out", "o", "--candidates", MOST["candidates"] + 1),
    ("train", "--data", "d", "--base", "b", "--out", "o", "--lora", MOST["lora_rank"] + 1),
    ("train", "--data", "d", "--base", "b", "--out", "o", "--workers", MOST["workers"] + 1),
    ("train", "--data", "d", "--base", "b", "--out", "o", "--steps", MOST["train.steps"] + 1),
    ("train", "--data", "d", "--base", "b", "--out", "o", "--set", f"lora_rank={MOST['lora_rank'] + 1}"),
    ("dataset", "sheet", "s", "--out", "o", "--side", MOST["side"] + 1),
]


@pytest.mark.parametrize("arguments", TOO_MUCH, ids=lambda a: " ".join(map(str, a[-2:])))
def test_more_than_any_work_needs(arguments, capsys):
    text = refused(capsys, *arguments)
    assert "at most" in text or "give a number" in text


def test_the_most_that_can_be_asked_for_is_no_error(capsys):
    for arguments in TOO_MUCH[:2]:
        text = refused(capsys, *arguments[:-1], arguments[-1] - 1)
        assert "a.png does not exist" in text
    text = refused(capsys, "train", "--data", "d", "--base", "b", "--out", "o", "--steps", MOST["train.steps"])
    assert "at most" not in text


def test_a_size_of_gigapixels(capsys, tmp_path):
    (tmp_path / "e.jsonl").write_text(json.dumps({"caption": "a", "instruction": "b", "edited_caption": "c"}))
    text = refused(capsys, "pairs", tmp_path / "e.jsonl", "--out", tmp_path / "o", "--size", "65536x65536")
    assert "up to 4096" in text


def test_names_do_not_move_the_cursor(capsys):
    error = refused(capsys, "inspect", f"{ESCAPE}.ckpt")
    assert "\x1b" not in error
    assert "\\x1b[2J" in error
    assert printable("snow\tand\nice \u00e9\u96ea\U0001f642") == "snow\tand\nice \u00e9\u96ea\U0001f642"
    assert printable("\u202eevil\x9b\ud800") == "\\x202eevil\\x9b\\xd800"


def test_results_do_not_move_the_cursor(capsys, tmp_path):
    run = tmp_path / f"run{ESCAPE}"
    save_run(run, "curve", settings={}, tables=[])
    assert main(["evaluate", "report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "report.html" in out


def run_of(folder, **changes):
    table = Table(title="t", columns=["a"], rows=[[1]])
    save_run(folder, "curve", settings={"a": "<script>"}, tables=[table], pictures={"a.png": "words"})
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    content = {**json.loads((folder / "run.json").read_text()), **changes}
    (folder / "run.json").write_text(json.dumps(content))
    return folder


def test_a_report_holds_the_run_s_pictures_and_no_scripts(tmp_path):
    page = write_report(run_of(tmp_path / "run"), tmp_path / "report.html").read_text()
    assert "data:image/png;base64,iVBOR" in page
    assert "<script>" not in page
    assert "script-src" not in page
    assert "default-src 'none'" in page
    assert "unsafe-inline" not in page


@pytest.mark.parametrize(
    "changes",
    [
        {"pictures": [["../secret.png", "x"]]},
        {"pictures": [["/etc/passwd", "x"]]},
        {"pictures": [["..", "x"]]},
        {"pictures": [["secret.txt", "x"]]},
        {"pictures": [["link.png", "x"]]},
        {"pictures": [["fifo.png", "x"]]},
        {"pictures": [["a.png", 3]]},
        {"pictures": 3},
        {"kind": ["curve"]},
        {"tables": [{"title": "t", "columns": 3, "rows": []}]},
        {"tables": [3]},
        {"settings": []},
        {"versions": "x"},
    ],
)
def test_a_stranger_s_run_embeds_no_file_of_this_machine(changes, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    folder = run_of(tmp_path / "run", **changes)
    (folder / "secret.txt").write_text("secret")
    (folder / "link.png").symlink_to(secret)
    os.mkfifo(folder / "fifo.png")
    with pytest.raises(DatasetError):
        write_report(folder, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_the_end_of_the_terminal_asks_to_stop(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with stop_signals() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop()
    assert signal.getsignal(number) is before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as should_stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not should_stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_windows_has_other_signals(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    with stop_signals() as should_stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert should_stop()


def test_a_name_that_no_disk_takes(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["dataset", "export", "store", "--out", "\ud800.png"])
    assert ended.value.code == 2
    assert "that this system can write" in capsys.readouterr().err


def test_examples_that_no_memory_holds():
    assert TrainConfig(batch_size=MOST_AT_ONCE).batch_size == MOST_AT_ONCE
    assert TrainConfig(batch_size=MOST_AT_ONCE + 1, micro_batch=16).micro_batch == 16
    with pytest.raises(ConfigError, match="at once; give micro_batch, of at most 10,000"):
        TrainConfig(batch_size=MOST_AT_ONCE + 1)


def rows(folder, **columns):
    """A Parquet file of four pairs with some columns exchanged, packed as small as they can be."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(stream, "PNG")
    picture = [{"bytes": stream.getvalue(), "path": None}] * 4
    texts = {name: ["a cat"] * 4 for name in ("edit_prompt", "original_prompt", "edited_prompt")}
    table = pa.table({"original_image": picture, "edited_image": picture, **texts, **columns})
    pq.write_table(table, folder / "a.parquet", compression="zstd", dictionary_pagesize_limit=2**30)
    return folder / "a.parquet"


def test_a_text_that_is_written_once_and_repeated_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "UNFOLDED", 2**20)
    rows(tmp_path, edit_prompt=["a" * 300_000] * 4)
    with pytest.raises(DatasetError, match="repeats without end"):
        PairStore(tmp_path).columns("edit_prompt", "original_prompt")
    assert len(next(PairStore(tmp_path).outcomes()).edit_prompt) == 300_000, "a row at a time is within bounds"


def test_columns_that_unfold(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "UNFOLDED", 2**20)
    path = rows(tmp_path, edit_prompt=pa.array([str(n) * 300_000 for n in range(4)]))
    with pytest.raises(
        DatasetError, match=f"promises 1,2.* bytes, which no data set of {path.stat().st_size:,} bytes has"
    ):
        PairStore(tmp_path).columns("edit_prompt")


@pytest.mark.parametrize("table", [{f"c{n}": [1] for n in range(2001)}, {"a": pa.nulls(2**20 + 1, pa.string())}])
def test_more_rows_or_columns_than_bytes_can_hold(table, tmp_path):
    pq.write_table(pa.table(table), tmp_path / "a.parquet", compression="zstd", write_statistics=False)
    with pytest.raises(DatasetError, match="promises [0-9,]* rows of [0-9,]* columns"):
        PairStore(tmp_path)[0]


def test_page_headers_that_lie():
    """Lengths below zero, runs without end, numbers of a thousand bytes: places are not looked for, at once."""
    page = bytes([0x15, 0, 0x15, 0, 0x15, 1, 0x2C, 0x15, 0, 0x15, 0, 0x15, 0, 0x15, 0, 0, 0])
    chunk = SimpleNamespace(
        compression="UNCOMPRESSED",
        has_dictionary_page=False,
        physical_type="BYTE_ARRAY",
        num_values=3,
        data_page_offset=0,
        total_compressed_size=10**9,
    )
    with pytest.raises(NoPlainValues):
        places_of(io.BytesIO(page), chunk, most_levels=1)
    with pytest.raises(NoPlainValues):
        places_of(io.BytesIO(b"\x15" + b"\xff" * 2**20), chunk, most_levels=1)
    run = b"\xff\xff\xff\xff\x7f"  # 2^34 groups of eight
    assert _levels(io.BytesIO(struct.pack("<I", len(run) + 1) + run + b"\x05"), 0, 3, 1)[0] == [1, 0, 1]


@pytest.mark.parametrize(
    "name", ["CON.png", "nul", "com1.", "aux .png", "a:b?.png", "a<b>|*.png", "..", ". .png", "x\n\x1b[2J.png"]
)
def test_results_have_names_that_windows_takes(name):
    """Devices are devices with any ending there; some signs, and dots and spaces at the end, are in no name."""
    row = Row(source=Source(name, "a.png"), instruction="snow", seed=0, number=None)
    (path,) = output_paths([row], Path("out"))
    assert re.fullmatch(r"[^<>:\"/\\|?*\x00-\x1f]+\.png", path.name)
    assert not re.fullmatch(r"(con|prn|aux|nul|(com|lpt)\d)\s*(\..*)?", path.name, re.IGNORECASE)
    assert path.parent == Path("out")


def test_an_address_that_never_ends(monkeypatch, capsys, tmp_path):
    class Endless(io.RawIOBase):
        def read(self, size=-1):
            return bytes(size)

    monkeypatch.setattr(edit_sources, "_remote", lambda address: Endless())
    monkeypatch.setattr(edit_sources, "MAX_BYTES", 10 << 20)
    text = refused(capsys, "edit", "https://a.b/c.png", "--instruction", "x", "--out", tmp_path)
    assert "more than 1 GiB" in text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a\0.png", "no file has that name"),
        ("\ud800.png", "no file has that name"),
        ("pipe.png", "is a pipe or a device"),
        ("/dev/zero", "is no file"),
    ],
)
def test_a_table_of_pictures_that_are_none(name, says, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    (tmp_path / "table.jsonl").write_text(json.dumps({"source": "a.png", "edited": name, "target": "a.png"}))
    assert says in refused(
        capsys, "evaluate", "pairs", tmp_path / "table.jsonl", "--out", tmp_path / "out", "--clip", "embedded"
    )


def test_what_argparse_repeats_does_not_move_the_cursor(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "a", ESCAPE])
    assert "\x1b" not in capsys.readouterr().err


def test_captions_that_unfold(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edits, "MOST_UNFOLDED", 2**20)
    path = rows(tmp_path, edit_prompt=[str(n) * 300_000 for n in range(4)])
    assert "unfolds to many times its size" in refused(capsys, "captions", path, "--out", tmp_path / "more.jsonl")


@pytest.mark.parametrize(
    "command",
    [
        ["captions", "x.parquet", "--out", "more.jsonl"],
        ["dataset", "info", "x.parquet"],
        ["dataset", "verify", "x.tar.gz"],
        ["dataset", "import", "x.json", "--out", "out"],
        ["evaluate", "edits", "x.json", "--out", "out"],
    ],
)
def test_a_pipe_is_never_waited_for(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.parquet", "x.tar.gz", "x.json"):
        os.mkfifo(tmp_path / name)
    assert "is a pipe or a device; give a file" in refused(capsys, *command)


def test_a_data_card_that_is_a_pipe(tmp_path):
    rows(tmp_path)
    os.mkfifo(tmp_path / "README.md")
    assert open_pairs(tmp_path).licences() == set()


def test_a_gzipped_tar_that_unfolds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "UNFOLDED", 1 << 20)
    for name, size in (("sound.tar.gz", (1 << 20) - 10_240 - 1024), ("bomb.tar.gz", 30 << 20)):
        member = tarfile.TarInfo("a.png")
        member.size = size
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            tar.addfile(member, io.BytesIO(bytes(size)))
    assert "unfolds to more than" in refused(capsys, "dataset", "info", tmp_path / "bomb.tar.gz")
    assert "unfolds" not in refused(capsys, "dataset", "info", tmp_path / "sound.tar.gz")


def test_a_clear_mask_that_is_cut_short_or_has_too_many_pixels(tmp_path, monkeypatch):
    Image.new("RGBA", (64, 64), (255, 255, 255, 0)).save(tmp_path / "mask.png", compress_level=0)
    assert open_mask(tmp_path / "mask.png", (8, 8)).getextrema() == (255, 255)
    with monkeypatch.context() as patched:
        patched.setattr(images, "MAX_PIXELS", 64 * 64 - 1)
        with pytest.raises(ImageError, match="more than 0 megapixels"):
            open_mask(tmp_path / "mask.png", (8, 8))
    (tmp_path / "short.png").write_bytes((tmp_path / "mask.png").read_bytes()[:2000])
    with pytest.raises(ImageError, match="short.png is damaged or cut short"):
        open_mask(tmp_path / "short.png", (8, 8))


def test_a_file_s_pixels_are_taken_over_and_a_caller_s_copied(tmp_path, monkeypatch):
    """A copy of a picture of a hundred megapixels is 400 MB."""
    picture = Image.effect_noise((64, 48), 50).convert("RGB")
    picture.save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "copy", None)
    opened = open_image(tmp_path / "a.png")
    assert type(opened) is Image.Image and opened.tobytes() == picture.tobytes()
    monkeypatch.undo()
    ours = open_image(picture)
    ours.paste(0, (0, 0, 64, 48))
    assert picture.getextrema() != ours.getextrema() == ((0, 0),) * 3


def scanned(times):
    """A progressive JPEG whose last scan, one of ten, stands so many times."""
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(stream, "JPEG", progressive=True, quality=60)
    data = stream.getvalue()
    last = data[data.rfind(b"\xff\xc4") : -2]
    return data[:-2] + last * (times - 1) + data[-2:]


@pytest.mark.parametrize(("times", "fits"), [(1, True), (55, True), (56, False), (5000, False)])
def test_a_jpeg_of_many_scans(times, fits):
    """Each goes over all its pixels: ten million of them, ten thousand times, in a file of a megabyte."""
    if fits:
        assert open_image(scanned(times) + b"\xff\xda\0\2" * 99).size == (64, 64)  # a phone's film behind its end
        return
    with pytest.raises(ImageError, match="is a JPEG of more than 64 scans"):
        open_image(scanned(times))


def test_a_large_picture_is_opened_alone(monkeypatch):
    monkeypatch.setattr(pictures, "PLACES", 2)
    monkeypatch.setattr(pictures, "_PLACES", threading.BoundedSemaphore(2))
    inside, most, both = [], [], threading.Barrier(2)

    def meet(pixels):
        with pictures.full_size(pixels):
            both.wait(60)

    def work(pixels):
        with pictures.full_size(pixels):
            inside.append(pixels)
            most.append(tuple(inside))
            time.sleep(0.01)
            inside.remove(pixels)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(meet, [pictures.LARGE] * 2))
        list(pool.map(work, [pictures.LARGE, pictures.LARGE + 1] * 6))
    assert max(map(len, most)) <= 2
    assert all(len(there) == 1 for there in most if pictures.LARGE + 1 in there)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoint": "http://127.0.0.1:9/x.ckpt"}, "neither beside it nor here"),
        ({"checkpoint": "/etc/passwd"}, "neither beside it nor here"),
        ({"checkpoint": "../../x.ckpt"}, "neither beside it nor here"),
        ({"source": "../a.png"}, "neither beside it nor here"),
        ({"loras": [3]}, "carries settings that no edit has"),
        ({"loras": [{"name": "../x", "weight": 1}]}, "neither beside it nor here"),
        ({"vae": "x"}, "carries settings that no edit has"),
        ({"control": {"name": "s3://x/y"}}, "neither beside it nor here"),
        ({"steps": 10**9}, "steps"),
    ],
)
@pytest.mark.parametrize("how", ["--like", "--verify"])
def test_settings_of_a_stranger_s_picture_lead_nowhere(how, changes, says, tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    settings = {"instruction": "snow", "seed": 0, "source": "a.png", "checkpoint": "embedded", "size": "paper"}
    path = save_image(Image.new("RGB", (64, 64)), tmp_path / "result.png", {**settings, **changes})
    assert says in refused(capsys, "edit", how, path, "--out", tmp_path / "out.png")
