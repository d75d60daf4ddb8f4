"""The members of a tar file, from its headers alone, whatever is in them.

A header that cannot be used costs its own member; behind it the next readable one is looked for. Every step moves on
by a block or more, no byte is searched more than twice, and of no header more than ``MAX_EXTENSION_BYTES`` are read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vl3train.data.shards.tar_fields import (
    BLOCK,
    MAGIC,
    MAGIC_AT,
    Extension,
    Header,
    HeaderError,
    extend,
    name_problem,
    parse_header,
    pax_fields,
)

MAX_EXTENSION_BYTES = 2**20
"""Most of a pax header or a GNU long name, as in libarchive."""
SEARCHED_BYTES = 4 * 2**20
FILE_KINDS, LINK_KINDS = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"6")
FOLDER_KINDS = (b"5", b"D", b"V", b"A")
"""Folders, also GNU's lists of them, labels of volumes and Solaris' access lists: no files, and passed over."""
EXTENSION_KINDS = (b"x", b"X", b"L", b"K")


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of the tar."""

    name: str
    at: int  # byte of its header
    offset: int  # byte of its data
    size: int


@dataclass(frozen=True, slots=True)
class RejectedPlace:
    """A header that gives no file, or bytes that are no header."""

    at: int
    reason: str
    name: str = ""  # of the member, where it is known


def read_members(shard: Path) -> list[Member | RejectedPlace]:
    """Every regular file by its full name, and every place that is rejected, in their order.

    Raises:
        OSError: the file cannot be read.
    """
    if not shard.is_file():
        what = "is a folder" if shard.is_dir() else "is no file"
        if shard.is_symlink() and not shard.exists():
            what = f"is a link to {os.readlink(shard)}, which is not there"
        return [RejectedPlace(0, f"the shard {what}; put the .tar file there, or remove the name")]
    with shard.open("rb") as file:
        reader = _Reader(file.fileno(), os.fstat(file.fileno()).st_size)
        reader.read()
    return reader.found


def shown(name: str | bytes) -> str:
    """A name for a message, without bytes that no text may hold."""
    name = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    return repr(name if len(name) <= 200 else f"{name[:200]}...")


