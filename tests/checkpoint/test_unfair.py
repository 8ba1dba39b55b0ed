"""Servers and hubs that do not mean well: what is brought is what was promised, or nothing, and one sentence."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from huggingface_hub import constants

from ip2p_engine import cli
from ip2p_engine.checkpoint import download, published, source
from ip2p_engine.checkpoint.recognise import choose_files
from ip2p_engine.errors import CheckpointError
from ip2p_engine.files import is_within, web_stream

sys.path.append(str(Path(__file__).parents[1] / "robustness"))
servers = importlib.import_module("servers")


def served(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def unfair(sd1_file, tmp_path, monkeypatch):
    """The address of the campaign's server, whose sound file is a checkpoint."""
    monkeypatch.setenv("IP2P_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(servers, "ENDLESS", 1 << 16)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "tiny.ckpt").write_bytes(Path(sd1_file).read_bytes())
    server, address = served(type("Handler", (servers.Unfair,), {"home": tmp_path / "served"}))
    yield address
    server.shutdown()
    server.server_close()


def fetching(monkeypatch, *addresses):
    known = replace(published.published("hive-rw"), addresses=addresses)
    table = tuple(known if one.name == known.name else one for one in published.PUBLISHED)
    monkeypatch.setattr(published, "PUBLISHED", table)
    return cli.main(["fetch", "hive-rw"])


def brought(tmp_path):
    return (tmp_path / "cache" / "checkpoints" / "hive-rw.ckpt").read_bytes()


@pytest.mark.parametrize("how", ["right", "more"])
def test_of_what_never_ends_the_promised_bytes_are_brought(how, unfair, sd1_file, tmp_path, monkeypatch):
    whole = Path(sd1_file).read_bytes()
    assert fetching(monkeypatch, f"{unfair}/{how}/tiny.ckpt") == 0
    assert brought(tmp_path) == whole


def test_a_fetch_from_the_web_goes_on(unfair, sd1_file, tmp_path, monkeypatch):
    whole, part = Path(sd1_file).read_bytes(), tmp_path / "cache" / "checkpoints" / "hive-rw.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[:1000])
    assert fetching(monkeypatch, f"{unfair}/right/tiny.ckpt") == 0
    assert brought(tmp_path) == whole


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("longer", "fetch it again to go on"),
        ("huge", "make room first"),
        ("unsaid", "does not say how long it is"),
        ("endless", "does not say how long it is"),
        ("elsewhere", "cannot be read"),
        ("circle", "cannot be read"),
        ("error", "cannot be read"),
    ],
)
def test_a_server_that_says_other_lengths_or_leads_elsewhere(how, says, unfair, tmp_path, monkeypatch, capsys):
    assert fetching(monkeypatch, f"{unfair}/{how}/tiny.ckpt") == 2
    said = capsys.readouterr().err
    assert says in said.splitlines()[-1] and "Traceback" not in said
    assert not (tmp_path / "cache" / "checkpoints" / "hive-rw.ckpt").exists()


@pytest.mark.parametrize("how", ["longer", "huge"])
def test_a_checkpoint_at_an_address_is_whole_or_not_here(how, unfair, tmp_path):
    with pytest.raises(CheckpointError, match=r"broke off at|make room first"):
        source.local_copy(f"{unfair}/{how}/tiny.ckpt", "ema")
    assert not [one for one in (tmp_path / "cache" / "checkpoints").iterdir() if one.suffix != ".lock"]


def test_a_server_that_does_not_go_on(unfair):
    with pytest.raises(OSError, match="does not go on where the file broke off"):
        web_stream(f"{unfair}/backwards/tiny.ckpt", start=7)


