"""Hertz et al.'s family: alignment against brute force, maps against loops, whole walks against a slow reference."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from ip2p_engine.diffusion.noise import SampleNoise
from ip2p_engine.diffusion.sampling import sample
from ip2p_engine.diffusion.schedule import make_sigmas
from ip2p_engine.errors import ConfigError
from ip2p_engine.networks.conditioning import encode_text
from ip2p_engine.p2p.alignment import (
    align,
    changed_tokens,
    refinement_map,
    replacement_map,
    text_length,
    tokens_of_words,
    words,
)
from ip2p_engine.p2p.cross_attention import (
    CrossControl,
    LocalBlend,
    attention_map,
    blend_mask,
    blend_words,
    check_reweight,
    cross_edit,
    edit_map,
)
from ip2p_engine.p2p.denoiser import PairDenoiser
from ip2p_engine.p2p.generator import PairConfig, PairGenerator, PairJob, draw_settings

HEART, STAR, LONGER = "a red heart on sky", "a red star on sky", "a big red heart on sky at night"
STEPS = 6


@pytest.fixture(scope="module")
def exact(tiny_pair_model):
    return tiny_pair_model(dtype=torch.float64)


def best_score(a, b, match, mismatch, gap):
    """The best of all ways to pair symbols in order."""
    scores = []
    for count in range(min(len(a), len(b)) + 1):
        for left in itertools.combinations(range(len(a)), count):
            for right in itertools.combinations(range(len(b)), count):
                pairs = sum(match if a[i] == b[j] else mismatch for i, j in zip(left, right, strict=True))
                scores.append(pairs + gap * (len(a) + len(b) - 2 * count))
    return max(scores)


@pytest.mark.parametrize(("match", "mismatch", "gap"), [(1, -1, 0), (1, -1, -1), (2, -1, -2), (1, 0, -0.5)])
def test_alignment_is_the_best_of_all(match, mismatch, gap):
    draw = random.Random(0)
    for _ in range(150):
        a, b = ([draw.randrange(3) for _ in range(draw.randrange(6))] for _ in range(2))
        partner = align(a, b, match=match, mismatch=mismatch, gap=gap)
        used = [i for i in partner if i is not None]
        assert len(partner) == len(b) and used == sorted(set(used))
        pairs = [(i, j) for j, i in enumerate(partner) if i is not None]
        score = sum(match if a[i] == b[j] else mismatch for i, j in pairs) + gap * (len(a) + len(b) - 2 * len(pairs))
        assert score == best_score(a, b, match, mismatch, gap), (a, b)


def test_alignment_by_hand():
    assert align("abc", "axbc") == [0, None, 1, 2]
    assert align("abc", "abc") == [0, 1, 2]
    assert align("abc", "xyz") == [None, None, None]
    assert align("", "ab") == [None, None]
    assert align("ab", "") == []
    assert align("a", "aa") == [None, 0]


def test_words_and_their_tokens():
    cut = words("a giraffosaurus, twice")
    assert [(span.start, span.stop) for span, _ in cut] == [(1, 2), (2, 6), (6, 7), (7, 8)]
    assert text_length("") == 2 and words("") == []
    assert text_length("word " * 100) == 77 and words("word " * 100)[-1][0].stop == 76


def test_tokens_of_words():
    assert tokens_of_words("a red cat and a red dog", "red").nonzero().flatten().tolist() == [2, 6]
    assert tokens_of_words("a red cat and a red dog", "Red Dog").nonzero().flatten().tolist() == [6, 7]
    for caption, wanted in (("a red cat", "blue"), ("a red cat", ""), ("", "red"), ("a reddish cat", "red")):
        with pytest.raises(ConfigError, match="does not contain"):
            tokens_of_words(caption, wanted)


def test_changed_tokens():
    old, new = changed_tokens(HEART, STAR)
    assert old.nonzero().flatten().tolist() == new.nonzero().flatten().tolist() == [3]
    old, new = changed_tokens(HEART, LONGER)
    assert old.sum() == 0 and new.nonzero().flatten().tolist() == [2, 7, 8]


def test_refinement_follows_the_alignment():
    mapping, own = refinement_map(HEART, LONGER)
    where = {1: 1, 3: 2, 4: 3, 5: 4, 6: 5}
    assert {j: int(mapping[:, j].argmax()) for j in where} == where
    assert own[[2, 7, 8]].tolist() == [1, 1, 1]
    assert int(mapping[6, 9]) == 1, "the end of the text is the end of the text"
    assert torch.equal(mapping.sum(0) + own, torch.ones(77))
    same, none = refinement_map(HEART, HEART)
    assert torch.equal(same, torch.eye(77)) and none.sum() == 0


@pytest.mark.parametrize("other", [STAR, "a red giraffosaurus on sky", "one blue cat in mud"])
@pytest.mark.parametrize("backwards", [False, True])
def test_replacement_loses_no_attention(other, backwards):
    mapping = replacement_map(*((other, HEART) if backwards else (HEART, other)))
    maps = torch.rand(5, 77).softmax(-1)
    assert ((maps @ mapping).sum(-1) - 1).abs().max() < 1e-5


def test_replacement_by_hand():
    assert torch.equal(replacement_map(HEART, STAR), torch.eye(77))
    mapping = replacement_map(HEART, "a red giraffosaurus on sky")
    assert mapping[3, 3:7].tolist() == [0.25] * 4
    assert mapping[4, 7] == mapping[5, 8] == mapping[6, 9] == 1
    with pytest.raises(ConfigError, match="has 5 words where .* has 8; use mode 'refine'"):
        replacement_map(HEART, LONGER)


def slow_edit(source, own, pair, mode, factors):
    """One pair's edited map (heads, places, 77), token by token."""
    result = own.clone()
    if mode == "refine":
        a, b = ([i for _, ids in words(text) for i in ids] for text in pair)
        for j, i in enumerate(align(a, b)):
            if i is not None:
                result[..., j + 1] = source[..., i + 1]
        result[..., 0] = source[..., 0]
        ends = [len(a) + 1, len(b) + 1]
        for k in range(77 - max(ends)):
            result[..., ends[1] + k] = source[..., ends[0] + k]
    else:
        # Pairs of equally many tokens: a swapped word takes its counterpart's place and its map.
        result = source.clone()
    for word, factor in factors.items():
        result[..., tokens_of_words(pair[1], word).bool()] *= factor
    return result


