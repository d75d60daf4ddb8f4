"""Kill processes of a run, start it again, and compare what it becomes with a run that nothing happened to."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kills.place import LONGEST_SECONDS, Place, finish
from tests.engine.jobs import kill_job, processes_of, wait_until_gone

SECONDS = 60.0
"""In which every process of the job is gone after a kill."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill -9."""

    victim: str  # rank, all, launcher, worker, decode_process, decode_server
    rank: int = 0
    place: str = ""  # in the code (tests/engine/planted.py); none: a random moment

    def __str__(self) -> str:
        of = f" {self.rank}" if self.victim == "rank" else ""
        return f"{self.victim}{of} {'at ' + self.place if self.place else 'at a random moment'}"


RANDOM = [
    *(Kill(victim="rank", rank=rank) for rank in (0, 1) for _ in range(5)),
    *(Kill(victim="all") for _ in range(7)),
    *(Kill(victim="launcher") for _ in range(6)),
    *(Kill(victim="worker", rank=rank) for rank in (0, 1) for _ in range(3)),
    *(Kill(victim="decode_process", rank=rank) for rank in (0, 1) for _ in range(3)),
    *(Kill(victim="decode_server", rank=rank) for rank in (0, 1) for _ in range(2)),
]
PLACED = [
    *(
        Kill(victim=victim, rank=0, place=place)
        for victim in ("rank", "all")
        for place in (
            *("truncate_metrics", "digests", "manifest", "rename", "latest", "half_deleted"),
            *("log", "evaluation", "record_evaluation", "mark_finished"),
        )
    ),
    Kill(victim="rank", rank=1, place="random_state"),
    Kill(victim="rank", rank=1, place="evaluation"),
    Kill(victim="rank", rank=1, place="step"),
    Kill(victim="worker", rank=1, place="collate"),
]


def chains(seed: int, length: int = 4) -> list[list[Kill]]:
    """All kills, in random order, some to each run: a run is killed, started again, killed again ..."""
    kills = [*RANDOM, *PLACED]
    random.Random(seed).shuffle(kills)
    # what comes only at the end of a run must be the last thing that happens to it
    return [
        sorted(kills[first : first + length], key=lambda kill: kill.place == "mark_finished")
        for first in range(0, len(kills), length)
    ]


def run_chain(
    place: Place, name: str, kills: list[Kill], straight: Mapping[str, Any], seed: int
) -> list[dict[str, Any]]:
    """Do these kills to one run; a line for each: what was killed, and what is wrong (None: it survived)."""
    rng = random.Random(f"{seed} {name}")
    found: list[dict[str, Any]] = []
    since: list[dict[str, Any]] = []  # of the run in progress
    run, waiting, starts = f"{name}-0", list(kills), 0
    while waiting:
        if not since:  # a new run; something is there where this command was ended before it was done
            shutil.rmtree(place.folder / run, ignore_errors=True)
        tried, problem, seconds = kill_once(place, run, waiting[0], rng)
        starts += 1
        if tried or problem:
            since.append(
                {
                    "kill": str(waiting[0]),
                    "tried": True,
                    "gone_seconds": round(seconds, 1),
                    "problem": problem,
                }
            )
            waiting.pop(0)
        if waiting and tried and not problem:
            continue
        problem = finish(place, run)
        if problem is None and place.outcome(run) != straight:
            problem = "its figures or its weights are not those of a run that was never killed"
        found += [{**line, "problem": line["problem"] or problem} for line in since]
        since, run = [], f"{name}-{starts}"
        if starts > 6 * len(kills):
            found += [{"kill": str(kill), "tried": False, "problem": None} for kill in waiting]
            break
    return found


def kill_once(place: Place, name: str, kill: Kill, rng: random.Random) -> tuple[bool, str | None, float]:
    """Start the run and kill. Whether it came to that, what is wrong, and seconds until all had ended."""
    mark = place.mark(name)
    mark.unlink(missing_ok=True)
    planted = "none"
    if kill.place:
        planted = f"{'kill_all' if kill.victim == 'all' else 'kill'}@{kill.place}"
    process, job = place.start(name, planted=planted, rank=kill.rank)
    deadline = time.monotonic() + LONGEST_SECONDS
    if not kill.place:
        wait_for_a_random_moment(place, name, process, rng)
        if process.poll() is None:
            while not (pids := victims(job, process.pid, kill)) and process.poll() is None:
                time.sleep(0.02)
            if pids:
                mark.touch()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)
    while not mark.exists() and process.poll() is None:
        if time.monotonic() > deadline:
            kill_job(job)
            return False, "it hangs", 0.0
        time.sleep(0.05)
    if not mark.exists():
        return False, None, 0.0  # the run ended before
    killed = mark.stat().st_mtime
    # a decode process that dies is replaced: the run goes on
    limit = LONGEST_SECONDS if kill.victim == "decode_process" else SECONDS
    left = wait_until_gone(job, limit - (time.time() - killed))
    seconds = time.time() - killed
    kill_job(job)
    process.wait()
    if left:
        return True, f"{limit:.0f} s later there are still {left}", seconds
    # The kernel closes a dead process's files after it has freed its memory, and it is no longer listed meanwhile.
    free_until = time.monotonic() + SECONDS
    while place.is_locked(name):
        if time.monotonic() > free_until:
            return True, "the lock is not free", seconds
        time.sleep(0.1)
    if kill.victim == "rank" and "Signal 9 (SIGKILL)" not in place.said(name):
        return True, "the console does not say which rank died", seconds
    return True, None, seconds


def wait_for_a_random_moment(place: Place, name: str, process: Any, rng: random.Random) -> None:
    """Some seconds after the start, or some time within one of the next steps."""
    log = place.folder / name / "metrics.jsonl"
    time.sleep(rng.uniform(0, 4))
    steps = rng.choice((0, 1, 1, 2, 2, 3))
    begin = log.stat().st_mtime_ns if log.exists() else 0
    for _ in range(steps):
        while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == begin):
            time.sleep(0.01)
        begin = log.stat().st_mtime_ns if log.exists() else 0
    time.sleep(rng.uniform(0, 1))


def victims(job: str, client: int, kill: Kill) -> list[int]:
    """The processes to kill, found by who started whom. None where they are not there yet."""
    alive = processes_of(job)
    if kill.victim == "all":
        return list(alive)
    parent, group = {}, {}
    for pid in alive:
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parent[pid], group[pid] = int(words[1]), int(words[2])
    children = {pid: [one for one in parent if parent[one] == pid] for pid in parent}
    # the client of the warm Python asks its server for the launcher, which leads a session, as each rank does
    launchers = [pid for pid in parent if pid != client and group[pid] == pid and parent[pid] != client]
    launchers = [pid for pid in launchers if parent[pid] not in group or parent[parent[pid]] not in group]
    ranks = sorted(one for pid in launchers for one in children[pid] if group[one] == one)
    if kill.victim == "launcher":
        return launchers[:1] if ranks else []
    if len(ranks) < 2:
        return []
    rank = ranks[kill.rank]
    if kill.victim == "rank":
        return [rank]
    started = [two for one in children[rank] for two in children[one]]  # by the rank's fork server
    servers = [pid for pid in started if group[pid] == pid]
    if kill.victim == "decode_server":
        return servers[:1]
    if kill.victim == "decode_process":
        return [one for pid in servers for one in children[pid]][:1]
    return [pid for pid in started if group[pid] != pid][:1]
