"""The store: whole at every instant, resumed without loss, read by the hub's own reader, quick to open."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ip2p_engine.data import parquet, store
from ip2p_engine.data.store import PairRecord, PairStore, PairWriter
from ip2p_engine.errors import ConfigError, DatasetError
from ip2p_engine.files import locked

ROOT = Path(__file__).parents[2]
MANIFEST = {"config": {"steps": 20, "guidance": {"low": 7.5}}, "seeds": [0, 10]}


def picture(n, kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (n % 256, 0, 0)).save(stream, kind)
    return stream.getvalue()


def record(n, **changes):
    fields = {
        "original_image": picture(n),
        "edited_image": picture(n + 1, "JPEG"),
        "edit_prompt": "make it snow",
        "original_prompt": f"a street, number {n}",
        "edited_prompt": f"a street, number {n}, in the snow",
        "seed": n,
        "p": 0.5,
        "cfg": 7.5,
        "sim_direction": n / 1000,
        "key": f"{n:07d}/0",
    }
    return PairRecord(**{**fields, **changes})


def writer(folder, **options):
    return PairWriter(folder, **{"manifest": MANIFEST, "rows_per_shard": 10, **options})


def write(folder, rows, **options):
    with writer(folder, **options) as open_writer:
        for n in rows:
            open_writer.write(record(n))


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "data").iterdir())}


def test_pairs_come_back_as_they_went_in(tmp_path):
    write(tmp_path, range(25))
    pairs = PairStore(tmp_path)
    assert len(pairs) == 25
    assert list(pairs) == [record(n) for n in range(25)] == [pairs[n] for n in range(25)]
    assert pairs[-1] == record(24)
    assert pairs[8:22:6] == [record(8), record(14), record(20)]
    with pytest.raises(IndexError):
        pairs[25]
    assert len(shards(tmp_path)) == 3


def test_columns_come_without_pictures(tmp_path):
    write(tmp_path, range(12))
    pairs = PairStore(tmp_path)
    columns = pairs.columns("sim_direction", "sim_0")
    assert columns == {"sim_direction": [n / 1000 for n in range(12)], "sim_0": [None] * 12}
    assert set(pairs.columns()) == set(vars(record(0))) - {"original_image", "edited_image", "mask"}
    assert pairs.keys() == {record(n).key for n in range(12)}
    with pytest.raises(ConfigError, match="column 'original_image' cannot be listed; choose among"):
        pairs.columns("original_image")


def test_rows_of_several_groups_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROWS_PER_GROUP", 4)
    write(tmp_path, range(25))
    pairs = PairStore(tmp_path)
    for n in (0, 3, 4, 9, 10, 19, 24, 11, 2):
        assert pairs[n] == record(n)


def test_an_empty_run_leaves_an_empty_data_set(tmp_path):
    write(tmp_path, [])
    assert list(PairStore(tmp_path)) == []
    assert PairStore(tmp_path).columns("key") == {"key": []}


def test_a_stopped_run_ends_with_the_files_of_one_that_was_not(tmp_path):
    write(tmp_path / "one", range(33))
    for part in (range(7), range(7, 10), range(10, 31), range(31, 33)):
        write(tmp_path / "two", part)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_no_records_make_no_shard(tmp_path):
    """Nothing to write right after a full shard once began an empty one, which a resumed run did not have."""
    with writer(tmp_path) as open_writer:
        open_writer.write(*map(record, range(10)))
        before = shards(tmp_path)
        open_writer.write()
    assert shards(tmp_path) == before and len(before) == 1


def test_ctrl_c_and_errors_keep_what_was_written(tmp_path):
    for error in (KeyboardInterrupt, RuntimeError):
        folder = tmp_path / error.__name__
        with pytest.raises(error), writer(folder) as open_writer:
            open_writer.write(record(0))
            raise error
        assert list(PairStore(folder)) == [record(0)]


def test_resume_knows_what_exists_and_refuses_it_twice(tmp_path):
    write(tmp_path, range(12))
    with writer(tmp_path) as open_writer:
        open_writer.write(record(12))
        assert open_writer.done_keys() == {record(n).key for n in range(13)}
        for n in (0, 11, 12):
            with pytest.raises(DatasetError, match=f"pair '{record(n).key}' exists in .*; give it a key of its own"):
                open_writer.write(record(n))
        with pytest.raises(DatasetError, match="exists"):
            open_writer.write(record(13), record(13))
        with pytest.raises(DatasetError, match="has no key"):
            open_writer.write(record(14, key=""))
    assert len(PairStore(tmp_path)) == 13


def test_a_group_is_never_cut(tmp_path):
    with writer(tmp_path, rows_per_shard=4) as open_writer:
        for start in range(0, 12, 3):
            open_writer.write(*(record(n) for n in range(start, start + 3)))
    assert [pq.read_metadata(path).num_rows for path in PairStore(tmp_path).shards] == [6, 6]


def test_large_pictures_make_shorter_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BYTES_PER_SHARD", 2 * len(picture(0) + picture(0, "JPEG")))
    write(tmp_path, range(3))
    write(tmp_path, range(3, 6))
    assert [pq.read_metadata(path).num_rows for path in PairStore(tmp_path).shards] == [2, 2, 2]


def test_another_run_may_not_write_here(tmp_path):
    write(tmp_path, range(2))
    other = {**MANIFEST, "config": {"steps": 20, "guidance": {"low": 9.0}}}
    said = r"holds pairs of another run: its config.guidance.low is 7.5 and now it is 9.0; write to a new folder"
    with pytest.raises(DatasetError, match=said), writer(tmp_path, manifest=other):
        pass
    write(tmp_path, range(2, 3))
    assert PairStore(tmp_path).manifest["config"] == MANIFEST["config"]
    assert PairStore(tmp_path).manifest["versions"]["pyarrow"] == pa.__version__


@pytest.mark.parametrize("inside", ["data", "."])
def test_pairs_of_unknown_origin_are_not_written_to(tmp_path, inside):
    """The hub's folder, whose pairs a data folder would hide, or one that lost its manifest."""
    write(tmp_path / "ours", range(2))
    (tmp_path / "foreign" / inside).mkdir(parents=True)
    PairStore(tmp_path / "ours").shards[0].rename(tmp_path / "foreign" / inside / "part.parquet")
    with pytest.raises(DatasetError, match="holds pairs of unknown origin; import it, or write to a new folder"):
        write(tmp_path / "foreign", range(2))
    assert len(PairStore(tmp_path / "foreign")) == 2


