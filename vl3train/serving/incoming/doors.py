"""Who may come in, and how errors go out: what stands before every request."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from vl3train.serving.incoming.errors import ApiError
from vl3train.serving.incoming.options import ServingOptions

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Doors:
    """Lets requests in: few enough, not too large, and none that a page of others has sent."""

    def __init__(self, options: ServingOptions, tell: Callable[[str], None]) -> None:
        self._options, self._tell = options, tell
        self.num_inside = 0

    @web.middleware
    async def pass_through(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """aiohttp's middleware: the response, or the error as OpenAI's clients read it."""
        started = time.monotonic()
        try:
            self.refuse_others(request)
            response = await (
                self._counted(request, handler) if request.method == "POST" else handler(request)
            )
        except ApiError as error:
            response = web.json_response(error.body(), status=error.status)
        except web.HTTPException as error:
            told = ApiError(error.status, f"{request.method} {request.path}: {error.reason}")
            response = web.json_response(told.body(), status=error.status)
        except ConnectionResetError:
            raise  # the client is gone
        except Exception:
            traceback.print_exc()
            told = ApiError(500, "an error of the server; its own messages have it")
            response = web.json_response(told.body(), status=500)
        if not response.prepared:
            response.headers.update(HEADERS)
        took = time.monotonic() - started
        self._tell(f"{request.method} {request.path} {response.status} {took:.1f} s")
        return response

    def refuse_others(self, request: web.Request) -> None:
        """Raises ApiError for a request under a name that is not this server's, or from a page of another server."""
        host = request.headers.get("Host", "")
        if not self._options.knows(host):
            message = f"this server is not {host[:100]!r}; start it with --allow-host NAME to be reached by that name"
            raise ApiError(403, message)
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, "a page of another server may not ask this one")

    async def _counted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """With a whole body of JSON, while there is room."""
        if request.content_type != "application/json":
            raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
        most = self._options.num_slots + self._options.max_waiting
        if self.num_inside >= most:
            raise ApiError(429, f"{most} requests are in progress; ask again later", code="overloaded")
        self.num_inside += 1
        try:
            try:
                async with asyncio.timeout(self._options.read_seconds):
                    await request.read()
            except TimeoutError:
                raise ApiError(
                    408, f"the body was not here within {self._options.read_seconds:g} s"
                ) from None
            except web.HTTPRequestEntityTooLarge:
                mib = self._options.max_media_bytes / 2**20
                message = f"a request may hold {mib:.3g} MiB of media; --max-media-mib of the server says so"
                raise ApiError(413, message) from None
            return await handler(request)
        finally:
            self.num_inside -= 1
