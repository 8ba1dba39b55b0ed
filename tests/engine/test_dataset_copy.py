"""Data sets in shared storage: whole at every instant, brought up to date, never set back."""

from __future__ import annotations

import json
import os

import fsspec
import pytest

from ip2p_engine.cli import main
from ip2p_engine.clip.filter import PairScores
from ip2p_engine.data.copy import copy_dataset
from ip2p_engine.data.ledger import CandidateLog, CaptionCandidates, pair_key
from ip2p_engine.data.store import PairRecord, PairStore, PairWriter
from ip2p_engine.data.tools import verify
from ip2p_engine.errors import DatasetError
from ip2p_engine.files import locked

SCORES = PairScores(sim_0=0.3, sim_1=0.3, sim_image=0.8, sim_direction=0.4)
PICTURE = b"a picture, as far as a copy is concerned"


def grow(folder, captions, *, partition=(0, 1), config="one", batch=4):
    """A run that makes a pair of each caption, three in a shard, the pictures before their line as in a real one."""
    manifest = {"config": config, "work": {"batch_pairs": batch}}
    with PairWriter(folder, manifest=manifest, partition=partition, rows_per_shard=3) as writer:
        ledger = CandidateLog(folder, partition)
        for caption in captions:
            key = pair_key(caption, caption)
            texts = {"edit_prompt": "make it red", "original_prompt": "a cat", "edited_prompt": "a red cat"}
            pictures = {"original_image": PICTURE, "edited_image": PICTURE}
            writer.write(PairRecord(**pictures, **texts, seed=caption, p=0.5, cfg=7.5, key=key))
        writer.flush()
        rows = [CaptionCandidates(caption=n, edit="", seeds=(n,), scores=(SCORES,), kept=(n,)) for n in captions]
        ledger.append(rows)
    return folder


@pytest.fixture(params=["folder", "memory", "file"])
def shared(request, tmp_path):
    """A place that is empty."""
    storage = fsspec.filesystem("memory")
    if storage.exists("/bucket"):
        storage.rm("/bucket", recursive=True)
    places = {"folder": tmp_path / "shared", "memory": "memory://bucket/pairs", "file": f"file://{tmp_path}/shared"}
    return places[request.param]


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_there_and_back_it_is_the_same(shared, tmp_path):
    store = grow(tmp_path / "store", range(7))
    report = copy_dataset(store, shared)
    assert (report.files, report.present) == (5, 0)
    assert report.bytes == sum(map(len, content(store).values()))
    copy_dataset(shared, tmp_path / "back")
    assert content(tmp_path / "back") == content(store)
    assert PairStore(tmp_path / "back").keys() == PairStore(store).keys()


def test_only_what_may_have_changed_is_copied_again(shared, tmp_path):
    store = grow(tmp_path / "store", range(4))
    copy_dataset(store, shared)
    grow(store, range(4, 8))
    report = copy_dataset(store, shared)
    assert (report.files, report.present) == (3, 2)  # two shards that grew, and the ledger
    copy_dataset(shared, tmp_path / "back")
    assert content(tmp_path / "back") == content(store)


def test_a_run_goes_on_from_a_copy(shared, tmp_path):
    whole, store = grow(tmp_path / "whole", range(8)), grow(tmp_path / "store", range(4))
    copy_dataset(store, shared)
    copy_dataset(shared, tmp_path / "elsewhere")
    grow(tmp_path / "elsewhere", range(4, 8))
    assert content(tmp_path / "elsewhere") == content(whole)


def test_the_parts_of_two_machines_meet(shared, tmp_path):
    for number in range(2):
        copy_dataset(grow(tmp_path / f"machine {number}", range(number, 10, 2), partition=(number, 2)), shared)
    copy_dataset(shared, tmp_path / "back")
    assert PairStore(tmp_path / "back").keys() == {pair_key(n, n) for n in range(10)}
    grow(tmp_path / "machine 0", [10], partition=(0, 2))
    copy_dataset(tmp_path / "machine 0", shared)


def test_a_copy_names_no_pair_that_it_has_not(tmp_path, monkeypatch):
    """A writer at work between the ledger's reading and the shards' copying, and storage that is lost at the end."""
    import ip2p_engine.data.copy as module

    store, target, read = grow(tmp_path / "store", range(4)), tmp_path / "target", module._Place.read
    ledger = store / "candidates" / "00000-of-00001.jsonl"

    def grow_meanwhile(place, name):
        data = read(place, name)
        grow(store, range(4, 9))
        monkeypatch.setattr(module._Place, "read", read)
        return data

    before = ledger.read_bytes()
    monkeypatch.setattr(module._Place, "read", grow_meanwhile)
    copy_dataset(store, target)
    assert (target / "candidates" / ledger.name).read_bytes() == before
    assert len(PairStore(target)) == 9
    assert not [fault for fault in verify(target).faults if "ledger" in fault]
    copy_dataset(store, target)
    assert content(target) == content(store)


