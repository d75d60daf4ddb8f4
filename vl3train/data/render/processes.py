"""How this layer starts processes, how they end with the one that started them, and memory that they share."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import ForkServerContext
from typing import IO

from vl3train.contracts.exit_codes import STOP_SIGNALS

LONGEST_FOLDER = 72
"""Bytes. The path of a socket may have 104 (108 on Linux), and multiprocessing puts 32 behind the folder's."""


def clean_processes() -> ForkServerContext:
    """A context whose processes start clean: a forked copy of one that has threads (torch, NCCL) may hang.

    They are forked from a small server that has imported what they need: the first start takes about 4 s, each
    later one 0.1 s, where "spawn" took 2 s for each process every time.
    """
    folder_of_sockets()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vl3train.data.preload"])
    return context


def start_workers_ignoring_signals() -> None:
    """Start the fork server of loader workers and decode processes with the stop signals blocked.

    torchrun and schedulers send these signals to every process of a group. A worker that ended by one would end the run
    before it has saved. Forked processes inherit the block; the SIGTERM handler that torch gives its workers never
    runs. The workers end with the loader, or with this process.
    """
    clean_processes()  # sets what the fork server imports
    resource_tracker.ensure_running()  # the fork server needs it; starting it later would unblock SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def folder_of_sockets() -> str:
    """This process's folder for sockets, of mode 700; the processes that it starts take it over.

    It lies in TMPDIR, or in /tmp where that is too long, as a queue's may be.
    """
    before = tempfile.gettempdir()
    if len(os.fsencode(before)) > LONGEST_FOLDER:
        tempfile.tempdir = "/tmp"
    try:
        return util.get_temp_dir()  # made by its first call
    finally:
        tempfile.tempdir = before


def remove_sockets() -> None:
    """Delete that folder. For a process that ends without Python's own end, which would do it."""
    shutil.rmtree(folder_of_sockets(), ignore_errors=True)


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


def nameless_file(size: int) -> IO[bytes]:
    """Memory that processes can share. Not of /dev/shm, which containers keep small."""
    number = os.memfd_create("vl3train-patches") if hasattr(os, "memfd_create") else tempfile.mkstemp()[0]
    file = os.fdopen(number, "r+b")
    os.ftruncate(file.fileno(), size)
    return file
