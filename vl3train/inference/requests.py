"""Questions to a model, as options of a command or as lines of JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.contracts.tokens import RESERVED_TOKENS
from vl3train.data.records.conversation import Content, Image, Text, Turn, Video, half_character
from vl3train.inference.questions import Question

REQUEST_KEYS = ("prompt", "image", "video", "system")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question. The model sees the images first, then the videos, then the prompt."""

    prompt: str
    images: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()
    system: str | None = None


def read_requests(file: Path, media_root: Path) -> list[tuple[str, Request]]:
    """The requests of a JSON-lines file. Raises ValueError that names every wrong line."""
    found: list[tuple[str, Request]] = []
    problems = []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}); save it as such") from error
    lines = text.split("\n")  # not splitlines: a prompt may hold other ends of lines that it knows, as U+2028
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}: "
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}is not JSON ({error})")
            continue
        request, wrong = parse_request(fields, media_root)
        problems.extend(where + problem for problem in wrong)
        if request is not None:
            found.append((where, request))
    if problems:
        raise ValueError(f"{len(problems)} problems in the requests\n" + "\n".join(problems))
    if not found:
        raise ValueError(f"{file} has no request")
    return found


def parse_request(fields: Any, media_root: Path) -> tuple[Request | None, list[str]]:
    """A request from plain values, or None and everything that is wrong with them."""
    if not isinstance(fields, dict):
        return None, [f"is a {type(fields).__name__}, not an object with {', '.join(REQUEST_KEYS)}"]
    problems = [
        f"unknown key {key!r}; there are {', '.join(REQUEST_KEYS)}"
        for key in fields
        if key not in REQUEST_KEYS
    ]
    for key in ("prompt", "system"):
        text = fields.get(key)
        if not isinstance(text, str) and not (key == "system" and text is None):
            problems.append(f"{key} is {'missing' if text is None else 'not text'}")
            continue
        problems.extend(filter(None, [half_character(text or "")]))
        taken = [token for token in RESERVED_TOKENS if token in (text or "")]
        problems.extend(
            f"{key} holds {token}, which is a special token of the chat template; remove it"
            for token in taken
        )
    media: dict[str, tuple[Path, ...]] = {}
    for key in ("image", "video"):
        value = fields.get(key)
        names = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            problems.append(f"{key} is neither a path nor a list of paths")
            continue
        media[key] = tuple(media_root / name for name in names)
        problems.extend(f"{key} {path} does not exist" for path in media[key] if not path.is_file())
    if problems:
        return None, problems
    return (
        Request(
            prompt=fields["prompt"], images=media["image"], videos=media["video"], system=fields.get("system")
        ),
        [],
    )


def as_line(request: Request) -> dict[str, Any]:
    """The plain values of a request, without those that it does not set."""
    line: dict[str, Any] = {"prompt": request.prompt}
    if request.images:
        line["image"] = [str(path) for path in request.images]
    if request.videos:
        line["video"] = [str(path) for path in request.videos]
    if request.system is not None:
        line["system"] = request.system
    return line


def as_question(request: Request) -> Question:
    """The request with the bytes of its files. Raises OSError for a file that cannot be read."""
    turns = [] if request.system is None else [Turn("system", (Text(request.system),))]
    content: list[Content] = []
    parts: dict[str, bytes] = {}
    for kind, paths in ((Image, request.images), (Video, request.videos)):
        for path in paths:
            name = str(path) if str(path) not in parts else f"{path} ({len(parts)})"  # shown twice
            parts[name] = path.read_bytes()
            content.append(kind(name))
    turns.append(Turn("user", (*content, Text(request.prompt))))
    return Question(tuple(turns), parts)
