"""A server of the campaign's own that sends what no honest one does."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SAYS = (
    "right",
    "longer",
    "shorter",
    "unsaid",
    "endless",
    "more",
    "elsewhere",
    "circle",
    "page",
    "error",
    "backwards",
    "huge",
)
FILES = ("tiny.safetensors", "tiny.ckpt", "picture.png")
ENDLESS = 1 << 26  # a block; the client has to be the one that ends it


class Unfair(BaseHTTPRequestHandler):
    """``/HOW/NAME``: a file of the seeds, and what is said of it."""

    home: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        how, _, name = self.path.strip("/").partition("/")
        data = (self.home / name).read_bytes() if name in FILES else b"<html>"
        with suppress(OSError):
            self._answer(how, data)
        self.close_connection = True

    def _answer(self, how: str, data: bytes) -> None:
        first, last = self._asked(len(data))
        size: int | None = {"longer": len(data) + 1000, "shorter": len(data) - 1000, "huge": 2**62}.get(how, len(data))
        code = {"elsewhere": 302, "circle": 302, "error": 500}.get(how, 206 if first or last < len(data) - 1 else 200)
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "file:///etc/passwd" if how == "elsewhere" else self.path)
        if how in ("unsaid", "endless"):
            size = None
        if how == "backwards":
            self.send_header("Content-Range", f"bytes {last}-{first}/{len(data)}")
        elif code == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size or len(data)}")
            size = None if size is None else size - len(data) + last + 1 - first
        if how == "page":
            self.send_header("Content-Type", "text/html")
        if size is not None:
            self.send_header("Content-Length", str(size))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET" and code != 302:
            self.wfile.write(data[first : last + 1])
            while how in ("endless", "more") or (how == "huge" and first == 0):
                self.wfile.write(bytes(ENDLESS))

    def _asked(self, size: int) -> tuple[int, int]:
        said = self.headers.get("Range", "")
        if not said.startswith("bytes="):
            return 0, size - 1
        first, _, last = said.removeprefix("bytes=").partition("-")
        return min(int(first or 0), size), min(int(last or size - 1), size - 1)


def _serve(home: Path, port: Path, parent: int) -> None:
    handler = type("Handler", (Unfair,), {"home": home})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port.write_text(str(server.server_port))
    while os.getppid() == parent:
        time.sleep(0.2)


def address_of(seeds: Path, rng: random.Random) -> Callable[[], str]:
    """Gives addresses of the server, which is started by the first case that asks, and ends with the campaign."""
    port = seeds / f"port-{os.getpid()}"
    if not port.exists():
        parent = os.getpid()
        if not os.fork():
            with suppress(BaseException):
                _serve(seeds, port, parent)
            os._exit(0)
        while not port.exists() or not port.read_text():
            time.sleep(0.02)

    def address() -> str:
        return f"http://127.0.0.1:{port.read_text()}/{rng.choice(SAYS)}/{rng.choice(FILES)}"

    return address
