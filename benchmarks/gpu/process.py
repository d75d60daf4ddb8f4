"""One process for each rank of a row, with a time limit: no row can take another down."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.gpu.rows import Row
from vl3train.engine.ranks import ALLOCATOR

SECONDS_TO_LEAVE = 5


class RowEndedError(Exception):
    """A row ends before it is done."""

    def __init__(self, reason: str, *, by_signal: bool = False) -> None:
        super().__init__(reason)
        self.by_signal = by_signal


Child = Callable[[str, Row, int, bool, Any], None]


def in_own_processes(
    child: Child,
    name: str,
    row: Row,
    tiny: bool,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """What rank 0 of the row sends, or ``{"failed": reason}``; memory and compiled code go with the processes.

    ``stopped`` says in words what has asked for the end of all rows. ``keep`` gets the same, without that, before the
    processes are ended: one that gives back much memory takes seconds for it, which whoever ends this may not wait.
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", ALLOCATOR)  # for the ranks, which import torch anew
    context: Any = multiprocessing.get_context("spawn")
    port = free_port()
    processes, pipes = [], []
    for rank in range(1 if row.way == "command" else row.ranks):  # the command starts its ranks itself
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=start, args=(child, name, row, rank, tiny, port, sender))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    found: dict[str, Any] = {"failed": "interrupted"}
    # `timeout` and job managers end a command with SIGTERM: the children, groups of their own, would hold the GPU on.
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        found = collect(pipes, row.max_seconds)
        if not {"failed", "stopped"} <= found.keys():
            keep({key: value for key, value in found.items() if key != "stopped"})
        if "failed" not in found and "ended_early" not in found:
            for process in processes:
                process.join(SECONDS_TO_LEAVE)
    except RowEndedError as stopped:  # the row is done, and its figures are still to be written
        found["stopped"] = str(stopped)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in processes:
            end_group(process)
    if "failed" in found and found.pop("stopped", ""):
        sys.exit(found["failed"])
    return found


def _stop(*_: Any) -> None:
    raise RowEndedError("ended by SIGTERM", by_signal=True)


def start(child: Child, name: str, row: Row, rank: int, tiny: bool, port: int, pipe: Any) -> None:
    """The child's first act: make a process group of its own, and set the variables by which ranks find each other."""
    os.setsid()  # its decoding processes end with it
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(row.ranks)}
    if row.ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    child(name, row, rank, tiny, pipe)


def collect(pipes: list[Connection], max_seconds: float) -> dict[str, Any]:
    """Rank 0's answer once every rank has answered, or the first failure.

    Where time, or a SIGTERM, ends the row before that: what rank 0 had by then, with ``ended_early``, if anything.
    """
    answers: dict[int, dict[str, Any]] = {}
    so_far: dict[str, Any] = {}
    deadline = time.monotonic() + max_seconds
    try:
        return _all_answers(pipes, answers, so_far, deadline, max_seconds)
    except RowEndedError as stopped:
        why = {"ended_early" if so_far else "failed": str(stopped)}
        return {**so_far, **why, **({"stopped": str(stopped)} if stopped.by_signal else {})}


def _all_answers(
    pipes: list[Connection],
    answers: dict[int, dict[str, Any]],
    so_far: dict[str, Any],
    deadline: float,
    max_seconds: float,
) -> dict[str, Any]:
    while len(answers) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RowEndedError(f"not done within {max_seconds:g} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                answer = pipes[rank].recv()
            except EOFError:
                return {"failed": f"the process of rank {rank} died"}
            if "so_far" in answer:
                so_far |= answer["so_far"] if rank == 0 else {}
                continue
            answers[rank] = answer
            if "failed" in answers[rank]:
                return answers[rank]
    return answers[0]


def end_group(process: Any) -> None:
    """End a child and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended and left nothing, or has not yet made its group
        process.kill()
    process.join()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
