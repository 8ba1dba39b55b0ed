"""Whole runs on tiny networks: resumed to the bit, independent of how the work is cut, and what they leave."""

from __future__ import annotations

import io
import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ip2p_engine import InstructPix2Pix
from ip2p_engine.checkpoint.write import TRAINING_KEY
from ip2p_engine.config import from_mapping
from ip2p_engine.errors import CheckpointError, ConfigError, DatasetError, TrainingError
from ip2p_engine.hooks import Hooks
from ip2p_engine.networks.model import load_model
from ip2p_engine.train import TrainConfig, preset, train
from ip2p_engine.train.adapters import lora_state
from ip2p_engine.train.checkpoints import latest, load_checkpoint, step_of
from ip2p_engine.train.config import PRESETS, read_config
from ip2p_engine.train.distributed import Sums
from ip2p_engine.train.networks import make_trainable
from ip2p_engine.train.objective import Objective

pytestmark = pytest.mark.slow


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return load_checkpoint(latest(folder / "checkpoints"))


def same_state(a, b):
    for part in ("trained", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])


def after(steps):
    """should_stop that says yes after so many steps, from the step before on."""
    done = [0]
    return Hooks(on_result=lambda step, _: done.append(step), should_stop=lambda: done[-1] >= steps - 1)


@pytest.fixture(scope="module")
def whole(run_in, tmp_path_factory):
    """(folder, result, progress) of four undisturbed steps, with a validation strip after them."""
    folder, seen = tmp_path_factory.mktemp("whole") / "run", []
    hooks = Hooks(on_result=lambda _, at: seen.append(at))
    outputs = ("ema", "raw", "diffusers")
    result = run_in(folder, save_every=1, validate_every=4, validation_count=3, outputs=outputs, hooks=hooks)
    return folder, result, seen


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that run, to go on with."""
    return shutil.copytree(whole[0], tmp_path / "run")


def test_resumed_run_is_bit_equal(run, whole, tmp_path):
    part = run(hooks=after(3))
    assert (part.finished, part.step) == (False, 3)
    rest = run()
    assert (rest.finished, rest.step) == (True, 4)
    assert losses(tmp_path / "run") == losses(whole[0])
    same_state(weights(tmp_path / "run"), weights(whole[0]))
    assert rest.loss == whole[1].loss


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd1", {"optimizer": "muon", "schedule": "cosine", "cache": True}),
        ("sdxl", {"lora_rank": 2, "micro_batch": 3, "precision": "bfloat16", "validate_every": 2}),
        ("sd2", {"precision": "float16", "min_snr": 5.0, "clip_norm": 1.0, "gradient_checkpointing": True}),
        ("cosxl", {"offset_noise": 0.1, "precision": "bfloat16", "buckets": True}),
        ("sd1", {"optimizer": "adamw8bit"}),
        ("sd1", {"optimizer": "adafactor", "schedule": "restarts", "change_weight": 2.0, "image_dropout": 0.2}),
        ("sd1", {"optimizer": "lion", "schedule": "linear"}),
        ("sd1", {"optimizer": "prodigy", "learning_rate": 1.0, "schedule": "polynomial"}),
    ],
    ids=[
        "muon, cached",
        "SDXL, LoRA",
        "SD2, float16, min-SNR",
        "CosXL, bfloat16, buckets",
        "8-bit AdamW",
        "Adafactor",
        "Lion",
        "Prodigy",
    ],
)
def test_every_kind_of_run_resumes_to_the_bit(run, tmp_path, family, settings):
    if settings.get("optimizer") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    if settings.get("optimizer") in ("lion", "prodigy"):
        pytest.importorskip({"lion": "lion_pytorch", "prodigy": "prodigyopt"}[settings["optimizer"]])
    run("whole", family=family, steps=5, save_every=2, **settings)
    run("parts", family=family, steps=5, save_every=2, **settings, hooks=after(3))
    run("parts", family=family, steps=5, save_every=2, **settings)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    same_state(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_what_was_logged_beyond_the_checkpoint_is_forgotten(run, whole, tmp_path):
    run(save_every=2, hooks=after(2))
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "loss": 7.0}\n{"step": 4, "lo')
    run(save_every=2)
    assert losses(tmp_path / "run") == losses(whole[0])


def test_a_step_does_not_depend_on_micro_batches(run, whole, tmp_path):
    run(micro_batch=3, hooks=after(3))
    assert losses(tmp_path / "run") == pytest.approx(losses(whole[0])[:3], abs=1e-5)


def test_runs_in_inference_mode_and_leaves_the_global_generator_alone(run, whole, tmp_path):
    """ComfyUI runs every node in inference mode."""
    before = torch.get_rng_state()
    with torch.inference_mode():
        run(hooks=after(2))
    assert torch.equal(before, torch.get_rng_state())
    assert losses(tmp_path / "run") == losses(whole[0])[:2]


def test_adapters_draw_from_the_seed_and_not_from_the_global_generator(base):
    before = torch.get_rng_state()
    one, two = (make_trainable(load_model(base()), TrainConfig(lora_rank=2)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    drawn = lora_state(one)
    assert all(torch.equal(value, drawn[name]) for name, value in lora_state(two).items())


def test_a_finished_run_is_not_trained_again(run, whole, copy):
    again = run(save_every=1, validate_every=4, validation_count=3)
    assert again.finished
    assert losses(copy) == losses(whole[0])
    assert set(again.files) == {"ema", "raw", "diffusers"}


def test_cached_latents_train_as_encoded_ones_do(run, tmp_path):
    """Where nothing is random about crops, the cache changes nothing."""
    still = {"resize": (64, 64), "flip": 0.0}
    run("encoded", **still, hooks=after(3))
    run("cached", **still, cache=True, hooks=after(3))
    assert losses(tmp_path / "encoded") == pytest.approx(losses(tmp_path / "cached"), abs=1e-6)


def test_long_instructions_are_trained_to_their_end(run, records, tmp_path):
    """One of two chunks among short ones, from a cache and without: the same loss, and another than of a part of it."""
    long = " ".join(["make the small red boat look as if it had been drawn"] * 10)
    part, found = " ".join(long.split()[:70]), {}
    for name, text, cache in (("whole", long, False), ("cached", long, True), ("part", part, False)):
        data = [replace(records[0], edit_prompt=text), *records[1:]]
        run(name, data=data, cache=cache, resize=(64, 64), flip=0.0, hooks=after(3))
        found[name] = losses(tmp_path / name)
    assert found["whole"] == pytest.approx(found["cached"], abs=1e-6)
    assert found["whole"] != pytest.approx(found["part"], abs=1e-6)


def test_a_cache_of_other_data_is_refused(run, records, tmp_path):
    run(cache=True, hooks=after(2))
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(DatasetError, match="holds latents with data"):
        run(cache=True, data=records[:9])


def test_outputs_load_everywhere(whole):
    folder, result, _ = whole
    state = weights(folder)
    for kind, part in (("ema", "ema"), ("raw", "trained")):
        model = load_model(result.files[kind])
        assert model.spec.in_channels == 8
        assert model.spec.weights == kind
        assert all(torch.equal(value, state[part][name]) for name, value in model.unet.state_dict().items())
        pipeline = load_model(result.files["diffusers"], weights=kind)
        assert all(torch.equal(value, state[part][name]) for name, value in pipeline.unet.state_dict().items())
    with safe_open(result.files["ema"], "pt") as file:
        assert json.loads(file.metadata()[TRAINING_KEY])["config"]["steps"] == 4
    assert Image.open(result.curve).width > 100


def test_diffusers_loads_the_folder(whole):
    from diffusers import StableDiffusionInstructPix2PixPipeline

    files = whole[1].files
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(files["diffusers"], safety_checker=None)
    ours = load_model(files["ema"]).unet.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in pipeline.unet.state_dict().items())


def test_adapters_load_in_diffusers_and_merge_to_the_same(run, whole):
    """On an InstructPix2Pix as the base, lora.safetensors on top of it is the merged checkpoint."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    first = whole[1]
    tuned = run("tuned", base=first.files["ema"], steps=3, lora_rank=4, learning_rate=0.05)
    assert set(tuned.files) == {"ema", "lora"}
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(first.files["diffusers"], safety_checker=None)
    pipeline.load_lora_weights(tuned.files["lora"])
    x, text = torch.randn(2, 8, 8, 8), torch.randn(2, 77, 8)
    with torch.no_grad():
        plain, merged = (load_model(r.files["ema"]).unet(x, 500, text).sample for r in (first, tuned))
        adapted = pipeline.unet(x, 500, text).sample
    assert (adapted - plain).abs().max() > 1e-3
    assert torch.allclose(adapted, merged, atol=2e-4)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_last_good_checkpoint(run, copy):
    checkpoint = copy / "checkpoints" / "step-00000003.pt"
    latest(copy / "checkpoints").rename(checkpoint)
    state = torch.load(checkpoint, weights_only=True)
    state["step"] = 3
    state["trained"]["conv_in.bias"].fill_(float("nan"))
    torch.save(state, checkpoint)
    with pytest.raises(TrainingError, match=r"the loss of step 4 is nan; the last good checkpoint is .*step-00000003"):
        run(save_every=1)