def test_newer_software_goes_on_with_a_warning(tmp_path, caplog):
    write(tmp_path, range(2))
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(manifest))
    write(tmp_path, range(2, 3))
    assert "goes on with other software: its versions.torch is '1.0'" in caplog.text
    path.write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(DatasetError, match="schema version 99, and this ip2p reads 1"):
        write(tmp_path, [])


def test_one_writer_a_partition_and_one_way_to_cut(tmp_path):
    with writer(tmp_path, partition=(0, 2)) as first, writer(tmp_path, partition=(1, 2)) as second:
        with pytest.raises(DatasetError, match="has a writer of partition 00000-of-00002; wait"):
            writer(tmp_path, partition=(0, 2)).__enter__()
        with pytest.raises(DatasetError, match="is being written as partition .*same number of partitions"):
            writer(tmp_path).__enter__()
        for n in range(15):
            (first, second)[n % 2].write(record(n))
    assert PairStore(tmp_path).keys() == {record(n).key for n in range(15)}
    with writer(tmp_path) as alone:  # nobody else is alive, so the work may be cut anew
        assert len(alone.done_keys()) == 15
        with pytest.raises(DatasetError, match="exists"):
            alone.write(record(1))


@pytest.mark.parametrize("partition", [(1, 1), (-1, 2), (0, 0)])
def test_impossible_partitions_are_refused(tmp_path, partition):
    with pytest.raises(ConfigError, match=r"partition is .*; give i/n"):
        writer(tmp_path, partition=partition)
    with pytest.raises(ConfigError, match="rows_per_shard is 0"):
        writer(tmp_path, rows_per_shard=0)


def hold(path, ready):
    with locked(path, "", DatasetError):
        ready.set()
        os.kill(os.getpid(), 9)


