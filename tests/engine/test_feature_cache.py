"""Deep features that are kept: exact where nothing is kept, cheaper and near where something is, and nothing left."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ip2p_engine.errors import ConfigError
from ip2p_engine.networks.attention import AttentionCall, project_text
from ip2p_engine.networks.denoiser import BranchDenoiser, predict
from ip2p_engine.networks.feature_cache import FeatureCache, forward
from ip2p_engine.scenes.world import Scene, render

SCENE = render(Scene(shape="heart", colour="red", background="sky", size="large"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@torch.no_grad()
def test_the_whole_is_what_diffusers_computes(family, tiny_pair_model):
    model = tiny_pair_model(family)
    wide = model.unet.config.cross_attention_dim
    x, t = torch.randn(2, 4, 16, 24), torch.tensor([500.0])
    call = AttentionCall(texts=project_text(model.unet, torch.randn(2, 7, wide)))
    pooled = sizes = added = None
    if family == "sdxl":
        sizes = torch.ones(2, 6)
        pooled = torch.randn(
            2, model.unet.config.projection_class_embeddings_input_dim - 6 * model.unet.config.addition_time_embed_dim
        )
        added = {"text_embeds": pooled, "time_ids": sizes}
    exact = predict(model, x, t, call, pooled, sizes)
    output, deep = forward(model.unet, x, t.expand(2), call, added, None)
    assert torch.equal(exact, output)
    again, _ = forward(model.unet, x, t.expand(2), call, added, deep)
    assert torch.equal(exact, again), "the same inputs with what they had themselves below"


@torch.no_grad()
def test_every_second_call_is_computed_at_the_finest_level_alone(tiny_pair_model):
    model = tiny_pair_model("sd1")
    call = AttentionCall(texts=project_text(model.unet, torch.randn(1, 7, model.unet.config.cross_attention_dim)))
    runs = []
    held = model.unet.mid_block.register_forward_hook(lambda *_: runs.append(1))
    cache, x = FeatureCache(2), torch.randn(1, 4, 16, 16)
    for t in (900.0, 850.0, 800.0):
        cache(model.unet, x, torch.tensor([t]), call, None)
    held.remove()
    assert len(runs) == 2


def test_an_edit_drifts_little_and_leaves_nothing_behind(editor):
    settings = {"text_cfg": 4.0, "image_cfg": 1.5, "steps": 8, "sampler": "euler"}
    exact, cached, again = (
        editor.edit(SCENE, "make it night", feature_cache=keep, **settings)[0] for keep in (1, 2, 1)
    )
    assert np.array_equal(exact.image, again.image)
    drift = np.abs(np.asarray(exact.image, int) - np.asarray(cached.image, int)).mean()
    assert 0 < drift < 8 and cached.settings["feature_cache"] == 2
    assert cached.evaluations == exact.evaluations
    with pytest.raises(ConfigError, match="feature_cache is 0"):
        editor.edit(SCENE, "make it night", feature_cache=0)


@torch.no_grad()
def test_other_branches_begin_anew(editor):
    """What was kept for three branches says nothing of one."""
    condition = editor.condition(SCENE, "make it night")
    x = torch.randn(1, 4, 8, 8)
    cached, plain = BranchDenoiser(editor.model, feature_cache=3), BranchDenoiser(editor.model)
    cached(x, 5.0, condition, ["c", "i", "u"])
    torch.testing.assert_close(cached(x, 4.0, condition, ["c"])["c"], plain(x, 4.0, condition, ["c"])["c"])
