"""The recipe of the embedded models: stages that stop and go on, share their work, and end in the files that ship."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ip2p_engine.checkpoint.source import EMBEDDED_FOLDER
from ip2p_engine.errors import ConfigError, Interrupted
from ip2p_engine.hooks import Hooks
from ip2p_engine.scenes.recipe.stages import export_embedded, train_stage
from ip2p_engine.scenes.recipe.tables import words_in_use
from ip2p_engine.train.checkpoints import latest, load_checkpoint
from ip2p_engine.train.config import preset
from ip2p_engine.train.stage import run_stage

ROOT = Path(__file__).parent.parent.parent


class SmallStage:
    """Two layers learn a rotation; the matrices are Muon's, the biases AdamW's."""

    def __init__(self, **overrides):
        self.config = preset("embedded", **{"steps": 8, "batch_size": 6, "save_every": 3, "warm_up": 2, **overrides})
        torch.manual_seed(0)
        self.trained = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.seen = []

    def draw(self, step, generator):
        self.seen.append(step)
        return {"x": torch.randn(self.config.batch_size, 4, generator=generator)}

    def loss(self, batch, step):
        error = self.trained(batch["x"]) - batch["x"].roll(1, dims=1)
        return error.square().mean(), {"largest": error.detach().abs().max().item()}


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in rows(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, weights) of a stage that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "stage"
    return folder, run_stage(SmallStage(), folder)


def test_a_stage_that_stops_goes_on_to_the_same_weights(whole, tmp_path):
    folder, weights = whole
    done = []
    with pytest.raises(Interrupted, match="stopped after step 4; the same call goes on"):
        hooks = Hooks(on_result=lambda *at: done.append(at), should_stop=lambda: len(done) >= 3)
        run_stage(SmallStage(), tmp_path, hooks=hooks)
    again = SmallStage()
    resumed = run_stage(again, tmp_path)
    assert again.seen == [4, 5, 6, 7]
    assert losses(tmp_path) == losses(folder)
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    finished = run_stage(again, tmp_path)
    assert len(again.seen) == 4
    assert all(torch.equal(finished[name], value) for name, value in weights.items())


def test_what_comes_back_is_the_average_and_not_the_last_step(whole):
    folder, weights = whole
    saved = load_checkpoint(latest(folder / "checkpoints"))
    assert all(torch.equal(saved["ema"][name], value) for name, value in weights.items())
    assert not torch.equal(saved["trained"]["0.weight"], weights["0.weight"])


def test_the_log_has_the_rate_and_the_stage_s_own_figures(whole):
    seen = rows(whole[0])
    assert [row["step"] for row in seen] == [*range(1, 9)]
    expected = [2e-3 * min(1, (step + 1) / 2) * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert [row["learning_rate"] for row in seen] == pytest.approx(expected)
    assert all(row["largest"] > 0 for row in seen)


def test_a_folder_of_another_run_is_refused(whole):
    with pytest.raises(ConfigError, match="holds a run with batch_size 6 and now it is 4"):
        run_stage(SmallStage(batch_size=4), whole[0])


@pytest.mark.slow
def test_two_processes_train_as_one(whole, tmp_path):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [__file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*program, *script], env=environment, check=True, timeout=300, capture_output=True)
    assert losses(tmp_path) == pytest.approx(losses(whole[0]), rel=1e-5)


def test_a_finished_stage_is_left_alone(tmp_path):
    kept = tmp_path / "clip.safetensors"
    save_file({"a": torch.ones(1)}, kept)
    train_stage("clip", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def shipped(name):
    (path,) = (EMBEDDED_FOLDER / name).glob("*.safetensors")
    return load_file(path)


def test_the_shipped_files_come_of_the_stages_weights(tmp_path):
    """The shipped models taken apart into finished stages, and exported again."""
    words, vae, clip = words_in_use(), shipped("vae"), shipped("clip")
    text, name = shipped("text_encoder"), "embeddings.token_embedding.weight"
    painter = {f"text.{key}": value[words] if key == name else value for key, value in text.items()}
    painter |= {f"unet.{key}": value for key, value in shipped("unet_text_to_image").items()}
    clip["token_embedding.weight"] = clip["token_embedding.weight"][words]
    decoder = {key: value for key, value in vae.items() if key.startswith(("decoder.", "post_quant_conv."))}
    tower = {key: value for key, value in clip.items() if not key.startswith("visual.")}
    stages = {"autoencoder": vae, "decoder": decoder, "clip": clip, "clip-text": tower}
    stages |= {"text-to-image": painter, "edit": shipped("unet")}
    for stage, weights in stages.items():
        save_file(weights, tmp_path / f"{stage}.safetensors")
    export_embedded(tmp_path, tmp_path / "out")
    for part in ("vae", "clip", "text_encoder", "unet_text_to_image", "unet"):
        (path,) = (tmp_path / "out" / part).glob("*.safetensors")
        written, known = load_file(path), shipped(part)
        assert written.keys() == known.keys()
        assert all(torch.equal(written[key].float(), value.float()) for key, value in known.items()), part
    for path in ("scheduler/scheduler_config.json", "ip2p_config.json"):
        assert json.loads((tmp_path / "out" / path).read_text()) == json.loads((EMBEDDED_FOLDER / path).read_text())
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index.items() >= json.loads((EMBEDDED_FOLDER / "model_index.json").read_text()).items()
    assert "tokenizer" not in index


if __name__ == "__main__":
    run_stage(SmallStage(), Path(sys.argv[1]))
