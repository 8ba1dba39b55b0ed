"""The pair factory: what it makes, and that nothing that stops it changes that."""

from __future__ import annotations

import json
import os
import shutil
import threading
import tracemalloc
from dataclasses import replace

import pytest
import torch

from ip2p_engine.captions.edits import CaptionEdit
from ip2p_engine.clip.filter import FilterConfig, PairScores, filter_candidates
from ip2p_engine.clip.similarity import ClipSimilarity
from ip2p_engine.data.ledger import CandidateLog, CaptionCandidates, read_candidates
from ip2p_engine.data.store import PairStore, PairWriter
from ip2p_engine.data.tools import verify
from ip2p_engine.errors import ConfigError, DatasetError, Interrupted
from ip2p_engine.factory.maker import CandidateMaker, EarlyReject, FactoryConfig, candidate_seed
from ip2p_engine.factory.refilter import clip_of, refilter, rescored
from ip2p_engine.factory.run import Work, make_pairs
from ip2p_engine.factory.workers import LocalWorkers, WorkerPlan
from ip2p_engine.hooks import Hooks
from ip2p_engine.p2p.generator import PairConfig, PairGenerator, PairJob, Preview, draw_settings

COLOURS = ("red", "green", "blue", "yellow")
EDITS = [
    CaptionEdit(caption=f"a large {old} heart", instruction=f"paint it {new}", edited_caption=f"a large {new} heart")
    for old, new in zip(COLOURS, COLOURS[1:], strict=False)
]
KEEP_ALL = FactoryConfig(candidates=2, clip="embedded", filter=None)
OFTEN = Work(batch_pairs=2, save_seconds=0, rows_per_shard=2)


@pytest.fixture(scope="module")
def clip():
    return ClipSimilarity.load("embedded")


@pytest.fixture(scope="module")
def workers_with(tiny_pair_model, clip):
    """Makes workers of an untrained model and the embedded CLIP: (config, settings of the pairs)."""
    model = tiny_pair_model()
    return lambda config, **pairs: LocalWorkers(
        CandidateMaker(PairGenerator(model, PairConfig(steps=2, **pairs)), clip, config)
    )


@pytest.fixture(scope="module")
def everything(workers_with, tmp_path_factory):
    """A run without a filter: every candidate's pictures and scores."""
    folder = tmp_path_factory.mktemp("everything") / "store"
    return folder, make_pairs(EDITS, folder, workers_with(KEEP_ALL), work=OFTEN)


@pytest.fixture(scope="module")
def loose(everything):
    """An untrained network's pictures pass no threshold of the paper's; of one caption none passes these."""
    best = sorted(max(one.sim_direction for one in row.scores) for row in read_candidates(everything[0]))
    middle = (best[0] + best[1]) / 2
    return FilterConfig(min_sim_0=-1, min_sim_1=-1, min_sim_image=-1, min_sim_direction=middle, keep=1)


@pytest.fixture(scope="module")
def filtering(loose):
    return replace(KEEP_ALL, filter=loose)


@pytest.fixture(scope="module")
def workers_of(workers_with, filtering):
    """Makes workers that filters, by default."""
    return lambda config=filtering, **pairs: workers_with(config, **pairs)


