"""Pushing a run to a hub and going on from it, against a hub that the test serves, through the real client."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from ip2p_engine.errors import ConfigError
from ip2p_engine.networks.model import load_model
from ip2p_engine.train import TrainConfig
from ip2p_engine.train.hub import model_card

REPOSITORY = "me/edit"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that pushing and fetching models need; large files go by LFS."""

    files: dict[str, bytes]
    blobs: dict[str, bytes]
    state: dict
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def answer(self, value, code=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        data = self.body()
        if self.state.get("down"):
            return self.answer({"error": "closed for the day"}, 500)
        if self.path == "/api/repos/create":
            self.state["created"] = json.loads(data)
            return self.answer({"url": f"{self.server_url}/{REPOSITORY}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            large = (".pt", ".safetensors")
            return self.answer(
                {
                    "files": [
                        {
                            "path": one["path"],
                            "uploadMode": "lfs" if one["path"].endswith(large) else "regular",
                            "shouldIgnore": False,
                        }
                        for one in json.loads(data)["files"]
                    ]
                }
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = []
            for one in json.loads(data)["objects"]:
                place = {"actions": {"upload": {"href": f"{self.server_url}/blob/{one['oid']}"}}}
                objects.append({**one, **({} if one["oid"] in self.blobs else place)})
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for line in data.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                if entry["key"] == "lfsFile":
                    self.files[value["path"]] = self.blobs[value["oid"]]
                if entry["key"] == "deletedFile":
                    del self.files[value["path"]]
            self.state["commits"] = self.state.get("commits", 0) + 1
            oid = f"{self.state['commits']:040x}"
            return self.answer({"commitUrl": f"{self.server_url}/{REPOSITORY}/commit/{oid}", "commitOid": oid})
        return self.answer({"error": self.path}, 404)

    def do_PUT(self):
        data = self.body()
        self.blobs[hashlib.sha256(data).hexdigest()] = data
        self.answer(b"")

    def do_GET(self):
        if self.path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            return self.answer(
                [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in sorted(self.files.items())]
            )
        if self.path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in sorted(self.files)]
            return self.answer({"id": REPOSITORY, "sha": "1" * 40, "siblings": siblings})
        name = self.path.partition("/resolve/")[2].partition("/")[2].partition("?")[0]
        if name in self.files:
            etag = hashlib.sha256(self.files[name]).hexdigest()
            return self.answer(self.files[name], ETag=f'"{etag}"', X_Repo_Commit="1" * 40)
        return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    handler = type("Served", (Hub,), {"files": {}, "blobs": {}, "state": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.server_url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", handler.server_url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", handler.server_url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    server.shutdown()
    server.server_close()


def rows(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_pushed_run_goes_on_elsewhere_as_if_it_had_never_moved(hub, run, store, tmp_path):
    settings = {"save_every": 1, "validate_every": 2, "validation_count": 1, "validation_pairs": 2}
    whole = run("whole", steps=4, **settings)
    run("here", steps=2, **settings, push_to_hub=REPOSITORY, push_every=1)
    created = hub.state["created"]  # "visibility" since version 2 of the client
    assert created["name"] == "edit" and (created.get("private") or created.get("visibility") == "private")
    assert hub.state["commits"] == 2
    assert {n for n in hub.files if n.startswith("checkpoints/")} == {"checkpoints/step-00000002.pt"}
    said = json.loads(hub.files["run.json"])
    assert "directory" not in said and str(tmp_path) not in json.dumps({**said, "config": {}})
    card = hub.files["README.md"].decode()
    assert "after 2 of 2 steps" in card and "![loss](loss.png)" in card and str(tmp_path) not in card
    again = run("there", steps=4, **settings, resume_from_hub=REPOSITORY)
    assert rows(tmp_path / "there") == rows(tmp_path / "whole")
    one, other = (load_model(result.files["ema"], device="cpu").unet.state_dict() for result in (whole, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert sorted(p.name for p in (tmp_path / "there" / "validation").iterdir()) == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    assert not list((tmp_path / "there").rglob("*.incomplete")) and not (tmp_path / "there" / ".cache").exists()
    loaded = load_model(REPOSITORY, device="cpu")
    assert loaded.spec.in_channels == 8 and loaded.spec.weights == "ema"


@pytest.mark.slow
def test_a_hub_that_is_down_ends_no_run_on_its_way(hub, run, tmp_path, caplog):
    from ip2p_engine.hooks import Hooks

    def close(step, _):
        hub.state["down"] = step == 1

    hooks = Hooks(on_result=close)
    result = run(steps=3, save_every=1, push_to_hub=REPOSITORY, push_every=2, hooks=hooks)
    assert result.finished and hub.state["commits"] == 1, "the one in between failed, the last came through"
    assert "the hub does not do what was asked of me/edit" in caplog.text
    hub.state["down"] = True
    with pytest.raises(ConfigError, match="the hub does not do .* give the same call again"):
        run(steps=3, push_to_hub=REPOSITORY)
    with pytest.raises(ConfigError, match="the hub does not do"):
        run("new", data="no such data", push_to_hub=REPOSITORY)
    assert not (tmp_path / "new").exists()


def test_what_is_no_run_is_not_gone_on_with(hub, run, tmp_path):
    hub.files["README.md"] = b"# nothing"
    with pytest.raises(ConfigError, match="me/edit holds no run to go on with"):
        run(resume_from_hub=REPOSITORY)
    for settings, message in (
        ({"push_to_hub": "edit"}, "push_to_hub is 'edit'; give owner/name"),
        ({"resume_from_hub": "a/../b"}, "resume_from_hub is"),
        ({"push_every": 2}, "push_every is of pushes"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**settings)


def test_a_model_card_is_valid_and_says_what_was_seen():
    from dataclasses import asdict

    about = {"config": asdict(TrainConfig()), "base": "owner/base", "data": "my-pairs", "test_pairs": 7}
    about |= {"spec": {"family": "sd1", "prediction": "v", "in_channels": 8}, "licences": ["cc-by-4.0"]}
    text = model_card(about, [{"step": 5, "raw": 0.5, "ema": 0.25}], ["ema.safetensors", "loss.png"], REPOSITORY, 5)
    card = huggingface_hub.ModelCard(text)
    assert card.data.base_model == "owner/base" and card.data.pipeline_tag == "image-to-image"
    for part in ("# edit", "after 5 of 10,000 steps", "cc-by-4.0", "7 pairs of the test split", "| 5 | 0.50000 |"):
        assert part in text
    assert "--checkpoint hf://me/edit/ema.safetensors" in text and "learning_rate | 0.0001" in text
