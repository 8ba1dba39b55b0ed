"""The eleven faults of the widely used training scripts (letters as in docs/training.md): each is a promise here."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_engine.diffusion.guidance import conditioning_dropout
from ip2p_engine.hooks import Hooks
from ip2p_engine.networks.conditioning import encode_image
from ip2p_engine.networks.model import load_model
from ip2p_engine.train import TrainConfig
from ip2p_engine.train.batches import PictureReader, Share, batches
from ip2p_engine.train.checkpoints import latest, load_checkpoint
from ip2p_engine.train.encoding import Encoder
from ip2p_engine.train.networks import make_trainable
from ip2p_engine.train.order import make_order
from ip2p_engine.train.randomness import draw
from ip2p_engine.train.sources import open_source

SMALL = TrainConfig(steps=4, batch_size=4, resolution=64, resize=(64, 72), workers=0)


def seen(source, config=SMALL, *, rank=0, world=1, first=0):
    share = Share(rank=rank, world=world, micro=config.batch_size // world)
    return list(batches(PictureReader(source, config), make_order(source, config), config, share, first))


def test_a_first_convolutions_bias_is_kept(base):
    model = load_model(base())
    bias = model.unet.conv_in.bias.clone()
    assert bias.abs().max() > 0
    assert torch.equal(make_trainable(model, TrainConfig()).unet.conv_in.bias, bias)


def test_b_conditions_are_dropped_unless_told_otherwise():
    r = draw(0, 0, range(4000), (1, 1, 1)).drop
    text, image = conditioning_dropout(r, TrainConfig().dropout)
    for share in (text & image, text & ~image, image & ~text):
        assert share.float().mean().item() == pytest.approx(0.05, abs=0.012)


def test_c_a_run_without_a_seed_trains_and_is_repeated_by_the_next(store):
    assert TrainConfig().seed == 0
    first, second = (seen(open_source(store, SMALL))[0] for _ in range(2))
    assert torch.equal(first.draws.noise, second.draws.noise)


def test_d_processes_have_noise_of_their_own(store):
    """Each process's share is a part of the whole batch, so no noise, level or dropout is there twice."""
    source = open_source(store, SMALL)
    whole = seen(source)
    shares = [seen(source, rank=rank, world=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        for rank in (0, 1):
            assert torch.equal(shares[rank][step].draws.noise, batch.draws.noise[rank::2])
            assert shares[rank][step].instructions == batch.instructions[rank::2]
        assert len({float(u) for u in batch.draws.level}) == 4
        assert not torch.equal(shares[0][step].draws.noise, shares[1][step].draws.noise)


def ramp(width, height):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    buffer = io.BytesIO()
    Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_e_pairs_of_a_batch_are_mirrored_and_cut_one_by_one(records):
    """Not a batch at a time; and crops move, also on pictures that are wider than high."""
    pair = replace(records[0], original_image=ramp(128, 64), edited_image=ramp(128, 64))
    (batch,) = seen(open_source([pair], SMALL), replace(SMALL, steps=1, batch_size=16))
    pixels = batch.tensors["pixels"].float()
    mirrored = pixels[:, 0, 0, 0, 0] > pixels[:, 0, 0, 0, -1]
    assert 2 < mirrored.sum() < 14
    assert len({row[0, 0, 0].tolist()[0] for row in pixels[~mirrored]}) > 2
    assert torch.equal(pixels[:, 0], pixels[:, 1])
    # Half the width of a 2 : 1 picture is seen: the aspect is kept.
    span = (pixels[:, 0, 0, 0, -1] - pixels[:, 0, 0, 0, 0]).abs()
    assert ((span > 100) & (span < 135)).all()


@pytest.mark.parametrize("family", ["sd1", "cosxl"])
def test_f_the_condition_is_the_mode_and_not_a_sample(store, base, family):
    """Scaled as for an edit, which is for CosXL-Edit alone."""
    model = make_trainable(load_model(base(family)), SMALL)
    pixels = seen(open_source(store, SMALL))[0].tensors["pixels"]
    one, two = (Encoder(model).latents(pixels)["condition"] for _ in range(2))
    assert torch.equal(one, two)
    assert torch.allclose(one, encode_image(model, 2 * pixels[:, 0].float() / 255 - 1), atol=1e-5)


def test_g_an_epoch_that_batches_do_not_divide(run):
    """Ten pairs in steps of four: every batch is full, and each example has its own size ids."""
    seen = []
    stop = Hooks(on_result=lambda _, at: seen.append(at), should_stop=lambda: len(seen) == 2)
    assert run(family="sdxl", micro_batch=3, hooks=stop).step == 3


def test_h_a_resumed_run_sees_what_comes_next(store):
    source = open_source(store, SMALL)
    straight, rest = seen(source), seen(source, first=2)
    assert [batch.instructions for batch in rest] == [batch.instructions for batch in straight[2:]]
    assert torch.equal(rest[0].tensors["pixels"], straight[2].tensors["pixels"])
    assert rest[0].instructions != straight[0].instructions


@pytest.mark.slow
def test_i_validation_draws_nothing_that_training_draws_from(run, tmp_path):
    for name, settings in (("plain", {}), ("watched", {"validate_every": 1, "validation_count": 1})):
        done = []  # the second step comes after a validation
        hooks = Hooks(on_result=lambda _, at, done=done: done.append(at), should_stop=lambda done=done: len(done) == 1)
        run(name, hooks=hooks, **settings)
    states = [load_checkpoint(latest(tmp_path / name / "checkpoints")) for name in ("plain", "watched")]
    for part in ("trained", "ema"):
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items())


def test_j_columns_mean_what_they_are_called(tmp_path, records):
    """One published mapping has instruction and edited picture the wrong way round."""
    import pyarrow
    import pyarrow.parquet

    pair = records[0]
    values = {"source": pair.original_image, "say": pair.edit_prompt, "target": pair.edited_image}
    pyarrow.parquet.write_table(pyarrow.table({k: [v] for k, v in values.items()}), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet", replace(SMALL, columns=("source", "say", "target")))
    example = source[0]
    assert (example.original, example.instruction, example.edited) == tuple(values.values())


def test_k_adapters_leave_the_first_convolution_what_it_was_and_train_its_new_channels(base):
    model = load_model(base())
    weight, bias = model.unet.conv_in.weight.clone(), model.unet.conv_in.bias.clone()
    tuned = make_trainable(model, replace(SMALL, lora_rank=2)).unet.conv_in
    assert torch.equal(tuned.bias, bias)
    assert torch.equal(tuned.weight[:, :4], weight)
    assert tuned.weight.requires_grad
    assert (tuned.weight[:, 4:] == 0).all()
