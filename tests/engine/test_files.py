"""Writing whole or not at all: at every place where a kill may fall, the old or the new stands under the name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ip2p_engine import files
from ip2p_engine.files import whole_file, whole_folder, whole_path

ROOT = Path(__file__).parents[2]
WRITER = """
import os, sys
from pathlib import Path
from ip2p_engine import files
crash, exchanges, target = sys.argv[1], sys.argv[2] == "True", Path(sys.argv[3])

def dying(function, when):
    def call(*arguments, **options):
        if crash.startswith("before") and when(*arguments):
            os._exit(9)
        result = function(*arguments, **options)
        if when(*arguments):
            os._exit(9)
        return result
    return call

if not exchanges:
    files._exchange = lambda *names: False
place = crash.partition(" ")[2]
if place == "exchange":
    files._exchange = dying(files._exchange, lambda *names: True)
elif place == "first rename":
    Path.replace = dying(Path.replace, lambda one, other: one == target)
elif place == "second rename":
    Path.replace = dying(Path.replace, lambda one, other: other == target)
with files.whole_folder(target) as new:
    (new / "inside").mkdir()
    (new / "inside" / "file").write_text("new")
    if place == "writing":
        os._exit(9)
"""


def fill(folder: Path, text: str) -> None:
    with whole_folder(folder) as new:
        (new / "inside").mkdir()
        (new / "inside" / "file").write_text(text)


def killed(target: Path, crash: str, *, exchanges: bool) -> None:
    code = [sys.executable, "-c", WRITER, crash, str(exchanges), str(target)]
    assert subprocess.run(code, cwd=ROOT, check=False).returncode == 9


@pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged in one step on Linux")
@pytest.mark.parametrize(
    ("crash", "left"), [("at writing", "old"), ("before exchange", "old"), ("after exchange", "new")]
)
def test_a_kill_leaves_the_old_or_the_new_folder_under_the_name(crash, left, tmp_path):
    fill(tmp_path / "folder", "old")
    killed(tmp_path / "folder", crash, exchanges=True)
    assert (tmp_path / "folder" / "inside" / "file").read_text() == left
    fill(tmp_path / "folder", "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "inside" / "file").read_text() == "newer"


@pytest.mark.parametrize("crash", ["before first rename", "after first rename", "after second rename"])
def test_without_an_exchange_the_next_writer_restores_the_old_folder(crash, tmp_path):
    target = tmp_path / "folder"
    fill(target, "old")
    killed(target, crash, exchanges=False)
    with pytest.raises(KeyError), whole_folder(target) as new:
        assert (target / "inside" / "file").read_text() == ("new" if "second" in crash else "old")
        assert list(new.iterdir()) == []
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("whole", [whole_file, whole_path, whole_folder])
def test_an_error_leaves_what_was_there_and_nothing_else(whole, tmp_path):
    for was_there in (False, True):
        with pytest.raises(KeyError), whole(tmp_path / "target"):
            raise KeyError
        assert [path.name for path in tmp_path.iterdir()] == ["target"] * was_there
        (tmp_path / "target").mkdir(exist_ok=True)


def test_writers_of_one_name_are_not_in_each_others_way(tmp_path):
    with whole_file(tmp_path / "file") as one:
        one.write(b"one")
        with whole_file(tmp_path / "file") as other:
            other.write(b"other")
        assert (tmp_path / "file").read_bytes() == b"other"
    assert (tmp_path / "file").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("locks", [True, False])
def test_only_what_a_dead_writer_left_is_removed(locks, tmp_path, monkeypatch):
    if not locks:  # as on Windows, and on disks that lock nothing
        monkeypatch.setattr(files, "fcntl", None)
    left = tmp_path / ".file.0.part"
    left.mkdir()
    (left / "new").write_bytes(b"half")
    with whole_file(tmp_path / "other") as stream:
        stream.write(b"other")
    assert left.exists()
    with whole_file(tmp_path / "file") as stream:
        stream.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert left.exists() is not locks


def test_a_name_of_the_full_length_has_a_writer(tmp_path):
    with whole_file(tmp_path / ("ä" * 127)) as stream:
        stream.write(b"whole")
    assert os.listdir(tmp_path) == ["ä" * 127]


def test_what_a_killed_writer_left_beside_a_whole_file_is_swept(tmp_path):
    """Killed between the renaming and its own cleaning up, of a file that is never written again."""
    dead = tmp_path / "data" / ".a.parquet.0.part"
    dead.mkdir(parents=True)
    (dead / "lock").touch()
    (tmp_path / "data" / "a.parquet").touch()
    with files.whole_file(tmp_path / "b"):
        files.sweep(tmp_path)
        assert not dead.exists()
        assert len(list(tmp_path.glob(".b*.part"))) == 1, "a living writer keeps its place"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.parquet", "b", "data"]


def test_a_pipe_or_a_device_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match="a device or a pipe"), whole_file(path) as stream:
            stream.write(b"x")
    assert (tmp_path / "pipe").is_fifo() and Path(os.devnull).is_char_device()
