"""Editing: right pairing, one picture per seed whatever the batch, nothing left patched."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ip2p_engine import EditConfig, Hooks, InstructPix2Pix
from ip2p_engine.devices import enough_memory, usable_device
from ip2p_engine.diffusion.guidance import DualGuidance
from ip2p_engine.diffusion.sampling import euler
from ip2p_engine.errors import CheckpointError, ConfigError, ImageError, Interrupted
from ip2p_engine.images import fit, to_images
from ip2p_engine.networks.conditioning import (
    Conditioning,
    decode_latents,
    decode_pictures,
    decoded_at_once,
    encode_text,
)
from ip2p_engine.networks.denoiser import BranchDenoiser, _activation_bytes, denoised_from, input_scale
from ip2p_engine.networks.model import load_model
from ip2p_engine.p2p.generator import PairConfig, PairGenerator
from ip2p_engine.scenes.world import Scene, render

HEART = Scene(shape="heart", colour="red", background="sky", size="large")
SQUARE = Scene(shape="square", colour="green", background="pink", size="small", place="top left")
QUICK = EditConfig(steps=3)


def near(a, b):
    """Latents within rounding, pictures within one step of 255."""
    assert (a.latent - b.latent).abs().max() < 1e-5
    assert np.abs(np.asarray(a.image).astype(int) - np.asarray(b.image).astype(int)).max() <= 1


@pytest.mark.slow
def test_every_picture_meets_every_instruction_with_every_seed(editor):
    texts = ["make it snow", "paint it blue"]
    results = editor.edit([render(HEART), render(SQUARE)], texts, seeds=[3, 4], config=QUICK)
    assert [(r.instruction, r.seed) for r in results] == [(t, s) for _ in range(2) for t in texts for s in (3, 4)]
    assert [r.source.tobytes() for r in results[::4]] == [render(HEART).tobytes(), render(SQUARE).tobytes()]
    for result in results:
        alone = editor.edit(result.source, result.instruction, seeds=result.seed, config=QUICK)[0]
        near(result, alone)


def test_a_picture_does_not_depend_on_its_batch_or_its_place_in_it(editor):
    seeds = [11, 12, 13, 14, 15]
    many = editor.edit(render(HEART), "make it snow", seeds=seeds, config=QUICK)
    reversed_order = editor.edit(render(HEART), "make it snow", seeds=seeds[::-1], config=QUICK, batch=2)
    for one, other in zip(many, reversed_order[::-1], strict=True):
        near(one, other)
    assert (many[0].latent - many[1].latent).abs().max() > 0.01


@pytest.mark.slow
def test_batches_order_and_threads_change_a_picture_by_rounding_alone(editor):
    """The promise of README.md: in float32 one level of 255 at most, here at the full number of steps."""
    texts, threads = ["make it snow", "paint it blue", "turn it into a star"], torch.get_num_threads()
    pictures = [render(HEART), render(SQUARE)]
    alone = editor.edit(pictures, texts, seeds=[1], config=EditConfig(batch=1))
    together = editor.edit(pictures, texts, seeds=[1], config=EditConfig(batch=8))
    try:
        torch.set_num_threads(3 - min(2, threads))
        turned = editor.edit(pictures[::-1], texts[::-1], seeds=[1], config=EditConfig(batch=5))
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(alone, together, turned[::-1], strict=True):
        first, *others = (np.asarray(result.image).astype(int) for result in (one, two, three))
        assert max(np.abs(first - other).max() for other in others) <= 1


def test_two_runs_are_bit_equal(editor):
    first, second = (editor.edit(render(HEART), "make it snow", seeds=5, config=QUICK)[0] for _ in range(2))
    assert torch.equal(first.latent, second.latent)
    assert first.image.tobytes() == second.image.tobytes()


@pytest.mark.slow
def test_mixed_sizes_come_back_as_they_came(editor):
    sizes = [(64, 64), (90, 64), (64, 130), (200, 100)]
    pictures = [render(HEART).resize(size) for size in sizes]
    results = editor.edit(pictures, "make it snow", config=QUICK)
    assert [r.image.size for r in results] == sizes
    assert [tuple(r.settings["edited_at"]) for r in results] == [(64, 64), (64, 64), (64, 128), (128, 64)]
    kept = editor.edit(pictures[3], "make it snow", config=QUICK, size="keep", restore_size=False)[0]
    assert kept.image.size == tuple(kept.settings["edited_at"]) == (192, 128)


@pytest.fixture(scope="module")
def untrained(tiny_pair_model):
    """An editor of random weights, a few times quicker."""
    return InstructPix2Pix(tiny_pair_model(in_channels=8))


def test_results_come_in_the_order_asked_whatever_the_order_of_making(untrained):
    """Sizes A, B, A, whose A are made together, and the instruction that needs no making in the midst."""
    pictures = [render(HEART), render(SQUARE).resize((128, 64)), render(SQUARE)]
    texts, told = ["make it snow", " ", "paint it blue"], {}
    results = untrained.edit(pictures, texts, seeds=5, steps=2, hooks=Hooks(on_result=told.__setitem__))
    assert [told[place] for place in range(9)] == results
    for (picture, text), result in zip(product(pictures, texts), results, strict=True):
        is_the_edit(untrained, result, picture, text, 5)


@pytest.mark.parametrize("batch", [1, 8])
def test_edit_each_gives_every_picture_its_own_edit(untrained, batch):
    pictures = [render(HEART), render(SQUARE).resize((128, 64)), render(SQUARE), render(SQUARE)]
    texts, seeds = ["make it snow", "paint it blue", "", "make it snow"], [1, 2, 3, 4]
    results = untrained.edit_each(pictures, texts, seeds=seeds, steps=2, batch=batch)
    for result, picture, text, seed in zip(results, pictures, texts, seeds, strict=True):
        is_the_edit(untrained, result, picture, text, seed)


def is_the_edit(editor, result, picture, text, seed):
    """The one that was asked for: it says so, and its latent and its picture are those of the edit made alone."""
    assert result.source.tobytes() == picture.tobytes()
    assert (result.instruction, result.seed) == (text.strip(), seed)
    if not text.strip():
        assert result.latent is None
        assert result.image.tobytes() == picture.tobytes()
        return
    alone = editor.edit(picture, text, seeds=seed, steps=2)[0]
    assert (result.latent - alone.latent).abs().max() < 1e-4 * alone.latent.abs().max()
    (decoded,) = to_images(decode_latents(editor.model, alone.latent[None]))
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(result.image).astype(int)).max() <= 1


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_instruction_gives_the_picture_back(editor, text):
    result = editor.edit(render(HEART), text, config=QUICK)[0]
    assert result.image.tobytes() == render(HEART).tobytes()
    assert result.evaluations == 0
    mixed = editor.edit(render(HEART), [text, "make it snow"], config=QUICK)
    assert [r.evaluations for r in mixed] == [0, 9]


@pytest.mark.parametrize(
    ("text_cfg", "image_cfg", "branches"),
    [
        (7.5, 1.5, 3),
        (7.5, 1.0, 2),
        (2.0, 2.0, 2),
        (0.0, 1.5, 2),
        (1.0, 1.0, 1),
        (0.0, 0.0, 1),
        (0.5, 0.5, 2),
        (3, 0.5, 3),
    ],
)
def test_evaluations_are_those_that_the_formula_needs(editor, text_cfg, image_cfg, branches):
    calls = []
    hook = editor.model.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    try:
        result = editor.edit(render(HEART), "make it snow", config=QUICK, text_cfg=text_cfg, image_cfg=image_cfg)[0]
    finally:
        hook.remove()
    assert result.evaluations == sum(calls) == 3 * branches


def test_heun_counts_its_second_look(editor):
    assert editor.edit(render(HEART), "make it snow", config=QUICK, sampler="heun")[0].evaluations == 3 * 5


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "ddim", "lcm"])
@pytest.mark.parametrize("steps", [1, 2])
def test_every_sampler_edits_at_one_and_two_steps(editor, sampler, steps):
    result = editor.edit(render(HEART), "make it snow", sampler=sampler, steps=steps)[0]
    assert result.latent.isfinite().all()
    assert result.settings["sampler"] == sampler


def test_branches_together_or_one_after_another_are_the_same(editor):
    one, other = (
        editor.edit(render(HEART), "make it snow", seeds=1, config=QUICK, together=together)[0]
        for together in (True, False)
    )
    near(one, other)
    assert one.evaluations == other.evaluations


@pytest.mark.skipif("SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", ()), reason="memory is not asked for here")
@pytest.mark.parametrize(("fitting", "rows"), [(0, [1, 1, 1]), (2.5, [1, 1, 1]), (3.5, [3])])
def test_branches_are_computed_together_only_where_memory_allows(untrained, monkeypatch, fitting, rows):
    ask, calls = os.sysconf, []
    branch = _activation_bytes(untrained.model, torch.empty(1, 4, 8, 8))
    pages = math.ceil(fitting * branch / 0.6 / ask("SC_PAGE_SIZE"))  # of free memory a share is used
    monkeypatch.setattr(os, "sysconf", lambda name: pages if name == "SC_AVPHYS_PAGES" else ask(name))
    hook = untrained.model.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    try:
        untrained.edit(render(HEART), "make it snow", steps=1, image_cfg=1.5)
    finally:
        hook.remove()
    assert calls == rows


def test_guidance_equals_plain_calls_of_the_unet(editor):
    """Against diffusers' own attention and three separate calls, so caching the text's keys changes nothing."""
    model = editor.model
    embedded = encode_text(model, ["make it snow", ""])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = Conditioning(text=embedded.rows([0, 0]), null_text=embedded.rows([1]), image=image)
    sigma = 2.345
    with torch.inference_mode():
        denoiser = DualGuidance(BranchDenoiser(model), 5.0, 1.7)
        ours = denoiser(x, sigma, cond)
        branches = []
        for text, picture in ((0, image), (1, image), (1, torch.zeros_like(image))):
            inputs = torch.cat([x * input_scale(sigma), picture], dim=1)
            context = embedded.tokens[[text, text]]
            output = model.unet(inputs, model.timestep(sigma).expand(2), context).sample
            branches.append(denoised_from(model.spec.prediction, x, sigma, output))
    c, i, u = branches
    torch.testing.assert_close(ours, u + 1.7 * (i - u) + 5.0 * (c - i), atol=2e-5, rtol=1e-5)


def test_nothing_stays_patched_even_when_an_edit_fails(editor):
    before = editor.model.unet.attn_processors
    with pytest.raises(Interrupted):
        editor.edit(render(HEART), "make it snow", config=QUICK, hooks=Hooks(should_stop=lambda: True))
    assert editor.model.unet.attn_processors == before


def test_hooks_see_steps_and_progress(editor):
    steps, progress = [], []
    hooks = Hooks(
        on_step=lambda i, n, x, sigma, denoised: steps.append((i, n, tuple(denoised.shape))),
        on_progress=lambda done, total, note: progress.append((done, total, note)),
    )
    editor.edit(render(HEART), "make it snow", seeds=[1, 2, 3], config=QUICK, batch=2, hooks=hooks)
    assert steps == [(i, 3, (n, 4, 8, 8)) for n in (2, 1) for i in range(3)]
    assert progress == [(2, 3, ""), (3, 3, "")]


OTHER_SETTINGS = {
    "auto_mask": True,
    "feature_cache": 2,
    "text_cfg": 3.0,
    "image_cfg": 2.0,
    "steps": 2,
    "sampler": "heun",
    "schedule": "karras",
    "guidance": "instruct-diffusion",
    "suffix": " and make it night",
    "guidance_interval": (0.5, 5.0),
    "guidance_rescale": 0.5,
    "apg": True,
    "size": "keep",
    "resolution": 128,
    "batch": 1,
    "together": False,
    "restore_size": False,
    "control_weight": 0.5,
    "detail": True,
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_settings_are_enough_to_make_the_picture_again(editor, name):
    picture = render(HEART).resize((90, 64))
    config = replace(QUICK, **{name: OTHER_SETTINGS[name]})
    first = editor.edit(picture, "make it snow", seeds=7, config=config)[0]
    said = {field.name: first.settings[field.name] for field in fields(EditConfig) if field.name in first.settings}
    again = editor.edit(picture, first.settings["instruction"], seeds=first.settings["seed"], **said)[0]
    near(first, again)


class TextAlone:
    """A guidance of one's own."""

    def __init__(self, branches):
        self.branches = branches

    def __call__(self, x, sigma, cond):
        found = self.branches(x, sigma, cond, ["t", "u"])
        return found["u"] + 2 * (found["t"] - found["u"])


