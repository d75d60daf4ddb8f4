"""Bytes from public http(s) addresses: never from this machine or its network, never more than allowed."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from vl3train.serving.incoming.errors import ApiError

MOST_REDIRECTS = 3
NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses whose last 32 bits are an IPv4 address (RFC 6052)."""


class NotPublic(OSError):  # noqa: N818 - its name says what it is
    """An address that is not on the public internet."""


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, also the IPv4 address within an IPv6 one.

    >>> [is_public(one) for one in ("8.8.8.8", "127.0.0.1", "169.254.169.254", "::ffff:10.0.0.1", "64:ff9b::7f00:1")]
    [True, False, False, False, False]
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if found in NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


class PublicResolver(AbstractResolver):
    """Resolves names; the connection is made to the very addresses that were checked, whatever the name says next."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Raises NotPublic where any address of the name is not public."""
        found = await self._resolver.resolve(host, port, family)
        if wrong := [one["host"] for one in found if not is_public(one["host"])]:
            raise NotPublic(f"{host} leads to {wrong[0]}")
        return found

    async def close(self) -> None:
        """Nothing is kept open."""


async def fetch(url: str, *, most_bytes: int, seconds: float, param: str) -> bytes:
    """What lies at an address. ``seconds`` are for all of it, redirects included.

    Raises:
        ApiError: it is not public, not there, larger than ``most_bytes``, or slower.
    """
    # Without a connection kept open, cookies, proxies of the environment, or answers that unpack to gigabytes.
    connector = aiohttp.TCPConnector(resolver=PublicResolver(), force_close=True, use_dns_cache=False)
    try:
        async with (
            asyncio.timeout(seconds),
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"Accept-Encoding": "identity", "User-Agent": "vl3train"},
            ) as session,
        ):
            for _ in range(MOST_REDIRECTS + 1):
                refuse_address(url, param)
                async with session.get(url, allow_redirects=False) as answer:
                    if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                        url = urljoin(url, answer.headers["Location"])
                        continue
                    return await _read(answer, most_bytes, param)
    except TimeoutError:
        raise ApiError(400, f"{param}: not fetched within {seconds:g} s", param=param) from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if _not_public(error):
            raise ApiError(
                400, f"{param}: the address is not public; send the file itself", param=param
            ) from None
        raise ApiError(400, f"{param} cannot be fetched: {type(error).__name__}", param=param) from None
    raise ApiError(400, f"{param}: more than {MOST_REDIRECTS} redirects", param=param)


def refuse_address(url: str, param: str) -> None:
    """Raises ApiError for another scheme, a password in the address, or an IP address that is not public."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ApiError(400, f"{param}: an address begins with http:// or https://", param=param)
    if parts.username is not None or parts.password is not None:
        raise ApiError(400, f"{param}: an address with a user or password is not fetched", param=param)
    try:
        public = is_public(parts.hostname)
    except ValueError:
        return  # a name: the resolver looks at what it leads to
    if not public:
        raise ApiError(400, f"{param}: the address is not public; send the file itself", param=param)


async def _read(answer: aiohttp.ClientResponse, most_bytes: int, param: str) -> bytes:
    if answer.status != 200:
        raise ApiError(400, f"{param} cannot be fetched: its server answers {answer.status}", param=param)
    data = bytearray()
    async for chunk in answer.content.iter_chunked(2**16):
        data += chunk
        if len(data) > most_bytes:
            message = f"{param} is larger than the {most_bytes / 2**20:g} MiB that a request may hold"
            raise ApiError(413, message, param=param)
    return bytes(data)


def _not_public(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, NotPublic):
            return True
        error = error.__cause__ or error.__context__
    return False