@pytest.mark.parametrize(
    ("mode", "pair", "factors"),
    [
        ("refine", (HEART, LONGER), {}),
        ("refine", (LONGER, HEART), {}),
        ("refine", (HEART, STAR), {"star": 3.0, "a": -1.0}),
        ("replace", (HEART, STAR), {"red": 0.0}),
    ],
)
def test_edited_maps_against_loops(mode, pair, factors):
    source, own = torch.rand(2, 1, 3, 10, 77, dtype=torch.float64).softmax(-1)
    ours = edit_map(source, own, cross_edit(mode, [pair], factors))
    assert (ours[0] - slow_edit(source[0], own[0], pair, mode, factors)).abs().max() < 1e-12


def test_attention_map():
    query, key = torch.randn(2, 6, 8), torch.randn(2, 77, 8)
    maps = attention_map(query, key, 2)
    assert maps.shape == (2, 2, 6, 77)
    logits = query[1, 3, 4:] @ key[1, :, 4:].T / 2
    assert (maps[1, 1, 3] - logits.softmax(0)).abs().max() < 1e-6


def slow_mask(heat, size, threshold=0.3):
    """Hertz et al.'s mask by loops: 3 x 3 maximum, nearest neighbour, a share of the maximum."""
    h, w = heat.shape
    grown = torch.stack(
        [torch.stack([heat[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].max() for j in range(w)]) for i in range(h)]
    )
    big = torch.stack(
        [torch.stack([grown[i * h // size[0], j * w // size[1]] for j in range(size[1])]) for i in range(size[0])]
    )
    return big > threshold * big.max()


@pytest.mark.parametrize(("h", "w", "size"), [(16, 16, (64, 64)), (4, 6, (8, 12)), (3, 2, (5, 3)), (1, 1, (2, 2))])
def test_mask_against_loops(h, w, size):
    heat = torch.rand(2, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) ** 4
    ours = blend_mask(heat, size)
    for pair in range(2):
        assert torch.equal(ours[pair, 0], slow_mask(heat[pair], size))
    assert not blend_mask(torch.zeros(1, h, w), size).any()


def test_blend_keeps_the_source_outside_the_words():
    marks = torch.zeros(1, 77)
    marks[0, 3] = 1
    maps = torch.zeros(1, 2, 256, 77)
    maps[0, :, 17, 3] = 1
    blend = LocalBlend(marks, marks, (64, 64), levels=4)
    assert blend.watches(256) and not blend.watches(1024)
    x = torch.randn(2, 4, 64, 64)
    assert blend.apply(x) is x
    blend.add(maps, maps)
    blended = blend.apply(x)
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[0:12, 0:12] = True
    assert torch.equal(blended[0], x[0])
    assert torch.equal(blended[1], torch.where(inside, x[1], x[0]))


def test_words_of_a_blend():
    source, edited = blend_words([(HEART, STAR), (HEART, LONGER)])
    assert source.nonzero().tolist() == [[0, 3]] and edited.nonzero().tolist() == [[0, 3], [1, 2], [1, 7], [1, 8]]
    named = blend_words([(HEART, STAR)], ("sky", "star"))
    assert [marks.nonzero().tolist() for marks in named] == [[[0, 5]], [[0, 3]]]
    with pytest.raises(ConfigError, match="needs a change"):
        blend_words([(HEART, STAR), (HEART, HEART)])


def ours(model, config, pair, seed):
    """The engine's pair with latents in double precision, through its own parts."""
    generator = PairGenerator(model, config)
    job = PairJob(caption=pair[0], edited_caption=pair[1], seed=seed)
    cross, cond = generator._control([job]), generator._condition([job])
    sigmas, noise = make_sigmas("model", model.schedule, STEPS), draws(config, seed)
    x = next(noise).repeat(2, 1, 1, 1) * float(sigmas[0])
    step = {
        "noise": lambda _: next(noise).repeat(2, 1, 1, 1),
        "after_step": cross.after_step(config.blend_start * STEPS),
    }
    with torch.inference_mode():
        denoiser = PairDenoiser(model, sigmas, cross)
        return sample("euler_ancestral", denoiser, x, sigmas, cond, **step)


def draws(config, seed):
    width, height = config.size or (64, 64)
    noise = SampleNoise([seed])
    while True:
        yield noise.draw(torch.empty(1, 4, height // 8, width // 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("mode", "pair", "factors", "late"),
    [
        ("replace", (HEART, STAR), {}, 0),
        ("refine", (HEART, LONGER), {}, 0),
        ("refine", (HEART, LONGER), {"night": 2.5}, 2),
    ],
)
@pytest.mark.parametrize("blend", [pytest.param(False, marks=pytest.mark.slow), True])
def test_whole_pairs_against_the_slow_way(exact, slow_pairs, monkeypatch, mode, pair, factors, late, blend):
    config = PairConfig(
        mode=mode,
        steps=STEPS,
        size=(128, 96),
        reweight=factors,
        cross_steps=0.5,
        edited_prompt_start=late / STEPS,
        local_blend=blend,
        blend_start=0.4,
    )
    marks = changed_tokens(*pair)
    # An untrained network looks almost everywhere alike: with the paper's 0.3 the mask would be the whole picture.
    monkeypatch.setattr("ip2p_engine.p2p.cross_attention.BLEND_THRESHOLD", 0.97)

    def mask(seen):
        heat = [sum(maps[n] @ marks[n].double() for maps in seen[48]).view(6, 8) for n in range(2)]
        return slow_mask(heat[0], (12, 16), 0.97) | slow_mask(heat[1], (12, 16), 0.97)

    p, w = draw_settings(5)
    expected = slow_pairs.slow_pair(
        exact,
        encode_text(exact, ["", *pair]).tokens,
        p,
        w,
        make_sigmas("model", exact.schedule, STEPS).tolist(),
        list(itertools.islice(draws(config, 5), STEPS)),
        late_steps=late,
        edit=lambda source, own: slow_edit(source, own, pair, mode, factors),
        edit_steps=3,
        blend=mask if blend else None,
        blend_from=3,
    )
    z = ours(exact, config, pair, 5)
    assert (z - expected).abs().max() <= 1e-5
    assert (z[0] - z[1]).abs().max() > 1e-2
    if blend:
        # Some places are the source's, to the bit, and some are not.
        assert 0 < (z[0] == z[1]).double().mean() < 1


@pytest.mark.parametrize("mode", ["replace", "refine"])
def test_batches_of_edited_pairs_equal_singles(tiny_pair_model, mode):
    model = tiny_pair_model()
    generator = PairGenerator(model, PairConfig(mode=mode, steps=3, local_blend=True))
    many = generator.generate(HEART, STAR, [1, 2, 3])
    for pair in many:
        alone = generator.generate(HEART, STAR, [pair.seed])[0]
        assert (pair.latents - alone.latents).abs().max() < 1e-5 * pair.latents.abs().max()


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps(tiny_pair_model, steps):
    config = PairConfig(mode="refine", steps=steps, local_blend=True, blend_words=("heart", "night"))
    (pair,) = PairGenerator(tiny_pair_model(), config).generate(HEART, LONGER, [1])
    assert pair.latents.isfinite().all()


def test_reweighting_one_caption_makes_a_pair(tiny_pair_model):
    config = PairConfig(mode="refine", steps=3, reweight={"red": 4.0}, cross_steps=1.0)
    (pair,) = PairGenerator(tiny_pair_model(), config).generate(HEART, HEART, [1])
    assert (pair.latents[0] - pair.latents[1]).abs().max() > 1e-3


def test_the_source_never_changes(tiny_pair_model):
    model, plain = tiny_pair_model(), PairConfig(steps=3)
    (expected,) = PairGenerator(model, plain).generate(HEART, STAR, [4])
    for mode in ("replace", "refine"):
        config = PairConfig(steps=3, mode=mode, reweight={"star": 2.0}, local_blend=True)
        (pair,) = PairGenerator(model, config).generate(HEART, STAR, [4])
        assert (pair.latents[0] - expected.latents[0]).abs().max() < 1e-4
        assert (pair.latents[1] - expected.latents[1]).abs().max() > 1e-2


def test_what_is_refused_leaves_nothing_patched(tiny_pair_model):
    model = tiny_pair_model()
    before = model.unet.attn_processors
    for config, pair, sentence in (
        (PairConfig(mode="replace", steps=1), (HEART, LONGER), "use mode 'refine'"),
        (PairConfig(mode="refine", steps=1, reweight={"blue": 2.0}), (HEART, STAR), "does not contain 'blue'"),
        (PairConfig(steps=1, local_blend=True), (HEART, HEART), "needs a change"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            PairGenerator(model, config).generate(*pair, [1])
        assert model.unet.attn_processors == before
    with pytest.raises(ConfigError, match="mode 'self' is unknown; choose one of replace, refine"):
        cross_edit("self", [(HEART, STAR)])


def test_a_control_without_anything_to_do_does_nothing():
    assert CrossControl().mix(editing=True, watching=True) is None


def test_words_are_weighted_in_the_captions_that_have_them():
    edit = cross_edit("refine", [(HEART, STAR), (HEART, LONGER)], {"star": 2.0})
    assert (edit.scale[0] == 2).sum() == 1
    assert (edit.scale[1] == 1).all()
    check_reweight({"star": 2.0}, [HEART, STAR])
    with pytest.raises(ConfigError, match="each of 2 edited captions does not contain 'blue'"):
        check_reweight({"blue": 2.0}, [HEART, STAR])
