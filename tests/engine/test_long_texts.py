"""Texts beyond one chunk of 77 tokens are read to their end, as ComfyUI reads them."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTokenizer

from ip2p_engine import EditConfig, InstructPix2Pix
from ip2p_engine.checkpoint.write import write_tokenizers
from ip2p_engine.diffusion.guidance import DualGuidance
from ip2p_engine.errors import ConfigError
from ip2p_engine.networks.conditioning import Conditioning, encode_text, even
from ip2p_engine.networks.denoiser import BranchDenoiser
from ip2p_engine.p2p.generator import PairConfig, PairGenerator
from ip2p_engine.scenes.world import Scene, render
from ip2p_engine.tokenizer import LONGEST, check_length, token_chunks, tokenize

WORDS = "make the small red boat look as if it had been drawn with a soft pencil by a child in the snow,"
LONG = " ".join([WORDS] * 5)  # about 105 tokens
PICTURE = render(Scene(shape="heart", colour="red", background="sky", size="large"))
QUICK = EditConfig(steps=2, text_cfg=4.0, image_cfg=1.5)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    write_tokenizers(folder, "sd1", 1)
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def untrained(tiny_pair_model):
    return InstructPix2Pix(tiny_pair_model(in_channels=8))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "cosxl"])
@torch.inference_mode()
def test_a_long_text_is_its_chunks_one_after_another(family, tiny_pair_model, reader):
    """By transformers' tokenizer and the bare encoders: 75 tokens each between a start and an end."""
    model = tiny_pair_model(family, in_channels=8)
    double = family in ("sdxl", "cosxl")
    ids = reader(LONG, add_special_tokens=False).input_ids
    assert 75 < len(ids) <= 150
    parts, pooled = [], None
    for number, encoder in enumerate(model.text_encoders):
        pad = 0 if family == "sd2" or number else 49407
        last = ids[75:]
        rows = [[49406, *ids[:75], 49407], [49406, *last, 49407, *[pad] * (75 - len(last))]]
        outputs = [encoder(torch.tensor([row]), output_hidden_states=True) for row in rows]
        pooled = getattr(outputs[0], "text_embeds", None)
        parts.append(torch.cat([one.hidden_states[-2] if double else one.last_hidden_state for one in outputs], dim=1))
    ours = encode_text(model, [LONG])
    torch.testing.assert_close(ours.tokens, torch.cat(parts, dim=-1))
    if double:
        torch.testing.assert_close(ours.pooled, pooled)


def test_a_chunk_holds_75_tokens():
    assert [token_chunks(" ".join(["snow"] * n)).shape for n in (0, 1, 75, 76, 150, 151)] == [
        (1, 77),
        (1, 77),
        (1, 77),
        (2, 77),
        (2, 77),
        (3, 77),
    ]
    assert torch.equal(token_chunks(LONG, pad=0)[:1], tokenize([LONG], pad=0))


@torch.inference_mode()
def test_short_texts_are_what_they_were_and_are_repeated_beside_long_ones(tiny_pair_model):
    model = tiny_pair_model("sdxl", in_channels=8)
    alone, mixed = encode_text(model, ["make it snow", ""]), encode_text(model, ["make it snow", LONG, ""])
    assert alone.tokens.shape[1] == 77 and mixed.tokens.shape[1] == 154
    for row, other in ((0, 0), (1, 2)):
        torch.testing.assert_close(mixed.tokens[other], alone.tokens[row].repeat(2, 1))
        torch.testing.assert_close(mixed.pooled[other], alone.pooled[row])


def test_lengths_are_evened_out_to_their_least_common_multiple():
    texts = [torch.rand(n * 77, 3) for n in (1, 2, 3)]
    found = even(texts)
    assert [one.shape for one in found] == [(462, 3)] * 3
    assert all(torch.equal(one, text.repeat(462 // len(text), 1)) for one, text in zip(found, texts, strict=True))
    assert even(texts[:1])[0] is texts[0]


@torch.inference_mode()
def test_a_repeated_text_is_attended_to_as_once(untrained):
    """What evening out relies on, through the network: branches of unequal length are those of equal length."""
    model = untrained.model
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = 3 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text, null = encode_text(model, ["make it snow"]), encode_text(model, [""])
    twice = encode_text(model, ["make it snow", LONG]).rows([0])
    once, again = (
        DualGuidance(BranchDenoiser(model), 4.0, 1.5)(x, 3.0, Conditioning(text=one, null_text=null, image=image))
        for one in (text, twice)
    )
    torch.testing.assert_close(once, again, atol=1e-4, rtol=1e-4)


def test_the_end_of_a_long_instruction_counts(untrained):
    other = untrained.edit(PICTURE, f"{LONG} at night", config=QUICK)[0]
    assert (untrained.edit(PICTURE, LONG, config=QUICK)[0].latent - other.latent).abs().max() > 1e-3
    assert other.settings["instruction"].endswith("at night")


def test_a_short_instruction_beside_a_long_one_is_as_alone_to_the_bit(untrained):
    alone = untrained.edit(PICTURE, "make it snow", config=QUICK)[0]
    beside = untrained.edit(PICTURE, [LONG, "make it snow"], config=QUICK)[1]
    assert torch.equal(alone.latent, beside.latent)


def test_a_text_without_end_is_refused(untrained):
    check_length("é" * LONGEST)  # as many bytes again, and fewer tokens
    check_length(" ".join(["snow"] * LONGEST))
    endless = " ".join(["snow"] * (LONGEST + 1))
    with pytest.raises(ConfigError, match=r"has 2,401 tokens; give at most 2,400"):
        untrained.edit(PICTURE, endless)


def test_pairs_of_long_captions(tiny_pair_model):
    """Sharing self-attention reads them; maps onto words are of one chunk, and the caption is refused by name."""
    model = tiny_pair_model()
    make = lambda **how: PairGenerator(model, PairConfig(steps=2, size=(64, 64), **how))  # noqa: E731
    one, other = (make().generate(text, "a boat", seeds=0)[0] for text in (LONG, f"{LONG} at night"))
    assert (one.latents[0] - other.latents[0]).abs().max() > 1e-3
    for how in ({"mode": "refine"}, {"local_blend": True}):
        with pytest.raises(ConfigError, match=r"has more than 75 tokens, and maps onto words have so many; shorten it"):
            make(**how).check(LONG, "a boat")
        make(**how).check(" ".join(["snow"] * 75), "a boat")
