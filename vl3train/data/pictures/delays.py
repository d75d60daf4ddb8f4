"""How long each frame of a GIF, an animated WebP or an animated PNG is shown, from the file's blocks alone."""

from __future__ import annotations

from collections.abc import Iterator

from vl3train.contracts.records import SampleError

SHORTEST, INSTEAD = 0.010, 0.100
"""A delay of up to 10 ms is shown as 100 ms: Chromium's and Firefox's rule, as such files were made for viewers that
could be no faster. FFmpeg 8.1 does so for a delay of 0 only (tested: tests/data/pictures/test_picture_clips.py)."""
NO_DELAY = 0.0

GIF, PNG = b"GIF8", b"\x89PNG\r\n\x1a\n"


def is_moving(data: bytes) -> bool:
    """Whether this is a GIF, a WebP or an animated PNG; one of a single frame, too."""
    if data.startswith(PNG):
        return any(kind == b"acTL" for kind, _ in _png_chunks(data))
    return data.startswith(GIF) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def frame_delays(data: bytes) -> tuple[float, ...]:
    """(F,) seconds that each frame is shown.

    Raises:
        SampleError: the file has no frame, or ends inside a block.
    """
    if data.startswith(GIF):
        delays = list(_gif_delays(data))
    elif data.startswith(PNG):
        chunks = list(_png_chunks(data))
        if not chunks or chunks[-1][0] != b"IEND":
            raise _cut_off("PNG")
        controls = [body for kind, body in chunks if kind == b"fcTL" and len(body) >= 24]
        delays = [_fraction(body[20:22], body[22:24]) for body in controls]
    else:
        delays = list(_webp_delays(data)) or [NO_DELAY]  # one picture has no such chunk
    if not delays:
        raise SampleError("moving picture without a frame; fetch it again")
    return tuple(INSTEAD if delay <= SHORTEST else delay for delay in delays)


def first_is_apart(data: bytes) -> bool:
    """Whether an animated PNG begins with a picture that is no frame: the one that older viewers show."""
    if not data.startswith(PNG):
        return False
    kinds = [kind for kind, _ in _png_chunks(data)]
    return b"IDAT" in kinds and b"fcTL" in kinds and kinds.index(b"IDAT") < kinds.index(b"fcTL")


def _gif_delays(data: bytes) -> Iterator[float]:
    if len(data) < 13:
        raise _cut_off("GIF")
    position, delay = 13 + _table_bytes(data[10]), NO_DELAY
    while position < len(data) and data[position] != 0x3B:  # trailer
        if data[position] == 0x21:  # extension
            if data[position + 1 : position + 3] == b"\xf9\x04":
                delay = int.from_bytes(data[position + 4 : position + 6], "little") / 100
            position = _behind_blocks(data, position + 2)
        elif data[position] == 0x2C:  # frame
            if position + 10 > len(data):
                raise _cut_off("GIF")
            position = _behind_blocks(data, position + 11 + _table_bytes(data[position + 9]))
            yield delay
            delay = NO_DELAY
        else:
            position += 1  # fill between blocks


def _table_bytes(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _behind_blocks(data: bytes, position: int) -> int:
    """Where the block behind a row of sub-blocks begins: each has its length first, the last one length 0."""
    while position < len(data):
        size = data[position]
        position += 1 + size
        if not size:
            return position
    raise _cut_off("GIF")


def _webp_delays(data: bytes) -> Iterator[float]:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise _cut_off("WebP")
    position = 12
    while position + 8 <= end:
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"ANMF":
            yield int.from_bytes(data[position + 20 : position + 23], "little") / 1000
        position += 8 + size + size % 2


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind of each chunk, with its first bytes."""
    position = len(PNG)
    while position + 12 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        yield data[position + 4 : position + 8], data[position + 8 : position + 8 + min(size, 26)]
        position += 12 + size


def _fraction(above: bytes, below: bytes) -> float:
    return int.from_bytes(above, "big") / (int.from_bytes(below, "big") or 100)


def _cut_off(form: str) -> SampleError:
    return SampleError(f"{form} is cut off inside a block; fetch it again")
