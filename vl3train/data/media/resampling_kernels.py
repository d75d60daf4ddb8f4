"""The loops of resampling.py, compiled: along rows, along columns, into patches. Pictures are flat arrays here.

What they work on has fixed distances (STRIDE) and unsigned indices, so that the compiler makes vector instructions
of the inner loops. No slices in them either: each would count references, which costs as much as the work.
"""

from __future__ import annotations

import numpy as np

from vl3train.contracts.tokens import PATCH_SIZE
from vl3train.data.compiled import njit

TAPS = 5
"""Most weights of a value that are not zero: bicubic has 4 pixels, and one more where it shrinks."""

STRIP = 210
"""Most columns made at a time, whole patches: what is worked on stays in the nearest cache (29 of 48 KB)."""

STRIDE = 304
"""Between the channels of a strip: room for its source columns, STRIP * 1.3 and the edges. Known to the compiler,
which then sees that they never overlap."""

EDGE = 8
"""Zeros beside a line, where weights are zero too."""

U = np.uint64
"""Type of indices. A signed index needs a test for counting from the end, which keeps the compiler from vectors."""

S1, S2, S3, S4 = U(STRIDE), U(2 * STRIDE), U(3 * STRIDE), U(4 * STRIDE)
HALF, LOW, HIGH = np.float32(0.5), np.float32(0), np.float32(255)


