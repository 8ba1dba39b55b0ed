"""The ablation, end to end in small: trains, resumes, and compares."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from ip2p_engine.cli import main
from ip2p_engine.data.store import PairRecord, PairWriter
from ip2p_engine.scenes.grammar import sample_edits
from ip2p_engine.scenes.world import render


def png(scene):
    stream = io.BytesIO()
    render(scene).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def store(tmp_path):
    with PairWriter(tmp_path / "pairs", manifest={}) as writer:
        for n, edit in enumerate(sample_edits(24, seed=1, held_out=False)):
            texts = {
                "edit_prompt": edit.instruction,
                "original_prompt": edit.caption,
                "edited_prompt": edit.edited_caption,
            }
            pictures = {"original_image": png(edit.source), "edited_image": png(edit.target)}
            writer.write(PairRecord(**pictures, **texts, seed=n, p=None, cfg=None, key=f"{n}"))
    return tmp_path / "pairs"


@pytest.mark.slow
def test_one_command_trains_and_compares_and_goes_on(store, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["evaluate", "ablation", "scenes", "--filtered", str(store), "--unfiltered", str(store)]
    command += ["--share", "1", "0.1", "--steps", "2", "--batch-size", "2", "--n", "1", "--text-cfg", "1", "7.5"]
    assert main([*command, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("100 % of the pairs", "10 % of the pairs", "without the filter"))
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 2 and len({row["fingerprint"] for row in rows}) >= 2
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("ema.safetensors")}
    assert len(weights) == 3
    assert main([*command, "--out", str(out)]) == 0
    assert (out / "rows.jsonl").read_text().count("\n") == len(rows)
    assert json.loads((out / "run.json").read_text())["kind"] == "ablation"
    assert Image.open(out / "examples.png").width > 5 * 128  # before, one a training, the truth
    assert main(["evaluate", "report", str(out)]) == 0
    assert "Ablation" in (out / "report.html").read_text()
