"""Processes that need one compiled function at the same time: one compiles it, the others find its file."""

from __future__ import annotations

import time

import numba
import numpy as np

from vl3train.data import compiled
from vl3train.data.render.processes import clean_processes


def doubled(folder):
    """A compiled function that is kept in ``folder``."""
    numba.config.CACHE_DIR = str(folder)

    @compiled.njit(cache=True)
    def doubled(values):
        return values * 2

    return doubled


def call(folder, kind, barrier, found):
    """In a process: call it when the others do, and say how often it compiled."""
    function = doubled(folder)
    barrier.wait()
    function(np.ones(3, kind))
    found.put(sum(function.stats.cache_misses.values()))


def together(folder, *kinds):
    """How often each of some processes compiled, smallest first."""
    context = clean_processes()
    barrier, found = context.Barrier(len(kinds)), context.SimpleQueue()
    processes = [context.Process(target=call, args=(folder, kind, barrier, found)) for kind in kinds]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sorted(found.get() for _ in processes)


def hold(folder, started):
    """In a process: find nothing on disk, as before a compilation, and never end."""
    function = doubled(folder)
    function._cache.load_overload((numba.typeof(np.ones(3)),), function.targetctx)
    started.set()
    time.sleep(3600)


def test_a_function_is_compiled_once_for_each_type_and_none_is_lost(tmp_path):
    """numba writes the list of a function's files anew for each: two at the same time would lose one of them."""
    assert together(tmp_path, *["float64"] * 4) == [0, 0, 0, 1]
    kinds = ("int32", "int64", "float32", "float64")
    assert together(tmp_path, *kinds) == [0, 1, 1, 1]
    assert together(tmp_path, *kinds) == [0, 0, 0, 0]


def test_a_process_that_was_killed_while_it_compiled_keeps_nobody_waiting(tmp_path):
    context = clean_processes()
    started = context.Event()
    killed = context.Process(target=hold, args=(tmp_path, started))
    killed.start()
    started.wait()
    killed.kill()
    killed.join()
    assert together(tmp_path, "float64") == [1]
