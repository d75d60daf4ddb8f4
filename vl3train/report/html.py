"""Parts of an HTML file that needs no other file: style, tables, thumbnails."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import numpy as np


THUMBNAIL_PIXELS = 320


STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #ffffff; --ink: #24292f; --soft: #57606a;
  --line: #d8dee4; --good: #1a7f37; --bad: #cf222e; --good-back: #dafbe1; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --ink: #c9d1d9;
  --soft: #8b949e; --line: #30363d; --good: #3fb950; --bad: #f85149; --good-back: #12361f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 36px 0 10px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 75ch; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; }
td.good { background: var(--good-back); color: var(--good); font-weight: 600; }
svg.figure { display: block; width: 100%; height: auto; }
svg.figure text { fill: var(--soft); font-size: 11px; }
svg.figure .title { fill: var(--ink); font-size: 13px; font-weight: 600; }
svg.figure .grid { stroke: var(--line); } svg.figure polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg.figure .faint { stroke-width: 1; opacity: .3; } svg.figure .dashed { stroke-width: 1.2; stroke-dasharray: 5 4; }
svg.figure .band { opacity: .15; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 14px; }
.panels + .card, .card + .panels { margin-top: 14px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-bottom: 12px; overflow-wrap: anywhere; }
.legend .swatch { display: inline-block; width: 14px; height: 14px; border-radius: 4px; margin-right: 7px;
  vertical-align: -2px; }
.legend .from { color: var(--soft); }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr)); gap: 14px; }
.sample .steps { margin: 0; padding: 0; list-style: none; font-size: 13px; }
.sample .steps li { border-top: 1px solid var(--line); padding: 4px 0; overflow-wrap: anywhere; }
.sample .at { color: var(--soft); font-size: 12px; }
.part { font-weight: 600; }
summary { cursor: pointer; font-weight: 600; margin: 10px 0; }
@media (max-width: 600px) { main { padding: 16px 12px 40px; } .card { padding: 10px; } th, td { padding: 6px 8px; } }
.sample { display: flex; flex-direction: column; gap: 8px; }
.sample .media { display: grid; gap: 4px; }
.sample .media.several { grid-template-columns: 1fr 1fr; }
.sample img { width: 100%; border-radius: 6px; display: block; }
.sample .source { color: var(--soft); font-size: 12px; }
.sample .question { font-weight: 600; white-space: pre-line; overflow-wrap: anywhere; }
.sample .prediction { margin-top: auto; overflow-wrap: anywhere; }
.right { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); font-weight: 600; }
"""


def table_of(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table from its column names and its rows as HTML."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def thumbnail(picture: np.ndarray) -> bytes:
    """A small JPEG of the picture."""
    image = Image.fromarray(picture)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def data_url(content: bytes, kind: str) -> str:
    """The picture as a ``data:`` address, which is part of the page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
