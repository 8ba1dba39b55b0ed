"""Prompt-to-Prompt pairs: the original's numbers, a slow reference, and a pair that depends on its seed alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ip2p_engine.diffusion.noise import SampleNoise
from ip2p_engine.diffusion.sampling import SAMPLERS, sample
from ip2p_engine.diffusion.schedule import make_sigmas, step_of
from ip2p_engine.errors import CheckpointError, ConfigError, Interrupted
from ip2p_engine.hooks import Hooks
from ip2p_engine.images import to_images
from ip2p_engine.networks.conditioning import decode_latents, encode_text
from ip2p_engine.networks.model import Model, load_model
from ip2p_engine.p2p.denoiser import PairConditioning, PairDenoiser
from ip2p_engine.p2p.generator import PairConfig, PairGenerator, PairJob, draw_settings, pairs_that_fit

HORSE, DRAGON = "photograph of a girl riding a horse", "photograph of a girl riding a dragon"
HEART, STAR = "a large red heart on a sky background", "a large red star on a sky background"
DRAWS = json.loads((Path(__file__).parents[1] / "data" / "reference" / "misc.json").read_text())


@pytest.fixture(scope="module")
def tiny(tiny_pair_model):
    return tiny_pair_model()


@pytest.fixture(scope="module")
def exact(tiny_pair_model):
    """The same in double precision, so that only a wrong rule makes a difference."""
    return tiny_pair_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def scenes():
    return load_model("embedded-sd")


def conditioning(texts, p, w, **options):
    """One pair a p."""
    count = len(p)
    rows = {"source_rows": (1,) * count, "edited_rows": (2,) * count}
    return PairConditioning(texts=texts, p2p_thresholds=tuple(p), cfg=tuple(w), **rows, **options)


@torch.inference_mode()
def walk(model, cond, steps, noises, *, sampler="euler_ancestral"):
    """Latents (2B, 4, h, w); ``noises`` are (B, 4, h, w) in draw order."""
    sigmas, draws = make_sigmas("model", model.schedule, steps), iter(noises)
    x = next(draws).repeat_interleave(2, dim=0) * float(sigmas[0])
    denoiser = PairDenoiser(model, sigmas)
    noise = {"noise": lambda _: next(draws).repeat_interleave(2, dim=0)}
    return sample(sampler, denoiser, x, sigmas, cond, **noise), denoiser


def noises_of(seeds, steps, dtype=torch.float64):
    noise = SampleNoise(seeds)
    return [noise.draw(torch.empty(len(seeds), 4, 8, 8, dtype=dtype)) for _ in range(steps)]


def near(a, b):
    """Latents within rounding, pictures within one step of 255."""
    assert (a.latents - b.latents).abs().max() < 1e-5 * a.latents.abs().max().clamp(min=1)
    for one, other in ((a.source_image, b.source_image), (a.edited_image, b.edited_image)):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= 1


@pytest.mark.parametrize("row", DRAWS["p2p_draws_separate_generator"], ids=lambda row: str(row["seed"]))
def test_draws_are_the_original_s(row):
    assert draw_settings(row["seed"]) == (row["p2p_threshold"], row["cfg_scale"])


def test_draws_of_other_ranges():
    assert draw_settings(3, (0.4, 0.4), (9.0, 9.0)) == (0.4, 9.0)
    drawn = [draw_settings(seed, (0.2, 0.3), (1.0, 2.0)) for seed in range(200)]
    assert all(0.2 <= p <= 0.3 and 1 <= w <= 2 for p, w in drawn)
    assert len({p for p, _ in drawn}) > 190


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_the_original_s_pairs(tiny_sd, pairs_reference, p):
    """The whole run at three p; the noise is the original's, which draws p and w in between on a CPU."""
    texts = encode_text(tiny_sd, ["", HORSE, DRAGON])
    assert (texts.tokens[1:] - pairs_reference["cond"]).abs().max() < 1e-5
    z, denoiser = walk(tiny_sd, conditioning(texts, [p], [9.0]), 10, pairs_reference["noises/cpu_order"])
    assert (z - pairs_reference[f"p2p{p}_cpu_order/z"]).abs().max() < 5e-4
    pictures = np.stack([np.asarray(image).astype(int) for image in to_images(decode_latents(tiny_sd, z))])
    assert np.abs(pictures - pairs_reference[f"p2p{p}_cpu_order/image_u8"].numpy()).max() <= 1
    assert denoiser.evaluations == 40


