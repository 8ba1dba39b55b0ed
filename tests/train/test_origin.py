"""A run goes on with what it began with: data and base are told apart by content, and what is changed is noted."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import pytest
from safetensors import safe_open

from ip2p_engine.checkpoint.write import TRAINING_KEY, save_ldm
from ip2p_engine.commands.evaluate_data import warn_of_training
from ip2p_engine.data.reading import Reading, open_pairs
from ip2p_engine.data.store import PairWriter
from ip2p_engine.data.tools import export_dataset
from ip2p_engine.errors import ConfigError, DatasetError, TrainingError
from ip2p_engine.hooks import Hooks
from ip2p_engine.networks.digest import digest_of_weights
from ip2p_engine.networks.model import load_model
from ip2p_engine.train import TrainConfig
from ip2p_engine.train.encoding import build_cache
from ip2p_engine.train.run_folder import RunFolder, first_difference
from ip2p_engine.train.sources import names_of, open_source

ONE_STEP = Hooks(should_stop=lambda: True)


def about(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def other_base(tiny_model, tmp_path_factory):
    """The same architecture with one attention weight changed, as adapters would."""
    model = copy.deepcopy(tiny_model())
    name = next(name for name, _ in model.unet.named_parameters() if "to_q" in name)
    model.unet.get_parameter(name).data += 0.01
    return save_ldm(model, tmp_path_factory.mktemp("other") / "sd1.safetensors")


# Data


def test_a_data_set_is_known_again_where_it_has_moved(store, tmp_path):
    export_dataset(store, tmp_path / "original")
    row = {"original_image": "a.png", "edit_prompt": "add snow", "edited_image": "b.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    shutil.copytree(store, tmp_path / "store")
    for name in ("original", "pairs.jsonl", "store"):
        before = open_source(tmp_path / name, TrainConfig()).identity
        (tmp_path / "moved").mkdir(exist_ok=True)
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
        assert open_source(tmp_path / "moved" / name, TrainConfig()).identity == before


@pytest.mark.parametrize("changed", ["0000000/prompt.json", "0000000/0_1.jpg"])
def test_originals_of_equal_names_are_told_apart(tmp_path, records, changed):
    with PairWriter(tmp_path / "store", manifest={}) as writer:
        writer.write(*(replace(pair, key=f"{n}/0", seed=0) for n, pair in enumerate(records)))
    identities = set()
    for home in ("a", "b"):
        export_dataset(tmp_path / "store", tmp_path / home / "pairs")
        if home == "b":
            with (tmp_path / home / "pairs" / changed).open("ab") as stream:
                stream.write(b"\n")
        identities.add(open_source(tmp_path / home / "pairs", TrainConfig()).identity)
    assert len(identities) == 2


def test_a_refusal_shows_where_two_long_texts_differ():
    common = "x" * 500
    assert first_difference(common + "one" + common, common + "two" + common)[0][40:43] == "one"
    assert first_difference("short", "long") == ("short", "long")


def test_a_cache_of_other_data_says_what_differs(tmp_path, records):
    """Two stores differ late in their list of shards."""
    key = {"data": "shard " * 100 + "A"}
    arguments = (records[:0], None, key, TrainConfig(), None, tmp_path, None, None)
    (tmp_path / "cache.json").write_text(json.dumps({"data": "shard " * 100 + "B"}))
    with pytest.raises(DatasetError, match="holds latents with data '.*B', and now it is '.*A'; delete the folder"):
        build_cache(*arguments)


# Base


def test_bases_are_told_apart_by_a_weight(tiny_model, other_base, base):
    one, again, other = (digest_of_weights(load_model(path)) for path in (base(), base(), other_base))
    assert one == again != other


# Runs


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_data_and_base_only(run, base, other_base, records, tmp_path):
    run(hooks=ONE_STEP)
    noted = about(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"run was trained on other pairs; give what it began with, or train in a new"
    ):
        run(data=records[:9])
    with pytest.raises(ConfigError, match="run was trained from another base; give"):
        run(base=other_base)
    with pytest.raises(ConfigError, match=r"another base \(whose family is sd1\)"):
        run(family="sd2")
    assert about(tmp_path / "run") == noted
    assert run(base=shutil.copy(base(), tmp_path / "moved.safetensors")).finished


@pytest.mark.slow
def test_a_finished_run_is_not_overwritten_from_another_base(run, other_base, tmp_path):
    files = run(steps=1).files
    written = files["ema"].read_bytes()
    with pytest.raises(ConfigError, match="another base"):
        run(steps=1, base=other_base)
    with pytest.raises(ConfigError, match="learning_rate 1e-05 and now it is 0.5"):
        run(steps=1, learning_rate=0.5)
    assert files["ema"].read_bytes() == written


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on_with_a_base_of_its_kind(run, tmp_path):
    """It noted the spec and no digests."""
    run(hooks=ONE_STEP)
    noted = about(tmp_path / "run")
    old = {name: value for name, value in noted.items() if not name.endswith("_digest")}
    (tmp_path / "run" / "run.json").write_text(json.dumps(old))
    with pytest.raises(ConfigError, match="family is sd1"):
        run(family="sd2")
    assert run().finished
    assert about(tmp_path / "run") == noted


@pytest.mark.slow
def test_the_advice_at_a_loss_that_is_no_number_can_be_followed(run, tmp_path, caplog):
    run(save_every=1, hooks=ONE_STEP)
    with pytest.raises(
        TrainingError, match=r"not finite.*; the last good checkpoint is .*step-00000001.pt. Go on from"
    ):
        run(save_every=1, learning_rate=1e39)
    assert (tmp_path / "run" / "loss.png").exists()
    result = run(learning_rate=1e-6, clip_norm=1.0, precision="bfloat16")
    assert result.finished
    changes = about(tmp_path / "run")["changes"]
    assert [change["after_step"] for change in changes] == [1, 1]
    assert changes[1] == {
        "after_step": 1,
        "clip_norm": [0.0, 1.0],
        "learning_rate": [1e39, 1e-6],
        "precision": ["float32", "bfloat16"],
    }
    assert "goes on after step 1 with precision bfloat16 instead of float32" in caplog.text
    with safe_open(result.files["ema"], "pt") as file:
        assert json.loads(file.metadata()[TRAINING_KEY])["changes"] == changes


@pytest.mark.slow
def test_a_scaler_begins_anew_where_precision_becomes_float16(run):
    run(hooks=ONE_STEP)
    assert run(precision="float16").finished


def test_changes_of_steps_that_were_lost_hold_from_where_the_run_goes_on(tmp_path):
    noted = [{"after_step": 9, "clip_norm": [0.0, 1.0]}]
    folder = RunFolder(tmp_path, writes=True)
    folder.begin(TrainConfig(clip_norm=1.0), {"changes": noted}, 9)
    assert folder.adjusted(TrainConfig(clip_norm=1.0), 5) == {"changes": [{**noted[0], "after_step": 5}]}
    assert folder.adjusted(TrainConfig(clip_norm=2.0), 0) == {}


# What is measured on


@pytest.mark.parametrize(
    ("header", "split", "said"),
    [
        ({}, "all", "so these are no figures of new edits; train with --hold-out-test"),
        ({"held_out": 2, "split_rule": "captions"}, "all", "2 pairs were held out; measure on those with --split test"),
        ({"held_out": 2, "split_rule": "captions"}, "test", ""),
        ({"data_sets": ["others"]}, "all", ""),
    ],
)
def test_evaluate_warns_of_what_was_trained_on(tiny_model, store, tmp_path, capsys, header, split, said):
    names = names_of(open_source(store, TrainConfig(limit=3)))
    file = save_ldm(tiny_model(), tmp_path / "edit.safetensors", training={"data_sets": names, **header})
    warn_of_training(str(file), open_pairs(store, Reading(limit=2)), split=split)
    error = capsys.readouterr().err
    assert ("edit.safetensors was trained on this very data" in error and said in error) if said else not error
    warn_of_training("embedded", open_pairs(store))
