"""Schedules, dropout and weights of the loss that the paper's recipe does not have, against closed forms."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ip2p_engine import InstructPix2Pix
from ip2p_engine.checkpoint.source import open_bundle
from ip2p_engine.diffusion.guidance import conditioning_dropout
from ip2p_engine.errors import ConfigError, DatasetError
from ip2p_engine.images import to_tensor
from ip2p_engine.networks.conditioning import TextEmbedding, encode_image
from ip2p_engine.networks.model import load_model
from ip2p_engine.train import TrainConfig
from ip2p_engine.train.augment import Crop, crop_mask
from ip2p_engine.train.batches import Batch, PictureReader
from ip2p_engine.train.encoding import Encoded, Encoder
from ip2p_engine.train.networks import make_trainable, needs_masks, widened
from ip2p_engine.train.objective import Objective, _left_out, change_weights, mask_weights, noise_levels, snr_weight
from ip2p_engine.train.optimizers import learning_rate, make_optimizers, set_learning_rate
from ip2p_engine.train.order import Place
from ip2p_engine.train.randomness import draw
from ip2p_engine.train.sources import open_pair, open_source

STEP = "step-00000001.pt"


@pytest.mark.parametrize(
    ("settings", "at", "wanted"),
    [
        ({"schedule": "linear"}, (0, 50, 99), (1, 0.5, 0.01)),
        ({"schedule": "polynomial", "schedule_power": 3.0}, (0, 50, 99), (1, 0.125, 1e-6)),
        ({"schedule": "restarts", "schedule_restarts": 2}, (0, 25, 49, 50, 75), (1, 0.5, None, 1, 0.5)),
        ({"schedule": "linear", "warm_up": 10}, (0, 9, 50), (0.1, 0.91, 0.5)),
    ],
)
def test_schedules(settings, at, wanted):
    config = TrainConfig(steps=100, learning_rate=1.0, **settings)
    last = 0.5 * (1 + math.cos(0.98 * math.pi))
    found = [learning_rate(config, step) for step in at]
    assert found == pytest.approx([last if one is None else one for one in wanted])


def test_one_restart_is_a_cosine():
    one, cosine = (TrainConfig(steps=7, schedule=name, schedule_restarts=1) for name in ("restarts", "cosine"))
    assert [learning_rate(one, n) for n in range(7)] == [learning_rate(cosine, n) for n in range(7)]


def test_shares_of_what_is_left_out():
    r = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    config = TrainConfig(dropout=0.05, text_dropout=0.1, image_dropout=0.02)
    no_text, no_image = _left_out(r, config.dropouts)
    counts = [int(one.sum()) for one in (no_text & ~no_image, no_text & no_image, no_image & ~no_text)]
    assert counts == [1000, 500, 200]
    plain = _left_out(r, TrainConfig().dropouts)
    assert all(torch.equal(a, b) for a, b in zip(plain, conditioning_dropout(r, 0.05), strict=True))


@pytest.mark.parametrize(
    "values", [{"text_dropout": 1.1}, {"image_dropout": -0.1}, {"text_dropout": 0.9, "dropout": 0.1}]
)
def test_shares_that_are_none(values):
    with pytest.raises(ConfigError, match="dropout"):
        TrainConfig(**values)


def test_weights_of_change():
    change = torch.zeros(2, 4, 2, 2)
    change[0, :, 0, 0] = -3.0
    change[0, :, 0, 1] = 1.0
    found = change_weights(change, 2.0)
    assert torch.allclose(found[0, 0], torch.tensor([[1 + 2 * 3, 1 + 2 * 1], [1, 1]]) / 3)
    assert torch.allclose(found.mean(dim=(1, 2, 3)), torch.ones(2)) and torch.equal(found[1], torch.ones(1, 2, 2))


def test_weights_of_a_mask():
    mask = torch.zeros(3, 1, 2, 2)
    mask[0, 0, 0] = torch.tensor([1.0, 0.5])
    mask[1] = 1
    found = mask_weights(mask, 0.2)
    by_hand = torch.tensor([[1, 0.6], [0.2, 0.2]])
    assert torch.allclose(found[0, 0], by_hand / 0.5)
    assert torch.allclose(found.mean(dim=(1, 2, 3)), torch.ones(3)) and torch.allclose(
        found[1:], torch.ones(2, 1, 2, 2)
    )
    assert torch.equal(mask_weights(mask, 0.0)[2], torch.ones(1, 2, 2)), "nothing is inside"


def test_a_masked_loss_is_that_of_the_places_by_hand(masked, base):
    """Read, cropped and encoded as a run does, with and without a cache; the loss by plain torch."""
    config = TrainConfig(
        resolution=64, resize=(64, 64), flip=0.0, workers=0, batch_size=3, unmasked_weight=0.25, seed=1
    )
    source = open_source(masked, config)
    model = make_trainable(load_model(base(), device="cpu"), config)
    encoder = Encoder(model)
    places = [Place(step=0, position=n, size=(64, 64), candidates=[n]) for n in range(3)]
    samples = [PictureReader(source, config, masks=True).read(n, place) for n, place in enumerate(places)]
    tensors = {name: torch.stack([one.tensors[name] for one in samples]) for name in samples[0].tensors}
    drawn = replace(draw(1, 0, range(3), (4, 8, 8)), drop=torch.ones(3))
    batch = Batch(instructions=tuple(one.instruction for one in samples), tensors=tensors, draws=drawn, broken=())
    encoded = encoder(batch)
    found = Objective(model, encoder.null_text, config)(model.unet, encoded, drawn)
    plain = Objective(model, encoder.null_text, replace(config, unmasked_weight=1.0))
    assert torch.equal(plain(model.unet, encoded, drawn)[1:], found[1:]), "where all or none is inside"
    seen = {}
    plain(lambda x, t, text, **_: seen.update(out=model.unet(x, t, text)) or seen["out"], encoded, drawn)
    errors = (seen["out"].sample - drawn.noise)[0].square()
    inside, outside = errors[..., :4].mean(), errors[..., 4:].mean()
    assert found[0].item() == pytest.approx(((inside + 0.25 * outside) / 1.25).item(), abs=1e-5)


def test_masks_are_cut_and_mirrored_with_their_pictures(masked):
    source = open_source(masked, TrainConfig(resolution=64))
    pair = open_pair(source[0], masks=True)
    crop = Crop(original=(64, 64), resized=(72, 72), left=8, top=0, size=(64, 64), mirrored=True)
    cut = crop_mask(pair.mask, crop)
    assert cut.shape == (1, 64, 64) and cut[0, :, -20:].eq(255).all() and cut[0, :, :30].eq(0).all()
    assert crop_mask(None, crop).eq(255).all() and open_pair(source[0]).mask is None


@pytest.mark.parametrize("cache", [False, True])
def test_a_masked_run(masked, store, run, cache):
    assert run(data=masked, steps=1, unmasked_weight=0.0, cache=cache, validate_every=1, validation_count=1).finished
    with pytest.raises(ConfigError, match="has no masks"):
        run("other", data=store, steps=1, unmasked_weight=0.0)


@pytest.mark.parametrize("channels", [4, 8])
def test_masks_as_channels_are_what_an_edit_tells_the_network(masked, base, channels):
    """Noise, picture, mask, as UltraEdit has them; new channels are zero, so the network's output is what it was."""
    config = TrainConfig(resolution=64, resize=(64, 64), flip=0.0, workers=0, mask_channels=True)
    before = load_model(base(), device="cpu")
    before = before if channels == 4 else widened(before)
    model = make_trainable(replace(before, unet=copy.deepcopy(before.unet)), config)
    assert model.spec.in_channels == 12 and needs_masks(model, config) and not needs_masks(before, config)
    pair = open_pair(open_source(masked, config)[0], masks=True)
    place = Place(step=0, position=0, size=(64, 64), candidates=[0])
    tensors = PictureReader(open_source(masked, config), config, masks=True).read(0, place).tensors
    found = Encoder(model).latents(tensors["pixels"][None], tensors["mask"][None])
    told = encode_image(model, to_tensor([pair.original]), to_tensor([pair.mask.convert("RGB")]))
    assert found["condition"].shape == (1, 8, 8, 8) and torch.allclose(found["condition"], told, atol=1e-5)
    plain = Encoder(before).latents(tensors["pixels"][None])
    assert torch.allclose(found["mean"], plain["mean"], atol=1e-6) and torch.allclose(found["std"], plain["std"])
    x, text = torch.randn(1, 4, 8, 8), torch.ones(1, 77, 8)
    inputs = torch.cat([x, found["condition"]], 1)
    wide, narrow = model.unet(inputs, 500, text).sample, before.unet(inputs[:, :channels], 500, text).sample
    assert torch.allclose(wide, narrow, atol=1e-5)