@pytest.fixture(scope="module")
def undisturbed(workers_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    return folder, make_pairs(EDITS, folder, workers_of(), work=OFTEN)


def contents(folder):
    return {path.name: path.read_bytes() for place in ("data", "candidates") for path in (folder / place).iterdir()}


def stopping_after(calls):
    """should_stop that says yes from some call on."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def test_a_run_keeps_what_the_filter_keeps_and_the_scores_of_all(undisturbed, loose):
    folder, report = undisturbed
    assert verify(folder).sound
    pairs, rows = list(PairStore(folder)), list(read_candidates(folder))
    assert [row.caption for row in rows] == [0, 1, 2]
    for row in rows:
        assert row.seeds == tuple(candidate_seed(0, row.caption, n) for n in range(2))
        assert row.kept == tuple(row.seeds[n] for n in filter_candidates(row.scores, loose).kept)
        assert [pair.key for pair in pairs if pair.key.startswith(f"{row.caption:07d}/")] == [
            f"{row.caption:07d}/{seed}" for seed in row.kept
        ]
    assert [len(row.kept) for row in rows].count(0) == 1 and len(pairs) == 2
    assert (report.pairs, report.captions, report.filtered.candidates) == (len(pairs), 3, 6)
    assert report.filtered.kept == len(pairs)
    assert json.loads(json.dumps(report.to_dict()))["filtered"]["kept"] == len(pairs)
    assert f"{len(pairs)} pairs of 3 caption pairs" in report.as_text()


def test_a_row_says_how_its_pair_was_made(undisturbed):
    folder, _ = undisturbed
    pair, rows = PairStore(folder)[0], {row.caption: row for row in read_candidates(folder)}
    number, seed = map(int, pair.key.split("/"))
    assert (pair.p, pair.cfg) == draw_settings(seed) and pair.seed == seed
    assert (pair.original_prompt, pair.edit_prompt) == (EDITS[number].caption, EDITS[number].instruction)
    score = rows[number].scores[rows[number].seeds.index(seed)]
    assert (pair.sim_0, pair.sim_image) == (score.sim_0, score.sim_image)
    manifest = PairStore(folder).manifest
    assert manifest["config"]["factory"]["filter"]["keep"] == 1
    assert manifest["config"]["pairs"]["p2p_range"] == [0.1, 0.9]
    assert manifest["work"] == {"batch_pairs": 2}


def test_the_model_s_options_belong_to_the_origin_without_secrets():
    assert WorkerPlan(options={"weights": "ema", "base": None}).origin() == {}
    options = {"weights": "raw", "base": "https://user:secret@host/sd15.safetensors?signed=secret"}
    assert WorkerPlan(options=options).origin() == {"weights": "raw", "base": "https://host/sd15.safetensors"}


def test_candidate_seeds_differ():
    seeds = {candidate_seed(run, row, n) for run in range(3) for row in range(30) for n in range(30)}
    assert len(seeds) == 2700 and all(0 <= seed < 2**48 for seed in seeds)


@pytest.fixture
def beside(monkeypatch):
    """Decoding and scoring beside the walks, as on a GPU; (thread, caption) of each batch."""
    told, finish = [], CandidateMaker._finish

    def finished(self, jobs, z, results):
        told.append((threading.current_thread().name, jobs[0].caption))
        finish(self, jobs, z, results)

    monkeypatch.setattr(CandidateMaker, "overlaps", True)
    monkeypatch.setattr(CandidateMaker, "_finish", finished)
    return told


def test_pictures_that_are_finished_beside_the_walks_are_the_same(undisturbed, workers_of, tmp_path, beside):
    make_pairs(EDITS, tmp_path / "store", workers_of(), work=OFTEN)
    assert contents(tmp_path / "store") == contents(undisturbed[0])
    finished = [caption for thread, caption in beside if thread.startswith("ip2p-pairs")]
    assert finished == [edit.caption for edit in EDITS]


def test_a_slow_disk_does_not_hold_the_next_walk(undisturbed, workers_of, tmp_path, monkeypatch):
    """The first group's shards wait until the second one walks."""
    walking, flush = threading.Event(), PairWriter.flush

    def flushed(self):
        assert walking.wait(60)
        flush(self)

    monkeypatch.setattr(PairWriter, "flush", flushed)
    hooks = Hooks(on_progress=lambda done, total, note: walking.set() if done > KEEP_ALL.candidates else None)
    make_pairs(EDITS, tmp_path / "store", workers_of(), work=OFTEN, hooks=hooks)
    assert contents(tmp_path / "store") == contents(undisturbed[0])


def test_a_disk_that_refuses_ends_the_run(workers_of, tmp_path, monkeypatch):
    def flushed(self):
        raise DatasetError("the disk is full")

    monkeypatch.setattr(PairWriter, "flush", flushed)
    with pytest.raises(DatasetError, match="the disk is full"):
        make_pairs(EDITS, tmp_path / "store", workers_of(), work=OFTEN)


@pytest.mark.parametrize("looks", [3, 5])
def test_what_had_walked_is_kept_when_the_next_is_stopped(undisturbed, workers_of, tmp_path, beside, looks):
    """Two looks a walk: the stop falls into the second or the third group."""
    store = tmp_path / "store"
    with pytest.raises(Interrupted):
        make_pairs(EDITS, store, workers_of(), work=OFTEN, hooks=Hooks(should_stop=stopping_after(looks)))
    assert len(list(read_candidates(store))) == looks // 2
    make_pairs(EDITS, store, workers_of(), work=OFTEN)
    assert PairStore(store).keys() == PairStore(undisturbed[0]).keys()


@pytest.mark.parametrize("save_seconds", [0, pytest.param(3600, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_and_ends_with_the_same_files(undisturbed, workers_of, tmp_path, save_seconds):
    """Three groups of two steps: stopped before each of them, in the midst of one, and at the end."""
    work, stops = replace(OFTEN, save_seconds=save_seconds), 0
    for calls in (0, 3, 4, 100):
        try:
            make_pairs(
                EDITS, tmp_path / "store", workers_of(), work=work, hooks=Hooks(should_stop=stopping_after(calls))
            )
        except Interrupted as error:
            stops += 1
            assert "the same call goes on" in str(error)
            assert verify(tmp_path / "store").sound
    assert stops >= 2
    assert contents(tmp_path / "store") == contents(undisturbed[0])


def test_a_finished_run_makes_nothing_again(undisturbed, workers_of):
    before = contents(undisturbed[0])
    report = make_pairs(EDITS, undisturbed[0], workers_of(), work=OFTEN, hooks=Hooks(should_stop=lambda: True))
    assert report == undisturbed[1] and contents(undisturbed[0]) == before


@pytest.fixture
def looks(monkeypatch, tmp_path):
    """(pairs that the ledger names, those of them that are not in the data set), whenever anything reaches the disk."""
    sync, seen = os.fsync, []

    def look(handle):
        sync(handle)
        named = {f"{row.caption:07d}/{seed}" for row in read_candidates(tmp_path) for seed in row.kept}
        seen.append((len(named), named - PairStore(tmp_path).keys()))

    monkeypatch.setattr(os, "fsync", look)
    return seen


def test_pictures_reach_the_disk_before_the_ledger_names_them(workers_with, tmp_path, looks):
    """A kill at any instant costs work, and no picture."""
    make_pairs(EDITS[:2], tmp_path, workers_with(KEEP_ALL), work=replace(OFTEN, rows_per_shard=100))
    assert [lost for _, lost in looks if lost] == []
    assert {count for count, _ in looks} == {0, 2, 4}


def test_filtering_copies_pictures_before_it_names_them(everything, loose, tmp_path, looks):
    report = refilter(everything[0], tmp_path, loose)
    assert [lost for _, lost in looks if lost] == []
    assert {count for count, _ in looks} == {0, report.filtered.kept}


@pytest.mark.parametrize("lines", [0, 2])
def test_a_kill_between_pictures_and_ledger_doubles_nothing(undisturbed, workers_of, tmp_path, lines):
    """The ledger is behind by some captions, and ends in a torn line."""
    make_pairs(EDITS, tmp_path / "store", workers_of(), work=OFTEN)
    ledger = tmp_path / "store" / "candidates" / "00000-of-00001.jsonl"
    whole = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(whole[:lines]) + whole[lines][:40])
    make_pairs(EDITS, tmp_path / "store", workers_of(), work=OFTEN)
    assert contents(tmp_path / "store") == contents(undisturbed[0])


def test_what_is_in_the_data_set_counts(workers_of, filtering, loose, tmp_path):
    """Rounding may decide otherwise the second time: then the ledger follows the pictures that are there."""
    make_pairs(EDITS, tmp_path / "store", workers_of(), work=OFTEN)
    ledger = tmp_path / "store" / "candidates" / "00000-of-00001.jsonl"
    rows = list(read_candidates(tmp_path / "store"))
    ledger.write_bytes(b"")
    stricter = workers_of(replace(filtering, filter=replace(loose, min_sim_direction=0.99999)))
    stricter.describe = workers_of().describe
    make_pairs(EDITS, tmp_path / "store", stricter, work=OFTEN)
    again = list(read_candidates(tmp_path / "store"))
    assert [set(row.kept) for row in again] == [set(row.kept) for row in rows]
    assert verify(tmp_path / "store").sound


def test_verify_misses_what_the_ledger_names(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "store")
    lost = sorted((tmp_path / "store" / "data").iterdir())[-1]
    keys = PairStore(tmp_path / "store", shards=[lost]).keys()
    lost.unlink()
    (tmp_path / "store" / "candidates" / "00001-of-00002.jsonl").write_text("")
    faults = verify(tmp_path / "store").faults
    assert len(faults) == len(keys) > 0 and all("the ledger names it, and it is not there" in fault for fault in faults)
    (tmp_path / "store" / "candidates" / "00001-of-00002.jsonl").write_text('{"caption": 1}\n')
    assert "has a line that is no caption's" in verify(tmp_path / "store").faults[0]


def test_small_groups_share_batches_and_partitions_make_the_same_pairs(workers_of, tmp_path):
    """Batches of five hold two captions of two candidates; the partitions take turns in groups."""
    alone, work = tmp_path / "alone", Work(batch_pairs=5)
    make_pairs(EDITS, alone, workers_of(), work=work)
    for number in (1, 0):
        make_pairs(EDITS, tmp_path / "parts", workers_of(), work=replace(work, partition=(number, 2)))
    assert verify(tmp_path / "parts").digest == verify(alone).digest
    lines = [line for path in sorted((tmp_path / "parts" / "candidates").iterdir()) for line in path.open()]
    assert lines == (alone / "candidates" / "00000-of-00001.jsonl").read_text().splitlines(keepends=True)


def test_later_runs_take_the_first_run_s_batches(workers_of, tmp_path, caplog):
    make_pairs(EDITS[:1], tmp_path, workers_of(), work=Work(batch_pairs=2))
    make_pairs(EDITS[:2], tmp_path, workers_of())
    assert PairStore(tmp_path).manifest["work"] == {"batch_pairs": 2} and not caplog.text
    make_pairs(EDITS, tmp_path, workers_of(), work=Work(batch_pairs=1))
    assert "begun in batches of 2" in caplog.text


def test_edits_may_be_appended_and_not_changed(undisturbed, workers_of, filtering, tmp_path):
    make_pairs(EDITS[:2], tmp_path / "store", workers_of(), work=OFTEN)
    make_pairs(EDITS, tmp_path / "store", workers_of(), work=OFTEN)
    assert contents(tmp_path / "store") == contents(undisturbed[0])
    changed = [EDITS[0], replace(EDITS[1], instruction="another"), *EDITS[2:]]
    with pytest.raises(DatasetError, match="row 2 has changed; append new edits at the end"):
        make_pairs(changed, tmp_path / "store", workers_of(), work=OFTEN)
    with pytest.raises(DatasetError, match="another run: its config.factory.candidates is 2"):
        make_pairs(EDITS, tmp_path / "store", workers_of(replace(filtering, candidates=5)), work=OFTEN)
    assert contents(tmp_path / "store") == contents(undisturbed[0])


def test_captions_that_do_not_suit_the_mode_are_noted_and_passed_over(workers_of, tmp_path):
    longer = CaptionEdit(caption="a red heart", instruction="snow", edited_caption="a red heart in the snow")
    report = make_pairs([longer, EDITS[0]], tmp_path, workers_of(mode="replace"), work=OFTEN)
    rows = list(read_candidates(tmp_path))
    assert "use mode 'refine'" in rows[0].unsuited and rows[0].seeds == ()
    assert not rows[1].unsuited and len(rows[1].seeds) == 2
    assert (report.captions, report.unsuited, report.filtered.candidates) == (2, 1, 2)
    assert "1 of them do not suit the mode" in report.as_text()


def test_filtering_later_equals_filtering_at_once(undisturbed, everything, loose, tmp_path):
    """Without a filter every picture is kept, and any thresholds can follow."""
    assert everything[1].pairs == 6 and everything[1].filtered is None
    for _ in range(2):  # the second call finds everything done
        report = refilter(everything[0], tmp_path / "later", loose)
    assert report.missing == () and report.filtered == undisturbed[1].filtered
    assert verify(tmp_path / "later").digest == verify(undisturbed[0]).digest
    assert list(read_candidates(tmp_path / "later")) == list(read_candidates(undisturbed[0]))


def test_lower_thresholds_name_the_pairs_whose_pictures_are_gone(undisturbed, loose):
    report = refilter(undisturbed[0], None, replace(loose, min_sim_direction=-1, keep=9))
    assert report.filtered.kept == 6 and len(report.missing) == 4
    assert "4 of them have no pictures" in report.as_text()
    assert len(report.to_dict()["missing"]) == 4


def test_data_sets_without_a_ledger_are_filtered_by_their_rows(everything, loose, clip, tmp_path):
    """By the scores in them, or by new ones; a caption pair is what has the same texts."""
    foreign = [replace(pair, key=f"foreign/{n}") for n, pair in enumerate(PairStore(everything[0]))]
    bare = [replace(pair, sim_0=None, sim_1=None, sim_image=None, sim_direction=None) for pair in foreign]
    for name, pairs in (("scored", foreign), ("bare", bare)):
        with PairWriter(tmp_path / name, manifest={"config": {}}) as writer:
            writer.write(*pairs)
    expected = refilter(everything[0], None, loose).filtered
    assert refilter(tmp_path / "scored", tmp_path / "one", loose).filtered == expected
    with pytest.raises(DatasetError, match="pair 1 of .*bare has no scores; take them with a `clip`"):
        refilter(tmp_path / "bare", None, loose)
    scores = rescored(PairStore(tmp_path / "bare"), clip)
    assert refilter(tmp_path / "bare", tmp_path / "two", loose, scores=scores, clip="embedded").filtered == expected
    assert [pair.sim_image for pair in PairStore(tmp_path / "two")] == [
        pair.sim_image for pair in PairStore(tmp_path / "one")
    ]
    again = refilter(tmp_path / "two", tmp_path / "three", loose)
    assert again.filtered.kept == expected.kept and verify(tmp_path / "three").digest == verify(tmp_path / "two").digest
    assert [clip_of(PairStore(tmp_path / name)) for name in ("bare", "two", "three")] == ["", "embedded", "embedded"]


def test_the_clip_of_the_scores_is_the_last_one(everything, loose, clip, tmp_path):
    """A data set of the factory names the CLIP that made it, and one that took new scores the other."""
    assert clip_of(PairStore(everything[0])) == "embedded"
    scores = rescored(PairStore(everything[0]), clip)
    refilter(everything[0], tmp_path / "other", loose, scores=scores, clip="ViT-L-14/openai")
    refilter(tmp_path / "other", tmp_path / "again", loose)
    assert clip_of(PairStore(tmp_path / "again")) == "ViT-L-14/openai"


def test_pairs_without_captions_are_said_when_they_are_scored(everything, clip, tmp_path, caplog):
    first, second = PairStore(everything[0])[:2]
    with PairWriter(tmp_path / "store", manifest={}) as writer:
        writer.write(replace(first, original_prompt=""), second)
    rescored(PairStore(tmp_path / "store"), clip)
    assert "1 of 2 pairs have no captions; of their scores only sim_image means anything" in caplog.text


@pytest.mark.slow
def test_a_ledger_is_filtered_in_the_memory_of_a_few_lines(tmp_path):
    """300 lines of 20 candidates."""
    best = PairScores(sim_0=0.3, sim_1=0.3, sim_direction=0.3, sim_image=0.9)
    with PairWriter(tmp_path / "store", manifest={"config": {}}):
        line = CaptionCandidates(caption=0, edit="", seeds=tuple(range(20)), scores=(best,) * 20)
        CandidateLog(tmp_path / "store", (0, 1)).append([replace(line, caption=n) for n in range(300)])
    tracemalloc.start()
    report = refilter(tmp_path / "store", tmp_path / "out", FilterConfig())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.filtered.candidates == 6000 and len(report.missing) == 1200
    assert len(list(read_candidates(tmp_path / "out"))) == 300
    assert peak < 2e6, peak


def test_progress_counts_candidates(workers_of, tmp_path):
    seen = []
    hooks = Hooks(on_progress=lambda *at: seen.append(at))
    make_pairs(EDITS[:2], tmp_path, workers_of(), work=Work(batch_pairs=1), hooks=hooks)
    assert [(done, total) for done, total, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "1 caption pairs done" in seen[2][2] and "of candidates kept" in seen[2][2]


@pytest.mark.slow
def test_early_rejects_are_those_below_and_the_rest_is_untouched(undisturbed, workers_of, filtering, loose, tmp_path):
    """A margin of 2 drops nothing; none at all drops what the preview already dooms, and changes no other pair."""
    patient = replace(filtering, early_reject=EarlyReject(margin=2.0))
    make_pairs(EDITS, tmp_path / "patient", workers_of(patient), work=OFTEN)
    assert contents(tmp_path / "patient") == contents(undisturbed[0])
    hasty = replace(filtering, early_reject=EarlyReject(margin=0.0, measures=("sim_direction",)))
    report = make_pairs(EDITS, tmp_path / "hasty", workers_of(hasty), work=OFTEN)
    rows, whole = list(read_candidates(tmp_path / "hasty")), list(read_candidates(undisturbed[0]))
    dropped = sum(len(row.early) for row in rows)
    assert 0 < dropped < 6 and report.filtered.early == dropped
    assert report.filtered.candidates == 6 - dropped
    assert f"{dropped} dropped unfinished" in report.as_text()
    for row, full in zip(rows, whole, strict=True):
        previews = dict(zip(row.seeds, row.scores, strict=True))
        assert all(previews[seed].sim_direction < loose.min_sim_direction for seed in row.early)
        finished = {seed: score for seed, score in zip(full.seeds, full.scores, strict=True) if seed not in row.early}
        for seed, score in row.finished():
            assert abs(score.sim_image - finished[seed].sim_image) < 1e-4


@pytest.fixture(scope="module")
def exact(tiny_pair_model):
    """Double precision, so that only a wrong rule makes a difference."""
    return tiny_pair_model(dtype=torch.float64)


def jobs_of(count):
    return [PairJob(caption=EDITS[0].caption, edited_caption=EDITS[0].edited_caption, seed=n) for n in range(count)]


SURVIVORS = [0, 2, 3]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"mode": "refine", "local_blend": True, "blend_start": 0.1},
        {"mode": "refine", "local_blend": True, "blend_start": 0.6},
    ],
    ids=["self", "a blend from before the look", "a blend from after it"],
)
def test_early_survivors_equal_undisturbed_ones(exact, monkeypatch, settings):
    """Three of four, halfway: the steps that follow draw each one's own noise, and a blend starts when it would."""
    # An untrained network looks almost everywhere alike: with the paper's 0.3 the mask would be the whole picture.
    monkeypatch.setattr("ip2p_engine.p2p.cross_attention.BLEND_THRESHOLD", 0.97)
    generator = PairGenerator(exact, PairConfig(steps=6, **settings))
    jobs = jobs_of(4)
    (few,) = generator.batches(jobs, batch_pairs=4, preview=Preview(at=0.5, judge=lambda jobs, z: SURVIVORS))
    assert [pair.seed for pair in few] == SURVIVORS
    found = torch.stack([pair.latents for pair in few])
    without_a_look, alone = generator.latents(jobs)[SURVIVORS], generator.latents([jobs[row] for row in SURVIVORS])
    assert (found - without_a_look).abs().max() < 1e-9
    assert (found - alone).abs().max() < 1e-9
    if "local_blend" in settings:
        assert 0 < (found[:, 0] == found[:, 1]).double().mean() < 1


def test_a_look_that_nobody_survives_leaves_an_empty_batch(exact):
    nobody = Preview(at=0.5, judge=lambda jobs, z: [])
    assert list(PairGenerator(exact, PairConfig(steps=2)).batches(jobs_of(2), batch_pairs=2, preview=nobody)) == [[]]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FactoryConfig(candidates=0), "candidates is 0"),
        (lambda: FactoryConfig(picture_format="gif"), "picture format is 'gif'; choose one of png"),
        (lambda: FactoryConfig(filter=None, early_reject=EarlyReject()), "there is no filter"),
        (lambda: EarlyReject(at=1.0), "early reject at 1.0"),
        (lambda: EarlyReject(margin=-0.1), "margin -0.1"),
        (lambda: EarlyReject(measures=("beauty",)), "early reject by beauty; choose among sim_0"),
    ],
)
def test_impossible_settings_are_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_runs_that_cannot_be_are_refused_before_anything_is_written(workers_of, filtering, tmp_path):
    with pytest.raises(ConfigError, match="no caption pair"):
        make_pairs([], tmp_path / "store", workers_of())
    with pytest.raises(ConfigError, match="an early look after some of 2 steps of dpmpp_2m"):
        workers_of(replace(filtering, early_reject=EarlyReject()), sampler="dpmpp_2m")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_every_picture_format_is_read_back(workers_of, tmp_path, kind, start):
    make_pairs(EDITS[:1], tmp_path, workers_of(replace(KEEP_ALL, candidates=1, picture_format=kind)))
    assert PairStore(tmp_path)[0].original_image.startswith(start) and verify(tmp_path).sound
