"""A GPU gives what the CPU gives. IP2P_GPU_TESTS_ON=cpu runs the same without one, so that nothing here is untried."""

from __future__ import annotations

import os
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_engine import Hooks, InstructPix2Pix
from ip2p_engine.captions.edits import CaptionEdit
from ip2p_engine.clip.similarity import ClipSimilarity
from ip2p_engine.data.ledger import read_candidates
from ip2p_engine.diffusion.sampling import SAMPLERS
from ip2p_engine.factory.maker import CandidateMaker, FactoryConfig
from ip2p_engine.factory.run import Work, make_pairs
from ip2p_engine.factory.workers import LocalWorkers
from ip2p_engine.networks.conditioning import encode_text
from ip2p_engine.networks.model import load_model
from ip2p_engine.p2p.generator import PairConfig, PairGenerator, PairJob
from ip2p_engine.scenes.world import Scene, render

WHERE = os.environ.get("IP2P_GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHERE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
PICTURE = render(Scene(shape="heart", colour="red", background="sky", size="large"))
JOBS = [PairJob(caption="a red hat", edited_caption="a blue hat", seed=seed) for seed in range(2)]
MODES = [
    {},
    {"p2p_range": (0.0, 0.0)},
    {"edited_prompt_start": 0.5},
    {"mode": "replace"},
    {"mode": "refine"},
    {"mode": "refine", "local_blend": True},
    {"mode": "refine", "reweight": {"blue": 2.0}},
]


@pytest.fixture(scope="module")
def there():
    return InstructPix2Pix.load("embedded", device=WHERE, dtype=torch.float32)


def edited(editor, seeds=1, **settings):
    results = editor.edit(PICTURE, "make it snow", seeds=seeds, **{"steps": 3, **settings})
    return np.stack([np.asarray(result.image).astype(int) for result in results])


def apart(one, other):
    """The mean difference, of 255."""
    return np.abs(one - other).mean()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(editor, there, sampler):
    assert apart(edited(editor, sampler=sampler), edited(there, sampler=sampler)) <= 0.5


@pytest.mark.parametrize("guidance", [(7.5, 1.0), (2.0, 2.0), (0.0, 1.5)])
def test_every_elision(editor, there, guidance):
    settings = dict(zip(("text_cfg", "image_cfg"), guidance, strict=True))
    assert apart(edited(editor, **settings), edited(there, **settings)) <= 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_drifts_little(there, dtype):
    half = InstructPix2Pix.load("embedded", device=WHERE, dtype=dtype)
    assert apart(edited(half), edited(there)) <= 4


def test_branches_together_are_branches_one_after_another(there):
    assert apart(edited(there, together=True), edited(there, together=False)) <= 0.1


def test_a_batch_is_its_edits_alone(there):
    many = edited(there, seeds=[1, 2, 3])
    assert apart(many[1:2], edited(there, seeds=2)) <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["repeated", "max"])
def test_compiled_is_eager(there, mode):
    """Twice, after two branches, and at another size."""
    compiled = InstructPix2Pix.load("embedded", device=WHERE, dtype=torch.float32, compile=True, compile_mode=mode)
    for settings in ({}, {}, {"image_cfg": 1.0}, {"together": False}, {"size": (128, 64)}):
        assert apart(edited(compiled, **settings), edited(there, **settings)) <= 0.1


@pytest.mark.parametrize("settings", MODES)
def test_pairs(tiny_pair_model, settings):
    config = PairConfig(steps=4, **settings)
    here, other = (PairGenerator(tiny_pair_model().to(where), config).latents(JOBS).cpu() for where in ("cpu", WHERE))
    assert (here - other).abs().max() <= 1e-2


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde"])
def test_pairs_of_other_samplers(tiny_pair_model, sampler):
    config = PairConfig(steps=4, sampler=sampler)
    here, other = (PairGenerator(tiny_pair_model().to(where), config).latents(JOBS).cpu() for where in ("cpu", WHERE))
    assert (here - other).abs().max() <= 1e-2


def test_a_model_is_loaded_onto_the_device():
    model = load_model("embedded", device=WHERE)
    assert {weight.device.type for weight in model.unet.parameters()} == {torch.device(WHERE).type}


def test_texts(editor, there):
    here, other = (encode_text(e.model, ["make it snow", ""]).tokens.cpu() for e in (editor, there))
    assert (here - other).abs().max() <= 1e-3


def test_scores_of_clip():
    """On CUDA by products of half precision."""
    pictures = [
        render(Scene(shape="heart", colour=colour, background="sky", size="large")) for colour in ("red", "blue")
    ]
    captions = ["a large red heart on a sky background", "a large blue heart on a sky background"]
    here, other = (
        asdict(
            ClipSimilarity.load("embedded", device=where).score(
                pictures[:1], pictures[1:], *([one] for one in captions)
            )[0]
        )
        for where in ("cpu", WHERE)
    )
    assert other == pytest.approx(here, abs=5e-3)


def test_the_autoencoder_is_finite_in_half_precision(editor):
    half = InstructPix2Pix.load("embedded", device=WHERE, dtype=torch.float16)
    latents = editor.edit(PICTURE, "make it snow", steps=2)[0].latent[None]
    here, other = (np.asarray(e.pictures(latents.to(e.model.device))[0]).astype(int) for e in (editor, half))
    assert apart(here, other) <= 1


def test_many_latents_are_decoded_in_parts(there):
    """A part's pictures are those of the whole."""
    latents = torch.randn(6, 4, 8, 8, device=WHERE)
    alone = [there.pictures(one[None])[0] for one in latents]
    for one, other in zip(there.pictures(latents), alone, strict=True):
        assert apart(np.asarray(one).astype(int), np.asarray(other).astype(int)) <= 0.1


def test_pairs_of_the_factory(tiny_pair_model, tmp_path):
    """Finished beside the walks on a GPU, in the order and with the scores of a CPU."""
    edits = [
        CaptionEdit(caption=f"a {a} hat", instruction="paint it", edited_caption="a blue hat") for a in ("red", "old")
    ]
    found = []
    for where in ("cpu", WHERE):
        generator = PairGenerator(tiny_pair_model().to(where), PairConfig(steps=2))
        config = FactoryConfig(candidates=2, clip="embedded", filter=None)
        maker = CandidateMaker(generator, ClipSimilarity.load("embedded", device=where), config)
        make_pairs(edits, tmp_path / f"on {where}", LocalWorkers(maker), work=Work(batch_pairs=2))
        found.append(list(read_candidates(tmp_path / f"on {where}")))
    for here, other in zip(*found, strict=True):
        assert (here.caption, here.seeds) == (other.caption, other.seeds)
        for one, two in zip(here.scores, other.scores, strict=True):
            assert asdict(two) == pytest.approx(asdict(one), abs=2e-2)


@pytest.mark.skipif(WHERE == "cpu", reason="only CUDA tells")
def test_no_step_waits(there):
    """What tests/engine/test_waits.py counts, as CUDA sees it."""

    def stop_waiting(step, steps, x, sigma, denoised):
        torch.cuda.set_sync_debug_mode("error" if step < steps - 1 else "default")

    try:
        there.edit(Image.new("RGB", (64, 64)), "make it snow", steps=4, hooks=Hooks(on_step=stop_waiting))
    finally:
        torch.cuda.set_sync_debug_mode("default")
