"""One JSON line a figure: what every benchmark here prints and keeps."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class Figures:
    """Prints figures and, where told to, keeps them in ``benchmarks/results/NAME.jsonl``."""

    def __init__(self, name: str, *, keep: bool, packages: tuple[str, ...]) -> None:
        self.command = f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
        self.versions = {package: version(package) for package in packages}
        self.machine = machine()
        self.file = RESULTS / f"{name}.jsonl" if keep else None
        if self.file is not None:
            RESULTS.mkdir(exist_ok=True)
            self.file.write_text("")

    def add(
        self, figure: str, value: float, unit: str, better: str, note: str = "", aim: float | None = None
    ) -> dict[str, Any]:
        """One figure; ``aim`` is what it was to reach. Returns its line."""
        line = {
            "figure": figure,
            "value": round(value, 6),
            "unit": unit,
            "better": better,
            **(
                {}
                if aim is None
                else {"aim": aim, "reached": value <= aim if better == "lower" else value >= aim}
            ),
            **({"note": note} if note else {}),
            "machine": self.machine,
            "versions": self.versions,
            "command": self.command,
        }
        self.write(line)
        return line

    def write(self, line: dict[str, Any]) -> None:
        """Print a line, and keep it where that was asked for."""
        text = json.dumps(line)
        print(text, flush=True)
        if self.file is not None:
            with self.file.open("a") as stream:
                stream.write(text + "\n")


def machine() -> str:
    """Processor and number of cores this process may use, behind the GPU's name where torch is loaded and has one."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    torch = sys.modules.get("torch")
    gpu = f"{torch.cuda.get_device_name()}; " if torch and torch.cuda.is_available() else ""
    return f"{gpu}{name}, {len(os.sched_getaffinity(0))} cores"
