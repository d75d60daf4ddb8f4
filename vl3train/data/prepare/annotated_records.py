"""The records that become shards, each with its conversation and its media, or with the reason why it is rejected."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.contracts.records import SampleError
from vl3train.data.media.picture_lists import pack_pictures
from vl3train.data.prepare.media_roots import MediaRoots, shown
from vl3train.data.records.annotations import read_record
from vl3train.data.records.conversation import Conversation, Text
from vl3train.data.records.media_files import STILL_SUFFIXES, MediaFile
from vl3train.data.records.record_files import read_annotations, source_folders

Found = tuple[Conversation, tuple[MediaFile, ...]] | str
"""A record and its files, each with the place where it lies; or the reason why the record is rejected."""


@dataclass(frozen=True, slots=True)
class AnnotatedRecords:
    """Records in annotation files, and the folders of their media."""

    annotations: tuple[str, ...]
    """Files, or what ``record_files.read_annotations`` opens besides."""
    media_roots: tuple[Path, ...]
    """Folders that relative paths start from, in order. No medium may lie outside them."""
    columns: dict[str, str] | None = None
    """Renames columns, see ``read_annotations``."""
    chosen_only: bool = False
    """Of preference data, take the chosen answer."""
    only: frozenset[str] | None = None
    """Places of the records that are read. None: of all."""

    def read(self, ignored: Counter[str] | None = None) -> Iterator[tuple[str, Found]]:
        """Place and content of each record, or the reason why it is rejected; whether its media exist is checked.

        ``ignored`` counts the keys of usable records that are not read.
        """
        roots = MediaRoots(self.media_roots, source_folders(self.annotations))
        for path in self.annotations:
            for where, record in read_annotations(path, self.columns, self.annotations):
                if self.only is None or where in self.only:
                    yield where, self._checked(where, record, roots, ignored)

    def _checked(self, where: str, record: Any, roots: MediaRoots, ignored: Counter[str] | None) -> Found:
        try:
            if isinstance(record, SampleError):
                raise record
            if not isinstance(record, Mapping):
                raise SampleError(f"a record is an object with keys, this is a {type(record).__name__}")
            conversation, media = read_record(
                record, where=where, chosen_only=self.chosen_only, ignored=ignored
            )
            located = tuple(_located(medium, roots) for medium in media)
        except SampleError as error:
            return str(error).removeprefix(f"{where}: ")
        return _without_rates(conversation, located), located


def medium_bytes(medium: MediaFile) -> bytes:
    """What a shard holds of a medium: its file's bytes, or its pictures packed as one clip.

    Raises:
        SampleError: its pictures have times or a rate that do not fit, or its file cannot be read.
    """
    if medium.pictures:
        pictures = [(picture.suffix or picture.kind, medium_bytes(picture)) for picture in medium.pictures]
        return pack_pictures(pictures, times=medium.times, fps=medium.fps)
    if medium.data is None:
        assert medium.location is not None, "AnnotatedRecords has found the file"
        try:
            return medium.location.read_bytes()
        except OSError as error:
            raise SampleError(f"{error.strerror}: {shown(str(medium.location))}") from error
    return medium.data


def _located(medium: MediaFile, roots: MediaRoots) -> MediaFile:
    """The same medium with the place where it lies; of a folder, with its pictures."""
    if medium.pictures:
        pictures = tuple(_located(picture, roots) for picture in medium.pictures)
        located = dataclasses.replace(medium, pictures=pictures)
        _check_picture_times(located)
        return located
    if medium.data is not None:
        return medium
    path = roots.find(medium.path)
    if medium.kind == "video" and path.is_dir():
        pictures = _pictures_of_folder(path, roots)
        return dataclasses.replace(medium, pictures=pictures)
    _check_file(path)
    return dataclasses.replace(medium, location=path)


def _check_file(path: Path) -> None:
    """Raise SampleError where the file cannot be read. Its content is not read: the index decodes it."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise SampleError(f"no file but a folder or device: {path}")
    if not found.st_size:
        raise SampleError(f"empty file: {path}")
    if not os.access(path, os.R_OK):
        raise SampleError(f"no permission to read: {path}")


def _check_picture_times(medium: MediaFile) -> None:
    """Raise SampleError where the times of a clip's pictures do not fit, without reading one."""
    pack_pictures([("", b"")] * len(medium.pictures), times=medium.times, fps=medium.fps)


def _pictures_of_folder(folder: Path, roots: MediaRoots) -> tuple[MediaFile, ...]:
    """The pictures of a folder, in the order of the numbers in their names: 2.jpg before 10.jpg."""
    names = [path for path in folder.iterdir() if path.suffix.lower().removeprefix(".") in STILL_SUFFIXES]
    if not names:
        raise SampleError(f"a folder without pictures: {folder}; name a clip, or a folder of its pictures")
    names.sort(
        key=lambda path: [int(word) if word.isdecimal() else word for word in re.split(r"(\d+)", path.name)]
    )
    return tuple(_located(MediaFile(str(path), "image"), roots) for path in names)


def _without_rates(conversation: Conversation, media: tuple[MediaFile, ...]) -> Conversation:
    """The rate of a clip that is a folder is its pictures', and none that frames are taken at."""
    lists = {number for number, medium in enumerate(media) if medium.pictures}
    if not lists:
        return conversation

    def content(one: Any) -> Any:
        if isinstance(one, Text) or int(one.part.partition(".")[0]) not in lists:
            return one
        return dataclasses.replace(one, fps=None)

    return Conversation(
        tuple(
            dataclasses.replace(turn, content=tuple(map(content, turn.content)))
            for turn in conversation.turns
        )
    )