@njit(cache=True, nogil=True)
def _strip(width):
    """How many columns are made at a time: strips of about one width, none of a few columns."""
    num_strips = -(-width // STRIP)
    return -(-width // (PATCH_SIZE * num_strips)) * PATCH_SIZE


@njit(cache=True, nogil=True, fastmath={"contract"})
def resample(pixels, height, width, rows, columns, merge_size, out):
    """Both passes and the cut, strip after strip.

    Args:
        pixels: (height * width * 3,) uint8, RGB.
        height: of the picture.
        width: likewise.
        rows: ``resampling.Resampling`` along the height.
        columns: likewise along the width.
        merge_size: see patches.py.
        out: (patches * 294,) uint16, the patches' bytes two by two.
    """
    row_starts, row_weights, row_taps = rows.starts, rows.weights, rows.taps
    line = np.zeros(3 * STRIDE, np.float32)
    ring = np.empty(8 * 3 * STRIDE, np.float32)  # the last 8 rows, at the new width
    made = np.empty(2 * 3 * STRIDE, np.uint8)
    halves = made.view(np.uint16)
    strip_weights = np.zeros(TAPS * STRIDE, np.float32)
    moves = np.empty(STRIP + 1, np.int64)
    sources = np.empty(STRIP + 1, np.int64)
    new_width = len(columns.starts)
    strip = _strip(new_width)
    for left in range(0, new_width, strip):
        num = min(strip, new_width - left)
        near = max(columns.starts[left], 0)
        far = min(columns.starts[left + num - 1] + TAPS, width)
        num_runs = _find_runs(columns.starts, columns.weights, left, num, strip_weights, moves, sources)
        line[:] = 0
        num_done = 0
        y = np.int64(0)  # a literal is a type of its own: what is called with it would be compiled twice
        while y < len(row_starts):
            start = row_starts[y]
            # Two rows of neighbouring places share three of four rows that they are made of.
            two = row_taps == 4 and y + 1 < len(row_starts) and row_starts[y + 1] == start + 1
            while num_done < min(start + TAPS + two, height):
                _spread(pixels, U(3 * (num_done * width + near)), line, U(EDGE), U(far - near))
                for run in range(num_runs):
                    x = moves[run]
                    place, length = U((num_done & 7) * 3 * STRIDE + x), U(moves[run + 1] - x)
                    if columns.taps == 4:
                        _along_rows_4(line, U(sources[run]), strip_weights, U(x), ring, place, length)
                    else:
                        _along_rows_5(line, U(sources[run]), strip_weights, U(x), ring, place, length)
                num_done += 1
            if two:
                _two_along_columns_4(ring, start, height, row_weights, y, made, U(num))
            else:
                _along_columns_5(ring, start, height, row_weights, y, made, U(num))
            _cut(halves, np.int64(0), num, left, new_width, y, merge_size, out)
            if two:
                _cut(halves, np.int64(1), num, left, new_width, y + 1, merge_size, out)
            y += 1 + two


@njit(cache=True, nogil=True)
def _find_runs(starts, weights, left, num, strip_weights, moves, sources):
    """The runs of a strip's columns whose pixels follow one another, and the strip's weights, side by side.

    Fills ``moves`` with the first column of each run and ``sources`` with where its pixels lie in the line; returns
    how many runs there are.
    """
    near = max(starts[left], 0)
    num_runs = 0
    for x in range(num):
        if x == 0 or starts[left + x] != starts[left + x - 1] + 1:
            moves[num_runs], sources[num_runs] = x, starts[left + x] - near + EDGE
            num_runs += 1
        for k in range(TAPS):
            strip_weights[k * STRIDE + x] = weights[k, left + x]
    moves[num_runs] = num
    return num_runs


@njit(cache=True, nogil=True)
def cut_whole(pixels, height, width, merge_size, out):
    """As ``resample``, of a picture that has its size: whole patches."""
    made = np.empty(3 * STRIDE, np.uint8)
    halves = made.view(np.uint16)
    strip = _strip(width)
    for left in range(0, width, strip):
        columns = min(strip, width - left)
        for y in range(height):
            _spread(pixels, U(3 * (y * width + left)), made, U(0), U(columns))
            _cut(halves, np.int64(0), columns, left, width, y, merge_size, out)


@njit(cache=True, nogil=True)
def _spread(pixels, start, line, place, num):
    """RGBRGB... into three channels."""
    for x in range(num):
        line[place + x] = pixels[start + U(3) * x]
        line[place + x + S1] = pixels[start + U(3) * x + U(1)]
        line[place + x + S2] = pixels[start + U(3) * x + U(2)]


@njit(cache=True, nogil=True)
def _cut(halves, which, columns, left, width, y, merge_size, out):
    """One row of a strip, the first or second one made, into the patches that it crosses."""
    row, line = y // PATCH_SIZE, y % PATCH_SIZE
    first = row // merge_size * merge_size * (width // PATCH_SIZE) + row % merge_size * merge_size
    for column in range(columns // PATCH_SIZE):
        place = left // PATCH_SIZE + column
        patch = first + place // merge_size * merge_size**2 + place % merge_size
        for channel in range(3):
            i = U(((3 * which + channel) * STRIDE + column * PATCH_SIZE) // 2)
            a, b, c, d = halves[i], halves[i + U(1)], halves[i + U(2)], halves[i + U(3)]
            e, f, g, h = halves[i + U(4)], halves[i + U(5)], halves[i + U(6)], halves[i + U(7)]
            i = U(((patch * 3 + channel) * PATCH_SIZE + line) * (PATCH_SIZE // 2))
            # 16 bytes are one move where 14 are three. The next line, whose first two they are, comes later.
            if line < PATCH_SIZE - 1:
                out[i], out[i + U(1)], out[i + U(2)], out[i + U(3)] = a, b, c, d
                out[i + U(4)], out[i + U(5)], out[i + U(6)], out[i + U(7)] = e, f, g, h
            else:
                out[i], out[i + U(1)], out[i + U(2)], out[i + U(3)] = a, b, c, d
                out[i + U(4)], out[i + U(5)], out[i + U(6)] = e, f, g


@njit(cache=True, nogil=True, inline="always")
def _rounded(value):
    """What torch's integers do: half up, then into a byte. Cut off, not floored: below zero it is zero either way."""
    return np.int32(min(max(value, LOW), HIGH))


@njit(cache=True, nogil=True, fastmath={"contract"})
def _along_rows_4(line, source, weights, first, out, place, num):
    """``num`` values of each channel, by 4 weights that the channels share."""
    for x in range(num):
        j = first + x
        w0, w1, w2, w3 = weights[j], weights[j + S1], weights[j + S2], weights[j + S3]
        i = source + x
        red = HALF + w0 * line[i] + w1 * line[i + U(1)] + w2 * line[i + U(2)] + w3 * line[i + U(3)]
        i += S1
        green = HALF + w0 * line[i] + w1 * line[i + U(1)] + w2 * line[i + U(2)] + w3 * line[i + U(3)]
        i += S1
        blue = HALF + w0 * line[i] + w1 * line[i + U(1)] + w2 * line[i + U(2)] + w3 * line[i + U(3)]
        out[place + x] = _rounded(red)
        out[place + x + S1] = _rounded(green)
        out[place + x + S2] = _rounded(blue)


@njit(cache=True, nogil=True, fastmath={"contract"})
def _along_rows_5(line, source, weights, first, out, place, num):
    """As ``_along_rows_4`` by 5."""
    for x in range(num):
        j = first + x
        w0, w1, w2, w3, w4 = weights[j], weights[j + S1], weights[j + S2], weights[j + S3], weights[j + S4]
        i = source + x
        red = HALF + w0 * line[i] + w1 * line[i + U(1)] + w2 * line[i + U(2)] + w3 * line[i + U(3)]
        red += w4 * line[i + U(4)]
        i += S1
        green = HALF + w0 * line[i] + w1 * line[i + U(1)] + w2 * line[i + U(2)] + w3 * line[i + U(3)]
        green += w4 * line[i + U(4)]
        i += S1
        blue = HALF + w0 * line[i] + w1 * line[i + U(1)] + w2 * line[i + U(2)] + w3 * line[i + U(3)]
        blue += w4 * line[i + U(4)]
        out[place + x] = _rounded(red)
        out[place + x + S1] = _rounded(green)
        out[place + x + S2] = _rounded(blue)


@njit(cache=True, nogil=True)
def _in_ring(row, height):
    """Where a row lies in the ring; outside of the picture, where weights are zero, the nearest row."""
    return U((min(max(row, 0), height - 1) & 7) * 3 * STRIDE)


@njit(cache=True, nogil=True, fastmath={"contract"})
def _two_along_columns_4(ring, start, height, weights, y, out, columns):
    """Two rows of each channel, each out of 4 rows."""
    a, b = _in_ring(start, height), _in_ring(start + 1, height)
    c, d, e = _in_ring(start + 2, height), _in_ring(start + 3, height), _in_ring(start + 4, height)
    w0, w1, w2, w3 = weights[0, y], weights[1, y], weights[2, y], weights[3, y]
    v0, v1, v2, v3 = weights[0, y + 1], weights[1, y + 1], weights[2, y + 1], weights[3, y + 1]
    for channel in range(3):
        i = U(channel) * S1
        for x in range(i, i + columns):
            first = HALF + w0 * ring[a + x] + w1 * ring[b + x] + w2 * ring[c + x] + w3 * ring[d + x]
            second = HALF + v0 * ring[b + x] + v1 * ring[c + x] + v2 * ring[d + x] + v3 * ring[e + x]
            out[x] = _rounded(first)
            out[x + S3] = _rounded(second)


@njit(cache=True, nogil=True, fastmath={"contract"})
def _along_columns_5(ring, start, height, weights, y, out, columns):
    """A row of each channel out of 5 rows."""
    a, b = _in_ring(start, height), _in_ring(start + 1, height)
    c, d, e = _in_ring(start + 2, height), _in_ring(start + 3, height), _in_ring(start + 4, height)
    w0, w1, w2, w3, w4 = weights[0, y], weights[1, y], weights[2, y], weights[3, y], weights[4, y]
    for channel in range(3):
        i = U(channel) * S1
        for x in range(i, i + columns):
            value = HALF + w0 * ring[a + x] + w1 * ring[b + x] + w2 * ring[c + x] + w3 * ring[d + x]
            out[x] = _rounded(value + w4 * ring[e + x])