def test_a_password_is_for_the_address_s_own_server():
    seen = []

    class Asking(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(302 if self.path == "/a" else 200)
            self.send_header("Location", "/b")
            self.end_headers()

    server, address = served(Asking)
    web_stream(f"{address.replace('//', '//me:s%20t@')}/a").close()
    server.shutdown()
    server.server_close()
    assert seen == [("/a", "Basic bWU6cyB0"), ("/b", None)]


def test_what_the_disk_does_not_hold(tmp_path):
    free = download.shutil.disk_usage(tmp_path).free
    download.check_room(free // 2, tmp_path)
    with pytest.raises(CheckpointError, match="left; make room first"):
        download.check_room(2 * free, tmp_path)


@pytest.mark.parametrize(
    ("name", "inside"),
    [("unet/config.json", True), ("a..b/c", True), ("../x.json", False), ("a/../../x", False), ("/etc/x.json", False)]
    + [("..\\x.json", False), ("C:/x.json", False), ("\\\\host\\x.json", False)],
)
def test_names_that_stay_below(name, inside):
    assert is_within(name) is inside
    assert choose_files([name, "unet/config.json"]) == sorted(
        {"unet/config.json", *([name] if name[-4:] == "json" and inside else [])}
    )


def test_keys_of_shared_storage_lead_nowhere_else(tmp_path, monkeypatch):
    storage, wrong = fsspec.filesystem("memory"), "/edit/../../../../escaped.json"
    monkeypatch.setenv("IP2P_CACHE", str(tmp_path / "cache"))
    storage.pipe("/edit/unet/config.json", b"{}")
    found = ["/edit/unet/config.json", wrong]
    monkeypatch.setattr(storage, "find", lambda path, **_: found)
    assert source._folder(storage, "/edit", "ema") == {"unet/config.json": "/edit/unet/config.json"}
    fsspec.filesystem("memory").store.clear()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as reading a repository needs; ``how`` says in what it lies."""

    files: dict[str, bytes]
    how: str

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path.startswith("/api/"):
            names = [{"rfilename": name} for name in self.files]
            return self.answer(json.dumps({"id": "owner/name", "sha": "1" * 40, "siblings": names}).encode())
        name = self.path.partition("/resolve/")[2].partition("/")[2].partition("?")[0]
        data = self.files.get(name.replace("%2E", "."), b"")
        etag = hashlib.sha256(data + (b"other" if self.how == "digest" else b"")).hexdigest()
        return self.answer(data, **{"ETag": f'"{etag}"', "X-Repo-Commit": "1" * 40})

    do_HEAD = do_GET

    def answer(self, data, **headers):
        size = len(data) + (1000 if self.how == "longer" and headers else 0)
        self.send_response(200)
        for name, text in {"Content-Length": str(size), "Connection": "close", **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path, monkeypatch, sd1_file):
    """The real client on a hub of ours."""
    handler = type("Handler", (Hub,), {"files": {"edit.safetensors": Path(sd1_file).read_bytes()}, "how": ""})
    server, address = served(handler)
    for name, value in (("ENDPOINT", address), ("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(tmp_path / "hub"))):
        monkeypatch.setattr(constants, name, value)
    for name in ("HUGGINGFACE_CO_URL_TEMPLATE",):
        monkeypatch.setattr(constants, name, address + "/{repo_id}/resolve/{revision}/{filename}")
    known = replace(published.published("cosxl"), repository="owner/name", file="edit.safetensors", gated=False)
    monkeypatch.setattr(published, "PUBLISHED", (known,))
    yield handler
    server.shutdown()
    server.server_close()


def test_the_hub_s_content_is_held_against_its_digest(hub, tmp_path, capsys, sd1_file):
    hub.how = "digest"
    assert cli.main(["fetch", "cosxl"]) == 2
    assert "came damaged; fetch it again" in capsys.readouterr().err
    hub.how = ""
    assert cli.main(["fetch", "cosxl"]) == 0
    here = Path(capsys.readouterr().out.splitlines()[-1])
    assert here.read_bytes() == Path(sd1_file).read_bytes()


def test_a_hub_that_breaks_off(hub, capsys):
    hub.how = "longer"
    assert cli.main(["fetch", "cosxl"]) == 2
    assert "the hub does not give it" in capsys.readouterr().err


def test_a_hub_whose_names_lead_elsewhere(hub, tmp_path, capsys, sd1_file):
    hub.files = {"../../../../escaped.safetensors": b"x", "unet/../../../../escaped/model.safetensors": b"x"}
    assert cli.main(["inspect", "owner/name"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.rglob("escaped*"))
