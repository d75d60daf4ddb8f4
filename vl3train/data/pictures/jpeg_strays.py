"""JPEGs on which libjpeg only warns: which warnings are harmless, and the same file without what it warned of.

libjpeg names only its first warning, and "extraneous bytes before marker" is also what most damaged scans end in: the
decoder lost its place and stopped early. So no message is trusted. What is known to be harmless is taken out of a copy:

- bytes between the segments of the header, which nothing reads;
- bytes between the end of the last scan and the marker behind it, if the scan ends where it should: its last byte is
  filled up with ones (ITU-T T.81, F.1.2.3), or one value repeated lies behind it, as cameras write it. A decoder that
  lost its place ends at any bit, so three of four such files fail this;
- an unknown JFIF revision or Adobe colour code, and scan parameters that mean nothing in a sequential JPEG.

The copy must then decode without a warning. Its pixels are those that libjpeg makes of the file itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

END = b"\xff\xd9"
SOS, EOI, APP0, APP14 = 0xDA, 0xD9, 0xE0, 0xEE
SEQUENTIAL_FRAMES = (0xC0, 0xC1)
STANDALONE = (0x01, *range(0xD0, 0xD8))
ALL_COEFFICIENTS = b"\x00\x3f\x00"
"""Scan parameters of a sequential JPEG: from coefficient 0 to 63, no successive approximation."""

Decode = Callable[[bytes], np.ndarray]
"""The pixels of a JPEG; ValueError with libjpeg's first warning or error."""


def decode_without_strays(data: bytes, decode: Decode) -> np.ndarray | None:
    """The pixels of a JPEG on which libjpeg warns, if what it warns of is harmless; None where it is damaged."""
    parsed = _head_and_scan(data)
    if parsed is None:
        return None
    head, scan = parsed
    pixels, warning = _tried(decode, head + scan + END)
    if warning is None or "extraneous" not in warning:
        return pixels
    kept = scan.rstrip(scan[-1:])
    pixels, _ = _tried(decode, head + kept + b"\0" * kept.endswith(b"\xff") + END)
    if pixels is not None:
        return pixels  # the decoder stopped where the repeated value begins
    end = _end_of_scan(head, scan, decode)
    return None if end is None else _filled_with_ones(head, scan[:end], decode)


def _tried(decode: Decode, data: bytes) -> tuple[np.ndarray | None, str | None]:
    try:
        return decode(data), None
    except ValueError as error:
        return None, str(error)


def _head_and_scan(data: bytes) -> tuple[bytes, bytes] | None:
    """All before the last scan's data, mended, and that data up to the end mark; None without them."""
    pieces = [data[:2]]
    position, sequential = 2, False
    last = data.rfind(b"\xff\xda")
    while (position := data.find(b"\xff", position)) >= 0 and position + 4 <= len(data):
        marker = data[position + 1]
        if marker in (0x00, 0xFF):
            position += 1 if marker else 2
            continue
        if marker == EOI:
            return None  # before the last scan
        if marker in STANDALONE:
            pieces.append(data[position : position + 2])
            position += 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        segment = bytearray(data[position : position + 2 + length])
        if length < 2 or len(segment) < 2 + length:
            return None
        sequential = sequential or marker in SEQUENTIAL_FRAMES
        _mend(marker, segment, sequential)
        pieces.append(bytes(segment))
        start = position
        position += len(segment)
        if marker == SOS:
            scan_end = _next_marker(data, position)
            if start == last or scan_end < 0 or data[scan_end + 1] == EOI:
                return b"".join(pieces), data[position : scan_end if scan_end >= 0 else len(data)]
            pieces.append(data[position:scan_end])
            position = scan_end
    return None


def _mend(marker: int, segment: bytearray, sequential: bool) -> None:
    """Write the known value where libjpeg assumes it with a warning."""
    if marker == APP0 and segment[4:9] == b"JFIF\0" and len(segment) > 9:
        segment[9] = 1  # major revision
    elif marker == APP14 and segment[4:9] == b"Adobe" and len(segment) > 15 and segment[15] > 2:
        segment[15] = 1  # YCbCr, as libjpeg assumes
    elif marker == SOS and sequential:
        segment[-3:] = ALL_COEFFICIENTS


def _next_marker(data: bytes, position: int) -> int:
    """Where the marker behind a scan's data begins; -1 without one. A stuffed FF and a restart are none."""
    while (position := data.find(b"\xff", position)) >= 0 and position + 1 < len(data):
        if data[position + 1] not in (0x00, 0xFF, *STANDALONE):
            return position
        position += 1
    return -1


def _end_of_scan(head: bytes, scan: bytes, decode: Decode) -> int | None:
    """Fewest bytes of a scan's data that decode without a warning: the decoder asks for no more."""
    low, high = 0, len(scan)
    while high - low > 1:
        middle = (low + high) // 2
        _, warning = _tried(decode, head + scan[:middle] + END)
        if warning is None or "extraneous" in warning:
            high = middle
        elif "premature end" in warning:
            low = middle
        else:
            return None  # bad codes
    return high


def _filled_with_ones(head: bytes, scan: bytes, decode: Decode) -> np.ndarray | None:
    """The pixels, if those bits of the last byte that the decoder does not use are ones. It may use all eight."""
    pixels, _ = _tried(decode, head + scan + END)
    if pixels is None:
        return None
    stuffed = scan[-2:] == b"\xff\x00"
    last = 0xFF if stuffed else scan[-1]
    before = scan[: -2 if stuffed else -1]
    for bits in range(7, 0, -1):
        mask = (1 << bits) - 1
        other = last ^ mask
        changed, _ = _tried(decode, head + before + bytes([other]) + b"\0" * (other == 0xFF) + END)
        if changed is not None and np.array_equal(changed, pixels):  # the decoder uses none of these bits
            return pixels if last & mask == mask else None
    return pixels
