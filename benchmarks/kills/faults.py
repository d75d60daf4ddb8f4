"""Damage what a run has written or reads, start it again, and see whether it says so and what it becomes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.kills.place import LONGEST_SECONDS, Place, finish
from tests.engine.ends import SECONDS
from tests.engine.jobs import kill_job, wait_until_gone
from vl3train.contracts.exit_codes import STOPPED


def flip(file: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    """The second half is missing."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file: Path) -> None:
    """Of the same length, all zeros: what some file systems leave after a loss of power."""
    file.write_bytes(bytes(file.stat().st_size))


def remove(file: Path) -> None:
    """The file is gone."""
    file.unlink()


def lose_line(file: Path) -> None:
    """The last line is gone, and what is left can be read."""
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": flip, "cut": cut, "zeroed": zero, "removed": remove}
DAMAGES_OF_LOGS = {**DAMAGES, "a line lost": lose_line}
LOGS = ("metrics.jsonl", "evaluations.jsonl")
CHECKPOINT_FILES = [
    *("engine/state/mp_rank_00_model_states.pt", "engine/state/*pp_rank_0*optim_states.pt"),
    *("weights/model.safetensors", "random/rank_1.pt", "resume.json", "MANIFEST.json"),
]
FAULTS = [
    *((damage, f"checkpoints/step_00000008/{file}") for file in CHECKPOINT_FILES for damage in DAMAGES),
    ("two runs", "one folder"),
    ("hangs", "the storage of one rank, and the run is stopped"),
    ("moved away", "the output folder"),
    ("not finite", "every step"),
    *((damage, "index") for damage in DAMAGES),
    ("removed", "shard"),
    *((damage, log) for log in LOGS for damage in ("flipped", "cut")),
    *((damage, log) for log in LOGS for damage in ("removed", "a line lost")),
]
"""What happens, and to what."""


def try_fault(
    place: Place, fault: tuple[str, str], number: int, straight: Mapping[str, Any]
) -> dict[str, Any]:
    """Do it to a copy of a finished run, and run it again; a line with what is wrong (None: it was told)."""
    damage, what = fault
    name = f"fault-{number}"
    copy = place.folder / name
    copy_unfinished(place.folder / "straight", copy)
    (place.folder / f"{name}.log").unlink(missing_ok=True)
    words = place.words(name)
    pattern = {"index": "*/index-*/*.parquet", "shard": "*/*.tar"}.get(what)
    file = min(copy.glob(what), default=copy)
    if pattern is not None:
        data = place.folder / f"{name}-data"
        shutil.rmtree(data, ignore_errors=True)  # of this command, ended before it was done
        shutil.copytree(place.folder / "data", data)
        words, file = place.words(name, data=data.name), min(data.glob(pattern))
    try:
        if damage in IN_RUN:
            problem = IN_RUN[damage](place, name, straight)
        else:
            DAMAGES_OF_LOGS[damage](file)
            problem = problem_of_start(place, name, words, file, straight)
    except subprocess.TimeoutExpired:
        problem = f"it hangs: {place.said(name)[-1500:]}"
    return {"kill": f"{damage}: {what}", "tried": True, "problem": problem}


def copy_unfinished(run: Path, copy: Path) -> None:
    """A copy of a finished run, which goes on from its last checkpoint."""
    shutil.rmtree(copy, ignore_errors=True)  # of this command, ended before it was done
    shutil.copytree(run, copy)
    (copy / "finished.json").unlink()


def problem_of_start(
    place: Place, name: str, words: list[str], file: Path, straight: Mapping[str, Any]
) -> str | None:
    """Start the run; it must name the file, and then be refused, or become what it was."""
    process, job = place.start(name, words=words)
    code = process.wait(timeout=LONGEST_SECONDS)
    kill_job(job)
    said = place.said(name)
    # Where the lines of figures are what was damaged, they stay so.
    compared = ("weights", "finished") if file.name == "metrics.jsonl" else tuple(straight)
    if code == 0 and any(place.outcome(name)[key] != straight[key] for key in compared):
        return f"it ends with 0, and its figures or weights are others: {said[-1500:]}"
    if code == 0 and file.suffix == ".parquet":
        return None  # what is derived is made anew
    # The shard is the only one of its source: the run misses all that the folder had.
    named = str(file.parent if file.suffix == ".tar" else file.name)
    if named not in said:
        return f"it ends with {code} and does not name {named}: {said[-1500:]}"
    if code != 0 and "Traceback" in said:
        return f"it ends with a traceback: {said[-1500:]}"
    return None


