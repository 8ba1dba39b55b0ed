"""No step of a walk waits for the device: a long walk waits as often as a short one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from PIL import Image

from ip2p_engine.diffusion.schedule import DiscreteSchedule, make_sigmas
from ip2p_engine.edit import InstructPix2Pix
from ip2p_engine.hooks import Hooks
from ip2p_engine.images import to_tensor
from ip2p_engine.p2p.generator import PairConfig, PairGenerator, PairJob
from ip2p_engine.train.batches import Batch
from ip2p_engine.train.config import TrainConfig
from ip2p_engine.train.encoding import Encoder
from ip2p_engine.train.networks import widened
from ip2p_engine.train.objective import Objective
from ip2p_engine.train.progress import Clock
from ip2p_engine.train.randomness import draw
from ip2p_engine.train.run_folder import RunFolder
from ip2p_engine.train.watch import Watch

SHORT, LONG = 2, 4
WATCHED = Hooks(
    on_progress=lambda done, total, note: None,
    on_step=lambda step, steps, x, sigma, denoised: None,
    should_stop=lambda: False,
)
PAIRS = {
    "self": {},
    "refine and local blend": {"mode": "refine", "local_blend": True},
    "replace": {"mode": "replace"},
    "later edited prompt": {"edited_prompt_start": 0.4},
    "no sharing": {"p2p_range": (0.0, 0.0)},
    "heun": {"sampler": "heun"},
}


@pytest.fixture(scope="module")
def on_device(waits, tiny_pair_model):
    """Makes a tiny model whose weights claim to be on a device."""

    def make(edits=False):
        model = widened(tiny_pair_model()) if edits else tiny_pair_model()
        for network in (model.unet, model.autoencoder, *model.text_encoders):
            waits.on_device(network)
        return model

    return make


@pytest.fixture(scope="module")
def editor(on_device):
    return InstructPix2Pix(on_device(edits=True))


def a_step(waits, walk):
    """What a step of a walk waits for."""
    found = []
    for steps in (SHORT, LONG):
        with waits.fake_device() as gpu:
            walk(steps)
        assert not gpu.doubles
        found.append(Counter(gpu.waits))
    return found[1] - found[0]


EDITS = [(name, together) for name in ("euler_ancestral", "heun", "dpmpp_2m_sde") for together in (True, False)]


@pytest.mark.parametrize(
    ("sampler", "together"), [EDITS[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in EDITS[1:])]
)
def test_an_edit(waits, editor, sampler, together):
    picture = Image.new("RGB", (64, 64), "red")

    def walk(steps):
        editor.edit(picture, "a hat", size=(64, 64), steps=steps, sampler=sampler, together=together, hooks=WATCHED)

    assert not a_step(waits, walk)


@pytest.mark.parametrize(
    "settings", [pytest.param(v, id=k, marks=[pytest.mark.slow] if k != "self" else []) for k, v in PAIRS.items()]
)
def test_pairs(waits, on_device, settings):
    """Also while the pairs of a batch stop sharing one after another."""
    model, jobs = on_device(), [PairJob(caption="a red hat", edited_caption="a blue hat", seed=n) for n in range(2)]

    def walk(steps):
        PairGenerator(model, PairConfig(steps=steps, **settings)).latents(jobs, hooks=WATCHED)

    assert not a_step(waits, walk)


@pytest.mark.parametrize("cached", [True, False])
def test_a_micro_batch_of_training(waits, on_device, cached):
    model, config = on_device(edits=True), TrainConfig(resolution=64)
    model.unet.requires_grad_(True)
    batch = Batch(
        instructions=("a hat", "snow"), tensors=tensors(cached), draws=draw(0, 0, (0, 1), (4, 8, 8)), broken=()
    )
    with waits.fake_device():
        encoder = Encoder(model)
        objective = Objective(model, encoder.null_text, config)
    with waits.fake_device() as gpu:
        moved = batch.to(waits.DEVICE)
        loss = objective(model.unet, encoder(moved), moved.draws)
    assert not gpu.waits
    assert not gpu.doubles
    assert loss.requires_grad  # the way back needs a real device, and asks nothing of ours


class OneProcess:
    """What an Accelerator of one GPU is to ``Watch``."""

    def __init__(self, device):
        self.device, self.num_processes, self.logged = device, 1, []

    def reduce(self, row, how):
        return row

    def log(self, values, step):
        self.logged.append((step, values["loss"]))


def test_the_loss_of_a_step_is_read_when_the_next_one_is_under_way(waits, tmp_path):
    accelerator = OneProcess(waits.DEVICE)
    watch = Watch(accelerator, RunFolder(tmp_path, writes=False), Clock(steps=4, batch_size=1))
    with waits.fake_device() as gpu:
        seen = [
            watch.after(step, waits.on_device(torch.tensor(0.5 * step)), 1e-4, False, keeps=step == 3)
            for step in (1, 2, 3, 4)
        ]
        asked = watch.after(5, waits.on_device(torch.tensor(2.5)), 1e-4, True, keeps=False)
    assert not gpu.waits
    assert [[at.step for at in read] for read in seen] == [[], [1], [2, 3], []]
    assert [at.step for at in asked] == [4, 5] and watch.stopped
    assert accelerator.logged == [(step, 0.5 * step) for step in (1, 2, 3, 4, 5)]


def test_pictures_go_up_as_bytes(waits):
    with waits.fake_device() as gpu:
        pixels = to_tensor([Image.new("RGB", (8, 8), (0, 51, 255))], waits.DEVICE)
    assert not gpu.waits and gpu.brought == [torch.uint8]
    assert pixels.device.type == "cuda"
    assert pixels.inner[0, :, 0, 0].tolist() == pytest.approx([-1, -0.6, 1])


def test_a_time_of_a_noise_level_stays_on_its_device(waits):
    """ComfyUI asks for it in each call; float32 there, as not every device has float64."""
    schedule = DiscreteSchedule.stable_diffusion()
    sigma = make_sigmas("model", schedule, 50)[:-1].float()
    with waits.fake_device():
        schedule.sigma_to_t(waits.on_device(sigma))
    with waits.fake_device() as gpu:
        t = schedule.sigma_to_t(waits.on_device(sigma))
    assert not gpu.waits
    assert (t.device.type, t.dtype) == ("cuda", torch.float32)
    assert (t.inner - schedule.sigma_to_t(sigma)).abs().max() < 2e-3


def tensors(cached):
    """Two rows, of pictures or out of a cache."""
    if not cached:
        return {"pixels": torch.zeros(2, 2, 3, 64, 64, dtype=torch.uint8), "size_ids": torch.zeros(2, 6)}
    latents = {name: torch.ones(2, 4, 8, 8) for name in ("mean", "std", "condition")}
    return {**latents, "tokens": torch.ones(2, 77, 24), "size_ids": torch.zeros(2, 6)}


def test_float64_on_the_device_is_seen(waits):
    with waits.fake_device() as gpu:
        waits.on_device(torch.ones(3)).double().cpu()
    assert [name for name, _ in gpu.doubles] == ["_to_copy"]
    with waits.fake_device() as gpu:
        waits.on_device(torch.ones(3)).cpu().double()
    assert not gpu.doubles


@pytest.mark.parametrize(
    ("what", "ask"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool((x > 0).all())),
        ("nonzero", lambda x: x.nonzero()),
        ("equal", lambda x: torch.equal(x, x)),
        ("_to_copy", lambda x: x.cpu()),
        ("_to_copy", lambda x: torch.ones(3).to(x)),
        ("copy_", lambda x: x.copy_(torch.ones(3))),
        ("index", lambda x: x[x > 0]),
    ],
)
def test_what_waits_is_seen(waits, what, ask):
    """The detector itself: a number, a look, a copy."""
    with waits.fake_device() as gpu:
        ask(waits.on_device(torch.arange(3.0)))
    assert [name for name, _ in gpu.waits] == [what]


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x[[0, 1]],
        lambda x: x[torch.tensor([0, 1])],
    ],
)
def test_an_index_of_the_host_is_seen(waits, ask):
    with waits.fake_device() as gpu:
        ask(waits.on_device(torch.arange(3.0)))
    assert gpu.waits


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x + 1,
        lambda x: x[1:],
        lambda x: x.new_full((2,), 0.5),
        lambda x: torch.zeros(2, device=x.device) + x[:2],
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        lambda x: x[x.long()],
    ],
)
def test_what_does_not_wait_is_not(waits, ask):
    with waits.fake_device() as gpu:
        assert ask(waits.on_device(torch.arange(3.0))).device.type == "cuda"
    assert not gpu.waits