def test_a_dead_writers_lock_is_free(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, path = context.Event(), tmp_path / ".00000-of-00001.lock"
    process = context.Process(target=hold, args=(path, ready))
    process.start()
    process.join(30)
    assert ready.is_set()
    assert path.exists()
    write(tmp_path, range(3))
    assert len(PairStore(tmp_path)) == 3


def test_a_full_disk_after_another_error_is_said_in_one_sentence(tmp_path, monkeypatch, caplog):
    with pytest.raises(KeyboardInterrupt), writer(tmp_path) as open_writer:
        open_writer.write(record(0))
        monkeypatch.setattr(store, "_write_shard", lambda *arguments: os.write(-1, b""))
        raise KeyboardInterrupt
    (line,) = caplog.records
    assert "the last 1 pairs could not be written" in line.getMessage() and line.exc_info is None


@pytest.mark.parametrize("failing", ["fsync", "replace", "write"])
def test_a_full_disk_leaves_the_data_set_whole(tmp_path, monkeypatch, failing):
    write(tmp_path, range(15))
    before = shards(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*arguments):
        raise full

    said = "No space left on device.*; free some space and repeat the same call: the data set is whole"
    with monkeypatch.context() as patch, pytest.raises(DatasetError, match=said), writer(tmp_path) as open_writer:
        place = {"fsync": (os, "fsync"), "replace": (Path, "replace"), "write": (store, "_write_shard")}[failing]
        patch.setattr(*place, refuse)
        for n in range(15, 22):
            open_writer.write(record(n))
    assert shards(tmp_path) == before
    assert not list((tmp_path / "data").glob(".*"))
    write(tmp_path, range(15, 22))
    assert list(PairStore(tmp_path)) == [record(n) for n in range(22)]


FILL = """
import resource, signal, sys
sys.path.insert(0, {root!r})
from ip2p_engine.errors import DatasetError
from ip2p_engine.data.store import PairRecord, PairWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
texts = dict(edit_prompt="a", original_prompt="b", edited_prompt="c", p=None, cfg=None)
try:
    with PairWriter({folder!r}, manifest={{}}, rows_per_shard=4) as writer:
        for n in range(8):
            size = 100 if n < 4 else 100_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
            writer.write(PairRecord(original_image=bytes(size), edited_image=b"", seed=n, key=str(n), **texts))
except DatasetError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
def test_a_real_limit_of_the_system_is_met_the_same_way(tmp_path):
    code = FILL.format(root=str(ROOT), folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "cannot be written (File too large); free some space and repeat the same call" in run.stderr
    assert PairStore(tmp_path).keys() == set("0123")
    assert len(shards(tmp_path)) == 1


def test_leftovers_of_a_killed_writer_are_cleared_away(tmp_path):
    write(tmp_path, range(2))
    torn = tmp_path / "data" / ".train-00000-of-00001-000001.parquet.0123.part"
    torn.write_bytes(b"PAR1 half")
    assert len(PairStore(tmp_path)) == 2
    write(tmp_path, range(2, 4))
    assert not torn.exists()


def test_broken_and_foreign_files_are_named(tmp_path):
    with pytest.raises(DatasetError, match="is no folder"):
        PairStore(tmp_path / "missing")
    write(tmp_path, range(12))
    last = PairStore(tmp_path).shards[-1]
    last.write_bytes(last.read_bytes()[:-30])
    with pytest.raises(DatasetError, match=f"{last.name} is no whole Parquet file .*; restore it from a copy"):
        PairStore(tmp_path)
    pq.write_table(pa.table({"text": ["a"]}), last)
    with pytest.raises(DatasetError, match="lacks 'original_image'"):
        PairStore(tmp_path)[10]


def test_pairs_of_the_hub_need_only_pictures_and_texts(tmp_path):
    row = vars(record(3))
    names = ("original_prompt", "original_image", "edit_prompt", "edited_prompt", "edited_image")
    columns = {n: [{"bytes": row[n], "path": "x.png"}] if n.endswith("image") else [row[n]] for n in names}
    pq.write_table(pa.table(columns), tmp_path / "train-00000-of-00001.parquet")
    pairs = PairStore(tmp_path)
    assert pairs[0] == replace(record(3), seed=None, p=None, cfg=None, sim_direction=None, key="")
    assert pairs.columns("sim_0", "edit_prompt") == {"sim_0": [None], "edit_prompt": ["make it snow"]}
    assert pairs.keys() == set()


def test_three_columns_are_a_pair(tmp_path):
    row = vars(record(3))
    columns = {name: [{"bytes": row[name], "path": None}] for name in ("original_image", "edited_image")}
    pq.write_table(pa.table({**columns, "edit_prompt": ["make it snow"]}), tmp_path / "train.parquet")
    pair = PairStore(tmp_path)[0]
    assert (pair.edit_prompt, pair.original_prompt, pair.edited_prompt) == ("make it snow", "", "")


def test_a_store_goes_to_other_processes(tmp_path):
    write(tmp_path, range(12))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(PairStore.__getitem__, (PairStore(tmp_path), 11)) == record(11)


@pytest.mark.parametrize("how", ["folder", "parquet"])
def test_the_hubs_reader_sees_pictures(tmp_path, monkeypatch, how):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    write(tmp_path / "pairs", range(12))
    arguments = {"folder": [str(tmp_path / "pairs")], "parquet": ["parquet"]}[how]
    options = {"folder": {}, "parquet": {"data_dir": str(tmp_path / "pairs")}}[how]
    loaded = datasets.load_dataset(*arguments, **options, cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    rows = loaded["train"]
    assert rows.num_rows == 12
    assert rows[11]["original_image"].getpixel((0, 0)) == (11, 0, 0)
    assert rows[5]["edit_prompt"] == "make it snow"
    assert rows.column_names == list(vars(record(0)))


def test_without_pyarrow_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"data sets need pyarrow, which is missing; pip install pyarrow"):
        write(tmp_path, [])


OPEN = """
import re, sys, time
sys.path.insert(0, {root!r})
import pyarrow.parquet
from ip2p_engine.data.store import PairStore
start = time.process_time()
pairs = PairStore({folder!r})
spent = time.process_time() - start
status = open("/proc/self/status").read()  # getrusage would tell of the parent's peak
print(len(pairs), spent, int(re.search(r"VmHWM:\\s+(\\d+)", status).group(1)) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_450_000_rows_open_in_half_a_second_and_200_megabytes(tmp_path):
    """CPU time, which a busy machine does not change; one shard is written and linked 450 times."""
    with PairWriter(tmp_path, manifest={}) as open_writer:
        for n in range(1000):
            open_writer.write(record(n))
    first = PairStore(tmp_path).shards[0]
    for n in range(1, 450):
        os.link(first, first.with_name(f"train-00000-of-00001-{n:06d}.parquet"))
    code = OPEN.format(root=str(ROOT), folder=str(tmp_path))
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    rows, seconds, megabytes = map(float, said.split())
    assert rows == 450_000
    assert seconds <= 0.5
    assert megabytes <= 200


OLD = ("original_image", "edited_image", "edit_prompt", "original_prompt", "edited_prompt", "seed", "p", "cfg")
OLD += ("sim_0", "sim_1", "sim_image", "sim_direction", "key")


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "NONE"}, {"compression": "SNAPPY"}, {"data_page_size": 200, "write_batch_size": 3}]
    + [{"row_group_size": 7}, {"data_page_version": "2.0"}, {"use_dictionary": True, "compression": "NONE"}],
    ids=["ours", "plain", "compressed", "many pages", "many groups", "second pages", "dictionary"],
)
def test_a_row_alone_is_the_row_among_others(tmp_path, options):
    """However the file was written, by whatever version; some rows have masks."""
    rows = [record(n, mask=picture(n) if n % 3 else None, original_image=os.urandom(50 * n)) for n in range(60)]
    with writer(tmp_path, rows_per_shard=100) as open_writer:
        open_writer.write(*rows)
    path = PairStore(tmp_path).shards[0]
    if options:
        plain = {"compression": "NONE", "use_dictionary": False}
        pq.write_table(pq.read_table(path), path, **{**plain, **options})
    pairs = PairStore(tmp_path)
    assert [pairs[n] for n in random.Random(0).sample(range(60), 60)] == random.Random(0).sample(rows, 60)
    assert list(pairs) == rows


