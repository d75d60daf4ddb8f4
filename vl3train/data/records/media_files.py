"""The media of a record, however they are given: a path, bytes, a data URL, base64, or the pictures of a clip."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote

from vl3train.contracts.records import SampleError
from vl3train.contracts.redaction import shown_value
from vl3train.data.records.conversation import half_character
from vl3train.data.shards.tar_headers import CAPTION_PART, CONVERSATION_PART, IMAGE_SUFFIXES

SIGNATURES = (
    ("jpg", rb"\xff\xd8\xff"),
    ("png", rb"\x89PNG"),
    ("webp", rb"RIFF.{4}WEBP"),
    ("gif", rb"GIF8"),
    ("bmp", rb"BM.{12}[\x0c\x28\x6c\x7c]\0\0\0"),
    ("tif", rb"II\*\0|MM\0\*"),
    ("mp4", rb".{4}ftyp"),
    ("mkv", rb"\x1a\x45\xdf\xa3"),
    ("avi", rb"RIFF.{4}AVI "),
)
"""How files begin; plain webdataset decodes by extension."""

STILL_SUFFIXES = IMAGE_SUFFIXES - {"gif"}
"""Of pictures that a list under ``video`` shows one after the other. A GIF there is a clip of its own."""

MEDIA_KEY = {
    "image": re.compile(r"(image|img|picture|photo)s?(_?(path|file|file_?name|name|url|bytes)s?)?(_?\d+)?"),
    "video": re.compile(r"(video|clip)s?(_?(path|file|file_?name|name|url|bytes)s?)?(_?\d+)?|mp4|frames"),
}
"""Keys that name media besides ``image`` and ``images``, ``video`` and ``videos``. No ids, sizes and descriptions."""

SHORTEST_BASE64 = 64
"""Characters. The smallest pictures have as many, and no path that is that long begins like one."""
SHOWN = 80
"""Characters of a value that a reason shows."""


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A file of a sample, or its bytes where a data set holds them itself; or the pictures of a clip, in order."""

    path: str
    kind: str  # "image" or "video"
    data: bytes | None = None
    pictures: tuple[MediaFile, ...] = ()  # a clip that is given as a list of them
    times: tuple[float, ...] | None = None  # of each picture, in seconds
    fps: float | None = None  # of pictures without times, how many a second; of a clip, what is said of it
    location: Path | None = None  # of its file, once it is found

    @property
    def suffix(self) -> str:
        """Of its name, in small letters and digits; of bytes without a name, by how they begin; else empty."""
        suffix = re.sub(r"[^a-z0-9]", "", PurePath(self.path).suffix.lower())
        if not suffix and self.data is not None:
            return next((name for name, start in SIGNATURES if re.match(start, self.data, re.DOTALL)), "")
        return suffix


def is_nothing(value: Any) -> bool:
    """Whether a value stands for no medium: null, blank text, NaN, an object or list of nothing else.

    >>> is_nothing([""]), is_nothing({"bytes": None, "path": None}), is_nothing("a.jpg")
    (True, True, False)
    """
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(map(is_nothing, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_nothing, value))
    return value is None or value == b"" or (isinstance(value, float) and math.isnan(value))


def find_media(record: Mapping[str, Any], kind: str) -> tuple[list[Any], frozenset[str]]:
    """All media of a kind in their order, and the keys that they come from.

    Raises:
        SampleError: two keys have other files.
    """
    named = [key for key in (kind, f"{kind}s") if not is_nothing(record.get(key))]
    if len(named) == 2 and record[kind] != record[f"{kind}s"]:
        raise SampleError(f"it has {kind} and {kind}s, with other files in each; name all of them in {kind}s")
    if named:
        return list_media(record[named[0]], kind), frozenset(named)
    others = [
        key for key in record if MEDIA_KEY[kind].fullmatch(str(key).lower()) and _may_be_media(record[key])
    ]
    numbered = [key for key in others if re.search(r"\d$", key)]
    if numbered and numbered == others:  # image_1, image_2 and so on
        ordered = sorted(others, key=lambda key: int(re.findall(r"\d+$", key)[0]))
        return [one for key in ordered for one in list_media(record[key], kind)], frozenset(others)
    found = [list_media(record[key], kind) for key in others]
    if any(one != found[0] for one in found):
        raise SampleError(
            f"it has {' and '.join(others)}, with other files in each; name all of them in {kind}s"
        )
    return (found[0] if found else []), frozenset(others)


def is_media_key(key: str) -> bool:
    """Whether a key of a record names media.

    >>> [key for key in ("images", "video_path", "image_2", "image_id", "video_caption") if is_media_key(key)]
    ['images', 'video_path', 'image_2']
    """
    return any(pattern.fullmatch(key.lower()) for pattern in MEDIA_KEY.values())


