"""benchmarks/README.md from benchmarks/results/*.jsonl: ``python benchmarks/table.py``; ``--check`` only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
HEAD = """# Figures

Made by `python benchmarks/table.py` from `results/*.jsonl`, which the commands below wrote. Every script takes
`--quick` for a short run that keeps nothing. Aims are those of the project's issues; a figure without one is there to
compare with.
"""


def table() -> str:
    """The whole page: for each results file its machine, command, versions and figures."""
    parts = [HEAD]
    for file in sorted((FOLDER / "results").glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if not lines:
            continue
        first = lines[0]
        versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
        parts += [f"\n## {file.stem}\n", f"`{first['command']}` on {first['machine']}; {versions}.\n"]
        parts += ["| figure | value | unit | better | aim | what |", "|---|---:|---|---|---|---|"]
        parts += [_row(line) for line in lines]
    return "\n".join(parts) + "\n"


def _row(line: dict[str, object]) -> str:
    aim = (
        "" if "aim" not in line else f"{line['aim']:g}, {'reached' if line['reached'] else '**not reached**'}"
    )
    value = f"{line['value']:,.4g}"
    return (
        f"| {line['figure']} | {value} | {line['unit']} | {line['better']} | {aim} | {line.get('note', '')} |"
    )


def main() -> int:
    """Write the page, or say whether it is up to date."""
    page = FOLDER / "README.md"
    if "--check" in sys.argv[1:]:
        current = page.exists() and page.read_text(encoding="utf-8") == table()
        print("up to date" if current else "out of date: run `python benchmarks/table.py`")
        return int(not current)
    page.write_text(table(), encoding="utf-8")
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
