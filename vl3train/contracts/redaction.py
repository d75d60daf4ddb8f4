"""What may be shown or stored of an address, and of texts that hold addresses.

A signed address is a key to the file: ``https://host/a.tar?X-Amz-Signature=...``, ``https://user:password@host/a.jpg``.
Requests use it whole. Everything that is printed, stored or named has ``shown_address``; every reason why a sample is
rejected goes through ``without_keys`` (contracts/records.py).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote

USER_IS_CONTAINER = frozenset(("abfs", "abfss", "adl"))
"""Azure's ``abfss://container@account/path``: no secret, and part of the place."""
VERSION_PARAMETERS = frozenset(("versionId", "versionid", "generation", "snapshot"))
"""What stores call a version of a file: with another one the bytes are others. The rest of a query is how one gets
them, and a signature is another one each day."""
FEWEST_SECRET_CHARACTERS = 6

_PARTS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<host>[^/?#]*)(?P<rest>.*)", re.DOTALL)
# What is repeated has a limit in these: a reason may hold a megabyte that somebody made for a pattern to choke on.
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,40}://[^\s'\"<>|]+")
_QUERY_IN_TEXT = re.compile(r"\?[\w.~%+-]+=[^\s'\"<>)]*")
_USER_IN_TEXT = re.compile(r"(?<![\w/@])[^\s/@:'\"<>(]{1,64}:[^\s/@'\"<>]{1,256}@(?=[\w\[])")
"""``user:password@host`` of an address that is not whole."""
_RAW_PASSWORD = re.compile(
    r"(?<=://)[^\s/?#@:]{1,200}:(?!\d+[/?#])[^\s@/?#]{0,1000}[/?#][^\s'\"<>|]{0,1000}@"
)
"""``user:pass/word@``: whoever does not know that such letters are to be encoded writes them into an address."""
_SECRET_NAME = re.compile(r"auth|token|secret|passw|signature|credential|api.?key|cookie", re.IGNORECASE)
SHOWN_DEPTH = 4
"""Objects within objects whose values are looked at one by one."""


def shown_address(address: str) -> str:
    """An address without user, password and query, but for the version that it names.

    >>> shown_address("https://me:key@host:8443/set/a.tar?versionId=7&X-Amz-Signature=abc#x")
    'https://host:8443/set/a.tar?versionId=7'
    >>> shown_address("abfss://container@account/a.tar")
    'abfss://container@account/a.tar'
    """
    scheme, user, host, path, query = split_address(_RAW_PASSWORD.sub("", address))
    kept = [f"{key}={value}" for key, value in parse_qsl(query) if key in VERSION_PARAMETERS]
    owner = f"{user.partition(':')[0]}@" if user and scheme in USER_IS_CONTAINER else ""
    return f"{scheme}://{owner}{host}{path}" + (f"?{'&'.join(kept)}" if kept else "")


def split_address(address: str) -> tuple[str, str, str, str, str]:
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


def without_keys(text: str) -> str:
    """A text with nothing of its addresses but their places.

    >>> without_keys("image 'https://me:key@host/a.jpg?sig=secret#x' is an address; download it (or not)")
    "image 'https://host/a.jpg' is an address; download it (or not)"
    >>> without_keys("no such file: a.jpg?X-Amz-Signature=1 or me:key@host/b.jpg, at 10:30")
    'no such file: a.jpg or host/b.jpg, at 10:30'
    """
    text = _IN_TEXT.sub(lambda found: shown_address(found[0]) + _closing(found[0]), text)
    return _USER_IN_TEXT.sub("", _QUERY_IN_TEXT.sub(_version_only, text))


def shown_value(value: Any, letters: int) -> str:
    """How a value of a record is shown in a reason: its first letters, without keys of addresses and other secrets.

    >>> shown_value({"url": "https://me:key@host/a.jpg", "headers": {"Authorization": "Bearer key"}}, 80)
    "{'url': 'https://host/a.jpg', 'headers': {'Authorization': '***'}}"
    >>> shown_value("https://me:a key that is longer than what is shown@host/a.jpg", 20)
    "'https://host/a.jpg'"
    """
    return without_keys(repr(_without_secrets_inside(value, SHOWN_DEPTH)))[:letters]


def _without_secrets_inside(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return shown_address(value) if _PARTS.fullmatch(value) else value
    if depth and isinstance(value, Mapping):
        return {
            key: "***" if _SECRET_NAME.search(str(key)) else _without_secrets_inside(one, depth - 1)
            for key, one in value.items()
        }
    if depth and isinstance(value, list | tuple):
        return [_without_secrets_inside(one, depth - 1) for one in value]
    return value


def without_secrets(text: str, address: str) -> str:
    """A library's message about an address, with nothing in it that opens the file.

    >>> without_secrets("403, url='https://h/a.tar?sig=s%2Fecret'", "https://h/a.tar?sig=s%2Fecret")
    "403, url='https://h/a.tar'"
    """
    text = text.replace(address, shown_address(address))
    for secret in sorted(_secrets(address), key=len, reverse=True):
        text = text.replace(secret, "***")
    return without_keys(text)


def _secrets(address: str) -> set[str]:
    """What a message may repeat of an address in other forms: decoded, or as the header that it becomes."""
    scheme, user, _, _, query = split_address(address)
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
    return query[0][len(query[0].rstrip(")],.;:")) :] if query else ""


def _version_only(query: re.Match[str]) -> str:
    pairs = parse_qsl(query[0][1:])
    kept = [f"{key}={value}" for key, value in pairs if key in VERSION_PARAMETERS]
    return f"?{'&'.join(kept)}" if kept else ""
