"""A run is a model at any time: its folder, a step of it, what it exports, and what it says before it begins."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ip2p_engine import cli
from ip2p_engine.checkpoint.training_run import with_adapters
from ip2p_engine.config import from_mapping
from ip2p_engine.errors import CheckpointError, ConfigError
from ip2p_engine.hooks import Hooks
from ip2p_engine.networks.model import load_model
from ip2p_engine.train import Plan, TrainConfig, plan, train
from ip2p_engine.train.checkpoints import latest, load_checkpoint
from ip2p_engine.train.config import changed_fields, with_outputs
from ip2p_engine.train.run_folder import RunFolder

CPU = {"device": "cpu", "dtype": "file"}


def command(*words):
    return cli.main([str(word) for word in words])


def unet(source, **settings):
    return load_model(source, **CPU, **settings).unet.state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_after(steps):
    done = [0]
    return Hooks(on_result=lambda step, _: done.append(step), should_stop=lambda: done[-1] >= steps - 1)


@pytest.fixture(scope="module")
def stopped(run_in, tmp_path_factory):
    """A run of 6 steps that was stopped after 3, with checkpoints after 2 and 3 and models after 2."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    result = run_in(folder, steps=6, save_every=2, export_every=2, hooks=stop_after(3))
    assert not result.finished
    return folder


def test_a_stopped_run_is_its_average_after_the_last_step(stopped):
    saved = load_checkpoint(stopped / "checkpoints" / "step-00000003.pt")
    assert equal(unet(stopped), saved["ema"])
    assert equal(unet(stopped, weights="raw"), saved["trained"])
    assert equal(unet(stopped / "checkpoints" / "step-00000003.pt"), saved["ema"])
    assert equal(unet(f"{stopped}@3"), saved["ema"])
    model = load_model(stopped, **CPU)
    assert (model.spec.in_channels, model.spec.weights) == (8, "ema")


def test_an_earlier_step_is_what_was_exported_then(stopped):
    saved = load_checkpoint(stopped / "checkpoints" / "step-00000002.pt")
    exported = stopped / "exports" / "step-00000002" / "ema.safetensors"
    assert equal(unet(exported), saved["ema"]) and equal(unet(f"{stopped}@2"), saved["ema"])
    with pytest.raises(CheckpointError, match=r"has no step 1; it has 2, 3 \(train with `export_every`"):
        load_model(f"{stopped}@1", **CPU)


