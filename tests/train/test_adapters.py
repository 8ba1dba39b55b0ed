"""Adapters beyond attention and to go on from, and text encoders that are trained, whole or by adapters."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ip2p_engine.checkpoint.lora import Lora, with_loras
from ip2p_engine.errors import CheckpointError, ConfigError
from ip2p_engine.networks.conditioning import encode_text
from ip2p_engine.networks.model import load_model
from ip2p_engine.tokenizer import tokenize
from ip2p_engine.train import TrainConfig
from ip2p_engine.train.adapters import begin_from, lora_state
from ip2p_engine.train.batches import PictureReader, Share, batches
from ip2p_engine.train.encoding import Encoder
from ip2p_engine.train.networks import make_trainable, trained_of
from ip2p_engine.train.objective import noise_levels
from ip2p_engine.train.order import make_order
from ip2p_engine.train.sources import open_source

CONV = {"lora_rank": 2, "lora_conv_rank": 3, "lora_conv_alpha": 1.5}
PLAIN = {"resize": (64, 64), "flip": 0.0}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def state_of(module):
    return {name.removeprefix("text_model."): value for name, value in module.state_dict().items()}


def near(one, other, atol=1e-6):
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=atol) for name in one)


@pytest.fixture
def adapted(base):
    """A model with adapters on attention and convolutions that are not zero."""
    model = make_trainable(load_model(base(), device="cpu"), TrainConfig(**CONV))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained_of(model).values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_convolutions_have_adapters_under_kohyas_names(adapted, base, tmp_path):
    """Every convolution but the first and the last; merged from the file they compute what they compute beside it."""
    file = tmp_path / "conv.safetensors"
    state = lora_state(adapted)
    down = state["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"]
    assert down.shape == (3, 16, 3, 3)
    assert state["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"].shape == (16, 3, 1, 1)
    assert state["lora_unet_down_blocks_0_resnets_0_conv1.alpha"] == 1.5
    layers = {name.partition(".")[0] for name in state}
    convolutions = [n for n, m in load_model(base()).unet.named_modules() if isinstance(m, torch.nn.Conv2d)]
    named = {f"lora_unet_{n.replace('.', '_')}" for n in convolutions}
    assert named - layers == {"lora_unet_conv_in", "lora_unet_conv_out"}
    save_file(state, file)
    merged = with_loras(load_model(base(), device="cpu"), [Lora(path=file)]).unet
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 8)
    with torch.no_grad():
        adapted.unet.conv_in.weight.zero_()
        adapted.unet.conv_in.weight[:, :4] = merged.conv_in.weight
        adapted.unet.conv_in.bias.copy_(merged.conv_in.bias)
        ours = adapted.unet(torch.cat([x, x], 1), 500, text).sample
        assert torch.allclose(ours, merged(x, 500, text).sample, atol=1e-5)
        assert (ours - load_model(base()).unet(x, 500, text).sample).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["kohya", "peft", "another alpha"])
def test_a_lora_to_go_on_from(adapted, base, tmp_path, form):
    """Whatever names it has, the adapters compute what it computes."""
    file, state = tmp_path / "old.safetensors", lora_state(adapted)
    if form == "peft":
        own = trained_of(adapted)
        state = {f"unet.{n.replace('.default', '')}": p.detach() for n, p in own.items() if "lora_" in n}
        state |= {n.replace(".lora_A.weight", ".alpha"): torch.tensor(1.5) for n in list(state) if "lora_A" in n}
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    alphas = {"lora_alpha": 7.0, "lora_conv_alpha": 0.3} if form == "another alpha" else {}
    config = TrainConfig(**{**CONV, **alphas})
    model = make_trainable(load_model(base(), device="cpu"), config)
    before = lora_state(model)
    assert all((value == 0).all() for name, value in before.items() if "lora_up" in name)
    begin_from(model, file)
    new, old = lora_state(model), lora_state(adapted)
    for layer in {name.partition(".")[0] for name in old}:
        (one, other) = (
            s[f"{layer}.alpha"]
            / s[f"{layer}.lora_down.weight"].shape[0]
            * s[f"{layer}.lora_up.weight"].flatten(1)
            @ s[f"{layer}.lora_down.weight"].flatten(1)
            for s in (new, old)
        )
        factor = 1.0 if form != "peft" or "conv" in layer or "proj" in layer else 1.5 / 2
        assert torch.allclose(one, factor * other, atol=1e-5), layer


def test_a_lora_that_does_not_fit_is_refused(adapted, base, tmp_path):
    file = tmp_path / "old.safetensors"
    save_file(lora_state(adapted), file)

    def begun(**settings):
        begin_from(make_trainable(load_model(base(), device="cpu"), TrainConfig(**settings)), file)

    with pytest.raises(CheckpointError, match="has rank 2 at .*and this run's adapters have rank 4; give its own rank"):
        begun(**{**CONV, "lora_rank": 4})
    with pytest.raises(CheckpointError, match=r"layers that this run does not train .*lora_conv_rank"):
        begun(lora_rank=2)
    for settings in ({"lora_from": "x"}, {"lora_conv_rank": 2}):
        with pytest.raises(ConfigError, match="is of adapters, and all weights are trained"):
            TrainConfig(**settings)


@pytest.mark.slow
def test_a_run_goes_on_from_a_lora_and_every_form_of_it_is_one_model(run, tmp_path):
    first = run("whole", steps=1)
    settings = {"base": first.files["ema"], "learning_rate": 0.05, **CONV}
    one = run("one", steps=2, **settings)
    silent = run("silent", steps=1, **{**settings, "learning_rate": 0.0}, lora_from=str(one.files["lora"]))
    assert near(load_file(one.files["lora"]), load_file(silent.files["lora"]))
    finished = load_model(one.files["ema"], device="cpu").unet.state_dict()
    merged = with_loras(load_model(first.files["ema"], device="cpu"), [Lora(path=one.files["lora"])])
    assert near(merged.unet.state_dict(), finished, 1e-5)
    one.files["ema"].unlink()
    assert near(load_model(tmp_path / "one", device="cpu").unet.state_dict(), finished)


def by_hand(family, base, store, config):
    """One step of both networks by plain torch and AdamW: (the model, the loss)."""
    model = load_model(base(family), device="cpu", dtype="file")
    frozen = {**config, "train_text_encoder": False, "text_learning_rate": None}
    trainable = make_trainable(copy.deepcopy(model), TrainConfig(**frozen))
    unet, texts = trainable.unet, copy.deepcopy(model.text_encoders)
    settings = TrainConfig(**frozen)
    source = open_source(store, settings)
    batch = next(
        batches(
            PictureReader(source, settings), make_order(source, settings), settings, Share(rank=0, world=1, micro=4), 0
        )
    )
    encoded = Encoder(trainable)(batch)
    groups = [{"params": unet.parameters()}, {"params": [p for t in texts for p in t.parameters()], "lr": 3e-4}]
    for text in texts:
        text.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)
    total = 0.0
    for n, said in enumerate(batch.instructions):
        r = float(batch.draws.drop[n])
        said = "" if r < 0.10 else said
        if family == "sd1":
            tokens, added = texts[0](tokenize([said], pad=49407)).last_hidden_state, None
        else:
            outputs = [
                t(tokenize([said], pad=pad), output_hidden_states=True)
                for t, pad in zip(texts, (49407, 0), strict=True)
            ]
            tokens = torch.cat([one.hidden_states[-2] for one in outputs], -1)
            added = {"text_embeds": outputs[1].text_embeds, "time_ids": encoded.size_ids[n : n + 1]}
        condition = encoded.condition[n] * (not 0.05 <= r < 0.15)
        z = trainable.spec.latent_scale * (encoded.mean[n] + encoded.std[n] * batch.draws.posterior[n])
        alpha, sigma, t = noise_levels(trainable, batch.draws.level[n : n + 1])
        x = (alpha * z + sigma * batch.draws.noise[n]).float()
        out = unet(torch.cat([x, condition[None]], 1), t, tokens, added_cond_kwargs=added).sample
        loss = (out[0] - batch.draws.noise[n]).square().mean() / 4
        loss.backward()
        total += float(loss)
    optimizer.step()
    return unet, texts, total


def stepped(ours, theirs):
    """How many numbers have a gradient worth the name; these are equal (of others AdamW's step is rounding's sign)."""
    count, names = 0, dict(theirs.named_parameters())
    for name, value in ours.named_parameters():
        gradient = names[name].grad
        if gradient is None:
            continue
        clear = gradient.abs() > 1e-5
        assert torch.allclose(value[clear], names[name][clear], atol=2e-6), name
        count += int(clear.sum())
    return count


TEXT = {**PLAIN, "steps": 1, "learning_rate": 1e-3, "text_learning_rate": 3e-4, "train_text_encoder": True}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_step_of_the_text_encoders_is_the_one_by_hand(run, base, store, tmp_path, family):
    config = {**TEXT, "resolution": 64, "batch_size": 4, "workers": 0, "dropout": 0.05}
    result = run(family=family, **TEXT, outputs=["raw"], seed=1)
    unet, texts, loss = by_hand(family, base, store, {**config, "seed": 1})
    assert losses(tmp_path / "run") == pytest.approx([loss], abs=1e-5)
    trained, plain = (load_model(source, device="cpu") for source in (result.files["raw"], base(family)))
    assert stepped(trained.unet, unet) > 1000
    for ours, theirs, before in zip(trained.text_encoders, texts, plain.text_encoders, strict=True):
        assert stepped(ours, theirs) > 100
        kept = {name: value for name, value in state_of(before).items() if torch.equal(value, state_of(ours)[name])}
        first = family == "sdxl" and ours is trained.text_encoders[0]  # is read before its last layer, and has but one
        assert len(kept) == (sum(n.startswith(("encoder.layers.0.", "final")) for n in kept) if first else 0)
    step = load_model(tmp_path / "run" / "checkpoints" / "step-00000001.pt", device="cpu", weights="raw")
    for ours, theirs in zip(step.text_encoders, trained.text_encoders, strict=True):
        assert near(state_of(ours), state_of(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"lora_rank": 2, "learning_rate": 0.05, "text_learning_rate": 0.02}])
def test_text_encoders_are_trained_cached_resumed_and_given_away(run, tmp_path, more):
    """Cached latents, halves of a batch, and a run in two pieces end alike; the average holds text encoders too."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    from ip2p_engine.hooks import Hooks

    first = run("base", steps=1)
    settings = {**TEXT, "steps": 4, "base": first.files["ema"], "validate_every": 2, "validation_count": 1, **more}
    forms = ["ema", "diffusers"] + (["lora"] if more else [])
    whole = run("whole", **settings, outputs=forms)
    run("cached", **settings, cache=True, micro_batch=2)
    done = [0]
    stop = Hooks(on_result=lambda step, _: done.append(step), should_stop=lambda: done[-1] >= 1)
    run("pieces", **settings, outputs=forms, hooks=stop)
    again = run("pieces", **settings, outputs=forms)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    a, b, plain = (load_model(r.files["ema"], device="cpu") for r in (whole, again, first))
    assert near(state_of(a.text_encoders[0]), state_of(b.text_encoders[0]), 0.0)
    assert not near(state_of(a.text_encoders[0]), state_of(plain.text_encoders[0]), 1e-4)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "validation.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["raw"] != rows[0]["ema"]
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(whole.files["diffusers"], safety_checker=None)
    assert near(state_of(pipeline.text_encoder), state_of(a.text_encoders[0]))
    if more:
        merged = with_loras(plain, [Lora(path=whole.files["lora"])])
        said = encode_text(a, ["make it snow"]).tokens
        assert torch.allclose(encode_text(merged, ["make it snow"]).tokens, said, atol=1e-5)
        base = StableDiffusionInstructPix2PixPipeline.from_pretrained(whole.files["diffusers"], safety_checker=None)
        base.text_encoder.load_state_dict(plain.text_encoders[0].state_dict())
        base.load_lora_weights(whole.files["lora"])
        tokens = base.text_encoder(tokenize(["make it snow"], pad=49407)).last_hidden_state
        assert torch.allclose(tokens, said, atol=1e-5)
