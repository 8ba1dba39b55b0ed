"""Deep features that are kept: exact where nothing is kept, cheaper and near where something is, and nothing left."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ip2p_engine.edit import InstructPix2Pix
from ip2p_engine.errors import ConfigError
from ip2p_engine.networks.attention import AttentionCall, project_text
from ip2p_engine.networks.denoiser import BranchDenoiser
from ip2p_engine.networks.feature_cache import FeatureCache
from ip2p_engine.networks.forward import forward, project_times
from ip2p_engine.scenes.world import Scene, render
from ip2p_engine.train.networks import widened

SCENE = render(Scene(shape="heart", colour="red", background="sky", size="large"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@torch.no_grad()
def test_the_same_inputs_with_what_they_had_below(family, tiny_pair_model):
    model = tiny_pair_model(family)
    x, t = torch.randn(2, 4, 16, 24), torch.tensor([500.0, 500.0])
    call = AttentionCall(texts=project_text(model.unet, torch.randn(2, 7, model.unet.config.cross_attention_dim)))
    added = {"text_embeds": torch.randn(2, 24), "time_ids": torch.ones(2, 6)} if family == "sdxl" else None
    times = project_times(model.unet, t, added)
    output, deep = forward(model.unet, x, times, call)
    again, _ = forward(model.unet, x, times, call, deep=deep)
    assert torch.equal(output, again)


@torch.no_grad()
def test_every_second_call_is_computed_at_the_finest_level_alone(tiny_pair_model):
    model = tiny_pair_model("sd1")
    call = AttentionCall(texts=project_text(model.unet, torch.randn(1, 7, model.unet.config.cross_attention_dim)))
    runs = []
    held = model.unet.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: runs.append(1))
    cache, x = FeatureCache(2), torch.randn(1, 4, 16, 16)
    for t in (900.0, 850.0, 800.0):
        cache(model.unet, x, project_times(model.unet, torch.tensor([t])), call)
    held.remove()
    assert len(runs) == 2


def test_a_network_of_its_own_kind_keeps_nothing(tiny_pair_model):
    model = widened(tiny_pair_model())
    model.unet.mid_block.resnets[0].output_scale_factor = 2.0
    with pytest.raises(ConfigError, match="features are kept of Stable Diffusion's own layers"):
        InstructPix2Pix(model).edit(SCENE, "make it night", steps=2, feature_cache=2)


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
