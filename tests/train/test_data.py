"""Where pairs come from, which of them a step sees, and how they are cut."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from hashlib import blake2b
from itertools import islice, product

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_engine.captions.edits import in_test_split
from ip2p_engine.data.split import near_groups
from ip2p_engine.data.split import test_rows as split_of
from ip2p_engine.data.store import PairWriter
from ip2p_engine.data.tools import export_dataset
from ip2p_engine.errors import ConfigError, DatasetError, Interrupted
from ip2p_engine.hooks import Hooks
from ip2p_engine.train import TrainConfig
from ip2p_engine.train.augment import bucket_shapes, crop_pair, draw_crop, nearest_shape, size_ids
from ip2p_engine.train.batches import PictureReader, Share, batches
from ip2p_engine.train.order import make_order
from ip2p_engine.train.randomness import draw, stream
from ip2p_engine.train.sources import Example, measured_rows, open_pair, open_source
from ip2p_engine.train.validation import ValidationSet

SMALL = TrainConfig(steps=6, batch_size=4, resolution=64, resize=(64, 72), workers=0)
WHOLE = Share(rank=0, world=1, micro=4)


@pytest.fixture(autouse=True)
def no_wait_at_a_streams_end(monkeypatch):
    """The datasets library sleeps for seconds after a stream's last row, for the sake of threads at Python's exit."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def seen(source, config=SMALL, *, share=WHOLE, first=0):
    """All micro-batches of a process."""
    return list(batches(PictureReader(source, config), make_order(source, config), config, share, first))


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


# Sources


def texts(source):
    """Instructions and pictures of the first rows."""
    examples = list(islice(source.epoch(0), 10)) if hasattr(source, "epoch") else [source[n] for n in range(10)]
    pairs = [open_pair(example) for example in examples]
    return sorted((pair.instruction, pair.original.tobytes(), pair.edited.tobytes()) for pair in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, store, records):
    """The same ten pairs in foreign layouts."""
    home = tmp_path_factory.mktemp("layouts")
    export_dataset(store, home / "original")
    (home / "pictures").mkdir()
    rows = []
    for number, pair in enumerate(records):
        names = [f"pictures/{number}{suffix}.png" for suffix in "ab"]
        for name, data in zip(names, (pair.original_image, pair.edited_image), strict=True):
            (home / name).write_bytes(data)
        rows.append({"input": names[0], "text": pair.edit_prompt, "output": names[1]})
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tarfile.open(home / "shard.tar", "w") as tar:
        for number, pair in enumerate(records):
            parts = {"a.png": pair.original_image, "b.png": pair.edited_image, "json": _json(pair)}
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    _parquet(home / "mine.parquet", records)
    return home


def _json(pair):
    return json.dumps({"edit": {"instruction": pair.edit_prompt}}).encode()


def _parquet(path, records):
    import pyarrow
    import pyarrow.parquet

    columns = {
        "before": [{"bytes": pair.original_image, "path": None} for pair in records],
        "say": [pair.edit_prompt for pair in records],
        "after": [{"bytes": pair.edited_image, "path": None} for pair in records],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mine.parquet", {"columns": ("before", "say", "after")}),
        ("mine.parquet", {"columns": ("before", "say", "after"), "streaming": True}),
        ("pairs.jsonl", {"columns": ("input", "text", "output")}),
        ("shard.tar", {"columns": ("a.png", "json.edit.instruction", "b.png"), "streaming": True}),
    ],
    ids=["parquet", "parquet, streamed", "JSON lines", "webdataset"],
)
def test_foreign_data_sets_give_the_same_pairs(folder, store, name, settings):
    source = open_source(folder / name, TrainConfig(**settings))
    assert texts(source) == texts(open_source(store, TrainConfig()))


def test_the_original_layout(folder, store):
    """Its pictures are JPEGs, so they are near and not equal."""
    ours, theirs = (texts(open_source(path, TrainConfig())) for path in (store, folder / "original"))
    assert [row[0] for row in ours] == [row[0] for row in theirs]
    gap = np.frombuffer(ours[0][1], np.uint8).astype(int) - np.frombuffer(theirs[0][1], np.uint8)
    assert abs(gap).mean() < 3


