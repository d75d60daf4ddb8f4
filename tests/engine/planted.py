"""The train command with a failure planted in one rank: ``... -m tests.engine.planted WHAT@WHERE RANK words``."""

from __future__ import annotations

import functools
import math
import os
import shutil
import signal
import sys
import time
import types
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tests.engine.jobs import processes_of
from tests.warm_python import JOB
from vl3train import train
from vl3train.data import loader
from vl3train.data.loader import PackDataset
from vl3train.data.render import decode_server
from vl3train.engine import stop

PLANTED_AT = "VL3TRAIN_TEST_PLANTED_AT"
"""Variable of the environment: a file that is touched in the moment of the failure."""


def marked(act):
    """``act``, with its moment left in the file of the test."""

    @functools.wraps(act)
    def call(*_args, **_settings):
        Path(os.environ[PLANTED_AT]).touch()
        act()

    return call


@marked
def error():
    raise IndexError("planted here")


@marked
def memory():
    raise MemoryError("planted here")


@marked
def recursion():
    def call():
        return 1 + call()

    call()


@marked
def wait():
    """As a storage that does not answer."""
    time.sleep(600)


@marked
def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@marked
def kill_all():
    """As a machine that loses its power."""
    for pid in processes_of(os.environ[JOB]).keys() - {os.getpid()}:
        os.kill(pid, signal.SIGKILL)
    kill()


@marked
def exit_python():
    sys.exit(0)


WHATS = {
    "error": error,
    "memory": memory,
    "recursion": recursion,
    "wait": wait,
    "kill": kill,
    "kill_all": kill_all,
    "exit": exit_python,
}

PLACES = {
    # in a rank: (module, name, calls that go well before)
    "join": ("engine.ranks", "join", 0),
    "lock": ("engine.start.lock", "lock", 0),
    "find": ("engine.checkpoints.find", "damage", 0),
    "write_config": ("engine.start.folder", "write_config", 0),
    "index": ("data.pipeline", "build_indexes", 0),
    "data": ("engine.start.run", "open_run_data", 0),
    "model": ("engine.start.model", "build_model", 0),
    "engine": ("engine.start.engine", "Zero", 0),
    "load": ("engine.start.resume", "load_checkpoint", 0),
    "truncate_metrics": ("engine.start.resume", "truncate_metrics", 0),
    "tracker": ("engine.start.run", "start_tracker", 0),
    "loader_start": ("data.loader", "DataLoader", 0),
    "decode_start": ("data.loader", "decode_server", 0),
    "step": ("engine.loop", "train_step", 1),
    "ledger": ("data.pipeline", "_ledger_lines", 1),
    "log": ("engine.loop", "log_step", 1),
    "console": ("engine.monitor.console", "Console.metrics", 1),
    "tracker_log": ("engine.tracking.tracker", "NoTracker.log", 1),
    "save": ("engine.checkpoints.saver", "write_checkpoint", 0),
    "random_state": ("engine.checkpoints.save", "save_random_state", 0),
    "digests": ("engine.checkpoints.save", "digests_of", 0),
    "manifest": ("engine.checkpoints.save", "manifest_text", 1),
    "rename": ("engine.checkpoints.save", "sync_tree", 1),
    "latest": ("engine.checkpoints.save", "write_whole", 1),
    "delete_old": ("engine.checkpoints.save", "delete_old", 1),
    "evaluation": ("engine.held_out.in_run", "evaluate", 0),
    "record_evaluation": ("engine.held_out.in_run", "record_evaluation", 0),
    "mark_finished": ("engine.loop", "mark_finished", 0),
}
"""Places in the code that a rank runs. ``plant`` has others."""


@dataclass(frozen=True, kw_only=True)
class FailingDataset(PackDataset):
    """Fails in the loader's worker, which pickles the class by its name: a patched method would not get there."""

    what: str
    where: str

    def __getitem__(self, number):
        if number >= 2 and self.where == "worker":
            WHATS[self.what]()
        if number >= 2:
            loader.collate = WHATS[self.what]
        return super().__getitem__(number)


def serve(what, where, *arguments):
    """A decode server that fails, or whose decode processes do; it is started in a process of its own."""
    if where == "decode_server":
        WHATS[what]()
    decode_server.render_family = WHATS[what]
    decode_server.serve(*arguments)


def half_deleted(act, checkpoints, *, newest, keep):
    """A checkpoint that is being deleted lacks its first file when ``act`` comes."""
    oldest = min(checkpoints.glob("step_????????"))
    if oldest.name != newest:
        shutil.rmtree(oldest / "random")
        act()


def hold():
    """From now on this process does one step, and waits before the next until it is asked to stop."""
    loop = import_module("vl3train.engine.loop")
    requests, steps_to_do = [], loop.steps_to_do

    class Kept(loop.StopRequest):
        def __init__(self, *words):
            super().__init__(*words)
            requests.append(self)

    def held(*words):
        for number, step in enumerate(steps_to_do(*words)):
            while number and not requests[0].requested:
                time.sleep(0.01)
            yield step

    loop.StopRequest, loop.steps_to_do = Kept, held


def after(calls, planted, original):
    """``original`` for some calls, then ``planted``."""
    left = [calls]

    def call(*args, **settings):
        left[0] -= 1
        return original(*args, **settings) if left[0] >= 0 else planted(*args, **settings)

    return call


def plant(what, where):
    """Put it there, in this process."""
    act = WHATS[what]
    if where in ("worker", "collate"):
        failing = functools.partial(FailingDataset, what=what, where=where)
        import_module("vl3train.data.pipeline").PackDataset = failing
    elif where in ("decode", "decode_server"):
        client = import_module("vl3train.data.render.decode_client")
        client.serve = functools.partial(serve, what, where)
    elif where == "gather_evaluation":
        module = import_module("vl3train.engine.held_out.losses")
        module.dist = types.SimpleNamespace(all_gather_object=act)
    elif where == "half_deleted":
        save = import_module("vl3train.engine.checkpoints.save")
        save.delete_old = functools.partial(half_deleted, act)
    else:
        module, names, calls = PLACES[where]
        *outer, name = names.split(".")
        owner = import_module(f"vl3train.{module}")
        for one in outer:
            owner = getattr(owner, one)
        setattr(owner, name, after(calls, act, getattr(owner, name)))


def main():
    """Plant it, and train."""
    planted, rank, *words = sys.argv[1:]
    if planted == "hold":
        hold()
    elif planted != "none" and os.environ["RANK"] == rank:
        if planted in ("nan", "nan_always"):
            steps = [2] if planted == "nan" else range(1000)
            import_module("tests.engine.bad_numbers").plant(dict.fromkeys(steps, math.nan))
        else:
            plant(*planted.split("@"))
    stop.SECONDS_FOR_DATA = 1.0
    sys.argv[1:] = words
    train.run_process()


if __name__ == "__main__":
    from tests.engine import planted  # by its own name, under which a worker finds the class

    planted.main()
