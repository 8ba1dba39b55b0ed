"""The loop that makes and scores: the original's CLIP numbers, the engine's own pictures, and resuming."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ip2p_engine.clip.similarity import ClipSimilarity
from ip2p_engine.data.store import PairRecord, PairWriter
from ip2p_engine.diffusion.noise import SampleNoise
from ip2p_engine.diffusion.schedule import make_sigmas
from ip2p_engine.errors import ConfigError, DatasetError
from ip2p_engine.evaluate.curve import claims, curve_points, trade_off_plot
from ip2p_engine.evaluate.measure import measure
from ip2p_engine.evaluate.methods import CopyInput, InstructionEdit, PromptToPrompt, RoundTrip, SDEdit, Setting, Target
from ip2p_engine.evaluate.run_folder import ROWS
from ip2p_engine.evaluate.samples import Sample, StoreSamples, batches, in_test_split
from ip2p_engine.evaluate.trade_off import points_table
from ip2p_engine.images import to_tensor
from ip2p_engine.networks.conditioning import encode_image, encode_text
from ip2p_engine.networks.denoiser import denoised_from, input_scale
from ip2p_engine.networks.model import load_model
from ip2p_engine.scenes.exam import scene_samples

E_JSON = json.loads((Path(__file__).parents[1] / "data" / "reference" / "E.json").read_text())
NUMBERS = ("sim_0", "sim_1", "sim_direction", "sim_image")


@pytest.fixture(scope="module")
def clip():
    return ClipSimilarity.load("embedded")


@pytest.fixture(scope="module")
def painter():
    return load_model("embedded-sd", dtype=torch.float32)


@pytest.fixture(scope="module")
def scenes():
    return scene_samples(3)


@pytest.fixture(scope="module")
def reference_clip(reference_weights, tmp_path_factory):
    """The tiny CLIP that the original scored with."""
    folder, shape = tmp_path_factory.mktemp("clip"), E_JSON["info"]["config"]
    config = {
        "embed_dim": shape["embed_dim"],
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 64, "layers": 2, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        "preprocess_cfg": {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD},
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = {k: torch.from_numpy(reference_weights.make("tiny|clip", k, s)) for k, s in E_JSON["keys"].items()}
    save_file(state, folder / "model.safetensors")
    return ClipSimilarity.load(folder)


def test_rows_hold_the_original_s_numbers_of_pictures_in_0_to_1(reference_clip, reference):
    """Not those of its evaluation script, which feeds [-1, 1]: image 0.797 instead of 0.619."""
    pictures = [Image.fromarray(reference[k].numpy()) for k in ("image_u8", "ema/run_s10_t7.5_i1.5/image_u8")]
    info = E_JSON["info"]["edit"]
    texts = {"instruction": "-", "caption": info["text_0"], "edited_caption": info["text_1"]}
    sample = Sample(key="edit", source=pictures[0], target=pictures[1], seed=0, **texts)
    (row,) = measure([sample], [Target("target")], reference_clip, resolution=128)
    for name in NUMBERS:
        assert row[name] == pytest.approx(info[name], abs=1e-5)
    assert abs(row["sim_image"] - E_JSON["info"]["edit_pm1_inputs"]["sim_image"]) > 0.1


def edits(editor, text_cfgs=(4.0,), image_cfgs=(1.5,), steps=1):
    grid = {"text_cfgs": text_cfgs, "image_cfgs": image_cfgs, "steps": steps}
    return InstructionEdit(editor, label="edit", **grid)


@pytest.mark.parametrize(("s_t", "s_i", "steps"), [(4.0, 1.5, 2), (7.5, 1.0, 1)])
def test_edits_are_the_engine_s_own(editor, scenes, s_t, s_i, steps):
    samples = scenes[0]
    method = edits(editor, (s_t,), (s_i,), steps)
    made = method.make(samples, method.prepare(samples), method.settings[0]).edited
    expected = editor.edit_each(
        [one.source for one in samples],
        [one.instruction for one in samples],
        seeds=[one.seed for one in samples],
        text_cfg=s_t,
        image_cfg=s_i,
        steps=steps,
    )
    for image, result in zip(made, expected, strict=True):  # encoding in another batch moves a value by a level
        assert np.abs(np.asarray(image, float) - np.asarray(result.image, float)).max() <= 2


def test_a_picture_and_a_text_are_encoded_once_for_all_settings(editor, scenes, monkeypatch):
    seen = []
    network = editor.model.autoencoder
    original = network.encode
    monkeypatch.setattr(network, "encode", lambda x: seen.append(len(x)) or original(x))
    method = edits(editor, (1.0, 4.0), (1.0, 1.5, 2.0))
    measure([scenes[0][0]] * 1, [method], ClipSimilarity.load("embedded"), resolution=64)
    assert seen == [1]
    method.prepare([scenes[0][0]] * 5)
    assert seen == [1, 1]


def test_a_step_of_sdedit_by_hand(painter, scenes):
    """Noise of the last level, then one step to zero is the guided prediction itself: u + w (c - u)."""
    sample, steps, w = scenes[0][0], 20, 7.5
    method = SDEdit(painter, name="sd", strengths=[1 / steps], texts=["edited_caption"], cfg=w, steps=steps)
    made = method.make([sample], method.prepare([sample]), method.settings[0]).edited[0]
    sigma = float(make_sigmas("model", painter.schedule, steps)[-2])
    with torch.no_grad():
        clean = encode_image(painter, to_tensor([sample.source])) * painter.spec.latent_scale
        x = clean + sigma * SampleNoise([sample.seed]).draw(clean)
        texts = encode_text(painter, ["", sample.edited_caption]).tokens
        inputs = (x * input_scale(sigma)).repeat(2, 1, 1, 1)
        u, c = painter.unet(inputs, painter.timestep(sigma).expand(2), encoder_hidden_states=texts).sample.split(1)
        z = denoised_from(painter.spec.prediction, x, sigma, u + w * (c - u)) / painter.spec.latent_scale
        expected = ((painter.autoencoder.decode(z).sample.clamp(-1, 1) + 1) * 127.5).round()[0].permute(1, 2, 0)
    assert np.abs(np.asarray(made, float) - expected.numpy()).max() <= 1


def test_sdedit_s_two_texts_and_all_strengths_are_curves(painter):
    method = SDEdit(painter, name="sd", strengths=[0.3, 0.9])
    assert [(s.curve, s.values["strength"]) for s in method.settings] == [
        (curve, strength) for curve in ("SDEdit, output caption", "SDEdit, instruction") for strength in (0.3, 0.9)
    ]


@pytest.mark.parametrize("strength", [0, 0.02, 1.05, -1, float("nan"), float("inf")])
def test_strengths_that_walk_no_step_or_too_many(painter, strength):
    with pytest.raises(ConfigError, match="strength"):
        SDEdit(painter, name="sd", strengths=[strength], steps=20)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"sampler": "eular"}, "sampler 'eular' is unknown"),
        ({"text_cfgs": [float("nan")]}, "text_cfg is nan"),
        ({"image_cfgs": [-1.0]}, "image_cfg is -1"),
    ],
)
def test_settings_that_no_edit_can_have(editor, wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        InstructionEdit(editor, label="e", **{"text_cfgs": [4.0], "image_cfgs": [1.5], **wrong})


def test_a_value_given_twice_is_swept_once(editor, painter):
    assert len(edits(editor, (4.0, 4.0), (1.5, 1.5)).settings) == 1
    assert len(SDEdit(painter, name="sd", strengths=[0.5, 0.5]).settings) == 2  # a curve each text


@pytest.mark.parametrize("strength", [0.05, 1.0])
def test_strengths_at_both_ends(painter, scenes, strength):
    method = SDEdit(painter, name="sd", strengths=[strength], texts=["instruction"], steps=20)
    assert method._walked(strength) == {0.05: 1, 1.0: 20}[strength]


@pytest.mark.slow
def test_baselines_that_need_no_sampling(editor, scenes, clip):
    samples, judge = scenes
    methods = [CopyInput(), Target("truth"), RoundTrip(editor.model, name="embedded")]
    rows = measure(samples, methods, clip, resolution=64, judge=judge)
    by_curve = {
        name: [row for row in rows if row["curve"] == name] for name in ("copy the input", "truth", "autoencoder")
    }
    for row in by_curve["copy the input"]:
        assert row["sim_image"] == pytest.approx(1, abs=1e-6) and row["sim_direction"] == 0
        assert not row["judged"]["success"] and row["judged"]["changed"] == []
    for row in by_curve["truth"]:
        assert row["judged"]["success"] and row["judged"]["psnr"] == 99
    for row in by_curve["autoencoder"]:
        assert row["judged"]["success"] and 25 < row["judged"]["psnr"] < 60


def test_prompt_to_prompt_is_scored_against_its_own_source(painter, scenes, clip):
    method = PromptToPrompt(painter, name="sd", steps=1)
    made = method.make(scenes[0][:1], method.prepare(scenes[0][:1]), method.settings[0])
    (row,) = measure(scenes[0][:1], [method], clip, resolution=64)
    texts = [scenes[0][0].caption], [scenes[0][0].edited_caption]
    (expected,) = clip.score(made.sources, made.edited, *texts)
    assert row["sim_image"] == pytest.approx(expected.sim_image, abs=1e-6)


class Counting(CopyInput):
    """Copies the input at two settings, and counts how often."""

    settings = tuple(Setting(curve="copy", values={"strength": value}) for value in (0.1, 0.2))

    def __init__(self, stop_after=99):
        self.made, self._left = 0, stop_after

    def describe(self, setting):
        return {"method": "copy", **setting.values}

    def make(self, samples, prepared, setting):
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        self.made += len(samples)
        return super().make(samples, prepared, setting)


def run(samples, clip, folder, method, batch=2):
    return measure(samples, [method], clip, resolution=64, folder=folder, batch=batch)


def test_a_stopped_run_goes_on_and_ends_like_one_that_was_not(scenes, clip, tmp_path):
    undisturbed = run(scenes[0], clip, tmp_path / "one", Counting())
    with pytest.raises(KeyboardInterrupt):
        run(scenes[0], clip, tmp_path / "two", Counting(stop_after=3))
    path = tmp_path / "two" / ROWS
    assert len(path.read_text().splitlines()) == 5  # two settings of a batch of two, one of the last sample
    path.write_bytes(path.read_bytes() + b'{"half": ')
    again = Counting()
    assert run(scenes[0], clip, tmp_path / "two", again) == undisturbed and again.made == 1
    assert path.read_text() == (tmp_path / "one" / ROWS).read_text()
    idle = Counting()
    assert run(scenes[0], clip, tmp_path / "two", idle) == undisturbed and idle.made == 0


def test_only_samples_that_are_not_known_are_made(scenes, clip, tmp_path):
    run(scenes[0][:1], clip, tmp_path, Counting(), batch=2)
    more = Counting()
    rows = run(scenes[0], clip, tmp_path, more, batch=3)
    assert more.made == 2 * 2 and len((tmp_path / ROWS).read_text().splitlines()) == len(rows) == 6
    for row, other in zip(rows, run(scenes[0], clip, None, Counting(), batch=3), strict=True):
        assert {**row, "sim_image": 0, "sim_0": 0, "sim_1": 0} == {**other, "sim_image": 0, "sim_0": 0, "sim_1": 0}
        assert [row[name] for name in NUMBERS] == pytest.approx([other[name] for name in NUMBERS], abs=1e-5)


def test_rows_do_not_depend_on_the_batch(editor, scenes, clip):
    one, all_at_once = (measure(scenes[0], [edits(editor)], clip, resolution=64, batch=size) for size in (1, 3))
    for row, other in zip(one, all_at_once, strict=True):
        assert row["sample"] == other["sample"] and row["sim_image"] == pytest.approx(other["sim_image"], abs=1e-3)


def test_another_picture_or_seed_is_another_row(scenes, clip, tmp_path):
    sample = scenes[0][0]
    changed = [Sample(**{**vars(sample), "seed": 99}), Sample(**{**vars(sample), "source": scenes[0][1].source})]
    method = Counting()
    for samples in ([sample], changed[:1], changed[1:], [sample]):
        assert len(run(samples, clip, tmp_path, method)) == 2
    assert method.made == 6


def test_another_target_is_another_row(scenes, clip, tmp_path):
    sample = scenes[0][0]
    changed = Sample(**{**vars(sample), "target": scenes[0][1].target})
    before, after = (measure([one], [Target("t")], clip, resolution=64, folder=tmp_path) for one in (sample, changed))
    assert before[0]["target"] != after[0]["target"] and before[0]["sim_image"] != after[0]["sim_image"]


def test_a_checkpoint_that_changed_is_measured_anew(editor, scenes, clip, tmp_path):
    before = edits(editor).describe(Setting(curve="edit", values={}))
    weight = editor.model.unet.conv_out.bias
    was = weight.detach().clone()
    with torch.no_grad():
        weight += 1e-3
        after = edits(editor).describe(Setting(curve="edit", values={}))
        weight.copy_(was)  # to the bit: other tests share the editor
    assert before["fingerprint"] != after["fingerprint"]
    assert {**before, "fingerprint": ""} == {**after, "fingerprint": ""}


def test_a_second_writer_is_refused(scenes, clip, tmp_path):
    class Meddling(Counting):
        def make(self, samples, prepared, setting):
            with pytest.raises(DatasetError, match="being written by another evaluation"):
                run(scenes[0], clip, tmp_path, Counting())
            return super().make(samples, prepared, setting)

    run(scenes[0][:1], clip, tmp_path, Meddling())


def test_a_row_holds_all_that_repeats_it(editor, scenes, clip):
    (row,) = measure(scenes[0][:1], [edits(editor)], clip, resolution=64)
    sample = scenes[0][0]
    assert json.loads(json.dumps(row)) == row
    assert row["size"] == [64, 64] and row["seed"] == sample.seed and row["instruction"] == sample.instruction
    assert {"checkpoint", "fingerprint", "clip", "steps", "sampler", "schedule", "text_cfg", "image_cfg"} <= set(row)


def test_nothing_to_measure(scenes, clip):
    for samples, methods, batch in (([], [CopyInput()], 1), (scenes[0], [], 1), (scenes[0], [CopyInput()], 0)):
        with pytest.raises(ConfigError, match="at least one of each"):
            measure(samples, methods, clip, resolution=64, batch=batch)
    with pytest.raises(ConfigError, match="no target"):
        bare = Sample(**{**vars(scenes[0][0]), "target": None})
        measure([bare], [Target("truth")], clip, resolution=64)


def picture(size=(64, 64), level=0):
    stream = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two hundred pairs, two of each caption."""
    folder = tmp_path_factory.mktemp("store")
    with PairWriter(folder, manifest={}) as writer:
        for n in range(200):
            texts = {"edit_prompt": "e", "original_prompt": f"caption {n // 2}", "edited_prompt": "after"}
            pictures = {"original_image": picture(), "edited_image": picture(level=9)}
            writer.write(PairRecord(**pictures, **texts, seed=n, p=None, cfg=None, key=f"{n}"))
    return folder