def test_guidance_and_sampler_of_one_s_own_are_named_and_counted(editor):
    def twice(step):
        return euler(replace(step, denoised=step.denoise(step.x, step.sigma)))

    assert set(OTHER_SETTINGS) == {field.name for field in fields(EditConfig)}
    own, plain = (
        editor.edit(render(HEART), "make it snow", config=QUICK, guidance=TextAlone, sampler=sampler)[0]
        for sampler in (twice, "euler")
    )
    near(own, plain)
    assert (own.evaluations, plain.evaluations) == (12, 6)
    assert own.settings["guidance"].endswith("test_edit:TextAlone") and "twice" in own.settings["sampler"]
    assert plain.settings["sampler"] == "euler"
    with pytest.raises(ConfigError, match="guidance is .x.; choose one of dual, instruct-diffusion, or give"):
        EditConfig(guidance="x")


def test_the_parts_make_the_same_edit(editor):
    """condition, denoiser, latents, pictures: what edit does, step by step."""
    pictures, texts = [render(HEART), render(HEART).rotate(90)], ["make it snow", "make it night"]
    whole = editor.edit_each(pictures, texts, seeds=[3, 4], config=QUICK)
    condition = editor.condition(pictures, texts)
    latents = editor.latents(condition, [3, 4], config=QUICK)
    assert torch.equal(latents, torch.stack([result.latent for result in whole]))
    for picture, result in zip(editor.pictures(latents), whole, strict=True):
        assert picture.tobytes() == result.image.tobytes()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = editor.denoiser(text_cfg=3.0, image_cfg=1.2)(x, 2.0, condition)
        assert torch.equal(ours, DualGuidance(BranchDenoiser(editor.model), 3.0, 1.2)(x, 2.0, condition))
    one = editor.condition(pictures[0], texts)
    assert len(one.image) == 2 and torch.equal(one.image[0], one.image[1])
    for images, words in ((pictures, [*texts, "third"]), ([], texts)):
        with pytest.raises(ConfigError, match="do not pair up"):
            editor.condition(images, words)
    with pytest.raises(ConfigError, match="give one size"):
        editor.condition([pictures[0], pictures[0].resize((128, 64))], "make it snow")
    with pytest.raises(ConfigError, match="1 seeds for a condition of 2 rows"):
        editor.latents(condition, 3)