def test_commands_take_a_run(stopped, tmp_path, capsys):
    assert command("inspect", stopped, "--json") == 0
    card = json.loads(capsys.readouterr().out)
    assert (card["layout"], card["in_channels"], card["training"]["step"]) == ("run", 8, 3)
    assert "directory" not in card["training"]
    assert command("inspect", stopped) == 0
    said = capsys.readouterr().out
    assert "\ntraining     " in said and "batch_size 4" in said and "compile" not in said
    assert all(len(line) < 120 for line in said.splitlines() if str(stopped) not in line)
    assert command("convert", stopped, tmp_path / "a.safetensors", "--to", "ldm") == 0
    assert equal(unet(tmp_path / "a.safetensors"), unet(stopped))
    assert command("inspect", tmp_path / "a.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["training"]["step"] == 3


def test_a_run_edits(stopped, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    words = ("--checkpoint", stopped, "--out", tmp_path / "out.png", "--steps", "1", "--device", "cpu")
    assert command("edit", tmp_path / "in.png", "--instruction", "make it blue", *words) == 0
    assert Image.open(tmp_path / "out.png").size == (64, 64)


def test_a_run_whose_base_has_gone_asks_for_it(stopped, base, tmp_path):
    moved = shutil.copytree(stopped, tmp_path / "run")
    about = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps({**about, "base": "gone.safetensors", "directory": "/nowhere"}))
    with pytest.raises(CheckpointError, match=r"was trained from gone.safetensors, .*name it as the `base`"):
        load_model(moved, **CPU)
    assert equal(unet(moved, base=base()), unet(stopped))


def test_a_base_is_found_where_the_run_began(stopped, base, tmp_path, monkeypatch):
    moved = shutil.copytree(stopped, tmp_path / "run")
    about = json.loads((moved / "run.json").read_text())
    about |= {"base": base().name, "directory": str(base().parent)}
    (moved / "run.json").write_text(json.dumps(about))
    assert equal(unet(moved), unet(stopped))


def test_a_run_without_a_step_and_another_folder_are_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.json").write_text('{"config": {}, "base": "x"}')
    with pytest.raises(CheckpointError, match="is a run without a checkpoint yet"):
        load_model(tmp_path, **CPU)
    (tmp_path / "checkpoints" / "step-00000001.pt").write_bytes(b"")
    (tmp_path / "run.json").write_text('{"kind": "curve"}')
    with pytest.raises(CheckpointError, match="holds no training run"):
        load_model(tmp_path, **CPU)


def test_adapters_are_added_as_their_paper_says():
    """W + (alpha / r) B A for a linear layer, and the composed convolution for a convolution."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    whole = {"a.weight": draw(5, 4), "c.weight": draw(6, 3, 3, 3), "c.bias": draw(6)}
    down, up, cdown, cup = draw(2, 4), draw(5, 2), draw(2, 3, 3, 3), draw(6, 2, 1, 1)
    state = {"a.lora_A.default.weight": down, "a.lora_B.default.weight": up}
    state |= {"c.lora_A.default.weight": cdown, "c.lora_B.default.weight": cup, "c.bias": torch.ones(6)}
    merged = with_adapters(whole, state, 0.5)
    assert torch.allclose(merged["a.weight"], whole["a.weight"] + 0.5 * up @ down, atol=1e-6)
    x = draw(1, 3, 8, 8)
    conv = torch.nn.functional.conv2d
    wanted = conv(x, whole["c.weight"]) + 0.5 * conv(conv(x, cdown), cup)
    assert torch.allclose(conv(x, merged["c.weight"]), wanted, atol=1e-4)
    assert torch.equal(merged["c.bias"], torch.ones(6))
    with pytest.raises(CheckpointError, match="has no weight in the base"):
        with_adapters({"b.weight": up}, {"a.lora_A.default.weight": down, "a.lora_B.default.weight": up}, 1.0)


@pytest.mark.slow
def test_adapters_of_a_stopped_run_are_merged_as_a_finished_one_merges_them(run, tmp_path):
    result = run("lora", steps=3, lora_rank=2, lora_alpha=3.0, learning_rate=0.05)
    assert set(result.files) == {"ema", "lora", "conv_in"}
    finished = unet(result.files["ema"])
    result.files["ema"].unlink()
    merged = unet(tmp_path / "lora")
    assert all(torch.allclose(merged[name], finished[name], atol=1e-6) for name in finished)
    assert command("inspect", tmp_path / "lora") == 0


@pytest.mark.slow
def test_the_last_export_and_the_output_are_one_file(run, tmp_path):
    result = run(steps=4, export_every=2, outputs=["ema", "diffusers"])
    for name in ("ema.safetensors", "diffusers/unet/diffusion_pytorch_model.safetensors"):
        assert os.path.samefile(tmp_path / "run" / name, tmp_path / "run" / "exports" / "step-00000004" / name)
    assert sorted(path.name for path in (tmp_path / "run" / "exports").iterdir()) == ["step-00000002", "step-00000004"]
    assert equal(unet(result.files["ema"]), unet(f"{tmp_path / 'run'}@4"))


@pytest.mark.slow
def test_a_finished_run_takes_little_more_than_its_checkpoint(run, tmp_path):
    result = run(steps=4, save_every=1)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix != ".pt"]
    assert sum(path.stat().st_size for path in files) <= 2.2 * result.files["ema"].stat().st_size
    assert len(list((tmp_path / "run").rglob("*.pt"))) == 1


@pytest.mark.slow
def test_a_half_precision_base_gives_a_folder_that_plain_diffusers_runs(run, base, tiny_model, tmp_path):
    """Of one type: text encoders stay as they lie on the disk, so half ones would not meet float32 networks."""
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    from ip2p_engine.checkpoint.write import save_ldm

    half = save_ldm(tiny_model(), tmp_path / "half.safetensors", torch.float16)
    result = run(base=half, steps=1, outputs=["diffusers"])
    dtypes = {
        value.dtype for path in result.files["diffusers"].rglob("*.safetensors") for value in load_file(path).values()
    }
    assert dtypes == {torch.float32}
    whole = run("ema", base=half, steps=1).files["ema"]  # trained ones float32, frozen ones half
    assert {load_model(whole, **CPU).unet.dtype, load_model(whole, **CPU).autoencoder.dtype} == {
        torch.float32,
        torch.half,
    }
    assert command("convert", whole, tmp_path / "converted", "--to", "diffusers") == 0
    for folder in (result.files["diffusers"], tmp_path / "converted"):
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        edited = pipeline("make it snow", image=Image.new("RGB", (64, 64)), num_inference_steps=1).images[0]
        assert edited.size == (64, 64)


@pytest.mark.slow
def test_steps_may_change_under_a_cosine(run, tmp_path):
    run(steps=4, schedule="cosine", save_every=1, hooks=stop_after(2))
    assert run(steps=6, schedule="cosine", save_every=1).step == 6
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["changes"] == [{"after_step": 2, "steps": [4, 6]}]


@pytest.mark.slow
def test_a_run_that_kept_no_state_is_not_begun_anew(run, tmp_path):
    run(keep=0)
    assert latest(tmp_path / "run" / "checkpoints") is None
    with pytest.raises(ConfigError, match="finished after 4 steps and kept no checkpoint"):
        run(steps=8)


def test_what_a_run_leaves_is_what_it_began_with():
    began = {"lora_rank": 0}  # 0.1 had no such field
    assert with_outputs(TrainConfig(), None).outputs == ("ema",)
    assert with_outputs(TrainConfig(lora_rank=2), None).outputs == ("ema", "lora")
    assert with_outputs(TrainConfig(), began).outputs == ("ema", "raw", "diffusers")
    assert with_outputs(TrainConfig(lora_rank=2), began).outputs == ("ema", "raw", "diffusers", "lora")
    assert with_outputs(TrainConfig(), {"outputs": ["raw"]}).outputs == ("raw",)
    assert with_outputs(TrainConfig(outputs=("raw",)), {"outputs": ["ema"]}).outputs == ("raw",)
    assert changed_fields({"schedule": "cosine"}, TrainConfig(schedule="cosine", steps=7, outputs=("raw",))) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"outputs": ()}, "choose among ema, raw, diffusers, lora"),
        ({"outputs": ("onnx",)}, "choose among"),
        ({"outputs": "ema"}, "choose among"),
        ({"outputs": ("lora",)}, "all weights are trained"),
        ({"export_every": -1}, "export_every is -1"),
    ],
)
def test_outputs_that_are_none(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(TrainConfig, values)


@pytest.mark.parametrize(
    ("package", "field"), [("peft", {"lora_rank": 2}), ("bitsandbytes", {"optimizer": "adamw8bit"})]
)
def test_a_missing_extra_is_refused_before_anything_is_read(run, tmp_path, monkeypatch, package, field):
    from ip2p_engine.train import optimizers

    found = optimizers.find_spec
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ConfigError, match=f"needs {package}, which is missing; pip install {package}"):
        run(data="no such data set", base="no such base", cache=True, **field)
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_and_writes_nothing(store, base, tmp_path, capsys):
    settings = TrainConfig(steps=20, batch_size=4, resolution=64, resize=(64, 64), workers=0, micro_batch=2)
    told = plan(settings, data=store, base=base(), out=tmp_path / "run", device="cpu")
    assert (told.pairs, told.first, told.steps, told.steps_an_epoch) == (10, 0, 20, 2.5)
    unet_bytes = 4 * told.trained
    assert told.checkpoint == 4 * unet_bytes  # weights, average, two moments
    assert told.outputs == pytest.approx(base().stat().st_size, rel=0.1)
    assert told.seconds > 0
    assert not (tmp_path / "run").exists()
    words = ("--steps", 20, "--batch-size", 4, "--resolution", 64, "--device", "cpu", "--plan")
    assert command("train", "--data", store, "--base", base(), "--out", tmp_path / "run", *words) == 0
    out = capsys.readouterr().out
    assert "10" in out and "0 of 20 done, 2.5 an epoch, 8.0 epochs to come" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_tells_its_plan_before_the_first_step(store, base, tmp_path):
    settings = TrainConfig(steps=1, batch_size=4, resolution=64, workers=0, validate_every=0)
    told = []
    hooks = Hooks(on_result=lambda step, _: told.append(step))
    train(settings, data=store, base=base(), out=tmp_path, device="cpu", hooks=hooks, on_plan=told.append)
    assert isinstance(told[0], Plan) and told[1:] == [1]
    assert RunFolder(tmp_path, writes=False).rows()[-1]["step"] == 1
    state = latest(tmp_path / "checkpoints").stat().st_size
    assert state == pytest.approx(told[0].checkpoint, rel=0.3)