def test_a_sequence_of_pairs(records, store):
    assert texts(open_source(records, TrainConfig())) == texts(open_source(store, TrainConfig()))


def test_the_test_split_can_be_held_out_and_is_counted(records, store, tmp_path, run, caplog):
    """Some captions of every store are those that ``ip2p evaluate`` measures on."""
    captions = [f"a photo of {n}" for n in range(200)]
    measured = [n for n, caption in enumerate(captions) if in_test_split(caption)]
    pairs = [replace(records[n % 10], original_prompt=text, key=f"x/{n}") for n, text in enumerate(captions)]
    with PairWriter(tmp_path / "pairs", manifest={}) as writer:
        writer.write(*pairs)
    for data in (tmp_path / "pairs", pairs):
        everything, rest = (open_source(data, TrainConfig(hold_out_test=out)) for out in (False, True))
        assert measured_rows(everything) == measured != []
        assert measured_rows(rest) == []
        names = [rest[row].name for row in range(len(rest))]
        assert names == [f"pair x/{n}" for n in range(200) if n not in measured]
        assert rest.identity != everything.identity
        assert [everything[row].name for row in range(200)] == [f"pair x/{n}" for n in range(200)]
    run("all", data=tmp_path / "pairs", hooks=Hooks(should_stop=lambda: True))
    assert f"{len(measured)} of 200 pairs are of the test split" in caplog.text
    assert json.loads((tmp_path / "all" / "run.json").read_text())["test_pairs"] == len(measured)
    caplog.clear()
    run("rest", data=tmp_path / "pairs", hold_out_test=True, hooks=Hooks(should_stop=lambda: True))
    assert "test split" not in caplog.text


def test_a_test_split_that_nothing_names_cannot_be_held_out(folder, records):
    with pytest.raises(ConfigError, match=r"holds out none of the 10 pairs of .*original \(by pictures\); bring more"):
        open_source(folder / "original", TrainConfig(hold_out_test=True))
    with pytest.raises(ConfigError, match="holds out none of the 10 pairs of the list of pairs"):
        open_source(records, TrainConfig(hold_out_test=True))


def test_a_column_that_is_missing_is_named(folder):
    with pytest.raises(DatasetError, match="has the columns .*before.* and no 'picture'"):
        open_source(folder / "mine.parquet", TrainConfig(columns=("picture", "say", "after")))


def test_no_data_set(tmp_path):
    with pytest.raises(DatasetError, match="is no known layout; give a folder of"):
        open_source(tmp_path, TrainConfig())
    (tmp_path / "notes.md").write_text("?")
    with pytest.raises(DatasetError, match="ends in '.md'"):
        open_source(tmp_path / "notes.md", TrainConfig())