def two_at_once(place: Place, name: str, _: Mapping[str, Any]) -> str | None:
    """The second of two runs in one folder is refused, and says who holds it."""
    words = place.words(name)
    shutil.rmtree(place.folder / name)
    first, job = place.start(name, words=words)
    while not place.is_locked(name):
        if first.poll() is not None:
            return f"the first run ended with {first.returncode}"
    second, other = place.start(name, words=words)
    code = second.wait(timeout=LONGEST_SECONDS)
    kill_job(other)
    first_code = first.wait(timeout=LONGEST_SECONDS)
    kill_job(job)
    if code == 0 or first_code != 0:
        return f"the first ended with {first_code}, the second with {code}"
    return None if "is in use by another run" in place.said(name) else "the second does not say why"


def hangs(place: Place, name: str, straight: Mapping[str, Any]) -> str | None:
    """The loader of rank 1 waits for ever, and the run is asked to stop: it saves, and goes on when it is started."""
    shutil.rmtree(place.folder / name)
    process, job = place.start(name, planted="wait@worker", rank=1)
    wait_for_lines(place, name, process, 2)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=LONGEST_SECONDS)
    left = wait_until_gone(job, SECONDS)
    kill_job(job)
    if code != STOPPED or left:
        return f"it ends with {code}, and leaves {left}: {place.said(name)[-1500:]}"
    if "waited in vain for its data and is given up" not in place.said(name):
        return f"it does not say why it stops: {place.said(name)[-1500:]}"
    return finish(place, name) or unlike(place, name, straight)


def moved_away(place: Place, name: str, straight: Mapping[str, Any]) -> str | None:
    """The folder is moved while the run trains: the run says so and fails, and goes on once it is moved back."""
    folder, away = place.folder / name, place.folder / f"{name}-away"
    shutil.rmtree(away, ignore_errors=True)
    for _ in range(5):
        shutil.rmtree(folder)
        process, job = place.start(name)
        wait_for_lines(place, name, process, 1)
        folder.rename(away)
        code = process.wait(timeout=LONGEST_SECONDS)
        kill_job(job)
        made = folder.exists()
        if made:
            return f"it makes a new folder: {place.said(name)[-1500:]}"
        away.rename(folder)
        if not (folder / "finished.json").exists():
            break  # it was not done before
    if code != 1 or "it was moved or deleted, with the checkpoints. Move it back" not in place.said(name):
        return f"it ends with {code} and does not say why: {place.said(name)[-1500:]}"
    return finish(place, name) or unlike(place, name, straight)


def not_finite(place: Place, name: str, _: Mapping[str, Any]) -> str | None:
    """A short run whose steps are all skipped is no finished run."""
    shutil.rmtree(place.folder / name)
    process, job = place.start(name, planted="nan_always", words=[*place.words(name), "run.num_steps=4"])
    code = process.wait(timeout=LONGEST_SECONDS)
    kill_job(job)
    if code != 1 or (place.folder / name / "finished.json").exists():
        return f"it ends with {code}, as if it had trained: {place.said(name)[-1500:]}"
    return None if "trained nothing: each step was skipped" in place.said(name) else "it does not say why"


IN_RUN: dict[str, Callable[[Place, str, Mapping[str, Any]], str | None]] = {
    "two runs": two_at_once,
    "hangs": hangs,
    "moved away": moved_away,
    "not finite": not_finite,
}
"""What happens while a run is in progress."""


def wait_for_lines(place: Place, name: str, process: subprocess.Popen[str], count: int) -> None:
    """Until so many steps are in metrics.jsonl, or the run has ended."""
    log = place.folder / name / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < count):
        time.sleep(0.01)


def unlike(place: Place, name: str, straight: Mapping[str, Any]) -> str | None:
    """Whether a run's figures or weights are not those of one that nothing happened to."""
    same = place.outcome(name) == straight
    return None if same else "its figures or its weights are not those of a run that nothing happened to"
