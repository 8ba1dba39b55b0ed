"""Numbers of edited pictures: formulas, other libraries' values, and the benchmarks' own transforms."""

from __future__ import annotations

import json
import math
from urllib.error import URLError

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from torchvision import transforms

from ip2p_engine.clip.similarity import ClipSimilarity
from ip2p_engine.errors import CheckpointError, ConfigError, DatasetError, ImageError
from ip2p_engine.evaluate import metrics
from ip2p_engine.evaluate.metrics import (
    Dino,
    Lpips,
    background,
    centre,
    clip_features,
    distances,
    evaluate_extra,
    mean_difference,
)
from ip2p_engine.evaluate.pairs import EditedPicture, measure_picture, measure_table, pair_tables, read_table


def noise(size=(48, 40), seed=0):
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def flat(level, size=(48, 40)):
    return Image.new("RGB", size, (level,) * 3)


@pytest.fixture(scope="module")
def clip():
    return ClipSimilarity.load("embedded")


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """A ViT of DINO's kind, untrained: its published weights cannot be part of a test."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    config = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, patch_size=32)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_distances_of_flat_pictures():
    found = distances(flat(51), flat(102))
    assert found["l1"] == pytest.approx(0.2) and found["l2"] == pytest.approx(0.04)
    assert found["psnr"] == pytest.approx(-10 * math.log10(0.04))
    assert distances(flat(9), flat(9)) == {"l1": 0, "l2": 0, "psnr": math.inf, "ssim": pytest.approx(1, abs=1e-5)}


def test_ssim_is_skimage_s():
    a, b = noise(), noise(seed=1)
    blend = Image.blend(a, b, 0.3)
    kinds = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 255,
        "channel_axis": 2,
    }
    expected = structural_similarity(np.asarray(a), np.asarray(blend), **kinds)
    assert distances(a, blend)["ssim"] == pytest.approx(expected, abs=1e-3)


def test_an_edit_of_another_size_is_brought_to_the_target_s():
    edited, target = noise((96, 80)), noise(seed=1)
    by_hand = np.asarray(edited.resize(target.size, Image.Resampling.BICUBIC), float) - np.asarray(target, float)
    assert distances(edited, target)["l1"] == pytest.approx(np.abs(by_hand).mean() / 255, abs=1e-6)


def test_large_pictures_are_compared_in_bands(monkeypatch):
    """SSIM of a hundred megapixels at once would take 31 GB; bands see the same windows."""
    a, b, mask = noise((64, 300)), noise((64, 300), seed=1), Image.new("L", (64, 300), 255)
    mask.paste(0, (10, 0, 30, 170))
    whole = distances(a, b), background(a, b, mask), mean_difference(a, b)
    for pixels in (1, 64 * 7, 64 * 299):
        monkeypatch.setattr(metrics, "BAND_PIXELS", pixels)
        assert distances(a, b) == pytest.approx(whole[0], abs=1e-6)
        assert background(a, b, mask) == pytest.approx(whole[1], abs=1e-6)
        assert mean_difference(a, b) == pytest.approx(whole[2], abs=1e-9) == distances(a, b)["l1"]


def half_mask(level=255):
    """White on the left half."""
    mask = Image.new("L", (48, 40), 0)
    mask.paste(level, (0, 0, 24, 40))
    return mask


def test_only_what_lies_outside_the_mask_counts():
    source = noise()
    inside, outside = source.copy(), source.copy()
    inside.paste((0, 0, 0), (0, 0, 24, 40))
    outside.paste((0, 0, 0), (24, 0, 48, 40))
    kept = background(source, inside, half_mask())
    assert kept["background_l2"] == 0 and kept["background_psnr"] == math.inf
    by_hand = (np.asarray(source, float)[:, 24:] ** 2).mean() / 255**2
    lost = background(source, outside, half_mask())
    assert lost["background_l2"] == pytest.approx(by_hand) and lost["background_ssim"] < 0.2


def test_both_sides_of_the_mask_s_threshold():
    edited = noise(seed=1)
    assert background(noise(), edited, half_mask(128)) == background(noise(), edited, half_mask(255))
    assert background(noise(), edited, half_mask(127)) == background(noise(), edited, half_mask(0))
    with pytest.raises(ImageError, match="white everywhere"):
        background(noise(), edited, Image.new("L", (48, 40), 128))


def test_the_transforms_are_the_benchmarks_own(clip):
    """CLIP's published preprocessing, and DINO's as MagicBrush writes it."""
    picture = noise((90, 60))
    mean, std = clip._mean, clip._std
    published = open_clip.image_transform(clip.size, is_train=False, mean=tuple(mean), std=tuple(std))
    with torch.no_grad():
        expected = clip.network.encode_image(published(picture)[None], normalize=True)
    assert (clip_features(clip, [picture]) - expected).abs().max() < 1e-5
    written = transforms.Compose([transforms.Resize(256, interpolation=3), transforms.CenterCrop(224)])
    assert centre(picture, 256, 224).tobytes() == written(picture).tobytes()


def test_dino_s_features_are_the_class_token_s(dino_folder):
    dino, picture = Dino.load(dino_folder), noise((300, 260))
    normal = transforms.Compose(
        [
            transforms.Resize(256, interpolation=3),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with torch.no_grad():
        token = dino.network(pixel_values=normal(picture)[None]).last_hidden_state[0, 0]
    together = dino.features([noise(seed=2), picture])
    assert (together[1] - token / token.norm()).abs().max() < 1e-5
    assert (dino.features([picture])[0] - together[1]).abs().max() < 1e-5


def test_no_dino(tmp_path):
    with pytest.raises(CheckpointError, match="is no DINO that can be loaded"):
        Dino.load(tmp_path)


def test_networks_that_are_no_dino(tmp_path):
    """transformers loads them, with random weights where theirs have other names."""
    from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    networks = {
        "bert": BertModel(BertConfig(**small, vocab_size=30)),
        "clip": CLIPVisionModel(CLIPVisionConfig(**small, patch_size=32)),
        "large": ViTModel(ViTConfig(**small, image_size=518, patch_size=37), add_pooling_layer=False),
    }
    for name, network in networks.items():
        network.save_pretrained(tmp_path / name)
        with pytest.raises(CheckpointError, match="is no DINO that can be loaded"):
            Dino.load(tmp_path / name)


@pytest.fixture
def folder(tmp_path):
    """A source, an edit, a target and a mask as files."""
    pictures = {"source": noise((64, 64)), "edited": noise((64, 64), 1), "target": noise((64, 64), 2)}
    for name, picture in {**pictures, "mask": half_mask().resize((64, 64))}.items():
        picture.save(tmp_path / f"{name}.png")
    return tmp_path


ALL = {"caption": "a red heart", "edited_caption": "a blue star"} | {
    name: f"{name}.png" for name in ("source", "edited", "target", "mask")
}


def test_the_numbers_by_their_formulas(folder, clip, dino_folder):
    (folder / "t.jsonl").write_text(json.dumps(ALL) + "\n")
    (row,) = read_table(folder / "t.jsonl")
    found = measure_picture(row, clip, Dino.load(dino_folder))
    source, edited, target = clip_features(
        clip, [Image.open(folder / f"{n}.png") for n in ("source", "edited", "target")]
    )
    before, after = clip.text_features(["a red heart", "a blue star"])
    assert found["clip_i"] == pytest.approx(float(edited @ target), abs=1e-5)
    assert found["clip_im"] == pytest.approx(float(edited @ source), abs=1e-5)
    assert found["clip_t"] == found["clip_out"] == pytest.approx(float(edited @ after), abs=1e-5)
    change, wanted = edited - source, after - before
    assert found["clip_dir"] == pytest.approx(float(change @ wanted / change.norm() / wanted.norm()), abs=1e-5)
    assert found["l1"] == pytest.approx(distances(noise((64, 64), 1), noise((64, 64), 2))["l1"])
    assert found["source_l1"] == pytest.approx(distances(noise((64, 64), 1), noise((64, 64)))["l1"])
    assert -1 <= found["dino"] <= 1 and found["dino"] != found["source_dino"]


def test_equal_pictures_are_perfect(folder, clip):
    same = dict.fromkeys(("source", "edited", "target"), folder / "source.png")
    found = measure_picture(EditedPicture(name="same", **same), clip)
    assert found["l1"] == found["l2"] == 0 and found["clip_i"] == pytest.approx(1, abs=1e-6)
    assert "clip_t" not in found and "background_psnr" not in found and "dino" not in found


def test_tables_say_of_how_many_rows_a_mean_is():
    tables = pair_tables([{"l1": 0.1, "psnr": math.inf, "source_l1": 0.3}, {"l1": 0.3, "psnr": 20.0}])
    shown = {
        row[0]: row[1:] for table in tables for row in table.rows if "target" in table.title or "kept" in table.title
    }
    assert shown == {"L1": ("0.2000", 2), "PSNR to target": ("20.0000", 1)}


def numbered(folder, *changes):
    """A table of rows like ALL but for the changes."""
    (folder / "t.jsonl").write_text("".join(json.dumps({**ALL, **change}) + "\n" for change in changes))
    return folder / "t.jsonl", read_table(folder / "t.jsonl")


@pytest.mark.parametrize(("lightest", "numbers"), [(127, 3), (128, 0)])
def test_a_mask_of_the_whole_picture_has_no_background_and_ends_nothing(folder, clip, lightest, numbers):
    mask = Image.new("L", (48, 40), 255)
    mask.putpixel((0, 0), lightest)
    mask.save(folder / "white.png")
    table, rows = numbered(folder, {"mask": "white.png"})
    (found,) = measure_table(table, rows, clip)
    assert len([name for name in found if name.startswith("background")]) == numbers and found["l1"] is not None


def test_a_bad_row_is_named_and_loses_nothing(folder, clip, monkeypatch):
    (folder / "white.png").write_bytes(b"no picture")
    table, rows = numbered(folder, {}, {"mask": "white.png"})
    with pytest.raises(ImageError, match=r"t\.jsonl, row 2: .*white\.png"):
        measure_table(table, rows, clip, folder=folder / "run")
    half_mask().save(folder / "white.png")
    seen = []
    monkeypatch.setattr("ip2p_engine.evaluate.pairs.measure_picture", lambda row, *_: seen.append(row) or {"l1": 0.5})
    found = measure_table(table, rows, clip, folder=folder / "run")
    assert seen == rows[1:] and found[1]["l1"] == 0.5 and found[0]["l1"] != 0.5
    assert [json.loads(line) for line in (folder / "run" / "rows.jsonl").read_text().splitlines()] == found


def test_what_is_infinite_is_null(folder, clip):
    table, rows = numbered(folder, {"target": "edited.png"})
    (found,) = measure_table(table, rows, clip, folder=folder)
    assert found["psnr"] is None and '"psnr": null' in (folder / "rows.jsonl").read_text()
    assert "PSNR to target" not in str(pair_tables([found]))


def test_csv_says_the_same_as_jsonl(folder):
    (folder / "t.csv").write_text(",".join(ALL) + "\n" + ",".join(ALL.values()) + "\n")
    (folder / "t.jsonl").write_text(json.dumps(ALL) + "\n")
    assert read_table(folder / "t.csv") == read_table(folder / "t.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("t.csv", "source,target\na,b\n", "row 1, has no edited"),
        ("t.csv", "source,edited\n", "no rows"),
        ("t.jsonl", '{"source": "a"}\n', "row 1, has no edited"),
        ("t.jsonl", "{", "line 1, is not JSON"),
        ("t.txt", "", "neither .csv nor .jsonl"),
        ("t.csv", "source,edited\na,caf\xe9\n", "not UTF-8 text"),
        ("t.csv", f"source,edited\na,{'b' * 140_000}\n", "line 2, is not CSV"),
        ("t.jsonl", '{"source": 5, "edited": "b"}\n', "row 1: source is 5; give a text"),
        ("t.jsonl", '{"source": "a", "edited": "b", "edited_caption": 7}\n', "row 1: edited_caption is 7"),
    ],
)
def test_tables_that_cannot_be_measured(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(DatasetError, match=sentence):
        read_table(tmp_path / name)


def test_a_missing_extra_is_named():
    with pytest.raises(
        ConfigError, match=r"needs torchmetrics_absent, which is missing; pip install torchmetrics_absent"
    ):
        evaluate_extra("torchmetrics_absent.functional")


def test_lpips_looks_outside_the_mask(tmp_path, monkeypatch):
    """torchvision's SqueezeNet, untrained, where its download would lie."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(squeezenet1_1().state_dict(), tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = noise((64, 64))
    inside, outside, mask = source.copy(), source.copy(), half_mask().resize((64, 64))
    inside.paste((0, 0, 0), (0, 0, 32, 64))
    outside.paste((0, 0, 0), (32, 0, 64, 64))
    lpips = Lpips()
    assert lpips.background(source, inside, mask) == pytest.approx(0, abs=1e-7)
    assert lpips.background(source, outside, mask) > 1e-4


def test_lpips_without_a_network_is_one_sentence(tmp_path, monkeypatch, capsys):
    def offline(*args, **more):
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(CheckpointError, match="SqueezeNet's weights, which cannot be downloaded .*no route"):
        Lpips()
    assert capsys.readouterr().out == ""