def test_one_caption_in_twenty_is_for_testing(store):
    tested = [f"caption {n}" for n in range(100) if zlib.crc32(f"caption {n}".encode()) % 100 < 5]
    assert 1 <= len(tested) <= 12
    assert [one.caption for one in StoreSamples(store)] == [text for text in tested for _ in range(2)]
    assert sum(in_test_split(f"a photo of {n}") for n in range(20_000)) == pytest.approx(1000, abs=100)
    assert in_test_split(" caption 1 ") == in_test_split("caption 1")
    assert not in_test_split(" ")


def test_samples_are_spread_and_seeded(store):
    samples = StoreSamples(store, split="all", count=4, seed=7)
    assert [(one.key, one.seed) for one in samples] == [("0", 7), ("50", 8), ("100", 9), ("150", 10)]
    assert samples[-1].seed == 10 and [one.key for one in samples[1:3]] == ["50", "100"]
    assert samples[0].target.getpixel((0, 0)) == (9, 0, 0)
    assert len(StoreSamples(store, split="all", count=999)) == 200
    for count in (0, -3):
        with pytest.raises(ConfigError, match=f"^{count} samples were asked for"):
            StoreSamples(store, count=count)


def test_samples_without_captions_have_no_direction(tmp_path, clip):
    """Nor have those with equal ones: as 0.000 they would pull the mean."""
    captions = [("before", "after"), ("before", ""), ("same", "same "), ("", "")]
    with PairWriter(tmp_path, manifest={}) as writer:
        for n, (before, after) in enumerate(captions):
            texts = {"edit_prompt": "e", "original_prompt": before, "edited_prompt": after}
            pictures = {"original_image": picture(level=n), "edited_image": picture(level=9 * n + 5)}
            writer.write(PairRecord(**pictures, **texts, seed=n, p=None, cfg=None, key=f"{n}"))
    samples = StoreSamples(tmp_path, split="all")
    assert samples.captioned == 2 and [one.has_direction for one in samples] == [True, False, False, False]
    rows = measure(samples, [Target("true")], clip, resolution=64)
    known = [[row[name] is not None for name in ("sim_0", "sim_1", "sim_direction", "sim_image")] for row in rows]
    assert known == [[True] * 4, [True, False, False, True], [True, True, False, True], [False, False, False, True]]
    (point,) = curve_points(rows)
    assert point.means["sim_direction"] == rows[0]["sim_direction"] and (point.count, point.directed) == (4, 1)
    assert point.means["sim_image"] == pytest.approx(sum(row["sim_image"] for row in rows) / 4)
    assert point.means["sim_1"] == pytest.approx((rows[0]["sim_1"] + rows[2]["sim_1"]) / 2)
    assert "3 of 4 samples have equal captions or none" in points_table([point]).note
    old = [{**row, "sim_direction": 0.0} for row in rows]  # as 0.1 wrote them, where captions are equal
    assert curve_points(old[:1] + old[2:3])[0].directed == 1
    (bare,) = curve_points(rows[3:])
    assert list(bare.means) == ["sim_image"] and list(points_table([bare]).columns) == [
        "curve",
        "setting",
        "n",
        "sim_image",
    ]
    with pytest.raises(ConfigError, match="no direction to plot"):
        trade_off_plot([bare])


