"""Starts a run of one build, looks where its seconds go, and ends it after its first step."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WATCH = Path(__file__).with_name("watch")
POLL_SECONDS = 0.005
CACHES = (
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
    "QUACK_CACHE_DIR",
    "NUMBA_CACHE_DIR",
    "VL3TRAIN_CACHE_DIR",
    "CUDA_CACHE_PATH",
)
"""Each names a folder of what was compiled or checked; a build has its own."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """A start, to the end of its first step."""

    seconds: float | None  # None: it did not get so far
    phases: dict[str, dict[str, float]]  # of the first rank: seconds of each kind, by phase
    cpu: dict[str, float]  # of the first rank: seconds of all its threads, user and system, by phase
    places: dict[str, float]  # of the first rank: seconds by the innermost frames
    compiler: dict[str, float]  # of the first rank: seconds of torch's compiler by its own clocks, nested
    lines: list[tuple[float, str]]  # what it wrote, and when

    def phase_seconds(self, phase: str) -> float | None:
        """How long a phase took."""
        return sum(self.phases[phase].values()) if phase in self.phases else None


def environment(build: Path, caches: Path, watched: Path) -> dict[str, str]:
    """Of a process that runs ``build`` with what it finds in ``caches``, and is looked at."""
    given = {name: str(caches / name.lower()) for name in CACHES}
    for folder in given.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        **given,
        "PYTHONPATH": os.pathsep.join([str(WATCH), str(build)]),
        "VL3TRAIN_WATCH": str(watched),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def start_once(
    build: Path, words: list[str], folder: Path, caches: Path, *, indexes: Path, ranks: int, limit: float
) -> Started:
    """Start a run in ``folder``, which is new, and kill it after its first step, or after ``limit`` seconds."""
    folder.mkdir(parents=True)
    run, log = folder / "run", folder / "log.txt"
    words = [*words, f"run.output_dir={run}", f"data.plan_cache={caches / 'plans'}", "run.log_steps=1"]
    words += [f"data.index_dir={indexes}", "run.num_steps=1000", "run.save_steps=1000"]
    words += ["run.evaluate_at_end=false"]
    env = environment(build, caches, folder)
    if ranks == 1:
        env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        command = [sys.executable, "-u", "-m", "vl3train.train", *words]
    else:
        command = [sys.executable, "-u", "-m", "vl3train.cli.main", "train", *words, "--nproc", str(ranks)]
    began = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=env, stdout=file, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
        )
    seconds, lines, seen = None, [], 0
    try:
        while time.perf_counter() - began < limit:
            time.sleep(POLL_SECONDS)
            ended = process.poll() is not None  # before the look: what it wrote last counts
            now = time.perf_counter() - began
            text = log.read_bytes()
            for line in text[seen:].split(b"\n")[:-1]:
                lines.append((now, line.decode(errors="replace")))
                seen += len(line) + 1
            metrics = run / "metrics.jsonl"
            if metrics.exists() and b"\n" in metrics.read_bytes():
                seconds = now
                break
            if ended:
                break
        time.sleep(1.0)  # the watch writes twice a second
    finally:
        _kill(process, folder)
    return Started(seconds=seconds, lines=lines, **_watched(folder))


def _kill(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End the run, and the ranks of a launcher, which have sessions of their own."""
    pids = {int(path.stem.split("-")[2]) for path in folder.glob("rank-*.json")}
    for pid in (process.pid, *pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _watched(folder: Path) -> dict[str, Any]:
    """What the thread of watch/sitecustomize.py saw of the first rank."""
    for path in sorted(folder.glob("rank-0-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"phases": found["kinds"], **{name: found[name] for name in ("cpu", "places", "compiler")}}
    return {"phases": {}, "cpu": {}, "places": {}, "compiler": {}}


def timeline(started: Started, most: int = 6) -> list[str]:
    """A table of the phases: seconds, processor seconds, and what the main thread was busy with."""
    rows = ["| phase | s | CPU s | of it |", "|---|---:|---:|---|"]
    for phase, kinds in started.phases.items():
        busy = ", ".join(
            f"{kind} {seconds:.1f}" for kind, seconds in Counter(kinds).most_common(most) if seconds > 0.1
        )
        rows.append(f"| {phase} | {sum(kinds.values()):.1f} | {started.cpu.get(phase, 0):.1f} | {busy} |")
    return rows


def common_places(started: Started, most: int = 15) -> list[str]:
    """Where the main thread was most often, and the parts of torch's compiler: a line each."""
    found = [Counter(started.places).most_common(most), Counter(started.compiler).most_common(2 * most)]
    return [f"{seconds:6.2f} s  {place}" for part in found for place, seconds in part if seconds > 0.05]
