"""A loader's worker that cannot go on ends, and its rank hears of it."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from vl3train.data.loader import begin_worker
from vl3train.data.render.processes import clean_processes


class Unsendable(Dataset):
    """What cannot be sent to the rank, as a pack for which shared memory has no room."""

    def __getitem__(self, number):
        return threading.Lock()


def begin_with_errors_in(file: Path, number: int) -> None:
    """A worker's standard error is that of the fork server, which an earlier test may have started."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
    begin_worker(None, number)


def test_a_pack_that_cannot_be_sent_ends_its_worker(tmp_path):
    loader = DataLoader(
        Unsendable(),
        batch_size=None,
        sampler=range(1),
        num_workers=1,
        worker_init_fn=functools.partial(begin_with_errors_in, tmp_path / "errors"),
        multiprocessing_context=clean_processes(),
    )
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        next(iter(loader))
    said = (tmp_path / "errors").read_text()
    assert (
        "a loader worker could not send a pack: cannot pickle '_thread.lock' object. Where shared memory"
        in said
    )