def test_claims_without_a_direction_are_of_image_similarity_alone():
    rows = [
        {"curve": "a", "image_cfg": s_i, "sample": str(n), "caption": "", "edited_caption": "", "sim_direction": None}
        | {"sim_image": s_i + n, "sim_0": None, "sim_1": None}
        for s_i in (1.0, 2.0)
        for n in range(3)
    ]
    (found,) = claims(rows, "a", [])
    assert found.holds and found.sentence.startswith("image similarity rises")


def test_splits_that_are_not_there(store, tmp_path):
    with pytest.raises(DatasetError, match="has one split, train, not validation"):
        StoreSamples(store, split="validation")
    caption = next(f"c {n}" for n in range(100) if not in_test_split(f"c {n}"))
    with PairWriter(tmp_path, manifest={}) as writer:
        texts = {"edit_prompt": "e", "original_prompt": caption, "edited_prompt": "a"}
        pictures = {"original_image": picture(), "edited_image": picture()}
        writer.write(PairRecord(**pictures, **texts, seed=0, p=None, cfg=None, key="0"))
    with pytest.raises(DatasetError, match=r"no pairs in its test split \(1 in all\)"):
        StoreSamples(tmp_path)


def test_batches_have_one_size_and_lose_nothing():
    texts = {"instruction": "i", "caption": "c", "edited_caption": "e", "seed": 0}
    sizes = [(64, 64), (200, 100), (64, 64), (100, 200), (200, 100)]
    samples = [Sample(key=f"{n}", source=Image.new("RGB", size), **texts) for n, size in enumerate(sizes)]
    groups = [[one.key for one in group] for group in batches(samples, 3, 64)]
    assert groups == [["0", "2"], ["1"], ["3"], ["4"]]
    assert all(side % 64 == 0 for group in batches(samples, 3, 64) for one in group for side in one.source.size)
