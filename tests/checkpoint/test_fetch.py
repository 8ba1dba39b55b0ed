"""``ip2p fetch`` through the real client, against a hub that the test serves: cut off, gone on with, gated, by name."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import constants

from ip2p_engine import cli
from ip2p_engine.checkpoint.download import fetched
from ip2p_engine.checkpoint.published import published
from ip2p_engine.networks.model import load_model

COMMIT = "1" * 40
MAGICBRUSH, COSXL = "osunlp/InstructPix2Pix-MagicBrush", "stabilityai/cosxl"


class Hub(BaseHTTPRequestHandler):
    """What fetching models asks of the hub: lists, heads, files and parts of files; a gated one asks for a token."""

    files: dict[str, bytes]
    """By repository/file."""
    asked: list[tuple[str, str]]
    """(file, Range) of each download."""
    most: dict[str, int | None]
    """Bytes that are still sent before the line is cut, and cut again; None: all."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def answer(self, body, code=200, **headers):
        self.send_response(code)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command == "GET":
            left = self.most["bytes"]
            self.wfile.write(body[:left])
            if left is not None:
                self.most["bytes"], self.close_connection = max(0, left - len(body)), True

    def do_GET(self):
        path = unquote(self.path.partition("?")[0]).removeprefix("/")
        if path.startswith("api/models/"):
            repository = "/".join(path.split("/")[2:4])
            names = [name.removeprefix(f"{repository}/") for name in self.files if name.startswith(f"{repository}/")]
            about = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            if "/tree/" in path:
                sizes = {name: len(self.files[f"{repository}/{name}"]) for name in names}
                about = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes.items()]
            return self.answer(json.dumps(about).encode()) if names else self.refuse("RepoNotFound", 404)
        repository, _, rest = path.partition("/resolve/")
        name = f"{repository}/{rest.partition('/')[2]}"
        if repository == COSXL and self.headers.get("Authorization") != "Bearer hf_accepted":
            return self.refuse("GatedRepo", 403)
        if name not in self.files:
            return self.refuse("EntryNotFound", 404)
        body, wanted = self.files[name], self.headers.get("Range", "")
        told = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if self.command == "GET":
            self.asked.append((name, wanted))
        if not wanted:
            return self.answer(body, **told)
        start = int(wanted.removeprefix("bytes=").partition("-")[0])
        span = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.answer(body[start:], 206, Content_Range=span, **told)

    do_HEAD = do_GET

    def refuse(self, kind, code):
        return self.answer(b"{}", code, X_Error_Code=kind, X_Error_Message=kind)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    handler = type("Served", (Hub,), {"files": {}, "asked": [], "most": {"bytes": None}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    for name in ("HF_TOKEN", *(f"{kind}_proxy" for kind in ("http", "https", "all"))):
        for spelt in (name, name.upper()):
            monkeypatch.delenv(spelt, raising=False)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def checkpoint(sd1, ldm_tensors, tmp_path):
    """An authors' file of two sets of weights; its bytes."""
    torch.save({"state_dict": ldm_tensors(sd1)}, tmp_path / "authors.ckpt")
    return (tmp_path / "authors.ckpt").read_bytes()


def test_a_file_that_was_cut_off_goes_on_and_goes_by_name(hub, checkpoint, sd1, same_model, capsys):
    known = published("magicbrush")
    name = f"{MAGICBRUSH}/{known.file}"
    hub.files[name], hub.most["bytes"] = checkpoint, len(checkpoint) // 3
    assert cli.main(["fetch", "magicbrush"]) == 2
    told = capsys.readouterr().err
    assert "the hub does not give it" in told and "Traceback" not in told and fetched(known) is None
    hub.most["bytes"] = None
    before = len(hub.asked)
    assert cli.main(["fetch", "magicbrush"]) == 0
    (again,) = hub.asked[before:]
    assert again[0] == name and int(again[1].removeprefix("bytes=").removesuffix("-")) >= len(checkpoint) // 4
    place = capsys.readouterr().out.strip()
    assert str(fetched(known)) == place
    hub.files.clear()  # what is here needs no hub
    same_model(load_model("magicbrush", text_heads=4), sd1)
    assert cli.main(["fetch"]) == 0 and f"here: {place}" in capsys.readouterr().out


def test_a_pipeline_comes_in_what_loading_needs(hub, sd1, sd1_folder, checkpoint, same_model, capsys):
    repository = published("instruct-pix2pix").repository
    for path in sd1_folder.rglob("*"):
        if path.is_file():
            hub.files[f"{repository}/{path.relative_to(sd1_folder).as_posix()}"] = path.read_bytes()
    hub.files[f"{repository}/instruct-pix2pix-00-22000.ckpt"] = checkpoint
    assert cli.main(["fetch", "instruct-pix2pix"]) == 0
    assert not any(name.endswith(".ckpt") for name, _ in hub.asked)
    hub.files.clear()
    assert cli.main(["fetch"]) == 0 and "here: " in capsys.readouterr().out  # though the client has a part of it
    same_model(load_model("instruct-pix2pix"), sd1)


def test_a_licence_is_accepted_on_its_page(hub, checkpoint, tmp_path, capsys):
    known = published("cosxl")
    hub.files[f"{COSXL}/{known.file}"] = checkpoint
    assert cli.main(["fetch", "cosxl"]) == 2
    told = capsys.readouterr().err
    assert f"accepted at {known.page}" in told and "Traceback" not in told
    (tmp_path / "token").write_text("hf_accepted")  # what `hf auth login` leaves
    assert cli.main(["fetch", "cosxl"]) == 0
    assert fetched(known).read_bytes() == checkpoint


def test_what_came_damaged_is_not_kept(hub, checkpoint, tmp_path, capsys):
    known = published("magicbrush")
    hub.files[f"{MAGICBRUSH}/{known.file}"] = checkpoint
    blobs = tmp_path / "cache" / f"models--{MAGICBRUSH.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{hashlib.sha256(checkpoint).hexdigest()}.part"
    part.write_bytes(b"x" * 1000)
    assert cli.main(["fetch", "magicbrush"]) == 2
    assert "came damaged; fetch it again" in capsys.readouterr().err and not part.exists()
    assert cli.main(["fetch", "magicbrush"]) == 0 and fetched(known).read_bytes() == checkpoint
