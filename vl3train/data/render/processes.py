"""How this layer starts processes, and how they end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.context import ForkServerContext


def clean_processes() -> ForkServerContext:
    """A context whose processes start clean: a forked copy of one that has threads (torch, NCCL) may hang.

    They are forked from a small server that has imported what they need: the first start takes about 4 s, each
    later one 0.1 s, where "spawn" took 2 s for each process every time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vl3train.data.loader"])
    return context


def end_with_parent(_: int = 0) -> None:
    """Kill this process as soon as the one that started it is gone. A ``worker_init_fn``; returns at once.

    Torch's own watch compares the parent's number, which is the fork server's here. The server lives as long as any
    process forked from it, so after ``kill -9`` of a rank its workers and the server would keep each other alive.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a process that multiprocessing started"

    def wait() -> None:
        parent.join()  # a pipe whose other end the parent holds: the kernel closes it, however the parent ends
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
