"""Whether a file is whole although its header announces more than its last frame shows: read from its structure.

A picture that stays at the end, and AVI's empty chunks, which repeat the frame before, look like a file that is cut
off: few frames, a long duration. The bytes tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator

RIFF_LISTS = {b"RIFF", b"LIST"}
EBML, SEGMENT, CLUSTER, BLOCK_GROUP = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0xA0
IN_SEGMENT = {0x114D9B74, 0x1549A966, 0x1654AE6B, CLUSTER, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367}
IN_CLUSTER = {0xE7, 0x5854, 0xA7, 0xAB, 0xA3, BLOCK_GROUP, 0xAF}
ANYWHERE = {0xEC, 0xBF}  # Void, CRC-32


def avi_chunks(data: bytes, stream: int) -> int:
    """Video chunks of a stream that lie in the file whole, also empty ones."""
    names = {f"{stream:02d}{kind}".encode() for kind in ("dc", "db")}
    return sum(name in names for name in _riff_names(data))


def _riff_names(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name in RIFF_LISTS:
            at += 12  # its chunks follow
            continue
        if at + 8 + size > len(data):
            return
        yield name
        at += 8 + size + size % 2


def matroska_is_whole(data: bytes) -> bool:
    """Whether every element down to the blocks is one of Matroska's and ends within the file."""
    return all(_matroska_elements(data))


def _matroska_elements(data: bytes) -> Iterator[bool]:
    at, known = 0, {EBML, SEGMENT} | ANYWHERE
    while at < len(data):
        element, start = _number(data, at, keep_mark=True)
        size, start = _number(data, start, keep_mark=False)
        if element == SEGMENT:
            yield size is None or start + size <= len(data)
            at, known = start, IN_SEGMENT | ANYWHERE
        elif element == CLUSTER and element in known:
            at, known = start, IN_SEGMENT | IN_CLUSTER | ANYWHERE
        else:
            yield element in known and size is not None and start + size <= len(data)
            at = start + (size or 0)


def _number(data: bytes, at: int, *, keep_mark: bool) -> tuple[int | None, int]:
    """An EBML number and where it ends; None where it says that the size is not known."""
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(data[at : at + length], "big")
    if not first or at + length > len(data):
        return -1, len(data)
    if keep_mark:
        return value, at + length
    value &= (1 << 7 * length) - 1
    return (None if value == (1 << 7 * length) - 1 else value), at + length