@pytest.mark.slow
def test_a_run_with_masks_as_channels(masked, run, tmp_path):
    """Cached and not, whole and by adapters: one first loss; what is left edits under a mask, at any step."""
    own = tmp_path / "own.jsonl"
    pair = open_pair(open_source(masked, TrainConfig())[0], masks=True)
    pair.original.save(tmp_path / "a.png")
    pair.mask.save(tmp_path / "m.png")
    own.write_text('{"source": "a.png", "instruction": "make it blue", "mask": "m.png"}\n')
    settings = {"data": masked, "steps": 2, "mask_channels": True, "resize": (64, 64), "flip": 0.0, "validate_every": 2}
    settings |= {"validation_count": 2, "validate_with": str(own)}
    losses = []
    for name, more in (("plain", {}), ("cache", {"cache": True}), ("lora", {"lora_rank": 2})):
        result = run(name, **settings, **more)
        losses.append(json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["loss"])
        model = load_model(result.files["ema"], device="cpu", dtype="file")
        assert model.spec.takes_mask
        result.files["ema"].unlink()
        step = load_model(tmp_path / name, device="cpu", dtype="file")
        assert torch.allclose(step.unet.conv_in.weight, model.unet.conv_in.weight, atol=1e-6)
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    edited = InstructPix2Pix(model).edit(pair.original, "make it blue", masks=pair.mask, steps=1, size="keep")[0]
    assert edited.latent.isfinite().all()


