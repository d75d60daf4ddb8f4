"""Ranks are counted alike by the commands that train and those that look ahead."""

from __future__ import annotations

from argparse import ArgumentParser
from importlib import import_module

import pytest

from vl3train.cli import ranks


@pytest.mark.parametrize("gpus", [0, 4])
@pytest.mark.parametrize("command", ["train", "check", "plan"])
def test_the_ranks_of_a_run(command, gpus, monkeypatch):
    monkeypatch.setattr(ranks, "gpu_count", lambda: gpus)
    parser = ArgumentParser()
    import_module(f"vl3train.cli.{command}").add_arguments(parser)

    def counted(*words):
        return ranks.ranks_of(parser.parse_args(words))

    assert counted("stage=1", "--nproc", "3") == 3
    assert counted("stage=1", "machine.dp_size=2") is None, "as it is written"
    assert counted("stage=1") == (gpus or None)


def test_torch_is_not_asked_where_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "GPU_DEVICES", ("no_such_device*",))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 9)
    assert ranks.gpu_count() == 0
    monkeypatch.setattr(ranks, "GPU_DEVICES", ("null",))
    assert ranks.gpu_count() == 9
