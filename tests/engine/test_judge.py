"""A judge that sees, played by a real HTTP server that reads its scores off the pictures it is sent."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ip2p_engine import cli
from ip2p_engine.captions.chat import ServerConfig
from ip2p_engine.clip.filter import FilterConfig
from ip2p_engine.data.reading import Reading, open_pairs
from ip2p_engine.data.record import PairRecord
from ip2p_engine.data.store import PairStore, PairWriter
from ip2p_engine.data.tools import verify
from ip2p_engine.errors import CaptionError, ConfigError, DatasetError, Interrupted
from ip2p_engine.evaluate.benchmarks import edits_of, is_bare, read_scores, write_bare
from ip2p_engine.evaluate.edits import write_truth
from ip2p_engine.evaluate.judge import cost_of, judge
from ip2p_engine.evaluate.judge_pairs import judge_pairs
from ip2p_engine.evaluate.judged import judged_rows, judgement_tables
from ip2p_engine.evaluate.rubrics import RUBRICS, imgedit_kind
from ip2p_engine.evaluate.statistics import agreement
from ip2p_engine.factory.refilter import refilter
from ip2p_engine.hooks import Hooks

ROOT = Path(__file__).parents[2]
VIESCORE, IMGEDIT = RUBRICS["viescore"], RUBRICS["imgedit"]


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def seen(body):
    """(the question, the centre colours of the pictures) of a request."""
    text, *parts = body["messages"][0]["content"]
    colours = []
    for part in parts:
        data = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
        picture = Image.open(io.BytesIO(data))
        colours.append(picture.getpixel((picture.width // 2, picture.height // 2)))
    return text["text"], colours


def scores_of(colour, part, vote=0):
    """What the played judge says of an edit of this colour: its thoughts are in the colour's channels."""
    carried, alone, natural = (channel // 20 for channel in colour)
    if part == "edit":
        return [min(5, 1 + n // 3) for n in (carried, alone, natural)]
    return [min(10, carried + vote), alone] if part == "following" else [natural, min(10, natural + 1)]


class Judge:
    """Answers by the pictures; ``faults`` maps the n-th request, counted from 1, to what goes wrong instead."""

    def __init__(self, faults=None, pause=0.0):
        self.bodies, self.faults, self.pause, self.lock = [], dict(faults or {}), pause, threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                owner.serve(self)

            def log_message(self, *arguments):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.handle_error = lambda *arguments: None
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()

    def config(self, **more):
        return ServerConfig(**{"base_url": self.url, "model": "eye", "first_wait": 0.01, "temperature": 0.0, **more})

    def serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.bodies.append(body)
            fault = self.faults.pop(len(self.bodies), self.faults.get("always"))
        time.sleep(self.pause)
        if fault == "drop":
            handler.connection.close()
            return
        text, colours = seen(body)
        part = "edit" if "three whole numbers" in text else "following" if len(colours) == 2 else "quality"
        said = json.dumps({"reasoning": "as seen", "score": scores_of(colours[-1], part, body["seed"])})
        code, headers, choice = 200, {}, {"message": {"content": said}}
        if isinstance(fault, int):
            code, headers = fault, {"Retry-After": "0.1"} if fault == 429 else {}
        elif fault == "cut":
            choice = {"message": {"content": said[:20]}, "finish_reason": "length"}
        elif fault is not None:
            choice = {"message": {"content": fault.replace("SAID", said)}}
        answer = {"choices": [choice]} if code == 200 else {"error": {"message": "no"}}
        data = json.dumps(answer).encode()
        handler.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


def png(colour, size=(16, 16)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def colour_of(n, checkpoint):
    """No two are the same, or they would be judged once."""
    draw = random.Random(f"{n} {checkpoint}")
    own = (n % 20, n // 20, int(checkpoint == "b"))
    return tuple(20 * draw.randint(0, 10) + offset for offset in own)


def make_run(folder, count, checkpoints=("a", "b"), kinds=("add", "style", "remove")):
    """A folder as ip2p evaluate edits leaves it."""
    numbers = {"seed": None, "p": None, "cfg": None}
    rows = [
        PairRecord(
            original_image=png((n, n, n)),
            edited_image=png((n, 0, 0)),
            original_prompt="",
            edited_prompt="",
            edit_prompt=f'make it "{n}" {{please}}',
            kind=kinds[n % len(kinds)] if kinds else None,
            key=f"{n}/0",
            **numbers,
        )
        for n in range(count)
    ]
    edits, _ = write_truth(rows, folder)
    for label in checkpoints:
        (folder / "edits" / label).mkdir(parents=True)
        for one in edits:
            (folder / "edits" / label / one.name).write_bytes(png(colour_of(one.number, label)))
    return folder


def marks_by_hand(n, label, rubric, votes=1):
    colour = colour_of(n, label)
    if rubric is IMGEDIT:
        done, well, kept = scores_of(colour, "edit")
        return {"done": done, "done well": well, "kept": kept, "overall": (done + well + kept) / 3}
    found = []
    for vote in range(votes):
        following, quality = min(scores_of(colour, "following", vote)), min(scores_of(colour, "quality"))
        found.append({"SC": following, "PQ": quality, "overall": math.sqrt(following * quality)})
    return {name: sum(one[name] for one in found) / votes for name in found[0]}


# What comes out


@pytest.mark.parametrize("rubric", [VIESCORE, IMGEDIT], ids=lambda rubric: rubric.name)
def test_marks_ranks_means_and_intervals_are_those_by_hand(rubric, tmp_path):
    edits, _ = edits_of(make_run(tmp_path / "run", 12))
    with Judge() as server:
        found = judge(edits, rubric, server.config(), tmp_path / "out")
    questions = 2 if rubric is VIESCORE else 1
    assert len(server.bodies) == 24 * questions
    rows = judged_rows(found)
    for row in rows:
        wanted = marks_by_hand(int(row["edited"][:6]), row["checkpoint"], rubric)
        assert {name: row[name] for name in wanted} == pytest.approx(wanted)
    (main, by_kind) = judgement_tables(found, rows, {})
    numbers = {}
    for label in ("a", "b"):
        marks = [marks_by_hand(n, label, rubric) for n in range(12)]
        kinds = [[one for n, one in enumerate(marks) if n % 3 == k] for k in range(3)]
        mean = {name: fmean(fmean(one[name] for one in some) for some in kinds) for name in rubric.names}
        # add, remove, style: resampled within each, in the order of their names, from the seeds 0, 1, 2.
        drawn = []
        for seed, k in enumerate((0, 2, 1)):
            values = np.array([one["overall"] for one in kinds[k]])
            draws = np.random.default_rng(seed).multinomial(4, [1 / 4] * 4, size=1000)
            drawn.append((draws * values).sum(1) / 4)
        numbers[label] = mean, np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    order = sorted(numbers, key=lambda label: -numbers[label][0]["overall"])
    assert [(row[0], row[1], row[2]) for row in main.rows] == [(label, n + 1, 12) for n, label in enumerate(order)]
    for row in main.rows:
        mean, (low, high) = numbers[row[0]]
        assert row[3:-2] == tuple(f"{mean[name]:.2f}" for name in rubric.names)
        assert row[-2] == f"{low:.2f} to {high:.2f}"
    assert main.rows[-1][-1] == "" and main.rows[0][-1].endswith("%")
    assert len(by_kind.rows) == 6 and {row[2] for row in by_kind.rows} == {4}


def test_pictures_and_words_are_sent_as_the_rubrics_say(tmp_path):
    edits, _ = edits_of(make_run(tmp_path / "run", 1, ["a"]))
    with Judge() as server:
        judge(edits, VIESCORE, server.config(concurrency=1), tmp_path / "vie")
        judge(edits, IMGEDIT, server.config(), tmp_path / "img")
    following, quality, edit = server.bodies
    assert [len(body["messages"][0]["content"]) - 1 for body in server.bodies] == [2, 1, 2]
    assert 'It was asked: "make it "0" {please}"' in seen(following)[0] and "please" not in seen(quality)[0]
    assert seen(following)[1] == [(0, 0, 0), colour_of(0, "a")] and seen(quality)[1] == [colour_of(0, "a")]
    assert "is what should be added there" in seen(edit)[0]
    sizes = []
    for body in server.bodies:
        data = body["messages"][0]["content"][1]["image_url"]["url"].partition("base64,")[2]
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
    assert sizes == [(512, 512), (512, 512), (16, 16)]
    assert [imgedit_kind(kind) for kind in ("Adjust", "compose", "what", None)] == [
        "alter",
        "compose",
        "other",
        "other",
    ]


def test_votes_are_averaged_and_their_agreement_is_that_by_hand(tmp_path):
    edits, _ = edits_of(make_run(tmp_path / "run", 6, ["a"], kinds=None))
    with Judge() as server:
        found = judge(edits, VIESCORE, server.config(temperature=0.7), tmp_path / "out", votes=3)
    rows = judged_rows(found)
    for row in rows:
        wanted = marks_by_hand(int(row["edited"][:6]), "a", VIESCORE, votes=3)
        assert {name: row[name] for name in wanted} == pytest.approx(wanted)
    main, agreed = judgement_tables(found, rows, {})
    carried = [[scores_of(colour_of(n, "a"), "following", vote)[0] for vote in range(3)] for n in range(6)]
    lines = {line[0]: line[1:] for line in agreed.rows}
    assert lines["carried out"] == (
        6,
        f"{slow_alpha(carried):.3f}",
        f"{sum(len(set(u)) == 1 for u in carried) / 6:.1%}",
    )
    assert lines["natural"][1:] == ("1.000", "100.0%")


def slow_alpha(units):
    """Krippendorff's alpha by its definition, pair by pair."""
    pairable = [unit for unit in units if len(unit) > 1]
    every = [value for unit in pairable for value in unit]
    observed = 0.0
    for unit in pairable:
        for i, a in enumerate(unit):
            for j, b in enumerate(unit):
                if i != j:
                    observed += (a - b) ** 2 / (len(unit) - 1)
    expected = sum((a - b) ** 2 for i, a in enumerate(every) for j, b in enumerate(every) if i != j)
    return 1 - (observed / len(every)) / (expected / (len(every) * (len(every) - 1)))


def test_agreement_is_krippendorffs_alpha():
    draw = random.Random(1)
    for _ in range(20):
        units = [[draw.randint(0, 10) for _ in range(draw.randint(1, 4))] for _ in range(9)]
        units.append([1, 2])
        assert agreement(units)[0] == pytest.approx(slow_alpha(units), abs=1e-12)
    assert agreement([[1, 1], [5, 5], [7]]) == (1.0, 1.0)
    assert agreement([[3, 3], [3]]) == (None, 1.0)
    assert agreement([[1], []]) == (None, None)


# What goes wrong


def test_limits_losses_cut_offs_and_thoughts_change_nothing(tmp_path):
    edits, _ = edits_of(make_run(tmp_path / "run", 5))
    thoughts = '<think>{"score": [1, 1]} {"score": [0]}</think>```json\nSAID\n```'
    faults = {1: 429, 2: "drop", 3: 500, 4: "cut", 6: thoughts, 8: 503, 9: "so: SAID, that is all", 11: "cut", 15: 429}
    with Judge(faults) as server:
        found = judge(edits, VIESCORE, server.config(concurrency=2), tmp_path / "out")
    assert not found.rejected and not server.faults
    for row in judged_rows(found):
        assert row["overall"] == pytest.approx(
            marks_by_hand(int(row["edited"][:6]), row["checkpoint"], VIESCORE)["overall"]
        )


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (400, "refused"),
        ("I'm sorry, I can't help with that.", "malformed"),
        ('{"score": [11, 3]}', "malformed"),
        ('{"score": [3]}', "malformed"),
        ('{"score": ["nan", true]}', "malformed"),
        ("", "malformed"),
    ],
)
def test_what_cannot_be_used_is_left_out_counted_and_asked_again_on_wish(fault, reason, tmp_path):
    edits, _ = edits_of(make_run(tmp_path / "run", 3, ["a"], kinds=None))
    with Judge({3: fault}) as server:
        config = server.config(concurrency=1)
        found = judge(edits, VIESCORE, config, tmp_path / "out")
        assert found.rejected == {reason: 1} and [len(one.votes) for one in found.verdicts] == [1, 0, 1]
        (main,) = judgement_tables(found, judged_rows(found), {})
        assert main.rows[0][2] == 2 and f"1 {reason}; 1 edits have no score" in main.note
        asked = len(server.bodies)
        assert judge(edits, VIESCORE, config, tmp_path / "out").rejected == {reason: 1}
        assert len(server.bodies) == asked
        again = judge(edits, VIESCORE, config, tmp_path / "out", retry_rejected=True)
        assert not again.rejected and len(server.bodies) == asked + 1


def test_scores_written_as_text_are_read(tmp_path):
    edits, _ = edits_of(make_run(tmp_path / "run", 1, ["a"], kinds=None))
    with Judge({1: '{"score": ["7", 3.5]}'}) as server:
        found = judge(edits, VIESCORE, server.config(concurrency=1), tmp_path / "out")
    assert found.verdicts[0].votes[0]["following"] == [7.0, 3.5]


def test_a_model_that_cannot_see_ends_the_run_with_one_sentence(tmp_path):
    edits, _ = edits_of(make_run(tmp_path / "run", 3, ["a"]))
    with Judge({"always": 400}) as server, pytest.raises(CaptionError, match="refused the request"):
        judge(edits, VIESCORE, server.config(), tmp_path / "out")
    with Judge({"always": "no"}) as server:
        found = judge(edits, VIESCORE, server.config(), tmp_path / "other")
    with pytest.raises(DatasetError, match="no edit has a score; the judge's answers were malformed"):
        judgement_tables(found, judged_rows(found), {})


def test_a_stop_keeps_what_was_answered(tmp_path):
    edits, _ = edits_of(make_run(tmp_path / "run", 4, ["a"]))
    done = []
    hooks = Hooks(on_progress=lambda n, of, note: done.append(n), should_stop=lambda: len(done) > 3)
    with Judge() as server:
        with pytest.raises(Interrupted, match="stopped with 3 answers"):
            judge(edits, VIESCORE, server.config(concurrency=1), tmp_path / "out", hooks=hooks)
        lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
        assert len(lines) == 3
        judge(edits, VIESCORE, server.config(concurrency=1), tmp_path / "out")
    assert len(server.bodies) <= 8 + 2
    assert (tmp_path / "out" / "answers.jsonl").read_text().splitlines()[:3] == lines


# What is asked again, and what it costs


def test_an_answer_is_known_by_all_that_it_depends_on(tmp_path):
    run = make_run(tmp_path / "run", 2, ["a"])
    edits, _ = edits_of(run)
    with Judge() as server:

        def asked(config=None, votes=1, rubric=VIESCORE):
            before = len(server.bodies)
            judge(edits_of(run)[0], rubric, config or server.config(), tmp_path / "out", votes=votes)
            return len(server.bodies) - before

        assert cost_of(edits, VIESCORE, server.config(), tmp_path / "out").requests == 4
        assert asked() == 4 and asked() == 0
        assert cost_of(edits, VIESCORE, server.config(), tmp_path / "out").known == 4
        assert asked(votes=2) == 4 and asked(votes=2) == 0
        assert asked(server.config(model="other")) == 4
        assert asked(server.config(temperature=0.5)) == 4
        assert asked(rubric=IMGEDIT) == 2
        (run / "edits" / "a" / edits[0].name).write_bytes(png((1, 2, 3)))
        assert asked() == 2
        (run / "source" / edits[1].name).write_bytes(png((9, 9, 9)))
        assert asked() == 1  # quality is judged without the source


def test_the_cost_is_said_before_anything_is_asked(tmp_path, capsys):
    make_run(tmp_path / "run", 2)
    words = ["evaluate", "judge", str(tmp_path / "run"), "--server", "http://127.0.0.1:9/v1", "--model", "m", "--plan"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    # 4 edits, 2 questions, 3 pictures of 512 x 512 each; 28 x 28 pixels or 4 letters a token.
    assert said.startswith("4 edits: 8 requests with 12 pictures, about ")
    letters = sum(len(part.text) for n in (0, 1) for part in VIESCORE.parts(None, f'make it "{n}" {{please}}'))
    assert f"about {round(12 * 512 * 512 / 784 + 2 * letters / 4):,} tokens in and at most 2,400 out" in said
    assert not (tmp_path / "run" / "judged-viescore").exists()


@pytest.mark.parametrize("kwargs", [{"votes": 0}])
def test_bad_settings_are_refused(kwargs, tmp_path):
    edits, _ = edits_of(make_run(tmp_path / "run", 1, ["a"]))
    with pytest.raises(ConfigError, match="`votes` is 0"):
        cost_of(edits, VIESCORE, ServerConfig(base_url="http://x/v1", model="m"), tmp_path, **kwargs)
    with pytest.raises(DatasetError, match="holds no edits"):
        make_run(tmp_path / "empty", 1, [])
        edits_of(tmp_path / "empty")
    with pytest.raises(DatasetError, match=r"holds no edits\.jsonl"):
        edits_of(tmp_path)


# The benchmarks' files


def test_gedits_files_are_read_and_written(tmp_path):
    rows = [
        {"key": f"k{n}", "task_type": kind, "instruction": f"do {n}", "instruction_language": language}
        for n, (kind, language) in enumerate(
            (k, lang) for k in ("color_alter", "style_change") for lang in ("en", "cn")
        )
    ]
    (tmp_path / "gedit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n, row in enumerate(rows):
        place = tmp_path / "mine" / "fullset" / row["task_type"] / row["instruction_language"]
        place.mkdir(parents=True)
        (place / f"{row['key']}_SRCIMG.png").write_bytes(png((n, n, n)))
        (place / f"{row['key']}.png").write_bytes(png(colour_of(n, "a")))
    words = ["evaluate", "judge", str(tmp_path / "mine"), "--edits", str(tmp_path / "gedit.jsonl"), "--model", "eye"]
    with Judge() as server:
        assert cli.main([*words, "--server", server.url, "--out", str(tmp_path / "out")]) == 0
    content = list(csv.DictReader((tmp_path / "out" / "mine_en_color_alter_gpt_score.csv").open()))
    assert [row["instruction"] for row in content] == ["do 0"]
    wanted = marks_by_hand(0, "a", VIESCORE)
    assert (float(content[0]["sementics_score"]), float(content[0]["quality_score"])) == (wanted["SC"], wanted["PQ"])
    assert content[0]["edited_image"].endswith("mine/fullset/color_alter/en/k0.png")
    again = read_scores(tmp_path / "out" / "mine_en_combined_gpt_score.csv", VIESCORE)
    assert [(row["kind"], row["edited"]) for row in again] == [("color_alter", "k0"), ("style_change", "k2")]
    assert again[1]["overall"] == pytest.approx(marks_by_hand(2, "a", VIESCORE)["overall"])


@pytest.mark.parametrize(
    "wrong", [{"key": "../../private"}, {"task_type": "../.."}, {"instruction_language": "../.."}, {"key": "a\\..\\b"}]
)
def test_no_picture_of_this_machine_is_shown_to_a_server(wrong, tmp_path):
    row = {"key": "k", "task_type": "add", "instruction": "do", "instruction_language": "en", **wrong}
    (tmp_path / "gedit.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DatasetError, match="does not lie below"):
        edits_of(tmp_path, tmp_path / "gedit.jsonl")
    (tmp_path / "imgedit.json").write_text(json.dumps({"a": {"id": "../b.png", "prompt": "do", "edit_type": "add"}}))
    with pytest.raises(DatasetError, match="does not lie below"):
        edits_of(tmp_path, tmp_path / "imgedit.json")


@pytest.mark.parametrize(
    ("following", "quality", "fine"), [("0", "10", 1), ("-1", "-1", 0), ("11", "3", 0), ("nan", "1", 0)]
)
def test_scores_of_others_are_from_0_to_10(following, quality, fine, tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text(f"edited_image,sementics_score,quality_score\na/b/c.png,{following},{quality}\n")
    if fine:
        assert read_scores(path, VIESCORE)[0]["overall"] == 0
    else:
        with pytest.raises(DatasetError, match="of 0 to 10"):
            read_scores(path, VIESCORE)


def test_imgedits_files_are_read_and_written_and_stand_below_a_line(tmp_path, capsys):
    described = {
        str(n): {"id": f"animal/{n}.png", "prompt": f"do {n}", "edit_type": ("add", "adjust")[n % 2]} for n in range(4)
    }
    (tmp_path / "basic_edit.json").write_text(json.dumps(described))
    (tmp_path / "pictures" / "animal").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    for n in range(4):
        (tmp_path / "pictures" / "animal" / f"{n}.png").write_bytes(png((n, n, n)))
        if n < 3:
            (tmp_path / "mine" / f"{n}.png").write_bytes(png(colour_of(n, "a")))
    (tmp_path / "theirs.json").write_text(
        json.dumps(
            {"0": "Brief reasoning: none.\nPrompt Compliance: 1\nVisual: 4\nDetail: 4", "1": "no idea", "2": 4.5}
        )
    )
    words = ["evaluate", "judge", tmp_path / "mine", "--as", "imgedit", "--edits", tmp_path / "basic_edit.json"]
    words += ["--sources", tmp_path / "pictures", "--model", "eye", "--out", tmp_path / "out"]
    words += ["--beside", f"theirs={tmp_path / 'theirs.json'}"]
    with Judge() as server:
        assert cli.main([str(word) for word in [*words, "--server", server.url]]) == 0
        assert cli.main([str(word) for word in [*words, "--server", server.url]]) == 0
        said = capsys.readouterr()
        assert len(server.bodies) == 3
        second = [str(word) for word in [*words[:-2], "--server", server.url]]
        second[second.index("eye")] = "another"
        assert cli.main(second) == 0
    assert "1 pictures in all; their edits are left out" in said.err
    above, _, below = said.out.partition("-- By other prompts or another judge")
    assert "mine" in above and "mine" not in below.partition("by kind")[0]
    assert "InstructPix2Pix" in below and "1.88" in below
    theirs = next(line for line in below.splitlines() if line.startswith("theirs"))
    assert "3.75" in theirs  # add: (3 + 4.5) / 2; the one that is no score is left out
    home = tmp_path / "out" / "mine"
    hand = {str(n): marks_by_hand(n, "a", IMGEDIT) for n in range(3)}
    assert json.loads((home / "average_score.json").read_text()) == {k: round(v["overall"], 2) for k, v in hand.items()}
    kinds = {
        "add": round(fmean((hand["0"]["overall"], hand["2"]["overall"])), 2),
        "adjust": round(hand["1"]["overall"], 2),
    }
    assert json.loads((home / "typescore.json").read_text()) == kinds
    for key, text in json.loads((home / "result.json").read_text()).items():
        numbers = [int(line.split(": ")[1]) for line in text.splitlines() if line.split(": ")[1].isdigit()]
        assert numbers == [hand[key][name] for name in ("done", "done well", "kept")]
    # A second judge's rows are above the line now, and the first one's below it.
    above, _, below = capsys.readouterr().out.partition("-- By other prompts or another judge")
    assert "ImgEdit by another" in above and "mine, by eye, prompts 1" in below


def test_a_table_of_ones_own_is_judged(tmp_path):
    rows = ["source,edited,instruction,kind,checkpoint"]
    for n, label in ((0, "a"), (0, "b"), (1, "a"), (1, "b")):
        (tmp_path / f"{n}.png").write_bytes(png((n, n, n)))
        (tmp_path / f"{n}{label}.png").write_bytes(png(colour_of(n, label)))
        rows.append(f"{n}.png,{n}{label}.png,do {n},add,{label}")
    (tmp_path / "mine.csv").write_text("\n".join([*rows, "0.png,gone.png,do 0,add,a"]) + "\n")
    edits, missing = edits_of(tmp_path / "mine.csv")
    assert missing == [str(tmp_path / "gone.png")]
    with Judge() as server:
        found = judge(edits, IMGEDIT, server.config(), tmp_path / "out")
    wanted = [marks_by_hand(n, label, IMGEDIT)["overall"] for n in (0, 1) for label in "ab"]
    assert [row["overall"] for row in judged_rows(found)] == pytest.approx(wanted)
    (main,) = judgement_tables(found, judged_rows(found), {})
    assert main.rows[0][-1].endswith("%")  # both are paired by what was asked of which picture
    for text, said in (("source,edited,instruction\n", "names none"), ("source\nx\n", "and no edited")):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(DatasetError, match=said):
            edits_of(tmp_path / "bad.csv")
    with pytest.raises(DatasetError, match="no folder and no"):
        edits_of(tmp_path / "0.png")


@pytest.mark.slow
def test_a_benchmarks_edits_are_made_and_judged(tmp_path, capsys):
    """ImgEdit's JSON beside its pictures, GEdit-Bench's table with pictures inside; one picture is missing."""
    (tmp_path / "pictures" / "animal").mkdir(parents=True)
    for n in range(2):
        (tmp_path / "pictures" / "animal" / f"{n}.png").write_bytes(png((60 * n, 9, 9), (64, 64)))
    described = {f"k{n}": {"id": f"animal/{n}.png", "prompt": "make it red", "edit_type": "style"} for n in range(3)}
    (tmp_path / "basic_edit.json").write_text(json.dumps({**described, "out": {**described["k0"], "id": "../x.png"}}))
    rows = [
        {"key": f"g{n}", "task_type": "color_alter", "instruction": "make it red", "instruction_language": language}
        | {"input_image_raw": {"bytes": png((60 * n, 99, 9), (64, 64)), "path": None}, "Intersection_exist": True}
        for n, language in enumerate(("en", "cn"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "gedit.parquet")
    common = ["--clip", "embedded", "--steps", "1", "--device", "cpu", "--checkpoint", "mine=embedded"]
    for name, more in (("basic_edit.json", ["--sources", tmp_path / "pictures"]), ("gedit.parquet", [])):
        words = ["evaluate", "edits", tmp_path / name, *common, *more, "--out", tmp_path / f"run-{name}"]
        assert cli.main([str(word) for word in words]) == 0
        said = capsys.readouterr()
        assert "MagicBrush: " not in said.out and "CLIP-im" in said.out
        assert ("2 rows were left out" in said.err) == (name == "basic_edit.json")
        with Judge() as server:
            how = "imgedit" if name == "basic_edit.json" else "viescore"
            words = [
                "evaluate",
                "judge",
                tmp_path / f"run-{name}",
                "--as",
                how,
                "--model",
                "eye",
                "--server",
                server.url,
            ]
            assert cli.main([str(word) for word in words]) == 0
    result = json.loads((tmp_path / "run-basic_edit.json" / "judged-imgedit" / "mine" / "result.json").read_text())
    assert list(result) == ["k0", "k1"]
    home = tmp_path / "run-gedit.parquet" / "judged-viescore"
    (line,) = csv.DictReader((home / "mine_cn_color_alter_gpt_score.csv").open())
    assert (line["instruction_language"], line["intersection_exist"]) == ("cn", "True")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({**dict.fromkeys(("key", "task_type", "instruction"), "x"), "edited_image": "y.png"}))
    assert is_bare(tmp_path / "gedit.parquet") and not is_bare(pairs) and not is_bare(tmp_path)
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    saved["train"] = saved["train"].cast_column("input_image_raw", datasets.Image())
    saved.save_to_disk(tmp_path / "gedit")  # as the hub has it
    found, broken = write_bare(tmp_path / "gedit", tmp_path / "copy")
    assert is_bare(tmp_path / "gedit") and not broken and [one.about["key"] for one in found] == ["g0", "g1"]
    assert found[1].source.read_bytes() == rows[1]["input_image_raw"]["bytes"]


# Pairs of a data set


def make_store(folder, count=6):
    """Pairs with CLIP's scores, two a caption; the judge thinks of pair n what colour_of(n, "a") says."""
    sims = {"sim_0": 0.9, "sim_1": 0.9, "sim_image": 0.9}
    with PairWriter(folder, manifest={"config": {}}) as writer:
        for n in range(count):
            texts = {"original_prompt": f"a {n // 2}", "edited_prompt": f"b {n // 2}", "edit_prompt": f"do {n // 2}"}
            pictures = {"original_image": png((n, n, n)), "edited_image": png(colour_of(n, "a"))}
            numbers = {"seed": n, "p": 0.5, "cfg": 7.5, **sims, "sim_direction": 0.9 - n / 100}
            writer.write(PairRecord(**pictures, **texts, **numbers, key=f"{n:07d}/{n}", scores={"own": float(n)}))
    return folder


def test_pairs_carry_their_scores_and_are_filtered_by_them(tmp_path, capsys):
    store = make_store(tmp_path / "pairs")
    words = ["dataset", "judge", store, "--out", tmp_path / "judged", "--model", "eye", "--concurrency", "1"]
    with Judge({3: "no idea"}) as server:
        config = server.config(concurrency=1)
        found = judge_pairs(store, tmp_path / "engine", VIESCORE, config)
        assert (found.new, found.rejected, len(server.bodies)) == (5, 1, 12)
        assert judge_pairs(store, tmp_path / "engine", VIESCORE, config).new == 0 and len(server.bodies) == 12
        again = judge_pairs(store, tmp_path / "engine", VIESCORE, config, retry_rejected=True)
        assert (again.new, len(server.bodies)) == (1, 13)
        assert cli.main([str(word) for word in [*words, "--server", server.url, "--plan"]]) == 0
        assert capsys.readouterr().out.startswith("12 requests with 18 pictures")
        assert cli.main([str(word) for word in [*words, "--server", server.url]]) == 0
    overall = [marks_by_hand(n, "a", VIESCORE)["overall"] for n in range(6)]
    for pair, mark in zip(PairStore(tmp_path / "judged"), overall, strict=True):
        assert pair.scores["viescore_overall"] == pytest.approx(mark) and "own" in pair.scores
    floor = sorted(overall)[3]
    good = [f"{n:07d}/{n}" for n in range(6) if overall[n] >= floor]
    chosen = PairStore(tmp_path / "judged")
    assert verify(tmp_path / "judged").sound
    where = Reading(where=f"scores.viescore_overall >= {floor:.9f}")
    assert [pair.key for pair in open_pairs(tmp_path / "judged", where)] == good
    report = refilter(chosen.folder, tmp_path / "kept", FilterConfig(keep=1), least={"viescore_overall": floor})
    best = {}  # of each caption pair the first good one, since CLIP's direction falls with n
    for key in good:
        best.setdefault(int(key[:7]) // 2, key)
    assert [pair.key for pair in PairStore(tmp_path / "kept")] == list(best.values()) and report.below == 3
    words = ["filter", str(tmp_path / "judged"), "--min-score", f"viescore_overall={floor - 1e-6:.6f}"]
    assert cli.main(words) == 0
    assert "3 pairs were left out before, by their scores" in capsys.readouterr().out
    assert cli.main([*words[:-1], "nothing=3"]) == 2
    assert "no pair of" in (said := capsys.readouterr().err) and "viescore_PQ" in said
    assert cli.main([*words[:-1], "nothing"]) == 2


# Killed


@pytest.mark.slow
def test_fifty_edits_are_judged_killed_and_resumed_to_the_same(tmp_path):
    run = make_run(tmp_path / "run", 50)
    faults = {5: 429, 17: "drop", 40: "cut", 60: 500, 77: "SAID", 90: 429}

    def command(server, out):
        words = ["evaluate", "judge", run, "--server", server.url, "--model", "eye", "--out", out, "--concurrency", "3"]
        environment = {**os.environ, "no_proxy": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-m", "ip2p_engine", *map(str, words)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    with Judge() as server:
        whole = command(server, tmp_path / "whole").communicate()[0]
        assert len(server.bodies) == 200
    lives, draw = 0, random.Random(3)
    with Judge(faults, pause=0.005) as server:
        for _ in range(4):
            life, target = command(server, tmp_path / "parts"), len(server.bodies) + draw.randint(8, 60)
            while len(server.bodies) < target and life.poll() is None:
                time.sleep(0.002)
            if life.poll() is None:
                os.kill(life.pid, signal.SIGKILL)
                lives += 1
            life.communicate()
        assert command(server, tmp_path / "parts").communicate()[0] == whole
        asked = len(server.bodies)
    assert lives == 4 and asked <= 200 + len(faults) + 3 * lives + 1
    for name in ("rows.jsonl", "a_combined_gpt_score.csv", "b_style_gpt_score.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    tables = [json.loads((tmp_path / name / "run.json").read_text())["tables"] for name in ("whole", "parts")]
    assert tables[0] == tables[1]
    answers = [
        {row["key"]: row for row in map(json.loads, (tmp_path / name / "answers.jsonl").read_text().splitlines())}
        for name in ("whole", "parts")
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 200