def test_a_broken_mask_breaks_only_runs_that_look_at_masks(records):
    source = open_source([replace(records[0], mask=b"no picture")], TrainConfig())
    assert open_pair(source[0]).mask is None
    with pytest.raises(DatasetError, match="pair 0000000/0: .*mask"):
        open_pair(source[0], masks=True)


def test_noise_levels_to_pure_noise(tiny_model):
    """At the last level nothing of the picture is left, and what is to be predicted is the picture itself."""
    model = make_trainable(tiny_model(), TrainConfig(zero_snr=True))
    assert (model.spec.prediction, model.spec.zero_snr) == ("v", True)
    alpha, sigma, t = noise_levels(model, torch.tensor([0.9999], dtype=torch.float64))
    assert (float(alpha), float(sigma), int(t)) == (0, 1, 999)
    assert snr_weight(alpha, sigma, "v", 5.0) == 0
    latent, text = torch.full((1, 4, 8, 8), 2.0), TextEmbedding(tokens=torch.zeros(1, 77, 8))
    given = Encoded(mean=latent, std=0 * latent, condition=latent, text=text, size_ids=torch.zeros(1, 6))
    chance = replace(draw(0, 0, [0], (4, 8, 8)), level=torch.tensor([0.9999], dtype=torch.float64))
    silent = lambda x, *_, **__: SimpleNamespace(sample=0 * x[:, :4])  # noqa: E731
    found = Objective(model, text, TrainConfig(zero_snr=True))(silent, given, chance)
    assert float(found) == pytest.approx((2 * model.spec.latent_scale) ** 2)


def test_what_cannot_end_in_pure_noise(tiny_model):
    with pytest.raises(ConfigError, match="predicts v"):
        TrainConfig(zero_snr=True, prediction="eps")
    with pytest.raises(ConfigError, match="zero_snr is of v-prediction on DDPM's ladder, and this is v on edm"):
        make_trainable(tiny_model("cosxl"), TrainConfig(zero_snr=True))


def test_a_model_to_pure_noise_says_so_in_every_form(run, tmp_path):
    """In its header, by ComfyUI's tensors alone, in diffusers' folder, and at any step; and edits."""
    result = run(steps=1, zero_snr=True, outputs=["ema", "diffusers"])
    bare = tmp_path / "bare.safetensors"
    state = load_file(result.files["ema"])
    assert {"v_pred", "ztsnr"} <= state.keys()
    save_file(state, bare)
    (result.files["diffusers"] / "ip2p_config.json").unlink()
    said = json.loads((result.files["diffusers"] / "scheduler" / "scheduler_config.json").read_text())
    assert (said["rescale_betas_zero_snr"], said["timestep_spacing"]) == (True, "trailing")
    for source in (result.files["ema"], result.files["diffusers"], bare, tmp_path / "run" / "checkpoints" / STEP):
        spec = open_bundle(str(source), header_only=True).spec
        assert (spec.prediction, spec.zero_snr) == ("v", True), source
    editor = InstructPix2Pix.load(result.files["ema"], device="cpu")
    edited = editor.edit(Image.new("RGB", (64, 64)), "add snow", steps=3, size="keep")[0]
    assert edited.latent.isfinite().all() and editor.model.schedule.sigma_max > 4000