class LateSums(Sums):
    """As on a GPU, whose numbers are read when the next step is under way."""

    def __init__(self, row):
        super().__init__(row)
        self.behind = 1


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr("ip2p_engine.train.distributed.Sums", LateSums)


@pytest.mark.parametrize("save_every", [1, 3, 100])
def test_losses_that_are_read_late_are_the_same(run, whole, tmp_path, late, save_every):
    told, kept = [], []
    hooks = Hooks(on_result=lambda step, at: (told.append(at), kept.append(step)))
    result = run(save_every=save_every, hooks=hooks)
    assert (losses(tmp_path / "run"), result.loss) == (losses(whole[0]), whole[1].loss)
    same_state(weights(tmp_path / "run"), weights(whole[0]))
    assert kept == [1, 2, 3, 4]
    assert [(at.step, at.loss, at.learning_rate) for at in told] == [
        (at.step, at.loss, at.learning_rate) for at in whole[2]
    ]


def test_a_stop_that_is_heard_late_resumes_to_the_bit(run, whole, tmp_path, late):
    part = run(hooks=after(2))
    assert (part.finished, part.step) == (False, 3)
    assert losses(tmp_path / "run") == losses(whole[0])[:3]
    assert run().finished and losses(tmp_path / "run") == losses(whole[0])
    same_state(weights(tmp_path / "run"), weights(whole[0]))


