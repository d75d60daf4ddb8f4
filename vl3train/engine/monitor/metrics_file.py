"""metrics.jsonl when a run goes on: its later lines move aside, and what has become of its earlier ones is said.

A checkpoint keeps how many lines the file had and their digest. The figures in it steer nothing, so a damaged file does
not keep a run from going on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vl3train.config.problems import counted
from vl3train.contracts.bad_step import numbered_from_1
from vl3train.contracts.files import whole_file
from vl3train.contracts.strict_json import json_text

METRICS = "metrics.jsonl"


def metrics_digest(folder: Path) -> dict[str, Any]:
    """How many lines the log of the run in ``folder`` has, and their digest, for its checkpoint."""
    lines = whole_lines(folder / METRICS)
    return {"lines": len(lines), "sha256": hashlib.sha256(b"".join(lines)).hexdigest()}


def changed_metrics(folder: Path, stored: dict[str, Any] | None) -> list[str]:
    """A remark where the lines that ``metrics_digest`` counted are no longer there, or no longer the same.

    ``stored`` is None for checkpoints of builds before 2026-12, which kept no digest.
    """
    if stored is None or not stored["lines"]:
        return []
    path, before = folder / METRICS, stored["lines"]
    lines = whole_lines(path)
    of_checkpoint = f"{counted(before, 'line')} of figures when the checkpoint was written"
    if len(lines) < before:
        found = f"{path} had {of_checkpoint}, and now has {len(lines)}: the others are lost"
    elif hashlib.sha256(b"".join(lines[:before])).hexdigest() != stored["sha256"]:
        found = f"{path} had {of_checkpoint}, and these are no longer what they were: do not trust them"
    else:
        return []
    return [f"{found}. Training reads nothing from it and goes on"]


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that may not be there, their ends included, without one that a killed process began."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines


def truncate_metrics(path: str | Path, done: int) -> int:
    """Move the lines of steps after ``done``, which a resumed run will write again, to a file beside it.

    They are appended to ``metrics.replaced.jsonl``: figures of work that was done are not deleted. A last line that a
    killed process did not finish is removed. Lines of builds that counted from 0 are numbered as today. A line that
    cannot be read stays where it is: ``changed_metrics`` speaks of it, and so does the report. The file is replaced as
    a whole.

    Returns:
        Number of lines moved or removed.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept: list[bytes] = []
    replaced: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            continue
        try:
            entry = json.loads(line)
            now = numbered_from_1(entry)
            is_later = now["step"] > done
        except (ValueError, KeyError, TypeError):
            kept.append(line)
            continue
        (replaced if is_later else kept).append(line if now is entry else f"{json_text(now)}\n".encode())
    if replaced:
        with path.with_name("metrics.replaced.jsonl").open("ab") as file:
            file.writelines(replaced)
    if kept != lines:
        with whole_file(path) as partial:
            partial.write_bytes(b"".join(kept))
    return len(lines) - len(kept)
