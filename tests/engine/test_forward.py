"""Our own evaluation of a UNet is diffusers', and steps back where a network is another, or somebody listens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

from ip2p_engine import InstructPix2Pix
from ip2p_engine.networks.attention import AttentionCall, Sharing, fused_projections, install, project_text
from ip2p_engine.networks.denoiser import BranchDenoiser, Times, fused_for, predict
from ip2p_engine.networks.forward import forward, is_plain, project_times
from ip2p_engine.p2p.plan import sharing_rows


def told(unet, rows, fused=True):
    """(call, SDXL's texts and sizes) of a batch."""
    texts = torch.randn(rows, 77, unet.config.cross_attention_dim).to(unet.dtype)
    added = {"text_embeds": torch.randn(rows, 24), "time_ids": torch.ones(rows, 6)}
    call = AttentionCall(texts=project_text(unet, texts), fused=fused_projections(unet) if fused else None)
    return call, added if unet.config.addition_embed_type else None


def near(one, other):
    """But for the order of sums, in float64."""
    assert (one - other).abs().max() <= 1e-9 * other.abs().max()


def by_diffusers(unet, x, t, call, added, **more):
    kwargs = {"added_cond_kwargs": added, "cross_attention_kwargs": {"call": replace(call, fused=None)}}
    return unet(x, t, None, **kwargs, **more).sample


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("size", [(16, 24), (9, 7)])
@torch.inference_mode()
def test_it_is_diffusers(family, size, tiny_pair_model):
    unet = tiny_pair_model(family, torch.float64).unet
    x, t = torch.randn(2, 4, *size).double(), torch.tensor([500.5, 20.0])
    call, added = told(unet, 2)
    ours, _ = forward(unet, x, project_times(unet, t, added), call)
    near(ours, by_diffusers(unet, x, t, call, added))


@torch.inference_mode()
def test_with_linear_projections_and_levels_without_attention():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    install(unet.eval().double())
    assert is_plain(unet)
    x, t = torch.randn(2, 4, 16, 16).double(), torch.tensor([3.0])
    call, _ = told(unet, 2)
    near(forward(unet, x, project_times(unet, t), call)[0], by_diffusers(unet, x, t, call, None))


@pytest.mark.parametrize("fixed", [True, False])
@torch.inference_mode()
def test_rows_that_look_where_others_look(fixed, tiny_pair_model):
    unet, x = tiny_pair_model(dtype=torch.float64).unet, torch.randn(8, 4, 8, 8).double()
    call, _ = told(unet, 8)
    call = replace(call, sharing=Sharing.of(sharing_rows([True, False]), fixed=fixed))
    ours, _ = forward(unet, x, project_times(unet, torch.tensor([500.0])), call)
    near(ours, by_diffusers(unet, x, 500, call, None))


@pytest.mark.parametrize(
    ("family", "names", "twins"),
    [
        ("sd1", ("c", "i", "u"), 2),
        ("sd2", ("c", "i"), 2),
        ("sd1", ("c", "u"), 0),
        ("sd1", ("c", "t"), 0),
        ("sdxl", ("c", "i", "u"), 0),
    ],
)
@torch.inference_mode()
def test_branches_that_differ_in_their_text_alone_are_one_up_to_it(family, names, twins, tiny_pair_model):
    model = tiny_pair_model(family, torch.float64, in_channels=8)
    editor = InstructPix2Pix(model)
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    condition, x = editor.condition(pictures, ["a hat", "snow"], size=(64, 64)), torch.randn(2, 4, 8, 8).double()
    together, alone = (BranchDenoiser(model, together=way) for way in (True, False))
    ours, theirs = together(x, 3.0, condition, names), alone(x, 3.0, condition, names)
    for name in names:
        near(ours[name], theirs[name])
    assert [group.call.twins for group in together._prepared.groups] == [twins]
    assert not any(group.call.twins for group in alone._prepared.groups)


@torch.inference_mode()
def test_what_a_control_network_adds(tiny_pair_model):
    unet, x = tiny_pair_model(dtype=torch.float64).unet, torch.randn(1, 4, 8, 8).double()
    call, _ = told(unet, 1)
    skips = [unet.conv_in(x)]
    for block in unet.down_blocks:
        _, more = block(skips[-1], x.new_zeros(1, 64), encoder_hidden_states=x.new_zeros(1, 7, 24))
        skips += more
    down, middle = [torch.randn_like(skip) for skip in skips], torch.randn_like(skips[-1])
    ours, _ = forward(unet, x, project_times(unet, torch.tensor([5.0])), call, residuals=(down, middle))
    given = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    near(ours, by_diffusers(unet, x, 5.0, call, None, **given))


def changed(unet, what):
    """A network that is asked to be something of its own."""
    match what:
        case "a hook":
            unet.mid_block.register_forward_hook(lambda *_: None)
        case "a hook before":
            unet.up_blocks[0].attentions[0].register_forward_pre_hook(lambda *_: None)
        case "another forward":
            unet.down_blocks[0].resnets[0].forward = unet.down_blocks[0].resnets[0].forward
        case "compiled":
            unet.compile(backend="eager")
        case "FreeU":
            unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        case "another attention":
            unet.set_attn_processor(AttnProcessor2_0())
        case "a scale":
            unet.mid_block.resnets[0].output_scale_factor = 1.5
        case "training":
            unet.train()
        case "a wrapped projection":
            attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
            attn.to_q = torch.nn.Sequential(attn.to_q)


@pytest.mark.parametrize(
    "what",
    [
        "a hook",
        "a hook before",
        "another forward",
        "compiled",
        "FreeU",
        "another attention",
        "a scale",
        "training",
        "a wrapped projection",
    ],
)
def test_a_network_of_its_own_kind_is_left_to_itself(what, tiny_pair_model):
    model = tiny_pair_model()
    assert is_plain(model.unet)
    changed(model.unet, what)
    assert not is_plain(model.unet)
    assert fused_for(model) is None


def test_with_gradients_diffusers_computes(tiny_pair_model):
    model = tiny_pair_model()
    x, (call, _) = torch.randn(1, 4, 8, 8, requires_grad=True), told(model.unet, 1)
    with torch.enable_grad():
        predict(model, x, torch.tensor([500.0]), call).sum().backward()
    assert x.grad.isfinite().all()


@torch.inference_mode()
def test_times_of_all_levels_are_projected_at_once(tiny_pair_model):
    model = tiny_pair_model()
    times, calls = Times(model, [10.0, 5.0, 0.0]), []
    held = model.unet.time_embedding.linear_1.register_forward_hook(lambda *_: calls.append(1))
    for sigma in (10.0, 5.0):
        t = times.at(sigma, torch.device("cpu"))
        found, alone = times.projected(sigma), project_times(model.unet, t)
        assert all(torch.allclose(found[module], alone[module], atol=1e-6) for module in alone)
    held.remove()
    assert len(calls) == 1 + 2
    assert times.projected(7.0) is None


def test_what_is_fused_follows_the_weights(tiny_pair_model):
    """A copy made for one walk: weights that are changed in place count in the next."""
    model = tiny_pair_model()
    first = fused_for(model)
    attn = model.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.to_v.weight.data *= 2
    assert sum(not torch.equal(old, new) for (old, _), (new, _) in zip(first, fused_for(model), strict=True)) == 1
