"""The text of an answer while it grows, in pieces that are never taken back."""

from __future__ import annotations

from collections.abc import Sequence

from vl3train.data.render.chat_tokens import ChatTokenizer

HALF = "\ufffd"
"""What stands for a character whose bytes are not all there yet."""


class GrowingText:
    """Text of the tokens so far. All its pieces together are the answer without outer space, up to a stop text."""

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops, self._shown = tokenizer, tuple(stops), ""
        self.stopped = False

    def piece(self, ids: Sequence[int], *, ended: bool) -> str:
        """What is new and certain of the answer of ``ids``; ``stopped`` is set where a stop text ends it.

        Args:
            ids: all tokens so far.
            ended: no more follow.
        """
        text = self._tokenizer.words(ids)
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, text = True, text[: min(places)].rstrip()
        elif not ended:
            text = text.rstrip(HALF)
            text = text[: len(text) - max((_begun(text, stop) for stop in self._stops), default=0)].rstrip()
        new = text[len(self._shown) :]
        self._shown += new
        return new


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``.

    >>> _begun("so far\\nQ", "\\nQ:"), _begun("so far", "\\nQ:")
    (2, 0)
    """
    return next(
        (size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0
    )
