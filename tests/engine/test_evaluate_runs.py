"""Sweeps, scenes, limits, plots, reports and arms."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from ip2p_engine.clip.similarity import ClipSimilarity
from ip2p_engine.data.store import PairRecord, PairStore, PairWriter
from ip2p_engine.errors import ConfigError, DatasetError
from ip2p_engine.evaluate import trade_off as ablation
from ip2p_engine.evaluate.curve import _figure, curve_points, point_label, save_plot, trade_off_plot
from ip2p_engine.evaluate.report import tiled, write_report
from ip2p_engine.evaluate.run_folder import FLAG, NUMBER, OBJECT, TEXT, Table, load_run, row_log, save_run, text_of
from ip2p_engine.evaluate.samples import in_test_split
from ip2p_engine.evaluate.statistics import AutoPick, pareto_front
from ip2p_engine.evaluate.sweep import SweepConfig, edit_with, sweep, sweep_sheet
from ip2p_engine.evaluate.trade_off import make_arms, subset, train_arm
from ip2p_engine.scenes.exam import choices, scene_samples
from ip2p_engine.scenes.limits import (
    ASKED,
    CASES,
    NONE,
    Outcome,
    confusions,
    limit_rows,
    limit_sheet,
    limit_table,
    make_cases,
    outcomes,
    side_effects,
    summary,
    worst,
)
from ip2p_engine.scenes.world import render
from ip2p_engine.train import TrainConfig


@pytest.fixture(scope="module")
def clip():
    return ClipSimilarity.load("embedded")


@pytest.fixture(scope="module")
def swept(editor, clip):
    config = SweepConfig(text_cfgs=(2.0, 6.0), image_cfgs=(1.0, 1.5), seeds=(4, 5, 6), steps=1, batch=2)
    sample = scene_samples(1)[0][0]
    captions = (sample.caption, sample.edited_caption)
    return sweep(editor, sample.source, sample.instruction, captions, clip, config=config), config, clip


@pytest.mark.slow
def test_a_sweep_holds_every_setting_once_and_its_scores(swept):
    result, config, clip = swept
    grid = [(c.text_cfg, c.image_cfg, c.seed) for c in result.cells]
    assert sorted(grid) == sorted((t, i, s) for t in config.text_cfgs for i in config.image_cfgs for s in config.seeds)
    sample, cell = result.sample, result.cells[7]
    (expected,) = clip.score([sample.source], [cell.image], [sample.caption], [sample.edited_caption])
    assert cell.scores.sim_direction == pytest.approx(expected.sim_direction, abs=1e-5)
    points = [(c.scores.sim_direction, c.scores.sim_image) for c in result.cells]
    assert [n for n, c in enumerate(result.cells) if c.on_front] == pareto_front(points)
    assert result.picked == AutoPick().pick([c.scores for c in result.cells])


def test_the_picked_edit_is_the_cell_once_more(editor, swept):
    result, config, _ = swept
    again = edit_with(editor, result, config)
    assert np.abs(np.asarray(again.image, float) - np.asarray(result.best.image, float)).max() <= 2
    assert again.settings["text_cfg"] == result.best.text_cfg and again.seed == result.best.seed


def test_the_sheet_shows_every_cell(swept):
    result, _, _ = swept
    small, large = (sweep_sheet(result, side=side) for side in (64, 128))
    assert large.width > small.width > 7 * 64 and small.height > 2 * 64
    assert all(colour in {rgb for _, rgb in small.getcolors(2**24)} for colour in ((0, 140, 90), (214, 102, 0)))


@pytest.mark.parametrize("empty", ["text_cfgs", "image_cfgs", "seeds"])
def test_an_empty_grid(empty):
    with pytest.raises(ConfigError, match="empty grid"):
        SweepConfig(**{empty: ()})


def test_a_sweep_of_no_size(editor, clip):
    with pytest.raises(ConfigError, match="resolution is 0"):
        config = SweepConfig(resolution=0, steps=1)
        sweep(editor, Image.new("RGB", (64, 64)), "make it snow", ("a heart", "a heart in snow"), clip, config=config)


def test_a_sweep_without_captions(editor, clip):
    with pytest.raises(ConfigError, match="both captions"):
        sweep(editor, Image.new("RGB", (64, 64)), "make it snow", ("a heart", " "), clip)


def row(n, kind="colour", success=True, read="blue", changed=(), psnr=30.0, **more):
    judged = {
        "kind": kind,
        "success": success,
        "asked": read == "blue",
        "kept": not changed,
        "clear": True,
        "psnr": psnr,
        "background_psnr": 35.0,
        "attribute": "colour" if kind == "colour" else "size",
        "wanted": "blue",
        "read": read,
        "changed": list(changed),
    }
    numbers = dict.fromkeys(("sim_0", "sim_1", "sim_direction", "sim_image"), 0.5)
    return {"curve": "edit", "sample": f"{n}", **numbers, "judged": judged, **more}


ROWS = [
    row(0),
    row(1, success=False, read="red", psnr=12.0),
    row(2, success=False, changed=("size", "place"), psnr=10.0),
    row(3, kind="enlarge"),
]


def test_tables_of_judged_rows():
    table = summary(ROWS, [row(n, psnr=40.0) for n in range(4)])
    shown = {line[0]: line for line in table.rows}
    assert shown["colour"][1:4] == (3, "33.3", "66.7") and shown["all"][1:3] == (4, "50.0")
    assert "17.33 (40.00)" in shown["colour"]
    confused = {line.title.split()[1]: line for line in confusions(ROWS)}
    assert confused["colour"].columns == ("asked", "blue", "red") and confused["colour"].rows == [("blue", 2, 1)]
    assert side_effects(ROWS).rows == [("colour", 3, 1, 1), ("enlarge", 1, "", "")]
    assert [one["sample"] for one in worst(ROWS, 3)] == ["2", "1", "0"]


def test_who_chooses_the_guidance():
    grid = [
        {**row(n, success=s_t == good), "text_cfg": s_t, "image_cfg": 1.5, "sim_direction": 0.9 if s_t == good else 0.1}
        for n, good in enumerate((3.0, 3.0, 7.5))
        for s_t in (3.0, 7.5)
    ]
    found = choices(grid, AutoPick(min_sim_image=0.4), (7.5, 1.5))
    successes = {
        name.split(":")[0].split(",")[0]: sum(r["judged"]["success"] for r in rows) for name, rows in found.items()
    }
    assert successes == {"fixed 7.5 / 1.5": 1, "best fixed": 2, "automatic": 3}
    with pytest.raises(ConfigError, match="not in the grid"):
        choices(grid, AutoPick(), (5.0, 1.5))


@pytest.mark.slow
def test_the_scene_judge_names_what_it_reads():
    samples, judge = scene_samples(2, captions="full")
    edit = judge.edits[samples[0].key]
    right, wrong = judge(samples[:1] * 2, [render(edit.target), render(edit.source)])
    assert right["success"] and right["read"] == right["wanted"] and right["changed"] == []
    assert not wrong["asked"] and wrong["read"] == getattr(edit.source, wrong["attribute"])
    assert samples[0].edited_caption == edit.edited_caption
    assert edit.target.place.split()[0] not in scene_samples(1, captions="short")[0][0].edited_caption
    with pytest.raises(ConfigError, match="short"):
        scene_samples(1, captions="long")


@pytest.mark.parametrize("kind", CASES)
def test_every_result_of_a_limit_is_told_from_the_others(kind):
    for case in make_cases(kind, 4):
        pictures = list(case.results.values())
        assert len({picture.tobytes() for picture in pictures}) == len(pictures)

        class Painter:
            """Gives the pictures that it was made of."""

            def edit_each(self, images, *args, **more):
                return [type("Result", (), {"image": self.image, "settings": {"steps": 20}}) for _ in images]

        for name, picture in [*case.results.items(), (NONE, Image.effect_noise((64, 64), 200).convert("RGB"))]:
            painter = Painter()
            painter.image = picture
            (found,) = outcomes(painter, [case])
            assert found.name == name and limit_rows([found])[0] | {"steps": 20} == limit_rows([found])[0]
    assert [c.instruction for c in make_cases(kind, 4)] == [c.instruction for c in make_cases(kind, 4)]


def test_the_table_of_limits():
    (case,) = make_cases("move", 1)
    found = [Outcome(case=case, picture=case.source, name=name) for name in (ASKED, "unchanged", "unchanged", NONE)]
    assert limit_table(found).rows == [("move", 4, "75 %", "unchanged 2, something else 1")]
    assert limit_sheet(found).width > 3 * 96


def test_a_sheet_s_cells_are_as_large_as_the_largest():
    pictures = [Image.new("RGB", (3, 3)), Image.new("RGB", (4, 7)), Image.new("RGB", (2, 2))]
    sheet = tiled(pictures, 2)
    assert sheet.size == (8, 14) and sheet.getpixel((7, 6)) == (0, 0, 0) and sheet.getpixel((1, 8)) == (0, 0, 0)


def points(count=2, curve="a", text_cfg=7.5):
    made = [
        {"curve": curve, "text_cfg": text_cfg, "image_cfg": 1 + s, "sample": f"{n}", "sim_0": 0, "sim_1": 0}
        | {"sim_direction": 0.5 - 0.1 * s + 0.01 * n, "sim_image": 0.5 + 0.1 * s}
        for s in range(count)
        for n in range(5)
    ]
    return curve_points(made, resamples=20)


@pytest.mark.slow
def test_plots(tmp_path):
    picture = trade_off_plot(points(), title="t")
    assert picture.mode == "RGB" and min(picture.size) > 400 and len(picture.getcolors(2**24)) > 10
    png, svg = save_plot(points(), tmp_path / "curve")
    assert Image.open(png).size == picture.size and b"<svg" in svg.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] != [] and len(list(tmp_path.iterdir())) == 2
    assert point_label(points()[1], points()) == "$s_I$ 2" and point_label(points(1)[0], points(1)) == ""
    with pytest.raises(ConfigError, match="no points"):
        trade_off_plot([])


def test_names_are_written_as_they_are():
    """matplotlib hides labels that begin with _, and cannot parse what only looks like mathematics."""
    figure = _figure([*points(curve="_mine"), *points(curve="$a_{b$ $y$")], "x $a_{b$ y", 0.95)
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["_mine", "$a_{b$ $y$"]


def test_labels_stay_inside_and_apart():
    """One curve ends at the right edge, and two more where it ends."""
    axes = _figure([*points(curve="a"), *points(curve="b"), *points(curve="c")], "", 0.95).axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    inside = axes.get_window_extent()
    assert len(boxes) == 6 and all(box.x0 >= inside.x0 and box.x1 <= inside.x1 for box in boxes)
    assert not [1 for n, box in enumerate(boxes) if box.count_overlaps(boxes[:n])]


def test_a_grid_is_a_line_each_s_t():
    axes = _figure([*points(3, text_cfg=2.0), *points(3, text_cfg=4.0)], "", 0.95).axes[0]
    assert [len(line[0].get_xdata()) for line in axes.containers] == [3, 3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a, s_T 2", "a, s_T 4"]
    one = _figure([*points(1, text_cfg=2.0), *points(1, text_cfg=4.0)], "", 0.95).axes[0]  # s_T alone is swept
    assert [len(line[0].get_xdata()) for line in one.containers] == [2]


def test_plots_need_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install matplotlib"):
        trade_off_plot(points())


def test_a_report_is_one_file_that_needs_nothing_else(tmp_path):
    table = Table(title="T <1>", columns=("a", "b"), rows=[("x & y", 1)], note="<b>")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "p.png")
    save_run(tmp_path, "curve", settings={"clip": "<script>"}, tables=[table], pictures={"p.png": "a <picture>"})
    (tmp_path / "inner").mkdir()
    save_run(tmp_path / "inner", "pairs", settings={}, tables=[table])
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "run.json").write_text('{"config": {}, "data": "pairs"}')
    assert load_run(tmp_path).tables == [Table(title="T <1>", columns=["a", "b"], rows=[["x & y", 1]], note="<b>")]
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert page.count("T &lt;1&gt;") == 4 and "x &amp; y" in page and "<script" not in page
    assert re.findall(r'src="(.{10})', page) == ["data:image"]
    links = re.findall(r'href="(.*?)"', page)
    assert links == ["#run-0", "#run-0-0", "#run-1", "#run-1-0"]
    assert re.findall(r'<h[23] id="(.*?)"', page) == [link[1:] for link in links]
    assert "torch" in page and "Edited pictures" in page
    headings = [f"Trade-off curve: {tmp_path.name}", f"Edited pictures: {tmp_path.name}/inner"]
    assert re.findall("<h2 .*?>(.*)</h2>", page) == headings


def test_pictures_keep_their_order(tmp_path):
    save_run(tmp_path, "curve", settings={}, tables=[], pictures={"curve.png": "first", "closer.png": "second"})
    assert list(load_run(tmp_path).pictures) == ["curve.png", "closer.png"]


def test_reports_of_nothing(tmp_path):
    with pytest.raises(DatasetError, match="holds no run"):
        write_report(tmp_path, tmp_path / "r.html")
    (tmp_path / "run.json").write_text('{"kind": "curve", "tables": []}')
    with pytest.raises(DatasetError, match="no evaluation's"):
        write_report(tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_table_for_a_terminal():
    text = text_of(Table(title="T", columns=("kind", "n"), rows=[("colour", 3), ("all", 12)], note="N"))
    assert text.splitlines() == ["T", "kind     n", "colour   3", "all     12", "N"]


def test_rows_that_do_not_compare_stand_below_a_line(tmp_path):
    table = Table(title="T", columns=("who", "n"), rows=[("me", 3)], apart="By <others>", rows_apart=[("them", 40)])
    assert text_of(table).splitlines() == ["T", "who    n", "me     3", "-- By <others>:", "them  40"]
    save_run(tmp_path, "judge", settings={}, tables=[table])
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    line = '<tr class="apart"><td colspan="2">By &lt;others&gt;</td></tr>'
    assert page.index("<td>me</td>") < page.index(line) < page.index("<td>them</td>")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with PairWriter(folder, manifest={}, rows_per_shard=40) as writer:
        for n in range(100):
            texts = {"edit_prompt": "e", "original_prompt": f"caption {n}", "edited_prompt": "after"}
            pictures = {"original_image": b"", "edited_image": b""}
            writer.write(PairRecord(**pictures, **texts, seed=n, p=None, cfg=None, key=f"{n}"))
    return PairStore(folder)


def test_smaller_shares_lie_in_larger_ones_and_none_is_tested_on(store):
    parts = [{store[row].key for row in subset(store, share)} for share in (1.0, 0.5, 0.1, 0.001)]
    assert parts[0] == {str(n) for n in range(100) if not in_test_split(f"caption {n}")}
    assert all(small < large for large, small in zip(parts, parts[1:], strict=False))
    assert [len(part) for part in parts[1:]] == [round(len(parts[0]) / 2), round(len(parts[0]) / 10), 1]


def test_arms(tmp_path):
    arms = make_arms(tmp_path, tmp_path / "all", (1.0, 0.01))
    assert [arm.name for arm in arms] == ["100 % of the pairs", "1 % of the pairs", "without the filter"]
    for share in (0, 1.01):
        with pytest.raises(ConfigError, match="share"):
            make_arms(tmp_path, None, (share,))


def test_an_arm_reads_pairs_when_they_are_asked_for(store, tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError("a pair was read")

    given = {}
    monkeypatch.setattr(ablation, "train", lambda config, *, data, **more: given.update(data=data) or Unfinished)
    monkeypatch.setattr(PairStore, "__getitem__", never)
    (arm,) = make_arms(store.folder, None, (0.1,))
    assert train_arm(arm, TrainConfig(hold_out_test=True), "embedded-sd", tmp_path) is None
    monkeypatch.undo()
    assert [row.name for row in given["data"]] == [f"pair {store[n].key}" for n in subset(store, 0.1)]


class Unfinished:
    finished = False


FORMS = {"done": FLAG, "kept": NUMBER, "kind": TEXT, "right": [FLAG], "before": {"done": FLAG}, "about": OBJECT}
WHOLE = {
    "seed": 1,
    "done": True,
    "kept": None,
    "kind": "style",
    "right": [0, 1.0],
    "before": {"done": 0.5},
    "about": {},
}


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({}, True),
        ({"kept": 3}, True),
        ({"kept": "3"}, DatasetError),
        ({"done": None}, DatasetError),
        ({"kept": float("nan")}, DatasetError),
        ({"done": 10**15 - 1}, True),
        ({"done": 10**15}, DatasetError),
        ({"kind": None}, DatasetError),
        ({"right": []}, DatasetError),
        ({"right": [[0]]}, DatasetError),
        ({"before": {}}, DatasetError),
        ({"before": 3}, DatasetError),
        ({"about": []}, DatasetError),
    ],
)
def test_results_of_a_stranger_s_rows_are_of_their_types(tmp_path, change, known):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**WHOLE, **change}) + "\n")
    if known is True:
        with row_log(tmp_path, FORMS) as (rows, _):
            assert list(rows.values()) == [{**WHOLE, **change}]
        return
    with pytest.raises(known, match="which no evaluation wrote; remove the line"), row_log(tmp_path, FORMS):
        pass


@pytest.mark.parametrize(("name", "there"), [("about", True), ("kept", False), ("done", False), ("right", False)])
def test_a_row_that_lacks_a_result_is_measured_again(tmp_path, name, there):
    row = {key: value for key, value in WHOLE.items() if key != name}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with row_log(tmp_path, FORMS, optional=("about",)) as (rows, _):
        assert list(rows.values()) == ([row] if there else [])