@pytest.mark.parametrize("p", [0, 1])
@torch.inference_mode()
def test_the_original_s_step(tiny_sd, pairs_reference, p):
    texts = encode_text(tiny_sd, ["", HORSE, DRAGON])
    sigma = float(pairs_reference["step/sigma"])
    denoiser = PairDenoiser(tiny_sd, [sigma, 0.0])
    ours = denoiser(pairs_reference["step/z"], sigma, conditioning(texts, [float(p)], [9.0]))
    assert (ours - pairs_reference[f"step/combined_p2p{p}"]).abs().max() < 1e-3


@pytest.mark.slow
def test_the_generator_from_a_seed_alone(tiny_sd, pairs_reference):
    """The original on a GPU draws p and w from another generator than the noise; so do we."""
    config = PairConfig(steps=10, size=(128, 128), p2p_range=(0.3, 0.3), cfg_range=(9.0, 9.0))
    (pair,) = PairGenerator(tiny_sd, config).generate(HORSE, DRAGON, [2023])
    assert (pair.latents - pairs_reference["p2p0.3_split_order/z"]).abs().max() < 5e-4
    assert pair.source_image.size == pair.edited_image.size == (128, 128)


@pytest.mark.parametrize("steps", [1, 2, 5, pytest.param(20, marks=pytest.mark.slow)])
def test_equal_to_copied_logits(exact, slow_pairs, steps):
    """A batch with p = 0, between, and beyond 1 against one pair after another with explicit maps."""
    texts, p, w = encode_text(exact, ["", HEART, STAR]), [0.0, 0.45, 1.5], [7.5, 9.0, 15.0]
    noises = noises_of([4, 5, 6], steps)
    z, _ = walk(exact, conditioning(texts, p, w), steps, noises)
    sigmas = make_sigmas("model", exact.schedule, steps).tolist()
    for pair in range(3):
        alone = [noise[pair : pair + 1] for noise in noises]
        expected = slow_pairs.slow_pair(exact, texts.tokens, p[pair], w[pair], sigmas, alone)
        assert (z[2 * pair : 2 * pair + 2] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("start", "late", "evaluations"), [(0.0, 0, 32), (0.3, 3, 26), (1.0, 8, 16)])
def test_a_late_start_is_the_source_s_caption_computed_once(exact, slow_pairs, start, late, evaluations):
    texts, noises = encode_text(exact, ["", HEART, STAR]), noises_of([7], 8)
    z, denoiser = walk(exact, conditioning(texts, [0.6], [8.0], edited_prompt_start=start), 8, noises)
    sigmas = make_sigmas("model", exact.schedule, 8).tolist()
    expected = slow_pairs.slow_pair(exact, texts.tokens, 0.6, 8.0, sigmas, noises, late_steps=late)
    assert (z - expected).abs().max() <= 1e-5
    assert denoiser.evaluations == evaluations
    assert bool((z[0] - z[1]).abs().max() == 0) == (start == 1.0)


def test_a_candidate_depends_on_its_seed_alone(exact):
    """Different p and w in one batch, in another order, in other batches, beside another caption."""
    seeds, quick = [11, 12, 13, 14, 15], PairConfig(steps=2)
    many = PairGenerator(exact, quick).generate(HEART, STAR, seeds)
    assert [pair.seed for pair in many] == seeds
    assert [(pair.p2p_threshold, pair.cfg) for pair in many] == [draw_settings(seed) for seed in seeds]
    backwards = PairGenerator(exact, replace(quick, batch_pairs=2)).generate(HEART, STAR, seeds[::-1])
    for one, other in zip(many, backwards[::-1], strict=True):
        near(one, other)
        assert one.settings == other.settings
    jobs = [PairJob(caption=STAR, edited_caption="", seed=2), PairJob(caption=HEART, edited_caption=STAR, seed=12)]
    (mixed,) = PairGenerator(exact, quick).batches(jobs)
    near(mixed[1], many[1])
    assert (mixed[0].caption, mixed[0].edited_caption) == (STAR, "")


