"""Whether a picture's file looks whole, without decoding it: for the index, which decodes only those that do not.

It finds a file that is cut off, filled with zeros or other bytes, or joined wrongly. It does not find changed bits
inside a JPEG's, GIF's or WebP's compressed data: those show only when the picture is decoded.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

PNG_START = b"\x89PNG\r\n\x1a\n"
SOS, EOI, DRI = 0xDA, 0xD9, 0xDD
RESTARTS = range(0xD0, 0xD8)
JPEG_SEGMENTS = (0xC4, 0xCC, *range(0xDA, 0xE0), *range(0xE0, 0xF0), 0xFE)
"""Markers that may follow a scan: tables, the next scan, application data and comments (ITU-T T.81, B.1.1.3)."""


def looks_whole(data: bytes) -> bool:
    """Whether nothing speaks against the file: False means that only decoding can tell.

    TIFF and BMP have nothing that is cheap to check, so they never do.

    >>> looks_whole(b"GIF89a" + bytes(7)), looks_whole(b"GIF89a" + bytes(7) + b";")
    (False, True)
    """
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data.startswith(PNG_START):
        return _png(data)
    if data.startswith(b"RIFF"):
        return len(data) >= 12 and 8 + int.from_bytes(data[4:8], "little") <= len(data)
    return data.startswith(b"GIF8") and _gif(data)


def _png(data: bytes) -> bool:
    """Whether all chunks up to the end mark have the checksum that stands behind them."""
    position = len(PNG_START)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            return False
        if zlib.crc32(memoryview(data)[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if kind == b"IEND":
            return True
        position = end + 4
    return False


def _gif(data: bytes) -> bool:
    """Whether blocks follow each other up to the trailer (GIF89a, 15 to 27)."""
    try:
        position = 13 + _gif_palette(data[10])
        while data[position] != 0x3B:
            if data[position] == 0x2C:  # a picture: its place, its own palette, the size of its codes
                position += 11 + _gif_palette(data[position + 9])
            elif data[position] == 0x21:  # an extension
                position += 2
            else:
                return False
            while data[position]:  # pieces, each behind its length
                position += 1 + data[position]
            position += 1
    except IndexError:
        return False
    return True


def _gif_palette(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _jpeg(data: bytes) -> bool:
    """Whether segments follow each other up to the end mark, and scans hold only the markers that belong in them."""
    position, interval, scans = 2, 0, 0
    places, kinds = _jpeg_markers(data)
    while True:
        marker = data[position + 1 : position + 2]
        if data[position : position + 1] != b"\xff" or not marker:
            return False
        if marker[0] == 0xFF:  # fill
            position += 1
            continue
        if marker[0] == EOI:
            return scans > 0
        if scans and marker[0] not in JPEG_SEGMENTS:
            return False
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker[0] == DRI:
            interval = int.from_bytes(data[position + 4 : position + 6], "big")
        position += 2 + max(2, length)
        if marker[0] == SOS:
            first = last = int(np.searchsorted(places, position))
            while last < len(kinds) and kinds[last] in RESTARTS:
                last += 1
            if last == len(kinds) or not _restarts_in_order(kinds[first:last], interval):
                return False
            position, scans = int(places[last]), scans + 1


def _jpeg_markers(data: bytes) -> tuple[np.ndarray, list[int]]:
    """Where a byte FF stands before another one than 00 (a byte of data) and FF (fill), in order, and that byte."""
    values = np.frombuffer(data, np.uint8)
    places = np.flatnonzero(values[:-1] == 0xFF)
    kinds = values[places + 1]
    marks = (kinds != 0) & (kinds != 0xFF)
    return places[marks], kinds[marks].tolist()


def _restarts_in_order(kinds: list[int], interval: int) -> bool:
    found = [kind & 7 for kind in kinds]
    return not found or (interval > 0 and found == [number % 8 for number in range(len(found))])