def test_an_instruction_is_no_path(folder, tmp_path):
    """One longer than a file's name may be, and one that names a file beside the data set."""
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    (tmp_path / "snow").touch()
    rows = [{"input": "pictures/0a.png", "text": text, "output": "pictures/0b.png"} for text in ("snow " * 80, "snow")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for streaming in (False, True):
        config = TrainConfig(columns=("input", "text", "output"), streaming=streaming)
        source = open_source(tmp_path / "pairs.jsonl", config)
        examples = source.epoch(0) if streaming else [source[0], source[1]]
        assert sorted(open_pair(example).instruction for example in examples) == ["snow", "snow " * 80]


def test_a_picture_in_no_possible_file_breaks_its_own_row(tmp_path):
    row = {"input": "x" * 300, "text": "snow", "output": "b.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    source = open_source(tmp_path / "pairs.jsonl", TrainConfig(columns=("input", "text", "output")))
    with pytest.raises(DatasetError, match="row 1: .*cannot be read"):
        open_pair(source[0])


def test_a_stream_that_breaks_off_says_so(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"input": "a", "text": "b", "output": "c"}\n{"inp')
    config = TrainConfig(columns=("input", "text", "output"), streaming=True)
    with pytest.raises(DatasetError, match="the stream broke off"):
        list(open_source(tmp_path / "pairs.jsonl", config).epoch(0))


def test_a_saved_data_set_can_be_streamed_and_a_store_cannot(folder, store, records, tmp_path):
    import datasets

    saved = datasets.Dataset.from_parquet(str(folder / "mine.parquet"), cache_dir=str(tmp_path / "cache"))
    saved.save_to_disk(str(tmp_path / "saved"))
    config = TrainConfig(columns=("before", "say", "after"), streaming=True)
    plain = open_source(tmp_path / "saved", replace(config, streaming=False))
    assert texts(open_source(tmp_path / "saved", config)) == texts(plain) == texts(open_source(store, TrainConfig()))
    for data in (store, folder / "original", records):
        with pytest.raises(ConfigError, match="cannot be streamed; leave streaming out"):
            open_source(data, TrainConfig(streaming=True))


def test_an_empty_store_holds_no_pair(tmp_path):
    with PairWriter(tmp_path, manifest={}):
        pass
    with pytest.raises(DatasetError, match="holds no pair; give a data set that does"):
        open_source(tmp_path, TrainConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": None}, "row 7: the instruction is NoneType"),
        ({"instruction": " "}, "row 7: the instruction is empty; give a text"),
        ({"original": None}, "row 7: a picture is missing"),
        ({"edited": b"GIF"}, "row 7: .* is not a picture"),
    ],
)
def test_what_cannot_be_trained_on_is_named(records, change, message):
    whole = {"original": records[0].original_image, "instruction": "x", "edited": records[0].edited_image}
    with pytest.raises(DatasetError, match=message):
        open_pair(Example(name="row 7", **{**whole, **change}))


def test_broken_rows_are_replaced_alike_however_a_stream_is_cut(folder, records):
    import pyarrow.parquet

    path = folder / "broken.parquet"
    _parquet(path, [replace(pair, edited_image=b"") if n in (2, 3) else pair for n, pair in enumerate(records)])
    settings = replace(SMALL, columns=("before", "say", "after"), streaming=True, shuffle_buffer=3)
    one = seen(open_source(path, settings), settings)
    two = [seen(open_source(path, settings), settings, share=Share(rank=r, world=2, micro=2)) for r in (0, 1)]
    assert any(batch.broken for batch in one)
    for step, batch in enumerate(one):
        for rank in (0, 1):
            assert two[rank][step].instructions == batch.instructions[rank::2]
    assert len(pyarrow.parquet.read_table(path)) == 10


# Order


def test_every_pair_is_seen_once_an_epoch(store):
    source = open_source(store, SMALL)
    orders = [place for places in islice(make_order(source, SMALL).walk(0), 5) for place in places]
    rows = [place.candidates[0] for place in orders]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


def test_the_order_is_a_function_of_the_seed_and_the_step(store):
    source = open_source(store, SMALL)
    straight = list(islice(make_order(source, SMALL).walk(0), 5))
    assert list(islice(make_order(source, SMALL).walk(3), 2)) == straight[3:]
    assert list(islice(make_order(source, replace(SMALL, seed=1)).walk(0), 5)) != straight


def test_a_stream_goes_on_where_it_was(folder):
    settings = replace(SMALL, columns=("before", "say", "after"), streaming=True, shuffle_buffer=4)
    straight = seen(open_source(folder / "mine.parquet", settings), settings)
    rest = seen(open_source(folder / "mine.parquet", settings), settings, first=4)
    assert [batch.instructions for batch in rest] == [batch.instructions for batch in straight[4:]]
    assert torch.equal(rest[0].tensors["pixels"], straight[4].tensors["pixels"])


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing(store, records, tmp_path, streaming):
    """The datasets library would give each worker other files of a stream."""
    settings, data = replace(SMALL, steps=3), store
    if streaming:
        settings = replace(settings, streaming=True, columns=("before", "say", "after"), shuffle_buffer=4)
        data = tmp_path
        for part in (0, 1):
            _parquet(tmp_path / f"{part}.parquet", records[5 * part : 5 * part + 5])
    source = open_source(data, settings)
    alone, helped = (seen(source, replace(settings, workers=count), share=replace(WHOLE, micro=3)) for count in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert a.instructions == b.instructions
        assert torch.equal(a.tensors["pixels"], b.tensors["pixels"])
        assert torch.equal(a.draws.noise, b.draws.noise)


def test_buckets_keep_aspects_and_each_step_has_one_shape(records):
    wide = [
        replace(r, original_image=_stretched(r.original_image), edited_image=_stretched(r.edited_image))
        for r in records[:3]
    ]
    data = [*wide, *records[3:]]
    settings = replace(SMALL, buckets=True, steps=8, batch_size=2)
    source = open_source(data, settings)
    shapes = [
        tuple(batch.tensors["pixels"].shape[-2:]) for batch in seen(source, settings, share=replace(WHOLE, micro=2))
    ]
    assert set(shapes) == {(64, 64), (48, 80)}
    places = islice(make_order(source, settings).walk(0), 6)
    epoch = [place.candidates[0] for step in places for place in step]
    assert set(epoch) == set(range(10))


def test_substitutes_have_the_shape_of_the_row_they_stand_in_for(records):
    """A cached row has no other shape. Only where a whole bucket is broken another one's rows are cut to fit."""
    data = [replace(r, original_image=_stretched(r.original_image)) if n < 3 else r for n, r in enumerate(records)]
    settings = replace(SMALL, buckets=True)
    order = make_order(open_source(data, settings), settings)
    for place in (place for places in islice(order.walk(0), 4) for place in places):
        alike = range(3) if place.size == (80, 48) else range(3, 10)
        assert sorted(list(place.candidates)[: len(alike)]) == list(alike)
        assert list(place.candidates)[len(alike) :] == list(range(10))


def test_shapes_follow_from_headers_and_what_has_none_goes_with_the_commonest(records):
    wide = [replace(r, original_image=_stretched(r.original_image)) for r in records[:3]]
    torn = replace(records[3], original_image=records[3].original_image[:100])
    data, settings = [*wide, torn, replace(records[4], original_image=b"")], replace(SMALL, buckets=True, batch_size=5)
    order = make_order(open_source(data, settings), settings)
    rows = {place.candidates[0]: place.size for places in islice(order.walk(0), 2) for place in places}
    assert rows == {0: (80, 48), 1: (80, 48), 2: (80, 48), 3: (64, 64), 4: (80, 48)}
    known = make_order(open_source(data, settings), settings, broken={3})
    assert {place.size for places in islice(known.walk(0), 2) for place in places} == {(80, 48)}


def test_reading_sizes_can_be_stopped(records):
    settings = replace(SMALL, buckets=True)
    with pytest.raises(Interrupted, match="stopped after the sizes of 0 of 10 pictures"):
        make_order(open_source(records, settings), settings, hooks=Hooks(should_stop=lambda: True))


def _stretched(data):
    return png(Image.open(io.BytesIO(data)).resize((128, 72)))


def test_bucket_shapes():
    shapes = bucket_shapes(512)
    assert (512, 512) in shapes
    assert all(w % 64 == h % 64 == 0 and w * h <= 512**2 and max(w, h) <= 2 * min(w, h) for w, h in shapes)
    assert shapes[nearest_shape((1600, 900), shapes)] == (640, 384)
    assert shapes[nearest_shape((900, 1600), shapes)][0] < 512


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match="batch_size is 4 and 3 processes share it"):
        Share.of(SMALL, 0, 3)


# Crops


def ramp(width, height):
    """A picture whose red and green say where a pixel was."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(300, 300), (640, 400), (64, 200), (256, 256)])
def test_crops_cover_and_keep_the_aspect(size):
    settings = TrainConfig()
    for n in range(20):
        crop = draw_crop(size, (256, 256), settings, stream(0, "crop", n))
        assert 256 <= min(crop.resized) <= 288
        assert crop.resized[0] / crop.resized[1] == pytest.approx(size[0] / size[1], rel=0.01)
        assert 0 <= crop.left <= crop.resized[0] - 256
        assert 0 <= crop.top <= crop.resized[1] - 256


def test_both_pictures_get_the_same_crop():
    picture = ramp(100, 80)
    for n in range(6):
        crop = draw_crop(picture.size, (64, 64), SMALL, stream(0, "crop", n))
        before, after = crop_pair((picture, picture), crop)
        assert torch.equal(before, after)
        assert (before[0, 0, 0] > before[0, 0, -1]) == crop.mirrored


def test_size_ids_say_what_was_cut():
    crop = draw_crop((640, 400), (256, 256), TrainConfig(), stream(0, "crop", 3))
    assert size_ids(crop).tolist() == [400, 640, crop.top, crop.left, 256, 256]


# Draws


def test_draws_do_not_depend_on_the_batch_they_are_made_in():
    together = draw(0, 5, [0, 1, 2, 3], (4, 8, 8))
    alone = draw(0, 5, [2], (4, 8, 8))
    for name, value in vars(alone).items():
        assert torch.equal(value[0], getattr(together, name)[2])


def test_draws_follow_from_seed_step_and_position():
    """Digit by digit, so that a resumed run, another machine and a later version draw what this one does."""
    assert stream(7, "noise", 5, 3).initial_seed() == 1866327799260339432
    levels = set()
    for seed, step, position in product((0, 7), (0, 1, 5), (0, 3)):
        digest = blake2b(f"({seed}, 'noise', {step}, {position})".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") // 2)
        drop, level = torch.rand(2, generator=generator, dtype=torch.float64)
        posterior, noise = torch.randn(2, 4, 8, 8, generator=generator)
        offset = torch.randn(4, 1, 1, generator=generator)
        scales = torch.rand(2, generator=generator)  # the last ones drawn, so that 0.1's are what they were
        expected = {"drop": drop.float(), "level": level, "posterior": posterior, "noise": noise, "offset": offset}
        expected["scales"] = scales
        found = vars(draw(seed, step, [position], (4, 8, 8)))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name][0], value) for name, value in expected.items())
        levels.add(float(level))
    assert len(levels) == 12


def test_no_two_examples_of_a_run_share_their_chance(records):
    """One picture over and over: every step and every position has noise, a level and a crop of its own."""
    batches = seen(open_source(records[:1], SMALL))
    assert len({float(u) for batch in batches for u in batch.draws.level}) == 6 * 4
    assert len({float(noise[0, 0, 0]) for batch in batches for noise in batch.draws.noise}) == 6 * 4
    first = [batch.tensors["pixels"][0] for batch in batches]
    assert sum(torch.equal(first[0], other) for other in first[1:]) < 2


def test_draws_have_the_right_distribution():
    chance = draw(0, 0, range(3000), (1, 2, 2))
    for uniform in (chance.drop, chance.level):
        assert abs(uniform.double().mean() - 0.5) < 0.02
        assert uniform.min() >= 0
        assert uniform.max() < 1
    for normal in (chance.noise, chance.posterior, chance.offset):
        assert abs(normal.mean()) < 0.06
        assert abs(normal.std() - 1) < 0.04
    others = (chance.noise[:, 0, 0, 0], chance.posterior[:, 0, 0, 0], chance.level.float())
    correlation = torch.corrcoef(torch.stack([chance.drop, *others]))
    assert (correlation - torch.eye(4)).abs().max() < 0.08


# Validation


class Numbered:
    """Ten pairs named by their row; the pictures of some are broken."""

    identity = "numbered"

    def __init__(self, broken=(), missing=()):
        self.broken, self.missing = broken, missing

    def __len__(self):
        return 10

    def __getitem__(self, row):
        if row in self.missing:
            raise DatasetError(f"row {row}: a picture is missing")
        picture = b"no picture" if row in self.broken else png(Image.new("RGB", (64, 64)))
        return Example(name=f"{row}", original=picture, instruction=f"{row}", edited=picture)


@pytest.mark.parametrize(
    ("count", "broken", "rows"),
    [
        (2, (), "05"),
        (3, (), "048"),
        (3, (0, 4), "815"),
        (10, (), "0123456789"),
        (20, (9,), "012345678"),
    ],
)
def test_validation_is_spread_over_the_data(count, broken, rows):
    chosen = ValidationSet(Numbered(broken), replace(SMALL, validation_count=count))
    assert "".join(pair.name for pair in chosen.pairs) == rows
    chosen = ValidationSet(Numbered(missing=broken), replace(SMALL, validation_count=count))
    assert "".join(pair.name for pair in chosen.pairs) == rows


# Rows that are handed over


class Handed(torch.utils.data.Dataset):
    def __init__(self, rows):
        self._rows = rows

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, row):
        return self._rows[row]


@pytest.fixture
def handed(records):
    """The same pairs as other programs hold them."""
    import datasets

    pictures = [tuple(Image.open(io.BytesIO(data)) for data in (r.original_image, r.edited_image)) for r in records]
    tuples = [(*two, record.edit_prompt) for two, record in zip(pictures, records, strict=True)]
    objects = [{"input_image": before, "edit": said, "output_image": after} for before, after, said in tuples]
    tensors = [(*(torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in t[:2]), t[2]) for t in tuples]
    return {
        "tuples": tuples,
        "our order": [(before, said, after) for before, after, said in tuples],
        "objects": objects,
        "torch": Handed(tuples),
        "torch of objects": Handed(objects),
        "tensors": Handed(tensors),
        "arrays": [tuple(np.array(p) for p in t[:2]) + (t[2],) for t in tuples],
        "datasets": datasets.Dataset.from_list(objects),
    }


KINDS = ("tuples", "our order", "objects", "torch", "torch of objects", "tensors", "arrays", "datasets")


@pytest.mark.parametrize("kind", KINDS)
def test_what_other_programs_hold_is_trained_on(handed, store, kind):
    source = open_source(handed[kind], TrainConfig())
    assert texts(source) == texts(open_source(store, TrainConfig()))
    assert source.identity == open_source(handed[kind], TrainConfig()).identity
    assert len(seen(source, SMALL)) == 6


@pytest.mark.parametrize("data", [7, object(), {"a": 1}, b"pairs", iter([]), [1, 2], [("a", "b")], [{"x": 1}]])
def test_anything_else_is_one_sentence(data):
    with pytest.raises((ConfigError, DatasetError)) as said:
        open_source(data, TrainConfig())
    assert "\n" not in str(said.value)
    assert "give" in str(said.value) or "name picture, instruction" in str(said.value)


def test_a_broken_row_of_theirs_is_one_broken_row(handed):
    class Fails(Handed):
        def __getitem__(self, row):
            if row == 3:
                raise RuntimeError("no disk")
            return super().__getitem__(row)

    source = open_source(Fails(handed["tuples"]), TrainConfig())
    with pytest.raises(DatasetError, match=r"row 3: it cannot be read \(RuntimeError\('no disk'\)\)"):
        source[3]
    assert [broken for batch in seen(source) for broken in batch.broken]


def test_one_of_several_instructions_is_drawn_from_the_seed(handed):
    said = ["make it snow", "let it snow", "snow, please"]
    rows = [(before, after, said) for before, after, _ in handed["tuples"]]
    source = open_source(rows, SMALL)
    drawn = [batch.instructions for batch in seen(source)]
    assert drawn == [batch.instructions for batch in seen(source)]
    assert {one for batch in drawn for one in batch} == set(said)
    assert drawn != [batch.instructions for batch in seen(source, replace(SMALL, seed=1))]
    assert drawn[4:] == [batch.instructions for batch in seen(source, first=4)]


# Several data sets


def folders(tmp_path, records):
    """Two stores of 3 and 7 pairs."""
    for name, part in (("a", records[:3]), ("b", records[3:])):
        with PairWriter(tmp_path / name, manifest={}) as writer:
            licence = "MIT" if name == "a" else "CC-BY-4.0"
            writer.write(*(replace(pair, licence=licence, edit_prompt=f"{name} {n}") for n, pair in enumerate(part)))
    return [tmp_path / "a", tmp_path / "b"]


def test_several_sets_are_drawn_from_by_their_weights(tmp_path, records):
    both = folders(tmp_path, records)
    config = replace(SMALL, data_weights=(0.8, 0.2), steps=200)
    source = open_source(both, config)
    drawn = [place for places in islice(make_order(source, config).walk(0), 200) for place in places]
    said = [source[place.candidates[0]].instruction for place in drawn]
    assert abs(sum(text.startswith("a") for text in said) / 800 - 0.8) < 0.05
    for name, count in (("a", 3), ("b", 7)):  # each set's epochs are whole
        own = [text for text in said if text.startswith(name)]
        assert all(len(set(own[n : n + count])) == count for n in range(0, len(own) - count, count))
    later = [place for places in islice(make_order(source, config).walk(150), 50) for place in places]
    assert later == drawn[600:]
    alone, shared = (
        seen(source, replace(config, steps=6)),
        [seen(source, replace(config, steps=6), share=Share(rank=rank, world=2, micro=2)) for rank in (0, 1)],
    )
    assert [batch.instructions[1::2] for batch in alone] == [batch.instructions for batch in shared[1]]


def test_several_sets_without_weights_are_one(tmp_path, records):
    both = folders(tmp_path, records)
    source = open_source(both, SMALL)
    rows = [place.candidates[0] for places in islice(make_order(source, SMALL).walk(0), 5) for place in places]
    assert sorted(rows) == sorted([*range(10)] * 2)
    assert sorted(source.licences()) == ["CC-BY-4.0", "MIT"]
    with pytest.raises(ConfigError, match="there are 2 data sets and 1 `data_weights`"):
        open_source(both, replace(SMALL, data_weights=(1.0,)))
    with pytest.raises(ConfigError, match="`data_weights` are of several data sets, and there is one"):
        open_source(both[0], replace(SMALL, data_weights=(1.0,)))
    with pytest.raises(ConfigError, match="`data_weights` are .*; give a number above 0"):
        TrainConfig(data_weights=(1, 0))


def test_a_run_on_several_sets_says_what_it_was_made_of(tmp_path, records, run):
    run("several", data=folders(tmp_path, records), data_weights=(1, 1), hooks=Hooks(should_stop=lambda: True))
    about = json.loads((tmp_path / "several" / "run.json").read_text())
    assert about["licences"] == ["CC-BY-4.0", "MIT"]
    assert about["config"]["data_weights"] == [1, 1]


# Splits


def photographs(count):
    """Pictures that differ; each with a near-equal one, smaller and of lower quality."""
    found = []
    for n in range(count):
        noise = np.random.default_rng(n).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC)
        for size, quality in (((96, 96), 95), ((80, 80), 60)):
            stream = io.BytesIO()
            picture.resize(size).save(stream, "JPEG", quality=quality)
            found.append(stream.getvalue())
    return found


def test_without_captions_the_source_pictures_decide(records, tmp_path):
    pictures = photographs(100)
    pairs = [
        replace(records[0], original_image=data, original_prompt="", key=f"x/{n}") for n, data in enumerate(pictures)
    ]
    with PairWriter(tmp_path / "pairs", manifest={}) as writer:
        writer.write(*pairs)
    source = open_source(tmp_path / "pairs", TrainConfig(hold_out_test=True))
    assert (source.split_rule, len(source) + source.held_out) == ("pictures", 200)
    assert 4 <= source.held_out <= 24
    names = [source[row].name for row in range(len(source))]
    kept = {int(name.rpartition("/")[2]) for name in names}
    assert all((n in kept) == (n + 1 in kept) for n in range(0, 200, 2))
    assert open_source(pairs, TrainConfig(hold_out_test=True)).held_out == source.held_out


def test_turns_of_a_session_are_of_one_side(records):
    pictures = photographs(60)[::2]
    pairs = [
        replace(records[0], original_image=data, original_prompt="", session=str(n // 10), key=f"x/{n}")
        for n, data in enumerate(pictures)
    ]
    rule, rows = split_of(pairs, [])
    assert rule == "pictures"
    assert all(sum(row // 10 == session for row in rows) in (0, 10) for session in range(6))


def test_near_groups_are_near():
    far = [0, 0xFFFF_FFFF_FFFF_FFFF, 0x0F0F_0F0F_0F0F_0F0F]
    assert near_groups([far[0], far[0] | 7, far[1], far[1] ^ (1 << 40), None, far[2], far[0] | 0xF000]) == [
        0,
        0,
        far[1] ^ (1 << 40),
        far[1] ^ (1 << 40),
        0,
        far[2],
        0xF000,
    ]