def test_a_row_alone_reads_its_own_bytes(tmp_path, monkeypatch):
    """Not the hundred rows of its group, of a store of 0.1 too."""
    with writer(tmp_path, rows_per_shard=300) as open_writer:
        for n in range(300):
            open_writer.write(record(n, original_image=os.urandom(5000)))
    path = PairStore(tmp_path).shards[0]
    pq.write_table(pq.read_table(path).select(OLD), path, row_group_size=100, compression="NONE", use_dictionary=False)
    monkeypatch.setattr(parquet, "_read_group", lambda *arguments: pytest.fail("a group was read"))
    pairs = PairStore(tmp_path)
    assert len({pairs[n].original_image for n in (250, 3, 120, 299, 0, 3)}) == 5
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DatasetError, match="restore it from a copy"):
        pairs[299]


MORE = {"mask": picture(7), "kind": "style", "scores": {"o_score": 9.0}, "session": "a", "licence": "MIT"}


def test_masks_kinds_scores_and_licences_are_carried(tmp_path):
    rich = record(0, **MORE, paraphrases=("let it snow",))
    with writer(tmp_path) as open_writer:
        open_writer.write(rich, record(1))
    assert list(PairStore(tmp_path)) == [rich, record(1)]
    assert PairStore(tmp_path).columns("scores", "kind") == {
        "scores": [{"o_score": 9.0}, None],
        "kind": ["style", None],
    }


