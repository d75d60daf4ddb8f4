"""Which samples are held out: whole groups of samples that share a picture or clip, chosen by their content."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    """What the split needs of one record."""

    where: str  # its place: file and line
    key: str  # a digest of its text and of the names of its media
    media: tuple[str, ...]  # one name for each picture and clip, the same wherever its bytes are the same


def groups(items: Sequence[Item]) -> list[list[int]]:
    """Numbers of the items that share media, directly or through others; each group in order, by its first item.

    >>> groups([Item("0", "", ("a",)), Item("1", "", ("b",)), Item("2", "", ("a", "c")), Item("3", "", ("c",))])
    [[0, 2, 3], [1]]
    """
    parent = list(range(len(items)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first: dict[str, int] = {}
    for number, item in enumerate(items):
        # Text alone is a medium too: the same question and answer on both sides would be learned by heart.
        for medium in item.media or (f"text:{item.key}",):
            other = root(first.setdefault(medium, number))
            mine = root(number)
            parent[max(other, mine)] = min(other, mine)
    found: dict[int, list[int]] = {}
    for number in range(len(items)):
        found.setdefault(root(number), []).append(number)
    return list(found.values())


def wanted_samples(held_out: str, num_items: int) -> int | None:
    """How many samples ``finetune.held_out`` asks for; None where it is neither a share nor a number.

    >>> [wanted_samples(text, 260) for text in ("5%", "0.1%", "20", "0", "test.jsonl")]
    [13, 1, 20, 0, None]
    """
    if share := re.fullmatch(r"(\d+(?:\.\d+)?) *%", held_out.strip()):
        exact = num_items * float(share[1]) / 100
        return max(1, round(exact)) if exact > 0 else 0
    return int(held_out) if held_out.strip().isdecimal() else None


def choose_held_out(items: Sequence[Item], wanted: int) -> set[int]:
    """Numbers of about ``wanted`` items to hold out: whole groups, never more than wanted.

    Groups come by a digest of their items, so that the same records give the same choice in any order, and most of it
    stays when records are added. A group that is too large for what is left stays in training. Fewer are found where
    groups are large; none where every group is larger than ``wanted``.
    """
    chosen: set[int] = set()
    for group in sorted(groups(items), key=lambda group: min(items[number].key for number in group)):
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    return chosen


def shared_media(training: Iterable[Item], held_out: Iterable[Item]) -> list[Item]:
    """Items of ``held_out`` that show a medium that is trained on."""
    seen = {medium for item in training for medium in item.media}
    return [item for item in held_out if seen.intersection(item.media)]
