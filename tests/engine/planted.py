"""The train command with a failure planted in one rank: ``torchrun ... -m tests.engine.planted KIND RANK words``."""

from __future__ import annotations

import math
import os
import signal
import sys
from importlib import import_module

from vl3train import train
from vl3train.data.loader import PackDataset


def raise_planted(*_args, **_settings):
    raise IndexError("planted here")


def interrupt(*_args, **_settings):
    os.kill(os.getpid(), signal.SIGINT)


def kill(*_args, **_settings):
    os.kill(os.getpid(), signal.SIGKILL)


def end_python(*_args, **_settings):
    sys.exit(0)


class FailingDataset(PackDataset):
    """Fails in the loader's worker, which pickles the class by its name: a patched method would not get there."""

    def __getitem__(self, number):
        if number >= 4:
            raise_planted()
        return super().__getitem__(number)


PLANTS = {
    # kind: (module, name, calls that go well, what is planted)
    "step": ("engine.loop", "train_step", 2, raise_planted),
    "interrupt": ("engine.loop", "train_step", 2, interrupt),
    "exit": ("engine.loop", "train_step", 2, end_python),
    "kill": ("engine.loop", "train_step", 2, kill),
    "log": ("engine.loop", "log_step", 2, raise_planted),
    "save": ("engine.loop", "save_checkpoint", 0, raise_planted),
    "evaluation": ("engine.loop", "evaluate", 0, raise_planted),
    "ledger": ("data.pipeline", "_ledger_lines", 2, raise_planted),
    "model": ("engine.start.model", "build_model", 0, raise_planted),
    "data": ("engine.start.run", "open_run_data", 0, raise_planted),
    "engine": ("engine.start.engine", "Zero", 0, raise_planted),
    "tracker": ("engine.start.run", "Tracker", 0, raise_planted),
    "join": ("engine.ranks", "join", 0, raise_planted),
    "loader_start": ("data.loader", "DataLoader", 0, raise_planted),
    "decode_start": ("data.loader", "decode_server", 0, raise_planted),
}


def after(calls, planted, original):
    """``original`` for some calls, then ``planted``."""
    left = [calls]

    def call(*args, **settings):
        left[0] -= 1
        return original(*args, **settings) if left[0] >= 0 else planted(*args, **settings)

    return call


def main():
    kind, rank, *words = sys.argv[1:]
    if os.environ["RANK"] == rank:
        if kind == "nan":
            import_module("tests.engine.bad_numbers").plant({2: math.nan})
        elif kind == "worker":
            import_module("vl3train.data.pipeline").PackDataset = FailingDataset
        else:
            name, attribute, calls, planted = PLANTS[kind]
            module = import_module(f"vl3train.{name}")
            setattr(module, attribute, after(calls, planted, getattr(module, attribute)))
    sys.argv[1:] = words
    train.run_process()


if __name__ == "__main__":
    from tests.engine import planted  # by its own name, under which a worker finds the class

    planted.main()
