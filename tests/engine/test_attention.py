"""Sharing attention: equal to copying logits, on and off per pair and step, and gone afterwards."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from ip2p_engine.networks.attention import (
    AttentionCall,
    Sharing,
    attend,
    install,
    project_text,
    share_self_attention,
)
from ip2p_engine.networks.conditioning import encode_text
from ip2p_engine.p2p.plan import p2p_active, sharing_rows

HEADS = 4


@pytest.fixture(scope="module")
def model(tiny_pair_model):
    return tiny_pair_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def context(model):
    """No text, no text, caption, edited caption: the four rows of one pair."""
    return encode_text(model, ["", "a red heart", "a blue star"]).tokens[[0, 0, 1, 2]]


def noisy(seed=0, pairs=1):
    return torch.randn(4 * pairs, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def copied_logits(query, key, value, rows):
    """The paper's way: every logit materialised, then some rows' overwritten."""
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key, value))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    logits = torch.stack([logits[row] for row in rows])
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 77])
def test_any_number_of_keys_gives_the_materialised_map(tokens):
    """A CPU gets whole blocks of keys; what fills them up is never looked at."""
    draw = torch.Generator().manual_seed(tokens)
    query, key, value = (torch.randn(2, n, 32, dtype=torch.float64, generator=draw) for n in (9, tokens, tokens))
    assert torch.allclose(attend(query, key, value, HEADS), copied_logits(query, key, value, [0, 1]), atol=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_active_steps_are_the_original_s(pairs_reference, p):
    flags = [p2p_active(step, 10, p) for step in range(10)]
    assert flags == pairs_reference[f"p2p{p}_cpu_order/active"].tolist()


@pytest.mark.parametrize(
    ("steps", "p", "active"),
    [
        (1, 0.0, 0),
        (1, 0.1, 1),
        (1, 0.9, 1),
        (2, 0.0, 0),
        (2, 0.5, 1),
        (2, 1.0, 1),
        (2, 1.1, 2),
        (20, 0.5, 10),
        (5, 0.5, 2),
    ],
)
def test_number_of_active_steps(steps, p, active):
    flags = [p2p_active(step, steps, p) for step in range(steps)]
    assert flags == [True] * active + [False] * (steps - active)


def test_rows_of_a_batch():
    assert sharing_rows([True, False]) == [0, 0, 2, 3, 4, 4, 6, 7]
    assert sharing_rows([True], halves=1) == [0, 0]
    assert sharing_rows([False, False], halves=3) == list(range(12))


@pytest.mark.parametrize("active", [[True, True], [False, True], [True, False], [False, False]])
def test_shared_queries_and_keys_are_copied_logits(active):
    query, key, value = torch.randn(3, 8, 30, 16, generator=torch.Generator().manual_seed(1))
    rows = sharing_rows(active)
    shared = attend(*share_self_attention(query, key, rows), value, HEADS)
    assert (shared - copied_logits(query, key, value, rows)).abs().max() < 1e-6
    assert torch.equal(shared[0], attend(query, key, value, HEADS)[0])


def test_sharing_the_inputs_of_the_projections_is_the_same():
    """What a patch before the projections does, as ComfyUI's attn1_patch."""
    generator = torch.Generator().manual_seed(2)
    hidden, to_q, to_k = (torch.randn(*s, generator=generator) for s in ((4, 9, 16), (16, 16), (16, 16)))
    rows = torch.tensor(sharing_rows([True]))
    inputs = share_self_attention(hidden, hidden, rows)
    outputs = share_self_attention(hidden @ to_q, hidden @ to_k, rows)
    for before, after, weight in zip(inputs, outputs, (to_q, to_k), strict=True):
        assert (before @ weight - after).abs().max() < 1e-5


def called(model, x, t, **told):
    """The UNet's output where the call says what to attend to."""
    call = AttentionCall(**told)
    return model.unet(x, t, None, cross_attention_kwargs={"call": call}).sample


@pytest.mark.parametrize("share", [True, False])
@torch.inference_mode()
def test_whole_network_against_copied_logits(model, context, slow_pairs, share):
    x, texts = noisy(), project_text(model.unet, context)
    with slow_pairs.slow_attention(model.unet) as state:
        state.share = share
        expected = model.unet(x, 500, encoder_hidden_states=context).sample
    ours = called(model, x, 500, texts=texts, sharing=Sharing.of(sharing_rows([share])))
    plain = model.unet(x, 500, encoder_hidden_states=context).sample
    assert (ours - expected).abs().max() < 1e-10
    assert ((ours - plain).abs().max() > 1e-3) == share
    assert (ours[::2] - plain[::2]).abs().max() < 1e-10


@torch.inference_mode()
def test_pairs_share_one_by_one(model, context):
    """One batch of three pairs, two of them sharing, equals three batches."""
    x, active = noisy(pairs=3), [True, False, True]
    pairs = [[2 * pair, 2 * pair + 1, 6 + 2 * pair, 7 + 2 * pair] for pair in range(3)]
    batch_context = torch.empty(12, *context.shape[1:], dtype=torch.float64)
    for rows in pairs:
        batch_context[rows] = context
    texts = project_text(model.unet, batch_context)
    together = called(model, x, 300, texts=texts, sharing=Sharing.of(sharing_rows(active)))
    for rows, shares in zip(pairs, active, strict=True):
        one = project_text(model.unet, context)
        alone = called(model, x[rows], 300, texts=one, sharing=Sharing.of(sharing_rows([shares])))
        assert (together[rows] - alone).abs().max() < 1e-10


@torch.inference_mode()
def test_prepared_texts_may_be_repeated(model, context):
    x = noisy()
    plain = model.unet(x, 500, encoder_hidden_states=context).sample
    texts = project_text(model.unet, context[[0, 2, 3]], rows=[0, 0, 1, 2])
    assert (called(model, x, 500, texts=texts) - plain).abs().max() < 1e-10


@pytest.mark.parametrize("rows", [[0, 0, 2, 2, 4, 4, 6, 6], [0, 0]])
def test_a_batch_that_does_not_fit_is_an_error_and_leaves_nothing(model, context, rows):
    before = state_of(model)
    with pytest.raises((IndexError, RuntimeError)):
        called(model, noisy(), 500, texts=project_text(model.unet, context), sharing=Sharing.of(rows))
    assert state_of(model) == before


def state_of(model):
    """Every attribute of every module, by identity."""
    return {
        (name, key): id(value)
        for network in (model.unet, model.autoencoder, *model.text_encoders)
        for name, module in network.named_modules()
        for key, value in vars(module).items()
    }


@torch.inference_mode()
def test_a_call_leaves_nothing_in_the_network(model, context):
    before = state_of(model)
    texts = project_text(model.unet, context)
    called(model, noisy(), 500, texts=texts, sharing=Sharing.of(sharing_rows([True])))
    assert install(model.unet) and state_of(model) == before


@torch.inference_mode()
def test_without_a_call_a_network_is_diffusers_own(model, context):
    """Whoever trains it or hands it on has the attention that was there."""
    x, ours = noisy(), model.unet
    plain = UNet2DConditionModel.from_config(ours.config).to(torch.float64)
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x, 500, context).sample, plain(x, 500, context).sample)