class _Reader:
    """An open tar file. It is read, not mapped: where a mapped file becomes shorter, the process dies."""

    def __init__(self, file: int, total: int) -> None:
        self.file, self.total = file, total
        self.found: list[Member | RejectedPlace] = []
        self.extension: Extension | None = None
        self.ended = False  # the block before was an end mark
        self.last: Member | None = None  # the member whose size led to the next block

    def read(self) -> None:
        """Fill ``found``."""
        if not self.total:
            self._reject(0, "the shard is empty; copy or make it again")
            return
        position: int | None = 0
        while position is not None and position < self.total:
            position = self._step(position)
        if position is not None and not self.ended:
            self._reject(self.total, f"cut off at byte {self.total}: no end mark; copy the shard again")

    def _step(self, position: int) -> int | None:
        """What lies at a byte, and the byte to go on at; None where nothing more can be read."""
        block = os.pread(self.file, BLOCK, position)
        last, self.last = self.last, None
        if not block.strip(b"\0") and (self.ended or len(block) == BLOCK):
            if last is not None and (inside := self._inside(last, position)) is not None:
                return self._too_long(last, inside)
            if self.extension is not None:
                at = self.extension.at
                self._reject(at, f"no member behind the header at byte {at}; copy the shard again")
            self.extension, self.ended = None, True
            return self._behind_zeros(position)  # another archive may be appended
        if len(block) < BLOCK:
            said = "no end mark" if not self.ended else f"{len(block)} bytes behind the end mark"
            self._reject(position, f"cut off at byte {position}: {said}; copy the shard again")
            return None
        try:
            header = parse_header(block)
        except HeaderError as error:
            return self._damaged(position, last, error)
        self.ended = False
        if header.size is None and (self.extension is None or self.extension.size is None):
            reason = f"its size in the header is {header.size_problem}; pack the shard again"
            if header.kind in EXTENSION_KINDS:
                self.extension = Extension(position, problem=f"the header before it is damaged: {reason}")
            else:
                self._reject(position, f"member {shown(header.name)}: {reason}", header.name)
                self.extension = None
            return self._next_header(position + BLOCK, self.total)
        if header.kind in EXTENSION_KINDS or header.kind == b"g":
            return self._extended(header, position)
        extension, self.extension = self.extension or Extension(position), None
        return self._member(header, extension, position)

    def _damaged(self, position: int, last: Member | None, error: HeaderError) -> int | None:
        """No header where one should be: either it is damaged, or the size of the member before it is."""
        if last is not None and (inside := self._inside(last, position)) is not None:
            return self._too_long(last, inside)
        self.extension = None
        following = self._next_header(position + 1, self.total)
        lost = (
            "nothing behind it can be read"
            if following is None
            else f"the next readable member begins at byte {following}"
        )
        self._reject(position, f"damaged header at byte {position}: {error}; {lost}; copy the shard again")
        self.ended = False
        return following

    def _too_long(self, member: Member, inside: int) -> int:
        """The member that was found last covers another one."""
        self.found[-1] = RejectedPlace(
            member.at,
            f"member {shown(member.name)} of {member.size} bytes, but the next member begins at byte {inside}; "
            "pack the shard again",
            member.name,
        )
        self.ended = False
        return inside

    def _extended(self, header: Header, at: int) -> int | None:
        """A header that says something of the next member, or of all."""
        assert header.size is not None, "a size that is none was rejected"
        start, size = at + BLOCK, header.size
        if start + size > self.total:
            return self._cut_off(at, "a header for the next member", start, size)
        problem, body = "", b""
        if size > MAX_EXTENSION_BYTES:
            problem = f"{size} bytes are over the limit of {MAX_EXTENSION_BYTES}"
        else:
            body = os.pread(self.file, size, start)
        if header.kind == b"g":
            self._global(at, body, problem)
        elif header.kind != b"K":  # the name that a link points to
            self.extension = self.extension or Extension(at)
            try:
                extend(self.extension, header.kind, body)
            except HeaderError as error:
                problem = str(error)
            if problem:
                self.extension.problem = f"the header before it, at byte {at}, is damaged: {problem}"
        return start + -(-size // BLOCK) * BLOCK

    def _global(self, at: int, body: bytes, problem: str) -> None:
        """A pax header for all members: times and comments. Names and sizes are of one member, not of all."""
        try:
            fields = pax_fields(body)
        except HeaderError as error:
            fields, problem = {}, str(error)
        of_one = sorted(key for key in fields if key in (b"path", b"size") or key.startswith(b"GNU.sparse."))
        if of_one:
            problem = f"it gives all members one {of_one[0].decode()}"
        if problem:
            self._reject(
                at, f"global header at byte {at} is not applied: {problem[:200]}; pack the shard again"
            )

    def _member(self, header: Header, extension: Extension, at: int) -> int | None:
        raw = header.name if extension.name is None else extension.name
        size = header.size if extension.size is None else extension.size
        assert size is not None, "a size that is none was rejected"
        start = at + BLOCK
        while header.continued and start < self.total:  # an old sparse header, 21 more entries a block
            start += BLOCK
            if not os.pread(self.file, BLOCK, start - BLOCK)[504:505].strip(b"\0"):
                break
        is_folder = header.kind in FOLDER_KINDS or (header.kind in FILE_KINDS and raw.endswith(b"/"))
        # Some tools give them the size of what they stand for, with no bytes behind it.
        if (is_folder or header.kind in LINK_KINDS) and self._is_header_or_end(start):
            size = 0
        if start + size > self.total:
            return self._cut_off(at, raw, start, size)
        if not is_folder:
            reason = name_problem(raw) or _rejection(header, extension)
            if reason:
                self._reject(at, f"member {shown(raw)}: {reason}", raw)
            else:
                self.last = Member(raw.decode(), at, start, size)
                self.found.append(self.last)
        return start + -(-size // BLOCK) * BLOCK

    def _cut_off(self, at: int, name: str | bytes, start: int, size: int) -> int | None:
        """A size beyond the end: the shard was cut off, or the size is wrong and more members follow."""
        self.extension = None
        member = Member(shown(name), at, start, size)
        following = self._inside(member, self.total)
        missing = f"{start + size - self.total} bytes are missing"
        self._reject(
            at,
            f"cut off inside {shown(name)}, {missing}; copy the shard again"
            if following is None
            else f"member {shown(name)} of {size} bytes: {missing}, and the next readable member begins at byte "
            f"{following}; pack the shard again",
            name if isinstance(name, bytes) else b"",
        )
        return following

    def _inside(self, member: Member, end: int) -> int | None:
        """A header within what should be a member's data. A tar within the tar has its own."""
        if member.name.rstrip("'").lower().endswith(".tar"):
            return None
        found = self._next_header(member.offset, end)
        return None if found is None or (found - member.offset) % BLOCK else found

    def _reject(self, at: int, reason: str, name: bytes = b"") -> None:
        self.found.append(RejectedPlace(at, reason, name.decode("utf-8", "backslashreplace")))

    def _is_header_or_end(self, position: int) -> bool:
        block = os.pread(self.file, BLOCK, position)
        if not block.strip(b"\0"):
            return True
        try:
            parse_header(block)
        except (HeaderError, IndexError):
            return False
        return True

    def _behind_zeros(self, position: int) -> int:
        """The first block from ``position`` on that is not all zeros."""
        while data := os.pread(self.file, SEARCHED_BYTES, position):
            if rest := data.lstrip(b"\0"):
                return position + (len(data) - len(rest)) // BLOCK * BLOCK
            position += len(data)
        return self.total

    def _next_header(self, position: int, end: int) -> int | None:
        """Where the next readable header begins, from ``position`` on and before ``end``; at any byte, as some may
        be lost."""
        while position < end:
            data = os.pread(self.file, SEARCHED_BYTES + BLOCK, position)
            found = data.find(MAGIC, MAGIC_AT)
            while found >= 0:
                start = found - MAGIC_AT
                if position + start >= end:
                    return None
                try:
                    if len(block := data[start : start + BLOCK]) == BLOCK:
                        parse_header(block)
                        return position + start
                except HeaderError:
                    pass
                found = data.find(MAGIC, found + 1)
            position += SEARCHED_BYTES
        return None


def _rejection(header: Header, extension: Extension) -> str:
    if extension.problem:
        return f"{extension.problem}; pack the shard again"
    if header.kind == b"S" or extension.sparse:
        return "it is a sparse file, stored without its holes; pack the shard again without --sparse"
    if header.kind in LINK_KINDS:
        return "it is a link or device and is not followed; pack the shard again with --dereference"
    if header.kind not in FILE_KINDS:
        return f"it is of type {header.kind!r}, no whole file; pack the shard again"
    return ""
