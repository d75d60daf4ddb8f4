"""Stamps of decoded frames that do not rise: some are missing, or the clock begins anew where parts were joined."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np

JOINED_FORMATS = {"mpegts", "mpeg", "ogg"}
"""Files of these formats can be put behind each other; then each part has its own clock (FFmpeg's TS_DISCONT)."""
BACK_SECONDS, AHEAD_SECONDS = Fraction(1, 10), 10
"""A clock that jumps by more begins a new part: ffmpeg's rule (fftools/ffmpeg_demux.c: ts_discontinuity_detect)."""

LARGEST = 2**62
"""Ticks of a sound file; a damaged one may add up to more than 64 bits."""


def mended_stamps(
    stamps: Sequence[int | None], tick: Fraction, rate: Fraction | None, kind: str
) -> tuple[int, ...] | None:
    """Stamps of all frames in order of presentation. Missing ones lie evenly between their neighbours.

    Args:
        stamps: of each frame, in ticks; None where the file says none.
        tick: in seconds.
        rate: frames a second by the file's header.
        kind: the format's name by FFmpeg.

    Returns None where nothing is to be mended, or where fewer than two frames have a stamp.

    >>> mended_stamps([0, None, 2, 3, 0, 1], Fraction(1), None, "mpegts")
    (0, 1, 2, 3, 4, 5)
    """
    known = [(number, stamp) for number, stamp in enumerate(stamps) if stamp is not None]
    back = ahead = None
    if JOINED_FORMATS.intersection(kind.split(",")):
        back, ahead = BACK_SECONDS / tick, AHEAD_SECONDS / tick
    gap = 1 / rate / tick if rate else Fraction(0)
    numbers, mended, shift, joined = [known[0][0]] if known else [], [known[0][1]] if known else [], 0, False
    for (before, earlier), (number, later) in pairwise(known):
        rise = later - earlier
        if back is not None and ahead is not None and not -back <= rise <= ahead:
            shift += round(earlier + gap * (number - before)) - later
            joined = True
        elif rise > 0:
            gap = Fraction(rise, number - before)
        numbers.append(number)
        mended.append(later + shift)
    if len(known) < 2 or not (joined or len(known) < len(stamps)):
        return None
    base, first, last = mended[0], numbers[0], numbers[-1]
    start = Fraction(mended[1] - mended[0], numbers[1] - numbers[0])
    between = np.interp(range(len(stamps)), numbers, [float(one - base) for one in mended])
    filled = [base + round(one) for one in between.tolist()]
    filled[:first] = [base - round(start * (first - number)) for number in range(first)]
    filled[last + 1 :] = [
        mended[-1] + round(gap * (number - last)) for number in range(last + 1, len(stamps))
    ]
    rising = tuple(accumulate(filled, max))
    return rising if rising[0] >= -LARGEST and rising[-1] <= LARGEST else None
