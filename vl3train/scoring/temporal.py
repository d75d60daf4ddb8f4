"""When something happens: the overlap of a predicted span of time with the true one."""

from __future__ import annotations

import re

TIME = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)|(\d+(?:\.\d+)?)")
"""1:02:03.5, 02:03 or 3.5; a time in hours and minutes comes first, so that its parts are no times of their own."""


def temporal_iou(prediction: str, reference: str) -> float:
    """Intersection over union of two spans, each the first two times of its text; 0 where an answer has none.

    >>> temporal_iou("From 2.0 to 6 seconds.", "4s - 8s"), temporal_iou("at the end", "4 to 8")
    (0.3333333333333333, 0.0)
    """
    found, true = span(prediction), span(reference)
    if found is None or true is None:
        return 0.0
    union = max(found[1], true[1]) - min(found[0], true[0])
    shared = min(found[1], true[1]) - max(found[0], true[0])
    if union == 0:
        return 1.0  # both are the same moment
    return max(0.0, shared) / union if shared > 0 else 0.0


def span(text: str) -> tuple[float, float] | None:
    """Beginning and end in seconds, in order; None where the text has fewer than two times.

    >>> span("from 01:05 to 1:00.5"), span("at 3 s")
    ((60.5, 65.0), None)
    """
    times = []
    for hours, minutes, seconds, plain in TIME.findall(text):
        times.append(float(plain) if plain else int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds))
    if len(times) < 2:
        return None
    return min(times[:2]), max(times[:2])
