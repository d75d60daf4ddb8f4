"""The chat page: one file, which loads nothing from elsewhere and may do nothing but ask this server."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from aiohttp import web

FILE = Path(__file__).parent / "page.html"


def page_policy(html: str) -> str:
    """What a browser lets the page do: run its own script, draw pictures that it holds, ask this server."""
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def chat_page(_: web.Request) -> web.Response:
    """The page."""
    html = FILE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": page_policy(html), "Cache-Control": "no-cache"}
    return web.Response(text=html, content_type="text/html", headers=headers)
