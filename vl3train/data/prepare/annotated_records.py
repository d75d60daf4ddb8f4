"""The records that become shards, each with its conversation and its media, or with the reason why it is rejected."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.contracts.records import SampleError
from vl3train.data.records.annotations import MediaFile, read_record
from vl3train.data.records.conversation import Conversation
from vl3train.data.records.record_files import read_annotations

Found = tuple[Conversation, tuple[MediaFile, ...]] | str
"""A record and its files, or the reason why it is rejected."""

PATH_SHOWN = 80
"""Characters of a path that is too long to be one: often it is a whole picture in base64."""


@dataclass(frozen=True, slots=True)
class AnnotatedRecords:
    """Records in annotation files, and the folder of their media."""

    annotations: tuple[str, ...]
    """Files, or what ``record_files.read_annotations`` opens besides."""
    media_root: Path
    columns: dict[str, str] | None = None
    """Renames columns, see ``read_annotations``."""

    def read(self) -> Iterator[tuple[str, Found]]:
        """Place and content of each record, or the reason why it is rejected; whether its media exist is checked."""
        for path in self.annotations:
            for where, record in read_annotations(path, self.columns):
                yield where, self._checked(where, record)

    def _checked(self, where: str, record: Any) -> Found:
        try:
            if isinstance(record, SampleError):
                raise record
            if not isinstance(record, Mapping):
                raise SampleError(f"a record is an object with keys, this is a {type(record).__name__}")
            conversation, media = read_record(record, where=where)
            for medium in media:
                if medium.data is None:
                    _check_file(self.media_root / medium.path)
        except SampleError as error:
            return str(error).removeprefix(f"{where}: ")
        return conversation, media


def _check_file(path: Path) -> None:
    """Raise SampleError where the file cannot be read. Its content is not read: the index decodes it."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the path
        raise SampleError(f"no such file: {path}; paths start from --media-root") from None
    except OSError as error:
        raise SampleError(f"{error.strerror}: {str(path)[:PATH_SHOWN]}") from error
    if not stat.S_ISREG(found.st_mode):
        raise SampleError(f"no file but a folder or device: {path}")
    if not found.st_size:
        raise SampleError(f"empty file: {path}")
    if not os.access(path, os.R_OK):
        raise SampleError(f"no permission to read: {path}")