def test_a_store_of_the_first_columns_is_gone_on_with(tmp_path, caplog):
    """Its shards keep one schema, or ``datasets`` would not open the folder."""
    write(tmp_path, range(3))
    first = PairStore(tmp_path).shards[0]
    pq.write_table(pq.read_table(first).select(OLD), first)
    with writer(tmp_path) as open_writer:
        for n in range(3, 14):
            open_writer.write(record(n, **MORE))
    assert list(PairStore(tmp_path)) == [record(n) for n in range(14)]
    assert {tuple(pq.read_schema(path).names) for path in PairStore(tmp_path).shards} == {OLD}
    assert "was begun without columns for kind, licence, mask, scores, session" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("seed", "../../x", "a whole number"),
        ("seed", 2**63, "a whole number below 2"),
        ("seed", 1.5, "a whole number"),
        ("seed", True, "a whole number"),
        ("sim_0", '"><script>', "a number"),
        ("p", [0.5], "a number"),
        ("cfg", False, "a number"),
        ("edit_prompt", ["a", "b"], "a text"),
        ("edit_prompt", None, "without edit_prompt"),
        ("edit_prompt", "half \ud800", "half a letter"),
        ("key", 7, "a text"),
        ("original_image", "a.png", "an encoded picture"),
        ("edited_image", None, "without edited_image"),
        ("scores", {"a": "high"}, "a number"),
        ("scores", {"a": float("nan")}, "finite numbers by name"),
        ("paraphrases", "one", "a list of texts"),
    ],
)
def test_types_are_checked_where_a_row_becomes_a_pair(column, value, said):
    with pytest.raises(DatasetError, match=f"{column}.*{said}|it is {said}"):
        record(1, **{column: value})


def test_numbers_of_other_libraries_are_numbers():
    import numpy as np

    found = record(1, seed=3.0, sim_0=np.float32(0.5), p=1, original_image=bytearray(picture(1)))
    assert (found.seed, found.sim_0, found.p) == (3, 0.5, 1.0)
    assert [type(value) for value in (found.seed, found.sim_0, found.p, found.original_image)] == [
        int,
        float,
        float,
        bytes,
    ]
    assert record(1, seed=np.int64(2**63 - 1)).seed == 2**63 - 1
    assert record(1, seed=float("nan")).seed is None  # a hole in pandas' column of whole numbers


def test_one_bad_row_is_named_and_the_others_are_there(tmp_path, caplog):
    write(tmp_path, range(4))
    path = PairStore(tmp_path).shards[0]
    rows = pq.read_table(path).to_pylist()
    rows[2]["edit_prompt"] = None
    pq.write_table(pa.Table.from_pylist(rows), path)
    pairs = PairStore(tmp_path)
    found = list(pairs.outcomes())
    assert [one.key for one in found if isinstance(one, PairRecord)] == [record(n).key for n in (0, 1, 3)]
    assert str(found[2]).endswith(f"{path.name}, row 3: it is without edit_prompt; fill it in, or leave the row out")
    with pytest.raises(DatasetError, match="row 3: it is without edit_prompt"):
        pairs[2]
    for row in rows:
        row["sim_0"] = "high"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert PairStore(tmp_path).columns("sim_0") == {"sim_0": [None] * 4}
    assert "4 of 4 rows have a sim_0 of the wrong type, left out" in caplog.text


def test_a_lost_shard_is_noticed(tmp_path):
    write(tmp_path, range(25))
    assert PairStore(tmp_path).lost() == []
    (tmp_path / "data" / "train-00000-of-00001-000001.parquet").unlink()
    assert PairStore(tmp_path).lost() == ["train-00000-of-00001-000001.parquet"]
    with pytest.raises(DatasetError, match="has lost train-00000-of-00001-000001.parquet; restore it from a copy"):
        write(tmp_path, [])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "x.parquet")
    with pytest.raises(DatasetError, match="x.parquet is a pipe or a device; give a file"):
        PairStore(tmp_path)


@pytest.mark.parametrize("name", ["versions", "work"])
def test_a_manifest_of_other_types_is_named(tmp_path, name):
    write(tmp_path, range(1))
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: []}))
    with pytest.raises(DatasetError, match=rf"manifest.json has the {name} \[\]; restore it from a copy"):
        write(tmp_path, [])


@pytest.mark.slow
def test_kills_at_random_instants_change_nothing():
    """CONTRIBUTING's longer run: python tests/robustness/kill_store.py --kills 50."""
    script = ROOT / "tests" / "robustness" / "kill_store.py"
    command = [sys.executable, script, "--kills", "5", "--rows", "300"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout)["kills"] == 5