@pytest.mark.parametrize(("save_every", "known"), [(1, 1), (2, 0), (3, 0)])
def test_a_loss_that_is_no_number_stops_a_late_reader_too(run, tmp_path, late, monkeypatch, save_every, known):
    """Of step 2: at once where that step is saved, before anything of a later one is."""
    steps, objective = iter((1.0, float("nan"), 1.0, 1.0)), Objective.__call__
    monkeypatch.setattr(Objective, "__call__", lambda *given: objective(*given) * next(steps))
    with pytest.raises(TrainingError, match=r"the loss of step 2 is nan; "):
        run(save_every=save_every, micro_batch=4)
    kept = latest(tmp_path / "run" / "checkpoints")
    assert (step_of(kept), len(losses(tmp_path / "run"))) == (known, 1)
    assert next(steps) == 1.0  # at most one step more was begun


def test_weights_that_are_no_numbers_are_not_saved(run, tmp_path):
    """An update can break the weights while its own loss was finite."""
    with pytest.raises(TrainingError, match="is not finite"):
        run(steps=2, save_every=1, learning_rate=1e39)
    assert latest(tmp_path / "run" / "checkpoints") is None


def test_checkpoints_are_rotated(run, whole, tmp_path):
    run(save_every=1, hooks=after(3))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000002.pt", "step-00000003.pt"]
    names = sorted(path.name for path in (whole[0] / "checkpoints").iterdir())
    assert names == ["step-00000004.pt"]  # two while it goes on, one when it is finished


def test_another_recipe_is_refused_and_free_settings_are_not(run, copy):
    with pytest.raises(ConfigError, match=r"weight_decay 0.01 and now it is 0.02"):
        run(steps=5, weight_decay=0.02)
    assert run(steps=5, micro_batch=2, save_every=7).step == 5


