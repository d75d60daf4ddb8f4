"""What a server may do, and how much of it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """Limits of a server. The defaults let nobody in from outside, and nothing out.

    Raises ValueError naming every value that is out of range.
    """

    host: str = "127.0.0.1"  # address to listen on: from this machine only
    port: int = 8000  # 0: any free one
    media_root: Path | None = None  # folder below which clients may name files; None: none
    allow_urls: bool = False  # fetch pictures and clips from public http(s) addresses
    names: tuple[str, ...] = ()  # further names of this server, as a proxy in front has them
    max_media_bytes: int = 100 * 2**20  # of all pictures and clips of a request together
    max_new_tokens: int = 1024  # longest answer that may be asked for
    num_slots: int = 8  # answers in progress at a time
    max_waiting: int = 32  # requests behind those; more are refused
    num_decoders: int = 2  # requests decoded at a time
    read_seconds: float = 60.0  # until a request's body, or what it names by URL, is here
    with_page: bool = False  # the chat page at /

    def __post_init__(self) -> None:
        least = {
            "max_media_bytes": 1,
            "max_new_tokens": 1,
            "num_slots": 1,
            "max_waiting": 0,
            "num_decoders": 1,
        }
        wrong = [
            f"{name}={getattr(self, name)} must be {at_least} or more"
            for name, at_least in least.items()
            if getattr(self, name) < at_least
        ]
        if not 0 <= self.port <= 65535:
            wrong.append(f"port={self.port} must be 0 to 65535")
        if self.media_root is not None and not self.media_root.is_dir():
            wrong.append(f"media_root={self.media_root} is no folder")
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host == "localhost" or _is_loopback(self.host)

    @property
    def max_body_bytes(self) -> int:
        """Base64 makes four characters of three bytes; a mebibyte more is for the words."""
        return self.max_media_bytes * 4 // 3 + 2**20

    def knows(self, host: str) -> bool:
        """Whether a request's Host header names this server.

        A page of others whose name was made to lead to 127.0.0.1 comes with that name. A server that is open to the
        network has names that only its network knows.
        """
        name = _without_port(host)
        return not self.is_local or name in ("localhost", self.host, *self.names) or _is_loopback(name)


def _without_port(host: str) -> str:
    """The name in a Host header.

    >>> _without_port("[::1]:8000"), _without_port("localhost:80"), _without_port("::1"), _without_port("a.b")
    ('::1', 'localhost', '::1', 'a.b')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
