"""Addresses of remote shards: which are read, what a shard is called, and what of an address may be shown or stored.

A signed address is a key to the file: ``https://host/a.tar?X-Amz-Signature=...``, ``https://user:password@host/a.tar``.
Requests use it whole. Everything that is printed, stored or named has ``shown_address``.
"""

from __future__ import annotations

import base64
import os
import re
from urllib.parse import parse_qsl, unquote

_STORES = ("abfs", "abfss", "adl", "az", "cos", "gcs", "gs", "hf", "obs", "oci", "oss", "s3", "s3a")
_SERVERS = ("ftp", "hdfs", "http", "https", "memory", "sftp", "smb", "ssh", "webhdfs")
SCHEMES = frozenset((*_STORES, *_SERVERS))
"""Of fsspec's file systems those that lie elsewhere. Not those that read this machine's files (file, local), and not
those that open an address within an address (zip, cache, reference, whose templates are code)."""
USER_IS_CONTAINER = frozenset(("abfs", "abfss", "adl"))
"""Azure's ``abfss://container@account/path``: no secret, and part of the place."""
VERSION_PARAMETERS = frozenset(("versionId", "versionid", "generation", "snapshot"))
"""What stores call a version of a file: with another one the bytes are others. The rest of a query is how one gets
them, and a signature is another one each day."""
LONGEST_NAME = 200
"""Bytes; the rows of an index lie in a file of that name and a suffix, which may have 255."""
FEWEST_SECRET_CHARACTERS = 6

_PARTS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<host>[^/?#]*)(?P<rest>.*)", re.DOTALL)
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>|]+")
_QUERY_IN_TEXT = re.compile(r"\?[\w.~%+-]+=[^\s'\"<>)]*")


def shard_name(address: str) -> str:
    """What a shard is called: the last part of its path.

    >>> shard_name("https://me:key@host/set/a-0.tar?Signature=abc")
    'a-0.tar'
    """
    return _split(address)[3].rpartition("/")[2]


def address_problem(address: str) -> str | None:
    """Why no shard is read from an address, in words that hold no secret; None where it is."""
    found = _PARTS.fullmatch(address)
    if found is None:
        return "it is no address; write one as s3://bucket/a.tar, or put local shards into the folder itself"
    scheme = found["scheme"].lower()
    if scheme not in SCHEMES or "::" in address:
        return (
            f"addresses of this kind ({scheme}) are not read; there are {', '.join(sorted(SCHEMES))}. Local shards "
            "belong into the folder itself, as files or links"
        )
    name = shard_name(address)
    if name in ("", ".", "..") or "\\" in name or not name.isprintable():
        return "its path does not end in the name of a file"
    if len(os.fsencode(name)) > LONGEST_NAME:
        return f"its file's name has {len(os.fsencode(name))} bytes, more than {LONGEST_NAME}"
    return None


def shown_address(address: str) -> str:
    """An address without user, password and query, but for the version that it names.

    >>> shown_address("https://me:key@host:8443/set/a.tar?versionId=7&X-Amz-Signature=abc#x")
    'https://host:8443/set/a.tar?versionId=7'
    >>> shown_address("abfss://container@account/a.tar")
    'abfss://container@account/a.tar'
    """
    scheme, user, host, path, query = _split(address)
    kept = [f"{key}={value}" for key, value in parse_qsl(query) if key in VERSION_PARAMETERS]
    owner = f"{user.partition(':')[0]}@" if user and scheme in USER_IS_CONTAINER else ""
    return f"{scheme}://{owner}{host}{path}" + (f"?{'&'.join(kept)}" if kept else "")


def without_secrets(text: str, address: str) -> str:
    """A library's message about an address, with nothing in it that opens the file.

    >>> without_secrets("403, url='https://h/a.tar?sig=s%2Fecret'", "https://h/a.tar?sig=s%2Fecret")
    "403, url='https://h/a.tar'"
    """
    text = text.replace(address, shown_address(address))
    for secret in sorted(_secrets(address), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _IN_TEXT.sub(lambda found: shown_address(found[0]) + _closing(found[0]), text)
    return _QUERY_IN_TEXT.sub(_version_only, text)


def _split(address: str) -> tuple[str, str, str, str, str]:
    """Scheme, user and password, host, path, query."""
    found = _PARTS.fullmatch(address)
    if found is None:
        return "", "", "", address, ""
    scheme, (user, _, host) = found["scheme"].lower(), found["host"].rpartition("@")
    if scheme in ("http", "https"):
        path, _, query = found["rest"].partition("#")[0].partition("?")
    else:  # in an object's name both may be letters
        begun = re.search(r"\?(?=[\w.-]+=)", found["rest"])
        end = len(found["rest"]) if begun is None else begun.start()
        path, query = found["rest"][:end], found["rest"][end + 1 :]
    return scheme, user, host, path, query


def _secrets(address: str) -> set[str]:
    """What a message may repeat of an address in other forms: decoded, or as the header that it becomes."""
    scheme, user, _, _, query = _split(address)
    pairs = [piece.partition("=") for piece in query.split("&")]
    written = {value for key, _, value in pairs if key not in VERSION_PARAMETERS}
    written |= {query, user.partition(":")[2]}
    if user and scheme not in USER_IS_CONTAINER:
        written |= {user, base64.b64encode(unquote(user).encode()).decode()}
    found = written | {unquote(one) for one in written}
    return {one for one in found if len(one) >= FEWEST_SECRET_CHARACTERS}


def _closing(address: str) -> str:
    """Brackets and stops behind an address's query that belong to the sentence."""
    query = re.search(r"\?.*", address, re.DOTALL)
    closing = re.search(r"[)\],.;:]*$", query[0]) if query else None
    return closing[0] if closing else ""


def _version_only(query: re.Match[str]) -> str:
    pairs = parse_qsl(query[0][1:])
    kept = [f"{key}={value}" for key, value in pairs if key in VERSION_PARAMETERS]
    return f"?{'&'.join(kept)}" if kept else ""
