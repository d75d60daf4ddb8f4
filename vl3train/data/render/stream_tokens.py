"""What is learned of a streaming record besides its answers: three rules, by ``data.stream_supervision``.

A frame is a message of its own, ``<|stream_start|>stream\\nTime 1.0s: VISUAL TOKENS\\n<|stream_end|>\\n``.

- ``training``, the original's training code (processor.py, _process_text_with_label): the newline after the visual
  tokens, which the template puts after every visual item, and the ``<|stream_end|>`` after it. Its balancing changes
  nothing: it compares newlines with ``<|im_end|>``, which its template never puts after a frame.
- ``released``, the processor that was released with the weights (processing_videollama3.py): the first token of the
  message after a frame. It is predicted at the newline after ``<|stream_end|>``. ``<|stream_start|>`` means to wait
  for the next frame, ``<|im_start|>`` that somebody speaks. Both are balanced.
- ``answers``: nothing of a frame.
"""

from __future__ import annotations

import hashlib

import numpy as np


class SpeakOrWait:
    """The first tokens of the messages after frames, as they are written."""

    def __init__(self) -> None:
        self._positions: dict[str, list[int]] = {}

    def add(self, position: int, token: str) -> None:
        """Remember one by its place in the ids and its token."""
        self._positions.setdefault(token, []).append(position)

    def balanced(self, ids: np.ndarray) -> list[int]:
        """As many of each token as of the rarer one; where there is one kind only, all of it.

        The original draws anew each time. Here a hash of the sample's own ids draws, so that every worker, rank, epoch
        and resumed run has the same.
        """
        if not self._positions:
            return []
        count = min(map(len, self._positions.values()))
        sample = hashlib.sha256(ids.tobytes()).digest()

        def draw(position: int) -> bytes:
            return hashlib.sha256(sample + position.to_bytes(8, "little")).digest()

        return [
            position
            for positions in self._positions.values()
            for position in sorted(sorted(positions, key=draw)[:count])
        ]
