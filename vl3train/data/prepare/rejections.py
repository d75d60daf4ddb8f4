"""Records and samples that are rejected: where each lies, why, and how many have the same reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vl3train.data.records.conversation import EMPTY_ANSWER

REJECTED_FILE = "rejected.jsonl"
"""Beside written shards: place and reason of each rejected record."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A record that became no sample, or a sample that cannot be used."""

    where: str  # file and line, or the key of a sample in a shard
    reason: str


class RejectedRecordsError(ValueError):
    """Records that cannot be written, every one of them in ``rejected``."""

    def __init__(self, rejected: Sequence[Rejection], num_records: int) -> None:
        self.rejected = tuple(rejected)
        self.num_records = num_records
        super().__init__(
            "\n".join(
                [f"{len(rejected)} of {num_records} records cannot be used:", *describe_rejected(rejected)]
            )
        )


def kind_of_reason(reason: str) -> str:
    """A reason without what differs from sample to sample: quoted words, paths, numbers.

    >>> kind_of_reason("no such file: a/b.jpg; 3 images for 'x'")
    'no such file: … … images for …'
    """
    return re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\d+(\.\d+)?", "…", reason)


def describe_remarks(remarks: Mapping[str, int]) -> list[str]:
    """One line for each kind of record that is read, but odd or not as it may be meant; empty without any."""
    return [f"{count} with {what_is_odd(remark)}" for remark, count in sorted(remarks.items())]


def what_is_odd(remark: str) -> str:
    """What a sample has by a remark on it: of pictures the index keeps only what they are.

    >>> what_is_odd("transparent")
    'a picture that is transparent'
    """
    return remark if remark == EMPTY_ANSWER else f"a picture that is {remark}"


def describe_rejected(rejected: Sequence[Rejection], *, examples: int = 3) -> list[str]:
    """One line for each kind of reason, the commonest first, with its first examples."""
    kinds: dict[str, list[Rejection]] = {}
    for rejection in rejected:
        kinds.setdefault(kind_of_reason(rejection.reason), []).append(rejection)
    lines = []
    for members in sorted(kinds.values(), key=len, reverse=True):
        lines.append(f"  {len(members)} like these:" if len(members) > 1 else "  one:")
        lines += [f"    {rejection.where}: {rejection.reason}" for rejection in members[:examples]]
    return lines


def describe_ignored(ignored: Mapping[str, int]) -> list[str]:
    """A line about keys of records that were not read, the commonest first; one about empty answers; none without any.

    >>> describe_ignored({"source": 2, "turn.name": 5})
    ['not read: turn.name (5 records), source (2 records)']
    """
    keys = sorted(
        (item for item in ignored.items() if item[0] != EMPTY_ANSWER), key=lambda item: (-item[1], item[0])
    )
    empty = {EMPTY_ANSWER: ignored[EMPTY_ANSWER]} if EMPTY_ANSWER in ignored else {}
    listed = ", ".join(f"{key} ({count} records)" for key, count in keys)
    return [*([f"not read: {listed}"] if keys else []), *describe_remarks(empty)]
