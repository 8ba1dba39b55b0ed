"""Where an instruction may act: closed forms of the mathematics, and what edits, command and study make of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_engine.cli import main
from ip2p_engine.diffusion.area import NOISES, SHARE, SIGMAS, WHOLE, area_of, relevance, set_back
from ip2p_engine.edit import EditConfig
from ip2p_engine.errors import ConfigError
from ip2p_engine.evaluate.areas import area_tables, measure_areas
from ip2p_engine.evaluate.run_folder import text_of
from ip2p_engine.evaluate.samples import Sample
from ip2p_engine.networks.conditioning import clean_latents
from ip2p_engine.scenes.exam import scene_samples
from ip2p_engine.scenes.world import Scene, render

SCENE = Scene(shape="heart", colour="red", background="sky", size="small", place="top left")


def map_with(value, background, *, cells=3, side=32):
    """A map that is ``value`` in a square of cells and ``background`` elsewhere."""
    one = torch.full((1, 1, side, side), background)
    one[..., 8 : 8 + cells, 8 : 8 + cells] = value
    return one


@pytest.mark.parametrize(
    ("difference", "white"),
    [
        (map_with(1.0, 0.05, cells=4), 36),
        (map_with(1.0, WHOLE - 0.01, cells=4), 36),
        (map_with(1.0, WHOLE + 0.01, cells=4), 32 * 32),
        (map_with(1.0, 0.0, side=64, cells=7), 81),
    ],
    ids=["local", "just local", "just whole", "no background"],
)
def test_an_area_is_what_stands_out_and_its_neighbours_or_everything(difference, white):
    assert float(area_of(difference).sum()) == white


def test_rows_are_judged_by_their_own_largest_difference():
    rows = torch.cat([map_with(1.0, 0.05, cells=4), 1e-3 * map_with(1.0, 0.05, cells=4), map_with(1.0, 0.9)])
    found = area_of(rows)
    assert torch.equal(found[0], found[1]) and float(found[2].min()) == 1
    faint = map_with(1.0, 0.0, cells=8)
    faint[..., 20, 20], faint[..., 24, 24] = SHARE - 0.01, SHARE + 0.01
    assert float(area_of(faint)[..., 20, 20]) == 0 and float(area_of(faint)[..., 24, 24]) == 1


def test_relevance_is_the_mean_difference_of_two_branches():
    asked = []

    def branches(x, sigma, cond, names):
        asked.append((sigma, tuple(names), x.clone()))
        return {"c": sigma * torch.ones_like(x), "i": torch.zeros_like(x)}

    source = torch.zeros(2, 4, 3, 3)
    found = relevance(branches, source, None)
    assert found.shape == (2, 1, 3, 3) and torch.allclose(found, torch.full_like(found, sum(SIGMAS) / len(SIGMAS)))
    assert [one[:2] for one in asked] == [(sigma, ("c", "i")) for _ in range(NOISES) for sigma in SIGMAS]
    assert torch.equal(asked[0][2][0], asked[0][2][1]) and torch.allclose(
        asked[1][2], asked[0][2] * SIGMAS[1] / SIGMAS[0]
    )
    assert not torch.equal(asked[0][2], asked[2][2])


@pytest.mark.parametrize(("rest", "white"), [(0.1, 36 + 1), (0.24, 36 + 1), (0.26, 256), (0.31, 256)])
def test_what_an_edit_has_changed_belongs_to_its_area(rest, white):
    """A block of 4 x 4 by 1, with its neighbours 36 places, beside one that was found; the rest is set back."""
    source, found = torch.zeros(1, 4, 16, 16), torch.zeros(1, 1, 16, 16)
    edited = torch.full_like(source, rest)
    edited[..., 4:8, 4:8], found[..., 12, 12] = 1.0, 1.0
    made, area = set_back(edited, source, found)
    assert float(area.sum()) == white and float(area[..., 12, 12]) == 1
    kept = (area == 0).expand_as(source)
    assert torch.equal(made[~kept], edited[~kept]) and not made[kept].any()


def test_an_edit_with_an_area_keeps_the_rest_to_the_bit(editor):
    source = render(SCENE).resize((128, 128), Image.Resampling.NEAREST)
    config = EditConfig(steps=1, resolution=128, text_cfg=1, image_cfg=1)
    (plain,) = editor.edit(source, "turn the heart into a star", config=config)
    (found,) = editor.edit(source, "turn the heart into a star", config=config, auto_mask=True)
    (before,) = editor.find_area(source, "turn the heart into a star", config=config)
    mask = found.area
    assert plain.area is None and (np.asarray(mask) >= np.asarray(before)).all()
    assert found.evaluations == plain.evaluations + 2 * NOISES * len(SIGMAS) and found.settings["auto_mask"]
    black = np.asarray(mask) == 0
    assert black.any() and np.array_equal(np.asarray(found.image)[black], np.asarray(source)[black])
    first = clean_latents(editor.model, editor.condition(source, "-", config=config).image)[0]
    set_there = found.latent == first
    assert set_there.any() and torch.equal(found.latent[~set_there], plain.latent[~set_there])


def test_an_edit_of_the_whole_picture_is_the_same_to_the_bit(editor):
    (plain, found) = (editor.edit(render(SCENE), "make it night", steps=2, auto_mask=auto)[0] for auto in (False, True))
    assert np.asarray(found.area).min() == 255 and np.array_equal(plain.image, found.image)


def test_a_given_mask_bounds_the_area(editor):
    source, top = render(SCENE), Image.new("L", (64, 64))
    top.paste(255, (0, 0, 64, 16))
    (found,) = editor.edit(source, "make it night", steps=1, masks=top, auto_mask=True)
    assert np.array_equal(np.asarray(found.image)[24:], np.asarray(source)[24:])


def test_commands(tmp_path, capsys):
    render(SCENE).save(tmp_path / "a.png")
    asked = [str(tmp_path / "a.png"), "--instruction", "make it night"]
    assert main(["area", *asked, "--out", str(tmp_path / "m.png")]) == 0
    assert "100 %" in capsys.readouterr().out and Image.open(tmp_path / "m.png").size == (64, 64)
    assert main(["edit", *asked, "--steps", "1", "--mask", "auto", "--json", "--out", str(tmp_path / "b.png")]) == 0
    assert '"auto_mask": true' in capsys.readouterr().out


def test_the_study_pairs_edits_and_measures_overlap(editor, tmp_path):
    samples, judge = scene_samples(2)
    config = EditConfig(text_cfg=1, image_cfg=1, steps=1)
    rows = measure_areas(editor, samples, judge.truths, config, folder=tmp_path, batch=2)
    assert rows == measure_areas(editor, samples, None, config, folder=tmp_path), "what is there is not measured again"
    assert all(0 <= row[name] <= 1 for row in rows for name in ("iou", "covered", "white", "change"))
    assert "all" in text_of(area_tables(rows)[0])
    bare = Sample(**{**vars(samples[0]), "target": None})
    with pytest.raises(ConfigError, match="no true result"):
        measure_areas(editor, [bare], judge.truths, config)
