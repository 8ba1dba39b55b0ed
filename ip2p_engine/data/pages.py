"""Where in a Parquet file the values of a column lie, so that one can be read without its hundred neighbours.

Libraries read a column by row groups. A store's pictures are stored as they are (PLAIN, uncompressed), so a value is a
range of bytes: https://parquet.apache.org/docs/file-format (page headers, RLE levels, PLAIN byte arrays).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import Any, BinaryIO

__all__ = ["NoPlainValues", "dictionary_size", "places_of"]

HEADERS, WINDOW, MOST_VALUES = (2**8, 2**20), 2**16, 10**6
DATA_PAGE, DICTIONARY_PAGE, PLAIN = 0, 2, 0
BOOLEANS, WHOLES, DOUBLE, BINARY, STRUCT = (1, 2), (3, 4, 5, 6), 7, 8, 12


class NoPlainValues(Exception):
    """The column is stored otherwise."""


def places_of(stream: BinaryIO, chunk: Any, *, most_levels: int) -> array[int]:
    """Of each row of a column chunk its value's place and length, flat; a length of -1 where there is none.

    ``chunk``: pyarrow's metadata of it; ``most_levels``: the level at which a value is there. Raises NoPlainValues.
    """
    if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page or chunk.physical_type != "BYTE_ARRAY":
        raise NoPlainValues
    if chunk.num_values > MOST_VALUES:
        raise NoPlainValues
    found, at, end = array("q"), chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    while len(found) < 2 * chunk.num_values and at < end:
        header, size = _header(stream, at)
        page = header.get(5)
        if header.get(1) != DATA_PAGE or not isinstance(page, dict) or page.get(2) != PLAIN or header.get(3, -1) < 0:
            raise NoPlainValues
        at += size
        levels, start = _levels(stream, at, min(page[1], chunk.num_values), most_levels)
        found.extend(_values(stream, start, levels, most_levels))
        at += header[3]
    if len(found) != 2 * chunk.num_values:
        raise NoPlainValues
    return found


def dictionary_size(stream: BinaryIO, chunk: Any) -> int:
    """Bytes of a column chunk's dictionary, unfolded; 0 where it has none, or where its first page is no page."""
    try:
        header, _ = _header(stream, min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset))
    except (NoPlainValues, OSError, RecursionError, ValueError):  # as Arrow will say when it reads it
        return 0
    size = header.get(2)
    return size if header.get(1) == DICTIONARY_PAGE and isinstance(size, int) else 0


def _header(stream: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """(a page's header, its length); statistics in it may be long."""
    for size in HEADERS:
        stream.seek(at)
        try:
            return _struct(memoryview(stream.read(size)), 0)
        except IndexError:
            continue
    raise NoPlainValues


def _levels(stream: BinaryIO, at: int, count: int, most: int) -> tuple[list[int], int]:
    """(the level of each row, where the values begin)."""
    if most == 0:
        return [0] * count, at
    stream.seek(at)
    (size,) = struct.unpack("<I", stream.read(4))
    data, width, n = stream.read(size), most.bit_length(), 0
    levels: list[int] = []
    while len(levels) < count and n < len(data):
        run, n = _varint(data, n)
        if run & 1:  # groups of eight, packed bit by bit
            for group in range(n, n + (run >> 1) * width, width):
                if len(levels) >= count:
                    break
                bits = int.from_bytes(data[group : group + width], "little")
                levels += [bits >> (width * k) & ((1 << width) - 1) for k in range(8)]
            n += (run >> 1) * width
        else:
            levels += [data[n]] * min(run >> 1, count - len(levels))
            n += 1
    return levels[:count], at + 4 + size


def _values(stream: BinaryIO, at: int, levels: list[int], most: int) -> Iterator[int]:
    """A length of four bytes and the value, one after the other."""
    window, start = b"", at
    for level in levels:
        if level < most:
            yield from (0, -1)
            continue
        if not start <= at <= start + len(window) - 4:
            stream.seek(at)
            window, start = stream.read(WINDOW), at
        (length,) = struct.unpack_from("<I", window, at - start)
        yield from (at + 4, length)
        at += 4 + length


def _struct(data: memoryview, at: int) -> tuple[dict[int, Any], int]:
    """Thrift's compact protocol: ({number of the field: value}, where it ends)."""
    found: dict[int, Any] = {}
    number = 0
    while data[at]:
        step, kind = data[at] >> 4, data[at] & 15
        at += 1
        if step:
            number += step
        else:
            raw, at = _varint(data, at)
            number = _signed(raw)
        found[number], at = _field(data, at, kind)
    return found, at + 1


def _field(data: memoryview, at: int, kind: int) -> tuple[Any, int]:
    if kind in BOOLEANS:
        return kind == BOOLEANS[0], at
    if kind in WHOLES:
        if kind == WHOLES[0]:
            return data[at], at + 1
        raw, at = _varint(data, at)
        return _signed(raw), at
    if kind == DOUBLE:
        return None, at + 8
    if kind == BINARY:
        length, at = _varint(data, at)
        return None, at + length
    if kind == STRUCT:
        return _struct(data, at)
    raise NoPlainValues  # lists and maps are in no page header


def _varint(data: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise NoPlainValues


def _signed(raw: int) -> int:
    return (raw >> 1) ^ -(raw & 1)
