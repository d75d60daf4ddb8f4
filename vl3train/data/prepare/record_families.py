"""Records of the same media come together, so that a shard holds the media once.

Media are the same by their file, or by their bytes where a data set holds them itself.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

from vl3train.data.records.conversation import Conversation
from vl3train.data.records.families import family_number
from vl3train.data.records.media_files import MediaFile

MAX_MEMBER_RECORDS = 64
"""Records of one member; a larger family has several. A member's text is read whole for each of its records."""

MAX_WAITING_BYTES = 1_000_000_000
"""Media that a data set holds itself, kept in memory until the last record of their family comes. Beyond it, the family
that waits longest is written as it is; the index finds it together again."""

Member = tuple[tuple[Conversation, ...], tuple[MediaFile, ...]]
"""Records of one family, and their media."""


class FamilySizes:
    """How many records each family has; about 200 bytes of memory for each family."""

    def __init__(self) -> None:
        self._left: Counter[int] = Counter()

    def count(self, conversation: Conversation, media: tuple[MediaFile, ...]) -> None:
        """Count one record."""
        if family := _family(conversation, media):
            self._left[family] += 1

    def together(
        self,
        records: Iterable[tuple[Conversation, tuple[MediaFile, ...]]],
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> Iterator[Member]:
        """The same records, those of a family as one, where its last one stands. Texts that wait are in memory, and
        up to ``max_waiting_bytes`` of media.

        Of a family that was not counted each record comes alone.
        """
        waiting_bytes = 0
        waiting: dict[int, tuple[list[Conversation], tuple[MediaFile, ...]]] = {}
        for conversation, media in records:
            family = _family(conversation, media) if self._left else 0
            if not self._left[family]:
                yield (conversation,), media
                continue
            if family not in waiting:
                waiting[family] = [], media
                waiting_bytes += _bytes_held(media)
            conversations, shown = waiting[family]
            conversations.append(conversation)
            self._left[family] -= 1
            if not self._left[family] or len(conversations) == MAX_MEMBER_RECORDS:
                del waiting[family]
                waiting_bytes -= _bytes_held(shown)
                yield tuple(conversations), shown
            while waiting_bytes > max_waiting_bytes:
                conversations, shown = waiting.pop(next(iter(waiting)))
                waiting_bytes -= _bytes_held(shown)
                yield tuple(conversations), shown
        for conversations, shown in waiting.values():  # records that were counted were rejected since
            yield tuple(conversations), shown


def _bytes_held(media: tuple[MediaFile, ...]) -> int:
    return sum(len(one.data or b"") + _bytes_held(one.pictures) for one in media)


def _family(conversation: Conversation, media: tuple[MediaFile, ...]) -> int:
    return family_number(conversation, lambda part: _identity(media[int(part.partition(".")[0])]))


def _identity(medium: MediaFile) -> bytes:
    """What stands for the content of a medium, without reading its file."""
    digest = hashlib.blake2b(repr((medium.kind, medium.times, medium.fps)).encode(), digest_size=16)
    for picture in medium.pictures:
        digest.update(b"picture" + _identity(picture))
    if medium.data is not None:
        digest.update(b"bytes" + hashlib.blake2b(medium.data).digest())
    elif medium.location is not None:
        digest.update(b"file" + str(medium.location.resolve()).encode())
    return digest.digest()
