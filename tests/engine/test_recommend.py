"""The measured sweep over many pictures, and the card that it is written into."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from PIL import Image

from ip2p_engine import InstructPix2Pix
from ip2p_engine.checkpoint.card import write_card
from ip2p_engine.checkpoint.report import report_card
from ip2p_engine.checkpoint.spec import ModelSpec, recommended, spec_to_json
from ip2p_engine.cli import build_parser, main
from ip2p_engine.commands.evaluate_recommend import name_checkpoint, options_of
from ip2p_engine.edit import EditConfig
from ip2p_engine.errors import CheckpointError, ConfigError
from ip2p_engine.evaluate.recommend import Grid, measure_settings, recommend, truth_judge
from ip2p_engine.evaluate.run_folder import load_run
from ip2p_engine.evaluate.samples import Sample
from ip2p_engine.networks.model import convert
from ip2p_engine.scenes.exam import scene_samples


def setting(steps, text_cfg=1.0, image_cfg=1.0, sampler="euler_ancestral", guidance_interval=None):
    names = ("text_cfg", "image_cfg", "steps", "sampler", "guidance_interval")
    return dict(zip(names, (text_cfg, image_cfg, steps, sampler, guidance_interval), strict=True))


def rows(steps, done, kept, evaluations, **more):
    return [
        {
            **setting(steps, **more),
            "sample": str(n),
            "done": right,
            "kept": kept,
            "nearest": 30.0,
            "evaluations": evaluations,
            "kind": "even" if n % 2 == 0 else "odd",
        }
        for n, right in enumerate(done)
    ]


def test_the_grid_holds_c_alone_once_a_step():
    grid = Grid(text_cfg=(1, 4), image_cfg=(1,), steps=(2, 4), guidance_interval=(None, (0.5, 5)))
    found = [(s["text_cfg"], s["image_cfg"], s["steps"], s["guidance_interval"]) for s in grid.settings()]
    a_step = [(1, 1, None), (4, 1, None), (4, 1, [0.5, 5])]
    assert found == [(t, i, steps, bounds) for steps in (2, 4) for t, i, bounds in a_step]
    with pytest.raises(ConfigError, match="the lower first"):
        Grid(guidance_interval=((5, 0.5),))
    with pytest.raises(ConfigError, match="unknown"):
        Grid(sampler=("none",))
    with pytest.raises(ConfigError, match="empty grid"):
        Grid(steps=())


def test_the_cheapest_of_those_that_are_as_right_and_keep_as_much():
    best = rows(20, [True] * 97 + [False] * 3, 40.0, 60, text_cfg=4.0)
    equal = rows(4, [True] * 96 + [False] * 4, 39.6, 4)
    cheaper_but_loses_the_picture = rows(2, [True] * 96 + [False] * 4, 39.4, 2)
    wrong = rows(1, [True] * 60 + [False] * 40, 45.0, 1)
    found = recommend([*best, *equal, *cheaper_but_loses_the_picture, *wrong])
    assert [one.evaluations for one in found.measured] == [60, 4, 2, 1]
    assert found.picked == 1 and found.front == [0, 1, 2, 3]
    assert found.measured[0].behind == (0, 0, 0)
    assert found.measured[3].done == pytest.approx(0.6) and found.measured[3].behind[2] < -0.2
    assert found.measured[3].by_kind == {"even": 0.6, "odd": 0.6}
    assert recommend([*best, *equal, *cheaper_but_loses_the_picture], decibels=0.61).picked == 2
    assert options_of(found.setting) == "--text-cfg 1 --image-cfg 1 --steps 4 --sampler euler_ancestral"


def test_what_is_beaten_is_not_on_the_front():
    found = recommend([*rows(4, [True] * 9 + [False], 40.0, 4), *rows(8, [True] * 9 + [False], 39.0, 8)])
    assert found.front == [0] and "on the front" not in str(found.table().rows[1])
    with pytest.raises(ConfigError, match="same samples"):
        recommend([*rows(4, [True] * 3, 40.0, 4), *rows(8, [True] * 2, 40.0, 4)])
    with pytest.raises(ConfigError, match="same samples"):
        recommend([])
    assert recommend(rows(4, [True], 40.0, 4), decibels=0).picked == 0
    with pytest.raises(ConfigError, match="`decibels` is -0.1; give 0 or more"):
        recommend(rows(4, [True], 40.0, 4), decibels=-0.1)


def test_a_pair_s_target_judges():
    source, target = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    target[:20, :20] = 255
    half = target // 2 + 1
    sample = Sample(key="a", instruction="", caption="", edited_caption="", seed=0, source=Image.fromarray(source))
    with pytest.raises(ConfigError, match="no true result"):
        truth_judge([sample], [sample.source])
    pair = Sample(**{**vars(sample), "target": Image.fromarray(target)})
    verdicts = truth_judge([pair] * 3, [pair.target, pair.source, Image.fromarray(half)])
    assert [verdict["done"] for verdict in verdicts] == [True, False, True]
    assert verdicts[0]["kept"] == verdicts[1]["kept"] == 99
    assert verdicts[2]["kept"] == pytest.approx(20 * np.log10(255), abs=0.01)
    everywhere = Sample(**{**vars(sample), "target": Image.new("RGB", (64, 64), "white")})
    assert truth_judge([everywhere], [everywhere.target])[0]["kept"] is None


def test_a_measurement_goes_on_where_it_stopped(editor, tmp_path):
    samples, judge = scene_samples(3)
    grid = Grid(text_cfg=(4.0,), image_cfg=(1.5,), steps=(1,))
    first = measure_settings(editor, samples[:2], judge.truths, grid, folder=tmp_path, batch=2)
    assert [row["evaluations"] for row in first] == [1, 1, 3, 3]
    asked = []

    def counted(*given):
        asked.append(len(given[0]))
        return judge.truths(*given)

    again = measure_settings(editor, samples, counted, grid, folder=tmp_path, batch=2)
    assert asked == [1, 1] and [row["sample"] for row in again] == ["000000", "000001", "000002"] * 2
    assert again[:2] == first[:2]


def test_the_command_measures_and_writes_the_card(tmp_path, capsys):
    file, run = tmp_path / "mine.safetensors", tmp_path / "run"
    convert("embedded", file, to="ldm")
    tensors = file.read_bytes()[8 + struct.unpack("<Q", file.read_bytes()[:8])[0] :]
    arguments = ["--n", "2", "--steps", "1", "2", "--text-cfg", "4", "--image-cfg", "1.5", "--out", str(run)]
    assert main(["evaluate", "recommend", "scenes", "--checkpoint", str(file), *arguments, "--write"]) == 0
    said = capsys.readouterr().out
    found = load_run(run)
    assert found.kind == "recommend" and len(found.tables[0].rows) == 4 and "picked: --text-cfg" in said
    card, picked = report_card(file), found.figures["picked"]
    assert (card.text_cfg, card.image_cfg, card.steps) == tuple(picked[n] for n in ("text_cfg", "image_cfg", "steps"))
    length = struct.unpack("<Q", file.read_bytes()[:8])[0]
    assert file.read_bytes()[8 + length :] == tensors
    assert main(["evaluate", "recommend", "--out", str(tmp_path / "other"), "--write"]) == 2
    assert "convert" in capsys.readouterr().err
    wrong = ["evaluate", "recommend", "--out", str(tmp_path / "other"), "--guidance-interval", "3"]
    assert main(wrong) == 2 and "LOW:HIGH" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["recommend", "areas", "session"])
@pytest.mark.parametrize(("world", "named"), [("scenes", "embedded"), ("photos", "embedded-photos")])
def test_a_world_is_edited_by_its_own_model(command, world, named):
    for said, checkpoint in ([], named), (["--checkpoint", "mine"], "mine"):
        options = build_parser().parse_args(["evaluate", command, world, "--out", "run", *said])
        name_checkpoint(options)
        assert options.checkpoint == checkpoint


@pytest.mark.parametrize("to", ["ldm", "diffusers"])
def test_an_edit_takes_what_the_card_says(to, tmp_path, editor):
    path = convert("embedded", tmp_path / ("m.safetensors" if to == "ldm" else "m"), to=to)
    write_card(path, {"text_cfg": 3.0, "steps": 2, "sampler": "ddim", "guidance_low": 0.5, "guidance_high": 5.0})
    written = InstructPix2Pix.load(path)
    scene = scene_samples(1)[0][0].source
    settings = written.edit(scene, "make it snow")[0].settings
    names = ("text_cfg", "steps", "sampler", "guidance_interval")
    assert [settings[name] for name in names] == [3.0, 2, "ddim", (0.5, 5.0)]
    own = written.edit(scene, "make it snow", text_cfg=4.0, image_cfg=1.5, steps=1, sampler="euler")[0].settings
    assert [own[name] for name in names] == [4.0, 1, "euler", None], "own scales act everywhere unless told otherwise"
    with pytest.raises(CheckpointError, match="cannot recommend"):
        write_card(path, {"steps": 0})
    with pytest.raises(CheckpointError, match="cannot recommend"):
        write_card(path, {"sampler": "none"})
    with pytest.raises(CheckpointError, match="convert"):
        write_card("embedded", {"steps": 2})


def test_0_1_reads_what_recommends_nothing_new():
    spec = ModelSpec(family="sd1", in_channels=8, prediction="eps", **recommended("sd1", 8))
    assert not {"sampler", "guidance_low", "guidance_high"} & set(json.loads(spec_to_json(spec)))
    with pytest.raises(ConfigError, match="guidance_low"):
        ModelSpec(**{**vars(spec), "guidance_low": 5.0, "guidance_high": 0.5})
    assert EditConfig().sampler is None
