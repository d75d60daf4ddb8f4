"""The bytes of the pictures and clips that a request names: in the request, in a folder, or on the web."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vl3train.serving.incoming.errors import ApiError
from vl3train.serving.incoming.fetching import fetch
from vl3train.serving.incoming.options import ServingOptions


async def load_media(media: Mapping[str, str], options: ServingOptions) -> dict[str, bytes]:
    """The bytes of each part, by its name. Raises ApiError naming the part."""
    left, found = options.max_media_bytes, {}
    for name, address in media.items():
        found[name] = await _load(name, address, left, options)
        left -= len(found[name])
    return found


async def _load(name: str, address: str, most_bytes: int, options: ServingOptions) -> bytes:
    scheme = address[:10].partition(":")[0].lower() if ":" in address[:10] else ""
    if scheme == "data":
        return decode_data_url(address, most_bytes, name)
    if scheme in ("http", "https"):
        if not options.allow_urls:
            way_out = "send the file itself as a data: URL, or start the server with --allow-urls"
            raise ApiError(400, f"{name}: this server fetches nothing; {way_out}", param=name)
        return await fetch(address, most_bytes=most_bytes, seconds=options.read_seconds, param=name)
    if scheme not in ("", "file"):
        raise ApiError(400, f"{name}: an address is a data:, http: or https: URL, or a path", param=name)
    if options.media_root is None:
        way_out = "send the file itself as a data: URL, or start the server with --media-root FOLDER"
        raise ApiError(400, f"{name}: this server reads no files; {way_out}", param=name)
    path = unquote(urlsplit(address).path) if scheme == "file" else address
    return await asyncio.to_thread(read_below, options.media_root, path, most_bytes, name)


def decode_data_url(address: str, most_bytes: int, param: str) -> bytes:
    """The bytes in a ``data:...;base64,`` URL. Raises ApiError for another form, or for too many."""
    head, comma, body = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(400, f"{param}: a data: URL here is data:TYPE;base64,BYTES", param=param)
    if len(body) * 3 // 4 > most_bytes + 2:
        raise _too_large(param, most_bytes)
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{param} is no base64: {error}", param=param) from None
    if len(data) > most_bytes:
        raise _too_large(param, most_bytes)
    return data


def read_below(root: Path, name: str, most_bytes: int, param: str) -> bytes:
    """A file below ``root``; links and ``..`` may not lead out of it.

    Raises ApiError: it is not there, lies elsewhere, is no plain file, or is too large. What lies elsewhere is not
    told from what is not there.
    """
    there = root.resolve()
    missing = ApiError(400, f"{param}: there is no file {name} in the server's folder", param=param)
    try:
        path = (there / name).resolve()
        if not path.is_relative_to(there):
            raise missing
        # Opened without waiting, as for a pipe, and without following a link that took the file's place meanwhile.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise missing
            if info.st_size > most_bytes:
                raise _too_large(param, most_bytes)
            return file.read(most_bytes)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a loop of links
        raise missing from None


def _too_large(param: str, most_bytes: int) -> ApiError:
    message = f"{param} is larger than the {most_bytes / 2**20:.3g} MiB that are left for a request's media"
    return ApiError(
        413, f"{message}; send less, or start the server with a larger --max-media-mib", param=param
    )