def test_half_a_line_is_left_out(shared, tmp_path):
    store = grow(tmp_path / "store", range(2))
    whole = content(store)
    with (store / "candidates" / "00000-of-00001.jsonl").open("a") as stream:
        stream.write('{"caption": 2, "seeds": [')
    copy_dataset(store, shared)
    copy_dataset(shared, tmp_path / "back")
    assert content(tmp_path / "back") == whole


def test_nothing_is_set_back(shared, tmp_path):
    store = grow(tmp_path / "store", range(4))
    copy_dataset(store, tmp_path / "older")
    grow(store, range(4, 6))
    copy_dataset(store, shared)
    with pytest.raises(DatasetError, match=r"(shared|pairs) has more than .*older, such as .*; copy the other way"):
        copy_dataset(tmp_path / "older", shared)
    copy_dataset(shared, tmp_path / "older")
    assert content(tmp_path / "older") == content(store)


@pytest.mark.parametrize("change", [{"config": "another"}, {"batch": 8}])
def test_another_data_set_is_not_written_over(shared, tmp_path, change):
    copy_dataset(grow(tmp_path / "store", range(4)), shared)
    with pytest.raises(DatasetError, match="holds another data set than .*other, or one that was cut"):
        copy_dataset(grow(tmp_path / "other", range(4), **change), shared)


def test_parts_cut_otherwise_do_not_meet(shared, tmp_path):
    copy_dataset(grow(tmp_path / "store", range(4), partition=(0, 2)), shared)
    with pytest.raises(DatasetError, match="is cut into 2 parts, and .* otherwise"):
        copy_dataset(grow(tmp_path / "other", range(4), partition=(0, 3)), shared)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_place_of_a_shard_is_one_sentence(tmp_path):
    """Nobody writes into it, so that reading would never end."""
    store = grow(tmp_path / "store", range(4))
    shard = next((store / "data").glob("*.parquet"))
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(DatasetError, match="is a pipe or a device"):
        copy_dataset(store, tmp_path / "copy")


def test_a_folder_with_a_writer_is_not_written_to(tmp_path):
    store, busy = grow(tmp_path / "store", range(4)), grow(tmp_path / "busy", range(2))
    with (
        locked(busy / ".00000-of-00001.lock", "", DatasetError),
        pytest.raises(DatasetError, match=r"busy is being written \(part 00000-of-00001\)"),
    ):
        copy_dataset(store, busy)
    copy_dataset(store, busy)


def test_lost_storage_leaves_what_was_there(tmp_path, monkeypatch):
    store = grow(tmp_path / "store", range(4))
    copy_dataset(store, "memory://bucket/lost")
    before = shared_content("/bucket/lost")
    grow(store, range(4, 6))
    with monkeypatch.context() as patched:
        patched.setattr("ip2p_engine.data.copy.shutil.copyfileobj", break_off)
        with pytest.raises(DatasetError, match=r"store cannot be copied to memory://bucket/lost \(connection lost\)"):
            copy_dataset(store, "memory://bucket/lost")
    assert shared_content("/bucket/lost") == before
    copy_dataset(store, "memory://bucket/lost")
    copy_dataset("memory://bucket/lost", tmp_path / "back")
    assert content(tmp_path / "back") == content(store)


def shared_content(root):
    storage = fsspec.filesystem("memory")
    return {path: storage.cat_file(path) for path in storage.find(root)}


def break_off(content, stream, size):
    stream.write(content.read(10))
    raise ConnectionError("connection lost")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "nothing holds no data set of ours (manifest.json is missing); import it first"),
        ("nonsense://bucket/pairs", "nonsense://bucket/pairs cannot be copied to"),
    ],
)
def test_a_source_without_a_data_set_is_one_sentence(tmp_path, monkeypatch, capsys, source, message):
    monkeypatch.chdir(tmp_path)
    assert main(["dataset", "copy", source, "target"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_the_command_says_what_it_did(tmp_path, capsys):
    store = grow(tmp_path / "store", range(4))
    assert main(["dataset", "copy", str(store), str(tmp_path / "target"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"files": 4, "bytes": sum(map(len, content(store).values())), "present": 0}
