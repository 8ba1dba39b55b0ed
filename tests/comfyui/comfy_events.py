"""What ComfyUI tells its page while it works: the few frames of a WebSocket that a test needs."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

TEXT, BINARY, CLOSE, PING = 1, 2, 8, 9
PICTURE, LINE = 1, 3  # ComfyUI's binary messages


class Listener:
    """One client of a server's /ws; ``events`` are (kind, data).

    Previews are ("preview", bytes of the picture), lines in a node ("text", (node, line)).
    """

    def __init__(self, port: int, client: str, *, timeout: float = 120) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET /ws?clientId={client} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self._socket.sendall(request.encode())
        self._stream = self._socket.makefile("rb")
        status = self._stream.readline()
        if b" 101 " not in status:
            raise ConnectionError(status.decode())
        while self._stream.readline().strip():
            pass

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def events(self) -> Iterator[tuple[str, Any]]:
        """Everything until the server closes."""
        while True:
            opcode, payload = self._frame()
            if opcode == CLOSE:
                return
            if opcode == TEXT:
                message = json.loads(payload)
                yield message["type"], message["data"]
            elif opcode == BINARY and struct.unpack(">I", payload[:4])[0] == PICTURE:
                yield "preview", payload[8:]
            elif opcode == BINARY and struct.unpack(">I", payload[:4])[0] == LINE:
                (length,) = struct.unpack(">I", payload[4:8])
                yield "text", (payload[8 : 8 + length].decode(), payload[8 + length :].decode())

    def _frame(self) -> tuple[int, bytes]:
        opcode, payload, final = 0, b"", False
        while not final:
            first, second = self._stream.read(2)
            final, opcode = bool(first & 0x80), (first & 0x0F) or opcode
            length = second & 0x7F
            if length > 125:
                length = int.from_bytes(self._stream.read(2 if length == 126 else 8), "big")
            payload += self._stream.read(length)
        return opcode, payload