def test_a_run_of_an_earlier_version_goes_on(run, copy):
    """Its run.json lacks the fields that have come since."""
    saved = json.loads((copy / "run.json").read_text())
    del saved["config"]["hold_out_test"]
    (copy / "run.json").write_text(json.dumps(saved))
    assert run(steps=5, save_every=7).step == 5
    with pytest.raises(ConfigError, match="hold_out_test False and now it is True"):
        run(steps=6, data=[], hold_out_test=True)


@pytest.mark.parametrize("text", ["[]", '{"config": 5}'])
def test_a_run_json_that_is_none_is_refused(run, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(ConfigError, match="is no training run.s; restore it from a copy"):
        run()


def test_a_file_that_is_no_checkpoint_is_named(run, tmp_path):
    path = tmp_path / "run" / "checkpoints" / "step-00000002.pt"
    path.parent.mkdir(parents=True)
    for content in ({"step": 2}, [2], None):
        torch.save(content, path) if content else path.write_bytes(b"torn")
        with pytest.raises(CheckpointError, match=r"step-00000002.pt cannot be read .*; delete it and repeat"):
            run()


def test_one_run_a_folder_at_a_time(run, copy):
    """The second process would mix its rows and checkpoints with the first one's."""
    refused = []

    def again(step, _):
        with pytest.raises(ConfigError, match="run is being trained in by another process; wait for it"):
            run(steps=6)
        refused.append(step)

    run(steps=5, hooks=Hooks(on_result=again))
    assert refused == [5]
    assert run(steps=5).finished


def test_a_device_that_is_not_there_is_no_silent_cpu(store, base, tmp_path):
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ConfigError, match=f"device is {missing} and PyTorch finds"):
        train(TrainConfig(), data=store, base=base(), out=tmp_path / "run", device=missing)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_no_silent_one(run, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ConfigError, match="tracker 'wandb' is not installed; pip install wandb"):
        run(tracker="wandb")


def test_what_goes_wrong_in_a_step_is_not_called_a_setting(run):
    def fail(*_):
        raise ValueError("the caller's own")

    with pytest.raises(ValueError, match="the caller's own"):
        run(hooks=Hooks(on_result=fail))


def test_validation_strip(whole):
    folder, result, _ = whole
    assert Image.open(folder / "validation" / "step-00000004.png").height > 3 * 128
    edit = InstructPix2Pix.load(result.files["ema"], device="cpu").edit(Image.new("RGB", (64, 64)), "add snow", steps=1)
    assert edit[0].image.size == (64, 64)


def test_progress_is_told_after_each_step(whole):
    seen = whole[2]
    assert [(p.step, p.steps) for p in seen] == [(n, 4) for n in (1, 2, 3, 4)]
    assert all(p.samples_per_second > 0 and p.seconds_left >= 0 for p in seen)
    assert seen[-1].seconds_left == 0


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    assert preset(name, seed=5).seed == 5


def test_default_is_the_papers_recipe():
    config = TrainConfig()
    assert (config.batch_size, config.learning_rate, config.resolution, config.resize) == (1024, 1e-4, 256, (256, 288))
    assert (config.dropout, config.flip, config.ema_decay, config.optimizer) == (0.05, 0.5, 0.9999, "adamw")


