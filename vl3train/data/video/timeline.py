"""When each frame of a clip is shown, and what is asked of it: the two sides of frame_choice.py."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each frame of a clip is shown: from its own stamp until the next one's. F frames, one at least."""

    stamps: tuple[int, ...]  # (F,) ticks, in order of presentation, never falling
    end: int  # tick at which the last frame goes
    tick: Fraction  # seconds
    said_rate: Fraction | None = None  # frames a second by the file's header; None: it says none
    origin: int = 0  # tick at which the file begins; a sound track may begin before the first frame

    @property
    def seconds(self) -> float:
        """From the first frame's stamp to the end."""
        return float((self.end - self.stamps[0]) * self.tick)

    def times(self) -> list[float]:
        """(F,) seconds since the first frame."""
        first, (above, below) = self.stamps[0], self.tick.as_integer_ratio()
        return [(stamp - first) * above / below for stamp in self.stamps]

    def constant_rate(self) -> Fraction | None:
        """Frames a second, where each frame lies within a quarter of a frame of its place; else None.

        The header's rate if the stamps agree with it (containers round stamps), else the rate of the stamps.
        """
        count, span = len(self.stamps), (self.stamps[-1] - self.stamps[0]) * self.tick
        rates = [rate for rate in (self.said_rate, (count - 1) / span if span else None) if rate]
        return next((rate for rate in rates if self._on_grid(1 / rate)), None)

    def _on_grid(self, gap: Fraction) -> bool:
        ticks = float(gap / self.tick)
        shown = np.asarray(self.stamps, np.int64) - self.stamps[0]
        places = np.arange(len(shown)) * ticks
        after_last = self.end - self.stamps[-1]
        return bool(np.abs(shown - places).max() <= max(ticks / 4, 1)) and after_last <= 2 * ticks + 1


@dataclass(frozen=True, slots=True)
class FrameRule:
    """How frames are chosen: the options of the section ``data``, and the part of the clip that a record names."""

    fps: float
    min_frames: int
    max_frames: int
    start_seconds: float | None = None
    end_seconds: float | None = None
    frame_sampling: str = "transformers"  # or "original"


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """The frames taken of a clip. t frames."""

    picked: tuple[
        int, ...
    ]  # (t,) frame numbers in order of presentation; a number may be there several times
    times: tuple[float, ...]  # (t,) seconds
    window: tuple[int, int]  # frame numbers from the first one inside start and end to behind the last