def test_two_threads_and_one_editor(editor):
    """Each picture is the one made alone; both threads are inside the network at one time; nothing stays in it."""
    sizes, texts = [(64, 64), (96, 64), (64, 128)], ["make it snow", "make it night", "make the heart blue"]
    jobs = [(render(HEART).resize(sizes[n % 3]), texts[n // 3 % 3], n) for n in range(24)]
    inside, both = [], []

    def enter(*_):
        inside.append(0)
        both.append(len(inside))

    def leave(*_):
        inside.pop()

    def edit(job):
        return editor.edit(job[0], job[1], seeds=job[2], config=QUICK, steps=2, size="keep")[0]

    alone, before = [edit(job) for job in jobs], attributes(editor.model)
    hooks = [editor.model.unet.register_forward_pre_hook(enter)]
    hooks.append(editor.model.unet.register_forward_hook(leave))
    try:
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(edit, jobs))
    finally:
        for hook in hooks:
            hook.remove()
    assert max(both) == 2
    for one, other in zip(alone, together, strict=True):
        near(one, other)
    assert attributes(editor.model) == before


def attributes(model):
    """Every attribute of every module, by identity."""
    networks = (model.unet, model.autoencoder, *model.text_encoders)
    modules = [(str(n), *row) for n, network in enumerate(networks) for row in network.named_modules()]
    return {(n, name, key): id(value) for n, name, module in modules for key, value in vars(module).items()}


@torch.inference_mode()
def test_two_nested_denoisers_of_one_model(editor):
    """A walk within a walk: each gives what it gives alone, to the bit."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    three = editor.condition([render(HEART)] * 3, ["make it snow", "make it night", "make the heart blue"])
    one = editor.condition(render(HEART), "remove the snow")
    outer, inner = editor.denoiser(text_cfg=5.0, image_cfg=1.5), editor.denoiser(text_cfg=2.0, image_cfg=1.0)
    expected = outer(x, 3.0, three), inner(x[:1], 2.0, one)

    class Nested(DualGuidance):
        def __call__(self, x, sigma, cond):
            seen.append(inner(x[:1], 2.0, one))
            return super().__call__(x, sigma, cond)

    seen: list[torch.Tensor] = []
    nested = Nested(BranchDenoiser(editor.model), 5.0, 1.5)
    for _ in range(2):
        assert torch.equal(nested(x, 3.0, three), expected[0]) and torch.equal(seen[-1], expected[1])


@pytest.mark.slow
def test_settings_name_the_base_of_a_lone_unet(editor, tmp_path):
    editor.model.unet.save_pretrained(tmp_path / "lone")
    lone = InstructPix2Pix.load(tmp_path / "lone", base="embedded", device="cpu", prediction="v")
    assert lone.edit(render(HEART), "make it snow", steps=1)[0].settings["base"] == "embedded"


def test_results_come_as_soon_as_their_batch_is_done(editor):
    told, texts = [], ["make it snow", ""]

    def hear(place, result):
        told.append((place, result.instruction, result.seed))
        if len(told) == 4:
            raise Interrupted("enough")

    with pytest.raises(Interrupted, match="enough"):
        editor.edit(render(HEART), texts, seeds=[1, 2, 2], config=QUICK, batch=1, hooks=Hooks(on_result=hear))
    assert told == [(3, "", 1), (4, "", 2), (5, "", 2), (0, "make it snow", 1)]


def test_pictures_are_decoded_one_at_a_time(editor, monkeypatch):
    """Eight of 512 x 512 at once take more memory than all three branches of SD1.5."""
    sizes, decode = [], editor.model.autoencoder.decode
    monkeypatch.setattr(editor.model.autoencoder, "decode", lambda z: sizes.append(len(z)) or decode(z))
    editor.edit(render(HEART), "make it snow", seeds=[1, 2, 3], steps=1)
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize(("side", "count"), [(64, 16), (88, 16), (96, 14), (128, 7), (256, 1), (512, 1)])
def test_no_batch_is_decoded_that_has_two_to_the_31_numbers(editor, monkeypatch, side, count):
    """Sides in latents, and an autoencoder of Stable Diffusion's width, however much memory there is."""
    monkeypatch.setattr("ip2p_engine.networks.conditioning.free_memory", lambda device: 2**50)
    wide = SimpleNamespace(
        config=SimpleNamespace(block_out_channels=(128,)), dtype=torch.float16, device=torch.device("cpu")
    )
    assert decoded_at_once(replace(editor.model, autoencoder=wide), (side, side), 16) == count


def test_too_little_memory_is_a_sentence(editor, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(editor.model.unet, "forward", full)
    with pytest.raises(ConfigError, match="does not hold 2 edits of 64 x 64 pixels at once; .*`batch`.*`resolution`"):
        editor.edit(render(HEART), "make it snow", seeds=[1, 2], config=QUICK)


def test_too_little_memory_of_an_apple_is_the_same_sentence():
    with pytest.raises(ConfigError, match="does not hold 2 edits"), enough_memory(2, (64, 64)):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 2.00 GB). Tried to allocate 1.00 GB")
    with pytest.raises(RuntimeError, match="sizes"), enough_memory(2, (64, 64)):
        raise RuntimeError("sizes do not match")


def test_a_device_is_found(monkeypatch):
    assert usable_device().type == "cpu" or torch.cuda.is_available()
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_device() == torch.device("xpu")


@pytest.mark.parametrize(("free", "sizes"), [(10**15, [2, 1]), (0, [1, 1, 1])])
def test_pictures_are_decoded_as_memory_allows(editor, monkeypatch, free, sizes):
    found, decode = [], editor.model.autoencoder.decode
    monkeypatch.setattr(editor.model.autoencoder, "decode", lambda z: found.append(len(z)) or decode(z))
    monkeypatch.setattr("ip2p_engine.networks.conditioning.free_memory", lambda _: free)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = decode_pictures(editor.model, latents, 2)
    assert found == sizes
    for one, other in zip(pictures, editor.pictures(latents), strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_edit_each_pairs_one_to_one(editor):
    pictures, texts = [render(HEART), render(SQUARE)], ["make it snow", "paint it blue"]
    results = editor.edit_each(pictures, texts, seeds=[1, 2], config=QUICK)
    for result, picture, text, seed in zip(results, pictures, texts, (1, 2), strict=True):
        near(result, editor.edit(picture, text, seeds=seed, config=QUICK)[0])
    with pytest.raises(ConfigError, match="2 pictures, 1 instructions and 2 seeds do not pair up"):
        editor.edit_each(pictures, texts[:1], seeds=[1, 2])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": -3}, "steps is -3"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"text_cfg": float("nan")}, "text_cfg is nan"),
        ({"image_cfg": -0.1}, "image_cfg is -0.1"),
        ({"image_cfg": float("inf")}, "image_cfg is inf"),
        ({"sampler": "plms"}, "choose one of euler_ancestral"),
        ({"schedule": "cosine"}, "choose one of model, karras, exponential"),
        ({"batch": 0}, "batch is 0"),
        ({"size": "big"}, "paper"),
        ({"colour": "red"}, "unknown setting 'colour'"),
        ({"seeds": -1}, "seed is -1"),
        ({"seeds": []}, "nothing to edit"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(editor, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        editor.edit(render(HEART), "make it snow", **overrides)


def test_a_text_to_image_checkpoint_is_refused():
    with pytest.raises(CheckpointError, match="takes 4 .* takes 8"):
        InstructPix2Pix(load_model("embedded-sd"))


def test_the_callers_picture_is_not_touched(editor):
    picture = Image.new("RGBA", (64, 64), (255, 0, 0, 128))
    before = picture.tobytes()
    editor.edit(picture, "make it snow", config=QUICK)
    assert (picture.mode, picture.tobytes()) == ("RGBA", before)


def test_a_colour_profile_stays_with_the_picture(editor):
    picture = render(HEART)
    picture.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    result = editor.edit(picture, "make it snow", steps=1)[0]
    assert result.image.info["icc_profile"] == picture.info["icc_profile"]


@pytest.mark.slow
def test_the_embedded_model_edits_scenes_as_promised(editor):
    """110 of the thousand that `ip2p scenes judge` takes; a success rate 7 points under the published one fails."""
    from ip2p_engine.scenes.exam import examine

    result = examine(editor, count=110, seed=7)
    assert result.overall.success >= 0.91
    assert result.overall.background_psnr >= 30


@pytest.mark.slow
def test_pairs_and_edits_in_four_threads(editor):
    """Pairs of one text-to-image model in every mode beside edits, each equal to the one made alone."""
    model = load_model("embedded-sd", device="cpu")
    modes = ({"mode": "self"}, {"mode": "replace"}, {"mode": "refine", "local_blend": True})
    generators = [PairGenerator(model, PairConfig(steps=3, edited_prompt_start=0.4, **mode)) for mode in modes]

    def make(job):
        if job % 2:
            return editor.edit(render(HEART), "make it snow", seeds=job, config=QUICK)[0].latent
        captions = ("a large red heart on a sky background", "a large blue heart on a sky background")
        return generators[job // 2 % 3].generate(*captions, seeds=job)[0].latents

    alone = [make(job) for job in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(alone, pool.map(make, range(12)), strict=True):
            assert (one - other).abs().max() < 1e-4


def test_outside_a_mask_the_source_stays_to_the_bit(editor, tmp_path):
    picture = render(HEART).resize((90, 70))
    mask = Image.new("L", picture.size)
    mask.paste(255, (30, 10, 60, 50))
    painted = picture.copy()
    painted.putalpha(Image.eval(mask, lambda level: 255 - level))  # what ComfyUI's mask editor saves
    painted.save(tmp_path / "mask.png")
    free = editor.edit(picture, "make it night", config=QUICK)[0]
    results = [
        editor.edit(picture, "make it night", config=QUICK, masks=given)[0] for given in (mask, tmp_path / "mask.png")
    ]
    inside = np.asarray(mask) > 0
    for result in results:
        before, after = np.asarray(picture).astype(int), np.asarray(result.image).astype(int)
        assert np.array_equal(before[~inside], after[~inside])
        assert np.abs(before - after)[inside].mean() > 20
        assert result.settings["mask"] in (True, "mask.png")
    near(*results)
    assert (free.latent - results[0].latent).abs().max() > 0.1
    white = editor.edit(picture, "make it night", config=QUICK, masks=Image.new("L", picture.size, 255))[0]
    near(free, white)
    kept = editor.edit(picture, "make it night", config=QUICK, masks=mask, restore_size=False)[0]
    assert kept.image.size == (64, 64)
    assert np.asarray(fit(picture, (64, 64)))[0, 0].tolist() == list(kept.image.getpixel((0, 0)))


def test_masks_are_one_or_one_a_picture(editor):
    picture, mask = render(HEART), Image.new("L", (64, 64), 255)
    with pytest.raises(ConfigError, match="2 masks and 3 pictures"):
        editor.edit([picture] * 3, "make it snow", masks=[mask] * 2)
    with pytest.raises(ImageError, match="is black everywhere, so nothing may change"):
        editor.edit(picture, "make it snow", masks=Image.new("L", (64, 64)))
    both = editor.edit([picture, picture], "make it night", config=QUICK, masks=[mask, None])
    near(*both)
