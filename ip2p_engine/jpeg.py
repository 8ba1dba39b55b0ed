"""How often a JPEG goes over its pixels: a scan of some bytes takes a whole pass, and a file may have a million."""

from __future__ import annotations

import re
from typing import BinaryIO

__all__ = ["MOST_SCANS", "count_scans"]

MOST_SCANS = 64
"""Encoders write some ten."""
MARK = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # not those within coded data
END, SCAN = b"\xff\xd9", b"\xff\xda"
MOST_BYTES = 1 << 28


def count_scans(stream: BinaryIO) -> int:
    """The scans of a file (ITU T.81, annex B), at most one more than ``MOST_SCANS``; not of what lies behind its end.

    The stream's place stays.
    """
    place = stream.tell()
    stream.seek(0)
    data, at, count = stream.read(MOST_BYTES), 2, 0
    stream.seek(place)
    while (mark := MARK.search(data, at)) and mark[0] != END and count <= MOST_SCANS:
        count += mark[0] == SCAN
        at = mark.end() + int.from_bytes(data[mark.end() : mark.end() + 2], "big")
    return count