@pytest.mark.parametrize(
    ("name", "package"), [("lion", "lion_pytorch"), ("prodigy", "prodigyopt"), ("adafactor", None)]
)
def test_optimizers_of_libraries_get_the_runs_numbers(name, package):
    """And Lion's first step is p (1 - lr wd) - lr sign(g) (Chen et al. 2023, algorithm 2)."""
    if package:
        pytest.importorskip(package)
    config = TrainConfig(optimizer=name, learning_rate=0.25, weight_decay=0.5, betas=(0.8, 0.9))
    unet, text = torch.nn.Parameter(torch.tensor([2.0, -1.0])), torch.nn.Parameter(torch.tensor([4.0]))
    optimizers = make_optimizers({"conv.bias": unet, "text_encoder.bias": text}, config)
    groups = [group for one in optimizers for group in one.param_groups]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.5]
    assert all(group.get("betas", (0.8, 0.9))[:2] == (0.8, 0.9) for group in groups)
    set_learning_rate(optimizers, 0.1, text_share=0.5)
    assert [group["lr"] for group in groups] == [0.1, 0.05]
    if name == "lion":
        unet.grad, text.grad = torch.tensor([3.0, -7.0]), torch.tensor([-0.1])
        optimizers[0].step()
        assert torch.allclose(unet, torch.tensor([2 * 0.95 - 0.1, -0.95 + 0.1]))
        assert torch.allclose(text, torch.tensor([4 * 0.975 + 0.05]))


def trained_by(name, start, steps, **settings):
    """A parameter after so many steps on f(x) = |x - 1|^2 / 2."""
    weight = torch.nn.Parameter(start.clone())
    (optimizer,) = make_optimizers({"inner.weight": weight}, TrainConfig(optimizer=name, **settings))
    for _ in range(steps):
        weight.grad = weight.detach() - 1
        optimizer.step()
    return weight.detach()


def test_prodigy_is_that_of_its_paper_and_prints_nothing(capsys):
    """Mishchenko & Defazio (2023), algorithm 4, with decoupled weight decay."""
    pytest.importorskip("prodigyopt")
    start, (b1, b2), decay = torch.tensor([3.0, -2.0, 0.5]).double(), (0.8, 0.99), 0.1
    found = trained_by("prodigy", start, 12, learning_rate=1.0, weight_decay=decay, betas=(b1, b2))
    x, d, r = start, 1e-6, 0.0
    m, v, s = (torch.zeros(3, dtype=torch.float64) for _ in range(3))
    for _ in range(12):
        g, root = x - 1, b2**0.5
        r = root * r + (1 - root) * d**2 * float(g @ (start - x))
        s = root * s + (1 - root) * d**2 * g
        m, v = b1 * m + (1 - b1) * d * g, b2 * v + (1 - b2) * d**2 * g**2
        rate, d = d, max(d, r / float(s.abs().sum()))
        x = x * (1 - decay * rate) - rate * m / (v.sqrt() + d * 1e-8)
    assert d > 1e-3 and torch.allclose(found, x, atol=1e-7)
    assert capsys.readouterr().out == ""


def test_adafactor_is_that_of_its_paper():
    """Shazeer & Stern (2018), algorithm 4, a matrix' second moments by their rows and columns."""
    start, rate, decay = torch.tensor([[3.0, -2.0, 0.5], [1.5, 4.0, -1.0]]), 0.2, 0.1
    found = trained_by("adafactor", start, 4, learning_rate=rate, weight_decay=decay)
    x, rows, columns = start.double(), torch.zeros(2, 1).double(), torch.zeros(1, 3).double()
    for t in range(1, 5):
        g, kept = x - 1, 1 - t**-0.8
        rows = kept * rows + (1 - kept) * (g**2).mean(1, keepdim=True)
        columns = kept * columns + (1 - kept) * (g**2).mean(0, keepdim=True)
        update = g / (rows * columns / rows.mean()).sqrt()
        size = max(1e-3, float((x**2).mean().sqrt())) * min(rate, t**-0.5)
        x = x * (1 - rate * decay) - size * update / max(1.0, float((update**2).mean().sqrt()))
    assert torch.allclose(found.double(), x, atol=1e-5) and (x - start).abs().max() > 0.1


def test_a_rate_beyond_the_weights_type_is_its_largest_number():
    """The run's own check of the loss then names the step; torch would end with an error of its own."""
    weight = torch.nn.Parameter(torch.ones(4, 4))
    (muon,) = make_optimizers({"inner.weight": weight}, TrainConfig(optimizer="muon", learning_rate=1e308, steps=1))
    weight.grad = torch.ones_like(weight)
    muon.step()
    assert weight.abs().max() > 1e37