def test_a_resolution_brings_its_bounds():
    """Nine eighths of it, as in the paper; a recipe's own bounds stay."""
    assert preset("paper", resolution=512).resize == (512, 576)
    assert preset("lora", resolution=256).resize == TrainConfig(resize=None).resize == (256, 288)
    with pytest.raises(ConfigError, match="resize is 64 to 64 and crops are 128"):
        preset("embedded", resolution=128)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps is 0; give a whole number at least 1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"seed": None}, "seed is None"),
        ({"dropout": 0.4}, "dropout is 0.4; give a number from 0 to 0.333"),
        ({"optimizer": "sgd"}, "choose one of adamw, adamw8bit, muon, adafactor"),
        ({"resize": (200, 288)}, "resize is 200 to 288 and crops are 256"),
        ({"resize": (80, 70), "resolution": 64, "buckets": True}, "resize is 80 to 70; give the lower bound first"),
        ({"resolution": 255}, "multiple of 8"),
        ({"columns": ("a", "b", "")}, "name three"),
        ({"optimizer": "muon", "precision": "float16"}, "muon has no gradient scaler"),
        ({"optimizer": "lion", "learning_rate": 0.0}, "lion takes no learning_rate of 0"),
        (
            {"optimizer": "prodigy", "learning_rate": 1.0, "train_text_encoder": True, "text_learning_rate": 0.5},
            "prodigy finds one rate for all weights",
        ),
        ({"streaming": True, "cache": True}, "turn streaming off"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"micro_batch": 2.5}, "micro_batch is 2.5; give a whole number"),
        ({"resize": 64}, "resize is 64; give two whole numbers of pixels"),
        ({"betas": (0.9, 1)}, "betas is .*; give two numbers from 0 to below 1"),
        ({"columns": ("a", "b")}, "columns is .*; give the names"),
        ({"compile": "no"}, "compile is 'no'; give true or false"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; give a number"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
    ],
)
def test_settings_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)


def test_config_files(whole, tmp_path):
    assert read_config(whole[0] / "run.json", {})["steps"] == 4
    path = tmp_path / "mine.json"
    path.write_text('{"resize": [256, 260]}')
    assert from_mapping(TrainConfig, read_config(path, PRESETS["paper"])).resize == (256, 260)
    for text in ("[1]", '{"config": [1]}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is no JSON object; give one with fields of TrainConfig"):
            read_config(path, {})
    path.write_text('{"stepz": 1}')
    with pytest.raises(ConfigError, match="no setting 'stepz'"):
        from_mapping(TrainConfig, read_config(path, {}))


def test_broken_rows_are_counted_and_named_once(run, records, caplog):
    stream = io.BytesIO()
    Image.new("RGB", (64, 32)).save(stream, "PNG")
    data = [
        replace(records[0], edited_image=b"no picture"),
        *records[1:3],
        replace(records[3], edited_image=stream.getvalue()),
    ]
    with caplog.at_level(logging.WARNING):
        result = run(data=data, hooks=after(3))
    assert result.broken_count == 2
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"left out: {line}" for line in sorted(result.broken)
    ]
    assert any("0000000/0" in line and "not a picture" in line for line in result.broken)
    assert any("0000003/0" in line and "64 x 64 and 64 x 32" in line for line in result.broken)


@pytest.mark.parametrize("cache", [False, True])
def test_broken_rows_of_buckets_are_replaced(run, records, cache):
    """One among the squares, and the only one of its shape, whose header is whole."""
    stream = io.BytesIO()
    Image.effect_noise((128, 64), 50).convert("RGB").save(stream, "PNG")
    wide = stream.getvalue()[:500]
    broken = [replace(records[0], original_image=b""), replace(records[1], original_image=wide, edited_image=wide)]
    result = run(data=[*broken, *records[2:4]], buckets=True, cache=cache)
    assert (result.finished, result.broken_count) == (True, 2)


def test_no_readable_row_is_an_error(run, records):
    with pytest.raises(DatasetError, match="holds no pair"):
        run(data=[])
    for workers in (0, 2):
        with pytest.raises(DatasetError, match=r"^2 rows one after the other cannot be read; the last: pair 0.*$"):
            run(data=[replace(record, original_image=b"") for record in records[:2]], workers=workers)


def test_the_curve_is_drawn_while_a_run_goes_on_and_when_it_fails(run, tmp_path):
    curve, seen = tmp_path / "run" / "loss.png", []

    def look(step, _):
        seen.append(curve.exists())
        if step == 3:
            curve.unlink()
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        run(save_every=2, hooks=Hooks(on_result=look))
    assert (seen, curve.exists()) == ([False, True, True], True)


def test_presets_for_a_gpu_compile_nothing_on_a_cpu(run, monkeypatch):
    """None, the presets' value, is on CUDA where Triton is: a run that began plainly goes on to the bit on a CPU."""
    compiled = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda *_, **__: compiled.append(True))
    assert preset("lora").compile is None and preset("embedded").compile is False
    run("none", steps=1, compile=None)
    assert not compiled
    run("asked", steps=1, compile=True)
    assert compiled
