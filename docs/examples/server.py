"""A server that edits for several users at once with one loaded checkpoint.

python server.py [PORT] [CHECKPOINT], then:
curl --data-binary @photo.jpg "http://127.0.0.1:8000/?instruction=make+it+snow&seed=1" > edited.png
"""

from __future__ import annotations

import io
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from ip2p_engine import InstructPix2Pix, IP2PError

MOST_BYTES = 20 * 2**20


def make_server(port: int, checkpoint: str = "embedded") -> ThreadingHTTPServer:
    """One thread a request; nothing that an edit needs lies in the editor, so none disturbs another."""
    editor = InstructPix2Pix.load(checkpoint)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            if length > MOST_BYTES:
                self.send_error(413, f"a picture has at most {MOST_BYTES} bytes")
                return
            try:
                asked = parse_qs(urlsplit(self.path).query)
                seed = int(asked.get("seed", ["0"])[0])
                edited = editor.edit(self.rfile.read(length), asked["instruction"][0], seeds=seed)[0]
            except (IP2PError, KeyError, ValueError) as error:
                self.send_error(400, str(error).splitlines()[0][:200])
                return
            png = io.BytesIO()
            edited.image.save(png, "PNG")
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            self.wfile.write(png.getvalue())

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    make_server(int(sys.argv[1]) if sys.argv[1:] else 8000, *sys.argv[2:3]).serve_forever()
