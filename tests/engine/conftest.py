"""A small demo, drawn once a session: a few samples of every source, and the debug model's parts."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from tests.conftest import made_once
from tests.engine.late_link import LateCopy
from tests.engine.small_demo import make_small_demo, small_demo_words
from vl3train.config.choices import Device
from vl3train.config.schema import MachineConfig
from vl3train.engine.optim import offload_chunk
from vl3train.engine.ranks import Rank, join
from vl3train.model import packed_forward


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``vl3train demo`` makes it; the language model is trained for two steps only."""

    return made_once(tmp_path_factory, "demo", make_small_demo)


@pytest.fixture
def one_rank() -> Rank:
    """This process as a world of one."""
    return join(MachineConfig(device=Device.cpu))


@pytest.fixture(scope="session")
def demo_words(demo_root: Path) -> list[str]:
    """The options that every run on the small demo shares."""
    return small_demo_words(demo_root)


@pytest.fixture
def late_link(monkeypatch: pytest.MonkeyPatch) -> tuple[list[LateCopy], list[LateCopy]]:
    """Which of AdamW's moments are on their way in, and out, of a GPU whose link is as late as it can be."""
    device_waits = types.SimpleNamespace(wait_event=lambda event: event.synchronize())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device_waits)
    queues: tuple[list[LateCopy], list[LateCopy]] = [], []
    monkeypatch.setattr(offload_chunk, "_streams", lambda _: queues)
    monkeypatch.setattr(
        offload_chunk,
        "_copy",
        lambda sources, targets, queue, after=(): LateCopy(queue, sources, targets, after),
    )
    return queues


@pytest.fixture(scope="module")
def most_supervised():
    """Nearly all tokens of each pack: its last layer works for all, and takes the most that it can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_forward, "last_positions", lambda _: None)
        yield
