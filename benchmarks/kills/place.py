"""Where the runs of benchmarks/reliability.py take place: their data, their Python, the run that nothing happens to."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engine.jobs import ROOT, start_job
from tests.engine.planted import PLANTED_AT
from tests.engine.small_demo import make_small_demo, small_demo_words
from tests.warm_python import JOB, NO_JOB

RUN = [
    *("stage=1", "run.num_steps=8", "run.keep_checkpoints=2"),
    *("run.evaluate_steps=3", "run.evaluate_at_end=false"),
]
"""Every run: saves, evaluations and prefetching are never more than a step away."""

LONGEST_SECONDS = 900.0
"""A job that takes longer hangs."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder with data, and a Python that has imported everything (tests/warm_python.py)."""

    folder: Path
    python: list[str]

    def words(self, name: str, data: str = "data") -> list[str]:
        """The options of one run, with the folder of its data."""
        return [*self.options(data), f"run.output_dir={self.folder / name}"]

    def options(self, data: str = "data") -> list[str]:
        """The same without its output folder."""
        return [*small_demo_words(self.folder / data, num_workers=1), *RUN]

    def start(
        self, name: str, *, planted: str = "none", rank: int = 0, words: list[str] | None = None
    ) -> tuple[subprocess.Popen[str], str]:
        """Start a run with two ranks; its launcher, and the mark of its processes. It prints into NAME.log."""
        with (self.folder / f"{name}.log").open("a") as log:
            return start_job(
                self.python,
                "tests.engine.planted",
                [planted, str(rank), *(words or self.words(name))],
                launcher="vl3train.launch",
                environment={PLANTED_AT: str(self.mark(name))},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def mark(self, name: str) -> Path:
        """The file that appears when what was planted happens."""
        return self.folder / f"{name}.planted"

    def said(self, name: str) -> str:
        """What a run printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def outcome(self, name: str) -> dict[str, Any]:
        """What must not depend on what happened to a run: the figures of each step, and the last weights."""
        folder = self.folder / name
        log = folder / "metrics.jsonl"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        last = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text()
        return {
            "steps": [figures_of(line) for line in lines],
            "weights": (last / "weights" / "model.safetensors").read_bytes(),
            "finished": (folder / "finished.json").exists(),
        }

    def is_locked(self, name: str) -> bool:
        """Whether some process holds the run's folder."""
        file = self.folder / name / "run.lock"
        if not file.exists():
            return False
        with file.open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def figures_of(line: str) -> list[str]:
    """Those of a line of metrics.jsonl that must not depend on what happened; a damaged line is its own."""
    names = ("step", "loss", "grad_norm", "source_losses", "learning_rates", "tokens", "patches")
    try:
        entry = json.loads(line)
        return [json.dumps(entry[name]) for name in names]
    except (ValueError, KeyError):
        return [line]


def make_place(folder: Path) -> Place:
    """Make the data, and start the Python that ends with this process."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not (folder / "data.done").exists():
        make_small_demo(folder / "data")
        (folder / "data.done").touch()
    address, script = folder / f"python-{os.getpid()}", str(ROOT / "tests" / "warm_python.py")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (folder / "python.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, script, "serve", str(address), str(os.getpid())],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, JOB: NO_JOB},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while not address.exists():
        if server.poll() is not None:
            raise RuntimeError((folder / "python.log").read_text())
        time.sleep(0.1)
    return Place(folder=folder, python=[sys.executable, script, "run", str(address)])


def finish(place: Place, name: str) -> str | None:
    """Start a run until it is finished; what is wrong, if it does not end well."""
    process, _ = place.start(name)
    code = process.wait(timeout=LONGEST_SECONDS)
    return None if code == 0 else f"started again it ends with {code}: {place.said(name)[-1500:]}"