@pytest.mark.slow
def test_the_embedded_model(scenes):
    """Trained weights: still the seed alone, and the caption that differs is drawn differently."""
    quick = PairConfig(steps=1)
    many = PairGenerator(scenes, quick).generate(HEART, STAR, [1, 2])
    near(many[1], PairGenerator(scenes, quick).generate(HEART, STAR, [2])[0])
    assert (many[0].latents[0] - many[0].latents[1]).abs().max() > 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["self", "refine"])
def test_a_gpu_makes_the_same_pairs(tiny_pair_model, mode):
    config = PairConfig(steps=4, mode=mode, local_blend=mode == "refine")
    here = PairGenerator(tiny_pair_model(dtype=torch.float64), config).generate(HEART, STAR, [1, 2])
    there = PairGenerator(tiny_pair_model(dtype=torch.float64).to("cuda"), config).generate(HEART, STAR, [1, 2])
    for one, other in zip(here, there, strict=True):
        near(one, other)


def test_two_runs_are_bit_equal(tiny):
    generator = PairGenerator(tiny, PairConfig(steps=2))
    first, second = (generator.generate(HEART, STAR, [1, 2])[1] for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    assert first.edited_image.tobytes() == second.edited_image.tobytes()


def test_equal_captions_give_equal_pictures(tiny):
    (pair,) = PairGenerator(tiny, PairConfig(steps=3)).generate(HEART, HEART, [8])
    assert (pair.latents[0] - pair.latents[1]).abs().max() < 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_every_sampler_makes_pairs(tiny, sampler, steps):
    batch = PairGenerator(tiny, PairConfig(steps=steps, sampler=sampler)).generate(HEART, STAR, [3, 4])
    assert all(pair.latents.isfinite().all() for pair in batch)


def test_a_size_that_is_no_square(tiny):
    (pair,) = PairGenerator(tiny, PairConfig(steps=1, size=(96, 64))).generate(HEART, STAR, [1])
    assert pair.source_image.size == (96, 64)
    assert pair.latents.shape == (2, 4, 8, 12)


def test_hooks(tiny):
    steps, done = [], []
    hooks = Hooks(on_step=lambda i, n, x, *_: steps.append((i, n, len(x))), on_progress=lambda *at: done.append(at))
    PairGenerator(tiny, PairConfig(steps=2, batch_pairs=2)).generate(HEART, STAR, [1, 2, 3], hooks=hooks)
    assert steps == [(0, 2, 4), (1, 2, 4), (0, 2, 2), (1, 2, 2)]
    assert done == [(2, 3, ""), (3, 3, "")]


def test_stopping_loses_only_the_batch_at_work_and_leaves_the_model_as_it_was(tiny):
    before, asked = tiny.unet.attn_processors, iter([False] * 3 + [True])
    generator = PairGenerator(tiny, PairConfig(steps=2, batch_pairs=1))
    jobs = [PairJob(caption=HEART, edited_caption=STAR, seed=seed) for seed in (1, 2)]
    batches = generator.batches(jobs, hooks=Hooks(should_stop=lambda: next(asked)))
    assert [pair.seed for pair in next(batches)] == [1]
    with pytest.raises(Interrupted, match="step 2 of 2"):
        next(batches)
    assert tiny.unet.attn_processors == before


def test_settings_are_json_and_make_the_pair_again(tiny):
    (pair,) = PairGenerator(tiny, PairConfig(steps=2), name="tiny").generate(HEART, STAR, [21])
    saved = json.loads(json.dumps(pair.settings))
    assert (saved["seed"], saved["checkpoint"], saved["size"]) == (21, "tiny", [64, 64])
    fixed = PairConfig(steps=saved["steps"], p2p_range=(saved["p2p_threshold"],) * 2, cfg_range=(saved["cfg"],) * 2)
    (again,) = PairGenerator(tiny, fixed).generate(HEART, STAR, [saved["seed"]])
    near(pair, again)


def test_v_prediction_is_the_same_network_in_other_words(exact):
    """v: x / (sigma^2 + 1) - out sigma / sqrt(sigma^2 + 1), where out is what eps would be."""
    texts, x, sigma = encode_text(exact, ["", HEART, STAR]), torch.randn(2, 4, 8, 8, dtype=torch.float64), 3.0
    cond = conditioning(texts, [0.5], [8.0])
    as_v = Model(
        spec=replace(exact.spec, prediction="v"),
        unet=exact.unet,
        autoencoder=exact.autoencoder,
        text_encoders=exact.text_encoders,
    )
    with torch.inference_mode():
        denoiser = PairDenoiser(exact, [sigma, 0.0])
        output = (x - denoiser(x, sigma, cond)) / sigma
    with torch.inference_mode():
        denoiser = PairDenoiser(as_v, [sigma, 0.0])
        ours = denoiser(x, sigma, cond)
    assert (ours - (x / 10 - output * 3 / 10**0.5)).abs().max() < 1e-9


def test_sdxl(tiny_pair_model):
    model = tiny_pair_model("sdxl", torch.float64)
    config = PairConfig(steps=2, size=(64, 96), edited_prompt_start=0.4)
    many = PairGenerator(model, config).generate(HEART, STAR, [1, 2])
    for pair in many:
        near(pair, PairGenerator(model, config).generate(HEART, STAR, [pair.seed])[0])
    assert (many[0].latents[0] - many[0].latents[1]).abs().max() > 1e-4


def test_which_step_a_sigma_belongs_to(tiny):
    sigmas = make_sigmas("model", tiny.schedule, 20).tolist()
    assert [step_of(sigma, sigmas) for sigma in sigmas[:-1]] == list(range(20))
    in_float32 = torch.tensor(sigmas).tolist()
    assert [step_of(sigma, sigmas) for sigma in in_float32[:-1]] == list(range(20))
    assert step_of((sigmas[3] + sigmas[4]) / 2, sigmas) == 3
    assert step_of(1e-9, sigmas) == 19
    assert step_of(1e9, sigmas) == 0


def test_as_many_as_fit(tiny, monkeypatch):
    monkeypatch.setattr("ip2p_engine.p2p.generator.free_memory", lambda _: 0)
    assert pairs_that_fit(tiny, (64, 64)) == 1
    a_pair = 4 * 64 * 16 * 60 * 4
    for factor, fitting in ((1.0, 1), (4.0, 2), (7.0, 4), (1e6, 64)):
        monkeypatch.setattr("ip2p_engine.p2p.generator.free_memory", lambda _, factor=factor: int(factor * a_pair))
        assert pairs_that_fit(tiny, (64, 64)) == fitting


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "steps is 0; give a whole number"),
        ({"batch_pairs": 0}, "batch_pairs is 0"),
        ({"sampler": "magic"}, "sampler 'magic' is unknown; choose one of euler_ancestral"),
        ({"mode": "blend"}, "mode 'blend' is unknown; choose one of self, replace, refine"),
        ({"p2p_range": (0.9, 0.1)}, "p2p_range is .*lower and the upper end"),
        ({"cfg_range": (7.5,)}, "cfg_range is"),
        ({"cfg_range": (-1.0, 2.0)}, "cfg_range is -1.0; give a finite number"),
        ({"edited_prompt_start": 1.1}, "edited_prompt_start is 1.1; give a fraction"),
        ({"cross_steps": float("nan")}, "cross_steps is nan"),
        ({"reweight": {"red": 2.0}}, "reweight has no effect; use mode 'refine'"),
    ],
)
def test_settings_that_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        PairConfig(**options)


def test_models_and_sizes_that_are_refused(tiny, editor):
    with pytest.raises(CheckpointError, match="takes 8 input channels, and pairs are made by a text-to-image model"):
        PairGenerator(editor.model)
    for size in ((63, 64), (64,), (64, 8), (0, 0)):
        with pytest.raises(ConfigError, match="multiples of 16"):
            PairGenerator(tiny, PairConfig(size=size))
    generator = PairGenerator(tiny)
    with pytest.raises(ConfigError, match="no pair to make"):
        generator.generate(HEART, STAR, [])
    with pytest.raises(ConfigError, match="seed is -1"):
        generator.generate(HEART, STAR, [0, -1])