def list_media(value: Any, kind: str) -> list[Any]:
    """The media that one key of a record holds, one entry each. A clip of pictures is one entry, their list.

    Raises:
        SampleError: nothing stands between media.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a table of text
        value = json_list(value)
    if is_nothing(value):
        return []
    if not isinstance(value, (list, tuple)):
        return [value]
    entries = list(value)
    if empty := [number for number, entry in enumerate(entries, 1) if is_nothing(entry)]:
        raise SampleError(
            f"{kind} {empty[0]} of {len(entries)} is empty; name its file or take the entry out"
        )
    if kind == "video" and all(map(_is_still, entries)) and not _is_one_webp(entries):
        return [entries]
    return entries


def json_list(text: str) -> Any:
    """The list that JSON text holds; other text stays as it is."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, list) else text


def media_file(
    source: Any, kind: str, *, times: tuple[float, ...] | None = None, fps: float | None = None
) -> MediaFile:
    """One medium of a record. ``times`` are of a clip's pictures, ``fps`` is what the record says of a clip.

    Raises:
        SampleError: it names no file and holds no bytes, or is an address.
    """
    if isinstance(source, (list, tuple)):
        if kind == "image":
            raise SampleError(
                f"image {shown_value(source, SHOWN)} is a list in a list; name each picture by itself"
            )
        pictures = tuple(media_file(picture, "image") for picture in source)
        return MediaFile("", "video", pictures=pictures, times=times, fps=None if times else fps)
    data, path = None, source
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("url") or source.get("path") or ""
    elif isinstance(source, (bytes, bytearray)):
        data, path = bytes(source), ""
    if not isinstance(path, str) or not (path or data):
        raise SampleError(f"{kind} {shown_value(source, SHOWN)} is no file path")
    if data is None and path[:5].lower() == "data:":
        return MediaFile("", kind, _data_url_bytes(path, kind), fps=fps)
    if data is None and (data := _base64_bytes(path, kind)):
        path = ""
    if reason := half_character(path):
        raise SampleError(reason)
    if path.startswith("file://"):
        path = unquote(re.sub(r"^file://(localhost(?=/))?", "", path))
    if data is None and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", path) and not re.match(r"[a-zA-Z]:[\\/]", path):
        raise SampleError(
            f"{kind} {shown_value(path, SHOWN)} is an address; download it and give the file's path"
        )
    if (suffix := PurePath(path).suffix.lower().removeprefix(".")) in (CONVERSATION_PART, CAPTION_PART):
        raise SampleError(f"{kind} {path!r} is a .{suffix} file; name the {kind} itself")
    return MediaFile(path, kind, data, fps=fps)


def _may_be_media(value: Any) -> bool:
    """Whether it is no number, such as the index of a picture."""
    return not is_nothing(value) and not isinstance(value, (int, float))


def _is_still(entry: Any) -> bool:
    """Whether an entry of a list under ``video`` is a picture."""
    if isinstance(entry, (bytes, bytearray)) or (isinstance(entry, Mapping) and entry.get("bytes")):
        return media_file(entry, "video").suffix in STILL_SUFFIXES
    if isinstance(entry, Mapping):
        entry = entry.get("url") or entry.get("path")
    if not isinstance(entry, str):
        return False
    if entry[:11].lower() == "data:image/":
        return entry[11:14].lower() != "gif"
    return PurePath(entry).suffix.lower().removeprefix(".") in STILL_SUFFIXES


def _is_one_webp(entries: list[Any]) -> bool:
    """Whether it is one WebP, which may move: a clip of its own, as a GIF is."""
    return len(entries) == 1 and isinstance(entries[0], str) and entries[0].lower().endswith(".webp")


def _data_url_bytes(url: str, kind: str) -> bytes:
    """Bytes of ``data:image/png;base64,...``."""
    head, comma, body = url.partition(",")
    media_type, *options = head[5:].lower().split(";")
    if not comma or "base64" not in [option.strip() for option in options]:
        raise SampleError(f"{kind} {url[:SHOWN]!r} is a data URL without base64; write data:TYPE;base64,...")
    of, _, name = media_type.partition("/")
    if of in ("image", "video", "audio", "text") and of != kind and name not in ("gif", "webp"):
        raise SampleError(f"{kind} {url[:SHOWN]!r} is of type {media_type}; put it under the key of its kind")
    return _decoded(body, kind)


def _base64_bytes(text: str, kind: str) -> bytes | None:
    """Bytes of base64 that begins like a picture or clip; None of a path."""
    if len(text) < SHORTEST_BASE64 or "." in text:
        return None
    try:
        start = base64.b64decode(re.sub(r"\s", "", text[:48]).translate(_URL_SAFE)[:32], validate=True)
    except binascii.Error:
        return None
    if not any(re.match(signature, start, re.DOTALL) for _, signature in SIGNATURES):
        return None
    return _decoded(text, kind)


_URL_SAFE = str.maketrans("-_", "+/")


def _decoded(text: str, kind: str) -> bytes:
    text = re.sub(r"\s", "", unquote(text) if "%" in text else text).translate(_URL_SAFE).rstrip("=")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: letters beyond ASCII
        raise SampleError(f"{kind} in base64 is damaged ({error}); encode the file again") from error
    if not data:
        raise SampleError(f"{kind} in base64 is empty; encode the file again")
    return data
