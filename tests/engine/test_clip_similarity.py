"""The four CLIP numbers: the original's values, the range of the pictures, and one encoding a caption."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ip2p_engine.clip.similarity import DEFAULT_CLIP, ClipSimilarity, clip_input, pair_scores
from ip2p_engine.errors import CheckpointError, ImageError
from ip2p_engine.images import to_images, unit_pixels
from ip2p_engine.scenes.recipe.clip_stage import CLIP_MEAN, CLIP_STD, clip_config_json, make_clip
from ip2p_engine.tokenizer import tokenize

DATA = Path(__file__).parents[1] / "data" / "reference"
REFERENCE = json.loads((DATA / "E.json").read_text())
INFO = REFERENCE["info"]
MEASURES = ("sim_0", "sim_1", "sim_direction", "sim_image")
OPENAI_MEAN, OPENAI_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


@pytest.fixture(scope="module")
def openai_folder(reference_weights, tmp_path_factory):
    """The reference's tiny OpenAI CLIP, saved in our folder layout: the names of its tensors are open_clip's."""
    folder = tmp_path_factory.mktemp("clip")
    shape = INFO["config"]
    config = {
        "embed_dim": shape["embed_dim"],
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 64, "layers": 2, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        "preprocess_cfg": {"mean": OPENAI_MEAN, "std": OPENAI_STD},
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = {k: torch.from_numpy(reference_weights.make("tiny|clip", k, s)) for k, s in REFERENCE["keys"].items()}
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def clip(openai_folder):
    return ClipSimilarity.load(openai_folder)


@pytest.fixture(scope="module")
def expected():
    return load_file(DATA / "E_clip.safetensors")


@pytest.fixture(scope="module")
def pictures(reference, pairs_reference, expected):
    """The three pairs that the original scored, in [0, 1]."""

    def unit(pixels):
        return pixels.permute(0, 3, 1, 2).float() / 255

    big = unit(expected["big_u8"][None])
    edited = reference["ema/run_s10_t7.5_i1.5/image_u8"]
    pair = unit(pairs_reference["p2p0.3_cpu_order/image_u8"])
    return {
        "edit": (unit(reference["image_u8"][None]), unit(edited[None])),
        "p2p": (pair[:1], pair[1:]),
        "down": (big, 1 - big),
    }


def texts(name):
    return [INFO[name]["text_0"]], [INFO[name]["text_1"]]


@pytest.mark.parametrize("name", ["edit", "p2p", "down"])
def test_the_original_s_numbers(clip, expected, pictures, name):
    images = clip.image_features(torch.cat(pictures[name]))
    captions = clip.text_features([INFO[name]["text_0"], INFO[name]["text_1"]])
    assert (torch.cat([images, captions]) - expected[f"{name}/features"]).abs().max() < 1e-5
    (scores,) = clip.score(*pictures[name], *texts(name))
    for measure in MEASURES:
        assert getattr(scores, measure) == pytest.approx(INFO[name][measure], abs=1e-5)


def test_the_resize_is_the_original_s(expected, pictures):
    """Bicubic without antialiasing or clamping: the values leave [0, 1]."""
    resized = clip_input(pictures["down"][0], 224, (0.0,) * 3, (1.0,) * 3)
    assert (resized[0, :, 100] - expected["down/resized_0_row100"]).abs().max() < 1e-5
    assert float(resized.min()) == pytest.approx(INFO["down"]["resized_min"], abs=1e-5)
    assert float(resized.max()) == pytest.approx(INFO["down"]["resized_max"], abs=1e-5) and resized.max() > 1


def test_pictures_between_minus_one_and_one_are_refused(clip, pictures):
    source, edited = pictures["edit"]
    for wrong in (2 * source - 1, source - 1e-3, source * 1.01, source * math.nan, 255 * source):
        with pytest.raises(ImageError, match=r"values from .* give \[0, 1\]"):
            clip.score(wrong, edited, *texts("edit"))


def test_they_would_give_the_other_numbers_of_the_original_s_evaluation(openai_folder, clip, pictures):
    """Its compute_metrics fed [-1, 1]: the same as [0, 1] with another mean and deviation."""
    mean, std = [(m + 1) / 2 for m in OPENAI_MEAN], [s / 2 for s in OPENAI_STD]
    fed_wrong = ClipSimilarity(clip._network, size=224, mean=mean, std=std)
    (scores,) = fed_wrong.score(*pictures["edit"], *texts("edit"))
    for measure in MEASURES:
        assert getattr(scores, measure) == pytest.approx(INFO["edit_pm1_inputs"][measure], abs=1e-5)
    assert abs(scores.sim_image - INFO["edit"]["sim_image"]) > 0.1


def test_the_direction_by_hand():
    def unit(*values):
        return torch.tensor([values]) / torch.tensor(values).norm()

    (scores,) = pair_scores(unit(1.0, 0.0), unit(0.0, 1.0), unit(1.0, 0.0), unit(0.0, 1.0))
    assert (scores.sim_0, scores.sim_1, scores.sim_image) == (1, 1, 0)
    assert scores.sim_direction == pytest.approx(1)
    (scores,) = pair_scores(unit(1.0, 0.0), unit(0.0, 1.0), unit(0.0, 1.0), unit(1.0, 0.0))
    assert scores.sim_direction == pytest.approx(-1)


def test_equal_pictures_and_swapped_pictures(clip, pictures):
    source, edited = pictures["edit"]
    (same,) = clip.score(source, source, *texts("edit"))
    assert same.sim_image == pytest.approx(1, abs=1e-6) and same.sim_direction == 0
    (forth,), (back,) = clip.score(source, edited, *texts("edit")), clip.score(edited, source, *texts("edit"))
    assert forth.sim_direction == pytest.approx(-back.sim_direction, abs=1e-6)


def noise_pictures(count, size=(40, 30), seed=0):
    draw = np.random.RandomState(seed)
    return [Image.fromarray(draw.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def test_a_batch_equals_singles_and_sizes_may_differ(clip, monkeypatch):
    monkeypatch.setattr("ip2p_engine.clip.similarity.IMAGES_AT_ONCE", 2)
    images = [*noise_pictures(3), *noise_pictures(3, (64, 64)), *noise_pictures(1, seed=5)]
    together = clip.image_features(images)
    for image, feature in zip(images, together, strict=True):
        assert (clip.image_features([image])[0] - feature).abs().max() < 1e-5
    assert (together[0] - together[3]).abs().max() > 1e-3
    assert (clip.image_features(unit_pixels(images[:3])) - together[:3]).abs().max() < 1e-5


def test_a_caption_is_encoded_once(clip, monkeypatch):
    encoded = []
    original = clip._network.encode_text
    monkeypatch.setattr(clip._network, "encode_text", lambda tokens: encoded.append(len(tokens)) or original(tokens))
    first = clip.text_features(["one cat", "two cats", "one cat"])
    again = clip.text_features(["two cats", "three cats"])
    assert encoded == [2, 1]
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], again[0])
    monkeypatch.setattr("ip2p_engine.clip.similarity.REMEMBERED_CAPTIONS", 1)
    clip.text_features(["four cats", "five cats"])
    clip.text_features(["five cats"])
    clip.text_features(["four cats"])
    assert encoded == [2, 1, 2, 1]


def test_long_captions_are_cut(clip):
    long = "word " * 90
    assert torch.equal(clip.text_features([long]), clip.text_features([long + "and more"]))


def test_open_clip_cuts_texts_like_us():
    captions = ["a photo of a “caf\u00e9” & more", "", "word " * 100, "AT NIGHT!"]
    assert torch.equal(open_clip.get_tokenizer("ViT-L-14")(captions), tokenize(captions, pad=0))


@pytest.mark.slow
def test_the_tokenizer_is_no_version_of_transformers():
    """ComfyUI asks for 4.50 or newer, and the class that 5 has there takes other arguments."""
    code = (
        "import sys; sys.modules['transformers'] = None; from ip2p_engine.tokenizer import tokenize; "
        "print(*tokenize(['make it snow'])[0, :5].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["49406", "1078", "585", "2583", "49407"]


def test_the_embedded_layout(tmp_path, monkeypatch):
    """A folder as the scenes' training exports it, half precision, with its own mean and deviation."""
    torch.manual_seed(0)
    network = make_clip()
    (tmp_path / "config.json").write_text(json.dumps(clip_config_json()))
    save_file(
        {name: value.half().contiguous() for name, value in network.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    monkeypatch.setattr("ip2p_engine.clip.similarity.EMBEDDED_CLIP", tmp_path)
    clip = ClipSimilarity.load("embedded")
    images = noise_pictures(2, (64, 64))
    inputs = (unit_pixels(images) - CLIP_MEAN[0]) / CLIP_STD[0]
    with torch.no_grad():
        expected = network.eval().encode_image(inputs, normalize=True)
    assert (clip.image_features(images) - expected).abs().max() < 2e-3
    (scores,) = clip.score(images[:1], images[1:], ["a red heart"], ["a blue star"])
    assert all(-1 <= getattr(scores, measure) <= 1 for measure in MEASURES)


def test_scores_of_the_engine_s_pictures(clip):
    images = to_images(torch.rand(2, 3, 32, 32) * 2 - 1)
    (scores,) = clip.score(images[:1], images[1:], ["a"], ["b"])
    assert scores.sim_image < 1


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("ViT-L-14", "no CLIP 'ViT-L-14'; give architecture/weights like ViT-L-14/openai; choose one of openai"),
        ("ViT-L-14/nobody", "choose one of openai"),
        ("clip.safetensors", "open_clip.list_pretrained"),
    ],
)
def test_models_that_do_not_exist(source, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        ClipSimilarity.load(source)


def test_the_default_is_known_to_open_clip():
    architecture, _, weights = DEFAULT_CLIP.partition("/")
    assert open_clip.get_pretrained_cfg(architecture, weights)["quick_gelu"]


def test_broken_folders(tmp_path, openai_folder):
    def refused(sentence):
        with pytest.raises(CheckpointError, match=f"is no CLIP that can be loaded .*{sentence}"):
            ClipSimilarity.load(tmp_path)

    refused("config.json")
    (tmp_path / "config.json").write_text("{")
    refused("JSONDecodeError")
    (tmp_path / "config.json").write_text("{}")
    refused("preprocess_cfg")
    (tmp_path / "config.json").write_bytes((openai_folder / "config.json").read_bytes())
    refused("model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    refused("Error")
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "model.safetensors")
    refused("it has 4 layers and 1 tensors")


def test_pictures_that_clip_cannot_take(clip):
    with pytest.raises(ImageError, match="shape"):
        clip.image_features(torch.rand(1, 4, 8, 8))
    with pytest.raises(ImageError, match="L"):
        clip.image_features([Image.new("L", (8, 8))])


def test_files_are_scored_as_pictures_are(tmp_path):
    scorer = ClipSimilarity.load("embedded", device="cpu")
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    for n, picture in enumerate(pictures):
        picture.save(tmp_path / f"{n}.png")
    files = [tmp_path / "0.png", (tmp_path / "1.png").read_bytes()]
    assert torch.equal(scorer.image_features(files), scorer.image_features(pictures))
