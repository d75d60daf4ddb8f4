"""Records in files of text: JSON, one JSON record a line, and tables. Compressed ones are read as they are.

A table is read as text. Nothing in it is guessed to be a number or to be missing: ``3``, ``True``, ``None`` and ``NA``
are words.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import IO, Any, cast

from vl3train.contracts.records import SampleError
from vl3train.data.records.json_dictionaries import dictionary_records

LINE_SUFFIXES = ("jsonl", "ndjson")
TABLE_SUFFIXES = ("csv", "tsv")
TEXT_SUFFIXES = ("json", *LINE_SUFFIXES, *TABLE_SUFFIXES)
COMPRESSED_SUFFIXES = ("gz", "zst", "bz2", "xz")
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What the libraries raise of a damaged or cut compressed file."""

Rows = Iterator[tuple[str, Any | SampleError]]
"""Each row with where it stands, or the reason why it cannot be read."""


def text_suffix(name: str) -> str:
    """The suffix that says what a file of text holds; empty where it is none of TEXT_SUFFIXES.

    >>> text_suffix("a/b.JSONL.gz"), text_suffix("b.parquet")
    ('jsonl', '')
    """
    words = PurePath(name).name.lower().split(".")[1:]
    if words and words[-1] in COMPRESSED_SUFFIXES:
        words.pop()
    return words[-1] if words and words[-1] in TEXT_SUFFIXES else ""


def read_text_file(source: str, others: Sequence[str] = ()) -> Rows:
    """The rows of one file. ``others``: files named with it, for questions whose answers lie apart."""
    suffix = text_suffix(source)
    try:
        with _opened(source) as file:
            if suffix in LINE_SUFFIXES:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{source}:{number}", parsed(line)
                return
            if suffix in TABLE_SUFFIXES:
                yield from read_table(source, file)
                return
            text = file.read()
    except READ_ERRORS as error:
        yield source, SampleError(f"cannot be read on: {error}; copy or pack the file again")
        return
    records = parsed(text)
    if isinstance(records, SampleError):
        yield source, SampleError(f"{records}; a file with one record a line is called .jsonl")
    elif isinstance(records, list):
        yield from ((f"{source}[{number}]", record) for number, record in enumerate(records))
    elif isinstance(records, Mapping):
        for place, record in dictionary_records(records, _dictionaries(others, source)):
            yield f"{source}{place}", record
    else:
        yield source, SampleError("holds no list of records; a file with one record a line is called .jsonl")


def parsed(text: bytes) -> Any | SampleError:
    """What JSON holds, or the reason why it cannot be read."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return SampleError(f"no JSON, line {error.lineno} column {error.colno}: {error.msg}")
    except UnicodeDecodeError as error:
        return SampleError(f"no UTF-8 text, byte {error.start}: {error.reason}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        return SampleError(f"no JSON that can be read: {error}")


def _opened(source: str) -> IO[bytes]:
    suffix = PurePath(source).suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(source, "rb"))
    if suffix == ".bz2":
        return bz2.open(source, "rb")
    if suffix == ".xz":
        return lzma.open(source, "rb")
    if suffix == ".zst":  # Python has it from 3.14 on
        import pyarrow

        stream = pyarrow.input_stream(source, compression="zstd")
        return io.BufferedReader(stream)
    return open(source, "rb")


def _dictionaries(others: Sequence[str], source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The JSON objects that other named files hold, each with its file's name."""
    for other in others:
        if other != source and text_suffix(other) == "json" and Path(other).is_file():
            try:
                with _opened(other) as file:
                    found = parsed(file.read())
            except READ_ERRORS:
                continue  # its own turn comes, with its reason
            if isinstance(found, Mapping):
                yield other, found


def read_table(source: str, file: IO[bytes]) -> Rows:
    """Rows of an open table whose first line names the columns. One with ``;`` between columns is read, too."""
    delimiter = "\t" if text_suffix(source) == "tsv" else ","
    csv.field_size_limit(sys.maxsize)  # a cell may be a picture in base64
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    head = next(iter(text), "")
    if delimiter not in head and ";" in head:
        delimiter = ";"
    rows = csv.reader(_lines(head, text), delimiter=delimiter)
    names = next(rows, [])
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield (
            source,
            SampleError(f"columns of the same name: {twice}; the first line must name each column once"),
        )
        return
    number = -1
    while True:
        try:
            cells = next(rows, None)
        except csv.Error as error:
            yield f"{source}[{number + 1}]", SampleError(f"no table from line {rows.line_num} on: {error}")
            return
        if cells is None:
            return
        if not cells:
            continue  # an empty line
        number += 1
        yield f"{source}[{number}]", _row(names, cells)


def _lines(head: str, text: IO[str]) -> Iterator[str]:
    yield head
    yield from text


def _row(names: list[str], cells: list[str]) -> Any | SampleError:
    if len(cells) != len(names):
        return SampleError(
            f"{len(cells)} cells for {len(names)} columns {names}; a cell with a comma or a line end needs quotes"
        )
    for name, cell in zip(names, cells, strict=True):
        if not cell.isascii() and any("\udc80" <= letter <= "\udcff" for letter in cell):
            return SampleError(f"column {name!r} is no UTF-8 text; save the table as UTF-8")
    return dict(zip(names, cells, strict=True))
