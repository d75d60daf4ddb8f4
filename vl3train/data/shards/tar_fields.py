"""One header of a tar file and what its fields say: ustar, GNU, pax, old v7. Pure functions of its bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

BLOCK = 512
MAGIC = b"ustar"
MAGIC_AT = 257
MAX_NAME_BYTES = 4096
PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]{1,256})=")


class HeaderError(ValueError):
    """A block that is no header, or a value in it that cannot be."""


@dataclass(frozen=True, slots=True)
class Header:
    """What one block says."""

    kind: bytes  # the type flag
    name: bytes
    size: int | None
    size_problem: str = ""  # where ``size`` is None
    continued: bool = False  # an old GNU sparse header that goes on in the next block


@dataclass(slots=True)
class Extension:
    """What the headers before a member say of it."""

    at: int  # byte of the first of them
    name: bytes | None = None
    size: int | None = None
    sparse: bool = False
    problem: str = ""  # why nothing of it can be trusted


def parse_header(block: bytes) -> Header:
    """The header that a block of ``BLOCK`` bytes holds.

    Raises:
        HeaderError: its checksum is another one. A wrong size alone is kept in the header.
    """
    stored = _number(block[148:156])
    rest = block[:148] + b" " * 8 + block[156:]
    if stored != (total := sum(rest)) and stored != total - 256 * sum(byte > 127 for byte in rest):
        raise HeaderError("its checksum is wrong")
    name, prefix = _text(block[:100]), _text(block[345:500])
    if prefix and block[MAGIC_AT : MAGIC_AT + 8] != b"ustar  \0" and block[MAGIC_AT:].startswith(MAGIC):
        name = prefix + b"/" + name  # GNU's own format has times there
    kind = block[156:157]
    continued = kind == b"S" and block[482] != 0
    try:
        return Header(kind, name, _number(block[124:136]), continued=continued)
    except HeaderError as error:
        return Header(kind, name, None, str(error), continued)


def pax_fields(body: bytes) -> dict[bytes, bytes]:
    """``LENGTH KEY=VALUE`` lines of a pax header.

    Raises:
        HeaderError: a line is none.
    """
    fields, position = {}, 0
    while position < len(body) and body[position]:
        match = PAX_RECORD.match(body, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(body) or body[end - 1 : end] != b"\n":
            raise HeaderError(f"its record at byte {position} is none")
        fields[match[2]] = body[match.end() : end - 1]
        position = end
    return fields


def extend(extension: Extension, kind: bytes, body: bytes) -> None:
    """Add what one more header before the member says.

    Raises:
        HeaderError: it is damaged.
    """
    if kind == b"L":
        extension.name = _text(body)
    elif kind in (b"x", b"X"):
        fields = pax_fields(body)
        extension.name = fields.get(b"path") or extension.name
        if size := fields.get(b"size"):
            if not re.fullmatch(rb"\d{1,30}", size):
                raise HeaderError(f"its size is {size[:30]!r}")
            extension.size = int(size)
        if any(key.startswith(b"GNU.sparse.") for key in fields):
            extension.sparse = True
            extension.name = fields.get(b"GNU.sparse.name") or extension.name


def name_problem(name: bytes) -> str:
    """Why no file of a sample may bear this name; empty if it may."""
    if len(name) > MAX_NAME_BYTES:
        return f"a name of {len(name)} bytes is over the limit of {MAX_NAME_BYTES}; give it a shorter one"
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return "its name is not UTF-8; rename the file, for example with convmv, and pack the shard again"
    if text.startswith("/") or ".." in text.split("/"):
        return "names must be relative, without '..'; pack from inside the folder"
    if any(ord(character) < 32 or ord(character) == 127 for character in text):  # a console would obey them
        return "its name has control characters; rename the file, and pack the shard again"
    return ""


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary form, which has the first bit set."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise HeaderError("a negative number")
        return int.from_bytes(field) & ~(1 << (8 * len(field) - 1))
    digits = _text(field).strip()
    if not re.fullmatch(rb"[0-7]*", digits):
        raise HeaderError(f"{digits!r} is no octal number")
    return int(digits or b"0", 8)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]
